"""How the cost of our masked-LM step of BERT-6 grows: with the batch, and with the length of a row at equal tokens.

    taskset -c 0,1 python -m benchmarks.scaling                   float32, minutes on two cores
    python -m benchmarks.scaling --dtype bfloat16 --rows 16,64,256,1024 --tokens 32768
    python -m benchmarks.scaling --tiny                           a small model, which shows that it runs

The step is that of `benchmarks.pretrain`. First the batch grows at 128 positions a row, until XLA's own count of the
step's memory (state, batch, temporaries) is more than is free; then rows grow while batch times length stays. Linear
cost is the same time a token in every line. Attention adds 12 L d T operations to the 6 N of a token, so the share of
the ceiling is what longer rows are to be judged by.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np

from benchmarks import pretrain, side_by_side
from bert6_jax import config, masking, transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError

LENGTH = 128  # of the rows while the batch grows
SLOTS = 40 / 128  # of the positions: those of experiments.apt
STEPS = 2  # of a dispatch
FITS = 0.85  # of the memory that is free


def measure(cfg: TransformerConfig, share: float, batch: int, length: int, rounds: int) -> side_by_side.Row | None:
    """Times of one step, the head on `share` of the positions; None if its memory is more than is free."""
    slots, name = max(1, round(share * length)), f"{batch} x {length}"
    mask = masking.MaskingConfig(cfg.vocab_size, pretrain.MASK, (pretrain.PAD, pretrain.CLS, pretrain.SEP), slots)
    data = pretrain.given(mask, STEPS * (rounds + 1), batch, length)
    free = side_by_side.free_memory()
    side = pretrain.Ours(cfg, mask, jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), cfg), data, STEPS)
    plan = side.run.memory_analysis()
    needs = plan.argument_size_in_bytes + plan.temp_size_in_bytes  # the new state takes the place of the old one
    if needs > FITS * free:
        print(f"  {name}: needs {needs / 2**30:.1f} GiB, {free / 2**30:.1f} were free; left out, as is all beyond it")
        return None
    seconds = [turn / STEPS for turn in side_by_side.alternate({name: side}, rounds)[name]]
    if not np.isfinite(side.losses).all():
        sys.exit(f"losses of {name}: {side.losses}: no times")
    work = batch * length * transformer.flops_per_token(cfg, length, slots / length)
    token = float(np.median(seconds)) / (batch * length)
    return side_by_side.Row(name, seconds, work, more={"ms a token": 1e3 * token, "memory GiB": needs / 2**30})


def sizes(text: str) -> list[int]:
    return [side_by_side.positive(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=sizes, default=[4, 8, 16, 32, 64, 128, 256], help="batches (4,8,..,256)")
    parser.add_argument("--lengths", type=sizes, default=[64, 128, 256, 512], help="of rows (64,128,256,512)")
    parser.add_argument("--tokens", type=side_by_side.positive, default=2_048, help="of a step as rows grow (2,048)")
    parser.add_argument("--rounds", type=side_by_side.positive, default=3, help="measured steps of each size (3)")
    parser.add_argument("--dtype", choices=list(pretrain.AGREE), default="float32")
    parser.add_argument("--threads", type=side_by_side.positive, default=None, help="cores (the process's)")
    parser.add_argument("--tiny", action="store_true", help="a small model and small sizes, unless they are given")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    if parser.parse_args().tiny:
        parser.set_defaults(rows=[2, 4, 8], lengths=[16, 32], tokens=128)
    args = parser.parse_args()
    if min(args.lengths) < 3 or any(args.tokens % length for length in args.lengths):
        parser.error("--lengths are at least 3 and divide --tokens")
    return args


def main() -> None:
    args = arguments()
    try:
        if args.threads:
            side_by_side.use_cores(args.threads)
    except InputError as error:
        sys.exit(str(error))
    small = {"width": 64, "heads": 1, "mlp_width": 256, "blocks": 2} if args.tiny else {}
    cfg = config.bert6(
        2_000 if args.tiny else 30_522, max_len=max(*args.lengths, LENGTH), dropout=0.0, attention_dropout=0.0,
        dtype=args.dtype, **small,
    )  # fmt: skip
    limits = side_by_side.ceiling(None, [args.dtype], 256 if args.tiny else None)
    best = limits[f"matmul jax {args.dtype}"]
    tables = {
        "batch": [(rows, LENGTH) for rows in sorted(args.rows)],
        "length": [(args.tokens // length, length) for length in sorted(args.lengths)],
    }
    found = {}
    for what, shapes in tables.items():
        rows = []
        for batch, length in shapes:
            row = measure(cfg, SLOTS, batch, length, args.rounds)
            if row is None:
                break
            rows.append(row._replace(ceiling=best))
        if not rows:
            sys.exit("no size fits; give smaller ones by --rows, --lengths and --tokens")
        title = f"masked-LM step by {what}, {cfg.blocks} x {cfg.width}, V {cfg.vocab_size:,}, {args.dtype}"
        found[what] = side_by_side.report(rows, title=title, dtype=args.dtype, ceiling=limits)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
