"""The TPU kernels compile for real chips, with no more memory beside their arguments than they must keep."""

from __future__ import annotations

import pytest

from kernels.attention import compile as aot
from kernels.attention import tpu
from kernels.attention.compile import HEADS, LENGTHS, SIZE, TOPOLOGIES, Call

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fully_optimized"),
    pytest.mark.skipif(not aot.libtpu_is_installed(), reason="needs libtpu (pip install libtpu), which brings the "
                                                             "TPU compiler and runs on any machine"),
]
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module", params=TOPOLOGIES)
def mesh(request):
    return aot.chip_mesh(request.param)


@pytest.mark.parametrize("length", LENGTHS)
def test_forward_compiles_at_production_lengths_with_little_temporary_memory(mesh, length):
    done = aot.compile_for(mesh, Call("forward", length, length))
    print(f"{mesh.devices.flat[0].device_kind} forward {length}: {done.temporary / MEBIBYTE:.1f} MiB")
    assert "attention_forward" in done.text  # the kernel, not a fallback
    # Two bytes per entry of q, k, v and out, once each: what a change of layout around the kernel may cost.
    assert done.temporary < 4 * 2 * HEADS * length * SIZE + 32 * MEBIBYTE


@pytest.mark.parametrize("length", LENGTHS)
def test_backward_compiles_at_production_lengths_without_anything_of_size_keys_by_queries(mesh, length):
    done = aot.compile_for(mesh, Call("backward", length, length))
    print(f"{mesh.devices.flat[0].device_kind} backward {length}: {done.temporary / MEBIBYTE:.1f} MiB")
    assert "attention_forward" in done.text and "attention_backward" in done.text
    assert done.temporary < 12 * 2 * HEADS * length * SIZE + 64 * MEBIBYTE


@pytest.mark.parametrize("length", LENGTHS)
def test_queries_are_prepared_in_the_kernel_at_production_lengths(mesh, length):
    done = aot.compile_for(mesh, Call("layer", length, length))
    print(f"{mesh.devices.flat[0].device_kind} layer {length}: {done.temporary / MEBIBYTE:.1f} MiB")
    # The kernel's first operand is the projection itself, with all heads in a row.
    call = next(line for line in done.text.splitlines() if "attention_forward" in line and "custom-call(" in line)
    assert f"bf16[1,{length},{HEADS * SIZE}]" in call.split("custom-call(")[1]
    # Prepared keys and the kernel's output, once each, and the rotary tables.
    assert done.temporary < 2 * 2 * HEADS * length * SIZE + 32 * MEBIBYTE


@pytest.mark.parametrize("length", LENGTHS)
def test_softmax_by_a_bound_compiles_at_production_lengths(mesh, length, monkeypatch):
    monkeypatch.setattr(tpu, "CHIPS", {name: chip._replace(bounded=True) for name, chip in tpu.CHIPS.items()})
    aot.compile_for(mesh, Call("forward", length, length))


@pytest.mark.parametrize("call", [
    Call("forward", 2940, 513, with_bias=True),
    Call("backward", 2940, 513, with_bias=True),
    Call("backward", 301, 777, heads=2, size=64, batch=2),
    Call("backward", 100, 37, heads=2, size=32, dtype="float32", with_bias=True),
    Call("forward", 256, 60000, heads=2),
], ids=lambda call: f"{call.what}-{call.queries}x{call.keys}-{call.size}")
def test_other_shapes_compile(mesh, call):
    aot.compile_for(mesh, call)
