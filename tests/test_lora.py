"""LoRA files act as in diffusers, merged or kept apart; what cannot be placed is listed."""

from __future__ import annotations

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from helios_jax.convert import params_to_torch_state_dict
from helios_jax.convert.rules import Layout, flatten, tensor_rules
from helios_jax.convert.safetensors_io import write_safetensors
from helios_jax.errors import UserError
from helios_jax.lora import _product_adder, adapter_tree, merge, read_lora, write_lora
from helios_jax.models.inputs import FrameIndices, History
from helios_jax.models.transformer import HeliosTransformer
from tests.convert_folders import random_params
from tests.golden import data
from tests.oracles import TINY_TRANSFORMER, channel_first, channel_last, converted, relative_error, torch_transformer

CONFIG = TINY_TRANSFORMER
TARGETS = {rule.name.removesuffix(".weight"): rule for rule in tensor_rules("transformer", CONFIG)
           if rule.layout in (Layout.LINEAR, Layout.CONV)}
ATTENTION = [name for name in TARGETS if ".attn" in name]
PATCHES = ["patch_embedding", "patch_short", "patch_mid", "patch_long"]


def pair(name, rank, rng):
    """Random A and B of one module, in PyTorch layout."""
    out, features, *kernel = TARGETS[name].shape
    a = 0.3 * rng.standard_normal((rank, features, *kernel))
    b = 0.3 * rng.standard_normal((out, rank, *(1 for _ in kernel)))
    return a.astype(np.float32), b.astype(np.float32)


def native(modules, rank=4, seed=0, bias=False, spelling="AB", prefix="transformer."):
    """Tensors of a diffusers-style file. ``rank`` may be a function of the module's name."""
    rng = np.random.default_rng(seed)
    down, up = {"AB": ("lora_A", "lora_B"), "down_up": ("lora.down", "lora.up")}[spelling]
    tensors = {}
    for name in modules:
        a, b = pair(name, rank(name) if callable(rank) else rank, rng)
        tensors |= {f"{prefix}{name}.{down}.weight": a, f"{prefix}{name}.{up}.weight": b}
        if bias:
            tensors[f"{prefix}{name}.lora_B.bias"] = rng.standard_normal(len(b)).astype(np.float32)
    return tensors


def write(path, tensors, metadata=None):
    header = {"format": "pt"} | ({} if metadata is None else {
        "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in metadata.items()})})
    write_safetensors(path, tensors, header)
    return path


def diffusers_module(files, weights, **options):
    """The tiny transformer with the files loaded by diffusers, active with their weights."""
    pytest.importorskip("torch"), pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    module = copy.deepcopy(torch_transformer(CONFIG))
    pipeline = diffusers.HeliosPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=module,
                                        scheduler=diffusers.HeliosScheduler(stages=1))
    names = [f"adapter{i}" for i in range(len(files))]
    for name, file in zip(names, files, strict=True):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name, **options)
    pipeline.set_adapters(names, list(weights))
    return module


def diffusers_weights(files, weights, **options):
    """State dict after ``fuse_lora``."""
    module = diffusers_module(files, weights, **options)
    module.fuse_lora()
    module.unload_lora()
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def base_params():
    pytest.importorskip("torch"), pytest.importorskip("diffusers")
    return converted("transformer", CONFIG, torch_transformer(CONFIG))


def assert_merges_like_diffusers(files, weights, **options):
    expected = diffusers_weights(files, weights, **options)
    base = base_params()
    merged = merge(base, [read_lora(f, CONFIG, w) for f, w in zip(files, weights, strict=True)])
    ours = params_to_torch_state_dict("transformer", CONFIG, merged)
    assert ours.keys() == expected.keys()
    changed = 0
    plain = params_to_torch_state_dict("transformer", CONFIG, base)
    for name, tensor in expected.items():
        np.testing.assert_allclose(ours[name], tensor, rtol=0, atol=2e-6, err_msg=name)
        changed += not np.array_equal(tensor, plain[name])
    return changed


# --- merged: the weights equal those of diffusers' fuse_lora ---------------------------------------------------------


def test_every_target_and_the_patch_convolutions(tmp_path):
    file = write(tmp_path / "a.safetensors", native(TARGETS))
    assert assert_merges_like_diffusers([file], [1.0]) == len(TARGETS)


def test_several_adapters_with_weights_and_mixed_ranks(tmp_path):
    ranks = {name: 1 + i % 5 for i, name in enumerate(TARGETS)}
    files = [write(tmp_path / "a.safetensors", native(ATTENTION, rank=ranks.get)),
             write(tmp_path / "b.safetensors", native([*ATTENTION[::3], "proj_out", *PATCHES], rank=7, seed=1)),
             write(tmp_path / "c.safetensors", native(["blocks.1.ffn.net.2"], rank=2, seed=2))]
    assert_merges_like_diffusers(files, [0.7, -1.3, 2.0])


def test_biases_scale_with_the_adapter(tmp_path):
    files = [write(tmp_path / "a.safetensors", native([*ATTENTION, "patch_long"], bias=True)),
             write(tmp_path / "b.safetensors", native(ATTENTION[:2], seed=1))]
    assert_merges_like_diffusers(files, [0.5, 1.5], low_cpu_mem_usage=False)


@pytest.mark.parametrize("spelling", ["AB", "down_up"])
def test_spellings_of_the_diffusers_format(tmp_path, spelling):
    assert_merges_like_diffusers([write(tmp_path / "a.safetensors", native(ATTENTION, spelling=spelling))], [1.0])


def test_the_oldest_spelling_names_the_same_module(tmp_path):
    tensors = {}
    for name in ("blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0"):
        a, b = pair(name, 3, np.random.default_rng(0))
        old = f"transformer.{name.removesuffix('.0')}_lora"
        tensors |= {f"{old}.down.weight": a, f"{old}.up.weight": b}
    assert_merges_like_diffusers([write(tmp_path / "a.safetensors", tensors)], [1.0])


@pytest.mark.parametrize("metadata", [
    {"r": 4, "lora_alpha": 8},
    {"r": 4, "lora_alpha": 8, "use_rslora": True},
    {"r": 4, "lora_alpha": 2, "alpha_pattern": {"to_q": 16, "^blocks.0.attn1.to_k": 1, "patch_long": 3}},
    {"r": 9, "lora_alpha": 9, "rank_pattern": {"to_[qkv]": 4, "to_out.0": 4, "patch_(long|short)": 4}}])
def test_metadata_overrides_alpha(tmp_path, metadata):
    tensors = native([*ATTENTION, "patch_long", "patch_short"])
    metadata = metadata | {"target_modules": ["to_q"], "peft_type": "LORA"}
    file = write(tmp_path / "a.safetensors", tensors, metadata)
    assert_merges_like_diffusers([file], [0.8])


WAN_NAMES = {"attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o",
             "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "condition_embedder.time_proj": "time_projection.1",
             "proj_out": "head.head", "condition_embedder.text_embedder.linear_1": "text_embedding.0",
             "condition_embedder.text_embedder.linear_2": "text_embedding.2",
             "condition_embedder.time_embedder.linear_1": "time_embedding.0",
             "condition_embedder.time_embedder.linear_2": "time_embedding.2"}
WAN_TARGETS = [name for name in TARGETS if not name.startswith("patch_")]


def wan_name(name):
    for ours, theirs in WAN_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def wan(modules, rank=4, alpha=None, bias=False, spelling="AB", seed=0):
    rng = np.random.default_rng(seed)
    down, up = {"AB": ("lora_A", "lora_B"), "down_up": ("lora_down", "lora_up")}[spelling]
    tensors = {}
    for name in modules:
        a, b = pair(name, rank, rng)
        key = f"diffusion_model.{wan_name(name)}"
        tensors |= {f"{key}.{down}.weight": a, f"{key}.{up}.weight": b}
        if alpha is not None and name.startswith("blocks"):
            tensors[f"{key}.alpha"] = np.array(alpha, np.float32)
        if bias:
            tensors[f"{key}.diff_b"] = rng.standard_normal(len(b)).astype(np.float32)
    return tensors


@pytest.mark.parametrize("spelling", ["AB", "down_up"])
@pytest.mark.parametrize("alpha", [None, 1.0, 64.0])
def test_wan_files_with_and_without_alpha(tmp_path, spelling, alpha):
    file = write(tmp_path / "wan.safetensors", wan(WAN_TARGETS, alpha=alpha, spelling=spelling))
    assert assert_merges_like_diffusers([file], [0.9]) == len(WAN_TARGETS)


def test_wan_biases_zero_norm_updates_and_full_head_updates(tmp_path):
    modules = [n for n in WAN_TARGETS if n != "proj_out"]
    tensors = wan(modules, bias=True, spelling="down_up")
    rng = np.random.default_rng(5)
    tensors |= {
        "diffusion_model.blocks.0.norm3.diff": np.zeros(32, np.float32),
        "diffusion_model.blocks.0.self_attn.norm_k.diff_b": np.zeros(32, np.float32),
        "diffusion_model.head.head.diff": rng.standard_normal(TARGETS["proj_out"].shape).astype(np.float32),
        "diffusion_model.head.head.diff_b": rng.standard_normal(64).astype(np.float32)}
    assert_merges_like_diffusers([write(tmp_path / "wan.safetensors", tensors)], [0.6], low_cpu_mem_usage=False)


def test_a_wan_time_projection_without_matrices_is_left_out(tmp_path):
    tensors = wan([n for n in WAN_TARGETS if n.startswith("blocks")], bias=True)
    tensors["diffusion_model.time_projection.1.diff_b"] = np.ones(192, np.float32)
    assert_merges_like_diffusers([write(tmp_path / "wan.safetensors", tensors)], [1.0], low_cpu_mem_usage=False)


def test_musubi_files(tmp_path):
    tensors = {}
    rng = np.random.default_rng(0)
    for name in (n for n in WAN_TARGETS if n.startswith("blocks")):
        a, b = pair(name, 4, rng)
        key = "lora_unet_" + wan_name(name).replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": np.array(2.0, np.float32)}
    file = write(tmp_path / "musubi.safetensors", tensors)
    assert_merges_like_diffusers([file, file], [1.0, 0.25])


def test_a_written_adapter_means_to_diffusers_what_it_means_here(tmp_path):
    rng = np.random.default_rng(5)
    tree = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), adapter_tree([
        read_lora(write(tmp_path / "a.safetensors", native(TARGETS)), CONFIG)]))
    (tmp_path / "b").mkdir()
    file = tmp_path / "b" / "pytorch_lora_weights.safetensors"
    write_lora(file, tree, CONFIG, alpha=6.0)
    assert assert_merges_like_diffusers([file], [0.5]) == len(TARGETS)


def test_merging_into_half_precision_rounds_once(tmp_path):
    adapter = read_lora(write(tmp_path / "a.safetensors", native(ATTENTION)), CONFIG, 0.7)
    exact = merge(base_params(), [adapter])
    half = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), base_params())
    merged = merge(half, [adapter])
    kernel = merged["blocks"]["attn1"]["to_q"]["kernel"]
    assert kernel.dtype == ml_dtypes.bfloat16
    exact = merge(jax.tree.map(lambda a: a.astype(np.float32), half), [adapter])["blocks"]["attn1"]["to_q"]["kernel"]
    np.testing.assert_array_equal(np.asarray(kernel), np.asarray(exact).astype(ml_dtypes.bfloat16))
    assert merged["proj_out"]["kernel"] is half["proj_out"]["kernel"]  # untouched leaves are shared


def test_merging_keeps_the_sharding(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    params = jax.tree.map(lambda a: jax.device_put(a, sharding), base_params())
    adapter = read_lora(write(tmp_path / "a.safetensors", native(ATTENTION)), CONFIG)
    merged = merge(params, [adapter])
    assert merged["blocks"]["attn2"]["to_v"]["kernel"].sharding == sharding


# --- kept apart ------------------------------------------------------------------------------------------------------


@jax.jit
def forward(variables, cast):
    model = HeliosTransformer(CONFIG)
    rows = cast["encoder_hidden_states"]
    text = model.text_context(variables, rows, jnp.full(rows.shape[0], rows.shape[1]), total=rows.shape[1])
    past = History(*(cast[f"latents_history_{tier}"] for tier in ("short", "mid", "long")))
    return model.apply(variables, cast["hidden_states"], jnp.array([500.25]), text, past)


def run_jax(params, lora, inputs):
    variables = {"params": params} | ({"lora": lora} if lora else {})
    return channel_first(forward(variables, {k: jnp.asarray(channel_last(v) if v.ndim == 5 else v)
                                             for k, v in inputs.items()}))


def run_torch(module, inputs):
    import torch
    line = FrameIndices.for_history()
    indices = {"indices_hidden_states": line.current, "indices_latents_history_short": line.short,
               "indices_latents_history_mid": line.mid, "indices_latents_history_long": line.long}
    with torch.no_grad():
        return module(timestep=torch.tensor([500.25]), return_dict=False,
                      **{k: torch.from_numpy(v) for k, v in inputs.items()},
                      **{k: torch.tensor([v]) for k, v in indices.items()})[0].numpy()


def test_kept_apart_equals_merged_and_diffusers(tmp_path):
    files = [write(tmp_path / "a.safetensors", native(TARGETS, bias=True)),
             write(tmp_path / "b.safetensors", native([*ATTENTION[::2], *PATCHES], rank=7, seed=1)),
             write(tmp_path / "c.safetensors", wan(WAN_TARGETS, alpha=2.0, seed=2))]
    weights = [0.05, -0.05, 0.04]
    h, w = 4, 6
    inputs = {"hidden_states": data("x", 1, 16, 9, h, w), "encoder_hidden_states": data("text", 1, 7, 24),
              "latents_history_short": data("short", 1, 16, 2, h, w),
              "latents_history_mid": data("mid", 1, 16, 2, h, w), "latents_history_long": data("long", 1, 16, 16, h, w)}
    expected = run_torch(diffusers_module(files, weights, low_cpu_mem_usage=False), inputs)
    adapters = [read_lora(f, CONFIG, w) for f, w in zip(files, weights, strict=True)]
    params = base_params()
    apart = run_jax(params, adapter_tree(adapters), inputs)
    merged = run_jax(merge(params, adapters), None, inputs)
    assert relative_error(run_jax(params, None, inputs), expected) > 0.01  # the adapters matter
    assert relative_error(apart, expected) < 1e-5
    assert relative_error(merged, expected) < 1e-5


def test_the_tree_mirrors_the_parameters_and_pads_missing_layers_with_zeros(tmp_path):
    first = write(tmp_path / "a.safetensors", native(["blocks.0.attn1.to_q", "patch_long"], rank=3))
    second = write(tmp_path / "b.safetensors",
                   native(["blocks.0.attn1.to_q", "blocks.1.attn1.to_q"], rank=2, bias=True, seed=1))
    adapters = [read_lora(first, CONFIG, 2.0), read_lora(second, CONFIG, 1.0)]
    tree = adapter_tree(adapters, np.float32)
    assert {"/".join(path): array.shape for path, array in flatten(tree)} == {
        "patch_long/a": (4, 8, 8, 16, 3), "patch_long/b": (3, 32),
        "blocks/attn1/to_q/a": (2, 32, 5), "blocks/attn1/to_q/b": (2, 5, 32), "blocks/attn1/to_q/bias": (2, 32)}
    q = tree["blocks"]["attn1"]["to_q"]
    assert not q["a"][1, :, :3].any() and not q["b"][1, :3].any() and q["b"][1, 3:].any()
    module = adapters[0].modules["blocks.0.attn1.to_q"]
    np.testing.assert_allclose(q["a"][0, :, :3] @ q["b"][0, :3], 2 * (module.b @ module.a).T, rtol=1e-5)
    assert adapter_tree([]) == {}
    assert all(a.dtype == ml_dtypes.bfloat16 for _, a in flatten(adapter_tree(adapters, ml_dtypes.bfloat16)))


def test_a_bias_alone_is_an_update_of_rank_one_that_is_zero(tmp_path):
    tensors = wan(["blocks.0.attn1.to_q"])
    tensors["diffusion_model.blocks.0.self_attn.v.diff_b"] = np.ones(32, np.float32)
    adapter = read_lora(write(tmp_path / "a.safetensors", tensors), CONFIG, 3.0)
    v = adapter_tree([adapter])["blocks"]["attn1"]["to_v"]
    assert not v["a"].any() and not v["b"].any()
    np.testing.assert_array_equal(v["bias"], [[3.0] * 32, [0.0] * 32])


# --- files that do not fit -------------------------------------------------------------------------------------------


def refused(path, match, **options):
    with pytest.raises(UserError, match=match) as error:
        read_lora(path, CONFIG, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_keys_without_the_prefix_are_listed_with_a_hint(tmp_path):
    file = write(tmp_path / "a.safetensors", native(ATTENTION[:2], prefix=""))
    message = refused(file, "no LoRA weights for this transformer")
    assert "4 that match no module of this transformer: blocks.0.attn1.to_q.lora_A.weight" in message
    assert "keys of the diffusers format begin with 'transformer.'" in message


@pytest.mark.parametrize("key", [
    "transformer.blocks.7.attn1.to_q.lora_A.weight", "transformer.blocks.0.attn1.to_q.alpha",
    "transformer.blocks.0.attn1.to_q.lora_alpha", "transformer.blocks.0.norm2.weight",
    "transformer.blocks.0.attn1.to_q.dora_scale", "transformer.blocks.0.attn1.to_q.lokr_w1",
    "text_encoder.layers.0.q.lora_A.weight"])
def test_what_the_original_would_ignore_or_refuse_is_listed_unless_allowed(tmp_path, key):
    tensors = native(ATTENTION[:3]) | {key: np.ones((2, 2), np.float32)}
    file = write(tmp_path / "a.safetensors", tensors)
    assert key in refused(file, "1 that match no module")
    adapter = read_lora(file, CONFIG, allow_unmatched=True)
    assert adapter.ignored == (key,) and set(adapter.modules) == set(ATTENTION[:3])


@pytest.mark.parametrize("key", [
    "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight", "diffusion_model.img_emb.proj.1.lora_A.weight",
    "diffusion_model.blocks.0.self_attn.q.diff", "diffusion_model.blocks.0.norm3.diff",
    "diffusion_model.blocks.0.modulation.diff", "blocks.0.attn1.to_q.lora_A.weight"])
def test_wan_keys_without_a_place_are_listed_unless_allowed(tmp_path, key):
    file = write(tmp_path / "a.safetensors", wan(WAN_TARGETS) | {key: np.ones((2, 2), np.float32)})
    assert key in refused(file, "1 that match no module")
    assert read_lora(file, CONFIG, allow_unmatched=True).ignored == (key,)


def test_incomplete_and_misshapen_updates_are_listed_together(tmp_path):
    tensors = native(ATTENTION[:4], bias=True)
    del tensors[f"transformer.{ATTENTION[0]}.lora_B.weight"]
    tensors[f"transformer.{ATTENTION[1]}.lora_A.weight"] = np.ones((4, 9), np.float32)
    tensors[f"transformer.{ATTENTION[2]}.lora_B.bias"] = np.ones(5, np.float32)
    file = write(tmp_path / "a.safetensors", tensors)
    for options in ({}, {"allow_unmatched": True}):
        message = refused(file, "1 incomplete", **options)
        assert "2 misshapen" in message and "is [4, 9], expected [4, 32]" in message and "is [5], expected" in message


def test_metadata_that_contradicts_the_tensors_or_is_broken(tmp_path):
    tensors = native(ATTENTION[:1])
    refused(write(tmp_path / "a.safetensors", tensors, {"r": 8, "lora_alpha": 8}), "has rank 4, its metadata says 8")
    refused(write(tmp_path / "b.safetensors", tensors, {"r": 4, "use_dora": True}), "DoRA")
    write_safetensors(tmp_path / "c.safetensors", tensors, {"lora_adapter_metadata": "{"})
    refused(tmp_path / "c.safetensors", "lora_adapter_metadata is not a JSON object")
    for field, value, wanted in (("lora_alpha", "four", "a number"), ("r", [4], "a number"),
                                 ("alpha_pattern", [1], "patterns and their numbers"),
                                 ("rank_pattern", {"(": 4}, "patterns and their numbers"),
                                 ("rank_pattern", {"to_q": "4"}, "patterns and their numbers")):
        broken = write(tmp_path / "d.safetensors", tensors, {"r": 4, "lora_alpha": 4} | {field: value})
        refused(broken, f"{field} of its lora_adapter_metadata must be {wanted}, got")


def test_merging_in_place_needs_no_second_copy_of_a_stack():
    kernel = jax.ShapeDtypeStruct((8, 256, 512), jnp.float32)  # what a CPU does to bfloat16 is its own affair
    a, b = jax.ShapeDtypeStruct((8, 256, 4), jnp.float32), jax.ShapeDtypeStruct((8, 4, 512), jnp.float32)
    memory = _product_adder(True, None, True).lower(kernel, a, b).compile().memory_analysis()
    stack = 8 * 256 * 512 * 4
    assert memory.alias_size_in_bytes == stack and memory.temp_size_in_bytes < stack / 2  # two layers


def test_merging_in_place_gives_the_same_weights_and_gives_the_old_ones_up(tmp_path):
    adapters = [read_lora(write(tmp_path / "a.safetensors", native(ATTENTION)), CONFIG, 0.5)]
    params = random_params("transformer", CONFIG)
    want = dict(flatten(merge(params, adapters)))
    given = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
    for path, leaf in flatten(merge(given, adapters, in_place=True)):
        np.testing.assert_array_equal(leaf, want[path])
    assert given["blocks"]["attn1"]["to_q"]["kernel"].is_deleted()


def test_a_module_given_twice_is_refused(tmp_path):
    tensors = wan(ATTENTION[:1]) | wan(ATTENTION[:1], spelling="down_up")
    refused(write(tmp_path / "a.safetensors", tensors), "twice")


def test_files_are_found_as_diffusers_finds_them(tmp_path):
    refused(tmp_path / "none.safetensors", "no such file or folder")
    refused(tmp_path, r"holds no \*.safetensors")
    (tmp_path / "lora.bin").write_bytes(b"x")
    refused(tmp_path, "refused; convert them")
    refused(tmp_path / "lora.bin", "refused; convert them")
    write(tmp_path / "optimizer.safetensors", native(ATTENTION[:1]))
    write(tmp_path / "any.safetensors", native(ATTENTION[:2]))
    assert len(read_lora(tmp_path, CONFIG).modules) == 2
    write(tmp_path / "other.safetensors", native(ATTENTION[:1]))
    refused(tmp_path, "several safetensors files .any.safetensors, other.safetensors.; name one")
    write(tmp_path / "pytorch_lora_weights.safetensors", native(ATTENTION[:3]))
    assert len(read_lora(tmp_path, CONFIG).modules) == 3
    (tmp_path / "empty.safetensors").write_bytes(b"")
    refused(tmp_path / "empty.safetensors", "not a safetensors file, or truncated")
    refused(tmp_path / "any.safetensors", "lora weight: must be a finite number", weight=float("nan"))


def test_a_whole_checkpoint_is_not_a_lora(tmp_path):
    state = {f"transformer.{r.name}": np.zeros(r.shape, np.float32) for r in tensor_rules("transformer", CONFIG)}
    refused(write(tmp_path / "a.safetensors", state), "no LoRA weights for this transformer")
    refused(tmp_path / "a.safetensors", "no LoRA weights for this transformer", allow_unmatched=True)


def test_adapters_of_different_transformers_do_not_mix(tmp_path):
    file = write(tmp_path / "a.safetensors", native(ATTENTION[:1]))
    other = dataclasses.replace(CONFIG, num_layers=3)
    with pytest.raises(UserError, match="different transformer configurations"):
        adapter_tree([read_lora(file, CONFIG), read_lora(file, other)])


def test_hub_ids_are_downloaded(tmp_path, monkeypatch):
    import huggingface_hub
    write(tmp_path / "pytorch_lora_weights.safetensors", native(ATTENTION[:1]))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda hub_id, **kw: str(tmp_path))
    assert read_lora("owner/some-lora", CONFIG).modules and read_lora("owner/Wan2.1-lora-v1.0", CONFIG).modules
    refused("owner/lora.safetensors", "no such file or folder")

    def offline(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("owner/some-lora", "hub download failed")
