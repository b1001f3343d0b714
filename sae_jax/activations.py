"""Activations: harvested from any site of any model of ours, all sites in one forward pass, and fed to dictionaries.

A site is an activation's name and depth, `("resid", 3)`; names are those of `bert6_jax.transformer.HOOK_NAMES`. Several
models of one configuration (pre-trained, fine-tuned, snapshots) are harvested side by side on the same tokens, so row r
of every site is the same token: S = models x sites, the sites of a model together.

Three ways to feed a train step (the `inputs` of `sae_jax.train.make_step`):

    streaming   ids live on the device; forward, mask, shuffled ring buffer and dictionary step are one program
    resident    activations live on the device (`frozen["x"]` [N, S, D]), batches name rows
    given       batches come from the host: shards on disk (`Shards.batch_at`) or anything else
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert6_jax import lora, transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.data.windows import rows_at
from bert6_jax.errors import InputError
from bert6_jax.objectives import forward_inputs

Site = tuple[str, int]
FORMAT = "bert6_jax/shards/1"


def residual_sites(cfg: TransformerConfig) -> tuple[Site, ...]:
    """The residual stream at every depth, 0 (embedding output) to L."""
    return tuple(("resid", depth) for depth in range(cfg.depths))


def check_sites(cfg: TransformerConfig, sites: Sequence[Site]) -> None:
    """Refuse sites that the model does not have, or that differ in width, and none at all."""
    if not sites:
        raise InputError("no sites to harvest; name at least one site, say resid:0")
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(lambda: transformer.init(jax.random.key(0), cfg))
    _, acts = jax.eval_shape(lambda p, ids: transformer.forward(p, ids, cfg), params, tokens)
    widths = {}
    for name, depth in sites:
        if name not in acts or name == "pattern":
            there = ", ".join(name for name in acts if name != "pattern")
            raise InputError(f"site {name!r} is no activation of this model; choose one of {there}")
        if not 0 <= depth < acts[name].shape[0]:
            raise InputError(f"site {name}:{depth}: {name} has the depths 0 to {acts[name].shape[0] - 1}")
        widths[name] = int(np.prod(acts[name].shape[3:]))
    if len(set(widths.values())) != 1:
        raise InputError(f"sites of different width {widths} do not make one bank; harvest them apart")


def harvest(params, batch, cfg: TransformerConfig, sites: Sequence[Site]) -> jax.Array:
    """Activations `[B, T, S, D]` of one model; heads of an activation (`z`, `q`) are side by side in D."""
    _, acts = transformer.forward(params, batch["ids"], cfg, **forward_inputs(batch))
    B, T = batch["ids"].shape
    return jnp.stack([acts[name][depth].reshape(B, T, -1) for name, depth in sites], axis=2)


def harvest_models(params_X, batch, cfg: TransformerConfig, sites: Sequence[Site]) -> jax.Array:
    """Activations `[B, T, X S, D]` of X models, parameters stacked `[X, ...]`, one model after the other."""
    x_XBTSD = jax.lax.map(lambda params: harvest(params, batch, cfg, sites), params_X)
    X, B, T, S, D = x_XBTSD.shape
    return jnp.moveaxis(x_XBTSD, 0, 2).reshape(B, T, X * S, D)


def token_mask(batch, exclude: Sequence[int] = (), first: int = 0) -> jax.Array:
    """Which positions are harvested, bool `[B, T]`: no padding (segment 0), none of the ids `exclude` ([CLS], [SEP]),
    no position before `first`, no row that only fills up a batch."""
    mask_BT = batch["segment"] > 0
    for token in exclude:
        mask_BT = mask_BT & (batch["ids"] != token)
    mask_BT = mask_BT & (jnp.arange(mask_BT.shape[1]) >= first)[None]
    return mask_BT & batch["valid"][:, None] if "valid" in batch else mask_BT


def check_finite(x_NSD, names: Sequence[str]) -> None:
    """Refuse activations that are not finite, naming the site."""
    bad_S = ~np.asarray(jnp.isfinite(x_NSD).all((0, 2)))
    if bad_S.any():
        raise InputError(
            f"activations of {names[int(np.argmax(bad_S))]} are not finite (NaN or infinity); check the model's "
            "parameters, or harvest in float32"
        )


# --- streaming -------------------------------------------------------------------------------------------------------


class Stream(NamedTuple):
    """Where a stream's rows come from, and how its buffer is fed; static."""

    model: TransformerConfig
    sites: tuple[Site, ...]
    rows: int = 32  # rows of tokens of one forward pass
    capacity: int = 65_536  # activation rows that the buffer holds
    batch: int = 2_048  # activation rows of a dictionary step
    exclude: tuple[int, ...] = ()  # ids that are not harvested
    first: int = 0  # first position that is
    dtype: str = "float32"  # of the buffer


def token_rows(ids_NT: np.ndarray, segment_NT: np.ndarray, order_N: np.ndarray) -> dict[str, jax.Array]:
    """The tokens of a stream on the device, in the order that they are read in, again and again."""
    return {"ids": jnp.asarray(ids_NT[order_N], jnp.int32), "segment": jnp.asarray(segment_NT[order_N], jnp.int32)}


def open_stream(stream: Stream, params_X, tokens: dict[str, jax.Array], seed: int) -> tuple[dict, dict]:
    """(source, frozen): a filled buffer for `train.init_state`, and the frozen argument of the step.

    `params_X`: parameters of X models, stacked `[X, ...]`.

    Raises:
      InputError: sites that are not there, fewer harvested tokens than a batch (an empty mask among them), a buffer
        smaller than a batch and a forward pass, activations that are not finite.
    """
    check_sites(stream.model, stream.sites)
    if stream.dtype not in ("float32", "bfloat16", "float16") or stream.rows < 1:
        raise InputError(f"a stream of {stream.rows} rows in {stream.dtype}; give rows from 1 on and a float dtype")
    N, T = tokens["ids"].shape
    mask_NT = np.asarray(token_mask(tokens, stream.exclude, stream.first))
    if mask_NT.sum() < stream.batch:
        raise InputError(
            f"{int(mask_NT.sum())} tokens are left after the mask, a batch takes {stream.batch}; give more text, a "
            "smaller batch, or mask less"
        )
    if stream.capacity < stream.batch + stream.rows * T:
        raise InputError(
            f"a buffer of {stream.capacity} rows does not hold a batch of {stream.batch} and a forward pass of "
            f"{stream.rows} x {T} tokens; raise the capacity"
        )
    X = jax.tree.leaves(params_X)[0].shape[0]
    shape = jax.eval_shape(
        partial(harvest_models, cfg=stream.model, sites=stream.sites),
        params_X,
        {name: jax.ShapeDtypeStruct((stream.rows, T), jnp.int32) for name in ("ids", "segment")},
    ).shape
    source = {
        "x": jnp.zeros((stream.capacity, *shape[2:]), stream.dtype),
        "count": jnp.zeros((), jnp.int32),  # rows that have not been served, x[:count]
        "row": jnp.zeros((), jnp.int32),  # row of tokens that is read next
        "key": jax.random.key_data(jax.random.key(seed)),
    }
    frozen = {"models": params_X, "tokens": tokens}
    source = jax.jit(partial(_refill, stream))(source, frozen)
    names = [f"{name}:{depth} of model {x}" for x in range(X) for name, depth in stream.sites]
    check_finite(source["x"][: int(source["count"])], names)
    return source, frozen


def _refill(stream: Stream, source, frozen):
    """Forward passes until no further one would surely fit, then a new order of everything that waits."""
    tokens, C = frozen["tokens"], stream.capacity
    N, T = tokens["ids"].shape

    def room(source):
        return source["count"] + stream.rows * T <= C

    def read(source):
        row_R = (source["row"] + jnp.arange(stream.rows, dtype=jnp.int32)) % N
        batch = {name: leaf[row_R] for name, leaf in tokens.items()}
        x_RTSD = harvest_models(frozen["models"], batch, stream.model, stream.sites)
        mask_Y = token_mask(batch, stream.exclude, stream.first).reshape(-1)
        # harvested tokens go behind what waits, in order; the others nowhere (an index beyond the buffer is dropped)
        place_Y = jnp.where(mask_Y, source["count"] + jnp.cumsum(mask_Y.astype(jnp.int32)) - 1, C)
        x_YSD = x_RTSD.reshape(-1, *x_RTSD.shape[2:]).astype(source["x"].dtype)
        return source | {
            "x": source["x"].at[place_Y].set(x_YSD, mode="drop"),
            "count": source["count"] + mask_Y.sum(dtype=jnp.int32),
            "row": (source["row"] + stream.rows) % N,
        }

    source = jax.lax.while_loop(room, read, source)
    key, now = jax.random.split(jax.random.wrap_key_data(source["key"]))
    rank_C = jnp.where(jnp.arange(C) < source["count"], jax.random.uniform(now, (C,)), 2.0)
    return source | {"x": source["x"][jnp.argsort(rank_C)], "key": jax.random.key_data(key)}


def streaming(stream: Stream) -> Callable:
    """Inputs of a step that reads the buffer and fills it, on the device, when it is half empty.

    Every harvested token is served once a pass over the text; `fit`'s batches carry nothing (`no_batch`).
    """

    def inputs(source, batch, frozen):
        del batch
        low = max(stream.capacity // 2, stream.batch)
        source = jax.lax.cond(source["count"] < low, partial(_refill, stream), lambda source, _: source, source, frozen)
        begin = source["count"] - stream.batch
        x_BSD = jax.lax.dynamic_slice_in_dim(source["x"], begin, stream.batch)
        return source | {"count": begin}, x_BSD

    return inputs


def no_batch(step: int) -> dict[str, np.ndarray]:
    """What `fit` sends where everything is on the device."""
    return {"step": np.full(jax.device_count(), step, np.int32)}


# --- from the device, from the host ----------------------------------------------------------------------------------


def resident(source, batch, frozen):
    """Inputs of a step: rows `batch["row"]` of `frozen["x"]` [N, S, D]."""
    return source, frozen["x"][batch["row"]]


def given(source, batch, frozen):
    """Inputs of a step: `batch["x"]` [B, S, D]."""
    del frozen
    return source, batch["x"]


def row_batches(seed: int, num_rows: int, batch: int) -> Callable[[int], dict[str, np.ndarray]]:
    """Batches of row numbers for `resident`: every pass in an order of its own, what does not fill a batch left out."""
    if num_rows < batch:
        raise InputError(f"{num_rows} rows do not fill a batch of {batch}; give more text or a smaller batch")

    def batch_at(step: int) -> dict[str, np.ndarray]:
        epoch, at = divmod(step, num_rows // batch)
        partial_ = num_rows % batch > 0
        return {"row": rows_at(seed, epoch * (num_rows // batch + partial_) + at, num_rows, batch)[0]}

    return batch_at


# --- shards on disk --------------------------------------------------------------------------------------------------


def write_shards(
    folder: str | Path,
    params_X,
    cfg: TransformerConfig,
    sites: Sequence[Site],
    ids_NT: np.ndarray,
    segment_NT: np.ndarray,
    *,
    description: dict[str, Any],
    rows: int = 32,
    rows_per_shard: int = 1_024,
    exclude: Sequence[int] = (),
    first: int = 0,
    dtype: str = "float32",
    progress: Callable[[int], None] = lambda rows: None,
) -> Shards:
    """Activations of all harvested tokens as `shard_00000.npy` [n, S, D], beside them `token_00000.npy` [n, 2] (row,
    position), `rows_per_shard` rows of tokens a shard. Shards that are there are kept: a killed call goes on.

    `description` says what the activations are of (JSON values). A folder made with another description, settings,
    parameters or text is refused.

    Raises:
      InputError: another description or settings in the folder, sites that are not there, an empty mask, activations
        that are not finite.
    """
    folder = Path(folder)
    check_sites(cfg, sites)
    if dtype not in ("float32", "float16"):
        raise InputError(f"shards of dtype {dtype!r}; choose float32 or float16")
    manifest = {
        "format": FORMAT, "description": description, "sites": [list(site) for site in sites],
        "models": int(jax.tree.leaves(params_X)[0].shape[0]), "token_rows": len(ids_NT), "exclude": list(exclude),
        "first": first, "dtype": dtype, "rows_per_shard": rows_per_shard, "model": lora.fingerprint(params_X),
        "text": hashlib.sha256(np.ascontiguousarray(np.stack([ids_NT, segment_NT]), np.int32).tobytes()).hexdigest(),
    }  # fmt: skip
    path = folder / "manifest.json"
    if path.exists():
        there = _manifest(folder)
        there.pop("shards", None)
        if there != json.loads(json.dumps(manifest)):
            differing = sorted(k for k in there.keys() | manifest.keys() if there.get(k) != manifest.get(k))
            raise InputError(f"{folder} holds activations of other {', '.join(differing)}; use another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _replace(path, lambda file: file.write(json.dumps(manifest, indent=2).encode()))
    run = jax.jit(partial(harvest_models, cfg=cfg, sites=tuple(sites)))
    names = [f"{name}:{depth} of model {x}" for x in range(manifest["models"]) for name, depth in sites]
    sizes = []
    for number, begin in enumerate(range(0, len(ids_NT), rows_per_shard)):
        shard, where = folder / f"shard_{number:05d}.npy", folder / f"token_{number:05d}.npy"
        end = min(begin + rows_per_shard, len(ids_NT))
        if not (shard.exists() and where.exists()):
            xs, places = [], []
            for start in range(begin, end, rows):
                row_R = np.minimum(np.arange(start, start + rows), end - 1)
                batch = {
                    "ids": ids_NT[row_R],
                    "segment": segment_NT[row_R],
                    "valid": np.arange(start, start + rows) < end,
                }
                x_RTSD = run(params_X, {name: batch[name] for name in ("ids", "segment")})
                mask_RT = np.asarray(token_mask(batch, exclude, first))
                taken_R, position = np.nonzero(mask_RT)
                xs.append(np.asarray(x_RTSD)[taken_R, position])
                places.append(np.stack([row_R[taken_R], position], axis=1).astype(np.int32))
                progress(int(batch["valid"].sum()))
            x_NSD = np.concatenate(xs)
            with np.errstate(over="ignore"):  # refused below
                x_NSD = x_NSD.astype(dtype)
            check_finite(x_NSD, names)
            _replace(where, partial(np.save, arr=np.concatenate(places)))
            _replace(shard, partial(np.save, arr=x_NSD))
        sizes.append(len(_load(where)))
    if not sum(sizes):
        raise InputError(f"{folder}: no token is left after the mask; give other text, or mask less")
    _replace(path, lambda file: file.write(json.dumps(manifest | {"shards": sizes}, indent=2).encode()))
    return open_shards(folder)


def _replace(path: Path, write: Callable) -> None:
    """Write to a temporary neighbour, sync and rename; a full disk gets its space back."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} is no folder of activation shards (manifest.json: {error}); write the shards again"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise InputError(f"{folder} has format {found!r}, this version reads {FORMAT!r}; write the shards again")
    return manifest


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is missing or damaged; remove it and call write_shards again") from error


class Shards(NamedTuple):
    """Activation shards, memory mapped."""

    manifest: dict[str, Any]
    x: list[np.ndarray]  # [n, S, D] each
    token: list[np.ndarray]  # [n, 2] each: row, position

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.x))

    def rows(self, row_B: np.ndarray) -> np.ndarray:
        """Activations of rows, float32 `[B, S, D]`."""
        ends = np.cumsum([len(x) for x in self.x])
        shard_B = np.searchsorted(ends, row_B, side="right")
        out = np.empty((len(row_B), *self.x[0].shape[1:]), np.float32)
        for shard in np.unique(shard_B):
            here = shard_B == shard
            out[here] = self.x[shard][row_B[here] - (ends[shard] - len(self.x[shard]))]
        return out

    def batch_at(self, seed: int, batch: int) -> Callable[[int], dict[str, np.ndarray]]:
        """Batches for `given`: every row once a pass, in an order of its own, but for what does not fill a batch."""
        row_at = row_batches(seed, self.num_rows, batch)
        return lambda step: {"x": self.rows(row_at(step)["row"])}


class Joined(NamedTuple):
    """Shards of several models on the same tokens, as one set of rows with the sites of all: made by `join_shards`."""

    parts: tuple[Shards, ...]

    @property
    def num_rows(self) -> int:
        return self.parts[0].num_rows

    def rows(self, row_B: np.ndarray) -> np.ndarray:
        """Activations of rows, float32 `[B, S, D]`."""
        return np.concatenate([part.rows(row_B) for part in self.parts], axis=1)

    batch_at = Shards.batch_at


def join_shards(parts: Sequence[Shards]) -> Joined:
    """Snapshots that were harvested one at a time, so that only one model need fit in memory; row r is one token.

    Raises:
      InputError: shards of other text, mask or rows than the first's, naming what differs.
    """
    if not parts:
        raise InputError("no shards to join; give those of at least one model")
    first = parts[0]
    for number, part in enumerate(parts[1:], 1):
        for name in ("text", "exclude", "first", "token_rows"):
            if part.manifest[name] != first.manifest[name]:
                raise InputError(
                    f"shards 0 and {number} are not of the same tokens ({name} differs); harvest them again"
                )
        rows = [np.concatenate([np.asarray(token) for token in shards.token]) for shards in (first, part)]
        if rows[0].shape != rows[1].shape or (rows[0] != rows[1]).any():
            at = int(np.argmax((rows[0] != rows[1]).any(1))) if rows[0].shape == rows[1].shape else min(map(len, rows))
            raise InputError(f"shards 0 and {number} are misaligned from row {at} on; remove both and harvest again")
    return Joined(tuple(parts))


def open_shards(folder: str | Path) -> Shards:
    """Shards that `write_shards` finished.

    Raises:
      InputError: no such folder, another format, shards that are missing or damaged.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    if "shards" not in manifest:
        raise InputError(f"{folder} was not finished; call write_shards again with the same settings")
    arrays: dict[str, list[np.ndarray]] = {"shard": [], "token": []}
    for number, size in enumerate(manifest["shards"]):
        for name, found in arrays.items():
            path = folder / f"{name}_{number:05d}.npy"
            found.append(_load(path))
            shape = (size, *found[0].shape[1:])
            if found[-1].shape != shape or found[-1].dtype != found[0].dtype:
                there = f"{found[-1].dtype}{list(found[-1].shape)}"
                raise InputError(
                    f"{path} is {there}, not {found[0].dtype}{list(shape)}; remove it and call write_shards again"
                )
    return Shards(manifest, arrays["shard"], arrays["token"])
