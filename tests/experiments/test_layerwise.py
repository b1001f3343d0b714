"""The layer-wise study: end to end at a size of seconds, resume, its numbers against plain NumPy, bad input."""

from __future__ import annotations

import base64
import csv
import dataclasses
import json
import os
import re
import shutil
import types
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

import bert6_jax.train
from bert6_jax import checkpoint, classifier, transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.data.labelled import LabelledText, Split
from bert6_jax.data.tokenizer import SPECIALS, load_tokenizer, wordpiece
from experiments import apt, layerwise
from experiments.harness import cli
from experiments.harness.claims import VERDICTS
from experiments.harness.run import Run
from experiments.layerwise import LayerwiseConfig
from sae_jax import dictionary, evaluate
from sae_jax import train as dictionaries
from sae_jax.config import DictionaryConfig

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "<", ">", "/", "script", "not", "br")
TELLING = (("goal", "match", "team"), ("vote", "law", "party"))
VOCABULARY = (*SPECIALS, *WORDS, *TELLING[0], *TELLING[1])
CLASSES = ("<img src=x onerror=alert(1)>", "</script><b>law")
MODEL = TransformerConfig(len(VOCABULARY), 16, 2, 2, 8, 32, 16, init_std=0.3)
G, J, F, K = 2, 3, 24, 3  # seeds, depths, latents of the tiny run
QUICK = [
    "--seeds", G, "--epochs", "8", "--batch", "16", "--lr", "1e-2", "--test-per-class", "20", "--latents", F,
    "--k", K, "--dictionary-lr", "3e-3", "--dictionary-batch", "64", "--dictionary-steps", "24", "--buffer", "1024",
    "--checkpoint-every", "5", "--browser-latents", "8", "--contexts", "3", "--dead-after", "2000", "--quiet",
]  # fmt: skip
TABLES = ("accuracy", "similarity_by_depth", "dictionaries", "matching")
QUIET = types.SimpleNamespace(quiet=True)  # all that some functions ask of a run


def main(*options):
    given = [str(option) for option in options]
    presets, words = layerwise.PRESETS, "about layers"
    return cli.main("layerwise", LayerwiseConfig, presets, layerwise.run_layerwise, words, argv=given)


def tiny(world, *options):
    return ["--preset", "corrected", "--model", world / "model", "--task", world / "news.csv", *QUICK, *options]


def make_params(seed: int, cfg: TransformerConfig = MODEL):
    return jax.jit(transformer.init, static_argnums=1)(jax.random.key(seed), cfg)


def make_texts(per_class: int, seed: int = 0, telling: bool = True):
    rng, seen = np.random.default_rng(seed), {}
    while len(seen) < 2 * per_class:
        label = len(seen) % 2
        words = [*rng.choice(WORDS, rng.integers(2, 9)), *rng.choice(TELLING[label if telling else 0], 2)]
        seen.setdefault(" ".join(rng.permutation(words)), label)
    return list(seen), np.array(list(seen.values()), np.int32)


def write_csv(path: Path, texts, labels) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *zip(texts, labels, strict=True)])
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a small model, its tokenizer, and two classes of text with hostile names."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = wordpiece(VOCABULARY)
    tokenizer.save(folder / "tokenizer.json")
    described = {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "file": "tokenizer.json"}
    checkpoint.save(
        folder / "model", make_params(0), kind="transformer", config=dataclasses.asdict(MODEL), tokenizer=described
    )
    texts, label_N = make_texts(44)
    write_csv(folder / "news.csv", texts, [CLASSES[label] for label in label_N])
    return folder


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    for name in ("BERT6_JAX_CACHE", "TFDS_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp() / name))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    for name in ("BERT6_JAX_CACHE", "TFDS_DATA_DIR"):
        os.environ[name] = str(tmp_path_factory.getbasetemp() / name)
    out = tmp_path_factory.mktemp("layerwise") / "run"
    assert main(*tiny(world), "--out", out) == 0
    return out


def rows(out, name):
    with (out / "tables" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(out):
    """Everything that must not depend on how often a run was killed."""
    files = [out / "claims.json", out / "metrics.jsonl", out / "report.html", *sorted((out / "tables").glob("*.csv"))]
    texts = {file.name: file.read_text() for file in files}
    texts["metrics.jsonl"] = sorted(texts["metrics.jsonl"].splitlines())
    texts["report.html"] = re.sub(r"--out \S+?/run\b", "", texts["report.html"])
    return texts


def opened(out, world, **changes):
    """Configuration, model, task, classifiers and dictionaries of a finished run, read from its files."""
    record = json.loads((out / "config.json").read_text())["config"]
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    cfg = LayerwiseConfig(**(fields | changes))
    base = layerwise.load_base(QUIET, cfg)
    bench = layerwise.load_task(cfg, base, str(world / "news.csv"))
    folder = out / "checkpoints" / bench.name
    tuned = [checkpoint.load(folder / "pre-trained" / f"seed{g}").tree for g in range(cfg.seeds)]
    return cfg, base, bench, tuned


def bank_of(out, bench) -> layerwise.Bank:
    trees, members = [], []
    for name in ("dictionaries-before", "dictionaries-after"):
        tree, cfg, found = dictionary.load(out / "checkpoints" / bench.name / name)
        trees.append(jax.tree.map(np.asarray, tree))
        members += found.extra["members"]
    tree = jax.tree.map(lambda *leaves: jnp.asarray(np.concatenate(leaves)), *trees)
    model_of = {"pre-trained": 0} | {f"fine-tuned, seed {g}": 1 + g for g in range(G)}
    sites = np.array([model_of[m["model"]] * J + m["depth"] for m in members])
    return layerwise.Bank(cfg, tree, (0, 1, 2), G, sites, np.zeros(len(sites)))


# --- an oracle: BERT in NumPy, one text at a time --------------------------------------------------------------------


def numpy_bert(params, ids_T, cfg=MODEL, real=None, at=None, fn=None):
    """Residual stream `[M, T, D]` in float64; `real` positions are seen (default: all), `fn` replaces them at `at`."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    real_T = np.arange(len(ids_T)) < (len(ids_T) if real is None else real)

    def norm(w, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + cfg.norm_eps) * w["scale"] + w["bias"]

    def dense(w, x):
        return x @ w["kernel"] + w["bias"]

    def replaced(depth, x):
        return np.where(real_T[:, None], fn(x), x) if depth == at else x

    e = p["embed"]
    x = replaced(0, norm(e["norm"], e["token"][ids_T] + e["type"][0] + e["position"][: len(ids_T)]))
    stream = [x]
    for m in range(cfg.blocks):
        b = jax.tree.map(lambda leaf, m=m: leaf[m], p["blocks"])
        q, k, v = (dense(b["attn"][n], x).reshape(len(x), cfg.heads, -1).swapaxes(0, 1) for n in "qkv")
        scores = np.where(real_T, q @ k.swapaxes(1, 2) / np.sqrt(cfg.head_width), -np.inf)
        pattern = np.exp(scores - scores.max(-1, keepdims=True))
        z = (pattern / pattern.sum(-1, keepdims=True)) @ v
        x = norm(b["norm_attn"], x + dense(b["attn"]["out"], z.swapaxes(0, 1).reshape(len(x), -1)))
        h = dense(b["mlp"]["in"], x)
        x = norm(b["norm_mlp"], x + dense(b["mlp"]["out"], h * (1 + erf(h / np.sqrt(2))) / 2))
        x = replaced(m + 1, x)
        stream.append(x)
    return np.stack(stream)


def states(params, examples, rows_N, cfg=MODEL):
    """The stream of the tokens that are no padding, text after text without any padding: `[M, Y, D]`."""
    texts = [examples.ids_NT[row][examples.segment_NT[row] > 0] for row in rows_N]
    return np.concatenate([numpy_bert(params, ids, cfg) for ids in texts], axis=1)


def cosine(a, b):
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def numpy_codes(tree, x, k=K):
    """Codes and reconstruction of a topk dictionary (raw activations), in float64."""
    p, norm = (jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree[name]) for name in ("params", "norm"))
    y = (x - norm["mean"][0]) * norm["scale"][0]
    pre = (y - p["b_dec"][0]) @ p["W_enc"][0].T + p["b_enc"]
    z = np.where(pre >= np.sort(pre, axis=-1)[:, [-k]], np.maximum(pre, 0), 0)
    return z, (z @ p["W_dec"][0] + p["b_dec"][0]) / norm["scale"][0] + norm["mean"][0]


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_every_file_of_the_contract_is_there(finished):
    for name in ("config.json", "metrics.jsonl", "claims.json", "report.html"):
        assert (finished / name).stat().st_size > 0, name
    assert {file.stem for file in (finished / "tables").iterdir()} == set(TABLES)
    assert {file.stem for file in (finished / "figures").iterdir()} == {
        "similarity_by_depth", "cka_of_depths", "retained_by_depth", "association_by_depth", "dictionary_quality",
    }  # fmt: skip
    claims = json.loads((finished / "claims.json").read_text())
    assert len({c["id"] for c in claims}) == len(claims) == 8
    for claim in claims:
        assert claim["verdict"] in VERDICTS and claim["rule"] and claim["paper"].startswith("arXiv 2502.16722")
        assert claim["seeds"] == G and claim["measured"] is not None
    folder = finished / "checkpoints" / "news"  # nothing that only training needs is left
    assert {path.name for path in folder.glob("*trained/*")} == {f"seed{g}" for g in range(G)}
    assert not list(folder.glob("*-state"))
    stages = {file.stem for file in (finished / "stages").iterdir()}
    assert {"base", "read-news", "similarity-news", "similarity-news-seeds", "similarity-news-untrained"} < stages
    logged = {json.loads(line)["stage"] for line in (finished / "metrics.jsonl").read_text().splitlines()}
    assert {"finetune-news-pre-trained", "finetune-news-untrained"} < logged
    assert {"dictionaries-before-news", "dictionaries-after-news"} < logged


def test_tables_cover_tasks_pairs_models_depths(finished):
    pairs = [(r["pair"], r["depth"]) for r in rows(finished, "similarity_by_depth")]
    assert pairs == [(pair, str(m)) for pair in ("before, after", "other seed", "untrained") for m in range(J)]
    table = rows(finished, "dictionaries")
    assert [(r["model"], r["depth"]) for r in table] == [
        (model, str(m)) for model in ("pre-trained", "fine-tuned") for m in range(J)
    ]
    for r in table:
        assert 0 < float(r["l0"]) <= K and 0 <= float(r["dead"]) <= float(r["rare"]) <= 1
        assert all(0 <= float(r[name]) <= 1 for name in ("auroc", "auroc_shuffled"))
        assert float(r["auroc"]) >= 0.5 <= float(r["auroc_shuffled"])  # two classes: the better one is at least that
        assert (r["ev_of_fine_tuned"] == "") == (r["model"] == "fine-tuned")
        assert float(r["gamma"]) > 0
    for r in rows(finished, "matching"):
        for arm in ("", "control_", "chance_"):
            assert sum(float(r[arm + kind]) for kind in ("retained", "rotated", "new")) == pytest.approx(1)
        assert -1 <= float(r["correlation"]) <= 1
    (row,) = rows(finished, "accuracy")
    assert (row["classes"], row["train_rows"], row["test_rows"], row["shared_texts"]) == ("2", "48", "40", "0")


def test_two_fine_tunings_are_one_pair_and_have_no_interval(finished):
    lines = [r for r in rows(finished, "similarity_by_depth") if r["pair"] == "other seed"]
    assert all(r["cosine"] and r["cosine_low"] == r["cosine_high"] == "" for r in lines)
    lines = [r for r in rows(finished, "similarity_by_depth") if r["pair"] == "before, after"]
    assert all(float(r["cosine_low"]) < float(r["cosine"]) < float(r["cosine_high"]) for r in lines)


def test_accuracies_are_those_of_the_checkpoints(finished, world):
    cfg, base, bench, tuned = opened(finished, world)
    found = []
    for g in range(G):
        params, model, saved = checkpoint.load_transformer(
            finished / "checkpoints" / "news" / "pre-trained" / f"seed{g}"
        )
        assert model.head == "none" and saved.extra["classes"] == sorted(CLASSES) and saved.extra["pooling"] == "cls"
        right = []
        for row in bench.split.test:
            x = numpy_bert(params, bench.examples.ids_NT[row][bench.examples.segment_NT[row] > 0])[-1, 0]
            right.append(logits_of(params, x).argmax() == bench.examples.label_N[row])
        found.append(np.mean(right))
    (row,) = rows(finished, "accuracy")
    assert float(row["fine_tuned"]) == pytest.approx(np.mean(found), abs=1e-9) and np.mean(found) > 0.7
    assert 0.2 < float(row["random_head"]) < 0.8


def logits_of(params, x_D):
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), {k: params[k] for k in ("pooler", "classifier")})
    x_D = np.tanh(x_D @ p["pooler"]["kernel"] + p["pooler"]["bias"])
    return x_D @ p["classifier"]["kernel"] + p["classifier"]["bias"]


def test_similarity_of_the_tables_pairs_seed_g_with_seed_g(finished, world):
    cfg, base, bench, tuned = opened(finished, world)
    before = states(base.params, bench.examples, bench.split.test)
    after = [states(params, bench.examples, bench.split.test) for params in tuned]
    stage = np.load(finished / "stages" / "similarity-news.npz")
    expected = np.stack([cosine(before, x).mean(-1) for x in after])
    assert np.abs(expected[0] - expected[1]).max() > 1e-3  # else the order could not be seen
    np.testing.assert_allclose(stage["cosine"], expected, atol=1e-5)
    assert stage["tokens"] == before.shape[1] and stage["layers"].shape == (G, J, J)
    seeds = np.load(finished / "stages" / "similarity-news-seeds.npz")
    np.testing.assert_allclose(seeds["cosine"], cosine(after[0], after[1]).mean(-1)[None], atol=1e-5)
    for m, row in enumerate(rows(finished, "similarity_by_depth")[:J]):
        assert float(row["cosine"]) == pytest.approx(expected[:, m].mean(), abs=1e-5)
        assert int(row["tokens"]) == before.shape[1]


def test_started_again_it_trains_nothing_and_says_the_same(finished, world, monkeypatch):
    before = numbers(finished)

    def trained(*_, **__):
        raise AssertionError("something was trained again")

    monkeypatch.setattr(bert6_jax.train, "fit", trained)
    for name in ("compare", "evaluate_bank"):
        monkeypatch.setattr(layerwise, name, trained)
    assert main(*tiny(world), "--out", finished) == 0
    assert numbers(finished) == before


@pytest.mark.parametrize("name", ["dictionaries-before", "dictionaries-after"])
def test_killed_in_the_middle_of_the_bank_it_ends_with_the_same_numbers(finished, world, tmp_path, monkeypatch, name):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for path in ("stages/read-news.npz", f"checkpoints/news/{name}"):  # as if it had never come so far
        shutil.rmtree(out / path) if (out / path).is_dir() else (out / path).unlink()
    if name.endswith("before"):
        shutil.rmtree(out / "checkpoints" / "news" / "dictionaries-after")
    log, started = Run.log, []

    def interrupted(self, stage, step, **values):
        log(self, stage, step, **values)
        if stage == f"{name}-news" and step == 8:
            raise KeyboardInterrupt

    def rewound(self, stage, step):
        started.append((stage, step))
        return rewind(self, stage, step)

    rewind = Run.rewind
    monkeypatch.setattr(Run, "log", interrupted)
    assert main(*tiny(world), "--out", out) == 130
    assert checkpoint.steps(out / "checkpoints" / "news" / f"{name}-state") == [5]
    monkeypatch.setattr(Run, "log", log)
    monkeypatch.setattr(Run, "rewind", rewound)
    assert main(*tiny(world), "--out", out) == 0
    assert (f"{name}-news", 5) in started and not (out / "checkpoints" / "news" / f"{name}-state").exists()
    assert numbers(out) == numbers(finished)
    trees = [dictionary.load(folder / "checkpoints" / "news" / name)[0] for folder in (out, finished)]
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_a_fine_tuned_model_can_be_studied_further_and_its_tokenizer_lies_beside_it(finished):
    path = finished / "checkpoints" / "news" / "pre-trained" / "seed1"
    base = layerwise.load_base(QUIET, LayerwiseConfig(model=str(path)))
    assert base.masking is None and base.lang is None and base.tokenizer.tokens == VOCABULARY


def packed(html):
    texts = re.findall(r'<script type="text/plain">([A-Za-z0-9+/=]*)</script>', html)
    return [json.loads(zlib.decompress(base64.b64decode(text))) for text in texts]


def test_the_report_has_browser_and_sentences_and_hostile_names_are_text(finished):
    html = (finished / "report.html").read_text()
    for name in CLASSES:
        assert name not in html
    assert "&lt;img src=x onerror=alert(1)&gt;, depth 1" in html and "&lt;/script&gt;&lt;b&gt;law, depth 2" in html
    assert "<img src=x" not in html and "&lt;" in html
    words, *groups = packed(html)
    assert set(words) <= set(VOCABULARY) and {"<", "script"} <= set(words)
    named = [f"depth {m}, {model}" for model in ("pre-trained", "fine-tuned") for m in range(J)]
    assert len(groups) == 2 * J and all(name in html for name in named)
    assert all(0 < len(group["index"]) <= 8 for group in groups)
    assert [g["against"] for g in groups] == [None] * J + list(range(J))


def test_the_browser_shows_codes_and_partners_that_the_dictionaries_have(finished, world):
    cfg, base, bench, tuned = opened(finished, world)
    bank, found = bank_of(finished, bench), dict(np.load(finished / "stages" / "read-news.npz"))
    shares, matching = layerwise.compare_dictionaries(cfg, bank, found)
    result = layerwise.Result(bench, None, {}, {}, bank, found, shares, matching)
    groups = layerwise.feature_groups(QUIET, cfg, base, result, [base.params, tuned[0]], base.tokenizer.tokens)
    for (w, j), group in zip([(w, j) for w in (0, 1) for j in range(J)], groups, strict=True):
        tree = jax.tree.map(lambda leaf: leaf[w * G * J + j], bank.tree)  # noqa: B023
        x = [states((base.params, tuned[0])[w], bench.examples, [row])[j] for row in bench.split.test]
        z = [numpy_codes(tree, one)[0] for one in x]
        feature = group.features[0]
        strongest = sorted((z_TF[:, feature.index].max() for z_TF in z), reverse=True)
        shown = [max(context.values) for context in feature.contexts]
        np.testing.assert_allclose(shown, strongest[: len(shown)], rtol=1e-3, atol=1e-4)
        density = np.mean(np.concatenate(z)[:, feature.index] > 0)
        assert feature.density == pytest.approx(density, abs=2e-3)
        if w:
            cosines = evaluate.cosines(*(np.asarray(bank.tree["params"]["W_dec"][bank.of(v, 0, j), 0]) for v in (0, 1)))
            for shown in group.features:
                assert shown.cosine == pytest.approx(cosines[shown.matched, shown.index], abs=1e-5)
                assert shown.status == (
                    "retained" if shown.cosine >= 0.9 else "rotated" if shown.cosine >= 0.5 else "new"
                )


# --- the numbers of the dictionaries ---------------------------------------------------------------------------------


def test_members_read_the_sites_that_they_say(finished, world):
    """The mean that a dictionary keeps is that of the activations it was fitted on; no two sites share one."""
    cfg, base, bench, tuned = opened(finished, world)
    bank = bank_of(finished, bench)
    assert bank.control and len(bank.sites) == 3 * G * J
    models = [base.params, *tuned]
    mean_SD = np.concatenate([states(params, bench.examples, bench.split.train).mean(1) for params in models])
    stored_MD = np.asarray(bank.tree["norm"]["mean"])[:, 0]
    nearest_M = np.linalg.norm(stored_MD[:, None] - mean_SD[None], axis=-1).argmin(1)
    site = [x * J + j for w in range(3) for g in range(G) for j in range(J) for x in [1 + g if w == 1 else 0]]
    np.testing.assert_array_equal(nearest_M, site)
    np.testing.assert_array_equal(bank.sites, site)
    assert [bank.of(w, g, j) for w in range(3) for g in range(G) for j in range(J)] == list(range(len(site)))
    np.testing.assert_array_equal(bank.block(bank.sites, 1), np.array(site[G * J : 2 * G * J]).reshape(G, J))


def test_every_number_of_a_member_is_the_direct_one(finished, world):
    """Density, explained variance, cosine, L0, association and losses of members against NumPy."""
    cfg, base, bench, tuned = opened(finished, world)
    bank, found = bank_of(finished, bench), dict(np.load(finished / "stages" / "read-news.npz"))
    assert (found["l0"] <= K + 1e-9).all() and (found["density_F"] >= 0).all() and (found["density_F"] <= 1).all()
    assert found["density_F"].shape == found["auroc"].shape == (3 * G * J, F) and found["spliced"].shape == (18, 3)
    assert np.isnan(found["spliced"][2 * G * J :]).all() and np.isfinite(found["spliced"][: 2 * G * J]).all()
    examples, test = bench.examples, bench.split.test
    label_N = examples.label_N[test]
    codes = {}
    for w, g, j in ((0, 1, 1), (1, 1, 1), (2, 0, 2)):
        m, params = bank.of(w, g, j), tuned[g] if w == 1 else base.params
        tree = jax.tree.map(lambda leaf, m=m: np.asarray(leaf[m]), bank.tree)
        x = states(params, examples, test)[j]
        z, xhat = numpy_codes(tree, x)
        codes[w] = z
        spread = np.square(x - x.mean(0)).sum()
        assert found["ev_global"][m] == pytest.approx(1 - np.square(x - xhat).sum() / spread, abs=1e-4)
        assert found["cosine"][m] == pytest.approx(cosine(x, xhat).mean(), abs=1e-4)
        np.testing.assert_allclose(found["density_F"][m], (z > 0).mean(0), atol=2 / len(z))
        by_text = np.split(z, np.cumsum([(examples.segment_NT[row] > 0).sum() for row in test])[:-1])
        best_NF = np.stack([part.max(0) for part in by_text])
        one = best_NF[label_N == 1][:, None] - best_NF[label_N == 0][None]
        auroc_F = ((one > 0) + 0.5 * (one == 0)).mean((0, 1))
        np.testing.assert_allclose(found["auroc"][m], np.maximum(auroc_F, 1 - auroc_F), atol=0.02)
        if w == 0:
            y = states(tuned[g], examples, test)[j]
            error = np.square(y - numpy_codes(tree, y)[1]).sum()
            expected = 1 - error / np.square(y - y.mean(0)).sum()
            assert found["ev_of_fine_tuned"][g * J + j] == pytest.approx(expected, abs=1e-4)
            assert abs(expected - found["ev_global"][m]) > 1e-3
        if w == 1:
            losses = []
            for fn in (lambda x: x, lambda x, tree=tree: numpy_codes(tree, x)[1], np.zeros_like):
                nats = []
                for row, label in zip(test, label_N, strict=True):
                    ids = examples.ids_NT[row][examples.segment_NT[row] > 0]
                    logits = logits_of(params, numpy_bert(params, ids, at=j, fn=fn)[-1, 0])
                    nats.append(np.log(np.exp(logits).sum()) - logits[label])
                losses.append(np.mean(nats))
            np.testing.assert_allclose(found["spliced"][m], losses, rtol=2e-3, atol=1e-4)
    both = np.corrcoef(codes[0].T, codes[1].T)[:F, F:] if (codes[0].std(0) > 0).all() else None
    expected = np.array([[np.corrcoef(a, b)[0, 1] if a.std() * b.std() > 0 else 0.0 for b in codes[1].T]
                         for a in codes[0].T]) if both is None else both  # fmt: skip
    np.testing.assert_allclose(found["correlation"][1 * J + 1], expected, atol=5e-3)


def test_the_tables_are_means_over_seeds_of_what_was_read(finished):
    found = dict(np.load(finished / "stages" / "read-news.npz"))
    table = rows(finished, "dictionaries")
    for w in (0, 1):
        for j in range(J):
            at = [(w * G + g) * J + j for g in range(G)]
            row = table[w * J + j]
            assert float(row["ev_global"]) == pytest.approx(found["ev_global"][at].mean())
            clean, loss, zeros = found["spliced"][at].T
            harm = zeros > clean  # where zeros do no harm there is nothing to recover
            expected = ((zeros - loss) / (zeros - clean))[harm]
            told = float(row["loss_recovered"] or "nan")
            assert told == pytest.approx(expected.mean() if harm.any() else np.nan, nan_ok=True)
            alive = [found["density_F"][m] > 0 for m in at]
            expected = np.mean([found["auroc"][m][a].mean() for m, a in zip(at, alive, strict=True)])
            assert float(row["auroc"]) == pytest.approx(expected)


def test_labels_without_signal_are_told_no_better_than_shuffled_ones(finished, world):
    cfg, base, bench, tuned = opened(finished, world)
    bank = bank_of(finished, bench)
    signal = dict(np.load(finished / "stages" / "read-news.npz"))
    label_N = np.random.default_rng(5).integers(0, 2, len(bench.examples.label_N)).astype(np.int32)
    blind = bench._replace(examples=bench.examples._replace(label_N=label_N))
    models = [base.params, *tuned]
    found = layerwise.evaluate_bank(QUIET, cfg, base, blind, bank, models)
    real, chance, told = (
        layerwise.alive_mean(f, name, bank)
        for f, name in ((found, "auroc"), (found, "auroc_shuffled"), (signal, "auroc"))
    )
    assert real.shape == (2, G, J) and (np.abs(real - chance) < 0.08).all() and (real < 0.65).all()
    best, blindly = (f["auroc"][G * J : 2 * G * J].max() for f in (signal, found))
    assert best > blindly + 0.1 and told[1, :, -1].mean() > chance[1, :, -1].mean()
    np.testing.assert_allclose(found["ev_global"], signal["ev_global"], atol=1e-6)  # labels change nothing else
    assert np.abs(layerwise.alive_mean(found, "mutual_information", bank)).max() < 0.02


# --- similarity ------------------------------------------------------------------------------------------------------


def make_bench(lengths, seed=0, padded_to=None, width=16):
    """Texts of the given lengths ([CLS] and [SEP] included), all of them to test on."""
    rng, N = np.random.default_rng(seed), len(lengths)
    T = padded_to or max(lengths)
    segment_NT = (np.arange(T) < np.array(lengths)[:, None]).astype(np.int32)
    words_NT = rng.integers(5, len(VOCABULARY), (N, width)).astype(np.int32)[:, :T]
    ids_NT = np.where(segment_NT > 0, words_NT, 0).astype(np.int32)
    ids_NT[:, 0] = 2
    ids_NT[np.arange(N), np.array(lengths) - 1] = 3
    label_N = np.arange(N, dtype=np.int32) % 2
    task = LabelledText("made", "", CLASSES, [""] * N, label_N, None)
    rows_N = np.arange(N)
    examples = classifier.Examples(ids_NT, segment_NT, label_N, np.zeros(N, bool))
    return layerwise.Bench(task, examples, Split(rows_N, rows_N[::-1].copy(), 0))


BASE = types.SimpleNamespace(model=MODEL)


def test_compare_is_the_cosine_of_the_tokens_that_are_no_padding():
    a, b = make_params(1), make_params(2)
    b = jax.tree.map(lambda x, y: 0.7 * x + 0.3 * y, a, b)
    lengths = np.random.default_rng(1).integers(3, 13, 37).tolist()
    bench = make_bench(lengths, padded_to=16)
    found = layerwise.compare(QUIET, BASE, bench, "test", [a, a], [b, a])
    x, y = (states(params, bench.examples, bench.split.test) for params in (a, b))
    assert found["tokens"] == sum(lengths)
    np.testing.assert_allclose(found["cosine"], [cosine(x, y).mean(-1), np.ones(J)], atol=1e-5)
    centred = cosine(x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)).mean(-1)
    np.testing.assert_allclose(found["centred_cosine"], [centred, np.ones(J)], atol=1e-5)
    for name in ("cka", "debiased_cka", "svcca", "pwcca", "rsa"):  # a model against itself
        np.testing.assert_allclose(found[name][1], 1.0, atol=1e-3)
        assert found[name][0, -1] < 0.999
    np.testing.assert_allclose(found["procrustes"][1], 0.0, atol=5e-3)
    # biased CKA between all depths, from the definition
    cx, cy = (v - v.mean(1, keepdims=True) for v in (x, y))
    cka = [np.square(p.T @ q).sum() / np.linalg.norm(p.T @ p) / np.linalg.norm(q.T @ q)
           for p, q in zip(cx, cy, strict=True)]  # fmt: skip
    np.testing.assert_allclose(found["cka"][0], cka, atol=1e-4)
    assert found["layers"].shape == (2, J, J) and not np.allclose(found["layers"][0], found["layers"][0].T, atol=1e-3)
    np.testing.assert_allclose(np.diagonal(found["layers"], axis1=1, axis2=2), found["debiased_cka"])


def test_compare_hangs_neither_on_padding_nor_on_batches(monkeypatch):
    a, b = make_params(1), make_params(2)
    lengths = np.random.default_rng(1).integers(3, 13, 37).tolist()
    narrow, wide = make_bench(lengths, padded_to=13), make_bench(lengths, padded_to=16)
    assert not (narrow.examples.ids_NT[:, 12:].any() or wide.examples.ids_NT[:, 12:].any())
    wide.examples.ids_NT[wide.examples.segment_NT == 0] = 7  # whatever stands in padding
    one, other = (layerwise.compare(QUIET, BASE, bench, "test", [a], [b]) for bench in (narrow, wide))
    monkeypatch.setattr(layerwise, "ROWS", 8)
    batched = layerwise.compare(QUIET, BASE, wide, "test", [a], [b])
    for name in (*layerwise.MEASURES, "layers", "tokens"):
        np.testing.assert_allclose(one[name], other[name], atol=2e-5, err_msg=name)
        if "shuffled" not in name:  # whose partners are drawn within a batch
            np.testing.assert_allclose(one[name], batched[name], atol=2e-4, err_msg=name)
    assert np.abs(one["shuffled"] - batched["shuffled"]).max() < 0.1


@pytest.mark.parametrize(
    ("lengths", "strangers"), [([9] * 32, 1.0), ([3, 12, 7, 9, 16, 5], 1.0), ([16, 3, 4], 0.5), ([8], 0.0)]
)
def test_shuffled_partners_are_tokens_of_other_texts(lengths, strangers):
    """Half of the batch's tokens further on: another text unless one text holds more than half of the tokens."""
    bench = make_bench(lengths)
    batch = bench.examples.filled(np.arange(len(lengths)), 0, layerwise.ROWS)
    assert len(batch["ids"]) == layerwise.ROWS and batch["valid"].sum() == len(lengths)
    stack = dictionaries.stack([layerwise.trunk_of(make_params(1))])
    *_, mask_Y, partner_Y = (np.asarray(x) for x in layerwise._pairs(stack, stack, batch, MODEL))
    T = batch["ids"].shape[1]
    valid_Y = ((batch["segment"] > 0) & batch["valid"][:, None]).reshape(-1)
    np.testing.assert_array_equal(mask_Y, valid_Y)
    tokens = np.flatnonzero(valid_Y)
    np.testing.assert_array_equal(np.sort(partner_Y[tokens]), tokens)  # each once, no padding
    share = np.mean(partner_Y[tokens] // T != tokens // T)
    assert share == strangers if strangers in (0.0, 1.0) else share > strangers
    assert (partner_Y[tokens] != tokens).all()


# --- banks -----------------------------------------------------------------------------------------------------------


def study_of(seeds, warm_start, **changes):
    """Configuration, model, task and models of a bank."""
    cfg = LayerwiseConfig(
        seeds=seeds, warm_start=warm_start, latents=F, k=K, dictionary_steps=2, dictionary_batch=32,
        buffer=1024, **changes,
    )  # fmt: skip
    tokenizer = wordpiece(VOCABULARY)
    base = layerwise.Base(make_params(0), MODEL, tokenizer, None, None, "made")
    tuned = [make_params(10 + g) for g in range(seeds)]
    return cfg, base, make_bench([9, 12, 6, 8, 11, 5, 16, 4] * 4), [base.params, *tuned]


class Recorder:
    """A run that only has a folder."""

    quiet = True

    def __init__(self, out):
        self.out = out

    def log(self, *_, **__):
        pass

    rewind = log


@pytest.mark.parametrize(("seeds", "warm_start"), [(1, False), (2, False), (1, True), (2, True)])
def test_a_bank_is_indexed_by_model_seed_and_depth(tmp_path, monkeypatch, seeds, warm_start):
    monkeypatch.setattr(bert6_jax.train, "fit", lambda step, state, *_, **__: state)  # every member as it starts
    cfg, base, bench, models = study_of(seeds, warm_start, depths=(2, 0))
    bank = layerwise.train_dictionaries(Recorder(tmp_path), cfg, base, bench, models)
    assert bank.depths == (0, 2) and bank.seeds == seeds and bank.control == (warm_start or seeds > 1)
    mean_XMD = np.stack([states(params, bench.examples, bench.split.train).mean(1) for params in models])
    found = np.asarray(bank.tree["norm"]["mean"])[:, 0]
    assert len(found) == len(bank.sites) == len(bank.gamma) == (3 if bank.control else 2) * seeds * 2
    W_MFD = np.asarray(bank.tree["params"]["W_dec"])[:, 0]
    for w in range(3 if bank.control else 2):
        for g in range(seeds):
            for j, depth in enumerate(bank.depths):
                m = bank.of(w, g, j)
                distance = np.linalg.norm(mean_XMD - found[m], axis=-1)
                model = 1 + g if w == 1 else 0
                assert np.unravel_index(distance.argmin(), distance.shape) == (model, depth)
                assert bank.sites[m] == model * 2 + j
                # the start: that of its seed, but the control without warm start has the next seed's
                start = (g + 1) % seeds if w == 2 and not warm_start else g
                key = jax.random.fold_in(jax.random.key(start), 40_009)
                np.testing.assert_allclose(W_MFD[m], dictionary.init(key, bank.cfg)["W_dec"][0], atol=1e-6)
    if not bank.control:
        density = {"density_F": np.ones((len(W_MFD), F)), "correlation": np.zeros((2, F, F))}
        shares, _ = layerwise.compare_dictionaries(cfg, bank, density)
        assert not [name for name in shares if name.startswith("control")] and (shares["retained"] == 1).all()


def test_sentence_rows_are_means_over_all_positions(tmp_path):
    cfg, base, bench, models = study_of(1, False)
    bench = make_bench([9, 12, 6, 8], padded_to=16)
    stack = dictionaries.stack([layerwise.trunk_of(params) for params in models])
    found = layerwise.sentence_means(cfg, base, bench, stack, (0, 2), np.array([2, 0, 3]))
    assert found.shape == (3, 4, MODEL.width)
    for n, row in enumerate((2, 0, 3)):
        for x, params in enumerate(models):
            ids, real = bench.examples.ids_NT[row], int(bench.examples.segment_NT[row].sum())
            mean_MD = numpy_bert(params, ids, real=real).mean(1)
            np.testing.assert_allclose(found[n, 2 * x : 2 * x + 2], mean_MD[[0, 2]], atol=1e-5)


def made_bank(before_FD, after_FD, control_FD=None):
    parts = [before_FD, after_FD] + ([] if control_FD is None else [control_FD])
    tree = {"params": {"W_dec": jnp.asarray(np.stack(parts), jnp.float32)[:, None]}}
    size = len(before_FD)
    cfg = DictionaryConfig(before_FD.shape[1], size, activation="topk", k=1)
    bank = layerwise.Bank(cfg, tree, (0,), 1, np.arange(len(parts)), np.ones(len(parts)))
    density = np.ones((len(parts), size))
    return bank, {"density_F": density, "correlation": np.zeros((1, size, size))}


def test_planted_permutations_rotations_and_strangers_are_found():
    """12 latents in 40 dimensions: 4 in another order, 3 turned by 45 degrees, 4 others, 1 dead before, 1 after."""
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))[0]
    before, after = axes[:12].copy(), np.zeros((12, 40))
    order = np.array([3, 0, 2, 1])
    after[order] = 2.5 * before[:4]  # lengths do not matter
    after[4:7] = (before[4:7] + axes[20:23]) / np.sqrt(2)
    after[7:10] = axes[30:33]
    after[10], after[11] = axes[34], before[11]
    bank, found = made_bank(before, after, before[::-1])
    found["density_F"][0, 10] = 0  # dead before: nobody's partner
    found["density_F"][1, 11] = 0  # dead after: not counted
    found["correlation"][0, np.arange(4), order] = 0.75
    shares, matching = layerwise.compare_dictionaries(LayerwiseConfig(), bank, found)
    counts = matching[0, 0].counts
    assert (counts["retained"], counts["rotated"], counts["new"], counts["dead"]) == (4, 3, 4, 1)
    np.testing.assert_array_equal(matching[0, 0].index_E[order], np.arange(4))
    np.testing.assert_array_equal(matching[0, 0].index_E[4:7], np.arange(4, 7))
    assert matching[0, 0].index_E[11] == -1 and 10 not in matching[0, 0].index_E
    assert [shares[kind][0, 0] for kind in ("retained", "rotated", "new")] == pytest.approx([4 / 11, 3 / 11, 4 / 11])
    # the control: the same directions, but for the one that was dead before
    assert shares["control_retained"][0, 0] == pytest.approx(11 / 12)
    assert shares["chance_retained"][0, 0] == 0.0 and shares["chance_new"][0, 0] > 0.7
    assert shares["correlation"][0, 0] == pytest.approx(4 * 0.75 / 11)
    strict = dataclasses.replace(LayerwiseConfig(), retained=1.0, rotated=0.99)
    assert layerwise.compare_dictionaries(strict, bank, found)[0]["rotated"][0, 0] <= 4 / 11


def test_means_over_latents_leave_the_silent_ones_out():
    tree = {"params": {"W_dec": jnp.zeros((4, 1, 3, 2))}}
    bank = layerwise.Bank(None, tree, (0, 1), 1, np.zeros(4), np.zeros(4))
    found = {"density_F": np.array([[0.1, 0.0, 0.2], [1, 1, 1], [0, 0, 0], [0, 0.5, 0]]),
             "auroc": np.array([[0.6, 0.1, 0.8], [0.5, 0.6, 0.7], [0.9, 0.9, 0.9], [0.2, np.nan, 0.3]])}  # fmt: skip
    found["auroc"][3] = [0.2, 0.9, np.nan]
    np.testing.assert_allclose(layerwise.alive_mean(found, "auroc", bank), [[[0.7, 0.6]], [[0.0, 0.9]]])


# --- presets ---------------------------------------------------------------------------------------------------------


def test_faithful_is_the_authors_dictionary():
    cfg = layerwise.PRESETS["faithful"]
    made = cfg.dictionary(768)
    assert (made.width, made.latents, made.activation, made.decoder) == (768, 1024, "relu", "free")
    assert not (made.subtract_bias or made.centre) and made.scale == "none" and made.penalty == "l1"
    assert made.code_norm == "none"
    params = layerwise.linear_start(jax.random.key(0), made)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 1_574_656
    for name, bound in (("W_enc", 768), ("b_enc", 768), ("W_dec", 1024), ("b_dec", 1024)):  # nn.Linear: 1 / sqrt(in)
        found = np.abs(np.asarray(params[name]))
        assert 0.98 * bound**-0.5 < found.max() <= bound**-0.5, name
        assert found.mean() == pytest.approx(bound**-0.5 / 2, rel=0.05), name
    assert not np.allclose(params["W_enc"], params["W_dec"])
    assert (cfg.split, cfg.clean, cfg.epochs, cfg.batch, cfg.lr, cfg.warmup) == ("random", True, 2, 16, 2e-5, 0.0)
    assert (cfg.unit, cfg.plain, cfg.dictionary_epochs, cfg.dictionary_batch) == ("sentence", True, 2.0, 16)
    assert (cfg.sparsity, cfg.dictionary_lr, cfg.warm_start, cfg.seeds) == (1e-3, 2e-5, False, 1)
    training = cfg.training(1_000)
    rates = [float(dictionaries.rate(training, step)) for step in (0, 1, 500, 999)]
    assert rates == [1.0] * 4 and training.sparsity_warmup == 0.0


def test_corrected_has_masked_tokens_a_text_split_and_seeds():
    for name in ("corrected", "demo"):
        cfg = layerwise.PRESETS[name]
        assert (cfg.unit, cfg.split, cfg.clean, cfg.plain, cfg.warm_start) == ("token", "text", False, False, True)
        assert cfg.seeds >= 3 and cfg.untrained_control and cfg.dictionary(64).activation == "topk"


def test_the_authors_penalty_in_units_of_the_sum(tmp_path, monkeypatch):
    """mean (x - xhat)^2 + 1e-3 mean |z| is, times D, |x - xhat|^2 + 1e-3 D / F sum |z|."""
    seen = []

    def stop(key, cfg, train, hyper, norm, **_):
        seen.append((cfg, train, hyper))
        raise KeyboardInterrupt

    monkeypatch.setattr(dictionaries, "init_state", stop)
    faithful = dataclasses.replace(layerwise.PRESETS["faithful"], depths=(), latents=40, dictionary_batch=4)
    _, base, bench, models = study_of(1, False)
    with pytest.raises(KeyboardInterrupt):
        layerwise.train_dictionaries(Recorder(tmp_path), faithful, base, bench, models)
    ((cfg, train, hyper),) = seen
    assert hyper[0].sparsity == pytest.approx(1e-3 * MODEL.width / 40)
    assert len(hyper) == 2 * 2  # a quarter, half and all of two blocks are two depths
    assert train.steps == 2 * 32 / 4  # two passes over the texts
    rng = np.random.default_rng(0)
    x, xhat, z = rng.normal(size=(5, 16)), rng.normal(size=(5, 16)), rng.random((5, 40))
    ours = np.square(x - xhat).sum(-1).mean() + hyper[0].sparsity * z.sum(-1).mean()
    assert ours == pytest.approx(16 * (np.square(x - xhat).mean() + 1e-3 * z.mean()))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("It was NOT good, no!<br /><br />I won't see it.", "good br br see"),
        ("See http://site.org/a?b for 10 <b>bold</b> reasons...", "see http siteorg ab b bold b reasons"),
        ("Where?", ""),
        ("caf\u00e9 \u00bfQu\u00e9?", "caf qu"),
    ],
)
def test_the_authors_cleaning(text, left):
    assert layerwise.authors_cleaning(text) == left
    assert {"not", "no", "nor", "don't", "s", "t"} < layerwise.STOP_WORDS and "br" not in layerwise.STOP_WORDS


def test_faithful_runs_on_cleaned_padded_sentences(world, tmp_path):
    out = tmp_path / "run"
    options = ["--preset", "faithful", "--model", world / "model", "--task", world / "news.csv", "--depths", "1,2"]
    small = ["--test-per-class", "20", "--latents", "40", "--dictionary-lr", "1e-3", "--quiet"]
    assert main(*options, *small, "--out", out) == 0
    claims = {c["id"].removesuffix("-news"): c for c in json.loads((out / "claims.json").read_text())}
    assert "another start" in claims["retained-beyond-control"]["statement"] and len(claims) == 8
    assert claims["retained-beyond-control"]["verdict"] == "not tested"  # of one seed, without warm start
    assert all(c["interval"] is None for c in claims.values())
    assert not [name for name in rows(out, "matching")[0] if name.startswith("control")]
    assert {r["pair"] for r in rows(out, "similarity_by_depth")} == {"before, after"}
    tree, cfg, _ = dictionary.load(out / "checkpoints" / "news" / "dictionaries")
    assert tree["params"]["W_enc"].shape == (2 * 2, 1, 40, MODEL.width) and cfg.activation == "relu"
    assert (np.asarray(tree["norm"]["mean"]) == 0).all() and (np.asarray(tree["norm"]["scale"]) == 1).all()
    record = json.loads((out / "config.json").read_text())["config"]
    cfg = LayerwiseConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in record.items()})
    bench = layerwise.load_task(cfg, layerwise.load_base(QUIET, cfg), str(world / "news.csv"))
    assert bench.examples.ids_NT.shape[1] == MODEL.max_len  # padded as the authors' rows
    assert not any(re.search("[^a-z ]|\\bnot\\b", text) for text in bench.task.texts)


def test_the_embedded_corpus_needs_no_model_no_network_and_any_number_of_devices(tmp_path, monkeypatch, no_network):
    """As far as the dictionaries, which the other runs have too. Pre-training takes all four devices of the tests."""
    small = dataclasses.replace(
        apt.PRESETS["demo"], documents=600, subset_sizes=(100, 400), held_out=100, epochs=1, width=16, heads=2,
        mlp_width=32, blocks=1,
    )  # fmt: skip
    seen = []

    def enough(run, cfg, base, bench, models):
        seen.append((base, bench, models))
        raise KeyboardInterrupt

    monkeypatch.setattr(apt, "PRESETS", apt.PRESETS | {"demo": small})
    monkeypatch.setattr(layerwise, "train_dictionaries", enough)
    options = ["--seeds", "1", "--epochs", "1", "--train-per-class", "8", "--test-per-class", "6", "--latents", "16"]
    fast = ["--task", "embedded-topic", "--no-untrained-control", "--dictionary-batch", "64", "--quiet"]
    for _ in range(2):  # pre-trained, and read from its checkpoint
        assert main(*options, *fast, "--out", tmp_path / "run") == 130
        base, bench, models = seen[-1]
        assert len(models) == 2 and base.masking is not None and base.lang is not None
        assert {len(leaf.devices()) for leaf in jax.tree.leaves(base.params)} == {1}
        assert (len(bench.task.classes), len(bench.split.test), bench.split.shared_texts) == (5, 30, 0)
    jax.tree.map(np.testing.assert_array_equal, seen[0][0].params, seen[1][0].params)
    stage = np.load(tmp_path / "run" / "stages" / "similarity-embedded-topic.npz")
    expected = [states(params, bench.examples, bench.split.test, base.model) for params in models]
    np.testing.assert_allclose(stage["cosine"][0], cosine(*expected).mean(-1), atol=1e-5)


# --- claims ----------------------------------------------------------------------------------------------------------


def judged(cosine_GM, shares, auroc_2GJ=None, depths=(0, 1, 2), shuffled=0.1, **changes):
    """Verdicts on made curves; every dictionary has two latents, both alive."""
    G, size = len(cosine_GM), len(cosine_GM) * len(depths)
    auroc = np.full((2, G, len(depths)), 0.6) if auroc_2GJ is None else np.asarray(auroc_2GJ)
    task = LabelledText("t", "", CLASSES, [], np.zeros(0, np.int32), None)
    tree = {"params": {"W_dec": np.zeros((2 * size, 1, 2, 4))}}
    bank = layerwise.Bank(None, tree, depths, G, np.zeros(2 * size), np.zeros(2 * size))
    found = {"density_F": np.ones((2 * size, 2)), "auroc": np.repeat(auroc.reshape(-1, 1), 2, axis=1)}
    curve = np.asarray(cosine_GM)
    similarity = {"cosine": curve, "shuffled": np.full(curve.shape, shuffled)}
    result = layerwise.Result(
        layerwise.Bench(task, None, None),
        None,
        similarity,
        {},
        bank,
        found,
        {k: np.asarray(v) for k, v in shares.items()},
        {},
    )
    claims = layerwise.judge(LayerwiseConfig(seeds=G, **changes), [result])
    return {claim.id.removesuffix("-t"): (claim.verdict, claim.measured) for claim in claims}


def test_claims_follow_their_rules():
    falling = [[1.0, 0.9, 0.4], [1.0, 0.88, 0.42], [0.99, 0.9, 0.41]]
    kept = [[0.9, 0.8, 0.3], [0.9, 0.82, 0.31], [0.9, 0.81, 0.3]]
    fresh = 1 - np.array(kept)
    auroc = np.stack([np.full((3, 3), 0.6), [[0.6, 0.6, 0.9], [0.6, 0.61, 0.88], [0.6, 0.6, 0.89]]])
    shares = {"retained": kept, "new": fresh, "control_retained": np.full((3, 3), 0.8)}
    found = judged(falling, shares, auroc)
    assert {name for name, (verdict, _) in found.items() if verdict == "supported"} == set(found) and len(found) == 8
    assert found["new-late"][1] == pytest.approx(np.mean([0.5, 0.51, 0.51]))  # from depth 1 on: 0 is the embedding
    assert found["steepest-last"][1] == pytest.approx(np.mean([0.4, 0.34, 0.4]))
    assert found["above-shuffled"][1] == pytest.approx(np.mean([0.3, 0.32, 0.31]))
    assert found["retained-beyond-control"][1] == pytest.approx(np.mean([0.5, 0.49, 0.5]))
    flat = {name: np.full((3, 3), 0.5) for name in shares}
    found = judged(np.full((3, 3), 0.5), flat, auroc[::-1], shuffled=0.95)
    assert {verdict for verdict, _ in found.values()} == {"not supported"}


def test_claims_that_a_run_has_no_numbers_for_are_not_tested():
    found = judged([[1.0, 0.5]], {"retained": [[0.5]], "new": [[0.5]]}, [[[0.5]], [[0.7]]], depths=(1,))
    names = {name for name, (verdict, _) in found.items() if verdict == "not tested"}
    assert names == {"steepest-last", "new-late", "retained-early", "retained-beyond-control", "labels-late"}


# --- bad input -------------------------------------------------------------------------------------------------------


def other_vocabulary(world, folder):
    wordpiece([*VOCABULARY[:-1], "other"]).save(folder / "tokenizer.json")
    return ["--vocab", folder / "tokenizer.json"], ("another vocabulary", "--vocab")


def one_class(world, folder):
    return ["--task", write_csv(folder / "one.csv", make_texts(20)[0], ["same"] * 40)], ("one", "1 class")


def not_finite(world, folder):
    shutil.copy(world / "tokenizer.json", folder)
    params = make_params(0)
    params["blocks"]["mlp"]["in"]["bias"] = params["blocks"]["mlp"]["in"]["bias"].at[1, 3].set(np.nan)
    checkpoint.save(folder / "broken", params, kind="transformer", config=dataclasses.asdict(MODEL))
    return ["--model", folder / "broken"], ("broken", "not finite")


def a_dictionary(world, folder):
    shutil.copy(world / "tokenizer.json", folder)
    cfg = DictionaryConfig(16, 8, activation="topk", k=2)
    norm = {"mean": jnp.zeros((1, 16)), "scale": jnp.ones(1)}
    params = dictionary.init(jax.random.key(0), cfg)
    dictionary.save(folder / "sae", {"params": params, "norm": norm, "threshold": jnp.zeros(())}, cfg)
    return ["--model", folder / "sae"], ("sae", "dictionary", "transformer")


def no_tokenizer(world, folder):
    shutil.copytree(world / "model", folder / "model")
    return ["--model", folder / "model"], ("tokenizer.json", "--vocab")


def same_name(world, folder):
    shutil.copy(world / "news.csv", folder / "news.csv")
    return ["--task", f"{world / 'news.csv'},{folder / 'news.csv'}"], ("two tasks of one name",)


BAD = {
    "no such model": lambda world, folder: (["--model", folder / "nowhere"], ("nowhere", "does not exist")),
    "a dictionary as model": a_dictionary,
    "no tokenizer": no_tokenizer,
    "other vocabulary": other_vocabulary,
    "parameters not finite": not_finite,
    "no task": lambda world, folder: (["--task", ""], ("--task",)),
    "no such task": lambda world, folder: (["--task", folder / "gone.csv"], ("gone.csv", "no such task")),
    "embedded task of another model": lambda world, folder: (["--task", "embedded"], ("--model", "embedded")),
    "two tasks of one name": same_name,
    "one class": one_class,
    "no such column": lambda world, folder: (["--text-column", "headline"], ("headline", "news.csv")),
    "too many rows": lambda world, folder: (["--test-per-class", "44"], ("--test-per-class",)),
    "rows too short": lambda world, folder: (["--length", "2"], ("2 positions",)),
    "depth beyond the model": lambda world, folder: (["--depths", "1,3"], ("--depths 3", "0 to 2")),
    "k above the latents": lambda world, folder: (["--k", "25"], ("k = 25", "24")),
    "too few tokens": lambda world, folder: (["--dictionary-batch", "4000"], ("--dictionary-batch 4000", "tokens")),
    "too few texts": lambda world, folder: (
        ["--unit", "sentence", "--dictionary-batch", "49"], ("--dictionary-batch 49", "48 training texts"),
    ),
    "small buffer": lambda world, folder: (["--buffer", "100"], ("--buffer 100",)),
    "kinds out of order": lambda world, folder: (["--rotated", "0.95"], ("--rotated 0.95", "--retained")),
    "unknown option": lambda world, folder: (["--depth", "1"], ("--depths",)),
    "bad number": lambda world, folder: (["--sparsity", "-1"], ("sparsity", "too small")),
}  # fmt: skip


@pytest.mark.parametrize("make", BAD.values(), ids=BAD.keys())
def test_bad_input_gets_one_clear_line_before_anything_is_trained(world, tmp_path, make, capsys, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    options, words = make(world, folder)
    before = {file: file.read_bytes() for file in (*folder.rglob("*"), *world.rglob("*")) if file.is_file()}
    monkeypatch.setattr(bert6_jax.train, "fit", lambda *_, **__: pytest.fail("something was trained"))
    capsys.readouterr()
    assert main(*tiny(world, *options), "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err.strip()
    assert message.count("\n") == 0 and message.startswith("error: ") and all(word in message for word in words), (
        message
    )
    assert all(file.read_bytes() == content for file, content in before.items())
    assert not (tmp_path / "out").exists()  # free for the corrected command


@pytest.mark.parametrize("preset", ["corrected", "faithful"])
def test_real_presets_ask_for_model_and_task(world, tmp_path, preset, capsys):
    assert main("--preset", preset, "--out", tmp_path / "out") == 2
    assert "--model" in (message := capsys.readouterr().err.strip()) and "--task" in message
    assert main("--preset", preset, "--model", world / "model", "--out", tmp_path / "out") == 2
    message = capsys.readouterr().err.strip()
    assert "--task" in message and message.count("\n") == 0 and not (tmp_path / "out").exists()
    assert main("--depths", "7", "--out", tmp_path / "out") == 2  # before minutes of pre-training
    assert "--depths 7" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_another_model_or_text_may_not_go_on_in_a_folder(finished, world, tmp_path, capsys):
    """The same paths, but what lies there has changed."""
    before = numbers(finished)
    moved = tmp_path / "world"
    shutil.copytree(world, moved)
    kept = (world / "news.csv").read_text()
    try:
        shutil.rmtree(world / "model")
        sha = load_tokenizer(world / "tokenizer.json").sha256
        checkpoint.save(world / "model", make_params(5), kind="transformer", config=dataclasses.asdict(MODEL),
                        tokenizer={"sha256": sha})  # fmt: skip
        assert main(*tiny(world), "--out", finished) == 2
        message = capsys.readouterr().err.strip()
        assert message.count("\n") == 0 and "model is not the one" in message and str(finished) in message
        shutil.rmtree(world / "model")
        shutil.copytree(moved / "model", world / "model")
        (world / "news.csv").write_text(kept.replace("alpha", "beta"))
        assert main(*tiny(world), "--out", finished) == 2
        message = capsys.readouterr().err.strip()
        assert message.count("\n") == 0 and "text of news is not the one" in message
    finally:
        shutil.rmtree(world / "model")
        shutil.copytree(moved / "model", world / "model")
        (world / "news.csv").write_text(kept)
    assert main(*tiny(world, "--k", "2"), "--out", finished) == 2
    assert "k is 3 there and 2 here" in capsys.readouterr().err
    assert numbers(finished) == before


def test_help_names_every_option_and_preset(capsys):
    with pytest.raises(SystemExit) as end:
        main("--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(LayerwiseConfig):
        assert f"--{field.name.replace('_', '-')}" in text, field.name
    assert all(preset in text for preset in ("demo", "corrected", "faithful")) and "--preset" in text
    assert list(layerwise.PRESETS) == ["demo", "corrected", "faithful"]
