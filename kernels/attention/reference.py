"""The plain JAX statement of attention: what every variant is compared with. Works on any backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, *, return_lse: bool = False
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(q kᵀ / sqrt(D) + bias) v with float32 logits and softmax.

    Args:
      q: [B, S, N, D]; k, v: [B, K, N, D]; bias: [B, K] float32, a constant without gradient, or None.
      return_lse: also return the log-sum-exp of the logits.
    Returns: [B, S, N, D] in q's dtype; with ``return_lse`` also [B, N, S] float32.
    """
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + jax.lax.stop_gradient(bias)[:, None, None, :]  # [B, K] -> [B, 1, 1, K]
    weights = jax.nn.softmax(logits, axis=-1)
    out = jnp.einsum("bnqk,bknd->bqnd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out.astype(q.dtype)
    return (out, jax.nn.logsumexp(logits, axis=-1)) if return_lse else out


def output_products(out: jax.Array, rest: jax.Array | None, d_out: jax.Array) -> jax.Array:
    """Row sums of the output times its gradient: what a backward kernel subtracts from the weights' gradients.

    ``rest`` is what ``out`` lost when it was rounded. It matters: the differences are small where softmax is sharp, and
    an error of their subtrahend is common to a whole row. With logits of standard deviation 3 the rounded output alone
    makes the gradients of q and k 1.25 times as inexact (tests/test_kernels_exactness.py).

    Args:
      out, rest, d_out: [B, S, N, D]; rest may be None where out is exact.
    Returns: float32 [B, S, N].
    """
    exact = out.astype(jnp.float32) if rest is None else out.astype(jnp.float32) + rest.astype(jnp.float32)
    return (exact * d_out.astype(jnp.float32)).sum(-1)
