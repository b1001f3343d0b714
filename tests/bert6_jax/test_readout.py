"""Readouts: a bank equals its members trained alone, and every head reads its own depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax import objectives, readout, train, transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError
from bert6_jax.masking import MaskingConfig

CFG = TransformerConfig(
    vocab_size=40, width=16, blocks=2, heads=2, head_width=8, mlp_width=32, max_len=12, init_std=0.2
)
MASKING = MaskingConfig(vocab_size=40, mask_id=4, never=(0, 2, 3), slots=6)
B = 4


def batch_at(step):
    rng = np.random.default_rng(step)
    return {
        "ids": rng.integers(5, 40, (B, 12), dtype=np.int32),
        "segment": np.ones((B, 12), np.int32),
        "row": np.arange(B, dtype=np.int32),
        "valid": np.arange(B) < 3,
    }


@pytest.fixture(scope="module")
def trunk():
    return jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), CFG)


@pytest.mark.parametrize("variant", ["linear", "mlm_head"])
def test_a_member_of_the_bank_equals_the_head_trained_alone(trunk, variant):
    tx = train.make_optimizer(train.OptimizerConfig(lr=1e-2, schedule="constant"), 8, 8)
    heads = readout.init_heads(jax.random.key(1), CFG, variant)
    step = train.make_step(readout.grad_fn(CFG, MASKING, variant), tx)
    state = train.fit(
        step, train.init_state(heads, tx, jax.random.key(2)), batch_at, train.FitConfig(8), frozen=trunk, quiet=True
    )
    m = 1  # the same head alone, by the plain loss on its depth

    def alone(head_m, batch, key):
        resid_MBKD, corrupted = readout.slot_streams(trunk, batch, key, CFG, MASKING)
        logits_BKV = readout.head_logits(head_m, resid_MBKD[m], trunk, CFG, variant)
        sums = objectives.token_sums(logits_BKV, corrupted.target_BK, corrupted.valid_BK)
        return sums["loss"], sums

    member = jax.tree.map(lambda leaf: leaf[m], heads)
    single = train.fit(
        train.make_step(train.grad_of(alone), tx),
        train.init_state(member, tx, jax.random.key(2)),
        batch_at,
        train.FitConfig(8),
        quiet=True,
    )
    jax.tree.map(
        lambda bank, one: np.testing.assert_allclose(bank[m], one, rtol=1e-5, atol=1e-6), state.params, single.params
    )
    assert any(np.abs(a[m] - b).max() > 1e-2 for a, b in zip(
        jax.tree.leaves(heads), jax.tree.leaves(single.params), strict=True))  # fmt: skip


def test_logit_lens_is_the_models_own_head_at_every_depth(trunk):
    heads = readout.init_heads(jax.random.key(1), CFG, "logit_lens")
    batch = jax.tree.map(jnp.asarray, batch_at(0))
    answers, nll, corrupted = readout.predict(trunk, heads, batch, jax.random.key(3), CFG, MASKING, "logit_lens")
    assert answers.shape == (CFG.depths + 1, B, 6)
    np.testing.assert_array_equal(answers[-1], answers[-2])
    np.testing.assert_allclose(nll[-1], nll[-2], rtol=1e-6)
    _, acts = transformer.forward(trunk, corrupted.ids_BT, CFG, segment_BT=batch["segment"])
    logits = transformer.head(trunk, objectives.gather_slots(acts["resid"][1], corrupted.slot_BK), CFG)
    np.testing.assert_array_equal(answers[1], logits.argmax(-1))


def test_predictions_and_losses_are_those_of_the_heads(trunk):
    heads = readout.init_heads(jax.random.key(1), CFG, "linear")
    batch = jax.tree.map(jnp.asarray, batch_at(0))
    answers, nll, corrupted = readout.predict(trunk, heads, batch, jax.random.key(3), CFG, MASKING, "linear")
    _, acts = transformer.forward(trunk, corrupted.ids_BT, CFG, segment_BT=batch["segment"])
    for m in range(CFG.depths):
        x = np.asarray(objectives.gather_slots(acts["resid"][m], corrupted.slot_BK))
        logits = x @ np.asarray(heads["kernel"][m]) + np.asarray(heads["bias"][m])
        np.testing.assert_array_equal(answers[m], logits.argmax(-1))
        log_p = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        picked = -np.take_along_axis(log_p, np.asarray(corrupted.target_BK)[..., None], -1)[..., 0]
        np.testing.assert_allclose(nll[m], (picked * np.asarray(corrupted.valid_BK)).sum(-1), rtol=1e-4, atol=1e-5)
    assert not np.asarray(corrupted.valid_BK)[3].any() and (nll[:, 3] == 0).all()  # a row that only fills the batch
    own, own_nll, _ = readout.predict(trunk, None, batch, jax.random.key(3), CFG, MASKING, None)
    np.testing.assert_array_equal(own[0], answers[-1])
    np.testing.assert_allclose(own_nll[0], nll[-1], rtol=1e-5)


def test_an_unknown_variant_is_refused():
    with pytest.raises(InputError, match="readout variant"):
        readout.head_config(CFG, "tuned_lens")
