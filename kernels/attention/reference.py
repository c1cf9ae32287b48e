"""The plain JAX statement of attention: what every variant is compared with. Works on any backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp

MAX_LOGITS = 1 << 29  # float32 logits that :func:`bounded_attention` keeps: 2 GiB


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision:
    """Of products of this type: float32 inputs get float32 products on every device (by default a TPU rounds them to
    bfloat16, a GPU to TF32); products of bfloat16 are exact in the float32 accumulator anyway."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, *, return_lse: bool = False
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(q kᵀ / sqrt(D) + bias) v with float32 logits and softmax.

    Args:
      q: [B, S, N, D]; k, v: [B, K, N, D]; bias: [B, K] float32, a constant without gradient, or None.
      return_lse: also return the log-sum-exp of the logits.
    Returns: [B, S, N, D] in q's dtype; with ``return_lse`` also [B, N, S] float32.
    """
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k, precision=precision_of(q.dtype), preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + jax.lax.stop_gradient(bias)[:, None, None, :]  # [B, K] -> [B, 1, 1, K]
    weights = jax.nn.softmax(logits, axis=-1)
    out = jnp.einsum("bnqk,bknd->bqnd", weights.astype(v.dtype), v, precision=precision_of(v.dtype),
                     preferred_element_type=jnp.float32)
    out = out.astype(q.dtype)
    return (out, jax.nn.logsumexp(logits, axis=-1)) if return_lse else out


def bounded_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, *, return_lse: bool = False
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """:func:`attention` where its logits leave room for anything else: at 384x640 the 14B model's take 20 GB."""
    logits = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
    if logits > MAX_LOGITS:
        raise NotImplementedError(f"its logits would take {logits * 4 / 2**30:.1f} GiB")
    return attention(q, k, v, bias, return_lse=return_lse)


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
