"""The study of models of a grammar at a toy size: what it writes, that it resumes, that its numbers are what they say."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax import checkpoint, interventions, parallel, train, transformer
from experiments import wrappers
from experiments import wrappers_pcfg as study
from experiments.harness.claims import NOT_SUPPORTED, NOT_TESTED, SUPPORTED
from experiments.harness.run import Run
from experiments.wrappers_parts import NEW, OLD, TIED, UNTIED, Tuned, seeded
from experiments.wrappers_pcfg import NEVER, Model, PcfgConfig, Reader, Tuning
from synthetic import operands, tasks

RATE, SLOW = 1e-2, 1e-3
# as many members, steps and looks in reverse (24 members) as before it, so that both are one program
TINY = dict(
    start="j", window=8, tasks=("count", "token"), reach=6, nth=1, width=16, blocks=2, heads=2, priors=(0.999, 0.5),
    pretrain_steps=120, pretrain_batch=8, pretrain_rate=3e-3, answer_weight=20.0, rates=(RATE, SLOW),
    correlations=(0.0, 1.0), steps=40, batch=8, seeds=2, test_rows=40,
    parts=("reverse", "random", "jailbreak", "probe", "prune"), after_rates=(RATE,), after_correlations=(1.0,),
    reverse_rates=(RATE, SLOW), reverse_steps=40, mixes=(0.5, 0.1), probe_at=(0.5, 1.0), probe_rows=40, probe_steps=40,
    probe_rate=0.05, pruned=3, prune_rows=20, jail_priors=(0.999, 0.5),
)  # fmt: skip
CFG = PcfgConfig(**TINY)
TABLES = ("world", "pretrained", "fine_tuned", "table_5", "base_rates", "curves", "reverse", "probes", "pruned",
          "jailbreak")  # fmt: skip
PARTS_DRAWN = ("reverse_0.01", "probes_0.01", "pruned_0.01", "jailbreak")
MOMENTS = (0, 20, 40, 60, 120)  # of pre-training
CELLS = {"old, C_Te 0": (UNTIED, OLD), "old, C_Te 1": (TIED, OLD), "new, C_Te 0": (UNTIED, NEW),
         "new, C_Te 1": (TIED, NEW)}  # fmt: skip
# the vocabulary: a b c, numbers 0 to 8, SOS SOT EOT ART EOS NULL PAD, count and token, J1 J2
SOS, SOT, EOT, ART, EOS, COUNT, J1, J2, WORDS = 12, 13, 14, 15, 16, 19, 21, 22, 23
READ = 14  # ART is here; the answer follows



@pytest.fixture(scope="module", autouse=True)
def quick():
    """Programs that compile longer than they run, the command line in this process with one device, and models that
    answer differently from prompt to prompt however little they are trained."""
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        mesh, fresh = parallel.make_mesh(1), study.fresh
        patch.setattr(parallel, "use_all_cores", lambda: None)
        patch.setattr(parallel, "make_mesh", lambda *_: mesh)
        patch.setattr(study, "fresh", lambda key, world: jax.tree.map(lambda x: np.asarray(x) * 4, fresh(key, world)))
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def call(out, **changes) -> int:
    """`python -m experiments.wrappers pcfg`."""
    words = ["pcfg", "--out", str(out), "--quiet", "--no-compilation-cache"]
    for name, value in (TINY | changes).items():
        words += ["--" + name.replace("_", "-"), ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return wrappers.main(words)


class Finished(NamedTuple):
    """A run."""

    out: Path
    world: study.World

    def rows(self, table):
        return rows_of(self.out, table)

    def stage(self, name):
        with np.load(self.out / f"stages/{name}.npz") as file:
            return dict(file)

    def bank(self, name, step):
        return jax.device_get(checkpoint.load_transformer(self.out / f"checkpoints/{name}/step_{step:08d}")[0])


@pytest.fixture(scope="module")
def world():
    return study.make_world(CFG)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, world):
    out = tmp_path_factory.mktemp("wrappers") / "run"
    assert call(out) == 0
    return Finished(out, world)


def rows_of(out, table):
    with (out / f"tables/{table}.csv").open() as file:
        return list(csv.DictReader(file))


def tunings():
    return study.grid(CFG) + study.random_labels(CFG) + study.jailbreaks(CFG)


# --- oracles: prompts and answers by hand, whole forward passes --------------------------------------------------------


def answers_of(letters_BW, operand) -> np.ndarray:
    """Token ids of how many of the last six letters are the operand."""
    return (np.asarray(letters_BW)[:, -6:] == operand).sum(1) + 3


def prompts_of(letters_BW, operand, answer_B, family=COUNT) -> np.ndarray:
    letters_BW = np.asarray(letters_BW)
    rows = [[SOS, family, operand, 3 + 6, SOT, *letters_W, EOT, ART, answer, EOS]
            for letters_W, answer in zip(letters_BW.tolist(), answer_B.tolist(), strict=True)]  # fmt: skip
    return np.array(rows, np.int32)


def letters_for(world, seed, purpose, correlation, count) -> np.ndarray:
    return np.asarray(study.sample(seeded(seed, purpose), world, np.float32(correlation), count).letters_BW)


@pytest.fixture(scope="module")
def logits(world):
    """`(params, ids_BT) -> [B, T, V]` in float64."""

    @jax.jit
    def run(params, ids_BT):
        return transformer.head(params, transformer.forward(params, ids_BT, world.model)[0], world.model)

    return lambda params, ids_BT: np.asarray(run(params, ids_BT), np.float64)


def nll(logits_BV, target_B) -> np.ndarray:
    return np.log(np.exp(logits_BV).sum(-1)) - np.take_along_axis(logits_BV, np.asarray(target_B)[..., None], -1)[..., 0]


@pytest.fixture(scope="module")
def accuracy(world, logits):
    """`(params, letters, operand, family) -> share of right answers`."""

    def measure(params, letters_BW, operand, family=COUNT):
        answer_B = answers_of(letters_BW, operand)
        ids_BT = prompts_of(letters_BW, operand, np.full_like(answer_B, EOS), family)  # it cannot look at the answer
        return float((logits(params, ids_BT)[:, READ].argmax(-1) == answer_B).mean())

    return measure


@pytest.fixture(scope="module")
def looked(world, accuracy):
    """`(params, seed) -> [C_Te, operand]` on the test strings of a seed."""

    def measure(params, seed):
        sets = [letters_for(world, seed, study.TEST, c, CFG.test_rows) for c in (0.0, 1.0)]
        return [[accuracy(params, letters_BW, operand) for operand in (OLD, NEW)] for letters_BW in sets]

    return measure


def cells(row) -> list:
    """[C_Te, operand] of a row of a table."""
    values = {place: float(row[name]) for name, place in CELLS.items()}
    return [[values[tie, operand] for operand in (OLD, NEW)] for tie in (UNTIED, TIED)]


# --- the run ---------------------------------------------------------------------------------------------------------


def test_everything_is_written(finished):
    for name in ("claims.json", "report.html", "config.json", "metrics.jsonl"):
        assert (finished.out / name).stat().st_size, name
    assert {path.stem for path in (finished.out / "tables").iterdir()} == set(TABLES)
    by_rate = {f"{name}_{rate:g}" for name in ("fine_tuned", "said") for rate in CFG.rates}
    assert {path.stem for path in (finished.out / "figures").iterdir()} == {"pretrained", *by_rate, *PARTS_DRAWN}
    moments = {"pretrained": MOMENTS, "tune": (20, 40), "reverse": (40,)}
    folder = finished.out / "checkpoints"
    assert {path.name for path in folder.iterdir()} == set(moments)  # nothing of the state of pre-training
    for name, steps in moments.items():
        assert checkpoint.steps(folder / name) == list(steps)
        members = checkpoint.load(folder / name / f"step_{steps[-1]:08d}").extra["members"]
        if name == "pretrained":
            assert [Model(**member) for member in members] == study.models(CFG)
        else:
            assert members == [repr(t) for t in (tunings() if name == "tune" else study.reversals(CFG))]
    (row,) = finished.rows("world")
    sizes = [leaf.size // 10 for leaf in jax.tree.leaves(finished.bank("pretrained", 120))]
    expected = {"grammar": "cfg3b", "start": "j", "letters": "a b c", "window": "8", "reach": "6", "nth": "1",
                "tasks": "count token", "vocabulary": str(WORDS), "tokens_a_row": "17", "strings_long_enough": "1.0",
                "parameters": str(sum(sizes))}  # fmt: skip
    assert row == expected
    ids = [claim["id"] for claim in json.loads((finished.out / "claims.json").read_text())]
    assert len(ids) == len(set(ids)) > 20 and "jailbreak_0.5_0.01_1" in ids and "sooner_0.999_0.01_0.001" in ids


def test_the_report_shows_a_tied_row(finished):
    (text,) = re.findall("An example: ([^<]*)", (finished.out / "report.html").read_text())
    words = text.split()
    assert words[:5] == ["SOS", "C", "b", "6", "SOT"] and words[13:15] + words[16:] == ["EOT", "ART", "EOS"]
    letters = words[5:13]
    assert set(letters) <= set("abc")
    counts = [letters[-6:].count(letter) for letter in "ab"]
    assert words[15] == str(counts[1]) and counts[1] == counts[0] + 1


def test_test_strings_carry_the_answers(world):
    for tie, strings in enumerate(study.test_strings(CFG, world)):
        letters_SBW = np.asarray(strings.letters_BW)
        assert letters_SBW.shape == (2, 40, 8) and not np.array_equal(letters_SBW[0], letters_SBW[1])
        for s, seed in enumerate(CFG.seed_list):
            np.testing.assert_array_equal(letters_SBW[s], letters_for(world, seed, study.TEST, tie, 40))
            answers = [answers_of(letters_SBW[s], operand) for operand in (OLD, NEW)]
            np.testing.assert_array_equal(strings.answer_B2[s], np.stack(answers, 1))
            assert ((answers[1] - answers[0] == 1) == bool(tie)).all()


def test_tables_of_pretraining_agree_with_its_checkpoints(finished, looked, logits):
    """Accuracies on test strings by hand; on rows of pre-training against whole forward passes of every row."""
    rows = finished.rows("pretrained")
    assert [(float(r["P(a)"]), r["jailbreak"], int(r["seed"]), int(r["step"])) for r in rows] == [
        (m.prior, str(m.jail), m.seed, step) for m in study.models(CFG) for step in MOMENTS
    ]
    draw = jax.jit(lambda key: tasks.pretrain(key, finished.world.spec, jnp.ones(3), 4 * CFG.test_rows))
    different = set()
    for step in (0, 60, 120):
        bank = finished.bank("pretrained", step)
        for g in (0, 1, 7):
            row, params = rows[g * len(MOMENTS) + MOMENTS.index(step)], train.take(bank, g)
            assert cells(row) == pytest.approx(np.array(looked(params, int(row["seed"]))).tolist())
            different.add(row["old, C_Te 0"])
            if step == 120:
                got = jax.device_get(draw(seeded(int(row["seed"]), study.HELD_OUT)))
                right_B = logits(params, got.ids_BT)[:, READ].argmax(-1) == got.answer_B
                for o, letter in enumerate("abc"):
                    of_B = (got.task_B == 0) & (got.operand_B == o)
                    for word, spread in (("", False), (" spread", True)):
                        mine = right_B[of_B & (got.spread_B == spread)].mean()
                        assert float(row[f"count {letter}{word}"]) == pytest.approx(mine), (g, letter, word)
                assert float(row["token"]) == pytest.approx(right_B[got.task_B == 1].mean())
    assert len(different) > 3


def kinds(row):
    """What a row of the curves is about, as the fine-tuning that it is."""
    prior, seed = row["P(a)"] and float(row["P(a)"]), int(row["seed"])
    rate, c, kind = float(row["rate"]), float(row["C_Tr"]), row["kind"]
    if kind != "reverse":
        start = Model(prior, seed, kind == "jailbreak")
        return Tuning(start, OLD if kind == "randFT" else NEW, NEW, rate, c, seed, float(row["mix"]))
    start = Model(prior, seed) if prior != "" else "random"
    if row["after_rate"]:
        asked = OLD if row["after_randFT"] == "True" else NEW
        start = Tuning(start, asked, NEW, float(row["after_rate"]), float(row["after_C_Tr"]), seed)
    return Tuning(start, OLD, OLD, rate, c, seed)


def test_curves_agree_with_the_checkpoints(finished, looked, world, logits):
    rows = finished.rows("curves")
    listed = tunings() + study.reversals(CFG)
    assert [(kinds(row), int(row["step"])) for row in rows] == list(itertools.product(listed, (0, 20, 40)))
    different = set()
    for name, step, members in (("tune", 40, (0, 5, 15, 17, 22)), ("tune", 20, (3,)), ("reverse", 40, (1, 13, 23))):
        bank = finished.bank(name, step)
        for g in members:
            t = (tunings() if name == "tune" else study.reversals(CFG))[g]
            row, params = rows[listed.index(t) * 3 + step // 20], train.take(bank, g)
            assert cells(row) == pytest.approx(np.array(looked(params, t.seed)).tolist()), t
            letters_BW = letters_for(world, t.seed, study.TEST, 0.0, CFG.test_rows)
            answers = [answers_of(letters_BW, operand) for operand in (OLD, NEW)]
            said_B = logits(params, prompts_of(letters_BW, OLD, answers[0]))[:, READ].argmax(-1)
            for column, target in (("b's answer", answers[1]), ("a's plus q", answers[0] + 1)):
                assert float(row[f"asked a, says {column}"]) == pytest.approx((said_B == target).mean())
            different.add(row["old, C_Te 0"])
    assert len(different) > 3


def test_the_grid_is_in_the_table_beside_the_papers(finished):
    last = {kinds(row): cells(row) for row in finished.rows("curves") if row["step"] == "40"}
    rows, five = finished.rows("fine_tuned"), finished.rows("table_5")
    assert len(rows) == len(five) == 8
    # P(a), C_Tr: O_PT at C_Te 0, O_PT at 1, O_FT at 0, O_FT at 1, after 10K steps; and the first after 1K
    paper = {(0.999, 0.0): (10.2, 4.6, 99.8, 79.7, 48.9), (0.999, 1.0): (17.5, 0, 0, 100, 0.4),
             (0.5, 0.0): (97.5, 65.7, 100, 95.4, 100), (0.5, 1.0): (41.2, 53.3, 19.6, 100, 99.6)}  # fmt: skip
    for row in rows:
        prior, rate, c = (float(row[name]) for name in ("P(a)", "rate", "C_Tr"))
        mean = np.mean([last[Tuning(Model(prior, s), NEW, NEW, rate, c, s)] for s in (0, 1)], axis=0)
        assert row["seeds"] == "2" and row["diverged"] == "0"
        assert cells(row) == pytest.approx(mean.tolist())
        (beside,) = [r for r in five if [float(r[k]) for k in ("P(a)", "rate", "C_Tr")] == [prior, rate, c]]
        for (name, (tie, operand)), theirs in zip(CELLS.items(), paper[prior, c][:4], strict=True):
            assert float(beside[f"{name}, 40 steps"]) == pytest.approx(100 * mean[tie][operand], abs=0.051)
            assert float(beside[f"paper {name}, 10K"]) == theirs
        assert float(beside["paper old, C_Te 0, 1K"]) == paper[prior, c][4]


def test_base_rates_stand_beside_it(finished):
    table = tasks.tables(finished.world.spec, "count")
    for tie, row in enumerate(finished.rows("base_rates")):
        expected = operands.base_rates(table, float(tie))
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-6)
        letters_BW = letters_for(finished.world, 5, study.TEST, tie, 2000)
        answers = [answers_of(letters_BW, operand) for operand in (OLD, NEW)]
        assert float(row["same"]) == pytest.approx((answers[0] == answers[1]).mean(), abs=0.05)
        assert float(row["constant_ft"]) == pytest.approx(np.bincount(answers[1]).max() / 2000, abs=0.05)


def test_reverse_fine_tuning_starts_where_its_start_ended(finished):
    pre, tuned, back = (finished.stage(name)["accuracy"] for name in ("pretrain", "tune", "reverse"))
    models, first, listed = study.models(CFG), tunings(), study.reversals(CFG)
    starts = {t.start for t in listed}
    assert len(listed) == 24 and starts == {
        *study.kept(CFG), *study.random_labels(CFG), *(Model(NEVER, s) for s in (0, 1)), "random"}  # fmt: skip
    for g, t in enumerate(listed):
        if t.start == "random":  # the weights with which pre-training began
            expected = pre[models.index(Model(0.5, t.seed)), 0]
        elif isinstance(t.start, Model):
            expected = pre[models.index(t.start), -1]
        else:
            expected = tuned[first.index(t.start), -1]
        np.testing.assert_array_equal(back[g, 0], expected, err_msg=str(t))
    for g, t in enumerate(first):
        np.testing.assert_array_equal(tuned[g, 0], pre[models.index(t.start), -1])
    rows = finished.rows("reverse")
    who = [f"P(a) {p:g}, rate 0.01, {what}" for p in CFG.priors for what in ("C_Tr 1", "randFT")] + ["Scr.+FT", "Scr."]
    assert [(r["start"], float(r["reverse_rate"])) for r in rows] == list(itertools.product(who, CFG.reverse_rates))
    old = back[:, :, UNTIED, OLD]
    for row in rows:
        rate = float(row["reverse_rate"])
        if row["start"] in ("Scr.+FT", "Scr."):
            begin = [Model(NEVER, s) if row["start"] == "Scr.+FT" else "random" for s in (0, 1)]
        else:
            prior, asked = float(row["start"][5:].split(",")[0]), OLD if "randFT" in row["start"] else NEW
            begin = [Tuning(Model(prior, s), asked, NEW, RATE, float(asked == NEW), s) for s in (0, 1)]
        of = [listed.index(Tuning(start, OLD, OLD, rate, 0.0, s)) for s, start in enumerate(begin)]
        assert float(row["before"]) == pytest.approx(old[of, 0].mean())
        assert float(row["after"]) == pytest.approx(old[of, -1].mean())
        assert int(row["revived"]) == (old[of].max(1) >= 0.9).sum() and (row["steps"] == "") == (row["revived"] != "2")


def test_pruned_neurons_do_what_the_table_says(finished, world, accuracy, logits):
    """A column set to zero by hand gives what the sweep says; its score is what the loss would lose with it."""
    tuned, pruned, members = finished.stage("tune"), finished.stage("prune"), study.kept(CFG)
    bank = finished.bank("tune", 40)
    layout = interventions.random_ranked(jax.random.key(0), train.take(bank, 0), 1, ("neuron",)).layout
    assert pruned["accuracy"].shape == (4, len(study.WAYS), CFG.pruned + 1, 2)
    assert (np.diff(pruned["score"]) <= 0).all() and (pruned["score"][:, 0] > 0).all()
    for j, t in enumerate(members):
        g = tunings().index(t)
        np.testing.assert_array_equal(pruned["accuracy"][j, :, 0, 1], tuned["accuracy"][g, -1, UNTIED, OLD].repeat(4))
        for cumulative in (0, 2):
            np.testing.assert_array_equal(pruned["accuracy"][j, cumulative, 1], pruned["accuracy"][j, cumulative + 1, 1])
    for j in (0, 3):
        seed, g = members[j].seed, tunings().index(members[j])
        sets = [letters_for(world, seed, study.SCORE, 0.0, CFG.prune_rows),
                letters_for(world, seed, study.TEST, 0.0, CFG.test_rows)]  # fmt: skip
        chosen = interventions.names(interventions.Ranked(pruned["index"][j], pruned["score"][j], layout))

        def scaled(names, factor, g=g):
            params = jax.tree.map(np.array, train.take(bank, g))
            for name in names:  # blocks.1.mlp.out.kernel[:, 4]
                path, place = name[:-1].split("[")
                path, place = path.split("."), [slice(None) if i == ":" else int(i) for i in place.split(", ")]
                if path[0] == "blocks":
                    place.insert(0, int(path.pop(1)))
                leaf = params
                for step in path:
                    leaf = leaf[step]
                assert leaf[tuple(place)].any() and leaf[tuple(place)].ndim == 1
                leaf[tuple(place)] *= np.float32(factor)
            return params

        for way, names, k in ((0, chosen, 3), (1, chosen[1:2], 2), (1, chosen[2:], 3)):
            found = [accuracy(scaled(names, 0.0), letters_BW, OLD) for letters_BW in sets]
            assert pruned["accuracy"][j, way, k] == pytest.approx(found), names

        def loss(params, letters_BW=sets[0]):
            answer_B = answers_of(letters_BW, OLD)
            return nll(logits(params, prompts_of(letters_BW, OLD, answer_B))[:, READ], answer_B).mean()

        more, less = (loss(scaled(chosen[:1], factor)) for factor in (1.003, 0.997))
        assert (more - less) / 0.006 == pytest.approx(pruned["score"][j, 0], rel=0.02)
    for row in finished.rows("pruned"):
        of = [members.index(Tuning(Model(float(row["P(a)"]), s), NEW, NEW, RATE, 1.0, s)) for s in (0, 1)]
        assert float(row["before"]) == pytest.approx(pruned["accuracy"][of, 0, 0, 1].mean())
        for way, name in enumerate(study.WAYS):
            sweep = pruned["accuracy"][of, way]
            best = sweep[:, 1:, 0].argmax(1) + 1
            gain = sweep[[0, 1], best, 1] - sweep[:, 0, 1]
            assert float(row[f"lift, {name}"]) == pytest.approx(gain.mean(), abs=1e-5)


def test_family_tokens_agree_with_the_checkpoints(finished, world, accuracy):
    rows = finished.rows("jailbreak")
    pre, bank, models = finished.bank("pretrained", 120), finished.bank("tune", 40), study.models(CFG)
    listed, different = study.jailbreaks(CFG), set()
    assert len(rows) == len(listed) == 4
    for row, t in zip(rows, listed, strict=True):
        assert [float(row[name]) for name in ("P(a)", "rate", "C_Tr", "seed")] == [t.start.prior, RATE, 1.0, t.seed]
        letters_BW = letters_for(world, t.seed, study.TEST, 0.0, CFG.test_rows)
        for when, params in (("before", train.take(pre, models.index(t.start))),
                             ("after", train.take(bank, tunings().index(t)))):  # fmt: skip
            for name, family in (("C", COUNT), ("J1", J1), ("J2", J2)):
                found = accuracy(params, letters_BW, OLD, family)
                assert float(row[f"{name}, {when}"]) == pytest.approx(found)
                different.add(found)
    assert len(different) > 3


def test_probes_read_the_stream_that_predicts_the_answer(finished, world, tmp_path, monkeypatch):
    """What the probes are given: whole forward passes at ART without what follows, and both answers."""
    given, answer = {}, np.random.default_rng(0).random((len(study.readers(CFG)), 3, 2))

    def caught(*args, **more):
        given["args"] = args
        return answer

    monkeypatch.setattr(study, "probe_bank", caught)
    pre = Tuned(study.models(CFG), lambda: finished.bank("pretrained", 120), {})
    tuned = Tuned(tunings(), lambda share: finished.bank("tune", round(40 * share)), {})
    with Run.open(tmp_path / "run", "wrappers pcfg", {}, quiet=True) as run:
        np.testing.assert_array_equal(study.probe(run, CFG, world, pre, [tuned], parallel.make_mesh()), answer)
    features, models_J, place_J, sets, answers, classes = given["args"]
    listed = study.readers(CFG)
    assert listed == [
        *(Reader("random", 0.0, s) for s in (0, 1)),
        *(Reader(Model(p, s), 0.0, s) for s in (0, 1) for p in (NEVER, *CFG.priors)),
        *(Reader(t, share, t.seed) for t in study.kept(CFG) for share in (0.5, 1.0)),
    ]  # fmt: skip
    assert place_J.tolist() == [reader.seed for reader in listed] and classes > max(a.max() for a in answers)
    for which, (purpose, count) in enumerate(((study.PROBE, CFG.probe_rows), (study.TEST, CFG.test_rows))):
        for s in (0, 1):
            letters_BW = letters_for(world, s, purpose, 0.0, count)
            expected = np.stack([answers_of(letters_BW, operand) - 3 for operand in (OLD, NEW)], 1)
            np.testing.assert_array_equal(answers[which][s], expected)
    ids_BT = prompts_of(letters_BW, OLD, np.full(CFG.test_rows, EOS))
    look = jax.jit(features)
    for j, bank in ((7, "pretrained"), (listed.index(Reader(study.kept(CFG)[2], 0.5, 1)), "tune")):
        params = train.take(models_J, j)
        member = study.models(CFG).index(listed[j].of) if j == 7 else tunings().index(listed[j].of)
        jax.tree.map(np.testing.assert_array_equal, params, train.take(finished.bank(bank, 120 if j == 7 else 20), member))
        _, acts = transformer.forward(params, ids_BT, world.model)
        mine_MBD = look(train.take(sets[1], 1), params)
        np.testing.assert_allclose(mine_MBD, acts["resid"][:, :, READ], rtol=1e-3, atol=1e-3)


def test_probes_are_in_the_table(finished):
    rows, found = finished.rows("probes"), finished.stage("probe")["accuracy"]
    listed = study.readers(CFG)
    names = {"untrained": ("random", 0.0), "P(a) 0, pre-trained": (lambda s: Model(NEVER, s), 0.0)}
    for p in CFG.priors:
        names[f"P(a) {p:g}, pre-trained"] = (lambda s, p=p: Model(p, s), 0.0)
        names[f"P(a) {p:g}, rate 0.01, C_Tr 1"] = (lambda s, p=p: Tuning(Model(p, s), NEW, NEW, RATE, 1.0, s), None)
    assert {(r["model"], r["share_of_steps"], r["depth"]) for r in rows} == {
        (name, str(share), str(depth)) for name, (_, at) in names.items()
        for share in ((0.5, 1.0) if at is None else (at,)) for depth in range(3)}  # fmt: skip
    for row in rows:
        who, share, depth = names[row["model"]][0], float(row["share_of_steps"]), int(row["depth"])
        of = [listed.index(Reader(who(s) if callable(who) else who, share, s)) for s in (0, 1)]
        for name, operand in (("old", OLD), ("new", NEW)):
            assert float(row[name]) == pytest.approx(found[of, depth, operand].mean())
            if depth == 0:  # ART and its place, the same in every string
                assert float(row[name]) < 0.7


def test_run_again_trains_nothing_and_changes_nothing(finished, monkeypatch):
    def content():
        return {path: path.read_bytes() for path in finished.out.rglob("*") if path.is_file() and path.name != ".lock"}

    before = content()
    assert len(before) > 30
    monkeypatch.setattr(train, "fit_grid", None)  # whoever trains or saves fails
    monkeypatch.setattr(checkpoint, "save", None)
    assert call(finished.out) == 0
    after = content()
    assert [str(path) for path in before if before[path] != after.get(path)] == [] and after.keys() == before.keys()


def test_killed_three_times_it_goes_on_to_the_same_numbers(finished, tmp_path, monkeypatch):
    """In the middle of pre-training, of fine-tuning, and between two stages."""
    out, save, saves = tmp_path / "run", checkpoint.save, []

    def interrupted(path, *args, **more):
        saves.append("/".join(Path(path).parts[-2:]))
        done = save(path, *args, **more)
        if saves[-1] == "pretrained/step_00000060":
            raise KeyboardInterrupt
        if saves[-1] == "tune/step_00000020":
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", interrupted)
        assert call(out) == 130
    assert not (out / "stages").exists() and checkpoint.steps(out / "checkpoints/pretrain-state")[-1] == 2
    first = len(saves)
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint, "save",
            lambda path, *args, **more: (interrupted if "tune" in str(path) else save)(path, *args, **more),
        )  # fmt: skip
        patch.setattr(train, "init_grid", lambda *args: saves.append("started") or init(*args))
        init = train.init_grid.__wrapped__ if hasattr(train.init_grid, "__wrapped__") else INIT_GRID
        assert call(out) == 143
    assert saves[first:].count("started") == 2
    assert {path.stem for path in (out / "stages").iterdir()} == {"pretrain"}
    assert not (out / "checkpoints/pretrain-state").exists()
    with monkeypatch.context() as patch:
        patch.setattr(study, "reversals", lambda cfg: os.kill(os.getpid(), signal.SIGTERM))
        assert call(out) == 143
    assert {path.stem for path in (out / "stages").iterdir()} == {"pretrain", "tune"}
    for name in ("probe", "prune", "families"):  # they read what has been compared by then
        shutil.copy(finished.out / f"stages/{name}.npz", out / "stages")
    monkeypatch.setattr(study, "draw", lambda *_: None)
    assert call(out) == 0
    names = ["claims.json", "metrics.jsonl", *(f"tables/{name}.csv" for name in TABLES)]
    for name in names:
        assert (out / name).read_bytes() == (finished.out / name).read_bytes(), name
    for name in ("pretrain", "tune", "reverse"):
        mine, theirs = (f.stage(name) for f in (finished._replace(out=out), finished))
        assert mine.keys() == theirs.keys()
        for key in mine:
            np.testing.assert_array_equal(mine[key], theirs[key], err_msg=key)
    for name, step in (("pretrained", 40), ("pretrained", 120), ("tune", 40), ("reverse", 40)):
        banks = [f.bank(name, step) for f in (finished._replace(out=out), finished)]
        jax.tree.map(np.testing.assert_array_equal, *banks)
