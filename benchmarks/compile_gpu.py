"""Compiles the Hopper attention kernels for an H100 without one, and prints what the assembler says about them.

    python benchmarks/compile_gpu.py                                # production lengths, 40 heads of 128
    python benchmarks/compile_gpu.py --lengths 4560 --tiles 128,2/64,2/64,2

Needs the CUDA plugin of the installed jax, 130 MB, best in an environment of its own:

    pip install --no-deps jax-cuda13-plugin==VERSION jax-cuda13-pjrt==VERSION      # VERSION of jax

One row per kernel: bytes spilled from registers to memory, whether the assembler had to serialise the tensor cores'
instructions, shared memory of the matrix operands, temporary memory of the whole program. Exit code 1 if any kernel is
serialised or spills more than --spill bytes. Nothing runs: no speed follows from this.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TARGET = ROOT / "helios_jax" / "tools" / "h100.textproto"


def why_not() -> str | None:
    """None where the deviceless compiler is installed, else what is missing."""
    for module in ("jax_cuda13_plugin", "absl"):
        if importlib.util.find_spec(module) is None:
            return f"the package of module {module} is not installed; see benchmarks/compile_gpu.py"
    return None


class Captured:
    """Collects what the process writes to its standard streams, C++ libraries included."""

    def __enter__(self):
        self._file = tempfile.TemporaryFile("w+")
        sys.stdout.flush()
        self._saved = [os.dup(1), os.dup(2)]
        for stream in (1, 2):
            os.dup2(self._file.fileno(), stream)
        return self

    def __exit__(self, *_):
        sys.stdout.flush()
        for stream, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(saved, stream)
            os.close(saved)
        self._file.seek(0)
        self.text = self._file.read()
        self._file.close()


def assembler_report(text: str) -> dict[str, dict]:
    """Kernel name -> {"spilled": bytes, "serialised": bool} from ptxas's verbose output."""
    kernels = {}
    for name, spilled in re.findall(
        r"Function properties for (\w+)_mosaic_gpu_kernel\s+\d+ bytes stack frame, (\d+) bytes spill stores", text
    ):
        serialised = re.search(rf"wgmma.*serialized.*'{name}_mosaic_gpu_kernel'", text) is not None
        kernels[name] = {"spilled": int(spilled), "serialised": serialised}
    return kernels


def parse_tiles(text: str):
    from kernels.attention.gpu_tiles import LoopTiles, Tiles

    return Tiles(*(LoopTiles(*(int(n) for n in loop.split(","))) for loop in text.split("/")))


def compile_all(arguments: argparse.Namespace) -> list[dict]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from kernels.attention import gpu, gpu_tiles

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=TARGET.read_text()
    )
    device = topology.devices[0]
    mesh = Mesh(np.array([device]), ("x",))
    tiles = parse_tiles(arguments.tiles) if arguments.tiles else gpu_tiles.tiles_for(device.device_kind, arguments.size)
    resident = {"attention_forward": (tiles.forward, 1), "attention_query_gradient": (tiles.dq, 2),
                "attention_key_value_gradient": (tiles.dkv, 2)}
    print(f"jax {jax.__version__}, {device.device_kind}, {arguments.heads} heads of {arguments.size}, {tiles}")
    rows = []

    def attend(q, k, v):
        return gpu.attention(q, k, v, tiles=tiles)

    def gradients(q, k, v, dout):
        return jax.vjp(attend, q, k, v)[1](dout)

    for length in arguments.lengths:
        shape = (1, length, arguments.heads, arguments.size)
        operand = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
        for program, function, count in (("forward", attend, 3), ("forward + backward", gradients, 4)):
            start = time.perf_counter()
            with Captured() as captured, jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                compiled = jax.jit(function).lower(*[operand] * count).compile()
            seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
            report = assembler_report(captured.text)
            if not report:
                raise SystemExit(f"no assembler report in the compiler's output:\n{captured.text}")
            for kernel, facts in report.items():
                loop, kept = resident[kernel]
                rows.append({
                    "length": length, "program": program, "kernel": kernel, **facts,
                    "shared_memory": gpu_tiles.shared_memory(loop, arguments.size, kept),
                    "temporary": memory.temp_size_in_bytes, "seconds": seconds,
                })
                row = rows[-1]
                print(f"{length:>6} {program:<19} {kernel:<29} spilled {row['spilled']:>4} B   "
                      f"{'SERIALISED' if row['serialised'] else 'overlapped'}   shared {row['shared_memory']:>6} B   "
                      f"temporary {row['temporary'] / 2**20:6.1f} MiB   {seconds:5.1f} s", flush=True)
    return rows


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lengths", type=int, nargs="+", default=[11040, 4560, 2940])
    p.add_argument("--heads", type=int, default=40)
    p.add_argument("--size", type=int, default=128, help="head size, 64 or 128")
    p.add_argument("--tiles", metavar="ROWS,STAGES/ROWS,STAGES/ROWS,STAGES",
                   help="tiles of forward, dq and dkv in place of the table's")
    p.add_argument("--spill", type=int, default=64, help="bytes of spilled registers to allow")
    p.add_argument("--json", metavar="FILE")
    arguments = p.parse_args()
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 2
    # The plugin looks for a card and Mosaic for options of the assembler: both read the environment once. A program
    # from a cache would come without the assembler's report.
    os.environ.update(JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", JAX_PLATFORMS="cpu,cuda", MOSAIC_GPU_DUMP_PTXAS="1",
                      JAX_ENABLE_COMPILATION_CACHE="false")
    rows = compile_all(arguments)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    bad = [row for row in rows if row["serialised"] or row["spilled"] > arguments.spill]
    for row in bad:
        print(f"{row['kernel']} at {row['length']}: out of registers; take a smaller tile", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
