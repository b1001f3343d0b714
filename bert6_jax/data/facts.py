"""Facts as text: ParaRel and PopQA read, stated in several wordings, asked as questions, scored.

A fact is a subject, a relation and an answer ("accepted" holds every answer that counts). A relation has statements,
templates with a slot for the subject ([X]) and one for the answer ([Y]), and one question with [X] alone. A model is
pre-trained on statements (`render`), fine-tuned on questions of some subjects (`split_subjects`), tested on the rest.

    ParaRel  a folder with patterns/Pxx.jsonl {pattern} and facts/Pxx.jsonl {sub_label, obj_label} (yanaiela/pararel);
             a relation is called P19. The statements are ParaRel's; questions are PopQA's where one fits, else ours
    PopQA    a TSV (arXiv 2212.10511); a relation is called by its `prop`. Questions are PopQA's, statements are ours

Prompt and scoring repeat what PopQA's authors' code does (AlexTMallen/adaptive-retrieval), quirks included;
`exact_match` is ours and stricter. Letters: F facts, K statements of a fact.
"""

from __future__ import annotations

import csv
import json
import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bert6_jax.data.sources import checked_text, first_line, json_kind, json_rows, lines_of, text_field
from bert6_jax.errors import InputError

SUBJECT, ANSWER = "[X]", "[Y]"
SHOTS_SEED = 633  # of PopQA's code

# PopQA: prop_id -> (question of its authors, statements). The statements are ours: the answer comes last, the wordings
# need no article before the answer, and no wording belongs to two relations.
POPQA: dict[int, tuple[str, tuple[str, ...]]] = {
    22: ("What is [X]'s occupation?", (
        "[X]'s occupation is [Y].", "The occupation of [X] is [Y].", "[X] works as [Y].", "By profession, [X] is [Y].",
        "[X] earns a living as [Y].", "The profession of [X] is [Y].", "[X] made a career as [Y].",
        "The career of [X] is that of [Y].", "The trade that [X] follows is that of [Y].",
    )),
    91: ("What genre is [X]?", (
        "The genre of [X] is [Y].", "[X]'s genre is [Y].", "[X] belongs to the genre of [Y].",
        "[X] falls into the genre of [Y].", "In genre, [X] is [Y].", "[X] is usually filed under [Y].",
        "[X] is an example of [Y].", "The style of [X] is [Y].", "Critics class [X] as [Y].",
    )),
    97: ("What is [X] the capital of?", (
        "[X] is the capital of [Y].", "[X] is the capital city of [Y].", "[X] serves as the capital of [Y].",
        "The city of [X] is the capital of [Y].", "[X] functions as the capital of [Y].",
        "[X] is the seat of government of [Y].", "[X] is the administrative centre of [Y].",
        "[X] holds the title of capital of [Y].", "[X] houses the government of [Y].",
    )),
    106: ("What is the religion of [X]?", (
        "The religion of [X] is [Y].", "[X]'s religion is [Y].", "[X] adheres to [Y].",
        "[X] belongs to the religion of [Y].", "By religion, [X] belongs to [Y].", "[X] follows the faith of [Y].",
        "The faith of [X] is [Y].", "In matters of faith, [X] follows [Y].", "The creed of [X] is that of [Y].",
    )),
    164: ("Who was the producer of [X]?", (
        "[X] was produced by [Y].", "The producer of [X] was [Y].", "[X]'s producer was [Y].",
        "The production of [X] was led by [Y].", "The person who produced [X] was [Y].",
        "[X] was made under the producer [Y].", "Credit for producing [X] goes to [Y].",
        "As its producer, [X] had [Y].", "The production of [X] was in the hands of [Y].",
    )),
    182: ("In what country is [X]?", (
        "[X] is in the country of [Y].", "The country of [X] is [Y].", "[X]'s country is [Y].", "[X] lies in [Y].",
        "[X] is situated in [Y].", "The country in which [X] lies is [Y].", "[X] belongs to the country of [Y].",
        "[X] can be found within the borders of [Y].", "The state that [X] is part of is [Y].",
    )),
    218: ("In what city was [X] born?", (
        "[X] was born in [Y].", "The birthplace of [X] is [Y].", "[X]'s place of birth is [Y].",
        "[X] came into the world in [Y].", "[X] first saw the light of day in [Y].",
        "The place where [X] was born is [Y].", "[X] is a native of [Y].", "The life of [X] began in [Y].",
        "The city of [X]'s birth is [Y].",
    )),
    257: ("Who is the father of [X]?", (
        "The father of [X] is [Y].", "[X]'s father is [Y].", "[X] was fathered by [Y].", "[X] had as father [Y].",
        "The man who fathered [X] is [Y].", "On the father's side, [X] descends from [Y].",
        "[X] was born to the father [Y].", "The male parent of [X] is [Y].", "The name of [X]'s father is [Y].",
    )),
    292: ("Who is the mother of [X]?", (
        "The mother of [X] is [Y].", "[X]'s mother is [Y].", "[X] was given life by the mother [Y].",
        "[X] had as mother [Y].", "The woman who gave birth to [X] is [Y].",
        "On the mother's side, [X] descends from [Y].", "[X] was born to the mother [Y].",
        "The female parent of [X] is [Y].", "The name of [X]'s mother is [Y].",
    )),
    422: ("What is the capital of [X]?", (
        "The capital of [X] is [Y].", "[X]'s capital is [Y].", "The capital city of [X] is [Y].",
        "[X] has its capital in [Y].", "[X] is governed from [Y].", "The seat of government of [X] is [Y].",
        "The city that serves as capital of [X] is [Y].", "[X] has as its capital [Y].",
        "The administrative centre of [X] is [Y].",
    )),
    472: ("What color is [X]?", (
        "The color of [X] is [Y].", "[X]'s color is [Y].", "[X] has the color [Y].", "[X] is colored [Y].",
        "[X] is known for the color [Y].", "The color that stands for [X] is [Y].", "In color, [X] is [Y].",
        "[X] shows itself in [Y].", "The color to be seen on [X] is [Y].",
    )),
    484: ("Who is the author of [X]?", (
        "[X] was written by [Y].", "The author of [X] is [Y].", "[X]'s author is [Y].", "[X] is a work by [Y].",
        "[X] was authored by [Y].", "The person who wrote [X] is [Y].", "[X] came from the pen of [Y].",
        "The writer of [X] is [Y].", "Credit as author of [X] goes to [Y].",
    )),
    526: ("Who was the director of [X]?", (
        "[X] was directed by [Y].", "The director of [X] was [Y].", "[X]'s director was [Y].",
        "The direction of [X] was in the hands of [Y].", "The person who directed [X] was [Y].",
        "[X] was made under the direction of [Y].", "Credit for directing [X] goes to [Y].",
        "As its director, [X] had [Y].", "In the director's chair of [X] sat [Y].",
    )),
    533: ("Who was the screenwriter for [X]?", (
        "The screenplay of [X] was written by [Y].", "[X] was scripted by [Y].", "The screenwriter of [X] was [Y].",
        "[X]'s screenwriter was [Y].", "The script of [X] is by [Y].",
        "The person who wrote the script of [X] was [Y].", "[X] was written for the screen by [Y].",
        "Credit for the screenplay of [X] goes to [Y].", "The script of [X] came from the pen of [Y].",
    )),
    560: ("What sport does [X] play?", (
        "[X] plays [Y].", "The sport of [X] is [Y].", "[X]'s sport is [Y].", "[X] competes in [Y].",
        "The sport that [X] plays is [Y].", "[X] is active in the sport of [Y].", "[X] takes part in [Y].",
        "In sport, [X] is known for [Y].", "[X] trains for [Y].",
    )),
    639: ("Who was the composer of [X]?", (
        "[X] was composed by [Y].", "The composer of [X] was [Y].", "[X]'s composer was [Y].",
        "The music of [X] is by [Y].", "The music of [X] was written by [Y].", "[X] was set to music by [Y].",
        "The person who composed [X] was [Y].", "[X] is a composition of [Y].", "The score of [X] is by [Y].",
    )),
}  # fmt: skip

# ParaRel relation -> prop_id of the PopQA relation that asks for the same (our mapping; ids of the two sets differ:
# PopQA's 106 is religion, ParaRel's P106 occupation).
PARAREL_TO_POPQA = {"P17": 182, "P19": 218, "P36": 422, "P106": 22, "P136": 91, "P140": 106, "P1376": 97}

# The other ParaRel relations that have patterns; all questions are ours.
PARAREL_QUESTIONS = {
    "P20": "Where did [X] die?",
    "P27": "What country is [X] a citizen of?",
    "P30": "On what continent is [X]?",
    "P37": "What is the official language of [X]?",
    "P39": "What position does [X] hold?",
    "P47": "What does [X] share a border with?",
    "P101": "What field does [X] work in?",
    "P103": "What is the native language of [X]?",
    "P108": "Who does [X] work for?",
    "P127": "Who owns [X]?",
    "P131": "In what region is [X]?",
    "P138": "What is [X] named after?",
    "P159": "Where is the headquarters of [X]?",
    "P176": "What company produces [X]?",
    "P178": "Who developed [X]?",
    "P190": "What is a twin city of [X]?",
    "P264": "What record label represents [X]?",
    "P276": "Where is [X] located?",
    "P279": "What is [X] a subclass of?",
    "P361": "What is [X] a part of?",
    "P364": "What is the original language of [X]?",
    "P407": "In what language was [X] written?",
    "P413": "What position does [X] play?",
    "P449": "What network first aired [X]?",
    "P463": "What organization is [X] a member of?",
    "P495": "In what country was [X] created?",
    "P530": "What country does [X] have diplomatic relations with?",
    "P740": "Where was [X] founded?",
    "P937": "Where did [X] work?",
    "P1001": "In what country is [X] a legal term?",
    "P1303": "What instrument does [X] play?",
    "P1412": "What language did [X] communicate in?",
} | {relation: POPQA[prop_id][0] for relation, prop_id in PARAREL_TO_POPQA.items()}

_POPQA_COLUMNS = ("id", "subj", "prop", "obj", "prop_id", "possible_answers")
_SLOTS = re.compile(r"\[[XY]\]")


class Fact(NamedTuple):
    """One subject of one relation."""

    subject: str
    relation: str  # key of Facts.statements and Facts.questions
    answer: str
    accepted: tuple[str, ...]  # all accepted answers, `answer` first


class Facts(NamedTuple):
    """Facts and the wordings of their relations; no (subject, relation) comes twice."""

    facts: tuple[Fact, ...]
    statements: dict[str, tuple[str, ...]]  # relation -> templates with [X] and [Y]
    questions: dict[str, str]  # relation -> question template with [X]


class Rendered(NamedTuple):
    """Facts stated in words."""

    documents: list[str]  # pre-training text, shuffled over subjects
    facts: Facts
    worded_FK: (
        np.ndarray
    )  # int32, the statements (index in statements[relation]) that each fact was stated with; -1 pads


# --- readers ---------------------------------------------------------------------------------------------------------


def read_pararel(folder: str | os.PathLike, relations: Sequence[str] = (), *, answer_last: bool = True) -> Facts:
    """Facts and paraphrase templates of ParaRel.

    Templates are brought to one form: single spaces, and a full stop without a space before it at the end, also where
    ParaRel has none (a fragment that ends in a comma stays one). Articles stay as they are ("works as an [Y]" too).
    A subject with several objects in a relation accepts all of them, the first is its `answer`; P190, P37, P47 and P530
    have many. Some relations share wordings ("[X] is located in [Y]." is P17, P30, P131 and P276).

    Args:
      folder: with patterns/Pxx.jsonl and facts/Pxx.jsonl.
      relations: such as P19, in the order wanted; none: all that have patterns, facts and a usable template.
      answer_last: keep only templates that end in the answer, which causal models can complete.

    Raises:
      InputError: a file or relation that is not there, a broken line, a template in which a slot is missing or comes
        twice, a relation asked for without a usable template, or one without a question (see `PARAREL_QUESTIONS`).
    """
    folder = Path(folder).expanduser()
    there = [
        {path.stem for path in folder.glob(f"{kind}/*.jsonl") if not path.name.startswith(".")}
        for kind in ("patterns", "facts")
    ]
    both = sorted(there[0] & there[1], key=lambda name: (len(name), name))
    if not both:
        raise InputError(f"{folder}: no relation with patterns/Pxx.jsonl and facts/Pxx.jsonl; give a ParaRel folder")
    for relation in relations:
        if relation not in both:
            kind = "patterns" if relation not in there[0] else "facts"
            raise InputError(
                f"{folder}: relation {relation!r} has no file {kind}/{relation}.jsonl; give some of {', '.join(both)}"
            )
    found = []
    statements: dict[str, tuple[str, ...]] = {}
    questions: dict[str, str] = {}
    for relation in dict.fromkeys(relations) if relations else both:
        path = folder / "patterns" / f"{relation}.jsonl"
        templates = _patterns(path)
        usable = tuple(t for t in templates if not answer_last or t.endswith(f"{ANSWER}."))
        if not usable and relations:
            why = f"none of its {len(templates)} templates ends in {ANSWER}" if templates else "no template"
            raise InputError(f"{path}: relation {relation!r}: {why}; leave the relation out or add one")
        if not usable:
            continue
        if relation not in PARAREL_QUESTIONS:
            raise InputError(
                f"{path}: no question is known for relation {relation!r}; "
                f"name the relations to read, some of {', '.join(PARAREL_QUESTIONS)}"
            )
        statements[relation], questions[relation] = usable, PARAREL_QUESTIONS[relation]
        file = folder / "facts" / f"{relation}.jsonl"
        for line, row in json_rows(file, "write one fact a line"):
            subject, answer = (_text(row, name, f"{file}:{line}") for name in ("sub_label", "obj_label"))
            found.append(Fact(subject, relation, answer, (answer,)))
    if not found:
        raise InputError(f"{folder}: no fact of a relation with a usable template; give a ParaRel folder with some")
    return Facts(_joined(found), statements, questions)


def read_popqa(path: str | os.PathLike) -> Facts:
    """Facts of PopQA's TSV, with its authors' questions and statements of ours (`POPQA`).

    `obj` is the answer and always accepted, whatever `possible_answers` says. Rows of the same subject and relation are
    one fact that accepts the answers of all, the first one's `obj` is its answer. The question follows from `prop_id`;
    the columns `question`, aliases, popularity and ids of Wikidata are not read.

    Args:
      path: tab-separated with a header, columns in any order, quotes doubled inside quoted fields.

    Raises:
      InputError: a missing column, a row that does not fit the header, an unknown `prop_id`, one relation under two
        `prop_id` or the other way round, an empty field, `possible_answers` that is not a JSON list of texts.
    """
    path = Path(path).expanduser()
    found = []
    prop_ids: dict[str, int] = {}
    names: dict[int, str] = {}
    for line, row in _tsv_rows(path):
        where = f"{path}:{line}: row {row['id']!r}"
        subject, relation, answer = (_text(row, name, where) for name in ("subj", "prop", "obj"))
        prop_id = row["prop_id"].strip()
        if not (prop_id.isdecimal() and int(prop_id[:9]) in POPQA):
            known = ", ".join(map(str, POPQA))
            raise InputError(f"{where}: unknown prop_id {prop_id[:40]!r}; give one of {known}, or delete the row")
        number = int(prop_id)
        if (prop_ids.setdefault(relation, number), names.setdefault(number, relation)) != (number, relation):
            raise InputError(
                f"{where}: prop {relation!r} with prop_id {number}, before it was {prop_ids[relation]} and prop_id "
                f"{number} was {names[number]!r}; give every relation one number"
            )
        accepted = _answers(row["possible_answers"], where)
        found.append(Fact(subject, relation, answer, tuple(dict.fromkeys((answer, *accepted)))))
    if not found:
        raise InputError(f"{path}: a header and no rows; give a file with facts in it")
    statements = {relation: POPQA[number][1] for relation, number in prop_ids.items()}
    return Facts(_joined(found), statements, {relation: POPQA[number][0] for relation, number in prop_ids.items()})


def merge(*sets: Facts) -> Facts:
    """All facts and relations of the sets, in their order.

    A relation of several sets has the statements of all; a fact of several sets accepts the answers of all.

    Raises:
      InputError: a relation that two sets ask for in different words.
    """
    statements: dict[str, tuple[str, ...]] = {}
    questions: dict[str, str] = {}
    for part in sets:
        for relation, asked in part.questions.items():
            if questions.setdefault(relation, asked) != asked:
                raise InputError(
                    f"relation {relation!r} has the questions {questions[relation]!r} and {asked!r}; "
                    "give one of the two relations another name"
                )
        for relation, templates in part.statements.items():
            statements[relation] = tuple(dict.fromkeys((*statements.get(relation, ()), *templates)))
    return Facts(_joined(fact for part in sets for fact in part.facts), statements, questions)


def _joined(facts: Iterable[Fact]) -> tuple[Fact, ...]:
    """Facts of the same subject and relation as one, which accepts the answers of all."""
    found: dict[tuple[str, str], Fact] = {}
    for fact in facts:
        first = found.setdefault((fact.subject, fact.relation), fact)
        if first is not fact:
            accepted = tuple(dict.fromkeys((*first.accepted, *fact.accepted)))
            found[fact.subject, fact.relation] = first._replace(accepted=accepted)
    return tuple(found.values())


def _patterns(path: Path) -> tuple[str, ...]:
    """The templates of a relation, each with both slots once, ending in a full stop, none twice."""
    templates = []
    for line, row in json_rows(path, "write one pattern a line"):
        template = _text(row, "pattern", f"{path}:{line}")
        for slot in (SUBJECT, ANSWER):
            if template.count(slot) != 1:
                times = "without" if slot not in template else "with more than one"
                raise InputError(
                    f"{path}:{line}: field 'pattern' is a template {times} {slot} ({template[:60]!r}); "
                    f"write {SUBJECT} for the subject and {ANSWER} for the answer, once each"
                )
        template = template.rstrip(" .")
        templates.append(template if template.endswith(",") else f"{template}.")
    return tuple(dict.fromkeys(templates))


def _text(row: dict, name: str, where: str) -> str:
    """The text in a field, white space as single spaces."""
    return " ".join(text_field(row, name, where).split())


def _answers(raw: str, where: str) -> list[str]:
    where = f"{where}: field 'possible_answers'"
    try:
        answers = json.loads(raw)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of too many digits
        raise InputError(f'{where} is not JSON ({first_line(error)}); write a list such as ["Paris"]') from error
    if not isinstance(answers, list):
        raise InputError(f'{where} is a JSON {json_kind(answers)}, not a list; write a list such as ["Paris"]')
    if not answers:
        raise InputError(f"{where} is an empty list; write one answer or more, or delete the row")
    for answer in answers:
        if not isinstance(answer, str):
            raise InputError(f"{where} holds a JSON {json_kind(answer)}, not only strings; repair or delete the row")
        checked_text(answer, f"{where}, an answer")
    return answers  # as they stand there: PopQA's score looks for them to the letter


def _tsv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of its first line, record) of every row of a TSV with PopQA's columns."""
    reader = csv.reader((text for _, text in lines_of(path)), delimiter="\t", strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{path}:{line}: not TSV in the row that starts here ({first_line(error)}); close its quotes, and "
                "double each quote inside a quoted field"
            ) from error
        if fields is None:
            break
        if not any(field.strip() for field in fields):
            continue
        if not header:
            header = [field.strip() for field in fields]
            missing = [name for name in _POPQA_COLUMNS if name not in header]
            if missing:
                raise InputError(
                    f"{path}:{line}: no column {', '.join(map(repr, missing))} (there: "
                    f"{', '.join(repr(name[:40]) for name in header[:20])}); give a TSV with the columns of PopQA"
                )
            twice = [name for name, count in Counter(header).items() if count > 1 and name in _POPQA_COLUMNS]
            if twice:
                raise InputError(f"{path}:{line}: column {twice[0]!r} is there twice; rename one")
        elif len(fields) != len(header):
            raise InputError(
                f"{path}:{line}: {len(fields)} fields, the header has {len(header)}; put text that holds a tab in "
                "quotes, or delete the row"
            )
        else:
            yield line, dict(zip(header, fields, strict=True))
    if not header:
        raise InputError(f"{path}: the file is empty; give a TSV with the columns of PopQA")


# --- words -----------------------------------------------------------------------------------------------------------


def statement(template: str, fact: Fact) -> str:
    """The template with the fact's subject and answer in its slots; slots inside of these are left as text."""
    return _SLOTS.sub(lambda slot: fact.subject if slot[0] == SUBJECT else fact.answer, template)


def stem(template: str, fact: Fact) -> str:
    """The statement up to its answer, without the space before it: what a causal model goes on from."""
    return statement(template.partition(ANSWER)[0], fact).rstrip()


def render(facts: Facts, multiplicity: int, seed: int, copies: int = 1) -> Rendered:
    """States every fact in K different wordings of its relation, one statement a document, all in random order.

    For one seed the wordings of a smaller K are among those of a larger one, so that runs along K differ in nothing
    else. Repetitions are shuffled with everything (unshuffled paraphrases of one subject share a window and are
    memorised there).

    Args:
      facts: what is stated.
      multiplicity: K, distinct templates a fact.
      seed: of the choice and the order.
      copies: how often each statement occurs.

    Raises:
      InputError: a relation with fewer than K templates; settings out of range.
    """
    for name, value, least in (("multiplicity", multiplicity, 1), ("seed", seed, 0), ("copies", copies, 1)):
        if value < least:
            raise InputError(f"{name} is {value}; give {least} or more")
    relation_F = np.array([fact.relation for fact in facts.facts])
    worded_FK = np.full((len(facts.facts), multiplicity), -1, np.int32)
    random = np.random.Generator(np.random.Philox(key=seed))
    for relation in dict.fromkeys(fact.relation for fact in facts.facts):
        count = len(facts.statements[relation])
        if multiplicity > count:
            raise InputError(
                f"relation {relation!r} has {count} statement{'s' * (count != 1)}, {multiplicity} different ones are "
                "asked for; lower the multiplicity or leave the relation out"
            )
        of_F = np.flatnonzero(relation_F == relation)
        worded_FK[of_F] = random.random((len(of_F), count)).argsort(1)[:, :multiplicity]
    stated = [
        statement(facts.statements[fact.relation][k], fact)
        for fact, worded_K in zip(facts.facts, worded_FK.tolist(), strict=True)
        for k in worded_K
    ]
    order = random.permutation(len(stated) * copies) % max(len(stated), 1)
    return Rendered([stated[i] for i in order], facts, worded_FK)


def question(facts: Facts, fact: Fact) -> str:
    """PopQA's form, "Q: {question} A:", without a space after it."""
    return f"Q: {facts.questions[fact.relation].replace(SUBJECT, fact.subject)} A:"


def prompt(facts: Facts, fact: Fact, shots: Sequence[Fact] = ()) -> str:
    """The question, after answered ones of other facts; blank lines between them, as in PopQA's code."""
    return "\n\n".join([*(f"{question(facts, shot)} {shot.answer}" for shot in shots), question(facts, fact)])


def popqa_shots(facts: Facts, fact: Fact, pool: Sequence[int], seed: int = SHOTS_SEED) -> list[Fact]:
    """One fact of every other relation, in random order, as in PopQA's code (15 shots of its 16 relations).

    Drawn anew for every fact, but the same ones for the same fact, pool and seed (ours; the code's depend on the order
    of the questions).

    Args:
      facts: the set of the fact.
      fact: whose question is to be asked.
      pool: indices of the facts to draw from, such as those of fine-tuning; relations without one there give no shot.
      seed: of the draw.
    """
    others = defaultdict(list)
    for f in pool:
        if facts.questions[facts.facts[f].relation] != facts.questions[fact.relation]:  # ParaRel and PopQA share some
            others[facts.facts[f].relation].append(f)
    name = zlib.crc32(f"{fact.relation}\n{fact.subject}".encode())
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, name))))
    shots = [facts.facts[others[relation][random.integers(len(others[relation]))]] for relation in sorted(others)]
    return [shots[i] for i in random.permutation(len(shots))]


# --- scores ----------------------------------------------------------------------------------------------------------


def first_answer(generated: str) -> str:
    """What PopQA's code takes for the answer: a leading blank line is dropped, then the first line counts.

    One newline at the start (or three) therefore leaves nothing.
    """
    return generated.removeprefix("\n\n").split("\n")[0]


def popqa_correct(prediction: str, accepted: Sequence[str]) -> bool:
    """PopQA's score: an accepted answer is somewhere in the prediction, as it is, lower-cased or with one capital.

    Lenient (short answers lie inside other words, and those of the question), and `capitalize` lowers all letters but
    the first: "new york city" and "New york city" are found, "NEW YORK CITY" is not.
    """
    return any(form in prediction for answer in accepted for form in (answer, answer.lower(), answer.capitalize()))


def exact_match(prediction: str, accepted: Sequence[str]) -> bool:
    """An accepted answer stands in the prediction as whole words, whatever the case and white space (ours)."""
    words = " ".join(prediction.lower().split())
    wanted = (" ".join(answer.lower().split()) for answer in accepted)
    return any(answer and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", words) for answer in wanted)


def majority(
    facts: Facts,
    train: np.ndarray,
    test: np.ndarray,
    correct: Callable[[str, Sequence[str]], bool] = popqa_correct,
) -> dict[str, tuple[int, int]]:
    """What answering every question with its relation's most frequent answer gets: relation -> (hits, count).

    Args:
      facts: the set.
      train: indices of the facts whose answers are counted; among equally frequent ones the first in sorted order.
      test: indices of the facts to answer; a relation of theirs that `train` has not gets no hit.
      correct: the score, `popqa_correct` or `exact_match`.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for f in train:
        counts[facts.facts[f].relation][facts.facts[f].answer] += 1
    most = {relation: min(count, key=lambda answer: (-count[answer], answer)) for relation, count in counts.items()}
    sums: dict[str, tuple[int, int]] = {}
    for f in test:
        fact = facts.facts[f]
        hits, count = sums.get(fact.relation, (0, 0))
        hit = fact.relation in most and correct(most[fact.relation], fact.accepted)
        sums[fact.relation] = (hits + int(hit), count + 1)
    return sums


# --- splits ----------------------------------------------------------------------------------------------------------


def split_subjects(facts: Facts, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the facts to fine-tune on and of those held out, int64, ascending; no subject is on both sides.

    Subjects that differ in case only count as one, as uncased vocabularies see them. For one seed the subjects of a
    smaller share are among those of a larger one.

    Args:
      facts: the set.
      share: of the subjects to fine-tune on, rounded; at least one subject is on either side.
      seed: of the choice.

    Raises:
      InputError: a share outside of (0, 1), fewer than two subjects, a seed below 0.
    """
    if not 0 < share < 1:
        raise InputError(f"share of subjects is {share}; give one between 0 and 1")
    if seed < 0:
        raise InputError(f"seed is {seed}; give 0 or more")
    number: dict[str, int] = {}
    subject_F = np.array([number.setdefault(fact.subject.casefold(), len(number)) for fact in facts.facts], np.int64)
    if len(number) < 2:
        raise InputError(f"{len(number)} subjects cannot be split; give facts of two or more")
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(number))
    tuned = order[: min(max(round(share * len(number)), 1), len(number) - 1)]
    tuned_F = np.isin(subject_F, tuned)
    return np.flatnonzero(tuned_F), np.flatnonzero(~tuned_F)
