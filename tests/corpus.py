"""A small video corpus on disk and encoders that cost nothing, for the tests of the data tools."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import av
import numpy as np

from helios_jax.data.extract import ExtractConfig
from helios_jax.data.videos import Buckets

SIZES = ((32, 64), (64, 32))
CONFIG = ExtractConfig(Buckets(min_frames=33, lengths=(33, 66), sizes=SIZES, keep=()), captions=2, clips_per_file=2)


def numbered_frames(count: int, height: int = 32, width: int = 64) -> np.ndarray:
    """Frames that tell their number: grey levels of the left and the right half; uint8 [count, height, width, 3]."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    for n in range(count):
        frames[n, :, : width // 2], frames[n, :, width // 2:] = 16 * (n % 16), 16 * (n // 16)
    return frames


def number_of(frame: np.ndarray) -> int:
    """Inverse of :func:`numbered_frames` after lossy coding."""
    width = frame.shape[1]
    low, high = frame[:, : width // 2 - 4].mean(), frame[:, width // 2 + 4:].mean()
    return round(low / 16) + 16 * round(high / 16)


def write_video(path: Path, frames: np.ndarray) -> Path:
    """H.264 with a key frame every 20 frames and B-frames between them."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.options = {"crf": "4", "g": "20", "bf": "2"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def entry(path: str, cut: tuple[int, int], wide: bool = True, cap: tuple[str, ...] = ("a caption", "another one here")
          ) -> dict:
    """An entry of the metadata file whose crop is the whole frame."""
    height, width = (32, 64) if wide else (64, 32)
    return {"path": path, "cut": list(cut), "crop": [0, width, 0, height], "fps": 24.0, "num_frames": cut[1] - cut[0],
            "resolution": {"height": height, "width": width}, "cap": list(cap)}


def write_corpus(folder: Path) -> tuple[Path, Path]:
    """Eight good clips of two sizes, two that the rules leave out, four broken ones: metadata file, video folder."""
    root = folder / "videos"
    root.mkdir()
    write_video(root / "wide.mp4", numbered_frames(150))
    write_video(root / "tall.mp4", numbered_frames(80, 64, 32))
    (root / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(3000))
    entries = [entry("wide.mp4", (10 * i, 10 * i + 70), cap=(f"wide clip {i}", "moving")) for i in range(5)]
    entries += [entry("wide.mp4", (0, 20)), entry("noise.mp4", (0, 40)), entry("absent.mp4", (0, 40))]
    entries += [entry("tall.mp4", (i, i + 35 + 20 * i), wide=False) for i in range(3)]
    entries += [entry("wide.mp4", (140, 200)), {**entry("wide.mp4", (0, 99)), "crop": [0, 0, 0, 1]}, entries[1]]
    metadata = folder / "clips.json"
    metadata.write_text(json.dumps(entries))
    return metadata, root


def encode_video(video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean colour of 8x8 blocks of every fourth frame; posterior of constant width 0.1."""
    b, _, height, width, _ = video.shape
    frames = video[:, ::4].reshape(b, 9, height // 8, 8, width // 8, 8, 3).mean((3, 5))  # [b, 9, h, w, 3]
    return frames[..., :2], np.full_like(frames[..., :2], 0.1)


def encode_text(captions) -> list[np.ndarray]:
    """One row per word, holding its length; the end token is a row of 99."""
    return [np.array([[len(word)] * 3 for word in text.split()] + [[99.0] * 3]) for text in captions]


def fake_encoders():
    """In the place of :func:`helios_jax.data.encoders.encoders`."""
    return encode_video, encode_text, "fake"


def slow_encoders():
    """Like :func:`fake_encoders`, waiting before every section so that a process can be killed in between."""
    def slow(video):
        time.sleep(float(os.environ["SECONDS_PER_CALL"]))
        return encode_video(video)

    return slow, encode_text, "fake"


def noting_encoders(folder: str):
    """Like :func:`fake_encoders`; leaves a file named after the process in ``folder``."""
    Path(folder, str(os.getpid())).touch()
    return fake_encoders()
