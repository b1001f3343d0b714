"""The dictionary against the equations of its docstring, written once more in NumPy, float64."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax import checkpoint
from bert6_jax.errors import InputError
from sae_jax import dictionary
from sae_jax.config import DictionaryConfig, TrainConfig

B, D, F = 9, 5, 12
encode, reconstruct = (jax.jit(f, static_argnums=2) for f in (dictionary.encode, dictionary.reconstruct))
codes = jax.jit(dictionary.codes, static_argnums=2)


def config(activation="batch_topk", **changes):
    changes = {"penalty": "l0"} | changes if activation == "jumprelu" else changes
    return DictionaryConfig(**({"width": D, "latents": F, "activation": activation, "k": 3} | changes))


def random_params(cfg, seed=0):
    """Everything away from its start: no tied weights, no zero biases, free norms."""
    rng = np.random.default_rng(seed)
    like = jax.eval_shape(lambda: dictionary.init(jax.random.key(0), cfg))
    params = {name: rng.normal(size=leaf.shape).astype(np.float32) * 0.4 for name, leaf in sorted(like.items())}
    return jax.tree.map(jnp.asarray, params)


def random_dictionary(cfg, seed=0, threshold=0.7):
    rng = np.random.default_rng(seed + 100)
    mean, scale = rng.normal(size=(cfg.heads, D)), rng.uniform(0.5, 2.0, cfg.heads)
    norm = {"mean": jnp.asarray(mean, jnp.float32), "scale": jnp.asarray(scale, jnp.float32)}
    return {"params": random_params(cfg, seed), "norm": norm, "threshold": jnp.float32(threshold)}


def raw_rows(cfg, seed=1, n=B):
    return (3 * np.random.default_rng(seed).normal(size=(n, cfg.heads, D)) + 1).astype(np.float32)


def as64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def oracle_codes(p, y, cfg, k=None, threshold=None):
    """Codes of normalised rows from the docstring's equations."""
    product = sum((y[:, h] - p["b_dec"][h] * cfg.subtract_bias) @ p["W_enc"][h].T for h in range(cfg.heads))
    pre, k = product + p["b_enc"], cfg.k if k is None else k
    if cfg.activation == "relu":
        return np.maximum(pre, 0)
    if cfg.activation == "gated":
        return (pre > 0) * np.maximum(np.exp(p["r_mag"]) * product + p["b_mag"], 0)
    if cfg.activation == "jumprelu":
        return pre * (pre > np.exp(p["log_threshold"]))
    if cfg.activation == "batch_topk" and threshold is not None and threshold >= 0:
        return pre * (pre > threshold)
    keep = np.zeros(pre.shape, bool)
    if cfg.activation == "topk":
        for b, row in enumerate(pre):
            keep[b, np.argsort(-row)[:k]] = True
    else:
        keep.ravel()[np.argsort(-pre.ravel())[: k * len(pre)]] = True
    return np.maximum(pre, 0) * keep


VARIANTS = {
    "relu": config("relu"),
    "gated": config("gated"),
    "topk": config("topk"),
    "batch_topk": config("batch_topk"),
    "jumprelu": config("jumprelu"),
    "no bias subtracted": config("topk", subtract_bias=False),
    "each token's own scale": config("batch_topk", scale="token"),
    "relu, two heads": config("relu", heads=2),
    "gated, two heads": config("gated", heads=2, subtract_bias=False),
    "topk, two heads": config("topk", heads=2),
    "batch_topk, two heads, token": config("batch_topk", heads=2, scale="token"),
    "jumprelu, two heads": config("jumprelu", heads=2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_codes_and_reconstruction_are_the_equations(name):
    """From raw rows to raw rows: normalise, encode, decode, undo."""
    cfg = VARIANTS[name]
    d, x = random_dictionary(cfg), raw_rows(cfg)
    p, norm = as64(d["params"]), as64(d["norm"])
    y = (x - norm["mean"]) * norm["scale"][:, None]
    mean, std = y.mean(-1, keepdims=True), y.std(-1, ddof=1, keepdims=True)
    token = cfg.scale == "token"
    z = oracle_codes(p, (y - mean) / (std + 1e-5) if token else y, cfg, threshold=0.7)
    yhat = np.stack([z @ p["W_dec"][h] + p["b_dec"][h] for h in range(cfg.heads)], 1)
    xhat = (yhat * std + mean if token else yhat) / norm["scale"][:, None] + norm["mean"]
    ours, z_BF = reconstruct(d, x, cfg)
    assert 0 < (z > 0).sum() < z.size
    np.testing.assert_allclose(z_BF, z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours, xhat, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(encode(d, x, cfg), z_BF, rtol=1e-5, atol=1e-6)
    if not token:
        np.testing.assert_allclose(dictionary.decode(d, z_BF, cfg), xhat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["topk", "batch_topk", "topk, two heads"])
def test_k_is_data_up_to_the_configuration(name):
    """A traced k below cfg.k keeps fewer; at cfg.k the same as without."""
    cfg = VARIANTS[name]
    p, y = random_params(cfg), raw_rows(cfg)
    with_k = jax.jit(lambda y, k: dictionary.codes(p, y, cfg, k=k))
    for k in (1, 2, 3):
        np.testing.assert_allclose(with_k(y, jnp.int32(k)), oracle_codes(as64(p), y, cfg, k), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(with_k(y, jnp.int32(3)), codes(p, y, cfg), rtol=1e-5, atol=1e-6)


def test_an_untrained_batch_topk_dictionary_ranks_the_batch():
    """A negative threshold was never learnt; 0 was (everything positive passes)."""
    cfg, x = VARIANTS["batch_topk"], raw_rows(VARIANTS["batch_topk"])
    untrained = encode(random_dictionary(cfg, threshold=-1.0), x, cfg)
    assert (np.asarray(untrained) > 0).sum() == B * cfg.k
    all_positive = np.asarray(encode(random_dictionary(cfg, threshold=0.0), x, cfg))
    relu = encode(random_dictionary(cfg), x, dataclasses.replace(cfg, activation="relu"))
    np.testing.assert_allclose(all_positive, relu, rtol=1e-5, atol=1e-6)
    alone = encode(random_dictionary(cfg, threshold=0.7), x[:1], cfg)  # with a threshold rows do not compete
    np.testing.assert_allclose(encode(random_dictionary(cfg, threshold=0.7), x, cfg)[:1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_ties_keep_no_more_than_k(activation):
    """Integer and bfloat16-like pre-activations: identity encoder, rows full of equal values."""
    cfg = config(activation, width=F, k=3, subtract_bias=False)
    eye = jnp.eye(F)[None]
    p = {"W_enc": eye, "b_enc": jnp.zeros(F), "W_dec": eye, "b_dec": jnp.zeros((1, F))}
    rng = np.random.default_rng(0)
    integers = rng.integers(-2, 3, (B, 1, F)).astype(np.float32)
    half = np.asarray(jnp.asarray(rng.normal(size=(B, 1, F)), jnp.bfloat16).astype(jnp.float32))
    for x in (integers, np.round(half, 1), np.ones_like(half), np.zeros_like(half), -np.ones_like(half)):
        z = np.asarray(codes(p, x, cfg))
        positive = (x > 0).sum((1, 2))
        if activation == "topk":
            np.testing.assert_array_equal((z > 0).sum(1), np.minimum(positive, 3))
            np.testing.assert_array_equal(-np.sort(-z)[:, :3], np.maximum(-np.sort(-x[:, 0])[:, :3], 0))
        else:
            assert (z > 0).sum() == min(positive.sum(), 3 * B)
        assert ((z == 0) | (z == x[:, 0])).all()


def test_codes_of_a_bank_are_those_of_its_members():
    cfg = VARIANTS["batch_topk, two heads, token"]
    members = [random_dictionary(cfg, seed, threshold) for seed, threshold in ((0, 0.5), (1, -1.0), (2, 0.9))]
    bank, x = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members), raw_rows(cfg)
    z_GBF = jax.jit(jax.vmap(lambda d: dictionary.encode(d, x, cfg)))(bank)
    for z_BF, member in zip(z_GBF, members, strict=True):
        np.testing.assert_allclose(z_BF, encode(member, x, cfg), rtol=1e-5, atol=1e-6)


def test_a_half_precision_row_is_read_in_float32():
    cfg = VARIANTS["relu"]
    x = jnp.asarray(raw_rows(cfg), jnp.bfloat16)
    d = random_dictionary(cfg)
    xhat, z = reconstruct(d, x, cfg)
    assert xhat.dtype == z.dtype == jnp.float32
    np.testing.assert_array_equal(z, encode(d, x.astype(jnp.float32), cfg))


# --- norms ---


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("scale", ["none", "mean_norm", "mean_square", "token"])
def test_normalised_rows_are_what_the_configuration_says_and_come_back(scale, centre, heads):
    cfg = config(scale=scale, centre=centre, heads=heads)
    x = raw_rows(cfg, n=200) * np.array([1.0, 30.0], np.float32)[:heads, None] + np.float32(5)
    norm = dictionary.fit_norm(jnp.asarray(x), cfg)
    y, undo = dictionary.normalise(norm, jnp.asarray(x), cfg)
    back = dictionary.denormalise(norm, y, undo)
    np.testing.assert_allclose(back, x, rtol=2e-4, atol=2e-3)
    y = np.asarray(y, np.float64)
    length = np.linalg.norm(y, axis=-1)
    if scale == "mean_norm":
        np.testing.assert_allclose(length.mean(0), np.sqrt(D), rtol=1e-4)
    elif scale == "mean_square":
        np.testing.assert_allclose(np.square(length).mean(0), D, rtol=1e-4)
    elif scale == "token":
        np.testing.assert_allclose(y.std(-1, ddof=1), 1.0, rtol=1e-3)
        np.testing.assert_allclose(y.mean(-1), 0.0, atol=1e-4)
    else:
        np.testing.assert_allclose(y, x - centre * x.astype(np.float64).mean(0), rtol=1e-4, atol=1e-4)
    if centre and scale != "token":
        np.testing.assert_allclose(y.mean(0), 0.0, atol=1e-4)
    if not centre:
        assert not norm["mean"].any()


# --- starts ---


def test_a_start_is_tied_unit_and_the_same_in_every_head():
    cfg = config("jumprelu", heads=2, threshold_init=0.25)
    start = np.arange(2 * D, dtype=np.float32).reshape(2, D)
    p = dictionary.init(jax.random.key(3), cfg, decoder_norm=0.5, b_dec_HD=start)
    np.testing.assert_array_equal(p["W_enc"], p["W_dec"])
    np.testing.assert_array_equal(p["W_dec"][0], p["W_dec"][1])
    np.testing.assert_allclose(np.linalg.norm(p["W_dec"], axis=-1), 0.5, rtol=1e-5)
    np.testing.assert_array_equal(p["b_dec"], start)
    np.testing.assert_allclose(np.exp(p["log_threshold"]), 0.25, rtol=1e-6)
    assert not p["b_enc"].any()
    other = dictionary.init(jax.random.key(4), cfg)
    assert np.abs(other["W_dec"] - 2 * p["W_dec"]).max() > 0.1
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(p)]
    assert len(set(pointers)) == len(pointers)  # a loop may donate them


def test_the_geometric_median_has_the_least_summed_distance():
    """Against a search over a fine grid in the plane; half the points far out on one side do not drag it along."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(30, 2)), rng.normal(size=(14, 2)) + [40, 10]]).astype(np.float32)
    median = np.asarray(jax.jit(dictionary.geometric_median)(x))
    grid = np.stack(np.meshgrid(*(np.linspace(c - 0.5, c + 0.5, 201) for c in median), indexing="ij"), -1)
    summed = np.linalg.norm(x[:, None, None] - grid[None], axis=-1).sum(0)
    best = grid[np.unravel_index(summed.argmin(), summed.shape)]
    np.testing.assert_allclose(median, best, atol=0.006)
    assert np.linalg.norm(median) < 3 < np.linalg.norm(x.mean(0))
    middle = np.array([[0.0], [1.0], [10.0]], np.float32)  # the median is a point of the data
    np.testing.assert_allclose(dictionary.geometric_median(middle, 500), [1.0], atol=1e-2)


@pytest.mark.parametrize("decoder", ["unit", "free"])
def test_the_searched_norm_reconstructs_best(decoder):
    """The errors are those of every norm tried by hand; the parameters are of the best."""
    cfg = config("topk", decoder=decoder, heads=2)
    p = as64(dictionary.init(jax.random.key(0), cfg))
    y, norms = raw_rows(cfg), np.array([0.05, 0.2, 0.6, 1.2, 3.0])
    found, error_X = dictionary.search_norm(jax.tree.map(jnp.float32, p), jnp.asarray(y), cfg, norms)
    expected = []
    for norm in norms:
        there = p | {"W_enc": p["W_enc"] * norm, "W_dec": p["W_dec"] * (norm if decoder == "free" else 1.0)}
        z = oracle_codes(there, y, cfg)
        xhat = np.stack([z @ there["W_dec"][h] for h in range(2)], 1)
        expected.append(np.square(y - xhat).sum((1, 2)).mean())
    np.testing.assert_allclose(error_X, expected, rtol=1e-4)
    best = norms[np.argmin(expected)]
    assert best not in (norms[0], norms[-1])
    np.testing.assert_allclose(np.linalg.norm(found["W_enc"], axis=-1), best, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found["W_dec"], axis=-1), best if decoder == "free" else 1.0, rtol=1e-5)


def test_unit_decoders_and_their_tangent():
    W = np.random.default_rng(0).normal(size=(2, F, D)).astype(np.float32)
    W[1, 3] = 0
    unit = np.asarray(dictionary.unit_decoder(jnp.asarray(W)))
    norms = np.linalg.norm(unit, axis=-1)
    assert norms[1, 3] == 0 and np.isfinite(unit).all()
    norms[1, 3] = 1
    np.testing.assert_allclose(norms, 1.0, rtol=1e-6)
    g = np.random.default_rng(1).normal(size=W.shape).astype(np.float32)
    along = np.asarray(dictionary.tangent(jnp.asarray(g), jnp.asarray(unit)))
    np.testing.assert_allclose((along * unit).sum(-1), 0.0, atol=1e-5)
    np.testing.assert_allclose(along + (g * unit).sum(-1, keepdims=True) * unit, g, atol=1e-5)


# --- checkpoints ---


@pytest.mark.parametrize("bank", [False, True])
@pytest.mark.parametrize("name", ["gated", "jumprelu, two heads"])
def test_a_dictionary_comes_back_from_disk(tmp_path, name, bank):
    """Its scales beside the weights, its prefixes a tuple; one and a bank of three."""
    cfg = VARIANTS[name]
    cfg = cfg if name == "gated" else dataclasses.replace(cfg, prefixes=(3, F))
    saved = random_dictionary(cfg)
    if bank:
        saved = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(random_dictionary(cfg, g) for g in range(3)))
    dictionary.save(tmp_path / "d", saved, cfg, step=7, extra={"sites": [["resid", 3]]})
    tree, found, about = dictionary.load(tmp_path / "d")
    assert found == cfg and hash(found) == hash(cfg)
    assert (about.kind, about.step, about.extra) == ("dictionary", 7, {"sites": [["resid", 3]]})
    jax.tree.map(np.testing.assert_array_equal, tree, saved)
    if not bank:
        np.testing.assert_array_equal(encode(tree, raw_rows(cfg), cfg), encode(saved, raw_rows(cfg), cfg))


def refused(path, *words):
    with pytest.raises(InputError) as caught:
        dictionary.load(path)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_what_is_no_dictionary_is_refused(tmp_path):
    cfg = config()
    d = random_dictionary(cfg)
    checkpoint.save(tmp_path / "readout", d, kind="readout", config=dataclasses.asdict(cfg))
    refused(tmp_path / "readout", "readout", "dictionary")
    refused(tmp_path / "nothing", "does not exist")
    checkpoint.save(tmp_path / "config", d, kind="dictionary", config={"width": 4, "prefixes": [], "depth": 2})
    refused(tmp_path / "config", "config", "depth")
    checkpoint.save(
        tmp_path / "choice", d, kind="dictionary", config=dataclasses.asdict(cfg) | {"activation": "softmax"}
    )
    refused(tmp_path / "choice", "softmax", "batch_topk")


def without(tree, *path):
    tree = dict(tree)
    if len(path) == 1:
        del tree[path[0]]
    else:
        tree[path[0]] = without(tree[path[0]], *path[1:])
    return tree


DAMAGE = {
    "fewer latents": lambda d: d | {"params": d["params"] | {"b_enc": d["params"]["b_enc"][:-1]}},
    "no threshold": lambda d: without(d, "threshold"),
    "no norm": lambda d: without(d, "norm"),
    "no bias": lambda d: without(d, "params", "b_enc"),
    "scale of two heads": lambda d: d | {"norm": d["norm"] | {"scale": jnp.ones(2)}},
    "params of a bank": lambda d: d | {"params": jax.tree.map(lambda leaf: leaf[None], d["params"])},
    "threshold of a bank": lambda d: d | {"threshold": jnp.ones(3)},
}


@pytest.mark.parametrize("name", DAMAGE)
def test_arrays_that_the_configuration_does_not_describe_are_refused(tmp_path, name):
    cfg = config()
    dictionary.save(tmp_path / "d", DAMAGE[name](random_dictionary(cfg)), cfg)
    refused(tmp_path / "d", "shapes")


# --- bad input ---


def test_rows_of_another_width_are_refused():
    cfg = config(heads=2)
    d = random_dictionary(cfg)
    for shape in ((B, 1, D), (B, 2, D + 1), (B, D), (2, D), (B, D, 2)):
        for read in (dictionary.encode, dictionary.reconstruct):
            with pytest.raises(InputError, match=r"give \[rows, 2, 5\]$"):
                read(d, jnp.zeros(shape), cfg)
    token = config(scale="token")
    with pytest.raises(ValueError, match="reconstruct"):
        dictionary.decode(random_dictionary(token), jnp.zeros((B, F)), token)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"activation": "softmax"}, "choose one of relu, gated, topk"),
        ({"scale": "rms"}, "choose one of none, mean_norm"),
        ({"decoder": "tied"}, "choose one of unit, free"),
        ({"penalty": "l2"}, "choose one of l1, l0, tanh"),
        ({"straight_through": "tau3"}, "choose one of tau2, tau1"),
        ({"width": 0}, "width is 0; it must be a positive integer"),
        ({"latents": -1}, "latents is -1"),
        ({"heads": 1.0}, "heads is 1.0"),
        ({"k": 0}, "k is 0"),
        ({"k": F + 1}, "lower k or widen it"),
        ({"activation": "topk", "k": F + 1}, "lower k or widen it"),
        ({"bandwidth": 0.0}, "bandwidth is 0.0; it must be positive"),
        ({"threshold_init": float("nan")}, "threshold_init is nan"),
        ({"activation": "jumprelu"}, "needs the penalty l0, tanh or tanh_quad"),
        ({"activation": "relu", "penalty": "tanh"}, "take l1"),
        ({"activation": "gated", "prefixes": (3, F)}, "not for gated"),
        ({"prefixes": (3, 3, F)}, "must rise"),
        ({"prefixes": (4, 3, F)}, "must rise"),
        ({"prefixes": (3, F - 1)}, f"end with latents = {F}"),
        ({"prefixes": (0, F)}, "must rise"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(InputError) as caught:
        DictionaryConfig(**({"width": D, "latents": F, "k": 3} | changes))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_k_does_not_bound_what_has_no_k():
    """A narrow relu dictionary takes the default k = 32."""
    assert DictionaryConfig(D, 4, activation="relu").latents == 4


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"steps": 0}, "steps"),
        ({"batch": 2.0}, "batch"),
        ({"dead_after": 0}, "dead_after"),
        ({"lr_warmup": 1.5}, "lr_warmup"),
        ({"threshold_decay": -0.1}, "threshold_decay"),
        ({"sparsity_warmup": float("nan")}, "sparsity_warmup"),
        ({"aux_norm": "mean"}, "choose one of variance, none"),
        ({"aux_k": -1}, "aux_k"),
    ],
)
def test_training_configurations_that_make_no_sense_are_refused(changes, word):
    with pytest.raises(InputError, match=word) as caught:
        TrainConfig(**({"steps": 10} | changes))
    assert "\n" not in str(caught.value)


def test_a_configuration_survives_json():
    cfg = config("topk", prefixes=(3, F))
    read = json.loads(json.dumps(dataclasses.asdict(cfg)))
    assert DictionaryConfig(**(read | {"prefixes": tuple(read["prefixes"])})) == cfg
