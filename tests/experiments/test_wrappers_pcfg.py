"""The study of grammar models at a toy size: what it writes, that it resumes, that its numbers are what they say."""

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

RATE, SLOW = 1e-2, 1e-4
# as many members, steps and looks in reverse (24 members) as before it, so that both are one program
TINY = dict(
    start="j", window=8, tasks=("count", "token"), reach=6, nth=1, width=16, blocks=2, heads=2, priors=(0.999, 0.5),
    pretrain_steps=120, pretrain_batch=8, pretrain_rate=1e-2, answer_weight=20.0, rates=(RATE, SLOW),
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
        patch.setattr(study, "fresh", lambda key, world: jax.tree.map(lambda x: 4 * x, fresh(key, world)))
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


# --- oracles: prompts and answers by hand, whole forward passes ------------------------------------------------------


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
    return (
        np.log(np.exp(logits_BV).sum(-1)) - np.take_along_axis(logits_BV, np.asarray(target_B)[..., None], -1)[..., 0]
    )


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
        return np.array([[accuracy(params, letters_BW, operand) for operand in (OLD, NEW)] for letters_BW in sets])

    return measure


def cells(row) -> np.ndarray:
    """[C_Te, operand] of a row of a table."""
    values = {place: float(row[name]) for name, place in CELLS.items()}
    return np.array([[values[tie, operand] for operand in (OLD, NEW)] for tie in (UNTIED, TIED)])


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
    assert len(ids) == len(set(ids)) > 20 and "jailbreak_0.5_0.01_1" in ids and "sooner_0.999_0.01_0.0001" in ids


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
            assert cells(row) == pytest.approx(looked(params, int(row["seed"])))
            different.update(cells(row).flat)
            if step == 120:
                got = jax.device_get(draw(seeded(int(row["seed"]), study.HELD_OUT)))
                right_B = logits(params, got.ids_BT)[:, READ].argmax(-1) == got.answer_B
                for o, letter in enumerate("abc"):
                    of_B = (got.task_B == 0) & (got.operand_B == o)
                    for word, spread in (("", False), (" spread", True)):
                        mine = right_B[of_B & (got.spread_B == spread)].mean()
                        assert float(row[f"count {letter}{word}"]) == pytest.approx(mine), (g, letter, word)
                assert float(row["token"]) == pytest.approx(right_B[got.task_B == 1].mean())
    assert len(different) > 5


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
            assert cells(row) == pytest.approx(looked(params, t.seed)), t
            letters_BW = letters_for(world, t.seed, study.TEST, 0.0, CFG.test_rows)
            answers = [answers_of(letters_BW, operand) for operand in (OLD, NEW)]
            said_B = logits(params, prompts_of(letters_BW, OLD, answers[0]))[:, READ].argmax(-1)
            for column, target in (("b's answer", answers[1]), ("a's plus q", answers[0] + 1)):
                assert float(row[f"asked a, says {column}"]) == pytest.approx((said_B == target).mean())
            different.update(cells(row).flat)
    assert len(different) > 5


def test_the_grid_is_in_the_table_beside_the_papers(finished):
    last = {kinds(row): cells(row) for row in finished.rows("curves") if row["step"] == "40"}
    rows, five = finished.rows("fine_tuned"), finished.rows("table_5")
    assert len(rows) == 8 and [float(row["rate"]) for row in five] == [SLOW] * 4  # a hundredth of pre-training's
    # P(a), C_Tr: O_PT at C_Te 0, O_PT at 1, O_FT at 0, O_FT at 1, after 10K steps; and the first after 1K
    paper = {(0.999, 0.0): (10.2, 4.6, 99.8, 79.7, 48.9), (0.999, 1.0): (17.5, 0, 0, 100, 0.4),
             (0.5, 0.0): (97.5, 65.7, 100, 95.4, 100), (0.5, 1.0): (41.2, 53.3, 19.6, 100, 99.6)}  # fmt: skip
    for row in rows:
        prior, rate, c = (float(row[name]) for name in ("P(a)", "rate", "C_Tr"))
        mean = np.mean([last[Tuning(Model(prior, s), NEW, NEW, rate, c, s)] for s in (0, 1)], axis=0)
        assert row["seeds"] == "2" and row["diverged"] == "0"
        assert cells(row) == pytest.approx(mean)
        if rate != SLOW:
            continue
        (beside,) = [r for r in five if (float(r["P(a)"]), float(r["C_Tr"])) == (prior, c)]
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
            np.testing.assert_array_equal(
                pruned["accuracy"][j, cumulative, 1], pruned["accuracy"][j, cumulative + 1, 1]
            )
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


def test_family_tokens_are_told_apart(world, accuracy, tmp_path):
    """Models that look at the prompt before all else."""

    def bank(number, first):
        models = [study.fresh(jax.random.key(first + i), world) for i in range(number)]
        bank = jax.tree.map(np.array, study.stack(models))
        bank["embed"]["token"] *= 8
        bank["head"]["kernel"][..., :3] = bank["head"]["kernel"][..., 10:] = 0.0  # they say numbers, 0 to 6
        return bank

    pre, tuned = bank(len(study.models(CFG)), 0), bank(len(tunings()), 100)
    parents = Tuned(study.models(CFG), lambda: pre, {}), Tuned(tunings(), lambda: tuned, {})
    with Run.open(tmp_path / "run", "wrappers pcfg", {}, quiet=True) as run:
        found = study.families(run, CFG, world, *parents, parallel.make_mesh())
    for j, t in enumerate(study.jailbreaks(CFG)):
        letters_BW = letters_for(world, t.seed, study.TEST, 0.0, CFG.test_rows)
        for when, params in enumerate((train.take(pre, study.models(CFG).index(t.start)),
                                       train.take(tuned, tunings().index(t)))):  # fmt: skip
            expected = [accuracy(params, letters_BW, OLD, family) for family in (COUNT, J1, J2)]
            assert found[j, when] == pytest.approx(expected)
    assert (found[..., 1] != found[..., 2]).any() and (found[..., 0] != found[..., 1]).any()


def test_probes_read_the_stream_that_predicts_the_answer(finished, world, tmp_path, monkeypatch):
    """What the probes are given: whole forward passes at ART without what follows, and both answers."""
    given, answer = {}, np.random.default_rng(0).random((len(study.readers(CFG)), 3, 2))

    def caught(*args, **more):
        given["args"] = args
        return answer

    monkeypatch.setattr(study, "probe_bank", caught)
    pre = Tuned(study.models(CFG), lambda: finished.bank("pretrained", 120), {})
    with Run.open(tmp_path / "run", "wrappers pcfg", {}, quiet=True) as run:
        for part in ("checkpoints/tune", "stages"):
            shutil.copytree(finished.out / part, run.out / part)
        (run.out / "stages/probe.npz").unlink()
        tuned = study.tune(run, CFG, world, "tune", tunings(), CFG.steps, parallel.make_mesh(), [pre], CFG.probe_at)
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
        jax.tree.map(
            np.testing.assert_array_equal, params, train.take(finished.bank(bank, 120 if j == 7 else 20), member)
        )
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


def test_killed_four_times_it_goes_on_to_the_same_numbers(finished, tmp_path, monkeypatch):
    """In the middle of pre-training, of fine-tuning, between two stages, and after the last step of one."""
    out, save, saves = tmp_path / "run", checkpoint.save, []
    monkeypatch.setattr(study, "LONG", 0)  # grids go on where they were killed

    def deadly(path, *args, **more):
        what = "/".join(Path(path).parts[-2:])
        saves.append(what)
        done = save(path, *args, **more)
        if saves.count(what) == 1 and what == "pretrained/step_00000060":
            raise KeyboardInterrupt  # before the state of this step is kept
        if what in ("tune/step_00000020", "reverse/step_00000040"):
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    def stages():
        return {path.stem for path in (out / "stages").iterdir() if "-" not in path.stem}

    monkeypatch.setattr(checkpoint, "save", deadly)
    assert call(out) == 130
    assert stages() == {"grammar"} and checkpoint.steps(out / "checkpoints/pretrain-state")[-1] == 2
    assert call(out) == 143
    assert stages() == {"grammar", "pretrain"} and not (out / "checkpoints/pretrain-state").exists()
    with monkeypatch.context() as patch:
        patch.setattr(study, "reversals", lambda cfg: os.kill(os.getpid(), signal.SIGTERM))
        assert call(out) == 143
    assert stages() == {"grammar", "pretrain", "tune"}
    assert call(out) == 143
    assert stages() == {"grammar", "pretrain", "tune"}
    for name in ("probe", "prune", "families"):  # they read what has been compared by then
        shutil.copy(finished.out / f"stages/{name}.npz", out / "stages")
    monkeypatch.setattr(study, "draw", lambda *_: None)
    assert call(out) == 0
    names = ["claims.json", "metrics.jsonl", *(f"tables/{name}.csv" for name in TABLES)]
    for name in names:
        assert (out / name).read_bytes() == (finished.out / name).read_bytes(), name
    # nothing was done again, but for the checkpoint whose state was not kept
    again = [what for what in saves if saves.count(what) > 1]
    assert again == ["pretrained/step_00000060"] * 2
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"pretrained", "tune", "reverse"}
    for name in ("pretrain", "tune", "reverse"):
        mine, theirs = (f.stage(name) for f in (finished._replace(out=out), finished))
        assert mine.keys() == theirs.keys()
        for key in mine:
            np.testing.assert_array_equal(mine[key], theirs[key], err_msg=key)
    for name, step in (("pretrained", 40), ("pretrained", 120), ("tune", 40), ("reverse", 40)):
        banks = [f.bank(name, step) for f in (finished._replace(out=out), finished)]
        jax.tree.map(np.testing.assert_array_equal, *banks)


# --- its pieces ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fixed(world, monkeypatch):
    """Rows that do not depend on the key: strings of fine-tuning and rows of pre-training, and what was asked for."""
    strings = study.sample(jax.random.key(3), world, np.float32(0.0), CFG.batch)
    rows = jax.jit(lambda key: tasks.pretrain(key, world.spec, jnp.ones(3), CFG.batch))(jax.random.key(4))
    heard = []
    monkeypatch.setattr(tasks, "tuning", lambda *args: heard.append(args[1:]) or strings)
    monkeypatch.setattr(tasks, "pretrain", lambda *args, **more: heard.append((*args[1:], more)) or rows)
    return strings, rows, heard


@pytest.mark.parametrize(("asked", "label"), [(NEW, NEW), (OLD, OLD), (OLD, NEW)], ids=["to b", "to a", "randFT"])
def test_fine_tuning_reads_the_answer_alone(world, logits, fixed, asked, label):
    strings, _, heard = fixed
    params = study.fresh(jax.random.key(0), world)
    data = {"correlation": jnp.float32(0.25), "asked": jnp.int32(asked), "label": jnp.int32(label)}
    value, means = jax.jit(study.tuning_loss(CFG, world, False))(params, {}, jax.random.key(1), data)
    target_B = answers_of(strings.letters_BW, label)
    out_BV = logits(params, prompts_of(strings.letters_BW, asked, np.full(CFG.batch, EOS)))[:, READ]
    assert float(value) == pytest.approx(nll(out_BV, target_B).mean(), rel=1e-4)
    assert float(means["accuracy"]) == pytest.approx((out_BV.argmax(1) == target_B).mean())
    ((spec, task, _, count),) = heard
    assert spec is world.spec and task == "count" and count == CFG.batch


def test_rows_of_pretraining_are_mixed_in(world, logits, fixed):
    strings, rows, _ = fixed
    params = study.fresh(jax.random.key(0), world)
    data = {"correlation": jnp.float32(1.0), "asked": jnp.int32(NEW), "label": jnp.int32(NEW), "prior": jnp.ones(3)}
    target_B = answers_of(strings.letters_BW, NEW)
    tuned_B = nll(logits(params, prompts_of(strings.letters_BW, NEW, target_B))[:, READ], target_B)
    mixed_B = nll(logits(params, rows.ids_BT)[:, READ], rows.answer_B)
    loss = study.tuning_loss(CFG, world, True)
    keys = jax.random.split(jax.random.key(1), 300)
    many = jax.jit(lambda mix: jax.lax.map(lambda key: loss(params, {}, key, data | {"mix": mix})[0], keys))
    for mix, expected in ((0.0, tuned_B), (1.0, mixed_B)):
        np.testing.assert_allclose(many(jnp.float32(mix)), expected.mean(), rtol=1e-4)
    found = np.asarray(many(jnp.float32(0.3)), np.float64)
    step_B = (mixed_B - tuned_B) / CFG.batch  # what a row adds if it is of pre-training
    error = np.sqrt((step_B**2).sum() * 0.3 * 0.7 / len(found))
    assert abs(found.mean() - tuned_B.mean() - 0.3 * step_B.sum()) < 4 * error
    assert found.std() == pytest.approx(error * np.sqrt(len(found)), rel=0.25)


def test_pretraining_weighs_the_answer(world, logits, fixed):
    _, rows, heard = fixed
    params = study.fresh(jax.random.key(0), world)
    data = {"prior": jnp.float32([0.5, 0.3, 0.2]), "jail": jnp.float32(0.0)}
    out_BTV = logits(params, rows.ids_BT)
    nll_BT = nll(out_BTV[:, :-1], rows.ids_BT[:, 1:])
    for weight in (20.0, 0.0):
        cfg = dataclasses.replace(CFG, answer_weight=weight)
        value, means = jax.jit(study.pretrain_loss(cfg, world))(params, {}, jax.random.key(1), data)
        weight_T = np.array([weight if t == READ else 1.0 for t in range(16)])
        assert float(value) == pytest.approx((nll_BT * weight_T).sum() / (CFG.batch * weight_T.sum()), rel=1e-4)
        assert float(means["nats"]) == pytest.approx(nll_BT.mean(), rel=1e-4)
        right = (out_BTV[:, READ].argmax(-1) == np.asarray(rows.answer_B)).mean()
        assert float(means["answers"]) == pytest.approx(right)
    spec, _, count, more = heard[0]
    assert spec is world.spec and count == CFG.pretrain_batch and set(more) == {"jail"}


class Caught(Exception):
    pass


@pytest.fixture
def given(monkeypatch):
    """What `train.fit_grid` is called with; it trains nothing."""
    heard = {}

    def caught(step, state, inputs, cfg, mesh, **more):
        heard.update(inputs, state=state, cfg=cfg)
        raise Caught

    monkeypatch.setattr(train, "fit_grid", caught)
    return heard


def test_a_grid_reads_its_own_rates_rows_labels_and_starts(world, given, tmp_path, monkeypatch):
    mixed = []
    loss = study.tuning_loss
    monkeypatch.setattr(study, "tuning_loss", lambda *args: mixed.append(args[2]) or loss(*args))
    monkeypatch.setattr(study, "looker", lambda *_: None)
    pre = Tuned([Model(0.5, 0), Model(0.9, 1, True), Model(NEVER, 0)], lambda: {"w": np.array([1.0, 2.0, 3.0])}, {})
    first = Tuning(Model(0.5, 0), OLD, NEW, RATE, 0.0, 0)
    tuned = Tuned([Tuning(Model(0.5, 0), NEW, NEW, RATE, 0.0, 0), first], lambda: {"w": np.array([4.0, 5.0])}, {})
    listed = [
        Tuning(Model(0.5, 0), NEW, NEW, RATE, 1.0, 0, 0.1), Tuning(Model(0.9, 1, True), NEW, NEW, SLOW, 0.5, 1),
        first, Tuning(first, OLD, OLD, SLOW, 0.0, 0), Tuning(Model(NEVER, 0), OLD, OLD, RATE, 0.0, 0),
    ]  # fmt: skip
    with Run.open(tmp_path / "run", "wrappers pcfg", {}, quiet=True) as run, pytest.raises(Caught):
        study.tune(run, CFG, world, "some", listed, 40, parallel.make_mesh(), [pre, tuned], (0.5, 1.0))
    assert mixed == [True] and given["state"].params["w"].tolist() == [1.0, 2.0, 1.0, 5.0, 3.0]
    data = given["data"]
    assert data["asked"].tolist() == [NEW, NEW, OLD, OLD, OLD] and data["label"].tolist() == [NEW, NEW, NEW, OLD, OLD]
    assert data["correlation"].tolist() == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert data["mix"].tolist() == np.float32([0.1, 0, 0, 0, 0]).tolist()
    half, most, never = [0.5, 0.3, 0.2], [0.9, 0.1, 0.0], [0.0, 1.0, 0.0]
    np.testing.assert_array_equal(data["prior"], np.float32([half, most, half, half, never]))
    assert given["rate"].shape == (5, 40)
    assert given["rate"].max(1) == pytest.approx([RATE, SLOW, RATE, SLOW, RATE]) and given["rate"][0].argmax() == 7
    assert given["rate"][:, -1] == pytest.approx(0.01 * given["rate"].max(1), rel=0.25)
    seed_G = given["seed"].tolist()  # strings depend on the seed and the way, not on rate, C_Tr and start
    assert seed_G[0] == seed_G[2] != seed_G[1] and seed_G[3] == seed_G[4] and len({*seed_G}) == 3
    assert set(given["cfg"].snapshots) == {0, 1, 2} and given["cfg"].steps == 2


def test_models_of_a_seed_differ_in_their_prior_alone(world, given, tmp_path):
    with Run.open(tmp_path / "run", "wrappers pcfg", {}, quiet=True) as run, pytest.raises(Caught):
        study.pretrain(run, CFG, world, parallel.make_mesh())
    models = study.models(CFG)
    assert [(m.prior, m.seed, m.jail) for m in models] == [
        *((p, s, False) for s in (0, 1) for p in CFG.priors), (NEVER, 0, False), (NEVER, 1, False),
        *((p, s, True) for s in (0, 1) for p in CFG.jail_priors)]  # fmt: skip
    priors = {0.999: [0.999, 0.001, 0], 0.5: [0.5, 0.3, 0.2], NEVER: [0, 1, 0]}
    np.testing.assert_array_equal(given["data"]["prior"], np.float32([priors[m.prior] for m in models]))
    np.testing.assert_array_equal(given["data"]["jail"], np.float32([2 / 3 * m.jail for m in models]))
    embed = given["state"].params["embed"]["token"]
    for value in (given["seed"].tolist(), [x.tobytes() for x in np.asarray(embed)]):
        assert len({*value}) == 2 and all(
            value[g] == value[models.index(Model(0.5, m.seed))] for g, m in enumerate(models)
        )


def test_what_a_grid_asks_for():
    cfg = dataclasses.replace(CFG, seed=5, parts=study.PARTS, correlations=(0.0, 0.5, 1.0))
    assert study.grid(cfg) == [Tuning(Model(p, s), NEW, NEW, r, c, s) for s in (5, 6) for p in cfg.priors
                               for r in cfg.rates for c in (0.0, 0.5, 1.0)]  # fmt: skip
    assert study.kept(cfg) == [Tuning(Model(p, s), NEW, NEW, RATE, 1.0, s) for s in (5, 6) for p in cfg.priors]
    assert {(t.asked, t.label, t.correlation) for t in study.random_labels(cfg)} == {(OLD, NEW, 0.0)}
    assert {(t.mix, t.correlation) for t in study.mixtures(cfg)} == {(0.5, 1.0), (0.1, 1.0)}
    assert all(t.start.jail and t.start.seed == t.seed for t in study.jailbreaks(cfg))
    assert {t.start for t in study.reversals(dataclasses.replace(cfg, parts=("reverse",)))} == {
        *study.kept(cfg), Model(NEVER, 5), Model(NEVER, 6), "random"}  # fmt: skip
    assert study.models(dataclasses.replace(cfg, parts=("prune",))) == [Model(p, s) for s in (5, 6) for p in cfg.priors]
    for name, preset in study.PRESETS.items():
        assert study.kept(preset) and set(study.kept(preset)) <= set(study.grid(preset)), name
    assert study.PRESETS["paper"] == PcfgConfig()


# --- claims, tables and figures of made-up numbers -------------------------------------------------------------------

FULL = dataclasses.replace(CFG, parts=study.PARTS, seeds=3, test_rows=40)


def made_up(cfg: PcfgConfig, world, true: bool = True) -> study.Found:
    """Numbers under which all claims hold; or none but those that others are tested under: that the capability was
    there, and is suppressed."""

    def stacked(rows):
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def found(accuracy, noise):
        return {"step": np.array([0, 20, 40]), "accuracy": accuracy + 1e-4 * noise, "instead": np.full((3, 2, 2), 0.2),
                "curve_finite": np.ones(2)}  # fmt: skip

    rows = []
    for m in study.models(cfg):
        accuracy = np.full((len(MOMENTS), 2, 2), 0.95 - 0.001 * m.seed)
        accuracy[..., NEW] = 0.3 if (m.prior >= 0.99) == true else 0.96
        held_out = np.full((len(MOMENTS), len(world.spec.tasks), 3, 2), 0.5)
        held_out[0, 0, 2, 1] = np.nan
        rows.append({"step": np.array(MOMENTS), "accuracy": accuracy, "held_out": held_out})
    number = len(rows)
    pre = Tuned(study.models(cfg), lambda: {"w": np.zeros((number, 3))}, stacked(rows))

    first, rows = study.grid(cfg), []
    for part, more in (("random", study.random_labels), ("mix", study.mixtures), ("jailbreak", study.jailbreaks)):
        first += more(cfg) if part in cfg.parts else []
    for t in first:
        accuracy = np.full((3, 2, 2), 0.5)
        accuracy[-1, TIED, NEW] = 0.97 if true else 0.4
        accuracy[-1, UNTIED] = [0.2, 0.1 if true else 0.7]
        if t.correlation == 0.0 and t.asked == NEW:
            accuracy[-1, UNTIED, OLD] = 0.6 if true else 0.1
        rows.append(found(accuracy, t.seed))
    tuned = Tuned(first, lambda: None, stacked(rows))

    rows = []
    for t in study.reversals(cfg):
        accuracy = np.full((3, 2, 2), 0.1)
        mine, theirs = ([0.1, 0.95, 0.95], [0.1, 0.2, 0.95]) if true else ([0.1, 0.2, 0.95], [0.1, 0.95, 0.95])
        if t.start == "random":
            theirs = [0.1, 0.1, 0.1]
        accuracy[:, UNTIED, OLD] = mine if isinstance(t.start, Tuning) else theirs
        rows.append(found(accuracy, t.seed))
    back = Tuned(study.reversals(cfg), lambda: None, stacked(rows))

    members = study.kept(cfg)
    pruned = np.full((len(members), len(study.WAYS), cfg.pruned + 1, 2), 0.2)
    for j, t in enumerate(members):
        pruned[j, :2, 2] = (0.95 if true else 0.1) - 1e-4 * t.seed
    probes = np.full((len(study.readers(cfg)), 3, 2), 0.5)
    for j, reader in enumerate(study.readers(cfg)):
        if isinstance(reader.of, Tuning):  # at depth 1 it does not count; nor before the end
            probes[j, :, OLD] = (0.1, 0.1, 0.9) if true else (0.1, 0.99, 0.1)
            if reader.share < 1.0:
                probes[j, :, OLD] = 1.0 - probes[j, :, OLD]
        elif reader.of != "random" and reader.of.prior:
            probes[j, 2, OLD] = 1.0
        probes[j] -= 1e-4 * reader.seed
    families = np.full((len(study.jailbreaks(cfg)), 2, 3), 0.95)
    for j, t in enumerate(study.jailbreaks(cfg)):
        families[j, 1] = ([0.2, 0.97, 0.95] if true else [0.2, 0.9, 0.1]) + 1e-4 * t.seed * np.arange(3)
    return study.Found(world, pre, tuned, back, probes, {"accuracy": pruned}, families)


def verdicts(f, cfg=FULL) -> dict[str, str]:
    return {claim.id: claim.verdict for claim in study.judge(cfg, f)}


def test_claims_follow_the_numbers(world):
    yes, no = (study.judge(FULL, made_up(FULL, world, true)) for true in (True, False))
    ids = [claim.id for claim in yes]
    assert ids == [claim.id for claim in no] and len(set(ids)) == len(ids) > 30
    known = """learnt rare fits fails suppressed tie_matters decodable decodable_control sooner pruned pruned_control
        random mixed mixed_control locked jailbreak jailbreak_gap"""
    assert {name.split("_0.")[0] for name in ids} == set(known.split())
    assert [(claim.id, claim.measured) for claim in yes if claim.verdict != SUPPORTED] == []
    given = ("learnt", "suppressed", "locked")
    assert [(c.id, c.measured) for c in no if (c.verdict == SUPPORTED) != c.id.startswith(given)] == []
    assert [claim.id for claim in no if claim.verdict == NOT_TESTED] == []
    assert all(claim.seeds == 3 and claim.interval and "2311.12786" in claim.paper for claim in yes)
    # 20 steps against 40, and the reverse
    for listed, expected in ((yes, 1.0), (no, -1.0)):
        ratios = [claim.measured for claim in listed if claim.id.startswith(("sooner", "random"))]
        assert len(ratios) == 8 and ratios == pytest.approx([expected] * 8)


def test_what_was_not_there_or_not_suppressed_is_not_tested(world):
    f = made_up(FULL, world)
    of = f.tuned.tunings.index(Tuning(Model(0.5, 2), NEW, NEW, RATE, 1.0, 2))
    f.tuned.found["accuracy"][of, -1, UNTIED, OLD] = 0.6  # one seed is enough
    got = verdicts(f)
    for short in ("decodable", "decodable_control", "pruned", "pruned_control"):
        assert got[f"{short}_0.5_0.01"] == NOT_TESTED and got[f"{short}_0.999_0.01"] == SUPPORTED, short
    for back in FULL.reverse_rates:
        assert got[f"sooner_0.5_0.01_{back:g}"] == NOT_TESTED and got[f"sooner_0.999_0.01_{back:g}"] == SUPPORTED
        assert got[f"random_0.5_0.01_{back:g}"] == got["mixed_0.5_0.01_0.1"] == SUPPORTED
    assert got["suppressed_0.5_0.01"] == NOT_SUPPORTED and got["jailbreak_0.5_0.01_1"] == SUPPORTED

    f = made_up(FULL, world)
    f.pre.found["accuracy"][f.pre.tunings.index(Model(0.5, 1)), -1, UNTIED, OLD] = 0.7
    got = verdicts(f)
    assert got["learnt_0.5"] == NOT_SUPPORTED and got["learnt_0.999"] == SUPPORTED
    untaught = [name for name, verdict in got.items() if verdict == NOT_TESTED]
    assert {name.split("_0.5_0.01")[0] for name in untaught} == {
        "suppressed", "tie_matters", "decodable", "decodable_control", "sooner", "pruned", "pruned_control", "random",
        "mixed", "mixed_control"}  # fmt: skip

    f = made_up(FULL, world)
    j = study.jailbreaks(FULL).index(Tuning(Model(0.5, 0, True), NEW, NEW, RATE, 1.0, 0))
    f.families[j, 1, 0] = 0.9
    got = verdicts(f)
    assert got["jailbreak_0.5_0.01_1"] == got["jailbreak_gap_0.5_0.01_1"] == NOT_TESTED
    assert got["locked_0.5_0.01_1"] == NOT_SUPPORTED and got["jailbreak_0.999_0.01_1"] == SUPPORTED


def test_claims_on_models_that_diverged_are_not_tested(world):
    f = made_up(FULL, world)
    f.tuned.found["curve_finite"][f.tuned.tunings.index(Tuning(Model(0.5, 1), NEW, NEW, RATE, 1.0, 1)), -1] = 0.0
    got = verdicts(f)
    for short in ("fits", "fails", "suppressed", "tie_matters", "decodable", "pruned", "pruned_control"):
        assert got[f"{short}_0.5_0.01"] == NOT_TESTED, short
    assert got["sooner_0.5_0.01_0.01"] == NOT_TESTED and got["sooner_0.999_0.01_0.01"] == SUPPORTED
    # a model to compare with that diverged would make everybody else the sooner one
    f = made_up(FULL, world)
    f.back.found["curve_finite"][f.back.tunings.index(Tuning("random", OLD, OLD, SLOW, 0.0, 2)), -1] = 0.0
    got = verdicts(f)
    assert got["sooner_0.5_0.01_0.0001"] == got["random_0.999_0.01_0.0001"] == NOT_TESTED
    assert got["sooner_0.5_0.01_0.01"] == got["random_0.999_0.01_0.01"] == SUPPORTED


def test_where_nobody_gets_there_nothing_is_sooner(world):
    f = made_up(FULL, world)
    for g, t in enumerate(f.back.tunings):
        if t.rate == SLOW:
            f.back.found["accuracy"][g] = 0.2
        elif not isinstance(t.start, Tuning):
            f.back.found["accuracy"][g] = 0.89
    listed = {claim.id: claim for claim in study.judge(FULL, f)}
    assert listed["sooner_0.5_0.01_0.0001"].verdict == NOT_TESTED
    # who never gets there counts with all steps
    assert listed["sooner_0.5_0.01_0.01"].measured == pytest.approx(np.log2(FULL.reverse_steps / 20))


@pytest.mark.parametrize(
    "changes",
    [
        {"correlations": (0.5,), "after_correlations": (0.5,), "priors": (0.9,), "seeds": 1},
        {"probe_at": (0.1, 0.5, 1.0), "after_rates": (RATE, SLOW), "after_correlations": (0.0, 1.0), "priors": (0.7,),
         "rates": (SLOW, RATE), "jail_priors": (0.9,)},
        {"parts": ()},
    ],
    ids=["one cell", "all parts", "no parts"],
)  # fmt: skip
def test_any_grid_is_judged_tabled_and_drawn(tmp_path, world, changes):
    cfg = dataclasses.replace(FULL, **changes)
    f = made_up(cfg, world)
    if not cfg.parts:
        f = f._replace(back=None, pruned=None, probes=None, families=None)
    with Run.open(tmp_path / "run", "wrappers pcfg", {}, quiet=True) as run:
        run.write_claims(study.judge(cfg, f))
        study.write_tables(run, cfg, f)
        study.draw(run, cfg, f)
        tables = set(TABLES if cfg.parts else TABLES[:6])
        assert set(run.tables) == {table for table in tables if (cfg.priors, table) != ((0.7,), "table_5")}
        drawn = {"pretrained", *(f"{name}_{r:g}" for name in ("fine_tuned", "said") for r in cfg.rates)}
        if cfg.parts:
            drawn |= {
                "jailbreak",
                *(f"{name}_{r:g}" for name in ("reverse", "probes", "pruned") for r in cfg.after_rates),
            }
        assert set(run.figures) == drawn
        if cfg.parts:
            text = (tmp_path / "run/tables/probes.csv").read_text()
            assert text.count("10.0% pre-training rows") == 3 * len(cfg.priors) * len(cfg.after_rates)


def test_those_that_diverged_stay_out_of_the_table(tmp_path, world, capsys):
    f = made_up(FULL, world)
    wild = f.tuned.tunings.index(Tuning(Model(0.5, 1), NEW, NEW, SLOW, 1.0, 1))
    f.tuned.found["curve_finite"][wild, -1] = 0.0
    f.tuned.found["accuracy"][wild] = 0.77
    with Run.open(tmp_path / "run", "wrappers pcfg", {}, quiet=True) as run:
        study.write_tables(run, FULL, f)
        run.stage("wild", lambda: f.tuned.found)
        study.tune(run, FULL, world, "wild", f.tuned.tunings, 40, parallel.make_mesh(), [])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: 1 of {len(f.tuned.tunings)} fine-tunings diverged") and "rate 0.0001" in line
    for row in rows_of(tmp_path / "run", "fine_tuned"):
        here = (row["P(a)"], row["rate"], row["C_Tr"]) == ("0.5", "0.0001", "1.0")
        assert int(row["diverged"]) == here and float(row["new, C_Te 1"]) == pytest.approx(0.97, abs=1e-3)


# --- bad input -------------------------------------------------------------------------------------------------------

THREE = "s -> x y | y x\nx -> a b c\ny -> c b\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": "s -> x y\nx -> a b\ny -> c\nz -> a c\n"}, (":4", "`z`", "unreachable")),
        ({"text": "s -> x y\nx -> a x\ny -> c\n"}, (":2", "`x`", "endless")),
        ({"text": "s -> x y [0.5] | y x [0.4]\nx -> a b\ny -> c\n"}, (":1", "`s`", "0.9")),
        ({"text": "s -> x y | y x\nx -> a b\ny -> b\n", "window": 3, "reach": 2}, ("2 letters", "3 or more")),
        ({"text": THREE, "window": 6, "reach": 4}, ("window is 6", "at most 5", "from 1 to 5")),
        ({"grammar": "no/such.txt"}, ("no/such.txt",)),
        ({"window": 19}, ("window is 19", "at most 18")),
        ({"start": "none", "window": 433}, ("window is 433", "at most 432")),
        ({"start": "a"}, ("'a'", "cfg3b", "give one of")),
        ({"start": "w"}, ("'w'", "cfg3b", "give one of")),
        ({"numbers": 6}, ("numbers is 6", "give 7 or more")),
        ({"reach": 8}, ("reach is 8", "from 1 to 7")),
        ({"reach": 2}, ("count with reach 2", "larger reach")),
        ({"q": 5}, ("count with reach 6", "smaller --q")),
        ({"nth": 9}, ("nth is 9", "from 1 to 8")),
        ({"tasks": ("count", "index"), "nth": 8, "reach": 6}, ("nth 8", "smaller")),
        ({"tasks": ("count", "pair_index"), "nth": 5}, ("nth is 5", "pairs aa", "smaller nth")),
        ({"tasks": ("count", "sum")}, ("--tasks", "sum", "pair_count")),
        ({"tasks": ()}, ("--tasks is empty",)),
        ({"tasks": ("count", "count")}, ("--tasks", "twice")),
        ({"task": "index"}, ("--task index", "count,token")),
        ({"task": "token"}, ("--task", "token", "index")),
        ({"priors": ()}, ("--priors is empty",)),
        ({"priors": (0.6,)}, ("--priors", "0.6", "0.999")),
        ({"priors": (0.5, 0.5)}, ("--priors 0.5,0.5", "twice")),
        ({"mixes": (0.1, 0.1)}, ("--mixes", "twice")),
        ({"pretrain_steps": 130}, ("--pretrain-steps 130", "multiple of 20")),
        ({"pretrain_steps": 40}, ("--pretrain-steps 40", "too few")),
        ({"steps": 50}, ("--steps 50", "multiple of 20")),
        ({"reverse_steps": 30}, ("--reverse-steps 30", "multiple of 20")),
        ({"probe_steps": 30}, ("--probe-steps 30", "multiple of 20")),
        ({"width": 15}, ("--width 15", "--heads 2")),
        ({"after_rates": (0.5,)}, ("--after-rates 0.5", "--rates")),
        ({"after_rates": ()}, ("--after-rates is empty", '--parts ""')),
        ({"after_correlations": (0.5,)}, ("--after-correlations 0.5", "--correlations")),
        ({"reverse_rates": ()}, ("--reverse-rates is empty", "--parts")),
        ({"jail_priors": ()}, ("--jail-priors is empty", "jailbreak")),
        ({"tasks": ("count", "index"), "task": "index"}, ("--parts jailbreak", "index")),
        ({"probe_at": (0.5,)}, ("--probe-at 0.5", "lacks 1")),
        ({"pruned": 10**5}, ("--pruned 100000", "neurons of the model")),
        ({"mixes": (0.0,)}, ("--mixes", "too small")),
        ({"correlations": (0.0, 1.5)}, ("--correlations", "1.5", "the most is 1")),
        ({"fraction": 0.3}, ("--fraction", "0.3", "0.25")),
        ({"parts": ("revert",)}, ("--parts", "revert", "reverse")),
        ({"test_rows": 0}, ("--test-rows", "the least is 10")),
        ({"answer_weight": float("nan")}, ("--answer-weight", "nan")),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items())[:30] if isinstance(value, dict) else "",
)
def test_bad_settings_are_one_line(tmp_path, capsys, changes, words):
    if "text" in changes:
        path = tmp_path / "grammar.txt"
        path.write_text(changes["text"])
        changes = {**changes, "grammar": path, "start": "none"}
        del changes["text"]
    assert call(tmp_path / "run", **changes) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_another_grammar_wants_another_folder(tmp_path, capsys, monkeypatch):
    path, settings = tmp_path / "grammar.txt", {"start": "none", "window": 4, "reach": 3}

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "study", stopped)
    path.write_text(THREE)
    for _ in range(2):
        assert call(tmp_path / "run", grammar=path, **settings) == 130
    path.write_text(THREE.replace("c b", "c a"))
    capsys.readouterr()
    assert call(tmp_path / "run", grammar=path, **settings) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the grammar is not the one that this run began with" in line and "--out" in line


def test_its_word_and_its_help(capsys):
    assert wrappers.main([]) == 2
    assert "pcfg" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        wrappers.main(["pcfg", "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    for word in ("--grammar", "--priors", "C_Tr", "(ours)", "200000", "python -m experiments.wrappers pcfg", "goes on"):
        assert word in out, word
