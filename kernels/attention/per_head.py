"""Attention one head at a time: the CPU variant, and the last resort of other devices.

XLA's CPU backend runs the batched einsum of the reference at 13 to 30 GFLOP/s because the [B, N, S, K] logits go
through main memory and the batched product is not a BLAS call. One head's logits fit in the last-level cache and its
two products are plain matrix products: 110 to 130 GFLOP/s on two Zen 5 cores (368 and 2760 tokens, head size 32 and
64). Beyond ``MAX_LOGITS`` the queries are cut into blocks so that memory stays bounded: that is why it serves long
sequences on a device that has no kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.attention.reference import precision_of

MAX_LOGITS = 1 << 24  # float32 logits of one block: at most 64 MB


def _logits(q: jax.Array, k: jax.Array, bias: jax.Array | None) -> jax.Array:
    """[S, D] x [K, D] -> float32 [S, K]."""
    scale = q.shape[-1] ** -0.5
    if q.dtype == jnp.float32:
        logits = jnp.matmul(q * scale, k.T, precision=precision_of(q.dtype))  # scaling q touches fewer numbers
    else:  # a scaled q would be rounded once more
        logits = jnp.matmul(q, k.T, preferred_element_type=jnp.float32) * scale
    return logits if bias is None else logits + bias


@jax.custom_vjp
def _one_head(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """q: [S, D]; k, v: [K, D]; bias: [K] float32, a constant, or None. Returns [S, D] and the lse [S], float32."""
    return _forward(q, k, v, bias)[0]


def _forward(q, k, v, bias):
    logits = _logits(q, k, bias)
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    # Normalising after the product touches S x D numbers instead of S x K.
    out = jnp.matmul(weights.astype(v.dtype), v, precision=precision_of(v.dtype),
                     preferred_element_type=jnp.float32) / total
    lse = top + jnp.log(total)
    return (out, lse[:, 0]), (q, k, v, bias, out, lse)


def _backward(residuals, gradients):
    """Recomputes the weights from the log-sum-exp [S, 1] instead of keeping [S, K] numbers per head."""
    d_out, d_lse = gradients
    q, k, v, bias, out, lse = residuals
    scale = q.shape[-1] ** -0.5
    weights = jnp.exp(_logits(q, k, bias) - lse)

    def product(a, b):
        return jnp.matmul(a.astype(q.dtype), b.astype(q.dtype), precision=precision_of(q.dtype),
                          preferred_element_type=jnp.float32)

    d_weights = product(d_out, v.T)
    # The gradient of the log-sum-exp with respect to the logits is the weights themselves.
    d_logits = weights * (d_weights - (d_out * out).sum(-1, keepdims=True) + d_lse[:, None]) * scale
    d_q, d_k, d_v = product(d_logits, k), product(d_logits.T, q), product(weights.T, d_out)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), jax.tree.map(jnp.zeros_like, bias)


_one_head.defvjp(_forward, _backward)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, *, return_lse: bool = False
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Same contract as :func:`kernels.attention.reference.attention`."""
    b, s, n, d = q.shape
    keys = k.shape[1]
    q = q.transpose(0, 2, 1, 3).reshape(b * n, s, d)  # -> [B*N, S, D]
    k, v = (x.transpose(0, 2, 1, 3).reshape(b * n, keys, d) for x in (k, v))  # -> [B*N, K, D]
    # The bias [B, K] is repeated for the heads of each sample: [B*N, K].
    per_head_bias = None if bias is None else jnp.repeat(bias.astype(jnp.float32), n, axis=0)
    blocks = -(-s * keys // MAX_LOGITS)
    if blocks == 1:
        out, lse = jax.lax.map(lambda head: _one_head(*head), (q, k, v, per_head_bias))
    else:
        rows = -(-s // blocks)
        padded = jnp.pad(q, ((0, 0), (0, rows * blocks - s), (0, 0)))
        padded = padded.reshape(b * n, blocks, rows, d)  # [B*N, S+pad, D] -> [B*N, blocks, rows, D]

        def one_head_in_blocks(head):
            q, k, v, bias = head
            return jax.lax.map(lambda rows_of_q: _one_head(rows_of_q, k, v, bias), q)

        out, lse = jax.lax.map(one_head_in_blocks, (padded, k, v, per_head_bias))
        out = out.reshape(b * n, rows * blocks, d)[:, :s]
        lse = lse.reshape(b * n, rows * blocks)[:, :s]
    out = out.reshape(b, n, s, d).transpose(0, 2, 1, 3).astype(v.dtype)  # -> [B, S, N, D]
    return (out, lse.reshape(b, n, s)) if return_lse else out
