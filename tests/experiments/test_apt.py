"""The APT study end to end, at a size of seconds: files, verdicts, resume after kills, bad input."""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bert6_jax import checkpoint
from bert6_jax.data.tokenizer import SPECIALS
from experiments import apt
from experiments.harness import cli

ROOT = Path(__file__).parents[2]
TINY = [
    "--documents", "700", "--subset-sizes", "100,500", "--held-out", "150", "--epochs", "2", "--passes", "1",
    "--readout-epochs", "0.5", "--blocks", "2", "--width", "16", "--heads", "2", "--mlp-width", "32",
    "--dispatch", "2", "--checkpoint-every", "4", "--quiet", "--task", "",
]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """One cache of token stores for the whole file; the compilation cache is that of the test run."""
    monkeypatch.setenv("BERT6_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def main(*options):
    return cli.main("apt", apt.AptConfig, apt.PRESETS, apt.run_apt, "test", argv=[str(option) for option in options])


def numbers(out):
    """Everything that must not depend on how often a run was killed."""
    files = [out / "claims.json", out / "metrics.jsonl", *sorted((out / "tables").glob("*.csv"))]
    texts = {file.name: file.read_text() for file in files}
    texts["metrics.jsonl"] = sorted(texts["metrics.jsonl"].splitlines())
    return texts


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("apt") / "run"
    os.environ["BERT6_JAX_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    assert main(*TINY, "--out", out) == 0
    return out


def rows(out, name):
    with (out / "tables" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_file_of_the_contract_is_there(finished):
    for name in ("config.json", "metrics.jsonl", "claims.json", "report.html"):
        assert (finished / name).stat().st_size > 0, name
    tables = {"apt_by_block", "apt_by_frequency", "apt_by_subset", "clusters", "cluster_stats", "cluster_sizes"}
    assert {file.stem for file in (finished / "tables").iterdir()} == tables
    figures = {file.stem for file in (finished / "figures").iterdir()}
    assert {"apt_by_block", "apt_by_frequency", "apt_by_subset", "cluster_sizes"} <= figures <= figures | {"confusion"}
    blocks = rows(finished, "apt_by_block")
    assert list(blocks[0])[:7] == ["block", "apt_mean", "apt_top50", "apt_min50", "micro_accuracy", "loss", "tokens"]
    assert [(row["block"], row["head"], row["trunk"]) for row in blocks] == [
        *((str(m), "linear", "pre-trained") for m in range(3)),
        ("2", "original", "pre-trained"),
        *((str(m), "linear", "untrained") for m in range(3)),
    ]
    assert [row["subset"] for row in rows(finished, "apt_by_subset")] == ["100", "500"]


def test_claims_are_judged_and_shown(finished):
    claims = json.loads((finished / "claims.json").read_text())
    ids = [claim["id"] for claim in claims]
    assert len(ids) == 12 and {"apt-blocks", "apt-subset", "planted-classes", "bayes-limit", "untrained-trunk"} <= set(
        ids
    )
    for claim in claims:
        assert claim["verdict"] in ("supported", "not supported", "not tested") and claim["rule"]
        assert (claim["measured"] is None) == (claim["verdict"] == "not tested")
    page = (finished / "report.html").read_text()
    assert page.index("Claims") < page.index("Figures") and all(
        claim["statement"].split(":")[0][:20] for claim in claims
    )


def test_the_tables_agree_with_the_counts(finished):
    """<APT> and micro accuracy of the table against plain NumPy on the stored counts."""
    stage = np.load(finished / "stages" / "evaluate-seed0-ws500.npz")
    assert stage["start"][-1] == len(stage["row"])
    totals_V = stage["totals"].sum(0)
    for m, row in enumerate(rows(finished, "apt_by_block")[:4]):
        hits_V = stage["hits"][m].sum(0)
        asked = totals_V > 0
        np.testing.assert_allclose(float(row["apt_mean"]), (hits_V[asked] / totals_V[asked]).mean(), rtol=1e-5)
        np.testing.assert_allclose(float(row["micro_accuracy"]), hits_V.sum() / totals_V.sum(), rtol=1e-5)
        part = slice(stage["start"][m], stage["start"][m + 1])
        assert stage["count"][part].sum() == totals_V.sum()
        diagonal = stage["row"][part] == stage["col"][part]
        np.testing.assert_array_equal(
            np.bincount(stage["row"][part][diagonal], stage["count"][part][diagonal], len(hits_V)), hits_V
        )
        np.testing.assert_array_equal(stage["group_hits"][:, m].sum(0), hits_V)


def test_snapshots_are_log_spaced_and_open_as_models(finished):
    folder = finished / "checkpoints" / "seed0" / "ws500" / "snapshots"
    assert checkpoint.steps(folder) == [0, 1, 2, 4, 8, 16]
    params, cfg, saved = checkpoint.load_transformer(checkpoint.step_path(folder, 16))
    assert cfg.blocks == 2 and saved.tokenizer["vocab_size"] == cfg.vocab_size
    assert checkpoint.load(finished / "checkpoints" / "seed0" / "ws500" / "readout-linear").kind == "readout"


def test_started_again_it_changes_nothing_and_other_settings_are_refused(finished, capsys):
    before = numbers(finished)
    assert main(*TINY, "--out", finished) == 0
    assert numbers(finished) == before
    assert main(*TINY, "--out", finished, "--lr", "0.5") == 2
    message = capsys.readouterr().err.strip()
    assert message.count("\n") == 0 and "lr" in message and str(finished) in message
    assert numbers(finished) == before


def test_killed_at_several_moments_it_ends_with_the_same_numbers(finished, tmp_path):
    """SIGKILL once in pre-training, once in the readouts, SIGTERM once later: the same tables, claims and weights."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.apt", *TINY, "--out", str(out)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}  # as in this process: bits are promised per device count

    def until(sign, signum):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 240
        while process.poll() is None and not sign() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=240)
        return process.returncode, errors

    log = out / "metrics.jsonl"
    assert until(lambda: log.exists() and log.read_bytes().count(b"ws500") > 3, signal.SIGKILL)[0] == -9
    assert until(lambda: b"readout-linear-seed0" in log.read_bytes(), signal.SIGKILL)[0] == -9
    code, errors = until(lambda: b"readout-linear-untrained" in log.read_bytes(), signal.SIGTERM)
    assert code == 143 and "the same command goes on" in errors and errors.strip().count("\n") == 0
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert numbers(out) == numbers(finished)
    last = "checkpoints/seed0/ws500/snapshots/step_00000016"
    trees = [checkpoint.load(folder / last).tree for folder in (out, finished)]
    import jax

    jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.fixture
def corpus(tmp_path):
    """A folder of short articles with a vocabulary beside it."""
    words = ["alpha", "beta", "gamma", "delta", "<", ">", "script", "/"]
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIALS, *words]), encoding="utf-8")
    lines = [json.dumps({"id": i, "text": "alpha beta gamma <script> delta " * (1 + i % 3)}) for i in range(40)]
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def small(corpus, *options):
    return ["--preset", "small", "--corpus", corpus, "--vocab", corpus.parent / "vocab.txt", "--out",
            corpus.parent / "out", "--subset-sizes", "20", "--held-out", "10", "--length", "12", *options]  # fmt: skip


def break_json(corpus):
    with (corpus / "a.jsonl").open("a") as file:
        file.write('{"text": "alpha"\n')
    return small(corpus), ("a.jsonl", "41")


def cut_gzip(corpus):
    whole = gzip.compress(b'{"text": "alpha beta gamma delta"}\n' * 200)
    (corpus / "b.jsonl.gz").write_bytes(whole[:-20])
    return small(corpus), ("b.jsonl.gz",)


def break_utf8(corpus):
    (corpus / "c.txt").write_bytes(b"alpha \xff\xfe beta")
    return small(corpus), ("c.txt",)


def no_mask(corpus):
    vocab = corpus.parent / "vocab.txt"
    vocab.write_text(vocab.read_text().replace("[MASK]\n", ""))
    return small(corpus), ("vocab.txt", "[MASK]")


def too_short(corpus):
    (corpus / "a.jsonl").write_text('{"text": "alpha beta"}\n' * 40)
    return small(corpus), ("text", "3 tokens")


def empty(corpus):
    (corpus / "a.jsonl").write_text("")
    return small(corpus), ("text",)


def too_few(corpus):
    return [*small(corpus), "--subset-sizes", "50"], ("40 documents", "50")


def foreign_folder(corpus):
    (corpus.parent / "out").mkdir()
    (corpus.parent / "out" / "thesis.tex").write_text("precious")
    return small(corpus), ("thesis.tex", "--out")


BAD = {
    "missing path": lambda corpus: (small(corpus / "nowhere")[:4] + ["--out", corpus.parent / "out"], ("nowhere",)),
    "no corpus": lambda corpus: (["--preset", "small", "--out", corpus.parent / "out"], ("--corpus",)),
    "broken json": break_json,
    "cut gzip": cut_gzip,
    "invalid utf-8": break_utf8,
    "no [MASK]": no_mask,
    "short documents": too_short,
    "empty corpus": empty,
    "too few documents": too_few,
    "foreign folder": foreign_folder,
    "heads do not divide": lambda corpus: ([*small(corpus), "--heads", "3"], ("--heads 3",)),
    "empty list": lambda corpus: ([*small(corpus), "--subset-sizes", ""], ("--subset-sizes",)),
    "unknown option": lambda corpus: ([*small(corpus), "--epoch", "3"], ("--epochs",)),
    "bad number": lambda corpus: ([*small(corpus), "--epochs", "many"], ("epochs", "many")),
}


def test_a_refused_command_does_not_occupy_its_folder(corpus, capsys):
    out = corpus.parent / "out"
    assert main(*small(corpus), "--heads", "3", "--quiet") == 2 and not out.exists()
    assert main(*small(corpus), "--subset-sizes", "50", "--quiet") == 2 and not out.exists()


def test_text_that_changed_under_a_run_is_refused(finished, tmp_path, capsys):
    """The stages hold the fingerprints of corpus and vocabulary; another text may not go on with them."""
    import shutil

    from experiments.harness.run import _npz, write_file

    out = tmp_path / "run"
    shutil.copytree(finished, out)
    with np.load(out / "stages" / "corpus.npz") as stage:
        assert set(stage.files) == {"corpus", "vocabulary"}
        changed = {"corpus": np.array("0" * 64), "vocabulary": stage["vocabulary"]}
    write_file(out / "stages" / "corpus.npz", _npz(changed))
    assert main(*TINY, "--out", out) == 2
    message = capsys.readouterr().err.strip()
    assert message.count("\n") == 0 and "corpus is not the one" in message and str(out) in message


@pytest.mark.parametrize("make", BAD.values(), ids=BAD.keys())
def test_bad_input_gets_one_clear_line(corpus, make, capsys):
    options, words = make(corpus)
    before = {file: file.read_bytes() for file in corpus.parent.rglob("*") if file.is_file()}
    assert main(*options, "--quiet") == 2
    message = capsys.readouterr().err.strip()
    assert message.count("\n") == 0 and message.startswith("error: ") and all(word in message for word in words), (
        message
    )
    assert all(file.read_bytes() == content for file, content in before.items())


def test_a_checkpoint_of_another_kind_or_shape_is_refused(finished, tmp_path, capsys):
    """Somebody puts another checkpoint where the run would resume: one line, and it stays where it is."""
    import shutil

    out = tmp_path / "run"
    shutil.copytree(finished, out)
    snapshots = out / "checkpoints" / "seed0" / "ws500" / "snapshots"
    shutil.rmtree(snapshots / "step_00000016")
    shutil.copytree(out / "checkpoints" / "seed0" / "ws500" / "readout-linear", snapshots / "step_00000016")
    (out / "stages" / "evaluate-seed0-ws500.npz").unlink()
    assert main(*TINY, "--out", out) == 2
    message = capsys.readouterr().err.strip()
    assert message.count("\n") == 0 and "step_00000016" in message and "readout" in message
    assert (snapshots / "step_00000016").exists()
