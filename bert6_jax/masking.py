"""Masked-LM corruption inside `jit`, with a static number of prediction slots a row.

The paper's rule (arXiv 2507.14871): every position except special ones is chosen with probability 0.15; of the chosen,
80 % become [MASK], 10 % a uniformly random id, 10 % stay. Each row has its own key, so its corruption does not depend
on the batch or the device that it is part of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bert6_jax.errors import InputError

MASK, RANDOM, KEPT = 0, 1, 2  # the corruption modes, axis C of the counts in `bert6_jax.metrics`


@dataclass(frozen=True)
class MaskingConfig:
    """Which ids stand for what, how much is corrupted, and how many slots a row has."""

    vocab_size: int
    mask_id: int
    never: tuple[int, ...]  # ids that are never chosen: [PAD], [CLS], [SEP]; add [UNK] to keep it from being a target
    slots: int = 40
    rate: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1

    def __post_init__(self):
        if not 0.0 < self.rate <= 1.0:
            raise InputError(f"masking rate is {self.rate!r}; it must lie in (0, 1]")
        if min(self.mask_share, self.random_share) < 0.0 or self.mask_share + self.random_share > 1.0 + 1e-9:
            raise InputError("mask_share and random_share must be non-negative and sum to at most 1")
        if self.slots < 1:
            raise InputError(f"masking slots is {self.slots!r}; it must be at least 1")


class Corrupted(NamedTuple):
    """A corrupted batch; unused slots have `valid_BK` False and point anywhere."""

    ids_BT: jax.Array  # what the model reads
    slot_BK: jax.Array  # int32, chosen positions in increasing order
    target_BK: jax.Array  # int32, the original ids there
    mode_BK: jax.Array  # int32, MASK, RANDOM or KEPT
    valid_BK: jax.Array  # bool
    overflow_B: jax.Array  # int32, positions chosen beyond the K slots: left as they were, never predicted


def corrupt(keys_B: jax.Array, ids_BT: jax.Array, cfg: MaskingConfig) -> Corrupted:
    """Corrupt each row with its own key.

    With Bernoulli(0.15) over 126 positions a row overflows 40 slots with probability 6e-7 and 30 with 3e-3; the
    positions left over stay intact and are counted.
    """
    K = min(cfg.slots, ids_BT.shape[1])

    def corrupt_row(key, ids_T):
        choose_key, mode_key, id_key = jax.random.split(key, 3)
        never = jnp.isin(ids_T, jnp.asarray(cfg.never, ids_T.dtype)) if cfg.never else jnp.zeros(ids_T.shape, bool)
        chosen_T = (jax.random.uniform(choose_key, ids_T.shape) < cfg.rate) & ~never
        # top_k is stable: the K first chosen positions in order, then positions that were not chosen.
        valid_K, slot_K = jax.lax.top_k(chosen_T.astype(jnp.int32), K)
        valid_K = valid_K == 1
        target_K = ids_T[slot_K]
        draw_K = jax.random.uniform(mode_key, (K,))
        mode_K = jnp.where(
            draw_K < cfg.mask_share, MASK, jnp.where(draw_K < cfg.mask_share + cfg.random_share, RANDOM, KEPT)
        ).astype(jnp.int32)
        random_K = jax.random.randint(id_key, (K,), 0, cfg.vocab_size, ids_T.dtype)
        new_K = jnp.where(mode_K == MASK, jnp.asarray(cfg.mask_id, ids_T.dtype), random_K)
        new_K = jnp.where(valid_K & (mode_K != KEPT), new_K, target_K)
        overflow = chosen_T.sum(dtype=jnp.int32) - valid_K.sum(dtype=jnp.int32)
        # unused slots write back what stands there; they are distinct positions, so nothing is overwritten
        corrupted_T = ids_T.at[slot_K].set(new_K, unique_indices=True)
        return Corrupted(corrupted_T, slot_K, target_K, mode_K, valid_K, overflow)

    return jax.vmap(corrupt_row)(keys_B, ids_BT)
