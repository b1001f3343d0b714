"""`config.gpt_mini` is the gpt-mini of karpathy's minGPT (the model of arXiv 2311.12786), on the same weights.

Extra letter: P rows of the position table.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax import config, objectives, transformer

D, L, V, P = 192, 6, 23, 16  # width, layers, vocabulary, block size (cut from 256: more rows of the same table)
CFG = config.gpt_mini(V, max_len=P)
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# minGPT's names and shapes, in the order in which the weights are drawn
SHAPES = {"transformer.wte.weight": (V, D), "transformer.wpe.weight": (P, D)}
for n in range(L):
    for name, *shape in (
        ("ln_1", D), ("attn.c_attn", 3 * D, D), ("attn.c_proj", D, D), ("ln_2", D), ("mlp.c_fc", 4 * D, D),
        ("mlp.c_proj", D, 4 * D),
    ):  # fmt: skip
        SHAPES |= {f"transformer.h.{n}.{name}.weight": tuple(shape), f"transformer.h.{n}.{name}.bias": (shape[0],)}
SHAPES |= {"transformer.ln_f.weight": (D,), "transformer.ln_f.bias": (D,), "lm_head.weight": (V, D)}

# What the PyTorch model below says in float64: logits at positions 0, 6 and 12 of both rows for tokens 0, 11 and 22;
# the loss
GOLDEN_LOGITS = np.array([
    -0.807241, 1.246190, -0.103070, -0.508441, 1.467182, -0.470272, -0.479241, 1.413080, -0.885246,
    -0.740311, 0.473809, -0.570692, -1.895828, 0.968356, 0.415831, -1.389437, 1.276280, -0.032840,
])  # fmt: skip
GOLDEN_LOSS = 3.326926


def make_state() -> dict[str, np.ndarray]:
    """minGPT's state dict; norm weights around 1. `RandomState` draws the same in every version of NumPy."""
    rng = np.random.RandomState(0)
    state = {name: rng.uniform(-0.1, 0.1, shape).astype(np.float32) for name, shape in SHAPES.items()}
    return {name: leaf + np.float32(".ln_" in name and name.endswith("weight")) for name, leaf in state.items()}


def make_ids() -> np.ndarray:
    return np.random.RandomState(1).randint(0, V, (2, 13)).astype(np.int32)


def ours(state) -> transformer.Params:
    """minGPT's weights (or their gradients) as our parameters."""

    def stack(name):
        return np.stack([state[f"transformer.h.{n}.{name}"] for n in range(L)])

    def dense(name):
        return {"kernel": stack(f"{name}.weight").swapaxes(1, 2), "bias": stack(f"{name}.bias")}

    def norm(name):
        return {"scale": stack(f"{name}.weight"), "bias": stack(f"{name}.bias")}

    read = dense("attn.c_attn")
    q, k, v = ({name: leaf[..., i * D : (i + 1) * D] for name, leaf in read.items()} for i in range(3))
    return {
        "embed": {"token": state["transformer.wte.weight"], "position": state["transformer.wpe.weight"]},
        "blocks": {
            "norm_attn": norm("ln_1"),
            "attn": {"q": q, "k": k, "v": v, "out": dense("attn.c_proj")},
            "norm_mlp": norm("ln_2"),
            "mlp": {"in": dense("mlp.c_fc"), "out": dense("mlp.c_proj")},
        },
        "final_norm": {"scale": state["transformer.ln_f.weight"], "bias": state["transformer.ln_f.bias"]},
        "head": {"kernel": state["lm_head.weight"].T},
    }


@quick
def run(params, ids_BT):
    """Logits [B, T, V], the mean next-token loss and its gradient."""

    def mean(params):
        batch = {"ids": ids_BT, "valid": jnp.ones(ids_BT.shape[0], bool), "row": jnp.arange(ids_BT.shape[0])}
        loss, sums = objectives.next_token(CFG)(params, batch, None)
        return loss / sums["count"]

    logits_BTV = transformer.head(params, transformer.forward(params, ids_BT, CFG)[0], CFG)
    return logits_BTV, *jax.value_and_grad(mean)(params)


@pytest.fixture(scope="module")
def found():
    return jax.device_get(run(jax.tree.map(jnp.asarray, ours(make_state())), jnp.asarray(make_ids())))


def test_logits_and_loss_are_those_of_mingpt(found):
    logits_BTV, loss, _ = found
    np.testing.assert_allclose(logits_BTV[:, ::6, ::11].ravel(), GOLDEN_LOGITS, rtol=0, atol=1e-5)
    assert loss == pytest.approx(GOLDEN_LOSS, abs=1e-5)


def make_mingpt(torch):
    """minGPT's modules under its names, without dropout."""
    nn, F = torch.nn, torch.nn.functional

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn, self.c_proj = nn.Linear(D, 3 * D), nn.Linear(D, D)

        def forward(self, x):
            B, T, _ = x.shape
            q, k, v = (part.view(B, T, 6, D // 6).transpose(1, 2) for part in self.c_attn(x).split(D, dim=2))
            scores = (q @ k.transpose(-2, -1)) / math.sqrt(D // 6)
            seen = torch.tril(torch.ones(T, T)) == 1
            pattern = F.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
            return self.c_proj((pattern @ v).transpose(1, 2).reshape(B, T, D))

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_fc, self.c_proj = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

        def forward(self, x):
            x = self.c_fc(x)
            return self.c_proj(0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.attn, self.ln_2, self.mlp = nn.LayerNorm(D), Attention(), nn.LayerNorm(D), Mlp()

        def forward(self, x):
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            layers = {"wte": nn.Embedding(V, D), "wpe": nn.Embedding(P, D)}
            layers |= {"h": nn.ModuleList(Block() for _ in range(L)), "ln_f": nn.LayerNorm(D)}
            self.transformer, self.lm_head = nn.ModuleDict(layers), nn.Linear(D, V, bias=False)

        def forward(self, ids):
            x = self.transformer.wte(ids) + self.transformer.wpe(torch.arange(ids.shape[1]))
            for block in self.transformer.h:
                x = block(x)
            return self.lm_head(self.transformer.ln_f(x))

    return GPT()


@pytest.mark.parity
def test_logits_loss_and_gradients_are_those_of_pytorch(found):
    torch = pytest.importorskip("torch")
    model = make_mingpt(torch)
    model.load_state_dict({name: torch.from_numpy(leaf) for name, leaf in make_state().items()})  # names and shapes too
    ids = torch.from_numpy(make_ids()).long()
    logits = model(ids)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1))
    loss.backward()
    slope = ours({name: leaf.grad.numpy() for name, leaf in model.named_parameters()})
    logits = logits.detach().numpy()

    assert np.abs(logits).max() > 1
    np.testing.assert_allclose(found[0], logits, rtol=0, atol=1e-5)
    assert float(found[1]) == pytest.approx(loss.item(), abs=1e-5)
    assert jax.tree.structure(found[2]) == jax.tree.structure(slope)
    for (path, expected), leaf in zip(
        jax.tree_util.tree_leaves_with_path(slope), jax.tree.leaves(found[2]), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        scale = np.abs(slope["blocks"]["attn"]["k"]["kernel"] if name.endswith("k.bias") else expected).max()
        assert scale > 1e-5, name  # of the keys' bias there is rounding only: its gradient is 0
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-4 * scale, err_msg=name)
    np.testing.assert_allclose(logits[:, ::6, ::11].ravel(), GOLDEN_LOGITS, rtol=0, atol=1e-5)
    assert loss.item() == pytest.approx(GOLDEN_LOSS, abs=1e-5)


def test_sizes_and_initialisation_are_those_of_mingpt():
    """2.67 M parameters in the blocks, "close to 3 M"; normal(0, 0.02), residual projections 0.02 / sqrt(2 * 6)."""
    cfg = config.gpt_mini(V)
    shapes = jax.eval_shape(lambda key: transformer.init(key, cfg), jax.random.key(0))
    assert transformer.num_params(shapes["blocks"]) == 6 * (12 * 192**2 + 13 * 192) == 2_669_184
    assert transformer.num_params(shapes) == 2_669_184 + (2 * V + 256 + 2) * 192
    params = jax.device_get(quick(transformer.init, static_argnums=1)(jax.random.key(0), cfg))
    seen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.endswith(("bias", "scale")):
            assert (leaf == float(name.endswith("scale"))).all(), name
            continue
        std = 0.02 / math.sqrt(12) if name.endswith("out.kernel") else 0.02
        seen.add(std)
        assert abs(leaf.std() / std - 1) < 5 / math.sqrt(2 * leaf.size), name
        assert abs(leaf.mean()) < 5 * std / math.sqrt(leaf.size), name
    assert len(seen) == 2
