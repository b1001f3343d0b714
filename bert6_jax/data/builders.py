"""TFDS builders for raw files at hand: validated once, written as ArrayRecord, then random access without TensorFlow.

    name             raw files                                                  splits
    fewrel           a folder with train_wiki.json, val_wiki.json, pid2name.json  train, validation
                     (thunlp/FewRel; the last two are optional)
    dbpedia14        a folder with train.csv, test.csv, classes.txt             train, test
    popqa            popQA.tsv or its folder                                    test
    labelled_text    one .csv, .tsv or .jsonl file with a text and a label      train, and validation and test of a
                     column, or a folder with train.*, test.*, validation.*     folder that has them
    wikipedia_jsonl  .jsonl files with id, title, text, or a folder of them     train

`.csv`, `.tsv` and `.jsonl` of the last two may be gzipped (`.gz`). The order of the rows is kept. `prepare` writes a
set to `DATA_DIR/NAME[/CONFIG]/1.0.0`; any TFDS program opens it there by its name, and so does `tfds:NAME` here. Only
`labelled_text` has configs: `<stem>-<8 hex>`, a hash over content and options, so the sets of a user lie side by side.

`metadata.json` of a prepared set records `raw` (sha256 of each file), `options` and `names` (of the FewRel relations).
Whatever cannot be read is an `InputError` of one line, and nothing is left behind. Nothing is ever downloaded.

    python -m bert6_jax.data.builders NAME RAW_PATH [--data-dir DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bert6_jax.data.sources import (
    SURROGATE,
    FileSource,
    cannot_read,
    first_line,
    json_kind,
    json_rows,
    lines_of,
    read_text,
)
from bert6_jax.errors import InputError

try:
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core import example_serializer, read_only_builder
    from tensorflow_datasets.core.utils import tqdm_utils
except ImportError as error:
    raise ImportError("bert6_jax.data.builders needs TFDS; pip install 'bert6-jax[tfds]'") from error

VERSION = "1.0.0"
TABLES = (".csv", ".tsv", ".jsonl")
_POPQA_COLUMNS = ("id", "subj", "prop", "obj", "question", "possible_answers", "s_pop", "o_pop")

_SHARD_BYTES = 256 << 20  # of serialised rows in one file


class _LocalInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """TFDS would look for this set in Google's bucket."""


class RawBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What the builders share: `raw` is the file or folder given, `files` what is read there, by role.

    Use `prepare`, which refuses a set prepared from other content and keeps a killed run from leaving anything.
    """

    VERSION = tfds.core.Version(VERSION)
    url_infos: Mapping[str, Any] = {}  # nothing to download; TFDS would look for a list beside this module

    def __init__(self, raw: str | os.PathLike, *, data_dir: str | os.PathLike | None = None, **options):
        self.raw = Path(raw).expanduser()
        self.options = options
        if not self.raw.exists():
            raise InputError(f"{self.raw}: no such file or folder; check the path of the raw {self.name} files")
        self.files = self._files()
        self.sha256 = {role: _sha256(path) for role, path in self.files.items()}
        config = self._config()
        open_prepared(self.name, data_dir, config and config.name)  # one line for what TFDS would trip over
        super().__init__(data_dir=default_data_dir(data_dir), config=config, file_format="array_record")
        self._original_state = {"raw": self.raw, "data_dir": data_dir, **options}  # what TFDS pickles

    def _config(self) -> tfds.core.BuilderConfig | None:
        return None

    def _create_builder_config(self, builder_config, version):  # TFDS's own warns of a config it does not know
        return builder_config

    def _log_download_bytes(self) -> None:
        """TFDS would print that it downloads."""

    def _log_download_done(self) -> None:
        """The same."""

    def _files(self) -> dict[str, Path]:
        """The files that are read, by role; the name of a split is the role of its file."""
        raise NotImplementedError

    def _features(self) -> dict[str, Any]:
        raise NotImplementedError

    def _rows(self, split: str) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    @property
    def _splits(self) -> list[str]:
        return [role for role in self.files if role in ("train", "validation", "test")]

    @property
    def recorded(self) -> dict[str, Any]:
        """What `metadata.json` says of the raw content and of how it is read."""
        return {"raw": self.sha256, "options": json.loads(json.dumps(self.options))}

    def _metadata(self) -> dict[str, Any]:
        return {}

    def _info(self) -> tfds.core.DatasetInfo:
        if _is_prepared(self._data_dir):
            return _LocalInfo(builder=self)  # TFDS fills it from there, without reading the raw files again
        return _LocalInfo(
            builder=self,
            features=tfds.features.FeaturesDict(self._features()),
            metadata=tfds.core.MetadataDict(self.recorded | self._metadata()),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split):
        row = -1
        for row, example in enumerate(self._rows(split)):
            yield row, example
        if row < 0:
            raise InputError(f"{self.files.get(split, self.raw)}: no rows; give a file with text in it")

    def _generate_splits(self, dl_manager, download_config) -> list[tfds.core.SplitInfo]:
        # TFDS's own writer collects a split in memory to sort it, and beyond 1 GB it needs TensorFlow; our rows are in
        # their order already, so they go straight into the files.
        features = self.info.features
        serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
        splits = []
        for split, examples in self._split_generators(dl_manager).items():
            examples = tqdm_utils.tqdm(examples, desc=f"{self.name} {split}", unit=" rows", leave=False, mininterval=1)
            records = (serializer.serialize_example(features.encode_example(example)) for _, example in examples)
            folder = Path(self.data_dir)
            lengths, total = _write_shards(records, lambda part, folder=folder, split=split: folder / f"{split}.{part}")
            template = self._get_filename_template(split_name=split)
            for part in range(len(lengths)):
                name = template.sharded_filepath(shard_index=part, num_shards=len(lengths))
                (folder / f"{split}.{part}").rename(folder / Path(name).name)
            splits.append(
                tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=total, filename_template=template)
            )
        return splits

    def _in_folder(self, **names: str) -> dict[str, Path]:
        """{role: path} of the files of these names that are there."""
        if not self.raw.is_dir():
            raise InputError(f"{self.raw}: not a folder; give the folder that holds {', '.join(names.values())}")
        return {role: self.raw / name for role, name in names.items() if (self.raw / name).is_file()}

    def _require(self, files: dict[str, Path], **names: str) -> dict[str, Path]:
        for role, name in names.items():
            if role not in files:
                raise InputError(f"{self.raw}: no file {name} there; give the folder with the original {self.name}")
        return files


def _write_shards(records: Iterable[bytes], path_of: Callable[[int], Path]) -> tuple[list[int], int]:
    """Rows of each file, and bytes of all; the number of files is only known at the end."""
    lengths: list[int] = []
    total = size = 0
    writer = None
    try:
        for record in records:
            if writer is None or size + len(record) > _SHARD_BYTES:
                if writer is not None:
                    writer.close()
                writer = ArrayRecordWriter(str(path_of(len(lengths))), "group_size:1")
                lengths.append(0)
                size = 0
            writer.write(record)
            lengths[-1] += 1
            size += len(record)
            total += len(record)
    except BaseException:
        with contextlib.suppress(Exception):
            writer.close()
        raise
    if writer is not None:
        writer.close()
    return lengths, total


class FewRel(RawBuilder, skip_registration=True):
    """FewRel in thunlp's JSON: {relation: [{tokens, h: [name, id, [positions, ...]], t: same}, ...]}.

    text: the tokens joined by single spaces, without entity markers; label: the relation id, out of all the files;
    head, tail: the names; head_start, head_end: where its first mention lies, text[start:end] in characters (tail the
    same).
    """

    name = "fewrel"

    def _files(self):
        files = self._in_folder(train="train_wiki.json", validation="val_wiki.json", names="pid2name.json")
        return self._require(files, train="train_wiki.json")

    @cached_property
    def _relations(self) -> dict[str, dict[str, list]]:
        """{split: {relation: examples}}"""
        found = {}
        for split in self._splits:
            path = self.files[split]
            relations = found[split] = _read_json_object(path, "{relation: [examples]}")
            for relation, examples in relations.items():
                _label(relation, str(path), "relation")
                if not isinstance(examples, list) or not examples:
                    raise InputError(f"{path}: relation {relation!r} is not a list of examples; repair or delete it")
                if "names" in self.files and relation not in self._names:
                    raise InputError(
                        f"{path}: relation {relation!r} is not in {self.files['names'].name}; add it there, or delete "
                        "the relation or that file"
                    )
        return found

    @cached_property
    def _names(self) -> dict[str, str]:
        if "names" not in self.files:
            return {}
        path, names = self.files["names"], {}
        for relation, entry in _read_json_object(path, "{relation: [name, description]}").items():
            if not isinstance(entry, list) or not entry or not _is_text(entry[0]):
                raise InputError(f"{path}: relation {relation!r} is not [name, description]; repair it")
            names[relation] = " ".join(entry[0].split())
        return names

    def _metadata(self):
        there = sorted({relation for relations in self._relations.values() for relation in relations})
        return {"names": {relation: self._names[relation] for relation in there if relation in self._names}}

    def _features(self):
        labels = sorted({relation for relations in self._relations.values() for relation in relations})
        offsets = [f"{entity}_{end}" for entity in ("head", "tail") for end in ("start", "end")]
        return {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=labels),
            "head": tfds.features.Text(),
            "tail": tfds.features.Text(),
            **{offset: tfds.features.Scalar(np.int32) for offset in offsets},
        }

    def _rows(self, split):
        for relation, examples in self._relations[split].items():
            for number, example in enumerate(examples, 1):
                where = f"{self.files[split]}: relation {relation!r}, example {number}"
                yield {"label": relation, **_fewrel_example(example, where)}


def _fewrel_example(example: Any, where: str) -> dict[str, Any]:
    if not isinstance(example, dict):
        raise InputError(f"{where}: a JSON {json_kind(example)}, not an object; repair or delete it")
    missing = [field for field in ("tokens", "h", "t") if field not in example]
    if missing:
        raise InputError(f"{where}: no field {missing[0]!r}; repair or delete it")
    tokens = example["tokens"]
    if (
        not isinstance(tokens, list)
        or not all(isinstance(token, str) for token in tokens)
        or not "".join(tokens).strip()
    ):
        raise InputError(f"{where}: field 'tokens' is not a list of words; repair or delete it")
    text = " ".join(tokens)
    _refuse_surrogates(text, f"{where}: field 'tokens'")
    starts = np.cumsum([0, *(len(token) + 1 for token in tokens)])
    row: dict[str, Any] = {"text": text}
    for field, entity in (("h", "head"), ("t", "tail")):
        value = example[field]
        if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], str):
            raise InputError(f"{where}: field {field!r} is not [name, id, [positions]]; repair or delete it")
        _refuse_surrogates(value[0], f"{where}: field {field!r}")
        mentions = value[2]
        if not isinstance(mentions, list) or not mentions or not all(isinstance(m, list) and m for m in mentions):
            raise InputError(f"{where}: field {field!r} has no positions like [[2, 3]]; repair or delete it")
        for position in (position for mention in mentions for position in mention):
            if type(position) is not int or not 0 <= position < len(tokens):
                raise InputError(
                    f"{where}: field {field!r} has position {json.dumps(position)} outside the sentence of "
                    f"{len(tokens)} tokens (0 to {len(tokens) - 1}); repair or delete it"
                )
        first, last = min(mentions[0]), max(mentions[0])
        row |= {
            entity: value[0],
            f"{entity}_start": int(starts[first]),
            f"{entity}_end": int(starts[last]) + len(tokens[last]),
        }
    return row


class DBpedia14(RawBuilder, skip_registration=True):
    """DBpedia ontology classification in its own CSV: label from 1, title, content; no header.

    text: the content alone; title; label: a class of classes.txt.
    """

    name = "dbpedia14"

    def _files(self):
        names = {"train": "train.csv", "test": "test.csv", "classes": "classes.txt"}
        return self._require(self._in_folder(**names), **names)

    @cached_property
    def _classes(self) -> list[str]:
        path = self.files["classes"]
        classes = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        if not classes or len(set(classes)) < len(classes):
            raise InputError(f"{path}: {'a class twice' if classes else 'no classes'}; write one class a line")
        return classes

    def _features(self):
        text = tfds.features.Text()
        return {"text": text, "title": text, "label": tfds.features.ClassLabel(names=self._classes)}

    def _rows(self, split):
        path, classes = self.files[split], self._classes
        for row, (line, fields) in enumerate(_csv_rows(path, ","), 1):
            where = f"{path}:{line}: row {row}"
            if len(fields) != 3:
                raise InputError(f"{where} has {len(fields)} fields, not label, title, content; repair or delete it")
            label, title, content = fields
            if not re.fullmatch(r"[0-9]{1,9}", label) or not 1 <= int(label) <= len(classes):
                raise InputError(
                    f"{where}: label {_shown(label)} is not 1 to {len(classes)} (the lines of "
                    f"{self.files['classes'].name}); repair or delete the row"
                )
            if not content.strip():
                raise InputError(f"{where}: the content is empty; repair or delete the row")
            yield {"text": content, "title": title, "label": int(label) - 1}


class PopQA(RawBuilder, skip_registration=True):
    """PopQA in its own TSV. id, subj, prop, obj, question; possible_answers: texts; s_pop, o_pop: monthly views."""

    name = "popqa"

    def _files(self):
        return (
            {"test": self.raw}
            if self.raw.is_file()
            else self._require(self._in_folder(test="popQA.tsv"), test="popQA.tsv")
        )

    def _features(self):
        features: dict[str, Any] = dict.fromkeys(_POPQA_COLUMNS, tfds.features.Text())
        features["possible_answers"] = tfds.features.Sequence(tfds.features.Text())
        return features | dict.fromkeys(("s_pop", "o_pop"), tfds.features.Scalar(np.int64))

    def _rows(self, split):
        path = self.files[split]
        known = _Ids("id")
        for where, record in _table_rows(path, _POPQA_COLUMNS, ".tsv"):
            row: dict[str, Any] = {column: record[column] for column in _POPQA_COLUMNS}
            known.add(row["id"], where)
            for column in ("question", "obj"):
                if not row[column].strip():
                    raise InputError(f"{where}: column {column!r} is blank; repair or delete the row")
            for column in ("s_pop", "o_pop"):
                if not re.fullmatch(r"-?[0-9]{1,18}", row[column]):  # the original has a few negative ones
                    raise InputError(
                        f"{where}: column {column!r} holds {_shown(row[column])}, not an integer; repair it or delete "
                        "the row"
                    )
                row[column] = int(row[column])
            try:
                answers = json.loads(row["possible_answers"])
            except (ValueError, RecursionError):
                answers = None
            if not isinstance(answers, list) or not answers or not all(_is_text(answer) for answer in answers):
                raise InputError(
                    f"{where}: column 'possible_answers' holds {_shown(row['possible_answers'])}, not a JSON list of "
                    "texts; repair or delete the row"
                )
            for answer in answers:
                _refuse_surrogates(answer, f"{where}: column 'possible_answers'")
            yield row | {"possible_answers": answers}


class LabelledText(RawBuilder, skip_registration=True):
    """Text with a class each out of named columns of a CSV, TSV or JSON-lines file, or of a folder of splits.

    text; label: out of `classes`, or else out of the labels of train (sorted, by number where all are integers);
    id: only with `id_column`. A label that train (or `classes`) does not have is refused.
    """

    name = "labelled_text"

    def __init__(
        self,
        raw: str | os.PathLike,
        *,
        data_dir: str | os.PathLike | None = None,
        text_column: str = "text",
        label_column: str = "label",
        id_column: str | None = None,
        classes: Sequence[str] | None = None,
    ):
        columns = [text_column, label_column, *([id_column] if id_column else [])]
        if len(set(columns)) < len(columns):
            raise InputError(f"{raw}: columns {', '.join(map(repr, columns))}: one is named twice; name different ones")
        super().__init__(
            raw,
            data_dir=data_dir,
            text_column=text_column,
            label_column=label_column,
            id_column=id_column,
            classes=None if classes is None else [_label(name, str(raw), "classes") for name in classes],
        )

    def _files(self):
        if not self.raw.is_dir():
            if _table_suffix(self.raw) is None:
                raise InputError(f"{self.raw}: not a {', '.join(TABLES)} file; rename or convert it")
            return {"train": self.raw}
        found: dict[str, Path] = {}
        for path in sorted(self.raw.iterdir()):
            suffix = _table_suffix(path)
            split = path.name[: -len(suffix)] if suffix else ""
            if split in ("train", "validation", "test"):
                if split in found:
                    raise InputError(f"{self.raw}: both {found[split].name} and {path.name}; keep one file a split")
                found[split] = path
        if "train" not in found:
            raise InputError(f"{self.raw}: no train.csv, train.tsv or train.jsonl there; give that folder, or one file")
        return {split: found[split] for split in ("train", "validation", "test") if split in found}

    def _config(self):
        stem = self.raw.resolve().name
        if not self.raw.is_dir():
            stem = stem[: -len(_table_suffix(self.raw) or "")] or stem
        digest = hashlib.sha256(json.dumps(self.recorded, sort_keys=True).encode()).hexdigest()
        safe = re.sub(r"\W+", "_", stem, flags=re.ASCII).strip("_")[:64] or "text"
        return tfds.core.BuilderConfig(name=f"{safe}-{digest[:8]}", version=VERSION, description=stem)

    @cached_property
    def _classes(self) -> list[str]:
        if self.options["classes"] is not None:
            classes = self.options["classes"]
            if not classes or len(set(classes)) < len(classes):
                raise InputError(f"{self.raw}: classes {classes} are empty or name one twice; name each once")
            return classes
        labels = {label for _, _, label, _ in self._records("train")}
        if all(re.fullmatch(r"[+-]?[0-9]+", label) for label in labels):
            return sorted(labels, key=lambda label: (int(label), label))
        return sorted(labels)

    def _features(self):
        if not self._classes:
            raise InputError(f"{self.files['train']}: no rows; give a file with text in it")
        features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=self._classes)}
        return features | ({"id": tfds.features.Text()} if self.options["id_column"] else {})

    def _rows(self, split):
        known = frozenset(self._classes)
        for where, text, label, identity in self._records(split):
            if label not in known:
                given = self.options["classes"] is not None
                raise InputError(
                    f"{where}: unknown label {_shown(label)} in column {self.options['label_column']!r} "
                    f"({'the classes given' if given else 'those of train'}: {_some(self._classes)}); "
                    "repair or delete the row"
                )
            yield {"text": text, "label": label} | ({} if identity is None else {"id": identity})

    def _generate_examples(self, split):
        if split == self._splits[0]:
            self._ids = _Ids(self.options["id_column"])  # one for all splits: an id is unique in the set
        yield from super()._generate_examples(split)

    def _records(self, split: str) -> Iterator[tuple[str, str, str, str | None]]:
        """(where, text, label, id)"""
        path = self.files[split]
        text_column, label_column, id_column = (self.options[f"{kind}_column"] for kind in ("text", "label", "id"))
        wanted = [column for column in (text_column, label_column, id_column) if column]
        ids = getattr(self, "_ids", None)  # none yet while the classes are collected
        for where, record in _table_rows(path, wanted, _table_suffix(path) or ""):
            text, label = record[text_column], record[label_column]
            if not isinstance(text, str):
                raise InputError(
                    f"{where}: column {text_column!r} is a JSON {json_kind(text)}, not a string; repair it or name "
                    "the text column"
                )
            if not text.strip():
                raise InputError(f"{where}: column {text_column!r} is blank; repair or delete the row")
            _refuse_surrogates(text, f"{where}: column {text_column!r}")
            label = _label(label, where, label_column)
            identity = None
            if id_column:
                identity = _label(record[id_column], where, id_column)
                if ids is not None:
                    ids.add(identity, where)
            yield where, text, label, identity


class WikipediaJsonl(RawBuilder, skip_registration=True):
    """Articles as JSON lines with id (text or integer, unique), title, text; the files in the order of their names."""

    name = "wikipedia_jsonl"

    def _files(self):
        paths = FileSource(self.raw).files
        for path in paths:
            if path.suffix == ".txt":
                raise InputError(f"{path}: not a .jsonl or .jsonl.gz file; give a file or folder of JSON lines")
        return {f"part {number}": path for number, path in enumerate(paths)}

    @property
    def _splits(self):
        return ["train"]

    def _features(self):
        return dict.fromkeys(("id", "title", "text"), tfds.features.Text())

    def _rows(self, split):
        known = _Ids("id")
        for path in self.files.values():
            for where, record in _table_rows(path, ("id", "title", "text"), ".jsonl"):
                identity = _label(record["id"], where, "id")
                known.add(identity, where)
                for field in ("title", "text"):
                    if not isinstance(record[field], str):
                        raise InputError(
                            f"{where}: field {field!r} is a JSON {json_kind(record[field])}, not a string; repair it"
                        )
                    _refuse_surrogates(record[field], f"{where}: field {field!r}")
                yield {"id": identity, "title": record["title"], "text": record["text"]}


BUILDERS: Mapping[str, type[RawBuilder]] = {
    builder.name: builder for builder in (FewRel, DBpedia14, PopQA, LabelledText, WikipediaJsonl)
}


def open_prepared(name: str, data_dir: str | os.PathLike | None = None, config: str | None = None):
    """The set as a read-only TFDS builder, or None where it is not prepared; no raw file is needed.

    Args:
      name: one of `BUILDERS`.
      data_dir: TFDS's folder; default `TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
      config: of `labelled_text`.
    """
    folder = Path(default_data_dir(data_dir), name, config or "", VERSION)
    if not _is_prepared(folder):
        return None
    try:
        return read_only_builder.builder_from_directory(folder)
    except Exception as error:  # TFDS raises of every kind for damaged files
        raise InputError(f"{folder}: damaged ({first_line(error)}); delete this folder and prepare it again") from error


def metadata(builder) -> dict[str, Any]:
    """What `metadata.json` of a prepared set says; empty where a set has none."""
    try:
        there = json.loads(Path(builder.data_dir, tfds.core.constants.METADATA_FILENAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return there if isinstance(there, dict) else {}


def prepare(
    name: str,
    raw: str | os.PathLike,
    data_dir: str | os.PathLike | None = None,
    *,
    progress: bool = False,
    **options,
):
    """Validates the raw files and writes the set, or finds it already there; a read-only TFDS builder of it.

    Args:
      name: one of `BUILDERS`.
      raw: the file or folder, see the module's table.
      data_dir: TFDS's folder; default `TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
      progress: whether TFDS shows its bars on stderr.
      **options: of `LabelledText`: text_column, label_column, id_column, classes.

    Raises:
      InputError: raw files that are missing or broken, a folder that cannot be written, or a set that was prepared
        there from other content.
    """
    if name not in BUILDERS:
        raise InputError(f"{name}: no such builder; the builders: {', '.join(BUILDERS)}")
    if options and name != LabelledText.name:
        raise InputError(f"{name}: has no option {next(iter(options))!r}; only {LabelledText.name} has named columns")
    with _quiet():
        builder = BUILDERS[name](raw, data_dir=data_dir, **options)
        folder = Path(builder.data_dir)
        config = builder.builder_config_name
        found = open_prepared(name, data_dir, config)
        if found is None:
            with _alone(folder.parent):
                if not _is_prepared(folder):
                    try:
                        _write(builder, progress)
                    except (OSError, RuntimeError) as error:  # RuntimeError: array_record on a full disk
                        if not _is_prepared(folder):  # else written meanwhile, where there is no lock
                            raise _cannot_write(folder, error) from error
            found = open_prepared(name, data_dir, config)
        there = metadata(found)
        if any(there.get(key) != value for key, value in builder.recorded.items()):
            raise InputError(
                f"{folder}: prepared from other content than {builder.raw}; leave the path out to use it, delete that "
                "folder to prepare it anew, or set TFDS_DATA_DIR to another one"
            )
        return found


def _is_prepared(folder: str | os.PathLike) -> bool:
    return Path(folder, tfds.core.constants.DATASET_INFO_FILENAME).is_file()


def _write(builder: RawBuilder, progress: bool) -> None:
    before = tqdm_utils._active
    tfds.display_progress_bar(progress and before)
    try:
        # TFDS makes a folder for downloads, which would stay in the user's.
        with tempfile.TemporaryDirectory() as downloads:
            builder.download_and_prepare(
                download_dir=downloads, download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
    finally:
        tfds.display_progress_bar(before)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One preparing process at a time in `folder`; what a killed one left is removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: the rename at the end still lets only one win
            pass
        else:
            for rest in folder.glob(f"{tfds.core.constants.INCOMPLETE_PREFIX}*_{VERSION}"):
                shutil.rmtree(rest, ignore_errors=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # the folders made for nothing go too; one with a set in it stays
            folder.rmdir()
            folder.parent.rmdir()
        raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS tells absl what our one line says."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def default_data_dir(data_dir: str | os.PathLike | None) -> str:
    return os.path.abspath(os.path.expanduser(data_dir or tfds.core.constants.get_default_data_dir()))


def _cannot_write(folder: Path, error: OSError | RuntimeError) -> InputError:
    reason = getattr(error, "strerror", None) or first_line(error)
    return InputError(f"{folder}: cannot be written ({reason}); make room or set TFDS_DATA_DIR to another folder")


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise cannot_read(path, error) from error


class _Ids:
    """Refuses an id that comes a second time."""

    def __init__(self, column: str):
        self.column = column
        self.known: set[str] = set()

    def add(self, identity: str, where: str) -> None:
        if not identity.strip():
            raise InputError(f"{where}: {self.column!r} is blank; give every row an id of its own")
        if identity in self.known:
            raise InputError(
                f"{where}: {self.column!r} {_shown(identity)} is there twice; give every row an id of its own"
            )
        self.known.add(identity)


def _table_suffix(path: Path) -> str | None:
    return next((end for kind in TABLES for end in (kind, kind + ".gz") if path.name.lower().endswith(end)), None)


def _table_rows(path: Path, columns: Sequence[str], suffix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where: file, line and row, {column: value}) of a table with a header row, or of JSON lines."""
    jsonl = suffix.startswith(".jsonl")
    word, rows = (
        "column",
        json_rows(path, "repair or delete the line")
        if jsonl
        else _headed_rows(path, "\t" if suffix.startswith(".tsv") else ","),
    )
    row = 0
    for row, (line, record) in enumerate(rows, 1):
        where = f"{path}:{line}: row {row}"
        for column in columns:
            if column not in record:
                raise InputError(
                    f"{where if jsonl else f'{path}:1'}: no {word} {column!r} (there: {_some(record)}); "
                    f"add it, or name another {word}"
                )
        yield where, record
    if not row:
        raise InputError(f"{path}: no rows; give a file with text in it")


def _headed_rows(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    rows = _csv_rows(path, delimiter)
    _, header = next(rows, (1, []))
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise InputError(f"{path}:1: column {twice!r} is there twice; rename one")
    for line, fields in rows:
        if len(fields) != len(header):
            raise InputError(
                f"{path}:{line}: {len(fields)} fields, the header has {len(header)}; put text that holds the separator "
                "in quotes, or delete the row"
            )
        yield line, dict(zip(header, fields, strict=True))


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, fields) of every row that is not blank; unbalanced quotes are refused."""
    line = quotes = 0

    def lines() -> Iterator[str]:
        nonlocal line, quotes
        for line, text in lines_of(path):  # noqa: B007
            if "\0" in text:
                raise InputError(f"{path}:{line}: a NUL byte, so not a text file; export it again as UTF-8")
            quotes += text.count('"')
            yield text

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        first, quotes = line + 1, 0
        reason = ""
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = first_line(error)
        if not reason and quotes % 2:  # a lone quote inside a field without quotes: csv takes it for text
            reason = "an odd number of them"
        if reason.startswith("new-line character"):
            raise InputError(f"{path}:{first}: a carriage return inside the row; save the file with \\n line ends")
        if reason:
            raise InputError(
                f"{path}:{first}: unbalanced quotes in the row that starts here ({reason}); close the quote, and "
                "double each quote inside a quoted field"
            )
        if fields:
            yield first, fields


def _read_json_object(path: Path, form: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{path}: {twice!r} is there twice; keep one")
        return found

    try:
        value = json.loads(read_text(path), object_pairs_hook=unique)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({first_line(error)}); copy the file again") from error
    if not isinstance(value, dict) or not value:
        kind = "an empty object" if value == {} else f"a JSON {json_kind(value)}"
        raise InputError(f"{path}: {kind}, not {form}; give the original file")
    return value


def _label(value: Any, where: str, column: str) -> str:
    """A label or an id: a text that is not blank, or an integer."""
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise InputError(
            f"{where}: column {column!r} is a JSON {json_kind(value)}, not a text or an integer; repair the row"
        )
    name = str(value).strip()
    if not name:
        raise InputError(f"{where}: column {column!r} is blank; repair or delete the row")
    if len(name.splitlines()) > 1:  # TFDS keeps the classes in a file, one a line
        raise InputError(f"{where}: column {column!r} holds {_shown(name)}, not one line of text; repair the row")
    _refuse_surrogates(name, f"{where}: column {column!r}")
    return name


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _refuse_surrogates(text: str, where: str) -> None:
    if not text.isascii() and SURROGATE.search(text):
        raise InputError(f"{where} holds half of a surrogate pair, which is no character; repair or delete the row")


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 40 else text[:37] + "...")


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(_shown(str(name)) for name in names[:12]) + (f", ... {len(names)} in all" if names[12:] else "")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message}; {self.prog} --help explains the options")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0, or 2 for bad input with one line on stderr."""
    columns = ("text", "label", "id")
    try:
        parser = _Parser(
            prog="python -m bert6_jax.data.builders",
            description="Prepare a set for TFDS out of raw files; nothing is downloaded.",
            allow_abbrev=False,
        )
        parser.add_argument("name", metavar="NAME", choices=BUILDERS, help=", ".join(BUILDERS))
        parser.add_argument("raw", metavar="RAW_PATH", help="the raw file or folder")
        parser.add_argument("--data-dir", metavar="DIR", help="default: TFDS_DATA_DIR, else ~/tensorflow_datasets")
        for column in columns:
            parser.add_argument(
                f"--{column}-column", metavar="NAME", help=f"{LabelledText.name}: the column of the {column}"
            )
        given = parser.parse_args(argv)
        options = {f"{column}_column": getattr(given, f"{column}_column") for column in columns}
        options = {option: value for option, value in options.items() if value is not None}
        progress = sys.stderr.isatty()
        builder = prepare(given.name, given.raw, given.data_dir, progress=progress, **options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(f"{builder.info.full_name}: {builder.data_dir}")
    for split, info in builder.info.splits.items():
        print(f"  {split}: {info.num_examples:,} rows")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
