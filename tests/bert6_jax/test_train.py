"""The train loop: schedules of the paper, equality over devices, resume after any kill, guards."""

import dataclasses
import functools
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


@pytest.mark.parametrize(("warmup", "rise"), [(0.2, 8), (0.26, 10), (0.0, 1), (1.0, 40)])
def test_a_cosine_with_warm_up_against_its_formula(warmup, rise):
    """arXiv 2311.12786: up over a fifth of the steps, then down to a hundredth of the rate."""
    cfg = train.OptimizerConfig(lr=0.5, schedule="warmup_cosine", warmup=warmup, final=0.01)
    step = np.arange(40)
    rates = jax.vmap(lambda s: train.learning_rate(cfg, s, 40, 40))(jnp.asarray(step))
    done = np.clip((step - rise) / max(40 - rise, 1), 0, 1)
    expected = 0.5 * np.minimum((step + 1) / rise, 0.01 + 0.99 * (1 + np.cos(np.pi * done)) / 2)
    np.testing.assert_allclose(rates, expected, rtol=1e-4)
    np.testing.assert_allclose([rates[0], rates[rise - 1]], [0.5 / rise, 0.5], rtol=1e-6)
    assert float(rates.max()) <= 0.5 and (rise == 40 or (np.diff(rates[rise:]) < 0).all())
    np.testing.assert_allclose(train.learning_rate(cfg, 40, 40, 40), 0.005, rtol=1e-4)  # where the next step would be


def test_log_spaced_steps_by_hand():
    assert train.log_spaced(20) == (0, 1, 2, 4, 8, 16, 20) and train.log_spaced(16) == (0, 1, 2, 4, 8, 16)
    assert train.log_spaced(20, per_octave=2) == (0, 1, 2, 3, 4, 6, 8, 11, 16, 20)
    assert train.log_spaced(5, per_octave=4) == (0, 1, 2, 3, 4, 5) and train.log_spaced(1, per_octave=3) == (0, 1)
    assert train.log_spaced(20, even=4, per_octave=2) == (0, 1, 2, 3, 4, 5, 6, 8, 10, 11, 15, 16, 20)


def test_moments_begin_as_those_of_optax(params):
    cfg = train.OptimizerConfig(b1=0.5, b2=0.6, eps=0.1)
    expected = optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps).init(params)
    found = train.make_optimizer(cfg, STEPS, 5).init(params)[0]
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (ours.dtype, ours.shape, ours.weak_type) == (theirs.dtype, theirs.shape, theirs.weak_type)
        np.testing.assert_array_equal(ours, theirs)


def test_a_step_is_traced_once_and_its_program_stays_what_it_is(params, monkeypatch):
    """Against the program of the same loop that traces the step for its shapes and again for its body."""
    tx, step = make()
    traced = []

    def counted(*args):
        traced.append(1)
        return step(*args)

    state = train.init_state(params, tx, jax.random.key(1))
    batches = jax.tree.map(lambda *x: np.stack(x), *map(batch_at, range(3)))

    def program(many):
        return jax.jit(many).lower(state, batches, 2, None).as_text()

    found = program(train.many_steps(counted))
    assert len(traced) == 1
    with monkeypatch.context() as patch:
        patch.setattr(jax, "jit", lambda fn, **_: fn)
        plain = train.many_steps(step)
    assert program(plain) == found


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


# --- grids ---

GRID_STEPS, NOISE = 12, 0.1


def noisy_loss(trained, frozen, key, data):
    """Half the squared distance from w to where a member wants it, plus noise that the step draws."""
    aim = frozen["aim"] + data["shift"][None] + NOISE * jax.random.normal(key, (2, 3))
    away = trained["w"] - aim
    return 0.5 * (away**2).sum(), {"first": away[0, 0]}


def grid_of(members, rate=None):
    """Where they start and what the step reads; a member is (start, rate, seed, base, shift)."""
    start, lr, seed, base, shift = zip(*members, strict=True)
    falls = np.linspace(1.0, 0.5, GRID_STEPS, dtype=np.float32)
    inputs = {
        "rate": np.array(lr, np.float32)[:, None] * falls[None],
        "seed": np.array(seed, np.uint32),
        "frozen": {"aim": np.array([np.full((2, 3), 1.0), np.arange(6.0).reshape(2, 3)], np.float32)},
        "base": np.array(base, np.int32),
        "data": {"shift": np.array(shift, np.float32)[:, None].repeat(3, 1)},
    }
    return {"w": np.stack([np.full((2, 3), s, np.float32) for s in start])}, inputs


def train_grid(members, tx, chunk=4, devices=1, loop=None, **options):
    trained, inputs = grid_of(members)
    cut = {name: options.pop(name) for name in ("snapshots", "checkpoint_every") if name in options}
    cfg = train.FitConfig(GRID_STEPS // chunk, 2, **cut)
    state = train.init_grid(trained, tx, jax.random.key(0))
    step, mesh = step_of(tx, chunk, devices, loop), parallel.make_mesh(devices)
    return train.fit_grid(step, state, inputs, cfg, mesh, quiet=True, **options)


@functools.cache
def step_of(tx, chunk, devices, loop):
    return train.grid_step(noisy_loss, tx, chunk, parallel.make_mesh(devices), loop)


def plain_grid(members, decay, momentum, clip):
    """The same in NumPy, float64: where members end, and their losses, noise and gradient norms of every step."""
    trained, inputs = grid_of(members)
    ends, seen = [], []
    for g, (_, _, seed, base, _) in enumerate(members):
        w, trace = trained["w"][g].astype(float), 0.0
        aims = inputs["frozen"]["aim"][base] + inputs["data"]["shift"][g]
        for n in range(GRID_STEPS):
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(np.uint32(seed)), n), (2, 3))
            grad = w - aims - NOISE * np.asarray(noise, float)
            seen.append((0.5 * (grad**2).sum(), grad[0, 0], np.sqrt((grad**2).sum())))
            trace = momentum * trace + grad * min(1.0, clip / seen[-1][2]) + decay * w
            w = w - inputs["rate"][g, n] * trace
        ends.append(w)
    return np.array(ends), np.array(seen).reshape(len(members), GRID_STEPS, 3)


# decay needs the parameters and clipping one member's own norm
SGD = optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.3), optax.trace(0.9))
MEMBERS = [(0.0, 0.1, 7, 0, 0.0), (2.0, 0.2, 7, 1, 0.5), (-1.0, 0.05, 2**32 - 1, 0, 1.0), (2.0, 0.0, 8, 1, 0.5)]
ELEVEN = [(0.1 * g, 0.02 * g, g, g % 2, 0.3 * g) for g in range(11)]


@pytest.mark.parametrize(
    ("members", "devices", "loop"), [(MEMBERS, 1, False), (ELEVEN, 4, None)], ids=["four", "eleven"]
)
def test_a_grid_and_its_curves_against_numpy(members, devices, loop):
    """Momentum, decay and clipping, every member by its own seed, rates, base and data; eleven names to tell apart."""
    heard, snapshots = [], {}
    trained, curves = train_grid(
        members, SGD, 4, devices, loop, snapshots=(0, 1, 3),
        on_metrics=lambda number, means: heard.append((number, means)),
        on_snapshot=lambda number, params: snapshots.__setitem__(number, jax.device_get(params)),
    )  # fmt: skip
    ends, seen = plain_grid(members, decay=0.3, momentum=0.9, clip=1.0)
    np.testing.assert_allclose(trained["w"], ends, rtol=1e-5, atol=1e-6)
    assert curves.keys() == {"loss", "first", "finite"} and (curves["finite"] == 1.0).all()
    chunks = seen.reshape(len(members), 3, 4, 3).mean(2)
    np.testing.assert_allclose(curves["loss"], chunks[:, :, 0].T, rtol=1e-4)
    np.testing.assert_allclose(curves["first"], chunks[:, :, 1].T, rtol=1e-4, atol=1e-5)
    assert [number for number, _ in heard] == [1, 2, 3]
    for number, means in heard:
        assert means == pytest.approx({"loss": chunks[:, number - 1, 0].mean(), "finite": 1.0,
                                       "first": chunks[:, number - 1, 1].mean()}, rel=1e-4, abs=1e-5)  # fmt: skip
    assert sorted(snapshots) == [0, 1, 3]
    np.testing.assert_array_equal(snapshots[0]["w"], grid_of(members)[0]["w"])
    np.testing.assert_array_equal(snapshots[3]["w"], trained["w"])


def test_a_grid_of_one_and_any_cut_are_the_same():
    """Alone and in company, on one device and more, in chunks of any size, one after the other or side by side."""
    expected, _ = train_grid(MEMBERS, SGD)
    for chunk, devices, loop in ((4, 2, True), (1, 4, True), (12, 3, True), (4, 1, False)):
        found, _ = train_grid(MEMBERS, SGD, chunk, devices, loop)
        np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-6, err_msg=f"{chunk}, {devices}, {loop}")
    for g, member in enumerate(MEMBERS):
        alone, curves = train_grid([member], SGD, devices=4)
        np.testing.assert_allclose(alone["w"][0], expected["w"][g], rtol=1e-6)
        assert curves["loss"].shape == (3, 1)
    np.testing.assert_array_equal(expected["w"][3], grid_of(MEMBERS)[0]["w"][3])  # its rate is 0


def test_a_grid_killed_in_the_middle_goes_on_to_the_same_end(tmp_path):
    """With momentum and, so that `finite` is kept too, a member that stopped before."""
    members = [*MEMBERS[:3], (0.0, np.inf, 3, 0, 0.0)]
    expected, curves = train_grid(members, SGD)
    begun, heard = [], []

    def noted(number, _):
        heard.append(number)
        if heard == [1, 2]:
            raise ZeroDivisionError

    options = {"folder": tmp_path, "checkpoint_every": 1, "on_start": begun.append, "on_metrics": noted}
    with pytest.raises(ZeroDivisionError):
        train_grid(members, SGD, description={"lr": 1}, **options)
    with pytest.raises(InputError, match="other settings .lr"):
        train_grid(members, SGD, description={"lr": 2}, **options)
    trained, rest = train_grid(members, SGD, description={"lr": 1}, **options)
    assert begun == [0, 1] and heard == [1, 2, 2, 3]  # what was not saved is done again
    np.testing.assert_array_equal(trained["w"], expected["w"])
    assert rest.keys() == curves.keys() and curves["finite"][:, 3].tolist() == [0.0] * 3
    for name, values in curves.items():
        np.testing.assert_array_equal(rest[name], values[1:], err_msg=name)


def test_a_member_that_diverges_stops_and_the_others_do_not_notice():
    wild = [*MEMBERS[:2], (0.0, 1e30, 3, 0, 0.0)]
    tx = optax.trace(0.9)
    snapshots = []
    trained, curves = train_grid(
        wild, tx, 2, snapshots=tuple(range(7)), on_snapshot=lambda _, params: snapshots.append(jax.device_get(params))
    )
    expected, calm = train_grid(wild[:2], tx, 2)
    np.testing.assert_array_equal(trained["w"][:2], expected["w"])
    np.testing.assert_array_equal(curves["loss"][:, :2], calm["loss"])
    assert (curves["finite"][:, :2] == 1.0).all() and (np.diff(curves["finite"][:, 2]) <= 0).all()
    first = int(curves["finite"][:, 2].argmin())
    assert curves["finite"][first, 2] == 0.0 and first < 5
    assert np.isfinite(trained["w"]).all() and np.isfinite(curves["loss"]).all()
    for snapshot in snapshots[first + 1 :]:
        np.testing.assert_array_equal(snapshot["w"][2], trained["w"][2])
    assert (curves["loss"][first + 1 :, 2] == 0.0).all()
    none, _ = train_grid([wild[2]] * 2, tx, 2)  # nobody is left: the grid ends, with what there was
    np.testing.assert_array_equal(none["w"], trained["w"][[2, 2]])


def test_a_gradient_that_is_not_finite_stops_a_member_too():
    """Though its loss is: a root at 0."""
    loss = lambda trained, frozen, key, data: (jnp.sqrt(trained["x"]), {})  # noqa: E731
    step = jax.jit(train.grid_step(loss, optax.identity(), 3, parallel.make_mesh(1)))
    state = train.init_grid({"x": np.array([0.0, 1.0], np.float32)}, optax.identity(), jax.random.key(0))
    inputs = {"rate": np.full((2, 3), 0.1, np.float32), "seed": np.zeros(2, np.uint32), "frozen": {},
              "base": np.zeros(2, np.int32), "data": {}}  # fmt: skip
    state, metrics = step(state, None, inputs)
    assert float(state.params["x"][0]) == 0.0 and 0.8 < float(state.params["x"][1]) < 0.86
    assert state.opt_state["finite"].tolist() == [False, True]
    assert [float(metrics[f"finite_{g}"]) for g in range(2)] == [0.0, 1.0] and float(metrics["loss_0"]) == 0.0
    assert float(metrics["loss"]) == float(metrics["loss_1"]) > 0.9


def test_rates_are_data():
    """One compiled step for every rate."""
    mesh = parallel.make_mesh(1)
    step = jax.jit(train.grid_step(noisy_loss, SGD, 4, mesh))
    trained, inputs = grid_of(MEMBERS)
    state = train.init_grid(trained, SGD, jax.random.key(0))
    ends = [step(state, None, inputs | {"rate": inputs["rate"] * np.float32(f)})[0].params["w"] for f in (1, 2, 0)]
    assert step._cache_size() == 1
    np.testing.assert_array_equal(ends[2], trained["w"])
    assert (np.abs(ends[1] - ends[0])[:3] > 1e-3).any((1, 2)).all()


# --- members over devices ---


@pytest.mark.parametrize(("G", "devices"), [(1, 4), (3, 1), (3, 2), (4, 4), (5, 4)])
def test_members_over_devices_keep_their_order(G, devices):
    """Also where they do not divide; trees with keys and truth values among the leaves."""
    rng = np.random.default_rng(G)
    members = {
        "x": jnp.asarray(rng.normal(size=(G, 2)), jnp.float32),
        "on": jnp.arange(G) % 2 == 0,
        "key": jax.random.split(jax.random.key(0), G),
    }
    shared = jnp.asarray([[1.0, 2.0], [3.0, -1.0]], jnp.float32)

    def fn(matrix, member):
        y = jnp.where(member["on"], jnp.matmul(matrix, member["x"]), 0.0)
        return {"y": y, "draw": jax.random.randint(member["key"], (), 0, 1_000_000)}

    for loop in (True, False):
        found = jax.jit(parallel.over_members(fn, parallel.make_mesh(devices), loop))(shared, members)
        expected = np.where(np.arange(G)[:, None] % 2 == 0, np.asarray(members["x"]) @ np.asarray(shared).T, 0.0)
        np.testing.assert_allclose(found["y"], expected, rtol=1e-5, atol=1e-6)
        assert found["draw"].tolist() == [int(jax.random.randint(k, (), 0, 1_000_000)) for k in members["key"]]
