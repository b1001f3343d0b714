"""Biographies, read back sentence by sentence by a parser that knows only the tables of templates."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, defaultdict

import numpy as np
import pytest

from bert6_jax.errors import InputError
from synthetic.biographies import (
    ATTRIBUTES,
    QUESTIONS,
    STATEMENTS,
    WORDINGS,
    BiographyConfig,
    Fields,
    biographies,
    exposure,
    make_fields,
    persons,
    read_fields,
)

SMALL = BiographyConfig(people=60, entries=4, dates=9, cities=7, universities=5, fields=4, companies=6)
LISTS = {
    "first_name": "Ada\r\nBo\r\n",
    "middle_name": "Cy\nDi\nEd",
    "last_name": "Fay\nGus\n",
    "city": "New  York, NY\nWashington D.C.\n",
    "university": "Mayagüez College\n",
    "field": "Music\nMath\nMusic\n",
    "company": "Dow Inc.; Midland, MI\nA & B;New York, NY\nDow Inc. ;  Midland, MI\n",
}


def write(folder, **changed):
    for name, text in {**LISTS, **changed}.items():
        (folder / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def read_back(document: str, names: set[str]) -> tuple[str, list[str], list[tuple[str, int, str]]]:
    """Name, how every sentence calls the person, and (attribute, template, answer) of every sentence."""
    name = " ".join(document.split(" ")[:3])
    name = name if name in names else name.removesuffix("'s")
    assert name in names
    called, said = [], []
    for sentence in document.removesuffix(".").split(". "):
        slots = {f"{name}'s": "[X]'s", name: "[X]", "He": "[X]", "She": "[X]", "His": "[X]'s", "Her": "[X]'s"}
        who = next(who for who in slots if sentence.startswith(f"{who} "))
        called.append(who)
        generic = slots[who] + sentence.removeprefix(who)
        (found,) = [
            (attribute, k, generic.removeprefix(template.removesuffix("[Y].")))
            for attribute, templates in STATEMENTS.items()
            for k, template in enumerate(templates)
            if generic.startswith(template.removesuffix("[Y]."))
        ]
        said.append(found)
    return name, called, said


def test_tables():
    assert list(STATEMENTS) == list(QUESTIONS) == list(ATTRIBUTES) and WORDINGS >= 12
    every = [template for templates in STATEMENTS.values() for template in templates]
    for template in every:
        assert template.startswith(("[X] ", "[X]'s ")) and template.endswith(" [Y].")
        assert template.count("[X]") == template.count("[Y]") == 1 and template.isascii()
    heads = [template.removesuffix("[Y].") for template in every]
    # What a model reads before the answer tells the attribute, and no statement goes on from another.
    assert not [(a, b) for a in heads for b in heads if a is not b and a.startswith(b)]
    for question in QUESTIONS.values():
        assert question.count("[X]") == 1 and "[Y]" not in question and question.endswith("?")


@pytest.mark.parametrize("fullname", [False, True])
@pytest.mark.parametrize("permute", [False, True])
def test_documents_state_the_facts(permute, fullname):
    cfg = dataclasses.replace(SMALL, permute=permute, fullname=fullname)
    documents, facts, worded_FK = biographies(cfg, 3)
    answers: dict[str, dict[str, str]] = defaultdict(dict)
    for fact in facts.facts:
        answers[fact.subject][fact.relation] = fact.answer
        assert fact.accepted == (fact.answer,)
    people = list(answers)
    assert len(people) == 60 and [(f.subject, f.relation) for f in facts.facts] == [
        (name, attribute) for name in people for attribute in ATTRIBUTES
    ]
    assert facts.statements == STATEMENTS and facts.questions == QUESTIONS
    assert worded_FK.shape == (360, 4) and worded_FK.dtype == np.int32

    worded, orders, pronouns = defaultdict(list), Counter(), defaultdict(set)
    assert len(documents) == 240
    for person, document in zip(persons(cfg, 3), documents, strict=True):
        name, called, said = read_back(document, set(people))
        assert name == people[person]
        assert {attribute: answer for attribute, _, answer in said} == answers[name] and len(said) == 6
        orders[tuple(attribute for attribute, _, _ in said)] += 1
        for attribute, k, _ in said:
            worded[name, attribute].append(k)
        assert called[0].removesuffix("'s") == name
        pronouns[name] |= {"He" if who == "His" else "She" if who == "Her" else who for who in called[1:]}
    for n, fact in enumerate(facts.facts):
        told = worded[fact.subject, fact.relation]
        assert sorted(told) == sorted(worded_FK[n]) and len(set(told)) == 4  # multiM: worded differently
    assert set(worded_FK.ravel()) == set(range(WORDINGS))
    if permute:
        assert len(orders) > 180 and {order[0] for order in orders} == set(ATTRIBUTES)
    else:
        assert list(orders) == [ATTRIBUTES]
    if fullname:
        assert all(who <= {name, f"{name}'s"} for name, who in pronouns.items())
    else:
        assert all(len(who) == 1 for who in pronouns.values())  # fixed per person
        assert Counter(next(iter(who)) for who in pronouns.values()) == {"He": 30, "She": 30}


def test_answers_recur_and_the_company_fixes_its_city():
    cfg = dataclasses.replace(SMALL, people=3000, entries=1)
    facts = biographies(cfg, 0).facts.facts
    pools = defaultdict(Counter)
    for fact in facts:
        pools[fact.relation][fact.answer] += 1
    sizes = {"birth_date": 9, "birth_city": 7, "university": 5, "field": 4, "company": 6}
    for attribute, size in sizes.items():
        counts = np.array(list(pools[attribute].values()))
        expected = 3000 / size
        assert len(counts) == size and np.all(np.abs(counts - expected) < 5 * np.sqrt(expected)), attribute
    where = defaultdict(set)
    for city, company in zip(facts[4::6], facts[5::6], strict=True):
        assert (city.relation, company.relation) == ("company_city", "company") and city.subject == company.subject
        where[company.answer].add(city.answer)
    assert len(where) == 6 and all(len(cities) == 1 for cities in where.values())
    assert set(pools["company_city"]) <= set(pools["birth_city"])  # one pool for two relations
    # Everything else is independent of the company.
    table = Counter((facts[n + 1].answer, facts[n + 5].answer) for n in range(0, len(facts), 6))
    assert len(table) == 42 and max(abs(n - 3000 / 42) for n in table.values()) < 5 * np.sqrt(3000 / 42)


def test_shuffled_over_people():
    cfg = dataclasses.replace(SMALL, people=500, entries=5)
    person_D = persons(cfg, 0)
    neighbours = int(np.sum(person_D[1:] == person_D[:-1]))
    assert neighbours < 4 + 5 * np.sqrt(4)  # (D - 1) * (K - 1) / (D - 1) = 4 by chance
    spread = [np.ptp(np.flatnonzero(person_D == p)) / len(person_D) for p in range(500)]
    assert abs(np.mean(spread) - 4 / 6) < 0.03  # of 5 uniform points
    assert np.array_equal(np.bincount(person_D), np.full(500, 5))


def test_pure_function_of_config_and_seed():
    first, again, other = biographies(SMALL, 1), biographies(SMALL, 1), biographies(SMALL, 2)
    assert first.documents == again.documents and first.facts == again.facts
    assert np.array_equal(first.worded_FK, again.worded_FK)
    assert first.documents != other.documents
    assert not {f.subject for f in first.facts.facts} & {f.subject for f in other.facts.facts}
    assert biographies(SMALL, 1, make_fields(SMALL, 1)).documents == first.documents


def test_variants_are_about_the_same_people():
    base = biographies(SMALL, 1)
    for change in ({"entries": 1}, {"permute": True}, {"fullname": True}, {"copies": 3}, {"exposure": 1.0}):
        varied = biographies(dataclasses.replace(SMALL, **change), 1)
        assert varied.facts == base.facts
        assert np.array_equal(varied.worded_FK, base.worded_FK[:, : varied.worded_FK.shape[1]])
        assert sorted(varied.documents) != sorted(base.documents)
    two = biographies(dataclasses.replace(SMALL, attributes=("company", "birth_city"), wordings=WORDINGS), 1)
    assert [f.relation for f in two.facts.facts[:2]] == ["company", "birth_city"] == list(two.facts.statements)
    assert list(two.facts.questions) == ["company", "birth_city"]
    assert two.facts.facts == tuple(base.facts.facts[6 * p + a] for p in range(60) for a in (5, 1))
    assert np.array_equal(two.worded_FK, base.worded_FK.reshape(60, 6, 4)[:, [5, 1]].reshape(120, 4))
    _, _, said = read_back(two.documents[0], {f.subject for f in two.facts.facts})
    assert [attribute for attribute, _, _ in said] == ["company", "birth_city"]


def test_few_wordings():
    few = biographies(dataclasses.replace(SMALL, wordings=4), 1)
    assert np.array_equal(np.sort(few.worded_FK, 1), np.broadcast_to(np.arange(4), (360, 4)))
    assert few.facts.statements == {name: templates[:4] for name, templates in STATEMENTS.items()}


def test_exposure():
    assert np.array_equal(exposure(SMALL), np.ones(60))
    assert np.array_equal(exposure(dataclasses.replace(SMALL, copies=3)), np.full(60, 3))
    cfg = dataclasses.replace(SMALL, exposure=1.0, copies=2, entries=2)
    harmonic = sum(1 / rank for rank in range(1, 61))
    expected = [max(1, round(120 / rank / harmonic)) for rank in range(1, 61)]
    assert exposure(cfg).tolist() == expected and expected[0] == 26 and expected[-1] == 1
    rendered = biographies(cfg, 0)
    person_D = persons(cfg, 0)
    assert np.array_equal(np.bincount(person_D), 2 * np.array(expected))
    people = [fact.subject for fact in rendered.facts.facts[::6]]
    times = Counter(rendered.documents)
    assert len(times) == 120  # the same entries again
    for document, count in times.items():
        assert count == expected[people.index(read_back(document, set(people))[0])]
    # Popular people are no block either: half of person 0's documents lie in either half, within chance.
    where = np.flatnonzero(person_D == 0)
    assert abs(np.sum(where < len(person_D) / 2) - 26) < 4 * np.sqrt(52 / 4)
    assert exposure(dataclasses.replace(SMALL, exposure=400.0)).tolist() == [60] + [1] * 59


def test_invented_words():
    cfg = BiographyConfig()
    fields = make_fields(cfg, 0)
    assert [len(values) for values in fields] == [100, 100, 200, 50, 50, 25, 50, 50]
    words = [value.split()[0] for values in fields[:7] for value in values]
    assert len(set(words)) == len(words) and all(word.isalpha() and word.istitle() for word in words)
    assert set(fields.company_city) <= set(fields.city)
    assert make_fields(cfg, 0) == fields != make_fields(cfg, 1)
    more = make_fields(dataclasses.replace(cfg, cities=80, companies=60), 0)
    assert more.city[:50] == fields.city and more.company[:50] == fields.company and more.field == fields.field
    assert len(make_fields(dataclasses.replace(cfg, last_names=19_000), 0).last_name) == 19_000
    with pytest.raises(InputError, match=r"cities is 100000; there are \d+ invented words"):
        make_fields(dataclasses.replace(cfg, cities=100_000), 0)


def test_all_full_names_are_used_and_no_more():
    cfg = dataclasses.replace(SMALL, people=24, first_names=2, middle_names=3, last_names=4)
    fields = make_fields(cfg, 0)
    names = {fact.subject for fact in biographies(cfg, 0).facts.facts}
    assert names == {f"{a} {b} {c}" for a in fields[0] for b in fields[1] for c in fields[2]}
    with pytest.raises(
        InputError, match="people is 25; 2 first, 3 middle and 4 last names make 24 different full names"
    ):
        biographies(dataclasses.replace(cfg, people=25), 0)


def test_birth_dates():
    dates = {fact.answer for fact in biographies(BiographyConfig(people=2000, dates=67_200), 0).facts.facts[::6]}
    parsed = [time.strptime(date, "%B %d, %Y") for date in dates]  # a wrong date would raise
    assert len(dates) > 1900
    assert {t.tm_mon for t in parsed} == set(range(1, 13)) and {t.tm_mday for t in parsed} == set(range(1, 29))
    assert min(t.tm_year for t in parsed) >= 1900 and max(t.tm_year for t in parsed) <= 2099
    assert len({t.tm_year for t in parsed}) == 200


def test_fast():
    cfg = BiographyConfig(people=10_000, entries=5, permute=True)
    start = time.process_time()
    assert len(biographies(cfg, 0).documents) == 50_000
    assert time.process_time() - start < 3


def test_read_fields(tmp_path):
    fields = read_fields(write(tmp_path, first_name=b"\xef\xbb\xbfAda\r\nBo\r\n"))
    assert fields == Fields(
        ("Ada", "Bo"),
        ("Cy", "Di", "Ed"),
        ("Fay", "Gus"),
        ("New York, NY", "Washington D.C."),
        ("Mayagüez College",),
        ("Music", "Math"),
        ("Dow Inc.", "A & B"),
        ("Midland, MI", "New York, NY"),
    )
    rendered = biographies(BiographyConfig(people=12, entries=2, fullname=True), 0, fields)
    text = "\n".join(rendered.documents)
    assert "Washington D.C." in text and "Dow Inc." in text and ".." not in text
    for person, document in zip(persons(BiographyConfig(people=12, entries=2), 0), rendered.documents, strict=True):
        for fact in rendered.facts.facts[6 * person : 6 * person + 6]:
            assert document.count(fact.subject) == 6 and fact.answer in document


@pytest.mark.parametrize(
    "changed, line",
    [
        ({"city": "A\n\nB\n"}, r"city\.txt:2: empty line; write one city or delete"),
        ({"field": "A\n \t\n"}, r"field\.txt:2: empty line"),
        ({"university": ""}, r"university\.txt: empty; write one university a line"),
        ({"company": ""}, r"company\.txt: empty; write one company with its city a line"),
        ({"company": "X; Y\nZ\n"}, r"company\.txt:2: 'Z' is not a company with its city; write \"name; city\""),
        ({"company": "X; \n"}, r"company\.txt:1: 'X;' is not a company with its city"),
        ({"company": "; Y\n"}, r"company\.txt:1: '; Y' is not a company with its city"),
        ({"company": "X; Y; Z\n"}, r"company\.txt:1: 'X; Y; Z' is not"),
        ({"company": "X; Y\nA; B\nX; B\n"}, r"company\.txt:3: 'X' is in 'B' here and in 'Y' at .*company\.txt:1; keep"),
        ({"company": "X; [Y]\n"}, r"company\.txt:1: '\[Y\]' has a slot"),
        ({"city": "Xcity\n[X]ville\n"}, r"city\.txt:2: '\[X\]ville' has a slot of the templates"),
        ({"field": "Mu\x00sic\n"}, r"field\.txt:1: 'Mu\\x00sic' has an unprintable character; delete it"),
        ({"last_name": "De La Cruz\n"}, r"last_name\.txt:1: 'De La Cruz' is several words"),
        ({"first_name": b"Ada\nB\xff\n"}, r"first_name\.txt:2: byte 2 of the line is not UTF-8"),
    ],
)
def test_hostile_lists(tmp_path, changed, line):
    with pytest.raises(InputError, match=line) as caught:
        read_fields(write(tmp_path, **changed))
    assert "\n" not in str(caught.value)


def test_missing_lists(tmp_path):
    write(tmp_path)
    (tmp_path / "field.txt").unlink()
    with pytest.raises(InputError, match=r"field\.txt: cannot be read \(No such file or directory\)"):
        read_fields(tmp_path)
    with pytest.raises(InputError, match=r"nowhere/first_name\.txt: cannot be read"):
        read_fields(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "changed, line",
    [
        ({"city": ()}, "fields: city is empty"),
        ({"field": ("A", "B", "A")}, "fields: field has 'A' twice"),
        ({"university": ("A", " B")}, r"fields: university\[1\]: ' B' is empty or has white space"),
        ({"first_name": ("A B",)}, r"fields: first_name\[0\]: 'A B' is several words"),
        ({"company": ("A",)}, "fields: 1 companies and 50 cities of companies"),
    ],
)
def test_hostile_fields(changed, line):
    with pytest.raises(InputError, match=line):
        biographies(BiographyConfig(people=5), 0, make_fields(BiographyConfig(), 0)._replace(**changed))


@pytest.mark.parametrize(
    "changed, line",
    [
        ({"people": 0}, "people is 0; it must be a whole number from 1 on"),
        ({"copies": 1.5}, "copies is 1.5; it must be"),
        ({"cities": 0}, "cities is 0"),
        ({"attributes": ()}, r"attributes are \(\); name some of birth_date"),
        ({"attributes": ("field", "field")}, "each once"),
        ({"attributes": ("job",)}, r"attributes are \('job',\)"),
        ({"wordings": 17}, "wordings is 17; an attribute has 16"),
        ({"wordings": 3, "entries": 4}, "entries is 4 and wordings 3; .*lower entries or raise wordings"),
        ({"dates": 67_201}, "dates is 67201; there are 67200"),
        ({"exposure": -0.1}, "exposure is -0.1; the Zipf exponent"),
        ({"exposure": float("nan")}, "exposure is nan"),
    ],
)
def test_bad_configs(changed, line):
    with pytest.raises(InputError, match=line):
        BiographyConfig(**changed)


def test_bad_seeds():
    for seed in (-1, 2**64):
        for make in (biographies, persons, make_fields):
            with pytest.raises(InputError, match="seed is .*; give a whole number from 0"):
                make(SMALL, seed)


def test_real_lists(shared_data):
    fields = read_fields(shared_data / "bios" / "fields")
    assert [len(values) for values in fields] == [400, 400, 1000, 200, 300, 100, 263, 263]
    assert fields.company_city[fields.company.index("3M")] == "Maplewood, MN"
    rendered = biographies(BiographyConfig(people=2000, entries=2, permute=True), 0, fields)
    text = "\n".join(rendered.documents)
    assert ".." not in text and "\r" not in text and "[" not in text
    for person, document in zip(persons(BiographyConfig(people=2000, entries=2), 0), rendered.documents, strict=True):
        assert all(fact.answer in document for fact in rendered.facts.facts[6 * person : 6 * person + 6])
