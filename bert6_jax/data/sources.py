"""Where text comes from: files, folders, prepared TFDS sets, and text already in memory.

A source has a `name`, a `fingerprint` (sha256 over its content: the same text has the same fingerprint wherever it
lies) and `documents()`, which streams `Document`s in a fixed order. What a file holds follows from its name:

    folder         every .txt, .jsonl and .jsonl.gz below it in the order of their relative names; hidden ones and
                   other suffixes are left out
    .txt           inside a folder one document; given by itself its documents are separated by blank lines
    .jsonl[.gz]    one JSON object a line with the text in the field `text`, a name in `id` if there is one; blank
                   lines are skipped
    tfds:NAME[/CONFIG][:VERSION][:SPLIT]   a set prepared as ArrayRecord (no TensorFlow); split `train` unless given

Documents of nothing but white space are passed over. Nothing is ever downloaded. Whatever cannot be read is an
`InputError` of one line: file, line and remedy.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shlex
import stat
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

from bert6_jax.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
_TFDS_SPEC = re.compile(r"tfds:(?P<name>\w+(?:/[\w.+-]+)?)(?::(?P<version>\d+\.\d+\.\d+))?(?::(?P<split>.+))?")
# wiki40b marks its structure inside the text; as words the marks would open every window.
_WIKI40B_MARKS = re.compile(r"_(?:START_ARTICLE|START_SECTION|START_PARAGRAPH|NEWLINE)_")
SURROGATE = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    """One text: `id` names it to the reader, `where` says where it was read (file, or file:line)."""

    id: str
    text: str
    where: str


class Source(Protocol):
    """What `build_store` needs of a corpus."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def documents(self) -> Iterator[Document]: ...


def open_source(spec: str | os.PathLike, *, text_field: str = "text", id_field: str = "id") -> Source:
    """A corpus from a path or a `tfds:` name; the fields are those of JSON objects and of TFDS features.

    Raises:
      InputError: the path does not exist or holds nothing readable, the TFDS set is not prepared or has no such split.
    """
    if str(spec).startswith("tfds:"):
        return TfdsSource(str(spec), text_field, id_field)
    return FileSource(Path(spec).expanduser(), text_field, id_field)


@dataclass(frozen=True)
class TextSource:
    """Text in memory, such as a generated corpus.

    `texts` is iterated anew by every `documents()`. `fingerprint` must change whenever the texts do: a hash of the
    generator's settings saves generating a corpus whose token store is already there.
    """

    name: str
    texts: Iterable[str]
    fingerprint: str

    def documents(self) -> Iterator[Document]:
        for number, text in enumerate(self.texts):
            yield Document(str(number), text, f"{self.name}[{number}]")


@dataclass(frozen=True)
class FileSource:
    """A file or a folder of files, see the module's table."""

    path: Path
    text_field: str = "text"
    id_field: str = "id"

    def __post_init__(self):
        _ = self.files  # a wrong path is reported where it was given

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def files(self) -> list[Path]:
        """The files in reading order."""
        try:
            mode = self.path.stat().st_mode
        except FileNotFoundError as error:
            raise InputError(f"{self.path}: no such file or folder; check the path of the corpus") from error
        except OSError as error:
            raise cannot_read(self.path, error) from error
        if stat.S_ISREG(mode):
            if not self.path.name.endswith(SUFFIXES):
                raise InputError(f"{self.path}: not a {', '.join(SUFFIXES)} file; rename or convert it")
            return [self.path]
        if not stat.S_ISDIR(mode):
            raise InputError(f"{self.path}: neither a file nor a folder; give a corpus on disk")

        def unreadable(error: OSError):
            raise cannot_read(Path(error.filename), error) from error

        found = []
        for folder, folders, names in os.walk(self.path, onerror=unreadable):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [Path(folder, name) for name in names if name.endswith(SUFFIXES) and not name.startswith(".")]
        if not found:
            raise InputError(f"{self.path}: folder without a {', '.join(SUFFIXES)} file; put the corpus there")
        return sorted(found, key=self._relative)

    def _relative(self, file: Path) -> str:
        return file.relative_to(self.path).as_posix()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over how the files are read, their names (in a folder) and their bytes."""
        if self.path.is_dir():
            named = [(self._relative(file), file) for file in self.files]
        else:
            named = [(next(suffix for suffix in SUFFIXES if self.path.name.endswith(suffix)), self.path)]
        return _fingerprint(["files", self.path.is_dir(), self.text_field, self.id_field], named)

    def documents(self) -> Iterator[Document]:
        """Streams the documents.

        Raises:
          InputError: a file that cannot be read or decoded, a broken line, or no document at all.
        """
        return _with_text((document for file in self.files for document in self._read(file)), str(self.path))

    def _read(self, file: Path) -> Iterator[Document]:
        name = self._relative(file) if self.path.is_dir() else file.name
        if not file.name.endswith(".txt"):
            yield from self._read_jsonl(file, name)
        elif self.path.is_dir():
            yield Document(name, read_text(file), str(file))
        else:
            lines: list[str] = []
            first = 1
            for number, line in lines_of(file):
                if line.strip():
                    first = first if lines else number
                    lines.append(line)
                elif lines:
                    yield Document(f"{name}:{first}", "".join(lines), f"{file}:{first}")
                    lines = []
            if lines:
                yield Document(f"{name}:{first}", "".join(lines), f"{file}:{first}")

    def _read_jsonl(self, file: Path, name: str) -> Iterator[Document]:
        for number, row in json_rows(file, f'write {{"{self.text_field}": ...}}'):
            where = f"{file}:{number}"
            if self.text_field not in row:
                fields = ", ".join(map(repr, row)) or "none"
                raise InputError(
                    f"{where}: no field {self.text_field!r} (there: {fields}); add it or name the text field"
                )
            text = row[self.text_field]
            if not isinstance(text, str):
                raise InputError(
                    f"{where}: field {self.text_field!r} is a JSON {json_kind(text)}, not a string; "
                    "repair it or name the text field"
                )
            if not text.isascii() and SURROGATE.search(text):
                raise InputError(
                    f"{where}: field {self.text_field!r} holds half of a surrogate pair (\\ud800-\\udfff), "
                    "which is no character; repair or delete the line"
                )
            yield Document(str(row.get(self.id_field, f"{name}:{number}")), text, where)


@dataclass(frozen=True)
class TfdsSource:
    """A split of a TFDS set that lies prepared in `TFDS_DATA_DIR` (or TFDS's own default folder)."""

    spec: str
    text_field: str = "text"
    id_field: str = "id"

    def __post_init__(self):
        _ = self._opened

    @property
    def name(self) -> str:
        return self.spec.removeprefix("tfds:")

    @cached_property
    def _opened(self):
        """(builder, split, random-access rows, name of the text feature)"""
        match = _TFDS_SPEC.fullmatch(self.spec)
        if not match:
            raise InputError(f"{self.spec}: not a TFDS name; write tfds:NAME[/CONFIG][:VERSION][:SPLIT]")
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise InputError(f"{self.spec}: needs TFDS; pip install 'bert6-jax[tfds]'") from error
        name = match["name"] + (f":{match['version']}" if match["version"] else "")
        split = match["split"] or "train"
        data_dir = tfds.core.constants.get_default_data_dir()
        builder, prepare = prepared_tfds(self.spec, name, data_dir)
        try:
            rows = builder.as_data_source(split=split)
        except NotImplementedError as error:
            raise InputError(
                f"{self.spec}: prepared in {data_dir} without random access; prepare it again with: {prepare}"
            ) from error
        except ValueError as error:
            raise InputError(f"{self.spec}: cannot read split {split!r} ({first_line(error)}); correct it") from error
        features = builder.info.features
        texts = sorted(key for key, feature in features.items() if isinstance(feature, tfds.features.Text))
        field = self.text_field if self.text_field in texts else texts[0] if len(texts) == 1 else None
        if field is None:
            there = ", ".join(texts) or "none"
            raise InputError(
                f"{self.spec}: no text feature {self.text_field!r} (text features: {there}); name one of them"
            )
        return builder, split, rows, field

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over name, version, split, field and the bytes of the split's files."""
        builder, split, _, field = self._opened
        files = [Path(path) for path in builder.info.splits[split].filepaths]
        header = ["tfds", builder.info.full_name, split, field, self.id_field]
        return _fingerprint(header, [(file.name, file) for file in sorted(files)])

    def documents(self) -> Iterator[Document]:
        """Streams the documents in TFDS's own order.

        Raises:
          InputError: an empty split, a damaged file, text that is not UTF-8.
        """
        return _with_text(self._read(), self.spec)

    def _read(self) -> Iterator[Document]:
        builder, _, rows, field = self._opened
        wiki40b = builder.info.name == "wiki40b"
        for number in range(len(rows)):
            where = f"{self.spec}[{number}]"
            try:
                row = rows[number]
                raw = row[field]
                if raw is None:  # what a record cut short decodes to
                    raise ValueError("no text")
            except (OSError, RuntimeError, ValueError, IndexError) as error:
                raise InputError(f"{where}: damaged ({first_line(error)}); prepare the set again") from error
            text = decode_utf8(raw, where)
            identity = row.get(self.id_field, str(number))
            yield Document(
                identity.decode("utf-8", "replace") if isinstance(identity, bytes) else str(identity),
                _WIKI40B_MARKS.sub("\n", text) if wiki40b else text,
                where,
            )


def prepared_tfds(spec: str, name: str, data_dir: str):
    """The read-only builder of a set that lies prepared in `data_dir`, and the command that would prepare it."""
    from tensorflow_datasets.core import DatasetNotFoundError, read_only_builder

    prepare = (
        f"TFDS_DATA_DIR={shlex.quote(data_dir)} python -c "
        '"import tensorflow_datasets as tfds, tensorflow_datasets.text; '
        f"tfds.builder('{name}', file_format='array_record').download_and_prepare()\""
    )
    try:
        # From the prepared files alone: nothing is fetched.
        return read_only_builder.builder_from_files(name, data_dir=data_dir), prepare
    except (DatasetNotFoundError, FileNotFoundError) as error:
        raise InputError(f"{spec}: not prepared in {data_dir}; prepare it once with: {prepare}") from error


def read_bytes(path: Path) -> bytes:
    """The file's bytes; an InputError names a file that cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise cannot_read(path, error) from error


def read_text(path: Path) -> str:
    """The file as UTF-8 text, without a byte order mark; an InputError names file and line of a wrong byte."""
    return decode_utf8(read_bytes(path), str(path), whole_file=True)


def decode_utf8(raw: bytes, where: str, whole_file: bool = False) -> str:
    """`raw` as text without a byte order mark; an InputError names `where`, the byte and, of a whole file, the line."""
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        if whole_file:
            where = f"{where}:{before.count(10) + 1}"
        byte = error.start - before.rfind(b"\n")
        raise InputError(
            f"{where}: byte {byte} of the line is not UTF-8 (0x{raw[error.start]:02x}); convert the file to UTF-8"
        ) from error


def _with_text(documents: Iterable[Document], where: str) -> Iterator[Document]:
    empty = True
    for document in documents:
        if document.text and not document.text.isspace():
            empty = False
            yield document
    if empty:
        raise InputError(f"{where}: the corpus is empty; give one with text in it")


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, decoded line with its newline) of a plain or gzipped file."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as handle:
            for number, raw in enumerate(handle, 1):
                yield number, decode_utf8(raw, f"{path}:{number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path}: gzip data cut short or damaged after line {number} ({first_line(error)}); copy the file again"
        ) from error
    except OSError as error:
        raise cannot_read(path, error) from error


def json_rows(path: Path, remedy: str) -> Iterator[tuple[int, dict]]:
    """(line number from 1, object) of JSON lines, blank lines left out; `remedy` is for a line that is no object."""
    for number, line in lines_of(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also an integer of too many digits
            raise InputError(f"{path}:{number}: not JSON ({first_line(error)}); repair or delete the line") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: a JSON {json_kind(row)}, not an object; {remedy}")
        yield number, row


def text_field(record: dict, name: str, where: str) -> str:
    """The text in a field of a record, as it stands there; `where` names the record in errors."""
    if name not in record:
        raise InputError(f"{where}: no field {name!r} (there: {', '.join(map(repr, record)) or 'none'}); add it")
    text = record[name]
    if not isinstance(text, str):
        raise InputError(f"{where}: field {name!r} is a JSON {json_kind(text)}, not a string; repair or delete the row")
    return checked_text(text, f"{where}: field {name!r}")


def checked_text(text: str, where: str) -> str:
    """The text itself; `InputError` if it is blank or holds what is no character."""
    if SURROGATE.search(text):
        raise InputError(
            f"{where} holds half of a surrogate pair (\\ud800-\\udfff), which is no character; repair or delete the row"
        )
    if not text.strip():
        raise InputError(f"{where} is empty; fill it or delete the row")
    return text


def cannot_read(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be read ({error.strerror or first_line(error)}); check the path and permissions")


def _fingerprint(header: list, named_files: list[tuple[str, Path]]) -> str:
    total = hashlib.sha256(json.dumps(header).encode())
    for name, path in named_files:
        try:
            with open(path, "rb") as handle:
                content = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise cannot_read(path, error) from error
        total.update(json.dumps([name, content]).encode())
    return total.hexdigest()


def json_kind(value: object) -> str:
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
