"""Training dictionaries in banks: G of them in one compiled step, one alone being a bank of one.

Members share their shape (`DictionaryConfig`) and the number of steps; everything in `Hyper`, the seed and the data may
differ. Adam's moments are elementwise and norms are taken per member, so a member equals the same dictionary trained
alone, up to rounding (which Adam can amplify where a gradient is next to nothing). Beside parameters the state holds
what training knows and nobody differentiates: how long a latent has been silent, batch_topk's threshold, the norms of
the inputs.

    state = train.init_state(key, cfg, train_cfg, hyper, norm)
    step = train.make_step(cfg, train_cfg, inputs)            # inputs: see `sae_jax.activations`
    state = bert6_jax.train.fit(step, state, batch_at, FitConfig(steps))
    dictionary = train.member(state, g)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bert6_jax.errors import InputError
from sae_jax import dictionary, losses
from sae_jax.config import DictionaryConfig, TrainConfig
from sae_jax.losses import Hyper

# Above this many weights a member, members go one after the other: their products fill the machine alone. On CPUs they
# always do, which took half the time of `vmap` for small members too (`benchmarks/NOTES.md`).
LOOP_ABOVE = 2_000_000
UNTRAINED = -1.0  # batch_topk's threshold before the first step


@flax.struct.dataclass
class BankState:
    """A bank under training; leaves have the leading axis G, but for `step`, `key`, Adam's count and the source."""

    step: jax.Array  # int32 scalar
    params: Any
    opt_state: Any
    key: jax.Array  # uint32 [2], raw key data
    norm: Any  # mean [G, H, D], scale [G, H]
    silent: jax.Array  # int32 [G, F]: rows since the latent fired
    threshold: jax.Array  # [G] running mean of the smallest code kept; negative: no step yet
    p_weight: jax.Array  # [G] what keeps the penalty at its level when its exponent falls
    hyper: Any  # `Hyper` as a dict of [G]
    sites: jax.Array  # int32 [G, H]: which harvested sites a member reads
    source: Any  # state of the inputs: the ring buffer; {} where batches come from the host


def stack_hyper(members: Sequence[Hyper]) -> dict[str, jax.Array]:
    """The members' settings as arrays `[G]`."""
    if not members:
        raise InputError("a bank needs at least one member")
    types = {"k": jnp.int32}
    return {
        name: jnp.asarray([getattr(m, name) for m in members], types.get(name, jnp.float32)) for name in Hyper._fields
    }


def stack(members: Sequence[Any]) -> Any:
    """Trees of the same shape as one, with a leading axis G.

    Raises:
      InputError: members of different structure or shape, naming the first leaf that differs.
    """
    if not members:
        raise InputError("a bank needs at least one member")
    first = jax.tree_util.tree_leaves_with_path(members[0])
    for g, other in enumerate(members[1:], 1):
        there = dict(jax.tree_util.tree_leaves_with_path(other))
        here = dict(first)
        for path in [*here, *(path for path in there if path not in here)]:
            shapes = [jnp.shape(tree[path]) if path in tree else "nothing" for tree in (here, there)]
            if shapes[0] != shapes[1]:
                name = "/".join(str(getattr(entry, "key", entry)) for entry in path)
                raise InputError(
                    f"members 0 and {g} of the bank do not stack: {name} is {shapes[0]} and {shapes[1]}; give all "
                    "members one configuration, or train them in two banks"
                )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def init_state(
    key: jax.Array,
    cfg: DictionaryConfig,
    train: TrainConfig,
    hyper: Sequence[Hyper],
    norm: Any,
    *,
    params: Any = None,
    sites: Any = None,
    source: Any = None,
) -> BankState:
    """A bank before its first step.

    Args:
      key: members draw their start from `fold_in(key, g)`, unless `params` are given.
      hyper: one a member.
      norm: from `dictionary.fit_norm`, `[G, ...]`, or without that axis for all members.
      params: `[G, ...]`, to start from.
      sites: int [G, H], the sites that members read; default the first H for all.
      source: state of the inputs, from `activations.open_stream`.
    """
    G, H = len(hyper), cfg.heads
    if not G:
        raise InputError("a bank needs at least one member")
    for g, one in enumerate(hyper):
        if cfg.activation in ("topk", "batch_topk") and (one.k != int(one.k) or not 0 < one.k <= cfg.k):
            raise InputError(f"member {g} has k = {one.k}; it must be one of 1..{cfg.k}, the k of the configuration")
        for name in ("lr", "sparsity", "pre_act", "aux"):
            if not (np.isfinite(getattr(one, name)) and getattr(one, name) >= 0):
                raise InputError(f"member {g} has {name} = {getattr(one, name)}; it must be a number from 0 on")
    if params is None:
        params = jax.vmap(lambda g: dictionary.init(jax.random.fold_in(key, g), cfg))(jnp.arange(G))
    found = jax.tree.map(jnp.shape, params)
    expected = jax.tree.map(lambda leaf: (G, *leaf.shape), jax.eval_shape(lambda: dictionary.init(key, cfg)))
    if found != expected:
        raise InputError(f"parameters of shapes {found} do not make a bank of {G}: expected {expected}")
    if not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(norm)):
        raise InputError("the norm of the inputs is not finite: the activations are constant or hold NaN; check them")
    if norm["mean"].shape[-2:] != (H, cfg.width) or norm["scale"].shape not in ((H,), (G, H)):
        shapes = [list(norm[name].shape) for name in ("mean", "scale")]
        raise InputError(f"a norm of shapes {shapes} for {G} dictionaries of {H} head(s) of width {cfg.width}")
    if norm["scale"].ndim == 1:
        norm = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (G, *leaf.shape)), norm)
    params = params | {"W_dec": jax.vmap(lambda W_HFD: dictionary.tie_shared(W_HFD, cfg))(params["W_dec"])}
    if cfg.decoder == "unit":
        params = params | {"W_dec": dictionary.unit_decoder(params["W_dec"])}
    sites = np.broadcast_to(np.arange(H), (G, H)) if sites is None else np.asarray(sites)
    if sites.shape != (G, H) or sites.min() < 0:
        raise InputError(f"sites {sites.tolist()} for {G} members of {H} head(s); give {H} numbers from 0 on for each")
    if source and sites.max() >= source["x"].shape[1]:
        raise InputError(f"members read the sites {np.unique(sites)}, the stream has {source['x'].shape[1]} of them")
    return BankState(
        jnp.zeros((), jnp.int32),
        params,
        _adam(train).init(params),
        jax.random.key_data(jax.random.fold_in(key, 2**31 - 1)),
        norm,
        jnp.zeros((G, cfg.latents), jnp.int32),
        jnp.full(G, UNTRAINED, jnp.float32),
        jnp.ones(G, jnp.float32),
        stack_hyper(hyper),
        jnp.asarray(sites, jnp.int32),
        {} if source is None else source,
    )


def _adam(train: TrainConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=train.b1, b2=train.b2, eps=train.eps)


def rate(train: TrainConfig, step) -> jax.Array:
    """Share of the learning rate at a step (from 0): up over `lr_warmup`, constant, down to `lr_floor` over
    `lr_decay`."""
    step = jnp.asarray(step, jnp.float32)
    warmup, decay = max(round(train.lr_warmup * train.steps), 1), max(round(train.lr_decay * train.steps), 1)
    left = jnp.minimum((train.steps - step) / decay, 1.0)
    return jnp.minimum((step + 1.0) / warmup, train.lr_floor + (1.0 - train.lr_floor) * left)


Inputs = Callable[[Any, Any, Any], tuple[Any, jax.Array]]  # (source, batch, frozen) -> (source, x [B, S, D])


def make_step(cfg: DictionaryConfig, train: TrainConfig, inputs: Inputs, *, loop: bool | None = None):
    """The pure step of a bank for `bert6_jax.train.fit`.

    Args:
      inputs: gives the rows of all sites, `[B, S, D]`; see `activations.given` and `activations.streaming`.
      loop: members one after the other instead of side by side; default by backend and size.

    Metrics are means over the batch: `loss` (mean over members), and for member g `loss_g`, `error_g`, `l0_g`,
    `dead_g`, `grad_norm` (of all), and `inputs_finite`, which tells bad activations from a rate that is too high.
    """
    if loop is None:
        loop = jax.default_backend() == "cpu" or cfg.heads * cfg.latents * cfg.width > LOOP_ABOVE
    tx = _adam(train)

    def gradients(params, x_BHD, norm, silent_F, hyper, p_weight, progress, following, with_aux: bool):
        y_BHD, _ = dictionary.normalise(norm, x_BHD, cfg)
        dead_F = silent_F >= train.dead_after if with_aux else None
        with_hyper = Hyper(**hyper)

        def loss(params):
            return losses.loss(
                params, y_BHD, cfg, train, with_hyper, dead_F=dead_F, progress=progress, p_weight=p_weight
            )

        grads, parts = jax.grad(loss, has_aux=True)(params)
        if cfg.decoder == "unit":
            grads = grads | {"W_dec": dictionary.tangent(grads["W_dec"], params["W_dec"])}
        grads = grads | {"W_dec": dictionary.tie_shared(grads["W_dec"], cfg)}
        norm_ = optax.tree.norm(grads)
        if train.clip:
            grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, train.clip / jnp.maximum(norm_, 1e-12)), grads)
        return grads, (parts, norm_, _annealed(params, y_BHD, cfg, p_weight, progress, following))

    def over_members(with_aux: bool):
        def run(state, x):
            # both in one way, so that the step that lowers the exponent and the one before it agree on when
            progress, following = ((state.step + i).astype(jnp.float32) / train.steps for i in (0, 1))

            def one(params, x_BHD, norm, silent_F, hyper, p_weight):
                return gradients(params, x_BHD, norm, silent_F, hyper, p_weight, progress, following, with_aux)

            each = (state.params, x, state.norm, state.silent, state.hyper, state.p_weight)
            return jax.lax.map(lambda args: one(*args), each) if loop else jax.vmap(one)(*each)

        return run

    def step(state: BankState, batch, frozen=None) -> tuple[BankState, dict[str, jax.Array]]:
        source, x_BSD = inputs(state.source, batch, frozen)
        # a site that is not there reads NaN, not its neighbour
        x = jax.vmap(lambda sites_H: x_BSD.at[:, sites_H].get(mode="fill", fill_value=jnp.nan))(state.sites)
        dictionary.check_width(x[0], cfg)
        B = x_BSD.shape[0]
        # One branch for the whole bank: inside of `vmap` a condition would compute both of its sides.
        revive = ((state.silent >= train.dead_after) & (state.hyper["aux"] > 0)[:, None]).any()
        grads, (parts, norm_G, p_weight) = jax.lax.cond(revive, over_members(True), over_members(False), state, x)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises Python floats to integer step counts
            updates, opt_state = tx.update(grads, state.opt_state)
        lr_G = state.hyper["lr"] * rate(train, state.step)

        def apply(path, p, u):
            factor = train.threshold_lr if path[-1].key == "log_threshold" else 1.0
            return p - lr_G.reshape(-1, *(1,) * (p.ndim - 1)) * np.float32(factor) * u

        params = jax.tree_util.tree_map_with_path(apply, state.params, updates)
        if cfg.decoder == "unit":
            params = params | {"W_dec": dictionary.unit_decoder(params["W_dec"])}
        silent = jnp.where(parts.fired_F, 0, jnp.minimum(state.silent + B, 2**30))
        least_G = jnp.where(jnp.isfinite(parts.least), parts.least, state.threshold)
        # a mean over the last tenth of the steps so far, and never a longer one than `threshold_decay` makes: the first
        # batches keep codes that are far too large
        seen = state.step.astype(jnp.float32)
        kept = jnp.minimum(train.threshold_decay, seen / (seen + 10.0))
        threshold = jnp.where(state.threshold < 0, least_G, kept * state.threshold + (1.0 - kept) * least_G)
        metrics = {"loss": parts.loss.mean(), "grad_norm": optax.tree.norm(norm_G)}
        metrics["inputs_finite"] = jnp.isfinite(x).all().astype(jnp.float32)
        dead_G = (silent >= train.dead_after).mean(-1, dtype=jnp.float32)
        for g in range(dead_G.size):
            metrics |= {f"loss_{g}": parts.loss[g], f"error_{g}": parts.error[g], f"l0_{g}": parts.l0[g]}
            metrics[f"dead_{g}"] = dead_G[g]
        return state.replace(
            step=state.step + 1, params=params, opt_state=opt_state, silent=silent, threshold=threshold,
            p_weight=p_weight, source=source,
        ), metrics  # fmt: skip

    return step


def _annealed(params, y_BHD, cfg: DictionaryConfig, p_weight, progress, following):
    """The penalty's weight for the next step: where its exponent is about to fall, what leaves the penalty of this
    batch as it is (dictionary_learning keeps the mean of ten batches at its level)."""
    if cfg.p_end == 1.0 or cfg.activation not in ("relu", "gated"):
        return p_weight
    now, then = losses.exponent(cfg, progress), losses.exponent(cfg, following)
    pre_BF = dictionary.pre_activations(params, y_BHD, cfg)
    n_F = dictionary.code_weights(params, cfg)
    on_BF = jax.nn.relu(dictionary.gated(params, pre_BF)[1] if cfg.activation == "gated" else pre_BF) * n_F[None]
    before, after = (losses.power_sum(on_BF, p, losses.shares(cfg)) for p in (now, then))
    ratio = before / jnp.maximum(after, 1e-20)
    return jnp.where(then < now, p_weight * ratio, p_weight)


def member(state: BankState, g: int) -> dictionary.Dictionary:
    """Dictionary g of a bank, as `dictionary.encode` reads it and `save` keeps it."""
    return jax.tree.map(lambda leaf: leaf[g], members(state))


def members(state: BankState) -> dictionary.Dictionary:
    """The whole bank as one tree `[G, ...]`, for `jax.vmap` over `dictionary.encode` and the like."""
    return {"params": state.params, "norm": state.norm, "threshold": state.threshold, "k": state.hyper["k"]}
