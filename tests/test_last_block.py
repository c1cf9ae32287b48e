"""The last block does no work for history tokens, whose output nobody reads: same numbers, fewer operations."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helios_jax.config import TransformerConfig
from helios_jax.convert.rules import abstract_params
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.models.transformer import HeliosTransformer, TextContext
from helios_jax.tools.roofline import count_flops

LAYOUT = HistoryLayout()
CONFIG = TransformerConfig(num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, text_dim=6,
                           freq_dim=8, ffn_dim=24, num_layers=3, rope_dim=(4, 2, 2))
OPTIONS = {"published": {}, "amplified_one_layer": {"is_amplify_history": True, "num_layers": 1},
           "all_tokens_alike": {"zero_history_timestep": False, "guidance_cross_attn": False},
           "restricted": {"restrict_self_attn": True}}


def whole_blocks(self, blocks, lora, x, modulation, text, cos, sin, history_length, history, features):
    """Every block on every token, one after the other."""
    for i in range(self.config.num_layers):
        own = {"params": jax.tree.map(lambda leaf, i=i: leaf[i], blocks)}
        layer_text = TextContext(text.keys[i], text.values[i], text.bias) if isinstance(text, TextContext) else text
        x = self._block.apply(own, x, modulation, layer_text, cos, sin, history_length)
    return x[:, history_length:], None


def random_params(config: TransformerConfig) -> dict:
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32),
                        abstract_params("transformer", config))


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def velocity(model: HeliosTransformer, in_training: bool):
    """Of parameters, current frames and the past's frames."""
    rows, lengths = normal(3, 2, 5, 6), np.array([5, 3])

    def run(params, latents, past):
        variables = {"params": params}
        text = (model.text_rows if in_training else model.text_context)(variables, rows, lengths)
        history = LAYOUT.split(past, past[:, :1])
        return model.apply(variables, latents, jnp.array([300.0, 700.0]), text, history)

    return run


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_velocity_and_gradients_equal_those_of_blocks_that_work_on_all_tokens(options, monkeypatch):
    config = dataclasses.replace(CONFIG, **options)
    arguments = random_params(config), normal(0, 2, 9, 4, 6, 3), normal(1, 2, 19, 8, 12, 3)
    weights = normal(4, 2, 9, 4, 6, 3)

    def measured(remat):
        run = velocity(HeliosTransformer(config, remat=remat), in_training=True)

        def loss(*arguments):
            out = run(*arguments)
            return (out * weights).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arguments)
        return out, gradients

    got, gradients = measured("nothing_saveable")
    monkeypatch.setattr(HeliosTransformer, "_blocks", whole_blocks)
    want, wanted_gradients = measured(None)
    assert np.abs(got - want).max() <= 1e-5 * np.ptp(want)
    # Sums of many terms that cancel: their rounding is that of the largest gradients.
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted_gradients))
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True):
        assert np.abs(ours - theirs).max() <= 1e-5 * largest


def test_the_last_block_computes_only_keys_and_values_of_the_history(monkeypatch):
    model, past, current = HeliosTransformer(CONFIG), normal(1, 2, 19, 8, 12, 3), normal(0, 2, 9, 4, 6, 3)

    def flops():
        return count_flops(jax.make_jaxpr(velocity(model, in_training=False))(random_params(CONFIG), current, past))

    fast = flops()
    monkeypatch.setattr(HeliosTransformer, "_blocks", whole_blocks)
    history, tokens, dim = _history_tokens(model, past), 9 * 2 * 3, CONFIG.dim
    per_token = 2 * dim * dim * 2 + 2 * 2 * dim * CONFIG.ffn_dim  # queries, output projection; the GELU network
    attention = 2 * 2 * (history + tokens) * dim  # q k' and weights times values
    assert flops() - fast == 2 * history * (per_token + attention)  # of two samples


def _history_tokens(model: HeliosTransformer, past: jax.Array) -> int:
    shape = jax.eval_shape(lambda p: model.embed_history({"params": p}, LAYOUT.split(past, past[:, :1])),
                           abstract_params("transformer", CONFIG)).shape
    return shape[1]


def test_no_program_copies_the_stacked_weights():
    """Neither sampling nor training with rematerialisation: a copy of 14B would not fit beside them."""
    config = dataclasses.replace(CONFIG, num_layers=24, attention_head_dim=32, rope_dim=(12, 10, 10), ffn_dim=512)
    run = velocity(HeliosTransformer(config, remat="nothing_saveable"), in_training=True)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32),
                          abstract_params("transformer", config))
    stacked = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(params["blocks"]))
    small = normal(0, 2, 9, 2, 2, 3), normal(1, 2, 19, 2, 2, 3)
    sampling, training = (jax.jit(function).lower(params, *small).compile()
                          for function in (run, jax.grad(lambda *x: run(*x).sum())))
    assert sampling.memory_analysis().temp_size_in_bytes < stacked / 4
    # What makes a whole stack of the largest kernels: the gradient's zeros, its sum in place, the last block's part.
    made = set(re.findall(r"= f32\[2[34],(?:64,512|512,64)\]\S* ([\w-]+)\(", training.as_text()))
    assert made <= {"parameter", "get-tuple-element", "broadcast", "dynamic-update-slice", "fusion", "pad", "add"}
