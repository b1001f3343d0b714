"""The transformer's own promises: causality, padding, packing, dropout by row, precision, parameter counts."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax import config, transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError

TINY = TransformerConfig(
    vocab_size=50, width=16, blocks=3, heads=2, head_width=8, mlp_width=32, max_len=24, init_std=0.3
)
VARIANTS = {
    "post": TINY,
    "pre": dataclasses.replace(TINY, norm="pre", types=0, head="linear", tied=False),
    "compiled": dataclasses.replace(TINY, norm="none", activation="relu", head_width=5, head="none", types=0),
}


# programs that compile longer than they run
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
forward = quick(transformer.forward, static_argnums=2)


def make(cfg, seed=0):
    """Random parameters from NumPy: every leaf away from its initial value, and nothing to compile."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: transformer.init(key, cfg), jax.random.key(0))
    fresh = jax.tree.map(lambda leaf: rng.normal(0, cfg.init_std, leaf.shape), shapes)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(leaf + (path[-1].key == "scale"), jnp.float32), fresh
    )


def random_ids(shape, seed=0, vocab=50):
    return jnp.asarray(np.random.default_rng(seed).integers(1, vocab, shape), jnp.int32)


def test_parameter_counts_of_the_paper():
    """Sheet, section 3: embeddings 23,542,272; a block 7,087,872; with head 66,692,154 (encoder 66,069,504)."""
    shapes = jax.eval_shape(lambda key: transformer.init(key, config.bert6()), jax.random.key(0))
    assert transformer.num_params(shapes["embed"]) == 23_542_272
    assert transformer.num_params(shapes["blocks"]) == 6 * 7_087_872
    assert transformer.num_params(shapes) == 66_692_154
    assert transformer.num_params(shapes) - transformer.num_params(shapes["head"]) == 66_069_504


def test_init_follows_the_initialisation_of_bert():
    init = quick(transformer.init, static_argnums=1)
    params = init(jax.random.key(0), TINY)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        if name in ("bias", "scale"):
            assert (leaf == float(name == "scale")).all(), path
        else:
            assert abs(leaf.std() / TINY.init_std - 1) < 5 / np.sqrt(2 * leaf.size), path
    kernels = params["blocks"]["attn"]["q"]["kernel"]
    assert not np.allclose(kernels[0], kernels[1])
    gpt = config.gpt_mini(30, blocks=2, width=64, heads=2, head_width=32, mlp_width=128)
    out = init(jax.random.key(0), gpt)["blocks"]["mlp"]["out"]["kernel"]
    np.testing.assert_allclose(out.std(), 0.02 / np.sqrt(4), rtol=0.05)


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS.keys())
def test_activations_have_the_documented_shapes(cfg):
    B, T, L, D, N, H, F = 2, 7, cfg.blocks, cfg.width, cfg.heads, cfg.head_width, cfg.mlp_width
    out_BTD, acts = forward(make(cfg), random_ids((B, T)), cfg)
    assert out_BTD.shape == (B, T, D)
    shapes = {name: value.shape for name, value in acts.items()}
    per_head, stream, hidden = (L, B, T, N, H), (L, B, T, D), (L, B, T, F)
    assert shapes == {
        "q": per_head, "k": per_head, "v": per_head, "z": per_head, "pattern": (L, B, N, T, T),
        "attn_out": stream, "resid_mid": stream, "mlp_out": stream, "resid_post": stream,
        "mlp_pre": hidden, "mlp_post": hidden, "resid": (L + 1, B, T, D),
    }  # fmt: skip
    assert set(shapes) == set(transformer.HOOK_NAMES)
    np.testing.assert_allclose(acts["pattern"].sum(-1), 1.0, rtol=1e-5)


def test_the_sums_of_a_block_add_up():
    """resid_mid and resid_post are the sums before the norms (post) or the stream itself (pre)."""
    for cfg in VARIANTS.values():
        params = make(cfg)
        _, acts = forward(params, random_ids((2, 7)), cfg)
        np.testing.assert_allclose(acts["resid_mid"], acts["resid"][:-1] + acts["attn_out"], atol=1e-5)
        if cfg.norm == "post":
            layer = jax.tree.map(lambda p: p[1], params["blocks"])
            middle = transformer.apply_norm(layer["norm_attn"], acts["resid_mid"][1], cfg)
            np.testing.assert_allclose(acts["resid_post"][1], middle + acts["mlp_out"][1], atol=1e-5)
            after = transformer.apply_norm(layer["norm_mlp"], acts["resid_post"][1], cfg)
            np.testing.assert_allclose(acts["resid"][2], after, atol=1e-5)
        else:
            np.testing.assert_allclose(acts["resid_post"], acts["resid_mid"] + acts["mlp_out"], atol=1e-5)
            np.testing.assert_allclose(acts["resid"][1:], acts["resid_post"], atol=1e-6)


@pytest.mark.parametrize("jit", [True, False])
def test_causal_models_do_not_look_ahead(jit):
    cfg = dataclasses.replace(VARIANTS["pre"], causal=True)
    params, ids_BT, at = make(cfg), random_ids((1, 9)), 4

    def output(x_BTD):
        mask = transformer.attention_mask(jnp.ones((1, 9), jnp.int32), cfg.causal)
        return transformer.blocks(params["blocks"], x_BTD, mask, cfg)[0][0, at].sum()

    grad = jax.grad(jax.jit(output) if jit else output)(transformer.embed(params, ids_BT, cfg))
    size_T = np.abs(grad[0]).max(-1)
    assert (size_T[at + 1 :] == 0).all() and (size_T[: at + 1] > 1e-4).all()


def test_padding_is_invisible_and_rows_are_independent():
    params = make(TINY)
    ids_BT = random_ids((3, 12))
    alone_BTD, _ = forward(params, ids_BT[:1, :8], TINY)
    segment_BT = (jnp.arange(12)[None] < jnp.asarray([8, 12, 5])[:, None]).astype(jnp.int32)
    padded_BTD, acts = forward(params, ids_BT, TINY, segment_BT=segment_BT)
    np.testing.assert_allclose(padded_BTD[0, :8], alone_BTD[0], atol=1e-5)
    assert (acts["pattern"][:, 2, :, :, 5:] == 0).all()
    changed_BTD, _ = forward(params, ids_BT.at[2, 5:].set(7), TINY, segment_BT=segment_BT)
    np.testing.assert_array_equal(padded_BTD[2, :5], changed_BTD[2, :5])


@pytest.mark.parametrize("causal", [False, True])
def test_packed_equals_unpacked(causal):
    """Documents side by side in one row, with segments and restarting positions, are as if each were alone."""
    cfg = dataclasses.replace(TINY, causal=causal)
    params, lengths = make(cfg), [5, 9, 6]
    documents = [random_ids((1, n), seed=n) for n in lengths]
    pad = jnp.zeros((1, 4), jnp.int32)
    packed_BT = jnp.concatenate([*documents, pad], axis=1)
    segment_BT = jnp.concatenate([jnp.full_like(d, i + 1) for i, d in enumerate(documents)] + [pad], axis=1)
    position_BT = jnp.concatenate([jnp.arange(n, dtype=jnp.int32)[None] for n in lengths] + [pad], axis=1)
    packed_BTD, _ = forward(params, packed_BT, cfg, segment_BT=segment_BT, position_BT=position_BT)
    start = 0
    for document in documents:
        alone_BTD, _ = forward(params, document, cfg)
        np.testing.assert_allclose(packed_BTD[:, start : start + document.shape[1]], alone_BTD, atol=2e-6)
        start += document.shape[1]


def test_block_zero_sees_no_context():
    """Sheet, section 6: depth 0 at a position does not change with the other positions."""
    params = make(TINY)
    ids_BT = random_ids((1, 10))
    _, acts = forward(params, ids_BT, TINY)
    _, changed = forward(params, ids_BT.at[0, 3:].set(9), TINY)
    np.testing.assert_array_equal(acts["resid"][0, :, :3], changed["resid"][0, :, :3])
    assert np.abs(acts["resid"][1, :, :3] - changed["resid"][1, :, :3]).max() > 1e-3


def test_dropout_belongs_to_the_row():
    cfg = dataclasses.replace(TINY, dropout=0.3, attention_dropout=0.2)
    params, ids_BT = make(cfg), random_ids((4, 10))
    keys_B = jax.random.split(jax.random.key(5), 4)
    all_BTD, acts = forward(params, ids_BT, cfg, keys_B=keys_B)
    some_BTD, _ = forward(params, ids_BT[2:3], cfg, keys_B=keys_B[2:3])
    np.testing.assert_allclose(all_BTD[2:3], some_BTD, atol=1e-5)
    quiet_BTD, _ = forward(params, ids_BT, cfg)
    assert np.abs(all_BTD - quiet_BTD).max() > 0.1


def test_dropout_rate_and_scale():
    keys_B = jax.random.split(jax.random.key(0), 8)
    x = transformer.dropout(jnp.ones((8, 4_000)), keys_B, 0.1)
    share = float((x == 0).mean())
    assert abs(share - 0.1) < 4 * np.sqrt(0.1 * 0.9 / x.size)
    np.testing.assert_allclose(float(x.max()), 1 / 0.9, rtol=1e-4)


def test_bfloat16_computes_near_float32_with_float32_where_promised():
    half = dataclasses.replace(TINY, dtype="bfloat16")
    params, ids_BT = make(TINY), random_ids((2, 12))
    full_BTD, _ = forward(params, ids_BT, TINY)
    half_BTD, acts = forward(params, ids_BT, half)
    assert half_BTD.dtype == jnp.bfloat16 and acts["pattern"].dtype == jnp.float32
    logits = transformer.head(params, half_BTD, half)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(half_BTD.astype(jnp.float32), full_BTD, atol=0.15)
    loss = jax.grad(lambda p: transformer.forward(p, ids_BT, half)[0].astype(jnp.float32).sum())
    grads = jax.eval_shape(loss, params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))


def test_blocks_run_in_pieces():
    """Any slice of the stack runs alone: what splicing and patching need."""
    params, ids_BT = make(TINY), random_ids((2, 6))
    out_BTD, _ = forward(params, ids_BT, TINY)
    mask = transformer.attention_mask(jnp.ones((2, 6), jnp.int32), False)
    x_BTD = transformer.embed(params, ids_BT, TINY)
    for piece in (slice(0, 1), slice(1, 3)):
        x_BTD, _ = transformer.blocks(jax.tree.map(lambda p, s=piece: p[s], params["blocks"]), x_BTD, mask, TINY)
    np.testing.assert_allclose(x_BTD, out_BTD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unroll", [2, 6])
def test_large_blocks_are_unrolled_and_nothing_changes(monkeypatch, unroll):
    params, ids_BT = make(TINY), random_ids((2, 6))

    def loss(params):
        out_BTD, acts = transformer.forward(params, ids_BT, TINY)
        return (out_BTD**2).sum() + (acts["pattern"] ** 2).sum()

    def programs():
        monkeypatch.setattr(transformer, "UNROLL", unroll)
        return quick(jax.value_and_grad(loss)).lower(params)

    looped = programs()
    monkeypatch.setattr(transformer, "LARGE", 1)
    unrolled = programs()
    assert looped.as_text().count("stablehlo.while") == 2
    assert unrolled.as_text().count("stablehlo.while") == (0 if unroll >= TINY.blocks else 2)
    found, expected = (jax.tree.leaves(program.compile()(params)) for program in (unrolled, looped))
    scale = max(np.abs(leaf).max() for leaf in expected[1:])  # of all gradients: those of the keys' biases are zero
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * scale)


def test_gradients_held_back_are_the_gradients():
    x = jnp.asarray([0.5, -2.0])
    for direct in (lambda f: jax.grad(lambda x: f(x).sum()), lambda f: jax.jacfwd(f), lambda f: jax.hessian(f)):
        found = direct(lambda x: transformer.gradient_whole(x**3))(x)
        np.testing.assert_array_equal(found, direct(lambda x: x**3)(x))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("lead, K, F", [((0, 8), 4, 3), ((1,), 1, 1), ((3,), 5, 1), ((2, 7), 8, 3), ((4, 16), 64, 48)])
def test_bfloat16_products_and_their_gradients(lead, K, F, transposed, batched):
    """Against NumPy in float64: sums are float32, what is differentiated is rounded to bfloat16 once."""
    rng = np.random.default_rng(1)
    bank = (2,) if batched else ()
    x, kernel, slope = (
        np.asarray(jnp.asarray(rng.normal(size=(*bank, *shape)), jnp.bfloat16))
        for shape in ((*lead, K), (F, K) if transposed else (K, F), (*lead, F))
    )

    def run(x, kernel, slope):
        y, pull = jax.vjp(partial(transformer.product, transposed=transposed), x, kernel)
        return y, *pull(slope.astype(jnp.float32))

    y, dx, dkernel = jax.jit(jax.vmap(run) if batched else run)(x, kernel, slope)
    assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    x, kernel, slope = (a.astype(np.float64) for a in (x, kernel, slope))
    kernel = kernel.swapaxes(-1, -2) if transposed else kernel
    spread = kernel.reshape(*bank, *(1,) * len(lead), *kernel.shape[-2:])
    flat = [a.reshape(*bank, -1, a.shape[-1]) for a in (x, slope)]
    expected = np.einsum("...pk,...pf->...kf", *flat)
    np.testing.assert_allclose(y, (x[..., None, :] @ spread)[..., 0, :], rtol=1e-5, atol=1e-5)
    half = 2.0**-8  # of a bfloat16's last bit, and as much for float32 sums that cancel
    np.testing.assert_allclose(
        np.float64(dx), (slope[..., None, :] @ spread.swapaxes(-1, -2))[..., 0, :], rtol=half, atol=1e-4
    )
    expected = expected.swapaxes(-1, -2) if transposed else expected
    np.testing.assert_allclose(np.float64(dkernel), expected, rtol=half, atol=1e-4)


def test_forward_vmaps_over_a_bank_of_models():
    members = [make(TINY, seed) for seed in range(3)]
    bank = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    ids_BT = random_ids((2, 6))
    together = quick(jax.vmap(lambda p: transformer.forward(p, ids_BT, TINY)[0]))(bank)
    np.testing.assert_allclose(together[1], forward(members[1], ids_BT, TINY)[0], atol=1e-5)


def test_flops_count_the_matrices():
    cfg = config.bert6()
    params = jax.eval_shape(lambda key: transformer.init(key, cfg), jax.random.key(0))
    kernels = sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "kernel")
    assert transformer.flops_per_token(cfg, 128) == 6 * (kernels + 768 * 30_522) + 12 * 6 * 768 * 128
    assert abs(transformer.flops_per_token(cfg, 128) / 0.406e9 - 1) < 0.01  # the figure of ecosystem arithmetic


def test_settings_that_cannot_be_are_refused():
    for changes in ({"norm": "rms"}, {"dropout": 1.0}, {"heads": 0}, {"dtype": "float16"}):
        with pytest.raises(InputError, match=next(iter(changes))):
            dataclasses.replace(TINY, **changes)
    with pytest.raises(ValueError, match="max_len"):
        forward(make(TINY), random_ids((1, 25)), TINY)


# --- one position only ---

BARE = dataclasses.replace(VARIANTS["compiled"], heads=3, max_len=9, init_std=0.2)
PACKED = np.array([[1] * 7, [1, 1, 1, 1, 0, 0, 0], [1, 1, 2, 2, 2, 2, 0], [0] * 7], np.int32)  # T = 7 of 9 places


def check_same(stream, other, params, slope: bool):
    """Two functions of the parameters have the same values and, with `slope`, the same gradients of a random function
    of these (there are no rules for gradients of our own, so a few cases will do)."""
    weight_XD = np.random.default_rng(9).normal(size=jax.eval_shape(stream, params).shape).astype(np.float32)

    @partial(quick, static_argnums=0)
    def run(stream, params):
        value_XD, pull = jax.vjp(stream, params)
        return value_XD, pull(weight_XD)[0] if slope else {}

    (expected, slopes), (found, found_slopes) = (run(fn, params) for fn in (stream, other))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    for (path, one), two in zip(
        jax.tree_util.tree_leaves_with_path(found_slopes), jax.tree.leaves(slopes), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.endswith("k.bias"):  # its gradient is 0, what is left there is rounding
            two, scale = np.zeros_like(two), np.abs(slopes["blocks"]["attn"]["k"]["kernel"]).max()
        else:
            scale = np.abs(two).max()
        assert scale > 1e-3 or name.startswith("head"), name
        np.testing.assert_allclose(one, two, atol=2e-5 * scale, err_msg=name)


@pytest.mark.parametrize(
    ("blocks", "causal", "segment", "slope"),
    [(1, True, PACKED, True), (2, True, None, False), (3, False, PACKED, True), (4, False, None, False)],
)
def test_one_position_of_the_stream_is_that_of_the_whole_pass(blocks, causal, segment, slope):
    """At every position."""
    cfg = dataclasses.replace(BARE, blocks=blocks, causal=causal)
    ids_BT, inputs = random_ids((4, 7), seed=blocks), {} if segment is None else {"segment_BT": jnp.asarray(segment)}

    def whole(params):
        return transformer.forward(params, ids_BT, cfg, **inputs)[0]

    def pieces(params):
        at_T = jnp.arange(7)  # one program for all
        return jax.vmap(lambda at: transformer.stream_at(params, ids_BT, cfg, at, **inputs), out_axes=1)(at_T)

    check_same(whole, pieces, make(cfg, seed=blocks), slope)


def test_one_position_of_a_bank():
    members = [make(BARE, seed) for seed in range(3)]
    bank = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    ids_GBT, segment_BT = random_ids((3, 4, 7)), jnp.asarray(PACKED)
    one = lambda params, ids_BT: transformer.stream_at(params, ids_BT, BARE, 2, segment_BT=segment_BT)  # noqa: E731
    found_GBD = quick(jax.vmap(one))(bank, ids_GBT)
    for g, params in enumerate(members):
        expected_BTD, _ = forward(params, ids_GBT[g], BARE, segment_BT=segment_BT)
        np.testing.assert_allclose(found_GBD[g], expected_BTD[:, 2], atol=1e-5 * np.abs(expected_BTD).max())


@pytest.mark.parametrize(
    ("blocks", "causal", "segment", "position", "slope"),
    [(1, False, PACKED, 2, False), (2, True, PACKED[:3], -2, True)],  # the last row is padding that nothing precedes
)
def test_one_position_of_a_pre_norm_model_is_that_of_the_whole_pass(blocks, causal, segment, position, slope):
    cfg = dataclasses.replace(VARIANTS["pre"], blocks=blocks, causal=causal, max_len=9, activation="gelu_tanh")
    ids_BT, segment_BT = random_ids(segment.shape), jnp.asarray(segment)

    def whole(params):
        return transformer.forward(params, ids_BT, cfg, segment_BT=segment_BT)[0][:, position]

    def piece(params):
        return transformer.stream_at(params, ids_BT, cfg, position, segment_BT=segment_BT)

    check_same(whole, piece, make(cfg), slope)


def test_one_position_of_a_causal_pre_norm_model_does_not_see_what_follows():
    cfg = dataclasses.replace(VARIANTS["pre"], causal=True, blocks=1)
    params, ids_BT = make(cfg), np.array(random_ids((3, 7)))
    ids_BT[1:] = ids_BT[0]
    ids_BT[1, 5:], ids_BT[2, 4] = 0, 0
    found_BD = quick(lambda params, ids_BT: transformer.stream_at(params, ids_BT, cfg, 4))(params, ids_BT)
    expected_BTD, _ = forward(params, ids_BT, cfg)
    np.testing.assert_allclose(found_BD, expected_BTD[:, 4], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found_BD[0], found_BD[1], rtol=1e-6, atol=1e-6)
    assert np.abs(found_BD[2] - found_BD[0]).max() > 0.01
    with pytest.raises(IndexError):
        transformer.stream_at(params, ids_BT, cfg, 7)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "post"},
        {"types": 2},
        {"dtype": "bfloat16"},
        {"dropout": 0.1},
        {"attention_dropout": 0.1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_one_position_is_refused_where_it_is_not_supported(changes):
    cfg = dataclasses.replace(BARE, **changes)
    with pytest.raises(ValueError, match="stream_at reads float32 models .*; use forward"):
        transformer.stream_at(make(cfg), random_ids((2, 5)), cfg, 1)


@pytest.mark.parametrize("norm", ["none", "pre"])
def test_one_position_of_rows_that_are_too_long(norm):
    cfg = dataclasses.replace(BARE, norm=norm)
    with pytest.raises(ValueError, match="rows of 10 tokens do not fit max_len = 9"):
        transformer.stream_at(make(cfg), random_ids((2, 10)), cfg, 1)
