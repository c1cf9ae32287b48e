"""Quantised linear layers: the arithmetic, what is quantised, checkpoints, adapters, and what users get wrong."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("qwix")

from helios_jax.config import TextEncoderConfig, TransformerConfig
from helios_jax.convert.__main__ import main as convert
from helios_jax.convert.export import convert_model, export_pipeline
from helios_jax.convert.folder import read_model_folder
from helios_jax.convert.load import load_component
from helios_jax.convert.rules import abstract_params, flatten, leaves
from helios_jax.errors import UserError
from helios_jax.lora import merge_tree
from helios_jax.models.layers import Linear
from helios_jax.models.partition import declared_axes
from helios_jax.models.quantize import PRECISIONS, check_precision, is_quantised, quantise
from helios_jax.models.transformer import HeliosTransformer
from helios_jax.pipeline.pipeline import HeliosPipeline
from helios_jax.training.flow import start_values
from helios_jax.training.weights import LoraConfig
from tests.tiny_checkpoint import CONFIGS, write_tiny_checkpoint

MODES = [mode for mode in PRECISIONS if mode != "none"]
TRANSFORMER = CONFIGS["transformer"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def one_line(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- one layer -------------------------------------------------------------------------------------------------------


def stated(values: np.ndarray, dtype: str, tiles: int = 1, bound: float | None = None
           ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers, scales and what was rounded to the numbers, float64: groups of the last axis by their largest absolute
    value.

    Scale and quotient are float32, as stored. ``bound`` is what the largest value becomes; for integers by default half
    a step beyond the largest number.
    """
    groups = values.astype(np.float32).reshape(*values.shape[:-1], tiles, -1)
    bound = bound or {"int8": 127.5, "int4": 7.5, "float8_e4m3fn": 448}[dtype]
    scale = np.abs(groups).max(-1, keepdims=True) / np.float32(bound)
    quotient = groups / scale
    if dtype == "float8_e4m3fn":
        numbers = quotient.astype(ml_dtypes.float8_e4m3fn)
    else:
        numbers = np.clip(np.round(quotient), *{"int8": (-128, 127), "int4": (-8, 7)}[dtype])
    return (numbers.astype(np.float64).reshape(values.shape), scale[..., 0].astype(np.float64),
            quotient.astype(np.float64).reshape(values.shape))


@pytest.mark.parametrize("features", [(24, 12), (320, 48)])
@pytest.mark.parametrize("mode", MODES)
def test_a_quantised_linear_layer_equals_a_float64_statement_of_the_same_quantisation(mode, features):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, features[0])).astype(np.float32)
    x[1, 3] = 0  # a token without a largest value
    kernel, bias = (rng.standard_normal(shape).astype(np.float32) for shape in (features, features[1:]))
    format = PRECISIONS[mode]["transformer"]
    quantised = quantise(kernel, format)
    tiles = format.tiles(features[0])
    want, want_scale, quotient = stated(kernel.T, format.dtype, tiles)
    numbers, scale = (np.asarray(part).astype(np.float64) for part in (quantised.qvalue, quantised.scale))
    np.testing.assert_allclose(scale, want_scale, rtol=2.0**-23)  # XLA multiplies by the bound's reciprocal
    # The largest integer of a group lies between two numbers; the last bit of its scale decides.
    off = numbers != want
    np.testing.assert_allclose(np.abs(numbers - quotient)[off], 0.5, atol=1e-4)
    assert off.sum() <= scale.size

    weights = numbers * np.repeat(scale, features[0] // tiles, axis=-1)  # [out, in]
    if tiles == 1:
        with np.errstate(invalid="ignore"):  # 0 / 0 of the empty token
            inputs, x_scale, _ = stated(x, format.dtype, bound=127 if mode == "int8" else 448)
        inputs = np.nan_to_num(inputs) * x_scale
    else:
        inputs = x.astype(np.float64)
    want = inputs @ weights.T + bias
    layer = Linear(features[1])
    got = layer.apply({"params": {"kernel": quantised, "bias": bias}}, x)
    # A sum of n products in float32, each scaled by up to two rounded factors.
    bound = (features[0] + 4) * 2.0**-24 * (np.abs(inputs) @ np.abs(weights).T + np.abs(bias))
    assert (np.abs(got - want) <= bound).all()

    half = Linear(features[1], dtype=jnp.bfloat16).apply(
        {"params": {"kernel": quantised, "bias": bias}}, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def test_inputs_of_one_token_do_not_touch_another():
    kernel = quantise(np.ones((8, 4), np.float32), PRECISIONS["fp8"]["transformer"])
    x = np.random.default_rng(1).standard_normal((2, 3, 8)).astype(np.float32)
    louder = x.copy()
    louder[0, 0] *= 1000
    layer = Linear(4, use_bias=False)
    one, other = (np.asarray(layer.apply({"params": {"kernel": kernel}}, v)) for v in (x, louder))
    np.testing.assert_array_equal(one[0, 1:], other[0, 1:])
    np.testing.assert_array_equal(one[1], other[1])


def test_an_adapter_stands_beside_a_quantised_kernel_and_is_not_merged_into_it():
    rng = np.random.default_rng(2)
    x, kernel, a, b = (rng.standard_normal(s).astype(np.float32) for s in ((3, 16), (16, 8), (16, 2), (2, 8)))
    quantised = quantise(kernel, PRECISIONS["int8"]["transformer"])
    layer = Linear(8, use_bias=False)
    base = layer.apply({"params": {"kernel": quantised}}, x)
    both = layer.apply({"params": {"kernel": quantised}, "lora": {"a": a, "b": b}}, x)
    np.testing.assert_allclose(both, base + x @ a @ b, rtol=1e-5, atol=1e-5)
    line = one_line(merge_tree, {"kernel": quantised}, {"a": a, "b": b})
    assert line.startswith("lora: adapters cannot be merged into quantised weights; keep them apart")


# --- what is quantised -----------------------------------------------------------------------------------------------


def names(component, config, precision):
    return {leaf.key for leaf in leaves(component, config, precision) if leaf.part_dtype is not None}


@pytest.mark.parametrize("mode", MODES)
def test_the_kernels_of_the_blocks_are_quantised_and_nothing_else(mode):
    linear = [f"blocks/{attention}/{name}" for attention in ("attn1", "attn2")
              for name in ("to_q", "to_k", "to_v", "to_out_0")] + ["blocks/ffn/net_0/proj", "blocks/ffn/net_2"]
    assert names("transformer", TRANSFORMER, mode) == {f"{name}/kernel/{part}" for name in linear
                                                       for part in ("qvalue", "scale")}
    assert names("vae", CONFIGS["vae"], mode) == set()
    assert len(names("text_encoder", CONFIGS["text_encoder"], mode)) == 2 * 7
    assert all("relative_attention_bias" not in name for name in names("text_encoder", CONFIGS["text_encoder"], mode))


def gigabytes(component, config, mode):
    """Of a bfloat16 model; two int4 share a byte on a GPU and a TPU."""
    arrays = jax.tree.leaves(abstract_params(component, config, jnp.bfloat16, mode))
    return sum(a.size * (4 if a.dtype == jnp.int4 else 8 * a.dtype.itemsize) for a in arrays) / 8e9


@pytest.mark.parametrize(("mode", "transformer", "text_encoder"), [
    ("none", 28.7, 11.4), ("fp8", 14.6, 6.9), ("int8", 14.6, 6.9), ("int8_weights", 15.1, 6.9),
    ("int4_weights", 8.0, 6.9)])
def test_the_sizes_in_the_documentation_follow_from_the_shapes_of_the_14b_model(mode, transformer, text_encoder):
    assert gigabytes("transformer", TransformerConfig(), mode) == pytest.approx(transformer, abs=0.05)
    assert gigabytes("text_encoder", TextEncoderConfig(), mode) == pytest.approx(text_encoder, abs=0.05)


def test_the_arrays_of_a_quantised_kernel_are_divided_like_the_kernel():
    assert declared_axes(("blocks", "ffn", "net_2", "kernel"), 3) == ("layers", "mlp", "embed")
    for part in ("qvalue", "scale"):
        assert declared_axes(("blocks", "ffn", "net_2", "kernel", part), 3) == ("layers", "embed", "mlp")


# --- whole models ----------------------------------------------------------------------------------------------------


def velocity(model, mode, dtype=jnp.float32):
    params = load_component(model / "transformer", "transformer", dtype=dtype, precision=mode)
    transformer = HeliosTransformer(TRANSFORMER, dtype)
    rng = np.random.default_rng(3)
    latents = rng.standard_normal((1, 9, 8, 8, 16)).astype(np.float32)
    rows = rng.standard_normal((1, 6, TRANSFORMER.text_dim)).astype(np.float32)

    def run(params):
        text = transformer.text_context({"params": params}, rows, jnp.array([6]))
        return transformer.apply({"params": params}, latents.astype(dtype), jnp.array([500.0]), text)

    return np.asarray(jax.jit(run)(params)).astype(np.float64)


# Relative rounding error (rms) of a format. Floating point: uniform over half a step of 2^-3 of the leading digit.
# Integers: step / sqrt(12) over the rms of a normal vector whose largest of n values stands at sqrt(2 ln 2n).
STEP = {"fp8": 2**-4 / math.sqrt(3), **{
    mode: math.sqrt(2 * math.log(2 * n)) / bound / math.sqrt(12)
    for mode, n, bound in (("int8", 48, 127.5), ("int8_weights", 24, 127.5), ("int4_weights", 24, 7.5))}}


@pytest.mark.parametrize("mode", MODES)
def test_velocities_of_a_quantised_model_err_by_no_more_than_its_rounding_steps_explain(model, mode, plain):
    """Every product adds a relative error of at most sqrt(2) steps (inputs and weights); of the ten products of a
    block, errors are independent and reach the velocity at most with weight one."""
    error = velocity(model, mode) - plain
    bound = math.sqrt(2 * 10 * TRANSFORMER.num_layers) * STEP[mode]
    relative = math.sqrt((error**2).mean() / (plain**2).mean())
    psnr = 20 * math.log10(np.ptp(plain) / math.sqrt((error**2).mean()))
    print(f"{mode}: relative error {relative:.4f}, bound {bound:.4f}, PSNR {psnr:.1f} dB")
    assert 0 < relative <= bound


@pytest.fixture(scope="module")
def plain(model):
    return velocity(model, "none")


# --- checkpoints -----------------------------------------------------------------------------------------------------


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.fixture(scope="module")
def converted(model):
    """The tiny model stored in a mode, written once."""
    def folder(mode):
        out = model.parent / mode
        if not out.exists():
            convert_model(model, out, dtype="bfloat16", precision=mode)
        return out

    return folder


@pytest.mark.parametrize("mode", MODES)
def test_a_quantised_checkpoint_holds_the_bits_of_quantising_while_loading(model, converted, mode):
    for component in ("transformer", "text_encoder"):
        stored = load_component(converted(mode) / component, component)
        assert_same_bits(stored, load_component(model / component, component, dtype=jnp.bfloat16, precision=mode))
        assert any(is_quantised(leaf) for _, leaf in flatten(stored))
    assert read_model_folder(converted(mode)).precision("transformer") == mode


def test_a_plain_orbax_checkpoint_is_quantised_while_loading_too(model):
    convert_model(model, model.parent / "plain")
    for source in (model, model.parent / "plain"):
        params = load_component(source / "text_encoder", "text_encoder", precision="int8")
        if source is model:
            want = params
    assert_same_bits(params, want)


def test_quantising_takes_one_layer_of_a_kernel_to_the_device_at_a_time(model, monkeypatch):
    seen = []
    monkeypatch.setattr("helios_jax.convert.sources.quantise", lambda block, format: (
        seen.append(block.shape), quantise(block, format))[1])
    load_component(model / "transformer", "transformer", precision="int8")
    assert len(seen) == 10 * TRANSFORMER.num_layers and {shape[0] for shape in seen} == {1}


def copy_with_precision(folder, out, precision):
    shutil.copytree(folder, out)
    (out / "transformer" / "precision.json").write_text(json.dumps({"precision": precision}))
    return out / "transformer"


def test_reading_a_quantised_checkpoint_is_strict(converted, tmp_path):
    int8 = converted("int8")
    line = one_line(load_component, copy_with_precision(int8, tmp_path / "fp8", "fp8"), "transformer")
    assert "blocks/attn1/to_q/kernel/qvalue is int8, expected float8_e4m3fn" in line
    line = one_line(load_component, copy_with_precision(int8, tmp_path / "tiles", "int8_weights"), "transformer")
    assert "misshapen: blocks/attn1/to_q/kernel/scale is [2, 32, 1], expected [2, 32, 2]" in line
    line = one_line(load_component, copy_with_precision(int8, tmp_path / "plain", "none"), "transformer")
    assert "10 missing: blocks/attn1/to_q/kernel" in line and "20 unexpected: blocks/attn1/to_" in line
    line = one_line(load_component, copy_with_precision(int8, tmp_path / "other", "int3"), "transformer")
    assert "precision: one of none, fp8, int8, int8_weights, int4_weights, got 'int3'" in line


# --- users -----------------------------------------------------------------------------------------------------------


def test_a_video_is_sampled_from_a_quantised_checkpoint_without_a_flag(converted):
    pipeline = HeliosPipeline.from_pretrained(converted("fp8"), unroll=1)
    assert is_quantised(pipeline.params["transformer"]["blocks"]["attn1"]["to_q"]["kernel"])
    assert is_quantised(pipeline.params["text_encoder"]["encoder"]["block"]["layer_0"]["SelfAttention"]["q"]["kernel"])
    frames = pipeline("a red circle", num_frames=33, steps=1, guidance_scale=1.0, height=64, width=64)
    assert frames.shape == (1, 33, 64, 64, 3) and np.isfinite(frames).all()


def test_what_does_not_go_with_a_precision_is_one_clear_line(model, converted, tmp_path, monkeypatch, capsys):
    refused = lambda **options: one_line(HeliosPipeline.from_pretrained, **options)  # noqa: E731
    assert refused(model=model, precision="int4") == (
        "precision: one of none, fp8, int8, int8_weights, int4_weights, got 'int4'")
    line = refused(model=converted("int8"), precision="fp8")
    assert "is stored in int8, got 'fp8'; leave it out, or convert the original model" in line
    monkeypatch.setattr("helios_jax.pipeline.pipeline.read_lora", lambda *_: "an adapter")
    for folder, precision in ((model, "int8"), (converted("int8"), None)):
        assert refused(model=folder, precision=precision, lora=[("file", 1.0)]).startswith("lora: adapters cannot be")

    line = one_line(convert_model, model, tmp_path / "out", format="diffusers", precision="fp8")
    assert line == "precision: fp8 can only be written with format 'orbax', got 'diffusers'"
    line = one_line(convert_model, converted("int8"), tmp_path / "out", format="diffusers")
    assert "its transformer is stored in int8, which cannot be converted; convert the original model" in line
    params = load_component(model / "transformer", "transformer", precision="int8")
    line = one_line(export_pipeline, tmp_path / "out", {"transformer": params}, CONFIGS, index=None, scheduler=None)
    assert "quantised parameters of a transformer in memory cannot be written" in line

    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(SystemExit) as end:
        convert(["--from", str(model), "--to", str(tmp_path / "out"), "--precision", "int8"])
    assert end.value.code == 2 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: precision: low precision needs the package qwix, which is not installed (pip install qwix)")


def test_training_does_not_start_from_a_quantised_model(converted):
    line = one_line(start_values, str(converted("int8")), "objective.init_from", LoraConfig(), None, TRANSFORMER, 0)
    assert "is quantised (int8); train from the original model" in line


def test_from_python_a_warning_says_what_the_device_does_not_multiply(converted):
    with pytest.warns(UserWarning, match="^precision fp8 on cpu: .*; in few bits it multiplies int8$") as warned:
        HeliosPipeline.from_pretrained(converted("fp8"), unroll=1)
    assert [Path(one.filename).name for one in warned] == ["test_low_precision.py"]  # where it was asked for


def test_what_a_device_does_not_multiply_is_said_in_one_line():
    assert check_precision("fp8", "NVIDIA H100 80GB HBM3") is None
    assert check_precision("int8", "TPU v5 lite") is None
    assert check_precision("none", "cpu") is None
    assert check_precision("fp8", "some new chip") is None
    for kind in ("cpu", "NVIDIA A100-SXM4-80GB", "TPU v5", "TPU v6 lite"):
        assert check_precision("fp8", kind) == (
            f"precision fp8 on {kind}: weights take less memory, but products are made in a wider type and no faster; "
            "in few bits it multiplies int8")
    assert "multiplies fp8 and int8" in check_precision("int4_weights", "NVIDIA H200")
