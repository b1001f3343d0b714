"""Progress: plain lines for logs, a live bar for terminals."""

from __future__ import annotations

import contextlib
import io
import os
import pty

import pytest

from bert6_jax import progress
from bert6_jax.progress import Progress


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_plain_line_every_half_minute_and_one_at_the_end(clock):
    file = io.StringIO()
    with Progress(10_000, "pretrain", file=file) as bar:
        for step in range(0, 10_000, 100):  # 100 steps a second
            clock.now += 1
            bar.update(100, loss=10 / (step + 1), note="warm [red]")
    first, *_, end = lines = file.getvalue().splitlines()
    assert len(lines) == 4
    left = "1:10"  # 7,000 steps at 100 a second
    assert first == f"pretrain: 3k/10k steps (30%), 100 steps/s, {left} left, loss 0.003447, note warm [red]"
    assert end == "pretrain: 10k/10k steps (100%) in 1:40, 100 steps/s, loss 0.00101, note warm [red]"


def test_the_rate_forgets_what_is_long_past_and_what_another_process_did(clock):
    file = io.StringIO()
    with Progress(4000, "train", done=1000, file=file) as bar:
        clock.now += 100  # compiling
        bar.update(100)
        clock.now += 31
        bar.update(310)
    compiling, steady, end = file.getvalue().splitlines()
    assert "1 steps/s" in compiling and ", 10 steps/s, 4:19 left" in steady
    assert end == "train: 1.41k/4k steps (35%) in 2:11, 3.13 steps/s"


def test_unknown_totals_and_other_units(clock):
    file = io.StringIO()
    with Progress(None, "read", "tokens", file=file) as bar:
        clock.now += 40
        bar.update(2_000_000)
    assert file.getvalue().splitlines() == ["read: 2M tokens, 50k tokens/s", "read: 2M tokens in 0:40, 50k tokens/s"]


def test_an_error_is_not_an_end(clock):
    file = io.StringIO()
    with pytest.raises(KeyError), Progress(5, "train", file=file) as bar:
        bar.update()
        raise KeyError
    assert file.getvalue() == "train: 1/5 steps (20%) stopped after 0:00\n"


def test_quiet_is_quiet():
    file = io.StringIO()
    with Progress(5, "train", quiet=True, file=file) as bar:
        bar.update(5, loss=1.0)
    assert file.getvalue() == "" and bar.done == 5


@pytest.mark.parametrize("total", [200, None])
def test_a_live_bar_on_a_terminal(monkeypatch, total):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w", encoding="utf-8") as terminal, Progress(total, "train [x]", file=terminal) as bar:
        for _ in range(2):
            bar._shown -= 1  # as if a second had passed
            bar.update(100, loss=1.5)
    data = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end of a terminal is closed
        while chunk := os.read(reader, 1 << 16):
            data += chunk
    os.close(reader)
    shown = data.decode()
    assert "train [x]" in shown and "loss 1.5" in shown and "steps/s" in shown
    assert ("200/200 steps (100%)" in shown) == (total is not None) and "\x1b[" in shown


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999.4, "999"), (999.6, "1k"), (1234, "1.23k"), (999_999, "1M"), (2.5e9, "2.5G"), (0.0123, "0.0123")],
)
def test_si(number, text):
    assert progress._si(number) == text


def test_clock():
    assert [progress._clock(x) for x in (0.4, 59.6, 61, 3675)] == ["0:00", "1:00", "1:01", "1:01:15"]
