"""Language models on facts: who is told, tuned and asked, scores, end to end at a size of seconds, bad input."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax import checkpoint, transformer
from bert6_jax.data.tokenizer import load_tokenizer
from bert6_jax.errors import InputError
from experiments import knowledge_text as text
from experiments.harness import claims, cli
from experiments.harness.run import Run
from experiments.knowledge_text import CONTROL, TEST, TRAIN, TextConfig

TINY = TextConfig(
    people=24, text_attributes=("birth_city", "company"), text_values=4, text_wordings=4, text_control=0.2,
    text_multiplicities=(2, 1), tuned_shares=(0.6, 0.3), text_ranks=(0, 2), text_seeds=2, text_asked=20,
    text_vocab_size=800, text_length=40, text_blocks=1, text_width=16, text_heads=2, text_steps=24, text_batch=5,
    text_lr=1e-2, text_tune_steps=6, text_tune_batch=5, text_tune_lr=1e-2, text_adapter_lr=2e-2, new_tokens=5,
)  # fmt: skip
KS, SHARES, RANKS = TINY.axes


def run_text(run: Run, cfg: TextConfig) -> None:
    text.check(cfg)
    results = text.study(run, cfg)
    run.write_claims(text.text_claims(cfg, results))
    text.report_text(run, cfg, results)


def main(*options):
    return cli.main("text", TextConfig, {"tiny": TINY}, run_text, "test", argv=[str(option) for option in options])


def rows(out, name):
    with (out / "tables" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(out):
    return {file.name: file.read_text() for file in [out / "claims.json", *(out / "tables").glob("*.csv")]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("text") / "run"
    assert main("--quiet", "--out", out) == 0
    return out


# --- facts, their text, and who is asked ---


def write_real(folder):
    """A ParaRel folder and a PopQA file of twelve facts each; Ada is a subject of both."""
    for kind in ("patterns", "facts"):
        (folder / "pararel" / kind).mkdir(parents=True)
    patterns = ["[X] was born in [Y].", "[X] is native to [Y] .", "[X] originates from [Y]", "[Y] bore [X]."]
    subjects = ["Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal", "Ida", "Jo", "Kim", "Lu"]
    facts = [{"sub_label": s, "obj_label": ("Paris", "Rome", "Oslo")[i % 3]} for i, s in enumerate(subjects)]
    for kind, table in (("patterns", [{"pattern": p} for p in patterns]), ("facts", facts)):
        (folder / "pararel" / kind / "P19.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    lines = ["id\tsubj\tprop\tobj\tprop_id\tquestion\tpossible_answers"]
    for i, s in enumerate(["Ada", *(f"Film {c}" for c in "bcdefghijkl")]):
        answers = '"[""Ann Lee"", ""A. Lee""]"' if i % 2 else '"[""Émile Zola""]"'
        lines.append(f"{i}\t{s}\tdirector\t{'Ann Lee' if i % 2 else 'Émile Zola'}\t526\t-\t{answers}")
    (folder / "popqa.tsv").write_text("\n".join(lines) + "\n")
    return dataclasses.replace(
        TINY, text=("real",), pararel=folder / "pararel", pararel_relations=("P19",), popqa=folder / "popqa.tsv",
        text_facts=0,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["biographies", "pronouns", "real"])
def world(request, tmp_path_factory):
    cfg = TINY
    if request.param == "pronouns":
        cfg = dataclasses.replace(TINY, text_fullname=False)
    if request.param == "real":
        cfg = write_real(tmp_path_factory.mktemp("facts"))
    return cfg, text.make_world(cfg, "real" if request.param == "real" else "biographies", 3)


def subject(world, f):
    return world.facts.facts[f].subject


def test_subjects_are_tuned_or_held_out_or_in_no_text(world):
    cfg, world = world
    of = {kind: {subject(world, f) for f in world.asked_Q[world.kind_Q == kind]} for kind in (TRAIN, TEST, CONTROL)}
    tuned = {share: {subject(world, f) for f in world.tuned[share]} for share in SHARES}
    assert tuned[0.3] < tuned[0.6] and of[TRAIN] <= tuned[0.3]
    assert of[TEST] and of[CONTROL] and not of[TEST] & tuned[0.6] and not of[CONTROL] & (tuned[0.6] | of[TEST])
    everybody = {fact.subject for fact in world.facts.facts}
    for K in KS:
        told = {name for name in everybody if any(name in document for document in world.documents[K])}
        assert tuned[0.6] | of[TEST] <= told and not of[CONTROL] & told
    # all facts of a subject are on its side
    assert all((subject(world, f) in tuned[0.3]) == (f in world.tuned[0.3]) for f in range(len(world.facts.facts)))
    people = len(everybody) - len(of[CONTROL])
    per_subject = 1 if world.name == "biographies" else None
    if per_subject:
        assert [len(world.documents[K]) for K in KS] == [people, 2 * people]
    else:
        told = sum(fact.subject not in of[CONTROL] for fact in world.facts.facts)
        assert [len(world.documents[K]) for K in KS] == [told, 2 * told]


def test_a_stem_is_read_with_its_answer_and_a_new_one_never(world):
    cfg, world = world
    for q, f in enumerate(world.asked_Q.tolist()):
        fact = world.facts.facts[f]
        for K in KS:
            stem, documents = world.stems[K][q], world.documents[K]
            if world.kind_Q[q] == CONTROL:
                assert stem == world.new_stems[q] == ""
                continue
            assert any(document.startswith(f"{stem} {fact.answer}") for document in documents)
            assert fact.subject in stem and fact.answer not in stem.split(". ")[-1]
            assert fact.subject in world.new_stems[q]
            new = f"{world.new_stems[q]} {fact.answer}."
            if world.name == "biographies":  # where a pronoun may stand for the subject
                new = new.removeprefix(fact.subject).removeprefix("'s")
            mine = [document for document in documents if fact.subject in document]
            assert len(mine) >= K and not any(new in document for document in mine)


def test_questions_are_learned_from_the_answer_on(world):
    cfg, world = world
    batch, tokenizer = text.question_rows(cfg, world, 0.3), world.tokenizer
    assert batch["ids"].shape[1] % 8 == 0 or batch["ids"].shape[1] == cfg.text_length
    for n, f in enumerate(world.tuned[0.3].tolist()):
        fact = world.facts.facts[f]
        (answer,) = tokenizer.encode_batch([fact.answer])
        read = batch["ids"][n][batch["segment"][n] > 0].tolist()
        predicted = batch["ids"][n][batch["predict"][n]].tolist()
        assert read[0] == tokenizer.cls_id and read[-1] == tokenizer.sep_id
        assert predicted == [*answer.tolist(), tokenizer.sep_id] == read[-len(predicted) :]
        asked = tokenizer.decode(read[1 : -len(predicted)])
        assert asked.startswith("q") and asked.endswith("a :") and fact.subject.lower() in asked
        assert (batch["ids"][n][batch["segment"][n] == 0] == tokenizer.pad_id).all()


def test_answers_are_accepted_as_the_tokenizer_spells_them(tmp_path):
    world = text.make_world(write_real(tmp_path), "real", 0)
    accepted = {world.facts.facts[f].answer: of for f, of in zip(world.asked_Q, world.accepted, strict=True)}
    assert accepted["Émile Zola"] == ("emile zola",)
    assert accepted["Ann Lee"] == ("ann lee", "a. lee")
    assert accepted["Paris"] == ("paris",)
    # an accepted answer outside of the vocabulary is dropped, it would be found in every [UNK]
    popqa = (tmp_path / "popqa.tsv").read_text().replace("A. Lee", "\N{SNOWMAN}")
    (tmp_path / "other.tsv").write_text(popqa)
    (tmp_path / "vocab.txt").write_text("\n".join(t for t in world.tokenizer.tokens if "\N{SNOWMAN}" not in t) + "\n")
    cfg = dataclasses.replace(
        TINY, pararel=tmp_path / "pararel", pararel_relations=(), popqa=tmp_path / "other.tsv",
        text_vocab=tmp_path / "vocab.txt",
    )  # fmt: skip
    world = text.make_world(cfg, "real", 0)
    of = {world.facts.facts[f].answer: of for f, of in zip(world.asked_Q, world.accepted, strict=True)}
    assert of["Ann Lee"] == ("ann lee",)


def test_shots_come_from_the_fine_tuned_facts_of_other_relations(world):
    cfg, world = world
    cfg = dataclasses.replace(cfg, shots=15)
    for prompt, f in zip(text.prompts(cfg, world, world.asked_Q, 0.3), world.asked_Q, strict=True):
        *shots, last = prompt.split("\n\n")
        relations = {fact.relation for fact in (world.facts.facts[i] for i in world.tuned[0.3])}
        assert len(shots) == len(relations - {world.facts.facts[f].relation})
        assert subject(world, f) in last and last.endswith("A:")
        tuned = {subject(world, i) for i in world.tuned[0.3]}
        assert all(any(name in shot for name in tuned) for shot in shots)


def test_facts_of_a_relation_are_limited_and_the_rest_is_the_same(tmp_path):
    cfg = dataclasses.replace(write_real(tmp_path), text_facts=5, text_asked=0)
    world = text.make_world(cfg, "real", 1)
    assert [sum(fact.relation == r for fact in world.facts.facts) for r in ("P19", "director")] == [5, 5]
    everything = text.make_world(dataclasses.replace(cfg, text_facts=0), "real", 1)
    assert set(world.facts.facts) < set(everything.facts.facts) and len(everything.facts.facts) == 24


def test_text_is_packed_whole(world):
    cfg, world = world
    windows = text.packed(cfg, world, 2)
    batch = windows.batch(np.arange(windows.num_rows))
    found = []
    for ids, segment in zip(batch["ids"], batch["segment"], strict=True):
        for s in range(1, segment.max() + 1):
            row = ids[segment == s]
            assert row[0] == world.tokenizer.cls_id and row[-1] == world.tokenizer.sep_id
            found.append(world.tokenizer.decode(row[1:-1]))
    wanted = [world.tokenizer.decode(ids) for ids in world.tokenizer.encode_batch(world.documents[2])]
    assert sorted(found) == sorted(wanted)


# --- asking and scoring ---


def test_the_continuation_is_greedy_and_a_statement_counts_by_its_answer(finished):
    world = text.make_world(TINY, "biographies", 0)
    params = checkpoint.load(finished / "checkpoints" / "text" / "text-biographies-k2-seed0").tree
    ids_QN, p_QN = text.complete(TINY, world, params, world.stems[2])

    @jax.jit
    def forward(ids):
        return transformer.head(params, transformer.forward(params, ids, world.model)[0], world.model)

    q = int(np.flatnonzero(world.kind_Q == TEST)[1])
    row = [world.tokenizer.cls_id, *world.tokenizer.encode_batch([world.stems[2][q]])[0].tolist()]
    for n in range(TINY.new_tokens):
        padded = np.zeros((1, world.model.max_len), np.int32)
        padded[0, : len(row)] = row
        p_V = np.asarray(jax.nn.softmax(forward(jnp.asarray(padded))[0, len(row) - 1]))
        assert ids_QN[q, n] == p_V.argmax()
        np.testing.assert_allclose(p_QN[q, n], p_V.max(), rtol=1e-4)
        row.append(int(p_V.argmax()))
        if row[-1] == world.tokenizer.sep_id:
            break
    stored = text.completed(TINY, world, params, world.stems[2])
    for q, f in enumerate(world.asked_Q.tolist()):
        (answer,) = world.tokenizer.encode_batch([world.facts.facts[f].answer])
        wanted = -1 if world.kind_Q[q] == CONTROL else int((ids_QN[q, : len(answer)] == answer).all())
        assert stored[q] == wanted


def test_what_is_said_ends_at_the_end_token(monkeypatch):
    world = text.make_world(TINY, "biographies", 0)
    stop, (word,) = world.tokenizer.sep_id, world.tokenizer.encode_batch(["born"])[0]
    ids = np.array([[word, word, stop, stop, stop], [stop] * 5, [word] * 5], np.int32)
    p = np.array([[0.5, 1.0, 0.3, 0.3, 0.3], [0.2] * 5, [0.5, 0.5, 1.0, 0.5, 0.5]], np.float32)
    monkeypatch.setattr(text, "complete", lambda *_: (ids, p))
    found = text.answered(TINY, world, None, ["", "", ""])
    assert found["said"].tolist() == ["born born", "", "born born born born born"]
    np.testing.assert_allclose(found["probability"], [0.6, 0.2, 0.6], rtol=1e-6)


def test_scores_against_a_plain_count():
    world = text.make_world(TINY, "biographies", 1)
    rng = np.random.default_rng(0)
    Q = len(world.asked_Q)
    facts = [world.facts.facts[f] for f in world.asked_Q.tolist()]
    kind = world.kind_Q.tolist()
    said = [fact.answer.lower() if rng.random() < 0.5 else "nonsense" for fact in facts]
    said[kind.index(TEST)] = "x" + facts[kind.index(TEST)].answer.lower()  # a substring, not a word
    zero = [fact.answer.lower() if rng.random() < 0.3 else "" for fact in facts]
    stored, new = ([-1 if k == CONTROL else int(rng.random() < 0.6) for k in kind] for _ in range(2))
    p = rng.random(Q)
    before = {"stored": np.array(stored), "new": np.array(new), "said": np.array(zero)}
    found = text.score(world, before, {"said": np.array(said), "probability": p}, 0.3)
    shown = {world.facts.facts[f].answer for f in world.tuned[0.3]}
    right = [fact.answer.lower() in s for fact, s in zip(facts, said, strict=True)]
    exact = [fact.answer.lower() == s for fact, s in zip(facts, said, strict=True)]

    def mean(values, among):
        picked = [v for v, a in zip(values, among, strict=True) if a]
        return sum(picked) / len(picked) if picked else np.nan

    test = [k == TEST for k in kind]
    seen = [fact.answer in shown for fact in facts]
    most = {}
    for relation in ("birth_city", "company"):
        answers = [world.facts.facts[f].answer for f in world.tuned[0.3] if world.facts.facts[f].relation == relation]
        most[relation] = min(answers, key=lambda a, answers=answers: (-answers.count(a), a))
    lost = [t and s == 1 and not r for t, s, r in zip(test, stored, right, strict=True)]
    wanted = {
        "stored": mean([s == 1 for s in stored], [s >= 0 for s in stored]),
        "new_wording": mean([s == 1 for s in new], [s >= 0 for s in new]),
        "zero_shot": mean([fact.answer.lower() == s for fact, s in zip(facts, zero, strict=True)], test),
        "fine_tuned": mean(right, [k == TRAIN for k in kind]),
        "extraction": mean(right, test),
        "exact": mean(exact, test),
        "several": mean(right, test),  # everybody has two answers
        "answer_seen": mean(right, [t and s for t, s in zip(test, seen, strict=True)]),
        "answer_unseen": mean(right, [t and not s for t, s in zip(test, seen, strict=True)]),
        "never_told": mean(right, [k == CONTROL for k in kind]),
        "majority": mean([most[fact.relation] == fact.answer for fact in facts], test),
        "not_extracted": mean([not r for r in right], [t and s == 1 for t, s in zip(test, stored, strict=True)]),
        "hallucination": mean(p > 0.5, lost),
    }
    assert found.keys() == wanted.keys() == text.METRICS.keys()
    for name in wanted:
        assert found[name] == pytest.approx(wanted[name], nan_ok=True), name
    assert found["exact"] < found["extraction"]


def made(cfg, **changes):
    """Results with these numbers: a function of (K's place, share's place) or a constant a metric."""
    base = {name: 0.0 for name in text.METRICS} | {"stored": 1.0, "majority": 0.1, "never_told": 0.1} | changes
    Ks, shares, ranks = cfg.axes
    scores = {
        ("biographies", s, K, share, rank): {n: v(k, x) + 1e-3 * s if callable(v) else v for n, v in base.items()}
        for s in range(cfg.text_seeds)
        for k, K in enumerate(Ks)
        for x, share in enumerate(shares)
        for rank in ranks
    }
    return text.Results({"biographies": []}, {}, {}, scores)


def verdicts(cfg, **changes):
    judged = text.text_claims(cfg, made(cfg, **changes))
    prefix, suffix = "text_", "_biographies"
    assert all(claim.id.startswith(prefix) and claim.id.endswith(suffix) for claim in judged)
    return {claim.id.removeprefix(prefix).removesuffix(suffix): claim.verdict for claim in judged}


def test_rules_of_the_claims_hold_and_break():
    yes, no, open_ = claims.VERDICTS
    good = dict(
        extraction=lambda k, x: 0.2 + 0.4 * k + 0.2 * x, not_extracted=lambda k, x: 0.8 - 0.4 * k - 0.2 * x,
        answer_unseen=0.3,
    )  # fmt: skip
    assert set(verdicts(TINY, **good).values()) == {yes}
    assert {"stored", "zero_shot", "rank0", "rank2"} <= verdicts(TINY).keys()
    bad = {
        "stored": {"stored": 0.89},
        "zero_shot": {"zero_shot": 0.16},
        "rank0": {"extraction": lambda k, x: 0.05},
        "guessing": {"never_told": 0.9},
        "multiplicity": {"extraction": lambda k, x: 0.5 - 0.1 * k + 0.1 * x},
        "coverage": {"extraction": lambda k, x: 0.5 + 0.1 * k - 0.1 * x},
        "not_extracted": {"not_extracted": lambda k, x: 0.4},
        "unseen_answers": {"answer_unseen": 0.1},
    }
    for name, change in bad.items():
        assert verdicts(TINY, **(good | change))[name] == no, name
    single = dataclasses.replace(TINY, text_multiplicities=(1,), tuned_shares=(0.5,))
    assert [verdicts(single, **good)[name] for name in ("multiplicity", "coverage")] == [open_, open_]
    assert verdicts(TINY, **(good | {"answer_unseen": float("nan")}))["unseen_answers"] == open_


# --- end to end ---


def test_tables_hold_what_the_models_said(finished):
    table = rows(finished, "text_extraction")
    assert len(table) == len(KS) * len(SHARES) * len(RANKS) * len(text.METRICS)
    world = text.make_world(TINY, "biographies", 1)
    with np.load(finished / "stages" / "text-biographies-k2-seed1-share0.6-rank0.npz") as stage:
        said = stage["said"].tolist()
    asked = zip(world.asked_Q.tolist(), world.kind_Q.tolist(), said, strict=True)
    of = [(world.facts.facts[f], words) for f, kind, words in asked if kind == TEST]
    mine = [row for row in rows(finished, "text_answers") if row["seed"] == "1"]
    assert [(row["subject"], row["said"]) for row in mine] == [(fact.subject, words) for fact, words in of]
    right = [fact.answer.lower() in words for fact, words in of]
    assert [row["extracted"] == "True" for row in mine] == right
    cells = [dict(zip(("multiplicity", "share", "rank", "metric"), ("2", "0.6", "0", m), strict=True))
             for m in ("extraction", "stored")]  # fmt: skip
    means = [float(row["mean"]) for cell in cells for row in table if cell.items() <= row.items()]
    both = rows(finished, "text_answers")
    by_seed = [np.mean([row["extracted"] == "True" for row in both if row["seed"] == s]) for s in "01"]
    assert means[0] == pytest.approx(np.mean(by_seed))
    relations = rows(finished, "text_relations")
    assert {row["relation"] for row in relations} == {"birth_city", "company"}
    total = sum(float(row["extracted"]) * int(row["facts"]) for row in relations)
    assert total == pytest.approx(sum(row["extracted"] == "True" for row in both))
    for name in ("stored", "coverage", "relations"):
        assert (finished / "figures" / f"text_{name}_biographies.png").stat().st_size > 10_000


def test_training_is_logged_and_learns(finished):
    entries = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    loss = [entry["loss"] for entry in entries if entry["stage"] == "text-biographies-k1-seed0"]
    assert len(loss) == TINY.text_steps and loss[-1] < 0.7 * loss[0]
    for rank in RANKS:
        tuned = [entry for entry in entries if entry["stage"] == f"text-biographies-k2-seed0-share0.6-rank{rank}"]
        assert len(tuned) == TINY.text_tune_steps and tuned[-1]["loss"] < tuned[0]["loss"]
        # the batch's answers and end tokens alone
        world = text.make_world(TINY, "biographies", 0)
        predicted = text.question_rows(TINY, world, 0.6)["predict"].sum(1)
        assert tuned[0]["count"] <= np.sort(predicted)[-5:].sum() < 5 * 10


def test_adapters_leave_the_rest_of_the_model_alone(finished, tmp_path):
    world = text.make_world(TINY, "biographies", 0)
    path = finished / "checkpoints" / "text" / "text-biographies-k2-seed0"
    saved = checkpoint.load_transformer(path)
    assert saved[1] == world.model and saved[2].tokenizer["sha256"] == world.tokenizer.sha256
    assert load_tokenizer(finished / saved[2].tokenizer["file"]).sha256 == world.tokenizer.sha256
    with Run.open(tmp_path / "run", "text", {}, quiet=True) as run:
        for rank in RANKS:
            after = text.tuned(run, TINY, world, saved[0], 2, 0.6, rank)
            same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), saved[0], after)
            assert same["embed"]["token"] == same["blocks"]["norm_mlp"]["scale"] == bool(rank)
            assert not any(same["blocks"]["mlp"][name]["kernel"] for name in ("in", "out"))


def test_started_again_nothing_is_trained_and_nothing_changes(finished, monkeypatch):
    before = numbers(finished)
    monkeypatch.setattr(text.train, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert main("--quiet", "--out", finished) == 0
    assert numbers(finished) == before


def test_interrupted_anywhere_it_ends_with_the_same_numbers(finished, tmp_path, monkeypatch):
    """The last model and its fine-tunings again, killed in the middle of both; it goes on from its checkpoint."""
    monkeypatch.setattr(text, "CHECKPOINT_EVERY", 10)
    out, log, last = tmp_path / "run", Run.log, "text-biographies-k2-seed1"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints" / "text" / last)
    for path in (out / "stages").glob(f"{last}*"):
        path.unlink()
    for stage, step in ((last, 21), (f"{last}-share0.6-rank2", 3)):

        def interrupted(self, name, number, stage=stage, step=step, **values):
            if (name, number) == (stage, step):
                raise KeyboardInterrupt
            log(self, name, number, **values)

        monkeypatch.setattr(Run, "log", interrupted)
        assert main("--quiet", "--out", out) == 130
        if step == 21:
            assert checkpoint.steps(out / "checkpoints" / "text" / f"{stage}-state")[-1] in (10, 20)
    monkeypatch.setattr(Run, "log", log)
    assert main("--quiet", "--out", out) == 0
    assert numbers(out) == numbers(finished)


def test_no_set_is_no_study(tmp_path):
    assert main("--quiet", "--text", "", "--out", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "claims.json").read_text()) == []


# --- bad input ---


@pytest.mark.parametrize(
    "options, words",
    [
        (["--text-ranks", ""], "--text-ranks is empty"),
        (["--text-width", "18", "--text-heads", "4"], "--text-width 18 is not a multiple of --text-heads 4"),
        (["--text", "poems"], "none of biographies, real"),
        (["--text", "real"], "--text real needs --pararel FOLDER or --popqa FILE"),
        (["--text", "real", "--popqa", "no/such.tsv"], "no/such.tsv"),
        (["--text", "real", "--pararel", "no/such"], "no/such"),
        (["--fields", "no/such"], "no/such"),
        (["--text-vocab", "no/such.txt"], "no/such.txt"),
        (["--text-multiplicities", "9"], "--text-wordings 4"),
        (["--text-length", "20"], "give --text-length"),
        (["--tuned-shares", "0.5,1"], "1 is too large"),
    ],
)
def test_bad_settings_are_one_line_and_leave_nothing(options, words, tmp_path, capsys):
    assert main(*options, "--quiet", "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_an_answer_that_is_not_in_the_vocabulary_is_named(tmp_path):
    cfg = write_real(tmp_path)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.,:?'"]
    tokens += [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    cfg = dataclasses.replace(cfg, text_vocab=tmp_path / "vocab.txt", text_length=64)
    text.make_world(cfg, "real", 0)
    (tmp_path / "vocab.txt").write_text("\n".join(t for t in tokens if t != "##s") + "\n")
    with pytest.raises(InputError, match=r"the answer 'Paris' of 'Ada' \(P19\) is not in the vocabulary; give"):
        text.make_world(dataclasses.replace(cfg, text_lr=3e-3), "real", 0)


def test_a_text_longer_than_a_row_is_named():
    world = text.make_world(TINY, "biographies", 0)
    with pytest.raises(InputError, match=r"biographies: a text needs \d\d positions \('.*'\.\.\.\) and a row has 18"):
        text.make_world(dataclasses.replace(TINY, text_length=18), "biographies", 0)
    assert world.model.max_len == TINY.text_length + TINY.new_tokens


# --- real data ---


def test_pararel_and_popqa_make_a_world(shared_data):
    cfg = TextConfig(
        text=("real",), pararel=shared_data / "pararel", popqa=shared_data / "popqa" / "popQA.tsv", text_facts=40
    )
    world = text.make_world(cfg, "real", 0)
    assert len({fact.relation for fact in world.facts.facts}) == 7 + 16
    told = sum(len(world.tuned[share]) for share in cfg.axes[1][-1:])
    assert told and all(len(documents) % len(world.documents[1]) == 0 for documents in world.documents.values())
    assert len(world.documents[4]) == 4 * len(world.documents[1])
    assert all(world.accepted) and world.model.vocab_size % 256 == 0
    assert sum(bool(stem) for stem in world.new_stems) > 0.9 * (world.kind_Q != CONTROL).sum()
