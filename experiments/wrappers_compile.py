"""`python -m experiments.wrappers compile`: a RASP program to a transformer, looked at, checked and saved.

For people who write programs (synthetic/rasp.py): sizes of the model, what program and model say of given inputs, a
check on random ones, a checkpoint. Exit codes: 0; 1 where the model says something else than the program; 2 for bad
input, with one line on stderr.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import time
import traceback
import types
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bert6_jax import transformer
from bert6_jax.errors import InputError
from experiments.harness import cli
from synthetic import compiler, rasp

COMMAND = "python -m experiments.wrappers compile"

_EPILOG = f"""\
A program is an expression of synthetic/rasp.py. A file of your own, say mine.py:

  import operator
  from synthetic.rasp import Aggregate, Select, indices, length, tokens

  shifted = Aggregate(Select(indices, indices - 1, operator.eq), tokens, default="#")

  def last():
      return Aggregate(Select(indices, length() - 1, operator.eq), tokens)

examples:
  {COMMAND} counter --vocab abcdefghi --length 20 --input abca --check 200
  {COMMAND} mine.py:shifted --vocab abc --length 8 --input "a b c"
  {COMMAND} balanced --vocab "()x" --length 6 --input "(x)" --out runs/balanced
  {COMMAND} sort --vocab 0,5,10 --length 5 --input "10 0 5" --input "5 5"
  {COMMAND} counter --vocab ab --length 20 --input aaaaaaaaaaaa --exactness 100

The last shows what the paper's exactness makes of a large count. In the output, - is no value, ? no single value.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Compile a program as the command line (without `compile`) asks; returns the exit code."""
    path = None
    try:
        args = _parser().parse_args(sys.argv[1:] if argv is None else argv)
        path, program = _program(args.program)
        if args.out is not None and args.out.exists():
            raise InputError(f"--out {args.out} exists, checkpoints are never overwritten; name another folder")
        vocab, characters = _vocabulary(args.vocab)
        sequences = [_sequence(text, vocab, characters) for text in args.input]
        cli.prepare_jax(compilation_cache=True)
        return 0 if _compile(args, program, vocab, sequences) else 1
    except InputError as error:
        line = _line(error.__cause__, path) if path is not None else ""
        return cli.fail(f"{error}{line and f' ({path.name}, {line})'}")
    except KeyboardInterrupt:
        return cli.fail("no checkpoint was written", 130, "interrupted")


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog=COMMAND,
        description="Compile a RASP program into a transformer, show what both say, check them against each other.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "program",
        metavar="PROGRAM",
        help=f"{', '.join(rasp.PROGRAMS)}; or FILE.py:NAME, a sequence or a function without arguments that gives one",
    )
    parser.add_argument(
        "--vocab",
        required=True,
        metavar="TOKENS",
        help="words where there is a comma or a space, as numbers if all of them are whole numbers (with a minus: "
        "--vocab=-1,0,1); else every character is a token",
    )
    whole, number = cli.reader(int, low=1), cli.reader(float)
    parser.add_argument("--length", required=True, type=whole, metavar="N", help="tokens that a sequence may have")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="TOKENS",
        help="a sequence to show (again for more): words where there is a comma or a space; else characters if all "
        "tokens are single ones",
    )
    parser.add_argument("--check", type=whole, metavar="N", help="compare on N random sequences of all lengths")
    parser.add_argument(
        "--exactness",
        type=number,
        metavar="X",
        help="slope of the steps from a number to a one-hot (as much as is needed; Tracr's default is 100)",
    )
    parser.add_argument(
        "--sharpness",
        type=number,
        metavar="X",
        help="score of a selected key (as much as is needed; the paper's is 100)",
    )
    parser.add_argument(
        "--out", type=cli.reader(Path), metavar="DIR", help="checkpoint to write, if nothing differed (none)"
    )
    parser.add_argument("--seed", type=cli.reader(int, low=0), default=0, metavar="N", help="of --check (0)")
    return parser


# --- what was asked for ----------------------------------------------------------------------------------------------


def _program(text: str) -> tuple[Path | None, rasp.SOp]:
    """The program, and the file that it comes from."""
    if ":" not in text and not text.endswith(".py"):
        if text not in rasp.PROGRAMS:
            near = difflib.get_close_matches(text, rasp.PROGRAMS, 3, 0.5) or rasp.PROGRAMS
            raise InputError(f"unknown program {text!r}; did you mean {', '.join(near)}? Your own: FILE.py:NAME")
        return None, rasp.PROGRAMS[text]()
    file, _, name = text.rpartition(":") if ":" in text else (text, "", "")
    path = Path(file)
    found = _run_file(path)
    own = {key: value for key, value in found.items() if key[0] != "_" and value is not vars(rasp).get(key)}
    known = [key for key, value in own.items() if _is_program(value, path)]
    if name not in found:
        near = difflib.get_close_matches(name, known, 3, 0.5) or known
        raise InputError(
            f"{path} has no {name!r}; it has {', '.join(near) or 'no sequence and no function'}" if name
            else f"{path}: say which program of it is meant, as {path}:NAME; it has {', '.join(near) or 'none'}"
        )  # fmt: skip
    program = found[name]
    if not isinstance(program, rasp.Expr) and callable(program):
        program = _guarded(path, program, f"{name}()")
    rasp.check(program)
    return path, program if program.name else program.named(name)


def _is_program(value, path: Path) -> bool:
    defined = isinstance(value, types.FunctionType) and value.__code__.co_filename == str(path)
    return defined or isinstance(value, rasp.SOp)


def _run_file(path: Path) -> dict:
    """The names that a Python file defines."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"cannot read the program file {path}: {why}; give FILE.py:NAME") from None
    module = types.ModuleType("rasp_program")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    _guarded(path, lambda: exec(compile(source, str(path), "exec"), module.__dict__), "the file")
    return vars(module)


def _guarded(path: Path, call, what: str):
    """Call what somebody else wrote; whatever it raises becomes one line."""
    try:
        return call()
    except (Exception, SystemExit) as error:
        line = f"line {error.lineno}" if isinstance(error, SyntaxError) else _line(error, path)
        name = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise InputError(f"{path}{line and f', {line}'}: {what} fails with {name}{error}; correct it") from None


def _line(error: BaseException | None, path: Path) -> str:
    """Where in the file an error comes from: "line 7", or "" if it does not."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f"line {lines[-1]}" if lines else ""


def _vocabulary(text: str) -> tuple[list, bool]:
    """The tokens, and whether each of them is written with one character."""
    words = _words(text)
    if words is None:
        return list(text), True
    if words and all(re.fullmatch(r"-?\d+", word) for word in words):
        return [int(word) for word in words], all(len(word) == 1 for word in words)
    return words, all(len(word) == 1 for word in words)


def _words(text: str) -> list[str] | None:
    """The words of a text, None where nothing separates any."""
    return [word for word in re.split(r"[,\s]+", text) if word] if re.search(r"[,\s]", text) else None


def _sequence(text: str, vocab: list, characters: bool) -> list:
    words = _words(text)
    if words is None:
        words = list(text) if characters else [text] * bool(text)
    if not words:
        raise InputError(f"--input {text!r} has no tokens; give at least one")
    token_of = {str(token): token for token in vocab}
    return [token_of.get(word, word) for word in words]  # a strange one is refused by name in `encode`


# --- what comes out --------------------------------------------------------------------------------------------------


class Said(NamedTuple):
    """What program and model say of a sequence."""

    sequence: list
    expected: list
    got: list

    @property
    def wrong(self) -> list[int]:
        """The positions where the model differs; where the program has no single value, anything is right."""
        pairs = enumerate(zip(self.expected, self.got, strict=True))
        return [at for at, (a, b) in pairs if a is not rasp.AMBIGUOUS and (b is rasp.AMBIGUOUS or a != b)]


def _compile(args: argparse.Namespace, program: rasp.SOp, vocab: list, sequences: list[list]) -> bool:
    """Print it all, save; is the model right wherever it was compared?"""
    begin = time.perf_counter()
    model = compiler.compile_program(program, vocab, args.length, exactness=args.exactness, sharpness=args.sharpness)
    seconds = time.perf_counter() - begin
    compiler.encode(model.layout, sequences)  # refuses before anything is printed
    cfg = model.layout.config
    _print_table(
        ["program", "blocks", "heads", "head width", "width", "MLP width", "parameters", "compiled in"],
        [model.layout.program, cfg.blocks, cfg.heads, cfg.head_width, cfg.width, cfg.mlp_width,
         f"{transformer.num_params(model.params):,}", f"{seconds:.2f} s"],
    )  # fmt: skip
    sequences = sequences + _random(vocab, args.length, args.check or 0, args.seed)
    expected = [rasp.evaluate(program, sequence) for sequence in sequences]
    said = list(map(Said, sequences, expected, compiler.run(model, sequences)))
    for one in said[: len(args.input)]:
        _show(one)
    if args.check is not None:
        _check(said[len(args.input) :])
    wrong = any(one.wrong for one in said)
    if wrong and args.out is not None:
        print("\nnot saved: the model differs from its program")
    elif args.out is not None:
        _save(args.out, model)
    return not wrong


def _save(path: Path, model: compiler.Compiled) -> None:
    try:
        compiler.save(path, model)
    except Exception as error:
        full = cli.full_disk(error) is not None
        if not full and not isinstance(error, OSError):
            raise
        why = "the disk is full" if full else error.strerror or error
        raise InputError(f"--out {path} cannot be written: {why}; free space or name another folder") from None
    print(f"\nsaved: {path}")


def _show(said: Said) -> None:
    """Program and model side by side, wrong values marked."""
    rows = [
        ["input", *map(str, said.sequence)],
        ["program", *map(_text, said.expected)],
        ["model", *map(_text, said.got)],
    ]
    if said.wrong:
        rows.append(["", *("^" if position in said.wrong else "" for position in range(len(said.sequence)))])
    print()
    _print_table(*rows)


def _check(said: list[Said]) -> None:
    """Say how many differ and show the first."""
    wrong = [one for one in said if one.wrong]
    values = [value for one in said for value in one.expected]
    ambiguous = sum(value is rasp.AMBIGUOUS for value in values) / len(values)
    note = f" ({ambiguous:.0%} of the positions have no single value and are not compared)" if ambiguous else ""
    what = f"{len(said):,} random inputs of 1 to {max(len(one.sequence) for one in said)} tokens{note}"
    if wrong:
        print(f"\nchecked: the model differs from the program on {len(wrong):,} of {what}; the first:")
        _show(wrong[0])
    else:
        print(f"\nchecked: the model says what the program says on {what}")


def _random(vocab: list, length: int, count: int, seed: int) -> list[list]:
    """Sequences of all lengths; each of few or many different tokens, so that large counts come up too."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        some = rng.permutation(len(vocab))[: rng.integers(1, len(vocab) + 1)]
        rows.append([vocab[i] for i in rng.choice(some, length - number % length)])
    return rows


def _text(value: rasp.Value) -> str:
    return "-" if value is None else "?" if value is rasp.AMBIGUOUS else str(value)


def _print_table(*rows: Sequence) -> None:
    """Columns of one width each, the first to the left."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
