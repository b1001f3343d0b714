"""From text to batches: ours against Hugging Face tokenisers and PyTorch's `DataLoader`.

    taskset -c 0,1 python -m benchmarks.data --corpus FOLDER --vocab vocab.txt     real text; minutes on two cores
    taskset -c 0,1 python -m benchmarks.data                                       the embedded corpus
    python -m benchmarks.data --tiny            little of it, which shows that it runs and nothing else

First table, a corpus made into a token store, on all cores and (`1 thread`) with the library's threads switched off:

    ours          `build_store`: read, tokenise, write, hash, flush to disk, open again and check
    hugging face  `BertTokenizerFast` on 1,000 texts a call (as `datasets.map` would), our reader, ids written to a
                  file; nothing hashed or flushed

The files must be equal byte for byte. The embedded corpus has few words, which helps ours: time real text.

Then a table for every kind of rows (first windows, all windows, all windows packed) and batch, time of a step's batch:

    ours          what `train.fit` does before a step (`rows_at`, `Windows.batch`, stack, arrays on the device), and the
                  corruption that runs inside our step, here alone
    ours, fed     the same with a program that reads one number of every array in place of the corruption
    ours, host    `rows_at` and `Windows.batch` alone; its share is of the machine's rate of copying, 10 bytes a token
    collator      `DataLoader` over tokenised rows, `DataCollatorForLanguageModeling` (0.15; special positions given)
    whole batch   `DataLoader` whose data set takes a whole batch of rows out of one tensor and corrupts it by the
                  collator's `torch_mask_tokens`: its best form
    ... workers   the same in `--workers` worker processes that live from round to round; first kind of rows only

The peers read our rows in our order, from memory, as int64 and made beforehand; packed ones carry `segment` and
`position` too. Their batches and ours must be the same rows once the corruption is undone, chosen and replaced at the
same rates within five standard deviations, or no times are shown. `x training` is how many times faster than
`--training` tokens/s (1.2 million: what is wanted of the paper's BERT-6 on one H200) the batches come.
PyTorch and transformers come with the extra `bench`.

Letters beside those of `bert6_jax`: W rows of a call.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import side_by_side
from bert6_jax import masking, objectives, parallel
from bert6_jax.data.sources import Source, TextSource, open_source
from bert6_jax.data.store import TokenStore, build_store
from bert6_jax.data.tokenizer import Tokenizer, load_tokenizer, train_wordpiece
from bert6_jax.data.windows import Windows, make_windows, rows_at
from bert6_jax.errors import InputError
from synthetic import language

LANGUAGE = language.LanguageConfig(min_tokens=300)  # two to three windows a document
TINY = {
    "documents": 60,
    "length": 32,
    "batches": [4],
    "rows": 32,
    "rounds": 2,
    "text_rounds": 1,
    "workers": 1,
    "kinds": ["packed"],
}
KINDS = {"first": {"mode": "first"}, "all": {"mode": "all"}, "packed": {"mode": "all", "pack": True}}
SLOTS = 40  # prediction slots of a row, as experiments.apt
RATE, MASK_SHARE, RANDOM_SHARE = 0.15, 0.8, 0.1
SIGMAS = 5.0
BYTES = 10  # of a token of a batch: read as uint16, written as `ids` and `segment`, int32


# --- text to ids -----------------------------------------------------------------------------------------------------


def corpus(args: argparse.Namespace) -> tuple[Any, Tokenizer]:
    """A function that opens the source anew, and the tokenizer."""
    if args.corpus is None:
        lang = language.make_language(LANGUAGE)
        texts = language.sample_documents(lang, args.documents, seed=0)
        opened = partial(TextSource, "embedded", texts, f"embedded {args.documents}")
    else:
        opened = partial(open_source, args.corpus)
        texts = None
    if args.vocab is not None:
        return opened, load_tokenizer(args.vocab)
    texts = texts or [document.text for document in opened().documents()]
    return opened, train_wordpiece(texts, 30_522)


def hugging_face(tokenizer: Tokenizer):
    """`BertTokenizerFast` with our vocabulary; like ours it takes a [MASK] in a text as text."""
    from transformers import BertTokenizerFast

    vocab = {token: i for i, token in enumerate(tokenizer.tokens)}
    return BertTokenizerFast(vocab=vocab, do_lower_case=tokenizer.lowercase, split_special_tokens=True)


def write_plainly(source: Source, theirs, path: Path) -> list[int]:
    """The peer's store: ids of all documents one after the other as uint16; returns their lengths."""
    lengths: list[int] = []
    texts: list[str] = []
    with open(path, "wb") as file:

        def write():
            ids_D = theirs(
                texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
            )["input_ids"]
            for ids in ids_D:
                file.write(np.array(ids, np.uint16))
            lengths.extend(map(len, ids_D))
            texts.clear()

        for document in source.documents():
            texts.append(document.text)
            if len(texts) == 1_000:
                write()
        if texts:
            write()
    return lengths


@contextlib.contextmanager
def tokenizer_threads(on: bool):
    """Both tokenisers run on the same library, which reads this at every call."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if on else "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def tokenising(args: argparse.Namespace, opened, tokenizer: Tokenizer, folder: Path) -> tuple[TokenStore, dict]:
    """The table of tokenising, and a store for what follows."""
    theirs = hugging_face(tokenizer)
    plain = folder / "plain.bin"
    lengths: list[list[int]] = []

    def ours(on: bool) -> None:
        shutil.rmtree(folder / "timed", ignore_errors=True)
        with tokenizer_threads(on):
            build_store(opened(), tokenizer, folder / "timed")

    def peer(on: bool) -> None:
        with tokenizer_threads(on):
            lengths[:] = [write_plainly(opened(), theirs, plain)]

    store = build_store(opened(), tokenizer, folder / "kept")
    if store.ids.dtype != np.uint16:
        raise InputError(f"the vocabulary has {tokenizer.vocab_size} tokens; give one that fits 16 bits")
    sides = {
        "ours": partial(ours, True),
        "ours, 1 thread": partial(ours, False),
        "hugging face": partial(peer, True),
        "hugging face, 1 thread": partial(peer, False),
    }
    for on in (True, False):
        peer(on)
        equal = plain.read_bytes() == store.ids.tobytes() and lengths[0] == store.lengths_D.tolist()
        ours(on)
        (built,) = (folder / "timed").iterdir()
        equal &= all((built / file.name).read_bytes() == file.read_bytes() for file in store.path.iterdir())
        if not equal:
            sys.exit("ours and BertTokenizerFast give different ids: no times")
    characters = sum(len(document.text) for document in opened().documents())
    times = side_by_side.alternate(sides, args.text_rounds, warmup=0)  # the checked calls went before
    rows = []
    for name, seconds in times.items():
        median = float(np.median(seconds))
        more = {"tokens/s": store.num_tokens / median, "characters/s": characters / median}
        rows.append(side_by_side.Row(name, seconds, more=more))
    title = (
        f"text to token store, {store.num_documents:,} documents, {store.num_tokens:,} tokens, V {store.vocab_size:,}"
    )
    return store, side_by_side.report(
        rows, title=title, dtype="uint16", documents=store.num_documents, tokens=store.num_tokens, characters=characters
    )


# --- ids to batches --------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What a model would read and predict."""

    ids_BT: np.ndarray
    labels_BT: np.ndarray  # the original ids where they are predicted, else -100
    segment_BT: np.ndarray


class Ours:
    """Our side over `steps` batches of an epoch; `host` and `fed` stop earlier, see the module."""

    def __init__(self, windows: Windows, tokenizer: Tokenizer, batch: int, steps: int):
        self.windows, self.batch, self.steps = windows, batch, steps
        self.mesh = parallel.make_mesh(1)
        never = (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id)
        rule = masking.MaskingConfig(tokenizer.vocab_size, tokenizer.mask_id, never, SLOTS, RATE)

        @jax.jit
        def corrupt(batches, key, step):
            now = jax.tree.map(lambda x: x[0], batches)
            return objectives.masked_batch(now, jax.random.fold_in(key, step), rule)[0]

        self.corrupt, self.key = corrupt, jax.random.key(0)
        self.read = jax.jit(lambda batches: [x.ravel()[0] for x in jax.tree.leaves(batches)])

    def host(self) -> None:
        for step in range(self.steps):
            self._rows(step)

    def fed(self) -> None:
        jax.block_until_ready([self.read(self._put(step)) for step in range(self.steps)])

    def __call__(self) -> None:
        jax.block_until_ready([self.corrupt(self._put(step), self.key, step) for step in range(self.steps)])

    def batches(self, count: int):
        for step in range(count):
            given = self._rows(step)
            found = jax.device_get(self.corrupt(self._put(step), self.key, step))
            labels_BT = np.full(given["ids"].shape, -100)
            target_BK = np.where(found.valid_BK, found.target_BK, -100)
            np.put_along_axis(labels_BT, found.slot_BK, target_BK, axis=-1)
            yield Batch(found.ids_BT, labels_BT, given["segment"])

    def _rows(self, step: int) -> dict[str, np.ndarray]:
        return self.windows.batch(*rows_at(0, step, self.windows.num_rows, self.batch))

    def _put(self, step: int):
        batches = [self._rows(step)]
        return parallel.put_batches({name: np.stack([x[name] for x in batches]) for name in batches[0]}, self.mesh)


class RowSet:
    """A data set whose items are rows, as lists of integers."""

    def __init__(self, columns_WT: dict[str, np.ndarray]):
        self.columns = {name: values.tolist() for name, values in columns_WT.items()}

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        return {name: values[row] for name, values in self.columns.items()}


class BatchSet:
    """A data set whose items are whole batches, corrupted; an index is the rows of one."""

    def __init__(self, columns_WT: dict[str, np.ndarray], collator):
        import torch

        self.columns = {name: torch.from_numpy(values) for name, values in columns_WT.items()}
        self.columns["special_tokens_mask"] = self.columns["special_tokens_mask"].bool()
        self.collator = collator

    def __getitem__(self, row_B):
        batch = {name: values[row_B] for name, values in self.columns.items()}
        special_BT = batch.pop("special_tokens_mask")
        batch["input_ids"], batch["labels"] = self.collator.torch_mask_tokens(batch["input_ids"], special_BT)
        return batch


class Theirs:
    """The peer's side over the same batches as `Ours`."""

    def __init__(self, ours: Ours, tokenizer: Tokenizer, whole: bool, workers: int):
        import torch
        from torch.utils.data import DataLoader
        from transformers import DataCollatorForLanguageModeling

        torch.manual_seed(0)
        torch.set_num_threads(1)  # as in its workers: batches are too small to share
        self.cuda = jax.default_backend() == "gpu"
        batches = [ours._rows(step) for step in range(ours.steps)]
        given = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        special = np.isin(given["ids"], [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id])
        columns = {"input_ids": given["ids"], "attention_mask": given["segment"], "special_tokens_mask": special}
        if "position" in given:
            columns["position_ids"] = given["position"]
        columns = {name: values.astype(np.int64) for name, values in columns.items()}
        # They lie in the order in which they are asked for, which is the best case for them.
        rows = np.arange(len(given["ids"])).reshape(ours.steps, -1).tolist()
        collator = DataCollatorForLanguageModeling(hugging_face(tokenizer), mlm_probability=RATE)
        # A process forked from one that runs JAX may hang: its threads are not there any more.
        more = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": self.cuda}
        more["multiprocessing_context"] = "spawn" if workers else None
        if whole:
            self.loader = DataLoader(BatchSet(columns, collator), sampler=rows, batch_size=None, **more)
        else:
            self.loader = DataLoader(RowSet(columns), batch_sampler=rows, collate_fn=collator, **more)

    def __call__(self) -> None:
        for batch in self.loader:
            if self.cuda:
                batch = {name: values.to("cuda", non_blocking=True) for name, values in batch.items()}
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def batches(self, count: int):
        for number, batch in enumerate(self.loader):
            if number < count:
                yield Batch(*(batch[name].numpy() for name in ("input_ids", "labels", "attention_mask")))


def check(name: str, side, ours: Ours, tokenizer: Tokenizer, count: int) -> dict[str, float]:
    """Shares of chosen positions and of those replaced; exits where rows or shares are not what they should be."""
    chosen = eligible = masked = changed = 0
    for step, batch in enumerate(side.batches(count)):
        given = ours._rows(step)
        picked_BT = batch.labels_BT != -100
        special_BT = np.isin(given["ids"], [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id])
        undone_BT = np.where(picked_BT, batch.labels_BT, batch.ids_BT)
        if (undone_BT != given["ids"]).any() or (batch.segment_BT != given["segment"]).any():
            sys.exit(f"{name}: step {step} has other rows than ours: no times")
        if (picked_BT & special_BT).any():
            sys.exit(f"{name}: step {step} predicts special positions: no times")
        chosen, eligible = chosen + picked_BT.sum(), eligible + (~special_BT).sum()
        masked += (picked_BT & (batch.ids_BT == tokenizer.mask_id)).sum()
        changed += (picked_BT & (batch.ids_BT != tokenizer.mask_id) & (batch.ids_BT != given["ids"])).sum()
    shares = {}
    for what, number, total, expected in (
        ("chosen", chosen, eligible, RATE),
        ("[MASK]", masked, chosen, MASK_SHARE + RANDOM_SHARE / tokenizer.vocab_size),
        ("other", changed, chosen, RANDOM_SHARE * (1 - 2 / tokenizer.vocab_size)),
    ):
        shares[what] = float(number / total)
        if abs(shares[what] - expected) > SIGMAS * np.sqrt(expected * (1 - expected) / total):
            sys.exit(f"{name}: {shares[what]:.4f} {what}, and {expected:.4f} should be: no times")
    return shares


def batching(
    args, windows: Windows, kind: str, tokenizer: Tokenizer, batch: int, workers: int, copy_rate: float
) -> dict[str, Any]:
    """The table of one kind of rows and one size of batches; `workers` of the peer (0: none beside this process)."""
    steps = max(1, min(args.rows, windows.num_rows) // batch)
    ours = Ours(windows, tokenizer, batch, steps)
    sides = {"ours": ours}
    for count in dict.fromkeys((0, workers)):
        name = f", {count} workers" if count else ""
        sides["collator" + name] = Theirs(ours, tokenizer, False, count)
        sides["whole batch" + name] = Theirs(ours, tokenizer, True, count)
    shares = {name: check(name, side, ours, tokenizer, steps) for name, side in sides.items()}
    sides = {"ours": ours, "ours, fed": ours.fed, "ours, host": ours.host} | sides
    times = side_by_side.alternate(sides, args.rounds)
    rows = []
    for name, seconds in times.items():
        a_step = [value / steps for value in seconds]
        rate = batch / float(np.median(a_step))
        more = {"rows/s": rate, "tokens/s": rate * windows.length}
        more["x training"] = more["tokens/s"] / args.training
        work = (BYTES * batch * windows.length, copy_rate) if name == "ours, host" else ()
        rows.append(side_by_side.Row(name, a_step, *work, more=more))
    title = f"{kind} windows, batch {batch} x {windows.length}"
    return side_by_side.report(
        rows, title=title, dtype="int32", rows_of_set=windows.num_rows, steps=steps, shares=shares,
        filled=windows.num_tokens / windows.num_rows / windows.length,
    )  # fmt: skip


# --- command line ----------------------------------------------------------------------------------------------------


def integer(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of {least} or more")
    return int(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="a file or folder of .txt/.jsonl/.jsonl.gz (the embedded corpus)")
    parser.add_argument("--vocab", type=Path, help="vocab.txt or tokenizer.json (WordPiece trained on the corpus)")
    parser.add_argument("--documents", type=integer, default=4_000, help="of the embedded corpus (4,000)")
    parser.add_argument("--length", type=integer, default=128, help="positions of a row (128)")
    parser.add_argument("--batches", type=integer, nargs="+", default=[16, 64], help="rows of a batch (16 64)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="rows (all three)")
    parser.add_argument("--rows", type=integer, default=4_096, help="rows of a measured turn (4,096)")
    parser.add_argument("--rounds", type=integer, default=5, help="measured turns of each side (5)")
    parser.add_argument("--text-rounds", type=integer, default=2, help="the same of tokenising (2)")
    parser.add_argument("--workers", type=partial(integer, least=0), help="worker processes of the peer (the cores)")
    parser.add_argument("--threads", type=integer, help="cores for all of it (the process's)")
    parser.add_argument("--training", type=integer, default=1_200_000, help="tokens/s to compare with (1,200,000)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, unless they are given")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    if parser.parse_args().tiny:
        parser.set_defaults(**TINY)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    try:
        found = measure(args)
    except InputError as error:
        sys.exit(str(error))
    except ImportError as error:
        sys.exit(f'{error}; pip install -e ".[bench]" for the comparison')
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.threads:
        side_by_side.use_cores(args.threads)
    if args.workers is None:
        args.workers = parallel.cores()
    opened, tokenizer = corpus(args)
    copy_rate = side_by_side.ceiling(dtypes=(), size=1)["copy jax"]
    with tempfile.TemporaryDirectory() as folder:
        store, tokenised = tokenising(args, opened, tokenizer, Path(folder))
        tables = [tokenised]
        for kind in args.kinds:
            windows = make_windows(store, tokenizer, length=args.length, **KINDS[kind])
            workers = args.workers if kind == args.kinds[0] else 0  # they take seconds to start
            tables += [batching(args, windows, kind, tokenizer, batch, workers, copy_rate) for batch in args.batches]
    print(f"  ceiling: copy jax {copy_rate / 1e9:,.0f} GB/s; x training: of {args.training:,} tokens/s")
    return {"training": args.training, "ceiling": {"copy jax": copy_rate}, "tables": tables}


if __name__ == "__main__":
    main()
