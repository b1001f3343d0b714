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

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bert6_jax.config import TransformerConfig

Params = dict[str, Any]
Activations = dict[str, jax.Array]
_MASKED = np.finfo(np.float32).min  # the score of a key that a query does not see
# Large blocks are unrolled, so many in a turn of the loop over blocks: XLA then stacks no residuals, a tenth of a
# training step on CPUs. A block of fewer parameters takes longer to compile so often than that saves.
UNROLL, LARGE = 6, 1_000_000
Edit = Callable[[str, jax.Array, jax.Array], jax.Array]  # (name, depth, activation) -> activation

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


# --- what XLA is to be told about products ---------------------------------------------------------------------------


@jax.custom_jvp
def gradient_whole(x):
    """The identity, whose gradient is made once, as an array, before anything reads it.

    A dense layer's gradient is read by two products and by the sum over positions that its bias gets. XLA on CPUs would
    make it anew in each of them, and does not vectorise that sum: a fifth of BERT-6's training step.
    """
    return x


@gradient_whole.defjvp
def _gradient_whole(primals, tangents):
    return primals[0], jax.lax.optimization_barrier(tangents[0])


def product(x_XK, kernel, transposed: bool = False) -> jax.Array:
    """`x @ kernel` with float32 sums, `[..., F]` float32, of two arrays of one dtype; a kernel is `[K, F]`, or
    transposed `[F, K]`.

    Of bfloat16 on CPUs there are reverse-mode derivatives only, and what is differentiated is rounded to bfloat16.
    """
    if x_XK.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        return _bfloat16_product(x_XK, kernel, transposed)
    return jnp.matmul(x_XK, kernel.T if transposed else kernel, preferred_element_type=jnp.float32)


def _dot(x_XK, kernel_KF, dims, precision=None):
    """The product of `nn.Dense`, in the dtype of its operands."""
    if x_XK.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        return _bfloat16_product(x_XK, kernel_KF, False).astype(x_XK.dtype)
    return jax.lax.dot_general(x_XK, kernel_KF, dims, precision)


# XLA's CPU backend multiplies bfloat16 by the processor's own instructions, at twice the rate of float32, where sums
# are float32 and the left operand lies in rows; anything else it turns into a float32 product. Differentiating a plain
# product leads to two such forms. The barriers keep what is written here.
@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _bfloat16_product(x_XK, kernel, transposed):
    y_PF = _sums(_rows(x_XK), kernel, transposed)
    return y_PF.reshape(*x_XK.shape[:-1], y_PF.shape[-1])


def _bfloat16_product_forward(x_XK, kernel, transposed):
    return _bfloat16_product(x_XK, kernel, transposed), (x_XK, kernel)


def _bfloat16_product_backward(transposed, operands, dy_XF):
    x_XK, kernel = operands
    dy_PF, x_PK = _rows(dy_XF).astype(jnp.bfloat16), _rows(x_XK)
    dx_XK = _sums(dy_PF, kernel, not transposed).reshape(x_XK.shape)
    dkernel = _sums(_columns(dy_PF), x_PK) if transposed else _sums(_columns(x_PK), dy_PF)
    return dx_XK.astype(jnp.bfloat16), dkernel.astype(jnp.bfloat16)


_bfloat16_product.defvjp(_bfloat16_product_forward, _bfloat16_product_backward)


def _rows(x_XK):
    return x_XK.reshape(math.prod(x_XK.shape[:-1]), x_XK.shape[-1])


def _sums(a, b, transposed=False):
    a, b = jax.lax.optimization_barrier((a, b))
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.optimization_barrier(jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.float32))


def _columns(a_PK):
    """The transpose, as rows in memory: by way of a third axis, because XLA takes a transpose of two for a layout."""
    return a_PK[None].transpose(2, 0, 1).reshape(a_PK.shape[::-1])


# --- the leaves ------------------------------------------------------------------------------------------------------


def gelu(x):
    """x Phi(x), by erf as in BERT: by erfc, as in `jax.nn.gelu`, a CPU takes twice as long."""
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1.0 + jax.lax.erf(x32 * np.float32(np.sqrt(0.5))))).astype(x.dtype)


def _activation(cfg: TransformerConfig):
    return {"gelu": gelu, "gelu_tanh": nn.gelu, "relu": nn.relu}[cfg.activation]


class _Dense(nn.Dense):
    """`nn.Dense` whose gradient comes as one array, see `gradient_whole`."""

    @nn.compact
    def __call__(self, x_XK):
        return gradient_whole(super().__call__(x_XK))


def _dense(cfg: TransformerConfig, features: int, name: str, *, residual: bool = False) -> nn.Dense:
    std = cfg.init_std / np.sqrt(2 * cfg.blocks) if residual and cfg.scaled_residual_init else cfg.init_std
    return _Dense(
        features, dtype=jnp.dtype(cfg.dtype), kernel_init=nn.initializers.normal(std), dot_general=_dot, name=name
    )


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


def _unchanged(name: str, x: jax.Array) -> jax.Array:
    return x


class Attention(nn.Module):
    """Multi-head self-attention; returns its output and what happened inside."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD, mask_BTT, keys_B=None, edit=_unchanged):
        cfg = self.cfg
        split = (*x_BTD.shape[:2], cfg.heads, cfg.head_width)
        q_BTNH, k_BTNH, v_BTNH = (
            edit(name, _dense(cfg, cfg.heads * cfg.head_width, name)(x_BTD).reshape(split)) for name in ("q", "k", "v")
        )
        scores_BNTT = jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH, preferred_element_type=jnp.float32)
        scores_BNTT = scores_BNTT * np.float32(cfg.head_width**-0.5)
        scores_BNTT = jnp.where(mask_BTT[:, None], scores_BNTT, jnp.finfo(jnp.float32).min)
        pattern_BNTT = edit("pattern", jax.nn.softmax(scores_BNTT, axis=-1))
        dropped_BNTT = dropout(pattern_BNTT.astype(cfg.dtype), fold_rows(keys_B, 0), cfg.attention_dropout)
        z_BTNH = edit("z", jnp.einsum("bnts,bsnh->btnh", dropped_BNTT, v_BTNH))
        out_BTD = _dense(cfg, cfg.width, "out", residual=True)(z_BTNH.reshape(*split[:2], -1))
        return out_BTD, {"q": q_BTNH, "k": k_BTNH, "v": v_BTNH, "pattern": pattern_BNTT, "z": z_BTNH}


class Mlp(nn.Module):
    """Two layers with the configured activation between them."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD, edit=_unchanged):
        cfg = self.cfg
        pre_BTF = edit("mlp_pre", _dense(cfg, cfg.mlp_width, "in")(x_BTD))
        post_BTF = edit("mlp_post", _activation(cfg)(pre_BTF))
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
            kernel = token_VD
        else:
            kernel = self.param("kernel", nn.initializers.normal(cfg.init_std), (cfg.width, cfg.vocab_size))
        logits_XV = product(x_XD, kernel.astype(x_XD.dtype), transposed=cfg.tied)
        if cfg.head_bias:
            bias_V = self.param("bias", nn.initializers.zeros, (cfg.vocab_size,))
            bias_XV = jnp.broadcast_to(bias_V.astype(jnp.float32), logits_XV.shape)
            logits_XV = gradient_whole(logits_XV + bias_XV)
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


def block(
    params: Params, x_BTD, mask_BTT, cfg: TransformerConfig, keys_B=None, edit=_unchanged
) -> tuple[jax.Array, Activations]:
    """One block (parameters without the leading axis): the new residual stream and its activations.

    `edit(name, x)` is called on every activation but `resid`, see `forward`.
    """

    def norm(name, x_BTD):
        return apply_norm(params[name], x_BTD, cfg)

    pre, post = cfg.norm == "pre", cfg.norm == "post"
    attn_in_BTD = norm("norm_attn", x_BTD) if pre else x_BTD
    attn_out_BTD, acts = Attention(cfg).apply({"params": params["attn"]}, attn_in_BTD, mask_BTT, keys_B, edit)
    attn_out_BTD = edit("attn_out", attn_out_BTD)
    resid_mid_BTD = edit("resid_mid", x_BTD + dropout(attn_out_BTD, fold_rows(keys_B, 1), cfg.dropout))
    x_BTD = norm("norm_attn", resid_mid_BTD) if post else resid_mid_BTD
    mlp_out_BTD, mlp_acts = Mlp(cfg).apply({"params": params["mlp"]}, norm("norm_mlp", x_BTD) if pre else x_BTD, edit)
    mlp_out_BTD = edit("mlp_out", mlp_out_BTD)
    resid_post_BTD = edit("resid_post", x_BTD + dropout(mlp_out_BTD, fold_rows(keys_B, 2), cfg.dropout))
    x_BTD = norm("norm_mlp", resid_post_BTD) if post else resid_post_BTD
    sums = {"attn_out": attn_out_BTD, "resid_mid": resid_mid_BTD, "mlp_out": mlp_out_BTD, "resid_post": resid_post_BTD}
    return x_BTD, acts | mlp_acts | sums


def blocks(
    params: Params, x_BTD, mask_BTT, cfg: TransformerConfig, keys_B=None, edit: Edit | None = None
) -> tuple[jax.Array, Activations]:
    """Scan over stacked blocks (all of them or any slice of the stack): last residual and activations `[L, ...]`."""
    depth_L = jnp.arange(jax.tree.leaves(params)[0].shape[0])

    def body(x_BTD, layer):
        layer_params, depth = layer
        at = _unchanged if edit is None else lambda name, x: edit(name, depth, x)
        y_BTD, acts = block(layer_params, x_BTD, mask_BTT, cfg, fold_rows(keys_B, depth), at)
        if edit is not None:
            y_BTD = edit("resid", depth + 1, y_BTD)
        return y_BTD, acts | {"resid": y_BTD}

    large = num_params(params) >= LARGE * depth_L.size
    return jax.lax.scan(body, x_BTD, (params, depth_L), unroll=min(UNROLL, depth_L.size) if large else 1)


def forward(
    params: Params,
    ids_BT,
    cfg: TransformerConfig,
    *,
    segment_BT=None,
    position_BT=None,
    type_BT=None,
    keys_B=None,
    edit: Edit | None = None,
) -> tuple[jax.Array, Activations]:
    """The trunk: what the head reads, `[B, T, D]`, and every activation (see `HOOK_NAMES` for names and shapes).

    `segment_BT` marks documents packed in one row by 1, 2, ... and padding by 0 (default: no padding); `position_BT`
    and `type_BT` default to 0, 1, ... and to 0; `keys_B` is one dropout key a row, None for evaluation.
    `acts["resid"]` is the residual stream at depths 0..L, `[M, B, T, D]`; the final norm of pre-LN models is applied
    to the first return value only.

    `edit(name, depth, x)` is called on every activation as it comes into being, and the pass goes on from what it
    returns, which `acts` hold too. `depth` (int32, traced) numbers the block, for `resid` 0..L. Keep shape and dtype.
    `bert6_jax.interventions` makes such functions.
    """
    if segment_BT is None:
        segment_BT = jnp.ones_like(ids_BT)
    embed_keys_B, block_keys_B = fold_rows(keys_B, 0), fold_rows(keys_B, 1)
    x_BTD = embed(params, ids_BT, cfg, position_BT=position_BT, type_BT=type_BT, keys_B=embed_keys_B)
    if edit is not None:
        x_BTD = edit("resid", jnp.int32(0), x_BTD)
    mask_BTT = attention_mask(segment_BT, cfg.causal)
    out_BTD, acts = blocks(params["blocks"], x_BTD, mask_BTT, cfg, block_keys_B, edit)
    acts["resid"] = jnp.concatenate([x_BTD[None], acts["resid"]])
    if cfg.norm == "pre":
        out_BTD = apply_norm(params["final_norm"], out_BTD, cfg)
    return out_BTD, acts


def stream_at(params: Params, ids_BT, cfg: TransformerConfig, position: int, *, segment_BT=None) -> jax.Array:
    """What the head reads at one position, `[B, D]`: `forward(...)[0][:, position]`, computed for that position only.

    The last block is computed for one query: its key vector is turned to what the keys are made of, and its pattern
    mixes that before the values are read, so neither keys nor values are formed. Causal pre-LN models are cut off after
    `position`, an `int` in all pre-LN models. No token types, no dropout, float32. Equal to `forward` up to the order
    of sums, but for padding that no token precedes in a causal pre-LN model, where both are junk.

    Raises:
      ValueError: a post-LN model, token types, dropout, a dtype other than float32; rows that are too long.
      IndexError: a position outside the row (pre-LN models).
    """
    if cfg.norm == "post" or cfg.types or cfg.dtype != "float32" or cfg.dropout or cfg.attention_dropout:
        raise ValueError("stream_at reads float32 models without post-LN, token types and dropout only; use forward")
    if ids_BT.shape[1] > cfg.max_len:
        raise ValueError(f"rows of {ids_BT.shape[1]} tokens do not fit max_len = {cfg.max_len}")
    return (_bare_at if cfg.norm == "none" else _pre_norm_at)(params, ids_BT, cfg, position, segment_BT)


def _pre_norm_at(params: Params, ids_BT, cfg: TransformerConfig, position: int, segment_BT) -> jax.Array:
    """`stream_at` of pre-LN models.

    A norm's scale and bias become part of the layers that read it, so that their gradients come out of the kernel's in
    place of sums over all positions. A training step of 4 blocks of width 64 (39 positions, batch 64) takes 51 ms of
    one CPU core in place of 89, 66 without that.
    """
    position = range(ids_BT.shape[1])[position]
    segment_BT = jnp.ones_like(ids_BT) if segment_BT is None else segment_BT
    if cfg.causal:
        ids_BT, segment_BT = ids_BT[:, : position + 1], segment_BT[:, : position + 1]
    (B, T), inner, scale = ids_BT.shape, cfg.heads * cfg.head_width, np.float32(cfg.head_width**-0.5)
    mask_BTT = attention_mask(segment_BT, cfg.causal)
    plain = nn.LayerNorm(cfg.norm_eps, use_scale=False, use_bias=False, use_fast_variance=False)

    def normed(x_XD):
        return plain.apply({}, x_XD)

    def fold(norm, *readers):
        kernel_DC = jnp.concatenate([reader["kernel"] for reader in readers], axis=1)
        bias_C = jnp.concatenate([reader["bias"] for reader in readers]) + jnp.matmul(norm["bias"], kernel_DC)
        return {"kernel": norm["scale"][:, None] * kernel_DC, "bias": bias_C}

    def attend(scores_BNQT, mask_BQT):
        return jax.nn.softmax(jnp.where(mask_BQT[:, None], scores_BNQT * scale, _MASKED), axis=-1)

    def feed(layer, x_XD):
        pre_XF = _linear(fold(layer["norm_mlp"], layer["mlp"]["in"]), normed(x_XD))
        return x_XD + _linear(layer["mlp"]["out"], _activation(cfg)(pre_XF))

    layers = [jax.tree.map(lambda leaf: leaf[depth], params["blocks"]) for depth in range(cfg.blocks)]  # noqa: B023
    readers = [fold(layer["norm_attn"], *(layer["attn"][name] for name in ("q", "k", "v"))) for layer in layers]
    x_XD = embed(params, ids_BT, cfg).reshape(B * T, cfg.width)
    for layer, reader in zip(layers[:-1], readers[:-1], strict=True):
        read_3BTNH = (x.reshape(B, T, cfg.heads, -1) for x in jnp.split(_linear(reader, normed(x_XD)), 3, axis=-1))
        q_BTNH, k_BTNH, v_BTNH = read_3BTNH
        pattern_BNTT = attend(jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH), mask_BTT)
        z_XC = jnp.einsum("bnts,bsnh->btnh", pattern_BNTT, v_BTNH).reshape(B * T, inner)
        x_XD = feed(layer, x_XD + _linear(layer["attn"]["out"], z_XC))

    seen_BTD, x_BD = normed(x_XD).reshape(B, T, -1), x_XD.reshape(B, T, -1)[:, position]
    q_kernel_DC, k_kernel_DC, v_kernel_DC = jnp.split(readers[-1]["kernel"], 3, axis=1)
    q_bias_C, _, v_bias_C = jnp.split(readers[-1]["bias"], 3)  # the keys' adds the same to all scores of a query
    q_BNH = (jnp.matmul(seen_BTD[:, position], q_kernel_DC) + q_bias_C[None]).reshape(B, cfg.heads, -1)
    query_BND = jnp.einsum("bnh,dnh->bnd", q_BNH, k_kernel_DC.reshape(cfg.width, cfg.heads, -1))
    scores_BNT = jnp.einsum("bnd,btd->bnt", query_BND, seen_BTD)
    pattern_BNT = attend(scores_BNT[:, :, None], mask_BTT[:, position][:, None])[:, :, 0]
    mixed_BND = jnp.einsum("bnt,btd->bnd", pattern_BNT, seen_BTD)
    z_BNH = jnp.einsum("bnd,dnh->bnh", mixed_BND, v_kernel_DC.reshape(cfg.width, cfg.heads, -1))
    z_BC = z_BNH.reshape(B, inner) + v_bias_C[None]
    return apply_norm(params["final_norm"], feed(layers[-1], x_BD + _linear(layers[-1]["attn"]["out"], z_BC)), cfg)


def _linear(layer: Params, x_XC) -> jax.Array:
    return jnp.matmul(x_XC, layer["kernel"]) + layer["bias"][None]


def _bare_at(params: Params, ids_BT, cfg: TransformerConfig, position: int, segment_BT) -> jax.Array:
    """`stream_at` of models without norms.

    Without norms the residual stream is a sum of what was written to it, so every sublayer reads each writer through
    the product of their matrices (virtual weights, Elhage et al., A Mathematical Framework for Transformer Circuits,
    2021): the stream of width D is never formed, and the embedding is read as V + P rows. A training step of the
    compiled counting program (D = 77, 21 positions, batch 96) takes 4.6 ms of one CPU core in place of 16.
    """
    B, T = ids_BT.shape
    inner, scale = cfg.heads * cfg.head_width, np.float32(cfg.head_width**-0.5)
    mask_BTT = None if segment_BT is None and not cfg.causal else attention_mask(
        jnp.ones_like(ids_BT) if segment_BT is None else segment_BT, cfg.causal
    )  # fmt: skip

    def heads(x_XC):
        return x_XC.reshape(B, -1, cfg.heads, cfg.head_width)

    def attend(scores_BNQT, mask_BQT):
        if mask_BQT is not None:
            scores_BNQT = jnp.where(mask_BQT[:, None], scores_BNQT, _MASKED)
        return jax.nn.softmax(scores_BNQT, axis=-1)

    # The stream is wrote_XC @ write_CD + base_TD: what wrote to it, and how, first the tokens; positions and biases are
    # the same in all rows. They are spread over the rows by a product, whose gradient is one too, where a sum over rows
    # would take as long as a sublayer on a CPU.
    ones_B1 = jnp.ones((B, 1), jnp.float32)
    wrote_XC = jax.nn.one_hot(ids_BT.reshape(-1), cfg.vocab_size, dtype=jnp.float32)
    write_CD, base_TD = params["embed"]["token"], params["embed"]["position"][:T]
    for depth in range(cfg.blocks - 1):
        attn, mlp = (jax.tree.map(lambda leaf: leaf[depth], params["blocks"][name]) for name in ("attn", "mlp"))  # noqa: B023
        # q, k, v and the MLP read what is there in one product; the MLP reads this block's attention in another one
        readers = [attn["q"], attn["k"], attn["v"], mlp["in"]]
        read_DC = jnp.concatenate([reader["kernel"] for reader in readers], axis=1)
        read_bias_C = jnp.concatenate([reader["bias"] for reader in readers])
        base_TC = jnp.matmul(base_TD, read_DC) + read_bias_C[None]
        spread_XC = jnp.matmul(ones_B1, base_TC.reshape(1, -1)).reshape(B * T, -1)
        seen_XC = jnp.matmul(wrote_XC, jnp.matmul(write_CD, read_DC)) + spread_XC
        q_XC, k_XC, v_XC, pre_XF = jnp.split(seen_XC, [inner, 2 * inner, 3 * inner], axis=-1)
        scores_BNTT = jnp.einsum("btnh,bsnh->bnts", heads(q_XC), heads(k_XC)) * scale
        z_BTNH = jnp.einsum("bnts,bsnh->btnh", attend(scores_BNTT, mask_BTT), heads(v_XC))
        z_XC = z_BTNH.reshape(-1, inner)
        pre_XF = pre_XF + jnp.matmul(z_XC, jnp.matmul(attn["out"]["kernel"], mlp["in"]["kernel"]))
        pre_XF = pre_XF + jnp.matmul(attn["out"]["bias"], mlp["in"]["kernel"])[None]
        wrote_XC = jnp.concatenate([wrote_XC, z_XC, _activation(cfg)(pre_XF)], axis=-1)
        write_CD = jnp.concatenate([write_CD, attn["out"]["kernel"], mlp["out"]["kernel"]])
        base_TD = base_TD + (attn["out"]["bias"] + mlp["out"]["bias"])[None]

    attn, mlp = (jax.tree.map(lambda leaf: leaf[-1], params["blocks"][name]) for name in ("attn", "mlp"))
    wrote_BTC = wrote_XC.reshape(B, T, -1)
    x_BD = jnp.matmul(wrote_BTC[:, position], write_CD) + base_TD[position][None]
    # One query: its key vector is turned to what the keys' writers wrote, and the pattern mixes that before v reads it.
    # The keys' bias adds the same to all scores of a query, so it is left out, as is its gradient, which is 0.
    q_BNH = _linear(attn["q"], x_BD).reshape(B, cfg.heads, cfg.head_width)
    k_DNH, v_DNH = (attn[name]["kernel"].reshape(cfg.width, cfg.heads, cfg.head_width) for name in ("k", "v"))
    query_BNC = jnp.einsum("bnh,cnh->bnc", q_BNH, jnp.einsum("cd,dnh->cnh", write_CD, k_DNH))
    base_BNT = jnp.einsum("bnh,tnh->bnt", q_BNH, jnp.einsum("td,dnh->tnh", base_TD, k_DNH))
    scores_BNT = (jnp.einsum("bnc,btc->bnt", query_BNC, wrote_BTC) + base_BNT) * scale
    mask_B1T = None if mask_BTT is None else mask_BTT[:, position][:, None]
    pattern_BNT = attend(scores_BNT[:, :, None], mask_B1T)[:, :, 0]
    mixed_BNC = jnp.einsum("bnt,btc->bnc", pattern_BNT, wrote_BTC)
    z_BNH = jnp.einsum("bnc,cnh->bnh", mixed_BNC, jnp.einsum("cd,dnh->cnh", write_CD, v_DNH))
    z_BNH = z_BNH + jnp.einsum("bnt,tnh->bnh", pattern_BNT, jnp.einsum("td,dnh->tnh", base_TD, v_DNH))
    z_BC = z_BNH.reshape(B, inner) + attn["v"]["bias"][None]
    x_BD = x_BD + _linear(attn["out"], z_BC)
    return x_BD + _linear(mlp["out"], _activation(cfg)(_linear(mlp["in"], x_BD)))


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
