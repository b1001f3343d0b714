"""Losses against the equations of `sae_jax.dictionary`'s docstring in NumPy float64, gradients against differences."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax.errors import InputError
from sae_jax import dictionary, losses, sparse
from sae_jax.config import DictionaryConfig, TrainConfig
from sae_jax.losses import Hyper

B, D, F = 7, 4, 10
PROGRESS = 0.55
HYPER = Hyper(k=3, sparsity=0.3, pre_act=0.2, aux=0.5)


def config(activation="topk", **changes):
    changes = {"penalty": "l0"} | changes if activation == "jumprelu" else changes
    return DictionaryConfig(**({"width": D, "latents": F, "activation": activation, "k": 4} | changes))


def data(cfg, seed=0):
    """Parameters away from their start and rows to match, away from every kink by more than the differences reach."""
    rng = np.random.default_rng(seed)
    like = jax.eval_shape(lambda: dictionary.init(jax.random.key(0), cfg))
    p = {name: rng.normal(size=leaf.shape) * 0.5 for name, leaf in sorted(like.items())}
    if "log_threshold" in p:
        p["log_threshold"] = np.log(rng.uniform(0.1, 0.8, F))
    return p, rng.normal(size=(B, cfg.heads, D)) * 1.5


def as32(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


# --- the oracle ---


def forward(p, x, cfg, k=3):
    """(pre-activations that rank latents, codes) in float64."""
    product = sum((x[:, h] - p["b_dec"][h] * cfg.subtract_bias) @ p["W_enc"][h].T for h in range(cfg.heads))
    pre = product + p["b_enc"]
    if cfg.activation == "relu":
        z = np.maximum(pre, 0)
    elif cfg.activation == "gated":
        z = (pre > 0) * np.maximum(np.exp(p["r_mag"]) * product + p["b_mag"], 0)
    elif cfg.activation == "jumprelu":
        z = pre * (pre > np.exp(p["log_threshold"]))
    elif cfg.activation == "topk":
        z = np.maximum(pre, 0) * (pre >= -np.sort(-pre, axis=1)[:, k - 1 : k])
    else:
        z = np.maximum(pre, 0) * (pre >= -np.sort(-pre.ravel())[k * len(pre) - 1])
    return pre, z


def decode(p, z):
    return np.stack([z @ W for W in p["W_dec"]], 1) + p["b_dec"]


def eager_aux(p, residual, pre, dead, k_aux, normaliser):
    """With a number of latents that follows from the data: min(k_aux, how many are dead)."""
    (there,) = np.nonzero(dead)
    k = min(k_aux, len(there))
    if k == 0:
        return 0.0
    z = np.zeros_like(pre)
    for b in range(len(pre)):
        best = there[np.argsort(-pre[b, there])[:k]]
        z[b, best] = np.maximum(pre[b, best], 0)
    ehat = np.stack([z @ W for W in p["W_dec"]], 1)
    return np.square(residual - ehat).sum((1, 2)).mean() / normaliser


def variance(e):
    return np.square(e - e.mean(0)).sum((1, 2)).mean()


def oracle(p, x, cfg, train, at, dead=None, hyper=HYPER, p_weight=1.0):
    """The loss at `p`; `at` is where the gradient is taken: what the equations freeze is read there."""
    pre, z = forward(p, x, cfg)
    n = np.sqrt(np.square(p["W_dec"]).sum((0, 2))) if cfg.code_norm == "l2" else np.ones(F)
    prefixes = cfg.prefixes or (F,)
    error = np.mean([np.square(x - decode(p, z * (np.arange(F) < end))).sum((1, 2)).mean() for end in prefixes])
    warm, penalty, extra = min(1.0, PROGRESS / train.sparsity_warmup), 0.0, 0.0
    weight = warm * hyper.sparsity
    exponent = 1 + (cfg.p_end - 1) * np.floor(PROGRESS * cfg.p_stages) / max(cfg.p_stages - 1, 1)
    on = np.maximum(pre, 0) * n
    if cfg.activation in ("relu", "gated"):
        penalty = weight * p_weight * np.where(on > 0, np.abs(on) ** exponent, 0).sum(1).mean()
    if cfg.activation == "gated":
        frozen = p | {name: at[name] for name in ("W_dec", "b_dec")}
        extra = np.square(x - decode(frozen, np.maximum(pre, 0))).sum((1, 2)).mean()
    if cfg.activation == "jumprelu":
        cost = (z > 0) if cfg.penalty == "l0" else np.tanh(cfg.tanh_scale * z * n)
        below = np.maximum(np.exp(p["log_threshold"]) - pre, 0) * n
        penalty = weight * cost.sum(1).mean() + hyper.pre_act * below.sum(1).mean()
    aux = 0.0
    if dead is not None:
        residual = x - decode(at, forward(at, x, cfg)[1])
        normaliser = variance(residual) / variance(x) if train.aux_norm == "variance" else 1.0
        aux = hyper.aux * eager_aux(p, residual, pre, dead, train.aux_k or D // 2, normaliser)
    return {"loss": error + penalty + extra + aux, "error": error, "penalty": penalty, "aux": aux}


def differences(f, p, skip=(), step=1e-6):
    """Central differences of f for every number in `p`."""
    grads = {}
    for name in p.keys() - set(skip):
        grads[name] = np.zeros_like(p[name])
        for at in np.ndindex(p[name].shape):
            values = []
            for sign in (1, -1):
                moved = p[name].copy()
                moved[at] += sign * step
                values.append(f(p | {name: moved}))
            grads[name][at] = (values[0] - values[1]) / (2 * step)
    return grads


def make_gradients(cfg, train, with_dead=True):
    """One compiled program a configuration; everything else is data. (The closure: no cache over monkeypatching.)"""

    def run(p, x, dead_F, hyper, progress, p_weight):
        def loss(p):
            dead = dead_F if with_dead else None
            return losses.loss(p, x, cfg, train, hyper, dead_F=dead, progress=progress, p_weight=p_weight)

        return jax.grad(loss, has_aux=True)(p)

    compiled = jax.jit(run)

    def call(p, x, dead_F=None, hyper=HYPER, progress=PROGRESS, p_weight=1.0):
        dead_F = jnp.zeros(F, bool) if dead_F is None else jnp.asarray(dead_F)
        p, x, hyper, progress, p_weight = as32((p, x, hyper, progress, p_weight))
        return compiled(p, x, dead_F, hyper._replace(k=hyper.k.astype(jnp.int32)), progress, p_weight)

    return call


TRAIN = TrainConfig(100, batch=B, sparsity_warmup=0.8)
VARIANTS = {
    "relu": config("relu"),
    "relu, annealed": config("relu", p_end=0.4, p_stages=5),
    "relu, plain weights, no bias subtracted": config("relu", code_norm="none", subtract_bias=False),
    "relu, nested": config("relu", prefixes=(2, 5, F)),
    "gated": config("gated"),
    "gated, annealed, two heads": config("gated", heads=2, p_end=0.6, p_stages=4),
    "topk": config("topk"),
    "topk, no bias subtracted": config("topk", subtract_bias=False),
    "topk, nested": config("topk", prefixes=(4, F)),
    "topk, two heads": config("topk", heads=2),
    "batch_topk": config("batch_topk"),
    "batch_topk, nested, two heads": config("batch_topk", heads=2, prefixes=(3, 6, F)),
    "jumprelu l0": config("jumprelu"),
    "jumprelu tanh, two heads": config("jumprelu", penalty="tanh", heads=2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradients_are_the_equations(name):
    """With three dead latents. The threshold's gradient is straight-through and has a test of its own."""
    cfg = VARIANTS[name]
    p, x = data(cfg)
    dead = np.isin(np.arange(F), (1, 4, 8))
    grads, parts = make_gradients(cfg, TRAIN)(p, x, dead, p_weight=1.3)

    def f(moved):
        return oracle(moved, x, cfg, TRAIN, p, dead, p_weight=1.3)

    for part, expected in f(p).items():
        np.testing.assert_allclose(getattr(parts, part), expected, rtol=2e-5, atol=1e-6, err_msg=part)
    assert parts.aux > 0
    _, z = forward(p, x, cfg)
    np.testing.assert_allclose(parts.l0, (z > 0).sum(1).mean(), rtol=1e-6)
    np.testing.assert_allclose(parts.least, z[z > 0].min(), rtol=1e-4)
    np.testing.assert_array_equal(parts.fired_F, (z > 0).any(0))
    expected = differences(lambda moved: f(moved)["loss"], p, skip=["log_threshold"])
    for name, grad in expected.items():
        np.testing.assert_allclose(grads[name], grad, rtol=1e-3, atol=2e-5, err_msg=name)


def test_a_batch_without_codes_says_so():
    cfg = config("relu")
    p, x = data(cfg)
    grads, parts = make_gradients(cfg, TRAIN, with_dead=False)(p | {"b_enc": np.full(F, -99.0)}, x)
    assert parts.least == np.inf and parts.l0 == 0 and not parts.fired_F.any() and parts.aux == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


# --- rows and dense products ---


@pytest.mark.parametrize("name", ["topk", "topk, no bias subtracted", "topk, nested", "batch_topk"])
def test_products_by_rows_and_dense_ones_are_the_same(name, monkeypatch):
    """Loss, parts and all gradients, the auxiliary loss included, for several k and dead latents."""
    cfg, found = VARIANTS[name], {}
    p, x = data(cfg, seed=5)
    dead = np.random.default_rng(0).random((3, F)) < np.array([[0.0], [0.3], [0.9]])
    for by_rows in (True, False):
        monkeypatch.setattr(sparse, "by_rows", lambda by_rows=by_rows: by_rows)
        gradients = make_gradients(cfg, TRAIN)
        found[by_rows] = [
            gradients(p, x, dead_F, HYPER._replace(k=k)) for dead_F, k in zip(dead, (4, 2, 1), strict=True)
        ]
    assert float(found[True][1][1].aux) > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found[True], found[False])


def test_k_of_a_member_may_be_smaller_than_the_configurations():
    for name in ("topk", "batch_topk"):
        p, x = data(VARIANTS[name])
        for k in (1, 2, 4):
            _, parts = make_gradients(VARIANTS[name], TRAIN)(p, x, hyper=HYPER._replace(k=k))
            _, z = forward(p, x, VARIANTS[name], k)
            np.testing.assert_allclose(parts.error, np.square(x - decode(p, z)).sum((1, 2)).mean(), rtol=1e-5)
            np.testing.assert_allclose(parts.l0, (z > 0).sum(1).mean())


# --- dead latents ---


@pytest.mark.parametrize(
    "name, norm", [("topk", "variance"), ("batch_topk, nested, two heads", "none"), ("gated", "none")]
)
def test_the_auxiliary_loss_of_fixed_shape_is_the_eager_one(name, norm):
    """For 0, 1, k_aux, more, and all latents dead: value and gradients; nothing at all where none is dead."""
    cfg = VARIANTS[name]
    p, x = data(cfg, seed=2)
    train = dataclasses.replace(TRAIN, aux_k=4, aux_norm=norm)
    gradients = make_gradients(cfg, train)
    base, _ = gradients(p, x)
    plain, parts = make_gradients(cfg, train, with_dead=False)(p, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), base, plain)
    order = np.random.default_rng(1).permutation(F)
    for n_dead in (1, 4, 6, F):
        dead = np.isin(np.arange(F), order[:n_dead])
        grads, parts = gradients(p, x, dead)
        expected = oracle(p, x, cfg, train, p, dead)
        np.testing.assert_allclose(parts.aux, expected["aux"], rtol=1e-4, err_msg=str(n_dead))
        slopes = differences(lambda moved, dead=dead: oracle(moved, x, cfg, train, p, dead)["aux"], p)
        for leaf, slope in slopes.items():
            np.testing.assert_allclose(
                grads[leaf] - base[leaf], slope, rtol=2e-3, atol=1e-4, err_msg=f"{n_dead} {leaf}"
            )
        assert not slopes["W_dec"][:, ~dead].any()


@pytest.mark.parametrize("name", ["topk", "jumprelu tanh, two heads"])
def test_the_auxiliary_loss_of_an_error_without_variance_is_nothing(name):
    """One row, rows all alike, and rows reconstructed exactly: loss and gradients finite, aux 0."""
    cfg = VARIANTS[name]
    p, x = data(cfg)
    gradients = make_gradients(cfg, TRAIN)
    alike = np.repeat(x[:1], B, 0)
    exact = np.repeat(p["b_dec"][None], B, 0)
    silent = p | {"b_enc": np.full(F, -99.0)}
    revived = p | {"b_enc": np.where(np.arange(F) == 4, 0.5, -99.0)}
    for params, rows in ((p, alike), (p, 0 * x), (silent, exact), (revived, exact), (silent, x)):
        for dead in (np.ones(F, bool), np.arange(F) == 4):
            grads, parts = gradients(params, rows, dead)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, parts.loss, parts.aux)))
            assert np.abs(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])).max() < 1e4
            if rows is not x:
                assert parts.aux == 0.0


def test_fewer_latents_than_the_auxiliary_loss_asks_for():
    cfg = config("topk")
    p, x = data(cfg)
    train = dataclasses.replace(TRAIN, aux_k=10 * F)
    _, parts = make_gradients(cfg, train)(p, x, np.ones(F, bool))
    np.testing.assert_allclose(parts.aux, oracle(p, x, cfg, train, p, np.ones(F, bool))["aux"], rtol=1e-4)


# --- jumprelu ---


@pytest.mark.parametrize(
    "convention, heads, penalty, prefixes",
    [("tau2", 1, "l0", ()), ("tau1", 1, "l0", ()), ("tau2", 2, "tanh", ()), ("tau1", 1, "tanh", (4, F))],
)
def test_the_threshold_gradient_is_the_papers(convention, heads, penalty, prefixes):
    """By hand: -tau^2/eps (tau1: -tau/eps) times dL/dz in the window, for l0 also -lambda tau/eps (-lambda/eps), and
    the pre-activation loss' plain chain rule. Values at or below 0 move nothing."""
    eps = 2.0
    cfg = config(
        "jumprelu", heads=heads, penalty=penalty, straight_through=convention, bandwidth=eps, prefixes=prefixes
    )
    p, x = data(cfg, seed=3)
    grads, _ = make_gradients(cfg, TRAIN, with_dead=False)(p, x)
    pre, z = forward(p, x, cfg)
    tau, n = np.exp(p["log_threshold"]), np.sqrt(np.square(p["W_dec"]).sum((0, 2)))
    window = (np.abs(pre - tau) < eps / 2) & (pre > 0)
    assert ((np.abs(pre - tau) < eps / 2) & (pre <= 0)).any() and window.any()
    dz, weight = np.zeros_like(z), PROGRESS / 0.8 * HYPER.sparsity
    for end in prefixes or (F,):
        kept = np.arange(F) < end
        residual = x - decode(p, z * kept)
        slope = -2 / B * sum(residual[:, h] @ p["W_dec"][h].T for h in range(heads))
        dz += slope * kept / len(prefixes or (F,))
    if penalty == "tanh":
        dz += weight / B * cfg.tanh_scale * n * (1 - np.tanh(cfg.tanh_scale * z * n) ** 2)
    chain = tau if convention == "tau2" else np.ones(F)
    expected = -(dz * window * tau * chain / eps).sum(0)
    if penalty == "l0":
        expected -= weight / B * (window * chain / eps).sum(0)
    expected += HYPER.pre_act / B * ((pre < tau) * n * tau).sum(0)
    np.testing.assert_allclose(grads["log_threshold"], expected, rtol=1e-4, atol=1e-5)


def test_the_jump_lets_gradients_through_above_the_threshold_alone():
    cfg = config("jumprelu", bandwidth=1.0)
    pre = jnp.array([[-0.2, 0.0, 0.1, 0.3, 0.5, 0.9, 2.0]])
    log_tau = jnp.log(jnp.full(7, 0.4))
    for f, value, to_pre, to_tau in (
        (losses.jump, [0, 0, 0, 0, 0.5, 0.9, 2.0], [0, 0, 0, 0, 1, 1, 1], [0, 0, -0.16, -0.16, -0.16, 0, 0]),
        (losses.active, [0, 0, 0, 0, 1, 1, 1], [0] * 7, [0, 0, -0.4, -0.4, -0.4, 0, 0]),
    ):
        # 0.9 - 0.4 is the window's edge: moved a little beyond it
        at = pre.at[0, 5].set(0.9001)
        out, pull = jax.vjp(lambda pre, log_tau, f=f: f(pre, log_tau, cfg), at, log_tau)
        np.testing.assert_allclose(out[0], value, atol=1e-3)
        g_pre, g_tau = pull(jnp.ones_like(out))
        np.testing.assert_allclose(g_pre[0], to_pre)
        np.testing.assert_allclose(g_tau, to_tau, rtol=1e-5)


def test_negative_values_move_no_threshold():
    """A threshold near 0 whose window reaches far below it."""
    cfg = config("jumprelu", bandwidth=4.0)
    p, x = data(cfg)
    p = p | {"b_enc": np.full(F, -20.0), "log_threshold": np.full(F, -3.0), "W_enc": p["W_enc"] * 0.01}
    wide = dataclasses.replace(cfg, bandwidth=100.0)
    grads, _ = make_gradients(wide, TRAIN, with_dead=False)(p, x, hyper=HYPER._replace(pre_act=0.0))
    assert not grads["log_threshold"].any()
    grads, _ = make_gradients(wide, TRAIN, with_dead=False)(p | {"b_enc": np.full(F, 0.01)}, x)
    assert grads["log_threshold"].any()


# --- schedules of the penalty ---


def test_the_penalty_warms_up_from_nothing():
    cfg = config("relu")
    p, x = data(cfg)
    gradients = make_gradients(cfg, TRAIN, with_dead=False)
    full = float(gradients(p, x, progress=1.0)[1].penalty)
    for progress in (0.0, 0.2, 0.4, 0.8, 0.9):
        share = float(gradients(p, x, progress=progress)[1].penalty) / full
        np.testing.assert_allclose(share, min(1.0, progress / 0.8), rtol=1e-5, atol=1e-6)
    at_once = make_gradients(cfg, dataclasses.replace(TRAIN, sparsity_warmup=0.0), with_dead=False)
    np.testing.assert_allclose(at_once(p, x, progress=0.0)[1].penalty, full, rtol=1e-5)


def test_the_exponent_falls_in_equal_stages():
    cfg = config("relu", p_end=0.2, p_stages=5)
    found = [float(losses.exponent(cfg, progress)) for progress in (0.0, 0.19, 0.21, 0.5, 0.7, 0.99, 1.0)]
    np.testing.assert_allclose(found, [1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2], rtol=1e-6)
    one = config("relu", p_end=0.2, p_stages=1)
    assert float(losses.exponent(one, 0.99)) == 1.0


def test_a_power_below_one_has_a_finite_gradient_at_zero():
    z = jnp.array([[0.0, 4.0, 0.0], [9.0, 0.0, 1.0]])
    value, grad = jax.value_and_grad(losses.power_sum)(z, 0.5)
    assert float(value) == 3.0
    np.testing.assert_allclose(grad, [[0, 0.125, 0], [1 / 12, 0, 0.25]], rtol=1e-6)


# --- banks ---


def test_the_loss_maps_over_members():
    """Members with k, weights and dead latents of their own, side by side, are the members alone."""
    cfg = config("topk")
    members = [data(cfg, seed) for seed in range(3)]
    p, x = as32(jax.tree.map(lambda *leaves: np.stack(leaves), *members))
    hypers = [Hyper(k=k, aux=aux) for k, aux in ((1, 0.1), (4, 0.0), (2, 2.0))]
    dead = np.array([np.arange(F) < n for n in (3, 0, F)])

    def one(p, x, hyper, dead_F):
        return losses.loss(p, x, cfg, TRAIN, hyper, dead_F=dead_F, progress=jnp.float32(PROGRESS))[1]

    hyper = jax.tree.map(lambda *leaves: jnp.asarray(leaves), *hypers)
    parts = jax.jit(jax.vmap(one))(p, x, hyper, jnp.asarray(dead))
    alone = make_gradients(cfg, TRAIN)
    for g, (params, rows) in enumerate(members):
        _, expected = alone(params, rows, dead[g], hypers[g])
        jax.tree.map(lambda a, b, g=g: np.testing.assert_allclose(a[g], b, rtol=1e-5, atol=1e-6), parts, expected)


def test_an_unknown_penalty_never_reaches_the_loss():
    with pytest.raises(InputError, match="choose one of l1, l0, tanh"):
        config("jumprelu", penalty="l3")
