"""What a user can ask of a run, and its validation before any work is done."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from helios_jax.config import ModelIndex, SchedulerConfig, TransformerConfig
from helios_jax.errors import UserError

CHUNK_FRAMES = 33  # RGB frames of a chunk; 9 latent frames
# The defaults of the original's own scripts, per variant.
DEFAULT_STEPS = {"base": (50,), "mid": (20, 20, 20), "distilled": (2, 2, 2)}
DEFAULT_GUIDANCE = {"base": 5.0, "mid": 5.0, "distilled": 1.0}
DEFAULT_FRAMES = 99
DEFAULT_FPS = 24
DEFAULT_SEED = 42
# Noise levels of image and video conditions, drawn uniformly from this range.
CONDITION_SIGMA = (0.111, 0.135)


def size_step(stages: int) -> int:
    """Of how many pixels the sides must be multiples."""
    return 16 * 2 ** (stages - 1)


@dataclasses.dataclass(frozen=True)
class Size:
    """A pixel size that the pyramid can halve: multiples of 16 * 2**(stages - 1)."""

    height: int
    width: int

    @classmethod
    def checked(cls, height: int, width: int, stages: int) -> Size:
        """Raises:
          UserError: a side is no positive multiple; names the nearest allowed sizes.
        """
        step = size_step(stages)
        for name, value in (("height", height), ("width", width)):
            if not is_whole(value) or value < 1:
                raise UserError(f"{name}: must be a positive whole number, got {value!r}")
        if height % step or width % step:
            near = sorted({(_near(height, step, up), _near(width, step, wide)) for up in (0, 1) for wide in (0, 1)},
                          key=lambda size: abs(math.log(size[0] / height)) + abs(math.log(size[1] / width)))
            raise UserError(f"size {height}x{width} (height x width): both must be multiples of {step} for this "
                            f"model ({stages} pyramid stage{'s' if stages > 1 else ''}); nearest allowed: "
                            + ", ".join(f"{h}x{w}" for h, w in near))
        return cls(height, width)


def _near(value: int, step: int, up: int) -> int:
    return max(step, (value // step + up) * step) if value % step else value


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Everything about a run but its prompts, image and video. None means the variant's default.

    Attributes:
      height, width: pixels; default: the checkpoint's native size.
      num_frames: exact number of frames returned.
      steps: denoising steps, one number or one per pyramid stage.
      guidance_scale: above 1 runs the model on the negative prompt too.
      seed: one for all prompts or one per prompt.
      use_zero_init, zero_steps: zero init of Mid.
      amplify_first_chunk: twice the steps on the first chunk of Distilled.
      skip_first_chunk: anchor anew on the second chunk.
      keep_first_frame: later chunks see the first frame (the anchor); without, its place stays zero, which a model has
        to be trained for. (The original's flag of this name fails when it is off.)
      condition_sigma: range of the noise on image and video conditions, or None for none.
      allow_distilled_guidance: accept a guidance scale above 1 on a distilled model.
      videos_at_once: how many videos of a batch run in one program. With 1 a video's bits do not depend on the others
        (``docs/determinism.md``); more is faster where one video does not fill the device.
      text_rows: room for this many tokens of text from the start, so that a live change to a longer prompt need not
        compile the model again. Prompts and schedules known at the start get their room in any case.
    """

    height: int | None = None
    width: int | None = None
    num_frames: int = DEFAULT_FRAMES
    steps: int | Sequence[int] | None = None
    guidance_scale: float | None = None
    seed: int | Sequence[int] = DEFAULT_SEED
    use_zero_init: bool = True
    zero_steps: int = 1
    amplify_first_chunk: bool = True
    skip_first_chunk: bool = False
    keep_first_frame: bool = True
    condition_sigma: tuple[float, float] | None = CONDITION_SIGMA
    allow_distilled_guidance: bool = False
    videos_at_once: int = 1
    text_rows: int = 0

    def checked(self, index: ModelIndex, scheduler: SchedulerConfig, batch: int = 1) -> SamplingOptions:
        """These options with every default filled in, for a model and a number of videos.

        Raises:
          UserError: any field out of range.
        """
        steps = checked_steps(self.steps, index, scheduler)
        height, width = (native if asked is None else asked
                         for native, asked in zip(index.native_size, (self.height, self.width), strict=True))
        size = Size.checked(height, width, len(steps))
        for name, least in (("num_frames", 1), ("zero_steps", 0), ("videos_at_once", 1), ("text_rows", 0)):
            checked_count(name, getattr(self, name), least)
        return dataclasses.replace(
            self, height=size.height, width=size.width, steps=steps, seed=checked_seeds(self.seed, batch),
            guidance_scale=checked_guidance(self.guidance_scale, index, self.allow_distilled_guidance),
            condition_sigma=checked_sigma(self.condition_sigma))


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number of Python or NumPy; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def checked_steps(steps: int | Sequence[int] | None, index: ModelIndex, scheduler: SchedulerConfig) -> tuple[int, ...]:
    """Steps per stage; None takes the variant's default, a single number counts for every stage.

    Raises:
      UserError: wrong number of entries, or an entry that is no positive whole number.
    """
    stages = 1 if index.variant == "base" else scheduler.stages
    if index.variant == "base" and scheduler.stages != 1:
        raise UserError(f"scheduler: HeliosPipeline needs stages=1, the checkpoint has stages={scheduler.stages}")
    if index.variant != "base" and scheduler.stages < 2:
        raise UserError(f"scheduler: HeliosPyramidPipeline needs stages>1, the checkpoint has {scheduler.stages}")
    if steps is None:
        default = DEFAULT_STEPS[index.variant]
        return default if len(default) == stages else (default[0],) * stages
    if not isinstance(steps, Sequence):
        steps = (steps,)
    values = tuple(steps)
    if len(values) == 1:
        values *= stages
    if len(values) != stages:
        raise UserError(f"steps: {stages} number{'s' if stages > 1 else ''} expected for this model, one per stage, "
                        f"got {list(values)}")
    if not all(is_whole(n) and n >= 1 for n in values):
        raise UserError(f"steps: positive whole numbers expected, got {list(values)}")
    return tuple(int(n) for n in values)


def checked_guidance(scale: float | None, index: ModelIndex, allow_distilled: bool = False) -> float:
    """Guidance scale; None takes the variant's default.

    The distilled model was trained without guidance; the original warns and applies it all the same. Here a scale
    above 1 needs ``allow_distilled``.

    Raises:
      UserError: not a finite number of at least 0, or guidance on a distilled model.
    """
    if scale is None:
        return DEFAULT_GUIDANCE[index.variant]
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not math.isfinite(scale) or scale < 0:
        raise UserError(f"guidance_scale: must be a finite number of at least 0, got {scale!r}")
    if index.is_distilled and scale > 1 and not allow_distilled:
        raise UserError(f"guidance_scale: the distilled model needs 1 (it was trained without guidance), got {scale}; "
                        "allow_distilled_guidance overrides")
    return float(scale)


def checked_history_patches(config: TransformerConfig) -> None:
    """Raises:
      UserError: the transformer cannot see a history, of which sampling consists.
    """
    if not config.has_multi_term_memory_patch:
        raise UserError("transformer/config.json: has_multi_term_memory_patch: sampling needs true (a model that sees "
                        "the chunks before), got False")


def checked_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises:
      UserError: not one of the allowed values.
    """
    if value not in allowed:
        raise UserError(f"{name}: one of {', '.join(allowed)}, got {value!r}")


def checked_count(name: str, value: Any, least: int = 1) -> int:
    """Raises:
      UserError: not a whole number of at least ``least``.
    """
    if not is_whole(value) or value < least:
        raise UserError(f"{name}: must be a whole number of at least {least}, got {value!r}")
    return value


def checked_seeds(seed: int | Sequence[int], batch: int) -> tuple[int, ...]:
    """One seed per video.

    Raises:
      UserError: a seed outside 0...2^64-1, or a number of seeds that is neither 1 nor the batch.
    """
    seeds = tuple(seed) if isinstance(seed, Sequence) and not isinstance(seed, str) else (seed,)
    for value in seeds:
        if not is_whole(value) or not 0 <= value < 2**64:
            raise UserError(f"seed: must be a whole number in 0...2^64-1, got {value!r}")
    return broadcast("seed", seeds, batch)


def checked_sigma(sigma: Any) -> tuple[float, float] | None:
    """Raises:
      UserError: neither None nor (low, high) with 0 <= low <= high <= 1.
    """
    if sigma is None:
        return None
    values = tuple(sigma) if isinstance(sigma, Sequence) else ()
    if len(values) != 2 or not all(isinstance(v, numbers.Real) for v in values) or not 0 <= values[0] <= values[1] <= 1:
        raise UserError(f"condition_sigma: two numbers 0 <= low <= high <= 1 expected, got {sigma!r}")
    return values


def checked_prompts(name: str, prompts: str | Sequence[str]) -> tuple[str, ...]:
    """One prompt or several, as a tuple.

    Raises:
      UserError: no prompt, or an entry that is not text.
    """
    values = tuple(prompts) if isinstance(prompts, Sequence) and not isinstance(prompts, str) else (prompts,)
    if not values:
        raise UserError(f"{name}: at least one is needed")
    for value in values:
        if not isinstance(value, str):
            raise UserError(f"{name}: text expected, got {type(value).__name__}")
    return values


def broadcast(name: str, values: Sequence[Any], batch: int) -> tuple[Any, ...]:
    """One value for all, or one per prompt.

    Raises:
      UserError: any other number.
    """
    if len(values) not in (1, batch):
        raise UserError(f"{name}: 1 or {batch} values expected (one per prompt), got {len(values)}")
    return tuple(values) * (batch if len(values) == 1 else 1)


def checked_pixels(name: str, pixels: np.ndarray | None, batch: int, height: int, width: int) -> np.ndarray | None:
    """Image [B, H, W, 3] or video [B, F, H, W, 3], repeated for the batch where one was given for all.

    Raises:
      UserError: another shape, or no floats from -1 to 1.
    """
    if pixels is None:
        return None
    rank = 4 if name == "image" else 5
    pixels = np.asarray(pixels)
    pixels = pixels[None] if pixels.ndim == rank - 1 else pixels
    if pixels.ndim != rank or pixels.shape[-3:] != (height, width, 3) or len(pixels) not in (1, batch):
        raise UserError(f"{name}: shape [{'1 or ' if batch > 1 else ''}{batch}, {'frames, ' if rank == 5 else ''}"
                        f"{height}, {width}, 3] expected, got {list(pixels.shape)}")
    if rank == 5 and pixels.shape[1] < CHUNK_FRAMES:
        raise UserError(f"video: at least {CHUNK_FRAMES} frames are needed, got {pixels.shape[1]}")
    if pixels.dtype.kind != "f" or not np.abs(pixels).max() <= 1:  # also catches NaN
        raise UserError(f"{name}: floats from -1 to 1 expected (see helios_jax.video.preprocess_{name}), got "
                        f"{pixels.dtype} from {pixels.min():g} to {pixels.max():g}")
    pixels = pixels.astype(np.float32)
    return np.repeat(pixels, batch, axis=0) if len(pixels) != batch else pixels
