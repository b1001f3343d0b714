"""Classification: a pooled head on the trunk, three ways of fine-tuning it, and probes of every depth.

A classifier's parameters are a transformer's with two more leaves: `classifier` (kernel `[D, C]`, bias) and, for
`pooling="cls"`, `pooler` (kernel `[D, D]`, bias): tanh of a dense layer on [CLS], as in BERT. `pooling="mean"` takes
the mean of the last residual stream over the positions that are not padding and has no pooler. The masked-LM head is
no part of it.

What is trained is one tree, what stays another: `method="full"` trains everything, `frozen` the head alone, `lora` the
head and low-rank adapters of the blocks. `assemble` makes the classifier's parameters of both.

Probes read the frozen residual stream at every depth: one linear layer per depth and pooling on features that are
harvested in a single forward pass. Letters beside those of the package: C classes, G members of a bank (seeds),
N examples, P poolings, X probes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert6_jax import checkpoint, lora, transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.data.tokenizer import Tokenizer
from bert6_jax.data.windows import rows_at
from bert6_jax.errors import InputError
from bert6_jax.lora import LoraConfig
from bert6_jax.objectives import Batch, Sums, forward_inputs, row_keys, token_sums
from bert6_jax.train import GradFn

Params = dict[str, Any]

POOLINGS = ("cls", "mean")
METHODS = ("full", "frozen", "lora")


# --- the model -------------------------------------------------------------------------------------------------------


def _checked(pooling: str) -> str:
    if pooling not in POOLINGS:
        raise InputError(f"pooling is {pooling!r}; choose one of {', '.join(POOLINGS)}")
    return pooling


def init_head(key: jax.Array, cfg: TransformerConfig, num_classes: int, pooling: str) -> Params:
    """A fresh `classifier` and, for [CLS], `pooler`: normal(0, `init_std`) kernels, zero biases."""

    def dense(key, inner, outer):
        return {"kernel": jax.random.normal(key, (inner, outer)) * np.float32(cfg.init_std), "bias": jnp.zeros(outer)}

    pooler_key, classifier_key = jax.random.split(key)
    head = {"classifier": dense(classifier_key, cfg.width, num_classes)}
    return head | ({"pooler": dense(pooler_key, cfg.width, cfg.width)} if _checked(pooling) == "cls" else {})


def pool(x_XBTD: jax.Array, segment_BT: jax.Array, pooling: str) -> jax.Array:
    """One vector a row, float32 `[..., B, D]`: the first position, or the mean over those that are not padding."""
    x_XBTD = x_XBTD.astype(jnp.float32)
    if _checked(pooling) == "cls":
        return x_XBTD[..., 0, :]
    weight_BT = (segment_BT > 0).astype(jnp.float32)
    share_BT = weight_BT / jnp.maximum(weight_BT.sum(-1, keepdims=True), 1.0)
    return jnp.einsum("...btd,bt->...bd", x_XBTD, share_BT)


def _affine(params: Params, x_XD: jax.Array) -> jax.Array:
    return jnp.matmul(x_XD, params["kernel"]) + params["bias"].reshape((1,) * (x_XD.ndim - 1) + (-1,))


def logits(params: Params, batch: Batch, cfg: TransformerConfig, pooling: str, keys_B=None) -> jax.Array:
    """Float32 logits `[B, C]`; `keys_B`: one dropout key a row, None for evaluation."""
    trunk_keys_B, head_keys_B = transformer.fold_rows(keys_B, 0), transformer.fold_rows(keys_B, 1)
    out_BTD, _ = transformer.forward(params, batch["ids"], cfg, keys_B=trunk_keys_B, **forward_inputs(batch))
    return head_logits(params, out_BTD, batch["segment"], cfg, pooling, head_keys_B)


def head_logits(params: Params, out_BTD, segment_BT, cfg: TransformerConfig, pooling: str, keys_B=None) -> jax.Array:
    """Logits `[B, C]` of what the trunk gives, `[B, T, D]`."""
    x_BD = pool(out_BTD, segment_BT, pooling)
    if pooling == "cls":
        x_BD = jnp.tanh(_affine(params["pooler"], x_BD))
    return _affine(params["classifier"], transformer.dropout(x_BD, keys_B, cfg.dropout))


# --- what is trained, and what stays ---------------------------------------------------------------------------------


def _bare(trunk: Params) -> Params:
    """The trunk without any head."""
    return {name: leaf for name, leaf in trunk.items() if name not in ("head", "pooler", "classifier")}


def split(key: jax.Array, trunk: Params, head: Params, method: str, adapters: LoraConfig) -> tuple[Params, Params]:
    """(trained, frozen) trees of a method; `trunk` may still hold a masked-LM head, which is left out."""
    trunk = _bare(trunk)
    if method == "full":
        return trunk | head, {}
    if method == "frozen":
        return head, trunk
    if method == "lora":
        return head | {"lora": lora.init(key, trunk, adapters)}, trunk
    raise InputError(f"fine-tuning method is {method!r}; choose one of {', '.join(METHODS)}")


def assemble(trained: Params, frozen: Params, adapters: LoraConfig) -> Params:
    """The classifier's parameters of what `split` took apart; adapters are merged."""
    params = frozen | {name: leaf for name, leaf in trained.items() if name != "lora"}
    return lora.apply(params, trained["lora"], adapters) if "lora" in trained else params


def grad_fn(cfg: TransformerConfig, pooling: str, adapters: LoraConfig) -> GradFn:
    """Gradients of the summed cross-entropy for `train.make_step`; batches carry `label` [B] int32."""

    def loss(trained, batch, key, frozen):
        dropout = cfg.dropout > 0 or cfg.attention_dropout > 0
        keys_B = row_keys(key, batch["row"]) if dropout else None
        logits_BC = logits(assemble(trained, frozen, adapters), batch, cfg, pooling, keys_B)
        sums = token_sums(logits_BC, batch["label"], batch["valid"])
        return sums["loss"], sums

    def grads_and_sums(trained, batch, key, frozen) -> tuple[Params, Sums]:
        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(trained, batch, key, frozen)
        return grads, sums

    return grads_and_sums


def save_adapter(
    path: str | Path,
    trained: Params,
    trunk: Params,
    cfg: TransformerConfig,
    adapters: LoraConfig,
    pooling: str,
    *,
    step: int = 0,
    tokenizer: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """What `split` calls trained under `frozen` or `lora`, as a checkpoint of kind `adapter` that knows its base."""
    config = {
        "model": dataclasses.asdict(cfg) | {"head": "none"},
        "pooling": _checked(pooling),
        "lora": dataclasses.asdict(adapters) if "lora" in trained else None,
        "base": lora.fingerprint(_bare(trunk)),
    }
    checkpoint.save(path, trained, kind="adapter", config=config, step=step, tokenizer=tokenizer, extra=extra)


def load_adapter(path: str | Path, trunk: Params) -> tuple[Params, TransformerConfig, checkpoint.Checkpoint]:
    """The classifier of an adapter checkpoint on its base, merged, with its configuration (`config["pooling"]` too).

    Raises:
      InputError: no adapter checkpoint, or one that was trained on another base.
    """
    found = checkpoint.load(path, kind="adapter")
    trunk = _bare(trunk)
    try:
        base, settings, cfg = found.config["base"], found.config["lora"], TransformerConfig(**found.config["model"])
        adapters = LoraConfig(**(settings | {"targets": tuple(settings["targets"])})) if settings else LoraConfig()
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: its config is no adapter's ({error}); use the version that wrote it") from error
    if base != lora.fingerprint(trunk):
        raise InputError(f"{path} was trained on another base model; load the trunk that it was made from")
    return assemble(found.tree, trunk, adapters), cfg, found


# --- examples --------------------------------------------------------------------------------------------------------


class Examples(NamedTuple):
    """N texts as rows: [CLS] text [SEP] and padding."""

    ids_NT: np.ndarray  # int32
    segment_NT: np.ndarray  # int32, 1 and, for padding, 0
    label_N: np.ndarray  # int32
    cut_N: np.ndarray  # bool: the text was longer than the row

    def batch(self, row_B: np.ndarray, valid_B: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Rows as `objectives` reads them, with `label`."""
        valid_B = np.ones(len(row_B), bool) if valid_B is None else valid_B
        return {
            "ids": self.ids_NT[row_B],
            "segment": self.segment_NT[row_B],
            "row": row_B.astype(np.int32),
            "valid": valid_B,
            "label": self.label_N[row_B],
        }

    def filled(self, rows: np.ndarray, begin: int, size: int) -> dict[str, np.ndarray]:
        """The batch of `rows[begin : begin + size]`, filled up to `size` with rows that are not valid."""
        taken = rows[begin : begin + size]
        row_B = np.concatenate([taken, np.full(size - len(taken), rows[0], rows.dtype)])
        return self.batch(row_B, np.arange(size) < len(taken))


def encode(tokenizer: Tokenizer, texts: Sequence[str], label_N: np.ndarray, num_classes: int, length: int) -> Examples:
    """The first `length` - 2 ids of every text between [CLS] and [SEP]; rows are as long as the longest needs.

    Raises:
      InputError: a label that is not 0 to `num_classes` - 1, or rows without room for a token.
    """
    label_N = np.asarray(label_N, np.int32)
    wrong = np.flatnonzero((label_N < 0) | (label_N >= num_classes))
    if wrong.size:
        row = int(wrong[0])
        raise InputError(f"row {row}: label {label_N[row]} is not 0 to {num_classes - 1}; number the classes from 0")
    if length < 3:
        raise InputError(f"rows of {length} positions have no room for a token beside [CLS] and [SEP]; give 3 or more")
    cut_N = np.zeros(len(texts), bool)
    ids_NT = np.full((len(texts), length), tokenizer.pad_id, np.int32)
    segment_NT = np.zeros((len(texts), length), np.int32)
    for begin in range(0, len(texts), 4096):
        for row, ids in enumerate(tokenizer.encode_batch(texts[begin : begin + 4096]), begin):
            cut_N[row] = len(ids) > length - 2
            ids = ids[: length - 2]
            ids_NT[row, 0] = tokenizer.cls_id
            ids_NT[row, 1 : 1 + len(ids)] = ids
            ids_NT[row, 1 + len(ids)] = tokenizer.sep_id
            segment_NT[row, : 2 + len(ids)] = 1
    # Columns that are padding in every row change nothing but the time; in eights, so that sets share their programs.
    longest = min(length, -(-int(segment_NT.sum(1).max(initial=2)) // 8) * 8)
    return Examples(ids_NT[:, :longest], segment_NT[:, :longest], label_N, cut_N)


def bank_batches(
    examples: Examples, rows_G: Sequence[np.ndarray], seeds_G: Sequence[int], batch_size: int
) -> Callable[[int], dict[str, np.ndarray]]:
    """The batch of a step for a bank, leaves `[B, G, ...]`: every member has its own rows and order, the same number.

    A member's batches are a function of its rows and its seed alone.
    """
    sizes = {len(rows) for rows in rows_G}
    if len(sizes) != 1:
        raise ValueError(f"the members of a bank train on the same number of rows, not on {sorted(sizes)}")

    def batch_at(step: int) -> dict[str, np.ndarray]:
        batches = []
        for rows, seed in zip(rows_G, seeds_G, strict=True):
            at_B, valid_B = rows_at(seed, step, len(rows), batch_size)
            batches.append(examples.batch(rows[at_B], valid_B))
        return {name: np.stack([batch[name] for batch in batches], axis=1) for name in batches[0]}

    return batch_at


def in_batches(examples: Examples, rows: np.ndarray, batch_size: int, fn: Callable[[dict], Any]) -> np.ndarray:
    """`fn` of the rows, `[N, ...]` from its results `[B, ...]`, computed in batches of one shape."""
    out = None
    for begin in range(0, len(rows), batch_size):
        result = np.asarray(jax.device_get(fn(examples.filled(rows, begin, batch_size))))
        out = np.empty((len(rows), *result.shape[1:]), result.dtype) if out is None else out
        count = min(batch_size, len(rows) - begin)
        out[begin : begin + count] = result[:count]
    if out is None:
        raise ValueError("no rows")
    return out


# --- probes: a linear layer at every depth ---------------------------------------------------------------------------


@partial(jax.jit, static_argnames="cfg")
def features(params: Params, batch: Batch, cfg: TransformerConfig) -> jax.Array:
    """What probes read, float32 `[B, P, M, D]`: both poolings of the residual stream at all depths, in one pass."""
    _, acts = transformer.forward(params, batch["ids"], cfg, **forward_inputs(batch))
    x_PMBD = jnp.stack([pool(acts["resid"], batch["segment"], pooling) for pooling in POOLINGS])
    return jnp.moveaxis(x_PMBD, 2, 0)


def init_probes(probes: int, width: int, num_classes: int) -> Params:
    """X linear layers, zero at the start: their loss is convex, so nothing hangs on where they begin."""
    return {"kernel": jnp.zeros((probes, width, num_classes)), "bias": jnp.zeros((probes, num_classes))}


def probe_logits(probes: Params, x_NXD: jax.Array) -> jax.Array:
    """Float32 logits `[N, X, C]`."""
    return jnp.einsum("nxd,xdc->nxc", x_NXD, probes["kernel"]) + probes["bias"][None]


def probe_grad_fn(probes, batch, key, frozen) -> tuple[Params, Sums]:
    """Gradients of all probes in one step; batches hold `x` [B, X, D], `label` [B, X] and `valid` [B, X].

    Every probe's loss touches it alone and the optimiser is elementwise: a member equals the same probe trained alone.
    """
    del key, frozen

    def loss(probes):
        sums = token_sums(probe_logits(probes, batch["x"]), batch["label"], batch["valid"])
        X = batch["label"].shape[1]
        return sums["loss"], {name: value / X for name, value in sums.items()}

    (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(probes)
    return grads, sums
