"""Windows, packing, splits and sampling against plain Python, on random documents."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert6_jax import transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.data import windows as windows_module
from bert6_jax.data.sources import TextSource, open_source
from bert6_jax.data.store import TokenStore, build_store
from bert6_jax.data.tokenizer import SPECIALS, load_tokenizer, wordpiece
from bert6_jax.data.windows import make_windows, rows_at, split_documents, steps_per_epoch, token_frequencies
from bert6_jax.errors import InputError
from bert6_jax.objectives import forward_inputs

WORDS = [f"w{i}" for i in range(40)]
TOKENIZER = wordpiece((*SPECIALS, *WORDS))
PAD, CLS, SEP = TOKENIZER.pad_id, TOKENIZER.cls_id, TOKENIZER.sep_id
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda lengths: max(lengths) >= 3)


def make_store(documents) -> TokenStore:
    """A store in memory."""
    return TokenStore(
        path="memory",
        ids=np.concatenate(documents).astype(np.uint16),
        offsets_D1=np.cumsum([0, *map(len, documents)]),
        source="memory",
        fingerprint="f",
        tokenizer_sha256=TOKENIZER.sha256,
        vocab_size=TOKENIZER.vocab_size,
        unknown=0,
    )


def random_documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(5, TOKENIZER.vocab_size, length) for length in lengths]


def plain_pieces(documents, order, length, mode, min_tokens):
    """(document, ids) of every piece by slicing lists."""
    pieces = []
    for d in order:
        starts = range(0, len(documents[d]), length - 2)
        for start in [0] if mode == "first" else starts:
            ids = list(documents[d][start : start + length - 2])
            if len(ids) >= min_tokens:
                pieces.append((d, ids))
    return pieces


def padded(values, length, fill=0):
    return values + [fill] * (length - len(values))


@settings(deadline=None)
@given(LENGTHS, st.sampled_from(["first", "all"]), st.integers(5, 20), st.integers(1, 3), st.integers(0, 9))
def test_windows_equal_slices(lengths, mode, length, min_tokens, seed):
    documents = random_documents(lengths, seed)
    order = np.random.default_rng(seed).permutation(len(documents))[: max(1, len(documents) - 2)]
    expected = plain_pieces(documents, order, length, mode, min_tokens)
    if not expected:
        return
    windows = make_windows(make_store(documents), TOKENIZER, order, length=length, mode=mode, min_tokens=min_tokens)
    assert windows.num_rows == len(expected)
    assert windows.document_W.tolist() == [d for d, _ in expected]
    rows = np.arange(len(expected))[::-1]
    batch = windows.batch(rows)
    assert set(batch) == {"ids", "segment", "row", "valid"}
    ids = [padded([CLS, *ids, SEP], length, PAD) for _, ids in expected][::-1]
    np.testing.assert_array_equal(batch["ids"], ids)
    np.testing.assert_array_equal(batch["segment"], [padded([1] * (len(p) + 2), length) for _, p in expected][::-1])
    np.testing.assert_array_equal(batch["row"], rows)
    assert batch["valid"].all()
    assert {str(x.dtype) for x in batch.values()} == {"int32", "bool"}
    np.testing.assert_array_equal(windows.rows(rows), ids)
    assert windows.num_tokens == sum(len(p) + 2 for _, p in expected)
    short = sum(len(documents[d]) < min_tokens for d in order)
    assert windows.dropped_documents == short
    cut = sum(-(-len(documents[d]) // (length - 2)) for d in order if len(documents[d]) >= min_tokens)
    assert windows.dropped_tails == (cut - len(expected) if mode == "all" else 0)


@settings(deadline=None)
@given(LENGTHS, st.sampled_from(["first", "all"]), st.integers(5, 20))
def test_packed_rows_hold_the_same_pieces(lengths, mode, length):
    documents = random_documents(lengths)
    store = make_store(documents)
    plain = make_windows(store, TOKENIZER, length=length, mode=mode)
    packed = make_windows(store, TOKENIZER, length=length, mode=mode, pack=True)
    batch = packed.batch(np.arange(packed.num_rows))
    found = []
    for row in range(packed.num_rows):
        segment, column = batch["segment"][row], 0
        pieces = range(packed.first_W1[row], packed.first_W1[row + 1])
        for number, piece in enumerate(pieces, 1):  # one after the other, no gap, positions from 0
            (at,) = np.nonzero(segment == number)
            assert at.tolist() == list(range(column, column + len(at)))
            assert batch["position"][row, at].tolist() == list(range(len(at)))
            found.append((packed.document_P[piece], *batch["ids"][row, at].tolist()))
            column += len(at)
        assert (segment[column:] == 0).all() and (batch["ids"][row, column:] == PAD).all()
        assert (batch["position"][row, column:] == 0).all() and segment.max() == len(pieces)
    ids_WT, width_W = plain.rows(np.arange(plain.num_rows)), plain.size_P + 2
    expected = [(d, *ids[:w].tolist()) for d, ids, w in zip(plain.document_W, ids_WT, width_W, strict=True)]
    assert sorted(found) == sorted(expected)
    with pytest.raises(ValueError, match="several documents"):
        _ = packed.document_W


def cell_by_cell(windows, row_B):
    """`ids`, `segment` and `position` of rows, one cell at a time."""
    ids, segment, position = (np.full((len(row_B), windows.length), fill) for fill in (PAD, 0, 0))
    for b, row in enumerate(row_B):
        for number, p in enumerate(range(windows.first_W1[row], windows.first_W1[row + 1]), 1):
            start, size, column = windows.start_P[p], windows.size_P[p], windows.column_P[p]
            for at, token in enumerate([CLS, *windows.store.ids[start : start + size], SEP]):
                ids[b, column + at], segment[b, column + at], position[b, column + at] = token, number, at
    return ids, segment, position


@settings(deadline=None)
@given(LENGTHS, st.sampled_from(["first", "all"]), st.integers(5, 60), st.booleans(), st.data())
def test_batches_equal_cells(lengths, mode, length, pack, data):
    windows = make_windows(make_store(random_documents(lengths)), TOKENIZER, length=length, mode=mode, pack=pack)
    row_B = np.array(data.draw(st.lists(st.integers(0, windows.num_rows - 1), max_size=8)), np.int32)
    for _ in range(2):  # what is kept between calls must not be what the caller was given
        batch = windows.batch(row_B)
        ids, segment, position = cell_by_cell(windows, row_B)
        np.testing.assert_array_equal(batch["ids"], ids)
        np.testing.assert_array_equal(batch["segment"], segment)
        if pack:
            np.testing.assert_array_equal(batch["position"], position)
        assert {str(x.dtype) for x in batch.values()} == {"int32", "bool"} and set(batch) - {"position"} == {
            "ids", "segment", "row", "valid"
        }  # fmt: skip
        for name in set(batch) - {"row", "valid"}:
            batch[name][:] = -1


@settings(deadline=None)
@given(
    st.integers(5, 30).flatmap(lambda T: st.tuples(st.just(T), st.lists(st.integers(3, T), min_size=1, max_size=60)))
)
def test_packing_is_best_fit_decreasing(case):
    """The rooms left over equal those of the algorithm one piece at a time; rows of equal room are exchangeable."""
    length, widths = case
    rooms = []
    for width in sorted(widths, reverse=True):
        fitting = [room for room in rooms if room >= width]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else length) - width)
    row_P, column_P = windows_module._best_fit(np.array(widths), length)
    used = np.bincount(row_P, weights=widths)
    assert sorted(length - used) == sorted(rooms)
    assert (column_P + widths <= length).all()


def test_packing_fills_the_rows():
    documents = random_documents(np.random.default_rng(0).integers(3, 40, 3000))
    windows = make_windows(make_store(documents), TOKENIZER, length=64, pack=True)
    assert windows.num_tokens / (windows.num_rows * 64) > 0.99
    again = make_windows(make_store(documents), TOKENIZER, length=64, pack=True)
    rows = np.arange(windows.num_rows)
    np.testing.assert_array_equal(windows.rows(rows), again.rows(rows))


def test_windows_refuse():
    store = make_store(random_documents([2, 1, 0]))
    with pytest.raises(InputError, match="memory: none of 3 documents has 3 tokens; give longer texts"):
        make_windows(store, TOKENIZER)
    assert make_windows(store, TOKENIZER, min_tokens=2).dropped_documents == 2
    with pytest.raises(InputError, match="length 4: no room for 3 tokens"):
        make_windows(store, TOKENIZER, length=4)
    with pytest.raises(ValueError, match="mode 'last'"):
        make_windows(store, TOKENIZER, mode="last")
    with pytest.raises(ValueError, match="another tokenizer"):
        make_windows(store, wordpiece((*SPECIALS, *WORDS[::-1])))


def test_from_text_to_windows(tmp_path):
    store = build_store(TextSource("t", ["w1 w2 w3 w4", "w5", "w6 w7 w8"], "f"), TOKENIZER, tmp_path)
    windows = make_windows(store, TOKENIZER, length=6)
    w = {word: i for i, word in enumerate(TOKENIZER.tokens)}
    expected = [[CLS, w["w1"], w["w2"], w["w3"], w["w4"], SEP], [CLS, w["w6"], w["w7"], w["w8"], SEP, PAD]]
    assert windows.rows(np.array([0, 1])).tolist() == expected
    assert windows.dropped_documents == 1 and windows.document_W.tolist() == [0, 2]


def test_token_frequencies(monkeypatch):
    monkeypatch.setattr(windows_module, "_ROWS_AT_ONCE", 7)
    windows = make_windows(make_store(random_documents(range(3, 40))), TOKENIZER, length=16, mode="all")
    rows = np.arange(0, windows.num_rows, 2)
    expected = Counter(windows.rows(rows).ravel().tolist())
    counts_V = token_frequencies(windows, rows, TOKENIZER.vocab_size)
    assert counts_V.dtype == np.int64 and counts_V.shape == (TOKENIZER.vocab_size,)
    assert counts_V[PAD] == 0 and counts_V[CLS] == len(rows)
    assert all(counts_V[i] == expected[i] for i in range(TOKENIZER.vocab_size) if i != PAD)
    assert token_frequencies(windows, rows[:0], TOKENIZER.vocab_size).sum() == 0


@given(st.integers(1, 200), st.integers(0, 2**40), st.data())
def test_split_is_nested_and_disjoint(num_documents, seed, data):
    held_out = data.draw(st.integers(0, num_documents - 1))
    sizes = data.draw(st.lists(st.integers(1, num_documents - held_out), min_size=1, max_size=4))
    split = split_documents(num_documents, seed, held_out, sizes)
    order = np.random.default_rng(seed).permutation(num_documents)  # what Dataset.shuffle(seed) of `datasets` takes
    assert list(split.subsets) == list(dict.fromkeys(sizes))
    for size, subset in split.subsets.items():
        np.testing.assert_array_equal(subset, order[:size])
        assert not set(subset) & set(split.held_out)
    assert len(split.held_out) == held_out
    np.testing.assert_array_equal(split.held_out, order[num_documents - held_out :])


def test_split_refuses():
    with pytest.raises(InputError, match="has 10 documents, too few for a subset of 8 and 3 held out"):
        split_documents(10, 0, 3, [4, 8])
    for held_out, sizes in ((-1, [3]), (1, [0, 3])):
        with pytest.raises(InputError, match="ask for positive numbers"):
            split_documents(10, 0, held_out, sizes)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 17), st.integers(0, 2**40), st.integers(0, 5))
def test_every_epoch_is_a_permutation(num_rows, batch_size, seed, epoch):
    steps = steps_per_epoch(num_rows, batch_size)
    assert steps == np.ceil(num_rows / batch_size)
    seen = []
    for step in range(epoch * steps, (epoch + 1) * steps):
        row_B, valid_B = rows_at(seed, step, num_rows, batch_size)
        assert row_B.shape == valid_B.shape == (batch_size,)
        assert row_B.dtype == np.int32 and valid_B.dtype == bool
        assert valid_B.all() or step == (epoch + 1) * steps - 1
        assert 0 <= row_B.min() and row_B.max() < num_rows
        seen += row_B[valid_B].tolist()
    assert sorted(seen) == list(range(num_rows))


def test_sampling_is_a_function_of_seed_and_step():
    arguments = [(seed, step, 1000, 32) for seed in (0, 1) for step in (0, 1, 31, 32, 63, 64, 500)]
    forwards = [rows_at(*a)[0] for a in arguments]
    windows_module._permutation.cache_clear()
    backwards = [rows_at(*a)[0] for a in reversed(arguments)][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    assert len({tuple(rows) for rows in forwards}) == len(forwards)
    # Pinned: a run resumed with a later version must read the same batches.
    assert rows_at(42, 0, 1000, 4)[0].tolist() == [857, 230, 15, 995]
    assert rows_at(42, 251, 1000, 4)[0].tolist() == [727, 17, 11, 262]
    rows_at(0, 0, 5, 5)[0][:] = -1  # the caller may write into what it gets
    assert sorted(rows_at(0, 0, 5, 5)[0]) == [0, 1, 2, 3, 4]


def test_sampling_refuses():
    for arguments in ((-1, 0, 1, 1), (0, -1, 1, 1), (0, 0, 0, 1), (0, 0, 1, 0)):
        with pytest.raises(ValueError, match="no rows for"):
            rows_at(*arguments)


def test_wikipedia(shared_data, tmp_path):
    """The sheet's figures on the smallest shard; 94 % of all articles fill the window."""
    tokenizer = load_tokenizer(shared_data / "bert_vocab")
    source = open_source(shared_data / "wikipedia" / "part-06.jsonl.gz")
    store = build_store(source, tokenizer, tmp_path)
    windows = make_windows(store, tokenizer)
    assert windows.num_rows == store.num_documents == 1836 and store.unknown_share < 1e-3
    assert 0.93 < (store.lengths_D >= 126).mean() < 0.95
    counts_V = token_frequencies(windows, np.arange(1836), tokenizer.vocab_size)
    assert counts_V.sum() == np.minimum(store.lengths_D, 126).sum() + 2 * 1836
    assert counts_V[[0, 103]].tolist() == [0, 0]


@pytest.mark.parametrize("causal", [False, True])
def test_a_model_reads_packed_rows_as_it_reads_them_alone(causal):
    cfg = TransformerConfig(TOKENIZER.vocab_size, 16, 2, 2, 8, 32, max_len=24, causal=causal, init_std=0.3)
    params = transformer.init(jax.random.key(0), cfg)
    store = make_store(random_documents([3, 9, 50, 4, 22, 6, 1, 5]))

    def outputs(pack):
        """What the head reads at every token, by piece."""
        windows = make_windows(store, TOKENIZER, length=24, mode="all", pack=pack)
        batch = windows.batch(np.arange(windows.num_rows))
        inputs = forward_inputs({key: jnp.asarray(value) for key, value in batch.items()})
        out_WTD, _ = transformer.forward(params, jnp.asarray(batch["ids"]), cfg, **inputs)
        row_P = np.repeat(np.arange(windows.num_rows), np.diff(windows.first_W1))
        pieces = zip(windows.start_P, row_P, windows.column_P, windows.size_P, strict=True)
        return {start: out_WTD[row, column : column + size + 2] for start, row, column, size in pieces}

    alone, packed = outputs(False), outputs(True)
    assert alone.keys() == packed.keys()
    for start in alone:
        np.testing.assert_allclose(packed[start], alone[start], atol=1e-5)
