"""Strings with an old and a new answer that are tied as often as one wishes: fine-tuning data of arXiv 2311.12786.

A capability with operand O_PT is fine-tuned to another, O_FT. A string is *tied* if r(x, O_FT) - r(x, O_PT) = q; a
share C of the strings is (C_Tr in training, C_Te in tests), the rest never is. Two tasks: the Counter (how many `a`;
how many `b`) and the Max-identifier (the letter of one rank; of another). The paper has no recipe for C; this is ours.

All strings of one size with the same two answers are equally likely, so a task is a small table over (size, old answer,
new answer), exact in float64 (`Tables`), from which `sample` draws and `base_rates` reads what simple rules score. C is
data: a bank of fine-tunings of other C shares one program. To exchange the roles of the operands (a model that counts
b, tuned to count a), exchange `pt_B` and `ft_B` of the rows.

Ids: letters are 0..V-1, BOS is V, PAD is V + 1. Rows are [BOS, x_1, ..., x_n, PAD, ...]. Letters: L letters of the
longest string, T = L + 1 positions, V letters of the alphabet, A values of a label, X cells of a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert6_jax.errors import InputError

ALPHABET = 26
INDEPENDENT = ("conditional", "nudged")
HALF = 1 << 31


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, so it may be a static argument
class Tables:
    """The exact distribution of (size, old answer, new answer), given that a row is tied and given that it is not."""

    length: int  # [L]
    letters: int  # [V]
    labels: int  # [A] answers are 0..A-1: counts 0..L or ids of letters
    q: int
    ranks: tuple[int, int] | None  # of the Max-identifier's old and new answer, 0-based; None: the Counter
    cell_X3: np.ndarray  # int32: letters in the string, old answer, new answer; the tied cells first
    tied_X: np.ndarray  # bool: new answer - old answer = q
    weight_X: np.ndarray  # float64, above 0; sums to 1 over the tied cells, and to 1 over the others


class Rows(NamedTuple):
    """Strings and both of their answers."""

    ids_BT: jax.Array  # int32
    segment_BT: jax.Array  # int32, 0 at pads and 1 elsewhere
    pt_B: jax.Array  # int32, r(x, O_PT): a count or the id of a letter
    ft_B: jax.Array  # int32, r(x, O_FT)
    tied_B: jax.Array  # bool


# --- tables ----------------------------------------------------------------------------------------------------------


def counter_tables(length: int, letters: int = 9, q: int = 1, independent: str = "conditional") -> Tables:
    """How many `a` (letter 0, O_PT) and how many `b` (letter 1, O_FT) a string of `length` letters has.

    a ~ Bin(L, 1/V). Of a tied row b = a + q, and a is kept to what leaves room for it. Of an untied row
    b ~ Bin(L - a, 1/(V - 1)), as in uniform strings, but never a + q, by one of two rules:

      conditional: that value is left out and the others of the same a are scaled up, so that what else is frequent
        stays as in uniform strings;
      nudged: it becomes a + q - 1 or a + q + 1, with equal chances where both are counts that fit. With q = 1 this
        makes a = b more frequent, and a perfect counter of b scores on a.

    Raises:
      InputError: sizes out of range, another rule, or a q with which no string is tied.
    """
    check_whole("length", length, 1)
    check_whole("letters", letters, 3, ALPHABET)
    check_whole("q", q)
    if independent not in INDEPENDENT:
        raise InputError(f"independent is {independent!r}; choose one of {', '.join(INDEPENDENT)}")
    tied: dict[tuple[int, int, int], float] = {}
    free: dict[tuple[int, int, int], float] = {}
    for a in range(length + 1):
        p, room = _binomial(length, letters, a), length - a
        if p and 0 <= a + q <= room:
            tied[length, a, a + q] = p
        p_b = {b: _binomial(room, letters - 1, b) for b in range(room + 1)}
        lost = p_b.pop(a + q, 0.0)
        if independent == "nudged":
            beside = [b for b in (a + q - 1, a + q + 1) if b in p_b]
            p_b |= {b: p_b[b] + lost / len(beside) for b in beside}
        whole = sum(p_b.values())
        free |= {(length, a, b): p * p_b[b] / whole for b in p_b}
    if not tied:
        raise InputError(f"q is {q}: no string of {length} letters has b = a + q; give a q from {-length} to {length}")
    return _tables(length, letters, length + 1, q, None, tied, free)


def max_tables(
    length: int = 10,
    sizes: Sequence[int] = (9, 10),
    rank_pt: int = 4,
    rank_ft: int = 6,
    q: int = 3,
    letters: int = ALPHABET,
) -> Tables:
    """Which letters have the ranks `rank_pt` (O_PT) and `rank_ft` (O_FT), 0-based from the smallest, in a string.

    A string has n different letters, n uniform over `sizes` whether tied or not (so n does not tell which), and pads up
    to `length`. All sets of n letters are equally likely among the tied (new letter - old letter = q) and among the
    others. The defaults are the paper's 5th and 7th with q = 3.

    Raises:
      InputError: sizes or ranks out of range, or an n with which no string, or every string, is tied.
    """
    check_whole("letters", letters, 2, ALPHABET)
    check_whole("length", length, 1)
    if not sizes or len(set(sizes)) < len(sizes):
        raise InputError(f"sizes are {tuple(sizes)!r}; give different numbers of letters, one at least")
    for n in sizes:
        check_whole("a size", n, 2, min(length, letters))
    for name, rank in (("rank_pt", rank_pt), ("rank_ft", rank_ft)):
        check_whole(name, rank, 0, min(sizes) - 1)
    check_whole("q", q)
    if rank_pt == rank_ft:
        raise InputError(f"rank_pt and rank_ft are both {rank_pt}; give different ranks")
    low, high = sorted((rank_pt, rank_ft))
    tied: dict[tuple[int, int, int], float] = {}
    free: dict[tuple[int, int, int], float] = {}
    for n in sizes:
        sets: dict[tuple[int, int, int], int] = {}  # how many have these two letters at the two ranks
        for x in range(letters):
            for y in range(x + 1, letters):
                count = math.comb(x, low) * math.comb(y - x - 1, high - low - 1)
                count *= math.comb(letters - 1 - y, n - 1 - high)
                if count:
                    sets[(n, x, y) if rank_pt < rank_ft else (n, y, x)] = count
        for table, is_tied in ((tied, True), (free, False)):
            part = {cell: count for cell, count in sets.items() if (cell[2] - cell[1] == q) == is_tied}
            if not part:
                which = "no" if is_tied else "every"
                raise InputError(
                    f"q is {q}: {which} string of {n} different letters of {letters} has letters that far apart at "
                    f"ranks {rank_pt} and {rank_ft}; give another q, other ranks or sizes"
                )
            table |= {cell: count / sum(part.values()) / len(sizes) for cell, count in part.items()}
    return _tables(length, letters, letters, q, (rank_pt, rank_ft), tied, free)


def _tables(length, letters, labels, q, ranks, tied: Mapping, free: Mapping) -> Tables:
    weight_X = np.concatenate([np.array([*part.values()]) / sum(part.values()) for part in (tied, free)])
    cell_X3, tied_X = np.array([*tied, *free], np.int32), np.arange(weight_X.size) < len(tied)
    kept_X = weight_X > 0  # what is too rare for float64 is no cell
    return Tables(length, letters, labels, q, ranks, cell_X3[kept_X], tied_X[kept_X], weight_X[kept_X])


def _binomial(n: int, m: int, k: int) -> float:
    """P(k of n) with chance 1/m, from whole numbers."""
    return math.comb(n, k) * (m - 1) ** (n - k) / m**n


def check_whole(name: str, value, low: int | None = None, high: int | None = None) -> None:
    """Raises InputError unless `value` is a whole number from `low` to `high`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or (low is not None and value < low) or (high is not None and value > high):
        span = "" if low is None else f" from {low} on" if high is None else f" from {low} to {high}"
        raise InputError(f"{name} is {value!r}; it must be a whole number{span}")


def _check_correlation(correlation) -> None:
    if isinstance(correlation, int | float | np.number) and not 0 <= correlation <= 1:
        raise InputError(f"correlation is {correlation}; the share of tied rows is a number from 0 to 1")


def joint(tables: Tables, correlation: float) -> np.ndarray:
    """P(old answer, new answer) where a share `correlation` of the rows is tied: float64 [A, A]."""
    _check_correlation(correlation)
    p_AA = np.zeros((tables.labels, tables.labels))
    _, pt_X, ft_X = tables.cell_X3.T
    np.add.at(p_AA, (pt_X, ft_X), np.where(tables.tied_X, correlation, 1 - correlation) * tables.weight_X)
    return p_AA


def base_rates(tables: Tables, correlation: float) -> dict[str, float]:
    """What accuracies are to be read against, exact numbers of the population where a share `correlation` is tied.

    Returns:
      same: P(both answers alike), the accuracy on one operand of a model that answers for the other;
      offset: P(new = old + q), the accuracy on O_FT of the old answer + q (this is `correlation` itself);
      constant_pt, constant_ft: the share of the most frequent answer, the accuracy of the best constant;
      ft_from_pt: the best accuracy on O_FT of a rule that knows nothing but the old answer;
      pt_from_ft: the other way round.
    """
    p_AA = joint(tables, correlation)
    return {
        "same": float(np.trace(p_AA)),
        "offset": float(np.trace(p_AA, offset=tables.q)),
        "constant_pt": float(p_AA.sum(1).max()),
        "constant_ft": float(p_AA.sum(0).max()),
        "ft_from_pt": float(p_AA.max(1).sum()),
        "pt_from_ft": float(p_AA.max(0).sum()),
    }


# --- rows ------------------------------------------------------------------------------------------------------------


def sample(key: jax.Array, tables: Tables, correlation: jax.Array | float, n_rows: int) -> Rows:
    """Independent rows, each tied with chance `correlation`: 1 ties all of them and 0 none.

    Jits with `tables` and `n_rows` static, and vmaps over `key` and `correlation` (a scalar). Of a Counter row the
    places of the a and b are uniform and the other letters are uniform over V - 2; of a Max-identifier row the other
    letters are uniform among those that leave the two their ranks, and the order is uniform.

    Raises:
      InputError: `n_rows` below 1, or a `correlation` that is a number outside 0..1 (arrays are not checked).
    """
    check_whole("n_rows", n_rows, 1)
    L, V = tables.length, tables.letters
    # one draw for all: threefry compiles longer than it runs
    wide = L if tables.ranks is None else V
    bits = jax.random.bits(key, (n_rows, 2 + 2 * wide), jnp.uint32)
    tied_B, cell_B3 = cells(bits[:, :2], tables, correlation)
    size_B, pt_B, ft_B = cell_B3.T
    strings = _counter_strings if tables.ranks is None else _max_strings
    letter_BL = strings(tables, bits[:, 2 : 2 + wide], bits[:, 2 + wide :], size_B, pt_B, ft_B)
    inside_BL = jnp.arange(L)[None] < size_B[:, None]
    ids_BT = jnp.pad(jnp.where(inside_BL, letter_BL, V + 1), ((0, 0), (1, 0)), constant_values=V)
    segment_BT = jnp.pad(inside_BL.astype(jnp.int32), ((0, 0), (1, 0)), constant_values=1)
    return Rows(ids_BT.astype(jnp.int32), segment_BT, pt_B, ft_B, tied_B)


def cells(bits_B2: jax.Array, tables: Tables, correlation: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """Which rows are tied, each with chance `correlation`, and their (size, old answer, new answer), from random bits.

    Args:
      bits_B2: uint32, two words a row.

    Returns:
      tied_B (bool) and cell_B3 (int32).

    Raises:
      InputError: a `correlation` that is a number outside 0..1 (arrays are not checked).
    """
    _check_correlation(correlation)
    tied_B = share(bits_B2[:, 0]) < jnp.asarray(correlation, jnp.float32)
    edge_X, cell_X3 = _edges(tables)
    point_B = jnp.where(tied_B, jnp.uint32(0), jnp.uint32(HALF)) + (bits_B2[:, 1] >> 1)
    at_B = (edge_X[None] <= point_B[:, None]).sum(1, dtype=jnp.int32)
    return tied_B, jnp.asarray(cell_X3)[at_B]


def share(bits: jax.Array) -> jax.Array:
    """Words of random bits as numbers uniform in [0, 1), float32."""
    return (bits >> 8).astype(jnp.float32) * np.float32(2**-24)


def _edges(tables: Tables) -> tuple[np.ndarray, np.ndarray]:
    """Upper edges of all cells but the last, tied ones within 0..2^31, the others from there to 2^32; and the cells.

    Whole numbers, so that a tied row is in a tied cell whatever the rounding. Cells below 2^-32 have no width and go.
    """
    edge_X = np.empty(tables.weight_X.size, np.int64)
    for half, part in enumerate((tables.tied_X, ~tables.tied_X)):
        edge_X[part] = np.rint(np.cumsum(tables.weight_X[part]) * HALF).astype(np.int64) + half * HALF
        edge_X[np.flatnonzero(part)[-1]] = (half + 1) * HALF
    wide_X = np.diff(edge_X, prepend=0) > 0
    return edge_X[wide_X][:-1].astype(np.uint32), tables.cell_X3[wide_X]


def order_keys(bits: jax.Array) -> jax.Array:
    """Different keys above 0 within a row, from random words [B, X]: the lowest bits are the place."""
    low = bits.shape[-1].bit_length()
    return (bits >> low << low) | jnp.arange(1, bits.shape[-1] + 1, dtype=jnp.uint32)[None]


def before(key: jax.Array, among: jax.Array | bool) -> jax.Array:
    """For every place of a row how many `among` the others (bool [B, 1 or X, X]) have a lower key: int32 [B, X]."""
    # by comparison: a sort compiles, and for so few runs, longer
    return ((key[:, None] < key[:, :, None]) & among).sum(-1, dtype=jnp.int32)


def _counter_strings(tables: Tables, order_bits, letter_bits, _, a_B, b_B) -> jax.Array:
    rank_BL = before(order_keys(order_bits), True)
    other_BL = 2 + (letter_bits % np.uint32(tables.letters - 2)).astype(jnp.int32)
    is_ab_BL = rank_BL < (a_B + b_B)[:, None]
    return jnp.where(is_ab_BL, (rank_BL >= a_B[:, None]).astype(jnp.int32), other_BL)


def _max_strings(tables: Tables, choice_bits, order_bits, size_B, pt_B, ft_B) -> jax.Array:
    low, high = sorted(tables.ranks)
    v_V = jnp.arange(tables.letters, dtype=jnp.int32)
    given = (v_V[None] == pt_B[:, None]) | (v_V[None] == ft_B[:, None])
    # three parts of the alphabet, each up to and with a given letter, which comes first; the rest fills them at random
    part_BV = sum((v_V[None] > x_B[:, None]).astype(jnp.int32) for x_B in (pt_B, ft_B))
    room_BV = jnp.where(part_BV == 0, low + 1, jnp.where(part_BV == 1, high - low, (size_B - high - 1)[:, None]))
    key_BV = jnp.where(given, jnp.uint32(0), order_keys(choice_bits))
    in_BV = before(key_BV, part_BV[:, None] == part_BV[:, :, None]) < room_BV
    place_BV = before(order_keys(order_bits), in_BV[:, None])
    here_BLV = in_BV[:, None] & (place_BV[:, None] == jnp.arange(tables.length, dtype=jnp.int32)[None, :, None])
    return jnp.where(here_BLV, v_V[None, None], 0).sum(-1, dtype=jnp.int32)
