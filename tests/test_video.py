"""Pixels in and out: sizes as diffusers makes them, exact fps, whole files or none, and damaged inputs named."""

from __future__ import annotations

import errno
import os
import pathlib
import subprocess
import sys
import types
from fractions import Fraction

import av
import numpy as np
import PIL.Image
import pytest

import helios_jax.video as video
from helios_jax.data.shapes import Attributes, render
from helios_jax.errors import UserError
from helios_jax.video import VideoWriter, preprocess_image, preprocess_video, read_image, read_video
from tests.golden import rs

CLIP = render(Attributes("red", "cross", "down right", "gradient"), (0.4, 0.9), 66)


def random_image(tag: str, height: int = 64, width: int = 128) -> np.ndarray:
    return (rs(tag).rand(height, width, 3) * 255).astype(np.uint8)


def hidden_files(folder: pathlib.Path) -> list[str]:
    return [name for name in os.listdir(folder) if ".partial" in name]


# --- Preprocessing ---------------------------------------------------------------------------------------------


def channel_first(images: np.ndarray) -> np.ndarray:
    return np.moveaxis(images, -1, -3)


@pytest.mark.parametrize(
    ("size", "mean", "std", "first", "last"),
    [  # golden C1 and C2 of the reference
        ((64, 128), -0.0106008, 0.5791079, (0.050980, -0.019608, -0.043137, 0.380392), (0.678431, 0.584314)),
        ((32, 64), -0.0105443, 0.2577895, (0.027451, 0.058824, 0.670588, -0.427451), (0.513726, 0.043137)),
    ],
)
def test_golden_preprocessed_image(size, mean, std, first, last):
    result = preprocess_image(PIL.Image.fromarray(random_image("img")), *size)
    assert result.shape == (1, *size, 3) and result.dtype == np.float32
    flat = channel_first(result).ravel().astype(np.float64)
    np.testing.assert_allclose([flat.mean(), flat.std(), *flat[:4], *flat[-2:]], [mean, std, *first, *last], atol=1e-6)


@pytest.fixture(scope="module")
def oracle():
    pytest.importorskip("torch")
    return pytest.importorskip("diffusers.video_processor").VideoProcessor(vae_scale_factor=8)


SIZES = [(64, 128), (32, 64), (96, 160), (80, 48)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["pil", "float", "signed"])
def test_images_equal_diffusers(oracle, size, kind):
    pixels = random_image("img", 70, 110)
    image = PIL.Image.fromarray(pixels) if kind == "pil" else (pixels / 255).astype(np.float32)
    image = 2 * image - 1 if kind == "signed" else image
    expected = oracle.preprocess(image, *size).numpy()
    np.testing.assert_array_equal(channel_first(preprocess_image(image, *size)), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["pil", "float", "batch"])
def test_videos_equal_diffusers(oracle, size, kind):
    frames = np.stack([random_image(f"vid{i}", 70, 110) for i in range(3)])
    clip = (frames / 255).astype(np.float32)
    given = {"pil": [PIL.Image.fromarray(f) for f in frames], "float": clip, "batch": np.stack([clip, 2 * clip - 1])}
    expected = oracle.preprocess_video(given[kind], *size).numpy()  # [B,3,F,H,W]
    result = preprocess_video(given[kind], *size)
    np.testing.assert_array_equal(np.moveaxis(result, -1, 1), expected)


def test_nearest_index_equals_torch_at_every_size():
    torch = pytest.importorskip("torch")
    for source in (7, 64, 100, 333, 1080):
        for target in (*range(1, 140), 384, 640, 1088):
            line = torch.arange(source, dtype=torch.float32)[None, None]
            expected = torch.nn.functional.interpolate(line, size=target)[0, 0].numpy()
            np.testing.assert_array_equal(video._nearest_index(source, target), expected, err_msg=f"{source} {target}")


def test_postprocess_equals_diffusers(oracle):
    torch = pytest.importorskip("torch")
    raw = 1.5 * rs("post").standard_normal((1, 3, 2, 8, 8)).astype(np.float32)
    expected = oracle.postprocess_video(torch.from_numpy(raw), "np")  # [B,F,H,W,3]
    np.testing.assert_array_equal(video.postprocess_video(np.moveaxis(raw, 1, -1)), expected)


def test_uint8_arrays_are_treated_as_pil_images_and_every_mode_becomes_rgb():
    pixels = random_image("img", 40, 60)
    picture = PIL.Image.fromarray(pixels)
    np.testing.assert_array_equal(preprocess_image(pixels, 32, 64), preprocess_image(picture, 32, 64))
    np.testing.assert_array_equal(
        preprocess_video(pixels[None], 32, 64), preprocess_image(picture, 32, 64)[None]
    )  # [1,1,32,64,3]
    for mode in ("L", "RGBA", "LA", "P", "CMYK", "1"):
        converted = picture.convert(mode)
        expected = preprocess_image(converted.convert("RGB"), 32, 64)
        np.testing.assert_array_equal(preprocess_image(converted, 32, 64), expected)
    deep = PIL.Image.fromarray((pixels[..., 0].astype(np.uint16) << 8) + 77)
    np.testing.assert_array_equal(preprocess_image(deep, 32, 64), preprocess_image(picture.getchannel("R"), 32, 64))


@pytest.mark.parametrize(
    "pixels",
    [np.full((8, 8, 3), 200.0), np.full((8, 8, 3), np.nan), np.zeros((8, 8)), np.zeros((8, 8, 3), np.int64)],
)
def test_pixels_of_unknown_meaning_are_refused(pixels):
    with pytest.raises(UserError, match="pixels"):
        preprocess_image(pixels, 16, 16)


# --- Reading ---------------------------------------------------------------------------------------------------


def test_images_are_turned_upright(tmp_path):
    upright = PIL.Image.fromarray(CLIP[0])
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to see it upright"
    upright.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "phone.png"), CLIP[0])


def test_rotated_videos_are_turned_upright(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    with VideoWriter(tmp_path / "a.mp4", crf=0) as writer:
        writer.append(CLIP[:5])
    turned = tmp_path / "turned.mp4"
    command = [ffmpeg, "-v", "error", "-display_rotation:v:0", "90", "-i", tmp_path / "a.mp4", "-c", "copy", turned]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this ffmpeg cannot store a rotation")
    raw = subprocess.run(
        [ffmpeg, "-v", "error", "-i", turned, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True
    ).stdout
    expected = np.frombuffer(raw, np.uint8).reshape(5, 128, 64, 3).astype(int)
    assert np.abs(read_video(turned) - expected).mean() < 4  # the two differ in rounding only


@pytest.fixture
def saved(tmp_path):
    with VideoWriter(tmp_path / "clip.mp4") as writer:
        writer.append(CLIP[:40])
    return tmp_path / "clip.mp4"


@pytest.mark.parametrize("read", [read_image, read_video])
def test_missing_empty_and_foreign_files_are_named(tmp_path, read):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not pixels at all, but quite long a text " * 50)
    (tmp_path / "noise.mp4").write_bytes(np.random.RandomState(0).bytes(5000))
    for name, reason in [("none.png", "missing"), ("empty.png", "0 bytes"), ("text.png", ""), ("noise.mp4", "")]:
        with pytest.raises(UserError, match=f"{name}.*{reason}") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp"])
def test_truncated_images_are_named(tmp_path, suffix):
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    PIL.Image.fromarray(random_image("img")).save(whole)
    for share in (0.2, 0.6):
        cut.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
        with pytest.raises(UserError, match="image: .*cut"):
            read_image(cut)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated_videos_are_named(saved, share):
    saved.write_bytes(saved.read_bytes()[: int(share * saved.stat().st_size)])
    with pytest.raises(UserError, match="truncated"):
        read_video(saved)


def test_a_cut_made_by_an_edit_list_is_no_damage(saved, tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    subprocess.run(
        [ffmpeg, "-v", "error", "-ss", "0.5", "-i", saved, "-c", "copy", tmp_path / "later.mp4"], check=True
    )
    assert 20 <= len(read_video(tmp_path / "later.mp4")) <= 40


def test_images_sounds_and_short_videos_are_no_videos(saved, tmp_path):
    PIL.Image.fromarray(CLIP[0]).save(tmp_path / "one.png")
    with pytest.raises(UserError, match="is an image"):
        read_video(tmp_path / "one.png")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(UserError, match="no video stream"):
        read_video(tmp_path / "sound.wav")
    with VideoWriter(tmp_path / "one.mp4") as writer:
        writer.append(CLIP[:1])
    assert len(read_video(tmp_path / "one.mp4")) == 1
    with pytest.raises(UserError, match="has 1 frame.*need 33"):
        read_video(tmp_path / "one.mp4", min_frames=33)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="no frames"):
        read_video(tmp_path / "nothing")


# --- Writing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "allowed"), [("a.mp4", 1.5), ("a.gif", 0.01), ("a", 0.0)])
def test_what_is_written_chunk_by_chunk_is_read_back(tmp_path, name, allowed):
    with VideoWriter(tmp_path / "new" / name) as writer:
        for first in range(0, 66, 33):
            writer.append(CLIP[first : first + 33].astype(np.float32) / 255)
            assert not (tmp_path / "new" / name).exists()
    result = read_video(tmp_path / "new" / name)
    assert result.shape == CLIP.shape
    assert np.abs(result.astype(int) - CLIP).mean() <= allowed
    assert abs((result.astype(int) - CLIP).mean()) <= 0.3 * allowed  # nothing gets darker or brighter
    assert os.listdir(tmp_path / "new") == [name]


def test_floats_are_rounded_to_the_nearest_level(tmp_path):
    levels = np.float32([0.0, 0.4, 0.6, 99.4, 99.6, 254.4, 254.6, 300.0, -5.0]) / 255
    np.testing.assert_array_equal(video.to_uint8(levels), [0, 0, 1, 99, 100, 254, 255, 255, 0])
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(video.to_uint8(every.astype(np.float32) / 255), every)


@pytest.mark.parametrize("fps", [24, 8, 12.5, 30, 60, Fraction(30000, 1001)])
@pytest.mark.parametrize("count", [1, 33])
def test_the_container_has_the_asked_fps_and_count(tmp_path, fps, count):
    with VideoWriter(tmp_path / "a.mp4", fps) as writer:
        writer.append(CLIP[:count])
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == Fraction(fps)
        assert stream.frames == count
        assert stream.duration * stream.time_base == count / Fraction(fps)
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        # 1 is BT.709 and limited range: without these marks players guess, and small videos get other colours.
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)
    assert len(read_video(tmp_path / "a.mp4")) == count


def test_gif_lasts_as_long_as_asked(tmp_path):
    with VideoWriter(tmp_path / "a.gif", 24) as writer:
        writer.append(CLIP[:48])
    with PIL.Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 48 and gif.info["loop"] == 0
        total = 0
        for index in range(48):
            gif.seek(index)
            total += gif.info["duration"]
    assert abs(total - 2000) <= 20


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a"])
def test_ctrl_c_saves_what_exists(tmp_path, name):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / name) as writer:
        writer.append(CLIP[:33])
        raise KeyboardInterrupt
    assert len(read_video(tmp_path / name)) == 33
    assert not hidden_files(tmp_path)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a"])
def test_ctrl_c_before_the_first_frame_leaves_nothing(tmp_path, name):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / name):
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a"])
def test_any_other_error_leaves_nothing_and_keeps_the_older_file(tmp_path, name):
    older = tmp_path / name
    if older.suffix:
        older.write_bytes(b"older")
    with pytest.raises(RuntimeError), VideoWriter(older) as writer:
        writer.append(CLIP[:9])
        raise RuntimeError
    assert os.listdir(tmp_path) == ([name] if older.suffix else [])
    assert not older.suffix or older.read_bytes() == b"older"
    with pytest.raises(UserError, match="no frames"), VideoWriter(older):
        pass
    assert not hidden_files(tmp_path)


def test_an_existing_file_is_replaced_and_a_full_folder_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"older")
    with VideoWriter(tmp_path / "a.mp4") as writer:
        writer.append(CLIP[:3])
    assert len(read_video(tmp_path / "a.mp4")) == 3
    (tmp_path / "frames").mkdir()
    with VideoWriter(tmp_path / "frames") as writer:  # empty: taken
        writer.append(CLIP[:3])
    with pytest.raises(UserError, match="not an empty folder"):
        VideoWriter(tmp_path / "frames")
    (tmp_path / "b.mp4").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        VideoWriter(tmp_path / "b.mp4")


def test_saved_files_have_ordinary_permissions(tmp_path):
    (tmp_path / "ordinary").touch()
    with VideoWriter(tmp_path / "a.mp4") as writer:
        writer.append(CLIP[:1])
    assert (tmp_path / "a.mp4").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_unwritable_places_are_named_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="output: cannot write"):
        VideoWriter(tmp_path / "file" / "a.mp4")

    def deny(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(video.tempfile, "mkstemp", deny)
        with pytest.raises(UserError, match="Permission denied"):
            VideoWriter(tmp_path / "a.mp4")
    monkeypatch.setattr(video.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10))
    with pytest.raises(UserError, match="full"):
        VideoWriter(tmp_path / "a.mp4")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX processes")
@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a"])
def test_a_disk_that_fills_up_is_named_and_leaves_nothing(tmp_path, name):
    program = f"""
import resource, sys
import numpy as np
from helios_jax.errors import UserError
from helios_jax.video import VideoWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    with VideoWriter({str(tmp_path / name)!r}) as writer:
        for _ in range(20):
            writer.append(np.random.RandomState(0).randint(0, 255, (3, 128, 128, 3), np.uint8))
except UserError as error:
    sys.exit(str(error))
"""
    root = pathlib.Path(video.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert result.returncode == 1 and "the disk is full" in result.stderr, result.stderr
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("frames", "named"),
    [
        (np.zeros((2, 64, 128), np.uint8), "frames: got shape"),
        (np.zeros((2, 64, 128, 3), np.int32), "frames: got int32"),
        (np.full((2, 64, 128, 3), np.nan, np.float32), "NaN"),
        (np.zeros((2, 32, 64, 3), np.uint8), "equal sizes"),
    ],
)
def test_wrong_frames_are_named(tmp_path, frames, named):
    with pytest.raises(UserError, match=named), VideoWriter(tmp_path / "a.mp4") as writer:
        writer.append(CLIP[:2])
        writer.append(frames)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("a.avi",), "output"), (("a.mp4", 0), "fps"), (("a.mp4", float("nan")), "fps"), (("a.mp4", 24, 60), "crf")],
)
def test_wrong_arguments_are_named(tmp_path, arguments, named):
    with pytest.raises(UserError, match=named):
        VideoWriter(tmp_path / arguments[0], *arguments[1:])
    assert not os.listdir(tmp_path)


def test_odd_sizes_are_refused_for_mp4_only(tmp_path):
    odd = np.zeros((2, 33, 47, 3), np.uint8)
    with pytest.raises(UserError, match="even"), VideoWriter(tmp_path / "a.mp4") as writer:
        writer.append(odd)
    with VideoWriter(tmp_path / "a.gif") as writer:
        writer.append(odd)
    assert read_video(tmp_path / "a.gif").shape == odd.shape


def test_a_closed_writer_takes_no_frames(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4")
    writer.append(CLIP[:2])
    assert writer.close() == tmp_path / "a.mp4" == writer.close()
    assert writer.frames_written == 2
    with pytest.raises(UserError, match="closed"):
        writer.append(CLIP[:2])
