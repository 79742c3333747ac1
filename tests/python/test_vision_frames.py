"""Decoding: exact frames, rotation, variable rates, and files that are broken or hostile.

Clips are encoded here; each frame shows its own number as a pattern of 8 bright or dark stripes,
which survives any codec, so that the test can read back which frame it got.
"""

from __future__ import annotations

import io
import sys
import weakref
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from framequilt.errors import FramequiltError, InvalidArgument, NotFound, Unsupported
from framequilt.vision import Frames, frames, load_frames, probe

WIDTH, HEIGHT = 128, 64


def picture(number: int) -> np.ndarray:
    bits = [(number >> b) & 1 for b in range(8)]
    row = np.repeat(np.where(bits, 230, 20), WIDTH // 8).astype(np.uint8)
    return np.broadcast_to(row[None, :, None], (HEIGHT, WIDTH, 3)).copy()


def number_of(pixels: np.ndarray) -> int:
    stripes = pixels[HEIGHT // 2, WIDTH // 16 :: WIDTH // 8].mean(axis=-1)
    return sum(1 << b for b, level in enumerate(stripes[:8]) if level > 128)


def clip(
    container: str = "mp4",
    codec: str = "libx264",
    count: int = 60,
    rate: int = 10,
    options: dict | None = None,
    pts: list[int] | None = None,
) -> bytes:
    av = pytest.importorskip("av")
    target = io.BytesIO()
    with av.open(target, "w", format=container) as out:
        try:
            stream = out.add_stream(codec, rate=rate)
        except Exception:  # PyAV raises its own and ValueError for codecs it lacks
            pytest.skip(f"this PyAV has no encoder {codec}")
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "yuv420p"
        stream.options = options or {}
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
            stream.time_base = Fraction(1, 1000)
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts = i if pts is None else pts[i]
            if pts is not None:
                frame.time_base = Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return target.getvalue()


FORMATS = [
    ("mp4", "libx264", {"g": "12", "bf": "3", "b_strategy": "0"}),
    ("mp4", "libx264", {"g": "250", "bf": "2"}),
    ("matroska", "libx264", {"g": "7", "bf": "3"}),
    ("avi", "mpeg4", {"g": "10"}),
    ("avi", "mpeg4", {"g": "10", "bf": "2"}),
    ("mpeg", "mpeg2video", {"g": "12", "bf": "2"}),
    ("mpegts", "libx264", {"g": "10", "bf": "2"}),
    ("webm", "libvpx-vp9", {"g": "15", "deadline": "realtime", "cpu-used": "8"}),
]


@pytest.mark.parametrize("container,codec,options", FORMATS)
def test_picked_frames_are_the_ones_asked_for(container, codec, options):
    rate = 25 if container == "mpeg" else 10  # MPEG-2 knows few rates
    data = clip(container, codec, 60, rate, options)
    got = load_frames(data, frames=7)
    assert got.indices == (0, 9, 19, 29, 39, 49, 59)
    assert [number_of(f) for f in got.images] == list(got.indices)
    assert got.times == pytest.approx([i / rate for i in got.indices])
    assert got.duration == pytest.approx(60 / rate)
    assert got.info is not None and got.info.frames == 60


def test_seeking_gives_the_pixels_that_decoding_from_the_start_gives():
    av = pytest.importorskip("av")
    data = clip(options={"g": "12", "bf": "3", "b_strategy": "0"}, count=120)
    with av.open(io.BytesIO(data)) as whole:
        every = [f.to_ndarray(format="rgb24") for f in whole.decode(video=0)]
    got = load_frames(data, timestamps=[0.3, 5.5, 5.6, 11.9])
    assert got.indices == (3, 55, 56, 119)
    for index, pixels in zip(got.indices, got.images, strict=True):
        np.testing.assert_array_equal(pixels, every[index])


def test_only_the_stretches_that_are_needed_are_decoded():
    av = pytest.importorskip("av")
    data = clip(options={"g": "10", "bf": "0"}, count=200)
    decoded = 0
    real = frames._Clip._decoded

    def counting(self):
        nonlocal decoded
        for frame in real(self):
            decoded += 1
            yield frame

    assert av
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames._Clip, "_decoded", counting)
        got = load_frames(data, timestamps=[0.0, 19.9])
    assert got.indices == (0, 199)
    assert decoded <= 25  # two stretches of at most 10 frames, and what frame threads hold


def test_path_bytes_and_file_object_are_the_same(tmp_path):
    data = clip()
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    ways = [load_frames(s, frames=4) for s in (path, str(path), data, io.BytesIO(data))]
    with path.open("rb") as file:
        ways.append(load_frames(file, frames=4))
    for other in ways[1:]:
        np.testing.assert_array_equal(other.images, ways[0].images)
        assert other.times == ways[0].times


def test_fps_picks_steps_and_their_times():
    got = load_frames(clip(count=60, rate=10), fps=2.0)
    assert got.indices == tuple(range(0, 60, 5))
    assert got.times == pytest.approx([0.5 * i for i in range(12)])


def test_too_many_steps_become_uniform_frames():
    got = load_frames(clip(count=60, rate=10), fps=10.0, frames=4)
    assert got.indices == (0, 19, 39, 59)


def test_timestamps_pick_the_frame_on_screen_and_may_repeat():
    got = load_frames(clip(), timestamps=[1.05, 1.0, 99.0, 1.05])
    assert got.indices == (10, 10, 59, 10)
    assert [number_of(f) for f in got.images] == [10, 10, 59, 10]


def test_a_variable_rate_is_sampled_by_time():
    # 30 frames in the first second, then one frame a second for 30 seconds.
    pts = [i * 33 for i in range(30)] + [1000 * (i + 1) for i in range(30)]
    got = load_frames(clip("matroska", count=60, pts=pts, rate=30), fps=1.0)
    assert got.times == pytest.approx([float(i) for i in range(31)], abs=0.04)
    assert [number_of(f) for f in got.images] == list(got.indices)
    assert len(got.indices) == 31


def rotated(data: bytes, quarter_turns_clockwise: int) -> bytes:
    """An MP4 whose track header asks players to turn the picture (ISO 14496-12, tkhd matrix)."""
    one = 1 << 16
    matrix = {
        1: (0, one, 0, -one, 0, 0, HEIGHT << 16, 0, 1 << 30),
        2: (-one, 0, 0, 0, -one, 0, WIDTH << 16, HEIGHT << 16, 1 << 30),
        3: (0, -one, 0, one, 0, 0, 0, WIDTH << 16, 1 << 30),
    }[quarter_turns_clockwise]
    at = data.index(b"tkhd") + 4
    assert data[at] == 0  # version
    start = at + 4 + 20 + 16  # flags; times, id and duration; layer, group, volume
    raw = b"".join(v.to_bytes(4, "big", signed=True) for v in matrix)
    return data[:start] + raw + data[start + 36 :]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_of_the_file_is_applied(turns):
    data = clip(count=5)
    plain = load_frames(data, timestamps=[0.4]).images[0]
    assert not np.array_equal(plain, np.rot90(plain, 2))
    turned = load_frames(rotated(data, turns), timestamps=[0.4])
    np.testing.assert_array_equal(turned.images[0], np.rot90(plain, -turns))
    assert turned.info is not None
    assert turned.info.rotation == (-90 * turns) % 360
    assert (turned.info.height, turned.info.width) == turned.images[0].shape[:2]


def test_frames_are_handed_on_one_by_one():
    alive, most = 0, 0

    def shrink(pixels):
        nonlocal alive, most

        def gone():
            nonlocal alive
            alive -= 1

        alive += 1
        most = max(most, alive)
        weakref.finalize(pixels, gone)
        return pixels[::8, ::8].copy()

    got = load_frames(clip(), frames=20, transform=shrink)
    assert got.images.shape == (20, HEIGHT // 8, WIDTH // 8, 3)
    assert most <= 2


def test_progress_counts_to_the_end():
    seen = []
    load_frames(clip(), frames=5, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 5) for i in range(5)]


def test_probe_tells_what_a_file_holds():
    info = probe(clip(count=30, rate=15))
    assert (info.frames, info.fps, info.duration) == (30, 15.0, 2.0)
    assert (info.width, info.height, info.codec) == (WIDTH, HEIGHT, "h264")


# --- Files that are not right ---------------------------------------------------------------


def audio_only() -> bytes:
    av = pytest.importorskip("av")
    target = io.BytesIO()
    with av.open(target, "w", format="wav") as out:
        stream = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return target.getvalue()


def test_audio_only_files_are_named_as_such():
    with pytest.raises(InvalidArgument, match="no video stream.*audio"):
        load_frames(audio_only())


def test_a_clip_without_frames_is_refused():
    av = pytest.importorskip("av")
    target = io.BytesIO()
    with av.open(target, "w", format="avi") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        out.mux(stream.encode(None))
        out.start_encoding()
    with pytest.raises(InvalidArgument):
        load_frames(target.getvalue())


@pytest.mark.parametrize("data", [b"", b"\0" * 4096, b"not a video at all" * 100, b"RIFF"])
def test_garbage_is_refused_with_a_code(data):
    pytest.importorskip("av")
    with pytest.raises(InvalidArgument, match="video data"):
        load_frames(data)


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_truncated_files_give_the_frames_that_are_there_or_an_error(container):
    data = clip(container, count=40, options={"g": "8"})
    for keep in range(0, len(data), max(1, len(data) // 12)):
        try:
            got = load_frames(data[:keep], frames=8)
        except FramequiltError:
            continue
        # Frames that others refer to come first in a file, so a frame between may be lost.
        shown = [number_of(f) for f in got.images]
        assert shown == sorted(set(shown)) and shown[0] == 0
        assert all(n >= i for n, i in zip(shown, got.indices, strict=True))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_damaged_files_never_crash_or_raise_anything_else(data):
    pytest.importorskip("av")
    raw = bytearray(CACHE.setdefault("clip", clip("mp4", count=24, options={"g": "8"})))
    for _ in range(data.draw(st.integers(1, 12))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        got = load_frames(bytes(raw), frames=6)
    except FramequiltError as error:
        assert error.message
    else:
        assert 1 <= len(got) <= 6


CACHE: dict[str, bytes] = {}


@pytest.mark.parametrize(
    "name,text",
    [
        ("clip.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\n{}\n#EXT-X-ENDLIST\n"),
        ("clip.mp4", "ffconcat version 1.0\nfile '{}'\n"),
    ],
    ids=["hls", "concat"],
)
def test_playlists_cannot_reach_other_files(tmp_path, name, text):
    av = pytest.importorskip("av")
    (tmp_path / "secret.ts").write_bytes(clip("mpegts"))
    path = tmp_path / name
    path.write_text(text.format("secret.ts"))
    with av.open(str(path)) as trusting:  # the danger is real
        assert next(trusting.decode(video=0)).width == WIDTH
    with pytest.raises(InvalidArgument):
        load_frames(path)


def test_frames_that_an_edit_list_cuts_off_are_not_there():
    data = bytearray(clip(count=30, options={"g": "10", "bf": "0"}))
    at = data.index(b"elst") + 4
    assert data[at] == 0 and int.from_bytes(data[at + 4 : at + 8], "big") == 1
    start = at + 12  # version and flags, count, duration
    scale = data.index(b"mdhd") + 4 + 12
    ticks = int.from_bytes(data[scale : scale + 4], "big") // 10  # of one frame
    before = int.from_bytes(data[start : start + 4], "big")
    data[start : start + 4] = (before + 4 * ticks).to_bytes(4, "big")
    got = load_frames(bytes(data), frames=3)
    assert got.info is not None and got.info.frames == 26
    assert [number_of(f) for f in got.images] == [i + 4 for i in got.indices]


def test_missing_files_and_addresses_are_refused(tmp_path):
    pytest.importorskip("av")
    with pytest.raises(NotFound):
        load_frames(tmp_path / "none.mp4")
    with pytest.raises(NotFound):
        load_frames(tmp_path)
    with pytest.raises(InvalidArgument) as caught:
        load_frames("https://example.com/clip.mp4")
    assert "download" in caught.value.hint


def test_without_pyav_the_error_says_what_to_install(monkeypatch, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(Unsupported) as caught:
        load_frames(path)
    assert "pip install 'framequilt[video]'" in caught.value.hint


# --- Frames that are given ---------------------------------------------------------------------


def test_arrays_and_pictures_are_taken_as_they_are():
    stack = np.stack([picture(i) for i in range(6)])
    for given_frames in (stack, list(stack), [Image.fromarray(f) for f in stack]):
        got = load_frames(given_frames)
        np.testing.assert_array_equal(got.images, stack)
        assert got.times == (0, 1, 2, 3, 4, 5) and got.duration == 6


def test_given_frames_keep_their_times_when_thinned():
    stack = np.stack([picture(i) for i in range(9)])
    got = load_frames(stack, timestamps=[0.5 * i for i in range(9)], frames=3)
    assert got.indices == (0, 4, 8) and got.times == (0.0, 2.0, 4.0)
    assert load_frames(stack, fps=2.0).duration == 4.5


def test_frames_pass_through():
    got = load_frames(np.stack([picture(i) for i in range(3)]))
    assert load_frames(got) is got
    assert isinstance(got, Frames) and len(got) == 3
    for options in ({"frames": 2}, {"fps": 1.0}, {"timestamps": [0.0, 1.0, 2.0]}):
        with pytest.raises(InvalidArgument, match="picked already"):
            load_frames(got, **options)


@pytest.mark.parametrize(
    "source",
    [
        [],
        np.zeros((0, 4, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((2, 3, 4, 5), np.uint8),
        np.zeros((2, 0, 4, 3), np.uint8),
        ["a.png"],
        [np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)],
        12,
    ],
)
def test_frames_of_the_wrong_form_are_refused(source):
    with pytest.raises(InvalidArgument):
        load_frames(source)


@pytest.mark.parametrize(
    "options",
    [
        {"frames": 0},
        {"fps": 0.0},
        {"fps": float("nan")},
        {"timestamps": []},
        {"timestamps": [-1.0, 0.0]},
        {"timestamps": [1.0]},
        {"timestamps": [1.0, 0.0]},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(InvalidArgument):
        load_frames(np.stack([picture(0), picture(1)]), **options)
