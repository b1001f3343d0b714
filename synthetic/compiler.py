"""RASP programs to parameters of our transformer, after Tracr (arXiv 2301.05062) as arXiv 2311.12786 uses it.

    compiled = compile_program(rasp.counter("a"), "abcdefghi", length=20)
    run(compiled, ["abca", "bb"])            # what the model says at every token
    output_logits(compiled.params, *encode(compiled.layout, ["abca"]), compiled.layout)    # [B, T, A]

Every sequence of a program takes values from a finite set that is known beforehand; in the residual stream it is a
one-hot over that set, in dimensions of its own (`Layout.basis` names them), and no value is the zero vector. A row is
BOS, tokens, PAD. BOS carries nothing but itself and `one`: a head looks at it where nothing is selected.

    Map               one hidden unit a value of the image
    SequenceMap       one hidden unit a pair of values, relu(x + y - 1)
    SelectorWidth     a head that gives 1 / (n + 1), BOS being selected too; then steps from that to the one-hot of n
    Aggregate         a head that copies the one-hot; a default is what token positions hold beforehand, and what the
                      head takes away where a token is selected
    numeric mean      a head that gives the mean, moved to [1, 2] (BOS: 0), then steps to the one-hot of the exact mean
    & | ~             one predicate over tuples of keys and of queries, which an MLP makes (ours)

A step at a threshold t is relu(exactness (x - t) + 1) - relu(exactness (x - t)): it rises just below t. With midpoints
of 1 / (n + 1), counts up to n are right by argmax if exactness > n (n + 1), and clean from 2 n (n + 1) on. Left to
itself the compiler takes a power of two and thresholds that are multiples of its inverse, so that float32 makes no
error in the difference of two large numbers; and attention so sharp that what leaks is below float32's resolution
(ours).

Everything runs as early as what it reads allows. What would not be exact is refused in one line that names it.
Letters: A values of the output, Q values of a selector's queries, K of its keys.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bert6_jax import checkpoint, transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError
from synthetic import rasp
from synthetic.rasp import AMBIGUOUS, Aggregate, Combine, Expr, Select, Selector, SelectorWidth, SOp, Value, label

MAX_VALUES = 4096  # of one sequence: a dimension each
MAX_UNITS = 16_384  # hidden units of one expression
MAX_PARAMETERS = 2**28  # 1 GiB
MAX_EXACTNESS = 2**18  # where an unlucky order of float32 sums is off by at most 2^-5

# A categorical aggregate writes a little less than 1: rounded up, relu(x + y - 1) would fire for every pair of the
# value that is there. Its error is this and the rounding of a softmax over a row.
_SHRINK = 2.0**-19
_ERROR = 2.0**-18


@dataclass(frozen=True)
class Layout:
    """What the numbers of a compiled model mean; static and hashable, it goes with `jit`.

    Ids 0.. are `vocab`'s, then BOS and PAD. `basis` names every dimension of the residual stream ("tokens:a",
    "count:4"). The output's one-hot lies in the dimensions `output[0]` up to, without, `output[1]`, for `values` in
    this order. `program` is how the program is called.
    """

    config: TransformerConfig
    vocab: tuple
    basis: tuple[str, ...]
    output: tuple[int, int]
    values: tuple
    program: str

    @property
    def bos_id(self) -> int:
        return len(self.vocab)

    @property
    def pad_id(self) -> int:
        return len(self.vocab) + 1

    @property
    def length(self) -> int:
        """Tokens that a sequence may have; rows are one longer, for BOS."""
        return self.config.max_len - 1


class Compiled(NamedTuple):
    params: dict[str, Any]
    layout: Layout


class Mismatch(NamedTuple):
    """Where a model says something else than its program: `position` counts tokens from 0."""

    sequence: tuple
    position: int
    expected: Value
    got: Value


# --- the program's parts, placed in the residual stream --------------------------------------------------------------


@dataclass(frozen=True)
class _Node:
    """A sequence in the stream: one-hot from `start` on, there after half-block `ready` (2 b: attention of block b,
    2 b + 1: its MLP; -1: the embedding); `error` bounds how far the one-hot is off."""

    start: int
    values: tuple
    ready: int = -1
    error: float = 0.0

    @property
    def dims(self) -> np.ndarray:
        return np.arange(self.start, self.start + len(self.values))


class _Selection(NamedTuple):
    """A selector: over tuples of the values of `keys`, of `queries` (in the order of the program)."""

    keys: tuple[SOp, ...]
    queries: tuple[SOp, ...]
    chosen_QK: np.ndarray


class _Head(NamedTuple):
    half: int
    query: _Node
    key: _Node
    chosen_QK: np.ndarray
    bos: float  # the score of BOS, in parts of that of a selected key
    value: tuple[np.ndarray, np.ndarray, np.ndarray]  # dimensions, columns, coefficients
    out: np.ndarray  # the dimension of every column
    reads: int = 1  # width of what it reads; Tracr's head is as wide as this with BOS, the queries with BOS and `one`


class _Units(NamedTuple):
    half: int
    count: int
    reads: list[tuple]  # dimensions, units, coefficients
    writes: list[tuple]  # units, dimensions, coefficients


def compile_program(
    program: SOp,
    vocab: Sequence[Value],
    length: int,
    *,
    exactness: float | None = None,
    sharpness: float | None = None,
) -> Compiled:
    """The transformer that computes a program on up to `length` tokens of `vocab`.

    Args:
      exactness: slope of every step from a scalar to a one-hot, Tracr's `mlp_exactness` (its default is 100). None:
        what the closest two scalars need.
      sharpness: score of a selected key before the division by sqrt(head width); 100 is Tracr's and the paper's. None:
        leaks stay below 2^-24 at any length. Settings that are given are taken as they are, also where the model is
        wrong by them: `verify` shows it.

    Raises:
      InputError: bad vocabulary, length or setting; a cycle; a function that fails on a value that may come; a set of
        values or a model that gets too large; a mean of what is no number; values that float32 cannot tell apart. One
        line each, which names the expression.
    """
    order = rasp.check(program)
    builder = _Builder(_vocabulary(vocab), length, exactness, sharpness)
    for expr in order:
        builder.add(expr)
    return builder.build(program)


def _vocabulary(vocab: Sequence[Value]) -> tuple:
    values = tuple(rasp._checked(rasp.tokens, value) for value in vocab)
    if not values:
        raise InputError("the vocabulary is empty; give at least one token")
    for value in values:
        if value is None or value is AMBIGUOUS:
            raise InputError(f"the vocabulary holds {value!r}, which is no value; give the token another name")
    first: dict[Value, Value] = {}
    for value in values:
        if value in first:
            raise InputError(
                f"the vocabulary holds {first[value]!r} and {value!r}, which are equal; give each token once"
            )
        first[value] = value
    return values


def _kind(value: Value) -> Any:
    """What tells equal values apart: True and 1, 0.0 and -0.0."""
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    return repr(value) if isinstance(value, float) else type(value)


def _value_set(expr: Expr, values, arrange: bool = True) -> tuple:
    """The different values in order, if they have one; equal ones of two types could not be told apart."""
    known: dict[Value, Value] = {}
    for value in values:
        first = known.setdefault(value, value)
        if first is not value and _kind(first) != _kind(value):
            raise InputError(
                f"{label(expr)} has the values {first!r} and {value!r}, which are equal but not the same; give all "
                "values one type"
            )
        if len(known) > MAX_VALUES:
            raise InputError(
                f"{label(expr)} has more than {MAX_VALUES:,} values; map what it reads to fewer values, or lower the "
                "length"
            )
    if arrange:
        try:
            return tuple(sorted(known))
        except TypeError:
            pass
    return tuple(known)


def _places(values: tuple) -> dict[Value, int]:
    return {value: place for place, value in enumerate(values)}


class _Builder:
    """Places expressions one after the other; `build` makes the arrays."""

    def __init__(self, vocab: tuple, length: int, exactness: float | None, sharpness: float | None):
        if not isinstance(length, int | np.integer) or isinstance(length, bool) or length < 1:
            raise InputError(f"length is {length!r}; a model is compiled for a whole number of tokens from 1 on")
        for what, size in (("length", length), ("the vocabulary", len(vocab))):
            if size > MAX_VALUES:
                raise InputError(f"{what} is {size:,}, there is room for {MAX_VALUES:,}; choose a smaller one")
        for name, value in (("exactness", exactness), ("sharpness", sharpness)):
            if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise InputError(f"{name} is {value!r}; it must be a positive number, or None to have it chosen")
        self.vocab, self.length, self.exactness, self.sharpness = vocab, int(length), exactness, sharpness
        self.basis = [f"tokens:{value}" for value in vocab] + ["tokens:BOS", "tokens:PAD"]
        self.basis += [f"indices:{i}" for i in range(self.length)] + ["one"]
        self.bos, self.one = len(vocab), len(vocab) + 2 + self.length
        self.nodes: dict[Any, _Node] = {}
        self.selections: dict[Selector, _Selection] = {}
        self.held: list[tuple[int, float]] = []  # dimensions that token embeddings hold, and how much of them
        self.heads: list[_Head] = []
        self.units: list[_Units] = []
        self.named: dict[str, int] = {}
        # BOS, at half the score, stays above all of a row's unselected keys together by 2^24
        self.gap = 2 * math.log((self.length + 1) * 2.0**24)

    def add(self, expr: Expr) -> None:
        """Place an expression; what it reads is placed already."""
        if isinstance(expr, Select):
            self.selections[expr] = self._select(expr)
        elif isinstance(expr, Combine):
            self.selections[expr] = self._combine(expr)
        elif isinstance(expr, rasp.Tokens):
            self.nodes[expr] = _Node(0, self.vocab)
        elif isinstance(expr, rasp.Indices):
            self.nodes[expr] = _Node(self.bos + 2, tuple(range(self.length)))
        elif isinstance(expr, rasp.Constant):
            values = () if expr.value is None else (rasp._checked(expr, expr.value),)
            self.nodes[expr] = node = self._place(expr, values)
            self.held += [(dim, 1.0) for dim in node.dims]
        elif isinstance(expr, rasp.Map | rasp.SequenceMap):
            self.nodes[expr] = self._map(expr)
        elif isinstance(expr, SelectorWidth):
            self.nodes[expr] = self._width(expr)
        elif expr.numeric:
            self.nodes[expr] = self._mean(expr)
        else:
            self.nodes[expr] = self._aggregate(expr)

    def _dims(self, name: str, what: Sequence[str]) -> int:
        start = len(self.basis)
        self.basis += [f"{name}:{text}" for text in what]
        return start

    def _name(self, name: str) -> str:
        number = self.named[name] = self.named.get(name, 0) + 1
        return name if number == 1 else f"{name} ({number})"

    def _place(self, expr: Expr, values: tuple, **fields) -> _Node:
        return _Node(self._dims(self._name(label(expr)), list(map(str, values))), values, **fields)

    # maps

    def _map(self, expr: rasp.Map | rasp.SequenceMap) -> _Node:
        parts = rasp.parts(expr)
        if len(parts) == 2 and parts[0] is parts[1]:  # of one sequence: its two values are always the same
            nodes = (self.nodes[parts[0]],)
            images = [rasp.apply(expr, value, value) for value in nodes[0].values]
        else:
            nodes = tuple(self.nodes[part] for part in parts)
            self._room(expr, nodes, MAX_UNITS)
            images = [rasp.apply(expr, *values) for values in itertools.product(*(node.values for node in nodes))]
        there = np.array([image is not None for image in images], bool)
        images = [image for image in images if image is not None]
        values = _value_set(expr, images)
        places = _places(values)
        place = np.array([places[image] for image in images], int)
        half = _half(1, nodes)
        node = self._place(expr, values, ready=half, error=self._errors(expr, nodes))
        if len(nodes) == 1:  # the table in front, the identity behind
            reads = [(nodes[0].dims[there], place, 1.0)]
            writes = [(np.arange(len(values)), node.dims, 1.0)]
            self.units.append(_Units(half, len(values), reads, writes))
        else:
            self._pairs(half, nodes, there, node.start + place)
        return node

    def _room(self, expr: Expr, nodes: Sequence[_Node], room: int) -> None:
        count = math.prod(len(node.values) for node in nodes)
        if count > room:
            sizes = " x ".join(f"{len(node.values):,}" for node in nodes)
            raise InputError(
                f"{label(expr)} joins {sizes} = {count:,} values, there is room for {room:,}; map them to fewer values "
                "first, or lower the length"
            )

    def _pairs(self, half: int, nodes: Sequence[_Node], there: np.ndarray, out: np.ndarray) -> None:
        """A unit for each tuple of values that has an image: on where all its values are there."""
        grid = np.meshgrid(*(node.dims for node in nodes), indexing="ij")
        units = np.arange(len(out))
        reads = [(dims.ravel()[there], units, 1.0) for dims in grid]
        reads.append((np.full(len(out), self.one), units, 1.0 - len(nodes)))
        self.units.append(_Units(half, len(out), reads, [(units, out, 1.0)]))

    def _join(self, parts: tuple[SOp, ...], expr: Expr) -> _Node:
        """The tuple of several sequences."""
        if len(parts) == 1:
            return self.nodes[parts[0]]
        if parts not in self.nodes:
            nodes = tuple(self.nodes[part] for part in parts)
            values = tuple(itertools.product(*(node.values for node in nodes)))
            name = self._name(f"({', '.join(label(part) for part in parts)})")
            start = self._dims(name, list(map(str, values)))
            half = _half(1, nodes)
            self.nodes[parts] = node = _Node(start, values, half, self._errors(expr, nodes))
            self._pairs(half, nodes, np.ones(len(values), bool), node.dims)
        return self.nodes[parts]

    def _errors(self, expr: Expr, nodes: Sequence[_Node]) -> float:
        return self._bearable(expr, sum(node.error for node in nodes), 2.0**-4)

    def _bearable(self, expr: Expr, error: float, most: float) -> float:
        if error > most and self.exactness is None and self.sharpness is None:
            raise InputError(
                f"{label(expr)} would be off by rounding errors of what it reads, which float32 cannot hold apart; "
                "lower the length or join fewer aggregates in it"
            )
        return error

    # selectors

    def _select(self, expr: Select) -> _Selection:
        keys, queries = self.nodes[expr.keys].values, self.nodes[expr.queries].values
        chosen = [[rasp.selects(expr, key, query) for key in keys] for query in queries]
        return _Selection((expr.keys,), (expr.queries,), np.array(chosen, bool).reshape(len(queries), len(keys)))

    def _combine(self, expr: Combine) -> _Selection:
        a = self.selections[expr.a]
        if expr.how == "not":
            return a._replace(chosen_QK=~a.chosen_QK)
        b = self.selections[expr.b]
        number = {node: i for i, node in enumerate(self.nodes)}
        keys, queries = (tuple(sorted({*x, *y}, key=number.get)) for x, y in ((a.keys, b.keys), (a.queries, b.queries)))
        for parts in (keys, queries):
            self._room(expr, [self.nodes[part] for part in parts], MAX_VALUES)
        sides = []
        for selection in (a, b):
            own_queries, own_keys = set(selection.queries), set(selection.keys)  # sets: == makes an expression
            axes = [(part in own_queries, part) for part in queries] + [(part in own_keys, part) for part in keys]
            small = [len(self.nodes[part].values) if there else 1 for there, part in axes]
            full = [len(self.nodes[part].values) for _, part in axes]
            sides.append(np.broadcast_to(selection.chosen_QK.reshape(small), full))
        chosen = sides[0] & sides[1] if expr.how == "and" else sides[0] | sides[1]
        shape = [math.prod(len(self.nodes[part].values) for part in parts) for parts in (queries, keys)]
        return _Selection(keys, queries, chosen.reshape(shape))

    def _attend(self, expr: SelectorWidth | Aggregate, x: _Node | None) -> tuple[int, _Node, _Node, _Selection, float]:
        selection = self.selections[expr.selector]
        query, key = self._join(selection.queries, expr.selector), self._join(selection.keys, expr.selector)
        error = self.gap * (query.error + key.error)
        half = _half(0, (query, key) if x is None else (query, key, x))
        return half, query, key, selection, error

    # what attention gives

    def _width(self, expr: SelectorWidth) -> _Node:
        most = self.length
        half, query, key, selection, error = self._attend(expr, None)
        name = self._name(label(expr))
        x = self._dims(name, ["1/(n+1)"])
        node = _Node(self._dims(name, [str(n) for n in range(most + 1)]), tuple(range(most + 1)), half + 1)
        self._bearable(expr, error + _ERROR, 1 / (8 * (most + 1)))
        value = (np.array([self.bos]), np.array([0]), np.ones(1))
        self.heads.append(_Head(half, query, key, selection.chosen_QK, 1.0, value, np.array([x])))
        points = 1.0 / np.arange(most + 1, 0, -1)
        steps = self._steps(expr, half + 1, x, points, node.dims[::-1], 1.0)
        last = steps.count  # BOS selects itself alone, as a count of 0 does: take away what comes of it
        reads = [*steps.reads, (np.array([self.one, self.bos]), np.array([last, last + 1]), 1.0)]
        writes = [*steps.writes, (np.array([last]), node.dims[-1:], 1.0)]
        writes.append((np.array([last + 1, last + 1]), np.array([x, node.start]), -1.0))
        self.units.append(_Units(half + 1, last + 2, reads, writes))
        return node

    def _aggregate(self, expr: Aggregate) -> _Node:
        x = self.nodes[expr.x]
        half, query, key, selection, error = self._attend(expr, x)
        self._bearable(expr, error, 1.0)
        default = None if expr.default is None else rasp._checked(expr, expr.default)
        values = _value_set(expr, x.values if default is None else (*x.values, default), arrange=False)
        one = 1.0 if self.sharpness is not None else 1.0 - _SHRINK
        node = self._place(expr, values, ready=half, error=self._bearable(expr, x.error + _ERROR, 2.0**-4))
        dims, columns, coefficients = x.dims, np.arange(len(x.values)), np.full(len(x.values), one)
        if default is not None:
            place = _places(values)[default]
            self.held.append((node.start + place, one))
            V = len(self.vocab)
            dims = np.concatenate([dims, np.arange(V)])
            columns = np.concatenate([columns, np.full(V, place)])
            coefficients = np.concatenate([coefficients, np.full(V, -1.0)])
        value = (dims, columns, coefficients)
        self.heads.append(_Head(half, query, key, selection.chosen_QK, 0.5, value, node.dims, len(x.values) + 1))
        return node

    def _mean(self, expr: Aggregate) -> _Node:
        x = self.nodes[expr.x]
        half, query, key, selection, error = self._attend(expr, x)
        # every index is there once: a query selects no more of them than its row of the matrix holds
        most = self.length
        if any(isinstance(part, rasp.Indices) for part in selection.keys):
            most = min(most, int(selection.chosen_QK.sum(1).max(initial=0)))
        means = _means(expr, x.values, most)
        default = None if expr.default is None else rasp._checked(expr, expr.default)
        values = _value_set(expr, means if default is None else (*means, default), arrange=False)
        name = self._name(label(expr))
        scalar = self._dims(name, ["mean"])
        node = _Node(self._dims(name, list(map(str, values))), values, half + 1)

        low = min(means, default=0)
        scale = max(means, default=0) - low or 1
        points = np.array([0.0] + [float((Fraction(mean) - low) / scale + 1) for mean in means])
        numbers = np.array([float((Fraction(value) - low) / scale + 1) for value in x.values] if means else [])
        value = (x.dims[: len(numbers)], np.zeros(len(numbers), int), numbers)
        self.heads.append(_Head(half, query, key, selection.chosen_QK, 0.5, value, np.array([scalar])))
        self._bearable(expr, 2 * (error + x.error + _ERROR), np.diff(points).min(initial=1.0) / 8)

        outs = np.concatenate([[-1], node.dims[: len(means)]])
        if default is not None:
            outs[0] = node.start + _places(values)[default]
        steps = self._steps(expr, half + 1, scalar, points, outs, float(scale))
        if default is not None:  # at every token; at BOS nothing
            unit = steps.count
            reads = [*steps.reads, (np.array([self.one, self.bos]), np.array([unit, unit]), np.array([1.0, -1.0]))]
            writes = [*steps.writes, (np.array([unit]), outs[:1], 1.0)]
            steps = _Units(half + 1, unit + 1, reads, writes)
        self.units.append(steps)
        return node

    def _steps(self, expr: Expr, half: int, x: int, points: np.ndarray, outs: np.ndarray, scale: float) -> _Units:
        """From a scalar near one of the rising `points` to 1 in its dimension of `outs` (-1: none), but for the first
        point, which holds where no step is taken. `scale`: a unit of the scalar in those of `exactness`."""
        thresholds = (points[:-1] + points[1:]) / 2
        if self.exactness is not None:
            slope = float(self.exactness) * scale
            heights = slope * thresholds
        else:
            gap = np.diff(points).min(initial=1.0).clip(2.0**-40)
            slope = 2.0 ** math.ceil(math.log2(4 / gap))
            if slope > MAX_EXACTNESS:
                raise InputError(
                    f"{label(expr)} has values too close to tell apart in float32 (exactness {slope:.0f}, at most "
                    f"{MAX_EXACTNESS}); lower the length or map what is aggregated to fewer values"
                )
            # Multiples of 1 / slope: then slope * x, its distances from them and their differences are exact in float32
            heights = np.round(slope * thresholds)
        early = 2 * np.arange(len(thresholds))
        late, units = early + 1, np.arange(2 * len(thresholds))
        reads = [(np.full(len(units), x), units, slope)]
        reads += [(np.full(len(early), self.one), early, 1 - heights), (np.full(len(early), self.one), late, -heights)]
        writes = []
        for dims, sign in ((outs[1:], 1.0), (outs[:-1], -1.0)):
            there = dims >= 0
            writes += [(early[there], dims[there], sign), (late[there], dims[there], -sign)]
        return _Units(half, len(units), reads, writes)

    # the arrays

    def build(self, program: SOp) -> Compiled:
        V, T, D = len(self.vocab) + 2, self.length + 1, len(self.basis)
        L = max((part.half // 2 + 1 for part in (*self.heads, *self.units)), default=1)
        heads_L, units_L = [0] * L, [0] * L
        for head in self.heads:
            heads_L[head.half // 2] += 1
        for units in self.units:
            units_L[units.half // 2] += units.count
        sizes = [max(len(h.query.values) + 2, len(h.key.values) + 1, len(h.out), h.reads) for h in self.heads]
        N, H, F = max(1, *heads_L), max(sizes, default=1), max(1, *units_L)
        count = (V + T) * D + L * (4 * D * N * H + 3 * N * H + 2 * D * F + F + 2 * D)
        if count > MAX_PARAMETERS:
            wide = max(self.nodes, key=lambda expr: len(self.nodes[expr].values))
            name = label(wide) if isinstance(wide, Expr) else f"the tuple of {', '.join(map(label, wide))}"
            raise InputError(
                f"{label(program)} needs {count:,} parameters, there is room for {MAX_PARAMETERS:,}; lower the length, "
                f"or map {name} ({len(self.nodes[wide].values):,} values) to fewer values"
            )
        cfg = TransformerConfig(V, width=D, blocks=L, heads=N, head_width=H, mlp_width=F, max_len=T, types=0,
                                norm="none", activation="relu", head="none")  # fmt: skip
        params = _zeros(cfg)
        token_VD, attn, mlp = params["embed"]["token"], params["blocks"]["attn"], params["blocks"]["mlp"]
        token_VD[np.arange(V), np.arange(V)] = 1.0
        token_VD[:, self.one] = 1.0
        for dim, amount in self.held:
            token_VD[: len(self.vocab), dim] = amount
        params["embed"]["position"][np.arange(1, T), np.arange(V, V + T - 1)] = 1.0

        sharpness = self.gap * math.sqrt(H) if self.sharpness is None else float(self.sharpness)
        q, k, v, out = (attn[name]["kernel"] for name in ("q", "k", "v", "out"))
        next_L = [0] * L
        for head in self.heads:
            b = head.half // 2
            at = next_L[b] * H
            next_L[b] += 1
            K = len(head.key.values)
            q[b, head.query.dims, at : at + K] = sharpness * head.chosen_QK
            q[b, self.one, at + K] = sharpness * head.bos
            k[b, head.key.dims, at + np.arange(K)] = 1.0
            k[b, self.bos, at + K] = 1.0
            dims, columns, coefficients = head.value
            np.add.at(v, (b, dims, at + columns), coefficients)
            out[b, at + np.arange(len(head.out)), head.out] = 1.0
        next_L = [0] * L
        for units in self.units:
            b = units.half // 2
            for dims, unit, coefficient in units.reads:
                np.add.at(mlp["in"]["kernel"], (b, dims, next_L[b] + unit), coefficient)
            for unit, dims, coefficient in units.writes:
                np.add.at(mlp["out"]["kernel"], (b, next_L[b] + unit, dims), coefficient)
            next_L[b] += units.count
        node = self.nodes[program]
        output = (node.start, node.start + len(node.values))
        layout = Layout(cfg, self.vocab, tuple(self.basis), output, node.values, label(program))
        return Compiled(jax.device_put(params), layout)


def _zeros(cfg: TransformerConfig) -> dict[str, Any]:
    """The tree of `transformer.init`, in NumPy; tracing that takes longer than all the rest."""

    def dense(rows: int, columns: int) -> dict[str, np.ndarray]:
        kernel, bias = (cfg.blocks, rows, columns), (cfg.blocks, columns)
        return {"kernel": np.zeros(kernel, np.float32), "bias": np.zeros(bias, np.float32)}

    D, inner = cfg.width, cfg.heads * cfg.head_width
    attn = {name: dense(D, inner) for name in ("q", "k", "v")} | {"out": dense(inner, D)}
    mlp = {"in": dense(D, cfg.mlp_width), "out": dense(cfg.mlp_width, D)}
    table = {"token": np.zeros((cfg.vocab_size, D), np.float32), "position": np.zeros((cfg.max_len, D), np.float32)}
    return {"embed": table, "blocks": {"attn": attn, "mlp": mlp}}


def _half(parity: int, nodes: Sequence[_Node]) -> int:
    """The first half-block of a kind (0 attention, 1 MLP) after all of `nodes` are there."""
    after = max(node.ready for node in nodes) + 1
    return after + (after + parity) % 2


def _means(expr: Aggregate, values: tuple, most: int) -> list:
    """All exact means of 1 to `most` values, rising."""
    for value in values:
        rasp.mean(expr, [value])  # refuses what is no number
    numbers = [Fraction(value) for value in values]
    unit = math.lcm(*(number.denominator for number in numbers))
    whole = {int(number * unit) for number in numbers}
    means: set[Fraction] = set()
    sums = {0}
    for n in range(1, most + 1):
        sums = {total + number for total in sums for number in whole}
        means |= {Fraction(total, n * unit) for total in sums}
        if len(means) > MAX_VALUES:
            raise InputError(
                f"{label(expr)} can give more than {MAX_VALUES:,} different means; map what is averaged to fewer "
                "values, or lower the length"
            )
    return [rasp._checked(expr, mean) for mean in sorted(means)]


# --- the model on sequences ------------------------------------------------------------------------------------------


def encode(layout: Layout, sequences: Sequence[Sequence[Value]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows BOS, tokens, PAD: ids and segments (1; PAD 0), int32 [B, length + 1].

    Raises:
      InputError: a token outside of the vocabulary, a sequence that is too long.
    """
    ids = {(type(value), value): i for i, value in enumerate(layout.vocab)}
    ids_BT = np.full((len(sequences), layout.length + 1), layout.pad_id, np.int32)
    ids_BT[:, 0] = layout.bos_id
    for number, sequence in enumerate(sequences):
        if len(sequence) > layout.length:
            raise InputError(
                f"sequence {number} has {len(sequence)} tokens, the model is compiled for {layout.length}; shorten it "
                "or compile for a larger length"
            )
        for position, token in enumerate(sequence):
            token = token.item() if isinstance(token, np.generic) else token
            try:
                ids_BT[number, position + 1] = ids[type(token), token]
            except (KeyError, TypeError):
                known = ", ".join(map(str, layout.vocab[:12])) + (", ..." if len(layout.vocab) > 12 else "")
                raise InputError(
                    f"sequence {number} has {token!r:.40} at position {position}, which is not in the vocabulary "
                    f"({known}); replace it or compile with it"
                ) from None
    return ids_BT, (ids_BT != layout.pad_id).astype(np.int32)


def output_logits(params, ids_BT, segment_BT, layout: Layout, position: int | None = None) -> jax.Array:
    """The output's one-hot in the last residual stream, float32 [B, T, A], or [B, A] at one position of the row
    (BOS is 0, a program's index i is i + 1). Jits (`layout` and `position` static), vmaps and differentiates."""
    out_BTD, _ = transformer.forward(params, ids_BT, layout.config, segment_BT=segment_BT)
    logits_BTA = out_BTD[..., layout.output[0] : layout.output[1]]
    return logits_BTA if position is None else logits_BTA[:, position]


def decode(logits_BTA, segment_BT, layout: Layout) -> list[list[Value]]:
    """The values at a batch's tokens (BOS and PAD left out).

    A value where its logit is at least 3/4 and no other above 1/4: two values at equal shares have 1/2 each, attention
    at the paper's sharpness leaks 0.03. None where all of them together are below 1/4, else `rasp.AMBIGUOUS`. To read a
    model that has been trained on, take the argmax of its logits.
    """
    logits_BTA, rows = np.asarray(logits_BTA), []
    size_BTA = np.abs(logits_BTA)
    sum_BT = size_BTA.sum(-1)
    best_BT = logits_BTA.argmax(-1) if layout.values else np.zeros(sum_BT.shape, int)
    top_BT = logits_BTA.max(-1, initial=0.0)
    clear_BT = (top_BT >= 0.75) & ((size_BTA > 0.25).sum(-1) == 1)
    for row, length in enumerate(np.asarray(segment_BT).astype(bool).sum(1)):
        rows.append([
            layout.values[best_BT[row, t]] if clear_BT[row, t] else None if sum_BT[row, t] < 0.25 else AMBIGUOUS
            for t in range(1, length)
        ])  # fmt: skip
    return rows


_output_logits = jax.jit(output_logits, static_argnames=("layout", "position"))
_ROWS = 256  # rows of a dispatch


def run(compiled: Compiled, sequences: Sequence[Sequence[Value]]) -> list[list[Value]]:
    """What the model says at every token: `decode` of its logits, the products in full float32."""
    layout = compiled.layout
    ids_BT, segment_BT = encode(layout, sequences)
    size = min(_ROWS, 1 << max(len(sequences) - 1, 0).bit_length())  # few shapes, so few compilations
    rows: list[list[Value]] = []
    for start in range(0, len(ids_BT), size):
        ids, segment = ids_BT[start : start + size], segment_BT[start : start + size]
        padding = ((0, size - len(ids)), (0, 0))
        with jax.default_matmul_precision("highest"):
            logits_BTA = _output_logits(compiled.params, np.pad(ids, padding), np.pad(segment, padding), layout)
        rows += decode(np.asarray(logits_BTA)[: len(ids)], segment, layout)
    return rows


def verify(program: SOp, compiled: Compiled, sequences: Sequence[Sequence[Value]]) -> list[Mismatch]:
    """Where the model does not say what `rasp.evaluate` says; left out where that is `AMBIGUOUS`."""
    found = []
    for sequence, row in zip(sequences, run(compiled, sequences), strict=True):
        for position, (expected, got) in enumerate(zip(rasp.evaluate(program, sequence), row, strict=True)):
            if expected is not AMBIGUOUS and (got is AMBIGUOUS or got != expected):
                found.append(Mismatch(tuple(sequence), position, expected, got))
    return found


# --- on disk ---------------------------------------------------------------------------------------------------------


def save(path: str | Path, compiled: Compiled, *, step: int = 0, extra: dict[str, Any] | None = None) -> None:
    """A checkpoint of kind `transformer` with the layout under `extra["rasp"]`; `checkpoint.load_transformer` opens it.

    Raises:
      InputError: a value of the vocabulary or the output that is no str, number or tuple.
    """
    layout = compiled.layout
    stored = {
        "vocab": [_to_json(value) for value in layout.vocab],
        "basis": list(layout.basis),
        "output": list(layout.output),
        "values": [_to_json(value) for value in layout.values],
        "program": layout.program,
    }
    checkpoint.save(path, compiled.params, kind="transformer", config=dataclasses.asdict(layout.config), step=step,
                    extra={**(extra or {}), "rasp": stored})  # fmt: skip


def load(path: str | Path) -> Compiled:
    """A model that `save` wrote. `InputError` where there is none, one that is not compiled, or a bank of fine-tuned
    ones (`extra["members"]`)."""
    params, cfg, stored = checkpoint.load_transformer(path)
    found = stored.extra.get("rasp")
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a transformer that was not compiled from a program; name another checkpoint")
    if "members" in stored.extra:
        raise InputError(
            f"{path} holds a bank of {len(stored.extra['members'])} models; open it with checkpoint.load_transformer "
            "and take one"
        )
    vocab, values = (tuple(map(_from_json, found[name])) for name in ("vocab", "values"))
    return Compiled(params, Layout(cfg, vocab, tuple(found["basis"]), tuple(found["output"]), values, found["program"]))


def _to_json(value: Value) -> Any:
    if isinstance(value, Fraction):
        return {"fraction": [value.numerator, value.denominator]}
    if isinstance(value, tuple):
        return {"tuple": [_to_json(part) for part in value]}
    if value is None or type(value) in (str, int, bool, float):
        return value
    raise InputError(
        f"the value {value!r} is a {type(value).__name__}, which a checkpoint has no form for; use numbers, strings "
        "and tuples of them"
    )


def _from_json(value: Any) -> Value:
    if not isinstance(value, dict):
        return value
    return Fraction(*value["fraction"]) if "fraction" in value else tuple(map(_from_json, value["tuple"]))
