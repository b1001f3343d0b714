"""Crosscoders: gates and codes per head against plain [B, H, F] arrays in NumPy float64, then what must hold of any."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax import checkpoint, parallel
from bert6_jax import train as loop
from bert6_jax.errors import InputError
from sae_jax import activations, dictionary, losses, train
from sae_jax.config import DictionaryConfig, TrainConfig
from sae_jax.losses import Hyper


def neighbour(name):
    spec = importlib.util.spec_from_file_location(f"sae_jax_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_losses, _train = neighbour("test_losses"), neighbour("test_train")
as32, differences, eager_aux, variance = (
    getattr(_losses, name) for name in ("as32", "differences", "eager_aux", "variance")
)
close, init_state = _train.close, _train.init_state

B, H, D, F, K = 20, 3, 5, 12, 3
EPS = 2.0
PROGRESS, WARM = 0.55, 0.55 / 0.8
HYPER = Hyper(k=K, sparsity=0.3, pre_act=0.2, aux=0.5)
TRAIN = TrainConfig(100, batch=B, sparsity_warmup=0.8, aux_k=2)
# eps: with 1e-8 Adam makes steps of rounding errors where gradients are nearly 0
SHORT = TrainConfig(10, batch=B, eps=1e-3, lr_warmup=0.2, dead_after=3 * B, aux_k=3, threshold_decay=0.8)


def config(activation="jumprelu", gate="per_head", **changes):
    base = {"width": D, "latents": F, "heads": H, "gate": gate, "decoder": "free", "k": 4}
    if activation == "jumprelu":
        base |= {"penalty": "tanh_quad", "bandwidth": EPS}
        base |= {"code_norm": "per_head"} if gate == "per_head" else {}
    return DictionaryConfig(**(base | {"activation": activation} | changes))


def data(cfg, seed=0):
    """Parameters away from their start, decoder norms of one latent far apart, and normalised rows."""
    rng = np.random.default_rng(seed)
    like = jax.eval_shape(lambda: dictionary.init(jax.random.key(0), cfg))
    p = {name: rng.normal(size=leaf.shape) * 0.4 for name, leaf in sorted(like.items())}
    p["W_dec"] *= rng.uniform(0.2, 1.8, (cfg.heads, F))[:, :, None]
    if "log_threshold" in p:
        p["log_threshold"] = np.log(rng.uniform(0.1, 0.7, F))
    return p, rng.normal(size=(B, cfg.heads, D))


def dictionary_of(p, cfg, threshold=0.5, seed=7):
    rng = np.random.default_rng(seed)
    norm = {"mean": rng.normal(size=(cfg.heads, D)), "scale": 0.05 * np.array([1.0, 5.0, 20.0, 3.0, 9.0])[: cfg.heads]}
    return as32({"params": p, "norm": norm, "threshold": threshold})


def raw(d, y):
    """The raw rows whose normalised ones are y."""
    return jnp.asarray(y / np.asarray(d["norm"]["scale"])[:, None] + np.asarray(d["norm"]["mean"]), jnp.float32)


# --- the oracle: one array [B, H, F] for everything ---


def over_heads(n, kind):
    return {"none": np.ones(n.shape[1]), "l2": np.sqrt(np.square(n).sum(0)), "l1": n.sum(0)}[kind]


def latents(p, y, cfg, at, k=K):
    """pre [B, F], what each head's gate reads and lets through [B, H, F], and the level it must exceed."""
    product = sum((y[:, h] - p["b_dec"][h] * cfg.subtract_bias) @ p["W_enc"][h].T for h in range(cfg.heads))
    product = product / (cfg.heads if cfg.aggregate == "mean" else 1)
    pre = product + p["b_enc"]
    n = np.linalg.norm(at["W_dec"], axis=-1)
    g = n if cfg.gate == "per_head" else np.repeat(over_heads(n, cfg.gate_norm)[None], cfg.heads, 0)
    read = pre[:, None] * g
    if cfg.activation == "relu":
        level = 0.0
    elif cfg.activation == "gated":
        f = (pre > 0) * np.maximum(np.exp(p["r_mag"]) * product + p["b_mag"], 0)
        return pre, read, np.repeat(f[:, None], cfg.heads, 1), 0.0
    elif cfg.activation == "jumprelu":
        level = np.exp(p["log_threshold"])
    elif cfg.activation == "topk":
        ranked = -np.sort(-read, axis=2)
        level = np.maximum(ranked[:, :, k - 1 : k] + ranked[:, :, k : k + 1], 0) / 2
    else:  # every head of a shared gate reads the same: k B H of all are k B of each
        ranked = -np.sort(-read, axis=None)
        level = max(ranked[k * B * cfg.heads - 1] + ranked[k * B * cfg.heads], 0) / 2
    assert np.abs(read - level).min() > 1e-5, "another seed: too close to a level"
    return pre, read, pre[:, None] * (read > level), level


def decoded(p, f):
    return np.einsum("bhf,hfd->bhd", f, p["W_dec"]) + p["b_dec"]


def oracle(p, y, cfg, at=None, dead=None, hyper=HYPER, p_weight=1.0):
    """The loss at `p`; what is frozen (gates' norms, gated's second decoder, the error of aux) is read at `at`."""
    at = p if at is None else at
    pre, read, f, level = latents(p, y, cfg, at)
    n, z, H = np.linalg.norm(p["W_dec"], axis=-1), f.max(1), cfg.heads
    per_head = cfg.code_norm == "per_head"
    codes, weights = (f, n) if per_head else (z[:, None], over_heads(n, cfg.code_norm)[None])
    share = np.where(np.arange(F) < cfg.shared_latents, cfg.shared_penalty, 1.0)
    error = np.square(y - decoded(p, f)).sum((1, 2)).mean()
    penalty = extra = aux = 0.0
    if cfg.activation in ("relu", "gated"):
        exponent = 1 + (cfg.p_end - 1) * np.floor(PROGRESS * cfg.p_stages) / max(cfg.p_stages - 1, 1)
        paid = np.maximum(pre, 0) * weights
        paid = share * np.where(paid > 0, np.abs(paid) ** exponent, 0)
        penalty = WARM * hyper.sparsity * p_weight * paid.sum(1).mean()
    if cfg.activation == "gated":
        on = np.repeat(np.maximum(pre, 0)[:, None], H, 1)
        extra = np.square(y - decoded(p | {name: at[name] for name in ("W_dec", "b_dec")}, on)).sum((1, 2)).mean()
    if cfg.activation == "jumprelu":
        cost = (codes > 0) * 1.0 if cfg.penalty == "l0" else np.tanh(cfg.tanh_scale * codes * weights)
        p_F = cost.mean((0, 1))
        each = p_F * (1 + p_F / cfg.quad_scale) if cfg.penalty == "tanh_quad" else p_F
        penalty = WARM * hyper.sparsity * cost.shape[1] * (share * each).sum()
        if cfg.gate == "shared" and cfg.gate_norm == "none":
            below = np.maximum(level - pre, 0) * weights.sum(0)
        else:
            below = np.maximum(level - read, 0)[:, : H if cfg.gate == "per_head" else 1].sum(1)
        penalty += hyper.pre_act * below.sum(1).mean()
    if dead is not None:
        residual = y - decoded(at, latents(at, y, cfg, at)[2])
        aux = hyper.aux * eager_aux(p, residual, pre, dead, TRAIN.aux_k, variance(residual) / variance(y))
    return {"loss": error + penalty + extra + aux, "error": error, "penalty": penalty, "aux": aux}


def threshold_gradient(p, y, cfg, hyper=HYPER):
    """d loss / d log tau, the straight-through formulas by hand: -tau^2 / (epsilon n) dL/df in the window of pre n."""
    pre, read, f, tau = latents(p, y, cfg, p)
    n = np.linalg.norm(p["W_dec"], axis=-1)
    g = n if cfg.gate == "per_head" else np.repeat(over_heads(n, cfg.gate_norm)[None], H, 0)
    window = (np.abs(read - tau) < EPS / 2) & (read > 0)
    assert window.any() and ((np.abs(read - tau) < EPS / 2) & (read <= 0)).any()  # what the mask is about
    per_head = cfg.code_norm == "per_head"
    weights = n if per_head else np.concatenate([over_heads(n, cfg.code_norm)[None], np.zeros((H - 1, F))])
    share = np.where(np.arange(F) < cfg.shared_latents, cfg.shared_penalty, 1.0)
    chain = tau if cfg.straight_through == "tau2" else np.ones(F)
    df = np.einsum("bhd,hfd->bhf", -2 / B * (y - decoded(p, f)), p["W_dec"])
    heads = H if per_head else 1
    weight = WARM * hyper.sparsity * share / B
    if cfg.penalty != "l0":
        tanh = np.tanh(cfg.tanh_scale * f * weights)
        if cfg.penalty == "tanh_quad":
            weight = weight * (1 + 2 * tanh.sum((0, 1)) / (B * heads) / cfg.quad_scale)
        df += weight * cfg.tanh_scale * weights * (1 - tanh**2)
    gradient = -(df * window * tau * chain / (EPS * g)).sum((0, 1))
    if cfg.penalty == "l0":
        gradient -= (weight * window * chain / EPS)[:, :heads].sum((0, 1))
    if cfg.gate == "shared" and cfg.gate_norm == "none":
        return gradient + hyper.pre_act / B * ((pre < tau) * weights.sum(0) * tau).sum(0)
    lower = (read < tau)[:, : H if cfg.gate == "per_head" else 1]
    return gradient + hyper.pre_act / B * (lower * tau).sum((0, 1))


SHARED = {"gate": "shared"}
VARIANTS = {
    "per head, tanh, tau2": config(penalty="tanh"),
    "per head, tanh, tau1, no bias subtracted": config(penalty="tanh", straight_through="tau1", subtract_bias=False),
    "per head, tanh_quad, tau2": config(),
    "per head, tanh_quad, tau1, mean": config(straight_through="tau1", aggregate="mean"),
    "per head, l0, tau2": config(penalty="l0"),
    "per head, l0, tau1, shared latents": config(
        penalty="l0", straight_through="tau1", shared_latents=4, shared_penalty=0.2
    ),
    "shared, codes none": config(**SHARED, code_norm="none"),
    "shared, codes l1": config(**SHARED, code_norm="l1", penalty="tanh", straight_through="tau1"),
    "shared, codes per head, l0": config(**SHARED, code_norm="per_head", penalty="l0"),
    "shared l2, codes l2": config(**SHARED, gate_norm="l2"),
    "shared l2, codes per head": config(**SHARED, gate_norm="l2", code_norm="per_head"),
    "shared l1, codes l1, l0, tau1": config(
        **SHARED, gate_norm="l1", code_norm="l1", penalty="l0", straight_through="tau1"
    ),
    "shared l1, codes per head, mean": config(
        **SHARED, gate_norm="l1", code_norm="per_head", aggregate="mean", shared_latents=5, shared_penalty=0.1
    ),
    "relu, l1 of norms": config("relu", **SHARED, code_norm="l1"),
    "relu, l2 of norms, annealed, shared latents": config(
        "relu", **SHARED, code_norm="l2", p_end=0.4, p_stages=5, shared_latents=4, shared_penalty=0.3
    ),
    "gated, l1 of norms, mean": config("gated", **SHARED, code_norm="l1", aggregate="mean"),
    "batch_topk": config("batch_topk", **SHARED),
    "batch_topk l1": config("batch_topk", **SHARED, gate_norm="l1"),
    "batch_topk l2, mean": config("batch_topk", **SHARED, gate_norm="l2", aggregate="mean"),
    "batch_topk per head": config("batch_topk"),
    "batch_topk per head, mean, no bias subtracted": config("batch_topk", aggregate="mean", subtract_bias=False),
    "topk l1": config("topk", **SHARED, gate_norm="l1"),
    "topk l2, by rows": config("topk", **SHARED, gate_norm="l2", heads=1),
}  # fmt: skip


def everything(d, x, y, k, cfg, dead):
    """Codes, what each head lets through, both ways to a reconstruction, and the loss's gradients and parts."""
    xhat, z = dictionary.reconstruct(d, x, cfg)
    f = jax.vmap(lambda head: dictionary.at_head(d, z, cfg, head))(jnp.arange(cfg.heads))
    decoded = dictionary.decode(d, dictionary.encode(d, x, cfg), cfg)

    def loss(p):
        return losses.loss(
            p, y, cfg, TRAIN, as32(HYPER)._replace(k=k), dead_F=jnp.asarray(DEAD) if dead else None,
            progress=jnp.float32(PROGRESS), p_weight=jnp.float32(1.3),
        )  # fmt: skip

    return z, f, decoded, xhat, jax.grad(loss, has_aux=True)(d["params"])


everything = jax.jit(everything, static_argnames=("cfg", "dead"))
DEAD = np.isin(np.arange(F), (1, 8))
WITH_DEAD = ("per head, tanh_quad, tau1, mean", "batch_topk per head", "topk l1", "topk l2, by rows")


@pytest.mark.parametrize("name", VARIANTS)
def test_codes_loss_and_gradients_are_the_equations(name):
    """At three scales of the raw rows, some with two dead latents; the gate's norms are frozen, the threshold has its
    own formula."""
    cfg = VARIANTS[name]
    p, y = data(cfg)
    pre, read, f, level = latents(p, y, cfg, p)
    assert 0 < (f > 0).sum() < (pre > 0).sum() * cfg.heads or cfg.activation == "relu"
    dead = DEAD if name in WITH_DEAD else None
    d = dictionary_of(p, cfg, threshold=level if cfg.activation == "batch_topk" else -1.0)
    d |= {"k": jnp.int32(K)}
    z, heads, decoded_, xhat, (grads, parts) = everything(d, raw(d, y), as32(y), jnp.int32(K), cfg, dead is not None)
    np.testing.assert_allclose(z, f.max(1), rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(jnp.moveaxis(heads, 0, 1), f, rtol=1e-4, atol=2e-5)
    expected = decoded(p, f) / np.asarray(d["norm"]["scale"])[:, None] + np.asarray(d["norm"]["mean"])
    for found in (decoded_, xhat):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    def total(moved):
        return oracle(moved, y, cfg, p, dead, p_weight=1.3)

    for part, value in total(p).items():
        np.testing.assert_allclose(getattr(parts, part), value, rtol=2e-5, atol=1e-6, err_msg=part)
    assert (parts.aux > 0) == (dead is not None) and (parts.penalty > 0 or "topk" in name)
    np.testing.assert_allclose(parts.l0, (f > 0).sum() / (B * cfg.heads), rtol=1e-6)
    np.testing.assert_array_equal(parts.fired_F, (f > 0).any((0, 1)))
    if cfg.activation != "gated":
        np.testing.assert_allclose(parts.least, read[f > 0].min(), rtol=1e-4)
    for leaf, slope in differences(lambda moved: total(moved)["loss"], p, skip=["log_threshold"]).items():
        np.testing.assert_allclose(grads[leaf], slope, rtol=1e-3, atol=5e-5, err_msg=leaf)
    if cfg.activation == "jumprelu":
        np.testing.assert_allclose(grads["log_threshold"], threshold_gradient(p, y, cfg), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("share, value", [(1e-3, 0.0011), (0.01, 0.02), (0.1, 1.1), (0.5, 25.5)])
def test_tanh_quad_by_hand(share, value):
    """p (1 + p / s) with s = 0.01; of three heads that all pay p it is three times that, of one that pays it alone the
    square is of the mean over heads."""
    cfg = config(latents=1)
    b_enc = jnp.full(1, np.arctanh(share) / 4, jnp.float32)
    W_enc, W_dec = jnp.zeros((H, 1, D)), jnp.zeros((H, 1, D)).at[:, :, 0].set(1.0)
    p = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": jnp.zeros((H, D))}
    p |= {"log_threshold": jnp.full(1, -20.0)}

    @jax.jit
    def penalty(p):
        hyper, progress = Hyper(sparsity=1.0), jnp.float32(1.0)
        return losses.loss(p, jnp.zeros((B, H, D)), cfg, TRAIN, hyper, dead_F=None, progress=progress)[1].penalty

    np.testing.assert_allclose(penalty(p), H * value, rtol=1e-4)
    alone = share / H
    np.testing.assert_allclose(penalty(p | {"W_dec": W_dec.at[1:].set(0.0)}), H * alone * (1 + alone / 0.01), rtol=1e-4)


def test_straight_through_with_norms_by_hand():
    """tau = 0.4, window 0.4 +- 0.5 of pre n; only z's gradient carries 1 / n, negative readings have none."""
    pre = jnp.array([[-0.05, 0.05, 0.3, 0.5, 0.3, 0.1, 1.2, 0.3]])
    norm = jnp.array([2.0, 2.0, 2.0, 2.0, 0.5, 2.0, 0.5, 0.0])
    read = np.asarray(pre * norm[None])[0]  # -0.1, 0.1, 0.6, 1.0, 0.15, 0.2, 0.6, 0
    on, window = read > 0.4, np.array([0, 1, 1, 0, 1, 1, 1, 0])
    for convention, chain in (("tau2", 0.4), ("tau1", 1.0)):
        cfg = config(bandwidth=1.0, straight_through=convention)
        for f, value, to_pre, to_tau in (
            (losses.jump, np.asarray(pre[0]) * on, on, -0.4 * chain * window / np.maximum(norm, 1e-9)),
            (losses.active, on, 0 * on, -chain * window),
        ):
            out, pull = jax.vjp(lambda pre, t, f=f, cfg=cfg: f(pre, t, cfg, norm), pre, jnp.log(jnp.full(8, 0.4)))
            g_pre, g_tau = pull(jnp.ones_like(out))
            np.testing.assert_allclose(out[0], value)
            np.testing.assert_allclose(g_pre[0], to_pre)
            np.testing.assert_allclose(g_tau, to_tau, rtol=1e-5)


@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_gradients_stay_bounded_where_a_head_has_next_to_no_decoder(mu):
    """Zero, and 1e-6 of the others: the gate's 1 / n and the pre-activation loss's tau / n reach no parameter."""
    cfg = config()
    p, y = data(cfg)
    gradient = jax.jit(
        jax.grad(
            lambda p: losses.loss(p, as32(y), cfg, TRAIN, Hyper(pre_act=mu), dead_F=None, progress=jnp.float32(1.0))[0]
        )
    )
    usual = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient(as32(p))))
    for size in (0.0, 1e-6):
        W_dec = p["W_dec"].copy()
        W_dec[1] *= size  # one head of all latents, and two latents in every head
        W_dec[:, :2] *= size
        grads = gradient(as32(p | {"W_dec": W_dec}))
        assert all(np.isfinite(leaf).all() and np.abs(leaf).max() < 3 * usual for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("code_norm", ["l2", "l1"])
def test_a_latent_without_a_decoder_has_no_nan(code_norm):
    cfg = config("relu", **SHARED, code_norm=code_norm)
    p, y = data(cfg)
    p["W_dec"][:, 3] = 0

    def loss(p):
        return losses.loss(p, as32(y), cfg, TRAIN, HYPER, dead_F=None, progress=jnp.float32(1.0))[0]

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(as32(p))))


# --- the gates ---


@jax.jit(static_argnums=2)
def at_heads(d, x, cfg):
    z = dictionary.encode(d, x, cfg)
    return z, jnp.stack([dictionary.at_head(d, z, cfg, head) for head in range(cfg.heads)], 1)


@pytest.mark.parametrize("activation", ["jumprelu", "batch_topk"])
def test_heads_fire_in_the_order_of_their_decoders(activation):
    """Where a head is off, so is every head with a smaller decoder; with a shared gate all fire together."""
    for cfg in (config(activation), config(activation, gate="shared", gate_norm="l1")):
        p, y = data(cfg, seed=3)
        d = dictionary_of(p, cfg, 0.5)
        z, f = map(np.asarray, at_heads(d, raw(d, y), cfg))
        n = np.linalg.norm(p["W_dec"], axis=-1)
        on = np.take_along_axis(f > 0, np.argsort(n, axis=0)[None], axis=1)
        assert (on[:, :-1] <= on[:, 1:]).all() and (on[:, -1] == (z > 0)).all()
        alike = (on == on[:, :1]).all()
        assert 0 < on.sum() < on.size and alike == (cfg.gate == "shared")
        assert np.isin(f, np.concatenate([[0], z.ravel()])).all()


GATES = {
    "per head": config(),
    "batch_topk per head": config("batch_topk"),
    "shared, none": config(**SHARED),
    "shared, l2": config(**SHARED, gate_norm="l2"),
    "batch_topk l1": config("batch_topk", **SHARED, gate_norm="l1"),
}


def heads_of(d, heads):
    """The dictionary with its heads reordered; -1 makes one that is all zeros."""

    def pick(leaf):
        rows = [leaf[h] if h >= 0 else jnp.zeros_like(leaf[0]) for h in heads]
        return jnp.stack(rows)

    per_head = ("W_enc", "W_dec", "b_dec")
    params = d["params"] | {name: pick(d["params"][name]) for name in per_head}
    norm = jax.tree.map(pick, d["norm"])
    return d | {"params": params, "norm": norm | {"scale": jnp.where(norm["scale"] > 0, norm["scale"], 1.0)}}


@pytest.mark.parametrize("name", GATES)
def test_order_and_empty_heads_do_not_matter(name):
    """Heads permuted: the same codes, outputs permuted. Two heads of zeros more: the same codes and outputs, and no
    code at the empty heads of a gate per head."""
    cfg = GATES[name]
    p, y = data(cfg, seed=1)
    d = dictionary_of(p, cfg, 0.5)
    x = raw(d, y)
    reconstruct = jax.jit(dictionary.reconstruct, static_argnums=2)
    xhat, z = reconstruct(d, x, cfg)
    order = [2, 0, 1]
    found, same = reconstruct(heads_of(d, order), x[:, np.array(order)], cfg)
    np.testing.assert_allclose(same, z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found, xhat[:, np.array(order)], rtol=1e-5, atol=1e-5)
    wide, padded = dataclasses.replace(cfg, heads=5), heads_of(d, [0, -1, 1, 2, -1])
    x_wide = jnp.zeros((B, 5, D)).at[:, np.array([0, 2, 3])].set(x)
    found, same = reconstruct(padded, x_wide, wide)
    np.testing.assert_allclose(same, z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[:, np.array([0, 2, 3])], xhat, rtol=1e-5, atol=1e-5)
    assert not found[:, np.array([1, 4])].any()
    _, f = at_heads(padded, x_wide, wide)
    assert (np.asarray(f[:, np.array([1, 4])]).any()) == (cfg.gate == "shared")


@pytest.mark.parametrize("name", ["batch_topk", "batch_topk l2, mean", "batch_topk per head"])
def test_batch_topk_keeps_exactly_so_many(name):
    """k B codes of a shared gate, k B H of a gate per head, for any k; fewer where fewer are positive."""
    cfg = VARIANTS[name]
    codes = jax.jit(lambda p, y, k: dictionary.codes_and_gate(p, y, cfg, k=k))
    for seed in range(3):
        p, y = as32(data(cfg, seed))
        for k in (1, 4):
            z, gate = codes(p, y, jnp.int32(k))
            if cfg.gate == "shared":
                assert (z > 0).sum() == k * B
            else:
                read = np.asarray(z[:, None] * gate.norm_HF[None])
                assert (read > float(gate.level)).sum() == k * B * H
    p |= {"W_enc": jnp.abs(p["W_enc"]), "b_dec": jnp.zeros((H, D))}
    z, _ = codes(p, jnp.full((B, H, D), -100.0).at[0].set(100.0), jnp.int32(4))
    assert (z[0] > 0).all() and not z[1:].any()


# --- training ---


def batch_at(step):
    """Rows of three scales that share few directions, so that latents die."""
    rng = np.random.default_rng(step)
    z = np.maximum(rng.normal(size=(B, 4)) - 0.5, 0)
    directions = np.random.default_rng(99).normal(size=(H, 4, D))
    x = np.einsum("bl,hld->bhd", z, directions) + 0.05 * rng.normal(size=(B, H, D))
    return {"x": (x * np.array([1.0, 5.0, 20.0])[:, None] + np.arange(H)[:, None]).astype(np.float32)}


def run(step, state, steps=10, batches=batch_at):
    return _train.run(step, state, steps, batches)


def start(cfg, hyper, t=SHORT, seed=0, **options):
    """A bank whose heads differ: from the very same rows in every head all norms would be equal."""
    x = np.concatenate([batch_at(step)["x"][:, : cfg.heads] for step in range(4)])
    norm = dictionary.fit_norm(jnp.asarray(x), cfg)
    G = len(hyper)
    params = train.stack([as32(data(cfg, seed + g)[0]) for g in range(G)])
    return init_state(jax.random.key(0), cfg, t, hyper, norm, **({"params": params} | options))


RATES = {"lr": 0.02, "sparsity": 0.05, "pre_act": 0.01, "aux": 0.5, "k": 2}
STEPS = {
    name: (cfg, train.make_step(cfg, SHORT, activations.given))
    for name, cfg in {
        "jumprelu": config(shared_latents=4, shared_penalty=0.2),
        "batch_topk": config("batch_topk"),
    }.items()
}


def test_one_head_with_its_own_gate_is_the_shared_gate_on_its_norm():
    """Bit for bit, through training; of batch_topk it is the same program."""
    cfg = config(heads=1)
    other = dataclasses.replace(cfg, gate="shared", gate_norm="l2", code_norm="l2")
    batches = lambda number: {"x": batch_at(number)["x"][:, :1]}  # noqa: E731
    ends = [
        run(train.make_step(one, SHORT, activations.given), start(one, [Hyper(**RATES)]), 6, batches)
        for one in (cfg, other)
    ]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert np.abs(ends[0][0].params["W_dec"] - start(cfg, [Hyper(**RATES)]).params["W_dec"]).max() > 1e-3
    cfg = config("batch_topk", heads=1)
    programs = []
    for one in (cfg, dataclasses.replace(cfg, gate="shared", gate_norm="l2")):
        step, shapes = step_of(one, B)
        programs.append(step.lower(*shapes).as_text())
    assert programs[0] == programs[1]
    step, shapes = step_of(dataclasses.replace(cfg, gate="shared"), B)
    assert step.lower(*shapes).as_text() != programs[0]


@pytest.mark.parametrize("name", ["batch_topk per head", "batch_topk l1"])
def test_a_threshold_is_learnt_and_encode_then_decode_is_reconstruct(name):
    """After training codes are enough to decode. Before it codes of a gate per head go through every head, while
    `reconstruct` has the batch to rank; a shared gate needs neither."""
    cfg = VARIANTS[name]
    t = TrainConfig(120, batch=B, dead_after=10**6)
    state = start(cfg, [Hyper(lr=0.003, k=2)], t)
    x = np.concatenate([batch_at(step)["x"] for step in range(110, 120)])
    read = jax.jit(
        lambda d: (
            dictionary.reconstruct(d, x, cfg),
            dictionary.decode(d, dictionary.encode(d, x, cfg), cfg),
            dictionary.at_head(d, dictionary.encode(d, x, cfg), cfg, 1),
        )
    )
    before = train.member(state, 0)
    (xhat, z), again, f = read(before)
    assert float(before["threshold"]) < 0
    np.testing.assert_array_equal(f, z)
    assert (np.abs(xhat - again).max() > 1e-3) == (cfg.gate == "per_head")
    state, _ = run(train.make_step(cfg, t, activations.given), state, 120)
    after = train.member(state, 0)
    (xhat, z), again, _ = read(after)
    np.testing.assert_array_equal(xhat, again)
    _, f = at_heads(after, x, cfg)
    l0 = float((f > 0).sum()) / (len(x) * H)
    assert float(after["threshold"]) > 0 and abs(l0 - 2) < 0.5, l0


FOLDED = {
    "per head": config(subtract_bias=False),
    "per head, bias subtracted, mean": config(aggregate="mean"),
    "per head, no bias subtracted, mean": config(aggregate="mean", subtract_bias=False),
    "batch_topk per head": config("batch_topk"),
    "jumprelu l1": config(**SHARED, gate_norm="l1"),
    "jumprelu l2, no bias subtracted": config(**SHARED, gate_norm="l2", subtract_bias=False),
    "batch_topk l1": config("batch_topk", **SHARED, gate_norm="l1"),
    "topk l1": config("topk", **SHARED, gate_norm="l1"),
    "shared": config(**SHARED),
    "relu": config("relu", **SHARED, subtract_bias=False),
    "gated": config("gated", **SHARED, subtract_bias=False, aggregate="mean"),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folded_is_the_same_function(name, tmp_path):
    """Raw rows of scales 1 : 5 : 20 in, codes and raw rows out, after a save too. Without `gate_scale` a gate that
    reads norms lets other codes through, by far more than rounding."""
    cfg = FOLDED[name]
    p, y = data(cfg, seed=2)
    d = dictionary_of(p, cfg, 0.5)
    x = raw(d, y)
    folded = dictionary.fold(d, cfg)
    np.testing.assert_array_equal(folded["norm"]["mean"], 0)
    np.testing.assert_array_equal(folded["norm"]["scale"], 1)
    dictionary.save(tmp_path / "d", folded, cfg)
    loaded, _, _ = dictionary.load(tmp_path / "d")
    jax.tree.map(np.testing.assert_array_equal, loaded, folded)

    @jax.jit
    def read(d):
        return dictionary.reconstruct(d, x, cfg)

    def distance(a, b):
        return max(float(np.linalg.norm(u - v) / np.linalg.norm(v)) for u, v in zip(a, b, strict=True))

    assert distance(read(loaded), read(d)) < 1e-6
    twice = dictionary.fold(folded, cfg)  # its scales are 1 already
    assert distance(read(twice), read(d)) < 1e-6
    without = {part: leaf for part, leaf in folded.items() if part != "gate_scale"}
    reads_norms = cfg.gate == "per_head" or cfg.gate_norm != "none"
    assert (distance(read(without), read(d)) > 0.02) == reads_norms


def test_shared_latents_have_one_decoder_through_training():
    """Bit for bit; their encoders and the other latents go their own ways."""
    unit = config("batch_topk", **SHARED, shared_latents=4, decoder="unit")
    for cfg, step in (STEPS["jumprelu"], (unit, train.make_step(unit, SHORT, activations.given))):
        end, _ = run(step, start(cfg, [Hyper(**RATES)]))
        W = np.asarray(end.params["W_dec"][0])
        for h in (1, 2):
            np.testing.assert_array_equal(W[h, :4], W[0, :4])
        assert (np.abs(W[1, 4:] - W[0, 4:]).max(-1) > 0.1).all()
        assert np.abs(end.params["W_enc"][0, 1, :4] - end.params["W_enc"][0, 0, :4]).max() > 0.1


def test_annealing_keeps_the_penalty_of_shared_latents_too():
    """Their factor is outside of the power: with a rate of 0 the penalty stays where it is while the exponent falls."""
    cfg = config("relu", **SHARED, p_end=0.3, shared_latents=6, shared_penalty=0.1)
    t = dataclasses.replace(SHORT, sparsity_warmup=0.0)
    state = start(cfg, [Hyper(lr=0.0, sparsity=2.0)], t)
    _, metrics = run(train.make_step(cfg, t, activations.given), state, 10, lambda step: batch_at(0))
    rest = metrics["loss_0"] - metrics["error_0"]
    np.testing.assert_allclose(rest, rest[0], rtol=1e-4)


def test_an_exponent_is_for_relu_and_gated_alone():
    """`p_end` of a crosscoder with a code per head is read by nobody."""
    cfg = config(p_end=0.5)
    step = train.make_step(cfg, SHORT, activations.given)
    state, _ = jax.eval_shape(step, start(cfg, [Hyper(**RATES)]), jax.tree.map(jnp.asarray, batch_at(0)))
    assert state.p_weight.shape == (1,)


@pytest.mark.parametrize("activation", STEPS)
def test_a_bank_of_two_is_each_alone(activation):
    cfg, alone = STEPS[activation]
    hyper = [Hyper(**RATES), Hyper(lr=0.005, sparsity=0.2, aux=0.0, k=4)]
    state = start(cfg, hyper)
    bank, metrics = run(train.make_step(cfg, SHORT, activations.given, loop=False), state)
    for g in range(2):
        one = start(cfg, hyper[g : g + 1], params=jax.tree.map(lambda leaf, g=g: leaf[g : g + 1], state.params))
        one, expected = run(alone, one)
        close(train.member(bank, g), train.member(one, 0), rtol=1e-4, atol=1e-5)
        for part in ("loss", "error", "l0", "dead"):
            np.testing.assert_allclose(metrics[f"{part}_{g}"], expected[f"{part}_0"], rtol=1e-4, atol=1e-6)


def fitted(activation, mesh, **options):
    cfg, step = STEPS[activation]
    seen = []
    end = loop.fit(
        step, start(cfg, [Hyper(**RATES)]), options.pop("batch_at", batch_at), mesh=mesh, quiet=True,
        on_metrics=lambda _, metrics: seen.append(metrics["loss"]), **({"cfg": loop.FitConfig(10)} | options),
    )  # fmt: skip
    return end, np.array(seen)


@pytest.mark.parametrize("activation", STEPS)
def test_the_loss_does_not_depend_on_the_mesh(activation):
    """p of tanh_quad is squared after its mean over all rows, the largest are those of the whole batch; latents really
    lie apart over `model`."""
    cfg, step = STEPS[activation]
    reference, metrics = run(step, start(cfg, [Hyper(**RATES)]))
    expected = metrics["loss"]
    for shape in [(1, 1), (4, 1), (2, 2), (1, 4)] if activation == "jumprelu" else [(2, 2)]:
        end, found = fitted(activation, parallel.make_mesh(*shape))
        assert len(found) == 10 and found[-1] < found[0]
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=str(shape))
        close(end.params, jax.device_get(reference.params), rtol=1e-3, atol=1e-4)
        for leaf in (end.params["W_dec"], end.params["W_enc"], end.opt_state.mu["W_dec"]):
            assert leaf.sharding.shard_shape(leaf.shape) == (1, H, F // shape[1], D)


def test_a_resumed_crosscoder_is_an_uninterrupted_one(tmp_path):
    reference, _ = fitted("jumprelu", None)

    def batches(number):
        if number == 7:
            raise ZeroDivisionError
        return batch_at(number)

    cfg = loop.FitConfig(10, checkpoint_every=3)
    with pytest.raises(ZeroDivisionError):
        fitted("jumprelu", None, batch_at=batches, folder=tmp_path, cfg=cfg)
    assert checkpoint.steps(tmp_path)[-1] == 6
    end, _ = fitted("jumprelu", None, folder=tmp_path, cfg=cfg)
    jax.tree.map(np.testing.assert_array_equal, end, reference)


# --- memory ---


def largest_array(jaxpr) -> int:
    """Elements of the largest array that any equation makes, those inside of loops and conditions included."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [getattr(variable.aval, "size", 0) for variable in equation.outvars]
        sizes += [largest_array(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params)]
    return max(sizes)


def step_of(cfg, rows):
    """A step and its arguments as shapes, for programs that are looked at and never run."""
    t = dataclasses.replace(SHORT, batch=rows)
    norm = {"mean": np.zeros((cfg.heads, cfg.width), np.float32), "scale": np.ones(cfg.heads, np.float32)}
    state = jax.eval_shape(lambda: train.init_state(jax.random.key(0), cfg, t, [Hyper(**RATES)], norm))
    batch = {"x": jax.ShapeDtypeStruct((rows, cfg.heads, cfg.width), jnp.float32)}
    return jax.jit(train.make_step(cfg, t, activations.given)), (state, batch)


BIG = {
    "jumprelu per head": config(width=4, latents=512),
    "batch_topk per head": config("batch_topk", width=4, latents=512),
    "shared, codes per head": config(**SHARED, gate_norm="l2", code_norm="per_head", width=4, latents=512),
}


@pytest.mark.parametrize("name", BIG)
def test_no_array_of_all_rows_heads_and_latents_exists(name):
    """Not in the step as traced; nor does what its gradients keep, compiled, grow with heads as such an array would."""
    rows, temporary = 256, {}
    for heads in (2, 8):
        cfg = dataclasses.replace(BIG[name], heads=heads)
        step, (state, batch) = step_of(cfg, rows)
        program = step.trace(state, batch).jaxpr.jaxpr
        assert rows * cfg.latents <= largest_array(program) < 2 * rows * cfg.latents

        def loss(p, y, cfg=cfg):
            return losses.loss(p, y, cfg, TRAIN, HYPER, dead_F=None, progress=jnp.float32(1.0))[0]

        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state.params), batch["x"]
        compiled = jax.jit(jax.grad(loss)).lower(*shapes).compile()
        temporary[heads] = compiled.memory_analysis().temp_size_in_bytes
    assert rows * cfg.latents * 4 <= temporary[2]
    # one array of codes a head would be 1; candidate lists and what a compiler keeps (JAX 0.12: 0.37) are less
    assert (temporary[8] - temporary[2]) / 6 < 0.5 * 4 * rows * cfg.latents


def test_the_look_for_large_arrays_finds_them():
    def inside(z, n):
        def one(row):
            return jax.lax.cond(row.sum() > 0, lambda row: (row[None] * n).sum(), lambda row: 0.0, row)

        return jax.lax.map(one, z)

    sizes = jnp.zeros((7, 5)), jnp.zeros((3, 5))
    assert largest_array(jax.make_jaxpr(inside)(*sizes).jaxpr) == 15
    assert largest_array(jax.make_jaxpr(lambda z, n: (z[:, None] * n[None]).sum())(*sizes).jaxpr) == 105


# --- starts, schedules, configurations ---


@pytest.mark.parametrize("cfg", [config(heads=4), config("batch_topk", heads=4), config(heads=4, **SHARED)])
def test_the_searched_norm_of_four_heads_reconstructs_better(cfg):
    """Than the norm 1 of a fresh start, by the parameters it returns; the second grid lies around the best of the
    first."""
    rng = np.random.default_rng(0)
    z, directions = np.maximum(rng.normal(size=(B, 6)), 0), rng.normal(size=(4, 6, D))
    y = jnp.asarray(np.einsum("bl,hld->bhd", z, directions), jnp.float32)

    @jax.jit
    def errors(p):
        found, error_X = dictionary.search_norm(p, y, cfg)

        def error(p):
            z, gate = dictionary.codes_and_gate(p, y, cfg)
            return jnp.square(y - dictionary.reconstruction(p, z, cfg, gate)).sum((1, 2)).mean()

        return found, error_X, error(p), error(found)

    p = dictionary.init(jax.random.key(1), cfg)
    found, error_X, before, after = errors(p)
    np.testing.assert_allclose(after, error_X.min(), rtol=1e-5)
    assert error_X.shape == (20,) and after < 0.9 * before and after < float(jnp.square(y).sum((1, 2)).mean())
    np.testing.assert_array_equal(found["W_enc"], found["W_dec"])
    n = np.linalg.norm(found["W_dec"], axis=-1)
    np.testing.assert_allclose(n, n[0, 0], rtol=1e-5)


def test_the_rate_falls_to_its_floor():
    t = TrainConfig(20, lr_warmup=0.25, lr_decay=0.4, lr_floor=1 / 32)
    down = 1 / 32 + 31 / 32 * np.arange(7, 0, -1) / 8
    expected = [*(np.arange(1, 6) / 5), *[1.0] * 8, *down]
    np.testing.assert_allclose([float(train.rate(t, step)) for step in range(20)], expected, rtol=1e-6)
    np.testing.assert_allclose(float(train.rate(t, 20)), 1 / 32, rtol=1e-6)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"gate": "own"}, "choose one of shared, per_head"),
        ({"gate_norm": "l3"}, "choose one of none, l2, l1"),
        ({"code_norm": "max"}, "choose one of none, l2, l1, per_head"),
        ({"aggregate": "max"}, "choose one of sum, mean"),
        ({"penalty": "quad"}, "choose one of l1, l0, tanh, tanh_quad"),
        ({"quad_scale": 0.0}, "quad_scale is 0.0; it must be positive"),
        ({"tanh_scale": -1.0}, "tanh_scale is -1.0; it must be positive"),
        ({"activation": "topk", "code_norm": "l2"}, "a gate per head is for jumprelu and batch_topk"),
        ({"prefixes": (3, F)}, "without nested prefixes"),
        ({"gate_norm": "l2"}, "gate_norm l2 is for a shared gate"),
        ({"code_norm": "l2"}, "set code_norm to per_head too"),
        ({"activation": "batch_topk"}, "code_norm per_head is for jumprelu"),
        ({"activation": "relu", "penalty": "tanh_quad", "code_norm": "l2", **SHARED}, "take l1"),
        ({"activation": "relu", "penalty": "l1", "code_norm": "l2", "gate_norm": "l1", **SHARED}, "no level to"),
        ({"gate_norm": "l2", "code_norm": "l2", "prefixes": (3, F), **SHARED}, "need gate_norm none"),
        ({"shared_latents": F + 1}, f"{F + 1} shared latents of {F}"),
        ({"shared_latents": -1}, "-1 shared latents"),
        ({"shared_latents": 1.5}, "1.5 shared latents"),
        ({"shared_penalty": -0.1}, "a factor from 0 on"),
        ({"shared_penalty": float("nan")}, "a factor from 0 on"),
    ],
)  # fmt: skip
def test_crosscoders_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(InputError) as caught:
        dataclasses.replace(config(), **changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_floor_that_is_no_share_is_refused():
    with pytest.raises(InputError, match=r"lr_floor is 1.5; it must lie in \[0, 1\]") as caught:
        TrainConfig(10, lr_floor=1.5)
    assert "\n" not in str(caught.value)


def test_a_scale_of_each_token_cannot_be_folded():
    cfg = config(scale="token")
    with pytest.raises(InputError, match="nothing can be folded") as caught:
        dictionary.fold(dictionary_of(data(cfg)[0], cfg), cfg)
    assert "\n" not in str(caught.value)
