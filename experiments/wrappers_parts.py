"""What both halves of the wrapper study (arXiv 2311.12786) share: names, grids of fine-tuned models, probes, revival.

Letters beside those of `bert6_jax`: S seeds, G members of a grid, X moments at which they are looked at, J members that
are probed, P probed labels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bert6_jax import parallel, train
from bert6_jax.errors import InputError
from bert6_jax.objectives import cross_entropy
from bert6_jax.train import take
from experiments.harness import claims, cli

PAPER = "2311.12786"
OLD, NEW = 0, 1  # the operand of an accuracy: that of pre-training (O_PT) and that of fine-tuning (O_FT)
UNTIED, TIED = 0, 1  # C_Te
CHUNK = 20  # steps that a member takes before the next one's turn


def check(cfg: Any, listed: Sequence[str], needed: Sequence[str], chunked: Sequence[str]) -> None:
    """What both configs ask of their settings.

    Args:
      listed: fields with several values, each once; `needed`: those of them that may not be empty.
      chunked: numbers of steps, multiples of `CHUNK`.
    """
    for name in needed:
        if not getattr(cfg, name):
            raise InputError(f"--{name} is empty; give at least one value")
    cli.no_value_twice(cfg, listed)
    for name in chunked:
        if getattr(cfg, name) % CHUNK:
            raise InputError(f"--{name.replace('_', '-')} {getattr(cfg, name)} is no multiple of {CHUNK}; make it one")
    for after, of in (("after_rates", "rates"), ("after_correlations", "correlations")) if cfg.parts else ():
        extra = [value for value in getattr(cfg, after) if value not in getattr(cfg, of)]
        if extra or not getattr(cfg, after):
            what = f"{extra[0]:g} is none of --{of}" if extra else "is empty"
            raise InputError(f"--{after.replace('_', '-')} {what}; models come from the grid: choose among its values, "
                             'or give --parts ""')  # fmt: skip
    if "reverse" in cfg.parts and not cfg.reverse_rates:
        raise InputError("--reverse-rates is empty; give a value, or leave reverse out of --parts")


def seeded(seed: int, *purposes: int) -> jax.Array:
    """A key for a seed and what it is for."""
    key = jax.random.key(seed)
    for purpose in purposes:
        key = jax.random.fold_in(key, purpose)
    return key


def stack(trees: Sequence[Any]):
    """Trees as one with a leading axis, on the host, where it compiles nothing."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


class Tuned(NamedTuple):
    """A grid of fine-tuned models."""

    tunings: list[Any]
    params: Callable[[], Any]  # [G, ...], read from the checkpoint when first asked for
    found: dict[str, np.ndarray]  # [G, ...]

    def of(self, tuning: Any) -> dict[str, np.ndarray]:
        return {name: values[self.tunings.index(tuning)] for name, values in self.found.items()}


def rates(rate_G: Sequence[float], steps: int, warmup: float, final: float) -> np.ndarray:
    """The rates of all steps of all members, [G, steps]: a warm-up and a cosine (both halves of the paper)."""
    options = {"schedule": "warmup_cosine", "warmup": warmup, "final": final}
    by_rate = {
        rate: np.asarray(train.learning_rates(train.OptimizerConfig(lr=rate, **options), steps)) for rate in {*rate_G}
    }
    return np.stack([by_rate[rate] for rate in rate_G])


def inputs_of(rate_GS: np.ndarray, seed_G: Sequence[int], data: dict[str, Any]) -> dict[str, Any]:
    """What `train.grid_step` reads beside the members, which share nothing frozen."""
    base_G = np.zeros(len(rate_GS), np.int32)
    return {"rate": rate_GS, "seed": np.array(seed_G, np.uint32), "frozen": {}, "base": base_G, "data": data}


def probe_bank(features: Callable[[Any, Any], jax.Array], models_J, place_J: np.ndarray, sets: Sequence[Any],
               answers: Sequence[np.ndarray], classes: int, *, steps: int, rate: float, batch: int, seed: int, mesh,
               loop: bool | None = None, label: str, quiet: bool) -> np.ndarray:  # fmt: skip
    """Linear probes of P labels at every depth of J models: accuracy on the second set, [J, M, P].

    A bank: the probes of a model are trained together and touch only themselves. What they read is centred and divided
    by one number a depth, so that a model of small numbers is read as well (ours); Adam, its rate divided by ten at
    half and three quarters of the steps.

    Args:
      features: `(inputs of one place, params) -> [M, B, D]`, the residual stream where the answer is read.
      models_J: their parameters, leading axis J.
      place_J: int32, which entry of the sets is a model's own (its seed's).
      sets: inputs that train and that test, leading axis S.
      answers: their labels 0..classes-1, int32 [S, B, P] each.
      loop: as for `parallel.over_members`.
    """
    rows, P = answers[0].shape[1:]

    def scaled(sets, member):
        params, place = member
        train_MND, test_MND = (features(inputs, params) for inputs in take(sets, place))
        mean_M1D = train_MND.mean(1, keepdims=True)
        size_M11 = jnp.sqrt(((train_MND - mean_M1D) ** 2).mean((1, 2), keepdims=True))
        return [(x_MND - mean_M1D) / jnp.maximum(size_M11, 1e-20) for x_MND in (train_MND, test_MND)]

    x_JMND, test_JMND = jax.jit(parallel.over_members(scaled, mesh, loop))(list(sets), (models_J, place_J))
    J, M, _, D = x_JMND.shape

    def said(probes, x_MBD):
        return jnp.einsum("mbd,mpda->bmpa", x_MBD, probes["kernel"]) + probes["bias"][None]

    def loss(probes, frozen, key, data):
        row_B = jax.random.randint(key, (batch,), 0, rows)
        target_BMP = jnp.broadcast_to(data["answer"][row_B][:, None], (batch, M, P))
        # a sum over probes of their means, so that each has its own gradient
        return cross_entropy(said(probes, data["x"][:, row_B]), target_BMP).mean(0).sum(), {}

    rate_S = train.learning_rates(train.OptimizerConfig(lr=rate, schedule="step"), steps)
    data = {"x": x_JMND, "answer": np.asarray(answers[0])[place_J]}
    inputs = inputs_of(np.tile(rate_S, (J, 1)), [seed] * J, data)
    start = {"kernel": np.zeros((J, M, P, D, classes), np.float32), "bias": np.zeros((J, M, P, classes), np.float32)}
    adam = optax.scale_by_adam()
    probes, _ = train.fit_grid(
        train.grid_step(loss, adam, CHUNK, mesh, loop),
        train.init_grid(start, adam, jax.random.key(0)),
        inputs,
        train.FitConfig(steps // CHUNK, min(5, steps // CHUNK)),
        mesh,
        label=label,
        quiet=quiet,
    )

    def right(_, member):
        probes, x_MND, answer_BP = member
        said_BMP = said(probes, x_MND).argmax(-1).astype(jnp.int32)
        return (said_BMP == answer_BP[:, None]).astype(jnp.float32).mean(0)

    got = jax.jit(parallel.over_members(right, mesh, loop))((), (probes, test_JMND, np.asarray(answers[1])[place_J]))
    return jax.device_get(got)


def steps_to(bound: float, steps_X: np.ndarray, right_SX: np.ndarray) -> np.ndarray:
    """The first look at which an accuracy is there, [S]; infinite where it never is."""
    there_SX = right_SX >= bound
    return np.where(there_SX.any(1), steps_X[there_SX.argmax(1)], np.inf)


def back_columns(bound: float, steps_X: np.ndarray, right_SX: np.ndarray) -> dict[str, Any]:
    """Of reverse fine-tuning, as columns: accuracy before and after, how many seeds reach the bound, and when."""
    first_S = steps_to(bound, steps_X, right_SX)
    return (
        claims.proportion("before", right_SX[:, 0])
        | claims.proportion("after", right_SX[:, -1])
        | {"revived": int(np.isfinite(first_S).sum())}
        | {"steps": None if np.isinf(first_S).any() else float(np.median(first_S))}
    )


def lift(scored_SK: np.ndarray, test_SK: np.ndarray) -> np.ndarray:
    """What the best of K prunings gives on test strings, [S]: chosen by the strings that scored. K = 0 is none."""
    best_S = scored_SK[:, 1:].argmax(1) + 1
    test_SK = test_SK.astype(np.float64).round(6)  # shares of strings, without the last bit
    return np.take_along_axis(test_SK, best_S[:, None], 1)[:, 0] - test_SK[:, 0]


def sooner(mine_S: np.ndarray, others_LS: Sequence[np.ndarray], last: int) -> claims.Outcome:
    """Do these starts get there sooner than the fastest of others? log2 of the ratio of steps (`steps_to`).

    Who never gets there counts with the `last` step, which favours neither side.
    """
    theirs_S = np.min(others_LS, axis=0)
    if np.isinf([mine_S, theirs_S]).all():
        return claims.not_tested("neither gets there in these steps", len(mine_S))
    steps = [np.clip(x, CHUNK, last) for x in (theirs_S, mine_S)]
    return claims.greater_than(np.log2(steps[0] / steps[1]), 0.0)


def warn_of_diverged(tunings: Sequence[Any], finite_G: np.ndarray) -> None:
    """One line on stderr if some members stopped, with the first of them."""
    if bad := [t for t, finite in zip(tunings, finite_G, strict=True) if not finite]:
        print(f"warning: {len(bad)} of {len(tunings)} fine-tunings diverged and stopped there, the first at rate "
              f"{bad[0].rate:g}; lower it or lower --clip", file=sys.stderr)  # fmt: skip
