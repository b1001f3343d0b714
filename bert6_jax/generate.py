"""Greedy generation from a causal transformer.

The prompts go through `transformer.forward` once; every new token is then one position more, which attends to the keys
and values kept of those before it. All of it is one compiled program, whose loop ends when every row has stopped. The
head runs on the one position that is read.

Letters: N new tokens in shapes `[B, N]`, attention heads in those with H; S stop tokens; 1 a single position.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert6_jax import transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError


class Generated(NamedTuple):
    """New tokens of B rows. Behind a stop token both arrays repeat what they hold at it."""

    ids_BN: jax.Array  # int32
    probability_BN: jax.Array  # float32, the softmax probability of each token when it was chosen


def greedy(
    params: transformer.Params,
    ids_BT: jax.Array,
    length_B: jax.Array,
    cfg: TransformerConfig,
    new_tokens: int,
    stop_ids: Sequence[int] = (),
) -> jax.Array:
    """The most probable continuation, token by token: int32 `[B, new_tokens]`; see `generate`."""
    return generate(params, ids_BT, length_B, cfg, new_tokens, stop_ids).ids_BN


def generate(
    params: transformer.Params,
    ids_BT: jax.Array,
    length_B: jax.Array,
    cfg: TransformerConfig,
    new_tokens: int,
    stop_ids: Sequence[int] = (),
) -> Generated:
    """Greedy continuation with the probability of each token.

    Pure and jit-able with `cfg`, `new_tokens` and `stop_ids` static; compiles once a shape. What stands behind a prompt
    in its row does not matter: a causal model does not look there.

    Args:
      params: of a model with a head.
      ids_BT: int32 prompts from position 0 on; the caller leaves room behind the longest one.
      length_B: int32, tokens of each prompt, 1 or more.
      cfg: of the model, causal.
      new_tokens: N, tokens to generate.
      stop_ids: tokens that end a row, such as [SEP]; the rest of the row repeats it.

    Raises:
      InputError: a model that is not causal or has no head, rows longer than the model's positions, an empty prompt or
        one without room for N tokens behind it (lengths are checked where they are known, so not while tracing).
    """
    if not cfg.causal:
        raise InputError("generation needs a causal model and this one is not; use one with causal=True")
    if cfg.head == "none":
        raise InputError("generation needs a model with a head; this one has head='none'")
    if new_tokens < 1:
        raise InputError(f"new_tokens is {new_tokens}; give 1 or more")
    T = ids_BT.shape[1]
    if T > cfg.max_len:
        raise InputError(f"rows of {T} tokens, the model has {cfg.max_len} positions; give shorter prompts")
    if not isinstance(length_B, jax.core.Tracer) and len(length_B):
        shortest, longest = (int(end) for end in (np.min(length_B), np.max(length_B)))
        if shortest < 1:
            raise InputError(f"row {np.argmin(length_B)}: an empty prompt; give one token or more")
        if longest + new_tokens > T:
            raise InputError(
                f"row {np.argmax(length_B)}: a prompt of {longest} tokens leaves no room for {new_tokens} new ones in "
                f"rows of {T}; give shorter prompts, longer rows or fewer new tokens"
            )
    ids_BT, length_B = jnp.asarray(ids_BT, jnp.int32), jnp.asarray(length_B, jnp.int32)
    return _generate(params, ids_BT, length_B, cfg, new_tokens, tuple(int(i) for i in stop_ids))


@partial(jax.jit, static_argnums=(3, 4, 5))
def _generate(params, ids_BT, length_B, cfg, new_tokens, stop_ids):
    step_N = jnp.arange(new_tokens)
    stop_S = jnp.array(stop_ids, jnp.int32)

    def unfinished(state):
        n, new, done_B, *_ = state
        return (n < new_tokens) & ~done_B.all()

    def one_token(state):
        n, new, done_B, out_BD, cache = state
        logits_BV = transformer.head(params, out_BD, cfg)
        next_B = logits_BV.argmax(-1).astype(jnp.int32)
        probability_B = jnp.exp(logits_BV.max(-1) - jax.nn.logsumexp(logits_BV, axis=-1))
        # Written from here to the end, so that a row that stops is filled already.
        fill_BN = ~done_B[:, None] & (step_N >= n)[None]
        new = Generated(
            jnp.where(fill_BN, next_B[:, None], new.ids_BN),
            jnp.where(fill_BN, probability_B[:, None], new.probability_BN),
        )
        done_B = done_B | (next_B[:, None] == stop_S[None]).any(-1)
        return n + 1, new, done_B, *_one_position(params, next_B, length_B + n, cache, cfg)

    prompt_BTD, acts = transformer.forward(params, ids_BT, cfg)
    out_BD = jnp.take_along_axis(prompt_BTD, length_B[:, None, None] - 1, axis=1)[:, 0]
    shape = (len(ids_BT), new_tokens)
    new = Generated(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
    start = (jnp.int32(0), new, jnp.zeros(shape[0], bool), out_BD, (acts["k"], acts["v"]))
    return jax.lax.while_loop(unfinished, one_token, start)[1]


def _one_position(params, id_B, at_B, cache, cfg):
    """`transformer.forward` at one position of each row: what the head reads there `[B, D]`, and the cache with it.

    `cache` holds the keys and values of all blocks, `[L, B, T, N, H]`; what it has behind the position is not read.
    """
    position_T = jnp.arange(cache[0].shape[2])
    here_BT11 = (position_T[None] == at_B[:, None])[:, :, None, None]
    seen_BT = position_T[None] <= at_B[:, None]
    pre, post = cfg.norm == "pre", cfg.norm == "post"

    def block(x_B1D, layer):
        layer, k_BTNH, v_BTNH = layer
        attn = layer["attn"]

        def dense(name, y_X):
            return y_X @ attn[name]["kernel"].astype(y_X.dtype) + attn[name]["bias"].astype(y_X.dtype)[None, None]

        def norm(name, y_B1D, wanted):
            return transformer.apply_norm(layer[name], y_B1D, cfg) if wanted else y_B1D

        attn_in_B1D = norm("norm_attn", x_B1D, pre)
        q_BNH, k_BNH, v_BNH = (
            dense(name, attn_in_B1D).reshape(-1, cfg.heads, cfg.head_width) for name in ("q", "k", "v")
        )
        k_BTNH = jnp.where(here_BT11, k_BNH[:, None], k_BTNH)
        v_BTNH = jnp.where(here_BT11, v_BNH[:, None], v_BTNH)
        scores_BNT = jnp.einsum("bnh,bsnh->bns", q_BNH, k_BTNH, preferred_element_type=jnp.float32)
        scores_BNT = scores_BNT * np.float32(cfg.head_width**-0.5)
        pattern_BNT = jax.nn.softmax(jnp.where(seen_BT[:, None], scores_BNT, jnp.finfo(jnp.float32).min), axis=-1)
        z_BNH = jnp.einsum("bns,bsnh->bnh", pattern_BNT.astype(cfg.dtype), v_BTNH)
        x_B1D = norm("norm_attn", x_B1D + dense("out", z_BNH.reshape(len(z_BNH), 1, -1)), post)
        mlp_out_B1D, _ = transformer.Mlp(cfg).apply({"params": layer["mlp"]}, norm("norm_mlp", x_B1D, pre))
        return norm("norm_mlp", x_B1D + mlp_out_B1D, post), (k_BTNH, v_BTNH)

    x_B1D = transformer.embed(params, id_B[:, None], cfg, position_BT=at_B[:, None])
    x_B1D, cache = jax.lax.scan(block, x_B1D, (params["blocks"], *cache))
    if pre:
        x_B1D = transformer.apply_norm(params["final_norm"], x_B1D, cfg)
    return x_B1D[:, 0], cache
