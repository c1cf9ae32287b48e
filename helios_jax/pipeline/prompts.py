"""Which prompt each chunk sees: changes between chunks, at once or blended."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from helios_jax.errors import UserError
from helios_jax.pipeline.request import checked_count
from helios_jax.text import PromptEmbedding, blend


@dataclasses.dataclass(frozen=True)
class PromptChange:
    """From ``chunk`` on the prompt is ``prompt``, reached over ``blend`` chunks (0 or 1: at once)."""

    chunk: int
    prompt: str
    blend: int = 0

    def __post_init__(self):
        for name in ("chunk", "blend"):
            checked_count(f"prompt_schedule: {name}", getattr(self, name), 0)
        if not isinstance(self.prompt, str):
            raise UserError(f"prompt_schedule: prompt must be text, got {self.prompt!r}")


def parse_schedule(text: str) -> tuple[PromptChange, ...]:
    """Reads ``--prompt_schedule``.

    Args:
      text: JSON text ``[{"chunk": 0, "prompt": "...", "blend": 3}, ...]`` or the name of a file that holds such text;
        also an object with the list under the key "changes".
    Raises:
      UserError: not readable, no entries, unknown keys, or chunks that do not ascend.
    """
    origin = "prompt_schedule"
    if not text.strip():
        raise UserError(f"{origin}: a JSON file or JSON text is expected, got {text!r}")
    if not text.lstrip().startswith(("[", "{")):
        origin = f"prompt_schedule: {text[:200]}"
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no text in UTF-8"
            raise UserError(f"{origin}: cannot be read ({reason}); a JSON file or JSON text is expected") from None
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin}: not valid JSON ({error})") from None
    return checked_schedule(entries.get("changes") if isinstance(entries, dict) else entries)


def checked_schedule(entries: Any, num_chunks: int | None = None) -> tuple[PromptChange, ...]:
    """Entries as :class:`PromptChange`, mappings, or (chunk, prompt[, blend]); chunks must ascend strictly.

    Args:
      entries: the schedule.
      num_chunks: of the video, to find changes that would never come.
    """
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
    if num_chunks is not None and chunks[-1] >= num_chunks:
        raise UserError(f"prompt_schedule: a change at chunk {chunks[-1]}, but the video has {num_chunks} "
                        f"chunk{'s' if num_chunks > 1 else ''} of 33 frames, counted from 0")
    return tuple(changes)


def blend_weight(position: int, blend: int) -> float:
    """Weight of the new prompt ``position`` chunks after the change (the original's linspace(0, 1, blend))."""
    if blend < 2 or position >= blend:
        return 1.0
    return float(np.linspace(0.0, 1.0, blend)[position])


class _Change(NamedTuple):
    chunk: int
    before: PromptEmbedding
    after: PromptEmbedding
    blend: int


class PromptTrack:
    """The prompts of a run as a function of the chunk; the last one is held to the end.

    Args:
      first: embeddings [B, S, D] of chunk 0, one per video.
    """

    def __init__(self, first: PromptEmbedding):
        self._changes = [_Change(0, first, first, 0)]

    def change(self, chunk: int, after: PromptEmbedding, blend: int = 0) -> None:
        """From ``chunk`` on; drops earlier announcements for that chunk and later ones.

        A change that comes before another one's blend has ended starts from the mixture that was reached.
        """
        before = self.at(chunk - 1) if chunk else after
        self._changes = [c for c in self._changes if c.chunk < chunk] + [_Change(chunk, before, after, blend)]

    def at(self, chunk: int) -> PromptEmbedding:
        """What a chunk sees. The same object as long as nothing changes."""
        change = next(c for c in reversed(self._changes) if c.chunk <= chunk)
        weight = blend_weight(chunk - change.chunk, change.blend)
        return change.after if weight == 1 else blend(change.before, change.after, weight)

    def known(self) -> list[PromptEmbedding]:
        """All prompts that have been announced."""
        return [change.after for change in self._changes]


def rows_needed(embeddings: Sequence[PromptEmbedding], least: int = 0) -> int:
    """Rows that hold every one of some embeddings: a power of two from 32 on, or all rows there are.

    Few different numbers, because each is a shape that the model is compiled for.
    """
    longest = max(least, *(int(np.max(e.lengths)) for e in embeddings))
    return min(max(32, 1 << (longest - 1).bit_length()), *(e.total_rows for e in embeddings))


def with_rows(embedding: PromptEmbedding, count: int) -> PromptEmbedding:
    """The same prompts with ``count`` stored rows, at least as many as the longest has tokens; zeros are cut or added.
    """
    return dataclasses.replace(embedding, rows=jnp.asarray(embedding.rows)[:, :count]).with_rows(count)
