"""What a step computes is counted as a traced program says, and speeds are what times and counts make of it."""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.config import TransformerConfig
from helios_jax.convert.rules import abstract_params
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.models.transformer import HeliosTransformer
from helios_jax.tools.roofline import CHIPS, count_flops, floor_seconds, flops_by_type, peak_flops
from helios_jax.training import flow, stage1, stage2
from helios_jax.training.progress import Progress
from helios_jax.training.weights import LoraConfig, LoraTraining, trained_weights
from helios_jax.training.work import Work, forward

TINY = TransformerConfig(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=6,
                         freq_dim=8, ffn_dim=48, num_layers=3, rope_dim=(4, 2, 2))
LAYOUT = HistoryLayout()
MODEL = HeliosTransformer(TINY, attention="xla")


def abstract(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(("size", "factor"), [((16, 24), 1), ((12, 20), 1), ((16, 24), 4)])
def test_a_forward_pass_has_the_products_that_its_trace_has(size, factor):
    """Also where the history's patches do not divide the latents (12 x 20), and on a lower level of the pyramid."""

    def velocity(params, latents, timestep, rows, history, anchor):
        variables = {"params": params}
        text = MODEL.text_rows(variables, rows, jnp.array([3]))
        past = MODEL.embed_history(variables, LAYOUT.split(history, anchor))
        return MODEL.apply(variables, latents, timestep, text, past, history_size=size, indices=LAYOUT.indices())

    traced = jax.make_jaxpr(velocity)(
        abstract_params("transformer", TINY), abstract(1, 9, size[0] // factor, size[1] // factor, 4), abstract(1),
        abstract(1, 5, 6), abstract(1, 19, *size, 4), abstract(1, 1, *size, 4))
    counted = forward(TINY, LAYOUT, size, 5, factor)
    assert counted.products + counted.attention == pytest.approx(count_flops(traced), rel=1e-12)


def batch_of(size: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    return {"target": abstract(2, 9, *size, 4), "history": abstract(2, 19, *size, 4),
            "anchor": abstract(2, 1, *size, 4), "text": abstract(2, 5, 6),
            "text_length": jax.ShapeDtypeStruct((2,), jnp.int32)}


@pytest.mark.parametrize("stage", [stage1, stage2])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_step_has_about_the_products_that_its_trace_has(stage, rank):
    """About: no gradient of patches is needed, attention in the trace has its own ways, adapters are rounded up."""
    lora = LoraConfig(rank=rank, base_dtype="float32")
    config = stage.Config(data="", transformer=TINY, lora=lora, init_from="somewhere" if rank else "")
    weights = trained_weights(lora, MODEL)
    loss = flow.make_loss(config, stage.make_errors(config, LAYOUT, MODEL, weights))
    params = jax.eval_shape(weights.init, jax.random.key(0))
    frozen = {"empty": {"text": abstract(5, 6), "text_length": jax.ShapeDtypeStruct((), jnp.int32)},
              "base": abstract_params("transformer", TINY)}
    batch = batch_of((16, 24))
    key = jax.random.key(0)
    traced = jax.make_jaxpr(jax.grad(lambda *arguments: loss(*arguments)[0]))(params, frozen, batch, key)
    adapters = weights.num_adapters if isinstance(weights, LoraTraining) else 0
    counted = flow.step_work(config, LAYOUT, batch, adapters)
    assert counted.flops == pytest.approx(count_flops(traced), rel=0.1)


def test_the_model_of_14b_is_counted_like_twice_its_parameters_per_token():
    """At 384x640, where a sequence has 11040 tokens (docs/architecture.md)."""
    config = TransformerConfig()
    one = forward(config, LAYOUT, (48, 80), 512)
    assert one.tokens == 11040
    size = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract_params("transformer", config)))
    assert 0.8 < one.products / (2 * size * one.tokens) < 1.0  # history does not read the prompt
    assert one.attention > 40 * 4 * 11040**2 * 5120


def test_speed_is_work_over_time_and_utilisation_needs_a_known_peak():
    progress = Progress(batch_size=4, num_steps=10, device_kind="TPU v5p", num_devices=2)
    for _ in range(2):
        progress.step(Work(1000.0, 3e12))
    time.sleep(0.05)
    with progress.paused(None):
        time.sleep(0.5)
    with progress.waiting():
        time.sleep(0.02)
    numbers = progress.numbers()
    elapsed = 2 * numbers["step_seconds"]
    assert 0.07 <= elapsed < 0.4  # the pause does not count
    assert numbers["samples_per_second"] == pytest.approx(8 / elapsed)
    assert numbers["tokens_per_second"] == pytest.approx(2000 / elapsed)
    assert numbers["model_tflops_per_second"] == pytest.approx(6 / elapsed)
    assert numbers["mfu"] == pytest.approx(6e12 / elapsed / (2 * 459e12))
    assert 0.02 / elapsed <= numbers["data_wait_fraction"] < 1
    line = progress.line(2, ["loss 1.00000", "grad 2.000"], {**numbers, "mfu": 0.4567, "step_seconds": 2.0})
    assert line.startswith("step 2/10  loss 1.00000  grad 2.000  2.000 s/step") and "MFU 45.7 %  16 s left" in line

    unknown = Progress(batch_size=4, num_steps=10, device_kind="cpu", num_devices=2)
    unknown.step(Work(1000.0, 3e12))
    assert "mfu" not in unknown.numbers() and "model_tflops_per_second" in unknown.numbers()
    silent = Progress(batch_size=4, num_steps=10, device_kind="cpu", num_devices=2)
    silent.step(None)
    assert set(silent.numbers()) == {"step_seconds", "samples_per_second", "data_wait_fraction"}


def test_peaks_are_those_of_the_chips():
    assert peak_flops("TPU v5 lite") == CHIPS["v5e"].flops and peak_flops("TPU v6 lite") == CHIPS["v6e"].flops
    assert peak_flops("TPU v5") == peak_flops("TPU v5p") == CHIPS["v5p"].flops
    assert peak_flops("NVIDIA H200") == CHIPS["h100"].flops and peak_flops("cpu") is None
    assert peak_flops("NVIDIA H200", "float8_e4m3fn") == peak_flops("NVIDIA H200", "int8") == 1978.9e12
    assert peak_flops("TPU v4", "int8") == peak_flops("TPU v5p", "float32") * 275 / 459  # no faster units: bfloat16's


def test_products_are_counted_by_type_and_each_takes_its_time_at_its_own_peak():
    def products(x, kernel, few, image, window):
        few_bits = jax.lax.dot_general(few, few, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        looped = jax.lax.scan(lambda x, _: (x @ kernel, None), x, length=3)[0]
        return few_bits, looped, x.astype(jnp.float32) @ kernel, jax.lax.conv(image, window, (1, 1), "SAME")

    flops = flops_by_type(jax.make_jaxpr(products)(
        jnp.ones((2, 4), jnp.bfloat16), jnp.ones((4, 4), jnp.bfloat16), jnp.ones((5, 4), jnp.int8),
        jnp.ones((1, 3, 6, 6)), jnp.ones((8, 3, 2, 2))))
    assert flops == {"int8": 2 * 5 * 5 * 4, "bfloat16": 3 * 2 * 2 * 4 * 4,
                     "float32": 2 * 2 * 4 * 4 + 2 * 36 * 8 * 3 * 2 * 2}
    wide = flops["bfloat16"] + flops["float32"]
    assert floor_seconds(flops, "TPU v6e", 2) == pytest.approx((200 / 1836e12 + wide / 918e12) / 2)
    assert floor_seconds(flops, "cpu") is None


def test_levels_count_for_themselves():
    config = stage2.Config(data="", transformer=TINY, sample_ratios=(1, 2, 1))
    tokens = [forward(TINY, LAYOUT, (16, 24), 5, factor).tokens for factor in (4, 2, 2, 1)]
    assert flow.step_work(config, LAYOUT, batch_of((16, 24))).tokens == 2 * sum(tokens)
    once = dataclasses.replace(config, sample_ratios=(1, 1, 1))
    assert flow.step_work(once, LAYOUT, batch_of((16, 24))).tokens < 2 * sum(tokens)
