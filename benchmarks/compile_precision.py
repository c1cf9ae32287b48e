"""Compiles the 14B model's feed-forward in every precision for an H100 without one: what its products become.

    python benchmarks/compile_precision.py                          # 11 040 tokens, four stacked layers
    python benchmarks/compile_precision.py --modes fp8 int8 --tokens 4560

Needs what benchmarks/compile_gpu.py needs, and qwix. One row per precision: the calls of the matrix library with the
types of their operands and result, bytes of the arguments, temporary memory. Nothing runs: no speed follows from this.

The compiler prefers matrix products in Triton where it cannot measure; on a card it measures both and takes the faster.
Here Triton is switched off, so that the library's calls show.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

from compile_gpu import TARGET, why_not

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
LAYERS = 4


def library_calls(text: str) -> list[str]:
    """The products of a compiled program, for example '__cublas$lt$matmul$f8: f8e4m3fn x f8e4m3fn -> bf16'."""
    types = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", text))
    calls = re.findall(r'= \(?(\w+)\[.*? custom-call\(%([\w.\-]+), %([\w.\-]+).*?custom_call_target="(__cublas[^"]+)"',
                       text)
    return [f"{target}: {types.get(a)} x {types.get(b)} -> {result}" for result, a, b, target in calls]


def compile_mode(mode: str, tokens: int) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from helios_jax.config import TransformerConfig
    from helios_jax.convert.rules import abstract_params
    from helios_jax.models.quantize import as_qarrays
    from helios_jax.models.transformer import FeedForward

    topology = topologies.get_topology_desc(platform="cuda", topology_name="1x1x1", topology="1x1x1",
                                            target_config=TARGET.read_text())
    place = NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())
    config = TransformerConfig(num_layers=LAYERS)
    params = abstract_params("transformer", config, jnp.bfloat16, mode)["blocks"]["ffn"]
    params = as_qarrays(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), params))
    x = jax.ShapeDtypeStruct((1, tokens, config.dim), jnp.bfloat16, sharding=place)
    module = FeedForward(config.ffn_dim, config.dim, jnp.bfloat16)

    def layers(params, x):
        return jax.lax.scan(lambda x, layer: (x + module.apply({"params": layer}, x), None), x, params)[0]

    compiled = jax.jit(layers).lower(params, x).compile({"xla_gpu_enable_triton_gemm": False})
    memory = compiled.memory_analysis()
    return {"precision": mode, "tokens": tokens, "device": topology.devices[0].device_kind, "jax": jax.__version__,
            "calls": library_calls(compiled.as_text()), "arguments": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes}


def main() -> int:
    modes = ("none", "fp8", "int8", "int8_weights", "int4_weights")
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--modes", nargs="+", choices=modes, default=modes)
    p.add_argument("--tokens", type=int, default=11040)
    p.add_argument("--json", metavar="FILE")
    arguments = p.parse_args()
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 2
    # The plugin looks for a card when it is loaded.
    os.environ.update(JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", JAX_PLATFORMS="cpu,cuda")
    rows = []
    for mode in arguments.modes:
        row = compile_mode(mode, arguments.tokens)
        rows.append(row)
        print(f"{mode:<13} arguments {row['arguments'] / 1e6:6.0f} MB   temporary {row['temporary'] / 1e6:6.0f} MB   "
              f"{'; '.join(row['calls'])}", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
