"""Facts as text: both readers and their bad input, wordings, prompts, the quirks of PopQA's scoring, splits."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from bert6_jax.data import facts as module
from bert6_jax.data.facts import (
    ANSWER,
    PARAREL_QUESTIONS,
    PARAREL_TO_POPQA,
    POPQA,
    SUBJECT,
    Fact,
    Facts,
    exact_match,
    first_answer,
    majority,
    merge,
    popqa_correct,
    popqa_shots,
    prompt,
    question,
    read_pararel,
    read_popqa,
    render,
    split_subjects,
    statement,
    stem,
)
from bert6_jax.errors import InputError

PATTERNS = {
    "P19": ["[X] was born in [Y].", "[X]  is native to [Y] .", "[X] is a [Y]-born person.", "[X], a child of [Y],"],
    "P106": ["[X]'s occupation is [Y]", "[X] works as [Y]."],
    "P39": ["[Y] is the position of [X]."],
}
FACTS = {
    "P19": [("Ada", "London"), ("Bob", "Rome"), ("Ada", "Paris"), ("Ada", "London")],
    "P106": [("Ada", "poet"), ("Cem", "actor")],
    "P39": [("Leo", "pope")],
    "P31": [("Leo", "human")],
}
COLUMNS = ["id", "subj", "prop", "obj", "subj_id", "prop_id", "question", "possible_answers"]


def pararel(folder, patterns=PATTERNS, facts=FACTS):
    for kind in ("patterns", "facts"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for name, rows in patterns.items():
        text = "".join(json.dumps({"pattern": row, "tense": "past"}) + "\n" for row in rows)
        (folder / "patterns" / f"{name}.jsonl").write_text(text)
    for name, rows in facts.items():
        text = "".join(json.dumps({"sub_label": s, "obj_label": o, "uuid": "u"}) + "\n" for s, o in rows)
        (folder / "facts" / f"{name}.jsonl").write_text(text)
    return folder


def popqa_row(number, subj, prop, obj, prop_id, answers=None):
    asked = POPQA.get(prop_id, ("?",))[0].replace(SUBJECT, subj)
    row = [f"test_{number}", subj, prop, obj, "", prop_id, asked, json.dumps(answers or [obj])]
    return dict(zip(COLUMNS, row, strict=True))


def popqa(path, rows, columns=COLUMNS):
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, delimiter="\t", extrasaction="ignore", lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(out.getvalue(), encoding="utf-8", newline="")
    return path


def small_facts(people=12, relations=("lives", "works", "likes"), statements=4):
    """Hand-made facts: subject s{i} has answer a{(i + j) % 3} in relation j."""
    rows = tuple(
        Fact(f"s{i}", name, f"a{(i + j) % 3}", (f"a{(i + j) % 3}",))
        for i in range(people)
        for j, name in enumerate(relations)
    )
    wordings = {name: tuple(f"{SUBJECT} {name} so{k} {ANSWER}." for k in range(statements)) for name in relations}
    return Facts(rows, wordings, {name: f"What {name} {SUBJECT}?" for name in relations})


# --- the tables ------------------------------------------------------------------------------------------------------


def test_statements_of_popqa_are_wordings_of_one_relation():
    everything = [template for _, templates in POPQA.values() for template in templates]
    assert len(POPQA) == 16 and len(set(everything)) == len(everything)
    for asked, templates in POPQA.values():
        assert len(templates) >= 8 and asked.count(SUBJECT) == 1 and asked.endswith("?") and ANSWER not in asked
        for template in templates:
            assert template.count(SUBJECT) == 1 and template.endswith(f" {ANSWER}."), template
            assert template[0] in "[ABCDEFGHIJKLMNOPQRSTUVWXYZ" and not re.search(r" an? \[Y\]|  | ,", template)


def test_questions_tell_their_relation():
    asked = list(PARAREL_QUESTIONS.values())
    assert len(asked) == 39 == len(set(asked)) and {"P31", "P527"}.isdisjoint(PARAREL_QUESTIONS)
    assert all(text.count(SUBJECT) == 1 and text.endswith("?") and "  " not in text for text in asked)
    assert {relation: PARAREL_QUESTIONS[relation] for relation in PARAREL_TO_POPQA} == {
        "P106": "What is [X]'s occupation?",
        "P19": "In what city was [X] born?",
        "P136": "What genre is [X]?",
        "P17": "In what country is [X]?",
        "P1376": "What is [X] the capital of?",
        "P36": "What is the capital of [X]?",
        "P140": "What is the religion of [X]?",
    }


# --- ParaRel ---------------------------------------------------------------------------------------------------------


def test_pararel(tmp_path):
    read = read_pararel(pararel(tmp_path))
    assert read.statements == {
        "P19": ("[X] was born in [Y].", "[X] is native to [Y]."),
        "P106": ("[X]'s occupation is [Y].", "[X] works as [Y]."),
    }
    assert read.facts == (
        Fact("Ada", "P19", "London", ("London", "Paris")),
        Fact("Bob", "P19", "Rome", ("Rome",)),
        Fact("Ada", "P106", "poet", ("poet",)),
        Fact("Cem", "P106", "actor", ("actor",)),
    )
    assert read.questions == {name: PARAREL_QUESTIONS[name] for name in ("P19", "P106")}


def test_pararel_relations_in_the_order_asked_for_and_answers_anywhere(tmp_path):
    read = read_pararel(pararel(tmp_path), ["P106", "P19", "P106"])
    assert list(read.statements) == ["P106", "P19"] and read.facts[0].relation == "P106"
    anywhere = read_pararel(tmp_path, answer_last=False)
    assert anywhere.statements["P39"] == ("[Y] is the position of [X].",)
    assert anywhere.statements["P19"][2:] == ("[X] is a [Y]-born person.", "[X], a child of [Y],")


def test_templates_alike_after_normalisation_are_one(tmp_path):
    folder = pararel(tmp_path, {"P19": ["[X] in [Y]", " [X] in [Y] .", "[X] in [Y]."]}, {"P19": [("Ada", "Rome")]})
    assert read_pararel(folder).statements["P19"] == ("[X] in [Y].",)


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("He was born in [Y].", "without [X]"),
        ("[X] was born.", "without [Y]"),
        ("[X] and [X] in [Y].", "more than one [X]"),
        ("[X] in [Y] or [Y].", "more than one [Y]"),
        ("", "'pattern' is empty"),
        (3, "'pattern' is a JSON number"),
        ("[X] \ud800 [Y].", "surrogate"),
    ],
)
def test_bad_patterns(tmp_path, pattern, words):
    folder = pararel(tmp_path, PATTERNS | {"P106": ["[X] works as [Y].", pattern]})
    with pytest.raises(InputError, match=rf"^\S*P106\.jsonl:2: .*{re.escape(words)}") as error:
        read_pararel(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row, words",
    [
        ('{"sub_label": " ", "obj_label": "x"}', "field 'sub_label' is empty"),
        ('{"sub_label": "x"}', "no field 'obj_label' .there: 'sub_label'"),
        ('{"sub_label": "x", "obj_label": ["y"]}', "'obj_label' is a JSON array"),
        ('["x", "y"]', "a JSON array, not an object"),
        ("{", "not JSON"),
    ],
)
def test_bad_facts(tmp_path, row, words):
    folder = pararel(tmp_path)
    with open(folder / "facts" / "P106.jsonl", "a") as file:
        file.write(f"\n{row}\n")
    with pytest.raises(InputError, match=rf"P106\.jsonl:4: .*{words}"):
        read_pararel(folder)


def test_relations_that_cannot_be_used(tmp_path):
    folder = pararel(tmp_path, PATTERNS | {"P20": ["[X] died in [Y]."]})
    with pytest.raises(InputError, match="'P31' has no file patterns/P31.jsonl; give some of P19, P39, P106"):
        read_pararel(folder, ["P31"])
    with pytest.raises(InputError, match="'P20' has no file facts/P20.jsonl"):
        read_pararel(folder, ["P19", "P20"])
    with pytest.raises(InputError, match=r"P39.jsonl: relation 'P39': none of its 1 templates ends in \[Y\]"):
        read_pararel(folder, ["P39"])
    with pytest.raises(InputError, match="no relation with patterns/Pxx.jsonl"):
        read_pararel(tmp_path / "elsewhere")
    odd = pararel(tmp_path / "odd", {"P9": ["[X] of [Y]."], "P39": PATTERNS["P39"]}, {"P9": [("a", "b")], "P39": []})
    with pytest.raises(InputError, match="P9.jsonl: no question is known for relation 'P9'"):
        read_pararel(odd)
    (odd / "facts" / "P9.jsonl").unlink()
    with pytest.raises(InputError, match="odd: no fact of a relation with a usable template"):
        read_pararel(odd)


# --- PopQA -----------------------------------------------------------------------------------------------------------


def test_popqa(tmp_path):
    rows = [
        popqa_row(1, 'The "Rack"', "director", "A. Laven", 526, ["Arnold  Laven", "A. Laven"]),
        popqa_row(2, "College", "director", "Keaton", 526),
        popqa_row(3, "College", "director", "Horne", 526, ["Horne", "J. Horne"]) | {"question": "anything"},
        popqa_row(4, "College", "genre", "comedy film", 91, ["comedy"]),
    ]
    read = read_popqa(popqa(tmp_path / "a.tsv", rows))
    assert read.facts == (
        Fact('The "Rack"', "director", "A. Laven", ("A. Laven", "Arnold  Laven")),
        Fact("College", "director", "Keaton", ("Keaton", "Horne", "J. Horne")),
        Fact("College", "genre", "comedy film", ("comedy film", "comedy")),
    )
    assert read.questions == {"director": "Who was the director of [X]?", "genre": "What genre is [X]?"}
    assert read.statements == {"director": POPQA[526][1], "genre": POPQA[91][1]}
    turned = [c for c in reversed(COLUMNS) if c != "question"]  # other columns, another order
    assert read_popqa(popqa(tmp_path / "b.tsv", rows, turned)) == read


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"possible_answers": '["Rome"'}, "field 'possible_answers' is not JSON"),
        ({"possible_answers": ""}, "field 'possible_answers' is not JSON"),
        ({"possible_answers": '"Rome"'}, "'possible_answers' is a JSON string, not a list"),
        ({"possible_answers": "[]"}, "'possible_answers' is an empty list"),
        ({"possible_answers": '["Rome", 3]'}, "'possible_answers' holds a JSON number, not only strings"),
        ({"possible_answers": '["Rome", " "]'}, "'possible_answers', an answer is empty"),
        ({"possible_answers": r'["\ud800"]'}, "surrogate"),
        ({"possible_answers": "[" * 100_000}, "field 'possible_answers' is not JSON"),
        ({"subj": " "}, "field 'subj' is empty"),
        ({"obj": ""}, "field 'obj' is empty"),
        ({"prop": ""}, "field 'prop' is empty"),
        ({"prop_id": "19"}, "unknown prop_id '19'; give one of 22, 91"),
        ({"prop_id": "P22"}, "unknown prop_id 'P22'"),
        ({"prop_id": "9" * 5000}, "unknown prop_id '999"),
        ({"prop_id": "422"}, "prop 'genre' with prop_id 422, before it was 91"),
        ({"prop": "kind"}, "prop 'kind' with prop_id 91, before it was 91 and prop_id 91 was 'genre'"),
    ],
)
def test_bad_rows_of_popqa(tmp_path, changes, words):
    rows = [popqa_row(7, "It", "genre", "drama", 91), popqa_row(8, "Up", "genre", "comedy", 91) | changes]
    path = popqa(tmp_path / "a.tsv", rows)
    with pytest.raises(InputError) as error:
        read_popqa(path)
    text = str(error.value)
    assert text.startswith(f"{path}:3: row 'test_8': ") and words in text and "\n" not in text and len(text) < 400


def test_bad_tables(tmp_path):
    path = tmp_path / "a.tsv"
    row = popqa_row(7, "It", "genre", "drama", 91)
    columns = [c for c in COLUMNS if c not in ("prop_id", "possible_answers")]
    with pytest.raises(InputError, match=r"a.tsv:1: no column 'prop_id', 'possible_answers' \(there: 'id', 'subj'"):
        read_popqa(popqa(path, [row], columns))
    with pytest.raises(InputError, match="a header and no rows"):
        read_popqa(popqa(path, []))
    with pytest.raises(InputError, match="a.tsv: the file is empty"):
        path.write_text("\n \n")
        read_popqa(path)
    whole = popqa(path, [row]).read_text()
    path.write_text(whole + "x\ty\n")
    with pytest.raises(InputError, match="a.tsv:3: 2 fields, the header has 8"):
        read_popqa(path)
    path.write_text(whole + '"open\tx\n\n' + "more\n")
    with pytest.raises(InputError, match="a.tsv:3: not TSV in the row that starts here"):
        read_popqa(path)
    path.write_text(whole.replace("subj_id", "subj"))
    with pytest.raises(InputError, match="a.tsv:1: column 'subj' is there twice"):
        read_popqa(path)
    path.write_bytes(whole.encode() + b"\xff\n")
    with pytest.raises(InputError, match="a.tsv:3: byte 1 of the line is not UTF-8"):
        read_popqa(path)
    with pytest.raises(InputError, match="b.tsv: cannot be read"):
        read_popqa(tmp_path / "b.tsv")


def test_merge(tmp_path):
    real, asked = read_pararel(pararel(tmp_path), ["P19"]), small_facts(2)
    both = merge(real, asked)
    assert both.facts == real.facts + asked.facts and list(both.questions) == ["P19", "lives", "works", "likes"]
    again = Facts(
        (Fact("Ada", "P19", "Bath", ("Bath", "London")), Fact("Dee", "P19", "Rome", ("Rome",))),
        {"P19": ("[X] was born in [Y].", "[X] is from [Y].")},
        {"P19": real.questions["P19"]},
    )
    more = merge(real, again)
    assert more.facts[0] == Fact("Ada", "P19", "London", ("London", "Paris", "Bath")) and len(more.facts) == 3
    assert more.statements["P19"] == ("[X] was born in [Y].", "[X] is native to [Y].", "[X] is from [Y].")
    with pytest.raises(InputError, match="relation 'P19' has the questions"):
        merge(real, again._replace(questions={"P19": "Where is [X] from?"}))
    assert merge() == Facts((), {}, {})


# --- words -----------------------------------------------------------------------------------------------------------


def test_slots_are_filled_once():
    fact = Fact("[Y] and [X]", "r", "the [X]", ("the [X]",))
    assert statement("Of [X], [Y].", fact) == "Of [Y] and [X], the [X]."
    assert stem("Of [X]: [Y].", fact) == "Of [Y] and [X]:"
    assert question(Facts((fact,), {}, {"r": "Who is [X]?"}), fact) == "Q: Who is [Y] and [X]? A:"


@pytest.mark.parametrize("K, copies", [(1, 1), (3, 2), (4, 1)])
def test_render_states_every_fact_in_k_ways(K, copies):
    facts = small_facts()
    F = len(facts.facts)
    stated = render(facts, K, seed=5, copies=copies)
    assert stated.worded_FK.shape == (F, K) and stated.worded_FK.dtype == np.int32 and stated.facts is facts
    expected = Counter()
    for fact, worded_K in zip(facts.facts, stated.worded_FK, strict=True):
        assert len(set(worded_K)) == K and worded_K.min() >= 0
        for k in worded_K:
            expected[f"{fact.subject} {fact.relation} so{k} {fact.answer}."] += copies
    assert Counter(stated.documents) == expected and len(stated.documents) == F * K * copies
    assert render(facts, K, 5, copies).documents == stated.documents
    assert render(facts, K, 6, copies).documents != stated.documents


def test_render_draws_all_wordings_and_shuffles_over_subjects():
    facts = small_facts(people=400)
    stated = render(facts, 2, seed=0)
    counts = np.bincount(stated.worded_FK[:, 0], minlength=4)
    assert abs(counts - 300).max() < 5 * np.sqrt(1200 * 3 / 16), counts
    np.testing.assert_array_equal(render(facts, 4, 0).worded_FK[:, :2], stated.worded_FK)  # nested in K
    subjects = [document.split()[0] for document in stated.documents]
    # A subject has 6 of the 2,400 documents: 5 neighbours are of one subject by chance, 2,000 where it stays together.
    assert sum(a == b for a, b in zip(subjects, subjects[1:], strict=False)) < 20
    place = [int(subject[1:]) for subject in subjects]
    assert abs(np.corrcoef(place, np.arange(len(place)))[0, 1]) < 0.1


@pytest.mark.parametrize(
    "arguments, line",
    [
        ((5, 0), "relation 'lives' has 4 statements, 5 different ones are asked for"),
        ((0, 0), "multiplicity is 0; give 1 or more"),
        ((1, -1), "seed is -1; give 0 or more"),
        ((1, 0, 0), "copies is 0; give 1 or more"),
    ],
)
def test_bad_render(arguments, line):
    with pytest.raises(InputError, match=line):
        render(small_facts(), *arguments)


def test_prompts():
    facts = small_facts(3)
    first, second, third = facts.facts[0], facts.facts[4], facts.facts[8]
    assert prompt(facts, first) == "Q: What lives s0? A:"
    assert prompt(facts, first, [second, third]) == (
        "Q: What works s1? A: a2\n\nQ: What likes s2? A: a1\n\nQ: What lives s0? A:"
    )


def test_shots():
    facts = small_facts(40, relations=tuple("abcdef"))
    pool = np.arange(120)
    drawn = [popqa_shots(facts, fact, pool) for fact in facts.facts]
    for fact, shots in zip(facts.facts, drawn, strict=True):
        assert sorted(shot.relation for shot in shots) == sorted(set("abcdef") - {fact.relation})
        assert all(facts.facts.index(shot) < 120 for shot in shots)
    orders = {tuple(shot.relation for shot in shots) for shots in drawn[::6]}
    assert len(orders) > 20  # of 40 facts of relation a
    chosen = Counter(shot for shots in drawn for shot in shots)
    assert len(chosen) > 110 and max(chosen.values()) < 25  # of 1,200 draws over 120
    assert popqa_shots(facts, facts.facts[7], pool) == drawn[7]
    assert popqa_shots(facts, facts.facts[7], pool, seed=1) != drawn[7]
    assert popqa_shots(facts, facts.facts[0], [0, 1, 6]) == [facts.facts[1]]  # relation b alone is in the pool


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "generated, answer",
    [
        (" Rome\nQ: What", " Rome"),
        ("\n\n Rome\n\nQ:", " Rome"),
        ("\nRome", ""),  # one newline at the start empties the prediction
        ("\n\n\nRome", ""),
        (" Rome\r\nx", " Rome\r"),  # \n alone ends a line
        ("", ""),
    ],
)
def test_first_answer(generated, answer):
    assert first_answer(generated) == answer


@pytest.mark.parametrize(
    "prediction, accepted, lenient, strict",
    [
        (" Rome.", ["Rome"], True, True),
        (" rome", ["Rome"], True, True),
        ("ROME", ["Rome"], False, True),
        ("New york city", ["new York City"], True, True),  # capitalize lowers the other letters
        ("new york city", ["New York City"], True, True),
        ("New York City", ["new york city"], False, True),
        ("a Roman", ["Rom"], True, False),  # part of a word
        ("the usage", ["US"], True, False),
        ("in the US.", ["US"], True, True),
        ("x Paris, Texas", ["London", "Paris"], True, True),
        (" New \n York", ["new  york"], False, True),  # white space
        ("sky-blue", ["blue"], True, True),
        ("f (x) y", ["(x)"], True, True),  # no pattern
        ("axb", ["a.b"], False, False),
        ("", ["Rome"], False, False),
        ("Rome", [], False, False),
    ],
)
def test_scores(prediction, accepted, lenient, strict):
    assert popqa_correct(prediction, accepted) is lenient
    assert exact_match(prediction, accepted) is strict


def test_majority_against_counting():
    facts = small_facts(30)
    extra = (
        Fact("x", "lives", "a9", ("a9", "the A1 road")),  # accepts the most frequent answer as part of another
        Fact("y", "alone", "a0", ("a0",)),
    )
    facts = facts._replace(facts=facts.facts + extra, questions=facts.questions | {"alone": "?"})
    rng = np.random.default_rng(0)
    train, test = np.split(rng.permutation(90), [50])
    test = np.append(test, [90, 91])
    expected = defaultdict(lambda: [0, 0])
    for f in test:
        fact = facts.facts[f]
        answers = [facts.facts[t].answer for t in train if facts.facts[t].relation == fact.relation]
        best = min(sorted(set(answers)), key=lambda a: -answers.count(a), default=None)
        expected[fact.relation][0] += best in fact.accepted
        expected[fact.relation][1] += 1
    found = majority(facts, train, test)
    assert found == {relation: tuple(sums) for relation, sums in expected.items()}
    assert found["alone"] == (0, 1) and sum(hits for hits, _ in found.values()) > 5
    assert sum(count for _, count in found.values()) == len(test)


def test_majority_of_ties_and_scores():
    wordings = {"r": ("[X] r [Y].",)}
    rows = [("s0", "b"), ("s1", "a"), ("s2", "a c"), ("s3", "b"), ("s4", "a")]
    facts = Facts(tuple(Fact(s, "r", a, (a,)) for s, a in rows), wordings, {"r": "r [X]?"})
    assert majority(facts, [0, 1], [4]) == {"r": (1, 1)}  # a before b
    assert majority(facts, [1, 0], [3]) == {"r": (0, 1)}
    lenient, strict = (majority(facts, [2], [1, 0], score) for score in (popqa_correct, exact_match))
    assert lenient == strict == {"r": (1, 2)}  # "a" is in "a c"
    part = facts._replace(facts=(facts.facts[0]._replace(answer="ab"), facts.facts[0]))
    assert majority(part, [0], [1]) == {"r": (1, 1)} and majority(part, [0], [1], exact_match) == {"r": (0, 1)}


# --- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share, subjects", [(0.25, 3), (0.5, 6), (0.001, 1), (0.999, 11)])
def test_splits_keep_subjects_together(share, subjects):
    facts = small_facts(12)
    rows = list(facts.facts)
    rows[5] = rows[5]._replace(subject=rows[5].subject.upper())  # the same to an uncased vocabulary
    facts = facts._replace(facts=tuple(rows))
    tuned, held = split_subjects(facts, share, seed=3)
    assert sorted([*tuned, *held]) == list(range(36)) and (np.diff(tuned) > 0).all() and (np.diff(held) > 0).all()
    sides = [{facts.facts[f].subject.lower() for f in side} for side in (tuned, held)]
    assert not sides[0] & sides[1] and len(sides[0]) == subjects
    again = split_subjects(facts, share, seed=3)
    np.testing.assert_array_equal(again[0], tuned)


def test_splits_are_random_and_nested():
    facts = small_facts(100)
    small, large = (set(split_subjects(facts, share, 0)[0]) for share in (0.2, 0.6))
    assert small < large and small != set(split_subjects(facts, 0.2, 1)[0])
    assert 20 < np.mean([f // 3 for f in small]) < 80
    for share in (0, 1, -0.5, float("nan")):
        with pytest.raises(InputError, match="share of subjects is .*; give one between 0 and 1"):
            split_subjects(facts, share, 0)
    with pytest.raises(InputError, match="1 subjects cannot be split"):
        split_subjects(small_facts(1), 0.5, 0)
    with pytest.raises(InputError, match="seed is -1"):
        split_subjects(facts, 0.5, -1)


# --- the public files ------------------------------------------------------------------------------------------------


def test_real_pararel(shared_data):
    folder = shared_data / "pararel"
    read, whole = read_pararel(folder), read_pararel(folder, answer_last=False)
    assert set(whole.statements) == set(PARAREL_QUESTIONS) == {path.stem for path in folder.glob("patterns/*.jsonl")}
    assert sum(map(len, read.statements.values())) == 214  # the sheet's count
    assert 320 <= sum(map(len, whole.statements.values())) <= 329
    picks = ("P740", "P20", "P27", "P19", "P106")
    chosen = read_pararel(folder, picks)
    assert [len(chosen.statements[name]) for name in picks] == [14, 8, 7, 7, 7]
    assert [Counter(f.relation for f in chosen.facts)[name] for name in picks] == [843, 817, 958, 779, 821]
    assert all(len(fact.accepted) == 1 for fact in chosen.facts)
    assert sum(len(fact.accepted) > 1 for fact in read.facts if fact.relation == "P530") > 100
    stated = render(chosen, 7, 0)
    assert len(set(stated.documents)) == 7 * len(chosen.facts)


def test_real_popqa(shared_data):
    path = shared_data / "popqa" / "popQA.tsv"
    read = read_popqa(path)
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == 1000 and len(read.facts) == 986 and len(read.questions) == 16
    found = {(fact.subject, fact.relation): fact for fact in read.facts}
    for row in rows:
        fact = found[row["subj"], row["prop"]]
        assert question(read, fact) == f"Q: {row['question']} A:"
        assert {row["obj"], *json.loads(row["possible_answers"])} <= set(fact.accepted)
        assert popqa_correct(fact.answer, fact.accepted) and exact_match(fact.answer, fact.accepted)
    assert sum(fact.answer == json.loads(row["possible_answers"])[0] for fact, row in zip_first(read, rows)) > 900
    fact = read.facts[0]
    shots = popqa_shots(read, fact, np.arange(1, len(read.facts)))
    assert len(shots) == 15 and prompt(read, fact, shots).count("\n\n") == 15
    assert len(render(read, 8, 0).documents) == 8 * 986


def zip_first(read, rows):
    """Each fact with its first row."""
    first = {}
    for row in rows:
        first.setdefault((row["subj"], row["prop"]), row)
    return [(fact, first[fact.subject, fact.relation]) for fact in read.facts]


def test_the_shots_seed_is_that_of_the_code():
    assert module.SHOTS_SEED == 633
