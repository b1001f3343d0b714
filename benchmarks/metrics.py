"""Accuracy per token (APT) and token confusion of 10 million positions: ours against torchmetrics and scikit-learn.

    taskset -c 0,1 python -m benchmarks.metrics     V 30,522; minutes on two cores, up to 15 GB for scikit-learn's V x V
    python -m benchmarks.metrics --tiny             small sizes, which show that it runs and nothing else

Targets by a law near Zipf's, predictions right about 60 % of the time, else by the same law; every position is valid.
All on the CPU, from arrays in memory to the finished numbers. The pieces of work and their sides:

    apt         ours            `apt(count_tokens(...))` from NumPy arrays; by corruption mode, which no peer does
                ours-on-device  the same from JAX arrays, as an evaluation has them
                torchmetrics    `multiclass_accuracy(average=None)`, inputs unchecked: its faster form
                scikit-learn    `recall_score(average=None)`, inputs unchecked, without `labels`: its faster form
                numpy           two `bincount`, as a reader would write it
    depths      ours            the positions dealt to seven depths on the same targets, one `vmap`
                ours-each       seven calls
                numpy           two `bincount` a depth
    confusion   ours            `count_confusion`, sparse
                ours-jit        the same with a `size` (`--slots`), as it runs inside jit
                torchmetrics    `multiclass_confusion_matrix`, inputs unchecked; the class would hold V x V twice
                scikit-learn    `confusion_matrix(labels=range(V))`
                torch           `bincount(target * V + prediction)`, V x V
                numpy           `unique` of uint32 keys, with counts
                scipy           `coo_array(...).tocsr()`, which sums duplicates

Sides of PyTorch get int64, as its own argmax gives, the others int32. Every side has a process of its own, that its
peak memory be its own, on the same cores; they take turns, so that no two hold V x V, and one is left out where the
memory for it is not free. A call is timed inside its process, the release of its result is not. Peak memory is the
process's, start and compilation included; `over` is what that is above the process with its library and its inputs.
CPU time is that of all its threads, which other work on the machine changes least.

No times unless the results agree: accuracies to 1e-6 at every id that occurs (peers say 0 where ours says NaN),
confusions entry by entry (SHA-256 of the sorted rows, columns and counts). The share of the ceiling is of one reading
of both id arrays (8 bytes a position) at the rate of a copy: what is left is the price of scattered counts and of
sorting. torchmetrics, scikit-learn and PyTorch come with the extra `bench`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# JAX and what imports it are imported where they are used: a peer's process must not pay for them.

DEPTHS = 7
SIDES = {
    "apt": ("ours", "ours-on-device", "torchmetrics", "scikit-learn", "numpy"),
    "depths": ("ours", "ours-each", "numpy"),
    "confusion": ("ours", "ours-jit", "torchmetrics", "scikit-learn", "torch", "numpy", "scipy"),
}
NAMES = tuple(dict.fromkeys(name for sides in SIDES.values() for name in sides))
PEERS = ("torchmetrics", "scikit-learn")  # the claim is against the faster of them
TITLES = {
    "apt": "accuracy per token",
    "depths": f"accuracy per token at {DEPTHS} depths",
    "confusion": "token confusion",
}
# Arrays V x V of int64 that a side holds at once.
TABLES = {("apt", "torchmetrics"): 1, ("confusion", "torchmetrics"): 1, ("confusion", "torch"): 1}
TABLES[("confusion", "scikit-learn")] = 2
RESERVE = 1.5e9  # bytes that must stay free beside them
AGREE = 1e-6  # of an accuracy
RIGHT = 0.6
ARRAYS = ("targets", "predictions", "modes", "valid")
TINY = {"positions": 70_000, "vocab": 1_000, "rounds": 2}
WORKER = "--worker"
FASTER, MEMORY = 10.0, 1e9  # what must hold


class NoMemory(Exception):
    """One line: what a side needs and what is free."""


# --- the work, in a process of its own -------------------------------------------------------------------------------


class Work(NamedTuple):
    """A side's work. `call()` is what is timed; `answer(its result)` brings it to the form that is compared."""

    call: Any
    answer: Any
    version: str


def accuracies(right_V: np.ndarray, seen_V: np.ndarray) -> np.ndarray:
    """float32, 0 where an id was not seen."""
    return (right_V / np.maximum(seen_V, 1)).astype(np.float32)


def triples(row, col, count) -> np.ndarray:
    """int32 [3, E], sorted by row and column."""
    return np.stack([np.asarray(x).astype(np.int32) for x in (row, col, count)])


def entries(table_VV) -> np.ndarray:
    """Those of a dense table that are not 0. Some rows at a time: nothing else of size V x V."""
    found = []
    for begin in range(0, len(table_VV), 1_000):
        rows = np.asarray(table_VV[begin : begin + 1_000])
        row, col = np.nonzero(rows)
        found.append(triples(row + begin, col, rows[row, col]))
    return np.concatenate(found, axis=1)


def ours(work: str, side: str, arrays: dict[str, np.ndarray], V: int, slots: int) -> Work:
    import jax

    from bert6_jax import metrics

    targets, predictions, modes, valid = (arrays[name] for name in ARRAYS)
    count, run = metrics.count_tokens, jax.block_until_ready
    if work == "confusion":
        size = slots if side == "ours-jit" else None

        def answer(found):
            if int(found.lost):
                raise ValueError(f"{int(found.lost)} positions found no slot; more --slots")
            used = np.asarray(found.count_E) > 0
            return triples(*(np.asarray(x)[used] for x in found[:3]))

        call = partial(metrics.count_confusion, targets, predictions, valid, V, size)
    elif work == "apt":
        answer = np.asarray
        if side == "ours-on-device":
            targets, predictions, modes, valid = (jax.device_put(x) for x in (targets, predictions, modes, valid))

        def call():
            return metrics.apt(count(targets, predictions, modes, valid, V))

    elif side == "ours":
        answer = np.asarray
        over = jax.jit(jax.vmap(lambda t, p, m, v: metrics.apt(count(t, p, m, v, V)), (None, 0, None, None)))
        call = partial(over, targets, predictions, modes, valid)
    else:
        answer = np.stack

        def call():
            return [metrics.apt(count(targets, p, modes, valid, V)) for p in predictions]

    return Work(lambda: run(call()), answer, jax.__version__)


def with_torch(work: str, side: str, arrays: dict[str, np.ndarray], V: int, cores: int) -> Work:
    import torch

    torch.set_num_threads(cores)
    target, prediction = (torch.from_numpy(arrays[name].astype(np.int64)) for name in ARRAYS[:2])
    if side == "torch":
        return Work(
            lambda: torch.bincount(target * V + prediction, minlength=V * V),
            lambda found: entries(found.numpy().reshape(V, V)),
            torch.__version__,
        )
    import torchmetrics
    from torchmetrics.functional import classification

    options = {"num_classes": V, "validate_args": False}
    if work == "apt":
        call = partial(classification.multiclass_accuracy, prediction, target, average=None, **options)
        return Work(call, lambda found: found.numpy(), torchmetrics.__version__)
    call = partial(classification.multiclass_confusion_matrix, prediction, target, **options)
    return Work(call, lambda found: entries(found.numpy()), torchmetrics.__version__)


def with_sklearn(work: str, arrays: dict[str, np.ndarray], V: int) -> Work:
    import sklearn
    from sklearn.metrics import confusion_matrix, recall_score

    sklearn.set_config(assume_finite=True)
    targets, predictions = arrays["targets"], arrays["predictions"]
    if work == "confusion":
        ids_V = np.arange(V)
        return Work(lambda: confusion_matrix(targets, predictions, labels=ids_V), entries, sklearn.__version__)

    def answer(found):
        all_V = np.zeros(V, np.float32)
        all_V[np.union1d(targets, predictions)] = found
        return all_V

    return Work(lambda: recall_score(targets, predictions, average=None, zero_division=0), answer, sklearn.__version__)


def plain(work: str, side: str, arrays: dict[str, np.ndarray], V: int) -> Work:
    targets, predictions = arrays["targets"], arrays["predictions"]

    def one(p):
        return accuracies(np.bincount(targets[targets == p], minlength=V), np.bincount(targets, minlength=V))

    if work == "apt":
        return Work(partial(one, predictions), np.asarray, np.__version__)
    if work == "depths":
        return Work(lambda: [one(p) for p in predictions], np.stack, np.__version__)
    if side == "scipy":
        import scipy
        from scipy import sparse

        def answer(found):
            found = found.tocoo()
            return triples(*found.coords, found.data)

        once = np.ones(targets.size, np.int32)
        return Work(
            lambda: sparse.coo_array((once, (targets, predictions)), shape=(V, V)).tocsr(), answer, scipy.__version__
        )
    kind = np.uint32 if V < 2**16 else np.uint64

    def call():
        return np.unique(targets.astype(kind) * kind(V) + predictions.astype(kind), return_counts=True)

    return Work(call, lambda found: triples(*np.divmod(found[0], kind(V)), found[1]), np.__version__)


def made(given: dict[str, Any], arrays: dict[str, np.ndarray]) -> Work:
    work, side, V = given["work"], given["side"], given["vocab"]
    if work == "depths":
        X = arrays["targets"].size // DEPTHS
        deal = {name: x[:X] for name, x in arrays.items()}
        arrays = deal | {"predictions": arrays["predictions"][: DEPTHS * X].reshape(DEPTHS, X)}
    if side.startswith("ours"):
        return ours(work, side, arrays, V, given["slots"])
    if side.startswith("torch"):
        return with_torch(work, side, arrays, V, given["cores"])
    if side == "scikit-learn":
        return with_sklearn(work, arrays, V)
    return plain(work, side, arrays, V)


def memory() -> tuple[int, int]:
    """Bytes that this process holds in memory, and the most it held since the last `forget`.

    From Linux's /proc, where the peak is that of this program alone; `ru_maxrss` may be a parent's. It stands in
    elsewhere, for both.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return peak, peak
    found = {name: int(value.split()[0]) * 1024 for name, _, value in (x.partition(":") for x in lines) if "Vm" in name}
    return found["VmRSS"], found["VmHWM"]


def forget() -> None:
    """The peak is from now on that of what follows, where the system can forget it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def worker(given: dict[str, Any]) -> None:
    """One side: answers each line "check" or "run" on standard input with one line of JSON."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes elsewhere

    def reply(**what):
        print(json.dumps(what), file=replies)

    folder = Path(given["folder"])
    try:
        work = made(given, {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in ARRAYS})
    except ImportError as error:
        return reply(error=f'{error}; pip install -e ".[bench]" for the peers, or choose --sides')
    before, peak = memory()
    reply(version=work.version, before=before)
    for line in sys.stdin:
        start, start_cpu = time.perf_counter(), time.process_time()
        found = work.call()
        seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        peak = max(peak, memory()[1])
        more = {"seconds": seconds, "cpu": cpu, "peak": peak}
        if line.strip() == "check":
            try:
                answer = work.answer(found)
            except ValueError as error:
                return reply(error=str(error))
            if given["work"] == "confusion":
                digest = hashlib.sha256(np.ascontiguousarray(answer)).hexdigest()
                more |= {"entries": answer.shape[1], "digest": digest}
            else:
                more["path"] = str(folder / f"{given['work']} {given['side']}.npy")
                np.save(more["path"], answer, allow_pickle=False)
            del answer
        del found  # a table V x V goes before the next side's turn
        forget()
        reply(**more)


# --- the process that asks -------------------------------------------------------------------------------------------


class Side:
    """A side's process. `ask(what)` gives its answer; `start()` waits until its inputs are in place."""

    def __init__(self, given: dict[str, Any]):
        self.name, self.seconds, self.cpu, self.peak = given["side"], [], [], 0
        self.needs = 8.0 * given["vocab"] ** 2 * TABLES.get((given["work"], self.name), 0)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.metrics", WORKER, json.dumps(given)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            # A GPU would be shared by processes that each reserve most of it, and none of the peers uses one.
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip

    def _reply(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the process of {self.name} ended with status {self.process.wait()}: no times")
        found = json.loads(line)
        if "error" in found:
            sys.exit(f"{self.name}: {found['error']}")
        return found

    def start(self) -> None:
        found = self._reply()
        self.version, self.before = found["version"], found["before"]

    def ask(self, what: str) -> dict[str, Any]:
        from benchmarks import side_by_side

        free = side_by_side.free_memory()
        if self.needs and free < self.needs + RESERVE:
            raise NoMemory(
                f"{self.name} left out: it takes {self.needs / 1e9:.1f} GB, {free / 1e9:.1f} GB are free and "
                f"{RESERVE / 1e9:.1f} are to stay so"
            )
        print(what, file=self.process.stdin, flush=True)
        found = self._reply()
        self.peak = max(self.peak, found["peak"])
        return found

    def run(self) -> None:
        found = self.ask("run")
        self.seconds.append(found["seconds"])
        self.cpu.append(found["cpu"])

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def positions(count: int, vocab: int) -> dict[str, np.ndarray]:
    """Targets, predictions, modes and valid, [X], of a law near Zipf's: the id of rank r about as often as 1 / r."""
    from bert6_jax.metrics import MODES, RATES

    generator = np.random.Generator(np.random.Philox(key=2))
    targets, wrong = ((vocab ** generator.random(count)).astype(np.int32) - 1 for _ in range(2))
    predictions = np.where(generator.random(count, np.float32) < RIGHT, targets, wrong)
    modes = generator.choice(len(MODES), count, p=RATES).astype(np.int32)
    return dict(zip(ARRAYS, (targets, predictions, modes, np.ones(count, bool)), strict=True))


def compare(work: str, answers: dict[str, dict[str, Any]], seen_V: np.ndarray) -> dict[str, float]:
    """How far the sides are from the first, by name; exits where they do not agree. Confusions agree or do not: 0."""
    names = list(answers)
    found = {}
    for name in names[1:]:
        one, other = answers[names[0]], answers[name]
        if work == "confusion":
            if (one["entries"], one["digest"]) != (other["entries"], other["digest"]):
                both = f"{one['entries']:,} and {other['entries']:,} entries"
                sys.exit(f"confusions of {names[0]} and {name} differ ({both}): no times")
            found[name] = 0.0
            continue
        expected, value = (np.load(answer["path"], allow_pickle=False)[..., seen_V] for answer in (one, other))
        found[name] = float(np.abs(expected - value).max())
        if not found[name] <= AGREE:  # NaN neither
            sys.exit(f"accuracies of {names[0]} and {name} differ by {found[name]:.2g}, more than {AGREE:g}: no times")
    return found


def measure(work: str, args: argparse.Namespace, folder: str, seen_V: np.ndarray, ceiling: float) -> dict[str, Any]:
    from benchmarks import side_by_side
    from bert6_jax import parallel

    given = {"work": work, "vocab": args.vocab, "slots": args.slots, "folder": folder, "cores": parallel.cores()}
    sides = {name: Side(given | {"side": name}) for name in SIDES[work] if name in args.sides}
    if not sides:
        sys.exit(f"no side does {work}; those that do are {', '.join(SIDES[work])}")
    try:
        for side in sides.values():
            side.start()
        answers, left_out = {}, []

        def leave_out(name, error):
            left_out.append(str(error))
            print(f"  {error}", file=sys.stderr)
            sides.pop(name).end()

        for name, side in list(sides.items()):
            try:
                answers[name] = side.ask("check")
            except NoMemory as error:
                leave_out(name, error)
        differ = compare(work, answers, seen_V)

        def turn(name):
            if name in sides:
                try:
                    sides[name].run()
                except NoMemory as error:
                    leave_out(name, error)

        side_by_side.alternate({name: partial(turn, name) for name in list(sides)}, args.rounds, warmup=0)
    finally:
        for side in sides.values():
            side.end()
    X = args.positions // DEPTHS * DEPTHS if work == "depths" else args.positions
    rows = []
    for name, side in sides.items():
        more = {
            "M positions/s": X / statistics.median(side.seconds) / 1e6,
            "CPU ms": 1e3 * statistics.median(side.cpu),
            "peak MB": side.peak / 1e6,
            "over MB": (side.peak - side.before) / 1e6,
        }
        rows.append(side_by_side.Row(name, side.seconds, 8.0 * X, ceiling, more))
    found = side_by_side.report(
        rows,
        title=f"{TITLES[work]}, {X:,} positions, V {args.vocab:,}",
        shapes={"positions": X, "vocab": args.vocab, "slots": args.slots},
        dtype="int32 ids and counts, float32 accuracies",
        ceiling={"copy jax": ceiling},
        versions_of_sides={name: side.version for name, side in sides.items()},
        differ=differ,
        left_out=left_out,
        entries=next((a["entries"] for a in answers.values() if "entries" in a), None),
    )
    found["claim"] = None if args.tiny else claim(found["rows"])
    if found["claim"]:
        print(f"  {found['claim']['text']}")
    return found


def claim(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Ours, the first row, against the faster of the two peers; None without one."""
    first, peers = rows[0], [row for row in rows if row["side"] in PEERS]
    if first["side"] != "ours" or not peers:
        return None
    peer = min(peers, key=lambda row: row["median"])
    ratio, peak = peer["median"] / first["median"], 1e6 * first["peak MB"]
    holds = ratio >= FASTER and peak <= MEMORY
    text = (
        f"{ratio:.1f} times as fast as {peer['side']}, the faster peer, in {peak / 1e6:,.0f} MB against "
        f"{peer['peak MB']:,.0f} of the whole process: {FASTER:g} times within {MEMORY / 1e6:,.0f} MB "
        f"{'holds' if holds else 'does not hold'}"
    )
    return {"peer": peer["side"], "ratio": ratio, "peak": peak, "holds": holds, "text": text}


def chosen(allowed: tuple[str, ...], text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in allowed:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(allowed)}")
    return names


def arguments() -> argparse.Namespace:
    from benchmarks.side_by_side import positive

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", type=partial(chosen, tuple(SIDES)), default=list(SIDES), help="with commas")
    parser.add_argument("--sides", type=partial(chosen, NAMES), default=list(NAMES), help="with commas")
    parser.add_argument("--rounds", type=positive, default=3, help="measured turns of each side (3)")
    parser.add_argument("--positions", type=positive, default=10_000_000, help="modified positions (10,000,000)")
    parser.add_argument("--vocab", type=positive, default=30_522, help="ids (30,522)")
    parser.add_argument("--slots", type=positive, default=4_000_000, help="entries of ours-jit (4,000,000)")
    parser.add_argument("--threads", type=positive, default=None, help="of all sides (the process's cores)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, unless they are given")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    if parser.parse_args().tiny:
        parser.set_defaults(**TINY)
    args = parser.parse_args()
    if args.positions < DEPTHS or args.vocab < 2:
        parser.error(f"--positions is at least {DEPTHS} and --vocab 2")
    return args


def main() -> None:
    if sys.argv[1:2] == [WORKER]:
        return worker(json.loads(sys.argv[2]))
    os.environ["JAX_PLATFORMS"] = "cpu"
    args = arguments()
    from benchmarks import side_by_side
    from bert6_jax.errors import InputError

    try:
        if args.threads:
            side_by_side.use_cores(args.threads)
    except InputError as error:
        sys.exit(str(error))
    with tempfile.TemporaryDirectory() as folder:
        arrays = positions(args.positions, args.vocab)
        for name, values in arrays.items():
            np.save(Path(folder) / f"{name}.npy", values, allow_pickle=False)
        seen_V = {work: np.zeros(args.vocab, bool) for work in SIDES}
        for work, X in (("apt", args.positions), ("depths", args.positions // DEPTHS), ("confusion", 0)):
            seen_V[work][arrays["targets"][:X]] = True
        del arrays
        copy = side_by_side.ceiling(dtypes=(), megabytes=16 if args.tiny else 256)["copy jax"]
        found = {work: measure(work, args, folder, seen_V[work], copy) for work in SIDES if work in args.works}
    print(f"  ceiling: copy jax {copy / 1e9:,.0f} GB/s")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
