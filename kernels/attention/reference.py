"""The plain JAX statement of attention: what every variant is compared with. Works on any backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """softmax(q kᵀ / sqrt(D) + bias) v with float32 logits and softmax.

    Args:
      q: [B, S, N, D]; k, v: [B, K, N, D]; bias: [B, K] float32 or None.
    Returns: [B, S, N, D] in q's dtype.
    """
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias[:, None, None, :]  # [B, K] -> [B, 1, 1, K]
    weights = jax.nn.softmax(logits, axis=-1)
    out = jnp.einsum("bnqk,bknd->bqnd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)
