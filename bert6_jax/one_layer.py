"""The one-layer transformer of the knowledge study (arXiv 2508.00901): attention and an MLP, nothing else.

The paper publishes no model in the sources we have; this is our reconstruction. One causal head with identity values,
no positions, no residual stream, no biases. With tokens embedded by E (one-hot: E = 1), at position t

    w_tj = softmax over j <= t of  E[x_t] W E[x_j]      h_t = sum_j w_tj E[x_j] W_in      logits_t = relu(h_t) W_out

where W is one matrix (`merged`) or Q K^T / sqrt(key width) (`separate`). The attention-only ablation drops the relu
(`activation="none"`). A statement [n, s, n', r, a] is trained on r and a, a question [n, s, n', p, a] on a alone.

Parameters `{"attn": {"kq"} or {"q", "k"}, "in", "out"}`, and `"embed"` where it is not one-hot. What is trained is one
tree, what is not another: `split` makes both (`all`, `mlp_in`: W_in alone, `lora`: W_in + a b), `assemble` the model of
both.

Grids are banks: `make_step` trains G members, each with its own world, rows, rate, rank and start, in one compiled
program, spread over the devices of a mesh; on CPUs a device takes its members one after the other, many steps each.
A member equals the same cell trained alone. Letters beside those of `bert6_jax`: E width of the embedding, H hidden
units, Q query positions, G members, P rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from bert6_jax import train
from bert6_jax.errors import InputError
from bert6_jax.objectives import Sums, cross_entropy

Params = dict[str, Any]

QUESTION_AT = (3,)  # p_m, where the answer is asked for
STATEMENT_AT = (2, 3)  # n', where the template is predicted, and r, where the answer is

_CHOICES = {
    "attention": ("merged", "separate"),
    "embedding": ("one_hot", "gaussian", "trained"),
    "activation": ("relu", "none"),
}
TRAINABLE = ("all", "mlp_in", "lora")
OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True)
class OneLayerConfig:
    """Shape and kind; static under `jit`."""

    vocab_size: int
    hidden: int = 256
    attention: str = "merged"
    embedding: str = "one_hot"
    activation: str = "relu"
    width: int = 128  # of the embedding, where it is not one-hot
    key_width: int = 64  # of queries and keys, where they are separate
    init_std: float = 0.05

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"config field {name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        for name in ("vocab_size", "hidden", "width", "key_width"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"config field {name} is {getattr(self, name)!r}; it must be a positive integer")

    @property
    def embed_width(self) -> int:
        return self.vocab_size if self.embedding == "one_hot" else self.width


def init(key: jax.Array, cfg: OneLayerConfig, name_V: jax.Array | None = None) -> Params:
    """A fresh model, float32: W = 0, the MLP normal(0, `init_std`), embeddings normal(0, 1 / sqrt(E)).

    Args:
      name_V: int32 [V], distinct numbers that tokens draw their start by (default: their ids), so that vocabularies
        which share tokens under other ids share these tokens' start. Separate queries start at normal(0, `init_std`)
        and keys at 0, so that attention starts uniform there too.
    """
    name_V = jnp.arange(cfg.vocab_size) if name_V is None else jnp.asarray(name_V)

    def by_token(key, size):
        return jax.vmap(lambda name: jax.random.normal(jax.random.fold_in(key, name), (size,)))(name_V)

    keys = jax.random.split(key, 4)
    std, E, H = np.float32(cfg.init_std), cfg.embed_width, cfg.hidden
    one_hot = cfg.embedding == "one_hot"
    params: Params = {
        "in": std * (by_token(keys[0], H) if one_hot else jax.random.normal(keys[0], (E, H))),
        "out": std * by_token(keys[1], H).T,
    }
    if not one_hot:
        params["embed"] = by_token(keys[2], E) / np.float32(math.sqrt(E))
    if cfg.attention == "merged":
        params["attn"] = {"kq": jnp.zeros((E, E))}
    else:
        q = by_token(keys[3], cfg.key_width) if one_hot else jax.random.normal(keys[3], (E, cfg.key_width))
        params["attn"] = {"q": std * q, "k": jnp.zeros((E, cfg.key_width))}
    return params


def forward(
    params: Params, ids_BT: jax.Array, cfg: OneLayerConfig, at: tuple[int, ...], used_V: jax.Array | None = None
) -> Params:
    """The model at the positions `at` (0-based).

    Returns:
      `pattern` [B, Q, T] (0 beyond the query), `hidden` [B, Q, H] before the activation, `logits` [B, Q, V] (float32
      minimum for ids that `used_V` (bool [V]) leaves out, whose probability and gradient are then exactly 0).
    """
    T, at_Q = ids_BT.shape[1], np.asarray(at)
    query_BQ, attn = ids_BT[:, at_Q], params["attn"]
    if cfg.embedding == "one_hot":  # E[x] W is a row of W
        value_BTH = params["in"][ids_BT]
        if cfg.attention == "merged":
            score_BQT = attn["kq"][query_BQ[:, :, None], ids_BT[:, None, :]]
        else:
            score_BQT = jnp.einsum("bqk,btk->bqt", attn["q"][query_BQ], attn["k"][ids_BT])
    else:
        x_BTE = params["embed"][ids_BT]
        value_BTH = jnp.matmul(x_BTE, params["in"])
        q = jnp.matmul(x_BTE[:, at_Q], attn["kq"] if cfg.attention == "merged" else attn["q"])
        k = x_BTE if cfg.attention == "merged" else jnp.matmul(x_BTE, attn["k"])
        score_BQT = jnp.einsum("bqk,btk->bqt", q, k)
    if cfg.attention == "separate":
        score_BQT = score_BQT * np.float32(1.0 / math.sqrt(cfg.key_width))
    seen_QT = at_Q[:, None] >= np.arange(T)
    pattern_BQT = jax.nn.softmax(score_BQT, axis=-1, where=seen_QT[None])
    hidden_BQH = jnp.einsum("bqt,bth->bqh", pattern_BQT, value_BTH)
    out_BQH = jax.nn.relu(hidden_BQH) if cfg.activation == "relu" else hidden_BQH
    # the barrier keeps XLA on CPU from computing the hidden units again inside of each product that reads them
    out_BQH = jax.lax.optimization_barrier(out_BQH)
    flat = jnp.matmul(out_BQH.reshape(-1, cfg.hidden), params["out"])
    logits_BQV = flat.reshape(*out_BQH.shape[:2], -1)
    if used_V is not None:
        logits_BQV = jnp.where(used_V[None, None], logits_BQV, jnp.finfo(jnp.float32).min)
    return {"pattern": pattern_BQT, "hidden": hidden_BQH, "logits": logits_BQV}


def loss(params: Params, ids_BT: jax.Array, cfg: OneLayerConfig, at: tuple[int, ...], used_V=None):
    """Summed cross-entropy of the tokens that follow the positions `at`, in nats, and the sums `loss_t` and `hits_t`
    of each position t, with `count`, the number of rows. A hit is an argmax over all ids (ties included)."""
    logits_BQV = forward(params, ids_BT, cfg, at, used_V)["logits"]
    target_BQ = ids_BT[:, np.asarray(at) + 1]
    nll_BQ = cross_entropy(logits_BQV, target_BQ)
    right_BQ = jnp.take_along_axis(logits_BQV, target_BQ[..., None], axis=-1)[..., 0] >= logits_BQV.max(-1)
    sums: Sums = {"count": jnp.float32(ids_BT.shape[0])}
    for q, t in enumerate(at):
        sums |= {f"loss_{t}": nll_BQ[:, q].sum(), f"hits_{t}": right_BQ[:, q].sum(dtype=jnp.float32)}
    return nll_BQ.sum(), sums


class Answered(NamedTuple):
    """What a model says at the end of rows: `hit` bool, `probability` of what it says, `answer_probability`."""

    hit: jax.Array
    probability: jax.Array
    answer_probability: jax.Array


def answers(params: Params, ids_XT: jax.Array, cfg: OneLayerConfig, used_V=None, rows: int = 2_048) -> Answered:
    """The model's answer (argmax over all ids) to rows of any leading shape X, asked at the last token but one.

    Walks `rows` rows at a time, so that no `[X, V]` is ever held.
    """
    shape, flat = ids_XT.shape[:-1], ids_XT.reshape(-1, ids_XT.shape[-1])
    rows = min(rows, len(flat))
    padded = jnp.pad(flat, ((0, -len(flat) % rows), (0, 0)))

    def part(ids_BT):
        logits_BV = forward(params, ids_BT, cfg, (ids_BT.shape[1] - 2,), used_V)["logits"][:, 0]
        said_B, target_B = logits_BV.argmax(-1), ids_BT[:, -1]
        p_BV = jax.nn.softmax(logits_BV)
        of = [jnp.take_along_axis(p_BV, x_B[:, None], axis=1)[:, 0] for x_B in (said_B, target_B)]
        return Answered(said_B == target_B, *of)

    parts = jax.lax.map(part, padded.reshape(-1, rows, padded.shape[-1]))
    return jax.tree.map(lambda x: x.reshape(-1)[: len(flat)].reshape(shape), parts)


# --- what is trained -------------------------------------------------------------------------------------------------


def split(key: jax.Array, params: Params, cfg: OneLayerConfig, which: str, rank=1, room: int = 1, name_V=None):
    """`(trained, frozen)` for one of `all`, `mlp_in` and `lora`; `assemble` puts them together again.

    LoRA: a normal(0, 0.1) [E, P], b = 0 [P, H], no extra scale. `rank` may be traced; a has `room` columns, those past
    the rank are 0 and stay so to the bit, because their gradients are 0. `name_V` as in `init`: one-hot tokens draw
    their row of a by it.
    """
    if which not in TRAINABLE:
        raise InputError(f"what is trained is {which!r}; choose one of {', '.join(TRAINABLE)}")
    if which == "all":
        fixed = ("embed",) if cfg.embedding == "gaussian" else ()
        return ({k: v for k, v in params.items() if k not in fixed}, {k: params[k] for k in fixed if k in params})
    if which == "mlp_in":
        return {"in": params["in"]}, {k: v for k, v in params.items() if k != "in"}
    E, H = params["in"].shape
    column = jnp.arange(room)
    name_E = jnp.arange(E) if name_V is None or cfg.embedding != "one_hot" else jnp.asarray(name_V)

    def entry(name, p):  # one by one, so that a start does not depend on the room for tokens or ranks beside it
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, p), name))

    a_EP = jax.vmap(lambda name: jax.vmap(lambda p: entry(name, p))(column))(name_E) * np.float32(0.1)
    a_EP = jnp.where(column[None] < rank, a_EP, 0.0)
    return {"a": a_EP, "b": jnp.zeros((room, H))}, params


def assemble(trained: Params, frozen: Params) -> Params:
    """The model's parameters; differentiable in both."""
    if "a" in trained:
        return frozen | {"in": frozen["in"] + jnp.matmul(trained["a"], trained["b"])}
    return frozen | trained


# --- banks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How members are trained, alike for all of them; static under `jit`. The rates of the steps are a member's own."""

    steps: int
    batch: int
    optimizer: str = "adam"
    chunk: int = 25  # steps that a member takes before the next one's turn

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"optimizer is {self.optimizer!r}; choose one of {', '.join(OPTIMIZERS)}")
        if self.steps % self.chunk:
            raise InputError(f"{self.steps} steps do not divide into chunks of {self.chunk}; choose a multiple of it")

    @property
    def chunks(self) -> int:
        return self.steps // self.chunk

    def rates(self, lr: float, schedule: str = "constant") -> jax.Array:
        """The rate of every step, float32 [steps]; see `train.OptimizerConfig`, a run being one epoch."""
        return train.learning_rates(train.OptimizerConfig(lr=lr, schedule=schedule), self.steps)


RowsFn = Callable[[jax.Array, Any], jax.Array]  # (key, a member's data) -> ids [B, T]


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    return optax.scale_by_adam() if recipe.optimizer == "adam" else optax.identity()


def init_bank(trained_G: Params, recipe: Recipe, key: jax.Array) -> train.TrainState:
    """A bank before its first step: `trained_G` has the leading axis G."""
    return train.init_grid(trained_G, _optimizer(recipe), key)


@functools.lru_cache(maxsize=64)
def make_step(
    cfg: OneLayerConfig, recipe: Recipe, rows: RowsFn, at: tuple[int, ...], mesh: Mesh, loop: bool | None = None
):
    """The step of a bank, see `train.grid_step`: `frozen` holds what `assemble` adds, `data` is handed to `rows`, with
    `used_V` below it masking the vocabulary. Metrics of member g: `loss_t_g`, `hits_t_g` of every position t in `at`.
    """
    per_row = np.float32(1.0 / recipe.batch)

    def mean_loss(trained, frozen, key, data):
        total, sums = loss(assemble(trained, frozen), rows(key, data), cfg, at, data["used_V"])
        return total * per_row, {name: sums[name] * per_row for name in sums if name != "count"}

    return train.grid_step(mean_loss, _optimizer(recipe), recipe.chunk, mesh, loop)


# --- measurements: sets of ids are given as bool [V] ------------------------------------------------------------------


class Spectrum(NamedTuple):
    """Singular values of a gradient of W_in and where it points."""

    top_share: jax.Array  # share of the squared norm in the largest singular value
    values_P: jax.Array  # the largest eight singular values
    cosine: jax.Array  # of the negative gradient of the format rows, their mean, with the mean template row
    format_mass: jax.Array  # share of the top left singular vector's square on the format rows


def gradient_spectrum(
    params: Params, ids_BT: jax.Array, cfg: OneLayerConfig, form_V, template_V, used_V=None
) -> Spectrum:
    """The gradient of the fine-tuning loss with respect to W_in, before fine-tuning.

    At a random start the top share is already .88 to .91, and the mass of the top left vector on the format row is
    given by the data: only the cosine tells learning (compare with `init`). One-hot embeddings only, where rows of
    W_in belong to tokens.
    """
    if cfg.embedding != "one_hot":
        raise InputError("the gradient's rows are tokens only where the embedding is one_hot")

    def mean_loss(W):
        return loss(params | {"in": W}, ids_BT, cfg, QUESTION_AT, used_V)[0] / np.float32(ids_BT.shape[0])

    grad_VH = jax.grad(mean_loss)(params["in"])
    left, values, _ = jnp.linalg.svd(grad_VH, full_matrices=False)
    cosine = _cosine(-_mean_row(grad_VH, form_V), _mean_row(params["in"], template_V))
    mass = jnp.where(form_V, left[:, 0] ** 2, 0.0).sum()
    return Spectrum(values[0] ** 2 / (values**2).sum(), values[:8], cosine, mass)


def _mean_row(W_VH, of_V) -> jax.Array:
    return jnp.where(of_V[:, None], W_VH, 0.0).sum(0) / jnp.maximum(of_V.sum(dtype=jnp.float32), 1.0)


def _cosine(a, b) -> jax.Array:
    return (a * b).sum(-1) / jnp.maximum(jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1), 1e-12)


def direction_change(before_VH, after_VH, form_V, template_V, subject_V) -> dict[str, jax.Array]:
    """Where fine-tuning moved the format rows of W_in: cosine of their mean change with the mean template row
    (`template`), and the mean cosine with the subjects' rows (`subject`), both taken before fine-tuning."""
    moved_H = _mean_row(after_VH - before_VH, form_V)
    cosine_V = _cosine(moved_H[None], before_VH)
    subject = jnp.where(subject_V, cosine_V, 0.0).sum() / subject_V.sum(dtype=jnp.float32)
    return {"template": _cosine(moved_H, _mean_row(before_VH, template_V)), "subject": subject}


def template_geometry(W_in_VH: jax.Array, template_V: jax.Array, attribute_V: jax.Array) -> dict[str, jax.Array]:
    """Do templates of one attribute share a direction? Mean cosine of two templates of the same attribute (`within`)
    and of different ones (`between`, NaN for one attribute); `attribute_V` int [V] says whose a template is."""
    unit = W_in_VH / jnp.maximum(jnp.linalg.norm(W_in_VH, axis=-1, keepdims=True), 1e-12)
    cosine_VV = jnp.matmul(unit, unit.T)
    pair_VV = template_V[:, None] & template_V[None] & ~jnp.eye(len(unit), dtype=bool)
    same_VV = attribute_V[:, None] == attribute_V[None]

    def mean(mask_VV):
        count = mask_VV.sum(dtype=jnp.float32)
        return jnp.where(mask_VV, cosine_VV, 0.0).sum() / jnp.where(count > 0, count, jnp.float32(jnp.nan))

    return {"within": mean(pair_VV & same_VV), "between": mean(pair_VV & ~same_VV)}
