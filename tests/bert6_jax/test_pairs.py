"""Pairs for attribution: the three file formats, rows by hand, partners against all matchings, halves, bad input."""

from __future__ import annotations

import gzip
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax.data import pairs
from bert6_jax.data.pairs import (
    PairText,
    SentenceText,
    encode_pairs,
    encode_sentences,
    masked_copies,
    read_pairs,
    read_sentences,
    sentence_scores,
    split_pairs,
)
from bert6_jax.data.tokenizer import SPECIALS, load_tokenizer, wordpiece
from bert6_jax.errors import InputError

WORDS = "the dog dogs cat cats near has have is are . , so and went to gave amy bob cal her his sleep ##s".split()
TOKENIZER = wordpiece([*SPECIALS, *WORDS])
ID = {token: i for i, token in enumerate(TOKENIZER.tokens)}
CIRCUITS = [
    {"clean_prefix": "The dog", "patch_prefix": "The dogs", "clean_answer": " has", "patch_answer": " have",
     "case": "singular"},
    {"clean_prefix": "The cats near the dog", "patch_prefix": "The cat near the dog", "clean_answer": " are",
     "patch_answer": " is", "case": "plural"},
]  # fmt: skip
IOI = "So, Amy and Bob went to the cat. {} gave the dog to"


def ids(text: str) -> list[int]:
    return [ID[word] for word in text.split()]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def blimp(prefix, good, bad, rest=".", **more):
    return {
        "sentence_good": f"{prefix} {good}{rest}", "sentence_bad": f"{prefix} {bad}{rest}",
        "one_prefix_prefix": prefix, "one_prefix_word_good": good, "one_prefix_word_bad": bad, "UID": "u", **more,
    }  # fmt: skip


def ioi_csv(*subjects):
    rows = [
        f'7,"{IOI.format(s)}","{IOI.format("Cal")}","{IOI.format({"Amy": "Bob", "Bob": "Amy"}[s])}",1,2\n'
        for s in subjects
    ]
    return ",clean,corrupted,corrupted_hard,correct_idx,incorrect_idx\n" + "".join(rows)


# --- readers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a", "a.json.gz"])
def test_feature_circuits_whatever_the_file_is_called(tmp_path, name):
    path = tmp_path / name
    data = "\n" + "".join(json.dumps(row) + "\n\n" for row in [*CIRCUITS, {**CIRCUITS[0], "case": 3}])
    path.write_bytes(gzip.compress(data.encode()) if name.endswith(".gz") else data.encode())
    read = read_pairs(path)
    assert read[0] == PairText("The dog", "The dogs", "has", "have", "singular", f"{path}:2", "")
    assert read[1][:5] == ("The cats near the dog", "The cat near the dog", "are", "is", "plural")
    assert (read[2].case, read[2].where, len(read)) == ("3", f"{path}:6", 3)


def test_case_may_be_left_out(tmp_path):
    row = {k: v for k, v in CIRCUITS[0].items() if k != "case"}
    assert read_pairs(write_jsonl(tmp_path / "a", [row]))[0].case == "all"


def test_blimp_one_prefix(tmp_path):
    rows = [
        blimp("The dog", "has", "have", " gone."),
        {**blimp("The dogs", "have", "has"), "sentence_bad": "The dogs has it ."},  # not the same rest
        {**blimp("The dogs", "have", "has"), "sentence_good": "Dogs have .", "sentence_bad": "Dogs has ."},
    ]
    path = write_jsonl(tmp_path / "b", rows)
    assert read_pairs(path)[0] == PairText("The dog", None, "has", "have", "u", f"{path}:1", "gone.")
    assert [row.tail for row in read_pairs(path)] == ["gone.", "", ""]
    assert read_sentences(path)[0] == SentenceText("The dog has gone.", "The dog have gone.", "u", f"{path}:1")


def test_two_prefix_paradigms_are_sentence_pairs(tmp_path):
    row = {"sentence_good": "The dogs sleep.", "sentence_bad": "The dog sleep.", "two_prefix_word": "sleep"}
    path = write_jsonl(tmp_path / "b", [row])
    assert read_sentences(path) == [SentenceText("The dogs sleep.", "The dog sleep.", "all", f"{path}:1")]
    with pytest.raises(InputError, match=r"b:1: no field 'one_prefix_prefix', .*use read_sentences"):
        read_pairs(path)


def test_ioi_names_come_from_the_text(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text(ioi_csv("Amy", "Bob"))
    hard, other = read_pairs(path), read_pairs(path, patch="corrupted")
    assert hard[0] == PairText(
        IOI.format("Amy"), IOI.format("Bob"), "Bob", "Amy", "subject first", f"{path}:2"
    )  # the column of ids is not looked at
    assert hard[1][:5] == (IOI.format("Bob"), IOI.format("Amy"), "Amy", "Bob", "subject second")
    assert [row.patch for row in other] == [IOI.format("Cal")] * 2
    assert [row[2:] for row in other] == [row[2:] for row in hard]


def test_ioi_names_are_whole_words(tmp_path):
    path = tmp_path / "x"
    clean = "Then, Ann and Anna came with Annabel and Joe; Anna gave it to"
    path.write_text(f'clean,corrupted_hard\n"{clean}","{clean.replace("Anna gave", "Ann gave")}"\n')
    assert read_pairs(path)[0][2:5] == ("Ann", "Anna", "subject second")


@pytest.mark.parametrize(
    "text, line",
    [
        ("", r"x: the file is empty; give"),
        (" \n\n", r"x: the file is empty"),
        ('{"a": 1, "b": 2}\n', r"x: no known set of pairs \(fields: 'a', 'b'\); give JSON lines with clean_prefix"),
        ("[]\n", r"x:1: a JSON array, not an object; write one pair a line"),
        ('{"clean_prefix": \n', r"x:1: not JSON"),
        ("clean,corrupted,label\n", r"x: a header and no rows"),
        ("a,b\n1,2\n", r"x: no known set of pairs \(fields: 'a', 'b'\)"),
        ("x" * 200_000, r"x: no known set of pairs \(fields: none\)"),
        ("clean,corrupted,label\na,b,c\n", r"x:2: no field 'corrupted_hard' \(there: 'clean', 'corrupted', 'label'\)"),
        ("clean,corrupted_hard\n\na,b,c\n", r"x:3: 3 fields, the header has 2; put text that holds a comma in quotes"),
        ('clean,corrupted_hard\n"a"b,c\n', r"x:2: not CSV .*repair the quotes"),
        ("clean,corrupted_hard\nno names,b\n", r"x:2: field 'clean' has no two names 'X and Y' of which one occurs"),
        ("clean,corrupted_hard\nAl and Bo. Bo to,Al and Bo. Bo to\n",
         r"x:2: field 'corrupted_hard' does not have 'Al' twice and 'Bo' once; repair or delete the row"),
        ("clean,corrupted_hard\nAl and Bo. Bo to,\n", r"x:2: field 'corrupted_hard' is empty; fill it"),
        (json.dumps(CIRCUITS[0]) + '\n{"clean_prefix": "a"}\n', r"x:2: no field 'patch_prefix' \(there: 'clean_pre"),
        (json.dumps({**CIRCUITS[0], "patch_answer": 3}), r"x:1: field 'patch_answer' is a JSON number, not a string"),
        (json.dumps({**CIRCUITS[0], "clean_prefix": "\ud800"}), r"x:1: field 'clean_prefix' holds half of a surrogate"),
        (json.dumps({**CIRCUITS[0], "clean_answer": " "}), r"x:1: field 'clean_answer' is empty"),
    ],
)  # fmt: skip
def test_bad_files_get_one_line(tmp_path, text, line):
    (tmp_path / "x").write_text(text)
    with pytest.raises(InputError, match=line) as error:
        read_pairs(tmp_path / "x")
    assert "\n" not in str(error.value)


def test_other_bad_calls(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_pairs(tmp_path / "nothing")
    with pytest.raises(InputError, match="patch column 'clean'; give corrupted_hard or corrupted"):
        read_pairs(tmp_path / "nothing", patch="clean")
    with pytest.raises(InputError, match="not BLiMP .*use read_pairs"):
        read_sentences(write_jsonl(tmp_path / "a", CIRCUITS))


# --- rows ------------------------------------------------------------------------------------------------------------


def rows_of(tmp_path, rows):
    return read_pairs(write_jsonl(tmp_path / "a", rows))


def test_causal_rows_by_hand(tmp_path):
    task = encode_pairs(TOKENIZER, rows_of(tmp_path, CIRCUITS), "sva")
    np.testing.assert_array_equal(
        task.clean_NT, [ids("[CLS] the dog [PAD] [PAD] [PAD]"), ids("[CLS] the cats near the dog")]
    )
    np.testing.assert_array_equal(
        task.patch_NT, [ids("[CLS] the dogs [PAD] [PAD] [PAD]"), ids("[CLS] the cat near the dog")]
    )
    np.testing.assert_array_equal(task.segment_NT, [[1, 1, 1, 0, 0, 0], [1] * 6])
    np.testing.assert_array_equal(task.position_N, [2, 5])
    np.testing.assert_array_equal(task.right_N, ids("has are"))
    np.testing.assert_array_equal(task.wrong_N, ids("have is"))
    assert task.cases == ("plural", "singular") and task.case_N.tolist() == [1, 0]
    assert (task.name, task.masked, task.patched, task.dropped) == ("sva", False, True, {})
    arrays = [value for value in task if isinstance(value, np.ndarray)]
    assert len(arrays) == 7 and all(value.dtype == np.int32 for value in arrays)


def test_masked_rows_by_hand(tmp_path):
    rows = [row._replace(tail="so sleep .") for row in rows_of(tmp_path, CIRCUITS[:1])]
    point = encode_pairs(TOKENIZER, rows, "sva", masked=True)
    own = encode_pairs(TOKENIZER, rows, "sva", masked=True, tail=None)
    none = encode_pairs(TOKENIZER, rows, "sva", masked=True, tail="")
    default = encode_pairs(TOKENIZER, rows_of(tmp_path, CIRCUITS[:1]), "sva", masked=True, tail=None, length=8)
    assert point.clean_NT.tolist() == [ids("[CLS] the dog [MASK] . [SEP]")]
    assert point.patch_NT.tolist() == [ids("[CLS] the dogs [MASK] . [SEP]")]
    assert own.patch_NT.tolist() == [ids("[CLS] the dogs [MASK] so sleep . [SEP]")]
    assert none.clean_NT.tolist() == [ids("[CLS] the dog [MASK] [SEP]")]
    assert default.clean_NT.tolist() == [ids("[CLS] the dog [MASK] . [SEP] [PAD] [PAD]")]
    assert default.segment_NT.tolist() == [[1] * 6 + [0] * 2]
    for task in (point, own, none, default):
        assert task.masked and task.clean_NT[0, task.position_N[0]] == TOKENIZER.mask_id


def text_of(clean, patch, right="has", wrong="have", case="c", where="f:1"):
    return PairText(clean, patch, right, wrong, case, where)


GOOD = text_of("the dog", "the dogs")
MISFITS = {
    "answer not one token": (
        text_of("the dog", "the dogs", right="sleeps"),
        r"t: f:1: answer 'sleeps' is not one token of the vocabulary but 2 tokens \(sleep ##s\); give another vocab",
    ),
    "answers alike": (
        text_of("the dog", "the dogs", wrong="Has"),
        "t: f:1: answers 'has' and 'Has' are the same token",
    ),
    "different length": (
        text_of("the dog", "the dogs dogs"),
        "t: f:1: the clean prefix has 2 tokens and the patched one 3; give",
    ),
    "prefixes alike": (text_of("the zebra", "the zebras"), "t: f:1: the clean and the patched prefix have the same"),
    "too long": (text_of("the dog near the dog", "the cat near the dog"), "t: f:1: 6 positions, rows have 5; give"),
    "no partner": (text_of("the dog", None), "t: f:1: no row left with 'have' as the right answer, 'has' as the wrong"),
}


@pytest.mark.parametrize("reason", MISFITS)
def test_misfits_are_counted_or_refused(reason):
    bad, line = MISFITS[reason]
    task = encode_pairs(TOKENIZER, [bad, GOOD, bad], "t", length=5, unique=False)
    assert task.dropped == {reason: 2} and task.texts == (GOOD,)
    with pytest.raises(InputError, match=line):
        encode_pairs(TOKENIZER, [GOOD, bad], "t", length=5, strict=True)
    with pytest.raises(InputError, match=f"t: none of 2 pairs is left, the first: {line.removeprefix('t: ')}") as error:
        encode_pairs(TOKENIZER, [bad, bad._replace(where="f:2")], "t", length=5)
    assert "\n" not in str(error.value)


def test_unknown_answers_and_the_most_frequent_reason():
    unknown = text_of("the dog", "the dogs", wrong="zebra", where="f:9")
    rows = [MISFITS["prefixes alike"][0], unknown, unknown._replace(where="f:10")]
    line = (
        "none of 3 pairs is left, the first: f:9: answer 'zebra' is not one token of the vocabulary but unknown to it"
    )
    with pytest.raises(InputError, match=line):
        encode_pairs(TOKENIZER, rows, "t")
    with pytest.raises(InputError, match="t: no pairs; give a file with some in it"):
        encode_pairs(TOKENIZER, [], "t")


def test_repeated_pairs():
    other = GOOD._replace(right="is", wrong="are")
    same = GOOD._replace(clean="The  DOG", where="f:3")
    task = encode_pairs(TOKENIZER, [GOOD, other, same], "t", strict=True)
    assert task.texts == (GOOD, other) and task.dropped == {"repeated": 1}
    assert encode_pairs(TOKENIZER, [GOOD, other, same], "t", unique=False).texts == (GOOD, other, same)


def test_a_tokenizer_that_counts_the_space_into_the_word():
    """Byte-level BPE: " has" is a token and "has" is not; the answer is read behind its prefix."""
    import tokenizers

    from bert6_jax.data.tokenizer import _wrap

    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    chars = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    space = "\u0120"
    merges = [("a", "s"), ("h", "as"), (space, "has"), ("i", "s"), (space, "is"), ("a", "b"), ("c", "d")]
    vocab = {token: i for i, token in enumerate([*SPECIALS, *chars, *("".join(pair) for pair in merges)])}
    rust = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token="[UNK]"))
    rust.pre_tokenizer = byte_level
    rust.add_special_tokens(list(SPECIALS))
    task = encode_pairs(_wrap(rust, "bpe"), [text_of("ab", "cd", wrong="is")], "t")
    assert task.right_N.tolist() == [vocab[space + "has"]] and task.wrong_N.tolist() == [vocab[space + "is"]]
    assert task.clean_NT.tolist() == [[vocab["[CLS]"], vocab["ab"]]]


def test_limits_are_nested_random_and_in_order():
    words = ["dog", "dogs", "cat", "cats", "near", "so", "and", "went"]
    rows = [text_of(f"the {a} {b}", f"so {a} {b}", where=f"{a} {b}") for a, b in itertools.permutations(words, 2)]
    whole = encode_pairs(TOKENIZER, rows, "t")
    few, more, other = (encode_pairs(TOKENIZER, rows, "t", limit=n, seed=s) for n, s in ((9, 0), (20, 0), (9, 1)))
    places = [[whole.texts.index(text) for text in task.texts] for task in (few, more, other)]
    assert [len(place) for place in places] == [9, 20, 9]
    assert all(place == sorted(place) for place in places)
    assert set(places[0]) < set(places[1]) and places[0] != places[2]
    np.testing.assert_array_equal(few.clean_NT, whole.clean_NT[places[0]])
    assert encode_pairs(TOKENIZER, rows, "t", limit=10**6).texts == whole.texts


@pytest.mark.parametrize(
    "options, line",
    [
        ({"limit": 0}, "limit is 0; give 1 or more"),
        ({"seed": -1}, "seed is -1; give 0 or more"),
        ({"without_patch": "mean"}, "without_patch='mean'; give partner or clean"),
    ],
)
def test_settings_out_of_range(options, line):
    with pytest.raises(InputError, match=line):
        encode_pairs(TOKENIZER, [GOOD], "t", **options)


# --- partners --------------------------------------------------------------------------------------------------------


def test_partners_share_as_many_tokens_as_any_matching():
    rng = np.random.default_rng(0)
    nouns, links = ["dog", "dogs", "cat", "cats"], ["near", "so", "and"]

    every = [" ".join(words) for words in itertools.product(nouns, links, nouns, links)]

    ours = [text_of(f"the {every[i]}", None, where=f"a{i}") for i in rng.choice(len(every), 4, replace=False)]
    theirs = [
        text_of(f"her {every[i]}", None, "have", "has", where=f"b{i}") for i in rng.choice(len(every), 6, replace=False)
    ]
    other = [text_of("the dog", None, "is", "are", where="c")]
    task = encode_pairs(TOKENIZER, [*ours, *other, *theirs], "t")
    assert task.patched and task.dropped == {"no partner": 3} and len(task.texts) == 8

    def shared(a, b):
        return sum(x == y for x, y in zip(a.split(), b.split(), strict=True))

    best = max(
        sum(shared(a.clean, theirs[j].clean) for a, j in zip(ours, chosen, strict=True))
        for chosen in itertools.permutations(range(6), 4)
    )
    found = {text.clean: text.patch for text in task.texts}
    assert all(found[patch] == clean for clean, patch in found.items())  # mutual
    assert sum(shared(clean, patch) for clean, patch in found.items()) == 2 * best
    for n, text in enumerate(task.texts):
        partner = [t.clean for t in task.texts].index(text.patch)
        np.testing.assert_array_equal(task.patch_NT[n], task.clean_NT[partner])
        assert task.wrong_N[n] == task.right_N[partner] and task.right_N[n] == task.wrong_N[partner]


def test_without_partner_the_clean_row_stands_for_the_patch():
    rows = [text_of("the dog", None), text_of("the dog", None, "is", "are")]
    task = encode_pairs(TOKENIZER, rows, "t", without_patch="clean", strict=True)
    assert not task.patched and task.texts == tuple(rows)
    np.testing.assert_array_equal(task.patch_NT, task.clean_NT)


# --- halves ----------------------------------------------------------------------------------------------------------


def prefixes(task):
    end_N = task.position_N + (not task.masked)
    return {tuple(row[n, :end]) for row in (task.clean_NT, task.patch_NT) for n, end in enumerate(end_N)}


@pytest.mark.parametrize("masked", [False, True])
def test_halves_share_no_prefix_and_are_stratified(masked):
    nouns = ["dog", "cat", "zoo", "amy", "bob", "cal", "her", "his"]
    tokenizer = wordpiece([*SPECIALS, *WORDS, "zoo"])
    rows = [
        PairText(f"{a} {b} near", f"{a} {b} so", *answers, case, f"{a}{b}", tail)
        for i, (a, b) in enumerate(itertools.permutations(nouns, 2))
        for case in (("left", "middle", "right")[i % 3],)
        # Every prefix comes twice, with other answers; of a masked row the rest of the sentence is no prefix.
        for answers, tail in ((("has", "have"), "."), (("is", "are"), ", so"))
    ]
    task = encode_pairs(tokenizer, rows, "t", masked=masked, tail=None)
    assert len(task.texts) == 112
    first, second = split_pairs(task, 3)
    assert not prefixes(first) & prefixes(second)
    assert sorted((*first.texts, *second.texts)) == sorted(task.texts)
    for case in range(3):
        counts = [int((half.case_N == case).sum()) for half in (first, second)]
        assert abs(counts[0] - counts[1]) <= 2, counts  # one group
    for half in (first, second):
        again = encode_pairs(tokenizer, half.texts, "t", masked=masked, tail=None, length=task.clean_NT.shape[1])
        for field in ("clean_NT", "patch_NT", "segment_NT", "position_N", "right_N", "wrong_N"):
            np.testing.assert_array_equal(getattr(half, field), getattr(again, field), err_msg=field)
        assert [half.cases[c] for c in half.case_N] == [text.case for text in half.texts]
    same, _ = split_pairs(task, 3)
    other, _ = split_pairs(task, 4)
    assert same.texts == first.texts != other.texts


def test_prefixes_over_others_stay_together():
    """a-b and b-c hang together though a and c have nothing in common; d-e is the other half, whatever the seed."""
    a, b, c, d, e = (f"the {noun}" for noun in ("dog", "dogs", "cat", "cats", "bob"))
    task = encode_pairs(TOKENIZER, [text_of(a, b), text_of(d, e), text_of(c, b)], "t")
    halves = {tuple(text.clean for text in split_pairs(task, seed)[0].texts) for seed in range(20)}
    assert halves == {(a, c), (d,)}  # the coin falls on both sides
    with pytest.raises(InputError, match="t: the 2 pairs share their prefixes"):
        split_pairs(pairs.take_pairs(task, np.array([0, 2])), 0)
    with pytest.raises(InputError, match="seed is -2"):
        split_pairs(task, -2)


# --- sentence pairs --------------------------------------------------------------------------------------------------


def test_sentence_rows_and_scores_by_hand():
    rows = [
        SentenceText("the dogs sleep .", "the dog sleep .", "x", "f:1"),
        SentenceText("the dog sleeps", "the dog zebra", "y", "f:2"),
        SentenceText("the zebra", "the zoo", "y", "f:3"),
        SentenceText("The dogs sleep.", "the dog sleep .", "x", "f:4"),
        SentenceText("the dog near the dog and the cat", "the dog", "x", "f:5"),
    ]
    task = encode_sentences(TOKENIZER, rows, "b", length=7)
    assert task.dropped == {"sentences alike": 1, "repeated": 1, "too long": 1}
    assert task.ids_2NT.tolist() == [
        [ids("[CLS] the dogs sleep . [SEP] [PAD]"), ids("[CLS] the dog sleep ##s [SEP] [PAD]")],
        [ids("[CLS] the dog sleep . [SEP] [PAD]"), ids("[CLS] the dog [UNK] [SEP] [PAD] [PAD]")],
    ]
    np.testing.assert_array_equal(task.segment_2NT, task.ids_2NT != TOKENIZER.pad_id)
    np.testing.assert_array_equal(
        task.score_2NT, ~np.isin(task.ids_2NT, [TOKENIZER.pad_id, TOKENIZER.cls_id, TOKENIZER.sep_id])
    )
    logits = np.random.default_rng(0).normal(size=(2, 2, 7, TOKENIZER.vocab_size)).astype(np.float32)
    for side in (0, 1):
        score = jax.jit(sentence_scores)(*(jnp.asarray(x[side]) for x in (logits, task.ids_2NT, task.score_2NT)))
        for n in range(2):
            expected = 0.0
            for t in range(1, int(task.segment_2NT[side, n].sum()) - 1):
                p = np.exp(logits[side, n, t - 1].astype(np.float64))
                expected += np.log(p[task.ids_2NT[side, n, t]] / p.sum())
            np.testing.assert_allclose(score[n], expected, rtol=1e-5)
    with pytest.raises(InputError, match="b: none of 1 sentence pairs is left, the first: f:3: both have the same"):
        encode_sentences(TOKENIZER, rows[2:3], "b")
    assert encode_sentences(TOKENIZER, rows, "b", limit=1).texts[0] in rows


def test_masked_copies_by_hand():
    row = np.array([ids("[CLS] the dog [SEP]"), ids("[CLS] cat [SEP] [PAD]")], np.int32)
    score = np.array([[0, 1, 1, 0], [0, 1, 0, 0]], bool)
    copies, of, position = masked_copies(row, score, TOKENIZER.mask_id)
    assert copies.tolist() == [
        ids("[CLS] [MASK] dog [SEP]"), ids("[CLS] the [MASK] [SEP]"), ids("[CLS] [MASK] [SEP] [PAD]"),
    ]  # fmt: skip
    assert of.tolist() == [0, 0, 1] and position.tolist() == [1, 2, 1]
    assert row[0].tolist() == ids("[CLS] the dog [SEP]")  # untouched


# --- the public files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(shared_data):
    if not (shared_data / "sva_feature_circuits").is_dir():
        pytest.skip("no sets of pairs among the development data")
    return shared_data, load_tokenizer(shared_data / "bert_vocab")


@pytest.mark.parametrize("name, rows, unequal", [("nounpp_test", 480, 48), ("simple_train", 480, 43)])
def test_real_feature_circuits(real, name, rows, unequal):
    folder, tokenizer = real
    path = folder / "sva_feature_circuits" / f"{name}.jsonl"
    raw = [json.loads(line) for line in path.read_text().splitlines()]
    task = encode_pairs(tokenizer, read_pairs(path), name, unique=False)
    assert len(raw) == rows and task.dropped == {"different length": unequal}
    texts = {(r["clean_prefix"], r["patch_prefix"], r["clean_answer"].strip(), r["patch_answer"].strip()) for r in raw}
    assert len(task.texts) == rows - unequal and {text[:4] for text in task.texts} < texts
    for n in range(0, len(task.texts), 37):
        size = task.position_N[n] + 1
        assert tokenizer.decode(task.clean_NT[n, 1:size]) == task.texts[n].clean.lower()
        assert tokenizer.decode(task.patch_NT[n, 1:size]) == task.texts[n].patch.lower()
        assert tokenizer.tokens[task.right_N[n]] == task.texts[n].right
    unique = encode_pairs(tokenizer, read_pairs(path), name)
    first, second = split_pairs(unique, 0)
    assert not prefixes(first) & prefixes(second) and abs(len(first.texts) - len(second.texts)) <= 6
    for case in range(len(unique.cases)):
        assert abs(int((first.case_N == case).sum()) - int((second.case_N == case).sum())) <= 6


def test_real_blimp(real):
    folder, tokenizer = real
    path = folder / "blimp" / "anaphor_gender_agreement.jsonl"
    task = encode_pairs(tokenizer, read_pairs(path), "blimp")
    assert task.dropped.keys() == {"no partner"} and len(task.texts) > 300
    assert np.all((task.clean_NT != task.patch_NT).any(1))
    assert task.dropped["no partner"] + len(task.texts) == 1000
    whole = encode_pairs(tokenizer, read_pairs(path), "blimp", without_patch="clean", masked=True, tail=None)
    assert whole.dropped == {} and len(whole.texts) == 1000
    text = tokenizer.decode(whole.clean_NT[0][whole.segment_NT[0] == 1])
    assert text == "[CLS] katherine can ' t help [MASK]. [SEP]"
    with pytest.raises(InputError, match="use read_sentences"):
        read_pairs(folder / "blimp" / "regular_plural_subject_verb_agreement_2.jsonl")
    for file in sorted((folder / "blimp").glob("*.jsonl")):
        sentences = encode_sentences(tokenizer, read_sentences(file), file.stem)
        assert len(sentences.texts) + sum(sentences.dropped.values()) == 1000 and len(sentences.texts) > 900
        assert sentences.cases == (file.stem,)


@pytest.mark.parametrize("patch, same", [("corrupted_hard", 2), ("corrupted", 1)])
def test_real_ioi(real, patch, same):
    folder, tokenizer = real
    rows = read_pairs(folder / "ioi" / "ioi_llama.csv", patch=patch)
    task = encode_pairs(tokenizer, rows, "ioi")
    assert len(rows) == 499 and sum(task.dropped.values()) == task.dropped.get("repeated", 0) < 250
    sizes = (task.segment_NT == 1).sum(1)
    np.testing.assert_array_equal(task.position_N, sizes - 1)
    # The indirect object once, the subject twice; in the patched row the other way round, or once each.
    for ids_NT, right, wrong in ((task.clean_NT, 1, 2), (task.patch_NT, same, 1)):
        assert np.all((ids_NT == task.right_N[:, None]).sum(1) == right)
        assert np.all((ids_NT == task.wrong_N[:, None]).sum(1) == wrong)
    assert np.all((task.clean_NT != task.patch_NT).sum(1) == 1)
    with pytest.raises(InputError, match="greater_than_data.csv:2: .*'corrupted_hard'"):
        read_pairs(folder / "ioi" / "greater_than_data.csv")
