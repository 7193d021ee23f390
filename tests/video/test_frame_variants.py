from __future__ import annotations

import numpy as np
import pytest

from rlvid.video.frame_variants import probe, thumbnails
from tests.prompts import clip_of, noise


@pytest.mark.parametrize("shape", [(8, 112, 140), (2, 56, 56), (16, 28, 28), (6, 280, 28)])
def test_tall_clips_are_longer_in_time_than_in_space(shape: tuple[int, int, int]) -> None:
    clip = probe(clip_of(noise(*shape), "c"), "tall", 28)
    frames = clip.frames
    assert len(frames) == len(clip.indices) == len(clip.pts_s) and (np.diff(clip.pts_s) > 0).all()
    t, h, w = len(frames) / 2, frames.shape[1] // 28, frames.shape[2] // 28
    assert t > max(h, w) >= 1 and frames.shape[1] % 28 == frames.shape[2] % 28 == 0


def test_altered_clips_hold_other_frames_even_where_all_are_the_same() -> None:
    moving, still = noise(8, 28, 28), np.repeat(noise(1, 28, 28), 8, axis=0)
    altered = probe(clip_of(moving, "m"), "altered", 28)
    assert not np.array_equal(altered.frames, moving)
    assert np.array_equal(np.sort(altered.frames.sum(axis=(1, 2, 3))), np.sort(moving.sum(axis=(1, 2, 3))))
    assert np.array_equal(probe(clip_of(still, "s"), "altered", 28).frames, 255 - still)
    assert altered.clip_id == "m-altered"


def test_as_is_is_the_clip_itself() -> None:
    clip = clip_of(noise(4, 28, 28), "c")
    assert probe(clip, "as_is", 28) is clip


def test_thumbnails_are_few_and_keep_the_aspect() -> None:
    from io import BytesIO

    from PIL import Image

    files = thumbnails(noise(16, 56, 84))
    assert len(files) == 6
    assert Image.open(BytesIO(files[0])).size == (168, 112)
    assert len(thumbnails(noise(2, 28, 28))) == 2
