"""The main-trend grid of the knowledge study as banks, and the same grid one cell at a time with the same code.

    python -m benchmarks.knowledge             the main-trend grid: R in {8, 32, 128}, K in {1, 2, 4}, N_f in
                                               {4, 16, 64}, three seeds; about fifteen minutes on two cores
    python -m benchmarks.knowledge --quick     a small grid, which shows that it runs and nothing else

27 pre-trainings of 1,500 steps and 81 fine-tunings of 300, each with its measurements. One at a time, a cell has the
sizes of its own world and no room for others, one device, and every fine-tuning is on its own; a pre-training is shared
by the fine-tunings that go on from it (`shared`), or done again for each of the 81 cells, as somebody would who calls
for one cell after the other (`apart`: by the times of `shared`, not run). Each is done twice: `first` compiles, `again`
finds everything compiled. What was found must be the same cell by cell. To compare under load give it the same few
cores, say `taskset -c 0,1`; the persistent compilation cache is not used.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from bert6_jax import parallel
from experiments import knowledge
from experiments.harness.run import Run

COMPARED = ("store", "unseen", "loss_r", "loss_a"), ("extraction", "coverage", "reach", "tuned_accuracy")
EQUAL = 1e-3  # an answer to one of a thousand questions may turn at a tie; losses agree far below it
QUICK = {"subjects": 64, "hidden": 64, "templates": (8, 16), "multiplicities": (1, 2), "tuned": (4, 16), "reference": 8,
         "steps": 100, "tuning_steps": 50, "seeds": 2, "confound_tuned": (2,), "shared_tuned": 2}  # fmt: skip


def together(cfg: knowledge.KnowledgeConfig, run: Run):
    """All cells in banks over all devices: (what cells found, what tunings found)."""
    found = knowledge.run_study(run, cfg, {"grid": knowledge.grid(cfg)}, parallel.make_mesh())
    return found.cells, found.tunings


def one_by_one(cfg: knowledge.KnowledgeConfig, run: Run, seconds: dict[str, list[float]]):
    """Cell by cell on one device; appends the seconds of every pre-training and fine-tuning."""
    mesh, cells, tunings = parallel.make_mesh(1), {}, {}
    by_cell: dict = {}
    for t in knowledge.flat(knowledge.grid(cfg)):
        by_cell.setdefault(t.cell, []).append(t)
    for number, (cell, group) in enumerate(by_cell.items()):
        start = time.perf_counter()
        (bank,) = knowledge.banks_of([cell])
        got = knowledge.acquire(run, bank._replace(name=f"cell{number}"), mesh)
        cells[cell] = {name: v[0] for name, v in got.found.items()}
        seconds["pretrain"].append(time.perf_counter() - start)
        for t in group:
            start = time.perf_counter()
            found = knowledge.extract(run, f"tune{number}-{t.subjects}", got, [t], mesh)
            tunings[t] = {name: v[0] for name, v in found.items()}
            seconds["tune"].append(time.perf_counter() - start)
    return cells, tunings


def differences(ours, theirs) -> dict[str, float]:
    """Largest difference of every compared value over all cells; infinite where one is NaN and the other is not."""

    def apart(mine, others, name):
        pairs = np.array([(mine[k][name], others[k][name]) for k in mine], np.float64)
        if (np.isnan(pairs[:, 0]) != np.isnan(pairs[:, 1])).any():
            return math.inf
        return float(np.nan_to_num(np.abs(pairs[:, 0] - pairs[:, 1])).max())

    pairs = zip(COMPARED, ours, theirs, strict=True)
    return {name: apart(mine, others, name) for names, mine, others in pairs for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small grid")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    args = parser.parse_args()
    parallel.use_all_cores()
    jax.config.update("jax_enable_compilation_cache", False)
    cfg = knowledge.KnowledgeConfig(parts=("grid",), text=())
    if args.quick:
        cfg = dataclasses.replace(cfg, **QUICK)
    seconds: dict[str, float] = {}
    parts: dict[str, dict[str, list[float]]] = {}
    results = {}
    for turn in ("first", "again"):
        for name in ("one by one", "together"):
            parts[turn] = parts.get(turn, {"pretrain": [], "tune": []})
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
                with Run.open(Path(folder) / "run", "knowledge", dataclasses.asdict(cfg), quiet=True) as run:
                    start = time.perf_counter()
                    results[name] = together(cfg, run) if name == "together" else one_by_one(cfg, run, parts[turn])
                    seconds[f"{name}, {turn}"] = time.perf_counter() - start
            print(f"{name}, {turn}: {seconds[f'{name}, {turn}']:.1f} s", flush=True)
    differ = differences(results["together"], results["one by one"])
    cells, tunings = (len(found) for found in results["together"])
    print(
        f"\n{jax.devices()[0].device_kind}, {jax.device_count()} devices, float32, JAX {jax.__version__}; "
        f"{cells} pre-trainings of {cfg.steps} steps, {tunings} fine-tunings of {cfg.tuning_steps}"
    )
    ratios = {}
    for turn in ("first", "again"):
        bank, shared = seconds[f"together, {turn}"], seconds[f"one by one, {turn}"]
        repeated = sum(parts[turn]["tune"]) + len(cfg.tuned) * sum(parts[turn]["pretrain"])
        ratios |= {f"shared, {turn}": shared / bank, f"apart, {turn}": repeated / bank}
        print(
            f"{turn}: together {bank:.1f} s; one by one, pre-training shared {shared:.1f} s "
            f"({ratios[f'shared, {turn}']:.2f} times), each on its own {repeated:.1f} s "
            f"({ratios[f'apart, {turn}']:.2f})"
        )
    print("largest difference of a cell: " + ", ".join(f"{name} {value:.2g}" for name, value in differ.items()))
    if args.json:
        args.json.write_text(json.dumps({"seconds": seconds, "ratios": ratios, "differences": differ}, indent=2) + "\n")
    if not max(differ.values()) <= EQUAL:
        sys.exit(f"a cell in its bank and the same cell alone differ by more than {EQUAL:g}")


if __name__ == "__main__":
    main()
