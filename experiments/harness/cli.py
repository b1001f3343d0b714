"""The command line of an experiment: options out of its config dataclass, and one clear line for everything bad.

Every field of the config becomes an option: its type hint says how to read it (int, float, str, bool, Path, tuples of
them, `| None`), its metadata how to explain it: `help`, and if wanted `choices`, `min`, `max`, `group`; `may_change`
marks settings of later stages, which may differ when a run folder is used again. `option` makes such a field.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import logging
import os
import shlex
import signal
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bert6_jax.errors import InputError
from experiments.harness.claims import VERDICTS
from experiments.harness.run import Run


class Arguments(NamedTuple):
    """What a command line asked for."""

    config: Any  # an instance of the config dataclass
    preset: str
    out: Path
    quiet: bool
    compilation_cache: bool


def option(default, text: str, group: str, **more):
    """A field of a config dataclass with its help text and group."""
    return dataclasses.field(default=default, metadata={"help": text, "group": group} | more)


def no_value_twice(config: Any, names: Sequence[str]) -> None:
    """`InputError` if one of these tuple fields of a config holds a value twice."""
    for name in names:
        given = getattr(config, name)
        if len(set(given)) < len(given):
            raise InputError(f"--{name.replace('_', '-')} {','.join(map(str, given))} names a value twice; drop one")


class Terminated(KeyboardInterrupt):
    """SIGTERM: the batch system wants the machine back."""


def main(
    experiment: str,
    config_class: type,
    presets: Mapping[str, Any],
    run_fn: Callable[[Run, Any], None],
    description: str,
    examples: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> int:
    """Parse, open the run folder, call `run_fn(run, config)`, and return the exit code.

    0: done. 2: bad input or a full disk, with one line on stderr. 130 and 143: interrupted or terminated; the same
    command goes on. A programming error keeps its traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = shlex.join(["python", "-m", *f"experiments.{experiment}".split(), *argv])
    run = None
    logging.getLogger("absl").addFilter(_no_full_disk)  # Orbax logs the traceback of what we say in one line
    try:
        with _sigterm_raises():
            arguments = parse(experiment, config_class, presets, description, examples, argv)
            prepare_jax(arguments.compilation_cache)
            with Run.open(
                arguments.out,
                experiment,
                dataclasses.asdict(arguments.config),
                command=command,
                quiet=arguments.quiet,
                may_change=[f.name for f in dataclasses.fields(config_class) if f.metadata.get("may_change")],
            ) as run:
                run_fn(run, arguments.config)
                counts = [f"{sum(claim.verdict == verdict for claim in run.claims)} {verdict}" for verdict in VERDICTS]
                run.say(f"claims: {', '.join(counts)}; {run.out / 'report.html'}")
        return 0
    except InputError as error:
        if run is not None:
            run.forget_if_empty()  # so that the corrected command may use the same folder
        return fail(str(error))
    except KeyboardInterrupt as error:
        code = 143 if isinstance(error, Terminated) else 130
        word = "terminated" if code == 143 else "interrupted"
        return fail(f"the same command goes on from here: {command}" if run else "nothing was started", code, word)
    except Exception as error:
        full = full_disk(error)
        if full is not None:
            where = full or (f"a file in {run.out}" if run else "a file")
            return fail(
                f"disk full while writing {where}; free space and run the same command again, finished stages are kept"
            )
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
            return fail(f"{error.filename}: {error.strerror}; use a path that you may read and write")
        raise
    finally:
        logging.getLogger("absl").removeFilter(_no_full_disk)


def parse(
    experiment: str,
    config_class: type,
    presets: Mapping[str, Any],
    description: str,
    examples: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> Arguments:
    """Read the command line; the first preset is the default one. `InputError` says what to change."""
    parser = Parser(
        prog=f"python -m experiments.{experiment}",
        usage="%(prog)s [--preset NAME] [--out DIR] [options]",
        description=description,
        epilog="\n".join([_EPILOG, *(f"  {line}" for line in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    first = next(iter(presets))
    common = parser.add_argument_group("run", "defaults stand in parentheses, by preset where they differ")
    common.add_argument("--preset", choices=list(presets), default=first, help=f"settings to start from ({first})")
    common.add_argument(
        "--out",
        type=reader(Path),
        metavar="DIR",
        help=f"folder of this run; an unfinished run in it goes on (runs/{experiment.replace(' ', '-')}-PRESET)",
    )
    common.add_argument("--quiet", action="store_true", default=False, help="no progress, only warnings and errors")
    common.add_argument(
        "--compilation-cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep compiled programs in $BERT6_JAX_CACHE/xla, ~/.cache/bert6-jax/xla if unset, for faster starts",
    )
    common.add_argument("-h", "--help", action="help", help="show this help and exit")
    groups = {}
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        group = field.metadata.get("group", "settings")
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        _add_option(groups[group], field, hints[field.name], presets)
    given, extra = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if extra:
        word = extra[0].split("=")[0]
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(word, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"{parser.prog} --help lists the options"
        raise InputError(f"unknown {'option' if word.startswith('-') else 'argument'} {word!r}; {hint}")
    values = vars(given)
    preset, quiet, cache = values.pop("preset"), values.pop("quiet"), values.pop("compilation_cache")
    out = values.pop("out", Path("runs") / f"{experiment.replace(' ', '-')}-{preset}")
    return Arguments(dataclasses.replace(presets[preset], **values), preset, out, quiet, cache)


_EPILOG = """\
DIR gets config.json, metrics.jsonl, tables/, figures/, claims.json and report.html. Start a command again after it
was killed and it goes on; what is finished is skipped. Other settings want another --out.

examples:"""


class Parser(argparse.ArgumentParser):
    """Raises `InputError` where argparse would print its usage and exit."""

    def error(self, message: str):
        raise InputError(f"{message}; {self.prog} --help explains the options")


def _add_option(group, field: dataclasses.Field, hint, presets: Mapping[str, Any]) -> None:
    name = "--" + field.name.replace("_", "-")
    values = {preset: getattr(config, field.name) for preset, config in presets.items()}
    shown = {preset: _show(value) for preset, value in values.items()}
    same = len(set(shown.values())) == 1
    default = next(iter(shown.values())) if same else ", ".join(f"{key}: {value}" for key, value in shown.items())
    text = f"{field.metadata.get('help', '')} ({default})".strip().replace("%", "%%")
    hint, optional = _optional(hint)
    if hint is bool:
        group.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        return
    choices = field.metadata.get("choices")
    read = reader(hint, optional, choices, field.metadata.get("min"), field.metadata.get("max"))
    group.add_argument(name, type=read, help=text, metavar=_metavar(hint, choices))


def _optional(hint) -> tuple[Any, bool]:
    """`X | None` -> (X, True)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not types.NoneType]
        if len(inner) == 1:
            return inner[0], True
        raise TypeError(f"an option cannot have the type {hint}")
    return hint, False


_WORDS = {int: "a whole number", float: "a number", str: "text", Path: "a path"}


def reader(hint, optional: bool = False, choices=None, low=None, high=None) -> Callable[[str], Any]:
    """A function from the text of an option to its value."""
    many = typing.get_origin(hint) is tuple
    kind = typing.get_args(hint)[0] if many else hint
    if kind not in _WORDS:
        raise TypeError(f"an option cannot have the type {hint}")

    def one(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {_WORDS[kind]}") from None
        if kind is Path and not text:
            raise argparse.ArgumentTypeError("the path is empty")
        if choices is not None and value not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(map(str, choices))}")
        if low is not None and not value >= low:
            raise argparse.ArgumentTypeError(f"{text} is too small, the least is {low}")
        if high is not None and not value <= high:
            raise argparse.ArgumentTypeError(f"{text} is too large, the most is {high}")
        return value

    def read(text: str):
        if optional and text.lower() == "none":
            return None
        return tuple(one(part.strip()) for part in text.split(",") if part.strip()) if many else one(text)

    return read


def _metavar(hint, choices) -> str:
    many = typing.get_origin(hint) is tuple
    kind = typing.get_args(hint)[0] if many else hint
    word = "|".join(map(str, choices)) if choices else {int: "N", float: "X", str: "TEXT", Path: "PATH"}[kind]
    return f"{word},..." if many else word


def _show(value) -> str:
    """A default as one would type it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "empty"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if value is None else str(value)


def prepare_jax(compilation_cache: bool) -> None:
    """Join a multi-process run if there is one; keep compiled programs on disk if wanted."""
    import jax

    from bert6_jax import parallel
    from bert6_jax.data.store import default_cache_dir

    parallel.start()
    if not compilation_cache or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return  # off, or the user has a place for it
    folder = default_cache_dir() / "xla"
    with contextlib.suppress(OSError):  # a home that cannot be written to costs speed, not the run
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            # All of them: a start compiles tens of small programs, and reads each in a fraction of the time.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    def raise_terminated(*_):
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield
        return
    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def fail(message: str, code: int = 2, word: str = "error") -> int:
    """Say what went wrong in one line on stderr; returns the exit code."""
    print(f"{word}: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)
    return code


_FULL = ("No space left on device", "Disk quota exceeded")


def full_disk(error: BaseException | None) -> str | None:
    """The file that a full disk stopped ("" if nobody says), None for any other error.

    TensorStore, under Orbax, raises a ValueError whose text alone tells; it may hide behind another error.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return str(error.filename or "")
        if any(words in str(error) for words in _FULL):
            return ""
        error = error.__cause__ or error.__context__
    return None


def _no_full_disk(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in _FULL)
