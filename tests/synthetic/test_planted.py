"""Planted dictionaries: the statistics of the rows are those of the configuration."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from bert6_jax.errors import InputError
from synthetic import planted
from synthetic.planted import GROUPS, EvolutionConfig, PlantedConfig

N = 40_000


def draw(cfg, seed=0):
    world = jax.jit(planted.make, static_argnums=1)(jax.random.key(seed), cfg)
    x_ND, g_NX = jax.jit(planted.sample, static_argnums=(2, 3))(jax.random.key(seed + 1), world, cfg, N)
    return jax.device_get((world, x_ND, g_NX))


def test_rows_are_the_planted_sums_and_nothing_else():
    cfg = PlantedConfig(12, 8, active=3.0, scale_low=0.5, scale_high=4.0, noise=0.1, offset=7.0)
    world, x_ND, g_NX = draw(cfg)
    noise_ND = x_ND - world.mean - (g_NX * world.scale) @ world.directions
    np.testing.assert_allclose(np.linalg.norm(world.directions, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(world.mean), 7.0, rtol=1e-5)
    assert world.scale.min() >= 0.5 and world.scale.max() <= 4.0 and world.scale.max() > 2 * world.scale.min()
    np.testing.assert_allclose(noise_ND.std(), 0.1, rtol=0.01)
    assert np.abs(np.corrcoef(noise_ND.T) - np.eye(8)).max() < 5 / np.sqrt(N)


def test_latents_are_active_as_often_as_configured_and_independently():
    cfg = PlantedConfig(12, 8, active=3.0, zipf=0.8)
    world, _, g_NX = draw(cfg)
    active_NX = g_NX > 0
    np.testing.assert_allclose(world.probability[3] / world.probability[0], 4.0**-0.8, rtol=1e-5)
    np.testing.assert_allclose(world.probability.sum(), 3.0, rtol=1e-5)
    np.testing.assert_allclose(active_NX.mean(0), world.probability, atol=4 * 0.5 / np.sqrt(N))
    assert np.abs(np.corrcoef(active_NX.T.astype(np.float64)) - np.eye(12)).max() < 5 / np.sqrt(N)
    uniform = planted.probabilities(PlantedConfig(12, 8, active=3.0, probabilities="uniform"))
    np.testing.assert_allclose(uniform, 0.25)


def test_coefficients_have_the_configured_distribution():
    _, _, g_NX = draw(PlantedConfig(12, 8, active=2.0, low=1.0, high=3.0))
    g_Y = g_NX[g_NX > 0]
    assert 1.0 <= g_Y.min() < 1.01 and 2.99 < g_Y.max() <= 3.0
    np.testing.assert_allclose([g_Y.mean(), g_Y.std()], [2.0, 2 / np.sqrt(12)], rtol=0.01)
    _, _, g_NX = draw(PlantedConfig(12, 8, active=2.0, coefficients="half_normal"))
    np.testing.assert_allclose(g_NX[g_NX > 0].mean(), np.sqrt(2 / np.pi), rtol=0.01)


def test_orthogonal_directions_have_no_coherence():
    world = planted.make(jax.random.key(0), PlantedConfig(6, 8, active=1.0, orthogonal=True))
    assert planted.coherence(world.directions) < 1e-6
    random = jax.device_get(planted.make(jax.random.key(0), PlantedConfig(6, 8, active=1.0)).directions)
    expected = max(abs(random[i] @ random[j]) for i in range(6) for j in range(i))
    np.testing.assert_allclose(planted.coherence(random), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "field, message",
    [
        ({"latents": 0}, "latents is 0"),
        ({"coefficients": "cauchy"}, "choose one of half_normal, uniform"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"low": 2.0}, "low, high must be positive and in order"),
        ({"active": 40.0}, "lower `active`"),
        ({"active": 0.0}, "lower `active`"),
        ({"orthogonal": True}, "64 directions cannot be orthogonal in 32"),
    ],
)
def test_a_world_that_cannot_be_is_refused(field, message):
    with pytest.raises(InputError, match=message):
        PlantedConfig(**field)


# --- an evolution ----------------------------------------------------------------------------------------------------

WORLD = PlantedConfig(60, 24, active=6.0, zipf=0.5, scale_low=0.5, scale_high=4.0, noise=0.1, offset=3.0)
EVOLUTION = EvolutionConfig(WORLD, planted.log_steps(10), 8, 6, 6, 6, 6, 6, 6, width=0.2, together=0.6)
WIDE = dataclasses.replace(EVOLUTION, steps=(0, 100, 110, 500, 1000), width=2.0, exclusives="side")
SMALL = EvolutionConfig(
    PlantedConfig(14, 20, active=3.0, zipf=0.0, orthogonal=True), (0, 1, 2, 4), 1, 1, 1, 6, 0, 2, 1
)  # fewer latents than dimensions
TWO = EvolutionConfig(WORLD, (1000, 2000), transient=0, pairs=4, weak=4, width=0.1, together=1.0)


@functools.cache
def make_evolution(cfg=EVOLUTION):
    return jax.device_get(jax.jit(planted.make_evolution, static_argnums=1)(jax.random.key(0), cfg))


@functools.cache
def sample_evolution(cfg=EVOLUTION, rows=N):
    draw = jax.jit(planted.sample_evolution, static_argnums=(2, 3))
    return jax.device_get(draw(jax.random.key(1), make_evolution(cfg), cfg, rows))


def of(evolution, group):
    return np.flatnonzero(evolution.group == GROUPS.index(group))


def test_every_group_has_its_latents_and_its_history():
    assert EVOLUTION.counts == (10, 8, 6, 6, 6, 6, 6, 6, 6) and EVOLUTION.steps == (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert EVOLUTION == EvolutionConfig(WORLD, EVOLUTION.steps, 8, 6, 6, 6, 6, 6, 6, 0.2, together=0.6)  # static
    world = make_evolution()
    strength = world.strength
    assert [len(of(world, group)) for group in GROUPS] == list(EVOLUTION.counts) and (np.diff(world.group) >= 0).all()
    np.testing.assert_allclose(strength.max(0), 1.0, rtol=1e-6)
    for group in ("persistent", "rotating", "paired"):
        np.testing.assert_array_equal(strength[:, of(world, group)], 1.0)

    def sigmoid(step, k):  # of log2(1 + step), half-way between snapshots k - 1 and k
        before, after = np.log2(1.0 + EVOLUTION.steps[k - 1]), np.log2(1.0 + EVOLUTION.steps[k])
        return 1 / (1 + np.exp(-(np.log2(1.0 + step) - (before + after) / 2) / 0.2))

    for x in np.concatenate([of(world, group) for group in ("emergent", "decaying", "transient")]):
        first, until = int(world.first[x]), int(world.until[x])
        rise = [sigmoid(step, first) if first else 1.0 for step in EVOLUTION.steps]
        fall = [1 - sigmoid(step, until) if until < 10 else 1.0 for step in EVOLUTION.steps]
        curve = np.multiply(rise, fall)
        np.testing.assert_allclose(strength[:, x], curve / curve.max(), rtol=1e-4, atol=1e-7)
    assert (world.first[of(world, "emergent")] > 0).all() and (world.until[of(world, "emergent")] == 10).all()
    assert (world.first[of(world, "decaying")] == 0).all() and (world.until[of(world, "decaying")] < 10).all()
    x = of(world, "transient")
    assert (0 < world.first[x]).all() and (world.first[x] < world.until[x]).all() and (world.until[x] < 10).all()

    np.testing.assert_array_equal((strength[:, of(world, "exclusive")] == 1).sum(0), 1)
    np.testing.assert_array_equal((strength[:, of(world, "exclusive")] == 0).sum(0), 9)
    for group, low in (("weak", np.float32(0.2)), ("partner", 0.0)):
        curves = strength[:, of(world, group)].T
        for curve in curves:  # two values, one change
            assert set(curve.tolist()) == {float(low), 1.0} and (np.diff(curve) != 0).sum() == 1
        assert {float(curve[0]) for curve in curves} == {float(low), 1.0}  # both sides occur
    sides = make_evolution(WIDE)
    curves = sides.strength[:, of(sides, "exclusive")].T
    assert all(set(curve.tolist()) == {0.0, 1.0} and (np.diff(curve) != 0).sum() == 1 for curve in curves)


def test_first_and_until_are_read_off_the_strengths():
    for world in (make_evolution(), make_evolution(WIDE)):  # the wide curves are far from steps
        for x in range(60):
            above = [h for h, value in enumerate(world.strength[:, x]) if value > 0.5]
            assert (world.first[x], world.until[x]) == (above[0], above[-1] + 1)


def test_directions_turn_by_the_angle_in_a_plane_where_they_should():
    world = make_evolution()
    np.testing.assert_allclose(np.linalg.norm(world.directions, axis=-1), 1.0, rtol=1e-5)
    still = np.setdiff1d(np.arange(60), of(world, "rotating"))
    np.testing.assert_array_equal(world.directions[:, still] - world.directions[:1, still], 0.0)
    np.testing.assert_array_equal(world.angle[still], 0.0)
    np.testing.assert_array_equal(world.turn[still], 10)
    for x in of(world, "rotating"):
        path = world.directions[:, x].astype(np.float64)
        angle_H = np.degrees(np.arccos(np.clip(path @ path[0], -1, 1)))
        assert 45 <= world.angle[x] <= 90
        np.testing.assert_allclose(angle_H[-1], world.angle[x], rtol=1e-4)
        assert np.linalg.svd(path, compute_uv=False)[2] < 1e-5  # a plane
        k = world.turn[x]
        assert 0 < k < 10 and angle_H[k - 1] < world.angle[x] / 2 < angle_H[k]
        assert angle_H[k] - angle_H[k - 1] > 0.5 * world.angle[x]  # the sigmoid is narrow
    assert len(set(world.angle[of(world, "rotating")].tolist())) == 6

    world = make_evolution(SMALL)
    for directions_XD in world.directions:  # also while they turn
        np.testing.assert_allclose(directions_XD @ directions_XD.T, np.eye(14), atol=1e-5)


def test_scales_and_frequencies_are_unequal_and_do_not_follow_the_groups():
    world = make_evolution()
    assert 0.5 <= world.scale.min() < 0.8 and 2.5 < world.scale.max() <= 4.0
    expected = planted.probabilities(WORLD)
    np.testing.assert_allclose(world.probability.sum(), 6.0, rtol=1e-5)
    pairs, partners = of(world, "paired"), of(world, "partner")
    np.testing.assert_array_equal(world.probability[pairs], world.probability[partners])
    single = np.setdiff1d(np.arange(60), np.concatenate([pairs, partners]))
    assert np.isclose(world.probability[single][:, None], expected[None], rtol=1e-5).any(1).all()
    assert len(np.unique(world.probability[single])) == 48
    assert abs(np.corrcoef(single, world.probability[single])[0, 1]) < 0.4
    np.testing.assert_array_equal(world.partner_of[partners], pairs)
    np.testing.assert_array_equal(world.partner_of[single], single)
    np.testing.assert_allclose(np.linalg.norm(world.mean, axis=1), 3.0, rtol=1e-5)
    assert len(np.unique(world.mean[:, 0])) == 10


def test_rows_are_the_planted_sums_of_one_set_of_coefficients():
    world = make_evolution()
    x_NHD, g_NX = (v[:2000] for v in sample_evolution())
    noise = np.empty_like(x_NHD)
    for h in range(10):
        clean = sum(
            g_NX[:, x, None] * world.scale[x] * world.strength[h, x] * world.directions[h, x] for x in range(60)
        )
        noise[:, h] = x_NHD[:, h] - clean - world.mean[h]
    np.testing.assert_allclose(noise.std(), 0.1, rtol=0.01)
    assert np.abs(np.corrcoef(noise.reshape(2000, -1).T) - np.eye(240)).max() < 6 / np.sqrt(2000)

    # Without knowing g: every snapshot gives the same coefficients of the latents that are there.
    world = make_evolution(SMALL)
    x_NHD, g_NX = sample_evolution(SMALL, 500)
    for h in range(4):
        there = np.flatnonzero(world.strength[h] > 0)
        weighted = (world.directions[h] * (world.strength[h] * world.scale)[:, None])[there].astype(np.float64)
        found = np.linalg.lstsq(weighted.T, x_NHD[:, h].T.astype(np.float64), rcond=None)[0].T
        strong = world.strength[h, there] > 0.1  # weaker ones drown in the rounding of float32
        np.testing.assert_allclose(found[:, strong], g_NX[:, there[strong]], atol=1e-3)


def test_the_moments_of_the_rows_are_those_of_the_construction():
    world = make_evolution()
    x_NHD, g_NX = sample_evolution()
    p, on = world.probability.astype(np.float64), g_NX > 0
    np.testing.assert_allclose(on.mean(0), p, atol=4.5 * 0.5 / np.sqrt(N))
    # coefficients uniform in [0.5, 1.5]: mean 1, mean square 13 / 12; pairs are active together more often
    both = np.outer(p, p)
    for a, b in zip(of(world, "paired"), of(world, "partner"), strict=True):
        both[a, b] = both[b, a] = 0.6 * p[a] + 0.4 * p[a] ** 2
    seen = (on.T.astype(np.float64) @ on) / N
    np.testing.assert_allclose(seen[~np.eye(60, dtype=bool)], both[~np.eye(60, dtype=bool)], atol=5 * 0.25 / np.sqrt(N))
    covariance = both - np.outer(p, p)
    np.fill_diagonal(covariance, 13 / 12 * p - p**2)
    weighted = (world.directions * (world.strength * world.scale)[:, :, None]).astype(np.float64)
    size = x_NHD.std(0).max() ** 2
    for h, other in ((0, 0), (4, 4), (9, 9), (0, 9), (3, 5)):
        mean = world.mean[h] + p @ weighted[h]
        np.testing.assert_allclose(x_NHD[:, h].mean(0), mean, atol=5 * np.sqrt(size / N))
        expected = weighted[h].T @ covariance @ weighted[other] + 0.01 * (h == other) * np.eye(24)
        left, right = x_NHD[:, h] - x_NHD[:, h].mean(0), x_NHD[:, other] - x_NHD[:, other].mean(0)
        np.testing.assert_allclose(left.T.astype(np.float64) @ right / N, expected, atol=8 * size / np.sqrt(N))


def test_two_snapshots_are_enough_and_pairs_can_be_inseparable():
    world = make_evolution(TWO)
    x_NHD, g_NX = sample_evolution(TWO, 4000)
    assert x_NHD.shape == (4000, 2, 24) and np.isfinite(x_NHD).all()
    assert all(np.isfinite(leaf).all() for leaf in world)
    np.testing.assert_array_equal(world.first[of(world, "emergent")], 1)
    np.testing.assert_array_equal(world.until[of(world, "decaying")], 1)
    np.testing.assert_array_equal(world.turn[of(world, "rotating")], 1)
    paired, partner = g_NX[:, of(world, "paired")], g_NX[:, of(world, "partner")]
    np.testing.assert_array_equal(paired > 0, partner > 0)
    both = paired > 0  # together, but by amounts of their own
    assert np.abs(np.corrcoef(paired[both], partner[both])[0, 1]) < 4 / np.sqrt(both.sum())


def test_without_the_other_groups_nothing_changes():
    cfg = EvolutionConfig(PlantedConfig(6, 4, active=2.0), (0, 8), 0, 0, 0, 0, 0, 0, 0)
    world = make_evolution(cfg)
    x_NHD, g_NX = sample_evolution(cfg, 50)
    np.testing.assert_array_equal(world.strength, 1.0)
    np.testing.assert_array_equal(world.until, 2)
    np.testing.assert_allclose(x_NHD[:, 0], g_NX @ world.directions[0], atol=1e-5)
    np.testing.assert_array_equal(x_NHD[:, 1], x_NHD[:, 0])


@pytest.mark.parametrize(
    "field, message",
    [
        ({"weak": -1}, "weak is -1; it must be an integer from 0"),
        ({"pairs": 1.5}, "pairs is 1.5"),
        ({"emergent": 100}, "the groups take 156 latents of 128; raise world.latents"),
        ({"steps": (0,)}, "two or more rising"),
        ({"steps": (0, 4, 4)}, "two or more rising"),
        ({"steps": [0, 1, 2]}, "give a tuple"),
        ({"steps": (0, 4)}, "transient latents rise and fall"),
        ({"width": 0.0}, "width is 0.0; it must be positive"),
        ({"angle_low": 120.0}, "angle_low, angle_high must be in order"),
        ({"angle_high": 200.0}, "angle_low, angle_high must be in order"),
        ({"exclusives": "both"}, "choose one of snapshot, side"),
        ({"weak_strength": 1.0}, r"weak_strength is 1.0; it must be in \(0, 1\)"),
        ({"together": 1.1}, "together is 1.1"),
        ({"world": PlantedConfig(128, 1)}, "cannot rotate in one dimension"),
        ({"world": PlantedConfig(128, 130, orthogonal=True)}, "128 directions and 8 to rotate to"),
    ],
)
def test_an_evolution_that_cannot_be_is_refused(field, message):
    with pytest.raises(InputError, match=message) as error:
        EvolutionConfig(**field)
    assert "\n" not in str(error.value)
