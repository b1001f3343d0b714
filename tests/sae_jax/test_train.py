"""Banks of dictionaries: members alone, the step by hand, annealing, resume."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax import checkpoint, transformer
from bert6_jax import train as loop
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError
from sae_jax import activations, dictionary, losses, train
from sae_jax.config import DictionaryConfig, TrainConfig
from sae_jax.losses import Hyper

B, S, D, F, STEPS = 12, 3, 5, 14, 10
# eps: with 1e-8 Adam makes steps of rounding errors where gradients are nearly 0
TRAIN = TrainConfig(STEPS, batch=B, eps=1e-3, lr_warmup=0.2, dead_after=2 * B, aux_k=3, threshold_decay=0.8)


def config(activation="topk", **changes):
    changes = {"penalty": "l0"} | changes if activation == "jumprelu" else changes
    return DictionaryConfig(**({"width": D, "latents": F, "activation": activation, "k": 4} | changes))


def batch_at(step):
    """Sites of different scale and mean; few directions, so that latents die."""
    rng = np.random.default_rng(step)
    x_BSD = rng.normal(size=(B, S, 2)) @ np.random.default_rng(99).normal(size=(2, D)) + 0.1 * rng.normal(
        size=(B, S, D)
    )
    return {"x": (x_BSD * np.array([1.0, 2.0, 0.5])[:, None] + np.arange(S)[:, None]).astype(np.float32)}


def norms(cfg, G):
    one = [
        {"mean": jnp.full((cfg.heads, D), 0.1 * g), "scale": jnp.linspace(1.0, 1.5, cfg.heads) + 0.2 * g}
        for g in range(G)
    ]
    return train.stack(one)


def run(step, state, steps=STEPS, batches=batch_at):
    """(state, metrics [steps])."""
    compiled, all_ = jax.jit(step), []
    for number in range(steps):
        state, metrics = compiled(state, jax.tree.map(jnp.asarray, batches(number)))
        all_.append(jax.device_get(metrics))
    return state, {name: np.array([metrics[name] for metrics in all_]) for name in all_[0]}


def init_state(*args, **options):
    """One program in place of many small ones."""
    return jax.jit(lambda: train.init_state(*args, **options))()


def close(a, b, **options):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **({"rtol": 1e-5, "atol": 1e-5} | options)), a, b)


# --- a member of a bank is itself alone ---

HYPER = [
    Hyper(lr=1e-2, k=4, sparsity=0.1, pre_act=0.01, aux=0.5),
    Hyper(lr=3e-3, k=1, sparsity=0.5, pre_act=0.0, aux=0.0),
    Hyper(lr=2e-2, k=2, sparsity=0.02, pre_act=0.1, aux=1.0),
]
BANKS = {
    "topk": (config("topk"), TRAIN, False, (False, True)),
    "batch_topk, shared inputs": (config("batch_topk"), TRAIN, True, (False, True)),
    "relu, two heads, annealed": (
        config("relu", heads=2, p_end=0.5, p_stages=3, decoder="free"),
        dataclasses.replace(TRAIN, sparsity_warmup=0.0),
        False,
        (True,),
    ),
    "jumprelu, nested, shared, clipped": (
        config("jumprelu", prefixes=(4, F), scale="token"),
        dataclasses.replace(TRAIN, clip=0.5, eps=0.1, threshold_lr=5.0),
        True,
        (False,),
    ),
}


@pytest.mark.parametrize("name", BANKS)
def test_a_bank_is_its_members_alone(name):
    """Rates, sparsity, k, norms, starts and sites of their own: side by side and one after the other, to 1e-5."""
    cfg, cfg_train, shared, loops = BANKS[name]
    H, G = cfg.heads, len(HYPER)
    sites = np.array([[1] * H] * G if shared else [[2, 0], [0, 1], [1, 2]])[:, :H]
    norm, key = norms(cfg, G), jax.random.key(5)
    state = init_state(key, cfg, cfg_train, HYPER, norm, sites=sites)
    make = lambda **options: train.make_step(cfg, cfg_train, activations.given, **options)  # noqa: E731
    banks = [run(make(loop=loop), state) for loop in loops]
    alone = make(loop=False)
    for g in range(G):
        params = jax.tree.map(lambda leaf, g=g: leaf[g : g + 1], state.params)
        one = init_state(
            jax.random.key(77), cfg, cfg_train, HYPER[g : g + 1], jax.tree.map(lambda leaf, g=g: leaf[g], norm),
            params=params, sites=sites[g : g + 1],
        )  # fmt: skip
        one, metrics = run(alone, one)
        for bank, bank_metrics in banks:
            close(train.member(bank, g), train.member(one, 0))
            np.testing.assert_array_equal(bank.silent[g], one.silent[0])
            np.testing.assert_allclose(bank.p_weight[g], one.p_weight[0], rtol=1e-5)
            for part in ("loss", "error", "l0", "dead"):
                np.testing.assert_allclose(bank_metrics[f"{part}_{g}"], metrics[f"{part}_0"], rtol=2e-5, atol=1e-6)
    bank, metrics = banks[0]
    if "topk" in name:
        assert max(metrics[f"dead_{g}"].max() for g in range(G)) > 0  # the auxiliary branch was taken
    each = np.stack([metrics[f"loss_{g}"] for g in range(G)])
    np.testing.assert_allclose(metrics["loss"], each.mean(0), rtol=1e-5)
    lengths = np.linalg.norm(bank.params["W_dec"], axis=-1)
    if cfg.decoder == "unit":
        np.testing.assert_allclose(lengths, 1.0, rtol=1e-5)
    else:
        assert np.abs(lengths - 1).max() > 1e-2
    moved = np.abs(np.asarray(bank.params["W_enc"] - state.params["W_enc"])).max((1, 2, 3))
    assert (moved > 1e-3).all()
    assert int(bank.step) == STEPS


# --- the step by hand ---


@pytest.mark.parametrize("activation, clip", [("jumprelu", 0.3), ("batch_topk", 0.0)])
def test_the_step_is_adam_by_hand(activation, clip):
    """Gradients of the loss, then in NumPy: tangent, clipping, Adam, rates, unit decoders, the counters."""
    cfg = config(activation, penalty="tanh" if activation == "jumprelu" else "l1")
    t = dataclasses.replace(
        TRAIN, steps=6, clip=clip, threshold_lr=7.0, eps=0.01, b1=0.5, b2=0.9, lr_warmup=0.34, lr_decay=0.5
    )
    hyper = Hyper(lr=0.05, k=3, sparsity=0.2, pre_act=0.1, aux=0.3)
    state = init_state(jax.random.key(0), cfg, t, [hyper], dictionary_norm := norms(cfg, 1), sites=[[1]])
    end, metrics = run(train.make_step(cfg, t, activations.given), state, 6)

    @jax.jit
    def gradient(params, x, dead_F, progress):
        return jax.grad(lambda p: losses.loss(p, x, cfg, t, hyper, dead_F=dead_F, progress=progress), has_aux=True)(
            params
        )

    p = {name: np.asarray(leaf[0], np.float64) for name, leaf in state.params.items()}
    m, v = ({name: np.zeros_like(leaf) for name, leaf in p.items()} for _ in range(2))
    silent, threshold, share = np.zeros(F, int), -1.0, [1 / 2, 1.0, 1.0, 1.0, 2 / 3, 1 / 3]
    scale, mean = float(dictionary_norm["scale"][0, 0]), np.asarray(dictionary_norm["mean"][0])
    for number in range(6):
        y = (batch_at(number)["x"][:, 1:2] - mean) * scale
        there = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (p, y))
        g, parts = gradient(*there, jnp.asarray(silent >= t.dead_after), jnp.float32(number / 6))
        g = {name: np.asarray(leaf, np.float64) for name, leaf in g.items()}
        g["W_dec"] = g["W_dec"] - (g["W_dec"] * p["W_dec"]).sum(-1, keepdims=True) * p["W_dec"]
        length = np.sqrt(sum(np.square(leaf).sum() for leaf in g.values()))
        np.testing.assert_allclose(metrics["grad_norm"][number], length, rtol=1e-3)
        for name, leaf in g.items():
            leaf = leaf * min(1.0, clip / length) if clip else leaf
            m[name], v[name] = 0.5 * m[name] + 0.5 * leaf, 0.9 * v[name] + 0.1 * leaf**2
            update = m[name] / (1 - 0.5 ** (number + 1)) / (np.sqrt(v[name] / (1 - 0.9 ** (number + 1))) + 0.01)
            p[name] = p[name] - 0.05 * share[number] * (7.0 if name == "log_threshold" else 1.0) * update
        p["W_dec"] = p["W_dec"] / np.linalg.norm(p["W_dec"], axis=-1, keepdims=True)
        silent = np.where(parts.fired_F, 0, silent + B)
        kept = min(0.8, number / (number + 10))
        threshold = float(parts.least) if threshold < 0 else kept * threshold + (1 - kept) * float(parts.least)
        np.testing.assert_allclose(metrics["dead_0"][number], (silent >= t.dead_after).mean(), rtol=1e-6)
    close({name: leaf[0] for name, leaf in end.params.items()}, p, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(end.silent[0], silent)
    np.testing.assert_allclose(end.threshold[0], threshold, rtol=1e-4)
    if clip:
        assert (metrics["grad_norm"] > clip).all()


def test_the_rate_rises_stays_and_falls_to_nearly_nothing():
    t = TrainConfig(20, lr_warmup=0.25, lr_decay=0.4)
    expected = [*(np.arange(1, 6) / 5), *[1.0] * 8, *(np.arange(7, 0, -1) / 8)]
    np.testing.assert_allclose([float(train.rate(t, step)) for step in range(20)], expected, rtol=1e-6)
    flat = TrainConfig(20, lr_warmup=0.0, lr_decay=0.0)
    assert all(float(train.rate(flat, step)) == 1.0 for step in range(20))


@pytest.mark.parametrize("activation, steps, stages", [("relu", 50, 10), ("gated", 12, 10)])
def test_annealing_keeps_the_penalty_where_it_is(activation, steps, stages):
    """With a rate of 0 and one batch the penalty is constant while its exponent falls (50 steps in 10 stages: the
    boundaries are rounded in float32)."""
    cfg = config(activation, p_end=0.3, p_stages=stages)
    t = TrainConfig(steps, batch=B, sparsity_warmup=0.0)
    state = init_state(jax.random.key(0), cfg, t, [Hyper(lr=0.0, sparsity=3.0)], norms(cfg, 1))
    end, metrics = run(train.make_step(cfg, t, activations.given), state, steps, lambda step: batch_at(0))
    rest = metrics["loss_0"] - metrics["error_0"]
    np.testing.assert_allclose(rest, rest[0], rtol=1e-4)
    y = (batch_at(0)["x"][:, :1] - np.asarray(end.norm["mean"][0])) * float(end.norm["scale"][0, 0])
    p = {name: np.asarray(leaf[0]) for name, leaf in state.params.items()}
    on = np.maximum(y[:, 0] @ p["W_enc"][0].T, 0)
    on = on[on > 1e-6]
    np.testing.assert_allclose(end.p_weight[0], on.sum() / (on**0.3).sum(), rtol=1e-3)


def test_a_threshold_is_learnt_where_nothing_fires():
    """No code in the first batches: the running mean waits, then starts at the first smallest code."""
    cfg = config("batch_topk", subtract_bias=False)
    t = TrainConfig(4, batch=B, threshold_decay=0.5)
    state = init_state(jax.random.key(0), cfg, t, [Hyper(lr=0.0, k=1)], norms(cfg, 1))
    step = jax.jit(train.make_step(cfg, t, activations.given))
    off = {"x": jnp.zeros((B, S, D))}  # pre-activations are exactly 0
    state, _ = step(state, off)
    assert float(state.threshold[0]) == train.UNTRAINED
    seen = []
    for number in (1, 2):
        x = jnp.asarray(batch_at(number)["x"])
        seen.append(
            np.sort(np.asarray((x[:, 0] @ state.params["W_enc"][0, 0].T) * state.norm["scale"][0, 0]).ravel())[-B]
        )
        state, _ = step(state, {"x": x})
    np.testing.assert_allclose(state.threshold[0], np.average(seen, weights=[2, 10]), rtol=1e-4)


def test_batch_topk_keeps_as_many_at_inference_as_in_training():
    """After a short training too, and each member of a bank its own k."""
    cfg = config("batch_topk")
    t = TrainConfig(150, batch=B, dead_after=10**6)
    norm = dictionary.fit_norm(batch_at(0)["x"][:, :1], cfg)
    state = init_state(jax.random.key(0), cfg, t, [Hyper(lr=0.01, k=2), Hyper(lr=0.01, k=4)], norm)
    state, _ = run(train.make_step(cfg, t, activations.given), state, 150)
    x = np.concatenate([batch_at(step)["x"][:, :1] for step in range(140, 150)])
    for g, k in enumerate((2, 4)):
        l0 = float((dictionary.encode(train.member(state, g), x, cfg) > 0).sum(1).mean())
        assert abs(l0 - k) < 0.25 * k, (k, l0)


def test_a_member_is_read_with_its_own_k():
    cfg = config("topk")
    state = init_state(jax.random.key(0), cfg, TRAIN, [Hyper(k=1), Hyper(k=4)], norms(cfg, 2))
    for g, k in enumerate((1, 4)):
        found = train.member(state, g)
        assert int(found["k"]) == k
        active = (dictionary.encode(found, batch_at(0)["x"][:, :1], cfg) > 0).sum(1)
        assert active.max() == k


def test_wrong_width_and_sites_that_are_not_there_are_told():
    cfg = config("topk")
    state = init_state(jax.random.key(0), cfg, TRAIN, [Hyper(k=2)], norms(cfg, 1), sites=[[S]])
    step = jax.jit(train.make_step(cfg, TRAIN, activations.given))
    with pytest.raises(InputError, match=f"width {D}"):
        step(state, {"x": jnp.zeros((B, S, D + 1))})
    with pytest.raises(loop.Diverged, match="inputs of step 1 hold NaN"):
        loop.fit(train.make_step(cfg, TRAIN, activations.given), state, batch_at, loop.FitConfig(2), quiet=True)


def test_members_start_apart_and_leave_as_dictionaries():
    cfg = config("batch_topk")
    state = init_state(jax.random.key(0), cfg, TRAIN, HYPER, dictionary.fit_norm(batch_at(0)["x"][:, :1], cfg))
    assert state.norm["mean"].shape == (3, 1, D)  # one norm for all
    W = np.asarray(state.params["W_dec"])
    assert all(np.abs(W[g] - W[h]).max() > 0.1 for g, h in ((0, 1), (0, 2), (1, 2)))
    # a member's start does not depend on how many others there are
    alone = init_state(jax.random.key(0), cfg, TRAIN, HYPER[:1], norms(cfg, 1))
    np.testing.assert_allclose(alone.params["W_dec"][0], W[0], rtol=1e-6)
    x = jnp.asarray(batch_at(1)["x"][:, :1])
    z_GBF = jax.vmap(lambda d: dictionary.encode(d, x, cfg))(train.members(state))
    np.testing.assert_allclose(z_GBF[2], dictionary.encode(train.member(state, 2), x, cfg), rtol=1e-5, atol=1e-6)


# --- the train loop ---

MODEL = TransformerConfig(vocab_size=30, width=D, blocks=1, heads=1, head_width=4, mlp_width=6, max_len=6, head="none")
STREAM = activations.Stream(MODEL, (("resid", 0), ("resid", 1)), rows=3, capacity=50, batch=B, first=1)


@pytest.fixture(scope="module")
def streaming():
    """A bank of two over two sites of a model: (step, state, frozen)."""
    rng = np.random.default_rng(0)
    like = jax.eval_shape(lambda: transformer.init(jax.random.key(0), MODEL))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(1, *leaf.shape)), jnp.float32), like)
    ids = rng.integers(1, 30, (7, 6)).astype(np.int32)
    tokens = activations.token_rows(ids, np.ones_like(ids), np.arange(7))
    source, frozen = activations.open_stream(STREAM, params, tokens, 3)
    cfg = config("batch_topk")
    state = init_state(jax.random.key(1), cfg, TRAIN, HYPER[:2], norms(cfg, 2), sites=[[0], [1]], source=source)
    return train.make_step(cfg, TRAIN, activations.streaming(STREAM)), state, frozen


def test_resumed_is_uninterrupted_bit_for_bit(streaming, tmp_path):
    """Counters, thresholds and the ring buffer with what waits in it: all of the state."""
    step, state, frozen = streaming
    cfg = loop.FitConfig(STEPS, dispatch=2, checkpoint_every=3)
    fit = lambda **options: loop.fit(step, state, frozen=frozen, quiet=True, cfg=cfg, **options)  # noqa: E731
    reference = fit(batch_at=activations.no_batch)
    starts, rows = [], []
    for killed_at in (4, 7, None):

        def batches(number, killed_at=killed_at):
            if number == killed_at:
                raise ZeroDivisionError
            return activations.no_batch(number)

        options = {"batch_at": batches, "folder": tmp_path, "on_start": starts.append}
        if killed_at is None:
            end = fit(**options)
        else:
            with pytest.raises(ZeroDivisionError):
                fit(**options)
            rows.append(checkpoint.steps(tmp_path)[-1])
    assert starts == [0, 3, 6] and rows == [3, 6]
    jax.tree.map(np.testing.assert_array_equal, end, reference)
    assert jax.tree.structure(end) == jax.tree.structure(reference)
    # what the comparison is about did change on the way
    assert int(end.source["row"]) != int(state.source["row"]) and (end.threshold != state.threshold).all()
    assert np.asarray(end.silent).any() and not np.array_equal(end.source["x"], state.source["x"])


def test_a_bank_that_reads_host_batches_resumes_too(tmp_path):
    """Nothing in `source`: an empty dict in the checkpoint's tree."""
    cfg = config("topk")
    state = init_state(jax.random.key(0), cfg, TRAIN, HYPER, norms(cfg, 3), sites=[[0], [1], [2]])
    step = train.make_step(cfg, TRAIN, activations.given)
    fit_cfg = loop.FitConfig(STEPS, dispatch=2, checkpoint_every=4)
    seen = {}
    reference = loop.fit(step, state, batch_at, fit_cfg, on_metrics=seen.__setitem__, quiet=True)
    assert list(seen) == list(range(1, STEPS + 1)) and {"loss", "loss_2", "l0_1", "dead_0"} <= seen[1].keys()
    batches = lambda number: batch_at(number) if number < 9 else 1 / 0  # noqa: E731
    with pytest.raises(ZeroDivisionError):
        loop.fit(step, state, batches, fit_cfg, folder=tmp_path, quiet=True)
    assert checkpoint.steps(tmp_path)[-1] == 8
    end = loop.fit(step, state, batch_at, fit_cfg, folder=tmp_path, quiet=True)
    jax.tree.map(np.testing.assert_array_equal, end, reference)
    assert end.source == {}


# --- bad input ---


def test_members_that_do_not_stack_are_refused():
    def start(cfg):
        return dictionary.init(jax.random.key(0), cfg)

    for other, words in (
        (config("topk", latents=F + 1), "W_dec is"),
        (config("jumprelu"), r"log_threshold is nothing and \(14,\)"),
    ):
        pattern = "members 0 and 2 of the bank do not stack: .*one configuration"
        with pytest.raises(InputError, match=pattern) as caught:
            train.stack([start(config()), start(config()), start(other)])
        text = str(caught.value)
        assert "\n" not in text and ("W_" in text or "b_enc" in text or re.search(words, text)), text
        if other.activation == "jumprelu":
            assert re.search(words, text), text
            with pytest.raises(InputError, match=r"log_threshold is \(14,\) and nothing"):
                train.stack([start(other), start(config())])
    for make in (train.stack, train.stack_hyper):
        with pytest.raises(InputError, match="at least one member"):
            make([])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hyper": [Hyper(k=4), Hyper(k=5)]}, "member 1 has k = 5; it must be one of 1..4"),
        ({"hyper": [Hyper(k=0)]}, "member 0 has k = 0"),
        ({"hyper": []}, "at least one member"),
        ({"params": "two"}, "do not make a bank of 1"),
        ({"params": "wide"}, "do not make a bank of 1"),
    ],
)
def test_a_bank_that_makes_no_sense_is_refused(change, words):
    cfg = config()
    if "params" in change:
        other = config(latents=F + 1) if change["params"] == "wide" else cfg
        G = 2 if change["params"] == "two" else 1
        params = train.stack([dictionary.init(jax.random.key(0), other)] * G)
        change = {"params": params}
    hyper = change.pop("hyper", [Hyper(k=4)])
    with pytest.raises(InputError) as caught:
        train.init_state(jax.random.key(0), cfg, TRAIN, hyper, norms(cfg, 1), **change)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_k_binds_only_where_there_is_a_k():
    cfg = config("relu")
    assert train.init_state(jax.random.key(0), cfg, TRAIN, [Hyper()], norms(cfg, 1)).silent.shape == (1, F)
