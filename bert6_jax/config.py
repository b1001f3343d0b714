"""Frozen configurations of the transformers, and the presets of the papers.

One `TransformerConfig` describes post-LN BERT, pre-LN causal models and the norm-free ReLU transformers that RASP
programs compile to. Field names follow the letters of `bert6_jax`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from bert6_jax.errors import InputError

_CHOICES = {
    "norm": ("post", "pre", "none"),
    "activation": ("gelu", "gelu_tanh", "relu"),
    "head": ("mlm", "linear", "none"),
    "dtype": ("float32", "bfloat16"),
}


@dataclass(frozen=True)
class TransformerConfig:
    """Shape and kind of a transformer; static under `jit`.

    `norm` places the layer norms: after the residual sum (`post`, BERT), before each sublayer with one more at the end
    (`pre`, GPT), or nowhere (`none`). `head` is BERT's masked-LM head (dense, activation, norm, decoder, bias), one
    linear layer, or nothing. `dtype` is the dtype of the matrix products; parameters, softmax, norm statistics and
    logits are float32 always.
    """

    vocab_size: int
    width: int = 768
    blocks: int = 6
    heads: int = 12
    head_width: int = 64
    mlp_width: int = 3072
    max_len: int = 128
    types: int = 2  # token types; 0: no such embedding
    norm: str = "post"
    norm_eps: float = 1e-12
    activation: str = "gelu"
    causal: bool = False
    head: str = "mlm"
    tied: bool = True  # the decoder is the token embedding transposed
    head_bias: bool = True
    dropout: float = 0.0  # after the embedding and after every sublayer
    attention_dropout: float = 0.0
    init_std: float = 0.02
    scaled_residual_init: bool = False  # std / sqrt(2 L) on the matrices that write to the residual stream (GPT-2)
    dtype: str = "float32"

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"config field {name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        for name in ("vocab_size", "width", "blocks", "heads", "head_width", "mlp_width", "max_len"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"config field {name} is {getattr(self, name)!r}; it must be a positive integer")
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"config field {name} is {getattr(self, name)!r}; it must lie in [0, 1)")

    @property
    def depths(self) -> int:
        """M: the embedding output and the output of every block."""
        return self.blocks + 1


def bert6(vocab_size: int = 30_522, **changes) -> TransformerConfig:
    """The papers' BERT-6: six post-LN blocks of 768, 12 heads of 64, 128 positions, dropout 0.1 (arXiv 2507.14871)."""
    return dataclasses.replace(TransformerConfig(vocab_size, dropout=0.1, attention_dropout=0.1), **changes)


def bert6_small(vocab_size: int = 30_522, **changes) -> TransformerConfig:
    """BERT-6 of width 256 (ours): the same six blocks at a size that two CPU cores can train in an hour."""
    small = dict(width=256, heads=4, head_width=64, mlp_width=1024, dropout=0.0, attention_dropout=0.0)
    return dataclasses.replace(bert6(vocab_size), **(small | changes))


def bert6_demo(vocab_size: int, **changes) -> TransformerConfig:
    """BERT-6 of width 64 (ours): learns the embedded corpus in about a minute on two CPU cores."""
    demo = dict(width=64, heads=4, head_width=16, mlp_width=256, max_len=64, dropout=0.0, attention_dropout=0.0)
    return dataclasses.replace(bert6(vocab_size), **(demo | changes))


def gpt_mini(vocab_size: int, **changes) -> TransformerConfig:
    """minGPT's gpt-mini, six pre-LN causal blocks of 192, as in arXiv 2311.12786."""
    mini = TransformerConfig(
        vocab_size,
        width=192,
        heads=6,
        head_width=32,
        mlp_width=768,
        max_len=256,
        types=0,
        norm="pre",
        norm_eps=1e-5,
        activation="gelu_tanh",
        causal=True,
        head="linear",
        tied=False,
        head_bias=False,
        scaled_residual_init=True,
    )
    return dataclasses.replace(mini, **changes)
