"""The knowledge study at a toy size: what it writes, that it resumes, that a cell alone is the cell in its bank."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from bert6_jax import checkpoint, parallel
from experiments import knowledge
from experiments.harness import cli
from experiments.harness.run import Run
from experiments.knowledge import KnowledgeConfig

TINY = dict(
    text=(), parts=knowledge.PARTS, subjects=24, hidden=16, templates=(4, 6), multiplicities=(1, 2), tuned=(2, 8),
    reference=4, answers=4, noise=4, steps=50, batch=32, tuning_steps=25, full_steps=25, tuning_batch=8, seeds=2,
    confound_answers=5, confound_tuned=(2, 8), shared_attributes=2, shared_answers=4, shared_templates=4,
    shared_multiplicity=2, shared_hidden=16, shared_steps=25, shared_tuned=8, shared_tuning_steps=25, ranks=(1, 2),
    schedules=("constant",), variations=("zipf",),
)  # fmt: skip
FILES = ("claims.json", "tables/pretrained.csv", "tables/fine_tuned.csv", "tables/attention.csv", "tables/gradient.csv")


def call(out, **changes) -> int:
    """The command line in this process."""
    words = ["--out", str(out), "--quiet", "--no-compilation-cache"]
    for name, value in (TINY | changes).items():
        words += ["--" + name.replace("_", "-"), ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    presets = {"tiny": KnowledgeConfig()}
    return cli.main("knowledge", KnowledgeConfig, presets, knowledge.run_knowledge, "tiny", argv=words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("knowledge") / "run"
    assert call(out) == 0
    return out


def config_of(out) -> KnowledgeConfig:
    record = json.loads((out / "config.json").read_text())["config"]
    return KnowledgeConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in record.items()})


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_everything_is_written(finished):
    for name in (*FILES, "report.html", "config.json", "metrics.jsonl"):
        assert (finished / name).stat().st_size, name
    drawn = {path.stem for path in (finished / "figures").iterdir()}
    assert drawn == {
        "extraction",
        "stored_extracted",
        "attention",
        "confound",
        "gradient",
        "ablation",
        "schedules",
        "variations",
    }
    ids = [claim["id"] for claim in json.loads((finished / "claims.json").read_text())]
    for p in range(1, 11):
        assert any(name.startswith(f"p{p}_") for name in ids), f"P{p} has no claim"


def test_tables_hold_every_setting(finished):
    rows = rows_of(finished / "tables/fine_tuned.csv")
    grid = [row for row in rows if row["part"] == "grid"]
    assert {(r["R"], r["K"], r["N_f"]) for r in grid} == {(R, K, n) for R in "46" for K in "12" for n in "28"}
    assert len(grid) == 8 and all(row["seeds"] == "2" for row in rows)
    trained = {(r["trained"], r["chosen"]) for r in rows if r["part"] == "trained"}
    assert trained == {("all", "random"), ("mlp_in", "random"), ("lora", "random"), ("all", "stratified")}
    assert {(r["rank"], r["activation"], r["shared"]) for r in rows if r["part"] == "ablation"} == {
        (rank, kind, shared) for rank in "12" for kind in ("relu", "none") for shared in ("True", "False")
    }
    for row in grid:
        assert 0.0 <= float(row["extraction"]) <= 1.0 and 0.0 < float(row["coverage"]) <= 1.0


def test_attention_starts_uniform_and_sums_to_one(finished):
    rows = rows_of(finished / "tables/attention.csv")
    for row in rows:
        mass = [float(row[name]) for name in ("n", "s", "n2", "r")]
        assert sum(mass) == pytest.approx(1.0, abs=1e-5)
        if row["step"] == "0":
            assert mass == pytest.approx([0.25] * 4, abs=1e-6)
    assert {row["step"] for row in rows} == {"0", "25", "50"}


def test_models_are_checkpoints_of_one_layer(finished):
    folders = sorted((finished / "checkpoints").glob("bank*"))
    saved = [checkpoint.load(folder, kind="one_layer") for folder in folders]
    assert {s.config["model"]["activation"] for s in saved} == {"relu", "none"}
    for s in saved:
        assert len(s.extra["members"]) == s.tree["in"].shape[0]


def test_run_again_trains_nothing_and_changes_nothing(finished, monkeypatch):
    before = {name: (finished / name).read_bytes() for name in FILES}
    monkeypatch.setattr(knowledge, "fit", None)  # whoever trains fails
    assert call(finished) == 0
    assert {name: (finished / name).read_bytes() for name in FILES} == before


def test_killed_between_banks_it_goes_on_to_the_same_numbers(finished, tmp_path, monkeypatch):
    extract, calls = knowledge.extract, []

    def dies(*args):
        calls.append(args[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return extract(*args)

    with monkeypatch.context() as patch:
        patch.setattr(knowledge, "extract", dies)
        assert call(tmp_path / "run") == 130
    assert call(tmp_path / "run") == 0
    for name in FILES:
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_cell_alone_is_the_cell_in_its_bank(finished, tmp_path):
    cfg = config_of(finished)
    nested = knowledge.grid(cfg)
    with Run.open(finished, "knowledge", dataclasses.asdict(cfg), quiet=True) as run:  # loads, trains nothing
        ask = {name: ask(cfg) for name, ask in knowledge.ASK.items()}
        bank = knowledge.run_study(run, cfg, ask, parallel.make_mesh())
    t = knowledge.flat(nested)[0]
    (big,) = (b for b in bank.banks if t.cell in b.cells)
    assert big.world.templates > t.cell.world.templates and big.world.answers > t.cell.world.answers, "no room to spare"
    with Run.open(tmp_path / "alone", "knowledge", {}, quiet=True) as run:
        alone = knowledge.run_study(
            run, dataclasses.replace(cfg, parts=("grid",)), {"grid": [t]}, parallel.make_mesh(1)
        )
    for mine, other in ((bank.cells[t.cell], alone.cells[t.cell]), (bank.tunings[t], alone.tunings[t])):
        for name in other:
            np.testing.assert_allclose(mine[name], other[name], atol=1e-5, err_msg=name)


def test_cells_share_a_bank_as_long_as_room_is_cheap():
    cfg = KnowledgeConfig(text=())
    cells = [
        knowledge.make_cell(cfg, s, templates=R, multiplicity=K) for s in (0, 1) for R in (8, 32, 128) for K in (1, 4)
    ]
    banks = knowledge.banks_of([*cells, cells[0], knowledge.make_cell(cfg, 0, optimizer="sgd")])
    assert sorted(len(bank.cells) for bank in banks) == [1, 4, 8]
    for bank in banks:
        for cell in bank.cells:
            assert cell.world.templates <= bank.world.templates and cell.world.multiplicity <= bank.world.multiplicity
            assert cell.recipe == bank.recipe


def test_a_difference_either_way():
    up, down = knowledge.either([0.3, 0.31, 0.32], 0.1), knowledge.either([-0.3, -0.31, -0.32], 0.1)
    assert up.verdict == down.verdict == "supported"
    assert down.measured == pytest.approx(-0.31) and down.interval[0] < -0.31 < down.interval[1] < 0
    assert knowledge.either([0.3, -0.3, 0.1], 0.1).verdict == "not supported"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"multiplicities": (1, 8)}, ("--multiplicities 8", "--templates 4", "lower K or raise R")),
        ({"shared_multiplicity": 9}, ("--shared-multiplicity 9", "lower K or raise R")),
        ({"reference": 5}, ("--reference 5", "4, 6")),
        ({"tuned": (2, 24)}, ("--tuned 24", "--subjects 24")),
        ({"tuned": ()}, ("--tuned is empty",)),
        ({"parts": ("gradient",)}, ("--parts gradient", "grid")),
        ({"optimizer": "lion"}, ("--optimizer", "adam")),
        ({"steps": 3}, ("--steps", "25")),
        ({"steps": 60}, ("60 steps", "multiple")),
        ({"tuned": (2, 2)}, ("--tuned 2,2", "twice")),
        ({"choose": "known"}, ("--choose known", "--zipf")),
        ({"embedding": "gaussian"}, ("--parts gradient", "one_hot")),
        ({"parts": ()}, ("--parts and --text",)),
        ({"pararel": "folder"}, ("--pararel", "--text")),
    ],
)
def test_bad_settings_are_one_line(tmp_path, capsys, changes, words):
    assert call(tmp_path / "run", **changes) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words), line
    assert not (tmp_path / "run" / "claims.json").exists()


def test_diverged_members_are_named(capsys):
    knowledge.warn(np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]), ["a", "b", "c"])
    assert "2 of 3 models diverged and stopped there, the first b" in capsys.readouterr().err
    knowledge.warn(np.ones((3, 2)), ["a", "b", "c"])
    assert not capsys.readouterr().err


def test_every_preset_is_a_valid_plan():
    for name, cfg in knowledge.PRESETS.items():
        wanted = {part: knowledge.flat(ask(cfg)) for part, ask in knowledge.ASK.items() if part in cfg.parts}
        assert wanted["grid"], name
        assert all(t.subjects < t.cell.world.subjects for group in wanted.values() for t in group)
        assert set(knowledge.gradient_cells(cfg)) <= {t.cell for t in wanted["grid"]}
