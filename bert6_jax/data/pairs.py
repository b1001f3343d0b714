"""Tasks for attribution: clean and patched rows that differ in what decides between two answers.

A pair is two prefixes of the same number of tokens and two words: `right` goes on after the clean prefix and `wrong`
after the patched one. What is measured on a pair is logit(right) - logit(wrong) at one position. `read_pairs` reads the
public sets, `synthetic.pairs` generates pairs, `encode_pairs` makes arrays of both. The format of a file follows from
its content:

    feature-circuits   JSON lines {clean_prefix, patch_prefix, clean_answer, patch_answer[, case]} (arXiv 2403.19647)
    BLiMP              JSON lines {sentence_good, sentence_bad, ...}; the paradigms of the one-prefix method give pairs
                       (one_prefix_prefix, one_prefix_word_good, one_prefix_word_bad), every paradigm gives
                       `SentencePairs` (Warstadt et al. 2020)
    IOI                CSV with the columns clean, corrupted, corrupted_hard (EAP-IG); names are taken from the text,
                       the token ids beside it are another tokenizer's

Letters beside those of `bert6_jax`: N pairs, R texts of pairs, G groups of pairs, C cases, Q masked copies; 2 is
(good, bad) or (selection, scoring).
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from bert6_jax.data.sources import first_line, json_rows, lines_of, text_field
from bert6_jax.data.tokenizer import Tokenizer
from bert6_jax.errors import InputError

IOI_PATCHES = ("corrupted_hard", "corrupted")
WITHOUT_PATCH = ("partner", "clean")
_CIRCUITS = ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")
_ONE_PREFIX = ("one_prefix_prefix", "one_prefix_word_good", "one_prefix_word_bad")
_REPEATED = "repeated"
_NAME = r"[^\W\d_][\w'-]*"


class PairText(NamedTuple):
    """A pair as text; `patch` is None where the set has no patched prefix (see `encode_pairs`)."""

    clean: str  # prefix that `right` goes on after
    patch: str | None  # prefix that `wrong` goes on after
    right: str
    wrong: str
    case: str  # group of the pair, for reports and for stratified splits
    where: str  # where it was read
    tail: str = ""  # what stands after the answer in either sentence, for masked models


class SentenceText(NamedTuple):
    """A minimal pair of whole sentences."""

    good: str
    bad: str
    case: str
    where: str


class Pairs(NamedTuple):
    """N clean and patched rows. Both rows of a pair have the same tokens or others at the same positions."""

    name: str
    masked: bool  # a [MASK] stands at `position_N`; else the answer follows it (causal)
    patched: bool  # False: there is no patched prefix, `patch_NT` repeats `clean_NT`
    clean_NT: np.ndarray  # int32
    patch_NT: np.ndarray  # int32
    segment_NT: np.ndarray  # int32, 1 at tokens, 0 at padding; of both rows
    position_N: np.ndarray  # int32, the position whose logits are read
    right_N: np.ndarray  # int32, answer of the clean row
    wrong_N: np.ndarray  # int32, answer of the patched row
    case_N: np.ndarray  # int32, index into `cases`
    cases: tuple[str, ...]
    texts: tuple[PairText, ...]  # N
    dropped: dict[str, int]  # reason -> pairs left out by it


class SentencePairs(NamedTuple):
    """N pairs of sentences, to be compared by their summed log-probabilities (`sentence_scores`)."""

    name: str
    ids_2NT: np.ndarray  # int32, [CLS] sentence [SEP] of the good and of the bad one
    segment_2NT: np.ndarray  # int32, 1 at tokens, 0 at padding
    score_2NT: np.ndarray  # bool, tokens of the sentence: those whose log-probability counts
    case_N: np.ndarray  # int32, index into `cases`
    cases: tuple[str, ...]
    texts: tuple[SentenceText, ...]  # N
    dropped: dict[str, int]  # reason -> pairs left out by it


# --- readers ---------------------------------------------------------------------------------------------------------


def read_pairs(path: str | os.PathLike, *, patch: str = "corrupted_hard") -> list[PairText]:
    """The pairs of a file, see the module's table.

    Args:
      path: the file.
      patch: of IOI, the column of the patched prefix. In `corrupted_hard` the two names change places, so the wrong
        answer is right there; in `corrupted` a third name stands for the subject, so neither answer is.

    Raises:
      InputError: a file of another format, or a row that does not fit it.
    """
    if patch not in IOI_PATCHES:
        raise InputError(f"patch column {patch!r}; give {' or '.join(IOI_PATCHES)}")
    path = Path(path).expanduser()
    kind = _format(path)
    if kind == "ioi":
        pairs = [_ioi(record, patch, where) for where, record in _table_rows(path)]
        if not pairs:
            raise InputError(f"{path}: a header and no rows; give a file with pairs in it")
        return pairs
    read = _circuits if kind == "circuits" else _one_prefix
    return [read(record, f"{path}:{line}") for line, record in json_rows(path, "write one pair a line")]


def read_sentences(path: str | os.PathLike) -> list[SentenceText]:
    """The sentence pairs of a BLiMP file of any paradigm.

    Raises:
      InputError: a file of another format, or a row that does not fit it.
    """
    path = Path(path).expanduser()
    if _format(path) != "blimp":
        raise InputError(f"{path}: not BLiMP (no field 'sentence_good'), so without sentence pairs; use read_pairs")
    rows = ((f"{path}:{line}", record) for line, record in json_rows(path, "write one pair a line"))
    return [
        SentenceText(*(_field(r, name, where) for name in ("sentence_good", "sentence_bad")), _label(r, "UID"), where)
        for where, r in rows
    ]


def _format(path: Path) -> str:
    first = next((line for _, line in lines_of(path) if line.strip()), None)
    if first is None:
        raise InputError(f"{path}: the file is empty; give one with pairs in it")
    if first.lstrip().startswith(("{", "[")):
        keys = next(record for _, record in json_rows(path, "write one pair a line"))
        if any(name in keys for name in _CIRCUITS):
            return "circuits"
        if "sentence_good" in keys:
            return "blimp"
    else:
        try:
            keys = next(csv.reader([first]))
        except csv.Error:  # a first line that is no header at all
            keys = []
        if "clean" in keys and any(name in keys for name in IOI_PATCHES):
            return "ioi"
    there = ", ".join(repr(key[:40]) for key in [*keys][:8]) or "none"
    raise InputError(
        f"{path}: no known set of pairs (fields: {there}); give JSON lines with "
        f"{', '.join(_CIRCUITS)} or BLiMP's sentence_good and sentence_bad, or CSV with clean and {IOI_PATCHES[0]}"
    )


def _field(record: dict, name: str, where: str) -> str:
    """The text in a field, without white space around it."""
    return text_field(record, name, where).strip()


def _label(record: dict, name: str) -> str:
    return str(record.get(name, "all"))


def _circuits(record: dict, where: str) -> PairText:
    return PairText(*(_field(record, name, where) for name in _CIRCUITS), _label(record, "case"), where)


def _one_prefix(record: dict, where: str) -> PairText:
    if any(name not in record for name in _ONE_PREFIX):
        raise InputError(
            f"{where}: no field {next(n for n in _ONE_PREFIX if n not in record)!r}, so the two sentences have no "
            "common prefix; use read_sentences for this paradigm"
        )
    prefix, good, bad = (_field(record, name, where) for name in _ONE_PREFIX)
    starts = (("sentence_good", good), ("sentence_bad", bad))
    tails = {_field(record, name, where).removeprefix(f"{prefix} {word}") for name, word in starts}
    # A sentence that begins otherwise comes back whole, so the two differ and there is no common tail.
    tail = tails.pop().strip() if len(tails) == 1 else ""
    return PairText(prefix, None, good, bad, _label(record, "UID"), where, tail)


def _ioi(record: dict, patch: str, where: str) -> PairText:
    clean, patched = (_field(record, name, where) for name in ("clean", patch))
    for first, second in re.findall(rf"\b({_NAME}) and ({_NAME})", clean):
        right, wrong = sorted((first, second), key=lambda name: _occurrences(name, clean))
        if (_occurrences(right, clean), _occurrences(wrong, clean)) == (1, 2):
            break
    else:
        raise InputError(
            f"{where}: field 'clean' has no two names 'X and Y' of which one occurs once more; repair or delete the row"
        )
    if patch == "corrupted_hard" and (_occurrences(right, patched), _occurrences(wrong, patched)) != (2, 1):
        raise InputError(
            f"{where}: field {patch!r} does not have {right!r} twice and {wrong!r} once; repair or delete the row"
        )
    return PairText(clean, patched, right, wrong, f"subject {'first' if wrong == first else 'second'}", where)


def _occurrences(name: str, text: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(name)}(?!\w)", text))


def _table_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(file:line, record) of a CSV file with a header."""
    reader = csv.reader((text for _, text in lines_of(path)), strict=True)
    header: list[str] = []
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{where}: not CSV ({first_line(error)}); repair the quotes of the row") from error
        if fields is None:
            return
        if not any(field.strip() for field in fields):
            continue
        if header and len(fields) != len(header):
            raise InputError(
                f"{where}: {len(fields)} fields, the header has {len(header)}; put text that holds a comma in quotes"
            )
        if header:
            yield where, dict(zip(header, fields, strict=True))
        header = header or fields


# --- encoding --------------------------------------------------------------------------------------------------------


def encode_pairs(
    tokenizer: Tokenizer,
    rows: Sequence[PairText],
    name: str,
    *,
    masked: bool = False,
    tail: str | None = ".",
    without_patch: str = "partner",
    unique: bool = True,
    length: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    strict: bool = False,
) -> Pairs:
    """Pairs as arrays. What does not fit is dropped and counted by its reason in `Pairs.dropped`.

    A causal row is [CLS] prefix, read at the last token of the prefix; a masked row is [CLS] prefix [MASK] tail [SEP],
    read at [MASK] (ours). An answer must be one known token after the clean prefix; the two prefixes must have as many
    tokens as each other, and not be the same.

    BLiMP has no patched prefixes. With `without_patch="partner"` (ours) two rows with the same two answers the other
    way round and as many tokens are each other's patch, paired so that the tokens they share are as many as can be;
    who is left over is dropped. With "clean" the patched row repeats the clean one, for attribution against zero.

    Args:
      tokenizer: of the model.
      rows: of `read_pairs` or `synthetic.pairs`.
      name: of the task.
      masked: rows for a masked model.
      tail: of masked rows, the text after [MASK]; None takes each row's own, "." where it has none.
      without_patch: what stands for a patched prefix that is not there, "partner" or "clean".
      unique: drop a pair that comes again (the files of feature-circuits are drawn with replacement).
      length: T, the positions of a row; longer rows are dropped. Default: those of the longest row.
      limit: at most so many of the pairs that are left, drawn by `seed`; a smaller limit gives a subset.
      seed: of `limit`.
      strict: refuse the first pair that does not fit instead of dropping it; only repeated ones are dropped.

    Raises:
      InputError: no pair is left; the first that does not fit, with `strict`; settings out of range.
    """
    if without_patch not in WITHOUT_PATCH:
        raise InputError(f"without_patch={without_patch!r}; give {' or '.join(WITHOUT_PATCH)}")
    _check_limit(limit, seed)
    rows = list(rows)
    encode = tokenizer.encode_batch
    clean_R = encode([row.clean for row in rows])
    patch_R = encode([row.clean if row.patch is None else row.patch for row in rows])
    tail_R: list[np.ndarray] = [np.zeros(0, np.int32)] * len(rows)
    if masked:
        tail_R = encode([(row.tail or ".") if tail is None else tail for row in rows])
    # The answer is read after its prefix, so that tokenizers that count the space into the word agree.
    full_R2 = zip(*(encode([f"{r.clean} {getattr(r, a)}" for r in rows]) for a in ("right", "wrong")), strict=True)
    answers_R2 = [[_behind(prefix, full) for full in both] for prefix, both in zip(clean_R, full_R2, strict=True)]

    # Why a row is left out: (reason, message).
    out_R = [_misfit(tokenizer, *parts) for parts in zip(rows, clean_R, patch_R, answers_R2, strict=True)]
    seen: set[tuple] = set()
    for r, row in enumerate(rows):
        size = len(clean_R[r]) + len(tail_R[r]) + (3 if masked else 1)  # [CLS], and [MASK] and [SEP]
        key = (clean_R[r].tobytes(), patch_R[r].tobytes(), tail_R[r].tobytes(), tuple(map(tuple, answers_R2[r])))
        if out_R[r] is None and length is not None and size > length:
            out_R[r] = "too long", f"{row.where}: {size} positions, rows have {length}; give longer rows"
        elif out_R[r] is None and unique and key in seen:
            out_R[r] = _REPEATED, f"{row.where}: the same tokens as a row before"
        seen.add(key)
    _left(name, "pairs", out_R, strict)
    alone = [r for r in range(len(rows)) if out_R[r] is None and rows[r].patch is None]
    if alone and without_patch == "partner":
        partner = _partners(alone, clean_R, answers_R2)
        for r in alone:
            if r in partner:
                patch_R[r] = clean_R[partner[r]]
                rows[r] = rows[r]._replace(patch=rows[partner[r]].clean)
            else:
                out_R[r] = (
                    "no partner",
                    f"{rows[r].where}: no row left with {rows[r].wrong!r} as the right answer, {rows[r].right!r} as "
                    f"the wrong one and a prefix of {len(clean_R[r])} tokens; give more rows or without_patch='clean'",
                )
    left, dropped = _left(name, "pairs", out_R, strict)
    chosen = _subset(left, limit, seed)

    head = np.array([tokenizer.cls_id], np.int32)
    end = np.array([tokenizer.sep_id], np.int32)
    blank = np.array([tokenizer.mask_id], np.int32)

    def whole(prefix: np.ndarray, r: int) -> np.ndarray:
        return np.concatenate([head, prefix, blank, tail_R[r], end] if masked else [head, prefix])

    clean_NT, segment_NT = padded([whole(clean_R[r], r) for r in chosen], length, tokenizer.pad_id)
    patch_NT, _ = padded([whole(patch_R[r], r) for r in chosen], length, tokenizer.pad_id)
    case_N, cases = _cases([rows[r].case for r in chosen])
    right_N, wrong_N = (np.array([answers_R2[r][i][0] for r in chosen], np.int32) for i in (0, 1))
    return Pairs(
        name=name,
        masked=masked,
        patched=all(rows[r].patch is not None for r in chosen),
        clean_NT=clean_NT,
        patch_NT=patch_NT,
        segment_NT=segment_NT,
        position_N=np.array([len(clean_R[r]) + masked for r in chosen], np.int32),
        right_N=right_N,
        wrong_N=wrong_N,
        case_N=case_N,
        cases=cases,
        texts=tuple(rows[r] for r in chosen),
        dropped=dropped,
    )


def encode_sentences(
    tokenizer: Tokenizer,
    rows: Sequence[SentenceText],
    name: str,
    *,
    length: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> SentencePairs:
    """Sentence pairs as arrays; those that are too long, alike in their tokens or repeated are dropped and counted.

    The two sentences of a pair may differ in their number of tokens; their scores are sums all the same, as in BLiMP.
    `length`, `limit` and `seed` are those of `encode_pairs`.

    Raises:
      InputError: no pair is left, or settings out of range.
    """
    _check_limit(limit, seed)
    good_R, bad_R = (tokenizer.encode_batch([row[i] for row in rows]) for i in (0, 1))
    out_R: list[tuple[str, str] | None] = [None] * len(rows)
    seen: set[tuple] = set()
    for r, (row, good, bad) in enumerate(zip(rows, good_R, bad_R, strict=True)):
        size = max(len(good), len(bad)) + 2
        key = (good.tobytes(), bad.tobytes())
        if np.array_equal(good, bad):
            out_R[r] = "sentences alike", f"{row.where}: both have the same tokens; give another vocabulary"
        elif length is not None and size > length:
            out_R[r] = "too long", f"{row.where}: {size} positions, rows have {length}; give longer rows"
        elif key in seen:
            out_R[r] = _REPEATED, f"{row.where}: the same tokens as a row before"
        seen.add(key)
    left, dropped = _left(name, "sentence pairs", out_R)
    chosen = _subset(left, limit, seed)
    head, end = np.array([tokenizer.cls_id], np.int32), np.array([tokenizer.sep_id], np.int32)
    # Good ones, then bad ones, so that both halves are padded alike.
    both = [np.concatenate([head, ids_R[r], end]) for ids_R in (good_R, bad_R) for r in chosen]
    ids, segment = padded(both, length, tokenizer.pad_id)
    size_R = np.array([len(ids) for ids in both])[:, None]
    place_T = np.arange(ids.shape[1])[None]
    score = (place_T > 0) & (place_T < size_R - 1)
    case_N, cases = _cases([rows[r].case for r in chosen])
    shape = (2, len(chosen), ids.shape[1])
    return SentencePairs(
        name, ids.reshape(shape), segment.reshape(shape), score.reshape(shape), case_N, cases,
        tuple(rows[r] for r in chosen), dropped,
    )  # fmt: skip


def sentence_scores(logits_NTV: jax.Array, ids_NT: jax.Array, score_NT: jax.Array) -> jax.Array:
    """Sum of log P(token | tokens before it) of a causal model over the tokens that `score_NT` marks, float32 [N]."""
    log_p_NTV = jax.nn.log_softmax(logits_NTV[:, :-1].astype(jnp.float32))
    log_p_NT = jnp.take_along_axis(log_p_NTV, ids_NT[:, 1:, None], -1)[..., 0]
    return jnp.where(score_NT[:, 1:], log_p_NT, 0.0).sum(-1)


def masked_copies(ids_NT: np.ndarray, score_NT: np.ndarray, mask_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows for the pseudo-log-likelihood of a masked model: (ids_QT, row_Q, position_Q), one masked token each.

    The score of row n is the sum over its copies of log P(ids_NT[n, position] | the copy), Salazar et al. 2020.
    """
    row_Q, position_Q = np.nonzero(score_NT)
    ids_QT = ids_NT[row_Q]
    ids_QT[np.arange(len(row_Q)), position_Q] = mask_id
    return ids_QT, row_Q, position_Q


def _misfit(
    tokenizer: Tokenizer, row: PairText, clean: np.ndarray, patch: np.ndarray, answers: list[list[int]]
) -> tuple[str, str] | None:
    """Why these tokens make no pair: (reason, message)."""
    for word, ids in zip((row.right, row.wrong), answers, strict=True):
        what = "unknown to it" if ids == [tokenizer.unk_id] else f"{len(ids)} tokens"
        if len(ids) != 1:
            what += f" ({' '.join(tokenizer.tokens[i] for i in ids)})"
        elif ids != [tokenizer.unk_id]:
            continue
        why = f"answer {word!r} is not one token of the vocabulary but {what}"
        return "answer not one token", f"{row.where}: {why}; give another vocabulary or other answers"
    if answers[0] == answers[1]:
        why = f"answers {row.right!r} and {row.wrong!r} are the same token"
        return "answers alike", f"{row.where}: {why}; give another vocabulary or other answers"
    if len(clean) != len(patch):
        why = f"the clean prefix has {len(clean)} tokens and the patched one {len(patch)}"
        return "different length", f"{row.where}: {why}; give prefixes of one length or another vocabulary"
    if row.patch is not None and np.array_equal(clean, patch):
        why = "the clean and the patched prefix have the same tokens"
        return "prefixes alike", f"{row.where}: {why}; give another vocabulary or other prefixes"
    return None


def _left(
    name: str, what: str, out_R: Sequence[tuple[str, str] | None], strict: bool = False
) -> tuple[np.ndarray, dict[str, int]]:
    """The rows that are not out, at least one, and how many are out for which reason."""
    out = [reason for reason in out_R if reason is not None]
    for reason, message in out:
        if strict and reason != _REPEATED:
            raise InputError(f"{name}: {message}")
    left = np.array([r for r, reason in enumerate(out_R) if reason is None], np.int64)
    counts = Counter(reason for reason, _ in out)
    if not out_R:
        raise InputError(f"{name}: no {what}; give a file with some in it")
    if not left.size:
        # The first row of the most frequent reason says most about what to change.
        first = dict(reversed(out))[counts.most_common(1)[0][0]]
        raise InputError(f"{name}: none of {len(out_R)} {what} is left, the first: {first}")
    return left, dict(counts)


def _behind(prefix: np.ndarray, full: np.ndarray) -> list[int]:
    """The ids behind the prefix; all of them where the longer text does not begin with the prefix's tokens."""
    same = np.array_equal(full[: len(prefix)], prefix)
    return (full[len(prefix) :] if same else full).tolist()


def _partners(rows: Iterable[int], prefix_R: list[np.ndarray], answers_R2: list[list[list[int]]]) -> dict[int, int]:
    """row -> the row that is its patch, mutual; within a group as many tokens in common as can be."""
    groups: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for r in rows:
        (right,), (wrong,) = answers_R2[r]
        groups[right, wrong, len(prefix_R[r])].append(r)
    partner: dict[int, int] = {}
    for (right, wrong, size), ours in groups.items():
        theirs = groups.get((wrong, right, size))
        if right > wrong or theirs is None:  # each couple of groups once
            continue
        ours_T, theirs_T = (np.stack([prefix_R[r] for r in group]) for group in (ours, theirs))
        shared = np.stack([(row_T[None] == theirs_T).sum(-1) for row_T in ours_T])
        for i, j in zip(*linear_sum_assignment(shared, maximize=True), strict=True):
            partner[ours[i]], partner[theirs[j]] = theirs[j], ours[i]
    return partner


def _check_limit(limit: int | None, seed: int) -> None:
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; give 1 or more, or none for all pairs")
    if seed < 0:
        raise InputError(f"seed is {seed}; give 0 or more")


def _subset(rows: np.ndarray, limit: int | None, seed: int) -> list[int]:
    if limit is None or limit >= len(rows):
        return rows.tolist()
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(rows))
    return rows[np.sort(order[:limit])].tolist()


def padded(rows: Sequence[np.ndarray], length: int | None, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, segment), int32 [rows, T]."""
    width = max(map(len, rows)) if length is None else length
    ids = np.full((len(rows), width), pad_id, np.int32)
    segment = np.zeros((len(rows), width), np.int32)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = row
        segment[n, : len(row)] = 1
    return ids, segment


def _cases(names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    cases = tuple(sorted(set(names)))
    return np.array([cases.index(name) for name in names], np.int32), cases


# --- halves ----------------------------------------------------------------------------------------------------------


def take_pairs(pairs: Pairs, rows_n: np.ndarray) -> Pairs:
    """The pairs of the given indices, in their order; everything else stays."""
    arrays = ("clean_NT", "patch_NT", "segment_NT", "position_N", "right_N", "wrong_N", "case_N")
    taken = {field: getattr(pairs, field)[rows_n] for field in arrays}
    return pairs._replace(**taken, texts=tuple(pairs.texts[n] for n in rows_n))


def split_pairs(pairs: Pairs, seed: int) -> tuple[Pairs, Pairs]:
    """Two halves, to select features on and to score them on, the same for the same pairs and seed.

    Pairs that share a prefix, clean or patched, directly or over others, stay on one side. Such groups go in random
    order, the large ones first, to the side that has fewer pairs of their cases; so every case is halved as evenly as
    its groups allow.

    Raises:
      InputError: all pairs hang together, or a seed below 0.
    """
    _check_limit(None, seed)
    end_N = pairs.position_N + 1  # with [MASK] in masked rows, which keeps equal prefixes equal
    number: dict[bytes, int] = {}
    prefix_N2 = np.array(
        [
            [number.setdefault(row_NT[n, :end].tobytes(), len(number)) for row_NT in (pairs.clean_NT, pairs.patch_NT)]
            for n, end in enumerate(end_N)
        ]
    )
    edges = csr_array((np.ones(len(prefix_N2)), tuple(prefix_N2.T)), shape=(len(number), len(number)))
    groups, group_of = connected_components(edges, directed=False)
    if groups < 2:
        raise InputError(f"{pairs.name}: the {len(end_N)} pairs share their prefixes, so no half can do; give more")
    group_N = group_of[prefix_N2[:, 0]]
    count_GC = np.zeros((groups, len(pairs.cases)), np.int64)
    np.add.at(count_GC, (group_N, pairs.case_N), 1)
    rng = np.random.Generator(np.random.Philox(key=seed))
    order = rng.permutation(groups)
    order = order[np.argsort(-count_GC.sum(1)[order], kind="stable")]
    side_G = np.zeros(groups, np.int64)
    count_2C = np.zeros((2, len(pairs.cases)), np.int64)
    for g, coin in zip(order, rng.integers(0, 2, groups), strict=True):
        # Fewer pairs of these cases, then fewer pairs at all, then the coin.
        zero, one = ((count_2C[s] @ count_GC[g], count_2C[s].sum(), s != coin) for s in (0, 1))
        side_G[g] = one < zero
        count_2C[side_G[g]] += count_GC[g]
    first, second = (take_pairs(pairs, np.flatnonzero(side_G[group_N] == s)) for s in (0, 1))
    return first, second
