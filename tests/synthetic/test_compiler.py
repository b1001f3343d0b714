"""Compiled programs against the evaluator, plain counting, a NumPy forward pass of the same parameters, and Tracr."""

from __future__ import annotations

import itertools
import operator
import random
from fractions import Fraction
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax import checkpoint, transformer
from bert6_jax.errors import InputError
from synthetic import compiler, rasp
from synthetic.compiler import compile_program, decode, encode, output_logits, run, verify
from synthetic.rasp import (
    AMBIGUOUS,
    Aggregate,
    Constant,
    Map,
    Select,
    SelectorWidth,
    SequenceMap,
    indices,
    tokens,
)

NINE, LETTERS = "abcdefghi", "abcdefghijklmnopqrstuvwxyz"
EVERY = Select(tokens, tokens, lambda key, query: True)
logits_of = jax.jit(output_logits, static_argnames=("layout", "position"))
trunk = jax.jit(transformer.forward, static_argnames=("cfg",))


def outputs(compiled, ids_BT, segment_BT):
    """Logits [B, T, A] in full float32, a thousand rows at a time."""
    with jax.default_matmul_precision("highest"):
        parts = [logits_of(compiled.params, ids_BT[i : i + 1000], segment_BT[i : i + 1000], compiled.layout)
                 for i in range(0, len(ids_BT), 1000)]  # fmt: skip
    return np.concatenate(parts)


def numpy_outputs(compiled, ids_BT, segment_BT):
    """The same by NumPy in float32, the sums in another order; attention by its formula."""
    params, cfg = jax.tree.map(np.asarray, compiled.params), compiled.layout.config
    attn, mlp = params["blocks"]["attn"], params["blocks"]["mlp"]
    (B, T), split = ids_BT.shape, (*ids_BT.shape, cfg.heads, cfg.head_width)
    x_BTD = params["embed"]["token"][ids_BT] + params["embed"]["position"][None, :T]
    for b in range(cfg.blocks):
        q, k, v = ((x_BTD @ attn[name]["kernel"][b] + attn[name]["bias"][b]).reshape(split) for name in "qkv")
        scores = np.einsum("btnh,bsnh->bnts", q, k) / np.float32(cfg.head_width**0.5)
        weights = np.exp(scores - scores.max(-1, keepdims=True)) * (segment_BT > 0)[:, None, None, :]
        z = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v).reshape(B, T, -1)
        x_BTD = x_BTD + z @ attn["out"]["kernel"][b] + attn["out"]["bias"][b]
        hidden = np.maximum(x_BTD @ mlp["in"]["kernel"][b] + mlp["in"]["bias"][b], 0)
        x_BTD = x_BTD + hidden @ mlp["out"]["kernel"][b] + mlp["out"]["bias"][b]
    return x_BTD[..., slice(*compiled.layout.output)]


def said(program, vocab, length, sequences, **settings):
    """What the compiled program says, by the NumPy pass."""
    compiled = compile_program(program, vocab, length, **settings)
    ids_BT, segment_BT = encode(compiled.layout, sequences)
    return decode(numpy_outputs(compiled, ids_BT, segment_BT), segment_BT, compiled.layout)


def same(expected, got):
    return expected is AMBIGUOUS or (got is not AMBIGUOUS and expected == got and type(expected) is type(got))


def assert_agrees(program, vocab, length, sequences):
    """The NumPy pass says what the evaluator says, by clean one-hots."""
    compiled = compile_program(program, vocab, length)
    ids_BT, segment_BT = encode(compiled.layout, sequences)
    logits_BTA = numpy_outputs(compiled, ids_BT, segment_BT)
    rows = decode(logits_BTA, segment_BT, compiled.layout)
    for sequence, row, logits_TA in zip(sequences, rows, logits_BTA, strict=True):
        for t, (expected, got) in enumerate(zip(rasp.evaluate(program, sequence), row, strict=True)):
            assert same(expected, got), (sequence, t, expected, got)
            if expected is not AMBIGUOUS:
                one_hot = np.array([value == expected for value in compiled.layout.values])
                assert np.abs(logits_TA[t + 1] - one_hot).max(initial=0) < 1e-4, (sequence, t)
    return compiled


@cache
def counter(L):
    return compile_program(rasp.counter(), NINE, L)


# --- the paper's two programs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("L, count", [(20, 42_982), (25, 62_867), (45, 179_907), (50, 218_542)])
def test_size_of_the_counter(L, count):
    cfg = counter(L).layout.config
    assert (cfg.width, cfg.mlp_width, cfg.head_width, cfg.blocks, cfg.heads) == (3 * L + 17, 2 * (L + 1), L + 2, 3, 1)
    assert transformer.num_params(counter(L).params) == count


@pytest.mark.parametrize("L, count", [(10, 40_845), (25, 77_580)])
def test_size_of_max_identifier(L, count):
    compiled = compile_program(rasp.max_identifier(), LETTERS, L)
    cfg = compiled.layout.config
    sizes = (cfg.width, cfg.mlp_width, cfg.head_width, cfg.blocks, cfg.heads)
    assert sizes == (2 * L + 59, 2 * (L + 1), max(28, L + 2), 3, 1)
    assert transformer.num_params(compiled.params) == count


def test_parameters_have_the_tree_of_the_transformer():
    params, layout = counter(20)
    fresh = jax.eval_shape(lambda key: transformer.init(key, layout.config), jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fresh) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    blocks = params["blocks"]
    assert all(not leaf["bias"].any() for part in blocks.values() for leaf in part.values())
    # the halves that nothing needs are there and zero: the first block's attention, the last one's MLP
    assert not blocks["attn"]["q"]["kernel"][0].any() and blocks["attn"]["q"]["kernel"][1].any()
    assert not blocks["mlp"]["in"]["kernel"][2].any() and blocks["mlp"]["in"]["kernel"][1].any()


def counter_truth(ids_BT, layout):
    """Index 0 counts the others, index 1 the a's, all else gives 0."""
    there_BT = ids_BT < layout.bos_id
    count_B = (ids_BT == 0).sum(1)
    truth_BT = np.zeros(ids_BT.shape, int)
    truth_BT[:, 1], truth_BT[:, 2] = there_BT.sum(1) - count_B, count_B
    return truth_BT, there_BT


def random_rows(rng, layout, rows):
    """Sequences of all lengths, in each letters at shares of its own, so that all counts are frequent."""
    ids_BT = np.full((rows, layout.length + 1), layout.pad_id, np.int32)
    ids_BT[:, 0] = layout.bos_id
    length_B = rng.integers(0, layout.length + 1, rows)
    share_B = rng.random(rows) ** 0.5
    letters_BT = rng.integers(1, layout.bos_id, (rows, layout.length))
    letters_BT[rng.random(letters_BT.shape) < share_B[:, None]] = 0
    there_BT = np.arange(layout.length)[None] < length_B[:, None]
    ids_BT[:, 1:][there_BT] = letters_BT[there_BT]
    return ids_BT, (ids_BT != layout.pad_id).astype(np.int32)


@pytest.mark.parametrize("L", [20, 45])
def test_counter_is_exact_on_ten_thousand_inputs_and_every_count(L):
    layout = counter(L).layout
    ids_BT, segment_BT = random_rows(np.random.default_rng(L), layout, 10_000)
    for n in range(L + 1):  # and full rows with n a's in front
        ids_BT[n, 1:] = np.where(np.arange(L) < n, 0, 1 + n % 8)
        segment_BT[n] = 1
    truth_BT, there_BT = counter_truth(ids_BT, layout)
    assert set(truth_BT[:, 2]) == set(range(L + 1))
    logits_BTA = outputs(counter(L), ids_BT, segment_BT)
    one_hot_BTA = truth_BT[..., None] == np.arange(L + 1)[None, None]
    assert layout.values == tuple(range(L + 1))
    assert np.abs(logits_BTA - one_hot_BTA)[there_BT].max() < 1e-5


@pytest.mark.parametrize("L", [20, 45])
def test_max_identifier_is_exact_on_ten_thousand_inputs(L):
    compiled = compile_program(rasp.max_identifier(), LETTERS, L)
    rng = np.random.default_rng(L)
    ids_BT, segment_BT = random_rows(rng, compiled.layout, 10_000)
    shift_B = rng.integers(0, 26, len(ids_BT))[:, None]
    ids_BT = np.where(ids_BT < 26, (ids_BT + shift_B) % 26, ids_BT).astype(np.int32)
    there_BT = ids_BT < 26
    smaller_BT = np.stack([((ids_BT < ids_BT[:, t : t + 1]) & there_BT).sum(1) for t in range(L + 1)], axis=1)
    wanted_BT = there_BT & (smaller_BT == 4)
    known_B = there_BT.sum(1) >= 2  # there is an index 1
    assert 0.2 < wanted_BT[known_B].any(1).mean() < 0.9
    token_B = np.where(wanted_BT, ids_BT, 0).max(1)
    one_hot_BA = wanted_BT.any(1)[:, None] & (token_B[:, None] == np.arange(26)[None])
    logits_BTA = outputs(compiled, ids_BT, segment_BT)
    assert compiled.layout.values == tuple(LETTERS)
    assert np.abs(logits_BTA[:, 2] - one_hot_BA)[known_B].max() < 1e-5


def counts_read(L, sharpness=100.0, **settings):
    """The logits at index 1 for 0, 1, ..., L a's in rows of L tokens."""
    compiled = compile_program(rasp.counter(), NINE, L, sharpness=sharpness, **settings)
    ids_BT, segment_BT = encode(compiled.layout, ["a" * n + "b" * (L - n) for n in range(L + 1)])
    return numpy_outputs(compiled, ids_BT, segment_BT)[:, 2]


@pytest.mark.parametrize(
    "L, exactness, wrong",
    [
        (20, 421, {}),
        (20, 419, {20: 19}),
        (45, 2000, {45: 44}),
        (45, 2071, {}),
        (9, 100, {}),
        (10, 100, {10: 9}),
    ],
)
def test_counts_up_to_n_are_right_above_an_exactness_of_n_times_n_plus_one(L, exactness, wrong):
    read = counts_read(L, exactness=exactness).argmax(-1)
    assert {n: m for n, m in enumerate(read) if n != m} == wrong


def test_the_default_exactness_of_tracr_miscounts_from_ten_on():
    read = counts_read(45, exactness=100).argmax(-1)
    assert list(read[:11]) == [*range(10), 9] and read[45] == 31 and all(read[n] < n for n in range(10, 46))


def test_one_hots_are_clean_from_twice_that_exactness_on():
    one_hot = np.eye(21)
    assert np.abs(counts_read(20, exactness=2 * 20 * 21) - one_hot).max() < 1e-3
    assert np.abs(counts_read(20, exactness=1.5 * 20 * 21) - one_hot)[20].max() > 0.1


def test_leaks_are_below_float32_by_default_and_three_percent_at_the_papers_sharpness():
    def leak(compiled):
        ids_BT, segment_BT = encode(compiled.layout, ["b" * 45])
        _, acts = trunk(compiled.params, ids_BT, compiled.layout.config, segment_BT=segment_BT)
        # block 1 counts: index 5 selects nothing but BOS; block 2 reads: BOS sees nothing but itself
        return 1 - acts["pattern"][1, 0, 0, 6, 0], 1 - acts["pattern"][2, 0, 0, 0, 0]

    width, aggregate = leak(counter(45))
    assert width < 2e-7 and aggregate < 2e-7
    width, aggregate = leak(compile_program(rasp.counter(), NINE, 45, sharpness=100.0))
    assert width < 1e-4 and 0.02 < aggregate < 0.04


# --- any program -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(rasp.PROGRAMS))
def test_programs_agree_with_the_evaluator(name):
    """All inputs of up to four tokens, random ones of every length; the model run by JAX."""
    program, vocab, L = rasp.PROGRAMS[name](), "(a)" if name == "balanced" else "abc", 7
    rng = random.Random(0)
    sequences = [*itertools.chain.from_iterable(itertools.product(vocab, repeat=n) for n in range(5))]
    sequences += [rng.choices(vocab, k=n) for n in range(L + 1) for _ in range(16)]
    assert verify(program, compile_program(program, vocab, L), sequences[:256]) == []


@pytest.mark.parametrize("name", ["sort", "reverse", "histogram", "sort_by_frequency"])
def test_programs_agree_at_the_papers_length(name):
    rng = random.Random(1)
    sequences = [rng.choices(NINE, k=n) for n in (1, 2, 19, 20, 20)] + ["a" * 20]
    assert_agrees(rasp.PROGRAMS[name](), NINE, 20, sequences)


POOLS = [(-2, -1, 0, 1, 3), (True, False), ("p", "q", "r"), (0.5, -1.25), (Fraction(1, 3), Fraction(1, 2)),
         ((0, "x"), (1, "y"))]  # fmt: skip
NUMBERS = [(-1, 0, 1), (True, False), (0.5, -1.25), (Fraction(1, 3), Fraction(1, 2)), (0, 5, 100), (3,)]
VOCABULARIES = ["ab", "abcde", (0, 1, 2), (True, False, "x"), (("a", 1), ("b", 2)), (Fraction(1, 2), 3, "z")]
PREDICATES = [operator.eq, operator.ne, lambda key, query: True, lambda key, query: key == query - 1]


def random_table(rng, pool, none):
    """A random function, the same for equal arguments; None where there is to be no value."""
    seed = rng.random()

    def fn(*values):
        own = random.Random(f"{seed}{values!r}")
        return None if own.random() < none else own.choice(pool)

    return fn


def random_program(rng, size):
    sops, selectors = [tokens, indices, Constant(rng.choice([1, True, "c", None, (1, 2)]))], []

    def sop():
        return rng.choice(sops[-4:] if rng.random() < 0.6 else sops)

    def select():
        if rng.random() < 0.3:
            return Select(indices, indices, rng.choice([operator.le, operator.lt, *PREDICATES]))
        return Select(sop(), sop(), random_table(rng, [True] + [False] * rng.choice([1, 3, 8]), 0))

    def selector():
        a, b = (rng.choice(selectors) if selectors and rng.random() < 0.3 else select() for _ in range(2))
        made = rng.choice([a, a, ~a, a & b, a | b, ~(a & b), ~a | b])
        selectors.append(made)
        return made

    for _ in range(size):
        none = rng.choice([0, 0, 0, 0.2, 0.6])
        sops.append(rng.choice([
            lambda: Map(random_table(rng, rng.choice(POOLS), none), sop()),  # noqa: B023
            lambda: SequenceMap(random_table(rng, rng.choice(POOLS), none), sop(), sop()),  # noqa: B023
            lambda: SelectorWidth(selector()),
            lambda: Aggregate(selector(), sop(), default=rng.choice([None, None, 7, "d", Fraction(1, 3)])),
            lambda: Aggregate(
                selector(),
                Map(random_table(rng, rng.choice(NUMBERS), rng.choice([0, 0, 0.1])), sop()),
                default=rng.choice([None, None, 0, "z", Fraction(1, 2)]),
                numeric=True,
            ),
        ])())  # fmt: skip
    return sops[-1]


@pytest.mark.parametrize("part", range(4))
def test_random_programs_agree_with_the_evaluator(part):
    """Thousands of these were run once; a program that the compiler refuses, it refuses in one line."""
    done = 0
    for seed in range(30 * part, 30 * part + 30):
        rng = random.Random(seed)
        vocab, L = tuple(rng.choice(VOCABULARIES)), rng.choice([1, 2, 3, 4, 5, 6, 9])
        program = random_program(rng, rng.randint(1, 9))
        sequences = [rng.choices(vocab, k=rng.randint(0, L)) for _ in range(8)] + [[vocab[0]] * L]
        try:
            assert_agrees(program, vocab, L, sequences)
            done += 1
        except InputError as error:
            assert "\n" not in str(error) and str(error).count(" ") > 5
    assert done >= 27


def test_random_programs_run_by_jax():
    for seed in (2, 5, 9):
        rng = random.Random(seed)
        program = random_program(rng, 8)
        sequences = [rng.choices("abc", k=rng.randint(0, 5)) for _ in range(16)]
        assert verify(program, compile_program(program, "abc", 5), sequences) == []


def test_what_needs_no_computation_is_read_from_the_embedding():
    for program, expected in ((tokens, ["b", "a"]), (indices, [0, 1]), (Constant((1, "x")), [(1, "x")] * 2),
                              (Constant(None), [None] * 2)):  # fmt: skip
        compiled = compile_program(program, "ab", 3)
        assert run(compiled, ["ba", ""]) == [expected, []]
        assert compiled.layout.config.blocks == 1


def test_what_selects_nothing_has_no_value_and_is_never_selected():
    next_one = Aggregate(Select(indices, indices, lambda key, query: key == query + 1), tokens)
    assert said(next_one, "ab", 3, ["abb"]) == [["b", "b", None]]
    same_as_next = Select(tokens, next_one, operator.eq)
    assert said(SelectorWidth(same_as_next), "ab", 3, ["abb"]) == [[2, 2, 0]]
    assert said(SelectorWidth(~same_as_next), "ab", 3, ["abb"]) == [[1, 1, 0]]  # by a negation neither
    filled = Aggregate(Select(indices, indices, lambda key, query: key == query + 1), tokens, default="-")
    assert said(filled, "ab", 3, ["abb", "a"]) == [["b", "b", "-"], ["-"]]
    # the default is a value like others: it can be selected, and BOS never carries it
    assert said(SelectorWidth(Select(filled, Constant("-"), operator.eq)), "ab", 3, ["abb", "ab", ""]) == [
        [1] * 3, [1] * 2, []]  # fmt: skip


def test_means_of_numbers_beyond_zero_and_one_are_exact():
    number = Map({"a": -3, "b": Fraction(1, 2), "c": 2.5}.get, tokens)
    until = Select(indices, indices, operator.le)
    mean = Aggregate(until, number, numeric=True)
    expected = [-3, Fraction(-5, 4), 0, Fraction(1, 8)]
    compiled = assert_agrees(mean, "abc", 6, ["abcb", "cccccc", "aaaaaa", "bacbac"])
    assert said(mean, "abc", 6, ["abcb"]) == [expected]
    assert all(type(value) in (int, Fraction) for value in compiled.layout.values)
    nobody = Aggregate(Select(tokens, tokens, lambda key, query: False), number, default=99, numeric=True)
    assert said(nobody, "abc", 2, ["ab"]) == [[99, 99]]
    # indices select one key at most: as many means as numbers
    shifted = Aggregate(Select(indices, indices, lambda key, query: key == query - 1), number, numeric=True)
    assert compile_program(shifted, "abc", 40).layout.values == (-3, Fraction(1, 2), Fraction(5, 2))

    # but where one query selects them all, all means of them
    first = Aggregate(Select(indices, indices, lambda key, query: query == 0), number, numeric=True)
    assert said(first, "abc", 4, ["abcb"]) == [[Fraction(1, 8), None, None, None]]


def test_a_copied_one_hot_never_exceeds_one():
    """More would fire the pairs of that value with all others: relu(x + y - 1)."""
    compiled = compile_program(Aggregate(EVERY, tokens), "ab", 45)
    logits_BTA = outputs(compiled, *encode(compiled.layout, ["a" * n for n in range(1, 46)]))
    assert 1 - 1e-5 < logits_BTA[:, 1, 0].min() and logits_BTA[:, 1, 0].max() < 1


def test_two_values_at_once_are_ambiguous_and_named_so():
    program = Aggregate(EVERY, tokens)
    assert said(program, "abc", 6, ["ab", "aa", "abcabc"]) == [[AMBIGUOUS] * 2, ["a"] * 2, [AMBIGUOUS] * 6]


def test_a_node_is_compiled_once_and_heads_of_one_depth_share_a_block():
    width = SelectorWidth(Select(tokens, tokens, operator.eq), "width")
    twice, other = width + width, SelectorWidth(Select(tokens, tokens, operator.lt), "other")
    layout = compile_program(twice, "abc", 4).layout
    assert (layout.config.heads, layout.config.blocks) == (1, 2)
    assert sum(name.startswith("width:") for name in layout.basis) == 6  # 1/(n+1) and the counts 0 to 4
    layout = compile_program(width - other, "abc", 4).layout
    assert (layout.config.heads, layout.config.blocks) == (2, 2)
    both = Select(tokens, tokens, operator.eq) & Select(indices, indices, operator.le)
    joined = SelectorWidth(both) + SelectorWidth(~both)  # one pair of keys and queries for the two
    basis = compile_program(joined, "abc", 4).layout.basis
    assert sum(name.startswith("(tokens, indices)") for name in basis) == 12


def test_the_basis_names_what_the_residual_stream_holds():
    params, layout = counter(20)
    ids_BT, segment_BT = encode(layout, ["aabc"])
    _, acts = trunk(params, ids_BT, layout.config, segment_BT=segment_BT)
    assert len(layout.basis) == len(set(layout.basis)) == layout.config.width

    def lit(depth, t):
        return {layout.basis[d] for d in np.flatnonzero(np.abs(acts["resid"][depth, 0, t]) > 1e-3)}

    assert lit(0, 0) == {"tokens:BOS", "one"} and lit(0, 1) == {"tokens:a", "indices:0", "one"}
    assert lit(1, 3) - lit(0, 3) == {"is a:False"}
    assert lit(2, 2) - lit(1, 2) == {"count:2", "count:1/(n+1)"}
    assert lit(3, 2) - lit(2, 2) == {"output:2"}
    assert [layout.basis[d] for d in range(*layout.output)] == [f"output:{n}" for n in range(21)]


# --- the compiled model ----------------------------------------------------------------------------------------------


def test_logits_jit_vmap_and_differentiate():
    params, layout = counter(20)
    ids_BT, segment_BT = encode(layout, ["abca", "bb"])
    logits_BTA = outputs(counter(20), ids_BT, segment_BT)
    np.testing.assert_array_equal(logits_of(params, ids_BT, segment_BT, layout, position=2), logits_BTA[:, 2])
    bank = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    bank["embed"]["token"] = bank["embed"]["token"].at[1].set(0.0)

    def loss(params):
        logits_BA = output_logits(params, ids_BT, segment_BT, layout, position=2)
        return -jax.nn.log_softmax(logits_BA)[0, 2], logits_BA

    (_, both), gradient = jax.jit(jax.vmap(jax.value_and_grad(loss, has_aux=True)))(bank)
    np.testing.assert_allclose(both[0], logits_BTA[:, 2], atol=1e-5)
    assert np.abs(both[1] - both[0]).max() > 0.5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert gradient["blocks"]["mlp"]["out"]["kernel"][0].any()


def test_checkpoints_round_trip_and_open_as_any_transformer(tmp_path):
    values = ("a", 3, True, 0.5, Fraction(2, 7), ("x", (Fraction(1, 3), False)), -(2**70))
    program = Map(dict(zip(range(7), values, strict=True)).get, indices, "odd")
    compiled = compile_program(program, ("t", 0, Fraction(1, 2), ("p", True)), 7)
    compiler.save(tmp_path / "model", compiled, step=3, extra={"seed": 5})
    again = compiler.load(tmp_path / "model")
    assert again.layout == compiled.layout and hash(again.layout) == hash(compiled.layout)
    assert list(map(type, again.layout.values)) == list(map(type, compiled.layout.values))
    jax.tree.map(np.testing.assert_array_equal, again.params, compiled.params)
    assert run(again, [["t", ("p", True)]]) == [[values[0], values[1]]]
    params, cfg, stored = checkpoint.load_transformer(tmp_path / "model")
    assert cfg == compiled.layout.config and stored.step == 3 and stored.extra["seed"] == 5
    checkpoint.save(tmp_path / "plain", params, kind="transformer", config=stored.config)
    with pytest.raises(InputError, match="plain holds a transformer that was not compiled"):
        compiler.load(tmp_path / "plain")
    odd = compile_program(Map(lambda token: frozenset(token), tokens), "ab", 2)
    with pytest.raises(InputError, match="frozenset"):
        compiler.save(tmp_path / "odd", odd)


def test_verify_shows_where_a_model_is_wrong():
    program = rasp.counter()
    wrong = compile_program(program, "ab", 12, exactness=100.0)
    (found,) = verify(program, wrong, ["ab", "a" * 12])
    assert (found.sequence, found.position, found.expected) == (("a",) * 12, 1, 12)
    assert found.got is AMBIGUOUS or found.got < 12


def one_line(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 300, text
    for word in words:
        assert word in text, text


def bad(program, *words, vocab="abc", length=5, **settings):
    one_line(lambda: compile_program(program, vocab, length, **settings), *words)


def test_programs_that_cannot_be_compiled_are_refused_by_name():
    bad(Map(lambda token: 1 / 0, tokens, "ratio"), "ratio", "'a'", "ZeroDivisionError")
    bad(Aggregate(EVERY, tokens, numeric=True, name="average"), "average", "'a'", "no number")
    bad(Map(lambda token: [token], tokens, "boxed"), "boxed", "hashable")
    bad(SelectorWidth(Select(tokens, indices, operator.lt, "mixed")), "mixed", "TypeError")
    huge = SequenceMap(lambda x, y: (x, y), Map(lambda i: i, indices), indices, "square")
    bad(huge, "square", "200 x 200 = 40,000", "16,384", length=200)
    numbers = Map({"a": 1, "b": 1000, "c": 10**6}.get, tokens)
    bad(Aggregate(EVERY, numbers, numeric=True, name="spread"), "spread", "4,096 different means", length=40)
    pairs = Select(tokens, tokens, operator.eq) & Select(indices, indices, operator.le)
    bad(SelectorWidth(pairs.named("early")), "early", "4,096", vocab=range(100), length=50)
    bad(SelectorWidth(EVERY, name="width"), "width", "float32", length=400)
    bad(Map(lambda token: 1 if token == "a" else True, tokens, "mixture"), "mixture", "1 and True")
    bad(Aggregate(EVERY, indices, numeric=True, name="far"), "far", "4,096", length=100)
    level = Map(lambda token: ord(token), tokens)
    for _ in range(12):  # rounding doubles with every sum
        level = Map(lambda x: x % 3, level + Aggregate(EVERY, level), "level")
    bad(SelectorWidth(Select(level, level, operator.eq), "width"), "rounding", length=100)
    bad(tokens, "length", "4,096", length=10**9)
    bad(tokens, "vocabulary", "4,096", vocab=range(5000))
    cyclic = Map(lambda value: value, tokens, "ring")
    object.__setattr__(cyclic, "x", cyclic)
    bad(cyclic, "ring", "cycle")
    bad(EVERY, "selector")


def test_bad_vocabularies_and_settings_are_refused():
    bad(tokens, "empty", vocab="")
    bad(tokens, "'a' and 'a'", vocab="aba")
    bad(tokens, "1 and True", vocab=(1, True))
    bad(tokens, "None", vocab=("a", None))
    bad(tokens, "hashable", vocab=(["a"],))
    bad(tokens, "nan", vocab=(float("nan"),))
    for length in (0, -3, 2.5, "5", True):
        bad(tokens, "length", length=length)
    for value in (0, -1.0, float("inf"), "x"):
        bad(tokens, "exactness", exactness=value)
        bad(tokens, "sharpness", sharpness=value)


def test_bad_sequences_are_refused_by_number_and_position():
    layout = compile_program(tokens, "ab", 3).layout
    one_line(lambda: encode(layout, ["ab", "axb"]), "sequence 1", "'x'", "position 1", "a, b")
    one_line(lambda: encode(layout, ["abab"]), "sequence 0", "4 tokens", "3")
    one_line(lambda: encode(layout, [[["a"]]]), "['a']", "position 0")
    one_line(lambda: encode(compile_program(tokens, (0, 1), 3).layout, [[0, True]]), "True", "position 1")
    ids_BT, segment_BT = encode(layout, [np.array(["a", "b"]), ""])
    assert ids_BT.tolist() == [[2, 0, 1, 3], [2, 3, 3, 3]] and segment_BT.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


# --- Tracr -----------------------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("name, vocab, L", [("counter", NINE, 12), ("max_identifier", LETTERS, 10)])
def test_tracr_compiles_the_same_model(name, vocab, L):
    """Sizes, and every residual stream as a multiset of numbers, where Tracr's default exactness miscounts too."""
    compiling = pytest.importorskip("tracr.compiler.compiling")
    theirs = pytest.importorskip("tracr.rasp.rasp")
    if name == "counter":
        wanted, x = theirs.Map(lambda token: token == "a", theirs.tokens), None
    else:
        smaller = theirs.SelectorWidth(theirs.Select(theirs.tokens, theirs.tokens, theirs.Comparison.LT))
        wanted, x = theirs.Map(lambda count: count == 4, smaller), theirs.tokens
    chosen = theirs.Select(wanted, theirs.indices, theirs.Comparison.EQ)
    if x is None:
        x, chosen = theirs.SelectorWidth(chosen), theirs.Select(theirs.indices, theirs.indices, theirs.Comparison.EQ)
    model = compiling.compile_rasp_to_model(
        theirs.Aggregate(chosen, x), set(vocab), L, compiler_bos="BOS", compiler_pad="PAD"
    )
    compiled = compile_program(rasp.PROGRAMS[name](), vocab, L, exactness=100.0, sharpness=100.0)
    cfg = compiled.layout.config
    assert len(model.residual_labels) == cfg.width
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == transformer.num_params(compiled.params)
    rng = random.Random(0)
    sequences = [rng.choices(vocab[: 2 + 2 * i], k=L) for i in range(8)] + ["a" * L]
    ids_BT, segment_BT = encode(compiled.layout, sequences)
    _, acts = trunk(compiled.params, ids_BT, cfg, segment_BT=segment_BT)
    logits_BTA = outputs(compiled, ids_BT, segment_BT)
    for row, sequence in enumerate(sequences):
        out = model.apply(["BOS", *sequence])
        streams = np.stack([out.input_embeddings[0], *(residual[0] for residual in out.residuals[1::2])])
        ours = np.asarray(acts["resid"][:, row])
        np.testing.assert_allclose(np.sort(ours), np.sort(streams), atol=2e-4)
        assert [compiled.layout.values[i] for i in logits_BTA[row, 1:].argmax(-1)] == out.decoded[1:]
