"""Accuracy per token (APT), token confusion and its clusters, as sums and counts (arXiv 2509.03407).

A *modified position* is one chosen by masked-LM corruption, whatever became of it. Everywhere in this module such
positions come as arrays of one common shape, any shape: `targets` (original ids), `predictions` (argmax ids), `modes`
(0..2, an index into `MODES`) in int32, and `valid` in bool, False at unused prediction slots, which count nowhere.
Counts are int32, so every sum is the same bits for any batch size, order and device count (below 2^31 positions);
add them over batches, `psum` them over devices, divide once at the end.

Letters beside those of the package:

    G  groups of articles           Q  frequency bins
    E  entries (unique id pairs) of a sparse V x V matrix        P  thresholds theta
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert6_jax import parallel

Array = jax.Array | np.ndarray

MODES = ("mask", "random", "kept")
RATES = (0.8, 0.1, 0.1)  # how often the paper's masking draws each mode


# ---- accuracy per token ----------------------------------------------------------------------------------------------


class TokenCounts(NamedTuple):
    """Sums over modified positions, int32; two of them are added by `jax.tree.map(jnp.add, a, b)`."""

    hits_CV: Array  # h: modified occurrences of the id, by mode, that were predicted right
    totals_CV: Array  # n: modified occurrences of the id, by mode


class MacroApt(NamedTuple):
    """A mean over tokens, not weighted by their frequency, and how many tokens it is over."""

    mean: Array  # float32, NaN over no tokens
    tokens: Array  # T, int32


class RiseByBin(NamedTuple):
    """What each frequency bin adds to a rise of <APT>; `rise_Q` sums to the whole rise."""

    rise_Q: Array  # float32, (T_b / T) * change of the bin's mean APT; 0 in an empty bin
    tokens_Q: Array  # T_b, int32


_STRETCH = 2**18  # positions counted at a time on CPU


@partial(jax.jit, static_argnames="vocab_size")
def count_tokens(targets: Array, predictions: Array, modes: Array, valid: Array, vocab_size: int) -> TokenCounts:
    """Hits and totals per token and corruption mode (sheet, section 2).

    All depths at once: `jax.vmap(count_tokens, (None, 0, None, None, None))` with predictions [M, ...].
    """
    C, V = len(MODES), vocab_size

    def add(table, targets, predictions, modes, valid):
        mode, target = (jnp.where(x < 0, x + n, x) for x, n in ((modes, C), (targets, V)))  # as `.at` reads negatives
        inside = valid & (0 <= mode) & (mode < C) & (0 <= target) & (target < V)
        cell = ((targets == predictions).astype(jnp.int32) * C + mode) * V + target
        return table.at[jnp.where(inside, cell, 2 * C * V)].add(jnp.int32(1), mode="drop")

    arrays = jnp.broadcast_arrays(targets, predictions, jnp.asarray(modes, jnp.int32), jnp.asarray(valid, bool))
    targets, predictions, modes, valid = (x.reshape(-1) for x in arrays)
    arrays = targets.astype(jnp.int32), predictions.astype(jnp.int32), modes, valid
    # Wrong and right predictions in one table, so that a position is one step of the scatter. On CPU by stretches,
    # whose cells stay in the cache: a quarter of the time. The first, which is what does not fill a stretch, is counted
    # ahead of the loop, so that inside `shard_map` the table varies over devices from the start.
    stretch = _STRETCH if jax.default_backend() == "cpu" else max(targets.size, 1)
    loops = max(targets.size - 1, 0) // stretch
    first = targets.size - loops * stretch
    table = add(jnp.zeros(2 * C * V, jnp.int32), *(x[:first] for x in arrays))
    if loops:
        at = partial(jax.lax.dynamic_slice_in_dim, slice_size=stretch)
        table = jax.lax.fori_loop(
            0, loops, lambda i, table: add(table, *(at(x, first + i * stretch) for x in arrays)), table
        )
    wrong_CV, hits_CV = table.reshape(2, C, V)
    return TokenCounts(hits_CV, wrong_CV + hits_CV)


def _sum_modes(counts: TokenCounts, modes: Sequence[str] | None) -> tuple[jax.Array, jax.Array]:
    """(h_V, n_V) over the named modes, all of them by default."""
    unknown = [mode for mode in modes or () if mode not in MODES]
    if unknown:
        raise ValueError(f"unknown corruption mode {unknown[0]!r}: choose from {MODES}")
    on_C = np.array([modes is None or mode in modes for mode in MODES])
    return jnp.sum(counts.hits_CV[on_C], axis=0), jnp.sum(counts.totals_CV[on_C], axis=0)


def _ratio(above: Array, below: Array) -> jax.Array:
    """above / below in float32, NaN where below is 0."""
    quotient = above.astype(jnp.float32) / jnp.where(below > 0, below, 1).astype(jnp.float32)
    return jnp.where(below > 0, quotient, jnp.float32(jnp.nan))


def _mean_over(apt_V: Array, use_V: Array) -> MacroApt:
    tokens = jnp.sum(use_V, dtype=jnp.int32)
    return MacroApt(_ratio(jnp.sum(jnp.where(use_V, apt_V, jnp.float32(0))), tokens), tokens)


@partial(jax.jit, static_argnames="modes")
def apt(counts: TokenCounts, modes: tuple[str, ...] | None = None) -> jax.Array:
    """APT(i) = h_i / n_i as float32 [V]; NaN where n_i = 0: an unseen id is undefined, never 0 (sheet, section 2).

    `modes` restricts the count to some of `MODES`, e.g. `("mask",)`; ValueError for a name that is not one.
    """
    return _ratio(*_sum_modes(counts, modes))


@partial(jax.jit, static_argnames="modes")
def macro_apt(
    counts: TokenCounts, include_V: Array, min_count: int | Array = 1, modes: tuple[str, ...] | None = None
) -> MacroApt:
    """<APT>: the mean of APT over the T ids with n_i >= min_count (at least 1) and include_V (bool, no specials)."""
    h_V, n_V = _sum_modes(counts, modes)
    return _mean_over(_ratio(h_V, n_V), include_V & (n_V >= jnp.maximum(min_count, 1)))


@partial(jax.jit, static_argnames=("k", "modes"))
def apt_top50(
    counts: TokenCounts, include_V: Array, frequency_V: Array, k: int = 50, modes: tuple[str, ...] | None = None
) -> MacroApt:
    """APT(50), first reading: the mean over the k included ids of highest frequency_V (training counts, [V]).

    Equal frequencies go to the lower id. Those of the k that never occur among the modified positions are left out.
    """
    h_V, n_V = _sum_modes(counts, modes)
    rank_V = jnp.argsort(jnp.argsort(jnp.where(include_V, frequency_V, -1), stable=True, descending=True))
    return _mean_over(_ratio(h_V, n_V), include_V & (rank_V < k) & (n_V > 0))


def apt_min50(counts: TokenCounts, include_V: Array, modes: tuple[str, ...] | None = None) -> MacroApt:
    """APT(50), second reading: the mean over the included ids with n_i >= 50."""
    return macro_apt(counts, include_V, 50, modes)


@partial(jax.jit, static_argnames="modes")
def micro_accuracy(counts: TokenCounts, include_V: Array, modes: tuple[str, ...] | None = None) -> jax.Array:
    """Right predictions over modified positions, frequent tokens weighing more: never to be taken for <APT>."""
    h_V, n_V = _sum_modes(counts, modes)
    return _ratio(jnp.sum(jnp.where(include_V, h_V, 0)), jnp.sum(jnp.where(include_V, n_V, 0)))


def _bin_mean(apt_V: Array, use_V: Array, bin_V: Array, bins: int) -> MacroApt:
    # One masked mean a bin: a scatter-add of floats would sum in another order at every run on a GPU.
    return jax.vmap(lambda which: _mean_over(apt_V, use_V & (bin_V == which)))(jnp.arange(bins, dtype=bin_V.dtype))


@partial(jax.jit, static_argnames=("bins", "modes"))
def apt_by_bin(
    counts: TokenCounts,
    include_V: Array,
    bin_V: Array,
    bins: int,
    min_count: int | Array = 1,
    modes: tuple[str, ...] | None = None,
) -> MacroApt:
    """Mean APT and number of ids [Q] of each frequency bin; bin_V (int32) numbers the bin of every id, 0..bins-1."""
    h_V, n_V = _sum_modes(counts, modes)
    return _bin_mean(_ratio(h_V, n_V), include_V & (n_V >= jnp.maximum(min_count, 1)), bin_V, bins)


@partial(jax.jit, static_argnames="bins")
def rise_by_bin(
    first: TokenCounts,
    last: TokenCounts,
    include_V: Array,
    bin_V: Array,
    bins: int,
    min_count: int | Array = 1,
) -> RiseByBin:
    """The part of each frequency bin in <APT>(last) - <APT>(first), over ids defined in both (sheet, section 4)."""
    (h_first_V, n_first_V), (h_last_V, n_last_V) = _sum_modes(first, None), _sum_modes(last, None)
    use_V = include_V & (jnp.minimum(n_first_V, n_last_V) >= jnp.maximum(min_count, 1))
    mean_first_Q, tokens_Q = _bin_mean(_ratio(h_first_V, n_first_V), use_V, bin_V, bins)
    mean_last_Q, _ = _bin_mean(_ratio(h_last_V, n_last_V), use_V, bin_V, bins)
    share_Q = tokens_Q.astype(jnp.float32) / jnp.sum(tokens_Q).astype(jnp.float32)
    return RiseByBin(jnp.where(tokens_Q > 0, share_Q * (mean_last_Q - mean_first_Q), jnp.float32(0)), tokens_Q)


@jax.jit
def macro_apt_influence(hits_GV: Array, totals_GV: Array, include_V: Array, min_count: int | Array = 1) -> jax.Array:
    """What each group of articles does to <APT>: the derivative by the group's weight, float32 [G], summing to 0.

    Group whole articles with all their masking passes, because passes over one text are correlated (sheet, 5.4). The
    standard error of <APT>, given which ids were asked for, is sqrt(G / (G - 1) sum_g d_g^2) (infinitesimal jackknife);
    of a difference of two models on the same groups it is that of the difference of their influences. Resampling the
    groups instead would drop rare ids from T and with them shift the mean.
    """
    h_V, n_V = jnp.sum(hits_GV, axis=0), jnp.sum(totals_GV, axis=0)
    use_V = include_V & (n_V >= jnp.maximum(min_count, 1))
    apt_V = jnp.where(use_V, _ratio(h_V, n_V), jnp.float32(0))
    per_n_V = jnp.where(use_V, 1 / jnp.maximum(n_V, 1).astype(jnp.float32), jnp.float32(0))
    excess_GV = hits_GV.astype(jnp.float32) - apt_V[None] * totals_GV.astype(jnp.float32)
    return jnp.sum(excess_GV * per_n_V[None], axis=1) / jnp.maximum(jnp.sum(use_V), 1).astype(jnp.float32)


# ---- the best predictor without context ------------------------------------------------------------------------------


def context_free_answers(p_V: Array, rates: tuple[float, float, float] = RATES) -> jax.Array:
    """What the ideal head that sees only the input id answers to each input id: int32 [V] (sheet, section 6).

    p_V: token probabilities. An id x in the input was kept (`rates[2]`) or drawn uniformly from V (`rates[1]`): copy it
    iff its posterior beats that of a = argmax p, i.e. p_x (V rates[2] / rates[1] + 1) > p_max; else answer a, which is
    also the answer to [MASK].
    """
    p_V = jnp.asarray(p_V)
    ids_V = jnp.arange(p_V.size, dtype=jnp.int32)
    copied_V = p_V * (p_V.size * rates[2] + rates[1]) > jnp.max(p_V) * rates[1]
    return jnp.where(copied_V, ids_V, jnp.argmax(p_V).astype(jnp.int32))


def context_free_apt(p_V: Array, rates: tuple[float, float, float] = RATES) -> jax.Array:
    """Expected APT of every id under `context_free_answers`, float [V] (sheet, section 6).

    With the paper's rates 0.1 (1 + 1/V) for copied ids, 0 for the others, and for a = argmax p besides
    0.8 + 0.1 * (other ids answered by a) / V. Take the mean over ids with p > 0: the others are never targets.
    """
    p_V = jnp.asarray(p_V)
    answer_V = context_free_answers(p_V, rates)
    answered_V = jnp.zeros_like(p_V).at[answer_V].add(jnp.ones_like(p_V))  # input ids that lead to the answer
    ids_V = jnp.arange(p_V.size, dtype=jnp.int32)
    masked_V = jnp.where(ids_V == jnp.argmax(p_V), rates[0], 0.0).astype(p_V.dtype)
    return masked_V + rates[1] * answered_V / p_V.size + rates[2] * (answer_V == ids_V).astype(p_V.dtype)


def context_free_bound(tokens: int, window: int = 128, rates: tuple[float, float, float] = RATES) -> float:
    """Upper bound of <APT> over `tokens` ids for any head that sees only input id and position (sheet, section 5.1).

    Without the id only the window's positions but [CLS] and [SEP] tell cases apart, so at most window - 2 ids can be
    answers; kept ids are copied. 0.1 + 0.9 * 126 / T in the paper's setting; a block 0 above it is a leak.
    """
    return min(1.0, rates[2] + (1 - rates[2]) * (window - 2) / tokens)


# ---- token confusion -------------------------------------------------------------------------------------------------


class Confusion(NamedTuple):
    """Sparse M: M_ij = modified positions of id i predicted as j; entries sorted by (row, col), each pair once.

    An empty slot (there are some only where a `size` was given) has row = vocab_size, col = 0, count = 0.
    """

    row_E: Array  # int32, true id
    col_E: Array  # int32, predicted id
    count_E: Array  # int32
    lost: Array  # int32 scalar: positions whose pair found no slot; 0 unless `size` was too small


# Packed into one key, row * V + col, a pair costs a third of the time of a pair sorted by two keys.
_MAX_PACKED = 2**16 - 1


def _compact(mask: jax.Array, size: int) -> jax.Array:
    """Indices of the first `size` True places; the length of `mask` in the remaining slots. Faster than nonzero."""
    slot = jnp.where(mask, jnp.cumsum(mask, dtype=jnp.int32) - 1, size)
    return jnp.full(size, mask.size, jnp.int32).at[slot].set(jnp.arange(mask.size, dtype=jnp.int32), mode="drop")


def _coalesce(row: jax.Array, col: jax.Array, count: jax.Array | None, vocab_size: int, size: int) -> Confusion:
    """Sum entries of equal pairs (flat arrays, row = vocab_size where empty); `count` None counts each entry once."""
    row, col = (jnp.append(x, jnp.int32(last)) for x, last in ((row, vocab_size), (col, 0)))  # one is always empty
    packed = vocab_size <= _MAX_PACKED
    keys = (row.astype(jnp.uint32) * jnp.uint32(vocab_size) + col.astype(jnp.uint32),) if packed else (row, col)
    weights = () if count is None else (jnp.append(count, jnp.int32(0)),)
    ordered = jax.lax.sort((*keys, *weights), num_keys=len(keys), is_stable=False)
    keys = ordered[: len(keys)]

    empty = jnp.uint32(vocab_size**2) if packed else jnp.int32(vocab_size)
    n_filled = jnp.sum(keys[0] < empty, dtype=jnp.int32)
    differs = jnp.any(jnp.stack([key[1:] != key[:-1] for key in keys]), axis=0)
    start = jnp.minimum(_compact(jnp.append(True, differs), size + 1), n_filled)
    place = start  # sum of the weights before a place; it is the place itself where all weights are 1
    total = n_filled
    if count is not None:
        before = jnp.cumsum(ordered[-1], dtype=jnp.int32) - ordered[-1]
        place, total = before[start], before[n_filled]
    pair = [key[start[:-1]] for key in keys]
    if packed:
        pair = [part.astype(jnp.int32) for part in jnp.divmod(pair[0], jnp.uint32(vocab_size))]
    return Confusion(*pair, place[1:] - place[:-1], total - place[-1])


@partial(jax.jit, static_argnames=("vocab_size", "size"))
def _count_in_jit(targets, predictions, valid, vocab_size, size):
    row, col = jnp.where(valid, targets, vocab_size), jnp.where(valid, predictions, 0)
    return _coalesce(row.reshape(-1), col.reshape(-1), None, vocab_size, size)


def _right_and_wrong(targets, predictions, valid, vocab_size):
    """Right predictions of each id, [V], and the sorted keys of the wrong ones, of flat positions."""
    right_V, wrong = np.zeros(vocab_size, np.int64), 0
    key = np.empty(targets.size, np.uint32 if vocab_size <= _MAX_PACKED else np.uint64)
    for begin in range(0, targets.size, _STRETCH):  # what is made on the way is small and stays in the cache
        row, col, use = (x[begin : begin + _STRETCH] for x in (targets, predictions, valid))
        if not use.all():
            row, col = np.compress(use, row), np.compress(use, col)
        if row.size and not (0 <= min(row.min(), col.min()) and max(row.max(), col.max()) < vocab_size):
            raise ValueError(f"ids at valid positions must lie in 0..{vocab_size - 1}")
        differ = row != col
        right_V += np.bincount(np.compress(~differ, row).astype(np.intp), minlength=vocab_size)
        row, col = (np.compress(differ, x).astype(key.dtype) for x in (row, col))  # a fifth of the time of x[differ]
        row *= key.dtype.type(vocab_size)
        np.add(row, col, out=key[wrong : wrong + row.size])
        wrong += row.size
    key = key[:wrong]
    key.sort()
    return right_V, key


def _count_on_host(targets, predictions, valid, vocab_size):
    # Right predictions need no sorting: they are counted by id, and one key an id stands for them among the others.
    # Most of NumPy releases the interpreter lock: a stretch a thread; the stable sort then only merges sorted runs.
    arrays = [np.asarray(x) for x in (targets, predictions, valid)]
    if len(shapes := {x.shape for x in arrays}) > 1:
        raise ValueError(f"targets, predictions and valid are of one shape; these are {sorted(shapes)}")
    flat = [x.reshape(-1) for x in arrays]
    stretches = zip(*(np.array_split(x, min(4, parallel.cores())) for x in flat), strict=True)
    with ThreadPoolExecutor(min(4, parallel.cores())) as pool:
        right, keys = zip(*pool.map(lambda x: _right_and_wrong(*x, vocab_size), stretches), strict=True)
    right_V = np.sum(right, axis=0)
    seen = np.flatnonzero(right_V)
    own = seen.astype(keys[0].dtype) * keys[0].dtype.type(vocab_size + 1)
    key = np.concatenate([*keys, own])
    key.sort(kind="stable")
    start = np.flatnonzero(np.append(True, key[1:] != key[:-1])[: key.size])
    count = np.diff(start, append=key.size).astype(np.int32)
    key = key[start]
    count[np.searchsorted(key, own)] = right_V[seen]
    row, col = (part.astype(np.int32) for part in np.divmod(key, key.dtype.type(vocab_size)))
    return Confusion(row, col, count, np.int32(0))


def count_confusion(
    targets: Array, predictions: Array, valid: Array, vocab_size: int, size: int | None = None
) -> Confusion:
    """The sparse token confusion of modified positions; the same for any order, batching and device count.

    size: the number of entries E, as in `jnp.unique`. With it the function jits, vmaps and runs on accelerators; pairs
    beyond it (the highest ids) are not stored but their positions counted in `lost`. None: exactly as many as there
    are, counted by NumPy on the host, faster there; ids outside the vocabulary are then a ValueError. For one mode
    alone pass `valid & (modes == k)`.
    """
    # 10 million positions with Zipf ids, 60 % right, V = 30,522, 2 million pairs, a Zen 4 core: 0.22 s of CPU time on
    # the host, 0.14 of it NumPy sorting the wrong ones (it sorts all in 0.34). More in benchmarks/NOTES.md.
    if size is None:
        return _count_on_host(targets, predictions, valid, vocab_size)
    return _count_in_jit(targets, predictions, valid, vocab_size, size)


@partial(jax.jit, static_argnames=("vocab_size", "size"))
def _merge_in_jit(stacked, vocab_size, size):
    merged = _coalesce(stacked.row_E, stacked.col_E, stacked.count_E, vocab_size, size)
    return merged._replace(lost=merged.lost + jnp.sum(stacked.lost, dtype=jnp.int32))


def _merge_on_host(stacked, vocab_size):
    row, col, count = (np.asarray(x)[np.asarray(stacked.count_E) > 0] for x in stacked[:3])
    key = row.astype(np.int64) * vocab_size + col
    order = np.argsort(key, kind="stable")
    start = np.flatnonzero(np.diff(key[order], prepend=-1))
    count = np.add.reduceat(count[order], start) if start.size else count
    first = order[start]
    return Confusion(row[first], col[first], count, np.sum(stacked.lost, dtype=np.int32))


def merge_confusions(confusions: Sequence[Confusion], vocab_size: int, size: int | None = None) -> Confusion:
    """The sum of confusions of one vocabulary, `size` as in `count_confusion`.

    A member may carry leading axes (an all-gather over devices, a vmap over batches): they are summed over as well.
    """
    xp = np if size is None else jnp
    stacked = Confusion(
        *(xp.concatenate([xp.reshape(x, -1) for x in field]) for field in zip(*confusions, strict=True))
    )
    return _merge_on_host(stacked, vocab_size) if size is None else _merge_in_jit(stacked, vocab_size, size)


@partial(jax.jit, static_argnames="vocab_size")
def dense_confusion(targets: Array, predictions: Array, valid: Array, vocab_size: int) -> jax.Array:
    """The same counts as an int32 [V, V] (rows true, columns predicted), for small V: 4 V^2 bytes."""
    row = jnp.where(valid, targets, vocab_size)  # out of bounds, so dropped
    return jnp.zeros((vocab_size, vocab_size), jnp.int32).at[row, predictions].add(jnp.int32(1), mode="drop")


def sparse_from_dense(confusion_VV: Array) -> Confusion:
    """The entries of a dense confusion, on the host."""
    confusion_VV = np.asarray(confusion_VV, np.int32)
    row_E, col_E = (index.astype(np.int32) for index in np.nonzero(confusion_VV))
    return Confusion(row_E, col_E, confusion_VV[row_E, col_E], np.int32(0))


# ---- strong matches and clusters -------------------------------------------------------------------------------------


class Matches(NamedTuple):
    """Strong matches: off-diagonal entries of the filtered R with R_ij >= theta, sorted by (row, col).

    An empty slot has row = col = V and ratios 0.
    """

    row_E: Array  # int32 i
    col_E: Array  # int32 j
    ratio_E: Array  # float32 R_ij = M_ij / M_ii
    back_E: Array  # float32 R_ji, 0 where that is no strong match
    kept_V: Array  # bool: ids whose row passed the filter
    lost: Array  # int32 scalar: strong matches that found no slot; 0 unless `size` was too small


class ClusterStats(NamedTuple):
    """Statistics of one clustering (sheet, section 2); all int32 but the two float32 ratios, NaN without kept ids."""

    kept: Array  # ids that passed the filter
    components: Array  # components among them, singletons included
    singletons: Array
    mean_size: Array  # float32, kept / components
    max_size: Array
    giant_fraction: Array  # float32, max_size / kept
    strong: Array  # entries R_ij >= theta, i != j
    noise: Array  # those of them between different components
    degree_V: Array  # strong matches of each id
    histogram: Array  # [V + 1], components of each size


def _lookup(row_E, col_E, want_row_E, want_col_E, vocab_size):
    """Index of the entry (want_row, want_col) in entries sorted by (row, col), E where there is none."""
    entries = row_E.size
    begin_V = jnp.searchsorted(row_E, jnp.arange(vocab_size + 2, dtype=jnp.int32)).astype(jnp.int32)
    stop_E = begin_V[want_row_E + 1]

    def halve(_, bounds):
        low_E, high_E = bounds
        middle_E = (low_E + high_E) // 2
        right_E = col_E.at[middle_E].get(mode="clip") < want_col_E
        return jnp.where(right_E, middle_E + 1, low_E), jnp.where(right_E, high_E, middle_E)

    low_E, _ = jax.lax.fori_loop(0, entries.bit_length(), halve, (begin_V[want_row_E], stop_E))
    found_E = (low_E < stop_E) & (col_E.at[low_E].get(mode="clip") == want_col_E)
    return jnp.where(found_E, low_E, entries)


@partial(jax.jit, static_argnames=("vocab_size", "size"))
def _strong_matches(confusion, vocab_size, theta, n_min, size):
    row, col, count, _ = (jnp.asarray(x) for x in confusion)
    zero_V = jnp.zeros(vocab_size, jnp.int32)
    diagonal_V = zero_V.at[jnp.where(row == col, row, vocab_size)].add(count, mode="drop")
    top_V = zero_V.at[row].max(count, mode="drop")
    kept_V = (diagonal_V == top_V) & (diagonal_V >= jnp.maximum(n_min, 1))
    within = kept_V.at[row].get(mode="fill", fill_value=False) & kept_V[col]
    ratio = jnp.where(within, _ratio(count, diagonal_V.at[row].get(mode="fill", fill_value=1)), jnp.float32(0))
    strong = within & (row != col) & (ratio >= theta)
    slot_E = _compact(strong, size)
    row_E, col_E = (x.at[slot_E].get(mode="fill", fill_value=vocab_size) for x in (row, col))
    ratio_E = ratio.at[slot_E].get(mode="fill", fill_value=0)
    back_E = ratio_E.at[_lookup(row_E, col_E, col_E, row_E, vocab_size)].get(mode="fill", fill_value=0)
    lost = jnp.maximum(jnp.sum(strong, dtype=jnp.int32) - size, 0)
    return Matches(row_E, col_E, ratio_E, back_E, kept_V, lost)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def strong_matches(
    confusion: Confusion, vocab_size: int, theta: float | Array, n_min: int | Array = 1, size: int | None = None
) -> Matches:
    """Filter, normalise and threshold a confusion (sheet, section 2).

    Row i is kept iff M_ii = max_j M_ij (ties kept) and M_ii >= n_min (at least 1); a dropped id loses row and column.
    Choose theta > 0, the least R_ij to store, as the lowest threshold of interest: `clusters` takes any from there up.
    size: slots E of the result; with it the function jits. None: the next power of two that holds all strong matches
    (read on the host), so that matrices of similar size share one compilation.
    """
    if size is not None:
        return _strong_matches(confusion, vocab_size, theta, n_min, size)
    slots = _power_of_two(np.size(confusion.row_E))
    pad = slots - np.size(confusion.row_E)
    row, col, count = (
        np.pad(np.asarray(x), (0, pad), constant_values=empty)
        for x, empty in zip(confusion[:3], (vocab_size, 0, 0), strict=True)
    )
    matches = _strong_matches(Confusion(row, col, count, np.int32(0)), vocab_size, theta, n_min, slots)
    used = _power_of_two(int(np.count_nonzero(np.asarray(matches.ratio_E))))
    return Matches(*(x[:used] for x in matches[:4]), matches.kept_V, matches.lost)


@partial(jax.jit, static_argnames="mutual")
def clusters(matches: Matches, theta: float | Array, mutual: bool = True) -> jax.Array:
    """Clusters as connected components: int32 [V], the lowest id of the component of each id.

    mutual: the edge i-j exists iff R_ij >= theta and R_ji >= theta (the paper's clusters); else iff either is (the OR
    graph, which may percolate). theta at or above the one given to `strong_matches`. A dropped id is alone with its own
    label; `matches.kept_V` tells it from a kept singleton.
    """
    ids_V = jnp.arange(matches.kept_V.size, dtype=jnp.int32)
    edge_E = (matches.ratio_E >= theta) & ((matches.back_E >= theta) | (not mutual))
    row_E, col_E = (jnp.where(edge_E, end_E, 0) for end_E in (matches.row_E, matches.col_E))

    # An edge hands the lower of its two labels to the ids that they name, then every id takes the label of its label:
    # labels stay inside a component and fall until all edges agree, in about log2(V) rounds, not V as in a plain flood.
    def spread(state):
        label_V, _ = state
        row_label_E, col_label_E = label_V[row_E], label_V[col_E]
        lowest_E = jnp.minimum(row_label_E, col_label_E)
        fallen_V = label_V.at[row_label_E].min(lowest_E).at[col_label_E].min(lowest_E)
        fallen_V = fallen_V[fallen_V]
        return fallen_V, jnp.any(fallen_V != label_V)

    return jax.lax.while_loop(lambda state: state[1], spread, (ids_V, jnp.bool_(True)))[0]


@jax.jit
def cluster_stats(matches: Matches, label_V: Array, theta: float | Array) -> ClusterStats:
    """Statistics of the labels that `clusters` found at theta."""
    vocab_size = label_V.size
    kept = jnp.sum(matches.kept_V, dtype=jnp.int32)
    size_V = jnp.zeros(vocab_size, jnp.int32).at[label_V].add(matches.kept_V.astype(jnp.int32))
    components, largest = jnp.sum(size_V > 0, dtype=jnp.int32), jnp.max(size_V)
    strong_E = (matches.ratio_E >= theta) & (matches.row_E < vocab_size)
    row_label_E, col_label_E = (label_V.at[end_E].get(mode="clip") for end_E in (matches.row_E, matches.col_E))
    return ClusterStats(
        kept=kept,
        components=components,
        singletons=jnp.sum(size_V == 1, dtype=jnp.int32),
        mean_size=_ratio(kept, components),
        max_size=largest,
        giant_fraction=_ratio(largest, kept),
        strong=jnp.sum(strong_E, dtype=jnp.int32),
        noise=jnp.sum(strong_E & (row_label_E != col_label_E), dtype=jnp.int32),
        degree_V=jnp.zeros(vocab_size, jnp.int32).at[matches.row_E].add(strong_E.astype(jnp.int32), mode="drop"),
        histogram=jnp.zeros(vocab_size + 1, jnp.int32).at[size_V].add((size_V > 0).astype(jnp.int32)),
    )


@partial(jax.jit, static_argnames="mutual")
def threshold_sweep(matches: Matches, theta_P: Array, mutual: bool = True) -> tuple[jax.Array, ClusterStats]:
    """`clusters` [P, V] and `cluster_stats` (each field with a leading P) at every threshold at once."""

    def at(theta):
        label_V = clusters(matches, theta, mutual)
        return label_V, cluster_stats(matches, label_V, theta)

    return jax.vmap(at)(theta_P)


def adjusted_rand_index(labels: Array, classes: Array) -> float:
    """Agreement of two partitions of the same ids, flat arrays of any labels: 1 if equal, 0 on average by chance.

    Hubert & Arabie (1985), on the host. For planted classes pass the labels of their ids only, e.g.
    `adjusted_rand_index(label_V[ids], class_V[ids])`; ids that the filter dropped then count as singletons.
    """

    def pairs(group_sizes):
        return int(np.sum(group_sizes.astype(np.int64) * (group_sizes - 1) // 2))

    _, label, label_sizes = np.unique(labels, return_inverse=True, return_counts=True)
    _, group, class_sizes = np.unique(classes, return_inverse=True, return_counts=True)
    _, cell_sizes = np.unique(label * class_sizes.size + group, return_counts=True)
    in_labels, in_classes, total = pairs(label_sizes), pairs(class_sizes), pairs(np.array([label.size]))
    chance, best = in_labels * in_classes / max(total, 1), (in_labels + in_classes) / 2
    return 1.0 if best == chance else (pairs(cell_sizes) - chance) / (best - chance)


# --- attention -------------------------------------------------------------------------------------------------------


class AttentionMass(NamedTuple):
    """Sums over queries; two of them are added by `jax.tree.map(jnp.add, a, b)`.

    `mass_LNG / queries` is the mean share of attention that a group gets; `mass_LNG / keys_G` that of one key in it.
    """

    mass_LNG: Array  # float32, attention from the queries to the keys of a group (here G: groups of keys)
    keys_G: Array  # int32, pairs of a query and a key of the group
    queries: Array  # int32 scalar


@partial(jax.jit, static_argnames="groups")
def attention_mass(
    pattern_LBNTT: Array, query_BQ: Array, group_BT: Array, groups: int, valid_BQ: Array | None = None
) -> AttentionMass:
    """Where chosen queries look, by the group of the key: the numbers behind the attention maps of arXiv 2311.12786.

    Args:
      pattern_LBNTT: `acts["pattern"]`, [..., query, key].
      query_BQ: int32, Q (here) positions a row that attend; one beyond the row makes the mass NaN.
      group_BT: int32, the group 0..`groups` - 1 of every key, say BOS, the letter a, the letter b, other; any other
        number counts nowhere.
      valid_BQ: bool, queries that count; all by default.
    """
    valid_BQ = jnp.ones(query_BQ.shape, bool) if valid_BQ is None else valid_BQ
    member_BTG = group_BT[:, :, None] == jnp.arange(groups, dtype=group_BT.dtype)[None, None]

    def rows(pattern_LNTT, query_Q):
        return pattern_LNTT.at[:, :, query_Q].get(mode="fill", fill_value=jnp.nan)

    taken_LBNQT = jax.vmap(rows, (1, 0), 1)(pattern_LBNTT, query_BQ)
    taken_LBNQT = jnp.where(valid_BQ[None, :, None, :, None], taken_LBNQT, 0.0).astype(jnp.float32)
    mass_LNG = jnp.einsum("lbnqt,btg->lng", taken_LBNQT, member_BTG.astype(jnp.float32), precision="highest")
    valid_B = valid_BQ.sum(1, dtype=jnp.int32)
    keys_G = (member_BTG.sum(1, dtype=jnp.int32) * valid_B[:, None]).sum(0, dtype=jnp.int32)
    return AttentionMass(mass_LNG, keys_G, valid_B.sum(dtype=jnp.int32))


# --- confidence ------------------------------------------------------------------------------------------------------


class Association(NamedTuple):
    """How y goes with x over the used examples, float32; NaN where x or y does not vary."""

    pearson: Array
    spearman: Array  # tied values share their mean rank
    slope: Array  # least squares, y per unit of x
    change: Array  # slope times the distance of the 5th and the 95th percentile of x
    most: Array  # the change if y went with x as closely as its own spread allows (a correlation of 1)
    count: Array  # int32, examples used


def _mean_rank(x_N: Array, use_N: Array) -> jax.Array:
    """Rank of every used value among the used ones, ties sharing the mean of theirs."""
    sorted_N = jnp.sort(jnp.where(use_N, x_N, jnp.inf))
    low, high = (jnp.searchsorted(sorted_N, x_N, side=side).astype(jnp.float32) for side in ("left", "right"))
    return (low + high - 1.0) / 2.0


def _moments(x_N: Array, y_N: Array, use_N: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    weight_N = use_N.astype(jnp.float32)
    count = jnp.maximum(weight_N.sum(), 1.0)
    dx_N, dy_N = ((jnp.where(use_N, v, 0.0) - jnp.where(use_N, v, 0.0).sum() / count) * weight_N for v in (x_N, y_N))
    return (dx_N * dx_N).sum(), (dy_N * dy_N).sum(), (dx_N * dy_N).sum()


@jax.jit
def association(x_N: Array, y_N: Array, use_N: Array) -> Association:
    """Pearson, Spearman and slope of y on x over the examples of `use_N`; vmap it over resamples for a bootstrap."""
    x_N, y_N = (jnp.asarray(v, jnp.float32) for v in (x_N, y_N))
    use_N = jnp.asarray(use_N) & jnp.isfinite(x_N) & jnp.isfinite(y_N)
    xx, yy, xy = _moments(x_N, y_N, use_N)
    rank_xx, rank_yy, rank_xy = _moments(_mean_rank(x_N, use_N), _mean_rank(y_N, use_N), use_N)

    def over(above, below):
        return jnp.where(below > 0, above / jnp.where(below > 0, below, 1.0), jnp.nan)

    slope = over(xy, xx)
    low, high = jnp.nanpercentile(jnp.where(use_N, x_N, jnp.nan), jnp.array([5.0, 95.0]))
    return Association(
        over(xy, jnp.sqrt(xx) * jnp.sqrt(yy)),
        over(rank_xy, jnp.sqrt(rank_xx) * jnp.sqrt(rank_yy)),
        slope,
        slope * (high - low),
        over(jnp.sqrt(yy), jnp.sqrt(xx)) * (high - low),
        use_N.sum(dtype=jnp.int32),
    )


@partial(jax.jit, static_argnames="bins")
def equal_count_bins(x_N: Array, use_N: Array, bins: int) -> jax.Array:
    """The bin of every example, int32 [N]: used ones in order of x, as even in number as can be; -1 for the others."""
    use_N = jnp.asarray(use_N) & jnp.isfinite(x_N)
    order_N = jnp.argsort(jnp.where(use_N, x_N, jnp.inf), stable=True)
    place_N = jnp.zeros(order_N.size, jnp.int32).at[order_N].set(jnp.arange(order_N.size, dtype=jnp.int32))
    count = jnp.maximum(use_N.sum(dtype=jnp.int32), 1)
    return jnp.where(use_N, jnp.minimum(place_N * bins // count, bins - 1), -1)
