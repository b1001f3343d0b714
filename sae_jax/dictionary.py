"""The dictionary: parameters, codes, reconstruction, losses. Pure functions over nested dicts.

A dictionary is a tree that one checkpoint holds:

    params     W_enc [H, F, D], b_enc [F], W_dec [H, F, D], b_dec [H, D]: a latent's directions are rows of both;
               gated: r_mag [F], b_mag [F] (b_enc is the gate's bias); jumprelu: log_threshold [F]
    norm       mean [H, D], scale [H]: what activations are normalised with; stored, never folded in silence
    threshold  [] batch_topk: the code that a latent must exceed at inference (negative: not learnt yet)
    k          [] int32, active latents of a row; without it the configuration's (members of a bank may differ)
    gate_scale [H] only after `fold`: what a head's decoder norms are multiplied by before they enter a gate

`encode`, `decode` and `reconstruct` speak raw activations `[B, H, D]`; every function below them speaks normalised
ones. With x the normalised row, x' = x - b_dec (or x), n_hf = |W_dec[h, f]|, and g_f of the shared gate 1, the l2 norm
(sum_h n_hf^2)^(1/2) or the l1 norm sum_h n_hf (`gate_norm`; 1 in the papers of autoencoders):

    pre        = sum_h x'_h W_enc[h]^T + b_enc, or the mean over heads (`aggregate`)                       [B, F]
    relu       z = relu(pre);                        Bricken et al. 2023 (n = 1), Anthropic April 2024 (n free)
    gated      z = 1[pre > 0] relu(e^{r_mag} sum_h x'_h W_enc[h]^T + b_mag)               arXiv 2404.16014 eq. 6, 7
    topk       z = relu(pre) where pre g is among the k largest of a row                        arXiv 2406.04093 eq. 3
    batch_topk z = relu(pre) where pre g is among the k B largest of the batch; at inference pre 1[pre g > threshold]
                                                                   arXiv 2412.06410; with g = l1: dictionary_learning
    jumprelu   z = pre 1[pre g > tau], tau = e^{log_threshold}                            arXiv 2407.14435 eq. 3
    xhat_h     = f_h W_dec[h] + b_dec[h], f_h = z

With a gate per head (`gate="per_head"`, arXiv 2509.17196's code) every head lets the one `pre` through by its own norm:
f_h = pre 1[pre n_h > tau] (jumprelu), or by the k B H largest pre n_h of the batch (batch_topk), so of one latent the
heads with larger decoders fire first. The code z is then `pre` wherever any head fires; `at_head` gives f_h. No array
`[B, H, F]` ever exists: the heads are walked one after the other, and backwards once more.

The loss is a mean over rows of |x - xhat|^2 (summed over H and D) plus, with n_f by `code_norm` (l2, l1 or 1),

    relu       lambda sum_f (z_f n_f)^p, p from 1 to p_end                          p-annealing: arXiv 2408.00113
    gated      lambda sum_f relu(pre_f) n_f + |x - xhat(relu(pre))|^2 through a frozen decoder      2404.16014 eq. 8
    jumprelu   lambda sum_f 1[pre_f g_f > tau_f], or lambda sum_f tanh(c z_f n_f);  arXiv 2407.14435 eq. 9
               or lambda sum_f p_f (1 + p_f / s), p_f the mean of tanh(c z_f n_f) over rows: tanh_quad, OpenMOSS;
               mu sum_f relu(tau_f - pre_f) n_f, the pre-activation loss (Anthropic January 2025); of a gate that
               reads norms mu sum_f relu(tau_f - pre_f g_f) (ours: the gate's own reading, and its norm frozen)
    all        aux |e - ehat|^2 var(x) / var(e): the k_aux largest dead latents of a row model its error e = x - xhat,
               without b_dec                                                                 arXiv 2406.04093 A.2
    prefixes   Matryoshka: the squared error is the mean over the nested dictionaries (there the sum), so that the other
               terms keep their weight beside it                                            arXiv 2503.17547

With `code_norm="per_head"` codes and norms are f_h and n_h, the terms are summed over heads, and tanh_quad's p is the
mean over rows and heads, times H: the whole loss is H times OpenMOSS's, so lambda means what it means there. p is
squared after it was averaged over the whole batch, whatever devices hold its rows.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert6_jax import checkpoint
from bert6_jax.errors import InputError
from sae_jax.config import DictionaryConfig
from sae_jax.sparse import batch_largest, largest_over_heads, scatter_codes, top_latents

Params = dict[str, jax.Array]
Dictionary = dict[str, Any]


# --- raw activations -------------------------------------------------------------------------------------------------


def fit_norm(x_NHD: jax.Array, cfg: DictionaryConfig) -> Params:
    """Mean and scale that `normalise` reads, from N rows of raw activations.

    `mean_norm`: scale = sqrt(D) / mean |x - mean| (SAELens' expected_average_only_in where `centre` is False);
    `mean_square`: sqrt(D / mean |x - mean|^2) (dictionary_learning). `token` and `none` store 1.
    """
    check_width(x_NHD, cfg)
    H, D = x_NHD.shape[1:]
    x_NHD = x_NHD.astype(jnp.float32)
    mean_HD = x_NHD.mean(0) if cfg.centre else jnp.zeros((H, D), jnp.float32)
    norm_NH = jnp.linalg.norm(x_NHD - mean_HD[None], axis=-1)
    if cfg.scale == "mean_norm":
        scale_H = np.float32(np.sqrt(D)) / norm_NH.mean(0)
    elif cfg.scale == "mean_square":
        scale_H = jnp.sqrt(np.float32(D) / jnp.square(norm_NH).mean(0))
    else:
        scale_H = jnp.ones(H, jnp.float32)
    return {"mean": mean_HD, "scale": scale_H}


def normalise(norm: Params, x_BHD: jax.Array, cfg: DictionaryConfig) -> tuple[jax.Array, Any]:
    """Raw activations to what the dictionary reads, float32, and what `denormalise` needs to undo it."""
    y_BHD = (x_BHD.astype(jnp.float32) - norm["mean"][None]) * norm["scale"][None, :, None]
    if cfg.scale != "token":
        return y_BHD, None
    mean_BH1 = y_BHD.mean(-1, keepdims=True)
    std_BH1 = y_BHD.std(-1, keepdims=True, ddof=1)
    # as SAELens' layer_norm, which guards the division and multiplies back without that guard
    return (y_BHD - mean_BH1) / (std_BH1 + np.float32(1e-5)), (mean_BH1, std_BH1)


def denormalise(norm: Params, y_BHD: jax.Array, undo: Any) -> jax.Array:
    """The inverse of `normalise` (with `scale="token"` as SAELens has it: to 1e-5 / std of a row)."""
    if undo is not None:
        mean_BH1, std_BH1 = undo
        y_BHD = y_BHD * std_BH1 + mean_BH1
    return y_BHD / norm["scale"][None, :, None] + norm["mean"][None]


def encode(dictionary: Dictionary, x_BHD: jax.Array, cfg: DictionaryConfig) -> jax.Array:
    """Codes `[B, F]` of raw activations, as at inference: batch_topk by its threshold, and while it has learnt none
    (negative) by the largest of the rows given."""
    check_width(x_BHD, cfg)
    x_BHD, _ = normalise(dictionary["norm"], x_BHD, cfg)
    return _codes_and_gate(dictionary, x_BHD, cfg)[0]


def decode(dictionary: Dictionary, z_BF: jax.Array, cfg: DictionaryConfig, undo: Any = None) -> jax.Array:
    """Raw activations `[B, H, D]` of codes; `undo` from `normalise` where the scale is each token's own."""
    if cfg.scale == "token" and undo is None:
        raise ValueError("a dictionary with scale='token' decodes rows it has seen: use `reconstruct`")
    if z_BF.ndim != 2 or z_BF.shape[1] != cfg.latents:
        raise InputError(f"codes of shape {list(z_BF.shape)} for {cfg.latents} latents; give [rows, {cfg.latents}]")
    xhat_BHD = reconstruction(dictionary["params"], z_BF, cfg, _gate(dictionary, cfg))
    return denormalise(dictionary["norm"], xhat_BHD, undo)


def at_head(dictionary: Dictionary, z_BF: jax.Array, cfg: DictionaryConfig, head: int | jax.Array) -> jax.Array:
    """Codes `[B, F]` as one head (may be traced) lets them through: f_h of a gate per head, else z itself.

    While a batch_topk dictionary with a gate per head has learnt no threshold, codes do not tell which heads they came
    through: here and in `decode` they go through every head whose decoder is not zero. `reconstruct` has the batch.
    """
    if not per_head(cfg):
        return z_BF
    gate = _gate(dictionary, cfg)
    return through(z_BF, gate.norm_HF[head], gate.level)


def reconstruct(dictionary: Dictionary, x_BHD: jax.Array, cfg: DictionaryConfig) -> tuple[jax.Array, jax.Array]:
    """(reconstruction in raw units `[B, H, D]`, codes `[B, F]`) of raw activations."""
    check_width(x_BHD, cfg)
    y_BHD, undo = normalise(dictionary["norm"], x_BHD, cfg)
    z_BF, gate = _codes_and_gate(dictionary, y_BHD, cfg)
    return denormalise(dictionary["norm"], reconstruction(dictionary["params"], z_BF, cfg, gate), undo), z_BF


def _codes_and_gate(dictionary: Dictionary, y_BHD, cfg: DictionaryConfig) -> tuple[jax.Array, Gate]:
    settings = {"k": dictionary.get("k"), "threshold": dictionary["threshold"]}
    return codes_and_gate(dictionary["params"], y_BHD, cfg, **settings, gate_scale_H=dictionary.get("gate_scale"))


def fold(dictionary: Dictionary, cfg: DictionaryConfig) -> Dictionary:
    """The same function with mean 0 and scale 1: the normalisation in the weights, for code that knows of none.

    Decoders are then in raw units, so that a gate that reads their norms needs the scale back: it stays as
    `gate_scale`. (OpenMOSS' release scales the biases only, which leaves another function.)
    """
    if cfg.scale == "token":
        raise InputError("a dictionary with scale='token' scales every row by itself; nothing can be folded")
    params, norm = dictionary["params"], dictionary["norm"]
    scale_H11, scale_H1 = norm["scale"][:, None, None], norm["scale"][:, None]
    W_enc_HFD = params["W_enc"] * scale_H11
    b_dec_HD = params["b_dec"] / scale_H1 + norm["mean"]
    folded = params | {"W_enc": W_enc_HFD, "W_dec": params["W_dec"] / scale_H11, "b_dec": b_dec_HD}
    if not cfg.subtract_bias:
        share = 1.0 if cfg.aggregate == "sum" else 1.0 / cfg.heads
        moved_F = jnp.einsum("hfd,hd->f", W_enc_HFD, norm["mean"], precision=jax.lax.Precision.HIGHEST)
        bias = {"b_enc": params["b_enc"] - np.float32(share) * moved_F}
        if cfg.activation == "gated":
            bias["b_mag"] = params["b_mag"] - np.float32(share) * moved_F * jnp.exp(params["r_mag"])
        folded |= bias
    before_H = dictionary.get("gate_scale", jnp.ones(cfg.heads, jnp.float32))
    identity = {"mean": jnp.zeros_like(norm["mean"]), "scale": jnp.ones_like(norm["scale"])}
    return dictionary | {"params": folded, "norm": identity, "gate_scale": before_H * norm["scale"]}


def check_width(x_BHD, cfg: DictionaryConfig) -> None:
    """Refuse rows that are not of the dictionary's heads and width."""
    if x_BHD.ndim != 3 or x_BHD.shape[1:] != (cfg.heads, cfg.width):
        raise InputError(
            f"activations of shape {list(x_BHD.shape)} for a dictionary of {cfg.heads} head(s) of width {cfg.width}; "
            f"give [rows, {cfg.heads}, {cfg.width}]"
        )


# --- initialisation --------------------------------------------------------------------------------------------------


def init(key: jax.Array, cfg: DictionaryConfig, *, decoder_norm: float = 1.0, b_dec_HD=None) -> Params:
    """Random directions of norm `decoder_norm`, the same in every head, the encoder their transpose; biases zero.

    `b_dec_HD`: where the reconstruction starts (normalised units), say the `geometric_median`.
    """
    H, F, D = cfg.heads, cfg.latents, cfg.width
    rows_FD = jax.random.normal(key, (F, D), jnp.float32)
    rows_FD = rows_FD / jnp.linalg.norm(rows_FD, axis=-1, keepdims=True)
    W_HFD = jnp.broadcast_to(rows_FD[None] * np.float32(decoder_norm), (H, F, D))
    b_dec_HD = jnp.zeros((H, D), jnp.float32) if b_dec_HD is None else jnp.asarray(b_dec_HD, jnp.float32)
    # copies: the leaves of a tree that a train loop donates must not share memory
    params = {"W_enc": jnp.array(W_HFD), "b_enc": jnp.zeros(F), "W_dec": jnp.array(W_HFD), "b_dec": b_dec_HD}
    if cfg.activation == "gated":
        params |= {"r_mag": jnp.zeros(F), "b_mag": jnp.zeros(F)}
    if cfg.activation == "jumprelu":
        params["log_threshold"] = jnp.full(F, np.log(cfg.threshold_init), jnp.float32)
    return params


def geometric_median(x_ND: jax.Array, iterations: int = 100) -> jax.Array:
    """The point with the least summed distance to N points (Weiszfeld's algorithm), `[D]`; the init of arXiv
    2406.04093's b_dec."""

    def closer(_, at_D):
        weight_N = 1.0 / jnp.maximum(jnp.linalg.norm(x_ND - at_D[None], axis=-1), 1e-8)
        return (weight_N[:, None] * x_ND).sum(0) / weight_N.sum()

    return jax.lax.fori_loop(0, iterations, closer, x_ND.mean(0))


def search_norm(params: Params, x_BHD: jax.Array, cfg: DictionaryConfig, norms=None) -> tuple[Params, jax.Array]:
    """Scale fresh tied weights to the norm that reconstructs `x_BHD` (normalised) best, from a grid (default:
    OpenMOSS', 50 points in [0.1, 5] and then 20 around the best). Returns the parameters and the squared error at every
    norm of the last grid.

    With unit decoders the encoder alone is scaled.
    """
    if norms is None:
        coarse_X = np.linspace(0.1, 5.0, 50, dtype=np.float32)
        _, error_X = search_norm(params, x_BHD, cfg, coarse_X)
        around_X = jnp.linspace(-0.09, 0.1, 20, dtype=jnp.float32)
        norms = jnp.maximum(jnp.asarray(coarse_X)[jnp.argmin(error_X)] + around_X, 0.01)
    norms_X = jnp.asarray(norms, jnp.float32)
    unit_HFD = params["W_dec"] / jnp.linalg.norm(params["W_dec"], axis=-1, keepdims=True)

    def scaled(norm):
        W_dec = unit_HFD if cfg.decoder == "unit" else unit_HFD * norm
        return params | {"W_enc": unit_HFD * norm, "W_dec": W_dec}

    def error(norm):
        there = scaled(norm)
        z_BF, gate = codes_and_gate(there, x_BHD, cfg)
        xhat_BHD = reconstruction(there, z_BF, cfg, gate)
        return jnp.square(x_BHD - xhat_BHD).sum((-1, -2)).mean()

    error_X = jax.lax.map(error, norms_X)
    return scaled(norms_X[jnp.argmin(error_X)]), error_X


def unit_decoder(W_dec_HFD: jax.Array) -> jax.Array:
    """Every latent's decoder scaled to norm 1 in every head; rows of zeros stay."""
    norm_HF1 = jnp.linalg.norm(W_dec_HFD, axis=-1, keepdims=True)
    return W_dec_HFD / jnp.where(norm_HF1 > 0, norm_HF1, 1.0)


def tie_shared(leaf_HFD: jax.Array, cfg: DictionaryConfig) -> jax.Array:
    """The shared latents' rows replaced by their mean over heads: of decoders, and of their gradients."""
    if not cfg.shared_latents:
        return leaf_HFD
    mean_1FD = leaf_HFD[:, : cfg.shared_latents].mean(0, keepdims=True)
    return leaf_HFD.at[:, : cfg.shared_latents].set(jnp.broadcast_to(mean_1FD, (cfg.heads, *mean_1FD.shape[1:])))


def tangent(gradient_HFD: jax.Array, W_dec_HFD: jax.Array) -> jax.Array:
    """A unit decoder's gradient without the part along the decoder, which normalising would undo."""
    return gradient_HFD - (gradient_HFD * W_dec_HFD).sum(-1, keepdims=True) * W_dec_HFD


# --- codes -----------------------------------------------------------------------------------------------------------


def pre_activations(params: Params, x_BHD: jax.Array, cfg: DictionaryConfig) -> jax.Array:
    """`pre` [B, F] of normalised rows; of gated dictionaries without any bias."""
    if cfg.subtract_bias:
        x_BHD = x_BHD - params["b_dec"][None]
    pre_BF = _product(x_BHD, params["W_enc"])
    if cfg.aggregate == "mean" and cfg.heads > 1:
        pre_BF = pre_BF * np.float32(1 / cfg.heads)
    return pre_BF if cfg.activation == "gated" else pre_BF + params["b_enc"][None]


def _product(x_BHD, W_HFD) -> jax.Array:
    B, (H, F, D) = x_BHD.shape[0], W_HFD.shape
    if H == 1:  # a plain matmul: XLA's CPU backend takes batch dimensions of size 1 for a slow path
        return jax.lax.dot_general(x_BHD.reshape(B, D), W_HFD.reshape(F, D), (((1,), (1,)), ((), ())))
    return jnp.einsum("bhd,hfd->bf", x_BHD, W_HFD)


def head_norms(params: Params, gate_scale_H: jax.Array | None = None) -> jax.Array:
    """n [H, F]: decoder norms, in the units that gates read."""
    n_HF = jnp.linalg.norm(params["W_dec"], axis=-1)
    return n_HF if gate_scale_H is None else n_HF * gate_scale_H[:, None]


def per_head(cfg: DictionaryConfig) -> bool:
    """Has every head a gate of its own? With one head it is the shared gate on that head's norm, the same program."""
    return cfg.gate == "per_head" and cfg.heads > 1


class Gate(NamedTuple):
    """What decides whether a latent fires; only a gate per head outlives the code."""

    norm_HF: jax.Array | None  # what each head multiplies the code by; None: shared
    level: jax.Array | None  # [F] or []: what the product must exceed


def gate_norms(params: Params, cfg: DictionaryConfig, gate_scale_H: jax.Array | None = None) -> jax.Array | None:
    """g [F] of a shared gate (None: 1) or n [H, F] of a gate per head. Outside of every gradient: the norm cancels in
    the code, so none belongs to it."""
    kind = "l2" if cfg.gate == "per_head" and cfg.heads == 1 else cfg.gate_norm
    if kind == "none" and not per_head(cfg):
        return None
    n_HF = jax.lax.stop_gradient(head_norms(params, gate_scale_H))
    return n_HF if per_head(cfg) else _over_heads(n_HF, kind)


def _over_heads(n_HF, kind: str) -> jax.Array:
    if kind == "l1" or n_HF.shape[0] == 1:
        return n_HF.sum(0)
    return jnp.sqrt(jnp.square(n_HF).sum(0))


def through(pre_BF: jax.Array, norm_F: jax.Array | None, level) -> jax.Array:
    """`pre` where pre norm exceeds the level, else zero; NaN stays NaN."""
    read_BF = pre_BF if norm_F is None else pre_BF * norm_F[None]
    return jnp.where(read_BF <= (level if jnp.ndim(level) == 0 else level[None]), 0.0, pre_BF)


def codes(params: Params, x_BHD: jax.Array, cfg: DictionaryConfig, *, k=None, threshold=None) -> jax.Array:
    """Codes `[B, F]` of normalised rows.

    `k` (default `cfg.k`, may be traced, at most `cfg.k`) is for topk and batch_topk; with a `threshold` that is not
    negative batch_topk keeps what exceeds it, as at inference, in place of the batch's largest.
    """
    return codes_and_gate(params, x_BHD, cfg, k=k, threshold=threshold)[0]


def codes_and_gate(
    params: Params, x_BHD: jax.Array, cfg: DictionaryConfig, *, k=None, threshold=None, gate_scale_H=None
) -> tuple[jax.Array, Gate]:
    """`codes`, and the gate that `reconstruction` needs where every head has its own."""
    pre_BF = pre_activations(params, x_BHD, cfg)
    k = cfg.k if k is None else k
    shared = Gate(None, None)
    if cfg.activation == "relu":
        return jax.nn.relu(pre_BF), shared
    if cfg.activation == "gated":
        return gated(params, pre_BF)[0], shared
    norm = gate_norms(params, cfg, gate_scale_H)
    if per_head(cfg):
        level = gate_level(params, cfg, threshold)
        if cfg.activation == "batch_topk":
            level = _learnt_or(threshold, lambda it: it, lambda: below(largest_over_heads(pre_BF, norm, k, cfg.k)))
        return through(pre_BF, norm.max(0), level), Gate(norm, level)
    if cfg.activation == "jumprelu":
        return through(pre_BF, norm, gate_level(params, cfg, threshold)), shared
    read_BF = pre_BF if norm is None else pre_BF * norm[None]
    if cfg.activation == "topk":
        read_BK, index_BK = top_latents(read_BF, cfg.k)
        z_BK = read_BK if norm is None else jnp.take_along_axis(pre_BF, index_BK, axis=1)
        return scatter_codes(within(z_BK, k), index_BK, cfg.latents), shared
    keep_BF = _learnt_or(threshold, lambda level: read_BF > level, lambda: batch_largest(read_BF, k))
    return jnp.where(keep_BF | jnp.isnan(pre_BF), pre_BF, 0.0), shared  # NaN stays NaN


def _learnt_or(threshold, learnt, by_batch):
    """`learnt(threshold)`, or `by_batch()` without a threshold or before one was learnt (negative); the batch, whose
    ranking costs a few times the encoder's product, is ranked only then (inside of `vmap` always)."""
    if threshold is None:
        return by_batch()
    threshold = jnp.asarray(threshold, jnp.float32)
    return jax.lax.cond(threshold >= 0, lambda: learnt(threshold), by_batch)


def gate_level(params: Params, cfg: DictionaryConfig, threshold) -> jax.Array:
    """What a gate's reading must exceed: tau [F] of jumprelu, the learnt threshold [] of batch_topk."""
    if cfg.activation == "jumprelu":
        return jnp.exp(params["log_threshold"])
    return jnp.zeros(()) if threshold is None else threshold


def below(value: jax.Array) -> jax.Array:
    """The largest float below: what `value` itself still exceeds."""
    return jnp.nextafter(value, jnp.float32(-np.inf))


def _gate(dictionary: Dictionary, cfg: DictionaryConfig) -> Gate:
    """The gate of codes that are there already."""
    if not per_head(cfg):
        return Gate(None, None)
    params, threshold = dictionary["params"], dictionary["threshold"]
    # a threshold that was not learnt yet lets through whatever code there is
    level = gate_level(params, cfg, jnp.maximum(threshold, 0.0))
    return Gate(gate_norms(params, cfg, dictionary.get("gate_scale")), level)


def code_weights(params: Params, cfg: DictionaryConfig) -> jax.Array:
    """n of the penalties: [F], or [H, F] with `code_norm="per_head"`."""
    if cfg.code_norm == "none":
        return jnp.ones(cfg.latents)
    if cfg.code_norm == "l2" or cfg.heads == 1:
        return _root(jnp.square(params["W_dec"]).sum((0, -1)))
    n_HF = _root(jnp.square(params["W_dec"]).sum(-1))
    return n_HF if cfg.code_norm == "per_head" else n_HF.sum(0)


def _root(square: jax.Array) -> jax.Array:
    """Square root with gradient zero at zero: a decoder of zeros has a norm, but no direction to shrink in."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def gated(params: Params, pre_BF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(codes, the gate's pre-activations) of a gated dictionary, both `[B, F]`."""
    gate_BF = pre_BF + params["b_enc"][None]
    magnitude_BF = jax.nn.relu(pre_BF * jnp.exp(params["r_mag"])[None] + params["b_mag"][None])
    return jnp.where(gate_BF > 0, magnitude_BF, 0.0), gate_BF


def within(z_BK: jax.Array, k) -> jax.Array:
    """relu of the first k (a row's values are sorted, largest first); the rest is zero."""
    return jnp.where(jnp.arange(z_BK.shape[-1])[None] < k, jax.nn.relu(z_BK), 0.0)


def reconstruction(params: Params, z_BF: jax.Array, cfg: DictionaryConfig, gate: Gate | None = None) -> jax.Array:
    """Normalised reconstruction `[B, H, D]` of codes; `gate` where every head has its own."""
    if not per_head(cfg):
        return product_with_decoder(z_BF, params["W_dec"]) + params["b_dec"][None]

    def head(each):
        W_FD, norm_F = each
        return jnp.matmul(through(z_BF, norm_F, gate.level), W_FD)

    xhat_HBD = jax.lax.map(head, (params["W_dec"], gate.norm_HF))
    return jnp.moveaxis(xhat_HBD, 0, 1) + params["b_dec"][None]


def product_with_decoder(z_BF, W_HFD) -> jax.Array:
    if W_HFD.shape[0] == 1:
        return jnp.matmul(z_BF, W_HFD[0])[:, None]
    return jnp.einsum("bf,hfd->bhd", z_BF, W_HFD)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def save(
    path: str | Path,
    dictionary: Dictionary,
    cfg: DictionaryConfig,
    *,
    step: int = 0,
    extra: dict[str, Any] | None = None,
) -> None:
    """A checkpoint of kind `dictionary`, scales beside the weights; of one dictionary or of a bank `[G, ...]`.

    `extra` says what it is a dictionary of (model, sites, text); JSON values.
    """
    checkpoint.save(path, dictionary, kind="dictionary", config=dataclasses.asdict(cfg), step=step, extra=extra)


def load(path: str | Path) -> tuple[Dictionary, DictionaryConfig, checkpoint.Checkpoint]:
    """What `save` wrote: the tree (with the axis G if it was a bank), its configuration, and the checkpoint.

    Raises:
      InputError: no checkpoint, one of another kind or version, or a tree that its configuration does not describe.
    """
    found = checkpoint.load(path, kind="dictionary")
    try:
        cfg = DictionaryConfig(**(found.config | {"prefixes": tuple(found.config["prefixes"])}))
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: its config is no dictionary's ({error}); use the version that wrote it") from error
    params = jax.eval_shape(lambda: init(jax.random.key(0), cfg))
    norm = {"mean": params["b_dec"], "scale": jax.ShapeDtypeStruct((cfg.heads,), jnp.float32)}
    bank = getattr(found.tree.get("threshold"), "shape", ())
    one = {"params": params, "norm": norm, "threshold": jax.ShapeDtypeStruct((), jnp.float32)}
    optional = {"k": jax.ShapeDtypeStruct((), jnp.int32), "gate_scale": norm["scale"]}
    one |= {name: leaf for name, leaf in optional.items() if name in found.tree}
    if jax.tree.map(jnp.shape, found.tree) != jax.tree.map(lambda leaf: (*bank, *leaf.shape), one):
        raise InputError(f"{path}: its arrays are not of the shapes of its config; restore it or remove the folder")
    return found.tree, cfg, found
