"""Trained vocabularies in the cache: the one that training gives, trained once, and again when anything differs."""

from __future__ import annotations

import json
import os

import pytest

from bert6_jax.data import vocabulary
from bert6_jax.data.tokenizer import train_wordpiece
from bert6_jax.data.vocabulary import trained_wordpiece
from bert6_jax.errors import InputError

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "Ångström sat there too"] * 5


@pytest.fixture
def trainings(monkeypatch):
    """How often a vocabulary was trained."""
    calls = []

    def train(*args):
        calls.append(args)
        return train_wordpiece(*args)

    monkeypatch.setattr(vocabulary, "train_wordpiece", train)
    return calls


def test_the_cache_gives_what_training_gives(tmp_path, trainings):
    expected = train_wordpiece(TEXTS, 60)
    for _ in range(3):
        found = trained_wordpiece(TEXTS, 60, cache_dir=tmp_path)
        assert found == expected and found.tokens == expected.tokens and found.sha256 == expected.sha256
        assert [x.tolist() for x in found.encode_batch(TEXTS)] == [x.tolist() for x in expected.encode_batch(TEXTS)]
    assert len(trainings) == 1
    assert [path.name[:11] for path in tmp_path.iterdir()] == ["vocabulary-"]  # and no temporary file


def test_other_texts_sizes_and_cases_are_other_vocabularies(tmp_path, trainings):
    asked = [
        (TEXTS, 60, True),
        (TEXTS, 40, True),
        (TEXTS, 60, False),
        (TEXTS[:-1], 60, True),
        (TEXTS[::-1], 60, True),
        (["a b"], 60, True),  # the same characters, cut into documents in another way
        (["a", " b"], 60, True),
    ]
    for texts, size, lowercase in asked * 2:
        try:
            expected = train_wordpiece(texts, size, lowercase)
        except InputError:
            pytest.fail("the cases are ones that can be trained")
        assert trained_wordpiece(texts, size, lowercase, cache_dir=tmp_path) == expected
    assert len(trainings) == len(asked) == len(list(tmp_path.iterdir()))


@pytest.mark.parametrize("damage", ["cut", "empty", "garbled", "list", "swapped", "no specials", "folder"])
def test_what_is_damaged_is_trained_again(tmp_path, trainings, damage):
    expected = trained_wordpiece(TEXTS, 60, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    kept = json.loads(path.read_text(encoding="utf-8"))
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage in ("cut", "empty", "garbled"):
        data = path.read_bytes()
        path.write_bytes({"cut": data[:-20], "empty": b"", "garbled": b"\xff\xfe" + data}[damage])
    elif damage == "list":
        path.write_text("[1, 2]", encoding="utf-8")
    else:
        tokens = kept["tokens"]
        kept["tokens"] = tokens[:10] + [tokens[11], tokens[10]] + tokens[12:] if damage == "swapped" else tokens[5:]
        path.write_text(json.dumps(kept), encoding="utf-8")
    assert trained_wordpiece(TEXTS, 60, cache_dir=tmp_path) == expected
    assert len(trainings) == 2
    if damage != "folder":  # replaced
        assert trained_wordpiece(TEXTS, 60, cache_dir=tmp_path) == expected and len(trainings) == 2


def test_a_cache_that_cannot_be_made_costs_time_only(tmp_path, trainings):
    (tmp_path / "file").write_bytes(b"")
    for _ in range(2):
        assert trained_wordpiece(TEXTS, 60, cache_dir=tmp_path / "file" / "below") == train_wordpiece(TEXTS, 60)
    assert len(trainings) == 2 and os.listdir(tmp_path) == ["file"]


def test_the_cache_is_that_of_the_tokens_and_errors_are_those_of_training(tmp_path, monkeypatch):
    monkeypatch.setenv("BERT6_JAX_CACHE", str(tmp_path / "cache"))
    for texts, size, words in ((["", "  "], 60, "no text"), (TEXTS, 5, "too small")):
        with pytest.raises(InputError, match=words):
            trained_wordpiece(texts, size)
    assert not (tmp_path / "cache").exists()
    trained_wordpiece(TEXTS, 60)
    assert len(list((tmp_path / "cache").glob("vocabulary-*.json"))) == 1
