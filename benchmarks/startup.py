"""How soon a run takes its first step: with an empty cache, with the cache of an earlier start, and in PyTorch.

    taskset -c 0,1 python -m benchmarks.startup     every demo, Hugging Face and the imports; minutes on two cores
    python -m benchmarks.startup --tiny             a small model, which shows that it runs and nothing else

Every start is a process of its own, and time zero is before its interpreter. The sides:

    apt cold, apt warm      `python -m experiments.apt` up to the end of its first optimiser step: its demo, from the
                            text to the model. Cold: BERT6_JAX_CACHE is a new folder. Warm: the second start, with
                            that cache and a new output folder; it must lose the same to the bit
    torch                   a script that imports PyTorch and transformers, makes the `BertForMaskedLM` of that size
                            and takes the same AdamW step; it has no cache, and no text to read: ids, labels and
                            weights are ours, from a file. Loss and gradient norm must be those of ours (1e-4), or no
                            times are shown
    layerwise, evolution,   the demos of the other papers, cold and warm, in so many turns as `--few` says. Their first
    knowledge,              dispatch is timed; that of `knowledge` and the wrappers is some 25 steps of every member
    wrappers-pcfg, -tracr
    imports                 of our modules, and of what they and the peer stand on

Cold and warm starts take turns. Files are in the system's cache and Python's bytecode is written (a start of each goes
before, unmeasured), so cold says nothing of a slow disk. Columns, seconds from zero: `imported`, when the modules are
loaded; `ready`, when the first step is called, its program not yet traced. Ratios are to the warm start of the demo.
The first step is seen by wrapping `train._compiled`, whose functions `train.fit` dispatches; the process then ends, so
a warm start here finds no more in the cache than it needs. PyTorch and transformers come with the extra `bench`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# JAX and what imports it are imported where they are used: each process pays for what it measures alone.

STUDIES = {
    "apt": ("experiments.apt",),
    "layerwise": ("experiments.layerwise",),
    "evolution": ("experiments.evolution",),
    "knowledge": ("experiments.knowledge",),
    "wrappers-pcfg": ("experiments.wrappers", "pcfg"),
    "wrappers-tracr": ("experiments.wrappers", "tracr"),
}
IMPORTS = ("bert6_jax", "bert6_jax.train", "experiments.apt", "jax", "torch", "transformers.models.bert.modeling_bert")
SIDES = (*STUDIES, "torch", "imports")
TINY = {"sides": ["apt", "torch"], "rounds": 1}
TINY_DEMO = "--documents 600 --subset-sizes 400 --held-out 100 --vocab-size 200 --blocks 1 --width 16 --mlp-width 32"
AGREE = 1e-4  # nats, and share of the gradient norm
AIM = 3.0  # a second start is so many times sooner
TIMEOUT = 900.0  # seconds


# --- in a process of its own -----------------------------------------------------------------------------------------


def say(marks: dict[str, float], **found) -> None:
    """The last words of a measured process; nothing that it would do after its first step is waited for."""
    print("\n" + json.dumps({"marks": marks} | found), flush=True)
    os._exit(0)


def start_study(study: str, reference: str, *argv: str) -> None:
    """A demo up to the end of its first dispatch; writes what the peer needs for the same step if a file is given."""
    module, *words = STUDIES[study]
    from bert6_jax import train
    from experiments.harness import cli

    marks: dict[str, float] = {}
    caught = _caught(train) if reference else {}
    main, compiled = cli.main, train._compiled

    def marked_main(*args, **kwargs):
        marks["imported"] = time.monotonic()
        return main(*args, **kwargs)

    def marked(*args):
        run = compiled(*args)

        def first(state, batches, n, frozen):
            import jax

            if reference:
                _write_reference(Path(reference), caught, state, batches)
            marks["ready"] = time.monotonic()
            _, sums = jax.block_until_ready(run(state, batches, n, frozen))
            marks["done"] = time.monotonic()
            loss, count, norm = (float(sums[name][0]) for name in ("loss", "count", "grad_norm"))
            say(marks, loss=loss / max(count, 1.0), grad_norm=norm)

        return first

    cli.main, train._compiled = marked_main, marked
    sys.argv = [module, *words, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _caught(train) -> dict:
    """Keeps what the demo makes its model, its masks and its optimiser of."""
    from bert6_jax import objectives

    caught: dict = {}
    masked_lm, make_optimizer = objectives.masked_lm, train.make_optimizer

    def catch_loss(cfg, masking):
        caught.setdefault("model", (cfg, masking))
        return masked_lm(cfg, masking)

    def catch_optimizer(optimizer, *horizon):
        caught.setdefault("optimizer", (optimizer, *horizon))  # the first one called knows the horizon
        return make_optimizer(optimizer, *horizon)

    objectives.masked_lm, train.make_optimizer = catch_loss, catch_optimizer
    return caught


def _write_reference(path: Path, caught: dict, state, batches) -> None:
    import jax
    import numpy as np

    from bert6_jax import hf, objectives, train

    (cfg, masking), (optimizer, *horizon) = caught["model"], caught["optimizer"]
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    batch = jax.tree.map(lambda x_SB: x_SB[0], batches)
    found = jax.device_get(objectives.masked_batch(batch, key, masking)[0])
    labels_BT = np.full(found.ids_BT.shape, -100, np.int64)  # what their loss ignores
    np.put_along_axis(labels_BT, found.slot_BK, np.where(found.valid_BK, found.target_BK, -100), axis=-1)
    about = {
        "config": hf.config_to_hf(cfg) | {"pad_token_id": 0},  # of vocabularies that are trained here
        "optimizer": {
            "lr": float(train.learning_rate(optimizer, 0, *horizon)), "betas": [optimizer.b1, optimizer.b2],
            "eps": optimizer.eps, "weight_decay": optimizer.weight_decay,
        },
    }  # fmt: skip
    weights = {f"weight {name}": x for name, x in hf.to_state_dict(jax.device_get(state.params), cfg).items()}
    ids_BT, segment_BT = found.ids_BT.astype(np.int64), np.asarray(batch["segment"], np.int64)
    np.savez(path, about=json.dumps(about), ids=ids_BT, segment=segment_BT, labels=labels_BT, **weights)


def start_torch(reference: str, cores: str) -> None:
    """The peer's start: import, model, one step."""
    import numpy as np
    import torch
    from transformers import BertConfig, BertForMaskedLM

    marks = {"imported": time.monotonic()}
    torch.set_num_threads(int(cores))
    with np.load(reference, allow_pickle=False) as arrays:
        given = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "about"}
        about = json.loads(str(arrays["about"]))
    model = BertForMaskedLM(BertConfig(**about["config"]))
    weights = {name.removeprefix("weight "): value for name, value in given.items() if name.startswith("weight ")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or {*missing} - {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}:
        sys.exit(f"BertForMaskedLM has other weights than ours: {sorted({*missing, *unexpected})}")
    model.train()
    adamw = torch.optim.AdamW(model.parameters(), fused=True, **about["optimizer"])
    marks["ready"] = time.monotonic()
    loss = model(input_ids=given["ids"], attention_mask=given["segment"], labels=given["labels"]).loss
    loss.backward()
    adamw.step()
    marks["done"] = time.monotonic()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    say(marks, loss=float(loss.detach()), grad_norm=float(norm))


def start_import(module: str) -> None:
    importlib.import_module(module)
    say({"done": time.monotonic()})


CHILDREN = {"study": start_study, "torch": start_torch, "import": start_import}


# --- beside them -----------------------------------------------------------------------------------------------------


def start(child: str, *words: str, cache: Path) -> dict:
    """Start a process: seconds from before it to each of its marks, and what else it found."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"BERT6_JAX_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}  # as the peer
    command = [sys.executable, "-m", "benchmarks.startup", "--child", child, *words]
    root = Path(__file__).resolve().parents[1]
    zero = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=TIMEOUT)
    lines = done.stdout.splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        sys.exit(f"{' '.join(words or [child])} ended without a first step:\n{done.stderr[-4000:]}")
    found = json.loads(lines[-1])
    return found | {"marks": {name: moment - zero for name, moment in found["marks"].items()}}


class Turns:
    """The measured starts of every side, `{side: [found]}`, in folders below one that goes away at the end."""

    def __init__(self, folder: Path, options: Sequence[str]):
        self.folder, self.options = folder, options
        self.found: dict[str, list[dict]] = {}
        self.count = 0

    def study(self, study: str, cache: Path, reference: str = "") -> dict:
        self.count += 1
        out = self.folder / f"out{self.count}"
        options = self.options if study == "apt" else ()
        return start("study", study, reference, "--out", str(out), "--quiet", *options, cache=cache)

    def cold_and_warm(self, study: str) -> None:
        """A start with a new cache, and one with the cache that it leaves; exits where their losses differ."""
        cache = self.folder / f"cache{self.count}"
        cold = self.study(study, cache)
        files = [path.stat().st_size for path in (cache / "xla").iterdir()]
        warm = self.study(study, cache)
        if (cold["loss"], cold["grad_norm"]) != (warm["loss"], warm["grad_norm"]):
            sys.exit(f"{study}: the cold start found {cold} and the warm one {warm}: no times")
        after = sum(1 for _ in (cache / "xla").iterdir())
        about = {"programs": len(files), "megabytes": sum(files) / 1e6, "compiled_again": after - len(files)}
        self.found.setdefault(f"{study} warm", []).append(warm | about)
        self.found.setdefault(f"{study} cold", []).append(cold | about)

    def other(self, side: str, child: str, *words: str) -> dict:
        found = start(child, *words, cache=self.folder / "none")
        self.found.setdefault(side, []).append(found)
        return found


def agree(ours: dict, theirs: dict) -> dict[str, float]:
    """How far loss (nats) and gradient norm (share) of the peer's step are from ours; exits beyond `AGREE`."""
    differ = {
        "loss": abs(theirs["loss"] - ours["loss"]),
        "grad_norm": abs(theirs["grad_norm"] / ours["grad_norm"] - 1.0),
    }
    if not max(differ.values()) <= AGREE:
        sys.exit(f"the peer's first step found {theirs}, ours {ours}: they differ by {differ}: no times")
    return differ


def measure(args: argparse.Namespace) -> dict:
    from benchmarks import side_by_side
    from bert6_jax import parallel

    if args.threads:
        side_by_side.use_cores(args.threads)
    cores = str(parallel.cores())
    differ: dict[str, float] = {}
    imports = [name for name in IMPORTS if "torch" in args.sides or not name.startswith(("torch", "transformers"))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        turns = Turns(folder, TINY_DEMO.split() if args.tiny else ())
        reference = str(folder / "reference.npz")
        turns.study("apt", folder / "cache", reference)  # brings the files into memory too, so this is not measured
        if "torch" in args.sides:
            start("torch", reference, cores, cache=folder / "none")
        for turn in range(max(args.rounds, args.few)):
            for study in STUDIES:
                if study in args.sides and turn < (args.rounds if study == "apt" else args.few):
                    turns.cold_and_warm(study)
            if "torch" in args.sides and turn < args.rounds:
                theirs = turns.other("torch", "torch", reference, cores)
                differ = agree(turns.found["apt warm"][0], theirs)
            for module in imports if "imports" in args.sides and turn < args.rounds else ():
                turns.other(f"import {module}", "import", module)
    return report(args, turns.found, differ)


def report(args: argparse.Namespace, found: dict[str, list[dict]], differ: dict[str, float]) -> dict:
    from benchmarks import side_by_side

    def median(side: str, mark: str) -> float:
        return statistics.median(start["marks"][mark] for start in found[side])

    rows = []
    for side, starts in found.items():
        more = {mark: round(median(side, mark), 2) for mark in ("imported", "ready") if mark in starts[0]["marks"]}
        if side.endswith(" cold"):
            more["cold / warm"] = round(median(side, "done") / median(side.replace("cold", "warm"), "done"), 2)
        if "programs" in starts[0]:
            more["programs"] = starts[0]["programs"]
        rows.append(side_by_side.Row(side, [start["marks"]["done"] for start in starts], more=more))
    result = side_by_side.report(
        rows,
        args.json,
        title="first optimiser step from the start of the process" + (", tiny" if args.tiny else ""),
        dtype="float32",
        differ=differ,
        starts=found,
    )
    ratio = median("apt cold", "done") / median("apt warm", "done")
    print(f"  a second start of the demo is {ratio:.2f} times sooner at its first step (aim: {AIM:g})")
    if differ:
        print(f"  the peer's first step: loss {differ['loss']:.1g} away, gradient norm {differ['grad_norm']:.1g} of it")
    return result


def chosen(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SIDES or names.count(name) > 1:
            raise argparse.ArgumentTypeError(f"{name!r} is no side, or is there twice; choose from {', '.join(SIDES)}")
    return names


def arguments() -> argparse.Namespace:
    from benchmarks.side_by_side import positive

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=chosen, default=list(SIDES), help="with commas; apt is always there")
    parser.add_argument("--rounds", type=positive, default=3, help="turns of apt, torch and the imports (3)")
    parser.add_argument("--few", type=positive, default=1, help="turns of the other studies (1)")
    parser.add_argument("--threads", type=positive, default=None, help="cores of every process (those of this one)")
    parser.add_argument("--tiny", action="store_true", help="a small model and few sides, unless they are given")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    if parser.parse_args().tiny:
        parser.set_defaults(**TINY)
    args = parser.parse_args()
    args.sides = list(dict.fromkeys(["apt", *args.sides]))
    return args


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return CHILDREN[sys.argv[2]](*sys.argv[3:])
    from bert6_jax.errors import InputError

    args = arguments()
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if "torch" in args.sides and missing:
        sys.exit(f'no module {missing[0]}; pip install -e ".[bench]" for the comparison, or leave torch out of --sides')
    try:
        measure(args)
    except InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
