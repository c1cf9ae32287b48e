"""Samples a few prompts and puts evenly spaced frames of each into one picture.

    python -m helios_jax.tools.contact_sheet --model assets/helios-tiny-distilled --output assets/contact_sheet.png \\
        --prompt "a red circle moves to the right over a dark background" --prompt "..."
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import PIL.Image

from helios_jax.errors import command_line
from helios_jax.video import to_uint8


def contact_sheet(videos: list[np.ndarray], columns: int, scale: int, gap: int = 4) -> PIL.Image.Image:
    """One row per video [F, H, W, 3] (float in [0, 1] or uint8): ``columns`` evenly spaced frames."""
    height, width = (scale * side for side in videos[0].shape[1:3])
    sheet = PIL.Image.new("RGB", (columns * (width + gap) - gap, len(videos) * (height + gap) - gap), "white")
    for row, video in enumerate(videos):
        for column, index in enumerate(np.linspace(0, len(video) - 1, columns).round().astype(int)):
            frame = PIL.Image.fromarray(to_uint8(video[index])).resize((width, height), PIL.Image.Resampling.NEAREST)
            sheet.paste(frame, (column * (width + gap), row * (height + gap)))
    return sheet


@command_line
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m helios_jax.tools.contact_sheet", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--prompt", action="append", required=True, help="may be given several times")
    p.add_argument("--output", required=True, metavar="FILE.png")
    p.add_argument("--num_frames", type=int, default=99)
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--columns", type=int, default=6)
    p.add_argument("--scale", type=int, default=1)
    arguments = p.parse_args(argv)

    from helios_jax.pipeline.pipeline import HeliosPipeline

    pipeline = HeliosPipeline.from_pretrained(arguments.model)
    videos = list(pipeline(arguments.prompt, num_frames=arguments.num_frames, seed=arguments.seed))
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(videos, arguments.columns, arguments.scale).save(arguments.output)
    return 0


if __name__ == "__main__":
    main()
