"""RASP: programs over sequences, in the operations that a transformer has (Weiss et al., arXiv 2106.06981).

    count  = SelectorWidth(Select(tokens, tokens, operator.eq))         # how often each token occurs
    others = Map(lambda n: n - 1, count)                                # the same as count - 1
    back   = Aggregate(Select(indices, length() - 1 - indices, operator.eq), tokens)   # reversed

A program is an expression of two kinds. A sequence (`SOp`) has a value at every position: `tokens`, `indices` (from 0),
`Constant`, `Map`, `SequenceMap`, `Aggregate`, `SelectorWidth`; `+ - * / // % < <= > >= == != & | ~` make maps (`/` is
exact, `& | ~` are and, or, not of truth values). A selector says which keys a query selects: `Select` with any
predicate(key, query), joined by `& | ~`. `evaluate` is what a program means, `count("abca")` a short form of it;
`synthetic.compiler` makes a transformer of it.

What has no value is `None`: an aggregate that selects nothing (unless it has a default), a division by zero, and every
map of those; such a key or query is never selected, by a negation neither (a width is then 0). Where several different
values are selected and no mean is asked for, the value is `AMBIGUOUS`, and so is what depends on it: a compiled model
gives something else there.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from bert6_jax.errors import InputError

Value = Hashable


class _Ambiguous:
    def __repr__(self):
        return "AMBIGUOUS"


AMBIGUOUS = _Ambiguous()


class Expr:
    """A node of a program. Nodes are told apart by identity: use one twice and it is computed once."""

    name: str = ""

    def named(self, name: str):
        """The same node, called `name` in messages and in the basis of a compiled model."""
        if self in _SHARED:
            raise InputError(f"{label(self)} cannot be named {name!r}, all programs share it; name what is made of it")
        object.__setattr__(self, "name", name)
        return self

    def __repr__(self):
        return label(self)

    def __bool__(self):
        raise InputError(
            f"{label(self)} is an expression, not a truth value; use & | ~ in place of and, or, not, and no a < x < b"
        )


class SOp(Expr):
    """A sequence: one value a position. Called with tokens, it gives its values (`evaluate`)."""

    def __call__(self, sequence: Sequence[Value]) -> list[Value]:
        return evaluate(self, sequence)


class Selector(Expr):
    """A matrix of booleans: which keys (columns) a query (row) selects. Called with tokens, it gives the matrix."""

    def __call__(self, sequence: Sequence[Value]) -> np.ndarray:
        return evaluate_all(SelectorWidth(self), sequence)[self].chosen

    def __and__(self, other: Selector) -> Selector:
        return Combine("and", self, other)

    def __or__(self, other: Selector) -> Selector:
        return Combine("or", self, other)

    def __invert__(self) -> Selector:
        return Combine("not", self)


@dataclass(frozen=True, eq=False, repr=False)
class Tokens(SOp):
    name: str = "tokens"


@dataclass(frozen=True, eq=False, repr=False)
class Indices(SOp):
    name: str = "indices"


tokens, indices = Tokens(), Indices()
_SHARED = {tokens, indices}  # and the one `length`


@dataclass(frozen=True, eq=False, repr=False)
class Constant(SOp):
    """`value` at every position."""

    value: Value
    name: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Map(SOp):
    """`fn` of every value; where it returns None there is no value."""

    fn: Callable[[Any], Value]
    x: SOp
    name: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class SequenceMap(SOp):
    """`fn` of the two values at every position."""

    fn: Callable[[Any, Any], Value]
    x: SOp
    y: SOp
    name: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Select(Selector):
    """`predicate(key, query)` of every pair of positions."""

    keys: SOp
    queries: SOp
    predicate: Callable[[Any, Any], bool]
    name: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Combine(Selector):
    """`and`, `or`, `not` of selectors; written `a & b`, `a | b`, `~a`."""

    how: str
    a: Selector
    b: Selector | None = None
    name: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class SelectorWidth(SOp):
    """How many keys each query selects."""

    selector: Selector
    name: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Aggregate(SOp):
    """The value of the selected keys: all of them have the same (`AMBIGUOUS` otherwise), or with `numeric` their mean.

    `default` stands where nothing is selected. Means are exact: ints or `Fraction`.
    """

    selector: Selector
    x: SOp
    default: Value = None
    numeric: bool = False
    name: str = ""


def _unless_zero(fn: Callable) -> Callable:
    return lambda x, y: None if y == 0 else fn(x, y)


_OPERATORS = {
    "add": ("+", operator.add), "sub": ("-", operator.sub), "mul": ("*", operator.mul),
    "truediv": ("/", _unless_zero(lambda x, y: Fraction(1) * x / y)),
    "floordiv": ("//", _unless_zero(operator.floordiv)), "mod": ("%", _unless_zero(operator.mod)),
    "and": ("&", lambda x, y: bool(x and y)), "or": ("|", lambda x, y: bool(x or y)),
}  # fmt: skip
_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}  # Python swaps them itself


def _operators() -> None:
    """`x + y`, `x == "a"`, ...: maps of one or two sequences."""

    def make(fn: Callable, symbol: str, swapped: bool) -> Callable[[SOp, Any], SOp]:
        def method(self, other):
            mine, its = label(self, 26), label(other, 26)  # so that of a long expression the end of it is seen
            name = f"({its} {symbol} {mine})" if swapped else f"({mine} {symbol} {its})"
            if isinstance(other, SOp):
                return SequenceMap(fn, self, other, name)
            if isinstance(other, Expr):
                raise InputError(f"{name} joins a sequence and a selector; aggregate the selector or take its width")
            return Map((lambda value: fn(other, value)) if swapped else (lambda value: fn(value, other)), self, name)

        return method

    for word, (symbol, fn) in _OPERATORS.items():
        setattr(SOp, f"__{word}__", make(fn, symbol, False))
        setattr(SOp, f"__r{word}__", make(fn, symbol, True))
    for word, symbol in _COMPARISONS.items():
        setattr(SOp, f"__{word}__", make(getattr(operator, word), symbol, False))  # set late, they leave the hash alone
    SOp.__neg__ = lambda self: Map(operator.neg, self, f"-{label(self, 26)}")
    SOp.__invert__ = lambda self: Map(operator.not_, self, f"~{label(self, 26)}")


_operators()


# --- what a program is made of ---------------------------------------------------------------------------------------


def parts(expr: Expr) -> tuple[Expr, ...]:
    """The expressions that an expression is computed from."""
    inputs = {Map: ("x",), SequenceMap: ("x", "y"), Select: ("keys", "queries"), SelectorWidth: ("selector",),
              Aggregate: ("selector", "x"), Combine: ("a", "b")}  # fmt: skip
    names = inputs.get(type(expr), ())
    if isinstance(expr, Combine) and expr.how == "not":
        names = ("a",)
    return tuple(getattr(expr, name) for name in names)


def label(expr: Any, room: int = 60) -> str:
    """What an expression is called in messages: its name, or how it is written."""
    if not isinstance(expr, Expr):
        text = getattr(expr, "__name__", None) or repr(expr)  # functions
    elif expr.name:
        text = str(expr.name)
    elif isinstance(expr, Constant):
        text = f"Constant({expr.value!r})"
    else:
        inner = [
            f"{_kind(part)}(...)" if isinstance(part, Expr) and not part.name else label(part, 26)
            for part in parts(expr)
        ]
        if isinstance(expr, Map | SequenceMap):
            inner.insert(0, label(expr.fn, 26))
        elif isinstance(expr, Select):
            inner.append(label(expr.predicate, 26))
        text = f"{_kind(expr)}({', '.join(inner)})"
    text = " ".join(text.splitlines())
    return text if len(text) <= room else text[: room - 3] + "..."


def _kind(expr: Expr) -> str:
    return str(expr.how) if isinstance(expr, Combine) else type(expr).__name__


_KINDS = {Map: (SOp,), SequenceMap: (SOp, SOp), Select: (SOp, SOp), SelectorWidth: (Selector,),
          Aggregate: (Selector, SOp)}  # fmt: skip


def check(program: SOp) -> list[Expr]:
    """Every expression of a program, each after what it is computed from.

    Raises:
      InputError: something that is no sequence, a part of the wrong kind, a function that cannot be called, a cycle.
    """
    if not isinstance(program, SOp):
        what = f"a {'selector' if isinstance(program, Selector) else type(program).__name__}"
        hint = "call it" if callable(program) else "make one of rasp.tokens and rasp.indices"
        hint = "aggregate it or take its width" if isinstance(program, Selector) else hint
        raise InputError(f"a program is a sequence, {label(program)} is {what}; {hint}")
    order: list[Expr] = []
    state: dict[int, bool] = {}  # by id: False while an expression's parts are looked at, True when it is done
    stack: list[tuple[Expr, int]] = [(program, 0)]
    while stack:
        expr, number = stack.pop()
        if number == 0:
            _check_one(expr)
            state[id(expr)] = False
        needed = parts(expr)
        if number == len(needed):
            state[id(expr)] = True
            order.append(expr)
            continue
        stack.append((expr, number + 1))
        part = needed[number]
        if id(part) not in state:
            stack.append((part, 0))
        elif not state[id(part)]:
            begin = next(i for i, (entry, _) in enumerate(stack) if entry is part)
            path = [label(entry, 30) for entry, _ in stack[begin:]]
            path = " -> ".join([*(path if len(path) < 8 else [*path[:4], "...", *path[-3:]]), label(part, 30)])
            raise InputError(f"the program has a cycle: {path}; an expression cannot be computed from itself")
    return order


def _check_one(expr: Expr) -> None:
    if type(expr) not in (Tokens, Indices, Constant, Map, SequenceMap, Select, Combine, SelectorWidth, Aggregate):
        raise InputError(f"{label(expr)} is a {type(expr).__name__}, no expression of the language; use those of rasp")
    if isinstance(expr, Combine) and expr.how not in ("and", "or", "not"):
        raise InputError(f"{label(expr)} joins selectors by {expr.how!r}; choose one of and, or, not")
    kinds = _KINDS.get(type(expr), (Selector,) * 2)
    for kind, part in zip(kinds, parts(expr), strict=False):
        if not isinstance(part, kind):
            word = "a sequence" if kind is SOp else "a selector"
            hint = f"{type(expr).__name__} takes {', '.join(field.name for field in fields(expr))}"
            if kind is SOp and not isinstance(part, Expr) and not callable(part):
                hint = "write Constant(...) for a fixed value"
            raise InputError(f"{label(expr)} needs {word} where {label(part)} stands; {hint}")
    fn = getattr(expr, "predicate", getattr(expr, "fn", None))
    if isinstance(expr, Map | SequenceMap | Select) and (isinstance(fn, Expr) or not callable(fn)):
        raise InputError(f"{label(expr)} needs a function where {label(fn)} stands; give it a function or a lambda")
    given = expr.value if isinstance(expr, Constant) else getattr(expr, "default", None)
    if given is not None:
        _checked(expr, given)


def _checked(expr: Expr, value: Value) -> Value:
    """A value as the program knows it: NumPy scalars as Python's, whole fractions as ints."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{label(expr)} gives {value!r}; values must be finite, or None for no value")
    if isinstance(value, Expr):
        raise InputError(f"{label(expr)} gives the expression {label(value)}; its function must give plain values")
    try:
        hash(value)
    except TypeError:
        raise InputError(
            f"{label(expr)} gives the {type(value).__name__} {label(value, 40)}; values must be hashable, say a tuple"
        ) from None
    return int(value) if isinstance(value, Fraction) and value.denominator == 1 else value


def apply(expr: Map | SequenceMap, *values: Value) -> Value:
    """A map's function of values: None of None, `AMBIGUOUS` of `AMBIGUOUS`. `InputError` if it fails."""
    if any(value is None for value in values):
        return None
    if any(value is AMBIGUOUS for value in values):
        return AMBIGUOUS
    return _checked(expr, _call(expr, expr.fn, values))


def selects(expr: Select, key: Value, query: Value) -> bool:
    """A select's predicate of two values; never of None."""
    if key is None or query is None:
        return False
    return _call(expr, lambda key, query: bool(expr.predicate(key, query)), (key, query))


def _call(expr: Expr, fn: Callable, values: tuple) -> Any:
    try:
        return fn(*values)
    except Exception as error:
        shown, why = ", ".join(label(value, 40) for value in values), " ".join(str(error).splitlines())
        raise InputError(
            f"{label(expr)}: its function fails on {shown} ({type(error).__name__}: {why}); "
            "it must have a value, or None, for all that may come"
        ) from error


def mean(expr: Aggregate, values: Sequence[Value]) -> int | Fraction:
    """The exact mean; `InputError` on what is no number."""
    for value in values:
        if not isinstance(value, int | float | Fraction):
            raise InputError(
                f"{label(expr)} takes the mean of {label(value)}, which is no number; map the values to numbers, or "
                "leave `numeric` out where one key is selected"
            )
    return _checked(expr, sum(map(Fraction, values)) / len(values))


# --- what a program means --------------------------------------------------------------------------------------------


class Selected(NamedTuple):
    """A selector's value, each bool [query, key]: `chosen`; `valid`, where both have values; `murky`: nobody knows."""

    chosen: np.ndarray
    valid: np.ndarray
    murky: np.ndarray


def evaluate(program: SOp, sequence: Sequence[Value]) -> list[Value]:
    """The reference: a program's value at every position of a sequence of tokens, by NumPy and Python alone."""
    return list(evaluate_all(program, sequence)[program])


def evaluate_all(program: SOp, sequence: Sequence[Value]) -> dict[Expr, Any]:
    """The value of every expression of a program: of a sequence an object array [T], of a selector `Selected`."""
    T = len(sequence)
    found: dict[Expr, Any] = {}
    for expr in check(program):
        if isinstance(expr, Combine):
            found[expr] = _combine(expr, found)
        elif isinstance(expr, Select):
            found[expr] = _select(expr, found[expr.keys], found[expr.queries])
        else:
            found[expr] = np.empty(T, object)
            found[expr][:] = _sequence(expr, found, sequence)
    return found


def _sequence(expr: SOp, found: dict[Expr, Any], sequence: Sequence[Value]) -> list[Value]:
    if isinstance(expr, Tokens):
        return [_checked(expr, token) for token in sequence]
    if isinstance(expr, Indices):
        return list(range(len(sequence)))
    if isinstance(expr, Constant):
        return [_checked(expr, expr.value)] * len(sequence)
    if isinstance(expr, Map | SequenceMap):
        return [apply(expr, *values) for values in zip(*(found[part] for part in parts(expr)), strict=True)]
    selected = found[expr.selector]
    rows = zip(selected.chosen, selected.murky.any(1), strict=True)
    if isinstance(expr, SelectorWidth):
        return [AMBIGUOUS if murky else int(row.sum()) for row, murky in rows]
    return [AMBIGUOUS if murky else _aggregate(expr, list(found[expr.x][row])) for row, murky in rows]


def _aggregate(expr: Aggregate, values: list[Value]) -> Value:
    if not values:
        return None if expr.default is None else _checked(expr, expr.default)
    if any(value is AMBIGUOUS for value in values):
        return AMBIGUOUS
    if expr.numeric:  # a mean over what is not there has no meaning
        return AMBIGUOUS if any(value is None for value in values) else mean(expr, values)
    return values[0] if all(value == values[0] for value in values[1:]) else AMBIGUOUS


def _select(expr: Select, key_T: np.ndarray, query_T: np.ndarray) -> Selected:
    T = len(key_T)
    out = Selected(*(np.zeros((T, T), bool) for _ in Selected._fields))
    for q, query in enumerate(query_T):
        for k, key in enumerate(key_T):
            out.valid[q, k] = key is not None and query is not None
            out.murky[q, k] = out.valid[q, k] and (key is AMBIGUOUS or query is AMBIGUOUS)
            out.chosen[q, k] = out.valid[q, k] and not out.murky[q, k] and selects(expr, key, query)
    return out


def _combine(expr: Combine, found: dict[Expr, Any]) -> Selected:
    a = found[expr.a]
    if expr.how == "not":
        return a._replace(chosen=a.valid & ~a.chosen)
    b = found[expr.b]
    valid = a.valid & b.valid
    chosen = a.chosen & b.chosen if expr.how == "and" else a.chosen | b.chosen
    return Selected(valid & chosen, valid, valid & (a.murky | b.murky))


# --- programs --------------------------------------------------------------------------------------------------------


_length = SelectorWidth(Select(tokens, tokens, lambda key, query: True), "length")
_SHARED.add(_length)


def length() -> SOp:
    """The number of tokens, at every position; always the same node."""
    return _length


def counter(letter: Value = "a") -> SOp:
    """How many tokens are `letter`: read index 1 (arXiv 2311.12786). Index 0 counts the others, all else gives 0."""
    is_letter = Map(lambda token: token == letter, tokens, f"is {letter}")
    # True equals 1 and False 0: index 1 selects the letters and index 0 the others
    counts = SelectorWidth(Select(is_letter, indices, operator.eq), "count")
    return Aggregate(Select(indices, indices, operator.eq), counts, name="output")


def max_identifier(rank: int = 4) -> SOp:
    """The token with `rank` smaller ones: read it at index 1 (arXiv 2311.12786). Index 0 is `AMBIGUOUS` in general."""
    smaller = SelectorWidth(Select(tokens, tokens, operator.lt), "smaller")
    wanted = Map(lambda count: count == rank, smaller, f"smaller == {rank}")
    return Aggregate(Select(wanted, indices, operator.eq), tokens, name="output")


def reverse() -> SOp:
    return Aggregate(Select(indices, length() - 1 - indices, operator.eq), tokens, name="reversed")


def histogram() -> SOp:
    """How often each token occurs in the sequence."""
    return SelectorWidth(Select(tokens, tokens, operator.eq), "histogram")


def sort(keys: SOp = tokens, x: SOp = tokens) -> SOp:
    """`x` in the order of `keys`; equal keys stay in order."""
    before = Select(indices, indices, operator.lt) & Select(keys, keys, operator.eq)
    place = SelectorWidth(Select(keys, keys, operator.lt) | before, "place")
    return Aggregate(Select(place, indices, operator.eq), x, name="sorted")


def sort_by_frequency() -> SOp:
    """The tokens by falling frequency; equally frequent ones stay in order."""
    return sort(-histogram())


def fraction_before(value: Value) -> SOp:
    """Which share of the tokens up to each position, itself included, is `value`."""
    until = Select(indices, indices, operator.le)
    return Aggregate(
        until, Map(lambda token: int(token == value), tokens, f"is {value}"), numeric=True, name="fraction"
    )


def balanced(opening: Value = "(", closing: Value = ")") -> SOp:
    """Are the brackets of the whole sequence balanced? The same answer at every position."""
    step = Map(lambda token: (token == opening) - (token == closing), tokens, "step")
    depth = Aggregate(Select(indices, indices, operator.le), step, numeric=True, name="depth / position")
    below = SelectorWidth(Select(depth < 0, Constant(True), operator.eq), "times below zero")
    total = Aggregate(Select(tokens, tokens, lambda key, query: True), step, numeric=True, name="total / length")
    return ((below == 0) & (total == 0)).named("balanced")


PROGRAMS: dict[str, Callable[[], SOp]] = {
    "counter": counter,
    "max_identifier": max_identifier,
    "reverse": reverse,
    "histogram": histogram,
    "sort": sort,
    "sort_by_frequency": sort_by_frequency,
    "fraction_before": lambda: fraction_before("a"),
    "balanced": balanced,
}
