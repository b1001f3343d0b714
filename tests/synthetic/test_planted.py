"""Planted dictionaries: the statistics of the rows are those of the configuration."""

import jax
import numpy as np
import pytest

from bert6_jax.errors import InputError
from synthetic import planted
from synthetic.planted import PlantedConfig

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
