"""Claims of a paper and the rules that judge them.

A rule is a small pure function, written before the run, from one number a seed to a verdict. Its text becomes part of
the claim. `supported` needs the whole interval on the claimed side; everything else that was measured is `not
supported`, and a number that could not be computed (NaN, no seeds) is `not tested`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SUPPORTED, NOT_SUPPORTED, NOT_TESTED = VERDICTS = ("supported", "not supported", "not tested")

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Claim:
    """One entry of `claims.json`: `Claim(id, paper, statement, expected, *greater_than(values, bound))`."""

    id: str
    paper: str  # which paper, and where in it
    statement: str
    expected: str | float | None  # the paper's value, or the direction it claims
    measured: float | None
    interval: Interval | None
    seeds: int  # how many seeds `measured` is the mean of
    verdict: str
    rule: str

    def __post_init__(self):
        if self.verdict not in VERDICTS:
            raise ValueError(f"claim {self.id!r} has the verdict {self.verdict!r}; there are {VERDICTS}")


class Outcome(NamedTuple):
    """What a rule found: the last fields of a `Claim`."""

    measured: float | None
    interval: Interval | None
    seeds: int
    verdict: str
    rule: str


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, Interval | None]:
    """Mean over seeds with its Student t interval; None as the interval of a single value."""
    from scipy.special import stdtrit  # the t quantile; scipy.stats would take a second to import

    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if values.size < 2:
        return mean, None
    half = float(stdtrit(values.size - 1, 0.5 + level / 2) * values.std(ddof=1) / math.sqrt(values.size))
    return mean, (mean - half, mean + half)


def interval(values) -> dict[str, float | None]:
    """Mean and 95 % t interval over seeds, as columns of a table; NaN and infinities stay out."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return {"mean": None, "low": None, "high": None}
    mean, bounds = mean_interval(values)
    return {"mean": mean, "low": bounds and bounds[0], "high": bounds and bounds[1]}


def named(name: str, values, least: float = -np.inf, most: float = np.inf) -> dict[str, float | None]:
    """`interval` under a name, its bounds within what the quantity can be."""
    columns = interval(values)
    low, high = (None if columns[k] is None else float(np.clip(columns[k], least, most)) for k in ("low", "high"))
    return {name: columns["mean"], f"{name}_low": low, f"{name}_high": high}


def proportion(name: str, values) -> dict[str, float | None]:
    return named(name, values, 0.0, 1.0)


def greater_than(values: Sequence[float], bound: float, interval: Interval | None = None) -> Outcome:
    """Is the mean over seeds above `bound`? `interval` replaces the one over seeds (say, a bootstrap)."""
    return _compare(values, interval, f"> {bound:g}", lambda low, high: low > bound)


def less_than(values: Sequence[float], bound: float, interval: Interval | None = None) -> Outcome:
    """Is the mean over seeds below `bound`?"""
    return _compare(values, interval, f"< {bound:g}", lambda low, high: high < bound)


def within(values: Sequence[float], low: float, high: float, interval: Interval | None = None) -> Outcome:
    """Is the mean over seeds between `low` and `high`? The rule for claims of "no effect", with a margin."""
    return _compare(values, interval, f"in [{low:g}, {high:g}]", lambda a, b: low <= a and b <= high)


def increasing(values_SX: Sequence[Sequence[float]], min_rank: float = 0.9, saturates: float | None = None) -> Outcome:
    """Does a quantity rise along X ordered settings (blocks, sizes)? `values_SX` has a row a seed.

    Measured is last minus first. Supported if its interval is above 0 and the mean curve keeps the order: Spearman
    correlation with the position at least `min_rank` (1 allows no step down). For quantities that saturate, where the
    rank of ties is chance, `saturates` says instead by how much a step of the mean curve may go down.
    """
    from scipy import stats

    values_SX = np.asarray(values_SX, np.float64)
    if values_SX.ndim != 2 or values_SX.shape[1] < 2:
        raise ValueError(f"values_SX needs the shape [seeds, at least 2 settings], not {values_SX.shape}")
    order = f"Spearman correlation of the mean curve with the order of the settings >= {min_rank:g}"
    if saturates is not None:
        order = f"no step of the mean curve down by more than {saturates:g}"
    outcome = greater_than(values_SX[:, -1] - values_SX[:, 0], 0.0)
    rule = f"last minus first: {outcome.rule}; and {order}"
    if not np.isfinite(values_SX).all() or not values_SX.size:
        return not_tested(rule, len(values_SX))
    curve = values_SX.mean(axis=0)
    if saturates is not None:
        least = round(float(np.diff(curve).min()), 9)
        verdict = SUPPORTED if outcome.verdict == SUPPORTED and least >= -saturates else NOT_SUPPORTED
        return outcome._replace(verdict=verdict, rule=f"{rule} (found {least:.3g})")
    rank = stats.spearmanr(np.arange(curve.size), curve).statistic if np.ptp(curve) > 0 else 0.0
    rank = round(rank, 9)  # a perfect order is 1, not 1 minus the last bit
    verdict = SUPPORTED if outcome.verdict == SUPPORTED and rank >= min_rank else NOT_SUPPORTED
    return outcome._replace(verdict=verdict, rule=f"{rule} (found {rank:.3g})")


def not_tested(reason: str, seeds: int = 0) -> Outcome:
    """The outcome of a claim that this run has no numbers for."""
    return Outcome(None, None, seeds, NOT_TESTED, reason)


def _compare(values, interval, bound: str, holds) -> Outcome:
    values = np.asarray(values, np.float64).reshape(-1)
    given = interval is not None
    what = (
        "the whole given interval"
        if given
        else "the whole 95% t interval over seeds"
        if values.size > 1
        else "the value"
    )
    rule = f"{what} is {bound}"
    if not values.size or not np.isfinite(values).all() or (given and not np.isfinite(interval).all()):
        return not_tested(rule, values.size)
    mean, over_seeds = mean_interval(values)
    interval = (float(interval[0]), float(interval[1])) if given else over_seeds
    verdict = SUPPORTED if holds(*(interval or (mean, mean))) else NOT_SUPPORTED
    return Outcome(mean, interval, values.size, verdict, rule)
