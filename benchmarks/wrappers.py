"""The grid of fine-tunings of the compiled Counter as one bank, and the same cells one after the other.

    python -m benchmarks.wrappers             4 rates x 7 C_Tr x 3 seeds, 4,000 steps, L = 20; half an hour on two cores
    python -m benchmarks.wrappers --quick     a small grid, which shows that it runs and nothing else

together   all cells in one compiled program, spread over the cores (`train.grid_step`)
alone      one cell after the other by the same code: a grid of one, on one device with all cores
plain      one cell after the other as one would without a bank: `train.fit`, the whole forward pass, batches from the
           host

One after the other `--cells` of the cells are trained (evenly spread over the grid); all of them would take the median
cell's time their number of times, so that compiling counts in `together` alone. `plain` does `--plain-steps` of its
steps. A cell's accuracies in the bank and in a grid of one over the same devices must be the same to 1e-4; how far they
are from those of `alone`, whose program for one device sums in another order, is printed too (4,000 steps at large
rates amplify the last bit). To compare under load give it the same few cores, say `taskset -c 0,1`; the persistent
compilation cache is not used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bert6_jax import parallel, train, transformer
from bert6_jax.objectives import cross_entropy
from experiments import wrappers_tracr as tracr
from experiments.wrappers_parts import CHUNK, stack
from experiments.wrappers_tracr import READ, TracrConfig

EQUAL = 1e-4
QUICK = {"rates": (1e-1, 1e-3), "correlations": (0.0, 1.0), "seeds": 1, "steps": 100, "test_rows": 100, "parts": ()}


def by_grid(cfg: TracrConfig, world, tunings, mesh, step=None):
    """Train cells by `train.grid_step`: their models, the step for another call."""
    step = step or train.grid_step(tracr.make_loss(cfg, world), tracr.optimizer(cfg), CHUNK, mesh)
    starts = stack([tracr.fresh(cfg, world, t.start, t.seed) for t in tunings])
    params, _ = train.fit_grid(
        step,
        train.init_grid(starts, tracr.optimizer(cfg), jax.random.key(0)),
        tracr.grid_inputs(cfg, tunings, cfg.steps),
        train.FitConfig(cfg.steps // CHUNK, min(5, cfg.steps // CHUNK)),
        mesh,
        quiet=True,
    )
    return params, step


def plain_step(cfg: TracrConfig, world):
    """A step as one would write it for one model: the whole forward pass, rows given by the host."""
    layout = world.old.layout

    def loss(params, batch, key):
        out_BTD, _ = transformer.forward(params, batch["ids"], layout.config, segment_BT=batch["segment"])
        logits_BA = out_BTD[:, READ, layout.output[0] : layout.output[1]]
        nll_B = cross_entropy(logits_BA, batch["label"])
        return nll_B.sum(), {"loss": nll_B.sum(), "count": jnp.float32(nll_B.size)}

    def schedule(rate):
        def scale(count):
            options = {"warmup": cfg.warmup, "final": cfg.final}
            cosine = train.OptimizerConfig(lr=rate, schedule="warmup_cosine", **options)
            return -train.learning_rate(cosine, count, cfg.steps, cfg.steps)

        return scale

    def make(rate):
        tx = optax.chain(tracr.optimizer(cfg), optax.scale_by_schedule(schedule(rate)))
        return tx, train.make_step(train.grad_of(loss), tx)

    return make


def plain(cfg: TracrConfig, world, tuning, steps: int, mesh, made):
    """The first `steps` steps of one cell by `train.fit`."""
    tx, step = made
    key = jax.random.key(int(tracr.grid_inputs(cfg, [tuning], cfg.steps)["seed"][0]))

    def batch_at(number):
        strings = tracr.sample(world, jax.random.fold_in(key, number), np.float32(tuning.correlation), cfg.batch)
        ids, segment, answers = (np.asarray(x) for x in strings)
        return {"ids": ids, "segment": segment, "label": answers[:, tuning.operand]}

    start = tracr.fresh(cfg, world, tuning.start, tuning.seed)
    state = train.init_state(start, tx, jax.random.key(0))
    return train.fit(step, state, batch_at, train.FitConfig(steps, 20), mesh=mesh, quiet=True).params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small grid")
    parser.add_argument("--cells", type=int, default=6, help="cells that are trained one after the other (6)")
    parser.add_argument("--plain-steps", type=int, default=1_000, help="steps of `plain` that are timed (1,000)")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    args = parser.parse_args()
    parallel.use_all_cores()
    jax.config.update("jax_enable_compilation_cache", False)
    cfg = dataclasses.replace(tracr.PRESETS["small"], programs=("counter",))
    if args.quick:
        cfg = dataclasses.replace(cfg, **QUICK)
    world, tunings = tracr.make_world(cfg, "counter"), tracr.grid(cfg)
    few = [tunings[i] for i in np.unique(np.linspace(0, len(tunings) - 1, args.cells).round().astype(int))]
    one, every = parallel.make_mesh(1), parallel.make_mesh()
    looker = tracr.looker(cfg, world, one)

    def accuracy(params, cells):
        return looker(params, tracr.places(cfg, cells))["accuracy"]

    compiled = f"{jax.devices()[0].device_kind}, {jax.device_count()} devices, float32, JAX {jax.__version__}"
    print(f"{compiled}; {len(tunings)} cells of {cfg.steps} steps, {len(few)} of them also one after the other")
    seconds: dict[str, float] = {}

    def timed(name, fn):
        start = time.perf_counter()
        out = jax.block_until_ready(fn())
        seconds[name] = time.perf_counter() - start
        print(f"{name}: {seconds[name]:.1f} s", flush=True)
        return out

    with jax.default_matmul_precision("highest"):
        bank = timed("together", lambda: by_grid(cfg, world, tunings, every)[0])
        made = {one: None, every: None}

        def cell(t, mesh):
            params, made[mesh] = by_grid(cfg, world, [t], mesh, made[mesh])
            return params

        alone, same = [], []
        for number, t in enumerate(few):
            alone.append(timed(f"alone, cell {number}", lambda t=t: cell(t, one)))
        for number, t in enumerate(few):
            same.append(timed(f"grid of one, cell {number}", lambda t=t: cell(t, every)))
        steps = min(args.plain_steps, cfg.steps)
        make = plain_step(cfg, world)
        steppers = {rate: make(rate) for rate in {t.rate for t in few}}  # a rate is part of the program here
        for number, t in enumerate(few):
            timed(f"plain, cell {number}", lambda t=t: plain(cfg, world, t, steps, one, steppers[t.rate]))
        mine = accuracy(train.take(bank, np.array([tunings.index(t) for t in few])), few)
        differ, other = (
            float(
                np.abs(
                    mine - np.concatenate([accuracy(params, [t]) for params, t in zip(models, few, strict=True)])
                ).max()
            )
            for models in (same, alone)
        )

    def all_cells(name, share):
        """Every cell's time from those trained; the first one of a program also compiles it."""
        times = np.array([seconds[f"{name}, cell {i}"] for i in range(len(few))]) / share
        return float(np.median(times) * len(tunings))

    totals = {"alone": all_cells("alone", 1.0), "plain": all_cells("plain", steps / cfg.steps)}
    ratios = {name: total / seconds["together"] for name, total in totals.items()}
    for name, total in totals.items():
        print(
            f"{name}: {total:.0f} s for all cells (median cell times their number), {ratios[name]:.2f} times the bank's"
        )
    member = 1e3 * seconds["together"] / (len(tunings) * cfg.steps)
    print(f"together: {member:.2f} ms a step of one cell")
    print(f"largest difference of an accuracy in the bank: to a grid of one {differ:.2g}, to alone {other:.2g}")
    if args.json:
        numbers = {"device": compiled, "seconds": seconds, "all": totals, "ratios": ratios}
        numbers |= {"difference": differ, "difference_alone": other}
        args.json.write_text(json.dumps(numbers, indent=2) + "\n")
    if not differ <= EQUAL:
        sys.exit(f"a cell in its bank and the same cell alone differ by more than {EQUAL:g} in accuracy")


if __name__ == "__main__":
    main()
