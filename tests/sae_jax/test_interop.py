"""Folders of SAELens, sparsify and dictionary_learning: golden values, round trips, equations, refusals."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bert6_jax.errors import InputError
from sae_jax import interop
from sae_jax.dictionary import encode, reconstruct

GOLDEN_FOLDER = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN_FOLDER))
import make_sae_lens  # noqa: E402

D, F = make_sae_lens.D, make_sae_lens.F
X = make_sae_lens.activations()


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN_FOLDER / "sae_lens.npz"))


def under(golden, prefix):
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


def assert_same(dictionary, cfg, z_BF, xhat_BD, x_BD=X):
    """Our codes and reconstructions to 1e-5 of the largest; and which latents are active."""
    xhat_BHD, found_BF = reconstruct(dictionary, jnp.asarray(x_BD)[:, None], cfg)
    assert 0 < (z_BF > 0).mean() < 1
    np.testing.assert_array_equal(np.asarray(found_BF) > 0, z_BF > 0)
    np.testing.assert_allclose(found_BF, z_BF, rtol=1e-5, atol=1e-5 * np.abs(z_BF).max())
    np.testing.assert_allclose(xhat_BHD[:, 0], xhat_BD, rtol=1e-5, atol=1e-5 * np.abs(xhat_BD).max())


def write(folder, config, tensors, names=interop._SAE_LENS_FILES):
    folder.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / names[0]).write_text(text, encoding="utf-8")
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / names[1])
    return folder


# --- SAELens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", make_sae_lens.OURS)
def test_our_folders_in_sae_lens_and_back(name, golden, tmp_path):
    expected = under(golden, f"ours/{name}/")
    z_BF, xhat_BD = expected.pop("z"), expected.pop("xhat")
    dictionary, cfg = make_sae_lens.dictionary(name)
    assert_same(dictionary, cfg, z_BF, xhat_BD)

    interop.save_sae_lens(tmp_path / "out", dictionary, cfg, metadata={"model_name": "bert"})
    tensors = load_file(tmp_path / "out" / "sae_weights.safetensors")
    assert tensors.keys() == expected.keys()
    for key, value in tensors.items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-5, atol=1e-6, err_msg=key)

    loaded, loaded_cfg, metadata = interop.load(tmp_path / "out")
    assert_same(loaded, loaded_cfg, z_BF, xhat_BD)
    assert metadata["model_name"] == "bert" and metadata["sae_lens_version"] == interop.SAE_LENS_VERSION
    assert loaded_cfg.prefixes == cfg.prefixes
    assert loaded_cfg.activation == ("jumprelu" if cfg.activation == "batch_topk" else cfg.activation)
    assert not loaded_cfg.centre and loaded_cfg.scale == ("token" if cfg.scale == "token" else "none")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(loaded))


@pytest.mark.parametrize("name", make_sae_lens.THEIRS)
def test_folders_that_sae_lens_wrote(name, golden, tmp_path):
    tensors = under(golden, f"theirs/{name}/")
    config, z_BF, xhat_BD = str(tensors.pop("cfg")), tensors.pop("z"), tensors.pop("xhat")
    dictionary, cfg, _ = interop.load(write(tmp_path / "theirs", config, tensors))
    assert_same(dictionary, cfg, z_BF, xhat_BD)
    if name in ("topk_rescaled", "batchtopk", "matryoshka"):
        assert cfg.decoder == "unit"
    assert cfg.prefixes == ((4, 12) if name == "matryoshka" else ())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dictionary))


def test_a_second_export_is_the_first(tmp_path):
    """Thresholds pass through a logarithm, all other tensors come back bit for bit."""
    interop.save_sae_lens(tmp_path / "a", *make_sae_lens.dictionary("batch_topk_prefixes"))
    dictionary, cfg, metadata = interop.load(tmp_path / "a")
    interop.save_sae_lens(tmp_path / "b", dictionary, cfg, metadata=metadata)
    first, second = (load_file(tmp_path / name / "sae_weights.safetensors") for name in "ab")
    np.testing.assert_allclose(second.pop("threshold"), first.pop("threshold"), rtol=1e-6)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    configs = [json.loads((tmp_path / name / "cfg.json").read_text()) for name in "ab"]
    assert configs[0] == configs[1]


def test_sparsity_is_written_as_logarithm(tmp_path):
    share_F = np.linspace(0, 1, F)
    interop.save_sae_lens(tmp_path / "a", *make_sae_lens.dictionary("relu"), sparsity=share_F)
    found = load_file(tmp_path / "a" / "sparsity.safetensors")["sparsity"]
    np.testing.assert_allclose(found, np.log10(share_F + 1e-10), rtol=1e-5, atol=1e-6)
    for wrong in (share_F[:-1], share_F + 1, share_F * np.nan):
        with pytest.raises(InputError, match="sparsity has shape"):
            interop.save_sae_lens(tmp_path / "b", *make_sae_lens.dictionary("relu"), sparsity=wrong)


def test_early_log_thresholds_and_unit_decoders(tmp_path):
    dictionary, cfg = make_sae_lens.dictionary("jumprelu")
    unit = dictionary["params"]["W_dec"] / jnp.linalg.norm(dictionary["params"]["W_dec"], axis=-1, keepdims=True)
    dictionary = dictionary | {"params": dictionary["params"] | {"W_dec": unit}}
    dictionary["norm"] = {"mean": jnp.zeros((1, D)), "scale": jnp.ones(1)}
    interop.save_sae_lens(tmp_path / "a", dictionary, cfg)
    tensors = load_file(tmp_path / "a" / "sae_weights.safetensors")
    tensors["log_threshold"] = np.log(tensors.pop("threshold"))
    write(tmp_path / "a", (tmp_path / "a" / "cfg.json").read_text(), tensors)
    loaded, loaded_cfg, _ = interop.load(tmp_path / "a")
    np.testing.assert_allclose(
        loaded["params"]["log_threshold"], dictionary["params"]["log_threshold"], rtol=1e-5, atol=1e-6
    )
    assert loaded_cfg.decoder == "unit"


class TestExportRefusals:
    def refused(self, tmp_path, match, dictionary, cfg, **options):
        with pytest.raises(InputError, match=match) as caught:
            interop.save_sae_lens(tmp_path / "out", dictionary, cfg, **options)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_dictionaries_that_cannot_be_written(self, tmp_path):
        dictionary, cfg = make_sae_lens.dictionary("batch_topk")
        params = dictionary["params"]
        self.refused(tmp_path, "2 heads", dictionary, dataclasses.replace(cfg, heads=2))
        self.refused(tmp_path, "no threshold", dictionary | {"threshold": jnp.float32(-1)}, cfg)
        self.refused(tmp_path, "asks for", dictionary, dataclasses.replace(cfg, latents=F + 1))
        self.refused(tmp_path, "one member", jax.tree.map(lambda leaf: leaf[None], dictionary), cfg)
        bad = dictionary | {"params": params | {"b_enc": params["b_enc"].at[0].set(jnp.nan)}}
        self.refused(tmp_path, "b_enc has values that are not finite", bad, cfg)
        self.refused(tmp_path, "layer_norm", dictionary, dataclasses.replace(cfg, scale="token"))
        self.refused(tmp_path, "as JSON", dictionary, cfg, metadata={"model": object()})
        self.refused(tmp_path, "as JSON", dictionary, cfg, metadata={"rate": float("nan")})

    def test_what_is_there_stays(self, tmp_path):
        (tmp_path / "out").mkdir()
        with pytest.raises(InputError, match="exists"):
            interop.save_sae_lens(tmp_path / "out", *make_sae_lens.dictionary("relu"))

    def test_a_failed_write_leaves_nothing(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError("No space left on device")

        monkeypatch.setattr("safetensors.numpy.save_file", full)
        with pytest.raises(OSError, match="No space"):
            interop.save_sae_lens(tmp_path / "out", *make_sae_lens.dictionary("relu"))
        assert list(tmp_path.iterdir()) == []


class TestImportRefusals:
    @pytest.fixture
    def folder(self, tmp_path):
        interop.save_sae_lens(tmp_path / "sae", *make_sae_lens.dictionary("topk"))
        return tmp_path / "sae"

    def refused(self, folder, match):
        with pytest.raises(InputError, match=match) as caught:
            interop.load(folder)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"architecture": "transcoder"}, "architecture 'transcoder' is not supported"),
            ({"architecture": ["topk"]}, "architecture .* is not supported"),
            ({"metadata": {}}, "sae_lens_version is None"),
            ({"metadata": {"sae_lens_version": "5.10.2"}}, "'5.10.2', folders of SAELens 6"),
            ({"metadata": ["x"]}, "sae_lens_version is None"),
            ({"normalize_activations": "expected_average_only_in"}, "factor is not in the weights"),
            ({"normalize_activations": "covariance_whitening"}, "'covariance_whitening' is not supported"),
            ({"reshape_activations": "hook_q"}, "reshape_activations 'hook_q'"),
            ({"d_in": D + 1}, r"W_dec|W_enc.* asks for"),
            ({"d_sae": "many"}, "d_sae is 'many'; it must be a positive integer"),
            ({"k": F + 1}, "active latents of a dictionary"),
            ({"k": "all"}, "k is 'all'"),
            ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input is 'yes'"),
            ({"matryoshka_widths": [8, 4]}, "prefixes are"),
            ({"matryoshka_widths": "4"}, "list of integers"),
        ],
    )
    def test_sae_lens_configurations(self, folder, change, match):
        config = json.loads((folder / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps(config | change))
        self.refused(folder, match)

    def test_sae_lens_tensors(self, folder):
        config, file = (folder / "cfg.json").read_text(), folder / "sae_weights.safetensors"
        tensors = load_file(file)
        write(folder, config, {name: value for name, value in tensors.items() if name != "b_enc"})
        self.refused(folder, "tensor b_enc is missing; it has W_dec, W_enc, b_dec")
        write(folder, config, tensors | {"W_skip": np.ones((D, D))})
        self.refused(folder, "tensor W_skip is not of this architecture")
        write(folder, config, tensors | {"W_enc": tensors["W_enc"].T})
        self.refused(folder, r"W_enc has shape \[12, 8\], its configuration asks for \[8, 12\]")
        write(folder, config, tensors | {"W_enc": tensors["W_enc"] * np.nan})
        self.refused(folder, "tensor W_enc has values that are not finite")
        file.write_bytes(file.read_bytes()[:50])
        self.refused(folder, "cannot be read")

    def test_folders(self, folder, tmp_path):
        self.refused(tmp_path / "nothing", "is not a folder")
        self.refused(folder / "cfg.json", "is not a folder")
        self.refused(tmp_path, "is no dictionary folder")
        (folder / "cfg.json").write_text("{")
        self.refused(folder, "is not JSON")
        (folder / "cfg.json").write_text("[1]")
        self.refused(folder, "holds a list")
        (folder / "cfg.json").unlink()
        self.refused(folder, "cfg.json does not exist; a SAELens folder holds")
        with pytest.raises(InputError, match="sae.safetensors does not exist"):
            interop.load_sparsify(write(tmp_path / "empty", {"d_in": D, "num_latents": F, "k": 3}, {}))


@pytest.mark.parity
@pytest.mark.filterwarnings("default")  # torch, transformers and SAELens warn about their own deprecations
def test_live_sae_lens_agrees(tmp_path):
    pytest.importorskip("sae_lens")
    for name in make_sae_lens.OURS:
        dictionary, cfg = make_sae_lens.dictionary(name)
        interop.save_sae_lens(tmp_path / name, dictionary, cfg)
        found = make_sae_lens.run(tmp_path / name, X)
        assert_same(dictionary, cfg, found["z"], found["xhat"])
    for name in make_sae_lens.THEIRS:
        arrays = make_sae_lens.theirs(name, tmp_path / f"theirs_{name}", X)
        dictionary, cfg, _ = interop.load(tmp_path / f"theirs_{name}")
        assert_same(dictionary, cfg, arrays["z"], arrays["xhat"])


# --- sparsify and dictionary_learning: their equations, written again ------------------------------------------------


def largest(pre_BF, k):
    """relu of the k largest of every row."""
    z_BF = np.zeros_like(pre_BF)
    index_BK = np.argsort(-pre_BF, axis=-1)[:, :k]
    np.put_along_axis(z_BF, index_BK, np.maximum(np.take_along_axis(pre_BF, index_BK, -1), 0), -1)
    return z_BF


def weights(**shapes):
    rng = np.random.default_rng(5)
    return {name: rng.normal(scale=0.3, size=shape).astype(np.float32) for name, shape in shapes.items()}


SMALL_X = np.random.default_rng(6).normal(size=(9, D)).astype(np.float32)
SPARSIFY = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": F, "k": 3,
            "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D}  # fmt: skip


class TestSparsify:
    def folder(self, path, **change):
        tensors = weights(**{"encoder.weight": (F, D), "encoder.bias": F, "W_dec": (F, D), "b_dec": D})
        return write(path / "layers.3", SPARSIFY | change, tensors, interop._SPARSIFY_FILES), tensors

    def test_codes_and_reconstruction(self, tmp_path):
        folder, t = self.folder(tmp_path)
        dictionary, cfg, metadata = interop.load(folder)
        z_BF = largest((SMALL_X - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"], 3)
        assert_same(dictionary, cfg, z_BF, z_BF @ t["W_dec"] + t["b_dec"], SMALL_X)
        assert cfg.activation == "topk" and cfg.decoder == "free" and metadata == SPARSIFY

    def test_width_by_expansion_factor(self, tmp_path):
        tensors = weights(**{"encoder.weight": (2 * D, D), "encoder.bias": 2 * D, "W_dec": (2 * D, D), "b_dec": D})
        config = SPARSIFY | {"num_latents": 0, "expansion_factor": 2}
        assert interop.load(write(tmp_path / "a", config, tensors, interop._SPARSIFY_FILES))[1].latents == 2 * D

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"activation": "groupmax"}, "activation 'groupmax' is not supported"),
            ({"transcode": True}, "transcode is true"),
            ({"skip_connection": True}, "skip_connection is true"),
            ({"signed": True}, "signed is true"),
            ({"k": 0}, "k is 0; it must be a positive integer"),
            ({"d_in": None}, "d_in is None"),
        ],
    )
    def test_refusals(self, tmp_path, change, match):
        with pytest.raises(InputError, match=match):
            interop.load(self.folder(tmp_path, **change)[0])

    def test_bfloat16(self, tmp_path):
        folder, tensors = self.folder(tmp_path)
        half = {name: value.astype(jnp.bfloat16) for name, value in tensors.items()}
        dictionary, _, _ = interop.load(write(folder, SPARSIFY, half, interop._SPARSIFY_FILES))
        assert dictionary["params"]["W_enc"].dtype == jnp.float32
        np.testing.assert_array_equal(dictionary["params"]["W_enc"][0], half["encoder.weight"].astype(np.float32))


def relu(x):
    return np.maximum(x, 0)


def dictionary_learning_case(kind):
    """Tensors of a dict_class and, from its source, the codes and reconstructions of SMALL_X."""
    linear = {"encoder.weight": (F, D), "decoder.weight": (D, F)}
    numbers = {"k": np.int32(3), "threshold": np.float32(0.4)}
    plain = {"W_enc": (D, F), "b_enc": F, "W_dec": (F, D), "b_dec": D}
    if kind == "AutoEncoder":  # from_pretrained scales decoder columns to 1
        t = weights(**linear, **{"encoder.bias": F, "bias": D})
        norm_F = np.linalg.norm(t["decoder.weight"], axis=0)
        z = relu((SMALL_X - t["bias"]) @ (t["encoder.weight"] * norm_F[:, None]).T + t["encoder.bias"] * norm_F)
        return t, z, z @ (t["decoder.weight"] / norm_F).T + t["bias"]
    if kind == "AutoEncoderNew":
        t = weights(**linear, **{"encoder.bias": F, "decoder.bias": D})
        z = relu(SMALL_X @ t["encoder.weight"].T + t["encoder.bias"])
        return t, z, z @ t["decoder.weight"].T + t["decoder.bias"]
    if kind == "GatedAutoEncoder":
        t = weights(**linear, decoder_bias=D, r_mag=F, gate_bias=F, mag_bias=F)
        x_enc = (SMALL_X - t["decoder_bias"]) @ t["encoder.weight"].T
        z = (x_enc + t["gate_bias"] > 0) * relu(np.exp(t["r_mag"]) * x_enc + t["mag_bias"])
        return t, z, z @ t["decoder.weight"].T + t["decoder_bias"]
    if kind in ("AutoEncoderTopK", "BatchTopKSAE"):
        t = weights(**linear, **{"encoder.bias": F, "b_dec": D}) | numbers
        pre = (SMALL_X - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
        z = largest(pre, 3) if kind == "AutoEncoderTopK" else relu(pre) * (relu(pre) > t["threshold"])
        return t, z, z @ t["decoder.weight"].T + t["b_dec"]
    if kind == "MatryoshkaBatchTopKSAE":
        t = weights(**plain) | numbers | {"group_sizes": np.array([4, 8])}
        pre = relu((SMALL_X - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
        z = pre * (pre > t["threshold"])
        return t, z, z @ t["W_dec"] + t["b_dec"]
    t = weights(**plain, threshold=F)  # JumpReluAutoEncoder; some thresholds are below 0
    pre = SMALL_X @ t["W_enc"] + t["b_enc"]
    z = relu(pre * (pre > t["threshold"]))
    return t, z, z @ t["W_dec"] + t["b_dec"]


class TestDictionaryLearning:
    def folder(self, path, kind, tensors, **change):
        trainer = {"dict_class": kind, "activation_dim": D, "dict_size": F, "k": 3, "lm_name": "bert"} | change
        return write(path / "trainer_0", {"trainer": trainer}, tensors, interop._DICTIONARY_LEARNING_FILES)

    @pytest.mark.parametrize("kind", interop._DICTIONARY_LEARNING)
    def test_codes_and_reconstruction(self, tmp_path, kind):
        tensors, z_BF, xhat_BD = dictionary_learning_case(kind)
        dictionary, cfg, metadata = interop.load(self.folder(tmp_path, kind, tensors))
        assert_same(dictionary, cfg, z_BF, xhat_BD, SMALL_X)
        assert cfg.prefixes == ((4, 12) if kind == "MatryoshkaBatchTopKSAE" else ())
        assert cfg.decoder == ("unit" if kind == "AutoEncoder" else "free")
        assert metadata["trainer"]["lm_name"] == "bert"

    def test_a_threshold_not_learnt_keeps_all_that_is_positive(self, tmp_path):
        tensors, _, _ = dictionary_learning_case("BatchTopKSAE")
        tensors["threshold"] = np.float32(-1)
        dictionary, cfg, _ = interop.load(self.folder(tmp_path, "BatchTopKSAE", tensors))
        pre = (SMALL_X - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]
        np.testing.assert_allclose(encode(dictionary, jnp.asarray(SMALL_X)[:, None], cfg), relu(pre), atol=1e-5)

    def test_refusals(self, tmp_path):
        tensors, _, _ = dictionary_learning_case("BatchTopKSAE")
        folder = self.folder(tmp_path, "IdentityDict", tensors)
        with pytest.raises(InputError, match="dict_class 'IdentityDict' is not supported"):
            interop.load(folder)
        with pytest.raises(InputError, match="trainer.k is 5, ae.safetensors says 3"):
            interop.load(self.folder(tmp_path, "BatchTopKSAE", tensors, k=5))
        with pytest.raises(InputError, match="activation_dim is None"):
            interop.load(self.folder(tmp_path, "BatchTopKSAE", tensors, activation_dim=None))
        with pytest.raises(InputError, match="threshold has shape"):
            interop.load(self.folder(tmp_path, "BatchTopKSAE", tensors | {"threshold": np.ones(F)}))
        (folder / "config.json").write_text("{}")
        with pytest.raises(InputError, match="'trainer' is missing"):
            interop.load(folder)

    def test_pickles_are_never_read(self, tmp_path):
        (tmp_path / "ae.pt").write_bytes(b"")
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(InputError, match="ae.pt, a pickle.*save_file"):
            interop.load(tmp_path)


# --- Neuronpedia -----------------------------------------------------------------------------------------------------


def feature(index=0, **fields):
    return {"index": index, "activations": [{"tokens": ["a", "##b"], "values": [0.0, 1.5]}]} | fields


class TestNeuronpedia:
    def test_lines_hold_128_features_each(self, tmp_path):
        features = [
            feature(
                np.int64(i),
                density=jnp.float32(0.25),
                topLogits=[{"token": "x", "value": np.float32(2.0)}],
                explanations=[{"text": "names", "methodName": "oai_token-act-pair"}],
                activations=[{"tokens": ["a", "é"], "values": jnp.ones(2), "quantileMin": 0.0}],
            )
            for i in range(130)
        ]
        interop.save_neuronpedia(tmp_path / "up" / "batch.jsonl", "bert6", "3-res-ours", features)
        lines = (tmp_path / "up" / "batch.jsonl").read_text(encoding="utf-8").splitlines()
        batches = [json.loads(line) for line in lines]
        assert [len(batch["features"]) for batch in batches] == [128, 2]
        assert {(batch["modelId"], batch["source"]) for batch in batches} == {("bert6", "3-res-ours")}
        assert batches[1]["features"][1] == {
            "index": 129,
            "density": 0.25,
            "topLogits": [{"token": "x", "value": 2.0}],
            "explanations": [{"text": "names", "methodName": "oai_token-act-pair"}],
            "activations": [{"tokens": ["a", "é"], "values": [1.0, 1.0], "quantileMin": 0.0}],
        }
        with pytest.raises(InputError, match="exists"):
            interop.save_neuronpedia(tmp_path / "up" / "batch.jsonl", "bert6", "3-res-ours", features)

    @pytest.mark.parametrize(
        ("features", "match"),
        [
            ([], "features are empty"),
            ([3], "feature at place 0 is a int"),
            ([feature(-1)], "feature at place 0: index is -1"),
            ([feature(10**7 + 1)], "index is 10000001"),
            ([feature(1.0)], "index is 1.0; it must be an integer"),
            ([feature(True)], "index is True"),
            ([feature(4), feature(4)], "feature 4: index occurs twice"),
            ([feature(4, density=1.5)], r"feature 4: density is 1.5; it must lie in \[0, 1\]"),
            ([feature(4, density=float("nan"))], "feature 4: density is nan"),
            ([feature(4, topLogits=[{"token": "x", "value": 1}] * 21)], "feature 4: topLogits has 21 entries"),
            ([feature(4, bottomLogits=[{"token": "x"}])], "feature 4: bottomLogits.value is None"),
            ([feature(4, bottomLogits=[("x", 1)])], "feature 4: bottomLogits holds a tuple"),
            ([feature(4, explanations=[{"text": "x" * 513}])], "explanations.text has 513 characters"),
            ([feature(4, explanations=[{"words": "x"}])], "explanations has the field 'words'"),
            ([feature(4, activations=[])], "feature 4: activations are empty"),
            ([feature(4, activations="ab")], "feature 4: activations is a str"),
            ([feature(4, activations=[{"tokens": [], "values": []}])], "activations.tokens has 0 entries"),
            ([feature(4, activations=[{"tokens": ["a"] * 1025, "values": [0] * 1025}])], "tokens has 1025 entries"),
            ([feature(4, activations=[{"tokens": ["a"], "values": [0, 1]}])], "values has 2 entries for 1 tokens"),
            ([feature(4, activations=[{"tokens": [7], "values": [0]}])], "activations.tokens is 7; it must be text"),
            ([feature(4, activations=[{"tokens": ["a"], "values": ["b"]}])], "activations.values is 'b'"),
            ([feature(4, colour="red")], "feature 4 has the field 'colour'"),
        ],
    )
    def test_refusals(self, tmp_path, features, match):
        with pytest.raises(InputError, match=match):
            interop.save_neuronpedia(tmp_path / "up.jsonl", "bert6", "3-res-ours", features)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(("model", "source"), [("BERT", "3-res"), ("", "3-res"), ("b", "res"), ("b", "3-Res")])
    def test_names(self, model, source):
        with pytest.raises(InputError, match="modelId|source"):
            interop.neuronpedia_lines(model, source, [feature()])
