"""Makes sae_lens.npz: what SAELens 6.54.12 says of folders that `sae_jax.interop` wrote, and of folders of its own.

    python -m venv peer && peer/bin/pip install sae-lens==6.54.12
    python tests/golden/make_sae_lens.py peer/bin/python

SAELens pins versions that ours need not share, so it runs in an interpreter of its own. Stored:

    x                       [B, D] raw activations, far from 0 as those of real models
    ours/NAME/TENSOR        tensors of the folder that we wrote of `dictionary(NAME)`
    ours/NAME/z, xhat       SAELens' codes and reconstructions of x
    theirs/NAME/cfg, ...    cfg.json, tensors, codes and reconstructions of dictionaries that SAELens made and saved
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

B, D, F = 9, 8, 12
OURS = {  # name -> fields of the configuration
    "relu": dict(activation="relu"),
    "relu_raw": dict(activation="relu", centre=False, scale="none"),
    "relu_added": dict(activation="relu", centre=False, scale="none", subtract_bias=False),
    "relu_added_centred": dict(activation="relu", subtract_bias=False),
    "relu_token": dict(activation="relu", centre=False, scale="token"),
    "relu_token_added": dict(activation="relu", centre=False, scale="token", subtract_bias=False),
    "gated": dict(activation="gated", scale="mean_square"),
    "gated_added_centred": dict(activation="gated", subtract_bias=False),
    "topk": dict(activation="topk"),
    "topk_prefixes": dict(activation="topk", prefixes=(4, 12)),
    "jumprelu": dict(activation="jumprelu", penalty="l0"),
    "jumprelu_added_scaled": dict(activation="jumprelu", penalty="l0", centre=False, subtract_bias=False),
    "batch_topk": dict(activation="batch_topk"),
    "batch_topk_prefixes": dict(activation="batch_topk", prefixes=(4, 12)),
}
THEIRS = {  # name -> (training, fields of SAELens' configuration)
    "standard": (False, dict(architecture="standard", apply_b_dec_to_input=False)),
    "gated": (False, dict(architecture="gated")),
    "topk_rescaled": (False, dict(architecture="topk", k=3, rescale_acts_by_decoder_norm=True)),
    "jumprelu_below_zero": (False, dict(architecture="jumprelu")),
    "standard_layer_norm": (False, dict(architecture="standard", normalize_activations="layer_norm")),
    "batchtopk": (True, dict(architecture="batchtopk", k=2.5)),
    "matryoshka": (True, dict(architecture="matryoshka_batchtopk", k=2.0, matryoshka_widths=[4, 12])),
}


def activations() -> np.ndarray:
    """[B, D]: a mean of 10 standard deviations, which are 4."""
    rng = np.random.default_rng(0)
    return (rng.normal(scale=4.0, size=(B, D)) + rng.normal(scale=40.0, size=D)).astype(np.float32)


def dictionary(name: str):
    """Our dictionary `name` and its configuration: random weights and biases, the normalisation fitted to x."""
    import jax
    import jax.numpy as jnp

    from sae_jax.config import DictionaryConfig
    from sae_jax.dictionary import fit_norm

    cfg = DictionaryConfig(width=D, latents=F, **{"k": 3, "decoder": "free"} | OURS[name])
    rng = np.random.default_rng(sorted(OURS).index(name))
    # without a scale of the data the weights take it, so that every case has codes of about 1 and some of them 0
    size = 0.02 if cfg.scale == "none" else 0.4
    params = {
        "W_enc": rng.normal(scale=size, size=(1, F, D)),
        "W_dec": rng.normal(scale=0.4, size=(1, F, D)),
        "b_enc": rng.normal(scale=0.3, size=F),
        "b_dec": rng.normal(scale=0.5, size=(1, D)),
    }
    if cfg.activation == "gated":
        params |= {"r_mag": rng.normal(scale=0.3, size=F), "b_mag": rng.normal(scale=0.3, size=F)}
    if cfg.activation == "jumprelu":
        params["log_threshold"] = np.log(rng.uniform(0.2, 0.8, F))
    tree = {
        "params": params,
        "norm": fit_norm(jnp.asarray(activations())[:, None], cfg),
        "threshold": 0.5 if cfg.activation == "batch_topk" else -1.0,
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree), cfg


def run(folder: str | Path, x: np.ndarray) -> dict[str, np.ndarray]:
    """SAELens' codes and reconstructions of x by the dictionary in a folder."""
    import torch
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    with torch.no_grad():
        z = sae.encode(torch.tensor(x))
        return {"z": z.numpy(), "xhat": sae.decode(z).numpy()}


def theirs(name: str, folder: Path, x: np.ndarray) -> dict[str, np.ndarray]:
    """A dictionary that SAELens makes and saves in `folder`; codes are those of its inference form."""
    import torch
    from sae_lens import SAE, TrainingSAE
    from safetensors.torch import load_file

    training, fields = THEIRS[name]
    torch.manual_seed(list(THEIRS).index(name))
    made = (TrainingSAE if training else SAE).from_dict(dict(d_in=D, d_sae=F, metadata={}) | fields)
    with torch.no_grad():
        for key, tensor in made.named_parameters():
            tensor.copy_(torch.randn_like(tensor) * (0.05 if key == "W_enc" else 0.4))
        if name == "jumprelu_below_zero":
            made.threshold[::3] *= 0
        if training:
            made.topk_threshold.fill_(0.3)
    made.save_model(folder)
    inference = folder
    if training:
        inference = folder.with_name(folder.name + "_inference")
        made.save_inference_model(inference)
    arrays = {"cfg": np.array((folder / "cfg.json").read_text())}
    arrays |= {key: value.numpy() for key, value in load_file(folder / "sae_weights.safetensors").items()}
    return arrays | run(inference, x)


def peer(work: Path) -> None:
    """In SAELens' interpreter: everything that it computes, into work/peer.npz."""
    x = np.load(work / "x.npy")
    arrays = {}
    for name in OURS:
        arrays |= {f"ours/{name}/{key}": value for key, value in run(work / name, x).items()}
    for name in THEIRS:
        arrays |= {f"theirs/{name}/{key}": value for key, value in theirs(name, work / f"theirs_{name}", x).items()}
    np.savez(work / "peer.npz", **arrays)


def make(python: str) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    from sae_jax import interop

    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        arrays = {"x": activations()}
        np.save(work / "x.npy", arrays["x"])
        for name in OURS:
            interop.save_sae_lens(work / name, *dictionary(name))
            tensors = load_file(work / name / "sae_weights.safetensors")
            arrays |= {f"ours/{name}/{key}": value for key, value in tensors.items()}
            cfg = json.loads((work / name / "cfg.json").read_text())
            assert cfg["d_sae"] == F, cfg
        subprocess.run([python, __file__, "--peer", str(work)], check=True)
        return arrays | dict(np.load(work / "peer.npz"))


if __name__ == "__main__":
    if sys.argv[1] == "--peer":
        peer(Path(sys.argv[2]))
    else:
        np.savez_compressed(Path(__file__).with_name("sae_lens.npz"), **make(sys.argv[1]))
