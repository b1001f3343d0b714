"""What both halves of the wrapper study share, against small cases by hand."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from bert6_jax import parallel
from experiments import wrappers_parts as parts


def test_keys_tell_seeds_and_purposes_apart():
    keys = [parts.seeded(*given) for given in ((1,), (2,), (1, 0), (1, 2), (1, 2, 3), (1, 3, 2))]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)
    again = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 2), 3)
    assert jax.random.key_data(keys[4]).tolist() == jax.random.key_data(again).tolist()


def test_a_member_of_a_grid_is_found_by_its_name():
    found = {"accuracy": np.array([[1.0, 2.0], [3.0, 4.0]]), "step": np.array([[0, 20], [0, 40]])}
    of = parts.Tuned(["one", "other"], lambda: None, found).of("other")
    assert {name: values.tolist() for name, values in of.items()} == {"accuracy": [3.0, 4.0], "step": [0, 40]}


def test_rates_rise_and_fall_to_a_share():
    found = parts.rates([0.1, 0.02, 0.1], 40, 0.2, 0.01)
    assert found.shape == (3, 40)
    assert found[0, [0, 7, 8]] == pytest.approx([0.1 / 8, 0.1, 0.1]) and found[0].argmax() in (7, 8)
    middle, done = 24, (24 - 8) / 32
    assert found[0, middle] == pytest.approx(0.1 * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * done))), rel=1e-5)
    np.testing.assert_allclose(found[1], found[0] / 5, rtol=1e-5)
    np.testing.assert_array_equal(found[2], found[0])


def test_steps_until_an_accuracy_is_there():
    steps = np.array([0, 20, 40, 80])
    right = np.array([[0.1, 0.9, 0.2, 1.0], [0.95, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.89]])
    assert parts.steps_to(0.9, steps, right).tolist() == [20.0, 0.0, np.inf]
    assert parts.steps_to(0.1, steps, right).tolist() == [0.0] * 3


def test_the_lift_of_a_weight_is_chosen_on_other_strings():
    scored = np.array([[0.9, 0.2, 0.7, 0.3], [0.0, 0.5, 0.5, 0.1]])  # the second, without K = 0; a tie: the first
    test = np.array([[0.1, 0.9, 0.6, 0.8], [0.4, 0.3, 1.0, 1.0]])
    np.testing.assert_allclose(parts.lift(scored, test), [0.5, -0.1])


def test_probes_read_what_is_there_at_its_depth_and_of_their_own_set():
    """Two labels: the sign of x_0 can be read at depth 0 alone, that of x_1 at depth 1 alone, however small the model;
    the sets of the second seed have their labels turned, so reading another seed's would be wrong."""
    rng, rows = np.random.default_rng(0), (60, 50)
    x = [rng.normal(size=(2, n, 2)).astype(np.float32) for n in rows]
    x = [np.where(x_SB2 < 0, x_SB2 - 1, x_SB2 + 1) for x_SB2 in x]
    answers = [((x_SB2 > 0) ^ np.array([False, True])[:, None, None]).astype(np.int32) for x_SB2 in x]
    answers[0][1, :, 1] = 1 - answers[0][1, :, 1]  # the second seed's second label is turned in training alone
    keep = np.eye(2, dtype=np.float32)[:, None]  # one feature a depth

    def features(x_B2, model):
        return x_B2[None] * keep * model["size"] + model["offset"]

    models = {"size": np.array([1.0, 1e-4, 1.0], np.float32), "offset": np.array([0.0, 1.0, -3.0], np.float32)}
    found_JMP = parts.probe_bank(
        features, models, np.array([0, 0, 1]), x, answers, 2, steps=60, rate=0.05, batch=32, seed=0,
        mesh=parallel.make_mesh(2), label="probe", quiet=True,
    )  # fmt: skip
    assert found_JMP.shape == (3, 2, 2)
    own = found_JMP[:, [0, 1], [0, 1]]  # where the label is
    assert own[:, 0].tolist() == [1.0] * 3 and own[:, 1].tolist() == [1.0, 1.0, 0.0]
    assert (np.abs(found_JMP[:, [0, 1], [1, 0]] - 0.5) < 0.3).all()
