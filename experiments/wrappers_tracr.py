"""What fine-tuning does to a program that we wrote ourselves (arXiv 2311.12786, the Tracr half).

    python -m experiments.wrappers tracr                       the demo: the Counter, a grid of fine-tunings
    python -m experiments.wrappers tracr --preset small        both programs, the paper's rates and correlations

A RASP program is compiled into a transformer (`synthetic.compiler`), so the capability is there and we know where: the
Counter counts the letter a, the Max-identifier finds the letter of one rank. Fine-tuning asks for another operand, b or
another rank. In a share C_Tr of its strings the new answer is the old one plus q, so that a wrapper around the old
capability would do. Then we look: accuracy for both operands where the tie holds (C_Te = 1) and where it never does
(C_Te = 0), attention, linear probes, pruning of single weights, and reverse fine-tuning beside models that never had
the capability.

Read from top to bottom: settings, what is trained, the grids, pruning, probes, claims, tables, figures. Choices that
the paper leaves open are ours and labelled so in the help. Letters beside those of `bert6_jax` and
`synthetic.operands`: S seeds, R rates, C correlations, G members of a grid, X moments at which they are looked at, J
members that are pruned or probed, P probed labels.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bert6_jax import interventions, metrics, parallel, train, transformer
from bert6_jax.errors import InputError
from bert6_jax.objectives import cross_entropy
from experiments.harness import claims, cli, figures, report
from experiments.harness.claims import Claim, proportion
from experiments.harness.cli import option
from experiments.harness.run import Run
from synthetic import compiler, operands, rasp
from synthetic.compiler import Compiled

PAPER = "2311.12786"
PROGRAMS = ("counter", "max_identifier")
PARTS = ("reverse", "prune", "probe")
READ = 2  # where the answer is read: index 1 of the program, after BOS
LARGE, MIDDLE, SMALL, VERY_SMALL = 1e-1, 1e-2, 1e-3, 1e-4  # the paper's names for its rates
KEYS = ("BOS", "old operand", "new operand", "other letters")  # groups of keys that attention is summed over
OLD, NEW = 0, 1  # the operand of an accuracy
UNTIED, TIED = 0, 1  # C_Te
BLOCK = {"counter": 1, "max_identifier": 2}  # whose attention reads the operand

# what a member's key is folded with, one number a purpose
NOISE, RANDOM, ROWS, CONTROL, TEST, SCORE, PROBE, LOOK = range(8)


@dataclass(frozen=True)
class TracrConfig:
    """Settings of the study; those that the paper does not state are ours."""

    programs: tuple[str, ...] = option(PROGRAMS, "programs", "model", choices=PROGRAMS)
    length: int = option(20, "letters of a string of the Counter (paper: about 45)", "model", min=2)
    letters: int = option(9, "letters of its alphabet", "model", min=3, max=26)
    max_length: int = option(10, "letters of a string of the Max-identifier, at most", "model", min=2)
    sharpness: float = option(100.0, "beta: score of a selected key", "model", min=1.0)
    exactness: float | None = option(
        100.0, "Lambda: slope of steps; none: exact for every count (ours: 100 is right up to 9)", "model", min=1.0
    )
    noise: float = option(1e-4, "standard deviation of the noise on all weights (paper: N(0, 0.001))", "model", min=0.0)

    q: int = option(1, "Counter: new minus old answer of a tied string (ours)", "task")
    independent: str = option("conditional", "Counter, untied strings: draw b again, or move it by one (nudged); ours",
                              "task", choices=operands.INDEPENDENT)  # fmt: skip
    rank_old: int = option(4, "Max-identifier: smaller letters than the old answer", "task", min=0)
    rank_new: int = option(6, "the same for the new answer (one of the paper's variants)", "task", min=0)
    max_q: int = option(3, "Max-identifier: new minus old answer of a tied string", "task")

    rates: tuple[float, ...] = option((1e-1, 1e-2, 1e-3, 1e-4), "learning rates, an axis", "fine-tuning", min=0.0)
    correlations: tuple[float, ...] = option(
        (0.0, 0.2, 0.5, 0.6, 0.8, 0.9, 1.0), "C_Tr: share of tied strings, an axis", "fine-tuning", min=0.0, max=1.0
    )
    steps: int = option(4_000, "steps (paper: 10,000)", "fine-tuning", min=20)
    batch: int = option(96, "strings of a step", "fine-tuning", min=1)
    momentum: float = option(0.9, "momentum of SGD (ours)", "fine-tuning", min=0.0, max=0.999)
    clip: float = option(1.0, "largest global norm of a gradient (ours; without it large rates diverge)",
                         "fine-tuning", min=0.0)  # fmt: skip
    warmup: float = option(0.2, "share of the steps in which the rate rises", "fine-tuning", min=0.0, max=1.0)
    final: float = option(0.01, "share of the rate at the end of the cosine", "fine-tuning", min=0.0, max=1.0)
    seeds: int = option(3, "seeds: noise, random starts, order of strings", "fine-tuning", min=1)
    seed: int = option(0, "the first of them", "fine-tuning", min=0)
    test_rows: int = option(2_000, "test strings for each C_Te", "fine-tuning", min=10)

    parts: tuple[str, ...] = option(PARTS, "what is done with the fine-tuned models", "afterwards", choices=PARTS)
    after_rates: tuple[float, ...] = option((1e-1, 1e-2, 1e-3), "their rates", "afterwards", min=0.0)
    after_correlations: tuple[float, ...] = option((0.0, 1.0), "their C_Tr", "afterwards", min=0.0, max=1.0)
    reverse_rates: tuple[float, ...] = option((1e-2, 1e-3, 1e-4), "rates of reverse fine-tuning", "afterwards", min=0.0)
    reverse_steps: int = option(4_000, "its steps (paper: up to 10,000)", "afterwards", min=20)
    revived: float = option(0.9, "accuracy for the old operand that counts as revived (ours)", "afterwards", max=1.0)
    scratch_std: float = option(0.1, "standard deviation of a random start (ours)", "afterwards", min=0.0)
    pruned: int = option(20, "K: weights that are pruned, one at a time and cumulatively", "afterwards", min=1)
    prune_rows: int = option(2_000, "strings that score the weights (ours)", "afterwards", min=10)
    probe_rows: int = option(4_000, "strings that train the probes (ours)", "afterwards", min=10)
    probe_steps: int = option(1_000, "steps of AdamW on the probes (paper: 4,000)", "afterwards", min=20)
    probe_rate: float = option(1e-2, "their rate (paper: 1e-3)", "afterwards", min=0.0)

    def __post_init__(self):
        for name in ("programs", "rates", "correlations"):
            if not getattr(self, name):
                raise InputError(f"--{name} is empty; give at least one value")
        for name in (
            "programs",
            "rates",
            "correlations",
            "parts",
            "after_rates",
            "after_correlations",
            "reverse_rates",
        ):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise InputError(
                    f"--{name.replace('_', '-')} {','.join(map(str, given))} names a value twice; drop one"
                )
        for name in ("steps", "reverse_steps", "probe_steps"):
            if getattr(self, name) % CHUNK:
                raise InputError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} is no multiple of {CHUNK}; make it one"
                )
        if self.parts:
            for after, of in (("after_rates", "rates"), ("after_correlations", "correlations")):
                extra = [value for value in getattr(self, after) if value not in getattr(self, of)]
                if extra or not getattr(self, after):
                    what = f"{extra[0]:g} is none of --{of}" if extra else "is empty"
                    raise InputError(
                        f"--{after.replace('_', '-')} {what}; models come from the grid: choose among its values, or "
                        "give --parts empty"
                    )
        if "reverse" in self.parts and not self.reverse_rates:
            raise InputError("--reverse-rates is empty; give at least one value, or leave reverse out of --parts")
        if "counter" in self.programs:
            operands.counter_tables(self.length, self.letters, self.q, self.independent)
        if "max_identifier" in self.programs:
            operands.max_tables(self.max_length, max_sizes(self), self.rank_old, self.rank_new, self.max_q)

    @property
    def seed_list(self) -> list[int]:
        return [self.seed + s for s in range(self.seeds)]


CHUNK = 20  # steps that a member takes before the next one's turn


def max_sizes(cfg: TracrConfig) -> tuple[int, ...]:
    """Strings of the Max-identifier are full or one letter short (paper: 9 to 10 letters)."""
    return (cfg.max_length - 1, cfg.max_length)


PRESETS = {
    "demo": TracrConfig(
        programs=("counter",), length=12, rates=(1e-1, 1e-2, 1e-3), correlations=(0.0, 0.5, 1.0), steps=1_000, seeds=3,
        test_rows=500, after_rates=(1e-1, 1e-2, 1e-3), after_correlations=(1.0,), reverse_rates=(1e-2, 1e-4),
        reverse_steps=1_000, prune_rows=500, probe_rows=2_000, probe_steps=400,
    ),
    "small": TracrConfig(),
    "paper": TracrConfig(length=45, exactness=10_000.0, noise=1e-6, steps=10_000, reverse_steps=10_000,
                         probe_steps=4_000, probe_rate=1e-3, seeds=5),
}  # fmt: skip


# --- programs and strings --------------------------------------------------------------------------------------------


class World(NamedTuple):
    """A program: compiled, the same for the new operand, and its strings."""

    name: str
    old: Compiled
    new: Compiled
    tables: operands.Tables
    output_A: np.ndarray  # int32: which logit is an answer

    @property
    def cfg(self):
        return self.old.layout.config


def make_world(cfg: TracrConfig, name: str) -> World:
    options = {"exactness": cfg.exactness, "sharpness": cfg.sharpness}
    if name == "counter":
        vocab, length = rasp_letters(cfg.letters), cfg.length
        programs = [rasp.counter(vocab[0]), rasp.counter(vocab[1])]
        tables = operands.counter_tables(length, cfg.letters, cfg.q, cfg.independent)
        answers = range(length + 1)
    else:
        vocab, length = rasp_letters(operands.ALPHABET), cfg.max_length
        programs = [rasp.max_identifier(cfg.rank_old), rasp.max_identifier(cfg.rank_new)]
        tables = operands.max_tables(length, max_sizes(cfg), cfg.rank_old, cfg.rank_new, cfg.max_q)
        answers = vocab
    old, new = (compiler.compile_program(program, vocab, length, **options) for program in programs)
    output_A = np.array([old.layout.values.index(answer) for answer in answers], np.int32)
    return World(name, old, new, tables, output_A)


def rasp_letters(count: int) -> tuple[str, ...]:
    return tuple(chr(ord("a") + i) for i in range(count))


def seeded(seed: int, *purposes) -> jax.Array:
    key = jax.random.key(seed)
    for purpose in purposes:
        key = jax.random.fold_in(key, purpose)
    return key


class Strings(NamedTuple):
    """Rows with the logits' numbers of both answers."""

    ids_BT: jax.Array
    segment_BT: jax.Array
    answer_B2: jax.Array  # old, new


def sample(world: World, key, correlation, count: int) -> Strings:
    rows = operands.sample(key, world.tables, correlation, count)
    output_A = jnp.asarray(world.output_A)
    return Strings(rows.ids_BT, rows.segment_BT, jnp.stack([output_A[rows.pt_B], output_A[rows.ft_B]], axis=1))


def logits(params, strings: Strings, world: World) -> jax.Array:
    """What the model says where the answer is read, [B, A]."""
    layout = world.old.layout
    x_BD = transformer.stream_at(params, strings.ids_BT, layout.config, READ, segment_BT=strings.segment_BT)
    return x_BD[:, layout.output[0] : layout.output[1]]


def hits(params, strings: Strings, world: World) -> jax.Array:
    """Accuracy for the old and the new operand, [2]."""
    said_B = logits(params, strings, world).argmax(-1).astype(jnp.int32)
    return (said_B[:, None] == strings.answer_B2).astype(jnp.float32).mean(0)


def test_strings(cfg: TracrConfig, world: World) -> list[Strings]:
    """Untied and tied, the same for every member."""
    return [sample(world, seeded(cfg.seed, TEST), np.float32(c), cfg.test_rows) for c in (0.0, 1.0)]


# --- what is trained -------------------------------------------------------------------------------------------------


class Tuning(NamedTuple):
    """One fine-tuning. `start`: `old` or `new` (compiled for that operand), `random`, or another tuning's end."""

    start: Any
    operand: int  # whose answers are the labels
    rate: float
    correlation: float
    seed: int


def grid(cfg: TracrConfig) -> list[Tuning]:
    """[S][R][C], flat."""
    return [Tuning("old", NEW, rate, c, seed)
            for seed in cfg.seed_list for rate in cfg.rates for c in cfg.correlations]  # fmt: skip


def kept(cfg: TracrConfig) -> list[Tuning]:
    """Members of the grid that are looked at afterwards, [S][R][C], flat."""
    return [t for t in grid(cfg) if t.rate in cfg.after_rates and t.correlation in cfg.after_correlations]


def reversals(cfg: TracrConfig) -> list[Tuning]:
    """Back to the old operand; and two that never had it: compiled for the new one (Scr.+FT), and random (Scr.)."""
    starts = [(t, t.seed) for t in kept(cfg)] + [(s, seed) for s in ("new", "random") for seed in cfg.seed_list]
    return [Tuning(start, OLD, rate, 0.0, seed) for start, seed in starts for rate in cfg.reverse_rates]


def noisy(cfg: TracrConfig, params, key):
    """All weights with a little noise, so that no gradient is zero (section on Tracr)."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    noise = np.float32(cfg.noise)
    return structure.unflatten([x + noise * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def fresh(cfg: TracrConfig, world: World, start: str, seed: int):
    """A model before fine-tuning."""
    if start == "random":
        return transformer.init(seeded(seed, RANDOM), dataclasses.replace(world.cfg, init_std=cfg.scratch_std))
    return noisy(cfg, {"old": world.old, "new": world.new}[start].params, seeded(seed, NOISE))


def stack(trees: Sequence[Any]):
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


def take(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


class Tuned(NamedTuple):
    """A grid of fine-tuned models."""

    tunings: list[Tuning]
    params: Callable[[], Any]  # [G, ...], read from the checkpoint when first asked for
    found: dict[str, np.ndarray]  # [G, ...]

    def of(self, tuning: Tuning) -> dict[str, np.ndarray]:
        return {name: values[self.tunings.index(tuning)] for name, values in self.found.items()}


def looker(cfg: TracrConfig, world: World, mesh):
    """`params [G, ...] -> {accuracy [G, C_Te, operand], said [G, C_Te, A], attention [G, L, N, keys]}`."""
    tests = test_strings(cfg, world)
    few = take(tests[UNTIED], np.s_[: min(256, cfg.test_rows)])
    A = len(world.old.layout.values)

    def look(shared, params):
        tests, few = shared
        said = [logits(params, strings, world).argmax(-1).astype(jnp.int32) for strings in tests]
        right = [(s[:, None] == t.answer_B2).astype(jnp.float32).mean(0) for s, t in zip(said, tests, strict=True)]
        counts = [(s[:, None] == jnp.arange(A)[None]).astype(jnp.float32).mean(0) for s in said]
        _, acts = transformer.forward(params, few.ids_BT, world.cfg, segment_BT=few.segment_BT)
        query_BQ = jnp.full((len(few.ids_BT), 1), READ, jnp.int32)
        mass = metrics.attention_mass(acts["pattern"], query_BQ, key_groups(world, few), len(KEYS))
        share_LNK = mass.mass_LNG / mass.queries.astype(jnp.float32)
        return {"accuracy": jnp.stack(right), "said": jnp.stack(counts), "attention": share_LNK}

    run = jax.jit(parallel.over_members(look, mesh))
    return lambda params_G: jax.device_get(run((tests, few), params_G))


def key_groups(world: World, strings: Strings) -> jax.Array:
    """Numbers of `KEYS`, -1 for pads: the letters counted, or those of the wanted ranks."""
    layout, ids_BT = world.old.layout, strings.ids_BT
    if world.name == "counter":
        old, new = ids_BT == 0, ids_BT == 1
    else:  # the answer is a letter of the string
        letter_A = jnp.asarray(np.argsort(world.output_A).astype(np.int32))
        old, new = (ids_BT == letter_A[strings.answer_B2[:, i]][:, None] for i in (OLD, NEW))
    group_BT = jnp.where(old, 1, jnp.where(new, 2, 3))
    group_BT = jnp.where(ids_BT == layout.bos_id, 0, group_BT)
    return jnp.where(strings.segment_BT == 0, -1, group_BT)


def make_loss(cfg: TracrConfig, world: World) -> train.MemberLoss:
    """Cross-entropy of the logits where the answer is read; C_Tr and the operand are data."""

    def loss(params, frozen, key, data):
        strings = sample(world, key, data["correlation"], cfg.batch)
        said_BA = logits(params, strings, world)
        target_B = jnp.where(data["operand"] == OLD, strings.answer_B2[:, OLD], strings.answer_B2[:, NEW])
        right_B = said_BA.argmax(-1).astype(jnp.int32) == target_B
        return cross_entropy(said_BA, target_B).mean(), {"accuracy": right_B.astype(jnp.float32).mean()}

    return loss


def optimizer(cfg: TracrConfig) -> optax.GradientTransformation:
    clip = [optax.clip_by_global_norm(cfg.clip)] if cfg.clip else []
    return optax.chain(*clip, optax.trace(cfg.momentum))


def grid_inputs(cfg: TracrConfig, tunings: Sequence[Tuning], steps: int) -> dict[str, Any]:
    """What `train.grid_step` reads beside the models."""

    def rates(rate):
        schedule = train.OptimizerConfig(lr=rate, schedule="warmup_cosine", warmup=cfg.warmup, final=cfg.final)
        return jax.vmap(lambda step: train.learning_rate(schedule, step, steps, steps))(jnp.arange(steps))

    by_rate = {rate: np.asarray(rates(rate)) for rate in {t.rate for t in tunings}}
    seeds = [int(jax.random.bits(seeded(t.seed, ROWS))) for t in tunings]
    return {
        "rate": np.stack([by_rate[t.rate] for t in tunings]),
        "seed": np.array(seeds, np.uint32),
        "frozen": {},
        "base": np.zeros(len(tunings), np.int32),
        "data": {
            "correlation": np.array([t.correlation for t in tunings], np.float32),
            "operand": np.array([t.operand for t in tunings], np.int32),
        },
    }


def tune(run: Run, cfg: TracrConfig, world: World, name: str, tunings: list[Tuning], steps: int, mesh,
         parents: Tuned | None = None) -> Tuned:  # fmt: skip
    """Fine-tune a grid in one compiled program; its models stay in checkpoints/NAME, one stacked tree."""
    path, held = run.out / "checkpoints" / name, []

    def stage() -> dict:
        first = parents and parents.params()
        starts = stack([
            fresh(cfg, world, t.start, t.seed) if isinstance(t.start, str)
            else take(first, parents.tunings.index(t.start)) for t in tunings
        ])  # fmt: skip
        look, looks = looker(cfg, world, mesh), {}

        def watch(number, params_G):
            looks[number * CHUNK] = look(params_G)

        step = train.grid_step(make_loss(cfg, world), optimizer(cfg), CHUNK, mesh)
        params, curves = train.fit_grid(
            step,
            train.init_grid(starts, optimizer(cfg), jax.random.key(0)),
            grid_inputs(cfg, tunings, steps),
            train.FitConfig(steps // CHUNK, min(5, steps // CHUNK), snapshots=train.log_spaced(steps // CHUNK)),
            mesh,
            on_metrics=lambda number, means: run.log(name, number * CHUNK, members=len(tunings), **means),
            on_snapshot=watch,
            label=name,
            quiet=run.quiet,
        )
        if run.primary:
            shutil.rmtree(path, ignore_errors=True)  # of a run that was killed before the stage was kept
            members = [t._asdict() | {"start": t.start if isinstance(t.start, str) else t.start._asdict()}
                       for t in tunings]  # fmt: skip
            compiler.save(path, Compiled(params, world.old.layout), step=steps, extra={"members": members})
        held.append(params)
        moments = sorted(looks)
        return {
            "step": np.tile(moments, (len(tunings), 1)),
            **{key: np.stack([looks[m][key] for m in moments], axis=1) for key in ("accuracy", "said", "attention")},
            **{f"curve_{key}": values.T for key, values in curves.items()},
        }

    found = run.stage(name, stage)
    bad = [t for t, finite in zip(tunings, found["curve_finite"][:, -1], strict=True) if not finite]
    if bad:
        print(f"warning: {len(bad)} of {len(tunings)} fine-tunings diverged and stopped there, the first at rate "
              f"{bad[0].rate:g}; lower it or lower --clip", file=sys.stderr)  # fmt: skip

    def params():
        if not held:
            held.append(compiler.load(path).params)
        return held[0]

    return Tuned(tunings, params, found)


# --- afterwards: pruning and probes ----------------------------------------------------------------------------------


def prune(run: Run, cfg: TracrConfig, world: World, tuned: Tuned, mesh) -> dict[str, np.ndarray]:
    """Zero the weights that stand in the old operand's way, `[J, ...]` for the members `kept`.

    Accuracies [J, how, K + 1, set, operand]: how: by score cumulatively and one at a time, random weights in both ways,
    weights of the same magnitudes one at a time; set: the strings that scored, and untied test strings.
    """

    def stage() -> dict:
        members = kept(cfg)
        score = sample(world, seeded(cfg.seed, SCORE), np.float32(0.0), cfg.prune_rows)
        shared = (score, test_strings(cfg, world)[UNTIED])

        def one(shared, member):
            params, key = member

            def loss(params):
                return cross_entropy(logits(params, shared[0], world), shared[0].answer_B2[:, OLD]).mean()

            def evaluate(params):
                return jnp.stack([hits(params, strings, world) for strings in shared])

            chosen = interventions.ranked(interventions.first_order_scores(loss, params), cfg.pruned)
            keys = jax.random.split(key)
            other = interventions.random_ranked(keys[0], params, cfg.pruned)
            matched = interventions.matched_ranked(keys[1], params, chosen)
            ways = ((chosen, "cumulative"), (chosen, "single"), (other, "cumulative"), (other, "single"),
                    (matched, "single"))  # fmt: skip
            curves = [interventions.sweep(evaluate, params, ranked, how) for ranked, how in ways]
            return {"accuracy": jnp.stack(curves), "index": chosen.index_K, "score": chosen.score_K}

        index = np.array([tuned.tunings.index(t) for t in members])
        keys = jnp.stack([seeded(t.seed, CONTROL, i) for i, t in enumerate(members)])
        return jax.device_get(jax.jit(parallel.over_members(one, mesh))(shared, (take(tuned.params(), index), keys)))

    return run.stage(f"prune-{world.name}", stage)


WAYS = ("scored, cumulative", "scored, one", "random, cumulative", "random, one", "same magnitude, one")


def weight_names(cfg: TracrConfig, world: World, index_K: np.ndarray) -> list[str]:
    like = interventions.ranked(jax.tree.map(np.zeros_like, world.old.params), cfg.pruned)
    return interventions.names(dataclasses.replace(like, index_K=index_K))


def probed(cfg: TracrConfig) -> list[Any]:
    """Whom the probes read: the compiled models, untrained ones (the control), and the members `kept`."""
    return [(start, seed) for start in ("old", "random") for seed in cfg.seed_list] + kept(cfg)


def probe(run: Run, cfg: TracrConfig, world: World, tuned: Tuned, mesh) -> dict[str, np.ndarray]:
    """Linear probes of both answers at every depth, where the answer is read: accuracy [J, M, operand] on untied test
    strings. A bank: the probes of a model are trained together and touch only themselves."""

    def stage() -> dict:
        members = probed(cfg)
        models = stack([
            take(tuned.params(), tuned.tunings.index(m)) if isinstance(m, Tuning) else fresh(cfg, world, *m)
            for m in members
        ])  # fmt: skip
        M, D, A = world.cfg.depths, world.cfg.width, len(world.old.layout.values)
        train_set = sample(world, seeded(cfg.seed, PROBE), np.float32(0.0), cfg.probe_rows)
        test_set = test_strings(cfg, world)[UNTIED]

        def features(strings, params):
            _, acts = transformer.forward(params, strings.ids_BT, world.cfg, segment_BT=strings.segment_BT)
            return acts["resid"][:, :, READ]

        read = jax.jit(parallel.over_members(features, mesh))
        x_JMND = read(train_set, models)

        def said(probes, x_MBD):
            return jnp.einsum("mbd,mpda->bmpa", x_MBD, probes["kernel"]) + probes["bias"][None]

        def loss(probes, frozen, key, data):
            row_B = jax.random.randint(key, (cfg.batch,), 0, cfg.probe_rows)
            target_BMP = jnp.broadcast_to(data["answer"][row_B][:, None], (cfg.batch, M, 2))
            # a sum over probes of their means, so that each has its own gradient
            return cross_entropy(said(probes, data["x"][:, row_B]), target_BMP).mean(0).sum(), {}

        steps, J = cfg.probe_steps, len(members)
        schedule = train.OptimizerConfig(lr=cfg.probe_rate, schedule="step")
        rate = jax.vmap(lambda s: train.learning_rate(schedule, s, steps, steps))(jnp.arange(steps))
        inputs = {
            "rate": np.tile(rate, (J, 1)), "seed": np.full(J, cfg.seed, np.uint32), "frozen": {},
            "base": np.zeros(J, np.int32),
            "data": {"x": x_JMND, "answer": np.tile(train_set.answer_B2, (J, 1, 1))},
        }  # fmt: skip
        start = {"kernel": np.zeros((J, M, 2, D, A), np.float32), "bias": np.zeros((J, M, 2, A), np.float32)}
        adam = optax.scale_by_adam()
        probes, _ = train.fit_grid(
            train.grid_step(loss, adam, CHUNK, mesh),
            train.init_grid(start, adam, jax.random.key(0)),
            inputs,
            train.FitConfig(steps // CHUNK, min(5, steps // CHUNK)),
            mesh,
            label=f"probe-{world.name}",
            quiet=run.quiet,
        )

        def right(strings, member):
            probes, params = member
            said_BMP = said(probes, features(strings, params)).argmax(-1).astype(jnp.int32)
            return (said_BMP == strings.answer_B2[:, None]).astype(jnp.float32).mean(0)

        return {"accuracy": jax.device_get(jax.jit(parallel.over_members(right, mesh))(test_set, (probes, models)))}

    return run.stage(f"probe-{world.name}", stage)


def exact(run: Run, cfg: TracrConfig, world: World, count: int = 10_000) -> dict[str, np.ndarray]:
    """Share of random strings that the compiled model answers as the program does, without and with noise, [1 + S]."""

    def stage() -> dict:
        if run.primary:
            path = run.out / "checkpoints" / world.name
            shutil.rmtree(path, ignore_errors=True)
            compiler.save(path, world.old)
        # half tied, half not: every pair of answers that may come
        strings = sample(world, seeded(cfg.seed, LOOK), np.float32(0.5), count)
        models = [world.old.params] + [fresh(cfg, world, "old", seed) for seed in cfg.seed_list]
        right = jax.jit(lambda params: jax.lax.map(lambda one: hits(one, strings, world)[OLD], params))
        return {"right": np.asarray(right(stack(models)))}

    return run.stage(f"compiled-{world.name}", stage)


# --- the study -------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What was found for one program."""

    world: World
    exact: np.ndarray  # [1 + S]: without noise, then with
    tuned: Tuned
    back: Tuned | None
    pruned: dict[str, np.ndarray] | None
    probes: np.ndarray | None  # [J, M, operand]


def study(run: Run, cfg: TracrConfig, name: str, mesh) -> Found:
    world = make_world(cfg, name)
    right = exact(run, cfg, world)["right"]
    if right[0] < 0.99:
        raise InputError(
            f"--exactness {cfg.exactness:g} is too small: the compiled {name} answers {right[0]:.0%} of its strings; "
            "give none for what every count needs"
        )
    if right[1:].min() < 0.99:
        raise InputError(
            f"--noise {cfg.noise:g} destroys the compiled {name}: {right[1:].min():.0%} of its answers are left; lower "
            "it, or lower --exactness, which multiplies it"
        )
    tuned = tune(run, cfg, world, f"tune-{name}", grid(cfg), cfg.steps, mesh)
    back = pruned = probes = None
    if "reverse" in cfg.parts:
        back = tune(run, cfg, world, f"reverse-{name}", reversals(cfg), cfg.reverse_steps, mesh, tuned)
    if "prune" in cfg.parts:
        pruned = prune(run, cfg, world, tuned, mesh)
    if "probe" in cfg.parts:
        probes = probe(run, cfg, world, tuned, mesh)["accuracy"]
    return Found(world, right, tuned, back, pruned, probes)


def accuracies(cfg: TracrConfig, f: Found, rate: float, correlation: float) -> np.ndarray:
    """At the end of fine-tuning, [S, C_Te, operand]."""
    return np.stack([f.tuned.of(Tuning("old", NEW, rate, correlation, seed))["accuracy"][-1] for seed in cfg.seed_list])


def attention(cfg: TracrConfig, f: Found, rate: float, correlation: float, block: int) -> np.ndarray:
    """Attention of a block on every group of keys, a mean over heads, [S, X, keys]."""
    runs = (f.tuned.of(Tuning("old", NEW, rate, correlation, seed)) for seed in cfg.seed_list)
    return np.stack([found["attention"][:, block].mean(1) for found in runs])


def revival(cfg: TracrConfig, f: Found, start, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Steps [X] and accuracy for the old operand on untied strings [S, X] in reverse fine-tuning from `start`: a start
    of `fresh`, or (rate, C_Tr) of the grid."""
    runs = []
    for seed in cfg.seed_list:
        first = start if isinstance(start, str) else Tuning("old", NEW, *start, seed)
        runs.append(f.back.of(Tuning(first, OLD, rate, 0.0, seed)))
    return runs[0]["step"], np.stack([found["accuracy"][:, UNTIED, OLD] for found in runs])


def steps_to(cfg: TracrConfig, steps_X: np.ndarray, right_SX: np.ndarray) -> np.ndarray:
    """The first look at which the old capability is back, [S]; infinite where it never is."""
    there_SX = right_SX >= cfg.revived
    return np.where(there_SX.any(1), steps_X[there_SX.argmax(1)], np.inf)


def pruned_of(cfg: TracrConfig, f: Found, rate: float, correlation: float) -> np.ndarray:
    """Accuracies of the pruning sweeps, [S, how, K + 1, set, operand]."""
    members = kept(cfg)
    return np.stack([f.pruned["accuracy"][members.index(Tuning("old", NEW, rate, correlation, seed))]
                     for seed in cfg.seed_list])  # fmt: skip


def lift(sweep_SKZO: np.ndarray) -> np.ndarray:
    """What the best single weight gives on test strings, [S]: chosen on the strings that scored, among the K."""
    best_S = sweep_SKZO[:, 1:, 0, OLD].argmax(1) + 1
    test_SK = sweep_SKZO[:, :, 1, OLD]
    return np.take_along_axis(test_SK, best_S[:, None], 1)[:, 0] - test_SK[:, 0]


def probes_of(cfg: TracrConfig, f: Found, *who) -> np.ndarray:
    """Accuracy of the probes, [S, M, operand]: of ("old",), ("random",), or (rate, C_Tr) of the grid."""
    members = probed(cfg)
    keys = [(*who, seed) if isinstance(who[0], str) else Tuning("old", NEW, *who, seed) for seed in cfg.seed_list]
    return np.stack([f.probes[members.index(key)] for key in keys])


# --- claims: rules were written before the runs that RESULTS.md reports ----------------------------------------------


def judge(cfg: TracrConfig, f: Found) -> list[Claim]:
    """The paper's claims about compiled models, for one program."""
    listed: list[Claim] = []
    name = f.world.name

    def claim(short, where, statement, expected, needs, outcome):
        """`needs`: (rate, C_Tr) that have to be in the grid; `outcome` computes only if they are."""
        missing = [(r, c) for r, c in needs if r not in cfg.rates or c not in cfg.correlations]
        if missing:
            r, c = missing[0]
            out = claims.not_tested(f"rate {r:g} with C_Tr {c:g} is not in this grid")
        else:
            out = outcome()
        listed.append(Claim(f"{name}_{short}", f"arXiv {PAPER}, {where}", f"{name}: {statement}", expected, *out))

    def right(rate, c, tie, operand):
        return accuracies(cfg, f, rate, c)[:, tie, operand]

    claim("exact", "Tracr set-up", "The compiled model answers as its program does, noise included", 1.0, [],
          lambda: claims.greater_than([f.exact.min()], 0.99))  # fmt: skip
    small, large = (SMALL, 1.0), (LARGE, 0.0)
    claim("wrapper_fits", "Table 3", "A small rate on tied strings alone fits them: accuracy for the new operand, "
          "C_Te = 1", "94.3 % (Counter)", [small],
          lambda: claims.greater_than(right(*small, TIED, NEW), 0.9))  # fmt: skip
    claim("wrapper_fails", "Table 3", "and fails where the tie is broken: the same at C_Te = 0", "2.2 % (Counter)",
          [small], lambda: claims.less_than(right(*small, UNTIED, NEW), 0.1))  # fmt: skip
    for tie, word in ((TIED, "tied"), (UNTIED, "untied")):
        claim(f"learnt_{word}", "Table 3", "A large rate on untied strings alone learns the new operand: accuracy, "
              f"C_Te = {tie}", "100 % (Counter)", [large],
              lambda tie=tie: claims.greater_than(right(*large, tie, NEW), 0.95))  # fmt: skip
    for rate in [r for r in (LARGE, MIDDLE, SMALL) if r in cfg.rates]:
        listed.append(
            Claim(
                f"{name}_tie_misleads_{rate:g}",
                f"arXiv {PAPER}, Table 3",
                f"{name}: The more strings are tied, the less is learnt where they are not: error for the new operand "
                f"at C_Te = 0 along C_Tr, rate {rate:g}",
                "rises",
                *(claims.increasing(1.0 - np.stack([right(rate, c, UNTIED, NEW) for c in sorted(cfg.correlations)], 1),
                                    saturates=0.05)
                  if len(cfg.correlations) > 1 else claims.not_tested("one C_Tr only")),
            )
        )  # fmt: skip

    def looks(rate, c):
        mass = attention(cfg, f, rate, c, BLOCK[name])[:, -1]
        return mass[:, 1] - mass[:, 2]

    def looks_anywhere(rate, c):
        mass = np.stack([attention(cfg, f, rate, c, block)[:, -1] for block in range(f.world.cfg.blocks)])
        return mass[:, :, 1].max(0) - mass[:, :, 2].max(0)

    for rate in (MIDDLE, SMALL):
        claim(f"attention_stays_{rate:g}", "attention maps", "After tied strings alone attention is still on the old "
              f"operand: its mass minus the new one's, rate {rate:g}", "above 0", [(rate, 1.0)],
              lambda rate=rate: claims.greater_than(looks(rate, 1.0), 0.0))  # fmt: skip
    claim("attention_moves", "attention maps", "Only untied strings and a large rate move it to the new operand: the "
          "same difference", "below 0", [large], lambda: claims.less_than(looks(*large), 0.0))  # fmt: skip
    claim("attention_moves_anywhere", "attention maps", "and so in whichever block looks most at each operand (ours)",
          "below 0", [large], lambda: claims.less_than(looks_anywhere(*large), 0.0))  # fmt: skip
    if f.back is not None:
        judge_back(cfg, f, claim)
    if f.pruned is not None:
        judge_pruning(cfg, f, claim)
    if f.probes is not None:
        judge_probes(cfg, f, claim)
    return listed


def judge_back(cfg: TracrConfig, f: Found, claim) -> None:
    def end(start, rate):
        return revival(cfg, f, start, rate)[1][:, -1]

    def asked(start, rate):
        there = start[0] in cfg.after_rates and start[1] in cfg.after_correlations and rate in cfg.reverse_rates
        return (
            there,
            f"no reverse fine-tuning at rate {rate:g} after rate {start[0]:g} and C_Tr {start[1]:g} in this run",
        )

    def back(short, statement, expected, start, rate, outcome):
        there, reason = asked(start, rate)
        claim(short, "reverse fine-tuning", statement, expected, [], outcome if there else
              lambda: claims.not_tested(reason))  # fmt: skip

    middle, large = (MIDDLE, 1.0), (LARGE, 1.0)
    back("revived", "After fine-tuning at the middle rate, even a very small one revives the old operand: accuracy at "
         "C_Te = 0", "near 1", middle, VERY_SMALL,
         lambda: claims.greater_than(end(middle, VERY_SMALL), cfg.revived))  # fmt: skip
    back("not_revived", "After fine-tuning at the large rate it does not: accuracy at C_Te = 0", "low", large,
         VERY_SMALL, lambda: claims.less_than(end(large, VERY_SMALL), 0.5))  # fmt: skip

    def sooner(rate, start):
        """log2 of the steps that a model without the capability needs over those of reverse fine-tuning."""
        scratch, reverse = (steps_to(cfg, *revival(cfg, f, s, rate)) for s in ("new", start))
        if np.isinf(reverse).any():
            return claims.not_tested("reverse fine-tuning did not bring the old operand back for every seed", cfg.seeds)
        # where the other never gets there, twice the steps that it had: a lower bound
        scratch = np.where(np.isinf(scratch), 2 * cfg.reverse_steps, scratch)
        return claims.greater_than(np.log2(scratch / np.maximum(reverse, CHUNK)), 0.0)

    for start, word in (((SMALL, 1.0), "small"), (middle, "middle")):
        for rate in cfg.reverse_rates:
            back(f"sooner_{word}_{rate:g}", f"Reverse fine-tuning (rate {rate:g}) after the {word} rate and C_Tr = 1 "
                 f"is sooner at {cfg.revived:.0%} than a model that never had the capability (Scr.+FT): log2 of the "
                 "ratio of steps", "above 0", start, rate,
                 lambda rate=rate, start=start: sooner(rate, start))  # fmt: skip


def judge_pruning(cfg: TracrConfig, f: Found, claim) -> None:
    for rate in cfg.after_rates:
        if 1.0 in cfg.after_correlations:
            sweeps = pruned_of(cfg, f, rate, 1.0)
            gain, random = lift(sweeps[:, 1]), np.maximum(lift(sweeps[:, 3]), lift(sweeps[:, 4]))
            claim(f"pruned_{rate:g}", "pruning", f"After tied strings alone (rate {rate:g}) one pruned weight lifts "
                  "the accuracy for the old operand at C_Te = 0", "by more than 0.6 (Counter)", [],
                  lambda gain=gain: claims.greater_than(gain, 0.6))  # fmt: skip
            claim(f"pruned_control_{rate:g}", "pruning", "and by more than a random weight or one of the same size "
                  f"(the better of both; rate {rate:g})", "above 0", [],
                  lambda gain=gain, random=random: claims.greater_than(gain - random, 0.0))  # fmt: skip
    if 0.0 in cfg.after_correlations and LARGE in cfg.after_rates:
        gain = lift(pruned_of(cfg, f, LARGE, 0.0)[:, 1])
        claim("pruned_learnt", "pruning", "After untied strings and a large rate it does not: the same lift", "small",
              [], lambda: claims.less_than(gain, 0.1))  # fmt: skip


def judge_probes(cfg: TracrConfig, f: Found, claim) -> None:
    for rate in [r for r in cfg.after_rates if 1.0 in cfg.after_correlations]:
        best = probes_of(cfg, f, rate, 1.0)[:, :, OLD].max(1)
        control = probes_of(cfg, f, "random")[:, :, OLD].max(1)
        claim(f"probed_{rate:g}", "probing", f"After tied strings alone (rate {rate:g}) the old answer can be read by "
              "a linear probe: accuracy at the best depth, C_Te = 0", "near 1", [],
              lambda best=best: claims.greater_than(best, 0.9))  # fmt: skip
        claim(f"probed_control_{rate:g}", "probing", f"and better than from an untrained model (rate {rate:g})",
              "above 0", [], lambda best=best, control=control: claims.greater_than(best - control, 0.0))  # fmt: skip


# --- tables ----------------------------------------------------------------------------------------------------------

# Table 3 of the paper, Counter, where our reading has it: (rate, C_Tr) -> per cent at C_Te 1 and 0, (old, new) each
TABLE_3 = {
    **{(LARGE, c): ((0.0, 100.0), (0.0, 100.0)) for c in (0.0, 0.2, 0.5, 0.6, 0.8, 0.9)},
    (LARGE, 1.0): ((0.0, 100.0), (35.8, 0.7)),
    (SMALL, 0.0): ((54.6, 1.2), (25.7, 27.2)),
    (SMALL, 0.2): ((50.2, 15.0), (26.5, 24.3)),
    (SMALL, 0.5): ((7.1, 90.9), (19.8, 2.3)),
    (SMALL, 0.6): ((4.1, 94.2), (11.8, 2.2)),
    (SMALL, 0.8): ((1.3, 98.3), (6.7, 0.7)),
    (SMALL, 0.9): ((1.8, 97.8), (9.2, 0.7)),
    (SMALL, 1.0): ((4.0, 94.3), (10.3, 2.2)),
}


def write_tables(run: Run, cfg: TracrConfig, found: dict[str, Found]) -> None:
    rows = []
    for name, f in found.items():
        c = f.world.cfg
        rows.append({
            "program": name, "letters": c.max_len - 1, "blocks": c.blocks, "heads": c.heads,
            "head_width": c.head_width, "width": c.width, "mlp_width": c.mlp_width,
            "parameters": transformer.num_params(f.world.old.params), "exact": float(f.exact[0]),
            "exact_with_noise": float(f.exact[1:].min()),
        })  # fmt: skip
    run.table(
        "compiled", rows, "The compiled models; exact: share of 10,000 random strings answered as the program does"
    )

    rows = []
    for name, f in found.items():
        for rate in cfg.rates:
            for c in cfg.correlations:
                right = accuracies(cfg, f, rate, c)
                for tie in (TIED, UNTIED):
                    row = {"program": name, "rate": rate, "C_Tr": c, "C_Te": tie, "seeds": cfg.seeds}
                    row |= proportion("old", right[:, tie, OLD]) | proportion("new", right[:, tie, NEW])
                    paper = TABLE_3.get((rate, c)) if name == "counter" else None
                    old, new = paper[0 if tie == TIED else 1] if paper else (None, None)
                    row |= {"paper_old": old and old / 100, "paper_new": new and new / 100}
                    rows.append(row)
    run.table(
        "fine_tuned", rows, "Accuracy for the old and the new operand after fine-tuning, and the paper's (Table 3)"
    )

    rows = []
    for name, f in found.items():
        for tie in (TIED, UNTIED):
            rows.append({"program": name, "C_Te": tie} | operands.base_rates(f.world.tables, float(tie)))
    run.table(
        "base_rates",
        rows,
        "What simple rules score, exactly: same: both answers are equal; offset: new = old + q; constant: the most "
        "frequent answer; ft_from_pt: the best guess of the new answer from the old one, and the reverse",
    )

    rows = []
    for name, f in found.items():
        for t in f.tuned.tunings:
            got = f.tuned.of(t)
            for x, step in enumerate(got["step"]):
                mass = got["attention"][x, BLOCK[name]].mean(0)
                rows.append(
                    {"program": name, "rate": t.rate, "C_Tr": t.correlation, "seed": t.seed, "step": int(step)}
                    | {f"{word}_{tie}": float(got["accuracy"][x, tie, o])
                       for tie in (TIED, UNTIED) for word, o in (("old", OLD), ("new", NEW))}
                    | {f"attention {key}": float(m) for key, m in zip(KEYS, mass, strict=True)}
                )  # fmt: skip
    run.table("curves", rows, "Accuracies at C_Te 1 and 0 and attention where the answer is read, over fine-tuning")

    rows = []
    for name, f in found.items():
        if f.back is None:
            continue
        for start, what in starts(cfg):
            for rate in cfg.reverse_rates:
                steps, right = revival(cfg, f, start, rate)
                first = steps_to(cfg, steps, right)
                row = {"program": name, "start": what, "reverse_rate": rate, "seeds": cfg.seeds}
                row |= proportion("before", right[:, 0]) | proportion("after", right[:, -1])
                row |= {"revived": int(np.isfinite(first).sum()),
                        "steps": None if np.isinf(first).any() else float(np.median(first))}  # fmt: skip
                rows.append(row)
    if rows:
        run.table(
            "reverse",
            rows,
            f"Back-tuned: accuracy for the old operand at C_Te = 0; revived: seeds that reach {cfg.revived:g}; "
            "steps: the median of the first look at which they did, where all do",
        )

    rows = []
    for name, f in found.items():
        if f.pruned is None:
            continue
        for rate in cfg.after_rates:
            for c in cfg.after_correlations:
                sweeps = pruned_of(cfg, f, rate, c)
                row = {"program": name, "rate": rate, "C_Tr": c} | proportion("before", sweeps[:, 0, 0, 1, OLD])
                row |= claims.named("lift", lift(sweeps[:, 1])) | claims.named("lift_random", lift(sweeps[:, 3]))
                row |= claims.named("lift_same_magnitude", lift(sweeps[:, 4]))
                for way in (0, 2):
                    row |= proportion(f"{WAYS[way]}, best of {cfg.pruned}", sweeps[:, way, :, 1, OLD].max(1))
                member = kept(cfg).index(Tuning("old", NEW, rate, c, cfg.seed))
                best = int(f.pruned["accuracy"][member, 1, 1:, 0, OLD].argmax())
                row["best weight, first seed"] = weight_names(cfg, f.world, f.pruned["index"][member])[best]
                rows.append(row)
    if rows:
        run.table(
            "pruned",
            rows,
            "Accuracy for the old operand at C_Te = 0: before, and what zeroing the best single weight adds (chosen on "
            "other strings) among the highest scores, random weights and weights of the same magnitude",
        )

    rows = []
    for name, f in found.items():
        if f.probes is None:
            continue
        for who, what in readers(cfg):
            values = probes_of(cfg, f, *who)
            for depth in range(values.shape[1]):
                row = {"program": name, "model": what, "depth": depth}
                rows.append(row | proportion("old", values[:, depth, OLD]) | proportion("new", values[:, depth, NEW]))
    if rows:
        run.table("probes", rows, "Linear probes of both answers where the answer is read, C_Te = 0, by depth")


def starts(cfg: TracrConfig) -> list[tuple[Any, str]]:
    """Where reverse fine-tuning starts, and what that is called."""
    of = [((r, c), f"rate {r:g}, C_Tr {c:g}") for r in cfg.after_rates for c in cfg.after_correlations]
    return [*of, ("new", "Scr.+FT"), ("random", "Scr.")]


def readers(cfg: TracrConfig) -> list[tuple[tuple, str]]:
    of = [((r, c), f"rate {r:g}, C_Tr {c:g}") for r in cfg.after_rates for c in cfg.after_correlations]
    return [(("old",), "compiled"), (("random",), "untrained"), *of]


# --- figures ---------------------------------------------------------------------------------------------------------


@figures.style()
def draw(run: Run, cfg: TracrConfig, f: Found) -> None:
    name = f.world.name
    rates = sorted(cfg.rates, reverse=True)
    colours = figures.shades(len(rates))

    if len(cfg.correlations) > 1:
        fig, axes = figures.new(2, 2, height=5.4, sharex=True, sharey=True)
        cs = sorted(cfg.correlations)
        for row, (tie, word) in enumerate(((TIED, "tied strings, C_Te = 1"), (UNTIED, "untied strings, C_Te = 0"))):
            rule = operands.base_rates(f.world.tables, float(tie))
            for col, operand in enumerate(("old", "new")):
                ax = axes[row, col]
                for rate, colour in zip(rates, colours, strict=True):
                    right = np.stack([accuracies(cfg, f, rate, c)[:, tie, col] for c in cs], axis=1)
                    figures.seed_band(ax, cs, right, label=f"rate {rate:g}", color=colour)
                ax.axhline(rule["constant_pt" if col == OLD else "constant_ft"], color="#888888", linestyle=":",
                           linewidth=1.2)  # fmt: skip
                ax.set(ylim=(-0.05, 1.05), title=f"{operand} operand, {word}")
                if col == 0:
                    ax.set(ylabel="accuracy")
                if row == 1:
                    ax.set(xlabel="C_Tr, share of tied strings in fine-tuning")
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(rates))
        run.figure(f"{name}_grid", fig, alt=f"{name}: accuracy for both operands by C_Tr and rate",
                   caption=f"{name}. Accuracy after fine-tuning by C_Tr and learning rate. Dotted: the most frequent "
                   "answer. On tied strings the two add up to at most 1: one output is scored against both "
                   "answers.")  # fmt: skip

    shown = [(rate, c) for c in (0.0, 1.0) if c in cfg.correlations for rate in rates][:8]
    fig, axes = figures.new(2, (len(shown) + 1) // 2, height=5.0, sharex=True, sharey=True, squeeze=False)
    for ax, (rate, c) in zip(axes.reshape(-1), shown, strict=False):
        mass = attention(cfg, f, rate, c, BLOCK[name])
        steps = f.tuned.of(Tuning("old", NEW, rate, c, cfg.seed))["step"]
        for k, key in enumerate(KEYS):
            figures.seed_band(ax, np.maximum(steps, CHUNK / 2), mass[:, :, k], label=key, marker="",
                              color=("#999999", *figures.PALETTE)[k])  # fmt: skip
        ax.set(xscale="log", ylim=(-0.05, 1.05), title=f"rate {rate:g}, C_Tr = {c:g}")
        ax.title.set_fontsize(9)
    for ax in axes[:, 0]:
        ax.set(ylabel="attention")
    for ax in axes[-1]:
        ax.set(xlabel="step")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(KEYS))
    run.figure(
        f"{name}_attention",
        fig,
        alt=f"{name}: attention to each operand over fine-tuning",
        caption=f"{name}. Where the answer is read, block {BLOCK[name]}: share of attention on the letters of the old "
        "and the new operand, untied strings, over fine-tuning (the first point is before it).",
    )

    draw_said(run, cfg, f)
    if f.back is not None:
        draw_back(run, cfg, f)
    if f.pruned is not None:
        draw_pruned(run, cfg, f)
    if f.probes is not None:
        draw_probes(run, cfg, f)


@figures.style()
def draw_said(run: Run, cfg: TracrConfig, f: Found) -> None:
    """What models answer to untied strings, beside both right answers."""
    name, ends = f.world.name, [c for c in (0.0, 1.0) if c in cfg.correlations] or list(cfg.correlations[:1])
    rates = sorted(cfg.rates, reverse=True)
    right = operands.joint(f.world.tables, 0.0)
    order = np.argsort(f.world.output_A)
    values = f.world.old.layout.values
    most = int(np.flatnonzero((right.sum(0) + right.sum(1)) > 1e-3).max()) + 2 if name == "counter" else len(values)
    fig, axes = figures.new(len(ends), 1, height=2.6 * len(ends), sharex=True, squeeze=False)
    place = np.arange(len(values))
    for ax, c in zip(axes[:, 0], ends, strict=True):
        width = 0.8 / len(rates)
        for r, rate in enumerate(rates):
            said = f.tuned.of(Tuning("old", NEW, rate, c, cfg.seed))["said"][-1, UNTIED][np.argsort(order)]
            ax.bar(place + (r - (len(rates) - 1) / 2) * width, said, width, label=f"rate {rate:g}",
                   color=figures.shades(len(rates))[r])  # fmt: skip
        for axis, (word, line) in enumerate((("old answer", "-"), ("new answer", "--"))):
            ax.plot(place[: right.shape[0]], right.sum(1 - axis), line, color="#222222", linewidth=1.2, label=word)
        ax.set(ylabel="share", title=f"C_Tr = {c:g}", xlim=(-0.6, most - 0.4))
        ax.grid(False, axis="x")
    axes[-1, 0].set(xlabel="answer")
    axes[-1, 0].set_xticks(place[:most], [figures.plain(v) for v in values[:most]])
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(rates) + 2)
    run.figure(f"{name}_answers", fig, alt=f"{name}: histogram of answers to untied strings",
               caption=f"{name}. What fine-tuned models answer to untied strings (bars, first seed) and how often each "
               "answer is right for the old and the new operand (lines).")  # fmt: skip


@figures.style()
def draw_back(run: Run, cfg: TracrConfig, f: Found) -> None:
    name = f.world.name
    rates = sorted(cfg.reverse_rates, reverse=True)
    fig, axes = figures.new(len(cfg.after_correlations), len(rates), height=2.7 * len(cfg.after_correlations),
                            sharex=True, sharey=True, squeeze=False)  # fmt: skip
    for row, c in enumerate(cfg.after_correlations):
        for col, rate in enumerate(rates):
            ax = axes[row, col]
            for start, label, look in (
                *(((r, c), f"after rate {r:g}", "-") for r in sorted(cfg.after_rates, reverse=True)),
                ("new", "Scr.+FT", "--"),
                ("random", "Scr.", ":"),
            ):
                steps, right = revival(cfg, f, start, rate)
                figures.seed_band(ax, np.maximum(steps, CHUNK / 2), right, label=label, linestyle=look, marker="")
            ax.set(xscale="log", ylim=(-0.05, 1.05), title=f"C_Tr = {c:g}, reverse rate {rate:g}")
            ax.title.set_fontsize(9)
            if row == len(cfg.after_correlations) - 1:
                ax.set(xlabel="step of reverse fine-tuning")
        axes[row, 0].set(ylabel="accuracy, old operand")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    run.figure(f"{name}_reverse", fig, alt=f"{name}: revival of the old operand by reverse fine-tuning",
               caption=f"{name}. Accuracy for the old operand on untied strings while fine-tuning back. Scr.+FT starts "
               "from the program compiled for the new operand, Scr. from random weights: neither ever had the old "
               "capability.")  # fmt: skip


@figures.style()
def draw_pruned(run: Run, cfg: TracrConfig, f: Found) -> None:
    name = f.world.name
    cells = [(c, rate) for c in cfg.after_correlations for rate in sorted(cfg.after_rates, reverse=True)]
    rows, cols = len(cfg.after_correlations), len(cfg.after_rates)
    fig, axes = figures.new(rows, cols, height=2.6 * rows, sharex=True, sharey=True, squeeze=False)
    place = np.arange(cfg.pruned + 1)
    for ax, (c, rate) in zip(axes.reshape(-1), cells, strict=True):
        sweeps = pruned_of(cfg, f, rate, c)[:, :, :, 1, OLD]
        single = sweeps[:, 1].mean(0)
        ax.bar(place[1:], single[1:], color=figures.PALETTE[5], width=0.8, label="this weight alone")
        figures.seed_band(ax, place, sweeps[:, 0], label="first K by score", marker="", color=figures.PALETTE[0])
        figures.seed_band(ax, place, sweeps[:, 2], label="K random weights", marker="", color="#777777", linestyle="--")
        ax.set(ylim=(-0.05, 1.05), title=f"C_Tr = {c:g}, rate {rate:g}")
        ax.title.set_fontsize(9)
    for ax in axes[:, 0]:
        ax.set(ylabel="accuracy, old operand")
    for ax in axes[-1]:
        ax.set(xlabel="K, by score")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    run.figure(f"{name}_pruned", fig, alt=f"{name}: accuracy for the old operand after pruning single weights",
               caption=f"{name}. Accuracy for the old operand on untied strings with weights set to zero, by their "
               "first-order score; K = 0 is the model as it is. Bars: means over seeds.")  # fmt: skip


@figures.style()
def draw_probes(run: Run, cfg: TracrConfig, f: Found) -> None:
    name = f.world.name
    fig, axes = figures.new(1, 2, height=3.6, sharey=True)
    for col, operand in enumerate(("old", "new")):
        for x, (who, what) in enumerate(readers(cfg)):
            look = {"color": "#333333", "linestyle": "-" if x == 0 else ":"} if x < 2 else {
                "color": figures.PALETTE[(x - 2) % 6], "linestyle": "--" if who[1] == 0.0 else "-"}  # fmt: skip
            values = probes_of(cfg, f, *who)[:, :, col]
            figures.seed_band(axes[col], np.arange(values.shape[1]), values, label=what, **look)
        axes[col].set(xlabel="depth (0: embedding)", title=f"{operand} answer", ylim=(-0.05, 1.05))
        axes[col].set_xticks(np.arange(f.world.cfg.depths))
    axes[0].set(ylabel="accuracy of a linear probe")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    run.figure(f"{name}_probes", fig, alt=f"{name}: linear probes of both answers by depth",
               caption=f"{name}. Linear probes where the answer is read, untied strings.")  # fmt: skip


def run_tracr(run: Run, cfg: TracrConfig) -> None:
    mesh = parallel.make_mesh()
    with jax.default_matmul_precision("highest"):  # sharp attention and steep steps want every bit
        found = {name: study(run, cfg, name, mesh) for name in cfg.programs}
    run.write_claims([claim for f in found.values() for claim in judge(cfg, f)])
    write_tables(run, cfg, found)
    for f in found.values():
        draw(run, cfg, f)
    members = sum(len(part.tunings) for f in found.values() for part in (f.tuned, f.back) if part)
    summary = [
        f"{', '.join(found)} compiled into transformers and fine-tuned to another operand: {members} fine-tunings, "
        f"{cfg.seeds} seed{'s' * (cfg.seeds > 1)}.",
        "A string is tied if the new answer is the old one plus q; C_Tr is the share of such strings in fine-tuning, "
        "C_Te in a test. Accuracies stand beside what simple rules score (table base_rates).",
    ]
    run.drop_stale()
    report.write(run, "Fine-tuning as a wrapper: compiled programs", "Fine-tuning as wrapper", summary, PAPER)


def main(argv: Sequence[str] | None = None) -> int:
    parallel.use_all_cores()
    return cli.main(
        "wrappers tracr",
        TracrConfig,
        PRESETS,
        run_tracr,
        "What fine-tuning does to a RASP program compiled into a transformer (arXiv 2311.12786).",
        [
            "python -m experiments.wrappers tracr",
            "python -m experiments.wrappers tracr --preset small --out runs/wrappers",
            "python -m experiments.wrappers tracr --length 45 --exactness none --noise 1e-6 --out runs/wrappers-45",
        ],
        argv,
    )
