"""Frozen configurations of dictionaries and of their training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bert6_jax.errors import InputError

ACTIVATIONS = ("relu", "gated", "topk", "batch_topk", "jumprelu")
_CHOICES = {
    "activation": ACTIVATIONS,
    "decoder": ("unit", "free"),
    "gate": ("shared", "per_head"),
    "gate_norm": ("none", "l2", "l1"),
    "aggregate": ("sum", "mean"),
    "penalty": ("l1", "l0", "tanh", "tanh_quad"),
    "code_norm": ("none", "l2", "l1", "per_head"),
    "straight_through": ("tau2", "tau1"),
    "scale": ("none", "mean_norm", "mean_square", "token"),
}


@dataclass(frozen=True)
class DictionaryConfig:
    """Shape and kind of a dictionary; static under `jit`. The equations are in `sae_jax.dictionary`.

    What may differ between the members of one bank (rates, sparsity, k) is data and stands in `Hyper`.
    """

    width: int  # D
    latents: int  # F
    heads: int = 1  # H
    gate: str = (
        "shared"  # one gate for all heads, or `per_head`: f_h = pre 1[pre |W_dec[h]| > tau] (jumprelu, batch_topk)
    )
    gate_norm: str = (
        "none"  # a shared gate reads pre times: 1, `l2`: (sum_h |W_dec[h]|^2)^(1/2), `l1`: sum_h |W_dec[h]|
    )
    aggregate: str = "sum"  # pre-activations are the sum over heads, or their `mean`
    shared_latents: int = 0  # the first so many have one decoder direction for all heads (Anthropic, February 2025)
    shared_penalty: float = 1.0  # factor on their penalty
    activation: str = "batch_topk"
    k: int = 32  # topk, batch_topk: the most latents a row keeps (batch_topk: mean over the batch)
    prefixes: tuple[int, ...] = ()  # Matryoshka: sizes of the nested dictionaries, the last one `latents`
    subtract_bias: bool = True  # the encoder reads x - b_dec
    decoder: str = "unit"  # `unit`: every latent's decoder has norm 1 in every head; `free`
    penalty: str = "l1"  # relu, gated: l1; jumprelu: l0, tanh or tanh_quad
    code_norm: str = "l2"  # penalties see codes times `none`: 1, l2, l1 as above, or `per_head`: a sum over heads
    p_end: float = 1.0  # relu, gated: the penalty's exponent falls from 1 to this over training (1: plain l1)
    p_stages: int = 10  # in so many steps
    tanh_scale: float = 4.0  # c of tanh(c z |W_dec|)
    quad_scale: float = 0.01  # s of tanh_quad's p (1 + p / s)
    bandwidth: float = 2.0  # epsilon of the jumprelu's straight-through window
    threshold_init: float = 0.1  # tau at the start
    straight_through: str = "tau2"  # d z / d log tau = -tau^2 / epsilon (exact chain rule) or -tau / epsilon
    centre: bool = True  # inputs have their mean over the data taken away
    scale: str = "mean_norm"  # inputs are scaled so that mean |x| = sqrt(D), mean |x|^2 = D, or each row to std 1

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"config field {name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        for name in ("width", "latents", "heads", "k", "p_stages"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"config field {name} is {getattr(self, name)!r}; it must be a positive integer")
        if self.activation in ("topk", "batch_topk") and self.k > self.latents:
            raise InputError(f"k = {self.k} active latents of a dictionary of {self.latents}; lower k or widen it")
        for name in ("p_end", "bandwidth", "threshold_init", "tanh_scale", "quad_scale"):
            if not getattr(self, name) > 0:
                raise InputError(f"config field {name} is {getattr(self, name)!r}; it must be positive")
        if self.activation == "jumprelu" and self.penalty == "l1":
            raise InputError(
                "a jumprelu dictionary needs the penalty l0, tanh or tanh_quad; l1 gives its threshold no gradient"
            )
        if self.activation in ("relu", "gated") and self.penalty != "l1":
            raise InputError(f"penalty {self.penalty} is for jumprelu; {self.activation} dictionaries take l1")
        if self.activation == "gated" and self.prefixes:
            raise InputError("nested prefixes are for relu, topk, batch_topk and jumprelu dictionaries, not for gated")
        if self.gate == "per_head" and (self.activation not in ("jumprelu", "batch_topk") or self.prefixes):
            raise InputError("a gate per head is for jumprelu and batch_topk dictionaries without nested prefixes")
        if self.gate == "per_head" and self.decoder == "unit" and self.heads > 1:
            raise InputError("a gate per head reads the decoder's norms, which decoder unit sets to 1; set it to free")
        if self.gate == "per_head" and self.gate_norm != "none":
            raise InputError(
                f"gate_norm {self.gate_norm} is for a shared gate; a gate per head reads its own head's norm"
            )
        if self.gate_norm != "none" and self.activation in ("relu", "gated"):
            raise InputError(
                f"gate_norm is for topk, batch_topk and jumprelu; {self.activation} has no level to compare"
            )
        if self.gate_norm != "none" and self.prefixes:
            raise InputError("nested prefixes need gate_norm none")
        if self.code_norm == "per_head" and self.activation != "jumprelu":
            raise InputError("code_norm per_head is for jumprelu; other dictionaries take none, l2 or l1")
        if self.activation == "jumprelu" and self.gate == "per_head" and self.code_norm != "per_head":
            raise InputError("a jumprelu with a gate per head has a code per head: set code_norm to per_head too")
        whole = isinstance(self.shared_latents, int)
        if not whole or not 0 <= self.shared_latents <= self.latents or not self.shared_penalty >= 0:
            raise InputError(
                f"{self.shared_latents} shared latents of {self.latents} with penalty {self.shared_penalty}; give a "
                "number from 0 to all of them and a factor from 0 on"
            )
        if not isinstance(self.prefixes, tuple):
            raise InputError(f"prefixes are {self.prefixes!r}; give a tuple of sizes")
        ordered = all(a < b for a, b in zip(self.prefixes, self.prefixes[1:], strict=False))
        if self.prefixes and (self.prefixes[-1] != self.latents or self.prefixes[0] < 1 or not ordered):
            raise InputError(f"prefixes are {self.prefixes}; they must rise and end with latents = {self.latents}")


@dataclass(frozen=True)
class TrainConfig:
    """How dictionaries are trained; static. Shares are of all steps."""

    steps: int
    batch: int = 2_048  # rows of a step
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    lr_warmup: float = 0.05  # share of the steps over which the rate rises from near 0
    lr_decay: float = 0.2  # share at the end over which it falls to `lr_floor`
    lr_floor: float = 0.0  # share of the rate that is left at the end
    sparsity_warmup: float = 0.1  # share over which the penalty rises (relu, gated, jumprelu)
    threshold_lr: float = 1.0  # factor on the rate of the jumprelu's thresholds
    clip: float = 0.0  # largest norm of a member's gradient; 0: none
    aux_k: int = 0  # dead latents that model a row's error; 0: half the width
    aux_norm: str = "variance"  # auxiliary loss in units of the rows' variance (OpenAI), or `none`: as it is (SAELens)
    dead_after: int = 10_000_000  # rows without firing that make a latent dead
    threshold_decay: float = 0.999  # at most, of the running mean that becomes batch_topk's threshold at inference

    def __post_init__(self):
        for name in ("steps", "batch", "dead_after"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"config field {name} is {getattr(self, name)!r}; it must be a positive integer")
        for name in ("lr_warmup", "lr_decay", "lr_floor", "sparsity_warmup", "threshold_decay"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"config field {name} is {getattr(self, name)!r}; it must lie in [0, 1]")
        if self.aux_norm not in ("variance", "none"):
            raise InputError(f"config field aux_norm is {self.aux_norm!r}; choose one of variance, none")
        for name in ("aux_k", "clip"):
            if getattr(self, name) < 0:
                raise InputError(f"config field {name} is {getattr(self, name)}; it must not be negative")


# Losses and gates of crosscoders by name; RESULTS.md has the planted benchmark that made the first one the default.
CROSSCODERS: dict[str, dict[str, Any]] = {
    "batch_topk": {"activation": "batch_topk", "gate": "per_head"},  # dictionary_learning's "decoupled" code norm
    "tanh_quad": {"activation": "jumprelu", "gate": "per_head", "penalty": "tanh_quad", "code_norm": "per_head"},
    "l1": {"activation": "relu", "code_norm": "l1"},  # Anthropic October 2024, arXiv 2509.05291
}


def crosscoder(width: int, latents: int, heads: int, loss: str = "batch_topk", **changes) -> DictionaryConfig:
    """A crosscoder over `heads` models or places: free decoders, whose norms say where a latent is, no decoder bias in
    the encoder (OpenMOSS), and one of `CROSSCODERS`; for `batch_topk`, k is the mean of a row and head."""
    if loss not in CROSSCODERS:
        raise InputError(f"crosscoder loss {loss!r}; choose one of {', '.join(CROSSCODERS)}")
    settings = {"decoder": "free", "subtract_bias": False} | CROSSCODERS[loss]
    if loss != "batch_topk":
        settings["k"] = 1  # not used
    return DictionaryConfig(width, latents, heads, **(settings | changes))
