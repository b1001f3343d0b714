"""The rules behind the verdicts, against SciPy and by their meaning."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from experiments.harness.claims import (
    NOT_SUPPORTED,
    NOT_TESTED,
    SUPPORTED,
    Claim,
    greater_than,
    increasing,
    less_than,
    mean_interval,
    not_tested,
    within,
)

values = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=2, max_size=6)


@settings(deadline=None)
@given(values, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_the_interval_is_student_t(seeds, level):
    assume(np.std(seeds) > 1e-6)
    mean, interval = mean_interval(seeds, level)
    expected = stats.t.interval(level, len(seeds) - 1, loc=np.mean(seeds), scale=stats.sem(seeds))
    np.testing.assert_allclose([mean, *interval], [np.mean(seeds), *expected], rtol=1e-9, atol=1e-9)


def test_a_single_seed_has_no_interval():
    assert mean_interval([3.0]) == (3.0, None)
    assert greater_than([3.0], 2) == (3.0, None, 1, SUPPORTED, "the value is > 2")
    assert greater_than([3.0], 3).verdict == NOT_SUPPORTED  # above, not at


@settings(deadline=None)
@given(values, st.floats(-100, 100))
def test_above_and_below_are_mirrors_and_never_both(seeds, bound):
    above, below = greater_than(seeds, bound), less_than(seeds, bound)
    mirrored = less_than([-x for x in seeds], -bound)
    assert (above.verdict, above.measured) == (mirrored.verdict, -mirrored.measured)
    assert not (above.verdict == below.verdict == SUPPORTED)
    assert (above.verdict == SUPPORTED) == (above.interval[0] > bound)


def test_noise_over_seeds_is_not_support():
    assert greater_than([1.0, 1.01, 0.99], 0).verdict == SUPPORTED
    assert greater_than([1.0, 9.0, -4.0], 0).verdict == NOT_SUPPORTED  # the mean is above 0, the interval is not


def test_within_needs_the_whole_interval():
    assert within([0.0, 0.01, -0.01], -0.1, 0.1).verdict == SUPPORTED
    assert within([0.0, 0.3, -0.3], -0.1, 0.1).verdict == NOT_SUPPORTED
    assert within([0.5, 0.51, 0.49], -0.1, 0.1).verdict == NOT_SUPPORTED


def test_an_interval_of_the_caller_replaces_the_one_over_seeds():
    outcome = greater_than([3.0], 2, interval=(np.float32(1.5), np.float32(4.0)))
    assert outcome == (3.0, (1.5, 4.0), 1, NOT_SUPPORTED, "the whole given interval is > 2")
    assert greater_than([3.0], 1, interval=(1.5, 4)).verdict == SUPPORTED


@pytest.mark.parametrize("seeds", [[], [math.nan], [1.0, math.nan], [math.inf]])
def test_what_has_no_number_is_not_tested(seeds):
    for outcome in (greater_than(seeds, 0), less_than(seeds, 0), within(seeds, 0, 1)):
        assert outcome.verdict == NOT_TESTED and outcome.measured is None and outcome.interval is None
    assert greater_than([1.0], 0, interval=(math.nan, 2)).verdict == NOT_TESTED
    assert not_tested("no such data").rule == "no such data"


def test_increasing():
    rise = np.array([[0.04, 0.1, 0.2, 0.31], [0.05, 0.11, 0.19, 0.30], [0.03, 0.1, 0.21, 0.31]])
    outcome = increasing(rise)
    assert outcome.verdict == SUPPORTED and outcome.seeds == 3
    assert outcome.measured == pytest.approx(np.mean(rise[:, -1] - rise[:, 0]))
    assert increasing(rise[:1]).interval is None and increasing(rise[:1]).verdict == SUPPORTED
    assert increasing(rise[:, ::-1]).verdict == NOT_SUPPORTED
    assert increasing(rise[:, [0, 2, 1, 3]]).verdict == NOT_SUPPORTED  # rank correlation 0.8
    assert increasing(rise[:, [0, 2, 1, 3]], min_rank=0.8).verdict == SUPPORTED
    assert increasing(rise[:, [0, 1, 3, 2]], min_rank=1).verdict == NOT_SUPPORTED
    for count in range(2, 40):
        assert increasing([np.sqrt(np.arange(count))], min_rank=1).verdict == SUPPORTED
    assert increasing(np.ones((3, 4))).verdict == NOT_SUPPORTED
    tied = np.array([[0.5, 1.0, 0.999], [0.6, 1.0, 1.0], [0.55, 1.0, 0.998]])  # saturates: its rank is chance
    assert increasing(tied).verdict == NOT_SUPPORTED
    assert increasing(tied, saturates=0.01).verdict == SUPPORTED
    assert increasing(tied, saturates=0.0005).verdict == NOT_SUPPORTED
    assert increasing(np.ones((3, 4)), saturates=0.01).verdict == NOT_SUPPORTED
    assert increasing(tied[:, ::-1], saturates=0.01).verdict == NOT_SUPPORTED
    assert increasing(rise + np.array([[0], [0], [np.nan]])).verdict == NOT_TESTED
    assert increasing(rise * np.array([[1], [-1], [9]])).verdict == NOT_SUPPORTED  # seeds disagree
    with pytest.raises(ValueError, match="shape"):
        increasing([1.0, 2.0])


def test_a_claim_knows_its_verdicts():
    claim = Claim("id", "paper", "statement", 0.31, *greater_than([0.3], 0.1))
    assert (claim.measured, claim.seeds, claim.verdict) == (0.3, 1, SUPPORTED)
    with pytest.raises(ValueError, match="verdict 'maybe'"):
        Claim("id", "paper", "statement", None, 1.0, None, 1, "maybe", "")
