"""The token store: a corpus tokenised once, memory-mapped ever after, and found again by what is in it.

A store is a folder of the cache, named by a hash over the source's content, the tokenizer and the format:

    ids.bin       the ids of all documents one after the other, uint16 (vocabularies up to 65,536) or uint32
    offsets.bin   int64 [D + 1]; document d is ids[offsets[d]:offsets[d + 1]]
    meta.json     counts, sizes and sha256 of both files

It is written in a temporary folder, flushed to disk and renamed, so a store is complete or not there: a killed build or
a full disk leaves only a temporary folder, which a later build removes, and of concurrent builders the first one wins.

Letters beside those of `bert6_jax`: D documents here, not the width.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bert6_jax.data.sources import Document, Source
from bert6_jax.data.tokenizer import CorpusEncoder, Tokenizer
from bert6_jax.errors import InputError

FORMAT = 1
_BATCH_CHARACTERS = 2_000_000  # enough to keep all cores of the Rust tokenizer busy, some 50 MB of memory
_BUILDING = ".building-"
_ABANDONED = 3600.0  # seconds without a write after which a temporary folder belongs to nobody


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Token ids of D documents, without special tokens.

    `ids` [tokens] and `offsets_D1` int64 [D + 1] are memory-mapped; `unknown` counts the [UNK] among the ids.
    """

    path: Path
    ids: np.ndarray = field(repr=False)
    offsets_D1: np.ndarray = field(repr=False)
    source: str
    fingerprint: str
    tokenizer_sha256: str
    vocab_size: int
    unknown: int

    @property
    def num_documents(self) -> int:
        return len(self.offsets_D1) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def unknown_share(self) -> float:
        return self.unknown / self.num_tokens

    @property
    def lengths_D(self) -> np.ndarray:
        """Tokens of every document, int64 [D]."""
        return np.diff(self.offsets_D1)

    def document(self, index: int) -> np.ndarray:
        """The ids of one document."""
        return self.ids[self.offsets_D1[index] : self.offsets_D1[index + 1]]


def default_cache_dir() -> Path:
    """`$BERT6_JAX_CACHE`, or `~/.cache/bert6-jax`."""
    return Path(os.environ.get("BERT6_JAX_CACHE") or "~/.cache/bert6-jax").expanduser()


def build_store(
    source: Source,
    tokenizer: Tokenizer,
    cache_dir: str | os.PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenStore:
    """The store of a source: opened if the cache has it whole, else built (in constant memory) and kept.

    Args:
      progress: called after every batch with the documents and tokens written so far.

    Raises:
      InputError: text that cannot be read, a corpus without a single token, a cache folder that cannot be made.
      OSError: the disk is full; the cache is as it was before.
    """
    cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir)
    key = hashlib.sha256(json.dumps([FORMAT, source.fingerprint, tokenizer.sha256]).encode()).hexdigest()
    path = cache_dir / f"tokens-{key[:32]}"
    if path.is_dir():
        try:
            return open_store(path)
        except InputError:
            pass  # damaged: built anew and replaced below
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache_dir)
        building = cache_dir / f"{_BUILDING}{uuid.uuid4().hex}"
        building.mkdir()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"{cache_dir}: cannot keep tokens here ({error.strerror}); set BERT6_JAX_CACHE") from error
    try:
        _write(source, tokenizer, building, progress)
        return _publish(building, path)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def open_store(path: str | os.PathLike) -> TokenStore:
    """Opens a store after checking sizes and hashes of its files.

    Raises:
      InputError: not a store of this format, or damaged.
    """
    path = Path(path)
    remedy = "delete the folder, it will be built again"
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise InputError(f"{path}: token store of format {meta['format']}, not {FORMAT}; {remedy}")
        for name in ("ids.bin", "offsets.bin"):
            with open(path / name, "rb") as handle:
                if hashlib.file_digest(handle, "sha256").hexdigest() != meta["sha256"][name]:
                    raise InputError(f"{path / name}: does not match its hash in meta.json; {remedy}")
        return TokenStore(
            path=path,
            ids=np.memmap(path / "ids.bin", meta["dtype"], "r"),
            offsets_D1=np.memmap(path / "offsets.bin", np.int64, "r"),
            **{key: meta[key] for key in ("source", "fingerprint", "tokenizer_sha256", "vocab_size", "unknown")},
        )
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a whole token store ({error}); {remedy}") from error


def _write(source: Source, tokenizer: Tokenizer, folder: Path, progress: Callable[[int, int], None] | None) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    encode = CorpusEncoder(tokenizer)
    documents = tokens = unknown = 0
    with _HashedFile(folder / "ids.bin") as ids_file, _HashedFile(folder / "offsets.bin") as offsets_file:
        offsets_file.write(np.zeros(1, np.int64))
        for batch in _batches(source.documents()):
            ids, size_D = encode([document.text for document in batch])
            offsets_file.write(tokens + np.cumsum(size_D))
            ids_file.write(ids.astype(dtype))
            documents += len(batch)
            tokens += len(ids)
            unknown += int(np.count_nonzero(ids == tokenizer.unk_id))
            if progress:
                progress(documents, tokens)
    if not tokens:
        raise InputError(f"{source.name}: {documents} documents without a single token; give a corpus with words in it")
    meta = {
        "format": FORMAT,
        "source": source.name,
        "fingerprint": source.fingerprint,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "documents": documents,
        "tokens": tokens,
        "unknown": unknown,
        "sha256": {"ids.bin": ids_file.sha256, "offsets.bin": offsets_file.sha256},
    }
    with _HashedFile(folder / "meta.json") as meta_file:
        meta_file.write(json.dumps(meta, indent=1).encode())
    _sync(folder)


def _publish(building: Path, path: Path) -> TokenStore:
    """Renames a finished folder to `path`; a whole store that is there already (another builder's) is taken instead."""
    for _ in range(3):
        try:
            os.rename(building, path)
            _sync(path.parent)
        except OSError:
            if not path.is_dir():
                raise
        try:
            return open_store(path)
        except InputError:
            if building.is_dir():  # a damaged store stands in the way
                shutil.rmtree(path, ignore_errors=True)
    raise InputError(f"{path}: cannot be replaced; delete it or set BERT6_JAX_CACHE to another folder")


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _HashedFile:
    """A file for writing that knows the sha256 of what was written and is on disk when it is closed."""

    def __init__(self, path: Path):
        self._file = open(path, "wb")
        self._hash = hashlib.sha256()

    def write(self, data: np.ndarray | bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, *_) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(cache_dir: Path) -> None:
    for folder in cache_dir.glob(f"{_BUILDING}*"):
        try:
            last_write = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        except FileNotFoundError:  # its builder has just finished
            continue
        if time.time() - last_write > _ABANDONED:
            shutil.rmtree(folder, ignore_errors=True)
