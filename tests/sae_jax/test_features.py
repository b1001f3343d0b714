"""Kinds of features: counts against loops over the text, measures against direct sums, and latents planted in text."""

import functools
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax.errors import InputError
from sae_jax import evaluate, features
from sae_jax.features import CONTEXTS, KINDS, Rules

# --- counts ----------------------------------------------------------------------------------------------------------

B, T, F = 12, 14, 3
BIG = 1 << 18  # buckets enough that no two contexts of the small text share one


def small_text(seed=0):
    """Rows of two segments and padding, with invalid positions inside; ids of few tokens, so that bigrams repeat."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 4, (B, T)).astype(np.int32)
    border, end = rng.integers(3, 8, (B, 1)), rng.integers(9, T + 1, (B, 1))
    at = np.arange(T)[None]
    segment = np.where(at < border, 1, np.where(at < end, 2, 0)).astype(np.int32)
    valid = rng.random((B, T)) < 0.8
    z = np.where(rng.random((B, T, F)) < 0.4, rng.normal(size=(B, T, F)), 0.0).astype(np.float32)
    z = np.where((valid & (segment > 0))[:, :, None], z, np.float32(np.nan))  # junk where nothing may count
    return z, ids, segment, valid, (np.arange(B) // 2 % 2).astype(np.int32)


def counted(z, ids, segment, valid, half, sizes=(BIG, BIG), batches=None):
    counts, begin = features.start(z.shape[2], *sizes), 0
    for size in batches or [len(z)]:
        part = slice(begin, begin + size)
        counts = features.update(counts, z[part], ids[part], segment[part], valid[part], half[part])
        begin += size
    assert begin == len(z)
    return jax.device_get(counts)


def by_hand(z, ids, segment, valid, half):
    """The same counts by loops: dictionaries keyed by (half, context), and repetitions and persistence."""
    tables = [(Counter(), Counter()) for _ in CONTEXTS]
    repeats, both = np.zeros(2, int), np.zeros((2, F), int)
    earlier, again = np.zeros(F, int), np.zeros(F, int)
    for b, t in itertools.product(range(len(z)), range(T)):
        if not (valid[b, t] and segment[b, t] > 0):
            continue
        own = [s for s in range(t + 1) if segment[b, s] == segment[b, t]]
        word = [ids[b, s] for s in own]
        x0, x1, x2 = [*word[::-1], None, None][:3]
        active = z[b, t] != 0
        for (total, each), context in zip(tables, ((x0,), (x1,), (x1, x0), (x2, x1, x0)), strict=True):
            total[half[b], context] += 1
            for f in np.flatnonzero(active):
                each[half[b], context, f] += 1
        said = (x1 is not None and (x1, x0) in set(itertools.pairwise(word[:-1])), x0 in word[:-1])
        for r in range(2):
            repeats[r] += said[r]
            both[r] += said[r] & active
        shown = np.array([any(valid[b, s] and z[b, s, f] != 0 for s in own[:-1]) for f in range(F)])
        earlier += shown
        again += shown & active
    return tables, repeats, both, earlier, again


def test_counts_equal_loops_over_the_text():
    text = small_text()
    counts = counted(*text)
    tables, repeats, both, earlier, again = by_hand(*text)
    z, ids, segment, valid, half = text
    counted_BT = valid & (segment > 0)
    assert (repeats > 0).all() and repeats[0] < repeats[1] and (segment == 0).any()
    np.testing.assert_array_equal(counts.tokens_2, [counted_BT[half == h].sum() for h in (0, 1)])
    for table, (total, each) in zip(counts.tables, tables, strict=True):
        # every bucket of a context apart: the same multiset of counts, in each half
        for h in (0, 1):
            wanted = sorted((n, *(each[h, c, f] for f in range(F))) for (g, c), n in total.items() if g == h)
            found = np.concatenate([table.total_2K[h][:, None], table.active_2KF[h]], axis=1)
            assert sorted(map(tuple, found[table.total_2K[h] > 0].tolist())) == wanted
            np.testing.assert_array_equal(counts.active_2F[h], table.active_2KF[h].sum(0))
    np.testing.assert_array_equal(counts.repeats_R, repeats)
    np.testing.assert_array_equal(counts.active_repeats_RF, both)
    np.testing.assert_array_equal(counts.earlier_F, earlier)
    np.testing.assert_array_equal(counts.active_earlier_F, again)
    assert counts.broken == 0 and all(leaf.dtype == np.int32 for leaf in jax.tree.leaves(counts))


def test_a_context_has_the_same_bucket_everywhere_and_tokens_their_own():
    _, ids, segment, _, _ = small_text(1)
    found = [np.asarray(x) for x in features.buckets(jnp.asarray(ids), jnp.asarray(segment), 5, BIG)]
    at = np.concatenate([np.ones((B, 1), bool), segment[:, 1:] != segment[:, :-1]], axis=1)
    before = np.where(at, -1, np.roll(ids, 1, axis=1))
    first = np.where(at, -1, np.roll(before, 1, axis=1))
    np.testing.assert_array_equal(found[0], ids + 1)
    np.testing.assert_array_equal(found[1], before + 1)
    for bucket, context in zip(found[2:], (np.stack([before, ids]), np.stack([first, before, ids])), strict=True):
        pairs = set(zip(bucket.ravel().tolist(), map(tuple, context.reshape(len(context), -1).T.tolist()), strict=True))
        assert len(pairs) == len({b for b, _ in pairs}) == len({c for _, c in pairs}) > 10
    few = features.buckets(jnp.asarray(ids), jnp.asarray(segment), 3, 7)
    assert np.asarray(few[0]).tolist() == ((ids + 1) % 3).tolist() and [int(x.max()) for x in few] == [2, 2, 6, 6]


def test_batching_and_filler_rows_do_not_matter():
    text = small_text(2)
    whole = counted(*text, sizes=(8, 64))
    jax.tree.map(np.testing.assert_array_equal, whole, counted(*text, sizes=(8, 64), batches=[4, 4, 4]))
    z, ids, segment, valid, half = text
    filled = [np.concatenate([x, x[:2]]) for x in text]
    filled[4][-2:] = [-1, 2]  # rows of neither half
    jax.tree.map(np.testing.assert_array_equal, whole, counted(*filled, sizes=(8, 64)))
    parts = [counted(*(x[begin : begin + 4] for x in text), sizes=(8, 64)) for begin in (0, 4, 8)]
    jax.tree.map(np.testing.assert_array_equal, whole, jax.tree.map(lambda *leaves: sum(leaves), *parts))
    # what stands in padding and in other segments of the row is nothing to a position
    other = np.where(segment > 0, ids, 3 - ids)
    jax.tree.map(np.testing.assert_array_equal, whole, counted(z, other, segment, valid, half, sizes=(8, 64)))
    first = np.where(segment == 2, 0, segment)
    alone = counted(z, ids, first, valid, half, sizes=(8, 64))
    jax.tree.map(
        np.testing.assert_array_equal,
        alone,
        counted(z, np.where(segment == 2, 3 - ids, ids), first, valid, half, sizes=(8, 64)),
    )


# --- measures --------------------------------------------------------------------------------------------------------


def mixture(a, n):
    parts = [x for x in (a, n - a) if x > 0]
    return -sum(x * np.log(x / n) for x in parts)


def test_chance_entropy_is_the_mean_over_all_permutations():
    total = np.array([3, 0, 1, 2, 2])
    where = np.repeat(np.arange(5), total)
    expected = []
    for n in range(9):
        over = [
            sum(mixture(a, m) for a, m in zip(np.bincount(where[list(s)], minlength=5), total, strict=True) if m)
            for s in itertools.combinations(range(8), n)
        ]
        expected.append(np.mean(over))
    np.testing.assert_allclose(features.chance_entropy(total, np.arange(9)), expected, atol=1e-12)
    np.testing.assert_array_equal(features.chance_entropy(np.ones(6, int), np.arange(7)), 0.0)
    # large buckets, against draws; and more rates than the grid has
    rng = np.random.default_rng(0)
    total = rng.zipf(1.3, 300).clip(max=4_000)
    rates = np.unique(np.geomspace(2, total.sum() / 2, 90).astype(int))
    found = features.chance_entropy(total, rates)
    assert len(rates) > 64
    for i in (3, 40, len(rates) - 1):
        drawn = rng.multivariate_hypergeometric(total, rates[i], size=200, method="marginals")
        sums = [sum(mixture(a, m) for a, m in zip(row, total, strict=True)) for row in drawn]
        assert abs(found[i] - np.mean(sums)) < 5 * np.std(sums) / np.sqrt(200) + 2e-3 * found[i]
        np.testing.assert_allclose(found[i], features.chance_entropy(total, rates[[i]])[0], rtol=2e-3)


def direct(table, tokens, active, min_active):
    """One context of one latent: information, explained and coverage by loops over buckets."""
    total, each = np.asarray(table.total_2K, int), np.asarray(table.active_2KF[:, :, 0], int)
    left = sum(mixture(a, n) for a, n in zip(each.sum(0), total.sum(0), strict=True) if n)
    best, covered = np.inf, 0
    for pseudo in features.PSEUDO_COUNTS:
        nats, base, covered = 0.0, 0.0, 0
        for fit, score in ((0, 1), (1, 0)):
            prior = (active[fit] + 0.5) / (tokens[fit] + 1)
            for k in np.flatnonzero(total[fit]):
                rate = (each[fit, k] + pseudo * prior) / (total[fit, k] + pseudo)
                hits, misses = each[score, k], total[score, k] - each[score, k]
                nats -= hits * np.log(rate) + misses * np.log(1 - rate)
                base -= hits * np.log(prior) + misses * np.log(1 - prior)
                covered += hits
        best = min(best, nats)
    share = min(max(1 - best / base, 0.0), 1.0) if covered >= min_active else np.nan
    information = 1 - left / features.chance_entropy(total.sum(0), np.array([active.sum()]))[0]
    return information, share, covered / active.sum()


def test_measures_equal_direct_sums(monkeypatch):
    monkeypatch.setattr(features, "BLOCK", 2)  # the last block is not full
    z, ids, segment, valid, half = small_text(3)
    z[:, :, 0] = np.where(ids == 2, 1.0, 0.0)
    z[:, :, 1] *= (ids == 1) | (ids == 0)
    z[2:, :, 2] = 0.0
    counts = counted(z, ids, segment, valid, half, sizes=(5, 32))
    found = features.types(counts, Rules(min_active=4))
    for c, table in enumerate(counts.tables):
        for f in range(F):
            part = table._replace(active_2KF=table.active_2KF[:, :, f : f + 1])
            wanted = direct(part, counts.tokens_2, counts.active_2F[:, f], 4)
            got = [found[name][c, f] for name in ("information_CF", "explained_CF", "coverage_CF")]
            np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)
    assert np.isfinite(found["explained_CF"]).all() and (found["coverage_CF"] < 1).any()
    np.testing.assert_allclose(found["explained_CF"][0, 0], 1.0, atol=0.1)
    np.testing.assert_allclose(found["types_F"][0], 1.0)

    counted_N = (valid & (segment > 0)).ravel()
    active_NF = (z != 0).reshape(-1, F)[counted_N]
    repeats = [np.asarray(x).ravel()[counted_N] for x in features.repeated(jnp.asarray(ids), jnp.asarray(segment))]
    for r, f in itertools.product(range(2), range(F)):
        a, x = active_NF[:, f], repeats[r]
        np.testing.assert_allclose(found["phi_RF"][r, f], np.corrcoef(a, x)[0, 1], atol=1e-12)
        np.testing.assert_allclose(found["excess_RF"][r, f], (x[a].mean() - x.mean()) / (1 - x.mean()), atol=1e-12)
    p = np.bincount(ids.ravel()[counted_N][active_NF[:, 1]]) / active_NF[:, 1].sum()
    np.testing.assert_allclose(found["types_F"][1], np.exp(-sum(x * np.log(x) for x in p if x > 0)))


# --- planted latents -------------------------------------------------------------------------------------------------

ROWS, LENGTH, VOCABULARY = 1_024, 64, 60
PLANTED = {
    "one token": ("token", 1),
    "one token, half of the time": ("token", 1),
    "four tokens": ("token", 2),
    "after a token": ("previous token", 3),
    "a bigram": ("n-gram", 3),
    "a trigram": ("n-gram", 3),
    "repeated bigrams": ("induction", (4, 5)),
    "rare repeated bigrams": ("induction", (4, 5)),
    "topic": ("context-sensitive", 5),
    "noise": ("context-sensitive", 5),
    "dead": ("dead", 0),
    "always": ("other", 0),
}


@functools.cache
def planted():
    """What `types` finds in latents of known kinds: Zipfian text without order, every eighth document on a topic."""
    rng = np.random.default_rng(7)
    p = 1 / np.arange(4, VOCABULARY + 4)
    ids = rng.choice(VOCABULARY, size=(ROWS, LENGTH), p=p / p.sum()).astype(np.int32)
    segment = np.ones((ROWS, LENGTH), np.int32)
    valid = np.ones_like(segment, bool)
    x1, x2 = (np.concatenate([np.full((ROWS, n), -1), ids[:, :-n]], axis=1) for n in (1, 2))
    repeats = np.asarray(features.repeated(jnp.asarray(ids), jnp.asarray(segment))[0])
    some = rng.random((ROWS, LENGTH))
    topic = rng.random((ROWS, 1)) < 0.125
    latents = {
        "one token": ids == 5,
        "one token, half of the time": (ids == 5) & (some < 0.5),
        "four tokens": np.isin(ids, (5, 17, 30, 41)),
        "after a token": x1 == 5,
        "a bigram": (x1 == 5) & (ids == 3),
        "a trigram": (x2 == 0) & (x1 == 1) & (ids == 0),
        "repeated bigrams": repeats,
        "rare repeated bigrams": repeats & (some < 0.1),
        "topic": topic & (some < 0.3),
        "noise": some < 0.04,
        "dead": ids < 0,
        "always": ids >= 0,
    }
    assert list(latents) == list(PLANTED)
    z = np.stack(list(latents.values()), axis=2).astype(np.float32)
    half = np.arange(ROWS, dtype=np.int32) % 2
    counts = counted(z, ids, segment, valid, half, sizes=(VOCABULARY + 1, 65_536), batches=[256] * 4)
    return features.types(counts), z, half, counts


def test_planted_latents_get_their_kind_and_grade():
    found, z, _, _ = planted()
    kinds = [KINDS[kind] for kind in found["kind_F"]]
    assert dict(zip(PLANTED, kinds, strict=True)) == {name: kind for name, (kind, _) in PLANTED.items()}
    for (name, (_, grade)), got in zip(PLANTED.items(), found["grade_F"], strict=True):
        assert got in np.atleast_1d(grade), name
    np.testing.assert_array_equal(found["active_F"], z.sum((0, 1)))
    get = dict(zip(PLANTED, range(len(PLANTED)), strict=True))
    # excess reaches 1 for repetitions of which the latent is one in ten; the correlation cannot
    both = [get["repeated bigrams"], get["rare repeated bigrams"]]
    np.testing.assert_allclose(found["excess_RF"][0, both], 1.0)
    assert found["phi_RF"][0, both[0]] == pytest.approx(1.0) and found["phi_RF"][0, both[1]] < 0.4
    # only persistence tells a topic from noise
    assert found["persistence_F"][get["topic"]] > 0.3 and abs(found["persistence_F"][get["noise"]]) < 0.02
    p = 1 / (np.array([5, 17, 30, 41]) + 4)
    p = p / p.sum()
    np.testing.assert_allclose(found["types_F"][get["four tokens"]], np.exp(-(p * np.log(p)).sum()), rtol=0.02)
    assert (
        np.isnan(found["types_F"][get["dead"]]) and np.isnan(found["complexity_F"][[get["dead"], get["always"]]]).all()
    )


def test_complexity_orders_planted_latents():
    found = planted()[0]
    complexity = dict(zip(PLANTED, found["complexity_F"], strict=True))
    ordered = ["one token", "a bigram", "after a token", "repeated bigrams", "topic"]
    values = [complexity[name] for name in ordered]
    assert (np.diff(values) > 0).all(), values
    assert complexity["one token"] < 0.01 and complexity["four tokens"] < 0.01
    assert abs(complexity["after a token"] - 1 / 3) < 0.02 and complexity["a bigram"] < complexity["a trigram"] < 0.5
    assert complexity["one token"] < complexity["one token, half of the time"] < 0.3
    assert complexity["topic"] > 0.97 and complexity["noise"] > 0.97
    level_3F = found["level_3F"][:, found["grade_F"] > 0]
    assert (np.diff(level_3F, axis=0) >= 0).all() and (level_3F >= 0).all() and (level_3F <= 1).all()


def test_information_of_noise_is_nothing_where_the_plug_in_and_miller_madow_find_much():
    found, _, _, counts = planted()
    noise = list(PLANTED).index("noise")
    tri = counts.tables[3]
    association = evaluate.Association(
        counts.tokens_2.sum(), tri.total_2K.sum(0), tri.active_2KF[:, :, noise].sum(0)[None]
    )
    share = counts.active_2F[:, noise].sum() / counts.tokens_2.sum()
    entropy = mixture(share, 1.0)
    assert evaluate.mutual_information(association, miller_madow=True)[0] / entropy > 0.25
    assert np.abs(found["information_CF"][:, noise]).max() < 0.02 and found["explained_CF"][:, noise].max() < 0.02


def test_rare_latents_are_as_simple_as_frequent_ones_or_not_judged():
    rng = np.random.default_rng(11)
    rows, V = 512, 4_000
    p = 1 / np.arange(1, V + 1)
    ids = rng.choice(V, size=(rows, 64), p=p / p.sum()).astype(np.int32)
    often = np.bincount(ids.ravel(), minlength=V)
    rare = [int(np.flatnonzero(often == n)[0]) for n in (30, 24)]
    names = np.flatnonzero(often == 4)[:40]  # a list of names: many tokens, each of them four times
    once = np.flatnonzero(often == 1)[:40]
    after = np.concatenate([np.zeros((rows, 1), bool), (ids == rare[0])[:, :-1]], axis=1)
    some = rng.random(ids.shape)
    single = (ids == rare[0]) & (np.cumsum(ids == rare[0]).reshape(ids.shape) == 1)  # once in all the text
    latents = [ids == rare[0], ids == rare[1], np.isin(ids, names), after, np.isin(ids, once), single]
    latents += [some < 1e-3, some < 4e-3]
    z = np.stack(latents, axis=2).astype(np.float32)
    ones = np.ones_like(ids)
    counts = counted(z, ids, ones, ones > 0, np.arange(rows, dtype=np.int32) % 2, sizes=(V + 1, 65_536))
    found = features.types(counts)
    kinds = [KINDS[kind] for kind in found["kind_F"]]
    wanted = ["token", "token", "token", "previous token", "rare", "rare", "rare", "context-sensitive"]
    assert kinds == wanted and found["active_F"].max() < 200 and found["active_F"].min() == 1
    assert found["grade_F"].tolist() == [1, 1, 2, 3, 0, 0, 0, 5]
    assert (found["complexity_F"][:3] < 0.2).all() and found["complexity_F"][3] < 0.4
    assert np.isnan(found["complexity_F"][4:7]).all() and found["complexity_F"][7] > 0.9
    # where held-out rows cannot tell (no token recurs), the information can; it finds nothing in noise, however rare
    np.testing.assert_allclose(found["information_CF"][0, [0, 1, 2, 4]], 1.0)
    assert (found["types_F"][[2, 4]] > 35).all() and np.abs(found["information_CF"][:2, 6:]).max() < 0.1


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused():
    text = small_text()
    z, ids, segment, valid, half = text
    with pytest.raises(InputError, match="latents of the counts is 0"):
        features.start(0, 4, 4)
    with pytest.raises(InputError, match="ngram_buckets of the counts is 1.5"):
        features.start(4, 4, 1.5)
    with pytest.raises(InputError, match=r"codes of shape \[12, 14, 3\] for counts of 4 latents"):
        features.update(features.start(4, 4, 4), *text)
    with pytest.raises(InputError, match=r"halves of shape \[11\] beside codes of \[12, 14\] positions"):
        features.update(features.start(F, 4, 4), z, ids, segment, valid, half[1:])
    with pytest.raises(InputError, match=r"segments of shape \[12, 13\]"):
        features.update(features.start(F, 4, 4), z, ids, segment[:, 1:], valid, half)
    with pytest.raises(InputError, match="half 1 of the text has no valid position"):
        features.types(counted(z, ids, segment, valid, np.zeros_like(half), sizes=(4, 4)))
    broken = np.where(valid[:, :, None], z, np.float32(np.nan))
    broken[np.nonzero(valid & (segment > 0))[0][0], np.nonzero(valid & (segment > 0))[1][0], 1] = np.inf
    with pytest.raises(InputError, match="1 codes are not finite"):
        features.types(counted(broken, ids, segment, valid, half, sizes=(4, 4)))
    for rules, message in (
        ({"min_active": 0}, "min_active is 0"),
        ({"high": 1.5}, "high is 1.5"),
        ({"low": 0.7}, "low = 0.7 is not below high = 0.7"),
        ({"few_types": 0.5}, "few_types is 0.5"),
    ):
        with pytest.raises(InputError, match=message):
            Rules(**rules)
