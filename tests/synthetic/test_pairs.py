"""Generated pairs: agreement against the exact posterior of the language, induction and names against definitions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from bert6_jax.data.pairs import encode_pairs, split_pairs
from bert6_jax.data.tokenizer import SPECIALS, wordpiece
from bert6_jax.errors import InputError
from synthetic import pairs
from synthetic.language import MASK, PLURAL, SINGULAR, Corruption, LanguageConfig, make_language, posterior

TEMPLATES = (
    ("det subject~ subject aux verb~ verb the object~ object .", 1.0),
    ("det subject~ subject place~ place aux verb~ verb the object~ object .", 0.8),
    ("place~ place , det subject~ subject aux verb~ verb the object~ object .", 0.6),
)
LANGUAGE = make_language(LanguageConfig(topics=5, side_topic=0.0, min_tokens=6, templates=TEMPLATES))
CONTENT = [word for word, kind in zip(LANGUAGE.words, LANGUAGE.kinds, strict=True) if kind == "content"]
TOKENIZER = wordpiece([*SPECIALS, *LANGUAGE.words])
IOI = "{X} and {Y} went to the {place} , {S} gave a drink to"


def words_of(text: str) -> list[int]:
    return [LANGUAGE.words.index(word) for word in text.replace(",", " ,").replace(".", " .").split()]


def aux_posterior(prefix: str, tail: str, hide: int | None = None) -> tuple[float, float]:
    """Exact P(has), P(have) at the hole between prefix and tail; word `hide` of the prefix is masked as well."""
    row = [*words_of(prefix), MASK, *words_of(tail)]
    hole = len(words_of(prefix))
    if hide is not None:
        row[hide] = MASK
    row_BT = np.array([row], np.int32)
    modified_BT = np.arange(len(row))[None] == hole
    # Words are never replaced by random ones, so a row that the language cannot produce raises.
    corruption = Corruption(len(LANGUAGE.words), 0.15, mask=1.0, random=0.0)
    p_W = posterior(LANGUAGE, row_BT, np.array([len(row)]), modified_BT, corruption)[0]
    return tuple(p_W[LANGUAGE.words.index(word)] for word in ("has", "have"))


def test_agreement_is_decided_by_the_subject_alone():
    nouns_GN = LANGUAGE.slots["subject"].words_GZX.reshape(2, -1)
    rows = pairs.agreement(LANGUAGE, 60, seed=1)
    for row in rows:
        clean, patch = words_of(row.clean), words_of(row.patch)
        (t,) = [t for t, (a, b) in enumerate(zip(clean, patch, strict=True)) if a != b]
        number = SINGULAR if row.case.startswith("singular") else PLURAL
        noun = list(nouns_GN[number]).index(clean[t])
        assert patch[t] == nouns_GN[1 - number, noun]  # the other number of the same noun
        expected = (1.0, 0.0) if number == SINGULAR else (0.0, 1.0)
        np.testing.assert_allclose(aux_posterior(row.clean, row.tail), expected, atol=1e-12)
        np.testing.assert_allclose(aux_posterior(row.patch, row.tail), expected[::-1], atol=1e-12)
        assert (row.right, row.wrong) == (("has", "have") if number == SINGULAR else ("have", "has"))
        # Without the subject nothing tells: "the" leaves 0.55 * 0.4 to 0.45 * 0.4.
        np.testing.assert_allclose(aux_posterior(row.clean, row.tail, hide=t), (0.55, 0.45), atol=1e-12)


def test_agreement_covers_the_templates_as_often_as_the_language():
    rows = pairs.agreement(LANGUAGE, 600, seed=0)
    assert len({row.clean for row in rows}) == 600
    cases = Counter(row.case for row in rows)
    prefixes = [text.split(" aux")[0] for text, _ in TEMPLATES]
    assert cases.keys() == {f"{number}: {prefix}" for number in ("singular", "plural") for prefix in prefixes}
    assert sum(count for case, count in cases.items() if case.startswith("singular")) == 300
    # Far from exhausting the long prefixes, these two come in the ratio of their weights.
    between, before = (sum(n for case, n in cases.items() if case.endswith(prefix)) for prefix in prefixes[1:])
    assert abs(between / (between + before) - 0.8 / 1.4) < 4 * np.sqrt(0.25 / (between + before))
    assert rows == pairs.agreement(LANGUAGE, 600, seed=0) != pairs.agreement(LANGUAGE, 600, seed=2)
    assert rows[:50] == pairs.agreement(LANGUAGE, 50, seed=0)


def test_agreement_as_arrays():
    task = encode_pairs(TOKENIZER, pairs.agreement(LANGUAGE, 80, seed=0), "agreement", masked=True, tail=None)
    assert task.dropped == {} and len(task.texts) == 80 and task.patched
    assert np.all((task.clean_NT != task.patch_NT).sum(1) == 1)
    rows = np.arange(80)
    assert np.all(task.clean_NT[rows, task.position_N] == TOKENIZER.mask_id)
    assert {TOKENIZER.tokens[i] for i in task.right_N} == {"has", "have"}
    assert np.all(task.right_N != task.wrong_N)
    first, second = split_pairs(task, 0)
    assert len(first.texts) + len(second.texts) == 80


def test_agreement_of_languages_that_lack_it():
    bare = make_language(LanguageConfig(templates=(("det subject~ subject .", 1.0), ("aux place~ place .", 1.0))))
    with pytest.raises(InputError, match="no sentence with a subject before aux"):
        pairs.agreement(bare, 3, 0)
    behind = make_language(LanguageConfig(templates=(("aux det subject~ subject .", 1.0),)))
    with pytest.raises(InputError, match="no sentence with a subject before aux"):
        pairs.agreement(behind, 3, 0)
    small = make_language(
        LanguageConfig(topics=2, members=(("subject", 1),), templates=(("subject~ subject aux .", 1.0),))
    )
    assert len(pairs.agreement(small, 4, 0)) == 4  # two topics, two numbers
    with pytest.raises(InputError, match="agreement: 4 different prefixes found, 5 asked for; ask for fewer"):
        pairs.agreement(small, 5, 0)


def copied(row: str) -> str:
    """What follows the earlier occurrence of the last word."""
    *before, last = row.split()
    assert before.count(last) == 1
    return before[before.index(last) + 1]


def test_induction_copies():
    rows = pairs.induction(CONTENT, 200, seed=0, length=8)
    for row in rows:
        clean, patch = row.clean.split(), row.patch.split()
        assert len(clean) == len(patch) == 8 and set(clean) | set(patch) <= set(CONTENT)
        assert copied(row.clean) == row.right and copied(row.patch) == row.wrong
        assert sum(a != b for a, b in zip(clean, patch, strict=True)) == 1
        assert row.right not in patch and row.wrong not in clean
        assert len(set(clean)) == len(set(patch)) == 7
        assert row.case == f"distance {7 - clean.index(clean[-1])}"
    assert {row.case for row in rows} == {f"distance {d}" for d in range(2, 8)}
    task = encode_pairs(TOKENIZER, rows, "induction", strict=True)
    assert task.clean_NT.shape == (200, 9) and np.all(task.position_N == 8)


def test_induction_at_its_smallest():
    rows = pairs.induction(["x", "y", "z", "x"], 6, seed=0, length=3)
    assert {(r.clean, r.patch, r.right, r.wrong) for r in rows} == {
        (f"{a} {b} {a}", f"{a} {c} {a}", b, c) for a, b, c in ("xyz", "xzy", "yxz", "yzx", "zxy", "zyx")
    }
    with pytest.raises(InputError, match="induction: 6 different prefixes found, 7 asked"):
        pairs.induction("xyz", 7, seed=0, length=3)
    with pytest.raises(InputError, match="induction: 3 different words; rows of 4 words need 4"):
        pairs.induction("xyz", 1, seed=0, length=4)
    with pytest.raises(InputError, match="rows of 2 words; 'A B A' needs 3"):
        pairs.induction("xyz", 1, seed=0, length=2)


def test_indirect_object():
    rows = pairs.indirect_object(["Amy", "Bob", "Cal", "Dan"], 40, 0, IOI, {"place": ["park", "shop"], "unused": []})
    for row in rows:
        x, _, y, *_, place, _, s, _, _, _, _ = row.clean.split()
        assert x != y and s in (x, y) and place in ("park", "shop")
        assert row.wrong == s and row.right == (y if s == x else x)
        assert row.clean.split().count(row.right) == 1 and row.clean.split().count(row.wrong) == 2
        assert row.patch == row.clean.replace(f", {s}", f", {row.right}")
        assert row.case == f"subject {'first' if s == x else 'second'}"
    assert Counter(row.case for row in rows) == {"subject first": 20, "subject second": 20}
    assert len({row.clean for row in rows}) == 40
    with pytest.raises(InputError, match="48 different prefixes found, 49 asked"):  # 4 * 3 pairs, 2 subjects, 2 places
        pairs.indirect_object(["Amy", "Bob", "Cal", "Dan"], 49, 0, IOI, {"place": ["park", "shop"]})


@pytest.mark.parametrize(
    "template, line",
    [
        ("{X} and {Y} went", r"has not \{S\} once; write it once"),
        ("{X} and {X} and {Y} {S}", r"has not \{X\} once"),
        ("{X} {Y} {S} {place}", r"has \{place\}; give words for it in `fill`"),
        ("{X} {Y} {S} {}", r"has \{\}; give words"),
        ("{X} {Y} {S} {thing.x}", r"has \{thing.x\}; give words"),
        ("{X} {Y} {S:>9}", r"formats a field; write plain fields"),
        ("{X} {Y} {S", r"; repair its braces"),
    ],
)
def test_bad_templates(template, line):
    with pytest.raises(InputError, match=line):
        pairs.indirect_object(["Amy", "Bob"], 2, 0, template)


def test_other_bad_calls():
    with pytest.raises(InputError, match="1 different names; give two or more"):
        pairs.indirect_object(["Amy", "Amy"], 2, 0, "{X} {Y} {S}")
    for make in (
        lambda count, seed: pairs.agreement(LANGUAGE, count, seed),
        lambda count, seed: pairs.induction(CONTENT, count, seed),
        lambda count, seed: pairs.indirect_object(["Amy", "Bob"], count, seed, "{X} {Y} {S}"),
    ):
        for count, seed in ((0, 0), (1, -1)):
            with pytest.raises(InputError, match="give 1 or more pairs and a seed of 0 or more"):
                make(count, seed)


def test_completed_texts_are_sentences_of_the_language():
    rows = pairs.agreement(LANGUAGE, 5, seed=3)
    for row, text in zip(rows, pairs.completed(rows), strict=True):
        assert text == f"{row.clean} {row.right} {row.tail}"
        assert words_of(text)[len(words_of(row.clean))] == LANGUAGE.words.index(row.right)
    row = pairs.induction("xyz", 1, seed=0, length=3)[0]
    assert pairs.completed([row]) == [f"{row.clean} {row.right} ."]
