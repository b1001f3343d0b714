"""Layered probabilistic grammars: strings made on the device, their exact lengths, and a parser (arXiv 2311.12786).

A grammar is layered: a symbol of level n is rewritten into symbols of level n + 1, and all letters stand at the last
level. `cfg3b` of arXiv 2305.13673, the grammar of the study, is built in; `read` takes others from a file, in one of
two forms:

    text    one symbol a line, the first is the start; what has no line is a letter; `→` does as well as `->`
                s -> r q [0.3] | q p [0.7]       # probabilities: with all rules of a symbol or with none (equal)
    JSON    the files `cfg3*.json` of PhysicsLM4 (arXiv 2305.13673), whose rules are equally likely

The sampler looks expansions up instead of writing them rule by rule (ours): the levels fall into segments, and a table
has every expansion of a symbol over a segment with its exact probability; cfg3b takes one number below 512 and at most
18 below 8,192 for a string. Whether a string is long enough for a window follows from these numbers alone, so the
letters are written of strings only that are kept, and only those of the window.

Letters beside those of `bert6_jax`: N nodes at the top of a segment, C children of a node at its bottom, E expansions,
K columns of a table, M candidates, W letters of a window.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert6_jax.data.sources import first_line, read_text
from bert6_jax.errors import InputError

CFG3B = """
s -> r q | q p
p -> m n o | n o m
q -> n m o | m n
r -> o m | m o n
m -> l j | j l k
n -> k j l | l j k
o -> l k j | k j
j -> h i | i h
k -> h g i | g h i
l -> i h g | h i g
g -> d f e | f e d
h -> e d f | d e f
i -> e f d | f d e
d -> c a | a b c
e -> c b | c a b
f -> c b a | b a
"""
CELLS = 1 << 20  # bound on the size of a table: it should stay in the cache of a core
RARE = 1e-3  # rejection is no way to find strings that are rarer
LONGEST = 1 << 14  # letters of a string; cfg3j, the longest of the released ones, has up to 2,052
FORM = "`symbol -> child child | child child`"
TOLERANCE = 1e-6  # how far the probabilities of a symbol may be from a sum of one


class Rule(NamedTuple):
    """One way to rewrite a symbol."""

    probability: float
    children: tuple[int, ...]  # numbers of symbols of the next level


@dataclass(frozen=True, eq=False)
class Grammar:
    """A layered grammar; hashed by identity, so that it can be a static argument."""

    name: str
    levels: tuple[tuple[str, ...], ...]  # names; levels[0] = (start,), levels[-1] = the letters
    rules: tuple[tuple[tuple[Rule, ...], ...], ...]  # rules[level][symbol]

    @property
    def letters(self) -> tuple[str, ...]:
        return self.levels[-1]


# --- reading ---------------------------------------------------------------------------------------------------------


def read(source: str | Path) -> Grammar:
    """The grammar `cfg3b`, or that of a file in one of the forms of the module's docstring.

    Letters are numbered by their names in the text form and in the order of the file in the JSON form. Symbols that no
    derivation reaches are an error in the text form; of the JSON files, whose rules were drawn at random, they are left
    out (cfg3e1 has 13).

    Raises:
      InputError: a file that cannot be read or has another form; a grammar that is not layered, derives a symbol from
        itself or does not reach one, has a rule twice, probabilities that are no distribution, or too long strings.
    """
    if str(source) == "cfg3b":
        return _from_text(CFG3B, "cfg3b", "cfg3b")
    path = Path(source).expanduser()
    text = read_text(path)
    if text.lstrip()[:1] in ("{", "["):
        grammar = _from_json(text, path)
    else:
        grammar = _from_text(text, path.stem, str(path))
    longest = _longest(grammar)
    if longest > LONGEST:
        raise InputError(f"{path}: its longest string has {longest} letters; at most {LONGEST} are supported")
    return grammar


def _longest(grammar: Grammar) -> int:
    width = [1] * len(grammar.letters)
    for table in reversed(grammar.rules):
        width = [max(sum(width[c] for c in rule.children) for rule in rules) for rules in table]
    return width[0]


class _Line(NamedTuple):
    """All rules of one symbol, of the text form."""

    where: str
    probabilities: list[float]
    bodies: list[tuple[str, ...]]


def _from_text(text: str, name: str, where: str) -> Grammar:
    lines: dict[str, _Line] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line := line.split("#")[0].strip():
            symbol, parsed = _parse_line(line, f"{where}:{number}")
            if symbol in lines:
                raise InputError(
                    f"{parsed.where}: `{symbol}` is defined a second time, first at {lines[symbol].where}; "
                    "write all its rules on one line, with | between them"
                )
            lines[symbol] = parsed
    if not lines:
        raise InputError(f"{where}: no rules in it; write one symbol a line, {FORM}")
    start = next(iter(lines))
    depth_of = _depths(lines, start)
    for symbol, line in lines.items():
        if symbol not in depth_of:
            raise InputError(
                f"{line.where}: `{symbol}` is unreachable, nothing that `{start}` derives has it; delete the line, "
                "use the symbol in a rule, or put the start symbol first"
            )
    deepest = max(depth_of.values())
    levels = [[s for s in lines if depth_of[s] == depth] for depth in range(deepest)]
    levels.append(sorted(s for s in depth_of if s not in lines))
    place = {s: i for level in levels for i, s in enumerate(level)}
    rules = [
        [
            tuple(
                Rule(p / sum(lines[s].probabilities), tuple(place[c] for c in body))
                for p, body in zip(lines[s].probabilities, lines[s].bodies, strict=True)
            )
            for s in level
        ]
        for level in levels[:-1]
    ]
    return Grammar(name, tuple(map(tuple, levels)), tuple(map(tuple, rules)))


def _parse_line(line: str, where: str) -> tuple[str, _Line]:
    parts = re.split(r"->|→", line)
    head = parts[0].split()
    if len(parts) != 2 or len(head) != 1 or re.search(r"[\[\]|]", head[0]):
        raise InputError(f"{where}: `{line}` is no line of a grammar; write {FORM}")
    bodies, given = [], []
    for rule in parts[1].split("|"):
        found = re.fullmatch(r"([^\[\]]*)(?:\[([^\[\]]*)\])?\s*", rule)
        if not found:
            raise InputError(f"{where}: `{rule.strip()}` is no rule of `{head[0]}`; write {FORM}")
        body = tuple(found[1].split())
        if not body:
            raise InputError(f"{where}: `{head[0]}` has a rule with no children; give it one or more, or delete it")
        if body in bodies:
            raise InputError(
                f"{where}: `{head[0]}` has the rule `{' '.join(body)}` twice; write it once, with the sum of the "
                "probabilities"
            )
        bodies.append(body)
        if found[2] is not None:
            given.append(_probability(found[2], f"{where}: `{head[0]}`"))
    if given and len(given) < len(bodies):
        raise InputError(
            f"{where}: {len(given)} of the {len(bodies)} rules of `{head[0]}` have a probability; give all of them one "
            "or none"
        )
    if given and abs(sum(given) - 1) > TOLERANCE:
        raise InputError(f"{where}: the probabilities of `{head[0]}` sum to {sum(given):g}, not to 1; correct them")
    return head[0], _Line(where, given or [1 / len(bodies)] * len(bodies), bodies)


def _probability(text: str, where: str) -> float:
    try:
        p = float(text)
    except ValueError:
        p = math.nan
    if not 0 < p <= 1:
        raise InputError(f"{where} has a rule of probability [{text}]; give a number above 0 and up to 1")
    return p


def _depths(lines: dict[str, _Line], start: str) -> dict[str, int]:
    """The level of every symbol that is reached."""
    depth_of, last_of, level = {start: 0}, {}, [start]
    while level:
        following = []
        for symbol in level:
            for child in itertools.chain.from_iterable(lines[symbol].bodies if symbol in lines else ()):
                depth = depth_of[symbol] + 1
                last_of.setdefault(child, symbol)
                if child not in depth_of:
                    depth_of[child] = depth
                    following.append(child)
                elif depth_of[child] != depth:
                    where = lines[symbol].where
                    if cycle := _path(lines, child, symbol):
                        raise InputError(
                            f"{where}: `{child}` is endless, it derives itself ({' -> '.join([*cycle, child])}); "
                            "a symbol may only derive symbols of lower levels"
                        )
                    raise InputError(
                        f"{where}: `{child}` is at level {depth} here and at level {depth_of[child]} elsewhere; "
                        "a grammar must be layered: give the symbol another name here"
                    )
        level = following
    deepest = max(depth_of.values())
    for symbol, depth in depth_of.items():
        if symbol not in lines and depth < deepest:
            raise InputError(
                f"{lines[last_of[symbol]].where}: `{symbol}` has no line, so it is a letter, but at level {depth}, "
                f"and other letters are at level {deepest}; a grammar must be layered: give it a line"
            )
    return depth_of


def _path(lines: dict[str, _Line], source: str, target: str) -> list[str]:
    """The symbols from one to another that it derives; empty if it does not."""
    came, queue = {source: ""}, [source]
    for symbol in queue:
        if symbol == target:
            path = [symbol]
            while came[path[0]]:
                path.insert(0, came[path[0]])
            return path
        for child in itertools.chain.from_iterable(lines[symbol].bodies if symbol in lines else ()):
            if child not in came:
                came[child] = symbol
                queue.append(child)
    return []


def _from_json(text: str, path: Path) -> Grammar:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({first_line(error)}); copy the file again") from error

    def wrong(what: str) -> InputError:
        return InputError(f"{path}: {what}; give a file of PhysicsLM4's cfg3 grammars, or the text form: {FORM}")

    nodes = content.get("all") if isinstance(content, dict) else None
    if not (isinstance(nodes, list) and len(nodes) > 1 and all(isinstance(level, list) and level for level in nodes)):
        raise wrong("its field `all` is no list of two levels or more")
    if len(nodes[0]) != 1:
        raise wrong(f"its first level has {len(nodes[0])} symbols, not one")
    levels, rules = [], []
    for depth, level in enumerate(nodes):
        last = depth == len(nodes) - 1
        kind = (int if last else str, type(None) if last else list)
        names, table = [], []
        for place, node in enumerate(level):
            where = f"symbol {place} of level {depth}"
            fields = (node.get("id" if last else "name"), node.get("children")) if isinstance(node, dict) else ()
            if tuple(type(field) for field in fields) != kind:
                raise wrong(f"{where} has not the fields " + ("`id`" if last else "`name` and `children`"))
            names.append(str(fields[0]))
            if not last:
                table.append(_json_rules(fields[1], len(nodes[depth + 1]), where, wrong))
        levels.append(tuple(names))
        rules.append(tuple(table))
    return _reachable(path.stem, levels, rules[:-1], 0)


def _json_rules(bodies: list, below: int, where: str, wrong: Callable[[str], InputError]) -> tuple[Rule, ...]:
    if not bodies:
        raise wrong(f"{where} has no rules")
    for body in bodies:
        if not (isinstance(body, list) and body):
            raise wrong(f"{where} has a rule with no children")
        for child in body:
            if type(child) is not int or not 0 <= child < below:
                raise wrong(f"{where} has a child {child!r}, the next level has symbols 0 to {below - 1}")
    if len({tuple(body) for body in bodies}) < len(bodies):
        raise wrong(f"{where} has a rule twice")
    return tuple(Rule(1 / len(bodies), tuple(body)) for body in bodies)


def below(grammar: Grammar, symbol: str) -> Grammar:
    """The grammar of what one symbol derives, for shorter strings; the letters keep their numbers.

    Raises:
      InputError: a name that no symbol above the letters has.
    """
    for depth, level in enumerate(grammar.levels[:-1]):
        if symbol in level:
            levels, rules = grammar.levels[depth:], grammar.rules[depth:]
            return _reachable(f"{grammar.name} from {symbol}", levels, rules, level.index(symbol))
    known = " ".join(s for level in grammar.levels[:-1] for s in level)
    raise InputError(f"{symbol!r} is no symbol of grammar {grammar.name} that is rewritten; give one of {known}")


def _reachable(name: str, levels: Sequence, rules: Sequence, start: int) -> Grammar:
    """What one symbol of the first level derives; all letters stay, so that they keep their numbers."""
    kept, new_levels, new_rules = [start], [], []
    for depth, table in enumerate(rules):
        following = sorted({c for s in kept for rule in table[s] for c in rule.children})
        if depth == len(rules) - 1:
            following = list(range(len(levels[-1])))
        place = {c: i for i, c in enumerate(following)}
        new_levels.append(tuple(levels[depth][s] for s in kept))
        new_rules.append(
            tuple(tuple(Rule(r.probability, tuple(place[c] for c in r.children)) for r in table[s]) for s in kept)
        )
        kept = following
    return Grammar(name, (*new_levels, tuple(levels[-1])), tuple(new_rules))


# --- exact answers ---------------------------------------------------------------------------------------------------


def lengths(grammar: Grammar) -> np.ndarray:
    """P(length) of a string, float64 [longest + 1], by convolution from the letters up."""
    below = [np.array([0.0, 1.0])] * len(grammar.letters)
    for table in reversed(grammar.rules):
        level = []
        for rules in table:
            parts = []
            for rule in rules:
                out = np.array([rule.probability])
                for child in rule.children:
                    out = np.convolve(out, below[child])
                parts.append(out)
            total = np.zeros(max(p.size for p in parts))
            for part in parts:
                total[: part.size] += part
            level.append(total)
        below = level
    return below[0]


def parses(grammar: Grammar, ids: Sequence[int] | np.ndarray) -> bool:
    """Whether the grammar derives this string of letters' numbers [T].

    Works from the rules alone: for each symbol and each width there is one whole number whose bit i says that the
    symbol derives the `width` letters from position i on; a rule shifts and intersects them.
    """
    ids = np.asarray(ids)
    below: list[dict[int, int]] = []
    for letter in range(len(grammar.letters)):
        mask = sum(1 << int(i) for i in np.flatnonzero(ids == letter))
        below.append({1: mask} if mask else {})
    for table in reversed(grammar.rules):
        below = [_spans(rules, below) for rules in table]
    return bool(below[0].get(ids.size, 0) & 1)


def _spans(rules: Sequence[Rule], below: list[dict[int, int]]) -> dict[int, int]:
    out: dict[int, int] = {}
    for rule in rules:
        part = below[rule.children[0]]
        for child in rule.children[1:]:
            longer: dict[int, int] = {}
            for width, starts in part.items():
                for more, mask in below[child].items():
                    if both := starts & (mask >> width):
                        longer[width + more] = longer.get(width + more, 0) | both
            part = longer
        for width, starts in part.items():
            out[width] = out.get(width, 0) | starts
    return out


# --- the sampler -----------------------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """Tables of the levels from one to another. Symbols count from 1 here; 0 is none, and expands into expansion 0."""

    top: int  # its first level
    bits: int  # log2 K
    own_SK: np.ndarray  # int32, expansion of a column
    cut_SK: np.ndarray  # uint32, out of 2^32: the share of the column that is its own
    other_SK: np.ndarray  # int32, expansion of the rest (the alias method)
    pure: bool  # every column is of one expansion
    rows_EC: np.ndarray  # symbols at the bottom, 0 after the last
    width_E: np.ndarray  # int32, how many


@dataclass(frozen=True, eq=False)
class Sampler:
    """What `strings` and `windows` need; hashed by identity, so that it can be a static argument."""

    grammar: Grammar
    window: int | None
    longest: int
    kept: float  # share of the strings that are long enough for the window
    segments: tuple[Segment, ...]
    nodes: int  # [N] at the top of the last segment, empty ones among them
    draws: int  # random words of a string


class Strings(NamedTuple):
    ids_BT: jax.Array  # int32, -1 after the end
    length_B: jax.Array  # int32


def make_sampler(grammar: Grammar, window: int | None = None) -> Sampler:
    """Precompute the tables of a grammar (cfg3b: 0.1 s, 0.7 MB).

    Args:
      grammar: what to sample.
      window: letters of what `windows` gives; without it only `strings` can be called.

    Raises:
      InputError: a window that no string is long enough for, or fewer than one in a thousand.
    """
    p = lengths(grammar)
    longest = p.size - 1
    kept = 1.0
    if window is not None:
        if type(window) is not int or not 1 <= window <= longest:
            raise InputError(
                f"window is {window!r}; the strings of grammar {grammar.name} have at most {longest} letters: "
                f"give a whole number from 1 to {longest}"
            )
        if p[:window].any():
            kept = float(p[window:].sum())
        if kept < RARE:
            raise InputError(
                f"window is {window}; of the strings of grammar {grammar.name} only a share of {kept:.1e} is so long, "
                f"and at least {RARE:g} is needed: give a smaller one"
            )
    segments, nodes, draws = [], 1, 0
    for top, bottom in itertools.pairwise(_cuts(grammar)):
        segments.append(_segment(grammar, top, bottom))
        draws += nodes
        if bottom < len(grammar.levels) - 1:
            nodes *= segments[-1].rows_EC.shape[1]
    return Sampler(grammar, window, longest, kept, tuple(segments), nodes, draws)


def _size(grammar: Grammar, top: int, bottom: int) -> int:
    """Cells of the larger table of a segment."""
    count, width = [1] * len(grammar.levels[bottom]), [1] * len(grammar.levels[bottom])
    for table in reversed(grammar.rules[top:bottom]):
        count, width = (
            [sum(math.prod(count[c] for c in rule.children) for rule in rules) for rules in table],
            [max(sum(width[c] for c in rule.children) for rule in rules) for rules in table],
        )
    return max(sum(count) * max(width), len(count) * 2 * max(count))


def _cuts(grammar: Grammar) -> list[int]:
    """Levels between the segments: from the letters up, each as high as its table may be large."""
    ends = [len(grammar.levels) - 1]
    while ends[0] > 0:
        top = ends[0] - 1
        while top > 0 and _size(grammar, top - 1, ends[0]) <= CELLS:
            top -= 1
        ends.insert(0, top)
    return ends


def _segment(grammar: Grammar, top: int, bottom: int) -> Segment:
    below = [(np.ones(1), np.full((1, 1), s + 1)) for s in range(len(grammar.levels[bottom]))]
    for table in reversed(grammar.rules[top:bottom]):
        below = [_expansions(rules, below) for rules in table]
    wide = max(rows.shape[1] for _, rows in below)
    rows_EC = np.concatenate([np.zeros((1, wide), int)] + [_widened(rows, wide) for _, rows in below])
    bits = max(1, (max(p.size for p, _ in below) - 1).bit_length())
    columns, first = [_alias(np.ones(1), bits)], 1
    for p, _ in below:
        own, cut, other = _alias(p, bits)
        columns.append((own + first, cut, other + first))
        first += p.size
    own_SK, cut_SK, other_SK = (np.stack(x) for x in zip(*columns, strict=True))
    small = np.int8 if rows_EC.max() < 128 else np.int32
    return Segment(
        top,
        bits,
        own_SK.astype(np.int32),
        cut_SK,
        other_SK.astype(np.int32),
        bool((own_SK == other_SK).all()),
        rows_EC.astype(small),
        (rows_EC > 0).sum(1).astype(np.int32),
    )


def _widened(rows: np.ndarray, wide: int) -> np.ndarray:
    return np.pad(rows, ((0, 0), (0, wide - rows.shape[1])))


def _expansions(rules: Sequence[Rule], below: list) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and rows of every expansion of a symbol, from those of its children."""
    chances, parts = [], []
    for rule in rules:
        p, rows = np.array([rule.probability]), np.zeros((1, 0), int)
        for child in rule.children:
            q, more = below[child]
            rows = np.concatenate([np.repeat(rows, q.size, 0), np.tile(more, (p.size, 1))], 1)
            p = np.repeat(p, q.size) * np.tile(q, p.size)
        chances.append(p)
        parts.append(np.take_along_axis(rows, np.argsort(rows == 0, axis=1, kind="stable"), 1))
    wide = max(rows.shape[1] for rows in parts)
    return np.concatenate(chances), np.concatenate([_widened(rows, wide) for rows in parts])


def _alias(p: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns of the alias method (Walker 1977) with 2^bits columns: own, cut, other, [K] each."""
    K = 1 << bits
    share = np.zeros(K)
    share[: p.size] = p / p.sum() * K
    share = share.tolist()
    own, cut, other = np.arange(K), np.full(K, 2**32 - 1, np.uint32), np.arange(K)
    small = [i for i in range(K) if share[i] < 1 - 1e-12]
    large = [i for i in range(K) if share[i] > 1 + 1e-12]
    while small and large:
        i, j = small.pop(), large[-1]
        other[i] = j
        cut[i] = min(round(share[i] * 2**32), 2**32 - 1)
        if cut[i] == 0:
            own[i] = j
        share[j] -= 1 - share[i]
        if share[j] <= 1 + 1e-12:
            large.pop()
            if share[j] < 1 - 1e-12:
                small.append(j)
    return own, cut, other


def strings(key: jax.Array, sampler: Sampler, count: int) -> Strings:
    """Whole strings of any length, [count, longest], a pure function of the key; the sampler's window plays no part.

    A string has the probability of the grammar, up to 2^-32. Jits with `sampler` and `count` static, and runs within
    `vmap`, loops and `shard_map`.
    """
    entry_BN, length_B = _draw(key, sampler, count)
    ids_BT = _letters(sampler, entry_BN, jnp.zeros_like(length_B), sampler.longest)
    return Strings(jnp.where(jnp.arange(sampler.longest)[None] < length_B[:, None], ids_BT, -1), length_B)


def windows(key: jax.Array, sampler: Sampler, count: int) -> jax.Array:
    """Windows of strings that are long enough, int32 [count, W], a pure function of the key.

    A string of fewer letters than W is drawn again, and the window begins at any place of the string with equal chances
    (both ours; the paper keeps a random window and does not say what becomes of short strings). Jits as `strings`.

    Raises:
      InputError: a sampler without a window.
    """
    if sampler.window is None:
        raise InputError("this sampler has no window; give make_sampler one")
    string_key, start_key = jax.random.split(key)
    entry_BN, length_B = _long_enough(string_key, sampler, count)
    start_B = jax.random.randint(start_key, (count,), 0, length_B - (sampler.window - 1))
    return _letters(sampler, entry_BN, start_B, sampler.window)


def _draw(key: jax.Array, sampler: Sampler, count: int) -> tuple[jax.Array, jax.Array]:
    """Expansions of the nodes at the top of the last segment, [count, N], and the strings' lengths."""
    words_BX = jax.random.bits(key, (count, sampler.draws))
    symbol_BN = jnp.ones((count, 1), jnp.int32)
    at = 0
    for segment in sampler.segments:
        nodes = symbol_BN.shape[1]
        word_BN = words_BX[:, at : at + nodes]
        at += nodes
        column_BN = (symbol_BN << segment.bits) + (word_BN >> np.uint32(32 - segment.bits)).astype(jnp.int32)
        entry_BN = jnp.asarray(segment.own_SK.ravel())[column_BN]
        if not segment.pure:
            own_BN = word_BN << np.uint32(segment.bits) < jnp.asarray(segment.cut_SK.ravel())[column_BN]
            entry_BN = jnp.where(own_BN, entry_BN, jnp.asarray(segment.other_SK.ravel())[column_BN])
        if segment is not sampler.segments[-1]:
            symbol_BN = jnp.asarray(segment.rows_EC)[entry_BN].reshape(count, -1).astype(jnp.int32)
    return entry_BN, jnp.asarray(segment.width_E)[entry_BN].sum(-1, dtype=jnp.int32)


def _long_enough(key: jax.Array, sampler: Sampler, count: int) -> tuple[jax.Array, jax.Array]:
    """As `_draw`, of the strings that have a window's letters: the first of a stream of candidates."""
    if sampler.kept == 1.0:
        return _draw(key, sampler, count)
    p = sampler.kept
    candidates = min(math.ceil((count + 4 * math.sqrt(count * (1 - p)) + 4) / p), 8 * count + 64)

    def fill(carry):
        key, filled, entry_BN, length_B = carry
        key, draw_key = jax.random.split(key)
        entry_MN, length_M = _draw(draw_key, sampler, candidates)
        kept_M = length_M >= sampler.window
        place_M = jnp.where(kept_M, filled + jnp.cumsum(kept_M, dtype=jnp.int32) - 1, count)  # beyond: dropped
        entry_BN = entry_BN.at[place_M].set(entry_MN, mode="drop")
        length_B = length_B.at[place_M].set(length_M, mode="drop")
        return key, filled + kept_M.sum(dtype=jnp.int32), entry_BN, length_B

    empty = jnp.zeros((count, sampler.nodes), jnp.int32), jnp.zeros(count, jnp.int32)
    carry = fill((key, jnp.int32(0), *empty))  # nearly always enough; within `shard_map` the loop's carry must vary
    return jax.lax.while_loop(lambda carry: carry[1] < count, fill, carry)[2:]


def _letters(sampler: Sampler, entry_BN: jax.Array, start_B: jax.Array, width: int) -> jax.Array:
    """Write `width` letters from `start_B` on: int32 [B, width]."""
    last = sampler.segments[-1]
    width_BN = jnp.asarray(last.width_E)[entry_BN]
    begin_BN = jnp.cumsum(width_BN, axis=1) - width_BN - start_B[:, None]
    # Letter t of the window is cell t + base of the table, with the base of the last node that begins at or before t;
    # summed up from differences, it takes no search.
    base_BN = entry_BN * last.rows_EC.shape[1] - begin_BN
    t_1W = jnp.arange(width, dtype=jnp.int32)[None]

    def add(cell_BW, node):
        begin_B, step_B = node
        return cell_BW + jnp.where(t_1W >= begin_B[:, None], step_B[:, None], 0), None

    later = begin_BN[:, 1:].T, jnp.diff(base_BN, axis=1).T
    cell_BW, _ = jax.lax.scan(add, t_1W + base_BN[:, :1], later, unroll=min(32, max(1, sampler.nodes - 1)))
    letters = jnp.asarray(last.rows_EC.ravel())
    return letters.at[cell_BW].get(mode="clip").astype(jnp.int32) - 1
