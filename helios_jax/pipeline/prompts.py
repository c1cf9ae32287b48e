"""Which prompt each chunk sees: changes between chunks, at once or blended."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from helios_jax.config import read_json
from helios_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PromptChange:
    """From ``chunk`` on the prompt is ``prompt``, reached over ``blend`` chunks (0 or 1: at once)."""

    chunk: int
    prompt: str
    blend: int = 0

    def __post_init__(self):
        for name, least in (("chunk", 0), ("blend", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"prompt_schedule: {name} must be a whole number of at least {least}, got {value!r}")
        if not isinstance(self.prompt, str):
            raise UserError(f"prompt_schedule: prompt must be text, got {type(self.prompt).__name__}")


def parse_schedule(text: str) -> tuple[PromptChange, ...]:
    """Reads ``--prompt_schedule``.

    Args:
      text: a JSON file, or JSON text: ``[{"chunk": 0, "prompt": "...", "blend": 3}, ...]``; a file may also hold an
        object with the key "changes".
    Raises:
      UserError: not readable, no entries, unknown keys, or chunks that do not ascend.
    """
    if text.lstrip().startswith("["):
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"prompt_schedule: not valid JSON ({error})") from None
    else:
        path = Path(text)
        if path.is_file() and path.read_bytes()[:1] == b"[":
            return parse_schedule(path.read_text(encoding="utf-8"))
        entries = read_json(path).get("changes")
    return checked_schedule(entries)


def checked_schedule(entries: Any) -> tuple[PromptChange, ...]:
    """Entries as :class:`PromptChange`, mappings, or (chunk, prompt) pairs; chunks must ascend strictly."""
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise UserError('prompt_schedule: a list like [{"chunk": 0, "prompt": "..."}] expected')
    changes = []
    for entry in entries:
        if isinstance(entry, dict):
            unknown = set(entry) - {"chunk", "prompt", "blend"}
            if unknown or not {"chunk", "prompt"} <= set(entry):
                raise UserError(f"prompt_schedule: entries need 'chunk' and 'prompt' (and may have 'blend'), got keys "
                                f"{sorted(entry)}")
            entry = PromptChange(**entry)
        elif not isinstance(entry, PromptChange):
            if isinstance(entry, str) or not isinstance(entry, Sequence) or len(entry) not in (2, 3):
                raise UserError(f"prompt_schedule: an entry is (chunk, prompt), got {entry!r}")
            entry = PromptChange(*entry)
        changes.append(entry)
    chunks = [change.chunk for change in changes]
    if chunks != sorted(set(chunks)):
        raise UserError(f"prompt_schedule: chunks must ascend, got {chunks}")
    return tuple(changes)


def blend_weight(position: int, blend: int) -> float:
    """Weight of the new prompt ``position`` chunks after the change (the original's linspace(0, 1, blend))."""
    if blend < 2 or position >= blend:
        return 1.0
    return float(np.linspace(0.0, 1.0, blend)[position])


class PromptTrack:
    """The prompts of a run as a function of the chunk; the live session appends to it."""

    def __init__(self, prompts: Any):
        self._changes: list[tuple[int, Any, int]] = [(0, prompts, 0)]

    def change(self, chunk: int, prompts: Any, blend: int = 0) -> None:
        """From ``chunk`` on; drops earlier announcements for that chunk and later ones."""
        self._changes = [c for c in self._changes if c[0] < chunk] + [(chunk, prompts, blend)]

    def at(self, chunk: int) -> tuple[Any, Any, float]:
        """(old prompts, new prompts, weight of the new) for a chunk; the last prompt is held to the end."""
        index = max(i for i, (start, _, _) in enumerate(self._changes) if start <= chunk)
        start, prompts, blend = self._changes[index]
        weight = blend_weight(chunk - start, blend)
        old = self._changes[index - 1][1] if index else prompts
        return old, prompts, weight if index else 1.0
