"""The study of snapshots: end to end at a size of seconds, resume, its numbers against plain NumPy, bad input."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import threading
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

import bert6_jax.train
from bert6_jax import checkpoint, transformer
from bert6_jax.data.tokenizer import load_tokenizer, wordpiece
from bert6_jax.errors import InputError
from experiments import evolution as study
from experiments.evolution import EvolutionConfig
from experiments.harness import cli
from experiments.harness.claims import VERDICTS
from experiments.harness.run import Run
from sae_jax import dictionary
from synthetic import language

H, D, F, K, ROWS = 7, 16, 24, 3, 32  # snapshots, width, latents, active ones, held-out rows of the tiny run
STEPS = (0, 1, 2, 4, 8, 16, 24)
TINY = [
    "--documents", "400", "--subset-sizes", "380", "--held-out", "40", "--length", "32", "--blocks", "2",
    "--width", D, "--heads", "2", "--mlp-width", "32", "--epochs", "1", "--batch", "16", "--dispatch", "2",
    "--checkpoint-every", "4", "--latents", F, "--k", K, "--crosscoder-batch", "64", "--crosscoder-steps", "12",
    "--buffer", "1088", "--dead-after", "500", "--read-rows", ROWS, "--probe-tokens", "200", "--pairs", "32",
    "--top-k", "1,2,4", "--draws", "1", "--ig-steps", "2", "--contexts", "2", "--browser-latents", "6", "--quiet",
]  # fmt: skip
FEWER = [
    "--control-warmup", "0", "--crosscoder-seeds", "1", "--no-baselines", "--harvest", "stream", "--steps", "0,4,24",
]  # fmt: skip
HOSTILE = "<img src=x onerror=alert(1)>"
BANKS = ("crosscoder", "dictionaries", "crosscoder-half")
TABLES = {
    "training", "snapshots", "latents", "kinds", "baselines", "controls", "turning_points", "presence", "attribution",
    "task_features", "specificity",
}  # fmt: skip


def main(*options):
    given = [str(option) for option in options]
    return cli.main("evolution", EvolutionConfig, study.PRESETS, study.run_evolution, "about snapshots", argv=given)


def configured(*options) -> EvolutionConfig:
    given = [str(option) for option in (*TINY, *options)]
    return cli.parse("evolution", EvolutionConfig, study.PRESETS, "", argv=given).config


def write_pairs(path: Path, rows) -> Path:
    names = ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("BERT6_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a file of pairs whose name is hostile: rows of the length of the generated induction task."""
    folder = tmp_path_factory.mktemp("world")
    rows = study.generated_pairs(language.make_language(study.LANGUAGE), "induction", 48, 5)
    write_pairs(folder / f"{HOSTILE}.jsonl", [(r.clean, r.patch, r.right, r.wrong) for r in rows])
    return folder


def tiny(world, *options):
    return [*TINY, "--task", f"induction,{world / HOSTILE}.jsonl", *options]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    os.environ["BERT6_JAX_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    out = tmp_path_factory.mktemp("evolution") / "run"
    assert main(*tiny(world), "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A study of BERT, with a task, one arm and no baselines, harvested while training."""
    os.environ["BERT6_JAX_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    out = tmp_path_factory.mktemp("masked") / "run"
    assert main(*TINY, "--objective", "masked", "--task", "agreement", *FEWER, "--out", out) == 0
    return out


def quiet_run(out):
    """All that the stages ask of a run, which writes nothing."""
    keep = lambda *_: None  # noqa: E731
    return types.SimpleNamespace(out=out, quiet=True, primary=False, say=keep, keep_record=keep)


def opened(out, **changes):
    """(run, configuration, base) of a finished run."""
    record = json.loads((out / "config.json").read_text())["config"]
    cfg = EvolutionConfig(**({k: tuple(v) if isinstance(v, list) else v for k, v in record.items()} | changes))
    run = quiet_run(out)
    return run, cfg, study.load_base(run, cfg)


def rows(out, name):
    with (out / "tables" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(out, name, key):
    return np.array([float(row[key]) for row in rows(out, name)])


def stage(out, name):
    return dict(np.load(out / "stages" / f"{name}.npz"))


def numbers(out):
    """Everything that must not depend on how often a run was killed."""
    files = [out / "claims.json", out / "metrics.jsonl", out / "report.html", *sorted((out / "tables").glob("*.csv"))]
    texts = {file.name: file.read_text() for file in files}
    texts["metrics.jsonl"] = sorted(texts["metrics.jsonl"].splitlines())
    texts["report.html"] = re.sub(r"--out \S+?/run\b", "", texts["report.html"])
    return texts


def snapshots_of(out) -> Path:
    return out / "checkpoints" / "seed0" / "ws380" / "snapshots"


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_every_file_of_the_contract_is_there(finished):
    for name in ("config.json", "metrics.jsonl", "claims.json", "report.html"):
        assert (finished / name).stat().st_size > 0, name
    assert {file.stem for file in (finished / "tables").iterdir()} == TABLES
    assert {file.stem for file in (finished / "figures").iterdir()} == {
        "trajectories", "phases", "turning", "complexity", "baselines", "attribution",
    }  # fmt: skip
    claims = json.loads((finished / "claims.json").read_text())
    assert len({claim["id"] for claim in claims}) == len(claims) == 19
    for claim in claims:
        assert claim["verdict"] in VERDICTS and claim["rule"] and claim["statement"]
        assert claim["paper"].startswith(("arXiv 2509.17196", "ours"))
        assert (claim["measured"] is None) == (claim["verdict"] == "not tested")
    stages = {re.sub("^attribution-[0-9a-f]+$", "attribution", file.stem) for file in (finished / "stages").iterdir()}
    assert stages == {"corpus", "along-training", "read", "baselines", "attribution"}
    for name in BANKS:  # finished, and nothing that only training needs is left
        assert (finished / "checkpoints" / name).is_dir()
        assert not (finished / "checkpoints" / f"{name}-state").exists()
    logged = {json.loads(line)["stage"] for line in (finished / "metrics.jsonl").read_text().splitlines()}
    assert {"pretrain-seed0-ws380", "pretrain-seed0-ws380-warmup", *BANKS} <= logged


def test_tables_cover_snapshots_arms_latents_tasks(finished):
    assert tuple(column(finished, "snapshots", "step")) == STEPS
    table = rows(finished, "training")
    assert [(r["arm"], int(r["step"])) for r in table] == [(a, s) for a in ("seed 0", "warm-up 0.3") for s in STEPS]
    assert table[0] | {"arm": ""} == table[H] | {"arm": ""}  # both begin with the same parameters
    assert table[3] | {"arm": ""} != table[H + 3] | {"arm": ""}
    assert [int(r["latent"]) for r in rows(finished, "latents")] == list(range(F))
    assert column(finished, "kinds", "latents").sum() == F
    assert [r["crosscoder"] for r in rows(finished, "controls")] == ["start 1", "warm-up 0.3", "every second snapshot"]
    found = [(r["task"], int(r["step"])) for r in rows(finished, "attribution")]
    assert found == [(task, step) for task in ("induction", HOSTILE) for step in STEPS]
    assert [r["features_of"] for r in rows(finished, "specificity")] == ["induction", HOSTILE]
    held = [int(r["step"]) for r in rows(finished, "baselines") if r["held_out"]]
    assert held == [1, 4, 16]
    for name in ("necessity_4", "random_sufficiency_1", "gap"):
        assert np.isfinite(column(finished, "attribution", name)).all()
    share = np.array([[float(r[f"relative_{step}"]) for step in STEPS] for r in rows(finished, "task_features")])
    np.testing.assert_allclose(share.sum(1), 1.0, rtol=1e-5)


def test_the_report_has_a_browser_and_hostile_names_are_text(finished):
    html = (finished / "report.html").read_text()
    assert "<img src=x" not in html and "&lt;img src=x onerror=alert(1)&gt;" in html
    assert 'type="text/plain"' in html and "step 0" in html and "step 24" in html
    assert html.count("data:image/png;base64,") == 6


def test_started_again_it_does_nothing_twice_and_says_the_same(finished, world, monkeypatch):
    before = numbers(finished)

    def again(*_, **__):
        raise AssertionError("something was computed again")

    monkeypatch.setattr(bert6_jax.train, "fit", again)
    for name in ("along_training", "read_crosscoder", "compare_baselines", "attribute_tasks"):
        monkeypatch.setattr(study, name, again)
    assert main(*tiny(world), "--out", finished) == 0
    assert numbers(finished) == before


def test_settings_of_later_stages_may_change_in_a_folder(finished, world, tmp_path, monkeypatch):
    """Without tasks and with a smaller browser: nothing is trained, what belongs to tasks goes, the rest stays."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    monkeypatch.setattr(bert6_jax.train, "fit", lambda *_, **__: pytest.fail("something was trained"))
    assert main(*TINY, "--task", "", "--browser-latents", "3", "--out", out) == 0
    gone = {"attribution", "task_features", "specificity"}
    assert {file.stem for file in (out / "tables").iterdir()} == TABLES - gone
    for name in TABLES - gone:
        assert (out / "tables" / f"{name}.csv").read_bytes() == (finished / "tables" / f"{name}.csv").read_bytes()
    ours, theirs = (json.loads((folder / "claims.json").read_text()) for folder in (out, finished))
    assert ours == [claim for claim in theirs if not claim["id"].startswith(("few-carry", "complete-"))]


def test_terminated_in_the_middle_of_a_crosscoder_it_ends_with_the_same_numbers(
    finished, world, tmp_path, monkeypatch, capsys
):
    assert threading.current_thread() is threading.main_thread()  # which signals go to
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in BANKS:  # as if it had never come so far
        shutil.rmtree(out / "checkpoints" / name)
    (out / "stages" / "read.npz").unlink()
    log, rewind, fit_bank, started = Run.log, Run.rewind, study.fit_bank, []

    def terminated(self, stage, step, **values):
        log(self, stage, step, **values)
        if stage == "crosscoder" and step == 8:
            signal.raise_signal(signal.SIGTERM)

    def rewound(self, stage, step):
        started.append((stage, step))
        return rewind(self, stage, step)

    monkeypatch.setattr(study, "fit_bank", lambda *args, **more: fit_bank(*args, **more | {"checkpoint_every": 5}))
    monkeypatch.setattr(Run, "log", terminated)
    capsys.readouterr()
    assert main(*tiny(world), "--out", out) == 143
    message = capsys.readouterr().err.strip()
    assert message.startswith("terminated: the same command goes on") and message.count("\n") == 0
    assert checkpoint.steps(out / "checkpoints" / "crosscoder-state")[-1] == 10  # what it was at was kept
    monkeypatch.setattr(Run, "log", log)
    monkeypatch.setattr(Run, "rewind", rewound)
    assert main(*tiny(world), "--out", out) == 0
    assert ("crosscoder", 10) in started and not list((out / "checkpoints").glob("*-state"))
    assert numbers(out) == numbers(finished)
    for name in BANKS:
        trees = [dictionary.load(folder / "checkpoints" / name)[0] for folder in (out, finished)]
        jax.tree.map(np.testing.assert_array_equal, *trees)


# --- its numbers -----------------------------------------------------------------------------------------------------


def test_members_read_the_snapshots_that_they_say(finished):
    """The mean that a crosscoder keeps is that of the snapshots of its arm, in order; no two rows are alike."""
    run, cfg, base = opened(finished)
    assert base.steps == STEPS and [arm.name for arm in base.arms] == ["seed 0", "warm-up 0.3"] and base.depth == 1
    *_, x_NSD = study.harvest(run, cfg, base)
    mean_SD = np.asarray(x_NSD, np.float64).mean(0)
    assert cdist(mean_SD[[3, 4, 5, 6]], mean_SD[[10, 11, 12, 13]]).min() > 1e-3
    own, warm = mean_SD[:H], mean_SD[H:]
    expected = {"crosscoder": [own, own, warm], "dictionaries": own[:, None], "crosscoder-half": [own[[0, 2, 4, 6]]]}
    for name, mean in expected.items():
        tree, _, saved = dictionary.load(finished / "checkpoints" / name)
        np.testing.assert_allclose(tree["norm"]["mean"], np.array(mean), atol=1e-5, err_msg=name)
        assert saved.extra["steps"] == list(STEPS) and len(saved.extra["members"]) == len(mean)


def test_explained_variance_and_rates_are_the_direct_ones(finished):
    """From the files of the run with nothing but the forward pass and the dictionary."""
    _, cfg, base = opened(finished)
    windows = base.corpus.held_out
    at = study.held_out_rows(cfg, windows)
    assert len(at) == ROWS and at[0] == 0 and at[-1] == windows.num_rows - 1
    batch = windows.batch(at)
    ids, segment = batch["ids"], batch["segment"]
    use = (segment > 0) & ~np.isin(ids, base.corpus.tokenizer.special_ids)
    forward = jax.jit(lambda p: transformer.forward(p, ids, base.model, segment_BT=segment)[1]["resid"][1])
    states = []
    for step in STEPS:
        params, _, _ = checkpoint.load_transformer(checkpoint.step_path(snapshots_of(finished), step))
        states.append(np.asarray(forward(params))[use])
    x_NHD = np.stack(states, axis=1)
    bank, dict_cfg, _ = dictionary.load(finished / "checkpoints" / "crosscoder")
    tree = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), bank)
    xhat_NHD, z_NF = jax.jit(dictionary.reconstruct, static_argnums=2)(tree, jnp.asarray(x_NHD), dict_cfg)
    wide = x_NHD.astype(np.float64)
    error_H = np.square(wide - np.asarray(xhat_NHD)).sum((0, 2))
    ev_H = 1 - error_H / np.square(wide - wide.mean(0)).sum((0, 2))
    found = stage(finished, "read")
    np.testing.assert_allclose(found["ev_global_H"], ev_H, atol=1e-4)
    np.testing.assert_allclose(column(finished, "snapshots", "ev"), ev_H, atol=1e-4)
    rate_HF = np.stack([(np.asarray(dictionary.at_head(tree, z_NF, dict_cfg, h)) > 0).mean(0) for h in range(H)])
    np.testing.assert_allclose(found["rate_HF"], rate_HF, atol=2 / len(wide))
    np.testing.assert_allclose(column(finished, "latents", "density"), (np.asarray(z_NF) > 0).mean(0), atol=0.01)
    norm_HF = np.linalg.norm(bank["params"]["W_dec"][0], axis=-1)
    np.testing.assert_allclose(column(finished, "snapshots", "mean_norm"), norm_HF.mean(1), rtol=1e-5)
    born = np.array([np.flatnonzero(column_F > 0.5 * column_F.max())[0] for column_F in norm_HF.T])
    np.testing.assert_array_equal(column(finished, "latents", "norm_above_half_from_step"), np.array(STEPS)[born])
    # the baselines read the first tokens of the same rows
    few = stage(finished, "baselines")["members"][0]
    first = slice(0, cfg.probe_tokens)
    np.testing.assert_allclose(few, study.explained(x_NHD[first], np.asarray(xhat_NHD)[first]), atol=1e-4)


def test_loss_and_accuracy_along_training_are_the_direct_ones(finished):
    _, cfg, base = opened(finished)
    batch = base.corpus.held_out.batch(study.held_out_rows(cfg, base.corpus.held_out))
    ids, segment = batch["ids"], batch["segment"]
    params = base.arms[1].params[-1]

    @jax.jit
    def log_probabilities(params):
        out_BTD, _ = transformer.forward(params, ids, base.model, segment_BT=segment)
        return jax.nn.log_softmax(transformer.head(params, out_BTD[:, :-1], base.model))

    log_p = np.asarray(log_probabilities(params), np.float64)
    target, valid = ids[:, 1:], (segment[:, 1:] > 0) & (segment[:, 1:] == segment[:, :-1])
    right = log_p.argmax(-1) == target
    scored = valid & base.corpus.include_V[target]
    apt = np.mean([right[scored & (target == token)].mean() for token in np.unique(target[scored])])
    row = rows(finished, "training")[-1]
    assert (row["arm"], row["step"]) == ("warm-up 0.3", "24")
    assert float(row["apt"]) == pytest.approx(apt, abs=1e-6)
    # against n-grams: between words, of the probability that is left to words
    special = list(base.corpus.tokenizer.special_ids)
    words = ~np.isin(ids, special)
    event = valid & words[:, 1:] & words[:, :-1]
    log_p[..., special] = -np.inf
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, target[..., None], -1)[..., 0]
    assert float(row["loss"]) == pytest.approx(nats[event].mean(), abs=1e-5)
    p = np.exp(log_p[event])
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1).mean()
    assert float(row["entropy"]) == pytest.approx(entropy, abs=1e-5)


def test_the_metric_of_a_task_is_the_difference_of_logits(finished):
    _, cfg, base = opened(finished)
    tasks = study.load_tasks(cfg, base)
    assert [task.name for task in tasks] == ["induction", HOSTILE]
    for task in tasks:
        pairs, at = task.score, np.arange(len(task.score.right_N))
        chosen = {row.tobytes() for row in task.choose.clean_NT}
        assert not chosen & {row.tobytes() for row in pairs.clean_NT} and len(chosen) + len(at) == cfg.pairs

        @jax.jit
        def metric(params, ids, pairs=pairs, at=at):
            out, _ = transformer.forward(params, ids, base.model, segment_BT=pairs.segment_NT)
            logits = transformer.head(params, out, base.model)[at, pairs.position_N]
            return (logits[at, pairs.right_N] - logits[at, pairs.wrong_N]).mean()

        mine = [row for row in rows(finished, "attribution") if row["task"] == task.name]
        for h in (0, H - 1):
            params = base.arms[0].params[h]
            assert float(mine[h]["metric"]) == pytest.approx(float(metric(params, pairs.clean_NT)), abs=1e-4)
            assert float(mine[h]["patched"]) == pytest.approx(float(metric(params, pairs.patch_NT)), abs=1e-4)


def test_births_on_the_coarse_grid_are_those_that_it_can_see(finished):
    """A latent that is strongest at a left-out snapshot is born where it first has half of what the others show."""
    (bank, _, _), (half, _, _) = (dictionary.load(finished / "checkpoints" / name) for name in (BANKS[0], BANKS[2]))
    fine, coarse = np.asarray(bank["params"]["W_dec"])[0, [0, 2, 4, 6]], np.asarray(half["params"]["W_dec"])[0]
    found = stage(finished, "baselines")

    def born(W_HFD):
        norm_HF = np.linalg.norm(W_HFD, axis=-1)
        return np.array([np.flatnonzero(norm_H > 0.5 * norm_H.max())[0] for norm_H in norm_HF.T])

    expected = study.agreement_of(
        fine, coarse, found["fires"][0], found["half_fires"], born(fine), born(coarse), (0, 2, 8, 24)
    )
    (row,) = [row for row in rows(finished, "controls") if row["crosscoder"] == "every second snapshot"]
    for name, value in expected.items():
        assert float(row[name] or "nan") == pytest.approx(value, nan_ok=True), name
    assert expected["matched"] > 0


@pytest.mark.parametrize(("fire", "words"), [(7, "numbers up to 3"), (1, "train the crosscoder longer")])
def test_too_few_latents_that_fire_are_refused(finished, fire, words):
    run, cfg, base = opened(finished)
    tree, dict_cfg, _ = dictionary.load(finished / "checkpoints" / "crosscoder")
    rate_HF = np.ones((H, F))
    rate_HF[2, fire:] = 0.0
    trained = types.SimpleNamespace(tree=tree, cfg=dict_cfg)
    with pytest.raises(InputError) as caught:
        study.attribute_tasks(run, cfg, base, trained, study.load_tasks(cfg, base), rate_HF)
    message = str(caught.value)
    assert f"--top-k 4: at one snapshot {fire} latent(s) fire" in message and words in message and "\n" not in message


def test_every_way_to_harvest_serves_the_same_rows(finished, tmp_path):
    """`once` holds the first texts, `disk` as many tokens as the buffer; what is trained on is among them."""
    _, cfg, base = opened(finished)
    base = base._replace(arms=base.arms[:1])
    run, found = quiet_run(tmp_path), {}
    for mode in ("once", "stream", "disk"):
        source, frozen, inputs, batch_at, x_NSD = study.harvest(run, dataclasses.replace(cfg, harvest=mode), base)
        _, x_BSD = jax.jit(inputs)(source, batch_at(0), frozen)
        assert x_BSD.shape == (cfg.crosscoder_batch, H, D) and x_NSD.shape[1:] == (H, D)
        found[mode] = np.asarray(x_NSD).reshape(len(x_NSD), -1)
        distance = cdist(np.asarray(x_BSD).reshape(len(x_BSD), -1), found[mode])
        assert distance.min(1).max() < 1e-4, mode
    np.testing.assert_array_equal(found["once"], found["stream"])
    N = len(found["once"])
    assert ROWS * 10 < N <= len(found["disk"]) <= cfg.buffer
    assert len(found["disk"]) > cfg.buffer - cfg.length  # one more text would be too many
    distance = cdist(found["once"], found["disk"][:N])
    assert distance[linear_sum_assignment(distance)].max() < 1e-4  # a permutation of the first texts' rows
    assert np.linalg.norm(found["once"] - found["disk"][:N], axis=1).max() > 0.1  # and shuffled


# --- other models, other snapshots -----------------------------------------------------------------------------------


def test_a_masked_model_is_studied_to_the_end(masked):
    assert tuple(column(masked, "snapshots", "step")) == (0, 4, 24)
    _, model, _ = checkpoint.load_transformer(checkpoint.step_path(snapshots_of(masked), 24))
    assert not model.causal and model.norm == "post"
    claims = {claim["id"]: claim["verdict"] for claim in json.loads((masked / "claims.json").read_text())}
    assert not {"spacing", "held-out-snapshots", "against-dictionaries", "starts-agree", "warm-up"} & set(claims)
    assert "complete-agreement" in claims and "controls" not in {p.stem for p in (masked / "tables").iterdir()}
    row = rows(masked, "training")[-1]
    assert 0 <= float(row["apt"]) <= 1 and np.isfinite([float(row[name]) for name in study.CURVES]).all()
    html = (masked / "report.html").read_text()
    assert "masked transformer, 2 blocks of width 16, 3 snapshots at steps 0, 4, 24" in html


def test_given_snapshots_say_what_the_run_that_made_them_said(masked, tmp_path, monkeypatch):
    """Also the tokenizer is the one beside them; nothing is pre-trained."""
    monkeypatch.setattr(study.apt, "pretrain", lambda *_, **__: pytest.fail("something was pre-trained"))
    out = tmp_path / "run"
    options = [*TINY, "--task", "agreement", *FEWER, "--snapshots-from", snapshots_of(masked), "--out", out]
    assert main(*options) == 0
    assert not (out / "checkpoints" / "seed0").exists() and (out / "stages" / "snapshots.npz").exists()
    same = TABLES - {"controls", "specificity", "training"}
    for name in same:
        assert (out / "tables" / f"{name}.csv").read_bytes() == (masked / "tables" / f"{name}.csv").read_bytes(), name
    renamed = [row | {"arm": "seed 0"} for row in rows(out, "training")]
    assert renamed == rows(masked, "training") and rows(out, "training")[0]["arm"] == "the given snapshots"
    ours, theirs = ([dict(c) for c in json.loads((folder / "claims.json").read_text())] for folder in (out, masked))
    assert ours == theirs


def test_all_given_snapshots_are_read_in_order_of_their_steps(finished, tmp_path):
    cfg = configured("--snapshots-from", snapshots_of(finished), "--depth", "2", "--task", "")
    base = study.load_base(quiet_run(tmp_path), cfg)
    assert base.steps == STEPS and base.depth == 2 and base.model.causal and len(base.arms) == 1
    own = load_tokenizer(finished / "checkpoints" / "tokenizer.json")
    assert base.corpus.tokenizer.sha256 == own.sha256
    for step, params in zip(STEPS, base.arms[0].params, strict=True):
        expected, _, _ = checkpoint.load_transformer(checkpoint.step_path(snapshots_of(finished), step))
        jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(expected))
    some = study.load_base(quiet_run(tmp_path), dataclasses.replace(cfg, steps=(16, 2, 2), depth=-1))
    assert some.steps == (2, 16) and some.depth == 1
    jax.tree.map(np.testing.assert_array_equal, some.arms[0].params[0], base.arms[0].params[2])


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_only_the_blocks_that_are_read_are_run(finished, depth):
    _, _, base = opened(finished)
    base = base._replace(depth=depth)
    batch = base.corpus.held_out.batch(np.arange(4))
    params = [base.arms[0].params[h] for h in (0, 6)]
    trunks = [base.trunk(p) for p in params]
    assert {leaf.shape[0] for leaf in jax.tree.leaves(trunks[0]["blocks"])} == {max(depth, 1)}
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trunks)
    x_BTHD = base.harvest(stacked, {name: batch[name] for name in ("ids", "segment")})
    for h, p in enumerate(params):
        _, acts = transformer.forward(p, batch["ids"], base.model, segment_BT=batch["segment"])
        np.testing.assert_allclose(x_BTHD[:, :, h], acts["resid"][depth], atol=1e-5)


def test_generated_tasks_are_words_of_the_trained_vocabulary(finished):
    """Each in the number that was asked for, none dropped, other pairs than those that the text was made of."""
    _, cfg, base = opened(finished, task=study.TASKS)
    said = []
    tasks = study.load_tasks(cfg, base, said.append)
    assert [task.name for task in tasks] == list(study.TASKS) and len(said) == 3
    for task, line in zip(tasks, said, strict=True):
        assert f"task {task.name}: 32 pairs; dropped: none" == line
        assert len(task.choose.right_N) + len(task.score.right_N) == 32
        assert not (task.score.clean_NT == task.score.patch_NT).all(1).any()
    shown = set(study.extra_documents(base.corpus.lang, cfg.documents // 8))
    assert len(shown) == 2 * (cfg.documents // 8)
    for task in study.TASKS[1:]:
        rows = study.generated_pairs(base.corpus.lang, task, 32, cfg.seed + 17)
        assert not any(text.startswith(row.clean) for row in rows for text in shown)


# --- pure helpers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("H", "expected"), [(2, [0, 1]), (3, [0, 2]), (4, [0, 2, 3]), (5, [0, 2, 4]), (6, [0, 2, 4, 5]), (7, [0, 2, 4, 6])]
)
def test_every_second_snapshot(H, expected):
    assert study.even_snapshots(H).tolist() == expected


def test_explained_variance_by_hand():
    x_NHD = np.array([[[0.0], [0.0]], [[2.0], [4.0]]], np.float32)  # means 1 and 2, variation 2 and 8
    xhat_NHD = np.array([[[0.0], [1.0]], [[2.0], [1.0]]], np.float32)  # errors 0 and 1 + 9
    found = study.explained(x_NHD, xhat_NHD)
    assert found.dtype == np.float64 and found.tolist() == [1.0, 1 - 10 / 8]
    mean = np.broadcast_to(x_NHD.mean(0), x_NHD.shape)
    np.testing.assert_allclose(study.explained(x_NHD, mean), 0.0)


@pytest.mark.parametrize("wide", [False, True])
def test_linear_is_ridge_regression_with_an_intercept(wide):
    """Least squares on the rows and on sqrt(ridge) times the identity, by `lstsq`; also with more inputs than rows."""
    rng = np.random.default_rng(0)
    N, X = (20, 40) if wide else (200, 6)
    fit_NX = rng.normal(size=(N, X)) + 5.0
    fit_ND = fit_NX @ rng.normal(size=(X, 3)) - 7.0 + 0.1 * rng.normal(size=(N, 3))
    test_NX = rng.normal(size=(9, X)) + 5.0
    centred = fit_NX - fit_NX.mean(0)
    ridge = 1e-3 * np.square(centred).sum() / X
    rows = np.concatenate([centred, np.sqrt(ridge) * np.eye(X)])
    weights = np.linalg.lstsq(rows, np.concatenate([fit_ND - fit_ND.mean(0), np.zeros((X, 3))]))[0]
    expected = (test_NX - fit_NX.mean(0)) @ weights + fit_ND.mean(0)
    found = study.linear(fit_NX, fit_ND, test_NX)
    np.testing.assert_allclose(found, expected, rtol=1e-8)
    if not wide:  # and a ridge that small changes little
        plain = np.linalg.lstsq(np.c_[fit_NX, np.ones(N)], fit_ND)[0]
        np.testing.assert_allclose(found, np.c_[test_NX, np.ones(9)] @ plain, atol=0.1)
    constant = study.linear(np.ones((5, 2)), fit_ND[:5], np.ones((1, 2)))  # inputs that say nothing: the mean
    np.testing.assert_allclose(constant, fit_ND[:5].mean(0)[None])


def test_agreement_of_crosscoders():
    rng = np.random.default_rng(1)
    steps, H, F, D = (0, 1, 3, 7, 15), 5, 6, 16
    W = rng.normal(size=(H, F, D))
    birth, all_F = np.array([0, 1, 2, 3, 4, 2]), np.ones(F, bool)
    same = study.agreement_of(W, W, all_F, all_F, birth, birth, steps)
    assert same == {"matched": 1.0, "birth_near": 1.0, "birth_doublings": 0.0}
    order = rng.permutation(F)
    assert study.agreement_of(W, W[:, order], all_F, all_F, birth, birth[order], steps) == same
    # steps are one doubling of 1 + step apart: all matched ones born two snapshots later are two doublings away
    later = np.array([2, 3, 4, 3, 4, 4])
    found = study.agreement_of(W, W, all_F, all_F, birth, later, steps)
    assert found == {"matched": 1.0, "birth_near": pytest.approx(2 / 6), "birth_doublings": 2.0}
    # one latent of b is another, one that is silent is not asked
    other = W.copy()
    other[:, 0] = rng.normal(size=(H, D))
    alive = all_F.copy()
    alive[5] = False
    found = study.agreement_of(W, other, all_F, alive, birth, birth, steps)
    assert found["matched"] == pytest.approx(4 / 5) and found["birth_near"] == 1.0
    none = study.agreement_of(W, rng.normal(size=W.shape), all_F, all_F, birth, birth, steps)
    assert none["matched"] == 0.0 and np.isnan(none["birth_near"]) and np.isnan(none["birth_doublings"])
    # the cosine is of all snapshots together: turned at half of them, a latent has cosine 0.6
    half = np.stack([np.eye(8)[:4]] * 5)
    turned = half.copy()
    turned[:2] = np.eye(8)[4:]
    few = np.ones(4, bool)
    assert study.agreement_of(half, turned, few, few, birth[:4], birth[:4], steps)["matched"] == 0.0
    assert study.agreement_of(half, turned, few, few, birth[:4], birth[:4], steps, least=0.59)["matched"] == 1.0


def lived(first_active):
    return types.SimpleNamespace(first_active_F=np.array(first_active))


def test_emergence_and_its_step():
    steps = (0, 1, 3, 7)
    strength = np.array([[0.0, 1.0, 0.0], [0.2, 0.1, 0.0], [1.0, 0.1, 0.0], [0.6, 0.1, 0.0]])
    path = types.SimpleNamespace(norm_HF=strength, strength_HF=strength, birth_F=np.array([2, 0, 0]))
    gated = study.emergence(lived([1, 0, 4]), path, dataclasses.replace(study.PRESETS["demo"], loss="batch_topk"))
    np.testing.assert_array_equal(gated, [1.0, 0.0, np.nan])
    np.testing.assert_array_equal(study.log_step(steps, gated), [1.0, 0.0, np.nan])
    # one gate for all heads, so one rate: the norm tells
    shared = study.emergence(lived([0, 0, 0]), path, dataclasses.replace(study.PRESETS["demo"], loss="l1"))
    np.testing.assert_array_equal(shared, [2.0, 0.0, np.nan])
    np.testing.assert_array_equal(study.log_step(steps, shared), [2.0, 0.0, np.nan])


def test_trajectories_of_a_planted_crosscoder():
    """Latents grow in at known snapshots and turn together in one interval, which is the widest but not the fastest."""
    steps, born = (0, 1, 2, 4, 8, 64), np.array([0, 1, 2, 3, 4])
    angle_H = np.cumsum([0.0, 0.05, 0.4, 0.05, 0.05, 0.6])
    W = np.zeros((6, 5, 10))
    for f in range(5):
        for h in range(6):
            length = 2.0 if h >= born[f] else 0.3
            W[h, f, [2 * f, 2 * f + 1]] = length * np.array([np.cos(angle_H[h]), np.sin(angle_H[h])])
    trajectories, path = study.path_of(
        {"params": {"W_dec": W.astype(np.float32)}, "norm": {"scale": np.ones(6)}}, steps, np.ones(5, bool)
    )
    np.testing.assert_array_equal(path.birth_F, born)
    np.testing.assert_allclose(path.norm_HF[:, 4], [0.3] * 4 + [2.0] * 2, rtol=1e-6)
    np.testing.assert_allclose(path.rotation_IF, np.repeat(1 - np.cos(np.diff(angle_H))[:, None], 5, 1), atol=1e-6)
    assert path.turned_IF.all() and path.turn.at == 4 and path.turn_log.at == 1
    assert not np.asarray(trajectories.dead_HF).any()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_bootstrap_of_a_share(share):
    true_F = np.arange(200) < round(200 * share)
    low, high = study.bootstrap_share(true_F)
    half = 1.96 * np.sqrt(share * (1 - share) / 200)  # the normal interval
    assert low == pytest.approx(share - half, abs=0.011) and high == pytest.approx(share + half, abs=0.011)
    assert study.bootstrap_share(true_F) == (low, high)


# --- claims ----------------------------------------------------------------------------------------------------------


def test_the_centre_of_turning():
    """Intervals of log2(1 + step) around 0.5, 1.5, 2.5; NaN counts as nothing."""
    path = types.SimpleNamespace(turn=types.SimpleNamespace(curve_I=np.array([0.1, 0.3, np.nan])))
    assert study.turning_centre(path, (0, 1, 3, 7)) == pytest.approx((0.5 * 0.1 + 1.5 * 0.3) / 0.4)
    path.turn.curve_I = np.array([0.2, 0.2, 0.6])
    assert study.turning_centre(path, (0, 1, 3, 7)) == pytest.approx(0.1 + 0.3 + 1.5)


def turned(curve, at, low, high, ratio):
    turn_log = types.SimpleNamespace(at=at, low=low, high=high, ratio=ratio)
    return types.SimpleNamespace(turn=types.SimpleNamespace(curve_I=np.array(curve, float)), turn_log=turn_log)


def judged(good: bool, drop: tuple[str, ...] = (), complexity=True, like=True, error=0.1, ev=None, **changes):
    """{claim: (verdict, measured)} of a made study of five snapshots, two arms and two starts, one task."""
    flip = 1 if good else -1
    cfg = dataclasses.replace(study.PRESETS["demo"], top_k=(1, 8, 20), crosscoder_seeds=2, **changes)
    base = types.SimpleNamespace(steps=(0, 1, 2, 4, 8), arms=[study.Arm("seed 0", []), study.Arm("warm-up 0.3", [])])
    rise, fall = np.array([[1.0, 2.0, 3.0, 4.0, 5.0]]), np.array([[5.0, 1.0, 2.0, 3.0, 4.0]])
    filler = np.full((1, 5), 100.0)  # another arm, which no claim of arm 0 reads
    training = {
        "kl_unigram_model": np.r_[fall if good else rise[:, ::-1], filler],  # least at 1, or at the end
        "kl_bigram_model": np.r_[rise[:, ::-1] if good else fall, filler],
        "kl_model_bigram": np.r_[fall if good else rise[:, ::-1], filler],
    }
    baselines = {
        "members": 0.8 + flip * np.array([[0.1] * 5, [0.11] * 5, [-0.9] * 5]), "alone": np.full(5, 0.8),
        "l0": np.full((3, 5), 8.0), "alone_l0": np.full(5, 8.0 if like else 9.0),
        "held_out": 0.5 + flip * np.array([0.2, 0.21]), "held_out_neighbours": np.array([0.5, 0.5]),
    }  # fmt: skip
    random = np.array([[[0.0] * 3] * 4 + [[0.0, 0.9, 0.0]], [[0.0] * 3] * 4 + [[0.0, 0.92, 0.0]]])
    attributed = {
        "t_score_clean_H": np.array([0, 0, 0, 0, 2.0]), "t_score_base_H": np.array([0, 0, 0, 0, -2.0]),
        "t_necessity_HX": np.array([[0.0] * 3] * 4 + [[0.0, 0.3 if good else 1.2, 0.0]]),
        "t_random_necessity_RHX": random, "t_gap_H": np.array([0, 0, 0, 0, 1e-5 if good else -1e-2]),
        "t_clean_H": np.array([0, 0, 0, 0, 2.0]), "t_base_H": np.array([0, 0, 0, 0, -2.0]),
        "t_score_clean_se_H": np.full(5, error), "t_necessity_se_HX": np.full((5, 3), 0.1),
        "tt_score_clean_H": np.zeros(5),
    }  # fmt: skip
    never_F = np.arange(110) >= 100
    life = types.SimpleNamespace(
        first_active_F=np.arange(110) % 6,
        lifetime_F=np.where(np.arange(110) < (80 if good else 40), 0.6, 0.4),
        never_F=never_F,
    )
    own = turned([0, 1, 0, 0], 1, 1, 2 if good else 3, 3.0 if good else 1.5)
    warm = turned([0, 1, 1, 0] if good else [0, 0, 0, 1], 3, 0, 3, 9.0)
    paths = [own, turned([1, 0, 0, 0], 3, 0, 3, 9.0), warm]  # the second is another start, which no claim reads
    within = np.full((4, 4), 0.6 if good else 0.4)
    names = ("norm", "presence (error)", "presence (activation)", "probe AUC")
    measures = types.SimpleNamespace(names=names, within_XX=within)
    own.norm_HF = own.strength_HF = np.ones((5, 110))
    own.birth_F = np.zeros(110, int)
    correlation = types.SimpleNamespace(spearman=0.4, spearman_low=0.2 * flip, spearman_high=0.6)
    controls = {
        "start 1": {"matched": 0.7 if good else 0.5},
        "every second snapshot": {"birth_near": 0.9 if good else 0.8},
    }
    share_H = np.array([0.5, 0.3, 0.2, 0.3, 0.4] if good else [0.2, 0.3, 0.4, 0.5, 0.6])
    if ev is not None:
        baselines["members"] = np.full((3, 5), ev)
    baselines = {name: value for name, value in baselines.items() if name not in drop}
    controls = {name: value for name, value in controls.items() if name not in drop}
    made = study.Study(
        {"kind_complexity_F": np.ones(110)}, training, baselines, attributed, [study.Task("t", None, None)], None,
        paths,
        life, share_H, None, None, measures, correlation if complexity else None, controls,
    )  # fmt: skip
    claims = study.judge(cfg, base, made)
    assert len({claim.id for claim in claims}) == len(claims)
    return {claim.id: (claim.verdict, claim.measured) for claim in claims}


def test_claims_follow_their_rules():
    found = judged(True)
    assert {name for name, (verdict, _) in found.items() if verdict != "supported"} == set() and len(found) == 17
    measured = {name: value for name, (_, value) in found.items()}
    assert measured["unigrams-first"] == 3 and measured["beyond-bigrams"] == 3.0
    assert measured["turning-point"] == 3.0 and measured["turning-located"] == 1
    assert measured["warm-up"] == pytest.approx((np.log2(5) - 1) / 4)  # half way between two middles
    assert measured["most-persist"] == pytest.approx(0.8)  # of the 100 that fire
    assert measured["dimensions-grow"] == pytest.approx(0.2)  # the smaller of 0.3 and 0.2
    assert measured["against-dictionaries"] == pytest.approx(0.105)  # starts of arm 0 alone
    assert measured["held-out-snapshots"] == pytest.approx(0.205)
    assert measured["few-carry-t"] == pytest.approx(0.61) and measured["complete-t"] == pytest.approx(1e-5 / 4)
    found = judged(False)
    assert {verdict for verdict, _ in found.values()} == {"not supported"} and len(found) == 17
    assert found["unigrams-first"][1] == -3 and found["warm-up"][1] > 1 and found["complete-t"][1] > 1e-4


def test_claims_that_a_run_has_no_numbers_for():
    drop = ("alone", "held_out", "start 1", "every second snapshot")
    found = judged(True, drop, complexity=False)
    assert set(judged(True)) - set(found) == {"against-dictionaries", "held-out-snapshots", "starts-agree", "spacing"}
    assert found["complex-later"] == ("not tested", None)
    assert {name for name, (verdict, _) in found.items() if verdict == "not tested"} == {"complex-later"}

    def untested(**settings):
        return {name for name, (verdict, _) in judged(True, **settings).items() if verdict == "not tested"}

    assert untested(like=False) == {"against-dictionaries"}  # other numbers of active latents
    assert untested(error=1.1) == {"few-carry-t"}  # a logit difference of 2 +- 2.2
    assert untested(loss="l1") == {"most-persist"}  # one gate, one rate
    assert len(untested(ev=0.4)) == 14  # a crosscoder that explains nothing: only the model's own curves and gaps count


# --- bad input -------------------------------------------------------------------------------------------------------


def snapshots(finished, folder, steps=(0, 4)) -> Path:
    """A folder of some snapshots of the finished run, with its tokenizer above."""
    for step in steps:
        path = checkpoint.step_path(folder / "snapshots", step)
        shutil.copytree(checkpoint.step_path(snapshots_of(finished), step), path)
    shutil.copy(finished / "checkpoints" / "tokenizer.json", folder)
    (folder / "snapshots").mkdir(exist_ok=True)
    return folder / "snapshots"


def given(finished, folder, *options, **more):
    return ["--snapshots-from", snapshots(finished, folder, **more), "--task", "", *options]


def saved(finished, folder, change, **config):
    """Snapshots whose last one is changed: its parameters by `change`, its configuration by `config`."""
    path = checkpoint.step_path(snapshots(finished, folder), 4)
    params, cfg, found = checkpoint.load_transformer(path)
    shutil.rmtree(path)
    cfg = dataclasses.replace(cfg, **config)
    params = change(jax.device_get(params), cfg)
    checkpoint.save(path, params, kind="transformer", config=dataclasses.asdict(cfg), step=4, tokenizer=found.tokenizer)
    return ["--snapshots-from", folder / "snapshots", "--task", ""]


def another_model(finished, folder):
    def fresh(params, cfg):
        return jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), cfg)

    return saved(finished, folder, fresh, mlp_width=40), ("step_00000004", "another model", "mlp_width 32 and 40")


def not_finite(finished, folder):
    def broken(params, cfg):
        leaf = np.array(params["blocks"]["mlp"]["in"]["bias"])
        leaf[1, 3] = np.nan
        params["blocks"]["mlp"]["in"]["bias"] = leaf
        return params

    return saved(finished, folder, broken), ("step_00000004", "not finite")


def other_vocabulary(finished, folder):
    own = load_tokenizer(finished / "checkpoints" / "tokenizer.json")
    wordpiece([*own.tokens[:-1], "other"]).save(folder / "other.json")
    return given(finished, folder, "--vocab", folder / "other.json"), ("another vocabulary", "--vocab")


def no_tokenizer(finished, folder):
    options = given(finished, folder)
    (folder / "tokenizer.json").unlink()
    return options, ("tokenizer.json", "--vocab")


def pairs_file(finished, folder, answers):
    path = write_pairs(folder / "mine.jsonl", [(f"the {i}", f"a {i}", *answers) for i in range(4)])
    return ["--task", path]


def no_pairs(finished, folder):
    (folder / "odd.jsonl").write_text('{"question": "?", "reply": "!"}\n')
    return ["--task", folder / "odd.jsonl"], ("odd.jsonl", "no known set of pairs", "question")


def same_name(finished, folder):
    (folder / "sub").mkdir()
    files = [write_pairs(place / "mine.jsonl", [("a b", "c b", "x", "y")]) for place in (folder, folder / "sub")]
    return ["--task", f"{files[0]},{files[1]}"], ("two tasks of one name",)


def real_text(folder, *options):
    (folder / "text").mkdir()
    lines = [json.dumps({"text": "alpha beta gamma delta " * (1 + i % 3)}) for i in range(440)]
    (folder / "text" / "a.jsonl").write_text("\n".join(lines) + "\n")
    return ["--corpus", folder / "text", *options]


BAD = {  # options and words by (finished run, folder of the test)
    "snapshots of two models": another_model,
    "parameters not finite": not_finite,
    "other vocabulary": other_vocabulary,
    "no tokenizer": no_tokenizer,
    "no such step": lambda run, at: (given(run, at, "--steps", "0,3"), ("no snapshot of step 3", "0, 4", "--steps")),
    "no snapshots": lambda run, at: (given(run, at, steps=()), ("holds no snapshots", "step_N")),
    "one snapshot": lambda run, at: (given(run, at, steps=(4,)), ("one snapshot has no evolution",)),
    "rows too long": lambda run, at: (
        given(run, at, "--length", "40", "--buffer", "2000"), ("32 positions", "--length"),
    ),
    "given, depth beyond": lambda run, at: (given(run, at, "--depth", "3"), ("--depth 3", "0 to 2")),
    "depth beyond the model": lambda run, at: (["--depth", "3"], ("--depth 3", "0 to 2")),
    "one step": lambda run, at: (["--steps", "4,4"], ("--steps 4", "one snapshot has no evolution")),
    "step never taken": lambda run, at: (["--steps", "0,3,24"], ("--steps 3", "0, 1, 2, 4, 8, 16, 24")),
    "small buffer": lambda run, at: (["--buffer", "1087"], ("--buffer 1087", "1088 or more")),
    "too few tokens": lambda run, at: (
        ["--crosscoder-batch", "50000", "--buffer", "60000"], ("--crosscoder-batch 50000", "training tokens"),
    ),
    "top-k above the latents": lambda run, at: (["--top-k", "1,25"], ("--top-k", "25", "24 latents")),
    "no top-k": lambda run, at: (["--top-k", ""], ("--top-k",)),
    "heads do not divide": lambda run, at: (["--heads", "3"], ("--heads 3",)),
    "k above the latents": lambda run, at: (["--k", "25"], ("25", "24")),
    "answers of two tokens": lambda run, at: (
        ["--task", *pairs_file(run, at, ("zzyzx", "qqxqq"))[1:]], ("mine", "none of 4 pairs is left", "zzyzx"),
    ),
    "no such task": lambda run, at: (["--task", "agrement"], ("--task agrement", "agreement, induction")),
    "no pairs in the file": no_pairs,
    "two tasks of one name": same_name,
    "a task twice": lambda run, at: (["--task", "induction,induction"], ("two tasks of one name",)),
    "embedded task of real text": lambda run, at: (
        real_text(at, "--task", "induction"), ("--task induction", "embedded corpus", "file of pairs"),
    ),
    "no corpus": lambda run, at: (["--preset", "small"], ("--corpus",)),
    "unknown option": lambda run, at: (["--snapshot-from", "x"], ("--snapshots-from",)),
    "unknown harvest": lambda run, at: (["--harvest", "twice"], ("harvest", "stream, once, disk")),
}  # fmt: skip
AFTER_THE_TEXT = ("too few tokens", "answers of two tokens", "step never taken")  # which has been tokenised by then


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_line_before_anything_is_trained(finished, tmp_path, name, capsys, monkeypatch):
    folder, out = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    options, words = BAD[name](finished, folder)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    monkeypatch.setattr(bert6_jax.train, "fit", lambda *_, **__: pytest.fail("something was trained"))
    capsys.readouterr()
    assert main(*(TINY if name != "no corpus" else ["--quiet"]), *options, "--out", out) == 2
    message = capsys.readouterr().err.strip()
    assert message.count("\n") == 0 and message.startswith("error: ") and all(word in message for word in words), (
        message
    )
    assert all(file.read_bytes() == content for file, content in before.items())
    assert out.exists() == (name in AFTER_THE_TEXT)  # else free for the corrected command


def test_other_settings_and_other_snapshots_may_not_go_on_in_a_folder(finished, masked, world, tmp_path, capsys):
    before = numbers(finished)
    assert main(*tiny(world, "--k", "2"), "--out", finished) == 2
    message = capsys.readouterr().err.strip()
    assert message.count("\n") == 0 and "k is 3 there and 2 here" in message
    assert numbers(finished) == before
    folder = tmp_path / "folder"
    folder.mkdir()
    options = [*TINY, *given(finished, folder, "--steps", "0,4"), "--out", tmp_path / "out"]
    stop = pytest.MonkeyPatch()
    with stop.context() as patch:
        patch.setattr(study, "study", lambda *_: (_ for _ in ()).throw(InputError("far enough")))
        assert main(*options) == 2 and "far enough" in capsys.readouterr().err
    path = checkpoint.step_path(folder / "snapshots", 4)
    shutil.rmtree(path)
    shutil.copytree(checkpoint.step_path(snapshots_of(finished), 8), path)
    assert main(*options) == 2
    message = capsys.readouterr().err.strip()
    assert message.count("\n") == 0 and "snapshots is not the one that this run began with" in message


def test_help_names_every_option_and_preset(capsys):
    with pytest.raises(SystemExit) as end:
        main("--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(EvolutionConfig):
        assert f"--{field.name.replace('_', '-')}" in text, field.name
    assert list(study.PRESETS) == ["demo", "small", "paper"] and all(preset in text for preset in study.PRESETS)
