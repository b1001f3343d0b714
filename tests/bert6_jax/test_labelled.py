"""Classification sets and their splits: what is opened, one line for bad input, and the promises of a split."""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bert6_jax.data.labelled import LabelledText, open_task, split_rows
from bert6_jax.errors import InputError

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def tfds_dir(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


def fewrel(folder: Path, names=True) -> Path:
    def example(*tokens):
        return {"tokens": list(tokens), "h": [tokens[0], "", [[0]]], "t": [tokens[-1], "", [[len(tokens) - 1]]]}

    folder.mkdir(exist_ok=True)
    train = {"P9": [example("a", "b"), example("c", "d")], "P10": [example("é", "f")]}
    (folder / "train_wiki.json").write_text(json.dumps(train))
    (folder / "val_wiki.json").write_text(json.dumps({"P1": [example("v", "w")]}))
    if names:
        (folder / "pid2name.json").write_text(json.dumps({"P9": ["same", ""], "P10": ["same", ""], "P1": ["v", ""]}))
    return folder


def dbpedia(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "train.csv").write_text('1,"","a"\n2,"","b"\n')
    (folder / "test.csv").write_text('2,"T","c"\n')
    (folder / "classes.txt").write_text("A\nB\n")
    return folder


def make(label_N, texts=None, test_N=None, classes=None) -> LabelledText:
    label_N = np.asarray(label_N, np.int32)
    classes = tuple(classes or (f"class {i}" for i in range(label_N.max() + 1)))
    texts = texts if texts is not None else [f"text {i}" for i in range(len(label_N))]
    return LabelledText("made", "", classes, list(texts), label_N, test_N)


def error_of(call, *arguments, **options) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_fewrel(tmp_path, tfds_dir):
    assert error_of(open_task, "fewrel") == (
        f"fewrel: not prepared in {tfds_dir}; give the folder of its raw files (--task-data FOLDER), once"
    )
    raw = fewrel(tmp_path / "raw")
    task = open_task("fewrel", raw)
    assert task.name == "fewrel" and task.classes == ("P10 same", "P9 same") and task.test_N is None
    assert task.texts == ["a b", "c d", "é f"] and task.label_N.tolist() == [1, 1, 0]
    assert task.label_N.dtype == np.int32
    shutil.rmtree(raw)
    assert open_task("fewrel").fingerprint == task.fingerprint
    (tmp_path / "fewrel").mkdir()  # a name wins over a folder of that name
    assert open_task("fewrel", data_dir=tfds_dir).texts == task.texts
    assert "no such file or folder" in error_of(open_task, "fewrel", raw)
    fewrel(raw, names=False)
    (raw / "pid2name.json").unlink(missing_ok=True)
    assert "prepared from other content" in error_of(open_task, "fewrel", raw)
    plain = open_task("fewrel", raw, data_dir=tmp_path / "other")
    assert plain.classes == ("P10", "P9") and plain.fingerprint != task.fingerprint


def test_dbpedia(tmp_path, tfds_dir):
    task = open_task("dbpedia", dbpedia(tmp_path / "raw"))
    assert (task.name, task.classes, task.texts) == ("dbpedia14", ("A", "B"), ["a", "b", "c"])
    assert task.label_N.tolist() == [0, 1, 1] and task.test_N.tolist() == [False, False, True]
    again = open_task("tfds:dbpedia14")
    assert again.fingerprint == task.fingerprint and again.name == "dbpedia14"
    assert open_task("tfds:dbpedia14:1.0.0", text_column="title").texts == ["", "", "T"]
    assert "feature 'label'" not in error_of(open_task, "tfds:dbpedia14", text_column="body")
    message = error_of(open_task, "tfds:dbpedia14", text_column="body")
    assert "no Text feature 'body' (Text features: text, title); name one of them (--text-column)" in message


def test_path(tmp_path, tfds_dir):
    path = tmp_path / "my.set.csv"
    path.write_text("body,class\nx,1\ny,2\n")
    task = open_task(path, text_column="body", label_column="class")
    assert (task.name, task.classes, task.texts, task.test_N) == ("my_set", ("1", "2"), ["x", "y"], None)
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(path, folder / "train.csv")
    (folder / "test.csv").write_text("body,class\nz,1\n")
    (folder / "validation.csv").write_text("body,class\nv,1\n")
    task = open_task(str(folder), text_column="body", label_column="class")
    assert task.texts == ["x", "y", "z"] and task.test_N.tolist() == [False, False, True]
    assert "my.set.csv:1: no column 'text' (there: 'body', 'class')" in error_of(open_task, path)
    assert "no such task or file; give fewrel, dbpedia" in error_of(open_task, tmp_path / "none.csv")
    assert "--task-data raw is only for fewrel, dbpedia" in error_of(open_task, path, "raw")
    path.write_text("text,label\nx,1\ny,1\n")
    assert "1 class; a classification needs two" in error_of(open_task, path)


def test_fingerprint(tmp_path, tfds_dir):
    def fingerprint(train, test=None, classes=None):
        folder = tmp_path / "f"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "train.csv").write_text(f"text,label\n{train}")
        if test:
            (folder / "test.csv").write_text(f"text,label\n{test}")
        return open_task(folder).fingerprint

    same = fingerprint("ab,x\nc,y\n")
    assert fingerprint("ab,x\r\nc,y\r\n") == same
    others = [
        fingerprint("a,x\nbc,y\n"),
        fingerprint("c,y\nab,x\n"),
        fingerprint("ab,y\nc,x\n"),
        fingerprint("ab,x\nc,z\n"),
        fingerprint("ab,x\nc,y\nd,x\n"),
        fingerprint("ab,x\nc,y\n", "d,x\n"),
    ]
    assert len({same, *others}) == 7


def prepare(tfds_dir, set_name, features, splits, file_format="array_record"):
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        __module__ = "builders"  # no dot: TFDS would look for a package's files with a library of its own
        name = set_name
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(rows) for split, rows in splits.items()}

        def _generate_examples(self, rows):
            yield from enumerate(rows)

    tfds.disable_progress_bar()
    Builder(data_dir=str(tfds_dir), file_format=file_format).download_and_prepare()


def test_tfds(tfds_dir):
    import tensorflow_datasets as tfds

    text, label = tfds.features.Text(), tfds.features.ClassLabel(names=["no", "yes"])
    row = {"sentence": "ä", "kind": "no"}
    prepare(tfds_dir, "one", {"sentence": text, "kind": label}, {"train": [row], "test": [row | {"kind": -1}]})
    task = open_task("tfds:one:1.2.0")
    assert (task.texts, task.classes, task.label_N.tolist()) == (["ä"], ("no", "yes"), [0])
    assert task.test_N is None  # its labels are secret
    prepare(tfds_dir, "secret", {"sentence": text, "kind": label}, {"train": [row | {"kind": -1}]})
    assert "split 'train' has rows without a label" in error_of(open_task, "tfds:secret")
    prepare(tfds_dir, "plain", {"text": text}, {"train": [{"text": "a"}]})
    assert "no ClassLabel feature 'label' (ClassLabel features: none)" in error_of(open_task, "tfds:plain")
    prepare(tfds_dir, "other_split", {"text": text, "label": label}, {"other": [{"text": "a", "label": 0}]})
    assert "no split 'train'" in error_of(open_task, "tfds:other_split")
    prepare(tfds_dir, "bytes", {"text": text, "label": label}, {"train": [{"text": b"\xff", "label": 0}]})
    assert "bytes:train[0]: byte 1" in error_of(open_task, "tfds:bytes")
    message = error_of(open_task, "tfds:imdb_reviews/plain_text")
    assert f"not prepared in {tfds_dir}; prepare it once with: TFDS_DATA_DIR=" in message
    assert "not a TFDS name" in error_of(open_task, "tfds:one:1.2.0:train")
    info = tfds_dir / "one" / "1.2.0" / "dataset_info.json"
    original = info.read_text()
    info.write_text(original.replace("array_record", "tfrecord"))
    assert "without random access" in error_of(open_task, "tfds:one")
    info.write_text(original)
    (file,) = info.parent.glob("*train*")
    file.write_bytes(file.read_bytes()[:100])
    assert "is damaged" in error_of(open_task, "tfds:one")


def test_tfds_not_installed(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "bert6_jax.data.builders", raising=False)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,b\n")
    for spec in ("fewrel", "tfds:glue/cola", str(path)):
        assert error_of(open_task, spec) == f"{spec}: needs TFDS; pip install 'bert6-jax[tfds]'"


def tangled(seed: int, rows: int = 600, classes: int = 4) -> LabelledText:
    """Many texts that occur several times, also under several labels and in other spelling."""
    rng = np.random.default_rng(seed)
    texts = [("Some  Text {}", "some text {}\n", " SOME text {}")[i % 3].format(rng.integers(400)) for i in range(rows)]
    return make(np.arange(rows) % classes, texts)


def keys(task, rows):
    return {" ".join(task.texts[row].casefold().split()) for row in rows}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("train_per_class", [0, 60])
def test_split_by_text(seed, train_per_class):
    task = tangled(seed)
    split = split_rows(task, seed, train_per_class, 30)
    assert split.train.dtype == split.test.dtype == np.int64
    assert not keys(task, split.train) & keys(task, split.test) and split.shared_texts == 0
    assert np.bincount(task.label_N[split.test]).tolist() == [30] * 4
    if train_per_class:
        assert np.bincount(task.label_N[split.train]).tolist() == [60] * 4
    else:
        assert sorted([*split.train, *split.test]) == list(range(600))
    assert len(set(split.train.tolist())) == len(split.train)
    again = split_rows(tangled(seed), seed, train_per_class, 30)
    assert all(map(np.array_equal, split, again))
    assert not np.array_equal(split.test, split_rows(task, seed + 1, train_per_class, 30).test)


@pytest.mark.parametrize("seed", range(3))
def test_split_at_random(seed):
    task = tangled(seed)
    split = split_rows(task, seed, 60, 30, by="random")
    assert np.bincount(task.label_N[split.test]).tolist() == [30] * 4
    assert np.bincount(task.label_N[split.train]).tolist() == [60] * 4
    assert not set(split.train.tolist()) & set(split.test.tolist())
    train_keys = keys(task, split.train)
    assert split.shared_texts == sum(bool(keys(task, [row]) & train_keys) for row in split.test) > 0


@pytest.mark.parametrize("by", ["text", "random"])
@pytest.mark.parametrize("official", [False, True])
def test_split_does_not_depend_on_the_numbers_of_the_classes(by, official):
    task = tangled(0)
    test_N = np.arange(600) % 3 == 0 if official else None
    renumbered = np.array([2, 0, 3, 1], np.int32)[task.label_N]
    one, other = (
        split_rows(make(label_N, task.texts, test_N), 5, 40, 20, by) for label_N in (task.label_N, renumbered)
    )
    assert all(map(np.array_equal, one, other))


def test_rows_come_in_random_order():
    task = make(np.repeat(np.arange(4), 250))
    for by in ("text", "random"):
        for rows in split_rows(task, 0, 0, 50, by)[:2]:
            assert abs(np.corrcoef(np.arange(len(rows)), rows)[0, 1]) < 0.2
            assert len(set(task.label_N[rows[:50]].tolist())) == 4


@pytest.mark.parametrize("by", ["text", "random"])
def test_official_split(by):
    task = tangled(1)
    task = make(task.label_N, task.texts, np.arange(600) % 5 == 4)
    split = split_rows(task, 3, 30, 20, by)
    assert task.test_N[split.test].all() and not task.test_N[split.train].any()
    assert np.bincount(task.label_N[split.test]).tolist() == [20] * 4
    assert np.bincount(task.label_N[split.train]).tolist() == [30] * 4
    assert (split.shared_texts == 0) == (by == "text")
    whole = split_rows(task, 3, 0, 0, by)
    assert sorted(whole.test.tolist()) == list(range(4, 600, 5))
    left = {
        row for row in range(600) if row % 5 != 4 and (by == "random" or not keys(task, [row]) & keys(task, whole.test))
    }
    assert set(whole.train.tolist()) == left


def test_no_test_rows():
    split = split_rows(tangled(0), 0, 10, 0)
    assert len(split.test) == 0 and len(split.train) == 40 and split.shared_texts == 0


def test_every_small_split_is_used_alike():
    """Each of 6 texts of a class is in test equally often."""
    task = make(np.arange(12) % 2)
    count = np.zeros(12)
    for seed in range(300):
        count[split_rows(task, seed, 0, 2).test] += 1
    assert abs(count - 100).max() < 40  # five standard deviations


def test_classes_too_small():
    task = make([0] * 10 + [1] * 5, classes=("big", "small"))
    for by in ("text", "random"):
        message = error_of(split_rows, task, 0, 4, 2, by)
        assert message == (
            "made: class 'small' has 5 rows, 3 of them left to train beside the test rows; the split needs 4 to train "
            "and 2 to test; give a smaller --train-per-class or --test-per-class"
        )
        message = error_of(split_rows, task, 0, 1, 6, by)
        assert message.startswith("made: class 'small' has 5 rows, the split needs 1 to train and 6 to test; give a ")
        assert "0 of them left to train" in error_of(split_rows, task, 0, 0, 5, by)
    assert "class 'small' has 5 rows, the split needs some to train and 1 to test" in error_of(
        split_rows,
        make([0] * 10 + [1] * 5, [f"t{i}" for i in range(10)] + ["same"] * 5, classes=("big", "small")),
        0,
        0,
        1,
    )
    official = make([0, 1, 0, 1], test_N=np.array([True, False, False, False]), classes=("a", "b"))
    assert "class 'b' has 0 rows in the test part" in error_of(split_rows, official, 0, 0, 0)
    absent = make([0, 0, 0], classes=("a", "b"))
    assert "class 'b' has 0 rows" in error_of(split_rows, absent, 0, 1, 1)


def test_bad_settings():
    task = tangled(0)
    assert error_of(split_rows, task, -1, 1, 1) == "seed is -1; give 0 or more"
    assert "train_per_class is -1" in error_of(split_rows, task, 0, -1, 1)
    assert "test_per_class is -2" in error_of(split_rows, task, 0, 1, -2)
    assert "give 'text' or 'random'" in error_of(split_rows, task, 0, 1, 1, "label")


def test_large_split_is_fast():
    task = make(np.arange(100_000) % 14)
    _ = task.text_N
    start = time.perf_counter()
    split_rows(task, 0, 100, 100)
    assert time.perf_counter() - start < 2


def test_real_sets(shared_data, tmp_path, tfds_dir):
    raw = tmp_path / "fewrel"
    raw.mkdir()
    for name in ("train_wiki.json", "pid2name.json"):  # without val_wiki.json, which is not read here
        (raw / name).symlink_to(shared_data / "fewrel" / name)
    task = open_task("fewrel", raw)
    assert (len(task.texts), len(task.classes), len(set(task.texts))) == (44_800, 64, 43_474)
    assert "P931 place served by transport hub" in task.classes
    pairs = np.unique(task.text_N.astype(np.int64) * 64 + task.label_N)
    assert (np.bincount(pairs // 64) > 1).sum() == 526
    split = split_rows(task, 0, 630, 70)
    assert (len(split.train), len(split.test), split.shared_texts) == (40_320, 4_480, 0)
    assert not {task.texts[row] for row in split.train} & {task.texts[row] for row in split.test}
    assert 170 < split_rows(task, 0, 630, 70, "random").shared_texts < 270
    task = open_task("dbpedia", shared_data / "dbpedia14")
    assert (len(task.texts), int(task.test_N.sum()), len(task.classes)) == (19_301, 5_301, 14)
    split = split_rows(task, 0, 100, 100)
    assert (len(split.train), len(split.test), split.shared_texts) == (1_400, 1_400, 0)
    task = open_task(shared_data / "news_headlines" / "news.csv")
    assert (len(task.texts), len(task.classes), task.name) == (25_000, 5, "news")
