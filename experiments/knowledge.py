"""When does a model that stores a fact also answer the question about it? (arXiv 2508.00901)

    python -m experiments.knowledge                              the demo: grid, ablations and invented people
    python -m experiments.knowledge --preset small               the whole grid of one-layer models
    python -m experiments.knowledge --preset small --text real --pararel FOLDER --popqa FILE   real facts

A one-layer transformer is pre-trained on statements and fine-tuned on questions about a few subjects; what it then says
about the others is extraction. The sources we have give no model, generator, sizes or accuracies of the paper: all of
them are our reconstruction (`synthetic.facts`, `bert6_jax.one_layer`), its predictions P1 to P10 are tested in kind and
no number here is the paper's. The same question asked of language models is `experiments.knowledge_text` (`--text`).

Read from top to bottom: settings, the parts of the study and what they ask for, the banks that answer, claims, tables,
figures. A part names its pre-trainings (`Cell`) and fine-tunings (`Tuning`); all that share a kind of model are trained
in one compiled program, whatever part they belong to. Letters beside those of `synthetic.facts` and
`bert6_jax.one_layer`: S seeds, G members of a bank of pre-trainings, J of a bank of fine-tunings, X settings of a part.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert6_jax import checkpoint, one_layer, parallel, train
from bert6_jax.errors import InputError
from bert6_jax.one_layer import QUESTION_AT, STATEMENT_AT, OneLayerConfig, Recipe
from bert6_jax.train import take
from experiments import knowledge_text
from experiments.harness import claims, cli, figures, report
from experiments.harness.claims import Claim, interval, named
from experiments.harness.cli import option
from experiments.harness.run import Run
from synthetic import facts
from synthetic.facts import FactsConfig

PAPER = "2508.00901"
PARTS = ("grid", "trained", "gradient", "ablation", "schedules", "variations")
VARIATIONS = ("sgd", "separate", "gaussian", "trained", "zipf")
DRAWS = 4  # draws of noise that a question is asked with

# what a member's key is folded with, one number a purpose
WORLD, START, ROWS, CHOOSE, ADAPTER, QUESTIONS, ASKED = range(7)


@dataclass(frozen=True)
class KnowledgeConfig(knowledge_text.TextConfig):
    """One-layer models; every value is ours, the paper's are not published in the sources we have."""

    parts: tuple[str, ...] = option(PARTS[:5], "parts of the study of one-layer models", "one layer", choices=PARTS)
    subjects: int = option(256, "N: subjects of a world", "one layer", min=2)
    templates: tuple[int, ...] = option((8, 32, 128), "R: templates of an attribute, an axis", "one layer", min=1)
    multiplicities: tuple[int, ...] = option((1, 2, 4), "K: templates of a fact, an axis", "one layer", min=1)
    tuned: tuple[int, ...] = option((4, 16, 64), "N_f: subjects that are asked about in fine-tuning, an axis",
                                    "one layer", min=1)  # fmt: skip
    reference: int = option(32, "R of the parts beside the grid, one of --templates", "one layer", min=1)
    answers: int = option(8, "A: answers of an attribute", "one layer", min=2)
    noise: int = option(8, "Z: noise tokens", "one layer", min=1)
    zipf: float = option(0.0, "exposure of subjects: rank to the power of minus this", "one layer", min=0.0)
    choose: str = option("random", "subjects of the fine-tuning set", "one layer", choices=facts.CHOICES)

    hidden: int = option(256, "d: hidden units of the MLP", "one layer", min=1)
    attention: str = option("merged", "key and query: one matrix or two", "one layer", choices=("merged", "separate"))
    embedding: str = option("one_hot", "embedding of tokens", "one layer", choices=("one_hot", "gaussian", "trained"))
    optimizer: str = option("adam", "optimiser of both phases", "one layer", choices=one_layer.OPTIMIZERS)
    steps: int = option(1_500, "steps of pre-training", "one layer", min=25)
    batch: int = option(256, "rows of a step of pre-training", "one layer", min=1)
    lr: float = option(3e-3, "its learning rate", "one layer", min=0.0)
    schedule: str = option("cosine", "its schedule", "one layer", choices=train.STEP_SCHEDULES)
    trainable: str = option("lora", "what fine-tuning trains in the grid", "one layer", choices=one_layer.TRAINABLE)
    rank: int = option(1, "rank of the adapter of W_in", "one layer", min=1)
    tuning_steps: int = option(300, "steps of fine-tuning an adapter", "one layer", min=25)
    tuning_lr: float = option(5e-3, "its learning rate", "one layer", min=0.0)
    full_steps: int = option(200, "steps of fine-tuning W_in or everything", "one layer", min=25)
    full_lr: float = option(1e-3, "its learning rate", "one layer", min=0.0)
    tuning_batch: int = option(64, "rows of a step of fine-tuning, drawn with replacement", "one layer", min=1)

    confound_answers: int = option(
        32, "A of the part `trained`: many answers, so that few are asked for", "parts", min=2
    )
    confound_tuned: tuple[int, ...] = option((2, 8, 32, 128), "its N_f", "parts", min=1)
    shared_attributes: int = option(4, "M of the part `ablation`, which share one pool of answers", "parts", min=2)
    shared_answers: int = option(16, "its A", "parts", min=2)
    shared_templates: int = option(8, "its R", "parts", min=1)
    shared_multiplicity: int = option(4, "its K", "parts", min=1)
    shared_hidden: int = option(512, "its d", "parts", min=1)
    shared_steps: int = option(2_500, "its steps of pre-training", "parts", min=25)
    shared_tuned: int = option(64, "its N_f", "parts", min=1)
    shared_tuning_steps: int = option(400, "its steps of fine-tuning", "parts", min=25)
    ranks: tuple[int, ...] = option((1, 2, 4), "its ranks of the adapter: one format a rank is needed", "parts", min=1)
    schedules: tuple[str, ...] = option(
        ("constant", "warmup_linear", "step"),
        "schedules that the part `schedules` puts beside --schedule",
        "parts",
        choices=train.STEP_SCHEDULES,
    )
    variations: tuple[str, ...] = option(VARIATIONS, "changes of the part `variations`", "parts", choices=VARIATIONS)
    sgd_lr: float = option(2.0, "rate of stochastic gradient descent, pre-training", "parts", min=0.0)
    sgd_tuning_lr: float = option(0.5, "the same, fine-tuning", "parts", min=0.0)

    def __post_init__(self):
        super().__post_init__()
        for name in ("templates", "multiplicities", "tuned", "confound_tuned", "ranks"):
            if not getattr(self, name) and self.parts:
                raise InputError(f"--{name.replace('_', '-')} is empty; give at least one value")
        if not self.parts:
            if not self.text:
                raise InputError("--parts and --text are both empty, so there is nothing to do; name a part or a set")
            return
        cli.no_value_twice(
            self, ("templates", "multiplicities", "tuned", "confound_tuned", "ranks", "schedules", "variations")
        )
        if self.choose in ("known", "unknown") and not self.zipf:
            raise InputError(f"--choose {self.choose} needs subjects that differ in exposure; give --zipf, say 1")
        if "gradient" in self.parts and "grid" not in self.parts:
            raise InputError("--parts gradient reads models of the grid; add grid to --parts")
        if "gradient" in self.parts and self.embedding != "one_hot":
            raise InputError(
                "--parts gradient reads rows of W_in as tokens, which they are with --embedding one_hot alone; drop it"
            )
        if max(self.multiplicities) > min(self.templates):
            raise InputError(
                f"--multiplicities {max(self.multiplicities)} is larger than --templates {min(self.templates)}; "
                "a fact is stated with K different ones of R templates: lower K or raise R"
            )
        if self.shared_multiplicity > self.shared_templates:
            raise InputError(
                f"--shared-multiplicity {self.shared_multiplicity} is larger than --shared-templates "
                f"{self.shared_templates}; a fact is stated with K different ones of R templates: lower K or raise R"
            )
        if self.reference not in self.templates:
            raise InputError(
                f"--reference {self.reference} is none of --templates {', '.join(map(str, self.templates))}"
            )
        for name in ("tuned", "confound_tuned", "shared_tuned"):
            largest = np.max(getattr(self, name))
            if largest >= self.subjects:
                raise InputError(
                    f"--{name.replace('_', '-')} {largest} leaves none of --subjects {self.subjects} to ask; lower it"
                )

    @property
    def seed_list(self) -> list[int]:
        return [self.seed + s for s in range(self.seeds)]

    @property
    def all_schedules(self) -> list[str]:
        """The grid's own first."""
        return list(dict.fromkeys((self.schedule, *self.schedules)))

    @property
    def all_variations(self) -> list[str]:
        """The grid's own first; Zipf exposure twice, by who is fine-tuned on."""
        both = {"zipf": ["zipf known", "zipf unknown"]}
        return ["as the grid", *(name for change in self.variations for name in both.get(change, [change]))]


PRESETS = {
    "demo": KnowledgeConfig(
        subjects=128, hidden=128, templates=(8, 32), multiplicities=(1, 4), steps=800, lr=5e-3, seeds=5,
        schedules=("constant",), confound_answers=16, confound_tuned=(2, 8, 32, 64), tuning_steps=200, full_steps=150,
        full_lr=3e-3, shared_attributes=2, shared_hidden=128, shared_steps=600, shared_tuning_steps=200, ranks=(1, 2),
        text_seeds=1, text_multiplicities=(1, 4), tuned_shares=(0.1, 0.5), people=120,
        text_attributes=("birth_city", "company"), text_values=12, text_blocks=2, text_width=96, text_heads=3,
        text_steps=200, text_lr=6e-3, text_tune_steps=80, text_tune_batch=16, text_tune_lr=1e-3,
        text_adapter_lr=5e-3, text_vocab_size=2_000,
    ),
    "small": KnowledgeConfig(parts=PARTS, seeds=5),
    # the paper's own sizes are not in the sources we have; this one is ours too
    "paper": KnowledgeConfig(parts=PARTS, seeds=10, templates=(8, 32, 128, 512), multiplicities=(1, 2, 4, 8),
                             tuned=(2, 4, 8, 16, 32, 64)),
}  # fmt: skip


# --- what is asked for -----------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One pre-training."""

    world: FactsConfig
    model: OneLayerConfig
    recipe: Recipe
    lr: float
    schedule: str
    seed: int


class Tuning(NamedTuple):
    """One fine-tuning of a cell."""

    cell: Cell
    which: str  # what is trained
    recipe: Recipe
    lr: float
    subjects: int  # N_f
    rank: int
    how: str  # how they are chosen


def make_cell(
    cfg: KnowledgeConfig,
    seed: int,
    *,
    steps: int | None = None,
    lr: float | None = None,
    schedule: str | None = None,
    optimizer: str | None = None,
    model: dict[str, Any] | None = None,
    **world,
) -> Cell:
    """A pre-training with the settings of the command line; `world` and `model` replace fields of theirs."""
    base = FactsConfig(cfg.subjects, 1, cfg.reference, 1, cfg.answers, noise=cfg.noise, zipf=cfg.zipf)
    facts_cfg = dataclasses.replace(base, **world)
    kind = {"hidden": cfg.hidden, "attention": cfg.attention, "embedding": cfg.embedding} | (model or {})
    recipe = Recipe(cfg.steps if steps is None else steps, cfg.batch, optimizer or cfg.optimizer)
    model_cfg = OneLayerConfig(facts_cfg.tokens.vocab_size, **kind)
    return Cell(facts_cfg, model_cfg, recipe, cfg.lr if lr is None else lr, schedule or cfg.schedule, seed)


def make_tuning(
    cfg: KnowledgeConfig,
    cell: Cell,
    subjects: int,
    *,
    which: str | None = None,
    rank: int | None = None,
    how: str | None = None,
    steps: int | None = None,
    lr: float | None = None,
) -> Tuning:
    """A fine-tuning with the settings of the command line."""
    which = which or cfg.trainable
    adapter = which == "lora"
    steps = (cfg.tuning_steps if adapter else cfg.full_steps) if steps is None else steps
    lr = (cfg.tuning_lr if adapter else cfg.full_lr) if lr is None else lr
    rank = (cfg.rank if rank is None else rank) if adapter else 1
    recipe = Recipe(steps, cfg.tuning_batch, cell.recipe.optimizer)
    return Tuning(cell, which, recipe, lr, subjects, rank, how or cfg.choose)


# Each part names its fine-tunings as nested lists, seeds first; `found_in` turns what was found there into an array.


def grid(cfg: KnowledgeConfig) -> list:
    """The main trend, [S][R][K][N_f]."""
    return [[[[make_tuning(cfg, make_cell(cfg, seed, templates=R, multiplicity=K), n) for n in cfg.tuned]
              for K in cfg.multiplicities] for R in cfg.templates] for seed in cfg.seed_list]  # fmt: skip


TRAINED = ("all", "mlp_in", "lora", "all, stratified")


def trained(cfg: KnowledgeConfig) -> list:
    """What is trained and the answer-seen confound: many answers, of which few are asked for, [S][X][N_f]."""

    def one(seed, name, n):
        cell = make_cell(cfg, seed, multiplicity=max(cfg.multiplicities), answers=cfg.confound_answers)
        which, _, even = name.partition(", ")
        return make_tuning(cfg, cell, n, which=which, how=even or "random")

    return [[[one(seed, name, n) for n in cfg.confound_tuned] for name in TRAINED] for seed in cfg.seed_list]


POOLS, KINDS = ("shared", "private"), ("relu", "none")


def ablation(cfg: KnowledgeConfig) -> list:
    """With and without the relu, answers in one pool of all attributes or one for each, [S][pool][kind][rank]."""

    def one(seed, pool, kind, rank):
        cell = make_cell(
            cfg, seed, steps=cfg.shared_steps, model={"hidden": cfg.shared_hidden, "activation": kind},
            attributes=cfg.shared_attributes, answers=cfg.shared_answers, templates=cfg.shared_templates,
            multiplicity=cfg.shared_multiplicity, shared=pool == "shared",
        )  # fmt: skip
        return make_tuning(cfg, cell, cfg.shared_tuned, which="lora", rank=rank, steps=cfg.shared_tuning_steps)

    return [[[[one(seed, pool, kind, rank) for rank in cfg.ranks] for kind in KINDS] for pool in POOLS]
            for seed in cfg.seed_list]  # fmt: skip


def schedules(cfg: KnowledgeConfig) -> list:
    """Schedules of pre-training at the least K, the grid's own first, [S][X][N_f]."""

    def one(seed, name, n):
        return make_tuning(cfg, make_cell(cfg, seed, multiplicity=min(cfg.multiplicities), schedule=name), n)

    return [[[one(seed, name, n) for n in cfg.tuned] for name in cfg.all_schedules] for seed in cfg.seed_list]


def variations(cfg: KnowledgeConfig) -> list:
    """One change at a time at the reference R, the grid's own first, [S][X][K][N_f]."""

    def one(seed, name, K, n):
        base = {"multiplicity": K}
        if name == "sgd":
            cell = make_cell(cfg, seed, optimizer="sgd", lr=cfg.sgd_lr, **base)
            return make_tuning(cfg, cell, n, lr=cfg.sgd_tuning_lr)
        if name.startswith("zipf"):
            cell = make_cell(cfg, seed, zipf=cfg.zipf or 1.0, **base)
            return make_tuning(cfg, cell, n, how=name.partition(" ")[2])
        changed = {"separate": "attention", "gaussian": "embedding", "trained": "embedding"}
        return make_tuning(cfg, make_cell(cfg, seed, model={changed[name]: name} if name in changed else {}, **base), n)

    return [[[[one(seed, name, K, n) for n in cfg.tuned] for K in cfg.multiplicities] for name in cfg.all_variations]
            for seed in cfg.seed_list]  # fmt: skip


ASK = {"grid": grid, "trained": trained, "ablation": ablation, "schedules": schedules, "variations": variations}


def flat(nested) -> list:
    return [x for part in nested for x in flat(part)] if isinstance(nested, list) else [nested]


def found_in(results: dict, nested, name: str) -> np.ndarray:
    """What was found under `name`, in the shape of the nested list of cells or tunings."""
    if isinstance(nested, list):
        return np.array([found_in(results, part, name) for part in nested])
    return np.asarray(results[nested][name])


def cells_of(nested):
    return [cells_of(part) for part in nested] if isinstance(nested, list) else nested.cell


# --- banks -----------------------------------------------------------------------------------------------------------


class Bank(NamedTuple):
    """Cells that share one compiled program; the world has room for the largest of each size."""

    name: str
    world: FactsConfig
    model: OneLayerConfig
    recipe: Recipe
    cells: tuple[Cell, ...]


SPARE = 0.8  # a cell joins a bank if its own vocabulary is at least so much of the bank's: room costs time


def banks_of(cells: Sequence[Cell]) -> list[Bank]:
    """Cells of one kind of model together, as long as none of them pays for much more room than it needs."""
    groups: dict[Any, list[list[Cell]]] = {}
    for cell in sorted(dict.fromkeys(cells), key=lambda c: -c.world.tokens.vocab_size):
        w = cell.world
        kind = (w.subjects, w.attributes, w.noise, dataclasses.replace(cell.model, vocab_size=1), cell.recipe)
        alike = groups.setdefault(kind, [])
        if not alike or cell.world.tokens.vocab_size < SPARE * alike[-1][0].world.tokens.vocab_size:
            alike.append([])
        alike[-1].append(cell)
    banks = []
    for members in (members for alike in groups.values() for members in alike):
        most = {name: max(getattr(c.world, name) for c in members) for name in ("templates", "multiplicity", "answers")}
        world = dataclasses.replace(members[0].world, shared=False, zipf=0.0, **most)
        model = dataclasses.replace(members[0].model, vocab_size=world.tokens.vocab_size)
        banks.append(Bank(f"bank{len(banks)}", world, model, members[0].recipe, tuple(members)))
    return banks


def keys_of(cells: Sequence[Cell], purpose: int) -> jax.Array:
    return jnp.stack([jax.random.fold_in(jax.random.key(cell.seed), purpose) for cell in cells])


def seeds_of(cells: Sequence[Cell], purpose: int) -> jax.Array:
    """Whole numbers that the rows of members are drawn by."""
    return jax.vmap(lambda key: jax.random.bits(key, (), jnp.uint32))(keys_of(cells, purpose))


# One function a world and batch, so that banks of the same kind share their compiled step.


@cache
def statement_rows(world: FactsConfig, batch: int):
    return lambda key, data: facts.sample_statements(key, data["world"], world, batch)


@cache
def question_rows(world: FactsConfig, batch: int):
    return lambda key, data: facts.sample_questions(key, data["world"], world, data["tuned_N"], batch)


@partial(jax.jit, static_argnums=0)
def worlds_of(world: FactsConfig, key_G, sizes_G) -> facts.World:
    return jax.vmap(lambda key, sizes: facts.make_world(key, world, sizes))(key_G, sizes_G)


@partial(jax.jit, static_argnums=(0, 1))
def starts_of(model: OneLayerConfig, world: FactsConfig, key_G) -> one_layer.Params:
    return jax.vmap(lambda key: one_layer.init(key, model, facts.token_names(world)))(key_G)


def fit(run: Run, label: str, step, state: train.TrainState, inputs, recipe: Recipe, mesh, watch=None):
    """Train a bank; returns its parameters and the curves of its losses and hits, [chunks, G] each.

    A bank takes seconds to minutes and is one stage: what was killed in the middle of it starts it again.
    """
    G = len(inputs["rate"])
    return train.fit_grid(
        step,
        state,
        inputs,
        train.FitConfig(recipe.chunks, min(10, recipe.chunks), snapshots=train.log_spaced(recipe.chunks)),
        mesh,
        on_metrics=lambda number, means: run.log(label, number * recipe.chunk, members=G, **means),
        on_snapshot=watch or (lambda number, params: None),
        label=label,
        quiet=run.quiet,
    )


def share(hit, of) -> jax.Array:
    """Mean of `hit` where `of`; NaN over nothing."""
    count = of.sum(dtype=jnp.float32)
    return (hit & of).sum(dtype=jnp.float32) / jnp.where(count > 0, count, jnp.float32(jnp.nan))


def statements_and_questions(params, w: facts.World, key, model: OneLayerConfig, world: FactsConfig):
    """What a model says to every statement, stated or not, and to every question: `Answered` [N, M, R], which are the
    world's own and which unseen, and `Answered` [N, M, X]."""
    keys = jax.random.split(key)
    ids, own, unseen = facts.all_statements(keys[0], w, world)
    asked = facts.all_questions(keys[1], w, world, DRAWS)
    said = one_layer.answers(params, jnp.concatenate([ids, asked], axis=2), model, w.used_V)
    return take(said, np.s_[:, :, : world.templates]), own, unseen, take(said, np.s_[:, :, world.templates :])


@partial(jax.jit, static_argnums=(0, 1))
def look(model: OneLayerConfig, world: FactsConfig, params_G, world_G, key_G) -> dict[str, jax.Array]:
    """What pre-trained models do, [G] each: losses, how far templates are known, stated and not, and their geometry."""

    def one(args):
        params, w, key = args
        keys = jax.random.split(key)
        rows = facts.sample_statements(keys[0], w, world, 4_096)
        _, sums = one_layer.loss(params, rows, model, STATEMENT_AT, w.used_V)
        said, own, unseen, asked = statements_and_questions(params, w, keys[1], model, world)
        kinds = facts.kinds(w, world)
        found = {
            "loss_r": sums["loss_2"] / sums["count"],
            "loss_a": sums["loss_3"] / sums["count"],
            "store": share(said.hit, own),
            "unseen": share(said.hit, unseen),
            "zero_shot": asked.hit.mean(),
            "stored_NM": jnp.where(own, said.hit, True).all(-1),
        }
        if model.embedding == "one_hot":
            geometry = one_layer.template_geometry(params["in"], kinds.template_V, kinds.attribute_V)
            found |= {f"cosine_{name}": value for name, value in geometry.items()}
        return found

    return jax.lax.map(one, (params_G, world_G, key_G))


@partial(jax.jit, static_argnums=0)
def attention_at(model: OneLayerConfig, params_G, ids_GBT) -> jax.Array:
    """Mean attention of the template's position on (n, s, n', r), [G, 4]."""

    def one(args):
        return one_layer.forward(*args, model, QUESTION_AT)["pattern"][:, 0, :4].mean(0)

    return jax.lax.map(one, (params_G, ids_GBT))


class Acquired(NamedTuple):
    """A pre-trained bank."""

    bank: Bank
    world: facts.World  # [G, ...]
    params: Callable[[], one_layer.Params]  # [G, ...], read from the checkpoint when they are first asked for
    found: dict[str, np.ndarray]  # [G, ...]


def acquire(run: Run, bank: Bank, mesh) -> Acquired:
    """Pre-train a bank; its models stay in checkpoints/NAME (kind `one_layer`, leading axis G)."""
    path, model = run.out / "checkpoints" / bank.name, bank.model
    sizes_G = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(cell.world.sizes for cell in bank.cells))
    world = worlds_of(bank.world, keys_of(bank.cells, WORLD), sizes_G)
    kept: list[Any] = []

    def stage() -> dict:
        start = starts_of(model, bank.world, keys_of(bank.cells, START))
        weights, frozen = one_layer.split(jax.random.key(0), start, model, "all")
        rows = statement_rows(bank.world, bank.recipe.batch)
        step = one_layer.make_step(model, bank.recipe, rows, STATEMENT_AT, mesh)
        ask = keys_of(bank.cells, ASKED)
        sample = jax.jit(jax.vmap(lambda key, w: facts.sample_statements(key, w, bank.world, 512)))(ask, world)
        looks: dict[int, np.ndarray] = {}

        def watch(number, weights_G):
            params_G = one_layer.assemble(weights_G, frozen)
            looks[number * bank.recipe.chunk] = np.asarray(attention_at(model, params_G, sample))

        inputs = {
            "rate": jnp.stack([bank.recipe.rates(cell.lr, cell.schedule) for cell in bank.cells]),
            "seed": seeds_of(bank.cells, ROWS), "frozen": frozen, "base": jnp.arange(len(bank.cells), dtype=jnp.int32),
            "data": {"world": world, "used_V": world.used_V},
        }  # fmt: skip
        state = one_layer.init_bank(weights, bank.recipe, jax.random.key(0))
        weights, curves = fit(run, f"pretrain-{bank.name}", step, state, inputs, bank.recipe, mesh, watch)
        params = one_layer.assemble(weights, jax.device_get(frozen))
        if run.primary:
            shutil.rmtree(path, ignore_errors=True)  # of a run that was killed before the stage was kept
            description = {"model": dataclasses.asdict(model), "facts": dataclasses.asdict(bank.world)}
            members = [
                dataclasses.asdict(c.world) | {"lr": c.lr, "schedule": c.schedule, "seed": c.seed} for c in bank.cells
            ]
            checkpoint.save(path, params, kind="one_layer", config=description, step=bank.recipe.steps,
                            extra={"members": members})  # fmt: skip
        kept.append(params)
        return {
            **look(model, bank.world, params, world, ask),
            **{f"curve_{name}": values.T for name, values in curves.items()},
            "attention_step": np.tile(sorted(looks), (len(bank.cells), 1)),
            "attention_XT": np.stack([looks[step] for step in sorted(looks)], axis=1),
        }

    found = run.stage(f"pretrain-{bank.name}", stage)
    warn(found["curve_finite"], [f"R={c.world.templates} K={c.world.multiplicity} seed {c.seed}" for c in bank.cells])

    def params():
        if not kept:
            kept.append(checkpoint.load(path, kind="one_layer").tree)
        return kept[0]

    return Acquired(bank, world, params, found)


def warn(finite_GX, names: Sequence[str]) -> None:
    bad = [name for name, finite_X in zip(names, finite_GX, strict=True) if not finite_X[-1]]
    if bad:
        print(f"warning: {len(bad)} of {len(names)} models diverged and stopped there, the first {bad[0]}; lower the "
              "learning rate", file=sys.stderr)  # fmt: skip


BLOCK = 16  # fine-tuned models that are looked at in one call, so that all banks share its program


@partial(jax.jit, static_argnums=(0, 1))
def look_again(model: OneLayerConfig, world: FactsConfig, before_J, after_J, world_J, tuned_JN, stored_JNM, key_J):
    """What fine-tuned models do, [J] each."""

    def one(args):
        before, params, w, tuned_N, stored_NM, key = args
        again, own, _, said = statements_and_questions(params, w, key, model, world)
        by = facts.covered(w, tuned_N, world)
        held_NM = jnp.broadcast_to(~tuned_N[:, None], stored_NM.shape)

        def over(of_NM):  # questions of these facts
            return share(said.hit, jnp.broadcast_to(of_NM[..., None], said.hit.shape))

        kept_NMX = jnp.broadcast_to((held_NM & stored_NM)[..., None], said.hit.shape)
        found = {
            "extraction": over(held_NM),
            "tuned_accuracy": over(~held_NM),
            "coverage": by.coverage,
            "reach": by.reach,
            "seen_share": share(by.answer_seen_NM, held_NM),
            "lost": share(~said.hit, kept_NMX),
            "hallucination": share(said.probability > 0.5, kept_NMX & ~said.hit),
            "store_after": share(again.hit, own),
        }
        for name, of_NM in (("seen", by.answer_seen_NM), ("unseen", ~by.answer_seen_NM)):
            found[f"answer_{name}"] = over(held_NM & of_NM)
            for cover, reached_NM in (("reached", by.reached_NM), ("missed", ~by.reached_NM)):
                found[f"answer_{name}_{cover}"] = over(held_NM & of_NM & reached_NM)
                found[f"count_{name}_{cover}"] = (held_NM & of_NM & reached_NM).sum()
        if model.embedding == "one_hot":
            kinds = facts.kinds(w, world)
            moved = one_layer.direction_change(
                before["in"], params["in"], kinds.form_V, kinds.template_V, kinds.subject_V
            )
            found |= {f"moved_{name}": value for name, value in moved.items()}
        return found

    return jax.lax.map(one, (before_J, after_J, world_J, tuned_JN, stored_JNM, key_J))


@partial(jax.jit, static_argnums=(0, 1))
def choose(world: FactsConfig, how: str, key_J, world_J, count_J) -> jax.Array:
    """Who is fine-tuned on, bool [J, N]."""
    return jax.vmap(lambda *one: facts.choose_subjects(*one, how))(key_J, world_J, count_J)


def chosen(got: Acquired, tunings: Sequence[Tuning], base_J) -> jax.Array:
    out = np.zeros((len(tunings), got.bank.world.subjects), bool)
    for how in sorted({t.how for t in tunings}):
        of = np.array([j for j, t in enumerate(tunings) if t.how == how])
        keys = keys_of([tunings[j].cell for j in of], CHOOSE)
        counts = jnp.array([tunings[j].subjects for j in of], jnp.int32)
        out[of] = choose(got.bank.world, how, keys, take(got.world, base_J[of]), counts)
    return jnp.asarray(out)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def adapters(model: OneLayerConfig, world: FactsConfig, which: str, room: int, params_G, base_J, key_J, rank_J):
    """What is trained, [J, ...], and what is not, [G, ...]."""

    def one(key, base, rank):
        return one_layer.split(key, take(params_G, base), model, which, rank, room, facts.token_names(world))[0]

    frozen_G = jax.vmap(lambda params: one_layer.split(key_J[0], params, model, which)[1])(params_G)
    return jax.vmap(one)(key_J, base_J, rank_J), frozen_G


@jax.jit
def assembled(trained_J, frozen_G, base_J) -> one_layer.Params:
    return jax.vmap(lambda trained, base: one_layer.assemble(trained, take(frozen_G, base)))(trained_J, base_J)


def extract(run: Run, name: str, got: Acquired, tunings: Sequence[Tuning], mesh) -> dict[str, np.ndarray]:
    """Fine-tune members of a bank, all in the same way, and ask about the other subjects, [J] each."""
    bank, model = got.bank, got.bank.model
    which, recipe = tunings[0].which, tunings[0].recipe

    def stage() -> dict:
        cells = [t.cell for t in tunings]
        base_J = np.array([bank.cells.index(cell) for cell in cells], np.int32)
        world_J, params_G = take(got.world, base_J), got.params()
        tuned_JN = chosen(got, tunings, base_J)
        ranks = jnp.array([t.rank for t in tunings], jnp.int32)
        start_J, frozen_G = adapters(model, bank.world, which, max(t.rank for t in tunings), params_G, base_J,
                                     keys_of(cells, ADAPTER), ranks)  # fmt: skip
        inputs = {
            "rate": jnp.stack([recipe.rates(t.lr) for t in tunings]),
            "seed": seeds_of(cells, QUESTIONS), "frozen": frozen_G, "base": jnp.asarray(base_J),
            "data": {"world": world_J, "used_V": world_J.used_V, "tuned_N": tuned_JN},
        }  # fmt: skip
        step = one_layer.make_step(model, recipe, question_rows(bank.world, recipe.batch), QUESTION_AT, mesh)
        state = one_layer.init_bank(start_J, recipe, jax.random.key(0))
        trained_J, curves = fit(run, name, step, state, inputs, recipe, mesh)
        stored, ask = jnp.asarray(got.found["stored_NM"]), keys_of(cells, ASKED)
        blocks = []
        for begin in range(0, len(tunings), BLOCK):
            j = np.minimum(np.arange(begin, begin + BLOCK), len(tunings) - 1)
            after = assembled(take(trained_J, j), frozen_G, base_J[j])
            block = look_again(model, bank.world, take(params_G, base_J[j]), after, take(world_J, j), tuned_JN[j],
                               stored[base_J[j]], ask[j])  # fmt: skip
            blocks.append(take(block, np.s_[: len(tunings) - begin]))
        found = jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)
        return {**found, **{f"curve_{key}": values.T for key, values in curves.items()}}

    found = run.stage(name, stage)
    warn(found["curve_finite"], [f"N_f={t.subjects} seed {t.cell.seed}" for t in tunings])
    return found


# --- the study -------------------------------------------------------------------------------------------------------


class Study(NamedTuple):
    """Everything that was found."""

    ask: dict[str, list]  # part -> its tunings, nested
    cells: dict[Cell, dict[str, np.ndarray]]
    tunings: dict[Tuning, dict[str, np.ndarray]]
    gradient: dict[str, np.ndarray] | None  # [pre-trained or start, S, ...]
    banks: list[Bank]


def run_study(run: Run, cfg: KnowledgeConfig, ask: dict[str, list], mesh) -> Study:
    """Train everything that the parts ask for, in as few banks as can be."""
    wanted = list(dict.fromkeys(t for nested in ask.values() for t in flat(nested)))
    cells, tunings, gradient = {}, {}, None
    banks = banks_of([t.cell for t in wanted])
    for bank in banks:
        got = acquire(run, bank, mesh)
        cells |= {cell: {name: v[g] for name, v in got.found.items()} for g, cell in enumerate(bank.cells)}
        alike: dict[Any, list[Tuning]] = {}
        for t in wanted:
            if t.cell in got.bank.cells:
                alike.setdefault((t.which, t.recipe), []).append(t)
        for number, ((which, _), group) in enumerate(alike.items()):
            found = extract(run, f"tune-{bank.name}-{number}-{which}", got, group, mesh)
            tunings |= {t: {name: v[j] for name, v in found.items()} for j, t in enumerate(group)}
        of = gradient_cells(cfg)
        if "gradient" in cfg.parts and set(of) <= set(bank.cells):  # one bank has them all
            gradient = run_gradient(run, cfg, got, of)
    return Study(ask, cells, tunings, gradient, banks)


def gradient_cells(cfg: KnowledgeConfig) -> list[Cell]:
    return [make_cell(cfg, seed, multiplicity=max(cfg.multiplicities)) for seed in cfg.seed_list]


def run_gradient(run: Run, cfg: KnowledgeConfig, got: Acquired, cells: list[Cell]) -> dict[str, np.ndarray]:
    """Spectrum of the fine-tuning loss's gradient with respect to W_in before fine-tuning, [X, S, ...]: of the
    pre-trained models, and of the same at the start of their pre-training."""
    bank, N_f = got.bank, max(cfg.tuned)

    @jax.jit
    def spectra(params_G, world_G, tuned_GN, key_G):
        def one(args):
            params, w, tuned_N, key = args
            rows = facts.all_questions(key, w, bank.world, 16)[jnp.argsort(~tuned_N)[:N_f]]
            kinds = facts.kinds(w, bank.world)
            return one_layer.gradient_spectrum(
                params, rows.reshape(-1, facts.LENGTH), bank.model, kinds.form_V, kinds.template_V, w.used_V
            )._asdict()

        return jax.lax.map(one, (params_G, world_G, tuned_GN, key_G))

    def stage() -> dict:
        index = np.array([bank.cells.index(cell) for cell in cells])
        tuned = chosen(got, [make_tuning(cfg, cell, N_f) for cell in cells], index)
        both = (take(got.params(), index), starts_of(bank.model, bank.world, keys_of(cells, START)))
        found = [spectra(params, take(got.world, index), tuned, keys_of(cells, ASKED)) for params in both]
        return {name: np.stack([np.asarray(f[name]) for f in found]) for name in found[0]}

    return run.stage("gradient", stage)


# --- claims: RESULTS.md says which rules are older than its runs and which were changed after a first one -------------


def judge(cfg: KnowledgeConfig, s: Study) -> list[Claim]:
    """The predictions P1 to P10 (numbered by us); the paper's values are not in the sources we have."""
    listed: list[Claim] = []

    def claim(name, where, statement, expected, outcome):
        listed.append(Claim(name, f"arXiv {PAPER}, {where}", statement, expected, *outcome))

    if "grid" in s.ask:
        judge_grid(cfg, s, claim)
    if s.gradient is not None:
        pre, start = s.gradient["cosine"]
        claim(
            "p8_gradient_aligned",
            "P8",
            "The gradient of the format row points to the pre-trained templates: cosine of "
            "the negative gradient with their mean row",
            "above 0.6",
            claims.greater_than(pre, 0.6),
        )
        claim("p8_gradient_control", "P8, control", "At the start, where nothing is learnt, it does not: "
              "the cosine after pre-training minus the one before", "above 0.4",
              claims.greater_than(pre - start, 0.4))  # fmt: skip
        claim(
            "p8_gradient_rank",
            "P8",
            "The first singular value of that gradient holds its squared norm (at the start: "
            f"{s.gradient['top_share'][1].mean():.2f}, so the share alone says little)",
            "above 0.95",
            claims.greater_than(s.gradient["top_share"][0], 0.95),
        )
    if "trained" in s.ask:
        judge_trained(cfg, s, claim)
    if "ablation" in s.ask:
        of = s.ask["ablation"]
        if cfg.embedding == "one_hot":
            own, other = (
                found_in(s.cells, cells_of(of), f"cosine_{name}")[:, 1, 0, 0] for name in ("within", "between")
            )
            claim("p3_relations", "P3", "Directions in W_in belong to relations: mean cosine of two templates of one "
                  "attribute minus of two attributes (private answers)", "above 0.2",
                  claims.greater_than(own - other, 0.2))  # fmt: skip
        unseen, loss_a = (found_in(s.cells, cells_of(of), name)[:, 0, :, 0] for name in ("unseen", "loss_a"))
        out = found_in(s.tunings, of, "extraction").max(-1)  # [S, pool, kind], the best rank
        claim(
            "p9_acquisition",
            "P9",
            "Answers shared by all attributes: attention alone stores worse, answer loss in nats, "
            "attention only minus with MLP",
            "above 0.01",
            claims.greater_than(loss_a[:, 1] - loss_a[:, 0], 0.01),
        )
        claim(
            "p9_templates",
            "P9",
            "And carries facts less well to templates they were not stated with: accuracy with MLP "
            "minus attention only",
            "above 0.05",
            claims.greater_than(unseen[:, 0] - unseen[:, 1], 0.05),
        )
        claim("p9_extraction", "P9", "And extracts less: with MLP minus attention only, best rank", "above 0.05",
              claims.greater_than(out[:, 0, 0] - out[:, 0, 1], 0.05))  # fmt: skip
        claim(
            "p9_private_control",
            "P9, control",
            "Answers of their own for every attribute: attention alone is enough, "
            "extraction with MLP minus attention only, best rank",
            "in [-0.05, 0.05]",
            claims.within(out[:, 1, 0] - out[:, 1, 1], -0.05, 0.05),
        )
        if min(cfg.ranks) < cfg.shared_attributes <= max(cfg.ranks):
            ranks = found_in(s.tunings, of, "extraction")[:, 1, 0]
            low, high = np.argmin(cfg.ranks), np.argmax(cfg.ranks)
            claim("p8_rank_formats", "P8", f"{cfg.shared_attributes} formats need as many ranks: extraction with rank "
                  f"{max(cfg.ranks)} minus rank {min(cfg.ranks)}", "above 0.1",
                  claims.greater_than(ranks[:, high] - ranks[:, low], 0.1))  # fmt: skip
    if "schedules" in s.ask and {"constant", "cosine"} <= set(cfg.all_schedules):
        of = s.ask["schedules"]
        constant, cosine = (cfg.all_schedules.index(name) for name in ("constant", "cosine"))
        loss = sum(found_in(s.cells, cells_of(of), name)[:, :, 0] for name in ("loss_r", "loss_a"))
        out = found_in(s.tunings, of, "extraction")[:, :, np.argmin(cfg.tuned)]
        claim(
            "p10_acquisition",
            "P10",
            "The schedule matters for the loss: pre-training loss in nats, constant rate minus cosine",
            "differs from 0 by more than 0.01",
            either(loss[:, constant] - loss[:, cosine], 0.01),
        )
        claim("p10_extraction", "P10", f"And for extraction, N_f = {min(cfg.tuned)}: constant minus cosine",
              "differs from 0 by more than 0.05", either(out[:, constant] - out[:, cosine], 0.05))  # fmt: skip
    if "variations" in s.ask and "zipf" in cfg.variations:
        known, unknown = (cfg.all_variations.index(f"zipf {how}") for how in ("known", "unknown"))
        out = found_in(s.tunings, s.ask["variations"], "extraction")[
            :, :, np.argmin(cfg.multiplicities), np.argmin(cfg.tuned)
        ]
        claim(
            "exposure",
            "beside the paper (arXiv 2406.14785)",
            "Fine-tuning on well-known subjects extracts more than on "
            "little-known ones: difference at the least K and N_f, each asked about the subjects it leaves",
            "above 0",
            claims.greater_than(out[:, known] - out[:, unknown], 0.0),
        )
    return listed


def either(values_S, margin: float) -> claims.Outcome:
    """Does a difference lie beyond the margin on either side?"""
    side = 1.0 if np.mean(values_S) >= 0 else -1.0
    outcome = claims.greater_than(side * np.asarray(values_S), margin)
    back = None if outcome.interval is None else tuple(sorted(side * x for x in outcome.interval))
    measured = None if outcome.measured is None else side * outcome.measured
    return outcome._replace(measured=measured, interval=back, rule=f"{outcome.rule}, on the side of the mean")


def judge_grid(cfg: KnowledgeConfig, s: Study, claim) -> None:
    of = s.ask["grid"]
    base = {
        name: found_in(s.cells, cells_of(of), name)[..., 0]
        for name in ("loss_r", "loss_a", "store", "zero_shot", "unseen")
    }
    out, store = found_in(s.tunings, of, "extraction"), base["store"]
    flat_S = (cfg.seeds, -1)
    floor_K = np.array([facts.loss_floor(make_cell(cfg, 0, multiplicity=K).world) for K in cfg.multiplicities])
    least_K, most_K = np.argmin(cfg.multiplicities), np.argmax(cfg.multiplicities)
    least_n, ref = np.argmin(cfg.tuned), cfg.templates.index(cfg.reference)
    at = f"R = {cfg.reference}" + ("" if cfg.trainable == "lora" else f", trained: {cfg.trainable}")
    gap = (base["loss_r"] - floor_K).reshape(flat_S).max(1)
    claim("p1_loss", "P1", "Pre-training reaches its floor: loss of the template above ln(M K) in nats, the worst cell",
          "at most 0.05", claims.less_than(gap, 0.05))  # fmt: skip
    claim("p1_store", "P1", "Every stated fact is stored: accuracy on own templates, the worst cell", "at least 0.99",
          claims.greater_than(store.reshape(flat_S).min(1), 0.99))  # fmt: skip
    claim("zero_shot", "protocol", "Questions are not answered before fine-tuning: accuracy, the best cell",
          "at most chance", claims.less_than(base["zero_shot"].reshape(flat_S).max(1), 1.0 / cfg.answers))  # fmt: skip
    mass = found_in(s.cells, cells_of(of), "attention_XT")[..., 0, -1, :]  # [S, R, K, T]
    informative = (mass[..., 1] + mass[..., 3]).mean((1, 2))
    claim(
        "p2_attention",
        "P2",
        "Attention filters for informative tokens: mass of the template's position on subject and "
        "template (uniform: 0.5)",
        "above 0.6",
        claims.greater_than(informative, 0.6),
    )
    claim(
        "p3_unseen",
        "P3",
        f"Templates of an attribute come to stand for it: accuracy with templates that a fact was not "
        f"stated with, {at}, K = {cfg.multiplicities[most_K]}",
        "above 0.9",
        claims.greater_than(base["unseen"][:, ref, most_K], 0.9),
    )
    if cfg.embedding == "one_hot":
        cosine = found_in(s.cells, cells_of(of), "cosine_within")[:, ref, most_K, 0]
        claim(
            "p3_directions",
            "P3",
            f"And share a direction in W_in: mean cosine of two templates (at the start: 0), {at}, "
            f"K = {cfg.multiplicities[most_K]}",
            "above 0.2",
            claims.greater_than(cosine, 0.2),
        )

    def rising(values_SX, what: str):
        if values_SX.shape[1] < 2:
            return claims.not_tested(f"needs two or more values of {what}", len(values_SX))
        return claims.increasing(values_SX, saturates=0.01)

    by_K, by_n, down_R = np.argsort(cfg.multiplicities), np.argsort(cfg.tuned), np.argsort(cfg.templates)[::-1]
    K, n = cfg.multiplicities[least_K], cfg.tuned[least_n]
    cell = f"{at}, K = {K}, N_f = {n}"
    claim("p4_multiplicity", "P4", f"Extraction rises with K, {at}, N_f = {n}", "rising",
          rising(out[:, ref][:, by_K, least_n], "K"))  # fmt: skip
    claim("p4_unseen", "P4", f"So does accuracy with unseen templates, {at}", "rising",
          rising(base["unseen"][:, ref][:, by_K], "K"))  # fmt: skip
    claim("p5_coverage", "P5", f"Extraction rises with N_f, {at}, K = {K} (more templates are covered and more answers "
          "asked for: p5_templates tells them apart)", "rising",
          rising(out[:, ref, least_K][:, by_n], "N_f"))  # fmt: skip
    reached, missed = (
        found_in(s.tunings, of, f"answer_unseen_{name}")[:, ref, least_K, least_n] for name in ("reached", "missed")
    )
    claim("p5_templates", "P5", "Fine-tuning needs to cover templates: among facts whose answer it never asks for, "
          f"extraction where one of their templates is covered minus where none is, {cell}", "above 0.1",
          claims.greater_than(reached - missed, 0.1))  # fmt: skip
    claim("p6_universe", "P6", f"Extraction falls as R grows (from the largest R down it rises), K = {K}, N_f = {n}",
          "falling with R", rising(out[:, down_R, least_K, least_n], "R"))  # fmt: skip
    claim("p6_unseen", "P6", f"So does accuracy with unseen templates, K = {K}", "falling with R",
          rising(base["unseen"][:, down_R, least_K], "R"))  # fmt: skip
    claim("p7_not_extracted", "P7", "Stored but not extracted: accuracy on own templates minus extraction of facts of "
          f"which neither answer nor template is in fine-tuning, {cell}", "above 0.1",
          claims.greater_than(store[:, ref, least_K] - missed, 0.1))  # fmt: skip
    claim("p7_confident", "P7", "What is stored but not extracted is answered wrongly with confidence: share of these "
          f"questions with a probability above one half, {cell}", "above 0.5",
          claims.greater_than(found_in(s.tunings, of, "hallucination")[:, ref, least_K, least_n], 0.5))  # fmt: skip
    if cfg.trainable == "lora":
        claim("p8_lowrank", "P8", f"Low-rank fine-tuning is enough: extraction, {at}, "
              f"K = {cfg.multiplicities[most_K]}, N_f = {max(cfg.tuned)}", "above 0.9",
              claims.greater_than(out[:, ref, most_K, np.argmax(cfg.tuned)], 0.9))  # fmt: skip
    bound = facts.error_bound(*np.meshgrid(cfg.templates, cfg.multiplicities, cfg.tuned, indexing="ij"))
    above = ((1.0 - out) - bound).reshape(flat_S).max(1)
    claim(
        "bound",
        "bound known at second hand",
        "The error stays below exp(-N_f K^2 ln R / (2 R^2)): error minus bound, the worst cell",
        "at most 0.05",
        claims.less_than(above, 0.05),
    )


def judge_trained(cfg: KnowledgeConfig, s: Study, claim) -> None:
    of = s.ask["trained"]
    out, seen, new = (found_in(s.tunings, of, name) for name in ("extraction", "seen_share", "answer_unseen"))
    full, mlp, lora = (TRAINED.index(name) for name in ("all", "mlp_in", "lora"))
    least, most = np.argmin(cfg.confound_tuned), np.argmax(cfg.confound_tuned)
    apart = np.abs(out[:, full] - seen[:, full]).max(1)
    claim(
        "confound",
        "control",
        "Where W_out is trained too, extraction is the share of facts whose answer is asked for in "
        "fine-tuning: largest difference over N_f",
        "at most 0.05",
        claims.less_than(apart, 0.05),
    )
    claim("confound_unseen", "control", "Trained in full, answers that fine-tuning does not ask for are never given: "
          f"extraction of such facts, N_f = {min(cfg.confound_tuned)}", "at most 0.05",
          claims.less_than(new[:, full, least], 0.05))  # fmt: skip
    claim("p8_lora_unseen", "P8", "Trained in low rank, they are: the same with LoRA minus in full", "above 0.1",
          claims.greater_than(new[:, lora, least] - new[:, full, least], 0.1))  # fmt: skip
    for which, index in (("full", full), ("mlp_in", mlp), ("lora", lora)):
        asked = f"answers of {seen[:, index, most].mean():.1%} of the facts are asked for"
        claim(f"p8_{which}", "P8", f"Extraction by {TRAINED[index]}, N_f = {cfg.confound_tuned[most]} ({asked})",
              "above 0.9", claims.greater_than(out[:, index, most], 0.9))  # fmt: skip


# --- tables ----------------------------------------------------------------------------------------------------------

CELL_FIELDS = {
    "R": "templates",
    "K": "multiplicity",
    "A": "answers",
    "M": "attributes",
    "shared": "shared",
    "zipf": "zipf",
}
CELL_VALUES = ("loss_r", "loss_a", "store", "unseen", "zero_shot", "cosine_within", "cosine_between")
TUNED_VALUES = (
    "extraction", "tuned_accuracy", "coverage", "reach", "seen_share", "answer_seen", "answer_unseen", "lost",
    "hallucination", "store_after", "answer_seen_reached", "answer_seen_missed", "answer_unseen_reached",
    "answer_unseen_missed", "count_seen_reached", "count_seen_missed", "count_unseen_reached", "count_unseen_missed",
    "moved_template", "moved_subject",
)  # fmt: skip


def plain(value) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def over_seeds(found: dict, of: Sequence, names: Sequence[str]) -> dict[str, float | None]:
    """Mean and interval of each name over the given cells or tunings, one a seed."""
    columns: dict[str, float | None] = {}
    for name in names:
        columns |= named(name, [found[one].get(name, np.nan) for one in of])
    return columns


def described(cell: Cell) -> dict[str, Any]:
    model = {name: getattr(cell.model, name) for name in ("hidden", "attention", "embedding", "activation")}
    how = {"optimizer": cell.recipe.optimizer, "schedule": cell.schedule, "lr": cell.lr, "steps": cell.recipe.steps}
    return {short: getattr(cell.world, name) for short, name in CELL_FIELDS.items()} | model | how


def write_tables(run: Run, cfg: KnowledgeConfig, s: Study) -> None:
    """Every number behind the figures: one row a setting, over its seeds."""
    by_cell: dict[Cell, list[Cell]] = {}
    for cell in s.cells:
        by_cell.setdefault(cell._replace(seed=0), []).append(cell)
    if by_cell:
        rows = [
            described(key)
            | {"floor": facts.loss_floor(key.world), "seeds": len(of)}
            | over_seeds(s.cells, of, CELL_VALUES)
            for key, of in by_cell.items()
        ]
        run.table(
            "pretrained",
            rows,
            "Pre-trained one-layer models: losses in nats (floor of loss_r: ln(M K)), accuracy "
            "on own templates (store), on unseen ones, on questions before fine-tuning (zero_shot)",
        )
    rows = []
    for part, nested in s.ask.items():
        by_tuning: dict[Tuning, list[Tuning]] = {}
        for t in flat(nested):
            by_tuning.setdefault(t._replace(cell=t.cell._replace(seed=0)), []).append(t)
        for key, of in by_tuning.items():
            kind = {"part": part} | described(key.cell)
            bound = facts.error_bound(key.cell.world.templates, key.cell.world.multiplicity, key.subjects)
            kind |= {
                "trained": key.which,
                "rank": key.rank if key.which == "lora" else None,
                "N_f": key.subjects,
                "chosen": key.how,
                "tuning_lr": key.lr,
                "tuning_steps": key.recipe.steps,
                "bound": float(bound),
            }
            rows.append(kind | {"seeds": len(of)} | over_seeds(s.tunings, of, TUNED_VALUES))
    if rows:
        run.table(
            "fine_tuned",
            rows,
            "After fine-tuning on questions about N_f subjects: accuracy on the others "
            "(extraction), split by answers asked for in fine-tuning (seen) and by templates covered (reached)",
        )
    if s.gradient is not None:
        rows = [
            {"model": name, "seed": seed}
            | {key: plain(s.gradient[key][x, i]) for key in ("top_share", "cosine", "format_mass")}
            | {f"singular_{p}": plain(v) for p, v in enumerate(s.gradient["values_P"][x, i], 1)}
            for x, name in enumerate(("pre-trained", "start"))
            for i, seed in enumerate(cfg.seed_list)
        ]
        run.table("gradient", rows, "Gradient of the fine-tuning loss with respect to W_in before fine-tuning")
    if "grid" in s.ask:
        rows = []
        for t in flat([[[K[0] for K in R] for R in seed] for seed in s.ask["grid"]]):
            found = s.cells[t.cell]
            for step, mass in zip(found["attention_step"], found["attention_XT"], strict=True):
                rows.append(
                    {
                        "R": t.cell.world.templates,
                        "K": t.cell.world.multiplicity,
                        "seed": t.cell.seed,
                        "step": int(step),
                    }
                    | {name: plain(v) for name, v in zip(("n", "s", "n2", "r"), mass, strict=True)}
                )
        run.table("attention", rows, "Attention of the template's position on (n, s, n', r) over pre-training")


# --- figures ---------------------------------------------------------------------------------------------------------


@figures.style()
def draw(run: Run, cfg: KnowledgeConfig, s: Study) -> None:
    if "grid" in s.ask:
        draw_grid(run, cfg, s)
    if "trained" in s.ask:
        of = s.ask["trained"]
        fig, axes = figures.new(1, 2, height=3.6)
        for index, name in enumerate(TRAINED):
            x, y = (found_in(s.tunings, of, value)[:, index] for value in ("seen_share", "extraction"))
            axes[0].plot(x.reshape(-1), y.reshape(-1), "o", alpha=0.7, label=name)
            figures.seed_band(
                axes[1], cfg.confound_tuned, found_in(s.tunings, of, "answer_unseen")[:, index], label=name
            )
        axes[0].plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle=":")
        axes[0].set(xlabel="share whose answer is asked for", ylabel="extraction", title="The answer-seen confound")
        axes[1].set(xscale="log", xlabel="N_f, subjects of fine-tuning", ylabel="extraction", ylim=(-0.05, 1.05),
                    title="Answers never asked for")  # fmt: skip
        axes[1].set_xticks(cfg.confound_tuned, [str(n) for n in cfg.confound_tuned])
        axes[1].minorticks_off()
        axes[0].legend(title="trained", loc="lower right")
        run.figure(
            "confound",
            fig,
            alt="Extraction against the share of facts whose answer occurs in fine-tuning, by what is trained",
            caption=f"A = {cfg.confound_answers} answers. On the dotted line extraction is the share of facts whose "
            "answer is asked for, and says nothing about templates. Right: facts whose answer fine-tuning never asks "
            "for (none are left where every answer is).",
        )
    if s.gradient is not None:
        fig, axes = figures.new(1, 2, height=3.2)
        share = s.gradient["values_P"] ** 2
        share = share / share.sum(-1, keepdims=True)
        for x, name in enumerate(("pre-trained", "at the start")):
            figures.seed_band(axes[0], np.arange(1, share.shape[-1] + 1), share[x], label=name)
        axes[0].set(yscale="log", xlabel="singular value", ylabel="share of the squares", title="Gradient of W_in")
        axes[0].legend()
        mean = [interval(s.gradient["cosine"][x]) for x in range(2)]
        figures.bars(axes[1], ["pre-trained", "at the start"], [m["mean"] for m in mean],
                     low=[m["mean"] if m["low"] is None else m["low"] for m in mean],
                     high=[m["mean"] if m["high"] is None else m["high"] for m in mean])  # fmt: skip
        axes[1].axhline(0, color="#444444", linewidth=0.8)
        axes[1].set(ylabel="cosine", title="Format row and mean template")
        run.figure(
            "gradient",
            fig,
            alt="Singular values of the fine-tuning gradient and its alignment",
            caption="The gradient of the fine-tuning loss with respect to W_in before fine-tuning. Left: its spectrum. "
            "Right: the cosine of the format row's step with the mean template row. At the start nothing is learnt: "
            "what is there too is structure.",
        )
    if "ablation" in s.ask:
        of = s.ask["ablation"]
        fig, axes = figures.new(1, 2, height=3.6, sharey=True)
        for p, pool in enumerate(POOLS):
            labels = ["stored", "unseen\ntemplate", *(f"extracted\nrank {rank}" for rank in cfg.ranks)]
            groups = {}
            for k, name in enumerate(("with MLP", "attention only")):
                groups[name] = [found_in(s.cells, cells_of(of), value)[:, p, k, 0] for value in ("store", "unseen")]
                groups[name] += list(np.moveaxis(found_in(s.tunings, of, "extraction")[:, p, k], -1, 0))
            figures.grouped_bars(axes[p], labels, groups)
            axes[p].tick_params(axis="x", labelsize=8)
            axes[p].set(title=f"{pool} answers", ylim=(0, 1.22))
        axes[0].set(ylabel="accuracy")
        axes[1].legend(loc="upper center", ncols=2)
        run.figure(
            "ablation",
            fig,
            alt="Accuracy with and without the MLP, for shared and private answers",
            caption=f"M = {cfg.shared_attributes} attributes and as many question formats, with answers from one pool "
            "of all attributes or from one for each; the adapter's rank from left to right.",
        )
    if "schedules" in s.ask:
        of = s.ask["schedules"]
        fig, axes = figures.new(1, 2, height=3.4)
        for x, name in enumerate(cfg.all_schedules):
            curve = (
                found_in(s.cells, cells_of(of), "curve_loss_2")[:, x, 0]
                + found_in(s.cells, cells_of(of), "curve_loss_3")[:, x, 0]
            )
            figures.seed_band(axes[0], Recipe.chunk * np.arange(1, curve.shape[1] + 1), curve, label=name, marker="")
            figures.seed_band(axes[1], cfg.tuned, found_in(s.tunings, of, "extraction")[:, x], label=name)
        axes[0].set(yscale="log", xlabel="step", ylabel="loss (nats)", title="Pre-training")
        axes[1].set(xscale="log", xlabel="N_f", ylabel="extraction", ylim=(-0.05, 1.05), title="After fine-tuning")
        axes[1].set_xticks(cfg.tuned, [str(n) for n in cfg.tuned])
        axes[1].minorticks_off()
        axes[1].legend(title="schedule")
        run.figure("schedules", fig, alt="Loss and extraction by schedule of the learning rate",
                   caption=f"R = {cfg.reference}, K = {min(cfg.multiplicities)}.")  # fmt: skip
    if "variations" in s.ask:
        out = found_in(s.tunings, s.ask["variations"], "extraction")[:, :, :, np.argmin(cfg.tuned)]
        fig, ax = figures.new(height=3.6)
        groups = {f"K = {K}": list(out[:, :, k].T) for k, K in enumerate(cfg.multiplicities)}
        figures.grouped_bars(ax, [name.replace(" ", "\n", 1) for name in cfg.all_variations], groups)
        ax.set(ylabel="extraction", ylim=(0, 1.2), title=f"R = {cfg.reference}, N_f = {min(cfg.tuned)}")
        ax.legend(loc="upper center", ncols=len(groups))
        run.figure(
            "variations",
            fig,
            alt="Extraction under one change at a time",
            caption="Optimiser, key and query, embedding and exposure, one change at a time.",
        )


@figures.style()
def draw_grid(run: Run, cfg: KnowledgeConfig, s: Study) -> None:
    of = s.ask["grid"]
    out = found_in(s.tunings, of, "extraction")
    store, unseen = (found_in(s.cells, cells_of(of), name)[..., 0] for name in ("store", "unseen"))
    columns = len(cfg.templates)
    fig, axes = figures.new(1, columns, height=3.0, squeeze=False)
    for r, R in enumerate(cfg.templates):
        ax, mean = axes[0, r], out[:, r].mean(0)
        figures.heatmap(ax, mean, rows=[str(K) for K in cfg.multiplicities], cols=[str(n) for n in cfg.tuned],
                        label="extraction" if r == columns - 1 else "", vmin=0, vmax=1)  # fmt: skip
        ax.tick_params(axis="x", rotation=0)
        for k, n in np.ndindex(mean.shape):
            ax.text(n, k, f"{mean[k, n]:.2f}", ha="center", va="center", color="white" if mean[k, n] < 0.6 else "black")
        ax.set(title=f"R = {R}", xlabel="N_f", ylabel="K" if r == 0 else "")
    run.figure(
        "extraction",
        fig,
        alt="Extraction by K, N_f and R",
        caption="Share of the questions about subjects outside of fine-tuning that are answered; means over seeds.",
    )

    fig, axes = figures.new(1, 2, height=3.6)
    for r, R in enumerate(cfg.templates):
        for k in range(len(cfg.multiplicities)):
            colour = figures.shades(columns)[r]
            marker = "osD^vP*"[k % 7]
            axes[0].plot(unseen[:, r, k], out[:, r, k, np.argmin(cfg.tuned)], marker, color=colour, alpha=0.8)
        axes[0].plot([], [], "s", color=figures.shades(columns)[r], label=f"R = {R}")
    for k, K in enumerate(cfg.multiplicities):
        axes[0].plot([], [], "osD^vP*"[k % 7], color="#555555", label=f"K = {K}")
    axes[0].set(xlabel="accuracy, unseen template", ylabel=f"extraction, N_f = {min(cfg.tuned)}", xlim=(-0.05, 1.05),
                ylim=(-0.05, 1.05), title=f"Stored: {store.min():.2f} or more")  # fmt: skip
    axes[0].legend(fontsize=8)
    k = np.argmin(cfg.multiplicities)
    dense = np.geomspace(min(cfg.tuned), max(cfg.tuned), 50)
    for r, R in enumerate(cfg.templates):
        colour = figures.shades(columns)[r]
        figures.seed_band(axes[1], cfg.tuned, 1.0 - out[:, r, k], label=f"R = {R}", color=colour)
        axes[1].plot(dense, facts.error_bound(R, cfg.multiplicities[k], dense), ":", color=colour)
    axes[1].set(xscale="log", xlabel="N_f", ylabel="error after fine-tuning", ylim=(-0.05, 1.05),
                title=f"K = {cfg.multiplicities[k]}: error and bound")  # fmt: skip
    axes[1].set_xticks(cfg.tuned, [str(n) for n in cfg.tuned])
    axes[1].minorticks_off()
    axes[1].legend(fontsize=8)
    run.figure(
        "stored_extracted",
        fig,
        alt="Extraction against accuracy on unseen templates; error against N_f with the bound",
        caption="Left: extraction beside how well facts carry over to templates that they were not stated with "
        "(one mark a seed). Right: dotted, the bound exp(-N_f K^2 ln R / (2 R^2)), "
        "known to us at second hand.",
    )

    found = s.cells[of[0][cfg.templates.index(cfg.reference)][np.argmax(cfg.multiplicities)][0].cell]
    cells = [of[i][cfg.templates.index(cfg.reference)][np.argmax(cfg.multiplicities)][0].cell for i in range(cfg.seeds)]
    mass = np.stack([s.cells[cell]["attention_XT"] for cell in cells])
    fig, ax = figures.new(height=3.2, width=5.0)
    for t, name in enumerate(("noise", "subject", "noise'", "template")):
        figures.seed_band(ax, found["attention_step"], mass[:, :, t], label=name)
    ax.set(xlabel="step of pre-training", ylabel="attention", ylim=(0, None), xlim=(0, None),
           title=f"Where the template looks, R = {cfg.reference}, K = {max(cfg.multiplicities)}")  # fmt: skip
    ax.legend()
    run.figure("attention", fig, alt="Attention of the template's position on each token over pre-training",
               caption="Means over positions and seeds; a quarter each is uniform.")  # fmt: skip


def run_knowledge(run: Run, cfg: KnowledgeConfig) -> None:
    knowledge_text.check(cfg)  # what cannot be is told before anything is trained
    ask = {name: ASK[name](cfg) for name in ASK if name in cfg.parts}
    s = run_study(run, cfg, ask, parallel.make_mesh())
    text = knowledge_text.study(run, cfg) if cfg.text else None
    judged = judge(cfg, s)
    if text is not None:
        judged += knowledge_text.text_claims(cfg, text)
    run.write_claims(judged)
    write_tables(run, cfg, s)
    draw(run, cfg, s)
    summary = [
        "One-layer models are our reconstruction: the sources we have of the paper give no model, generator, sizes or "
        "accuracies. Its predictions are tested in kind.",
        f"{len(s.cells)} pre-trainings and {len(s.tunings)} fine-tunings in {len(s.banks)} banks.",
    ]
    if "grid" in s.ask:
        out = found_in(s.tunings, s.ask["grid"], "extraction").mean(0)
        summary.append(
            f"Every stated fact is stored; asked about other subjects, models extract between {out.min():.0%} and "
            f"{out.max():.0%}, by K, N_f and R."
        )
    if text is not None:
        knowledge_text.report_text(run, cfg, text)
    run.drop_stale()
    report.write(run, "When stored knowledge can be extracted", "Knowledge acquisition and extraction", summary, PAPER)


if __name__ == "__main__":
    parallel.use_all_cores()
    sys.exit(
        cli.main(
            "knowledge",
            KnowledgeConfig,
            PRESETS,
            run_knowledge,
            "When does a model that stores a fact also answer the question about it? One-layer transformers and small "
            "language models (arXiv 2508.00901).",
            [
                "python -m experiments.knowledge",
                "python -m experiments.knowledge --preset small --out runs/knowledge-grid",
                "python -m experiments.knowledge --parts grid --trainable all --full-lr 1e-3 --out runs/knowledge-all",
                "python -m experiments.knowledge --preset small --text real --pararel FOLDER --popqa FILE",
            ],
        )
    )
