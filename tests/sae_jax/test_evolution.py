"""Evolution of a crosscoder's features against hand-made curves, brute-force NumPy and scipy."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bert6_jax.errors import InputError
from sae_jax import dictionary, evolution
from sae_jax.config import DictionaryConfig
from sae_jax.evolution import CLASSES, LifeCycle

H, F, D, B = 4, 7, 5, 60
STEPS = np.array([0, 100, 1000, 5000])


def decoders(seed=0, dead=((1, 2), (0, 5), (1, 5), (2, 5), (3, 5))):
    W = np.random.default_rng(seed).normal(size=(H, F, D)).astype(np.float32)
    for h, f in dead:  # latent 2 is dead at one snapshot, latent 5 everywhere
        W[h, f] = 0.0
    return W


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) if a.any() and b.any() else 0.0


# --- trajectories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [3, 7, 100])
def test_trajectories_equal_loops_and_dead_snapshots_are_flagged(block):
    W, scale = decoders(), np.array([1.0, 2.0, 0.5, 4.0], np.float32)
    t = evolution.trajectories(W, scale, block=block)
    assert all(np.isfinite(leaf).all() for leaf in t)
    norm = np.linalg.norm(W.astype(np.float64), axis=-1)
    raw = np.linalg.norm(W.astype(np.float64) / scale[:, None, None], axis=-1)
    dead = norm == 0
    np.testing.assert_array_equal(t.dead_HF, dead)
    np.testing.assert_array_equal(t.turned_IF, ~(dead[1:] | dead[:-1]))
    alive = np.arange(F) != 5
    for found, n in ((t, norm), (t._replace(norm_HF=t.raw_norm_HF), raw)):
        np.testing.assert_allclose(found.norm_HF, n, rtol=1e-6)
    for strength, share, n in ((t.strength_HF, t.share_HF, norm), (t.raw_strength_HF, t.raw_share_HF, raw)):
        np.testing.assert_allclose(strength[:, alive], (n / n.max(0).clip(1e-9))[:, alive], rtol=1e-6)
        np.testing.assert_allclose(share[:, alive], (n / n.sum(0).clip(1e-9))[:, alive], rtol=1e-6)
        assert (strength[:, 5] == 0).all() and (share[:, 5] == 0.25).all()
    above, below = np.zeros((H, H)), np.zeros((H, H))
    for f in range(F):
        for h in range(H):
            for g in range(H):
                c = cosine(W[h, f].astype(np.float64), W[g, f].astype(np.float64))
                np.testing.assert_allclose(t.cosine_FHH[f, h, g], c, atol=1e-6)
                np.testing.assert_allclose(t.inner_FHH[f, h, g], W[h, f] @ W[g, f], atol=1e-5)
                if g == h + 1:
                    rotation = 0.0 if dead[h, f] or dead[g, f] else 1 - c
                    np.testing.assert_allclose(t.rotation_IF[h, f], rotation, atol=1e-6)
                weight = np.sqrt(norm[h, f] * norm[g, f])
                above[h, g] += weight * c
                below[h, g] += weight
    np.testing.assert_allclose(t.mean_cosine_HH, above / below, atol=1e-6)


def test_small_rotations_keep_their_digits():
    angle = 1e-3
    W = np.array([[[1.0, 0.0]], [[np.cos(angle), np.sin(angle)]]], np.float32)
    t = evolution.trajectories(W, np.ones(2, np.float32))
    np.testing.assert_allclose(t.rotation_IF[0, 0], 1 - np.cos(angle), rtol=1e-4)
    np.testing.assert_allclose(2 * np.arcsin(np.sqrt(t.rotation_IF[0, 0] / 2)), angle, rtol=1e-4)
    tiny = evolution.trajectories(np.stack([W[0], W[1] * np.float32(1e-7)]), np.ones(2, np.float32))
    assert bool(tiny.dead_HF[1, 0]) and tiny.rotation_IF[0, 0] == 0 and not bool(tiny.turned_IF[0, 0])


def test_relative_sums_to_one_for_any_number_of_snapshots():
    found = evolution.relative(np.array([[1.0, 0.0], [-3.0, 0.0], [4.0, 0.0]]))
    np.testing.assert_allclose(found.share, np.array([[1, 8 / 3], [3, 8 / 3], [4, 8 / 3]]) / 8, rtol=1e-6)
    np.testing.assert_array_equal(found.empty, [False, True])
    np.testing.assert_array_equal(evolution.relative(np.zeros((2, 3))).share, np.full((2, 3), 0.5))


def test_the_later_of_equal_peaks_wins():
    np.testing.assert_array_equal(evolution.peak_snapshot(np.array([[2.0, 0, 1], [2, 0, 3], [1, 0, 3]])), [1, 2, 2])


# --- life cycle ------------------------------------------------------------------------------------------------------

LONG = np.array([0, 16, 128, 512, 1000, 2000, 8000, 32000])
CURVES = np.array(
    [
        [0, 0, 0, 0, 0, 0, 0, 0],  # never
        [9e-5, 0, 0, 0, 0, 0, 0, 0],  # below the floor: never
        [0.4, 0.4, 0.4, 0.2, 0.04, 0.03, 0, 0],  # decays: threshold 0.04 is not exceeded by 0.04
        [0, 0, 0, 0, 0.05, 0.1, 0.1, 0.1],  # rises
        [0, 0.5, 0, 0, 0.5, 0.5, 0.2, 0.5],  # one early snapshot is not an emergence
        [2e-4, 2e-4, 2e-4, 2e-4, 2e-4, 2e-4, 2e-4, 2e-4],  # rare but always there
    ]
).T


def turned(*degrees):
    """Cosines of latents that stand at these angles at the snapshots."""
    angle = np.radians(np.array(degrees, np.float64))
    return np.cos(angle[:, :, None] - angle[:, None, :])


ANGLES = [[0] * 8, [0] * 8, [0] * 8, [90, 90, 90, 90, 45, 10, 0, 0], [0] * 8, [0, 60, 0, 60, 0, 60, 0, 60]]


def test_life_cycle_of_hand_made_curves():
    norm = np.ones((8, 6))
    norm[:, 3] = [1, 1, 1, 1, 4, 1, 1, 1]
    norm[5, 2] = norm[4, 4] = 0.05  # fires there without weight: not alive
    life = evolution.life_cycle(CURVES, turned(*ANGLES), norm, LONG)
    np.testing.assert_array_equal(life.never_F, [True, True, False, False, False, False])
    np.testing.assert_array_equal(life.first_active_F, [8, 8, 0, 4, 4, 0])
    np.testing.assert_array_equal(life.peak_F, [8, 8, 2, 7, 7, 7])
    np.testing.assert_allclose(life.lifetime_F, [0, 0, 4 / 8, 4 / 8, 5 / 8, 1])
    assert [CLASSES[c] for c in life.class_F] == ["never", "never", "decay", "rise", "rise", "rise"]
    # final rates (median of the last two): 0, 0, 0, 0.1, 0.35, 2e-4
    # latent 3: rate 0.05 at snapshot 4 is off; at 5 the angle of 10 degrees is near (1 - cos = 0.015)
    # latent 4: 0.2 and 0.5 are both farther than 20 % from 0.35; latent 5 turns until the end
    np.testing.assert_array_equal(life.stabilised_F, [8, 8, 8, 5, 8, 7])
    one = 1 - np.cos(np.radians(60))
    # latent 3: pairs 4-5 (35 degrees, weight 2), 5-6 (10 degrees), 6-7 (0)
    drift3 = (2 * (1 - np.cos(np.radians(35))) + (1 - np.cos(np.radians(10)))) / 4
    np.testing.assert_allclose(life.drift_F, [np.nan, np.nan, 0, drift3, 0, one], atol=1e-12)
    # baseline 0, 16, 128: latent 3 from 4 on; 4 has mean 1/6, std 0.2357, threshold 0.874; 2 and 5 do not exceed theirs
    np.testing.assert_array_equal(life.prospective_F, [8, 8, 8, 4, 8, 8])
    expected = CURVES > 1e-4
    expected[5, 2] = expected[4, 4] = False
    np.testing.assert_array_equal(life.alive_HF, expected)
    curves = life.curves
    np.testing.assert_array_equal(curves.new_H, [2, 0, 0, 0, 2, 0, 0, 0])
    np.testing.assert_array_equal(curves.active_H, expected.sum(1))
    # latents 2 and 4 never turn; 3 turns in pairs 3-4 and 4-5; 5 always
    np.testing.assert_array_equal(curves.stabilising_H, [1, 2, 1, 1, 1, 2, 2, 0])
    np.testing.assert_array_equal(curves.drifting_H, [1, 1, 1, 1, 2, 1, 1, 0])
    np.testing.assert_array_equal(curves.retired_H, [0, 0, 0, 0, 0, 1, 1, 1])


def test_local_stability_wants_three_calm_pairs_once_active():
    rate = np.full((8, 3), 0.2)
    rate[:4, 0] = 0.0  # active from 4 on; silence is calm, but no stability
    rate[:, 1] = [0.2, 0.2, 0.3, 0.2, 0.2, 0.2, 0.2, 0.2]  # pairs 1 and 2 change by 0.1 > 20 % of the median 0.2
    cosines = turned([0] * 8, [0] * 8, [0, 0, 0, 40, 40, 40, 80, 80])
    life = evolution.life_cycle(rate, cosines, np.ones((8, 3)), LONG)
    np.testing.assert_array_equal(life.stabilised_local_F, [4, 3, 8])
    two = evolution.life_cycle(rate, cosines, np.ones((8, 3)), LONG, LifeCycle(local_pairs=2))
    np.testing.assert_array_equal(two.stabilised_local_F, [4, 3, 0])


def test_life_cycle_settings_and_small_cases():
    rate = np.array([[0.0], [0.5], [0.0], [0.5]])
    cosines, norm = np.ones((1, 4, 4)), np.ones((4, 1))
    assert evolution.life_cycle(rate, cosines, norm, STEPS).first_active_F[0] == 4
    one = evolution.life_cycle(rate, cosines, norm, STEPS, LifeCycle(m=1))
    assert one.first_active_F[0] == 1 and one.peak_F[0] == 3 and one.stabilised_F[0] == 3
    assert evolution.life_cycle(rate, cosines, norm, STEPS, LifeCycle(m=5)).first_active_F[0] == 4
    late = evolution.life_cycle(rate, cosines, norm, STEPS, LifeCycle(boundary_step=9000))
    assert CLASSES[late.class_F[0]] == "decay" and CLASSES[one.class_F[0]] == "rise"
    # no snapshot up to step 128: the first two are the baseline, mean and std 0.25
    assert evolution.life_cycle(rate, cosines, norm, STEPS + 200, LifeCycle(m=1, sigmas=0.5)).prospective_F[0] == 1
    assert evolution.life_cycle(rate, cosines, norm, STEPS + 200, LifeCycle(m=1)).prospective_F[0] == 4
    dead_end = cosines.copy()
    dead_end[:, 3] = dead_end[:, :, 3] = 0.0  # no direction at the end: nothing settles
    assert evolution.life_cycle(np.ones((4, 1)), cosines, norm, STEPS).stabilised_F[0] == 0
    assert evolution.life_cycle(np.ones((4, 1)), dead_end, norm, STEPS).stabilised_F[0] == 4


def test_bad_input_to_the_life_cycle_is_one_line():
    rate, cosines, norm = np.ones((4, 2)), np.ones((2, 4, 4)), np.ones((4, 2))
    for arguments, words in (
        ((rate, cosines, norm[:, :1], STEPS), "give the norms as"),
        ((rate, cosines[:1], norm, STEPS), "give the norms as"),
        ((rate, cosines, norm, STEPS[::-1]), "rising"),
        ((rate, cosines, norm, STEPS[:3]), "training steps"),
        ((rate[:1], cosines[:, :1, :1], norm[:1], STEPS[:1]), "at least 2"),
        ((rate * np.nan, cosines, norm, STEPS), "firing rates hold NaN"),
        ((rate, cosines * np.nan, norm, STEPS), "decoder cosines hold NaN"),
        ((rate[0], cosines, norm, STEPS), "2 axes"),
    ):
        with pytest.raises(InputError, match=words):
            evolution.life_cycle(*arguments)
    for setting in ({"m": 0}, {"alpha": -0.1}, {"local_pairs": 1.5}):
        with pytest.raises(InputError, match=next(iter(setting))):
            LifeCycle(**setting)
    assert dataclasses.asdict(LifeCycle())["delta"] == 0.05


# --- turning point ---------------------------------------------------------------------------------------------------


def test_turning_point_of_planted_turns():
    rng = np.random.default_rng(0)
    rotation = 0.1 + 0.02 * rng.random((9, 200))
    rotation[4, :150] += 0.5
    found = evolution.turning_point(rotation, resamples=200)
    assert (found.at, found.low, found.high) == (4, 4, 4) and found.share_I[4] == 1.0
    np.testing.assert_allclose(found.curve_I, rotation.mean(1))
    others = rotation.mean(1)[[0, 1, 2, 6, 7, 8]]
    np.testing.assert_allclose(found.ratio, found.curve_I[4] / np.median(others))
    np.testing.assert_allclose(found.z, (found.curve_I[4] - others.mean()) / others.std())
    flat = np.zeros((3, 4))
    flat[[0, 2], [0, 1]] = 1.0  # two latents, two equal peaks: resamples fall on both sides
    split = evolution.turning_point(flat, resamples=500, seed=3)
    assert (split.at, split.low, split.high) == (0, 0, 2) and 0.4 < split.share_I[2] + split.share_I[0] <= 1.0
    assert 0.1 < split.share_I[2] < 0.5 and np.isnan(split.z)
    assert evolution.turning_point(flat, resamples=500, seed=3).share_I.tolist() == split.share_I.tolist()


def test_bootstrap_equals_resampling_by_hand():
    rng = np.random.default_rng(1)
    rotation, use = rng.random((5, 11)), rng.random((5, 11)) < 0.7
    found = evolution.turning_point(rotation, use_IF=use, resamples=100, seed=9)
    again, peaks = np.random.default_rng(9), []
    for _ in range(100):
        at = again.integers(0, 11, 11)
        peaks.append(np.nanargmax([rotation[i, at][use[i, at]].mean() for i in range(5)]))
    np.testing.assert_allclose(found.share_I, np.bincount(peaks, minlength=5) / 100)
    assert found.low <= np.median(peaks) <= found.high
    np.testing.assert_allclose(found.curve_I, [rotation[i][use[i]].mean() for i in range(5)])


def test_masked_latents_and_wide_intervals():
    rotation = np.array([[0.5, 9.0], [0.4, 9.0], [0.1, 9.0]])
    use = np.array([[True, False]] * 3)
    found = evolution.turning_point(rotation, use_IF=use)
    np.testing.assert_allclose(found.curve_I, [0.5, 0.4, 0.1])
    assert found.at == 0
    steps = np.expm1([0.0, 5.0, 6.0, 7.0])  # log lengths 5, 1, 1
    rate = evolution.turning_point(rotation, steps, use_IF=use, per_log_step=True)
    np.testing.assert_allclose(rate.curve_I, [0.1, 0.4, 0.1])
    assert rate.at == 1
    use[1] = False
    gap = evolution.turning_point(rotation, use_IF=use)
    assert np.isnan(gap.curve_I[1]) and gap.at == 0
    for arguments, words in (
        ({"per_log_step": True}, "steps_H"),
        ({"per_log_step": True, "steps_H": [0, 1, 2]}, "training steps"),
        ({"use_IF": use[:2]}, "a mask"),
        ({"use_IF": np.zeros((3, 2), bool)}, "0 values"),
        ({"level": 1.0}, "level"),
    ):
        with pytest.raises(InputError, match=words):
            evolution.turning_point(rotation, **arguments)
    with pytest.raises(InputError, match="rotations hold NaN"):
        evolution.turning_point(rotation * np.nan)


def test_cusum_finds_the_last_interval_of_a_level():
    assert evolution.cusum_peak([0, 0, 0, 1, 1, 1, 1]) == 2
    assert evolution.cusum_peak([2.0, 2.0, 0.0, 0.0, np.nan, 0.0]) == 1


def mmd_by_loops(a, b, use_a, use_b, sigma):
    def mean(p, q, use_p, use_q):
        k = [
            np.exp(-np.square(p[i] - q[j]).sum() / (2 * sigma**2))
            for i in range(len(p))
            for j in range(len(q))
            if i != j and use_p[i] and use_q[j]
        ]
        return np.mean(k)

    return mean(a, a, use_a, use_a) + mean(b, b, use_b, use_b) - 2 * mean(a, b, use_a, use_b)


@pytest.mark.parametrize("width", [1, 3])
def test_distribution_shift_equals_scipy_and_loops(width):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(3, 20, width)) + np.array([0.0, 0.0, 2.0])[:, None, None]
    use = rng.random((3, 20)) < 0.8
    x[~use] = np.nan  # never read
    found = evolution.distribution_shift(x[:, :, 0] if width == 1 else x, use, bandwidth=1.3, projections=5, seed=4)
    assert found.bandwidth == 1.3
    for i in range(2):
        expected = mmd_by_loops(x[i], x[i + 1], use[i], use[i + 1], 1.3)
        np.testing.assert_allclose(found.mmd_I[i], expected, atol=1e-5)
        direction = np.ones((1, 1)) if width == 1 else np.random.default_rng(4).normal(size=(width, 5))
        direction = direction / np.linalg.norm(direction, axis=0)
        a, b = x[i][use[i]] @ direction, x[i + 1][use[i + 1]] @ direction
        distance = [stats.wasserstein_distance(a[:, j], b[:, j]) for j in range(a.shape[1])]
        np.testing.assert_allclose(found.wasserstein_I[i], np.mean(distance), rtol=1e-5)


def test_a_still_population_has_no_shift_and_a_moving_one_has():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(600, 4))
    still = np.stack([x, x, x + 1.0]).astype(np.float32)
    found = evolution.distribution_shift(still)
    assert found.wasserstein_I[0] == 0 and abs(found.mmd_I[0]) < 1e-6
    assert found.mmd_I[1] > 0.05 and found.wasserstein_I[1] > 0.3
    distances = np.linalg.norm(x[:, None] - x[None], axis=-1)
    pooled = evolution.distribution_shift(np.stack([x, x])).bandwidth
    np.testing.assert_allclose(pooled, np.median(distances[distances > 0]), rtol=0.05)
    sampled = evolution.distribution_shift(still, latents=300, bandwidth=found.bandwidth)
    assert sampled.wasserstein_I[0] == 0 and sampled.mmd_I[1] > 0.05
    norms = np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])
    np.testing.assert_allclose(evolution.distribution_shift(norms).wasserstein_I, [1.0], rtol=1e-6)
    nobody = evolution.distribution_shift(norms, np.array([[True] * 3, [False] * 3]))
    assert np.isnan(nobody.wasserstein_I[0]) and np.isnan(nobody.mmd_I[0])
    for arguments, words in (
        ((norms[:1],), "2 snapshots or more"),
        ((norms, np.ones((2, 2), bool)), "a mask"),
        ((norms * np.nan,), "NaN"),
    ):
        with pytest.raises(InputError, match=words):
            evolution.distribution_shift(*arguments)


# --- codes of each snapshot ------------------------------------------------------------------------------------------


def gated_codes(seed=0):
    """Codes of each head [H, B, F], non-negative and sparse; latent 6 never fires."""
    f = np.maximum(np.random.default_rng(seed).normal(size=(H, B, F)) - 0.3, 0).astype(np.float32)
    f[:, :, 6] = 0
    return f


def look_up(f_HBF):
    return lambda h: jnp.asarray(f_HBF)[h]


def in_batches(fn, *arrays):
    """Sums over two batches of one size, the second padded with junk that must not count."""
    half, total = 40, None
    for begin in (0, half):
        valid = np.arange(begin, begin + half) < B
        parts = []
        for array, axis in arrays:
            part = np.take(array, np.arange(begin, min(begin + half, B)), axis)
            pad = [(0, half - part.shape[axis] if i == axis else 0) for i in range(part.ndim)]
            parts.append(np.pad(part, pad, constant_values=np.nan))
        sums = fn(*parts, valid)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    return total


def test_rates_of_each_snapshot_and_peak_codes():
    f = gated_codes()
    sums = in_batches(jax.jit(lambda f, valid: evolution.code_sums(look_up(f), valid, H)), (f, 1))
    assert int(sums.rows) == B
    found = evolution.rates(sums)
    np.testing.assert_allclose(found.rate_HF, (f > 0).mean(1))
    np.testing.assert_allclose(found.mean_HF, f.mean(1), rtol=1e-5)
    peak = np.array([0, 3, 1, 2, 0, 4, 2])  # 4: none, counts as the last
    codes = jax.jit(lambda f, peak: evolution.peak_codes(look_up(f), peak, H))(f, peak)
    for i, p in enumerate(np.minimum(peak, 3)):
        np.testing.assert_array_equal(codes[:, i], f[p, :, i])
    with pytest.raises(InputError, match="no valid row"):
        evolution.rates(evolution.code_sums(look_up(f), np.zeros(B, bool), H))
    with pytest.raises(InputError, match="NaN"):
        evolution.rates(evolution.code_sums(look_up(f * np.float32(np.nan)), np.ones(B, bool), H))


# --- latent scaling --------------------------------------------------------------------------------------------------


@jax.jit
def summed(f, y, xhat, W, peak, valid):
    return evolution.scaling_sums(look_up(f), y, xhat, W, peak, valid)


def beta_by_loops(f, Y, v, peak):
    """Least-squares slope of Y [H, B, F, D] on f_peak v [H, F, D]."""
    out = np.full((H, F), np.nan)
    for h in range(H):
        for i in range(F):
            target = np.outer(f[peak[i], :, i], v[h, i])
            if target.any():
                out[h, i] = (target * Y[h, :, i]).sum() / (target * target).sum()
    return out


@pytest.mark.parametrize("direction", evolution.DIRECTIONS)
def test_scaling_equals_a_regression_of_each_latent(direction):
    rng = np.random.default_rng(5)
    f, W = gated_codes(), decoders()
    y, xhat = (rng.normal(size=(B, H, D)).astype(np.float32) for _ in range(2))
    peak = evolution.peak_snapshot(np.linalg.norm(W, axis=-1))
    sums = in_batches(lambda f, y, xhat, valid: summed(f, y, xhat, W, peak, valid), (f, 1), (y, 0), (xhat, 0))
    found = evolution.scaling(sums, W, peak, direction)
    d = W[peak, np.arange(F)].astype(np.float64)
    v = {"peak": np.broadcast_to(d, W.shape), "own": W}.get(direction)
    if v is None:
        norm = np.linalg.norm(W, axis=-1, keepdims=True)
        v = W / np.where(norm > 0, norm, 1) * np.linalg.norm(d, axis=-1)[None, :, None]
    every = [np.broadcast_to(a.transpose(1, 0, 2)[:, :, None], (H, B, F, D)).astype(np.float64) for a in (y, xhat)]
    error = every[0] - every[1] + f[:, :, :, None] * W[:, None].astype(np.float64)
    for beta, nu, Y in (
        (found.activation_HF, found.nu_activation_HF, every[0]),
        (found.reconstruction_HF, found.nu_reconstruction_HF, every[1]),
        (found.error_HF, found.nu_error_HF, error),
    ):
        expected = beta_by_loops(f, Y, v, peak)
        np.testing.assert_allclose(beta, expected, rtol=1e-3, atol=1e-4)
        at_peak = expected[peak, np.arange(F)]
        with np.errstate(invalid="ignore"):
            np.testing.assert_allclose(nu, np.where(at_peak > 0, expected / at_peak, np.nan), rtol=2e-2, atol=1e-3)
    assert np.isnan(found.error_HF[:, [5, 6]]).all()  # no decoder anywhere; never fires
    assert np.isnan(found.error_HF[1, 2]) == (direction != "peak")  # dead at snapshot 1 only


def test_planted_presence_is_recovered_and_own_contribution_has_beta_one():
    rng = np.random.default_rng(6)
    W = decoders(dead=())
    f = np.maximum(rng.normal(size=(B, F)), 0).astype(np.float32)
    f[np.arange(B), :] *= np.eye(F, dtype=np.float32)[rng.integers(0, F, B)]  # one latent a row: no interference
    peak = evolution.peak_snapshot(np.linalg.norm(W, axis=-1))
    d = W[peak, np.arange(F)]
    presence = rng.random((H, F)).astype(np.float32)
    y = np.einsum("bf,hf,fd->bhd", f, presence, d)
    shared = np.broadcast_to(f, (H, B, F))
    xhat = np.einsum("bf,hfd->bhd", f, W)
    valid = np.ones(B, bool)
    found = evolution.scaling(summed(shared, y, xhat, W, peak, valid), W, peak)
    np.testing.assert_allclose(found.activation_HF, presence, rtol=1e-4)
    np.testing.assert_allclose(found.error_HF, presence, rtol=1e-4, atol=1e-5)  # others write nothing here
    np.testing.assert_allclose(found.nu_activation_HF, presence / presence[peak, np.arange(F)], rtol=1e-4)
    exact = evolution.scaling(summed(shared, xhat, xhat, W, peak, valid), W, peak, "own")
    for beta in (exact.activation_HF, exact.reconstruction_HF, exact.error_HF, exact.nu_error_HF):
        np.testing.assert_allclose(beta, 1.0, rtol=1e-4)
    # turned by any angle and shrunk to a third: still there, for `turned`; its amount is a third
    lengths = np.linalg.norm(W, axis=-1)
    amount = evolution.scaling(summed(shared, xhat, xhat, W, peak, valid), W, peak, "turned")
    np.testing.assert_allclose(amount.nu_activation_HF, lengths / lengths.max(0), rtol=1e-4)


def test_bad_input_to_scaling_is_one_line():
    f, W = gated_codes(), decoders()
    y, peak, valid = np.ones((B, H, D), np.float32), np.zeros(F, int), np.ones(B, bool)
    for bad in ((y[:, :2], y[:, :2], peak), (y, y[:9], peak), (y, y, peak[:3])):
        with pytest.raises(InputError, match="decoders"):
            evolution.scaling_sums(look_up(f), *bad[:2], W, bad[2], valid)
    sums = summed(f, y, y, W, peak, valid)
    with pytest.raises(InputError, match="choose one of peak, own, turned"):
        evolution.scaling(sums, W, peak, "sideways")
    with pytest.raises(InputError, match="decoders"):
        evolution.scaling(sums, W[:, :3], peak)
    with pytest.raises(InputError, match="NaN"):
        evolution.scaling(summed(f, y * np.float32(np.nan), y, W, peak, valid), W, peak)


def test_codes_of_a_dictionary_with_a_gate_per_head_go_through_the_callback():
    cfg = DictionaryConfig(width=D, latents=F, heads=H, k=3, activation="batch_topk", gate="per_head", decoder="free")
    tree = {"params": dictionary.init(jax.random.key(0), cfg), "threshold": jnp.float32(0.1)}
    tree["norm"] = {"mean": jnp.zeros((H, D)), "scale": jnp.ones(H)}
    length = np.array([0.05, 0.1, 0.5, 1.0], np.float32)  # times a code of about 1, against a threshold of 0.1
    tree["params"]["W_dec"] = tree["params"]["W_dec"] * length[:, None, None]
    z = dictionary.encode(tree, jax.random.normal(jax.random.key(1), (B, H, D)), cfg)
    at_head = partial(dictionary.at_head, tree, z, cfg)
    found = evolution.rates(evolution.code_sums(at_head, np.ones(B, bool), H))
    expected = (np.asarray(z)[None] * length[:, None, None] > 0.1).mean(1)
    np.testing.assert_allclose(found.rate_HF, expected)
    assert (np.diff(found.rate_HF.mean(1)) > 0).all()
    np.testing.assert_array_equal(evolution.peak_codes(at_head, np.full(F, 3), H), z)


# --- linear separability ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("block", [1, 3, 100])
def test_separability_counts_pairs(rounded, block):
    rng = np.random.default_rng(7)
    W, y, fires = decoders(), rng.normal(size=(B, H, D)).astype(np.float32), rng.random((B, F)) < 0.3
    if rounded:  # many ties, and both signs of zero
        W, y = np.round(W), np.round(y)
    fires[:, 3], fires[:, 4] = False, True
    found = evolution.separability(y, W, fires, block=block)
    assert np.isnan(found[:, [3, 4]]).all() and (found[:, 5] == 0.5).all()
    for h in range(H):
        for i in (0, 1, 2, 6):
            score = y[:, h].astype(np.float64) @ W[h, i].astype(np.float64)
            apart = score[fires[:, i]][:, None] - score[~fires[:, i]][None]
            np.testing.assert_allclose(found[h, i], (apart > 0).mean() + (apart == 0).mean() / 2, atol=1e-12)
    for bad in ((y[0], W, fires), (y, W[:2], fires), (y, W, fires[:9])):
        with pytest.raises(InputError, match="activations"):
            evolution.separability(*bad)
    with pytest.raises(InputError, match="NaN"):
        evolution.separability(y * np.float32(np.nan), W, fires)


@pytest.mark.parametrize("rank", [True, False])
def test_agreement_of_measures_equals_scipy(rank):
    rng = np.random.default_rng(8)
    a = np.round(rng.random((6, 12)), 1)  # ties
    b, c = a + 0.3 * rng.random((6, 12)), rng.random((6, 12))
    a[0, 0] = b[2, 1] = c[:4, 2] = np.nan
    c[:, 3] = 1.0  # constant: not defined within this latent
    found = evolution.agreement({"norm": a, "rate": b, "auc": c}, rank=rank)
    scipy_r = stats.spearmanr if rank else stats.pearsonr
    use = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    assert found.names == ("norm", "rate", "auc")
    for i, p in enumerate((a, b, c)):
        for j, q in enumerate((a, b, c)):
            np.testing.assert_allclose(found.pooled_XX[i, j], scipy_r(p[use], q[use]).statistic)
            inside = [
                scipy_r(p[use[:, f], f], q[use[:, f], f]).statistic
                for f in range(12)
                if use[:, f].sum() >= 3 and np.ptp(p[use[:, f], f]) > 0 and np.ptp(q[use[:, f], f]) > 0
            ]
            assert found.latents_XX[i, j] == len(inside)
            np.testing.assert_allclose(found.within_XX[i, j], np.mean(inside))
    nothing = evolution.agreement({"a": a * np.nan, "b": b})
    assert np.isnan(nothing.pooled_XX).all() and np.isnan(nothing.within_XX).all() and not nothing.latents_XX.any()
    for measures in ({"norm": a}, {"norm": a, "rate": b[:3]}):
        with pytest.raises(InputError, match="at least two"):
            evolution.agreement(measures)


# --- total dimensionality --------------------------------------------------------------------------------------------


def test_dimensionality_of_orthogonal_antipodal_and_random_latents():
    eye = np.eye(4, dtype=np.float32)
    pairs = np.concatenate([eye[:2], -3 * eye[:1], np.zeros((1, 4), np.float32)])
    found = evolution.dimensionality(np.stack([eye * 7, np.concatenate([eye[:2], -eye[:2]]), pairs]))
    np.testing.assert_allclose(found.D_HF[0], 1.0, rtol=1e-6)
    np.testing.assert_allclose(found.D_HF[1], 0.5, rtol=1e-6)
    np.testing.assert_allclose(found.D_HF[2], [0.1, 1.0, 0.9, 0.0], rtol=1e-6)  # 1 / (1 + 9), 9 / (9 + 1)
    np.testing.assert_allclose(found.share_H, [1.0, 0.5, 0.5], rtol=1e-6)
    W = decoders()
    use = np.random.default_rng(9).random((H, F)) < 0.7
    for mask in (None, use):
        found = evolution.dimensionality(W, mask)
        for h in range(H):
            keep = W[h].astype(np.float64) * (1.0 if mask is None else mask[h][:, None])
            norm = np.linalg.norm(keep, axis=1)
            unit = keep / np.where(norm > 0, norm, 1)[:, None]
            below = np.square(unit @ keep.T).sum(1)
            expected = np.where(norm > 0, norm**2 / np.where(below > 0, below, 1), 0)
            np.testing.assert_allclose(found.D_HF[h], expected, rtol=1e-5)
            np.testing.assert_allclose(found.share_H[h], expected.sum() / D, rtol=1e-5)
        assert (np.asarray(found.share_H) <= 1 + 1e-5).all()


# --- emergence against complexity ------------------------------------------------------------------------------------


def test_correlation_equals_scipy_and_leaves_missing_pairs_out():
    rng = np.random.default_rng(10)
    x = np.round(rng.normal(size=60), 1)
    y = x + rng.normal(size=60)
    x[3] = y[5] = np.nan
    known = np.isfinite(x) & np.isfinite(y)
    found = evolution.correlate(x, y, resamples=3000, permutations=2000)
    np.testing.assert_allclose(found.pearson, stats.pearsonr(x[known], y[known]).statistic)
    np.testing.assert_allclose(found.spearman, stats.spearmanr(x[known], y[known]).statistic)
    assert found.count == 58 and found.pearson_p == found.spearman_p == 1 / 2001
    pair = (x[known], y[known])
    for name, statistic in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        theirs = stats.bootstrap(
            pair,
            lambda a, b, statistic=statistic: statistic(a, b).statistic,
            paired=True,
            vectorized=False,
            n_resamples=1000,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        ours = [getattr(found, f"{name}_{side}") for side in ("low", "high")]
        np.testing.assert_allclose(ours, theirs, atol=0.03)
    assert evolution.correlate(x, y, resamples=50, permutations=50, seed=1) == evolution.correlate(
        x, y, resamples=50, permutations=50, seed=1
    )


def test_permutation_p_is_the_exact_one_for_few_pairs():
    x, y = np.array([1.0, 2.0, 3.0, 4.0, 6.0]), np.array([1.0, 3.0, 2.0, 5.0, 4.0])
    exact = stats.permutation_test(
        (y,), lambda v: stats.pearsonr(x, v).statistic, permutation_type="pairings", n_resamples=np.inf,
        alternative="greater", vectorized=False,
    ).null_distribution  # fmt: skip
    r = stats.pearsonr(x, y).statistic
    found = evolution.correlate(x, y, permutations=40_000, resamples=10)
    np.testing.assert_allclose(found.pearson_p, (np.abs(exact) >= abs(r) - 1e-9).mean(), atol=0.01)
    line = evolution.correlate(np.arange(5.0), np.ones(5))
    assert np.isnan([line.pearson, line.pearson_p, line.spearman_low]).all() and line.count == 5
    for bad, words in (
        ((x, y[:3]), "one length"),
        ((x[:2], y[:2]), "2 known pairs"),
        ((x * np.nan, y), "0 known pairs"),
        ((x * np.inf, y), "infinite"),
    ):
        with pytest.raises(InputError, match=words):
            evolution.correlate(*bad)
    with pytest.raises(InputError, match="one permutation"):
        evolution.correlate(x, y, permutations=0)
