"""Planted dictionaries: rows that are sparse sums of known directions, to score sparse dictionaries against the truth.

    x = mean + sum_x g_x scale_x direction_x + noise_std * normal

Latent x is active (g_x > 0) with its own probability, independently of the others; its coefficient g_x is drawn from
one distribution, and `scale_x` makes the latents unequal. A dictionary has recovered the world when its decoder has the
directions and its codes the coefficients.

A planted evolution is such a world seen at H snapshots of a training run. The rows have the same coefficients at every
snapshot, while strengths and directions have a history:

    x_h = mean_h + sum_x g_x scale_x strength_hx direction_hx + noise_std * normal

Letters: X true latents, D width, N rows, H snapshots.
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
    direction_key, scale_key, mean_key = jax.random.split(key, 3)
    directions_XD = _directions(direction_key, cfg.latents, cfg)
    mean_D = _unit(jax.random.normal(mean_key, (cfg.width,))) * np.float32(cfg.offset)
    return World(directions_XD, jnp.asarray(probabilities(cfg), jnp.float32), _scales(scale_key, cfg), mean_D)


def _unit(v_D: jax.Array) -> jax.Array:
    return v_D / jnp.linalg.norm(v_D, axis=-1, keepdims=True)


def _directions(key: jax.Array, count: int, cfg: PlantedConfig) -> jax.Array:
    if cfg.orthogonal:
        return jax.random.orthogonal(key, cfg.width)[:count]
    return _unit(jax.random.normal(key, (count, cfg.width)))


def _scales(key: jax.Array, cfg: PlantedConfig) -> jax.Array:
    log_low, log_high = np.log(cfg.scale_low), np.log(cfg.scale_high)
    uniform_X = jax.random.uniform(key, (cfg.latents,))
    return jnp.exp(uniform_X * np.float32(log_high - log_low) + np.float32(log_low))


def _coefficients(key: jax.Array, active_NX: jax.Array, cfg: PlantedConfig) -> jax.Array:
    if cfg.coefficients == "uniform":
        g_NX = jax.random.uniform(key, active_NX.shape, minval=cfg.low, maxval=cfg.high)
    else:
        g_NX = jnp.abs(jax.random.normal(key, active_NX.shape))
    return jnp.where(active_NX, g_NX, 0.0)


def sample(key: jax.Array, world: World, cfg: PlantedConfig, rows: int) -> tuple[jax.Array, jax.Array]:
    """Rows `x` [N, D] and their true coefficients `g` [N, X] (without the scale), float32."""
    X, D = world.directions.shape
    active_key, g_key, noise_key = jax.random.split(key, 3)
    active_NX = jax.random.uniform(active_key, (rows, X)) < world.probability[None]
    g_NX = _coefficients(g_key, active_NX, cfg)
    clean_ND = jnp.matmul(g_NX * world.scale[None], world.directions, precision=jax.lax.Precision.HIGHEST)
    noise_ND = jax.random.normal(noise_key, (rows, D)) * np.float32(cfg.noise)
    return clean_ND + world.mean[None] + noise_ND, g_NX


def coherence(directions_XD: jax.Array) -> jax.Array:
    """The largest |cosine| of two different unit directions: 0 for orthogonal ones."""
    gram_XX = jnp.matmul(directions_XD, directions_XD.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(jnp.eye(len(directions_XD), dtype=bool), 0.0, jnp.abs(gram_XX)).max()


# --- an evolution ----------------------------------------------------------------------------------------------------

GROUPS = ("persistent", "emergent", "decaying", "transient", "rotating", "exclusive", "weak", "paired", "partner")
_EXCLUSIVES = ("snapshot", "side")


def log_steps(snapshots: int) -> tuple[int, ...]:
    """0, 1, 2, 4, 8, ...: that many training steps."""
    return (0, *(2**i for i in range(snapshots - 1)))


@dataclass(frozen=True)
class EvolutionConfig:
    """Latents with a history; static under `jit`. All numbers are ours.

    A change of strength or direction is a sigmoid in t = log2(1 + step) of width `width`, centred half-way (in t)
    between two neighbouring snapshots that are drawn with equal chances, so `width` far below their distance is a
    step. The strength of a latent is 1 where it is largest. With s a sigmoid that rises:

        persistent  1; the latents of `world` that no other group takes
        emergent    s
        decaying    1 - s
        transient   s (1 - s'), s' later than s
        rotating    1, while the direction turns by an angle in [angle_low, angle_high] degrees, in the plane of its own
                    direction and of one more random one
        exclusive   1 in one random snapshot (`exclusives="snapshot"`) or on one random side of a random snapshot
                    ("side"), else 0; no sigmoid
        weak        1 on one random side of a random snapshot, `weak_strength` on the other; no sigmoid
        paired      1
        partner     1 on one random side of a random snapshot, 0 on the other; no sigmoid. In a share `together` of the
                    rows a partner is active exactly when its paired latent is, else independently of it
    """

    world: PlantedConfig = PlantedConfig(latents=128, width=64, zipf=0.5, scale_low=0.5, scale_high=2.0)
    steps: tuple[int, ...] = log_steps(12)  # of the H snapshots, rising
    emergent: int = 24  # latents of the group
    decaying: int = 8
    transient: int = 8
    rotating: int = 8
    exclusive: int = 8
    weak: int = 8
    pairs: int = 8  # of a paired latent and its partner
    width: float = 0.25  # of the sigmoids, in doublings of the step
    angle_low: float = 45.0
    angle_high: float = 90.0
    exclusives: str = "snapshot"
    weak_strength: float = 0.2
    together: float = 0.5

    def __post_init__(self):
        for name in ("emergent", "decaying", "transient", "rotating", "exclusive", "weak", "pairs"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise InputError(f"config field {name} is {getattr(self, name)!r}; it must be an integer from 0")
        steps = self.steps
        rising = isinstance(steps, tuple) and all(a < b for a, b in zip(steps[:-1], steps[1:], strict=True))
        if not rising or len(steps) < 2 or steps[0] < 0:
            raise InputError(f"config field steps is {steps}; give a tuple of two or more rising training steps from 0")
        if self.exclusives not in _EXCLUSIVES:
            raise InputError(f"config field exclusives is {self.exclusives!r}; choose one of {', '.join(_EXCLUSIVES)}")
        if self.transient and len(steps) < 3:
            raise InputError("transient latents rise and fall between snapshots; give three or more steps")
        if not self.width > 0:
            raise InputError(f"config field width is {self.width!r}; it must be positive")
        if not 0 < self.angle_low <= self.angle_high <= 180:
            raise InputError("config fields angle_low, angle_high must be in order and in (0, 180] degrees")
        if not 0 < self.weak_strength < 1:
            raise InputError(f"config field weak_strength is {self.weak_strength!r}; it must be in (0, 1)")
        if not 0 <= self.together <= 1:
            raise InputError(f"config field together is {self.together!r}; it must be in [0, 1]")
        X, D, taken = self.world.latents, self.world.width, sum(self.counts[1:])
        if taken > X:
            raise InputError(f"the groups take {taken} latents of {X}; raise world.latents or plant fewer")
        if self.rotating and D < 2:
            raise InputError("latents cannot rotate in one dimension; raise world.width")
        if self.world.orthogonal and X + self.rotating > D:
            raise InputError(
                f"{X} directions and {self.rotating} to rotate to cannot be orthogonal in {D} dimensions; widen them"
            )

    @property
    def counts(self) -> tuple[int, ...]:
        """Latents of each of `GROUPS`."""
        taken = (self.emergent, self.decaying, self.transient, self.rotating, self.exclusive, self.weak)
        taken = (*taken, self.pairs, self.pairs)
        return (self.world.latents - sum(taken), *taken)


class Evolution(NamedTuple):
    """The truth. The latents lie group by group, in the order of `GROUPS`."""

    directions: jax.Array  # [H, X, D] of norm 1, also where the strength is 0
    strength: jax.Array  # [H, X], the largest of a latent 1
    scale: jax.Array  # [X]; the norm of latent x at snapshot h is scale_x strength_hx
    probability: jax.Array  # [X] of being active in a row, at every snapshot
    group: jax.Array  # [X] int32, index into GROUPS
    first: jax.Array  # [X] int32, the first snapshot with a strength above 1/2: emergence
    until: jax.Array  # [X] int32, the snapshot after the last one with a strength above 1/2; H: it stays
    turn: jax.Array  # [X] int32, the first snapshot past half of the angle; H: it does not rotate
    angle: jax.Array  # [X] degrees between the directions of the first and the last snapshot
    partner_of: jax.Array  # [X] int32, a partner's paired latent; every other latent itself
    mean: jax.Array  # [H, D]


def make_evolution(key: jax.Array, cfg: EvolutionConfig) -> Evolution:
    """Draw an evolution. Frequencies and scales are drawn independently of the groups; those of `probabilities` are
    dealt at random, and the two of a pair share the mean of theirs.
    """
    X, D, H = cfg.world.latents, cfg.world.width, len(cfg.steps)
    keys = iter(jax.random.split(key, 9))
    name = {group: jnp.int32(i) for i, group in enumerate(GROUPS)}
    group_X = np.repeat(np.arange(len(GROUPS), dtype=np.int32), cfg.counts)
    paired = X - 2 * cfg.pairs  # the first of them; their partners are the last `pairs` latents, in the same order
    partner_of_X = np.arange(X, dtype=np.int32)
    partner_of_X[X - cfg.pairs :] = np.arange(paired, paired + cfg.pairs)

    # Where things happen: at snapshot k, between k - 1 and k.
    t_H = np.log2(1.0 + np.asarray(cfg.steps, np.float64))
    middle_H = jnp.asarray(np.concatenate([t_H[:1], (t_H[1:] + t_H[:-1]) / 2]), jnp.float32)
    t_H1 = jnp.asarray(t_H[:, None], jnp.float32)
    last_X = np.where(group_X == GROUPS.index("transient"), H - 1, H).astype(np.int32)  # room for the fall
    at_X = jax.random.randint(next(keys), (X,), 1, last_X)
    later_X = jax.random.randint(next(keys), (X,), at_X + 1, H)
    lone_X = jax.random.randint(next(keys), (X,), 0, H)
    high_X = jax.random.bernoulli(next(keys), 0.5, (X,))  # whether the later side of `at` is the strong one

    def rise(k_X):
        return jax.nn.sigmoid((t_H1 - middle_H[k_X][None]) / np.float32(cfg.width))

    def fall(k_X):  # 1 - rise without the rounding of small values
        return jax.nn.sigmoid((middle_H[k_X][None] - t_H1) / np.float32(cfg.width))

    snapshot_H1 = jnp.arange(H, dtype=jnp.int32)[:, None]
    side_HX = (snapshot_H1 >= at_X[None]) == high_X[None]
    lone_HX = snapshot_H1 == lone_X[None] if cfg.exclusives == "snapshot" else side_HX
    histories = {
        "emergent": rise(at_X),
        "decaying": fall(at_X),
        "transient": rise(at_X) * fall(later_X),
        "exclusive": lone_HX.astype(jnp.float32),
        "weak": jnp.where(side_HX, 1.0, np.float32(cfg.weak_strength)),
        "partner": side_HX.astype(jnp.float32),
    }
    of_HX = jnp.broadcast_to(jnp.asarray(group_X)[None], (H, X))
    strength_HX = jnp.select([of_HX == name[g] for g in histories], list(histories.values()), jnp.ones((H, X)))
    strength_HX = strength_HX / strength_HX.max(0, keepdims=True)

    # Rotation: from the first to the last snapshot by exactly the angle, however wide the sigmoid.
    drawn_YD = _directions(next(keys), X + cfg.rotating, cfg.world)
    directions_XD = drawn_YD[:X]
    rotating_X = group_X == GROUPS.index("rotating")
    degrees_X = jax.random.uniform(next(keys), (X,), minval=cfg.angle_low, maxval=cfg.angle_high)
    angle_X = jnp.where(rotating_X, degrees_X, 0.0)
    turned_HX = rise(at_X)
    turned_HX = (turned_HX - turned_HX[:1]) / (turned_HX[-1:] - turned_HX[:1])
    phi_HX1 = (turned_HX * (angle_X * np.float32(np.pi / 180))[None])[:, :, None]
    aim_XD = jnp.zeros((X, D)).at[np.flatnonzero(rotating_X)].set(drawn_YD[X:])
    aim_XD = aim_XD - (aim_XD * directions_XD).sum(-1, keepdims=True) * directions_XD
    aim_XD = jnp.where(rotating_X[:, None], _unit(jnp.where(rotating_X[:, None], aim_XD, 1.0)), 0.0)
    directions_HXD = jnp.cos(phi_HX1) * directions_XD[None] + jnp.sin(phi_HX1) * aim_XD[None]

    probability_X = jax.random.permutation(next(keys), jnp.asarray(probabilities(cfg.world), jnp.float32))
    mean_P = (probability_X[paired : paired + cfg.pairs] + probability_X[paired + cfg.pairs :]) / 2
    probability_X = jnp.concatenate([probability_X[:paired], mean_P, mean_P])

    above_HX = strength_HX > 0.5
    return Evolution(
        directions=directions_HXD,
        strength=strength_HX,
        scale=_scales(next(keys), cfg.world),
        probability=probability_X,
        group=jnp.asarray(group_X),
        first=jnp.argmax(above_HX, axis=0).astype(jnp.int32),
        until=H - jnp.argmax(above_HX[::-1], axis=0).astype(jnp.int32),
        turn=jnp.where(rotating_X, jnp.argmax(turned_HX > 0.5, axis=0).astype(jnp.int32), H),
        angle=angle_X,
        partner_of=jnp.asarray(partner_of_X),
        mean=_unit(jax.random.normal(next(keys), (H, D))) * np.float32(cfg.world.offset),
    )


def sample_evolution(
    key: jax.Array, evolution: Evolution, cfg: EvolutionConfig, rows: int
) -> tuple[jax.Array, jax.Array]:
    """Rows `x` [N, H, D] at every snapshot and their true coefficients `g` [N, X] (without scale and strength),
    float32. Row n has the same coefficients at all snapshots; the noise is independent.
    """
    H, X, D = evolution.directions.shape
    active_key, g_key, noise_key, pair_key = jax.random.split(key, 4)
    uniform_NX = jax.random.uniform(active_key, (rows, X))
    if cfg.pairs:
        # With its paired latent's number a partner is active when that one is, and as often as ever.
        same_NX = jax.random.bernoulli(pair_key, np.float32(cfg.together), (rows, X))
        uniform_NX = jnp.where(same_NX, uniform_NX[:, evolution.partner_of], uniform_NX)
    g_NX = _coefficients(g_key, uniform_NX < evolution.probability[None], cfg.world)
    weighted_HXD = evolution.directions * (evolution.strength * evolution.scale[None])[:, :, None]
    clean_NHD = jnp.einsum("nx,hxd->nhd", g_NX, weighted_HXD, precision=jax.lax.Precision.HIGHEST)
    noise_NHD = jax.random.normal(noise_key, (rows, H, D)) * np.float32(cfg.world.noise)
    return clean_NHD + evolution.mean[None] + noise_NHD, g_NX
