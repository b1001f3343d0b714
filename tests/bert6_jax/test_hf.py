"""Equality with Hugging Face's BertForMaskedLM: golden values always, the live library where it is installed."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bert6_jax import config, hf, objectives, transformer
from bert6_jax.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
HF_CONFIG = dict(
    vocab_size=101, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=48,
    max_position_embeddings=20, type_vocab_size=2, hidden_act="gelu", hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)  # fmt: skip
needs_parity = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="extra `parity` is not installed"),
    pytest.mark.filterwarnings("default"),  # torch and transformers warn about their own deprecations
]


def split(golden, prefix):
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


def assert_equal_to(golden, hf_config):
    """Logits to 1e-4 absolute, loss to 1e-5 relative, gradients to 1e-3 relative (of each tensor's largest entry)."""
    params, cfg = hf.from_state_dict(split(golden, "weight/"), hf_config)
    params = jax.tree.map(jnp.asarray, params)
    ids_BT, types_BT, segment_BT, labels_BT = (
        jnp.asarray(golden[name], jnp.int32) for name in ("ids", "types", "attention", "labels")
    )

    @jax.jit
    def loss(params):
        out_BTD, _ = transformer.forward(params, ids_BT, cfg, segment_BT=segment_BT, type_BT=types_BT)
        logits_BTV = transformer.head(params, out_BTD, cfg)
        sums = objectives.token_sums(logits_BTV, jnp.maximum(labels_BT, 0), labels_BT >= 0)
        return sums["loss"] / sums["count"], logits_BTV

    (value, logits_BTV), grads = jax.value_and_grad(loss, has_aux=True)(params)
    np.testing.assert_allclose(logits_BTV, golden["logits"], rtol=0, atol=1e-4)  # padded positions included
    np.testing.assert_allclose(value, golden["loss"], rtol=1e-5)
    grad_tensors = split(golden, "grad/")
    expected, _ = hf.from_state_dict(grad_tensors, hf_config)
    for (path, found), want in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        if path[-2:] == (jax.tree_util.DictKey("k"), jax.tree_util.DictKey("bias")):
            # a shift of all keys cancels in the softmax: the true gradient is zero, both sides are rounding
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)
            continue
        scale = np.abs(want).max()
        assert scale > 0, path
        np.testing.assert_allclose(found / scale, want / scale, rtol=0, atol=1e-3, err_msg=str(path))


def test_golden_logits_and_gradients():
    assert_equal_to(dict(np.load(GOLDEN / "bert.npz")), HF_CONFIG)


class TestLive:
    pytestmark = needs_parity

    def test_logits_and_gradients_of_bert6(self):
        import make_bert

        hf_config = HF_CONFIG | dict(vocab_size=1_000, hidden_size=96, num_hidden_layers=6, num_attention_heads=4)
        hf_config |= dict(intermediate_size=384, max_position_embeddings=64)
        assert_equal_to(make_bert.make(hf_config, seed=1, rows=3, length=50), hf_config)

    @pytest.mark.parametrize("tied", [True, False])
    def test_what_we_write_opens_with_from_pretrained(self, tmp_path, tied):
        import torch
        from transformers import BertForMaskedLM

        cfg = config.bert6_demo(90, width=32, heads=4, head_width=8, mlp_width=48, max_len=24, tied=tied)
        params = transformer.init(jax.random.key(3), cfg)
        hf.save(tmp_path, params, cfg, pad_token_id=0)
        model, report = BertForMaskedLM.from_pretrained(
            tmp_path, output_loading_info=True, attn_implementation="eager", local_files_only=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        ids = np.random.default_rng(0).integers(0, 90, (2, 20))
        out_BTD, _ = transformer.forward(params, jnp.asarray(ids, jnp.int32), cfg)
        with torch.no_grad():
            logits = model.eval()(torch.tensor(ids)).logits.numpy()
        np.testing.assert_allclose(transformer.head(params, out_BTD, cfg), logits, rtol=0, atol=1e-4)

    def test_reads_what_transformers_writes(self, tmp_path):
        from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

        for number, (kind, has_head, has_pooler) in enumerate(
            [(BertForMaskedLM, True, False), (BertModel, False, True), (BertForPreTraining, True, True)]
        ):
            folder = tmp_path / str(number)
            kind(BertConfig(**HF_CONFIG)).save_pretrained(folder)
            params, cfg = hf.load(folder)
            assert ("head" in params, "pooler" in params) == (has_head, has_pooler)
            assert cfg.head == ("mlm" if has_head else "none")


def bert_folder(tmp_path, **changes):
    golden = np.load(GOLDEN / "bert.npz")
    tensors = {n.removeprefix("weight/"): golden[n] for n in golden.files if n.startswith("weight/")}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG | changes), encoding="utf-8")
    return tensors


def test_round_trip_is_exact(tmp_path):
    tensors = bert_folder(tmp_path)
    params, cfg = hf.load(tmp_path)
    hf.save(tmp_path / "again", params, cfg)
    again = load_file(tmp_path / "again" / "model.safetensors")
    for name, value in again.items():
        np.testing.assert_array_equal(value, tensors[name])
    assert {n for n in tensors if "decoder" not in n and "position_ids" not in n} <= set(again)


def test_prefix_and_old_norm_names_do_not_matter(tmp_path):
    tensors = bert_folder(tmp_path)
    params, _ = hf.load(tmp_path)
    renamed = {
        name.removeprefix("bert.").replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): value
        for name, value in tensors.items()
    }
    save_file(renamed, tmp_path / "model.safetensors")
    again, _ = hf.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_act": "silu"}, "hidden_act"),
        ({"model_type": "gpt2"}, "model_type"),
        ({"intermediate_size": 50}, "mlp/in"),
        ({"num_hidden_layers": 4}, "layer.3"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(tmp_path, changes, words):
    bert_folder(tmp_path, **changes)
    with pytest.raises(InputError, match=words) as caught:
        hf.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(InputError, match="config.json"):
        hf.load(tmp_path)
    bert_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(InputError, match="model.safetensors"):
        hf.load(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="config.json"):
        hf.load(tmp_path)
