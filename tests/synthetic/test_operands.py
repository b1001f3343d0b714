"""Strings with tied answers against lists of all strings: answers, tables, places, letters, and what rules score."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from bert6_jax.errors import InputError
from synthetic import operands
from synthetic.operands import counter_tables, max_tables

C_C = (0.0, 0.3, 1.0)
ROWS = 20_000
TABLES = {
    "conditional": counter_tables(4, letters=4),
    "nudged": counter_tables(4, letters=4, q=0, independent="nudged"),  # one side only, of a = 0 and of a = 2
    "minus": counter_tables(4, letters=4, q=-2),
    "max": max_tables(5, (3, 4), 0, 2, 3, letters=6),
    "max, falling": max_tables(4, (3, 4), 2, 1, -2, letters=6),
}
FULL = {
    "counter, 20": counter_tables(20),
    "counter, 45": counter_tables(45),
    "max, 26": max_tables(12),
    "max, 26, falling": max_tables(10, (9,), 7, 0, -12),
}
SIZES = {"max": {3, 4}, "max, falling": {3, 4}, "max, 26": {9, 10}, "max, 26, falling": {9}}


@partial(jax.jit, static_argnums=(1, 3))
@partial(jax.vmap, in_axes=(None, None, 0, None))
def bank(key, tables, correlation, n_rows) -> operands.Rows:
    """One member a C."""
    return operands.sample(key, tables, correlation, n_rows)


@cache
def drawn(name: str) -> list[operands.Rows]:
    """A member for each of `C_C`."""
    tables = (TABLES | FULL)[name]
    rows = jax.device_get(bank(jax.random.key(3), tables, jnp.array(C_C), ROWS if name in TABLES else 2_000))
    return [jax.tree.map(lambda x, c=c: x[c], rows) for c in range(len(C_C))]


def answers(tables: operands.Tables, string: tuple[int, ...]) -> tuple[int, int]:
    if tables.ranks is None:
        return string.count(0), string.count(1)
    ordered = sorted(string)
    return ordered[tables.ranks[0]], ordered[tables.ranks[1]]


def strings(tables: operands.Tables, rows: operands.Rows) -> list[tuple[int, ...]]:
    """Letters between BOS and the pads; everything about the form of the rows is checked on the way."""
    V = tables.letters
    assert rows.ids_BT.dtype == rows.segment_BT.dtype == np.int32
    assert rows.ids_BT.shape == rows.segment_BT.shape == (len(rows.pt_B), tables.length + 1)
    np.testing.assert_array_equal(rows.ids_BT != V + 1, rows.segment_BT == 1)
    assert set(np.unique(rows.segment_BT)) <= {0, 1} and (np.diff(rows.segment_BT) <= 0).all()
    assert (rows.ids_BT[:, 0] == V).all() and ((rows.ids_BT >= 0) & (rows.ids_BT <= V + 1)).all()
    assert (rows.ids_BT[:, 1:] != V).all()
    return [tuple(ids[1:size]) for ids, size in zip(rows.ids_BT.tolist(), rows.segment_BT.sum(1), strict=True)]


@pytest.mark.parametrize("name", [*TABLES, *FULL])
def test_answers_and_ties_of_every_row(name):
    tables = (TABLES | FULL)[name]
    sizes = {len(string) for rows in drawn(name) for string in strings(tables, rows)}
    assert sizes == SIZES.get(name, {tables.length})
    for rows, correlation in zip(drawn(name), C_C, strict=True):
        for string, pt, ft, tied in zip(strings(tables, rows), rows.pt_B, rows.ft_B, rows.tied_B, strict=True):
            assert answers(tables, string) == (pt, ft) and (ft - pt == tables.q) == tied
            assert tables.ranks is None or len(set(string)) == len(string)
        share = rows.tied_B.mean()
        assert share == correlation if correlation in (0, 1) else abs(share - correlation) < 0.04


def every_string(tables: operands.Tables, name: str) -> dict[bool, dict[tuple[int, ...], float]]:
    """P(string | tied) by listing all strings, for the two kinds of rows; nothing of it comes from the tables."""
    V, q = tables.letters, tables.q
    p: dict[bool, dict] = {True: {}, False: {}}
    if tables.ranks:
        for n in (3, 4):
            some = defaultdict(list)
            for string in itertools.permutations(range(V), n):
                pt, ft = answers(tables, string)
                some[ft - pt == q].append(string)
            for tied in p:
                p[tied] |= {string: 1 / 2 / len(some[tied]) for string in some[tied]}
        return p
    of = defaultdict(list)
    for string in itertools.product(range(V), repeat=tables.length):
        of[answers(tables, string)].append(string)
    total = V**tables.length
    for a in range(tables.length + 1):
        alike = {b: len(of[a, b]) for b in range(tables.length + 1) if of[a, b]}
        share = sum(alike.values()) / total
        if a + q in alike:
            p[True] |= {string: share / alike[a + q] for string in of[a, a + q]}
        left = {b: float(count) for b, count in alike.items() if b != a + q}
        if name == "nudged" and a + q in alike:
            near = [b for b in left if abs(b - a - q) == 1]
            for b in near:
                left[b] += alike[a + q] / len(near)
        for b in left:
            p[False] |= {string: share * left[b] / sum(left.values()) / alike[b] for string in of[a, b]}
    return {tied: {string: w / sum(p[tied].values()) for string, w in p[tied].items()} for tied in p}


@pytest.mark.parametrize("name", TABLES)
def test_tables_against_all_strings(name):
    tables = TABLES[name]
    cells = [tuple(cell) for cell in tables.cell_X3.tolist()]
    assert len(set(cells)) == len(cells) and (np.diff(tables.tied_X.astype(int)) <= 0).all()
    for tied, p in every_string(tables, name).items():
        mass = Counter()
        for string, weight in p.items():
            mass[len(string), *answers(tables, string)] += weight
        part = tables.tied_X == tied
        ours = dict(zip(itertools.compress(cells, part), tables.weight_X[part], strict=True))
        assert ours.keys() == mass.keys()
        for cell, weight in ours.items():
            assert weight == pytest.approx(mass[cell], rel=1e-12)
        assert sum(ours.values()) == pytest.approx(1, rel=1e-12)
        p_AA = np.zeros((tables.labels, tables.labels))
        for (_, pt, ft), weight in mass.items():
            p_AA[pt, ft] += weight
        np.testing.assert_allclose(operands.joint(tables, float(tied)), p_AA, rtol=1e-12)


@pytest.mark.parametrize("name", TABLES)
def test_every_string_as_often_as_it_should(name):
    """One test for cells, places, order and the other letters: chi-square over the strings themselves."""
    tables = TABLES[name]
    p = every_string(tables, name)
    for rows, correlation in zip(drawn(name), C_C, strict=True):
        seen = Counter(strings(tables, rows))
        weight = Counter({s: correlation * w for s, w in p[True].items() if correlation})
        weight.update({s: (1 - correlation) * w for s, w in p[False].items() if correlation < 1})
        assert seen.keys() <= weight.keys()
        expected = np.array([ROWS * w for w in weight.values()])
        observed = np.array([seen[s] for s in weight])
        rare = expected < 5  # in one class
        expected, observed = (np.append(x[~rare], x[rare].sum()) for x in (expected, observed))
        statistic = ((observed - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
        assert len(expected) > 20 and chi2.sf(statistic, (expected > 0).sum() - 1) > 1e-3


def test_nudged_and_natural_strings_by_simulation():
    """At the study's size: uniform strings, a + 1 b's replaced; and conditional on another number of b's."""
    rng, n, L = np.random.default_rng(0), 400_000, 20
    a, b = rng.multinomial(L, [1 / 9, 1 / 9, 7 / 9], n).T[:2]
    hit = b == a + 1
    step = np.where(a + 2 > L - a, -1, rng.choice([-1, 1], n))
    for independent, pairs in (("nudged", (a, np.where(hit, b + step, b))), ("uniform", (a, b))):
        p_AA = np.zeros((L + 1, L + 1))
        np.add.at(p_AA, pairs, 1 / n)
        if independent == "uniform":  # leave b = a + 1 out, a by a
            p_AA[a[hit], b[hit]] = 0
            p_AA *= (np.bincount(a, minlength=L + 1) / n / np.maximum(p_AA.sum(1), 1e-12))[:, None]
            independent = "conditional"
        ours_AA = operands.joint(counter_tables(L, independent=independent), 0.0)
        np.testing.assert_allclose(ours_AA, p_AA, atol=5 * math.sqrt(0.1 / n))
        assert abs(ours_AA - p_AA).sum() < 0.02
        np.testing.assert_allclose(ours_AA.sum(1), [math.comb(L, k) * 8 ** (L - k) / 9**L for k in range(L + 1)])


@pytest.mark.parametrize("name", ["counter, 20", "max, 26"])
def test_places_and_letters_at_full_size(name):
    """Where the answers stand, and which letters there are, in rows of the study's size."""
    tables, rows = FULL[name], drawn(name)[1]
    all_strings = strings(tables, rows)
    if tables.ranks is None:
        ids_BL = np.array(all_strings)
        for letter in range(2):
            count_L = (ids_BL == letter).sum(0)
            assert chi2.sf(((count_L - count_L.mean()) ** 2 / count_L.mean()).sum(), 19) > 1e-3
        count_V = np.bincount(ids_BL.ravel(), minlength=9)[2:]
        assert chi2.sf(((count_V - count_V.mean()) ** 2 / count_V.mean()).sum(), 6) > 1e-3
    else:
        for n in (9, 10):
            of_n = [(s, pt) for s, pt in zip(all_strings, rows.pt_B, strict=True) if len(s) == n]
            count_L = np.bincount([s.index(pt) for s, pt in of_n], minlength=n)
            assert chi2.sf(((count_L - count_L.mean()) ** 2 / count_L.mean()).sum(), n - 1) > 1e-3
        assert abs(np.mean([len(s) == 9 for s in all_strings]) - 0.5) < 0.05


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("c", range(len(C_C)))
def test_base_rates_against_drawn_rows(name, c):
    tables, rows = FULL[name], drawn(name)[c]
    rates = operands.base_rates(tables, C_C[c])
    p_AA = operands.joint(tables, C_C[c])
    guess = {
        "same": rows.pt_B == rows.ft_B,
        "offset": rows.pt_B + tables.q == rows.ft_B,
        "constant_pt": rows.pt_B == p_AA.sum(1).argmax(),
        "constant_ft": rows.ft_B == p_AA.sum(0).argmax(),
        "ft_from_pt": p_AA.argmax(1)[rows.pt_B] == rows.ft_B,
        "pt_from_ft": p_AA.argmax(0)[rows.ft_B] == rows.pt_B,
    }
    assert rates.keys() == guess.keys()
    for rate, hit in guess.items():
        assert abs(rates[rate] - hit.mean()) < 4 * math.sqrt(0.25 / len(hit)), rate
    assert rates["offset"] == pytest.approx(C_C[c])
    assert rates["ft_from_pt"] >= max(rates["offset"], rates["constant_ft"], rates["same"]) - 1e-12


def test_nudging_makes_a_counter_of_b_score_on_a():
    same = [operands.base_rates(counter_tables(20, independent=rule), 0.0)["same"] for rule in operands.INDEPENDENT]
    assert same[1] > same[0] + 0.03


def test_a_row_depends_on_its_key_and_c_alone():
    """As a member of a bank over C, of a bank over keys and C, and alone."""
    tables, expected = TABLES["max"], drawn("max")

    @jax.jit
    def again(keys, correlation):
        draw = partial(operands.sample, tables=tables, n_rows=ROWS)
        over_keys = jax.vmap(lambda key, c: draw(key, correlation=c))(keys, correlation)
        return over_keys, draw(keys[0], correlation=correlation[0])

    keys = jax.vmap(jax.random.key)(jnp.array([3, 3, 4]))
    over_keys, alone = jax.device_get(again(keys, jnp.array([0.3, 1.0, 0.3])))
    jax.tree.map(np.testing.assert_array_equal, alone, expected[1])
    for x, other, one in zip(over_keys, expected[1], expected[2], strict=True):
        np.testing.assert_array_equal(x[:2], np.stack([other, one]))
        assert (x[2] != other).any()
    # what is drawn as tied at a low C is at a higher one
    low, mid, high = (rows.tied_B for rows in drawn("max"))
    assert (low <= mid).all() and (mid <= high).all()


def test_cells_too_rare_to_draw_leave_ties_exact():
    tables = FULL["counter, 45"]
    edge, cell_X3 = operands._edges(tables)
    assert len(cell_X3) < len(tables.cell_X3) and edge.dtype == np.uint32 and (np.diff(edge.astype(np.int64)) > 0).all()
    assert edge[(cell_X3[:, 2] - cell_X3[:, 1] == 1).sum() - 1] == 2**31


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: counter_tables(0), r"^length is 0; it must be a whole number from 1 on$"),
        (lambda: counter_tables(2.5), r"^length is 2\.5; it must be a whole number from 1 on$"),
        (lambda: counter_tables(5, letters=2), r"^letters is 2; it must be a whole number from 3 to 26$"),
        (lambda: counter_tables(5, q=6), r"^q is 6: no string of 5 letters has b = a \+ q; give a q from -5 to 5"),
        (lambda: counter_tables(5, q=0.5), r"^q is 0\.5; it must be a whole number$"),
        (lambda: counter_tables(5, independent="any"), r"^independent is 'any'; choose one of conditional, "),
        (lambda: max_tables(9), r"^a size is 10; it must be a whole number from 2 to 9$"),
        (lambda: max_tables(10, ()), r"^sizes are \(\); give different numbers"),
        (lambda: max_tables(10, (9, 9)), r"^sizes are \(9, 9\); give different numbers"),
        (lambda: max_tables(rank_ft=9), r"^rank_ft is 9; it must be a whole number from 0 to 8$"),
        (lambda: max_tables(rank_ft=4), r"^rank_pt and rank_ft are both 4; give different ranks$"),
        (lambda: max_tables(q=1), r"^q is 1: no string of 9 different letters of 26 has letters that far apart"),
        (lambda: max_tables(4, (4,), 0, 1, 1, letters=4), r"^q is 1: every string of 4 different letters"),
        (lambda: operands.base_rates(TABLES["max"], 1.5), r"^correlation is 1\.5; the share of tied rows is"),
        (lambda: operands.sample(jax.random.key(0), TABLES["max"], -0.1, 2), r"^correlation is -0\.1; the share of"),
        (lambda: operands.sample(jax.random.key(0), TABLES["max"], 0.1, 0), r"^n_rows is 0; it must be a whole number"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(make, message):
    with pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
