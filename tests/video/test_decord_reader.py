from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlvid.errors import BadClip
from rlvid.types import Medium
from rlvid.video import pyav_reader
from tests.video.media import TURNS, read_numbers, set_matrix, video_config, write_sound, write_video

decord_reader = pytest.importorskip("rlvid.video.decord_reader", reason="decord is not installed", exc_type=ImportError)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("keys", [{}, {"sampling": "fps", "fps": 2.0}, {"height": None, "width": None}])
def test_agrees_with_the_default_reader_on_plain_files(tmp_path: Path, name: str, keys: dict[str, Any]) -> None:
    path = str(write_video(tmp_path / name, options={"g": "12", "bf": "2"}))
    ours = pyav_reader.read_frames(Medium(path), video_config(**keys), 28)
    theirs = decord_reader.read_frames(Medium(path), video_config(**keys), 28)
    assert theirs.indices.tolist() == ours.indices.tolist() == read_numbers(theirs.frames)
    assert theirs.frames.shape == ours.frames.shape and theirs.frames.dtype == np.uint8
    assert (theirs.n_frames, theirs.fps) == (ours.n_frames, pytest.approx(ours.fps, rel=1e-3))
    np.testing.assert_allclose(theirs.pts_s, ours.pts_s, atol=2e-3)
    assert np.abs(theirs.frames.astype(int) - ours.frames).mean() < 4.0


def test_rotation_is_applied(tmp_path: Path) -> None:
    path = str(set_matrix(write_video(tmp_path / "a.mp4"), TURNS[90]))
    video = video_config(height=None, width=None)
    ours, theirs = pyav_reader.read_frames(Medium(path), video, 28), decord_reader.read_frames(Medium(path), video, 28)
    assert theirs.frames.shape == ours.frames.shape
    assert np.abs(theirs.frames.astype(int) - ours.frames).mean() < 4.0


def test_useless_times_are_replaced(tmp_path: Path) -> None:
    path = str(write_video(tmp_path / "a.avi", codec="mpeg4", options={"bf": "2"}))
    decoded = decord_reader.read_frames(Medium(path), video_config(), 28)
    np.testing.assert_allclose(decoded.pts_s, np.array([0, 4, 8, 12, 16, 20, 24, 29]) / 10)
    assert decoded.fps == pytest.approx(10.0)


def test_bad_files_are_bad_clips(tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_bytes(b"hello\n" * 100)
    gif = write_video(tmp_path / "a.gif", codec="gif", pix_fmt="rgb8")  # decord cannot read GIF
    for path in (text, tmp_path / "missing.mp4", write_sound(tmp_path / "sound.mp4"), gif):
        with pytest.raises(BadClip) as caught:
            decord_reader.read_frames(Medium(str(path)), video_config(), 28)
        assert "/src/" not in caught.value.reason and "\n" not in caught.value.reason


def test_playlists_do_not_open_other_files(tmp_path: Path) -> None:
    write_video(tmp_path / "secret.ts")
    path = tmp_path / "a.mp4"
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(BadClip):
        decord_reader.read_frames(Medium(str(path)), video_config(), 28)
