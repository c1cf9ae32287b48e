"""Heads that tell the student's latents from real ones by what another transformer makes of them.

One head reads the predicted velocity, the others the current tokens behind some blocks. All have the same layers. A
logit above 0 means "made by the student". Source: specification of training stage 3, sections 8.1 and 8.2.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from helios_jax.errors import UserError
from helios_jax.models.layers import silu
from kernels.attention import precision_of
from kernels.attention.device import current_device

Array = jax.Array

# (kernel, strides, padding) over time, rows and columns.
_CONVOLUTIONS = (((3, 3, 3), (1, 1, 1), (1, 1, 1)), ((4, 4, 4), (2, 2, 2), (1, 1, 1)),
                 ((4, 4, 4), (2, 2, 2), (1, 1, 1)), ((3, 3, 3), (2, 1, 1), (1, 1, 1)),
                 ((3, 3, 3), (2, 1, 1), (1, 1, 1)), ((1, 3, 3), (1, 1, 1), (0, 1, 1)))

# PyTorch's start values: weights and biases uniform within 1 / sqrt(fan in).
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _bias_init(fan_in: int):
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -1, 1) * fan_in**-0.5


class Convolution(nn.Module):
    """3-D convolution. Parameters are those of ``nn.Conv``.

    XLA's CPU compiler runs the gradients of such a convolution, and a batch of several, many times slower than a matrix
    product; so there its windows are laid side by side and multiplied.
    """

    features: int
    kernel_size: tuple[int, int, int]
    strides: tuple[int, int, int]
    padding: tuple[int, int, int]
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, y, x, C] -> [B, T', y', x', features]."""
        fan_in = math.prod(self.kernel_size) * x.shape[-1]
        kernel = self.param("kernel", _kernel_init, (*self.kernel_size, x.shape[-1], self.features))
        bias = self.param("bias", _bias_init(fan_in), (self.features,))
        form = "windows" if current_device().platform == "cpu" else "3d"
        return convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.strides, self.padding, form
                        ) + bias.astype(self.dtype)


def convolve(x: Array, kernel: Array, strides: tuple[int, ...], padding: tuple[int, ...], form: str) -> Array:
    """A 3-D convolution in either form, equal up to rounding.

    Args:
      x: [B, T, y, x, C]; kernel: [kt, ky, kx, C, O]; strides, padding: over time, rows and columns.
      form: "3d", or "windows": one matrix product of all windows, [B, T', y', x', kt ky kx C].
    Returns: [B, T', y', x', O].
    """
    precision = precision_of(x.dtype)
    if form == "3d":
        return jax.lax.conv_general_dilated(x, kernel, strides, [(p, p) for p in padding], precision=precision,
                                            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))
    x = jnp.pad(x, ((0, 0), *((p, p) for p in padding), (0, 0)))
    ends = [n - k + 1 for n, k in zip(x.shape[1:4], kernel.shape[:3], strict=True)]
    windows = [x[:, t : t + ends[0] : strides[0], i : i + ends[1] : strides[1], j : j + ends[2] : strides[2]]
               for t, i, j in itertools.product(*map(range, kernel.shape[:3]))]
    return jnp.matmul(jnp.concatenate(windows, axis=-1), kernel.reshape(-1, kernel.shape[-1]), precision=precision)


class Head(nn.Module):
    """Six convolutions with GroupNorm and SiLU, a mean over all places, one number."""

    width: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, y, x, C] -> float32 [B]."""
        for i, (kernel, strides, padding) in enumerate(_CONVOLUTIONS):
            x = Convolution(self.width, kernel, strides, padding, self.dtype, name=f"conv_{i}")(x)
            x = silu(nn.GroupNorm(self.groups, epsilon=1e-5, dtype=self.dtype, name=f"norm_{i}")(x))
        x = x.mean((1, 2, 3), dtype=jnp.float32)  # [B, T', y', x', width] -> [B, width]
        return nn.Dense(1, kernel_init=_kernel_init, bias_init=_bias_init(self.width), name="out")(x)[:, 0]


@dataclasses.dataclass(frozen=True)
class Discriminator:
    """All heads as two pure functions; those behind blocks are stacked along a leading axis.

    Attributes:
      width: channels of every convolution.
      groups: of the norms; divides the width.
      blocks: behind which blocks heads stand.
      dtype: of the computation.
    """

    width: int
    groups: int
    blocks: tuple[int, ...]
    dtype: Any = jnp.float32

    def init(self, key: Array, velocity_channels: int, token_channels: int) -> dict[str, Any]:
        """Random parameters, float32: {"velocity": ..., "blocks": stacked [F, ...]}."""
        velocity, *blocks = jax.random.split(key, 1 + len(self.blocks))

        def make(key: Array, channels: int) -> dict[str, Any]:
            return self._head.init(key, jnp.zeros((1, 9, 8, 8, channels)))["params"]

        return {"velocity": make(velocity, velocity_channels),
                "blocks": jax.vmap(lambda key: make(key, token_channels))(jnp.stack(blocks))}

    def apply(self, params: dict[str, Any], velocity: Array, tokens: Array) -> Array:
        """Logits.

        Args:
          params: of :meth:`init`.
          velocity: [B, T, h, w, C].
          tokens: behind the blocks, [F, B, T, h/2, w/2, dim].
        Returns: float32 [B, 1 + F], the velocity's first.
        """
        first = self._head.apply({"params": params["velocity"]}, velocity)
        others = jax.vmap(lambda own, x: self._head.apply({"params": own}, x))(params["blocks"], tokens)
        return jnp.concatenate([first[:, None], others.T], axis=1)

    def check_grid(self, frames: int, rows: int, columns: int) -> None:
        """Checks that tokens of this grid do not vanish on their way through a head.

        Raises:
          UserError: they do.
        """
        size = [frames, rows, columns]
        for kernel, strides, padding in _CONVOLUTIONS:
            size = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, strides, padding, strict=True)]
            if min(size) < 1:
                raise UserError(f"objective.gan.crop: {frames}x{rows}x{columns} tokens are too few for the heads; "
                                "9x4x4 would do")

    @property
    def _head(self) -> Head:
        return Head(self.width, self.groups, self.dtype)
