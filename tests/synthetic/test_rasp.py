"""RASP against plain loops: the programs, what None and AMBIGUOUS do, the static checks; every error is one line."""

from __future__ import annotations

import itertools
import operator
import random
import re
from fractions import Fraction

import numpy as np
import pytest

from bert6_jax.errors import InputError
from synthetic import rasp
from synthetic.rasp import (
    AMBIGUOUS,
    Aggregate,
    Combine,
    Constant,
    Map,
    Select,
    SelectorWidth,
    SequenceMap,
    evaluate,
    indices,
    tokens,
)

EACH = Select(indices, indices, operator.eq)  # every position selects itself
ALL = Select(indices, indices, lambda key, query: True)
NONE = Select(indices, indices, lambda key, query: False)
ONLY_A = Map(lambda token: token if token == "a" else None, tokens, "only a")


def sequences(alphabet, most):
    """Every sequence of 0 to `most` tokens."""
    return itertools.chain.from_iterable(itertools.product(alphabet, repeat=n) for n in range(most + 1))


def randoms(alphabet, n=60, most=14):
    rng = random.Random(0)
    return [rng.choices(alphabet, k=rng.randint(1, most)) for _ in range(n)]


def error_of(program, sequence="ab") -> str:
    with pytest.raises(InputError) as caught:
        evaluate(program, sequence)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    return message


# --- the programs, each against a loop ----------------------------------------------------------------------------


def counter(x):
    n = sum(token == "a" for token in x)
    return [(len(x) - n, n)[i] if i < 2 else 0 for i in range(len(x))]


def max_identifier(x, rank=4):
    """None where no token has `rank` smaller ones; index 0 selects all the others."""
    wanted = [[], []]
    for token in x:
        wanted[sum(other < token for other in x) == rank].append(token)
    each = [(None if not of else of[0] if len(set(of)) == 1 else AMBIGUOUS) for of in wanted]
    return [each[i] if i < 2 else None for i in range(len(x))]


def balanced(x):
    depth, fine = 0, True
    for token in x:
        depth += {"(": 1, ")": -1}.get(token, 0)
        fine = fine and depth >= 0
    return [fine and depth == 0] * len(x)


ORACLES = {
    "counter": ("abc", counter),
    "max_identifier": ("abcdefg", max_identifier),
    "reverse": ("abc", lambda x: list(x)[::-1]),
    "histogram": ("abc", lambda x: [list(x).count(token) for token in x]),
    "sort": ("cab", sorted),
    "sort_by_frequency": ("abc", lambda x: sorted(x, key=lambda token: -list(x).count(token))),
    "fraction_before": ("ab", lambda x: [Fraction(list(x[: i + 1]).count("a"), i + 1) for i in range(len(x))]),
    "balanced": ("()x", balanced),
}


def test_every_program_has_an_oracle():
    assert list(ORACLES) == list(rasp.PROGRAMS)


@pytest.mark.parametrize("name", ORACLES)
def test_a_program_gives_what_a_loop_gives_on_every_short_sequence_and_on_longer_ones(name):
    alphabet, oracle = ORACLES[name]
    program = rasp.PROGRAMS[name]()
    short = sequences(alphabet, 5 if len(alphabet) < 4 else 3)
    for x in itertools.chain(short, randoms(alphabet)):
        assert evaluate(program, x) == list(oracle(x)), x


def test_programs_take_their_settings():
    assert evaluate(rasp.counter("b"), "abbc")[:2] == [2, 2]
    assert evaluate(rasp.max_identifier(2), "dbca")[1] == "c"
    assert evaluate(rasp.fraction_before("b"), "abb") == [0, Fraction(1, 2), Fraction(2, 3)]
    assert evaluate(rasp.balanced("[", "]"), "[()]") == [True] * 4


def test_sort_keeps_equal_keys_in_order():
    parity = Map(lambda number: number % 2, tokens, "parity")
    for x in itertools.chain(sequences(range(4), 4), randoms(range(10))):
        assert evaluate(rasp.sort(parity), x) == sorted(x, key=lambda number: number % 2)
        assert evaluate(rasp.sort(tokens, indices), x) == sorted(range(len(x)), key=lambda i: x[i])


def test_the_example_of_the_docstring():
    code = [line for line in rasp.__doc__.splitlines() if line.startswith("    ")]
    assert len(code) == 3
    scope = {**vars(rasp)}
    exec("\n".join(line.strip() for line in code), scope)
    for x in sequences("abc", 4):
        count = [x.count(token) for token in x]
        assert evaluate(scope["count"], x) == count and scope["count"](x) == count
        assert evaluate(scope["others"], x) == evaluate(scope["count"] - 1, x) == [n - 1 for n in count]
        assert evaluate(scope["back"], x) == list(x)[::-1]


# --- sequences ----------------------------------------------------------------------------------------------------


def test_primitives():
    assert evaluate(tokens, "ab") == ["a", "b"] and evaluate(indices, "ab") == [0, 1]
    assert evaluate(Constant((1, 2)), "ab") == [(1, 2), (1, 2)] and evaluate(Constant(3), "") == []
    assert evaluate(rasp.length(), "abc") == [3, 3, 3] and rasp.length() is rasp.length()
    assert evaluate(Map(str.upper, tokens), "ab") == ["A", "B"]
    assert evaluate(SequenceMap(lambda token, i: token * i, tokens, indices), "abc") == ["", "b", "cc"]
    pairs = SequenceMap(lambda token, i: (token, i), tokens, indices)
    assert evaluate(pairs, "ab") == [("a", 0), ("b", 1)] and evaluate(pairs, "a") == [("a", 0)]


@pytest.mark.parametrize("symbol", ["+", "-", "*", "/", "//", "%", "<", "<=", ">", ">=", "==", "!=", "&", "|"])
def test_operators_are_those_of_python(symbol):
    """With a value on either side and with a sequence; `/` is exact, `& |` are and, or of truth values."""
    python = {"&": "bool(x and y)", "|": "bool(x or y)", "/": "Fraction(x, y)"}.get(symbol, f"x {symbol} y")

    def value(x, y):
        none = y == 0 and symbol in ("/", "//", "%")
        return None if none else eval(python, {"x": x, "y": y, "Fraction": Fraction})

    names = {"tokens": tokens, "other": Map(lambda n: n * n - 3, tokens, "other")}
    x = [-2, 0, 1, 2, 5]
    for c in (-2, 0, 3):
        assert evaluate(eval(f"tokens {symbol} {c}", names), x) == [value(n, c) for n in x]
        assert evaluate(eval(f"{c} {symbol} tokens", names), x) == [value(c, n) for n in x]
    both = eval(f"tokens {symbol} other", names)
    assert isinstance(both, SequenceMap) and evaluate(both, x) == [value(n, n * n - 3) for n in x]
    assert both.name == f"(tokens {symbol} other)"


def test_operators_of_one_sequence_and_of_tokens():
    assert evaluate(-indices, "abc") == [0, -1, -2] and (-indices).name == "-indices"
    assert evaluate(~(tokens == "a"), "ab") == [False, True]
    assert evaluate("a" == tokens, "ab") == [True, False] and ("a" == tokens).name == "(tokens == 'a')"
    assert evaluate("x" + tokens, "ab") == ["xa", "xb"] and ("x" + tokens).name == "('x' + tokens)"
    assert (3 < indices).name == "(indices > 3)"
    assert evaluate((1 / (indices + 1)) * 2, "ab") == [2, 1]
    flags = (indices % 2 == 0) | (tokens == "b")  # not, and, or agree, whatever the values are
    for a, b in itertools.product([flags, indices, Constant(2)], repeat=2):
        assert evaluate(~(a & b), "abab") == evaluate(~a | ~b, "abab")


def test_values_are_pythons_and_means_are_exact():
    def same(values, expected):
        assert values == expected and [type(v) for v in values] == [type(v) for v in expected]

    same(evaluate(Map(np.int64, indices), "ab"), [0, 1])
    same(evaluate(Map(lambda i: np.float32(i) / 2, indices), "ab"), [0.0, 0.5])
    same(evaluate(indices == np.int64(1), "ab"), [False, True])
    same(evaluate(np.int64(1) + indices, "ab"), [1, 2])
    same(evaluate(tokens, np.array(["a", "b"])), ["a", "b"])
    same(evaluate(tokens, np.array([1, 2])), [1, 2])
    same(evaluate(Map(lambda i: Fraction(2 * i, 2), indices), "ab"), [0, 1])
    same(evaluate(Aggregate(ALL, indices, numeric=True), "abc"), [1, 1, 1])
    same(evaluate(Aggregate(ALL, indices, numeric=True), "ab"), [Fraction(1, 2)] * 2)
    same(evaluate(Aggregate(ALL, indices / 3, numeric=True), "abcd"), [Fraction(1, 2)] * 4)
    same(evaluate(Aggregate(ALL, tokens == "a", numeric=True), "aab"), [Fraction(2, 3)] * 3)
    same(evaluate(Aggregate(ALL, Constant(0.1), numeric=True), "aaa"), [Fraction(0.1)] * 3)


# --- selectors, None, AMBIGUOUS -----------------------------------------------------------------------------------


def test_a_selector_is_query_by_key():
    before = Select(indices, indices, operator.lt)
    np.testing.assert_array_equal(before("abc"), [[0, 0, 0], [1, 0, 0], [1, 1, 0]])
    np.testing.assert_array_equal(Select(tokens, Constant("a"), operator.eq)("ab"), [[1, 0], [1, 0]])
    np.testing.assert_array_equal((before | EACH)("ab"), [[1, 0], [1, 1]])
    np.testing.assert_array_equal((~before & ~EACH)("ab"), [[0, 1], [0, 0]])


def test_selectors_join_as_sets_of_pairs():
    """Against loops over pairs, with keys and queries that have no value: such pairs are in no selector."""
    keys = {"before": (indices, operator.lt), "same": (tokens, operator.eq), "a only": (ONLY_A, operator.eq)}
    one = {name: Select(x, x, predicate) for name, (x, predicate) in keys.items()}
    for x in ("abab", "bbaac", "cab", "b"):
        values = {name: evaluate(of, x) for name, (of, _) in keys.items()}
        pairs = list(itertools.product(range(len(x)), repeat=2))  # query, key
        valid = {n: {(q, k) for q, k in pairs if values[n][q] is not None and values[n][k] is not None} for n in keys}
        chosen = {n: {(q, k) for q, k in valid[n] if keys[n][1](values[n][k], values[n][q])} for n in keys}
        found = lambda selector: {(int(q), int(k)) for q, k in zip(*selector(x).nonzero(), strict=True)}  # noqa: E731, B023
        for a, b in itertools.product(keys, repeat=2):
            both = valid[a] & valid[b]
            assert found(one[a]) == chosen[a] and found(~one[a]) == valid[a] - chosen[a]
            assert found(~~one[a]) == chosen[a]
            assert found(one[a] & one[b]) == chosen[a] & chosen[b]
            assert found(one[a] | one[b]) == (chosen[a] | chosen[b]) & both
            assert found(~(one[a] & one[b])) == found(~one[a] | ~one[b]) == both - (chosen[a] & chosen[b])


def test_nothing_selected_is_none_or_the_default():
    assert evaluate(Aggregate(NONE, tokens), "ab") == [None, None]
    assert evaluate(Aggregate(NONE, tokens, default="z"), "ab") == ["z", "z"]
    assert evaluate(Aggregate(NONE, indices, default=0, numeric=True), "ab") == [0, 0]
    assert evaluate(Aggregate(NONE, indices, numeric=True), "ab") == [None, None]
    assert evaluate(SelectorWidth(NONE), "ab") == [0, 0]
    assert evaluate(rasp.reverse(), "") == []


def test_none_goes_through_maps_and_is_never_selected():
    assert evaluate(Map(lambda token: 1, ONLY_A), "ab") == [1, None]
    assert evaluate(ONLY_A == None, "ab") == [False, None]  # noqa: E711
    assert evaluate(tokens + ONLY_A, "ab") == evaluate(ONLY_A + tokens, "ab") + [] == ["aa", None]
    assert evaluate(SelectorWidth(Select(ONLY_A, indices, lambda key, query: True)), "aba") == [2, 2, 2]
    assert evaluate(SelectorWidth(~Select(ONLY_A, tokens, operator.eq)), "abb") == [0, 1, 1]
    assert evaluate(SelectorWidth(Select(tokens, ONLY_A, lambda key, query: True)), "ab") == [2, 0]
    assert evaluate(Aggregate(ALL, ONLY_A, default="z"), "bb") == [None, None]  # something is selected: no default
    assert evaluate(Constant(None), "ab") == [None, None]
    assert [rasp.selects(ALL, *pair) for pair in ((None, 1), (1, None), (1, 1))] == [False, False, True]


def test_several_values_are_ambiguous_and_so_is_what_depends_on_them():
    either = Aggregate(ALL, tokens)
    assert evaluate(either, "aa") == ["a", "a"] and evaluate(either, "ab") == [AMBIGUOUS] * 2
    assert repr(AMBIGUOUS) == "AMBIGUOUS"
    assert evaluate(Aggregate(ALL, ONLY_A), "ab") == [AMBIGUOUS] * 2  # a value and none
    assert (
        evaluate(Aggregate(ALL, Map(lambda token: 1 if token == "a" else None, tokens), numeric=True), "ab")
        == [AMBIGUOUS] * 2
    )
    first = Aggregate(Select(indices, indices, lambda key, query: query == 0 or key == query), tokens)
    assert evaluate(first, "abc") == [AMBIGUOUS, "b", "c"]
    assert evaluate(first + "x", "abc") == [AMBIGUOUS, "bx", "cx"]
    assert evaluate(tokens + first, "abc") == [AMBIGUOUS, "bb", "cc"]
    assert evaluate(SequenceMap(operator.eq, first, Constant(None)), "ab") == [None, None]  # None comes first
    assert evaluate(Aggregate(EACH, first), "abc") == [AMBIGUOUS, "b", "c"]
    assert evaluate(SelectorWidth(Select(tokens, first, operator.eq)), "abb") == [AMBIGUOUS, 2, 2]  # a query
    assert evaluate(SelectorWidth(Select(first, tokens, operator.eq)), "abb") == [AMBIGUOUS] * 3  # a key
    assert evaluate(SelectorWidth(~Select(first, tokens, operator.eq)), "abb") == [AMBIGUOUS] * 3
    assert evaluate(Aggregate(Select(first, tokens, operator.eq), indices, default=9), "abb") == [AMBIGUOUS] * 3
    numbers = Aggregate(Select(indices, indices, lambda key, query: query == 0 or key == query), indices)
    assert evaluate(Aggregate(ALL, numbers, numeric=True), "ab") == [AMBIGUOUS] * 2
    seen = Select(first, ONLY_A, operator.eq)  # a murky key counts only where the query has a value
    assert evaluate(SelectorWidth(seen), "aba") == [AMBIGUOUS, 0, AMBIGUOUS]
    query = Select(tokens, first, operator.eq)
    for both in (ALL & query, query & ALL, ALL | query, query | ALL):
        assert [value is AMBIGUOUS for value in evaluate(SelectorWidth(both), "abb")] == [True, False, False]
    assert evaluate(SelectorWidth(seen | Select(tokens, first, operator.eq)), "aba") == [AMBIGUOUS, 0, AMBIGUOUS]


# --- nodes --------------------------------------------------------------------------------------------------------


def test_nodes_are_told_apart_by_identity():
    a, b = tokens + 1, tokens + 1
    assert len({a, b, a}) == 2 and {a: 1, b: 2}[a] == 1 and hash(a) == hash(a)
    assert isinstance(a == b, SequenceMap) and isinstance(a != b, SequenceMap)
    with pytest.raises(InputError, match=r"^\(tokens \+ 1\) is an expression, not a truth value"):
        assert a
    with pytest.raises(InputError, match=r"^\(indices > 0\) is an expression, not a truth value.* a < x < b"):
        _ = 0 < indices < 3
    for wrong in (lambda: tokens & EACH, lambda: EACH == tokens, lambda: tokens == EACH):
        with pytest.raises(InputError, match="joins a sequence and a selector"):
            wrong()
    with pytest.raises(AttributeError):
        a.x = b


def test_a_shared_node_is_looked_at_and_computed_once():
    calls = []
    x = Map(lambda token: calls.append(token) or 1, tokens, "ones")
    for _ in range(60):  # 2^60 paths
        x = x + x
    order = rasp.check(x)
    assert len(order) == 62 and evaluate(x, "ab") == [2**60] * 2 and calls == ["a", "b"]


def test_check_gives_every_expression_after_its_parts():
    for program in (make() for make in rasp.PROGRAMS.values()):
        order = rasp.check(program)
        at = {id(expr): i for i, expr in enumerate(order)}
        assert len(at) == len(order) and order[-1] is program
        assert all(at[id(part)] < at[id(expr)] for expr in order for part in rasp.parts(expr))


def test_deep_programs():
    x = indices
    for _ in range(10_000):
        x = x + 1
    assert evaluate(x, "ab") == [10_000, 10_001]
    assert len(x.name) <= 60 and x.name.endswith("... + 1)")
    selector = EACH
    for _ in range(10_001):
        selector = ~selector
    assert evaluate(SelectorWidth(selector), "abc") == [2, 2, 2]


def test_names():
    assert repr(tokens) == "tokens" and repr(tokens == "a") == "(tokens == 'a')"
    count = SelectorWidth(Select(tokens, tokens, operator.eq))
    assert count.named("count") is count and repr(count) == "count" and repr(count - 1) == "(count - 1)"
    assert repr(Map(str.upper, tokens)) == "Map(upper, tokens)"
    assert repr(Map(lambda token: token, Map(str.upper, tokens))) == "Map(<lambda>, Map(...))"
    assert repr(Select(tokens, count, operator.eq)) == "Select(tokens, count, eq)"
    assert repr(EACH & ALL) == "and(Select(...), Select(...))" and repr(~EACH) == "not(Select(...))"
    assert repr(Constant("x")) == "Constant('x')"
    assert repr(Map(str, tokens, "two\nlines")) == "two lines" and len(repr(Map(str, tokens, "x" * 100))) == 60
    for shared in (tokens, indices, rasp.length()):
        with pytest.raises(
            InputError, match=f"^{shared.name} cannot be named 'mine', all programs share it; name what"
        ):
            shared.named("mine")


# --- errors: one line that names the expression -------------------------------------------------------------------


def looped(make):
    """A program in which what `make` gives is computed from itself, through the node it is given."""
    inside = Map(lambda value: value, tokens, "inside")
    program = make(inside)
    object.__setattr__(inside, "x", program)
    return program


@pytest.mark.parametrize(
    "program, path",
    [
        (looped(lambda x: x), "inside -> inside"),
        (looped(lambda x: (x + 1).named("more")), "more -> inside -> more"),
        (looped(lambda x: SequenceMap(operator.add, tokens, x, "sum")), "sum -> inside -> sum"),
        (
            looped(lambda x: SelectorWidth(ALL & ~Select(x, x, operator.eq).named("eq"), "width")),
            "width -> and(Select(...), not(...)) -> not(eq) -> eq -> inside -> width",
        ),
        (looped(lambda x: Aggregate(ALL, x, name="mean")), "mean -> inside -> mean"),
    ],
)
def test_a_cycle_is_shown(program, path):
    before = Map(lambda value: value, program, "not part of it")
    assert f"has a cycle: {path};" in error_of(program)
    assert f"has a cycle: {path};" in error_of(before)


def test_a_long_cycle_is_shown_in_one_line():
    def make(x):
        for _ in range(5_000):
            x = x + 1
        return x.named("last")

    assert re.search("cycle: last -> .* -> ... -> .* -> inside -> last; ", error_of(looped(make)))


def test_what_is_no_program():
    assert error_of(EACH).startswith(
        "a program is a sequence, Select(indices, indices, eq) is a selector; aggregate it"
    )
    assert error_of(rasp.reverse) == "a program is a sequence, reverse is a function; call it"
    assert error_of(None).startswith("a program is a sequence, None is a NoneType; make one of")

    class Mine(rasp.SOp):
        pass

    assert "Mine() is a Mine, no expression of the language" in error_of(Mine())
    assert "Mine() is a Mine" in error_of(Mine() + 1)


@pytest.mark.parametrize(
    "program, message",
    [
        (Map(tokens, lambda x: x),
         "Map(tokens, <lambda>) needs a sequence where <lambda> stands; Map takes fn, x"),
        (Map(lambda x: x, 3), "Map(<lambda>, 3) needs a sequence where 3 stands; write Constant(...)"),
        (Map(lambda x: x, ALL & EACH), "Map(<lambda>, and(...)) needs a sequence where and(Select(...), Select(...))"),
        (Map("upper", tokens, "caps"), "caps needs a function where 'upper' stands; give it a"),
        (Map(indices, tokens, "caps"), "caps needs a function where indices stands"),
        (SequenceMap(operator.add, tokens, "x"), "SequenceMap(add, tokens, 'x') needs a sequence where 'x' stands"),
        (SelectorWidth(Select(tokens, indices, "==")), "Select(tokens, indices, '==') needs a function where '=='"),
        (SelectorWidth(Select(tokens, "a", operator.eq)), "Select(tokens, 'a', eq) needs a sequence where 'a' stands"),
        (SelectorWidth(tokens), "SelectorWidth(tokens) needs a selector where tokens stands"),
        (SelectorWidth(EACH & tokens), "and(Select(...), tokens) needs a selector where tokens stands"),
        (SelectorWidth(Combine("and", EACH)), "and(Select(...), None) needs a selector where None stands"),
        (SelectorWidth(Combine("xor", EACH, ALL)), "xor(Select(...), Select(...)) joins selectors by 'xor'; choose"),
        (Aggregate(tokens, EACH, name="out"), "out needs a selector where tokens stands"),
        (Aggregate(EACH, tokens, [1], name="out"), "out gives the list [1]; values must be hashable, say a tuple"),
        (Constant(float("nan")), "Constant(nan) gives nan; values must be finite, or None for no value"),
        (Constant(tokens), "Constant(tokens) gives the expression tokens; its function must give plain values"),
    ],
)  # fmt: skip
def test_static_checks(program, message):
    assert error_of(program).startswith(message)
    assert error_of(Map(lambda value: value, program, "more")).startswith(message)
    with pytest.raises(InputError):
        rasp.check(program)


def raises(*_):
    raise ValueError("two\nlines")


@pytest.mark.parametrize(
    "program, message",
    [
        (tokens + 1, "(tokens + 1): its function fails on 'a' (TypeError: "),
        (Map(raises, tokens, "out"), "out: its function fails on 'a' (ValueError: two lines); it must have a"),
        (Map(lambda x, y: x, tokens, "out"), "out: its function fails on 'a' (TypeError: "),
        (SequenceMap(operator.add, tokens, indices, "sum"), "sum: its function fails on 'a', 0 (TypeError: "),
        (tokens / 2, "(tokens / 2): its function fails on 'a' (TypeError: "),
        (SelectorWidth(Select(tokens, indices, operator.lt, "less")), "less: its function fails on 'a', 0 (Type"),
        (SelectorWidth(Select(tokens, indices, lambda *_: np.eye(2), "s")), "s: its function fails on 'a', 0 (Value"),
        (SelectorWidth(Select(tokens, indices, lambda *_: tokens, "s")), "s: its function fails on 'a', 0 (InputError"),
        (Map(list, tokens, "out"), "out gives the list ['a']; values must be hashable, say a tuple"),
        (Map(lambda _: np.eye(9), tokens, "out"), "out gives the ndarray array([[1., "),
        (Map(lambda _: float("inf"), tokens, "out"), "out gives inf; values must be finite"),
        (Map(lambda _: indices, tokens, "out"), "out gives the expression indices; its function must"),
        (Aggregate(ALL, tokens, numeric=True, name="out"), "out takes the mean of 'a', which is no number; map"),
        (tokens + Map(lambda _: raises, tokens, "f"), "(tokens + f): its function fails on 'a', raises (TypeError"),
    ],
)  # fmt: skip
def test_what_goes_wrong_on_values(program, message):
    assert error_of(program).startswith(message), error_of(program)


def test_tokens_are_values_too():
    assert error_of(tokens, [["a"]]).startswith("tokens gives the list ['a']; values must be hashable")
    assert error_of(tokens, [float("nan")]).startswith("tokens gives nan; values must be finite")
    assert error_of(tokens + 1, ["x" * 1000]).startswith("(tokens + 1): its function fails on 'xxx")
