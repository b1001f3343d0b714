"""One format for every kind; nothing is cast, guessed or overwritten in silence."""

import dataclasses
import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from bert6_jax import checkpoint, parallel
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError

CFG = TransformerConfig(vocab_size=30, width=8, blocks=2, heads=2, head_width=4, mlp_width=16, max_len=8)


def tree():
    return {
        "embed": {"token": jnp.arange(12.0).reshape(4, 3), "half": jnp.ones((2, 2), jnp.bfloat16) / 3},
        "empty": {},
        "count": jnp.asarray(7, jnp.int32),
    }


def save(path, **changes):
    options = dict(kind="transformer", config=dataclasses.asdict(CFG), step=12, tokenizer={"sha256": "abc"})
    return checkpoint.save(path, tree(), **(options | changes))


@pytest.mark.parametrize("kind", checkpoint.KINDS)
def test_every_kind_round_trips_bit_for_bit(tmp_path, kind):
    save(tmp_path / "c", kind=kind, extra={"scales": [1.5]})
    loaded = checkpoint.load(tmp_path / "c")
    assert (loaded.kind, loaded.step, loaded.tokenizer, loaded.extra) == (
        kind,
        12,
        {"sha256": "abc"},
        {"scales": [1.5]},
    )
    assert loaded.versions["jax"] == jax.__version__ and loaded.config == dataclasses.asdict(CFG)
    assert jax.tree.structure(loaded.tree) == jax.tree.structure(tree())
    for a, b in zip(jax.tree.leaves(loaded.tree), jax.tree.leaves(tree()), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    if kind == "transformer":
        params, cfg, _ = checkpoint.load_transformer(tmp_path / "c")
        assert cfg == CFG


def test_sharded_in_one_layout_out_in_another(tmp_path):
    mesh = parallel.make_mesh(4)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    checkpoint.save(tmp_path / "c", {"x": jax.device_put(jnp.arange(8.0), rows)}, kind="dictionary", config={})
    loaded = checkpoint.load(tmp_path / "c").tree["x"]
    assert len(loaded.sharding.device_set) == 1
    again = checkpoint.load(tmp_path / "c", sharding=parallel.replicated(mesh)).tree["x"]
    assert len(again.sharding.device_set) == 4
    np.testing.assert_array_equal(again, np.arange(8.0))


def one_line(path, match, **options):
    with pytest.raises(InputError, match=match) as caught:
        checkpoint.load(path, **options)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_another_kind_shape_or_dtype_is_refused(tmp_path):
    save(tmp_path / "c")
    one_line(tmp_path / "c", "'transformer', 'readout' was asked", kind="readout")
    narrow = tree() | {"count": jnp.zeros((2,), jnp.int32)}
    one_line(tmp_path / "c", r"count is int32\[\], expected int32\[2\]", like=narrow)
    one_line(tmp_path / "c", "count is int32", like=tree() | {"count": jnp.asarray(7.0)})
    one_line(tmp_path / "c", "extra is missing", like=tree() | {"extra": jnp.zeros(())})
    fewer = tree()
    del fewer["count"]
    one_line(tmp_path / "c", "count is only in", like=fewer)


def test_what_is_no_checkpoint_of_ours_is_named(tmp_path):
    one_line(tmp_path / "nothing", "does not exist")
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "file").write_text("x")
    one_line(tmp_path / "junk", "not a checkpoint")
    ocp.save(tmp_path / "foreign", {"x": jnp.zeros(2)})
    one_line(tmp_path / "foreign", "not of this toolkit")
    ocp.save(tmp_path / "later", {"x": jnp.zeros(2)}, custom_metadata={"format": "bert6_jax/99", "kind": "transformer"})
    one_line(tmp_path / "later", "bert6_jax/99")
    save(tmp_path / "config", config={"vocab_size": 3, "colour": "red"})
    with pytest.raises(InputError, match="colour"):
        checkpoint.load_transformer(tmp_path / "config")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tasks that Orbax leaves behind
def test_a_damaged_checkpoint_is_refused(tmp_path):
    save(tmp_path / "c")
    for file in sorted((tmp_path / "c" / "state").rglob("*")):
        if file.is_file() and "/d/" in str(file):
            file.write_bytes(b"garbage")
    one_line(tmp_path / "c", "damaged")


def test_nothing_is_overwritten_and_leaves_are_arrays(tmp_path):
    save(tmp_path / "c")
    with pytest.raises(FileExistsError):
        save(tmp_path / "c")
    with pytest.raises(TypeError, match="a/b is a float"):
        checkpoint.save(tmp_path / "d", {"a": {"b": 1.0}}, kind="adapter", config={})
    with pytest.raises(TypeError, match="string keys"):
        checkpoint.save(tmp_path / "d", {1: jnp.zeros(2)}, kind="adapter", config={})
    with pytest.raises(ValueError, match="kind"):
        checkpoint.save(tmp_path / "d", {}, kind="model", config={})


def test_killed_writers_leave_nothing_that_counts(tmp_path):
    for step in (3, 20):
        save(checkpoint.step_path(tmp_path, step))
    (tmp_path / "step_00000030.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "notes").mkdir()
    assert checkpoint.steps(tmp_path) == [3, 20] and checkpoint.steps(tmp_path / "none") == []
    checkpoint.clean(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["notes", "step_00000003", "step_00000020"]
    checkpoint.clean(tmp_path, keep=20)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["notes", "step_00000020"]


def test_a_full_disk_is_an_os_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing file: No space left on device")

    monkeypatch.setattr(ocp, "save_async", full)
    with pytest.raises(OSError) as caught:
        save(tmp_path / "c")
    assert caught.value.errno == errno.ENOSPC
