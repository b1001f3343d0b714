"""Tasks for attribution on generated text, as `PairText`: what `bert6_jax.data.pairs.encode_pairs` turns into arrays.

What a model of the embedded language (`synthetic.language`) can be asked:

    agreement         yes: the auxiliary takes the number of the subject, and nothing else in the row tells it
    induction         only as a control: the rows are words of the language, but no sentence of it rewards copying (the
                      word after a noun is drawn anew each time), so a model of the language alone should not do it
    indirect object   no: no template has two subjects and no name lives on into the next sentence, so neither the
                      words nor the construction are there; template and names are the caller's

The last two are meant for models of real text (whose IOI and agreement sets `read_pairs` reads from files), or for
small models that also trained on `completed` pairs of another seed.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bert6_jax.data.pairs import PairText
from bert6_jax.errors import InputError
from synthetic.language import PLURAL, SINGULAR, Language, text

_TRIES = 50  # draws per pair asked for, before the prefixes are said to be exhausted


def agreement(language: Language, count: int, seed: int) -> list[PairText]:
    """Subject-verb agreement: "the CUE SUBJECT [CUE PLACE]" and has or have; the patched row has the other number.

    The sentence is the first of a document, drawn with the language's own probabilities from its templates that have a
    subject before the auxiliary; determiners are words that go with both numbers ("the"), so the subject alone tells.
    Every second pair is singular. `case` is the number and the roles of the prefix, `tail` the rest of the sentence.

    Raises:
      InputError: no such template, or fewer different prefixes than pairs asked for.
    """
    weight_K = np.array([_agrees(template.tokens) * template.opening for template in language.templates])
    if not weight_K.any() or "aux" not in language.plain_GW:
        raise InputError("agreement: the language has no sentence with a subject before aux; give it such a template")
    verb_G = [language.words[language.plain_GW["aux"][g].argmax()] for g in (SINGULAR, PLURAL)]

    def draw(rng: np.random.Generator, n: int) -> PairText:
        template = language.templates[rng.choice(len(weight_K), p=weight_K / weight_K.sum())].tokens
        pair = rng.choice(len(language.pair_P), p=language.pair_P)
        topic = language.pairs_P2[pair, int(rng.random() < language.config.side_topic)]
        word_2T = np.zeros((2, len(template)), np.int64)  # singular, plural
        for role in template:
            if role in language.slots:
                slot = language.slots[role]
                member = rng.choice(len(slot.member_X), p=slot.member_X)
                numbers = len(slot.words_GZX)
                for g in (SINGULAR, PLURAL):
                    word_2T[g, template.index(role)] = slot.words_GZX[min(g, numbers - 1), topic, member]
                cue = rng.choice(len(slot.cues_Y), p=slot.cue_XY[member])
                word_2T[:, template.index(f"{role}~")] = slot.cues_Y[cue]
        for t, role in enumerate(template):
            if role in language.plain_GW and role != "aux":
                both_W = language.plain_GW[role].min(0)  # words that both numbers allow
                word_2T[:, t] = rng.choice(len(both_W), p=both_W / both_W.sum())
        verb = template.index("aux")
        singular, plural = text(language, word_2T[:, :verb])
        tail = text(language, word_2T[:1, verb + 1 :])[0]
        clean, patch = (singular, plural) if n % 2 == SINGULAR else (plural, singular)
        right, wrong = verb_G if n % 2 == SINGULAR else verb_G[::-1]
        case = f"{('singular', 'plural')[n % 2]}: {' '.join(template[:verb])}"
        return PairText(clean, patch, right, wrong, case, f"agreement[{n}]", tail)

    return _distinct(draw, count, seed, "agreement")


def induction(words: Sequence[str], count: int, seed: int, length: int = 10) -> list[PairText]:
    """Induction: "... A B ... A" and B; in the patched row C follows the first A, and all other words are the same.

    Rows are `length` words that are all different but for A; A B may stand anywhere. Give words that are one token
    each, such as the content words of a language: `[w for w, k in zip(lang.words, lang.kinds) if k == "content"]`.
    `case` is the distance between the two A.

    Raises:
      InputError: too few words, rows too short, or fewer different rows than pairs asked for.
    """
    words = list(dict.fromkeys(words))
    if length < 3:
        raise InputError(f"induction: rows of {length} words; 'A B A' needs 3 or more")
    if len(words) < length:
        raise InputError(f"induction: {len(words)} different words; rows of {length} words need {length}")

    def draw(rng: np.random.Generator, n: int) -> PairText:
        *row, other = (words[i] for i in rng.choice(len(words), length, replace=False))
        at = int(rng.integers(length - 2))
        row.append(row[at])
        patch = [*row[: at + 1], other, *row[at + 2 :]]
        case = f"distance {length - 1 - at}"
        return PairText(" ".join(row), " ".join(patch), row[at + 1], other, case, f"induction[{n}]")

    return _distinct(draw, count, seed, "induction")


def indirect_object(
    names: Sequence[str],
    count: int,
    seed: int,
    template: str,
    fill: Mapping[str, Sequence[str]] | None = None,
) -> list[PairText]:
    """Indirect object identification: of two names the one that is not the subject of the second clause goes on.

    For example `template="{X} and {Y} went to the {place} , {S} gave a drink to"`, `fill={"place": ["shop", "park"]}`.
    {X} and {Y} are two different names, {S} is one of them: X in every second pair. In the patched row {S} is the
    other, so the answers change places, as in `corrupted_hard` of the IOI files. `case` says which is the subject.

    Raises:
      InputError: a template without {X}, {Y} and {S} once each or with a field that `fill` lacks, fewer than two names,
        or fewer different prefixes than pairs asked for.
    """
    names, fill = list(dict.fromkeys(names)), fill or {}
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise InputError(f"indirect object: template {template!r} ({error}); repair its braces") from error
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise InputError(f"indirect object: template {template!r} formats a field; write plain fields, such as {{X}}")
    fields = [name for _, name, _, _ in parts]
    for name in ("X", "Y", "S"):
        if fields.count(name) != 1:
            raise InputError(f"indirect object: template {template!r} has not {{{name}}} once; write it once")
    others = sorted(set(fields) - {"X", "Y", "S"})
    for name in others:
        if not (name.isidentifier() and fill.get(name)):
            raise InputError(f"indirect object: template {template!r} has {{{name}}}; give words for it in `fill`")
    if len(names) < 2:
        raise InputError(f"indirect object: {len(names)} different names; give two or more")

    def draw(rng: np.random.Generator, n: int) -> PairText:
        x, y = (names[i] for i in rng.choice(len(names), 2, replace=False))
        filled = {
            name: fill[name][rng.integers(len(fill[name]))]
            for name in fields
            if name in fill and name not in ("X", "Y", "S")
        }
        subject, other = ((x, y), (y, x))[n % 2]
        clean, patch = (template.format(**filled, X=x, Y=y, S=s) for s in (subject, other))
        return PairText(clean, patch, other, subject, f"subject {('first', 'second')[n % 2]}", f"indirect_object[{n}]")

    return _distinct(draw, count, seed, "indirect object")


def completed(rows: Sequence[PairText]) -> list[str]:
    """The clean texts with their right answers, as sentences: text to train on (of another seed than the task's)."""
    return [f"{row.clean} {row.right} {row.tail or '.'}" for row in rows]


def _agrees(tokens: tuple[str, ...]) -> bool:
    """Whether the number of a subject decides the auxiliary behind it."""
    if not {"subject", "aux"} <= set(tokens) or "pronoun" in tokens:
        return False
    return tokens.index("subject") < tokens.index("aux")


def _distinct(draw: Callable[[np.random.Generator, int], PairText], count: int, seed: int, task: str) -> list[PairText]:
    """The first `count` pairs of `draw(rng, number of the pair)` with clean prefixes that have not come before."""
    if count < 1 or seed < 0:
        raise InputError(f"{task}: {count} pairs with seed {seed}; give 1 or more pairs and a seed of 0 or more")
    # A stream of its own: neither the lexicon's, nor a block of documents', nor the corruption's.
    rng = np.random.Generator(np.random.Philox(key=np.array((seed, 2**35), np.uint64)))
    found: dict[str, PairText] = {}
    for _ in range(_TRIES * (count + 100)):
        row = draw(rng, len(found))
        found.setdefault(row.clean, row)
        if len(found) == count:
            return list(found.values())
    raise InputError(f"{task}: {len(found)} different prefixes found, {count} asked for; ask for fewer")
