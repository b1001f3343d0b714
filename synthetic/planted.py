"""Planted dictionaries: rows that are sparse sums of known directions, to score sparse dictionaries against the truth.

    x = mean + sum_x g_x scale_x direction_x + noise_std * normal

Latent x is active (g_x > 0) with its own probability, independently of the others; its coefficient g_x is drawn from
one distribution, and `scale_x` makes the latents unequal. A dictionary has recovered the world when its decoder has the
directions and its codes the coefficients.

Letters: X true latents, D width, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert6_jax.errors import InputError

_CHOICES = {"coefficients": ("half_normal", "uniform"), "probabilities": ("zipf", "uniform")}


@dataclass(frozen=True)
class PlantedConfig:
    """A world of sparse latents; static under `jit`."""

    latents: int = 64  # X
    width: int = 32  # D
    active: float = 4.0  # mean active latents of a row
    coefficients: str = "uniform"  # g in [low, high]; half_normal: |normal(0, 1)|
    low: float = 0.5
    high: float = 1.5
    probabilities: str = "zipf"  # proportional to 1 / rank^zipf; uniform: all alike
    zipf: float = 1.0
    scale_low: float = 1.0  # scales are log-uniform in [scale_low, scale_high]
    scale_high: float = 1.0
    noise: float = 0.0  # standard deviation in every dimension
    offset: float = 0.0  # norm of the mean, in a random direction
    orthogonal: bool = False  # directions at right angles (X <= D), else random

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"config field {name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        for name in ("latents", "width"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"config field {name} is {getattr(self, name)!r}; it must be a positive integer")
        for name in ("zipf", "noise", "offset"):
            if not getattr(self, name) >= 0:
                raise InputError(f"config field {name} is {getattr(self, name)!r}; it must not be negative")
        for low, high in (("low", "high"), ("scale_low", "scale_high")):
            if not 0 < getattr(self, low) <= getattr(self, high):
                raise InputError(f"config fields {low}, {high} must be positive and in order")
        if self.orthogonal and self.latents > self.width:
            raise InputError(f"{self.latents} directions cannot be orthogonal in {self.width} dimensions; widen them")
        if not 0 < self.active or probabilities(self).max() > 1:
            raise InputError(
                f"{self.active} active latents of {self.latents} need a probability outside (0, 1]; lower `active` or "
                "`zipf`, or plant more latents"
            )


class World(NamedTuple):
    """The truth."""

    directions: jax.Array  # [X, D] of norm 1
    probability: jax.Array  # [X] of being active in a row
    scale: jax.Array  # [X]
    mean: jax.Array  # [D]


def probabilities(cfg: PlantedConfig) -> np.ndarray:
    """How often each latent is active, `[X]` float64, falling; they sum to `active`."""
    rank_X = np.arange(1, cfg.latents + 1, dtype=np.float64)
    weight_X = rank_X ** -(cfg.zipf if cfg.probabilities == "zipf" else 0.0)
    return cfg.active * weight_X / weight_X.sum()


def make(key: jax.Array, cfg: PlantedConfig) -> World:
    """Draw a world."""
    X, D = cfg.latents, cfg.width
    direction_key, scale_key, mean_key = jax.random.split(key, 3)
    if cfg.orthogonal:
        directions_XD = jax.random.orthogonal(direction_key, D)[:X]
    else:
        directions_XD = _unit(jax.random.normal(direction_key, (X, D)))
    log_low, log_high = np.log(cfg.scale_low), np.log(cfg.scale_high)
    scale_X = jnp.exp(jax.random.uniform(scale_key, (X,)) * np.float32(log_high - log_low) + np.float32(log_low))
    mean_D = _unit(jax.random.normal(mean_key, (D,))) * np.float32(cfg.offset)
    return World(directions_XD, jnp.asarray(probabilities(cfg), jnp.float32), scale_X, mean_D)


def _unit(v_D: jax.Array) -> jax.Array:
    return v_D / jnp.linalg.norm(v_D, axis=-1, keepdims=True)


def sample(key: jax.Array, world: World, cfg: PlantedConfig, rows: int) -> tuple[jax.Array, jax.Array]:
    """Rows `x` [N, D] and their true coefficients `g` [N, X] (without the scale), float32."""
    X, D = world.directions.shape
    active_key, g_key, noise_key = jax.random.split(key, 3)
    active_NX = jax.random.uniform(active_key, (rows, X)) < world.probability[None]
    if cfg.coefficients == "uniform":
        g_NX = jax.random.uniform(g_key, (rows, X), minval=cfg.low, maxval=cfg.high)
    else:
        g_NX = jnp.abs(jax.random.normal(g_key, (rows, X)))
    g_NX = jnp.where(active_NX, g_NX, 0.0)
    clean_ND = jnp.matmul(g_NX * world.scale[None], world.directions, precision=jax.lax.Precision.HIGHEST)
    noise_ND = jax.random.normal(noise_key, (rows, D)) * np.float32(cfg.noise)
    return clean_ND + world.mean[None] + noise_ND, g_NX


def coherence(directions_XD: jax.Array) -> jax.Array:
    """The largest |cosine| of two different unit directions: 0 for orthogonal ones."""
    gram_XX = jnp.matmul(directions_XD, directions_XD.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(jnp.eye(len(directions_XD), dtype=bool), 0.0, jnp.abs(gram_XX)).max()
