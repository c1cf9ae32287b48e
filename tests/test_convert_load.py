"""Loading the published layout: exact, strict, sharded; and one clear line for every kind of damaged input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from helios_jax.config import ModelIndex
from helios_jax.convert import load_component, load_pipeline_params, params_from_torch_state_dict, resolve_model
from helios_jax.convert.export import write_safetensors_component
from helios_jax.convert.load import _shard_reader
from helios_jax.convert.rules import flatten, leaves, param_dtype
from helios_jax.convert.safetensors_io import SafetensorsFile, write_safetensors
from helios_jax.convert.sources import SafetensorsSource, TreeSource
from helios_jax.errors import UserError
from tests.convert_folders import CONFIGS, TRANSFORMER, VAE, assert_trees_equal, state_dict, write_model


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder, parameters) of a tiny model whose transformer is sharded."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    params = write_model(folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    write_safetensors_component(folder / "transformer", TreeSource("transformer", TRANSFORMER, params["transformer"]),
                                max_shard_bytes=60_000)
    return folder, params


@pytest.fixture
def copy(published, tmp_path):
    """A copy of the model's folder that a test may damage."""
    return shutil.copytree(published[0], tmp_path / "model")


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message and message
    return message


def test_a_sharded_folder_loads_exactly(published):
    folder, params = published
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 2
    model, loaded = load_pipeline_params(folder)
    assert model.format == "diffusers" and model.index == ModelIndex() and model.transformer == TRANSFORMER
    for component, tree in params.items():
        assert all(isinstance(leaf, jax.Array) for _, leaf in flatten(loaded[component]))
        assert_trees_equal(loaded[component], tree)


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_read_with_and_without_an_index(copy, published, index):
    if not index:
        (copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert_trees_equal(load_component(copy / "transformer", "transformer"), published[1]["transformer"])


@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_any_float_dtype_is_accepted_and_cast_by_the_dtype_policy(tmp_path, stored, dtype):
    state = state_dict("transformer", TRANSFORMER, np.dtype(stored))
    write_safetensors(tmp_path / "model.safetensors", state)
    with SafetensorsSource(tmp_path, "transformer", TRANSFORMER, dtype) as source:
        for leaf in leaves("transformer", TRANSFORMER):
            expected_dtype = np.dtype(stored) if dtype is None else param_dtype("transformer", leaf.path, dtype)
            array = source.read(leaf)
            assert array.dtype == expected_dtype
            expected = params_from_torch_state_dict("transformer", TRANSFORMER, state)
            for name in leaf.path:
                expected = expected[name]
            np.testing.assert_array_equal(array, expected.astype(expected_dtype))


def test_half_precision_keeps_the_protected_parameters_unrounded(published):
    folder, params = published
    loaded = load_component(folder / "transformer", "transformer", dtype="bfloat16")
    for path, leaf in flatten(loaded):
        original = params["transformer"]
        for name in path:
            original = original[name]
        protected = not {"time_embedder", "scale_shift_table", "norm2"}.isdisjoint(path)
        assert leaf.dtype == (np.float32 if protected else ml_dtypes.bfloat16), path
        np.testing.assert_array_equal(np.asarray(leaf), original.astype(leaf.dtype))


def test_layers_stored_in_different_dtypes_share_the_widest(tmp_path):
    state = state_dict("transformer", TRANSFORMER, ml_dtypes.bfloat16)
    name = "blocks.1.attn1.to_q.weight"
    state[name] = state[name].astype(np.float32) + 1e-6
    write_safetensors(tmp_path / "a.safetensors", state)
    kernel = load_component(tmp_path, "transformer", TRANSFORMER)["blocks"]["attn1"]["to_q"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[1], state[name].T)
    np.testing.assert_array_equal(kernel[0], state["blocks.0.attn1.to_q.weight"].T.astype(np.float32))


def test_every_part_of_every_leaf_reads_like_a_slice_of_the_whole(published, monkeypatch):
    import helios_jax.convert.sources as sources
    monkeypatch.setattr(sources, "BUFFER_BYTES", 256)  # many buffers per tensor
    rng = np.random.default_rng(0)
    for component, config in CONFIGS.items():
        with SafetensorsSource(published[0] / component, component, config) as source:
            for leaf in leaves(component, config):
                whole = published[1][component]
                for name in leaf.path:
                    whole = whole[name]
                for _ in range(3):
                    bounds = [sorted(rng.integers(0, n + 1, 2)) for n in leaf.shape]
                    index = tuple(slice(int(a), int(b)) for a, b in bounds)
                    np.testing.assert_array_equal(source.read(leaf, index), whole[index], err_msg=leaf.key)


@pytest.mark.parametrize("as_", ["one", "tree", "function"])
def test_parameters_are_loaded_into_the_asked_sharding(published, as_):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("fsdp",))

    def sharding_of(path, shape):
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp" if len(shape) > 1 else None))

    tree = jax.tree.map(lambda a: sharding_of((), a.shape), published[1]["vae"])
    sharding = {"one": sharding_of((), ()), "tree": tree, "function": sharding_of}[as_]
    loaded = load_component(published[0] / "vae", "vae", sharding=sharding)
    assert_trees_equal(loaded, published[1]["vae"])
    assert isinstance(loaded["quant_conv"]["kernel"].sharding, jax.sharding.NamedSharding)


def test_shards_on_eight_devices_read_the_right_parts():
    """In a process of its own, because the number of devices is fixed at its start."""
    code = """
import jax, numpy as np, sys, tempfile, pathlib
from tests.convert_folders import CONFIGS, assert_trees_equal, write_model
from helios_jax.convert import load_component
folder = pathlib.Path(tempfile.mkdtemp()) / "m"
params = write_model(folder)
mesh = jax.make_mesh((2, 4), ("a", "b"))
P = jax.sharding.PartitionSpec
def sharding_of(path, shape):  # shard what divides: first the last axis, then the one before
    axes = [None] * len(shape)
    if len(shape) > 1 and shape[-1] % 4 == 0: axes[-1] = "b"
    if len(shape) > 1 and shape[-2] % 2 == 0: axes[-2] = "a"
    return jax.sharding.NamedSharding(mesh, P(*axes))
for name in params:
    loaded = load_component(folder / name, name, sharding=sharding_of)
    assert_trees_equal(loaded, params[name])
    assert any(len(leaf.sharding.device_set) == 8 and not leaf.is_fully_replicated for leaf in jax.tree.leaves(loaded))
print("ok")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent,
                          env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8",
                                            "JAX_PLATFORMS": "cpu"})
    assert done.stdout.strip() == "ok", done.stderr


def test_a_process_reads_only_its_shards(published, monkeypatch):
    """As on a pod, where a process holds some shards of a leaf."""
    leaf = next(x for x in leaves("transformer", TRANSFORMER) if x.key == "blocks/ffn/net_2/kernel")  # [2, 20, 24]
    whole = published[1]["transformer"]["blocks"]["ffn"]["net_2"]["kernel"]
    reads = []
    with SafetensorsSource(published[0] / "transformer", "transformer", TRANSFORMER) as source:
        monkeypatch.setattr(source._files, "read", lambda name, rows=None, read=source._files.read: (
            reads.append((name, rows)), read(name, rows))[1])
        mine = [(slice(1, 2), slice(None), slice(6, 12)), (slice(1, 2), slice(None), slice(12, 18))]
        shard = _shard_reader(source, leaf, [*mine, mine[0]])
        for index in mine:
            np.testing.assert_array_equal(shard(index), whole[index])
    name = "blocks.1.ffn.net.2.weight"
    assert sorted(reads, key=str) == [(name, slice(12, 18)), (name, slice(6, 12))]


# --- bad input -------------------------------------------------------------------------------------------------------


def test_missing_folder_and_bad_names(tmp_path):
    with pytest.raises(UserError, match="no such folder, and not a hub id") as error:
        resolve_model(tmp_path / "nowhere" / "x" / "y")
    one_line(error)
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"")
    with pytest.raises(UserError, match="is a file.*pickle files are refused"):
        resolve_model(file)
    with pytest.raises(UserError, match="holds no model_index.json"):
        load_pipeline_params(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load_component(tmp_path / "nowhere", "vae")


def test_a_hub_model_that_cannot_be_downloaded_is_one_line(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        assert kwargs["allow_patterns"] and not any("transformer_init" in p for p in kwargs["allow_patterns"])
        raise ConnectionError("cannot reach huggingface.co\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="'owner/name': no such folder, and the hub download failed") as error:
        resolve_model("owner/name")
    one_line(error)


def test_a_hub_model_is_downloaded_without_sibling_checkpoints(monkeypatch, published):
    import fnmatch

    import huggingface_hub

    seen = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda hub_id, **kw: seen.update(id=hub_id, **kw) or str(published[0]))
    assert resolve_model("BestWishYsh/Helios-Base", revision="main") == published[0]
    assert seen["id"] == "BestWishYsh/Helios-Base" and seen["revision"] == "main"

    def wanted(name):
        return any(fnmatch.fnmatch(name, p) for p in seen["allow_patterns"])

    assert wanted("transformer/diffusion_pytorch_model-00001-of-00006.safetensors")
    assert wanted("text_encoder/model.safetensors.index.json") and wanted("tokenizer/spiece.model")
    assert not wanted("transformer_init/diffusion_pytorch_model.safetensors") and not wanted("transformer/model.bin")


def test_missing_unexpected_and_misshapen_tensors_are_all_in_one_error(tmp_path):
    state = state_dict("vae", VAE)
    del state["quant_conv.bias"]
    state["not.there"] = np.zeros(1, np.float32)
    state["post_quant_conv.bias"] = np.zeros(3, np.float32)
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", state)
    with pytest.raises(UserError) as error:
        load_component(tmp_path, "vae", VAE)
    message = one_line(error)
    assert str(tmp_path) in message
    assert "1 missing: quant_conv.bias" in message and "1 unexpected: not.there" in message
    assert "1 misshapen: post_quant_conv.bias is [3], expected [16]" in message


def test_a_foreign_checkpoint_is_called_so(copy):
    shutil.copy(copy / "text_encoder" / "model.safetensors", copy / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="checkpoint of another model") as error:
        load_component(copy / "vae", "vae")
    assert len(one_line(error)) < 2500


def test_a_foreign_pipeline_is_refused(copy):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(UserError, match="_class_name must be one of .*'StableDiffusionPipeline'"):
        load_pipeline_params(copy)


def damage(path, how):
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    if how == "empty":
        data = b""
    elif how == "cut header":
        data = data[: 8 + header // 2]
    elif how == "cut data":
        data = data[:-5]
    elif how == "long":
        data += b"\0" * 4
    elif how == "header length":
        data = (2**40).to_bytes(8, "little") + data[8:]
    elif how == "not json":
        data = data[:8] + b"x" * header + data[8 + header:]
    elif how == "not an object":
        data = (2).to_bytes(8, "little") + b"[]"
    elif how in ("offsets", "gap", "dtype", "field"):
        values = json.loads(data[8: 8 + header])
        first = next(v for k, v in values.items() if k != "__metadata__")
        if how == "offsets":
            first["data_offsets"][1] += 4
        elif how == "gap":
            for k, v in values.items():
                if k != "__metadata__":
                    v["data_offsets"] = [n + 4 for n in v["data_offsets"]]
        elif how == "dtype":
            first["dtype"] = "C128"
        else:
            del first["shape"]
        encoded = json.dumps(values).encode()
        data = len(encoded).to_bytes(8, "little") + encoded + data[8 + header:]
    path.write_bytes(data)


@pytest.mark.parametrize("how,message", [
    ("empty", "not a safetensors file, or truncated"), ("cut header", "not a safetensors file, or truncated"),
    ("cut data", "truncated"), ("long", "corrupt"), ("header length", "not a safetensors file, or truncated"),
    ("not json", "corrupt safetensors header"), ("not an object", "corrupt safetensors header"),
    ("offsets", "corrupt: tensor"), ("gap", "overlap or leave a gap"), ("dtype", "'C128'"),
    ("field", "corrupt safetensors header at tensor")])
def test_damaged_files_are_one_line_that_names_the_file(copy, how, message):
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    damage(file, how)
    with pytest.raises(UserError, match=message) as error:
        load_component(copy / "vae", "vae")
    assert file.name in one_line(error)


def test_an_index_that_names_a_missing_shard(copy):
    shard = sorted((copy / "transformer").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"names shards that are not there: 1 missing: {shard.name}"):
        load_component(copy / "transformer", "transformer")


@pytest.mark.parametrize("how,message", [
    ("wrong shard", "1 not where it says: patch_embedding.weight"),
    ("unlisted", "1 not listed in it: patch_embedding.weight"),
    ("ghost", "1 not where it says: ghost"),
    ("no map", "holds no 'weight_map'"),
    ("outside", "must be plain file names"),
    ("not json", "not valid JSON")])
def test_an_index_that_does_not_agree_with_its_shards(copy, how, message):
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    last = sorted(set(index["weight_map"].values()))[-1]
    if how == "wrong shard":
        index["weight_map"]["patch_embedding.weight"] = last
    elif how == "unlisted":
        del index["weight_map"]["patch_embedding.weight"]
    elif how == "ghost":
        index["weight_map"]["ghost"] = last
    elif how == "no map":
        index = {"metadata": {}}
    elif how == "outside":
        index["weight_map"]["patch_embedding.weight"] = "../x.safetensors"
    path.write_text("{" if how == "not json" else json.dumps(index))
    with pytest.raises(UserError, match=message) as error:
        load_component(copy / "transformer", "transformer")
    one_line(error)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickles_are_refused_with_the_way_to_convert_them(copy, suffix):
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(suffix))
    with pytest.raises(UserError, match="refused; convert them.*safe_serialization=True") as error:
        load_component(copy / "vae", "vae")
    one_line(error)


def test_no_weights_two_sets_of_weights_and_integer_weights(copy, tmp_path):
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, file.with_name("a.safetensors"))
    file.rename(file.with_name("b.safetensors"))
    with pytest.raises(UserError, match="is in both a.safetensors and b.safetensors"):
        load_component(copy / "vae", "vae")
    (copy / "vae" / "a.safetensors").unlink()
    load_component(copy / "vae", "vae")  # one file is read whatever its name
    (copy / "vae" / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no \*.safetensors"):
        load_component(copy / "vae", "vae")
    state = state_dict("vae", VAE) | {"quant_conv.bias": np.zeros(32, np.int64)}
    write_safetensors(file, state)
    with pytest.raises(UserError, match="float tensors expected: 1 of another dtype: quant_conv.bias is int64"):
        load_component(copy / "vae", "vae")


@pytest.mark.parametrize("name,text,message", [
    ("vae/config.json", None, "no such file"), ("vae/config.json", "[]", "expected a JSON object"),
    ("vae/config.json", "{", "not valid JSON"), ("vae/config.json", '{"is_residual": true}', "vae/config.json: vae: "),
    ("transformer/config.json", '{"num_layers": "many"}', "transformer/config.json: a value has the wrong type"),
    ("scheduler/scheduler_config.json", '{"scheduler_type": "ddim"}', "scheduler_config.json: scheduler_type"),
    ("model_index.json", "{}", "_class_name must be one of")])
def test_broken_configurations_name_their_file(copy, name, text, message):
    if text is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_pipeline_params(copy)
    one_line(error)


def test_our_files_are_read_by_the_official_library_and_the_other_way(tmp_path):
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    tensors = {"a": rng.standard_normal((3, 4)).astype(np.float16), "ä/ö": rng.standard_normal(5),
               "scalar": np.array(2.0, np.float32), "empty": np.zeros((0, 3), np.float32),
               "int": np.arange(3), "bf": rng.standard_normal((2, 2)).astype(ml_dtypes.bfloat16)}
    write_safetensors(tmp_path / "ours", tensors, {"format": "pt", "note": "x"})
    theirs = safetensors_numpy.load_file(tmp_path / "ours")
    assert theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert theirs[name].dtype == tensor.dtype and theirs[name].shape == tensor.shape
        assert theirs[name].tobytes() == tensor.tobytes()
    safetensors_numpy.save_file(tensors, tmp_path / "theirs", {"note": "y"})
    with SafetensorsFile(tmp_path / "theirs") as file:
        assert file.metadata == {"note": "y"}
        for name, tensor in tensors.items():
            assert file.read(name).tobytes() == tensor.tobytes()
        assert file.read("a", slice(1, 3)).tobytes() == tensors["a"][1:3].tobytes()
