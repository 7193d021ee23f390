from __future__ import annotations

from pathlib import Path

import pytest

from rlvid.video.container_length import missing_bytes
from tests.video.media import DATA, needs_data, write_video

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
