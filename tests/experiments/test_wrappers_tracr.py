"""The study of compiled programs at a toy size: what it writes, that it resumes, that its numbers are what they say."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax import checkpoint, parallel, train
from bert6_jax.errors import InputError
from experiments import wrappers
from experiments import wrappers_tracr as study
from experiments.harness.claims import NOT_SUPPORTED, NOT_TESTED, SUPPORTED
from experiments.harness.run import Run
from experiments.wrappers_parts import NEW, OLD, TIED, UNTIED, Tuned, seeded
from experiments.wrappers_tracr import LARGE, MIDDLE, READ, SMALL, VERY_SMALL, TracrConfig, Tuning
from synthetic import compiler, operands, rasp

# as many members, steps and looks in reverse as before it, so that both are one program
TINY = dict(
    programs=study.PROGRAMS, length=5, letters=4, max_length=4, rank_old=1, rank_new=2, max_q=3,
    rates=(LARGE, MIDDLE, SMALL, VERY_SMALL), correlations=(0.0, 1.0), steps=40, batch=8, seeds=2, test_rows=40,
    parts=study.PARTS, after_rates=(LARGE, SMALL), after_correlations=(1.0,), reverse_rates=(MIDDLE, VERY_SMALL),
    reverse_steps=40, pruned=3, prune_rows=20, probe_rows=40, probe_steps=40, probe_rate=0.05,
)  # fmt: skip
CFG = TracrConfig(**TINY)
PARTS = {"counter": study.PARTS, "max_identifier": ("prune",)}  # what is done with either
TABLES = ("compiled", "fine_tuned", "table_3", "base_rates", "curves", "reverse", "pruned", "probes")
FIGURES = ("grid", "attention", "maps", "answers", "reverse", "pruned", "probes")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Programs that compile longer than they run, and the command line in this process with its devices."""
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "use_all_cores", lambda: None)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def call(out, **changes) -> int:
    """`python -m experiments.wrappers tracr`."""
    words = ["tracr", "--out", str(out), "--quiet", "--no-compilation-cache"]
    for name, value in (TINY | changes).items():
        words += ["--" + name.replace("_", "-"), ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return wrappers.main(words)


class Finished(NamedTuple):
    """A run of one program."""

    program: str
    out: Path
    world: study.World

    def rows(self, table):
        return rows_of(self.out, table)

    def stage(self, name):
        with np.load(self.out / f"stages/{name}-{self.program}.npz") as file:
            return dict(file)

    def bank(self, name):
        return checkpoint.load_transformer(self.out / f"checkpoints/{name}-{self.program}")[0]


@pytest.fixture(scope="module", params=study.PROGRAMS)
def finished(request, tmp_path_factory, worlds):
    out = tmp_path_factory.mktemp("wrappers") / "run"
    assert call(out, programs=(request.param,), parts=PARTS[request.param]) == 0
    return Finished(request.param, out, worlds[request.param])


counter_only = pytest.mark.parametrize("finished", ["counter"], indirect=True)


@pytest.fixture(scope="module")
def worlds():
    return {name: study.make_world(CFG, name) for name in study.PROGRAMS}


def rows_of(out, table):
    with (out / f"tables/{table}.csv").open() as file:
        return list(csv.DictReader(file))


# --- the run ---------------------------------------------------------------------------------------------------------


def test_everything_is_written(finished):
    for name in ("claims.json", "report.html", "config.json", "metrics.jsonl"):
        assert (finished.out / name).stat().st_size, name
    missing = set() if finished.program == "counter" else {"table_3", "reverse", "probes"}
    assert {path.stem for path in (finished.out / "tables").iterdir()} == set(TABLES) - missing
    figures = {path.stem for path in (finished.out / "figures").iterdir()}
    assert figures == {f"{finished.program}_{figure}" for figure in set(FIGURES) - missing}
    (row,) = finished.rows("compiled")
    assert float(row["exact"]) == float(row["exact_with_noise"]) == 1.0
    assert int(row["parameters"]) == sum(leaf.size for leaf in jax.tree.leaves(finished.world.old.params))


def test_the_grid_is_in_the_table(finished):
    rows = finished.rows("fine_tuned")
    cells = [(float(row["rate"]), float(row["C_Tr"]), int(row["C_Te"])) for row in rows]
    assert sorted(cells) == sorted(itertools.product(CFG.rates, CFG.correlations, (0, 1)))
    for row, (_, _, tie) in zip(rows, cells, strict=True):
        old, new = float(row["old"]), float(row["new"])
        assert row["program"] == finished.program and row["seeds"] == "2" and row["diverged"] == "0"
        assert 0 <= old <= 1 and 0 <= new <= 1
        assert tie == 0 or old + new <= 1 + 1e-6  # one output is scored against both answers
    # a large rate leaves the compiled model behind even so soon
    moved = {rate: np.mean([float(row["old"]) for row in rows if float(row["rate"]) == rate]) for rate in CFG.rates}
    assert moved[LARGE] < 0.5 and moved[VERY_SMALL] > moved[LARGE]


@counter_only
def test_the_papers_numbers_stand_beside_ours(finished):
    paper = {
        (LARGE, 0.0): (0.0, 100.0, 0.0, 100.0), (LARGE, 1.0): (0.0, 100.0, 35.8, 0.7),
        (SMALL, 0.0): (54.6, 1.2, 25.7, 27.2), (SMALL, 1.0): (4.0, 94.3, 10.3, 2.2),
    }  # fmt: skip
    ours = {tuple(float(row[k]) for k in ("rate", "C_Tr", "C_Te")): row for row in finished.rows("fine_tuned")}
    rows = finished.rows("table_3")
    assert {(float(row["rate"]), float(row["C_Tr"])) for row in rows} == set(paper)
    for row in rows:
        cell = float(row["rate"]), float(row["C_Tr"])
        names = [f"{word}, C_Te {tie}" for tie in (1, 0) for word in ("old", "new")]
        assert tuple(float(row[f"paper {name}"]) for name in names) == paper[cell]
        for name in names:
            mean = float(ours[*cell, float(name[-1])][name[:3]])
            assert float(row[name]) == pytest.approx(100 * mean, abs=0.051)


def test_base_rates_stand_beside_it(finished):
    rows = finished.rows("base_rates")
    assert [row["C_Te"] for row in rows] == ["1", "0"]
    for row in rows:
        expected = operands.base_rates(finished.world.tables, float(row["C_Te"]))
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-6)
        assert float(row["offset"]) == pytest.approx(float(row["C_Te"]))


def test_curves_begin_with_the_program_and_end_with_the_grid(finished):
    rows = finished.rows("curves")
    assert len(rows) == (20 if finished.program == "counter" else 16) * 3 and {row["step"] for row in rows} == {
        "0",
        "20",
        "40",
    }
    names = ("start", "rate", "C_Tr", "seed", "step")
    assert len({tuple(row[name] for name in names) for row in rows}) == len(rows)
    answers_SB2 = study.test_strings(CFG, finished.world)[UNTIED].answer_B2
    for row in rows:
        bos, old, new, other = (float(row[f"attention {key}"]) for key in study.KEYS)
        assert bos + old + new + other == pytest.approx(1.0, abs=1e-5)
        if row["step"] == "0":  # the compiled model: right for its operand, and looking at it alone
            mine, yours = ("old", "new") if row["start"] == "old" else ("new", "old")
            assert float(row[f"{mine}_0"]) == float(row[f"{mine}_1"]) == 1.0 and float(row[f"{yours}_1"]) == 0.0
            answers_B2 = answers_SB2[int(row["seed"])]
            assert float(row[f"{yours}_0"]) == pytest.approx((answers_B2[:, 0] == answers_B2[:, 1]).mean())
            seen = float(row[f"attention {mine} operand"])
            assert seen > 0.2 and bos + seen > 0.99 and (finished.program == "counter" or seen > 0.99)
    for cell in finished.rows("fine_tuned"):
        asked = {"start": "old", "rate": cell["rate"], "C_Tr": cell["C_Tr"], "step": "40"}
        last = [row for row in rows if asked.items() <= row.items()]
        assert [row["seed"] for row in last] == ["0", "1"]
        for word in ("old", "new"):
            mean = np.mean([float(row[f"{word}_{cell['C_Te']}"]) for row in last])
            assert float(cell[word]) == pytest.approx(mean)


@counter_only
def test_reverse_fine_tuning_starts_where_fine_tuning_ended(finished):
    tuned, back, first = finished.stage("tune"), finished.stage("reverse"), study.grid(CFG) + study.controls(CFG)
    for g, t in enumerate(study.reversals(CFG)):
        assert t.operand == OLD and t.correlation == 0.0
        if isinstance(t.start, Tuning):
            assert t.start.seed == t.seed
            np.testing.assert_array_equal(back["accuracy"][g, 0], tuned["accuracy"][first.index(t.start), -1])
    rows = finished.rows("reverse")
    names = ["rate 0.1, C_Tr 1", "rate 0.001, C_Tr 1", "Scr.+FT, rate 0.1", "Scr.+FT, rate 0.001", "Scr."]
    assert [(row["start"], row["reverse_rate"]) for row in rows] == [(n, r) for n in names for r in ("0.01", "0.0001")]
    for row in rows:
        assert 0 <= int(row["revived"]) <= 2 and (row["steps"] == "") == (row["revived"] != "2")


def test_pruned_weights_do_what_the_table_says(finished):
    """K = 0 is the model as it is; a single weight set to 0 by hand gives what the sweep says."""
    world, tuned, pruned = finished.world, finished.stage("tune"), finished.stage("prune")
    members, grid = study.kept(CFG), study.grid(CFG)
    assert pruned["accuracy"].shape == (len(members), len(study.WAYS), CFG.pruned + 1, 2, 2) == (4, 5, 4, 2, 2)
    assert (np.diff(pruned["score"]) <= 0).all() and (pruned["score"][:, 0] > 0).all()
    for j, t in enumerate(members):
        for way in range(len(study.WAYS)):
            as_it_is = tuned["accuracy"][grid.index(t), -1, UNTIED]
            np.testing.assert_array_equal(pruned["accuracy"][j, way, 0, 1], as_it_is)
        np.testing.assert_array_equal(pruned["accuracy"][j, 0, 1], pruned["accuracy"][j, 1, 1])
    bank, layout = finished.bank("tune"), world.old.layout
    for j, k in ((0, 1), (3, CFG.pruned)):
        seed = members[j].seed
        name = study.weight_names(CFG, world, pruned["index"][j])[k - 1]  # blocks.1.mlp.out.kernel[3, 4]
        path, place = name[:-1].split("[")
        path, place = path.split("."), [int(i) for i in place.split(", ")]
        if path[0] == "blocks":
            place.insert(0, int(path.pop(1)))
        params = jax.tree.map(np.array, train.take(bank, grid.index(members[j])))
        leaf = params
        for step in path:
            leaf = leaf[step]
        assert leaf[tuple(place)] != 0
        leaf[tuple(place)] = 0
        for which, (purpose, rows) in enumerate(((study.SCORE, CFG.prune_rows), (study.TEST, CFG.test_rows))):
            strings = study.sample(world, seeded(seed, purpose), np.float32(0.0), rows)
            out_BTA = compiler.output_logits(params, strings.ids_BT, strings.segment_BT, layout)
            said_B = np.asarray(out_BTA)[:, READ].argmax(-1)
            right = [(said_B == np.asarray(strings.answer_B2)[:, operand]).mean() for operand in (OLD, NEW)]
            assert pruned["accuracy"][j, 1, k, which] == pytest.approx(right), name
    rows = finished.rows("pruned")
    assert [(float(row["rate"]), float(row["C_Tr"])) for row in rows] == [(LARGE, 1.0), (SMALL, 1.0)]
    for row, of in zip(rows, ([0, 2], [1, 3]), strict=True):
        assert float(row["lift"]) == pytest.approx(study.lifted(pruned["accuracy"][of, 1]).mean(), abs=1e-6)
        assert row["best weight, first seed"] in study.weight_names(CFG, world, pruned["index"][of[0]])


@counter_only
def test_probes_read_every_depth(finished):
    rows = finished.rows("probes")
    models = ["compiled", "untrained", "rate 0.1, C_Tr 1", "rate 0.001, C_Tr 1"]
    assert [(row["model"], row["depth"]) for row in rows] == [(m, str(d)) for m in models for d in range(4)]
    old = np.array([float(row["old"]) for row in rows]).reshape(4, 4)
    assert old.min() >= 0 and old.max() <= 1
    # at depth 0 there is one letter to read from, after the last block the answer itself
    assert old[0, 3] > old[0, 0] + 0.1 and old[0, 3] > old[1].max()


def test_attention_maps_are_of_one_string(finished):
    maps, layout = finished.stage("maps"), finished.world.old.layout
    assert maps["pattern"].shape == (1 + 2, 3, layout.config.max_len)
    np.testing.assert_allclose(maps["pattern"].sum(-1), 1.0, rtol=1e-5)
    letters = [layout.vocab[i] for i in maps["ids"] if i < layout.bos_id]
    if finished.program == "counter":
        assert {"a", "b"} <= set(letters)  # where both operands can be seen
        seen = maps["ids"] == 0
    else:
        seen = maps["ids"] == ord(sorted(letters)[CFG.rank_old]) - ord("a")
    row_T = maps["pattern"][0, study.BLOCK[finished.program]]
    assert row_T[seen | (maps["ids"] == layout.bos_id)].sum() > 0.99 and row_T[seen].min() > 0.1


def test_models_are_checkpoints(finished):
    folder = finished.out / "checkpoints"
    program, strings = {
        "counter": (rasp.counter("a"), ["abcda", "bbbbb", "aaaaa", "d"]),
        "max_identifier": (rasp.max_identifier(CFG.rank_old), ["qaz", "dcba", "wxyz"]),
    }[finished.program]
    assert compiler.verify(program, compiler.load(folder / finished.program), strings) == []
    banks = {"tune": study.grid(CFG)}
    if finished.program == "counter":
        banks = {"tune": study.grid(CFG) + study.controls(CFG), "reverse": study.reversals(CFG)}
    assert {path.name for path in folder.iterdir()} == {finished.program, *(f"{b}-{finished.program}" for b in banks)}
    for part, tunings in banks.items():
        saved = checkpoint.load(folder / f"{part}-{finished.program}")
        members = saved.extra["members"]
        with pytest.raises(InputError, match=f"bank of {len(members)} models"):
            compiler.load(folder / f"{part}-{finished.program}")
        assert len(members) == len(tunings) == (20 if finished.program == "counter" else 16)
        assert all(leaf.shape[0] == len(members) for leaf in jax.tree.leaves(saved.tree))
        for member, t in zip(members, tunings, strict=True):
            start = t.start._asdict() if isinstance(t.start, Tuning) else t.start
            assert member == t._asdict() | {"start": start}


@counter_only
def test_run_again_trains_nothing_and_changes_nothing(finished, monkeypatch):
    names = ["claims.json", *(f"tables/{name}.csv" for name in TABLES)]
    before = {name: (finished.out / name).read_bytes() for name in names}
    monkeypatch.setattr(train, "fit_grid", None)  # whoever trains fails
    monkeypatch.setattr(compiler, "save", None)
    monkeypatch.setattr(study, "draw", lambda *_: None)
    assert call(finished.out, programs=("counter",)) == 0
    assert {name: (finished.out / name).read_bytes() for name in names} == before


@counter_only
def test_killed_twice_it_goes_on_to_the_same_numbers(finished, tmp_path, monkeypatch):
    """By SIGTERM while it trains, and while the second grid is written."""
    settings, out = {"programs": ("counter",), "parts": ("reverse",)}, tmp_path / "run"
    looker, save, fit_grid, trained = study.looker, compiler.save, train.fit_grid, []

    def deadly(*args):
        look, looks = looker(*args), itertools.count()

        def watched(*models):
            if next(looks) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return look(*models)

        return watched

    def interrupted(path, *args, **more):
        if path.name.startswith("reverse"):
            path.mkdir()
            (path / "half").write_text("written")
            raise KeyboardInterrupt
        save(path, *args, **more)

    def noted(*args, **more):
        trained.append(more["label"])
        return fit_grid(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(study, "looker", deadly)
        assert call(out, **settings) == 143
    assert not (out / "stages/tune-counter.npz").exists()
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "save", interrupted)
        assert call(out, **settings) == 130
    monkeypatch.setattr(train, "fit_grid", noted)
    monkeypatch.setattr(study, "draw", lambda *_: None)
    assert call(out, **settings) == 0
    assert trained == ["reverse-counter"]
    for table in ("compiled", "fine_tuned", "table_3", "base_rates", "curves", "reverse"):
        assert rows_of(out, table) == finished.rows(table), table
    mine, theirs = (json.loads((folder / "claims.json").read_text()) for folder in (out, finished.out))
    assert mine == [claim for claim in theirs if claim in mine] and len(mine) > 10
    assert finished._replace(out=out).bank("reverse")["embed"]["token"].shape[0] == 20


@counter_only
def test_a_cell_alone_is_the_cell_in_its_bank(finished, tmp_path):
    g = 13
    t = study.grid(CFG)[g]
    assert (t.rate, t.correlation, t.seed) == (SMALL, 1.0, 1)  # a large rate multiplies rounding
    with Run.open(tmp_path / "alone", "wrappers tracr", {}, quiet=True) as run:
        alone = study.tune(run, CFG, finished.world, "alone", [t], CFG.steps, parallel.make_mesh(1))
    bank = finished.stage("tune")
    assert alone.found.keys() == bank.keys()
    for name, values in alone.found.items():
        np.testing.assert_allclose(values[0], bank[name][g], atol=1e-4, err_msg=name)
    models = finished.bank("tune")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b[g], atol=1e-4), alone.params(), models)


def test_programs_share_a_run_but_no_claim(tmp_path, worlds, monkeypatch):
    """The whole command, from made-up numbers on."""
    monkeypatch.setattr(study, "study", lambda run, cfg, world, right, mesh: made_up(cfg, worlds[world.name], True))
    out = tmp_path / "run"
    assert call(out) == 0
    ids = [claim["id"] for claim in json.loads((out / "claims.json").read_text())]
    assert len(set(ids)) == len(ids)
    assert {name.removeprefix("counter_") for name in ids if name.startswith("counter")} == {
        name.removeprefix("max_identifier_") for name in ids if name.startswith("max_identifier")
    }
    for table in TABLES:
        programs = [name for name, _ in itertools.groupby(row.get("program") for row in rows_of(out, table))]
        assert programs == ([None] if table == "table_3" else list(study.PROGRAMS)), table
    drawn = {path.stem for path in (out / "figures").iterdir()}
    assert drawn == {f"{program}_{figure}" for program in study.PROGRAMS for figure in FIGURES if figure != "maps"}


# --- its pieces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", study.PROGRAMS)
def test_strings_carry_the_answers_of_both_programs(worlds, name):
    """Against the evaluator; the groups of keys against loops."""
    world = worlds[name]
    layout = world.old.layout
    kind, asked = (rasp.counter, "ab") if name == "counter" else (rasp.max_identifier, (CFG.rank_old, CFG.rank_new))
    hits = jax.jit(study.hits, static_argnums=2)
    for correlation in (0.0, 1.0):
        strings = study.sample(world, jax.random.key(3), np.float32(correlation), 30)
        group_BT = np.asarray(study.key_groups(world, strings))
        for row in range(30):
            ids_T = np.asarray(strings.ids_BT[row])
            letters = [layout.vocab[i] for i in ids_T if i < layout.bos_id]
            answers = [rasp.evaluate(kind(x), letters)[READ - 1] for x in asked]
            assert [layout.values[i] for i in strings.answer_B2[row]] == answers
            number = answers if name == "counter" else [ord(letter) for letter in answers]
            q = CFG.q if name == "counter" else CFG.max_q
            assert (number[1] - number[0] == q) == (correlation == 1.0)
            looked = list(asked) if name == "counter" else answers
            expected = [0, *(1 + looked.index(x) if x in looked else 3 for x in letters)]
            assert group_BT[row].tolist() == expected + [-1] * (len(ids_T) - len(expected))
        same = float((strings.answer_B2[:, 0] == strings.answer_B2[:, 1]).mean())
        for compiled, expected in ((world.old, [1.0, same]), (world.new, [same, 1.0])):
            assert hits(compiled.params, strings, world).tolist() == pytest.approx(expected)


def test_a_grid_reads_its_own_rates_rows_and_labels(worlds):
    tunings = [Tuning("old", NEW, 0.1, 0.5, 3), Tuning("new", OLD, 0.01, 0.0, 3), Tuning("old", NEW, 0.1, 0.0, 4)]
    inputs = study.grid_inputs(CFG, tunings, 40)
    assert inputs["rate"].shape == (3, 40) and inputs["rate"].max(1) == pytest.approx([0.1, 0.01, 0.1])
    np.testing.assert_allclose(inputs["rate"][0], 10 * inputs["rate"][1], rtol=1e-5)
    assert inputs["rate"][0].argmax() == 7 and inputs["rate"][0, 0] == pytest.approx(0.1 / 8)  # a fifth of the steps
    same = study.grid_inputs(CFG, [tunings[0]._replace(rate=0.01, correlation=1.0)], 40)
    assert same["seed"][0] == inputs["seed"][0]  # a seed's strings do not depend on the rate
    assert len(set(inputs["seed"].tolist())) == 3  # but on the way back there are others
    assert inputs["data"]["correlation"].tolist() == [0.5, 0.0, 0.0]
    world = worlds["counter"]
    loss = jax.jit(study.make_loss(CFG, world))
    key, data = jax.random.key(5), {"correlation": np.float32(0.0)}
    strings = study.sample(world, key, np.float32(0.0), CFG.batch)
    for g, column in ((0, NEW), (1, OLD)):  # what the program for the other operand loses, and its own 1
        operand = inputs["data"]["operand"][g]
        value, means = loss(world.old.params, {}, key, data | {"operand": operand})
        out_BTA = compiler.output_logits(world.old.params, strings.ids_BT, strings.segment_BT, world.old.layout)
        logits_BA = np.asarray(out_BTA, np.float64)[:, READ]
        log_p = logits_BA - np.log(np.exp(logits_BA).sum(1, keepdims=True))
        target = np.asarray(strings.answer_B2[:, column])
        assert float(value) == pytest.approx(-log_p[np.arange(CFG.batch), target].mean(), rel=1e-5)
        assert float(means["accuracy"]) == pytest.approx(float((logits_BA.argmax(1) == target).mean()))


def test_starts_are_noisy_or_random(worlds):
    world, cfg = worlds["counter"], dataclasses.replace(CFG, noise=1e-3)
    first, again, other = (study.fresh(cfg, world, "old", seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    noise = np.concatenate(
        [np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, (first, world.old.params)), strict=True)]
    )
    assert noise.std() == pytest.approx(1e-3, rel=0.05) and abs(noise.mean()) < 1e-4 and (noise != 0).mean() > 0.99
    assert not np.array_equal(first["embed"]["token"], other["embed"]["token"])
    random = study.fresh(cfg, world, "random", 0)
    assert jax.tree.map(jnp.shape, random) == jax.tree.map(jnp.shape, first)
    assert np.std(random["blocks"]["mlp"]["in"]["kernel"]) == pytest.approx(cfg.scratch_std, rel=0.1)


def test_what_a_grid_asks_for():
    """Grid, controls, kept members and reversals of a setting in which all differ."""
    rates = (LARGE, SMALL)
    cfg = dataclasses.replace(CFG, seed=5, rates=rates, after_rates=(SMALL,), reverse_rates=(0.01, 0.02, 0.03))
    assert [t[1:] for t in study.grid(cfg)] == [(NEW, r, c, s) for s in (5, 6) for r in rates for c in (0.0, 1.0)]
    assert study.kept(cfg) == [Tuning("old", NEW, SMALL, 1.0, s) for s in (5, 6)]
    assert study.controls(cfg) == [Tuning("new", NEW, SMALL, 0.0, s) for s in (5, 6)]
    assert study.places(cfg, study.kept(cfg)).tolist() == [0, 1]
    starts = {5: [*study.kept(cfg)[:1], *study.controls(cfg)[:1], "random"],
              6: [*study.kept(cfg)[1:], *study.controls(cfg)[1:], "random"]}  # fmt: skip
    found = study.reversals(cfg)
    assert len(set(found)) == len(found) == 2 * 3 * 3
    assert set(found) == {Tuning(x, OLD, r, 0.0, s) for s in starts for x in starts[s] for r in cfg.reverse_rates}
    for name, preset in study.PRESETS.items():
        assert study.kept(preset) and set(study.kept(preset)) < set(study.grid(preset)), name
        assert {t.start for t in study.reversals(preset)} == {"random", *study.kept(preset), *study.controls(preset)}


def test_the_lift_of_a_weight_is_that_of_the_old_operand():
    sweep = np.zeros((1, 3, 2, 2))  # [S, K + 1, set, operand]
    sweep[0, :, :, OLD] = [[0.9, 0.1], [0.2, 0.9], [0.7, 0.6]]
    sweep[..., NEW] = np.linspace(1.0, 0.0, 3)[None, :, None]
    np.testing.assert_allclose(study.lifted(sweep), [0.5])


# --- claims, tables and figures of made-up numbers -------------------------------------------------------------------

FULL = TracrConfig(programs=("counter",), seeds=3)


def made_up(cfg: TracrConfig, world, true: bool) -> study.Found:
    """Numbers under which all claims hold (`true`), or none."""
    blocks, A = 3, len(world.output_A)

    def found(accuracy, old_share):
        """accuracy [X, C_Te, operand]; what is left of attention to the old operand at the end."""
        attention = np.zeros((3, blocks, 1, 4))
        attention[..., 1:] = [0.6, 0.1, 0.3]
        attention[-1, :, :, 1:] = [old_share, 0.7 - old_share, 0.3]
        return {"step": np.array([0, 20, 40]), "accuracy": accuracy, "attention": attention,
                "said": np.full((3, 2, A), 1 / A), "curve_finite": np.ones(2)}  # fmt: skip

    def stacked(rows):
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    first, rows = study.grid(cfg) + study.controls(cfg), []
    for t in first:
        accuracy, learns = np.zeros((3, 2, 2)), 1.0 if t.rate == LARGE else 0.3
        accuracy[-1, TIED] = [0.02, 0.97] if true else [0.8, 0.1]
        accuracy[-1, UNTIED, NEW] = learns * ((1 - t.correlation) if true else (0.2 + 0.7 * t.correlation))
        accuracy += 1e-4 * t.seed
        stays = (t.rate, t.correlation) != (LARGE, 0.0)
        rows.append(found(accuracy, 0.55 if stays == true else 0.2))
    tuned = Tuned(first, lambda: None, stacked(rows))

    rows = []
    for t in study.reversals(cfg):
        accuracy = np.zeros((3, 2, 2))
        if t.start == "random":
            back = [0.1, 0.1, 0.1]
        elif t.start.start == "new":
            back = [0.1, 0.2, 0.95] if true else [0.1, 0.96, 0.7]
        elif t.start.rate < LARGE:
            back = [0.5, 0.95, 0.99] if true else [0.5, 0.6, 0.8]
        else:
            back = [0.1, 0.2, 0.3] if true else [0.1, 0.8, 0.85]
        accuracy[:, UNTIED, OLD] = back
        rows.append(found(accuracy + 1e-4 * t.seed, 0.3))
    back = Tuned(study.reversals(cfg), lambda: None, stacked(rows))

    members = study.kept(cfg)
    pruned = np.zeros((len(members), len(study.WAYS), cfg.pruned + 1, 2, 2))
    pruned[:, :, 1:, :, OLD] = 0.05
    for j, t in enumerate(members):
        lifted = (t.correlation == 1.0) == true
        pruned[j, 1, 2, :, OLD] = (0.9 if lifted else 0.05) + 1e-4 * t.seed
    index = np.tile(np.arange(cfg.pruned), (len(members), 1))

    probes = np.full((len(study.probed(cfg)), blocks + 1, 2), 0.5)
    for j, who in enumerate(study.probed(cfg)):
        if isinstance(who, Tuning):  # at depth 1 it does not count
            probes[j, 1, OLD], probes[j, 2, OLD] = (0.1, 0.97 + 1e-4 * who.seed) if true else (0.99, 0.4)
        elif who[0] == "old":
            probes[j, 2, OLD] = 1.0
    exact = np.full(1 + cfg.seeds, 1.0 if true else 0.98)
    return study.Found(
        world=world, exact=exact, tuned=tuned, maps=None, back=back, pruned={"accuracy": pruned, "index": index},
        probes=probes,
    )  # fmt: skip


@pytest.fixture
def fake():
    return SimpleNamespace(name="counter", cfg=SimpleNamespace(blocks=3), output_A=np.arange(6))


def test_claims_follow_the_numbers(fake):
    yes, no = (study.judge(FULL, made_up(FULL, fake, true)) for true in (True, False))
    ids = [claim.id for claim in yes]
    assert ids == [claim.id for claim in no] and len(set(ids)) == len(ids) > 20
    assert [(claim.id, claim.measured) for claim in yes if claim.verdict != SUPPORTED] == []
    assert [(claim.id, claim.measured) for claim in no if claim.verdict != NOT_SUPPORTED] == []
    assert all(claim.seeds == 3 and claim.interval and "2311.12786" in claim.paper for claim in yes)
    # 20 steps against 40; and where it never gets there, all steps against 20
    for listed, expected in ((yes, 1.0), (no, np.log2(20 / FULL.reverse_steps))):
        ratios = [claim.measured for claim in listed if "_sooner_" in claim.id]
        assert len(ratios) == 6 and ratios == pytest.approx([expected] * 6)


def test_claims_on_models_that_diverged_are_not_tested(fake):
    f = made_up(FULL, fake, True)
    f.tuned.found["curve_finite"][f.tuned.tunings.index(Tuning("old", NEW, SMALL, 1.0, 1)), -1] = 0.0
    verdicts = {claim.id: claim.verdict for claim in study.judge(FULL, f)}
    for short in ("wrapper_fits", "wrapper_fails", "tie_misleads_0.001"):
        assert verdicts[f"counter_{short}"] == NOT_TESTED
    assert verdicts["counter_learnt_tied"] == verdicts["counter_tie_misleads_0.01"] == SUPPORTED
    assert np.isnan(study.accuracies(FULL, f, SMALL, 1.0)).all((1, 2)).tolist() == [False, True, False]


def test_what_was_not_lost_is_not_revived(fake):
    f = made_up(FULL, fake, True)
    for g, t in enumerate(f.back.tunings):
        if t.start == Tuning("old", NEW, MIDDLE, 1.0, 2):
            f.back.found["accuracy"][g, 0, UNTIED, OLD] = 0.9
    verdicts = {claim.id: claim.verdict for claim in study.judge(FULL, f)}
    assert verdicts["counter_revived"] == verdicts["counter_sooner_middle_0.01"] == NOT_TESTED
    assert verdicts["counter_sooner_small_0.01"] == SUPPORTED


def test_claims_without_their_cells_are_not_tested(fake):
    cfg = dataclasses.replace(FULL, rates=(MIDDLE,), correlations=(0.5,), after_rates=(MIDDLE,),
                              after_correlations=(0.5,))  # fmt: skip
    listed = study.judge(cfg, made_up(cfg, fake, True))
    ids = [claim.id for claim in listed]
    assert len(set(ids)) == len(ids)
    assert [claim.id for claim in listed if claim.verdict != NOT_TESTED] == ["counter_exact"]
    for claim in listed[1:]:
        assert claim.measured is None and claim.rule, claim.id


@pytest.mark.parametrize(
    "changes",
    [
        {"correlations": (0.5,), "after_correlations": (0.5,)},
        {"correlations": (1.0,), "rates": (LARGE,), "after_rates": (LARGE,), "seeds": 1},
        {"rates": (0.5, 0.3, LARGE, MIDDLE, SMALL), "parts": ()},
    ],
    ids=["half", "one cell", "many rates"],
)
def test_any_grid_is_drawn_and_tabled(tmp_path, worlds, changes):
    cfg = dataclasses.replace(CFG, programs=("counter",), **changes)
    f = made_up(cfg, worlds["counter"], True)
    if not cfg.parts:
        f = f._replace(back=None, pruned=None, probes=None)
    with Run.open(tmp_path / "run", "wrappers tracr", {}, quiet=True) as run:
        study.write_tables(run, cfg, {"counter": f})
        study.draw(run, cfg, f)
        assert {"fine_tuned", "base_rates", "curves"} <= set(run.tables)
        assert {"counter_attention", "counter_answers"} <= set(run.figures)
        assert ("counter_grid" in run.figures) == (len(cfg.correlations) > 1)
        assert ("counter_probes" in run.figures) == ("probes" in run.tables) == bool(cfg.parts)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rates": ()}, ("--rates is empty",)),
        ({"programs": ()}, ("--programs is empty",)),
        ({"rates": (LARGE, SMALL, LARGE)}, ("--rates 0.1,0.001,0.1", "twice")),
        ({"steps": 50}, ("--steps 50", "multiple of 20")),
        ({"reverse_steps": 30}, ("--reverse-steps 30", "multiple of 20")),
        ({"probe_steps": 30}, ("--probe-steps 30", "multiple of 20")),
        ({"after_rates": (0.02,)}, ("--after-rates 0.02", "--rates", '--parts ""')),
        ({"after_rates": ()}, ("--after-rates is empty",)),
        ({"after_correlations": (0.5,)}, ("--after-correlations 0.5", "--correlations")),
        ({"reverse_rates": ()}, ("--reverse-rates is empty", "--parts")),
        ({"programs": ("sorter",)}, ("--programs", "sorter", "counter")),
        ({"length": 1}, ("--length", "the least is 2")),
        ({"letters": 2}, ("--letters", "the least is 3")),
        ({"max_length": 2}, ("--max-length", "the least is 3")),
        ({"correlations": (0.0, 1.5)}, ("--correlations", "1.5", "the most is 1")),
        ({"rates": (-0.1,)}, ("--rates", "-0.1")),
        ({"noise": float("nan")}, ("--noise", "nan")),
        ({"q": 6}, ("--length 5", "--q 6", "from -5 to 5")),
        ({"rank_old": 3}, ("--max-length 4", "--rank-old 3", "from 0 to 2")),
        ({"rank_new": 1}, ("--rank-old 1", "--rank-new 1", "different")),
        ({"max_q": 25}, ("--max-q 25", "give another q")),
        ({"pruned": 10**6}, ("--pruned 1000000", "weights of the counter")),
        ({"independent": "none"}, ("--independent", "conditional", "nudged")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_settings_are_one_line(tmp_path, capsys, changes, words):
    assert call(tmp_path / "run", **changes) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exactness": 5.0}, ("--exactness 5", "counter", "--exactness none")),
        ({"noise": 0.3}, ("--noise 0.3", "counter", "lower")),
        ({"exactness": "none", "sharpness": 1.0}, ("--sharpness 1", "counter")),
    ],
    ids=["exactness", "noise", "sharpness"],
)
def test_a_model_that_is_not_the_program_is_refused(tmp_path, capsys, changes, words):
    """Before anything is trained; the folder stays free for the corrected command."""
    assert call(tmp_path / "run", programs=("counter",), **changes) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_diverged_members_are_named(tmp_path, worlds, capsys):
    tunings = [Tuning("old", NEW, 0.5, 1.0, 0), Tuning("old", NEW, 0.7, 1.0, 0)]
    with Run.open(tmp_path / "run", "wrappers tracr", {}, quiet=True) as run:
        run.stage("wild", lambda: {"curve_finite": np.array([[1.0, 1.0], [1.0, 0.0]])})
        study.tune(run, CFG, worlds["counter"], "wild", tunings, CFG.steps, parallel.make_mesh(1))
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: 1 of 2 fine-tunings diverged") and "the first at rate 0.7" in line
