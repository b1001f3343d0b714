"""Classification sets in memory, and class-balanced splits of them.

Shapes: N rows, C classes. A set is opened by what `open_task` calls a spec:

    fewrel, dbpedia            prepared by `bert6_jax.data.builders`, at the first use from the raw folder `path`
    tfds:NAME[/CONFIG][:VERSION]   any prepared TFDS set with a text and a class feature
    PATH                       labelled text, a file or a folder of splits (see `builders`)

Prepared sets are read from the folder of TFDS (`TFDS_DATA_DIR`), without TensorFlow; nothing is ever downloaded.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bert6_jax.data.sources import decode_utf8, first_line, prepared_tfds
from bert6_jax.errors import InputError

NAMED = {"fewrel": "fewrel", "dbpedia": "dbpedia14"}  # spec: builder
_TFDS_SPEC = re.compile(r"tfds:(?P<name>\w+(?:/[\w.+-]+)?)(?::(?P<version>\d+\.\d+\.\d+))?")
_CHUNK = 4096  # rows read in one call


@dataclass(frozen=True, eq=False)
class LabelledText:
    """N texts with a class each; `test_N` is the official split of the set (None: it has none)."""

    name: str
    fingerprint: str  # sha256 over texts, labels, classes, split
    classes: tuple[str, ...]  # C names
    texts: list[str]  # N
    label_N: np.ndarray  # int32 [N]
    test_N: np.ndarray | None  # bool [N]

    @cached_property
    def text_N(self) -> np.ndarray:
        """int32 [N]: equal where the texts are, whatever their case and white space."""
        known: dict[str, int] = {}
        numbers = (known.setdefault(" ".join(text.casefold().split()), len(known)) for text in self.texts)
        return np.fromiter(numbers, np.int32, len(self.texts))


class Split(NamedTuple):
    """Rows of a `LabelledText`, both in random order."""

    train: np.ndarray  # int64 [rows]
    test: np.ndarray  # int64 [rows]
    shared_texts: int  # test rows whose text also stands in train


def open_task(
    spec: str | os.PathLike,
    path: str | os.PathLike | None = None,
    *,
    text_column: str = "text",
    label_column: str = "label",
    data_dir: str | os.PathLike | None = None,
) -> LabelledText:
    """A classification set.

    `fewrel` is the split `train` of 64 relations (those of `validation` are others), classes named by pid2name.json
    where it was there. Of splits only `train` and `test` are read; a test split without labels counts as none.

    Args:
      spec: see the module's table; a name wins over a file of that name.
      path: the folder of the raw files of `fewrel` or `dbpedia`; only needed before the set is prepared.
      text_column, label_column: of PATH, the columns; of `tfds:`, the features where there are several.
      data_dir: the folder of TFDS; default `TFDS_DATA_DIR`, else `~/tensorflow_datasets`.

    Raises:
      InputError: nothing of that name, raw files that are broken, a set prepared from other content than `path`,
        a set without a text or class feature, fewer than two classes.
    """
    spec = os.fspath(spec)
    if path is not None and spec not in NAMED:
        raise InputError(f"{spec}: --task-data {path} is only for {', '.join(NAMED)}; leave it out")
    if spec in NAMED:
        builders = _builders(spec)
        name = NAMED[spec]
        if path is not None:
            builder = builders.prepare(name, path, data_dir)
        else:
            builder = builders.open_prepared(name, data_dir)
        if builder is None:
            raise InputError(
                f"{spec}: not prepared in {builders.default_data_dir(data_dir)}; give the folder of its raw files "
                "(--task-data FOLDER), once"
            )
        splits = ("train",) if spec == "fewrel" else ("train", "test")
        task = _read(name, builder, *_fields(spec, builder, "text", "label"), splits)
        return _name_relations(task, builders.metadata(builder).get("names") or {}) if spec == "fewrel" else task
    if spec.startswith("tfds:"):
        builder = _open_tfds(spec, data_dir)
        return _read(spec.removeprefix("tfds:"), builder, *_fields(spec, builder, text_column, label_column))
    file = Path(spec).expanduser()
    if not file.exists():
        raise InputError(
            f"{spec}: no such task or file; give {', '.join(NAMED)}, tfds:NAME, or a .csv, .tsv or .jsonl file of "
            "labelled text"
        )
    builder = _builders(spec).prepare(
        "labelled_text", file, data_dir, text_column=text_column, label_column=label_column
    )
    return _read(builder.builder_config.name.rpartition("-")[0], builder, "text", "label")


def split_rows(task: LabelledText, seed: int, train_per_class: int, test_per_class: int, by: str = "text") -> Split:
    """A class-balanced split into train and test rows, the same for the same rows and seed.

    Args:
      task: the set. With an official split the train rows come from its train part and the test rows from its test
        part; without one both come from all rows.
      seed: 0 or more.
      train_per_class: rows a class; 0 for all that are left after the test rows.
      test_per_class: rows a class; 0 for none, or for all of an official test part.
      by: "text" keeps the rows of one text (compared without case and white space) on one side, and with an official
        split drops the train rows whose text is among the chosen test rows; "random" looks at rows alone.

    Raises:
      InputError: a class with fewer rows than asked for, or settings outside their range.
    """
    for option, value in (("seed", seed), ("train_per_class", train_per_class), ("test_per_class", test_per_class)):
        if value < 0:
            raise InputError(f"{option} is {value}; give 0 or more")
    if by not in ("text", "random"):
        raise InputError(f"split by {by!r}; give 'text' or 'random'")
    rng = np.random.Generator(np.random.Philox(key=seed))
    rows = rng.permutation(len(task.texts))
    if task.test_N is not None:
        test = rows[task.test_N[rows]]
        test = test[_rank(task.label_N[test]) < (test_per_class or len(rows))]
        rest = rows[~task.test_N[rows]]
        if by == "text":
            rest = rest[~np.isin(task.text_N[rest], task.text_N[test])]
    elif by == "random":
        chosen = _rank(task.label_N[rows]) < test_per_class
        test, rest = rows[chosen], rows[~chosen]
    else:
        chosen = _whole_texts(task, rng, test_per_class)
        test, rest = rows[chosen[rows]], rows[~chosen[rows]]
    train = rest[_rank(task.label_N[rest]) < (train_per_class or len(rows))]
    _check_counts(task, train, rest, test, train_per_class, test_per_class)
    shared = np.isin(task.text_N[test], task.text_N[train])
    return Split(train.astype(np.int64), test.astype(np.int64), int(shared.sum()))


def _whole_texts(task: LabelledText, rng: np.random.Generator, per_class: int) -> np.ndarray:
    """bool [N]: the rows of the texts that fit, in random order, while no class gets more than `per_class`."""
    place = rng.permutation(int(task.text_N.max(initial=-1)) + 1)[task.text_N]
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1)).tolist()
    rows, labels = order.tolist(), task.label_N[order].tolist()
    room, left = [per_class] * len(task.classes), per_class * len(task.classes)
    chosen = np.zeros(len(rows), bool)
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        if not left:
            break
        group = labels[start:end]
        if all(room[label] >= group.count(label) for label in set(group)):
            left -= len(group)
            for row, label in zip(rows[start:end], group, strict=True):
                room[label] -= 1
                chosen[row] = True
    return chosen


def _rank(label_n: np.ndarray) -> np.ndarray:
    """int [n]: how many earlier entries have the same label."""
    order = np.argsort(label_n, kind="stable")
    ordered = label_n[order]
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered, side="left")
    return rank


def _check_counts(task, train, rest, test, train_per_class: int, test_per_class: int) -> None:
    classes = len(task.classes)
    there = np.bincount(task.label_N, minlength=classes)
    left, tested, trained = (np.bincount(task.label_N[rows], minlength=classes) for rows in (rest, test, train))
    official = task.test_N is not None
    test_needs = test_per_class or int(official)
    train_needs = max(train_per_class, 1)
    for number, name in enumerate(task.classes):
        needs = f"the split needs {train_per_class or 'some'} to train and {test_per_class or 'no'} to test"
        if tested[number] < test_needs:
            part = f"{tested[number]:,} rows in the test part" if official else f"{there[number]:,} rows"
            raise InputError(f"{task.name}: class {name!r} has {part}, {needs}; give a smaller --test-per-class")
        if trained[number] < train_needs:
            raise InputError(
                f"{task.name}: class {name!r} has {there[number]:,} rows, {left[number]:,} of them left to train "
                f"beside the test rows; {needs}; give a smaller --train-per-class or --test-per-class"
            )


def _builders(spec: str):
    try:
        return importlib.import_module("bert6_jax.data.builders")
    except ImportError as error:
        raise InputError(f"{spec}: needs TFDS; pip install 'bert6-jax[tfds]'") from error


def _open_tfds(spec: str, data_dir: str | os.PathLike | None):
    """The prepared set as a read-only builder."""
    folder = _builders(spec).default_data_dir(data_dir)
    match = _TFDS_SPEC.fullmatch(spec)
    if not match:
        raise InputError(f"{spec}: not a TFDS name; write tfds:NAME[/CONFIG][:VERSION] (train and test are read)")
    name = match["name"] + (f":{match['version']}" if match["version"] else "")
    return prepared_tfds(spec, name, folder)[0]


def _fields(spec: str, builder, text: str, label: str) -> tuple[str, str]:
    """The names of the text and of the class feature."""
    from tensorflow_datasets import features

    found = []
    for kind, wanted, option in ((features.Text, text, "text"), (features.ClassLabel, label, "label")):
        there = sorted(key for key, feature in builder.info.features.items() if isinstance(feature, kind))
        field = wanted if wanted in there else there[0] if len(there) == 1 else None
        if field is None:
            word = kind.__name__
            raise InputError(
                f"{spec}: no {word} feature {wanted!r} ({word} features: {', '.join(there) or 'none'}); "
                f"name one of them (--{option}-column)"
            )
        found.append(field)
    return found[0], found[1]


def _read(name: str, builder, text: str, label: str, splits: tuple[str, ...] = ("train", "test")) -> LabelledText:
    feature = builder.info.features[label]
    if "train" not in builder.info.splits:
        there = ", ".join(builder.info.splits) or "none"
        raise InputError(f"{name}: no split 'train' in {builder.data_dir} (splits: {there}); give a set that has one")
    texts: list[str] = []
    labels: list[int] = []
    tests: list[bool] = []
    for split in splits:
        if split not in builder.info.splits:
            continue
        some_texts, some_labels = _rows(name, builder, split, text, label)
        if any(number < 0 for number in some_labels):  # TFDS writes -1 for a label that is kept secret
            if split == "train":
                raise InputError(f"{name}: split 'train' has rows without a label; give a set whose rows have one")
            continue
        texts += some_texts
        labels += some_labels
        tests += [split == "test"] * len(some_texts)
    classes = tuple(feature.names or map(str, range(feature.num_classes or max(labels, default=-1) + 1)))
    return _task(name, classes, texts, np.array(labels, np.int32), np.array(tests, bool) if any(tests) else None)


def _rows(name: str, builder, split: str, text: str, label: str) -> tuple[list[str], list[int]]:
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({field: builder.info.features[field] for field in (text, label)})
    try:
        # Raw records in bulk, only two features of them decoded: TFDS's own rows, one by one, take ten times as long.
        records = builder.as_data_source(split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    except NotImplementedError as error:
        raise InputError(
            f"{name}: prepared in {builder.data_dir} without random access; delete that folder and prepare it again "
            "with file_format='array_record'"
        ) from error
    except Exception as error:  # TFDS and array_record raise of every kind for damaged files
        raise _damaged(name, builder, error) from error
    texts: list[str] = []
    labels: list[int] = []
    for start in range(0, len(records), _CHUNK):
        try:
            some = records.__getitems__(list(range(start, min(start + _CHUNK, len(records)))))
            rows = [features.deserialize_example_np(record) for record in some]
            labels += [int(row[label]) for row in rows]
            if any(row[text] is None for row in rows):  # what a record cut short decodes to
                raise ValueError("a row without text")
        except Exception as error:
            raise _damaged(name, builder, error) from error
        for number, row in enumerate(rows, start):
            texts.append(decode_utf8(row[text], f"{name}:{split}[{number}]"))
    return texts, labels


def _damaged(name: str, builder, error: Exception) -> InputError:
    return InputError(
        f"{name}: {builder.data_dir} is damaged ({first_line(error)}); delete that folder and prepare the set again"
    )


def _name_relations(task: LabelledText, names: dict[str, str]) -> LabelledText:
    """Only the relations that have rows, with their names; a relation id keeps two of one name apart."""
    used, label_N = np.unique(task.label_N, return_inverse=True)
    relations = [task.classes[number] for number in used]
    classes = tuple(f"{relation} {names[relation]}" if relation in names else relation for relation in relations)
    return _task("fewrel", classes, task.texts, label_N.astype(np.int32), None)


def _task(name: str, classes: tuple[str, ...], texts: list[str], label_N, test_N) -> LabelledText:
    if len(classes) < 2:
        raise InputError(f"{name}: {len(classes)} class; a classification needs two, so name another label column")
    total = hashlib.sha256(json.dumps(["labelled", classes, test_N is not None]).encode())
    total.update(label_N.astype("<i4").tobytes())
    if test_N is not None:
        total.update(test_N.tobytes())
    for text in texts:
        raw = text.encode()
        total.update(len(raw).to_bytes(8, "little"))
        total.update(raw)
    return LabelledText(name, total.hexdigest(), classes, texts, label_N, test_N)
