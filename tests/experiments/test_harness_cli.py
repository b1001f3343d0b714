"""The command line: options from the config, one line for everything bad, exit codes, signals, a full disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from bert6_jax.errors import InputError
from experiments.harness import cli
from experiments.harness.claims import Claim, greater_than


@dataclass(frozen=True)
class Config:
    corpus: str = field(default="embedded", metadata={"help": "where the text is, 100% local", "group": "data"})
    vocab: Path | None = field(default=None, metadata={"help": "vocabulary file", "group": "data"})
    sizes: tuple[int, ...] = field(default=(100, 1000), metadata={"help": "subset sizes", "min": 1})
    thetas: tuple[float, ...] = field(default=(0.1,), metadata={"help": "thresholds", "min": 0, "max": 1})
    head: str = field(default="linear", metadata={"help": "readout", "choices": ("linear", "lens")})
    pack: bool = field(default=False, metadata={"help": "pack rows"})
    batch_size: int = field(default=8, metadata={"help": "rows", "min": 1, "max": 4096})
    lr: float = field(default=5e-5, metadata={"help": "learning rate"})
    limit: int | None = field(default=None, metadata={"help": "documents at most"})


PRESETS = {"demo": Config(), "small": Config(batch_size=32, sizes=(5,)), "paper": Config(batch_size=32, pack=True)}


def parse(*argv):
    return cli.parse("toy", Config, PRESETS, "What it does, 100% of it.", ["python -m experiments.toy --lr 1"], argv)


def main(run_fn, *argv):
    argv = ("--no-compilation-cache", *map(str, argv))
    return cli.main("toy", Config, PRESETS, run_fn, "What it does.", argv=argv)


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err
    return err.strip()


# --- options -------------------------------------------------------------------------------------------------------


def test_the_first_preset_is_the_default_and_options_override_it():
    assert parse() == (PRESETS["demo"], "demo", Path("runs/toy-demo"), False, True)
    assert parse("--preset", "small", "--quiet").config == PRESETS["small"]
    assert parse("--preset=paper").out == Path("runs/toy-paper")
    given = parse("--preset", "paper", "--batch-size", "3", "--out", "x", "--no-compilation-cache")
    assert given == (replace(PRESETS["paper"], batch_size=3), "paper", Path("x"), False, False)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("corpus", "tfds:wiki40b/en", "tfds:wiki40b/en"),
        ("corpus", "none", "none"),  # a text that may not be None stays text
        ("vocab", "a/vocab.txt", Path("a/vocab.txt")),
        ("vocab", "none", None),
        ("sizes", "5", (5,)),
        ("sizes", "1_000, 20,3,", (1000, 20, 3)),
        ("sizes", "", ()),
        ("thetas", "0,0.5,1e-1", (0.0, 0.5, 0.1)),
        ("head", "lens", "lens"),
        ("lr", "-0.001", -1e-3),
        ("limit", "7", 7),
        ("limit", "None", None),
    ],
)
def test_values(name, text, value):
    assert getattr(parse(f"--{name}", text).config, name) == value
    assert parse(f"--{name}={text}").config == replace(PRESETS["demo"], **{name: value})


def test_switches():
    assert parse("--pack").config.pack and not parse("--preset", "paper", "--no-pack").config.pack


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batchsize", "3"], ["unknown option '--batchsize'", "did you mean --batch-size?"]),
        (["--frobnicate=3"], ["unknown option '--frobnicate'", "--help"]),
        (["--sizes", "1", "2"], ["unknown argument '2'"]),
        (["--batch", "3"], ["unknown option '--batch'"]),  # no guessing from beginnings
        (["--batch-size", "three"], ["--batch-size", "'three' is not a whole number"]),
        (["--batch-size", "3.5"], ["'3.5' is not a whole number"]),
        (["--batch-size", "0"], ["0 is too small, the least is 1"]),
        (["--batch-size", "5000"], ["5000 is too large, the most is 4096"]),
        (["--thetas", "0.1,nan"], ["nan is too small"]),
        (["--thetas", "0.1,x"], ["'x' is not a number"]),
        (["--head", "mlp"], ["'mlp' is none of linear, lens"]),
        (["--vocab", ""], ["the path is empty"]),
        (["--preset", "huge"], ["huge", "demo"]),
        (["--lr"], ["--lr", "expected one argument"]),
        (["--corpus", "a\nb", "--x\ny"], ["unknown option"]),
    ],
)
def test_bad_options_are_one_line_with_a_remedy(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(pytest.fail, *argv) == 2
    line = one_line(capsys)
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    options = [f"--{item.name.replace('_', '-')}" for item in fields(Config)]
    for word in [
        *options,
        "--preset",
        "--out",
        "100% of it",
        "100% local (embedded)",
        "python -m experiments.toy --lr 1",
    ]:
        assert word in text
    for default in ["(demo: 8, small: 32, paper: 32)", "(demo: 100,1000, small: 5, paper: 100,1000)", "(none)"]:
        assert default in text
    assert "(demo: off, small: off, paper: on)" in text and "linear|lens" in text


def test_types_that_no_option_can_have_are_refused():
    @dataclass(frozen=True)
    class Bad:
        x: dict = field(default_factory=dict)

    with pytest.raises(TypeError, match="an option cannot have the type"):
        cli.parse("toy", Bad, {"demo": Bad()}, "", (), ["--help"])


# --- exit codes ----------------------------------------------------------------------------------------------------


def test_a_run_from_the_command_line_can_be_repeated_from_its_record(tmp_path, capsys):
    def run_fn(run, config):
        assert config == replace(PRESETS["small"], vocab=Path("v.txt"))
        run.write_claims([Claim("a", "p", "s", None, *greater_than([1.0], 0))])

    argv = ["--out", tmp_path / "run", "--preset", "small", "--vocab", "v.txt"]
    assert main(run_fn, *argv) == 0
    assert "1 supported, 0 not supported, 0 not tested" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert record["config"] == {
        "corpus": "embedded",
        "vocab": "v.txt",
        "sizes": [5],
        "thetas": [0.1],
        "head": "linear",
        "pack": False,
        "batch_size": 32,
        "lr": 5e-5,
        "limit": None,
    }
    assert record["command"].startswith("python -m experiments.toy --no-compilation-cache --out ")
    assert main(run_fn, *argv, "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert main(pytest.fail, *argv, "--lr", "1") == 2
    assert "lr is 5e-05 there and 1.0 here" in one_line(capsys)


def test_input_errors_of_the_experiment(tmp_path, capsys):
    def run_fn(run, config):
        raise InputError("corpus.jsonl, line 3:\nno field 'text'; add it")

    assert main(run_fn, "--out", tmp_path) == 2
    assert one_line(capsys) == "error: corpus.jsonl, line 3: no field 'text'; add it"


def test_bugs_keep_their_traceback(tmp_path):
    for error in (ValueError("bug"), FileNotFoundError(2, "No such file", "x"), OSError("odd")):

        def run_fn(run, config, error=error):
            raise error

        with pytest.raises(type(error), match=re.escape(str(error))):
            main(run_fn, "--out", tmp_path)


@pytest.mark.parametrize(("signum", "code", "word"), [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")])
def test_signals_say_that_the_same_command_goes_on(tmp_path, capsys, signum, code, word):
    before = signal.getsignal(signal.SIGTERM)
    argv = ["--out", tmp_path / "run", "--quiet"]

    def run_fn(run, config):
        run.stage("first", lambda: {"x": 1})
        if signum == "SIGINT":  # a shell starts its background jobs with SIGINT ignored; this is about Ctrl-C
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.raise_signal(getattr(signal, signum))
        pytest.fail("the signal was lost")

    assert main(run_fn, *argv) == code
    command = f"python -m experiments.toy --no-compilation-cache --out {tmp_path / 'run'} --quiet"
    assert one_line(capsys) == f"{word}: the same command goes on from here: {command}"
    assert signal.getsignal(signal.SIGTERM) is before
    assert main(lambda run, config: run.stage("first", pytest.fail), *argv) == 0  # the folder is free, the stage kept


def test_a_place_without_permission(tmp_path, capsys):
    def run_fn(run, config):
        raise PermissionError(13, "Permission denied", "/somewhere/file")

    assert main(run_fn, "--out", tmp_path) == 2
    assert one_line(capsys) == "error: /somewhere/file: Permission denied; use a path that you may read and write"


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "/data/stages/a.npz"),
        OSError(122, "Disk quota exceeded", "/data/stages/a.npz"),
        ValueError("RESOURCE_EXHAUSTED: \"/data/stages/a.npz\": No space left on device [os_error_code='28']"),
    ],
)
def test_a_full_disk(tmp_path, capsys, error):
    def run_fn(run, config):
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("saving failed") from cause

    assert main(run_fn, "--out", tmp_path, "--quiet") == 2
    line = one_line(capsys)
    where = "/data/stages/a.npz" if isinstance(error, OSError) else f"a file in {tmp_path}"
    assert line == (
        f"error: disk full while writing {where}; free space and run the same command again, finished stages are kept"
    )


# A stage, and a checkpoint by Orbax, that do not fit on a disk of 1 MB; then the disk grows.
FULL = """
import logging, sys
from dataclasses import dataclass
import numpy as np
from experiments.harness import cli

@dataclass(frozen=True)
class Config:
    big: int = 400_000

def run_fn(run, config):
    run.stage("small", lambda: {"x": np.arange(10)})
    noise = np.random.default_rng(0).random(config.big)
    if sys.argv[1] == "stage":
        run.stage("large", lambda: {"x": noise})
    else:
        from orbax.checkpoint import v1 as ocp
        ocp.save(run.out / "checkpoints" / "a", {"x": noise}, overwrite=True)
    run.log("end", 0, fine=True)

argv = ["--out", sys.argv[2], "--no-compilation-cache"]
sys.exit(cli.main("toy", Config, {"demo": Config()}, run_fn, "", argv=argv))
"""


@pytest.mark.parametrize("what", ["stage", "checkpoint"])
def test_a_disk_that_is_really_full(tmp_path, what):
    private = ["unshare", "--map-root-user", "--mount"]
    probe = [*private, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("needs `unshare` and the right to mount a small tmpfs")
    script = tmp_path.with_suffix(".py")
    script.write_text(FULL, encoding="utf-8")
    run = f"{sys.executable} -W ignore {script} {what} {tmp_path}/run"
    shell = (
        f"set -e; mount -t tmpfs -o size=1m tmpfs {tmp_path}; cd {tmp_path}; code=0; {run} || code=$?; "
        f"test $code = 2; test -f run/stages/small.npz; echo ---- >&2; "
        f"mount -o remount,size=64m {tmp_path}; {run}; test -f run/metrics.jsonl; ls -A run/stages"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*private, "sh", "-c", shell], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = done.stderr.split("----\n")
    where = f"{tmp_path}/run/stages/large.npz" if what == "stage" else f"a file in {tmp_path}/run"
    stage, error = first.splitlines()
    assert stage.startswith("[toy] stage small: done")
    assert error.startswith(f"error: disk full while writing {where}; free space and run the same command again")
    assert second.startswith("[toy] stage small: finished before")
    assert done.stdout.split() == (["large.npz", "small.npz"] if what == "stage" else ["small.npz"])


# --- compilation cache ---------------------------------------------------------------------------------------------


@pytest.fixture
def cache_dir_setting():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: jax.config.jax_compilation_cache_dir
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_compilation_cache_lies_beside_the_data(tmp_path, monkeypatch, cache_dir_setting):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("BERT6_JAX_CACHE", str(tmp_path / "cache"))
    cli.prepare_jax(False)
    assert cache_dir_setting() is None and not (tmp_path / "cache").exists()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    cli.prepare_jax(True)
    assert cache_dir_setting() is None
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    cli.prepare_jax(True)
    assert cache_dir_setting() == str(tmp_path / "cache" / "xla") and (tmp_path / "cache" / "xla").is_dir()


def test_every_program_is_kept_and_a_second_start_compiles_none(tmp_path):
    """Also those that compile in a blink: a start has tens of them."""
    script = (
        "import jax, jax.numpy as jnp\n"
        "from experiments.harness import cli\n"
        "cli.prepare_jax(True)\n"
        "print(jax.jit(lambda x: x + 1)(jnp.arange(3)).tolist())\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {
        "BERT6_JAX_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu",
    }  # fmt: skip

    def begin():
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=120)
        assert done.stdout == "[1, 2, 3]\n"
        return sorted(path.name for path in (tmp_path / "xla").iterdir())

    first = begin()
    assert len([name for name in first if name.startswith("jit__lambda")]) == 1
    assert begin() == first


def test_a_cache_that_cannot_be_made_costs_nothing(tmp_path, monkeypatch, cache_dir_setting):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("BERT6_JAX_CACHE", str(tmp_path / "file"))
    cli.prepare_jax(True)
    assert cache_dir_setting() is None


def test_numbers_of_a_run_reach_the_experiment_as_they_were_typed(tmp_path):
    seen = []
    assert main(lambda run, config: seen.append(config), "--out", tmp_path, "--quiet", "--lr", "0.1") == 0
    assert seen[0].lr == 0.1 and np.float64(seen[0].lr) == 0.1
