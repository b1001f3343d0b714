"""The one checkpoint format: an Orbax tree of string-keyed dicts with its description in the root metadata.

    {format, kind, config, tokenizer, step, versions, extra}

`kind` says what the tree is, `config` how to build it, `tokenizer` (sha256, vocabulary size, file beside the
checkpoints) which ids it speaks. A checkpoint appears under its name only when it is complete (Orbax renames it into
place), so a killed writer leaves nothing that could be mistaken for one.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError

FORMAT = "bert6_jax/1"
KINDS = ("transformer", "one_layer", "dictionary", "readout", "adapter", "train_state")


@dataclass(frozen=True)
class Checkpoint:
    """What `load` returns; `tree` is a nested dict of arrays."""

    kind: str
    config: dict[str, Any]
    step: int
    tokenizer: dict[str, Any] | None
    versions: dict[str, str]
    extra: dict[str, Any]
    tree: Any


def _check_tree(tree, path=()):
    if isinstance(tree, dict):
        for name, child in tree.items():
            if not isinstance(name, str):
                raise TypeError(
                    f"checkpoint trees have string keys; found {name!r} under {'/'.join(path) or 'the root'}"
                )
            _check_tree(child, (*path, name))
    elif not isinstance(tree, (jax.Array, np.ndarray)):
        raise TypeError(f"checkpoint leaf {'/'.join(path)} is a {type(tree).__name__}, not an array")


def save(
    path: str | Path,
    tree: dict[str, Any],
    *,
    kind: str,
    config: dict[str, Any],
    step: int = 0,
    tokenizer: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    wait: bool = True,
):
    """Write `tree` to the new folder `path`; with `wait=False` in the background, returning a response to wait on.

    Raises `FileExistsError` if something is there already, `OSError` when the disk is full (nothing is left behind
    that `load` would take for a checkpoint).
    """
    if kind not in KINDS:
        raise ValueError(f"unknown checkpoint kind {kind!r}; one of {', '.join(KINDS)}")
    _check_tree(tree)
    path = Path(path).absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists; checkpoints are never overwritten")
    versions = {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint")}
    description = {
        "format": FORMAT,
        "kind": kind,
        "config": config,
        "tokenizer": tokenizer,
        "step": int(step),
        "versions": versions,
        "extra": extra or {},
    }
    response = PendingSave(path, tree, description)
    if wait:
        response.result()
    return response


class PendingSave:
    """A write under way; `result()` waits for it and raises what went wrong."""

    def __init__(self, path: Path, tree, description):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _disk_errors(path), warnings.catch_warnings():
            # Orbax creates a coroutine that it never awaits when a save fails early; the failure itself is raised.
            warnings.simplefilter("ignore", RuntimeWarning)
            self._response = ocp.save_async(path, tree, custom_metadata=description)

    def result(self) -> Path:
        with _disk_errors(self.path):
            self._response.result()
        return self.path


class _disk_errors:
    """Turn the storage layer's texts for a full disk into the `OSError` that they stand for."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None and not isinstance(error, OSError):
            text = str(error)
            if "No space left" in text or "ENOSPC" in text or "Disk quota" in text:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path)) from error
        return False


def describe(path: str | Path) -> dict[str, Any]:
    """The root metadata of a checkpoint, without its arrays; `InputError` if it is not one of ours."""
    path = Path(path).absolute()
    if not path.exists():
        raise InputError(f"no checkpoint at {path}: the path does not exist")
    try:
        metadata = ocp.metadata(path)
    except Exception as error:  # Orbax raises many types for folders that it does not know
        raise InputError(
            f"{path} is not a checkpoint of this toolkit, or it is damaged; name a folder below checkpoints/"
        ) from error
    description = metadata.custom_metadata
    if not isinstance(description, dict) or "format" not in description:
        raise InputError(f"{path} is an Orbax checkpoint, but not of this toolkit (no format in its metadata)")
    if description["format"] != FORMAT:
        raise InputError(
            f"{path} has format {description['format']!r}, this version reads {FORMAT!r}; use the version that wrote it"
        )
    if metadata.metadata is None:  # the description is whole, the arrays are not
        raise InputError(f"{path} is damaged: its arrays cannot be read; restore it or remove the folder")
    return description | {"tree": metadata.metadata}


def load(path: str | Path, *, kind: str | None = None, like=None, sharding=None) -> Checkpoint:
    """Open a checkpoint of any kind.

    `kind`: refuse any other. `like`: a tree of arrays or `ShapeDtypeStruct`s that the stored one must equal in names,
    shapes and dtypes (Orbax alone would cast in silence); its shardings are used. `sharding`: where to put the arrays
    otherwise (default: the first device). Raises `InputError` with one line on everything that cannot be opened.
    """
    path = Path(path).absolute()
    description = describe(path)
    if kind is not None and description["kind"] != kind:
        raise InputError(
            f"{path} holds a checkpoint of kind {description['kind']!r}, {kind!r} was asked for; name another folder"
        )
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), description["tree"]
    )
    if like is not None:
        _check_like(path, abstract, like)
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or sharding
            ),
            like,
        )
    try:
        tree = ocp.load(path, abstract)
    except Exception as error:
        raise InputError(
            f"{path} is damaged and cannot be read ({type(error).__name__}); restore it or remove the folder"
        ) from error
    fields = {field.name for field in dataclasses.fields(Checkpoint)} - {"tree"}
    return Checkpoint(**{name: description[name] for name in fields}, tree=tree)


def _check_like(path, found, expected):
    def flat(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {"/".join(str(entry.key) for entry in names): leaf for names, leaf in leaves}

    found, expected = flat(found), flat(expected)
    for name in expected.keys() | found.keys():
        if name not in found or name not in expected:
            where = "is missing from" if name not in found else "is only in"
            raise InputError(
                f"{path} does not fit the model: {name} {where} the checkpoint; use the configuration it was made with"
            )
        if found[name].shape != expected[name].shape or found[name].dtype != expected[name].dtype:
            raise InputError(
                f"{path} does not fit the model: {name} is {found[name].dtype}{list(found[name].shape)}, "
                f"expected {expected[name].dtype}{list(expected[name].shape)}; use the configuration it was made with"
            )


def load_transformer(path: str | Path, *, sharding=None) -> tuple[dict[str, Any], TransformerConfig, Checkpoint]:
    """Parameters and configuration of a checkpoint of kind `transformer`."""
    checkpoint = load(path, kind="transformer", sharding=sharding)
    try:
        cfg = TransformerConfig(**checkpoint.config)
    except TypeError as error:
        raise InputError(
            f"{path}: its config is not a TransformerConfig ({error}); use the version that wrote it"
        ) from error
    return checkpoint.tree, cfg, checkpoint


def steps(folder: str | Path) -> list[int]:
    """Steps of the complete checkpoints `step_*` in a folder, in order."""
    folder = Path(folder)
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name[5:]) for name in names if name.startswith("step_") and name[5:].isdigit())


def step_path(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"step_{step:08d}"


def clean(folder: str | Path, keep: int | None = None) -> None:
    """Remove what killed writers left behind; with `keep`, every complete checkpoint but that step too."""
    folder = Path(folder)
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        complete = entry.name.startswith("step_") and entry.name[5:].isdigit()
        if (
            not complete
            and "orbax-checkpoint-tmp" in entry.name
            or (complete and keep is not None and int(entry.name[5:]) != keep)
        ):
            shutil.rmtree(entry, ignore_errors=True)
