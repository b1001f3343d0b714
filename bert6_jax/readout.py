"""Readouts: what can be read from the frozen residual stream at every depth, all depths trained in one pass.

A bank of heads with leading axis M (depth 0 = embedding output, m = output of block m) sees the same frozen forward
pass. Every head's loss touches that head alone and the optimiser is elementwise, so a member of the bank equals the
same head trained alone. Variants (arXiv 2509.03407 leaves the reading unpublished; these are our choices):

    linear      a new linear layer D -> V with bias (the group's own method for image classifiers, arXiv 2305.18078)
    mlm_head    a new masked-LM head: dense, activation, norm, decoder of its own, bias
    logit_lens  the model's own head, as it is; nothing is trained
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from bert6_jax import transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError
from bert6_jax.masking import Corrupted, MaskingConfig
from bert6_jax.objectives import Sums, cross_entropy, forward_inputs, gather_slots, masked_batch, token_sums
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


def slot_streams(params, batch, key, cfg: TransformerConfig, masking: MaskingConfig) -> tuple[jax.Array, Corrupted]:
    """The frozen stream at the prediction slots of every depth, `[M, B, K, D]`, and the corruption behind it."""
    corrupted, _ = masked_batch(batch, key, masking)
    _, acts = transformer.forward(params, corrupted.ids_BT, cfg, **forward_inputs(batch))
    resid_MBKD = jnp.take_along_axis(acts["resid"], corrupted.slot_BK[None, :, :, None], axis=2)
    return jax.lax.stop_gradient(resid_MBKD), corrupted


def head_logits(heads_m, x_XD, params, cfg: TransformerConfig, variant: str) -> jax.Array:
    """Float32 logits `[..., V]` of one member of the bank (`params`: the trunk, whose head `logit_lens` borrows)."""
    if variant == "logit_lens":
        if cfg.norm == "pre":
            x_XD = transformer.apply_norm(params["final_norm"], x_XD, cfg)
        return transformer.head(params, x_XD, cfg)
    module = transformer.Head(head_config(cfg, variant))
    return module.apply({"params": heads_m}, x_XD, params["embed"]["token"])


def grad_fn(cfg: TransformerConfig, masking: MaskingConfig, variant: str) -> GradFn:
    """Gradients of all heads for `train.make_step`, from one forward pass of the trunk, which is the frozen argument.

    Heads are taken one after the other (`lax.map`), so one head's `[B, K, V]` logits live at a time. Sums: `count`
    positions, `loss` and `hits` averaged over the depths, and `loss_0`, `loss_1`, ... per depth.
    """

    def grads_and_sums(heads, batch, key, trunk):
        resid_MBKD, corrupted = slot_streams(trunk, batch, key, cfg, masking)

        def one(member):
            heads_m, x_BKD = member

            def loss(heads_m):
                logits_BKV = head_logits(heads_m, x_BKD, trunk, cfg, variant)
                sums = token_sums(logits_BKV, corrupted.target_BK, corrupted.valid_BK)
                return sums["loss"], sums

            (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(heads_m)
            return grads, sums

        grads, sums_M = jax.lax.map(one, (heads, resid_MBKD))
        # `make_step` divides the gradients by `count`: each head's own loss is a mean over the same positions
        sums: Sums = {"loss": sums_M["loss"].mean(), "hits": sums_M["hits"].mean(), "count": sums_M["count"][0]}
        return grads, sums | {f"loss_{m}": sums_M["loss"][m] for m in range(cfg.depths)}

    return grads_and_sums


def predict(trunk, heads, batch, key, cfg: TransformerConfig, masking: MaskingConfig, variant: str | None):
    """What every readout answers, from one forward pass: the M depths in order, then the model's own head.

    Returns ids `[M + 1, B, K]` int32, summed loss per row `[M + 1, B]` (nats) and the corruption they answer to; with
    `variant=None` the own head alone, `[1, ...]`.
    """
    corrupted, _ = masked_batch(batch, key, masking)
    out_BTD, acts = transformer.forward(trunk, corrupted.ids_BT, cfg, **forward_inputs(batch))

    def answer(logits_BKV):
        nll_BK = cross_entropy(logits_BKV, corrupted.target_BK) * corrupted.valid_BK.astype(jnp.float32)
        return jnp.argmax(logits_BKV, axis=-1).astype(jnp.int32), nll_BK.sum(-1)

    own_BK, own_nll_B = answer(transformer.head(trunk, gather_slots(out_BTD, corrupted.slot_BK), cfg))
    if variant is None:
        return own_BK[None], own_nll_B[None], corrupted
    resid_MBKD = jnp.take_along_axis(acts["resid"], corrupted.slot_BK[None, :, :, None], axis=2)
    prediction_MBK, nll_MB = jax.lax.map(
        lambda member: answer(head_logits(*member, trunk, cfg, variant)), (heads, resid_MBKD)
    )
    return jnp.append(prediction_MBK, own_BK[None], axis=0), jnp.append(nll_MB, own_nll_B[None], axis=0), corrupted
