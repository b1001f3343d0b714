"""Readouts of BERT-6 at seven depths: in one pass, at one depth, in seven passes, and PyTorch doing the same.

    taskset -c 0,1 python -m benchmarks.readout                        training step, linear heads; minutes on two cores
    taskset -c 0,1 python -m benchmarks.readout --work evaluation      answers and losses of every readout
    python -m benchmarks.readout --tiny                                a small model, which shows that it runs

On the CPU: a frozen trunk (6 x 768, batch 16 x 128, float32) and a head D -> V = 30,522 at the embedding output and
behind every block; a training step is trunk, heads, gradients and AdamW. Sides, all in one process and taking turns:

    ours          `readout.grad_fn` in `train.make_step`, `readout.predict`: all depths from one pass of the trunk
    ours-one      the last depth alone, which needs the whole trunk
    ours-passes   every depth alone, one after the other, the trunk run as far as that depth
    torch         `BertForMaskedLM` from our weights with SDPA, the trunk under `no_grad`, a head a depth at the targets
                  only (PyTorch's shapes may be as many as there are), fused AdamW
    torch-one     the same at the last depth

Evaluation also asks the model's own head, but for `ours-passes`. All sides start from the same weights and read the
same corrupted ids; the losses of every depth in the first steps must agree to 1e-4 nats, and in evaluation all but one
answer in a thousand, or no times are shown. A side's work counts the trunk's forward pass and the heads at the targets
that are there; AdamW is bytes, not operations: 7 passes over the heads' floats. Then ours is taken apart: the trunk,
the optimiser, and the rest, which is the heads. PyTorch and transformers come with the extra `bench`. The
largest sides hold 2.6 GB each: leave some out with --sides on a small machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import pretrain, side_by_side
from bert6_jax import config, hf, masking, readout, train, transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError

SIDES = ("ours", "ours-one", "ours-passes", "torch", "torch-one")
WORK = ("training", "evaluation")
AGREE = 1e-4  # nats
ANSWERS = 1e-3  # share of answers that may differ: ties, up to rounding
CHECKED = 2  # steps whose losses must agree
OWN = "own"  # the model's own head, beside the depths
TINY = {"batch": 4, "length": 32, "width": 64, "blocks": 2, "vocab": 2_000, "slots": 10, "rounds": 3, "matrix": 256}
OPTIMIZER = train.OptimizerConfig()


class Setting:
    """What all sides share: model, batches, trunk, heads `[M, ...]` and what is measured."""

    def __init__(self, args: argparse.Namespace):
        self.cfg = config.bert6(
            args.vocab, width=args.width, blocks=args.blocks, heads=args.width // 64, mlp_width=4 * args.width,
            max_len=args.length, dropout=0.0, attention_dropout=0.0,
        )  # fmt: skip
        special = (pretrain.PAD, pretrain.CLS, pretrain.SEP)
        self.mask = masking.MaskingConfig(args.vocab, pretrain.MASK, special, args.slots)
        self.data = pretrain.given(self.mask, CHECKED + args.rounds, args.batch, args.length)
        self.variant, self.training = args.variant, args.work == "training"
        self.trunk = jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), self.cfg)
        heads = jax.jit(readout.init_heads, static_argnums=(1, 2))(jax.random.key(2), self.cfg, self.variant)
        self.heads = jax.tree.map(np.asarray, heads)
        self.tx = train.make_optimizer(OPTIMIZER, 10**6, 10**6)  # one long epoch: the rate stays

    def batches(self, step: int):
        return {name: values[step : step + 1] for name, values in self.data.batches.items()}

    def init_state(self, depths: Sequence[int]) -> train.TrainState:
        heads = jax.tree.map(lambda leaf: jnp.array(leaf[np.array(depths)]), self.heads)
        return train.init_state(heads, self.tx, jax.random.key(pretrain.KEY))


class Ours:
    """Our side: every bank of `banks` (tuples of depths) has its own pass. `losses`: {depth: nats a target} of all
    calls, `answers`: {depth: ids [X]} of the last one (evaluation)."""

    def __init__(self, setting: Setting, banks: Sequence[tuple[int, ...]], own: bool):
        self.setting, self.own, self.losses, self.answers = setting, own, [], {}
        s, trained = setting, {}
        for depths in banks:
            if s.training:
                step = train.make_step(readout.grad_fn(s.cfg, s.mask, s.variant, depths), s.tx)
                run = jax.jit(train.many_steps(step), donate_argnums=0)
            else:
                fixed = {"cfg": s.cfg, "masking": s.mask, "variant": s.variant, "depths": depths, "own": own}
                run = jax.jit(partial(readout.predict, **fixed))
            trained[depths] = run, s.init_state(depths)
        self.banks = trained

    def __call__(self) -> None:
        s, number, losses = self.setting, len(self.losses), {}
        for depths, (run, state) in self.banks.items():
            if s.training:
                state, sums = jax.block_until_ready(run(state, s.batches(number), 1, s.trunk))
                self.banks[depths] = run, state
                losses |= {m: float(sums[f"loss_{m}"][0] / sums["count"][0]) for m in depths}
            else:
                batch = jax.tree.map(lambda x: x[0], s.batches(number))
                key = jax.random.fold_in(jax.random.key(pretrain.KEY), number)
                answers, nll_RB, corrupted = jax.block_until_ready(run(s.trunk, state.params, batch, key))
                valid_BK = np.asarray(corrupted.valid_BK)
                names = (*depths, OWN) if self.own else depths
                losses |= dict(zip(names, np.asarray(nll_RB).sum(-1) / valid_BK.sum(), strict=True))
                self.answers |= dict(zip(names, np.asarray(answers)[:, valid_BK], strict=True))
        self.losses.append(losses)


class Theirs:
    """The peer's side for one bank of depths; `losses` and `answers` as ours."""

    def __init__(self, setting: Setting, depths: Sequence[int]):
        self.torch = torch = side_by_side.torch_threads()
        from transformers import BertConfig, BertForMaskedLM

        s, self.setting, self.depths, self.losses, self.answers = setting, setting, depths, [], {}
        self.model = BertForMaskedLM(BertConfig(**hf.config_to_hf(s.cfg), pad_token_id=pretrain.PAD))
        weights = {name: torch.tensor(value) for name, value in hf.to_state_dict(s.trunk, s.cfg).items()}
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
        if unexpected or set(missing) - tied:
            raise InputError(f"BertForMaskedLM has other weights than ours: {sorted({*missing, *unexpected} - tied)}")
        self.model.eval()
        self.heads = torch.nn.ModuleList([self._head(m) for m in depths])
        if s.training:
            self.adamw = torch.optim.AdamW(
                self.heads.parameters(), lr=OPTIMIZER.lr, betas=(OPTIMIZER.b1, OPTIMIZER.b2), eps=OPTIMIZER.eps,
                weight_decay=OPTIMIZER.weight_decay, fused=True,
            )  # fmt: skip
        found = s.data.corrupted
        self.ids, self.segment = (torch.tensor(x, dtype=torch.int64) for x in (found.ids_BT, s.data.batches["segment"]))
        row_NBK = np.broadcast_to(np.arange(found.ids_BT.shape[1])[:, None], found.slot_BK.shape[1:])
        self.at = [
            torch.tensor((row_NBK * s.cfg.max_len + slot)[valid])
            for slot, valid in zip(found.slot_BK, found.valid_BK, strict=True)
        ]
        self.target = [
            torch.tensor(target[valid], dtype=torch.int64)
            for target, valid in zip(found.target_BK, found.valid_BK, strict=True)
        ]

    def _head(self, m: int):
        torch, s = self.torch, self.setting
        layers = []

        def put(module, **ours):
            with torch.no_grad():
                for name, value in ours.items():
                    getattr(module, name).copy_(torch.tensor(np.array(value)))
            layers.append(module)

        def linear(width, kernel, bias):
            put(torch.nn.Linear(s.cfg.width, width), weight=kernel[m].T, bias=bias[m])

        if s.variant == "mlm_head":
            linear(s.cfg.width, **s.heads["dense"])
            layers.append(torch.nn.GELU())
            norm = {"weight": s.heads["norm"]["scale"][m], "bias": s.heads["norm"]["bias"][m]}
            put(torch.nn.LayerNorm(s.cfg.width, eps=s.cfg.norm_eps), **norm)
        linear(s.cfg.vocab_size, s.heads["kernel"], s.heads["bias"])
        return torch.nn.Sequential(*layers)

    def __call__(self) -> None:
        torch, s, number, losses = self.torch, self.setting, len(self.losses), {}
        at, target = self.at[number], self.target[number]
        cross_entropy = torch.nn.functional.cross_entropy
        with torch.no_grad():
            inputs = {"input_ids": self.ids[number], "attention_mask": self.segment[number]}
            streams = self.model.bert(**inputs, output_hidden_states=True).hidden_states
            read = {m: streams[m].flatten(0, 1)[at] for m in self.depths}
        if s.training:
            self.adamw.zero_grad()
            for m, head in zip(self.depths, self.heads, strict=True):  # one head's graph lives at a time
                loss = cross_entropy(head(read[m]), target)
                loss.backward()
                losses[m] = loss.detach()
            self.adamw.step()
        else:
            with torch.no_grad():
                asked = dict(zip(self.depths, self.heads, strict=True)) | {OWN: self.model.cls}
                for m, head in asked.items():
                    logits_XV = head(streams[-1].flatten(0, 1)[at] if m == OWN else read[m])
                    losses[m] = cross_entropy(logits_XV, target)
                    self.answers[m] = logits_XV.argmax(-1).numpy()
        self.losses.append({m: float(loss) for m, loss in losses.items()})


def check(sides) -> dict[str, float]:
    """The largest difference of each side's losses from ours in nats; exits where sides do not agree."""
    for _ in range(CHECKED):
        for call in sides.values():
            call()
    found = {}
    first, *others = sides
    for name in others:
        pairs = [
            (now[m], ours[m])
            for now, ours in zip(sides[name].losses, sides[first].losses, strict=True)
            for m in now.keys() & ours.keys()
        ]
        if not pairs:
            sys.exit(f"{name} and {first} have no depth in common: nothing to compare, no times")
        found[name] = float(np.max([abs(a - b) for a, b in pairs]))
        if not found[name] <= AGREE:
            sys.exit(f"losses of {name} and of {first} differ by {found[name]:.2g} nats, more than {AGREE:g}: no times")
        theirs, ours = sides[name].answers, sides[first].answers
        for m in theirs.keys() & ours.keys():
            share = float((theirs[m] != ours[m]).mean())
            if share > ANSWERS:
                sys.exit(f"{share:.2%} of the answers of {name} at depth {m} are not those of {first}: no times")
    return found


def head_flops(cfg: TransformerConfig, variant: str, training: bool) -> float:
    """Floating-point operations of one head at one target: the trunk is frozen, so a linear head needs no gradient of
    what it reads, and the dense layer of `mlm_head` none of its own."""
    decoder, dense = 2.0 * cfg.width * cfg.vocab_size, 2.0 * cfg.width**2
    if variant == "linear":
        return 2 * decoder if training else decoder
    return 3 * decoder + 2 * dense if training else decoder + dense


def parts(setting: Setting, rounds: int) -> dict[str, list[float]]:
    """Times of the trunk alone and (training) of AdamW over the gradients of all heads alone."""
    s, key = setting, jax.random.key(pretrain.KEY)
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), s.batches(0))
    streams = jax.jit(partial(readout.slot_streams, cfg=s.cfg, masking=s.mask))
    sides = {"trunk": lambda: jax.block_until_ready(streams(s.trunk, batch, key))}
    if s.training:
        update = jax.jit(
            train.make_step(lambda heads, batch, key, grads: (grads, {"count": jnp.ones(())}), s.tx), donate_argnums=0
        )
        state = [s.init_state(range(s.cfg.depths))]
        grads = jax.tree.map(lambda leaf: jnp.array(1e-3 * leaf), s.heads)

        def optimise():
            state[0] = jax.block_until_ready(update(state[0], None, grads))[0]

        sides["optimiser"] = optimise
    return side_by_side.alternate(sides, rounds)


def chosen(text: str) -> Sequence[str]:
    names = text.split(",")
    for name in names:
        if name not in SIDES or names.count(name) > 1:
            raise argparse.ArgumentTypeError(f"{name!r} is no side, or is there twice; choose from {', '.join(SIDES)}")
    return [name for name in SIDES if name in names]


def arguments() -> argparse.Namespace:
    positive = side_by_side.positive
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=WORK, default="training", help="what is measured (training)")
    parser.add_argument("--variant", choices=("linear", "mlm_head"), default="linear", help="of the heads (linear)")
    parser.add_argument("--sides", type=chosen, default=list(SIDES), help="with commas; ours is always there")
    parser.add_argument("--rounds", type=positive, default=5, help="measured turns of each side (5)")
    parser.add_argument("--batch", type=positive, default=16, help="rows (16)")
    parser.add_argument("--length", type=positive, default=128, help="positions of a row (128)")
    parser.add_argument("--width", type=positive, default=768, help="of the residual stream, a multiple of 64 (768)")
    parser.add_argument("--blocks", type=positive, default=6, help="transformer blocks (6)")
    parser.add_argument("--vocab", type=positive, default=30_522, help="ids (30,522)")
    parser.add_argument("--slots", type=positive, default=40, help="prediction slots of a row (40, as experiments.apt)")
    parser.add_argument("--threads", type=positive, default=None, help="of both libraries (the process's cores)")
    parser.add_argument("--matrix", type=positive, default=None, help="size of the ceiling's matrices")
    parser.add_argument("--tiny", action="store_true", help="small sizes, unless they are given")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    if parser.parse_args().tiny:
        parser.set_defaults(**TINY)
    args = parser.parse_args()
    if args.width % 64 or args.length < 3 or args.vocab <= pretrain.FIRST:
        parser.error(f"--width is a multiple of 64, --length at least 3 and --vocab more than {pretrain.FIRST}")
    return args


def main() -> None:
    args = arguments()
    jax.config.update("jax_platforms", "cpu")  # as the peer
    try:
        measure(args)
    except InputError as error:
        sys.exit(str(error))
    except ImportError as error:
        ours = ",".join(name for name in SIDES if name.startswith("ours"))
        sys.exit(f'{error}; pip install -e ".[bench]" for the comparison with PyTorch, or --sides {ours}')


def measure(args: argparse.Namespace) -> dict:
    if args.threads:
        side_by_side.use_cores(args.threads)
    setting = Setting(args)
    cfg, training = setting.cfg, setting.training
    every = tuple(range(cfg.depths))
    last = every[-1:]

    def make(name):
        if name.startswith("torch"):
            return Theirs(setting, last if name.endswith("one") else every)
        banks = {"ours": [every], "ours-one": [last], "ours-passes": [(m,) for m in every]}[name]
        return Ours(setting, banks, own=name != "ours-passes")

    sides = {name: make(name) for name in dict.fromkeys(["ours", *args.sides])}
    differ = check(sides)
    times = side_by_side.alternate(sides, args.rounds, warmup=0)  # the checked steps went before
    losses = {name: [{str(m): float(v) for m, v in now.items()} for now in call.losses] for name, call in sides.items()}
    torch = next((call.torch for call in sides.values() if isinstance(call, Theirs)), None)
    sides.clear()  # their memory
    pieces = parts(setting, args.rounds)
    limits = side_by_side.ceiling(torch, ("float32",), args.matrix)

    targets = float(setting.data.corrupted.valid_BK.sum(axis=(1, 2)).mean())
    tokens = args.batch * args.length
    trunk = tokens * transformer.flops_per_token(cfg, args.length, 0.0) / 3.0  # forward
    one = targets * head_flops(cfg, args.variant, training)
    own = 0.0 if training else targets * 2.0 * (cfg.width * cfg.vocab_size + cfg.width**2)
    work = {
        "ours": trunk + cfg.depths * one + own, "ours-one": trunk + one + own,
        # depth m runs m blocks
        "ours-passes": trunk * sum(every) / cfg.blocks + cfg.depths * one,
    }  # fmt: skip
    best = max(rate for name, rate in limits.items() if name.startswith("matmul"))
    rows = []
    for name, seconds in times.items():
        count = work[name.replace("torch", "ours")]
        rows.append(side_by_side.Row(name, seconds, count, best, {"GFLOP": count / 1e9}))
    rows.append(side_by_side.Row("ours: trunk", pieces["trunk"], trunk, best, {"GFLOP": trunk / 1e9}))
    if training:
        floats = sum(leaf.size for leaf in jax.tree.leaves(setting.heads))
        copy = max(rate for name, rate in limits.items() if name.startswith("copy"))
        moved = 4.0 * 7 * floats
        rows.append(side_by_side.Row("ours: optimiser", pieces["optimiser"], moved, copy))
    rest = statistics.median(times["ours"]) - sum(statistics.median(seconds) for seconds in pieces.values())
    ratio = {
        name: statistics.median(times[name]) / statistics.median(times[f"{name}-one"])
        for name in ("ours", "torch")
        if {name, f"{name}-one"} <= times.keys()
    }
    counted = (trunk + cfg.depths * one + own) / (trunk + one + own)
    found = side_by_side.report(
        rows,
        args.json,
        title=f"{args.work}, {args.variant} heads at {cfg.depths} depths, {args.blocks} x {args.width}, "
        f"V {args.vocab:,}, batch {args.batch} x {args.length}, {args.slots} slots ({targets:.0f} targets a batch)",
        work=args.work,
        variant=args.variant,
        dtype="float32",
        shapes={name: getattr(args, name) for name in ("blocks", "width", "vocab", "batch", "length", "slots")},
        targets=targets,
        ceiling=limits,
        losses_differ=differ,
        losses=losses,
        depths_against_one=ratio,
        depths_against_one_by_flops=counted,
        heads_seconds=rest,
    )
    shown = ", ".join(f"{name} {value:.2f}" for name, value in ratio.items())
    print(
        f"  {cfg.depths} depths against one: {shown}; by operations alone {counted:.2f}; our heads {1e3 * rest:,.0f} ms"
    )
    print(f"  losses, away from ours: {', '.join(f'{name} {value:.1g}' for name, value in differ.items())}")
    rates = (f"{name} {rate / 1e9:,.0f} G{'B' if 'copy' in name else 'FLOP'}/s" for name, rate in limits.items())
    print(f"  ceiling: {', '.join(rates)}")
    return found


if __name__ == "__main__":
    main()
