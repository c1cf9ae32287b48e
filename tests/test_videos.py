"""A video corpus: which clips are used, which frames and pixels a section holds, and what is said of broken files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from helios_jax.data import videos
from helios_jax.data.videos import BrokenClip, Buckets, Clip, LeftOut, parse_entry, read_frames, read_sections
from helios_jax.errors import UserError
from helios_jax.video import VideoWriter, read_video
from tests.corpus import number_of, numbered_frames, write_video

ENTRY = {"path": "a/b.mp4", "cut": [0, 140], "crop": [0, 64, 0, 32], "fps": 24.0, "num_frames": 140,
         "resolution": {"height": 32, "width": 64}, "cap": ["first", "second"]}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """150 frames with several key frames and B-frames between them."""
    return write_video(tmp_path_factory.mktemp("videos") / "numbered.mp4", numbered_frames(150))


def test_lengths_and_sizes_are_those_of_the_specification():
    buckets = Buckets()
    sections = {121: 3, 141: 4, 161: 4, 181: 5, 193: 5, 221: 6, 241: 7, 261: 7, 281: 8, 301: 9, 321: 9, 341: 10,
                361: 10, 381: 11, 401: 12, 421: 12, 441: 13, 461: 13, 481: 14, 501: 15}
    assert {n: buckets.length(n) // 33 for n in sections} == sections
    assert [buckets.length(n) for n in (121, 140, 180, 192, 193, 220, 9999)] == [121, 121, 161, 181, 193, 193, 501]
    rng = np.random.default_rng(0)
    for height, width in rng.integers(16, 2000, (200, 2)).tolist() + [[384, 640], [1080, 1920], [100, 100]]:
        best, metric = None, np.inf
        for h, w in videos.SIZES:  # the last of equals
            if abs(height * w - width * h) <= metric:
                best, metric = (h, w), abs(height * w - width * h)
        assert buckets.size(height, width) == best
    assert Buckets(sizes=((32, 64), (64, 128)), keep=()).size(10, 20) == (64, 128)
    for cut, reason in ((120, "shorter than 121 frames"), (121, None)):
        clip = Clip("a.mp4", (7, 7 + cut), (0, 640, 0, 384), 24, ("x",))
        if reason:
            with pytest.raises(LeftOut, match=reason):
                buckets.assign(clip)
        else:
            assert buckets.assign(clip) == (121, (384, 640))
    with pytest.raises(LeftOut, match="size 512x512 is not kept"):
        buckets.assign(Clip("a.mp4", (0, 200), (0, 500, 0, 500), 24, ("x",)))


def test_wrong_bucket_rules_are_one_clear_line():
    for values, message in [
        ({"sizes": ((30, 64),)}, "sizes: multiples of 16"), ({"sizes": ()}, "sizes: at least one"),
        ({"keep": ((1, 2),)}, "keep: 1x2 is not among"), ({"min_frames": 20}, "min_frames: at least 41"),
        ({"lengths": (20,)}, "min_frames: at least 33"), ({"lengths": ()}, "lengths: positive"),
    ]:
        with pytest.raises(UserError, match=message):
            Buckets(**values)


def test_entries_of_the_original_are_read_and_wrong_ones_named(tmp_path):
    clip = parse_entry(ENTRY)
    assert clip == Clip("a/b.mp4", (0, 140), (0, 64, 0, 32), 24.0, ("first", "second")) and clip.name == "b_0-140"
    for change, message in [
        ({"cut": [5]}, "cut: 2 whole numbers"), ({"cut": [5, 5]}, "cut: 0 <= first < end"), ({"cut": None}, "cut"),
        ({"crop": [0, 64, 0]}, "crop: 4 whole"), ({"crop": [9, 9, 0, 1]}, "crop: 0 <= x0 < x1"),
        ({"crop": [0, 1.5, 0, 1]}, "crop: 4 whole"), ({"cap": []}, "cap: a list"), ({"cap": [" "]}, "cap: a list"),
        ({"cap": [3]}, "cap: a list"), ({"path": "../x.mp4"}, "path: a path inside"), ({"path": 3}, "path"),
        ({"path": "/etc/x"}, "path"), ({"fps": "24"}, "fps: a number"),
    ]:
        with pytest.raises(BrokenClip, match=f"metadata: {message}"):
            parse_entry({**ENTRY, **change})
    for field in ("path", "cut", "crop", "cap"):
        with pytest.raises(BrokenClip, match=f"{field} is missing"):
            parse_entry({key: value for key, value in ENTRY.items() if key != field})
    with pytest.raises(BrokenClip, match="an object expected, got str"):
        parse_entry("x")
    path = tmp_path / "metadata.json"
    for text, message in [("{", "is no JSON"), ("{}", "must hold a list"), ("[]", "must hold a list")]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            videos.read_metadata(path)
    with pytest.raises(UserError, match="cannot be read"):
        videos.read_metadata(tmp_path / "absent.json")
    path.write_text(json.dumps([ENTRY]))
    assert videos.read_metadata(path) == [ENTRY]


@pytest.mark.parametrize(("source", "target"), [
    ((64, 128), (32, 64)), ((75, 101), (32, 48)), ((20, 30), (32, 64)), ((33, 200), (48, 16)), ((32, 64), (32, 64)),
    ((500, 17), (16, 64)),
])
def test_resizing_is_that_of_pytorch_with_antialiasing(source, target):
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).uniform(-1, 1, (*source, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None].double(), size=target,
                                               mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(videos.resize(image, *target), expected, atol=3e-6)


def test_a_frame_is_scaled_cropped_to_the_rectangle_and_to_the_middle_and_resized():
    torch = pytest.importorskip("torch")
    frame = np.random.default_rng(1).integers(0, 256, (100, 150, 3), np.uint8)
    for crop, (height, width), kept in [
        ((10, 110, 20, 90), (48, 80), (25, 85, 10, 110)),  # 70 rows to 100 * 0.6 = 60, five above and five below
        ((0, 150, 0, 61), (64, 64), (0, 61, 44, 105)),  # 89 columns too many, 44 of them on the left
        ((5, 85, 0, 48), (48, 80), (0, 48, 5, 85)),
    ]:
        y0, y1, x0, x1 = kept
        pixels = torch.from_numpy(frame[y0:y1, x0:x1].astype(np.float64) / 127.5 - 1).permute(2, 0, 1)[None]
        expected = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
        result = videos.crop_and_resize(frame, crop, height, width)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected[0].permute(1, 2, 0).numpy(), atol=3e-6)
    with pytest.raises(BrokenClip, match="leaves the frame of 150x100"):
        videos.crop_and_resize(frame, (0, 151, 0, 100), 32, 64)


@pytest.mark.parametrize(("first", "count"), [(0, 5), (1, 33), (19, 3), (20, 1), (61, 40), (149, 1), (0, 150)])
def test_frames_from_the_middle_are_those_of_the_whole_video(video, first, count):
    whole = read_video(video)
    frames = list(read_frames(video, first, count))
    np.testing.assert_array_equal(np.stack(frames), whole[first:first + count])
    assert [number_of(frame) for frame in frames] == list(range(first, first + count))


def test_frames_of_a_container_without_times_are_counted(tmp_path, video):
    import av

    raw = tmp_path / "raw.h264"
    with av.open(str(video)) as source, av.open(str(raw), "w", format="h264") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    assert [number_of(frame) for frame in read_frames(raw, 47, 30)] == list(range(47, 77))


def test_a_clip_gives_consecutive_frames_of_its_cut_in_sections_of_33(video):
    starts = set()
    for seed in range(12):
        clip = Clip(video.name, (20, 140), (0, 64, 0, 32), 24, ("x",))
        sections = list(read_sections(video.parent, clip, 81, (32, 64), seed))
        assert len(sections) == 2 and all(s.shape == (33, 32, 64, 3) and s.dtype == np.float32 for s in sections)
        numbers = [number_of((frame + 1) * 127.5) for section in sections for frame in section]
        assert numbers == list(range(numbers[0], numbers[0] + 66)) and 20 <= numbers[0] <= 140 - 81
        starts.add(numbers[0])
        again = next(read_sections(video.parent, clip, 81, (32, 64), seed))
        np.testing.assert_array_equal(again, sections[0])
    assert len(starts) > 6
    whole = Clip(video.name, (30, 111), (0, 64, 0, 32), 24, ("x",))
    assert {videos.first_frame(whole, 81, seed) for seed in range(20)} == {30}
    clip = Clip(video.name, (3, 8), (0, 64, 0, 32), 24, ("x",))
    assert {videos.first_frame(clip, 4, seed) for seed in range(50)} == {3, 4}


def test_every_way_of_being_broken_is_named(tmp_path, video):
    content = video.read_bytes()
    files = {
        "empty": (b"", "cannot be decoded"),
        "noise": (np.random.default_rng(0).bytes(5000), "cannot be decoded"),
        "no_index": (content[: len(content) // 2], "cannot be decoded"),
        "short": (content, "has 150 frames, frames 140 to 172 are wanted"),
        "missing": (None, "is missing"),
    }
    for name, (data, message) in files.items():
        path = tmp_path / f"{name}.mp4"
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(BrokenClip, match=message):
            list(read_frames(path, 140, 33))
    cut = tmp_path / "cut.mp4"
    with VideoWriter(cut) as writer:
        writer.append(numbered_frames(150))  # its index is in front, its end is missing
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with pytest.raises(BrokenClip):
        list(read_frames(cut, 0, 150))
    scratched = bytearray(content)
    middle = len(content) // 2
    scratched[middle:middle + 400] = bytes(400)
    (tmp_path / "scratched.mp4").write_bytes(scratched)
    with pytest.raises(BrokenClip):
        list(read_frames(tmp_path / "scratched.mp4", 0, 150))
    sound = tmp_path / "sound.wav"
    sound.write_bytes(b"RIFF\x2c\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data\x08\0\0\0"
                      + bytes(8))
    with pytest.raises(BrokenClip, match="no video stream"):
        list(read_frames(sound, 0, 1))


def test_damage_anywhere_gives_frames_of_one_size_or_a_broken_clip_and_nothing_else(tmp_path, video):
    content, rng = video.read_bytes(), np.random.default_rng(0)
    path, outcomes = tmp_path / "damaged.mp4", set()
    for number in range(45):
        damaged = bytearray(content)
        place = int(rng.integers(len(damaged)))
        if number % 3 == 0:
            for other in rng.integers(0, len(damaged), 8):
                damaged[other] = rng.integers(256)
        elif number % 3 == 1:
            damaged[place:place + 100] = rng.bytes(100)
        path.write_bytes(bytes(damaged[:place] if number % 3 == 2 else damaged))
        try:
            frames = list(read_frames(path, 70, 33))
            outcomes.add("frames")
            assert len(frames) == 33 and len({frame.shape for frame in frames}) == 1
        except BrokenClip:
            outcomes.add("broken")
    assert outcomes == {"frames", "broken"}
