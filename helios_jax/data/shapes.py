"""Procedural captioned clips: one coloured shape moves at constant velocity over a still background.

The world is a torus: what leaves at one edge comes back at the opposite one. Frame ``i`` is computed from ``i``
alone, so a clip of any length is exact and any window of it continues its neighbours without a seam.
Everything scales with the height of the frame (reference: 64x128 at 24 frames per second).

All randomness is drawn from :class:`numpy.random.RandomState`, whose stream NumPy has frozen: the same seed gives
the same clip, caption and split with every NumPy version.

``python -m helios_jax.data.shapes`` writes the evaluation prompts again (assets/prompts).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import pathlib

import numpy as np

from helios_jax.errors import UserError

HEIGHT, WIDTH, FPS = 64, 128, 24
SPEED = 1.0  # pixels per frame along each axis that moves, at height 64; a diagonal is sqrt(2) times as fast
SUBJECT_SIZE = 24.0  # pixels across (diameter of the circle), at height 64

COLOURS: dict[str, tuple[int, int, int]] = {  # sRGB, all strongly saturated; the backgrounds are nearly grey
    "red": (224, 36, 44),
    "orange": (255, 140, 20),
    "yellow": (255, 224, 40),
    "green": (34, 160, 62),
    "cyan": (40, 214, 224),
    "blue": (30, 104, 240),
    "purple": (150, 40, 176),
    "pink": (255, 120, 190),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS: dict[str, tuple[int, int]] = {  # unit steps (down, right) in image coordinates
    "right": (0, 1),
    "down right": (1, 1),
    "down": (1, 0),
    "down left": (1, -1),
    "left": (0, -1),
    "up left": (-1, -1),
    "up": (-1, 0),
    "up right": (-1, 1),
}
BACKGROUNDS = ("dark", "light", "gradient", "stripes")

_DARK = (24, 27, 38)
_LIGHT = (235, 233, 226)
_GRADIENT_TOP, _GRADIENT_BOTTOM = (58, 64, 84), (202, 198, 196)
_STRIPES = ((84, 88, 98), (134, 138, 146))
_STRIPE_WIDTH = 16  # pixels at height 64

_SPLIT_SEED = 20250601
_HELD_OUT_SHARE = 0.2
SPLITS = ("train", "held_out")


@dataclasses.dataclass(frozen=True, order=True)
class Attributes:
    """What a clip shows; each field is one of the names above.

    Raises:
        UserError: a name that this data set does not have.
    """

    colour: str
    shape: str
    direction: str
    background: str

    def __post_init__(self) -> None:
        for field, allowed in ATTRIBUTE_VALUES.items():
            value = getattr(self, field)
            if value not in allowed:
                raise UserError(f"{field}: got {value!r}, allowed are {', '.join(allowed)}")


ATTRIBUTE_VALUES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "background": BACKGROUNDS,
}


@dataclasses.dataclass(frozen=True)
class Clip:
    """One sample: ``frames`` uint8 [F,H,W,3], its caption, attributes and start (y, x in [0, 1))."""

    frames: np.ndarray
    caption: str
    attributes: Attributes
    start: tuple[float, float]


# --- Rendering -------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def render_background(background: str, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """The still background, float32 [H,W,3] in 0..255 (read-only: it is shared between calls)."""
    if background == "dark":
        image = np.broadcast_to(np.float32(_DARK), (height, width, 3))
    elif background == "light":
        image = np.broadcast_to(np.float32(_LIGHT), (height, width, 3))
    elif background == "gradient":
        weight = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None, None]  # [H,1,1]
        column = (1 - weight) * np.float32(_GRADIENT_TOP) + weight * np.float32(_GRADIENT_BOTTOM)  # [H,1,3]
        image = np.broadcast_to(column, (height, width, 3))
    elif background == "stripes":
        stripe_width = max(1, round(_STRIPE_WIDTH * height / HEIGHT))
        row = np.float32(_STRIPES)[(np.arange(width) // stripe_width) % 2]  # [W,3]
        image = np.broadcast_to(row[None], (height, width, 3))
    else:
        raise UserError(f"background: got {background!r}, allowed are {', '.join(BACKGROUNDS)}")
    image = np.ascontiguousarray(image)
    image.flags.writeable = False
    return image


def _distance_to_box(y: np.ndarray, x: np.ndarray, half_height: float, half_width: float) -> np.ndarray:
    """Signed distance to an axis-aligned box around the origin, negative inside."""
    dy, dx = np.abs(y) - half_height, np.abs(x) - half_width
    return np.hypot(np.maximum(dy, 0), np.maximum(dx, 0)) + np.minimum(np.maximum(dy, dx), 0)


def signed_distance(shape: str, y: np.ndarray, x: np.ndarray, size: float) -> np.ndarray:
    """Signed distance in pixels from the points (y down, x right) to the outline of ``shape`` centred at the origin.

    ``size`` is the diameter of the circle; the other shapes are scaled so that all look about equally large.
    """
    if shape == "circle":
        return np.hypot(y, x) - size / 2
    if shape == "square":
        return _distance_to_box(y, x, 0.45 * size, 0.45 * size)
    if shape == "triangle":  # equilateral, apex up, centred on its bounding box
        half_base = 0.58 * size
        half_height = half_base * math.sqrt(3) / 2
        slope = math.sqrt(3) / 2 * np.abs(x) - 0.5 * (y + half_height)  # distance to the slanted side's line
        return np.maximum(slope, y - half_height)
    if shape == "cross":
        arm = 0.17 * size
        return np.minimum(_distance_to_box(y, x, size / 2, arm), _distance_to_box(y, x, arm, size / 2))
    raise UserError(f"shape: got {shape!r}, allowed are {', '.join(SHAPES)}")


def positions(
    attributes: Attributes, start: tuple[float, float], frames: int, height: int, width: int, first_frame: int = 0
) -> np.ndarray:
    """Centres of the shape, float64 [F,2] as (y, x) in pixels on the torus [0,H) x [0,W)."""
    index = np.arange(first_frame, first_frame + frames, dtype=np.float64)[:, None]  # [F,1]
    velocity = np.float64(DIRECTIONS[attributes.direction]) * SPEED * height / HEIGHT  # [2]
    world = np.float64([height, width])
    return (np.float64(start) * world + index * velocity) % world  # [F,2]


def render(
    attributes: Attributes,
    start: tuple[float, float],
    frames: int,
    height: int = HEIGHT,
    width: int = WIDTH,
    first_frame: int = 0,
) -> np.ndarray:
    """Renders frames ``first_frame .. first_frame + frames - 1``.

    Args:
        start: centre at frame 0 as (y, x), each a fraction of the height and of the width.

    Returns:
        uint8 [F,H,W,3], anti-aliased.

    Raises:
        UserError: fewer than one frame, a negative first frame, or a frame too small to hold the shape once.
    """
    size = SUBJECT_SIZE * height / HEIGHT
    if frames < 1 or first_frame < 0:
        raise UserError(f"frames, first_frame: got {frames}, {first_frame}, need at least 1 and 0")
    reach = math.ceil(0.6 * size) + 1  # half the side of the only region that the shape can touch
    if min(height, width) < 2 * reach or height < 16:
        raise UserError(f"size: got {height}x{width}, need a height of at least 16 and a width of {2 * reach}")

    centre = positions(attributes, start, frames, height, width, first_frame)  # [F,2]
    corner = np.floor(centre).astype(np.int64) - reach  # [F,2]
    cells = corner[:, :, None] + np.arange(2 * reach)  # [F,2,P] pixel indices, not yet wrapped
    offset = (cells + 0.5 - centre[:, :, None]).astype(np.float32)  # [F,2,P] pixel centres lie at half integers
    distance = signed_distance(attributes.shape, offset[:, 0, :, None], offset[:, 1, None, :], size)  # [F,P,P]
    coverage = np.clip(0.5 - distance, 0, 1)[..., None]  # [F,P,P,1]

    background = render_background(attributes.background, height, width)
    rows, columns = (cells[:, 0] % height)[:, :, None], (cells[:, 1] % width)[:, None, :]  # [F,P,1], [F,1,P]
    patch = background[rows, columns]  # [F,P,P,3]
    patch = patch + coverage * (np.float32(COLOURS[attributes.colour]) - patch)
    video = np.repeat(np.rint(background).astype(np.uint8)[None], frames, axis=0)  # [F,H,W,3]
    video[np.arange(frames)[:, None, None], rows, columns] = np.rint(patch).astype(np.uint8)
    return video


# --- Captions --------------------------------------------------------------------------------------------------

_DIRECTION_PHRASES: dict[str, tuple[str, ...]] = {
    "right": ("to the right", "right", "rightwards", "from left to right"),
    "left": ("to the left", "left", "leftwards", "from right to left"),
    "up": ("up", "upwards", "to the top", "from bottom to top"),
    "down": ("down", "downwards", "to the bottom", "from top to bottom"),
    "up right": ("up and to the right", "diagonally up right", "to the upper right", "to the top right"),
    "up left": ("up and to the left", "diagonally up left", "to the upper left", "to the top left"),
    "down right": ("down and to the right", "diagonally down right", "to the lower right", "to the bottom right"),
    "down left": ("down and to the left", "diagonally down left", "to the lower left", "to the bottom left"),
}
_BACKGROUND_PHRASES: dict[str, tuple[str, ...]] = {
    "dark": ("a dark background", "a black background", "a dark backdrop"),
    "light": ("a light background", "a white background", "a light backdrop"),
    "gradient": ("a gradient background", "a smooth gradient", "a gray gradient"),
    "stripes": ("a striped background", "wide stripes", "gray stripes"),
}
_SHAPE_PHRASES: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "cross": ("cross", "cross", "plus sign"),
}
_VERBS = (("moves", "moving"), ("drifts", "drifting"), ("slides", "sliding"), ("glides", "gliding"))
_TEMPLATES = (
    "{subject} {verb} {direction} over {background}",
    "{subject} {participle} {direction} over {background}",
    "{subject} on {background}, {participle} {direction}",
    "over {background}, {subject} {verb} {direction}",
    "a video of {subject} {participle} {direction} across {background}",
    "{participle} {direction}: {subject} in front of {background}",
    "there is {subject} that {verb} {direction}, with {background} behind it",
    "{background}, and {subject} that {verb} {direction}",
)


def caption(attributes: Attributes, rng: np.random.RandomState) -> str:
    """A sentence that names all four attributes, its phrasing drawn from ``rng`` (five draws always)."""

    def pick(options: tuple) -> object:
        return options[rng.randint(len(options))]

    template, (verb, participle) = pick(_TEMPLATES), pick(_VERBS)
    article = "an" if attributes.colour[0] in "aeiou" else "a"
    text = template.format(
        subject=f"{article} {attributes.colour} {pick(_SHAPE_PHRASES[attributes.shape])}",
        verb=verb,
        participle=participle,
        direction=pick(_DIRECTION_PHRASES[attributes.direction]),
        background=pick(_BACKGROUND_PHRASES[attributes.background]),
    )
    return text[0].upper() + text[1:] + "." if rng.randint(3) == 0 else text


# --- Split and samples -----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _split_combinations() -> tuple[tuple[Attributes, ...], tuple[Attributes, ...]]:
    everything = [Attributes(*values) for values in itertools.product(*ATTRIBUTE_VALUES.values())]
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(everything))
    held_out = set(order[: round(_HELD_OUT_SHARE * len(everything))].tolist())
    train = tuple(a for i, a in enumerate(everything) if i not in held_out)
    return train, tuple(a for i, a in enumerate(everything) if i in held_out)


def train_combinations() -> tuple[Attributes, ...]:
    """The 819 combinations that training may show; they contain every pair of attribute values."""
    return _split_combinations()[0]


def held_out_combinations() -> tuple[Attributes, ...]:
    """The 205 combinations (20 %) that no training clip ever shows."""
    return _split_combinations()[1]


def sample_clip(seed: int, split: str, frames: int, height: int = HEIGHT, width: int = WIDTH) -> Clip:
    """The clip number ``seed`` of a split: combination, start and caption are functions of (seed, split) alone.

    Args:
        seed: any integer from 0 to 2**64 - 1.
        split: "train" or "held_out".
    """
    if split not in SPLITS:
        raise UserError(f"split: got {split!r}, allowed are {', '.join(SPLITS)}")
    if not 0 <= seed < 2**64:
        raise UserError(f"seed: got {seed}, need 0 to 2**64 - 1")
    rng = np.random.RandomState([SPLITS.index(split), seed & 0xFFFFFFFF, seed >> 32])
    combinations = _split_combinations()[SPLITS.index(split)]
    attributes = combinations[rng.randint(len(combinations))]
    start = (float(rng.random_sample()), float(rng.random_sample()))
    text = caption(attributes, rng)
    return Clip(render(attributes, start, frames, height, width), text, attributes, start)


# --- Evaluation prompts ----------------------------------------------------------------------------------------

PROMPT_FOLDER = pathlib.Path(__file__).resolve().parents[2] / "assets" / "prompts"
PROMPT_FILES = {"held_out_200.json": (200, 99, 1000), "held_out_20_long.json": (20, 60 * FPS, 5000)}


def evaluation_prompts(count: int, num_frames: int, first_seed: int) -> list[dict]:
    """``count`` distinct held-out combinations with a caption and the seed that the sampler shall use for it."""
    held_out = held_out_combinations()
    if not 1 <= count <= len(held_out):
        raise UserError(f"count: got {count}, allowed are 1 to {len(held_out)}")
    rng = np.random.RandomState(first_seed)
    chosen = rng.permutation(len(held_out))[:count]
    return [
        {
            "prompt": caption(held_out[index], rng),
            "attributes": dataclasses.asdict(held_out[index]),
            "seed": first_seed + number,
            "num_frames": num_frames,
        }
        for number, index in enumerate(chosen)
    ]


def prompt_file_text(name: str) -> str:
    """The exact content of the file ``name`` in assets/prompts: a JSON list with one prompt a line."""
    lines = [json.dumps(entry) for entry in evaluation_prompts(*PROMPT_FILES[name])]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def main() -> None:
    PROMPT_FOLDER.mkdir(parents=True, exist_ok=True)
    for name in PROMPT_FILES:
        (PROMPT_FOLDER / name).write_text(prompt_file_text(name), encoding="utf-8")
        print(PROMPT_FOLDER / name)


if __name__ == "__main__":
    main()
