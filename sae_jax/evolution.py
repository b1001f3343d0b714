"""How the features of a crosscoder over H training snapshots change: trajectories, life cycles, turns, presence.

One head is one snapshot. The decoder norm of a latent at a snapshot is its strength there (arXiv 2509.17196), but the
norm is what was trained, so measures that do not read it stand beside it: latent scaling (2504.02922, here for any
number of snapshots), firing rates of each snapshot, and how well the latent's direction alone tells its firing.

What runs over data is jitted and comes as sums (`code_sums`, `scaling_sums`, added by `jax.tree.map(jnp.add, a, b)`);
what follows them runs once, on the host in float64. Functions over data read codes through a callback

    at_head(h) -> f_BF         functools.partial(dictionary.at_head, tree, z_BF, cfg), or `lambda h: z_BF` if shared

with h a traced int32, so nobody ever holds codes of all heads at once. Activations, reconstructions and decoders are
those of normalised units unless said otherwise; no array is [B, H, F] or larger.

A snapshot at which a decoder is zero has no direction: it is `dead` there, its cosines are 0 and not NaN. "None" in the
place of a snapshot is H, as in github.com/hematteo/learning-to-read-out (below: LRO), whose life cycle this is.

Letters beside those of the package: I intervals between consecutive snapshots (H - 1), N rows of a whole set or paired
values, X measures, resamples or a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import rankdata

from bert6_jax.errors import InputError
from sae_jax.evaluate import ratio

Array = jax.Array | np.ndarray
AtHead = Callable[[jax.Array], jax.Array]  # int32 [] -> [B, F]

CLASSES = ("never", "decay", "rise")
DIRECTIONS = ("peak", "own", "turned")
DEAD = 1e-6  # a decoder at most this share of its latent's largest one has no direction (ours: float32 noise)


def _safe(value):
    """The value, 1 where it is 0: a divisor of what is 0 there anyway."""
    return jnp.where(value == 0, 1.0, value)


def _host(value, what: str, ndim: int) -> np.ndarray:
    """`value` in NumPy, float64, refused where its rank is another or an entry is not finite."""
    value = np.asarray(jax.device_get(value), np.float64)
    if value.ndim != ndim:
        raise InputError(f"{what} of shape {list(value.shape)}; give an array with {ndim} axes")
    if not np.isfinite(value).all():
        raise InputError(f"{what} hold NaN or infinity; check the dictionary and its data with np.isfinite")
    return value


def _dot(spec: str, *operands) -> jax.Array:
    # The default precision of accelerators (TF32, bfloat16) is too coarse for statistics.
    return jnp.einsum(spec, *operands, precision=jax.lax.Precision.HIGHEST)


# --- trajectories ----------------------------------------------------------------------------------------------------


class Relative(NamedTuple):
    share: jax.Array  # [H, ...], sums to 1 over H
    empty: jax.Array  # [...] bool: all values are 0, every share is 1 / H


def relative(value: Array) -> Relative:
    """|v_h| / sum_h |v_h| along the first axis: RelDec of decoder norms, RelIE of effects (arXiv 2509.05291), any H."""
    size = jnp.abs(jnp.asarray(value, jnp.float32))
    total = size.sum(0)
    empty = total == 0
    share = jnp.where(empty[None], 1.0 / size.shape[0], size / _safe(total)[None])
    return Relative(share, empty)


def peak_snapshot(value_HF: Array) -> np.ndarray:
    """The snapshot of the largest value of every latent, int `[F]`; the later of equal ones."""
    value_HF = np.asarray(jax.device_get(value_HF))
    return len(value_HF) - 1 - np.argmax(value_HF[::-1], axis=0)


class Trajectories(NamedTuple):
    """Float32; fields without `raw_` are in normalised units, where a latent's inner products and cosines live too."""

    norm_HF: jax.Array  # |W_dec|
    raw_norm_HF: jax.Array  # |W_dec| / scale: in units of the model's activations, whose norm drifts in training
    strength_HF: jax.Array  # norm / its maximum over snapshots; 0 where all are 0
    raw_strength_HF: jax.Array
    share_HF: jax.Array  # norm / its sum over snapshots (RelDec); 1 / H where all are 0
    raw_share_HF: jax.Array
    inner_FHH: jax.Array  # <d_h, d_g>
    cosine_FHH: jax.Array  # 0 where one of the two is dead
    rotation_IF: jax.Array  # 1 - cos of consecutive snapshots; 0 where one of the two is dead: see `turned_IF`
    turned_IF: jax.Array  # bool, both snapshots of the interval have a direction
    dead_HF: jax.Array  # bool, the decoder has no direction there
    mean_cosine_HH: jax.Array  # mean over latents, weight sqrt(norm_h norm_g); 0 where no latent has both


@partial(jax.jit, static_argnames="block")
def trajectories(W_dec_HFD: jax.Array, scale_H: jax.Array, *, block: int = 1024) -> Trajectories:
    """What the decoders of all snapshots say; `scale_H` is the dictionary's `norm["scale"]`.

    Rotations come from |u - v|^2 / 2, which keeps the digits that 1 - cos loses near 0; the angle is
    2 arcsin(sqrt(rotation / 2)). `block` latents are compared at a time.

    Raises:
      InputError: decoders that are not [H, F, D], or scales that are not [H].
    """
    if W_dec_HFD.ndim != 3 or scale_H.shape != W_dec_HFD.shape[:1]:
        raise InputError(
            f"decoders {list(W_dec_HFD.shape)} with scales {list(scale_H.shape)}; give [heads, latents, width], [heads]"
        )
    H, F, _ = W_dec_HFD.shape
    block = min(block, F)
    W_dec_HFD = W_dec_HFD.astype(jnp.float32)
    norm_HF = jnp.linalg.norm(W_dec_HFD, axis=-1)
    raw_HF = norm_HF / scale_H[:, None]
    dead_HF = norm_HF <= DEAD * norm_HF.max(0)[None]

    def compare(i, found):
        at = jnp.minimum(i * block, F - block)  # the last block overlaps the one before it and writes the same there
        W_HXD, norm_HX, dead_HX = (jax.lax.dynamic_slice_in_dim(v, at, block, 1) for v in (W_dec_HFD, norm_HF, dead_HF))
        unit_HXD = jnp.where(dead_HX[:, :, None], 0.0, W_HXD / _safe(norm_HX)[:, :, None])
        cosine_XHH = jnp.clip(_dot("hxd,gxd->xhg", unit_HXD, unit_HXD), -1.0, 1.0)
        turned_IX = ~(dead_HX[1:] | dead_HX[:-1])
        rotation_IX = jnp.where(turned_IX, jnp.square(unit_HXD[1:] - unit_HXD[:-1]).sum(-1) / 2, 0.0)
        new = (_dot("hxd,gxd->xhg", W_HXD, W_HXD), cosine_XHH, rotation_IX)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(v, n, at, axis)
            for v, n, axis in zip(found, new, (0, 0, 1), strict=True)
        )

    start = (jnp.zeros((F, H, H)), jnp.zeros((F, H, H)), jnp.zeros((H - 1, F)))
    inner_FHH, cosine_FHH, rotation_IF = jax.lax.fori_loop(0, -(-F // block), compare, start)
    root_HF = jnp.sqrt(jnp.where(dead_HF, 0.0, norm_HF))
    weight_HH = _dot("hf,gf->hg", root_HF, root_HF)
    mean_cosine_HH = _dot("hf,gf,fhg->hg", root_HF, root_HF, cosine_FHH) / _safe(weight_HH)
    return Trajectories(
        norm_HF,
        raw_HF,
        *(v / _safe(v.max(0))[None] for v in (norm_HF, raw_HF)),
        *(relative(v).share for v in (norm_HF, raw_HF)),
        inner_FHH,
        cosine_FHH,
        rotation_IF,
        ~(dead_HF[1:] | dead_HF[:-1]),
        dead_HF,
        mean_cosine_HH,
    )


# --- life cycle ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LifeCycle:
    """Settings of `life_cycle`; the values are LRO's."""

    alpha: float = 0.10  # active: rate above this share of the peak rate
    floor: float = 1e-4  # and above this rate
    m: int = 2  # snapshots in a row that an emergence takes
    epsilon: float = 0.20  # stable: rate within this share of the final one
    delta: float = 0.05  # and 1 - cos below this
    alive_norm: float = 0.10  # alive: norm above this share of the median norm of the firing latents
    local_pairs: int = 3  # pairs of snapshots in a row that are locally stable
    curve_pairs: int = 2  # pairs ahead that tell `stabilising` from `drifting`
    baseline_step: int = 128  # the prospective rule's baseline: snapshots up to this step
    sigmas: float = 3.0  # its threshold above the baseline's mean, in standard deviations
    boundary_step: int = 1000  # class decay: the peak lies at this step or before

    def __post_init__(self):
        for name in ("alpha", "floor", "epsilon", "delta", "alive_norm", "sigmas"):
            if not getattr(self, name) >= 0:
                raise InputError(f"life cycle setting {name} is {getattr(self, name)!r}; it must not be negative")
        for name in ("m", "local_pairs", "curve_pairs"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"life cycle setting {name} is {getattr(self, name)!r}; it must be a positive integer")


class Curves(NamedTuple):
    """Numbers of latents at every snapshot, int."""

    new_H: np.ndarray  # first active here
    active_H: np.ndarray  # alive
    stabilising_H: np.ndarray  # alive, and every one of the next `curve_pairs` rotations is below delta
    drifting_H: np.ndarray  # alive and not stabilising; both are 0 at the last snapshot, which no pair follows
    retired_H: np.ndarray  # first active before, and not alive


class Life(NamedTuple):
    """Snapshots are indices, H for none."""

    never_F: np.ndarray  # bool, peak rate below the floor: then everything below is none, 0 or NaN
    first_active_F: np.ndarray  # start of the first m snapshots in a row with rate > max(floor, alpha peak)
    prospective_F: np.ndarray  # the same with the threshold max(floor, mean + 3 std of the baseline)
    peak_F: np.ndarray  # largest rate, the later of equal ones
    lifetime_F: np.ndarray  # float64, share of snapshots that are active
    stabilised_F: np.ndarray  # from here on rate and direction stay near the final ones
    stabilised_local_F: np.ndarray  # start of the first `local_pairs` pairs without much change, once active
    drift_F: np.ndarray  # float64, mean 1 - cos of consecutive snapshots from first_active on; NaN without such a pair
    alive_HF: np.ndarray  # bool, rate > floor and norm > alive_norm x median norm of the latents with rate > floor
    class_F: np.ndarray  # index into CLASSES
    curves: Curves


def _first_run(active_XF: np.ndarray, length: int) -> np.ndarray:
    """Start of the first `length` entries in a row that hold, `[F]`; X for none."""
    X, F = active_XF.shape
    if length > X:
        return np.full(F, X)
    run = np.lib.stride_tricks.sliding_window_view(active_XF, length, axis=0).all(-1)
    return np.where(run.any(0), run.argmax(0), X)


def life_cycle(rate_HF: Array, cosine_FHH: Array, norm_HF: Array, steps_H, settings: LifeCycle | None = None) -> Life:
    """When latents appear, peak, settle, turn and go, from the firing rates of each snapshot and the decoders.

    `rate_HF` from `code_sums` of a dictionary whose gate is per head (with a shared gate all snapshots have one rate
    and this says nothing); `cosine_FHH` and `norm_HF` from `trajectories`; `steps_H` the training steps. The final rate
    is the median over the last quarter of the snapshots (at least one): where it is 0 a latent has not stabilised but
    gone. A pair is locally stable where 1 - cos < delta and the rate changes by less than epsilon times the median rate
    of the latents alive at its start (LRO), counted from first_active on (ours: a latent that is silent does not
    change). With less than two snapshots up to `baseline_step` the baseline is the first quarter, at least two (LRO).

    Raises:
      InputError: shapes that do not belong together, steps that do not rise, less than two snapshots, or rates and
        decoders that are not finite.
    """
    s = LifeCycle() if settings is None else settings
    rate_HF, norm_HF = _host(rate_HF, "firing rates", 2), _host(norm_HF, "decoder norms", 2)
    H, F = rate_HF.shape
    steps_H = _steps(steps_H, H)
    if norm_HF.shape != (H, F) or np.shape(cosine_FHH) != (F, H, H):
        raise InputError(
            f"rates [{H}, {F}], norms {list(norm_HF.shape)}, cosines {list(np.shape(cosine_FHH))}; give the norms as "
            f"[{H}, {F}] and the cosines as [{F}, {H}, {H}]"
        )
    cosine_FHH = np.asarray(jax.device_get(cosine_FHH))
    away_HF = 1.0 - _host(cosine_FHH[:, :, -1].T, "decoder cosines", 2)
    index_I = np.arange(H - 1)
    rotation_IF = 1.0 - _host(cosine_FHH[:, index_I, index_I + 1].T, "decoder cosines", 2)

    peak_rate_F = rate_HF.max(0)
    never_F = peak_rate_F < s.floor
    active_HF = rate_HF > np.maximum(s.floor, s.alpha * peak_rate_F)
    first_F = _first_run(active_HF, s.m)
    peak_F = np.where(never_F, H, peak_snapshot(rate_HF))
    class_F = np.where(never_F, 0, np.where(steps_H[np.minimum(peak_F, H - 1)] <= s.boundary_step, 1, 2))

    base_H = steps_H <= s.baseline_step
    if base_H.sum() < 2:
        base_H = np.arange(H) < max(2, H // 4)
    threshold_F = rate_HF[base_H].mean(0) + s.sigmas * rate_HF[base_H].std(0)
    prospective_F = _first_run(rate_HF > np.maximum(s.floor, threshold_F), s.m)

    final_F = np.median(rate_HF[-max(1, H // 4) :], axis=0)
    near_HF = (np.abs(rate_HF - final_F) < s.epsilon * final_F) & (away_HF < s.delta)
    far_HF = ~near_HF[::-1]
    stabilised_F = np.where(never_F, H, np.where(far_HF.any(0), H - far_HF.argmax(0), 0))

    firing_HF = rate_HF > s.floor
    alive_HF, usual_H = np.zeros((H, F), bool), np.zeros(H)
    for h in np.flatnonzero(firing_HF.any(1)):
        alive_HF[h] = firing_HF[h] & (norm_HF[h] > s.alive_norm * np.median(norm_HF[h, firing_HF[h]]))
        usual_H[h] = np.median(rate_HF[h, alive_HF[h]]) if alive_HF[h].any() else 0.0
    calm_IF = rotation_IF < s.delta
    steady_IF = np.abs(np.diff(rate_HF, axis=0)) < s.epsilon * usual_H[:-1, None]
    begun_IF = index_I[:, None] >= first_F
    local_F = _first_run(calm_IF & steady_IF & begun_IF, s.local_pairs)

    weight_IF = np.sqrt(norm_HF[:-1] * norm_HF[1:]) * begun_IF
    drift_F = ratio((weight_IF * rotation_IF).sum(0), weight_IF.sum(0))

    settling_IF = np.stack([calm_IF[i : i + s.curve_pairs].all(0) for i in range(H - 1)])
    curves = Curves(
        new_H=np.bincount(first_F, minlength=H)[:H],
        active_H=alive_HF.sum(1),
        stabilising_H=np.append((alive_HF[:-1] & settling_IF).sum(1), 0),
        drifting_H=np.append((alive_HF[:-1] & ~settling_IF).sum(1), 0),
        retired_H=((first_F < np.arange(H)[:, None]) & ~alive_HF).sum(1),
    )
    return Life(
        never_F,
        first_F,
        prospective_F,
        peak_F,
        active_HF.mean(0),
        stabilised_F,
        np.where(local_F == H - 1, H, local_F),
        drift_F,
        alive_HF,
        class_F,
        curves,
    )


def _steps(steps_H, H: int) -> np.ndarray:
    steps_H = np.asarray(steps_H)
    if H < 2:
        raise InputError(f"{H} snapshot(s) have no evolution; give at least 2")
    if steps_H.shape != (H,) or (np.diff(steps_H) <= 0).any() or steps_H[0] < 0:
        raise InputError(
            f"training steps {steps_H.tolist()} for {H} snapshots; give one a snapshot, rising from 0 or more"
        )
    return steps_H


# --- turning point ---------------------------------------------------------------------------------------------------


class TurningPoint(NamedTuple):
    """Intervals are indices: i lies between snapshots i and i + 1."""

    curve_I: np.ndarray  # float64, mean over the used latents; NaN where none is used
    at: int  # the interval of the largest mean, the first of equal ones
    low: int  # its percentile interval over resamples of the latents
    high: int
    share_I: np.ndarray  # float64, share of the resamples whose largest mean lies here
    cusum: int  # where the cumulative sum of curve - its mean is farthest from 0: after it the level is another
    ratio: float  # curve at the peak / median of the other intervals, without the peak's neighbours; NaN without any
    z: float  # (peak - their mean) / their standard deviation


def turning_point(
    rotation_IF: Array,
    steps_H=None,
    *,
    use_IF: Array | None = None,
    per_log_step: bool = False,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> TurningPoint:
    """The interval in which latents turn most, from `Trajectories.rotation_IF` (or any curve of each latent).

    `use_IF` (bool, say `turned_IF`, or `turned_IF & alive_HF[1:]`) says which values count. `per_log_step` divides by
    the interval's length in log(1 + step), because snapshots are unevenly spaced: a wide interval holds more turning.
    The bootstrap resamples the latents that count anywhere.

    Raises:
      InputError: shapes or steps that do not belong together, nothing that counts, values that are not finite.
    """
    rotation_IF = _host(rotation_IF, "rotations", 2)
    intervals, F = rotation_IF.shape
    use_IF = np.ones((intervals, F), bool) if use_IF is None else np.asarray(jax.device_get(use_IF), bool)
    if use_IF.shape != (intervals, F):
        raise InputError(
            f"a mask of shape {list(use_IF.shape)} for rotations [{intervals}, {F}]; give one flag a value"
        )
    if not use_IF.any() or resamples < 1 or not 0 < level < 1:
        raise InputError(
            f"{int(use_IF.sum())} values, {resamples} resamples, level {level}; a turning point needs at least one "
            "value and one resample, and a level between 0 and 1"
        )
    if per_log_step:
        if steps_H is None:
            raise InputError("per_log_step needs the training steps; give steps_H")
        rotation_IF = rotation_IF / np.diff(np.log1p(_steps(steps_H, intervals + 1)))[:, None]
    keep_F = use_IF.any(0)
    use_FI = use_IF[:, keep_F].T.astype(np.float64)
    value_FI = rotation_IF[:, keep_F].T * use_FI
    curve_I = ratio(value_FI.sum(0), use_FI.sum(0))
    at = int(np.nanargmax(curve_I))

    rng, F, peaks = np.random.default_rng(seed), len(use_FI), []
    for begin in range(0, resamples, 64):
        count_XF = np.stack(
            [np.bincount(rng.integers(0, F, F), minlength=F) for _ in range(min(64, resamples - begin))]
        ).astype(np.float64)
        mean_XI = ratio(count_XF @ value_FI, count_XF @ use_FI, empty=-np.inf)
        peaks.append(mean_XI.argmax(1))
    peak_X = np.concatenate(peaks)
    tail = (1.0 - level) / 2
    low, high = np.quantile(peak_X, [tail, 1.0 - tail], method="inverted_cdf")

    others = curve_I[(np.abs(np.arange(intervals) - at) > 1) & np.isfinite(curve_I)]
    median, mean, std = (float(f(others)) if others.size else np.nan for f in (np.median, np.mean, np.std))
    share_I = np.bincount(peak_X, minlength=intervals) / resamples
    over_median = float(curve_I[at] / median) if median > 0 else np.nan
    z = float((curve_I[at] - mean) / std) if std > 0 else np.nan
    return TurningPoint(curve_I, at, int(low), int(high), share_I, cusum_peak(curve_I), over_median, z)


def cusum_peak(curve: Array) -> int:
    """Where |cumulative sum of curve - its mean| is largest; NaN counts as the mean."""
    curve = np.asarray(jax.device_get(curve), np.float64)
    return int(np.abs(np.cumsum(np.nan_to_num(curve - np.nanmean(curve)))).argmax())


class Shift(NamedTuple):
    """Distances between the distributions at consecutive snapshots, float64; NaN where there are too few values."""

    wasserstein_I: np.ndarray  # 1-Wasserstein; of directions the mean over random projections (sliced)
    mmd_I: np.ndarray  # squared maximum mean discrepancy, Gaussian kernel, unbiased: it may be below 0
    bandwidth: float  # sigma of exp(-|x - y|^2 / 2 sigma^2), one for all snapshots


def distribution_shift(
    x_HFD: Array,
    use_HF: Array | None = None,
    *,
    projections: int = 64,
    latents: int = 4096,
    bandwidth: float | None = None,
    seed: int = 0,
) -> Shift:
    """How far the latents as a population move between consecutive snapshots.

    `x_HFD`: directions (`dictionary.unit_decoder(W_dec)`), or values `[H, F]`, say norms. `use_HF` (bool, say
    `~dead_HF`): who counts at which snapshot. More than `latents` latents are sampled. The bandwidth is the median
    distance between sampled values of all snapshots. A latent is in both samples, so no latent is compared with itself
    (Gretton et al. 2012, eq. 4): a population that does not move has distance 0.

    Raises:
      InputError: shapes that do not belong together, values that are not finite.
    """
    x_HFD = np.asarray(jax.device_get(x_HFD), np.float32)
    x_HFD = x_HFD[:, :, None] if x_HFD.ndim == 2 else x_HFD
    if x_HFD.ndim != 3 or len(x_HFD) < 2:
        raise InputError(
            f"values of shape {list(x_HFD.shape)}; give [snapshots, latents(, width)], 2 snapshots or more"
        )
    H, F, D = x_HFD.shape
    use_HF = np.ones((H, F), bool) if use_HF is None else np.asarray(jax.device_get(use_HF), bool)
    if use_HF.shape != (H, F):
        raise InputError(f"a mask of shape {list(use_HF.shape)} for values [{H}, {F}]; give one flag a value")
    rng = np.random.default_rng(seed)
    if latents < F:
        chosen = np.sort(rng.choice(F, latents, replace=False))
        x_HFD, use_HF = x_HFD[:, chosen], use_HF[:, chosen]
    if not np.isfinite(x_HFD[use_HF]).all():
        raise InputError("the values to compare hold NaN or infinity; check the decoders with np.isfinite")
    x_HFD = np.where(use_HF[:, :, None], x_HFD, np.float32(0.0))
    if bandwidth is None:
        bandwidth = _median_distance(x_HFD[use_HF], rng)
    direction_DX = rng.normal(size=(D, projections)) if D > 1 else np.ones((1, 1))
    direction_DX = (direction_DX / np.linalg.norm(direction_DX, axis=0)).astype(np.float32)
    sorted_H = [np.sort(x_HFD[h, use_HF[h]] @ direction_DX, axis=0) for h in range(H)]

    gamma = np.float32(0.5 / bandwidth**2)
    weight_HF = use_HF.astype(np.float32)

    def kernel(h, g):  # mean kernel between two different latents of snapshots h and g
        row_F, same_F = _kernel_sums(x_HFD[h], x_HFD[g], weight_HF[g], gamma)
        total = np.asarray(row_F, np.float64) @ use_HF[h]
        same = np.asarray(same_F, np.float64) @ (use_HF[h] & use_HF[g])
        pairs = use_HF[h].sum() * use_HF[g].sum() - (use_HF[h] & use_HF[g]).sum()
        return (total - same) / pairs if pairs > 0 else np.nan

    own_H = [kernel(h, h) for h in range(H)]
    return Shift(
        np.array([_wasserstein(a, b) for a, b in zip(sorted_H, sorted_H[1:], strict=False)]),
        np.array([own_H[h] + own_H[h + 1] - 2 * kernel(h, h + 1) for h in range(H - 1)]),
        float(bandwidth),
    )


def _median_distance(x_ND: np.ndarray, rng: np.random.Generator, most: int = 1000) -> float:
    if len(x_ND) > most:
        x_ND = x_ND[rng.choice(len(x_ND), most, replace=False)]
    x_ND = x_ND.astype(np.float64)
    square_N = np.square(x_ND).sum(1)
    square_NN = square_N[:, None] + square_N[None] - 2 * x_ND @ x_ND.T
    apart = square_NN[square_NN > 1e-12 * max(square_N.max(initial=0.0), 1e-30)]
    return float(np.sqrt(np.median(apart))) if apart.size else 1.0


def _wasserstein(a_NX: np.ndarray, b_NX: np.ndarray) -> float:
    """Mean over columns of the 1-Wasserstein distance of two sorted samples: the area between their quantiles."""
    n_a, n_b = len(a_NX), len(b_NX)
    if not n_a or not n_b:
        return np.nan
    end = np.union1d(np.arange(1, n_a + 1) * n_b, np.arange(1, n_b + 1) * n_a)  # where a quantile steps, x n_a n_b
    width = np.diff(end, prepend=0) / (n_a * n_b)
    apart = np.abs(a_NX[(end - 1) // n_b].astype(np.float64) - b_NX[(end - 1) // n_a])
    return float((width @ apart).mean())


@partial(jax.jit, static_argnames="block")
def _kernel_sums(a_FD, b_FD, weight_F, gamma, block: int = 256):
    """Of every row of a: the summed kernel with the weighted rows of b, and the kernel with its own row of b."""
    F, D = a_FD.shape
    rows_XBD = jnp.pad(a_FD, ((0, -F % block), (0, 0))).reshape(-1, block, D)
    square_F = jnp.square(b_FD).sum(-1)

    def of_block(a_BD):
        square_BF = jnp.square(a_BD).sum(-1)[:, None] + square_F[None] - 2 * _dot("bd,fd->bf", a_BD, b_FD)
        return jnp.exp(-gamma * jnp.maximum(square_BF, 0.0)) @ weight_F

    return jax.lax.map(of_block, rows_XBD).reshape(-1)[:F], jnp.exp(-gamma * jnp.square(a_FD - b_FD).sum(-1))


# --- codes of each snapshot ------------------------------------------------------------------------------------------


class CodeSums(NamedTuple):
    """Added over batches leaf by leaf."""

    rows: jax.Array  # int32
    active_HF: jax.Array  # int32, rows in which the latent fires at the snapshot
    code_HF: jax.Array  # float32, sum of its codes


class Rates(NamedTuple):
    rate_HF: np.ndarray  # float64, share of rows in which the latent fires at the snapshot
    mean_HF: np.ndarray  # mean code over all rows


def _counted(f_BF, valid_B) -> jax.Array:
    """Codes as float32, zero in the rows that do not count, whatever stands there."""
    return jnp.where(valid_B[:, None], f_BF.astype(jnp.float32), 0.0)


def _heads(fn: Callable, heads: int):
    return jax.lax.map(fn, jnp.arange(heads, dtype=jnp.int32))


def code_sums(at_head: AtHead, valid_B: jax.Array, heads: int) -> CodeSums:
    """Sums of one batch for `rates`, one head at a time; rows with `valid_B` False count nowhere."""

    def of_head(h):
        f_BF = _counted(at_head(h), valid_B)
        return (f_BF != 0).sum(0, dtype=jnp.int32), f_BF.sum(0)

    return CodeSums(valid_B.sum(dtype=jnp.int32), *_heads(of_head, heads))


def rates(sums: CodeSums) -> Rates:
    """Firing rate and mean code of every latent at every snapshot.

    Raises:
      InputError: no row, or codes that were not finite.
    """
    rows = int(sums.rows)
    if rows < 1:
        raise InputError("no valid row to take firing rates over; give at least one with valid_B True")
    return Rates(*(_host(v, "sums of codes", 2) / rows for v in (sums.active_HF, sums.code_HF)))


def peak_codes(at_head: AtHead, peak_F: Array, heads: int) -> jax.Array:
    """Every latent's codes at its own snapshot `peak_F`, `[B, F]`; a peak of H (none) counts as the last snapshot."""
    peak_F = jnp.minimum(jnp.asarray(peak_F, jnp.int32), heads - 1)

    def take(h, f_BF):
        return jnp.where((peak_F == h)[None], at_head(h), f_BF)

    return jax.lax.fori_loop(1, heads, take, at_head(jnp.int32(0)))


# --- latent scaling --------------------------------------------------------------------------------------------------


class ScalingSums(NamedTuple):
    """Float32, added over batches leaf by leaf. f the latent's code at its peak snapshot, f_h at snapshot h, d its
    decoder at the peak, d_h at snapshot h, y activations, xhat reconstruction."""

    ff_F: jax.Array  # sum f^2
    fg_HF: jax.Array  # sum f f_h
    activation_HF: jax.Array  # sum f <d, y_h>
    reconstruction_HF: jax.Array  # sum f <d, xhat_h>
    own_activation_HF: jax.Array  # sum f <d_h, y_h>
    own_reconstruction_HF: jax.Array


class Scaling(NamedTuple):
    """beta of every latent at every snapshot, float64; NaN where it never fired or has no direction. `nu_` is beta over
    that of the peak snapshot: presence that does not read the decoder's norm; NaN unless the latter is positive."""

    activation_HF: np.ndarray
    reconstruction_HF: np.ndarray
    error_HF: np.ndarray  # of the error plus the latent's own contribution, what the other latents leave to it
    nu_activation_HF: np.ndarray
    nu_reconstruction_HF: np.ndarray  # high where the latent is "absent": others write it there (latent decoupling)
    nu_error_HF: np.ndarray  # high where the latent is "absent": nobody writes it there (complete shrinkage)


def scaling_sums(
    at_head: AtHead, y_BHD: jax.Array, xhat_BHD: jax.Array, W_dec_HFD: jax.Array, peak_F: Array, valid_B: jax.Array
) -> ScalingSums:
    """Sums of one batch for `scaling`. `y` and `xhat` are normalised activations and their reconstruction, `peak_F` is
    `peak_snapshot` of norms or rates, or `Life.peak_F`.

    sum_b f_b <d, y_b> = <d, sum_b f_b y_b>: one product of codes and rows a head serves every direction. Rows with
    `valid_B` False count nowhere.

    Raises:
      InputError: shapes that do not belong together.
    """
    H, F, D = W_dec_HFD.shape
    if y_BHD.ndim != 3 or y_BHD.shape[1:] != (H, D) or xhat_BHD.shape != y_BHD.shape or np.shape(peak_F) != (F,):
        raise InputError(
            f"activations {list(y_BHD.shape)}, reconstruction {list(xhat_BHD.shape)}, peaks {list(np.shape(peak_F))} "
            f"for decoders {[H, F, D]}; give [rows, {H}, {D}] twice and [{F}]"
        )
    f_FB = _counted(peak_codes(at_head, peak_F, H), valid_B).T
    d_FD = W_dec_HFD[jnp.minimum(jnp.asarray(peak_F, jnp.int32), H - 1), jnp.arange(F)]

    def of_head(h):
        rows_B2D = jnp.concatenate(
            [jax.lax.dynamic_index_in_dim(v, h, 1, keepdims=False) for v in (y_BHD, xhat_BHD)], axis=-1
        )
        sum_F2D = _dot("fb,bd->fd", f_FB, _counted(rows_B2D, valid_B)).reshape(F, 2, D)
        g_BF = _counted(at_head(h), valid_B)
        along_F2, own_F2 = _dot("fd,fjd->fj", d_FD, sum_F2D), _dot("fd,fjd->fj", W_dec_HFD[h], sum_F2D)
        return (f_FB.T * g_BF).sum(0), along_F2[:, 0], along_F2[:, 1], own_F2[:, 0], own_F2[:, 1]

    return ScalingSums(jnp.square(f_FB).sum(1), *_heads(of_head, H))


def scaling(sums: ScalingSums, W_dec_HFD: Array, peak_F: Array, direction: str = "peak") -> Scaling:
    """Latent scaling (arXiv 2504.02922) over H snapshots, with codes and the reference of the peak snapshot (ours).

        beta_h(Y) = sum_b f <v_h, Y_h> / (|v_h|^2 sum_b f^2),      Y_h = y_h; xhat_h; y_h - xhat_h + f_h d_h

        direction  peak    v_h = d: one direction, so that a latent that has turned counts as absent
                   own     v_h = d_h: what the decoder's own arrow at h should be multiplied with; 1 on f d_h
                   turned  v_h = d_h |d| / |d_h|: the direction of h at the peak's length, so that nu compares amounts
                           (a shrunken decoder does not count as presence, nor a turned one as absence)

    y and xhat are taken as they come: take b_dec off both first to leave the bias out of `activation` and
    `reconstruction` (it cancels in `error`). `W_dec_HFD` and `peak_F` as given to `scaling_sums`.

    Raises:
      InputError: an unknown direction, sums of other shapes or that are not finite.
    """
    if direction not in DIRECTIONS:
        raise InputError(f"direction {direction!r} of latent scaling; choose one of {', '.join(DIRECTIONS)}")
    ff_F = _host(sums.ff_F, "sums of codes", 1)
    fg_HF, act_HF, rec_HF, own_act_HF, own_rec_HF = (_host(v, "sums of scaled latents", 2) for v in sums[1:])
    W_dec_HFD, peak_F = np.asarray(jax.device_get(W_dec_HFD)), np.asarray(jax.device_get(peak_F))
    H, F = act_HF.shape
    if W_dec_HFD.shape[:2] != (H, F) or peak_F.shape != (F,):
        raise InputError(f"decoders {list(W_dec_HFD.shape)} and peaks {list(peak_F.shape)} for sums [{H}, {F}]")
    at_F = np.minimum(peak_F, H - 1)
    d_FD = W_dec_HFD[at_F, np.arange(F)].astype(np.float64)
    own_HF = np.stack([np.einsum("fd,fd->f", W_FD, W_FD, dtype=np.float64) for W_FD in W_dec_HFD])
    length_F = np.square(d_FD).sum(1)
    if direction == "peak":
        onto_HF = np.stack([np.einsum("fd,fd->f", d_FD, W_FD) for W_FD in W_dec_HFD])
        below_HF = np.broadcast_to(length_F * ff_F, (H, F))
    else:
        act_HF, rec_HF, onto_HF = own_act_HF, own_rec_HF, own_HF
        below_HF = own_HF * ff_F
        if direction == "turned":  # <v, Y> grows by |d| / |d_h|, |v|^2 by its square
            below_HF = ff_F * np.sqrt(own_HF * length_F)
    beta = [ratio(v, below_HF) for v in (act_HF, rec_HF, act_HF - rec_HF + fg_HF * onto_HF)]
    return Scaling(*beta, *(ratio(v, np.take_along_axis(v, at_F[None], 0)) for v in beta))


# --- linear separability ---------------------------------------------------------------------------------------------


def separability(y_NHD: Array, W_dec_HFD: Array, fires_NF: Array, *, block: int = 128) -> np.ndarray:
    """How well one direction tells that the latent fires: AUC `[H, F]`, float64, on the host.

    At snapshot h the score of a row is <d_h, y_h>, the label "the latent fires at its peak snapshot"
    (`peak_codes(...) > 0`). Exact on the rows given: ties (a zero decoder: all rows) count one half, values that differ
    in the last bit of float32 are ties. NaN for a latent that fires in no row or in all. One sort a latent and
    snapshot: F = 4,096, H = 32 and 2,048 rows take seconds on four CPU cores.

    Raises:
      InputError: shapes that do not belong together, activations or decoders that are not finite.
    """
    y_NHD, W_dec_HFD = (np.asarray(jax.device_get(v), np.float32) for v in (y_NHD, W_dec_HFD))
    fires_FN = np.ascontiguousarray(np.asarray(jax.device_get(fires_NF), bool).T)
    if y_NHD.ndim != 3 or W_dec_HFD.ndim != 3 or fires_FN.ndim != 2:
        raise InputError("activations must be [rows, heads, width], decoders [heads, latents, width], labels 2-d")
    (N, H, D), F = y_NHD.shape, W_dec_HFD.shape[1]
    if W_dec_HFD.shape != (H, F, D) or fires_FN.shape != (F, N) or N == 0:
        raise InputError(
            f"activations {[N, H, D]}, decoders {list(W_dec_HFD.shape)}, labels {list(fires_FN.T.shape)}; give "
            f"[{H}, latents, {D}] and [{N}, latents], at least one row"
        )
    if not np.isfinite(y_NHD).all() or not np.isfinite(W_dec_HFD).all():
        raise InputError("activations or decoders hold NaN or infinity; check them with np.isfinite")
    auc_HF = np.empty((H, F))
    for h in range(H):
        for begin in range(0, F, 16 * block):
            score_XN = np.asarray(_scores(W_dec_HFD[h, begin : begin + 16 * block], y_NHD[:, h]))
            for at in range(0, len(score_XN), block):  # what a sort reads and writes stays in the cache
                part = slice(begin + at, begin + at + block)
                auc_HF[h, part] = _auc(score_XN[at : at + block], fires_FN[part])
    return auc_HF


@jax.jit
def _scores(W_XD, y_ND) -> jax.Array:
    return _dot("xd,nd->xn", W_XD, y_ND)


def _auc(value_XN: np.ndarray, label_XN: np.ndarray) -> np.ndarray:
    """AUC of every row of float32 values. The label is the lowest bit of the sort key, so one sort of integers, which
    NumPy vectorises, ranks the positives; negatives come first among equals."""
    bits_XN = (value_XN + np.float32(0.0)).view(np.int32)  # + 0: -0 is 0
    bits_XN = np.where(bits_XN < 0, bits_XN ^ np.int32(0x7FFFFFFF), bits_XN) & np.int32(-2)  # ordered as the floats
    key_XN = np.sort(bits_XN | label_XN, axis=1)
    sum_X = _rank_sum(key_XN & 1)
    tied = np.flatnonzero(((key_XN[:, 1:] ^ key_XN[:, :-1]) == 1).any(1))  # a positive and a negative share a value
    if tied.size:  # the mean of both orders among equals is what mean ranks give
        key_XN = np.sort(bits_XN[tied] | ~label_XN[tied], axis=1)
        sum_X[tied] = (sum_X[tied] + _rank_sum(1 - (key_XN & 1))) / 2
    count_X = label_XN.sum(1).astype(np.float64)
    return ratio(sum_X - count_X * (count_X + 1) / 2, count_X * (label_XN.shape[1] - count_X))


def _rank_sum(positive_XN: np.ndarray) -> np.ndarray:
    """Sum of the places, from 1 on, at which each row is not zero."""
    row, place = np.nonzero(positive_XN)
    return np.bincount(row, place + 1.0, minlength=len(positive_XN))


class Agreement(NamedTuple):
    """Correlation of every two of X measures, float64; NaN where one is constant."""

    names: tuple[str, ...]
    pooled_XX: np.ndarray  # over all latents and snapshots
    within_XX: np.ndarray  # over the snapshots of one latent, mean over the latents where it is defined
    latents_XX: np.ndarray  # int, how many these are


def agreement(measures: Mapping[str, Array], *, rank: bool = True) -> Agreement:
    """Do measures of presence `[H, F]` (norm, nu, rate, AUC) tell the same? Spearman, or with `rank=False` Pearson.

    Only cells where every measure is finite count; a latent needs three of them for `within`.

    Raises:
      InputError: less than two measures, or measures of different shapes.
    """
    value_XFH = [np.asarray(jax.device_get(v), np.float64).T for v in measures.values()]
    if len(value_XFH) < 2 or any(v.ndim != 2 or v.shape != value_XFH[0].shape for v in value_XFH):
        shapes = {name: list(np.shape(v)) for name, v in measures.items()}
        raise InputError(f"measures {shapes}; give at least two of one shape [snapshots, latents]")
    value_XFH = np.stack(value_XFH)
    use_FH = np.isfinite(value_XFH).all(0)
    pooled_XN = value_XFH[:, use_FH]
    inside_XFH = np.where(use_FH, value_XFH, np.inf)  # last in rank, so that the others' ranks do not see them
    if rank:
        pooled_XN, inside_XFH = rankdata(pooled_XN, axis=-1), rankdata(inside_XFH, axis=-1)
    weight_FH = use_FH.astype(np.float64)
    inside_XFH = np.where(use_FH, inside_XFH, 0.0)
    names, X = tuple(measures), len(value_XFH)
    pooled, within, latents = np.full((X, X), np.nan), np.full((X, X), np.nan), np.zeros((X, X), int)
    enough_F = use_FH.sum(1) >= 3
    for i in range(X):
        for j in range(X):
            pooled[i, j] = _pearson(pooled_XN[i], pooled_XN[j], np.ones(pooled_XN.shape[1]))
            r_F = _pearson(inside_XFH[i], inside_XFH[j], weight_FH)[enough_F]
            latents[i, j] = np.isfinite(r_F).sum()
            within[i, j] = np.nanmean(r_F) if latents[i, j] else np.nan
    return Agreement(names, pooled, within, latents)


def _pearson(x: np.ndarray, y: np.ndarray, use: np.ndarray) -> np.ndarray:
    """Correlation along the last axis over the entries with `use` 1 (not 0); NaN where one side is constant."""
    count = np.maximum(use.sum(-1, keepdims=True), 1.0)
    dx, dy = (use * (v - (use * v).sum(-1, keepdims=True) / count) for v in (x, y))
    xx, yy = (dx * dx).sum(-1), (dy * dy).sum(-1)
    varies = (xx > 1e-24 * (use * x * x).sum(-1)) & (yy > 1e-24 * (use * y * y).sum(-1))  # more than rounding
    return np.clip(ratio((dx * dy).sum(-1), np.where(varies, np.sqrt(xx) * np.sqrt(yy), 0.0)), -1.0, 1.0)


# --- total dimensionality --------------------------------------------------------------------------------------------


class Dimensionality(NamedTuple):
    share_H: jax.Array  # sum_i D_i / d, of all latents together: at most 1
    D_HF: jax.Array  # of each latent: 1 orthogonal to all others, 1/2 one of an antipodal pair, 0 without a decoder


@jax.jit
def dimensionality(W_dec_HFD: jax.Array, use_HF: jax.Array | None = None) -> Dimensionality:
    """Share of the d dimensions that latents take at every snapshot, D_i = |W_i|^2 / sum_j (What_i . W_j)^2.

    sum_j (What_i . W_j)^2 = What_i^T (sum_j W_j W_j^T) What_i: a D x D matrix in place of the F x F Gram. `use_HF`
    (bool, say `Life.alive_HF`): the others are as if they had no decoder. Blind to a head's scale, so normalised and
    raw units give the same.
    """
    H, F, D = W_dec_HFD.shape
    use_HF = jnp.ones((H, F), bool) if use_HF is None else use_HF

    def of_head(head):
        W_FD, use_F = head
        W_FD = jnp.where(use_F[:, None], W_FD.astype(jnp.float32), 0.0)
        norm_F = jnp.linalg.norm(W_FD, axis=-1)
        unit_FD = W_FD / _safe(norm_F)[:, None]
        shared_F = (_dot("fd,de->fe", unit_FD, _dot("fd,fe->de", W_FD, W_FD)) * unit_FD).sum(-1)
        return jnp.square(norm_F) / _safe(shared_F)

    D_HF = jax.lax.map(of_head, (W_dec_HFD, use_HF))
    return Dimensionality(D_HF.sum(-1) / D, D_HF)


# --- emergence against complexity ------------------------------------------------------------------------------------


def _unit(v: np.ndarray) -> np.ndarray:
    return v / max(float(np.linalg.norm(v)), 1e-300)


class Correlation(NamedTuple):
    """Two-sided p by permutation; percentile intervals over resamples of the pairs. NaN where a side is constant."""

    pearson: float
    pearson_low: float
    pearson_high: float
    pearson_p: float
    spearman: float  # tied values share their mean rank
    spearman_low: float
    spearman_high: float
    spearman_p: float
    count: int  # pairs of which both are known


def correlate(
    x_N: Array, y_N: Array, *, resamples: int = 2000, permutations: int = 10_000, level: float = 0.95, seed: int = 0
) -> Correlation:
    """Pearson and Spearman of two values of each latent, say emergence and complexity; a pair with a NaN is left out
    (write the `none` of a life cycle as NaN). p is (1 + permutations as extreme) / (1 + permutations).

    `bert6_jax.metrics.association` is the float32 estimate alone, for use inside jit.

    Raises:
      InputError: vectors of different lengths, less than three known pairs, no resample or permutation.
    """
    x_N, y_N = (np.asarray(jax.device_get(v), np.float64) for v in (x_N, y_N))
    if x_N.ndim != 1 or x_N.shape != y_N.shape:
        raise InputError(f"values of shapes {list(x_N.shape)} and {list(y_N.shape)}; give two vectors of one length")
    if np.isinf(x_N).any() or np.isinf(y_N).any():
        raise InputError("values to correlate are infinite; write what is missing as NaN")
    known_N = ~(np.isnan(x_N) | np.isnan(y_N))
    x_N, y_N = x_N[known_N], y_N[known_N]
    N = len(x_N)
    if N < 3 or min(resamples, permutations) < 1 or not 0 < level < 1:
        raise InputError(
            f"{N} known pairs, {resamples} resamples, {permutations} permutations, level {level}; give at least three "
            "pairs, one resample, one permutation, and a level between 0 and 1"
        )
    rng, chunk, ones = np.random.default_rng(seed), max(1, 2**20 // N), np.ones(N)
    sides = {"pearson": (x_N, y_N), "spearman": (rankdata(x_N), rankdata(y_N))}
    found = {name: float(_pearson(*pair, ones)) for name, pair in sides.items()}
    units = {name: [_unit(v - v.mean()) for v in pair] for name, pair in sides.items()}
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in sides}
    extreme = dict.fromkeys(sides, 0)
    for begin in range(0, resamples, chunk):
        at_XN = rng.integers(0, N, (min(chunk, resamples - begin), N))
        x_XN, y_XN = x_N[at_XN], y_N[at_XN]
        drawn["pearson"].append(_pearson(x_XN, y_XN, ones))
        drawn["spearman"].append(_pearson(rankdata(x_XN, axis=-1), rankdata(y_XN, axis=-1), ones))
    for begin in range(0, permutations, chunk):
        order_XN = rng.permuted(np.tile(np.arange(N), (min(chunk, permutations - begin), 1)), axis=1)
        for name, (a_N, b_N) in units.items():  # ranks move with their values
            extreme[name] += int((np.abs(b_N[order_XN] @ a_N) >= abs(found[name]) - 1e-12).sum())
    out: dict[str, float] = {}
    tail = (1.0 - level) / 2
    for name, r in found.items():
        r_X = np.concatenate(drawn[name])
        r_X = r_X[np.isfinite(r_X)]  # a resample of one value has no correlation
        low, high = np.quantile(r_X, [tail, 1 - tail]) if r_X.size and np.isfinite(r) else (np.nan, np.nan)
        p = (1 + extreme[name]) / (1 + permutations) if np.isfinite(r) else np.nan
        out |= {name: r, f"{name}_low": float(low), f"{name}_high": float(high), f"{name}_p": p}
    return Correlation(**out, count=N)
