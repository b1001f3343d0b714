"""The transformer: Flax modules for the leaves, pure functions for the whole.

The parameters are one nested dict with string keys. Every kernel is `[in, out]`; the blocks are stacked on a leading
axis and walked by `jax.lax.scan`:

    embed       token [V, D], position [P, D], type [types, D], norm (post-LN models)
    blocks      attn {q, k, v: kernel [L, D, N*H], bias; out: kernel [L, N*H, D], bias}, norm_attn,
                mlp {in: kernel [L, D, F], bias; out: kernel [L, F, D], bias}, norm_mlp
    final_norm  pre-LN models only
    head        masked-LM: dense, norm, bias [V]; linear: bias [V]; with `kernel` [D, V] unless the decoder is tied

A forward pass returns every activation worth looking at; under `jit` nobody pays for what is not read. The names map
one to one onto TransformerLens hooks (`HOOK_NAMES`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bert6_jax.config import TransformerConfig

Params = dict[str, Any]
Activations = dict[str, jax.Array]

# name of ours -> TransformerLens hook of block {m}; `resid` has M = L + 1 entries, 0 the embedding output.
HOOK_NAMES = {
    "q": "blocks.{m}.attn.hook_q",  # [L, B, T, N, H]
    "k": "blocks.{m}.attn.hook_k",  # [L, B, T, N, H]
    "v": "blocks.{m}.attn.hook_v",  # [L, B, T, N, H]
    "pattern": "blocks.{m}.attn.hook_pattern",  # [L, B, N, T, T], float32 softmax, before dropout
    "z": "blocks.{m}.attn.hook_z",  # [L, B, T, N, H]
    "attn_out": "blocks.{m}.hook_attn_out",  # [L, B, T, D]
    "resid_mid": "blocks.{m}.hook_resid_mid",  # [L, B, T, D], the sum before norm_attn in post-LN models
    "mlp_pre": "blocks.{m}.mlp.hook_pre",  # [L, B, T, F]
    "mlp_post": "blocks.{m}.mlp.hook_post",  # [L, B, T, F]
    "mlp_out": "blocks.{m}.hook_mlp_out",  # [L, B, T, D]
    "resid_post": "blocks.{m}.hook_resid_post",  # [L, B, T, D], the sum before norm_mlp in post-LN models
    # [M, B, T, D]: index 0 is `hook_full_embed`'s norm (post) or `blocks.0.hook_resid_pre` (pre), index m + 1 is
    # `blocks.{m}.hook_normalized_resid_post` (post) or `blocks.{m}.hook_resid_post` (pre): Hugging Face's hidden_states
    "resid": "blocks.{m}.hook_normalized_resid_post",
}


def _activation(cfg: TransformerConfig):
    return {"gelu": partial(nn.gelu, approximate=False), "gelu_tanh": nn.gelu, "relu": nn.relu}[cfg.activation]


def _dense(cfg: TransformerConfig, features: int, name: str, *, residual: bool = False) -> nn.Dense:
    std = cfg.init_std / np.sqrt(2 * cfg.blocks) if residual and cfg.scaled_residual_init else cfg.init_std
    return nn.Dense(features, dtype=jnp.dtype(cfg.dtype), kernel_init=nn.initializers.normal(std), name=name)


def _norm(cfg: TransformerConfig, name: str | None = None) -> nn.LayerNorm:
    # In float32 whatever the compute dtype, and with the two-pass variance: E[x^2] - E[x]^2 cancels where a residual
    # stream has outlier dimensions. Callers cast around it.
    return nn.LayerNorm(cfg.norm_eps, dtype=jnp.float32, use_fast_variance=False, name=name)


def dropout(x, keys_B, rate: float):
    """Inverted dropout with one key a row, so that a row's mask does not depend on who shares its batch or device;
    `keys_B=None` is evaluation."""
    if keys_B is None or rate == 0.0:
        return x
    threshold = round(rate * 2**16)  # 16 random bits an element: rate to 1 part in 65,536, half the cost of 32
    bits = jax.vmap(lambda key: jax.random.bits(key, x.shape[1:], jnp.uint16))(keys_B)
    return jnp.where(bits >= threshold, x * jnp.asarray(2**16 / (2**16 - threshold), x.dtype), jnp.zeros((), x.dtype))


def fold_rows(keys_B, data):
    """Each row's key for one site (a depth, a sublayer); None stays None."""
    return None if keys_B is None else jax.vmap(lambda key: jax.random.fold_in(key, data))(keys_B)


class Embed(nn.Module):
    """Sum of token, position and type embeddings, normalised in post-LN models."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, ids_BT, position_BT, type_BT):
        cfg = self.cfg
        init = nn.initializers.normal(cfg.init_std)
        x_BTD = self.param("token", init, (cfg.vocab_size, cfg.width))[ids_BT]
        if cfg.types:
            # Two or so rows: a one-hot product, whose gradient is a matmul and not a scatter of B*T rows.
            types = self.param("type", init, (cfg.types, cfg.width))
            x_BTD = x_BTD + jax.nn.one_hot(type_BT, cfg.types, dtype=types.dtype) @ types
        x_BTD = x_BTD + self.param("position", init, (cfg.max_len, cfg.width))[position_BT]
        if cfg.norm == "post":
            x_BTD = _norm(cfg, "norm")(x_BTD)
        return x_BTD.astype(cfg.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; returns its output and what happened inside."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD, mask_BTT, keys_B=None):
        cfg = self.cfg
        split = (*x_BTD.shape[:2], cfg.heads, cfg.head_width)
        q_BTNH, k_BTNH, v_BTNH = (
            _dense(cfg, cfg.heads * cfg.head_width, name)(x_BTD).reshape(split) for name in ("q", "k", "v")
        )
        scores_BNTT = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH, preferred_element_type=jnp.float32)
        scores_BNTT = scores_BNTT * np.float32(cfg.head_width**-0.5)
        scores_BNTT = jnp.where(mask_BTT[:, None], scores_BNTT, jnp.finfo(jnp.float32).min)
        pattern_BNTT = jax.nn.softmax(scores_BNTT, axis=-1)
        dropped_BNTT = dropout(pattern_BNTT.astype(cfg.dtype), fold_rows(keys_B, 0), cfg.attention_dropout)
        z_BTNH = jnp.einsum("bnts,bsnh->btnh", dropped_BNTT, v_BTNH)
        out_BTD = _dense(cfg, cfg.width, "out", residual=True)(z_BTNH.reshape(*split[:2], -1))
        return out_BTD, {"q": q_BTNH, "k": k_BTNH, "v": v_BTNH, "pattern": pattern_BNTT, "z": z_BTNH}


class Mlp(nn.Module):
    """Two layers with the configured activation between them."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD):
        cfg = self.cfg
        pre_BTF = _dense(cfg, cfg.mlp_width, "in")(x_BTD)
        post_BTF = _activation(cfg)(pre_BTF)
        return _dense(cfg, cfg.width, "out", residual=True)(post_BTF), {"mlp_pre": pre_BTF, "mlp_post": post_BTF}


class Head(nn.Module):
    """From the residual stream to float32 logits over the vocabulary, at any leading shape."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x_XD, token_VD):
        cfg = self.cfg
        if cfg.head == "mlm":
            x_XD = _activation(cfg)(_dense(cfg, cfg.width, "dense")(x_XD))
            x_XD = _norm(cfg, "norm")(x_XD.astype(jnp.float32)).astype(cfg.dtype)
        if cfg.tied:
            kernel_DV = token_VD.T
        else:
            kernel_DV = self.param("kernel", nn.initializers.normal(cfg.init_std), (cfg.width, cfg.vocab_size))
        if cfg.head_bias:
            # The bias as one more row of the kernel: its gradient comes out of the matmul, where a sum over positions
            # of [X, V] took as long as the matmul itself on a CPU.
            bias_V = self.param("bias", nn.initializers.zeros, (cfg.vocab_size,))
            kernel_DV = jnp.concatenate([kernel_DV, bias_V[None]])
            x_XD = jnp.concatenate([x_XD, jnp.ones((*x_XD.shape[:-1], 1), x_XD.dtype)], axis=-1)
        # The barrier keeps XLA from turning the backward product around, which would transpose [X, V] (0.4 s of 4 s).
        kernel_DV = jax.lax.optimization_barrier(kernel_DV.astype(x_XD.dtype))
        logits_XV = jnp.matmul(x_XD, kernel_DV, preferred_element_type=jnp.float32)
        return logits_XV


def init(key: jax.Array, cfg: TransformerConfig) -> Params:
    """Fresh float32 parameters: normal(0, `init_std`) matrices, zero biases, unit scales.

    Wrap it in `jax.jit(..., out_shardings=...)` to create a large model already sharded.
    """
    embed_key, block_key, head_key = jax.random.split(key, 3)
    ids_BT = jnp.zeros((1, 1), jnp.int32)
    x_BTD = jnp.zeros((1, 1, cfg.width), jnp.float32)
    mask_BTT = jnp.ones((1, 1, 1), bool)

    def init_block(key):
        attn_key, mlp_key = jax.random.split(key)
        block = {
            "attn": Attention(cfg).init(attn_key, x_BTD, mask_BTT)["params"],
            "mlp": Mlp(cfg).init(mlp_key, x_BTD)["params"],
        }
        if cfg.norm != "none":
            for name in ("norm_attn", "norm_mlp"):
                block[name] = _norm(cfg).init(key, x_BTD)["params"]
        return block

    params = {
        "embed": Embed(cfg).init(embed_key, ids_BT, ids_BT, ids_BT)["params"],
        "blocks": jax.vmap(init_block)(jax.random.split(block_key, cfg.blocks)),
    }
    if cfg.norm == "pre":
        params["final_norm"] = _norm(cfg).init(key, x_BTD)["params"]
    if cfg.head != "none":
        variables = Head(cfg).init(head_key, x_BTD, params["embed"]["token"])
        if "params" in variables:  # a tied linear head without bias owns nothing
            params["head"] = variables["params"]
    return params


def attention_mask(segment_BT: jax.Array, causal: bool) -> jax.Array:
    """Which keys a query sees, `[B, T, T]` bool: those of its own segment, and none after it in causal models.

    Segment 0 is padding, which nobody sees. Padded queries see every token, as in Hugging Face models, so that
    all-padding queries do not average over junk and parity holds at every position.
    """
    query_BT1, key_B1T = segment_BT[:, :, None], segment_BT[:, None, :]
    mask_BTT = (key_B1T > 0) & ((query_BT1 == key_B1T) | (query_BT1 == 0))
    if causal:
        T = segment_BT.shape[1]
        mask_BTT = mask_BTT & (jnp.arange(T)[:, None] >= jnp.arange(T)[None, :])[None]
    return mask_BTT


def embed(params: Params, ids_BT, cfg: TransformerConfig, *, position_BT=None, type_BT=None, keys_B=None):
    """Depth 0 of the residual stream, `[B, T, D]`. `keys_B`: one dropout key a row, None for evaluation."""
    if ids_BT.shape[1] > cfg.max_len:
        raise ValueError(f"rows of {ids_BT.shape[1]} tokens do not fit max_len = {cfg.max_len}")
    if position_BT is None:
        position_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1], dtype=jnp.int32)[None], ids_BT.shape)
    if type_BT is None:
        type_BT = jnp.zeros_like(ids_BT)
    x_BTD = Embed(cfg).apply({"params": params["embed"]}, ids_BT, position_BT, type_BT)
    return dropout(x_BTD, keys_B, cfg.dropout)


def apply_norm(params: Params, x_XD, cfg: TransformerConfig) -> jax.Array:
    """Layer norm over the last axis, statistics in float32, result in the compute dtype."""
    return _norm(cfg).apply({"params": params}, x_XD.astype(jnp.float32)).astype(cfg.dtype)


def block(params: Params, x_BTD, mask_BTT, cfg: TransformerConfig, keys_B=None) -> tuple[jax.Array, Activations]:
    """One block (parameters without the leading axis): the new residual stream and its activations."""

    def norm(name, x_BTD):
        return apply_norm(params[name], x_BTD, cfg)

    pre, post = cfg.norm == "pre", cfg.norm == "post"
    attn_in_BTD = norm("norm_attn", x_BTD) if pre else x_BTD
    attn_out_BTD, acts = Attention(cfg).apply({"params": params["attn"]}, attn_in_BTD, mask_BTT, keys_B)
    resid_mid_BTD = x_BTD + dropout(attn_out_BTD, fold_rows(keys_B, 1), cfg.dropout)
    x_BTD = norm("norm_attn", resid_mid_BTD) if post else resid_mid_BTD
    mlp_out_BTD, mlp_acts = Mlp(cfg).apply({"params": params["mlp"]}, norm("norm_mlp", x_BTD) if pre else x_BTD)
    resid_post_BTD = x_BTD + dropout(mlp_out_BTD, fold_rows(keys_B, 2), cfg.dropout)
    x_BTD = norm("norm_mlp", resid_post_BTD) if post else resid_post_BTD
    sums = {"attn_out": attn_out_BTD, "resid_mid": resid_mid_BTD, "mlp_out": mlp_out_BTD, "resid_post": resid_post_BTD}
    return x_BTD, acts | mlp_acts | sums


def blocks(params: Params, x_BTD, mask_BTT, cfg: TransformerConfig, keys_B=None) -> tuple[jax.Array, Activations]:
    """Scan over stacked blocks (all of them or any slice of the stack): last residual and activations `[L, ...]`."""
    depth_L = jnp.arange(jax.tree.leaves(params)[0].shape[0])

    def body(x_BTD, layer):
        layer_params, depth = layer
        y_BTD, acts = block(layer_params, x_BTD, mask_BTT, cfg, fold_rows(keys_B, depth))
        return y_BTD, acts | {"resid": y_BTD}

    return jax.lax.scan(body, x_BTD, (params, depth_L))


def forward(
    params: Params, ids_BT, cfg: TransformerConfig, *, segment_BT=None, position_BT=None, type_BT=None, keys_B=None
) -> tuple[jax.Array, Activations]:
    """The trunk: what the head reads, `[B, T, D]`, and every activation (see `HOOK_NAMES` for names and shapes).

    `segment_BT` marks documents packed in one row by 1, 2, ... and padding by 0 (default: no padding); `position_BT`
    and `type_BT` default to 0, 1, ... and to 0; `keys_B` is one dropout key a row, None for evaluation.
    `acts["resid"]` is the residual stream at depths 0..L, `[M, B, T, D]`; the final norm of pre-LN models is applied
    to the first return value only.
    """
    if segment_BT is None:
        segment_BT = jnp.ones_like(ids_BT)
    embed_keys_B, block_keys_B = fold_rows(keys_B, 0), fold_rows(keys_B, 1)
    x_BTD = embed(params, ids_BT, cfg, position_BT=position_BT, type_BT=type_BT, keys_B=embed_keys_B)
    out_BTD, acts = blocks(params["blocks"], x_BTD, attention_mask(segment_BT, cfg.causal), cfg, block_keys_B)
    acts["resid"] = jnp.concatenate([x_BTD[None], acts["resid"]])
    if cfg.norm == "pre":
        out_BTD = apply_norm(params["final_norm"], out_BTD, cfg)
    return out_BTD, acts


def head(params: Params, x_XD, cfg: TransformerConfig) -> jax.Array:
    """Float32 logits `[..., V]` of the model's own head at any leading shape (gathered slots, all positions)."""
    return Head(cfg).apply({"params": params.get("head", {})}, x_XD, params["embed"]["token"])


def num_params(params: Params) -> int:
    """Number of parameters (a tied decoder counts once)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def flops_per_token(cfg: TransformerConfig, seq_len: int, head_share: float = 1.0) -> float:
    """Floating-point operations of one training step per token: 6 N + 12 L d T, the head at its share of positions.

    N counts the matrices that a token passes through (embedding look-ups are free), d = heads * head width, T the row
    length; 6 = 2 (multiply, add) * 3 (forward, two backward products), 12 L d T the two attention products.
    """
    inner = cfg.heads * cfg.head_width
    trunk = cfg.blocks * (4 * cfg.width * inner + 2 * cfg.width * cfg.mlp_width)
    head_ = cfg.width * cfg.vocab_size + (cfg.width**2 if cfg.head == "mlm" else 0) if cfg.head != "none" else 0
    return 6.0 * (trunk + head_share * head_) + 12.0 * cfg.blocks * inner * seq_len
