"""What fine-tuning does to a capability that pre-training gave (arXiv 2311.12786, the PCFG half).

    python -m experiments.wrappers pcfg                        the demo
    python -m experiments.wrappers pcfg --preset small         three seeds, an hour on two cores

A small GPT is pre-trained on strings of a probabilistic grammar, each with a question about its letters
(`synthetic.tasks`): how many of the last letters are O, where is the n-th O from the end. The operand O is a with the
prior P(a), so a model may know the capability for a well and for b hardly. Fine-tuning asks for b alone. In a share
C_Tr of its strings the answer for b is that for a plus q, so that a wrapper around counting a would do. Then we look:
accuracy for both operands (a prompt names its operand) where the tie holds (C_Te = 1) and where it never does
(C_Te = 0), linear probes at every depth through fine-tuning, pruning of neurons, and reverse fine-tuning beside models
that were never asked for a. In the worlds of `demo` and `small` an answer depends on 8 or 12 letters, so those letters
of a test string are often seen in training, though the whole string hardly ever is.

Read from top to bottom: settings, pre-training, the grids, probes, pruning, claims, tables, figures. Choices that the
paper leaves open are ours and labelled so in the help. Letters beside those of `bert6_jax` and `synthetic.tasks`:
S seeds, G members of a grid, X moments at which they are looked at, J members that are probed or pruned.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bert6_jax import checkpoint, config, interventions, parallel, train, transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError
from bert6_jax.objectives import cross_entropy
from bert6_jax.train import take
from experiments.harness import claims, cli, figures, report
from experiments.harness.claims import Claim, proportion
from experiments.harness.cli import option
from experiments.harness.run import Run, peak_flops
from experiments.wrappers_parts import (
    CHUNK,
    NEW,
    OLD,
    PAPER,
    TIED,
    UNTIED,
    Tuned,
    back_columns,
    check,
    inputs_of,
    lift,
    probe_bank,
    rates,
    seeded,
    sooner,
    stack,
    steps_to,
    warn_of_diverged,
)
from synthetic import operands, pcfg, tasks

# the paper's priors of the operands a, b, c by P(a); 0 is ours, for models that are never asked for a
PRIORS = {0.999: (0.999, 0.001, 0.0), 0.99: (0.99, 0.01, 0.0), 0.9: (0.9, 0.1, 0.0), 0.7: (0.7, 0.2, 0.1),
          0.5: (0.5, 0.3, 0.2)}  # fmt: skip
NEVER = 0.0
FRACTIONS = (0.05, 0.25, 0.5, 1.0)  # of pre-training, after which the paper looks: 10K, 50K, 100K, 200K steps
PARTS = ("reverse", "random", "mix", "jailbreak", "probe", "prune")
TUNED = ("count", "index")  # tasks that are fine-tuned

# what a key is folded with, one number a purpose
INIT, PRETRAIN, ROWS, BACK_ROWS, TEST, HELD_OUT, SCORE, PROBE, CONTROL = range(9)


@dataclass(frozen=True)
class PcfgConfig:
    """Settings of the study; those that the paper does not state are ours."""

    grammar: str = option("cfg3b", "cfg3b (the paper's), or a file: lines `s -> r q | q p`, or PhysicsLM4's JSON; its "
                          "first three letters are the operands a, b, c",
                          "strings")  # fmt: skip
    start: str | None = option(None, "strings of this symbol (ours: shorter worlds); none: whole ones", "strings")
    window: int = option(250, "letters of a string", "strings", min=2)
    tasks: tuple[str, ...] = option(tasks.TASKS, "what pre-training asks", "strings", choices=tasks.TASKS)
    reach: int = option(40, "last letters that are counted in", "strings", min=1)
    nth: int = option(6, "which letter or pair index asks for, from the end", "strings", min=1)
    numbers: int | None = option(None, "number tokens 0, 1, ... (none: up to the window)", "strings", min=1)
    spread: float = option(0.5, "share of count and index strings of pre-training with evenly spread answers (ours)",
                           "strings", min=0.0, max=1.0)  # fmt: skip

    width: int = option(192, "width of the model", "model", min=1)
    blocks: int = option(6, "its blocks", "model", min=1)
    heads: int = option(6, "its attention heads", "model", min=1)

    priors: tuple[float, ...] = option((0.999, 0.9, 0.5), "P(a), share of prompts that ask for a, an axis",
                                       "pre-training", choices=tuple(PRIORS))  # fmt: skip
    pretrain_steps: int = option(200_000, "steps", "pre-training", min=20)
    pretrain_batch: int = option(96, "rows of a step (ours)", "pre-training", min=1)
    pretrain_rate: float = option(1e-3, "learning rate", "pre-training", min=0.0)
    answer_weight: float = option(1.0, "weight of the answer among the tokens of a row (ours above 1)", "pre-training",
                                  min=0.0)  # fmt: skip
    fraction: float = option(1.0, "share of pre-training after which models are fine-tuned", "pre-training",
                             choices=FRACTIONS)  # fmt: skip

    task: str = option("count", "what fine-tuning asks", "fine-tuning", choices=TUNED)
    q: int = option(1, "new minus old answer of a tied string (count: the paper's; index: ours)", "fine-tuning", min=1)
    rates: tuple[float, ...] = option((1e-4, 1e-5, 1e-6), "learning rates, an axis", "fine-tuning", min=0.0)
    correlations: tuple[float, ...] = option((0.0, 0.5, 0.8, 1.0), "C_Tr: share of tied strings, an axis",
                                             "fine-tuning", min=0.0, max=1.0)  # fmt: skip
    steps: int = option(10_000, "steps", "fine-tuning", min=20)
    batch: int = option(96, "strings of a step", "fine-tuning", min=1)
    warmup: float = option(0.2, "share of the steps in which the rate rises", "fine-tuning", min=0.0, max=1.0)
    final: float = option(0.01, "share of the rate at the end of the cosine", "fine-tuning", min=0.0, max=1.0)
    weight_decay: float = option(1e-4, "weight decay of AdamW, on all parameters (ours)", "fine-tuning", min=0.0)
    beta2: float = option(0.95, "decay of its second moments (ours)", "fine-tuning", min=0.0, max=0.9999)
    clip: float = option(1.0, "largest global norm of a gradient (ours)", "fine-tuning", min=0.0)
    seeds: int = option(3, "seeds: models, strings, tests", "fine-tuning", min=1)
    seed: int = option(0, "the first of them", "fine-tuning", min=0)
    test_rows: int = option(1_000, "test strings for each C_Te, a seed's own", "fine-tuning", min=10)

    parts: tuple[str, ...] = option(PARTS, "what else is done", "afterwards", choices=PARTS)
    after_rates: tuple[float, ...] = option((1e-4, 1e-5), "rates of what it is done with", "afterwards",
                                            min=0.0)  # fmt: skip
    after_correlations: tuple[float, ...] = option((0.0, 1.0), "their C_Tr", "afterwards", min=0.0, max=1.0)
    reverse_rates: tuple[float, ...] = option((1e-5, 1e-6), "rates of reverse fine-tuning", "afterwards", min=0.0)
    reverse_steps: int = option(10_000, "its steps", "afterwards", min=20)
    revived: float = option(
        0.9, "accuracy for the old operand that counts as revived (ours)", "afterwards", min=0.0, max=1.0
    )
    mixes: tuple[float, ...] = option((0.5, 0.1, 0.001), "shares of pre-training rows mixed into fine-tuning, C_Tr = 1",
                                      "afterwards", min=1e-6, max=1.0)  # fmt: skip
    probe_at: tuple[float, ...] = option((0.1, 1.0), "shares of fine-tuning after which probes read (ours)",
                                         "afterwards", min=1e-6, max=1.0)  # fmt: skip
    probe_rows: int = option(4_000, "strings that train the probes (ours)", "afterwards", min=10)
    probe_steps: int = option(4_000, "their steps, of Adam on a centred and scaled stream (ours)", "afterwards", min=20)
    probe_rate: float = option(1e-3, "their rate, divided by ten at half and three quarters", "afterwards", min=0.0)
    pruned: int = option(100, "K: neurons that are pruned, one at a time and cumulatively", "afterwards", min=1)
    prune_rows: int = option(2_000, "strings that score them (ours)", "afterwards", min=10)
    jail_priors: tuple[float, ...] = option((0.9, 0.5), "P(a) of the jailbreak variant", "afterwards",
                                            choices=tuple(PRIORS))  # fmt: skip

    def __post_init__(self):
        needed = ("priors", "rates", "correlations", "tasks")
        listed = (*needed, "parts", "after_rates", "after_correlations", "reverse_rates", "mixes", "probe_at",
                  "jail_priors")  # fmt: skip
        check(self, listed, needed, ("pretrain_steps", "steps", "reverse_steps", "probe_steps"))
        if len({*self.snapshots.values()}) < len(FRACTIONS):
            raise InputError(f"--pretrain-steps {self.pretrain_steps} is too few: models of {len(FRACTIONS)} different "
                             f"steps are kept; give {CHUNK * 20} or more")  # fmt: skip
        if self.width % self.heads:
            raise InputError(f"--width {self.width} is no multiple of --heads {self.heads}; choose one")
        if self.task not in self.tasks:
            raise InputError(f"--task {self.task} is none of --tasks {','.join(self.tasks)}; pre-training must ask it")
        needs = (("mix", "mixes"), ("probe", "probe_at"), ("jailbreak", "jail_priors"))
        for part, name in needs:
            if part in self.parts and not getattr(self, name):
                raise InputError(f"--{name.replace('_', '-')} is empty; give a value, or leave {part} out of --parts")
        if "jailbreak" in self.parts and self.task != "count":
            raise InputError(f"--parts jailbreak is about --task count, not {self.task}; leave it out")
        if "probe" in self.parts and 1.0 not in self.probe_at:
            raise InputError(f"--probe-at {','.join(map(str, self.probe_at))} lacks 1, the end of fine-tuning; add it")

    @property
    def seed_list(self) -> list[int]:
        return [self.seed + s for s in range(self.seeds)]

    @property
    def snapshots(self) -> dict[float, int]:
        """Steps of pre-training by the share of it that is done, in chunks."""
        return {share: max(1, round(share * self.pretrain_steps / CHUNK)) for share in FRACTIONS}


# --- models and rows -------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """A pre-trained model. `jail`: Counting had three family tokens, two of them with operand a only."""

    prior: float  # P(a)
    seed: int
    jail: bool = False


class Tuning(NamedTuple):
    """One fine-tuning. `start`: a pre-trained model, `random` weights, or another tuning's end."""

    start: Any
    asked: int  # the operand in the prompt
    label: int  # the operand whose answer is the label
    rate: float
    correlation: float
    seed: int
    mix: float = 0.0  # share of rows of pre-training


LONG = 20_000  # steps of all members together, beyond which a grid can go on where it was killed
AT_ONCE = 500  # rows that are evaluated together


@dataclass(frozen=True, eq=False)  # hashed by identity, so it may be a static argument
class World:
    spec: tasks.Spec
    model: TransformerConfig
    task: str  # that is fine-tuned

    @property
    def loop(self) -> bool | None:
        """Members one after the other also on an accelerator: where one fills it, and all would not fit."""
        return True if self.spec.length * self.model.width > 1 << 14 else None

    @property
    def read(self) -> int:
        """Where the answer is predicted: at ART."""
        return self.spec.answer_at - 1


def make_world(cfg: PcfgConfig) -> World:
    grammar = pcfg.read(cfg.grammar)
    if cfg.start is not None:
        try:
            grammar = pcfg.below(grammar, cfg.start)
        except InputError as error:
            raise InputError(f"--start {cfg.start}: {error}, or --start none for whole strings") from error
    try:
        spec = tasks.make_spec(
            grammar, cfg.window, cfg.tasks, cfg.reach, cfg.nth, numbers=cfg.numbers, spread=cfg.spread,
            **({"q_count": cfg.q} if cfg.task == "count" else {"q_index": cfg.q}),
        )  # fmt: skip
    except InputError as error:  # in the words of the command line
        of_an_option = str(error).split()[0] in ("window", "reach", "nth", "numbers")
        raise InputError("--" * of_an_option + str(error).replace(f"q_{cfg.task}", "--q")) from error
    model = config.gpt_mini(
        spec.vocab_size, width=cfg.width, blocks=cfg.blocks, heads=cfg.heads, head_width=cfg.width // cfg.heads,
        mlp_width=4 * cfg.width, max_len=spec.length,
    )  # fmt: skip
    return World(spec, model, cfg.task)


@partial(jax.jit, static_argnums=1)
def fresh(key, world: World):
    """Random weights."""
    return transformer.init(key, world.model)


def logits(params, ids_BT, world: World) -> jax.Array:
    """What a model says where the answer is predicted, [B, V]."""
    return transformer.head(params, transformer.stream_at(params, ids_BT, world.model, world.read), world.model)


def in_slices(fn: Callable[[jax.Array], jax.Array], ids_BT) -> jax.Array:
    """`fn` of rows, `[B, T] -> [B, ...]`, so many at once as fit on any device, in gradients too."""
    B, T = ids_BT.shape
    n = min(B, AT_ONCE)
    slices = jnp.pad(ids_BT, ((0, -B % n), (0, 0))).reshape(-1, n, T)
    out = jax.lax.map(jax.checkpoint(fn), slices)
    return out.reshape(-1, *out.shape[2:])[:B]


def said(params, ids_BT, world: World) -> jax.Array:
    """What a model answers, int32 [B]."""
    return in_slices(lambda ids: logits(params, ids, world).argmax(-1).astype(jnp.int32), ids_BT)


def asked(world: World, strings: tasks.Strings, operand, label, family=None) -> tuple[jax.Array, jax.Array]:
    """Prompts that ask for one operand, and the answer for another or the same: ids [B, T], [B]; both may be traced."""
    spec = world.spec
    answer_B = jnp.where(jnp.asarray(label) == OLD, strings.answer_B2[:, OLD], strings.answer_B2[:, NEW])
    family = spec.token(world.task) if family is None else family
    ids_BT = tasks.prompts(spec, family, operand, spec.number(world.task), strings.letters_BW, answer_B)
    return ids_BT, answer_B


@partial(jax.jit, static_argnums=(1, 3))
def sample(key, world: World, correlation, count: int) -> tasks.Strings:
    return tasks.tuning(key, world.spec, world.task, correlation, count)


def by_seed(cfg: PcfgConfig, world: World, purpose: int, correlation: float, count: int) -> tasks.Strings:
    """Strings of every seed, [S, B, ...]."""
    return stack([sample(seeded(seed, purpose), world, np.float32(correlation), count) for seed in cfg.seed_list])


def test_strings(cfg: PcfgConfig, world: World) -> list[tasks.Strings]:
    """Untied and tied, [S, B, ...] each: a seed has its own."""
    return [by_seed(cfg, world, TEST, c, cfg.test_rows) for c in (0.0, 1.0)]


def optimizer(cfg: PcfgConfig) -> optax.GradientTransformation:
    clip = [optax.clip_by_global_norm(cfg.clip)] if cfg.clip else []
    return optax.chain(*clip, optax.scale_by_adam(b2=cfg.beta2), optax.add_decayed_weights(cfg.weight_decay))


def looker(cfg: PcfgConfig, world: World, mesh):
    """`(params, seed) [G, ...] -> {accuracy [G, C_Te, operand], instead [G, C_Te, 2]}`: right answers to prompts that
    ask for each operand; and where a is asked, how often b's answer comes instead, and a's plus q.

    `seed` is the number of a member's seed among the seeds."""
    tests = test_strings(cfg, world)
    q = world.spec.q_count if world.task == "count" else world.spec.q_index

    def look(tests, member):
        params, seed = member
        right, instead = [], []
        for strings in take(tests, seed):
            old_B, new_B = (said(params, asked(world, strings, o, o)[0], world) for o in (OLD, NEW))
            right.append([old_B == strings.answer_B2[:, OLD], new_B == strings.answer_B2[:, NEW]])
            instead.append([old_B == strings.answer_B2[:, NEW], old_B == strings.answer_B2[:, OLD] + q])
        return {name: jnp.asarray([[jnp.mean(x, dtype=jnp.float32) for x in row] for row in rows])
                for name, rows in (("accuracy", right), ("instead", instead))}  # fmt: skip

    run = jax.jit(parallel.over_members(look, mesh, world.loop))
    return lambda params_G, seed_G: jax.device_get(run(tests, (params_G, seed_G)))


# --- pre-training ----------------------------------------------------------------------------------------------------


def models(cfg: PcfgConfig) -> list[Model]:
    """All that are pre-trained: for every prior, one that is never asked for a, and those of the jailbreak variant."""
    listed = [Model(prior, seed) for seed in cfg.seed_list for prior in cfg.priors]
    if {"reverse", "probe"} & {*cfg.parts}:
        listed += [Model(NEVER, seed) for seed in cfg.seed_list]
    if "jailbreak" in cfg.parts:
        listed += [Model(prior, seed, True) for seed in cfg.seed_list for prior in cfg.jail_priors]
    return listed


def keep_models(run: Run, path: Path, params_G, world: World, step: int, members: list) -> None:
    """A grid of models as one checkpoint, with what its members are."""
    if run.primary:
        shutil.rmtree(path, ignore_errors=True)  # of a run that was killed between this and its own checkpoint
        checkpoint.save(path, params_G, kind="transformer", step=step, config=dataclasses.asdict(world.model),
                        extra={"members": members})  # fmt: skip


def saved(path: Path, step: int):
    """Models of a grid after a step, on the host."""
    return jax.device_get(checkpoint.load_transformer(checkpoint.step_path(path, step))[0])


def prior_of(prior: float, letters: int) -> np.ndarray:
    return np.array([*((0.0, 1.0, 0.0) if prior == NEVER else PRIORS[prior]), *(0.0,) * (letters - 3)], np.float32)


def pretrain_loss(cfg: PcfgConfig, world: World) -> train.MemberLoss:
    """Next-token loss of whole rows, the answer with its own weight."""
    weight_T = np.ones(world.spec.length - 1, np.float32)
    weight_T[world.read] = cfg.answer_weight
    weight_T /= weight_T.sum()

    def loss(params, frozen, key, data):
        rows = tasks.pretrain(key, world.spec, data["prior"], cfg.pretrain_batch, jail=data["jail"])
        x_BTD, _ = transformer.forward(params, rows.ids_BT[:, :-1], world.model)
        logits_BTV = transformer.head(params, x_BTD, world.model)
        nll_T = cross_entropy(logits_BTV, rows.ids_BT[:, 1:]).mean(0)
        right_B = logits_BTV[:, world.read].argmax(-1).astype(jnp.int32) == rows.answer_B
        return (nll_T * weight_T).sum(), {"answers": right_B.astype(jnp.float32).mean(), "nats": nll_T.mean()}

    return loss


def pretrain(run: Run, cfg: PcfgConfig, world: World, mesh) -> Tuned:
    """Pre-train all models in one compiled program; those of every fraction stay in checkpoints/pretrained."""
    members, path, held = models(cfg), run.out / "checkpoints" / "pretrained", []
    seed_G = np.array([m.seed - cfg.seed for m in members], np.int32)

    def stage() -> dict:
        chunks = cfg.pretrain_steps // CHUNK
        tokens = CHUNK * len(members) * cfg.pretrain_batch * (world.spec.length - 1)  # of a chunk
        start = stack([fresh(seeded(m.seed, INIT), world) for m in members])
        inputs = inputs_of(
            rates([cfg.pretrain_rate] * len(members), cfg.pretrain_steps, cfg.warmup, cfg.final),
            [int(jax.random.bits(seeded(m.seed, PRETRAIN))) for m in members],
            {
                "prior": np.stack([prior_of(m.prior, world.spec.letters) for m in members]),
                "jail": np.array([JAILED if m.jail else 0.0 for m in members], np.float32),
            },
        )

        def keep(number, params_G):
            keep_models(run, checkpoint.step_path(path, number * CHUNK), jax.device_get(params_G), world,
                        number * CHUNK, [m._asdict() for m in members])  # fmt: skip

        train.fit_grid(
            train.grid_step(pretrain_loss(cfg, world), optimizer(cfg), CHUNK, mesh, world.loop),
            train.init_grid(start, optimizer(cfg), jax.random.key(0)),
            inputs,
            train.FitConfig(chunks, min(5, chunks), max(1, min(100, chunks // 10)),
                            snapshots=(0, *cfg.snapshots.values())),
            mesh,
            folder=run.out / "checkpoints" / "pretrain-state",
            description=dataclasses.asdict(world.model),
            on_start=lambda number: run.rewind("pretrain", number * CHUNK),
            on_metrics=lambda number, means: run.log("pretrain", number * CHUNK, members=len(members), **means),
            on_snapshot=keep,
            label="pretrain",
            tokens_per_step=tokens,
            flops_per_step=tokens * transformer.flops_per_token(world.model, world.spec.length),
            peak_flops=0.0 if jax.default_backend() == "cpu" else peak_flops(run, mesh),
            quiet=run.quiet,
        )  # fmt: skip
        look, held_out = looker(cfg, world, mesh), held_out_looker(cfg, world, mesh)
        looks = []
        for number in (0, *cfg.snapshots.values()):
            params = saved(path, number * CHUNK)
            looks.append(look(params, seed_G) | held_out(params, seed_G))
        shutil.rmtree(run.out / "checkpoints" / "pretrain-state", ignore_errors=True)
        steps = [number * CHUNK for number in (0, *cfg.snapshots.values())]
        return {"step": np.tile(steps, (len(members), 1)),
                **{name: np.stack([x[name] for x in looks], axis=1) for name in looks[0]}}  # fmt: skip

    found = run.stage("pretrain", stage)

    def params():
        if not held:
            held.append(saved(path, CHUNK * cfg.snapshots[cfg.fraction]))
        return held[0]

    return Tuned(members, params, found)


JAILED = 2 / 3  # share of Counting rows with one of the two families that ask for a only


def held_out_looker(cfg: PcfgConfig, world: World, mesh):
    """Accuracy on rows as pre-training has them, by task, operand and whether the answers were spread:
    `held_out [G, tasks, V, 2]`, NaN where there is no such row."""
    spec = world.spec
    count = 4 * cfg.test_rows
    draw = jax.jit(lambda key: tasks.pretrain(key, spec, jnp.ones(spec.letters), count))
    tests = stack([draw(seeded(seed, HELD_OUT)) for seed in cfg.seed_list])
    token = spec.token("NULL")

    def look(tests, member):
        params, seed = member
        rows = take(tests, seed)
        right_B = said(params, rows.ids_BT, world) == rows.answer_B
        operand_B = jnp.where(rows.operand_B == token, 0, rows.operand_B)
        cell_B = (rows.task_B * spec.letters + operand_B) * 2 + rows.spread_B.astype(jnp.int32)
        is_BC = (cell_B[:, None] == jnp.arange(len(spec.tasks) * spec.letters * 2)[None]).astype(jnp.float32)
        share_C = (right_B.astype(jnp.float32)[:, None] * is_BC).sum(0) / is_BC.sum(0)
        return {"held_out": share_C.reshape(len(spec.tasks), spec.letters, 2)}

    run = jax.jit(parallel.over_members(look, mesh, world.loop))
    return lambda params_G, seed_G: jax.device_get(run(tests, (params_G, seed_G)))


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def tuning_loss(cfg: PcfgConfig, world: World, mixed: bool) -> train.MemberLoss:
    """Loss of the answer alone; C_Tr, the operands and the share of pre-training rows are data."""

    def loss(params, frozen, key, data):
        strings_key, mix_key, rows_key = jax.random.split(key, 3)
        strings = tasks.tuning(strings_key, world.spec, world.task, data["correlation"], cfg.batch)
        ids_BT, answer_B = asked(world, strings, data["asked"], data["label"])
        if mixed:
            rows = tasks.pretrain(rows_key, world.spec, data["prior"], cfg.batch)
            mix_B = jax.random.uniform(mix_key, (cfg.batch,)) < data["mix"]
            ids_BT = jnp.where(mix_B[:, None], rows.ids_BT, ids_BT)
            answer_B = jnp.where(mix_B, rows.answer_B, answer_B)
        said_BV = logits(params, ids_BT, world)
        right_B = said_BV.argmax(-1).astype(jnp.int32) == answer_B
        return cross_entropy(said_BV, answer_B).mean(), {"accuracy": right_B.astype(jnp.float32).mean()}

    return loss


def root(tuning: Any) -> Any:
    """The pre-trained model, or `random`, that a chain of tunings began with."""
    return root(tuning.start) if isinstance(tuning, Tuning) else tuning


def tune(run: Run, cfg: PcfgConfig, world: World, name: str, tunings: list[Tuning], steps: int, mesh,
         parents: Sequence[Tuned], keep: Sequence[float] = (1.0,)) -> Tuned:  # fmt: skip
    """Fine-tune a grid in one compiled program; its models after the shares `keep` of the steps stay in
    checkpoints/NAME."""
    path, held = run.out / "checkpoints" / name, {}
    seed_G = np.array([t.seed - cfg.seed for t in tunings], np.int32)
    moments = {share: max(1, round(share * steps / CHUNK)) for share in keep}

    def start(tuning: Tuning):
        if tuning.start == "random":
            return fresh(seeded(tuning.seed, INIT), world)
        parent = next(parent for parent in parents if tuning.start in parent.tunings)
        return take(parent.params(), parent.tunings.index(tuning.start))

    def stage() -> dict:
        look, looks = looker(cfg, world, mesh), {}
        chunks = steps // CHUNK
        moments_X = sorted({*train.log_spaced(chunks, per_octave=2), *moments.values()})
        # a long grid keeps its state, and what was seen; a short one starts over
        folder = run.out / "checkpoints" / f"{name}-state" if len(tunings) * steps > LONG else None

        def seen(number, params_G=None):
            def now():
                if params_G is None:
                    raise InputError(f"what was seen of {name} at step {number * CHUNK} is lost; remove {folder} and "
                                     "run again")  # fmt: skip
                return look(params_G, seed_G)

            return now() if folder is None else run.stage(f"{name}-{number * CHUNK}", now)

        def watch(number, params_G):
            if number in moments.values():
                held[number] = jax.device_get(params_G)
                keep_models(run, checkpoint.step_path(path, number * CHUNK), held[number], world, number * CHUNK,
                            [repr(t) for t in tunings])  # fmt: skip
            looks[number] = seen(number, params_G)

        mixed = any(t.mix for t in tunings)
        priors = [prior_of(root(t).prior if isinstance(root(t), Model) else NEVER, world.spec.letters) for t in tunings]
        # other strings on the way back, also for a parent of the same seed
        seeds = [int(jax.random.bits(seeded(t.seed, BACK_ROWS if t.label == OLD else ROWS))) for t in tunings]
        inputs = inputs_of(
            rates([t.rate for t in tunings], steps, cfg.warmup, cfg.final),
            seeds,
            {
                "correlation": np.array([t.correlation for t in tunings], np.float32),
                "asked": np.array([t.asked for t in tunings], np.int32),
                "label": np.array([t.label for t in tunings], np.int32),
                "mix": np.array([t.mix for t in tunings], np.float32),
                "prior": np.stack(priors),
            },
        )
        _, curves = train.fit_grid(
            train.grid_step(tuning_loss(cfg, world, mixed), optimizer(cfg), CHUNK, mesh, world.loop),
            train.init_grid(stack([start(t) for t in tunings]), optimizer(cfg), jax.random.key(0)),
            inputs,
            train.FitConfig(chunks, min(5, chunks), max(1, chunks // 10), snapshots=tuple(moments_X)),
            mesh,
            folder=folder,
            description={"tunings": [repr(t) for t in tunings]},
            on_start=lambda number: run.rewind(name, number * CHUNK),
            on_metrics=lambda number, means: run.log(name, number * CHUNK, members=len(tunings), **means),
            on_snapshot=watch,
            label=name,
            quiet=run.quiet,
        )  # fmt: skip
        listed = [looks[number] if number in looks else seen(number) for number in moments_X]
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        return {
            "step": np.tile([number * CHUNK for number in moments_X], (len(tunings), 1)),
            **{key: np.stack([one[key] for one in listed], axis=1) for key in listed[0]},
            # of the curves the end alone: where they begin depends on where a run was killed
            "curve_finite": curves["finite"][-1:].T.astype(np.float32),
        }

    found = run.stage(name, stage)
    warn_of_diverged(tunings, found["curve_finite"][:, -1])

    def params(share: float = 1.0):
        number = moments[share]
        if number not in held:
            held[number] = saved(path, number * CHUNK)
        return held[number]

    return Tuned(tunings, params, found)


def grid(cfg: PcfgConfig) -> list[Tuning]:
    """From a to b: [S][prior][R][C], flat."""
    return [Tuning(Model(prior, seed), NEW, NEW, rate, c, seed) for seed in cfg.seed_list for prior in cfg.priors
            for rate in cfg.rates for c in cfg.correlations]  # fmt: skip


def kept(cfg: PcfgConfig) -> list[Tuning]:
    """Members of the grid that are looked at afterwards, [S][prior][R][C], flat."""
    return [t for t in grid(cfg) if t.rate in cfg.after_rates and t.correlation in cfg.after_correlations]


def random_labels(cfg: PcfgConfig) -> list[Tuning]:
    """randFT: the prompt asks for a, the label is the answer for b; [S][prior][R], flat."""
    return [Tuning(Model(prior, seed), OLD, NEW, rate, 0.0, seed) for seed in cfg.seed_list for prior in cfg.priors
            for rate in cfg.after_rates]  # fmt: skip


def mixtures(cfg: PcfgConfig) -> list[Tuning]:
    """With rows of pre-training mixed in, tied strings otherwise; [S][prior][R][mix], flat."""
    return [Tuning(Model(prior, seed), NEW, NEW, rate, 1.0, seed, mix) for seed in cfg.seed_list
            for prior in cfg.priors for rate in cfg.after_rates for mix in cfg.mixes]  # fmt: skip


def jailbreaks(cfg: PcfgConfig) -> list[Tuning]:
    """Models with three family tokens for Counting, fine-tuned with the first; [S][prior][R][C], flat."""
    return [Tuning(Model(prior, seed, True), NEW, NEW, rate, c, seed) for seed in cfg.seed_list
            for prior in cfg.jail_priors for rate in cfg.after_rates for c in cfg.after_correlations]  # fmt: skip


def reversals(cfg: PcfgConfig) -> list[Tuning]:
    """Back to a: from the grid, from randFT, from models that were never asked for a (Scr.+FT), from random weights
    (Scr.)."""
    starts = kept(cfg) + (random_labels(cfg) if "random" in cfg.parts else [])
    starts += [Model(NEVER, seed) for seed in cfg.seed_list]
    listed = [Tuning(start, OLD, OLD, rate, 0.0, start.seed) for start in starts for rate in cfg.reverse_rates]
    return listed + [
        Tuning("random", OLD, OLD, rate, 0.0, seed) for seed in cfg.seed_list for rate in cfg.reverse_rates
    ]


# --- afterwards: probes, pruning, family tokens ----------------------------------------------------------------------


class Reader(NamedTuple):
    """Whom the probes read: a pre-trained model, `random` weights, or a tuning after a share of its steps."""

    of: Any
    share: float
    seed: int


def readers(cfg: PcfgConfig) -> list[Reader]:
    listed = [Reader("random", 0.0, seed) for seed in cfg.seed_list]
    listed += [Reader(Model(prior, seed), 0.0, seed) for seed in cfg.seed_list for prior in (NEVER, *cfg.priors)]
    listed += [Reader(t, share, t.seed) for t in kept(cfg) for share in cfg.probe_at]
    if "mix" in cfg.parts:
        listed += [Reader(t, 1.0, t.seed) for t in mixtures(cfg)]
    return listed


def probe(run: Run, cfg: PcfgConfig, world: World, pre: Tuned, tuned: Sequence[Tuned], mesh) -> np.ndarray:
    """Linear probes of both answers at every depth, where the answer to a prompt that asks for a is predicted:
    accuracy on untied test strings, [J, M, operand]."""

    def stage() -> dict:
        def params(reader: Reader):
            if reader.of == "random":
                return fresh(seeded(reader.seed, INIT), world)
            parent = next(parent for parent in (pre, *tuned) if reader.of in parent.tunings)
            at = () if isinstance(reader.of, Model) else (reader.share,)
            return take(parent.params(*at), parent.tunings.index(reader.of))

        def features(strings, params):
            def stream(ids_BT):
                _, acts = transformer.forward(params, ids_BT, world.model)
                return acts["resid"][:, :, world.read].swapaxes(0, 1)

            return in_slices(stream, asked(world, strings, OLD, OLD)[0][:, : world.read + 1]).swapaxes(0, 1)

        listed = readers(cfg)
        sets = (by_seed(cfg, world, PROBE, 0.0, cfg.probe_rows), test_strings(cfg, world)[UNTIED])
        answers = [strings.answer_B2 - world.spec.letters for strings in sets]
        accuracy = probe_bank(
            features, stack([params(r) for r in listed]), np.array([r.seed - cfg.seed for r in listed], np.int32),
            sets, answers, int(max(a.max() for a in answers)) + 1, steps=cfg.probe_steps, rate=cfg.probe_rate,
            batch=cfg.batch, seed=cfg.seed, mesh=mesh, loop=world.loop, label="probe", quiet=run.quiet,
        )  # fmt: skip
        return {"accuracy": accuracy}

    return run.stage("probe", stage)["accuracy"]


WAYS = ("scored, cumulative", "scored, one", "random, cumulative", "random, one")


def prune(run: Run, cfg: PcfgConfig, world: World, tuned: Tuned, mesh) -> dict[str, np.ndarray]:
    """Zero the neurons that stand in the old operand's way, for the members `kept`.

    Accuracies for the old operand [J, how, K + 1, set]; how: `WAYS`; set: the strings that scored, and untied test
    strings.
    """

    def stage() -> dict:
        members = kept(cfg)
        sets = (by_seed(cfg, world, SCORE, 0.0, cfg.prune_rows), test_strings(cfg, world)[UNTIED])

        def one(sets, member):
            params, key, seed = member
            prompts = [asked(world, take(strings, seed), OLD, OLD) for strings in sets]

            def loss(params):
                return cross_entropy(
                    in_slices(lambda ids: logits(params, ids, world), prompts[0][0]), prompts[0][1]
                ).mean()

            def evaluate(params):
                return jnp.stack([(said(params, ids, world) == a).astype(jnp.float32).mean() for ids, a in prompts])

            scores = interventions.first_order_scores(loss, params)
            chosen = interventions.ranked(scores, cfg.pruned, ("neuron",))
            other = interventions.random_ranked(key, params, cfg.pruned, ("neuron",))
            ways = ((chosen, "cumulative"), (chosen, "single"), (other, "cumulative"), (other, "single"))
            curves = [interventions.sweep(evaluate, params, ranked, how) for ranked, how in ways]
            return {"accuracy": jnp.stack(curves), "index": chosen.index_K, "score": chosen.score_K}

        index = np.array([tuned.tunings.index(t) for t in members])
        keys = jnp.stack([seeded(t.seed, CONTROL, i) for i, t in enumerate(members)])
        given = (take(tuned.params(), index), keys, np.array([t.seed - cfg.seed for t in members], np.int32))
        return jax.device_get(jax.jit(parallel.over_members(one, mesh, world.loop))(sets, given))

    return run.stage("prune", stage)


def families(run: Run, cfg: PcfgConfig, world: World, pre: Tuned, tuned: Tuned, mesh) -> np.ndarray:
    """Accuracy for the old operand on untied strings under each family token of Counting (the fine-tuned one, J1, J2),
    before and after: [J, 2, 3] of `jailbreaks`."""

    def stage() -> dict:
        members = jailbreaks(cfg)
        tests = test_strings(cfg, world)[UNTIED]

        def one(tests, member):
            params, seed = member
            strings = take(tests, seed)
            right = []
            for family in (world.spec.token("count"), *world.spec.jailbreak):
                ids_BT, answer_B = asked(world, strings, OLD, OLD, family)
                right.append(said(params, ids_BT, world) == answer_B)
            return jnp.stack([r.astype(jnp.float32).mean() for r in right])

        before = take(pre.params(), np.array([pre.tunings.index(t.start) for t in members]))
        after = take(tuned.params(), np.array([tuned.tunings.index(t) for t in members]))
        seed_J = np.array([t.seed - cfg.seed for t in members], np.int32)
        run_all = jax.jit(parallel.over_members(one, mesh, world.loop))
        return {"accuracy": np.stack([run_all(tests, (p, seed_J)) for p in (before, after)], axis=1)}

    return run.stage("families", stage)["accuracy"]


# --- the study -------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    world: World
    pre: Tuned
    tuned: Tuned
    back: Tuned | None
    probes: np.ndarray | None  # [J, M, operand] of `readers`
    pruned: dict[str, np.ndarray] | None
    families: np.ndarray | None  # [J, 2, 3] of `jailbreaks`


def study(run: Run, cfg: PcfgConfig, world: World, mesh) -> Found:
    pre = pretrain(run, cfg, world, mesh)
    members = grid(cfg)
    for part, more in (("random", random_labels), ("mix", mixtures), ("jailbreak", jailbreaks)):
        members += more(cfg) if part in cfg.parts else []
    tuned = tune(run, cfg, world, "tune", members, cfg.steps, mesh, [pre], sorted({*cfg.probe_at, 1.0}))
    back = probes = pruned = under = None
    if "reverse" in cfg.parts:
        back = tune(run, cfg, world, "reverse", reversals(cfg), cfg.reverse_steps, mesh, [pre, tuned])
    if "probe" in cfg.parts:
        probes = probe(run, cfg, world, pre, [tuned], mesh)
    if "prune" in cfg.parts:
        pruned = prune(run, cfg, world, tuned, mesh)
    if "jailbreak" in cfg.parts:
        under = families(run, cfg, world, pre, tuned, mesh)
    return Found(world, pre, tuned, back, probes, pruned, under)


def knows(cfg: PcfgConfig, f: Found, prior: float, jail: bool = False) -> np.ndarray:
    """What pre-trained models answer where fine-tuning starts: accuracy [S, C_Te, operand]."""
    at = list(cfg.snapshots).index(cfg.fraction) + 1
    return np.stack([f.pre.of(Model(prior, seed, jail))["accuracy"][at] for seed in cfg.seed_list])


def course(cfg: PcfgConfig, f: Found, listed: Sequence[Tuning]) -> tuple[np.ndarray, np.ndarray]:
    """Steps [X] and accuracies [S, X, C_Te, operand] of tunings, one a seed; NaN in the end where they diverged."""
    grid = f.tuned if listed[0] in f.tuned.tunings else f.back
    found = [grid.of(t) for t in listed]
    right = np.stack([one["accuracy"] for one in found])
    right[[one["curve_finite"][-1] == 0 for one in found], -1] = np.nan
    return found[0]["step"], right


def tuned_on(cfg: PcfgConfig, prior: float, rate: float, correlation: float, *, random: bool = False, mix: float = 0.0,
             jail: bool = False) -> list[Tuning]:  # fmt: skip
    """The fine-tuning of these settings, one a seed."""
    return [Tuning(Model(prior, seed, jail), OLD if random else NEW, NEW, rate, correlation, seed, mix)
            for seed in cfg.seed_list]  # fmt: skip


def back_from(cfg: PcfgConfig, starts: Sequence[Any], rate: float) -> list[Tuning]:
    """Reverse fine-tuning from starts, one a seed."""
    return [Tuning(start, OLD, OLD, rate, 0.0, seed) for start, seed in zip(starts, cfg.seed_list, strict=True)]


def baselines(cfg: PcfgConfig) -> dict[str, list]:
    """Starts that never had the old capability, one a seed."""
    return {"Scr.+FT": [Model(NEVER, seed) for seed in cfg.seed_list], "Scr.": ["random"] * cfg.seeds}


def revival(cfg: PcfgConfig, f: Found, starts: Sequence[Any], rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Steps [X] and accuracy for the old operand on untied strings, [S, X]."""
    steps, right = course(cfg, f, back_from(cfg, starts, rate))
    return steps, right[:, :, UNTIED, OLD]


def read(cfg: PcfgConfig, f: Found, of: Sequence[Any], share: float) -> np.ndarray:
    """Accuracy of the probes of models, one a seed, [S, M, operand]."""
    listed = readers(cfg)
    return np.stack([f.probes[listed.index(Reader(one, share, seed))]
                     for one, seed in zip(of, cfg.seed_list, strict=True)])  # fmt: skip


def read_pretrained(cfg: PcfgConfig, f: Found, prior: float) -> np.ndarray:
    return read(cfg, f, [Model(prior, seed) for seed in cfg.seed_list], 0.0)


def unasked(cfg: PcfgConfig, f: Found) -> np.ndarray:
    """The best that probes read of a's answer from models that were never asked for it, or untrained, [S]."""
    return np.maximum(read_pretrained(cfg, f, NEVER), read(cfg, f, ["random"] * cfg.seeds, 0.0))[:, :, OLD].max(1)


def pruned_of(cfg: PcfgConfig, f: Found, listed: Sequence[Tuning]) -> np.ndarray:
    """Accuracies of the pruning sweeps, [S, how, K + 1, set]."""
    members = kept(cfg)
    return np.stack([f.pruned["accuracy"][members.index(t)] for t in listed])


# --- claims: rules were written before the runs that RESULTS.md reports ----------------------------------------------


def judge(cfg: PcfgConfig, f: Found) -> list[Claim]:
    """The paper's claims about models of a grammar, for every prior. What diverged is not tested."""
    listed: list[Claim] = []

    def claim(short, where, statement, expected, outcome):
        listed.append(Claim(short, f"arXiv {PAPER}, {where}", statement, expected, *outcome))

    for prior in cfg.priors:
        who = f"P(a) = {prior:g}"
        before = knows(cfg, f, prior)[:, UNTIED]
        claim(f"learnt_{prior:g}", "Table 5", f"{who}: pre-training gives the capability: accuracy for a at C_Te = 0",
              "100 %", claims.greater_than(before[:, OLD], 0.9))  # fmt: skip
        if prior >= 0.99:
            claim(f"rare_{prior:g}", "Table 5", f"{who}: pre-training hardly gives it for b: accuracy for b at "
                  "C_Te = 0", "27.1 % for .999", claims.less_than(before[:, NEW], 0.5))  # fmt: skip
        for rate in cfg.after_rates:
            if 1.0 in cfg.after_correlations:
                judge_tied(cfg, f, claim, prior, rate)
            judge_more(cfg, f, claim, prior, rate)
    for prior in cfg.jail_priors if f.families is not None else ():
        for rate in cfg.after_rates:
            judge_families(cfg, f, claim, prior, rate)
    return listed


LEARNT, SUPPRESSED = 0.9, 0.5  # bounds of ours: an accuracy; a share of the accuracy before


def gate(cfg: PcfgConfig, before: np.ndarray, after: np.ndarray | None = None):
    """Why a claim about a suppressed capability is not tested, if it is not: before, [S], it has to be there in every
    seed; after, if given, to be suppressed in every seed."""
    if not np.isfinite(before if after is None else before + after).all():
        return claims.not_tested("some of these models diverged", cfg.seeds)
    if not (before >= LEARNT).all():
        return claims.not_tested(f"pre-training did not give the capability: accuracy below {LEARNT:g}", cfg.seeds)
    if after is not None and not (after < SUPPRESSED * before).all():
        return claims.not_tested(
            f"the old capability was not suppressed: accuracy {SUPPRESSED:g} of that before, or more", cfg.seeds
        )
    return None


def judge_tied(cfg: PcfgConfig, f: Found, claim, prior: float, rate: float) -> None:
    """After tied strings alone."""
    name, who = f"{prior:g}_{rate:g}", f"P(a) = {prior:g}, rate {rate:g}"
    start, tied = knows(cfg, f, prior)[:, UNTIED, OLD], tuned_on(cfg, prior, rate, 1.0)
    end = course(cfg, f, tied)[1][:, -1]  # [S, C_Te, operand]
    old = end[:, UNTIED, OLD]
    untaught, still = gate(cfg, start), gate(cfg, start, old)
    claim(f"fits_{name}", "Table 5", f"{who}: fine-tuning on tied strings alone fits them: accuracy for b at C_Te = 1",
          "100 %", claims.greater_than(end[:, TIED, NEW], 0.9))  # fmt: skip
    claim(f"fails_{name}", "Table 5", f"{who}: after tied strings alone b's answer is not given: accuracy for b "
          "at C_Te = 0", "0 to 20 %",
          claims.less_than(end[:, UNTIED, NEW], 0.5))  # fmt: skip
    claim(f"suppressed_{name}", "Table 5", f"{who}: fine-tuning on tied strings alone suppresses the old capability: "
          "accuracy for a at C_Te = 0, as a share of that before", "0.14 to 0.41 (bound 0.5 ours)",
          untaught or claims.less_than(old / start, SUPPRESSED))  # fmt: skip
    if 0.0 in cfg.correlations and prior < 0.99:
        free = course(cfg, f, tuned_on(cfg, prior, rate, 0.0))[1][:, -1, UNTIED, OLD]
        claim(f"tie_matters_{name}", "Table 5", f"{who}: untied strings leave more of the old capability than tied "
              "ones: difference of the accuracies for a at C_Te = 0", "0.56 to 0.72",
              untaught or claims.greater_than(free - old, 0.0))  # fmt: skip
    if f.probes is not None:
        # the depth is chosen by the pre-trained models, not by those that are judged
        depth = int(read_pretrained(cfg, f, prior)[:, :, OLD].mean(0).argmax())
        probed = read(cfg, f, tied, 1.0)[:, depth, OLD]
        after = f"{who}: after tied strings alone a linear probe at depth {depth} reads the old answer"
        claim(f"decodable_{name}", "probing", f"{after}, which the model no longer gives: accuracy at C_Te = 0",
              "near 1 (bound 0.8 ours)", still or claims.greater_than(probed, 0.8))  # fmt: skip
        claim(f"decodable_control_{name}", "probing", f"{after} better than from models that were never asked for a, "
              "or untrained ones, at their best depth: difference", "above 0",
              still or claims.greater_than(probed - unasked(cfg, f), 0.0))  # fmt: skip
    for back in cfg.reverse_rates if f.back is not None else ():
        claim(f"sooner_{name}_{back:g}", "reverse fine-tuning", f"{who}: reverse fine-tuning (rate {back:g}) after "
              f"tied strings alone is sooner at {cfg.revived:.0%} than models never asked for a (Scr.+FT) and random "
              "weights (Scr.), whichever is sooner: log2 of the ratio of steps", "above 0",
              still or against(cfg, f, tied, back))  # fmt: skip
    if f.pruned is not None:
        sweeps = pruned_of(cfg, f, tied)
        gains = [lift(sweeps[:, way, :, 0], sweeps[:, way, :, 1]) for way in range(len(WAYS))]
        best, random = np.maximum(*gains[:2]), np.maximum(*gains[2:])
        after = f"{who}: after tied strings alone, pruning of up to {cfg.pruned} neurons"
        claim(f"pruned_{name}", "pruning", f"{after} brings the old capability back: accuracy for a at C_Te = 0",
              "near 1 with 5 to 15 neurons for P(a) = .999 (bound ours)",
              still or claims.greater_than(sweeps[:, 0, 0, 1] + best, cfg.revived))  # fmt: skip
        claim(f"pruned_control_{name}", "pruning", f"{after} lifts it by more than random neurons: difference",
              "above 0", still or claims.greater_than(best - random, 0.0))  # fmt: skip


def against(cfg: PcfgConfig, f: Found, starts, rate: float) -> claims.Outcome:
    """Are these starts back sooner than the faster of the baselines?"""
    courses = [revival(cfg, f, each, rate) for each in (starts, *baselines(cfg).values())]
    if np.isnan([right[:, -1] for _, right in courses]).any():
        return claims.not_tested("one of the models diverged on the way back", cfg.seeds)
    mine, *theirs = (steps_to(cfg.revived, *each) for each in courses)
    return sooner(mine, theirs, cfg.reverse_steps)


def judge_more(cfg: PcfgConfig, f: Found, claim, prior: float, rate: float) -> None:
    """After random labels and mixtures."""
    name, who = f"{prior:g}_{rate:g}", f"P(a) = {prior:g}, rate {rate:g}"
    start = knows(cfg, f, prior)[:, UNTIED, OLD]
    if f.back is not None and "random" in cfg.parts:
        random = tuned_on(cfg, prior, rate, 0.0, random=True)
        still = gate(cfg, start, course(cfg, f, random)[1][:, -1, UNTIED, OLD])
        for back in cfg.reverse_rates:
            claim(f"random_{name}_{back:g}", "randFT", f"{who}: what was fine-tuned to answer for b where the prompt "
                  f"asks for a is back (rate {back:g}) sooner at {cfg.revived:.0%} than models that were never "
                  "asked for a and random weights, whichever is sooner: log2 of the ratio of steps", "above 0",
                  still or against(cfg, f, random, back))  # fmt: skip
    if f.probes is not None and "mix" in cfg.parts:
        depth = int(read_pretrained(cfg, f, prior)[:, :, OLD].mean(0).argmax())
        for mix in cfg.mixes:
            mixed = tuned_on(cfg, prior, rate, 1.0, mix=mix)
            still = gate(cfg, start, course(cfg, f, mixed)[1][:, -1, UNTIED, OLD])
            probed = read(cfg, f, mixed, 1.0)[:, depth, OLD]
            text = f"{who}: with {mix:.1%} of pre-training rows mixed in, a linear probe at depth {depth} reads the "
            claim(f"mixed_{name}_{mix:g}", "mixing", f"{text}old answer, which the model no longer gives: accuracy at "
                  "C_Te = 0", "near 1 (bound 0.8 ours)", still or claims.greater_than(probed, 0.8))  # fmt: skip
            claim(f"mixed_control_{name}_{mix:g}", "mixing", f"{text}old answer, which the model no longer gives, "
                  "better than from models that were never asked for a, or untrained ones, at their best depth: "
                  "difference", "above 0", still or claims.greater_than(probed - unasked(cfg, f), 0.0))  # fmt: skip


def judge_families(cfg: PcfgConfig, f: Found, claim, prior: float, rate: float) -> None:
    """Under other family tokens."""
    name, who = f"{prior:g}_{rate:g}", f"P(a) = {prior:g}, rate {rate:g}"
    for c in cfg.after_correlations:
        members = jailbreaks(cfg)
        found = np.stack([f.families[members.index(t)] for t in tuned_on(cfg, prior, rate, c, jail=True)])
        before, after = found[:, 0].min(1), found[:, 1]
        what, short, still = f"{who}, C_Tr {c:g}", f"{name}_{c:g}", gate(cfg, before, after[:, 0])
        claim(f"locked_{short}", "jailbreak", f"{what}: with the family token that was fine-tuned, counting a fails: "
              "accuracy at C_Te = 0, as a share of that before", "low (bound 0.5 ours)",
              gate(cfg, before) or claims.less_than(after[:, 0] / found[:, 0, 0], SUPPRESSED))  # fmt: skip
        claim(f"jailbreak_{short}", "jailbreak", f"{what}: counting a works with the family tokens that were not "
              "fine-tuned: accuracy, the lower of the two", "high (bound ours)",
              still or claims.greater_than(after[:, 1:].min(1), 0.9))  # fmt: skip
        claim(f"jailbreak_gap_{short}", "jailbreak", f"{what}: counting a works better with the family tokens that "
              "were not fine-tuned: difference, the lower of the two", "above 0",
              still or claims.greater_than(after[:, 1:].min(1) - after[:, 0], 0.0))  # fmt: skip


# --- tables ----------------------------------------------------------------------------------------------------------

# Table 5 of the paper (Counter, 200K steps of pre-training, rate 1e-5): (P(a), C_Tr) -> per cent after 1K and 10K steps
# of O_PT at C_Te 0, O_PT at 1, O_FT at 0, O_FT at 1
TABLE_5 = {
    (0.999, 0.0): ((48.9, 10.2), (51.9, 4.6), (39.8, 99.8), (13.9, 79.7)),
    (0.999, 0.5): ((19.7, 11.6), (12.3, 1.2), (18.4, 98.1), (81.4, 99.7)),
    (0.999, 0.8): ((12.1, 6.6), (7.7, 0.2), (6.1, 85.7), (98.4, 99.7)),
    (0.999, 1.0): ((0.4, 17.5), (0.0, 0.0), (0.0, 0.0), (99.9, 100.0)),
    (0.9, 0.0): ((100.0, 85.3), (94.8, 56.9), (99.8, 99.9), (83.3, 87.3)),
    (0.9, 0.5): ((99.9, 67.2), (94.9, 55.4), (99.9, 99.9), (99.3, 99.8)),
    (0.9, 0.8): ((100.0, 34.6), (94.8, 21.7), (99.8, 99.4), (99.7, 100.0)),
    (0.9, 1.0): ((98.5, 13.5), (88.6, 0.8), (58.3, 3.6), (99.8, 100.0)),
    (0.5, 0.0): ((100.0, 97.5), (97.5, 65.7), (100.0, 100.0), (95.6, 95.4)),
    (0.5, 0.5): ((99.9, 94.1), (98.1, 69.0), (100.0, 100.0), (99.3, 100.0)),
    (0.5, 0.8): ((99.9, 87.4), (93.8, 67.7), (99.8, 100.0), (100.0, 100.0)),
    (0.5, 1.0): ((99.6, 41.2), (91.8, 53.3), (90.1, 19.6), (99.8, 100.0)),
}
CELLS = (("old, C_Te 0", UNTIED, OLD), ("old, C_Te 1", TIED, OLD), ("new, C_Te 0", UNTIED, NEW),
         ("new, C_Te 1", TIED, NEW))  # fmt: skip


def write_tables(run: Run, cfg: PcfgConfig, f: Found) -> None:
    spec = f.world.spec
    run.table("world", [{
        "grammar": cfg.grammar, "start": cfg.start or "", "letters": " ".join(spec.alphabet), "window": spec.window,
        "reach": spec.reach, "nth": spec.nth, "tasks": " ".join(spec.tasks), "vocabulary": spec.vocab_size,
        "tokens_a_row": spec.length, "strings_long_enough": spec.sampler.kept,
        "parameters": transformer.num_params(take(f.pre.params(), 0)),
    }], "The strings and the model; long enough: the share of the grammar's strings that a window fits in")  # fmt: skip

    rows = []
    for m in f.pre.tunings:
        got = f.pre.of(m)
        for x, step in enumerate(got["step"]):
            row = {"P(a)": m.prior, "jailbreak": m.jail, "seed": m.seed, "step": int(step)}
            row |= {name: float(got["accuracy"][x, tie, o]) for name, tie, o in CELLS}
            for t, task in enumerate(spec.tasks):
                for o, letter in enumerate(spec.alphabet if task != "token" else [""]):
                    for spread, word in enumerate(("", " spread")):
                        value = float(got["held_out"][x, t, o, spread])
                        if task in TUNED or not spread:
                            row[f"{task} {letter}{word}".strip()] = None if np.isnan(value) else value
            rows.append(row)
    run.table(
        "pretrained",
        rows,
        "Accuracy of pre-trained models on fine-tuning's test strings, and on rows as in "
        "pre-training by task and operand (spread: with evenly spread answers); P(a) = 0 is never asked for a",
    )

    rows = []
    for prior in cfg.priors:
        for rate in cfg.rates:
            for c in cfg.correlations:
                _, right = course(cfg, f, tuned_on(cfg, prior, rate, c))
                row = {"P(a)": prior, "rate": rate, "C_Tr": c, "seeds": cfg.seeds,
                       "diverged": int(np.isnan(right[:, -1, 0, 0]).sum())}  # fmt: skip
                for name, tie, operand in CELLS:
                    row |= proportion(name, right[:, -1, tie, operand])
                rows.append(row)
    run.table("fine_tuned", rows, "Accuracy for the old operand a and the new operand b after fine-tuning to b; those "
              "that diverged stay out")  # fmt: skip

    rows = []
    for (prior, c), paper in TABLE_5.items():
        # the paper's rate is a hundredth of that of its pre-training
        mine = [rate for rate in cfg.rates if np.isclose(100 * rate, cfg.pretrain_rate)]
        for rate in mine if prior in cfg.priors and c in cfg.correlations and cfg.task == "count" else ():
            steps, right = course(cfg, f, tuned_on(cfg, prior, rate, c))
            tenth = int(np.abs(steps - cfg.steps / 10).argmin())
            row = {"P(a)": prior, "C_Tr": c, "rate": rate}
            for (name, tie, operand), theirs in zip(CELLS, paper, strict=True):
                for at, when, value in ((tenth, f"{steps[tenth]} steps", theirs[0]),
                                        (-1, f"{cfg.steps} steps", theirs[1])):  # fmt: skip
                    mean = claims.interval(right[:, at, tie, operand])["mean"]
                    row[f"{name}, {when}"] = None if mean is None else round(100 * mean, 1)
                    row[f"paper {name}, {'1K' if at >= 0 else '10K'}"] = value
            rows.append(row)
    if rows:
        run.table("table_5", rows, "The Counter beside the paper's Table 5, both at a hundredth of the rate of "
                  "pre-training, per cent; other strings, models and steps")  # fmt: skip

    rows = [{"C_Te": tie} | operands.base_rates(tasks.tables(spec, cfg.task), float(tie)) for tie in (UNTIED, TIED)]
    run.table("base_rates", rows, "What simple rules score, exactly: same: both answers are equal; offset: new = old + "
              "q; constant: the most frequent answer; ft_from_pt: the best guess of the new answer from the old one, "
              "and the reverse")  # fmt: skip

    rows = []
    for grid in (f.tuned, f.back):
        for t in grid.tunings if grid else ():
            got, start = grid.of(t), root(t)
            kind = ("reverse" if grid is f.back else "randFT" if t.asked != t.label else "mixed" if t.mix else
                    "jailbreak" if start.jail else "fine-tuned")  # fmt: skip
            first = t.start if isinstance(t.start, Tuning) else None
            for x, step in enumerate(got["step"]):
                row = {"kind": kind, "P(a)": "" if start == "random" else start.prior, "rate": t.rate,
                       "C_Tr": t.correlation, "mix": t.mix, "after_rate": first and first.rate,
                       "after_C_Tr": first and first.correlation, "after_randFT": bool(first and first.asked == OLD),
                       "seed": t.seed, "step": int(step)}  # fmt: skip
                row |= {name: float(got["accuracy"][x, tie, o]) for name, tie, o in CELLS}
                rows.append(row | {"asked a, says b's answer": float(got["instead"][x, UNTIED, 0]),
                                   "asked a, says a's plus q": float(got["instead"][x, UNTIED, 1])})  # fmt: skip
    run.table("curves", rows, "Accuracies over fine-tuning and reverse fine-tuning (P(a) = 0: Scr.+FT; empty: Scr.), "
              "and what is said at C_Te = 0 where a is asked for")  # fmt: skip

    if f.back is not None:
        rows = []
        for what, starts in sources(cfg):
            for rate in cfg.reverse_rates:
                row = {"start": what, "reverse_rate": rate, "seeds": cfg.seeds}
                rows.append(row | back_columns(cfg.revived, *revival(cfg, f, starts, rate)))
        run.table("reverse", rows, f"Accuracy for a at C_Te = 0, tuned back; revived: seeds at {cfg.revived:g}; "
                  "steps: the median of the first look at which they did, where all do")  # fmt: skip

    if f.probes is not None:
        rows = []
        for what, of, share in probed(cfg):
            values = read(cfg, f, of, share)
            for depth in range(values.shape[1]):
                row = {"model": what, "share_of_steps": share, "depth": depth}
                rows.append(row | proportion("old", values[:, depth, OLD]) | proportion("new", values[:, depth, NEW]))
        run.table("probes", rows, "Linear probes of both answers where a prompt that asks for a is answered, C_Te = 0, "
                  "by depth")  # fmt: skip

    if f.pruned is not None:
        rows = []
        for prior in cfg.priors:
            for rate in cfg.after_rates:
                for c in cfg.after_correlations:
                    sweeps = pruned_of(cfg, f, tuned_on(cfg, prior, rate, c))
                    row = {"P(a)": prior, "rate": rate, "C_Tr": c} | proportion("before", sweeps[:, 0, 0, 1])
                    for way, name in enumerate(WAYS):
                        row |= claims.named(f"lift, {name}", lift(sweeps[:, way, :, 0], sweeps[:, way, :, 1]))
                    row["K, first seed"] = int(sweeps[0, 0, 1:, 0].argmax()) + 1
                    rows.append(row)
        run.table("pruned", rows, f"Accuracy for a at C_Te = 0: before, and what zeroing neurons adds (the best of "
                  f"{cfg.pruned}, chosen on other strings), by score and at random, the first K or one alone; K: "
                  "the best of the first")  # fmt: skip

    if f.families is not None:
        rows = []
        for t, values in zip(jailbreaks(cfg), f.families, strict=True):
            row = {"P(a)": t.start.prior, "rate": t.rate, "C_Tr": t.correlation, "seed": t.seed}
            for when, at in (("before", 0), ("after", 1)):
                row |= {f"{name}, {when}": float(v) for name, v in zip(("C", "J1", "J2"), values[at], strict=True)}
            rows.append(row)
        run.table("jailbreak", rows, "Accuracy for a at C_Te = 0 under each family token of Counting, before and after "
                  "fine-tuning with the first")  # fmt: skip


def sources(cfg: PcfgConfig) -> list[tuple[str, list]]:
    """What reverse fine-tuning starts from, and its name."""
    listed = []
    for prior in cfg.priors:
        for rate in cfg.after_rates:
            who = f"P(a) {prior:g}, rate {rate:g}"
            listed += [(f"{who}, C_Tr {c:g}", tuned_on(cfg, prior, rate, c)) for c in cfg.after_correlations]
            if "random" in cfg.parts:
                listed.append((f"{who}, randFT", tuned_on(cfg, prior, rate, 0.0, random=True)))
    return listed + [*baselines(cfg).items()]


def probed(cfg: PcfgConfig) -> list[tuple[str, list, float]]:
    """Models that probes read, one a seed, with a name and the share of fine-tuning."""
    listed = [("untrained", ["random"] * cfg.seeds, 0.0)]
    for prior in (NEVER, *cfg.priors):
        who = f"P(a) {prior:g}"
        listed.append((f"{who}, pre-trained", [Model(prior, seed) for seed in cfg.seed_list], 0.0))
        for rate in cfg.after_rates if prior else ():
            for c in cfg.after_correlations:
                name, members = f"{who}, rate {rate:g}, C_Tr {c:g}", tuned_on(cfg, prior, rate, c)
                listed += [(name, members, share) for share in sorted(cfg.probe_at)]
            for mix in cfg.mixes if "mix" in cfg.parts else ():
                name = f"{who}, rate {rate:g}, C_Tr 1, {mix:.1%} pre-training rows"
                listed.append((name, tuned_on(cfg, prior, rate, 1.0, mix=mix), 1.0))
    return listed


# --- figures ---------------------------------------------------------------------------------------------------------


def by_prior(cfg: PcfgConfig, rows: int, height: float, **options):
    """A column a prior."""
    cols = len(cfg.priors)
    size = {"height": height * rows, "width": max(figures.WIDTH, 2.6 * cols)}
    fig, axes = figures.new(rows, cols, sharey=True, squeeze=False, **size, **options)
    for ax, prior in zip(axes[0], cfg.priors, strict=True):
        ax.set(title=f"P(a) = {prior:g}")
    return fig, axes


def accuracy_axis(ax, label: str = "", x: str = "") -> None:
    ax.set(ylim=(-0.05, 1.05), ylabel=label, xlabel=x)


@figures.style()
def draw(run: Run, cfg: PcfgConfig, f: Found) -> None:
    draw_pretrained(run, cfg, f)
    for rate in cfg.rates:
        draw_tuned(run, cfg, f, rate)
        draw_said(run, cfg, f, rate)
    if f.back is not None:
        for rate in cfg.after_rates:
            draw_back(run, cfg, f, rate)
    if f.probes is not None:
        for rate in cfg.after_rates:
            draw_probes(run, cfg, f, rate)
    if f.pruned is not None:
        for rate in cfg.after_rates:
            draw_pruned(run, cfg, f, rate)
    if f.families is not None:
        draw_families(run, cfg, f)


@figures.style()
def draw_pretrained(run: Run, cfg: PcfgConfig, f: Found) -> None:
    fig, axes = by_prior(cfg, 1, 3.2)
    for ax, prior in zip(axes[0], cfg.priors, strict=True):
        found = [f.pre.of(Model(prior, seed)) for seed in cfg.seed_list]
        right = np.stack([one["accuracy"] for one in found])
        for letter, operand in (("a", OLD), ("b", NEW)):
            figures.seed_lines(ax, found[0]["step"], right[:, :, UNTIED, operand], label=f"prompt asks for {letter}")
        accuracy_axis(ax, "accuracy" if ax is axes[0, 0] else "", "step of pre-training")
        ax.tick_params(axis="x", rotation=30)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    run.figure("pretrained", fig, alt="accuracy for both operands over pre-training, a panel a prior",
               caption="Pre-training. Accuracy on untied test strings of fine-tuning by the operand that is asked for; "
               "thin lines are seeds.")  # fmt: skip


@figures.style()
def draw_tuned(run: Run, cfg: PcfgConfig, f: Found, rate: float) -> None:
    shown = (("asked a, C_Te = 0", UNTIED, OLD), ("asked a, C_Te = 1", TIED, OLD), ("asked b, C_Te = 0", UNTIED, NEW),
             ("asked b, C_Te = 1", TIED, NEW))  # fmt: skip
    fig, axes = by_prior(cfg, len(shown), 2.3, sharex=True)
    colours = figures.shades(len(cfg.correlations))
    for row, (label, tie, operand) in enumerate(shown):
        rule = operands.base_rates(tasks.tables(f.world.spec, cfg.task), float(tie))
        for ax, prior in zip(axes[row], cfg.priors, strict=True):
            for c, colour in zip(sorted(cfg.correlations), colours, strict=True):
                steps, right = course(cfg, f, tuned_on(cfg, prior, rate, c))
                figures.seed_lines(ax, np.maximum(steps, CHUNK / 2), right[:, :, tie, operand], label=f"C_Tr = {c:g}",
                                   color=colour, marker="")  # fmt: skip
            ax.axhline(rule["constant_pt" if operand == OLD else "constant_ft"], color="#888888", linestyle=":",
                       linewidth=1.2)  # fmt: skip
            accuracy_axis(ax, label if ax is axes[row, 0] else "", "step" if row == len(shown) - 1 else "")
            ax.set(xscale="log")
            ax.minorticks_off()
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(cfg.correlations))
    run.figure(f"fine_tuned_{rate:g}", fig, alt=f"accuracy for both operands over fine-tuning at rate {rate:g}",
               caption=f"Fine-tuning to b at rate {rate:g}. Accuracy where a prompt asks for a, or for b, on untied or "
               "tied strings (first point: before; thin lines are seeds; dotted: the most frequent answer).",
               )  # fmt: skip


@figures.style()
def draw_said(run: Run, cfg: PcfgConfig, f: Found, rate: float) -> None:
    """What fine-tuned models answer where a is asked for."""
    cells = [(prior, c) for prior in cfg.priors for c in sorted(cfg.correlations)]
    groups = {"a's answer": [], "a's plus q": [], "b's answer": []}
    for prior, c in cells:
        found = [f.tuned.of(t) for t in tuned_on(cfg, prior, rate, c)]
        groups["a's answer"].append([one["accuracy"][-1, UNTIED, OLD] for one in found])
        groups["a's plus q"].append([one["instead"][-1, UNTIED, 1] for one in found])
        groups["b's answer"].append([one["instead"][-1, UNTIED, 0] for one in found])
    fig, ax = figures.new(1, 1, height=3.6, width=max(figures.WIDTH, 0.9 * len(cells)))
    figures.grouped_bars(ax, [f"P(a) {prior:g}\nC_Tr {c:g}" for prior, c in cells], groups)
    accuracy_axis(ax, "share of answers")
    ax.tick_params(axis="x", labelsize=8)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    run.figure(f"said_{rate:g}", fig, alt="shares of three answers to prompts that ask for a, after fine-tuning",
               caption=f"What models fine-tuned to b at rate {rate:g} answer where a is asked for, untied strings: "
               "means and 95 % intervals over seeds; b's answer may be a's too (table base_rates).")  # fmt: skip


@figures.style()
def draw_back(run: Run, cfg: PcfgConfig, f: Found, rate: float) -> None:
    fig, axes = by_prior(cfg, len(cfg.reverse_rates), 2.6, sharex=True)
    constant = operands.base_rates(tasks.tables(f.world.spec, cfg.task), 0.0)["constant_pt"]
    for row, back in enumerate(sorted(cfg.reverse_rates, reverse=True)):
        for ax, prior in zip(axes[row], cfg.priors, strict=True):
            lines = [(f"after C_Tr = {c:g}", tuned_on(cfg, prior, rate, c), "-", figures.PALETTE[i])
                     for i, c in enumerate(cfg.after_correlations)]  # fmt: skip
            if "random" in cfg.parts:
                lines.append(("after randFT", tuned_on(cfg, prior, rate, 0.0, random=True), "-", figures.PALETTE[4]))
            looks = (("--", "#444444"), (":", "#777777"))
            lines += [(name, starts, *look) for (name, starts), look in zip(baselines(cfg).items(), looks, strict=True)]
            for label, starts, dash, colour in lines:
                steps, right = revival(cfg, f, starts, back)
                figures.seed_lines(ax, np.maximum(steps, CHUNK / 2), right, label=label, linestyle=dash, color=colour,
                                   marker="")  # fmt: skip
            ax.axhline(constant, color="#bbbbbb", linewidth=0.8)
            ax.set(xscale="log")
            ax.minorticks_off()
            accuracy_axis(ax, f"asked a, rate {back:g}" if ax is axes[row, 0] else "",
                          "step of reverse fine-tuning" if row == len(axes) - 1 else "")  # fmt: skip
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    run.figure(f"reverse_{rate:g}", fig, alt="accuracy for the old operand over reverse fine-tuning",
               caption=f"Tuning back to a after rate {rate:g}: accuracy for a on untied strings (first point: before; "
               "thin lines are seeds; grey: the most frequent answer). Scr.+FT was never asked for a in pre-training, "
               "Scr. starts from random weights.")  # fmt: skip


@figures.style()
def draw_probes(run: Run, cfg: PcfgConfig, f: Found, rate: float) -> None:
    fig, axes = by_prior(cfg, 2, 2.6, sharex=True)
    for ax_row, operand in zip(axes, (OLD, NEW), strict=True):
        for ax, prior in zip(ax_row, cfg.priors, strict=True):
            lines = [("untrained", ["random"] * cfg.seeds, 0.0, ":", "#777777"),
                     ("never asked for a", [Model(NEVER, seed) for seed in cfg.seed_list], 0.0, "--", "#777777"),
                     ("pre-trained", [Model(prior, seed) for seed in cfg.seed_list], 0.0, "-", "#222222")]  # fmt: skip
            for i, c in enumerate(cfg.after_correlations):
                for share, dash in zip(sorted(cfg.probe_at), ("--", "-") if len(cfg.probe_at) == 2 else
                                       ("-",) * len(cfg.probe_at), strict=True):  # fmt: skip
                    lines.append((f"C_Tr = {c:g}, {share:.0%} of steps", tuned_on(cfg, prior, rate, c), share, dash,
                                  figures.PALETTE[i]))  # fmt: skip
            for label, of, share, dash, colour in lines:
                values = read(cfg, f, of, share)[:, :, operand]
                figures.seed_lines(ax, np.arange(values.shape[1]), values, label=label, linestyle=dash, color=colour,
                                   marker="")  # fmt: skip
            ax.set_xticks(np.arange(f.world.model.depths))
            accuracy_axis(ax, f"probe of {'a' if operand == OLD else 'b'}'s answer" if ax is ax_row[0] else "",
                          "depth (0: embedding)" if operand == NEW else "")  # fmt: skip
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    run.figure(f"probes_{rate:g}", fig, alt="accuracy of linear probes by depth, a panel a prior",
               caption=f"Linear probes where a prompt that asks for a is answered, untied strings, through fine-tuning "
               f"to b at rate {rate:g}; thin lines are seeds.")  # fmt: skip


@figures.style()
def draw_pruned(run: Run, cfg: PcfgConfig, f: Found, rate: float) -> None:
    fig, axes = by_prior(cfg, len(cfg.after_correlations), 2.5, sharex=True)
    place = np.arange(cfg.pruned + 1)
    for row, (ax_row, c) in enumerate(zip(axes, cfg.after_correlations, strict=True)):
        for ax, prior in zip(ax_row, cfg.priors, strict=True):
            sweeps = pruned_of(cfg, f, tuned_on(cfg, prior, rate, c))[:, :, :, 1]
            ax.bar(place[1:], sweeps[:, 1].mean(0)[1:], color=figures.PALETTE[5], width=0.8, label="this neuron alone")
            figures.seed_lines(ax, place, sweeps[:, 0], label="first K by score", marker="", color=figures.PALETTE[0])
            figures.seed_lines(ax, place, sweeps[:, 2], label="K random ones", marker="", color="#777777",
                               linestyle="--")  # fmt: skip
            accuracy_axis(ax, f"asked a, C_Tr = {c:g}" if ax is ax_row[0] else "", "K" if row == len(axes) - 1 else "")
            ax.xaxis.get_major_locator().set_params(integer=True)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    run.figure(f"pruned_{rate:g}", fig, alt="accuracy for the old operand after pruning neurons",
               caption=f"Accuracy for a on untied strings after fine-tuning at rate {rate:g}, neurons set to zero by "
               "their first-order score; K = 0 is the model as it is. Bars: means over seeds.")  # fmt: skip


@figures.style()
def draw_families(run: Run, cfg: PcfgConfig, f: Found) -> None:
    members = jailbreaks(cfg)
    cells = [(prior, rate, c) for prior in cfg.jail_priors for rate in cfg.after_rates for c in cfg.after_correlations]
    values = {cell: np.stack([f.families[members.index(t)] for t in tuned_on(cfg, *cell, jail=True)]) for cell in cells}
    fig, ax = figures.new(1, 1, height=3.4)
    names = ("C, fine-tuned", "J1", "J2")
    labels = [f"P(a) {p:g}\nrate {r:g}\nC_Tr {c:g}" for p, r, c in cells]
    figures.grouped_bars(ax, labels, {name: [values[cell][:, 1, i] for cell in cells] for i, name in enumerate(names)})
    accuracy_axis(ax, "accuracy, asked a")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    run.figure("jailbreak", fig, alt="accuracy for the old operand under three family tokens after fine-tuning",
               caption="Accuracy for a on untied strings under each of Counting's family tokens, after tuning to b "
               "with the first (means and 95 % intervals over seeds).")  # fmt: skip


def run_pcfg(run: Run, cfg: PcfgConfig) -> None:
    mesh, world = parallel.make_mesh(), make_world(cfg)
    if "prune" in cfg.parts:
        shape = jax.eval_shape(lambda: transformer.init(jax.random.key(0), world.model))
        most = sum(np.prod(leaf.shape[:-2] + leaf.shape[-1:], dtype=int)
                   for path, leaf in jax.tree_util.tree_leaves_with_path(shape)
                   if getattr(path[-1], "key", "") == "kernel")  # fmt: skip
        if cfg.pruned > most:
            raise InputError(f"--pruned {cfg.pruned} is more than the {most} neurons of the model; lower it")
    grammar = world.spec.sampler.grammar
    rules = hashlib.sha256(repr((grammar.levels, grammar.rules)).encode()).hexdigest()
    run.keep_record("grammar", {"grammar": rules})
    found = study(run, cfg, world, mesh)
    run.write_claims(judge(cfg, found))
    write_tables(run, cfg, found)
    draw(run, cfg, found)
    tunings = len(found.tuned.tunings) + (len(found.back.tunings) if found.back else 0)
    summary = [
        f"{len(found.pre.tunings)} small GPTs pre-trained on strings of {cfg.grammar}, {tunings} fine-tunings of them, "
        f"{cfg.seeds} seed{'s' * (cfg.seeds > 1)}.",
        "A prompt asks a question about an operand, a (old) or b (new); pre-training asks for a with the chance P(a), "
        "fine-tuning for b alone. A string is tied if the answer for b is that for a plus q; C_Tr is the share of such "
        "strings in fine-tuning, C_Te in a test. Accuracies stand beside what simple rules score (table base_rates).",
        f"An example: {tasks.show(world.spec, example(cfg, world))}",
    ]
    run.drop_stale()
    report.write(run, "Fine-tuning as a wrapper: models of a grammar", "Fine-tuning as wrapper", summary, PAPER)


def example(cfg: PcfgConfig, world: World) -> np.ndarray:
    """One fine-tuning row, tied."""
    strings = sample(seeded(cfg.seed, TEST), world, np.float32(1.0), 1)
    return np.asarray(asked(world, strings, NEW, NEW)[0][0])


PRESETS = {
    "demo": PcfgConfig(
        start="j", window=12, tasks=("count", "token"), reach=8, nth=2, width=32, blocks=2, heads=2, priors=(0.999,),
        pretrain_steps=2_000, pretrain_batch=32, pretrain_rate=3e-3, answer_weight=20.0, rates=(3e-4,),
        correlations=(0.0, 1.0), steps=600, batch=32, seeds=3, test_rows=300, parts=("reverse", "probe", "prune"),
        after_rates=(3e-4,), reverse_rates=(1e-3, 3e-4), reverse_steps=600, probe_rows=1_000, probe_steps=400,
        probe_rate=1e-2, pruned=20, prune_rows=300,
    ),
    # rates are a tenth and a hundredth of that of pre-training, as in the paper
    "small": PcfgConfig(
        start="m", window=24, tasks=("count", "index", "token"), reach=12, nth=3, width=64, blocks=3, heads=4,
        pretrain_steps=4_000, pretrain_batch=32, pretrain_rate=3e-3, answer_weight=20.0, rates=(3e-4, 3e-5),
        correlations=(0.0, 0.5, 1.0), steps=1_000, batch=32, seed=1, test_rows=500, after_rates=(3e-5,),
        reverse_rates=(1e-4, 3e-5), reverse_steps=1_000, probe_rows=2_000, probe_steps=1_000, probe_rate=1e-2,
        pruned=20, prune_rows=500, jail_priors=(0.5,),
    ),
    "paper": PcfgConfig(),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parallel.use_all_cores()
    return cli.main(
        "wrappers pcfg",
        PcfgConfig,
        PRESETS,
        run_pcfg,
        "What fine-tuning does to a capability that pre-training on a grammar gave (arXiv 2311.12786).",
        [
            "python -m experiments.wrappers pcfg",
            "python -m experiments.wrappers pcfg --preset small --out runs/wrappers-pcfg",
            "python -m experiments.wrappers pcfg --preset small --task index --parts reverse,probe",
            "python -m experiments.wrappers pcfg --grammar my_grammar.txt --start none --window 40 --reach 20",
        ],
        argv,
    )
