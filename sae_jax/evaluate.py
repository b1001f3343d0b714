"""What a dictionary is worth: fidelity, sparsity, the model's loss through it, labels, matching, top contexts.

Systems give different numbers the same name, so every number here stands under the name of its definition (`summary`).
What runs over data is jitted and comes as sums and counts (`stats_of`, `association_counts`, `cross_moments`,
`top_update`, the spliced losses); what follows them runs once, on the host in float64.

    stats = add(stats, stats_of(x_BHD, xhat_BHD, z_BF, valid_B))        any batching
    summary(stats)["ev_global"]

A member of a bank is one more leading axis: `jax.vmap(stats_of, (None, 0, 0, None))`, `jax.vmap(add)`, and `summary`
takes the stacked sums as they are.

Letters beside those of the package: T tokens of a row of text, R rows of text, C classes, N rows of a whole set or
top contexts of a latent, X true directions, E latents of a second dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.special import rel_entr

from bert6_jax import classifier, transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError
from bert6_jax.masking import MaskingConfig
from bert6_jax.objectives import Batch, Sums, forward_inputs, gather_slots, masked_batch, token_sums
from sae_jax.config import DictionaryConfig
from sae_jax.dictionary import Dictionary, reconstruct

Array = jax.Array | np.ndarray
StreamFn = Callable[[jax.Array], jax.Array]  # [B, T, D] -> [B, T, D]

RARE = 1e-5  # density below which a latent is called rare (dictionary_learning, Anthropic)
RETAINED, ROTATED = 0.9, 0.5  # least matched cosines of these kinds (ours)
KINDS = ("dead", "new", "rotated", "retained")


def _host(tree: Any, what: str) -> Any:
    """The leaves in NumPy, floats in float64; refused where one is not finite."""

    def leaf(x):
        x = np.asarray(jax.device_get(x))
        if not np.isfinite(x).all():
            raise InputError(f"{what} hold NaN or infinity; check the activations and the dictionary with np.isfinite")
        return x.astype(np.float64) if x.dtype.kind == "f" else x.astype(np.int64)

    return jax.tree.map(leaf, tree)


def ratio(above, below, empty: float = np.nan) -> np.ndarray:
    """above / below in float64, `empty` where below is not positive."""
    above = np.asarray(above, np.float64)
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, empty), where=below > 0)


# --- fidelity and sparsity -------------------------------------------------------------------------------------------


class Stats(NamedTuple):
    """Sums over rows; x activations, y their reconstruction, e = x - y. Merged by `add` (not leaf by leaf).

    Second moments are around the mean of the rows they are over, so a mean far above the spread costs no digits.
    """

    rows: Array  # int32
    mean_x: Array  # [H, D]
    mean_y: Array
    mean_e: Array
    xx: Array  # [H, D] sum (x - mean_x)^2
    yy: Array
    ee: Array
    xy: Array  # [H, D] sum (x - mean_x) (y - mean_y)
    per_token: Array  # sum |e|^2 / |x - mean of the row's batch|^2
    per_token_rows: Array  # int32, rows where that is defined: not those of a batch without spread
    uncentred: Array  # sum |e|^2 / |x|^2
    uncentred_rows: Array  # int32, rows that are not zero
    cosine: Array  # [H] sum cos(x, y)
    active_F: Array  # int32, rows in which the latent is not zero
    z_F: Array  # sum |z|


def stats_of(x_BHD: jax.Array, xhat_BHD: jax.Array, z_BF: jax.Array, valid_B: jax.Array) -> Stats:
    """Sums of one batch: raw activations, reconstruction (`dictionary.reconstruct`) and codes of B rows.

    Rows with `valid_B` False count nowhere, whatever stands in them.

    Raises:
      InputError: shapes that do not belong together.
    """
    if x_BHD.ndim != 3 or xhat_BHD.shape != x_BHD.shape or z_BF.ndim != 2 or len(z_BF) != len(x_BHD):
        raise InputError(
            f"activations {list(x_BHD.shape)}, reconstruction {list(xhat_BHD.shape)}, codes {list(z_BF.shape)}; "
            "give [rows, heads, width] twice and [rows, latents]"
        )
    x, y = (jnp.where(valid_B[:, None, None], v.astype(jnp.float32), 0.0) for v in (x_BHD, xhat_BHD))
    z_BF = jnp.where(valid_B[:, None], z_BF.astype(jnp.float32), 0.0)
    e = x - y
    rows = valid_B.sum(dtype=jnp.int32)
    n = jnp.maximum(rows, 1).astype(jnp.float32)
    mean_x, mean_y, mean_e = (v.sum(0) / n for v in (x, y, e))
    cx, cy, ce = (
        jnp.where(valid_B[:, None, None], v - mean[None], 0.0) for v, mean in ((x, mean_x), (y, mean_y), (e, mean_e))
    )

    def ratios(above_B, below_B):
        defined_B = below_B > 0  # never in rows that do not count: they are zero
        ratio_B = jnp.where(defined_B, above_B / jnp.where(defined_B, below_B, 1.0), 0.0)
        return ratio_B.sum(), defined_B.sum(dtype=jnp.int32)

    error_B = jnp.square(e).sum((1, 2))
    norms_BH = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return Stats(
        rows,
        *(mean_x, mean_y, mean_e),
        *((cx * cx).sum(0), (cy * cy).sum(0), (ce * ce).sum(0), (cx * cy).sum(0)),
        *ratios(error_B, jnp.square(cx).sum((1, 2))),
        *ratios(error_B, jnp.square(x).sum((1, 2))),
        cosine=((x * y).sum(-1) / jnp.maximum(norms_BH, 1e-30)).sum(0),
        active_F=(z_BF != 0).sum(0, dtype=jnp.int32),
        z_F=jnp.abs(z_BF).sum(0),
    )


def add(a: Stats, b: Stats) -> Stats:
    """The sums of both sets of rows; second moments by Chan, Golub and LeVeque (1979)."""
    count_a, count_b = (s.rows.astype(jnp.float32) for s in (a, b))
    share = count_b / jnp.maximum(count_a + count_b, 1.0)
    dx, dy, de = b.mean_x - a.mean_x, b.mean_y - a.mean_y, b.mean_e - a.mean_e
    weight = count_a * share
    return jax.tree.map(jnp.add, a, b)._replace(
        mean_x=a.mean_x + share * dx,
        mean_y=a.mean_y + share * dy,
        mean_e=a.mean_e + share * de,
        xx=a.xx + b.xx + weight * dx * dx,
        yy=a.yy + b.yy + weight * dy * dy,
        ee=a.ee + b.ee + weight * de * de,
        xy=a.xy + b.xy + weight * dx * dy,
    )


def summary(stats: Stats) -> dict[str, Any]:
    """Every measure under the name of its definition; sums with a leading axis (a bank) give arrays with it.

        ev_global        1 - sum |e|^2 / sum |x - xbar|^2 over the whole set      SAELens 6.54; 1 - FVU of sparsify
        ev_global_H      the same of every head
        ev_per_token     mean over rows of 1 - |e|^2 / |x - xbar|^2, xbar the mean of the row's own batch: the only
                         measure that depends on the batching        SAELens explained_variance_legacy, OpenMOSS
        ev_variance      1 - sum_j var(e_j) / sum_j var(x_j): blind to a constant error         dictionary_learning
        ev_correlation   mean over dimensions of corr(x_j, xhat_j)^2: blind to scale and offset too; 0 where one side
                         is constant                                                                           saex
        nmse_uncentred   mean over rows of |e|^2 / |x|^2                                   OpenAI sparse_autoencoder
        mse              mean over rows of |e|^2, summed over heads and dimensions                           SAELens
        cosine           mean over rows and heads of cos(x, xhat), 0 where one of them is zero
        l0, l1           mean over rows of the number of codes that are not zero, and of sum_f |z_f|
        density_F        share of rows in which a latent is active
        dead, rare       share of latents that are silent on the whole set; with density below 1e-5 (dead ones too)

    A measure without anything to divide by (constant activations) is NaN.

    Raises:
      InputError: no valid row, or sums that are not finite.
    """
    s: Stats = _host(stats, "the sums of the activations")
    if (s.rows < 1).any():
        raise InputError("no valid row to evaluate a dictionary on; give at least one with valid_B True")
    n = s.rows.astype(np.float64)
    error_H = s.ee.sum(-1) + n[..., None] * np.square(s.mean_e).sum(-1)
    spread_H = s.xx.sum(-1)
    error, spread = error_H.sum(-1), spread_H.sum(-1)
    density_F = s.active_F / n[..., None]
    out = {
        "ev_global": 1.0 - ratio(error, spread),
        "ev_global_H": 1.0 - ratio(error_H, spread_H),
        "ev_per_token": 1.0 - ratio(s.per_token, s.per_token_rows),
        "ev_variance": 1.0 - ratio(s.ee.sum((-2, -1)), spread),
        "ev_correlation": ratio(np.square(s.xy), s.xx * s.yy, empty=0.0).mean((-2, -1)),
        "nmse_uncentred": ratio(s.uncentred, s.uncentred_rows),
        "mse": error / n,
        "cosine": s.cosine.mean(-1) / n,
        "l0": density_F.sum(-1),
        "l1": s.z_F.sum(-1) / n,
        "dead": (s.active_F == 0).mean(-1),
        "rare": (density_F < RARE).mean(-1),
        "density_F": density_F,
    }
    return {name: value[()] for name, value in out.items()}


def gamma(x_NHD: jax.Array) -> jax.Array:
    """|mean| / |std| of every head's activations, `[H]`, over their D dimensions.

    It predicts how many latents of a dictionary without centring are dead from the start (arXiv 2605.31518).
    """
    x_NHD = x_NHD.astype(jnp.float32)
    mean_HD = x_NHD.mean(0)
    std_HD = jnp.sqrt(jnp.square(x_NHD - mean_HD[None]).mean(0))
    return jnp.linalg.norm(mean_HD, axis=-1) / jnp.linalg.norm(std_HD, axis=-1)


# --- the model's loss through a dictionary ---------------------------------------------------------------------------


def reconstructor(dictionary: Dictionary, cfg: DictionaryConfig) -> StreamFn:
    """The reconstruction by an autoencoder as a function of the residual stream, for `splice`.

    A batch_topk dictionary should have learnt its threshold: without it the codes of a token depend on the batch,
    padding included.
    """
    if cfg.heads != 1:
        raise InputError(f"a dictionary of {cfg.heads} heads reads several places; splice one with a single head")

    def fn(x_BTD):
        xhat_B1D, _ = reconstruct(dictionary, x_BTD.reshape(-1, 1, x_BTD.shape[-1]), cfg)
        return xhat_B1D.reshape(x_BTD.shape)

    return fn


def mean_ablation(mean_D: jax.Array) -> StreamFn:
    """Every replaced position becomes `mean_D`; `jnp.zeros_like` is zero ablation."""
    return lambda x_BTD: jnp.broadcast_to(mean_D[None, None], x_BTD.shape)


def splice(
    params: transformer.Params,
    cfg: TransformerConfig,
    batch: Batch,
    depth: int | jax.Array,
    fn: StreamFn,
    replaced_BT: jax.Array | None = None,
) -> jax.Array:
    """What the head reads, `[B, T, D]` as `transformer.forward` gives it, with the stream at `depth` replaced by `fn`.

    `depth` may be traced: 0 is the embedding output, m the output of block m, as in `acts["resid"]` (after the block's
    norm in post-LN models, before the final norm in pre-LN ones). Replaced are the positions that are no padding and,
    if given, in `replaced_BT` (bool), say without special tokens. No dropout.

    Raises:
      InputError: a depth beyond 0..L, or an `fn` that changes the shape.
    """
    if isinstance(depth, int | np.integer) and not 0 <= depth <= cfg.blocks:
        raise InputError(f"depth {depth} of a model with {cfg.blocks} blocks; choose 0 to {cfg.blocks}")
    inputs = forward_inputs(batch)
    segment_BT = inputs.pop("segment_BT")
    segment_BT = jnp.ones_like(batch["ids"]) if segment_BT is None else segment_BT
    replaced_BT = segment_BT > 0 if replaced_BT is None else replaced_BT & (segment_BT > 0)

    def replace(x_BTD):
        y_BTD = fn(x_BTD)
        if y_BTD.shape != x_BTD.shape:
            raise InputError(
                f"a stream of shape {list(x_BTD.shape)} was replaced by {list(y_BTD.shape)}; keep its shape"
            )
        return jnp.where(replaced_BT[:, :, None], y_BTD.astype(x_BTD.dtype), x_BTD)

    def at(m, x_BTD):
        return jax.lax.cond(m == depth, replace, lambda x_BTD: x_BTD, x_BTD)

    mask_BTT = transformer.attention_mask(segment_BT, cfg.causal)

    def body(x_BTD, layer):
        layer_params, m = layer
        return transformer.block(layer_params, at(m, x_BTD), mask_BTT, cfg)[0], None

    x_BTD = transformer.embed(params, batch["ids"], cfg, **inputs)
    x_BTD, _ = jax.lax.scan(body, x_BTD, (params["blocks"], jnp.arange(cfg.blocks, dtype=jnp.int32)))
    x_BTD = at(cfg.blocks, x_BTD)
    return transformer.apply_norm(params["final_norm"], x_BTD, cfg) if cfg.norm == "pre" else x_BTD


def mlm_loss_spliced(
    params: transformer.Params,
    cfg: TransformerConfig,
    masking: MaskingConfig,
    batch: Batch,
    key: jax.Array,
    depth: int | jax.Array,
    fn: StreamFn,
    replaced_BT: jax.Array | None = None,
) -> Sums:
    """Sums `loss` (nats), `hits`, `count` of the masked-LM loss at the positions that `key` corrupts; see `splice`."""
    corrupted, _ = masked_batch(batch, key, masking)
    out_BTD = splice(params, cfg, batch | {"ids": corrupted.ids_BT}, depth, fn, replaced_BT)
    logits_BKV = transformer.head(params, gather_slots(out_BTD, corrupted.slot_BK), cfg)
    return token_sums(logits_BKV, corrupted.target_BK, corrupted.valid_BK)


def classifier_loss_spliced(
    params: transformer.Params,
    cfg: TransformerConfig,
    pooling: str,
    batch: Batch,
    depth: int | jax.Array,
    fn: StreamFn,
    replaced_BT: jax.Array | None = None,
) -> Sums:
    """Sums `loss` (nats), `hits`, `count` of a classifier's (`classifier.assemble`) cross-entropy; see `splice`."""
    out_BTD = splice(params, cfg, batch, depth, fn, replaced_BT)
    logits_BC = classifier.head_logits(params, out_BTD, batch["segment"], cfg, pooling)
    return token_sums(logits_BC, batch["label"], batch["valid"])


def recovered(loss_clean, loss_spliced, loss_ablated) -> np.ndarray:
    """Loss recovered: (ablated - spliced) / (ablated - clean), 1 for a perfect reconstruction, 0 for one no better than
    the ablation (zero or mean: say which); NaN where the ablation does no harm. Mean losses of the same positions.
    """
    clean, spliced, ablated = (
        np.asarray(jax.device_get(v), np.float64) for v in (loss_clean, loss_spliced, loss_ablated)
    )
    return ratio(ablated - spliced, ablated - clean)[()]


# --- latents and labels ----------------------------------------------------------------------------------------------


def auroc(z_NF, label_N: Array, num_classes: int) -> np.ndarray:
    """One-vs-rest area under the ROC curve of every latent for every class, `[C, F]` float64, on the host.

    Ties share their mean rank, so a silent latent has 0.5; NaN for a class that has no row or all of them. `z_NF` is
    an array or a `scipy.sparse` matrix; only the codes that are not zero are sorted.

    Raises:
      InputError: labels that are not 0 to `num_classes` - 1, rows that do not match, NaN codes.
    """
    label_N = np.asarray(label_N)
    z_NF = z_NF.tocsc() if sparse.issparse(z_NF) else np.asarray(z_NF)
    (N, F), C = z_NF.shape, num_classes
    if len(label_N) != N or N == 0:
        raise InputError(f"{len(label_N)} labels for {N} rows of codes; give one label a row and at least one row")
    wrong_N = np.flatnonzero((label_N < 0) | (label_N >= C))
    if wrong_N.size:
        raise InputError(
            f"row {wrong_N[0]}: label {label_N[wrong_N[0]]} is not 0 to {C - 1}; number the classes from 0"
        )
    total_C = np.bincount(label_N, minlength=C).astype(np.float64)
    rank_sum_CF = np.empty((C, F))
    for begin in range(0, F, 64):  # 64 columns at a time: a column alone would read a whole row-major array
        part = sparse.csc_array(z_NF[:, begin : begin + 64], copy=True)
        part.eliminate_zeros()
        if not np.isfinite(part.data).all():
            raise InputError(f"codes of latents from {begin} on are not finite; check the activations with np.isfinite")
        for f, (low, high) in enumerate(zip(part.indptr[:-1], part.indptr[1:], strict=True), begin):
            label_X = label_N[part.indices[low:high]]
            rank_X, zero_rank = _midranks(part.data[low:high], N)
            silent_C = total_C - np.bincount(label_X, minlength=C)
            rank_sum_CF[:, f] = np.bincount(label_X, rank_X, minlength=C) + silent_C * zero_rank
    total_C1 = total_C[:, None]
    return ratio(rank_sum_CF - total_C1 * (total_C1 + 1) / 2, total_C1 * (N - total_C1) * np.ones((1, F)))


def _midranks(value_X: np.ndarray, N: int) -> tuple[np.ndarray, float]:
    """Mean ranks (1: the smallest) of the values that are not zero among N, and the rank that the zeros share."""
    _, which_X, count_U = np.unique(value_X, return_inverse=True, return_counts=True)
    zeros = N - value_X.size
    below_X = np.cumsum(count_U)[which_X] - count_U[which_X]
    rank_X = below_X + (count_U[which_X] + 1) / 2 + np.where(value_X > 0, zeros, 0)
    return rank_X, (value_X < 0).sum() + (zeros + 1) / 2


class Association(NamedTuple):
    """Counts of rows, int32, added over batches by `jax.tree.map(jnp.add, a, b)`."""

    rows: Array
    total_C: Array  # of each class
    active_FC: Array  # of each class in which the latent is not zero


def association_counts(z_BF: jax.Array, label_B: jax.Array, valid_B: jax.Array, num_classes: int) -> Association:
    """Counts of one batch for `mutual_information`; rows with `valid_B` False count nowhere."""
    weight_BC = jax.nn.one_hot(label_B, num_classes) * valid_B.astype(jnp.float32)[:, None]
    active_BF = (z_BF != 0).astype(jnp.float32)
    active_FC = jnp.einsum("bf,bc->fc", active_BF, weight_BC)  # zeros and ones: exact at any precision
    return Association(valid_B.sum(dtype=jnp.int32), weight_BC.sum(0).astype(jnp.int32), active_FC.astype(jnp.int32))


def mutual_information(counts: Association, miller_madow: bool = False) -> np.ndarray:
    """Mutual information of "the latent is active" and the label in nats, `[F]` float64.

    The plug-in estimate is too high, by about (C - 1) / 2N for unrelated ones; `miller_madow` takes off the bias of
    the three entropies, (K_both - K_active - K_label + 1) / 2N with K the values that occur, and may go below 0.

    Raises:
      InputError: no row, or labels that were out of range.
    """
    rows, total_C, active_FC = _host(counts, "association counts")
    if rows < 1:
        raise InputError("no valid row to associate latents and labels on; give at least one with valid_B True")
    if total_C.sum() != rows:
        raise InputError(f"{rows - total_C.sum()} of {rows} labels are not 0 to {len(total_C) - 1}; number from 0")
    p_F2C = np.stack([active_FC, total_C[None] - active_FC], axis=1) / rows
    independent_F2C = p_F2C.sum(2, keepdims=True) * p_F2C.sum(1, keepdims=True)
    nats_F = rel_entr(p_F2C, independent_F2C).sum((1, 2))
    if not miller_madow:
        return nats_F
    cells_F = sum((p_F2C.sum(axis) > 0).sum(1) for axis in (1, 2)) - (p_F2C > 0).sum((1, 2))
    return nats_F + (cells_F - 1) / (2 * rows)


# --- matching two dictionaries ---------------------------------------------------------------------------------------


class Matching(NamedTuple):
    """What dictionary b's E latents have become of dictionary a's F."""

    index_E: np.ndarray  # the latent of a, -1 for none: dead, or more alive latents than a has
    similarity_E: np.ndarray  # float64, NaN without a partner
    kind_E: np.ndarray  # index into KINDS
    counts: dict[str, int]  # of each kind, and `lost`: alive latents of a with no retained or rotated partner


def match_similarity(
    similarity_FE: Array,
    *,
    alive_F: Array | None = None,
    alive_E: Array | None = None,
    retained: float = RETAINED,
    rotated: float = ROTATED,
) -> Matching:
    """One-to-one matching with the largest summed similarity (Hungarian), among the alive latents of both.

    A latent of b is `retained` where its partner's similarity is at least `retained`, `rotated` where it is at least
    `rotated`, else `new`; both thresholds are ours. About 7 s for F = E = 8,192.

    Raises:
      InputError: similarities that are not finite, masks of other lengths, or no alive latent on a side.
    """
    similarity_FE = np.asarray(similarity_FE)
    F, E = similarity_FE.shape
    alive_F = np.ones(F, bool) if alive_F is None else np.asarray(alive_F, bool)
    alive_E = np.ones(E, bool) if alive_E is None else np.asarray(alive_E, bool)
    if alive_F.shape != (F,) or alive_E.shape != (E,):
        raise InputError(f"masks of {alive_F.size} and {alive_E.size} latents for {F} and {E}; give one flag a latent")
    if not np.isfinite(similarity_FE).all():
        raise InputError("the latents to match have NaN or infinite similarities; check both dictionaries")
    at_a, at_b = np.flatnonzero(alive_F), np.flatnonzero(alive_E)
    if not at_a.size or not at_b.size:
        raise InputError("a dictionary to match has no alive latent; check its mask, or train it longer")
    row, column = linear_sum_assignment(similarity_FE[np.ix_(at_a, at_b)], maximize=True)
    index_E, similarity_E = np.full(E, -1), np.full(E, np.nan)
    index_E[at_b[column]] = at_a[row]
    similarity_E[at_b[column]] = similarity_FE[at_a[row], at_b[column]]
    kind_E = np.where(similarity_E >= retained, 3, np.where(similarity_E >= rotated, 2, 1))
    kind_E = np.where(alive_E, kind_E, 0)
    counts = {kind: int((kind_E == i).sum()) for i, kind in enumerate(KINDS)}
    counts["lost"] = int(at_a.size) - counts["retained"] - counts["rotated"]
    return Matching(index_E, similarity_E, kind_E, counts)


def cosines(a_FD: Array, b_ED: Array, absolute: bool = False) -> np.ndarray:
    """Cosine of every direction of a with every one of b, `[F, E]` float32; 0 where one is zero."""
    a_FD, b_ED = np.asarray(a_FD), np.asarray(b_ED)
    if a_FD.ndim != 2 or b_ED.ndim != 2 or a_FD.shape[1] != b_ED.shape[1]:
        raise InputError(f"directions of shapes {list(a_FD.shape)} and {list(b_ED.shape)}; give [latents, width] twice")
    units = [
        (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-30)).astype(np.float32)
        for v in (a_FD.astype(np.float64), b_ED.astype(np.float64))
    ]
    cosine_FE = units[0] @ units[1].T
    return np.abs(cosine_FE) if absolute else cosine_FE


def match(a_FD: Array, b_ED: Array, *, absolute: bool = False, **settings) -> Matching:
    """`match_similarity` (which has the settings) by the cosine of two decoders' directions, or by its absolute value.

    Codes are not negative, so a direction and its opposite are two features: `absolute` is for axes, not for latents.
    """
    return match_similarity(cosines(a_FD, b_ED, absolute), **settings)


def match_chance(a_FD: Array, b_ED: Array, *, seed: int = 0, absolute: bool = False, **settings) -> Matching:
    """`match` against as many random directions as b has (isotropic Gaussian): what chance gives."""
    random_ED = np.random.default_rng(seed).normal(size=np.shape(b_ED))
    return match(a_FD, random_ED, absolute=absolute, **settings)


class CrossMoments(NamedTuple):
    """Sums over rows of the codes of two dictionaries, float32, added by `jax.tree.map(jnp.add, a, b)`."""

    rows: Array  # int32
    a_F: Array
    b_E: Array
    aa_F: Array
    bb_E: Array
    ab_FE: Array


def cross_moments(a_BF: jax.Array, b_BE: jax.Array, valid_B: jax.Array) -> CrossMoments:
    """Sums of one batch for `correlation`. Not centred: codes are mostly zero, so little cancels."""
    a_BF, b_BE = (jnp.where(valid_B[:, None], z.astype(jnp.float32), 0.0) for z in (a_BF, b_BE))
    ab_FE = jnp.einsum("bf,be->fe", a_BF, b_BE, precision=jax.lax.Precision.HIGHEST)
    return CrossMoments(
        valid_B.sum(dtype=jnp.int32), a_BF.sum(0), b_BE.sum(0), (a_BF * a_BF).sum(0), (b_BE * b_BE).sum(0), ab_FE
    )


def correlation(moments: CrossMoments) -> np.ndarray:
    """Pearson correlation of every two latents, `[F, E]` float64, for `match_similarity`; 0 where one is constant."""
    m: CrossMoments = _host(moments, "the sums of the codes")
    if m.rows < 2:
        raise InputError(f"{m.rows} valid row(s) are too few for a correlation; give at least 2")
    var_F, var_E = m.aa_F - np.square(m.a_F) / m.rows, m.bb_E - np.square(m.b_E) / m.rows
    # Below the rounding of the float32 sums a variance is none.
    std_F = np.sqrt(np.where(var_F > 1e-6 * m.aa_F, var_F, 0.0))
    std_E = np.sqrt(np.where(var_E > 1e-6 * m.bb_E, var_E, 0.0))
    return ratio(m.ab_FE - np.outer(m.a_F, m.b_E / m.rows), np.outer(std_F, std_E), empty=0.0)


def recovery(decoder_FD: Array, truth_XD: Array, above: float = 0.9) -> dict[str, float]:
    """How well latents recover planted directions, all by |cosine|.

    matched_cosine        mean over truths of the latent matched one to one (Hungarian); 0 for a truth left over
    share_above           share of truths whose match is above `above`
    mmcs_truth_to_latents mean over truths of the largest |cosine| with any latent
    mmcs_latents_to_truth mean over latents of the largest |cosine| with any truth: falls with spurious latents
    """
    cosine_FX = cosines(decoder_FD, truth_XD, absolute=True)
    matched_X = np.nan_to_num(match_similarity(cosine_FX).similarity_E)
    return {
        "matched_cosine": float(matched_X.mean()),
        "share_above": float((matched_X > above).mean()),
        "mmcs_truth_to_latents": float(cosine_FX.max(0).mean(dtype=np.float64)),
        "mmcs_latents_to_truth": float(cosine_FX.max(1).mean(dtype=np.float64)),
    }


# --- recovery of a planted evolution ---------------------------------------------------------------------------------


def evolution_recovery(
    decoder_HFD: Array,
    directions_HXD: Array,
    strength_HX: Array,
    group_X: Array | Sequence[str] | None = None,
    *,
    matched: float = 0.5,
    present: float = 0.5,
    weak: float = 0.1,
    absent: float = 0.01,
    near: int = 1,
    turning: float = 10.0,
    split: float = 0.7,
    called_absent: float = 0.05,
    called_present: float = 0.3,
) -> dict[str, Any]:
    """How well a crosscoder over H snapshots recovers planted features that come, go and turn. All of it, definitions
    and thresholds, is ours.

    `decoder_HFD` are decoder rows in raw units (W_dec / norm.scale: strengths of snapshots must be comparable),
    `directions_HXD` the true directions, `strength_HX` the true strengths up to a factor a feature (with `Evolution` of
    `synthetic.planted`: `directions`, `strength`, and `group` for the labels). Scales of latents and features, and the
    order of the latents, do not matter; the order of the snapshots is that of training.

    Similarity of latent f and feature x: the cosine of their snapshots laid end to end, decoder rows W_hf and
    strength_hx direction_hx, so that a snapshot weighs as much as its norms; signed, because codes are not negative.
    The matching is one to one (Hungarian). A feature is matched where its latent's similarity is at least `matched`: a
    latent with the right direction in less than a quarter of a steady feature's snapshots (sqrt(1 / 4)) is no match.

    r_hx is the feature's strength over its largest, n_hx its latent's norm |W_hf| over its largest. A feature is there
    at h where r_hx >= `present`. Of a curve (r or n) over h,

        emergence  is the first h with curve_h > 1/2
        end        is 1 + the last such h; H: it stays
        rotation   is the angle, in degrees, from the direction at the first to that at the last h where the feature is
                   there
        turn       is the first h where it is there with an angle from the first direction above half of the rotation;
                   H: none

    Scores, over all features, and under `groups` over those of each label in `group_X`; NaN where there is nothing to
    average. Where "matched" does not say otherwise, they are over the matched features.

        features            how many, matched or not
        matched             share of features
        mmcs_H              mean over features there at h, matched or not, of the cosine of W_hf and direction_hx; 0 for
                            one that no latent was left for
        mmcs                the same over all h and features that are there
        emergence_error     mean |snapshots| between the emergence of n and of r, over features with emergence above 0
        emergence_near      share of these with an error of at most `near`
        end_error, end_near the same of the end, over features with an end below H
        rotation_error      mean |degrees| between the rotations, over features with a rotation above `turning` degrees
        turn_error          mean |snapshots| between the turns, over the same
        still_rotation      mean rotation of the latents of the other features that are there at two or more h
        curve_correlation   mean Pearson correlation over h of n and r, 0 where n is constant, over features whose r is
                            not
        curve_error         mean over features and h of |n - r|
        false_exclusive     share, among features with r_hx >= `weak` at every h (shared), of those with n_hx <
                            `called_absent` at some h: complete shrinkage
        false_shared        share, among features with r_hx < `absent` at some h, of those with n_hx > `called_present`
                            at such an h
        split               features, matched or not, with two or more latents of similarity above `split`
        merged              features, matched or not, with a latent of similarity above `split` to it and to another one

    `latent_X` are the matched latents, -1 for a feature left over, and `similarity_X` their similarities, then 0.

    Raises:
      InputError: shapes that do not belong together, values that are not finite, a feature that is never there.
    """
    W_HFD, directions_HXD, strength_HX = (
        np.asarray(v, np.float64)
        for v in _host((decoder_HFD, directions_HXD, strength_HX), "the decoder or the planted evolution")
    )
    decoder, directions, strengths = (v.shape for v in (W_HFD, directions_HXD, strength_HX))
    if len(decoder) != 3 or len(directions) != 3 or strengths != directions[:2] or decoder[::2] != directions[::2]:
        raise InputError(
            f"decoder {list(decoder)}, directions {list(directions)}, strengths {list(strengths)}; give [snapshots, "
            "latents, width], [snapshots, features, width] and [snapshots, features]"
        )
    H, X = strength_HX.shape
    label_X = None if group_X is None else np.asarray(jax.device_get(group_X))
    if label_X is not None and label_X.shape != (X,):
        raise InputError(f"group labels of shape {list(label_X.shape)} for {X} features; give one a feature")
    if (strength_HX < 0).any() or not (strength_HX.max(0) > 0).all():
        raise InputError("a planted feature has a negative strength, or none at any snapshot; check strength_HX")

    def laid(v_HYD):
        return v_HYD.transpose(1, 0, 2).reshape(v_HYD.shape[1], -1)

    similarity_FX = cosines(laid(W_HFD), laid(directions_HXD * strength_HX[:, :, None]))
    matching = match_similarity(similarity_FX)
    latent_X, similarity_X = matching.index_E, np.nan_to_num(matching.similarity_E)
    matched_X = similarity_X >= matched
    rows_HXD = np.where((latent_X >= 0)[None, :, None], W_HFD[:, latent_X], 0.0)
    norm_HX = np.linalg.norm(rows_HXD, axis=-1)
    n_HX, r_HX = ratio(norm_HX, norm_HX.max(0), empty=0.0), strength_HX / strength_HX.max(0)
    units_HXD, true_HXD = (
        v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-30) for v in (rows_HXD, directions_HXD)
    )

    there_HX = r_HX >= present
    cosine_HX = (units_HXD * true_HXD).sum(-1)
    (begin_X, end_X), (true_begin_X, true_end_X) = _span(n_HX > 0.5), _span(r_HX > 0.5)
    begin_error_X, end_error_X = np.abs(begin_X - true_begin_X), np.abs(end_X - true_end_X)
    (rotation_X, turn_X), (true_rotation_X, true_turn_X) = (_rotation(v, there_HX) for v in (units_HXD, true_HXD))
    turns_X, several_X = true_rotation_X > turning, there_HX.sum(0) > 1

    n_c, r_c = n_HX - n_HX.mean(0), r_HX - r_HX.mean(0)
    varies_X = np.ptp(r_HX, axis=0) > 1e-6  # below that it is rounding
    scale_X = np.sqrt(np.square(n_c).sum(0) * np.square(r_c).sum(0))
    curve_X = np.where(np.ptp(n_HX, axis=0) > 1e-6, ratio((n_c * r_c).sum(0), scale_X, empty=0.0), 0.0)

    shared_X, gone_HX = (r_HX >= weak).all(0), r_HX < absent
    close_FX = similarity_FX > split
    split_X = close_FX.sum(0) > 1
    merged_X = close_FX[close_FX.sum(1) > 1].any(0)

    def scores(of_X):
        def mean(value_X, over_X):
            taken_X = of_X & matched_X & over_X
            return float(value_X[taken_X].mean(dtype=np.float64)) if taken_X.any() else float("nan")

        there = there_HX & of_X[None]
        everyone_X = np.ones(X, bool)
        emerges_X, ends_X = true_begin_X > 0, true_end_X < H
        return {
            "features": int(of_X.sum()),
            "matched": float(matched_X[of_X].mean()),
            "mmcs_H": ratio((cosine_HX * there).sum(1), there.sum(1)),
            "mmcs": float(cosine_HX[there].mean()),
            "emergence_error": mean(begin_error_X, emerges_X),
            "emergence_near": mean(begin_error_X <= near, emerges_X),
            "end_error": mean(end_error_X, ends_X),
            "end_near": mean(end_error_X <= near, ends_X),
            "rotation_error": mean(np.abs(rotation_X - true_rotation_X), turns_X),
            "turn_error": mean(np.abs(turn_X - true_turn_X), turns_X),
            "still_rotation": mean(rotation_X, ~turns_X & several_X),
            "curve_correlation": mean(curve_X, varies_X),
            "curve_error": mean(np.abs(n_HX - r_HX).mean(0), everyone_X),
            "false_exclusive": mean((n_HX < called_absent).any(0), shared_X),
            "false_shared": mean((gone_HX & (n_HX > called_present)).any(0), gone_HX.any(0)),
            "split": int((split_X & of_X).sum()),
            "merged": int((merged_X & of_X).sum()),
        }

    out: dict[str, Any] = scores(np.ones(X, bool)) | {"latent_X": latent_X, "similarity_X": similarity_X}
    if label_X is not None:
        out["groups"] = {label: scores(label_X == label) for label in np.unique(label_X).tolist()}
    return out


def _span(on_HX: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first snapshot that is on, and the one after the last; H and 0 where none is."""
    H = len(on_HX)
    any_X = on_HX.any(0)
    return np.where(any_X, on_HX.argmax(0), H), np.where(any_X, H - on_HX[::-1].argmax(0), 0)


def _rotation(units_HXD: np.ndarray, there_HX: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Degrees between the directions of the first and the last snapshot of `there_HX`, and the first snapshot there
    past half of them (H: none). A row of zeros stands at a right angle to every direction.
    """
    H, X = there_HX.shape
    first_X, end_X = _span(there_HX)
    start_1XD = units_HXD[first_X, np.arange(X)][None]
    # Not the arccosine of the cosine, which has no digits near 0.
    apart_HX, sum_HX = (np.linalg.norm(v, axis=-1) for v in (units_HXD - start_1XD, units_HXD + start_1XD))
    angle_HX = np.degrees(2 * np.arctan2(apart_HX, sum_HX))
    rotation_X = angle_HX[end_X - 1, np.arange(X)]
    turn_X, _ = _span(there_HX & (angle_HX > rotation_X / 2))
    return rotation_X, turn_X


# --- top contexts ----------------------------------------------------------------------------------------------------


class TopContexts(NamedTuple):
    """The N rows of text in which a latent is most active, largest first; equal ones by the number of the row."""

    value_FN: jax.Array  # float32, the code; 0 where there are fewer than N rows
    row_FN: jax.Array  # int32, -1 where there are fewer
    position_FN: jax.Array  # int32, where in the row; the first of equal ones


def top_init(latents: int, contexts: int) -> TopContexts:
    """Nothing seen yet."""
    shape = (latents, contexts)  # an array each: the leaves of what a loop donates must not share memory
    return TopContexts(jnp.zeros(shape, jnp.float32), jnp.full(shape, -1, jnp.int32), jnp.full(shape, -1, jnp.int32))


def top_update(top: TopContexts, z_RTF: jax.Array, row_R: jax.Array, valid_RT: jax.Array) -> TopContexts:
    """Add R rows of text with the numbers `row_R` (int32), each once: a row counts with its most active position only,
    so that contexts are distinct. Positions with `valid_RT` False count nowhere. The result does not depend on the
    order or the batching of the rows.
    """
    F, N = top.value_FN.shape
    if z_RTF.ndim != 3 or z_RTF.shape[-1] != F or valid_RT.shape != z_RTF.shape[:2]:
        raise InputError(
            f"codes {list(z_RTF.shape)}, mask {list(valid_RT.shape)}; give [rows, tokens, {F}] and its mask"
        )
    z_RTF = jnp.where(valid_RT[:, :, None], z_RTF.astype(jnp.float32), 0.0)
    position_RF = jnp.argmax(z_RTF, axis=1).astype(jnp.int32)
    value_RF = z_RTF.max(1)
    value_RF = jnp.where(jnp.isnan(value_RF), jnp.inf, value_RF)  # so that `contexts` sees it
    active_RF = value_RF > 0
    row_RF = jnp.where(active_RF, row_R[:, None], -1)
    new = (jnp.where(active_RF, value_RF, 0.0), row_RF, jnp.where(active_RF, position_RF, -1))
    value, row, position = (jnp.concatenate([old, n.T], axis=1) for old, n in zip(top, new, strict=True))
    value, row, position = jax.lax.sort((-value, row, position), dimension=1, num_keys=2)
    return TopContexts(-value[:, :N], row[:, :N], position[:, :N])


def contexts(
    top: TopContexts,
    ids_NT: np.ndarray,
    segment_NT: np.ndarray,
    strings: Sequence[str],
    window: int,
    codes_of: Callable[[np.ndarray], Array],
    latents: Sequence[int] | None = None,
    batch: int = 32,
) -> list[list[dict[str, Any]]]:
    """The top contexts of the `latents` (default: all) as text, one list a latent, most active first.

    Each is `{row, tokens, values, peak}`: the strings of the ids up to `window` positions left and right of the peak
    and in its segment, the latent's codes there, and the index of the peak among them. `ids_NT`, `segment_NT` are the
    rows that `top` numbers; `codes_of` gives the codes `[R, T, F]` of `batch` row numbers at a time.

    Raises:
      InputError: rows that `ids_NT` does not have, or codes that are not finite.
    """
    value_FN, row_FN, position_FN = (np.asarray(jax.device_get(leaf)) for leaf in top)
    latents = range(len(row_FN)) if latents is None else latents
    if not np.isfinite(value_FN).all():
        raise InputError("codes in the top contexts are not finite; check the activations with np.isfinite")
    if row_FN.max(initial=-1) >= len(ids_NT):
        raise InputError(f"a top context is row {row_FN.max()} of {len(ids_NT)}; give the rows that were streamed")
    wanted: dict[int, list[tuple[int, int]]] = {}  # row -> where it goes
    for i, f in enumerate(latents):
        for n in np.flatnonzero(row_FN[f] >= 0):
            wanted.setdefault(int(row_FN[f, n]), []).append((i, int(n)))
    found: list[dict[int, dict[str, Any]]] = [{} for _ in latents]
    rows = np.array(sorted(wanted), np.int32)
    for begin in range(0, len(rows), batch):
        taken = rows[begin : begin + batch]
        filled = np.concatenate([taken, np.full(batch - len(taken), taken[0], np.int32)])  # one shape, one program
        z_RTF = np.asarray(jax.device_get(codes_of(filled)))
        for z_TF, row in zip(z_RTF[: len(taken)], taken, strict=True):
            segment_T = segment_NT[row]
            for i, n in wanted[int(row)]:
                f, at = latents[i], int(position_FN[latents[i], n])
                low = max(0, at - window)
                shown = low + np.flatnonzero(segment_T[low : at + window + 1] == segment_T[at])
                found[i][n] = {
                    "row": int(row),
                    "tokens": [strings[token] for token in ids_NT[row, shown]],
                    "values": z_TF[shown, f].tolist(),
                    "peak": int(np.searchsorted(shown, at)),
                }
    return [[places[n] for n in sorted(places)] for places in found]
