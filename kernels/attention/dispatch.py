"""The variants of the core attention and the choice between them.

Every variant is a function of the contract of :func:`kernels.attention.reference.attention`. It raises
``NotImplementedError`` with its reason when it cannot serve a call; the dispatch then tries the next of its device's
order. A variant asked for by name fails loudly instead.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import jax

from helios_jax.errors import UserError
from kernels.attention import partition
from kernels.attention.device import Device, current_device
from kernels.attention.prologue import RawQueries

Array = jax.Array
Core = Callable[..., Array | tuple[Array, Array]]

# name -> "module:function", imported when first tried: a kernel's front end is not loaded on other devices.
VARIANTS: dict[str, str] = {
    "per_head": "kernels.attention.per_head:attention",
    "cudnn": "kernels.attention.cudnn:attention",
    "mosaic_gpu": "kernels.attention.gpu:attention",
    "mosaic_gpu_interpret": "kernels.attention.gpu:interpreted",
    "mosaic_tpu": "kernels.attention.tpu:attention",
    "mosaic_tpu_interpret": "kernels.attention.tpu:interpreted",
    "xla": "kernels.attention.reference:bounded_attention",
}


class Order(NamedTuple):
    """What ``implementation=None`` tries on a device.

    platform: "cpu", "gpu" or "tpu"; kind: a part of the device's name, "" for every device of the platform.
    measured: the measurement that the order rests on, or None where it is a judgement that nothing has measured.
    """

    platform: str
    kind: str
    variants: tuple[str, ...]
    measured: str | None


# The first entry that fits the device decides.
ORDERS: tuple[Order, ...] = (
    Order("cpu", "", ("per_head", "xla"), "two Zen 5 cores: see per_head.py"),
    Order("tpu", "", ("mosaic_tpu", "xla", "per_head"), None),
    Order("gpu", "", ("cudnn", "mosaic_gpu", "xla", "per_head"), "an H200: see docs/kernels_gpu.md"),
)
FALLBACK = ("xla", "per_head")


class Explanation(NamedTuple):
    """What the dispatch does with a call. chosen: a variant or None; refused: variant -> reason, as tried."""

    device: Device
    chosen: str | None
    refused: dict[str, str]


def order_for(device: Device) -> tuple[str, ...]:
    """The variants that the dispatch tries on a device, in order."""
    for entry in ORDERS:
        if entry.platform == device.platform and entry.kind in device.kind:
            return entry.variants
    return FALLBACK


def variant(name: str) -> Core:
    """The core function of a variant."""
    if name not in VARIANTS:
        raise UserError(f"attention implementation: one of {', '.join(VARIANTS)}, got {name!r}")
    module, function = VARIANTS[name].split(":")
    return getattr(importlib.import_module(module), function)


def attend(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None = None,
    *,
    return_lse: bool = False,
    implementation: str | Core | None = None,
) -> Array | tuple[Array, Array]:
    """Scaled dot-product attention through the first variant that serves the call.

    Within :func:`kernels.attention.partition.use` it runs on that mesh.

    Args:
      q: [B, S, N, D]; k, v: [B, K, N, D]; bias: [B, K] float32 added to the logits, a constant, or None.
      return_lse: also return the log-sum-exp.
      implementation: a name from ``VARIANTS``, a function of the core contract, or None for the device's order.
    Returns: [B, S, N, D] in q's dtype; with ``return_lse`` also [B, N, S] float32.
    Raises:
      UserError: unknown name, or shapes that do not fit each other.
      NotImplementedError: the named variant, or every variant of the device, refuses the call.
    """
    _check_shapes(q, k, v, bias)
    if callable(implementation):
        return implementation(q, k, v, bias, return_lse=return_lse)
    core = functools.partial(_attend_on_one_device, implementation=implementation)
    return partition.per_device(core, q, k, v, bias, return_lse=return_lse)


def attend_raw_queries(
    queries: RawQueries,
    k: Array,
    v: Array,
    *,
    eps: float,
    return_lse: bool = False,
    implementation: str | Core | None = None,
) -> Array | tuple[Array, Array]:
    """:func:`attend` of queries that come straight from their projection.

    A variant may norm and rotate them itself: it then has a function ``attend_raw_queries`` of this contract as an
    attribute. It is asked where it is the variant of first choice and the arrays are not divided over a mesh.
    """
    if not callable(implementation) and not partition.is_in_use():
        core = variant(implementation or order_for(current_device())[0])
        if hasattr(core, "attend_raw_queries"):
            try:
                return core.attend_raw_queries(queries, k, v, eps=eps, return_lse=return_lse)
            except NotImplementedError:
                pass  # prepared queries may be served; if not, the reason is given there
    return attend(queries.prepared(k.shape[2], eps), k, v, return_lse=return_lse, implementation=implementation)


def _attend_on_one_device(q: Array, k: Array, v: Array, bias: Array | None, *, implementation: str | None,
                          return_lse: bool) -> Array | tuple[Array, Array]:
    if implementation is not None:
        return variant(implementation)(q, k, v, bias, return_lse=return_lse)
    reasons = []
    for name in order_for(current_device()):
        try:
            return variant(name)(q, k, v, bias, return_lse=return_lse)
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
    raise NotImplementedError("no attention variant serves this call: " + "; ".join(reasons))


def explain(q: Array, k: Array, v: Array, bias: Array | None = None, *, return_lse: bool = False) -> Explanation:
    """Which variant serves a call, and why those before it do not. Nothing is computed.

    Args: as :func:`attend`; arrays or ``jax.ShapeDtypeStruct``.
    """
    _check_shapes(q, k, v, bias)
    device, refused = current_device(), {}
    for name in order_for(device):
        core = variant(name)
        try:
            jax.eval_shape(lambda *args, core=core: core(*args, return_lse=return_lse), q, k, v, bias)
        except NotImplementedError as reason:
            refused[name] = str(reason)
        else:
            return Explanation(device, name, refused)
    return Explanation(device, None, refused)


def _check_shapes(q: Array, k: Array, v: Array, bias: Array | None) -> None:
    fits = len(q.shape) == 4 and k.shape == v.shape == (q.shape[0], k.shape[1], *q.shape[2:]) and min(q.shape) > 0
    if not fits or k.shape[1] == 0:
        raise UserError(f"attention: q [B, S, N, D] and k, v [B, K, N, D], none empty, got {q.shape}, {k.shape}, "
                        f"{v.shape}")
    if bias is not None and bias.shape != k.shape[:2]:
        raise UserError(f"attention bias: [B, K] = {k.shape[:2]}, got {bias.shape}")
