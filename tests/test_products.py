"""float32 products are made in float32 on every device: by default a TPU rounds them to bfloat16, a GPU to TF32."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from helios_jax.config import TextEncoderConfig, TransformerConfig, VAEConfig
from helios_jax.convert.rules import abstract_params
from helios_jax.diffusion.history import HistoryLayout
from helios_jax.models.transformer import HeliosTransformer
from helios_jax.models.umt5 import UMT5Encoder
from helios_jax.models.vae import WanVAE

HIGHEST = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
CONFIGS = {
    "transformer": TransformerConfig(num_attention_heads=2, attention_head_dim=16, rope_dim=(4, 6, 6), text_dim=24,
                                     freq_dim=32, ffn_dim=48, num_layers=3),
    "vae": VAEConfig(base_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1),
    "text_encoder": TextEncoderConfig(vocab_size=64, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3),
}


def products(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        for value in jax.tree.leaves(list(equation.params.values()),
                                     is_leaf=lambda x: isinstance(x, (Jaxpr, ClosedJaxpr))):
            if isinstance(value, (Jaxpr, ClosedJaxpr)):
                yield from products(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


def transformer(dtype, params, attention):
    layout = HistoryLayout()
    model = HeliosTransformer(CONFIGS["transformer"], dtype, attention=attention)
    history = layout.split(jnp.zeros((1, 19, 8, 8, 16), dtype), jnp.zeros((1, 1, 8, 8, 16), dtype))

    def velocity(params):
        variables = {"params": params}
        text = model.text_context(variables, jnp.zeros((1, 4, 24), dtype), np.array([4]))
        return model.apply(variables, jnp.zeros((1, 9, 4, 4, 16), dtype), jnp.zeros(1), text, history)

    return velocity, params


def vae(dtype, params, form):
    model = WanVAE(CONFIGS["vae"], dtype, form)

    def both_ways(params):
        variables = {"params": params}
        return (model.apply(variables, jnp.zeros((1, 2, 4, 4, 16), dtype), method="decode"),
                model.apply(variables, jnp.zeros((1, 5, 32, 32, 3), dtype), method="encode"))

    return both_ways, params


def text_encoder(dtype, params, _):
    model, ids = UMT5Encoder(CONFIGS["text_encoder"], dtype), jnp.ones((1, 6), jnp.int32)
    return lambda params: model.apply({"params": params}, ids, ids), params


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("component", "trace", "variant"), [
    ("transformer", transformer, "per_head"), ("transformer", transformer, "xla"), ("vae", vae, "taps"),
    ("vae", vae, "3d"), ("text_encoder", text_encoder, "")])
def test_products_of_float32_ask_for_float32(component, trace, variant, dtype):
    function, params = trace(dtype, abstract_params(component, CONFIGS[component], dtype), variant)
    found = list(products(jax.make_jaxpr(function)(params).jaxpr))
    wide = [equation for equation in found if equation.invars[0].aval.dtype == jnp.float32]
    assert len(found) > 5 and (dtype != jnp.float32 or len(wide) == len(found))
    for equation in wide:
        assert equation.params["precision"] == HIGHEST, (str(equation)[:200], equation.source_info.traceback)
