"""Synthetic people after bioS (arXiv 2309.14316): facts, and biographies that state them in many wordings.

A person has a full name (first, middle, last; no two people share one) and six attributes, always in this order; a
config may take some of them:

    birth_date     one of `dates` days drawn from 200 years x 12 months x 28 days
    birth_city     one of the cities
    university     one of the universities
    field          one of the fields of study
    company_city   fixed by the company; cities again, so two relations share a pool of answers
    company        one of the companies

An entry is one biography: a sentence for each attribute, the full name in the first sentence and He or She after it.
The variants of the paper: *single* is `entries=1`; *multiM* is `entries=M`, where no two entries of a person word an
attribute the same way; *fullname* puts the name into every sentence; *permute* shuffles the sentences of every entry.

Ours: the sentences, the questions and the generated words (all invented, no list of real people); He for people of even
number and She for the others; values drawn independently and uniformly; the exposure. Names and facts depend on the
seed, the number of people and the pools alone, and the wordings of M entries begin with those of fewer: runs over M,
permute, fullname, attributes and exposure are about the same people.

Letters: P people, A attributes of the config, K entries, F = P * A facts (person by person), D documents.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bert6_jax.data.facts import ANSWER, SUBJECT, Fact, Facts, Rendered
from bert6_jax.data.sources import lines_of
from bert6_jax.errors import InputError

# Every statement begins with its subject and ends with its answer, so a causal model has read the one when it is asked
# for the other. What stands between them tells the attribute: no two statements share it.
STATEMENTS: dict[str, tuple[str, ...]] = {
    "birth_date": (
        "[X] was born on [Y].",
        "[X]'s date of birth is [Y].",
        "[X] came into the world on [Y].",
        "[X]'s life began on [Y].",
        "[X] first saw the light of day on [Y].",
        "[X] has been alive since [Y].",
        "[X]'s parents welcomed their newborn child on [Y].",
        "[X] holds a birth certificate dated [Y].",
        "[X] took a first breath on [Y].",
        "[X]'s passport gives the birth date [Y].",
        "[X] was delivered by a midwife on [Y].",
        "[X]'s age is counted from [Y].",
        "[X] was brought into the world on [Y].",
        "[X]'s first day of life was [Y].",
        "[X] arrived as a healthy baby on [Y].",
        "[X]'s family celebrated a birth on [Y].",
    ),
    "birth_city": (
        "[X] was born in [Y].",
        "[X]'s birthplace is [Y].",
        "[X] is a native of [Y].",
        "[X] hails from [Y].",
        "[X]'s cradle stood in [Y].",
        "[X] comes originally from [Y].",
        "[X] spent the first days of life in [Y].",
        "[X]'s mother gave birth in [Y].",
        "[X] entered the world at a hospital in [Y].",
        "[X]'s roots lie in [Y].",
        "[X] began life in [Y].",
        "[X]'s birth was recorded in [Y].",
        "[X] let out a first cry in [Y].",
        "[X]'s hometown by birth is [Y].",
        "[X] was carried home from a maternity ward in [Y].",
        "[X]'s story starts in the city of [Y].",
    ),
    "university": (
        "[X] studied at [Y].",
        "[X]'s alma mater is [Y].",
        "[X] graduated from [Y].",
        "[X] attended [Y].",
        "[X] holds a degree from [Y].",
        "[X]'s student years were spent at [Y].",
        "[X] was educated at [Y].",
        "[X] earned a diploma at [Y].",
        "[X] went to lectures at [Y].",
        "[X]'s academic training took place at [Y].",
        "[X] enrolled as a student at [Y].",
        "[X] belongs to the alumni of [Y].",
        "[X] passed the final examinations at [Y].",
        "[X] learned from the professors of [Y].",
        "[X]'s diploma bears the seal of [Y].",
        "[X] completed a degree at [Y].",
    ),
    "field": (
        "[X] majored in [Y].",
        "[X]'s field of study was [Y].",
        "[X] studied the subject of [Y].",
        "[X] took a degree in [Y].",
        "[X] specialised in [Y].",
        "[X]'s academic subject was [Y].",
        "[X] wrote a thesis on [Y].",
        "[X] concentrated on courses in [Y].",
        "[X] was trained in the discipline of [Y].",
        "[X]'s major was [Y].",
        "[X] chose a programme in [Y].",
        "[X]'s coursework centred on [Y].",
        "[X] pursued advanced studies in [Y].",
        "[X] gained a thorough knowledge of [Y].",
        "[X] qualified as an expert in [Y].",
        "[X]'s scholarly interest was [Y].",
    ),
    "company_city": (
        "[X] works in [Y].",
        "[X]'s workplace is in [Y].",
        "[X] goes to work in [Y].",
        "[X] has a job in [Y].",
        "[X]'s office is located in [Y].",
        "[X] commutes to [Y].",
        "[X] is employed in [Y].",
        "[X]'s professional life takes place in [Y].",
        "[X] makes a living in [Y].",
        "[X] spends working days in [Y].",
        "[X]'s desk stands in [Y].",
        "[X] reports for duty in [Y].",
        "[X]'s job is based in [Y].",
        "[X] pursues a career in the city of [Y].",
        "[X]'s employer has its headquarters in [Y].",
        "[X] meets colleagues every morning in [Y].",
    ),
    "company": (
        "[X] works for [Y].",
        "[X]'s employer is [Y].",
        "[X] is employed by [Y].",
        "[X] is on the payroll of [Y].",
        "[X] has a position at [Y].",
        "[X]'s pay comes from [Y].",
        "[X] draws a salary from [Y].",
        "[X] belongs to the staff of [Y].",
        "[X] signed a contract with [Y].",
        "[X] builds a career at [Y].",
        "[X] is a member of the team at [Y].",
        "[X] was hired by [Y].",
        "[X] took a job with [Y].",
        "[X] carries a staff card of [Y].",
        "[X]'s business card shows the name [Y].",
        "[X] serves the company [Y].",
    ),
}
QUESTIONS: dict[str, str] = {
    "birth_date": "When was [X] born?",
    "birth_city": "In which city was [X] born?",
    "university": "Which university did [X] attend?",
    "field": "What did [X] study?",
    "company_city": "In which city does [X] work?",
    "company": "Which company does [X] work for?",
}
ATTRIBUTES = tuple(STATEMENTS)
WORDINGS = min(map(len, STATEMENTS.values()))  # what every attribute has

_PRONOUNS = (("He", "His"), ("She", "Her"))
_MONTHS = tuple("January February March April May June July August September October November December".split())
_FIRST_YEAR, _YEARS, _DAYS = 1900, 200, 28
_ALL_DATES = _YEARS * len(_MONTHS) * _DAYS

_ONSETS = "b bl br d dr f fl g gr h k kl l m n p pl pr r s sk sl sn st t tr v w z".split()
_VOWELS = "a e i o u ai ea oo".split()
_CODAS = "b d g k l lk lm lt m mp n nd nk p r rd rk rn sk st t".split()
# list -> endings and what follows the word; no word of one list ends as a word of another, so they never coincide
_INVENTED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "first_name": (("ia", "o", "elle", "an"), ("",)),
    "middle_name": (("as", "eth", "ine", "or"), ("",)),
    "last_name": (("ley", "sen", "ric", "by"), ("",)),
    "city": (("ford", "mere", "wick", "holm"), ("",)),
    "university": (("aven", "und", "este", "urch"), (" University", " College", " Institute")),
    "field": (("ology", "istics", "onomy", "ography"), ("",)),
    "company": (("ex", "ula", "iq", "ox"), (" Group", " Works", " Motors", " Foods", " Systems")),
}
_POOLS = dict(  # list -> the option that sizes it
    zip(_INVENTED, "first_names middle_names last_names cities universities fields companies".split(), strict=True)
)
# Random streams; the other generators of this package use 2**32 to 2**35.
_PEOPLE, _VALUES, _WORDED, _ORDER, _SHUFFLE, _DATES, _WORDS = range(2**36, 2**36 + 7)


@dataclass(frozen=True)
class BiographyConfig:
    """Everything but the seed that defines the people and their biographies; the sizes are ours.

    The sizes of the pools are for generated words; lists of one's own (`Fields`) are used whole.
    """

    people: int = 1000
    attributes: tuple[str, ...] = ATTRIBUTES  # which, and in which order their sentences stand
    wordings: int = WORDINGS  # templates an attribute: the first ones of its table
    entries: int = 1  # differently worded biographies a person, M of multiM
    permute: bool = False  # shuffle the sentences of every entry
    fullname: bool = False  # the name in every sentence instead of the pronoun
    copies: int = 1  # how often an entry occurs (on average before rounding, with exposure)
    exposure: float = 0.0  # Zipf exponent of how often a person's entries occur, see `exposure`
    dates: int = 100
    cities: int = 50
    universities: int = 50
    fields: int = 25
    companies: int = 50
    first_names: int = 100
    middle_names: int = 100
    last_names: int = 200

    def __post_init__(self):
        for name in ("people", "wordings", "entries", "copies", "dates", *_POOLS.values()):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}; it must be a whole number from 1 on")
        unknown = [name for name in self.attributes if name not in ATTRIBUTES]
        if unknown or not self.attributes or len(set(self.attributes)) < len(self.attributes):
            raise InputError(f"attributes are {self.attributes!r}; name some of {', '.join(ATTRIBUTES)}, each once")
        if self.wordings > WORDINGS:
            raise InputError(f"wordings is {self.wordings}; an attribute has {WORDINGS}: give at most that many")
        if self.entries > self.wordings:
            raise InputError(
                f"entries is {self.entries} and wordings {self.wordings}; the entries of a person all differ in words: "
                f"lower entries or raise wordings (at most {WORDINGS})"
            )
        if self.dates > _ALL_DATES:
            raise InputError(f"dates is {self.dates}; there are {_ALL_DATES} ({_YEARS} years): give at most that many")
        if not (math.isfinite(self.exposure) and self.exposure >= 0):
            raise InputError(f"exposure is {self.exposure!r}; the Zipf exponent is a number from 0 on")


class Fields(NamedTuple):
    """Parts of names, each a single word, and pools of answers; every list without repeats but `company_city`."""

    first_name: tuple[str, ...]
    middle_name: tuple[str, ...]
    last_name: tuple[str, ...]
    city: tuple[str, ...]
    university: tuple[str, ...]
    field: tuple[str, ...]
    company: tuple[str, ...]
    company_city: tuple[str, ...]  # of every company


def make_fields(cfg: BiographyConfig, seed: int) -> Fields:
    """Invented, pronounceable words in the sizes of `cfg`; companies sit in cities of the pool (some share one).

    A longer list of names or values begins with the shorter one of the same seed.

    Raises:
      InputError: a pool larger than the words there are for it, or a negative seed.
    """
    _check_seed(seed)
    lists: dict[str, tuple[str, ...]] = {}
    for number, (name, (endings, suffixes)) in enumerate(_INVENTED.items()):
        size = getattr(cfg, _POOLS[name])
        rng = _random(seed, _WORDS + number)
        # "a" + "ind" and "ai" + "nd" would be one word, so count what is different
        words = sorted({o + v + c + e for o in _ONSETS for v in _VOWELS for c in _CODAS for e in endings})
        if size > len(words):
            raise InputError(f"{_POOLS[name]} is {size}; there are {len(words)} invented words: give at most that many")
        chosen = rng.permutation(len(words))[:size]
        suffix = rng.permutation(len(words))[:size] % len(suffixes)
        lists[name] = tuple(words[w].capitalize() + suffixes[s] for w, s in zip(chosen, suffix, strict=True))
    city = _random(seed, _WORDS + len(_INVENTED)).random(len(lists["company"])) * len(lists["city"])
    return Fields(**lists, company_city=tuple(lists["city"][int(c)] for c in city))


def read_fields(folder: str | os.PathLike) -> Fields:
    """The lists of a folder as bioS has them, one value a line, white space tidied.

    Files first_name.txt, middle_name.txt, last_name.txt, city.txt, university.txt, field.txt, and company.txt with
    lines "name; city". A repeated value is taken once.

    Raises:
      InputError: a file that is missing or cannot be read, an empty file or line, a name part of several words, a
        company without city or with two, a value with a slot ([X], [Y]) or an unprintable character.
    """
    folder = Path(folder).expanduser()
    lists: dict[str, tuple[str, ...]] = {}
    city_of: dict[str, tuple[str, str]] = {}  # company -> city, and where that stands
    for name in _INVENTED:
        path, values = folder / f"{name}.txt", []
        for number, line in lines_of(path):
            where = f"{path}:{number}"
            value = " ".join(line.split())
            if not value:
                raise InputError(f"{where}: empty line; write one {_words(name)} or delete the line")
            if name == "company":
                parts = [part.strip() for part in value.split(";")]
                if len(parts) != 2 or not all(parts):
                    raise InputError(f'{where}: {value!r} is not a company with its city; write "name; city"')
                value, city = parts
                _check_value(city, where, "city")
                before, there = city_of.setdefault(value, (city, where))
                if city != before:
                    raise InputError(
                        f"{where}: {value!r} is in {city!r} here and in {before!r} at {there}; keep one of the lines"
                    )
            _check_value(value, where, name)
            values.append(value)
        if not values:
            raise InputError(f"{path}: empty; write one {_words(name)} a line")
        lists[name] = tuple(dict.fromkeys(values))
    return Fields(**lists, company_city=tuple(city_of[company][0] for company in lists["company"]))


def biographies(cfg: BiographyConfig, seed: int, fields: Fields | None = None) -> Rendered:
    """People drawn from the fields, and their biographies shuffled over people.

    `documents` are whole biographies: those of person p occur `exposure(cfg)[p]` times each, always in the same words
    and order of sentences; `persons(cfg, seed)` tells whose each is. `facts.facts` go person by person, in the order of
    `cfg.attributes`; a relation is named as its attribute. `worded_FK` [F, entries] is the template of each entry.

    Args:
      cfg: the config.
      seed: 0 or more; fixes people, wordings and order.
      fields: names and values; invented ones (`make_fields`) by default.

    Raises:
      InputError: more people than different names, or lists that `read_fields` would not give.
    """
    _check_seed(seed)
    if fields is None:
        fields = make_fields(cfg, seed)
    else:
        _check_fields(fields)
    P, A, K = cfg.people, len(cfg.attributes), cfg.entries
    names = _names(cfg, seed, fields)
    values = _values(cfg, seed, fields)

    # All attributes are drawn, so that a choice of them is about the same people.
    column = [ATTRIBUTES.index(name) for name in cfg.attributes]
    draw = _random(seed, _WORDED).random((P, len(ATTRIBUTES), cfg.wordings))
    worded_PAK = draw.argsort(-1)[:, column, :K]
    order_PKA = np.broadcast_to(np.arange(A), (P, K, A))
    if cfg.permute:
        order_PKA = _random(seed, _ORDER).random((P, K, A)).argsort(-1)

    # template -> (takes "'s", what stands between subject and answer)
    parts = [[_parts(text) for text in STATEMENTS[name][: cfg.wordings]] for name in cfg.attributes]
    entries = []
    for p, (name, worded_AK, order_KA) in enumerate(zip(names, worded_PAK.tolist(), order_PKA.tolist(), strict=True)):
        ends = [_end(values[attribute][p]) for attribute in cfg.attributes]
        full = (name, f"{name}'s")
        later = full if cfg.fullname else _PRONOUNS[p % 2]
        for k, order_A in enumerate(order_KA):
            who, sentences = full, []
            for a in order_A:
                possessive, between = parts[a][worded_AK[a][k]]
                sentences.append(who[possessive] + between + ends[a])
                who = later
            entries.append(" ".join(sentences))

    facts = tuple(
        Fact(name, attribute, values[attribute][p], (values[attribute][p],))
        for p, name in enumerate(names)
        for attribute in cfg.attributes
    )
    statements = {name: STATEMENTS[name][: cfg.wordings] for name in cfg.attributes}
    questions = {name: QUESTIONS[name] for name in cfg.attributes}
    documents = [entries[d] for d in _entry_D(cfg, seed).tolist()]
    return Rendered(documents, Facts(facts, statements, questions), worded_PAK.reshape(P * A, K).astype(np.int32))


def exposure(cfg: BiographyConfig) -> np.ndarray:
    """How often each entry of a person occurs, int64 [P]; person 0 is the best known.

    With exponent s (ours): copies * P * (p + 1)^-s / sum_q (q + 1)^-s, rounded, and 1 for whom that leaves less; so
    s = 0 gives `copies` for everybody.
    """
    weight_P = np.arange(1, cfg.people + 1, dtype=np.float64) ** -cfg.exposure
    return np.maximum(1, np.rint(cfg.copies * cfg.people * weight_P / weight_P.sum())).astype(np.int64)


def persons(cfg: BiographyConfig, seed: int) -> np.ndarray:
    """Whose biography each document of `biographies(cfg, seed, ...)` is, int64 [D]; facts p * A to p * A + A - 1."""
    _check_seed(seed)
    return _entry_D(cfg, seed) // cfg.entries


def _random(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array((seed, stream), np.uint64)))


def _entry_D(cfg: BiographyConfig, seed: int) -> np.ndarray:
    """Which entry (person * K + k) every document is."""
    times = np.repeat(exposure(cfg), cfg.entries)
    return _random(seed, _SHUFFLE).permutation(np.repeat(np.arange(len(times)), times))


def _names(cfg: BiographyConfig, seed: int, fields: Fields) -> list[str]:
    """Full names, all different: parts are single words and no list repeats one."""
    first, middle, last = fields[:3]
    there = len(first) * len(middle) * len(last)
    if cfg.people > there:
        raise InputError(
            f"people is {cfg.people}; {len(first)} first, {len(middle)} middle and {len(last)} last names make {there} "
            "different full names: lower people or give more names"
        )
    rest, c_P = np.divmod(_random(seed, _PEOPLE).choice(there, cfg.people, replace=False), len(last))
    a_P, b_P = np.divmod(rest, len(middle))
    return [f"{first[a]} {middle[b]} {last[c]}" for a, b, c in zip(a_P, b_P, c_P, strict=True)]


def _values(cfg: BiographyConfig, seed: int, fields: Fields) -> dict[str, list[str]]:
    """attribute -> answer of every person."""
    day = _random(seed, _DATES).permutation(_ALL_DATES)[: cfg.dates]
    dates = [
        f"{_MONTHS[month]} {day + 1}, {_FIRST_YEAR + year}"
        for year, month, day in zip(*np.unravel_index(day, (_YEARS, len(_MONTHS), _DAYS)), strict=True)
    ]
    pools = (dates, fields.city, fields.university, fields.field, range(len(fields.company)))
    share_P5 = _random(seed, _VALUES).random((cfg.people, len(pools)))
    date, city, university, field, company = (
        [pool[i] for i in (share_P * len(pool)).astype(int).tolist()]
        for share_P, pool in zip(share_P5.T, pools, strict=True)
    )
    cities, companies = [fields.company_city[c] for c in company], [fields.company[c] for c in company]
    return dict(zip(ATTRIBUTES, (date, city, university, field, cities, companies), strict=True))


def _parts(template: str) -> tuple[bool, str]:
    between = template.removeprefix(SUBJECT).removesuffix(f"{ANSWER}.")
    return between.startswith("'s"), between.removeprefix("'s")


def _end(answer: str) -> str:
    """The answer with the full stop, which "Washington D.C." brings along."""
    return answer if answer.endswith(".") else f"{answer}."


def _words(name: str) -> str:
    return "company with its city" if name == "company" else name.replace("_", " ")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise InputError(f"seed is {seed}; give a whole number from 0 to 2^64 - 1")


def _check_fields(fields: Fields) -> None:
    for name, values in fields._asdict().items():
        if not values:
            raise InputError(f"fields: {name} is empty; give at least one")
        for number, value in enumerate(values):
            _check_value(value, f"fields: {name}[{number}]", name)
        if name != "company_city" and (twice := _first_repeat(values)) is not None:
            raise InputError(f"fields: {name} has {twice!r} twice; give every value once")
    if len(fields.company) != len(fields.company_city):
        raise InputError(
            f"fields: {len(fields.company)} companies and {len(fields.company_city)} cities of companies; "
            "give a city for every company"
        )


def _first_repeat(values: Iterable[str]) -> str | None:
    seen: set[str] = set()
    return next((value for value in values if value in seen or seen.add(value)), None)


def _check_value(value: str, where: str, name: str) -> None:
    if value != " ".join(value.split()) or not value:
        raise InputError(f"{where}: {value!r} is empty or has white space to tidy; write words with single spaces")
    if not value.isprintable():
        raise InputError(f"{where}: {value!r} has an unprintable character; delete it")
    if SUBJECT in value or ANSWER in value:
        raise InputError(f"{where}: {value!r} has a slot of the templates; write it without {SUBJECT} and {ANSWER}")
    if name.endswith("_name") and " " in value:
        # so that different parts never make the same full name
        raise InputError(f"{where}: {value!r} is several words; join the words of a part of a name by a hyphen")
