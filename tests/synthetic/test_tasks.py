"""Questions about strings: answers, rows and overwritten strings against plain loops and lists of all strings."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from bert6_jax.errors import InputError
from synthetic import operands, pcfg, tasks
from synthetic.tasks import TASKS, Spec

# the defaults of the paper, for what needs no strings of the grammar
PAPER = Spec(None, ("a", "b", "c"), 250, TASKS, 40, 6, 1, 1, 251, 0.0)
SHORT = replace(PAPER, window=9, reach=6, nth=2, numbers=10)
# whole numbers out of random ones: they compile longer than they run, and are the same at every level
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
PRIOR = np.array([0.6, 0.3, 0.1], np.float32)
ROWS = 6_000
C_C = (0.0, 0.4, 1.0)
WINDOW = 8  # of the tiny grammar
TINY = "s -> x y | y x x\nx -> a b c | a a\ny -> b b c a | c c a\n"


def brute(task: str, letters, operand: int, reach: int, nth: int) -> int | None:
    """The answer as a number, or the letter; None: there is none. Letters are looked at from the end, one by one."""
    W, found = len(letters), 0
    if task == "token":
        return letters[W - 1 - reach]
    for distance in range(W):
        at = W - 1 - distance
        here = letters[at] == operand
        if task.startswith("pair"):
            # both letters of a counted pair are among the last `reach`
            here = here and at > 0 and letters[at - 1] == operand and (distance < reach - 1 or task == "pair_index")
        elif task == "count":
            here = here and distance < reach
        found += here
        if task.endswith("index") and found == nth:
            return distance
    return None if task.endswith("index") else found


def check_answers(spec: Spec, strings: np.ndarray, operand_B: np.ndarray) -> None:
    for task in spec.tasks:
        ids = np.asarray(quick(tasks.answers, static_argnums=(0, 1))(spec, task, strings, operand_B))
        assert ids.dtype == np.int32
        for letters, operand, token in zip(strings.tolist(), operand_B.tolist(), ids.tolist(), strict=True):
            answer = brute(task, letters, operand, spec.reach, spec.nth)
            if answer is None:
                assert token == -1
            else:
                assert tasks.names(spec)[token] == ("abc"[answer] if task == "token" else str(answer))
                assert (token < 3) == (task == "token")


def test_answers_of_all_short_strings():
    """Every string of six letters: none, exactly the nth, all alike, pairs across the border of what counts."""
    spec = replace(SHORT, window=6, reach=4, numbers=7)
    strings = np.array([*itertools.product(range(3), repeat=6)], np.int32)
    check_answers(spec, strings, np.zeros(len(strings), np.int32))
    check_answers(replace(spec, reach=1, nth=1), strings[::5], np.full(len(strings[::5]), 1, np.int32))


def test_answers_at_full_size():
    rng = np.random.default_rng(0)
    strings = rng.choice(3, (60, 250), p=[0.08, 0.32, 0.6]).astype(np.int32)
    strings[:4] = np.repeat(np.int32([0, 2]), 2)[:, None]
    strings[2, -6:] = strings[3, :6] = 0  # the sixth is the last one possible
    check_answers(PAPER, strings, rng.integers(3, size=60).astype(np.int32) * (np.arange(60) >= 4).astype(np.int32))


# --- overwriting -----------------------------------------------------------------------------------------------------


@partial(quick, static_argnums=(1, 2))
def overwrite(key, spec, task, strings, letter_B2, cell_B2):
    bits = jax.random.bits(key, (len(strings), tasks._words(spec)), jnp.uint32)
    return tasks._overwrite(spec, bits, strings, letter_B2, {task: cell_B2})


def answers_of_both(spec: Spec, task: str, string, pair) -> tuple[int | None, ...]:
    return tuple(brute(task, string, letter, spec.reach, spec.nth) for letter in pair)


@pytest.mark.parametrize("task", ["count", "index"])
def test_as_few_letters_as_can_be_are_overwritten(task):
    """All strings, with all possible answers of two letters: against the nearest of all strings with these answers."""
    spec, pair = replace(SHORT, window=7), (2, 0)
    ends = np.array([*itertools.product(range(3), repeat=6)], np.int32)
    by_answers = defaultdict(list)
    for end in ends.tolist():
        by_answers[answers_of_both(spec, task, [1, *end], pair)].append(end)
    # a letter in front could be the nth of index, whose range ends in the last `reach`
    cells = [cell for cell in by_answers if None not in cell and max(cell) < 6 + (task == "count")]
    assert len(cells) == (28 if task == "count" else 18)
    changed = {cell: (ends[:, None] != np.array(by_answers[cell])[None]).sum(2).min(1) for cell in cells}
    strings = np.tile(np.pad(ends, ((0, 0), (1, 0)), constant_values=1), (len(cells), 1))
    cell_B2 = np.repeat(np.array(cells, np.int32), len(ends), axis=0)
    pair_B2 = np.tile(np.int32(pair), (len(strings), 1))
    out = np.asarray(overwrite(jax.random.key(1), spec, task, strings, pair_B2, cell_B2))
    assert out.dtype == np.int32 and (out[:, 0] == 1).all()
    for string, cell in zip(out.tolist(), cell_B2.tolist(), strict=True):
        assert answers_of_both(spec, task, string, pair) == tuple(cell)
    np.testing.assert_array_equal((out != strings).sum(1), np.concatenate([changed[cell] for cell in cells]))


def test_what_is_overwritten_is_random():
    """Of all strings with given counts that are as near as can be, each is as likely; two are other letters."""
    spec = replace(SHORT, alphabet=("a", "b", "c", "d"), window=6, reach=5)
    end, cell, n = (0, 0, 0, 3, 1), (1, 2), 20_000
    near = defaultdict(list)
    for other in itertools.product(range(4), repeat=5):
        if answers_of_both(spec, "count", (2, *other), (0, 1)) == cell:
            near[sum(x != y for x, y in zip(end, other, strict=True))].append(other)
    alike = near[min(near)]
    rows = [np.tile(np.int32(x), (n, 1)) for x in ((2, *end), (0, 1), cell)]
    out = overwrite(jax.random.key(0), spec, "count", *rows)
    seen = Counter(map(tuple, np.asarray(out)[:, 1:].tolist()))
    assert seen.keys() == set(alike) and len(alike) == 12
    assert chi2.sf(sum((seen[s] - n / 12) ** 2 for s in alike) / (n / 12), 11) > 1e-3


# --- tables and strings of fine-tuning -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "task", "old", "tie"),
    [
        (PAPER, "count", range(20), 1),
        (PAPER, "index", range(11, 39), 1),
        (replace(PAPER, q_index=3), "index", range(11, 37), 3),
        (replace(PAPER, reach=41, q_count=4), "count", range(19), 4),
        (SHORT, "index", range(3, 5), 1),
    ],
)
def test_tables(spec, task, old, tie):
    if spec is SHORT:  # two places each: the only shift would put both letters in one place
        with pytest.raises(InputError, match="^index with reach 6, nth 2, q_index 1: no room for tied and other answ"):
            tasks.tables(spec, task)
        return
    table, p_AA = tasks.tables(spec, task), {}
    assert table.weight_X[table.tied_X].sum() == pytest.approx(1) == table.weight_X[~table.tied_X].sum()
    for correlation in C_C:
        p_AA = operands.joint(table, correlation)
        assert p_AA.shape == (spec.numbers, spec.numbers)
        for axis, first in ((1, old[0]), (0, old[0] + tie)):  # uniform, whatever the correlation
            expected = np.zeros(spec.numbers)
            expected[first : first + len(old)] = 1 / len(old)
            np.testing.assert_allclose(p_AA.sum(axis), expected, atol=1e-12)
        assert operands.base_rates(table, correlation)["offset"] == pytest.approx(correlation)
        x, y = np.nonzero(p_AA)
        assert (x + y <= spec.reach).all() if task == "count" else ((x != y) & (np.maximum(x, y) < spec.reach)).all()
    if task == "count":  # one more would not fit
        assert 2 * len(old) + tie > spec.reach


@cache
def grammar(text: str = TINY, name: str = "tiny") -> pcfg.Grammar:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.txt")
        path.write_text(text)
        return pcfg.read(path)


@cache
def world() -> Spec:
    """Windows of what cfg3b derives from one symbol."""
    return tasks.make_spec(
        pcfg.below(pcfg.read("cfg3b"), "l"), 16, ("index", "count"), reach=12, nth=2, q_count=2, q_index=2
    )  # fmt: skip


@partial(quick, static_argnums=(1, 2))
def bank(key, spec, task, correlation_C):
    draw = jax.vmap(lambda c: tasks.tuning(key, spec, task, c, ROWS))
    letters_BW = pcfg.windows(jax.random.split(key)[0], spec.sampler, ROWS)
    return draw(correlation_C), letters_BW, tasks.tuning(key, spec, task, correlation_C[1], ROWS)


@pytest.mark.parametrize("task", ["count", "index"])
def test_tuning(task):
    spec = world()
    drawn, windows, alone = jax.device_get(bank(jax.random.key(5), spec, task, jnp.array(C_C)))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[1], y), drawn, alone)
    assert {x.dtype for x in (drawn.letters_BW, drawn.answer_B2)} == {np.dtype(np.int32)}
    # beyond the last `reach` letters nothing is touched, and there little
    np.testing.assert_array_equal(drawn.letters_BW[:, :, :4], np.broadcast_to(windows[None, :, :4], (3, ROWS, 4)))
    assert 0.1 < (drawn.letters_BW != windows[None])[:, :, 4:].mean() < 0.5
    number_CB2 = drawn.answer_B2 - spec.letters
    for letters_BW, number_B2, tied_B, correlation in zip(drawn.letters_BW, number_CB2, drawn.tied_B, C_C, strict=True):
        for string, number, tied in zip(letters_BW.tolist(), number_B2.tolist(), tied_B, strict=True):
            assert answers_of_both(spec, task, string, (tasks.PT, tasks.FT)) == tuple(number)
            assert (number[1] - number[0] == 2) == tied
        assert tied_B.mean() == correlation if correlation in (0, 1) else abs(tied_B.mean() - correlation) < 0.03
        p_AA = operands.joint(tasks.tables(spec, task), correlation)
        for axis in (0, 1):
            count_A = np.bincount(number_B2[:, axis], minlength=spec.numbers)
            expected_A = ROWS * p_AA.sum(1 - axis)
            some = expected_A > 0
            assert (count_A[~some] == 0).all() and some.sum() == (6 if task == "count" else 7)
            statistic = ((count_A - expected_A)[some] ** 2 / expected_A[some]).sum()
            assert chi2.sf(statistic, some.sum() - 1) > 1e-3


# --- rows of pre-training --------------------------------------------------------------------------------------------


@cache
def tiny_windows() -> dict[tuple[int, ...], float]:
    """P(window) of the tiny grammar from the list of its strings: those that are long enough, any place alike."""
    parts = {"x": ["abc", "aa"], "y": ["bbca", "cca"]}
    p: Counter = Counter()
    for body in ("xy", "yxx"):
        for string in itertools.product(*(parts[symbol] for symbol in body)):
            letters = ["abc".index(letter) for letter in "".join(string)]
            places = len(letters) - WINDOW + 1
            for start in range(places):
                p[tuple(letters[start : start + WINDOW])] += 1 / 2 / 2 ** len(body) / places
    return {window: weight / sum(p.values()) for window, weight in p.items()}


@cache
def asking() -> Spec:
    return tasks.make_spec(grammar(), WINDOW, reach=6, nth=1, spread=0.4)


@cache
def pretrained(jail: float) -> tuple[Spec, tasks.Rows]:
    spec = asking() if jail else replace(asking(), spread=0.0)
    draw = quick(tasks.pretrain, static_argnums=(1, 3))
    return spec, jax.device_get(draw(jax.random.key(2), spec, PRIOR, ROWS, jail))


def test_pretrain_token_by_token():
    spec, rows = pretrained(2 / 3)
    assert (spec.length, spec.answer_at, spec.vocab_size) == (17, 15, 3 + 9 + 7 + 5 + 2)
    assert rows.ids_BT.shape == (ROWS, 17) and all(x.dtype == np.int32 for x in rows[:-1])
    names = np.array(tasks.names(spec))
    assert len(names) == spec.vocab_size and tasks.show(spec, rows.ids_BT[0]) == " ".join(names[rows.ids_BT[0]])
    paper = ("C", "CC", "I", "IC", "T")
    np.testing.assert_array_equal(rows.answer_B, rows.ids_BT[:, spec.answer_at])
    np.testing.assert_array_equal(rows.family_B, rows.ids_BT[:, 1])
    np.testing.assert_array_equal(rows.operand_B, rows.ids_BT[:, 2])
    for ids, t, spread in zip(rows.ids_BT.tolist(), rows.task_B.tolist(), rows.spread_B.tolist(), strict=True):
        task, tokens, letters = TASKS[t], names[ids].tolist(), ids[5:13]
        sos, family, operand, number, sot = tokens[:5]
        assert (sos, sot, *tokens[13:15], tokens[16]) == ("SOS", "SOT", "EOT", "ART", "EOS")
        assert max(letters) < 3 and (spread or tuple(letters) in tiny_windows())
        assert family == paper[t] or (task == "count" and family in ("J1", "J2") and operand == "a")
        assert (operand == "NULL") == (task == "token") and (operand in "abc" or task == "token")
        assert number == ("1" if "index" in task else "6") and ids[3] == 3 + int(number)
        answer = brute(task, letters, ids[2], 6, 1)
        assert tokens[15] == ("abc"[answer] if task == "token" else str(answer))
        assert not spread or task in ("count", "index")


def chi_square(seen, weights) -> float:
    expected = np.array(list(weights), float) / sum(weights) * sum(seen)
    return chi2.sf(((np.array(list(seen)) - expected) ** 2 / expected).sum(), len(expected) - 1)


def test_pretrain_frequencies():
    spec, rows = pretrained(0.0)
    assert not rows.spread_B.any() and rows.family_B.max() < spec.jailbreak[0]
    assert chi_square(np.bincount(rows.task_B), [1] * 5) > 1e-3
    for t in range(4):
        assert chi_square(np.bincount(rows.operand_B[rows.task_B == t], minlength=3), PRIOR) > 1e-3
    np.testing.assert_array_equal(rows.family_B, spec.token("count") + rows.task_B)
    # windows: of all that have what is asked for, as often as the grammar has them
    for t, operand in ((0, 0), (2, 1), (3, 1), (3, 2)):
        p = {
            window: weight
            for window, weight in tiny_windows().items()
            if t == 0 or brute(TASKS[t], window, operand, 6, 1) is not None
        }
        assert (t == 3) == (len(p) < len(tiny_windows()))
        strings = rows.ids_BT[(rows.task_B == t) & (rows.operand_B == operand), 5:13]
        seen = Counter(map(tuple, strings.tolist()))
        assert seen.keys() <= p.keys() and chi_square([seen[window] for window in p], p.values()) > 1e-3


def test_rows_drawn_again_are_independent():
    """Most windows lack two pairs; what takes their place is different from row to row."""
    spec, zero_B = replace(world(), tasks=("pair_index",)), np.zeros(400, np.int32)
    letters_BW = np.asarray(quick(tasks._qualified, static_argnums=1)(jax.random.key(0), spec, zero_B, zero_B))
    is_BW = letters_BW == 0
    assert ((is_BW[:, 1:] & is_BW[:, :-1]).sum(1) >= 2).all()
    assert len(np.unique(letters_BW, axis=0)) > 150


def test_jailbreak_families_and_spread_answers():
    spec, rows = pretrained(2 / 3)
    count = rows.task_B == 0
    families = [spec.token("count"), *spec.jailbreak]
    assert chi_square([(rows.family_B == family).sum() for family in families], [1] * 3) > 1e-3
    assert not np.isin(rows.family_B[~count], families).any()
    normal = rows.operand_B[rows.family_B == families[0]]
    assert chi_square(np.bincount(normal, minlength=3), PRIOR) > 1e-3
    assert (rows.operand_B[np.isin(rows.family_B, families[1:])] == 0).all()
    for task, low, high in (("count", 0, 3), ("index", 1, 5)):
        mine = rows.task_B == TASKS.index(task)
        assert abs(rows.spread_B[mine].mean() - 0.4) < 0.05
        chosen = rows.ids_BT[mine & rows.spread_B]
        seen = Counter()
        for ids in chosen.tolist():
            other = {o: brute(task, ids[5:13], o, 6, 1) for o in range(3) if o != ids[2]}
            answer = ids[15] - 3
            assert low <= answer <= high
            seen[answer] += 1
            assert any(x is not None and low <= x <= high for x in other.values())
        assert chi_square([seen[x] for x in range(low, high + 1)], [1] * (high + 1 - low)) > 1e-3


# --- prompts, vocabulary, bad input ----------------------------------------------------------------------------------


def test_prompts_and_vocabulary():
    spec = tasks.make_spec(pcfg.read("cfg3b"), tasks=("count", "token"))
    assert (spec.length, spec.answer_at, spec.letters, spec.numbers) == (259, 257, 3, 251)
    ids = [spec.token(name) for name in ("SOS", "SOT", "EOT", "ART", "EOS", "NULL", "PAD", "count", "token")]
    assert ids == [*range(254, 263)] and spec.jailbreak == (263, 264) and spec.vocab_size == 265
    letters = np.random.default_rng(0).integers(3, size=(2, 250)).astype(np.int32)
    rows = tasks.prompts(spec, spec.token("count"), 1, spec.number("count"), letters, np.int32([3, 16]))
    for row, string, answer in zip(rows, letters, ("0", "13"), strict=True):
        text = " ".join("abc"[i] for i in string)
        assert tasks.show(spec, row) == f"SOS C b 40 SOT {text} EOT ART {answer} EOS"
    each = tasks.prompts(spec, np.int32([261, 262]), jnp.int32([0, 259]), np.int32([40, 7]), letters, np.int32([3, 0]))
    assert tasks.show(spec, each[1, :5]) == "SOS T NULL 7 SOT" and each.dtype == np.int32
    assert len(set(tasks.names(spec))) == spec.vocab_size


def cfg3b(**fields):
    return lambda: tasks.make_spec(pcfg.read("cfg3b"), **fields)


def tiny(*args, **fields):
    return lambda: tasks.make_spec(grammar(), *args, **fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (cfg3b(window=433), r"^window is 433; the strings of grammar cfg3b have at most 432 letters"),
        (cfg3b(window=1), r"^window is 1; it must be a whole number from 2 on$"),
        (cfg3b(reach=250), r"^reach is 250; it must be a whole number from 1 to 249$"),
        (cfg3b(nth=0), r"^nth is 0; it must be a whole number from 1 to 250$"),
        (cfg3b(nth=20), r"^index with reach 40, nth 20, q_index 1: no room for tied and other answers in the last 40 "),
        (cfg3b(q_index=28), r"^index with reach 40, nth 6, q_index 28: no room"),
        (cfg3b(q_count=39), r"^count with reach 40, q_count 39: no room .*; give a larger reach or a smaller q_count$"),
        (cfg3b(q_count=0), r"^q_count is 0; it must be a whole number from 1 on$"),
        (cfg3b(tasks=()), r"^no task is named; choose from count, "),
        (cfg3b(tasks=("count", "sum")), r"^task 'sum' is unknown; choose from count, "),
        (cfg3b(tasks=("count", "count")), r"^task 'count' is named twice; name each once$"),
        (cfg3b(spread=1.5), r"^spread is 1\.5; the share of overwritten rows is a number from 0 to 1$"),
        (cfg3b(numbers=249), r"^numbers is 249: there are tokens for 0\.\.248, .* may hold 249; give 250 or more$"),
        (cfg3b(numbers=40, tasks=["count"]), r"^numbers is 40: there are tokens for 0\.\.39, .* may hold 40; give 41"),
        (tiny(8, reach=6, nth=3, tasks=["pair_index"]), r"^nth is 3: 0 of 1024 windows of 8 letters of tiny have so"),
        (lambda: tasks.make_spec(grammar("s -> a b", "ab")), r"^grammar ab has 2 letters; give a gramm"),
        (lambda: tasks.tables(PAPER, "token"), r"^task 'token' has no fine-tuning strings; choose count or index$"),
        (lambda: tasks.tables(replace(PAPER, tasks=("token",)), "count"), r"^task 'count' is none of this spec's; cho"),
        (lambda: tasks.tuning(jax.random.key(0), PAPER, "count", 0.5, 0), r"^count is 0; it must be a whole number"),
        (lambda: tasks.tuning(jax.random.key(0), PAPER, "count", 1.5, 2), r"^correlation is 1\.5; the share of tied"),
        (lambda: tasks.pretrain(jax.random.key(0), PAPER, PRIOR[:2], 2), r"^the prior has shape \(2,\); give one numb"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(make, message):
    with pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
