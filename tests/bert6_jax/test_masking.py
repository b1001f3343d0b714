"""The corruption of the paper, its binomial rates, its slots, and its independence of batch and device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax.errors import InputError
from bert6_jax.masking import KEPT, MASK, RANDOM, MaskingConfig, corrupt

V, T, B = 1_000, 128, 400
CFG = MaskingConfig(vocab_size=V, mask_id=103, never=(0, 101, 102), slots=60)


@pytest.fixture(scope="module")
def example():
    rng = np.random.default_rng(0)
    ids = rng.integers(200, V, (B, T))
    ids[:, 0], ids[:, -1] = 101, 102
    ids[: B // 2, 100:] = 0
    ids = jnp.asarray(ids, jnp.int32)
    return ids, jax.jit(corrupt, static_argnums=2)(jax.random.split(jax.random.key(1), B), ids, CFG)


def within(share, expected, n):
    return abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n)


def test_rates_lie_within_binomial_error(example):
    ids_BT, c = example
    eligible = int(((ids_BT != 0) & (ids_BT != 101) & (ids_BT != 102)).sum())
    chosen = int(c.valid_BK.sum())
    assert int(c.overflow_B.sum()) == 0 and within(chosen / eligible, 0.15, eligible)
    modes = np.asarray(c.mode_BK)[np.asarray(c.valid_BK)]
    for mode, share in ((MASK, 0.8), (RANDOM, 0.1), (KEPT, 0.1)):
        assert within((modes == mode).mean(), share, chosen)


def test_slots_say_what_happened(example):
    ids_BT, c = (jax.tree.map(np.asarray, part) for part in example)
    touched = np.zeros((B, T), bool)
    for row in range(B):
        slots = c.slot_BK[row][c.valid_BK[row]]
        assert (np.diff(slots) > 0).all()
        touched[row, slots] = True
        np.testing.assert_array_equal(ids_BT[row, slots], c.target_BK[row][c.valid_BK[row]])
        new, mode = c.ids_BT[row, slots], c.mode_BK[row][c.valid_BK[row]]
        assert (new[mode == MASK] == 103).all()
        np.testing.assert_array_equal(new[mode == KEPT], ids_BT[row, slots][mode == KEPT])
    np.testing.assert_array_equal(c.ids_BT[~touched], ids_BT[~touched])
    assert not np.isin(c.target_BK[c.valid_BK], CFG.never).any()
    random_ids = c.ids_BT[np.arange(B)[:, None], c.slot_BK][c.valid_BK & (c.mode_BK == RANDOM)]
    assert random_ids.min() < V * 0.02 and random_ids.max() > V * 0.98  # uniform over all ids, specials included


def test_a_row_depends_on_its_own_key_alone(example):
    ids_BT, c = example
    keys_B = jax.random.split(jax.random.key(1), B)
    some = corrupt(keys_B[7:9], ids_BT[7:9], CFG)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[7:9]), some, c)
    other = corrupt(jax.random.split(jax.random.key(2), B)[:2], ids_BT[:2], CFG)
    assert (np.asarray(other.slot_BK) != np.asarray(c.slot_BK)[:2]).any()


def test_overflow_is_counted_and_left_intact():
    cfg = MaskingConfig(vocab_size=V, mask_id=103, never=(), slots=5, rate=1.0, mask_share=1.0, random_share=0.0)
    ids_BT = jnp.asarray(np.random.default_rng(0).integers(200, V, (3, 20)), jnp.int32)
    c = corrupt(jax.random.split(jax.random.key(0), 3), ids_BT, cfg)
    np.testing.assert_array_equal(c.overflow_B, [15, 15, 15])
    assert (c.ids_BT[:, :5] == 103).all() and c.valid_BK.all()
    np.testing.assert_array_equal(c.ids_BT[:, 5:], ids_BT[:, 5:])


def test_more_slots_than_positions_is_fine():
    cfg = MaskingConfig(vocab_size=V, mask_id=103, never=(), slots=500)
    c = corrupt(jax.random.split(jax.random.key(0), 2), jnp.full((2, 6), 300, jnp.int32), cfg)
    assert c.slot_BK.shape == (2, 6)


def test_settings_are_checked():
    for changes in ({"rate": 0.0}, {"slots": 0}, {"mask_share": 0.95, "random_share": 0.1}):
        with pytest.raises(InputError):
            MaskingConfig(**(dict(vocab_size=V, mask_id=103, never=()) | changes))
