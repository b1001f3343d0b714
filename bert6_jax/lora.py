"""Low-rank adapters: a pure function from (params, adapters) to params (LoRA, arXiv 2106.09685).

Every adapted kernel W `[..., in, out]` becomes W + (alpha / rank) A B with A `[..., in, rank]` normal(0, 1 / rank) and
B `[..., rank, out]` zero at the start, so a fresh adapter leaves the model as it is, to the bit. Adapters are a tree
of their own, `{"blocks": {"attn": {"q": {"a", "b"}, ...}}}`, below the names of what they adapt; whatever takes
parameters (forward passes, harvesting, probes, export) takes `apply(params, adapters, cfg)` as well.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bert6_jax.errors import InputError

Params = dict[str, Any]

TARGETS = ("attn/q", "attn/k", "attn/v", "attn/out", "mlp/in", "mlp/out")


@dataclass(frozen=True)
class LoraConfig:
    """`targets` names matrices of the blocks; `alpha=None` takes alpha = rank, that is a factor of one."""

    rank: int = 8
    targets: tuple[str, ...] = ("attn/q", "attn/v")
    alpha: float | None = None

    def __post_init__(self):
        if self.rank < 1:
            raise InputError(f"LoRA rank is {self.rank!r}; it must be at least 1")
        if self.alpha is not None and not (self.alpha > 0.0 and math.isfinite(self.alpha)):
            raise InputError(f"LoRA alpha is {self.alpha!r}; it must be a positive number")
        wrong = [name for name in self.targets if name not in TARGETS]
        if wrong or not self.targets:
            given = repr(wrong[0]) if wrong else "nothing"
            raise InputError(f"LoRA targets name {given}; choose among {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


def _kernel(params: Params, target: str) -> jax.Array:
    sublayer, matrix = target.split("/")
    return params["blocks"][sublayer][matrix]["kernel"]


def init(key: jax.Array, params: Params, cfg: LoraConfig) -> Params:
    """Fresh adapters for the blocks of `params`, float32."""
    adapters: Params = {}
    for target in sorted(set(cfg.targets)):
        *stack, inner, outer = _kernel(params, target).shape
        sublayer, matrix = target.split("/")
        a = jax.random.normal(jax.random.fold_in(key, TARGETS.index(target)), (*stack, inner, cfg.rank)) / cfg.rank
        b = jnp.zeros((*stack, cfg.rank, outer))
        adapters.setdefault(sublayer, {})[matrix] = {"a": a, "b": b}
    return {"blocks": adapters}


def apply(params: Params, adapters: Params, cfg: LoraConfig) -> Params:
    """The adapted parameters; differentiable in both, and the merged model when the adapters are final."""
    sublayers = dict(params["blocks"])
    for sublayer, matrices in adapters["blocks"].items():
        adapted = dict(sublayers[sublayer])
        for matrix, factors in matrices.items():
            kernel = adapted[matrix]["kernel"]
            delta = jnp.matmul(factors["a"], factors["b"]) * jnp.asarray(cfg.scale, factors["a"].dtype)
            adapted[matrix] = adapted[matrix] | {"kernel": kernel + delta.astype(kernel.dtype)}
        sublayers[sublayer] = adapted
    return params | {"blocks": sublayers}


def fingerprint(params: Params) -> str:
    """sha256 over names and values of a tree: which base an adapter was trained on."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(jax.device_get(leaf))
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
