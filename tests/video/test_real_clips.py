"""The readers on real files, against a plain decode of the whole file."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from rlvid.errors import BadClip
from rlvid.types import Clip, Medium
from rlvid.video.cache import FrameCache
from rlvid.video.clip_reader import ClipReader
from tests.video.media import DATA, needs_data, video_config

pytestmark = needs_data

N_FRAMES = {
    "clips/arm_wrestling_demo.mp4": 280,
    "clips/bikes.mp4": 250,
    "clips/carphone_pristine.mp4": 120,
    "clips/flipping_a_pancake.mkv": 310,
    "clips/llavanext_xU25MMA2N4aVtYay.mp4": 96,
    "clips/makeup_test.avi": 164,
    "clips/multimood_output_v_3V9tzjyr51I.mp4": 150,
    "clips/videollama2_sample_demo_3.mp4": 146,
    "decode_edge_cases/video_0.mov": 3,
    "videoscore/example/video1.mp4": 24,
    "videoscore/gifs/1005886.gif": 16,
    "videoscore/gifs/p005353.gif": 24,
}


def read(tmp_path: Path, name: str, **keys: object) -> Clip:
    video = video_config(height=None, width=None, **keys)
    return ClipReader(video, 28, FrameCache(tmp_path, 10**9)).read(Medium(str(DATA / name)))[0]


def decode_all(name: str, wanted: set[int], height: int, width: int) -> tuple[int, dict[int, npt.NDArray[np.uint8]]]:
    """Number of frames, and those wanted, of a decode from beginning to end without any index."""
    found: dict[int, npt.NDArray[np.uint8]] = {}
    n = 0
    with av.open(str(DATA / name)) as container:
        for frame in container.decode(video=0):
            if n in wanted:
                small = frame.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
                found[n] = small.astype(np.uint8, copy=False)
            n += 1
    return n, found


@pytest.mark.parametrize("name", N_FRAMES)
@pytest.mark.parametrize("sampling", ["linspace", "fps"])
def test_frames_are_those_of_a_full_decode(tmp_path: Path, name: str, sampling: str) -> None:
    clip = read(tmp_path, name, sampling=sampling, frames=8 if sampling == "linspace" else 16)
    assert clip.n_frames == N_FRAMES[name]
    n, frames = decode_all(name, set(clip.indices.tolist()), *clip.frames.shape[1:3])
    assert n == clip.n_frames
    for got, index in zip(clip.frames, clip.indices, strict=True):
        np.testing.assert_array_equal(got, frames[index])


def test_damaged_file_is_a_bad_clip(tmp_path: Path) -> None:
    with pytest.raises(BadClip, match="cannot be decoded: Invalid data found"):
        read(tmp_path, "decode_edge_cases/corrupted.mp4")


@pytest.mark.parametrize("name", [n for n in N_FRAMES if n.startswith("clips/") and not n.endswith(".avi")])
def test_decord_sees_the_same_pictures(tmp_path: Path, name: str) -> None:
    pytest.importorskip("decord")
    ours, theirs = read(tmp_path, name), read(tmp_path, name, reader="decord")
    assert theirs.indices.tolist() == ours.indices.tolist()
    assert np.abs(theirs.frames.astype(int) - ours.frames).mean() < 2.0
    np.testing.assert_allclose(theirs.pts_s, ours.pts_s, atol=2e-3)
