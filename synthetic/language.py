"""The embedded corpus: a generated language whose truth (token classes, topics, agreement, Bayes limit) is known.

How a document comes about, from the whole to the part:

    document    a main topic z1 ~ Zipf and a side topic z2 != z1 ~ Zipf; sentences until `min_tokens` tokens are reached
    sentence    topic z1, or z2 with probability `side_topic`; a template; a number (singular, plural)
    template    literal words, words that agree in number (determiner, auxiliary, pronoun), and pairs "slot~ ... slot"
    pair        the content word: member m of the class (slot, topic, number) with a Zipf probability; its cue word
                "slot~": the m-th cue of the slot, or, `confusion` times as likely each, the cue of another member

So a content word can be told from its context in three steps: the class needs the syntax nearby (slot), an agreeing
word that may stand beyond a phrase (number), and the rest of the sentence and document (topic); the member needs the
cue, wherever the template puts it. A pronoun takes the number of the sentence before it. The members of a class have
the same distribution in context up to the cue: these are the *planted classes*. Without the cue the best guess would
always be the most frequent member.

Given the main and side topic and the number of the sentence before, sentences are independent, and given topic,
template and number so are the pairs. Hence the posterior of a hidden word given everything visible in the row is a
finite sum (a semi-Markov forward-backward over sentences), computed here without approximation: `posterior`, and from
it `bayes_apt`, the accuracy per token that no model can beat.

Letters beside those of `bert6_jax`: W words of the language, Z topics, G grammatical numbers, X members of a class,
Y cues of a slot, P ordered pairs (main topic, side topic), Q modified positions of all rows, E sentences of a document.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from bert6_jax.errors import InputError

SINGULAR, PLURAL = 0, 1
# What a model may see besides a word of the language.
MASK, OTHER, PAD = -1, -2, -3

_AGREEING = {  # word -> probability, for singular and plural
    "det": ({"the": 0.4, "a": 0.4, "this": 0.2}, {"the": 0.4, "some": 0.4, "these": 0.2}),
    "aux": ({"has": 1.0}, {"have": 1.0}),
    "pronoun": ({"it": 1.0}, {"they": 1.0}),
}
_ADJECTIVES = ("small", "young", "grey", "proud", "heavy", "round", "cold", "dusty")
_CUES = {  # subjects and objects share theirs: a cue tells the member, not the slot
    "subject": _ADJECTIVES,
    "verb": ("often", "never", "slowly", "gladly", "barely", "always", "nearly", "already"),
    "object": _ADJECTIVES,
    "place": ("near", "beyond", "behind", "under", "inside", "above", "around", "beside"),
}
_ENDINGS = {
    "subject": ("er", "el", "in", "ock"),
    "verb": ("ed",),
    "object": ("le", "et", "ow", "una"),
    "place": ("mere", "ford", "wick", "holm"),
}
SLOTS = tuple(_CUES)
_BLOCK = 256  # documents drawn from one random stream


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """Everything that defines a language; two equal configs make the same one.

    `templates` are (text, weight) pairs. In the text a word of `SLOTS` is a content word and the same word with `~` its
    cue; `det`, `aux`, `pronoun` agree with the number of the sentence; everything else stands for itself. A template
    with a pronoun takes the number of the sentence before, so it never opens a document.
    """

    topics: int = 6
    topic_exponent: float = 0.7
    side_topic: float = 0.2
    members: tuple[tuple[str, int], ...] = (("subject", 3), ("verb", 3), ("object", 4), ("place", 3))
    member_exponent: float = 0.4
    confusion: float = 0.25
    plural: float = 0.45
    min_tokens: int = 54
    templates: tuple[tuple[str, float], ...] = (
        ("det subject~ subject aux verb~ verb the object~ object .", 1.0),
        ("det subject~ subject place~ place aux verb~ verb the object~ object .", 0.8),
        ("pronoun aux verb~ verb the object~ object place~ place .", 0.8),
        ("det subject~ subject aux verb~ verb place~ place .", 0.6),
        ("place~ place , det subject~ subject aux verb~ verb the object~ object .", 0.6),
    )
    seed: int = 0

    def __post_init__(self) -> None:
        if self.topics < 2:
            raise ValueError(f"topics={self.topics}: a document has two, so at least 2")
        for name, value in (("side_topic", self.side_topic), ("plural", self.plural)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: a probability, 0 to 1")
        if not 0 < self.confusion <= 1:
            raise ValueError(f"confusion={self.confusion}: above 0 and at most 1")
        if self.min_tokens < 1:
            raise ValueError(f"min_tokens={self.min_tokens}: at least 1")
        members = dict(self.members)
        if len(members) < len(self.members):
            raise ValueError(f"members={self.members}: a slot is named twice")
        for slot, count in self.members:
            if slot not in SLOTS or not 1 <= count <= len(_CUES[slot]):
                raise ValueError(f"members: {slot!r}: {count}; slots are {SLOTS} with 1 to 8 members")
        if all("pronoun" in text.split() for text, _ in self.templates):
            raise ValueError("templates: at least one must be without a pronoun, to open a document")
        for text, weight in self.templates:
            tokens = text.split()
            if weight <= 0:
                raise ValueError(f"templates: {text!r}: weight {weight} is not positive")
            for token in set(tokens):
                slot = token.removesuffix("~")
                if slot in SLOTS and (slot not in members or tokens.count(slot) != 1 or tokens.count(f"{slot}~") != 1):
                    raise ValueError(f"templates: {text!r}: needs {slot} once, {slot}~ once, and members for it")
                if token in _AGREEING and tokens.count(token) > 1:
                    raise ValueError(f"templates: {text!r}: {token} more than once")


class Template(NamedTuple):
    tokens: tuple[str, ...]
    weight: float  # probability of the template, but at the beginning of a document
    opening: float  # probability at the beginning of a document
    carries: bool  # takes the number of the sentence before


class Slot(NamedTuple):
    """A pair of content word and cue; the member is drawn first, then the cue given the member."""

    words_GZX: np.ndarray  # word of every member; G = 1 where the class has no number
    member_X: np.ndarray  # probability of a member
    cues_Y: np.ndarray  # word of every cue
    cue_XY: np.ndarray  # probability of a cue given the member


@dataclasses.dataclass(frozen=True, eq=False)
class Language:
    config: LanguageConfig
    words: tuple[str, ...]
    kinds: tuple[str, ...]  # of every word: content, cue, function or punctuation
    class_W: np.ndarray  # planted class, -1 for the words that are not planted
    class_names: tuple[str, ...]
    templates: tuple[Template, ...]
    roles: tuple[str, ...]  # the distinct tokens of the templates: what `Documents.role_BT` points to
    slots: dict[str, Slot]
    plain_GW: dict[str, np.ndarray]  # word probabilities given the number, of the tokens outside pairs
    topic_Z: np.ndarray
    pairs_P2: np.ndarray  # main and side topic
    pair_P: np.ndarray  # probability of the pair


class Truth(NamedTuple):
    """What the instruments are scored against.

    The adjusted Rand index is taken over the planted words only (`class_W >= 0`): content words, every class of them
    with two members or more. Cues, function words and punctuation have class -1: no claim is made about them (cues of
    a slot do form a cluster of their own, for the pair is symmetric).
    """

    words: tuple[str, ...]
    kinds: tuple[str, ...]
    class_W: np.ndarray
    class_names: tuple[str, ...]


class Documents(NamedTuple):
    """Documents as word indices, PAD behind the end, with everything that is hidden in the text.

    The subject of a sentence is where `role_BT` points to "subject", the word that agrees with it where it points to
    "aux"; both are in the same `sentence_BT`, with the same `number_BT`.
    """

    ids_BT: np.ndarray  # int32, index into `Language.words`
    length_B: np.ndarray  # tokens of the document
    topic_B: np.ndarray  # main topic, the label of the topic task
    side_topic_B: np.ndarray
    sentence_BT: np.ndarray  # index of the sentence in the document, -1 behind the end
    role_BT: np.ndarray  # index into `Language.roles`, -1 behind the end
    number_BT: np.ndarray  # SINGULAR or PLURAL: number of the sentence, -1 behind the end


def _zipf(count: int, exponent: float) -> np.ndarray:
    weight = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return weight / weight.sum()


def _random(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))


def _invent(rng: np.random.Generator, endings: tuple[str, ...], taken: set[str]) -> str:
    """A pronounceable word nobody has used, nor its plural."""
    onsets = "b bl br d dr f fl g gr h k kl l m n p pl pr r s sk sl sn st t tr v w z".split()
    vowels = "a e i o u ai ea oo".split()
    codas = "b d g k l lk lm lt m mp n nd nk p r rd rk rn sk st t".split()
    while True:
        word = "".join(str(rng.choice(part)) for part in (onsets, vowels, codas, endings))
        if not {word, f"{word}s"} & taken:
            taken |= {word, f"{word}s"}
            return word


def make_language(config: LanguageConfig = LanguageConfig()) -> Language:  # noqa: B008 (frozen)
    """The lexicon, templates and probability tables of `config`; deterministic."""
    rng = _random(config.seed, 2**32)  # no block of documents has this number
    words: list[str] = []
    kinds: list[str] = []
    classes: list[int] = []
    names: list[str] = []

    def add(word: str, kind: str, planted: int = -1) -> int:
        words.append(word)
        kinds.append(kind)
        classes.append(planted)
        return len(words) - 1

    weights = np.array([weight for _, weight in config.templates], np.float64)
    carries = np.array(["pronoun" in text.split() for text, _ in config.templates])
    opening = np.where(carries, 0.0, weights)
    templates = tuple(
        Template(tuple(text.split()), float(weight), float(first), bool(carry))
        for (text, _), weight, first, carry in zip(
            config.templates, weights / weights.sum(), opening / opening.sum(), carries, strict=True
        )
    )
    roles = tuple(dict.fromkeys(token for template in templates for token in template.tokens))
    plain = [role for role in roles if role.removesuffix("~") not in SLOTS]

    index: dict[str, int] = {}
    for role in plain:
        for word in (word for given in _AGREEING.get(role, ({role: 1.0},)) for word in given):
            if word not in index:
                index[word] = add(word, "function" if word.isalpha() else "punctuation")

    taken = set(words) | {cue for cues in _CUES.values() for cue in cues}
    slots: dict[str, Slot] = {}
    for slot, count in config.members:
        if slot not in roles:
            continue
        for cue in _CUES[slot][:count]:
            if cue not in index:
                index[cue] = add(cue, "cue")
        cues_Y = np.array([index[cue] for cue in _CUES[slot][:count]], np.int32)
        numbers = ("singular", "plural") if slot == "subject" else ("",)
        words_GZX = np.zeros((len(numbers), config.topics, count), np.int32)
        for topic in range(config.topics):
            stems = [_invent(rng, _ENDINGS[slot], taken) for _ in range(count)]
            for g, number in enumerate(numbers):
                names.append(" ".join(part for part in (slot, number, f"topic {topic}") if part))
                for x, stem in enumerate(stems):
                    planted = len(names) - 1 if count > 1 else -1
                    words_GZX[g, topic, x] = add(f"{stem}s" if g == PLURAL else stem, "content", planted)
        cue_XY = np.where(np.eye(count, dtype=bool), 1.0, config.confusion)
        slots[slot] = Slot(words_GZX, _zipf(count, config.member_exponent), cues_Y, cue_XY / cue_XY.sum(1)[:, None])

    plain_GW: dict[str, np.ndarray] = {}
    for role in plain:
        plain_GW[role] = np.zeros((2, len(words)))
        for g in (SINGULAR, PLURAL):
            for word, probability in _AGREEING[role][g].items() if role in _AGREEING else ((role, 1.0),):
                plain_GW[role][g, index[word]] = probability

    topic_Z = _zipf(config.topics, config.topic_exponent)
    main, side = np.nonzero(~np.eye(config.topics, dtype=bool))
    return Language(
        config=config,
        words=tuple(words),
        kinds=tuple(kinds),
        class_W=np.array(classes, np.int32),
        class_names=tuple(names),
        templates=templates,
        roles=roles,
        slots=slots,
        plain_GW=plain_GW,
        topic_Z=topic_Z,
        pairs_P2=np.stack([main, side], 1),
        pair_P=topic_Z[main] * topic_Z[side] / (1 - topic_Z[main]),
    )


def truth(language: Language) -> Truth:
    return Truth(language.words, language.kinds, language.class_W, language.class_names)


def _draw(p: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Inverse of the cumulative distribution `p[..., n]` at `u[...]`, broadcast."""
    cdf = np.cumsum(p, -1)
    return (u[..., None] >= cdf[..., :-1] / cdf[..., -1:]).sum(-1)


def _sample_block(language: Language, seed: int, block: int) -> Documents:
    """Documents `block * _BLOCK` and on, a pure function of (language, seed, block)."""
    config = language.config
    rng = _random(seed, block)
    sizes = np.array([len(template.tokens) for template in language.templates])
    rows, sentences, longest = _BLOCK, -(-config.min_tokens // sizes.min()), int(sizes.max())

    pair_B = _draw(language.pair_P, rng.random(rows))
    main_B, side_B = language.pairs_P2[pair_B].T
    topic_BE = np.where(rng.random((rows, sentences)) < config.side_topic, side_B[:, None], main_B[:, None])
    template_BE = _draw(np.array([template.weight for template in language.templates]), rng.random((rows, sentences)))
    template_BE[:, 0] = _draw(np.array([template.opening for template in language.templates]), rng.random(rows))
    number_BE = (rng.random((rows, sentences)) < config.plural).astype(np.int64)
    carries_BE = np.array([template.carries for template in language.templates])[template_BE]
    for e in range(1, sentences):
        number_BE[:, e] = np.where(carries_BE[:, e], number_BE[:, e - 1], number_BE[:, e])

    drawn_BE: dict[str, np.ndarray] = {}
    for name, slot in language.slots.items():
        member_BE = _draw(slot.member_X, rng.random((rows, sentences)))
        cue_BE = _draw(slot.cue_XY[member_BE], rng.random((rows, sentences)))
        drawn_BE[name] = slot.words_GZX[np.minimum(number_BE, len(slot.words_GZX) - 1), topic_BE, member_BE]
        drawn_BE[f"{name}~"] = slot.cues_Y[cue_BE]
    for role, p_GW in language.plain_GW.items():
        words = np.flatnonzero(p_GW.any(0))
        drawn_BE[role] = words[_draw(p_GW[:, words][number_BE], rng.random((rows, sentences)))]

    size_BE = sizes[template_BE]
    start_BE = np.cumsum(size_BE, 1) - size_BE
    kept_BE = start_BE < config.min_tokens
    width = config.min_tokens - 1 + longest
    ids_BT = np.full((rows, width), PAD, np.int32)
    sentence_BT, role_BT, number_BT = (np.full((rows, width), -1, np.int32) for _ in range(3))
    for k, template in enumerate(language.templates):
        b, e = np.nonzero(kept_BE & (template_BE == k))
        for j, token in enumerate(template.tokens):
            at = b, start_BE[b, e] + j
            ids_BT[at] = drawn_BE[token][b, e]
            sentence_BT[at] = e
            role_BT[at] = language.roles.index(token)
            number_BT[at] = number_BE[b, e]
    length_B = (size_BE * kept_BE).sum(1)
    return Documents(ids_BT, length_B, main_B, side_B, sentence_BT, role_BT, number_BT)


def sample(language: Language, num_documents: int, seed: int, first: int = 0) -> Documents:
    """Documents `first` to `first + num_documents` of the endless corpus `seed`: subsets are nested by construction."""
    if num_documents < 1 or first < 0:
        raise ValueError(f"num_documents={num_documents}, first={first}: at least 1 and 0")
    last = first + num_documents
    blocks = [_sample_block(language, seed, block) for block in range(first // _BLOCK, (last - 1) // _BLOCK + 1)]
    skip = first % _BLOCK
    return Documents(*(np.concatenate(part)[skip : skip + num_documents] for part in zip(*blocks, strict=True)))


def text(language: Language, ids_BT: np.ndarray) -> list[str]:
    """The documents as strings: words between spaces, punctuation attached to the word before it."""
    spaced = zip(language.words, language.kinds, strict=True)
    pieces = [word if kind == "punctuation" else f" {word}" for word, kind in spaced]
    return ["".join([pieces[i] for i in row if i >= 0]).lstrip() for row in ids_BT.tolist()]


def sample_documents(language: Language, num_documents: int, seed: int, first: int = 0) -> list[str]:
    """The text of `sample`: document i depends only on (language, seed, i)."""
    return text(language, sample(language, num_documents, seed, first).ids_BT)


class Task(NamedTuple):
    """Texts with a label each, the same number of every class."""

    texts: list[str]
    label_N: np.ndarray  # int32
    classes: tuple[str, ...]


TASKS = ("topic", "relation")


def make_task(language: Language, name: str, per_class: int, seed: int) -> Task:
    """A classification task whose label the generator knows, `per_class` documents of every class, in random order.

    `topic`     the main topic: told by any of the content words, in any order.
    `relation`  what is said of whom: the cue of the subject and the cue of the object of the first sentence that has
                both. They share their words, so a bag of words does not tell (small, young) from (young, small): the
                model has to bind each cue to its noun.

    Swapping a content word for another member of its planted class keeps both labels; swapping a cue changes the
    second. Documents of another `seed` than the corpus's are new ones.
    """
    if name not in TASKS:
        raise InputError(f"embedded task {name!r}; choose one of {', '.join(TASKS)}")
    if per_class < 1:
        raise ValueError(f"per_class={per_class}: at least 1")
    if name == "topic":
        classes = tuple(f"topic {z}" for z in range(language.config.topics))
    else:
        missing = [slot for slot in ("subject", "object") if slot not in language.slots]
        if missing:
            raise InputError(f"embedded task 'relation': the language has no {missing[0]}; give it a template with one")
        cues = [[language.words[w] for w in language.slots[slot].cues_Y] for slot in ("subject", "object")]
        classes = tuple(f"{a} -> {b}" for a in cues[0] for b in cues[1])

    texts: list[list[str]] = [[] for _ in classes]
    first = 0
    while min(map(len, texts)) < per_class:
        if first >= 10_000 * per_class * len(classes):
            raise InputError(f"embedded task {name!r}: some class never appears in this language; change its templates")
        documents = sample(language, 4 * _BLOCK, seed, first)
        first += 4 * _BLOCK
        label_B = documents.topic_B if name == "topic" else _relation(language, documents)
        for label, words in zip(label_B.tolist(), text(language, documents.ids_BT), strict=True):
            if label >= 0 and len(texts[label]) < per_class:
                texts[label].append(words)
    order = _random(seed, 2**34).permutation(per_class * len(classes))
    flat = [words for group in texts for words in group]
    label_N = np.repeat(np.arange(len(classes), dtype=np.int32), per_class)
    return Task([flat[i] for i in order], label_N[order], classes)


def _relation(language: Language, documents: Documents) -> np.ndarray:
    """Class of the relation task of every document, -1 where no sentence has both a subject and an object."""
    at = []
    for slot in ("subject", "object"):
        cue_BT = documents.role_BT == language.roles.index(f"{slot}~")
        sentence_BT = np.where(cue_BT, documents.sentence_BT, -1)
        at.append((cue_BT, sentence_BT))
    E = int(documents.sentence_BT.max()) + 1
    has_BE = np.stack([np.stack([(s == e).any(1) for e in range(E)], 1) for _, s in at]).all(0)
    first_B = np.where(has_BE.any(1), has_BE.argmax(1), -1)
    parts = []
    for (cue_BT, sentence_BT), slot in zip(at, ("subject", "object"), strict=True):
        here_BT = cue_BT & (sentence_BT == first_B[:, None])
        word_B = np.where(here_BT, documents.ids_BT, -1).max(1)
        number_W = np.full(len(language.words), -1)
        number_W[language.slots[slot].cues_Y] = np.arange(len(language.slots[slot].cues_Y))
        parts.append(np.where(word_B >= 0, number_W[np.maximum(word_B, 0)], -1))
    label_B = parts[0] * len(language.slots["object"].cues_Y) + parts[1]
    return np.where((first_B >= 0) & (parts[0] >= 0) & (parts[1] >= 0), label_B, -1)


def word_ids(language: Language, vocab: dict[str, int]) -> np.ndarray:
    """What every id of a tokenizer means to `posterior`: a word of the language, MASK, PAD or OTHER; int32 [V].

    Raises `InputError` if a word of the language is not one token of the vocabulary.
    """
    table_V = np.full(max(vocab.values()) + 1, OTHER, np.int32)
    for word, meaning in (("[MASK]", MASK), ("[PAD]", PAD), *((word, i) for i, word in enumerate(language.words))):
        if word not in vocab:
            raise InputError(f"vocabulary: {word!r} of the embedded corpus is not one token; train a larger vocabulary")
        table_V[vocab[word]] = meaning
    return table_V


@dataclasses.dataclass(frozen=True)
class Corruption:
    """Masked-language-model corruption (BERT's): `rate` of the positions are modified; of these `mask` become
    [MASK], `random` a uniform id among all `vocab_size` ids of the tokenizer, and the rest keep their word."""

    vocab_size: int
    rate: float = 0.15
    mask: float = 0.8
    random: float = 0.1

    def __post_init__(self) -> None:
        if self.vocab_size < 1 or not 0 < self.rate <= 1 or min(self.mask, self.random, self.kept) < 0:
            raise ValueError(f"{self}: vocab_size >= 1, rate in (0, 1], mask and random >= 0 with a sum of at most 1")

    @property
    def kept(self) -> float:
        return round(1.0 - self.mask - self.random, 12)


def corrupt(language: Language, ids_BT: np.ndarray, corruption: Corruption, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(visible_BT, modified_BT) of rows of words, where PAD stays; random ids beyond the language's words are OTHER."""
    rng = _random(seed, 2**33)  # a stream of its own: neither the lexicon's nor a block's
    modified_BT = (rng.random(ids_BT.shape) < corruption.rate) & (ids_BT != PAD)
    mode_BT = rng.random(ids_BT.shape)
    random_BT = rng.integers(0, corruption.vocab_size, ids_BT.shape, np.int32)
    new_BT = np.where(random_BT < len(language.words), random_BT, OTHER)
    new_BT = np.where(mode_BT < corruption.mask + corruption.random, new_BT, ids_BT)
    new_BT = np.where(mode_BT < corruption.mask, MASK, new_BT)
    return np.where(modified_BT, new_BT, ids_BT).astype(np.int32), modified_BT


def _sum_scaled(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The sum of `value_BGP * exp(log_B)` over parts, again as a value (maximum 1) and a logarithm (-inf: all zero)."""
    logs = np.stack([log_B for _, log_B in parts])
    top_B = logs.max(0)
    top_B = np.where(np.isfinite(top_B), top_B, 0.0)
    total = sum(value * np.exp(log_B - top_B)[:, None, None] for value, log_B in parts)
    peak_B = total.max((1, 2))
    alive_B = peak_B > 0
    peak_B = np.where(alive_B, peak_B, 1.0)
    return total / peak_B[:, None, None], np.where(alive_B, top_B + np.log(peak_B), -np.inf)


def _context(
    language: Language, visible_BT: np.ndarray, length_B: np.ndarray, b_Q: np.ndarray, t_Q: np.ndarray, noise: float
) -> np.ndarray:
    """P(word at (b, t) | everything visible in row b but the position t itself), [Q, W].

    Semi-Markov forward-backward over the boundaries t between sentences: alpha[t] is the probability of the tokens
    before t and of a sentence beginning there, over (number of the sentence before, topic pair); beta[t] that of the
    tokens from t on. Positions behind the row are unobserved: a sentence cut by the end of the row runs on into them.
    """
    config, templates = language.config, language.templates
    B, T = visible_BT.shape
    sizes = [len(template.tokens) for template in templates]
    bounds = T + max(sizes)
    pairs_P = np.arange(len(language.pair_P))
    topic_ZP = np.zeros((config.topics, len(pairs_P)))  # topic of a sentence, given the pair
    topic_ZP[language.pairs_P2[:, 0], pairs_P] = 1 - config.side_topic
    topic_ZP[language.pairs_P2[:, 1], pairs_P] = config.side_topic
    number_G = np.array([1 - config.plural, config.plural])

    # P(visible | word) up to a factor that is the same for all words; [MASK] and foreign ids say nothing.
    like_BTW = np.ones((B, bounds, len(language.words)))
    b, t = np.nonzero((visible_BT >= 0) & (np.arange(T) < length_B[:, None]))
    like_BTW[b, t] = noise
    like_BTW[b, t, visible_BT[b, t]] += 1.0

    plain_BTG = {role: like_BTW @ p_GW.T for role, p_GW in language.plain_GW.items()}
    content = {name: like_BTW[:, :, slot.words_GZX] for name, slot in language.slots.items()}  # [B, T, G, Z, X]
    cue_BTX = {name: like_BTW[:, :, slot.cues_Y] @ slot.cue_XY.T for name, slot in language.slots.items()}

    # A sentence of template k beginning at s, given its number and topic: the product of its factors, each with the
    # tokens it explains.
    factors: list[list[tuple[tuple[str, ...], np.ndarray]]] = []
    for template in templates:
        factors.append([])
        at = {token: j for j, token in enumerate(template.tokens)}
        for j, token in enumerate(template.tokens):
            if token in language.slots:
                i = at[f"{token}~"]
                member_BTX = cue_BTX[token][:, i : i + T] * language.slots[token].member_X
                pair = np.einsum("btgzx,btx->btgz", content[token][:, j : j + T], member_BTX)
                factors[-1].append(((j, i), pair))
            elif token in language.plain_GW:
                factors[-1].append(((j,), plain_BTG[token][:, j : j + T, :, None]))
    inside = [math.prod(value for _, value in parts) for parts in factors]  # [B, T, G, Z] each

    def mixed_BGP(k: int, s: int) -> np.ndarray:
        return inside[k][:, s] @ topic_ZP

    def entered_BGP(k: int, s: int) -> np.ndarray:
        """alpha[s] carried into the sentence: over its own number."""
        carried = alpha[s] if templates[k].carries else alpha[s].sum(1, keepdims=True) * number_G[:, None]
        return carried * (templates[k].weight if s else templates[k].opening)

    begins_BT = np.arange(T) < np.minimum(length_B, config.min_tokens)[:, None]
    t = np.arange(bounds)
    ends_BT = np.where(length_B[:, None] < T, (t == length_B[:, None]) & (t >= config.min_tokens), t >= T)
    alpha = np.zeros((T, B, 2, len(pairs_P)))
    alpha_log = np.full((T, B), -np.inf)
    alpha[0, :, 0], alpha_log[0] = language.pair_P, 0.0
    for t in range(1, T):
        parts = [
            (entered_BGP(k, t - n) * mixed_BGP(k, t - n), alpha_log[t - n]) for k, n in enumerate(sizes) if t - n >= 0
        ]
        if parts:
            alpha[t], log_B = _sum_scaled(parts)
            alpha_log[t] = np.where(begins_BT[:, t], log_B, -np.inf)
    beta = np.ones((bounds, B, 2, len(pairs_P)))
    beta_log = np.where(ends_BT, 0.0, -np.inf).T.copy()
    for s in range(T - 1, -1, -1):
        parts = []
        for k, n in enumerate(sizes):
            value = mixed_BGP(k, s) * beta[s + n] * (templates[k].weight if s else templates[k].opening)
            if not templates[k].carries:
                value = np.broadcast_to((value * number_G[:, None]).sum(1, keepdims=True), value.shape)
            parts.append((value, beta_log[s + n]))
        value, log_B = _sum_scaled(parts)
        beta[s] = np.where(begins_BT[:, s, None, None], value, beta[s])
        beta_log[s] = np.where(begins_BT[:, s], log_B, beta_log[s])
    with np.errstate(divide="ignore"):
        total_B = np.log((alpha[0, :, 0] * beta[0, :, 0]).sum(-1)) + beta_log[0]
    if not np.isfinite(total_B).all():
        raise ValueError(f"a row of {length_B[np.argmin(total_B)]} visible tokens is no beginning of a document")

    context_QW = np.zeros((len(b_Q), len(language.words)))
    for k, template in enumerate(templates):
        outside = np.empty((T, B, 2, config.topics))  # everything but the sentence itself
        for s in range(T):
            scale_B = np.exp(alpha_log[s] + beta_log[s + sizes[k]] - total_B)
            outside[s] = (entered_BGP(k, s) * beta[s + sizes[k]]) @ topic_ZP.T * scale_B[:, None, None]
        for n, (places, _) in enumerate(factors[k]):
            for j in places:
                q = np.flatnonzero(t_Q >= j)
                if not q.size:
                    continue
                b, s = b_Q[q], t_Q[q] - j
                weight_QGZ = outside[s, b]
                for other, (_, value) in enumerate(factors[k]):
                    if other != n:
                        weight_QGZ = weight_QGZ * value[b, s]
                token = template.tokens[j]
                name = token.removesuffix("~")
                if name not in language.slots:
                    context_QW[q] += weight_QGZ.sum(2) @ language.plain_GW[token]
                    continue
                slot = language.slots[name]
                if len(slot.words_GZX) == 1:
                    weight_QGZ = weight_QGZ.sum(1, keepdims=True)
                if token == name:
                    member_QX = slot.member_X * cue_BTX[name][b, s + places[1]]
                    words_QC = (weight_QGZ[..., None] * member_QX[:, None, None]).reshape(len(q), -1)
                    context_QW[np.ix_(q, slot.words_GZX.ravel())] += words_QC
                else:
                    member_QX = np.einsum("qgz,qgzx->qx", weight_QGZ, content[name][b, s + places[0]]) * slot.member_X
                    context_QW[np.ix_(q, slot.cues_Y)] += member_QX @ slot.cue_XY
    return context_QW / context_QW.sum(1, keepdims=True)


def _evidence(visible_Q: np.ndarray, words: int, corruption: Corruption) -> tuple[np.ndarray, np.ndarray]:
    """P(visible, replaced | word, modified) [Q, 1] and P(visible, kept | word, modified) [Q, W], up to a factor."""
    word = visible_Q >= 0
    kept_QW = np.zeros((len(visible_Q), words))
    kept_QW[np.flatnonzero(word), visible_Q[word]] = corruption.kept
    return np.where(word, corruption.random / corruption.vocab_size, 1.0)[:, None], kept_QW


def _split_posterior(
    language: Language, visible_BT: np.ndarray, length_B: np.ndarray, modified_BT: np.ndarray, corruption: Corruption
) -> tuple[np.ndarray, np.ndarray]:
    """P(word, replaced by what is visible | row) and P(word, kept | row), both [Q, W]."""
    W = len(language.words)
    if visible_BT.shape != modified_BT.shape or length_B.shape != visible_BT.shape[:1]:
        raise ValueError(f"shapes: {visible_BT.shape} visible, {modified_BT.shape} modified, {length_B.shape} lengths")
    if visible_BT.max(initial=PAD) >= W or (length_B > visible_BT.shape[1]).any():
        raise ValueError("visible_BT holds word indices, MASK or OTHER (see `word_ids`), length_B at most T")
    if (modified_BT & (np.arange(visible_BT.shape[1]) >= length_B[:, None])).any():
        raise ValueError("modified_BT is true behind the end of a row")
    if corruption.vocab_size < W:
        raise ValueError(f"vocab_size={corruption.vocab_size}: the language alone has {W} words")
    seen = 1 - corruption.rate + corruption.rate * corruption.kept
    noise = corruption.rate * corruption.random / corruption.vocab_size / seen if seen else 1.0
    parts = []
    for first in range(0, len(visible_BT), 64):  # bounds the memory
        rows = slice(first, first + 64)
        b_Q, t_Q = np.nonzero(modified_BT[rows])
        parts.append(_context(language, visible_BT[rows], length_B[rows], b_Q, t_Q, noise))
    context_QW = np.concatenate(parts)
    replaced_Q1, kept_QW = _evidence(visible_BT[modified_BT], W, corruption)
    replaced_QW, kept_QW = context_QW * replaced_Q1, context_QW * kept_QW
    total_Q1 = replaced_QW.sum(1, keepdims=True) + kept_QW.sum(1, keepdims=True)
    return replaced_QW / total_Q1, kept_QW / total_Q1


def posterior(
    language: Language, visible_BT: np.ndarray, length_B: np.ndarray, modified_BT: np.ndarray, corruption: Corruption
) -> np.ndarray:
    """The exact posterior of the original word at every modified position, given the row a model sees: float64 [Q, W].

    `visible_BT` holds the corrupted first tokens of documents, without [CLS] and [SEP], as word indices, MASK or OTHER
    (`word_ids` translates from a tokenizer); `length_B` the tokens of a row: T where the document fills or overflows
    the row, less where it ends. The Q positions come in the order of `np.nonzero(modified_BT)`. The predictor knows
    that it is asked (the position is modified), not whether a visible word there is the original one or a random one,
    and of all other visible words not even whether they are modified.

    Raises `ValueError` for shapes or values that do not fit, and for a row that this language cannot produce.
    """
    replaced_QW, kept_QW = _split_posterior(language, visible_BT, length_B, modified_BT, corruption)
    return replaced_QW + kept_QW


class BayesApt(NamedTuple):
    """Accuracy per token of the two best predictors, as expectations under the exact posterior.

    The hits of an answer are its posterior probability, not a count against the words drawn, so the numbers carry the
    randomness of the rows only. `*_se` are standard errors over rows (delta method). The macro means are over the words
    with any expected occurrence. Mode axis C as in `bert6_jax.masking`: mask, random, kept.
    """

    totals_CW: np.ndarray  # expected modified occurrences n_i
    hits_CW: np.ndarray  # expected hits h_i of the MAP predictor: the most probable word
    best_hits_CW: np.ndarray  # of the predictor with the largest <APT>: argmax of posterior / n_i
    confusion_WW: np.ndarray  # expected confusion of the MAP predictor: original i answered as j
    micro: float  # accuracy of the MAP predictor, the most there can be
    micro_se: float
    macro: float  # <APT> of the MAP predictor
    macro_se: float
    best: float  # the largest <APT> of any predictor
    best_se: float


def bayes_apt_of(
    language: Language, visible_BT: np.ndarray, length_B: np.ndarray, modified_BT: np.ndarray, corruption: Corruption
) -> BayesApt:
    """The Bayes limit on given rows (as for `posterior`): the bound for a model evaluated on the very same rows."""
    replaced_QW, kept_QW = _split_posterior(language, visible_BT, length_B, modified_BT, corruption)
    post_QW = replaced_QW + kept_QW
    Q, W = post_QW.shape
    if not Q:
        raise ValueError("no position is modified: nothing to predict")
    b_Q, masked_Q1 = np.nonzero(modified_BT)[0], (visible_BT[modified_BT] == MASK)[:, None]
    modes_CQW = np.stack([replaced_QW * masked_Q1, replaced_QW * ~masked_Q1, kept_QW])
    totals_CW = modes_CQW.sum(1)
    n_W = totals_CW.sum(0)
    use_W = n_W > 0
    per_n_W = np.divide(1.0, n_W, out=np.zeros(W), where=use_W)

    def over_rows(pull_Q: np.ndarray) -> float:
        """Standard error over rows of a sum of `pull_Q`, the influence of each position on the estimate."""
        return float(np.sqrt((np.bincount(b_Q, pull_Q, len(visible_BT)) ** 2).sum()))

    def macro_of(answer_Q: np.ndarray) -> tuple[np.ndarray, float, float]:
        chosen_CQ = modes_CQW[:, np.arange(Q), answer_Q]
        hits_CW = np.stack([np.bincount(answer_Q, chosen_Q, W) for chosen_Q in chosen_CQ])
        apt_W = hits_CW.sum(0) * per_n_W
        pull_Q = chosen_CQ.sum(0) * per_n_W[answer_Q] - post_QW @ (apt_W * per_n_W)
        return hits_CW, float(apt_W[use_W].mean()), over_rows(pull_Q / use_W.sum())

    answer_Q = post_QW.argmax(1)
    hits_CW, macro, macro_se = macro_of(answer_Q)
    best_hits_CW, best, best_se = macro_of((post_QW * per_n_W).argmax(1))
    confusion_WW = np.zeros((W, W))
    np.add.at(confusion_WW.T, answer_Q, post_QW)
    right_Q = post_QW.max(1)
    micro = float(right_Q.mean())
    micro_se = over_rows((right_Q - micro) / Q)
    return BayesApt(totals_CW, hits_CW, best_hits_CW, confusion_WW, micro, micro_se, macro, macro_se, best, best_se)


def bayes_apt(
    language: Language, corruption: Corruption, rows: int = 512, row_tokens: int = 62, seed: int = 0
) -> BayesApt:
    """The Bayes limit on `rows` fresh documents, of which a model sees the first `row_tokens` tokens."""
    documents = sample(language, rows, seed)
    ids_BT = documents.ids_BT[:, :row_tokens]
    ids_BT = np.pad(ids_BT, ((0, 0), (0, row_tokens - ids_BT.shape[1])), constant_values=PAD)
    visible_BT, modified_BT = corrupt(language, ids_BT, corruption, seed)
    return bayes_apt_of(language, visible_BT, np.minimum(documents.length_B, row_tokens), modified_BT, corruption)
