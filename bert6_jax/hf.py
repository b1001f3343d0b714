"""Hugging Face BERT folders (`config.json` + `model.safetensors`) in and out, without torch.

Reads models with or without masked-LM head, pooler and classifier, with or without the `bert.` prefix, gamma/beta or
weight/bias norms; writes folders that `from_pretrained` of `BertForMaskedLM`, or of `BertForSequenceClassification`
where the parameters hold a classifier, opens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError

# our path -> Hugging Face name (`{}`: block number) and whether the matrix is stored transposed ([out, in])
_EMBED = {
    ("embed", "token"): ("embeddings.word_embeddings.weight", False),
    ("embed", "position"): ("embeddings.position_embeddings.weight", False),
    ("embed", "type"): ("embeddings.token_type_embeddings.weight", False),
    ("embed", "norm", "scale"): ("embeddings.LayerNorm.weight", False),
    ("embed", "norm", "bias"): ("embeddings.LayerNorm.bias", False),
}
_DENSE = {
    ("attn", "q"): "encoder.layer.{}.attention.self.query",
    ("attn", "k"): "encoder.layer.{}.attention.self.key",
    ("attn", "v"): "encoder.layer.{}.attention.self.value",
    ("attn", "out"): "encoder.layer.{}.attention.output.dense",
    ("mlp", "in"): "encoder.layer.{}.intermediate.dense",
    ("mlp", "out"): "encoder.layer.{}.output.dense",
}
_NORM = {
    "norm_attn": "encoder.layer.{}.attention.output.LayerNorm",
    "norm_mlp": "encoder.layer.{}.output.LayerNorm",
}
_BLOCK = (
    {(*ours, "kernel"): (f"{theirs}.weight", True) for ours, theirs in _DENSE.items()}
    | {(*ours, "bias"): (f"{theirs}.bias", False) for ours, theirs in _DENSE.items()}
    | {(ours, "scale"): (f"{theirs}.weight", False) for ours, theirs in _NORM.items()}
    | {(ours, "bias"): (f"{theirs}.bias", False) for ours, theirs in _NORM.items()}
)
_HEAD = {
    ("head", "dense", "kernel"): ("cls.predictions.transform.dense.weight", True),
    ("head", "dense", "bias"): ("cls.predictions.transform.dense.bias", False),
    ("head", "norm", "scale"): ("cls.predictions.transform.LayerNorm.weight", False),
    ("head", "norm", "bias"): ("cls.predictions.transform.LayerNorm.bias", False),
    ("head", "bias"): ("cls.predictions.bias", False),
}
_POOLER = {
    ("pooler", "kernel"): ("pooler.dense.weight", True),
    ("pooler", "bias"): ("pooler.dense.bias", False),
}
_CLASSIFIER = {
    ("classifier", "kernel"): ("classifier.weight", True),
    ("classifier", "bias"): ("classifier.bias", False),
}
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def _set(tree: dict, path: tuple[str, ...], value) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _get(tree: dict, path: tuple[str, ...]):
    for name in path:
        tree = tree[name]
    return np.asarray(tree, np.float32)


def config_from_hf(config: dict[str, Any], head: str, where: str = "config.json") -> TransformerConfig:
    """Our configuration of a Hugging Face BERT `config.json`; dropout rates are kept."""
    try:
        width, heads, activation = config["hidden_size"], config["num_attention_heads"], config["hidden_act"]
        if activation not in _ACTIVATIONS:
            raise InputError(f"{where}: hidden_act {activation!r} is not known; {', '.join(_ACTIVATIONS)} are")
        if config.get("model_type", "bert") != "bert":
            raise InputError(f"{where}: model_type is {config['model_type']!r}; only BERT folders can be read")
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise InputError(f"{where}: position_embedding_type {config['position_embedding_type']!r} is not supported")
        return TransformerConfig(
            vocab_size=config["vocab_size"],
            width=width,
            blocks=config["num_hidden_layers"],
            heads=heads,
            head_width=width // heads,
            mlp_width=config["intermediate_size"],
            max_len=config["max_position_embeddings"],
            types=config.get("type_vocab_size", 2),
            norm_eps=config.get("layer_norm_eps", 1e-12),
            activation=_ACTIVATIONS[activation],
            causal=bool(config.get("is_decoder", False)),
            head=head,
            tied=bool(config.get("tie_word_embeddings", True)),
            dropout=float(config.get("hidden_dropout_prob", 0.0)),
            attention_dropout=float(config.get("attention_probs_dropout_prob", 0.0)),
            init_std=config.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise InputError(f"{where}: field {error.args[0]!r} is missing; is it a BERT configuration?") from error


def config_to_hf(cfg: TransformerConfig) -> dict[str, Any]:
    """The `config.json` of a post-LN model; `InputError` for what Hugging Face's BERT cannot be."""
    if cfg.norm != "post" or cfg.causal or not cfg.types or cfg.heads * cfg.head_width != cfg.width:
        raise InputError("only post-LN, bidirectional models with token types and heads * head_width = width are BERTs")
    return {
        "architectures": ["BertForMaskedLM" if cfg.head == "mlm" else "BertModel"],
        "model_type": "bert",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.blocks,
        "num_attention_heads": cfg.heads,
        "intermediate_size": cfg.mlp_width,
        "max_position_embeddings": cfg.max_len,
        "type_vocab_size": cfg.types,
        "layer_norm_eps": cfg.norm_eps,
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}[cfg.activation],
        "hidden_dropout_prob": cfg.dropout,
        "attention_probs_dropout_prob": cfg.attention_dropout,
        "initializer_range": cfg.init_std,
        "tie_word_embeddings": cfg.tied,
    }


def from_state_dict(tensors: dict[str, np.ndarray], config: dict[str, Any], where: str = "state dict"):
    """Parameters and configuration of a BERT state dict of numpy arrays (`[out, in]` matrices).

    The tree has a `head` when the masked-LM head is there, and `pooler` and `classifier` when those are.
    """
    tensors = {
        name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias"): value
        for name, value in tensors.items()
    }
    has_head = "cls.predictions.transform.dense.weight" in tensors
    cfg = config_from_hf(config, "mlm" if has_head else "none", f"{where}/config.json")
    # the bias is tied to `cls.predictions.decoder.bias`; writers keep either or both
    if "cls.predictions.decoder.bias" in tensors:
        tensors.setdefault("cls.predictions.bias", tensors["cls.predictions.decoder.bias"])

    def take(name, transposed):
        if name not in tensors:
            raise InputError(f"{where}: tensor {name} is missing; is it a BERT of the shape that config.json says?")
        value = np.asarray(tensors[name], np.float32)
        return value.T if transposed else value

    params: dict[str, Any] = {}
    for path, (name, transposed) in _EMBED.items():
        _set(params, path, take(name, transposed))
    for path, (name, transposed) in _BLOCK.items():
        stack = [take(name.format(m), transposed) for m in range(cfg.blocks)]
        _set(params, ("blocks", *path), np.stack(stack))
    if has_head:
        for path, (name, transposed) in _HEAD.items():
            _set(params, path, take(name, transposed))
        if not cfg.tied:
            _set(params, ("head", "kernel"), take("cls.predictions.decoder.weight", True))
    for names, there in ((_POOLER, "pooler.dense.weight"), (_CLASSIFIER, "classifier.weight")):
        for path, (name, transposed) in names.items() if there in tensors else ():
            _set(params, path, take(name, transposed))
    _check_shapes(params, cfg, where)
    return params, cfg


def _check_shapes(params, cfg, where):
    import jax

    from bert6_jax import transformer

    expected = jax.eval_shape(lambda key: transformer.init(key, cfg), jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        names = tuple(entry.key for entry in path)
        found = _get(params, names).shape
        if found != leaf.shape:
            raise InputError(f"{where}: {'/'.join(names)} has shape {found}, config.json asks for {leaf.shape}")


def to_state_dict(params, cfg: TransformerConfig) -> dict[str, np.ndarray]:
    """The state dict of `BertForMaskedLM`, float32 numpy; for `head="none"` that of `BertForSequenceClassification`
    where there is a classifier, else of `BertModel`, without prefix."""
    prefix = "bert." if cfg.head == "mlm" or "classifier" in params else ""
    tensors = {}

    def put(name, value, transposed):
        tensors[name] = np.ascontiguousarray(value.T if transposed else value)

    for path, (name, transposed) in _EMBED.items():
        put(prefix + name, _get(params, path), transposed)
    for path, (name, transposed) in _BLOCK.items():
        for m, value in enumerate(_get(params, ("blocks", *path))):
            put(prefix + name.format(m), value, transposed)
    if "pooler" in params:
        for path, (name, transposed) in _POOLER.items():
            put(prefix + name, _get(params, path), transposed)
    if "classifier" in params:
        if "pooler" not in params:
            raise InputError("Hugging Face's classifiers read a pooled [CLS]; fine-tune with pooling='cls' to save one")
        if cfg.head != "none":
            raise InputError("a classifier has no language-model head; give dataclasses.replace(cfg, head='none')")
        for path, (name, transposed) in _CLASSIFIER.items():
            put(name, _get(params, path), transposed)
    if cfg.head == "mlm":
        for path, (name, transposed) in _HEAD.items():
            put(name, _get(params, path), transposed)
        if not cfg.tied:
            put("cls.predictions.decoder.weight", _get(params, ("head", "kernel")), True)
            put("cls.predictions.decoder.bias", _get(params, ("head", "bias")), False)
    return tensors


def load(folder: str | Path):
    """Parameters (numpy float32) and configuration of a BERT folder."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    for file in (config_file, weights_file):
        if not file.is_file():
            remedy = "; convert pytorch_model.bin with safe_serialization" if file == weights_file else ""
            raise InputError(f"{file} does not exist; a BERT folder holds config.json and model.safetensors{remedy}")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{config_file} is not JSON ({error}); fetch it again") from error
    try:
        tensors = load_file(weights_file)
    except SafetensorError as error:
        raise InputError(f"{weights_file} cannot be read ({error}); fetch it again") from error
    return from_state_dict(tensors, config, str(folder))


def save(folder: str | Path, params, cfg: TransformerConfig, **extra) -> None:
    """Write a folder that `from_pretrained` opens; `extra` joins config.json (pad_token_id, id2label, ...)."""
    from safetensors.numpy import save_file

    if "classifier" in params:
        labels = {str(i): f"LABEL_{i}" for i in range(params["classifier"]["kernel"].shape[-1])}
        labels = extra.pop("id2label", labels)
        extra = {"architectures": ["BertForSequenceClassification"], "id2label": labels,
                 "label2id": {name: int(i) for i, name in labels.items()}} | extra  # fmt: skip
    config, tensors = config_to_hf(cfg) | extra, to_state_dict(params, cfg)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
