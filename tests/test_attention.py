"""Every attention variant equals the plain reference, forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import api, per_head, reference


def inputs(batch=2, queries=13, keys=29, heads=3, size=8, dtype=jnp.float32):
    keys_of = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys_of[0], (batch, queries, heads, size), dtype)
    k, v = (jax.random.normal(keys_of[i], (batch, keys, heads, size), dtype) for i in (1, 2))
    bias = jnp.where(jax.random.uniform(keys_of[3], (batch, keys)) < 0.3, -1e30, jnp.log(3.0))
    return q, k, v, bias


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("max_logits", [1 << 24, 100], ids=["whole", "blocks"])
def test_per_head_equals_the_reference_forward_and_backward(monkeypatch, with_bias, max_logits):
    monkeypatch.setattr(per_head, "MAX_LOGITS", max_logits)
    q, k, v, bias = inputs()
    bias = bias if with_bias else None
    weight = jax.random.normal(jax.random.key(9), q.shape)

    def loss(attention, q, k, v):
        return (attention(q, k, v, bias) * weight).sum()

    np.testing.assert_allclose(per_head.attention(q, k, v, bias), reference.attention(q, k, v, bias), atol=1e-6)
    ours, theirs = (jax.grad(loss, argnums=(1, 2, 3))(f, q, k, v) for f in (per_head.attention, reference.attention))
    for got, want in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_unknown_variant_names_the_known_ones():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match="per_head, xla, got 'cuda'"):
        api._attend(q, k, v, None, "cuda")


def test_bfloat16_stays_within_its_rounding():
    q, k, v, bias = inputs(dtype=jnp.bfloat16)
    exact = reference.attention(*(x.astype(jnp.float32) for x in (q, k, v)), bias)
    for attention in (per_head.attention, reference.attention):
        out = attention(q, k, v, bias)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.02)
