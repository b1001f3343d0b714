"""Similarity of representations from streaming sums: cosine, CKA, CCA, Procrustes, RSA, of all layer pairs at once.

Two stacks of representations of the same N tokens, x [M, N, D] and y [J, N, E] (layers of two models, say), are read
batch by batch into `Moments`; every measure of every pair (i, j) is then a function of these sums, without the tokens:

    moments = update(moments, x_MND, y_JNE, valid_N)      jitted, any number of times, any batching
    linear_cka(moments)                                   [M, J] float64

Sums are taken around the mean of the first batch (BERT's outlier dimensions would cancel in float32 otherwise); all
measures here are blind to such a shift, except the raw cosine, which is summed on its own. What follows the sums runs
once, on the host in float64. Merge `Moments` of several devices or shards by adding their leaves (same shift).

Letters beside those of the package: M, J layers of x and y, E width of y, N tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert6_jax.errors import InputError


class Moments(NamedTuple):
    """Sums over tokens, float32; x and y are shifted by `shift_x`, `shift_y` first (but not in `cosine`)."""

    count: jax.Array  # tokens
    shift_x: jax.Array  # [M, D]
    shift_y: jax.Array  # [J, E]
    x: jax.Array  # [M, D] sum x
    y: jax.Array  # [J, E]
    xx: jax.Array  # [M, D, D] sum x x^T
    yy: jax.Array  # [J, E, E]
    xy: jax.Array  # [M, J, D, E] sum x y^T
    norm_x: jax.Array  # [M] sum |x|^2
    norm_y: jax.Array  # [J]
    norm_xx: jax.Array  # [M] sum |x|^4
    norm_yy: jax.Array  # [J]
    norm_xy: jax.Array  # [M, J] sum |x|^2 |y|^2
    x_norm_x: jax.Array  # [M, D] sum |x|^2 x
    y_norm_y: jax.Array  # [J, E]
    y_norm_x: jax.Array  # [M, J, E] sum |x|^2 y
    x_norm_y: jax.Array  # [M, J, D] sum |y|^2 x
    cosine: jax.Array  # [M, J] sum cos(x, y); NaN where the widths differ


def _dot(spec: str, *operands) -> jax.Array:
    # The default precision of accelerators (TF32, bfloat16) is too coarse for statistics.
    return jnp.einsum(spec, *operands, precision=jax.lax.Precision.HIGHEST)


def _zeroed(x_MND, valid_N):
    """Float32, and nothing of what stands in tokens that do not count (it may be NaN)."""
    return jnp.where(valid_N[None, :, None], x_MND.astype(jnp.float32), 0.0)


def _mean(x_MND, valid_N):
    return _zeroed(x_MND, valid_N).sum(1) / jnp.maximum(valid_N.sum(), 1).astype(jnp.float32)


def start(x_MND: jax.Array, y_JNE: jax.Array, valid_N: jax.Array) -> Moments:
    """Empty sums whose shift is the mean of this batch's valid tokens; `update` with the batch comes next."""
    if x_MND.ndim != 3 or y_JNE.ndim != 3 or x_MND.shape[1] != y_JNE.shape[1]:
        raise InputError(
            f"representations of shapes {x_MND.shape} and {y_JNE.shape}; give [layers, tokens, width] "
            "of the same tokens"
        )
    (M, _, D), (J, _, E) = x_MND.shape, y_JNE.shape
    shapes = (
        (), (M, D), (J, E), (M, D), (J, E), (M, D, D), (J, E, E), (M, J, D, E), (M,), (J,), (M,), (J,), (M, J), (M, D),
        (J, E), (M, J, E), (M, J, D), (M, J),
    )  # fmt: skip
    empty = Moments(*(jnp.zeros(shape, jnp.float32) for shape in shapes))
    return empty._replace(shift_x=_mean(x_MND, valid_N), shift_y=_mean(y_JNE, valid_N))


@jax.jit
def update(moments: Moments, x_MND: jax.Array, y_JNE: jax.Array, valid_N: jax.Array) -> Moments:
    """Add a batch of tokens; those with `valid_N` False (padding) count nowhere."""
    weight_N = valid_N.astype(jnp.float32)
    raw_x, raw_y = _zeroed(x_MND, valid_N), _zeroed(y_JNE, valid_N)
    x = (raw_x - moments.shift_x[:, None]) * weight_N[None, :, None]
    y = (raw_y - moments.shift_y[:, None]) * weight_N[None, :, None]
    p_MN, q_JN = (x * x).sum(-1), (y * y).sum(-1)
    if x.shape[-1] == y.shape[-1]:
        unit_x, unit_y = (v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), 1e-30) for v in (raw_x, raw_y))
        cosine = _dot("ind,jnd->ij", unit_x, unit_y)
    else:
        cosine = jnp.full((x.shape[0], y.shape[0]), jnp.nan)
    return Moments(
        count=moments.count + weight_N.sum(),
        shift_x=moments.shift_x,
        shift_y=moments.shift_y,
        x=moments.x + x.sum(1),
        y=moments.y + y.sum(1),
        xx=moments.xx + _dot("ind,ine->ide", x, x),
        yy=moments.yy + _dot("jnd,jne->jde", y, y),
        xy=moments.xy + _dot("ind,jne->ijde", x, y),
        norm_x=moments.norm_x + p_MN.sum(-1),
        norm_y=moments.norm_y + q_JN.sum(-1),
        norm_xx=moments.norm_xx + (p_MN * p_MN).sum(-1),
        norm_yy=moments.norm_yy + (q_JN * q_JN).sum(-1),
        norm_xy=moments.norm_xy + _dot("in,jn->ij", p_MN, q_JN),
        x_norm_x=moments.x_norm_x + _dot("in,ind->id", p_MN, x),
        y_norm_y=moments.y_norm_y + _dot("jn,jne->je", q_JN, y),
        y_norm_x=moments.y_norm_x + _dot("in,jne->ije", p_MN, y),
        x_norm_y=moments.x_norm_y + _dot("jn,ind->ijd", q_JN, x),
        cosine=moments.cosine + cosine,
    )


def moments_of(x_MND, y_JNE, valid_N=None) -> Moments:
    """The sums of one batch that holds everything."""
    x_MND, y_JNE = jnp.asarray(x_MND), jnp.asarray(y_JNE)
    valid_N = jnp.ones(x_MND.shape[1], bool) if valid_N is None else jnp.asarray(valid_N)
    return update(start(x_MND, y_JNE, valid_N), x_MND, y_JNE, valid_N)


def centred_cosine(x_MND: jax.Array, y_JNE: jax.Array, mean_x: jax.Array, mean_y: jax.Array) -> jax.Array:
    """Cosine of every token after each side's mean (of a first pass: `means`) is taken off, [M, J, N]."""
    units = []
    for v, mean in ((x_MND, mean_x), (y_JNE, mean_y)):
        v = v.astype(jnp.float32) - mean[:, None]
        units.append(v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), 1e-30))
    return _dot("ind,jnd->ijn", *units)


# --- measures, on the host in float64 --------------------------------------------------------------------------------


def _host(moments: Moments, least: int) -> Moments:
    moments = Moments(*(np.asarray(jax.device_get(leaf), np.float64) for leaf in moments))
    if moments.count < least:
        raise InputError(f"{int(moments.count)} tokens are too few for this measure; give at least {least}")
    return moments


def means(moments: Moments) -> tuple[np.ndarray, np.ndarray]:
    """Mean of x [M, D] and of y [J, E]."""
    m = _host(moments, 1)
    return m.shift_x + m.x / m.count, m.shift_y + m.y / m.count


def mean_cosine(moments: Moments) -> np.ndarray:
    """Mean over tokens of cos(x_i, y_j), [M, J]: s[l] of arXiv 2502.16722 on the diagonal."""
    m = _host(moments, 1)
    return m.cosine / m.count


def covariances(moments: Moments) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centred sums C_xx [M, D, D], C_yy [J, E, E], C_xy [M, J, D, E]."""
    m = _host(moments, 2)
    return (
        m.xx - np.einsum("id,ie->ide", m.x, m.x) / m.count,
        m.yy - np.einsum("jd,je->jde", m.y, m.y) / m.count,
        m.xy - np.einsum("id,je->ijde", m.x, m.y) / m.count,
    )


def _over(above, below):
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=below > 0)


def linear_cka(moments: Moments) -> np.ndarray:
    """Biased linear CKA, |C_xy|_F^2 / (|C_xx|_F |C_yy|_F), [M, J] (arXiv 1905.00414).

    Of independent Gaussians it is about D / (N + D), not 0: compare `debiased_cka`.
    """
    xx, yy, xy = covariances(moments)
    norm_x, norm_y = (np.sqrt(np.square(c).sum((1, 2))) for c in (xx, yy))
    return _over(np.square(xy).sum((2, 3)), norm_x[:, None] * norm_y[None])


def _hsic(n, cross, c, sum_x, sum_y, norm_x, norm_y, y_norm_x, x_norm_y):
    """Unbiased HSIC of linear kernels from sums (Song et al. 2012; the sheet of arXiv 2502.16722, section 7)."""
    p = np.square(cross).sum((-2, -1)) - c
    kappa_x, kappa_y = np.square(sum_x).sum(-1) - norm_x, np.square(sum_y).sum(-1) - norm_y
    q = (
        np.einsum("...d,...de,...e->...", sum_x, cross, sum_y)
        - (y_norm_x * sum_y).sum(-1)
        - (x_norm_y * sum_x).sum(-1)
        + c
    )
    return (p + kappa_x * kappa_y / ((n - 1) * (n - 2)) - 2 * q / (n - 2)) / (n * (n - 3))


def debiased_cka(moments: Moments) -> np.ndarray:
    """Linear CKA from unbiased HSIC estimates, [M, J]: about 0 for independent representations, may be negative."""
    m = _host(moments, 4)
    x, y = m.x[:, None], m.y[None]
    between = _hsic(
        m.count, m.xy, m.norm_xy, np.broadcast_to(x, m.x_norm_y.shape), np.broadcast_to(y, m.y_norm_x.shape),
        m.norm_x[:, None], m.norm_y[None], m.y_norm_x, m.x_norm_y,
    )  # fmt: skip
    within_x = _hsic(m.count, m.xx, m.norm_xx, m.x, m.x, m.norm_x, m.norm_x, m.x_norm_x, m.x_norm_x)
    within_y = _hsic(m.count, m.yy, m.norm_yy, m.y, m.y, m.norm_y, m.norm_y, m.y_norm_y, m.y_norm_y)
    product = within_x[:, None] * within_y[None]
    return _over(between, np.sqrt(np.maximum(product, 0.0)))


class Cca(NamedTuple):
    """Canonical correlations of each pair, all [M, J] but the first."""

    correlations: list[list[np.ndarray]]  # descending, as many as the smaller kept rank
    mean: np.ndarray
    weighted: np.ndarray  # PWCCA: weighted by how much of x each canonical direction carries


def _roots(c: np.ndarray, keep: float, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """W with W^T C W = 1 on the kept eigenvectors [D, R], and C W [D, R]."""
    value, vector = np.linalg.eigh(c)
    value, vector = value[::-1], vector[:, ::-1]
    value = np.maximum(value, 0.0)
    total = value.sum()
    rank = int((value > 1e-10 * max(value[0], 1e-300)).sum())
    if keep < 1.0 and total > 0:
        rank = min(rank, int(np.searchsorted(np.cumsum(value), keep * total)) + 1)
    value, vector = value[:rank], vector[:, :rank]
    root = vector / np.sqrt(value + ridge * total / max(len(c), 1))
    return root, c @ root


def cca(moments: Moments, keep: float = 1.0, ridge: float = 0.0) -> Cca:
    """Canonical correlation analysis of every pair; its mean is the CCA, or with `keep` below 1 the SVCCA similarity.

    Args:
      keep: share of the variance whose leading directions are kept on each side (SVCCA, arXiv 1706.05806: 0.99).
      ridge: added to each variance, in units of the mean variance; CCA needs many more tokens than dimensions, or this.

    `weighted` is PWCCA (arXiv 1806.05759): weights sum_d |(A^T C_xx)_rd| over the canonical directions A of x.
    """
    if not 0.0 < keep <= 1.0 or ridge < 0.0:
        raise InputError(f"keep is {keep!r} and ridge {ridge!r}; keep lies in (0, 1], ridge is 0 or more")
    xx, yy, xy = covariances(moments)
    left, right = [_roots(c, keep, ridge) for c in xx], [_roots(c, keep, ridge) for c in yy]
    shape = xy.shape[:2]
    mean, weighted = np.full(shape, np.nan), np.full(shape, np.nan)
    correlations: list[list[np.ndarray]] = []
    for i, (root_x, spread_x) in enumerate(left):
        correlations.append([])
        for j, (root_y, _) in enumerate(right):
            u, rho, _ = np.linalg.svd(root_x.T @ xy[i, j] @ root_y, full_matrices=False)
            rho = np.clip(rho, 0.0, 1.0)
            correlations[-1].append(rho)
            if rho.size:
                weight = np.abs(spread_x @ u).sum(0)
                mean[i, j], weighted[i, j] = rho.mean(), (weight * rho).sum() / weight.sum()
    return Cca(correlations, mean, weighted)


def procrustes(moments: Moments) -> np.ndarray:
    """Orthogonal Procrustes distance of the centred, unit-norm representations, [M, J]: 0 (a rotation) to sqrt(2).

    d^2 = 2 - 2 |C_xy|_* / sqrt(tr C_xx tr C_yy); a metric (arXiv 2110.14739).
    """
    xx, yy, xy = covariances(moments)
    norms = np.sqrt(np.trace(xx, axis1=1, axis2=2))[:, None] * np.sqrt(np.trace(yy, axis1=1, axis2=2))[None]
    nuclear = np.linalg.svd(xy, compute_uv=False).sum(-1)
    return np.sqrt(np.maximum(2.0 - 2.0 * _over(nuclear, norms), 0.0))


def rsa(moments: Moments) -> np.ndarray:
    """Pearson correlation of the squared Euclidean distances of all token pairs, [M, J] (representational similarity).

    With D_ab = |x_a|^2 + |x_b|^2 - 2 x_a x_b every sum over pairs is one of the sums kept.
    """
    m = _host(moments, 3)
    n, pairs = m.count, m.count * (m.count - 1)

    def distance_sum(norm, total):
        return 2 * n * norm - 2 * np.square(total).sum(-1)

    def product_sum(c, norm_x, norm_y, y_norm_x, x_norm_y, sum_x, sum_y, cross):
        return (
            2 * n * c + 2 * norm_x * norm_y
            - 4 * (y_norm_x * sum_y).sum(-1) - 4 * (x_norm_y * sum_x).sum(-1) + 4 * np.square(cross).sum((-2, -1))
        )  # fmt: skip

    dx, dy = distance_sum(m.norm_x, m.x), distance_sum(m.norm_y, m.y)
    dxx = product_sum(m.norm_xx, m.norm_x, m.norm_x, m.x_norm_x, m.x_norm_x, m.x, m.x, m.xx)
    dyy = product_sum(m.norm_yy, m.norm_y, m.norm_y, m.y_norm_y, m.y_norm_y, m.y, m.y, m.yy)
    dxy = product_sum(
        m.norm_xy, m.norm_x[:, None], m.norm_y[None], m.y_norm_x, m.x_norm_y, m.x[:, None], m.y[None], m.xy
    )
    var_x, var_y = (np.maximum(s / pairs - np.square(d / pairs), 0.0) for s, d in ((dxx, dx), (dyy, dy)))
    return _over(dxy / pairs - dx[:, None] * dy[None] / pairs**2, np.sqrt(var_x[:, None] * var_y[None]))
