"""Low-rank training: what is selected, what it computes, what is kept, and the files it leaves."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.config import TransformerConfig
from helios_jax.convert.rules import abstract_params, flatten, tensor_rules
from helios_jax.convert.safetensors_io import SafetensorsFile
from helios_jax.errors import UserError
from helios_jax.lora import DEFAULT_FILE, adapter_tree, merge, read_lora
from helios_jax.models.inputs import History
from helios_jax.models.transformer import HeliosTransformer
from helios_jax.training import flow
from helios_jax.training.config import OptimizerConfig
from helios_jax.training.optim import make_optimizer
from helios_jax.training.program import initial_state
from helios_jax.training.weights import PARTIAL_FILE, LoraConfig, LoraTraining

TINY = TransformerConfig(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=6,
                         freq_dim=8, ffn_dim=16, num_layers=2, rope_dim=(4, 2, 2))
MODEL = HeliosTransformer(TINY)
MIXED = LoraConfig(rank=3, alpha=6.0, targets=("all-linear", "patch_embedding"), full=("patch_short", "patch_mid"),
                   base_dtype="float32")


def normal_like(tree, seed: int, scale: float = 0.2):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (scale * rng.standard_normal(leaf.shape)).astype(np.float32), tree)


def base_params():
    return normal_like(abstract_params("transformer", TINY), 0)


def trained_params(training: LoraTraining, seed: int = 1):
    """Adapters and modules with nothing zero."""
    return normal_like(jax.eval_shape(training.init, jax.random.key(0)), seed)


def modules_of(tree) -> set[str]:
    return {"/".join(path[:-1]) for path, _ in flatten(tree)}


def test_patterns_select_modules_by_name_ending_and_expression():
    def selected(**patterns):
        params = jax.eval_shape(LoraTraining(LoraConfig(rank=2, **patterns), MODEL).init, jax.random.key(0))
        return modules_of(params["lora"]), modules_of(params.get("full", {}))

    linear = {rule.name.removesuffix(".weight") for rule in tensor_rules("transformer", TINY)
              if len(rule.shape) == 2 and rule.name.endswith("weight") and "shared" not in rule.name}
    every, _ = selected()
    assert len(linear) == 2 * 10 + 6 and len(every) == 10 + 6  # a stack of two layers is one module here
    assert not any("patch" in name for name in every)
    assert selected(targets=("to_q",))[0] == {"blocks/attn1/to_q", "blocks/attn2/to_q"}
    assert selected(targets=("blocks.*attn1.*", "patch_long"))[0] == {
        "blocks/attn1/to_q", "blocks/attn1/to_k", "blocks/attn1/to_v", "blocks/attn1/to_out_0", "patch_long"}
    assert selected(targets=("proj_out",), full=("patch_.*", "norm2"))[1] >= {"patch_short", "patch_mid", "patch_long"}


def test_adapters_start_as_the_original_s():
    training = LoraTraining(LoraConfig(rank=16), MODEL)
    lora = jax.jit(training.init_adapters)(jax.random.key(0))
    a = np.concatenate([np.ravel(leaf) for path, leaf in flatten(lora) if path[-1] == "a"])
    b = [leaf for path, leaf in flatten(lora) if path[-1] == "b"]
    assert abs(a.std() * 16 - 1) < 4 / np.sqrt(2 * a.size) and not any(np.any(leaf) for leaf in b)
    assert lora["blocks"]["attn1"]["to_q"]["a"].shape == (2, 16, 16)
    # every layer of a stack starts differently
    assert (lora["blocks"]["ffn"]["net_2"]["a"][0] != lora["blocks"]["ffn"]["net_2"]["a"][1]).all()


def test_a_run_starts_at_its_base_with_whole_modules_copied_from_it():
    training = LoraTraining(MIXED, MODEL)
    base = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), base_params())
    params = training.start(jax.random.key(0), base)
    abstract = jax.eval_shape(training.init, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    np.testing.assert_array_equal(params["full"]["patch_mid"]["kernel"],
                                  base["patch_mid"]["kernel"].astype(jnp.float32))
    merged = training.merged(params, base)
    jax.tree.map(lambda got, was: np.testing.assert_array_equal(np.asarray(got, np.float32),
                                                                np.asarray(was, np.float32)), merged, base)


def test_beside_the_base_equals_merged():
    """The model with the ``lora`` collection and the model of the merged weights give the same velocity."""
    training = LoraTraining(MIXED, MODEL)
    base, params = base_params(), trained_params(training)
    rng = np.random.default_rng(3)
    latents, short, mid, long = (rng.standard_normal((1, frames, 8, 8, 4)).astype(np.float32)
                                 for frames in (2, 2, 2, 16))
    rows = rng.standard_normal((1, 3, 6)).astype(np.float32)

    @jax.jit
    def velocity(variables):
        text = MODEL.text_rows(variables, rows, np.array([3]))
        return MODEL.apply(variables, latents, jnp.array([400.0]), text, History(short, mid, long))

    apart = velocity(training.variables(params, {"base": base}))
    merged = velocity({"params": training.merged(params, base)})
    np.testing.assert_allclose(apart, merged, atol=3e-5 * float(jnp.abs(merged).max()))
    assert np.abs(apart - velocity({"params": base})).max() > 0.1 * np.abs(apart).max()  # they do something
    # alpha / r = 2 as the formula has it
    kernel = training.merged(params, base)["blocks"]["attn1"]["to_q"]["kernel"][1]
    factors = params["lora"]["blocks"]["attn1"]["to_q"]
    expected = base["blocks"]["attn1"]["to_q"]["kernel"][1] + 2.0 * np.float64(factors["a"][1]) @ factors["b"][1]
    np.testing.assert_allclose(kernel, expected, atol=1e-6)


def test_neither_optimizer_nor_average_hold_the_base():
    training = LoraTraining(MIXED, MODEL)
    abstract = jax.eval_shape(training.init, jax.random.key(0))
    optimizer = make_optimizer(OptimizerConfig(), 10)
    state = jax.eval_shape(lambda params: initial_state(params, optimizer, use_ema=True), abstract)
    trained = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert sum(leaf.size for leaf in jax.tree.leaves((state.params, state.ema))) == 2 * trained
    assert sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim) == 2 * trained
    assert trained < 0.8 * sum(leaf.size for leaf in jax.tree.leaves(base_params()))


def test_files_are_read_back_exactly_and_merge_to_the_same_weights(tmp_path):
    training = LoraTraining(MIXED, MODEL)
    base, params = base_params(), trained_params(training)
    training.write_parts(params, tmp_path)
    adapter = read_lora(tmp_path, TINY)
    assert not adapter.ignored and adapter.name == str(tmp_path) and (tmp_path / DEFAULT_FILE).is_file()
    jax.tree.map(np.testing.assert_array_equal, adapter_tree([adapter]),
                 training.variables(params, {"base": base})["lora"])

    merged = dict(flatten(training.merged(params, base)))
    from_file = dict(flatten(merge(base, [adapter])))
    rules = {rule.name: rule for rule in tensor_rules("transformer", TINY)}
    with SafetensorsFile(tmp_path / PARTIAL_FILE) as partial:
        for name in partial.entries:
            from_file[rules[name].path] = rules[name].layout.to_tree(partial.read(name))
        assert set(partial.entries) == {f"{m}.{p}" for m in ("patch_short", "patch_mid") for p in ("weight", "bias")}
    assert merged.keys() == from_file.keys()
    for path, array in merged.items():
        np.testing.assert_array_equal(array, from_file[path], err_msg="/".join(path))


@pytest.mark.parametrize(("change", "message"), [
    ({"targets": ("to_x",)}, "objective.lora.targets: 'to_x' matches no module.*did you mean 'to_"),
    ({"targets": ("blocks.0.attn1.to_q",)}, "matches 1 of 2 layers of blocks/attn1/to_q"),
    ({"targets": ("patch_mid",), "full": ("patch_mid",)}, "objective.lora.full: patch_mid is among the targets, too"),
    ({"targets": ("(",)}, "no regular expression"), ({"rank": -1}, "objective.lora.rank"),
    ({"targets": ()}, "objective.lora.targets"), ({"base_dtype": "float16"}, "objective.lora.base_dtype"),
])
def test_wrong_settings_are_named(change, message):
    with pytest.raises(UserError, match=message):
        LoraTraining(dataclasses.replace(LoraConfig(rank=2), **change), MODEL)


def test_adapters_need_a_model_to_adapt():
    with pytest.raises(UserError, match="objective.lora: needs objective.init_from"):
        flow.FlowConfig(data="", lora=LoraConfig(rank=2))
