"""Readouts: what can be read from the frozen residual stream at every depth, all depths trained in one pass.

A bank of heads with leading axis M (depth 0 = embedding output, m = output of block m) sees the same frozen forward
pass. Every head's loss touches that head alone and the optimiser is elementwise, so a member of the bank equals the
same head trained alone. Variants (arXiv 2509.03407 leaves the reading unpublished; these are our choices):

    linear      a new linear layer D -> V with bias (the group's own method for image classifiers, arXiv 2305.18078)
    mlm_head    a new masked-LM head: dense, activation, norm, decoder of its own, bias
    logit_lens  the model's own head, as it is; nothing is trained

Most of the cost is the vocabulary at every slot, and half of the slots hold no target: heads run on the valid ones
(`_at_valid`). Letters beside those of `bert6_jax`: G groups of rows, J slots of a group, X slots that a head runs on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bert6_jax import transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError
from bert6_jax.masking import Corrupted, MaskingConfig
from bert6_jax.objectives import Sums, forward_inputs, masked_batch, token_sums
from bert6_jax.train import GradFn

VARIANTS = ("linear", "mlm_head", "logit_lens")


def head_config(cfg: TransformerConfig, variant: str) -> TransformerConfig:
    """The configuration of one head of the bank, as `transformer.Head` reads it."""
    if variant not in VARIANTS:
        raise InputError(f"readout variant is {variant!r}; choose one of {', '.join(VARIANTS)}")
    if variant == "logit_lens":
        return cfg
    return dataclasses.replace(cfg, head="mlm" if variant == "mlm_head" else "linear", tied=False, head_bias=True)


def init_heads(key: jax.Array, cfg: TransformerConfig, variant: str) -> transformer.Params:
    """A fresh bank `[M, ...]`, one key a depth; for `logit_lens` there is nothing to train and the tree is empty."""
    if variant == "logit_lens":
        return {}
    module = transformer.Head(head_config(cfg, variant))
    x_1D = jnp.zeros((1, cfg.width), jnp.float32)
    token_VD = jnp.zeros((1, cfg.width), jnp.float32)  # untied heads never read it
    return jax.vmap(lambda k: module.init(k, x_1D, token_VD)["params"])(jax.random.split(key, cfg.depths))


def _depths(cfg: TransformerConfig, depths: Sequence[int] | None) -> tuple[int, ...]:
    names = tuple(range(cfg.depths)) if depths is None else tuple(depths)
    if not names or not all(0 <= m <= cfg.blocks for m in names):
        raise ValueError(f"depths {names}: give some of 0 (the embedding) to {cfg.blocks} (the last block)")
    return names


def slot_streams(
    params, batch, key, cfg: TransformerConfig, masking: MaskingConfig, depths: Sequence[int] | None = None
) -> tuple[jax.Array, Corrupted]:
    """The frozen stream at the prediction slots, `[M, B, K, D]`, and the corruption behind it.

    M are the `depths` (default: all); blocks above the deepest of them are not run.
    """
    names, (corrupted, _) = _depths(cfg, depths), masked_batch(batch, key, masking)
    last = max(*names, 1)
    if last < cfg.blocks:
        cfg = dataclasses.replace(cfg, blocks=last)
        params = params | {"blocks": jax.tree.map(lambda leaf: leaf[:last], params["blocks"])}
    _, acts = transformer.forward(params, corrupted.ids_BT, cfg, **forward_inputs(batch))
    resid_MBTD = acts["resid"] if depths is None else jnp.stack([acts["resid"][m] for m in depths])
    resid_MBKD = jnp.take_along_axis(resid_MBTD, corrupted.slot_BK[None, :, :, None], axis=2)
    return jax.lax.stop_gradient(resid_MBKD), corrupted


def _sizes(rows: int, length: int, slots: int, rate: float) -> tuple[int, ...]:
    """How many slots of a group of `rows` rows programs are compiled for: two that nearly all batches fit, and all.

    A row has min(n, slots) targets, n binomial over its positions: half a deviation and three above the mean, made
    multiples of 8.
    """
    if not rate < 1.0:
        return (rows * slots,)
    odds, log_rest = math.log(rate) - math.log1p(-rate), length * math.log1p(-rate)
    log_ways = [math.lgamma(length + 1) - math.lgamma(n + 1) - math.lgamma(length - n + 1) for n in range(length + 1)]
    share = [math.exp(ways + n * odds + log_rest) for n, ways in enumerate(log_ways)]
    mean = sum(p * min(n, slots) for n, p in enumerate(share))
    spread = math.sqrt(rows * sum(p * (min(n, slots) - mean) ** 2 for n, p in enumerate(share)))
    fitting = {8 * math.ceil((rows * mean + more * spread) / 8) for more in (0.5, 3.0)}
    return (*sorted(size for size in fitting if size < rows * slots), rows * slots)


def _at_valid(run: Callable[..., Any], resid_MBKD, corrupted: Corrupted, rate: float):
    """`run(resid_MGXD, target_GX, valid_GX)` on the valid slots of a batch, packed, and few others: what it returns.

    `run` returns two trees: arrays `[..., G, X]`, which come back as `[..., B, K]` with junk at the other slots, and
    anything whose shapes do not depend on X.

    Rows are packed in groups of 16 (of the greatest divisor of B and 16), so that a batch which is split over devices
    by such groups stays where it is. X is the first size that holds every group (`lax.switch`: the program has them
    all, a batch pays for one).
    """
    (M, B, K, D), T = resid_MBKD.shape, corrupted.ids_BT.shape[1]
    R = math.gcd(B, 16)
    G, J = B // R, R * K
    valid_GJ = corrupted.valid_BK.reshape(G, J)
    order_GJ = jnp.argsort(~valid_GJ, axis=-1, stable=True)  # valid ones first
    target_GJ, valid_GJ = (
        jnp.take_along_axis(x_BK.reshape(G, J), order_GJ, axis=-1) for x_BK in (corrupted.target_BK, corrupted.valid_BK)
    )
    resid_MGJD = jnp.take_along_axis(resid_MBKD.reshape(M, G, J, D), order_GJ[None, :, :, None], axis=2)
    sizes = _sizes(R, T, K, rate)

    def packed(X):
        def branch():
            by_slot, rest = run(resid_MGJD[:, :, :X], target_GJ[:, :X], valid_GJ[:, :X])
            return jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, J - X)]), by_slot), rest

        return branch

    needed = valid_GJ.sum(-1, dtype=jnp.int32).max()
    which = (needed > jnp.array(sizes[:-1], jnp.int32)).sum(dtype=jnp.int32)
    by_slot, rest = jax.lax.switch(which, [packed(X) for X in sizes])
    place_GJ = jnp.argsort(order_GJ, axis=-1)

    def unpack(x_XGJ):
        x_XGJ = jnp.take_along_axis(x_XGJ, jnp.broadcast_to(place_GJ, x_XGJ.shape), axis=-1)
        return x_XGJ.reshape(*x_XGJ.shape[:-2], B, K)

    return jax.tree.map(unpack, by_slot), rest


def head_logits(heads_m, x_XD, params, cfg: TransformerConfig, variant: str) -> jax.Array:
    """Float32 logits `[..., V]` of one member of the bank (`params`: the trunk, whose head `logit_lens` borrows)."""
    if variant == "logit_lens":
        if cfg.norm == "pre":
            x_XD = transformer.apply_norm(params["final_norm"], x_XD, cfg)
        return transformer.head(params, x_XD, cfg)
    module = transformer.Head(head_config(cfg, variant))
    return module.apply({"params": heads_m}, x_XD, params["embed"]["token"])


def grad_fn(
    cfg: TransformerConfig, masking: MaskingConfig, variant: str, depths: Sequence[int] | None = None
) -> GradFn:
    """Gradients of all heads for `train.make_step`, from one forward pass of the trunk, which is the frozen argument.

    Heads are taken one after the other (`lax.map`), so that what lives at a time are one head's logits; of all heads
    together live the gradients of kernels or, in float32 where they are smaller, of the logits. Sums: `count`
    positions, `loss` and `hits` averaged over the depths, and `loss_0`, `loss_1`, ... per depth. `depths`: those of
    the bank (default: all).
    """
    names = _depths(cfg, depths)

    def grads_and_sums(heads, batch, key, trunk):
        resid_MBKD, corrupted = slot_streams(trunk, batch, key, cfg, masking, depths)

        def bank(resid_MGXD, target_GX, valid_GX):
            def loss(logits_GXV):
                sums = token_sums(logits_GXV, target_GX, valid_GX)
                return sums["loss"], sums

            def whole(member):
                heads_m, x_GXD = member
                of_head = jax.grad(lambda head: loss(head_logits(head, x_GXD, trunk, cfg, variant)), has_aux=True)
                return of_head(heads_m)

            def of_logits(member):
                return jax.grad(loss, has_aux=True)(head_logits(*member, trunk, cfg, variant))

            if variant == "linear" and cfg.dtype == "float32" and target_GX.size <= cfg.width:
                # To stack [X, V] moves less than to stack [D, V], and the product below writes all kernels' in place.
                grad_MGXV, sums_M = jax.lax.map(of_logits, (heads, resid_MGXD))
                M, X = len(names), target_GX.size
                grad_MXV = jax.lax.optimization_barrier(grad_MGXV).reshape(M, X, cfg.vocab_size)
                x_MXD = resid_MGXD.reshape(M, X, cfg.width)
                ones_MX = jnp.ones(x_MXD.shape[:2], jnp.float32)
                kernel_MDV = jnp.einsum("mxd,mxv->mdv", x_MXD, grad_MXV)
                return (), ({"kernel": kernel_MDV, "bias": jnp.einsum("mx,mxv->mv", ones_MX, grad_MXV)}, sums_M)
            return (), jax.lax.map(whole, (heads, resid_MGXD))

        _, (grads, sums_M) = _at_valid(bank, resid_MBKD, corrupted, masking.rate)
        # `make_step` divides the gradients by `count`: each head's own loss is a mean over the same positions
        sums: Sums = {"loss": sums_M["loss"].mean(), "hits": sums_M["hits"].mean(), "count": sums_M["count"][0]}
        return grads, sums | {f"loss_{m}": sums_M["loss"][i] for i, m in enumerate(names)}

    return grads_and_sums


def _answer(logits_GXV, target_GX) -> tuple[jax.Array, jax.Array]:
    """The id with the largest logit, and the target's negative log-likelihood in nats.

    Nothing is differentiated here, so the target's logit may be a gather, which spares a pass over V.
    """
    max_GX = logits_GXV.max(-1)
    log_sum_GX = jnp.log(jnp.exp(logits_GXV - max_GX[..., None]).sum(-1)) + max_GX
    at_target_GX = jnp.take_along_axis(logits_GXV, target_GX[..., None], axis=-1)[..., 0]
    return jnp.argmax(logits_GXV, axis=-1).astype(jnp.int32), log_sum_GX - at_target_GX


def predict(
    trunk,
    heads,
    batch,
    key,
    cfg: TransformerConfig,
    masking: MaskingConfig,
    variant: str | None,
    depths: Sequence[int] | None = None,
    own: bool = True,
):
    """What every readout answers, from one forward pass: the M depths in order, then the model's own head.

    Returns ids `[M + 1, B, K]` int32 (-1 at unused slots), summed loss per row `[M + 1, B]` (nats) and the corruption
    they answer to; with `variant=None` the own head alone, `[1, ...]`. `depths`: those of the bank (default: all).
    Without `own` the depths alone, `[M, ...]`, and blocks above the deepest are not run.
    """
    if own:
        corrupted, _ = masked_batch(batch, key, masking)
        out_BTD, acts = transformer.forward(trunk, corrupted.ids_BT, cfg, **forward_inputs(batch))
        names = () if variant is None else _depths(cfg, depths)
        read_RBTD = jnp.stack([*(acts["resid"][m] for m in names), out_BTD])  # R readouts: M + 1
        read_RBKD = jnp.take_along_axis(read_RBTD, corrupted.slot_BK[None, :, :, None], axis=2)
    else:
        read_RBKD, corrupted = slot_streams(trunk, batch, key, cfg, masking, depths)

    def bank(read_RGXD, target_GX, valid_GX):
        parts = []
        if variant is not None:
            read_MGXD = read_RGXD[:-1] if own else read_RGXD
            parts.append(
                jax.lax.map(
                    lambda member: _answer(head_logits(*member, trunk, cfg, variant), target_GX), (heads, read_MGXD)
                )
            )
        if own:
            answer = _answer(transformer.head(trunk, read_RGXD[-1], cfg), target_GX)
            parts.append(jax.tree.map(lambda x_GX: x_GX[None], answer))
        return jax.tree.map(lambda *x: jnp.concatenate(x), *parts), ()

    (id_RBK, nll_RBK), _ = _at_valid(bank, read_RBKD, corrupted, masking.rate)
    valid_BK = corrupted.valid_BK
    return jnp.where(valid_BK, id_RBK, -1), jnp.where(valid_BK, nll_RBK, 0.0).sum(-1), corrupted
