"""Attribution against closed forms, finite differences and loops that set one feature after the other."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax import transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError
from sae_jax import attribution as A
from sae_jax import dictionary as dictionaries
from sae_jax import evaluate
from sae_jax.config import DictionaryConfig

B, T, D, F, H = 4, 6, 32, 12, 2
MODEL = TransformerConfig(
    vocab_size=11, width=D, blocks=2, heads=2, head_width=8, mlp_width=32, max_len=10, init_std=0.2, norm="pre"
)
SHARED = DictionaryConfig(width=D, latents=F, heads=H, activation="jumprelu", penalty="tanh", decoder="free")
PER_HEAD = dataclasses.replace(SHARED, gate="per_head", code_norm="per_head")


def free_ends(seed=0, baseline="patched", use_BT=None):
    """Ends of random streams and codes, no model behind them."""
    rng = np.random.default_rng(seed)
    streams = rng.normal(size=(2, B, T, D)).astype(np.float32)
    codes = np.maximum(rng.normal(size=(2, B, T, F)), 0).astype(np.float32)
    W_FD, b_D = rng.normal(size=(F, D)).astype(np.float32), rng.normal(size=D).astype(np.float32)
    use_BT = np.ones((B, T), bool) if use_BT is None else use_BT
    return A.make_ends(streams[0], codes[0], streams[1], codes[1], W_FD, b_D, jnp.asarray(use_BT), baseline)


@partial(jax.jit, static_argnums=0)
def snapshots(cfg):
    return jax.vmap(lambda key: transformer.init(key, cfg))(jax.random.split(jax.random.key(1), H))


def tree(cfg=PER_HEAD, seed=2):
    """A dictionary with other weights, means and scales in every head."""
    rng = np.random.default_rng(seed)

    def draw(*shape, std=1.0):
        return jnp.asarray(std * rng.normal(size=shape), jnp.float32)

    params = {
        "W_enc": draw(cfg.heads, F, D, std=0.5),
        "b_enc": draw(F, std=0.2),
        "W_dec": draw(cfg.heads, F, D, std=0.4) * jnp.asarray([0.2, 1.0])[: cfg.heads, None, None],
        "b_dec": draw(cfg.heads, D, std=0.2),
        "log_threshold": jnp.full(F, np.log(0.3), jnp.float32),
    }
    norm = {"mean": draw(cfg.heads, D, std=0.3), "scale": jnp.asarray([0.7, 3.0][: cfg.heads], jnp.float32)}
    return {"params": params, "norm": norm, "threshold": jnp.float32(-1.0)}


def task(seed=3):
    """Pairs that differ in two tokens; rows 1 and 3 are shorter, row 3 counts nowhere."""
    rng = np.random.default_rng(seed)
    clean_BT = rng.integers(0, MODEL.vocab_size, (B, T))
    patch_BT = clean_BT.copy()
    patch_BT[:, 1] = (clean_BT[:, 1] + 3) % MODEL.vocab_size
    patch_BT[:, 2] = (clean_BT[:, 2] + 5) % MODEL.vocab_size
    segment_BT = np.ones((B, T), int)
    segment_BT[1, 4:] = segment_BT[3, 3:] = 0
    position_B = segment_BT.sum(1) - 1
    right_B = rng.integers(0, MODEL.vocab_size, B)
    pairs = A.Pairs(
        clean_BT, patch_BT, segment_BT, position_B, right_B, (right_B + 1) % MODEL.vocab_size, np.arange(B) < 3
    )
    return A.check_pairs(pairs, MODEL)


def answers(logits_BTV, pairs):
    rows = jnp.arange(B), pairs.position_B
    return logits_BTV[(*rows, pairs.right_B)] - logits_BTV[(*rows, pairs.wrong_B)]


@partial(jax.jit, static_argnums=(1, 3))
def spliced(params, cfg, pairs, depth, a_BTD):
    """m by `evaluate.splice`, rows of the clean ids with the stream replaced by a."""
    batch = {"ids": pairs.clean_BT, "segment": pairs.segment_BT}
    out_BTD = evaluate.splice(params, cfg, batch, depth, lambda _: a_BTD)
    return answers(transformer.head(params, out_BTD, cfg), pairs)


def close(found, expected, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=rtol, atol=atol)


# --- attribution -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", A.BASELINES)
@pytest.mark.parametrize("rule", A.RULES)
def test_a_linear_metric_is_attributed_exactly_by_every_rule(rule, baseline):
    ends = free_ends(baseline=baseline)
    w_BTD = np.random.default_rng(9).normal(size=(B, T, D)).astype(np.float32)
    found = A.attribute(lambda a_BTD: (a_BTD * w_BTD).sum((1, 2)), ends, rule, 3, per_position=True)
    f, f0, W, b = (np.asarray(v, np.float64) for v in (ends.clean_BTF, ends.base_BTF, ends.W_FD, ends.b_D))
    e, e0 = np.asarray(ends.clean_BTD) - (f @ W + b), np.asarray(ends.base_BTD) - (f0 @ W + b)
    close(found.features, (f - f0) * (w_BTD @ W.T), 1e-4, 1e-4)
    close(found.error, ((e - e0) * w_BTD).sum(-1), 1e-4, 1e-4)
    close(A.gap(found), np.zeros(B), atol=1e-4)
    if baseline == "zero":
        close(f0, 0.0)
        close(e0, 0.0)


def test_rules_weigh_the_gradient_of_a_quadratic_metric_as_by_hand():
    ends = free_ends()
    Q = np.random.default_rng(5).normal(size=(D, D)).astype(np.float32)
    Q = Q + Q.T

    def metric(a_BTD):
        return 0.5 * jnp.einsum("btd,de,bte->b", a_BTD, Q, a_BTD)

    clean, base = np.asarray(ends.clean_BTD), np.asarray(ends.base_BTD)
    span_BTF = np.asarray(ends.clean_BTF - ends.base_BTF)
    for rule, steps, mean_alpha in [("gauss", 2, 0.5), ("midpoint", 4, 0.5), ("left", 4, 0.375), ("gradient", 7, 1.0)]:
        slope_BTD = (base + mean_alpha * (clean - base)) @ Q
        found = A.attribute(metric, ends, rule, steps)
        close(found.features, (span_BTF * (slope_BTD @ np.asarray(ends.W_FD).T)).sum(1), 1e-4, 1e-3)
        incomplete = np.abs(A.gap(found)).max() > 0.1
        assert incomplete == (mean_alpha != 0.5)
    alpha, weight = A.nodes("gauss", 10)
    close((weight * alpha**5).sum(), 1 / 6, 1e-6)


@pytest.mark.parametrize(
    ("norm", "causal", "cfg"),
    [("pre", True, PER_HEAD), ("pre", False, SHARED), ("post", True, SHARED), ("post", False, PER_HEAD)],
)
def test_attributions_in_a_transformer_are_complete(norm, causal, cfg):
    model = dataclasses.replace(MODEL, norm=norm, causal=causal)
    params_H, dictionary, pairs = snapshots(model), tree(cfg), task()

    @jax.jit
    def run(depth):
        def both(metric, ends, _):
            return ends, A.attribute(metric, ends)

        return A.per_snapshot(both, dictionary, cfg, params_H, model, pairs, depth)

    @jax.jit
    def forward(ids_BT):
        """Streams at depth 1 and m of every snapshot, by the plain model."""

        def one(params):
            out_BTD, acts = transformer.forward(params, ids_BT, model, segment_BT=pairs.segment_BT)
            return acts["resid"][1], answers(transformer.head(params, out_BTD, model), pairs)

        return jax.vmap(one)(params_H)

    ends, found = run(1)
    assert np.abs(found.clean - found.base).max() > 0.5
    assert np.abs(jax.vmap(A.gap)(found)).max() < 1e-4
    for ids_BT, m_HB, stream_HBTD, f_HBTF in [
        (pairs.clean_BT, found.clean, ends.clean_BTD, ends.clean_BTF),
        (pairs.patch_BT, found.base, ends.base_BTD, ends.base_BTF),
    ]:
        expected_HBTD, expected_HB = forward(ids_BT)
        close(m_HB, expected_HB, 1e-4, 1e-4)
        close(stream_HBTD, expected_HBTD, 1e-4, 1e-4)
        # codes and decoder are those of the dictionary, which reads the rows of all snapshots
        rows_BHD = jnp.moveaxis(expected_HBTD, 0, 2).reshape(B * T, H, D)
        xhat_BHD, _ = dictionaries.reconstruct(dictionary, rows_BHD, cfg)
        decoded = np.einsum("hbtf,hfd->hbtd", f_HBTF, ends.W_FD) + np.asarray(ends.b_D)[:, None, None]
        real_BT1 = np.asarray(pairs.segment_BT > 0)[:, :, None]
        close(decoded * real_BT1, np.moveaxis(np.asarray(xhat_BHD).reshape(B, T, H, D), 2, 0) * real_BT1, 1e-4, 1e-4)
    if cfg.gate == "per_head":  # the heads differ in what they let through
        assert (np.asarray(ends.clean_BTF[0] != 0) != np.asarray(ends.clean_BTF[1] != 0)).any()


def test_folding_the_scales_changes_nothing_in_raw_units():
    params_H, dictionary, pairs = snapshots(MODEL), tree(), task()

    @jax.jit
    def run(dictionary):
        return A.per_snapshot(lambda metric, ends, _: ends, dictionary, PER_HEAD, params_H, MODEL, pairs, 1)

    one, other = run(dictionary), run(dictionaries.fold(dictionary, PER_HEAD))
    close(one.W_FD[1], dictionary["params"]["W_dec"][1] / 3.0)
    jax.tree.map(partial(close, rtol=1e-4, atol=1e-4), one, other)


@cache
def one_snapshot(baseline="patched"):
    """(metric, ends, parameters, pairs) of head 1 at depth 1."""
    params_H, dictionary, pairs = snapshots(MODEL), tree(), task()

    @jax.jit
    def read():
        reading = A.read(dictionary, PER_HEAD, params_H, MODEL, pairs, 1)
        return A.ends_at(dictionary, PER_HEAD, reading, 1, pairs.segment_BT > 0, baseline)

    params = jax.tree.map(lambda leaf: leaf[1], params_H)
    return jax.jit(A.logit_difference(params, MODEL, pairs, 1)), read(), params, pairs


@cache
def attributor(baseline="patched", rule="gradient", steps=10):
    metric, *_ = one_snapshot(baseline)
    return jax.jit(lambda ends: A.attribute(metric, ends, rule, steps))


def test_attributions_from_zero_are_complete_in_more_steps():
    _, ends, params, pairs = one_snapshot("zero")
    found = attributor("zero", "gauss", 40)(ends)
    b_BTD = jnp.broadcast_to(ends.b_D[None, None], (B, T, D))
    close(found.base, spliced(params, MODEL, pairs, 1, b_BTD), 1e-4, 1e-4)
    assert np.abs(found.clean - found.base).max() > 0.5
    assert np.abs(A.gap(found)).max() < 1e-4
    close(ends.base_BTF, 0.0, atol=0)


def test_attribution_patching_is_the_finite_difference_to_first_order():
    metric, ends, _, _ = one_snapshot()
    found = attributor()(ends)
    span_BTF = ends.clean_BTF - ends.base_BTF
    for f in (0, 5, 11):
        move_BTD = span_BTF[:, :, f, None] * ends.W_FD[f][None, None]
        below, above = (metric(ends.clean_BTD + jnp.float32(s) * move_BTD) for s in (-1e-3, 1e-3))
        close(found.features[:, f], (above - below) / 2e-3, 0.01, 3e-3)
    near = [
        ends._replace(
            base_BTD=ends.clean_BTD + jnp.float32(s) * (ends.base_BTD - ends.clean_BTD),
            base_BTF=ends.clean_BTF - jnp.float32(s) * span_BTF,
        )
        for s in (0.1, 0.05)
    ]
    large, small = (np.abs(A.gap(attributor()(e))).sum() for e in near)
    assert 2.5 < large / small < 6  # what is left over is of second order


def test_gradient_times_activation_is_the_gradient_rule_at_the_zero_baseline():
    metric, ends, _, _ = one_snapshot("zero")
    slope_BTD = jax.jit(jax.grad(lambda a_BTD: metric(a_BTD).sum()))(ends.clean_BTD)
    expected = np.einsum("btf,fd,btd->bf", ends.clean_BTF, ends.W_FD, slope_BTD)
    close(attributor("zero")(ends).features, expected, 1e-4, 1e-4)


def test_features_that_are_silent_or_write_nothing_have_no_attribution():
    _, ends, _, _ = one_snapshot()
    ends = ends._replace(
        clean_BTF=ends.clean_BTF.at[:, :, 3].set(0.0),
        base_BTF=ends.base_BTF.at[:, :, 3].set(0.0),
        W_FD=ends.W_FD.at[4].set(0.0),
    )
    found = attributor(rule="gauss")(ends)
    close(found.features[:, 3:5], 0.0, atol=0)
    assert np.abs(np.delete(np.asarray(found.features), [3, 4], 1)).max() > 0.01
    still = attributor(rule="gauss")(ends._replace(base_BTD=ends.clean_BTD, base_BTF=ends.clean_BTF))
    close(still.features, 0.0, atol=0)
    close(still.error, 0.0, atol=0)


def test_padding_and_positions_without_the_dictionary():
    params_H, dictionary, pairs = snapshots(MODEL), tree(), task()
    use_BT = jnp.asarray(np.arange(T) != 2)[None] & jnp.ones((B, 1), bool)

    @jax.jit
    def run(pairs, use_BT):
        def fn(metric, ends, _):
            k_X = np.array([0, 3])
            rank_F = np.arange(F)
            return A.attribute(metric, ends, per_position=True), A.curves(metric, ends, rank_F, k_X, "zero")

        return A.per_snapshot(fn, dictionary, PER_HEAD, params_H, MODEL, pairs, 1, use_BT=use_BT)

    padding_BT = np.asarray(pairs.segment_BT == 0)
    everywhere_BT = jnp.ones((B, T), bool)
    plain = run(pairs, everywhere_BT)
    assert padding_BT.any()
    close(np.asarray(plain[0].features)[:, padding_BT], 0.0, atol=0)
    close(np.asarray(plain[0].error)[:, padding_BT], 0.0, atol=0)
    junk = pairs._replace(
        clean_BT=jnp.where(padding_BT, 7, pairs.clean_BT), patch_BT=jnp.where(padding_BT, 2, pairs.patch_BT)
    )
    assert (junk.clean_BT != pairs.clean_BT).any()
    jax.tree.map(partial(close, rtol=0, atol=1e-6), plain, run(junk, everywhere_BT))
    # position 2 differs between the rows; without the dictionary there, the error node takes it
    masked, _ = run(pairs, use_BT)
    close(masked.features[:, :, 2], 0.0, atol=0)
    assert np.abs(plain[0].features[:, :, 2]).max() > 0.01
    assert np.abs(np.asarray(masked.error[:, :, 2])).max() > 0.1
    assert np.abs(jax.vmap(A.gap)(masked)).max() < 1e-4


# --- necessity and sufficiency ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", A.BASELINES)
@pytest.mark.parametrize("error", A.ERRORS)
def test_curves_equal_a_loop_that_sets_feature_after_feature(error, baseline):
    metric, ends, params, pairs = one_snapshot(baseline)
    order_F = np.random.default_rng(4).permutation(F)
    k_X = [0, 1, 4, F]
    found = jax.jit(lambda ends: A.curves(metric, ends, A.ranks(order_F, F), k_X, error))(ends)
    use_BT1 = np.asarray(ends.use_BT)[:, :, None]
    f, f0, W, b, a, a0 = (
        np.asarray(v, np.float64)
        for v in (ends.clean_BTF, ends.base_BTF, ends.W_FD, ends.b_D, ends.clean_BTD, ends.base_BTD)
    )
    e = a - np.where(use_BT1, f @ W + b, 0)
    e0 = a0 - np.where(use_BT1, f0 @ W + b, 0)
    node = {"kept": e, "baseline": e0, "zero": np.where(use_BT1, 0, e)}[error]

    def m(codes):
        stream = np.where(use_BT1, codes @ W + b, 0) + node
        return np.asarray(spliced(params, MODEL, pairs, 1, jnp.asarray(stream, jnp.float32)))

    for x, k in enumerate(k_X):
        without, only = f.copy(), f0.copy()
        for i in order_F[:k]:
            without[:, :, i] = f0[:, :, i]
            only[:, :, i] = f[:, :, i]
        close(found.necessity[:, x], m(without), 1e-3, 1e-3)
        close(found.sufficiency[:, x], m(only), 1e-3, 1e-3)
    close(found.full, m(f), 1e-3, 1e-3)
    close(found.empty, m(f0), 1e-3, 1e-3)
    close(found.clean, metric(ends.clean_BTD), 1e-5, 1e-5)
    close(found.base, metric(ends.base_BTD), 1e-5, 1e-5)
    assert np.ptp(np.asarray(found.necessity), axis=1).max() > 0.05


def test_ranks_and_k_are_data_of_one_program_and_the_best_features_come_first():
    traces = []
    ends = free_ends()
    w_BTD = np.broadcast_to(np.random.default_rng(9).normal(size=D).astype(np.float32), (B, T, D))

    def metric(a_BTD):
        return (a_BTD * w_BTD).sum((1, 2))

    @jax.jit
    def run(rank_F, k_X):
        traces.append(1)
        return A.totals(A.curves(metric, ends, rank_F, k_X), jnp.ones(B, bool))

    mean, _ = A.means(A.totals(A.attribute(metric, ends), jnp.ones(B, bool)))
    chosen_F = A.top(mean.features, F)
    results = {}
    for order_F in (chosen_F, chosen_F[::-1]):
        for k in (2, 5):
            found, _ = A.means(run(A.ranks(order_F, F), np.array([k, F], np.int32)))
            # linear: removing features takes away exactly their attributions
            taken = mean.features[order_F[:k]].sum()
            close(found.clean - found.necessity[0], taken, 1e-4, 1e-3)
            close(found.sufficiency[0] - found.empty, taken, 1e-4, 1e-3)
            close(found.sufficiency[1], found.full, 1e-4, 1e-3)
            results[order_F[0], k] = taken
    assert len(traces) == 1
    assert results[chosen_F[0], 2] > results[chosen_F[-1], 2]


def test_faithfulness_and_specificity_by_hand():
    curves = A.Curves(
        necessity=np.array([[5.0, 3.0, 1.0], [2.0, 2.0, 2.0]]),
        sufficiency=np.array([[1.0, 4.0, 5.0], [2.0, 2.0, 2.0]]),
        full=np.array([5.0, 2.0]),
        empty=np.array([1.0, 2.0]),
        clean=np.zeros(2),
        base=np.zeros(2),
    )
    necessity, sufficiency = A.faithfulness(curves)
    close(necessity[0], [1.0, 0.5, 0.0])
    close(sufficiency[0], [0.0, 0.75, 1.0])
    assert np.isnan(necessity[1]).all() and np.isnan(sufficiency[1]).all()
    effect_XX = np.array([[0.8, 0.1, -0.3], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]])
    found = A.specificity(effect_XX)
    close(found[:2], [(0.8 - 0.2) / (0.8 + 0.2), 0.0])
    assert np.isnan(found[2])
    close(A.specificity(np.array([[0.0, 1.0], [-1.0, -1.0]])), [-1.0, -1.0])


# --- sums ------------------------------------------------------------------------------------------------------------


def test_batches_add_and_rows_that_do_not_count_do_not():
    rng = np.random.default_rng(0)
    values = A.Effects(*(rng.normal(size=s).astype(np.float32) for s in [(7, 3), (7,), (7,), (7,)]))

    def part(begin, end):
        pad = [(0, 5 - (end - begin))]
        rows = jax.tree.map(
            lambda x: jnp.asarray(
                np.pad(x[begin:end], pad + [(0, 0)] * (x.ndim - 1), constant_values=np.nan), jnp.float32
            ),
            values,
        )
        return A.totals(rows, jnp.arange(5) < end - begin)

    found = jax.tree.map(jnp.add, part(0, 5), part(5, 7))
    mean, error = A.means(found)
    for name in values._fields:
        x = getattr(values, name).astype(np.float64)
        close(getattr(mean, name), x.mean(0))
        close(getattr(error, name), x.std(0, ddof=1) / np.sqrt(7))
    stacked, _ = A.means(jax.tree.map(lambda *x: jnp.stack(x), part(0, 5), part(5, 7)))
    close(stacked.features, np.stack([values.features[:5].mean(0), values.features[5:].mean(0)]))
    assert np.isnan(A.means(part(6, 7))[1].clean)
    with pytest.raises(InputError, match="no valid row"):
        A.means(part(0, 0))
    with pytest.raises(InputError, match="NaN or infinite"):
        A.means(A.totals({"m": jnp.asarray([1.0, jnp.inf])}, jnp.ones(2, bool)))


# --- controls --------------------------------------------------------------------------------------------------------


def test_a_matched_control_takes_the_twin_and_never_a_chosen_or_silent_feature():
    #                    chosen: 0, 1, 2        twins: 3, 4, 5     far away    silent, though otherwise the best
    log_norm_F = np.array([0.0, 1.0, 2.0, 0.01, 1.01, 2.01, -5.0, 9.0, 0.0])
    log_rate_F = np.array([-3.0, -5.0, -7.0, -3.02, -5.02, -7.02, -1.0, -12.0, -np.inf])
    found = A.matched_random(0, [2, 0, 1], log_norm_F, log_rate_F, draws=4, nearest=1)
    np.testing.assert_array_equal(found.index_RK, [[5, 3, 4]] * 4)
    close(found.norm_RK, 0.01)
    close(found.rate_RK, -0.02)
    # both numbers decide: feature 1 has the norm of 0, feature 2 its rate, feature 3 is near in both
    both = A.matched_random(0, [0], [0.0, 0.0, 3.0, 0.5, 9.0], [0.0, 5.0, 0.0, 0.5, 9.0], nearest=1)
    assert both.index_RK.tolist() == [[3]]


def test_draws_of_a_control_differ_and_give_no_feature_twice():
    rng = np.random.default_rng(1)
    log_norm_F, log_rate_F = rng.normal(size=300), rng.normal(size=300) - 4
    chosen_K = rng.permutation(300)[:40]
    found = A.matched_random(7, chosen_K, log_norm_F, log_rate_F, draws=6)
    again = A.matched_random(7, chosen_K, log_norm_F, log_rate_F, draws=6)
    np.testing.assert_array_equal(found.index_RK, again.index_RK)
    assert all(len(set(row)) == 40 and not set(row) & set(chosen_K) for row in found.index_RK.tolist())
    assert len({tuple(row) for row in found.index_RK.tolist()}) == 6
    close(found.norm_RK, log_norm_F[found.index_RK] - log_norm_F[chosen_K])
    close(found.rate_RK, log_rate_F[found.index_RK] - log_rate_F[chosen_K])
    unmatched = np.abs(log_norm_F[:, None] - log_norm_F[chosen_K]).mean()
    assert np.abs(found.norm_RK).mean() < unmatched / 3
    ranks_RF = A.ranks(found.index_RK, 300)
    assert (ranks_RF < 300).sum(1).tolist() == [40] * 6 and ranks_RF[3, found.index_RK[3, 5]] == 5


def test_a_caliper_bounds_both_differences():
    log_norm_F, log_rate_F = np.array([0.0, 0.1, 0.3, 0.1]), np.array([0.0, 0.1, 0.1, 0.9])
    for seed in range(5):
        found = A.matched_random(seed, [0], log_norm_F, log_rate_F, caliper=0.2)
        assert found.index_RK.tolist() == [[1]]
    with pytest.raises(InputError, match="no features to match feature 0 within 0.05"):
        A.matched_random(0, [0], log_norm_F, log_rate_F, caliper=0.05)


def test_halves_keep_groups_together():
    group_N = np.repeat(np.arange(10), 3)
    first, second = A.halves(group_N, 0)
    assert sorted([*first, *second]) == list(range(30))
    assert not set(group_N[first]) & set(group_N[second]) and len(first) == len(second) == 15
    assert any(set(A.halves(group_N, seed)[0]) != set(first) for seed in range(1, 4))
    with pytest.raises(InputError, match="at least 2"):
        A.halves(np.zeros(4, int), 0)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_features_are_refused():
    ends = free_ends()
    with pytest.raises(InputError, match="k = 13 of 12 ranked features"):
        A.curves(lambda a: a.sum((1, 2)), ends, np.arange(F), [1, 13])
    with pytest.raises(InputError, match="k = 3 of 2 ranked features"):
        A.curves(lambda a: a.sum((1, 2)), ends, A.ranks([4, 7], F), [3])
    with pytest.raises(InputError, match="one rank a feature"):
        A.curves(lambda a: a.sum((1, 2)), ends, np.arange(F - 1), [1])
    with pytest.raises(InputError, match="whole number"):
        A.check_k([0.5], F)
    with pytest.raises(InputError, match="error is 'none'; choose one of kept"):
        A.curves(lambda a: a.sum((1, 2)), ends, np.arange(F), [1], "none")
    with pytest.raises(InputError, match="K = 13 of 12 features"):
        A.top(np.ones(F), 13)
    with pytest.raises(InputError, match="scores of features hold NaN"):
        A.top(np.array([1.0, np.nan]), 1)
    with pytest.raises(InputError, match="feature 12 of a dictionary of 12"):
        A.ranks([0, 12], F)
    with pytest.raises(InputError, match="feature 5 is chosen twice"):
        A.ranks([5, 1, 5], F)
    with pytest.raises(InputError, match="no features to match: 1 others fire, 2 are chosen"):
        A.matched_random(0, [0, 1], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1.0, -np.inf])
    with pytest.raises(InputError, match="chosen feature 1 has no finite log"):
        A.matched_random(0, [0, 1], np.zeros(5), [0.0, -np.inf, 0.0, 0.0, 0.0])
    with pytest.raises(InputError, match="caliper is -1"):
        A.matched_random(0, [0], np.zeros(5), np.zeros(5), caliper=-1)
    with pytest.raises(InputError, match="0 draws"):
        A.matched_random(0, [0], np.zeros(5), np.zeros(5), draws=0)
    with pytest.raises(InputError, match="at least 2 tasks"):
        A.specificity(np.ones((1, 1)))
    with pytest.raises(InputError, match="NaN or infinity"):
        A.specificity(np.full((2, 2), np.nan))


def test_bad_rules_pairs_and_dictionaries_are_refused():
    with pytest.raises(InputError, match="rule is 'simpson'; choose one of gauss"):
        A.nodes("simpson")
    with pytest.raises(InputError, match="at least 1"):
        A.nodes("gauss", 0)
    with pytest.raises(InputError, match="baseline is 'mean'"):
        free_ends(baseline="mean")
    with pytest.raises(InputError, match=r"decoder \[32, 12\]"):
        x, f = jnp.zeros((B, T, D)), jnp.zeros((B, T, F))
        A.make_ends(x, f, x, f, jnp.zeros((D, F)), jnp.zeros(D), jnp.ones((B, T), bool))
    pairs, params_H = task(), snapshots(MODEL)
    for changes, message in [
        ({"position_B": pairs.position_B.at[1].set(T)}, "pair 1: its position is not 0 to 5"),
        ({"position_B": pairs.position_B.at[1].set(4)}, "pair 1: its position is padding"),
        ({"wrong_B": pairs.right_B}, "pair 0: its right and wrong answers are the same"),
        ({"patch_BT": pairs.patch_BT.at[2, 3].set(11)}, "pair 2: patch_BT is not within 0 to 10"),
        ({"right_B": pairs.right_B.at[0].set(-1)}, "pair 0: right_B is not within"),
        ({"patch_BT": pairs.patch_BT[:, 1:]}, r"patch_BT has shape \[4, 5\], not \[4, 6\]"),
        ({"right_B": jnp.ones(B)}, "right_B is of dtype float32"),
        ({"clean_BT": pairs.right_B}, r"clean rows of shape \[4\]"),
    ]:
        with pytest.raises(InputError, match=message):
            A.check_pairs(pairs._replace(**changes), MODEL)
    A.check_pairs(pairs._replace(position_B=pairs.position_B.at[3].set(99)), MODEL)  # row 3 counts nowhere
    with pytest.raises(InputError, match="1 snapshots for a dictionary of 2 heads"):
        A.read(tree(), PER_HEAD, jax.tree.map(lambda x: x[:1], params_H), MODEL, pairs, 1)
    with pytest.raises(InputError, match="scale='token'"):
        A.read(tree(), dataclasses.replace(PER_HEAD, scale="token"), params_H, MODEL, pairs, 1)
    one = jax.tree.map(lambda x: x[0], params_H)
    with pytest.raises(InputError, match="depth 4 of a model with 2 blocks"):
        A.logit_difference(one, MODEL, pairs, 4)
    with pytest.raises(InputError, match="without a head"):
        A.logit_difference(one, dataclasses.replace(MODEL, head="none"), pairs, 1)
