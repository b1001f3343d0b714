"""The gradients that `sae_jax.losses` writes by hand, against what JAX derives from the plain expressions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import dictionary, losses
from sae_jax.config import DictionaryConfig

B, F, D, H = 7, 12, 5, 3


def arrays(*shapes):
    generator = np.random.default_rng(4)
    return [jnp.asarray(generator.standard_normal(shape).astype(np.float32)) for shape in shapes]


def same(ours, plain, args, weight, atol=1e-6):
    """Values and gradients of weight . f(args)."""
    np.testing.assert_allclose(ours(*args), plain(*args), atol=atol)
    found, expected = (jax.grad(lambda *a, h=h: (h(*a) * weight).sum(), range(len(args)))(*args) for h in (ours, plain))
    for one, other in zip(found, expected, strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one, other, atol=atol)


def test_a_decoded_head():
    f_BF, W_FD, weight_BD = arrays((B, F), (F, D), (B, D))
    same(losses._decoded, jnp.matmul, (f_BF, W_FD), weight_BD, atol=1e-5)


def test_a_sum_of_tanh():
    f_BF, n_F, weight_F = arrays((B, F), (F,), (F,))
    same(losses._tanh_rows, lambda f, n: jnp.tanh(f * n[None]).sum(0), (f_BF, n_F), weight_F)


@pytest.mark.parametrize("wanted", [True, False])
def test_what_is_short_of_a_gate(wanted):
    pre_BF, log_F, norm_F, weight_F = arrays((B, F), (F,), (F,), (F,))
    norm_F, tau_F = jnp.abs(norm_F), jnp.exp(log_F)

    def ours(pre_BF, tau_F):
        return losses._short(pre_BF, tau_F, norm_F, jnp.asarray(wanted))

    if wanted:
        same(ours, lambda pre, tau: jax.nn.relu(tau[None] - pre * norm_F[None]).mean(0), (pre_BF, tau_F), weight_F)
    else:
        assert not ours(pre_BF, tau_F).any()
        of_tau_F = jax.grad(lambda tau_F: (ours(pre_BF, tau_F) * weight_F).sum())(tau_F)
        assert not of_tau_F.any()


@pytest.mark.parametrize("aggregate", ["sum", "mean"])
@pytest.mark.parametrize("activation", ["jumprelu", "gated"])
def test_pre_activations_of_the_loss(aggregate, activation):
    penalty = "tanh" if activation == "jumprelu" else "l1"
    cfg = DictionaryConfig(D, F, H, activation=activation, penalty=penalty, aggregate=aggregate)
    x_BHD, W_HFD, b_F, b_HD, weight_BF = arrays((B, H, D), (H, F, D), (F,), (H, D), (B, F))

    def with_params(f):
        return lambda W_HFD, b_HD: f({"W_enc": W_HFD, "b_enc": b_F, "b_dec": b_HD}, x_BHD, cfg)

    args = (W_HFD, b_HD)
    same(with_params(losses._pre), with_params(dictionary.pre_activations), args, weight_BF, atol=2e-5)
