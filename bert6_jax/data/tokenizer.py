"""WordPiece tokenizers: read (`vocab.txt`, `tokenizer.json`, Hugging Face folders) or trained, always the same.

A thin frozen wrapper over the Rust `tokenizers` library. Text is data: a document that spells "[MASK]" or "[SEP]" gets
the pieces of that spelling, never the special id (Hugging Face calls this `split_special_tokens=True`; on all other
text the ids equal those of `BertTokenizerFast`). Specials are added where windows are cut.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from bert6_jax.data.sources import decode_utf8, first_line, read_bytes, read_text
from bert6_jax.errors import InputError

PAD, UNK, CLS, SEP, MASK = SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_ALPHABET = 1000  # as in the `tokenizers` and BERT defaults
# The library holds about 110 bytes a character of a document while it works on it; pieces of this size bound that.
_PIECE = 1_000_000
_GROUP = 128  # words that the library cuts in one call of it; a call costs as much as two words
_REMEMBERED = 4_000_000  # characters of words, with their ids and all about 100 MB


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary and how text is cut into it. Equal `sha256` means equal ids for every text.

    `tokens[i]` is the string of id i. `sha256` is over the vocabulary, the normaliser, the pre-tokenizer and the model,
    not over how the file was written.
    """

    tokens: tuple[str, ...] = field(repr=False)
    lowercase: bool
    sha256: str
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    _rust: tokenizers.Tokenizer = field(repr=False, compare=False)

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of [PAD], [UNK], [CLS], [SEP], [MASK], in this order."""
        return (self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of every text, int32 [its length], without [CLS] and [SEP]; all cores work on one call."""
        pieces = [list(_pieces(text)) for text in texts]
        encodings = iter(self._rust.encode_batch_fast([p for ps in pieces for p in ps], add_special_tokens=False))
        return [np.concatenate([np.array(next(encodings).ids, np.int32) for _ in ps]) for ps in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text of the ids, specials included."""
        return self._rust.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, path: str | os.PathLike) -> None:
        """Writes `tokenizer.json`; `load_tokenizer(path)` gives an equal tokenizer."""
        Path(path).write_text(self._rust.to_str(pretty=True), encoding="utf-8")


class CorpusEncoder:
    """Encodes the batches of a corpus with the ids of `Tokenizer.encode_batch`, but cuts a word once.

    What BERT's normaliser and pre-tokenizer make of a word between blanks or line ends does not depend on its
    neighbours, and most words of a corpus came before: their ids are looked up. Words are forgotten all at once when
    they have come to `_REMEMBERED` characters. A tokenizer of another kind, or with tokens of its own beside the
    vocabulary, encodes all text anew.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        spec = json.loads(tokenizer._rust.to_str())
        kinds = [(spec[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
        ours = all(token["special"] for token in spec["added_tokens"])  # which text never has, see the module
        ours = ours and tokenizer._rust.token_to_id("\n") is None
        self._by_words = kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and ours
        self._rust = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._rust.encode_special_tokens = True
        # A line end, which no word holds, is a token here: it ends the ids of a word among those of many.
        self._rust.add_tokens([tokenizers.AddedToken("\n", normalized=False)])
        self._end = self._rust.token_to_id("\n")
        self._forget()

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts one after the other, int32 [tokens], and how many each has, int64 [its length]."""
        if not self._by_words or not texts:
            ids_D = self._tokenizer.encode_batch(texts)
            return np.concatenate([np.zeros(0, np.int32), *ids_D]), np.array([len(ids) for ids in ids_D], np.int64)
        if self._characters > _REMEMBERED:
            self._forget()
        pieces = [list(_pieces(text)) for text in texts]
        # Words of a text, empty ones included.
        words_D = [sum(piece.count(" ") + piece.count("\n") + 1 for piece in ps) for ps in pieces]
        words = chain.from_iterable(piece.replace("\n", " ").split(" ") for ps in pieces for piece in ps)
        word_N = np.fromiter(map(self._number.__getitem__, words), np.int64, sum(words_D))
        self._learn()
        size_N = self._size_U[word_N]
        at_C = np.repeat(self._first_U[word_N] - (np.cumsum(size_N) - size_N), size_N)
        at_C += np.arange(len(at_C))
        return self._ids[at_C], np.add.reduceat(size_N, np.cumsum([0, *words_D[:-1]]))

    def _forget(self) -> None:
        self._number = _Numbers()
        self._ids = np.zeros(0, np.int32)
        self._first_U = self._size_U = np.zeros(0, np.int64)  # word u is ids[first : first + size]
        self._characters = 0

    def _learn(self) -> None:
        """Cuts the words that were numbered since the last time."""
        new, self._number.new = self._number.new, []
        if not new:
            return
        group = max(1, min(_GROUP, _PIECE // (max(map(len, new)) + 1)))
        lines = ["\n".join(new[i : i + group]) + "\n" for i in range(0, len(new), group)]
        try:
            encodings = self._rust.encode_batch_fast(lines, add_special_tokens=False)
        except BaseException:  # text that is not UTF-8, say: numbers without ids must not stay
            self._forget()
            raise
        ids = np.concatenate([np.array(encoding.ids, np.int32) for encoding in encodings])
        end_U = np.flatnonzero(ids == self._end)
        size_U = np.diff(end_U, prepend=-1) - 1
        self._first_U = np.concatenate([self._first_U, len(self._ids) + end_U - size_U])
        self._size_U = np.concatenate([self._size_U, size_U])
        self._ids = np.concatenate([self._ids, ids])
        self._characters += sum(map(len, lines))


class _Numbers(dict):
    """Numbers words in the order in which they are first asked for; `new` holds those not yet cut."""

    def __init__(self):
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        self.new.append(word)
        return number


def load_tokenizer(path: str | os.PathLike, lowercase: bool | None = None) -> Tokenizer:
    """Reads a `vocab.txt`, a `tokenizer.json`, or a folder with either (the latter preferred).

    A `tokenizer_config.json` beside the file says whether text is lower-cased, as in Hugging Face folders; `lowercase`
    overrides it. Without either a `vocab.txt` is read as BERT uncased and a `tokenizer.json` as it says itself.

    Raises:
      InputError: a missing, empty or broken file, a duplicate or blank token, a special token that is not there.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
        if not files:
            raise InputError(f"{path}: folder without tokenizer.json or vocab.txt; give one of these files")
        path = files[0]
    options = _bert_options(path.parent / "tokenizer_config.json")
    if lowercase is not None:
        options["lowercase"] = lowercase
    if path.suffix == ".json":
        return _wrap(_read_json(path, options), str(path))
    return wordpiece(_read_vocab(path), source=str(path), **options)


def wordpiece(
    tokens: Sequence[str],
    lowercase: bool = True,
    *,
    handle_chinese_chars: bool = True,
    strip_accents: bool | None = None,
    source: str = "vocabulary",
) -> Tokenizer:
    """BERT's WordPiece over `tokens` (id = place in the list); accents fall with the case unless `strip_accents` says.

    Raises:
      InputError: a special token is missing; `source` names the vocabulary.
    """
    vocab = {token: i for i, token in enumerate(tokens)}
    rust = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=UNK, max_input_chars_per_word=100))
    rust.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=handle_chinese_chars,
        strip_accents=strip_accents,
        lowercase=lowercase,
    )
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.WordPiece()
    rust.add_special_tokens([token for token in SPECIALS if token in vocab])
    return _wrap(rust, source)


def train_wordpiece(
    texts: Iterable[str], vocab_size: int, lowercase: bool = True, max_alphabet: int = MAX_ALPHABET
) -> Tokenizer:
    """Trains a WordPiece vocabulary of at most `vocab_size` tokens, the same one in every run and process.

    The order is specials (ids 0 to 4), the alphabet by code point, the same characters as continuations (##c), then
    merges by frequency (at least 2). The library alone numbers the alphabet in hash order and breaks ties by it; fixing
    it first makes the result reproducible. The alphabet is the most frequent characters after normalisation: at most
    `max_alphabet` and at most a quarter of the vocabulary, without those as rare as the first one left out. A word with
    a character outside it becomes [UNK].

    `texts` is read twice, so it must not be a one-shot iterator. A small text yields fewer tokens than asked for.

    Raises:
      InputError: no text, or a vocabulary too small for any character.
    """
    if iter(texts) is texts:
        raise TypeError("train_wordpiece reads the texts twice: give a list, not an iterator")
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    counts_U = np.zeros(0x110000, np.int64)
    for text in texts:
        code_points = np.frombuffer(normalizer.normalize_str(text).encode("utf-32-le"), np.uint32)
        values, counts = np.unique(code_points, return_counts=True)
        counts_U[values] += counts
    counts_U[ord(" ")] = 0  # the normaliser leaves no other white space
    if not counts_U.any():
        raise InputError("tokenizer: no text to train on; give a corpus with words in it")
    limit = max(0, min(max_alphabet, (vocab_size - len(SPECIALS)) // 4))
    # Ties at the limit go out together: a set that depended on their order would not be reproducible.
    cutoff = np.sort(counts_U)[-limit - 1] + 1
    alphabet = [chr(point) for point in np.flatnonzero(counts_U >= cutoff)]
    if not alphabet:
        raise InputError(
            f"tokenizer: vocab_size {vocab_size} is too small for the characters of the text; ask for 1,000"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIALS, *alphabet, *("##" + char for char in alphabet)],
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    rust = tokenizers.Tokenizer(models.WordPiece(unk_token=UNK))
    rust.normalizer = normalizer
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.train_from_iterator(texts, trainer)
    vocab = rust.get_vocab()
    return wordpiece(sorted(vocab, key=vocab.__getitem__), lowercase, source="trained vocabulary")


def _wrap(rust: tokenizers.Tokenizer, source: str) -> Tokenizer:
    rust.no_truncation()
    rust.no_padding()
    rust.encode_special_tokens = True
    vocab = rust.get_vocab(with_added_tokens=True)
    missing = [token for token in SPECIALS if token not in vocab]
    if missing:
        raise InputError(f"{source}: vocabulary without {', '.join(missing)}; add {', '.join(SPECIALS)} to it")
    by_id = {i: token for token, i in vocab.items()}
    if sorted(by_id) != list(range(len(vocab))):
        raise InputError(f"{source}: the {len(vocab)} tokens do not have the ids 0 to {len(vocab) - 1}; number them so")
    spec = json.loads(rust.to_str())
    content = {key: spec[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    return Tokenizer(
        tokens=tuple(by_id[i] for i in range(len(by_id))),
        lowercase=_lowercases(spec["normalizer"]),
        sha256=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        **{f"{token[1:-1].lower()}_id": vocab[token] for token in SPECIALS},
        _rust=rust,
    )


def _lowercases(normalizer: dict | None) -> bool:
    match (normalizer or {}).get("type"):
        case "BertNormalizer":
            return normalizer["lowercase"]
        case "Sequence":
            return any(map(_lowercases, normalizer["normalizers"]))
        case kind:
            return kind == "Lowercase"


def _read_vocab(path: Path) -> list[str]:
    raw = read_bytes(path)
    if not raw.strip():
        raise InputError(f"{path}: the vocabulary is empty; give a file with one token a line")
    seen: dict[str, int] = {}
    # Only \n and \r\n end a line: other separators of str.splitlines are tokens of some vocabularies.
    for number, line in enumerate(decode_utf8(raw, str(path), whole_file=True).removesuffix("\n").split("\n"), 1):
        token = line.removesuffix("\r")
        if not token.strip():
            raise InputError(f"{path}:{number}: blank line; delete it, every line is one token")
        if token in seen:
            raise InputError(
                f"{path}:{number}: token {token!r} is already on line {seen[token]}; tokens must be unique"
            )
        seen[token] = number
    return list(seen)


def _read_json(path: Path, options: dict) -> tokenizers.Tokenizer:
    text = read_text(path)
    spec = _json_object(path, text)
    if not (spec.get("model") or {}).get("vocab"):
        raise InputError(f"{path}: no vocabulary in it; give a tokenizer.json of Hugging Face tokenizers")
    if isinstance(spec.get("normalizer"), dict) and spec["normalizer"].get("type") == "BertNormalizer":
        spec["normalizer"] |= options
    elif "lowercase" in options and options["lowercase"] != _lowercases(spec.get("normalizer")):
        raise InputError(f"{path}: its normaliser is not BERT's, so lower-casing cannot be changed; edit the file")
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path}: not a tokenizer ({first_line(error)}); save it again") from error


def _bert_options(path: Path) -> dict:
    """The options of BERT's normaliser that a Hugging Face `tokenizer_config.json` sets."""
    if not path.is_file():
        return {}
    config = _json_object(path, read_text(path))
    names = {
        "do_lower_case": "lowercase",
        "tokenize_chinese_chars": "handle_chinese_chars",
        "strip_accents": "strip_accents",
    }
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


def _json_object(path: Path, text: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg}); copy the file again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object; give a file of Hugging Face tokenizers")
    return value


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most `_PIECE` characters, cut after white space, where WordPiece words end."""
    start = 0
    while len(text) - start > _PIECE:
        cut = start + _PIECE
        end = max(text.rfind("\n", start, cut), text.rfind(" ", start, cut)) + 1 or cut
        yield text[start:end]
        start = end
    yield text[start:]
