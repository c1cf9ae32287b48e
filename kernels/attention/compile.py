"""Compiles the TPU attention kernels for real chips on a machine without one.

    python -m kernels.attention.compile --chip v5p --length 11040

libtpu's compiler needs no TPU. It refuses a kernel that Mosaic cannot lower or that overflows VMEM, and it tells how
much HBM the program needs beside its arguments; it tells nothing about speed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from helios_jax.errors import UserError, command_line
from kernels.attention.api import compacted_attention
from kernels.attention.dispatch import attend

# The smallest slice of each generation; one of its chips is compiled for.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
LENGTHS = (11040, 4560, 2940)  # the three pyramid stages at 384x640
HEADS, SIZE = 40, 128


class Call(NamedTuple):
    """One call to compile.

    what: "forward" (out and log-sum-exp), "backward" (gradients of q, k, v, with the forward pass that they need), or
    "layer" (forward from the projections' output, with norms and rotation).
    """

    what: str
    queries: int
    keys: int
    heads: int = HEADS
    size: int = SIZE
    batch: int = 1
    dtype: str = "bfloat16"
    with_bias: bool = False
    implementation: str = "mosaic_tpu"


class Compiled(NamedTuple):
    """temporary: bytes of HBM beside arguments and results; text: the optimised program."""

    seconds: float
    temporary: int
    text: str


def libtpu_is_installed() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def chip_mesh(chip: str) -> Mesh:
    """A mesh of one chip that is not there."""
    if chip not in TOPOLOGIES:
        raise UserError(f"chip: one of {', '.join(TOPOLOGIES)}, got {chip!r}")
    if not libtpu_is_installed():
        raise UserError("libtpu is not installed; `pip install libtpu` brings the compiler, which needs no TPU")
    # No metadata server to ask, and another process may hold libtpu's lock.
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")):
        os.environ.setdefault(name, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    return Mesh(np.array(topology.devices[:1]), ("chip",))


def compile_for(mesh: Mesh, call: Call) -> Compiled:
    """Compiles one call; raises what the compiler raises."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    dtype = jnp.dtype(call.dtype)

    def array(*shape: int, dtype=dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    if call.what == "layer":
        width, half = call.heads * call.size, call.size // 2

        def function(q, k, v, norm, cos, sin):
            return compacted_attention(q, k, v, norm_q=norm, norm_k=norm, cos=cos, sin=sin, num_heads=call.heads,
                                       implementation=call.implementation)

        arguments = [array(call.batch, call.queries, width)] * 3 + [array(width, dtype=jnp.float32)]
        arguments += [array(call.queries, half, dtype=jnp.float32)] * 2
    else:
        def forward(q, k, v, bias):
            return attend(q, k, v, bias, return_lse=True, implementation=call.implementation)

        def backward(q, k, v, bias, weights):
            return jax.vjp(lambda *qkv: forward(*qkv, bias)[0], q, k, v)[1](weights)

        queries = array(call.batch, call.queries, call.heads, call.size)
        keys = array(call.batch, call.keys, call.heads, call.size)
        bias = array(call.batch, call.keys, dtype=jnp.float32) if call.with_bias else None
        arguments = [queries, keys, keys, bias]
        function = forward
        if call.what == "backward":
            function = backward
            arguments.append(queries)
    start = time.monotonic()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # the dispatch reads the device from it
        compiled = jax.jit(function).lower(*arguments).compile()
    return Compiled(time.monotonic() - start, compiled.memory_analysis().temp_size_in_bytes, compiled.as_text())


@command_line
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.attention.compile", description=__doc__.split("\n\n")[0])
    parser.add_argument("--chip", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--length", nargs="+", type=int, default=list(LENGTHS), help="tokens (default: %(default)s)")
    parser.add_argument("--what", nargs="+", choices=("forward", "backward", "layer"), default=["forward", "backward"])
    parser.add_argument("--implementation", default="mosaic_tpu")
    options = parser.parse_args(arguments)
    failures = 0
    print("chip what     tokens seconds  temporary MiB")
    for chip in options.chip:
        mesh = chip_mesh(chip)
        for what in options.what:
            for length in options.length:
                line = f"{chip:4} {what:8} {length:6}"
                try:
                    done = compile_for(mesh, Call(what, length, length, implementation=options.implementation))
                except Exception as error:  # whatever the compiler says is the result
                    failures += 1
                    print(f"{line} failed: {str(error).splitlines()[0]}", flush=True)
                else:
                    print(f"{line} {done.seconds:7.1f} {done.temporary / 2**20:14.1f}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    main(sys.argv[1:])
