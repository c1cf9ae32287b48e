"""A rule-based reader of the clips of :mod:`helios_jax.data.shapes`: no learning, only geometry and colour.

Per frame it (1) compares the pixels with the four rendered backgrounds, (2) takes what differs from the best one as
the object, (3) names the object's colour by the nearest of the eight in CIE Lab, (4) fits the renderer's own masks
of the four shapes at several scales and sub-pixel positions, and (5) follows the fitted centre on the torus. What a
clip shows is what most of its frames show. A frame without a clear answer votes for nothing, so a muddy clip is read
as ``None`` (which never equals a prompt) and not as the nearest guess.

The plain-number metrics at the end (motion, coherence, drift, seams) need no reader of attributes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from helios_jax.data import shapes
from helios_jax.data.shapes import ATTRIBUTE_VALUES, Attributes
from helios_jax.errors import UserError

FIELDS = tuple(ATTRIBUTE_VALUES)
NATIVE_WINDOW = 33  # frames of one chunk

# Limits beyond which a frame has no answer. Pixel values are in 0..255, Lab distances in delta E 1976.
_BACKGROUND_LIMIT = 18.0  # median absolute residual; a plain grey is 26 away from the stripes
_OBJECT_DIFFERENCE = 40.0  # RGB distance from the background that counts as object; the closest real pair has 94
_COLOUR_LIMIT = 35.0  # the closest two of the eight colours are 42 apart
_FIT_LIMIT = 0.65  # Dice overlap of the object with the best mask; blurred and noisy real clips stay above 0.85
_CLUTTER_LIMIT = 0.5  # object-like area elsewhere in the frame, relative to the object's
_SPEED_LIMIT = 0.3  # of the true speed
_LAG = 8  # frames over which displacements are measured: 8 px along an axis, far from the half of the torus
_BLOCK = 64  # frames analysed at once, to bound the memory for long videos

_SCALES = (0.8, 0.9, 1.0, 1.1, 1.2)
_OFFSETS = np.arange(-2.0, 2.01, 0.5)  # pixels at height 64, around the blob's centre


# --- Inputs ----------------------------------------------------------------------------------------------------


def _as_float(frames: np.ndarray) -> np.ndarray:
    """uint8, or float in [0,1], [F,H,W,3] -> float32 in 0..255."""
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise UserError(f"frames: got shape {frames.shape}, need [frames, height, width, 3]")
    if frames.dtype == np.uint8:
        return frames.astype(np.float32)
    if not np.issubdtype(frames.dtype, np.floating):
        raise UserError(f"frames: got {frames.dtype}, need uint8 or floating point in [0, 1]")
    return np.clip(np.nan_to_num(frames.astype(np.float32)), 0, 1) * 255


def srgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in 0..255, [..., 3] -> CIE L*a*b* (D65), same shape."""
    value = np.asarray(rgb, np.float32) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = np.float32([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    xyz = linear @ to_xyz / np.float32([0.9505, 1.0, 1.089])
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = root[..., 0], root[..., 1], root[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


# --- Frames ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FrameTable:
    """What each frame shows: indices into the names of ATTRIBUTE_VALUES, -1 for no answer.

    ``centre`` float [F,2] is the object's (y, x) in pixels on the torus, NaN where there is no object; ``fit`` [F] is
    the Dice overlap with the best mask, ``clutter`` [F] the object-like area elsewhere relative to the object's.
    """

    background: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    centre: np.ndarray
    fit: np.ndarray
    clutter: np.ndarray
    height: int
    width: int

    def window(self, first: int, last: int) -> FrameTable:
        """The rows ``first .. last - 1``."""
        per_frame = {
            field.name: getattr(self, field.name)[first:last]
            for field in dataclasses.fields(self)
            if field.name not in ("height", "width")
        }
        return dataclasses.replace(self, **per_frame)


@functools.lru_cache(maxsize=4)
def _template_bank(height: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Masks of all shapes, scales and offsets: (masks [K, P*P], shape index [K], box centre (y, x) [K,2], P).

    Each mask is centred on its own centre of mass, since that is what the search for the blob finds.
    """
    unit = height / shapes.HEIGHT
    reach = math.ceil(0.8 * shapes.SUBJECT_SIZE * unit)
    axis = np.arange(-reach, reach, dtype=np.float32) + 0.5  # [P]
    masks, owners, centres = [], [], []
    for owner, shape in enumerate(shapes.SHAPES):
        for scale in _SCALES:
            size = shapes.SUBJECT_SIZE * unit * scale
            plain = np.clip(0.5 - shapes.signed_distance(shape, axis[:, None], axis[None], size), 0, 1)  # [P,P]
            mass = np.array([(plain.sum(1) * axis).sum(), (plain.sum(0) * axis).sum()]) / plain.sum()
            for down in _OFFSETS * unit:
                for right in _OFFSETS * unit:
                    centre = np.array([down, right]) - mass
                    y, x = (axis - centre[0])[:, None], (axis - centre[1])[None]
                    masks.append(np.clip(0.5 - shapes.signed_distance(shape, y, x, size), 0, 1).ravel())
                    owners.append(owner)
                    centres.append(centre)
    return np.float32(masks), np.array(owners), np.float32(centres), 2 * reach


@functools.lru_cache(maxsize=4)
def _blob_filter(height: int, width: int) -> np.ndarray:
    """Fourier transform of a periodic Gaussian, real [H, W//2+1], that turns an object into one smooth peak."""
    sigma = shapes.SUBJECT_SIZE * height / shapes.HEIGHT / 4
    vertical, horizontal = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    return np.exp(-2 * (math.pi * sigma) ** 2 * (vertical**2 + horizontal**2)).astype(np.float32)


def _analyse_block(video: np.ndarray) -> FrameTable:
    """float32 in 0..255, [F,H,W,3] -> table of F rows."""
    count, height, width, _ = video.shape
    every = np.arange(count)

    candidates = np.stack([shapes.render_background(name, height, width) for name in shapes.BACKGROUNDS])  # [4,H,W,3]
    coarse = video[:, ::2, ::2].reshape(count, -1, 3)  # [F,N,3] a quarter of the pixels is plenty for medians
    references = candidates[:, ::2, ::2].reshape(len(candidates), -1, 3)  # [4,N,3]
    residual = np.stack([np.median(np.abs(coarse - r).mean(-1), axis=1) for r in references])  # [4,F]
    nearest = residual.argmin(0)  # [F]
    background = np.where(residual.min(0) <= _BACKGROUND_LIMIT, nearest, -1)
    still = candidates[nearest]  # [F,H,W,3]
    # A global colour cast moves the background too; the object covers 5 % of the frame and cannot move the median.
    cast = np.median(coarse - references[nearest], axis=1)[:, None, None]  # [F,1,1,3]
    still = still + np.clip(cast, -25, 25)

    # A mean over 3x3 pixels keeps noise out of the mask and costs the object's edge half a pixel.
    change = video - still
    for axis in (1, 2):
        change = (np.roll(change, -1, axis) + change + np.roll(change, 1, axis)) / 3
    difference = np.linalg.norm(change, axis=-1)  # [F,H,W]
    mask = (difference > _OBJECT_DIFFERENCE).astype(np.float32)
    smooth = np.fft.irfft2(np.fft.rfft2(mask) * _blob_filter(height, width), s=(height, width))  # [F,H,W]
    peak = np.stack(np.unravel_index(smooth.reshape(count, -1).argmax(1), (height, width)), -1)  # [F,2]

    masks, owners, box_centres, side = _template_bank(height)
    cells = peak[:, :, None] + np.arange(-side // 2, side // 2)  # [F,2,P]
    rows, columns = (cells[:, 0] % height)[:, :, None], (cells[:, 1] % width)[:, None]  # [F,P,1], [F,1,P]
    frame = every[:, None, None]
    patch, patch_still = video[frame, rows, columns], still[frame, rows, columns]  # [F,P,P,3]
    patch_difference, patch_mask = difference[frame, rows, columns], mask[frame, rows, columns]  # [F,P,P]

    # Colour: mean of the object's inner pixels (those that differ most), edges are mixtures.
    strong = np.quantile(patch_difference.reshape(count, -1), 0.95, axis=1)[:, None, None]  # [F,1,1]
    inner = patch_mask * (patch_difference > 0.7 * strong)  # [F,P,P]
    area = np.maximum(inner.sum((1, 2)), 1)[:, None]  # [F,1]
    measured = (patch * inner[..., None]).sum((1, 2)) / area  # [F,3]
    palette = srgb_to_lab(np.float32(list(shapes.COLOURS.values())))  # [8,3]
    # The cast is removed before naming the colour, as an eye adapted to the scene would.
    adapted = measured - np.clip(cast[:, 0, 0], -25, 25)
    distance = np.linalg.norm(srgb_to_lab(np.clip(adapted, 0, 255))[:, None] - palette, axis=-1)  # [F,8]

    # Shape: each pixel's share of the object's colour, against all masks at once.
    span = measured[:, None, None] - patch_still  # [F,P,P,3]
    share = ((patch - patch_still) * span).sum(-1) / np.maximum((span**2).sum(-1), 1)  # [F,P,P]
    share = np.clip(share, 0, 1).reshape(count, -1)
    share[share < 0.15] = 0  # noise of the background
    dice = 2 * share @ masks.T / ((share**2).sum(1)[:, None] + (masks**2).sum(1) + 1e-6)  # [F,K]
    best = dice.argmax(1)  # [F]
    fit = dice[every, best]

    inside = patch_mask.sum((1, 2))
    clutter = (mask.sum((1, 2)) - inside) / np.maximum(inside, 1)
    seen = (fit >= _FIT_LIMIT) & (inside > 0)
    alone = seen & (clutter <= _CLUTTER_LIMIT)
    # Pixel p covers [p, p+1) and the patch's axis is zero at the lower corner of the peak's pixel.
    centre = (peak + box_centres[best]) % np.array([height, width])
    return FrameTable(
        background=background,
        colour=np.where(seen & (distance.min(1) <= _COLOUR_LIMIT), distance.argmin(1), -1),
        shape=np.where(alone, owners[best], -1),
        centre=np.where(seen[:, None], centre, np.nan),
        fit=fit,
        clutter=clutter,
        height=height,
        width=width,
    )


def analyse(frames: np.ndarray) -> FrameTable:
    """Reads every frame by itself.

    Args:
        frames: uint8, or float in [0,1], [F,H,W,3]; the height must be at least 32 (below, shapes are a few pixels).
    """
    frames = np.asarray(frames)
    if frames.ndim == 4 and (frames.shape[1] < 32 or frames.shape[2] < frames.shape[1]):
        raise UserError(f"frames: got {frames.shape[1]}x{frames.shape[2]}, need a height of 32 or more and width >= it")
    blocks = [_analyse_block(_as_float(frames[i : i + _BLOCK])) for i in range(0, max(len(frames), 1), _BLOCK)]
    joined = {
        field.name: np.concatenate([getattr(b, field.name) for b in blocks])
        for field in dataclasses.fields(FrameTable)
        if field.name not in ("height", "width")
    }
    return FrameTable(**joined, height=blocks[0].height, width=blocks[0].width)


# --- Clips -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a clip shows. A field is ``None`` where the reader finds no clear answer.

    ``confidence`` maps each field to the share of frames (for the direction: of measured displacements) that say the
    same, from 0 to 1. ``velocity`` is (down, right) in pixels per frame, NaN if the object was lost.
    """

    colour: str | None
    shape: str | None
    direction: str | None
    background: str | None
    confidence: dict[str, float]
    velocity: tuple[float, float]

    def matches(self, expected: Attributes) -> dict[str, bool]:
        """For each field whether the reading equals what was asked."""
        return {field: getattr(self, field) == getattr(expected, field) for field in FIELDS}


def _vote(indices: np.ndarray, names: Sequence[str]) -> tuple[str | None, float]:
    """The most frequent answer and its share of all frames; no answer unless it has more than half."""
    counts = np.bincount(indices[indices >= 0], minlength=len(names))
    share = float(counts.max() / len(indices))
    return (names[int(counts.argmax())] if share > 0.5 else None), share


def displacements(table: FrameTable, lag: int = _LAG) -> np.ndarray:
    """Movement on the torus over ``lag`` frames divided by it, float [F-lag, 2] as (down, right) px per frame."""
    world = np.array([table.height, table.width])
    moved = table.centre[lag:] - table.centre[:-lag]  # [F-lag,2]
    return ((moved + world / 2) % world - world / 2) / lag


def _read_table(table: FrameTable) -> Reading:
    confidence: dict[str, float] = {}
    found: dict[str, str | None] = {}
    for field in ("colour", "shape", "background"):
        found[field], confidence[field] = _vote(getattr(table, field), ATTRIBUTE_VALUES[field])

    found["direction"], confidence["direction"], velocity = None, 0.0, (math.nan, math.nan)
    if len(table.fit) > 1:
        steps = displacements(table, min(_LAG, len(table.fit) - 1))
        known = ~np.isnan(steps[:, 0])
        unit = shapes.SPEED * table.height / shapes.HEIGHT
        moving = known & (np.linalg.norm(np.nan_to_num(steps), axis=1) > _SPEED_LIMIT * unit)
        sector = np.round(np.arctan2(steps[:, 0], steps[:, 1]) / (math.pi / 4))  # 0 is right, 2 is down
        order = list(shapes.DIRECTIONS)  # clockwise from right, as the sectors
        votes = np.where(moving, np.nan_to_num(sector).astype(int) % 8, -1)
        found["direction"], confidence["direction"] = _vote(votes, order)
        if known.any():
            velocity = tuple(np.median(steps[known], axis=0).tolist())
    return Reading(**found, confidence=confidence, velocity=velocity)


def read(frames: np.ndarray) -> Reading:
    """Reads the attributes of a clip.

    Args:
        frames: uint8, or float in [0,1], [F,H,W,3]. The direction needs two frames at least and is reliable from 17.
    """
    return _read_table(analyse(frames))


@dataclasses.dataclass(frozen=True)
class LongReading:
    """A long video, read window by window."""

    windows: tuple[Reading, ...]

    def kept(self, expected: Attributes, fields: Sequence[str] = ("shape", "colour", "direction")) -> dict[str, bool]:
        """For each field whether it was kept to the end.

        Kept means: the first window, the last window and more than half of all windows show what was asked.
        """
        result = {}
        for field in fields:
            hits = [window.matches(expected)[field] for window in self.windows]
            result[field] = hits[0] and hits[-1] and sum(hits) > len(hits) / 2
        return result

    def hit_rates(self, expected: Attributes) -> dict[str, float]:
        """For each field the share of windows that show what was asked."""
        return {
            field: sum(window.matches(expected)[field] for window in self.windows) / len(self.windows)
            for field in FIELDS
        }


def read_long(frames: np.ndarray, window: int = NATIVE_WINDOW) -> LongReading:
    """Reads a video in windows of ``window`` frames; the last window ends with the last frame.

    Windows do not overlap, except that the last one reaches back if the length is no multiple of ``window``.
    """
    if window < 2 or len(frames) < window:
        raise UserError(f"window: got {window} for {len(frames)} frames, allowed are 2 to the number of frames")
    table = analyse(frames)
    firsts = list(range(0, len(frames) - window + 1, window))
    if firsts[-1] + window < len(frames):
        firsts.append(len(frames) - window)
    return LongReading(tuple(_read_table(table.window(first, first + window)) for first in firsts))


# --- Scores ----------------------------------------------------------------------------------------------------


def wilson_interval(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a rate (z = 1.96: 95 %)."""
    if not 0 <= hits <= total or total < 1:
        raise UserError(f"hits, total: got {hits}, {total}, need 0 <= hits <= total and total >= 1")
    rate, shrink = hits / total, 1 + z**2 / total
    middle = (rate + z**2 / (2 * total)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / total + z**2 / (4 * total**2))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclasses.dataclass(frozen=True)
class Score:
    """Rates of right readings: per field, and of clips right in every field with the 95 % Wilson interval."""

    per_field: dict[str, float]
    all_fields: float
    interval: tuple[float, float]
    total: int


def score(readings: Sequence[Reading], expected: Sequence[Attributes]) -> Score:
    """Compares readings with what was asked, pair by pair."""
    if not readings or len(readings) != len(expected):
        raise UserError(f"readings: got {len(readings)} for {len(expected)} prompts, need the same number, not 0")
    hits = np.array([list(r.matches(e).values()) for r, e in zip(readings, expected, strict=True)])  # [N,4]
    right, total = int(hits.all(1).sum()), len(hits)
    per_field = dict(zip(FIELDS, hits.mean(0).tolist(), strict=True))
    return Score(per_field, right / total, wilson_interval(right, total), total)


def shuffled_score(
    readings: Sequence[Reading], expected: Sequence[Attributes], seed: int = 0, rounds: int = 20
) -> tuple[dict[str, float], dict[str, float]]:
    """Control: the same readings against the captions of other clips.

    Returns:
        (mean rate per field over ``rounds`` rotations of a shuffled order, so that no clip keeps its own caption;
        rate expected by chance from how often each value is read and asked). A reader that reads the frames and
        nothing else has the two nearly equal.
    """
    if len(readings) != len(expected) or len(readings) < 2:
        raise UserError(f"readings: got {len(readings)} for {len(expected)} prompts, need the same number, 2 or more")
    rng = np.random.RandomState(seed)
    order = rng.permutation(len(readings))
    shuffled, chance = {}, {}
    for field in FIELDS:
        found = np.array([str(getattr(readings[i], field)) for i in order])
        asked = np.array([getattr(expected[i], field) for i in order])
        turns = 1 + rng.randint(len(order) - 1, size=rounds)
        shuffled[field] = float(np.mean([(found == np.roll(asked, turn)).mean() for turn in turns]))
        chance[field] = float(sum((found == v).mean() * (asked == v).mean() for v in ATTRIBUTE_VALUES[field]))
    return shuffled, chance


# --- Plain numbers ---------------------------------------------------------------------------------------------


def motion_amplitude(frames: np.ndarray) -> float:
    """Median speed of the object in pixels per frame (NaN if none is found); real clips: 1 or 1.41 at height 64."""
    table = analyse(frames)
    if len(table.fit) < 2:
        raise UserError("frames: got 1, motion needs 2 or more")
    speeds = np.linalg.norm(displacements(table, min(_LAG, len(table.fit) - 1)), axis=1)
    return float(np.nanmedian(speeds)) if not np.isnan(speeds).all() else math.nan


def temporal_coherence(frames: np.ndarray) -> float:
    """Mean correlation of consecutive frames over all pixels and channels: 1 for a still, near 0 for noise."""
    video = _as_float(frames).reshape(len(frames), -1)  # [F, H*W*3]
    if len(video) < 2:
        raise UserError("frames: got 1, coherence needs 2 or more")
    video = video - video.mean(1, keepdims=True)
    norms = np.maximum(np.linalg.norm(video, axis=1), 1e-6)
    return float(((video[1:] * video[:-1]).sum(1) / (norms[1:] * norms[:-1])).mean())


def colour_drift(frames: np.ndarray, share: float = 0.15) -> float:
    """Distance in Lab between the mean colours of the first and the last ``share`` of the frames (0: no drift)."""
    count = max(1, round(share * len(frames)))
    first, last = (srgb_to_lab(_as_float(part)).mean((0, 1, 2)) for part in (frames[:count], frames[-count:]))
    return float(np.linalg.norm(last - first))


def seam_jump(frames: np.ndarray, chunk: int = NATIVE_WINDOW) -> float:
    """Mean absolute change from frame to frame at chunk seams divided by that within chunks (1: seams do not show)."""
    if len(frames) <= chunk or chunk < 2:
        raise UserError(f"chunk: got {chunk} for {len(frames)} frames, need 2 or more and fewer than the frames")
    pairs = (_as_float(frames[i : i + 2]) for i in range(len(frames) - 1))  # pair by pair: a minute of floats is large
    change = np.array([np.abs(later - earlier).mean() for earlier, later in pairs])  # [F-1]
    at_seam = np.arange(1, len(frames)) % chunk == 0
    return float(change[at_seam].mean() / max(change[~at_seam].mean(), 1e-6))
