"""Classification heads, the three ways of fine-tuning, banks, adapters on disk, probes of every depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax import checkpoint, classifier, hf, lora, train, transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.data.tokenizer import wordpiece
from bert6_jax.errors import InputError
from bert6_jax.lora import LoraConfig

CFG = TransformerConfig(40, 16, 2, 2, 8, 32, 8)
FULL_RANK = LoraConfig(rank=16, targets=lora.TARGETS)
CLASSES = 3


@pytest.fixture(scope="module")
def trunk():
    return jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), CFG)


def examples(count: int, seed: int = 0) -> classifier.Examples:
    rng = np.random.default_rng(seed)
    ids_NT = rng.integers(5, CFG.vocab_size, (count, CFG.max_len)).astype(np.int32)
    ids_NT[:, 0] = 2
    segment_NT = np.ones_like(ids_NT)
    segment_NT[::3, 6:] = 0
    return classifier.Examples(
        ids_NT, segment_NT, rng.integers(0, CLASSES, count).astype(np.int32), np.zeros(count, bool)
    )


def head(pooling="cls", seed=1):
    return classifier.init_head(jax.random.key(seed), CFG, CLASSES, pooling)


def fit(trained, frozen, adapters, data, rows_G, steps, lr=3e-3, batch=16, cfg=CFG, bank=True):
    tx_config = train.OptimizerConfig(lr, weight_decay=0.0, schedule="constant")
    tx = train.make_optimizer(tx_config, steps, 1)
    grad_fn = classifier.grad_fn(cfg, "cls", adapters)
    if not bank:  # the member's key is the step's, folded with its number
        alone = grad_fn
        grad_fn = lambda p, b, key, f: alone(p, b, jax.random.fold_in(key, 0), f)  # noqa: E731
        batches = classifier.bank_batches(data, rows_G, [0], batch)
        batch_at = lambda step: {name: leaf[:, 0] for name, leaf in batches(step).items()}  # noqa: E731
    else:
        grad_fn, batch_at = train.bank(grad_fn), classifier.bank_batches(data, rows_G, range(len(rows_G)), batch)
    losses = []
    state = train.fit(
        train.make_step(grad_fn, tx), train.init_state(trained, tx, jax.random.key(7)), batch_at,
        train.FitConfig(steps, min(20, steps)), frozen=frozen, quiet=True,
        on_metrics=lambda step, values: losses.append(values["loss"]),
    )  # fmt: skip
    return state.params, losses


def stack(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def test_fresh_adapters_leave_the_model_as_it_is_to_the_bit(trunk):
    adapters = lora.init(jax.random.key(3), trunk, FULL_RANK)
    data = examples(4)
    params = trunk | head()
    adapted = lora.apply(params, adapters, FULL_RANK)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(adapted), strict=True):
        np.testing.assert_array_equal(before, after)
    batch = data.batch(np.arange(4))
    run = jax.jit(lambda p: classifier.logits(p, batch, CFG, "cls"))
    np.testing.assert_array_equal(run(params), run(adapted))


def test_apply_adds_the_scaled_product_and_touches_nothing_else(trunk):
    cfg = LoraConfig(rank=2, targets=("attn/v",), alpha=6.0)
    adapters = jax.tree.map(lambda x: x + 0.5, lora.init(jax.random.key(3), trunk, cfg))
    adapted = lora.apply(trunk, adapters, cfg)
    factors = adapters["blocks"]["attn"]["v"]
    expected = trunk["blocks"]["attn"]["v"]["kernel"] + 3.0 * np.einsum("lir,lro->lio", factors["a"], factors["b"])
    np.testing.assert_allclose(adapted["blocks"]["attn"]["v"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    changed = jax.tree_util.tree_map_with_path(
        lambda path, a, b: jax.tree_util.keystr(path) if not np.array_equal(a, b) else None, trunk, adapted
    )
    assert jax.tree.leaves(changed) == ["['blocks']['attn']['v']['kernel']"]


def test_full_rank_adapters_reach_the_loss_of_full_fine_tuning(trunk):
    """Every text stands there under three labels in unequal numbers: the least loss is their entropy and not zero."""
    base = examples(6)
    share = np.array([0, 0, 0, 1, 1, 2])
    rows = np.repeat(np.arange(6), len(share))
    label = (np.tile(share, 6) + rows) % CLASSES
    data = classifier.Examples(base.ids_NT[rows], base.segment_NT[rows], label.astype(np.int32), base.cut_N[rows])
    p = np.array([3, 2, 1]) / 6
    floor = -(p * np.log(p)).sum()
    reached = {}
    for method in ("full", "lora"):
        trained, frozen = classifier.split(jax.random.key(5), trunk, head(), method, FULL_RANK)
        _, losses = fit(stack(trained), frozen, FULL_RANK, data, [np.arange(36)], 400, batch=36)
        reached[method] = np.mean(losses[-5:])
    assert floor - 1e-4 < reached["full"] < floor + 2e-3
    assert abs(reached["lora"] - reached["full"]) < 2e-3


@pytest.mark.parametrize("method", ["lora", "frozen"])
def test_adapter_on_its_base_gives_the_fine_tuned_outputs(tmp_path, trunk, method):
    data, adapters = examples(32), LoraConfig(rank=3)
    trained, frozen = classifier.split(jax.random.key(5), trunk, head(), method, adapters)
    trained_G, _ = fit(stack(trained), frozen, adapters, data, [np.arange(32)], 20)
    trained = jax.tree.map(lambda x: x[0], trained_G)
    batch = data.batch(np.arange(8))
    before = classifier.logits(classifier.assemble(trained, frozen, adapters), batch, CFG, "cls")
    assert np.abs(before - classifier.logits(trunk | head(), batch, CFG, "cls")).max() > 1e-2
    path = tmp_path / "adapter"
    classifier.save_adapter(path, trained, trunk, CFG, adapters, "cls", step=20, extra={"classes": ["a", "b", "c"]})
    assert checkpoint.describe(path)["kind"] == "adapter"
    params, cfg, saved = classifier.load_adapter(path, trunk)
    assert cfg == dataclasses.replace(CFG, head="none") and saved.config["pooling"] == "cls"
    np.testing.assert_allclose(classifier.logits(params, batch, CFG, "cls"), before, rtol=0, atol=1e-6)
    assert saved.extra["classes"] == ["a", "b", "c"] and saved.step == 20
    assert ("lora" in saved.tree) == (method == "lora")
    other = jax.tree.map(lambda x: x, trunk) | {"embed": jax.tree.map(lambda x: x + 1.0, trunk["embed"])}
    with pytest.raises(InputError, match="another base model"):
        classifier.load_adapter(path, other)


def test_a_transformer_is_no_adapter(tmp_path, trunk):
    checkpoint.save(tmp_path / "t", trunk, kind="transformer", config=dataclasses.asdict(CFG))
    with pytest.raises(InputError, match="'transformer', 'adapter' was asked for"):
        classifier.load_adapter(tmp_path / "t", trunk)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_member_of_a_bank_equals_the_same_fine_tuning_alone(trunk, dropout):
    cfg = dataclasses.replace(CFG, dropout=dropout, attention_dropout=dropout)
    data, adapters = examples(40), LoraConfig()
    rows_G = [np.arange(0, 37), np.arange(3, 40)]  # 37 rows: a partial batch in every epoch
    members = [classifier.split(jax.random.key(9), trunk, head(seed=s), "full", adapters)[0] for s in (1, 2)]
    bank, _ = fit(stack(*members), {}, adapters, data, rows_G, 9, cfg=cfg)
    alone, _ = fit(members[0], {}, adapters, data, rows_G[:1], 9, cfg=cfg, bank=False)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(bank), strict=True):
        np.testing.assert_allclose(a, b[0], rtol=0, atol=1e-5)
    moved = [np.abs(a - b[1]).max() for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(bank), strict=True)]
    assert max(moved) > 1e-2  # the second member is another one


def test_a_bank_on_two_devices_is_the_same_bank():
    """Members may count differently on each device: the gradient is divided after the sum over devices."""

    def grad(params, batch, key, frozen):
        weight = batch["valid"].astype(jnp.float32)
        return (weight * batch["x"]).sum() * params, {"loss": (weight * batch["x"]).sum(), "count": weight.sum()}

    tx = train.make_optimizer(train.OptimizerConfig(1.0, weight_decay=0.0, schedule="constant"), 1, 1)
    state = train.init_state(jnp.array([1.0, 2.0]), tx, jax.random.key(0))
    batch = {"x": jnp.arange(8.0).reshape(4, 2), "valid": jnp.array([[1, 0], [1, 0], [1, 1], [0, 1]], bool)}
    whole, metrics = train.make_step(train.bank(grad), tx)(state, batch)
    assert float(metrics["loss_0"]) == pytest.approx((0 + 2 + 4) / 3 * 2.5)  # `fit` divides by the mean count, 2.5
    step = train.make_step(train.bank(grad), tx, axis_name="data")
    shards = jax.tree.map(lambda x: x.reshape(2, 2, 2), batch)
    parts, _ = jax.vmap(step, in_axes=(None, 0), axis_name="data")(state, shards)
    np.testing.assert_allclose(parts.opt_state[0].mu[0], whole.opt_state[0].mu, rtol=1e-6)


def test_a_frozen_trunk_stays(trunk):
    data = examples(16)
    trained, frozen = classifier.split(jax.random.key(5), trunk, head("mean"), "frozen", LoraConfig())
    assert set(trained) == {"classifier"} and set(frozen) == {"embed", "blocks"}
    params = classifier.assemble(trained, frozen, LoraConfig())
    batch = data.batch(np.arange(4))
    assert classifier.logits(params, batch, CFG, "mean").shape == (4, CLASSES)


def test_pooling_ignores_padding(trunk):
    data = examples(6)
    params = trunk | head("mean")
    other = data.ids_NT.copy()
    other[data.segment_NT == 0] = 17
    for pooling in classifier.POOLINGS:
        tree = trunk | head(pooling)
        a, b = (
            classifier.logits(tree, classifier.Examples(ids, *data[1:]).batch(np.arange(6)), CFG, pooling)
            for ids in (data.ids_NT, other)
        )
        np.testing.assert_allclose(a, b, atol=1e-6)
    out, _ = transformer.forward(trunk, data.ids_NT, CFG, segment_BT=jnp.asarray(data.segment_NT))
    mean = np.stack([np.asarray(out)[n][data.segment_NT[n] > 0].mean(0) for n in range(6)])
    expected = mean @ np.asarray(params["classifier"]["kernel"])
    np.testing.assert_allclose(
        classifier.logits(params, data.batch(np.arange(6)), CFG, "mean"), expected, rtol=1e-4, atol=1e-6
    )


def test_features_are_the_pooled_residual_stream_and_block_0_cls_is_constant(trunk):
    data = examples(5)
    x_BPMD = np.asarray(classifier.features(trunk, data.batch(np.arange(5)), CFG))
    assert x_BPMD.shape == (5, 2, CFG.depths, CFG.width)
    x_PMBD = np.moveaxis(x_BPMD, 0, 2)
    _, acts = transformer.forward(trunk, data.ids_NT, CFG, segment_BT=jnp.asarray(data.segment_NT))
    np.testing.assert_allclose(x_PMBD[0], acts["resid"][:, :, 0], atol=1e-6)
    np.testing.assert_allclose(x_PMBD[0, 0], np.broadcast_to(x_PMBD[0, 0, :1], (5, CFG.width)), atol=0)
    in_parts = classifier.in_batches(data, np.array([4, 1, 2]), 2, lambda b: classifier.features(trunk, b, CFG))
    np.testing.assert_allclose(in_parts, x_BPMD[[4, 1, 2]], atol=1e-6)


def test_probes_train_side_by_side_as_alone_and_find_the_optimum():
    """One probe of two is told the label, the other sees noise; the first reaches the optimum of its convex loss."""
    rng = np.random.default_rng(0)
    label_N = rng.integers(0, CLASSES, 60)
    x_NXD = rng.normal(size=(60, 2, 4)).astype(np.float32)
    x_NXD[:, 0, :CLASSES] += 2.0 * np.eye(CLASSES)[label_N]
    config = train.OptimizerConfig(0.05, weight_decay=0.0, schedule="constant")
    tx = train.make_optimizer(config, 400, 1)
    step = jax.jit(train.make_step(classifier.probe_grad_fn, tx))

    def trained(which):
        X = len(which)
        batch = {
            "x": x_NXD[:, which],
            "label": np.repeat(label_N[:, None], X, 1).astype(np.int32),
            "valid": np.ones((60, X), bool),
        }
        state = train.init_state(classifier.init_probes(X, 4, CLASSES), tx, jax.random.key(0))
        for _ in range(400):
            state, metrics = step(state, batch)
        return state.params, float(metrics["loss"] / metrics["count"])

    both, _ = trained([0, 1])
    alone, loss = trained([0])
    np.testing.assert_allclose(both["kernel"][0], alone["kernel"][0], atol=1e-5)
    logits = classifier.probe_logits(both, jnp.asarray(x_NXD))
    assert (np.argmax(logits[:, 0], -1) == label_N).mean() > 0.85
    from scipy.optimize import minimize

    def objective(flat):
        z = x_NXD[:, 0].astype(float) @ flat[:12].reshape(4, 3) + flat[12:]
        return (np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1) - z[np.arange(60), label_N]).mean()

    best = minimize(objective, np.zeros(15), method="BFGS").fun
    assert loss < best + 5e-3


def test_encode_and_batches():
    tokenizer = wordpiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "##c"])
    made = classifier.encode(tokenizer, ["a b c", "a" + " b" * 20, "bc"], np.array([0, 1, 2]), 3, 6)
    assert made.cut_N.tolist() == [False, True, False]
    assert classifier.encode(tokenizer, ["a b c"], np.array([0]), 3, 100).ids_NT.shape == (1, 8)
    np.testing.assert_array_equal(made.ids_NT, [[2, 5, 6, 7, 3, 0], [2, 5, 6, 6, 6, 3], [2, 6, 8, 3, 0, 0]])
    np.testing.assert_array_equal(made.segment_NT.sum(1), [5, 6, 4])
    batch_at = classifier.bank_batches(made, [np.array([0, 1]), np.array([1, 2])], [3, 4], 2)
    batch = batch_at(5)
    assert batch["ids"].shape == (2, 2, 6) and batch["label"].shape == (2, 2)
    assert set(batch["label"][:, 0]) == {0, 1} and set(batch["label"][:, 1]) == {1, 2}
    with pytest.raises(ValueError, match="same number of rows"):
        classifier.bank_batches(made, [np.array([0]), np.array([1, 2])], [3, 4], 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LoraConfig(rank=0), "rank is 0"),
        (lambda: LoraConfig(alpha=0.0), "alpha is 0.0"),
        (lambda: classifier.encode(None, ["a"], np.array([3]), 3, 8), "row 0: label 3 is not 0 to 2"),
        (lambda: classifier.encode(None, ["a"], np.array([0]), 3, 2), "no room for a token"),
        (lambda: LoraConfig(targets=("attn/x",)), "name 'attn/x'; choose among attn/q"),
        (lambda: LoraConfig(targets=()), "name nothing"),
        (lambda: classifier.init_head(jax.random.key(0), CFG, 2, "max"), "pooling is 'max'; choose one of cls, mean"),
        (lambda: classifier.split(jax.random.key(0), {}, {}, "half", LoraConfig()), "method is 'half'"),
    ],
)
def test_wrong_settings_are_told_in_one_line(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parity
def test_logits_equal_hugging_face_sequence_classification_both_ways(tmp_path, trunk):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    data = examples(6)

    def theirs(model):
        ids, mask = torch.tensor(data.ids_NT).long(), torch.tensor((data.segment_NT > 0).astype(np.int64))
        with torch.no_grad():
            return model.eval()(ids, attention_mask=mask).logits.numpy()

    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "theirs")
    params, cfg = hf.load(tmp_path / "theirs")
    found = classifier.logits(params, data.batch(np.arange(6)), cfg, "cls")
    np.testing.assert_allclose(found, theirs(model), rtol=0, atol=1e-4)

    ours = {name: leaf for name, leaf in trunk.items() if name != "head"} | head()
    cfg = dataclasses.replace(CFG, head="none")
    hf.save(tmp_path / "ours", jax.device_get(ours), cfg, id2label={"0": "a", "1": "b", "2": "c"})
    opened = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert opened.config.id2label == {0: "a", 1: "b", 2: "c"}
    expected = classifier.logits(ours, data.batch(np.arange(6)), cfg, "cls")
    np.testing.assert_allclose(theirs(opened), expected, rtol=0, atol=1e-4)


def test_a_classifier_goes_to_hugging_face_and_back(tmp_path, trunk):
    ours = jax.device_get({name: leaf for name, leaf in trunk.items() if name != "head"} | head())
    cfg = dataclasses.replace(CFG, head="none")
    hf.save(tmp_path / "folder", ours, cfg)
    back, cfg_back = hf.load(tmp_path / "folder")
    assert cfg_back == cfg
    jax.tree.map(np.testing.assert_array_equal, ours, back)
    mean = {name: leaf for name, leaf in ours.items() if name != "pooler"}
    with pytest.raises(InputError, match="read a pooled"):
        hf.save(tmp_path / "mean", mean, cfg)
    with pytest.raises(InputError, match="head='none'"):
        hf.save(tmp_path / "mean", ours, CFG)
    assert not (tmp_path / "mean").exists()
