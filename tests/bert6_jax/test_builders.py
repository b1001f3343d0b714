"""TFDS builders: what each set holds, one line for every kind of bad input, prepared once, nothing left, no network."""

import csv
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")

from bert6_jax.data import builders  # noqa: E402
from bert6_jax.data.sources import open_source  # noqa: E402
from bert6_jax.errors import InputError  # noqa: E402

TOKENS = ["In", "May", "Ann", "Lee", "met", "Bo", "."]
EXAMPLE = {"tokens": TOKENS, "h": ["ann lee", "Q1", [[2, 3]]], "t": ["bo", "Q2", [[5]]]}
FEWREL = {"P9": [EXAMPLE, EXAMPLE], "P10": [EXAMPLE]}
POPQA = {
    "id": "1",
    "subj": "Æthel",
    "prop": "father",
    "obj": "Ed",
    "question": "Who?",
    "possible_answers": '["Ed", "Éd"]',
    "s_pop": "12",
    "o_pop": "-2",
}
ARTICLES = [{"id": "a", "title": "A", "text": "one"}, {"id": 7, "title": "", "text": "two\nlines"}]
TABLE = "text,label\ngood one,pos\nbad one,neg\n"


pytestmark = pytest.mark.usefixtures("no_network")


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def jsonl(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def fewrel(folder: Path, train=FEWREL, val=None, names=None) -> Path:
    for name, value in (("train_wiki", train), ("val_wiki", val), ("pid2name", names)):
        if value is not None:
            write(folder / f"{name}.json", value if isinstance(value, str | bytes) else json.dumps(value))
    return folder


def dbpedia(folder: Path, train='2,"","one ""two"""\n1,"T"," x"\n', test='1,"","t"\n', classes="A\nB\n\n") -> Path:
    write(folder / "train.csv", train)
    write(folder / "test.csv", test)
    write(folder / "classes.txt", classes)
    return folder


def popqa(path: Path, *rows) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t")
    writer.writeheader()
    writer.writerows(rows)
    return write(path, text.getvalue())


def rows(builder, split="train") -> list[dict]:
    return list(builder.as_data_source(split=split))


def texts(builder, split="train", field="text") -> list[str]:
    return [row[field].decode() for row in rows(builder, split)]


def labels(builder, split="train") -> list[str]:
    return [builder.info.features["label"].int2str(row["label"]) for row in rows(builder, split)]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def error_of(name, raw, data_dir, **options) -> str:
    """The one line; nothing may be left of the set."""
    before = files(data_dir)
    with pytest.raises(InputError) as error:
        builders.prepare(name, raw, data_dir, **options)
    message = str(error.value)
    assert "\n" not in message and message.isprintable(), message
    assert files(data_dir) == before and not list(data_dir.rglob("incomplete*"))
    return message


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "tfds"


def test_fewrel(tmp_path, data_dir):
    val = {"P1": [{"tokens": ["Ä", " ", "b"], "h": ["b", "", [[2], [0]]], "t": ["ä", "", [[0, 1]]]}]}
    names = {"P9": ["nine \n lives", "x"], "P10": ["ten", "x"], "P1": ["one", ""], "P2": ["unused", ""]}
    raw = fewrel(tmp_path / "raw", val=val, names=names)
    builder = builders.prepare("fewrel", raw, data_dir)
    assert Path(builder.data_dir) == data_dir / "fewrel" / "1.0.0"
    assert builder.info.features["label"].names == ["P1", "P10", "P9"]
    assert labels(builder) == ["P9", "P9", "P10"] and labels(builder, "validation") == ["P1"]
    row = rows(builder)[0]
    text = row["text"].decode()
    assert text == "In May Ann Lee met Bo ." and row["head"] == b"ann lee" and row["tail"] == b"bo"
    assert text[row["head_start"] : row["head_end"]] == "Ann Lee" and text[row["tail_start"] : row["tail_end"]] == "Bo"
    (row,) = rows(builder, "validation")
    text = row["text"].decode()
    assert text == "Ä   b" and text[row["head_start"] : row["head_end"]] == "b"
    assert text[row["tail_start"] : row["tail_end"]] == "Ä  "
    recorded = builders.metadata(builder)
    assert recorded["names"] == {"P1": "one", "P10": "ten", "P9": "nine lives"}
    assert recorded["raw"]["train"] == hashlib.sha256((raw / "train_wiki.json").read_bytes()).hexdigest()
    assert set(recorded["raw"]) == {"train", "validation", "names"}
    plain = builders.prepare("fewrel", fewrel(tmp_path / "plain"), tmp_path / "other")
    assert list(plain.info.splits) == ["train"] and builders.metadata(plain)["names"] == {}


def changed(**fields) -> dict:
    return {"P9": [EXAMPLE, EXAMPLE | fields]}


BAD_FEWREL = {
    "garbage": (b"\xff\xfe\x00", ["train_wiki.json:1: byte 1", "not UTF-8"]),
    "empty": (b"", ["not JSON", "copy the file again"]),
    "cut": (b'{"P9": [', ["not JSON"]),
    "deep": (b"[" * 100_000, ["not JSON"]),
    "list": ([EXAMPLE], ["a JSON array, not {relation: [examples]}"]),
    "empty object": ({}, ["an empty object"]),
    "twice": (b'{"P9": [], "P9": []}', ["'P9' is there twice"]),
    "no examples": ({"P9": []}, ["relation 'P9' is not a list of examples"]),
    "no list": ({"P9": "x"}, ["relation 'P9' is not a list"]),
    "no name": ({" ": [EXAMPLE]}, ["is blank"]),
    "line break": ({"P\n9": [EXAMPLE]}, ["not one line of text"]),
    "no object": ({"P9": [EXAMPLE, 3]}, ["relation 'P9', example 2: a JSON number, not an object"]),
    "no tokens": ({"P9": [{"h": 1, "t": 1}]}, ["example 1: no field 'tokens'"]),
    "token": (changed(tokens=["a", 3]), ["example 2: field 'tokens' is not a list of words"]),
    "string": (changed(tokens="words"), ["field 'tokens'"]),
    "blank": (changed(tokens=[" ", ""]), ["field 'tokens'"]),
    "no words": (changed(tokens=[]), ["field 'tokens'"]),
    "surrogate": (changed(tokens=["\ud83d"] * 7), ["field 'tokens' holds half of a surrogate pair"]),
    "entity": (changed(h=["a", "b"]), ["field 'h' is not [name, id, [positions]]"]),
    "entity name": (changed(t=[None, "b", [[0]]]), ["field 't' is not [name"]),
    "no positions": (changed(t=["a", "b", []]), ["field 't' has no positions like [[2, 3]]"]),
    "flat positions": (changed(t=["a", "b", [1]]), ["field 't' has no positions"]),
    "empty mention": (changed(t=["a", "b", [[1], []]]), ["field 't' has no positions"]),
    "outside": (
        changed(h=["a", "b", [[6, 7]]]),
        ["field 'h' has position 7 outside the sentence of 7 tokens (0 to 6)"],
    ),
    "second mention": (changed(h=["a", "b", [[6], [70]]]), ["position 70 outside"]),
    "negative": (changed(h=["a", "b", [[-1]]]), ["position -1 outside"]),
    "text position": (changed(h=["a", "b", [["1"]]]), ['position "1" outside']),
    "true": (changed(h=["a", "b", [[True]]]), ["position true outside"]),
    "float": (changed(h=["a", "b", [[1.0]]]), ["position 1.0 outside"]),
}


@pytest.mark.parametrize("name", BAD_FEWREL)
def test_bad_fewrel(tmp_path, data_dir, name):
    content, words = BAD_FEWREL[name]
    message = error_of("fewrel", fewrel(tmp_path / "raw", content), data_dir)
    assert str(tmp_path / "raw" / "train_wiki.json") in message and all(word in message for word in words), message


def test_bad_fewrel_folder(tmp_path, data_dir):
    raw = tmp_path / "raw"
    assert f"{raw}: no such file or folder" in error_of("fewrel", raw, data_dir)
    raw.mkdir()
    assert f"{raw}: no file train_wiki.json there" in error_of("fewrel", raw, data_dir)
    fewrel(raw)
    assert "not a folder" in error_of("fewrel", raw / "train_wiki.json", data_dir)
    fewrel(raw, names={"P9": ["nine", ""]})
    assert "relation 'P10' is not in pid2name.json" in error_of("fewrel", raw, data_dir)
    fewrel(raw, names={"P9": "nine"})
    assert "pid2name.json: relation 'P9' is not [name, description]" in error_of("fewrel", raw, data_dir)
    fewrel(raw, names=[])
    assert "pid2name.json: a JSON array" in error_of("fewrel", raw, data_dir)


def test_dbpedia(tmp_path, data_dir):
    raw = dbpedia(tmp_path / "raw", train='\ufeff2,"","one ""two"""\r\n\r\n1,"T","a\nb, c"\r\n')
    builder = builders.prepare("dbpedia14", raw, data_dir)
    assert texts(builder) == ['one "two"', "a\nb, c"] and texts(builder, field="title") == ["", "T"]
    assert labels(builder) == ["B", "A"] and texts(builder, "test") == ["t"]


BAD_DBPEDIA = {
    "zero": ('1,"","a"\n0,"","b"\n', ["train.csv:2: row 2: label '0' is not 1 to 2"]),
    "fifteen": ('15,"","a"\n', ["train.csv:1: row 1: label '15' is not 1 to 2", "repair"]),
    "word": ('abc,"","a"\n', ["label 'abc' is not 1 to 2"]),
    "other digits": ('１,"","a"\n', ["label '\\uff11' is not"]),
    "long": ("9" * 5000 + ',"","a"\n', ["label '999"]),
    "two fields": ('1,""\n', ["row 1 has 2 fields"]),
    "four fields": ('1,"","a",b\n', ["row 1 has 4 fields"]),
    "blank": ('1,"T"," \n"\n', ["row 1: the content is empty"]),
    "open quote": ('1,"","a"\n1,"","b\n1,x,y\n' + "1,x,y\n" * 40_000, ["train.csv:2: unbalanced quotes"]),
    "open quote at the end": ('1,"","a"\n1,"","b\n', ["train.csv:2: unbalanced quotes"]),
    "open quote, then quoted": ('1,"","a"\n1,"","b\n1,"","c"\n1,"","d"\n', ["train.csv:2: unbalanced quotes"]),
    "after a quote": ('1,"","a"b\n', ["train.csv:1: unbalanced quotes"]),
    "quote inside": ('1,,5" disk\n', ["train.csv:1: unbalanced quotes", "odd number"]),
    "nul": ('1,"","a\0"\n', ["train.csv:1: a NUL byte"]),
    "latin": ('1,"","a"\n1,"","é"\n'.encode("latin-1"), ["train.csv:2: byte 7 of the line is not UTF-8 (0xe9)"]),
    "old mac": ("1,T,a\r1,T,b\r", ["train.csv:1: a carriage return"]),
    "empty": ("", ["train.csv: no rows"]),
    "blank lines": ("\n\n", ["train.csv: no rows"]),
}


@pytest.mark.parametrize("name", BAD_DBPEDIA)
def test_bad_dbpedia(tmp_path, data_dir, name):
    content, words = BAD_DBPEDIA[name]
    message = error_of("dbpedia14", dbpedia(tmp_path / "raw", content), data_dir)
    assert message.startswith(str(tmp_path / "raw")) and all(word in message for word in words), message


def test_bad_dbpedia_folder(tmp_path, data_dir):
    raw = dbpedia(tmp_path / "raw", classes="A\nA\n")
    assert "classes.txt: a class twice" in error_of("dbpedia14", raw, data_dir)
    dbpedia(raw, classes=" ")
    assert "classes.txt: no classes" in error_of("dbpedia14", raw, data_dir)
    dbpedia(raw, test='3,"","a"\n')
    assert "test.csv:1: row 1: label '3'" in error_of("dbpedia14", raw, data_dir)  # train is fine, and gone again
    (raw / "test.csv").unlink()
    assert "no file test.csv there" in error_of("dbpedia14", raw, data_dir)


def test_popqa(tmp_path, data_dir):
    path = popqa(tmp_path / "popQA.tsv", POPQA | {"extra": 'a "quoted" one'}, POPQA | {"id": "2", "extra": ""})
    builder = builders.prepare("popqa", path, data_dir)
    row = rows(builder, "test")[0]
    assert [answer.decode() for answer in row["possible_answers"]] == ["Ed", "Éd"]
    assert (row["s_pop"], row["o_pop"], row["subj"].decode()) == (12, -2, "Æthel")
    assert texts(builder, "test", "id") == ["1", "2"]
    assert builders.prepare("popqa", tmp_path, data_dir).data_dir == builder.data_dir  # its folder is the same set


BAD_POPQA = {
    "id twice": ({}, ["popQA.tsv:3: row 2: 'id' '1' is there twice"]),
    "blank id": ({"id": " "}, ["row 2: 'id' is blank"]),
    "no JSON": ({"id": "2", "possible_answers": "Ed"}, ["'possible_answers' holds 'Ed', not a JSON list of texts"]),
    "no answers": ({"id": "2", "possible_answers": "[]"}, ["'possible_answers'"]),
    "no texts": ({"id": "2", "possible_answers": '["a", 3]'}, ["'possible_answers'"]),
    "a text": ({"id": "2", "possible_answers": '"Ed"'}, ["'possible_answers'"]),
    "surrogate": ({"id": "2", "possible_answers": '["\\ud83d"]'}, ["'possible_answers' holds half"]),
    "count": ({"id": "2", "s_pop": "1e3"}, ["column 's_pop' holds '1e3', not an integer"]),
    "question": ({"id": "2", "question": " "}, ["column 'question' is blank"]),
}


@pytest.mark.parametrize("name", BAD_POPQA)
def test_bad_popqa(tmp_path, data_dir, name):
    fields, words = BAD_POPQA[name]
    message = error_of("popqa", popqa(tmp_path / "popQA.tsv", POPQA, POPQA | fields), data_dir)
    assert "popQA.tsv:3: row 2: " in message and all(word in message for word in words), message


def test_bad_popqa_header(tmp_path, data_dir):
    without = {key: value for key, value in POPQA.items() if key != "possible_answers"}
    message = error_of("popqa", popqa(tmp_path / "popQA.tsv", without), data_dir)
    assert "popQA.tsv:1: no column 'possible_answers' (there: 'id', " in message
    assert "no file popQA.tsv there" in error_of("popqa", dbpedia(tmp_path / "other"), data_dir)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("set.csv", TABLE),
        ("set.tsv", TABLE.replace(",", "\t")),
        ("set.csv.gz", TABLE.replace("\n", "\r\n")),
        ("set.jsonl", jsonl({"text": "good one", "label": "pos"}, {"text": "bad one", "label": "neg", "x": [1]})),
        ("SET.JSONL.gz", jsonl({"text": "good one", "label": "pos"}, {"text": "bad one", "label": " neg "})),
    ],
)
def test_labelled_text(tmp_path, data_dir, name, content):
    builder = builders.prepare("labelled_text", write(tmp_path / name, content), data_dir)
    assert texts(builder) == ["good one", "bad one"] and labels(builder) == ["pos", "neg"]
    assert builder.info.features["label"].names == ["neg", "pos"] and list(builder.info.splits) == ["train"]
    stem, _, digest = builder.info.config_name.rpartition("-")
    assert stem.lower() == "set" and len(digest) == 8


def test_labelled_text_columns_and_splits(tmp_path, data_dir):
    raw = tmp_path / "my data (ü)"
    write(raw / "train.csv", '\ufeffn,body,class\r\n1,"a, ""b""\nc",10\r\n2,x,9\r\n3,y,10\r\n')
    write(raw / "test.jsonl", jsonl({"n": 4, "body": "z", "class": 9}))
    write(raw / "validation.tsv.gz", "class\tbody\tn\n9\tv\t5\n")
    write(raw / "README.csv", "?")
    columns = {"text_column": "body", "label_column": "class", "id_column": "n"}
    builder = builders.prepare("labelled_text", raw, data_dir, **columns)
    assert builder.info.features["label"].names == ["9", "10"]  # by number
    assert list(builder.info.splits) == ["train", "validation", "test"]
    assert texts(builder) == ['a, "b"\nc', "x", "y"] and labels(builder) == ["10", "9", "10"]
    assert texts(builder, field="id") == ["1", "2", "3"] and texts(builder, "test", "id") == ["4"]
    assert texts(builder, "test") == ["z"] and labels(builder, "validation") == ["9"]
    assert builder.info.config_name.startswith("my_data-")
    # Other options or content are another set beside it; the same ones are the same set.
    others = [builders.prepare("labelled_text", raw, data_dir, **columns, classes=("10", "9"))]
    assert others[0].info.features["label"].names == ["10", "9"]
    write(raw / "test.jsonl", jsonl({"n": 4, "body": "w", "class": 9}))
    others.append(builders.prepare("labelled_text", raw, data_dir, **columns))
    assert len({str(each.data_dir) for each in [builder, *others]}) == 3
    write(raw / "test.jsonl", jsonl({"n": 3, "body": "w", "class": 9}))
    message = error_of("labelled_text", raw, data_dir, **columns)
    assert "test.jsonl:1: row 1: 'n' '3' is there twice" in message  # unique over the splits
    write(raw / "test.jsonl", jsonl({"n": 4, "body": "w", "class": 8}))
    message = error_of("labelled_text", raw, data_dir, **columns)
    assert "test.jsonl:1: row 1: unknown label '8' in column 'class' (those of train: '9', '10')" in message
    write(raw / "test.csv", TABLE)
    assert "both test.csv and test.jsonl" in error_of("labelled_text", raw, data_dir)
    (raw / "test.csv").unlink()
    (raw / "train.csv").unlink()
    assert "no train.csv, train.tsv or train.jsonl there" in error_of("labelled_text", raw, data_dir)


BAD_TABLES = {
    "no column": ("set.csv", "text,class\na,b\n", ["set.csv:1: no column 'label' (there: 'text', 'class')"]),
    "column twice": ("set.csv", "text,label,text\na,b,c\n", ["column 'text' is there twice"]),
    "fields": ("set.csv", "text,label\na,b\nc, d,e\n", ["set.csv:3: 3 fields, the header has 2", "in quotes"]),
    "short": ("set.csv", "text,label\na\n", ["set.csv:2: 1 fields"]),
    "blank text": ("set.csv", "text,label\n  ,b\n", ["set.csv:2: row 1: column 'text' is blank"]),
    "blank label": ("set.csv", "text,label\na, \n", ["set.csv:2: row 1: column 'label' is blank"]),
    "lines in a label": ("set.csv", 'text,label\na,"b\nc"\n', ["not one line of text"]),
    "quote": ("set.csv", 'text,label\na,b\n"c,d\ne,f\n', ["set.csv:3: unbalanced quotes"]),
    "inner quote": ("set.tsv", 'text\tlabel\n5" disk\tb\n', ["set.tsv:2: unbalanced quotes"]),
    "line numbers": ("set.csv", 'text,label\n"a\nb",c\nd\n', ["set.csv:4: 1 fields"]),
    "header only": ("set.csv", "text,label\n", ["no rows"]),
    "empty": ("set.csv", "", ["no rows"]),
    "empty lines": ("set.jsonl", "\n \n", ["no rows"]),
    "garbage": ("set.csv", bytes(range(256)), ["set.csv:1: a NUL byte"]),
    "utf-16": ("set.csv", TABLE.encode("utf-16"), ["set.csv:1: byte 1 of the line is not UTF-8"]),
    "no gzip": ("set.jsonl.gz", None, ["gzip data cut short or damaged"]),
    "not JSON": ("set.jsonl", jsonl({"text": "a", "label": 1}) + "{", ["set.jsonl:2: not JSON", "repair"]),
    "array": ("set.jsonl", "[]\n", ["set.jsonl:1: a JSON array, not an object"]),
    "no field": ("set.jsonl", '{"text": "a"}\n', ["set.jsonl:1: row 1: no column 'label' (there: 'text')"]),
    "number": ("set.jsonl", '{"text": 1, "label": 1}\n', ["column 'text' is a JSON number, not a string"]),
    "true": ("set.jsonl", '{"text": "a", "label": true}\n', ["column 'label' is a JSON boolean, not a text or"]),
    "null": ("set.jsonl", '{"text": "a", "label": null}\n', ["column 'label' is a JSON null"]),
    "half": ("set.jsonl", '{"text": "a", "label": 0.5}\n', ["column 'label' is a JSON number"]),
    "surrogate": ("set.jsonl", '{"text": "\\ud83d", "label": 1}\n', ["surrogate"]),
    "label surrogate": ("set.jsonl", '{"text": "a", "label": "\\ud83d"}\n', ["surrogate"]),
    "suffix": ("set.txt", "a", ["set.txt: not a .csv, .tsv, .jsonl file"]),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables(tmp_path, data_dir, name):
    file, content, words = BAD_TABLES[name]
    path = tmp_path / file
    path.write_bytes(b"no gzip") if content is None else write(path, content)
    message = error_of("labelled_text", path, data_dir)
    assert message.startswith(str(path)) and all(word in message for word in words), message


def test_bad_options(tmp_path, data_dir):
    path = write(tmp_path / "set.csv", TABLE)
    message = error_of("labelled_text", path, data_dir, classes=("pos", "neutral"))
    assert "set.csv:3: row 2: unknown label 'neg' in column 'label' (the classes given: 'pos', 'neutral')" in message
    assert "name one twice" in error_of("labelled_text", path, data_dir, classes=("pos", "pos"))
    assert "are empty" in error_of("labelled_text", path, data_dir, classes=())
    assert "one is named twice" in error_of("labelled_text", path, data_dir, label_column="text")
    assert "no column 'n'" in error_of("labelled_text", path, data_dir, id_column="n")
    assert "has no option 'text_column'" in error_of("fewrel", path, data_dir, text_column="x")
    assert "no such builder; the builders: fewrel, dbpedia14" in error_of("glue", path, data_dir)


def test_wikipedia_is_a_corpus(tmp_path, data_dir, monkeypatch):
    raw = tmp_path / "raw"
    write(raw / "b.jsonl", jsonl(ARTICLES[1]))
    write(raw / "a.jsonl.gz", jsonl(ARTICLES[0], {"id": "blank", "title": "B", "text": ""}))
    builder = builders.prepare("wikipedia_jsonl", raw, data_dir)
    assert texts(builder) == ["one", "", "two\nlines"] and texts(builder, field="title") == ["A", "B", ""]
    shutil.rmtree(raw)
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    documents = list(open_source("tfds:wikipedia_jsonl").documents())
    assert [(document.id, document.text) for document in documents] == [("a", "one"), ("7", "two\nlines")]


BAD_ARTICLES = {
    "id twice": (jsonl(ARTICLES[0], ARTICLES[1] | {"id": "a"}), ["a.jsonl:2: row 2: 'id' 'a' is there twice"]),
    "no id": (jsonl({"title": "A", "text": "x"}), ["a.jsonl:1: row 1: no column 'id'"]),
    "no title": (jsonl({"id": 1, "text": "x"}), ["no column 'title'"]),
    "null": (jsonl({"id": 1, "title": None, "text": "x"}), ["field 'title' is a JSON null, not a string"]),
    "text": (jsonl({"id": 1, "title": "", "text": ["x"]}), ["field 'text' is a JSON array"]),
    "surrogate": ('{"id": 1, "title": "", "text": "\\ud83d"}', ["field 'text' holds half"]),
    "empty": ("", ["no rows"]),
}


@pytest.mark.parametrize("name", BAD_ARTICLES)
def test_bad_articles(tmp_path, data_dir, name):
    content, words = BAD_ARTICLES[name]
    message = error_of("wikipedia_jsonl", write(tmp_path / "a.jsonl", content), data_dir)
    assert message.startswith(str(tmp_path / "a.jsonl")) and all(word in message for word in words), message


def test_bad_article_files(tmp_path, data_dir):
    write(tmp_path / "raw" / "a.txt", "x")
    assert "a.txt: not a .jsonl or .jsonl.gz file" in error_of("wikipedia_jsonl", tmp_path / "raw", data_dir)


def test_several_files(tmp_path, data_dir, monkeypatch):
    monkeypatch.setattr(builders, "_SHARD_BYTES", 1000)
    path = write(tmp_path / "a.jsonl", jsonl(*({"id": i, "title": "", "text": "x" * i} for i in range(100))))
    builder = builders.prepare("wikipedia_jsonl", path, data_dir)
    lengths = builder.info.splits["train"].shard_lengths
    assert len(lengths) == 10 and sum(lengths) == 100
    assert texts(builder) == ["x" * i for i in range(100)]  # in the order of the file
    last = builder.as_data_source(split="train[98:]")
    assert [row["id"] for row in last] == [b"98", b"99"]
    assert len(files(data_dir)) == len(lengths) + 3


def test_rows_are_streamed(tmp_path, data_dir, monkeypatch):
    """No row is held: each is gone when the next but one is made."""

    class Text(str):
        pass

    alive = []

    def rows(self, split):
        for number in range(50):
            text = Text(number)
            alive.append(weakref.ref(text))
            yield {"id": "", "title": "", "text": text}
            assert sum(each() is not None for each in alive) <= 2

    monkeypatch.setattr(builders.WikipediaJsonl, "_rows", rows)
    builder = builders.prepare("wikipedia_jsonl", write(tmp_path / "a.jsonl", "{}"), data_dir)
    assert len(rows_of := texts(builder)) == 50 and rows_of[7] == "7"


def test_prepared_once(tmp_path, data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    raw = dbpedia(tmp_path / "raw")
    assert builders.open_prepared("dbpedia14") is None
    first = builders.prepare("dbpedia14", raw)
    monkeypatch.setattr(builders, "lines_of", None)  # whoever reads a raw file again fails
    again = builders.prepare("dbpedia14", raw)
    moved = raw.rename(tmp_path / "moved")
    assert first.data_dir == again.data_dir == builders.prepare("dbpedia14", moved).data_dir
    shutil.rmtree(moved)
    assert texts(builders.open_prepared("dbpedia14")) == texts(first)
    by_name = tfds.data_source("dbpedia14", split="train", data_dir=data_dir)  # for any TFDS program
    assert [row["title"] for row in by_name] == [b"", b"T"]
    assert sorted(path.name for path in data_dir.iterdir()) == ["dbpedia14"]


def test_other_content_is_refused(tmp_path, data_dir):
    raw = fewrel(tmp_path / "raw")
    builder = builders.prepare("fewrel", raw, data_dir)
    fewrel(raw, names={"P9": ["nine", ""], "P10": ["ten", ""]})
    message = error_of("fewrel", raw, data_dir)
    assert message.startswith(f"{builder.data_dir}: prepared from other content than {raw}; ")
    assert "delete that folder" in message and "TFDS_DATA_DIR" in message
    (raw / "pid2name.json").unlink()
    assert builders.prepare("fewrel", raw, data_dir).data_dir == builder.data_dir
    (Path(builder.data_dir) / "metadata.json").unlink()  # a set of that name from somebody else
    assert "prepared from other content" in error_of("fewrel", raw, data_dir)
    (Path(builder.data_dir) / "dataset_info.json").write_text("{")
    assert "damaged" in error_of("fewrel", raw, data_dir)


KILLED = """
import os, signal, sys
from bert6_jax.data import builders
def rows(self, split):
    yield {"text": "a", "title": "", "label": 0}
    if split == "test":
        os.kill(os.getpid(), signal.SIGKILL)
builders.DBpedia14._rows = rows
builders.prepare("dbpedia14", sys.argv[1], sys.argv[2])
"""


def test_killed(tmp_path, data_dir):
    raw = dbpedia(tmp_path / "raw")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", KILLED, raw, data_dir], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(data_dir.rglob("incomplete*")) and builders.open_prepared("dbpedia14", data_dir) is None
    builder = builders.prepare("dbpedia14", raw, data_dir)
    assert len(texts(builder)) == 2 and not list(data_dir.rglob("incomplete*"))


def test_interrupted(tmp_path, data_dir, monkeypatch):
    def rows(self, split):
        yield {"text": "a", "title": "", "label": 0}
        raise KeyboardInterrupt

    monkeypatch.setattr(builders.DBpedia14, "_rows", rows)
    with pytest.raises(KeyboardInterrupt):
        builders.prepare("dbpedia14", dbpedia(tmp_path / "raw"), data_dir)
    assert not files(data_dir)


def test_two_at_once(tmp_path, data_dir, monkeypatch):
    raw, written = dbpedia(tmp_path / "raw"), []
    real, both = builders._write, threading.Barrier(2, timeout=20)
    opened = builders.open_prepared

    def open_together(*args):
        found = opened(*args)
        if found is None:
            both.wait()  # both have seen that nothing is there
        return found

    monkeypatch.setattr(builders, "open_prepared", open_together)
    monkeypatch.setattr(builders, "_write", lambda *args: (written.append(1), real(*args)))
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(builders.prepare("dbpedia14", raw, data_dir))) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and len(written) == 1 and texts(found[0]) == texts(found[1])


def test_without_locks_the_first_wins(tmp_path, data_dir, monkeypatch):
    raw = dbpedia(tmp_path / "raw")

    def no_lock(*_):
        raise OSError("no locks")

    def slower(builder, progress):
        real(builder, progress)
        real(builders.DBpedia14(raw, data_dir=data_dir), progress)
        raise OSError(39, "Directory not empty")

    real = builders._write
    monkeypatch.setattr(builders.fcntl, "flock", no_lock)
    monkeypatch.setattr(builders, "_write", slower)
    assert len(texts(builders.prepare("dbpedia14", raw, data_dir))) == 2


def test_cannot_be_written(tmp_path, data_dir, monkeypatch):
    raw = dbpedia(tmp_path / "raw")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written .Not a directory.; make room or set TFDS_DATA_DIR"):
        builders.prepare("dbpedia14", raw, tmp_path / "file")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builders, "_write", full)
    assert "cannot be written (No space left on device)" in error_of("dbpedia14", raw, data_dir)


def test_command_line(tmp_path, data_dir, capsys, monkeypatch):
    path = write(tmp_path / "set.csv", "t,l\na,x\nb,y\nc,x\n")
    arguments = ["labelled_text", str(path), "--data-dir", str(data_dir), "--text-column", "t", "--label-column"]
    assert builders.main([*arguments, "l"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("labelled_text/set-") and f": {data_dir}" in out and "  train: 3 rows\n" in out and not err
    for bad, words in (
        ([*arguments, "z"], "no column 'z'"),
        (["glue", str(path)], "invalid choice: 'glue'"),
        (["fewrel"], "required: RAW_PATH"),
        (["fewrel", str(path), "--id-column", "n"], "has no option 'id_column'"),
    ):
        assert builders.main(bad) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("error: ") and err.count("\n") == 1 and words in err

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(builders, "prepare", interrupted)
    assert builders.main(["fewrel", str(path)]) == 130


def test_real_popqa_and_wikipedia(shared_data, data_dir):
    builder = builders.prepare("popqa", shared_data / "popqa", data_dir)
    assert builder.info.splits["test"].num_examples == 1000
    builder = builders.prepare("wikipedia_jsonl", shared_data / "wikipedia" / "part-06.jsonl.gz", data_dir)
    source = open_source(shared_data / "wikipedia" / "part-06.jsonl.gz")
    assert texts(builder) == [document.text for document in source.documents()]
