"""Mesh, shardings and multi-process start: one step function for any number of devices.

The mesh has two axes: `data` splits the rows of a batch, `model` the MLP, the heads, the vocabulary and the latents of
dictionaries. Axis types are `Auto`, so `jit` chooses the collectives; one device is the mesh of size 1 x 1.
"""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bert6_jax.errors import InputError


def start() -> None:
    """Join a multi-process run when the launcher announced one (`JAX_COORDINATOR_ADDRESS`); else do nothing.

    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` are passed on; without them JAX asks the cluster (Slurm, TPU pods, ...).
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address and not jax.distributed.is_initialized():
        count, index = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(address, count and int(count), index and int(index))


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_all_cores() -> None:
    """On a CPU, one device a core (eight at most), so that grids are spread over them; before the first use of JAX."""
    jax.config.update("jax_num_cpu_devices", min(8, cores()))


def make_mesh(data: int | None = None, model: int = 1) -> Mesh:
    """A (`data`, `model`) mesh; by default every device is on `data`."""
    available = jax.device_count()
    data = available // model if data is None else data
    if data < 1 or data * model > available:
        raise InputError(f"a {data} x {model} mesh needs {data * model} devices, {available} are there; ask for fewer")
    devices = np.asarray(jax.devices()[: data * model]).reshape(data, model)
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


# Where the `model` axis cuts, by the end of a parameter's path. Negative: blocks and banks may be stacked in front.
_MODEL_AXIS = {
    ("q", "kernel"): -1, ("k", "kernel"): -1, ("v", "kernel"): -1,
    ("q", "bias"): -1, ("k", "bias"): -1, ("v", "bias"): -1,
    ("attn", "out", "kernel"): -2,
    ("mlp", "in", "kernel"): -1, ("mlp", "in", "bias"): -1, ("mlp", "out", "kernel"): -2,
    ("embed", "token"): -2,
    # dictionaries: the latents
    ("W_enc",): -2, ("W_dec",): -2, ("b_enc",): -1, ("log_threshold",): -1, ("r_mag",): -1, ("b_mag",): -1,
    ("silent",): -1,
}  # fmt: skip


def state_shardings(tree, mesh: Mesh):
    """Shardings of parameters, or of anything that carries them under the same names (optimiser moments)."""

    def sharding(path, leaf):
        names = tuple(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", "")))) for entry in path)
        for suffix, axis in _MODEL_AXIS.items():
            if names[-len(suffix) :] == suffix and leaf.shape[axis] % mesh.shape["model"] == 0:
                spec = [None] * leaf.ndim
                spec[axis] = "model"
                return NamedSharding(mesh, PartitionSpec(*spec))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def put_batches(batches, mesh: Mesh):
    """Host arrays `[S, B, ...]` to the devices, rows (axis 1) split over `data`.

    Every process passes the same global batches; each device receives its own rows. To the default device alone
    nothing is sent: the jitted step takes the host's arrays.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
    rows = next(iter(jax.tree.leaves(batches))).shape[1]
    if rows % mesh.shape["data"]:
        raise InputError(
            f"batch size {rows} does not divide over {mesh.shape['data']} devices; choose a multiple of that number"
        )
    if jax.process_count() == 1:
        # `jit` moves host arrays itself, some ten times sooner than `device_put` with a sharding.
        alone = mesh.size == 1 and mesh.devices.flat[0] == jax.devices()[0]
        return batches if alone else jax.device_put(batches, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batches)


def over_members(fn, mesh: Mesh, loop: bool | None = None):
    """`run(shared, members)`: `fn(shared, member)` for every member (leading axis G) of trees, its results stacked.

    Members are spread over the mesh's axis `data`; on a device they go side by side (`vmap`) on accelerators, and one
    after the other (`lax.map`) on CPUs or with `loop`, where one member's products fill the machine.
    """
    loop = jax.default_backend() == "cpu" if loop is None else loop

    def on_device(shared, members):
        if loop:
            return jax.lax.map(lambda member: fn(shared, member), members)
        return jax.vmap(lambda member: fn(shared, member))(members)

    whole, cut = PartitionSpec(), PartitionSpec("data")
    spread = jax.shard_map(on_device, mesh=mesh, in_specs=(whole, cut), out_specs=cut, check_vma=False)

    def run(shared, members):
        G = jax.tree.leaves(members)[0].shape[0]
        fill = -G % mesh.shape["data"]  # every device takes as many members
        filled = jax.tree.map(lambda x: jnp.concatenate([x, x[:1].repeat(fill, 0)]) if fill else x, members)
        return jax.tree.map(lambda x: x[:G], spread(shared, filled))

    return run
