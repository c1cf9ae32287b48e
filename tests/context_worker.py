"""Attention over the context axis on eight CPU devices, in a process of its own; see test_context_parallel.py.

Prints one JSON object: case -> largest deviation from one device, relative to its largest entry.
"""

from __future__ import annotations

import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from attention_base import Case, inputs  # noqa: E402
from jax.sharding import AxisType  # noqa: E402

from helios_jax.errors import UserError  # noqa: E402
from helios_jax.sharding import MeshConfig, Partition, use  # noqa: E402
from kernels.attention import attend, context_parallel  # noqa: E402

ODD, EVEN = Case(queries=37, keys=53, heads=4, size=32), Case(queries=32, keys=32, heads=4, size=32)
# name -> (mesh axes, case, options of context_parallel)
CASES = {
    "4 devices, odd lengths": ({"context": 4}, ODD, {}),
    "8 devices, fewer heads than devices": ({"context": 8}, ODD, {}),
    "8 devices, even length": ({"context": 8}, EVEN, {}),
    "data, context and tensor": ({"data": 2, "context": 2, "tensor": 2}, ODD,
                                 {"batch_axes": ("data",), "head_axis": "tensor"}),
    "cross-attention with a bias": ({"context": 4}, Case(queries=37, keys=9, heads=3, with_bias=True), {}),
    "TPU kernels": ({"context": 2}, Case(queries=37, keys=53, heads=1), {"implementation": "mosaic_tpu_interpret"}),
}
# name -> (mesh, case), through the mesh of a training run: four devices do not divide two samples
RUNS = {
    "run: small batch": (MeshConfig(fsdp=4, context=2), Case(queries=37, keys=53, heads=3)),
    "run: tokens whole": (MeshConfig(data=2, tensor=3), Case(queries=37, keys=53, heads=3)),
    "run: cross-attention": (MeshConfig(context=8), Case(queries=37, keys=9, heads=3, with_bias=True)),
}


def results(attention, case):
    q, k, v, bias, w, w_lse = inputs(case)

    def loss(q, k, v):
        out, lse = attention(q, k, v, bias, return_lse=True)
        return (out * w).sum() + (lse * w_lse).sum(), (out, attention(q, k, v, bias), lse)

    return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v))


def difference(got, want) -> float:
    pairs = zip(got, want, strict=True)
    return max(float(jnp.abs(np.asarray(x) - true).max() / jnp.abs(true).max()) for x, true in pairs)


def main() -> None:
    report = {}
    for name, (axes, case, options) in CASES.items():
        mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes),
                             devices=jax.devices()[:int(np.prod(list(axes.values())))])
        report[name] = difference(results(context_parallel(mesh, **options), case), results(attend, case))
    for name, (sizes, case) in RUNS.items():
        want = results(attend, case)
        with use(Partition.create(sizes)):
            report[name] = difference(results(attend, case), want)
            text = jax.jit(lambda *operands: attend(*operands)).lower(*inputs(case)[:4]).as_text()
        report[f"{name}, exchanged arrays"] = text.count('"stablehlo.all_to_all"')
    mesh = jax.make_mesh((8,), ("context",), axis_types=(AxisType.Auto,))
    q, k, v, *_ = inputs(Case(batch=1, heads=3))
    try:
        context_parallel(mesh)(q, k, v)
    except UserError as error:
        report["error"] = str(error)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
