"""The one-layer transformer and its banks against NumPy, written from the equations of the sheet with loops.

`reference` is the model, its loss and its gradient in float64; `plain_training` trains with it. Members of a bank have
vocabularies and ranks of different sizes, with room to spare; alone they are trained without.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax import checkpoint, one_layer, parallel, train
from bert6_jax.errors import InputError
from bert6_jax.one_layer import QUESTION_AT, STATEMENT_AT, OneLayerConfig, Recipe
from synthetic import facts
from synthetic.facts import FactsConfig

V, T, B = 13, 5, 6
BASE = OneLayerConfig(V, hidden=7, width=5, key_width=3, init_std=0.3)
KINDS = [
    ("merged", "one_hot", "relu"),
    ("merged", "one_hot", "none"),
    ("merged", "trained", "none"),
    ("merged", "gaussian", "relu"),
    ("separate", "one_hot", "none"),
    ("separate", "trained", "relu"),
]
CONFIGS = {"-".join(k): dataclasses.replace(BASE, attention=k[0], embedding=k[1], activation=k[2]) for k in KINDS}
HIDDEN_IDS = np.array([2, 11, 12])  # room, in no row
ALL_AT = (0, 1, 2, 3)

# small programs that compile longer than they run
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_params(cfg: OneLayerConfig, seed: int = 0):
    """Nothing at its initial value, everything large enough to matter."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: one_layer.init(key, cfg), jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.normal(0, 0.7, leaf.shape).astype(np.float32), shapes)


def random_rows(seed: int = 0, rows: int = B) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.setdiff1d(np.arange(V), HIDDEN_IDS), (rows, T)).astype(np.int32)


def used() -> np.ndarray:
    return ~np.isin(np.arange(V), HIDDEN_IDS)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def reference(params, ids_BT, cfg: OneLayerConfig, at, used_V=None):
    """One row and one position at a time: outputs as `forward` names them, the loss of each, the summed gradient."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    E = p.get("embed", np.eye(cfg.vocab_size))
    grad = jax.tree.map(np.zeros_like, p)
    grad_E = np.zeros_like(E)
    rows, length = ids_BT.shape
    pattern = np.zeros((rows, len(at), length))
    hidden = np.zeros((rows, len(at), cfg.hidden))
    logits = np.zeros((rows, len(at), cfg.vocab_size))
    nll = np.zeros((rows, len(at)))
    for b, (q, t) in itertools.product(range(rows), enumerate(at)):
        seen = ids_BT[b, : t + 1]
        x, x_t = E[seen], E[ids_BT[b, t]]
        if cfg.attention == "merged":
            score = np.array([x_t @ p["attn"]["kq"] @ x_j for x_j in x])
        else:
            Q, K, c = p["attn"]["q"], p["attn"]["k"], 1 / math.sqrt(cfg.key_width)
            score = np.array([c * (x_t @ Q) @ (x_j @ K) for x_j in x])
        w = softmax(score)
        mixed = sum(w_j * x_j for w_j, x_j in zip(w, x, strict=True))
        h = mixed @ p["in"]
        out = np.maximum(h, 0) if cfg.activation == "relu" else h
        z = out @ p["out"]
        if used_V is not None:
            z = np.where(used_V, z, -np.inf)
        y = ids_BT[b, t + 1]
        probability = softmax(z)
        pattern[b, q, : t + 1], hidden[b, q], logits[b, q], nll[b, q] = w, h, z, -np.log(probability[y])
        # backwards
        dz = probability - np.eye(cfg.vocab_size)[y]
        grad["out"] += np.outer(out, dz)
        dh = p["out"] @ dz * ((h > 0) if cfg.activation == "relu" else 1)
        grad["in"] += np.outer(mixed, dh)
        dmixed = p["in"] @ dh
        dw = x @ dmixed
        ds = w * (dw - w @ dw)
        dx, dx_t = np.outer(w, dmixed), np.zeros_like(x_t)
        if cfg.attention == "merged":
            kq = p["attn"]["kq"]
            grad["attn"]["kq"] += np.outer(x_t, ds @ x)
            dx += np.outer(ds, x_t @ kq)
            dx_t += kq @ (ds @ x)
        else:
            query, key = x_t @ Q, x @ K
            grad["attn"]["q"] += c * np.outer(x_t, ds @ key)
            grad["attn"]["k"] += c * np.outer(ds @ x, query)
            dx += c * np.outer(ds, K @ query)
            dx_t += c * Q @ (ds @ key)
        np.add.at(grad_E, seen, dx)
        grad_E[ids_BT[b, t]] += dx_t
    if "embed" in p:
        grad["embed"] = grad_E
    return {"pattern": pattern, "hidden": hidden, "logits": logits}, nll, grad


@partial(quick, static_argnums=(2, 3))
def _look(params, ids_BT, cfg, at, used_V):
    found, grads = jax.value_and_grad(one_layer.loss, has_aux=True)(params, ids_BT, cfg, at, used_V)
    return one_layer.forward(params, ids_BT, cfg, ALL_AT, used_V), found, grads


def look(params, ids_BT, cfg, at, used_V=None):
    """Outputs at every position; loss, sums and gradient of the positions `at`."""
    return jax.device_get(_look(params, ids_BT, cfg, at, used_V))


def expect_close(found, expected, atol=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5, err_msg=jax.tree_util.keystr(path))


# --- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_forward_loss_and_gradient_against_numpy(kind):
    cfg, ids_BT = CONFIGS[kind], random_rows()
    params = random_params(cfg)
    out, (total, sums), grads = look(params, ids_BT, cfg, STATEMENT_AT)
    expect_close(out, reference(params, ids_BT, cfg, ALL_AT)[0])
    assert all((out["pattern"][:, t, t + 1 :] == 0).all() for t in ALL_AT)
    expected, nll_BQ, grad = reference(params, ids_BT, cfg, STATEMENT_AT)
    expect_close(grads, grad)
    assert float(total) == pytest.approx(nll_BQ.sum(), rel=1e-5)
    assert sums.keys() == {"count", "loss_2", "hits_2", "loss_3", "hits_3"} and sums["count"] == B
    for q, t in enumerate(STATEMENT_AT):
        assert float(sums[f"loss_{t}"]) == pytest.approx(nll_BQ[:, q].sum(), rel=1e-5)
        assert sums[f"hits_{t}"] == (expected["logits"][:, q].argmax(1) == ids_BT[:, t + 1]).sum()
    # what comes later changes nothing
    later = ids_BT.copy()
    later[:, 2:] = random_rows(seed=1)[:, 2:]
    again, _, _ = look(params, later, cfg, STATEMENT_AT)
    for name in out:
        np.testing.assert_array_equal(again[name][:, :2], out[name][:, :2])
        assert (again[name][:, 2:] != out[name][:, 2:]).any()
    # attention starts uniform
    start = one_layer.init(jax.random.key(0), cfg)
    pattern, _, _ = look(start, ids_BT, cfg, STATEMENT_AT)
    for t in ALL_AT:
        np.testing.assert_allclose(pattern["pattern"][:, t, : t + 1], 1 / (t + 1), rtol=1e-6)


@pytest.mark.parametrize("kind", ["merged-one_hot-relu", "separate-trained-relu"])
def test_ids_that_are_not_used_have_no_probability_and_no_gradient(kind):
    cfg, ids_BT = CONFIGS[kind], random_rows()
    params = random_params(cfg)
    params["out"][:, HIDDEN_IDS] += 10.0  # they would win
    out, (total, sums), grads = look(params, ids_BT, cfg, QUESTION_AT, used())
    expected, nll_BQ, grad = reference(params, ids_BT, cfg, QUESTION_AT, used())
    expect_close(grads, grad)
    assert float(total) == float(sums["loss_3"]) == pytest.approx(nll_BQ.sum(), rel=1e-5)
    assert sums["hits_3"] == (expected["logits"][:, 0].argmax(1) == ids_BT[:, 4]).sum()
    np.testing.assert_allclose(out["logits"][:, 3][:, used()], expected["logits"][:, 0][:, used()], atol=1e-5)
    assert (jax.device_get(jax.nn.softmax(out["logits"]))[..., HIDDEN_IDS] == 0).all()
    assert (grads["out"][:, HIDDEN_IDS] == 0).all()
    for leaf in (grads["in"], *grads["attn"].values()) if cfg.embedding == "one_hot" else (grads["embed"],):
        assert (leaf[HIDDEN_IDS] == 0).all() and (leaf[used()] != 0).any()
    assert np.isfinite(out["logits"]).all()


def test_a_hit_may_be_a_tie():
    params = random_params(BASE) | {"out": np.zeros((BASE.hidden, V), np.float32)}
    _, (total, sums), _ = look(params, random_rows(), BASE, STATEMENT_AT)
    assert sums["hits_2"] == sums["hits_3"] == B
    assert float(total) == pytest.approx(2 * B * math.log(V), rel=1e-6)


@pytest.mark.parametrize("rows", [4, 64])
def test_answers_are_the_argmax_of_forward(rows):
    cfg = dataclasses.replace(BASE, hidden=16)
    params, ids = random_params(cfg), random_rows(rows=15).reshape(3, 5, T)
    found = jax.device_get(quick(one_layer.answers, static_argnums=(2, 4))(params, ids, cfg, used(), rows))
    out, _, _ = reference(params, ids.reshape(-1, T), cfg, QUESTION_AT, used())
    p_XV = np.array([softmax(z) for z in out["logits"][:, 0]])
    target = ids[..., -1].ravel()
    assert all(x.shape == (3, 5) for x in found)
    np.testing.assert_array_equal(found.hit.ravel(), p_XV.argmax(1) == target)
    np.testing.assert_allclose(found.probability.ravel(), p_XV.max(1), atol=1e-5)
    np.testing.assert_allclose(found.answer_probability.ravel(), p_XV[np.arange(15), target], atol=1e-5)
    assert 0 < found.hit.sum() < 15  # rows of both kinds


# --- the start, and what is trained ----------------------------------------------------------------------------------


def test_starts():
    cfg = OneLayerConfig(400, hidden=60, attention="separate", embedding="gaussian", width=50, key_width=40)
    params = jax.device_get(quick(one_layer.init, static_argnums=1)(jax.random.key(1), cfg))
    merged = jax.eval_shape(lambda key: one_layer.init(key, BASE), jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, merged) == {"attn": {"kq": (V, V)}, "in": (V, 7), "out": (7, V)}
    shapes = {"attn": {"q": (50, 40), "k": (50, 40)}, "embed": (400, 50), "in": (50, 60), "out": (60, 400)}
    assert jax.tree.map(lambda x: x.shape, params) == shapes
    assert (params["attn"]["k"] == 0).all()
    for leaf, std in (
        (params["in"], 0.05), (params["out"], 0.05), (params["attn"]["q"], 0.05), (params["embed"], 1 / math.sqrt(50)),
    ):  # fmt: skip
        assert leaf.dtype == np.float32
        assert abs(leaf.std() / std - 1) < 4.5 / math.sqrt(2 * leaf.size)
        assert abs(leaf.mean()) < 4.5 * std / math.sqrt(leaf.size)


def test_tokens_start_by_their_names():
    small = dataclasses.replace(BASE, attention="separate")
    large = dataclasses.replace(small, vocab_size=V + 4)
    init = quick(one_layer.init, static_argnums=1)
    name = np.random.default_rng(0).permutation(100)[: V + 4]
    one, two = (jax.device_get(init(jax.random.key(2), c, name[-c.vocab_size :])) for c in (small, large))
    np.testing.assert_array_equal(one["in"], two["in"][4:])
    np.testing.assert_array_equal(one["out"], two["out"][:, 4:])
    np.testing.assert_array_equal(one["attn"]["q"], two["attn"]["q"][4:])
    assert len(np.unique(two["in"][:, 0])) == V + 4


@pytest.mark.parametrize("which", one_layer.TRAINABLE)
@pytest.mark.parametrize("embedding", ["one_hot", "gaussian", "trained"])
def test_split_and_assemble(embedding, which):
    cfg = dataclasses.replace(BASE, embedding=embedding)
    params = random_params(cfg)
    trained, frozen = quick(lambda params: one_layer.split(jax.random.key(0), params, cfg, which, 2, 3))(params)
    expected = {
        "all": {"attn", "in", "out"} | ({"embed"} if embedding == "trained" else set()),
        "mlp_in": {"in"},
        "lora": {"a", "b"},
    }
    assert trained.keys() == expected[which]
    assert frozen.keys() == (params.keys() if which == "lora" else params.keys() - trained.keys())
    whole = jax.device_get(one_layer.assemble(trained, frozen))
    jax.tree.map(np.testing.assert_array_equal, whole, params)  # to the bit, also with an adapter: b = 0


def test_adapters_start_as_they_should():
    cfg = OneLayerConfig(500, hidden=6)
    params = {"attn": {"kq": np.zeros((500, 500), np.float32)}, "in": np.zeros((500, 6), np.float32)}
    start = quick(lambda key, rank, room: one_layer.split(key, params, cfg, "lora", rank, room)[0], static_argnums=2)
    two, four = (jax.device_get(start(jax.random.key(0), np.int32(2), room)) for room in (2, 4))
    assert two["a"].shape == (500, 2) and four["a"].shape == (500, 4) and four["b"].shape == (4, 6)
    np.testing.assert_array_equal(two["a"], four["a"][:, :2])
    assert (four["a"][:, 2:] == 0).all() and (four["b"] == 0).all()
    assert abs(two["a"].std() / 0.1 - 1) < 4.5 / math.sqrt(2 * two["a"].size)
    assert abs(np.corrcoef(two["a"].T)[0, 1]) < 0.2
    # W_in + a b, nothing else
    trained = {"a": two["a"], "b": np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)}
    whole = jax.device_get(one_layer.assemble(trained, params))
    np.testing.assert_allclose(whole["in"], trained["a"].astype(np.float64) @ trained["b"], atol=1e-6)
    np.testing.assert_array_equal(whole["attn"]["kq"], params["attn"]["kq"])


# --- banks -----------------------------------------------------------------------------------------------------------

ROOM = FactsConfig(8, 2, 6, 3, 4, noise=3)
MODEL = OneLayerConfig(ROOM.tokens.vocab_size, hidden=16, init_std=0.3)
BATCH, ROWS = 8, 200
RANKS = 3  # room
ADAM = Recipe(steps=10, batch=BATCH, chunk=5)


class Member(NamedTuple):
    """One cell; alike are only the numbers of subjects, attributes and noise tokens."""

    world: FactsConfig
    lr: float
    schedule: str
    seed: int
    rank: int = 1  # of its adapter
    base: int = 0  # the pre-trained model that it is fine-tuned from
    tuned: tuple[int, ...] = ()  # subjects that it is asked about


PRETRAINED = (
    Member(ROOM, 1e-2, "cosine", 1),
    Member(FactsConfig(8, 2, 4, 1, 3, noise=3), 3e-3, "step", 2),
    Member(FactsConfig(8, 2, 5, 2, 2, noise=3), 5e-3, "constant", 7),
)
TUNED = tuple(
    Member(PRETRAINED[base].world, lr, schedule, seed, rank, base, tuned)
    for lr, schedule, seed, rank, base, tuned in (
        (2e-2, "constant", 3, 3, 2, (0, 5)),
        (1e-2, "cosine", 3, 1, 0, (1,)),
        (5e-3, "warmup_linear", 4, 2, 1, (2, 3, 4, 7)),
        (2e-2, "constant", 5, 2, 2, (6,)),
        (2e-2, "step", 5, 3, 0, (3, 6)),
    )
)


def rows_of(member: Member) -> np.ndarray:
    """Statements of a random world of these sizes, or questions about the subjects to be tuned on; without room."""
    rng, cfg = np.random.default_rng(member.seed), member.world
    N, M, R, A = cfg.subjects, cfg.attributes, cfg.templates, cfg.answers
    T_NMK = rng.permuted(np.tile(np.arange(R), (N, M, 1)), axis=-1)[..., : cfg.multiplicity]
    answer_NM, m, k = (rng.integers(0, high, size) for high, size in ((A, (N, M)), (M, ROWS), (cfg.multiplicity, ROWS)))
    s, noise = rng.choice(member.tuned or N, ROWS), rng.integers(0, cfg.noise, (ROWS, 2))
    said = cfg.tokens.form + m if member.tuned else cfg.tokens.template + m * R + T_NMK[s, m, k]
    columns = (noise[:, 0], cfg.tokens.subject + s, noise[:, 1], said, cfg.tokens.answer + m * A + answer_NM[s, m])
    return np.stack(columns, axis=1).astype(np.int32)


def drawn(key, data):
    """The rows of a step, drawn with replacement."""
    return data["rows"][jax.random.bits(key, (BATCH,)) % np.uint32(ROWS)]


def ids_in_room(cfg: FactsConfig) -> np.ndarray:
    """Where the room keeps the ids of a smaller world."""
    room = facts.token_names(ROOM).tolist()
    return np.array([room.index(name) for name in facts.token_names(cfg).tolist()])


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def take(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


class Setting(NamedTuple):
    """A bank before training."""

    members: tuple[Member, ...]
    model: OneLayerConfig
    recipe: Recipe
    at: tuple[int, ...]
    start: Any  # what is trained, [G, ...]
    inputs: Any  # what the step gets beside the state

    def step(self, devices: int = 1, loop: bool | None = None):
        return one_layer.make_step(self.model, self.recipe, drawn, self.at, parallel.make_mesh(devices), loop)

    @property
    def state(self):
        return one_layer.init_bank(self.start, self.recipe, jax.random.key(0))


@partial(quick, static_argnums=0)
def begin(model, name_V, seed_G):
    return jax.vmap(lambda seed: one_layer.init(jax.random.key(seed), model, name_V))(seed_G)


@partial(quick, static_argnums=(0, 1))
def begin_adapters(model, ranks, name_V, seed_G, rank_G, models_G):
    def one(seed, rank, params):
        return one_layer.split(jax.random.key(seed), params, model, "lora", rank, ranks, name_V)[0]

    return jax.vmap(one)(seed_G, rank_G, models_G)


def setting(members, kind=MODEL, recipe=ADAM, models=None, room: bool = True) -> Setting:
    """Pre-training of everything; with `models` [X, ...] the fine-tuning of adapters on those that members name."""
    cfg = ROOM if room else members[0].world
    ids = [ids_in_room(m.world) if room else np.arange(cfg.tokens.vocab_size) for m in members]
    model, names = dataclasses.replace(kind, vocab_size=cfg.tokens.vocab_size), facts.token_names(cfg)
    seed_G, rank_G, base_G = (np.array([getattr(m, name) for m in members]) for name in ("seed", "rank", "base"))
    if models is None:
        params = jax.device_get(begin(model, names, seed_G))
        start, frozen = one_layer.split(jax.random.key(0), params, model, "all")
        base_G = np.arange(len(members))
    else:
        ranks = RANKS if room else members[0].rank
        start, frozen = begin_adapters(model, ranks, names, seed_G, rank_G, take(models, base_G)), models
    inputs = {
        "rate": stack([recipe.rates(m.lr, m.schedule) for m in members]),
        "seed": seed_G.astype(np.uint32),
        "frozen": frozen,
        "base": base_G.astype(np.int32),
        "data": {
            "rows": stack([of[rows_of(m)] for m, of in zip(members, ids, strict=True)]).astype(np.int32),
            "used_V": stack([np.isin(np.arange(model.vocab_size), of) for of in ids]),
        },
    }
    at = STATEMENT_AT if models is None else QUESTION_AT
    return Setting(tuple(members), model, recipe, at, jax.device_get(start), inputs)


def train_all(s: Setting, devices: int = 1, loop: bool | None = None):
    """What is trained, after all chunks, and the metrics of each, in a loop of our own."""
    step = s.step(devices, loop)

    @quick
    def run(state, inputs):
        return jax.lax.scan(lambda state, _: step(state, None, inputs), state, length=s.recipe.chunks)

    state, metrics = jax.device_get(run(s.state, s.inputs))
    return state.params, [take(metrics, c) for c in range(s.recipe.chunks)]


def fit(s: Setting, on_snapshot=lambda step, params: None, state=None):
    """The same by `train.fit`."""
    seen = []
    cfg = train.FitConfig(s.recipe.chunks, dispatch=2, snapshots=tuple(range(s.recipe.chunks + 1)))
    state = train.fit(
        s.step(), state or s.state, lambda step: {"row": np.zeros(1, np.int32)}, cfg, frozen=s.inputs, quiet=True,
        on_metrics=lambda step, metrics: seen.append(metrics), on_snapshot=on_snapshot,
    )  # fmt: skip
    return jax.device_get(state.params), seen


@quick
def plain_rows(seed, data, steps_S):
    """The rows of one member, [S, B, 5]."""
    return jax.vmap(lambda now: drawn(jax.random.fold_in(jax.random.key(seed), now), data))(steps_S)


def plain_training(s: Setting, g: int):
    """Member g by NumPy in float64: what is trained, and each step's loss of every position, hits and gradient norm."""
    wide = partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    rows_SBT = jax.device_get(plain_rows(s.inputs["seed"][g], take(s.inputs["data"], g), np.arange(s.recipe.steps)))
    trained, frozen = wide(take(s.start, g)), wide(take(s.inputs["frozen"], s.inputs["base"][g]))
    first, second = (jax.tree.map(np.zeros_like, trained) for _ in range(2))
    found = []
    rates = s.inputs["rate"][g].astype(np.float64)
    for n, (ids_BT, rate) in enumerate(zip(rows_SBT, rates, strict=True), 1):
        params = {**frozen, **trained}
        if "a" in trained:
            params = {**frozen, "in": frozen["in"] + trained["a"] @ trained["b"]}
        out, nll_BQ, grad = reference(params, ids_BT, s.model, s.at, s.inputs["data"]["used_V"][g])
        if "a" in trained:
            grad |= {"a": grad["in"] @ trained["b"].T, "b": trained["a"].T @ grad["in"]}
        grad = {name: jax.tree.map(lambda x: x / BATCH, grad[name]) for name in trained}
        update = grad
        if s.recipe.optimizer == "adam":
            first = jax.tree.map(lambda m, x: 0.9 * m + 0.1 * x, first, grad)
            second = jax.tree.map(lambda v, x: 0.999 * v + 0.001 * x**2, second, grad)
            update = jax.tree.map(
                lambda m, v, n=n: m / (1 - 0.9**n) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8), first, second
            )
        trained = jax.tree.map(lambda p, u, rate=rate: p - rate * u, trained, update)
        hits = [(out["logits"][:, q].argmax(1) == ids_BT[:, t + 1]).mean() for q, t in enumerate(s.at)]
        found.append([*nll_BQ.mean(0), *hits, math.sqrt(sum((x**2).sum() for x in jax.tree.leaves(grad)))])
    return trained, np.array(found)


def check_metrics(s: Setting, metrics, found_GS):
    """Metrics of each chunk are the means over its steps."""
    found = found_GS.reshape(len(s.members), s.recipe.chunks, s.recipe.chunk, -1).mean(2)
    for c, now in enumerate(metrics):
        names = [f"{name}_{t}" for name in ("loss", "hits") for t in s.at]
        for g, name in itertools.product(range(len(s.members)), range(len(names))):
            assert now[f"{names[name]}_{g}"] == pytest.approx(found[g, c, name], rel=1e-5, abs=1e-6)
            assert now[f"finite_{g}"] == 1.0
        assert now["loss"] == pytest.approx(found[:, c, : len(s.at)].sum(1).mean(), rel=1e-5)
        assert now["grad_norm"] == pytest.approx(np.linalg.norm(found[:, c, -1]), rel=1e-4)
    assert len(metrics) == s.recipe.chunks


@cache
def pretrained():
    """A bank by `train.fit`: its setting, models [G, ...] and metrics."""
    s = setting(PRETRAINED)
    return s, *fit(s)


@cache
def tuned():
    """Adapters of several ranks on models of the bank, some of which share theirs: setting, adapters, metrics."""
    s = setting(TUNED, models=pretrained()[1])
    return s, *train_all(s)


def test_pretraining_by_adam_against_numpy():
    s, models, metrics = pretrained()
    found = []
    for g in range(3):
        expected, seen = plain_training(s, g)
        expect_close(take(models, g), expected)
        found.append(seen)
        unused = ~s.inputs["data"]["used_V"][g]
        for name, of in (("in", unused), ("out", (slice(None), unused))):  # room stays as it was
            np.testing.assert_array_equal(models[name][g][of], s.start[name][g][of])
    check_metrics(s, metrics, np.array(found))


def test_adapters_by_adam_against_numpy():
    s, trained, metrics = tuned()
    found = []
    for g, member in enumerate(TUNED):
        expected, seen = plain_training(s, g)
        expect_close(take(trained, g), expected)
        found.append(seen)
        assert (trained["a"][g][:, member.rank :] == 0).all() and (trained["b"][g][member.rank :] == 0).all()
        assert (trained["b"][g][: member.rank] != 0).any(1).all()
    check_metrics(s, metrics, np.array(found))


def without_room(params, cfg: FactsConfig):
    """The parameters of the ids of a smaller world."""
    ids = ids_in_room(cfg)
    cut = {"in": lambda x: x[ids], "out": lambda x: x[:, ids], "a": lambda x: x[ids], "b": lambda x: x}
    of = {name: cut[name](x) for name, x in params.items() if name in cut}
    return of | ({"attn": {"kq": params["attn"]["kq"][np.ix_(ids, ids)]}} if "attn" in params else {})


@pytest.mark.parametrize("g", [1, 2])
def test_a_member_equals_the_same_cell_trained_alone(g):
    """Without company, and without room for templates and answers."""
    member, (_, models, _) = PRETRAINED[g], pretrained()
    trained, _ = train_all(setting([member], room=False))
    expect_close(take(trained, 0), without_room(take(models, g), member.world))


def test_an_adapter_equals_the_same_trained_alone():
    """Without room for ranks, too."""
    member, (_, models, _), (_, adapters, _) = TUNED[2], pretrained(), tuned()
    base = jax.tree.map(lambda x: x[None], without_room(take(models, member.base), member.world))
    trained, _ = train_all(setting([member._replace(base=0)], models=base, room=False))
    expected = without_room(take(adapters, 2), member.world)
    expect_close(take(trained, 0), {"a": expected["a"][:, : member.rank], "b": expected["b"][: member.rank]})


@pytest.mark.parametrize(("bank", "devices", "loop"), [("pre", 1, False), ("pre", 2, True), ("tune", 4, True)])
def test_loops_and_meshes_agree(bank, devices, loop):
    """Neither do three members divide over two devices, nor five over four."""
    s, expected, metrics = pretrained() if bank == "pre" else tuned()
    trained, again = train_all(s, devices, loop)
    expect_close(trained, expected)
    for now, before in zip(again, metrics, strict=True):
        assert now.keys() == before.keys()
        for name in before:
            assert float(now[name]) == pytest.approx(float(before[name]), rel=1e-5)


def test_sgd_against_numpy_and_a_member_that_diverges():
    wide = {"width": 12, "key_width": 4}
    kind = dataclasses.replace(MODEL, attention="separate", embedding="gaussian", activation="none", **wide)
    members = [m._replace(lr=lr) for m, lr in zip(PRETRAINED, (0.5, 0.3, 0.2), strict=True)]
    recipe = Recipe(steps=20, batch=BATCH, optimizer="sgd", chunk=5)
    s = setting(members, kind, recipe)
    assert s.start.keys() == {"attn", "in", "out"} and s.inputs["frozen"].keys() == {"embed"}
    trained, metrics = fit(s)
    found = [plain_training(s, g) for g in range(3)]
    for g in range(3):
        expect_close(take(trained, g), found[g][0])
    check_metrics(s, metrics, np.array([seen for _, seen in found]))
    # the same with one that cannot be trained
    wild = setting([m._replace(lr=1e6) if g == 1 else m for g, m in enumerate(members)], kind, recipe)
    snapshots = []
    apart, flagged = fit(wild, lambda step, params: snapshots.append(jax.device_get(params)))
    for g in (0, 2):
        jax.tree.map(np.testing.assert_array_equal, take(apart, g), take(trained, g))
        assert all(now[f"finite_{g}"] == 1.0 for now in flagged)
    assert [now["finite_1"] for now in flagged][-3:] == [0.0] * 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(apart))
    jax.tree.map(np.testing.assert_array_equal, take(snapshots[2], 1), take(snapshots[-1], 1))  # stays where it was
    for now in flagged:  # of the others alone
        assert now["loss"] == pytest.approx(sum(now[f"loss_{t}_{g}"] for t in (2, 3) for g in (0, 2)) / 2)
    assert all(now["loss_2_1"] == now["hits_3_1"] == 0.0 for now in flagged[-3:])


def test_a_member_that_was_stopped_stays_so():
    s, models, metrics = pretrained()
    stopped = s.state.replace(opt_state=s.state.opt_state | {"finite": np.array([True, False, True])})
    again, flagged = fit(s, state=stopped)
    jax.tree.map(np.testing.assert_array_equal, take(again, 1), take(s.start, 1))
    for g in (0, 2):
        jax.tree.map(np.testing.assert_array_equal, take(again, g), take(models, g))
    assert [[now[f"finite_{g}"] for g in range(3)] for now in flagged] == [[1.0, 0.0, 1.0]] * s.recipe.chunks


def test_rates_against_formulas():
    """A run is one epoch; arXiv 2508.00901 names no schedule in the sources we have, all are ours."""
    recipe, lr, steps = Recipe(steps=16, batch=1, chunk=4), 0.3, range(16)
    expected = {
        "constant": [lr for _ in steps],
        "cosine": [lr * (1 + math.cos(math.pi * n / 16)) / 2 for n in steps],
        "step": [lr if n < 8 else lr / 10 if n < 12 else lr / 100 for n in steps],
        "warmup_linear": [lr * min((n + 1) / 2, (16 - n) / 14) for n in steps],  # a tenth of 16 steps: 2
        "epoch_linear": [lr for _ in steps],
    }
    for schedule, rates in expected.items():
        found = recipe.rates(lr, schedule)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, rates, rtol=1e-5)
    assert recipe.chunks == 4


def test_banks_of_a_kind_share_their_step():
    mesh = parallel.make_mesh(1)
    one = one_layer.make_step(MODEL, ADAM, drawn, QUESTION_AT, mesh)
    assert one is one_layer.make_step(dataclasses.replace(MODEL), dataclasses.replace(ADAM), drawn, QUESTION_AT, mesh)


def test_a_bank_is_kept(tmp_path):
    s, models, _ = pretrained()
    checkpoint.save(tmp_path / "bank0", models, kind="one_layer", config=dataclasses.asdict(s.model), step=10)
    found = checkpoint.load(tmp_path / "bank0", kind="one_layer")
    assert (found.kind, found.step) == ("one_layer", 10) and OneLayerConfig(**found.config) == s.model
    assert jax.tree.structure(found.tree) == jax.tree.structure(models)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found.tree), models)


# --- measurements ----------------------------------------------------------------------------------------------------


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def spectrum(params, rows, cfg, form_V, template_V, used_V=None):
    found = quick(one_layer.gradient_spectrum, static_argnums=2)(params, rows, cfg, form_V, template_V, used_V)
    return jax.device_get(found)


@pytest.mark.parametrize("attention", ["merged", "separate"])
def test_gradient_spectrum_against_numpy(attention):
    cfg, rows = dataclasses.replace(BASE, hidden=10, attention=attention), random_rows(rows=20)
    params, form_V, template_V = random_params(cfg), np.isin(np.arange(V), [3, 4]), np.arange(V) >= 8
    rows[:, 3] = 3 + np.arange(20) % 2
    found = spectrum(params, rows, cfg, form_V, template_V, used())
    gradient = reference(params, rows, cfg, QUESTION_AT, used())[2]["in"] / 20
    left, values, _ = np.linalg.svd(gradient)
    np.testing.assert_allclose(found.values_P, values[:8], rtol=1e-4, atol=1e-6)
    assert found.top_share == pytest.approx(values[0] ** 2 / (gradient**2).sum(), rel=1e-5)
    assert found.format_mass == pytest.approx((left[form_V, 0] ** 2).sum(), rel=1e-4)
    expected = cosine(-gradient[form_V].mean(0), params["in"][template_V].mean(0).astype(np.float64))
    assert found.cosine == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("Z", "N_f", "A"), [(8, 64, 8), (4, 64, 8), (8, 4, 1)])
def test_the_formats_mass_is_given_by_the_data(Z, N_f, A):
    """1 / (1 + 4 / Z + 1 / N_f) at a random start already, where the cosine is small (sheet, sections 4 to 6). It takes
    all rows to pull in one direction: of a few subjects, only with one answer."""
    world = FactsConfig(64, 1, 32, 4, 8, noise=8)
    cfg, of = OneLayerConfig(world.tokens.vocab_size), world.tokens
    rng, id_V = np.random.default_rng(Z * N_f), np.arange(world.tokens.vocab_size)
    s = np.tile(np.arange(N_f), 1_024 // N_f)
    noise = rng.integers(0, Z, (2, len(s)))
    answer = rng.integers(0, A, 64)[s]
    rows = np.stack([noise[0], of.subject + s, noise[1], np.full_like(s, of.form), of.answer + answer], 1)
    found = spectrum(begin_one(cfg), rows.astype(np.int32), cfg, id_V == of.form, id_V >= of.template)
    assert found.format_mass == pytest.approx(1 / (1 + 4 / Z + 1 / N_f), abs=0.005)
    assert found.top_share > 0.85 and abs(found.cosine) < 0.25


@cache
def begin_one(cfg):
    return jax.device_get(quick(one_layer.init, static_argnums=1)(jax.random.key(0), cfg))


def test_direction_change_against_numpy():
    rng = np.random.default_rng(0)
    before = rng.normal(size=(V, 9)).astype(np.float32)
    after = (before + rng.normal(size=(V, 9))).astype(np.float32)
    form_V, subject_V, template_V = (np.isin(np.arange(V), ids) for ids in ([0, 2], [3, 5, 6], [8, 9, 12]))
    found = quick(one_layer.direction_change)(before, after, form_V, template_V, subject_V)
    assert found.keys() == {"template", "subject"}
    moved = (after - before)[[0, 2]].mean(0)
    assert float(found["template"]) == pytest.approx(cosine(moved, before[[8, 9, 12]].mean(0)), rel=1e-4)
    expected = np.mean([cosine(moved, before[s]) for s in (3, 5, 6)])
    assert float(found["subject"]) == pytest.approx(expected, rel=1e-4)


def test_template_geometry_against_loops():
    W = np.random.default_rng(0).normal(size=(V, 9)).astype(np.float32)
    attribute_V = np.array([0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 2])  # answers have one too
    geometry = quick(one_layer.template_geometry)
    found = geometry(W, np.arange(V) >= 8, attribute_V)
    pairs = {same: [] for same in (True, False)}
    for i, j in itertools.combinations(range(8, V), 2):
        pairs[attribute_V[i] == attribute_V[j]].append(cosine(W[i], W[j]))
    assert (len(pairs[True]), len(pairs[False])) == (2, 8)
    assert float(found["within"]) == pytest.approx(np.mean(pairs[True]), rel=1e-4)
    assert float(found["between"]) == pytest.approx(np.mean(pairs[False]), rel=1e-4)
    one = geometry(W, np.isin(np.arange(V), [8, 9]), attribute_V)
    assert float(one["within"]) == pytest.approx(cosine(W[8], W[9]), rel=1e-4) and math.isnan(one["between"])


# --- bad input -------------------------------------------------------------------------------------------------------


def refused(match, call):
    with pytest.raises(InputError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"attention": "two"}, "attention is 'two'; choose one of merged, separate"),
        ({"embedding": "bag"}, "embedding is 'bag'; choose one of one_hot, gaussian, trained"),
        ({"activation": "gelu"}, "activation is 'gelu'; choose one of relu, none"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"hidden": 2.0}, "hidden is 2.0"),
        ({"width": -1}, "width is -1"),
        ({"key_width": None}, "key_width is None"),
    ],
)
def test_configurations_that_no_model_has(fields, match):
    refused(match, lambda: OneLayerConfig(**({"vocab_size": 5} | fields)))


def test_other_bad_settings():
    refused("optimizer is 'lion'; choose one of adam, sgd", lambda: Recipe(100, 8, "lion"))
    refused("110 steps do not divide into chunks of 25", lambda: Recipe(110, 8))
    refused("schedule is 'up'; choose one of .*cosine, step", lambda: Recipe(25, 8).rates(0.1, "up"))
    params = random_params(BASE)
    refused("'half'; choose one of all, mlp_in, lora", lambda: one_layer.split(jax.random.key(0), params, BASE, "half"))
    cfg = CONFIGS["merged-gaussian-relu"]
    mask_V = np.ones(V, bool)
    refused("one_hot", lambda: one_layer.gradient_spectrum(random_params(cfg), random_rows(), cfg, mask_V, mask_V))
