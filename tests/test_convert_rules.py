"""The rule tables name every tensor of the PyTorch modules, with its shape, and convert exactly both ways."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from helios_jax.config import TextEncoderConfig, TransformerConfig, VAEConfig
from helios_jax.convert import (
    abstract_params,
    leaves,
    params_from_torch_state_dict,
    params_to_torch_state_dict,
    tensor_rules,
)
from helios_jax.errors import UserError

TINY_TRANSFORMER = TransformerConfig(
    num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=6, freq_dim=4, ffn_dim=12,
    num_layers=3, rope_dim=(4, 2, 2))
TINY_VAE = VAEConfig(base_dim=4, dim_mult=(1, 2), temperal_downsample=(True,), num_res_blocks=1, z_dim=2,
                     latents_mean=(0.0, 0.0), latents_std=(1.0, 1.0))
TINY_TEXT = TextEncoderConfig(vocab_size=40, d_model=6, d_kv=4, d_ff=10, num_layers=2, num_heads=2)

TRANSFORMERS = [
    TransformerConfig(),
    TINY_TRANSFORMER,
    dataclasses.replace(TINY_TRANSFORMER, cross_attn_norm=False),
    dataclasses.replace(TINY_TRANSFORMER, has_multi_term_memory_patch=False, zero_history_timestep=False),
    dataclasses.replace(TINY_TRANSFORMER, is_amplify_history=True),
    dataclasses.replace(TINY_TRANSFORMER, is_amplify_history=True, history_scale_mode="scalar"),
    dataclasses.replace(TINY_TRANSFORMER, out_channels=8, guidance_cross_attn=False),
]
VAES = [
    VAEConfig(),
    TINY_VAE,
    dataclasses.replace(TINY_VAE, decoder_base_dim=8, num_res_blocks=2, temperal_downsample=(False,)),
    VAEConfig(base_dim=4, dim_mult=(1, 2, 4, 4), in_channels=1, out_channels=2),
    VAEConfig(base_dim=4, dim_mult=(1, 2, 2), temperal_downsample=(True, False)),
]


def meta_shapes(component, config):
    """Name -> shape of the PyTorch module, built without memory."""
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        if component == "text_encoder":
            transformers = pytest.importorskip("transformers")
            module = transformers.UMT5EncoderModel(transformers.UMT5Config(**config.to_dict()))
        else:
            diffusers = pytest.importorskip("diffusers")
            cls = {"transformer": diffusers.HeliosTransformer3DModel, "vae": diffusers.AutoencoderKLWan}[component]
            values = config.to_dict()
            if component == "vae":
                values |= {k: list(v) for k, v in values.items() if isinstance(v, tuple)}
            module = cls.from_config(values)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("component,config", [("transformer", c) for c in TRANSFORMERS] + [("vae", c) for c in VAES] +
                         [("text_encoder", TextEncoderConfig()), ("text_encoder", TINY_TEXT)])
def test_tables_equal_the_pytorch_modules_name_by_name_and_shape_by_shape(component, config):
    expected = meta_shapes(component, config)
    if component == "text_encoder":
        assert expected.pop("encoder.embed_tokens.weight") == expected["shared.weight"]
    ours = {rule.name: rule.shape for rule in tensor_rules(component, config)}
    assert ours == expected


def test_the_published_pipeline_has_1101_194_and_242_tensors():
    counts = {"transformer": 1101, "vae": 194, "text_encoder": 242}
    parameters = {"transformer": 14_312_427_584, "vae": 126_892_531, "text_encoder": 5_680_910_336}
    for component, config in [("transformer", TransformerConfig()), ("vae", VAEConfig()),
                              ("text_encoder", TextEncoderConfig())]:
        rules = tensor_rules(component, config)
        assert len(rules) == len({r.name for r in rules}) == counts[component]
        assert sum(np.prod(r.shape) for r in rules) == parameters[component]
        assert sum(np.prod(leaf.shape) for leaf in leaves(component, config)) == parameters[component]


def random_state_dict(component, config, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {r.name: rng.standard_normal(r.shape).astype(dtype) for r in tensor_rules(component, config)}


TINY = [("transformer", TINY_TRANSFORMER), ("vae", TINY_VAE), ("text_encoder", TINY_TEXT)]


@pytest.mark.parametrize("component,config", TINY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_state_dicts_survive_the_round_trip_bit_by_bit(component, config, dtype):
    import ml_dtypes
    dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    state_dict = random_state_dict(component, config, dtype)
    back = params_to_torch_state_dict(component, config, params_from_torch_state_dict(component, config, state_dict))
    assert back.keys() == state_dict.keys()
    for name, array in state_dict.items():
        assert back[name].dtype == dtype and back[name].flags.c_contiguous
        np.testing.assert_array_equal(back[name].view(np.uint8), array.view(np.uint8))


def test_layouts_and_names_of_the_tree():
    state = random_state_dict("transformer", TINY_TRANSFORMER)
    tree = params_from_torch_state_dict("transformer", TINY_TRANSFORMER, state)
    np.testing.assert_array_equal(tree["blocks"]["attn1"]["to_out_0"]["kernel"][2],
                                  state["blocks.2.attn1.to_out.0.weight"].T)
    np.testing.assert_array_equal(tree["blocks"]["ffn"]["net_0"]["proj"]["kernel"][1],
                                  state["blocks.1.ffn.net.0.proj.weight"].T)
    np.testing.assert_array_equal(tree["blocks"]["scale_shift_table"][1], state["blocks.1.scale_shift_table"][0])
    np.testing.assert_array_equal(tree["patch_long"]["kernel"],
                                  state["patch_long.weight"].transpose(2, 3, 4, 1, 0))
    np.testing.assert_array_equal(tree["norm_out"]["scale_shift_table"], state["norm_out.scale_shift_table"][0])
    np.testing.assert_array_equal(tree["proj_out"]["kernel"], state["proj_out.weight"].T)
    state = random_state_dict("vae", TINY_VAE)
    tree = params_from_torch_state_dict("vae", TINY_VAE, state)
    np.testing.assert_array_equal(tree["encoder"]["down_blocks_1"]["time_conv"]["kernel"],
                                  state["encoder.down_blocks.1.time_conv.weight"].transpose(2, 3, 4, 1, 0))
    np.testing.assert_array_equal(tree["encoder"]["mid_block"]["attentions_0"]["to_qkv"]["kernel"],
                                  state["encoder.mid_block.attentions.0.to_qkv.weight"].transpose(2, 3, 1, 0))
    assert tree["encoder"]["mid_block"]["resnets_0"]["norm1"]["gamma"].ndim == 1
    state = random_state_dict("text_encoder", TINY_TEXT)
    tree = params_from_torch_state_dict("text_encoder", TINY_TEXT, state)
    np.testing.assert_array_equal(
        tree["encoder"]["block"]["layer_0"]["SelfAttention"]["relative_attention_bias"]["weight"][1],
        state["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"])


def test_half_precision_keeps_the_reference_float32_parameters():
    config = dataclasses.replace(TINY_TRANSFORMER, is_amplify_history=True)
    kept = {"/".join(path) for path, leaf in _flat(abstract_params("transformer", config, "bfloat16"))
            if leaf.dtype == np.float32}
    assert kept == {
        "condition_embedder/time_embedder/linear_1/kernel", "condition_embedder/time_embedder/linear_1/bias",
        "condition_embedder/time_embedder/linear_2/kernel", "condition_embedder/time_embedder/linear_2/bias",
        "blocks/scale_shift_table", "norm_out/scale_shift_table", "blocks/norm2/weight", "blocks/norm2/bias",
        "blocks/attn1/history_key_scale"}
    assert all(leaf.dtype.name == "bfloat16" for _, leaf in _flat(abstract_params("text_encoder", TINY_TEXT,
                                                                                 "bfloat16")))
    kept = [path for path, leaf in _flat(abstract_params("text_encoder", TINY_TEXT, "float16"))
            if leaf.dtype == np.float32]
    assert [path[-2] for path in kept] == ["wo"]


def _flat(tree):
    from helios_jax.convert.rules import flatten
    return flatten(tree)


def test_legacy_names_and_training_leftovers_are_accepted():
    state = random_state_dict("transformer", TINY_TRANSFORMER)
    expected = params_from_torch_state_dict("transformer", TINY_TRANSFORMER, state)
    for prefix, names in {"multi_term_memory_patch.": ("patch_short", "patch_mid", "patch_long"),
                          "multi_term_memory_patch.proj": ("", "_2x", "_4x"),
                          "clean_patch_embedding.proj": ("", "_2x", "_4x")}.items():
        legacy = dict(state)
        for tier, suffix in zip(("patch_short", "patch_mid", "patch_long"), names, strict=True):
            for kind in ("weight", "bias"):
                legacy[f"{prefix}{suffix}.{kind}"] = legacy.pop(f"{tier}.{kind}")
        legacy["scale_shift_table"] = legacy.pop("norm_out.scale_shift_table")
        legacy["gan_heads.3.weight"] = np.zeros(2, np.float32)
        legacy["gan_final_head.weight"] = np.zeros(2, np.float32)
        legacy["blocks.0.attn1.q_loras.down.weight"] = np.zeros(2, np.float32)
        legacy["blocks.1.attn2.norm_added_q.weight"] = np.zeros(2, np.float32)
        tree = params_from_torch_state_dict("transformer", TINY_TRANSFORMER, legacy)
        for (path, a), (_, b) in zip(_flat(expected), _flat(tree), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=str(path))


@pytest.mark.parametrize("names", [("shared.weight",), ("encoder.embed_tokens.weight",),
                                   ("shared.weight", "encoder.embed_tokens.weight")])
def test_the_text_embedding_is_found_under_either_of_its_tied_names(names):
    state = random_state_dict("text_encoder", TINY_TEXT)
    shared = state.pop("shared.weight")
    state |= dict.fromkeys(names, shared)
    tree = params_from_torch_state_dict("text_encoder", TINY_TEXT, state)
    np.testing.assert_array_equal(tree["shared"]["weight"], shared)


def test_unused_added_projections_are_left_out_only_where_the_config_has_them():
    config = dataclasses.replace(TINY_TRANSFORMER, added_kv_proj_dim=4)
    extra = meta_shapes("transformer", config).keys() - {r.name for r in tensor_rules("transformer", config)}
    assert extra == {f"blocks.{i}.attn2.{name}" for i in range(3) for name in (
        "add_k_proj.weight", "add_k_proj.bias", "add_v_proj.weight", "add_v_proj.bias", "norm_added_k.weight")}
    state = random_state_dict("transformer", TINY_TRANSFORMER) | dict.fromkeys(extra, np.zeros(1, np.float32))
    params_from_torch_state_dict("transformer", config, state)
    with pytest.raises(UserError, match="15 unexpected"):
        params_from_torch_state_dict("transformer", TINY_TRANSFORMER, state)


def test_missing_unexpected_and_misshapen_tensors_are_all_listed_in_one_error():
    state = random_state_dict("transformer", TINY_TRANSFORMER)
    del state["blocks.1.attn1.to_q.weight"]
    state["surprise"] = np.zeros(3, np.float32)
    state["proj_out.bias"] = np.zeros(3, np.float32)
    with pytest.raises(UserError) as error:
        params_from_torch_state_dict("transformer", TINY_TRANSFORMER, state)
    message = str(error.value)
    assert "\n" not in message
    assert "1 missing: blocks.1.attn1.to_q.weight" in message
    assert "1 unexpected: surprise" in message
    assert "1 misshapen: proj_out.bias is [3], expected [16]" in message


def test_long_lists_are_cut_and_foreign_checkpoints_are_called_so():
    with pytest.raises(UserError, match="another model") as error:
        params_from_torch_state_dict("transformer", TINY_TRANSFORMER, random_state_dict("vae", TINY_VAE))
    message = str(error.value)
    assert " more" in message and len(message) < 2000


def test_trees_with_wrong_leaves_are_refused_on_the_way_out():
    tree = params_from_torch_state_dict("vae", TINY_VAE, random_state_dict("vae", TINY_VAE))
    tree["extra"] = np.zeros(1)
    tree["quant_conv"]["bias"] = np.zeros(1)
    del tree["post_quant_conv"]["bias"]
    with pytest.raises(UserError, match="1 missing: post_quant_conv/bias; 1 unexpected: extra; 1 misshapen: quant"):
        params_to_torch_state_dict("vae", TINY_VAE, tree)


def test_integer_tensors_and_wrong_configs_are_refused():
    state = random_state_dict("vae", TINY_VAE)
    state["quant_conv.bias"] = state["quant_conv.bias"].astype(np.int32)
    with pytest.raises(UserError, match="quant_conv.bias: expected a float dtype, got int32"):
        params_from_torch_state_dict("vae", TINY_VAE, state)
    with pytest.raises(UserError, match="component: one of"):
        tensor_rules("unet", TINY_VAE)
    with pytest.raises(UserError, match="expected a VAEConfig"):
        tensor_rules("vae", TINY_TEXT)
