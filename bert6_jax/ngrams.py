"""Unigram and bigram statistics of a tokenised text, and how far language models are from them.

Evidence for two phases of pre-training (arXiv 2509.17196): the model's distribution first comes close to the text's
n-grams, then leaves them behind; its loss first falls to the unigram entropy, then below the bigram's. The paper does
not publish estimators, smoothing or directions, so what follows is (ours) but for the quantities themselves.

    counts = add(counts, count(ids_NT, segment_NT, V))       training text, any batching
    ngrams = fit(counts)                                     smoothed distributions, on the device
    entropies(counts), cross_entropies(ngrams, held_out)     floors for the loss, nats
    sums = divergence_sums(params_X, batch, ngrams, cfg)     snapshots of one run; add over batches in float64
    divergences(sums)["kl_model_bigram"]                     [X]

An event is a token whose left neighbour stands in the same row and segment: what both a bigram and a causal model
predict. The unigram is the distribution of those tokens, so all numbers here are about the same events, and unigram
less bigram entropy is the mutual information of neighbours. Excluded ids take part in nothing: no event has one on
either side, the n-grams give them probability zero and a model's distribution is conditioned on the others.

Letters beside those of the package: N rows of a set of text, X models, Y positions in any shape, U distinct previous
ids, E entries of the sparse bigram table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from bert6_jax import transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError
from bert6_jax.masking import MaskingConfig
from bert6_jax.metrics import count_confusion
from bert6_jax.objectives import Batch, Sums, forward_inputs, gather_slots, masked_batch

Array = jax.Array | np.ndarray


# --- counts ----------------------------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """Events of a text, on the host; added by `add`."""

    unigram_V: np.ndarray  # int64, events by their token: the column sums of the bigrams
    bigram_VV: sparse.csr_array  # int64, events by left neighbour and token
    allowed_V: np.ndarray  # bool, False for excluded ids


def count(ids_NT: Array, segment_NT: Array, vocab_size: int, exclude: Sequence[int] = ()) -> Counts:
    """Count the events of rows `[N, T]`; segment 0 is padding, bigrams never cross segments or rows.

    `exclude`: ids that take part in nothing, such as [CLS] and [SEP] of windows that end anywhere.

    Raises:
      InputError: rows and segments that do not fit together, ids outside the vocabulary.
    """
    ids_NT, segment_NT = np.asarray(ids_NT), np.asarray(segment_NT)
    if ids_NT.ndim != 2 or ids_NT.shape != segment_NT.shape or ids_NT.dtype.kind not in "iu":
        raise InputError(
            f"ids {ids_NT.dtype} {list(ids_NT.shape)} and segments {list(segment_NT.shape)}; "
            "give two integer arrays [rows, tokens]"
        )
    if not all(0 <= token < vocab_size for token in exclude):
        raise InputError(f"excluded ids {list(exclude)} must lie in 0..{vocab_size - 1}")
    used_NT = segment_NT > 0
    if used_NT.any() and not 0 <= ids_NT[used_NT].min() <= ids_NT[used_NT].max() < vocab_size:
        raise InputError(
            f"ids reach from {ids_NT[used_NT].min()} to {ids_NT[used_NT].max()}, outside 0..{vocab_size - 1}; "
            "give the vocabulary size of their tokenizer"
        )
    allowed_V = np.ones(vocab_size, bool)
    allowed_V[list(exclude)] = False
    used_NT &= allowed_V[np.where(used_NT, ids_NT, 0)]
    event_NT = used_NT[:, 1:] & used_NT[:, :-1] & (segment_NT[:, 1:] == segment_NT[:, :-1])
    pairs = count_confusion(ids_NT[:, :-1], ids_NT[:, 1:], event_NT, vocab_size)  # sorted by row, then column
    begin_V1 = np.searchsorted(pairs.row_E, np.arange(vocab_size + 1))
    bigram_VV = sparse.csr_array(
        (pairs.count_E.astype(np.int64), pairs.col_E, begin_V1), shape=(vocab_size, vocab_size)
    )
    unigram_V = np.bincount(ids_NT[:, 1:][event_NT], minlength=vocab_size).astype(np.int64)
    return Counts(unigram_V, bigram_VV, allowed_V)


def add(a: Counts, b: Counts) -> Counts:
    """The counts of two texts together."""
    _check_same(a.allowed_V, b.allowed_V, "counts")
    return Counts(a.unigram_V + b.unigram_V, (a.bigram_VV + b.bigram_VV).tocsr(), a.allowed_V)


def _check_same(a_V: Array, b_V: Array, what: str) -> None:
    if not np.array_equal(a_V, b_V):
        raise InputError(
            f"{what} of {len(a_V)} and {len(b_V)} ids, {int(np.sum(~np.asarray(a_V)))} and "
            f"{int(np.sum(~np.asarray(b_V)))} of them excluded, do not go together; count both with the same "
            "vocabulary and the same `exclude`"
        )


def _total(counts: Counts) -> int:
    total = int(counts.unigram_V.sum())
    if total == 0:
        raise InputError("the counts hold no bigram; give rows with two tokens or more of one segment")
    return total


# --- smoothed distributions ------------------------------------------------------------------------------------------


class NGrams(NamedTuple):
    """Smoothed distributions q(v) and q(v | u) = back_u q(v) + what the table adds at (u, v); made by `fit`.

    Positive at every allowed id and zero elsewhere; rows sum to one to float32 precision.
    """

    unigram_V: jax.Array  # float32 q(v)
    back_V: jax.Array  # float32, weight of the unigram after u; 1 where u was never seen
    prev_E: jax.Array  # int32 u, ascending
    next_E: jax.Array  # int32 v
    extra_E: jax.Array  # float32, (1 - back_u) count(u, v) / count(u)
    allowed_V: jax.Array  # bool


def fit(counts: Counts, *, add_k: float = 1.0, interpolation: float | None = None) -> NGrams:
    """Smooth: the unigram by `add_k` events more of every allowed id, the bigram by interpolation with the unigram.

    interpolation: the unigram's weight. None is Witten-Bell: T(u) / (count(u) + T(u)) with T(u) the number of distinct
      tokens seen after u, which falls to zero where the text tells enough, so the estimate is consistent. A number in
      (0, 1] is Jelinek-Mercer with this weight after every u that was seen. After an unseen u it is 1 in both.

    Raises:
      InputError: no events, or settings out of range.
    """
    if not add_k > 0:
        raise InputError(f"add_k is {add_k!r}; it must be positive, or unseen tokens have no probability")
    if interpolation is not None and not 0 < interpolation <= 1:
        raise InputError(f"interpolation is {interpolation!r}; give a weight in (0, 1], or None for Witten-Bell")
    _total(counts)
    # 10 M word pieces of Wikipedia, V = 30,522, 1.1 M held out, bigram cross-entropy: Witten-Bell 5.938, Jelinek-Mercer
    # 5.979 at its best weight 0.2, absolute discounting 5.928 at its best; add_k from 0.01 to 1 moves it by 0.001.
    smoothed_V = np.where(counts.allowed_V, counts.unigram_V + add_k, 0.0)
    bigram_VV = counts.bigram_VV.copy()
    bigram_VV.sum_duplicates()
    bigram_VV.eliminate_zeros()
    kinds_V = np.diff(bigram_VV.indptr)
    events_V = np.asarray(bigram_VV.sum(1))
    seen_V = np.maximum(events_V, 1)
    back_V = kinds_V / (seen_V + kinds_V) if interpolation is None else np.full(len(seen_V), float(interpolation))
    back_V = np.where(events_V > 0, back_V, 1.0)
    prev_E = np.repeat(np.arange(len(kinds_V)), kinds_V)
    extra_E = ((1.0 - back_V) / seen_V)[prev_E] * bigram_VV.data
    return NGrams(
        jnp.asarray(smoothed_V / smoothed_V.sum(), jnp.float32),
        jnp.asarray(back_V, jnp.float32),
        jnp.asarray(prev_E, jnp.int32),
        jnp.asarray(bigram_VV.indices, jnp.int32),
        jnp.asarray(extra_E, jnp.float32),
        jnp.asarray(counts.allowed_V),
    )


def bigram_rows(ngrams: NGrams, prev_Y: jax.Array) -> jax.Array:
    """Dense rows q(. | prev), `[..., V]` float32, for previous ids 0..V-1 in any shape, under `jit` or not.

    The work is one pass over the E entries and the result, whatever the ids: every distinct id's row is filled once
    (a scatter that leaves out the entries of other ids), then copied to its positions.
    """
    # 4096 Zipf ids, V = 30,522, 4.7 M entries, four CPU cores: 0.9 s, mostly for writing 0.5 GB; NumPy took
    # 0.7 s for the unigram's part alone. A forward pass of width 256 with its log-softmax over V takes 1.2 s.
    V = ngrams.unigram_V.size
    size = min(prev_Y.size, V)
    id_U, slot_Y = jnp.unique(prev_Y, size=size, fill_value=V, return_inverse=True)
    slot_V = jnp.full(V, size, jnp.int32).at[id_U].set(jnp.arange(size, dtype=jnp.int32), mode="drop")
    q_UV = ngrams.back_V.at[id_U].get(mode="fill", fill_value=0)[:, None] * ngrams.unigram_V[None]
    q_UV = q_UV.at[slot_V[ngrams.prev_E], ngrams.next_E].add(ngrams.extra_E, mode="drop")
    return q_UV[slot_Y.reshape(prev_Y.shape)]


# --- floors ----------------------------------------------------------------------------------------------------------


def entropies(counts: Counts) -> dict[str, float]:
    """Plug-in entropies in nats: `unigram` H(v) and `bigram` H(v | u), of the text's own frequencies.

    The bigram's is too low where bigrams are rare (what follows a word seen once looks certain); `cross_entropies` on
    other text is too high by the error of the estimate. On average the source's own entropy lies between them.
    """
    total = _total(counts)

    def n_log_n(n):
        n = np.asarray(n, np.float64)
        return float((n * np.log(np.maximum(n, 1.0))).sum())

    events_V = counts.bigram_VV.sum(1)
    return {
        "unigram": float(np.log(total)) - n_log_n(counts.unigram_V) / total,
        "bigram": (n_log_n(events_V) - n_log_n(counts.bigram_VV.data)) / total,
    }


def cross_entropies(ngrams: NGrams, counts: Counts) -> dict[str, float]:
    """Loss in nats of the smoothed `unigram` and `bigram` on the text of `counts`, held out or not."""
    unigram_V, back_V, prev_E, next_E, extra_E, allowed_V = (np.asarray(x) for x in ngrams)
    _check_same(allowed_V, counts.allowed_V, "n-grams and counts")
    total = _total(counts)
    q_V = np.where(allowed_V, unigram_V, 1.0).astype(np.float64)
    events = counts.bigram_VV.tocoo()
    extra_VV = sparse.csr_array((extra_E.astype(np.float64), (prev_E, next_E)), shape=counts.bigram_VV.shape)
    extra = np.asarray(extra_VV[events.row, events.col]).ravel()
    q = back_V[events.row].astype(np.float64) * q_V[events.col] + extra
    return {
        "unigram": float(-(counts.unigram_V * np.log(q_V)).sum() / total),
        "bigram": float(-(events.data * np.log(q)).sum() / total),
    }


# --- a model's distance ----------------------------------------------------------------------------------------------


def _distances(logits_YV, target_Y, valid_Y, bigram_YV, ngrams: NGrams) -> Sums:
    """Sums over valid events of one model; `bigram_YV` the rows after their left neighbours."""
    allowed_YV = ngrams.allowed_V.reshape((1,) * target_Y.ndim + (-1,))
    unigram_YV = ngrams.unigram_V.reshape(allowed_YV.shape)
    logits_YV = jnp.where(allowed_YV, logits_YV.astype(jnp.float32), -jnp.inf)
    log_p_YV = jnp.where(allowed_YV, jax.nn.log_softmax(logits_YV, axis=-1), 0.0)
    p_YV = jnp.where(allowed_YV, jnp.exp(log_p_YV), 0.0)

    def at_target(x_YV):
        return jnp.take_along_axis(x_YV, target_Y[..., None], axis=-1)[..., 0]

    terms = {"loss": -at_target(log_p_YV), "entropy": -(p_YV * log_p_YV).sum(-1)}
    for name, q_YV in (("unigram", unigram_YV), ("bigram", bigram_YV)):
        log_q_YV = jnp.where(allowed_YV, jnp.log(jnp.where(allowed_YV, q_YV, 1.0)), 0.0)
        # Differences under the sum: two entropies of several nats would leave no digits of a small divergence.
        terms[f"loss_{name}"] = -at_target(jnp.broadcast_to(log_q_YV, log_p_YV.shape))
        terms[f"kl_model_{name}"] = (p_YV * (log_p_YV - log_q_YV)).sum(-1)
        terms[f"kl_{name}_model"] = (q_YV * (log_q_YV - log_p_YV)).sum(-1)
        terms[f"tv_{name}"] = 0.5 * jnp.abs(p_YV - q_YV).sum(-1)
    sums = {name: jnp.where(valid_Y, term_Y, 0.0).sum() for name, term_Y in terms.items()}
    return sums | {"count": valid_Y.sum().astype(jnp.float32)}


def divergence_sums(
    params_X,
    batch: Batch,
    ngrams: NGrams,
    cfg: TransformerConfig,
    *,
    masking: MaskingConfig | None = None,
    key: jax.Array | None = None,
) -> Sums:
    """Sums `[X]` float32 over the events of a batch, for X models with parameters stacked `[X, ...]`.

    Models are taken one after the other (`lax.map`): one model's `[B, T, V]` logits live at a time, beside as many
    bigram rows, which all models share. Without dropout. Means and names: `divergences`.

    A masked model (`masking`, `key`) is read at its prediction slots: its distribution at a slot against the unigram
    and against the bigram after the true left neighbour. It sees the right side too, and the left neighbour only where
    that is not masked itself: the bigram is a landmark here, not what the model could at best reach from its input.

    Raises:
      InputError: another vocabulary, a model without head, or a masked one without `masking` or the reverse.
    """
    if cfg.head == "none" or cfg.vocab_size != ngrams.unigram_V.size:
        raise InputError(
            f"a model with head {cfg.head!r} and {cfg.vocab_size} ids against n-grams of {ngrams.unigram_V.size}; "
            "give a language model and text of one vocabulary"
        )
    if cfg.causal == (masking is not None) or (masking is None) != (key is None):
        raise InputError(
            f"causal is {cfg.causal}, masking {'missing' if masking is None else 'given'}, key "
            f"{'missing' if key is None else 'given'}; give masked models both, causal ones neither"
        )
    if params_X["embed"]["token"].ndim != 3:
        raise InputError(
            "the parameters are those of one model; stack models [X, ...], a single one by "
            "jax.tree.map(lambda x: x[None], params)"
        )
    ids_BT = batch["ids"]
    if ids_BT.shape[1] < 2:
        raise InputError(f"rows of {ids_BT.shape[1]} token(s) have no neighbours; give rows with two tokens or more")
    segment_BT = batch.get("segment", jnp.ones_like(ids_BT))
    if masking is None:
        read_BT, target_BK = ids_BT, ids_BT[:, 1:]
        slot_BK = jnp.broadcast_to(jnp.arange(1, ids_BT.shape[1], dtype=jnp.int32)[None], target_BK.shape)
        valid_BK = jnp.broadcast_to(batch["valid"][:, None], target_BK.shape)
    else:
        corrupted, _ = masked_batch(batch, key, masking)
        read_BT, slot_BK, target_BK = corrupted.ids_BT, corrupted.slot_BK, corrupted.target_BK
        valid_BK = corrupted.valid_BK & (slot_BK > 0)
    left_BK = jnp.maximum(slot_BK - 1, 0)
    prev_BK, prev_segment_BK = (jnp.take_along_axis(x_BT, left_BK, axis=1) for x_BT in (ids_BT, segment_BT))
    segment_BK = jnp.take_along_axis(segment_BT, slot_BK, axis=1)
    valid_BK = valid_BK & (segment_BK > 0) & (segment_BK == prev_segment_BK)
    valid_BK = valid_BK & ngrams.allowed_V[prev_BK] & ngrams.allowed_V[target_BK]
    bigram_BKV = bigram_rows(ngrams, jnp.where(valid_BK, prev_BK, 0))  # padding may hold any id

    def one(params):
        out_BTD, _ = transformer.forward(params, read_BT, cfg, **forward_inputs(batch))
        at_BKD = out_BTD[:, :-1] if masking is None else gather_slots(out_BTD, slot_BK)
        return _distances(transformer.head(params, at_BKD, cfg), target_BK, valid_BK, bigram_BKV, ngrams)

    return jax.lax.map(one, params_X)


def divergences(sums: Sums) -> dict[str, np.ndarray]:
    """Means over events in nats, `[X]` float64, from sums that were added over batches; `count` stays a number.

    loss                                the model's negative log-likelihood; compare it with `cross_entropies`
    loss_unigram, loss_bigram           those of the n-grams at the same events
    entropy                             of the model's distribution
    kl_model_unigram, kl_model_bigram   KL(model || n-gram): large where the model bets on what the n-gram finds rare
    kl_unigram_model, kl_bigram_model   KL(n-gram || model): large where the model rules out what the n-gram expects
    tv_unigram, tv_bigram               total variation in 0..1, half the sum of |p - q|

    Raises:
      InputError: no events, or sums that are not finite.
    """
    host = {name: np.asarray(jax.device_get(x), np.float64) for name, x in sums.items()}
    if not all(np.isfinite(x).all() for x in host.values()):
        raise InputError("the divergences of a model are not finite; check its parameters with np.isfinite")
    if not (host["count"] > 0).all():
        raise InputError("no position has a left neighbour in its segment; give rows with two tokens or more")
    return {name: x if name == "count" else x / host["count"] for name, x in host.items()}
