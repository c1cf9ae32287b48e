"""cuDNN's fused attention on an NVIDIA GPU, through ``jax.nn.dot_product_attention``."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.attention.device import current_device

MAX_HEAD_SIZE = 128  # what every supported card has; Hopper alone goes to 256
FIRST_GENERATION = (8, 0)  # Ampere


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, *, return_lse: bool = False
) -> jax.Array:
    """Same contract as :func:`kernels.attention.reference.attention`, within the limits that it refuses by name."""
    reason = _why_not(q, bias, return_lse)
    if reason is not None:
        raise NotImplementedError(reason)
    try:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    except (RuntimeError, ValueError) as error:  # no cuDNN installed, or one that is too old for the call
        raise NotImplementedError(f"cuDNN: {error}") from error


def _why_not(q: jax.Array, bias: jax.Array | None, return_lse: bool) -> str | None:
    device = current_device()
    if device.platform != "gpu":
        return f"cuDNN runs on NVIDIA GPUs, the device is {device.kind} ({device.platform})"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's fused attention takes bfloat16 or float16, got {q.dtype}"
    if q.shape[-1] > MAX_HEAD_SIZE or q.shape[-1] % 8:
        return f"head size: a multiple of 8 up to {MAX_HEAD_SIZE}, got {q.shape[-1]}"
    if bias is not None:
        return "cuDNN rounds the bias to 16 bits, which moves the weight of the folded prompt rows by up to 1.6 %"
    if return_lse:
        return "cuDNN's log-sum-exp arrives rounded to bfloat16"
    capability = getattr(jax.devices()[0], "compute_capability", None)  # absent when compiling ahead of time
    if capability is not None and tuple(int(part) for part in str(capability).split(".")) < FIRST_GENERATION:
        return f"cuDNN's fused attention needs compute capability 8.0, this card has {capability}"
    return None
