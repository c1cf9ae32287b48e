"""How fast a run is: the time of its steps, and what that makes in tokens and operations per second."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from helios_jax.tools.roofline import peak_flops
from helios_jax.training.metrics import duration
from helios_jax.training.work import Work


class Progress:
    """Times the steps from one log line to the next.

    Args:
      batch_size: samples of a step.
      num_steps: of the whole run.
      device_kind: of the mesh's devices, which decides the peak that utilisation refers to.
      num_devices: of the mesh.
    """

    def __init__(self, batch_size: int, num_steps: int, device_kind: str, num_devices: int):
        self._batch_size, self._num_steps = batch_size, num_steps
        peak = peak_flops(device_kind)
        self._peak = None if peak is None else peak * num_devices
        self.restart()

    def restart(self) -> None:
        """Begins anew, after a log line."""
        self._begun, self._waited, self._steps, self._work = time.perf_counter(), 0.0, 0, Work(0.0, 0.0)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within it, the run waits for its data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self, in_flight: Any) -> Iterator[None]:
        """What happens within it is not timed; ``in_flight`` are the results of the steps before, which are."""
        jax.block_until_ready(in_flight)
        start = time.perf_counter()
        yield
        self._begun += time.perf_counter() - start

    def step(self, work: Work | None) -> None:
        """Counts one step."""
        self._steps += 1
        self._work = Work(*(a + b for a, b in zip(self._work, work or (0.0, 0.0), strict=True)))

    def numbers(self) -> dict[str, float]:
        """Of the steps since the last :meth:`restart`, which must be complete.

        step_seconds, samples_per_second, data_wait_fraction; where the objective counts its work, tokens_per_second and
        model_tflops_per_second (both over all devices); mfu, where the devices' peak is known: model FLOPs per
        second, relative to the peak of bfloat16 products whatever the run computes in.
        """
        elapsed = time.perf_counter() - self._begun
        seconds = elapsed / self._steps
        numbers = {"step_seconds": seconds, "samples_per_second": self._batch_size / seconds,
                   "data_wait_fraction": self._waited / elapsed}
        if self._work.flops:
            numbers |= {"tokens_per_second": self._work.tokens / elapsed,
                        "model_tflops_per_second": self._work.flops / elapsed / 1e12}
            if self._peak is not None:
                numbers["mfu"] = self._work.flops / elapsed / self._peak
        return numbers

    def line(self, step: int, losses: Sequence[str], numbers: dict[str, float]) -> str:
        """The progress line of a step: what was learned, speed, time left."""
        seconds = numbers["step_seconds"]
        parts = [f"step {step}/{self._num_steps}", *losses, f"{seconds:.3f} s/step",
                 f"{numbers['samples_per_second']:.1f} samples/s"]
        if "tokens_per_second" in numbers:
            parts += [f"{numbers['tokens_per_second']:.0f} tokens/s",
                      f"{numbers['model_tflops_per_second']:.3g} TFLOP/s"]
        if "mfu" in numbers:
            parts.append(f"MFU {100 * numbers['mfu']:.1f} %")
        return "  ".join([*parts, f"{duration((self._num_steps - step) * seconds)} left"])
