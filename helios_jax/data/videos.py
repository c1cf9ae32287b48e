"""Clips of a video corpus: the original's metadata file, length and size buckets, decoding, cropping and resizing.

What cannot be read is never fatal: reading a clip raises :class:`BrokenClip`, planning lists what it leaves out, and
whoever writes a data set keeps that list beside it. Source: training specification, sections 1.1 to 1.4.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import av
import numpy as np

from helios_jax.errors import UserError
from helios_jax.video import frame_to_rgb

SECTION_FRAMES = 33  # RGB frames of a section: 9 latent frames
# Lengths to which clips are shortened, and sizes (height, width) of about 640x384 pixels, in the original's order.
LENGTHS = (21, 41, 61, 81, 101, 121, 141, 161, 181, 193, 221, 241, 261, 281, 301, 321, 341, 361, 381, 401, 421, 441,
           461, 481, 501)
SIZES = ((768, 320), (768, 384), (640, 384), (768, 512), (576, 448), (512, 512), (448, 576), (512, 768), (384, 640),
         (384, 768), (320, 768))


class BrokenClip(Exception):
    """A clip that cannot be read; the message says why in one line."""


class LeftOut(Exception):
    """A clip that the rules of a data set leave out; the message names the rule."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """One entry of the metadata file.

    Attributes:
      path: of the video, relative to the folder of videos.
      cut: first frame and the one after the last.
      crop: x0, x1, y0, y1 in pixels of the (upright) frame.
      fps: frames per second, kept for information: frames are taken one after another at the video's own rate.
      captions: at least one.
    """

    path: str
    cut: tuple[int, int]
    crop: tuple[int, int, int, int]
    fps: float
    captions: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the clip without folders: 'video_0-140'."""
        return f"{PurePosixPath(self.path).stem}_{self.cut[0]}-{self.cut[1]}"

    @property
    def key(self) -> str:
        """What tells two clips apart: path, cut and crop."""
        return f"{self.path}|{self.cut[0]}-{self.cut[1]}|{'-'.join(map(str, self.crop))}"


# --- Metadata --------------------------------------------------------------------------------------------------


def _integers(entry: dict[str, Any], field: str, count: int) -> tuple[int, ...]:
    values = entry[field]
    if (not isinstance(values, list) or len(values) != count
            or any(isinstance(v, bool) or not isinstance(v, (int, float)) or v != int(v) for v in values)):
        raise BrokenClip(f"metadata: {field}: {count} whole numbers expected, got {values!r}")
    return tuple(int(v) for v in values)


def parse_entry(entry: Any) -> Clip:
    """A clip from one entry of the metadata list.

    Needed are ``cut`` [f0, f1), ``crop`` [x0, x1, y0, y1], ``cap`` (a list of captions) and ``path``. ``fps`` is
    optional; ``num_frames`` and ``resolution`` of the original's files decide nothing and are not read.

    Raises:
      BrokenClip: a field is missing or is not what it should be.
    """
    if not isinstance(entry, dict):
        raise BrokenClip(f"metadata: an object expected, got {type(entry).__name__}")
    for field in ("cut", "crop", "cap", "path"):
        if field not in entry:
            raise BrokenClip(f"metadata: {field} is missing")
    path, captions = entry["path"], entry["cap"]
    if not isinstance(path, str) or not path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise BrokenClip(f"metadata: path: a path inside the folder of videos expected, got {path!r}")
    if isinstance(captions, str):
        captions = [captions]
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise BrokenClip(f"metadata: cap: a list of captions that are not empty expected, got {captions!r:.60}")
    fps = entry.get("fps", 0)
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not math.isfinite(fps) or fps < 0:
        raise BrokenClip(f"metadata: fps: a number expected, got {fps!r}")
    first, end = _integers(entry, "cut", 2)
    x0, x1, y0, y1 = _integers(entry, "crop", 4)
    if not 0 <= first < end:
        raise BrokenClip(f"metadata: cut: 0 <= first < end expected, got [{first}, {end}]")
    if not (0 <= x0 < x1 and 0 <= y0 < y1):
        raise BrokenClip(f"metadata: crop: 0 <= x0 < x1 and 0 <= y0 < y1 expected, got {[x0, x1, y0, y1]}")
    return Clip(path, (first, end), (x0, x1, y0, y1), float(fps), tuple(captions))


def read_metadata(path: str | Path) -> list[Any]:
    """The entries of a metadata file, not yet parsed.

    Raises:
      UserError: no such file, no JSON, or no list with at least one entry.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"metadata: {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"metadata: {path} is no JSON ({error})") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"metadata: {path} must hold a list of clips, got {type(entries).__name__} with "
                        f"{len(entries) if isinstance(entries, (list, dict)) else 0} entries")
    return entries


# --- Buckets ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Buckets:
    """To which lengths and sizes clips are brought.

    Attributes:
      min_frames: shorter clips are left out.
      lengths: a clip is shortened to the largest of these that it reaches.
      sizes: (height, width) of which the one nearest in shape to the crop rectangle is chosen.
      keep: only clips whose size is one of these are used; empty keeps all.
    """

    min_frames: int = 121
    lengths: tuple[int, ...] = LENGTHS
    sizes: tuple[tuple[int, int], ...] = SIZES
    keep: tuple[tuple[int, int], ...] = ((384, 640),)

    def __post_init__(self):
        if not self.lengths or min(self.lengths) < 1:
            raise UserError(f"lengths: positive numbers expected, got {self.lengths}")
        if not self.sizes:
            raise UserError("sizes: at least one expected, got none")
        for size in self.sizes:
            if min(size) < 16 or size[0] % 16 or size[1] % 16:
                raise UserError(f"sizes: multiples of 16 expected, got {size[0]}x{size[1]}")
        strangers = [f"{h}x{w}" for h, w in self.keep if (h, w) not in self.sizes]
        if strangers:
            raise UserError(f"keep: {', '.join(strangers)} is not among the sizes "
                            f"{', '.join(f'{h}x{w}' for h, w in self.sizes)}")
        least = min((n for n in self.lengths if n >= SECTION_FRAMES), default=None)
        if least is None or self.min_frames < least:
            raise UserError(f"min_frames: at least {least or SECTION_FRAMES} expected, the smallest of the lengths "
                            f"that holds a section of {SECTION_FRAMES} frames, got {self.min_frames}")

    def length(self, frames: int) -> int:
        """The largest bucket length that ``frames`` reaches."""
        return max(n for n in self.lengths if n <= frames)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that minimises |height * w - width * h|; on ties the last of the list."""
        return min(reversed(self.sizes), key=lambda s: abs(height * s[1] - width * s[0]))

    def assign(self, clip: Clip) -> tuple[int, tuple[int, int]]:
        """Number of frames and (height, width) of a clip.

        Raises:
          LeftOut: it is too short, or its size is not kept.
        """
        frames = clip.cut[1] - clip.cut[0]
        if frames < self.min_frames:
            raise LeftOut(f"shorter than {self.min_frames} frames")
        x0, x1, y0, y1 = clip.crop
        size = self.size(y1 - y0, x1 - x0)
        if self.keep and size not in self.keep:
            raise LeftOut(f"size {size[0]}x{size[1]} is not kept")
        return self.length(frames), size


# --- Pixels ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _resize_taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and weights of an antialiased triangle filter, [target, K] int64 and float32."""
    scale = source / target
    support, sharpness = max(scale, 1.0), 1 / max(scale, 1.0)
    centre = scale * (np.arange(target) + 0.5)  # [target]
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + support + 0.5).astype(np.int64), source)
    taps = first[:, None] + np.arange((end - first).max())  # [target, K]
    weights = np.maximum(1 - np.abs((taps - centre[:, None] + 0.5) * sharpness), 0) * (taps < end[:, None])
    weights /= weights.sum(1, keepdims=True)
    return np.minimum(taps, source - 1), weights.astype(np.float32)


def _resize_rows(image: np.ndarray, target: int) -> np.ndarray:
    """Resizes the leading axis; float32 [n, ...] -> [target, ...]."""
    if image.shape[0] == target:
        return image
    taps, weights = _resize_taps(image.shape[0], target)
    weights = weights.reshape(*weights.shape, *[1] * (image.ndim - 1))  # [target, K, 1...]
    result = image[taps[:, 0]] * weights[:, 0]
    for k in range(1, taps.shape[1]):
        result += image[taps[:, k]] * weights[:, k]
    return result


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear resize with antialiasing, float32 [h, w, C] -> [height, width, C].

    Equals ``torch.nn.functional.interpolate(mode="bilinear", antialias=True)``, which is torchvision's default for
    tensors, up to the order of summation.
    """
    columns = _resize_rows(np.ascontiguousarray(image.transpose(1, 0, 2), np.float32), width)  # [width, h, C]
    return _resize_rows(np.ascontiguousarray(columns.transpose(1, 0, 2)), height)  # [height, width, C]


def crop_and_resize(frame: np.ndarray, crop: tuple[int, int, int, int], height: int, width: int) -> np.ndarray:
    """One frame as the VAE sees it: scaled to [-1, 1], cropped to the rectangle, to the aspect in its middle, resized.

    Args:
      frame: uint8 [H, W, 3].
      crop: x0, x1, y0, y1.
      height, width: of the result.

    Returns: float32 [height, width, 3] in [-1, 1].

    Raises:
      BrokenClip: the rectangle leaves the frame.
    """
    x0, x1, y0, y1 = crop
    if x1 > frame.shape[1] or y1 > frame.shape[0]:
        raise BrokenClip(f"crop {list(crop)} leaves the frame of {frame.shape[1]}x{frame.shape[0]} (width x height)")
    rows, columns, aspect = y1 - y0, x1 - x0, height / width
    # Floating point as in the original: int() of a product such as 640 * (384 / 640).
    if rows / columns >= aspect:
        inner = max(int(columns * aspect), 1)
        y0 += (rows - inner) // 2
        y1 = y0 + inner
    else:
        inner = max(int(rows / aspect), 1)
        x0 += (columns - inner) // 2
        x1 = x0 + inner
    return resize(frame[y0:y1, x0:x1].astype(np.float32) / np.float32(127.5) - 1, height, width)


# --- Decoding --------------------------------------------------------------------------------------------------


def _timestamps(container: av.container.InputContainer, stream: av.VideoStream) -> list[int] | None:
    """Presentation times of all frames in order, without decoding any; None if the file does not tell them all."""
    times = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            if packet.pts is None:
                return None
            times.append(packet.pts)
    return sorted(times) if len(set(times)) == len(times) else None


def read_frames(path: str | Path, first: int, count: int) -> Iterator[np.ndarray]:
    """Frames ``first`` to ``first + count - 1`` of a video, counted from 0 in the order of display.

    Only the stretch from the nearest earlier key frame is decoded. Rotation stored in the file is applied. One frame
    is in memory at a time.

    Yields: uint8 [H, W, 3].

    Raises:
      BrokenClip: no video, too few frames, or damaged where it is read.
    """
    path = Path(path)
    if not path.is_file():
        raise BrokenClip("the video is missing")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BrokenClip("the file holds no video stream")
            stream = container.streams.video[0]
            times = _timestamps(container, stream)
            if times is not None and len(times) < first + count:
                raise BrokenClip(f"the video has {len(times)} frames, frames {first} to {first + count - 1} are wanted")
        wanted = None if times is None else times[first:first + count]
        produced, shape = 0, None
        # Not every container lands at or before the frame that was sought; then it is read from its beginning.
        for from_start in ([True] if wanted is None or not first else [False, True]):
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                if not from_start:
                    container.seek(wanted[0], stream=stream, backward=True)
                for number, frame in enumerate(container.decode(stream)):
                    if wanted is None:
                        if number < first:
                            continue
                    elif frame.pts is None or frame.pts < wanted[0]:
                        continue
                    elif frame.pts != wanted[produced]:
                        break
                    if frame.is_corrupt:
                        raise BrokenClip(f"frame {first + produced} is damaged")
                    rgb = frame_to_rgb(frame)
                    if shape not in (None, rgb.shape):
                        raise BrokenClip(f"the size of the video changes at frame {first + produced}")
                    shape = rgb.shape
                    yield rgb
                    produced += 1
                    if produced == count:
                        return
            if produced:
                break
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BrokenClip(f"the video cannot be decoded: {reason}") from None
    raise BrokenClip(f"the video ends or is damaged at frame {first + produced}, frames {first} to {first + count - 1} "
                     "are wanted")


def first_frame(clip: Clip, frames: int, seed: int) -> int:
    """Where the ``frames`` of a clip begin: uniform over its cut, a function of seed and clip alone."""
    digest = hashlib.sha256(f"{seed}|{clip.key}".encode()).digest()
    rng = np.random.default_rng(np.frombuffer(digest, np.uint32))
    return int(rng.integers(clip.cut[0], max(clip.cut[1] - frames, clip.cut[0]) + 1))


def read_sections(root: str | Path, clip: Clip, frames: int, size: tuple[int, int], seed: int = 0
                  ) -> Iterator[np.ndarray]:
    """The sections of a clip as the VAE sees them; what does not fill a section at the end is left out.

    Args:
      root: folder of videos.
      clip: what to read.
      frames: of the clip, as :meth:`Buckets.assign` says.
      size: (height, width).
      seed: of the place inside the cut.

    Yields: float32 [33, height, width, 3] in [-1, 1], ``frames // 33`` times.

    Raises:
      BrokenClip: see :func:`read_frames` and :func:`crop_and_resize`.
    """
    section: list[np.ndarray] = []
    count = frames // SECTION_FRAMES * SECTION_FRAMES
    for frame in read_frames(Path(root) / clip.path, first_frame(clip, frames, seed), count):
        section.append(crop_and_resize(frame, clip.crop, *size))
        if len(section) == SECTION_FRAMES:
            yield np.stack(section)
            section = []
