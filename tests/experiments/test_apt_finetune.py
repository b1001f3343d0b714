"""The fine-tuning half of the APT study: end to end at a size of seconds, its statistics, resume, bad input."""

import csv
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax import checkpoint, classifier, metrics
from bert6_jax.config import TransformerConfig
from bert6_jax.data.tokenizer import load_tokenizer
from experiments import apt, apt_finetune
from experiments.harness import cli
from experiments.harness.run import Run

TINY = [
    "--documents", "700", "--subset-sizes", "100,500", "--held-out", "150", "--epochs", "2", "--passes", "1",
    "--readout-epochs", "0.5", "--blocks", "2", "--width", "16", "--heads", "2", "--mlp-width", "32",
    "--dispatch", "2", "--checkpoint-every", "2", "--quiet",
]  # fmt: skip
TUNE = [
    "--task", "embedded-topic", "--splits", "text,random", "--finetune-seeds", "2", "--finetune-epochs", "2",
    "--train-per-class", "8", "--test-per-class", "8", "--probe-steps", "20", "--transfer-snapshots", "1",
]  # fmt: skip
TABLES = ("finetune_by_block", "confidence_vs_apt", "confidence_stats", "replacement", "transfer")


def main(*options):
    return cli.main("apt", apt.AptConfig, apt.PRESETS, apt.run_apt, "test", argv=[str(option) for option in options])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("BERT6_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    out = tmp_path_factory.mktemp("apt") / "run"
    os.environ["BERT6_JAX_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    assert main(*TINY, "--task", "", "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def tuned(pretrained, tmp_path_factory):
    """Fine-tuning added to a run that was pre-trained without it."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    shutil.copytree(pretrained, out)
    assert main(*TINY, *TUNE, "--out", out) == 0
    return out


def rows(out, name):
    with (out / "tables" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(out):
    files = [out / "claims.json", *(out / "tables" / f"{name}.csv" for name in TABLES)]
    return {file.name: file.read_text() for file in files}


def test_fine_tuning_goes_on_from_a_finished_pre_training(pretrained, tuned):
    config = json.loads((tuned / "config.json").read_text())
    assert config["config"]["task"] == ["embedded-topic"]
    assert json.loads((pretrained / "config.json").read_text())["config"]["task"] == []
    before, after = ((out / "tables" / "apt_by_block.csv").read_text() for out in (pretrained, tuned))
    assert before == after
    for name in ("finetune_by_block", "confidence_by_block", "confidence_vs_apt", "replacement", "transfer"):
        assert (tuned / "figures" / f"{name}.png").stat().st_size > 0


def test_tables_cover_tasks_splits_networks_blocks(tuned):
    table = rows(tuned, "finetune_by_block")
    assert {(r["task"], r["split"]) for r in table} == {("embedded-topic", s) for s in ("text", "random")}
    assert {r["network"] for r in table} == set(apt_finetune.NETWORKS)
    assert {r["block"] for r in table} == {"0", "1", "2"}
    chance = [r for r in table if r["block"] == "0" and r["readout"] == "linear, cls"]
    assert len(chance) == 6 and all(float(r["accuracy"]) == pytest.approx(0.2) for r in chance)
    transfer = rows(tuned, "transfer")
    assert [(r["subset"], r["split"]) for r in transfer[6:]] == [("0", "random"), ("500", "random")]
    one = [(r["method"], r["subset"], r["pretraining_steps"]) for r in transfer]
    assert sorted(one[:6]) == sorted(
        [("full", "0", "0"), ("full", "500", "8"), ("full", "500", "16"), ("full", "100", "4"),
         ("frozen", "500", "16"), ("lora", "500", "16")]
    )  # fmt: skip
    assert {float(r["shared_texts"]) for r in transfer if r["split"] == "text"} == {0.0}
    assert all(int(r["train_rows"]) == int(r["test_rows"]) == 8 * 5 for r in transfer)
    assert {r["swapped_for"] for r in rows(tuned, "replacement")} == set(apt_finetune.ARMS)
    claims = {claim["id"]: claim for claim in json.loads((tuned / "claims.json").read_text())}
    assert {"embedded-topic-blocks-cls", "embedded-topic-random-split-transfer"} <= set(claims)


def test_started_again_nothing_changes_and_other_fine_tuning_settings_are_new_stages(tuned, tmp_path):
    before, stages = numbers(tuned), sorted(file.name for file in (tuned / "stages").iterdir())
    assert main(*TINY, *TUNE, "--out", tuned) == 0
    assert numbers(tuned) == before
    assert sorted(file.name for file in (tuned / "stages").iterdir()) == stages
    out = tmp_path / "run"
    shutil.copytree(tuned, out)
    assert main(*TINY, *TUNE, "--splits", "text", "--finetune-lr", "1e-2", "--methods", "full", "--out", out) == 0
    assert len(list((out / "stages").iterdir())) == len(stages) + 4
    assert {(r["split"], r["method"]) for r in rows(out, "transfer")} == {("text", "full")}
    assert before["transfer.csv"] != (out / "tables" / "transfer.csv").read_text()


def test_interrupted_in_the_middle_of_fine_tuning_it_ends_with_the_same_numbers(
    pretrained, tuned, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    shutil.copytree(pretrained, out)
    log, seen = Run.log, []

    def interrupted(self, stage, step, **values):
        log(self, stage, step, **values)
        if stage.startswith("finetune-embedded-topic-random") and "step0" in stage and step == 3:
            seen.append(stage)
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", interrupted)
    assert main(*TINY, *TUNE, "--out", out) == 130 and seen
    assert not list((out / "checkpoints" / "finetune").glob("*-text-*/state"))
    (left,) = (out / "checkpoints" / "finetune").glob("*-random-*/state")
    assert checkpoint.steps(left) == [2]
    monkeypatch.setattr(Run, "log", log)
    assert main(*TINY, *TUNE, "--out", out) == 0
    assert numbers(out) == numbers(tuned)
    assert not list((out / "checkpoints" / "finetune").glob("*/state"))


def test_saved_models_answer_as_the_tables_say(tuned):
    """The fine-tuned checkpoints, read from disk, have the accuracy of the table; adapters find their base."""
    folders = tuned / "checkpoints" / "finetune"
    tokenizer = load_tokenizer(tuned / "checkpoints" / "tokenizer.json")
    lang = apt.language.make_language(apt.DEMO_LANGUAGE)
    cfg = apt_finetune.FinetuneConfig(task=("embedded-topic",), train_per_class=8, test_per_class=8)
    (plan,) = apt_finetune.load_tasks(cfg, lang, 42, 1)
    task = plan.task
    base, _, _ = checkpoint.load_transformer(tuned / "checkpoints" / "seed0" / "ws500" / "snapshots" / "step_00000016")
    table = {r["method"]: r for r in rows(tuned, "transfer")
             if r["split"] == "text" and r["pretraining_steps"] == "16"}  # fmt: skip
    for method in ("full", "lora", "frozen"):
        (folder,) = folders.glob(f"embedded-topic-text-ws500-step16-{method}-*")
        found = []
        for g in range(2):
            split = plan.split("text", g)
            if method == "full":
                params, model, saved = checkpoint.load_transformer(folder / f"seed{g}")
            else:
                params, model, saved = classifier.load_adapter(folder / f"seed{g}", base)
                assert saved.config["pooling"] == "cls"
            assert saved.extra["classes"] == list(task.classes) and saved.extra["task"] == "embedded-topic"
            examples = classifier.encode(tokenizer, task.texts, task.label_N, len(task.classes), model.max_len)
            logits = classifier.logits(params, examples.batch(split.test), model, saved.extra["pooling"])
            found.append((np.argmax(logits, -1) == task.label_N[split.test]).mean())
        assert np.mean(found) == pytest.approx(float(table[method]["accuracy"]), abs=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "few-rel"], ["few-rel", "no such task or file"]),
        (["--task", "embedded,embedded-topic"], ["two tasks that are called embedded-topic"]),
        (["--splits", ""], ["--splits", "at least one"]),
        (["--finetune-seeds", "1"], ["--finetune-seeds", "too small"]),
        (["--lora-targets", "attn/x"], ["attn/x", "none of attn/q"]),
        (["--lora-targets", ""], ["LoRA targets", "nothing"]),
        (
            ["--task", "{csv},{folder}/news.csv", "--train-per-class", "1", "--test-per-class", "1"],
            ["two tasks that are called news"],
        ),
        (["--finetune-length", "2"], ["--finetune-length 2"]),
        (["--task", "{csv}", "--text-column", "headline"], ["headline", "news.csv"]),
        (["--task", "{csv}", "--label-column", "kind"], ["kind", "news.csv"]),
        (["--task", "{csv}", "--train-per-class", "3", "--test-per-class", "2"], ["sport", "2 rows"]),
    ],
)
def test_bad_tasks_get_one_line_and_leave_the_record_alone(tuned, tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    table = tmp_path / "news.csv"
    table.write_text("text,label\n" + "".join(f"a {i},world\n" for i in range(9)) + "a goal,sport\nb goal,sport\n")
    before = (tuned / "config.json").read_text()
    (tmp_path / "other").mkdir()
    shutil.copy(table, tmp_path / "other" / "news.csv")
    options = [option.format(csv=table, folder=tmp_path / "other") for option in options]
    assert main(*TINY, *TUNE, "--out", tuned, *options) == 2
    message = capsys.readouterr().err.strip()
    assert message.count("\n") == 0 and message.startswith("error: "), message
    assert all(word in message for word in words), message
    assert (tuned / "config.json").read_text() == before


def test_without_a_task_the_tables_of_an_earlier_one_go(tuned, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(tuned, out)
    assert main(*TINY, "--task", "", "--out", out) == 0
    assert not (out / "tables" / "transfer.csv").exists() and not (out / "figures" / "transfer.png").exists()
    assert (out / "tables" / "apt_by_block.csv").exists()
    assert main(*TINY, *TUNE, "--out", out) == 0  # the stages are still there
    assert numbers(out) == numbers(tuned)


def test_two_seeds_mean_pooling_one_subset_frozen_only(tmp_path):
    options = ["--seeds", "2", "--finetune-seeds", "2", "--pooling", "mean", "--methods", "frozen",
               "--subset-sizes", "500"]  # fmt: skip
    small = ["--task", "embedded-relation", "--train-per-class", "4", "--test-per-class", "4", "--finetune-epochs", "1"]
    fast = ["--probe-steps", "5", "--transfer-snapshots", "0", "--epochs", "1", "--no-untrained-control"]
    assert main(*TINY, *options, *small, *fast, "--out", tmp_path / "run") == 0
    assert [(r["method"], r["subset"]) for r in rows(tmp_path / "run", "transfer")] == [
        ("full", "0"), ("full", "500"), ("frozen", "500"),
    ]  # fmt: skip
    assert main(*TINY, *options, *small, *fast, "--finetune-seeds", "3", "--out", tmp_path / "run") == 2


def test_recipes_belong_to_the_task_and_not_to_a_name(shared_data, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    cfg = apt_finetune.FinetuneConfig(task=("dbpedia",), task_data=shared_data / "dbpedia14", finetune_seeds=2)
    (plan,) = apt_finetune.load_tasks(cfg, None, 42, 1)
    split = plan.split("text", 0)
    assert (len(split.train), len(split.test)) == (1_400, 1_400)
    table = tmp_path / "dbpedia.csv"
    table.write_text("text,label\n" + "".join(f"a {i},{'xy'[i % 2]}\n" for i in range(60)))
    (plan,) = apt_finetune.load_tasks(apt_finetune.FinetuneConfig(task=(str(table),)), None, 42, 1)
    assert (plan.train_rows, plan.test_rows) == (0, 3)


def test_a_table_of_the_user_is_a_task(pretrained, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    out = tmp_path / "run"
    shutil.copytree(pretrained, out)
    lang = apt.language.make_language(apt.DEMO_LANGUAGE)
    made = apt.language.make_task(lang, "topic", 16, 5)
    with (tmp_path / "my <b>.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("kind", "words"), *((f"<i>{c}", t) for c, t in zip(made.label_N, made.texts, strict=True))]
        )
    options = ["--task", tmp_path / "my <b>.csv", "--text-column", "words", "--label-column", "kind"]
    assert (
        main(*TINY, *TUNE, "--splits", "text", "--transfer-snapshots", "0", "--methods", "full", *options, "--out", out)
        == 0
    )
    assert len(rows(out, "transfer")) == 3
    report = (out / "report.html").read_text()
    assert "<b>.csv" not in report and "&lt;b&gt;.csv" in report


# --- statistics ------------------------------------------------------------------------------------------------------


def setting(apt_V=None, matches=None, frequency_V=None, V=12):
    return apt_finetune.Setting(
        TransformerConfig(V, 8, 1, 1, 8, 16, 8), None, None, None, 1, {100: 50, 500: 1024}, None,
        np.full((1, V), np.nan) if apt_V is None else np.asarray(apt_V)[None],
        np.where(np.arange(V) == 11, 3, 50)[None], [matches], {},
        np.arange(V) if frequency_V is None else frequency_V, (0, 1, 2, 3, 4), 100,
    )  # fmt: skip


def matches_of(pairs, V=12):
    row, col, ratio = (np.array(x) for x in zip(*pairs, strict=True))
    return metrics.Matches(row, col, ratio.astype(np.float32), ratio * 0, np.ones(V, bool), np.int32(0))


def test_partners_are_the_strongest_match_and_the_neighbours_in_frequency():
    matches = matches_of([(5, 6, 0.2), (5, 7, 0.9), (6, 5, 0.3), (12, 12, 0.0)])
    best_V, near = apt_finetune.partners(setting(matches=matches), 0, neighbours=2)
    assert best_V[5] == 7 and best_V[6] == 5 and (best_V[[0, 7, 8]] == -1).all()
    assert near[5].tolist() == [8, 9]  # around 7 in frequency; 6 and 7 are matches of 5
    assert near[6].tolist() == [7]  # around 5; what is rarer is special, and 5 is its match
    assert near[7].size == 0


def test_swap_changes_the_same_positions_in_both_arms_and_only_matched_tokens():
    V = 40
    matches = matches_of([(10, 11, 0.5), (11, 10, 0.5)], V)
    given = setting(matches=matches, frequency_V=np.ones(V, int), V=V)
    rng = np.random.default_rng(0)
    ids_NT = rng.integers(5, V, (30, 8)).astype(np.int32)
    ids_NT[:20, 2:5] = 10
    ids_NT[20:][np.isin(ids_NT[20:], (10, 11))] = 12
    segment_NT = np.ones_like(ids_NT)
    segment_NT[:, 7] = 0
    examples = classifier.Examples(ids_NT, segment_NT, np.zeros(30, np.int32), np.zeros(30, bool))
    rows_N = np.arange(30)[::-1].copy()
    bench = apt_finetune.Bench(None, "text", examples, [rows_N], [rows_N], 0.0)
    seen = []

    def answers(params, examples, rows):
        seen.append(examples.ids_NT[rows])
        return np.stack([np.zeros(len(rows)), (examples.ids_NT[rows] == 11).sum(1) - 0.5], 1)

    cfg = apt_finetune.FinetuneConfig(replace_shares=(0.5, 0.2, 0.5))
    logits_GNC = answers(None, examples, rows_N)[None]
    found = apt_finetune.swap(cfg, given, bench, [None], logits_GNC, answers)
    original, *swapped = seen
    for k in range(2):
        strong, random = swapped[2 * k : 2 * k + 2]
        np.testing.assert_array_equal(strong != original, random != original)
        changed = strong != original
        np.testing.assert_array_equal(changed.sum(1), found["swap_count"][0, k])
        assert set(original[changed]) <= {10, 11} and set(strong[changed]) <= {10, 11}
        assert not set(random[changed]) & {0, 1, 2, 3, 4, 10, 11}
        assert not changed[:, 7].any()  # padding
    # 5 tokens between [CLS] and [SEP]: one at 20 %, two at 50 %, as far as there are tokens with a match
    assert found["swap_count"][0, 0, ::-1][:20].tolist() == [1] * 20
    assert (found["swap_count"][0, 1, ::-1][:20] == 2).all() and (found["swap_count"][0, :, ::-1][:, 20:] == 0).all()
    assert found["swap_types"].tolist() == [2] and np.isfinite(found["swap_frequency"]).all()
    effect = apt_finetune.swap_effect(found)
    assert effect["texts"].tolist() == [[20, 20]]
    assert effect["drop"][0, 1, 0] > 0 and np.isfinite(effect["drop"]).all()
    none = {name: value.copy() for name, value in found.items()}
    none["swap_count"][:] = 0
    assert np.isnan(apt_finetune.swap_effect(none)["drop"]).all()


def test_input_apt_passes_over_specials_padding_and_unknown():
    apt_V = np.array([np.nan, 0.9, 0.9, 0.9, 0.9, 0.5, 0.25, np.nan, 0, 0, 0, 1.0])  # 11: seen three times only
    ids_NT = np.array([[2, 5, 6, 3, 0, 0], [2, 7, 11, 3, 0, 0], [2, 5, 7, 1, 3, 5]], np.int32)
    segment_NT = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]], np.int32)
    examples = classifier.Examples(ids_NT, segment_NT, np.zeros(3, np.int32), np.zeros(3, bool))
    rows_N = np.arange(3)
    bench = apt_finetune.Bench(None, "text", examples, [rows_N], [rows_N], 0.0)
    np.testing.assert_allclose(apt_finetune.input_apt(setting(apt_V), bench, 10), [[0.375, np.nan, 0.5]])


def test_starts_are_snapshots_a_factor_4_apart_smaller_subsets_and_methods():
    cfg = apt_finetune.FinetuneConfig(transfer_snapshots=2, methods=("full", "lora"))
    assert apt_finetune.starts(cfg, setting()) == [
        (500, 128, "full"), (500, 512, "full"), (100, 50, "full"), (500, 1024, "lora"),
    ]  # fmt: skip


def made(confidence_slope: float, seed: int, G: int = 3, N: int = 400, M: int = 3):
    """A task's results with a known dependence of confidence on APT and accuracies that rise along the blocks."""
    rng = np.random.default_rng(seed)
    apt_GN = rng.uniform(0.2, 0.8, (G, N)).astype(np.float32)
    label = rng.integers(0, 4, (G, N))
    wrong = rng.random((G, N)) < 0.3
    probability = 0.6 + confidence_slope * (apt_GN - 0.5) + rng.normal(0, 0.03, (G, N))
    probes = np.where(rng.random((G, 2, M, N)) < np.linspace(0.3, 0.9, M)[:, None], label[:, None, None], -1)
    effects = {
        "swap_p": np.stack([np.full((G, 1, N), 0.5), np.full((G, 1, N), 0.4)], 2),
        "swap_hit": np.ones((G, 1, 2, N), bool), "swap_same": np.ones((G, 1, 2, N), bool),
        "swap_count": np.ones((G, 1, N), int), "swap_tokens": np.full((G, N), 4),
        "swap_types": np.full(G, 30), "swap_frequency": np.zeros((G, 1, 2)),
        "swap_p_before": np.full((G, N), 0.6) + rng.normal(0, 0.01, (G, 1)),
    }  # fmt: skip
    main = {
        "prediction": np.where(wrong, -1, label), "label": label, "probability": probability,
        "probe_prediction": probes, "probe_probability": np.where(probes >= 0, 0.9, 0.5),
        "loss": np.zeros(G), "steps": 5,
    } | effects  # fmt: skip
    scratch = main | {"prediction": np.where(rng.random((G, N)) < 0.5, -1, label)}
    rows_N = np.arange(N)
    task = apt_finetune.LabelledText("t", "f", tuple("abcd"), [""] * N, label[0].astype(np.int32), None)
    bench = apt_finetune.Bench(task, "text", None, [rows_N] * G, [rows_N] * G, 0.0)
    others = {
        apt_finetune.Start(500, 512, "full"): main | {"prediction": np.where(rng.random((G, N)) < 0.4, -1, label)}
    }
    return apt_finetune.Found(bench, main, scratch, others, apt_GN)


@pytest.mark.parametrize(("slope", "verdict"), [(0.02, "supported"), (0.3, "not supported"), (-0.3, "not supported")])
def test_independence_of_confidence_is_judged_by_the_margin(slope, verdict):
    cfg = apt_finetune.FinetuneConfig(replace_shares=(0.4,))
    judged = {c.id: c for c in apt_finetune.judge(cfg, setting(), [made(slope, 1)])}
    for group in ("all", "right", "wrong"):
        claim = judged[f"t-confidence-apt-{group}"]
        assert claim.verdict == verdict and claim.measured == pytest.approx(slope * 0.54, abs=0.02)
        assert "in [-0.05, 0.05]" in claim.rule
    assert judged["t-blocks-mean"].verdict == judged["t-pretraining"].verdict == "supported"
    assert judged["t-transfer"].verdict == judged["t-replacement"].verdict == "supported"
    assert judged["t-replacement"].measured == pytest.approx(0.1)


def verdicts(found, cfg=None):
    cfg = cfg or apt_finetune.FinetuneConfig(replace_shares=(0.4,))
    return {c.id: c.verdict for c in apt_finetune.judge(cfg, setting(), [found])}


def test_what_cannot_be_decided_is_not_tested():
    few = made(0.3, 1)
    few.main["swap_count"][:] = 0
    assert verdicts(few)["t-replacement"] == "not tested"
    two_words = made(0.3, 1)
    two_words.main["swap_types"][:] = 2
    assert verdicts(two_words)["t-replacement"] == "not tested"
    hardly = made(0.3, 1)
    hardly.main["swap_tokens"][:] = 40
    assert verdicts(hardly)["t-replacement"] == "not tested"
    right = made(0.3, 1)
    right.main["prediction"][:] = right.main["label"]
    found = verdicts(right)
    assert found["t-confidence-apt-wrong"] == found["t-confidence-apt-right"] == "not tested"
    assert found["t-confidence-apt-all"] == "not supported"
    saturated = made(0.0, 1)
    saturated.main["probability"][:] = 1.0 - 0.001 * saturated.apt_GN
    assert verdicts(saturated)["t-confidence-apt-all"] == "not tested"
    ceiling = made(0.3, 1)
    ceiling.main["probe_prediction"][:] = ceiling.main["label"][:, None, None]
    assert verdicts(ceiling)["t-blocks-mean"] == verdicts(ceiling)["t-blocks-cls"] == "not tested"


def test_association_and_bins_agree_with_scipy():
    from scipy import stats

    rng = np.random.default_rng(3)
    x, y = np.round(rng.normal(size=200), 1).astype(np.float32), rng.normal(size=200).astype(np.float32)
    y += 0.5 * x
    use = rng.random(200) < 0.7
    x[5] = np.nan
    found = metrics.association(x, y, use)
    ok = use & np.isfinite(x)
    assert int(found.count) == ok.sum()
    assert float(found.pearson) == pytest.approx(stats.pearsonr(x[ok], y[ok]).statistic, abs=1e-5)
    assert float(found.spearman) == pytest.approx(stats.spearmanr(x[ok], y[ok]).statistic, abs=1e-5)
    assert float(found.slope) == pytest.approx(stats.linregress(x[ok], y[ok]).slope, abs=1e-5)
    spread = np.percentile(x[ok], 95) - np.percentile(x[ok], 5)
    assert float(found.change) == pytest.approx(float(found.slope) * spread, abs=1e-5)
    constant = metrics.association(np.ones(9), np.arange(9), np.ones(9, bool))
    assert np.isnan(constant.pearson) and np.isnan(constant.slope) and int(constant.count) == 9
    assert float(found.most) == pytest.approx(float(found.change) / float(found.pearson), rel=1e-4)
    both = jax.vmap(lambda i: metrics.association(jnp.asarray(x)[i], jnp.asarray(y)[i], jnp.asarray(ok)[i]))(
        jnp.stack([jnp.arange(200), jnp.arange(200)[::-1]])
    )
    np.testing.assert_allclose(both.slope, float(found.slope), rtol=1e-4)
    bins = np.asarray(metrics.equal_count_bins(x, use, 7))
    assert (bins[~ok] == -1).all() and set(np.bincount(bins[ok])) <= {ok.sum() // 7, ok.sum() // 7 + 1}
    assert all(x[bins == q].max() <= x[bins == q + 1].min() for q in range(6))


def test_a_name_of_the_user_makes_a_safe_file_name():
    assert apt_finetune.slug("/a/b c<d>.csv") == "b_c_d_.csv"
    assert apt_finetune.slug("\u4e2d") == "task" and "/" not in apt_finetune.slug("tfds:a/b:1.0.0")
    assert Path(apt_finetune.slug("x" * 500)).name == "x" * 60
