"""Dictionaries of SAELens, sparsify and dictionary_learning in and out, and Neuronpedia uploads; no torch, no network.

`load(folder)` recognises a folder by its file names:

    cfg.json + sae_weights.safetensors    SAELens, version 6 and later    (checked against 6.54.12)
    cfg.json + sae.safetensors            EleutherAI sparsify, top-k      (against its sources at 001d98e)
    config.json + ae.safetensors          dictionary_learning             (against 0.1.0)

What they load is `(dictionary, cfg, metadata)`: an autoencoder (H = 1) on raw activations, float32, with mean 0 and
scale 1 (SAELens' layer_norm: `scale="token"`), whose `encode` gives the codes that the peer's own `encode` gives.
Everything that cannot be opened exactly raises `InputError` with one line: file, field, what is wrong, remedy.

Writing to SAELens folds the normalisation, y = s (x - m), into the weights. With W_enc, W_dec as rows of latents,

    pre  = (y - b_dec) W_enc^T + b_enc         = (x - b_dec') (s W_enc)^T + b_enc
    xhat = (z W_dec + b_dec) / s + m           =  z (W_dec / s) + b_dec'          with b_dec' = m + b_dec / s

so the codes z, and with them thresholds and the ranks of top-k, stay as they are: the encoder takes s, the decoder
1 / s, and `apply_b_dec_to_input` takes m. A dictionary with `subtract_bias=False` reads y itself, which is
(y - b_dec) W_enc^T + (b_enc + b_dec W_enc^T). Where m is 0 its weights are written as they are, with
`apply_b_dec_to_input` false. Otherwise it is written in that second form, `apply_b_dec_to_input` true: the form
x (s W_enc)^T + (b_enc - s m W_enc^T) would be the same function, but takes the difference of two large numbers where
|m| is large. Of gated dictionaries b_mag takes e^{r_mag} b_dec W_enc^T.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bert6_jax.errors import InputError
from sae_jax.config import DictionaryConfig
from sae_jax.dictionary import Dictionary

SAE_LENS_VERSION = "6.54.12"  # the release that the format was checked against; folders we write name it
_SAE_LENS_FILES = ("cfg.json", "sae_weights.safetensors")
_SPARSIFY_FILES = ("cfg.json", "sae.safetensors")
_DICTIONARY_LEARNING_FILES = ("config.json", "ae.safetensors")

Tensors = dict[str, np.ndarray]
Loaded = tuple[Dictionary, DictionaryConfig, dict[str, Any]]

# Our name -> the peer's name and whether its matrix is the transpose of ours, [F, D]. `tau`: thresholds of latents.
_ROWS = {"W_enc": ("W_enc", True), "W_dec": ("W_dec", False), "b_dec": ("b_dec", False)}
_PLAIN = _ROWS | {"b_enc": ("b_enc", False)}
_JUMP = _PLAIN | {"tau": ("threshold", False)}
_GATED = _ROWS | {"b_enc": ("b_gate", False), "r_mag": ("r_mag", False), "b_mag": ("b_mag", False)}
_LINEAR = {  # matrices of torch.nn.Linear, [out, in]
    "W_enc": ("encoder.weight", False),
    "b_enc": ("encoder.bias", False),
    "W_dec": ("decoder.weight", True),
    "b_dec": ("b_dec", False),
}

# architecture -> (our activation, tensors, tensors beside them)
_SAE_LENS = {
    "standard": ("relu", _PLAIN, ()),
    "gated": ("gated", _GATED, ()),
    "topk": ("topk", _PLAIN, ()),
    "jumprelu": ("jumprelu", _JUMP, ()),
    # folders of training runs; inference folders of these two say jumprelu
    "batchtopk": ("batch_topk", _PLAIN, ("topk_threshold",)),
    "matryoshka_batchtopk": ("batch_topk", _PLAIN, ("topk_threshold",)),
}
_ARCHITECTURE = {
    "relu": "standard",
    "gated": "gated",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "batch_topk": "jumprelu",
}

# dict_class -> (our activation, whether the encoder reads x - b_dec, tensors, tensors beside them)
_DICTIONARY_LEARNING = {
    "AutoEncoder": ("relu", True, _LINEAR | {"b_dec": ("bias", False)}, ()),
    "AutoEncoderNew": ("relu", False, _LINEAR | {"b_dec": ("decoder.bias", False)}, ()),
    "GatedAutoEncoder": (
        "gated",
        True,
        _LINEAR
        | {"b_enc": ("gate_bias", False), "b_mag": ("mag_bias", False)}
        | {"r_mag": ("r_mag", False), "b_dec": ("decoder_bias", False)},
        (),
    ),
    "AutoEncoderTopK": ("topk", True, _LINEAR, ("k", "threshold")),
    "BatchTopKSAE": ("batch_topk", True, _LINEAR, ("k", "threshold")),
    "MatryoshkaBatchTopKSAE": ("batch_topk", True, _PLAIN, ("k", "threshold", "group_sizes")),
    "JumpReluAutoEncoder": ("jumprelu", False, _JUMP, ()),
}


# --- reading ---------------------------------------------------------------------------------------------------------


def load(folder: str | Path) -> Loaded:
    """The dictionary in a folder of any format above, by `load_sae_lens`, `load_sparsify` or
    `load_dictionary_learning`."""
    folder = _folder(folder)
    names = {entry.name for entry in folder.iterdir()}
    if _SAE_LENS_FILES[1] in names:
        return load_sae_lens(folder)
    if _SPARSIFY_FILES[1] in names:
        return load_sparsify(folder)
    if _DICTIONARY_LEARNING_FILES[1] in names or "ae.pt" in names:
        return load_dictionary_learning(folder)
    raise InputError(
        f"{folder} is no dictionary folder: it holds none of sae_weights.safetensors (SAELens), sae.safetensors "
        "(sparsify), ae.safetensors (dictionary_learning); name the folder of one dictionary, and open checkpoints of "
        "this toolkit with bert6_jax.checkpoint.load"
    )


def load_sae_lens(folder: str | Path) -> Loaded:
    """A SAELens folder (v6), by architecture:

    standard, gated, jumprelu   as they are; thresholds of 0 and less become the smallest normal float32, the same
                                but for codes below 1e-37, because ours are stored as logarithms
    topk                        with `rescale_acts_by_decoder_norm` norms n are folded, W_enc n, b_enc n, W_dec / n:
                                rows are ranked by pre n, as there
    batchtopk, matryoshka_...   folders of training runs: batch_topk with the running threshold, as SAELens' inference
                                form has it, norms folded as above; a fractional k is rounded (inference ignores it)

    The nested sizes of Matryoshka dictionaries are read from the training details in inference folders too.
    `normalize_activations`: none, or layer_norm as `scale="token"`; the factor of expected_average_only_in is not in
    the weights, so those are refused until it is folded. `reshape_activations = hook_z` is read as the function of the
    flattened heads `[B, 1, n_heads d_head]` that it is. Older folders are refused: their defaults were others.
    `metadata` is that of cfg.json; sparsity.safetensors is not read.
    """
    folder = _folder(folder)
    config = _read_json(folder / _SAE_LENS_FILES[0], "a SAELens folder holds cfg.json and sae_weights.safetensors")
    where = str(folder / _SAE_LENS_FILES[0])
    metadata = config.get("metadata", {})
    version = metadata.get("sae_lens_version") if isinstance(metadata, dict) else None
    if not re.match(r"\d+\.", str(version)) or int(str(version).split(".")[0]) < 6:
        raise InputError(
            f"{where}: metadata.sae_lens_version is {version!r}, folders of SAELens 6 and later can be read; open it "
            "with a current SAELens and save it again"
        )
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or architecture not in _SAE_LENS:
        raise InputError(f"{where}: architecture {architecture!r} is not supported; {', '.join(_SAE_LENS)} are")
    normalisation = config.get("normalize_activations", "none")
    if normalisation == "expected_average_only_in":
        raise InputError(
            f"{where}: normalize_activations is {normalisation!r}, whose factor is not in the weights; fold it with "
            "SAELens' fold_activation_norm_scaling_factor and save again"
        )
    if normalisation not in ("none", "layer_norm"):
        raise InputError(f"{where}: normalize_activations {normalisation!r} is not supported; none and layer_norm are")
    reshape = config.get("reshape_activations", "none")
    if reshape not in ("none", "hook_z"):
        raise InputError(f"{where}: reshape_activations {reshape!r} is not supported; none and hook_z are")
    F, D = _size(config, "d_sae", where), _size(config, "d_in", where)

    activation, names, beside = _SAE_LENS[architecture]
    file = folder / _SAE_LENS_FILES[1]
    tensors = _read_tensors(file)
    if architecture == "jumprelu" and "log_threshold" in tensors and "threshold" not in tensors:
        tensors["threshold"] = np.exp(tensors.pop("log_threshold"))  # training runs of early versions
    params, others = _take(tensors, names, beside, F, D, file)
    ranked = activation in ("topk", "batch_topk")
    if ranked and _flag(config, "rescale_acts_by_decoder_norm", activation == "batch_topk", where):
        params = _fold_decoder_norm(params)
    details = metadata.get("training_architecture_details")
    widths = details.get("matryoshka_widths") if isinstance(details, dict) else None
    widths = config.get("matryoshka_widths", widths)
    k = round(_number(config, "k", where)) if ranked else None
    dictionary, cfg = _build(
        params,
        activation,
        where,
        k=k,
        threshold=max(others["topk_threshold"].item(), 0.0) if beside else None,
        subtract_bias=_flag(config, "apply_b_dec_to_input", True, where),
        prefixes=_prefixes(widths, F, where) if widths and activation != "gated" else (),
        scale="token" if normalisation == "layer_norm" else "none",
    )
    return dictionary, cfg, metadata


def load_sparsify(folder: str | Path) -> Loaded:
    """An EleutherAI sparsify folder: top-k of relu((x - b_dec) encoder.weight^T + encoder.bias).

    Refused: the activation groupmax, the signed top-k of early versions, and coders that read or add more than their
    own input (transcode, skip_connection, embed_skip, gram_lookup). `metadata` is cfg.json.
    """
    folder = _folder(folder)
    config = _read_json(folder / _SPARSIFY_FILES[0], "a sparsify folder holds cfg.json and sae.safetensors")
    where = str(folder / _SPARSIFY_FILES[0])
    if config.get("activation", "topk") != "topk":
        raise InputError(f"{where}: activation {config['activation']!r} is not supported; topk is")
    for name in ("signed", "transcode", "skip_connection", "embed_skip", "gram_lookup"):
        if _flag(config, name, False, where):
            raise InputError(f"{where}: {name} is true; only plain autoencoders of sparsify can be read")
    D = _size(config, "d_in", where)
    F = (
        _size(config, "num_latents", where)
        if config.get("num_latents")
        else D * _size(config, "expansion_factor", where)
    )
    file = folder / _SPARSIFY_FILES[1]
    names = _LINEAR | {"W_dec": ("W_dec", False)}
    params, _ = _take(_read_tensors(file), names, (), F, D, file)
    dictionary, cfg = _build(params, "topk", where, k=_size(config, "k", where))
    return dictionary, cfg, config


def load_dictionary_learning(folder: str | Path) -> Loaded:
    """A dictionary_learning folder whose weights were re-saved as ae.safetensors; ae.pt is a pickle and never read.

    Equations are those of each class's `encode` at inference: AutoEncoderTopK by rows, BatchTopKSAE and
    MatryoshkaBatchTopKSAE by their threshold (not learnt yet, -1: they keep all that is positive, so does 0 here),
    JumpReluAutoEncoder and AutoEncoderNew without taking b_dec off the input, thresholds of 0 and less as in
    `load_sae_lens`. Decoders of AutoEncoder are scaled to norm 1 and its codes with them, as its `from_pretrained`
    does. The package scales biases to raw activations before it saves, so nothing is left to fold. `metadata` is
    config.json.
    """
    folder = _folder(folder)
    config_file, file = (folder / name for name in _DICTIONARY_LEARNING_FILES)
    if not file.exists() and (folder / "ae.pt").exists():
        raise InputError(
            f"{folder} holds ae.pt, a pickle, which can run any code and is never read; convert it where you trust it: "
            "safetensors.torch.save_file({n: t.contiguous() for n, t in torch.load('ae.pt', weights_only=True).items()}"
            ", 'ae.safetensors')"
        )
    config = _read_json(config_file, "a dictionary_learning folder holds config.json and ae.safetensors")
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise InputError(f"{config_file}: field 'trainer' is missing; is it a configuration of dictionary_learning?")
    where = f"{config_file}: trainer"
    kind = trainer.get("dict_class")
    if not isinstance(kind, str) or kind not in _DICTIONARY_LEARNING:
        supported = ", ".join(_DICTIONARY_LEARNING)
        raise InputError(f"{config_file}: trainer.dict_class {kind!r} is not supported; {supported} are")
    F, D = _size(trainer, "dict_size", where), _size(trainer, "activation_dim", where)
    activation, subtract_bias, names, beside = _DICTIONARY_LEARNING[kind]
    params, others = _take(_read_tensors(file), names, beside, F, D, file)
    k = others["k"].item() if "k" in others else None
    if k is not None and trainer.get("k", k) != k:
        raise InputError(f"{config_file}: trainer.k is {trainer['k']!r}, ae.safetensors says {k}; correct either")
    if kind == "AutoEncoder":
        params = _fold_decoder_norm(params)
    dictionary, cfg = _build(
        params,
        activation,
        where,
        k=k,
        threshold=max(others["threshold"].item(), 0.0) if activation == "batch_topk" else None,
        subtract_bias=subtract_bias,
        prefixes=_prefixes(np.cumsum(others["group_sizes"]).tolist(), F, where) if "group_sizes" in others else (),
    )
    return dictionary, cfg, config


def _folder(folder) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name the folder that holds one dictionary's files")
    return folder


def _read_json(file: Path, remedy: str) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"{file} does not exist; {remedy}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise InputError(f"{file} holds a {type(config).__name__}, not an object of fields; fetch it again")
    return config


def _read_tensors(file: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not file.is_file():
        raise InputError(f"{file} does not exist; fetch it, or convert the weights to safetensors")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file} cannot be read ({error}); fetch it again") from error
    except (AttributeError, TypeError) as error:  # a number type that this safetensors does not hand to numpy
        raise InputError(f"{file} cannot be read ({error}); save it as float32") from error


def _size(config, name: str, where: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{where}: {name} is {value!r}; it must be a positive integer")
    return value


def _number(config, name: str, where: str) -> float:
    value = config.get(name)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{where}: {name} is {value!r}; it must be a number")
    return value


def _flag(config, name: str, default: bool, where: str) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"{where}: {name} is {value!r}; it must be true or false")
    return value


def _prefixes(widths, F: int, where: str) -> tuple[int, ...]:
    if not isinstance(widths, list) or not all(isinstance(width, int) for width in widths):
        raise InputError(f"{where}: matryoshka_widths is {widths!r}; it must be a list of integers")
    return (*widths, *(() if widths[-1] == F else (F,)))  # SAELens, too, adds the whole where it is not named


def _take(tensors: Tensors, names, beside, F: int, D: int, file) -> tuple[Tensors, Tensors]:
    """Tensors under our names, float32, matrices `[F, D]`; and those `beside` as they are. All checked."""
    wanted = {theirs for theirs, _ in names.values()} | set(beside)
    for name in sorted(wanted - tensors.keys()):
        raise InputError(f"{file}: tensor {name} is missing; it has {', '.join(sorted(tensors)) or 'none'}")
    for name in sorted(tensors.keys() - wanted):
        raise InputError(f"{file}: tensor {name} is not of this architecture, which has {', '.join(sorted(wanted))}")
    params = {}
    for ours, (theirs, transposed) in names.items():
        rows = {"W_enc": (F, D), "W_dec": (F, D), "b_dec": (D,)}.get(ours, (F,))
        stored = rows[::-1] if transposed else rows
        if tensors[theirs].shape != stored:
            raise InputError(
                f"{file}: tensor {theirs} has shape {list(tensors[theirs].shape)}, its configuration asks for "
                f"{list(stored)}; fetch both again"
            )
        value = np.asarray(tensors[theirs], np.float32)
        params[ours] = value.T if transposed else value
    others = {name: tensors[name] for name in beside}
    for name, value in others.items():
        if name != "group_sizes" and value.size != 1:
            raise InputError(f"{file}: tensor {name} has shape {list(value.shape)}; it must be one number")
    for name, value in (params | others).items():
        if not np.isfinite(value).all():
            theirs = names[name][0] if name in names else name
            raise InputError(f"{file}: tensor {theirs} has values that are not finite; fetch it again")
    return params, others


def _fold_decoder_norm(params: Tensors) -> Tensors:
    """Decoder rows of norm 1 and codes in what each adds to the reconstruction; rows of zeros stay."""
    norm_F = np.linalg.norm(params["W_dec"], axis=-1)
    return params | {
        "W_enc": params["W_enc"] * norm_F[:, None],
        "b_enc": params["b_enc"] * norm_F,
        "W_dec": params["W_dec"] / np.where(norm_F > 0, norm_F, 1.0)[:, None],
    }


def _build(
    params: Tensors, activation, where, *, k=None, threshold=None, subtract_bias=True, prefixes=(), scale="none"
) -> tuple[Dictionary, DictionaryConfig]:
    """Our tree and configuration of tensors under our names, `[F, D]` matrices."""
    F, D = params["W_enc"].shape
    params = dict(params)
    if activation == "jumprelu":
        params["log_threshold"] = np.log(np.maximum(params.pop("tau"), np.finfo(np.float32).tiny))
    unit = np.abs(np.linalg.norm(params["W_dec"], axis=-1) - 1).max() < 1e-4
    try:
        cfg = DictionaryConfig(
            width=D,
            latents=F,
            activation=activation,
            **({} if k is None else {"k": k}),
            prefixes=tuple(prefixes),
            subtract_bias=subtract_bias,
            decoder="unit" if unit else "free",
            penalty="l0" if activation == "jumprelu" else "l1",
            centre=False,
            scale=scale,
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    for name in ("W_enc", "W_dec", "b_dec"):
        params[name] = params[name][None]
    dictionary = {
        "params": {name: jnp.asarray(value, jnp.float32) for name, value in params.items()},
        "norm": {"mean": jnp.zeros((1, D), jnp.float32), "scale": jnp.ones(1, jnp.float32)},
        "threshold": jnp.asarray(-1.0 if threshold is None else threshold, jnp.float32),
    }
    return dictionary, cfg


# --- writing ---------------------------------------------------------------------------------------------------------


def save_sae_lens(
    folder: str | Path,
    dictionary: Dictionary,
    cfg: DictionaryConfig,
    *,
    metadata: Mapping[str, Any] | None = None,
    sparsity=None,
) -> None:
    """Write an autoencoder (H = 1) as the SAELens folder that `sae_lens.SAE.load_from_disk` opens.

    Codes and reconstructions there, of raw activations, are those of our `encode` and `reconstruct`; the fold is in
    the module's docstring. relu is written as standard, gated, topk and jumprelu as such, batch_topk as jumprelu with
    its threshold for every latent; nested prefixes are kept in metadata, where `load_sae_lens` finds them.
    `scale="token"` becomes layer_norm, which takes each row's own mean and no other, so it needs mean 0 and scale 1.

    `metadata`: model_name, hook_name, context_size, prepend_bos, dataset_path, neuronpedia_id, ... for SAELens.
    `sparsity`: share of rows on which each latent is active, `[F]`; sparsity.safetensors gets log10(share + 1e-10).
    The folder appears when it is complete. `InputError`: it exists, the dictionary has several heads, batch_topk has
    learnt no threshold, values are not finite, the shapes are not those of `cfg`, metadata is not JSON.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists; name a new folder, nothing is overwritten")
    tensors, config = _to_sae_lens(dictionary, cfg)
    details = {"matryoshka_widths": list(cfg.prefixes)} if cfg.prefixes else {}
    training = {}
    if cfg.activation == "batch_topk":
        details["k"] = int(dictionary.get("k", cfg.k))
        training["training_architecture"] = "matryoshka_batchtopk" if cfg.prefixes else "batchtopk"
    if details:
        training["training_architecture_details"] = details
    training["sae_lens_training_version"] = None  # SAELens would claim to have trained it
    config["metadata"] = training | dict(metadata or {}) | {"sae_lens_version": SAE_LENS_VERSION}
    try:
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"metadata cannot be written as JSON ({error}); give strings, numbers and lists") from error
    files = {_SAE_LENS_FILES[1]: tensors}
    if sparsity is not None:
        share_F = np.asarray(sparsity, np.float32)
        if share_F.shape != (cfg.latents,) or not ((share_F >= 0) & (share_F <= 1)).all():
            raise InputError(
                f"sparsity has shape {list(share_F.shape)}; give the share of rows, in [0, 1], on which each of the "
                f"{cfg.latents} latents is active"
            )
        files["sparsity.safetensors"] = {"sparsity": np.log10(share_F + np.float32(1e-10))}
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        for name, content in files.items():
            save_file({key: np.ascontiguousarray(value) for key, value in content.items()}, partial / name)
        (partial / _SAE_LENS_FILES[0]).write_text(text, encoding="utf-8")
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _to_sae_lens(dictionary: Dictionary, cfg: DictionaryConfig) -> tuple[Tensors, dict[str, Any]]:
    """SAELens' tensors and cfg.json (without metadata) of a dictionary."""
    if cfg.heads != 1:
        raise InputError(f"a dictionary of {cfg.heads} heads is a crosscoder; SAELens' folders hold one head")
    if cfg.gate_norm != "none" or cfg.gate == "per_head":
        raise InputError("a gate that reads decoder norms has no form in SAELens; export one with gate_norm none")
    params = {name: np.asarray(value, np.float32) for name, value in dictionary["params"].items()}
    norm = {name: np.asarray(value, np.float32) for name, value in dictionary["norm"].items()}
    threshold = np.asarray(dictionary["threshold"], np.float32)
    F, D = cfg.latents, cfg.width
    shapes = {"W_enc": (1, F, D), "W_dec": (1, F, D), "b_dec": (1, D), "mean": (1, D), "scale": (1,), "threshold": ()}
    for name, value in (params | norm | {"threshold": threshold}).items():
        if value.shape != shapes.get(name, (F,)):
            raise InputError(
                f"{name} has shape {list(value.shape)}, the configuration asks for {list(shapes.get(name, (F,)))}; "
                "give the configuration it was made with, and of a bank one member"
            )
        if not np.isfinite(value).all():
            raise InputError(f"{name} has values that are not finite; a dictionary that diverged is not written")
    if cfg.activation == "batch_topk" and not threshold >= 0:
        raise InputError("this batch_topk dictionary has learnt no threshold, SAELens has none without; train on")

    mean_D, scale = norm["mean"][0], norm["scale"][0]
    token = cfg.scale == "token"
    if token and (mean_D.any() or scale != 1):
        raise InputError("scale='token' with a mean or scale of the data is not SAELens' layer_norm; centre=False is")
    W_enc_FD, W_dec_FD, b_dec_D = params["W_enc"][0], params["W_dec"][0], params["b_dec"][0]
    subtract_bias = cfg.subtract_bias or bool(mean_D.any())
    shift_F = W_enc_FD @ b_dec_D if subtract_bias and not cfg.subtract_bias else np.zeros(F, np.float32)
    tensors = {
        "W_enc": (W_enc_FD * scale).T,
        "W_dec": W_dec_FD / scale,
        "b_dec": mean_D + b_dec_D / scale,
        "b_gate" if cfg.activation == "gated" else "b_enc": params["b_enc"] + shift_F,
    }
    if cfg.activation == "gated":
        tensors |= {"r_mag": params["r_mag"], "b_mag": params["b_mag"] + np.exp(params["r_mag"]) * shift_F}
    if cfg.activation == "jumprelu":
        tensors["threshold"] = np.exp(params["log_threshold"])
    if cfg.activation == "batch_topk":
        tensors["threshold"] = np.full(F, threshold)
    config = {
        "architecture": _ARCHITECTURE[cfg.activation],
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": subtract_bias,
        "normalize_activations": "layer_norm" if token else "none",
        "reshape_activations": "none",
    }
    if cfg.activation == "topk":
        config |= {"k": int(dictionary.get("k", cfg.k)), "rescale_acts_by_decoder_norm": False}
    return tensors, config


# --- Neuronpedia -----------------------------------------------------------------------------------------------------

BATCH_FEATURES = 128
_FEATURE_FIELDS = {"index", "density", "topLogits", "bottomLogits", "explanations", "activations"}
_QUANTILES = ("quantileMin", "quantileMax", "quantileFraction")


def neuronpedia_lines(model_id: str, source: str, features: Iterable[Mapping[str, Any]]) -> list[str]:
    """Bodies of POST /api/feature/upload-batch, a JSON text for every 128 features, checked against its limits.

    `source` is `<layer>-<set>`; it must exist there and be the caller's. A feature has Neuronpedia's own fields:

        index         integer in [0, 10^7], once in all features
        density       share of tokens in [0, 1]                                   optional
        topLogits     up to 20 of {token, value}; bottomLogits alike              optional
        explanations  list of {text, methodName?, modelName?}, text of up to 512 characters; names must be known there
        activations   at least one of {tokens, values, quantileMin?, quantileMax?, quantileFraction?}: 1 to 1,024
                      tokens and as many values

    Numbers may be numpy's or JAX's. `InputError` names the feature and the field.
    """
    if not isinstance(model_id, str) or not model_id or model_id != model_id.lower() or re.search(r"\s", model_id):
        raise InputError(f"modelId is {model_id!r}; Neuronpedia's ids are in lower case, without spaces")
    if not isinstance(source, str) or source != source.lower() or not re.fullmatch(r"\d+-\S+", source):
        raise InputError(f"source is {source!r}; Neuronpedia's are <layer>-<set> in lower case, as 6-res-ours")
    checked, seen = [], set()
    for position, feature in enumerate(features):
        checked.append(_feature(feature, position))
        index = checked[-1]["index"]
        if index in seen:
            raise InputError(f"feature {index}: index occurs twice; give every feature once")
        seen.add(index)
    if not checked:
        raise InputError("features are empty; a batch of Neuronpedia holds at least one")
    batches = (checked[start : start + BATCH_FEATURES] for start in range(0, len(checked), BATCH_FEATURES))
    return [json.dumps({"modelId": model_id, "source": source, "features": batch}) for batch in batches]


def save_neuronpedia(path: str | Path, model_id: str, source: str, features: Iterable[Mapping[str, Any]]) -> None:
    """Write `neuronpedia_lines` as JSON Lines, one upload a line; the file appears when it is complete."""
    path = Path(path)
    if path.exists():
        raise InputError(f"{path} exists; name a new file, nothing is overwritten")
    lines = neuronpedia_lines(model_id, source, features)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _feature(feature, position: int) -> dict[str, Any]:
    """One feature as plain JSON values."""
    if not isinstance(feature, Mapping):
        raise InputError(f"feature at place {position} is a {type(feature).__name__}; give a dict with index, ...")
    where = f"feature at place {position}"
    index = feature.get("index")
    if isinstance(index, bool) or not _is_integer(index) or not 0 <= int(index) <= 10**7:
        raise InputError(f"{where}: index is {index!r}; it must be an integer in [0, 10000000]")
    where = f"feature {int(index)}"
    _check_fields(feature, _FEATURE_FIELDS, where)
    result: dict[str, Any] = {"index": int(index)}
    if feature.get("density") is not None:
        result["density"] = _float(feature["density"], f"{where}: density")
        if not 0 <= result["density"] <= 1:
            raise InputError(f"{where}: density is {result['density']}; it must lie in [0, 1]")
    for name in ("topLogits", "bottomLogits"):
        logits = _list(feature.get(name, ()), f"{where}: {name}")
        if len(logits) > 20:
            raise InputError(f"{where}: {name} has {len(logits)} entries; at most 20 are taken")
        for entry in logits:
            _check_fields(entry, {"token", "value"}, f"{where}: {name}")
        if logits:
            result[name] = [
                {"token": _text(entry.get("token"), f"{where}: {name}.token"),
                 "value": _float(entry.get("value"), f"{where}: {name}.value")}
                for entry in logits
            ]  # fmt: skip
    explanations = _list(feature.get("explanations", ()), f"{where}: explanations")
    for entry in explanations:
        _check_fields(entry, {"text", "methodName", "modelName"}, f"{where}: explanations")
        text = _text(entry.get("text"), f"{where}: explanations.text")
        if not 1 <= len(text) <= 512:
            raise InputError(f"{where}: explanations.text has {len(text)} characters; 1 to 512 are taken")
    if explanations:
        result["explanations"] = [
            {name: _text(value, f"{where}: explanations.{name}") for name, value in entry.items()}
            for entry in explanations
        ]
    activations = _list(feature.get("activations", ()), f"{where}: activations")
    if not activations:
        raise InputError(f"{where}: activations are empty; give at least one text with its values")
    result["activations"] = [_activation(entry, f"{where}: activations") for entry in activations]
    return result


def _activation(entry, where: str) -> dict[str, Any]:
    _check_fields(entry, {"tokens", "values", *_QUANTILES}, where)
    tokens = [_text(token, f"{where}.tokens") for token in _list(entry.get("tokens", ()), f"{where}.tokens")]
    values = [_float(value, f"{where}.values") for value in _list(entry.get("values", ()), f"{where}.values")]
    if not 1 <= len(tokens) <= 1024:
        raise InputError(f"{where}.tokens has {len(tokens)} entries; 1 to 1024 are taken")
    if len(values) != len(tokens):
        raise InputError(f"{where}.values has {len(values)} entries for {len(tokens)} tokens; give one a token")
    quantiles = {name: _float(entry[name], f"{where}.{name}") for name in _QUANTILES if entry.get(name) is not None}
    return {"tokens": tokens, "values": values} | quantiles


def _check_fields(entry, known: set[str], where: str) -> None:
    if not isinstance(entry, Mapping):
        raise InputError(f"{where} holds a {type(entry).__name__}; give dicts of {', '.join(sorted(known))}")
    for name in entry:
        if name not in known:
            raise InputError(f"{where} has the field {name!r}; Neuronpedia takes {', '.join(sorted(known))}")


def _is_integer(value) -> bool:
    if isinstance(value, (int, np.integer)):
        return True
    return getattr(value, "ndim", None) == 0 and np.issubdtype(value.dtype, np.integer)


def _list(value, where: str) -> list:
    if isinstance(value, (str, Mapping)) or not hasattr(value, "__len__"):
        raise InputError(f"{where} is a {type(value).__name__}; give a list")
    return np.asarray(value).tolist() if hasattr(value, "dtype") else list(value)


def _text(value, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where} is {value!r}; it must be text")
    return value


def _float(value, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} is {value!r}; it must be a number") from error
    if not math.isfinite(number):
        raise InputError(f"{where} is {number}; it must be finite")
    return number
