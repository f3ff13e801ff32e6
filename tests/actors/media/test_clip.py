"""Frames of a clip by either library, and every broken file an ordinary error."""

from __future__ import annotations

import importlib.util
import io
import os
import random
import re
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from tests.actors.edge.encoded_images import save
from tests.clips import make_clip, make_sound, turned
from tests.pictures import noise
from vlmrt.actors.media import av_reader, decord_reader
from vlmrt.actors.media.av_reader import AvReader, find_out
from vlmrt.actors.media.clip import Clip, reader_words
from vlmrt.actors.media.clip_errors import Deadline
from vlmrt.actors.media.decord_reader import DecordUnusable
from vlmrt.actors.media.open_clips import OpenClips
from vlmrt.actors.media.resize import Pixels
from vlmrt.runtime.config import VideoOptions
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.frame_list import pack_frames
from vlmrt.runtime.messages import ClipInfo

CLIP = make_clip()
BY_DECORD, BY_AV = VideoOptions(reader="decord"), VideoOptions(reader="av")
INDICES = (0, 3, 4, 11, 17, 28)

# what both libraries read alike, to the bit
SHARED: dict[str, dict[str, Any]] = {
    "h264": {},
    "b frames": {"options": {"bf": "3", "g": "10"}},
    "odd sizes": {"width": 162, "height": 98},
    "matroska": {"container": "matroska"},
    "flv": {"container": "flv"},
    "mpeg4": {"codec": "mpeg4"},
    "motion jpeg": {"container": "matroska", "codec": "mjpeg", "pixel_format": "yuvj420p"},
    "vp9": {"container": "webm", "codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "full chroma": {"pixel_format": "yuv444p"},
    "full range": {"pixel_format": "yuvj420p"},
    "varying rate": {"varying": True},
    "with sound": {"sound": True},
    "short": {"num_frames": 1},
}


def shown(data: bytes) -> Pixels:
    """All frames, one after the other."""
    with av.open(io.BytesIO(data)) as opened:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)])


def header_first(data: bytes, folder: Path) -> bytes:
    """An MP4 clip of which frames are missing once its end is."""
    file = folder / "fast.mp4"
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", options={"movflags": "faststart"}) as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    return file.read_bytes()


def refused(data: bytes, options: VideoOptions | None = None) -> RequestError:
    with pytest.raises(RequestError) as error:
        Clip(data, options or VideoOptions())
    assert error.value.status == 400
    return error.value


@pytest.mark.parametrize("name", SHARED)
def test_both_libraries_read_the_same_frames(name: str) -> None:
    data = make_clip(**SHARED[name])
    expected = shown(data)
    indices = [index for index in INDICES if index < len(expected)]
    for options in (BY_DECORD, BY_AV):
        clip = Clip(data, options)
        assert clip.info.num_frames == len(expected)
        np.testing.assert_array_equal(np.stack(clip.read(indices)), expected[indices])
        assert clip.reader_name == options.reader
        clip.close()


@pytest.mark.parametrize(
    "kind",
    [
        {"container": "mpegts"},
        {"container": "avi", "codec": "mpeg4"},
        {"container": "avi", "codec": "mjpeg", "pixel_format": "yuvj420p"},
        {"codec": "libsvtav1", "options": {"preset": "12"}},
    ],
)
def test_what_decord_is_not_for_pyav_reads(kind: dict[str, Any]) -> None:
    """SVT-AV1 makes the thread that opens its encoder a real-time one where it may, and so all that it starts later: a
    browser was, and nothing else ran.  So clips are made in a thread that ends."""
    with ThreadPoolExecutor(1) as apart:
        data = apart.submit(make_clip, **kind).result()
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    clip = Clip(data, VideoOptions())
    np.testing.assert_array_equal(np.stack(clip.read(INDICES)), shown(data)[list(INDICES)])
    assert clip.reader_name == "av"
    with pytest.raises(RequestError, match="decord does not read it"):
        Clip(data, BY_DECORD).read(INDICES)


def test_where_decord_is_not_installed_pyav_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    clip = Clip(CLIP, VideoOptions())
    clip.read([0])
    assert clip.reader_name == "av"


def test_a_clip_that_decord_gives_up_halfway_is_read_on_by_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = Clip(CLIP, VideoOptions())
    clip.read([0, 1])

    def fail(*_: Any) -> None:
        raise DecordUnusable("DECORDError")

    monkeypatch.setattr(decord_reader.DecordReader, "read", fail)
    np.testing.assert_array_equal(clip.read([20])[0], shown(CLIP)[20])
    monkeypatch.undo()
    clip.read([21])
    assert clip.reader_name == "av"  # once and for all


def test_decord_is_not_given_a_clip_that_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one with so few frames missing that it is read: it may end the process."""
    opened: list[int] = []

    def open_decord(self: object, encoded: bytes, num_frames: int) -> None:
        opened.append(num_frames)
        raise DecordUnusable("opened")

    monkeypatch.setattr(decord_reader.DecordReader, "__init__", open_decord)
    cut = header_first(CLIP, tmp_path)[:-700]
    clip = Clip(cut, VideoOptions())
    assert clip.info.num_frames == 29
    clip.read([0, 28])
    assert (clip.reader_name, opened) == ("av", [])
    Clip(CLIP, VideoOptions()).read([0])
    assert opened == [30]


def test_the_log_names_what_reads_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [reader_words(options) for options in (BY_DECORD, BY_AV)] == ["decord alone", "PyAV alone"]
    assert reader_words(VideoOptions()) == "decord, and by PyAV where it fails"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in reader_words(VideoOptions())


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_frames_are_turned_as_the_file_says(degrees: int) -> None:
    data = turned(CLIP, degrees)
    expected = np.rot90(shown(CLIP)[[5, 9]], -degrees // 90, axes=(1, 2))
    for options in (BY_DECORD, BY_AV):
        clip = Clip(data, options)
        assert (clip.info.height, clip.info.width) == expected.shape[1:3]
        np.testing.assert_array_equal(np.stack(clip.read([5, 9])), expected)


@pytest.mark.parametrize("options", [BY_DECORD, BY_AV])
@pytest.mark.parametrize("kind", [{}, {"options": {"bf": "3", "g": "7"}}, {"container": "matroska", "codec": "mpeg4"}])
def test_frames_are_found_in_any_order(options: VideoOptions, kind: dict[str, Any]) -> None:
    data = make_clip(num_frames=40, **kind)
    expected = shown(data)
    clip = Clip(data, options)
    order = random.Random(0).sample(range(40), 40)
    for index in order:
        np.testing.assert_array_equal(clip.read([index])[0], expected[index])


def test_frames_far_apart_are_reached_through_key_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_clip(num_frames=120)
    options = BY_AV
    found = find_out(data, "mov", options, Deadline(30))
    assert len(found.key_times) == 10
    reader = AvReader(data, "mov", found, options)
    num_checks = 0

    def count(self: AvReader) -> None:
        nonlocal num_checks
        num_checks += 1

    monkeypatch.setattr(AvReader, "_check", count)
    reader.read([0, 115], Deadline(30))
    assert num_checks < 40


def test_a_probe_counts_and_measures() -> None:
    assert Clip(make_clip(fps=25), VideoOptions()).info == ClipInfo(160, 96, 30, 25.0, 1.2)
    varying = Clip(make_clip(varying=True, container="matroska"), VideoOptions()).info
    assert varying.num_frames == 30
    alone = Clip(make_clip(num_frames=1), VideoOptions()).info
    assert (alone.num_frames, alone.fps > 0) == (1, True)


# ---------------------------------------------------------------- what is wrong with a file


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"\x00" * 300, "known format"),
        (b"hello", "known format"),
        (b"#EXTM3U\nfile:///etc/passwd\n", "known format"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "known format"),
        (save(noise(40, 30, 0), "PNG"), r"picture \(PNG\)"),
        (save(noise(40, 30, 0), "JPEG"), r"picture \(JPEG\)"),
        (save(noise(40, 30, 0), "WEBP"), r"picture \(WebP\)"),
        (save(noise(40, 30, 0).convert("P"), "GIF"), r"picture \(GIF\)"),
        (make_sound(), "only sound"),
        (b"ID3\x04" + bytes(200), r"sound without pictures \(MP3\)"),
        (CLIP[: len(CLIP) // 2], "broken or cut off"),
        (CLIP[:40], "broken or cut off"),
    ],
)
def test_what_is_no_clip_is_refused_by_name(data: bytes, words: str) -> None:
    assert re.search(words, refused(data).message)


def test_a_clip_that_is_cut_off_behind_its_header_is_refused(tmp_path: Path) -> None:
    whole = header_first(CLIP, tmp_path)
    assert Clip(whole, VideoOptions()).info.num_frames == 30
    assert "its header counts 30 frames" in refused(whole[: len(whole) // 2]).message


def test_a_header_that_lies_about_its_frames_is_refused() -> None:
    avi = make_clip(container="avi", codec="mpeg4")
    lie = avi.replace(struct.pack("<I", 30), struct.pack("<I", 10**9))
    assert lie != avi
    problem = refused(lie)
    assert problem.code in ("invalid_video", "video_too_large")


def test_limits_are_named() -> None:
    for options, words in (
        (VideoOptions(max_duration_s=0.5), "more than 0.5 seconds"),
        (VideoOptions(max_file_frames=20), "more than 20 frames"),
        (VideoOptions(max_frame_pixels=10_000), "more than 10000 pixels in a frame"),
    ):
        problem = refused(CLIP, options)
        assert words in problem.message
        assert problem.code == "video_too_large"


def test_a_rate_of_nothing_is_measured_from_the_frames_times(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_out(CLIP, "mov", VideoOptions(), Deadline(30))
    assert av_reader._measured_fps(found.times, 1 / 15360) == pytest.approx(30)
    assert av_reader._measured_fps((5, 5), 1.0) == 0.0


@pytest.mark.parametrize("fps", [0.0, float("nan"), float("inf"), 1e9])
def test_a_rate_that_cannot_be_is_refused(fps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmrt.actors.media import clip

    found = find_out(CLIP, "mov", VideoOptions(), Deadline(30))
    monkeypatch.setattr(clip, "find_out", lambda *_: found._replace(fps=fps))
    assert "frame rate" in refused(CLIP).message


def test_a_decode_that_takes_too_long_is_refused_and_the_clip_can_be_read_again() -> None:
    data = make_clip(num_frames=60)
    clip = Clip(data, BY_AV)
    reader = AvReader(data, "mov", clip._found, BY_AV)
    with pytest.raises(RequestError) as slow:
        reader.read([50], Deadline(0.0))
    assert (slow.value.status, slow.value.code) == (400, "video_too_slow")
    np.testing.assert_array_equal(reader.read([50], Deadline(30))[0], shown(data)[50])


def test_a_frame_that_is_not_there_is_refused() -> None:
    clip = Clip(CLIP, VideoOptions())
    for index in (30, 10**9):
        with pytest.raises(RequestError, match="has 30 frames"):
            clip.read([0, index])


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi", "mpegts", "flv"])
@pytest.mark.parametrize("options", [VideoOptions(), BY_AV])
def test_broken_files_are_errors_that_quote_nothing(container: str, options: VideoOptions) -> None:
    whole = make_clip(80, 64, 12, container=container)
    rng = random.Random(container)
    for trial in range(20):
        data = bytearray(whole[: rng.randrange(len(whole))] if trial % 2 else whole)
        for _ in range(rng.randrange(1, 12)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        outcome = outcome_of(bytes(data), options)
        if isinstance(outcome, RequestError):
            assert outcome.status in (400, 503)
            said = outcome.message.replace("MP4/MOV", "").replace("MPEG-TS/PS", "").replace("Matroska/WebM", "")
            assert not re.search(r"\b0x[0-9a-f]{6}|/|object at", said)
        else:
            assert [frame.shape for frame in outcome] == [(*outcome[0].shape[:2], 3)] * 2


def outcome_of(data: bytes, options: VideoOptions) -> list[Pixels] | RequestError:
    try:
        clip = Clip(data, options)
        return clip.read([0, clip.info.num_frames - 1])
    except RequestError as error:
        return error


def test_a_header_that_promises_more_memory_than_there_may_be_fails_alone(tmp_path: Path) -> None:
    """Sample sizes that are all one size need no table, so a short file can name 100 million samples."""
    lie = bytearray(CLIP)
    sizes = lie.index(b"stsz")
    lie[sizes + 8 : sizes + 16] = struct.pack(">II", 1, 100_000_000)
    chunks = lie.index(b"stsc")
    lie[chunks + 16 : chunks + 20] = struct.pack(">I", 100_000_000)
    (tmp_path / "lie.mp4").write_bytes(lie)
    (tmp_path / "whole.mp4").write_bytes(CLIP)
    script = f"""
import re
from pathlib import Path
from vlmrt.actors.media.clip import Clip, reader_words
from vlmrt.actors.media.memory_limit import limit_memory
from vlmrt.runtime.config import VideoOptions
from vlmrt.runtime.errors import RequestError
from vlmrt.runtime.frame_list import pack_frames
Clip(Path({str(tmp_path / "whole.mp4")!r}).read_bytes(), VideoOptions()).read([0])
limit_memory(512 << 20)
try:
    Clip(Path({str(tmp_path / "lie.mp4")!r}).read_bytes(), VideoOptions())
    raise SystemExit("not refused")
except RequestError as error:
    assert error.status == 400, error.message
peak_kib = re.search(r"VmHWM:\\s*([0-9]+) kB", Path("/proc/self/status").read_text())[1]
assert int(peak_kib) < 900 << 10  # getrusage would count what the parent of this process has
assert Clip(Path({str(tmp_path / "whole.mp4")!r}).read_bytes(), VideoOptions()).info.num_frames == 30
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- pictures sent as a clip


def test_pictures_are_the_frames_of_a_clip() -> None:
    pictures = [noise(60, 40, seed) for seed in range(5)]
    data = pack_frames(
        [save(picture, kind) for picture, kind in zip(pictures, ("PNG", "BMP", "PNG", "WEBP", "PNG"), strict=True)]
    )
    clip = Clip(data, VideoOptions())
    assert clip.info == ClipInfo(60, 40, 5, 2.0, 2.5)
    read = clip.read([0, 4, 1])
    for frame, picture in zip(read, (pictures[0], pictures[4], pictures[1]), strict=True):
        np.testing.assert_array_equal(frame, np.asarray(picture))
    assert clip.reader_name == "pillow"


def test_a_turned_first_picture_gives_the_clip_its_upright_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = pack_frames([save(noise(60, 40, seed), "JPEG", exif=exif) for seed in range(2)])
    clip = Clip(data, VideoOptions())
    assert (clip.info.width, clip.info.height) == (40, 60)
    assert clip.read([1])[0].shape == (60, 40, 3)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pack_frames([]), "no frames"),
        (pack_frames([b"x" * 50]), "not a picture"),
        (pack_frames([save(noise(60, 40, 0), "PNG")])[:-1], "promised"),
        (pack_frames([b""])[:10], "breaks off"),
        (pack_frames([b""])[:8] + struct.pack("<I", 2**32 - 1), "do not fit"),
    ],
)
def test_broken_lists_of_pictures_are_refused(data: bytes, words: str) -> None:
    assert words in refused(data).message


def test_a_broken_picture_or_one_of_another_size_is_named() -> None:
    whole, other = save(noise(60, 40, 0), "PNG"), save(noise(40, 60, 0), "PNG")
    for second in (whole[:100], other, b""):
        clip = Clip(pack_frames([whole, second]), VideoOptions())
        with pytest.raises(RequestError, match="frame 1 of the video") as error:
            clip.read([0, 1])
        assert error.value.status == 400


# ---------------------------------------------------------------- clips kept open


def test_a_clip_is_opened_once_for_as_long_as_there_is_room() -> None:
    clips = OpenClips(VideoOptions())
    with clips.use(CLIP) as first:
        first.read([0])
    with clips.use(bytes(bytearray(CLIP))) as again:
        assert again is first
        with clips.use(CLIP) as beside:
            assert beside is not first
    clips.close()


def test_the_clip_used_last_stays_open() -> None:
    others = [make_clip(64, 48, 4, seed=seed) for seed in range(12)]
    clips = OpenClips(VideoOptions())
    opened = {}
    for data in others:
        with clips.use(data) as clip:
            opened[data] = clip
    with clips.use(others[-1]) as last:
        assert last is opened[others[-1]]
    with clips.use(others[0]) as oldest:
        assert oldest is not opened[others[0]]
    small = OpenClips(VideoOptions(open_mib=0))
    with small.use(CLIP) as clip:
        clip.read([0])
    assert clip.reader_name == ""  # closed, for want of room
    clips.close()


def test_a_clip_that_failed_is_not_kept() -> None:
    clips = OpenClips(VideoOptions())
    with pytest.raises(RequestError), clips.use(CLIP) as failed:
        failed.read([99])
    with clips.use(CLIP) as again:
        assert again is not failed
