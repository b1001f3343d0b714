"""Rows of a fixed length cut from a token store, which documents they come from, and in which order they are read.

A *piece* is a stretch of one document with [CLS] before and [SEP] behind it. A row of T positions holds one piece and
padding, or, packed, several pieces with segment ids 1, 2, ... (0 is padding) and positions that start again at 0 in
each. Rows are described by small tables and gathered from the memory-mapped store when they are asked for.

Everything random here is a function of explicit integers: `split_documents` of a seed, `rows_at` of (seed, step).

Letters beside those of `bert6_jax`: W windows (rows), P pieces, D documents, C cells (row, position) of pieces,
G pieces or rows that are exchangeable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from bert6_jax.data.store import TokenStore
from bert6_jax.data.tokenizer import Tokenizer
from bert6_jax.errors import InputError

MIN_TOKENS = 3
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class Windows:
    """W rows of `length` positions; made by `make_windows`.

    Piece p is `size_P[p]` ids of document `document_P[p]` from `start_P[p]` of the store on and stands at column
    `column_P[p]`; row w holds the pieces `first_W1[w]` to `first_W1[w + 1]`, at least one, from column 0 on without a
    gap. `dropped_documents` counts documents shorter than the least size, `dropped_tails` last windows shorter than it.
    """

    store: TokenStore = field(repr=False)
    length: int
    packed: bool
    dropped_documents: int
    dropped_tails: int
    start_P: np.ndarray = field(repr=False)
    size_P: np.ndarray = field(repr=False)
    document_P: np.ndarray = field(repr=False)
    column_P: np.ndarray = field(repr=False)
    first_W1: np.ndarray = field(repr=False)
    pad_id: int
    cls_id: int
    sep_id: int

    @property
    def num_rows(self) -> int:
        return len(self.first_W1) - 1

    @property
    def num_tokens(self) -> int:
        """Positions that are not padding, [CLS] and [SEP] included."""
        return int(self.size_P.sum()) + 2 * len(self.size_P)

    @property
    def document_W(self) -> np.ndarray:
        """The document of every row, int64 [W]; only rows that are not packed have one."""
        if self.packed:
            raise ValueError("a packed row holds several documents: use document_P and first_W1")
        return self.document_P

    def rows(self, row_B: np.ndarray) -> np.ndarray:
        """The ids of rows, int32 [B, T]."""
        return self.batch(row_B)["ids"]

    def batch(self, row_B: np.ndarray, valid_B: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Rows as `bert6_jax.objectives` reads them: `ids`, `segment`, `row`, `valid` and, if packed, `position`.

        `valid_B` marks the rows that count (default: all), see `rows_at`.
        """
        row_B = np.asarray(row_B)
        ids, segment, *position = self._packed(row_B) if self.packed else self._alone(row_B)
        batch = {
            "ids": ids,
            "segment": segment,
            "row": row_B.astype(np.int32),
            "valid": np.ones(len(row_B), bool) if valid_B is None else np.asarray(valid_B),
        }
        return batch | {"position": position[0]} if self.packed else batch

    @cached_property
    def _stretches(self) -> np.ndarray:
        """All stretches of T - 2 ids that follow each other in the store, a view [.., T - 2]; one in a tiny store."""
        ids, room = np.asarray(self.store.ids), self.length - 2
        if len(ids) < room:
            ids = np.concatenate([ids, np.zeros(room - len(ids), ids.dtype)])
        return np.lib.stride_tricks.sliding_window_view(ids, room)

    @cached_property
    def _ones_up_to(self) -> np.ndarray:
        """Row n is n ones and then zeros, a view int32 [T + 1, T]."""
        steps = np.repeat(np.array([1, 0], np.int32), self.length)
        return np.lib.stride_tricks.sliding_window_view(steps, self.length)[::-1]

    def _alone(self, row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`ids` and `segment` of rows of one piece each: stretches of the store, padding laid over their ends."""
        B, room = len(row_B), self.length - 2
        start_B, size_B = self.start_P[row_B], self.size_P[row_B]
        last = len(self._stretches) - 1
        ids_BT = np.empty((B, self.length), np.int32)
        ids_BT[:, 0] = self.cls_id
        ids_BT[:, 1:-1] = self._stretches[np.minimum(start_B, last)]
        for b in np.flatnonzero(start_B > last):  # their stretch would reach beyond the store's end
            ids_BT[b, 1 : 1 + size_B[b]] = self.store.ids[start_B[b] : start_B[b] + size_B[b]]
        segment_BT = self._ones_up_to[size_B + 2]
        if B and size_B.min() < room:
            np.copyto(ids_BT, self.pad_id, where=segment_BT == 0)
        ids_BT[np.arange(B), size_B + 1] = self.sep_id
        return ids_BT, segment_BT

    def _packed(self, row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`ids`, `segment` and `position` of packed rows.

        The pieces of a row stand one behind the other from column 0 on. The last one is given the rest of the row, so
        every cell belongs to a piece; padding is laid over that rest at the end.
        """
        B, T = len(row_B), self.length
        first_B = self.first_W1[row_B]
        pieces_B = self.first_W1[row_B + 1] - first_B
        segment_P = _count_up(pieces_B)
        piece_P = np.repeat(first_B, pieces_B) + segment_P
        column_P, size_P = self.column_P[piece_P], self.size_P[piece_P]
        last_B = np.cumsum(pieces_B) - 1
        span_P = size_P + 2
        span_P[last_B] = T - column_P[last_B]
        cell_P = np.cumsum(span_P) - span_P  # of [CLS]

        cell_C = np.arange(B * T)
        ids = np.repeat(self.start_P[piece_P] - 1 - cell_P, span_P)
        ids += cell_C
        # Clipping concerns cells that are overwritten just after: [CLS], [SEP], padding.
        ids = np.take(np.asarray(self.store.ids), ids, mode="clip").astype(np.int32)
        segment = np.repeat((segment_P + 1).astype(np.int32), span_P)
        position = cell_C.astype(np.int32)
        position -= np.repeat(cell_P.astype(np.int32), span_P)
        ids[cell_P] = self.cls_id
        ids[cell_P + size_P + 1] = self.sep_id
        ids_BT, segment_BT, position_BT = (x.reshape(B, T) for x in (ids, segment, position))
        used_BT = self._ones_up_to[column_P[last_B] + size_P[last_B] + 2]
        np.copyto(ids_BT, self.pad_id, where=used_BT == 0)
        segment_BT *= used_BT
        position_BT *= used_BT
        return ids_BT, segment_BT, position_BT


def make_windows(
    store: TokenStore,
    tokenizer: Tokenizer,
    document_D: np.ndarray | None = None,
    *,
    length: int = 128,
    mode: str = "first",
    pack: bool = False,
    min_tokens: int = MIN_TOKENS,
) -> Windows:
    """Cuts documents (all of the store by default) into windows, in the order given.

    Args:
      length: T, positions of a row with [CLS] and [SEP].
      mode: "first" takes the first T - 2 ids of every document, as the paper does; "all" consecutive windows.
      pack: put short pieces together in one row.
      min_tokens: shorter documents and last windows are dropped and counted.

    Raises:
      InputError: nothing is left, or rows too short to hold anything.
    """
    if tokenizer.sha256 != store.tokenizer_sha256:
        raise ValueError(f"{store.path} was written with another tokenizer")
    if mode not in ("first", "all"):
        raise ValueError(f"mode {mode!r} is neither 'first' nor 'all'")
    room = length - 2
    if room < min_tokens:
        raise InputError(
            f"length {length}: no room for {min_tokens} tokens, [CLS] and [SEP]; use {min_tokens + 2} or more"
        )
    if document_D is None:
        document_D = np.arange(store.num_documents)
    document_D = np.asarray(document_D, np.int64)
    begin_D = np.asarray(store.offsets_D1)[document_D]
    tokens_D = np.asarray(store.offsets_D1)[document_D + 1] - begin_D
    long_enough_D = tokens_D >= min_tokens
    if not long_enough_D.any():
        raise InputError(
            f"{store.source}: none of {len(document_D)} documents has {min_tokens} tokens; give longer texts"
        )
    pieces_D = np.where(long_enough_D, 1 if mode == "first" else -(-tokens_D // room), 0)
    done_P = _count_up(pieces_D) * room
    size_P = np.minimum(room, np.repeat(tokens_D, pieces_D) - done_P)
    keep_P = size_P >= min_tokens
    start_P = (np.repeat(begin_D, pieces_D) + done_P)[keep_P]
    size_P = size_P[keep_P]
    document_P = np.repeat(document_D, pieces_D)[keep_P]
    column_P = np.zeros(len(size_P), np.int64)
    first_W1 = np.arange(len(size_P) + 1)
    if pack:
        row_P, column_P = _best_fit(size_P + 2, length)
        order_P = np.lexsort((column_P, row_P))
        start_P, size_P, document_P, column_P = (x[order_P] for x in (start_P, size_P, document_P, column_P))
        first_W1 = np.concatenate([[0], np.cumsum(np.bincount(row_P))])
    return Windows(
        store=store,
        length=length,
        packed=pack,
        dropped_documents=int((~long_enough_D).sum()),
        dropped_tails=int((~keep_P).sum()),
        start_P=start_P,
        size_P=size_P,
        document_P=document_P,
        column_P=column_P,
        first_W1=first_W1,
        pad_id=tokenizer.pad_id,
        cls_id=tokenizer.cls_id,
        sep_id=tokenizer.sep_id,
    )


class Split(NamedTuple):
    """Documents held out, and the nested subsets by their size; arrays of document indices, int64."""

    held_out: np.ndarray
    subsets: dict[int, np.ndarray]


def split_documents(num_documents: int, seed: int, held_out: int, subset_sizes: Sequence[int]) -> Split:
    """One permutation by `seed`: every subset W_S is its first W_S documents, `held_out` its last ones (apt sheet, 3).

    The permutation is the one that `datasets.Dataset.shuffle(seed)` takes, as the recipe's authors did (seed 42).

    Raises:
      InputError: fewer documents than the largest subset and the held-out ones together.
    """
    largest = max(subset_sizes)
    if min(subset_sizes) < 1 or held_out < 0:
        raise InputError(
            f"subset sizes {list(subset_sizes)}, {held_out} held out: ask for positive numbers of documents"
        )
    if largest + held_out > num_documents:
        raise InputError(
            f"the corpus has {num_documents} documents, too few for a subset of {largest} and {held_out} held out; "
            "ask for smaller ones or give more text"
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(num_documents)
    return Split(order[num_documents - held_out :], {size: order[:size] for size in subset_sizes})


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Batches of an epoch, the last partial one included."""
    return -(-num_rows // batch_size)


def rows_at(seed: int, step: int, num_rows: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of one training step: a function of its arguments alone, so a resumed run reads the same batches.

    Every epoch goes through all rows once, in an order drawn from (seed, epoch). The last batch of an epoch may be
    partial: it is filled up with row 0, not valid.

    Returns:
      row_B int32 [B], valid_B bool [B].
    """
    if min(seed, step) < 0 or min(num_rows, batch_size) < 1:
        raise ValueError(f"no rows for {seed=}, {step=}, {num_rows=}, {batch_size=}")
    epoch, batch = divmod(step, steps_per_epoch(num_rows, batch_size))
    taken = _permutation(seed, epoch, num_rows)[batch * batch_size : (batch + 1) * batch_size]
    row_B = np.zeros(batch_size, np.int32)
    row_B[: len(taken)] = taken
    return row_B, np.arange(batch_size) < len(taken)


def token_frequencies(windows: Windows, row_B: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often every id stands in the rows, int64 [V]; padding is not counted, [CLS] and [SEP] are."""
    counts_V = np.zeros(vocab_size, np.int64)
    for begin in range(0, len(row_B), _ROWS_AT_ONCE):
        ids_BT = windows.rows(row_B[begin : begin + _ROWS_AT_ONCE])
        counts_V += np.bincount(ids_BT.ravel(), minlength=vocab_size)
    counts_V[windows.pad_id] = 0
    return counts_V


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
    order_W = generator.permutation(num_rows)
    order_W.flags.writeable = False
    return order_W


def _count_up(counts: np.ndarray) -> np.ndarray:
    """0, 1, ..., c - 1 for every c of counts, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _best_fit(width_P: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: the widest piece first, each into the fullest row that has room; (row_P, column_P).

    Pieces of the same width and rows of the same room are exchangeable, so whole groups are placed at once (the
    histogram packing of arXiv 2107.02027): the work grows with length^2, not with the number of pieces.
    """
    row_P, column_P = np.empty(len(width_P), np.int64), np.empty(len(width_P), np.int64)
    num_rows = 0
    rows_with_room = [np.zeros(0, np.int64) for _ in range(length + 1)]
    by_width = np.argsort(-width_P, kind="stable")
    for piece_G in np.split(by_width, np.flatnonzero(np.diff(width_P[by_width])) + 1):
        width = width_P[piece_G[0]]
        while len(piece_G):
            room = next((r for r in range(width, length + 1) if len(rows_with_room[r])), length)
            fit = room // width
            wanted = -(-len(piece_G) // fit)
            if not len(rows_with_room[room]):
                rows_with_room[room] = np.arange(num_rows, num_rows + wanted)
                num_rows += wanted
            row_G, rows_with_room[room] = np.split(rows_with_room[room], [wanted])
            placed_G, piece_G = np.split(piece_G, [len(row_G) * fit])
            index_G = np.arange(len(placed_G))
            row_P[placed_G] = row_G[index_G // fit]
            column_P[placed_G] = length - room + index_G % fit * width
            for rows, pieces in ((row_G[:-1], fit), (row_G[-1:], index_G[-1] % fit + 1)):
                left = room - pieces * width
                rows_with_room[left] = np.concatenate([rows_with_room[left], rows])
    return row_P, column_P
