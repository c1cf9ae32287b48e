"""Wan 2.1 weights become a Helios model whose history patches average, as the training intends."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from helios_jax.config import ModelIndex
from helios_jax.convert import init_history_patches, load_component, load_pipeline_params, load_wan_transformer
from helios_jax.convert.__main__ import main
from helios_jax.convert.rules import flatten
from helios_jax.convert.wan import transformer_config_from_wan
from helios_jax.errors import UserError
from tests.convert_folders import TRANSFORMER, assert_trees_equal, random_params, write_model

HISTORY = ("patch_short", "patch_mid", "patch_long")
WAN_CONFIG = {
    "_class_name": "WanTransformer3DModel", "added_kv_proj_dim": None, "attention_head_dim": 12,
    "cross_attn_norm": True, "eps": 1e-6, "ffn_dim": 20, "freq_dim": 8, "image_dim": None, "in_channels": 16,
    "num_attention_heads": 2, "num_layers": 2, "out_channels": 16, "patch_size": [1, 2, 2], "pos_embed_seq_len": None,
    "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024, "text_dim": 16}


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A folder like Wan2.1-T2V-Diffusers, with the transformer saved by diffusers, and that transformer."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("wan") / "model"
    write_model(folder)
    shutil.rmtree(folder / "transformer")
    torch.manual_seed(0)
    module = diffusers.WanTransformer3DModel.from_config(WAN_CONFIG)
    for parameter in module.parameters():  # zero-initialised parameters would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1)
    module.save_pretrained(folder / "transformer", max_shard_size="30KB")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    return folder, module


def convolve(params, tier, x):
    """Kernel = stride convolution of x [B, T, h, w, C] by the definition."""
    kernel, bias = np.asarray(params[tier]["kernel"], np.float64), np.asarray(params[tier]["bias"], np.float64)
    kt, kh, kw = kernel.shape[:3]
    b, t, h, w, c = x.shape
    x = x.reshape(b, t // kt, kt, h // kh, kh, w // kw, kw, c)
    return np.einsum("btihjwkc,ijkco->bthwo", x, kernel) + bias


def mean(x, k):
    b, t, h, w, c = x.shape
    return x.reshape(b, t // k, k, h // k, k, w // k, k, c).mean((2, 4, 6))


def test_history_patches_are_the_short_patch_of_the_block_mean(wan):
    _, params = load_wan_transformer(wan[0])
    x = np.random.default_rng(0).standard_normal((2, 4, 16, 24, 16))
    np.testing.assert_array_equal(params["patch_short"]["kernel"], params["patch_embedding"]["kernel"])
    for tier, factor in (("patch_mid", 2), ("patch_long", 4)):
        np.testing.assert_allclose(convolve(params, tier, x), convolve(params, "patch_short", mean(x, factor)),
                                   rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(params[tier]["bias"], params["patch_embedding"]["bias"])
    assert not np.array_equal(params["patch_embedding"]["bias"], np.zeros(24))


def test_everything_else_is_wans_own_tensor(wan):
    config, params = load_wan_transformer(wan[0])
    assert config == TRANSFORMER  # 12 = 4 + 4 + 4 rotary channels, everything Helios adds at its default
    from helios_jax.convert import params_to_torch_state_dict
    ours = params_to_torch_state_dict("transformer", config, params)
    theirs = {name: tensor.numpy() for name, tensor in wan[1].state_dict().items()}
    theirs["norm_out.scale_shift_table"] = theirs.pop("scale_shift_table")
    assert {n for n in ours if not n.startswith(HISTORY)} == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


def test_the_pytorch_intention_is_reproduced(wan):
    """The same repetition and division with torch operations on the Wan module's own embedding."""
    torch = pytest.importorskip("torch")
    _, params = load_wan_transformer(wan[0])
    with torch.no_grad():
        weight = wan[1].patch_embedding.weight  # [C, 16, 1, 2, 2]
        for tier, k in (("patch_short", 1), ("patch_mid", 2), ("patch_long", 4)):
            repeated = weight
            for axis in (2, 3, 4):
                repeated = repeated.repeat_interleave(k, dim=axis)
            expected = (repeated / k**3).permute(2, 3, 4, 1, 0).numpy()
            np.testing.assert_array_equal(params[tier]["kernel"], expected)


def test_half_precision_and_memory_agree_with_the_full_load(wan):
    _, full = load_wan_transformer(wan[0])
    _, half = load_wan_transformer(wan[0], dtype="bfloat16")
    for (path, a), (_, b) in zip(flatten(full), flatten(half), strict=True):
        if path[0] in HISTORY:
            assert b.dtype.name == "bfloat16"
        np.testing.assert_array_equal(np.asarray(a.astype(b.dtype)), np.asarray(b), err_msg=str(path))


def test_init_history_patches_in_memory(wan):
    _, expected = load_wan_transformer(wan[0])
    tree = {k: v for k, v in expected.items() if k not in HISTORY}
    assert_trees_equal(init_history_patches(tree), expected)
    assert set(tree) == set(expected) - set(HISTORY)
    tree = random_params("transformer", TRANSFORMER)
    again = init_history_patches(tree)
    assert again["blocks"] is tree["blocks"]
    assert not np.array_equal(again["patch_long"]["kernel"], tree["patch_long"]["kernel"])


def test_without_the_flag_wan_weights_are_refused(wan):
    with pytest.raises(UserError, match="6 missing: patch_short.weight"):
        load_component(wan[0] / "transformer", "transformer", TRANSFORMER)
    with pytest.raises(UserError, match="'WanPipeline'"):
        load_pipeline_params(wan[0])


def test_the_converter_writes_a_helios_base_model(wan, tmp_path):
    for format in ("orbax", "diffusers"):
        with pytest.raises(SystemExit) as exit_:
            main(["--from", str(wan[0]), "--to", str(tmp_path / format), "--format", format, "--from-wan"])
        assert exit_.value.code == 0
        model, params = load_pipeline_params(tmp_path / format)
        assert model.index == ModelIndex() and model.transformer == TRANSFORMER
        assert model.scheduler.stages == 1 and model.scheduler.time_shift_type == "exponential"
        assert_trees_equal(params["transformer"], load_wan_transformer(wan[0])[1])
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "diffusers")
    assert type(pipeline).__name__ == "HeliosPipeline"


@pytest.mark.parametrize("change,message", [
    ({"image_dim": 1280}, "image_dim must be null"), ({"added_kv_proj_dim": 5120}, "added_kv_proj_dim must be null"),
    ({"_class_name": "HeliosTransformer3DModel"}, "_class_name must be WanTransformer3DModel")])
def test_other_models_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        transformer_config_from_wan(WAN_CONFIG | change)


def test_the_14b_rotary_split_is_derived():
    config = transformer_config_from_wan(
        WAN_CONFIG | {"attention_head_dim": 128, "num_attention_heads": 40, "num_layers": 40})
    assert config.rope_dim == (44, 42, 42)
