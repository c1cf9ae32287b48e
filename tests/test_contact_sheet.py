"""Pictures of several videos: every frame stands where its place says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from helios_jax.pipeline import pipeline
from helios_jax.tools.contact_sheet import GAP, contact_sheet, main, moving_sheet


def videos(count: int, frames: int) -> list[np.ndarray]:
    """Of 2x3 pixels; video v shows 10 v + its frame's number."""
    return [np.broadcast_to((10 * v + np.arange(frames, dtype=np.uint8))[:, None, None, None], (frames, 2, 3, 3))
            for v in range(count)]


def test_a_sheet_has_a_row_per_video_and_evenly_spaced_frames():
    sheet = np.asarray(contact_sheet(videos(2, 9), 3, 2))
    assert sheet.shape == (2 * 4 + GAP, 3 * 6 + 2 * GAP, 3)
    corners = sheet[:: 4 + GAP, :: 6 + GAP, 0]
    np.testing.assert_array_equal(corners, [[0, 4, 8], [10, 14, 18]])
    assert (sheet[4 : 4 + GAP] == 255).all() and (sheet[:, 6 : 6 + GAP] == 255).all()


def test_moving_videos_stand_side_by_side_and_empty_places_are_white():
    sheet = moving_sheet(videos(3, 4), 2, 1)
    assert sheet.shape == (4, 2 * 2 + GAP, 2 * 3 + GAP, 3)
    np.testing.assert_array_equal(sheet[3, :: 2 + GAP, :: 3 + GAP, 0], [[3, 13], [23, 255]])


@pytest.mark.parametrize(("flags", "message"), [
    (("--output", "sheet.bmp"), "--output: a name that ends in .png, .gif or .mp4, got 'sheet.bmp'"),
    (("--output", "/"), "--output: a name that ends in .png, .gif or .mp4, got '/'"),
    (("--output", "README.md/sheet.png"), f"--output: {Path('README.md/sheet.png').absolute()} cannot be written"),
    (("--output", "sheet.png", "--model", "box:a"), "--model: FOLDER or FOLDER:STEPS expected, got 'box:a'"),
    (("--output", "sheet.png", "--columns", "0"), "--columns: must be positive, got 0")])
def test_wrong_flags_are_one_clear_line(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--model", "assets/helios-tiny", "--prompt", "a red circle", *flags])
    assert end.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize("name", ["sheet.png", "sheet.gif"])
def test_videos_of_several_models_stand_below_each_other(name, tmp_path, monkeypatch):
    asked = []

    def from_pretrained(folder):
        def sample(prompts, *, num_frames, steps, **_):
            asked.append((folder, steps))
            return np.full((len(prompts), num_frames, 16, 32, 3), len(asked) / 2, np.float32)
        return sample

    monkeypatch.setattr(pipeline.HeliosPipeline, "from_pretrained", from_pretrained)
    with pytest.raises(SystemExit) as end:
        main(["--model", "one", "--model", "two:1,1,1", "--prompt", "a", "--prompt", "b", "--num_frames", "33",
              "--columns", "2", "--output", str(tmp_path / name)])
    assert end.value.code == 0 and asked == [("one", None), ("two", (1, 1, 1))]
    rows = 4 if name.endswith("png") else 2
    with PIL.Image.open(tmp_path / name) as image:
        assert image.size == (2 * 32 + GAP, rows * 16 + (rows - 1) * GAP)
        lowest = image.convert("L").getpixel((5, image.size[1] - 5))
        assert image.convert("L").getpixel((5, 5)) == 128 and lowest == 255
