"""Tokenizer: against a plain WordPiece, against Hugging Face, deterministic training, and every broken vocabulary."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert6_jax.data import tokenizer as tokenizer_module
from bert6_jax.data.sources import open_source
from bert6_jax.data.tokenizer import SPECIALS, CorpusEncoder, load_tokenizer, train_wordpiece, wordpiece
from bert6_jax.errors import InputError

WORDS = ("a", "ab", "b", "##b", "##a", "##bab", "c", "##c", ".", "[", "]", "mask", "e")
TOKENS = (*SPECIALS, *WORDS)
TEXTS = [
    f"the {adjective} {noun} sat on the {noun}s, again." for adjective in ("old", "new") for noun in ("cat", "hat")
]


def greedy(word: str) -> list[str]:
    """WordPiece by its definition: the longest token that fits, over and over."""
    pieces, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        end = next((e for e in range(len(word), start, -1) if prefix + word[start:e] in TOKENS), None)
        if end is None:
            return ["[UNK]"]
        pieces.append(prefix + word[start:end])
        start = end
    return pieces


def strings(tokenizer, text):
    return [tokenizer.tokens[i] for i in tokenizer.encode_batch([text])[0]]


def write_vocab(path: Path, tokens=TOKENS, end="\n") -> Path:
    path.write_bytes("".join(token + end for token in tokens).encode())
    return path


@given(st.lists(st.text("abcx", min_size=1, max_size=8), max_size=10))
def test_wordpiece_is_greedy_longest_match(words):
    assert strings(wordpiece(TOKENS), " ".join(words)) == [piece for word in words for piece in greedy(word)]


def test_ids_and_fields():
    tokenizer = wordpiece(TOKENS)
    assert tokenizer.tokens == TOKENS and tokenizer.vocab_size == len(TOKENS)
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    ids = tokenizer.encode_batch(["ab", "", "a.b"])
    assert [i.dtype for i in ids] == [np.int32] * 3
    assert [i.tolist() for i in ids] == [[6], [], [5, 13, 7]]
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.decode([2, 6, 8, 4, 3]) == "[CLS] abb [MASK] [SEP]"
    with pytest.raises(AttributeError):
        tokenizer.lowercase = False


def test_special_tokens_in_text_stay_text(tmp_path):
    loaded = load_tokenizer(write_vocab(tmp_path / "vocab.txt"))
    loaded.save(tmp_path / "tokenizer.json")
    for tokenizer in (loaded, load_tokenizer(tmp_path / "tokenizer.json")):
        assert strings(tokenizer, "a [MASK] [mask]") == ["a", "[", "mask", "]", "[", "mask", "]"]
        assert not set(tokenizer.encode_batch(["[PAD] [CLS] [SEP] [MASK] a"])[0]) & {0, 2, 3, 4}


def test_lower_case_and_accents():
    assert strings(wordpiece(TOKENS), "AB É") == ["ab", "e"]
    assert strings(wordpiece(TOKENS, lowercase=False), "ab AB é") == ["ab", "[UNK]", "[UNK]"]
    assert wordpiece(TOKENS).lowercase and not wordpiece(TOKENS, lowercase=False).lowercase


def test_long_documents_are_cut_between_words(monkeypatch):
    tokenizer, text = wordpiece(TOKENS), "ab abab\nc a.b " * 20
    whole = tokenizer.encode_batch([text, "a"])
    monkeypatch.setattr(tokenizer_module, "_PIECE", 17)
    pieces = tokenizer.encode_batch([text, "a"])
    assert all(map(np.array_equal, whole, pieces))


def test_hash_is_of_the_content(tmp_path):
    one = load_tokenizer(write_vocab(tmp_path / "one.txt"))
    crlf = load_tokenizer(write_vocab(tmp_path / "two.txt", end="\r\n"))
    one.save(tmp_path / "tokenizer.json")
    assert one == crlf == load_tokenizer(tmp_path / "tokenizer.json") == load_tokenizer(tmp_path)
    assert one.sha256 == wordpiece(TOKENS).sha256
    others = [
        wordpiece(TOKENS, lowercase=False),
        wordpiece(TOKENS, strip_accents=False),
        wordpiece((*TOKENS, "new")),
        wordpiece((*SPECIALS, *reversed(WORDS))),
    ]
    assert len({one.sha256, *(other.sha256 for other in others)}) == 5


def test_hugging_face_folder_says_the_case(tmp_path):
    write_vocab(tmp_path / "vocab.txt")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "strip_accents": null}', encoding="utf-8")
    assert not load_tokenizer(tmp_path).lowercase
    assert load_tokenizer(tmp_path / "vocab.txt", lowercase=True).lowercase
    wordpiece(TOKENS).save(tmp_path / "tokenizer.json")
    assert not load_tokenizer(tmp_path).lowercase


def test_truncation_and_padding_of_a_saved_tokenizer_are_off(tmp_path):
    tokenizer = wordpiece(TOKENS)
    spec = json.loads(tokenizer._rust.to_str())
    spec["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert loaded == tokenizer
    assert len(loaded.encode_batch(["a a a a"])[0]) == 4


def broken_vocabularies():
    tokens = "\n".join(TOKENS)
    for special in SPECIALS:
        yield f"no {special}", "vocab.txt", tokens.replace(special + "\n", ""), [f"without {special}", "add"]
    yield "empty", "vocab.txt", "", ["vocab.txt: ", "empty"]
    yield "white space", "vocab.txt", " \n\n", ["vocab.txt: ", "empty"]
    yield "duplicate", "vocab.txt", tokens + "\nab\n", ["vocab.txt:19:", "'ab'", "line 7", "unique"]
    yield "blank line", "vocab.txt", tokens + "\n\nx\n", ["vocab.txt:19:", "delete"]
    yield "not UTF-8", "vocab.txt", tokens.encode() + b"\nx\xff\n", ["vocab.txt:19:", "byte 2", "0xff", "convert"]
    yield "cut JSON", "tokenizer.json", '{"model":\n {"vocab": ', ["tokenizer.json:2:", "not JSON", "copy"]
    yield "JSON list", "tokenizer.json", "[]", ["tokenizer.json: ", "not a JSON object"]
    yield "no model", "tokenizer.json", "{}", ["tokenizer.json: ", "no vocabulary"]
    yield (
        "odd model",
        "tokenizer.json",
        '{"model": {"type": "?", "vocab": {"a": 0}}}',
        ["tokenizer.json: ", "not a tok"],
    )
    spec = json.loads(wordpiece(TOKENS)._rust.to_str())
    spec["model"]["vocab"]["gap"] = 99
    yield "gap", "tokenizer.json", json.dumps(spec), ["tokenizer.json: ", "19 tokens", "0 to 18"]
    del spec["model"]["vocab"]["[MASK]"], spec["model"]["vocab"]["gap"]
    spec["added_tokens"] = []
    yield "json, no [MASK]", "tokenizer.json", json.dumps(spec), ["tokenizer.json: ", "without [MASK]"]


@pytest.mark.parametrize(("name", "content", "words"), [pytest.param(*row, id=i) for i, *row in broken_vocabularies()])
def test_broken_vocabularies(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        load_tokenizer(path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    assert all(word in message for word in words), message


def test_missing_files(tmp_path):
    for path in (tmp_path / "no.txt", tmp_path / "no.json", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            load_tokenizer(path)


def test_training_is_the_same_in_every_process():
    code = (
        "import sys, json; from bert6_jax.data.tokenizer import train_wordpiece;"
        "print(train_wordpiece(json.load(sys.stdin), 300).sha256)"
    )
    # Many ties: every word occurs equally often.
    words = [a + b + c for a in "abcdefgh" for b in "aeiouy" for c in "klmnprst"]
    texts = [" ".join(words[i:] + words[:i]) for i in range(3)]
    hashes = {train_wordpiece(texts, 300).sha256, train_wordpiece(texts[::-1], 300).sha256}
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed}
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        run = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(texts),
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        hashes.add(run.stdout.strip())
    assert len(hashes) == 1


def test_training_learns_the_words():
    tokenizer = train_wordpiece(TEXTS * 5, 200)
    assert tokenizer.tokens[:5] == SPECIALS
    assert strings(tokenizer, "The old cat sat on the hats.") == "the old cat sat on the hats .".split()
    letters = sorted(set("".join(TEXTS)) - {" "})
    assert list(tokenizer.tokens[5 : 5 + 2 * len(letters)]) == letters + ["##" + letter for letter in letters]
    cased = train_wordpiece(["Anna met Bob"] * 3, 200, lowercase=False)
    assert strings(cased, "Anna Bob") == ["Anna", "Bob"] and not cased.lowercase


def test_rare_characters_are_left_out_with_their_ties():
    texts = ["aaaa aaab bbb cc dd ee"]
    tokenizer = train_wordpiece(texts, 100, max_alphabet=3)
    # c, d and e are equally rare: there is room for one, so none of them gets in.
    assert [token for token in tokenizer.tokens[5:] if len(token) == 1] == ["a", "b"]
    assert strings(tokenizer, "ab cc") == ["a", "##b", "[UNK]"]


def test_training_refuses_what_it_cannot_use():
    for texts in ([], ["", " \n\u200b"]):
        with pytest.raises(InputError, match="no text"):
            train_wordpiece(texts, 100)
    with pytest.raises(InputError, match="too small"):
        train_wordpiece(["abc"], 8)
    with pytest.raises(TypeError, match="twice"):
        train_wordpiece(iter(["abc"]), 100)


@pytest.mark.parity
def test_equals_hugging_face(shared_data, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    path = shared_data / "bert_vocab" / "vocab.txt"
    ours, theirs = load_tokenizer(path), transformers.BertTokenizerFast(str(path))
    with gzip.open(shared_data / "wikipedia" / "part-06.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(100), strict=False)]
    texts += [
        "[MASK] Ünïcode—‘quotes’ 日本語 ﬁ \x1c\x00 a\u200db İstanbul ΑΣ",
        "x" * 101,
        "",
        "\ufeff",
        "e\u0301 \u0301e",
    ]
    expected = theirs(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    assert [ids.tolist() for ids in ours.encode_batch(texts)] == expected
    assert ours.special_ids == (0, 100, 101, 102, 103) and ours.vocab_size == theirs.vocab_size == 30522
    assert list(ours.tokens) == theirs.convert_ids_to_tokens(range(30522))


# Letters and what stands between or on them: blanks of all kinds, controls, accents, Greek sigmas, CJK, specials.
ODD = "abÉΣİ.[]'- \n\t\r\x00\x0b\x1c\x85\u00a0\u00ad\u0301\u0327\u200b\u2028\u2029\u3000\u4e2d\ufeff\ue000\U0001f600"
PIECES = [*ODD.split(" ")[0].lower(), "σ", "ς", "中", "e", "i", "\u0301", "\u00a0", "mask", "ab", "##\u0307"]
ODD_TOKENS = tuple(
    dict.fromkeys((*SPECIALS, *PIECES, *(f"##{piece}" for piece in PIECES if not piece.startswith("##"))))
)
ODD_TEXTS = st.lists(
    st.lists(st.sampled_from([*ODD, *SPECIALS, "[mask]", " ab ", "ab\u0301", "b" * 101]), max_size=12).map("".join),
    max_size=6,
)


def assert_encodes(tokenizer, batches):
    """Batch after batch, the encoder of a corpus gives what the library gives for the whole texts."""
    encode = CorpusEncoder(tokenizer)
    for texts in batches:
        expected = tokenizer.encode_batch(texts)
        ids, size_D = encode(texts)
        assert (ids.dtype, size_D.dtype) == (np.int32, np.int64)
        assert size_D.tolist() == [len(ids) for ids in expected]
        assert ids.tolist() == [i for ids in expected for i in ids]


@settings(deadline=None, max_examples=300)
@given(st.lists(ODD_TEXTS, max_size=3), st.booleans(), st.booleans(), st.sampled_from([None, False, True]))
def test_a_corpus_is_encoded_as_its_texts_are(batches, lowercase, chinese, strip):
    tokenizer = wordpiece(ODD_TOKENS, lowercase, handle_chinese_chars=chinese, strip_accents=strip)
    assert_encodes(tokenizer, batches)


def test_a_corpus_encoder_forgets_and_cuts_long_texts(monkeypatch):
    batches = [["ab abab\nc a.b " * 20, "", "a" * 60], ["c b"], ["zz", "a.b ab\n\n"], ["ab abab"]]
    calls = []
    monkeypatch.setattr(CorpusEncoder, "_forget", lambda self, forget=CorpusEncoder._forget: calls.append(forget(self)))
    for piece, remembered, times in ((1_000_000, 4_000_000, 1), (17, 4_000_000, 1), (17, 10, 3), (1, 0, 4)):
        monkeypatch.setattr(tokenizer_module, "_PIECE", piece)
        monkeypatch.setattr(tokenizer_module, "_REMEMBERED", remembered)
        calls.clear()
        assert_encodes(wordpiece(TOKENS), batches)
        assert len(calls) == times


def other_tokenizers():
    """Tokenizers that see more than one word at a time."""
    spec = json.loads(wordpiece(TOKENS)._rust.to_str())
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    yield "added token", spec | {"added_tokens": [*spec["added_tokens"], {"id": len(TOKENS), "content": "b a"} | added]}
    yield "strips", spec | {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}
    yield "replaces", spec | {"normalizer": {"type": "Replace", "pattern": {"String": "b a"}, "content": "c"}}
    yield "whole text", spec | {"pre_tokenizer": None, "model": spec["model"] | {"max_input_chars_per_word": 9}}


@pytest.mark.parametrize(("name", "spec"), [pytest.param(*row, id=row[0]) for row in other_tokenizers()])
def test_other_tokenizers_encode_whole_texts(tmp_path, name, spec):
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    texts = ["ab a b a", " c", "a"]
    assert_encodes(tokenizer, [texts, [], texts[::-1]])
    words = [i for word in "ab a b a".split(" ") for i in tokenizer.encode_batch([word])[0]]
    assert tokenizer.encode_batch(texts)[0].tolist() != words or name == "strips"


def test_a_corpus_of_wikipedia_is_encoded_as_its_texts_are(shared_data):
    texts = [document.text for document in open_source(shared_data / "wikipedia" / "part-06.jsonl.gz").documents()]
    tokenizer = load_tokenizer(shared_data / "bert_vocab")
    assert_encodes(tokenizer, [texts[:300], texts[300:600]])


def test_a_line_end_that_is_a_token_already(tmp_path):
    spec = json.loads(wordpiece(TOKENS)._rust.to_str())
    token = {"id": len(TOKENS), "content": "\n", "single_word": False, "lstrip": False, "rstrip": False}
    spec["added_tokens"].append(token | {"normalized": False, "special": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    assert_encodes(load_tokenizer(tmp_path), [["ab a\nb a", "\n"]])


def test_a_corpus_encoder_after_text_that_is_none():
    tokenizer = wordpiece(TOKENS)
    encode = CorpusEncoder(tokenizer)
    with pytest.raises(TypeError):
        encode(["a \ud800 b"])
    assert encode(["ab zz a"])[0].tolist() == tokenizer.encode_batch(["ab zz a"])[0].tolist()
