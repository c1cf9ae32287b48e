"""Where a run's numbers and videos go: JSONL always, TensorBoard if wanted, sample videos as mp4 files."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Protocol

import numpy as np

from helios_jax.errors import UserError
from helios_jax.video import VideoWriter


class MetricWriter(Protocol):
    """Receives the numbers and the sample videos of a run."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Records named numbers of one step."""

    def video(self, step: int, name: str, frames: np.ndarray, fps: int) -> None:
        """Records one video, uint8 [F, H, W, 3]."""

    def close(self) -> None:
        """Flushes everything."""


class JsonlWriter:
    """One JSON object per line in ``<workdir>/metrics.jsonl``; not-a-number and infinities become null.

    Args:
      workdir: an existing folder.
      resume_step: lines of later steps are removed, because the resumed run writes them again (a run that was killed
        may have logged steps after its last checkpoint). A half-written last line is removed too.
    """

    def __init__(self, workdir: str | Path, resume_step: int):
        path = Path(workdir) / "metrics.jsonl"
        if path.exists():
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= resume_step:
                        kept.append(line + "\n")
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(kept), encoding="utf-8")
            os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")  # noqa: SIM115 (open for the life of the writer)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        clean = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **clean}) + "\n")
        self._file.flush()

    def video(self, step: int, name: str, frames: np.ndarray, fps: int) -> None:
        del step, name, frames, fps  # videos are files of their own

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter:
    """Event files in ``<workdir>/tensorboard``; a video appears as a strip of eight of its frames."""

    def __init__(self, workdir: str | Path, resume_step: int):
        from tensorboardX import SummaryWriter

        # purge_step hides what an interrupted run wrote after the checkpoint that is resumed.
        self._writer = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=resume_step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def video(self, step: int, name: str, frames: np.ndarray, fps: int) -> None:
        del fps
        shown = frames[np.linspace(0, len(frames) - 1, min(8, len(frames))).round().astype(int)]
        self._writer.add_image(f"samples/{name}", np.concatenate(list(shown), axis=1), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class VideoFileWriter:
    """Sample videos as ``<workdir>/samples/<step>_<name>.mp4``."""

    def __init__(self, workdir: str | Path):
        self._folder = Path(workdir) / "samples"

    def scalars(self, step: int, values: dict[str, float]) -> None:
        del step, values

    def video(self, step: int, name: str, frames: np.ndarray, fps: int) -> None:
        with VideoWriter(self._folder / f"{step:08d}_{name}.mp4", fps) as writer:
            writer.append(frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2])  # mp4 needs even sizes

    def close(self) -> None:
        pass


class Writers:
    """Several writers as one."""

    def __init__(self, workdir: str | Path, resume_step: int, tensorboard: bool):
        try:
            self._writers: list[MetricWriter] = [JsonlWriter(workdir, resume_step), VideoFileWriter(workdir)]
        except OSError as error:
            raise UserError(f"workdir: {workdir} cannot be written ({error})") from None
        if tensorboard:
            self._writers.append(TensorBoardWriter(workdir, resume_step))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for writer in self._writers:
            writer.scalars(step, values)

    def video(self, step: int, name: str, frames: np.ndarray, fps: int) -> None:
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"video {name}: uint8 [F, H, W, 3] expected, got {frames.dtype} {list(frames.shape)}")
        for writer in self._writers:
            writer.video(step, name, frames, fps)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def duration(seconds: float) -> str:
    """'48 s', '12:05' (minutes) or '3:12:05' (hours), for progress lines."""
    whole = int(round(seconds))
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
