"""Similarity measures against direct computations on the tokens, and their invariances."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import pdist

from bert6_jax import similarity
from bert6_jax.errors import InputError

N, D, E = 60, 5, 4


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, N, D)) @ rng.normal(size=(2, D, D)) + 3.0
    y = np.stack([x[0] @ rng.normal(size=(D, E)) + rng.normal(size=(N, E)), rng.normal(size=(N, E)), x[1, :, :E]])
    return x.astype(np.float32), y.astype(np.float32)


def centred(v):
    return v - v.mean(0)


def pairwise(fn, x, y):
    return np.array([[fn(a.astype(np.float64), b.astype(np.float64)) for b in y] for a in x])


def direct_cka(a, b):
    k, other = (centred(v) @ centred(v).T for v in (a, b))
    return (k * other).sum() / np.sqrt((k * k).sum() * (other * other).sum())


def direct_debiased_cka(a, b):
    def u_centred(v):
        k = v @ v.T
        np.fill_diagonal(k, 0.0)
        n = len(k)
        k = k - k.sum(0) / (n - 2) - k.sum(1)[:, None] / (n - 2) + k.sum() / ((n - 1) * (n - 2))
        np.fill_diagonal(k, 0.0)
        return k

    k, other = u_centred(a), u_centred(b)
    return (k * other).sum() / np.sqrt((k * k).sum() * (other * other).sum())


def direct_cca(a, b):
    qa, qb = (np.linalg.qr(centred(v))[0] for v in (a, b))
    return np.linalg.svd(qa.T @ qb, compute_uv=False)


def direct_svcca(a, b, keep=0.9):
    def truncated(v):
        u, s, _ = np.linalg.svd(centred(v), full_matrices=False)
        rank = np.searchsorted(np.cumsum(s**2), keep * (s**2).sum()) + 1
        return u[:, :rank]

    return np.linalg.svd(truncated(a).T @ truncated(b), compute_uv=False).mean()


def direct_pwcca(a, b):
    a, b = centred(a), centred(b)
    qa, ra = np.linalg.qr(a)
    u, rho, _ = np.linalg.svd(qa.T @ np.linalg.qr(b)[0], full_matrices=False)
    h = qa @ u  # canonical variates, orthonormal
    weight = np.abs(h.T @ a).sum(1)
    return (weight * rho).sum() / weight.sum()


def direct_procrustes(a, b):
    a, b = (centred(v) / np.linalg.norm(centred(v)) for v in (a, b))
    width = max(a.shape[1], b.shape[1])
    a, b = (np.pad(v, ((0, 0), (0, width - v.shape[1]))) for v in (a, b))
    u, _, vt = np.linalg.svd(a.T @ b)
    return np.linalg.norm(a @ (u @ vt) - b)


def direct_rsa(a, b):
    return np.corrcoef(pdist(a, "sqeuclidean"), pdist(b, "sqeuclidean"))[0, 1]


MEASURES = {
    "linear_cka": (similarity.linear_cka, direct_cka),
    "debiased_cka": (similarity.debiased_cka, direct_debiased_cka),
    "cca": (lambda m: similarity.cca(m).mean, lambda a, b: direct_cca(a, b).mean()),
    "svcca": (lambda m: similarity.cca(m, keep=0.9).mean, direct_svcca),
    "pwcca": (lambda m: similarity.cca(m).weighted, direct_pwcca),
    "procrustes": (similarity.procrustes, direct_procrustes),
    "rsa": (similarity.rsa, direct_rsa),
}


@pytest.mark.parametrize("name", MEASURES)
def test_measures_from_sums_equal_those_from_the_tokens(data, name):
    streaming, direct = MEASURES[name]
    np.testing.assert_allclose(streaming(similarity.moments_of(*data)), pairwise(direct, *data), rtol=0, atol=2e-4)


def test_any_batching_and_padding_give_the_same_sums(data):
    x, y = data
    whole = similarity.moments_of(x, y)
    parts = None
    for begin, size in ((0, 7), (7, 16), (23, 16), (39, 16), (55, 5)):
        padded = [np.full((v.shape[0], 16, v.shape[2]), np.nan, np.float32) for v in (x, y)]
        for v, p in zip((x, y), padded, strict=True):
            p[:, :size] = v[:, begin : begin + size]
        valid = jnp.arange(16) < size
        if parts is None:
            parts = similarity.start(*map(jnp.asarray, padded), valid)
        parts = similarity.update(parts, *map(jnp.asarray, padded), valid)
    assert float(parts.count) == N
    for streaming, _ in MEASURES.values():
        np.testing.assert_allclose(streaming(parts), streaming(whole), rtol=0, atol=2e-4)
    for a, b in zip(similarity.means(parts), (x.mean(1), y.mean(1)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_outlier_dimensions_do_not_cancel(data):
    x, y = data
    shifted = x.copy()
    shifted[:, :, 0] += 3_000.0
    for name in ("linear_cka", "debiased_cka", "rsa", "procrustes"):
        streaming = MEASURES[name][0]
        found, expected = streaming(similarity.moments_of(shifted, y)), streaming(similarity.moments_of(x, y))
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)


def test_invariances():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1, 200, 6)).astype(np.float32)
    q = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    rotated = (x @ q * 2.5 + 1.0).astype(np.float32)
    linear = (x @ rng.normal(size=(6, 6)) + 1.0).astype(np.float32)
    both = similarity.moments_of(x, np.concatenate([rotated, linear]))
    assert similarity.linear_cka(both)[0, 0] == pytest.approx(1, abs=1e-4)
    assert similarity.debiased_cka(both)[0, 0] == pytest.approx(1, abs=1e-4)
    assert similarity.procrustes(both)[0, 0] == pytest.approx(0, abs=2e-2)
    assert similarity.rsa(both)[0, 0] == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(similarity.cca(both).mean, 1, atol=1e-4)
    np.testing.assert_allclose(similarity.cca(both).weighted, 1, atol=1e-4)
    assert similarity.linear_cka(both)[0, 1] < 0.99 and similarity.procrustes(both)[0, 1] > 0.05


def test_debiased_cka_of_independent_representations_is_zero_and_biased_is_not():
    rng = np.random.default_rng(2)
    n, d = 100, 50
    x, y = rng.normal(size=(2, 8, n, d)).astype(np.float32)
    moments = similarity.moments_of(x, y)
    assert np.abs(similarity.debiased_cka(moments)).mean() < 0.05
    assert similarity.linear_cka(moments).mean() == pytest.approx(d / (n + d), abs=0.03)


def test_procrustes_keeps_the_triangle_inequality():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(6, 40, 4)).astype(np.float32)
    x[1] = x[0] + 0.1 * x[1]
    d = similarity.procrustes(similarity.moments_of(x, x))
    np.testing.assert_allclose(d, d.T, atol=1e-3)
    assert all(d[i, k] <= d[i, j] + d[j, k] + 1e-3 for i, j, k in itertools.permutations(range(6), 3))


def test_cosines_raw_and_centred(data):
    x, _ = data
    moments = similarity.moments_of(x, x[::-1])
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    expected = np.einsum("ind,jnd->ij", unit, unit[::-1]) / N
    np.testing.assert_allclose(similarity.mean_cosine(moments), expected, atol=1e-5)
    assert similarity.mean_cosine(similarity.moments_of(x, x))[0, 0] == pytest.approx(1, abs=1e-5)
    mean_x, mean_y = similarity.means(moments)
    found = similarity.centred_cosine(
        jnp.asarray(x), jnp.asarray(x[::-1]), jnp.asarray(mean_x, jnp.float32), jnp.asarray(mean_y, jnp.float32)
    )
    c = x - x.mean(1, keepdims=True)
    c /= np.linalg.norm(c, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, np.einsum("ind,jnd->ijn", c, c[::-1]), atol=1e-4)


def test_a_ridge_shrinks_the_correlations_and_few_tokens_need_one():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(2, 1, 12, 10)).astype(np.float32)
    moments = similarity.moments_of(x, y)
    assert similarity.cca(moments).mean[0, 0] > 0.9  # nearly as many dimensions as tokens: anything correlates
    assert similarity.cca(moments, ridge=1.0).mean[0, 0] < 0.6


def test_constant_representations_have_no_similarity():
    x = np.ones((1, 10, 3), np.float32)
    y = np.random.default_rng(5).normal(size=(1, 10, 3)).astype(np.float32)
    moments = similarity.moments_of(x, y)
    for name, (streaming, _) in MEASURES.items():
        assert np.isnan(streaming(moments)).all(), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: similarity.moments_of(np.ones((1, 4, 2)), np.ones((1, 5, 2))), "of the same tokens"),
        (lambda: similarity.moments_of(np.ones((4, 2)), np.ones((4, 2))), r"give \[layers, tokens, width\]"),
        (lambda: similarity.debiased_cka(similarity.moments_of(*np.ones((2, 1, 3, 2)))), "3 tokens are too few"),
        (lambda: similarity.cca(similarity.moments_of(*np.ones((2, 1, 3, 2))), keep=1.5), "keep is 1.5"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_update_jits_and_differentiates(data):
    x, y = map(jnp.asarray, data)
    valid = jnp.ones(N, bool)
    empty = similarity.start(x, y, valid)
    gradient = jax.grad(lambda x: similarity.update(empty, x, y, valid).norm_x.sum())(x)
    np.testing.assert_allclose(gradient, 2 * (x - empty.shift_x[:, None]), atol=1e-3)
