"""Metrics against NumPy and SciPy references, the oracles of the sheet, and identity under any batching or sharding."""

from __future__ import annotations

import itertools
import tracemalloc
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from bert6_jax import metrics
from bert6_jax.metrics import Confusion, TokenCounts

V = 23


def generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))


def positions(seed: int, shape: tuple[int, ...], vocab_size: int = V) -> tuple[np.ndarray, ...]:
    """targets, predictions (right about half the time), modes, valid; nonsense ids in the unused slots."""
    rng = generator(seed)
    p = 1 / np.arange(1, vocab_size + 1)
    targets, wrong = rng.choice(vocab_size, (2, *shape), p=p / p.sum()).astype(np.int32)
    predictions = np.where(rng.random(shape) < 0.5, targets, wrong).astype(np.int32)
    modes = rng.choice(3, shape, p=metrics.RATES).astype(np.int32)
    valid = rng.random(shape) < 0.8
    nonsense = rng.integers(-3, vocab_size + 3, (3, *shape)).astype(np.int32)
    return *(np.where(valid, x, junk) for x, junk in zip((targets, predictions, modes), nonsense, strict=True)), valid


def reference_counts(targets, predictions, modes, valid, vocab_size=V) -> tuple[np.ndarray, np.ndarray]:
    hits, totals = np.zeros((2, 3, vocab_size), np.int32)
    for i, j, mode, used in zip(*(x.ravel() for x in (targets, predictions, modes, valid)), strict=True):
        if used:
            totals[mode, i] += 1
            hits[mode, i] += i == j
    return hits, totals


def reference_dense(targets, predictions, valid, vocab_size=V) -> np.ndarray:
    dense = np.zeros((vocab_size, vocab_size), np.int32)
    np.add.at(dense, (targets[valid], predictions[valid]), 1)
    return dense


def assert_same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, tuple(ours), tuple(theirs))


def as_dense(confusion: Confusion, vocab_size: int = V) -> np.ndarray:
    used = np.asarray(confusion.count_E) > 0
    row, col, count = (np.asarray(x)[used] for x in confusion[:3])
    return coo_array((count, (row, col)), shape=(vocab_size, vocab_size)).toarray()


def mesh(devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def corrupt(rng, targets, vocab_size, rates=metrics.RATES) -> tuple[np.ndarray, np.ndarray]:
    """(modes, input ids) of masked-LM corruption; the input id of [MASK] is -1."""
    modes = rng.choice(3, targets.shape, p=rates).astype(np.int32)
    drawn = rng.integers(0, vocab_size, targets.shape).astype(np.int32)
    return modes, np.choose(modes, [np.full_like(targets, -1), drawn, targets])


# ---- accuracy per token


def test_counts_equal_the_reference_and_vmap_over_depths():
    targets, predictions, modes, valid = positions(0, (6, 50))
    counts = metrics.count_tokens(targets, predictions, modes, valid, V)
    assert_same(counts, reference_counts(targets, predictions, modes, valid))
    assert counts.hits_CV.dtype == counts.totals_CV.dtype == jnp.int32

    predictions_MBK = np.stack([predictions, targets, np.roll(predictions, 1)])
    depths = jax.vmap(metrics.count_tokens, (None, 0, None, None, None))(targets, predictions_MBK, modes, valid, V)
    for depth, predicted in enumerate(predictions_MBK):
        assert_same([x[depth] for x in depths], metrics.count_tokens(targets, predicted, modes, valid, V))


def test_what_lies_outside_of_the_tables_counts_nowhere():
    """Least of all for a neighbour in the flat table; below 0 an index is read from the end, as `.at` reads it."""
    rng = generator(21)
    targets, predictions = rng.integers(-2 * V, 2 * V, (2, 4_000)).astype(np.int32)
    predictions = np.where(rng.random(4_000) < 0.5, targets, predictions)
    modes = rng.integers(-7, 7, 4_000).astype(np.int8)
    valid = rng.random(4_000) < 0.8
    inside = valid & (targets >= -V) & (targets < V) & (modes >= -3) & (modes < 3)
    counts = metrics.count_tokens(targets, predictions, modes, valid, V)
    assert_same(counts, reference_counts(targets, predictions, modes, inside))


@pytest.mark.parametrize("size", [0, 1, 6, 7, 8, 14, 15, 50])
def test_counts_do_not_depend_on_the_stretches(size, monkeypatch):
    monkeypatch.setattr(metrics, "_STRETCH", 7)
    arrays = positions(22, (size,))
    assert_same(metrics.count_tokens.__wrapped__(*arrays, V), reference_counts(*arrays))


def test_many_stretches_over_depths_and_devices():
    per_device = 2 * metrics._STRETCH + 5
    targets, predictions, modes, valid = arrays = positions(23, (4, per_device))
    cell = ((targets == predictions) * 3 + modes.astype(np.int64))[valid] * V + targets[valid]
    wrong, hits = np.bincount(cell, minlength=6 * V).reshape(2, 3, V)
    counts = metrics.count_tokens(*arrays, V)
    assert_same(counts, (hits, wrong + hits))
    depths = jax.vmap(metrics.count_tokens, (None, 0, None, None, None))(
        targets, np.stack([predictions, targets]), modes, valid, V
    )
    assert_same([x[0] for x in depths], counts)
    assert_same([x[1] for x in depths], (counts.totals_CV, counts.totals_CV))

    over, split = mesh(4), P("data")
    summed = jax.shard_map(
        lambda *x: jax.lax.psum(metrics.count_tokens(*x, V), "data"), mesh=over, in_specs=split, out_specs=P()
    )
    assert_same(summed(*arrays), counts)
    sharded = jax.device_put(arrays, NamedSharding(over, split))
    assert_same(jax.jit(lambda *x: metrics.count_tokens(*x, V))(*sharded), counts)


@pytest.mark.parametrize("batch", [1, 8, 24])
def test_sums_do_not_depend_on_the_batch_size(batch):
    arrays = positions(1, (48, 10))
    whole, whole_pairs = metrics.count_tokens(*arrays, V), metrics.count_confusion(arrays[0], arrays[1], arrays[3], V)
    total, parts = None, []
    for start in range(0, 48, batch):
        targets, predictions, modes, valid = (x[start : start + batch] for x in arrays)
        counts = metrics.count_tokens(targets, predictions, modes, valid, V)
        total = counts if total is None else jax.tree.map(jnp.add, total, counts)
        parts.append(metrics.count_confusion(targets, predictions, valid, V, size=V * V))
    assert_same(total, whole)
    assert_same(metrics.merge_confusions(parts, V), whole_pairs)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    in_jit = metrics.merge_confusions([stacked], V, size=whole_pairs.row_E.size)
    assert_same(in_jit, whole_pairs)


@pytest.mark.parametrize("devices", [1, 4])
def test_sums_do_not_depend_on_the_sharding(devices):
    arrays = positions(2, (16, 30))
    targets, predictions, _, valid = arrays
    whole, pairs = metrics.count_tokens(*arrays, V), metrics.count_confusion(targets, predictions, valid, V, size=400)
    over, split = mesh(devices), P("data")
    replicated, sharded = NamedSharding(over, P()), NamedSharding(over, split)
    arrays = jax.device_put(arrays, sharded)
    targets, predictions, _, valid = arrays

    counting = jax.jit(lambda *x: metrics.count_tokens(*x, V), in_shardings=(sharded,) * 4, out_shardings=replicated)
    counted = counting(*arrays)
    assert_same(counted, whole)
    counted = jax.jit(
        lambda t, p, ok: metrics.count_confusion(t, p, ok, V, size=400),
        in_shardings=(sharded,) * 3,
        out_shardings=replicated,
    )(targets, predictions, valid)
    assert_same(counted, pairs)

    counted = jax.shard_map(
        lambda *x: jax.lax.psum(metrics.count_tokens(*x, V), "data"), mesh=over, in_specs=split, out_specs=P()
    )(*arrays)
    assert_same(counted, whole)

    @partial(jax.shard_map, mesh=over, in_specs=split, out_specs=P(), check_vma=False)
    def gathered(t, p, ok):
        own = metrics.count_confusion(t, p, ok, V, size=400)
        return metrics.merge_confusions([jax.lax.all_gather(own, "data")], V, size=400)

    assert_same(gathered(targets, predictions, valid), pairs)


def test_apt_is_undefined_for_unseen_ids_and_its_mean_leaves_them_out():
    hits = np.array([[2, 0, 0, 1, 0], [0, 0, 0, 1, 0], [1, 0, 0, 0, 0]], np.int32)
    totals = np.array([[3, 0, 4, 1, 0], [0, 0, 0, 2, 0], [1, 0, 0, 0, 1]], np.int32)
    counts = TokenCounts(hits, totals)
    np.testing.assert_allclose(metrics.apt(counts), [0.75, np.nan, 0, 2 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(metrics.apt(counts, ("mask",)), [2 / 3, np.nan, 0, 1, np.nan], rtol=1e-6)
    np.testing.assert_allclose(metrics.apt(counts, ("random", "kept")), [1, np.nan, np.nan, 0.5, 0], rtol=1e-6)

    everything = np.ones(5, bool)
    mean, tokens = metrics.macro_apt(counts, everything)
    assert tokens == 4 and mean == pytest.approx((0.75 + 0 + 2 / 3 + 0) / 4)
    mean, tokens = metrics.macro_apt(counts, np.array([0, 1, 1, 1, 1], bool), min_count=2)
    assert tokens == 2 and mean == pytest.approx(1 / 3)
    mean, tokens = metrics.macro_apt(counts, everything, min_count=0, modes=("mask",))
    assert tokens == 3 and mean == pytest.approx((2 / 3 + 0 + 1) / 3)
    mean, tokens = metrics.macro_apt(counts, everything, min_count=99)
    assert tokens == 0 and np.isnan(mean)
    assert metrics.micro_accuracy(counts, everything) == pytest.approx(5 / 12)
    assert metrics.micro_accuracy(counts, np.array([1, 1, 0, 1, 1], bool), ("mask",)) == pytest.approx(3 / 4)
    with pytest.raises(ValueError, match="unknown corruption mode 'masked'"):
        metrics.apt(counts, ("masked",))


def test_both_readings_of_apt50():
    rng = generator(3)
    vocab_size = 300
    totals = rng.integers(0, 60, (3, vocab_size)).astype(np.int32)
    totals[:, :5] = 0
    counts = TokenCounts(rng.binomial(totals, 0.4).astype(np.int32), totals)
    include = rng.random(vocab_size) < 0.9
    include[:5] = [True, True, False, False, True]
    frequency = rng.integers(0, 40, vocab_size).astype(np.int32)  # many ties
    frequency[:5] = 1000

    apt = counts.hits_CV.sum(0) / np.maximum(totals.sum(0), 1)
    top = [i for i in sorted(range(vocab_size), key=lambda i: (-frequency[i], i)) if include[i]][:50]
    seen = [i for i in top if totals[:, i].sum() > 0]
    assert len(seen) == 47
    mean, tokens = metrics.apt_top50(counts, include, frequency)
    assert tokens == 47 and mean == pytest.approx(apt[seen].mean(), rel=1e-6)
    often = include & (totals.sum(0) >= 50)
    mean, tokens = metrics.apt_min50(counts, include)
    assert tokens == often.sum() and mean == pytest.approx(apt[often].mean(), rel=1e-6)


def test_rise_by_bin_splits_the_rise():
    rng = generator(4)
    totals = rng.integers(0, 5, (3, 200)).astype(np.int32)
    first, last = (TokenCounts(rng.binomial(totals, q).astype(np.int32), totals) for q in (0.1, 0.6))
    include, bins = rng.random(200) < 0.9, rng.choice([0, 1, 3, 4], 200).astype(np.int32)
    rise, tokens = metrics.rise_by_bin(first, last, include, bins, 6)
    use = include & (totals.sum(0) >= 1)
    before, after = ((c.hits_CV.sum(0) / np.maximum(totals.sum(0), 1))[use] for c in (first, last))
    for which in range(6):
        inside = bins[use] == which
        share = inside.mean() * (after[inside].mean() - before[inside].mean()) if inside.any() else 0
        assert tokens[which] == inside.sum() and rise[which] == pytest.approx(share, abs=1e-6)
        mean = metrics.apt_by_bin(last, include, bins, 6).mean[which]
        np.testing.assert_allclose(mean, after[inside].mean() if inside.any() else np.nan, rtol=1e-5)
    whole = metrics.macro_apt(last, include).mean - metrics.macro_apt(first, include).mean
    assert rise.sum() == pytest.approx(float(whole), abs=1e-6)


def test_the_influence_of_groups_is_a_derivative_and_its_error_covers():
    """Against numeric derivatives by the groups' weights; and 95 % intervals hold the truth about 95 % of the time."""
    rng = generator(5)
    totals = rng.integers(0, 3, (8, 40))
    hits = rng.binomial(totals, 0.3)
    include = np.arange(40) != 7
    found = metrics.macro_apt_influence(hits.astype(np.int32), totals.astype(np.int32), include, 2)
    use = include & (totals.sum(0) >= 2)

    def mean(weight_G):
        return ((weight_G @ hits)[use] / (weight_G @ totals)[use]).mean()

    steps = 1e-5 * np.eye(8)
    np.testing.assert_allclose(found, [(mean(1 + e) - mean(1 - e)) / 2e-5 for e in steps], rtol=1e-3, atol=1e-6)
    assert abs(float(found.sum())) < 1e-6

    chances, covered, G = rng.beta(1, 3, 60), 0, 20
    for _ in range(200):
        totals = rng.integers(1, 6, (G, 60))
        hits = rng.binomial(totals, chances)
        d = np.asarray(
            metrics.macro_apt_influence(hits.astype(np.int32), totals.astype(np.int32), np.ones(60, bool)), np.float64
        )
        half = 2.093 * np.sqrt(G / (G - 1) * (d**2).sum())
        covered += abs((hits.sum(0) / totals.sum(0)).mean() - chances.mean()) < half
    assert 180 <= covered <= 199


# ---- oracles: predictors whose APT is known


def test_perfect_and_constant_predictors():
    targets, _, modes, valid = positions(6, (40, 25))
    perfect = metrics.count_tokens(targets, targets, modes, valid, V)
    seen = perfect.totals_CV.sum(0) > 0
    np.testing.assert_array_equal(metrics.apt(perfect)[seen], 1)
    pairs = metrics.count_confusion(targets, targets, valid, V)
    matches = metrics.strong_matches(pairs, V, 1e-6)
    assert not np.asarray(matches.ratio_E).any() and metrics.micro_accuracy(perfect, seen) == 1
    stats = metrics.cluster_stats(matches, metrics.clusters(matches, 1e-6), 1e-6)
    assert stats.components == stats.singletons == stats.kept == seen.sum() and stats.strong == 0

    constant = np.full_like(targets, targets[valid][0])
    counts = metrics.count_tokens(targets, constant, modes, valid, V)
    mean, tokens = metrics.macro_apt(counts, np.ones(V, bool))
    assert mean == pytest.approx(1 / int(tokens)) and tokens == seen.sum()
    matches = metrics.strong_matches(metrics.count_confusion(targets, constant, valid, V), V, 0.1)
    assert np.flatnonzero(matches.kept_V) == [targets[valid][0]]  # rows without a diagonal are dropped


def test_copy_predictor():
    rng, vocab_size = generator(7), 10
    targets = np.repeat(np.arange(vocab_size, dtype=np.int32), 20_000)
    modes, copied = corrupt(rng, targets, vocab_size)
    counts = metrics.count_tokens(targets, copied, modes, np.ones_like(targets, bool), vocab_size)
    np.testing.assert_array_equal(metrics.apt(counts, ("mask",)), 0)
    np.testing.assert_array_equal(metrics.apt(counts, ("kept",)), 1)
    np.testing.assert_allclose(metrics.apt(counts), 0.1 * (1 + 1 / vocab_size), atol=5 * np.sqrt(0.11 / 20_000))


@pytest.mark.parametrize(("exponent", "printed"), [(1.0, 0.1000), (1.3, 0.0093), (1.6, 0.0021)])
def test_context_free_oracle_for_zipf_frequencies(exponent, printed):
    vocab_size, repeats = 30_522, 20
    p = np.arange(1, vocab_size + 1, dtype=np.float32) ** -exponent
    p /= p.sum()
    expected = metrics.context_free_apt(p)
    assert expected.mean() == pytest.approx(printed, abs=5e-5)
    assert expected.mean() <= metrics.context_free_bound(vocab_size)

    # Every id equally often: the expectation of APT(i) does not depend on n_i, and <APT> is not weighted by p.
    targets = np.repeat(np.arange(vocab_size, dtype=np.int32), repeats)
    modes, inputs = corrupt(generator(8), targets, vocab_size)
    answers = np.append(metrics.context_free_answers(p), np.argmax(p))  # the last one answers [MASK], which is -1
    counts = metrics.count_tokens(targets, answers[inputs], modes, np.ones_like(targets, bool), vocab_size)
    error = float(np.sqrt(np.sum(expected * (1 - expected)) / repeats)) / vocab_size
    assert metrics.macro_apt(counts, np.ones(vocab_size, bool)).mean == pytest.approx(
        float(expected.mean()), abs=4 * error
    )


@pytest.mark.parametrize("rates", [(0.8, 0.1, 0.1), (0.5, 0.4, 0.1)])
def test_context_free_answers_are_the_bayes_answers(rates):
    p = generator(9).dirichlet(np.full(12, 0.3)).astype(np.float32)
    seen_given_true = rates[2] * np.eye(12) + rates[1] / 12  # [true, seen]
    posterior = p[:, None] * seen_given_true
    np.testing.assert_array_equal(metrics.context_free_answers(p, rates), posterior.argmax(0))
    answers = posterior.argmax(0)
    by_hand = [
        rates[0] * (i == p.argmax()) + sum(seen_given_true[i, seen] for seen in range(12) if answers[seen] == i)
        for i in range(12)
    ]
    np.testing.assert_allclose(metrics.context_free_apt(p, rates), by_hand, rtol=1e-5)
    assert len(set(answers)) < 12  # some are copied, some are not


def test_context_free_bound():
    assert metrics.context_free_bound(30_522) == pytest.approx(0.1 + 0.9 * 126 / 30_522)
    assert metrics.context_free_bound(1000, window=12) == pytest.approx(0.109)
    assert metrics.context_free_bound(50) == 1


# ---- token confusion


@pytest.mark.parametrize("vocab_size", [V, 65_535, 65_536])
def test_confusion_equals_unique_pairs_on_host_and_in_jit(vocab_size):
    rng = generator(10, vocab_size)
    targets = rng.integers(vocab_size - 20, vocab_size, (40, 50)).astype(np.int32)
    targets[::2] = rng.integers(0, vocab_size, (20, 50))
    predictions = np.where(rng.random((40, 50)) < 0.5, targets, vocab_size - 1 - targets // 7).astype(np.int32)
    valid = rng.random((40, 50)) < 0.8
    pairs, count = np.unique(targets[valid].astype(np.int64) * vocab_size + predictions[valid], return_counts=True)
    expected = pairs // vocab_size, pairs % vocab_size, count, 0
    host = metrics.count_confusion(targets, predictions, valid, vocab_size)
    assert_same(host, expected)
    assert host.row_E.dtype == host.col_E.dtype == host.count_E.dtype == np.int32

    size = pairs.size + 5
    in_jit = metrics.count_confusion(targets, predictions, valid, vocab_size, size=size)
    assert_same([x[: pairs.size] for x in in_jit[:3]], expected[:3])
    assert_same([x[pairs.size :] for x in in_jit[:3]], np.array([[vocab_size] * 5, [0] * 5, [0] * 5]))
    assert in_jit.lost == 0
    for merge_size in (None, size):
        merged = metrics.merge_confusions([host, in_jit, host], vocab_size, merge_size)
        assert_same([x[: pairs.size] for x in merged[:3]], (*expected[:2], 3 * count))
        assert merged.lost == 0


def test_confusion_identities():
    targets, predictions, modes, valid = positions(11, (30, 20))
    dense = metrics.dense_confusion(targets, predictions, valid, V)
    np.testing.assert_array_equal(dense, reference_dense(targets, predictions, valid))
    pairs = metrics.count_confusion(targets, predictions, valid, V)
    np.testing.assert_array_equal(as_dense(pairs), dense)
    assert_same(metrics.sparse_from_dense(dense), pairs)
    assert dense.sum() == pairs.count_E.sum() == valid.sum()
    counts = metrics.count_tokens(targets, predictions, modes, valid, V)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(metrics.apt(counts), np.diag(dense) / dense.sum(1), rtol=1e-6)


def test_confusion_counts_what_finds_no_slot():
    targets, predictions, _, valid = positions(12, (200,))
    whole = metrics.count_confusion(targets, predictions, valid, V)
    for size in (1, whole.row_E.size - 1):
        part = metrics.count_confusion(targets, predictions, valid, V, size=size)
        assert_same([x[:size] for x in whole[:3]], part[:3])
        assert part.lost == whole.count_E[size:].sum() > 0
        merged = metrics.merge_confusions([part, whole], V, size=size)
        assert merged.lost == 2 * part.lost and merged.count_E.sum() == 2 * part.count_E.sum()
        assert metrics.merge_confusions([part, whole], V).lost == part.lost


@pytest.mark.parametrize("cores", [1, 3])
def test_confusion_does_not_depend_on_order_or_threads(cores, monkeypatch):
    targets, predictions, _, valid = positions(13, (1000,))
    whole = metrics.count_confusion(targets, predictions, valid, V)
    monkeypatch.setattr(metrics.parallel, "cores", lambda: cores)
    order = generator(14).permutation(1000)
    assert_same(metrics.count_confusion(targets[order], predictions[order], valid[order], V), whole)
    depths = jax.vmap(lambda p: metrics.count_confusion(targets, p, valid, V, size=V * V))(
        np.stack([predictions, targets])
    )
    assert_same([x[0, : whole.row_E.size] for x in depths[:3]], whole[:3])


@pytest.mark.parametrize("right", ["all", "none", "the first half", "one id", "one id alone is wrong"])
@pytest.mark.parametrize("vocab_size", [V, 65_536])
def test_confusion_whatever_is_right(right, vocab_size, monkeypatch):
    """Right predictions are counted apart from the sorted pairs of the wrong ones, and put among them."""
    targets, _, _, valid = positions(24, (30, 50))
    wrong = (targets + 1 + generator(25).integers(0, V - 1, targets.shape)) % V
    is_right = {
        "all": np.ones_like(valid),
        "none": np.zeros_like(valid),
        "the first half": np.arange(30)[:, None] < 15,
        "one id": targets == 4,
        "one id alone is wrong": targets != 4,
    }[right]
    predictions = np.where(is_right, targets, wrong).astype(np.int32)
    pair, count = np.unique(np.stack([targets[valid], predictions[valid]]), axis=1, return_counts=True)
    assert_same(metrics.count_confusion(targets, predictions, valid, vocab_size), (*pair, count, 0))
    monkeypatch.setattr(metrics, "_STRETCH", 100)
    assert_same(metrics.count_confusion(targets, predictions, valid, vocab_size), (*pair, count, 0))
    whole = metrics.count_confusion(targets[valid], predictions[valid], np.ones(valid.sum(), bool), vocab_size)
    assert_same(whole, (*pair, count, 0))


def test_confusion_of_nothing_and_of_bad_ids():
    targets, predictions, _, valid = positions(15, (50,))
    for empty in (
        metrics.count_confusion(targets, predictions, np.zeros_like(valid), V),
        metrics.count_confusion(targets[:0], predictions[:0], valid[:0], V),
    ):
        assert_same(empty, ([], [], [], 0))
        assert_same(metrics.merge_confusions([empty, empty], V), empty)
        assert not metrics.strong_matches(empty, V, 0.1).kept_V.any()
    none = metrics.count_confusion(targets[:0], predictions[:0], valid[:0], V, size=3)
    assert_same(none, ([V] * 3, [0] * 3, [0] * 3, 0))
    for bad in (-1, V):
        predictions[np.flatnonzero(valid)[3]] = bad
        with pytest.raises(ValueError, match="must lie in 0..22"):
            metrics.count_confusion(targets, predictions, valid, V)


def test_ten_million_positions_stay_below_one_gigabyte():
    n, vocab_size = 10_000_000, 30_522
    rng = generator(16)
    targets = rng.integers(0, vocab_size, n, dtype=np.int32)
    predictions = rng.integers(0, 200, n, dtype=np.int32)
    valid = np.ones(n, bool)
    tracemalloc.start()
    pairs = metrics.count_confusion(targets, predictions, valid, vocab_size)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pairs.count_E.sum() == n and peak < 1e9

    flat = jax.ShapeDtypeStruct((n,), jnp.int32)
    lowered = metrics._count_in_jit.lower(flat, flat, jax.ShapeDtypeStruct((n,), bool), vocab_size, 4_000_000)
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 1e9


# ---- strong matches and clusters

THETAS = (0.04, 0.1, 0.25, 0.5, 1.0)


def reference_ratios(dense: np.ndarray, n_min: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(R with dropped rows and columns zeroed and no diagonal, kept)."""
    diagonal = np.diag(dense)
    kept = (diagonal == dense.max(1)) & (diagonal >= n_min)
    ratios = np.where(kept[:, None] & kept, dense / np.maximum(diagonal, 1)[:, None], 0)
    assert (ratios <= 1).all() and (np.diag(ratios)[kept] == 1).all()
    return ratios * ~np.eye(len(dense), dtype=bool), kept


def partition(labels) -> set[frozenset[int]]:
    labels = np.asarray(labels)
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in set(labels.tolist())}


def reference_partition(ratios: np.ndarray, theta: float, mutual: bool) -> set[frozenset[int]]:
    strong = ratios >= theta
    graph = strong & strong.T if mutual else strong | strong.T
    return partition(connected_components(graph, directed=False)[1])


def padded(confusion: Confusion, vocab_size: int, size: int) -> Confusion:
    width = (0, size - confusion.row_E.size)
    filled = zip(confusion[:3], (vocab_size, 0, 0), strict=True)
    return Confusion(*(np.pad(x, width, constant_values=empty) for x, empty in filled), confusion.lost)


def small_matches(dense: np.ndarray, theta: float, n_min: int = 1) -> metrics.Matches:
    """Of a 9 x 9 table; all of one shape, so that the examples share their compilations."""
    return metrics.strong_matches(padded(metrics.sparse_from_dense(dense), 9, 81), 9, theta, n_min, size=81)


# Small counts with a heavier diagonal: ties, empty rows, zero diagonals and dropped ids all occur often.
tables = st.builds(
    lambda flat, diagonal: np.array(flat, np.int32).reshape(9, 9) + np.diag(diagonal).astype(np.int32),
    st.lists(st.sampled_from([0, 0, 0, 1, 2, 5]), min_size=81, max_size=81),
    st.lists(st.sampled_from([0, 1, 5, 5, 20]), min_size=9, max_size=9),
)
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@quick
@given(dense=tables, n_min=st.sampled_from([1, 5]))
def test_matches_and_clusters_equal_the_reference(dense, n_min):
    matches = small_matches(dense, THETAS[0], n_min)
    ratios, kept = reference_ratios(dense, n_min)
    np.testing.assert_array_equal(matches.kept_V, kept)
    found, back = np.zeros((2, 9, 9))
    used = np.asarray(matches.ratio_E) > 0
    row, col = np.asarray(matches.row_E)[used], np.asarray(matches.col_E)[used]
    found[row, col], back[row, col] = np.asarray(matches.ratio_E)[used], np.asarray(matches.back_E)[used]
    np.testing.assert_allclose(found, ratios, rtol=1e-6)  # these counts have no ratio between 0 and 0.04
    np.testing.assert_allclose(back, np.where(ratios > 0, ratios.T, 0), rtol=1e-6)

    for mutual in (True, False):
        label_PV, stats = metrics.threshold_sweep(matches, np.array(THETAS, np.float32), mutual)
        coarser = None
        for at, theta in enumerate(THETAS):
            labels = np.asarray(label_PV[at])
            np.testing.assert_array_equal(labels, metrics.clusters(matches, theta, mutual))
            parts = partition(labels)
            assert parts == reference_partition(ratios, theta, mutual)
            assert all(min(part) == labels[min(part)] for part in parts)
            if coarser is not None:  # a higher theta only splits
                assert all(any(part <= larger for larger in coarser) for part in parts)
            coarser = parts

            sizes = [len(part) for part in parts if kept[list(part)].any()]
            strong = ratios >= theta
            assert stats.kept[at] == kept.sum() == sum(sizes) and stats.components[at] == len(sizes)
            assert stats.singletons[at] == sizes.count(1) and stats.max_size[at] == max(sizes, default=0)
            np.testing.assert_array_equal(stats.histogram[at], np.bincount(sizes, minlength=10))
            np.testing.assert_allclose(stats.mean_size[at], np.mean(sizes) if sizes else np.nan, rtol=1e-6)
            np.testing.assert_allclose(
                stats.giant_fraction[at], max(sizes) / sum(sizes) if sizes else np.nan, rtol=1e-6
            )
            assert stats.strong[at] == strong.sum()
            assert stats.noise[at] == (strong & (labels[:, None] != labels)).sum()
            np.testing.assert_array_equal(stats.degree_V[at], strong.sum(1))


@quick
@given(dense=tables, order=st.permutations(range(9)), mutual=st.booleans())
def test_renaming_ids_renames_clusters(dense, order, mutual):
    def parts(table):
        return partition(metrics.clusters(small_matches(table, 0.1), 0.1, mutual))

    renamed = parts(dense[np.ix_(order, order)])
    assert {frozenset(order[i] for i in part) for part in renamed} == parts(dense)


def test_ties_zero_rows_and_exact_thresholds():
    dense = np.array(
        [
            [10, 10, 1, 0, 0],  # a tie with the diagonal is kept
            [0, 10, 0, 0, 0],
            [0, 0, 10, 0, 9],
            [0, 0, 0, 0, 0],  # never seen
            [0, 0, 5, 0, 4],  # beaten by a wrong id: its row and its column go
        ]
    )
    matches = metrics.strong_matches(metrics.sparse_from_dense(dense), 5, 0.1)
    np.testing.assert_array_equal(matches.kept_V, [True, True, True, False, False])
    np.testing.assert_array_equal(matches.row_E, [0, 0])
    np.testing.assert_array_equal(matches.col_E, [1, 2])
    np.testing.assert_array_equal(matches.ratio_E, np.array([1, 0.1], np.float32))  # R = theta is a strong match
    assert (np.asarray(metrics.clusters(matches, 0.1)) == np.arange(5)).all()
    assert (np.asarray(metrics.clusters(matches, 0.1, mutual=False)) == [0, 0, 0, 3, 4]).all()
    assert not metrics.strong_matches(metrics.sparse_from_dense(dense), 5, 0.1, n_min=11).kept_V.any()


def test_matches_in_jit_with_slots_to_spare_and_too_few():
    dense = generator(17).integers(0, 4, (V, V)).astype(np.int32) + 3 * np.eye(V, dtype=np.int32)
    pairs = metrics.sparse_from_dense(dense)
    exact = metrics.strong_matches(pairs, V, 0.1)
    n = np.count_nonzero(exact.ratio_E)
    longer = padded(pairs, V, pairs.row_E.size + 9)
    jitted = jax.jit(lambda c, theta, size: metrics.strong_matches(c, V, theta, size=size), static_argnums=2)
    roomy = jitted(longer, 0.1, n + 7)
    assert_same([x[:n] for x in roomy[:4]], [x[:n] for x in exact[:4]])
    assert (np.asarray(roomy.row_E[n:]) == V).all() and not np.asarray(roomy.ratio_E[n:]).any() and roomy.lost == 0
    assert_same(
        metrics.threshold_sweep(roomy, np.array([0.1, 0.4])), metrics.threshold_sweep(exact, np.array([0.1, 0.4]))
    )
    tight = jitted(longer, 0.1, n - 7)
    assert tight.lost == 7
    assert_same([x[: n - 7] for x in tight[:2]], [x[: n - 7] for x in exact[:2]])


def test_a_long_chain_is_one_cluster():
    n = 5000
    names = generator(18).permutation(n).astype(np.int32)  # neighbours get unrelated ids
    row, col = np.concatenate([[names, names], [names[:-1], names[1:]], [names[1:], names[:-1]]], axis=1)
    order = np.lexsort((col, row))
    count = np.where(row == col, 2, 1).astype(np.int32)
    matches = metrics.strong_matches(Confusion(row[order], col[order], count[order], np.int32(0)), n, 0.5)
    label_PV, stats = metrics.threshold_sweep(matches, np.array([0.5, 0.51], np.float32))
    assert not np.asarray(label_PV[0]).any() and (np.asarray(label_PV[1]) == np.arange(n)).all()
    assert stats.giant_fraction[0] == 1 and stats.max_size[1] == 1 and stats.degree_V[0].max() == 2


def test_planted_classes_are_recovered_with_a_cue_and_not_without():
    rng, classes, members = generator(19), 40, 5
    vocab_size = classes * members
    class_V = rng.permutation(np.repeat(np.arange(classes), members))
    p = 1 / np.arange(1, vocab_size + 1)
    targets = np.append(rng.choice(vocab_size, 60_000, p=p / p.sum()), np.repeat(np.arange(vocab_size), 50))
    by_class = np.stack([np.flatnonzero(class_V == c) for c in range(classes)])
    stranger = by_class[class_V[targets], rng.integers(0, members, targets.size)]
    cued = np.where(rng.random(targets.size) < 0.6, targets, stranger)
    most_frequent = by_class[class_V[targets], 0]  # ids are in order of frequency: what argmax says without a cue

    def recovered(predictions):
        pairs = metrics.count_confusion(targets, predictions, np.ones(targets.size, bool), vocab_size)
        matches = metrics.strong_matches(pairs, vocab_size, 0.03)
        label_V = metrics.clusters(matches, 0.03)
        return metrics.adjusted_rand_index(label_V, class_V), int(matches.kept_V.sum())

    assert recovered(cued.astype(np.int32)) == (1.0, vocab_size)
    score, kept = recovered(most_frequent.astype(np.int32))
    assert kept == classes and score == 0


def test_adjusted_rand_index_equals_pair_counting():
    rng = generator(20)
    for _ in range(20):
        labels, classes = rng.integers(0, rng.integers(2, 6), (2, 12))
        together = np.array([(labels[i] == labels[j], classes[i] == classes[j])
                             for i, j in itertools.combinations(range(12), 2)])  # fmt: skip
        both, in_labels, in_classes = together.all(1).sum(), *together.sum(0)
        chance = in_labels * in_classes / len(together)
        expected = (both - chance) / ((in_labels + in_classes) / 2 - chance)
        assert metrics.adjusted_rand_index(labels, classes) == pytest.approx(expected)
    assert metrics.adjusted_rand_index([0, 0, 1, 2], [0, 0, 1, 1]) == pytest.approx(4 / 7)
    assert metrics.adjusted_rand_index([3, 3, 8, 8], [1, 1, 0, 0]) == 1
    assert metrics.adjusted_rand_index([0, 1, 2], [5, 6, 7]) == metrics.adjusted_rand_index([0, 0], [1, 1]) == 1
    assert metrics.adjusted_rand_index(np.arange(4), [0, 0, 1, 1]) == 0


# ---- attention -------------------------------------------------------------------------------------------------------


def test_attention_mass_equals_a_loop_and_adds_over_batches():
    rng = generator(9)
    L, B, N, T, groups = 2, 5, 3, 7, 4
    pattern = rng.dirichlet(np.ones(T), (L, B, N, T)).astype(np.float32)
    query, group = rng.integers(0, T, (B, 2), np.int32), rng.integers(-1, groups, (B, T), np.int32)
    valid = np.array([[True, True], [True, False], [False, False], [True, True], [True, False]])
    query[1, 1], query[2, 0] = 99, -40  # nonsense in unused slots
    mass, keys = np.zeros((L, N, groups)), np.zeros(groups, np.int32)
    for b, q, t in itertools.product(range(B), range(2), range(T)):
        if valid[b, q] and group[b, t] >= 0:
            mass[:, :, group[b, t]] += pattern[:, b, :, query[b, q], t]
            keys[group[b, t]] += 1
    got = metrics.attention_mass(pattern, query, group, groups, valid)
    np.testing.assert_allclose(got.mass_LNG, mass, rtol=1e-5)
    np.testing.assert_array_equal(got.keys_G, keys)
    assert got.queries == valid.sum()
    parts = [
        metrics.attention_mass(pattern[:, part], query[part], group[part], groups, valid[part])
        for part in (slice(0, 2), slice(2, 5))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), jax.tree.map(jnp.add, *parts), got)
    everyone = metrics.attention_mass(pattern, query % T, np.zeros((B, T), np.int32), 1)
    np.testing.assert_allclose(everyone.mass_LNG, 2.0 * B, rtol=1e-5)
    assert np.isnan(metrics.attention_mass(pattern, query, group, groups).mass_LNG).any()  # 99 is no position


@pytest.mark.parametrize("shapes", [((6, 8), (6, 8), (5, 8)), ((6, 8), (8, 6), (6, 8)), ((48,), (48,), (40,))])
def test_a_confusion_of_arrays_that_do_not_fit_is_refused(shapes):
    targets, predictions, valid = (np.ones(shape, kind) for shape, kind in zip(shapes, (int, int, bool), strict=True))
    with pytest.raises(ValueError, match="of one shape"):
        metrics.count_confusion(targets, predictions, valid, 9)


def test_any_valid_that_is_not_zero_counts():
    ids = np.array([1, 2, 2])
    counts = metrics.count_tokens(ids, ids, np.zeros(3, int), np.array([2, 0, 3]), 4)
    np.testing.assert_array_equal(counts.hits_CV[0], [0, 1, 1, 0])
