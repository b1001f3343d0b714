"""Trained vocabularies, kept in the cache: the same texts and size are trained once, and read ever after.

One file each, `vocabulary-HASH.json`, named by a hash over the texts, the size, the library's version and the format;
it holds the tokens in order and the sha256 that their tokenizer must have. What is damaged is made anew and replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from bert6_jax.data.store import default_cache_dir
from bert6_jax.data.tokenizer import Tokenizer, train_wordpiece, wordpiece

FORMAT = 1  # raise it when `train_wordpiece` gives another vocabulary for the same texts


def trained_wordpiece(
    texts: Sequence[str], vocab_size: int, lowercase: bool = True, cache_dir: str | os.PathLike | None = None
) -> Tokenizer:
    """What `train_wordpiece(texts, vocab_size, lowercase)` gives, from the cache if it was asked for before.

    A cache that cannot be read or written costs time and nothing else.

    Raises:
      InputError: as `train_wordpiece`.
    """
    path = _path(texts, vocab_size, lowercase, default_cache_dir() if cache_dir is None else Path(cache_dir))
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # an InputError is a ValueError
        kept = json.loads(path.read_text(encoding="utf-8"))
        tokenizer = wordpiece(kept["tokens"], lowercase, source="trained vocabulary")
        if tokenizer.sha256 == kept["sha256"]:
            return tokenizer
    tokenizer = train_wordpiece(texts, vocab_size, lowercase)
    with contextlib.suppress(OSError):
        _write(path, {"sha256": tokenizer.sha256, "tokens": tokenizer.tokens})
    return tokenizer


def _path(texts: Sequence[str], vocab_size: int, lowercase: bool, cache_dir: Path) -> Path:
    settings = [FORMAT, tokenizers.__version__, vocab_size, lowercase, len(texts)]
    found = hashlib.sha256(json.dumps(settings).encode())
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "little"))
        found.update(data)
    return cache_dir / f"vocabulary-{found.hexdigest()[:32]}.json"


def _write(path: Path, value) -> None:
    """At once: a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(json.dumps(value), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
