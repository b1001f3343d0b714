"""What the timing files share: sides that take turns, the machine's ceiling, one table and one JSON file.

A side is a callable that does one measured piece of work and returns when it is done. All sides of a comparison run in
one process on the same cores; the first of them is ours, and ratios are to it. The ceiling is measured in the same
run, so that a share of it means something on a machine that other work slows down.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bert6_jax import parallel
from bert6_jax.errors import InputError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "torchmetrics", "scikit-learn")
ENVIRONMENT = (
    "MALLOC_",
    "GLIBC_",
    "OMP_",
    "KMP_",
    "MKL_",
    "GOMP_",
    "XLA_",
    "LD_PRELOAD",
)  # what changes times from outside


def device() -> str:
    kind = jax.devices()[0]
    return f"{kind.platform} {kind.device_kind}, JAX {jax.__version__}"


def use_cores(count: int) -> None:
    """Keep this process to so many of its cores; before the first use of JAX, which counts them once."""
    if count == parallel.cores():
        return
    if not hasattr(os, "sched_setaffinity"):
        raise InputError(f"threads is {count}, and this system cannot keep a process to some cores; leave it out")
    if not 1 <= count < parallel.cores():
        raise InputError(
            f"threads is {count}; this process may run on {parallel.cores()} cores, so give 1 to that many"
        )
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def positive(text: str) -> int:
    """A command line's positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def free_memory() -> float:
    """Bytes that may still be had, of the accelerator if JAX uses one; infinite where nobody says."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"] - stats["bytes_in_use"])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def torch_threads():
    """PyTorch, on as many threads as this process has cores."""
    import torch

    torch.set_num_threads(parallel.cores())
    return torch


def alternate(sides: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every call of each side, their calls taking turns; `warmup` calls of each go before, unmeasured."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + rounds):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


# --- the ceiling -----------------------------------------------------------------------------------------------------


def ceiling(
    torch=None, dtypes: Sequence[str] = ("float32",), size: int | None = None, megabytes: int = 256, rounds: int = 5
) -> dict[str, float]:
    """What the machine can do: `matmul LIBRARY DTYPE` in FLOP/s for square matrices, `copy LIBRARY` in byte/s.

    A library is `jax`, or `torch` if that is given; both take turns. Copies count what is read and what is written. JAX
    adds to a donated array in place, PyTorch copies into an array that exists: no new pages are paid for. The best of
    the rounds counts, as a ceiling should. `size` is 4,096, or on accelerators 16,384, where a short call would mostly
    be its start.
    """
    size = size or (4_096 if jax.default_backend() == "cpu" else 16_384)
    count = megabytes * 2**20 // 4
    calls, work = {}, {}
    multiply = jax.jit(jnp.matmul)
    for dtype in dtypes:
        x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
        calls[f"matmul jax {dtype}"] = partial(_wait, multiply, x, x)
        work[f"matmul jax {dtype}"] = 2.0 * size**3
    held = [jnp.zeros(count, jnp.float32)]
    add = jax.jit(lambda x: x + 1.0, donate_argnums=0)

    def copy():
        held[0] = jax.block_until_ready(add(held[0]))

    calls["copy jax"], work["copy jax"] = copy, 8.0 * count
    if torch is not None:
        where = "cuda" if jax.default_backend() == "gpu" else "cpu"

        def finished(call):
            call()
            if where == "cuda":
                torch.cuda.synchronize()

        for dtype in dtypes:
            x = torch.randn(size, size, device=where).to(getattr(torch, dtype))
            out = torch.empty_like(x)
            calls[f"matmul torch {dtype}"] = partial(finished, partial(torch.mm, x, x, out=out))
            work[f"matmul torch {dtype}"] = 2.0 * size**3
        source, target = torch.zeros(count, device=where), torch.zeros(count, device=where)
        calls["copy torch"] = partial(finished, partial(target.copy_, source))
        work["copy torch"] = 8.0 * count
    return {name: work[name] / min(times) for name, times in alternate(calls, rounds).items()}


def _wait(call, *args):
    return jax.block_until_ready(call(*args))


# --- the report ------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A side and its times. `work` is in FLOP or bytes, `ceiling` in the same a second; 0: no share is shown."""

    side: str
    seconds: list[float]  # of one unit (a step, an epoch, a pass), one of each round
    work: float = 0.0  # of one unit
    ceiling: float = 0.0
    more: dict[str, float] = {}  # further columns


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of every row: `median`, `min`, `max` (seconds), `ratio` to the first row, `share` of the ceiling, the rest."""
    first = statistics.median(rows[0].seconds)
    found = []
    for row in rows:
        median = statistics.median(row.seconds)
        share = row.work / median / row.ceiling if row.work and row.ceiling else None
        found.append(
            {"side": row.side, "median": median, "min": min(row.seconds), "max": max(row.seconds)}
            | {"ratio": median / first, "work": row.work, "ceiling": row.ceiling, "share": share}
            | {**row.more, "seconds": row.seconds}
        )
    return found


def report(rows: Sequence[Row], path: str | Path | None = None, *, title: str = "", **about) -> dict[str, Any]:
    """Print one table and, with `path`, write it as JSON beside `about` (dtypes, shapes, ceiling, ...), the result."""
    found = summary(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row.more))
    width = max(len(row.side) for row in rows)
    print(f"{title}{'; ' if title else ''}{device()}, {parallel.cores()} cores")
    heads = "".join(f"{name:>16s}" for name in columns)
    print(f"  {'':{width}s} {'median':>12s} {'min ..':>12s} {'max':>9s} {'x first':>9s}  of ceiling{heads}")
    for line in found:
        median, low, high = (f"{1e3 * line[name]:9,.1f}" for name in ("median", "min", "max"))
        share = "" if line["share"] is None else f"{line['share']:.1%}"
        more = "".join(f"{_number(line[name]) if name in line else '':>16s}" for name in columns)
        print(
            f"  {line['side']:{width}s} {median} ms {low} .. {high} {line['ratio']:9.2f}  {share:>10s}{more}",
            flush=True,
        )
    result = {
        "title": title,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device(),
        "cores": parallel.cores(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "environment": {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT)},
        **about,
        "rows": found,
    }
    if path is not None:
        Path(path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.5g}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
