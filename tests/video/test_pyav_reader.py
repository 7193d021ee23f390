from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.frame import VideoFrame

from rlvid.errors import BadClip
from rlvid.types import Medium
from rlvid.video import pyav_reader
from rlvid.video.pyav_reader import DecodedFrames
from tests.video.media import TURNS, painted, read_numbers, set_matrix, video_config, write_sound, write_video

B_FRAMES = {"g": "12", "bf": "2"}
OPEN_GOP = {"g": "12", "bf": "3", "x264-params": "open-gop=1:b-adapt=0:scenecut=0"}
EVENLY = [0, 4, 8, 12, 16, 20, 24, 29]  # 8 of 30


def read(path: Path, **keys: Any) -> DecodedFrames:
    return pyav_reader.read_frames(Medium(str(path)), video_config(**keys), 28)


@pytest.fixture
def in_order_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths that were decoded from beginning to end."""
    paths: list[str] = []
    read_in_order = pyav_reader._read_in_order

    def record(wanted: Any) -> DecodedFrames:
        paths.append(wanted.medium.path)
        return read_in_order(wanted)

    monkeypatch.setattr(pyav_reader, "_read_in_order", record)
    return paths


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("h264.mp4", {"options": B_FRAMES}),
        ("h264.mov", {"options": B_FRAMES}),
        ("h264.mkv", {"options": B_FRAMES}),
        ("open_gop.mp4", {"options": OPEN_GOP}),
        ("fragmented.mp4", {"options": B_FRAMES, "mux": {"movflags": "frag_keyframe+empty_moov"}}),
        ("ten_bit.mp4", {"options": B_FRAMES, "pix_fmt": "yuv420p10le"}),
        ("hevc.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=10"}}),
        ("mpeg4.mp4", {"codec": "mpeg4", "options": B_FRAMES}),
        ("vp9.webm", {"codec": "libvpx-vp9", "options": {"g": "10", "cpu-used": "8"}}),
    ],
)
def test_seekable_files_give_the_right_frames_without_full_decode(
    tmp_path: Path, in_order_reads: list[str], name: str, keys: dict[str, Any]
) -> None:
    path = write_video(tmp_path / name, **keys)
    decoded = read(path)
    assert read_numbers(decoded.frames) == EVENLY == decoded.indices.tolist()
    assert decoded.n_frames == 30 and decoded.fps == pytest.approx(10.0)
    np.testing.assert_allclose(decoded.pts_s, np.array(EVENLY) / 10, atol=2e-3)
    assert in_order_reads == []


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("b_frames.avi", {"codec": "mpeg4", "options": B_FRAMES}),
        ("open_gop.ts", {"options": OPEN_GOP}),
        ("vp8.webm", {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}}),
        ("h264.flv", {"options": B_FRAMES}),
        ("mpeg2.mpg", {"codec": "mpeg2video", "rate": 25}),
        ("palette.gif", {"codec": "gif", "pix_fmt": "rgb8"}),
    ],
)
def test_other_files_are_decoded_in_order(
    tmp_path: Path, in_order_reads: list[str], name: str, keys: dict[str, Any]
) -> None:
    path = write_video(tmp_path / name, **keys)
    decoded = read(path)
    assert read_numbers(decoded.frames) == EVENLY == decoded.indices.tolist()
    assert decoded.n_frames == 30
    np.testing.assert_allclose(decoded.pts_s, np.array(EVENLY) / keys.get("rate", 10), atol=2e-3)
    assert in_order_reads == [str(path)]


@pytest.mark.parametrize("sampling", ["linspace", "mid_segment"])
@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv", "cut.ts"])
def test_file_that_starts_with_an_open_gop_is_counted_from_its_first_whole_frame(
    tmp_path: Path, in_order_reads: list[str], name: str, sampling: str
) -> None:
    # Packet 9 is the keyframe of number 12; the B-frames 9 to 11 after it lean on the group that was cut off: the file
    # holds 31 frames and can show 28. In MP4 they are before time 0 and hidden by an edit list.
    path = write_video(tmp_path / name, range(40), options=OPEN_GOP, skip_packets=9)
    decoded = read(path, sampling=sampling)
    assert decoded.n_frames == 28
    assert read_numbers(decoded.frames) == [12 + i for i in decoded.indices]
    assert in_order_reads == ([] if name == "cut.mp4" else [str(path)])


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Times of the frames that come out of the decoder."""
    times: list[int] = []
    intact = pyav_reader._intact

    def record(frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
        for frame in intact(frames):
            times.append(cast(int, frame.pts))
            yield frame

    monkeypatch.setattr(pyav_reader, "_intact", record)
    return times


@pytest.mark.parametrize(
    ("name", "keys", "leaves_out"),
    [
        ("h264.mp4", {"options": {"g": "60", "bf": "3"}}, True),
        ("h264.mkv", {"options": {"g": "20", "bf": "3", "x264-params": "weightp=2:ref=4"}}, True),
        ("open_gop.mp4", {"options": OPEN_GOP}, True),
        ("interlaced.mp4", {"options": {"g": "60", "bf": "3", "x264-params": "tff=1"}}, False),
        ("hevc.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none:bframes=4"}}, True),
        # In a stream of several temporal layers a picture that its own layer does not need may be needed by the next.
        ("layers.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none:temporal-layers=3"}}, False),
        ("vp9.webm", {"codec": "libvpx-vp9", "options": {"g": "60", "cpu-used": "8"}}, False),
        ("av1.mp4", {"codec": "libsvtav1", "options": {"preset": "12", "g": "60"}}, False),
    ],
)
def test_left_out_pictures_do_not_change_those_that_are_read(
    tmp_path: Path,
    decoded: list[int],
    in_order_reads: list[str],
    name: str,
    keys: dict[str, Any],
    leaves_out: bool,
) -> None:
    path = write_video(tmp_path / name, range(60), **keys)
    with av.open(str(path)) as container:
        whole = [frame.reformat(168, 84, "rgb24", interpolation="BICUBIC") for frame in container.decode(video=0)]
    for sampling, frames in (("linspace", 8), ("mid_segment", 8), ("mid_segment", 30), ("linspace", 2)):
        decoded.clear()
        clip = read(path, sampling=sampling, frames=frames)
        assert read_numbers(clip.frames) == clip.indices.tolist()
        np.testing.assert_array_equal(clip.frames, np.stack([whole[i].to_ndarray() for i in clip.indices]))
    assert (len(decoded) < 50) is leaves_out  # first and last frame
    assert in_order_reads == []


def test_nothing_is_decoded_after_the_last_wanted_frame(tmp_path: Path, decoded: list[int]) -> None:
    path = write_video(tmp_path / "a.mp4", range(60), options={"g": "60", "bf": "3"})
    assert read_numbers(read(path, sampling="first_seconds", seconds=2.0, frames=2).frames) == [0, 19]
    tick = 1024  # at 10 frames a second FFmpeg counts in 1/10240 s
    assert max(decoded) < 24 * tick  # at most the reference frames that 19 is made from


def test_frames_hidden_by_an_edit_list_do_not_count(tmp_path: Path) -> None:
    mux = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    decoded = read(write_video(tmp_path / "a.mp4", start=-5, options=B_FRAMES, mux=mux))
    assert decoded.n_frames == 25
    assert read_numbers(decoded.frames) == [5 + i for i in decoded.indices]


@pytest.mark.parametrize("name", ["vfr.mp4", "vfr.mkv"])
def test_variable_frame_rate_is_read_and_sampled_by_time(tmp_path: Path, name: str) -> None:
    times_ms = np.concatenate([[0], np.cumsum([20, 20, 20, 300, 20, 500] * 5)[:29]])
    path = write_video(tmp_path / name, times_ms=times_ms.tolist(), options=B_FRAMES)
    decoded = read(path)
    assert read_numbers(decoded.frames) == EVENLY
    np.testing.assert_allclose(decoded.pts_s, times_ms[EVENLY] / 1000, atol=1e-6)
    assert decoded.fps == pytest.approx(29_000 / times_ms[-1])
    by_time = read(path, sampling="fps", fps=2.0)
    assert read_numbers(by_time.frames) == by_time.indices.tolist()
    for wanted_s, index in zip(np.linspace(0, times_ms[-1] / 1000, len(by_time.indices)), by_time.indices, strict=True):
        assert abs(times_ms[index] / 1000 - wanted_s) == pytest.approx(np.abs(times_ms / 1000 - wanted_s).min())


@pytest.mark.parametrize(("degrees", "turns_back"), [(90, 1), (180, 2), (270, 3)])
def test_rotation_is_applied(tmp_path: Path, degrees: int, turns_back: int) -> None:
    path = set_matrix(write_video(tmp_path / "a.mp4"), TURNS[degrees])
    upright = read(write_video(tmp_path / "upright.mp4"), height=None, width=None)
    turned = read(path, height=None, width=None)
    shape = (8, 168, 84, 3) if degrees % 180 else (8, 84, 168, 3)
    assert turned.frames.shape == shape
    back = np.rot90(turned.frames, turns_back, axes=(1, 2))
    assert read_numbers(back) == EVENLY
    np.testing.assert_array_equal(back, upright.frames)


def test_rotation_with_a_fixed_size_gives_that_size(tmp_path: Path) -> None:
    path = set_matrix(write_video(tmp_path / "a.mp4"), TURNS[90])
    assert read(path, height=140, width=84).frames.shape == (8, 140, 84, 3)


def test_one_frame_is_repeated(tmp_path: Path) -> None:
    decoded = read(write_video(tmp_path / "a.mp4", [7]))
    assert read_numbers(decoded.frames) == [7] * 8
    assert decoded.indices.tolist() == [0] * 8 and decoded.pts_s.tolist() == [0.0] * 8
    assert decoded.n_frames == 1 and decoded.fps == 10.0


def test_fewer_frames_than_asked_repeat(tmp_path: Path) -> None:
    assert read_numbers(read(write_video(tmp_path / "a.mp4", range(3))).frames) == [0, 0, 0, 0, 1, 1, 1, 2]


def test_colours_are_right(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [0] * 4, options={"crf": "4"}, size=(168, 84))
    frames = read(path).frames.astype(int)
    off = np.abs(frames - painted(0, 168, 84))[:, 30:]  # without the sharp edge below the number
    assert off.mean() < 3.0 and off.max() < 24


def test_default_stream_is_taken_not_the_first(tmp_path: Path) -> None:
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=10) for _ in range(2)]
        for stream, (width, height) in zip(streams, [(32, 32), (320, 240)], strict=True):
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        streams[1].disposition = Disposition.default
        for number in range(10):
            for stream, shift in zip(streams, (100, 0), strict=True):
                frame = painted(number + shift, stream.width, stream.height)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    assert read_numbers(read(path, frames=2).frames) == [0, 9]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be opened"),
        (b"hello\n" * 100, "cannot be opened"),
        (np.random.default_rng(0).bytes(20_000), "cannot be opened"),
    ],
)
def test_what_is_no_video_is_bad(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(BadClip, match=reason) as caught:
        read(path)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("name", ["sound.mp4", "sound.mp3"])
def test_sound_only_is_bad(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadClip, match="has no video stream"):
        read(write_sound(tmp_path / name))


@pytest.mark.parametrize(
    "script", ["#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {}\n"]
)
def test_playlists_do_not_open_other_files(tmp_path: Path, script: str) -> None:
    write_video(tmp_path / "secret.ts")
    path = tmp_path / "a.mp4"
    path.write_text(script.format("secret.ts"))
    with pytest.raises(BadClip):
        read(path)


def test_mp4_without_index_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")  # the index is at the end
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadClip, match="cannot be opened: Invalid data"):
        read(path)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4")])
def test_damage_in_the_middle_is_refused(tmp_path: Path, name: str, codec: str) -> None:
    path = write_video(
        tmp_path / name, range(60), codec=codec, mux={"movflags": "faststart"} if name == "a.mp4" else {}
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 600] = np.random.default_rng(0).bytes(600)
    path.write_bytes(data)
    with pytest.raises(BadClip, match="damaged|cannot be decoded"):
        read(path, frames=32)


def test_slow_read_is_ended(tmp_path: Path) -> None:
    with pytest.raises(BadClip, match=r"longer than video\.timeout_s=1e-09 s"):
        read(write_video(tmp_path / "a.mp4"), timeout_s=1e-9)


def test_bad_files_leave_nothing_on_the_console(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_video(tmp_path / "a.mp4", range(60))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 600] = np.random.default_rng(0).bytes(600)
    path.write_bytes(data)
    capfd.readouterr()  # the encoder's
    with pytest.raises(BadClip):
        read(path, frames=32)
    assert capfd.readouterr() == ("", "")
