"""Edits against passes written out by hand, pruning against finite differences and NumPy."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax import interventions, transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError
from bert6_jax.interventions import Site, add, chain, replace, zero

POST = TransformerConfig(
    vocab_size=11, width=6, blocks=2, heads=2, head_width=4, mlp_width=7, max_len=8, init_std=0.5, head="linear"
)
VARIANTS = {
    "post": POST,
    "pre": dataclasses.replace(POST, norm="pre", types=0, causal=True, tied=False),
    "compiled": dataclasses.replace(POST, norm="none", activation="relu", types=0, tied=False),
}
BARE = VARIANTS["compiled"]
B, T = 3, 5


def make(cfg, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: transformer.init(key, cfg), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32), shapes)


def rows(seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 11, (B, T)), jnp.int32)


def close(a, b, atol=1e-6):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


def mean_loss(cfg, ids_BT):
    target_B = ids_BT[:, 0]

    def loss(params):
        out_BTD, _ = transformer.forward(params, ids_BT, cfg)
        logits_BV = transformer.head(params, out_BTD[:, 2], cfg)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits_BV), target_B[:, None], axis=1).mean()

    return loss


bare_loss = jax.jit(mean_loss(BARE, rows()))
forward = jax.jit(transformer.forward, static_argnums=2)
prune = jax.jit(interventions.prune)


def host(tree):
    return jax.tree.map(np.array, tree)


# --- activations -----------------------------------------------------------------------------------------------------


def primitives(jaxpr) -> Counter:
    count = Counter()
    for equation in jaxpr.eqns:
        count[equation.primitive.name] += 1
        for value in jax.tree.leaves(tuple(equation.params.values())):
            if hasattr(value := getattr(value, "jaxpr", value), "eqns"):
                count += primitives(value)
    return count


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS.keys())
def test_an_edit_sees_every_activation_once_and_no_edit_adds_nothing(cfg):
    seen = []

    def note(name, depth, x):
        seen.append((name, x.shape))
        return x

    params, ids_BT = make(cfg), rows()
    plain = jax.make_jaxpr(lambda p: transformer.forward(p, ids_BT, cfg))(params)
    noted = jax.make_jaxpr(lambda p: transformer.forward(p, ids_BT, cfg, edit=note))(params)
    assert primitives(noted.jaxpr) - primitives(plain.jaxpr) == Counter({"add": 1})  # depth + 1
    assert not primitives(plain.jaxpr) - primitives(noted.jaxpr)
    _, acts = jax.eval_shape(lambda p: transformer.forward(p, ids_BT, cfg), params)
    blocks = Counter((name, leaf.shape[1:]) for name, leaf in acts.items())  # the scan traces a block once
    assert Counter(seen) == blocks + Counter([("resid", (B, T, cfg.width))])


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_activation_can_be_put_in_and_the_pass_goes_on_from_it(cfg):
    """What another pass computed, put into this one at one depth, is read by what comes next and by nothing before."""
    params, other_BT = make(cfg), rows(1)
    (want_BTD, want), (own_BTD, own) = forward(params, rows(0), cfg), forward(params, other_BT, cfg)
    names = list(transformer.HOOK_NAMES)

    @jax.jit  # one program: a traced depth of -1 is nowhere
    def patched(depth_X):
        edits = [replace(Site(name, depth), want[name]) for name, depth in zip(names, depth_X, strict=True)]
        return interventions.run(params, other_BT, cfg, edits)

    nowhere_BTD, _ = patched(jnp.full(len(names), -1))
    close(nowhere_BTD, own_BTD)
    for depth, name in [(depth, name) for depth in range(cfg.blocks) for name in names]:
        out_BTD, acts = patched(jnp.where(jnp.arange(len(names)) == names.index(name), depth, -1))
        close(acts[name][depth], want[name][depth])
        if name == "resid":
            close(acts["resid"][depth:], want["resid"][depth:])
        else:
            assert not np.allclose(own[name][depth], want[name][depth])
            close(acts["resid"][: depth + 1], own["resid"][: depth + 1])
            assert not np.allclose(acts["resid"][depth + 1], own["resid"][depth + 1])
        if name in ("resid", "resid_post"):  # nothing but the stream goes on from here
            close(out_BTD, want_BTD)
        else:
            assert not np.allclose(out_BTD, own_BTD)


def test_zeroing_a_head_equals_zeroing_its_rows_of_the_output_kernel():
    H, params, ids_BT = POST.head_width, make(POST), rows()
    cut = host(params)
    cut["blocks"]["attn"]["out"]["kernel"][1, H : 2 * H] = 0
    out_BTD, acts = jax.jit(lambda p: interventions.run(p, ids_BT, POST, zero(Site("z", 1, head=1))))(params)
    close(out_BTD, forward(cut, ids_BT, POST)[0])
    assert (acts["z"][1, :, :, 1] == 0).all() and (acts["z"][1, :, :, 0] != 0).all() and (acts["z"][0] != 0).all()


def test_steering_a_norm_free_model_at_its_last_depth_is_adding():
    params, ids_BT = make(BARE), rows()
    steer_D = jnp.arange(6, dtype=jnp.float32)
    plain_BTD, _ = forward(params, ids_BT, BARE)
    at_B = jnp.array([0, 4, 2], jnp.int32)  # one position a row
    edits = [add(Site("resid", 2, position=at_B), steer_D), add(Site("resid", 2, position=(1, 3), unit=5), 10.0)]
    out_BTD, _ = jax.jit(lambda p: interventions.run(p, ids_BT, BARE, edits))(params)
    want = np.array(plain_BTD)
    want[np.arange(B), at_B] += np.arange(6)
    want[:, [1, 3], 5] += 10
    close(out_BTD, want)


def test_sites_select_what_numpy_indexing_selects():
    rng = np.random.default_rng(0)
    x_BTNH = rng.normal(size=(B, T, 2, 4)).astype(np.float32)
    x_BNTT = rng.normal(size=(B, 2, T, T)).astype(np.float32)
    own = [(0, 4), (1, 0), (2, 1)]
    cases = [
        (Site("q", 1, position=2, head=1, unit=(0, 3)), x_BTNH, lambda y: y[:, 2, 1].__setitem__((..., [0, 3]), 0)),
        (Site("v", None, head=0), x_BTNH, lambda y: y[:, :, 0].fill(0)),
        (Site("k", (0, 1), position=jnp.array([4, 0, 1])), x_BTNH, lambda y: y.__setitem__(([0, 1, 2], [4, 0, 1]), 0)),
        (Site("pattern", 1, position=3, head=1, unit=0), x_BNTT, lambda y: y[:, 1, 3].__setitem__((..., 0), 0)),
        (Site("pattern", 1, position=jnp.array([4, 0, 1])), x_BNTT, lambda y: [y[b, :, t].fill(0) for b, t in own]),
        (Site("z", 0), x_BTNH, lambda y: None),  # another depth
        (Site("mlp_pre", 1), x_BTNH, lambda y: None),  # another activation
    ]  # fmt: skip
    for site, x, write in cases:
        want = x.copy()
        write(want)
        name = site.name if site.name != "mlp_pre" else "q"
        np.testing.assert_array_equal(zero(site)(name, jnp.int32(1), jnp.asarray(x)), want, err_msg=str(site))


def test_edits_run_in_order_and_any_function_is_one():
    x_BTD, depth = jnp.ones((1, 2, 3)), jnp.int32(0)
    site = Site("resid", 0)
    double = lambda name, depth, x: 2.0 * x  # noqa: E731
    np.testing.assert_array_equal(chain(add(site, 1.0), double, add(site, 1.0))("resid", depth, x_BTD), 5 * x_BTD)
    np.testing.assert_array_equal(chain(double, add(site, 1.0))("resid", depth, x_BTD), 3 * x_BTD)


def test_gradients_flow_through_edits():
    """The gradient of a steering vector against finite differences."""
    params, ids_BT = make(POST), rows()

    def readout(steer_D):
        edits = [add(Site("resid", 1, position=2), steer_D), zero(Site("mlp_post", 1, unit=0))]
        return interventions.run(params, ids_BT, POST, edits)[0][:, 2, 0].sum()

    value = jax.jit(readout)
    steer_D, step = jnp.linspace(-0.5, 0.5, 6), 1e-2
    want = [(value(steer_D + step * e) - value(steer_D - step * e)) / (2 * step) for e in jnp.eye(6)]
    close(jax.jit(jax.grad(readout))(steer_D), want, atol=2e-3)
    assert np.abs(want).max() > 0.05


def test_patch_map_equals_a_loop_and_whole_rows_bring_the_clean_run_back():
    cfg = VARIANTS["pre"]
    params, clean_BT = make(cfg), rows(0)
    corrupt_BT = clean_BT.at[:, 1].set((clean_BT[:, 1] + 1) % 11)

    def metric(out_BTD, acts):
        return out_BTD[:, 3].sum(), acts["resid_mid"][1, 0, 3]

    clean_BTD, acts = forward(params, clean_BT, cfg)
    embedded = replace(Site("resid", 0), transformer.embed(params, clean_BT, cfg))
    close(jax.jit(lambda: interventions.run(params, corrupt_BT, cfg, embedded)[0])(), clean_BTD)

    @jax.jit
    def one(resid_at, z_at):
        def edit(name, m, x):
            for which, (depth, position) in (("resid", resid_at), ("z", z_at)):
                if name == which:
                    x = jnp.where(m == depth, x.at[:, position].set(acts[name][depth][:, position]), x)
            return x

        return transformer.forward(params, corrupt_BT, cfg, edit=edit)[0][:, 3].sum()

    for name in ("resid", "z"):
        got, vectors = jax.jit(
            lambda name=name: interventions.patch_map(params, clean_BT, corrupt_BT, cfg, metric, name)
        )()
        assert got.shape == (3 if name == "resid" else 2, T) and vectors.shape == (*got.shape, 6)
        for place in np.ndindex(*got.shape):
            nowhere = (-1, 0)
            close(got[place], one(*((place, nowhere) if name == "resid" else (nowhere, place))), atol=1e-5)
        if name == "resid":  # the rows differ in position 1 alone, and position 3 reads nothing after itself
            close(got[0, 1], clean_BTD[:, 3].sum(), atol=1e-5)
            close(got[2, 3], clean_BTD[:, 3].sum(), atol=1e-5)
            assert not np.allclose(got[0, 3], clean_BTD[:, 3].sum(), atol=1e-3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: Site("mlp"), "site 'mlp' is no activation; choose one of q, k"),
        (lambda: Site("resid", head=0), "site 'resid' has no heads"),
        (lambda: Site("q", position=-1), "position is -1; give an int from 0"),
        (lambda: Site("q", depth=True), "depth is True"),
        (lambda: Site("q", unit=np.ones(3, np.int32)), "integer array without axes"),
        (lambda: Site("q", head=np.float32(1)), "head is"),
        (lambda: Site("q", position=np.ones((2, 2), np.int32)), "position is int32 of shape [2, 2]; give"),
        (lambda: zero(Site("q", position=jnp.arange(2))), "2 positions for 3 rows; give one a row"),
        (lambda: [zero(Site("z", 2))], "depth 2 of a model with 2 blocks; choose 0 to 1"),
        (lambda: zero(Site("resid", (0, 3))), "depth 3 of a model with 2 blocks; choose 0 to 2"),
        (lambda: zero(Site("z", 0, head=2)), "head 2 of an activation of shape [3, 5, 2, 4]; choose 0 to 1"),
        (lambda: zero(Site("resid", 0, position=5)), "position 5 of"),
        (lambda: replace(Site("resid", 0), np.zeros(5)), "a value of shape [5] does not fit the activation [3, 5, 6]"),
    ],
)
def test_bad_sites_are_one_line(bad, message):
    with pytest.raises(InputError) as error:
        interventions.run(make(BARE), rows(), BARE, bad())
    assert message in str(error.value) and "\n" not in str(error.value)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_scores_are_what_the_loss_falls_by_to_first_order():
    """Three weights of every array scaled a little, by finite differences; then set to 0, which agrees in sign."""
    params = make(BARE)
    scores = host(jax.jit(lambda p: interventions.first_order_scores(bare_loss, p))(params))
    assert jax.tree.structure(scores) == jax.tree.structure(params)
    rng, base = np.random.default_rng(0), float(bare_loss(params))
    agree = []
    for path, score in jax.tree_util.tree_leaves_with_path(scores):
        for flat in rng.choice(score.size, min(3, score.size), replace=False):
            place = np.unravel_index(flat, score.shape)

            def scaled(by, path=path, place=place):
                changed = host(params)
                leaf = changed
                for key in path:
                    leaf = leaf[key.key]
                leaf[place] *= by
                return float(bare_loss(changed))

            slope = (scaled(1 + 0.02) - scaled(1 - 0.02)) / 0.04
            np.testing.assert_allclose(slope, score[place], atol=2e-3, rtol=0.05, err_msg=str(path))
            if abs(score[place]) > 0.02:
                agree.append(np.sign(base - scaled(0.0)) == np.sign(score[place]))
    assert len(agree) > 10 and np.mean(agree) > 0.8


def reference_names(params, scores, count):
    """Top weights by a sort in NumPy, with names made from the loop over the tree."""
    entries = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(host(scores)):
        for place in np.ndindex(leaf.shape):
            keys, rest = [key.key for key in path], list(place)
            if keys[0] == "blocks":
                keys.insert(1, str(rest.pop(0)))
            entries.append((-leaf[place], f"{'.'.join(keys)}[{', '.join(map(str, rest))}]"))
    return [name for _, name in sorted(entries, key=lambda e: e[0])[:count]]


def at_name(tree, name):
    """(array, index) of a name like those of `names`."""
    path, place = name[:-1].split("[")
    keys = path.split(".")
    index = tuple(slice(None) if i == ":" else int(i) for i in place.split(", "))
    if keys[0] == "blocks":
        index = (int(keys.pop(1)), *index)
    for key in keys:
        tree = tree[key]
    return tree, index


def test_ranking_is_a_sort_and_its_names_are_where_prune_zeroes():
    params, scores = make(BARE), make(BARE, seed=1)
    chosen = interventions.ranked(scores, 12)
    words = interventions.names(chosen)
    assert words == reference_names(params, scores, 12)
    assert any(name.startswith("blocks.1.") for name in words)
    close(chosen.score_K, [leaf[place] for leaf, place in (at_name(scores, name) for name in words)])
    for k in (0, 1, 12):
        want = host(params)
        for name in words[:k]:
            leaf, index = at_name(want, name)
            leaf[index] = 0
        jax.tree.map(np.testing.assert_array_equal, prune(params, chosen, k), want)
    jax.tree.map(np.testing.assert_array_equal, interventions.prune(params, chosen, 12), want)  # a static count
    alone = host(params)
    leaf, index = at_name(alone, words[5])
    leaf[index] = 0
    jax.tree.map(np.testing.assert_array_equal, prune(params, chosen, np.arange(12) == 5), alone)


def test_units_are_columns_of_kernels_and_rows_of_tables():
    params, scores = make(BARE), host(make(BARE, seed=1))
    by_unit = interventions.unit_scores(scores)
    close(by_unit["blocks.mlp.in.kernel"], scores["blocks"]["mlp"]["in"]["kernel"].sum(1))
    close(by_unit["head.kernel"], scores["head"]["kernel"].sum(0))
    close(by_unit["embed.position"], scores["embed"]["position"].sum(1))
    assert len(by_unit) == 6 + 1 + 2 and by_unit["blocks.mlp.in.kernel"].shape == (2, 7)
    assert set(interventions.unit_scores(scores, "embedding")) == {"embed.position", "embed.token"}

    chosen = interventions.ranked(scores, 20, interventions.UNITS)
    everything = np.sort(np.concatenate([np.ravel(v) for v in by_unit.values()]))[::-1]
    close(chosen.score_K, everything[:20], atol=1e-5)
    words, want = interventions.names(chosen), host(params)
    assert any("[:, " in w for w in words) and any(w.startswith("embed.") and w.endswith(", :]") for w in words)
    for k, name in enumerate(words):
        leaf, index = at_name(want, name)
        close(at_name(scores, name)[0][index].sum(), chosen.score_K[k], atol=1e-5)
        leaf[index] = 0
    jax.tree.map(np.testing.assert_array_equal, prune(params, chosen, 20), want)
    biases = {w.split("[")[0] for w in words if "bias" in w}
    assert not biases


def test_sweeps_equal_loops_in_a_bank():
    """A bank of two models, each ranked by its own scores, against one after the other."""
    bank = jax.tree.map(lambda *leaves: np.stack(leaves), make(BARE, 0), make(BARE, 1))

    @jax.jit
    @jax.vmap
    def study(params):
        chosen = interventions.ranked(interventions.first_order_scores(bare_loss, params), 4)
        return chosen, interventions.sweep(lambda p: {"loss": bare_loss(p)}, params, chosen)["loss"]

    single = jax.jit(jax.vmap(lambda p, chosen: interventions.sweep(lambda p: p, p, chosen, "single")))
    chosen, cumulative = study(bank)
    words, pruned = interventions.names(chosen), host(single(bank, chosen))
    assert cumulative.shape == (2, 5) and [len(w) for w in words] == [4, 4] and words[0] != words[1]
    for g in range(2):
        params = jax.tree.map(lambda leaf, g=g: leaf[g], bank)
        gone = jax.tree.map(np.copy, params)
        close(cumulative[g, 0], bare_loss(params))
        for k, name in enumerate([None, *words[g]]):
            one = jax.tree.map(np.copy, params)
            for tree in (gone, one) if name else ():
                leaf, index = at_name(tree, name)
                leaf[index] = 0
            close(cumulative[g, k], bare_loss(gone), atol=1e-5)
            jax.tree.map(lambda got, want, at=(g, k): np.testing.assert_array_equal(got[at], want), pruned, one)
    assert (cumulative[:, 1:].min(1) < cumulative[:, 0]).all()


def test_random_control_is_uniform_over_what_is_not_zero():
    params = {"blocks": {"in": {"kernel": jnp.ones((2, 2, 3)).at[0].set(0.0), "bias": jnp.zeros((2, 3))}}}
    keys = jax.random.split(jax.random.key(0), 3000)
    index = np.asarray(jax.jit(jax.vmap(lambda k: interventions.random_ranked(k, params, 2).index_K))(keys))
    assert (index[:, 0] != index[:, 1]).all()
    counts = np.bincount(index.ravel(), minlength=18)
    used = np.flatnonzero(counts)  # the flat order is that of the tree: bias 0-5, kernel 6-17
    assert used.tolist() == list(range(12, 18))
    assert np.abs(counts[used] - 1000).max() < 5 * np.sqrt(1000 * 5 / 6)
    anything = jax.jit(jax.vmap(lambda k: interventions.random_ranked(k, params, 2, nonzero=False).index_K))(keys)
    assert (np.bincount(np.asarray(anything).ravel(), minlength=18) > 200).all()
    chosen = interventions.random_ranked(keys[0], params, 8)  # zeros last
    assert sorted(np.asarray(chosen.index_K[:6])) == list(range(12, 18)) and np.isnan(chosen.score_K).all()
    neurons = interventions.random_ranked(keys[0], params, 3, "neuron")
    assert sorted(interventions.names(neurons)) == [f"blocks.1.in.kernel[:, {i}]" for i in range(3)]


match = jax.jit(interventions.matched_ranked, static_argnums=3)


@pytest.mark.parametrize("kind", ["weight", "neuron"])
def test_matched_control_takes_the_nearest_of_the_same_matrix(kind):
    params = make(BARE)
    chosen = interventions.ranked(make(BARE, seed=1), 10, kind)
    words, partners = interventions.names(chosen), interventions.names(match(jax.random.key(0), params, chosen, 1))
    assert not set(words) & set(partners) and len(set(partners)) == 10
    used = set(words)
    for word, partner in zip(words, partners, strict=True):
        leaf, index = at_name(host(params), word)
        matrix = np.abs(leaf[index[0]] if word.startswith("blocks") else leaf)
        magnitude = {}
        for place in np.ndindex(matrix.shape if kind == "weight" else matrix.shape[1:]):
            name = ", ".join([":"] * (kind == "neuron") + [str(i) for i in place])
            magnitude[f"{word.split('[')[0]}[{name}]"] = matrix[(..., *place)].sum()
        nearest = min(abs(v - magnitude[word]) for name, v in magnitude.items() if name not in used)
        assert partner not in used and abs(magnitude[partner] - magnitude[word]) <= nearest + 1e-6
        used.add(partner)


def test_matched_control_draws_and_leaves_an_empty_matrix():
    params = {"a": jnp.array([1.0]), "b": jnp.array([3.0, 1.5, 9.0, 1.4])}
    chosen = interventions.ranked({"a": jnp.ones(1), "b": jnp.zeros(4)}, 1)
    draws = {interventions.names(match(jax.random.key(i), params, chosen, 2))[0] for i in range(20)}
    assert interventions.names(chosen) == ["a[0]"] and draws == {"b[1]", "b[3]"}
    with pytest.raises(InputError, match="3 of 5 candidates are chosen"):
        interventions.matched_ranked(jax.random.key(0), params, interventions.ranked(params, 3))


def test_bad_pruning_is_one_line():
    params = make(BARE)
    chosen = interventions.ranked(params, 3)
    cases = [
        (lambda: interventions.ranked(params, 3, "rows"), "kind of candidates 'rows': choose from weight, neuron"),
        (lambda: interventions.ranked(params, 10**6), "1000000 of"),
        (lambda: interventions.ranked(params, 0), "0 of"),
        (lambda: interventions.ranked({"a": params["embed"]["token"]}, 1, "neuron"), "have no neuron"),
        (lambda: interventions.unit_scores(params, ("weight",)), "'weight' is no unit"),
        (lambda: interventions.prune(params, chosen, 4), "4 of 3 chosen candidates"),
        (lambda: interventions.prune(params, chosen, 1.5), "which to prune is float32"),
        (lambda: interventions.prune(params, chosen, np.ones(2, bool)), "bool of shape [2]"),
        (lambda: interventions.prune(make(POST), chosen, 1), "head.kernel was ranked with shape [6, 11]"),
        (lambda: interventions.prune(jax.tree.map(lambda x: x[None], params), chosen, 1), "of a bank one at a time"),
        (lambda: interventions.sweep(bare_loss, params, chosen, "both"), "choose cumulative or single"),
        (lambda: interventions.patch_map(params, rows(), rows()[:, 1:], BARE, None), "differ in shape"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(InputError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value), message
