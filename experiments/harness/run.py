"""The run folder: what makes an experiment repeatable, resumable and hard to destroy.

A `Run` owns one folder. Every file in it is written to a temporary neighbour, synced and renamed, so a reader sees the
old file or the new one and never a half; `metrics.jsonl` is appended line by line and cut back on resume. Killed at any
moment and started again with the same settings, a run ends with the same files as one that was never killed, except
for what may vary: in `config.json` the time of the start and the environments, in `metrics.jsonl` the value of the
key `timing`.

In a multi-process run every process calls the same functions; the first one alone writes, and it decides for all
whether a stage is already finished, so the others need to see its folder.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime
import errno
import fcntl
import functools
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import bert6_jax
from bert6_jax import train
from bert6_jax.errors import InputError
from experiments.harness import figures
from experiments.harness.browser import Context, Group, browser_html, sentences_html
from experiments.harness.claims import Claim

CONFIG, LOCK = "config.json", ".lock"
HEAD_ROWS = 12  # rows of a table that the report shows
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Table(NamedTuple):
    """A table as the report shows it; all of its rows are in `tables/NAME.csv`."""

    name: str
    caption: str
    columns: list[str]
    head: list[list]
    rows: int


class Figure(NamedTuple):
    """A figure of this run: `png` is the file's content, `alt` says in words what it shows."""

    name: str
    alt: str
    caption: str
    png: bytes


class Run:
    """One run folder, locked for this process; open it with `Run.open`, best in a `with` statement."""

    def __init__(self, out: Path, experiment: str, config: dict, record: dict, lock: int | None, quiet: bool):
        self.out = out
        self.experiment = experiment
        self.config = config
        self.record = record  # the content of config.json
        self.quiet = quiet
        self.primary = jax.process_index() == 0
        self.tables: dict[str, Table] = {}
        self.figures: dict[str, Figure] = {}
        self.coloured: dict[str, str] = {}  # HTML for the report, by name, as are the browsers
        self.browsers: dict[str, str] = {}
        self.claims: list[Claim] = []
        self._lock = lock
        self._command: str | None = None
        self._last_step: dict[str, int] = {}

    @classmethod
    def open(
        cls,
        out: Path | str,
        experiment: str,
        config: Mapping,
        *,
        command: str | None = None,
        quiet: bool = False,
        may_change: Collection[str] = (),
    ) -> Run:
        """Start a run in the folder `out`, or go on with the one that is there.

        `config` holds every setting that can change a result (JSON-like values; `dataclasses.asdict` of the
        experiment's config). Those named in `may_change` belong to later stages, which carry them in their names: they
        may differ from the folder's, and config.json takes the newest when the claims are written. Raises `InputError`
        and changes nothing if `out` is no folder, holds other things, another experiment or other settings, or is in
        use by another process.
        """
        out = Path(out)
        config = jsonable(config)
        lock = None
        try:
            record = _existing(out, experiment, config, may_change)
            if jax.process_index() == 0:
                out.mkdir(parents=True, exist_ok=True)
                lock = _lock(out)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(f"{out} cannot be used: {error.strerror}; use another --out") from error
        if lock is not None:
            try:
                record = _existing(out, experiment, config, may_change)  # again, now that nobody else can write
                record = _write_record(out, experiment, config, command, record)
            except BaseException:
                os.close(lock)
                raise
        run = cls(out, experiment, config, record or {}, lock, quiet)
        run._command = command
        return run

    def close(self) -> None:
        """Give the folder free for other processes."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def forget_if_empty(self) -> None:
        """Remove the record of a run that was refused before it produced anything."""
        entries = {entry.name for entry in self.out.iterdir()} if self.out.is_dir() else set()
        if self.primary and CONFIG in entries and entries <= {CONFIG, LOCK}:
            for name in entries:
                (self.out / name).unlink()
            self.out.rmdir()

    def drop_stale(self) -> None:
        """Remove tables and figures that this call has not written: they belong to earlier settings."""
        for kind, suffix, written in (("tables", "csv", self.tables), ("figures", "png", self.figures)):
            for path in (self.out / kind).glob(f"*.{suffix}") if self.primary else ():
                if path.stem not in written:
                    path.unlink()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def say(self, message: str) -> None:
        """One line of progress on stderr, unless the run is quiet."""
        if self.primary and not self.quiet:
            print(f"[{self.experiment}] {message}", file=sys.stderr, flush=True)

    def stage(self, name: str, fn: Callable[[], Mapping]) -> dict[str, np.ndarray | np.generic]:
        """The result of `fn()`, kept in `stages/NAME.npz`; a finished stage is loaded instead of computed.

        `fn` returns named numbers, strings, NumPy or JAX arrays (no objects, no bfloat16: `TypeError`). The values come
        back as NumPy arrays and scalars, the same whether they were computed or loaded. A damaged file is reported and
        computed anew.
        """
        path = self.out / "stages" / f"{_checked(name)}.npz"
        result = self._load(path) if self.primary else None
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            finished = bool(multihost_utils.broadcast_one_to_all(np.asarray(result is not None)))
            result = self._load(path) if finished and not self.primary else result
        if result is None:
            start = time.monotonic()
            result = {key: _storable(name, key, value) for key, value in fn().items()}
            if self.primary:
                write_file(path, _npz(result))
            self.say(f"stage {name}: done in {time.monotonic() - start:.1f} s")
        else:
            self.say(f"stage {name}: finished before, loaded")
        return {key: value[()] if value.ndim == 0 else value for key, value in result.items()}

    def keep_record(self, name: str, record: Mapping[str, str]) -> None:
        """Keep in stage `name` what this run is of (hashes); `InputError` if it began with something else."""
        for what, there in self.stage(name, lambda: record).items():
            if str(there) != record[what]:
                raise InputError(f"{self.out}: the {what} is not the one that this run began with; use another --out")

    def _load(self, path: Path) -> dict[str, np.ndarray] | None:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        with file:
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    if arrays.zip.comment != _count(arrays.files):
                        raise ValueError("entries are missing")
                    return {key: arrays[key] for key in arrays.files}
            except Exception as error:  # a cut or garbled zip shows itself in many kinds of error
                print(f"warning: {path} is damaged ({type(error).__name__}); computing it again", file=sys.stderr)
                return None

    def log(self, stage: str, step: int, **values) -> None:
        """Append `{"stage", "step", **values}` to `metrics.jsonl`; NaN and infinities become null.

        Within one stage the steps never go down (`ValueError`): a second seed is a second stage name. The first line
        of a stage in this process drops the lines that a killed process left at this step or later, so a stage that
        starts over, or goes on from a checkpoint, repeats nothing. Log a step before you save its checkpoint. What
        differs from run to run (seconds, tokens per second) goes under the key `timing`, and nowhere else.
        """
        if not self.primary:
            return
        if stage not in self._last_step:
            self.rewind(stage, step - 1)
        elif step < self._last_step[stage]:
            raise ValueError(f"stage {stage!r} logged step {self._last_step[stage]} and now {step}")
        self._last_step[stage] = int(step)
        line = _dumps({"stage": stage, "step": int(step), **jsonable(values)}) + b"\n"
        path = self.out / "metrics.jsonl"
        with _naming(path):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                _write_all(fd, line)
            finally:
                os.close(fd)

    def rewind(self, stage: str, step: int) -> None:
        """Drop this stage's lines after `step`, and whatever is no whole line, from `metrics.jsonl`."""
        if not self.primary:
            return
        self._last_step[stage] = int(step)
        path = self.out / "metrics.jsonl"
        old = path.read_bytes() if path.exists() else b""
        new = b"".join(line for line in old.splitlines(keepends=True) if _keep(line, stage, step))
        if new != old:
            write_file(path, new)

    def table(self, name: str, rows: Sequence[Mapping] | Mapping[str, Sequence], caption: str = "") -> None:
        """Write `tables/NAME.csv` from a list of rows (all with the same keys) or from named columns of equal length.

        Floats are written with as many digits as bring back the same value, `None` as an empty cell.
        """
        _checked(name)
        if isinstance(rows, Mapping):
            columns, lines = list(rows), [list(line) for line in zip(*rows.values(), strict=True)]
        elif not rows:
            raise ValueError(f"table {name!r} has no rows; give named empty columns so that it has a header")
        else:
            columns = list(rows[0])
            for number, row in enumerate(rows):
                if list(row) != columns:
                    raise ValueError(f"table {name!r}: row {number} has the keys {list(row)}, row 0 {columns}")
            lines = [list(row.values()) for row in rows]
        if self.primary:
            text = "".join(map(_csv_line, [columns, *lines]))
            write_file(self.out / "tables" / f"{name}.csv", text.encode(errors="backslashreplace"))
        self.tables[name] = Table(name, caption, columns, lines[:HEAD_ROWS], len(lines))

    def figure(self, name: str, fig, *, alt: str, caption: str = "") -> None:
        """Write the matplotlib figure to `figures/NAME.png` and keep it for the report; `alt` says what it shows."""
        path = self.out / "figures" / f"{_checked(name)}.png"
        png = figures.png(fig)
        if self.primary:
            write_file(path, png)
        self.figures[name] = Figure(name, alt, caption, png)

    def sentences(
        self,
        name: str,
        rows: Sequence[Context],
        caption: str = "",
        *,
        measure: str = "value",
        limits: tuple[float, float] | None = None,
    ) -> None:
        """Keep coloured sentences for the report, see `browser.sentences_html`."""
        self.coloured[name] = sentences_html(_checked(name), rows, caption, measure=measure, limits=limits)

    def browser(self, name: str, groups: Sequence[Group], caption: str = "") -> None:
        """Keep a browser of sparse features for the report, see `browser.browser_html`."""
        self.browsers[name] = browser_html(_checked(name), groups, caption)

    def write_claims(self, claims: Sequence[Claim]) -> None:
        """Write `claims.json`, a list of objects, and keep the claims for the report."""
        ids = [claim.id for claim in claims]
        if len(set(ids)) != len(ids):
            raise ValueError(f"claim ids repeat: {ids}")
        self.claims = list(claims)
        if self.primary and self.record.get("config") != self.config:  # settings of later stages, see `open`
            self.record |= {"config": self.config, "command": self._command}
            write_file(self.out / CONFIG, _dumps(jsonable(self.record), indent=2) + b"\n")
        if self.primary:
            entries = jsonable([dataclasses.asdict(claim) for claim in claims])
            write_file(self.out / "claims.json", _dumps(entries, indent=2) + b"\n")


_PEAK: list[float] = []


def peak_flops(run: Run, mesh) -> float:
    """What the devices of the mesh can do; measured once, and the formula of the progress bar is told once."""
    if not _PEAK:
        _PEAK.append(train.device_peak_flops())
        run.say(
            f"MFU = tokens/s * (6 N + 12 L d T) / peak, N: parameters in matrices, the head at its share of positions; "
            f"peak {_PEAK[0] / 1e12:.3g} TFLOP/s a device"
        )
    return _PEAK[0] * mesh.size


def write_file(path: Path, data: bytes) -> None:
    """Put `data` into the file at once: temporary neighbour, sync, rename. `OSError`s name the file."""
    temporary = path.with_name(f".{path.name}.tmp")
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                _write_all(fd, data)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)  # a full disk gets its space back
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def jsonable(value):
    """The value as JSON can hold it: arrays become lists, NaN and infinities null, paths strings."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and JAX
        return jsonable(value.tolist())
    raise TypeError(f"{type(value).__name__} has no place in JSON: {value!r}")


def environment() -> dict:
    """Versions, device and commit: what a result can depend on beside its settings."""
    devices = jax.devices()
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    flags = {
        key: value
        for key, value in sorted(os.environ.items())
        if key == "XLA_FLAGS" or key.lower() in jax.config.values
    }
    return {
        "versions": {
            "bert6_jax": bert6_jax.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "system": platform.platform(),
        "cpu_count": os.cpu_count(),
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "process_count": jax.process_count(),
        "flags": flags,
        "git_commit": _git_commit(),
    }


@functools.cache
def _git_commit() -> str | None:
    """The commit of this checkout, `-dirty` if files differ from it; None when installed without one."""
    root = Path(bert6_jax.__file__).resolve().parents[1]
    if not (root / ".git").exists():  # site-packages inside somebody else's repository is not our checkout
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _existing(out: Path, experiment: str, config: dict, may_change: Collection[str]) -> dict | None:
    """The record of the run in `out` if it is this one, None for a new folder, `InputError` for anything else."""
    path = out / CONFIG
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, not a folder; use another --out")
    if not path.exists():
        foreign = out.is_dir() and sorted({entry.name for entry in out.iterdir()} - {LOCK, f".{CONFIG}.tmp"})
        if foreign:
            raise InputError(f"{out} holds {foreign[0]!r} but no {CONFIG}, so it is no run folder; use another --out")
        return None
    try:
        record = json.loads(path.read_bytes())
        there, settings = record["experiment"], _flat(record["config"])
        _flat(record["environment"]), list(record["resumed_in"]), record["started"], record["command"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{path} is damaged ({type(error).__name__}); use another --out, or remove the folder"
        raise InputError(message) from error
    if there != experiment:
        message = f"{out} holds a run of experiment {there!r}, not of {experiment!r}; use another --out"
        raise InputError(message)
    wanted = _flat(config)
    names = [
        key
        for key in wanted | settings
        if key not in may_change and settings.get(key, _ABSENT) != wanted.get(key, _ABSENT)
    ]
    if names:
        shown = [f"{name} is {_short(settings, name)} there and {_short(wanted, name)} here" for name in names[:3]]
        more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
        raise InputError(
            f"{out} holds a run with other settings: {'; '.join(shown)}{more}; use another --out, or those settings"
        )
    return record


_ABSENT = object()


def _short(settings: dict, name: str) -> str:
    text = json.dumps(settings[name]) if name in settings else "absent"
    return text if len(text) <= 60 else text[:57] + "..."


def _flat(config: Mapping, prefix: str = "") -> dict:
    """Nested settings under dotted names."""
    flat = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _write_record(out: Path, experiment: str, config: dict, command: str | None, record: dict | None) -> dict:
    """Write config.json for a new run; for an old one only add an environment that it has not seen yet."""
    here = environment()
    if record is None:
        record = {
            "experiment": experiment,
            "command": command,
            "config": config,
            "environment": here,
            "resumed_in": [],
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
    elif here not in (record["environment"], *record["resumed_in"]):
        there, now = _flat(record["environment"]), _flat(here)
        names = ", ".join(key for key in there | now if there.get(key, _ABSENT) != now.get(key, _ABSENT))
        print(f"note: {out} began in another environment ({names}); its numbers may depend on both", file=sys.stderr)
        record = record | {"resumed_in": [*record["resumed_in"], here]}
    else:
        return record
    write_file(out / CONFIG, _dumps(jsonable(record), indent=2) + b"\n")
    return record


def _lock(out: Path) -> int:
    """Lock the folder until the descriptor is closed or the process ends, however it ends.

    A POSIX record lock: forked data workers do not inherit it, so none of them can hold it after our death.
    """
    fd = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(fd, 200).decode(errors="replace").strip()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            os.close(fd)
            message = f"{out} is in use by another process ({owner}); wait until it ends, or use another --out"
            raise InputError(message) from error
        print(f"note: {out} cannot be locked ({error.strerror}); start no second run in it", file=sys.stderr)
        return fd
    os.ftruncate(fd, 0)
    os.write(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return fd


def _keep(line: bytes, stage: str, step: int) -> bool:
    try:
        entry = json.loads(line)
        return line.endswith(b"\n") and not (entry["stage"] == stage and entry["step"] > step)
    except (ValueError, KeyError, TypeError):  # half-written
        return False


def _storable(stage: str, key: str, value) -> np.ndarray:
    array = np.array(value, order="C")  # as it will be read: sums over another layout differ in the last bit
    if array.dtype.kind not in "biufcSU":
        raise TypeError(f"stage {stage!r} returned {key!r} as {array.dtype}; numbers, booleans and strings can be kept")
    return array


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The arrays as `np.savez` would write them, but any name is allowed and pickle never."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.comment = _count(arrays)
        for key, array in arrays.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    return buffer.getvalue()


def _count(names) -> bytes:
    # Zip's checksums cover what is in an archive; this covers that it is there.
    return f"{len(names)} arrays".encode()


def _csv_line(row: Sequence) -> str:
    # With the default line end CR LF, csv quotes a lone CR too; with LF it does not, and readers would split the row.
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerow(row)
    return buffer.getvalue().removesuffix("\r\n") + "\n"


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a file; use letters, digits, '_', '-' and '.'")
    return name


def _dumps(value, indent: int | None = None) -> bytes:
    # A lone surrogate from odd input becomes the escape \udXXX, which is what JSON wants there.
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent).encode(errors="backslashreplace")


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give an `OSError` from a bare descriptor the name of the file it belongs to."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
