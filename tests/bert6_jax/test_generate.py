"""Greedy generation against a loop over whole forward passes; padding, rows, stops, bad input."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax import transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError
from bert6_jax.generate import generate, greedy

B, T, N = 5, 12, 5
PRE = TransformerConfig(
    vocab_size=30, width=16, blocks=2, heads=2, head_width=8, mlp_width=32, max_len=T, types=0, norm="pre",
    causal=True, head="linear", tied=False, head_bias=False, init_std=0.5,
)  # fmt: skip
VARIANTS = {
    "pre": PRE,
    "post": dataclasses.replace(PRE, norm="post", types=2, head="mlm", tied=True, head_bias=True, dropout=0.1),
    "none": dataclasses.replace(PRE, norm="none", activation="relu", head_width=5, init_std=0.3),
}
LENGTH_B = np.array([1, 7, 3, 6, 2], np.int32)
forward = jax.jit(transformer.forward, static_argnums=2)


def make(cfg, seed=2):
    """Random parameters from NumPy, none at its initial value; small biases, which would choose the token alone."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: transformer.init(key, cfg), jax.random.key(0))

    def fresh(path, leaf):
        name = path[-1].key
        std = cfg.init_std * (0.2 if name == "bias" else 1)
        return jnp.asarray(rng.normal(name == "scale", std, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(fresh, shapes)


def rows(seed=0):
    return np.random.default_rng(seed).integers(0, 30, (B, T)).astype(np.int32)


def brute_force(params, ids_BT, cfg, stop_ids=()):
    """One row and one token at a time, whole forward passes, the softmax in NumPy."""
    new_BN, probability_BN, margin = np.zeros((B, N), np.int32), np.zeros((B, N)), np.inf
    for b in range(B):
        row_T = np.full(T, 29, np.int32)
        row_T[: LENGTH_B[b]] = ids_BT[b, : LENGTH_B[b]]
        for n in range(N):
            end = LENGTH_B[b] + n
            out_BTD, _ = forward(params, row_T[None], cfg, segment_BT=(np.arange(T) < end)[None].astype(np.int32))
            logits_V = np.asarray(transformer.head(params, out_BTD[0, end - 1], cfg), np.float64)
            p_V = np.exp(logits_V - logits_V.max())
            p_V /= p_V.sum()
            new_BN[b, n:], probability_BN[b, n:] = p_V.argmax(), p_V.max()
            margin = min(margin, *np.diff(np.sort(logits_V)[-2:]))
            if p_V.argmax() in stop_ids:
                break
            row_T[end] = p_V.argmax()
    return new_BN, probability_BN, margin


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS.keys())
def test_against_brute_force(cfg):
    params, ids_BT = make(cfg), rows()
    new_BN, probability_BN, margin = brute_force(params, ids_BT, cfg)
    assert margin > 1e-4 and len(np.unique(new_BN)) > 4  # no ties, and something to tell
    found = generate(params, ids_BT, LENGTH_B, cfg, N)
    assert found.ids_BN.dtype == jnp.int32
    np.testing.assert_array_equal(found.ids_BN, new_BN)
    np.testing.assert_allclose(found.probability_BN, probability_BN, rtol=1e-4)
    # Behind the prompts there may be anything, and rows do not see each other.
    behind = np.arange(T)[None] >= LENGTH_B[:, None]
    np.testing.assert_array_equal(greedy(params, np.where(behind, rows(1), ids_BT), LENGTH_B, cfg, N), new_BN)
    others = rows(2)
    others[3] = ids_BT[3]
    np.testing.assert_array_equal(greedy(params, others, LENGTH_B, cfg, N)[3], new_BN[3])
    assert (np.asarray(greedy(params, others, LENGTH_B, cfg, N))[:3] != new_BN[:3]).any()


def test_stops():
    params, ids_BT = make(PRE), rows()
    free_BN, _, _ = brute_force(params, ids_BT, PRE)
    stops = (int(free_BN[0, 2]), int(free_BN[1, 0]))
    new_BN, probability_BN, _ = brute_force(params, ids_BT, PRE, stops)
    assert (new_BN != free_BN).any() and any(set(row).isdisjoint(stops) for row in new_BN)
    found = generate(params, ids_BT, LENGTH_B, PRE, N, stops)
    np.testing.assert_array_equal(found.ids_BN, new_BN)
    np.testing.assert_allclose(found.probability_BN, probability_BN, rtol=1e-4)
    for row in np.asarray(found.ids_BN):
        hits = np.flatnonzero(np.isin(row, stops))
        assert not hits.size or (row[hits[0] :] == row[hits[0]]).all()
    # All rows stop at once: the loop ends after one token and the rest is filled.
    every = tuple(range(30))
    np.testing.assert_array_equal(greedy(params, ids_BT, LENGTH_B, PRE, N, every), np.tile(free_BN[:, :1], (1, N)))


def test_jits_and_maps_over_models():
    """A bank of models gives what each gives alone, also where they stop after different numbers of tokens."""
    banks = [make(PRE, seed) for seed in (1, 2)]
    alone = [np.asarray(greedy(params, rows(), LENGTH_B, PRE, N)) for params in banks]
    stop = (int(alone[0][0, 2]),)
    alone = [np.asarray(greedy(params, rows(), LENGTH_B, PRE, N, stop)) for params in banks]
    bank = jax.tree.map(lambda *leaves: jnp.stack(leaves), *banks)
    mapped = jax.jit(jax.vmap(lambda p, ids, length: greedy(p, ids, length, PRE, N, stop), in_axes=(0, None, None)))
    np.testing.assert_array_equal(mapped(bank, rows(), LENGTH_B), np.stack(alone))


def test_bfloat16_runs():
    cfg = dataclasses.replace(PRE, dtype="bfloat16")
    found = generate(make(cfg), rows(), LENGTH_B, cfg, 2)
    assert found.ids_BN.shape == (B, 2) and found.probability_BN.dtype == jnp.float32
    assert ((found.probability_BN > 1 / 30) & (found.probability_BN <= 1.001)).all()


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"cfg": dataclasses.replace(PRE, causal=False)}, "needs a causal model"),
        ({"cfg": dataclasses.replace(PRE, head="none")}, "needs a model with a head"),
        ({"cfg": dataclasses.replace(PRE, max_len=8)}, "rows of 12 tokens, the model has 8 positions"),
        ({"new_tokens": 0}, "new_tokens is 0; give 1 or more"),
        ({"new_tokens": 6}, "row 1: a prompt of 7 tokens leaves no room for 6 new ones in rows of 12"),
        ({"length_B": np.array([1, 2, 0, 1, 1])}, "row 2: an empty prompt"),
    ],
)
def test_bad_input(changes, line):
    arguments = {"params": {}, "ids_BT": rows(), "length_B": LENGTH_B, "cfg": PRE, "new_tokens": N} | changes
    with pytest.raises(InputError, match=line):
        greedy(**arguments)
