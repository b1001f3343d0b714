"""The dictionary: parameters, codes, reconstruction, losses. Pure functions over nested dicts.

A dictionary is a tree that one checkpoint holds:

    params     W_enc [H, F, D], b_enc [F], W_dec [H, F, D], b_dec [H, D]: a latent's directions are rows of both;
               gated: r_mag [F], b_mag [F] (b_enc is the gate's bias); jumprelu: log_threshold [F]
    norm       mean [H, D], scale [H]: what activations are normalised with; stored, never folded in silence
    threshold  [] batch_topk: the code that a latent must exceed at inference (negative: not learnt yet)
    k          [] int32, active latents of a row; without it the configuration's (members of a bank may differ)

`encode`, `decode` and `reconstruct` speak raw activations `[B, H, D]`; every function below them speaks normalised
ones. With x the normalised row, x' = x - b_dec (or x) and n_f = (sum_h |W_dec[h, f]|^2)^(1/2):

    pre        = sum_h x'_h W_enc[h]^T + b_enc                                                              [B, F]
    relu       z = relu(pre);                        Bricken et al. 2023 (n = 1), Anthropic April 2024 (n free)
    gated      z = 1[pre > 0] relu(e^{r_mag} sum_h x'_h W_enc[h]^T + b_mag)               arXiv 2404.16014 eq. 6, 7
    topk       z = relu(pre) on the k largest of a row                                          arXiv 2406.04093 eq. 3
    batch_topk z = relu(pre) on the k B largest of the batch; at inference pre 1[pre > threshold] arXiv 2412.06410
    jumprelu   z = pre 1[pre > tau], tau = e^{log_threshold}                              arXiv 2407.14435 eq. 3
    xhat_h     = z W_dec[h] + b_dec[h]

The loss is a mean over rows of |x - xhat|^2 (summed over H and D) plus

    relu       lambda sum_f (z_f n_f)^p, p from 1 to p_end                          p-annealing: arXiv 2408.00113
    gated      lambda sum_f relu(pre_f) n_f + |x - xhat(relu(pre))|^2 through a frozen decoder      2404.16014 eq. 8
    jumprelu   lambda sum_f 1[pre_f > tau_f], or lambda sum_f tanh(c z_f n_f);      arXiv 2407.14435 eq. 9
               mu sum_f relu(tau_f - pre_f) n_f, the pre-activation loss             Anthropic January 2025
    all        aux |e - ehat|^2 var(x) / var(e): the k_aux largest dead latents of a row model its error e = x - xhat,
               without b_dec                                                                 arXiv 2406.04093 A.2
    prefixes   Matryoshka: the squared error is the mean over the nested dictionaries (there the sum), so that the other
               terms keep their weight beside it                                            arXiv 2503.17547

With `weigh_codes=False` n_f is 1 in the penalties.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bert6_jax import checkpoint
from bert6_jax.errors import InputError
from sae_jax.config import DictionaryConfig
from sae_jax.sparse import batch_largest, scatter_codes, top_latents

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
    return _codes_of(dictionary, x_BHD, cfg)


def decode(dictionary: Dictionary, z_BF: jax.Array, cfg: DictionaryConfig, undo: Any = None) -> jax.Array:
    """Raw activations `[B, H, D]` of codes; `undo` from `normalise` where the scale is each token's own."""
    if cfg.scale == "token" and undo is None:
        raise ValueError("a dictionary with scale='token' decodes rows it has seen: use `reconstruct`")
    if z_BF.ndim != 2 or z_BF.shape[1] != cfg.latents:
        raise InputError(f"codes of shape {list(z_BF.shape)} for {cfg.latents} latents; give [rows, {cfg.latents}]")
    return denormalise(dictionary["norm"], reconstruction(dictionary["params"], z_BF), undo)


def reconstruct(dictionary: Dictionary, x_BHD: jax.Array, cfg: DictionaryConfig) -> tuple[jax.Array, jax.Array]:
    """(reconstruction in raw units `[B, H, D]`, codes `[B, F]`) of raw activations."""
    check_width(x_BHD, cfg)
    y_BHD, undo = normalise(dictionary["norm"], x_BHD, cfg)
    z_BF = _codes_of(dictionary, y_BHD, cfg)
    return denormalise(dictionary["norm"], reconstruction(dictionary["params"], z_BF), undo), z_BF


def _codes_of(dictionary: Dictionary, y_BHD, cfg: DictionaryConfig) -> jax.Array:
    return codes(dictionary["params"], y_BHD, cfg, k=dictionary.get("k"), threshold=dictionary["threshold"])


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
    """Scale fresh tied weights to the norm that reconstructs `x_BHD` (normalised) best, from a grid (default: 50
    points in [0.1, 5]; OpenMOSS' decoder-norm search). Returns the parameters and the squared error at every norm.

    With unit decoders the encoder alone is scaled.
    """
    norms_X = jnp.linspace(0.1, 5.0, 50, dtype=jnp.float32) if norms is None else jnp.asarray(norms, jnp.float32)
    unit_HFD = params["W_dec"] / jnp.linalg.norm(params["W_dec"], axis=-1, keepdims=True)

    def scaled(norm):
        W_dec = unit_HFD if cfg.decoder == "unit" else unit_HFD * norm
        return params | {"W_enc": unit_HFD * norm, "W_dec": W_dec}

    def error(norm):
        there = scaled(norm)
        xhat_BHD = reconstruction(there, codes(there, x_BHD, cfg))
        return jnp.square(x_BHD - xhat_BHD).sum((-1, -2)).mean()

    error_X = jax.lax.map(error, norms_X)
    return scaled(norms_X[jnp.argmin(error_X)]), error_X


def unit_decoder(W_dec_HFD: jax.Array) -> jax.Array:
    """Every latent's decoder scaled to norm 1 in every head; rows of zeros stay."""
    norm_HF1 = jnp.linalg.norm(W_dec_HFD, axis=-1, keepdims=True)
    return W_dec_HFD / jnp.where(norm_HF1 > 0, norm_HF1, 1.0)


def tangent(gradient_HFD: jax.Array, W_dec_HFD: jax.Array) -> jax.Array:
    """A unit decoder's gradient without the part along the decoder, which normalising would undo."""
    return gradient_HFD - (gradient_HFD * W_dec_HFD).sum(-1, keepdims=True) * W_dec_HFD


# --- codes -----------------------------------------------------------------------------------------------------------


def pre_activations(params: Params, x_BHD: jax.Array, cfg: DictionaryConfig) -> jax.Array:
    """`pre` [B, F] of normalised rows; of gated dictionaries without any bias."""
    if cfg.subtract_bias:
        x_BHD = x_BHD - params["b_dec"][None]
    pre_BF = _product(x_BHD, params["W_enc"])
    return pre_BF if cfg.activation == "gated" else pre_BF + params["b_enc"][None]


def _product(x_BHD, W_HFD) -> jax.Array:
    B, (H, F, D) = x_BHD.shape[0], W_HFD.shape
    if H == 1:  # a plain matmul: XLA's CPU backend takes batch dimensions of size 1 for a slow path
        return jax.lax.dot_general(x_BHD.reshape(B, D), W_HFD.reshape(F, D), (((1,), (1,)), ((), ())))
    return jnp.einsum("bhd,hfd->bf", x_BHD, W_HFD)


def codes(params: Params, x_BHD: jax.Array, cfg: DictionaryConfig, *, k=None, threshold=None) -> jax.Array:
    """Codes `[B, F]` of normalised rows.

    `k` (default `cfg.k`, may be traced, at most `cfg.k`) is for topk and batch_topk; with a `threshold` that is not
    negative batch_topk keeps what exceeds it, as at inference, in place of the batch's largest.
    """
    pre_BF = pre_activations(params, x_BHD, cfg)
    k = cfg.k if k is None else k
    if cfg.activation == "relu":
        return jax.nn.relu(pre_BF)
    if cfg.activation == "gated":
        return gated(params, pre_BF)[0]
    if cfg.activation == "jumprelu":
        return jnp.where(pre_BF <= jnp.exp(params["log_threshold"])[None], 0.0, pre_BF)  # NaN stays NaN
    if cfg.activation == "topk":
        z_BK, index_BK = top_latents(pre_BF, cfg.k)
        return scatter_codes(within(z_BK, k), index_BK, cfg.latents)
    keep_BF = batch_largest(pre_BF, k)
    if threshold is not None:
        keep_BF = jnp.where(threshold >= 0, pre_BF > threshold, keep_BF)
    return jnp.where(keep_BF | jnp.isnan(pre_BF), pre_BF, 0.0)  # NaN stays NaN


def code_weights(params: Params, cfg: DictionaryConfig) -> jax.Array:
    """n [F] of the penalties."""
    return jnp.sqrt(jnp.square(params["W_dec"]).sum((0, -1))) if cfg.weigh_codes else jnp.ones(cfg.latents)


def gated(params: Params, pre_BF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(codes, the gate's pre-activations) of a gated dictionary, both `[B, F]`."""
    gate_BF = pre_BF + params["b_enc"][None]
    magnitude_BF = jax.nn.relu(pre_BF * jnp.exp(params["r_mag"])[None] + params["b_mag"][None])
    return jnp.where(gate_BF > 0, magnitude_BF, 0.0), gate_BF


def within(z_BK: jax.Array, k) -> jax.Array:
    """relu of the first k (a row's values are sorted, largest first); the rest is zero."""
    return jnp.where(jnp.arange(z_BK.shape[-1])[None] < k, jax.nn.relu(z_BK), 0.0)


def reconstruction(params: Params, z_BF: jax.Array) -> jax.Array:
    """Normalised reconstruction `[B, H, D]` of codes."""
    return product_with_decoder(z_BF, params["W_dec"]) + params["b_dec"][None]


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
    one |= {"k": jax.ShapeDtypeStruct((), jnp.int32)} if "k" in found.tree else {}
    if jax.tree.map(jnp.shape, found.tree) != jax.tree.map(lambda leaf: (*bank, *leaf.shape), one):
        raise InputError(f"{path}: its arrays are not of the shapes of its config; restore it or remove the folder")
    return found.tree, cfg, found
