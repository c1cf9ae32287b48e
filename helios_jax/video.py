"""Pixels in and out: reading images and videos, fitting them to a size, writing mp4, gif or PNG frames chunk by chunk.

Inside the library videos are float [B,F,H,W,3] in [-1,1]; in files and on the user's side they are uint8, or float in
[0,1]. Floats become bytes by rounding to the nearest level. (The original rounds for PIL images but truncates ``255 x``
for mp4 files, which darkens every pixel by half a level on average; one rule for all outputs is used here.)
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import pathlib
import shutil
import struct
import tempfile
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import PIL.Image
import PIL.ImageOps
from av.video.reformatter import Interpolation

from helios_jax.errors import NOT_FINITE, UserError

FORMATS = {".mp4": "mp4", ".gif": "gif", "": "png"}
_RECOMMENDED_FREE_BYTES = 1 << 20
_BT709 = 1  # both as the colour space of ffmpeg (AVCOL_SPC_BT709) and of its scaler (SWS_CS_ITU709)
_LIMITED_RANGE = 1  # AVCOL_RANGE_MPEG
# ffmpeg's default conversion to RGB is about 1.5 levels too dark; these flags make it right on average.
_EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BICUBIC


# --- Between ranges --------------------------------------------------------------------------------------------


def postprocess_video(video: np.ndarray) -> np.ndarray:
    """float [...] in [-1,1] -> float32 in [0,1], clamped (diffusers ``VideoProcessor.postprocess_video``, "np")."""
    return np.clip(np.asarray(video, np.float32) * np.float32(0.5) + np.float32(0.5), 0, 1)


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """uint8 as it is; float in [0,1] (values outside are clamped) -> uint8, rounded to the nearest level.

    Raises:
        UserError: another dtype, or numbers that are not finite.
    """
    frames = np.asarray(frames)
    if frames.dtype == np.uint8:
        return frames
    if frames.dtype.kind != "f" and frames.dtype.name != "bfloat16":
        raise UserError(f"frames: got {frames.dtype}, need uint8 or floating point in [0, 1]")
    frames = frames.astype(np.float32)
    if not np.isfinite(frames).all():
        raise UserError(NOT_FINITE)
    return np.rint(np.clip(frames, 0, 1) * 255).astype(np.uint8)


# --- Preprocessing ---------------------------------------------------------------------------------------------


def _as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Any PIL mode -> RGB. Transparency is dropped (as diffusers ``load_image``), 16-bit grey keeps its high byte."""
    if image.mode.startswith("I"):
        image = PIL.Image.fromarray((np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _resize_pil(images: Sequence[PIL.Image.Image], height: int, width: int) -> np.ndarray:
    """PIL images -> float32 [N,H,W,3] in [-1,1]."""
    resized = [_as_rgb(i).resize((width, height), PIL.Image.Resampling.LANCZOS) for i in images]
    return 2 * (np.stack([np.asarray(i) for i in resized]).astype(np.float32) / np.float32(255)) - 1


def _nearest_index(source: int, target: int) -> np.ndarray:
    """Source index of each target index, with the float32 arithmetic of ``torch.nn.functional.interpolate``."""
    scale = np.float32(source) / np.float32(target)
    return np.minimum(np.floor(np.arange(target, dtype=np.float32) * scale).astype(np.int64), source - 1)


def _resize_array(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """[N,h,w,3] uint8 or float -> float32 [N,H,W,3] in [-1,1]."""
    if array.ndim != 4 or array.shape[-1] != 3 or not array.size:
        raise UserError(f"pixels: got shape {array.shape}, need [..., height, width, 3]")
    if array.dtype == np.uint8:
        return _resize_pil([PIL.Image.fromarray(a) for a in array], height, width)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise UserError(f"pixels: got {array.dtype}, need uint8 or floating point")
    array = array.astype(np.float32)
    low, high = float(array.min()), float(array.max())
    if not (low >= -1 and high <= 1):  # also catches NaN
        raise UserError(f"pixels: got floats from {low:g} to {high:g}, allowed are [0, 1] or [-1, 1] (or uint8)")
    rows, columns = _nearest_index(array.shape[1], height), _nearest_index(array.shape[2], width)
    array = array[:, rows[:, None], columns[None]]  # [N,H,W,3]
    return array if low < 0 else 2 * array - 1


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise UserError(f"size: got {height}x{width}, need positive numbers")


def preprocess_image(image: PIL.Image.Image | np.ndarray, height: int, width: int) -> np.ndarray:
    """Fits an image to a size (diffusers ``VaeImageProcessor.preprocess``).

    PIL images and uint8 arrays: converted to RGB, Lanczos. Float arrays: in [0,1], or already in [-1,1] if any value
    is negative; nearest neighbour. (diffusers rejects RGBA and grey and does not divide uint8 arrays by 255.)

    Args:
        image: a PIL image of any mode, or [h,w,3] or a batch [B,h,w,3].

    Returns:
        float32 [B,H,W,3] in [-1,1]; B is 1 for a single image.
    """
    _check_size(height, width)
    if isinstance(image, PIL.Image.Image):
        return _resize_pil([image], height, width)
    array = np.asarray(image)
    return _resize_array(array[None] if array.ndim == 3 else array, height, width)


def preprocess_video(video: Sequence[PIL.Image.Image] | np.ndarray, height: int, width: int) -> np.ndarray:
    """Fits a video to a size, with the rules of :func:`preprocess_image` (diffusers ``VideoProcessor``).

    Args:
        video: a sequence of PIL images, or [F,h,w,3] or a batch [B,F,h,w,3]. Whether floats are in [-1,1] already is
            decided for each video of the batch.

    Returns:
        float32 [B,F,H,W,3] in [-1,1]; B is 1 for a single video.
    """
    _check_size(height, width)
    if not isinstance(video, np.ndarray) and len(video) and isinstance(video[0], PIL.Image.Image):
        return _resize_pil(video, height, width)[None]  # [1,F,H,W,3]
    array = np.asarray(video)
    if array.ndim == 5:
        return np.stack([_resize_array(clip, height, width) for clip in array])
    return _resize_array(array, height, width)[None]  # [1,F,H,W,3]


# --- Reading ---------------------------------------------------------------------------------------------------


def _existing_file(field: str, path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{field}: {path} is {'a folder' if path.is_dir() else 'missing'}, need a file")
    if path.stat().st_size == 0:
        raise UserError(f"{field}: {path} is empty (0 bytes)")
    return path


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Reads an image of any format that Pillow knows, turned upright by its EXIF orientation.

    Returns:
        uint8 [H,W,3]. Grey becomes RGB, transparency is dropped.

    Raises:
        UserError: missing, empty, truncated or not an image.
    """
    path = _existing_file("image", path)
    try:
        with PIL.Image.open(path) as image:
            return np.array(_as_rgb(PIL.ImageOps.exif_transpose(image)))
    except PIL.UnidentifiedImageError:
        raise UserError(f"image: {path} is not an image that can be read") from None
    except PIL.Image.DecompressionBombError as error:
        raise UserError(f"image: {path} is too large: {error}") from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files, by format
        raise UserError(f"image: {path} is damaged or truncated: {error}") from None


def read_video(path: str | os.PathLike, min_frames: int = 1) -> np.ndarray:
    """Reads every frame of a video file, or of a folder of PNG frames as :class:`VideoWriter` leaves it.

    Rotation stored in the file (phones) is applied. All frames are held in memory.

    Args:
        min_frames: fewer frames than this are an error.

    Returns:
        uint8 [F,H,W,3].

    Raises:
        UserError: missing, empty, truncated, too short, an image, or no video at all.
    """
    if pathlib.Path(path).is_dir():
        frames = [read_image(file) for file in sorted(pathlib.Path(path).glob("*.png"))]
    else:
        frames = _decode(_existing_file("video", path))
    if not frames:
        raise UserError(f"video: {path} holds no frames that can be read")
    if len(frames) < min_frames:
        raise UserError(f"video: {path} has {len(frames)} frame(s), need {min_frames} or more")
    if len({frame.shape for frame in frames}) > 1:
        raise UserError(f"video: the frames of {path} differ in size")
    return np.stack(frames)


def frame_to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """A decoded frame as uint8 [H,W,3], turned upright by the rotation that the file stores."""
    rgb = frame.reformat(format="rgb24", interpolation=_EXACT).to_ndarray()
    return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90) % 4))


def _decode(path: pathlib.Path) -> list[np.ndarray]:
    """All frames, uint8 [H,W,3] each."""
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            name = container.format.name
            if name.endswith("_pipe") or name == "image2":
                raise UserError(f"video: {path} is an image, need a video")
            if not container.streams.video:
                raise UserError(f"video: {path} holds no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                frames.append(frame_to_rgb(frame))
            # An mp4 may rightly show fewer frames than it stores (edit lists), so there the file's structure is asked.
            cut = _is_cut_mp4(path) if "mp4" in name else len(frames) < stream.frames
    except av.error.FFmpegError as error:
        found = f" after {len(frames)} frames" if frames else ""
        reason = error.strerror or type(error).__name__
        raise UserError(f"video: {path} is no video, or is damaged or truncated{found}: {reason}") from None
    if cut:
        raise UserError(f"video: {path} is truncated: only {len(frames)} frames can be read")
    return frames


def _is_cut_mp4(path: pathlib.Path) -> bool:
    """Whether the last of the file's boxes ends beyond the file (ffmpeg itself reads such files without an error)."""
    total, position = path.stat().st_size, 0
    with open(path, "rb") as file:
        while position + 8 <= total:
            file.seek(position)
            size, _, large_size = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
            if size == 0:  # "to the end of the file"
                return False
            size = large_size if size == 1 else size
            if size < 8:
                return True
            position += size
    return position > total


# --- Writing ---------------------------------------------------------------------------------------------------


class VideoWriter:
    """Writes frames to an H.264 mp4, an animated gif or a folder of PNG frames, as they come.

    The frames go to a hidden name beside the target, which takes the target's name only in :meth:`close`: a
    half-written output never exists. Used as a context manager it closes at the end; on Ctrl-C what exists is saved
    and playable; after any other exception nothing is left behind and an older file of the same name is untouched.

    Args:
        path: ``*.mp4``, ``*.gif``, or a name without suffix for a folder of ``000000.png, ...``. Missing parent
            folders are made. An existing file is replaced; a folder that is not empty is refused.
        fps: frames per second of the file, exactly; floats become the nearest fraction with a denominator up to 1001.
            (gif stores hundredths of a second, so its frames alternate such that the average is right.)
        crf: quality of H.264, 0 (lossless) to 51.

    Attributes:
        frames_written: number of frames so far.

    Raises:
        UserError: unknown suffix, unwritable folder, full disk, wrong shapes or dtypes, odd sizes (mp4), no frames.
    """

    def __init__(self, path: str | os.PathLike, fps: float | Fraction = 24, crf: int = 16):
        self.path = pathlib.Path(path)
        suffix = self.path.suffix.lower()
        if suffix not in FORMATS:
            raise UserError(f"output: got {self.path.name!r}, allowed are .mp4, .gif, or no suffix for a PNG folder")
        if not 0.01 <= fps <= 1000:
            raise UserError(f"fps: got {fps}, allowed are 0.01 to 1000")
        if not 0 <= crf <= 51:
            raise UserError(f"crf: got {crf}, allowed are 0 to 51")
        self.format = FORMATS[suffix]
        self.fps = Fraction(fps).limit_denominator(1001)
        self.frames_written = 0
        self._crf = crf
        self._size: tuple[int, int] | None = None  # height, width
        self._container: av.container.OutputContainer | None = None
        self._stream: av.VideoStream | None = None
        self._open = False
        self._reserve()

    def _reserve(self) -> None:
        """Creates the hidden file or folder now, so that an unwritable place is known before the work starts."""
        if self.format == "png":
            if self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir())):
                raise UserError(f"output: {self.path} exists and is not an empty folder")
        elif self.path.is_dir():
            raise UserError(f"output: {self.path} is a folder, need a file name")
        parent = self.path.absolute().parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(parent).free < _RECOMMENDED_FREE_BYTES:
                raise UserError(f"output: the disk of {parent} is full")
            prefix = f".{self.path.name}."
            if self.format == "png":
                self._hidden = pathlib.Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=parent))
            else:
                descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=".partial", dir=parent)
                os.close(descriptor)
                self._hidden = pathlib.Path(name)
            # tempfile makes things private; give them the permissions that open() would have given.
            umask = os.umask(0)
            os.umask(umask)
            self._hidden.chmod((0o777 if self.format == "png" else 0o666) & ~umask)
        except OSError as error:
            raise UserError(f"output: cannot write to {parent}: {error.strerror}") from None
        self._open = True

    def append(self, frames: np.ndarray) -> None:
        """Writes more frames.

        Args:
            frames: [F,H,W,3], float in [0,1] or uint8; every call with the same height and width.
        """
        if not self._open:
            raise UserError(f"output: {self.path} is closed already")
        frames = np.asarray(frames)
        if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape[1:]:
            raise UserError(f"frames: got shape {frames.shape}, need [frames, height, width, 3]")
        size = frames.shape[1:3]
        if self._size is None:
            if self.format == "mp4" and (size[0] % 2 or size[1] % 2):
                raise UserError(f"size: got {size[0]}x{size[1]}, mp4 needs even numbers")
            self._size = size
        elif size != self._size:
            raise UserError(f"frames: got {size[0]}x{size[1]} after {self._size[0]}x{self._size[1]}, need equal sizes")
        pixels = np.ascontiguousarray(to_uint8(frames))
        with self._failures():
            for frame in pixels:
                if self.format == "png":
                    PIL.Image.fromarray(frame).save(self._hidden / f"{self.frames_written:06d}.png")
                else:
                    self._encode(frame)
                self.frames_written += 1

    def _start(self) -> None:
        height, width = self._size
        options = {}
        if self.format == "mp4":
            # The index in front ("faststart") lets a browser start before the whole file is loaded. The file's clock
            # ticks in multiples of the fps, else the stored duration is rounded to milliseconds.
            ticks = self.fps.numerator * math.ceil(1000 / self.fps.numerator)
            options = {"movflags": "faststart", "movie_timescale": str(ticks)}
        self._container = av.open(str(self._hidden), "w", format=self.format, options=options)
        if self.format == "mp4":
            self._stream = self._container.add_stream("libx264", rate=self.fps)
            self._stream.pix_fmt = "yuv420p"
            self._stream.options = {"crf": str(self._crf), "preset": "medium"}
            context = self._stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED_RANGE
        else:
            self._stream = self._container.add_stream("gif", rate=self.fps)
            self._stream.pix_fmt = "pal8"
        self._stream.height, self._stream.width = height, width
        self._stream.codec_context.time_base = 1 / self.fps

    def _encode(self, pixels: np.ndarray) -> None:
        if self._stream is None:
            self._start()
        if self.format == "mp4":
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(
                format="yuv420p",
                dst_colorspace=_BT709,
                dst_color_range=_LIMITED_RANGE,
                interpolation=Interpolation.AREA,
            )
        else:
            # A palette for each frame: nothing of the video needs to be known in advance.
            indexed = PIL.Image.fromarray(pixels).quantize(256, dither=PIL.Image.Dither.NONE)
            palette = np.full((256, 4), 255, np.uint8)
            colours = np.array(indexed.getpalette(), np.uint8).reshape(-1, 3)
            palette[: len(colours), 0], palette[: len(colours), 1:] = 255, colours  # alpha, red, green, blue
            frame = av.VideoFrame.from_ndarray((np.asarray(indexed), palette), format="pal8")
        frame.pts, frame.time_base = self.frames_written, 1 / self.fps
        self._container.mux(self._stream.encode(frame))

    def close(self, partial: bool = False) -> pathlib.Path | None:
        """Finishes the output and gives it its name. Calling it again does nothing.

        Args:
            partial: the run was cut short: no frames at all are then no error.

        Returns:
            The path of the output, None if there were no frames.
        """
        if not self._open:
            return self.path if self.frames_written else None
        if not self.frames_written:
            self.discard()
            if partial:
                return None
            raise UserError(f"output: no frames were written to {self.path}")
        with self._failures():
            if self._stream is not None:
                self._container.mux(self._stream.encode(None))
                self._container.close()
                self._container = None
            if self.format == "png" and self.path.is_dir():
                self.path.rmdir()  # empty, or this fails
            os.replace(self._hidden, self.path)
        self._open = False
        return self.path

    def discard(self) -> None:
        """Removes what has been written; the target is untouched."""
        self._open = False
        if self._container is not None:
            with contextlib.suppress(Exception):
                self._container.close()
            self._container = None
        if self._hidden.is_dir():
            shutil.rmtree(self._hidden, ignore_errors=True)
        else:
            self._hidden.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _failures(self):
        """Turns errors of the operating system into one line and leaves no half-written output."""
        try:
            yield
        except (OSError, av.error.FFmpegError) as error:
            written = self.frames_written
            self.discard()
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            reason = "the disk is full" if full else (error.strerror or str(error))
            raise UserError(f"output: writing {self.path} failed after {written} frames: {reason}") from None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is None:
            self.close()
        elif issubclass(kind, KeyboardInterrupt):
            self.close(partial=True)
        else:
            self.discard()
