"""The Flax modules declare exactly the parameters that the conversion tables fill, and compute with what it loads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from helios_jax.config import TextEncoderConfig
from helios_jax.convert import abstract_params
from helios_jax.convert.rules import flatten
from helios_jax.models.partition import unbox
from helios_jax.models.transformer import HeliosTransformer
from helios_jax.models.umt5 import UMT5Encoder
from helios_jax.models.vae import WanVAE
from tests.test_convert_rules import TINY_TEXT, TRANSFORMERS, VAES


def shapes(tree):
    return {"/".join(path): (leaf.shape, leaf.dtype) for path, leaf in flatten(tree)}


@pytest.mark.parametrize("config", TRANSFORMERS)
def test_transformer_parameters(config):
    module = unbox(jax.eval_shape(HeliosTransformer(config).init, jax.random.key(0)))
    assert shapes(module) == shapes(abstract_params("transformer", config))


@pytest.mark.parametrize("config", VAES)
def test_vae_parameters(config):
    frames = 1 + 4 * 2
    video = jax.ShapeDtypeStruct((1, frames, 16, 16, config.in_channels), jnp.float32)
    module = unbox(jax.eval_shape(WanVAE(config).init, jax.random.key(0), video)["params"])
    assert shapes(module) == shapes(abstract_params("vae", config))


@pytest.mark.parametrize("config", [TextEncoderConfig(), TINY_TEXT])
def test_text_encoder_parameters(config):
    module = jax.eval_shape(UMT5Encoder(config).init_params, jax.random.key(0))
    assert shapes(module) == shapes(abstract_params("text_encoder", config))
