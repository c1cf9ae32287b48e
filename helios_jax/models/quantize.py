"""Low precision of the linear layers: which kernels are quantised, into what, and how they are multiplied.

A quantised kernel is a ``qwix.QArray`` where the plain array [..., in, out] was:

  qvalue  [..., out, in]     the numbers in few bits. Inputs come last, because the 8-bit matrix units of GPUs read both
                             operands along them; kept as [in, out], the compiler would hold a transposed copy of the
                             whole stack.
  scale   [..., out, tiles]  float32; w = scale * qvalue.

With one scale per output the scale leaves the sum over inputs. Then the inputs are quantised, too, each token by its
own largest absolute value, and the product is one of few-bit numbers. Tokens do not see each other, so that no video
depends on those it shares a batch with. With several scales along the inputs (weights only) the kernel is widened to
the inputs' type before the product.

qwix is needed only where a precision is asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from helios_jax.errors import UserError
from helios_jax.models.streaming import STACKS
from kernels.attention import precision_of

Array = jax.Array
QArray = Any  # qwix.QArray, which this module must not need to be imported
Path = tuple[str, ...]

# The arrays of a quantised kernel, by which it is known in a checkpoint.
PARTS = ("qvalue", "scale")


@dataclasses.dataclass(frozen=True)
class Format:
    """How a kernel is stored.

    Attributes:
      dtype: of ``qvalue``.
      tile: at most so many inputs share a scale (weights only); None for one scale per output and quantised inputs.
    """

    dtype: str
    tile: int | None = None

    def tiles(self, features_in: int) -> int:
        """Scales along the inputs: tiles are equal, and at least two unless ``tile`` is None."""
        if self.tile is None:
            return 1
        return next(n for n in range(2, features_in + 1) if features_in % n == 0 and features_in // n <= self.tile)

    def scale_shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of ``scale``, for a plain kernel [..., in, out]."""
        *lead, features_in, features_out = kernel_shape
        return (*lead, features_out, self.tiles(features_in))


_FP8, _INT8 = Format("float8_e4m3fn"), Format("int8")
_INT8_WEIGHTS, _INT4_WEIGHTS = Format("int8", tile=128), Format("int4", tile=128)
# Precision -> format of each component's kernels. The text encoder runs once per prompt, where few-bit products would
# save nothing, and every frame follows from its rows; so of it only the weights are quantised, to no less than int8.
PRECISIONS: dict[str, dict[str, Format]] = {
    "none": {},
    "fp8": {"transformer": _FP8, "text_encoder": _INT8_WEIGHTS},
    "int8": {"transformer": _INT8, "text_encoder": _INT8_WEIGHTS},
    "int8_weights": {"transformer": _INT8_WEIGHTS, "text_encoder": _INT8_WEIGHTS},
    "int4_weights": {"transformer": _INT4_WEIGHTS, "text_encoder": _INT8_WEIGHTS},
}
# Quantised are the kernels of the components' stacks of layers. Everything else stays as it is: patch embeddings, the
# condition embedder (time_embedder, time_proj, text projection), proj_out and the token table; and in the stacks what
# is no kernel: biases, norms, scale_shift_table, history_key_scale, relative biases.


def format_of(component: str, path: Path, precision: str) -> Format | None:
    """The format of one parameter; None where it stays as it is."""
    stack = STACKS.get(component)
    is_kernel = stack is not None and path[: len(stack)] == stack and path[-1] == "kernel"
    return PRECISIONS[precision].get(component) if is_kernel else None


def is_quantised(leaf: Any) -> bool:
    return hasattr(leaf, "qvalue")


def require_qwix() -> Any:
    """The package. Raises UserError where it is not installed."""
    try:
        import qwix
    except ImportError:
        raise UserError("precision: low precision needs the package qwix, which is not installed (pip install qwix)"
                        ) from None
    return qwix


@functools.partial(jax.jit, static_argnums=1)
def quantise(kernel: Array, format: Format) -> QArray:
    """A kernel [..., in, out] of any float type in few bits, see the top of this file for the result's shapes."""
    weights = jnp.swapaxes(kernel, -1, -2).astype(jnp.float32)  # [..., in, out] -> [..., out, in]
    last = weights.ndim - 1
    tiles = format.tiles(weights.shape[-1])
    tiled = {last: weights.shape[-1] // tiles} if tiles > 1 else {}
    return require_qwix().quantize(weights, jnp.dtype(format.dtype), channelwise_axes=range(last), tiled_axes=tiled)


def as_qarrays(tree: Any) -> Any:
    """The same nested dicts with a ``QArray`` for every dict of its parts."""
    if not isinstance(tree, dict):
        return tree
    if tree.keys() == set(PARTS):
        return require_qwix().QArray(tree["qvalue"], tree["scale"], qtype=jnp.dtype(tree["qvalue"].dtype))
    return {name: as_qarrays(value) for name, value in tree.items()}


def quantised_product(x: Array, kernel: QArray) -> Array:
    """x [..., in] times a quantised kernel [out, in] -> float32 [..., out].

    With quantised inputs an int8 product is a sum of int32, exact; an fp8 product is summed in float32 and comes in
    x's type, whose rounding is far below that of the inputs and halves what a bfloat16 model writes and reads again.
    """
    qwix = require_qwix()
    inputs_with_inputs = (((x.ndim - 1,), (1,)), ((), ()))
    if kernel.scale.shape[-1] > 1:
        weights = qwix.dequantize(kernel).astype(x.dtype)
        return jax.lax.dot_general(x, weights, inputs_with_inputs, precision=precision_of(x.dtype),
                                   preferred_element_type=jnp.float32)
    is_integer = jnp.issubdtype(kernel.qvalue.dtype, jnp.integer)
    # A token's largest value becomes 127. By itself qwix makes it 127.5, which the last bit rounds to either side: the
    # same video would then differ from one compiled program or mesh to another by whole steps.
    calibration = f"absmax,{127.5 / 127}" if is_integer else "absmax"
    # In float32, because a bfloat16 quotient has no more digits than an int8 and would be rounded twice.
    x_few_bits = qwix.quantize(x.astype(jnp.float32), kernel.qtype, channelwise_axes=range(x.ndim - 1),
                               calibration_method=calibration)
    result = jnp.float32 if is_integer else x.dtype
    return qwix.dot_general(x_few_bits, kernel, inputs_with_inputs, preferred_element_type=result).astype(jnp.float32)


# --- what devices can do ---------------------------------------------------------------------------------------------

# Pattern of jax's ``device_kind`` -> modes whose products the device makes in that format. In all other modes the
# numbers are stored in few bits and multiplied in a wider type. No mode multiplies int4 by int4: Hopper has no such
# instruction, and XLA cannot compile it for a CPU.
NATIVE_PRODUCTS = (
    ("cpu", ("int8",)),
    ("NVIDIA (H100|H200|GH200|L4|L40|GeForce RTX 40)", ("fp8", "int8")),
    ("NVIDIA (A100|A10|A30|GeForce RTX 30)", ("int8",)),
    ("TPU v[56]", ("int8",)),
)


def check_precision(precision: str, device_kind: str) -> str | None:
    """What a user should know of a mode on a device, in one line; None where there is nothing to say.

    Args:
      precision: 'none' or a mode.
      device_kind: jax's name of the device; of one that is not in the table nothing is known.

    Raises:
      UserError: there is no such mode.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision: one of {', '.join(PRECISIONS)}, got {precision!r}")
    native = next((modes for kind, modes in NATIVE_PRODUCTS if re.match(kind, device_kind)), None)
    if native is None or precision in ("none", *native):
        return None
    return (f"precision {precision} on {device_kind}: weights take less memory, but products are made in a wider type "
            f"and no faster; in few bits it multiplies {' and '.join(native)}")
