"""Selections and sparse products against sorting and dense products in NumPy."""

from __future__ import annotations

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import sparse

largest = jax.jit(sparse.batch_largest)
top = jax.jit(sparse.top_latents, static_argnums=1)


def rows(kind, B, F, seed=0):
    """Values with and without ties: normal, few integers, bfloat16's 8 bits, all equal, all negative, all -inf."""
    x_BF = np.random.default_rng(seed).normal(size=(B, F)).astype(np.float32)
    return {
        "normal": x_BF,
        "integers": np.round(2 * x_BF),
        "bfloat16": np.asarray(jnp.asarray(x_BF).astype(jnp.bfloat16).astype(jnp.float32)),
        "equal": np.full_like(x_BF, 0.5),
        "negative": -np.abs(x_BF) - 1,
        "masked": np.where(np.arange(F) % 5 == 0, x_BF, -np.inf).astype(np.float32),
    }[kind]


KINDS = ("normal", "integers", "bfloat16", "equal", "negative", "masked")


# --- the largest of a row ---


@pytest.mark.parametrize(
    "F, K", [(1, 1), (7, 3), (8, 8), (12, 2), (16, 1), (64, 4), (96, 5), (128, 1), (256, 32), (1024, 2), (2048, 2)]
)
def test_top_latents_are_the_largest(F, K):
    """Values as sorted, indices distinct and where the values are: through every group size, 1 to 32."""
    for kind in KINDS:
        x_BF = rows(kind, 5, F, seed=F + K)
        value_BK, index_BK = map(np.asarray, top(x_BF, K))
        np.testing.assert_array_equal(value_BK, -np.sort(-x_BF, axis=1)[:, :K], err_msg=kind)
        np.testing.assert_array_equal(np.take_along_axis(x_BF, index_BK, 1), value_BK, err_msg=kind)
        assert all(len(set(row)) == K for row in index_BK), kind


def test_top_latents_in_a_bank():
    x_GBF = np.stack([rows(kind, 3, 64) for kind in KINDS])
    value_GBK, index_GBK = jax.vmap(lambda x: sparse.top_latents(x, 4))(x_GBF)
    np.testing.assert_array_equal(value_GBK, -np.sort(-x_GBF, axis=-1)[..., :4])
    np.testing.assert_array_equal(np.take_along_axis(x_GBF, np.asarray(index_GBK), -1), value_GBK)


# --- the largest of a batch ---


def by_sorting(x_BF, k):
    """Rank everything, largest first, of equal ones the first rows (and latents) first; then take the positive ones."""
    order = np.argsort(-x_BF.ravel(), kind="stable")[: k * len(x_BF)]
    keep = np.zeros(x_BF.size, bool)
    keep[order] = True
    return keep.reshape(x_BF.shape) & (x_BF > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_largest_is_a_sort_of_the_batch(kind):
    """k is data: one program for all of them, from none to everything."""
    for seed in range(3):
        x_BF = rows(kind, 6, 9, seed)
        for k in (0, 1, 2, 4, 9):
            keep_BF = np.asarray(largest(x_BF, jnp.int32(k)))
            np.testing.assert_array_equal(keep_BF, by_sorting(x_BF, k), err_msg=f"{seed=} {k=}")
            assert keep_BF.sum() == min(6 * k, (x_BF > 0).sum())


def test_batch_largest_breaks_ties_by_the_order_of_rows():
    keep_BF = np.asarray(largest(np.full((4, 6), 3.0, np.float32), jnp.int32(2)))
    np.testing.assert_array_equal(keep_BF, [[True] * 6, [True] * 2 + [False] * 4, [False] * 6, [False] * 6])


def test_batch_largest_at_the_ends_of_floating_point():
    x_BF = np.array([[np.inf, 1e-37, 0.0, -0.0], [-np.inf, 3e38, 2e-37, -1.0]], np.float32)
    for k, kept in ((1, [[1, 0, 0, 0], [0, 1, 0, 0]]), (2, [[1, 1, 0, 0], [0, 1, 1, 0]]), (4, x_BF > 0)):
        np.testing.assert_array_equal(largest(x_BF, jnp.int32(k)), np.array(kept, bool))


def test_batch_largest_in_a_bank_with_a_k_each():
    x_GBF = np.stack([rows(kind, 5, 8) for kind in ("integers", "normal", "negative", "equal")])
    k_G = np.array([1, 3, 2, 8], np.int32)
    keep_GBF = jax.jit(jax.vmap(sparse.batch_largest))(x_GBF, k_G)
    np.testing.assert_array_equal(keep_GBF, [by_sorting(x, k) for x, k in zip(x_GBF, k_G, strict=True)])


# --- the largest of a batch over heads ---


over_heads = jax.jit(sparse.largest_over_heads, static_argnums=3)
SMALLEST = np.array(1, np.int32).view(np.float32)


def by_sorting_heads(pre_BF, norm_HF, k):
    """The (k B H)-th largest of all products, or the smallest positive float."""
    wanted = k * len(pre_BF) * len(norm_HF)
    ranked = -np.sort(-(np.maximum(pre_BF, 0)[:, None] * norm_HF[None]).ravel())
    return np.maximum(ranked[wanted - 1], SMALLEST) if wanted <= ranked.size else SMALLEST


@pytest.mark.parametrize("norms", ["uniform", "integers", "equal", "one head", "none in half"])
@pytest.mark.parametrize("kind", KINDS)
def test_largest_over_heads_is_a_sort(kind, norms):
    """Bit for bit with ties, few positive values, k traced, and k_max below (candidates alone) and above F / H."""
    H = 3
    for seed in range(3):
        pre_BF, rng = rows(kind, 6, 20, seed), np.random.default_rng(seed + 9)
        norm_HF = {
            "uniform": rng.uniform(0, 2, (H, 20)),
            "integers": rng.integers(0, 3, (H, 20)),
            "equal": np.ones((H, 20)),
            "one head": rng.uniform(0.5, 1, (H, 20)) * (np.arange(H) == 1)[:, None],
            "none in half": rng.uniform(0, 2, (H, 20)) * (rng.random((H, 20)) < 0.5),
        }[norms].astype(np.float32)
        for k_max in (2, 6, 20):
            for k in (1, 2, 5, 20):
                if k <= k_max:
                    level = np.asarray(over_heads(pre_BF, norm_HF, jnp.int32(k), k_max))
                    np.testing.assert_array_equal(
                        level.view(np.int32), by_sorting_heads(pre_BF, norm_HF, k).view(np.int32)
                    )


def test_largest_over_heads_where_most_candidates_tie():
    """More entries at the level t of the first search than the candidates have room for, and one above."""
    pre_BF, norm_HF = np.ones((4, 40), np.float32), np.ones((2, 40), np.float32)
    pre_BF[3, 39] = 5.0
    assert [float(over_heads(pre_BF, norm_HF, k, 2)) for k in (1, 2)] == [1.0, 1.0]
    norm_HF[1] = 0.5
    assert float(over_heads(pre_BF, norm_HF, 2, 2)) == 1.0
    assert float(over_heads(pre_BF[:, 35:], norm_HF[:, 35:], 3, 3)) == 0.5


def test_largest_over_heads_in_a_bank_with_a_k_each_and_no_gradient():
    pre_GBF = np.stack([rows(kind, 5, 24) for kind in ("integers", "normal", "masked", "equal")])
    norm_GHF = np.random.default_rng(1).uniform(0, 2, (4, 3, 24)).astype(np.float32)
    k_G = np.array([1, 3, 2, 3], np.int32)
    level_G = jax.jit(jax.vmap(lambda *each: sparse.largest_over_heads(*each, 3)))(pre_GBF, norm_GHF, k_G)
    expected_G = [by_sorting_heads(*each) for each in zip(pre_GBF, norm_GHF, k_G, strict=True)]
    np.testing.assert_array_equal(level_G, np.array(expected_G, np.float32))
    slopes = jax.grad(lambda p, n: sparse.largest_over_heads(p, n, 2, 3), argnums=(0, 1))(pre_GBF[1], norm_GHF[1])
    assert not any(np.asarray(slope).any() for slope in slopes)


def test_largest_over_heads_makes_no_array_of_heads_rows_and_latents():
    """Whatever k is: nothing that is computed is larger than [B, F]."""

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from sizes(inner)

    B, F, H = 8, 64, 16
    for k in (1, 3, 64):
        traced = jax.make_jaxpr(lambda p, n, k=k: sparse.largest_over_heads(p, n, k, k))(
            jnp.ones((B, F)), jnp.ones((H, F))
        )
        assert max(sizes(traced.jaxpr)) <= max(B * F, H * F)


# --- products ---


@pytest.fixture(scope="module")
def sparse_codes():
    rng = np.random.default_rng(3)
    index_BK = np.stack([rng.permutation(10)[:3] for _ in range(7)]).astype(np.int32)
    z_BK = rng.normal(size=(7, 3)).astype(np.float32)
    z_BK[2] = 0.0  # a row without codes
    return z_BK, index_BK


def dense(z_BK, index_BK, F):
    z_BF = np.zeros((len(z_BK), F))
    for b, k in np.ndindex(*z_BK.shape):
        z_BF[b, index_BK[b, k]] += z_BK[b, k]
    return z_BF


def test_scattered_codes_are_dense(sparse_codes):
    np.testing.assert_array_equal(sparse.scatter_codes(*sparse_codes, 10), dense(*sparse_codes, 10))


@pytest.mark.parametrize("kept", [3, 1])
def test_decoding_by_rows_is_the_dense_product(sparse_codes, kept):
    """Values, and gradients for codes and weights against the dense formula's, by hand."""
    z_BK, index_BK = (x[:, :kept] for x in sparse_codes)
    rng = np.random.default_rng(4)
    W_FD, g_BD = (rng.normal(size=shape).astype(np.float32) for shape in ((10, 4), (7, 4)))

    @jax.jit
    def run(z_BK, W_FD):
        out_BD, pull = jax.vjp(lambda z, W: sparse.decode_rows(z, jnp.asarray(index_BK), W), z_BK, W_FD)
        return out_BD, *pull(jnp.asarray(g_BD))

    out_BD, dz_BK, dW_FD = run(z_BK, W_FD)
    z_BF = dense(z_BK, index_BK, 10)
    np.testing.assert_allclose(out_BD, z_BF @ W_FD, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dz_BK, np.take_along_axis(g_BD @ W_FD.T, index_BK, 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dW_FD, z_BF.T @ g_BD, rtol=1e-5, atol=1e-6)


def test_the_attached_encoder_has_the_dense_gradient(sparse_codes):
    """d/dW, d/db, d/dx of the K columns of x W^T + b, by hand; the values pass through as they are."""
    g_BK, index_BK = sparse_codes
    rng = np.random.default_rng(5)
    W_FD, b_F, x_BD = (rng.normal(size=shape).astype(np.float32) for shape in ((10, 4), (10,), (7, 4)))
    value_BK = np.take_along_axis(x_BD @ W_FD.T + b_F, index_BK, 1)

    @jax.jit
    def run(*arrays):
        kept = jnp.asarray(value_BK), jnp.asarray(index_BK)
        out_BK, pull = jax.vjp(lambda W, b, x: sparse.attach_encoder(*kept, W, b, x), *arrays)
        return out_BK, *pull(jnp.asarray(g_BK))

    out_BK, dW_FD, db_F, dx_BD = run(W_FD, b_F, x_BD)
    g_BF = dense(g_BK, index_BK, 10)
    np.testing.assert_array_equal(out_BK, value_BK)
    np.testing.assert_allclose(dW_FD, g_BF.T @ x_BD, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(db_F, g_BF.sum(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx_BD, g_BF @ W_FD, rtol=1e-5, atol=1e-6)
