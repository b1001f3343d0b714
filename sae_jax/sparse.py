"""Products with sparse codes, and the selections that make codes sparse.

TopK codes are K values and K indices a row. On a CPU the products with them walk rows of the weights: one dense product
(the encoder's) of the five of a training step is left. On GPUs and TPUs, where others found gathers and scatters to
lose to dense matrix products (not measured here), the codes are made dense first. `by_rows` decides; both give the same
numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def by_rows() -> bool:
    """Do the products walk rows on this backend? See `benchmarks/NOTES.md` for what was measured."""
    return jax.default_backend() == "cpu"


def top_latents(pre_BF: jax.Array, K: int) -> tuple[jax.Array, jax.Array]:
    """The K largest of every row, largest first, and their indices, `[B, K]` both; never more than K, ties or not.

    Exact in two short sorts: the K largest lie in the K groups with the largest maxima, so groups of about
    sqrt(F / K) are ranked first and only the members of K of them after that.
    """
    B, F = pre_BF.shape
    size = next((s for s in (32, 16, 8, 4, 2) if F % s == 0 and F // s >= 2 * K and s * s * K <= 4 * F), 1)
    if size == 1:
        return jax.lax.top_k(pre_BF, K)
    groups_BXS = pre_BF.reshape(B, F // size, size)
    _, group_BK = jax.lax.top_k(groups_BXS.max(-1), K)
    candidate_BY = jnp.take_along_axis(groups_BXS, group_BK[:, :, None], axis=1).reshape(B, K * size)
    value_BK, place_BK = jax.lax.top_k(candidate_BY, K)
    index_BK = jnp.take_along_axis(group_BK, place_BK // size, axis=1) * size + place_BK % size
    return value_BK, index_BK


def largest_over_heads(pre_BF: jax.Array, norm_HF: jax.Array, k, k_max: int) -> jax.Array:
    """The (k B H)-th largest of pre_BF norm_HF over rows, heads and latents, [] float32, without the array of them all;
    the smallest positive float where fewer are positive. k may be traced, 1 to the static `k_max`; no gradient.

    Two bisections. With every latent read by its largest norm, the (k B H)-th largest of `[B, F]` is a level t that the
    one searched lies at or above, and fewer than k B H entries are above t. Only these are read by every head.
    """
    (B, F), H = pre_BF.shape, norm_HF.shape[0]
    pre_BF, norm_HF = jax.lax.stop_gradient((pre_BF, norm_HF))
    wanted = jnp.minimum(jnp.asarray(k, jnp.int32), k_max) * (B * H)
    positive_BF = jnp.where(pre_BF > 0, pre_BF, 0.0)
    most_BF = _bits(positive_BF * norm_HF.max(0)[None])
    end = most_BF.max() + 1
    found = _bisect(lambda level: (most_BF >= level).sum(dtype=jnp.int32), jnp.int32(0), end, wanted)
    t = jnp.where(found > 0, _least_from(most_BF, found), 0)

    size = min(k_max * B * H, B * F)
    if size == B * F:

        def read(norm_F):
            return _bits(positive_BF * norm_F[None])

    else:
        place_C = jnp.nonzero((most_BF > t).reshape(-1), size=size, fill_value=B * F)[0]
        value_C = positive_BF.reshape(-1).at[place_C].get(mode="fill", fill_value=0.0)
        latent_C = place_C % F

        def read(norm_F):
            return _bits(value_C * norm_F[latent_C])

    def count(level):
        def add(total, norm_F):
            # no further than one more than asked for: all of them can be more than int32 holds
            return jnp.minimum(total + (read(norm_F) >= level).sum(dtype=jnp.int32), wanted + 1), None

        return jax.lax.scan(add, jnp.int32(0), norm_HF)[0]

    def least(level):
        def lower(so_far, norm_F):
            return jnp.minimum(so_far, _least_from(read(norm_F), level)), None

        return jax.lax.scan(lower, jnp.int32(_NO_BITS), norm_HF)[0]

    found = _bisect(count, t, end, wanted)
    return jax.lax.bitcast_convert_type(jnp.maximum(jnp.where(found > t, least(found), t), 1), jnp.float32)


_NO_BITS = 2**31 - 1


def _bits(value: jax.Array) -> jax.Array:
    """Floats from 0 on order as these integers do."""
    return jax.lax.bitcast_convert_type(value, jnp.int32)


def _least_from(bits: jax.Array, level) -> jax.Array:
    return jnp.where(bits >= level, bits, _NO_BITS).min()


def _bisect(count, low, high, wanted) -> jax.Array:
    """The largest integer in (low, high) that at least `wanted` values reach, or an earlier one that exactly so many
    reach, which the same values do; `low` where there is none. `count` tells how many reach a level."""

    def unknown(state):
        low, high, reached = state
        return (high - low > 1) & (reached != wanted)

    def halve(state):
        low, high, reached = state
        middle = low + (high - low) // 2
        counted = count(middle)
        enough = counted >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle), jnp.where(enough, counted, reached)

    return jax.lax.while_loop(unknown, halve, (low, high, jnp.int32(-1)))[0]


def batch_largest(pre_BF: jax.Array, k) -> jax.Array:
    """Which of the positive pre-activations are among the k B largest of the batch, `[B, F]` bool; exactly k B of
    them where so many are positive (of equal ones the first rows win)."""
    B, F = pre_BF.shape
    wanted = jnp.asarray(k, jnp.int32) * B
    positive_BF = jnp.where(pre_BF > 0, pre_BF, 0.0)
    bits_BF = jax.lax.bitcast_convert_type(positive_BF, jnp.int32)  # floats above 0 order as their bits do

    def bit(i, found):
        """Set this bit if that still leaves `wanted` values at or above."""
        raised = found | jax.lax.shift_left(jnp.int32(1), jnp.int32(30) - i)
        enough = (bits_BF >= raised).sum(dtype=jnp.int32) >= wanted
        return jnp.where(enough, raised, found)

    least = jnp.maximum(jax.lax.fori_loop(0, 31, bit, jnp.int32(0)), 1)  # the (k B)-th largest, or anything positive
    above_BF, equal_BF = bits_BF > least, bits_BF == least
    room = wanted - above_BF.sum(dtype=jnp.int32)
    equal_B = equal_BF.sum(1, dtype=jnp.int32)
    quota_B = jnp.clip(room - (jnp.cumsum(equal_B) - equal_B), 0, equal_B)
    # One row at most keeps some of its equal values and not all: only its order is ever needed.
    part = jnp.argmax((quota_B > 0) & (quota_B < equal_B))
    some_F = jnp.cumsum(equal_BF[part].astype(jnp.int32)) <= quota_B[part]
    allowed_BF = jnp.where((jnp.arange(B) == part)[:, None], some_F[None], (quota_B > 0)[:, None])
    return above_BF | (equal_BF & allowed_BF)


def scatter_codes(z_BK: jax.Array, index_BK: jax.Array, F: int) -> jax.Array:
    """Dense codes `[B, F]` of the K of every row (indices of a row are distinct)."""
    row_B1 = jnp.arange(z_BK.shape[0])[:, None]
    return jnp.zeros((z_BK.shape[0], F), z_BK.dtype).at[row_B1, index_BK].set(z_BK, unique_indices=True)


# --- products that walk rows -----------------------------------------------------------------------------------------


def _gathered(z_BK, index_BK, W_FD) -> jax.Array:
    """sum_k z[b, k] W[index[b, k]], `[B, D]`: one rank of all rows at a time, so nothing of size [B, K, D] exists."""
    start_BD = jnp.zeros((z_BK.shape[0], W_FD.shape[1]), W_FD.dtype)

    def add(k, sum_BD):
        return sum_BD + z_BK[:, k, None] * W_FD[index_BK[:, k]]

    return jax.lax.fori_loop(0, z_BK.shape[1], add, start_BD)


def _scattered(z_BK, index_BK, x_BD, F: int) -> jax.Array:
    """sum_b z[b, k] x[b] added to row index[b, k], `[F, D]`: a row's latents are distinct, so each step is exact."""

    def add(b, sum_FD):
        return sum_FD.at[index_BK[b]].add(z_BK[b, :, None] * x_BD[b, None], unique_indices=True)

    return jax.lax.fori_loop(0, z_BK.shape[0], add, jnp.zeros((F, x_BD.shape[1]), x_BD.dtype))


def _dots(x_BD, index_BK, W_FD) -> jax.Array:
    """x[b] . W[index[b, k]], `[B, K]`."""
    return jax.lax.map(lambda row: W_FD[row[1]] @ row[0], (x_BD, index_BK))


@jax.custom_vjp
def decode_rows(z_BK: jax.Array, index_BK: jax.Array, W_FD: jax.Array) -> jax.Array:
    """`scatter_codes(z, index) @ W`, `[B, D]`, with gradients that touch the K rows of each code alone."""
    return _gathered(z_BK, index_BK, W_FD)


def _decode_fwd(z_BK, index_BK, W_FD):
    return _gathered(z_BK, index_BK, W_FD), (z_BK, index_BK, W_FD)


def _decode_bwd(saved, g_BD):
    z_BK, index_BK, W_FD = saved
    return _dots(g_BD, index_BK, W_FD), None, _scattered(z_BK, index_BK, g_BD, W_FD.shape[0])


decode_rows.defvjp(_decode_fwd, _decode_bwd)


@jax.custom_vjp
def attach_encoder(value_BK, index_BK, W_FD, b_F, x_BD) -> jax.Array:
    """`value_BK` as it is, with the gradient of (x W^T + b)[b, index[b, k]], whose value it is.

    The pre-activations themselves are computed outside of the gradient: of their F columns only K have one.
    """
    return value_BK


def _attach_fwd(value_BK, index_BK, W_FD, b_F, x_BD):
    return value_BK, (index_BK, W_FD, x_BD)


def _attach_bwd(saved, g_BK):
    index_BK, W_FD, x_BD = saved
    F = W_FD.shape[0]
    g_F = jnp.zeros(F, g_BK.dtype).at[index_BK.reshape(-1)].add(g_BK.reshape(-1))
    return None, None, _scattered(g_BK, index_BK, x_BD, F), g_F, _gathered(g_BK, index_BK, W_FD)


attach_encoder.defvjp(_attach_fwd, _attach_bwd)
