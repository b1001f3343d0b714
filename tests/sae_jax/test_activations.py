"""Harvest against `transformer.forward`; what streams and shards serve, token by token."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bert6_jax import transformer
from bert6_jax.config import TransformerConfig
from bert6_jax.errors import InputError
from sae_jax import activations
from sae_jax.activations import Stream

POST = TransformerConfig(20, width=8, blocks=2, heads=2, head_width=4, mlp_width=6, max_len=6, head="none")
PRE = dataclasses.replace(POST, norm="pre", causal=True, types=0)
N, T = 7, 6


def models(cfg, X=2):
    """Random parameters of X models, larger than a start's: nothing is nearly linear."""
    rng = np.random.default_rng(0)
    like = jax.eval_shape(lambda: transformer.init(jax.random.key(0), cfg))
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=(X, *leaf.shape)), jnp.float32), like)


def text(seed=0):
    """Ids and segments: packed documents, padding at the end, one row of padding alone."""
    rng = np.random.default_rng(seed)
    length = np.array([6, 4, 6, 0, 3, 6, 1])
    segment = (np.arange(T)[None] < length[:, None]).astype(np.int32)
    segment[0, 3:] = 2
    return rng.integers(1, 20, (N, T)).astype(np.int32), segment


# --- harvest ---


@pytest.mark.parametrize("cfg", [POST, PRE], ids=["post", "pre"])
def test_harvested_is_what_the_forward_pass_returns(cfg):
    """Any names and depths in the order asked for, heads side by side; several models each as if alone."""
    sites = (("resid", 2), ("z", 1), ("resid", 0), ("attn_out", 0), ("mlp_out", 1), ("q", 0))
    activations.check_sites(cfg, sites)
    params_X = models(cfg)
    ids, segment = map(jnp.asarray, text())
    batch = {"ids": ids, "segment": segment}
    both = jax.jit(lambda p: activations.harvest_models(p, batch, cfg, sites))(params_X)
    assert both.shape == (N, T, 2 * len(sites), 8)
    forward = jax.jit(lambda p: transformer.forward(p, ids, cfg, segment_BT=segment)[1])
    for x in range(2):
        acts = forward(jax.tree.map(lambda leaf, x=x: leaf[x], params_X))
        for s, (name, depth) in enumerate(sites):
            expected = np.asarray(acts[name][depth])
            if name in "zq":
                expected = np.concatenate([expected[:, :, head] for head in range(2)], axis=-1)
            np.testing.assert_allclose(both[:, :, x * len(sites) + s], expected, rtol=2e-5, atol=2e-5, err_msg=name)
    assert np.abs(np.asarray(both[:, :, :6] - both[:, :, 6:])).max() > 0.1


def test_the_residual_stream_has_every_depth():
    assert activations.residual_sites(POST) == (("resid", 0), ("resid", 1), ("resid", 2))


@pytest.mark.parametrize(
    "sites, words",
    [
        ([("residual", 0)], "choose one of"),
        ([("pattern", 0)], "choose one of"),
        ([("resid", 3)], "resid has the depths 0 to 2"),
        ([("z", 2)], "z has the depths 0 to 1"),
        ([("resid", -1)], "depths 0 to 2"),
        ([("resid", 0), ("mlp_post", 0)], "different width"),
        ([], "at least one site"),
    ],
)
def test_sites_that_make_no_bank_are_refused(sites, words):
    with pytest.raises(InputError) as caught:
        activations.check_sites(POST, sites)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_mask_leaves_out_what_it_should():
    ids, segment = text()
    valid = np.arange(N) != 5
    batch = {"ids": ids, "segment": segment, "valid": valid}
    exclude = (int(ids[0, 1]), int(ids[2, 5]))
    mask = np.asarray(jax.jit(lambda b: activations.token_mask(b, exclude, 2))(jax.tree.map(jnp.asarray, batch)))
    for n, t in np.ndindex(N, T):
        assert mask[n, t] == (segment[n, t] > 0 and ids[n, t] not in exclude and t >= 2 and valid[n])
    without = {"ids": ids, "segment": segment}
    np.testing.assert_array_equal(activations.token_mask(jax.tree.map(jnp.asarray, without)), segment > 0)


# --- streams ---


def planted(params_X, batch, cfg, sites):
    """In place of a model: every token's activation is its id, which is its number in the text."""
    return jnp.broadcast_to(batch["ids"][..., None, None], (*batch["ids"].shape, len(sites), 2)).astype(jnp.float32)


def numbered():
    _, segment = text()
    return np.arange(1, N * T + 1, dtype=np.int32).reshape(N, T), segment


def serve(stream, seed, steps, order=None):
    """(numbers served [steps, batch], the source at the end, buffered counts before each step)."""
    ids, segment = numbered()
    tokens = activations.token_rows(ids, segment, np.arange(N) if order is None else order)
    source, frozen = activations.open_stream(stream, models(POST, 1), tokens, seed)
    step = jax.jit(activations.streaming(stream))
    served, counts = [], []
    for number in range(steps):
        counts.append(int(source["count"]))
        source, x_BSD = step(source, activations.no_batch(number), frozen)
        assert x_BSD.shape == (stream.batch, len(stream.sites), 2)
        assert (np.asarray(x_BSD) == np.asarray(x_BSD)[:, :1, :1]).all()  # a row is one token at every site
        served.append(np.asarray(x_BSD[:, 0, 0]).astype(int))
    return np.array(served), source, counts


STREAM = Stream(POST, (("resid", 0), ("resid", 1)), rows=3, capacity=40, batch=5, exclude=(2, 13), first=1)


@pytest.mark.parametrize("change", [{}, {"capacity": 23, "rows": 3}, {"rows": 1, "batch": 16, "exclude": ()}])
def test_a_stream_serves_every_allowed_token_once_a_pass(monkeypatch, change):
    """What was served and what waits are together the first tokens of the text, read round and round: nothing twice,
    nothing lost, nothing masked (7 rows do not divide into passes of 3)."""
    monkeypatch.setattr(activations, "harvest_models", planted)
    stream, order = STREAM._replace(**change), np.array([4, 2, 0, 6, 1, 3, 5])
    served, source, counts = serve(stream, 0, 30, order)
    ids, segment = numbered()
    allowed = [
        int(ids[n, t])
        for n in order
        for t in range(T)
        if segment[n, t] and t >= 1 and int(ids[n, t]) not in stream.exclude
    ]
    waiting = np.asarray(source["x"][: int(source["count"]), 0, 0]).astype(int)
    total = served.size + len(waiting)
    assert total > 4 * len(allowed)
    read = Counter((allowed * (total // len(allowed) + 1))[:total])
    assert Counter(served.ravel().tolist()) + Counter(waiting.tolist()) == read
    assert min(counts) >= 0 and max(counts) <= stream.capacity


def test_a_stream_is_shuffled_by_its_seed(monkeypatch):
    monkeypatch.setattr(activations, "harvest_models", planted)
    stream = STREAM._replace(exclude=())
    one, again, other = (serve(stream, seed, 4)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any() and (np.diff(one.ravel()) < 0).sum() > 3
    assert abs(np.corrcoef(one.ravel(), np.arange(one.size))[0, 1]) < 0.9


def test_a_stream_carries_the_models_activations():
    """Against the forward pass: both models' sites in order, from a buffer in half precision."""
    stream = STREAM._replace(exclude=(), dtype="bfloat16")
    ids, segment = text()
    params_X = models(POST)
    source, frozen = activations.open_stream(stream, params_X, activations.token_rows(ids, segment, np.arange(N)), 0)
    assert source["x"].dtype == jnp.bfloat16
    x_NTSD = activations.harvest_models(
        params_X, {"ids": jnp.asarray(ids), "segment": jnp.asarray(segment)}, POST, stream.sites
    )
    allowed = (segment > 0) & (np.arange(T) >= 1)
    rows = np.asarray(x_NTSD)[allowed].reshape(allowed.sum(), -1)
    for row in np.asarray(source["x"][: int(source["count"])].astype(jnp.float32)).reshape(int(source["count"]), -1):
        assert np.abs(rows - row).max(1).min() < 0.05


@pytest.mark.parametrize(
    "change, words",
    [
        ({"capacity": 22}, "raise the capacity"),
        ({"batch": 500}, "smaller batch"),
        ({"first": T}, "0 tokens are left after the mask"),
        ({"sites": (("resid", 9),)}, "depths 0 to 2"),
    ],
)
def test_streams_that_cannot_flow_are_refused(change, words):
    ids, segment = text()
    tokens = activations.token_rows(ids, segment, np.arange(N))
    with pytest.raises(InputError) as caught:
        activations.open_stream(STREAM._replace(**change), models(POST, 1), tokens, 0)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def broken_models():
    params = models(POST)
    params["blocks"]["mlp"]["out"]["bias"] = params["blocks"]["mlp"]["out"]["bias"].at[1, 0, 0].set(jnp.nan)
    return params


def test_nan_names_the_site_and_the_model(tmp_path):
    ids, segment = text()
    tokens = activations.token_rows(ids, segment, np.arange(N))
    with pytest.raises(InputError, match="resid:1 of model 1 are not finite"):
        activations.open_stream(STREAM, broken_models(), tokens, 0)
    with pytest.raises(InputError, match="resid:1 of model 1 are not finite"):
        write(tmp_path, params=broken_models())
    with pytest.raises(InputError, match="not finished"):
        activations.open_shards(tmp_path)


# --- rows on the device, rows from the host ---


def test_resident_and_given_rows_are_the_rows():
    x = np.arange(30, dtype=np.float32).reshape(5, 2, 3)
    row = np.array([3, 0, 3])
    source, there = activations.resident({"a": 1}, {"row": row}, {"x": jnp.asarray(x)})
    np.testing.assert_array_equal(there, x[row])
    assert source == {"a": 1}
    source, there = activations.given({}, {"x": x}, None)
    assert there is x and source == {}


@pytest.mark.parametrize("rows, batch", [(12, 4), (13, 4), (15, 4), (4, 4)])
def test_row_batches_go_through_all_rows_in_a_new_order(rows, batch):
    """Every pass: full batches of distinct rows; what does not fill one is left out, others the next time."""
    at, full = activations.row_batches(3, rows, batch), rows // batch
    passes = [np.concatenate([at(epoch * full + i)["row"] for i in range(full)]) for epoch in range(12)]
    for taken in passes:
        assert len(set(taken.tolist())) == full * batch and 0 <= taken.min() and taken.max() < rows
    assert (passes[0] != passes[1]).any()
    assert set(np.concatenate(passes).tolist()) == set(range(rows))
    np.testing.assert_array_equal(at(5)["row"], activations.row_batches(3, rows, batch)(5)["row"])
    assert any((activations.row_batches(4, rows, batch)(i)["row"] != at(i)["row"]).any() for i in range(4))
    with pytest.raises(InputError, match="do not fill a batch of 16"):
        activations.row_batches(0, 15, 16)


# --- shards ---

SITES = (("resid", 1), ("z", 0))


def write(folder, params=None, description=None, progress=lambda rows: None, **changes):
    ids, segment = changes.pop("text", text())
    options = {"rows": 2, "rows_per_shard": 3, "exclude": (5,), "first": 1, "cfg": POST, "sites": SITES} | changes
    cfg, sites = options.pop("cfg"), options.pop("sites")
    return activations.write_shards(
        folder, models(POST) if params is None else params, cfg, sites, ids, segment,
        description=description or {"text": "a"}, progress=progress, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "deep" / "er"
    done = []
    return folder, write(folder, progress=done.append), done


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_hold_every_allowed_token_once(written):
    folder, shards, done = written
    ids, segment = text()
    places = [(n, t) for n, t in np.ndindex(N, T) if segment[n, t] and t >= 1 and ids[n, t] != 5]
    assert [tuple(place) for token in shards.token for place in token] == places
    assert len(shards.x) == 3 and shards.num_rows == len(places) and sum(done) == N
    assert shards.manifest["description"] == {"text": "a"} and shards.manifest["shards"] == [len(x) for x in shards.x]
    x_NTSD = activations.harvest_models(models(POST), {"ids": ids, "segment": segment}, POST, SITES)
    expected = np.asarray(x_NTSD)[tuple(np.transpose(places))]
    np.testing.assert_allclose(np.concatenate(shards.x), expected, rtol=1e-5, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(places))
    there = shards.rows(order)
    assert there.dtype == np.float32
    np.testing.assert_array_equal(there, np.concatenate(shards.x)[order])
    with pytest.raises(IndexError):
        shards.rows(np.array([len(places)]))
    assert not list(folder.glob(".*"))


def test_batches_of_shards_cover_all_rows_once_a_pass(written):
    _, shards, _ = written
    number, full = shards.num_rows, np.concatenate(shards.x)
    batch = next(b for b in range(2, number + 1) if number % b == 0)
    at = shards.batch_at(1, batch)
    for begin in (0, number // batch):
        served = np.concatenate([at(begin + i)["x"] for i in range(number // batch)])
        np.testing.assert_array_equal(np.sort(served[:, 0, 0]), np.sort(full[:, 0, 0]))
    with pytest.raises(InputError, match="do not fill"):
        shards.batch_at(0, number + 1)


@pytest.mark.parametrize("lost", ["shard_00001.npy", "token_00002.npy"])
def test_a_lost_shard_is_written_again(written, tmp_path, lost):
    source, _, _ = written
    for name, data in contents(source).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / lost).unlink()
    (tmp_path / ".shard_00001.npy.tmp").write_bytes(b"half")
    with pytest.raises(InputError, match=f"{lost} is missing or damaged; remove it"):
        activations.open_shards(tmp_path)
    done = []
    write(tmp_path, progress=done.append)
    assert sum(done) == (3 if "1" in lost else 1)  # that shard's rows alone
    assert contents(source).items() <= contents(tmp_path).items()


def test_killed_in_between_it_goes_on(written, tmp_path):
    source, _, _ = written
    done = []

    def progress(rows):
        done.append(rows)
        if sum(done) == 5:  # in the second shard
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, progress=progress)
    with pytest.raises(InputError, match="call write_shards again with the same settings"):
        activations.open_shards(tmp_path)
    done.clear()
    write(tmp_path, progress=done.append)
    assert sum(done) == N - 3
    assert contents(tmp_path) == contents(source)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"description": {"text": "b"}}, "other description;"),
        ({"first": 2, "exclude": ()}, "other exclude, first;"),
        ({"sites": (("resid", 1), ("z", 1))}, "other sites;"),
        ({"rows_per_shard": 4}, "other rows_per_shard;"),
        ({"dtype": "float16"}, "other dtype;"),
        ({"params": "one"}, "other model, models;"),
        ({"dtype": "int8"}, "choose float32 or float16"),
        ({"sites": (("pattern", 0),)}, "choose one of"),
    ],
)
def test_a_folder_of_other_activations_is_left_alone(written, change, words):
    folder, _, _ = written
    before = contents(folder)
    change = change | ({"params": models(POST, 1)} if "params" in change else {})
    with pytest.raises(InputError) as caught:
        write(folder, **change)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert contents(folder) == before


DAMAGE = {
    "manifest.json": [b"{", b"[]", b'{"format": "bert6_jax/shards/0"}', b"\xff\xfe"],
    "shard_00000.npy": [b"", b"nonsense"],
    "token_00001.npy": [b"", b"\x93NUMPY\x01\x00v\x00{'descr': '<i4'"],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(written, tmp_path, name):
    """By readers and by writers that would go on; nothing is a traceback of NumPy's."""
    source, _, _ = written
    for damage in DAMAGE[name]:
        for other, data in contents(source).items():
            (tmp_path / other).write_bytes(data)
        (tmp_path / name).write_bytes(damage)
        for call in (lambda: activations.open_shards(tmp_path), lambda: write(tmp_path)):
            with pytest.raises(InputError) as caught:
                call()
            text = str(caught.value)
            assert str(tmp_path) in text and "\n" not in text and "again" in text, text


def test_a_shard_of_another_length_is_refused(written, tmp_path):
    source, shards, _ = written
    for name, data in contents(source).items():
        (tmp_path / name).write_bytes(data)
    np.save(tmp_path / "shard_00001.npy", np.asarray(shards.x[1])[:-1])
    with pytest.raises(InputError, match="shard_00001.npy is .*, not"):
        activations.open_shards(tmp_path)
    with pytest.raises(InputError, match="is no folder of activation shards"):
        activations.open_shards(tmp_path / "nowhere")


def test_a_shard_may_be_empty_but_not_all_of_them(tmp_path):
    ids, segment = text()
    segment[3:6], segment[6] = 0, 1
    shards = write(tmp_path / "some", text=(ids, segment))
    assert [len(x) > 0 for x in shards.x] == [True, False, True]
    everything = shards.rows(np.arange(shards.num_rows))
    np.testing.assert_array_equal(everything, np.concatenate([shards.x[0], shards.x[2]]))
    with pytest.raises(InputError, match="no token is left after the mask"):
        write(tmp_path / "none", text=(ids, 0 * segment))


def test_half_precision_shards_are_close_and_overflow_is_refused(written, tmp_path):
    _, shards, _ = written
    half = write(tmp_path / "half", dtype="float16")
    assert half.x[0].dtype == np.float16
    everything = np.arange(shards.num_rows)
    np.testing.assert_allclose(half.rows(everything), shards.rows(everything), rtol=2e-3, atol=2e-3)
    large = models(POST)
    large["embed"]["token"] = large["embed"]["token"] * 0 + 1
    large["blocks"]["norm_mlp"]["scale"] = large["blocks"]["norm_mlp"]["scale"] * 1e6
    with pytest.raises(InputError, match="resid:1 of model 0 are not finite.*float32"):
        write(tmp_path / "large", params=large, dtype="float16")


def test_a_manifest_is_json_that_says_what_it_is(written):
    folder, _, _ = written
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == activations.FORMAT and manifest["sites"] == [["resid", 1], ["z", 0]]
    assert manifest["models"] == 2 and manifest["token_rows"] == N


def one_by_one(tmp_path, **changes):
    """Shards of the two models of `models(POST)`, harvested one at a time."""
    parts = []
    for x in range(2):
        params = jax.tree.map(lambda leaf, x=x: leaf[x : x + 1], models(POST))
        parts.append(write(tmp_path / f"model{x}", params=params, **(changes if x else {})))
    return parts


@pytest.mark.parametrize("rows_per_shard", [3, 2], ids=["alike", "cut elsewhere"])
def test_joined_shards_are_the_models_side_by_side(tmp_path, rows_per_shard):
    """Row r of the join is one token at the sites of both models, however the shards are cut."""
    joined = activations.join_shards(one_by_one(tmp_path, rows_per_shard=rows_per_shard))
    ids, segment = text()
    places = np.array([(n, t) for n, t in np.ndindex(N, T) if segment[n, t] and t >= 1 and ids[n, t] != 5])
    assert joined.num_rows == len(places)
    x_NTSD = activations.harvest_models(models(POST), {"ids": ids, "segment": segment}, POST, SITES)
    order = np.random.default_rng(1).permutation(len(places))
    there = joined.rows(order)
    assert there.shape == (len(places), 2 * len(SITES), 8) and there.dtype == np.float32
    np.testing.assert_allclose(there, np.asarray(x_NTSD)[tuple(places[order].T)], rtol=1e-5, atol=1e-5)
    served = np.concatenate([joined.batch_at(3, 4)(step)["x"] for step in range(len(places) // 4)])
    everything = joined.rows(np.arange(len(places)))
    near = np.abs(served[:, None] - everything[None]).max((2, 3))
    assert (near.min(1) == 0).all() and len(set(near.argmin(1).tolist())) == len(served)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"text": text(1)}, "text differs"),
        ({"exclude": (5, 6)}, "exclude differs"),
        ({"first": 2}, "first differs"),
    ],
)
def test_shards_of_other_tokens_are_not_joined(tmp_path, changes, words):
    with pytest.raises(InputError) as caught:
        activations.join_shards(one_by_one(tmp_path, **changes))
    assert words in str(caught.value) and "shards 0 and 1" in str(caught.value) and "\n" not in str(caught.value)


def test_misaligned_rows_are_not_joined(tmp_path):
    one, two = one_by_one(tmp_path)
    swapped = [np.array(token) for token in two.token]
    swapped[1][[0, 1]] = swapped[1][[1, 0]]
    shorter = [two.token[0], two.token[1][:-1], two.token[2]]  # the last text is one token, which is not harvested
    for token, row in ((swapped, len(two.token[0])), (shorter, two.num_rows - 1)):
        with pytest.raises(InputError, match=f"shards 0 and 1 are misaligned from row {row} on") as caught:
            activations.join_shards([one, two._replace(token=token)])
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no shards to join"):
        activations.join_shards([])
