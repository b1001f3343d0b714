"""Losses as sums and counts: `loss(params, batch, key) -> (sum, sums)`, divided once by whoever adds them up.

A batch is a dict of arrays with leading axis B:

    ids      [B, T] int32 token ids          segment  [B, T] int32, documents 1, 2, ... and padding 0
    row      [B] int32, the row's number in the data (its random numbers depend on the key and on this alone)
    valid    [B] bool, False for rows that only fill up the batch
    position, type [B, T] int32, optional
    predict  [B, T] bool, optional, next-token loss only: the tokens that count as targets (say, those of an answer)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bert6_jax import transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.masking import Corrupted, MaskingConfig, corrupt

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]
LossFn = Callable[[Any, Batch, jax.Array], tuple[jax.Array, Sums]]


def row_keys(key: jax.Array, row_B: jax.Array) -> jax.Array:
    """One key a row, a function of the key and the row's number alone."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_B)


def _cross_entropy(logits_XV, target_X):
    """Negative log-likelihood, the target's logit and the largest logit, each `[...]` float32.

    Selecting by comparison keeps the gradient one fused pass (softmax minus one-hot); a gather's would be a scatter.
    """
    logits_XV = logits_XV.astype(jnp.float32)
    V = logits_XV.shape[-1]
    id_V = jnp.arange(V, dtype=target_X.dtype).reshape((1,) * target_X.ndim + (V,))
    at_target_X = jnp.where(id_V == target_X[..., None], logits_XV, 0.0).sum(-1)
    max_X = jax.lax.stop_gradient(logits_XV.max(-1))
    log_sum_X = jnp.log(jnp.exp(logits_XV - max_X[..., None]).sum(-1)) + max_X
    return log_sum_X - at_target_X, at_target_X, max_X


def cross_entropy(logits_XV: jax.Array, target_X: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target in nats, `[...]` float32."""
    return _cross_entropy(logits_XV, target_X)[0]


def token_sums(logits_XV: jax.Array, target_X: jax.Array, valid_X: jax.Array) -> Sums:
    """Sums over valid targets: `loss` (nats), `hits`, `count`; float32 scalars.

    A hit is a target whose logit is the largest (ties included): the maximum is there already, an argmax over V would
    add a tenth to a training step on a CPU. The evaluations of `readout.predict` take the argmax.
    """
    weight_X = valid_X.astype(jnp.float32)
    nll_X, at_target_X, max_X = _cross_entropy(logits_XV, target_X)
    return {
        "loss": (nll_X * weight_X).sum(),
        "hits": ((at_target_X >= max_X).astype(jnp.float32) * weight_X).sum(),
        "count": weight_X.sum(),
    }


def gather_slots(x_BTD: jax.Array, slot_BK: jax.Array) -> jax.Array:
    """The residual stream at the prediction slots, `[B, K, D]`."""
    return jnp.take_along_axis(x_BTD, slot_BK[:, :, None], axis=1)


def forward_inputs(batch: Batch) -> dict[str, jax.Array | None]:
    """The keyword arguments of `transformer.forward` that a batch may carry."""
    return {f"{name}_BT": batch.get(name) for name in ("segment", "position", "type")}


def masked_batch(batch: Batch, key: jax.Array, masking: MaskingConfig) -> tuple[Corrupted, jax.Array]:
    """Corrupt a batch; rows that only fill it up have no valid slot. Returns the dropout keys of the rows too."""
    keys_B = row_keys(key, batch["row"])
    corrupted = corrupt(transformer.fold_rows(keys_B, 0), batch["ids"], masking)
    valid_BK = corrupted.valid_BK & batch["valid"][:, None]
    overflow_B = jnp.where(batch["valid"], corrupted.overflow_B, 0)
    dropout_keys_B = transformer.fold_rows(keys_B, 1)
    return corrupted._replace(valid_BK=valid_BK, overflow_B=overflow_B), dropout_keys_B


def masked_lm(cfg: TransformerConfig, masking: MaskingConfig) -> LossFn:
    """Masked-LM loss of BERT at the corrupted positions only; the head runs on the K slots of each row."""

    def loss(params, batch, key):
        corrupted, keys_B = masked_batch(batch, key, masking)
        dropout = cfg.dropout > 0 or cfg.attention_dropout > 0
        out_BTD, _ = transformer.forward(
            params, corrupted.ids_BT, cfg, keys_B=keys_B if dropout else None, **forward_inputs(batch)
        )
        logits_BKV = transformer.head(params, gather_slots(out_BTD, corrupted.slot_BK), cfg)
        sums = token_sums(logits_BKV, corrupted.target_BK, corrupted.valid_BK)
        sums["overflow"] = corrupted.overflow_B.sum().astype(jnp.float32)
        return sums["loss"], sums

    return loss


def next_token(cfg: TransformerConfig) -> LossFn:
    """Next-token loss at every position whose successor belongs to the same segment.

    With `predict` in the batch only the tokens that it marks are targets; everything else is read and costs nothing.
    """

    def loss(params, batch, key):
        dropout = cfg.dropout > 0 or cfg.attention_dropout > 0
        keys_B = row_keys(key, batch["row"]) if dropout else None
        out_BTD, _ = transformer.forward(params, batch["ids"], cfg, keys_B=keys_B, **forward_inputs(batch))
        segment_BT = batch.get("segment", jnp.ones_like(batch["ids"]))
        valid_BT = (segment_BT[:, 1:] > 0) & (segment_BT[:, 1:] == segment_BT[:, :-1]) & batch["valid"][:, None]
        if "predict" in batch:
            valid_BT = valid_BT & batch["predict"][:, 1:]
        sums = token_sums(transformer.head(params, out_BTD[:, :-1], cfg), batch["ids"][:, 1:], valid_BT)
        return sums["loss"], sums

    return loss
