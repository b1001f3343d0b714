"""Crosscoders: what a head costs in time and memory, our step against PyTorch's, and which loss finds a planted truth.

    python -m benchmarks.crosscoder speed     one step at 2, 8 and 32 heads, and at 8 against PyTorch; on a GPU instead
                                              one large step (32 heads, d 768, 32,768 latents)

A step is loss, gradients and Adam, of a jumprelu dictionary with a gate and a code per head and the tanh-quad penalty:
d 128, 4,096 latents, batch 1,024, float32. Every part runs in a process of its own, since the peak of memory is that of
a process. PyTorch (extra `bench`) starts from our weights and reads our batches; both take turns, the losses of the
first steps must agree, and the ratio is that of the medians. To compare under load give all of it the same few cores,
say `taskset -c 2,3`.

    python -m benchmarks.crosscoder planted   which loss and gate find a planted evolution, half an hour; `--quick` one
                                              seed and few steps, which shows that it runs and nothing else

Latents that come, go, turn, and are weak but shared, in worlds whose truth is known (`synthetic.planted`), half the
size of `EvolutionConfig()` unless `--large`. The members of a bank are settings and seeds: of world, rows and start.
The rule that chooses the default was written before the run. A setting holds in a seed if at least 0.95 of the planted
latents are matched, mmcs is at least 0.9, at least 0.9 of the matched that emerge do so at most one snapshot away, and
at most 0.05 of the matched and shared are called exclusive. A loss that has a setting that holds in all seeds passes;
its best is the one of these with the fewest splits, then with the largest correlation of curves; and so among losses.
The range of settings at which a loss holds tells how much tuning it needs. (All of it ours.)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bert6_jax.train
from benchmarks import dictionaries
from bert6_jax import parallel
from sae_jax import activations, dictionary, evaluate, train
from sae_jax.config import DictionaryConfig, TrainConfig
from sae_jax.losses import Hyper
from synthetic import planted

MB = 1e6
BATCH, SPARSITY = 1_024, 0.3
DISPATCH = 2  # steps sent at once
AGREE = 1e-4  # relative, the losses of the first steps
# glibc gives freed blocks of this size back, and every step pays for their pages again; so it keeps them
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def config(heads: int, width: int = 128, latents: int = 4_096) -> DictionaryConfig:
    return DictionaryConfig(
        width, latents, heads, gate="per_head", activation="jumprelu", penalty="tanh_quad", code_norm="per_head",
        decoder="free", threshold_init=0.5, centre=False, scale="none",
    )  # fmt: skip


def ours(cfg: DictionaryConfig, batch: int = BATCH) -> tuple[dictionaries.Ours, dictionary.Params, np.ndarray]:
    """(what takes our turns, its weights at the start, its rows `[DISPATCH, B, H, D]`)."""
    x_NBHD = dictionaries.planted_rows(cfg.width, batch, DISPATCH, cfg.heads)
    params = dictionary.init(jax.random.key(1), cfg)
    train_cfg = TrainConfig(steps=10**6, batch=batch, lr_warmup=0.0, lr_decay=0.0, sparsity_warmup=0.0)
    hyper = [Hyper(lr=dictionaries.LR, sparsity=SPARSITY)]
    params_G = jax.tree.map(lambda leaf: leaf[None], params)
    return dictionaries.Ours(cfg, train_cfg, hyper, params_G, x_NBHD, None), params, x_NBHD


def with_heads(heads: int, rounds: int) -> dict[str, float]:
    """Time and memory of our step; the peak is this process's."""
    cfg = config(heads)
    run, params, _ = ours(cfg)
    memory = run.steps.lower(run.state, {"x": run.x_NBSD}, DISPATCH, None).compile().memory_analysis()
    seconds = dictionaries.race({"ours": run}, rounds)["ours"] / DISPATCH
    return {
        "heads": heads,
        "ms": seconds * 1e3,
        "temporary_mb": memory.temp_size_in_bytes / MB,
        "weights_mb": sum(leaf.nbytes for leaf in params.values()) / MB,
        "rows_mb": BATCH * heads * cfg.width * 4 / MB,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB,
    }


# --- PyTorch ---------------------------------------------------------------------------------------------------------


class Torch:
    """The same step in plain PyTorch, all heads at once; takes its turns in a race.

    `form="bmm"` keeps codes as [H, B, F], `"einsum"` as [B, H, F]. Thresholds are divided by norms once, which spares
    products [B, H, F]; the encoder is stored as [H, D, F], so that the pre-activations are one product without copies.
    """

    def __init__(self, cfg: DictionaryConfig, params: dictionary.Params, x_NBHD: np.ndarray, form: str):
        self.torch = torch = dictionaries.torch_threads()
        self.cfg, self.form, self.x = cfg, form, [torch.tensor(x) for x in x_NBHD]
        start = {name: torch.tensor(np.asarray(leaf)) for name, leaf in params.items()}
        start["W_enc"] = start["W_enc"].transpose(1, 2).contiguous()
        self.params = {name: torch.nn.Parameter(leaf) for name, leaf in start.items()}
        self.adam = torch.optim.Adam(self.params.values(), lr=dictionaries.LR, fused=True)
        self.gate, self.losses = _torch_gate(torch, cfg), []

    def __call__(self):
        self.losses = [self._step(x) for x in self.x]

    def _step(self, x) -> float:
        self.adam.zero_grad()
        loss = self._loss(x)
        loss.backward()
        self.adam.step()
        return float(loss.detach())

    def _loss(self, x_BHD):
        cfg, p, B = self.cfg, self.params, len(x_BHD)
        n_HF = p["W_dec"].norm(dim=-1)
        read_BHD = x_BHD - p["b_dec"]
        if self.form == "bmm":
            pre_BF = read_BHD.reshape(B, -1) @ p["W_enc"].reshape(-1, cfg.latents) + p["b_enc"]
            f_HBF = self.gate.apply(pre_BF, p["log_threshold"], n_HF.detach(), 0)
            error = (x_BHD.transpose(0, 1) - self.torch.baddbmm(p["b_dec"][:, None], f_HBF, p["W_dec"])).square().sum()
            rate_HF = self.torch.tanh(f_HBF * (cfg.tanh_scale * n_HF)[:, None]).mean(1)
        else:
            pre_BF = self.torch.einsum("bhd,hdf->bf", read_BHD, p["W_enc"]) + p["b_enc"]
            f_BHF = self.gate.apply(pre_BF, p["log_threshold"], n_HF.detach(), 1)
            error = (x_BHD - self.torch.einsum("bhf,hfd->bhd", f_BHF, p["W_dec"]) - p["b_dec"]).square().sum()
            rate_HF = self.torch.tanh(f_BHF * (cfg.tanh_scale * n_HF)).mean(0)
        p_F = rate_HF.mean(0)
        return error / B + SPARSITY * (cfg.heads * p_F * (1 + p_F / cfg.quad_scale)).sum()


def _torch_gate(torch, cfg: DictionaryConfig):
    """f = pre 1[pre n > tau] with the straight-through gradient of `sae_jax.losses.jump`; heads at axis 0 or 1."""

    class Gate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, pre_BF, log_threshold_F, n_HF, axis):
            pre, tau_F = pre_BF.unsqueeze(axis), log_threshold_F.exp()
            on = pre > (tau_F / n_HF).unsqueeze(1 - axis)
            ctx.save_for_backward(pre, tau_F, n_HF, on)
            ctx.axis = axis
            return torch.where(on, pre, 0.0)

        @staticmethod
        def backward(ctx, g):
            pre, tau_F, n_HF, on = ctx.saved_tensors
            low_HF = ((tau_F - cfg.bandwidth / 2) / n_HF).clamp(min=0.0)
            high_HF = (tau_F + cfg.bandwidth / 2) / n_HF
            window = (pre > low_HF.unsqueeze(1 - ctx.axis)).logical_and_(pre < high_HF.unsqueeze(1 - ctx.axis))
            slope_HF = -torch.where(window, g, 0.0).sum(1 - ctx.axis) / n_HF
            return torch.where(on, g, 0.0).sum(ctx.axis), slope_HF.sum(0) * tau_F**2 / cfg.bandwidth, None, None

    return Gate


def against_torch(heads: int, rounds: int) -> dict[str, float]:
    """Both in this process, taking turns; equal losses over the first steps or no times."""
    cfg = config(heads)
    run, params, x_NBHD = ours(cfg)
    contestants: dict[str, Callable] = {"bert6-jax": run}
    for form in ("bmm", "einsum"):
        contestants[f"PyTorch, {form}"] = Torch(cfg, params, x_NBHD, form)
    worst = 0.0
    for _ in range(2):
        for call in contestants.values():
            call()
        expected = np.asarray(run.metrics["loss"])
        for name, call in list(contestants.items())[1:]:
            difference = float(np.max(np.abs(np.asarray(call.losses) / expected - 1)))
            assert difference < AGREE, f"losses of {name} {call.losses}, ours {expected.tolist()}"
            worst = max(worst, difference)
    seconds = dictionaries.race(contestants, rounds)
    best = min(value for name, value in seconds.items() if name != "bert6-jax")
    milliseconds = {name: value / DISPATCH * 1e3 for name, value in seconds.items()}
    return milliseconds | {"ratio": best / seconds["bert6-jax"], "losses_differ": worst}


# --- a large step ----------------------------------------------------------------------------------------------------


def large(rounds: int, heads=32, width=768, latents=32_768, batch=4_096) -> list[dict]:
    """Step time and tokens a second for a GPU; weights and sums are float32, products read `precision`."""
    cfg, found = config(heads, width, latents), []
    print(f"{heads} heads, d {width}, {latents:,} latents, batch {batch:,}, {dictionaries.device()}")
    for precision in ("BF16_BF16_F32", "tensorfloat32"):
        with jax.default_matmul_precision(precision):
            run, _, _ = ours(cfg, batch)
            seconds = dictionaries.race({"ours": run}, rounds)["ours"] / DISPATCH
        found.append({"precision": precision, "ms": seconds * 1e3, "tokens_s": batch / seconds, "loss": run.loss()})
        print(f"  {precision:14s} {seconds * 1e3:9.1f} ms   {batch / seconds:12,.0f} tokens/s", flush=True)
        del run
    return found


# --- planted evolution -----------------------------------------------------------------------------------------------

ROWS, JUDGED = 512, 4_096  # of a training step; rows that explained variance and L0 are measured on
RATE = 3e-3
_HEAD = dict(activation="jumprelu", gate="per_head", code_norm="per_head")
# (fields of the configuration, lambda of the penalty or k: the members of a bank)
PLANTED: dict[str, tuple[dict, tuple[float, ...]]] = {
    "relu_l1": (dict(activation="relu", code_norm="l1"), (0.25, 0.5, 1, 2, 4)),
    "relu_l2": (dict(activation="relu", code_norm="l2"), (0.5, 1.5, 4)),
    "tanh_quad_head": (dict(_HEAD, penalty="tanh_quad"), (0.01, 0.03, 0.1, 0.3)),
    "tanh_quad_shared": (dict(_HEAD, penalty="tanh_quad", gate="shared", gate_norm="l2"), (0.03, 0.1, 0.3)),
    "tanh_head": (dict(_HEAD, penalty="tanh"), (0.05, 0.15, 0.5)),
    "batch_topk_l1": (dict(activation="batch_topk", gate_norm="l1", k=6), (2, 3, 4, 6)),
    "batch_topk_head": (dict(activation="batch_topk", gate="per_head", k=4), (1, 2, 3, 4)),
}
# half of `EvolutionConfig()`, but for its snapshots, its weak latents (as many) and how many are active (3 of its 4)
HALF = planted.EvolutionConfig(
    planted.PlantedConfig(latents=64, width=32, active=3.0, zipf=0.5, scale_low=0.5, scale_high=2.0),
    emergent=12, decaying=4, transient=4, rotating=4, exclusive=4, weak=8, pairs=4,
)  # fmt: skip
SCORES = (
    "matched", "mmcs", "emergence_near", "end_near", "turn_error", "false_exclusive", "weak_false_exclusive",
    "false_shared", "split", "curve_correlation", "ev", "l0", "dead",
)  # fmt: skip
RULE = {"matched": 0.95, "mmcs": 0.9, "emergence_near": 0.9}  # at least
ALLOWED = {"false_exclusive": 0.05}  # at most


class World(NamedTuple):
    """What a member is trained on and judged by."""

    seed: int  # of the evolution, its rows and the start
    exclusives: str = "snapshot"
    growth: float = 1.0  # the last snapshot's rows are so many times those of the first
    one_scale: bool = False  # inputs are normalised with one scale for all snapshots, not each with its own


def planted_bank(
    name: str, members: list[tuple[World, float]], steps: int, evolution_cfg: planted.EvolutionConfig = HALF
) -> list[dict]:
    """Train one bank, a member for each (world, setting); the scores of every member."""
    H, D = len(evolution_cfg.steps), evolution_cfg.world.width
    F = 3 * evolution_cfg.world.latents // 2
    cfg = DictionaryConfig(D, F, H, decoder="free", subtract_bias=False, **PLANTED[name][0])
    train_cfg = TrainConfig(steps, ROWS, dead_after=100_000)
    sources = list(dict.fromkeys(world._replace(one_scale=False) for world, _ in members))
    truth = [
        planted.make_evolution(
            jax.random.key(world.seed), dataclasses.replace(evolution_cfg, exclusives=world.exclusives)
        )
        for world in sources
    ]
    seed_W = jnp.array([world.seed for world in sources])
    factor_WH = np.stack([np.geomspace(1.0, world.growth, H, dtype=np.float32) for world in sources])
    frozen = train.stack(truth), seed_W, jnp.asarray(factor_WH)

    def rows(draw, frozen, number: int):
        """x [W, N, H, D] and g [W, N, X]."""

        def one(evolution, seed, factor_H):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), seed), draw)
            x_NHD, g_NX = planted.sample_evolution(key, evolution, evolution_cfg, number)
            return x_NHD * factor_H[None, :, None], g_NX

        return jax.vmap(one)(*frozen)

    def inputs(source, batch, frozen):
        x_WBHD, _ = rows(batch["step"][0], frozen, ROWS)
        return source, jnp.moveaxis(x_WBHD, 0, 1).reshape(ROWS, -1, D)

    x_WNHD, g_WNX = jax.jit(rows, static_argnums=2)(jnp.int32(2**30), frozen, JUDGED)
    search = jax.jit(lambda params, norm, x: dictionary.search_norm(params, dictionary.normalise(norm, x, cfg)[0], cfg))
    norms, starts, sites = [], [], []
    for world, _ in members:
        w = sources.index(world._replace(one_scale=False))
        norm = dictionary.fit_norm(x_WNHD[w], cfg)
        if world.one_scale:  # that of all rows together
            norm["scale"] = jnp.full(H, 1 / (1 / norm["scale"]).mean())
        start = dictionary.init(jax.random.key(100 + world.seed), cfg)
        starts.append(search(start, norm, x_WNHD[w][:1024])[0])
        norms.append(norm)
        sites.append(w * H + np.arange(H))
    topk = cfg.activation == "batch_topk"
    hyper = [Hyper(RATE, k=int(value)) if topk else Hyper(RATE, k=cfg.k, sparsity=value) for _, value in members]
    state = train.init_state(
        jax.random.key(0), cfg, train_cfg, hyper, train.stack(norms), params=train.stack(starts), sites=np.stack(sites)
    )
    state = bert6_jax.train.fit(
        train.make_step(cfg, train_cfg, inputs), state, activations.no_batch,
        bert6_jax.train.FitConfig(steps, dispatch=50), frozen=frozen, label=name, quiet=True,
    )  # fmt: skip

    @jax.jit
    def judged(found, x_NHD):
        xhat_NHD, z_NF = dictionary.reconstruct(found, x_NHD, cfg)
        return evaluate.stats_of(x_NHD, xhat_NHD, z_NF, jnp.ones(len(x_NHD), bool))

    scores = []
    for g, site_H in enumerate(sites):
        w, found = site_H[0] // H, train.member(state, g)
        stats = evaluate.summary(judged(found, x_WNHD[w]))
        # in the planted units, in which strengths of snapshots are comparable
        unit_H = np.asarray(found["norm"]["scale"]) * factor_WH[w]
        labels = [planted.GROUPS[i] for i in np.asarray(truth[w].group)]
        score = evaluate.evolution_recovery(
            np.asarray(found["params"]["W_dec"]) / unit_H[:, None, None], truth[w].directions, truth[w].strength, labels
        )
        kept = {name: float(score[name]) for name in SCORES if name in score}
        kept["weak_false_exclusive"] = float(score["groups"]["weak"]["false_exclusive"])
        kept |= {"ev": stats["ev_global"], "l0": stats["l0"], "dead": stats["dead"]}
        active_NX, there_HX = np.asarray(g_WNX[w] > 0), np.asarray(truth[w].strength) > 0.01
        kept["true_l0"] = active_NX.sum(-1).mean()
        kept["true_l0_a_head"] = (active_NX.mean(0) * there_HX).sum(-1).mean()
        scores.append({name: float(value) for name, value in kept.items()})
    return scores


def holds(score: dict[str, float]) -> bool:
    """The rule's four conditions, of one seed."""
    return all(score[name] >= value for name, value in RULE.items()) and all(
        score[name] <= value for name, value in ALLOWED.items()
    )


def preferred(row: dict) -> tuple:
    """What settings are ranked by, first is best: all seeds hold, then the fewest splits, then the curves. Where none
    holds: seeds that hold, then the same."""
    mean = {name: float(np.mean([score[name] for score in row["seeds"]])) for name in ("split", "curve_correlation")}
    return -sum(map(holds, row["seeds"])), mean["split"], -mean["curve_correlation"]


def print_planted(title: str, rows: list[dict]) -> None:
    """A table in Markdown: mean and least..largest over seeds."""
    print(
        f"\n{title}\n\n| loss | setting | holds in | " + " | ".join(SCORES) + " |\n" + "|---" * (len(SCORES) + 3) + "|"
    )
    for row in rows:
        cells = []
        for name in SCORES:
            value = np.array([score[name] for score in row["seeds"]])
            digits = 1 if name in ("split", "l0") else 2 if name in ("turn_error", "dead") else 3
            mean, least, most = (f"{v:.{digits}f}" for v in (value.mean(), value.min(), value.max()))
            cells.append(mean if least == most else f"{mean} ({least}..{most})")
        held = f"{sum(map(holds, row['seeds']))} of {len(row['seeds'])}"
        print(f"| {row['loss']} | {row['setting']:g} | {held} | " + " | ".join(cells) + " |")


def planted_evolution(args) -> dict:
    names = args.losses.split(",") if args.losses else list(PLANTED)
    if unknown := [name for name in names if name not in PLANTED]:
        sys.exit(f"no loss {', '.join(unknown)}; choose from {', '.join(PLANTED)}")
    steps, seeds = (min(args.steps, 300), 1) if args.quick else (args.steps, args.seeds)
    world = planted.EvolutionConfig() if args.large else HALF
    print(f"planted evolution: {world.world.latents} latents, width {world.world.width}, {len(world.steps)} snapshots")
    print(f"{steps:,} steps of {ROWS} rows, {seeds} seed(s), rate {RATE:g}, {dictionaries.device()}")
    found: dict = {"steps": steps, "seeds": seeds, "settings": [], "worlds": []}

    def run(name: str, settings: Sequence[float], worlds: Sequence[World]) -> list[dict]:
        """A row for each setting and kind of world; `worlds` of seed 0, which stand for all seeds."""
        each = [(kind, value) for value in settings for kind in worlds]
        begin = time.perf_counter()
        scores = planted_bank(
            name, [(w._replace(seed=seed), v) for w, v in each for seed in range(seeds)], steps, world
        )
        print(f"  {name}: {len(scores)} members, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        return [
            {"loss": name, "setting": value, "world": kind._asdict(), "seeds": scores[i * seeds : (i + 1) * seeds]}
            for i, (kind, value) in enumerate(each)
        ]

    for name in names:
        found["settings"] += run(name, PLANTED[name][1], [World(0)])
    print_planted("Every setting", found["settings"])
    true_l0 = np.mean([score["true_l0"] for row in found["settings"] for score in row["seeds"]])
    a_head = np.mean([score["true_l0_a_head"] for row in found["settings"] for score in row["seeds"]])
    print(f"\nTrue L0 of a row {true_l0:.2f}, of a row at a snapshot {a_head:.2f}")

    found["best"] = best = {}
    for name in names:
        of_loss = [row for row in found["settings"] if row["loss"] == name]
        holding = [row["setting"] for row in of_loss if all(map(holds, row["seeds"]))]
        row = min(of_loss, key=preferred)
        best[name] = {"setting": row["setting"], "holds_at": holding}
        settings = ", ".join(f"{value:g}" for value in holding)
        print(f"{name}: " + (f"holds at {settings}; best {row['setting']:g}" if holding else "holds at no setting"))
    passing = [row for row in found["settings"] if all(map(holds, row["seeds"]))]
    found["default"] = min(passing, key=preferred)["loss"] if passing else None
    print(f"Default by the rule: {found['default']}")

    # each loss at its best setting, where something about the world differs
    others = {
        "exclusive on a side of a snapshot": World(0, exclusives="side"),
        "rows grow 5 times": World(0, growth=5.0),
        "rows grow 5 times, one scale for all snapshots": World(0, growth=5.0, one_scale=True),
    }
    for name in [name for name in names if best[name]["holds_at"]] or names:
        found["worlds"] += run(name, [best[name]["setting"]], list(others.values()))
    for title, kind in others.items():
        print_planted(title, [row for row in found["worlds"] if row["world"] == kind._asdict()])
    return found


# --- the command line ------------------------------------------------------------------------------------------------


def apart(part: str, heads: int, rounds: int, environment: dict[str, str] | None = None) -> dict[str, float]:
    """What a part measures in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.crosscoder", part, "--heads", str(heads), "--rounds", str(rounds)]
    done = subprocess.run(command, env=os.environ | (environment or {}), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def speed(args) -> dict:
    if jax.default_backend() == "gpu":
        return {"large": large(args.rounds)}
    cfg = config(args.heads)
    print(
        f"one step: jumprelu, gate per head, tanh-quad, d {cfg.width}, {cfg.latents:,} latents, batch {BATCH:,}, "
        f"float32, {dictionaries.device()}, {parallel.cores()} cores"
    )
    found: dict = {"heads": [apart("heads", heads, args.rounds) for heads in (2, 8, 32)]}
    first, last = found["heads"][0], found["heads"][-1]
    slope = (last["temporary_mb"] - first["temporary_mb"]) / (last["heads"] - first["heads"])
    found["temporary_mb_per_head"], code = slope, BATCH * cfg.latents * 4 / MB
    print("  heads      step   a head  temporary  of it not by head  peak of the process")
    for row in found["heads"]:
        row["flat_mb"] = row["temporary_mb"] - slope * row["heads"]
        print(
            f"  {row['heads']:5d} {row['ms']:6.0f} ms {row['ms'] / row['heads']:5.0f} ms {row['temporary_mb']:7.0f} MB "
            f"{row['flat_mb']:12.0f} MB {row['peak_mb']:18.0f} MB"
        )
    print(
        f"  a head adds {slope:.1f} MB of temporaries: its weights are {last['weights_mb'] / last['heads']:.1f}, its "
        f"rows {last['rows_mb'] / last['heads']:.1f}; a code of its own would be {code:.1f} for every array of them"
    )
    for name, environment in {"memory kept by malloc": KEEP_MEMORY, "malloc as it is": {}}.items():
        try:
            found[name] = row = apart("torch", args.heads, args.rounds, environment)
        except subprocess.CalledProcessError as error:
            print(f"  no comparison with PyTorch: exit {error.returncode}, see above")
            break
        times = "   ".join(f"{key} {row[key]:.0f} ms" for key in row if key not in ("ratio", "losses_differ"))
        print(
            f"  {args.heads} heads, {name}: {times}   {row['ratio']:.2f} x ours (losses to {row['losses_differ']:.0e})"
        )
    return found


def main() -> None:
    parts = {"heads": with_heads, "torch": against_torch}  # what `speed` runs apart
    benchmarks = {"speed": speed, "planted": planted_evolution}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "benchmark",
        nargs="?",
        default="speed",
        choices=[*benchmarks, *parts],
        help="`heads` and `torch` are parts of `speed`",
    )
    parser.add_argument("--heads", type=int, default=8, help="snapshots of the comparison with PyTorch")
    parser.add_argument("--rounds", type=int, default=5, help="measured turns of each contestant")
    parser.add_argument("--seeds", type=int, default=3, help="planted: worlds of every setting")
    parser.add_argument("--steps", type=int, default=1_500, help=f"planted: of {ROWS} rows")
    parser.add_argument("--losses", help=f"planted: some of {','.join(PLANTED)}")
    parser.add_argument("--quick", action="store_true", help="planted: one seed, 300 steps at most")
    parser.add_argument("--large", action="store_true", help="planted: the whole `EvolutionConfig()`, 4 times the work")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    args = parser.parse_args()
    if args.benchmark in parts:
        try:
            print(json.dumps(parts[args.benchmark](args.heads, args.rounds)))
        except ImportError as error:
            sys.exit(f'{error}; pip install -e ".[bench]" for the comparison with PyTorch')
        return
    found = benchmarks[args.benchmark](args)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
