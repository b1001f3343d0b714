"""Change what a model computes, its activations or its weights, and see what becomes of the output.

Activations: an edit is a function `(name, depth, x) -> x` that `transformer.forward` calls on every activation as it
comes into being; the rest of the pass goes on from what it returns.

    out_BTD, acts = run(params, ids_BT, cfg, [zero(Site("z", 1, head=0)), add(Site("resid", 2, position=4), steer_D)])

Weights: pruning by the signed first-order score of arXiv 2311.12786 (section on pruning), theta * dL/dtheta. With the
weight at 0 the loss L is, to first order, lower by its score: the largest are those that stand in L's way. A unit is
scored, and zeroed, as a whole:

    weight     one entry of any array
    neuron     one output unit of a matrix, a column of our [in, out] kernels; its bias is not part of it (ours)
    embedding  one row of an embedding table

    scores = first_order_scores(lambda params: mean_loss(params, old_task), params)
    curve = sweep(accuracy, params, ranked(scores, 20))  # [21]: the first 0, 1, ..., 20 zeroed

Everything jits, vmaps and differentiates, and speaks of one model: a bank of G models is `jax.vmap` of it. Letters
beside those of the package: C candidates, K chosen among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bert6_jax import transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError
from bert6_jax.transformer import HOOK_NAMES, Activations, Edit, Params

Index = int | tuple[int, ...] | jax.Array | np.ndarray

KINDS = ("weight", "neuron", "embedding")
UNITS = ("neuron", "embedding")

# --- activations -----------------------------------------------------------------------------------------------------

_BY_HEAD = {"position": 1, "head": 2, "unit": 3}
_AXES = dict.fromkeys(HOOK_NAMES, {"position": 1, "unit": 2}) | dict.fromkeys(("q", "k", "v", "z"), _BY_HEAD)
_AXES["pattern"] = {"head": 1, "position": 2, "unit": 3}


@dataclass(frozen=True)
class Site:
    """A part of an activation; a field left None means all of them.

    `name` is one of `transformer.HOOK_NAMES`, `depth` the number of the block (`resid`: 0..L, 0 the embedding output),
    `unit` an entry of the last axis. Of a `pattern`, `position` is the query and `unit` the key. An index is an int, a
    tuple of ints (all of these) or an integer array without axes, which may be traced; `position` may also be an array
    [B], one a row. Arrays are not checked: an index beyond the axis selects nothing.

    Raises:
      InputError: an unknown name, a head where there is none, an index that is none of these.
    """

    name: str
    depth: Index | None = None
    position: Index | None = None
    head: Index | None = None
    unit: Index | None = None

    def __post_init__(self):
        if self.name not in HOOK_NAMES:
            raise InputError(f"site {self.name!r} is no activation; choose one of {', '.join(HOOK_NAMES)}")
        if self.head is not None and "head" not in _AXES[self.name]:
            raise InputError(f"site {self.name!r} has no heads; leave head out or choose one of q, k, v, z, pattern")
        for field in ("depth", "position", "head", "unit"):
            index = getattr(self, field)
            if isinstance(index, jax.Array | np.ndarray):
                right = jnp.issubdtype(index.dtype, jnp.integer) and index.ndim <= (field == "position")
                index = f"{index.dtype} of shape {list(index.shape)}"
            else:
                many = index if isinstance(index, tuple) else () if index is None else (index,)
                right = all(isinstance(i, int | np.integer) and not isinstance(i, bool) and i >= 0 for i in many)
                index = repr(index)
            if not right:
                raise InputError(
                    f"site {self.name!r}: {field} is {index}; give an int from 0, a tuple of them or an integer array"
                    + (" without axes or with one entry a row" if field == "position" else " without axes")
                )


@dataclass(frozen=True, eq=False)
class SiteEdit:
    """An edit function and the sites that it touches, for `run` to check."""

    sites: tuple[Site, ...]
    change: Edit

    def __call__(self, name: str, depth: jax.Array, x: jax.Array) -> jax.Array:
        return self.change(name, depth, x)


def _check(site: Site, field: str, size: int, what: str) -> None:
    index = getattr(site, field)
    for i in index if isinstance(index, tuple) else (index,):
        if isinstance(i, int | np.integer) and i >= size:
            raise InputError(f"site {site.name!r}: {field} {i} of {what}; choose 0 to {size - 1}")


def _among(numbers, index: Index):
    """Which of the `numbers` an index means, in the shape of `numbers`; an index with one entry a row adds its rows."""
    if isinstance(index, tuple):
        return (numbers[..., None] == np.array(index, np.int32).reshape((1,) * numbers.ndim + (-1,))).any(-1)
    index = jnp.asarray(index, jnp.int32)
    return numbers == (index.reshape(-1, *[1] * (numbers.ndim - 1)) if index.ndim else index)


def _selected(site: Site, depth: jax.Array, x: jax.Array) -> jax.Array:
    """bool, broadcasts to x: what of it is at the site."""
    mask = jnp.bool_(True) if site.depth is None else _among(depth, site.depth)
    for field, axis in _AXES[site.name].items():
        if (index := getattr(site, field)) is not None:
            if np.ndim(index) and not isinstance(index, tuple) and len(index) != len(x):
                raise InputError(f"site {site.name!r}: {len(index)} positions for {len(x)} rows; give one a row")
            _check(site, field, x.shape[axis], f"an activation of shape {list(x.shape)}")
            shape = [size if a == axis else 1 for a, size in enumerate(x.shape)]
            mask = mask & _among(np.arange(x.shape[axis], dtype=np.int32).reshape(shape), index)
    return mask


def _at_site(site: Site, value, change: Callable[[jax.Array, jax.Array], jax.Array]) -> SiteEdit:
    value = jnp.asarray(value)

    def edit(name, depth, x):
        if name != site.name:
            return x
        # one more axis: a stack over depths as in `acts`; NaN where it has too few
        here = value.at[depth].get(mode="fill") if value.ndim == x.ndim + 1 else value
        try:
            here = jnp.broadcast_to(here, x.shape).astype(x.dtype)
        except ValueError:
            raise InputError(
                f"site {name!r}: a value of shape {list(value.shape)} does not fit the activation {list(x.shape)}; "
                "give one that broadcasts to it, or a stack over depths as in acts"
            ) from None
        return jnp.where(_selected(site, depth, x), change(x, here), x)

    return SiteEdit((site,), edit)


def replace(site: Site, value) -> SiteEdit:
    """Put `value` at the site. It broadcasts to the activation of one block (rows first, see `HOOK_NAMES`), of which
    the site's part is taken; a stack over depths, as in `acts`, gives every depth its own.

    Raises (when the pass is traced):
      InputError: a value of another shape, an int index beyond the activation.
    """
    return _at_site(site, value, lambda x, value: value)


def zero(site: Site) -> SiteEdit:
    """Ablate: 0 at the site."""
    return replace(site, 0.0)


def add(site: Site, value) -> SiteEdit:
    """Steer: add `value` at the site; shapes as in `replace`."""
    return _at_site(site, value, lambda x, value: x + value)


def chain(*edits: Edit) -> SiteEdit:
    """One edit of several, the first first; functions that are none of ours may be among them."""

    def edit(name, depth, x):
        for one in edits:
            x = one(name, depth, x)
        return x

    return SiteEdit(tuple(site for one in edits for site in getattr(one, "sites", ())), edit)


def run(
    params: Params, ids_BT: jax.Array, cfg: TransformerConfig, edits: Edit | Sequence[Edit], **inputs
) -> tuple[jax.Array, Activations]:
    """`transformer.forward` under one edit or several, the first first; `inputs` are its keyword arguments.

    Returns:
      What the head reads [B, T, D], and the activations, edited.

    Raises:
      InputError: a depth that the model does not have; see `Site` and `replace`.
    """
    edit = chain(*([edits] if callable(edits) else edits))
    for site in edit.sites:
        _check(site, "depth", cfg.depths if site.name == "resid" else cfg.blocks, f"a model with {cfg.blocks} blocks")
    return transformer.forward(params, ids_BT, cfg, edit=edit, **inputs)


def patch_map(
    params: Params,
    clean_ids_BT: jax.Array,
    corrupt_ids_BT: jax.Array,
    cfg: TransformerConfig,
    metric: Callable[[jax.Array, Activations], Any],
    name: str = "resid",
    **inputs,
) -> Any:
    """Activation patching: what the corrupt rows give with one activation of the clean rows put in.

    Args:
      metric: (what the head reads [B, T, D], activations) -> a scalar, or any tree of arrays.
      name: the activation; of a `pattern` the position is the query.
      inputs: keyword arguments of `transformer.forward`, the same for both runs.

    Returns:
      `metric` with leading axes [depths, T], depths being M for `resid`, else L: patched at this depth and position
      alone, in all rows and heads. The site is data, the pass is traced once; put it under `jit`.

    Raises:
      InputError: clean and corrupt rows of different shapes, an unknown name.
    """
    if clean_ids_BT.shape != corrupt_ids_BT.shape:
        raise InputError(
            f"clean rows {list(clean_ids_BT.shape)} and corrupt rows {list(corrupt_ids_BT.shape)} differ in shape; "
            "pair them row by row and position by position"
        )
    Site(name)
    clean = transformer.forward(params, clean_ids_BT, cfg, **inputs)[1][name]
    depths, T = len(clean), clean_ids_BT.shape[1]

    def patched(place):
        edit = replace(Site(name, place // T, place % T), clean[place // T])
        return metric(*run(params, corrupt_ids_BT, cfg, edit, **inputs))

    values = jax.lax.map(patched, jnp.arange(depths * T, dtype=jnp.int32))
    return jax.tree.map(lambda v: v.reshape(depths, T, *v.shape[1:]), values)


# --- weights: scores and choices -------------------------------------------------------------------------------------


class _Group(NamedTuple):
    """The candidates of one array; groups follow each other in the flat order that `Ranked` counts in."""

    name: str  # "blocks.mlp.out.kernel"
    kind: str
    array: tuple[int, ...]  # the array's shape

    @property
    def axis(self) -> int | None:
        """What a unit goes over: the inputs of a neuron, the entries of a row."""
        return {"weight": None, "neuron": -2, "embedding": -1}[self.kind]

    @property
    def shape(self) -> tuple[int, ...]:
        whole = len(self.array)
        return tuple(size for a, size in enumerate(self.array) if self.axis is None or a != whole + self.axis)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stacked(self) -> bool:
        return self.name.startswith("blocks.")


@partial(jax.tree_util.register_dataclass, data_fields=["index_K", "score_K"], meta_fields=["layout"])
@dataclass(frozen=True)
class Ranked:
    """Chosen weights or units, the first the most important one. `names` says which they are, `prune` zeroes them."""

    index_K: jax.Array  # int32, into all candidates one after the other
    score_K: jax.Array  # float32, what they were ranked by; NaN for controls
    layout: tuple[_Group, ...]  # static


def first_order_scores(loss: Callable[[Params], jax.Array], params: Params) -> Params:
    """theta * dL/dtheta of every weight, a tree like `params` (arXiv 2311.12786): L falls by about that much, in its
    own unit, if the weight is set to 0. Signed: a large score is a weight in the way of L, not one that L needs.

    Args:
      loss: parameters -> mean loss, a scalar; in the paper that of the old task.
    """
    return jax.tree.map(jnp.multiply, params, jax.grad(loss)(params))


def _named(tree: Params) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _groups(tree: Params, kinds: Sequence[str]) -> tuple[_Group, ...]:
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(f"kind of candidates {unknown[0]!r}: choose from {', '.join(KINDS)}")
    groups = []
    for name, leaf in _named(tree).items():
        table = name.startswith("embed.") and leaf.ndim == 2
        is_a = {"weight": True, "neuron": name.endswith(".kernel"), "embedding": table}
        groups += [_Group(name, kind, leaf.shape) for kind in KINDS if kind in kinds and is_a[kind]]
    if not groups:
        raise InputError(f"these parameters have no {' or '.join(kinds)}; choose other kinds of candidates")
    return tuple(groups)


def _sums(tree: Params, groups: Sequence[_Group]) -> list[jax.Array]:
    """Every group's candidates in the shape of the group: entries, or their sums over a unit."""
    leaves = _named(tree)
    return [leaves[g.name] if g.axis is None else leaves[g.name].sum(g.axis, dtype=jnp.float32) for g in groups]


def _flat(tree: Params, groups: Sequence[_Group]) -> jax.Array:
    return jnp.concatenate([v.astype(jnp.float32).reshape(-1) for v in _sums(tree, groups)])


def unit_scores(scores: Params, kinds: Sequence[str] = UNITS) -> dict[str, jax.Array]:
    """Scores of whole units by the name of their array: the sum over the unit's weights (ours; the paper does not say).

    Neurons: [..., out], stacked blocks keep their axis; embeddings: [rows]. `ranked` takes single scores, not these.

    Raises:
      InputError: kinds that are no units.
    """
    groups = _groups(scores, kinds)
    if any(g.kind == "weight" for g in groups):
        raise InputError(f"kind 'weight' is no unit; choose from {', '.join(UNITS)}")
    return {g.name: value for g, value in zip(groups, _sums(scores, groups), strict=True)}


def _checked_groups(tree: Params, count: int, kinds: Sequence[str]) -> tuple[_Group, ...]:
    groups = _groups(tree, kinds)
    candidates = sum(g.size for g in groups)
    if not 1 <= count <= candidates:
        raise InputError(f"{count} of {candidates} candidates asked for; choose 1 to {candidates}")
    return groups


def ranked(scores: Params, count: int, kinds: Sequence[str] = ("weight",)) -> Ranked:
    """The `count` candidates of these kinds with the largest scores in the whole tree, largest first; equal ones in the
    tree's order. Units are scored by the sum over their weights.

    Args:
      scores: a tree like the parameters, from `first_order_scores` or any other.

    Raises:
      InputError: an unknown kind, a count beyond the candidates.
    """
    groups = _checked_groups(scores, count, kinds)
    score_K, index_K = jax.lax.top_k(_flat(scores, groups), count)
    return Ranked(index_K, score_K, groups)


def _control(index_K: jax.Array, groups: tuple[_Group, ...]) -> Ranked:
    return Ranked(index_K, jnp.full(index_K.shape, jnp.nan, jnp.float32), groups)


def random_ranked(
    key: jax.Array, params: Params, count: int, kinds: Sequence[str] = ("weight",), nonzero: bool = True
) -> Ranked:
    """Control: a uniform choice of `count` candidates, in random order.

    nonzero: among those that are not zero throughout (default, as zeroing a 0 changes nothing and would make the
    control look harmless); the others come only after all of these.

    Raises:
      InputError: as `ranked`.
    """
    groups = _checked_groups(params, count, kinds)
    # 31 bits: with the 23 of a float, ties would favour the first of many millions of candidates
    draw_C = (jax.random.bits(key, (sum(g.size for g in groups),)) >> 1).astype(jnp.int32)
    if nonzero:
        draw_C = jnp.where(_flat(jax.tree.map(jnp.abs, params), groups) > 0, draw_C, ~draw_C)
    return _control(jax.lax.top_k(draw_C, count)[1], groups)


def matched_ranked(key: jax.Array, params: Params, chosen: Ranked, pool: int = 8) -> Ranked:
    """Control of the same magnitude: for every chosen candidate, in their order, another one of the same matrix.

    It is drawn among the `pool` of nearest magnitude (units: the sum of the weights' magnitudes), without those chosen
    and those already drawn; a matrix (one block's) that has none left takes from the whole tree.

    Raises:
      InputError: fewer candidates than twice the chosen ones; `params` of another shape than those scored.
    """
    groups = chosen.layout
    _check_layout(params, groups)
    candidates, count = sum(g.size for g in groups), chosen.index_K.shape[-1]
    if candidates < 2 * count:
        raise InputError(f"{count} of {candidates} candidates are chosen, too many to match others; choose fewer")
    magnitude_C = _flat(jax.tree.map(jnp.abs, params), groups)
    matrix, first = [], 0  # a number for every matrix
    for g in groups:
        blocks = g.array[0] if g.stacked else 1
        matrix.append(jnp.repeat(jnp.arange(first, first + blocks, dtype=jnp.int32), g.size // blocks))
        first += blocks
    matrix_C = jnp.concatenate(matrix)

    def match(free_C, each):
        index, key = each
        same_C = free_C & (matrix_C == matrix_C[index])
        open_C = jnp.where(same_C.any(), same_C, free_C)
        distance_C = jnp.where(open_C, jnp.abs(magnitude_C - magnitude_C[index]), jnp.inf)
        nearest = jax.lax.top_k(-distance_C, min(pool, candidates))[1]
        taken = nearest[jax.random.randint(key, (), 0, jnp.minimum(pool, open_C.sum(dtype=jnp.int32)))]
        return free_C.at[taken].set(False), taken

    free_C = jnp.ones(candidates, bool).at[chosen.index_K].set(False)
    return _control(jax.lax.scan(match, free_C, (chosen.index_K, jax.random.split(key, count)))[1], groups)


def names(chosen: Ranked) -> list:
    """The chosen ones in words, e.g. `blocks.1.mlp.out.kernel[12, 40]`, with a colon for what a unit goes over:
    `blocks.1.mlp.out.kernel[:, 40]`, `embed.token[7, :]`. A list, for a bank a list of lists. On the host.
    """
    starts = np.cumsum([0, *(g.size for g in chosen.layout)])

    def name(flat):
        n = int(np.searchsorted(starts, flat, side="right")) - 1
        group = chosen.layout[n]
        place = [str(i) for i in np.unravel_index(flat - starts[n], group.shape)]
        words = group.name
        if group.stacked:
            words = f"blocks.{place.pop(0)}.{words.removeprefix('blocks.')}"
        if group.axis is not None:
            place.insert(len(place) + 1 + group.axis, ":")
        return f"{words}[{', '.join(place)}]"

    def walk(index):
        return [walk(i) for i in index] if np.ndim(index) else name(index)

    return walk(np.asarray(jax.device_get(chosen.index_K)))


# --- weights: pruning ------------------------------------------------------------------------------------------------


def _check_layout(params: Params, groups: Sequence[_Group]) -> None:
    leaves = _named(params)
    for g in groups:
        if g.name not in leaves or leaves[g.name].shape != g.array:
            have = list(leaves[g.name].shape) if g.name in leaves else "none"
            raise InputError(
                f"{g.name} was ranked with shape {list(g.array)}, these parameters have {have}; "
                "give the model that was scored, of a bank one at a time by vmap"
            )


def prune(params: Params, chosen: Ranked, which: int | jax.Array) -> Params:
    """The parameters with some of the chosen candidates set to 0, all else the same bits.

    Args:
      which: an int, data or static: the first so many, 0 none. Or bool [K]: these.

    Raises:
      InputError: `params` of another shape than those scored, a static count beyond the chosen ones.
    """
    groups, count = chosen.layout, chosen.index_K.shape[-1]
    _check_layout(params, groups)
    if isinstance(which, int | np.integer) and not 0 <= which <= count:
        raise InputError(f"{which} of {count} chosen candidates to prune; choose 0 to {count}")
    which = jnp.asarray(which)
    kind = jnp.bool_ if which.ndim else jnp.integer
    if which.shape not in ((), (count,)) or not jnp.issubdtype(which.dtype, kind):
        raise InputError(
            f"which to prune is {which.dtype} of shape {list(which.shape)}; give a count or bool [{count}]"
        )
    which_K = which if which.ndim else jnp.arange(count) < which
    size = sum(g.size for g in groups)
    gone_C = jnp.zeros(size, bool).at[jnp.where(which_K, chosen.index_K, size)].set(True, mode="drop")
    gone, start = {}, 0
    for g in groups:
        mask = gone_C[start : start + g.size].reshape(g.shape)
        start += g.size
        gone.setdefault(g.name, []).append(mask if g.axis is None else jnp.expand_dims(mask, g.axis))

    def leaf(path, x):
        for mask in gone.get(jax.tree_util.keystr(path, simple=True, separator="."), ()):
            x = jnp.where(mask, jnp.zeros((), x.dtype), x)
        return x

    return jax.tree_util.tree_map_with_path(leaf, params)


def sweep(evaluate: Callable[[Params], Any], params: Params, chosen: Ranked, how: str = "cumulative") -> Any:
    """`evaluate` of the pruned parameters, stacked to [K + 1, ...]; entry 0 is the model as it is.

    Args:
      evaluate: parameters -> a tree of arrays, traced once.
      how: "cumulative": entry k without the first k; "single": entry k without the k-th alone. The paper shows both.

    Raises:
      InputError: another `how`; see `prune`.
    """
    if how not in ("cumulative", "single"):
        raise InputError(f"how to sweep is {how!r}; choose cumulative or single")
    count = chosen.index_K.shape[-1]
    k, place = np.arange(count + 1)[:, None], np.arange(count)[None]
    which = jnp.asarray(place < k if how == "cumulative" else place == k - 1)
    return jax.lax.map(lambda which_K: evaluate(prune(params, chosen, which_K)), which)
