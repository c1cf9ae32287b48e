"""Counting: the floating-point operations of a traced function, the collectives of a compiled one, and what chips do.

Chip numbers are the vendor's published peaks of dense products; bandwidths between TPUs are those of one torus axis in
both directions (Google's documentation of Cloud TPU and "How to Scale Your Model", chapter 2), between GPUs NVLink's in
one direction.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator chip.

    Attributes:
      name: as in a topology's name.
      flops: peak of bfloat16 products, per second.
      memory: bytes that a program may use.
      memory_bandwidth: bytes per second.
      link_bandwidth: bytes per second that a TPU sends along one axis of the torus, both directions together, or a GPU
        over NVLink.
      few_bits: peaks of products of two operands of a narrower type, by its name, where it has units for them.
    """

    name: str
    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    few_bits: Mapping[str, float] = dataclasses.field(default_factory=dict)


CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in (
    Chip("v4", 275e12, 30.75 * 2**30, 1.23e12, 9e10),
    Chip("v5e", 197e12, 15.75 * 2**30, 0.82e12, 9e10, {"int8": 393e12}),
    Chip("v5p", 459e12, 95.74 * 2**30, 2.77e12, 1.8e11, {"int8": 918e12}),
    Chip("v6e", 918e12, 31.25 * 2**30, 1.64e12, 1.8e11, {"int8": 1836e12}),
    Chip("h100", 989.4e12, 79.14 * 2**30, 3.35e12, 4.5e11,
         {"int8": 1978.9e12, "float8_e4m3fn": 1978.9e12}),
)}


# ``device_kind`` of JAX -> chip; the peaks of the H200 are those of the H100 (SXM).
_CHIP_OF = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
            "TPU v6 lite": "v6e", "TPU v6e": "v6e", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h100"}


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """Peak of a JAX device's products per second, or None where it is not known.

    Args:
      dtype: of both operands; a type without faster units of its own counts as bfloat16.
    """
    name = _CHIP_OF.get(device_kind)
    return None if name is None else CHIPS[name].few_bits.get(dtype, CHIPS[name].flops)


def floor_seconds(flops: Mapping[str, float], device_kind: str, devices: int = 1) -> float | None:
    """The least time for products of several types, each at its own peak; None where the device's is not known.

    Args:
      flops: of :func:`flops_by_type`, over all devices.
    """
    if peak_flops(device_kind) is None:
        return None
    return sum(count / peak_flops(device_kind, dtype) for dtype, count in flops.items()) / devices


class Modelled(NamedTuple):
    """Seconds of arithmetic and of communication; best: one hides behind the other, worst: neither does."""

    arithmetic: float
    communication: float

    @property
    def best(self) -> float:
        return max(self.arithmetic, self.communication)

    @property
    def worst(self) -> float:
        return self.arithmetic + self.communication


def model_time(chip: Chip, flops: float, sent: float, efficiency: float) -> Modelled:
    """A model, no measurement: ``flops`` operations of a chip at a share of its peak, and ``sent`` bytes that leave it
    over its link."""
    return Modelled(flops / (chip.flops * efficiency), sent / chip.link_bandwidth)


# -- operations of a traced function --------------------------------------------------------------------------------


def count_flops(jaxpr: Any) -> float:
    """Operations (2 per multiply-add) of all matrix products and convolutions, over all devices.

    Loops count as often as they run; a loop of unknown length and a kernel without a cost estimate count once. Element
    by element work is left out: it is bound by memory, not by arithmetic.

    Args:
      jaxpr: of ``jax.make_jaxpr``.
    """
    return sum(flops_by_type(jaxpr).values())


def flops_by_type(jaxpr: Any) -> dict[str, float]:
    """As :func:`count_flops`, by the type of the operands: of two different ones the wider; of a kernel its first
    output's."""
    found: dict[str, float] = defaultdict(float)
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        for dtype, count in _equation_flops(equation).items():
            found[dtype] += count
    return dict(found)


def _equation_flops(equation: Any) -> Mapping[str, float]:
    name, params = equation.primitive.name, equation.params
    result = equation.outvars[0].aval if equation.outvars else None
    if name in ("dot_general", "conv_general_dilated"):
        lhs, rhs = (operand.aval for operand in equation.invars[:2])
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            inputs = math.prod(lhs.shape[i] for i in contracted)
        else:
            inputs = math.prod(rhs.shape) / max(rhs.shape[params["dimension_numbers"].rhs_spec[0]], 1)
        dtype = max(lhs.dtype, rhs.dtype, key=lambda dtype: dtype.itemsize)
        return {dtype.name: 2.0 * math.prod(result.shape) * inputs}
    if name == "pallas_call" and params.get("cost_estimate") is not None:
        return {result.dtype.name: float(params["cost_estimate"].flops)}
    if name == "cond":
        return max(map(flops_by_type, params["branches"]), key=lambda found: sum(found.values()))
    times = {"scan": params.get("length", 1), "shard_map": _parts(params)}.get(name, 1)
    found: dict[str, float] = defaultdict(float)
    for function in _functions(params):
        for dtype, count in flops_by_type(function).items():
            found[dtype] += times * count
    return found


def _functions(params: Mapping[str, Any]) -> list[Any]:
    """The functions that an equation calls; of a custom derivative only the function itself."""
    found = []
    for name, value in params.items():
        if name in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun"):
            continue
        values = value if isinstance(value, (tuple, list)) else (value,)
        found += [v for v in values if hasattr(v, "eqns") or hasattr(getattr(v, "jaxpr", None), "eqns")]
    return found


def _parts(params: Mapping[str, Any]) -> int:
    """Into how many different parts a ``shard_map`` divides its work."""
    if "mesh" not in params:
        return 1
    used = set()
    for spec in params["in_specs"]:
        for entry in spec:
            used |= set(entry if isinstance(entry, tuple) else (entry,)) - {None}
    return math.prod(params["mesh"].shape[axis] for axis in used)


# -- collectives of a compiled program ------------------------------------------------------------------------------

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2,
          "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*)?.*\{\s*$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(body|condition|calls|to_apply|called_computations|branch_computations|true_computation|"
                     r"false_computation)=(?:\{([^}]*)\}|(%?[\w.\-]+))")
# Three ways of writing groups: as lists, as a table's shape, as axes of a mesh, whole or in part: 'a' or 'a':(1)2.
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\](?:, device_ids=\([\d,]*\))?"
                     r" \{([^}]*)\})")
_AXIS = re.compile(r"'([^']+)'(?:(?:=|:\(\d+\))(\d+))?")
_DEVICES = re.compile(r"num_partitions=(\d+)")
_CONSTANT = re.compile(r"%?([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)")
_BOUND = re.compile(r"ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """One kind of collective in one execution.

    count: how often it runs; bytes: the results on one device, summed; sent: bytes that one device sends on a ring.
    """

    count: int
    bytes: float
    sent: float


def _sent(kind: str, result: float, group: int) -> float:
    """Bytes that a device of a group sends for a result of so many bytes, by the usual algorithms on a ring."""
    if kind == "collective-permute":
        return result
    parts = {"all-reduce": 2 / group, "reduce-scatter": 1.0}.get(kind, 1 / group)
    return result * (group - 1) * parts


def collectives(hlo: str) -> dict[str, Collective]:
    """The collectives of one execution, by kind, with loops counted as often as they run.

    The branches of a condition all count: the compiler writes the exchange of a ring's next piece as a condition that
    is false in the last round only.

    Args:
      hlo: text of the compiled program.
    """
    lines: dict[str, list[str]] = defaultdict(list)
    current = entry = None
    for line in hlo.splitlines():
        if line and not line[0].isspace():
            match = _COMPUTATION.match(line)
            current = match[2] if match else None
            entry = current if match and match[1] else entry
        elif current is not None:
            lines[current].append(line)
    devices = int(found[1]) if (found := _DEVICES.search(hlo)) else 1
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])

    def visit(name: str, times: int) -> None:
        for line in lines.get(name, ()):
            found = _COLLECTIVE.search(line)
            if found:
                kind, size = found[2], _result_bytes(found[1], found[3] and found[2] != "all-reduce")
                for place, number in enumerate((1, size, _sent(kind, size, _group_size(line, devices)))):
                    totals[kind][place] += times * number
                continue
            called = [(kind, name.strip().lstrip("%")) for kind, several, one in _CALLED.findall(line)
                      for name in (several or one).split(",")]
            repeat = _trips(line, lines.get(dict(called).get("condition"), ()))
            for kind, name in called:
                visit(name, times * (repeat if kind in ("body", "condition") else 1))

    if entry is not None:
        visit(entry, 1)
    return {kind: Collective(int(count), size, sent) for kind, (count, size, sent) in sorted(totals.items())}


def _trips(line: str, condition: Iterable[str]) -> int:
    """How often a loop runs: as the compiler notes it, or the bound that its condition compares a counter with (which
    starts at 0 and grows by 1, as that of a scan); 1 where the bound is no constant."""
    if known := _TRIPS.search(line):
        return int(known[1])
    constants = {found[1]: int(found[2]) for found in map(_CONSTANT.search, condition) if found}
    bound = next((found[1] for found in map(_BOUND.search, condition) if found), None)
    return constants.get(bound, 1)


def _group_size(line: str, devices: int) -> int:
    """How many devices exchange data with each other in a collective; no groups means all of them."""
    found = _GROUPS.search(line)
    if found is None:
        return devices
    listed, width, mesh, axes = found.groups()
    if mesh is None:
        return int(width or listed.count(",") + 1)
    sizes = dict(_AXIS.findall(mesh))
    return math.prod(int(part or sizes[name]) for name, part in _AXIS.findall(axes))


def _result_bytes(result: str, holds_operands: bool) -> float:
    """Bytes of a result type; the start of an asynchronous gather or permutation holds its operands in front."""
    arrays = [(dtype, [int(n) for n in shape.split(",") if n]) for dtype, shape in _ARRAY.findall(result)]
    if holds_operands and result.startswith("("):
        arrays = [(dtype, shape) for dtype, shape in arrays if shape]  # without the counters of a permutation
        arrays = arrays[len(arrays) // 2 :]
    return sum(_BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in arrays)
