from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
from av.video.stream import VideoStream

from rlvid.config import VideoConfig
from rlvid.errors import BadClip
from rlvid.types import Medium
from rlvid.video import pyav_reader
from rlvid.video.container_check import is_joined, missing_bytes
from tests.video.media import DATA, Frames, needs_data, write_video

FASTSTART = {"movflags": "faststart"}


@pytest.mark.parametrize(
    ("name", "codec", "mux"),
    [
        ("a.mp4", "libx264", FASTSTART),
        ("a.mkv", "libx264", {}),
        ("a.webm", "libvpx-vp9", {}),
        ("a.avi", "mpeg4", {}),
    ],
)
def test_every_cut_is_measured(tmp_path: Path, name: str, codec: str, mux: dict[str, str]) -> None:
    path = write_video(tmp_path / name, codec=codec, mux=mux)
    assert missing_bytes(str(path)) == 0
    whole = path.read_bytes()
    for cut in (1, 100, len(whole) // 3):
        path.write_bytes(whole[:-cut])
        assert missing_bytes(str(path)) == cut


def test_a_cut_fragment_is_seen(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", mux={"movflags": "frag_keyframe+empty_moov"}, options={"g": "10"})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    assert missing_bytes(str(path)) > 0


@pytest.mark.parametrize("name", ["a.ts", "a.gif"])
def test_formats_that_do_not_state_a_length_pass(tmp_path: Path, name: str) -> None:
    gif = name.endswith("gif")
    path = write_video(tmp_path / name, codec="gif" if gif else "libx264", pix_fmt="rgb8" if gif else "yuv420p")
    path.write_bytes(path.read_bytes()[:-500])
    assert missing_bytes(str(path)) == 0


@pytest.mark.parametrize("junk", [b"appended", bytes(3), bytes(64), b"\xff" * 64])
def test_junk_after_the_end_is_no_cut(tmp_path: Path, junk: bytes) -> None:
    path = write_video(tmp_path / "a.mp4", mux=FASTSTART)
    path.write_bytes(path.read_bytes() + junk)
    assert missing_bytes(str(path)) == 0


@pytest.mark.parametrize("content", [b"", b"RIFF", b"text", b"\x1a\x45\xdf\xa3", b"\x1a\x45\xdf\xa3\x00", bytes(100)])
def test_nonsense_is_left_to_the_reader(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    assert missing_bytes(str(path)) in (0, 4)  # "RIFF" alone announces a chunk of size 0


def test_live_matroska_without_a_size_passes(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", mux={"live": "1"})
    path.write_bytes(path.read_bytes()[:-100])
    assert missing_bytes(str(path)) == 0


@needs_data
def test_real_files_are_whole() -> None:
    files = [p for folder in ("clips", "videoscore/gifs", "videoscore/example") for p in (DATA / folder).iterdir()]
    assert len(files) > 10
    assert {path.name: missing_bytes(str(path)) for path in files if missing_bytes(str(path))} == {}


def noisy(path: Path, codec: str, options: dict[str, str], seed: int) -> list[Frames]:
    """Write 24 frames of moving noise, so that each takes several packets of a transport stream; return those read."""
    rng = np.random.default_rng(seed)
    ground = rng.integers(30, 225, (12, 16, 3)).repeat(12, 0).repeat(12, 1)
    with av.open(str(path), "w") as container:
        stream = cast(VideoStream, container.add_stream(codec, rate=25, options={"threads": "1"} | options))
        stream.width, stream.height, stream.pix_fmt = 192, 144, "yuv420p"
        for number in range(24):
            picture = np.roll(ground, 5 * number, 1) + rng.integers(-25, 25, ground.shape)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        small = (f.reformat(196, 140, "rgb24", interpolation="BICUBIC") for f in container.decode(video=0))
        return [frame.to_ndarray() for frame in small]


@pytest.fixture(params=["h264", "hevc", "mpeg2"], scope="module")
def recordings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[bytes], Any]:
    """Bytes and frames of two transport streams."""
    codec, options = {
        "h264": ("libx264", {"g": "8", "bf": "2"}),
        "hevc": ("libx265", {"x265-params": "log-level=none:keyint=8:min-keyint=8:scenecut=0"}),
        "mpeg2": ("mpeg2video", {"g": "8", "bf": "2"}),
    }[request.param]
    path = tmp_path_factory.mktemp("ts") / "a.ts"
    frames: list[Frames] = []
    data = []
    for seed in (0, 1):
        frames += noisy(path, codec, options, seed)
        data.append(path.read_bytes())
    return data, frames


def test_joined_transport_streams_are_read_whole(tmp_path: Path, recordings: tuple[list[bytes], Any]) -> None:
    (first, second), frames = recordings
    path = tmp_path / "joined.ts"
    for data, expected in ((first + second, frames), (first + second + first, frames + frames[:24])):
        path.write_bytes(data)
        read = pyav_reader.read_frames(Medium(str(path)), VideoConfig(frames=len(expected), height=140, width=196), 28)
        assert read.n_frames == len(expected)
        np.testing.assert_array_equal(read.frames, np.stack(expected))
        np.testing.assert_allclose(read.pts_s, np.arange(len(expected)) / 25, atol=1e-6)


def test_lost_packets_are_not_taken_for_a_joint(tmp_path: Path, recordings: tuple[list[bytes], Any]) -> None:
    (first, second), _ = recordings
    path = tmp_path / "lost.ts"
    n = len(first) // 188
    pid = 256  # of FFmpeg's first stream
    for lost in range(6, n - 1):
        path.write_bytes(first[: 188 * lost] + first[188 * (lost + 1) :])
        assert not is_joined(str(path), pid)
    path.write_bytes(first[: 188 * (n // 2)] + first[188 * (n // 2 + 1) :] + second)
    assert not is_joined(str(path), pid)
    with pytest.raises(BadClip, match="damaged"):
        pyav_reader.read_frames(Medium(str(path)), VideoConfig(), 28)


@pytest.mark.parametrize("length", [0, 0xFFFFFFFF, 0x7FFFFFFF])
@pytest.mark.parametrize("list_length", [None, 0, 0xFFFFFFFF])
def test_avi_with_a_wrong_length_but_whole_packets_passes(tmp_path: Path, length: int, list_length: int | None) -> None:
    path = write_video(tmp_path / "a.avi", codec="mpeg4", options={"bf": "2"})
    data = bytearray(path.read_bytes())
    data[4:8] = length.to_bytes(4, "little")
    if list_length is not None:  # a recorder that cannot seek leaves both, and writes no index
        at = data.index(b"movi") - 4
        data[at : at + 4] = list_length.to_bytes(4, "little")
        del data[data.rindex(b"idx1") :]
    path.write_bytes(data)
    assert missing_bytes(str(path)) == 0
    assert pyav_reader.read_frames(Medium(str(path)), VideoConfig(), 28).n_frames == 30
    path.write_bytes(data[:-700])
    with pytest.raises(BadClip):
        if missing := missing_bytes(str(path)):
            raise BadClip(str(path), f"{missing}")
        pyav_reader.read_frames(Medium(str(path)), VideoConfig(), 28)


def test_second_chunk_of_a_large_avi_is_checked(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", codec="mpeg4")
    whole = path.read_bytes() + b"RIFF" + bytes([16, 0, 0, 0]) + b"AVIX" + b"LIST" + bytes([4, 0, 0, 0]) + b"movi"
    path.write_bytes(whole)
    assert missing_bytes(str(path)) == 0
    path.write_bytes(whole[:-2])
    assert missing_bytes(str(path)) == 2
