"""Which features of a dictionary carry a task at each snapshot: attribution, necessity, sufficiency, matched controls.

A task is a metric m of the residual stream a at a site and pairs of rows, clean x and patched x~. With d_f the decoder
row of a snapshot's head in raw units (W_dec / scale), f and f~ the codes of both rows as that head lets them through,
and e = a - decode(f), the stream goes from the baseline to the clean row along

    a(alpha) = decode(f~ + alpha (f - f~)) + e~ + alpha (e - e~) = base + alpha (clean - base),

a straight line, because decoding is affine. With dm/df = d . grad m every attribution is one weighting of the gradient:

    attr_f   = (f_f - f~_f) d_f . sum_s w_s grad m(a(alpha_s)),  attr_err = (e - e~) . the same sum
    gauss, midpoint   integrated gradients: over all positions sum_f attr_f + attr_err = m(clean) - m(base), exact for
                      linear metrics. 10 Gauss-Legendre nodes are ours; `left` is the rule of arXiv 2509.05291
    gradient          the gradient at the clean row: attribution patching with the patched baseline, gradient times
                      activation with the zero baseline

The baseline is the patched row (`patched`, the default, ours) or codes and errors of zero (`zero`). `gap` is what the
sum over the steps lacks of completeness; look at it. Norms bend where a stream passes near a constant vector, which
happens in narrow models and from the zero baseline: there 40 steps and more are needed where else 10 do.

    pairs = check_pairs(Pairs(...), model_cfg)
    found = per_snapshot(lambda m, ends, _: totals(attribute(m, ends), pairs.valid_B), dictionary, cfg, params_H,
                         model_cfg, pairs, depth)                                   one entry a snapshot; add batches
    mean, _ = means(found)
    chosen_HK = top(np.abs(mean.features), K)
    found = per_snapshot(lambda m, ends, rank_F: totals(curves(m, ends, rank_F, k_X), other.valid_B), dictionary, cfg,
                         params_H, model_cfg, other, depth, ranks(chosen_HK, F))
    necessity_HX, sufficiency_HX = faithfulness(means(found)[0])

Features are chosen on one half of the pairs and scored on the other (`halves`): the largest of many noisy attributions
are too large on the rows that made them largest.

Letters beside those of the packages: T tokens of a row, H snapshots (the heads of the dictionary), K chosen features,
X entries of a list of k or tasks, R draws of a control, N pairs of a whole set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert6_jax import transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError
from sae_jax.config import DictionaryConfig
from sae_jax.dictionary import Dictionary, at_head, encode

Array = jax.Array | np.ndarray
Metric = Callable[[jax.Array], jax.Array]  # stream [B, T, D] -> m [B], a row's value from that row alone

RULES = ("gauss", "midpoint", "left", "gradient")
BASELINES = ("patched", "zero")
ERRORS = ("kept", "baseline", "zero")
NEAREST = 5  # candidates that a matched control is drawn from (ours)


def _choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def _product(x, W) -> jax.Array:
    """The last axis of x with the first of W. Full float32 also where a device would round its inputs: what is left
    over (errors, completeness) is small beside the products."""
    return jnp.matmul(x, W, precision=jax.lax.Precision.HIGHEST)


# --- attribution -----------------------------------------------------------------------------------------------------


class Ends(NamedTuple):
    """Both ends of the way from the baseline to the clean rows at one snapshot's site, in raw units."""

    clean_BTD: jax.Array  # the stream of the clean rows
    base_BTD: jax.Array  # what it is at the baseline
    clean_BTF: jax.Array  # codes
    base_BTF: jax.Array
    W_FD: jax.Array  # decode(f) = f W + b
    b_D: jax.Array
    use_BT: jax.Array  # bool: where the dictionary stands; elsewhere codes are 0 and all of the stream is error


class Effects(NamedTuple):
    """Attributions of every row."""

    features: Array  # [B, F], summed over positions, or [B, T, F]
    error: Array  # [B] or [B, T], of the error node
    clean: Array  # [B], m at both ends
    base: Array  # [B]


def make_ends(clean_BTD, clean_BTF, patch_BTD, patch_BTF, W_FD, b_D, use_BT, baseline: str = "patched") -> Ends:
    """Ends of streams, codes and an affine decoder in raw units.

    Where `use_BT` is False (padding, say special tokens) the dictionary does not stand: the zero baseline leaves the
    stream there as it is, the patched one patches it, and the error node accounts for it.

    Raises:
      InputError: an unknown baseline, or shapes that do not belong together.
    """
    _choice("baseline", baseline, BASELINES)
    (B, T, D), F = clean_BTD.shape, clean_BTF.shape[-1]
    same = patch_BTD.shape == (B, T, D) and clean_BTF.shape == patch_BTF.shape == (B, T, F)
    if not same or W_FD.shape != (F, D) or b_D.shape != (D,) or use_BT.shape != (B, T):
        raise InputError(
            f"streams {list(clean_BTD.shape)} and {list(patch_BTD.shape)}, codes {list(clean_BTF.shape)} and "
            f"{list(patch_BTF.shape)}, decoder {list(W_FD.shape)}; give [rows, tokens, width] and [rows, tokens, "
            "latents] twice and [latents, width]"
        )
    use_BT1 = use_BT[:, :, None]
    clean_BTD, patch_BTD = clean_BTD.astype(jnp.float32), patch_BTD.astype(jnp.float32)
    clean_BTF, patch_BTF = (jnp.where(use_BT1, f.astype(jnp.float32), 0.0) for f in (clean_BTF, patch_BTF))
    W_FD, b_D = W_FD.astype(jnp.float32), b_D.astype(jnp.float32)
    if baseline == "zero":
        patch_BTD, patch_BTF = jnp.where(use_BT1, b_D[None, None], clean_BTD), jnp.zeros_like(patch_BTF)
    return Ends(clean_BTD, patch_BTD, clean_BTF, patch_BTF, W_FD, b_D, use_BT)


def nodes(rule: str, steps: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """alpha and weight of every step of a rule on [0, 1], float32; `gradient` has one step whatever `steps` says."""
    _choice("rule", rule, RULES)
    if steps < 1:
        raise InputError(f"integrated gradients of {steps} steps; give at least 1")
    if rule == "gradient":
        return np.ones(1, np.float32), np.ones(1, np.float32)
    alpha, weight = np.arange(steps) / steps, np.full(steps, 1.0 / steps)
    if rule == "midpoint":
        alpha = alpha + 0.5 / steps
    if rule == "gauss":
        alpha, weight = np.polynomial.legendre.leggauss(steps)
        alpha, weight = (alpha + 1.0) / 2.0, weight / 2.0
    return alpha.astype(np.float32), weight.astype(np.float32)


def attribute(
    metric: Metric, ends: Ends, rule: str = "gauss", steps: int = 10, *, per_position: bool = False
) -> Effects:
    """Attributions of every feature and of the error node; the equations and rules are those of the module.

    The gradient is summed over the steps as `[B, T, D]`; one product with the decoder follows, so the time of a step
    does not depend on the number of features.
    """
    span_BTD, span_BTF = ends.clean_BTD - ends.base_BTD, ends.clean_BTF - ends.base_BTF
    slope = jax.grad(lambda a_BTD: metric(a_BTD).astype(jnp.float32).sum())

    def step(sum_BTD, node):
        alpha, weight = node
        return sum_BTD + weight * slope(ends.base_BTD + alpha * span_BTD), None

    slope_BTD, _ = jax.lax.scan(step, jnp.zeros_like(span_BTD), jax.tree.map(jnp.asarray, nodes(rule, steps)))
    features_BTF = span_BTF * _product(slope_BTD, ends.W_FD.T)
    error_BT = ((span_BTD - _product(span_BTF, ends.W_FD)) * slope_BTD).sum(-1)
    clean_B, base_B = jax.lax.map(metric, jnp.stack([ends.clean_BTD, ends.base_BTD]))
    if per_position:
        return Effects(features_BTF, error_BT, clean_B, base_B)
    return Effects(features_BTF.sum(1), error_BT.sum(1), clean_B, base_B)


def gap(effects: Effects) -> jax.Array:
    """What integrated gradients lack of completeness: sum attr + attr_err - (m(clean) - m(base)), `[B]`."""
    B = effects.clean.shape[0]
    attributed_B = effects.features.reshape(B, -1).sum(-1) + effects.error.reshape(B, -1).sum(-1)
    return attributed_B - (effects.clean - effects.base)


# --- necessity and sufficiency ---------------------------------------------------------------------------------------


class Curves(NamedTuple):
    """m of every row for every k of a list."""

    necessity: Array  # [B, X], without the first k features: they are at the baseline
    sufficiency: Array  # [B, X], with the first k only: all others are at the baseline
    full: Array  # [B], all features, the error node as chosen: necessity at k = 0
    empty: Array  # [B], no feature: sufficiency at k = 0
    clean: Array  # [B], the rows themselves
    base: Array  # [B], the baseline itself


def curves(metric: Metric, ends: Ends, rank_F: Array, k_X: Array, error: str = "kept") -> Curves:
    """Necessity and sufficiency of the first k features for all k of a list, by `rank_F` (`ranks`: 0 comes first).

    The error node is that of the clean rows (`kept`), that of the baseline (`baseline`), or 0 (`zero`). Ranks and k are
    data: one compiled program for every list of a length, and for controls. A product with the masked decoder and two
    runs of the metric a k, one k after the other.

    Raises:
      InputError: a k below 0 or beyond the features that have a rank (where k is no array of a device), ranks of
      another number of features, or an unknown `error`.
    """
    _choice("error", error, ERRORS)
    F = len(ends.W_FD)
    if rank_F.shape != (F,):
        raise InputError(f"ranks of shape {list(rank_F.shape)} for {F} features; give one rank a feature")
    if not isinstance(k_X, jax.Array):
        ranked = F if isinstance(rank_F, jax.Array) else int((rank_F < F).sum())
        k_X = check_k(k_X, ranked)
    span_BTF = ends.clean_BTF - ends.base_BTF
    moved_BTD = _product(span_BTF, ends.W_FD)
    if error == "kept":
        full_BTD = ends.clean_BTD
    elif error == "baseline":
        full_BTD = ends.base_BTD + moved_BTD
    else:
        decoded_BTD = _product(ends.clean_BTF, ends.W_FD) + ends.b_D[None, None]
        full_BTD = jnp.where(ends.use_BT[:, :, None], decoded_BTD, ends.clean_BTD)
    empty_BTD = full_BTD - moved_BTD

    def at(k):
        part_BTD = _product(span_BTF, jnp.where((rank_F < k)[:, None], ends.W_FD, 0.0))
        return jax.lax.map(metric, jnp.stack([full_BTD - part_BTD, empty_BTD + part_BTD]))

    m_X2B = jax.lax.map(at, jnp.asarray(k_X, jnp.int32))
    ends_4B = jax.lax.map(metric, jnp.stack([full_BTD, empty_BTD, ends.clean_BTD, ends.base_BTD]))
    return Curves(m_X2B[:, 0].T, m_X2B[:, 1].T, *ends_4B)


def check_k(k_X: Sequence[int] | np.ndarray, ranked: int) -> np.ndarray:
    """The list of k as int32; refused where one is not among 0..`ranked`, the number of features to choose from."""
    k_X = np.asarray(k_X)
    if k_X.ndim != 1 or not k_X.size or k_X.dtype.kind not in "iu":
        raise InputError(f"k is {k_X.tolist()!r}; give a list of at least one whole number")
    if k_X.min() < 0 or k_X.max() > ranked:
        wrong = k_X[(k_X < 0) | (k_X > ranked)][0]
        raise InputError(f"k = {wrong} of {ranked} ranked features; give 0 to {ranked}, or rank more features")
    return k_X.astype(np.int32)


def top(score_F: Array, K: int) -> np.ndarray:
    """The K features with the largest scores, best first, `[..., K]`, of scores `[..., F]`; of equal ones the first.

    Scores are, say, mean attributions (what speaks for the right answer) or their absolute values.

    Raises:
      InputError: K beyond 1..F, or scores that are not finite.
    """
    score_F = np.asarray(jax.device_get(score_F))
    if not 1 <= K <= score_F.shape[-1]:
        raise InputError(f"K = {K} of {score_F.shape[-1]} features; choose 1 to {score_F.shape[-1]}")
    if not np.isfinite(score_F).all():
        raise InputError("scores of features hold NaN or infinity; check the metric and the codes with np.isfinite")
    return np.argsort(-score_F, axis=-1, kind="stable")[..., :K]


def ranks(chosen_K: Array, F: int) -> np.ndarray:
    """`rank_F` of `curves`, int32 `[..., F]`: the place in `chosen_K` `[..., K]` (`top`, `matched_random`), F for none.

    Raises:
      InputError: a feature beyond F or one that is chosen twice.
    """
    chosen_K = np.asarray(chosen_K)
    _check_chosen(chosen_K, F)
    rank_F = np.full((*chosen_K.shape[:-1], F), F, np.int32)
    np.put_along_axis(rank_F, chosen_K, np.arange(chosen_K.shape[-1], dtype=np.int32), axis=-1)
    return rank_F


def _check_chosen(chosen_K: np.ndarray, F: int) -> None:
    if chosen_K.ndim < 1 or not chosen_K.size or chosen_K.dtype.kind not in "iu":
        raise InputError(f"chosen features {chosen_K.tolist()!r}; give the numbers of at least one")
    wrong = chosen_K[(chosen_K < 0) | (chosen_K >= F)]
    if wrong.size:
        raise InputError(f"feature {wrong[0]} of a dictionary of {F}; choose 0 to {F - 1}")
    ordered_K = np.sort(chosen_K, axis=-1)
    twice = ordered_K[..., 1:][ordered_K[..., 1:] == ordered_K[..., :-1]]
    if twice.size:
        raise InputError(f"feature {twice[0]} is chosen twice; give every feature once")


def faithfulness(mean: Curves) -> tuple[np.ndarray, np.ndarray]:
    """(necessity, sufficiency) as (m(k) - m(empty)) / (m(full) - m(empty)), `[..., X]`, of `means(...)[0]`.

    A ratio of means over rows. Both ends have the error node as in the curve (ours), so necessity begins at 1 and
    sufficiency at 0; `mean.clean` and `mean.base` are there for other ends. NaN where full and empty are equal.
    """
    full_X1, empty_X1 = (np.asarray(v, np.float64)[..., None] for v in (mean.full, mean.empty))
    span_X1 = full_X1 - empty_X1
    span_X1 = np.where(span_X1 == 0, np.nan, span_X1)
    return (mean.necessity - empty_X1) / span_X1, (mean.sufficiency - empty_X1) / span_X1


def specificity(effect_XX: Array) -> np.ndarray:
    """Task specificity in [-1, 1] of every task's features, `[X]` (the number is ours, the matrix LRO's).

    `effect_XX[i, j]` is what removing the features of task i costs task j, in comparable units: 1 - necessity. With
    `others` the mean |effect| on the other tasks: (own - others) / (|own| + others); 1: the task alone is hit, 0: as
    hard as the others, -1: the others alone. NaN where nothing is hit.

    Raises:
      InputError: effects that are not square, not finite, or of one task only.
    """
    effect_XX = np.asarray(jax.device_get(effect_XX), np.float64)
    X = len(effect_XX)
    if effect_XX.shape != (X, X) or X < 2:
        raise InputError(f"effects of shape {list(effect_XX.shape)}; give those of at least 2 tasks on one another")
    if not np.isfinite(effect_XX).all():
        raise InputError("effects on tasks hold NaN or infinity; leave out tasks whose full and empty metric are equal")
    own_X = np.diagonal(effect_XX)
    others_X = (np.abs(effect_XX).sum(1) - np.abs(own_X)) / (X - 1)
    below_X = np.abs(own_X) + others_X
    return np.divide(own_X - others_X, below_X, out=np.full(X, np.nan), where=below_X > 0)


# --- sums over rows --------------------------------------------------------------------------------------------------


class Totals(NamedTuple):
    """Sums over rows; batches are added by `jax.tree.map(jnp.add, a, b)`."""

    count: Array  # int32
    sums: Any  # the tree without its rows
    squares: Any


def totals(tree: Any, valid_B: jax.Array) -> Totals:
    """Sums of `Effects` or `Curves` (any tree of `[B, ...]`); rows with `valid_B` False count nowhere."""

    def kept(x):
        valid = valid_B.reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(valid, x.astype(jnp.float32), 0.0)

    tree = jax.tree.map(kept, tree)
    squares = jax.tree.map(lambda x: jnp.square(x).sum(0), tree)
    return Totals(valid_B.sum(dtype=jnp.int32), jax.tree.map(lambda x: x.sum(0), tree), squares)


def means(found: Totals) -> tuple[Any, Any]:
    """(means over rows, their standard errors) as the tree that `totals` was given, float64, on the host.

    Leading axes (snapshots, draws) stay. The standard errors are those of independent rows, NaN for a single one.

    Raises:
      InputError: no valid row, or a metric that was not finite.
    """
    count, sums, squares = jax.device_get(found)
    count = np.asarray(count, np.float64)
    if (count < 1).any():
        raise InputError("no valid row to attribute on; give at least one pair with valid_B True")
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((sums, squares))):
        raise InputError("the metric or an attribution is NaN or infinite; check the model, the codes and the pairs")

    def shaped(leaf):
        return np.asarray(leaf, np.float64), count.reshape((*count.shape, *(1,) * (leaf.ndim - count.ndim)))

    def mean(total):
        total, n = shaped(total)
        return total / n

    def standard_error(total, square):
        total, n = shaped(total)
        spread = np.maximum(square - np.square(total) / n, 0.0)
        return np.sqrt(np.divide(spread, n * (n - 1), out=np.full(spread.shape, np.nan), where=n > 1))

    return jax.tree.map(mean, sums), jax.tree.map(standard_error, sums, squares)


# --- controls --------------------------------------------------------------------------------------------------------


class Control(NamedTuple):
    """Random features like the chosen ones."""

    index_RK: np.ndarray  # the partner of chosen feature k in draw r
    norm_RK: np.ndarray  # its log norm - that of the chosen feature
    rate_RK: np.ndarray  # its log rate - that of the chosen feature


def matched_random(
    seed: int,
    chosen_K: Array,
    log_norm_F: Array,
    log_rate_F: Array,
    *,
    draws: int = 1,
    nearest: int = NEAREST,
    caliper: float | None = None,
) -> Control:
    """For every chosen feature another one of about its log norm and log firing rate, as a control; on the host.

    In every draw the chosen features are taken in random order, and each gets one of the `nearest` free features by
    the distance in both numbers, each over its spread among the features that fire, all of them equally likely (ours).
    No partner is chosen or given out twice within a draw. Norms and rates are those of the snapshot in question, norms
    in raw units; features with a log that is not finite (silent ones) are nobody's partner. With a `caliper` a partner
    differs by at most so much in both logs. The differences are returned: report them.

    Raises:
      InputError: a chosen feature that is silent, or no feature left that could match one.
    """
    chosen_K = np.asarray(chosen_K)
    at_F2 = np.stack([np.asarray(jax.device_get(v), np.float64).reshape(-1) for v in (log_norm_F, log_rate_F)], -1)
    F = len(at_F2)
    _check_chosen(chosen_K, F)
    if chosen_K.ndim != 1 or draws < 1 or nearest < 1:
        raise InputError(f"a control of {draws} draws from the {nearest} nearest; give 1 or more, and one chosen list")
    if caliper is not None and not caliper >= 0:
        raise InputError(f"caliper is {caliper}; give a difference of logs from 0 on, or None")
    fires_F = np.isfinite(at_F2).all(1)
    if not fires_F[chosen_K].all():
        silent = chosen_K[~fires_F[chosen_K]][0]
        raise InputError(f"chosen feature {silent} has no finite log norm or log rate; choose features that fire")
    free_F = fires_F.copy()
    free_F[chosen_K] = False
    candidate_X = np.flatnonzero(free_F)
    K, X = len(chosen_K), len(candidate_X)
    if X < K:
        raise InputError(f"no features to match: {X} others fire, {K} are chosen; choose fewer")
    spread_2 = at_F2[fires_F].std(0)
    scaled_F2 = at_F2 / np.where(spread_2 > 0, spread_2, 1.0)
    index_RK = np.empty((draws, K), np.int64)
    for r, rng in enumerate(np.random.default_rng(seed).spawn(draws)):
        free_X = np.ones(X, bool)
        for k in rng.permutation(K):
            distance_X = np.square(scaled_F2[candidate_X] - scaled_F2[chosen_K[k]]).sum(1)
            fits_X = free_X
            if caliper is not None:
                fits_X = free_X & (np.abs(at_F2[candidate_X] - at_F2[chosen_K[k]]) <= caliper).all(1)
            pool = min(nearest, int(fits_X.sum()))
            if not pool:
                raise InputError(
                    f"no features to match feature {chosen_K[k]} within {caliper} of its log norm and log rate; "
                    "widen the caliper or choose fewer"
                )
            near_X = np.argsort(np.where(fits_X, distance_X, np.inf), kind="stable")[:pool]
            x = rng.choice(near_X)
            free_X[x] = False
            index_RK[r, k] = candidate_X[x]
    norm_RK, rate_RK = np.moveaxis(at_F2[index_RK] - at_F2[chosen_K][None], -1, 0)
    return Control(index_RK, norm_RK, rate_RK)


def halves(group_N: Array, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(pairs to choose features on, pairs to score them on): row numbers; half the groups each, none in both.

    A group (template, word, sentence) stays together, or what was memorised about it would count; `np.arange(N)` lets
    every pair be its own.

    Raises:
      InputError: fewer than two groups.
    """
    _, which_N = np.unique(np.asarray(group_N), return_inverse=True)
    groups = int(which_N.max(initial=-1)) + 1
    if groups < 2:
        raise InputError(f"{groups} group(s) of pairs to cut in half; give at least 2")
    first_N = np.isin(which_N, np.random.default_rng(seed).permutation(groups)[: groups // 2])
    return np.flatnonzero(first_N), np.flatnonzero(~first_N)


# --- snapshots of a transformer --------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """A batch of a task. The metric is logit(right) - logit(wrong) of the head at `position_B`: of the next token in
    causal models, of the masked token there in masked ones."""

    clean_BT: Array  # ids
    patch_BT: Array  # ids of the rows that the task is lost in, aligned token by token
    segment_BT: Array  # of both; 0: padding
    position_B: Array
    right_B: Array  # ids
    wrong_B: Array
    valid_B: Array  # False: the row only fills the batch up


def check_pairs(pairs: Pairs, cfg: TransformerConfig) -> Pairs:
    """The pairs as arrays that `jit` takes, or a refusal that names the first row that cannot be right. On the host."""
    pairs = Pairs(*(np.asarray(jax.device_get(leaf)) for leaf in pairs))
    if pairs.clean_BT.ndim != 2:
        raise InputError(f"clean rows of shape {list(pairs.clean_BT.shape)}; give ids [pairs, tokens]")
    B, T = pairs.clean_BT.shape
    for name, leaf in pairs._asdict().items():
        wanted = (B, T) if name.endswith("T") else (B,)
        if leaf.shape != wanted:
            raise InputError(f"pairs: {name} has shape {list(leaf.shape)}, not {list(wanted)}; align it with clean_BT")
        if leaf.dtype.kind not in "biu":
            raise InputError(f"pairs: {name} is of dtype {leaf.dtype}; give whole numbers")
    valid_B = pairs.valid_B.astype(bool)
    inside_B = (pairs.position_B >= 0) & (pairs.position_B < T)
    position_B = np.where(inside_B, pairs.position_B, 0)
    at_padding_B = np.take_along_axis(pairs.segment_BT, position_B[:, None], 1)[:, 0] == 0
    known = {name: (ids >= 0) & (ids < cfg.vocab_size) for name, ids in pairs._asdict().items()}
    problems = [
        (~inside_B, f"its position is not 0 to {T - 1}"),
        (inside_B & at_padding_B, "its position is padding"),
        (pairs.right_B == pairs.wrong_B, "its right and wrong answers are the same token"),
        *(
            (~known[name].all(1), f"{name} is not within 0 to {cfg.vocab_size - 1}")
            for name in ("clean_BT", "patch_BT")
        ),
        *((~known[name], f"{name} is not within 0 to {cfg.vocab_size - 1}") for name in ("right_B", "wrong_B")),
    ]
    for wrong_B, what in problems:
        if (wrong_B & valid_B).any():
            raise InputError(f"pair {np.flatnonzero(wrong_B & valid_B)[0]}: {what}; correct it or set valid_B False")
    return Pairs(*(jnp.asarray(leaf, jnp.int32) for leaf in pairs[:-1]), jnp.asarray(valid_B))


def through(params: transformer.Params, cfg: TransformerConfig, x_BTD, segment_BT, first, last) -> jax.Array:
    """The residual stream at depth `last` from that at depth `first`, both may be traced; depths as in
    `evaluate.splice`. Blocks outside cost nothing, forwards or backwards."""
    mask_BTT = transformer.attention_mask(segment_BT, cfg.causal)

    def body(x_BTD, layer):
        layer_params, m = layer

        def run(x_BTD):
            return transformer.block(layer_params, x_BTD, mask_BTT, cfg)[0]

        return jax.lax.cond((m >= first) & (m < last), run, lambda x_BTD: x_BTD, x_BTD), None

    layers = params["blocks"], jnp.arange(cfg.blocks, dtype=jnp.int32)
    return jax.lax.scan(body, x_BTD.astype(cfg.dtype), layers)[0]


def logit_difference(
    params: transformer.Params, cfg: TransformerConfig, pairs: Pairs, depth: int | jax.Array
) -> Metric:
    """m of one snapshot as a function of the whole stream at `depth`, float32.

    Raises:
      InputError: a depth beyond 0..L, or a model without a head.
    """
    if isinstance(depth, int | np.integer) and not 0 <= depth <= cfg.blocks:
        raise InputError(f"depth {depth} of a model with {cfg.blocks} blocks; choose 0 to {cfg.blocks}")
    if cfg.head == "none":
        raise InputError("a model without a head has no logits; attribute with a metric of your own")

    def metric(a_BTD):
        out_BTD = through(params, cfg, a_BTD, pairs.segment_BT, depth, cfg.blocks)
        out_BD = jnp.take_along_axis(out_BTD, pairs.position_B[:, None, None], axis=1)[:, 0]
        if cfg.norm == "pre":
            out_BD = transformer.apply_norm(params["final_norm"], out_BD, cfg)
        logits_BV = transformer.head(params, out_BD, cfg)
        right_B, wrong_B = (
            jnp.take_along_axis(logits_BV, ids_B[:, None], axis=1)[:, 0] for ids_B in (pairs.right_B, pairs.wrong_B)
        )
        return right_B - wrong_B

    return metric


class Reading(NamedTuple):
    """What all snapshots make of a batch of pairs."""

    clean_HBTD: jax.Array  # streams
    patch_HBTD: jax.Array
    clean_BTF: jax.Array  # codes that the snapshots share (`dictionary.encode`)
    patch_BTF: jax.Array


def read(
    dictionary: Dictionary,
    cfg: DictionaryConfig,
    params_H: transformer.Params,
    model_cfg: TransformerConfig,
    pairs: Pairs,
    depth: int | jax.Array,
) -> Reading:
    """Streams and codes of the clean and patched rows; `params_H`: the snapshots' parameters on a leading axis.

    The snapshots go one after the other. A batch_topk dictionary should have learnt its threshold: without it the
    codes of a token depend on the batch, padding included.

    Raises:
      InputError: another number of snapshots than the dictionary has heads, or a scale of every token's own.
    """
    if cfg.scale == "token":
        raise InputError("a dictionary with scale='token' has no fixed decoder to attribute to; use another scale")
    snapshots = len(jax.tree.leaves(params_H)[0])
    if snapshots != cfg.heads:
        raise InputError(f"{snapshots} snapshots for a dictionary of {cfg.heads} heads; stack one snapshot a head")
    ids_2BT = jnp.stack([pairs.clean_BT, pairs.patch_BT])

    def streams(params):
        def one(ids_BT):
            x_BTD = transformer.embed(params, ids_BT, model_cfg)
            return through(params, model_cfg, x_BTD, pairs.segment_BT, 0, depth)

        return jax.lax.map(one, ids_2BT)

    streams_H2BTD = jax.lax.map(streams, params_H).astype(jnp.float32)
    H, _, B, T, D = streams_H2BTD.shape

    def codes(stream_HBTD):
        return encode(dictionary, jnp.moveaxis(stream_HBTD, 0, 2).reshape(B * T, H, D), cfg).reshape(B, T, -1)

    clean_HBTD, patch_HBTD = streams_H2BTD[:, 0], streams_H2BTD[:, 1]
    return Reading(clean_HBTD, patch_HBTD, codes(clean_HBTD), codes(patch_HBTD))


def ends_at(
    dictionary: Dictionary,
    cfg: DictionaryConfig,
    reading: Reading,
    head: int | jax.Array,
    use_BT: jax.Array,
    baseline: str = "patched",
) -> Ends:
    """The `Ends` of one snapshot (`head` may be traced), with its own gate and its decoder in raw units."""
    params, norm = dictionary["params"], dictionary["norm"]
    B, T, F = reading.clean_BTF.shape
    clean_BTF, patch_BTF = (
        at_head(dictionary, z_BTF.reshape(B * T, F), cfg, head).reshape(B, T, F)
        for z_BTF in (reading.clean_BTF, reading.patch_BTF)
    )
    scale = norm["scale"][head]
    W_FD, b_D = params["W_dec"][head] / scale, params["b_dec"][head] / scale + norm["mean"][head]
    clean_BTD, patch_BTD = reading.clean_HBTD[head], reading.patch_HBTD[head]
    return make_ends(clean_BTD, clean_BTF, patch_BTD, patch_BTF, W_FD, b_D, use_BT, baseline)


def per_snapshot(
    fn: Callable[[Metric, Ends, Any], Any],
    dictionary: Dictionary,
    cfg: DictionaryConfig,
    params_H: transformer.Params,
    model_cfg: TransformerConfig,
    pairs: Pairs,
    depth: int | jax.Array,
    extra_H: Any = None,
    *,
    baseline: str = "patched",
    use_BT: jax.Array | None = None,
) -> Any:
    """`fn(metric, ends, extra)` of every snapshot, stacked on a leading axis H; under `jit`, `depth` may be traced.

    `extra_H` is what differs between snapshots, say ranks `[H, F]`. The dictionary stands where the rows are no padding
    and, if given, `use_BT` is True (bool), say without special tokens.
    """
    reading = read(dictionary, cfg, params_H, model_cfg, pairs, depth)
    real_BT = pairs.segment_BT > 0
    use_BT = real_BT if use_BT is None else real_BT & use_BT

    def one(member):
        head, params, extra = member
        ends = ends_at(dictionary, cfg, reading, head, use_BT, baseline)
        return fn(logit_difference(params, model_cfg, pairs, depth), ends, extra)

    return jax.lax.map(one, (jnp.arange(cfg.heads, dtype=jnp.int32), params_H, extra_H))
