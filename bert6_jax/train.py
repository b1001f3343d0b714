"""One train loop for everything: language models, heads, dictionaries, toy models.

A step is a pure function `step(state, batch) -> (state, metrics)`. `fit` runs it, several steps a dispatch if asked,
over a mesh of any size, with checkpoints, snapshots, resume, preemption and a guard against NaN. Batches come from a
pure function of the step number, so a resumed run sees what the uninterrupted one would have seen.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.serialization import from_state_dict, to_state_dict

from bert6_jax import checkpoint, parallel
from bert6_jax.errors import InputError
from bert6_jax.objectives import LossFn, Sums
from bert6_jax.progress import Progress


class Diverged(InputError):
    """The loss or the gradient is not finite."""


@flax.struct.dataclass
class TrainState:
    """Everything a run is made of; `key` is raw uint32 key data and never changes, steps fold their number in."""

    step: jax.Array  # int32 scalar
    params: Any
    opt_state: Any
    key: jax.Array  # uint32 [2]


def init_state(params: Any, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jax.random.key_data(key))


# --- optimiser -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. The default is the recipe of arXiv 2507.14871: no warm-up, no clipping, decay on all.

    `schedule`: `epoch_linear` lowers the rate once an epoch, lr (E - e) / E in epoch e; `epoch_linear_main_py` is the
    same with epoch 0 at rate 0, as the authors' main.py does it; `warmup_linear` (ours) rises over `warmup` of the
    steps and falls to zero, step by step; `warmup_cosine` rises in the same way and falls to `final` of the rate along
    a cosine (arXiv 2311.12786); `cosine` falls from the first step on; `step` (ours) divides the rate by ten
    at half and again at three quarters of the steps; `constant`.
    """

    lr: float = 5e-5
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    schedule: str = "epoch_linear"
    warmup: float = 0.1
    final: float = 0.01


STEP_SCHEDULES = ("warmup_linear", "warmup_cosine", "cosine", "step", "constant")  # that need no epochs
SCHEDULES = ("epoch_linear", "epoch_linear_main_py", *STEP_SCHEDULES)


def learning_rate(cfg: OptimizerConfig, step, steps, steps_per_epoch) -> jax.Array:
    """The rate at `step` (from 0) of a run of `steps` steps; all three may be traced."""
    step, steps, steps_per_epoch = (jnp.asarray(x, jnp.float32) for x in (step, steps, steps_per_epoch))
    epochs = jnp.ceil(steps / steps_per_epoch)
    epoch = jnp.minimum(jnp.floor(step / steps_per_epoch), epochs - 1.0)
    if cfg.schedule == "constant":
        share = jnp.ones_like(step)
    elif cfg.schedule == "epoch_linear":
        share = (epochs - epoch) / epochs
    elif cfg.schedule == "epoch_linear_main_py":
        # one warm-up unit: epoch 0 at rate 0, then the decay over the epochs that are left
        share = jnp.where(epoch == 0.0, 0.0, (epochs - epoch) / jnp.maximum(epochs - 1.0, 1.0))
    elif cfg.schedule in ("warmup_linear", "warmup_cosine"):
        warmup = jnp.maximum(jnp.round(cfg.warmup * steps), 1.0)
        left = (steps - step) / jnp.maximum(steps - warmup, 1.0)  # 1 where the warm-up ends, 0 after the last step
        if cfg.schedule == "warmup_cosine":
            left = cfg.final + (1.0 - cfg.final) * 0.5 * (1.0 - jnp.cos(jnp.pi * jnp.clip(left, 0.0, 1.0)))
        share = jnp.minimum((step + 1.0) / warmup, left)
    elif cfg.schedule == "cosine":
        share = 0.5 * (1.0 + jnp.cos(jnp.pi * step / steps))
    elif cfg.schedule == "step":
        share = jnp.where(step < 0.5 * steps, 1.0, jnp.where(step < 0.75 * steps, 0.1, 0.01))
    else:
        raise InputError(f"schedule is {cfg.schedule!r}; choose one of {', '.join(SCHEDULES)}")
    return cfg.lr * share


def learning_rates(cfg: OptimizerConfig, steps: int) -> jax.Array:
    """The rate of every step of a run that is one epoch, float32 [steps]."""
    return jax.vmap(lambda step: learning_rate(cfg, step, steps, steps))(jnp.arange(steps))


_zero_moments = jax.jit(optax.scale_by_adam().init)  # the same for every b1, b2 and eps


def _init_moments(params):
    """Adam's zeros. One program a tree, where eager zeros are one a shape; those lie where the parameters do, though,
    which matters away from the default device."""
    here = {jax.devices()[0]}
    arrays = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    eager = any(isinstance(leaf, jax.core.Tracer) or leaf.devices() != here for leaf in arrays)
    return optax.scale_by_adam().init(params) if eager else _zero_moments(params)


class ScheduleState(NamedTuple):
    count: jax.Array  # int32, updates made
    steps: jax.Array  # int32, of the whole run
    steps_per_epoch: jax.Array  # int32


def make_optimizer(cfg: OptimizerConfig, steps: int, steps_per_epoch: int) -> optax.GradientTransformation:
    """AdamW. The horizon is data in the optimiser's state, so runs of every length share one compiled program."""

    def init_schedule(params):
        return ScheduleState(*(jnp.asarray(n, jnp.int32) for n in (0, steps, steps_per_epoch)))

    def apply_schedule(updates, state, params=None):
        rate = learning_rate(cfg, *state)
        return jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates), state._replace(count=state.count + 1)

    adam = optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps)
    return optax.chain(
        optax.GradientTransformation(_init_moments, adam.update),
        optax.add_decayed_weights(cfg.weight_decay),
        optax.GradientTransformation(init_schedule, apply_schedule),
    )


# --- steps -----------------------------------------------------------------------------------------------------------

GradFn = Callable[[Any, Any, jax.Array, Any], tuple[Any, Sums]]  # (params, batch, key, frozen) -> (gradient, sums)


def grad_of(loss_fn: LossFn) -> GradFn:
    """Gradient of a summed loss that needs nothing frozen."""

    def grads_and_sums(params, batch, key, frozen):
        (_, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)
        return grads, sums

    return grads_and_sums


def bank(grad_fn: GradFn, frozen_axis: int | None = None) -> GradFn:
    """G members trained in one step: parameters `[G, ...]`, batches `[B, G, ...]`, keys folded with the member's index.

    `frozen_axis=0`: the frozen arrays are stacked too; None: all members share them. AdamW is elementwise, so a member
    of the bank equals the same thing trained alone. The sums are means over the members; `member_count` and
    `member_loss` [G] let `make_step` divide each member's gradient by its own count, and report `loss_0`, `loss_1`, ...
    """

    def grads_and_sums(params, batch, key, frozen):
        G = jax.tree.leaves(params)[0].shape[0]
        keys_G = jax.vmap(lambda g: jax.random.fold_in(key, g))(jnp.arange(G))
        grads, sums_G = jax.vmap(grad_fn, in_axes=(0, 1, 0, frozen_axis))(params, batch, keys_G, frozen)
        sums = jax.tree.map(lambda x_G: x_G.mean(), sums_G)
        return grads, sums | {"member_count": sums_G["count"], "member_loss": sums_G["loss"]}

    return grads_and_sums


def make_step(grad_fn: GradFn, tx: optax.GradientTransformation, axis_name: str | None = None):
    """The pure step. Gradients and metrics are sums over examples, divided once by the global count.

    Under `jit` over a mesh the sums are global as they stand; with `axis_name` the same step runs under `jax.pmap` or
    `jax.shard_map`, which add them with `psum`. The metrics are the sums plus `grad_norm` (of the mean gradient).
    `frozen` holds arrays that the loss reads and nobody trains (the trunk under a readout).
    """

    def step(state: TrainState, batch, frozen=None) -> tuple[TrainState, Sums]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        grads, sums = grad_fn(state.params, batch, key, frozen)
        if axis_name is not None:
            grads, sums = jax.lax.psum((grads, sums), axis_name)
        count = jnp.maximum(sums["count"], 1.0)
        if "member_count" in sums:  # a bank
            count_G, loss_G = jnp.maximum(sums.pop("member_count"), 1.0), sums.pop("member_loss")
            sums |= {f"loss_{g}": loss_G[g] * count / count_G[g] for g in range(count_G.size)}
            grads = jax.tree.map(lambda g: g / count_G.reshape(-1, *(1,) * (g.ndim - 1)).astype(g.dtype), grads)
        else:
            grads = jax.tree.map(lambda g: g * (1.0 / count).astype(g.dtype), grads)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises Python floats to integer step counts
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = sums | {"grad_norm": optax.tree.norm(grads)}
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step


def many_steps(step):
    """`(state, batches [S, ...], n, frozen) -> (state, metrics [S])`: the first n of S steps in one dispatch.

    n is data, not shape: one compiled program serves every partition of a run into dispatches, so where a run is cut
    (snapshots, checkpoints, a kill) cannot change its arithmetic.
    """
    # Traced once for its shapes and for the loop; inlined, so that the program is what it is without.
    step = jax.jit(step, inline=True)

    def run(state, batches, n, frozen):
        S = jax.tree.leaves(batches)[0].shape[0]

        def at(i):
            return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batches)

        shapes = jax.eval_shape(step, state, at(0), frozen)[1]
        metrics = jax.tree.map(lambda m: jnp.zeros((S, *m.shape), m.dtype), shapes)

        def body(i, carry):
            state, metrics = carry
            state, now = step(state, at(i), frozen)
            return state, jax.tree.map(lambda all_, one: all_.at[i].set(one), metrics, now)

        return jax.lax.fori_loop(0, n, body, (state, metrics))

    return run


# Dense bfloat16 peak of one device in FLOP/s, from the makers' data sheets.
_PEAK_BF16 = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


def device_peak_flops() -> float:
    """FLOP/s that one device can do: the data sheet's bfloat16 rate, or on other devices a measured matrix product."""
    kind = jax.devices()[0].device_kind
    for name, peak in _PEAK_BF16.items():
        if name in kind:
            return peak
    n = 1_024  # the rate of larger ones within a few per cent, and every start pays for it
    x = jnp.full((n, n), 0.5, jnp.float32)
    matmul = jax.jit(jnp.matmul)
    matmul(x, x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        matmul(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


@functools.lru_cache(maxsize=16)
def _compiled(step, mesh, structure, shardings):
    """One jitted dispatch for a step and a layout: runs that share their step compile it once in a process."""
    out = (jax.tree.unflatten(structure, shardings), parallel.replicated(mesh))
    return jax.jit(many_steps(step), donate_argnums=0, out_shardings=out)


# --- the loop --------------------------------------------------------------------------------------------------------


def log_spaced(steps: int, even: int = 0, per_octave: int = 1) -> tuple[int, ...]:
    """0, 1, 2, 4, 8, ... and the last step; with `even` also so many at equal distances.

    `per_octave`: how many from a power of two up to the next, rounded to whole steps.
    """
    powers = (round(2 ** (i / per_octave)) for i in range(per_octave * steps.bit_length()))
    powers = (power for power in powers if power < steps)
    return tuple(sorted({0, *powers, *(round(steps * i / even) for i in range(1, even)), steps}))


@dataclass(frozen=True)
class FitConfig:
    """How a run is cut. `dispatch` steps go to the device at once; a checkpoint every `checkpoint_every` steps."""

    steps: int
    dispatch: int = 1
    checkpoint_every: int = 1_000
    snapshots: tuple[int, ...] = ()  # steps after which `on_snapshot` is called (0: before the first)


def fit(
    step,
    state: TrainState,
    batch_at: Callable[[int], dict[str, np.ndarray]],
    cfg: FitConfig,
    *,
    frozen: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    folder: str | Path | None = None,
    description: dict[str, Any] | None = None,
    on_start: Callable[[int], None] = lambda step: None,
    on_metrics: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    on_snapshot: Callable[[int, Any], None] = lambda step, params: None,
    label: str = "train",
    tokens_per_step: int = 0,
    flops_per_step: float = 0.0,
    peak_flops: float = 0.0,
    quiet: bool = False,
) -> TrainState:
    """Train from `state` (or from the newest checkpoint in `folder`) to `cfg.steps`; returns the final state.

    `batch_at(step)` gives the host batch of a step, leading axis B. `on_start(step)` hears where the run begins,
    `on_metrics(step, metrics)` every step's metrics in order (the means `loss` and `accuracy` in place of their sums),
    one dispatch late; `on_snapshot(step, params)` gets the parameters at the snapshot steps. On SIGTERM and SIGINT the
    state is saved, then the signal goes to whoever had it before (by default it ends the process); a loss that is not
    finite raises `Diverged`, and such a state is never saved. With `tokens_per_step` and `flops_per_step` the progress
    bar shows tokens/s and the share of `peak_flops` that the model's own operations reach (MFU).
    """
    mesh = parallel.make_mesh(1) if mesh is None else mesh
    description = description or {}
    shardings = parallel.state_shardings(state, mesh)
    start = 0
    if folder is not None:
        checkpoint.clean(folder)
        if saved := checkpoint.steps(folder):
            start = saved[-1]
            state = _load_state(checkpoint.step_path(folder, start), state, shardings, description)
    if start == 0:
        # copies: the loop donates its state, and the caller's parameters must survive that
        state = jax.device_put(jax.tree.map(jnp.array, state), shardings)
    on_start(start)
    frozen = jax.device_put(frozen, parallel.state_shardings(frozen, mesh))
    leaves, structure = jax.tree.flatten(shardings)
    dispatch = _compiled(step, mesh, structure, tuple(leaves))
    stops = sorted({s for s in (*cfg.snapshots, cfg.steps) if s <= cfg.steps})
    every = cfg.checkpoint_every
    pending: tuple[int, int, Any] | None = None

    def read(progress):
        """Fetch and report the metrics of the last dispatch; the device is already at work on the next."""
        nonlocal pending
        if pending is None:
            return
        first, n, metrics = pending
        pending = None
        metrics = jax.device_get(metrics)
        for i in range(n):
            now = _means({name: float(values[i]) for name, values in metrics.items()})
            if not (math.isfinite(now.get("loss", 0.0)) and math.isfinite(now["grad_norm"])):
                last = checkpoint.steps(folder)[-1:] if folder is not None else []
                kept = f"the checkpoint of step {last[0]} is kept" if last else "no checkpoint was written yet"
                if not now.get("inputs_finite", 1.0):
                    raise Diverged(
                        f"{label}: the inputs of step {first + i + 1} hold NaN or infinity; check them ({kept})"
                    )
                raise Diverged(
                    f"{label}: loss {now.get('loss')} and gradient norm {now['grad_norm']} at step {first + i + 1}; "
                    f"lower the learning rate or raise the warm-up ({kept})"
                )
            on_metrics(first + i + 1, now)
        shown = {name: now[name] for name in ("loss", "accuracy") if name in now}
        clock.append((time.monotonic(), first + n))
        del clock[:-20]
        rate = (clock[-1][1] - clock[0][1]) / max(clock[-1][0] - clock[0][0], 1e-9)
        if tokens_per_step:
            shown["tokens/s"] = f"{rate * tokens_per_step:,.0f}"
        if flops_per_step and peak_flops:
            shown["MFU"] = f"{rate * flops_per_step / peak_flops:.0%}"
        progress.update(n, **shown)

    def save(step_now):
        if folder is None or step_now in checkpoint.steps(folder):
            return
        unfinished.close()  # one write at a time
        saving = checkpoint.save(
            checkpoint.step_path(folder, step_now), to_state_dict(state), kind="train_state", step=step_now,
            config=description, wait=False,
        )  # fmt: skip
        unfinished.callback(saving.result)

    now = start
    clock = [(time.monotonic(), start)]
    with (
        _Signals() as signals,
        Progress(cfg.steps, label, done=start, quiet=quiet) as progress,
        contextlib.ExitStack() as unfinished,
    ):
        if now == 0 and 0 in cfg.snapshots:
            on_snapshot(0, state.params)
        while now < cfg.steps:
            boundary = min(
                [s for s in stops if s > now] + [now + cfg.dispatch - now % cfg.dispatch, now + every - now % every]
            )
            n = boundary - now
            batches = [batch_at(min(now + i, cfg.steps - 1)) for i in range(cfg.dispatch)]
            batches = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
            state, metrics = dispatch(state, parallel.put_batches(batches, mesh), n, frozen)
            read(progress)
            pending = (now, n, metrics)
            now = boundary
            if now % every == 0 or now == cfg.steps or now in cfg.snapshots or signals.caught:
                read(progress)  # nothing that is not finite is ever written
                if now in cfg.snapshots:
                    on_snapshot(now, state.params)
                if now % every == 0 or now == cfg.steps or signals.caught:
                    save(now)
            if signals.caught:
                unfinished.close()
                signals.pass_on()
    if folder is not None:
        checkpoint.clean(folder, keep=now)
    return state


def _means(sums: dict[str, float]) -> dict[str, float]:
    """Divide the sums of one step by its count: `loss*` and `accuracy` (from `hits`); the rest as it is."""
    count = max(sums.get("count", 1.0), 1.0)
    means = {name: value / count for name, value in sums.items() if name.startswith("loss")}
    if "hits" in sums:
        means["accuracy"] = sums["hits"] / count
    return means | {name: value for name, value in sums.items() if name not in means and name != "hits"}


def _load_state(path: Path, like: TrainState, shardings: TrainState, description: dict[str, Any]) -> TrainState:
    def abstract(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    like_dict = to_state_dict(jax.tree.map(abstract, like, shardings))
    loaded = checkpoint.load(path, kind="train_state", like=like_dict)
    if loaded.config != description:
        differing = sorted(
            k for k in loaded.config.keys() | description.keys() if loaded.config.get(k) != description.get(k)
        )
        raise InputError(f"{path} was trained with other settings ({', '.join(differing)}); use another folder")
    return from_state_dict(like, loaded.tree)


class _Signals:
    """Remember SIGTERM and SIGINT instead of dying of them; a second one is obeyed at once."""

    def __init__(self):
        self.caught = 0
        self._before = {}

    def __enter__(self):
        def handler(signum, frame):
            self.caught = signum
            self._restore()

        try:
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, handler)
        except ValueError:  # not the main thread: signals stay with whoever owns them
            pass
        return self

    def pass_on(self):
        """Give the caught signal to whoever owned it before."""
        self._restore()
        signal.raise_signal(self.caught)
        raise KeyboardInterrupt  # the owner ignored it; the run stops all the same

    def _restore(self):
        for signum, before in self._before.items():
            signal.signal(signum, before)
        self._before = {}

    def __exit__(self, *exc):
        self._restore()
        return False


# --- grids: many members that do not fit side by side ----------------------------------------------------------------

MemberLoss = Callable[[Any, Any, jax.Array, Any], tuple[jax.Array, dict[str, jax.Array]]]


def take(tree: Any, index) -> Any:
    """Some members of a grid: `leaf[index]` of every leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def init_grid(trained_G: Any, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """A grid before its first step: `trained_G` has the leading axis G."""
    G = jax.tree.leaves(trained_G)[0].shape[0]
    state = {"optimizer": jax.vmap(tx.init)(trained_G), "finite": jnp.ones(G, bool)}
    return TrainState(jnp.zeros((), jnp.int32), trained_G, state, jax.random.key_data(key))


def grid_step(
    loss: MemberLoss,
    tx: optax.GradientTransformation,
    chunk: int,
    mesh: jax.sharding.Mesh,
    loop: bool | None = None,
):
    """The step of a grid for `fit`: one of its steps is `chunk` steps of each of G members.

    A grid is a bank (see `bank`) whose members draw their own rows inside of the step and are spread over devices
    (`parallel.over_members`, `loop` as there): on CPUs a device takes them one after the other, `chunk` steps each,
    while a member's state is in the cache. A member equals the same member alone.

    Args:
      loss: `(trained, frozen, key, data) -> (mean loss, {name: mean})`; it draws its rows by `key` from `data`.
      tx: the optimiser without its rate; the rates of the steps are a member's own.

    The step's frozen argument is `{"rate" [G, steps], "seed" uint32 [G], "frozen", "base" int32 [G], "data"}`: `frozen`
    is stacked, and a member reads its entry `base`; `data` has the leading axis G. The key of a step comes from a
    member's seed and the step alone. A member whose loss or gradient is not finite stops where it was: `finite_g` says
    0 from then on, and the others go on. Metrics of a chunk, means over its steps: `loss` (over finite members),
    `grad_norm`, and `loss_g` and `NAME_g` of member g.
    """

    def members_chunk(shared, member):
        first, frozen_P = shared
        trained, opt_state, finite, rate_S, seed, base, data = member
        frozen = take(frozen_P, base)

        @functools.partial(jax.jit, inline=True)  # traced once for its names and for the loop, as in `many_steps`
        def step(now, trained):
            key = jax.random.fold_in(jax.random.key(seed), now)
            (mean, means), grads = jax.value_and_grad(loss, has_aux=True)(trained, frozen, key, data)
            return {"loss": mean} | means, grads

        def body(i, carry):
            trained, opt_state, finite, sums, norm = carry
            now = first * chunk + i
            means, grads = step(now, trained)
            with jax.numpy_dtype_promotion("standard"):  # Optax raises Python floats to integer step counts
                updates, moments = tx.update(grads, opt_state, trained)
            grad_norm = optax.tree.norm(grads)
            finite = finite & jnp.isfinite(means["loss"]) & jnp.isfinite(grad_norm)

            def choose(old, new):
                return jax.tree.map(lambda a, b: jnp.where(finite, b, a), old, new)

            trained = choose(trained, jax.tree.map(lambda p, u: p - rate_S[now] * u, trained, updates))
            sums = {name: total + jnp.where(finite, means[name], 0.0) for name, total in sums.items()}
            return trained, choose(opt_state, moments), finite, sums, norm + jnp.where(finite, grad_norm, 0.0)

        names = jax.eval_shape(step, jnp.zeros((), jnp.int32), trained)[0]
        carry = (trained, opt_state, finite, {name: jnp.zeros(()) for name in names}, jnp.zeros(()))
        trained, opt_state, finite, sums, norm = jax.lax.fori_loop(0, chunk, body, carry)
        per_step = np.float32(1.0 / chunk)
        return trained, opt_state, finite, jax.tree.map(lambda x: x * per_step, sums), norm * per_step

    run = parallel.over_members(members_chunk, mesh, loop)

    def step(state: TrainState, batch, frozen):
        G = frozen["rate"].shape[0]
        members = (
            state.params, state.opt_state["optimizer"], state.opt_state["finite"],
            frozen["rate"], frozen["seed"], frozen["base"], frozen["data"],
        )  # fmt: skip
        trained, moments, finite_G, means, norm_G = run((state.step, frozen["frozen"]), members)
        finite = finite_G.astype(jnp.float32)
        loss_all = jnp.where(finite_G, means["loss"], 0.0).sum() / jnp.maximum(finite.sum(), 1.0)
        metrics = {"grad_norm": optax.tree.norm(norm_G), "count": jnp.ones(()), "loss": loss_all}
        for g in range(G):
            metrics |= {f"{name}_{g}": mean_G[g] for name, mean_G in means.items()} | {f"finite_{g}": finite[g]}
        opt_state = {"optimizer": moments, "finite": finite_G}
        return state.replace(step=state.step + 1, params=trained, opt_state=opt_state), metrics

    return step


def fit_grid(
    step,
    state: TrainState,
    inputs: dict[str, Any],
    cfg: FitConfig,
    mesh: jax.sharding.Mesh,
    *,
    folder: str | Path | None = None,
    description: dict[str, Any] | None = None,
    on_start: Callable[[int], None] = lambda number: None,
    on_metrics: Callable[[int, dict[str, float]], None] = lambda number, means: None,
    on_snapshot: Callable[[int, Any], None] = lambda number, trained: None,
    label: str = "train",
    tokens_per_step: int = 0,
    flops_per_step: float = 0.0,
    peak_flops: float = 0.0,
    quiet: bool = False,
) -> tuple[Any, dict[str, np.ndarray]]:
    """Train a grid: what is trained, on the host, and the curve of every member's metrics, `[chunks, G]` each.

    `cfg` counts in chunks, `tokens_per_step` and `flops_per_step` too. `on_metrics` hears the number of chunks done and
    the means over members. With `folder` the state is kept as by `fit`; then the curves begin where this process did,
    and are but one row of `finite` if nothing was left to do.
    """
    curves: dict[str, list] = {}
    G = len(inputs["rate"])

    def collect(number, values):
        for name in [key[:-2] for key in values if key.endswith("_0")]:
            curves.setdefault(name, []).append([values[f"{name}_{g}"] for g in range(G)])
        on_metrics(number, {name: float(np.mean(all_[-1])) for name, all_ in curves.items()} | {"loss": values["loss"]})

    state = fit(
        step,
        state,
        lambda number: {"row": np.zeros(mesh.size, np.int32)},  # rows are drawn in the step
        cfg,
        frozen=inputs,
        mesh=mesh,
        folder=folder,
        description=description,
        on_start=on_start,
        on_metrics=collect,
        on_snapshot=on_snapshot,
        label=label,
        tokens_per_step=tokens_per_step,
        flops_per_step=flops_per_step,
        peak_flops=peak_flops,
        quiet=quiet,
    )
    if not curves:
        curves["finite"] = [np.asarray(state.opt_state["finite"])]
    return jax.device_get(state.params), {name: np.array(values, np.float32) for name, values in curves.items()}
