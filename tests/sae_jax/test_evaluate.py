"""Evaluation of dictionaries against direct computations on the rows, and what each measure is blind to."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse
from scipy.stats import rankdata

from bert6_jax import classifier, objectives, transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError
from bert6_jax.masking import MaskingConfig
from sae_jax import dictionary as dictionaries
from sae_jax import evaluate
from sae_jax.config import DictionaryConfig
from sae_jax.evaluate import KINDS

# --- fidelity and sparsity -------------------------------------------------------------------------------------------

N, H, D, F = 90, 2, 5, 7
stats_of, add = jax.jit(evaluate.stats_of), jax.jit(evaluate.add)


def rows(seed=0, mean=0.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, H, D)) * np.arange(1, D + 1) + mean
    xhat = x + 0.5 * rng.normal(size=x.shape) + 0.3
    z = np.maximum(rng.normal(size=(N, F)) - 0.5, 0.0)
    z[:, 2] = 0.0
    return x.astype(np.float32), xhat.astype(np.float32), z.astype(np.float32)


def streamed(x, xhat, z, sizes):
    """Batches of one shape, padded with junk that must not count."""
    total, begin = None, 0
    for size in sizes:
        pad = [(0, max(sizes) - size)]
        batch = [
            np.pad(v[begin : begin + size], pad + [(0, 0)] * (v.ndim - 1), constant_values=np.nan) for v in (x, xhat, z)
        ]
        part = stats_of(*batch, np.arange(max(sizes)) < size)
        total = part if total is None else add(total, part)
        begin += size
    assert begin == len(x)
    return total


def direct(x, xhat, z, sizes):
    x, xhat = x.astype(np.float64), xhat.astype(np.float64)
    e = x - xhat
    flat = x.reshape(len(x), -1)
    error_N = np.square(e).sum((1, 2))
    legacy, begin = [], 0
    for size in sizes:
        part = flat[begin : begin + size]
        legacy.append(1 - error_N[begin : begin + size] / np.square(part - part.mean(0)).sum(1))
        begin += size
    spread_H = np.square(x - x.mean(0)).sum((0, 2))
    pairs = [(x[:, h, d], xhat[:, h, d]) for h in range(H) for d in range(D)]
    return {
        "ev_global": 1 - error_N.sum() / spread_H.sum(),
        "ev_global_H": 1 - np.square(e).sum((0, 2)) / spread_H,
        "ev_per_token": np.concatenate(legacy).mean(),
        "ev_variance": 1 - e.var(0, ddof=1).sum() / x.var(0, ddof=1).sum(),
        "ev_correlation": np.mean([np.corrcoef(a, b)[0, 1] ** 2 for a, b in pairs]),
        "nmse_uncentred": (error_N / np.square(flat).sum(1)).mean(),
        "mse": error_N.mean(),
        "cosine": ((x * xhat).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(xhat, axis=-1)).mean(),
        "l0": (z != 0).sum(1).mean(),
        "l1": z.sum(1, dtype=np.float64).mean(),
        "dead": 1 / F,
        "rare": 1 / F,
        "density_F": (z != 0).mean(0),
    }


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("sizes", [(90,), (40, 30, 20)])
def test_streamed_measures_equal_direct_ones_also_far_from_zero(mean, sizes):
    data = rows(mean=mean)
    found, expected = evaluate.summary(streamed(*data, sizes)), direct(*data, sizes)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, err_msg=name)


def test_measures_differ_in_what_they_are_blind_to():
    x, _, z = rows()
    valid = np.ones(N, bool)
    constant = evaluate.summary(stats_of(x, x + np.float32(2.0), z, valid))
    assert constant["ev_variance"] > 1 - 1e-6 and constant["ev_correlation"] > 1 - 1e-6
    np.testing.assert_allclose(constant["ev_global"], 1 - 4.0 / x.var(0).mean(), rtol=1e-5)
    halved = evaluate.summary(stats_of(x, x * np.float32(0.5), z, valid))
    assert halved["ev_correlation"] > 1 - 1e-6 and halved["cosine"] > 1 - 1e-6
    np.testing.assert_allclose(halved["ev_variance"], 0.75, rtol=1e-5)
    np.testing.assert_allclose(halved["nmse_uncentred"], 0.25, rtol=1e-5)
    mean = evaluate.summary(stats_of(x, np.broadcast_to(x.mean(0), x.shape), z, valid))
    np.testing.assert_allclose([mean["ev_global"], mean["ev_variance"], mean["ev_correlation"]], 0.0, atol=1e-5)
    still = evaluate.summary(stats_of(np.ones_like(x), x, z, valid))
    assert np.isnan(still["ev_global"]) and still["ev_correlation"] == 0.0


def test_a_bank_is_its_members_and_empty_batches_change_nothing():
    x, xhat, z = rows()
    members = np.stack([xhat, x * np.float32(0.5)]), np.stack([z, z[::-1]])
    valid = np.arange(N) < 80
    bank = jax.jit(jax.vmap(evaluate.stats_of, (None, 0, 0, None)))(x, *members, valid)
    merge = jax.jit(jax.vmap(evaluate.add))
    nothing = jax.tree.map(np.zeros_like, bank)
    found = evaluate.summary(merge(merge(nothing, bank), nothing))
    assert found["ev_global_H"].shape == (2, H)
    for g in range(2):
        one = evaluate.summary(stats_of(x[:80], members[0][g, :80], members[1][g, :80], valid[:80]))
        for name, value in one.items():
            np.testing.assert_allclose(found[name][g], value, rtol=1e-5, err_msg=name)


def test_bad_activations_are_refused():
    x, xhat, z = rows()
    with pytest.raises(InputError, match="no valid row"):
        evaluate.summary(stats_of(x, xhat, z, np.zeros(N, bool)))
    with pytest.raises(InputError, match="NaN or infinity"):
        evaluate.summary(stats_of(x, np.full_like(x, np.nan), z, np.ones(N, bool)))
    with pytest.raises(InputError, match=r"reconstruction \[90, 2, 4\]"):
        evaluate.stats_of(x, xhat[:, :, 1:], z, np.ones(N, bool))


def test_gamma_is_the_mean_over_the_spread():
    x, _, _ = rows(mean=100.0)
    expected = np.linalg.norm(x.mean(0, dtype=np.float64), axis=-1) / np.linalg.norm(
        x.astype(np.float64).std(0), axis=-1
    )
    np.testing.assert_allclose(evaluate.gamma(jnp.asarray(x)), expected, rtol=1e-5)


# --- the model's loss through a dictionary ---------------------------------------------------------------------------

CFG = TransformerConfig(
    vocab_size=40, width=16, blocks=2, heads=2, head_width=8, mlp_width=32, max_len=10, init_std=0.2
)
MASKING = MaskingConfig(vocab_size=40, mask_id=4, never=(0, 2, 3), slots=6, rate=0.4)


def weights(cfg, seed=0):
    """Any parameters: `transformer.init` would compile for seconds."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), cfg))
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)


def batch(seed=0, B=4, T=10):
    rng = np.random.default_rng(seed)
    segment = (np.arange(T)[None] < np.array([T, T, 6, 8])[:, None]).astype(np.int32)
    return {
        "ids": np.where(segment > 0, rng.integers(5, 40, (B, T)), 0).astype(np.int32),
        "segment": segment,
        "row": np.arange(B, dtype=np.int32),
        "valid": np.arange(B) < 3,
        "label": np.array([0, 2, 1, 1], np.int32),
    }


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_splicing_the_identity_changes_nothing_and_zeros_are_zeros_there(norm):
    cfg = dataclasses.replace(CFG, norm=norm)
    params, data = weights(cfg), batch()

    @jax.jit
    def spliced(depth):
        return [evaluate.splice(params, cfg, data, depth, fn) for fn in (lambda x: x, jnp.zeros_like)]

    @jax.jit
    def clean():
        out, acts = transformer.forward(params, data["ids"], cfg, segment_BT=data["segment"])
        return out, acts["resid"]

    @jax.jit
    def onwards(x, m):
        mask = transformer.attention_mask(data["segment"], False)
        return transformer.block(jax.tree.map(lambda leaf: leaf[m], params["blocks"]), x, mask, cfg)[0]

    out, resid = clean()
    for depth in range(cfg.depths):
        same, zeroed = spliced(np.int32(depth))
        np.testing.assert_allclose(same, out, atol=1e-6)
        x = np.where(data["segment"][:, :, None] > 0, np.float32(0), resid[depth])  # padding stays
        for m in range(depth, cfg.blocks):
            x = onwards(x, np.int32(m))
        x = transformer.apply_norm(params["final_norm"], jnp.asarray(x), cfg) if norm == "pre" else x
        np.testing.assert_allclose(zeroed, x, atol=1e-6)
        assert np.abs(zeroed - out).max() > 0.1


def test_the_masked_lm_loss_through_the_identity_is_the_models_own():
    params, data, key = weights(CFG), batch(), jax.random.key(1)

    @jax.jit
    def losses(depth):
        through = evaluate.mlm_loss_spliced(params, CFG, MASKING, data, key, depth, lambda x: x)
        return objectives.masked_lm(CFG, MASKING)(params, data, key)[1], through

    for depth in range(CFG.depths):
        clean, same = losses(np.int32(depth))
        np.testing.assert_allclose(same["loss"], clean["loss"], rtol=1e-6)
        assert same["count"] == clean["count"] > 5 and same["hits"] == clean["hits"]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_classifier_through_the_identity_and_through_its_mean(pooling):
    rng = np.random.default_rng(1)
    layers = {"pooler": (16, 16), "classifier": (16, 3)} if pooling == "cls" else {"classifier": (16, 3)}
    head = {
        name: {"kernel": jnp.asarray(rng.normal(size=size), jnp.float32), "bias": jnp.ones(size[1])}
        for name, size in layers.items()
    }
    params = weights(CFG) | head
    data = batch()

    def loss(fn, replaced=None):
        return evaluate.classifier_loss_spliced(params, CFG, pooling, data, 1, fn, replaced)

    clean, identity, nowhere, ablated = jax.jit(
        lambda: (
            objectives.token_sums(classifier.logits(params, data, CFG, pooling), data["label"], data["valid"]),
            loss(lambda x: x),
            loss(jnp.zeros_like, jnp.zeros(data["ids"].shape, bool)),
            loss(evaluate.mean_ablation(jnp.ones(CFG.width))),
        )
    )()
    for same in (identity, nowhere):
        np.testing.assert_allclose(same["loss"], clean["loss"], rtol=1e-6)
    assert identity["count"] == 3 and abs(ablated["loss"] - clean["loss"]) > 1e-3


def test_a_dictionary_is_spliced_row_by_row():
    cfg = DictionaryConfig(width=4, latents=6, activation="topk", k=2)
    dictionary = {
        "params": jax.jit(dictionaries.init, static_argnums=1)(jax.random.key(0), cfg),
        "norm": {"mean": jnp.ones((1, 4)), "scale": jnp.full(1, 2.0)},
        "threshold": jnp.float32(-1.0),
    }
    x_BTD = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
    y_BTD = jax.jit(evaluate.reconstructor(dictionary, cfg))(x_BTD)
    expected, _ = jax.jit(dictionaries.reconstruct, static_argnums=2)(dictionary, x_BTD[1, :, None], cfg)
    np.testing.assert_allclose(y_BTD[1], expected[:, 0], atol=1e-6)
    with pytest.raises(InputError, match="single head"):
        evaluate.reconstructor(dictionary, dataclasses.replace(cfg, heads=2))


def test_loss_recovered_is_a_share_of_the_harm():
    np.testing.assert_allclose(evaluate.recovered(1.0, np.array([1.0, 1.5, 3.0]), 3.0), [1.0, 0.75, 0.0])
    assert np.isnan(evaluate.recovered(1.0, 1.0, 1.0))


def test_bad_splices_are_refused():
    params = jax.eval_shape(lambda: transformer.init(jax.random.key(0), CFG))
    with pytest.raises(InputError, match="choose 0 to 2"):
        evaluate.splice(params, CFG, batch(), 3, jnp.zeros_like)
    with pytest.raises(InputError, match="keep its shape"):
        jax.eval_shape(lambda p: evaluate.splice(p, CFG, batch(), 0, lambda x: x[..., :3]), params)


# --- latents and labels ----------------------------------------------------------------------------------------------


def labelled(seed=0, n=400, f=70, c=3):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, c, n)
    z = np.maximum(np.round(2 * rng.normal(size=(n, f)) + (label[:, None] == np.arange(f) % c), 0), 0)  # many ties
    z[:, 5] = 0.0
    z[:, 6] -= 1.0  # negative codes rank below the zeros
    return z.astype(np.float32), label


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_array])
def test_auroc_equals_the_midrank_statistic(form):
    z, label = labelled()
    found = evaluate.auroc(form(z), label, 4)
    for c in range(3):
        positive = label == c
        n = positive.sum()
        statistic = rankdata(z, axis=0)[positive].sum(0) - n * (n + 1) / 2
        np.testing.assert_allclose(found[c], statistic / (n * (len(label) - n)), rtol=1e-12)
    assert found[0, 5] == 0.5 and found[0, 0] > 0.55 and np.isnan(found[3]).all()
    z, label = np.array([[0.0, 2.0], [1.0, 0.0]], np.float32), np.array([0, 1])
    np.testing.assert_array_equal(evaluate.auroc(z, label, 2), [[0.0, 1.0], [1.0, 0.0]])


def test_mutual_information_from_streamed_counts():
    z, label = labelled()
    label = label.astype(np.int32)
    count = jax.jit(evaluate.association_counts, static_argnums=3)
    valid = np.arange(400) < 390
    counts = jax.tree.map(
        jnp.add, count(z[:200], label[:200], valid[:200], 3), count(z[200:], label[200:], valid[200:], 3)
    )
    plain, corrected = evaluate.mutual_information(counts), evaluate.mutual_information(counts, miller_madow=True)

    def entropy(values):
        p = np.unique(values, return_counts=True)[1] / len(values)
        return -(p * np.log(p)).sum(), (len(p) - 1) / (2 * len(values))

    for f in range(z.shape[1]):
        active = (z[valid, f] != 0).astype(int)
        parts = [entropy(v) for v in (active, label[valid], 10 * active + label[valid])]
        expected = parts[0][0] + parts[1][0] - parts[2][0]
        np.testing.assert_allclose(plain[f], expected, atol=1e-12)
        np.testing.assert_allclose(corrected[f], expected + parts[0][1] + parts[1][1] - parts[2][1], atol=1e-12)
    assert plain[5] == 0.0
    mirrored = evaluate.Association(np.int32(30), np.array([10, 20]), np.array([[10, 0]]))
    np.testing.assert_allclose(evaluate.mutual_information(mirrored), np.log(3) - 2 / 3 * np.log(2))


def test_bad_labels_and_codes_are_refused():
    z, label = labelled()
    with pytest.raises(InputError, match="row 2: label 7 is not 0 to 2"):
        evaluate.auroc(z, np.where(np.arange(400) == 2, 7, label), 3)
    with pytest.raises(InputError, match="399 labels for 400 rows"):
        evaluate.auroc(z, label[1:], 3)
    with pytest.raises(InputError, match="codes of latents from 64 on"):
        evaluate.auroc(np.where(np.arange(70) == 65, np.float32(np.nan), z), label, 3)
    counts = evaluate.association_counts(jnp.asarray(z), np.full(400, 3, np.int32), np.ones(400, bool), 3)
    with pytest.raises(InputError, match="400 of 400 labels"):
        evaluate.mutual_information(counts)
    with pytest.raises(InputError, match="no valid row"):
        evaluate.mutual_information(jax.tree.map(np.zeros_like, counts))


# --- matching two dictionaries ---------------------------------------------------------------------------------------


def test_matching_finds_a_planted_permutation_and_says_what_became_of_each_latent():
    rng = np.random.default_rng(0)
    a = np.linalg.qr(rng.normal(size=(40, 40)))[0][:30]
    order = rng.permutation(30)
    b = a[order] * 3.0
    b[0] = a[order[0]] + np.tan(np.arccos(0.7)) * a[order[1]]  # cosine 0.7 with its own
    b[2] = np.linalg.qr(np.r_[a, rng.normal(size=(1, 40))].T)[0][:, -1]  # at right angles to all of a
    b[3] = -b[3]
    alive = np.arange(30) != 4
    found = evaluate.match(a, b, alive_E=alive)
    kept = np.setdiff1d(np.arange(30), [2, 3, 4])
    np.testing.assert_array_equal(found.index_E[kept], order[kept])
    np.testing.assert_allclose(found.similarity_E[kept], np.where(kept == 0, 0.7, 1.0), atol=1e-6)
    assert [KINDS[kind] for kind in found.kind_E[:6]] == ["rotated", "retained", "new", "new", "dead", "retained"]
    assert found.index_E[4] == -1 and np.isnan(found.similarity_E[4])
    assert found.counts == {"dead": 1, "new": 2, "rotated": 1, "retained": 26, "lost": 3}
    assert evaluate.match(a, b, absolute=True).counts["retained"] == 28
    chance = evaluate.match_chance(a, b, seed=1)
    assert chance.counts["retained"] == 0 and 0.1 < np.mean(chance.similarity_E) < 0.5
    # fewer latents than a partner each: what is left over is new
    few = evaluate.match(a[:2], a[:5])
    np.testing.assert_array_equal(few.index_E, [0, 1, -1, -1, -1])
    assert few.counts == {"dead": 0, "new": 3, "rotated": 0, "retained": 2, "lost": 0}


def test_correlation_of_codes_is_pearsons_over_the_valid_rows():
    rng = np.random.default_rng(0)
    a = np.maximum(rng.normal(size=(200, 4)), 0).astype(np.float32)
    b = np.maximum(a[:, [2, 0, 1]] + 0.1 * rng.normal(size=(200, 3)), 0).astype(np.float32)
    a[:, 3] = 0.7
    valid = np.arange(200) < 190
    sums = jax.jit(evaluate.cross_moments)
    halves = [
        sums(*(np.where(valid[:, None], v, np.nan)[at] for v in (a, b)), valid[at])
        for at in np.split(np.arange(200), 2)
    ]
    found = evaluate.correlation(jax.tree.map(jnp.add, *halves))
    np.testing.assert_allclose(found[:3], np.corrcoef(a[valid, :3].T, b[valid].T)[:3, 3:], atol=1e-5)
    np.testing.assert_array_equal(found[3], 0.0)
    np.testing.assert_array_equal(evaluate.match_similarity(found).index_E, [2, 0, 1])
    with pytest.raises(InputError, match="too few"):
        evaluate.correlation(jax.tree.map(np.zeros_like, halves[0]))


def test_recovery_of_a_planted_dictionary():
    truth = np.eye(6)[:4]
    decoder = np.stack([truth[2], -2 * truth[0], truth[1] + truth[3], truth[2], np.eye(6)[5]])
    found = evaluate.recovery(decoder, truth)
    half = np.sqrt(0.5)
    np.testing.assert_allclose(found["matched_cosine"], (2 + half) / 4, rtol=1e-6)
    assert found["share_above"] == 0.5
    np.testing.assert_allclose(found["mmcs_truth_to_latents"], (2 + 2 * half) / 4, rtol=1e-6)
    np.testing.assert_allclose(found["mmcs_latents_to_truth"], (3 + half) / 5, rtol=1e-6)
    few = evaluate.recovery(decoder[:1], truth)
    assert few["matched_cosine"] == few["share_above"] == few["mmcs_truth_to_latents"] == 0.25


def test_bad_dictionaries_are_refused():
    a = np.eye(3)
    with pytest.raises(InputError, match=r"give \[latents, width\] twice"):
        evaluate.match(a, np.ones((2, 4)))
    with pytest.raises(InputError, match="no alive latent"):
        evaluate.match(a, a, alive_F=np.zeros(3, bool))
    with pytest.raises(InputError, match="masks of 2 and 3 latents"):
        evaluate.match(a, a, alive_F=np.ones(2, bool))
    with pytest.raises(InputError, match="NaN or infinite"):
        evaluate.match(a, a * np.nan)


# --- recovery of a planted evolution ---------------------------------------------------------------------------------

STEADY, EMERGENT, TRANSIENT, ROTATING, WEAK, EXCLUSIVE = range(6)
CURVES = {
    STEADY: [1, 1, 1, 1, 1, 1],
    EMERGENT: [0, 0, 0.3, 0.9, 1, 1],
    TRANSIENT: [0, 0.7, 1, 0.4, 0, 0],
    ROTATING: [1, 1, 1, 1, 1, 1],
    WEAK: [0.2, 0.2, 0.2, 1, 1, 1],
    EXCLUSIVE: [0, 0, 0, 0, 1, 0],
}


def planted_evolution():
    """Two features of every kind at right angles, 6 snapshots; the rotating ones turn by 60 degrees at snapshot 4."""
    group = np.repeat(np.arange(6), 2)
    strength = np.array([CURVES[g] for g in group], np.float64).T
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0]
    directions = np.repeat(axes[None, :12], 6, axis=0)
    for x, aim in zip(np.flatnonzero(group == ROTATING), axes[12:14], strict=True):
        for h, degrees in enumerate([0, 5, 15, 25, 50, 60]):
            a = np.radians(degrees)
            directions[h, x] = np.cos(a) * axes[x] + np.sin(a) * aim
    return directions, strength, group


def decoder_of(directions, strength, seed=1):
    scale = np.exp(np.random.default_rng(seed).uniform(-1, 1, strength.shape[1]))
    return directions * (strength * scale)[:, :, None]


def test_a_perfect_dictionary_recovers_an_evolution():
    directions, strength, group = planted_evolution()
    names = ["steady", "emergent", "transient", "rotating", "weak", "exclusive"]
    found = evaluate.evolution_recovery(
        decoder_of(directions, strength), directions, 7 * strength, [names[g] for g in group]
    )
    groups = found.pop("groups")
    np.testing.assert_array_equal(found["latent_X"], np.arange(12))
    np.testing.assert_allclose(found["similarity_X"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(found["mmcs_H"], 1.0, rtol=1e-12)
    ones = {"matched", "mmcs", "emergence_near", "end_near", "curve_correlation"}
    zeros = {"emergence_error", "end_error", "rotation_error", "turn_error", "still_rotation", "curve_error"}
    zeros |= {"false_exclusive", "false_shared", "split", "merged"}
    for name in ones | zeros:
        np.testing.assert_allclose(found[name], float(name in ones), atol=1e-5, err_msg=name)
    assert found.keys() == ones | zeros | {"features", "mmcs_H", "latent_X", "similarity_X"}
    assert found["features"] == 12 and groups.keys() == set(names)
    # a score without anything to average is NaN, everything else as above
    undefined = {"emergence": {"steady", "rotating"}, "end": {"steady", "emergent", "rotating", "weak"}}
    for name, scores in groups.items():
        assert scores["features"] == 2 and scores["matched"] == 1.0
        assert (
            np.isnan(scores["emergence_error"])
            == np.isnan(scores["emergence_near"])
            == (name in undefined["emergence"])
        )
        assert np.isnan(scores["end_error"]) == np.isnan(scores["end_near"]) == (name in undefined["end"])
        assert np.isnan(scores["rotation_error"]) == np.isnan(scores["turn_error"]) == (name != "rotating")
        assert np.isnan(scores["still_rotation"]) == (name in ("rotating", "exclusive"))
        assert np.isnan(scores["curve_correlation"]) == (name in ("steady", "rotating"))
        assert np.isnan(scores["false_exclusive"]) == (name not in ("steady", "rotating", "weak"))
        assert np.isnan(scores["false_shared"]) == (name not in ("emergent", "transient", "exclusive"))
        np.testing.assert_array_equal(np.isnan(scores["mmcs_H"]), np.array(CURVES[names.index(name)]) < 0.5)


def same(found, expected):
    for name, value in expected.items():
        if name in ("latent_X", "similarity_X"):
            continue
        if isinstance(value, dict):
            same(found[name], value)
        else:
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-12, err_msg=str(name))


def test_order_and_scale_of_latents_do_not_matter_nor_do_useless_ones():
    directions, strength, group = planted_evolution()
    rng = np.random.default_rng(3)
    noisy = decoder_of(directions, strength) + 0.1 * rng.normal(size=directions.shape)
    expected = evaluate.evolution_recovery(noisy, directions, strength, group)
    order = rng.permutation(15)
    more = np.concatenate([noisy, np.zeros((6, 2, 16)), 1e-9 * np.eye(16)[None, 14:15].repeat(6, 0)], axis=1)
    found = evaluate.evolution_recovery(
        jnp.asarray(more[:, order] * np.linspace(0.1, 9, 15)[None, :, None]), directions, strength, jnp.asarray(group)
    )
    np.testing.assert_array_equal(order[found["latent_X"]], expected["latent_X"])
    same(found, expected)
    # and a feature's own order moves only the numbers of the arrays
    back = evaluate.evolution_recovery(noisy, directions[:, ::-1], strength[:, ::-1], group[::-1])
    np.testing.assert_array_equal(back["latent_X"], expected["latent_X"][::-1])
    same(back, expected)


def test_shrunk_latents_are_false_exclusive_and_overfull_ones_false_shared():
    directions, strength, group = planted_evolution()
    shrunk = strength.copy()
    shrunk[:3, group == WEAK] = 0.0
    found = evaluate.evolution_recovery(decoder_of(directions, shrunk), directions, strength, group)
    # 2 of 6 shared features: the steady, rotating and weak ones
    assert found["matched"] == 1.0 and found["false_exclusive"] == 2 / 6 and found["false_shared"] == 0.0
    assert found["groups"][WEAK]["false_exclusive"] == 1.0 and found["groups"][STEADY]["false_exclusive"] == 0.0
    assert found["emergence_error"] == 0.0
    np.testing.assert_allclose(found["groups"][WEAK]["curve_error"], 0.1, rtol=1e-6)
    shrunk[:3, group == WEAK] = 0.06  # above 5 %: not called absent
    found = evaluate.evolution_recovery(decoder_of(directions, shrunk), directions, strength)
    assert found["false_exclusive"] == 0.0
    found = evaluate.evolution_recovery(decoder_of(directions, shrunk), directions, strength, called_absent=0.07)
    assert found["false_exclusive"] == 2 / 6

    full = strength.copy()
    full[5, group == EXCLUSIVE] = [0.4, 0.2]  # one above 0.3
    found = evaluate.evolution_recovery(decoder_of(directions, full), directions, strength, group)
    assert found["false_shared"] == 1 / 6 and found["groups"][EXCLUSIVE]["false_shared"] == 0.5
    assert found["false_exclusive"] == 0.0


def test_late_emergence_early_end_and_wrong_rotation_are_measured():
    directions, strength, group = planted_evolution()
    late = strength.copy()
    late[:, group == EMERGENT] = np.array([0, 0, 0, 0, 0.3, 1.0])[:, None]  # 5 for 3
    late[:, group == TRANSIENT] = np.array([0, 1, 0.4, 0, 0, 0.0])[:, None]  # ends at 2 for 3
    found = evaluate.evolution_recovery(decoder_of(directions, late), directions, strength, group)
    groups = found["groups"]
    assert groups[EMERGENT]["emergence_error"] == 2.0 and groups[EMERGENT]["emergence_near"] == 0.0
    assert groups[TRANSIENT]["emergence_error"] == 0.0
    assert groups[TRANSIENT]["end_error"] == 1.0 and groups[TRANSIENT]["end_near"] == 1.0
    # of emergent, transient, weak and exclusive features; of transient and exclusive ones
    assert found["emergence_error"] == 0.5 and found["emergence_near"] == 0.75 and found["end_error"] == 0.5
    assert (
        evaluate.evolution_recovery(decoder_of(directions, late), directions, strength, near=2)["emergence_near"] == 1.0
    )
    pearson = np.corrcoef(late[:, 2], strength[:, 2])[0, 1]
    np.testing.assert_allclose(groups[EMERGENT]["curve_correlation"], pearson, rtol=1e-6)

    # Of 60 degrees at snapshot 4 to 40 at snapshot 2; a steady feature turns by 30.
    turned = directions.copy()
    x, y = np.flatnonzero(group == ROTATING)[0], 0
    aim = (directions[5, x] - 0.5 * directions[0, x]) / np.sin(np.radians(60))
    spare = np.linalg.svd(directions.reshape(-1, 16))[2][-1]  # at right angles to all
    for h, degrees in enumerate([0, 0, 40, 40, 40, 40]):
        turned[h, x] = np.cos(np.radians(degrees)) * directions[0, x] + np.sin(np.radians(degrees)) * aim
    for h, degrees in enumerate([0, 0, 0, 0, 0, 30]):
        turned[h, y] = np.cos(np.radians(degrees)) * directions[0, y] + np.sin(np.radians(degrees)) * spare
    found = evaluate.evolution_recovery(decoder_of(turned, strength), directions, strength, group)
    np.testing.assert_allclose(found["rotation_error"], 20 / 2, rtol=1e-9)
    assert found["turn_error"] == 2 / 2
    np.testing.assert_allclose(found["groups"][STEADY]["still_rotation"], 30 / 2, rtol=1e-9)
    np.testing.assert_allclose(found["groups"][STEADY]["mmcs_H"], [1, 1, 1, 1, 1, (1 + np.sqrt(0.75)) / 2], rtol=1e-9)
    still = np.repeat(directions[:1], 6, axis=0)  # a dictionary that never turns
    found = evaluate.evolution_recovery(decoder_of(still, strength), directions, strength)
    np.testing.assert_allclose(found["rotation_error"], 60.0, rtol=1e-6)
    assert found["turn_error"] == 6 - 4


def test_split_merged_and_missing_latents_are_counted():
    directions, strength, group = planted_evolution()
    decoder = decoder_of(directions, strength)
    halves = np.stack([decoder[:, 0], decoder[:, 0]], axis=1)
    halves[:3, 0], halves[3:, 1] = 0.0, 0.0  # feature 0 in two latents, a half of the snapshots each
    found = evaluate.evolution_recovery(np.concatenate([halves, decoder[:, 1:]], axis=1), directions, strength, group)
    assert (found["split"], found["merged"], found["matched"]) == (1, 0, 1.0)
    assert found["groups"][STEADY]["split"] == 1 and found["groups"][STEADY]["false_exclusive"] == 0.5
    np.testing.assert_allclose(found["groups"][STEADY]["mmcs"], 0.75)  # feature 0: 1 in three snapshots of six
    np.testing.assert_allclose(found["similarity_X"][0], np.sqrt(0.5), rtol=1e-6)

    unit = directions * strength[:, :, None]
    one = unit[:, :1] + unit[:, 1:2]  # features 0 and 1 in one latent; nothing is left for one of them
    merged = evaluate.evolution_recovery(np.concatenate([decoder[:, 2:], one], axis=1), directions, strength, group)
    assert (merged["split"], merged["merged"], merged["groups"][STEADY]["merged"]) == (0, 2, 2)
    assert merged["matched"] == 11 / 12 and sorted(merged["latent_X"][:2]) == [-1, 10]
    np.testing.assert_allclose(merged["groups"][STEADY]["mmcs"], np.sqrt(0.5) / 2)  # 0 for the one left over
    opposite = evaluate.evolution_recovery(-decoder, directions, strength)
    assert opposite["matched"] == 0.0 and opposite["mmcs"] <= 0.0 and np.isnan(opposite["curve_error"])


def test_evolution_scores_of_any_dictionary_follow_their_definitions():
    """Everything again, one feature at a time and by trying all matchings."""
    rng = np.random.default_rng(5)
    snapshots, width, features, latents = 5, 6, 4, 5
    strength = rng.uniform(0, 1, (snapshots, features)) * (rng.uniform(size=(snapshots, features)) < 0.8)
    strength[:, 0] = rng.uniform(0.5, 1, snapshots)
    directions = rng.normal(size=(1, features, width)) + 0.5 * rng.normal(size=(snapshots, features, width))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    decoder = rng.normal(size=(snapshots, latents, width))
    decoder[:, :4] += 3 * (directions * strength[:, :, None])[:, [2, 0, 3, 1]]
    decoder *= rng.uniform(size=(snapshots, latents, 1)) < 0.8
    found = evaluate.evolution_recovery(decoder, directions, strength, matched=0.3, split=0.3)

    def cosine(a, b):
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        return np.sum(a * b) / norms if norms else 0.0

    truth = directions * strength[:, :, None]
    similarity = np.array([[cosine(decoder[:, f], truth[:, x]) for x in range(features)] for f in range(latents)])
    best = max(itertools.permutations(range(latents), features), key=lambda p: sum(similarity[p, range(features)]))
    np.testing.assert_array_equal(found["latent_X"], best)

    def rotation(path, there):
        angles = {h: np.degrees(np.arccos(np.clip(cosine(path[h], path[there[0]]), -1, 1))) for h in there}
        total = angles[there[-1]]
        return total, min([h for h in there if h != there[0] and angles[h] > total / 2], default=snapshots)

    lists = {name: [] for name in found}
    at = [[] for _ in range(snapshots)]
    for x, f in enumerate(best):
        r = strength[:, x] / strength[:, x].max()
        norms = np.linalg.norm(decoder[:, f], axis=1)
        n = norms / norms.max()
        there = [h for h in range(snapshots) if r[h] >= 0.5]
        for h in there:
            at[h].append(cosine(decoder[h, f], directions[h, x]))
        lists["matched"].append(similarity[f, x] >= 0.3)
        if similarity[f, x] < 0.3:
            continue
        true, seen = ([h for h in range(snapshots) if curve[h] > 0.5] for curve in (r, n))
        if true[0] > 0:
            lists["emergence_error"].append(abs(true[0] - seen[0]))
            lists["emergence_near"].append(abs(true[0] - seen[0]) <= 1)
        if true[-1] < snapshots - 1:
            lists["end_error"].append(abs(true[-1] - seen[-1]))
            lists["end_near"].append(abs(true[-1] - seen[-1]) <= 1)
        (angle, turn), (true_angle, true_turn) = rotation(decoder[:, f], there), rotation(directions[:, x], there)
        if true_angle > 10:
            lists["rotation_error"].append(abs(angle - true_angle))
            lists["turn_error"].append(abs(turn - true_turn))
        elif len(there) > 1:
            lists["still_rotation"].append(angle)
        lists["curve_correlation"].append(np.corrcoef(r, n)[0, 1])
        lists["curve_error"].extend(np.abs(r - n))
        if min(r) >= 0.1:
            lists["false_exclusive"].append(min(n) < 0.05)
        if min(r) < 0.01:
            lists["false_shared"].append(max(n[h] for h in range(snapshots) if r[h] < 0.01) > 0.3)
    assert sum(len(values) > 0 for values in lists.values()) >= 9  # hardly any definition goes untested
    for name, values in lists.items():
        if values:
            np.testing.assert_allclose(found[name], np.mean(values), rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(found["mmcs_H"], [np.mean(values) for values in at], rtol=1e-9)
    np.testing.assert_allclose(found["mmcs"], np.mean(sum(at, [])), rtol=1e-9)
    close = similarity > 0.3
    assert found["split"] == sum(close[:, x].sum() > 1 for x in range(features))
    crowded = [f for f in range(latents) if close[f].sum() > 1]
    assert found["merged"] == sum(any(close[f, x] for f in crowded) for x in range(features)) > 0


def test_bad_evolutions_are_refused():
    directions, strength, group = planted_evolution()
    decoder = decoder_of(directions, strength)
    for bad in (decoder[0], decoder[:4], decoder[:, :, :5]):
        with pytest.raises(InputError, match=r"give \[snapshots, latents, width\], \[snapshots, features, width\]"):
            evaluate.evolution_recovery(bad, directions, strength)
    with pytest.raises(InputError, match=r"strengths \[12, 6\]; give"):
        evaluate.evolution_recovery(decoder, directions, strength.T)
    with pytest.raises(InputError, match=r"labels of shape \[6\] for 12 features"):
        evaluate.evolution_recovery(decoder, directions, strength, group[:6])
    with pytest.raises(InputError, match="the decoder or the planted evolution hold NaN"):
        evaluate.evolution_recovery(decoder * np.nan, directions, strength)
    for bad in (strength - 0.1, strength * (group != WEAK)[None]):
        with pytest.raises(InputError, match="negative strength, or none at any snapshot"):
            evaluate.evolution_recovery(decoder, directions, bad)


# --- top contexts ----------------------------------------------------------------------------------------------------


def text(seed=0, n=23, t=6, f=5):
    rng = np.random.default_rng(seed)
    z = np.maximum(rng.integers(-6, 4, (n, t, f)), 0).astype(np.float32)  # few values, so many ties
    z[:, :, 3] = 0.0
    z[4:, :, 4] = 0.0
    segment = np.where(np.arange(t) < 3, 1, np.where(np.arange(t) < rng.integers(4, t + 1, n)[:, None], 2, 0))
    return z, rng.integers(0, 10, (n, t)), segment.astype(np.int32)


def top_of(z, segment, order, size, contexts):
    update = jax.jit(evaluate.top_update, donate_argnums=0)
    top = evaluate.top_init(z.shape[-1], contexts)
    for begin in range(0, len(order), size):
        taken = order[begin : begin + size]
        filled = np.r_[taken, np.zeros(size - len(taken), int)]
        valid = (segment[filled] > 0) & (np.arange(size) < len(taken))[:, None]
        top = update(top, np.where(valid[:, :, None], z[filled], np.nan), filled.astype(np.int32), valid)
    return top


def test_top_contexts_equal_a_search_through_everything_in_any_order():
    z, _, segment = text()
    tops = [
        top_of(z, segment, order, size, 6)
        for order, size in ((np.arange(23), 23), (np.random.default_rng(1).permutation(23), 4))
    ]
    jax.tree.map(np.testing.assert_array_equal, *tops)
    for f in range(z.shape[-1]):
        best = np.where(segment > 0, z[:, :, f], 0.0)
        ranked = sorted((-best[n].max(), n, best[n].argmax()) for n in range(23) if best[n].max() > 0)[:6]
        rows = np.array(ranked + [(0.0, -1, -1)] * (6 - len(ranked)))
        for found, expected in zip(tops[0], (-rows[:, 0], rows[:, 1], rows[:, 2]), strict=True):
            np.testing.assert_array_equal(found[f], expected)


def test_contexts_are_the_windows_around_the_peaks():
    z, ids, segment = text()
    strings = [f"w{i}" for i in range(10)]
    top = top_of(z, segment, np.arange(23), 23, 6)
    asked = []

    def codes_of(rows):
        asked.append(len(rows))
        return z[rows]

    found = evaluate.contexts(top, ids, segment, strings, 1, codes_of, batch=4)
    assert set(asked) == {4} and [len(of) for of in found[3:]] == [0, (np.asarray(top.row_FN[4]) >= 0).sum()]
    for f, of in enumerate(found):
        for n, context in enumerate(of):
            row, at = int(top.row_FN[f, n]), int(top.position_FN[f, n])
            near = [t for t in (at - 1, at, at + 1) if 0 <= t < 6 and segment[row, t] == segment[row, at]]
            assert context == {
                "row": row,
                "tokens": [strings[ids[row, t]] for t in near],
                "values": [z[row, t, f] for t in near],
                "peak": near.index(at),
            }
            assert context["values"][context["peak"]] == top.value_FN[f, n]
    assert evaluate.contexts(top, ids, segment, strings, 1, codes_of, latents=[4, 0]) == [found[4], found[0]]


def test_bad_contexts_are_refused():
    z, ids, segment = text()
    top = top_of(z, segment, np.arange(23), 23, 6)
    with pytest.raises(InputError, match="give the rows that were streamed"):
        evaluate.contexts(top, ids[:3], segment[:3], [], 1, lambda rows: z[rows])
    with pytest.raises(InputError, match=r"give \[rows, tokens, 5\]"):
        evaluate.top_update(top, jnp.asarray(z[:, :, 1:]), jnp.arange(23), jnp.asarray(segment > 0))
    broken = top_of(np.full_like(z, np.nan), segment, np.arange(23), 23, 6)
    with pytest.raises(InputError, match="not finite"):
        evaluate.contexts(broken, ids, segment, [], 1, lambda rows: z[rows])
