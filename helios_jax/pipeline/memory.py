"""What a run needs of the device's and the host's memory: told before it fails, with what would fit instead.

Weights are counted from the configurations, for one device of the mesh. What the largest program needs beside them is
the compiler's own number once the programs are compiled. Before that it is an estimate from the arrays that live at
once: where this was compared with what compilers planned (docs/speed.md: an H100 and a v6e, the 14B model at 384x640)
it was never less and at most twice as much.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from helios_jax.diffusion.history import HistoryLayout
from helios_jax.errors import UserError
from helios_jax.models.quantize import NATIVE_PRODUCTS
from helios_jax.models.streaming import COPIES_FROM_STACKS
from helios_jax.pipeline.placement import Placement
from helios_jax.pipeline.request import CHUNK_FRAMES
from helios_jax.sharding import MeshConfig, Partition
from helios_jax.text import MAX_TOKENS

# Of one forward, arrays [B, S, C] (residual, normed, queries, keys, values, attention) and [B, S, F] that live at once.
STREAMS, HIDDEN = 6, 2
# Of the decoder, arrays of four frames at full size and base width that live at once, caches included. A TPU holds them
# as if they were float32, whatever they are, because their last axis fills only a part of its registers.
FRAMES_AT_ONCE, DECODER_ARRAYS, DECODER_ARRAYS_TPU = 4, 14, 12
# The host holds the streamed weights and, while they are read, parts of them a second time.
LOADING = 1.2
# What XLA takes of a GPU's memory unless told otherwise, and what can be asked for.
FRACTION_VARIABLES = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
FRACTION, LARGEST_FRACTION = 0.75, 0.95


class Request(NamedTuple):
    """What of a run decides how much memory it takes: size in pixels, videos of one program, guidance."""

    height: int
    width: int
    videos: int = 1
    guided: bool = False


class Need(NamedTuple):
    """Bytes.

    Attributes:
      weights: of the model on a device.
      work: what is there beside them at the most: what the largest program takes, or the largest stack of layers, which
        some devices take apart once it is read.
      host: of the host's memory.
    """

    weights: int
    work: int
    host: int

    @property
    def device(self) -> int:
        return self.weights + self.work


# -- the arithmetic ---------------------------------------------------------------------------------------------------


def tokens(request: Request) -> tuple[int, int]:
    """Tokens of history and of the current chunk at full resolution."""
    layout = HistoryLayout()
    current = layout.chunk * (request.height // 16) * (request.width // 16)
    return sum(layout.tokens(request.height // 8, request.width // 8)), current


def denoising_bytes(placement: Placement, request: Request) -> int:
    """Of the program of the last pyramid level, on one device: activations, and weights that are copied for it."""
    config, partition = placement.folder.transformer, placement.partition
    itemsize = jnp.dtype(placement.dtypes["transformer"]).itemsize
    samples = request.videos * (2 if request.guided else 1)
    length = sum(tokens(request))
    streams = STREAMS * _numbers(partition, ("batch", "sequence", None), (samples, length, config.dim))
    hidden = HIDDEN * _numbers(partition, ("batch", "sequence", "hidden"), (samples, length, config.ffn_dim))
    # A loop over stacks copies a layer out of them (slack, where they were taken apart); a mesh gathers the next one.
    copied = 0 if placement.streamed else placement.layer_bytes() * (1 if partition is None else 2)
    if placement.precision.endswith("_weights"):  # the widest kernel in the type of the computation
        copied += config.dim * config.ffn_dim * itemsize
    return (streams + hidden) * itemsize + copied


def text_bytes(placement: Placement, request: Request) -> int:
    """Keys and values that stay from step to step: those of the longest prompt and, where it sees itself alone, of the
    history."""
    config = placement.folder.transformer
    rows = MAX_TOKENS + 1 + (tokens(request)[0] if config.restrict_self_attn else 0)
    samples = request.videos * (2 if request.guided else 1)
    return 2 * config.num_layers * samples * rows * config.dim * jnp.dtype(placement.dtypes["transformer"]).itemsize


def decoding_bytes(placement: Placement, request: Request, platform: str = "gpu") -> int:
    """Of the decoder, on one device: what it works on, and the frames of two chunks in float32."""
    config = placement.folder.vae
    base = config.decoder_base_dim or config.base_dim

    def frames(count: int, channels: int) -> int:
        return _numbers(placement.partition, (None, None, None, "width", None),
                        (request.videos, count, request.height, request.width, channels))

    on_tpu = platform == "tpu"
    itemsize = 4 if on_tpu else jnp.dtype(placement.dtypes["vae"]).itemsize
    arrays = DECODER_ARRAYS_TPU if on_tpu else DECODER_ARRAYS
    return arrays * frames(FRAMES_AT_ONCE, base) * itemsize + 2 * frames(CHUNK_FRAMES, config.out_channels) * 4


def needed(placement: Placement, request: Request | None, platform: str = "gpu", loaded: bool = False) -> Need:
    """What a run takes of every device and of the host; without a request what the weights alone take. ``loaded``:
    they are there."""
    weights, work = placement.bytes(), 0
    if not loaded and platform in COPIES_FROM_STACKS and not placement.streamed:
        work = placement.largest_stack_bytes()
    on_host = int(LOADING * weights.host) if platform != "cpu" else weights.device + weights.host + work
    if request is None:
        return Need(weights.device, max(work, weights.visiting), on_host)
    denoising = weights.visiting + denoising_bytes(placement, request)
    running = text_bytes(placement, request) + max(denoising, decoding_bytes(placement, request, platform))
    return Need(weights.device, max(work, running), on_host)


def compiled_bytes(programs: Iterable[jax.stages.Compiled]) -> int | None:
    """What the largest of some programs takes beside its arguments, as its compiler planned; None if it does not say.
    """
    stats = [program.memory_analysis() for program in programs]
    if not stats or None in stats:
        return None
    return max(one.temp_size_in_bytes + one.output_size_in_bytes - one.alias_size_in_bytes
               + one.generated_code_size_in_bytes for one in stats)


def _numbers(partition: Partition | None, names: tuple[str | None, ...], shape: tuple[int, ...]) -> int:
    """How many numbers of an array one device holds."""
    if partition is not None:
        shape = partition.sharding(names, shape).shard_shape(shape)
    return math.prod(map(int, shape))  # of any whole numbers, those of NumPy included


# -- what there is ----------------------------------------------------------------------------------------------------


def device_room(devices: Iterable[Any]) -> int | None:
    """Bytes that a program may use of each of some devices; None where the runtime does not say (a CPU)."""
    found = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return None if not found or None in found else min(found)


def host_room() -> int | None:
    """Bytes of the host's memory that are available, or that this process' group may use; None where unknown."""
    found = []
    with contextlib.suppress(OSError):
        if available := re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M):
            found.append(int(available[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=None)


# -- what is said -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Budget:
    """A model on its devices, and what fits there.

    Attributes:
      placement: of the weights.
      request: the run; None where it is not known yet, so that only weights count.
      merges: adapters are merged into the weights, which therefore are not quantised.
      step: sizes are multiples of so many pixels.
      loaded: the weights are there, so that what the host has left says nothing about them.
    """

    placement: Placement
    request: Request | None = None
    merges: bool = False
    step: int = 16
    loaded: bool = False

    def check(self, work: int | None = None) -> None:
        """Refuses what does not fit.

        Args:
          work: of :func:`compiled_bytes`, in place of the estimate.

        Raises:
          UserError: one line with what is needed, what there is, and what would fit.
        """
        need, room, host = self._need(), device_room(self._devices), host_room()
        origin = "by estimate"
        if work is not None and self.request is not None:
            need, origin = need._replace(work=work + text_bytes(self.placement, self.request)), "by the compiler"
        if room is not None and need.device > room:
            raise UserError(f"memory: {_gb(need.device)} needed (weights {_gb(need.weights)}, beside them "
                            f"{_gb(need.work)} {origin}) of the device's {_gb(room)}{self._remedies(room, host)}")
        if host is not None and need.host > host and not self.loaded:
            why = "the weights" if self._platform == "cpu" else f"stream_weights, {LOADING} times the weights"
            raise UserError(f"memory: {_gb(need.host)} needed ({why}) of the host's {_gb(host)} available"
                            f"{self._remedies(room, host)}")

    def exhausted(self, doing: str) -> str:
        """The line for a device whose memory ran out; what it offers needs less than what failed."""
        need, room = self._need(), device_room(self._devices)
        there = "" if room is None else f" of {_gb(room)}"
        less = need.device - 1 if room is None else min(need.device - 1, room)
        return (f"memory: the device's memory ran out while {doing} (weights {_gb(need.weights)}, beside them about "
                f"{_gb(need.work)}{there}){self._remedies(less, host_room())}")

    @property
    def _devices(self) -> list[Any]:
        partition = self.placement.partition
        return jax.local_devices()[:1] if partition is None else list(partition.mesh.local_devices)

    @property
    def _platform(self) -> str:
        return self._devices[0].platform

    def _need(self) -> Need:
        return needed(self.placement, self.request, self._platform, self.loaded)

    def _remedies(self, room: int | None, host: int | None) -> str:
        """The end of the line: the changes of which each alone would fit, else the fewest together that would."""
        def fits(budget: Budget) -> bool:
            need = budget._need()
            return (room is None or need.device <= room) and (host is None or need.host <= host)

        names = [name for name, _ in self._changes()]
        found: dict[str, str] = {}  # kind of change -> what it is and takes
        for count in range(1, min(4, len(names) + 1)):
            for chosen in itertools.combinations(names, count):
                budget = self._changed(chosen)
                kind = " ".join(name.split()[0] for name in chosen)
                if kind not in found and budget is not None and fits(budget):
                    found[kind] = f"{' with '.join(chosen)}: {budget._cost()}"
            if found:
                break
        lines = list(found.values())[: 1 if count > 1 else None]
        is_free = self._platform == "gpu" and not any(name in os.environ for name in FRACTION_VARIABLES)
        allowed = int((device_room(self._devices) or 0) / FRACTION * LARGEST_FRACTION)
        if is_free and self._need().device <= allowed:
            lines.insert(0, f"{FRACTION_VARIABLES[0]}={LARGEST_FRACTION}: {_gb(allowed)} of the device may be used")
        if self.request is not None and (smaller := next(filter(fits, self._smaller()), None)):
            lines.append(f"size {smaller.request.height}x{smaller.request.width}: {smaller._cost()}")
        return ("; would fit: " + "; ".join(lines) if lines else
                "; nothing that was tried would fit: a larger device, several of them (mesh) or a smaller model would")

    def _changed(self, names: Iterable[str]) -> Budget | None:
        """With several of the changes, None where they exclude each other."""
        budget: Budget | None = self
        for name in names:
            budget = dict(budget._changes()).get(name)
            if budget is None:
                return None
        return budget

    def _cost(self) -> str:
        need = self._need()
        if self._platform == "cpu":
            return _gb(need.host)
        return _gb(need.device) + (f" of the device, {_gb(need.host)} of the host" if need.host else "")

    def _changes(self) -> Iterator[tuple[str, Budget]]:
        """Changes that save memory and that this device and these options allow, by what they cost the user."""
        placement, request = self.placement, self.request

        def placed(**fields: Any) -> Budget:
            return dataclasses.replace(self, placement=dataclasses.replace(placement, **fields))

        if request is not None and request.videos > 1:
            yield "videos_at_once 1", dataclasses.replace(self, request=request._replace(videos=1))
        if any(jnp.dtype(dtype).itemsize > 2 for dtype in placement.dtypes.values()):
            is_half = jnp.dtype(placement.dtypes["transformer"]).itemsize == 2
            yield f"{'vae_' * is_half}dtype bfloat16", placed(dtypes=dict.fromkeys(placement.dtypes, jnp.bfloat16))
        if placement.precision == "none" and not self.merges:
            kind = self._devices[0].device_kind
            native = next((modes for pattern, modes in NATIVE_PRODUCTS if re.match(pattern, kind)), ())
            for mode in dict.fromkeys([*native[:1], "int8_weights", "int4_weights"]):
                yield f"precision {mode}", placed(precision=mode)
        if placement.partition is None and not placement.streamed and self._platform != "cpu":
            yield "stream_weights", placed(streamed=True)
            count = len(jax.local_devices())
            if count > 1 and jax.process_count() == 1:
                yield f"mesh fsdp={count}", placed(partition=Partition.create(MeshConfig(fsdp=count)))

    def _smaller(self) -> Iterator[Budget]:
        """Smaller videos of about the same form, the largest first, down to half the sides."""
        height, width = self.request.height, self.request.width
        for rows in range(height // self.step - 1, (height // self.step - 1) // 2, -1):
            columns = max(1, round(width / height * rows))
            yield dataclasses.replace(self, request=self.request._replace(height=rows * self.step,
                                                                          width=columns * self.step))


@contextlib.contextmanager
def explained(budget: Budget | None, doing: str) -> Iterator[None]:
    """Turns the runtime's error about exhausted memory into one line.

    Raises:
      UserError: the memory of a device ran out inside.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if budget is None or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(budget.exhausted(doing)) from error


def explains(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a run in progress within :func:`explained`, by its pipeline's budget."""

    @functools.wraps(method)
    def within(self: Any, *args: Any) -> Any:
        with explained(self._pipeline.budget, "sampling"):
            return method(self, *args)

    return within


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
