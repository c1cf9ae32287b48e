"""Layers that the transformer and the text encoder share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from helios_jax.models.quantize import is_quantised, quantised_product
from kernels.attention import precision_of

Array = jax.Array
Dtype = Any


class Linear(nn.Module):
    """y = x W + b, with an optional low-rank adapter from the ``lora`` collection.

    Parameters: ``kernel`` [in, out] with the logical axes ``kernel_axes``, ``bias`` [out]. They are cast to ``dtype``
    at use. A quantised kernel (``helios_jax.models.quantize``) may take the plain one's place. If the ``lora``
    collection holds this module's path with ``a`` [in, r] and ``b`` [r, out] (and optionally ``bias`` [out]), y gains
    (x a) b: scales are folded into ``b``, several adapters stand side by side in r.
    """

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    kernel_axes: tuple[str | None, str | None] = ("embed", "mlp")

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.get_variable("params", "kernel")
        if not is_quantised(kernel):  # whose shape is another one
            kernel = self.param("kernel", nn.with_logical_partitioning(self.kernel_init, self.kernel_axes),
                                (x.shape[-1], self.features), self.param_dtype)
        x = x.astype(self.dtype)
        multiply = quantised_product if is_quantised(kernel) else matmul_float32
        y = multiply(x, kernel)  # [..., in] -> [..., out]
        if self.has_variable("lora", "a"):
            y = y + low_rank(x, self.get_variable("lora", "a"), self.get_variable("lora", "b"))
            if self.has_variable("lora", "bias"):
                y = y + self.get_variable("lora", "bias").astype(jnp.float32)
        if self.use_bias:
            bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, self.kernel_axes[1:]),
                              (self.features,), self.param_dtype)
            y = y + bias.astype(jnp.float32)
        return y.astype(self.dtype)


def matmul_float32(x: Array, kernel: Array) -> Array:
    """x [..., in] times kernel [in, out] in x's dtype, accumulated and returned in float32.

    The bias is then added before the one rounding to a half type, as a fused BLAS epilogue does.
    """
    return jnp.matmul(x, kernel.astype(x.dtype), precision=precision_of(x.dtype), preferred_element_type=jnp.float32)


def low_rank(x: Array, a: Array, b: Array) -> Array:
    """(x a) b in float32, with the intermediate of rank r in x's dtype: [..., in] -> [..., r] -> [..., out]."""
    return matmul_float32(matmul_float32(x, a).astype(x.dtype), b)


def gelu(x: Array) -> Array:
    """Tanh-approximate GELU, evaluated in float32 and rounded once."""
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def silu(x: Array) -> Array:
    """x sigmoid(x), evaluated in float32 and rounded once."""
    return nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: Array, eps: float) -> Array:
    """LayerNorm over the last axis without affine parameters; float32 in and out of the statistics.

    Args:
      x: [..., C] of any float dtype.
    Returns: [..., C] float32.
    """
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    centred = x - mean
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """RMS norm over the last axis; the weight is multiplied inside the float32 part, then cast back to x's dtype.

    This is the order of the Helios q/k norm (diffusers ``RMSNorm`` with a float32 upcast); UMT5's differs.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps) * weight.astype(jnp.float32)
    return y.astype(x.dtype)
