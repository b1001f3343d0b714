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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bert6_jax import checkpoint, interventions, metrics, parallel, train, transformer
from bert6_jax.errors import InputError
from bert6_jax.objectives import cross_entropy
from bert6_jax.train import take
from experiments.harness import claims, cli, figures, report
from experiments.harness.claims import Claim, proportion
from experiments.harness.cli import option
from experiments.harness.run import Run
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
from synthetic import compiler, operands, rasp
from synthetic.compiler import Compiled

PROGRAMS = ("counter", "max_identifier")
PARTS = ("reverse", "prune", "probe")
READ = 2  # where the answer is read: index 1 of the program, after BOS
LARGE, MIDDLE, SMALL, VERY_SMALL = 1e-1, 1e-2, 1e-3, 1e-4  # the paper's names for its rates
KEYS = ("BOS", "old operand", "new operand", "other letters")  # groups of keys that attention is summed over
BLOCK = {"counter": 1, "max_identifier": 2}  # whose attention reads the operand

# what a member's key is folded with, one number a purpose
NOISE, RANDOM, ROWS, BACK_ROWS, CONTROL, TEST, SCORE, PROBE, LOOK = range(9)


@dataclass(frozen=True)
class TracrConfig:
    """Settings of the study; those that the paper does not state are ours."""

    programs: tuple[str, ...] = option(PROGRAMS, "programs", "model", choices=PROGRAMS)
    length: int = option(20, "letters of a string of the Counter (paper: about 45)", "model", min=2)
    letters: int = option(9, "letters of its alphabet", "model", min=3, max=26)
    max_length: int = option(10, "letters of a string of the Max-identifier, at most", "model", min=3)
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
    test_rows: int = option(2_000, "test strings for each C_Te, a seed's own", "fine-tuning", min=10)

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
    probe_steps: int = option(1_000, "steps of Adam on the probes (paper: 4,000 of AdamW)", "afterwards", min=20)
    probe_rate: float = option(1e-2, "their rate (paper: 1e-3)", "afterwards", min=0.0)

    def __post_init__(self):
        needed = ("programs", "rates", "correlations")
        listed = (*needed, "parts", "after_rates", "after_correlations", "reverse_rates")
        check(self, listed, needed, ("steps", "reverse_steps", "probe_steps"))
        for program, fields in TABLE_OF.items():
            if program in self.programs:
                try:
                    make_tables(self, program)
                except InputError as error:  # in the words of synthetic.operands
                    given = ", ".join(f"--{name.replace('_', '-')} {getattr(self, name)}" for name in fields)
                    raise InputError(f"{given}: {error}") from error

    @property
    def seed_list(self) -> list[int]:
        return [self.seed + s for s in range(self.seeds)]


# settings that decide which strings a program has
TABLE_OF = {
    "counter": ("length", "letters", "q", "independent"),
    "max_identifier": ("max_length", "rank_old", "rank_new", "max_q"),
}


def make_tables(cfg: TracrConfig, name: str) -> operands.Tables:
    if name == "counter":
        return operands.counter_tables(cfg.length, cfg.letters, cfg.q, cfg.independent)
    # strings of the Max-identifier are full or one letter short (paper: 9 to 10 letters)
    sizes = (cfg.max_length - 1, cfg.max_length)
    return operands.max_tables(cfg.max_length, sizes, cfg.rank_old, cfg.rank_new, cfg.max_q)


PRESETS = {
    "demo": TracrConfig(
        programs=("counter",), length=12, rates=(1e-1, 1e-2, 1e-3), correlations=(0.0, 0.5, 1.0), steps=1_000, seeds=3,
        test_rows=500, after_rates=(1e-1, 1e-2, 1e-3), after_correlations=(1.0,), reverse_rates=(1e-2, 1e-4),
        reverse_steps=800, pruned=10, prune_rows=500, probe_rows=2_000, probe_steps=400,
    ),
    "small": TracrConfig(),
    "paper": TracrConfig(length=45, exactness=10_000.0, noise=1e-6, steps=10_000, reverse_steps=10_000,
                         probe_steps=4_000, probe_rate=1e-3, seeds=5),
}  # fmt: skip


# --- programs and strings --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)  # hashed by identity, so it may be a static argument
class World:
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
        answers = range(length + 1)
    else:
        vocab, length = rasp_letters(operands.ALPHABET), cfg.max_length
        programs = [rasp.max_identifier(cfg.rank_old), rasp.max_identifier(cfg.rank_new)]
        answers = vocab
    old, new = (compiler.compile_program(program, vocab, length, **options) for program in programs)
    output_A = np.array([old.layout.values.index(answer) for answer in answers], np.int32)
    return World(name, old, new, make_tables(cfg, name), output_A)


def rasp_letters(count: int) -> tuple[str, ...]:
    return tuple(chr(ord("a") + i) for i in range(count))


class Strings(NamedTuple):
    """Rows with the logits' numbers of both answers."""

    ids_BT: jax.Array
    segment_BT: jax.Array
    answer_B2: jax.Array  # old, new


@partial(jax.jit, static_argnums=(0, 3))
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


def by_seed(cfg: TracrConfig, world: World, purpose: int, correlation: float, count: int) -> Strings:
    """Strings of every seed, [S, B, ...]."""
    return stack([sample(world, seeded(seed, purpose), np.float32(correlation), count) for seed in cfg.seed_list])


def test_strings(cfg: TracrConfig, world: World) -> list[Strings]:
    """Untied and tied, [S, B, ...] each: a seed has its own."""
    return [by_seed(cfg, world, TEST, c, cfg.test_rows) for c in (0.0, 1.0)]


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


def controls(cfg: TracrConfig) -> list[Tuning]:
    """Models that never had the old capability: compiled for the new operand and fine-tuned to it, [S][R], flat."""
    return [Tuning("new", NEW, rate, 0.0, seed) for seed in cfg.seed_list for rate in cfg.after_rates]


def kept(cfg: TracrConfig) -> list[Tuning]:
    """Members of the grid that are looked at afterwards, [S][R][C], flat."""
    return [t for t in grid(cfg) if t.rate in cfg.after_rates and t.correlation in cfg.after_correlations]


def reversals(cfg: TracrConfig) -> list[Tuning]:
    """Back to the old operand; and two that never had it: `controls` (Scr.+FT), and random starts (Scr.)."""
    starts = [(t, t.seed) for t in kept(cfg) + controls(cfg)] + [("random", seed) for seed in cfg.seed_list]
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


def places(cfg: TracrConfig, members: Sequence[Tuning]) -> np.ndarray:
    """The numbers of members' seeds."""
    return np.array([t.seed - cfg.seed for t in members], np.int32)


def looker(cfg: TracrConfig, world: World, mesh):
    """`(params, seed) [G, ...] -> {accuracy [G, C_Te, operand], said [G, C_Te, A], attention [G, L, N, keys]}`.

    `seed` is the number of a member's seed among the seeds."""
    tests = test_strings(cfg, world)
    few = take(tests[UNTIED], np.s_[:, :256])
    A = len(world.old.layout.values)

    def look(shared, member):
        params, seed = member
        tests, few = take(shared, seed)
        said = [logits(params, strings, world).argmax(-1).astype(jnp.int32) for strings in tests]
        right = [(s[:, None] == t.answer_B2).astype(jnp.float32).mean(0) for s, t in zip(said, tests, strict=True)]
        counts = [(s[:, None] == jnp.arange(A)[None]).astype(jnp.float32).mean(0) for s in said]
        _, acts = transformer.forward(params, few.ids_BT, world.cfg, segment_BT=few.segment_BT)
        query_BQ = jnp.full((len(few.ids_BT), 1), READ, jnp.int32)
        mass = metrics.attention_mass(acts["pattern"], query_BQ, key_groups(world, few), len(KEYS))
        share_LNK = mass.mass_LNG / mass.queries.astype(jnp.float32)
        return {"accuracy": jnp.stack(right), "said": jnp.stack(counts), "attention": share_LNK}

    run = jax.jit(parallel.over_members(look, mesh))
    return lambda params_G, seed_G: jax.device_get(run((tests, few), (params_G, seed_G)))


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
    # other strings on the way back, also for a parent of the same seed
    seeds = [int(jax.random.bits(seeded(t.seed, ROWS if t.operand == NEW else BACK_ROWS))) for t in tunings]
    data = {
        "correlation": np.array([t.correlation for t in tunings], np.float32),
        "operand": np.array([t.operand for t in tunings], np.int32),
    }
    return inputs_of(rates([t.rate for t in tunings], steps, cfg.warmup, cfg.final), seeds, data)


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
            looks[number * CHUNK] = look(params_G, places(cfg, tunings))

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
    warn_of_diverged(tunings, found["curve_finite"][:, -1])

    def params():
        if not held:
            held.append(checkpoint.load_transformer(path)[0])
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
        sets = (by_seed(cfg, world, SCORE, 0.0, cfg.prune_rows), test_strings(cfg, world)[UNTIED])

        def one(sets, member):
            params, key, seed = member
            shared = take(sets, seed)

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
        given = (take(tuned.params(), index), keys, places(cfg, members))
        return jax.device_get(jax.jit(parallel.over_members(one, mesh))(sets, given))

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
    strings."""

    def features(strings, params):
        _, acts = transformer.forward(params, strings.ids_BT, world.cfg, segment_BT=strings.segment_BT)
        return acts["resid"][:, :, READ]

    def stage() -> dict:
        members = probed(cfg)
        models = stack([
            take(tuned.params(), tuned.tunings.index(m)) if isinstance(m, Tuning) else fresh(cfg, world, *m)
            for m in members
        ])  # fmt: skip
        seed_J = np.array([(m.seed if isinstance(m, Tuning) else m[1]) - cfg.seed for m in members], np.int32)
        sets = (by_seed(cfg, world, PROBE, 0.0, cfg.probe_rows), test_strings(cfg, world)[UNTIED])
        right = probe_bank(
            features, models, seed_J, sets, [strings.answer_B2 for strings in sets], len(world.old.layout.values),
            steps=cfg.probe_steps, rate=cfg.probe_rate, batch=cfg.batch, seed=cfg.seed, mesh=mesh,
            label=f"probe-{world.name}", quiet=run.quiet,
        )  # fmt: skip
        return {"accuracy": right}

    return run.stage(f"probe-{world.name}", stage)


def attention_maps(run: Run, cfg: TracrConfig, world: World, tuned: Tuned) -> dict[str, np.ndarray]:
    """Where the answer is read, attention of every block to one untied string, `[1 + J, L, T]` (heads averaged): of the
    compiled model, then of the members `kept` of the first seed; `ids` [T] is the string."""

    def stage() -> dict:
        strings = take(test_strings(cfg, world)[UNTIED], 0)
        groups_BT = np.asarray(key_groups(world, strings))
        # the string in which both operands can be seen best
        row = int(np.minimum((groups_BT == 1).sum(1), (groups_BT == 2).sum(1)).argmax())
        ids_BT, segment_BT = (x[row : row + 1] for x in (strings.ids_BT, strings.segment_BT))
        members = [t for t in kept(cfg) if t.seed == cfg.seed]
        models = [fresh(cfg, world, "old", cfg.seed)] + [take(tuned.params(), tuned.tunings.index(t)) for t in members]

        def pattern(params):
            _, acts = transformer.forward(params, ids_BT, world.cfg, segment_BT=segment_BT)
            return acts["pattern"][:, 0, :, READ].mean(1)

        return {"pattern": jax.jit(jax.vmap(pattern))(stack(models)), "ids": ids_BT[0]}

    return run.stage(f"maps-{world.name}", stage)


def exact(run: Run, cfg: TracrConfig, world: World, count: int = 10_000) -> dict[str, np.ndarray]:
    """Share of random strings that the compiled model answers as the program does, without and with noise, [1 + S].

    Raises:
      InputError: one of them below 0.99, or fewer weights than are to be pruned; then nothing is kept.
    """
    if cfg.pruned > (most := transformer.num_params(world.old.params)):
        raise InputError(f"--pruned {cfg.pruned} is more than the {most} weights of the {world.name}; lower it")

    def stage() -> dict:
        # half tied, half not: every pair of answers that may come
        strings = sample(world, seeded(cfg.seed, LOOK), np.float32(0.5), count)
        models = [world.old.params] + [fresh(cfg, world, "old", seed) for seed in cfg.seed_list]
        run_all = jax.jit(lambda params: jax.lax.map(lambda one: hits(one, strings, world)[OLD], params))
        right = np.asarray(run_all(stack(models)))
        if right[0] < 0.99:
            exactness = "none" if cfg.exactness is None else f"{cfg.exactness:g}"
            raise InputError(
                f"--exactness {exactness} with --sharpness {cfg.sharpness:g} is too small: the compiled {world.name} "
                f"answers {right[0]:.0%} of its strings; raise --sharpness, or give --exactness none for what every "
                "count needs"
            )
        if right[1:].min() < 0.99:
            raise InputError(
                f"--noise {cfg.noise:g} destroys the compiled {world.name}: {right[1:].min():.0%} of its answers are "
                "left; lower it, or lower --exactness, which multiplies it"
            )
        if run.primary:
            path = run.out / "checkpoints" / world.name
            shutil.rmtree(path, ignore_errors=True)
            compiler.save(path, world.old)
        return {"right": right}

    return run.stage(f"compiled-{world.name}", stage)


# --- the study -------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What was found for one program."""

    world: World
    exact: np.ndarray  # [1 + S]: without noise, then with
    tuned: Tuned
    maps: dict[str, np.ndarray] | None
    back: Tuned | None
    pruned: dict[str, np.ndarray] | None
    probes: np.ndarray | None  # [J, M, operand]


def study(run: Run, cfg: TracrConfig, world: World, right: np.ndarray, mesh) -> Found:
    """Everything about one program; `right` from `exact`."""
    name = world.name
    first = grid(cfg) + (controls(cfg) if "reverse" in cfg.parts else [])
    tuned = tune(run, cfg, world, f"tune-{name}", first, cfg.steps, mesh)
    maps = attention_maps(run, cfg, world, tuned) if kept(cfg) else None
    back = pruned = probes = None
    if "reverse" in cfg.parts:
        back = tune(run, cfg, world, f"reverse-{name}", reversals(cfg), cfg.reverse_steps, mesh, tuned)
    if "prune" in cfg.parts:
        pruned = prune(run, cfg, world, tuned, mesh)
    if "probe" in cfg.parts:
        probes = probe(run, cfg, world, tuned, mesh)["accuracy"]
    return Found(world, right, tuned, maps, back, pruned, probes)


def accuracies(cfg: TracrConfig, f: Found, rate: float, correlation: float) -> np.ndarray:
    """At the end of fine-tuning, [S, C_Te, operand]; NaN where it diverged."""
    runs = [f.tuned.of(Tuning("old", NEW, rate, correlation, seed)) for seed in cfg.seed_list]
    return np.stack([np.where(run["curve_finite"][-1] > 0, run["accuracy"][-1], np.nan) for run in runs])


def attention(cfg: TracrConfig, f: Found, rate: float, correlation: float, block: int) -> np.ndarray:
    """Attention of a block on every group of keys, a mean over heads, [S, X, keys]."""
    runs = (f.tuned.of(Tuning("old", NEW, rate, correlation, seed)) for seed in cfg.seed_list)
    return np.stack([found["attention"][:, block].mean(1) for found in runs])


def revival(cfg: TracrConfig, f: Found, start, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Steps [X] and accuracy for the old operand on untied strings [S, X] in reverse fine-tuning.

    `start`: "random", or ("old" or "new", rate, C_Tr), what was compiled and how it was fine-tuned."""
    runs = []
    for seed in cfg.seed_list:
        first = start if start == "random" else Tuning(start[0], NEW, *start[1:], seed)
        runs.append(f.back.of(Tuning(first, OLD, rate, 0.0, seed)))
    return runs[0]["step"], np.stack([found["accuracy"][:, UNTIED, OLD] for found in runs])


def pruned_of(cfg: TracrConfig, f: Found, rate: float, correlation: float) -> np.ndarray:
    """Accuracies of the pruning sweeps, [S, how, K + 1, set, operand]."""
    members = kept(cfg)
    return np.stack([f.pruned["accuracy"][members.index(Tuning("old", NEW, rate, correlation, seed))]
                     for seed in cfg.seed_list])  # fmt: skip


def lifted(sweep_SKZO: np.ndarray) -> np.ndarray:
    """What the best single weight gives the old operand on test strings, [S]."""
    return lift(sweep_SKZO[..., 0, OLD], sweep_SKZO[..., 1, OLD])


def probes_of(cfg: TracrConfig, f: Found, *who) -> np.ndarray:
    """Accuracy of the probes, [S, M, operand]: of ("old",), ("random",), or (rate, C_Tr) of the grid."""
    members = probed(cfg)
    keys = [(*who, seed) if isinstance(who[0], str) else Tuning("old", NEW, *who, seed) for seed in cfg.seed_list]
    return np.stack([f.probes[members.index(key)] for key in keys])


# --- claims: rules were written before the runs that RESULTS.md reports ----------------------------------------------


def judge(cfg: TracrConfig, f: Found) -> list[Claim]:
    """The paper's claims about compiled models, for one program. A claim on a cell that diverged is not tested."""
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

    claim("exact", "Tracr set-up", "The compiled model with its noise answers as its program does: share of 10,000 "
          "strings", 1.0, [], lambda: claims.greater_than(f.exact[1:], 0.999))  # fmt: skip
    small, large = (SMALL, 1.0), (LARGE, 0.0)
    claim("wrapper_fits", "Table 3", f"Fine-tuning at rate {SMALL:g} on tied strings alone fits tied strings: accuracy "
          "for the new operand at C_Te = 1", "94.3 % (Counter)", [small],
          lambda: claims.greater_than(right(*small, TIED, NEW), 0.9))  # fmt: skip
    claim("wrapper_fails", "Table 3", f"Fine-tuning at rate {SMALL:g} on tied strings alone fails on untied ones: "
          "accuracy for the new operand at C_Te = 0", "2.2 % (Counter)", [small],
          lambda: claims.less_than(right(*small, UNTIED, NEW), 0.1))  # fmt: skip
    for tie, word in ((TIED, "tied"), (UNTIED, "untied")):
        claim(f"learnt_{word}", "Table 3", f"Fine-tuning at rate {LARGE:g} on untied strings alone learns the new "
              f"operand: accuracy at C_Te = {tie}", "100 % (Counter)", [large],
              lambda tie=tie: claims.greater_than(right(*large, tie, NEW), 0.95))  # fmt: skip
    ordered = sorted(cfg.correlations)
    for rate in (MIDDLE, SMALL):
        claim(f"tie_misleads_{rate:g}", "Table 3", "The more strings are tied, the less is learnt where they are not: "
              f"error for the new operand at C_Te = 0 along C_Tr, rate {rate:g}", "rises", [(rate, c) for c in ordered],
              lambda rate=rate: claims.increasing(
                  1.0 - np.stack([right(rate, c, UNTIED, NEW) for c in ordered], 1), saturates=0.05)
              if len(ordered) > 1 else claims.not_tested("one C_Tr only"))  # fmt: skip

    def looks(rate, c, blocks):
        """Attention to the old operand's letters minus that to the new one's, the largest of these blocks each, as a
        share of what it was before fine-tuning, [S]."""
        mass_LSXK = np.stack([attention(cfg, f, rate, c, block) for block in blocks])
        most_SXK = mass_LSXK.max(0)
        difference_SX = most_SXK[:, :, 1] - most_SXK[:, :, 2]
        return difference_SX[:, -1] / difference_SX[:, 0]

    own, every = [BLOCK[name]], range(f.world.cfg.blocks)
    what = "attention to the old operand minus the new one, as a share of its value before fine-tuning"
    for rate in (MIDDLE, SMALL):
        claim(f"attention_stays_{rate:g}", "attention maps", "After tied strings alone attention is still on the old "
              f"operand, rate {rate:g}: {what}", "above 0.5 (bound ours)", [(rate, 1.0)],
              lambda rate=rate: claims.greater_than(looks(rate, 1.0, own), 0.5))  # fmt: skip
    claim("attention_moves", "attention maps", f"Untied strings and rate {LARGE:g} move it to the new operand: {what}",
          "below 0", [large], lambda: claims.less_than(looks(*large, own), 0.0))  # fmt: skip
    claim("attention_moves_anywhere", "attention maps", f"Untied strings and rate {LARGE:g} move it to the new "
          f"operand, whichever block looks most (ours): {what}", "below 0", [large],
          lambda: claims.less_than(looks(*large, every), 0.0))  # fmt: skip
    if f.back is not None:
        judge_back(cfg, f, claim)
    if f.pruned is not None:
        judge_pruning(cfg, f, claim)
    if f.probes is not None:
        judge_probes(cfg, f, claim)
    return listed


def judge_back(cfg: TracrConfig, f: Found, claim) -> None:
    def back(short, statement, expected, rates, rate, outcome):
        """`rates`: of the fine-tunings, at C_Tr = 1, that were tuned back at `rate`."""
        there = set(rates) <= set(cfg.after_rates) and 1.0 in cfg.after_correlations and rate in cfg.reverse_rates
        reason = f"needs reverse fine-tuning at rate {rate:g} after C_Tr 1 and rates {', '.join(map(str, rates))}"
        claim(short, "reverse fine-tuning", statement, expected, [], outcome if there else
              lambda: claims.not_tested(reason))  # fmt: skip

    def curve(after, rate):
        return revival(cfg, f, ("old", after, 1.0), rate)[1]

    lost = f"needs models that lost the old operand: accuracy below {cfg.revived:g} before"

    def revived():
        right_SX = curve(MIDDLE, VERY_SMALL)
        if (right_SX[:, 0] >= cfg.revived).any():
            return claims.not_tested(lost, cfg.seeds)
        return claims.greater_than(right_SX[:, -1], cfg.revived)

    back("revived", f"After tied strings alone at rate {MIDDLE:g}, reverse fine-tuning at rate {VERY_SMALL:g} revives "
         "the old operand: accuracy at C_Te = 0", "near 1", [MIDDLE], VERY_SMALL, revived)  # fmt: skip
    back("not_revived", f"Reverse fine-tuning at rate {VERY_SMALL:g} gives more back after rate {MIDDLE:g} than after "
         f"rate {LARGE:g}: difference of the accuracies for the old operand at C_Te = 0", "above 0", [MIDDLE, LARGE],
         VERY_SMALL,
         lambda: claims.greater_than(curve(MIDDLE, VERY_SMALL)[:, -1] - curve(LARGE, VERY_SMALL)[:, -1], 0.0),
         )  # fmt: skip

    def against(after, rate):
        others = [steps_to(cfg.revived, *revival(cfg, f, start, rate)) for start in (("new", after, 0.0), "random")]
        reverse = steps_to(cfg.revived, *revival(cfg, f, ("old", after, 1.0), rate))
        if (reverse == 0).any():
            return claims.not_tested(lost, cfg.seeds)
        return sooner(reverse, others, cfg.reverse_steps)

    for after, word in ((SMALL, "small"), (MIDDLE, "middle")):
        for rate in cfg.reverse_rates:
            back(f"sooner_{word}_{rate:g}", f"Reverse fine-tuning (rate {rate:g}) after tied strings alone at rate "
                 f"{after:g} is sooner at {cfg.revived:.0%} than a model that never had the capability, Scr.+FT or "
                 "Scr., whichever is first: log2 of the ratio of steps", "above 0", [after], rate,
                 lambda rate=rate, after=after: against(after, rate))  # fmt: skip


def judge_pruning(cfg: TracrConfig, f: Found, claim) -> None:
    for rate in cfg.after_rates:
        if 1.0 in cfg.after_correlations:
            sweeps = pruned_of(cfg, f, rate, 1.0)
            gain, random = lifted(sweeps[:, 1]), np.maximum(lifted(sweeps[:, 3]), lifted(sweeps[:, 4]))
            after = f"After tied strings alone (rate {rate:g}) one pruned weight"
            claim(f"pruned_{rate:g}", "pruning", f"{after} lifts the accuracy for the old operand at C_Te = 0",
                  "by more than 0.6 (Counter)", [],
                  lambda gain=gain: claims.greater_than(gain, 0.6))  # fmt: skip
            claim(f"pruned_control_{rate:g}", "pruning", f"{after}, chosen by score, lifts it by more than one of as "
                  "many random weights or weights of the same size (the better of both)", "above 0", [],
                  lambda gain=gain, random=random: claims.greater_than(gain - random, 0.0))  # fmt: skip
    if 0.0 in cfg.after_correlations and LARGE in cfg.after_rates:
        gain = lifted(pruned_of(cfg, f, LARGE, 0.0)[:, 1])
        claim("pruned_learnt", "pruning", f"After untied strings alone at rate {LARGE:g} one pruned weight does not "
              "lift the accuracy for the old operand at C_Te = 0", "small", [],
              lambda: claims.less_than(gain, 0.1))  # fmt: skip


def judge_probes(cfg: TracrConfig, f: Found, claim) -> None:
    # the depth is chosen by the compiled models, not by those that are judged
    depth = int(probes_of(cfg, f, "old")[:, :, OLD].mean(0).argmax())
    control = probes_of(cfg, f, "random")[:, depth, OLD]
    for rate in [r for r in cfg.after_rates if 1.0 in cfg.after_correlations]:
        read = probes_of(cfg, f, rate, 1.0)[:, depth, OLD]
        after = f"After tied strings alone (rate {rate:g}) a linear probe at depth {depth} reads the old answer"
        claim(f"probed_{rate:g}", "probing", f"{after}: accuracy at C_Te = 0", "near 1", [],
              lambda read=read: claims.greater_than(read, 0.9))  # fmt: skip
        claim(f"probed_control_{rate:g}", "probing", f"{after} better than from an untrained model: difference",
              "above 0", [], lambda read=read: claims.greater_than(read - control, 0.0))  # fmt: skip


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
                    row = {"program": name, "rate": rate, "C_Tr": c, "C_Te": tie}
                    row |= {"seeds": cfg.seeds, "diverged": int(np.isnan(right[:, 0, 0]).sum())}
                    row |= proportion("old", right[:, tie, OLD]) | proportion("new", right[:, tie, NEW])
                    rows.append(row)
    run.table(
        "fine_tuned", rows, "Accuracy for the old and the new operand after fine-tuning; those that diverged stay out"
    )
    if "counter" in found and cfg.q == 1:
        rows = []
        for (rate, c), paper in TABLE_3.items():
            if rate in cfg.rates and c in cfg.correlations:
                right = accuracies(cfg, found["counter"], rate, c)
                row = {"rate": rate, "C_Tr": c}
                for (tie, word), theirs in zip(((TIED, "C_Te 1"), (UNTIED, "C_Te 0")), paper, strict=True):
                    for operand, label in ((OLD, "old"), (NEW, "new")):
                        mean = claims.interval(right[:, tie, operand])["mean"]
                        row[f"{label}, {word}"] = None if mean is None else round(100 * mean, 1)
                        row[f"paper {label}, {word}"] = theirs[operand]
                rows.append(row)
        run.table("table_3", rows, "The Counter beside the paper's Table 3, per cent (other lengths, steps, strings)")

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
                    {"program": name, "start": t.start, "rate": t.rate, "C_Tr": t.correlation, "seed": t.seed,
                     "step": int(step)}
                    | {f"{word}_{tie}": float(got["accuracy"][x, tie, o])
                       for tie in (TIED, UNTIED) for word, o in (("old", OLD), ("new", NEW))}
                    | {f"attention {key}": float(m) for key, m in zip(KEYS, mass, strict=True)}
                )  # fmt: skip
    run.table(
        "curves",
        rows,
        "Accuracies at C_Te 1 and 0 and attention where the answer is read, over fine-tuning; start: compiled for the "
        "old or the new operand (the latter are fine-tuned back as Scr.+FT)",
    )

    rows = []
    for name, f in found.items():
        if f.back is None:
            continue
        for start, what in starts(cfg):
            for rate in cfg.reverse_rates:
                row = {"program": name, "start": what, "reverse_rate": rate, "seeds": cfg.seeds}
                rows.append(row | back_columns(cfg.revived, *revival(cfg, f, start, rate)))
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
                row |= claims.named("lift", lifted(sweeps[:, 1])) | claims.named("lift_random", lifted(sweeps[:, 3]))
                row |= claims.named("lift_same_magnitude", lifted(sweeps[:, 4]))
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
    of = [(("old", r, c), f"rate {r:g}, C_Tr {c:g}") for r in cfg.after_rates for c in cfg.after_correlations]
    return [*of, *((("new", r, 0.0), f"Scr.+FT, rate {r:g}") for r in cfg.after_rates), ("random", "Scr.")]


def readers(cfg: TracrConfig) -> list[tuple[tuple, str]]:
    of = [((r, c), f"rate {r:g}, C_Tr {c:g}") for r in cfg.after_rates for c in cfg.after_correlations]
    return [(("old",), "compiled"), (("random",), "untrained"), *of]


# --- figures ---------------------------------------------------------------------------------------------------------


def extremes(cfg: TracrConfig) -> list[float]:
    """The C_Tr that are shown where there is no room for all."""
    return [c for c in (0.0, 1.0) if c in cfg.correlations] or list(cfg.correlations[:1])


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
                    figures.seed_lines(ax, cs, right, label=f"rate {rate:g}", color=colour)
                ax.axhline(rule["constant_pt" if col == OLD else "constant_ft"], color="#888888", linestyle=":",
                           linewidth=1.2)  # fmt: skip
                ax.set(ylim=(-0.05, 1.05), title=f"{operand} operand, {word}")
                if col == 0:
                    ax.set(ylabel="accuracy")
                if row == 1:
                    ax.set(xlabel="C_Tr, share of tied strings in fine-tuning")
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(rates))
        run.figure(f"{name}_grid", fig, alt=f"{name}: accuracy for both operands by C_Tr and rate",
                   caption=f"{name}. Accuracy after fine-tuning by C_Tr and learning rate. Thin lines are seeds; "
                   "dotted: the most frequent answer. On tied strings the two add up to at most 1: one output is "
                   "scored against both answers.")  # fmt: skip

    shown = [(rate, c) for c in extremes(cfg) for rate in rates]
    rows, cols = len(extremes(cfg)), len(rates)
    size = {"height": 2.5 * rows, "width": max(figures.WIDTH, 2.2 * cols)}
    fig, axes = figures.new(rows, cols, sharex=True, sharey=True, squeeze=False, **size)
    for ax, (rate, c) in zip(axes.reshape(-1), shown, strict=False):
        mass = attention(cfg, f, rate, c, BLOCK[name])
        steps = f.tuned.of(Tuning("old", NEW, rate, c, cfg.seed))["step"]
        for k, key in reversed(list(enumerate(KEYS))):  # the operands on top
            figures.seed_lines(ax, np.maximum(steps, CHUNK / 2), mass[:, :, k], label=key, marker="",
                              color=("#999999", *figures.PALETTE)[k])  # fmt: skip
        ax.set(xscale="log", ylim=(-0.05, 1.05), title=f"rate {rate:g}, C_Tr = {c:g}")
        ax.title.set_fontsize(9)
        ax.minorticks_off()
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

    if f.maps is not None:
        draw_maps(run, cfg, f)
    draw_said(run, cfg, f)
    if f.back is not None:
        draw_back(run, cfg, f)
    if f.pruned is not None:
        draw_pruned(run, cfg, f)
    if f.probes is not None:
        draw_probes(run, cfg, f)


@figures.style()
def draw_maps(run: Run, cfg: TracrConfig, f: Found) -> None:
    name, layout = f.world.name, f.world.old.layout
    tokens = [(*map(str, layout.vocab), "$", "#")[i] for i in f.maps["ids"]]
    rows = ["compiled", *(f"{t.rate:g}, {t.correlation:g}" for t in kept(cfg) if t.seed == cfg.seed)]
    blocks = f.world.cfg.blocks
    fig, axes = figures.new(1, blocks, height=1.4 + 0.28 * len(rows), width=1.4 * figures.WIDTH, sharey=True,
                            squeeze=False)  # fmt: skip
    for block, ax in enumerate(axes[0]):
        figures.heatmap(ax, f.maps["pattern"][:, block], rows=rows, cols=tokens, vmin=0, vmax=1,
                        label="attention" if block == blocks - 1 else "")  # fmt: skip
        ax.tick_params(axis="x", rotation=0, labelsize=7)
        ax.set(title=f"block {block}")
    axes[0, 0].set(ylabel="rate, C_Tr")
    run.figure(f"{name}_maps", fig, alt=f"{name}: attention to one string before and after fine-tuning",
               caption=f"{name}. Attention where the answer is read to one untied string (first seed), before and "
               "after fine-tuning; the dollar is BOS, # a pad.")  # fmt: skip


@figures.style()
def draw_said(run: Run, cfg: TracrConfig, f: Found) -> None:
    """What models answer to untied strings, beside both right answers."""
    name, ends = f.world.name, extremes(cfg)
    rates = sorted(cfg.rates, reverse=True)
    right = operands.joint(f.world.tables, 0.0)
    values = [f.world.old.layout.values[a] for a in f.world.output_A]
    most = int(np.flatnonzero((right.sum(0) + right.sum(1)) > 1e-3).max()) + 2 if name == "counter" else len(values)
    fig, axes = figures.new(len(ends), 1, height=2.6 * len(ends), sharex=True, squeeze=False)
    place = np.arange(len(values))
    for ax, c in zip(axes[:, 0], ends, strict=True):
        width = 0.8 / len(rates)
        for r, rate in enumerate(rates):
            said = f.tuned.of(Tuning("old", NEW, rate, c, cfg.seed))["said"][-1, UNTIED][f.world.output_A]
            ax.bar(place + (r - (len(rates) - 1) / 2) * width, said, width, label=f"rate {rate:g}",
                   color=figures.shades(len(rates))[r])  # fmt: skip
        for axis, (word, line) in enumerate((("old answer", "-"), ("new answer", "--"))):
            ax.plot(place[: right.shape[0]], right.sum(1 - axis), line, color="#222222", linewidth=1.2, label=word)
        ax.set(ylabel="share", title=f"C_Tr = {c:g}", xlim=(-0.6, most - 0.4))
        ax.grid(False, axis="x")
    axes[-1, 0].set(xlabel="answer")
    axes[-1, 0].set_xticks(place[:most], [figures.plain(v) for v in values[:most]])
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    run.figure(f"{name}_answers", fig, alt=f"{name}: histogram of answers to untied strings",
               caption=f"{name}. What fine-tuned models answer to untied strings (bars, first seed) and how often each "
               "answer is right for the old and the new operand (lines).")  # fmt: skip


@figures.style()
def draw_back(run: Run, cfg: TracrConfig, f: Found) -> None:
    name = f.world.name
    rates, after = (sorted(given, reverse=True) for given in (cfg.reverse_rates, cfg.after_rates))
    colour = dict(zip(after, figures.shades(len(after)), strict=True))
    constant = operands.base_rates(f.world.tables, 0.0)["constant_pt"]
    size = {"height": 2.7 * len(cfg.after_correlations), "width": max(figures.WIDTH, 3.0 * len(rates))}
    fig, axes = figures.new(len(cfg.after_correlations), len(rates), sharex=True, sharey=True, squeeze=False, **size)
    for row, c in enumerate(cfg.after_correlations):
        for col, rate in enumerate(rates):
            ax = axes[row, col]
            lines = [(("old", r, c), f"after rate {r:g}", "-", colour[r]) for r in after]
            lines += [(("new", r, 0.0), f"Scr.+FT, rate {r:g}", "--", colour[r]) for r in after]
            for start, label, look, hue in [*lines, ("random", "Scr.", ":", "#777777")]:
                steps, right = revival(cfg, f, start, rate)
                figures.seed_lines(ax, np.maximum(steps, CHUNK / 2), right, label=label, linestyle=look, marker="",
                                   color=hue)  # fmt: skip
            ax.axhline(constant, color="#bbbbbb", linewidth=0.8)
            ax.set(xscale="log", ylim=(-0.05, 1.05), title=f"C_Tr = {c:g}, reverse rate {rate:g}")
            ax.title.set_fontsize(9)
            ax.minorticks_off()
            if row == len(cfg.after_correlations) - 1:
                ax.set(xlabel="step of reverse fine-tuning")
        axes[row, 0].set(ylabel="accuracy, old operand")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    run.figure(f"{name}_reverse", fig, alt=f"{name}: revival of the old operand by reverse fine-tuning",
               caption=f"{name}. Accuracy for the old operand on untied strings while fine-tuning back (first point: "
               "before it; thin lines are seeds; grey: the most frequent answer). Scr.+FT was compiled for the new "
               "operand and fine-tuned to it, Scr. starts from random weights: neither ever had the old "
               "capability.")  # fmt: skip


@figures.style()
def draw_pruned(run: Run, cfg: TracrConfig, f: Found) -> None:
    name = f.world.name
    cells = [(c, rate) for c in cfg.after_correlations for rate in sorted(cfg.after_rates, reverse=True)]
    rows, cols = len(cfg.after_correlations), len(cfg.after_rates)
    size = {"height": 2.6 * rows, "width": max(figures.WIDTH, 2.6 * cols)}
    fig, axes = figures.new(rows, cols, sharex=True, sharey=True, squeeze=False, **size)
    place = np.arange(cfg.pruned + 1)
    for ax, (c, rate) in zip(axes.reshape(-1), cells, strict=True):
        sweeps = pruned_of(cfg, f, rate, c)[:, :, :, 1, OLD]
        single = sweeps[:, 1].mean(0)
        ax.bar(place[1:], single[1:], color=figures.PALETTE[5], width=0.8, label="this weight alone")
        figures.seed_lines(ax, place, sweeps[:, 0], label="first K by score", marker="", color=figures.PALETTE[0])
        figures.seed_lines(ax, place, sweeps[:, 2], label="K random ones", marker="", color="#777777", linestyle="--")
        ax.plot(place[1:], sweeps[:, 4, 1:].mean(0), "x", color="#222222", label="one of its magnitude, alone")
        ax.set(ylim=(-0.05, 1.05), title=f"C_Tr = {c:g}, rate {rate:g}")
        ax.title.set_fontsize(9)
    for ax in axes[:, 0]:
        ax.set(ylabel="accuracy, old operand")
    for ax in axes[-1]:
        ax.set(xlabel="K, by score")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    run.figure(f"{name}_pruned", fig, alt=f"{name}: accuracy for the old operand after pruning single weights",
               caption=f"{name}. Accuracy for the old operand on untied strings with weights set to zero, by their "
               "first-order score; K = 0 is the model as it is. Bars: means over seeds.")  # fmt: skip


@figures.style()
def draw_probes(run: Run, cfg: TracrConfig, f: Found) -> None:
    name = f.world.name
    colour = dict(zip(sorted(cfg.after_rates, reverse=True), figures.shades(len(cfg.after_rates)), strict=True))
    fig, axes = figures.new(1, 2, height=3.8, sharey=True)
    for col, operand in enumerate(("old", "new")):
        for x, (who, what) in enumerate(readers(cfg)):
            look = {"color": "#333333", "linestyle": "-" if x == 0 else ":"}
            if x > 1:
                look = {"color": colour[who[0]], "linestyle": "-" if who[1] == max(cfg.after_correlations) else "--"}
            values = probes_of(cfg, f, *who)[:, :, col]
            figures.seed_lines(axes[col], np.arange(values.shape[1]), values, label=what, **look)
        axes[col].set(xlabel="depth (0: embedding)", title=f"{operand} answer", ylim=(-0.05, 1.05))
        axes[col].set_xticks(np.arange(f.world.cfg.depths))
        constant = operands.base_rates(f.world.tables, 0.0)["constant_pt" if col == OLD else "constant_ft"]
        axes[col].axhline(constant, color="#888888", linestyle=":", linewidth=1.2)
    axes[0].set(ylabel="accuracy of a linear probe")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    run.figure(f"{name}_probes", fig, alt=f"{name}: linear probes of both answers by depth",
               caption=f"{name}. Linear probes where the answer is read, untied strings; thin lines are seeds. Dotted: "
               "the most frequent answer.")  # fmt: skip


def run_tracr(run: Run, cfg: TracrConfig) -> None:
    mesh = parallel.make_mesh()
    with jax.default_matmul_precision("highest"):  # sharp attention and steep steps want every bit
        worlds = [make_world(cfg, name) for name in cfg.programs]
        right = [exact(run, cfg, world)["right"] for world in worlds]  # of all programs before anything is trained
        found = {w.name: study(run, cfg, w, share, mesh) for w, share in zip(worlds, right, strict=True)}
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
