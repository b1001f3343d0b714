"""Makes bert.npz: weights, inputs, logits, loss and gradients of a small Hugging Face BertForMaskedLM.

    pip install -e ".[parity]" && python tests/golden/make_bert.py

The weights are larger than BERT's initialisation, so that attention is not flat and every nonlinearity is exercised.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM

CONFIG = dict(
    vocab_size=101,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=48,
    max_position_embeddings=20,
    type_vocab_size=2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def make(config: dict, seed: int, rows: int, length: int) -> dict[str, np.ndarray]:
    """State dict (`weight/...`), inputs, masked-LM labels, logits, mean loss and gradients (`grad/...`)."""
    torch.manual_seed(seed)
    model = BertForMaskedLM(BertConfig(**config, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    # id 0 is the padding row, whose look-ups get no gradient in torch (they do in ours); it is left to the decoder
    ids = torch.randint(1, config["vocab_size"], (rows, length))
    types = torch.randint(2, (rows, length))
    lengths = torch.linspace(length, length // 3, rows).long()
    attention = (torch.arange(length)[None] < lengths[:, None]).long()
    labels = torch.where((torch.rand(rows, length) < 0.3) & (attention == 1), ids, -100)
    out = model(input_ids=ids, token_type_ids=types, attention_mask=attention, labels=labels)
    out.loss.backward()
    arrays = {"ids": ids, "types": types, "attention": attention, "labels": labels}
    arrays |= {"logits": out.logits.detach(), "loss": out.loss.detach()}
    arrays |= {f"weight/{name}": value for name, value in model.state_dict().items()}
    arrays |= {f"grad/{name}": value.grad for name, value in model.named_parameters()}
    return {name: value.numpy() for name, value in arrays.items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("bert.npz"), **make(CONFIG, seed=0, rows=4, length=18))
