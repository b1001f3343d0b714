"""The masked-LM step of the paper's BERT-6: ours against Hugging Face `BertForMaskedLM` in PyTorch.

    taskset -c 0,1 python -m benchmarks.pretrain     6 x 768, V 30,522, batch 16 x 128, float32; minutes on two cores
    python -m benchmarks.pretrain --tiny             a small model, which shows that it runs and nothing else

Loss, gradients and AdamW, no dropout (arXiv 2509.03407's model and its optimiser). Ours is the step that `train.fit`
dispatches, corruption included. The peer starts from our weights and reads the ids that our masking made, with labels
at the same positions; it does not pay for making them. The losses of the first steps must agree to 1e-4 in float32 (in
bfloat16 to 0.02), or no times are shown. The sides, all in one process and taking turns:

    ours, ours-bfloat16                   the head runs on `--slots` positions of a row
    torch, torch-bfloat16                 as it comes: SDPA, the head on all positions, fused AdamW, autocast
    torch-slots, torch-bfloat16-slots     the same model with the head on our slots: how much of the ratio that is
    ..-compiled                           every one of PyTorch's also through torch.compile (minutes more)

A step's work is 6 N + 12 L d T a token (`transformer.flops_per_token`), the head at the share of positions that the
side runs it on; the share of the ceiling is to the best rate at which the machine, by either library, multiplies large
matrices of that dtype. XLA's temporaries are new memory in every dispatch, which costs page faults: a turn is
`--steps-per-dispatch` steps of every side, one dispatch of ours. GLIBC_TUNABLES=glibc.malloc.hugetlb=1 (large pages) or
MALLOC_* change times from outside; the JSON says what was set. PyTorch and transformers come with the extra `bench`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import side_by_side
from bert6_jax import config, hf, masking, objectives, train, transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError

TORCH = ("torch", "torch-bfloat16", "torch-slots", "torch-bfloat16-slots")
SIDES = ("ours", "ours-bfloat16", *TORCH, *(f"{name}-compiled" for name in TORCH))
AGREE = {"float32": 1e-4, "bfloat16": 2e-2}  # nats
CHECKED = 3  # steps at least whose losses must agree
PAD, CLS, SEP, MASK, FIRST = 0, 101, 102, 103, 999  # of bert-base-uncased; words from FIRST on
TINY = {"batch": 4, "length": 32, "width": 64, "blocks": 2, "vocab": 2_000, "slots": 10, "rounds": 3, "matrix": 256}
OPTIMIZER = train.OptimizerConfig()
KEY = 1  # of the run: corruption


class Given(NamedTuple):
    """The batches of all steps `[N, B, ...]`, as our step reads them and as it corrupts them."""

    batches: dict[str, np.ndarray]
    corrupted: masking.Corrupted


def dtype_of(side: str) -> str:
    return "bfloat16" if "bfloat16" in side else "float32"


def given(mask: masking.MaskingConfig, steps: int, batch: int, length: int) -> Given:
    """Full rows [CLS] words [SEP], words by a law near Zipf's; each step corrupted with the key that the step uses."""
    generator = np.random.Generator(np.random.Philox(key=2))
    words = mask.vocab_size - FIRST
    ids = FIRST + (words ** generator.random((steps, batch, length))).astype(np.int32) - 1
    ids[:, :, 0], ids[:, :, -1] = CLS, SEP
    batches = {
        "ids": ids,
        "segment": np.ones_like(ids),
        "row": np.arange(steps * batch, dtype=np.int32).reshape(steps, batch),
        "valid": np.ones((steps, batch), bool),
    }

    def corrupt(step, batch):
        return objectives.masked_batch(batch, jax.random.fold_in(jax.random.key(KEY), step), mask)[0]

    return Given(batches, jax.tree.map(np.asarray, jax.jit(jax.vmap(corrupt))(jnp.arange(steps), batches)))


class Ours:
    """Our side: `dispatch` steps a call, as `train.fit` sends them; `losses` (nats a target) of all steps so far."""

    def __init__(self, cfg: TransformerConfig, mask: masking.MaskingConfig, params, data: Given, dispatch: int):
        tx = train.make_optimizer(OPTIMIZER, 10**6, 10**6)  # one long epoch: the rate stays
        step = train.make_step(train.grad_of(objectives.masked_lm(cfg, mask)), tx)
        self.state = train.init_state(jax.tree.map(jnp.array, params), tx, jax.random.key(KEY))
        self.data, self.dispatch, self.losses = data.batches, dispatch, []
        run = jax.jit(train.many_steps(step), donate_argnums=0)
        self.run = run.lower(self.state, self.batches(), dispatch, None).compile()

    def batches(self) -> dict[str, np.ndarray]:
        now = slice(len(self.losses), len(self.losses) + self.dispatch)
        return {name: values[now] for name, values in self.data.items()}

    def __call__(self) -> None:
        self.state, sums = jax.block_until_ready(self.run(self.state, self.batches(), self.dispatch, None))
        self.losses += (np.asarray(sums["loss"]) / np.asarray(sums["count"])).tolist()


class Theirs:
    """The peer's side: the same steps, one after the other; `slots`: the head on our prediction slots only."""

    def __init__(self, cfg: TransformerConfig, params, data: Given, dispatch: int, name: str):
        self.torch = torch = side_by_side.torch_threads()
        from transformers import BertConfig, BertForMaskedLM

        self.where = "cuda" if jax.default_backend() == "gpu" else "cpu"
        self.model = BertForMaskedLM(BertConfig(**hf.config_to_hf(cfg), pad_token_id=PAD))
        weights = {name: torch.tensor(value) for name, value in hf.to_state_dict(params, cfg).items()}
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
        if unexpected or set(missing) - tied:
            raise InputError(f"BertForMaskedLM has other weights than ours: {sorted({*missing, *unexpected} - tied)}")
        self.model.to(self.where).train()
        self.adamw = torch.optim.AdamW(
            self.model.parameters(), lr=OPTIMIZER.lr, betas=(OPTIMIZER.b1, OPTIMIZER.b2), eps=OPTIMIZER.eps,
            weight_decay=OPTIMIZER.weight_decay, fused=True,
        )  # fmt: skip
        found = data.corrupted
        target = np.where(found.valid_BK, found.target_BK, -100)  # what their loss ignores
        labels = np.full(found.ids_BT.shape, -100, np.int32)
        np.put_along_axis(labels, found.slot_BK, target, axis=-1)
        on_slots = "slots" in name
        self.inputs = [
            torch.tensor(x, dtype=torch.int64, device=self.where)
            for x in (found.ids_BT, data.batches["segment"], *((found.slot_BK, target) if on_slots else (labels,)))
        ]
        self.dispatch, self.losses = dispatch, []
        self.cast = partial(torch.autocast, self.where, torch.bfloat16, enabled=dtype_of(name) == "bfloat16")
        self.loss = self._on_slots if on_slots else self._on_all
        if "compiled" in name:
            self.loss = torch.compile(self.loss)

    def __call__(self) -> None:
        for step in range(len(self.losses), len(self.losses) + self.dispatch):
            self.adamw.zero_grad()
            with self.cast():
                loss = self.loss(*(values[step] for values in self.inputs))
            loss.backward()
            self.adamw.step()
            self.losses.append(float(loss.detach()))
        if self.where == "cuda":
            self.torch.cuda.synchronize()

    def _on_all(self, ids, segment, labels):
        return self.model(input_ids=ids, attention_mask=segment, labels=labels).loss

    def _on_slots(self, ids, segment, slot, target):
        out_BTD = self.model.bert(input_ids=ids, attention_mask=segment).last_hidden_state
        at_BKD = slot[:, :, None].expand(-1, -1, out_BTD.shape[-1])
        logits_BKV = self.model.cls(out_BTD.gather(1, at_BKD))
        return self.torch.nn.functional.cross_entropy(logits_BKV.flatten(0, 1), target.flatten())


def differences(sides, steps: int) -> dict[str, float]:
    """How far the losses of the first steps are from those of the first side, in nats; exits where they do not agree.

    Each side is called until it has done so many steps. A dtype is held to its own bound.
    """
    for call in sides.values():
        while len(call.losses) < steps:
            call()
    expected = np.array(next(iter(sides.values())).losses[:steps])
    found = {name: float(np.abs(np.array(call.losses[:steps]) - expected).max()) for name, call in sides.items()}
    first = next(iter(sides))
    for name, value in found.items():
        bound = max(AGREE[dtype_of(name)], AGREE[dtype_of(first)])
        if not value <= bound:
            sys.exit(
                f"losses of {name} {sides[name].losses[:steps]} and of {first} {expected.tolist()} differ by "
                f"{value:.2g}, more than {bound:g}: no times"
            )
    return found


def chosen(text: str) -> Sequence[str]:
    names = text.split(",")
    for name in names:
        if name not in SIDES or names.count(name) > 1:
            raise argparse.ArgumentTypeError(f"{name!r} is no side, or is there twice; choose from {', '.join(SIDES)}")
    return names


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=chosen, default=["ours", "torch", "torch-bfloat16"], help="with commas")
    parser.add_argument("--rounds", type=side_by_side.positive, default=5, help="measured turns of each side (5)")
    parser.add_argument("--batch", type=side_by_side.positive, default=16, help="rows (16)")
    parser.add_argument("--length", type=side_by_side.positive, default=128, help="positions of a row (128)")
    parser.add_argument(
        "--width", type=side_by_side.positive, default=768, help="of the residual stream, a multiple of 64 (768)"
    )
    parser.add_argument("--blocks", type=side_by_side.positive, default=6, help="transformer blocks (6)")
    parser.add_argument("--vocab", type=side_by_side.positive, default=30_522, help="ids (30,522)")
    parser.add_argument(
        "--slots", type=side_by_side.positive, default=40, help="prediction slots of a row (40, as experiments.apt)"
    )
    parser.add_argument(
        "--threads", type=side_by_side.positive, default=None, help="of both libraries (the process's cores)"
    )
    parser.add_argument(
        "--steps-per-dispatch", type=side_by_side.positive, default=4,
        help="steps of a turn; one dispatch of ours (4, as experiments.apt)",
    )  # fmt: skip
    parser.add_argument("--matrix", type=side_by_side.positive, default=None, help="size of the ceiling's matrices")
    parser.add_argument("--tiny", action="store_true", help="small sizes, unless they are given")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    if parser.parse_args().tiny:
        parser.set_defaults(**TINY)
    args = parser.parse_args()
    if args.width % 64 or args.length < 3 or args.vocab <= FIRST:
        parser.error(f"--width is a multiple of 64, --length at least 3 and --vocab more than {FIRST}")
    return args


def main() -> None:
    args = arguments()
    try:
        found = measure(args)
    except InputError as error:
        sys.exit(str(error))
    except ImportError as error:
        sys.exit(f'{error}; pip install -e ".[bench]" for the comparison with PyTorch, or --sides ours')
    differ = ", ".join(f"{name} {value:.1g}" for name, value in list(found["losses_differ"].items())[1:])
    if differ:
        print(f"  losses of the first steps, away from {args.sides[0]}: {differ}")


def measure(args: argparse.Namespace) -> dict:
    if args.threads:
        side_by_side.use_cores(args.threads)
    cfg = config.bert6(
        args.vocab, width=args.width, blocks=args.blocks, heads=args.width // 64, mlp_width=4 * args.width,
        max_len=args.length, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    mask = masking.MaskingConfig(args.vocab, MASK, (PAD, CLS, SEP), args.slots)
    dispatch = args.steps_per_dispatch
    checked = -(-CHECKED // dispatch) * dispatch
    data = given(mask, checked + args.rounds * dispatch, args.batch, args.length)
    params = jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), cfg)

    def make(side):
        if side.startswith("ours"):
            return Ours(dataclasses.replace(cfg, dtype=dtype_of(side)), mask, params, data, dispatch)
        return Theirs(cfg, params, data, dispatch, side)

    sides = {name: make(name) for name in args.sides}
    differ = differences(sides, checked)
    times = side_by_side.alternate(sides, args.rounds, warmup=0)  # the checked steps went before

    torch = next((call.torch for call in sides.values() if isinstance(call, Theirs)), None)
    losses = {name: call.losses for name, call in sides.items()}
    sides.clear()  # their memory
    limits = side_by_side.ceiling(torch, sorted({dtype_of(name) for name in times}), args.matrix)
    tokens, rows = args.batch * args.length, []
    for name, seconds in times.items():
        on_slots = name.startswith("ours") or "slots" in name
        share = min(args.slots, args.length) / args.length if on_slots else 1.0
        work = tokens * transformer.flops_per_token(cfg, args.length, share)
        best = max(rate for limit, rate in limits.items() if limit.endswith(dtype_of(name)))
        step = [value / dispatch for value in seconds]
        more = {"tokens/s": tokens / float(np.median(step)), "GFLOP": work / 1e9, "last loss": losses[name][-1]}
        rows.append(side_by_side.Row(name, step, work, best, more))
    found = side_by_side.report(
        rows,
        args.json,
        title=f"masked-LM step, {args.blocks} x {args.width}, V {args.vocab:,}, batch {args.batch} x {args.length}",
        dtype={name: dtype_of(name) for name in times},
        shapes={name: getattr(args, name) for name in ("blocks", "width", "vocab", "batch", "length", "slots")},
        steps_per_dispatch=dispatch,
        parameters=transformer.num_params(params),
        ceiling=limits,
        losses_differ=differ,
        losses=losses,
    )
    rates = (f"{name} {rate / 1e9:,.0f} G{'B' if 'copy' in name else 'FLOP'}/s" for name, rate in limits.items())
    print(f"  ceiling: {', '.join(rates)}")
    return found


if __name__ == "__main__":
    main()
