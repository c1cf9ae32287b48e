"""Validation of what a user asks for, before any work is done."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from helios_jax.config import ModelIndex, SchedulerConfig
from helios_jax.errors import UserError

# The defaults of the original's own scripts, per variant.
DEFAULT_STEPS = {"base": (50,), "mid": (20, 20, 20), "distilled": (2, 2, 2)}
DEFAULT_GUIDANCE = {"base": 5.0, "mid": 5.0, "distilled": 1.0}
DEFAULT_FRAMES = 99
DEFAULT_FPS = 24
DEFAULT_SEED = 42


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
        step = 16 * 2 ** (stages - 1)
        for name, value in (("height", height), ("width", width)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
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
    values = (steps,) * stages if isinstance(steps, int) else tuple(steps)
    if len(values) == 1:
        values *= stages
    if len(values) != stages:
        raise UserError(f"steps: {stages} number{'s' if stages > 1 else ''} expected for this model, one per stage, "
                        f"got {list(values)}")
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in values):
        raise UserError(f"steps: positive whole numbers expected, got {list(values)}")
    return values


def checked_guidance(scale: float | None, index: ModelIndex, allow_distilled: bool = False) -> float:
    """Guidance scale; None takes the variant's default.

    The distilled model was trained without guidance; the original warns and applies it all the same. Here a scale
    above 1 needs ``allow_distilled``.

    Raises:
      UserError: not a finite number of at least 0, or guidance on a distilled model.
    """
    if scale is None:
        return DEFAULT_GUIDANCE[index.variant]
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale) or scale < 0:
        raise UserError(f"guidance_scale: must be a finite number of at least 0, got {scale!r}")
    if index.is_distilled and scale > 1 and not allow_distilled:
        raise UserError(f"guidance_scale: the distilled model needs 1 (it was trained without guidance), got {scale}; "
                        "allow_distilled_guidance overrides")
    return float(scale)


def checked_count(name: str, value: Any, least: int = 1) -> int:
    """Raises:
      UserError: not a whole number of at least ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}: must be a whole number of at least {least}, got {value!r}")
    return value


def checked_prompts(name: str, prompts: str | Sequence[str]) -> tuple[str, ...]:
    """One prompt or several, as a tuple.

    Raises:
      UserError: no prompt, or an entry that is not text.
    """
    values = (prompts,) if isinstance(prompts, str) else tuple(prompts)
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
