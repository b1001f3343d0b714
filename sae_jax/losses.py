"""What a dictionary is trained on: the losses of `sae_jax.dictionary`'s docstring, one member of a bank at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from sae_jax import sparse
from sae_jax.config import DictionaryConfig, TrainConfig
from sae_jax.dictionary import (
    Params,
    below,
    code_weights,
    gate_norms,
    gated,
    per_head,
    pre_activations,
    product_with_decoder,
    reconstruction,
    through,
    within,
)


class Hyper(NamedTuple):
    """What the members of one bank may differ in; scalars, or `[G]` in a bank. All of it is data, nothing is compiled
    anew for other values."""

    lr: Any = 3e-4
    k: Any = 32  # topk, batch_topk: at most `cfg.k`
    sparsity: Any = 1.0  # lambda
    pre_act: Any = 0.0  # mu, jumprelu's pre-activation loss
    aux: Any = 1 / 32  # weight of the auxiliary loss, of every variant once latents are dead; 0: plain losses


class Parts(NamedTuple):
    """What a loss is made of; means over the rows of a batch."""

    loss: jax.Array  # []
    error: jax.Array  # [] |x - xhat|^2
    penalty: jax.Array  # [] sparsity terms as they enter the loss
    aux: jax.Array  # [] auxiliary term as it enters the loss
    l0: jax.Array  # [] active latents of a row (and head, where each has a gate)
    least: jax.Array  # [] smallest reading of the gate that was let through in the batch (inf: none)
    fired_F: jax.Array  # bool: did the latent fire on any row, in any head


# --- jumprelu --------------------------------------------------------------------------------------------------------


def jump(pre_BF: jax.Array, log_threshold_F: jax.Array, cfg: DictionaryConfig, norm_F=None) -> jax.Array:
    """pre 1[pre n > tau] with the straight-through gradient of arXiv 2407.14435 (eq. 11) for the threshold; n = 1
    without `norm_F`, which takes no gradient.

    d (z n) / d tau = -tau / epsilon in the window of pre n. `straight_through="tau2"` goes on to log tau by the chain
    rule, another factor tau (the paper, SAELens, OpenMOSS); `tau1` leaves that out (crosscode): 10 times larger at
    tau = 0.1. Pre-activations at or below 0 move no threshold, also inside the window (ours; the others do not mask
    them).
    """
    return _straight_through(pre_BF, log_threshold_F, norm_F, cfg, True)


def active(pre_BF: jax.Array, log_threshold_F: jax.Array, cfg: DictionaryConfig, norm_F=None) -> jax.Array:
    """1[pre n > tau] with the straight-through gradient of arXiv 2407.14435 (eq. 12) for the threshold alone."""
    return _straight_through(pre_BF, log_threshold_F, norm_F, cfg, False)


def _straight_through(pre_BF, log_threshold_F, norm_F, cfg: DictionaryConfig, values: bool):
    def read(pre_BF, norm_F):
        return pre_BF if norm_F is None else pre_BF * norm_F[None]

    @jax.custom_vjp
    def f(pre_BF, log_threshold_F, norm_F):
        on_BF = read(pre_BF, norm_F) > jnp.exp(log_threshold_F)[None]
        return jnp.where(on_BF, pre_BF if values else 1.0, 0.0)

    def forward(pre_BF, log_threshold_F, norm_F):
        return f(pre_BF, log_threshold_F, norm_F), (pre_BF, log_threshold_F, norm_F)

    def backward(saved, g_BF):
        pre_BF, log_threshold_F, norm_F = saved
        tau_1F, read_BF = jnp.exp(log_threshold_F)[None], read(pre_BF, norm_F)
        slope_1F = (tau_1F if values else jnp.ones_like(tau_1F)) * (tau_1F if cfg.straight_through == "tau2" else 1.0)
        if values and norm_F is not None:  # of z, not of z n
            slope_1F = jnp.where(norm_F[None] > 0, slope_1F / jnp.where(norm_F[None] > 0, norm_F[None], 1.0), 0.0)
        # values at or below 0 are never let through: their side of the window moves no threshold
        inside_BF = (read_BF > 0) & (jnp.abs(read_BF - tau_1F) < cfg.bandwidth / 2)
        g_pre_BF = jnp.where(read_BF > tau_1F, g_BF, 0.0) if values else jnp.zeros_like(g_BF)
        # the rectangle kernel: 1 / epsilon within epsilon / 2 of the threshold
        return g_pre_BF, sum_rows(jnp.where(inside_BF, g_BF, 0.0)) * slope_1F[0] * np.float32(-1 / cfg.bandwidth), None

    f.defvjp(forward, backward)
    return f(pre_BF, log_threshold_F, norm_F)


# --- the loss --------------------------------------------------------------------------------------------------------


def exponent(cfg: DictionaryConfig, progress) -> jax.Array:
    """p of the penalty at a share of training: from 1 to `p_end` in `p_stages` equal stages."""
    stage = jnp.minimum(jnp.floor(jnp.asarray(progress, jnp.float32) * cfg.p_stages), cfg.p_stages - 1)
    return 1.0 + np.float32(cfg.p_end - 1.0) * stage / max(cfg.p_stages - 1, 1)


def power_sum(z_BF: jax.Array, p, weight_F=None) -> jax.Array:
    """Mean over rows of sum_f weight_f z_f^p (weight 1 by default); the gradient is finite at zero."""
    on_BF = z_BF > 0
    power_BF = jnp.where(on_BF, jnp.where(on_BF, z_BF, 1.0) ** p, 0.0)
    return (power_BF if weight_F is None else power_BF * weight_F[None]).sum(-1).mean()


def loss(
    params: Params,
    x_BHD: jax.Array,
    cfg: DictionaryConfig,
    train: TrainConfig,
    hyper: Hyper,
    *,
    dead_F: jax.Array | None,
    progress,
    p_weight=1.0,
) -> tuple[jax.Array, Parts]:
    """The loss of one dictionary on normalised rows, and its parts.

    `dead_F`: latents that the auxiliary loss calls back (None: no auxiliary loss is computed). `progress`: share of
    training done, which the penalty's warm-up and exponent follow. `p_weight` keeps the penalty at its level when the
    exponent falls (see `train.step`).
    """
    zero = jnp.zeros((), jnp.float32)
    warm = jnp.minimum(1.0, (progress + 1e-9) / max(train.sparsity_warmup, 1e-9))
    n = code_weights(params, cfg)
    norm = gate_norms(params, cfg)
    sparse_codes = None
    penalty = extra = zero
    if cfg.activation == "topk":
        rows = sparse.by_rows() and cfg.heads == 1 and not cfg.prefixes
        # by rows, the gradient of the pre-activations is attached to those that are kept
        pre_BF = pre_activations(jax.lax.stop_gradient(params) if rows else params, x_BHD, cfg)
        value_BK, index_BK = sparse.top_latents(pre_BF if norm is None else pre_BF * norm[None], cfg.k)
        if norm is not None:
            value_BK = jnp.take_along_axis(pre_BF, index_BK, axis=1)
        if rows:
            value_BK = _attach(params, x_BHD, value_BK, index_BK, cfg)
        value_BK = within(value_BK, hyper.k)
        sparse_codes = (value_BK, index_BK) if rows else None
        z_BF = None if rows else sparse.scatter_codes(value_BK, index_BK, cfg.latents)
    else:
        pre_BF = _pre(params, x_BHD, cfg)
        # without the barrier XLA's CPU backend computes the activation again inside of the products that read it
        pre_BF = jax.lax.optimization_barrier(pre_BF)
        if per_head(cfg):
            z_BF = None
        elif cfg.activation == "relu":
            z_BF = jax.nn.relu(pre_BF)
            cost = power_sum(z_BF * n[None], exponent(cfg, progress), shares(cfg))
            penalty = warm * hyper.sparsity * p_weight * cost
        elif cfg.activation == "gated":
            z_BF, gate_BF = gated(params, pre_BF)
            pre_BF = gate_BF  # what the dead are ranked by
            on_BF = jax.nn.relu(gate_BF)
            cost = power_sum(on_BF * n[None], exponent(cfg, progress), shares(cfg))
            penalty = warm * hyper.sparsity * p_weight * cost
            frozen = params | {name: jax.lax.stop_gradient(params[name]) for name in ("W_dec", "b_dec")}
            extra = _error(x_BHD - reconstruction(frozen, on_BF, cfg))
        elif cfg.activation == "batch_topk":
            read_BF = pre_BF if norm is None else pre_BF * norm[None]
            keep_BF = sparse.batch_largest(jax.lax.stop_gradient(read_BF), hyper.k)
            z_BF = jnp.where(keep_BF, pre_BF, 0.0)
        else:
            z_BF = jump(pre_BF, params["log_threshold"], cfg, norm)
            cost_F, below_F = _costs(params, pre_BF, z_BF, n, norm, cfg)
            penalty = warm * hyper.sparsity * _penalty(cost_F, cfg) + hyper.pre_act * below_F.sum()
        z_BF = None if z_BF is None else jax.lax.optimization_barrier(z_BF)

    if per_head(cfg):
        residual_BHD, walked = _walk_heads(params, x_BHD, pre_BF, n, norm, cfg, hyper)
        error = _error(residual_BHD)
        if cfg.activation == "jumprelu":
            penalty = warm * hyper.sparsity * _penalty(walked.cost_F, cfg) + hyper.pre_act * walked.below_F.sum()
        # summed as floats: over rows, heads and latents together int32 may overflow
        l0 = walked.active_F.astype(jnp.float32).sum() * np.float32(1 / (x_BHD.shape[0] * cfg.heads))
        least, fired_F = walked.least, walked.active_F > 0
    elif sparse_codes is not None:
        xhat_BHD = sparse.decode_rows(*sparse_codes, params["W_dec"][0])[:, None] + params["b_dec"][None]
        residual_BHD = x_BHD - xhat_BHD
        error = _error(residual_BHD)
        value_BK, index_BK = jax.lax.stop_gradient(sparse_codes[0]), sparse_codes[1]
        on_BK = value_BK > 0
        fired_F = jnp.zeros(cfg.latents, jnp.int32).at[index_BK].add(on_BK.astype(jnp.int32)) > 0
        l0 = on_BK.sum(-1).astype(jnp.float32).mean()
        read_BK = value_BK if norm is None else value_BK * norm[index_BK]
        least = jnp.where(on_BK, read_BK, jnp.inf).min()
    else:
        residual_BHD, error = _nested_errors(params, x_BHD, z_BF, cfg)
        value_BF = jax.lax.stop_gradient(z_BF)
        on_BF = value_BF > 0
        fired_F = on_BF.any(0)
        l0 = on_BF.sum(-1).astype(jnp.float32).mean()
        least = jnp.where(on_BF, value_BF if norm is None else value_BF * norm[None], jnp.inf).min()

    aux = zero
    if dead_F is not None:
        aux = hyper.aux * auxiliary(params, x_BHD, jax.lax.stop_gradient(residual_BHD), pre_BF, dead_F, cfg, train)
    total = error + penalty + extra + aux
    return total, Parts(total, error, penalty, aux, l0, least, fired_F)


def _pre(params, x_BHD, cfg: DictionaryConfig) -> jax.Array:
    """`pre_activations`, whose gradient of b_dec is (sum_b g) W_enc: g W_enc, a product as large as the forward one,
    would be computed for its sum over rows alone."""
    if not cfg.subtract_bias:
        return pre_activations(params, x_BHD, cfg)
    share = np.float32(1 / cfg.heads if cfg.aggregate == "mean" else 1.0)
    frozen = params | {"b_dec": jax.lax.stop_gradient(params["b_dec"])}
    zero_F = share * _bias_read(params["b_dec"], params["W_enc"])
    return pre_activations(frozen, x_BHD, cfg) + zero_F[None]


@jax.custom_vjp
def _bias_read(b_dec_HD, W_HFD) -> jax.Array:
    """Zeros [F] with the gradient that -sum_h b_dec[h] W[h]^T has for b_dec."""
    return jnp.zeros(W_HFD.shape[1], W_HFD.dtype)


def _bias_read_bwd(W_HFD, g_F):
    return -jnp.einsum("f,hfd->hd", g_F, W_HFD), None


_bias_read.defvjp(lambda b_dec_HD, W_HFD: (_bias_read(b_dec_HD, W_HFD), W_HFD), _bias_read_bwd)


# --- penalties of codes per head -------------------------------------------------------------------------------------


def shares(cfg: DictionaryConfig) -> np.ndarray | None:
    """Factor on every latent's penalty, `[F]`: less for those that all heads share (None: 1 for all)."""
    if not cfg.shared_latents:
        return None
    return np.where(np.arange(cfg.latents) < cfg.shared_latents, cfg.shared_penalty, 1.0).astype(np.float32)


def _cost(pre_BF, f_BF, log_threshold_F, n_F, norm_F, cfg: DictionaryConfig) -> jax.Array:
    """What a jumprelu latent pays in one head, its mean over rows, `[F]`."""
    if cfg.penalty == "l0":
        return active(pre_BF, log_threshold_F, cfg, norm_F).mean(0)
    return _tanh_rows(f_BF, np.float32(cfg.tanh_scale) * n_F) * np.float32(1 / len(f_BF))


@jax.custom_vjp
def _tanh_rows(f_BF, n_F) -> jax.Array:
    """Sum over rows of tanh(f n). Nothing but f and n is kept, and the gradient makes one array, the tanh."""
    return sum_rows(jnp.tanh(f_BF * n_F[None]))


def _tanh_rows_bwd(saved, g_F):
    f_BF, n_F = saved
    tanh_BF = jax.lax.optimization_barrier(jnp.tanh(f_BF * n_F[None]))
    # 1 - tanh^2 multiplied out twice over, or XLA makes arrays of it and of the 1 on CPUs
    slope_1F = (g_F * n_F)[None]
    return slope_1F - tanh_BF * (tanh_BF * slope_1F), g_F * (f_BF - tanh_BF * (tanh_BF * f_BF)).sum(0)


_tanh_rows.defvjp(lambda f_BF, n_F: (_tanh_rows(f_BF, n_F), (f_BF, n_F)), _tanh_rows_bwd)


def _below(pre_BF, log_threshold_F, n_F, norm_F) -> jax.Array:
    """The pre-activation loss of one gate, its mean over rows, `[F]`: how far what it reads is from its level."""
    tau_1F = jnp.exp(log_threshold_F)[None]
    if norm_F is None:
        return (jax.nn.relu(tau_1F - pre_BF) * n_F[None]).mean(0)
    # The reading is in units of the decoder already. As (tau / norm - pre) norm it would be the same number, with a
    # gradient tau / norm for the decoder, without bound where a head has next to none.
    return jax.nn.relu(tau_1F - pre_BF * norm_F[None]).mean(0)


@jax.custom_vjp
def _short(pre_BF, tau_F, norm_F, wanted) -> jax.Array:
    """`_below` of a gate that reads pre norm, with no gradient for the norm; not `wanted` (its weight is 0): zeros,
    without a walk over the rows."""
    sums = (lambda: jax.nn.relu(tau_F[None] - pre_BF * norm_F[None]).mean(0), lambda: jnp.zeros_like(tau_F))
    return jax.lax.cond(wanted, *sums)


def _short_bwd(saved, g_F):
    pre_BF, tau_F, norm_F, wanted = saved
    g_F = g_F * np.float32(1 / len(pre_BF))

    def short():  # within each branch, so that no array of it is made for both
        return pre_BF * norm_F[None] < tau_F[None]

    count_F = jax.lax.cond(wanted, lambda: short().sum(0, dtype=jnp.float32), lambda: jnp.zeros_like(tau_F))
    return jnp.where(short(), -(g_F * norm_F)[None], 0.0), g_F * count_F, None, None


_short.defvjp(lambda *args: (_short(*args), args), _short_bwd)


def _costs(params, pre_BF, z_BF, n, norm_F, cfg: DictionaryConfig) -> tuple[jax.Array, jax.Array]:
    """`_cost` (summed over heads where each head's norm weighs its own) and `_below` of a shared gate."""
    log_threshold_F = params["log_threshold"]

    def one(n_F):
        return _cost(pre_BF, z_BF, log_threshold_F, n_F, norm_F, cfg)

    if n.ndim == 1:
        return one(n), _below(pre_BF, log_threshold_F, n, norm_F)
    cost_HF = jax.lax.map(jax.checkpoint(one, prevent_cse=False), n)
    return cost_HF.sum(0), _below(pre_BF, log_threshold_F, n.sum(0), norm_F)


def _penalty(cost_F, cfg: DictionaryConfig) -> jax.Array:
    """The sparsity term from every latent's cost, summed over heads where it has a code in each."""
    if cfg.penalty == "tanh_quad":
        heads = cfg.heads if cfg.code_norm == "per_head" else 1
        p_F = cost_F * np.float32(1 / heads)
        cost_F = heads * p_F * (1.0 + p_F * np.float32(1 / cfg.quad_scale))
    return (cost_F * shares(cfg) if cfg.shared_latents else cost_F).sum()


class _Walked(NamedTuple):
    """Sums over heads."""

    cost_F: jax.Array
    below_F: jax.Array
    active_F: jax.Array  # int32, rows and heads that the latent fired in
    least: jax.Array


def _walk_heads(params, x_BHD, pre_BF, n, norm_HF, cfg: DictionaryConfig, hyper: Hyper):
    """(residual [B, H, D], sums over heads) with a gate per head, one head at a time.

    Backwards each head's codes are computed again from `pre`; its reconstruction, which costs a product and no memory
    to speak of, is kept. So time is that of the five products of a head, and codes take `[B, F]` whatever H is.
    """
    jumps = cfg.activation == "jumprelu"
    log_threshold_F = params["log_threshold"] if jumps else None
    if not jumps:
        level = below(sparse.largest_over_heads(jax.lax.stop_gradient(pre_BF), norm_HF, hyper.k, cfg.k))
    n = norm_HF if n.ndim == 1 else n  # batch_topk has no penalty to weigh

    def head(sums: _Walked, each):
        x_BD, W_FD, b_D, n_F, norm_F = each
        f_BF = jump(pre_BF, log_threshold_F, cfg, norm_F) if jumps else through(pre_BF, norm_F, level)
        f_BF = jax.lax.optimization_barrier(f_BF)
        residual_BD = checkpoint_name(x_BD - _decoded(f_BF, W_FD) - b_D[None], "residual")
        if jumps:
            sums = sums._replace(
                cost_F=sums.cost_F + _cost(pre_BF, f_BF, log_threshold_F, n_F, norm_F, cfg),
                below_F=sums.below_F + _short(pre_BF, jnp.exp(log_threshold_F), norm_F, hyper.pre_act > 0),
            )
        value_BF = jax.lax.stop_gradient(f_BF)
        on_BF = value_BF > 0
        sums = sums._replace(
            active_F=sums.active_F + sum_rows(jnp.where(on_BF, 1.0, 0.0)).astype(jnp.int32),
            least=jnp.minimum(sums.least, jnp.where(on_BF, value_BF * norm_F[None], jnp.inf).min()),
        )
        return sums, residual_BD

    zero_F = jnp.zeros(cfg.latents)
    start = _Walked(zero_F, zero_F, jnp.zeros(cfg.latents, jnp.int32), jnp.float32(np.inf))
    keep = jax.checkpoint_policies.save_only_these_names("residual")
    each = (jnp.moveaxis(x_BHD, 1, 0), params["W_dec"], params["b_dec"], n, norm_HF)
    sums, residual_HBD = jax.lax.scan(jax.checkpoint(head, policy=keep, prevent_cse=False), start, each)
    return jnp.moveaxis(residual_HBD, 0, 1), sums


def sum_rows(x_BF) -> jax.Array:
    """Sum over rows. XLA's CPU backend computes one value at a time what it computes inside of a sum, so that there it
    is made first."""
    return (jax.lax.optimization_barrier(x_BF) if sparse.by_rows() else x_BF).sum(0)


@jax.custom_vjp
def _decoded(f_BF, W_FD) -> jax.Array:
    """f W, whose gradient of W is computed transposed: on CPUs (g^T f)^T takes half the time of f^T g."""
    return jnp.matmul(f_BF, W_FD)


def _decoded_fwd(f_BF, W_FD):
    return jnp.matmul(f_BF, W_FD), (f_BF, W_FD)


def _decoded_bwd(saved, g_BD):
    f_BF, W_FD = saved
    return jnp.matmul(g_BD, W_FD.T), jax.lax.optimization_barrier(jnp.matmul(g_BD.T, f_BF)).T


_decoded.defvjp(_decoded_fwd, _decoded_bwd)


def _error(residual_BHD) -> jax.Array:
    return jnp.square(residual_BHD).sum((-1, -2)).mean()


def _attach(params, x_BHD, value_BK, index_BK, cfg: DictionaryConfig) -> jax.Array:
    x_BD = x_BHD[:, 0] - params["b_dec"][0][None] if cfg.subtract_bias else x_BHD[:, 0]
    return sparse.attach_encoder(value_BK, index_BK, params["W_enc"][0], params["b_enc"], x_BD)


def _nested_errors(params, x_BHD, z_BF, cfg: DictionaryConfig) -> tuple[jax.Array, jax.Array]:
    """(residual of the whole dictionary, squared error averaged over the nested ones): each prefix adds its part to
    the reconstruction of the one before."""
    residual_BHD, begin, errors = x_BHD - params["b_dec"][None], 0, []
    for end in cfg.prefixes or (cfg.latents,):
        residual_BHD = residual_BHD - product_with_decoder(z_BF[:, begin:end], params["W_dec"][:, begin:end])
        errors.append(_error(residual_BHD))
        begin = end
    return residual_BHD, sum(errors) * np.float32(1 / len(errors))


def auxiliary(params, x_BHD, residual_BHD, pre_BF, dead_F, cfg: DictionaryConfig, train: TrainConfig) -> jax.Array:
    """The dead latents' attempt at the error, of a fixed shape whatever their number (arXiv 2406.04093, A.2).

    The `aux_k` largest pre-activations of dead latents of a row (relu'd; fewer where fewer are dead) model its error
    without b_dec: |e - ehat|^2 var(x) / var(e), so that its weight means the same whatever the scale of the rows and
    of the error (OpenAI's and dictionary_learning's losses are in units where |x|^2 is about 1). Zero, with zero
    gradients, where nothing is dead or the error has no variance to divide by.
    """
    K = min(train.aux_k or max(cfg.width // 2, 1), cfg.latents)
    rows = sparse.by_rows() and cfg.heads == 1
    masked_BF = jnp.where(dead_F[None], jax.lax.stop_gradient(pre_BF), -jnp.inf)
    value_BK, index_BK = sparse.top_latents(masked_BF, K)
    chosen_BK = jnp.isfinite(value_BK)
    # -inf stands for "none": it is replaced, never multiplied, so that no NaN reaches the gradient
    if cfg.activation == "topk" and rows:
        value_BK = _attach(params, x_BHD, jnp.where(chosen_BK, value_BK, 0.0), index_BK, cfg)
    else:
        value_BK = jnp.take_along_axis(pre_BF, index_BK, axis=1)
    value_BK = jnp.where(chosen_BK, jax.nn.relu(value_BK), 0.0)
    if rows:
        ehat_BHD = sparse.decode_rows(value_BK, index_BK, params["W_dec"][0])[:, None]
    else:
        ehat_BHD = product_with_decoder(sparse.scatter_codes(value_BK, index_BK, cfg.latents), params["W_dec"])
    error = _error(residual_BHD - ehat_BHD)
    if train.aux_norm == "variance":
        variance = _error(residual_BHD - residual_BHD.mean(0, keepdims=True))
        varies = variance > np.float32(1e-10) * _error(residual_BHD)  # below that it is rounding: one row, all alike
        of_rows = _error(x_BHD - x_BHD.mean(0, keepdims=True))
        error = jnp.where(varies, error * of_rows / jnp.where(varies, variance, 1.0), 0.0)
    return jnp.where(dead_F.any(), error, 0.0)
