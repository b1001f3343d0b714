"""What kind of feature a latent is, from counts over text: no language model judges (the detectors are ours).

arXiv 2509.17196 follows previous-token, induction and context-sensitive features through training and grades the
complexity of features with a language-model judge; neither its detectors nor its judge are public. Here everything
follows from how often a latent is active (its code is not zero) in which context:

    counts = start(latents, token_buckets, ngram_buckets)
    counts = update(counts, z_BTF, ids_BT, segment_BT, valid_BT, half_B)        any batching
    types(counts)["kind_F"]

Contexts of position t are, in this order (`CONTEXTS`): the token x_t, the previous token, the bigram (x_{t-1}, x_t),
the trigram (x_{t-2}, x_{t-1}, x_t). They never reach across the border of a segment: what lies before it is one more
token, "none". Tokens fall into bucket (id + 1) mod `token_buckets` (exact where there are more buckets than tokens),
n-grams into one of `ngram_buckets` by a hash. Contexts that share a bucket cannot be told apart, so that too few
buckets make latents look less local than they are: take about as many as there are frequent n-grams.

Memory: 16 F (token_buckets + ngram_buckets) bytes, 0.8 GB for 512 latents, every one of 30,522 tokens and 65,536
n-grams. Large dictionaries are counted some latents at a time: give `z_BTF[:, :, chosen]`.

Letters beside those of the package: T positions of a row of text, B rows of text, K buckets, C contexts, R forms of
repetition, X latents of a block, U different sizes of buckets, N positions, or cells of a table that are not zero. A
leading 2 is the two halves of the text, between which tables are fitted and scored; 3 are the levels of `types`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import entr, gammaln, xlogy

from bert6_jax.errors import InputError
from sae_jax.evaluate import ratio

Array = jax.Array | np.ndarray

CONTEXTS = ("token", "previous", "bigram", "trigram")
REPEATS = ("bigram", "token")
KINDS = ("dead", "rare", "token", "previous token", "n-gram", "induction", "context-sensitive", "other")
PSEUDO_COUNTS = (0.1, 1.0, 10.0, 100.0)  # weights of the prior in a bucket's rate; a latent takes its best (ours)
BLOCK = 256  # latents whose tables the host looks at together


@dataclass(frozen=True)
class Rules:
    """Thresholds of `types`, all ours. Shares are of the entropy of a latent's activity."""

    min_active: int = 16  # fewer active positions that can be scored: "rare", not judged
    high: float = 0.7  # least share that a context explains of a latent that belongs to it
    low_token: float = 0.5  # most that the current token may explain of a previous-token latent
    low: float = 0.3  # most that the trigram may explain of a context-sensitive latent
    induction: float = 0.5  # least excess of repeated bigrams where the latent is active
    few_types: float = 2.0  # most effective tokens of a latent of grade 1

    def __post_init__(self):
        if not isinstance(self.min_active, int) or self.min_active < 1:
            raise InputError(f"rule min_active is {self.min_active!r}; it must be a positive integer")
        for field in fields(self)[1:-1]:
            if not 0.0 <= getattr(self, field.name) <= 1.0:
                raise InputError(f"rule {field.name} is {getattr(self, field.name)!r}; it must lie in [0, 1]")
        if self.low >= self.high:
            raise InputError(f"rule low = {self.low} is not below high = {self.high}; lower it")
        if not self.few_types >= 1.0:
            raise InputError(f"rule few_types is {self.few_types!r}; it must be at least 1")


# --- counts over text ------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """Counts of one context, int32, of either half of the text."""

    total_2K: Array  # positions
    active_2KF: Array  # positions at which the latent is active


class Counts(NamedTuple):
    """Counts of positions, int32, grown by `update`; those of several devices merge by adding the leaves."""

    tokens_2: Array
    active_2F: Array
    tables: tuple[Table, ...]  # of CONTEXTS
    repeats_R: Array  # positions that repeat, in the forms REPEATS
    active_repeats_RF: Array
    earlier_F: Array  # positions before which, in the same segment, the latent was active
    active_earlier_F: Array  # and is active again
    broken: Array  # codes that are not finite, for `types` to refuse


def start(latents: int, token_buckets: int, ngram_buckets: int) -> Counts:
    """Nothing seen yet."""
    sizes = {"latents": latents, "token_buckets": token_buckets, "ngram_buckets": ngram_buckets}
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer) or size < 1:
            raise InputError(f"{name} of the counts is {size!r}; it must be a positive integer")

    def zeros(*shape):  # an array each: the leaves are donated and must not share memory
        return jnp.zeros(shape, jnp.int32)

    buckets = (token_buckets, token_buckets, ngram_buckets, ngram_buckets)
    return Counts(
        zeros(2),
        zeros(2, latents),
        tuple(Table(zeros(2, K), zeros(2, K, latents)) for K in buckets),
        *(zeros(len(REPEATS)), zeros(len(REPEATS), latents)),
        *(zeros(latents), zeros(latents), zeros()),
    )


def _mix(hash_BT: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: a bijection of uint32 in which every input bit moves half of the output's."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hash_BT = (hash_BT ^ (hash_BT >> np.uint32(shift))) * np.uint32(factor)
    return hash_BT ^ (hash_BT >> np.uint32(16))


def _begins(segment_BT: jax.Array) -> jax.Array:
    """Where a segment begins, bool."""
    return jnp.concatenate([jnp.ones_like(segment_BT[:, :1], bool), segment_BT[:, 1:] != segment_BT[:, :-1]], axis=1)


def _preceding(ids_BT: jax.Array, begins_BT: jax.Array) -> list[jax.Array]:
    """x_t, x_{t-1}, x_{t-2} as uint32 numbers from 1; 0 is "none", before the segment."""
    found = [ids_BT.astype(jnp.uint32) + np.uint32(1)]
    for _ in range(2):
        found.append(jnp.where(begins_BT, np.uint32(0), jnp.roll(found[-1], 1, axis=1)))
    return found


def buckets(ids_BT: jax.Array, segment_BT: jax.Array, token_buckets: int, ngram_buckets: int) -> tuple[jax.Array, ...]:
    """The bucket of every position's four contexts (`CONTEXTS`), int32 `[B, T]` each."""
    now, before, first = _preceding(ids_BT, _begins(segment_BT))
    bigram = _mix(_mix(now) + before)
    trigram = _mix(bigram + first)
    found = (now, token_buckets), (before, token_buckets), (bigram, ngram_buckets), (trigram, ngram_buckets)
    return tuple((number % np.uint32(K)).astype(jnp.int32) for number, K in found)


def repeated(ids_BT: jax.Array, segment_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which positions repeat something of their own segment, bool `[B, T]` each, in the forms `REPEATS`:

    the bigram (x_{t-1}, x_t) stood there before: what induction could have predicted at t - 1 has come true;
    and the token x_t stood there before: induction can predict x_{t+1}. The first is what `types` calls induction.
    """
    begins_BT = _begins(segment_BT)
    now, before, _ = _preceding(ids_BT, begins_BT)
    run_BT = jnp.cumsum(begins_BT, axis=1)
    T = ids_BT.shape[1]

    def same(x_BT):
        return x_BT[:, :, None] == x_BT[:, None, :]

    token_BTT = same(run_BT) & same(now) & jnp.tril(jnp.ones((T, T), bool), -1)[None]
    return (token_BTT & same(before)).any(-1), token_BTT.any(-1)


@functools.partial(jax.jit, donate_argnums=0)
def update(
    counts: Counts,
    z_BTF: jax.Array,
    ids_BT: jax.Array,
    segment_BT: jax.Array,
    valid_BT: jax.Array,
    half_B: jax.Array,
) -> Counts:
    """Add a batch of B rows of text; jitted, and `counts` is donated (its memory is used again).

    Positions that are padding (segment 0) or have `valid_BT` False (bool) count nowhere. Invalid tokens of a segment
    are still context to those after them. `half_B` says in which half of the text, 0 or 1, a row is; rows with another
    number count nowhere. Rows of one document belong in one half: otherwise a latent of a document is predicted from
    the document itself.

    Raises:
      InputError: shapes that do not belong together.
    """
    F = counts.active_2F.shape[1]
    if z_BTF.ndim != 3 or z_BTF.shape[2] != F:
        raise InputError(f"codes of shape {list(z_BTF.shape)} for counts of {F} latents; give [rows, tokens, {F}]")
    shape = z_BTF.shape[:2]
    for name, x, wanted in (
        *(("ids", ids_BT, shape), ("segments", segment_BT, shape), ("mask", valid_BT, shape)),
        ("halves", half_B, shape[:1]),
    ):
        if x.shape != wanted:
            raise InputError(f"{name} of shape {list(x.shape)} beside codes of {list(shape)} positions; one for each")
    valid_BT = valid_BT & (segment_BT > 0) & ((half_B == 0) | (half_B == 1))[:, None]
    active_BTF = (z_BTF != 0) & valid_BT[:, :, None]
    broken = (~jnp.isfinite(z_BTF) & valid_BT[:, :, None]).sum(dtype=jnp.int32)

    half_N = jnp.broadcast_to((half_B == 1)[:, None], shape).reshape(-1).astype(jnp.int32)
    valid_N = valid_BT.reshape(-1).astype(jnp.int32)
    active_NF = active_BTF.reshape(-1, F).astype(jnp.int32)
    sizes = counts.tables[0].total_2K.shape[1], counts.tables[2].total_2K.shape[1]
    tables = tuple(
        Table(
            table.total_2K.at[half_N, bucket_BT.reshape(-1)].add(valid_N),
            table.active_2KF.at[half_N, bucket_BT.reshape(-1)].add(active_NF),
        )
        for table, bucket_BT in zip(counts.tables, buckets(ids_BT, segment_BT, *sizes), strict=True)
    )

    repeats_RBT = jnp.stack(repeated(ids_BT, segment_BT)) & valid_BT[None]
    # A step of the scan is one position of all rows: which latents their segments have shown so far is all it carries.
    by_position = tuple(jnp.swapaxes(x, 0, 1) for x in (_begins(segment_BT), active_BTF, valid_BT))

    def step(carry, now):
        shown_BF, earlier_F, again_F = carry
        begins_B, active_BF, valid_B = now
        shown_BF = shown_BF & ~begins_B[:, None]
        earlier_F = earlier_F + (shown_BF & valid_B[:, None]).sum(0, dtype=jnp.int32)
        again_F = again_F + (shown_BF & active_BF).sum(0, dtype=jnp.int32)
        return (shown_BF | active_BF, earlier_F, again_F), None

    carry = (jnp.zeros((len(half_B), F), bool), counts.earlier_F, counts.active_earlier_F)
    (_, earlier_F, again_F), _ = jax.lax.scan(step, carry, by_position)
    return Counts(
        tokens_2=counts.tokens_2.at[half_N].add(valid_N),
        active_2F=counts.active_2F.at[half_N].add(active_NF),
        tables=tables,
        repeats_R=counts.repeats_R + repeats_RBT.sum((1, 2), dtype=jnp.int32),
        active_repeats_RF=counts.active_repeats_RF
        + jnp.stack([(active_BTF & r_BT[:, :, None]).sum((0, 1), dtype=jnp.int32) for r_BT in repeats_RBT]),
        earlier_F=earlier_F,
        active_earlier_F=again_F,
        broken=counts.broken + broken,
    )


# --- measures --------------------------------------------------------------------------------------------------------


def _phi(both, a, b, rows) -> np.ndarray:
    """Correlation of two indicators from their counts; NaN where one is constant."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return ratio(rows * both - a * b, np.sqrt(a * (rows - a) * b * (rows - b)))


def _mixture(active, total):
    """total times the entropy in nats of an activity of `active` in `total` positions."""
    return xlogy(total, total) - xlogy(active, active) - xlogy(total - active, total - active)


def chance_entropy(total_K: Array, active_F: Array) -> np.ndarray:
    """What the plug-in conditional entropy H(active | bucket), times the number of positions, would be in nats if the
    active positions were drawn at random, `[F]` float64.

    The expectation over all permutations of the activity, exact under the hypergeometric distribution (Vinh, Epps and
    Bailey 2010); with more than 64 different rates, interpolated between 64 of them.
    """
    total_K = np.asarray(total_K, np.int64)
    size_U, times_U = np.unique(total_K[total_K > 0], return_counts=True)
    rows = int(total_K.sum())
    rare_F = np.minimum(active_F, rows - np.asarray(active_F))  # an indicator and its opposite have the same entropy
    grid = np.unique(rare_F)
    grid = grid[grid > 0]
    if not grid.size or size_U[-1] == 1:  # nothing varies, or not within a bucket
        return np.zeros(len(rare_F))
    if grid.size > 64:
        grid = np.unique(np.rint(np.geomspace(grid[0], grid[-1], 64)).astype(np.int64))

    def choices(n, j):
        return gammaln(n + 1) - gammaln(j + 1) - gammaln(n - j + 1)

    def expected(n: int) -> float:
        mean_U = n * size_U / rows
        reach_U = 10 * np.sqrt(mean_U) + 20  # beyond it there is less than the rounding
        low_U = np.maximum(np.floor(mean_U - reach_U), np.maximum(0, n + size_U - rows)).astype(np.int64)
        high_U = np.minimum(np.ceil(mean_U + reach_U), np.minimum(n, size_U)).astype(np.int64)
        count_U = high_U - low_U + 1
        which = np.repeat(np.arange(len(size_U)), count_U)
        j = np.arange(count_U.sum()) - np.repeat(np.cumsum(count_U) - count_U, count_U) + low_U[which]
        size = size_U[which]
        p = np.exp(choices(size, j) + choices(rows - size, n - j) - choices(rows, n))
        return float((times_U[which] * p * _mixture(j, size)).sum())

    log_grid, log_expected = np.log(grid), np.log([expected(int(n)) for n in grid])
    return np.where(rare_F > 0, np.exp(np.interp(np.log(np.maximum(rare_F, 1)), log_grid, log_expected)), 0.0)


def _nats(total_2K, cells, rate_2F, pseudo):
    """Held-out cross-entropy `[F]`, summed over both directions, of activity given the bucket's rate in the other half.

    `cells` are the buckets and latents with any activity; all others share one formula, summed over bucket sizes.
    """
    k, f, active_2N = cells
    out_F = np.zeros(rate_2F.shape[1])
    for fit, score in ((0, 1), (1, 0)):
        seen_K = total_2K[fit] > 0
        size_U, which = np.unique(total_2K[fit, seen_K], return_inverse=True)
        scored_U = np.bincount(which, total_2K[score, seen_K], minlength=len(size_U))
        prior_F = pseudo * rate_2F[fit]
        out_F -= scored_U @ np.log1p(-prior_F[None] / (size_U[:, None] + pseudo))
        at = seen_K[k]
        size_N, scored_N, prior_N = total_2K[fit, k[at]] + pseudo, total_2K[score, k[at]], prior_F[f[at]]
        rate_N, hits_N = (active_2N[fit, at] + prior_N) / size_N, active_2N[score, at]
        nats_N = hits_N * np.log(rate_N) + (scored_N - hits_N) * np.log1p(-rate_N)
        out_F -= np.bincount(f[at], nats_N - scored_N * np.log1p(-prior_N / size_N), minlength=len(out_F))
    return out_F


def _context(table: Table, tokens_2, active_2F, min_active: int) -> dict[str, np.ndarray]:
    """`information`, `explained`, `coverage` and `types` of one context, see `types`; `[F]` each."""
    total_2K, F = np.asarray(table.total_2K, np.int64), active_2F.shape[1]
    all_K, rows, active_F = total_2K.sum(0), tokens_2.sum(), active_2F.sum(0)
    rate_2F = (active_2F + 0.5) / (tokens_2[:, None] + 1)  # never 0 or 1: held-out rows may differ
    seen_2K = total_2K > 0
    scored_2 = np.array([total_2K[1, seen_2K[0]].sum(), total_2K[0, seen_2K[1]].sum()])  # by half that was fitted
    out = {name: np.full(F, np.nan) for name in ("information", "explained", "coverage", "types")}
    chance_F = chance_entropy(all_K, active_F)
    for begin in range(0, F, BLOCK):
        block = slice(begin, min(F, begin + BLOCK))
        width, active_X, rate_2X = block.stop - begin, active_F[block], rate_2F[:, block]
        active_2KX = np.asarray(table.active_2KF[:, :, block])
        k, f = np.nonzero(active_2KX.any(0))
        active_2N = active_2KX[:, k, f].astype(np.int64)
        active_N = active_2N.sum(0)

        # What is left of the entropy is in buckets that are partly active: no other cell counts.
        left_X = np.bincount(f, _mixture(active_N, all_K[k]), minlength=width)
        varies_X = (active_X > 0) & (active_X < rows)
        out["information"][block] = np.where(varies_X, 1.0 - ratio(left_X, chance_F[block]), np.nan)
        share_N = active_N / np.maximum(active_X, 1)[f]
        out["types"][block] = np.where(active_X > 0, np.exp(np.bincount(f, entr(share_N), minlength=width)), np.nan)

        hits_2X = np.stack(
            [np.bincount(f, active_2N[1 - fit] * seen_2K[fit, k], minlength=width) for fit in (0, 1)]
        )  # active positions of the other half whose bucket this half has seen
        base_X = -(hits_2X * np.log(rate_2X) + (scored_2[:, None] - hits_2X) * np.log1p(-rate_2X)).sum(0)
        cells = k, f, active_2N
        nats_X = np.min([_nats(total_2K, cells, rate_2X, pseudo) for pseudo in PSEUDO_COUNTS], axis=0)
        share_X = np.clip(1.0 - ratio(nats_X, base_X), 0.0, 1.0)
        covered_X = hits_2X.sum(0)
        out["coverage"][block] = ratio(covered_X, active_X)
        out["explained"][block] = np.where(varies_X & (covered_X >= min_active), share_X, np.nan)
    return out


def types(counts: Counts, rules: Rules | None = None) -> dict[str, Any]:
    """What each latent is, on the host in float64 (ours throughout). NaN is "cannot be told".

    Of the contexts C (`CONTEXTS`):

        information_CF  1 - H(active | context) / E H(active | context): plug-in mutual information, corrected by its
                        expectation over permutations (`chance_entropy`), as a share of what there is to explain. 1: the
                        context decides; about 0: chance, however rare the latent (where Miller-Madow falls far short)
        explained_CF    share of the cross-entropy of activity in one half of the text that the rates of the other half
                        save, both ways round: 1 - (normalised conditional entropy), held out, so that a larger context
                        does not win by fitting noise. A lower bound, at least 0. Scored where the bucket occurs in the
                        fitted half; NaN where fewer than `min_active` active positions are
        coverage_CF     share of the active positions that were scored

    Of the forms of repetition R (`REPEATS`, see `repeated`), and of the segment:

        phi_RF          correlation of activity with "repeats"
        excess_RF       (P(repeats | active) - P(repeats)) / (1 - P(repeats)): 1 for a latent that is active nowhere
                        else, 0 for chance. Unlike phi it can reach 1 for a latent rarer than repetitions are
        persistence_F   correlation of activity with "was active earlier in this segment": 0 for noise, which no other
                        number here tells from features of whole documents

    Together:

        active_F        active positions (int64)
        types_F         effective number of tokens, exp of the entropy of their distribution where the latent is active
                        (every active position counts alike; at most the buckets)
        level_3F        what the token, up to the bigram, up to the trigram explains: the largest `explained`
                        of the contexts up to there (previous goes with bigram)
        complexity_F    1 - mean of the three levels: 0 for one known from its token, 1/3 for one known exactly
                        from the bigram and not at all from its token, 1 for one no local context tells anything about
        grade_F         in the manner of the paper's judge: 1 a single token (`few_types`), 2 several tokens, 3 a
                        bigram or trigram (or the previous token), 4 partly explained by them, 5 not; 0 not judged
        kind_F          index into `KINDS`, the first that holds of
                        dead              never active
                        rare              not judged: a context cannot be scored, and the others do not reach `high`
                        token             level 1 >= high
                        previous token    explained by it >= high, level 1 <= low_token
                        n-gram            level 3 >= high
                        induction         excess of the bigram form >= induction
                        context-sensitive level 3 <= low
                        other             partly explained; or active everywhere, which nothing can explain

    The complexity measures locality, not meaning. A topic spread over many tokens is as simple as one token if the
    token decides (`types_F` tells them apart); noise is as complex as anything (`persistence_F`); text to the right is
    never looked at; and contexts are scored where they recur, on fewer positions the longer they are (`coverage_CF`).

    Raises:
      InputError: a half of the text without a position, or codes that were not finite.
    """
    rules = rules or Rules()
    # The tables may be large: they are fetched one at a time.
    tables, small = counts.tables, jax.device_get(counts._replace(tables=()))
    if small.broken:
        raise InputError(f"{small.broken} codes are not finite; check the activations and the dictionary")
    tokens_2, active_2F = small.tokens_2.astype(np.int64), small.active_2F.astype(np.int64)
    for half, tokens in enumerate(tokens_2):
        if tokens < 1:
            raise InputError(f"half {half} of the text has no valid position; give rows of both halves, 0 and 1")
    rows, active_F = tokens_2.sum(), active_2F.sum(0)

    found = [_context(jax.device_get(table), tokens_2, active_2F, rules.min_active) for table in tables]
    explained_CF = np.stack([each["explained"] for each in found])
    token_F, previous_F, bigram_F, trigram_F = explained_CF
    level_3F = np.fmax.accumulate(np.stack([token_F, np.fmax(previous_F, bigram_F), trigram_F]))
    types_F = found[0]["types"]

    repeats_R, both_RF = small.repeats_R.astype(np.int64), small.active_repeats_RF.astype(np.int64)
    repeats_R1 = (repeats_R / rows)[:, None]
    excess_RF = ratio(ratio(both_RF, active_F[None]) - repeats_R1, 1.0 - repeats_R1)

    # A context that could not be scored may be the one that explains the latent.
    judged_F = ~np.isnan(explained_CF).any(0) | (level_3F[2] >= rules.high)
    judged_F &= ~np.isnan(token_F)
    one_F, _, three_F = level_3F
    grade_F = np.select(
        [~judged_F, (one_F >= rules.high) & (types_F <= rules.few_types), one_F >= rules.high]
        + [three_F >= rules.high, three_F > rules.low],
        [0, 1, 2, 3, 4],
        5,
    )
    kinds = {
        "dead": active_F == 0,
        "rare": ~judged_F & (active_F < rows),
        "token": one_F >= rules.high,
        "previous token": (previous_F >= rules.high) & (one_F <= rules.low_token),
        "n-gram": three_F >= rules.high,
        "induction": excess_RF[0] >= rules.induction,
        "context-sensitive": three_F <= rules.low,
        "other": np.ones_like(judged_F),
    }
    return {
        "information_CF": np.stack([each["information"] for each in found]),
        "explained_CF": explained_CF,
        "coverage_CF": np.stack([each["coverage"] for each in found]),
        "phi_RF": _phi(both_RF, active_F[None], repeats_R[:, None], float(rows)),
        "excess_RF": excess_RF,
        "persistence_F": _phi(
            small.active_earlier_F.astype(np.int64), active_F, small.earlier_F.astype(np.int64), float(rows)
        ),
        "active_F": active_F,
        "types_F": types_F,
        "level_3F": level_3F,
        "complexity_F": np.where(judged_F, 1.0 - level_3F.mean(0), np.nan),
        "grade_F": grade_F,
        "kind_F": np.argmax(np.stack([kinds[kind] for kind in KINDS]), axis=0),
    }
