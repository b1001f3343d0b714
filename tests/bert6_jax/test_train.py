"""The train loop: schedules of the paper, equality over devices, resume after any kill, guards."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bert6_jax import checkpoint, objectives, parallel, train, transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError
from bert6_jax.masking import MaskingConfig

ROOT = Path(__file__).parents[2]
CFG = TransformerConfig(
    vocab_size=40,
    width=16,
    blocks=2,
    heads=2,
    head_width=8,
    mlp_width=32,
    max_len=12,
    dropout=0.1,
    attention_dropout=0.1,
)
MASKING = MaskingConfig(vocab_size=40, mask_id=4, never=(0, 2, 3), slots=6)
B, STEPS = 8, 20


def batch_at(step):
    rng = np.random.default_rng(step)
    return {
        "ids": rng.integers(5, 40, (B, 12), dtype=np.int32),
        "segment": (np.arange(12)[None] < rng.integers(6, 13, (B, 1))).astype(np.int32),
        "row": np.arange(B, dtype=np.int32) + step,
        "valid": np.arange(B) < (B if step % 3 else B - 2),
    }


@pytest.fixture(scope="module")
def params():
    return jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), CFG)


def make(axis_name=None, lr=1e-2):
    tx = train.make_optimizer(train.OptimizerConfig(lr=lr, schedule="warmup_linear"), STEPS, 5)
    return tx, train.make_step(train.grad_of(objectives.masked_lm(CFG, MASKING)), tx, axis_name)


def fit(params, cfg=None, **options):
    tx, step = make(lr=options.pop("lr", 1e-2))
    losses = {}
    state = train.fit(
        step,
        train.init_state(params, tx, jax.random.key(1)),
        options.pop("batch_at", batch_at),
        cfg or train.FitConfig(STEPS, dispatch=4),
        on_metrics=lambda number, values: losses.__setitem__(number, values["loss"]),
        quiet=True,
        **options,
    )
    return state, np.array([losses[number] for number in sorted(losses)])


@pytest.fixture(scope="module")
def reference(params):
    return fit(params)


# --- schedules and optimiser ---


def test_the_schedule_of_the_paper_steps_once_an_epoch():
    """Sheet, section 3: 5e-5, 4.9e-5, ..., 1e-6 over 50 epochs; main.py: epoch 0 at rate 0."""
    cfg = train.OptimizerConfig()
    rates = [float(train.learning_rate(cfg, epoch * 625 + 300, 31_250, 625)) for epoch in range(50)]
    np.testing.assert_allclose(rates, 5e-5 - 1e-6 * np.arange(50), rtol=1e-5)
    assert float(train.learning_rate(cfg, 624, 31_250, 625)) == float(train.learning_rate(cfg, 0, 31_250, 625))
    main_py = dataclasses.replace(cfg, schedule="epoch_linear_main_py")
    assert float(train.learning_rate(main_py, 100, 31_250, 625)) == 0.0
    np.testing.assert_allclose(float(train.learning_rate(main_py, 625, 31_250, 625)), 5e-5, rtol=1e-6)


def test_warmup_rises_and_falls_to_nearly_zero():
    cfg = train.OptimizerConfig(lr=1.0, schedule="warmup_linear", warmup=0.1)
    rates = np.array([float(train.learning_rate(cfg, step, 100, 10)) for step in range(100)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(rates[10:], np.arange(90, 0, -1) / 90, rtol=1e-5)
    with pytest.raises(InputError, match="schedule"):
        train.learning_rate(train.OptimizerConfig(schedule="exponential"), 0, 1, 1)


def test_the_optimiser_is_adamw_with_decay_on_everything():
    """Against Optax's own AdamW under a constant rate; decay on biases and norms too (recipe of the paper)."""
    cfg = train.OptimizerConfig(lr=1e-2, schedule="constant", weight_decay=0.1)
    ours, theirs = train.make_optimizer(cfg, 10, 5), optax.adamw(1e-2, weight_decay=0.1)
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.full((2,), 2.0)}
    states, trees = [ours.init(params), theirs.init(params)], [params, params]
    with jax.numpy_dtype_promotion("standard"):
        for number in range(4):
            for i, tx in enumerate((ours, theirs)):
                grads = jax.tree.map(lambda p, n=number: jnp.sin(p + n), trees[i])
                updates, states[i] = tx.update(grads, states[i], trees[i])
                trees[i] = optax.apply_updates(trees[i], updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *trees)


# --- any device count ---


@pytest.mark.parametrize("data, model", [(4, 1), (2, 2), (1, 4)])
def test_any_mesh_gives_the_same_losses(params, reference, data, model):
    """20 steps, dropout and partial batches included, to 1e-5 relative."""
    state, losses = fit(params, mesh=parallel.make_mesh(data, model))
    np.testing.assert_allclose(losses, reference[1], rtol=1e-5)
    kernel = state.params["blocks"]["mlp"]["in"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[-1] == 32 // model


def distributed(params, run, devices):
    """20 steps of the step with an axis name, batches cut by hand."""
    tx, step = make("data")
    state = train.init_state(params, tx, jax.random.key(1))
    losses = []
    for number in range(STEPS):
        cut = jax.tree.map(lambda x: jnp.asarray(x).reshape(devices, -1, *x.shape[1:]), batch_at(number))
        state, loss = run(step, state, cut)
        losses.append(loss)
    return np.array(losses)


@pytest.mark.parametrize("devices", [1, 4])
def test_pmap_of_the_same_step_gives_the_same_losses(params, reference, devices):
    np.testing.assert_allclose(distributed(params, pmap_run(devices), devices), reference[1], rtol=1e-5)


def test_shard_map_of_the_same_step_gives_the_same_losses(params, reference):
    from jax.sharding import PartitionSpec as P

    mesh, compiled = parallel.make_mesh(4), {}

    def run(step, state, batch):
        if "step" not in compiled:
            local = lambda state, batch: step(state, jax.tree.map(lambda x: x[0], batch))  # noqa: E731
            compiled["step"] = jax.jit(
                jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
            )
        state, metrics = compiled["step"](state, batch)
        return state, float(metrics["loss"] / metrics["count"])

    np.testing.assert_allclose(distributed(params, run, 4), reference[1], rtol=1e-5)


def test_eight_devices_in_their_own_process(reference):
    code = f"""
        import jax
        jax.config.update("jax_num_cpu_devices", 8)
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
        import numpy as np
        import test_train as t
        from bert6_jax import parallel, transformer
        params = jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), t.CFG)
        assert jax.device_count() == 8
        print(*t.fit(params, mesh=parallel.make_mesh(8))[1])
        print(*(lambda run: t.distributed(params, run, 8))(t.pmap_run(8)))
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    for line in out.stdout.splitlines():
        np.testing.assert_allclose(np.array(line.split(), float), reference[1], rtol=1e-5)


def pmap_run(devices):
    compiled = {}

    def run(step, state, batch):
        if "step" not in compiled:
            compiled["step"] = jax.pmap(step, axis_name="data", devices=jax.devices()[:devices])
            state = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (devices, *x.shape)), state)
        state, metrics = compiled["step"](state, batch)
        return state, float(metrics["loss"][0] / metrics["count"][0])

    return run


def test_a_batch_that_does_not_divide_is_refused(params):
    with pytest.raises(InputError, match="batch size 8"):
        fit(params, mesh=parallel.make_mesh(3))
    with pytest.raises(InputError, match="fewer"):
        parallel.make_mesh(5)


# --- cutting and resuming ---


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_how_a_run_is_cut_does_not_change_a_bit(params, reference, tmp_path):
    seen = []
    cfg = train.FitConfig(STEPS, dispatch=4, checkpoint_every=3, snapshots=train.log_spaced(STEPS))
    state, losses = fit(
        params, cfg, folder=tmp_path, on_snapshot=lambda step, p: seen.append((step, jax.tree.map(np.asarray, p)))
    )
    assert_same_bits(state.params, reference[0].params)
    assert [step for step, _ in seen] == [0, 1, 2, 4, 8, 16, 20]
    assert_same_bits(seen[0][1], params)
    assert_same_bits(seen[-1][1], state.params)
    assert checkpoint.steps(tmp_path) == [STEPS]  # older ones are gone, the last is kept
    again, losses = fit(params, cfg, folder=tmp_path)
    assert len(losses) == 0
    assert_same_bits(again, state)


SCRIPT = """
    import sys
    sys.path[:0] = [{root!r}, {here!r}]
    import os, signal
    import jax
    jax.config.update("jax_num_cpu_devices", 4)
    import time
    import numpy as np
    import test_train as t
    from bert6_jax import checkpoint, train, transformer
    params = jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), t.CFG)
    def batch_at(step):
        if step == int(sys.argv[2]):
            while not checkpoint.steps(sys.argv[1]):  # the write is in the background: let there be one
                time.sleep(0.02)
            os.kill(os.getpid(), int(sys.argv[3]))
        return t.batch_at(step)
    state, losses = t.fit(
        params, train.FitConfig(t.STEPS, dispatch=2, checkpoint_every=4), folder=sys.argv[1], batch_at=batch_at
    )
    np.savez(sys.argv[1] + "/end.npz", *map(np.asarray, jax.tree.leaves(state)))
"""


def run_script(folder, step, signum):
    code = textwrap.dedent(SCRIPT.format(root=str(ROOT), here=str(Path(__file__).parent)))
    return subprocess.run(
        [sys.executable, "-c", code, str(folder), str(step), str(int(signum))],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_killed_at_several_moments_it_ends_with_the_same_bits(tmp_path, reference):
    """SIGKILL while step 7, then 14 are prepared, SIGTERM at 17; the fourth start finishes."""
    for step, signum, code in ((7, signal.SIGKILL, -9), (14, signal.SIGKILL, -9), (17, signal.SIGTERM, -15)):
        done = run_script(tmp_path, step, signum)
        assert done.returncode == code, done.stderr
        saved = checkpoint.steps(tmp_path)
        assert saved and saved[-1] < STEPS
    assert saved[-1] == 18  # the dispatch under way was finished and saved before the process obeyed SIGTERM
    done = run_script(tmp_path, -1, 0)
    assert done.returncode == 0, done.stderr
    end = np.load(tmp_path / "end.npz")
    assert_same_bits([end[name] for name in end.files], list(map(np.asarray, jax.tree.leaves(reference[0]))))


def test_killed_while_a_checkpoint_is_written_nothing_is_lost(params, reference, tmp_path):
    """Whatever a killed writer leaves (a temporary folder, a folder without commit) is passed over."""
    cfg = train.FitConfig(STEPS, dispatch=4, checkpoint_every=8)
    with pytest.raises(ZeroDivisionError):
        fit(params, cfg, folder=tmp_path, batch_at=lambda step: batch_at(step) if step < 18 else 1 / 0)
    (tmp_path / "step_00000020.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "step_00000020.orbax-checkpoint-tmp" / "half").write_bytes(b"\\0" * 10)
    state, losses = fit(params, cfg, folder=tmp_path)
    assert len(losses) == STEPS - 16
    assert_same_bits(state.params, reference[0].params)
    assert not list(tmp_path.glob("*tmp*"))


def test_other_settings_or_another_model_do_not_resume(params, tmp_path):
    cfg = train.FitConfig(STEPS, dispatch=4)
    fit(params, cfg, folder=tmp_path, description={"lr": 1})
    with pytest.raises(InputError, match="other settings .lr"):
        fit(params, cfg, folder=tmp_path, description={"lr": 2})
    wider = jax.tree.map(lambda p: jnp.concatenate([p, p], -1), params)
    with pytest.raises(InputError, match="does not fit"):
        fit(wider, cfg, folder=tmp_path, description={"lr": 1})


def test_a_nan_stops_with_a_clear_word_and_is_never_saved(params, tmp_path):
    with pytest.raises(train.Diverged, match=r"at step \d+; lower the learning rate") as caught:
        fit(params, train.FitConfig(STEPS, dispatch=2, checkpoint_every=2), folder=tmp_path, lr=1e30)
    assert "\n" not in str(caught.value)
    for step in checkpoint.steps(tmp_path):
        tree = checkpoint.load(checkpoint.step_path(tmp_path, step)).tree
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree["params"]))


def test_the_caller_keeps_its_parameters(params, reference):
    jax.tree.map(lambda leaf: leaf.block_until_ready(), params)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_a_signal_goes_to_its_owner_after_the_save(params, tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def interrupted(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return batch_at(step)

    with pytest.raises(KeyboardInterrupt):
        fit(params, train.FitConfig(STEPS, dispatch=2), folder=tmp_path, batch_at=interrupted)
    assert checkpoint.steps(tmp_path) == [6] and signal.getsignal(signal.SIGINT) is before


def test_next_token_loss_respects_segments():
    """Against a plain loop; the last token of a document has no successor to predict."""
    cfg = dataclasses.replace(
        CFG, norm="pre", causal=True, head="linear", tied=False, types=0, dropout=0.0, attention_dropout=0.0
    )
    params = jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), cfg)
    ids = np.random.default_rng(0).integers(0, 40, (2, 8)).astype(np.int32)
    segment = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1] * 8], np.int32)
    batch = {"ids": ids, "segment": segment, "row": np.arange(2), "valid": np.array([True, True])}
    _, sums = jax.jit(objectives.next_token(cfg))(params, jax.tree.map(jnp.asarray, batch), jax.random.key(0))
    out, _ = transformer.forward(params, jnp.asarray(ids), cfg, segment_BT=jnp.asarray(segment))
    log_p = np.asarray(jax.nn.log_softmax(transformer.head(params, out, cfg)))
    pairs = [(b, t) for b in range(2) for t in range(7) if segment[b, t] == segment[b, t + 1] > 0]
    assert int(sums["count"]) == len(pairs) == 12
    np.testing.assert_allclose(sums["loss"], -sum(log_p[b, t, ids[b, t + 1]] for b, t in pairs), rtol=1e-5)

    # `predict` marks the tokens that count as targets; all of them is as if it were not there
    predict = np.zeros((2, 8), bool)
    predict[0, [0, 2, 3, 5]] = predict[1, [6, 7]] = True  # the first of a segment has nobody who predicts it
    loss = jax.jit(objectives.next_token(cfg))
    _, marked = loss(params, jax.tree.map(jnp.asarray, batch | {"predict": predict}), jax.random.key(0))
    kept = [(b, t) for b, t in pairs if predict[b, t + 1]]
    assert int(marked["count"]) == len(kept) == 4
    np.testing.assert_allclose(marked["loss"], -sum(log_p[b, t, ids[b, t + 1]] for b, t in kept), rtol=1e-5)
    _, everything = loss(params, jax.tree.map(jnp.asarray, batch | {"predict": predict | True}), jax.random.key(0))
    assert all(float(everything[name]) == float(sums[name]) for name in sums)
