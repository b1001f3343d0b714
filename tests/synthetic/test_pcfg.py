"""Grammars against enumeration: lengths, parser, tables, strings and windows; bad grammars.

`enumerate_strings` writes every string of a small grammar with its probability, by recursion over names.
"""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache, partial

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from scipy.stats import chi2

from bert6_jax import parallel
from bert6_jax.errors import InputError
from synthetic import pcfg

SMALL = {
    "unequal": "s -> x y x [0.5] | y [0.2] | z x [0.3]\nx -> a [0.9] | b b [0.1]\ny -> a b|b a|a\nz → c [1.0] # c\n",
    "deep": "s -> t t | u\nt -> x y [0.35] | y [0.65]\nu -> y x y\nx -> a | b a | c | a a\n"
    "y -> b [0.001] | c a [0.999]\n",
}
ROWS = 20_000

# whole numbers out of random ones: they compile longer than they run, and are the same at every level
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0}, static_argnums=(1, 2))
draw_strings, draw_windows = quick(pcfg.strings), quick(pcfg.windows)


@cache
def small(name: str, folder: str) -> pcfg.Grammar:
    path = f"{folder}/{name}.txt"
    with open(path, "w", encoding="utf-8") as out:
        out.write(SMALL[name])
    return pcfg.read(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("grammars"))


@cache
def cfg3b() -> pcfg.Grammar:
    return pcfg.read("cfg3b")


def enumerate_strings(text: str) -> Counter:
    rules = {}
    for line in text.replace("→", "->").splitlines():
        head, _, bodies = line.split("#")[0].partition("->")
        rules[head.strip()] = [body.replace("[", " ").replace("]", " ").split() for body in bodies.split("|")]

    def expand(symbol):
        if symbol not in rules:
            return Counter({symbol: 1.0})
        out = Counter()
        for body in rules[symbol]:
            p, names = (float(body[-1]), body[:-1]) if "." in body[-1] else (1 / len(rules[symbol]), body)
            for parts in itertools.product(*(expand(name).items() for name in names)):
                out["".join(s for s, _ in parts)] += p * float(np.prod([q for _, q in parts]))
        return out

    return expand(next(iter(rules)))


def agree(counts: Counter, chances: dict) -> bool:
    """Chi-square test at 1e-3; what is expected less than five times counts as one."""
    total = sum(counts.values())
    assert set(counts) <= set(chances)
    expected = np.array([chances[k] * total for k in chances])
    found = np.array([counts[k] for k in chances], float)
    rare = expected < 5
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        found = np.append(found[~rare], found[rare].sum())
    statistic = ((found - expected) ** 2 / expected).sum()
    return chi2.sf(statistic, expected.size - 1) > 1e-3


def spelled(grammar, ids) -> str:
    return "".join(grammar.letters[i] for i in ids)


def as_strings(grammar, drawn: pcfg.Strings) -> list[str]:
    ids_BT, length_B = (np.asarray(x) for x in drawn)
    assert ((ids_BT >= 0) == (np.arange(ids_BT.shape[1]) < length_B[:, None])).all() and ids_BT.min() >= -1
    return [spelled(grammar, ids[:n]) for ids, n in zip(ids_BT, length_B, strict=True)]


# --- the built-in grammar --------------------------------------------------------------------------------------------


def test_lengths_of_cfg3b():
    grammar = cfg3b()
    p = pcfg.lengths(grammar)
    n = np.arange(p.size)
    assert p.sum() == pytest.approx(1, abs=1e-12) and (p * n).sum() == pytest.approx(275.625, abs=1e-9)
    assert (np.flatnonzero(p)[[0, -1]] == [138, 432]).all() and round(p[:250].sum(), 3) == 0.236
    tops = [pcfg.Grammar("top", grammar.levels[: k + 1], grammar.rules[:k]) for k in range(1, 7)]
    assert [pcfg.lengths(top).size - 1 for top in tops] == [2, 6, 18, 48, 144, 432]
    assert grammar.letters == ("a", "b", "c") and [len(level) for level in grammar.levels] == [1, 3, 3, 3, 3, 3, 3]


def test_strings_of_cfg3b():
    grammar = cfg3b()
    sampler = pcfg.make_sampler(grammar, 250)
    drawn = jax.tree.map(np.asarray, draw_strings(jax.random.key(1), sampler, 2_000))
    rows = [ids[:n] for ids, n in zip(*drawn, strict=True)]
    assert all(pcfg.parses(grammar, row) for row in rows)
    p = pcfg.lengths(grammar)
    assert agree(Counter(drawn.length_B.tolist()), {n: p[n] for n in np.flatnonzero(p).tolist()})
    rng, wrong = np.random.default_rng(0), 0
    for row in rows[:300]:
        changed = row.copy()
        at = rng.integers(row.size)
        changed[at] = (changed[at] + rng.integers(1, 3)) % 3
        wrong += pcfg.parses(grammar, changed)
    assert wrong < 30  # c b a | b a: a change can give another string
    assert len({row.tobytes() for row in rows}) == 2_000


def test_windows_of_cfg3b_repeat_batch_and_shard():
    sampler = pcfg.make_sampler(cfg3b(), 250)
    keys = jax.random.split(jax.random.key(2), 4)
    one = np.asarray(draw_windows(keys[1], sampler, 24))
    assert one.shape == (24, 250) and one.dtype == np.int32 and set(np.unique(one)) == {0, 1, 2}

    def all_keys(keys, sampler, count):
        return jax.vmap(lambda key: pcfg.windows(key, sampler, count))(keys)

    def on_devices(keys, sampler, count):
        cut = PartitionSpec("data")
        fn = lambda keys: all_keys(keys, sampler, count)  # noqa: E731
        return jax.shard_map(fn, mesh=parallel.make_mesh(4), in_specs=cut, out_specs=cut)(keys)

    batched = np.asarray(quick(all_keys)(keys, sampler, 24))
    assert (batched[1] == one).all() and len(np.unique(batched.reshape(-1, 250), axis=0)) == 96
    assert (np.asarray(quick(on_devices)(keys, sampler, 24)) == batched).all()


def test_below():
    grammar = pcfg.below(cfg3b(), "m")
    assert grammar.levels == (("m",), ("j", "k", "l"), ("g", "h", "i"), ("d", "e", "f"), ("a", "b", "c"))
    p = pcfg.lengths(grammar)
    # two or three of d, e, f: 2.5 letters; g, h, i: 7.5; j: 15; k, l: 22.5; m: l j or j l k
    assert p.size - 1 == 72 and (p * np.arange(p.size)).sum() == pytest.approx((22.5 + 15 + 15 + 22.5 + 22.5) / 2)
    assert not pcfg.parses(grammar, [0, 1, 2])
    assert pcfg.below(cfg3b(), "l").levels[0] == ("l",) and "m from" not in cfg3b().name
    with pytest.raises(InputError, match="'a' is no symbol of grammar cfg3b that is rewritten; give one of s p q r m"):
        pcfg.below(cfg3b(), "a")


# --- small grammars, against enumeration -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_small_grammars_exactly(name, folder):
    grammar, chances = small(name, folder), enumerate_strings(SMALL[name])
    p = np.zeros(max(map(len, chances)) + 1)
    for string, q in chances.items():
        p[len(string)] += q
    np.testing.assert_allclose(pcfg.lengths(grammar), p, atol=1e-12)
    for length in range(p.size + 1):
        for ids in itertools.islice(itertools.product(range(3), repeat=length), 0, None, 1 + length**2 // 20):
            assert pcfg.parses(grammar, ids) == (spelled(grammar, ids) in chances)
    assert all(pcfg.parses(grammar, [grammar.letters.index(c) for c in string]) for string in chances)
    assert not pcfg.parses(grammar, [0, 3, 0]) and not pcfg.parses(grammar, [-1])


@pytest.mark.parametrize(("name", "cells"), [("unequal", 1 << 20), ("unequal", 1), ("deep", 60)])
def test_small_samples(name, cells, folder, monkeypatch):
    """Strings and windows have exactly the probabilities of the grammar, in one segment and in several."""
    monkeypatch.setattr(pcfg, "CELLS", cells)
    grammar, chances = small(name, folder), enumerate_strings(SMALL[name])
    sampler = pcfg.make_sampler(grammar, 4)
    assert len(sampler.segments) == {1: 2, 60: 2}.get(cells, 1)
    drawn = draw_strings(jax.random.key(3), sampler, ROWS)
    assert agree(Counter(as_strings(grammar, drawn)), chances)
    wanted = Counter()
    for string, p in chances.items():
        for start in range(len(string) - 3):
            wanted[string[start : start + 4]] += p / (len(string) - 3)
    kept = sum(wanted.values())
    assert sampler.kept == pytest.approx(kept)
    windows = np.asarray(draw_windows(jax.random.key(4), sampler, ROWS))
    assert agree(Counter(spelled(grammar, row) for row in windows), {w: p / kept for w, p in wanted.items()})


def test_few_rows_and_rare_strings(folder):
    """One in 18 is kept: the candidates run out now and then, and the loop goes on."""
    grammar = small("unequal", folder)
    longest = pcfg.make_sampler(grammar, 6)
    assert longest.kept == pytest.approx(0.5 * 2 / 3 * 0.01)
    windows = np.asarray(draw_windows(jax.random.key(5), longest, 300))
    assert {spelled(grammar, row) for row in windows} == {"bbabbb", "bbbabb"}


# --- tables ----------------------------------------------------------------------------------------------------------


def check_tables(grammar: pcfg.Grammar):
    """The columns of the last segment's table give the exact lengths, and its rows are derived."""
    sampler = pcfg.make_sampler(grammar)
    segment = sampler.segments[-1]
    names, cut_SK = grammar.levels[segment.top], segment.cut_SK / 2.0**32
    cut_SK[segment.own_SK == segment.other_SK] = 1.0
    for number, name in list(enumerate(names, 1))[:4]:
        part = pcfg.below(grammar, name)
        exact = pcfg.lengths(part)
        p = np.zeros(exact.size)
        np.add.at(p, segment.width_E[segment.own_SK[number]], cut_SK[number])
        np.add.at(p, segment.width_E[segment.other_SK[number]], 1 - cut_SK[number])
        np.testing.assert_allclose(p / cut_SK.shape[1], exact, atol=1e-9)
        for entry in np.unique(segment.own_SK[number])[:20]:
            assert pcfg.parses(part, segment.rows_EC[entry, : segment.width_E[entry]].astype(int) - 1)


def test_tables(folder):
    for grammar in (cfg3b(), small("unequal", folder), small("deep", folder)):
        check_tables(grammar)


# --- files -----------------------------------------------------------------------------------------------------------


def test_released_files(shared_data):
    files = sorted((shared_data / "bios" / "cfg").glob("*.json"))
    if not files:
        pytest.skip("no released grammars")
    grammars = {file.stem: pcfg.read(file) for file in files}
    assert len(grammars) == 9
    for grammar in grammars.values():
        check_tables(grammar)
    mine, theirs = ([[set(rules) for rules in table] for table in g.rules] for g in (cfg3b(), grammars["cfg3b"]))
    assert mine == theirs and grammars["cfg3b"].letters == ("1", "2", "3")
    assert len(grammars["cfg3e1"].letters) == 9 and len(grammars["cfg3j"].levels) == 8
    assert [len(level) for level in grammars["cfg3e1"].levels] == [1, 3, 8, 24, 72, 27, 9]  # without the unreachable
    e1 = grammars["cfg3e1"]
    drawn = jax.tree.map(np.asarray, draw_strings(jax.random.key(6), pcfg.make_sampler(e1), 50))
    assert all(pcfg.parses(e1, ids[:n]) for ids, n in zip(*drawn, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rules in it; write one symbol a line, `symbol -> child"),
        ("# nothing\n\n", "no rules in it"),
        ("s => a b", ":1: `s => a b` is no line of a grammar; write"),
        ("s t -> a b", ":1: `s t -> a b` is no line"),
        ("s -> a -> b", "is no line"),
        ("-> a", "is no line"),
        ("s -> a [0.5 | b [0.5]", ":1: `a [0.5` is no rule of `s`"),
        ("s -> [0.5] a | b [0.5]", "is no rule of `s`"),
        ("s -> a |", ":1: `s` has a rule with no children"),
        ("s ->", "`s` has a rule with no children"),
        ("s -> [1.0]", "`s` has a rule with no children"),
        ("s -> a b | a b", ":1: `s` has the rule `a b` twice"),
        ("s -> a [0.5] | b", ":1: 1 of the 2 rules of `s` have a probability; give all of them one or none"),
        ("s -> a [0.5] | b [0.4]", ":1: the probabilities of `s` sum to 0.9, not to 1"),
        ("s -> a [1.5] | b [-0.5]", "rule of probability [1.5]; give a number above 0 and up to 1"),
        ("s -> a [1] | b [0]", "rule of probability [0]"),
        ("s -> a [nan] | b [x]", "rule of probability [nan]"),
        ("s -> x\nx -> a\ns -> b", ":3: `s` is defined a second time, first at "),
        ("s -> x\nx -> a\n\ny -> a", ":4: `y` is unreachable, nothing that `s` derives has it"),
        ("s -> x\nx -> y\ny -> a x", ":3: `x` is endless, it derives itself (x -> y -> x)"),
        ("s -> s a", ":1: `s` is endless, it derives itself (s -> s)"),
        (
            "s -> x y\nx -> y a\ny -> a b",
            ":2: `y` is at level 2 here and at level 1 elsewhere; a grammar must be lay",
        ),
        (
            "s -> x b\nx -> a",
            ":1: `b` has no line, so it is a letter, but at level 1, and other letters",
        ),
        (
            "\n".join(f"s{i} -> s{i + 1} s{i + 1}" for i in range(20)),
            "has 1048576 letters; at most 16384 are",
        ),
        ('{"all": [', "not JSON ("),
        ("[1]", "its field `all` is no list of two levels or more; give a file of PhysicsLM4's cfg3 grammars"),
        ('{"all": [[{}], 3]}', "its field `all` is no list"),
        ('{"all": [[{}, {}], [{}]]}', "its first level has 2 symbols, not one"),
        ('{"all": [[{"name": "s"}], [{"id": 1}]]}', "symbol 0 of level 0 has not the fields `name` and `children`"),
        ('{"all": [[3], [{"id": 1}]]}', "symbol 0 of level 0 has not the fields"),
        (
            '{"all": [[{"name": "s", "children": [[0]]}], [{"name": "a"}]]}',
            "symbol 0 of level 1 has not",
        ),
        ('{"all": [[{"name": "s", "children": []}], [{"id": 1}]]}', "symbol 0 of level 0 has no rules"),
        ('{"all": [[{"name": "s", "children": [[]]}], [{"id": 1}]]}', "has a rule with no children"),
        (
            '{"all": [[{"name": "s", "children": [[1]]}], [{"id": 1}]]}',
            "a child 1, the next level has symbols 0 to 0",
        ),
        ('{"all": [[{"name": "s", "children": [[true]]}], [{"id": 1}]]}', "has a child True"),
        ('{"all": [[{"name": "s", "children": [[0], [0]]}], [{"id": 1}]]}', "has a rule twice"),
    ],
)
def test_bad_grammars(text, message, tmp_path):
    path = tmp_path / "grammar.txt"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        pcfg.read(path)
    assert message in str(caught.value) and str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_bad_files_and_windows(tmp_path, folder):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            pcfg.read(path)
    (tmp_path / "bytes").write_bytes(b"s -> a \xff")
    with pytest.raises(InputError, match="not UTF-8"):
        pcfg.read(tmp_path / "bytes")
    for window in (433, 0, -1, 2.5):
        with pytest.raises(InputError, match=f"window is {window}; .* at most 432 letters: give a whole number from 1"):
            pcfg.make_sampler(cfg3b(), window)
    with pytest.raises(InputError, match="window is 432; of the strings of grammar cfg3b only a share of .*e-"):
        pcfg.make_sampler(cfg3b(), 432)
    with pytest.raises(InputError, match="this sampler has no window"):
        pcfg.windows(jax.random.key(0), pcfg.make_sampler(cfg3b()), 3)
    assert pcfg.make_sampler(cfg3b(), 138).kept == 1.0  # every string is long enough: nothing is rejected
