"""Facts as tokens, with exact control of everything that the theory of arXiv 2508.00901 speaks of.

The paper publishes no generator; this one is our reconstruction, and what it makes is ours. N subjects have one answer
for each of M attributes. Attribute m owns R templates; a fact (s, m) is only ever stated with its own K of them,
T(s, m), drawn without replacement. A statement is [n, s, n', r, a]: noise, subject, noise, template, answer; a question
is [n, s, n', p_m, a] with the attribute's format token in the place of the template.

Everything is a pure function of a key. A `World` is arrays only; the sizes R, K, A, the sharing of answers and the
exposure are data (`Sizes`), within what a configuration has room for, so that worlds of all of them stack into a bank
by `vmap`, and one with room to spare equals, token by token, the one without. Letters: N subjects, M attributes, R room
for templates of an attribute, K room for templates of a fact, V tokens, X draws of noise.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import gammaln

from bert6_jax.errors import InputError

LENGTH = 5  # n, s, n', r or p_m, a
CHOICES = ("random", "stratified", "known", "unknown")


@dataclass(frozen=True)
class FactsConfig:
    """Sizes of a world; the letters of the study in brackets. The defaults are those of its main trend (ours)."""

    subjects: int = 256  # [N]
    attributes: int = 1  # [M]
    templates: int = 32  # [R] of an attribute
    multiplicity: int = 4  # [K] templates that a fact is stated with
    answers: int = 8  # [A] of each attribute, or of the one pool
    shared: bool = False  # one pool of answers for all attributes
    noise: int = 8  # [Z] noise tokens
    zipf: float = 0.0  # subjects are stated in proportion to rank^-zipf; 0: all alike

    def __post_init__(self):
        for field in ("subjects", "attributes", "templates", "multiplicity", "answers", "noise"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{field} is {value!r}; it must be a whole number from 1 on")
        if self.multiplicity > self.templates:
            raise InputError(
                f"multiplicity K = {self.multiplicity} is larger than the number of templates R = {self.templates}; "
                "a fact has K different ones: lower K or raise R"
            )
        if not (self.zipf >= 0.0 and math.isfinite(self.zipf)):
            raise InputError(f"zipf is {self.zipf!r}; the exponent of the exposure is a number from 0 on")

    @property
    def tokens(self) -> Tokens:
        form, subject = self.noise, self.noise + self.attributes
        answer = subject + self.subjects
        template = answer + self.attributes * self.answers
        return Tokens(0, form, subject, answer, template, template + self.attributes * self.templates)

    @property
    def sizes(self) -> Sizes:
        return Sizes(
            jnp.int32(self.templates), jnp.int32(self.multiplicity), jnp.int32(self.answers), jnp.asarray(self.shared),
            jnp.float32(self.zipf),
        )  # fmt: skip


class Tokens(NamedTuple):
    """Where the ids of each kind begin; answers and templates of one attribute after those of the one before."""

    noise: int
    form: int  # p_0, p_1, ...
    subject: int
    answer: int
    template: int
    vocab_size: int  # V


class Sizes(NamedTuple):
    """What is data in a world, scalars; fields as in `FactsConfig`."""

    templates: jax.Array
    multiplicity: jax.Array
    answers: jax.Array
    shared: jax.Array
    zipf: jax.Array


class World(NamedTuple):
    """The facts of one world, as token ids."""

    template_NMK: jax.Array  # int32, T(s, m)
    answer_NM: jax.Array  # int32, ans(s, m)
    multiplicity: jax.Array  # int32, entries of `template_NMK` beyond so many repeat the first
    exposure_N: jax.Array  # float32, share of the statements that are about a subject
    used_V: jax.Array  # bool, ids that this world has; the rest is room


def make_world(key: jax.Array, cfg: FactsConfig, sizes: Sizes | None = None) -> World:
    """Draw T(s, m), the answers (uniform, independent) and who is stated how often. Jits with `cfg` static.

    `sizes` (default: those of `cfg`) are what the world has, `cfg` what there is room for. For one key T(s, m) of a
    smaller K lies in that of a larger one.
    """
    tokens, N, M = cfg.tokens, cfg.subjects, cfg.attributes
    R, K, A, shared, zipf = cfg.sizes if sizes is None else sizes
    keys = jax.random.split(key, 3)

    def score(m, r):  # by template, so that room changes nobody's draw
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(keys[0], m), r), (N,))

    score_MRN = jax.vmap(lambda m: jax.vmap(lambda r: score(m, r))(jnp.arange(cfg.templates)))(jnp.arange(M))
    score_NMR = jnp.where(jnp.arange(cfg.templates)[None, None] < R, score_MRN.transpose(2, 0, 1), jnp.inf)
    order_NMK = jnp.argsort(score_NMR, axis=-1)[..., : cfg.multiplicity].astype(jnp.int32)
    order_NMK = jnp.where(jnp.arange(cfg.multiplicity)[None, None] < K, order_NMK, order_NMK[..., :1])
    first_M = jnp.arange(M, dtype=jnp.int32)
    template_NMK = tokens.template + first_M[None, :, None] * cfg.templates + order_NMK
    pool_M = jnp.where(shared, 0, first_M)
    answer_NM = tokens.answer + pool_M[None] * cfg.answers + jax.random.randint(keys[1], (N, M), 0, A, jnp.int32)
    rank_N = jax.random.permutation(keys[2], N) + 1  # who is well known says nothing about the answers
    weight_N = rank_N.astype(jnp.float32) ** -zipf
    kind = _places(cfg)
    used_V = jnp.where(kind.is_answer, (kind.index < A) & ((kind.attribute == 0) | ~shared), kind.index < R)
    used_V = used_V | ~(kind.is_answer | kind.is_template)
    return World(template_NMK, answer_NM, K, weight_N / weight_N.sum(), used_V)


class _Places(NamedTuple):
    is_answer: np.ndarray
    is_template: np.ndarray
    attribute: np.ndarray  # of answers and templates
    index: np.ndarray  # within the attribute


def _places(cfg: FactsConfig) -> _Places:
    id_V, tokens = np.arange(cfg.tokens.vocab_size), cfg.tokens
    is_template = id_V >= tokens.template
    is_answer = (id_V >= tokens.answer) & ~is_template
    within = np.where(is_template, id_V - tokens.template, id_V - tokens.answer)
    return _Places(is_answer, is_template, *np.divmod(within, np.where(is_template, cfg.templates, cfg.answers)))


class Kinds(NamedTuple):
    """Which ids are what, bool [V] each, without room; `attribute_V` says whose an answer or a template is."""

    noise_V: jax.Array
    form_V: jax.Array
    subject_V: jax.Array
    answer_V: jax.Array
    template_V: jax.Array
    attribute_V: jax.Array


def kinds(world: World, cfg: FactsConfig) -> Kinds:
    """The ids of a world by kind."""
    id_V = np.arange(cfg.tokens.vocab_size)
    of = [world.used_V & ((id_V >= low) & (id_V < high)) for low, high in itertools.pairwise(cfg.tokens)]
    return Kinds(*of, jnp.asarray(_places(cfg).attribute))


def token_names(cfg: FactsConfig) -> np.ndarray:
    """A number for every id that does not depend on the room for answers and templates: models draw a token's start by
    it, so that one with more room starts, token by token, as the one without. int32 [V]."""
    kind, id_V = _places(cfg), np.arange(cfg.tokens.vocab_size)
    diagonal_V = kind.attribute + kind.index  # pairs (attribute, index) are told apart by Cantor's numbering
    pair_V = diagonal_V * (diagonal_V + 1) // 2 + kind.index
    paired = kind.is_answer | kind.is_template
    return np.where(paired, cfg.tokens.answer + 2 * pair_V + kind.is_template, id_V).astype(np.int32)


# --- rows ------------------------------------------------------------------------------------------------------------


def _noise(key, cfg: FactsConfig, *shape: int) -> jax.Array:
    return jax.random.randint(key, shape, cfg.tokens.noise, cfg.tokens.noise + cfg.noise, jnp.int32)


def _rows(noise_X2, subject_X, asked_X, answer_X) -> jax.Array:
    shape = jnp.broadcast_shapes(noise_X2.shape[:-1], subject_X.shape, asked_X.shape, answer_X.shape)
    parts = (noise_X2[..., 0], subject_X, noise_X2[..., 1], asked_X, answer_X)
    return jnp.stack([jnp.broadcast_to(part, shape) for part in parts], axis=-1).astype(jnp.int32)


def _draw(key, cfg: FactsConfig, weight_N, rows: int):
    keys = jax.random.split(key, 3)
    up_to_N = jnp.cumsum(weight_N)
    point_B = jax.random.uniform(keys[0], (rows,)) * up_to_N[-1]
    # by comparison: a binary search compiles longer than it runs; the last with a weight takes what rounding leaves
    last = (up_to_N < up_to_N[-1]).sum(dtype=jnp.int32)
    s_B = jnp.minimum((up_to_N[None] <= point_B[:, None]).sum(1, dtype=jnp.int32), last)
    m_B = jax.random.randint(keys[1], (rows,), 0, cfg.attributes, jnp.int32)
    return s_B, m_B, _noise(keys[2], cfg, rows, 2)


def sample_statements(key: jax.Array, world: World, cfg: FactsConfig, rows: int) -> jax.Array:
    """Pre-training rows [n, s, n', r, a], int32 [B, 5]: s by exposure, m, r in T(s, m) and noise uniform."""
    keys = jax.random.split(key)
    s_B, m_B, noise_B2 = _draw(keys[0], cfg, world.exposure_N, rows)
    k_B = jax.random.randint(keys[1], (rows,), 0, world.multiplicity, jnp.int32)
    return _rows(noise_B2, cfg.tokens.subject + s_B, world.template_NMK[s_B, m_B, k_B], world.answer_NM[s_B, m_B])


def sample_questions(key: jax.Array, world: World, cfg: FactsConfig, weight_N: jax.Array, rows: int) -> jax.Array:
    """Fine-tuning rows [n, s, n', p_m, a], int32 [B, 5]: s in proportion to `weight_N` (a mask will do), m uniform."""
    s_B, m_B, noise_B2 = _draw(key, cfg, weight_N.astype(jnp.float32), rows)
    return _rows(noise_B2, cfg.tokens.subject + s_B, cfg.tokens.form + m_B, world.answer_NM[s_B, m_B])


def all_statements(key: jax.Array, world: World, cfg: FactsConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Every subject with every template, stated or not, one draw of noise each.

    Returns:
      ids int32 [N, M, R, 5]; own bool [N, M, R], the template is one of T(s, m); unseen bool [N, M, R], it is another
      one of the attribute's. Room is neither.
    """
    tokens, N, M, R = cfg.tokens, cfg.subjects, cfg.attributes, cfg.templates
    template_MR = tokens.template + jnp.arange(M * R, dtype=jnp.int32).reshape(M, R)

    def noise(m, r):  # by template, so that room changes nobody's draw
        return _noise(jax.random.fold_in(jax.random.fold_in(key, m), r), cfg, N, 2)

    noise_MRN2 = jax.vmap(lambda m: jax.vmap(lambda r: noise(m, r))(jnp.arange(R)))(jnp.arange(M))
    s_N = tokens.subject + jnp.arange(N, dtype=jnp.int32)
    ids = _rows(noise_MRN2.transpose(2, 0, 1, 3), s_N[:, None, None], template_MR[None], world.answer_NM[:, :, None])
    own_NMR = (world.template_NMK[..., None] == template_MR[None, :, None]).any(2)
    return ids, own_NMR, ~own_NMR & world.used_V[template_MR][None]


def all_questions(key: jax.Array, world: World, cfg: FactsConfig, draws: int = 4) -> jax.Array:
    """Every question with `draws` draws of noise, int32 [N, M, X, 5]."""
    tokens, N, M = cfg.tokens, cfg.subjects, cfg.attributes
    s_N = tokens.subject + jnp.arange(N, dtype=jnp.int32)
    form_M = tokens.form + jnp.arange(M, dtype=jnp.int32)
    noise = _noise(key, cfg, N, M, draws, 2)
    return _rows(noise, s_N[:, None, None], form_M[None, :, None], world.answer_NM[..., None])


# --- who is fine-tuned on, and what that covers ----------------------------------------------------------------------


def choose_subjects(key: jax.Array, world: World, count, how: str = "random") -> jax.Array:
    """The subjects of the fine-tuning set, bool [N]; `count` may be traced, and smaller sets lie in larger ones.

    `how`: `random`; `stratified` (as even over the answers of attribute 0 as can be, random within an answer); `known`
    and `unknown`, the most and the least exposed (arXiv 2406.14785 fine-tunes on these).
    """
    N = world.answer_NM.shape[0]
    score_N = jax.random.uniform(key, (N,))
    if how == "stratified":
        same_NN = world.answer_NM[:, :1] == world.answer_NM[:, 0][None]
        before_N = (same_NN & (score_N[None] < score_N[:, None])).sum(1)  # of the same answer, drawn earlier
        score_N = before_N.astype(jnp.float32) + score_N
    elif how in ("known", "unknown"):
        score_N = world.exposure_N * (-1.0 if how == "known" else 1.0)
    elif how != "random":
        raise InputError(f"subjects are chosen {how!r}; choose one of {', '.join(CHOICES)}")
    return jnp.zeros(N, bool).at[jnp.argsort(score_N)].set(jnp.arange(N) < count)


class Covered(NamedTuple):
    """What a fine-tuning set covers."""

    coverage: jax.Array  # |C| / (M R), C the templates of its facts
    reach: jax.Array  # share of the other facts with a template in C; NaN if there are none
    reached_NM: jax.Array  # bool: a template of the fact lies in C
    answer_seen_NM: jax.Array  # bool: the fact's answer is one that the set asks for


def covered(world: World, tuned_N: jax.Array, cfg: FactsConfig) -> Covered:
    """Coverage of the templates and of the answers by the facts of the subjects `tuned_N` (bool [N])."""
    zero_V = jnp.zeros(cfg.tokens.vocab_size, bool)
    tuned = jnp.broadcast_to(tuned_N[:, None], world.answer_NM.shape)
    in_set_V = zero_V.at[world.template_NMK].max(jnp.broadcast_to(tuned[..., None], world.template_NMK.shape))
    asked_V = zero_V.at[world.answer_NM].max(tuned)
    templates = (world.used_V & (np.arange(cfg.tokens.vocab_size) >= cfg.tokens.template)).sum()
    reached_NM = in_set_V[world.template_NMK].any(-1)
    held = (~tuned).sum().astype(jnp.float32)
    reach = (reached_NM & ~tuned).sum(dtype=jnp.float32) / jnp.where(held > 0, held, jnp.float32(jnp.nan))
    return Covered(in_set_V.sum() / templates, reach, reached_NM, asked_V[world.answer_NM])


# --- what theory says ------------------------------------------------------------------------------------------------


def loss_floor(cfg: FactsConfig) -> float:
    """Least pre-training loss in nats: H(m) + E[H(r | s, m)] = ln(M K) for the template, nothing for the answer."""
    return math.log(cfg.attributes * cfg.multiplicity)


def expected_coverage(templates: int, multiplicity: int, facts) -> np.ndarray:
    """E[coverage] of one attribute by so many facts: 1 - (1 - K / R)^N_f."""
    return 1.0 - (1.0 - multiplicity / templates) ** np.asarray(facts, np.float64)


def reach_probability(templates: int, multiplicity: int, covered_templates) -> np.ndarray:
    """P(a new fact has a template among c covered ones) = 1 - C(R - c, K) / C(R, K)."""
    c = np.asarray(covered_templates, np.float64)
    left = templates - c

    def log_choose(n):
        n = np.maximum(n, multiplicity)
        return gammaln(n + 1.0) - gammaln(multiplicity + 1.0) - gammaln(n - multiplicity + 1.0)

    return 1.0 - np.where(left < multiplicity, 0.0, np.exp(log_choose(left) - log_choose(float(templates))))


def error_bound(templates, multiplicity, facts) -> np.ndarray:
    """Upper bound of the error after fine-tuning, exp(-N_f K^2 ln R / (2 R^2)).

    From second-hand summaries of the paper; N_f as the effective number of fine-tuning facts is our reading. At R = 1
    it says 1 for every N_f, where there is nothing left to cover.
    """
    R, K, n = (np.asarray(x, np.float64) for x in (templates, multiplicity, facts))
    return np.exp(-n * K**2 * np.log(R) / (2.0 * R**2))
