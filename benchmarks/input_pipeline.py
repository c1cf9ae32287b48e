"""Items per second of the input pipeline on records of the 14B model's shape, against what one TPU v5p host consumes.

    python benchmarks/input_pipeline.py --threads 1 2 4 8 16 --json pipeline.json

The records are random: three sections of 384x640 video and a caption of 512 rows of 4096, 11 MB each, in a temporary
folder (--folder elsewhere, for example on the file system that a job would use). They are read several times, so that
a small set comes from the page cache. Consumption is modelled: four chips at --efficiency of their peak, on the
cheapest step of the 14B model, stage 1 with adapters.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CHIPS_OF_A_HOST = 4


def consumption(efficiency: float) -> float:
    """Samples per second of one v5p host in stage 1 of the 14B model with adapters, whose own work is left out."""
    import jax
    import jax.numpy as jnp

    from helios_jax.config import TransformerConfig
    from helios_jax.diffusion.history import HistoryLayout
    from helios_jax.tools.roofline import CHIPS
    from helios_jax.training import stage1
    from helios_jax.training.flow import step_work
    from helios_jax.training.weights import LoraConfig

    config = stage1.Config(data="", transformer=TransformerConfig(), lora=LoraConfig(rank=1), init_from="base")
    batch = {"target": jax.ShapeDtypeStruct((1, 9, 48, 80, 16), jnp.float32),
             "text": jax.ShapeDtypeStruct((1, 512, 4096), jnp.float32)}
    return CHIPS_OF_A_HOST * CHIPS["v5p"].flops * efficiency / step_work(config, HistoryLayout(), batch).flops


def rate(folder: Path, batch_size: int, threads: int, batches: int) -> float:
    """Items per second after a warm-up."""
    from helios_jax.data.buckets import bucketed_dataset, folder_buckets

    iterator = iter(bucketed_dataset(folder_buckets(folder), batch_size, seed=0, threads=threads))
    for _ in range(2 * threads + 1):  # what was read ahead before the clock ran
        next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    return batches * batch_size / (time.perf_counter() - start)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, nargs="+", default=sorted({1, 2, 4, os.cpu_count()}))
    p.add_argument("--records", type=int, default=64)
    p.add_argument("--batch", type=int, default=8, help="items that the host reads of each batch")
    p.add_argument("--batches", type=int, default=40, help="that are timed")
    p.add_argument("--efficiency", type=float, default=0.6, help="of the peak, in the modelled consumption")
    p.add_argument("--size", default="384x640", metavar="HxW", help="of the records")
    p.add_argument("--folder", help="where the records are written; default: a temporary folder")
    p.add_argument("--json", metavar="FILE", help="where to write the numbers")
    arguments = p.parse_args(argv)
    from benchmarks.machine import describe
    from helios_jax.data.random_latents import write_random_latents

    height, width = (int(n) for n in arguments.size.split("x"))
    machine, needed, rows = describe(), consumption(arguments.efficiency), []
    print(f"one v5p host: {needed:.2f} samples/s at 384x640, modelled ({CHIPS_OF_A_HOST} chips at "
          f"{arguments.efficiency} of the peak)")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        write_random_latents(folder, clips=arguments.records, sections=3, height=height // 8, width=width // 8)
        for threads in arguments.threads:
            items = rate(Path(folder), arguments.batch, threads, arguments.batches)
            rows.append({"threads": threads, "items_per_second": items, "times_needed": items / needed})
            print(f"{threads:3d} threads {items:9.1f} items/s {items / needed:8.1f} times that", flush=True)
    report = {"machine": machine, "arguments": vars(arguments), "consumption_per_second": needed, "rows": rows}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
