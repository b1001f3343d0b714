"""Windows of 250 letters of cfg3b a second: our sampler against plain ones.

    taskset -c 0,1 python -m benchmarks.pcfg     a minute on two cores

ours        `synthetic.pcfg.windows` on the device, batches of 1,024, on all devices (one a core) and on one
recursive   Python: a rule for every symbol by `random`, one call a symbol, as public generators of such strings do
by level    NumPy: one string, all symbols of a level at once
numpy batch NumPy: 1,024 strings, all symbols of a level at once, padded to the longest

The plain ones draw a string again when it is too short, as ours does, and take a random window; they run on one core
and are credited with all of them. All take turns; rates are medians of the rounds. The share of every letter and of
every pair of neighbours must be the same in all to 0.005.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from benchmarks import side_by_side
from bert6_jax import parallel
from synthetic import pcfg

BATCH, REPEATS, ROUNDS, WINDOW = 1_024, 32, 9, 250
EQUAL = 0.005


def ours(mesh, sampler):
    """`run(seed)`: REPEATS batches on every device; gives the last of them, as the host sees it."""

    def on_device(key_1):
        def more(i, ids_BW):
            fresh_BW = pcfg.windows(jax.random.fold_in(key_1[0], i), sampler, BATCH)
            return jnp.where(ids_BW > 2, ids_BW, fresh_BW)  # reads the batch before, so that none is left out

        return jax.lax.fori_loop(0, REPEATS, more, pcfg.windows(key_1[0], sampler, BATCH))

    cut = PartitionSpec("data")
    step = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=cut, out_specs=cut))
    devices = mesh.shape["data"]

    def run(seed):
        return np.asarray(step(jax.random.split(jax.random.key(seed), devices))), devices * BATCH * (REPEATS + 1)

    return run


def recursive(grammar, count):
    def expand(rng, depth, symbol, out):
        if depth == len(grammar.rules):
            out.append(symbol)
            return
        for child in rng.choice(grammar.rules[depth][symbol]).children:
            expand(rng, depth + 1, child, out)

    def run(seed):
        rng, rows = random.Random(seed), []
        while len(rows) < count:
            string = []
            expand(rng, 0, 0, string)
            if len(string) >= WINDOW:
                start = rng.randrange(len(string) - WINDOW + 1)
                rows.append(string[start : start + WINDOW])
        return np.array(rows), count

    return run


def by_level(grammar, count, batch):
    """`batch` strings at a time; a table [symbol, rule, child] with -1 in empty places for each level."""
    tables = []
    for level in grammar.rules:
        table = np.full((len(level), 2, max(len(r.children) for rules in level for r in rules)), -1)
        for s, rules in enumerate(level):
            for r, rule in enumerate(rules):
                table[s, r, : len(rule.children)] = rule.children
        tables.append(table)

    def run(seed):
        rng, rows = np.random.default_rng(seed), []
        while len(rows) < count:
            ids = np.zeros((batch, 1), int)
            for table in tables:
                children = table[ids, rng.integers(0, 2, ids.shape)]
                ids = np.where(ids[..., None] < 0, -1, children).reshape(batch, -1)
                if batch == 1:
                    ids = ids[ids >= 0][None]
            for row in ids:
                string = row[row >= 0]
                if string.size >= WINDOW:
                    start = rng.integers(string.size - WINDOW + 1)
                    rows.append(string[start : start + WINDOW])
        return np.array(rows), len(rows)

    return run


def shares(ids_BW) -> np.ndarray:
    """Of the letters and of the pairs of neighbours, [12]."""
    pair = ids_BW[:, :-1] * 3 + ids_BW[:, 1:]
    return np.concatenate([np.bincount(x.ravel(), minlength=n) / x.size for x, n in ((ids_BW, 3), (pair, 9))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    args = parser.parse_args()
    parallel.use_all_cores()
    grammar = pcfg.read("cfg3b")
    sampler = pcfg.make_sampler(grammar, WINDOW)
    cores = parallel.cores()
    runs = {
        "ours": (ours(parallel.make_mesh(), sampler), 1),
        "ours, one device": (ours(parallel.make_mesh(1), sampler), 1),
        "recursive": (recursive(grammar, 1_000), cores),
        "by level": (by_level(grammar, 2_000, 1), cores),
        "numpy batch": (by_level(grammar, 4_000, BATCH), cores),
    }
    found, made = {name: [] for name in runs}, {}

    def draw(name):
        rows, made[name] = runs[name][0](len(found[name]))  # a seed of its own each time
        found[name].append(rows)

    seconds = side_by_side.alternate({name: partial(draw, name) for name in runs}, ROUNDS)
    rates = {name: credit * made[name] / statistics.median(seconds[name]) for name, (_, credit) in runs.items()}
    print(f"{jax.devices()[0].device_kind}, {jax.device_count()} devices, {cores} cores, JAX {jax.__version__}")
    for name, rate in rates.items():
        print(f"{name:17} {rate:12,.0f} windows/s   ours is {rates['ours'] / rate:8,.1f} times that")
    mean = {name: np.mean([shares(rows_BW) for rows_BW in turns], axis=0) for name, turns in found.items()}
    differ = max(float(np.abs(mean["ours"] - other).max()) for other in mean.values())
    print(f"shares of letters and pairs differ by {differ:.2g} at most")
    if args.json:
        args.json.write_text(json.dumps({"rates": rates, "differ": differ}, indent=2) + "\n")
    if not differ <= EQUAL:
        sys.exit(f"the samplers differ by more than {EQUAL:g}")


if __name__ == "__main__":
    main()
