"""Samples a few prompts with one or several models: evenly spaced frames of each in one picture, or all of them moving.

    python -m helios_jax.tools.contact_sheet --model assets/helios-tiny-distilled --output assets/contact_sheet.png \\
        --prompt "a red circle moves to the right over a dark background" --prompt "..."
    python -m helios_jax.tools.contact_sheet --model assets/helios-tiny --model assets/helios-tiny-distilled:1,1,1 \\
        --output compared.gif --columns 2 --prompt "..."

Rows are the prompts of the first model, then those of the second, and so on. FOLDER:STEPS samples with so many steps.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import PIL.Image

from helios_jax.data.writing import check_output
from helios_jax.errors import UserError, command_line
from helios_jax.video import VideoWriter, to_uint8

GAP = 4  # white pixels between pictures


def contact_sheet(videos: list[np.ndarray], columns: int, scale: int) -> PIL.Image.Image:
    """One row per video [F, H, W, 3] (float in [0, 1] or uint8): ``columns`` evenly spaced frames."""
    rows = [[to_uint8(video[index]) for index in np.linspace(0, len(video) - 1, columns).round().astype(int)]
            for video in videos]
    return PIL.Image.fromarray(grid(rows, scale))


def grid(rows: list[list[np.ndarray]], scale: int) -> np.ndarray:
    """Pictures [H, W, 3] uint8 in rows of equal length, enlarged by whole factors: uint8 [H', W', 3] on white."""
    height, width = (scale * side for side in rows[0][0].shape[:2])
    sheet = np.full((len(rows) * (height + GAP) - GAP, len(rows[0]) * (width + GAP) - GAP, 3), 255, np.uint8)
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            top, left = row * (height + GAP), column * (width + GAP)
            sheet[top : top + height, left : left + width] = picture.repeat(scale, 0).repeat(scale, 1)
    return sheet


def moving_sheet(videos: list[np.ndarray], columns: int, scale: int) -> np.ndarray:
    """All videos [F, H, W, 3] side by side, ``columns`` in a row: uint8 [F, H', W', 3]. Empty places are white."""
    pictures = [to_uint8(video) for video in videos]
    pictures += [np.full_like(pictures[0], 255)] * (-len(pictures) % columns)
    rows = [pictures[first : first + columns] for first in range(0, len(pictures), columns)]
    return np.stack([grid([[video[index] for video in row] for row in rows], scale)
                     for index in range(len(pictures[0]))])


@command_line
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m helios_jax.tools.contact_sheet", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", action="append", required=True, metavar="FOLDER[:STEPS]", help="may be repeated")
    p.add_argument("--prompt", action="append", required=True, help="may be repeated")
    p.add_argument("--output", required=True, metavar="FILE", help=".png: a picture; .gif or .mp4: everything moves")
    p.add_argument("--num_frames", type=int, default=99)
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--columns", type=int, default=6, help="frames of a row, or videos of a row where they move")
    p.add_argument("--scale", type=int, default=1)
    p.add_argument("--fps", type=float, default=24)
    arguments = p.parse_args(argv)
    output = Path(arguments.output)
    if output.suffix not in (".png", ".gif", ".mp4"):
        raise UserError(f"--output: a name that ends in .png, .gif or .mp4, got {arguments.output!r}")
    for name in ("columns", "scale"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name}: must be positive, got {getattr(arguments, name)}")
    check_output("--output", output)
    models = []
    for text in arguments.model:
        match = re.fullmatch(r"([^:]+)(?::(\d+(?:,\d+)*))?", text)
        if not match:
            raise UserError(f"--model: FOLDER or FOLDER:STEPS expected, got {text!r}")
        models.append((match[1], tuple(map(int, match[2].split(","))) if match[2] else None))

    from helios_jax.pipeline.pipeline import HeliosPipeline

    videos = []
    for folder, steps in models:
        pipeline = HeliosPipeline.from_pretrained(folder)
        videos.extend(pipeline(arguments.prompt, num_frames=arguments.num_frames, seed=arguments.seed, steps=steps))
        if videos[-1].shape != videos[0].shape:
            raise UserError(f"--model: {folder} makes videos of {videos[-1].shape[:3]} (frames, height, width), the "
                            f"first one of {videos[0].shape[:3]}")
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".png":
        contact_sheet(videos, arguments.columns, arguments.scale).save(output)
    else:
        with VideoWriter(output, arguments.fps) as writer:
            writer.append(moving_sheet(videos, arguments.columns, arguments.scale))
    return 0


if __name__ == "__main__":
    main()
