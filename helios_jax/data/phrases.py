"""Captions in freer English than :mod:`helios_jax.data.shapes` writes, for training the text encoder.

The clips' own captions follow a few templates. A person who types a prompt does not: he orders the parts differently,
uses other words for the same thing, and adds remarks that mean nothing here. These captions name the same four
attributes in such ways, so that the encoder learns what to read and what to ignore.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from helios_jax.data.shapes import Attributes

_COLOURS: dict[str, tuple[str, ...]] = {
    "red": ("red", "red", "scarlet", "crimson", "ruby"),
    "orange": ("orange", "orange", "tangerine", "amber"),
    "yellow": ("yellow", "yellow", "lemon", "golden"),
    "green": ("green", "green", "emerald", "grass green"),
    "cyan": ("cyan", "cyan", "turquoise", "aqua", "teal"),
    "blue": ("blue", "blue", "azure", "royal blue"),
    "purple": ("purple", "purple", "violet", "lilac"),
    "pink": ("pink", "pink", "rose", "bubblegum pink"),
}
_SHAPES: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "disc", "disk", "ball", "dot"),
    "square": ("square", "square", "box", "block", "tile"),
    "triangle": ("triangle", "triangle", "triangular shape", "pyramid"),
    "cross": ("cross", "cross", "plus sign", "plus"),
}
_HORIZONTAL = {"left": ("left", "leftwards", "leftward", "to the left"),
               "right": ("right", "rightwards", "rightward", "to the right")}
_VERTICAL = {"up": ("up", "upwards", "upward", "to the top"),
             "down": ("down", "downwards", "downward", "to the bottom")}


def _diagonal(vertical: str, horizontal: str) -> tuple[str, ...]:
    half, edge, compass, opposite = {"up": ("upper", "top", "north", "lower"),
                                     "down": ("lower", "bottom", "south", "upper")}[vertical]
    side, point = {"left": ("right", "west"), "right": ("left", "east")}[horizontal]
    return (f"{vertical} and to the {horizontal}", f"{vertical} and {horizontal}", f"{vertical} {horizontal}",
            f"diagonally {vertical} {horizontal}", f"{vertical}-{horizontal}", f"{horizontal} and {vertical}",
            f"to the {horizontal} and {vertical}", f"{vertical}wards and to the {horizontal}",
            f"to the {half} {horizontal}", f"to the {edge} {horizontal}", f"towards the {half} {horizontal} corner",
            f"to the {edge} {horizontal} corner", f"from the {opposite} {side} to the {half} {horizontal}",
            f"{compass}{point}")


_DIRECTIONS: dict[str, tuple[str, ...]] = {
    "right": (*_HORIZONTAL["right"], "towards the right side", "from left to right", "from the left to the right",
              "to the right edge", "east"),
    "left": (*_HORIZONTAL["left"], "towards the left side", "from right to left", "from the right to the left",
             "to the left edge", "west"),
    "up": (*_VERTICAL["up"], "straight up", "towards the top edge", "from bottom to top", "from the bottom to the top",
           "north"),
    "down": (*_VERTICAL["down"], "straight down", "towards the bottom edge", "from top to bottom",
             "from the top to the bottom", "south"),
} | {f"{v} {h}": _diagonal(v, h) for v in _VERTICAL for h in _HORIZONTAL}
_BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "dark": ("a dark background", "a black background", "a dark backdrop", "darkness", "a nearly black backdrop",
             "a dark wall", "a night dark scene", "black"),
    "light": ("a light background", "a white background", "a light backdrop", "a bright background", "a pale wall",
              "a nearly white backdrop", "a plain white scene", "white"),
    "gradient": ("a gradient background", "a smooth gradient", "a gray gradient", "a gradient", "a soft gray gradient",
                 "a gradient backdrop", "a background with a gradient", "a grey gradient"),
    "stripes": ("a striped background", "wide stripes", "gray stripes", "stripes", "vertical stripes", "a striped wall",
                "a background with stripes", "a striped backdrop", "grey stripes"),
}
_VERBS = (("moves", "moving"), ("drifts", "drifting"), ("slides", "sliding"), ("glides", "gliding"),
          ("travels", "travelling"), ("floats", "floating"), ("goes", "going"), ("flies", "flying"),
          ("heads", "heading"), ("rolls", "rolling"), ("wanders", "wandering"), ("runs", "running"))
_BEFORE_COLOUR = ("small", "big", "single", "bright", "shiny", "solid", "flat", "nice", "large", "lone", "tiny",
                  "simple")
_ADVERBS = ("slowly", "steadily", "smoothly", "quickly", "gently", "calmly", "constantly", "evenly")
_OVER = ("over", "on", "across", "in front of", "against", "above", "with")
_OPENINGS = ("a video of", "an animation of", "a clip showing", "we see", "imagine", "there is", "here is", "look at",
             "a short film of", "simple animation:", "show me", "please make", "generate", "footage of", "draw")
_REMARKS = ("high quality", "4k", "cinematic", "in slow motion", "at a steady pace", "seamless loop", "minimalist",
            "no sound", "best quality, highly detailed", "24 fps", "2d", "realistic", "beautiful", "wraps around",
            "without stopping", "at constant speed", "very simple", "the camera is still", "for the whole time",
            "masterpiece", "a children's cartoon", "all the way", "again and again", "forever")
_JOINS = (", ", ", ", " ", " and ", "; ", " - ", ". ")


def free_caption(attributes: Attributes, rng: np.random.RandomState) -> str:
    """A phrase that names all four attributes in free order, with synonyms, remarks and typing habits."""

    def pick(options: Sequence) -> str:
        return options[rng.randint(len(options))]

    def chance(probability: float) -> bool:
        return rng.random_sample() < probability

    colour = pick(_COLOURS[attributes.colour])
    if chance(0.25):
        colour = f"{pick(_BEFORE_COLOUR)} {colour}"
    shape = pick(_SHAPES[attributes.shape])
    article = pick(("a", "a", "the", "one", "")) if colour[0] not in "aeiou" else pick(("an", "an", "the", ""))
    subject = f"{article} {colour} {shape}".strip()
    verb = _VERBS[rng.randint(len(_VERBS))][rng.randint(2)]
    motion = f"{verb} {pick(_DIRECTIONS[attributes.direction])}"
    if chance(0.25):
        motion = f"{motion} {pick(_ADVERBS)}" if chance(0.5) else f"{pick(_ADVERBS)} {motion}"
    background = pick(_BACKGROUNDS[attributes.background])
    if chance(0.7):
        background = f"{pick(_OVER)} {background}"

    if chance(0.6):  # the usual order, run together
        text = f"{subject} {motion} {background}"
    else:
        parts = [subject, motion, background]
        text = ""
        for index in rng.permutation(3):
            text += (pick(_JOINS) if text else "") + parts[index]
    if chance(0.3):
        text = f"{pick(_OPENINGS)} {text}"
    for _ in range(rng.randint(3) if chance(0.3) else 0):
        text = f"{text}{pick(_JOINS)}{pick(_REMARKS)}" if chance(0.7) else f"{pick(_REMARKS)}{pick(_JOINS)}{text}"
    if chance(0.3):
        text = text[0].upper() + text[1:]
    elif chance(0.1):
        text = text.title()
    if chance(0.3):
        text += pick((".", ".", "!", " ."))
    if chance(0.05):
        text = pick(('"{}"', "({})", "* {}", "[{}]")).format(text)
    return text


def with_noise_words(text: str, rng: np.random.RandomState) -> str:
    """One to three words of random letters between the words: the encoder must read past what it does not know."""
    words = text.split(" ")
    for _ in range(1 + rng.randint(3)):
        letters = "".join(chr(ord("a") + i) for i in rng.randint(26, size=2 + rng.randint(6)))
        words.insert(rng.randint(len(words) + 1), letters)
    return " ".join(words)
