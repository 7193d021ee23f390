from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from rlvid.models.families import load_family
from rlvid.models.families.internvl import InternVl
from rlvid.models.tower import normalise
from tests.prompts import clip_of, noise, sample_with

SIDE = 56  # of the tiny tower


@pytest.fixture(scope="module")
def family(tiny_models: dict[str, Path]) -> InternVl:
    return load_family(tiny_models["internvl"])  # type: ignore[return-value]


def test_prompt_and_pixels_equal_those_of_the_processor(family: InternVl) -> None:
    from transformers import AutoProcessor

    image, clip = clip_of(noise(1, SIDE, SIDE), "a"), clip_of(noise(3, SIDE, SIDE, seed=1), "b")
    processor = AutoProcessor.from_pretrained(family.folder)
    text = {
        kind: {"type": "text", "text": words}
        for kind, words in (("image", "The image 0. "), ("video", "The video 1. "))
    }
    parts = [{"type": "image"}, text["image"], {"type": "video"}, text["video"]]
    parts.append({"type": "text", "text": "Which shape is moving?"})
    shown = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    video = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)
    plain = {"do_resize": False, "do_sample_frames": False, "crop_to_patches": False}
    theirs = processor(
        text=shown, images=[Image.fromarray(image.frames[0])], videos=[video], return_tensors="pt", **plain
    )
    ours = family.encode(sample_with(("image", "video")), [image, clip])
    assert ours.token_ids.tolist() == theirs["input_ids"][0].tolist()
    assert [s.length for s in ours.spans] == [4] * 4
    pixels = normalise(torch.from_numpy(ours.patches), family, torch.float32)
    found = family.network_inputs(pixels, torch.from_numpy(ours.grid_thw))["pixel_values"]
    assert found.shape == theirs["pixel_values"].shape
    assert (found - theirs["pixel_values"]).abs().max() < 1e-6
