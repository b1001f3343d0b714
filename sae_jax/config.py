"""Frozen configurations of dictionaries and of their training."""

from __future__ import annotations

from dataclasses import dataclass

from bert6_jax.errors import InputError

ACTIVATIONS = ("relu", "gated", "topk", "batch_topk", "jumprelu")
_CHOICES = {
    "activation": ACTIVATIONS,
    "decoder": ("unit", "free"),
    "penalty": ("l1", "l0", "tanh"),
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
    activation: str = "batch_topk"
    k: int = 32  # topk, batch_topk: the most latents a row keeps (batch_topk: mean over the batch)
    prefixes: tuple[int, ...] = ()  # Matryoshka: sizes of the nested dictionaries, the last one `latents`
    subtract_bias: bool = True  # the encoder reads x - b_dec
    decoder: str = "unit"  # `unit`: every latent's decoder has norm 1 in every head; `free`
    penalty: str = "l1"  # relu, gated: l1; jumprelu: l0 or tanh
    weigh_codes: bool = True  # penalties see z |W_dec|, what a latent adds to the reconstruction, and not z alone
    p_end: float = 1.0  # relu, gated: the penalty's exponent falls from 1 to this over training (1: plain l1)
    p_stages: int = 10  # in so many steps
    tanh_scale: float = 4.0  # c of tanh(c z |W_dec|)
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
        for name in ("p_end", "bandwidth", "threshold_init", "tanh_scale"):
            if not getattr(self, name) > 0:
                raise InputError(f"config field {name} is {getattr(self, name)!r}; it must be positive")
        if self.activation == "jumprelu" and self.penalty == "l1":
            raise InputError("a jumprelu dictionary needs the penalty l0 or tanh; l1 gives its threshold no gradient")
        if self.activation in ("relu", "gated") and self.penalty != "l1":
            raise InputError(f"penalty {self.penalty} is for jumprelu; {self.activation} dictionaries take l1")
        if self.activation == "gated" and self.prefixes:
            raise InputError("nested prefixes are for relu, topk, batch_topk and jumprelu dictionaries, not for gated")
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
    lr_decay: float = 0.2  # share at the end over which it falls to 0
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
        for name in ("lr_warmup", "lr_decay", "sparsity_warmup", "threshold_decay"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"config field {name} is {getattr(self, name)!r}; it must lie in [0, 1]")
        if self.aux_norm not in ("variance", "none"):
            raise InputError(f"config field aux_norm is {self.aux_norm!r}; choose one of variance, none")
        for name in ("aux_k", "clip"):
            if getattr(self, name) < 0:
                raise InputError(f"config field {name} is {getattr(self, name)}; it must not be negative")
