"""Worlds of facts against plain loops: what is stated, asked, covered; sizes as data; frequencies; numbers of theory.

Every id is first turned into what it stands for, say ("template", m, r), so that worlds with and without room for more
compare fact by fact.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax.errors import InputError
from synthetic import facts
from synthetic.facts import FactsConfig

CASES = {
    "private": FactsConfig(12, 2, 5, 2, 4, noise=3, zipf=0.5),
    "shared": FactsConfig(12, 2, 6, 3, 3, shared=True, noise=3, zipf=1.0),
}
ROOM = FactsConfig(12, 2, 7, 4, 5, noise=3)  # for both of them
N, M, Z, ROWS, X = 12, 2, 3, 4_000, 3
TUNED = ([], [0], [11], [2, 3, 7], list(range(12)))
MASK_TN = np.array([np.isin(np.arange(N), tuned) for tuned in TUNED])
WEIGHT_N = np.array([0, 3, 1, 0, 2, *[0] * 7], np.float32)


class Made(NamedTuple):
    """All that is made of one configuration, with the same keys."""

    world: facts.World
    kinds: facts.Kinds
    statements: np.ndarray  # [B, 5]
    asked: np.ndarray  # [T, B, 5], of the masks that are not empty
    weighted: np.ndarray  # [B, 5]
    every_statement: tuple  # [N, M, R, ...]
    every_question: np.ndarray  # [N, M, X, 5]
    covered: facts.Covered  # [T, ...]


# whole numbers out of random ones: they compile longer than they run, and are the same at every level
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@partial(quick, static_argnums=0)
def make(cfg: FactsConfig, sizes: facts.Sizes | None = None) -> Made:
    def one(sizes):
        key = jax.random.split(jax.random.key(5), 5)
        world = facts.make_world(key[0], cfg, sizes)
        weight = jnp.concatenate([MASK_TN[1:].astype(jnp.float32), WEIGHT_N[None]])
        asked = jax.lax.map(lambda weight_N: facts.sample_questions(key[1], world, cfg, weight_N, ROWS), weight)
        return Made(
            world, facts.kinds(world, cfg), facts.sample_statements(key[2], world, cfg, ROWS), asked[:-1], asked[-1],
            facts.all_statements(key[3], world, cfg), facts.all_questions(key[4], world, cfg, X),
            jax.lax.map(lambda tuned_N: facts.covered(world, tuned_N, cfg), jnp.asarray(MASK_TN)),
        )  # fmt: skip

    return one(None) if sizes is None else jax.vmap(one)(sizes)


@quick
def many(sizes: facts.Sizes, seed_X) -> facts.World:
    """One world a seed."""
    return jax.lax.map(lambda seed: facts.make_world(jax.random.key(seed), ROOM, sizes), seed_X)


@cache
def bank() -> dict[str, Made]:
    """All cases in one program, with room to spare."""
    sizes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(cfg.sizes for cfg in CASES.values()))
    made = jax.device_get(make(ROOM, sizes))
    return {case: jax.tree.map(lambda x, g=g: x[g], made) for g, case in enumerate(CASES)}


def names(cfg: FactsConfig) -> list[tuple]:
    """What each id stands for, in the order that `Tokens` says."""
    of = range(cfg.attributes)
    return [
        *(("noise", z) for z in range(cfg.noise)),
        *(("form", m) for m in of),
        *(("subject", s) for s in range(cfg.subjects)),
        *(("answer", m, a) for m in of for a in range(cfg.answers)),
        *(("template", m, r) for m in of for r in range(cfg.templates)),
    ]


def named(ids, cfg: FactsConfig = ROOM) -> list[tuple]:
    """Rows of ids, any leading shape, as a list of rows of names."""
    token = names(cfg)
    return [tuple(token[i] for i in row) for row in ids.reshape(-1, ids.shape[-1]).tolist()]


def plain(world: facts.World, cfg: FactsConfig = ROOM):
    """T(s, m) as lists and ans(s, m), by name."""
    token, K = names(cfg), int(world.multiplicity)
    cells = list(itertools.product(range(cfg.subjects), range(cfg.attributes)))
    return {c: [token[i] for i in world.template_NMK[c][:K]] for c in cells}, {
        c: token[world.answer_NM[c]] for c in cells
    }


def expect_frequencies(found, probability: dict):
    """A chi-square test at five standard deviations; nothing else than the keys of `probability` may occur."""
    counts, total = Counter(found), len(found)
    assert counts.keys() <= probability.keys()
    assert sum(probability.values()) == pytest.approx(1.0)
    chi2 = sum((counts[x] - total * p) ** 2 / (total * p) for x, p in probability.items())
    assert min(total * p for p in probability.values()) > 4
    assert chi2 < len(probability) + 5 * math.sqrt(2 * len(probability))


def uniform(*kinds) -> dict:
    cells = list(itertools.product(*kinds))
    return dict.fromkeys(cells, 1 / len(cells))


NOISE = uniform(names(ROOM)[:Z], names(ROOM)[:Z])


# --- worlds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_world_is_what_the_sheet_says(case):
    cfg, made = CASES[case], bank()[case]
    world, (T, answer) = made.world, plain(made.world)
    assert world.multiplicity == cfg.multiplicity
    for s, m in itertools.product(range(N), range(M)):
        assert len(set(T[s, m])) == len(T[s, m]) == cfg.multiplicity
        assert all(name[:2] == ("template", m) and name[2] < cfg.templates for name in T[s, m])
        kind, pool, a = answer[s, m]
        assert (kind, pool) == ("answer", 0 if cfg.shared else m) and a < cfg.answers
    rest = world.template_NMK[:, :, cfg.multiplicity :]
    assert (rest == world.template_NMK[:, :, :1]).all()  # room repeats the first
    weight = np.arange(1.0, N + 1) ** -cfg.zipf
    np.testing.assert_allclose(np.sort(world.exposure_N)[::-1], weight / weight.sum(), rtol=1e-5)
    R, A = cfg.templates, cfg.answers
    assert world.used_V.sum() == N + M * R + (A if cfg.shared else M * A) + Z + M
    for i, name in enumerate(names(ROOM)):
        there = True
        if name[0] == "answer":
            there = name[2] < A and (name[1] == 0 or not cfg.shared)
        elif name[0] == "template":
            there = name[2] < R
        assert world.used_V[i] == there
        for kind in ("noise", "form", "subject", "answer", "template"):
            assert getattr(made.kinds, f"{kind}_V")[i] == (there and name[0] == kind)
        if len(name) == 3:
            assert made.kinds.attribute_V[i] == name[1]


def test_sizes_as_data_give_the_same_facts_token_by_token():
    cfg, big = CASES["private"], bank()["private"]
    small, R = jax.device_get(make(cfg)), cfg.templates
    assert plain(big.world) == plain(small.world, cfg)
    np.testing.assert_allclose(big.world.exposure_N, small.world.exposure_N, rtol=1e-6)

    def there(made, cfg):
        masks = (made.world.used_V, *made.kinds[:-1])
        return [{name for name, of in zip(names(cfg), mask, strict=True) if of} for mask in masks]

    assert there(big, ROOM) == there(small, cfg) and small.world.used_V.all()
    for field in ("statements", "asked", "weighted", "every_question"):
        assert named(getattr(big, field)) == named(getattr(small, field), cfg)
    assert named(big.every_statement[0][:, :, :R]) == named(small.every_statement[0], cfg)
    for with_room, without in zip(big.every_statement[1:], small.every_statement[1:], strict=True):
        np.testing.assert_array_equal(with_room[:, :, :R], without)
    for a, b in zip(big.covered, small.covered, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@cache
def worlds(R=5, K=2, A=4) -> facts.World:
    """600 of them, exposure by rank."""
    sizes = facts.Sizes(*map(jnp.int32, (R, K, A)), jnp.asarray(False), jnp.float32(1.0))
    return jax.device_get(many(sizes, np.arange(600)))


def test_templates_of_a_smaller_multiplicity_lie_in_those_of_a_larger():
    found = [worlds(K=K) for K in (1, 2, 4)]
    for K, one in zip((1, 2), found, strict=False):
        np.testing.assert_array_equal(one.template_NMK[..., :K], found[-1].template_NMK[..., :K])
        np.testing.assert_array_equal(one.answer_NM, found[-1].answer_NM)


def test_draws_are_uniform_and_independent():
    made = worlds()
    drawn, pairs = [], list(itertools.combinations(range(5), 2))
    for x in range(600):
        T, answer = plain(jax.tree.map(lambda leaf, x=x: leaf[x], made))
        drawn += [[(tuple(r for _, _, r in T[s, m]), answer[s, m][2]) for m in range(M)] for s in range(N)]
    expect_frequencies([tuple(tuple(sorted(T)) for T, _ in of) for of in drawn], uniform(pairs, pairs))
    found = [(of[0][1], of[1][1], tuple(sorted(of[0][0]))) for of in drawn]
    expect_frequencies(found, uniform(range(4), range(4), pairs))
    expect_frequencies([of[1][0][:1] for of in drawn], uniform(range(5)))  # the one that K = 1 has
    expect_frequencies([(s,) for s in made.exposure_N.argmax(1)], uniform(range(N)))  # anybody may be well known
    expect_frequencies([(s,) for s in made.exposure_N.argmin(1)], uniform(range(N)))


def test_token_names_are_unique_and_room_does_not_change_them():
    by_name = {}
    configs = [*CASES.values(), ROOM, FactsConfig(12, 2, 300, 1, 3, noise=3), FactsConfig(12, 2, 2, 1, 400, noise=3)]
    for cfg in configs:
        numbers = facts.token_names(cfg)
        assert numbers.dtype == np.int32 and numbers.min() >= 0
        assert len(set(numbers.tolist())) == len(numbers) == cfg.tokens.vocab_size == len(names(cfg))
        for name, number in zip(names(cfg), numbers.tolist(), strict=True):
            assert by_name.setdefault(name, number) == number
    assert len(set(by_name.values())) == len(by_name)


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_statements_are_true_and_as_frequent_as_they_should_be(case):
    made = bank()[case]
    T, answer = plain(made.world)
    rows = named(made.statements)
    assert len(rows) == ROWS and made.statements.dtype == np.int32
    for (kind, _), (subject, s), (again, _), r, a in rows:
        assert (kind, subject, again) == ("noise", "subject", "noise")
        assert r in T[s, r[1]] and a == answer[s, r[1]]
    exposure = made.world.exposure_N.astype(np.float64)
    expected = {(("subject", s), r): exposure[s] / (M * len(of)) for (s, _), of in T.items() for r in of}
    expect_frequencies([(row[1], row[3]) for row in rows], expected)
    expect_frequencies([(row[0], row[2]) for row in rows], NOISE)


@pytest.mark.parametrize("case", CASES)
def test_questions_are_only_about_the_mask(case):
    made = bank()[case]
    _, answer = plain(made.world)
    shares = [dict.fromkeys(tuned, 1 / len(tuned)) for tuned in TUNED[1:]]
    for share, ids in zip([*shares, {1: 1 / 2, 2: 1 / 6, 4: 1 / 3}], [*made.asked, made.weighted], strict=True):
        rows = named(ids)
        assert len(rows) == ROWS and ids.dtype == np.int32
        for (kind, _), (_, s), (again, _), (form, m), a in rows:
            assert (kind, again, form) == ("noise", "noise", "form") and a == answer[s, m]
        expected = {(("subject", s), ("form", m)): p / M for s, p in share.items() for m in range(M)}
        expect_frequencies([(row[1], row[3]) for row in rows], expected)
        expect_frequencies([(row[0], row[2]) for row in rows], NOISE)


@pytest.mark.parametrize(("drawn", "subject"), [(0.0, 2), (1.0, 7)])
def test_the_ends_of_what_is_drawn_stay_within_the_mask(monkeypatch, drawn, subject):
    """A draw may be 0, and one below 1 times the sum of the weights may round to the sum, beyond everybody's share."""
    world = jax.tree.map(jnp.asarray, bank()["private"].world)
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, drawn))
    mask_N = jnp.asarray(MASK_TN[3])
    ask = quick(lambda key: facts.sample_questions(key, world, ROOM, mask_N, 3))
    assert {row[1] for row in named(np.asarray(ask(jax.random.key(0))))} == {("subject", subject)}


@pytest.mark.parametrize("case", CASES)
def test_all_statements_are_the_own_and_the_unseen(case):
    cfg, made = CASES[case], bank()[case]
    T, answer = plain(made.world)
    (ids, own, unseen), R = made.every_statement, ROOM.templates
    assert ids.shape == (N, M, R, facts.LENGTH) and ids.dtype == np.int32
    rows = named(ids)
    for row, (s, m, r) in zip(rows, itertools.product(range(N), range(M), range(R)), strict=True):
        assert row[1] == ("subject", s) and row[3] == ("template", m, r) and row[4] == answer[s, m]
        assert own[s, m, r] == (("template", m, r) in T[s, m])
        assert unseen[s, m, r] == (not own[s, m, r] and r < cfg.templates)  # room is neither
    expect_frequencies([(row[0], row[2]) for row in rows], NOISE)


@pytest.mark.parametrize("case", CASES)
def test_all_questions(case):
    made = bank()[case]
    _, answer = plain(made.world)
    ids = made.every_question
    assert ids.shape == (N, M, X, facts.LENGTH) and ids.dtype == np.int32
    rows = named(ids)
    for row, (s, m, _) in zip(rows, itertools.product(range(N), range(M), range(X)), strict=True):
        assert row[1] == ("subject", s) and row[3] == ("form", m) and row[4] == answer[s, m]
    expect_frequencies([(row[0], row[2]) for row in rows], NOISE)


# --- fine-tuning sets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_covered_against_loops(case):
    cfg, made = CASES[case], bank()[case]
    T, answer = plain(made.world)
    for t, tuned in enumerate(TUNED):
        found = jax.tree.map(lambda x, t=t: x[t], made.covered)
        C = {r for (s, _), of in T.items() if s in tuned for r in of}
        asked = {a for (s, _), a in answer.items() if s in tuned}
        assert found.coverage == pytest.approx(len(C) / (M * cfg.templates))
        for cell in T:
            assert found.reached_NM[cell] == bool(C & set(T[cell]))
            assert found.answer_seen_NM[cell] == (answer[cell] in asked)
        held = [bool(C & set(T[cell])) for cell in T if cell[0] not in tuned]
        assert found.reach == pytest.approx(np.mean(held) if held else np.nan, nan_ok=True)


def test_coverage_and_reach_are_as_theory_says():
    """Of one attribute, by the facts of a few subjects; the same worlds for every number of them."""
    R, K, A = 7, 2, 4
    T = worlds(R, K, A).template_NMK[:, :, 0, :K]
    for count in (1, 2, 4):
        C = [set(of[:count].ravel().tolist()) for of in T]
        coverage = np.array([len(c) / R for c in C])
        reach = np.array([np.mean([bool(c & set(t)) for t in of[count:].tolist()]) for c, of in zip(C, T, strict=True)])
        expected = 1 - (1 - K / R) ** count
        assert facts.expected_coverage(R, K, count) == pytest.approx(expected, rel=1e-12)
        assert abs(coverage.mean() - expected) < 4.5 * coverage.std() / math.sqrt(len(T)) + 1e-9
        over = reach - facts.reach_probability(R, K, coverage * R)
        assert abs(over.mean()) < 4.5 * over.std() / math.sqrt(len(T))


@pytest.mark.parametrize(("R", "K"), [(1, 1), (5, 1), (6, 3), (7, 7), (8, 4)])
def test_reach_probability_against_enumeration(R, K):
    draws = list(itertools.combinations(range(R), K))
    expected = [np.mean([bool(set(range(c)) & set(draw)) for draw in draws]) for c in range(R + 1)]
    np.testing.assert_allclose(facts.reach_probability(R, K, np.arange(R + 1)), expected, atol=1e-12)


@cache
def chosen() -> dict[str, np.ndarray]:
    """Who is chosen by each rule, by seed and count, bool [X, N + 1, N]."""
    world = bank()["shared"].world

    def of(how, key):
        return jax.vmap(lambda count: facts.choose_subjects(key, world, count, how))(jnp.arange(N + 1))

    draw = quick(
        lambda seed_X: jax.lax.map(lambda s: {how: of(how, jax.random.key(s)) for how in facts.CHOICES}, seed_X)
    )
    return jax.device_get(draw(np.arange(1_000)))


@pytest.mark.parametrize("how", facts.CHOICES)
def test_chosen_sets_lie_in_each_other(how):
    world = bank()["shared"].world
    exposure, answer = world.exposure_N, world.answer_NM[:, 0]
    for sets in chosen()[how][:20]:
        assert (sets.sum(1) == np.arange(N + 1)).all()
        assert (sets[:-1] <= sets[1:]).all()
        for of in sets[1:-1]:
            if how == "known":
                assert exposure[of].min() > exposure[~of].max()
            elif how == "unknown":
                assert exposure[of].max() < exposure[~of].min()
            elif how == "stratified":
                counts = Counter(answer[of].tolist())
                left = set(answer[~of].tolist())  # answers with somebody left to choose
                assert all(most <= counts[a] + 1 for a in left for most in counts.values())


@pytest.mark.parametrize("how", ["random", "stratified"])
def test_choices_are_random(how):
    answer = bank()["shared"].world.answer_NM[:, 0]
    kinds = sorted(set(answer.tolist()))
    sets = chosen()[how][:, len(kinds)]
    if how == "stratified":  # one of each answer, everybody of an answer alike
        share = 1 / (answer[:, None] == answer[None]).sum(1)
        assert all((sets[:, answer == a].sum(1) == 1).all() for a in kinds)
    else:
        share = np.full(N, len(kinds) / N)
    assert (np.abs(sets.mean(0) - share) < 4.5 * np.sqrt(share * (1 - share) / len(sets)) + 1e-9).all()


# --- theory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_loss_floor_is_the_entropy_of_the_next_token(case):
    """H(r | s) of the world, by enumeration; given r, the answer is certain."""
    cfg, world = CASES[case], bank()[case].world
    T, _ = plain(world)
    p = {(s, r): 1 / (M * cfg.multiplicity) for (s, _), of in T.items() for r in of}
    assert len(p) == N * M * cfg.multiplicity
    entropy = [-sum(q * math.log(q) for (t, _), q in p.items() if t == s) for s in range(N)]
    assert facts.loss_floor(cfg) == pytest.approx(np.average(entropy, weights=world.exposure_N))
    assert facts.loss_floor(FactsConfig(multiplicity=4)) == pytest.approx(1.386, abs=5e-4)  # the sheet's


def test_error_bound():
    assert facts.error_bound(8, 4, 16) == pytest.approx(0.016, abs=5e-4)
    assert facts.error_bound(32, 1, 16) == pytest.approx(0.973, abs=5e-4)
    assert facts.error_bound(1, 1, 1_000) == 1.0
    for R, K in itertools.product((2, 8, 32), (1, 2)):
        assert (np.diff(facts.error_bound(R, K, np.arange(10))) < 0).all()
        assert facts.error_bound(R, K, 0) == 1.0
    assert (np.diff(facts.error_bound(32, np.arange(1, 9), 16)) < 0).all()
    assert (np.diff(facts.error_bound(np.arange(2, 200), 1, 4)) > 0).all()


def test_the_sheets_coverage():
    """The expected coverage is about what its table measured, R = 32."""
    for K, measured in ((1, (0.10, 0.41, 0.80)), (2, (0.22, 0.70, 0.99)), (4, (0.41, 0.89, 1.0))):
        np.testing.assert_allclose(facts.expected_coverage(32, K, [4, 16, 64]), measured, atol=0.07)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"multiplicity": 5, "templates": 4}, "K = 5 is larger than the number of templates R = 4.*lower K or raise R"),
        ({"subjects": 0}, "subjects is 0"),
        ({"attributes": -1}, "attributes is -1"),
        ({"templates": 2.0}, "templates is 2.0"),
        ({"multiplicity": 0}, "multiplicity is 0"),
        ({"answers": "8"}, "answers is '8'"),
        ({"noise": 0}, "noise is 0"),
        ({"zipf": -1.0}, "zipf is -1.0"),
        ({"zipf": math.nan}, "zipf is nan"),
        ({"zipf": math.inf}, "zipf is inf"),
    ],
)
def test_sizes_that_no_world_has(fields, match):
    with pytest.raises(InputError, match=match) as caught:
        FactsConfig(**fields)
    assert "\n" not in str(caught.value)


def test_an_unknown_choice_is_named_with_the_known_ones():
    world = bank()["private"].world
    with pytest.raises(InputError, match="'best'; choose one of random, stratified, known, unknown"):
        jax.eval_shape(lambda key: facts.choose_subjects(key, world, 3, "best"), jax.random.key(0))
