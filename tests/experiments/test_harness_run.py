"""The run folder: resume to the same files after any kill, refuse what is not ours, survive a full disk."""

from __future__ import annotations

import csv
import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert6_jax.errors import InputError
from experiments.harness import figures
from experiments.harness.claims import Claim, greater_than
from experiments.harness.run import Run, jsonable, write_file

CONFIG = {"steps": 3, "corpus": "embedded", "sizes": (1, 2), "model": {"width": 8, "depth": 2}}


def tree(folder):
    """Every file of a run that must not change, by its path."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: data for name, data in files.items() if name != ".lock"}


def lines(run):
    return [json.loads(line) for line in (run.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# --- opening -------------------------------------------------------------------------------------------------------


def test_config_json_tells_how_to_repeat_the_run(tmp_path):
    with Run.open(tmp_path / "a" / "b", "apt", CONFIG, command="python -m experiments.apt --steps 3") as run:
        record = json.loads((run.out / "config.json").read_text(encoding="utf-8"))
    assert record["experiment"] == "apt" and record["command"] == "python -m experiments.apt --steps 3"
    assert record["config"] == {"steps": 3, "corpus": "embedded", "sizes": [1, 2], "model": {"width": 8, "depth": 2}}
    versions = record["environment"]["versions"]
    assert versions["jax"] == jax.__version__ and versions["numpy"] == np.__version__
    assert {"bert6_jax", "python", "jaxlib", "flax", "optax", "orbax-checkpoint"} <= set(versions)
    assert record["environment"]["device_count"] == jax.device_count()
    assert record["environment"]["device_kind"] == jax.devices()[0].device_kind


def test_the_same_settings_go_on_and_leave_config_json_alone(tmp_path):
    Run.open(tmp_path, "apt", CONFIG).close()
    before = tree(tmp_path)
    Run.open(tmp_path, "apt", CONFIG, command="typed differently").close()
    assert tree(tmp_path) == before


def test_another_environment_is_noted(tmp_path, capsys):
    Run.open(tmp_path, "apt", CONFIG).close()
    record = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    record["environment"]["versions"]["jax"] = "0.4.1"
    (tmp_path / "config.json").write_text(json.dumps(record), encoding="utf-8")
    for _ in range(2):
        with Run.open(tmp_path, "apt", CONFIG) as run:
            assert run.record["environment"]["versions"]["jax"] == "0.4.1"
            assert [there["versions"]["jax"] for there in run.record["resumed_in"]] == [jax.__version__]
    assert capsys.readouterr().err.count("(versions.jax)") == 1


@pytest.mark.parametrize(
    ("experiment", "config", "words"),
    [
        ("layerwise", CONFIG, ["'apt'", "'layerwise'"]),
        ("apt", CONFIG | {"steps": 4}, ["steps is 3 there and 4 here"]),
        ("apt", CONFIG | {"model": {"width": 16, "depth": 2}}, ["model.width is 8 there and 16 here"]),
        ("apt", CONFIG | {"new": "a\nb"}, ['new is absent there and "a\\nb" here']),
        ("apt", {"steps": 3, "corpus": "embedded", "sizes": [1, 2]}, ["model.width is 8 there and absent here"]),
        ("apt", {key: None for key in "abcdef"}, ["(and "]),
    ],
)
def test_other_experiment_or_settings_are_refused(tmp_path, experiment, config, words):
    Run.open(tmp_path, "apt", CONFIG).close()
    before = tree(tmp_path)
    with pytest.raises(InputError) as caught:
        Run.open(tmp_path, experiment, config)
    message = str(caught.value)
    assert all(word in message for word in words) and "--out" in message and "\n" not in message
    assert tree(tmp_path) == before


@pytest.mark.parametrize("content", ["", "{", "[]", '"apt"', '{"experiment": "apt"}', '{"experiment": 1, "config": 2}'])
def test_damaged_config_json_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="config.json is damaged"):
        Run.open(tmp_path, "apt", CONFIG)
    assert tree(tmp_path) == {"config.json": content.encode()}


def test_foreign_folders_and_files_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="thesis.tex.*--out"):
        Run.open(tmp_path, "apt", CONFIG)
    with pytest.raises(InputError, match="is a file.*--out"):
        Run.open(tmp_path / "thesis.tex", "apt", CONFIG)
    for impossible in (tmp_path / "thesis.tex" / "run", tmp_path / ("x" * 300), Path("/proc/run")):
        with pytest.raises(InputError, match="cannot be used: .*--out"):
            Run.open(impossible, "apt", CONFIG)
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.tex"]


def test_a_locked_folder_names_its_owner_until_that_dies(tmp_path):
    Run.open(tmp_path, "apt", CONFIG).close()
    script = (
        "import fcntl, os, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); f.truncate(0);"
        "f.write(f'process {os.getpid()} on host'); f.flush(); print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-S", "-c", script, tmp_path / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        before = tree(tmp_path)
        with pytest.raises(InputError, match=f"in use by another process .process {other.pid} on host.*--out"):
            Run.open(tmp_path, "apt", CONFIG)
        assert tree(tmp_path) == before
        other.kill()
    Run.open(tmp_path, "apt", CONFIG).close()


# --- stages --------------------------------------------------------------------------------------------------------


def test_a_finished_stage_is_loaded_with_the_same_types(tmp_path):
    values = {
        "file": np.arange(6, dtype=np.int8).reshape(2, 3),  # a name that np.savez would stumble over
        "a/b": jnp.ones((2,), jnp.float32),
        "allow_pickle": True,
        "loss": 0.1,
        "nan": float("nan"),
        "word": "[MASK]",
        "words": np.array(["a", "\ud800"]),
        "empty": np.zeros((0, 3)),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    }
    with Run.open(tmp_path, "apt", CONFIG) as run:
        first = run.stage("a", lambda: values)
        second = run.stage("a", lambda: pytest.fail("computed again"))
        assert run.stage("none", dict) == run.stage("none", lambda: pytest.fail("computed again")) == {}
    assert set(first) == set(second) == set(values)
    for key in values:
        assert type(first[key]) is type(second[key])
        np.testing.assert_array_equal(first[key], second[key], strict=True)
        assert np.asarray(second[key]).dtype == np.asarray(values[key]).dtype
    first["file"][0, 0] = 7  # the caller owns what it got


@pytest.mark.parametrize("value", [object(), [1, "a", None], jnp.ones(2, jnp.bfloat16), jax.random.key(0)])
def test_what_cannot_be_kept_is_refused(tmp_path, value):
    with Run.open(tmp_path, "apt", CONFIG) as run, pytest.raises(TypeError):
        run.stage("a", lambda: {"x": value})
    assert not (tmp_path / "stages").exists()


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".hidden", "a b"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with Run.open(tmp_path, "apt", CONFIG) as run:
        for make in (lambda: run.stage(name, dict), lambda: run.table(name, {"a": []})):
            with pytest.raises(ValueError, match="cannot name a file"):
                make()


def test_damage_anywhere_in_a_stage_file_is_noticed(tmp_path, capsys):
    """Every cut and many flipped bits: the stage comes back as it was, loaded or computed, never wrong."""
    array = np.arange(50, dtype=np.float32)
    with Run.open(tmp_path, "apt", CONFIG, quiet=True) as run:
        run.stage("a", lambda: {"x": array, "n": 3})
        path = tmp_path / "stages" / "a.npz"
        whole = path.read_bytes()
        rng = np.random.Generator(np.random.Philox(key=1))
        flips = [(at, 1 << int(bit)) for at, bit in enumerate(rng.integers(0, 8, len(whole)))]
        damaged = [whole[:end] for end in range(0, len(whole), 7)]
        damaged += [whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :] for at, bit in flips]
        computed = 0
        for data in damaged:
            path.write_bytes(data)
            loaded = run._load(path)
            computed += loaded is None
            if loaded is not None:
                assert set(loaded) == {"x", "n"}
                np.testing.assert_array_equal(loaded["x"], array)
                assert loaded["n"] == 3
        assert computed > 0.5 * len(damaged)
        path.write_bytes(whole[:-1])
        assert run.stage("a", lambda: {"x": array, "n": 3})["n"] == 3
        assert path.read_bytes() == whole
    assert "a.npz is damaged" in capsys.readouterr().err


# --- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_lines_are_json_without_nan(tmp_path):
    with Run.open(tmp_path, "apt", CONFIG) as run:
        run.log("train", 1, loss=np.float32(0.5), bad=float("nan"), worse=jnp.inf, hits=jnp.arange(2), word="\ud800⟨")
        text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
        assert "NaN" not in text and "Infinity" not in text
        expected = {"loss": 0.5, "bad": None, "worse": None, "hits": [0, 1], "word": "\ud800⟨"}
        assert lines(run) == [{"stage": "train", "step": 1} | expected]
        with pytest.raises(TypeError, match="object"):
            run.log("train", 2, loss=object())


def test_a_stage_that_starts_over_repeats_nothing_and_others_stay(tmp_path):
    with Run.open(tmp_path, "apt", CONFIG) as run:
        run.log("data", 0, n=1)
        for step in (10, 20, 30):
            run.log("train", step, loss=step)
            run.log("eval", step, loss=step)
        with pytest.raises(ValueError, match="logged step 30 and now 20"):
            run.log("train", 20)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"stage": "train", "st')
    with Run.open(tmp_path, "apt", CONFIG) as run:
        run.log("train", 20, loss=21)  # goes on from a checkpoint at 10
        seen = [(line["stage"], line["step"], line.get("loss")) for line in lines(run)]
    assert seen == [("data", 0, None), ("train", 10, 10), *[("eval", s, s) for s in (10, 20, 30)], ("train", 20, 21)]


@settings(deadline=None, max_examples=50)  # a shared disk is slow at times
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 5)), max_size=12), st.integers(-1, 6), st.binary())
def test_rewind_keeps_exactly_the_earlier_lines(tmp_path_factory, entries, step, rest):
    folder = tmp_path_factory.mktemp("run")
    whole = [json.dumps({"stage": stage, "step": at}).encode() + b"\n" for stage, at in entries]
    with Run.open(folder, "apt", CONFIG) as run:
        rest = rest.replace(b"\n", b"").replace(b"\r", b"")
        (folder / "metrics.jsonl").write_bytes(b"".join(whole) + rest)
        run.rewind("a", step)
        kept = [line for line, (stage, at) in zip(whole, entries, strict=True) if stage == "b" or at <= step]
        assert (folder / "metrics.jsonl").read_bytes() == b"".join(kept)


# --- tables, figures, claims ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)  # a shared disk is slow at times
@given(st.lists(st.tuples(st.floats(width=64), st.floats(width=32), st.integers(), st.text()), max_size=5))
def test_tables_bring_back_every_value(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("run")
    columns = ("double", "single", "count", "text")
    data = {name: [row[at] for row in rows] for at, name in enumerate(columns)}
    data["single"] = np.array(data["single"], np.float32)
    with Run.open(folder, "apt", CONFIG) as run:
        run.table("t", data)
        assert run.tables["t"].rows == len(rows)
    with (folder / "tables" / "t.csv").open(encoding="utf-8", newline="") as file:
        header, *found = csv.reader(file)
    assert tuple(header) == columns
    for row, (double, single, count, text) in zip(found, rows, strict=True):
        np.testing.assert_array_equal([float(row[0]), np.float32(row[1])], [double, np.float32(single)])
        assert int(row[2]) == count
        assert row[3] == text.encode(errors="backslashreplace").decode()


def test_tables_of_rows(tmp_path):
    with Run.open(tmp_path, "apt", CONFIG) as run:
        run.table("t", [{"a": np.float64(0.1), "b": None}, {"a": jnp.float32(0.1), "b": True}])
        assert (tmp_path / "tables" / "t.csv").read_bytes() == b"a,b\n0.1,\n0.1,True\n"
        with pytest.raises(ValueError, match="row 1 has the keys"):
            run.table("t", [{"a": 1}, {"b": 1}])
        with pytest.raises(ValueError, match="no rows"):
            run.table("t", [])
        with pytest.raises(ValueError):
            run.table("t", {"a": [1], "b": [1, 2]})


def test_figures_are_pngs_and_the_same_drawing_is_the_same_file(tmp_path):
    def draw():
        fig, ax = figures.new()
        figures.heatmap(ax, [[1, np.nan], [0, 2]], rows=["$x_", "a$b$c"], cols=["東", "\x00\n"], label="R")
        return fig

    with Run.open(tmp_path, "apt", CONFIG) as run:
        run.figure("a", draw(), alt="a matrix")
        run.figure("b", draw(), alt="a matrix")
    a, b = ((tmp_path / "figures" / f"{name}.png").read_bytes() for name in "ab")
    assert a == b and a.startswith(b"\x89PNG\r\n\x1a\n")


def test_claims_json_is_a_list(tmp_path):
    claim = Claim("id", "paper", "⟨APT⟩ rises", float("nan"), *greater_than([np.float32(1.5)], 0))
    with Run.open(tmp_path, "apt", CONFIG) as run:
        run.write_claims([claim])
        with pytest.raises(ValueError, match="repeat"):
            run.write_claims([claim, claim])
    (entry,) = json.loads((tmp_path / "claims.json").read_text(encoding="utf-8"))
    keys = ["id", "paper", "statement", "expected", "measured", "interval", "seeds", "verdict", "rule"]
    assert list(entry) == keys
    assert entry["expected"] is None and entry["measured"] == 1.5 and entry["verdict"] == "supported"


def test_jsonable_refuses_what_json_cannot_hold():
    assert jsonable({"a": (1, np.float64("nan"), jnp.int32(3), [None, True])}) == {"a": [1, None, 3, [None, True]]}
    with pytest.raises(TypeError, match="set"):
        jsonable({"a": {1}})


# --- kills and full disks ------------------------------------------------------------------------------------------

# A process that forks: each child makes the same run in its own folder and kills itself in the middle of one file
# operation; another child goes on. It prints what differs from a run that was never killed.
KILLS = '''
import json, os, signal, sys
from pathlib import Path
import numpy as np
from experiments.harness import report
from experiments.harness.claims import Claim, greater_than
from experiments.harness.run import Run, environment, write_file

environment(), greater_than([1, 2], 0)  # what is slow at its first call, once for all children
real = {name: getattr(os, name) for name in ("write", "fsync", "replace")}

def arm(death):
    """Die at file operation number `death`; a write gets half of its bytes out."""
    count = 0
    def wrap(name):
        def call(*args):
            nonlocal count
            count += 1
            if count == death:
                if name == "write":
                    real[name](args[0], bytes(args[1])[:len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real[name](*args)
        return call
    for name in real:
        setattr(os, name, wrap(name))

def experiment(out):
    with Run.open(out, "toy", {"steps": 7}, quiet=True) as run:
        def easy():
            for step in range(3):
                run.log("easy", step, value=step / 3)
            return {"x": np.arange(4)}
        def hard():  # with checkpoints, not at every logged step
            path = run.out / "checkpoints" / "state"
            start, total = map(int, path.read_text().split()) if path.exists() else (0, 0)
            run.rewind("hard", start)
            for step in range(start + 1, 8):
                total += step
                run.log("hard", step, total=total)
                if step % 3 == 0:
                    write_file(path, f"{step} {total}".encode())
            return {"total": total}
        x, total = run.stage("easy", easy)["x"], run.stage("hard", hard)["total"]
        run.table("t", {"x": x})
        run.write_claims([Claim("c", "p", "s", None, *greater_than([total, total + 1], 27))])
        report.write(run, "t", "p", [])

def child(death, out):
    pid = os.fork()
    if not pid:
        try:
            arm(death)
            experiment(out)
            os._exit(0)
        except BaseException:
            import traceback; traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def tree(out):
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    started = json.loads(files["config.json"])["started"].encode()
    return {name: data.replace(started, b"") for name, data in files.items()}

base = Path(sys.argv[1])
assert child(0, base / "whole") == 0
whole, deaths, bad = tree(base / "whole"), 0, []
for death in range(1, 1000):
    out = base / str(death)
    code = child(death, out)
    if code == 0:
        break
    deaths += code == -signal.SIGKILL
    if child(0, out) != 0 or tree(out) != whole:
        bad.append(death)
print(json.dumps({"files": sorted(whole), "tried": death - 1, "deaths": deaths, "bad": bad}))
'''


def test_killed_in_any_file_operation_it_ends_with_the_same_files(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "ignore", "-c", KILLS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["bad"] == [] and result["deaths"] == result["tried"] > 30, result
    assert result["files"] == [
        "checkpoints/state",
        "claims.json",
        "config.json",
        "metrics.jsonl",
        "report.html",
        "stages/easy.npz",
        "stages/hard.npz",
        "tables/t.csv",
    ]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch, number):
    path = tmp_path / "a.json"
    write_file(path, b"old")

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError) as caught:
        write_file(path, b"new")
    assert caught.value.errno == number and caught.value.filename == str(path)
    assert tree(tmp_path) == {"a.json": b"old"}


def test_the_same_result_is_the_same_file(tmp_path):
    """So folders of two machines can be compared with `diff -r`."""
    for name in "ab":
        with Run.open(tmp_path / name, "apt", CONFIG) as run:
            run.stage("s", lambda: {"x": np.arange(1000), "y": "text"})
    a, b = ((tmp_path / name / "stages" / "s.npz").read_bytes() for name in "ab")
    assert a == b and len(a) < 8000 + 1000


TWO = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from experiments.harness.run import Run

with Run.open(sys.argv[3], "toy", {}) as run:
    def stage():
        run.log("stage", 1, process=jax.process_index())
        return {"computed_by": jax.process_count()}
    first = run.stage("stage", stage)
    again = run.stage("stage", lambda: 1 / 0)
    run.table("t", {"a": [1]})
    assert first == again == {"computed_by": 2}
"""


def test_two_processes_of_one_run_share_its_folder(tmp_path):
    """Both compute, the first one writes, and both agree on what is finished."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    for _ in range(2):
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", TWO, address, str(process), str(tmp_path / "run")],
                env=environment,
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )
            for process in range(2)
        ]
        errors = [process.communicate(timeout=60)[1].decode() for process in processes]
        assert [process.returncode for process in processes] == [0, 0], errors
    assert sorted(tree(tmp_path / "run")) == ["config.json", "metrics.jsonl", "stages/stage.npz", "tables/t.csv"]
    assert (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").count("\n") == 1


def test_settings_of_later_stages_may_change_and_are_recorded_with_the_claims(tmp_path):
    def opened(**config):
        return Run.open(tmp_path / "run", "apt", config, quiet=True, command=f"c {config}", may_change=["task", "new"])

    def config():
        return json.loads((tmp_path / "run" / "config.json").read_text())["config"]

    with opened(lr=1, task="a") as run:
        run.stage("one", lambda: {"x": 1})
    with opened(lr=1, task="b", new=3) as run:  # a setting that the first version did not have
        assert config() == {"lr": 1, "task": "a"}
        run.write_claims([])
    assert config() == {"lr": 1, "task": "b", "new": 3}
    with pytest.raises(InputError, match="lr is 1 there and 2 here"):
        opened(lr=2, task="b", new=3)
    with opened(lr=1, task="typo", new=3) as run:
        run.forget_if_empty()
    assert config() == {"lr": 1, "task": "b", "new": 3}
    assert (tmp_path / "run" / "stages" / "one.npz").exists()


def test_tables_and_figures_of_earlier_settings_go(tmp_path):
    with Run.open(tmp_path / "run", "apt", {}, quiet=True) as run:
        run.table("old", {"x": [1]})
        run.table("kept", {"x": [1]})
    with Run.open(tmp_path / "run", "apt", {}, quiet=True) as run:
        run.table("kept", {"x": [2]})
        run.drop_stale()
    assert [file.name for file in (tmp_path / "run" / "tables").iterdir()] == ["kept.csv"]


def test_a_stage_has_one_memory_layout_computed_or_loaded(tmp_path):
    def strided():
        return {"x": np.moveaxis(np.random.default_rng(0).random((7, 5, 300), np.float32), 0, 1)}

    sums = []
    for _ in range(2):
        with Run.open(tmp_path / "run", "apt", {}, quiet=True) as run:
            sums.append(run.stage("one", strided)["x"].mean(-1))
    np.testing.assert_array_equal(*sums)
