"""The embedded corpus: text, truth, and the exact posterior against enumeration, calibration and counted hits."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from scipy.stats import chi2_contingency

from bert6_jax.data.tokenizer import train_wordpiece
from bert6_jax.errors import InputError
from bert6_jax.metrics import adjusted_rand_index
from synthetic import language
from synthetic.language import (
    MASK,
    OTHER,
    PAD,
    PLURAL,
    SINGULAR,
    Corruption,
    LanguageConfig,
    bayes_apt,
    bayes_apt_of,
    corrupt,
    make_language,
    posterior,
    sample,
    sample_documents,
    text,
    truth,
    word_ids,
)

LANGUAGE = make_language()
# Sentences of 3, 4 and 5 tokens, documents of 6 to 9: small enough to write down every one of them.
TINY = make_language(
    LanguageConfig(
        topics=2,
        side_topic=0.3,
        members=(("subject", 2), ("place", 2)),
        min_tokens=5,
        templates=(
            ("det subject~ subject .", 1.0),
            ("pronoun aux place~ place .", 0.7),
            ("place~ place ,", 0.5),
        ),
    )
)


def every_document(language):
    """{tuple of words: probability}, written from the definition: nested sums, nothing shared with the posterior."""
    config, found = language.config, Counter()

    def sentences(template, topic, number):
        """(words, probability) of every sentence, slot by slot."""
        choices = []
        for token in template.tokens:
            slot = language.slots.get(token)
            if token.endswith("~"):
                choices.append([(int(cue), 1.0) for cue in language.slots[token[:-1]].cues_Y])
            elif slot is not None:
                of_class = slot.words_GZX[min(number, len(slot.words_GZX) - 1), topic]
                choices.append([(int(w), float(p)) for w, p in zip(of_class, slot.member_X, strict=True)])
            else:
                p_W = language.plain_GW[token][number]
                choices.append([(int(w), float(p_W[w])) for w in np.flatnonzero(p_W)])
        for picked in itertools.product(*choices):
            words = tuple(word for word, _ in picked)
            probability = np.prod([p for _, p in picked])
            for name, slot in language.slots.items():
                if name in template.tokens:
                    of_class = slot.words_GZX[min(number, len(slot.words_GZX) - 1), topic].tolist()
                    member = of_class.index(words[template.tokens.index(name)])
                    cue = slot.cues_Y.tolist().index(words[template.tokens.index(f"{name}~")])
                    probability *= slot.cue_XY[member, cue]
            yield words, probability

    def extend(words, probability, main, side, number):
        if len(words) >= config.min_tokens:
            found[words] += probability
            return
        for template in language.templates:
            weight = template.weight if words else template.opening
            if weight == 0:
                continue
            for topic, share in ((main, 1 - config.side_topic), (side, config.side_topic)):
                numbers = (
                    ((number, 1.0),) if template.carries else ((SINGULAR, 1 - config.plural), (PLURAL, config.plural))
                )
                for g, p_number in numbers:
                    for more, p_words in sentences(template, topic, g):
                        extend(words + more, probability * weight * share * p_number * p_words, main, side, g)

    for main, side in itertools.permutations(range(config.topics), 2):
        others = 1 - language.topic_Z[main]
        extend((), language.topic_Z[main] * language.topic_Z[side] / others, main, side, None)
    return found


def rows_of(language, rows, tokens, seed, corruption):
    documents = sample(language, rows, seed)
    ids_BT = documents.ids_BT[:, :tokens]
    visible_BT, modified_BT = corrupt(language, ids_BT, corruption, seed)
    return ids_BT, visible_BT, np.minimum(documents.length_B, tokens), modified_BT


@pytest.mark.parametrize("tokens", [6, 7, 9])  # all rows cut or just filled, some, none
def test_posterior_equals_enumeration(tokens):
    corruption = Corruption(vocab_size=40, rate=0.45, mask=0.4, random=0.35)
    documents = every_document(TINY)
    assert sum(documents.values()) == pytest.approx(1.0, abs=1e-12)
    assert {len(words) for words in documents} == {6, 7, 8, 9}
    _, visible_BT, length_B, modified_BT = rows_of(TINY, 40, tokens, 5, corruption)
    visible_BT[0, 0], modified_BT[0, 0] = OTHER, True
    got_QW = posterior(TINY, visible_BT, length_B, modified_BT, corruption)

    V, W = corruption.vocab_size, len(TINY.words)
    size_D = np.array([len(words) for words in documents])
    word_DT = np.array([words[:tokens] + (PAD,) * (tokens - len(words)) for words in documents])
    p_D = np.array(list(documents.values()))
    random, kept = corruption.random / V, corruption.kept
    expected = []
    for b, t in zip(*np.nonzero(modified_BT), strict=True):
        weight_D = p_D * (np.minimum(size_D, tokens) == length_B[b])
        for s in range(length_B[b]):
            v, same_D = visible_BT[b, s], word_DT[:, s] == visible_BT[b, s]
            if v in (MASK, OTHER):
                continue  # the same probability for every word
            if s == t:
                weight_D = weight_D * (random + kept * same_D)
            else:
                weight_D = weight_D * ((1 - corruption.rate) * same_D + corruption.rate * (random + kept * same_D))
        p_W = np.bincount(word_DT[weight_D > 0, t], weight_D[weight_D > 0], W)
        expected.append(p_W / p_W.sum())
    np.testing.assert_allclose(got_QW, expected, rtol=1e-9, atol=1e-12)


def test_samples_follow_the_enumerated_distribution():
    documents = every_document(TINY)
    drawn = sample(TINY, 40_000, seed=3)
    counts = Counter(tuple(row[:n]) for row, n in zip(drawn.ids_BT.tolist(), drawn.length_B, strict=True))
    assert set(counts) <= set(documents)
    common = [words for words, p in documents.items() if p > 5e-4]
    expected = np.array([documents[words] for words in common]) * 40_000
    z = (np.array([counts[words] for words in common]) - expected) / np.sqrt(expected)
    assert len(common) > 300 and abs(z).max() < 5 and z.std() == pytest.approx(1.0, abs=0.15)


@pytest.fixture(scope="module")
def evaluated():
    corruption = Corruption(vocab_size=450)
    ids_BT, visible_BT, length_B, modified_BT = rows_of(LANGUAGE, 1_500, 62, 11, corruption)
    post_QW = posterior(LANGUAGE, visible_BT, length_B, modified_BT, corruption)
    return corruption, ids_BT, visible_BT, length_B, modified_BT, post_QW


def test_posterior_is_calibrated(evaluated):
    _, ids_BT, _, _, modified_BT, post_QW = evaluated
    target_Q = ids_BT[modified_BT]
    np.testing.assert_allclose(post_QW.sum(1), 1.0)
    confidence_Q, right_Q = post_QW.max(1), post_QW.argmax(1) == target_Q
    for low in np.arange(0.2, 1.0, 0.1):
        inside = (confidence_Q > low) & (confidence_Q <= low + 0.1)
        if inside.sum() > 50:
            error = np.sqrt((confidence_Q * (1 - confidence_Q))[inside].sum()) / inside.sum()
            assert abs(right_Q[inside].mean() - confidence_Q[inside].mean()) < 4 * error + 1e-3
    # Not only the answer: the words of every kind are met as often as they are expected.
    for kind in ("content", "cue", "function", "punctuation"):
        of_kind = np.array([k == kind for k in LANGUAGE.kinds])
        p_Q = post_QW[:, of_kind].sum(1)
        assert abs(of_kind[target_Q].sum() - p_Q.sum()) < 4 * np.sqrt((p_Q * (1 - p_Q)).sum()) + 1


def test_bayes_apt_agrees_with_counted_hits(evaluated):
    corruption, ids_BT, visible_BT, length_B, modified_BT, post_QW = evaluated
    limit = bayes_apt_of(LANGUAGE, visible_BT, length_B, modified_BT, corruption)
    target_Q, answer_Q = ids_BT[modified_BT], post_QW.argmax(1)
    W = len(LANGUAGE.words)

    np.testing.assert_allclose(limit.totals_CW.sum(), len(target_Q))
    np.testing.assert_allclose(limit.confusion_WW.sum(1), limit.totals_CW.sum(0))
    np.testing.assert_allclose(np.diag(limit.confusion_WW), limit.hits_CW.sum(0))
    np.testing.assert_allclose(limit.totals_CW.sum(1) / len(target_Q), [0.8, 0.1, 0.1], atol=0.01)
    assert (limit.hits_CW <= limit.totals_CW + 1e-9).all()
    assert limit.macro <= limit.best + 1e-12
    assert limit.best_hits_CW.sum() <= limit.hits_CW.sum() + 1e-9  # none has a better micro accuracy than MAP

    # What was drawn differs from the expectation by no more than chance; half the rows say the same within their error.
    counted = (answer_Q == target_Q).mean()
    assert abs(counted - limit.micro) < 4 * np.sqrt(limit.micro * (1 - limit.micro) / len(target_Q))
    n_W = np.bincount(target_Q, minlength=W)
    counted_apt = (np.bincount(target_Q[answer_Q == target_Q], minlength=W) / n_W).mean()
    assert n_W.min() > 0 and abs(counted_apt - limit.macro) < 0.03
    parts = [
        bayes_apt_of(LANGUAGE, visible_BT[part], length_B[part], modified_BT[part], corruption)
        for part in (slice(0, 750), slice(750, 1_500))
    ]
    for name in ("micro", "macro"):
        first, second = (getattr(part, name) for part in parts)
        error = np.hypot(*(getattr(part, f"{name}_se") for part in parts))
        assert abs(first - second) < 4 * error < 0.1


def context_free_apt(p_W, vocab_size):
    """The ideal head without context (sheet, section 6): copies x iff p_x (V + 1) > p_max, else answers the top."""
    copied = p_W * (vocab_size + 1) > p_W.max()
    apt_W = 0.1 * (1 + 1 / vocab_size) * copied
    apt_W[p_W.argmax()] += 0.8 + 0.1 * (vocab_size - copied.sum()) / vocab_size
    return apt_W.mean()


def test_a_perfect_learner_recovers_the_planted_classes(evaluated):
    """The confusion matrix of the MAP predictor, filtered and clustered as in the sheet, section 2."""
    corruption, ids_BT, _, _, _, post_QW = evaluated
    W, answer_Q = len(LANGUAGE.words), post_QW.argmax(1)
    rng = np.random.Generator(np.random.Philox(key=9))
    M = np.zeros((W, W))
    for _ in range(4):  # original words drawn anew, given what was visible
        drawn_Q = (rng.random((len(answer_Q), 1)) > np.cumsum(post_QW, 1)[:, :-1]).sum(1)
        np.add.at(M, (drawn_Q, answer_Q), 1)
    hits = np.diag(M)
    keep = (hits >= 1) & (hits >= M.max(1))
    R = M / np.maximum(hits, 1)[:, None]
    mutual = (R >= 0.1) & (R.T >= 0.1) & keep[:, None] & keep
    label_W = connected_components(csr_matrix(mutual))[1]
    class_W = truth(LANGUAGE).class_W
    planted = class_W >= 0
    assert keep[planted].mean() > 0.97
    assert adjusted_rand_index(label_W[planted], class_W[planted]) > 0.95

    n_W = np.bincount(ids_BT[ids_BT != PAD], minlength=W)
    macro = (hits / M.sum(1)).mean()
    assert macro > 5 * context_free_apt(n_W / n_W.sum(), corruption.vocab_size)


def test_the_margins_of_the_default_language(evaluated):
    """Confusions inside a class stay clear of theta = 0.1 both ways, those across classes far below, and the most
    frequent member is the easiest. Classes are pooled over topics: the rarest words are met a few times only."""
    post_QW = evaluated[-1]
    W, answer_Q = len(LANGUAGE.words), post_QW.argmax(1)
    M = np.zeros((W, W))
    np.add.at(M.T, answer_Q, post_QW)
    for slot in LANGUAGE.slots.values():
        for words_ZX in slot.words_GZX:
            pooled_XX = M[words_ZX[:, :, None], words_ZX[:, None]].sum(0)
            hits_X = np.diag(pooled_XX)
            R_XX = pooled_XX / hits_X[:, None]
            away = R_XX[~np.eye(len(hits_X), dtype=bool)]
            assert 0.12 < away.min() and away.max() < 0.6
            apt_X = hits_X / M[words_ZX].sum((0, 2))
            assert apt_X[0] > apt_X[1:].max()
            # Mostly the other number, where determiner and auxiliary tell nothing: one way, so no mutual match.
            assert M[words_ZX].sum() - pooled_XX.sum() < 0.08 * M[words_ZX].sum()


def test_documents_are_nested_and_reproducible():
    texts = sample_documents(LANGUAGE, 600, seed=7)
    assert texts == sample_documents(LANGUAGE, 600, seed=7)
    assert texts[:40] == sample_documents(LANGUAGE, 40, seed=7)
    assert texts[250:530] == sample_documents(LANGUAGE, 280, seed=7, first=250)
    assert texts[:40] != sample_documents(LANGUAGE, 40, seed=8)
    assert len(set(texts)) == 600
    again = make_language(LanguageConfig())
    assert again.words == LANGUAGE.words
    assert make_language(LanguageConfig(seed=1)).words != LANGUAGE.words


def test_lexicon_and_text():
    assert len(set(LANGUAGE.words)) == len(LANGUAGE.words)
    for word, kind in zip(LANGUAGE.words, LANGUAGE.kinds, strict=True):
        assert len(word) == 1 if kind == "punctuation" else word.isascii() and word.isalpha() and word.islower()
    documents = sample(LANGUAGE, 300, seed=0)
    longest = max(len(template.tokens) for template in LANGUAGE.templates)
    shortest = LANGUAGE.config.min_tokens
    assert documents.length_B.min() >= shortest and documents.length_B.max() < shortest + longest
    inside_BT = np.arange(documents.ids_BT.shape[1]) < documents.length_B[:, None]
    for part in (documents.ids_BT, documents.sentence_BT, documents.role_BT, documents.number_BT):
        np.testing.assert_array_equal(part >= 0, inside_BT)
    index = {word: i for i, word in enumerate(LANGUAGE.words)}
    for row, string in zip(documents.ids_BT, text(LANGUAGE, documents.ids_BT), strict=True):
        spaced = string.replace(".", " .").replace(",", " ,").split()
        assert [index[word] for word in spaced] == row[row >= 0].tolist() and string.endswith(".")


def test_every_word_is_one_wordpiece_token():
    texts = sample_documents(LANGUAGE, 2_000, seed=0)
    tokenizer = train_wordpiece(texts, 600)
    table_V = word_ids(LANGUAGE, {token: i for i, token in enumerate(tokenizer.tokens)})
    assert table_V.shape == (tokenizer.vocab_size,) and table_V[tokenizer.mask_id] == MASK
    assert table_V[tokenizer.pad_id] == PAD and table_V[tokenizer.cls_id] == OTHER
    documents = sample(LANGUAGE, 200, seed=0)
    for ids, row in zip(tokenizer.encode_batch(texts[:200]), documents.ids_BT, strict=True):
        assert table_V[ids].tolist() == row[row >= 0].tolist()
    with pytest.raises(InputError, match="not one token"):
        word_ids(LANGUAGE, {"[MASK]": 0, "[PAD]": 1, "the": 2})


def test_agreement_topics_and_cues():
    documents = sample(LANGUAGE, 4_000, seed=2)
    at = {role: documents.role_BT == i for i, role in enumerate(LANGUAGE.roles)}
    number = documents.number_BT
    assert at["aux"].any() and at["pronoun"].any()
    plural_words = LANGUAGE.slots["subject"].words_GZX[PLURAL].ravel()
    np.testing.assert_array_equal(np.isin(documents.ids_BT, plural_words)[at["subject"]], number[at["subject"]])
    have, they = (LANGUAGE.words.index(word) for word in ("have", "they"))
    np.testing.assert_array_equal(documents.ids_BT[at["aux"]] == have, number[at["aux"]])
    np.testing.assert_array_equal(documents.ids_BT[at["pronoun"]] == they, number[at["pronoun"]])
    b, t = np.nonzero(at["pronoun"])
    np.testing.assert_array_equal(number[b, t], number[b, t - 1])  # the last token of the sentence before

    verb = LANGUAGE.slots["verb"]
    z_of = np.full(len(LANGUAGE.words), -1)
    z_of[verb.words_GZX[0]] = np.arange(LANGUAGE.config.topics)[:, None]
    b, t = np.nonzero(at["verb"])
    z = z_of[documents.ids_BT[b, t]]
    assert ((z == documents.topic_B[b]) | (z == documents.side_topic_B[b])).all()
    assert (documents.topic_B != documents.side_topic_B).all()
    assert (z == documents.side_topic_B[b]).mean() == pytest.approx(LANGUAGE.config.side_topic, abs=0.015)
    share_Z = np.bincount(documents.topic_B) / 4_000
    np.testing.assert_allclose(share_Z, LANGUAGE.topic_Z, atol=0.035)

    own = (
        documents.ids_BT[b, t - 1]
        == verb.cues_Y[(verb.words_GZX[0] == documents.ids_BT[b, t, None, None]).nonzero()[2]]
    )
    assert own.mean() == pytest.approx(1 / (1 + 2 * LANGUAGE.config.confusion), abs=0.015)


def test_members_are_interchangeable_but_for_the_cue():
    """Given the class, the member is independent of its context, the other members in it included."""
    documents = sample(LANGUAGE, 12_000, seed=4)
    for name, other in (("subject", "verb"), ("verb", "object"), ("object", "place")):
        slot, second = LANGUAGE.slots[name], LANGUAGE.slots[other]
        member_W, partner_W = np.full((2, len(LANGUAGE.words)), -1)
        member_W[slot.words_GZX] = np.arange(len(slot.member_X))
        partner_W[second.words_GZX] = np.arange(len(second.member_X))
        b, t = np.nonzero(documents.role_BT == LANGUAGE.roles.index(name))
        sentence = documents.sentence_BT[b, t]
        partner = np.full(len(b), -1)
        u, v = np.nonzero(documents.role_BT == LANGUAGE.roles.index(other))
        where = {(i, e): k for k, (i, e) in enumerate(zip(b, sentence, strict=True))}
        for i, j, e in zip(u, v, documents.sentence_BT[u, v], strict=True):
            if (i, e) in where:
                partner[where[i, e]] = partner_W[documents.ids_BT[i, j]]
        member = member_W[documents.ids_BT[b, t]]
        contexts = (partner, documents.number_BT[b, t], documents.topic_B[b], documents.role_BT[b, t + 1])
        for context in contexts:
            table = np.zeros((len(slot.member_X), int(context.max()) + 2))
            np.add.at(table, (member, context + 1), 1)
            table = table[:, table.sum(0) > 0]
            if table.shape[1] > 1:
                assert chi2_contingency(table).pvalue > 1e-4


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="confusion"):
        LanguageConfig(confusion=0.0)
    with pytest.raises(ValueError, match="topics"):
        LanguageConfig(topics=1)
    with pytest.raises(ValueError, match="members"):
        LanguageConfig(members=(("subject", 9),))
    with pytest.raises(ValueError, match="without a pronoun"):
        LanguageConfig(templates=(("pronoun verb~ verb .", 1.0),))
    with pytest.raises(ValueError, match="needs verb once"):
        LanguageConfig(templates=(("det verb .", 1.0),))
    with pytest.raises(ValueError, match="rate"):
        Corruption(100, rate=0.0)
    with pytest.raises(ValueError, match="num_documents"):
        sample(LANGUAGE, 0, seed=0)


def test_rows_that_the_language_cannot_produce_are_refused():
    corruption = Corruption(450)
    visible = np.full((1, 62), MASK, np.int32)
    modified = np.zeros((1, 62), bool)
    modified[0, 2] = True
    short = LANGUAGE.config.min_tokens - 1
    with pytest.raises(ValueError, match=f"{short} visible tokens"):
        posterior(LANGUAGE, visible, np.array([short]), modified, corruption)
    with pytest.raises(ValueError, match="behind the end"):
        posterior(LANGUAGE, visible, np.array([1]), modified, corruption)
    with pytest.raises(ValueError, match="word indices"):
        posterior(LANGUAGE, np.full((1, 62), 10_000), np.array([62]), modified, corruption)
    with pytest.raises(ValueError, match="vocab_size"):
        posterior(LANGUAGE, visible, np.array([62]), modified, Corruption(10))


def test_one_sentence_documents_are_a_setting():
    """`min_tokens` = 1 ends every document after its first sentence, for short rows."""
    language = make_language(LanguageConfig(min_tokens=1, side_topic=0.0))
    documents = sample(language, 500, seed=0)
    assert documents.sentence_BT.max() == 0
    limit = bayes_apt(language, Corruption(450), rows=300, row_tokens=14)
    assert 0.3 < limit.macro <= limit.best < 1


@pytest.mark.parametrize("documents", ["one sentence", "several"])
def test_tasks_have_the_labels_that_their_texts_show(documents):
    several = language.LanguageConfig()
    config = several if documents == "several" else language.LanguageConfig(min_tokens=6, side_topic=0.0)
    lang = language.make_language(config)
    topic = language.make_task(lang, "topic", 30, seed=5)
    assert np.bincount(topic.label_N).tolist() == [30] * config.topics
    again = language.make_task(lang, "topic", 30, seed=5)
    assert topic.texts == again.texts and np.array_equal(topic.label_N, again.label_N)
    topic_of = {}
    for slot in lang.slots.values():
        for z in range(config.topics):
            topic_of |= {lang.words[w]: z for w in slot.words_GZX[:, z].ravel()}
    for words, label in zip(topic.texts, topic.label_N, strict=True):
        found = [topic_of[w.strip(".,")] for w in words.split() if w.strip(".,") in topic_of]
        assert label in found  # a side topic may stand there too

    relation = language.make_task(lang, "relation", 10, seed=5)
    assert len(relation.classes) == 12 and np.bincount(relation.label_N).tolist() == [10] * 12
    cues = {slot: {lang.words[w] for w in lang.slots[slot].cues_Y} for slot in ("subject", "object")}
    nouns = {slot: {lang.words[w] for w in lang.slots[slot].words_GZX.ravel()} for slot in ("subject", "object")}
    for words, label in zip(relation.texts, relation.label_N, strict=True):
        for sentence in words.split("."):
            tokens = sentence.replace(",", "").split()
            at = {slot: [i for i, w in enumerate(tokens) if w in nouns[slot]] for slot in nouns}
            if at["subject"] and at["object"]:
                found = [tokens[at[slot][0] - 1] for slot in ("subject", "object")]
                assert found[0] in cues["subject"] and found[1] in cues["object"]
                assert " -> ".join(found) == relation.classes[label]
                break
        else:
            raise AssertionError(words)


def test_tasks_that_cannot_be_are_refused():
    lang = language.make_language()
    with pytest.raises(InputError, match="'mood'; choose one of topic, relation"):
        language.make_task(lang, "mood", 3, 0)
    bare = language.LanguageConfig(members=(("verb", 3),), templates=(("the verb~ verb .", 1.0),))
    with pytest.raises(InputError, match="no subject"):
        language.make_task(language.make_language(bare), "relation", 3, 0)
