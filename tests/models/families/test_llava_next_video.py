from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlvid.errors import UserError
from rlvid.models.families import load_family
from rlvid.models.families.llava_next_video import LlavaNextVideo
from rlvid.models.tower import normalise
from tests.prompts import clip_of, noise, of_processor, sample_of, sample_with

SIDE = 56  # of the tiny tower


@pytest.fixture(scope="module")
def family(tiny_models: dict[str, Path]) -> LlavaNextVideo:
    return load_family(tiny_models["llava_next_video"])  # type: ignore[return-value]


def test_prompt_and_pixels_equal_those_of_the_processor(family: LlavaNextVideo) -> None:
    clip = clip_of(noise(5, SIDE, SIDE), "a")
    _, theirs = of_processor(family, clip)
    ours = family.encode(sample_of(), [clip])
    assert ours.token_ids.tolist() == theirs["input_ids"][0].tolist()
    assert [s.length for s in ours.spans] == [5 * 16]
    pixels = normalise(torch.from_numpy(ours.patches), family, torch.float32)
    found = family.network_inputs(pixels, torch.from_numpy(ours.grid_thw))["pixel_values_videos"]
    assert (found - theirs["pixel_values_videos"]).abs().max() < 1e-6


def test_images_are_refused(family: LlavaNextVideo) -> None:
    with pytest.raises(UserError, match="accepts only text and videos"):
        family.check_media(sample_with(("image",)))
