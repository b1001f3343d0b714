"""Readouts: a bank equals its members trained alone, and every head reads its own depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax import objectives, parallel, readout, train, transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError
from bert6_jax.masking import Corrupted, MaskingConfig

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
    np.testing.assert_array_equal(answers[1], np.where(corrupted.valid_BK, logits.argmax(-1), -1))


def test_predictions_and_losses_are_those_of_the_heads(trunk):
    heads = readout.init_heads(jax.random.key(1), CFG, "linear")
    batch = jax.tree.map(jnp.asarray, batch_at(0))
    answers, nll, corrupted = readout.predict(trunk, heads, batch, jax.random.key(3), CFG, MASKING, "linear")
    _, acts = transformer.forward(trunk, corrupted.ids_BT, CFG, segment_BT=batch["segment"])
    for m in range(CFG.depths):
        x = np.asarray(objectives.gather_slots(acts["resid"][m], corrupted.slot_BK))
        logits = x @ np.asarray(heads["kernel"][m]) + np.asarray(heads["bias"][m])
        np.testing.assert_array_equal(answers[m], np.where(corrupted.valid_BK, logits.argmax(-1), -1))
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


def plain_grads(trunk, heads, batch, key, variant):
    """Every head's summed loss on all slots of its depth, unused ones at weight 0: gradients and losses [M]."""
    corrupted, _ = objectives.masked_batch(batch, key, MASKING)
    _, acts = transformer.forward(trunk, corrupted.ids_BT, CFG, segment_BT=batch["segment"])
    weight_BK = corrupted.valid_BK.astype(jnp.float32)

    def loss(heads_m, m):
        x_BKD = objectives.gather_slots(acts["resid"][m], corrupted.slot_BK)
        log_p = jax.nn.log_softmax(readout.head_logits(heads_m, x_BKD, trunk, CFG, variant), axis=-1)
        return -(jnp.take_along_axis(log_p, corrupted.target_BK[..., None], -1)[..., 0] * weight_BK).sum()

    found = [jax.value_and_grad(loss)(jax.tree.map(lambda leaf: leaf[m], heads), m) for m in range(CFG.depths)]  # noqa: B023
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(grads for _, grads in found)), [v for v, _ in found]


@pytest.mark.parametrize("variant", ["linear", "mlm_head"])
@pytest.mark.parametrize("sizes", [(24,), (4, 24), (8, 16, 24), (0, 24)])  # up to 16 of width 16: by logits, if linear
def test_gradients_and_answers_do_not_depend_on_how_many_slots_are_packed(trunk, variant, sizes, monkeypatch):
    monkeypatch.setattr(readout, "_sizes", lambda *_: sizes)
    heads = readout.init_heads(jax.random.key(1), CFG, variant)
    heads = jax.tree.map(lambda leaf: leaf + 0.1, heads)  # biases too
    for seed in range(4):
        batch, key = jax.tree.map(jnp.asarray, batch_at(seed)), jax.random.key(seed)
        grads, sums = readout.grad_fn(CFG, MASKING, variant)(heads, batch, key, trunk)
        expected, losses = plain_grads(trunk, heads, batch, key, variant)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), grads, expected)
        np.testing.assert_allclose([sums[f"loss_{m}"] for m in range(CFG.depths)], losses, rtol=1e-5)
        ids, nll, corrupted = readout.predict(trunk, heads, batch, key, CFG, MASKING, variant)
        assert int(sums["count"]) == int(corrupted.valid_BK.sum())
        np.testing.assert_allclose(nll[:-1].sum(-1), losses, rtol=1e-5)
        assert ((ids >= 0) == corrupted.valid_BK[None]).all()


@pytest.mark.parametrize("used", ["none", "first size", "one more", "all", "one group full"])
def test_what_is_packed_comes_back_to_its_slot(used):
    B, K, T = 32, 4, 16  # two groups of 16 rows
    sizes = readout._sizes(16, T, K, 0.05)
    assert len(sizes) > 2 and sizes[-1] == 64
    rng = np.random.default_rng(0)
    valid = np.zeros((2, 64), bool)
    for group, count in enumerate({
        "none": (0, 0), "first size": (sizes[0], 3), "one more": (1, sizes[0] + 1), "all": (64, 64),
        "one group full": (0, 64),
    }[used]):  # fmt: skip
        valid[group, rng.permutation(64)[:count]] = True
    valid_BK = jnp.asarray(valid.reshape(B, K))
    number_BK = jnp.arange(B * K, dtype=jnp.int32).reshape(B, K)
    corrupted = Corrupted(jnp.zeros((B, T), jnp.int32), number_BK, number_BK, number_BK, valid_BK, number_BK[:, 0])
    resid_MBKD = jnp.stack([number_BK, 1_000 + number_BK]).astype(jnp.float32)[..., None]
    width = []

    def run(resid_MGXD, target_GX, valid_GX):
        width.append(target_GX.shape[1])
        number_GX = target_GX.astype(jnp.float32)
        right = (resid_MGXD[0, ..., 0] == number_GX) & (resid_MGXD[1, ..., 0] == 1_000.0 + number_GX)
        return target_GX, (valid_GX.sum(), right.all(), jnp.int32(target_GX.shape[1]))

    back_BK, (count, right, taken) = readout._at_valid(run, resid_MBKD, corrupted, 0.05)
    np.testing.assert_array_equal(np.where(valid_BK, back_BK, -1), np.where(valid_BK, number_BK, -1))
    assert int(count) == valid.sum() and bool(right) and sorted(width) == list(sizes)
    assert int(taken) == {"none": sizes[0], "first size": sizes[0], "one more": sizes[1]}.get(used, 64)


def test_the_sizes_fit_nearly_all_batches_and_no_more():
    rng = np.random.default_rng(1)
    for rows, length, slots, rate in [(16, 128, 40, 0.15), (16, 128, 20, 0.15), (16, 15, 8, 0.35), (4, 512, 100, 0.15)]:
        sizes = readout._sizes(rows, length, slots, rate)
        assert list(sizes) == sorted(set(sizes)) and sizes[-1] == rows * slots
        count = np.minimum(rng.binomial(length, rate, (4_000, rows)), slots).sum(1)
        assert 0.5 < (count <= sizes[0]).mean() < 0.97
        assert len(sizes) == 2 or (count <= sizes[1]).mean() > 0.99
        assert sizes[-2] < 1.3 * count.mean() + 8
    assert readout._sizes(3, 10, 10, 1.0) == (30,)


@pytest.mark.parametrize("depths", [(1,), (0,), (2, 0)])
def test_some_depths_are_members_of_the_whole_bank(trunk, depths):
    heads = readout.init_heads(jax.random.key(1), CFG, "mlm_head")
    some = jax.tree.map(lambda leaf: leaf[np.array(depths)], heads)
    batch, key = jax.tree.map(jnp.asarray, batch_at(0)), jax.random.key(3)
    grads, sums = readout.grad_fn(CFG, MASKING, "mlm_head")(heads, batch, key, trunk)
    some_grads, some_sums = readout.grad_fn(CFG, MASKING, "mlm_head", depths)(some, batch, key, trunk)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[np.array(depths)], b, rtol=1e-5, atol=1e-7), grads, some_grads
    )
    assert {name for name in some_sums if name.startswith("loss_")} == {f"loss_{m}" for m in depths}
    np.testing.assert_allclose([sums[f"loss_{m}"] for m in depths], [some_sums[f"loss_{m}"] for m in depths], rtol=1e-6)
    ids, nll, _ = readout.predict(trunk, heads, batch, key, CFG, MASKING, "mlm_head")
    some_ids, some_nll, _ = readout.predict(trunk, some, batch, key, CFG, MASKING, "mlm_head", depths)
    np.testing.assert_array_equal(ids[np.array([*depths, -1])], some_ids)
    np.testing.assert_allclose(nll[np.array([*depths, -1])], some_nll, rtol=1e-6)
    alone_ids, alone_nll, _ = readout.predict(trunk, some, batch, key, CFG, MASKING, "mlm_head", depths, own=False)
    np.testing.assert_array_equal(alone_ids, some_ids[:-1])
    np.testing.assert_allclose(alone_nll, some_nll[:-1], rtol=1e-6)


def test_four_devices_train_the_same_heads(trunk):
    cfg = train.FitConfig(3)
    tx = train.make_optimizer(train.OptimizerConfig(lr=1e-2, schedule="constant"), 3, 3)
    heads = readout.init_heads(jax.random.key(1), CFG, "linear")
    step = train.make_step(readout.grad_fn(CFG, MASKING, "linear"), tx)
    one, four = (
        train.fit(
            step, train.init_state(heads, tx, jax.random.key(2)), batch_at, cfg, frozen=trunk, quiet=True,
            mesh=parallel.make_mesh(devices),
        )
        for devices in (1, 4)
    )  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one.params, four.params)


def test_an_unknown_variant_is_refused():
    with pytest.raises(InputError, match="readout variant"):
        readout.head_config(CFG, "tuned_lens")


@pytest.mark.parametrize("depths", [(), (-1,), (0, 99)])
def test_depths_that_are_not_there_are_refused(depths):
    with pytest.raises(ValueError, match="the last block"):
        readout.slot_streams({}, {}, jax.random.key(0), transformer.TransformerConfig(9, blocks=2), None, depths)
