"""n-gram statistics and a model's distance to them: loops in NumPy, chains with known entropies, hand-made models."""

import dataclasses
import itertools
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

from bert6_jax import ngrams, objectives, transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError
from bert6_jax.masking import MaskingConfig

V, N, T = 11, 12, 10
EXCLUDED = (3, 7)
SMALL = TransformerConfig(
    V, width=8, blocks=1, heads=2, head_width=4, mlp_width=16, max_len=T, norm="pre", causal=True, init_std=0.5
)
MASKED_MODEL = TransformerConfig(V, width=8, blocks=1, heads=2, head_width=4, mlp_width=16, max_len=T, init_std=0.5)
MASKING = MaskingConfig(V, mask_id=10, never=(0,), slots=6, rate=0.5)

divergence_sums = jax.jit(ngrams.divergence_sums, static_argnames=("cfg", "masking"))


@partial(jax.jit, static_argnames="cfg")
def all_logits(params_X, ids_NT, segment_NT, cfg):
    """Logits of every model at every position, `[X, N, T, V]`."""

    def one(params):
        return transformer.head(params, transformer.forward(params, ids_NT, cfg, segment_BT=segment_NT)[0], cfg)

    return jax.vmap(one)(params_X)


@pytest.fixture(scope="module")
def text():
    """Rows of packed segments, some with padding behind them."""
    rng = np.random.default_rng(0)
    ids_NT = rng.choice(V, size=(N, T), p=rng.dirichlet(np.ones(V))).astype(np.int32)
    segment_NT = np.sort(rng.integers(1, 4, size=(N, T)), axis=1).astype(np.int32)
    segment_NT[np.arange(T)[None] >= rng.integers(1, T + 3, size=N)[:, None]] = 0
    assert (segment_NT == 0).any() and (segment_NT[:, -1] > 1).any()
    return ids_NT, segment_NT


def events(ids_NT, segment_NT, excluded=()):
    """(row, position, left neighbour, token) of every event, by the definition."""
    for n, t in itertools.product(range(len(ids_NT)), range(1, ids_NT.shape[1])):
        u, v = int(ids_NT[n, t - 1]), int(ids_NT[n, t])
        if segment_NT[n, t] > 0 and segment_NT[n, t] == segment_NT[n, t - 1] and not {u, v} & set(excluded):
            yield n, t, u, v


def table(ids_NT, segment_NT, excluded=()):
    count_VV = np.zeros((V, V), np.int64)
    for *_, u, v in events(ids_NT, segment_NT, excluded):
        count_VV[u, v] += 1
    return count_VV


def smoothed(count_VV, excluded, add_k, interpolation):
    """(q(v), q(v | u)) in float64."""
    allowed = np.array([v not in excluded for v in range(V)])
    q_V = np.where(allowed, count_VV.sum(0) + add_k, 0.0)
    q_V /= q_V.sum()
    q_VV = np.empty((V, V))
    for u in range(V):
        kinds, seen = (count_VV[u] > 0).sum(), count_VV[u].sum()
        back = 1.0 if not seen else kinds / (seen + kinds) if interpolation is None else interpolation
        q_VV[u] = back * q_V + (1 - back) * count_VV[u] / max(seen, 1)
    return q_V, q_VV


def batch_of(ids_NT, segment_NT, valid_N=None):
    return {
        "ids": jnp.asarray(ids_NT),
        "segment": jnp.asarray(segment_NT),
        "row": jnp.arange(len(ids_NT), dtype=jnp.int32),
        "valid": jnp.ones(len(ids_NT), bool) if valid_N is None else jnp.asarray(valid_N),
    }


def shapes_of(cfg):
    return jax.eval_shape(lambda key: transformer.init(key, cfg), jax.random.key(0))


def snapshots(cfg):
    """Two random models `[2, ...]`; drawn in NumPy, as `transformer.init` takes long to compile."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, 0.5, (2, *leaf.shape)), jnp.float32), shapes_of(cfg))


def table_models(logits_XVV):
    """Causal transformers whose logits after u are `logits_XVV[x, u]`: one-hot embeddings, blocks that add nothing."""
    models, vocab, _ = np.shape(logits_XVV)
    cfg = TransformerConfig(
        vocab, vocab, 1, 1, 1, 1, 64, types=0, norm="none", causal=True, head="linear", tied=False, head_bias=False
    )
    params_X = jax.tree.map(lambda leaf: jnp.zeros((models, *leaf.shape)), shapes_of(cfg))
    params_X["embed"]["token"] = jnp.asarray(np.tile(np.eye(vocab), (models, 1, 1)), jnp.float32)
    params_X["head"]["kernel"] = jnp.asarray(logits_XVV, jnp.float32)
    return params_X, cfg


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("excluded", [(), EXCLUDED])
def test_counts_are_those_of_a_loop(text, excluded):
    counts = ngrams.count(*text, V, excluded)
    expected_VV = table(*text, excluded)
    assert counts.bigram_VV.dtype == counts.unigram_V.dtype == np.int64
    np.testing.assert_array_equal(counts.bigram_VV.toarray(), expected_VV)
    np.testing.assert_array_equal(counts.unigram_V, expected_VV.sum(0))
    np.testing.assert_array_equal(np.flatnonzero(~counts.allowed_V), excluded)


def test_bigrams_stay_in_their_segment():
    ids = np.array([[1, 2, 3, 4, 5, 99]], np.int32)
    segment = np.array([[1, 1, 2, 2, 0, 0]], np.int32)
    expected = np.zeros((6, 6), np.int64)
    expected[1, 2] = expected[3, 4] = 1
    np.testing.assert_array_equal(ngrams.count(ids, segment, 6).bigram_VV.toarray(), expected)


def test_counts_add_up_over_batches(text):
    ids_NT, segment_NT = text
    parts = [ngrams.count(ids_NT[n : n + 5], segment_NT[n : n + 5], V, EXCLUDED) for n in range(0, N, 5)]
    whole, added = ngrams.count(*text, V, EXCLUDED), reduce(ngrams.add, parts)
    np.testing.assert_array_equal(added.bigram_VV.toarray(), whole.bigram_VV.toarray())
    np.testing.assert_array_equal(added.unigram_V, whole.unigram_V)
    for a, b in zip(ngrams.fit(added), ngrams.fit(whole), strict=True):
        np.testing.assert_array_equal(a, b)


# --- smoothed distributions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("excluded", [(), EXCLUDED])
@pytest.mark.parametrize(("add_k", "interpolation"), [(1.0, None), (0.1, 0.3), (2.0, 1.0)])
def test_rows_follow_the_formula_and_sum_to_one(text, excluded, add_k, interpolation):
    ids_NT, segment_NT = text[0].copy(), text[1]
    ids_NT[ids_NT == 5] = 4  # an id that was never seen
    fitted = ngrams.fit(ngrams.count(ids_NT, segment_NT, V, excluded), add_k=add_k, interpolation=interpolation)
    q_V, q_VV = smoothed(table(ids_NT, segment_NT, excluded), excluded, add_k, interpolation)
    row_VV = ngrams.bigram_rows(fitted, jnp.arange(V, dtype=jnp.int32))
    assert row_VV.dtype == jnp.float32
    np.testing.assert_allclose(fitted.unigram_V, q_V, rtol=1e-6)
    np.testing.assert_allclose(row_VV, q_VV, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(row_VV, np.float64).sum(1), 1.0, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(row_VV[5], fitted.unigram_V)
    allowed_V = np.array([v not in excluded for v in range(V)])
    assert (np.asarray(row_VV)[:, allowed_V] > 0).all() and (np.asarray(row_VV)[:, ~allowed_V] == 0).all()


@pytest.mark.parametrize("shape", [(1,), (2, 3), (5, 9)])  # fewer and more positions than ids
def test_rows_of_ids_in_any_shape(text, shape):
    fitted = ngrams.fit(ngrams.count(*text, V))
    prev_Y = jnp.asarray(np.random.default_rng(1).integers(0, V, size=shape), jnp.int32)
    row_VV = ngrams.bigram_rows(fitted, jnp.arange(V, dtype=jnp.int32))
    row_YV = jax.jit(ngrams.bigram_rows)(fitted, prev_Y)
    np.testing.assert_allclose(row_YV, row_VV[prev_Y], rtol=1e-6)


def test_repeated_entries_of_a_table_are_one_bigram(text):
    counts = ngrams.count(*text, V)
    coo = counts.bigram_VV.tocoo()
    twice = sparse.coo_array(
        (np.append(coo.data, coo.data), (np.append(coo.row, coo.row), np.append(coo.col, coo.col)))
    )
    loose = sparse.csr_array(coo)
    loose.data, loose.indices = np.repeat(loose.data, 2), np.repeat(loose.indices, 2)
    loose.indptr = loose.indptr * 2
    a, b = (ngrams.fit(counts._replace(unigram_V=2 * counts.unigram_V, bigram_VV=t)) for t in (twice.tocsr(), loose))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


# --- floors ----------------------------------------------------------------------------------------------------------


def test_entropies_of_an_even_chain_are_exact():
    # 0 0 1 1 2 2 0: every state goes on to itself or to the next, each once
    counts = ngrams.count(np.array([[0, 0, 1, 1, 2, 2, 0]]), np.ones((1, 7), np.int32), 5)
    floors = ngrams.entropies(counts)
    np.testing.assert_allclose([floors["unigram"], floors["bigram"]], [np.log(3), np.log(2)], rtol=1e-12)


def markov_chain():
    """Transitions of a chain with unequal states, its stationary distribution, and its entropies in nats."""
    p_SS = np.array([[0.1, 0.6, 0.1, 0.2], [0.25, 0.25, 0.25, 0.25], [0.0, 0.9, 0.1, 0.0], [0.5, 0.0, 0.0, 0.5]])
    value, vector = np.linalg.eig(p_SS.T)
    p_S = np.real(vector[:, np.argmin(np.abs(value - 1))])
    p_S /= p_S.sum()
    safe_SS = np.where(p_SS > 0, p_SS, 1.0)
    return p_SS, p_S, -(p_S * np.log(p_S)).sum(), -(p_S[:, None] * p_SS * np.log(safe_SS)).sum()


def sample_chain(p_SS, p_S, seed, rows=2000, length=65):
    rng = np.random.default_rng(seed)
    ids_NT = np.empty((rows, length), np.int32)
    ids_NT[:, 0] = rng.choice(len(p_S), size=rows, p=p_S)
    for t in range(1, length):
        uniform_N = rng.random(rows)
        ids_NT[:, t] = (uniform_N[:, None] > p_SS.cumsum(1)[ids_NT[:, t - 1]]).sum(1).clip(max=len(p_S) - 1)
    return ids_NT


def test_floors_of_a_markov_chain():
    p_SS, p_S, unigram, bigram = markov_chain()
    train, held_out = (
        ngrams.count(ids, np.ones_like(ids), 4) for ids in (sample_chain(p_SS, p_S, s) for s in range(2))
    )
    plug_in, crossed = ngrams.entropies(train), ngrams.cross_entropies(ngrams.fit(train), held_out)
    assert unigram - bigram > 0.2  # so that the two are told apart
    np.testing.assert_allclose([plug_in["unigram"], plug_in["bigram"]], [unigram, bigram], atol=0.01)
    np.testing.assert_allclose([crossed["unigram"], crossed["bigram"]], [unigram, bigram], atol=0.01)


@pytest.mark.parametrize("excluded", [(), EXCLUDED])
def test_entropies_are_those_of_a_loop(text, excluded):
    count_VV = table(*text, excluded)
    total = count_VV.sum()
    expected = {
        "unigram": -sum(n / total * np.log(n / total) for n in count_VV.sum(0) if n),
        "bigram": -sum(
            count_VV[u, v] / total * np.log(count_VV[u, v] / count_VV[u].sum()) for u, v in np.argwhere(count_VV)
        ),
    }
    assert ngrams.entropies(ngrams.count(*text, V, excluded)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("excluded", [(), EXCLUDED])
def test_cross_entropies_are_those_of_a_loop(text, excluded):
    ids_NT, segment_NT = text
    half = N // 2
    train = ngrams.count(ids_NT[:half], segment_NT[:half], V, excluded)
    held_out = ngrams.count(ids_NT[half:], segment_NT[half:], V, excluded)
    q_V, q_VV = smoothed(table(ids_NT[:half], segment_NT[:half], excluded), excluded, 0.5, None)
    seen = [(u, v) for *_, u, v in events(ids_NT[half:], segment_NT[half:], excluded)]
    expected = {
        "unigram": -np.mean([np.log(q_V[v]) for _, v in seen]),
        "bigram": -np.mean([np.log(q_VV[u, v]) for u, v in seen]),
    }
    fitted = ngrams.fit(train, add_k=0.5)
    assert ngrams.cross_entropies(fitted, held_out) == pytest.approx(expected, rel=1e-6)
    # No distribution is better on a text than the text's own frequencies.
    own, floor = ngrams.cross_entropies(fitted, train), ngrams.entropies(train)
    assert own["unigram"] > floor["unigram"] and own["bigram"] > floor["bigram"]


# --- a model's distance ----------------------------------------------------------------------------------------------


def loop_divergences(logits_SV, pairs, q_V, q_VV, excluded):
    """Means over positions S from their logits, (left neighbour, token) pairs and the tables, in float64."""
    keep = [v for v in range(V) if v not in excluded]
    found = []
    for logits_V, (u, v) in zip(np.asarray(logits_SV, np.float64), pairs, strict=True):
        logits = logits_V[keep]
        p = np.exp(logits - logits.max())
        p /= p.sum()
        at = keep.index(v)
        one = {"loss": -np.log(p[at]), "entropy": -(p * np.log(p)).sum()}
        for name, q in (("unigram", q_V[keep]), ("bigram", q_VV[u][keep])):
            one[f"loss_{name}"] = -np.log(q[at])
            one[f"kl_model_{name}"] = (p * np.log(p / q)).sum()
            one[f"kl_{name}_model"] = (q * np.log(q / p)).sum()
            one[f"tv_{name}"] = np.abs(p - q).sum() / 2
        found.append(one)
    return {name: np.mean([one[name] for one in found]) for name in found[0]} | {"count": len(found)}


@pytest.mark.parametrize("excluded", [(), EXCLUDED])
def test_causal_models_against_a_loop(text, excluded):
    params_X, valid_N = snapshots(SMALL), np.arange(N) != 4
    batch = batch_of(*text, valid_N)
    fitted = ngrams.fit(ngrams.count(*text, V, excluded), add_k=0.7)
    q_V, q_VV = smoothed(table(*text, excluded), excluded, 0.7, None)
    sums = divergence_sums(params_X, batch, fitted, cfg=SMALL)
    found = ngrams.divergences(sums)
    places = [e for e in events(*text, excluded) if valid_N[e[0]]]
    logits_XNTV = np.asarray(all_logits(params_X, batch["ids"], batch["segment"], cfg=SMALL))
    for x in range(2):
        logits_SV = [logits_XNTV[x, n, t - 1] for n, t, *_ in places]
        expected = loop_divergences(logits_SV, [e[2:] for e in places], q_V, q_VV, excluded)
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert found[name][x] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    if not excluded:  # the loss is that of training
        params = jax.tree.map(lambda leaf: leaf[0], params_X)
        loss, own = jax.jit(objectives.next_token(SMALL))(params, batch, jax.random.key(0))
        assert float(sums["loss"][0]) == pytest.approx(float(loss), rel=1e-5)
        assert float(sums["count"][0]) == float(own["count"])


def test_masked_models_against_a_loop(text):
    params_X, valid_N = snapshots(MASKED_MODEL), np.arange(N) != 2
    batch, key = batch_of(*text, valid_N), jax.random.key(5)
    fitted = ngrams.fit(ngrams.count(*text, V, EXCLUDED))
    q_V, q_VV = smoothed(table(*text, EXCLUDED), EXCLUDED, 1.0, None)
    found = ngrams.divergences(divergence_sums(params_X, batch, fitted, cfg=MASKED_MODEL, masking=MASKING, key=key))
    corrupted = jax.jit(lambda: objectives.masked_batch(batch, key, MASKING)[0])()
    slot_BK, valid_BK = np.asarray(corrupted.slot_BK), np.asarray(corrupted.valid_BK)
    slots = {(n, int(t)) for n in range(N) for t in slot_BK[n][valid_BK[n]]}
    places = [e for e in events(*text, EXCLUDED) if e[:2] in slots and valid_N[e[0]]]
    assert len(places) > 5 and any((n, 0) in slots for n in range(N))
    logits_XNTV = np.asarray(all_logits(params_X, corrupted.ids_BT, batch["segment"], cfg=MASKED_MODEL))
    for x in range(2):
        logits_SV = [logits_XNTV[x, n, t] for n, t, *_ in places]
        expected = loop_divergences(logits_SV, [e[2:] for e in places], q_V, q_VV, EXCLUDED)
        for name, value in expected.items():
            assert found[name][x] == pytest.approx(value, rel=2e-5, abs=1e-6), name


def test_hand_made_models():
    """A model that is the bigram, a uniform one, and one that is sure of something improbable."""
    p_SS, p_S, *_ = markov_chain()
    ids_NT = sample_chain(p_SS, p_S, 3, rows=400, length=30)
    counts = ngrams.count(ids_NT, np.ones_like(ids_NT), 4)
    fitted = ngrams.fit(counts, add_k=0.01)
    row_VV = np.log(ngrams.bigram_rows(fitted, jnp.arange(4, dtype=jnp.int32)))
    params_X, cfg = table_models([row_VV, np.full((4, 4), 2.5), np.tile([1e4, 0.0, 0.0, 0.0], (4, 1))])
    batch = batch_of(ids_NT, np.ones_like(ids_NT))
    found = ngrams.divergences(divergence_sums(params_X, batch, fitted, cfg=cfg))
    bigram, uniform, sure = ({name: x[i] for name, x in found.items()} for i in range(3))

    for name in ("kl_model_bigram", "kl_bigram_model", "tv_bigram"):
        assert abs(bigram[name]) < 1e-6, name
    crossed = ngrams.cross_entropies(fitted, counts)
    assert bigram["loss"] == pytest.approx(crossed["bigram"], rel=1e-5)
    assert bigram["loss_bigram"] == pytest.approx(crossed["bigram"], rel=1e-5)
    assert bigram["loss_unigram"] == pytest.approx(crossed["unigram"], rel=1e-5)
    assert bigram["count"] == counts.unigram_V.sum() == 400 * 29
    # KL(bigram || unigram) over the text's own left neighbours is the difference of the entropies, but for smoothing.
    floor = ngrams.entropies(counts)
    assert bigram["kl_model_unigram"] == pytest.approx(floor["unigram"] - floor["bigram"], abs=0.005)

    q_V = np.asarray(fitted.unigram_V, np.float64)
    assert uniform["loss"] == pytest.approx(np.log(4), rel=1e-6)
    assert uniform["entropy"] == pytest.approx(np.log(4), rel=1e-6)
    assert uniform["kl_model_unigram"] == pytest.approx(-np.log(4) - np.log(q_V).mean(), rel=1e-5)
    assert uniform["kl_unigram_model"] == pytest.approx(np.log(4) + (q_V * np.log(q_V)).sum(), rel=1e-5)
    assert uniform["tv_unigram"] == pytest.approx(np.abs(q_V - 0.25).sum() / 2, rel=1e-5)

    # Where the model's probability underflows its logarithm does not: the divergence is the distance of the logits.
    rest = -(q_V * np.log(q_V)).sum()
    assert sure["entropy"] == 0.0
    assert sure["kl_model_unigram"] == pytest.approx(-np.log(q_V[0]), rel=1e-5)
    assert sure["kl_unigram_model"] == pytest.approx((1 - q_V[0]) * 1e4 - rest, rel=1e-5)


def test_sums_depend_on_events_alone(text):
    """Not on the batching, on what stands under padding, or on the order of the models."""
    ids_NT, segment_NT = text
    fitted = ngrams.fit(ngrams.count(*text, V))
    params_X = snapshots(SMALL)
    run = partial(divergence_sums, ngrams=fitted, cfg=SMALL)
    whole = run(params_X, batch_of(ids_NT, segment_NT))
    halves = [run(params_X, batch_of(ids_NT[half], segment_NT[half])) for half in np.s_[: N // 2, N // 2 :]]
    padding_T = np.where(np.arange(T) % 2, -1, V + 5).astype(np.int32)
    padded = run(params_X, batch_of(np.where(segment_NT > 0, ids_NT, padding_T[None]), segment_NT))
    turned = run(jax.tree.map(lambda x: x[::-1], params_X), batch_of(ids_NT, segment_NT))
    for name, total_X in whole.items():
        np.testing.assert_allclose(halves[0][name] + halves[1][name], total_X, rtol=1e-5)
        np.testing.assert_allclose(padded[name], total_X, rtol=1e-6)
        np.testing.assert_allclose(turned[name], total_X[::-1], rtol=1e-6)
    assert float(jnp.abs(whole["loss"][0] - whole["loss"][1])) > 0.1


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ids, seg: ngrams.count(ids[0], seg[0], V), "two integer arrays"),
        (lambda ids, seg: ngrams.count(ids[:, 1:], seg, V), "two integer arrays"),
        (lambda ids, seg: ngrams.count(ids.astype(np.float32), seg, V), "two integer arrays"),
        (lambda ids, seg: ngrams.count(ids, seg, 4), r"outside 0\.\.3"),
        (lambda ids, seg: ngrams.count(ids, seg, V, (V,)), r"excluded ids \[11\]"),
        (lambda ids, seg: ngrams.add(ngrams.count(ids, seg, V), ngrams.count(ids, seg, V + 1)), "11 and 12 ids"),
        (lambda ids, seg: ngrams.add(ngrams.count(ids, seg, V), ngrams.count(ids, seg, V, (3,))), "0 and 1 of them"),
        (lambda ids, seg: ngrams.fit(ngrams.count(ids, 0 * seg, V)), "no bigram"),
        (lambda ids, seg: ngrams.entropies(ngrams.count(ids, 0 * seg, V)), "no bigram"),
        (lambda ids, seg: ngrams.fit(ngrams.count(ids, seg, V), add_k=0.0), "add_k is 0.0"),
        (lambda ids, seg: ngrams.fit(ngrams.count(ids, seg, V), interpolation=0.0), "interpolation is 0.0"),
        (lambda ids, seg: ngrams.fit(ngrams.count(ids, seg, V), interpolation=1.5), "interpolation is 1.5"),
    ],
)
def test_bad_text_is_refused_in_one_line(text, call, message):
    with pytest.raises(InputError, match=message) as error:
        call(*text)
    assert "\n" not in str(error.value)


def test_bad_models_are_refused_in_one_line(text):
    counts = ngrams.count(*text, V)
    fitted, batch, params_X = ngrams.fit(counts), batch_of(*text), snapshots(SMALL)
    single = jax.tree.map(lambda x: x[0], params_X)
    broken = jax.tree.map(lambda x: x * jnp.nan, params_X)
    short = batch_of(text[0][:, :1], text[1][:, :1])
    empty = batch_of(*text, np.zeros(N, bool))
    larger = ngrams.fit(ngrams.count(*text, V + 1))
    headless = dataclasses.replace(SMALL, head="none")
    key = jax.random.key(0)
    run = divergence_sums
    cases = [
        (lambda: ngrams.cross_entropies(larger, counts), "12 and 11 ids"),
        (lambda: ngrams.cross_entropies(fitted, ngrams.count(*text, V, (1,))), "0 and 1 of them"),
        (lambda: run(params_X, batch, larger, cfg=SMALL), "11 ids against n-grams of 12"),
        (lambda: run(params_X, batch, fitted, cfg=headless), "head 'none'"),
        (lambda: run(single, batch, fitted, cfg=SMALL), "those of one model"),
        (lambda: run(params_X, short, fitted, cfg=SMALL), "1 token"),
        (lambda: run(params_X, batch, fitted, cfg=SMALL, masking=MASKING, key=key), "causal is True"),
        (lambda: run(params_X, batch, fitted, cfg=MASKED_MODEL), "causal is False, masking missing"),
        (lambda: run(params_X, batch, fitted, cfg=MASKED_MODEL, masking=MASKING), "key missing"),
        (lambda: ngrams.divergences(run(broken, batch, fitted, cfg=SMALL)), "not finite"),
        (lambda: ngrams.divergences(run(params_X, empty, fitted, cfg=SMALL)), "no position"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
