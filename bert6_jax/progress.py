"""Progress of a long loop: a live bar on a terminal, a plain line now and then in the log of a batch job."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

PERIOD = 30.0  # seconds between two plain lines, and the window of the rate


class Progress:
    """Counts towards `total` and shows rate, time left and the fields of the last update.

    with Progress(steps, "pretrain", "steps") as progress:
        ...
        progress.update(8, loss=loss, mfu=mfu)

    Args:
        total: how many units the loop will have done at its end; None if nobody knows.
        label: what is going on.
        unit: what is counted; the rate is shown in `unit`/s.
        done: units that an earlier process did (a resumed run); they count for the bar, not for the rate.
        quiet: show nothing.
        file: where to write, stderr by default. The live bar appears if it is a terminal.
    """

    def __init__(
        self,
        total: int | None,
        label: str,
        unit: str = "steps",
        *,
        done: int = 0,
        quiet: bool = False,
        file: TextIO | None = None,
    ):
        self.total = total
        self.label = label
        self.unit = unit
        self.done = done
        self.fields: dict[str, object] = {}
        self._begun = done
        self._quiet = quiet
        self._file = file or sys.stderr
        self._bar = None

    def __enter__(self) -> Progress:
        self._start = time.monotonic()
        self._marks = [(self._start, self.done)]  # (time, count) for the rate, oldest first
        self._shown = self._start
        if not self._quiet and self._file.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = _bar(self._file)
            self._task = self._bar.add_task(self.label, total=self.total, status=self._status())
            self._bar.start()
        return self

    def update(self, n: int = 1, **fields: object) -> None:
        """Count `n` more units; `fields` are shown behind the rate until the next update changes them."""
        self.done += n
        self.fields |= fields
        now = time.monotonic()
        if self._quiet or now - self._shown < (0.1 if self._bar else PERIOD):
            return
        self._shown = now
        self._marks.append((now, self.done))
        while len(self._marks) > 2 and now - self._marks[1][0] >= PERIOD:
            del self._marks[0]
        if self._bar:
            self._bar.update(self._task, completed=self.done, status=self._status())
        else:
            print(f"{self.label}: {self._status()}", file=self._file, flush=True)

    def __exit__(self, kind, error, traceback) -> None:
        if self._quiet:
            return
        now = time.monotonic()
        self._marks = [(self._start, self._begun), (now, self.done)]  # the last word is the mean rate
        end = f"{'in' if error is None else 'stopped after'} {_clock(now - self._start)}"
        if self._bar:
            self._bar.update(self._task, completed=self.done, status=self._status(end))
            self._bar.stop()
        else:
            print(f"{self.label}: {self._status(end)}", file=self._file, flush=True)

    def _status(self, end: str = "") -> str:
        count = f"{_si(self.done)} {self.unit}"
        if self.total:
            count = f"{_si(self.done)}/{_si(self.total)} {self.unit} ({self.done / self.total:.0%})"
        parts = [f"{count} {end}".rstrip()]
        (begin, before), (now, after) = self._marks[0], self._marks[-1]
        if now > begin and after > before:
            rate = (after - before) / (now - begin)
            parts.append(f"{_si(rate)} {self.unit}/s")
            if self.total and not end:
                parts.append(f"{_clock(max(self.total - self.done, 0) / rate)} left")
        return ", ".join(parts + [f"{key} {_value(value)}" for key, value in self.fields.items()])


def _bar(file: TextIO):
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    # Markup off: a label in square brackets stays text. On a narrow terminal the status wraps, nothing else moves.
    label = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
    bar = BarColumn(bar_width=16, table_column=Column(min_width=16))
    status = TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=False, overflow="fold"))
    return Bar(label, bar, status, console=Console(file=file))


def _value(value: object) -> str:
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError):
        return str(value)


def _si(number: float) -> str:
    """1234567 -> 1.23M."""
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * factor:  # what three digits would round up to it
            return f"{number / factor:.3g}{suffix}"
    return f"{number:.3g}"


def _clock(seconds: float) -> str:
    """75 -> 1:15, 3675 -> 1:01:15."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
