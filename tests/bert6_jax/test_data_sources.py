"""Sources: what every kind reads, fingerprints over content, and one line for every kind of bad input."""

import errno
import gzip
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from bert6_jax.data import sources
from bert6_jax.data.sources import TextSource, open_source
from bert6_jax.errors import InputError

ROWS = [{"id": 7, "text": "Prüfung one"}, {"text": "two\nlines"}, {"id": "x", "text": "three", "title": "T"}]


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def texts(spec, **fields):
    return [document.text for document in open_source(spec, **fields).documents()]


def error_of(spec, **fields) -> str:
    with pytest.raises(InputError) as error:
        list(open_source(spec, **fields).documents())
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines(tmp_path, name):
    path = tmp_path / name
    raw = b"\xef\xbb\xbf" + jsonl(ROWS[:2]) + b"\n  \r\n" + jsonl(ROWS[2:]).rstrip(b"\n")
    path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    documents = list(open_source(path).documents())
    assert [document.text for document in documents] == [row["text"] for row in ROWS]
    assert [document.id for document in documents] == ["7", f"{name}:2", "x"]
    assert [document.where for document in documents] == [f"{path}:{line}" for line in (1, 2, 5)]
    assert list(open_source(str(path)).documents()) == documents
    assert [document.id for document in open_source(path, id_field="title").documents()][2] == "T"


def test_other_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"content": "c", "text": "t"}]))
    assert texts(tmp_path / "a.jsonl", text_field="content") == ["c"]
    assert texts(tmp_path, text_field="content") == ["c"]


def test_one_text_file_is_split_at_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\none\r\nstill one\r\n \t\r\n\ntwo\n\nthree")
    documents = list(open_source(path).documents())
    assert [document.text for document in documents] == ["one\r\nstill one\r\n", "two\n", "three"]
    assert [document.where for document in documents] == [f"{path}:{line}" for line in (3, 7, 9)]
    assert documents[1].id == "a.txt:7"


def test_folder_in_the_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "2.txt").write_text("b2\n\nstill b2", encoding="utf-8")
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": "a1"}, {"text": " \n"}, {"text": "a2"}]))
    (tmp_path / "c.txt").write_text("c", encoding="utf-8")
    (tmp_path / "blank.txt").write_text(" \n", encoding="utf-8")
    for ignored in ("README", "x.csv", ".hidden.txt", ".git/x.txt"):
        (tmp_path / ignored).write_bytes(b"\xff")
    source = open_source(tmp_path)
    documents = list(source.documents())
    assert [document.text for document in documents] == ["a1", "a2", "b2\n\nstill b2", "c"]
    assert [document.id for document in documents] == ["a.jsonl:1", "a.jsonl:3", "b/2.txt", "c.txt"]
    assert source.name == tmp_path.name


def test_fingerprint_is_of_the_content(tmp_path):
    def fingerprint(files, folder="f", **fields):
        for name, content in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return open_source(tmp_path / folder, **fields).fingerprint

    same = fingerprint({"a.txt": b"1", "b.txt": b"2", "x.csv": b"?"}, "f1")
    assert fingerprint({"b.txt": b"2", "a.txt": b"1"}, "f2") == same
    different = [
        fingerprint({"a.txt": b"1", "b.txt": b"3"}, "f3"),
        fingerprint({"a.txt": b"1", "c.txt": b"2"}, "f4"),
        fingerprint({"a.txt": b"12", "b.txt": b""}, "f5"),
        fingerprint({}, "f1", text_field="t"),
        open_source(tmp_path / "f1" / "a.txt").fingerprint,
        open_source(tmp_path / "f1" / "b.txt").fingerprint,
    ]
    assert len({same, *different}) == 1 + len(different)
    (tmp_path / "moved.txt").write_bytes(b"1")
    assert open_source(tmp_path / "moved.txt").fingerprint == different[4]


def test_text_source():
    source = TextSource("embedded", ["a", "b"], "f")
    assert list(source.documents()) == list(source.documents())
    assert [tuple(document) for document in source.documents()] == [
        ("0", "a", "embedded[0]"),
        ("1", "b", "embedded[1]"),
    ]


GOOD = jsonl([{"text": "good"}])
BROKEN_LINES = {
    "cut": (b'{"text": "b', ["not JSON", "repair"]),
    "deep": (b"[" * 100_000, ["not JSON"]),
    "digits": (b'{"text": ' + b"1" * 5000 + b"}", ["not JSON"]),
    "array": (b'["text"]', ["a JSON array, not an object"]),
    "number": (b"3", ["a JSON number, not an object"]),
    "no text": (b'{"id": 1, "txt": "a"}', ["no field 'text'", "'id', 'txt'"]),
    "no field": (b"{}", ["no field 'text'", "none"]),
    "null": (b'{"text": null}', ["field 'text' is a JSON null, not a string"]),
    "list": (b'{"text": ["a"]}', ["field 'text' is a JSON array, not a string"]),
    "true": (b'{"text": true}', ["field 'text' is a JSON boolean"]),
    "bytes": (b'{"text": "a\xe9"}', ["byte 12", "0xe9", "convert"]),
    "surrogate": (b'{"text": "a\\ud83d"}', ["surrogate"]),
}


@pytest.mark.parametrize("name", BROKEN_LINES)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_broken_lines_are_named(tmp_path, name, suffix):
    line, words = BROKEN_LINES[name]
    path = tmp_path / f"a.{suffix}"
    raw = GOOD * 2 + line + b"\n" + GOOD
    path.write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
    message = error_of(path)
    assert message.startswith(f"{path}:3: ") and all(word in message for word in words), message
    assert error_of(tmp_path) == message


def test_surrogate_pairs_are_characters(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud83d\\ude00"}')
    assert texts(tmp_path) == ["\U0001f600"]


def test_broken_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b"".join(jsonl([{"text": f"{i**7} text"}]) for i in range(5000)))
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # the checksum
    for raw in (whole[:-4], whole[: len(whole) // 2], bytes(flipped), whole[:100] + b"\xff" * 50 + whole[150:]):
        path.write_bytes(raw)
        message = error_of(path)
        assert message.startswith(f"{path}: gzip data cut short or damaged after line ") and "copy" in message
    path.write_bytes(GOOD)
    assert "gzip data cut short or damaged after line 0" in error_of(path)


def test_text_that_is_not_utf8(tmp_path):
    raw = b"one\n\ntw\xc3\xb6 \xe9\n"
    (tmp_path / "a.txt").write_bytes(raw)
    expected = f"{tmp_path / 'a.txt'}:3: byte 6 of the line is not UTF-8 (0xe9); convert the file to UTF-8"
    assert error_of(tmp_path / "a.txt") == expected
    assert error_of(tmp_path) == expected  # the same place when the file is read in one piece
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16"))
    assert "a.txt:1: byte 1 " in error_of(tmp_path)


def test_nothing_to_read(tmp_path):
    assert error_of(tmp_path / "none").startswith(f"{tmp_path / 'none'}: no such file or folder")
    assert "folder without a .txt, .jsonl" in error_of(tmp_path)
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).write_bytes(b"\n \n")
        assert error_of(tmp_path / name).startswith(f"{tmp_path / name}: the corpus is empty")
    assert error_of(tmp_path).startswith(f"{tmp_path}: the corpus is empty")
    (tmp_path / "a.csv").write_bytes(b"a")
    assert "a.csv: not a .txt, .jsonl, .jsonl.gz file" in error_of(tmp_path / "a.csv")
    assert "a.csv/b: cannot be read (Not a directory)" in error_of(tmp_path / "a.csv" / "b")
    os.mkfifo(tmp_path / "pipe.txt")
    assert "neither a file nor a folder" in error_of(tmp_path / "pipe.txt")
    (tmp_path / "broken.txt").symlink_to("nowhere")
    assert "broken.txt: cannot be read (No such file" in error_of(tmp_path)


@pytest.mark.parametrize("where", ["stat", "open", "walk"])
def test_no_permission(tmp_path, monkeypatch, where):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)

    def denied(file, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    if where == "stat":
        monkeypatch.setattr(Path, "stat", denied)
    elif where == "open":
        monkeypatch.setattr(sources, "open", denied, raising=False)
    else:
        monkeypatch.setattr(os, "scandir", denied)
    message = error_of(tmp_path if where == "walk" else path)
    assert "cannot be read (Permission denied); check the path and permissions" in message
    assert message.startswith(str(tmp_path if where == "walk" else path))


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """Small sets prepared as ArrayRecord without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    tfds.disable_progress_bar()
    data_dir = tmp_path_factory.mktemp("tfds")

    def prepare(set_name, features, splits, config=None):
        class Builder(tfds.core.GeneratorBasedBuilder):
            __module__ = "builders"  # no dot: TFDS would look for a package's files with a library of its own
            name = set_name
            VERSION = tfds.core.Version("1.2.0")
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

            def _info(self):
                fields = dict.fromkeys(features, tfds.features.Text()) | {"label": tfds.features.Scalar(np.int32)}
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(fields), disable_shuffling=True
                )

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(rows) for split, rows in splits.items()}

            def _generate_examples(self, rows):
                for number, row in enumerate(rows):
                    yield number, dict(zip(features, row, strict=True)) | {"label": number}

        Builder(data_dir=str(data_dir), file_format="array_record").download_and_prepare()

    prepare("one_text", ["body"], {"train": [("träin one",), ("two",), ("three",)], "test": [("t",)]})
    prepare("two_texts", ["body", "text"], {"train": [("b", "t"), ("c", b"\xff")]})
    prepare("blank", ["text"], {"train": [(" ",), ("",)]})
    prepare(
        "wiki40b", ["id", "text"], {"train": [("Q1", "\n_START_ARTICLE_\nT\n_START_PARAGRAPH_\na_NEWLINE_b")]}, "en"
    )
    return data_dir


@pytest.fixture
def tfds_env(tfds_dir, monkeypatch):
    def no_network(*_):
        raise AssertionError("network access")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    return tfds_dir


def test_tfds(tfds_env):
    source = open_source("tfds:one_text")
    documents = list(source.documents())
    assert [document.text for document in documents] == ["träin one", "two", "three"]
    assert [document.id for document in documents] == ["0", "1", "2"]
    assert documents[1].where == "tfds:one_text[1]" and source.name == "one_text"
    assert texts("tfds:one_text:test") == ["t"]
    assert texts("tfds:one_text:1.2.0:train[1:]") == ["two", "three"]
    assert texts("tfds:one_text:1.2.0") == texts("tfds:one_text:train")
    specs = ("tfds:one_text", "tfds:one_text:test", "tfds:one_text:train[1:]", "tfds:two_texts")
    assert len({open_source(spec).fingerprint for spec in specs}) == 4
    assert open_source("tfds:one_text:train").fingerprint == source.fingerprint
    body, text = (open_source("tfds:two_texts", text_field=field) for field in ("body", "text"))
    assert body.fingerprint != text.fingerprint
    assert [document.text for document in body.documents()] == ["b", "c"]


def test_tfds_wiki40b_marks_are_removed(tfds_env):
    (document,) = open_source("tfds:wiki40b/en").documents()
    assert document.text.split() == ["T", "a", "b"] and document.id == "Q1"


def test_tfds_errors(tfds_env):
    for spec in ("tfds:imdb_reviews", "tfds:wiki40b/de", "tfds:one_text:9.9.9", "tfds:unheard_of/thing:test"):
        message = error_of(spec)
        assert message.startswith(f"{spec}: not prepared in {tfds_env}; prepare it once with: ")
        assert "file_format='array_record').download_and_prepare()" in message
    message = error_of("tfds:one_text:nope")
    assert "cannot read split 'nope'" in message and "'train', 'test'" in message
    assert "cannot read split" in error_of("tfds:one_text:train[x]")
    assert "not a TFDS name" in error_of("tfds:")
    assert "not a TFDS name" in error_of("tfds:../etc")
    message = error_of("tfds:two_texts", text_field="content")
    assert "no text feature 'content' (text features: body, text)" in message
    assert error_of("tfds:two_texts").startswith("tfds:two_texts[1]: byte 1 ")
    assert "cannot read split 'train[:0]'" in error_of("tfds:one_text:train[:0]")
    assert error_of("tfds:blank").startswith("tfds:blank: the corpus is empty")


def test_tfds_without_random_access(tfds_env):
    info = tfds_env / "one_text" / "1.2.0" / "dataset_info.json"
    original = info.read_text(encoding="utf-8")
    try:
        info.write_text(original.replace("array_record", "tfrecord"), encoding="utf-8")
        assert "without random access; prepare it again with: " in error_of("tfds:one_text")
    finally:
        info.write_text(original, encoding="utf-8")


def test_tfds_damaged_file(tfds_env):
    (file,) = (tfds_env / "one_text" / "1.2.0").glob("*train*")
    original = file.read_bytes()
    try:
        file.write_bytes(original[: len(original) // 2])
        assert "prepare" in error_of("tfds:one_text")
    finally:
        file.write_bytes(original)


def test_tfds_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", None)
    assert error_of("tfds:glue/cola") == "tfds:glue/cola: needs TFDS; pip install 'bert6-jax[tfds]'"
