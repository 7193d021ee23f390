from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rlvid.models.families import load_family
from rlvid.models.families.smolvlm import SmolVlm
from rlvid.models.tower import normalise
from tests.prompts import clip_of, noise, sample_with

SIDE = 56  # of the tiny tower


@pytest.fixture(scope="module")
def family(tiny_models: dict[str, Path]) -> SmolVlm:
    return load_family(tiny_models["smolvlm"])  # type: ignore[return-value]


def test_prompt_and_pixels_of_a_video_equal_those_of_the_processor(family: SmolVlm) -> None:
    from transformers import AutoProcessor
    from transformers.video_utils import VideoMetadata

    indices = np.array([0, 300, 650])  # of a file of 100 s
    clip = replace(clip_of(noise(3, SIDE, SIDE), "a"), indices=indices, n_frames=800)
    processor = AutoProcessor.from_pretrained(family.folder)
    words = [{"type": "text", "text": text} for text in ("The video 0. ", "Which shape is moving?")]
    turns = [{"role": "user", "content": [{"type": "video"}, *words]}]
    shown = processor.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    video = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)
    metadata = VideoMetadata(total_num_frames=800, fps=clip.fps, frames_indices=indices.tolist(), duration=100.0)
    plain = {"do_resize": False, "do_sample_frames": False, "do_pad": False}
    theirs = processor(text=shown, videos=[[video]], video_metadata=[metadata], return_tensors="pt", **plain)
    ours = family.encode(sample_with(("video",)), [clip])
    said = family.tokenizer.decode(ours.token_ids.tolist(), skip_special_tokens=True)
    assert "following series of three frames from a 0:01:40 [H:MM:SS] video" in said and "Frame from 01:21:" in said
    assert ours.token_ids.tolist() == theirs["input_ids"][0].tolist()
    assert [s.length for s in ours.spans] == [4] * 3
    pixels = normalise(torch.from_numpy(ours.patches), family, torch.float32)
    found = family.network_inputs(pixels, torch.from_numpy(ours.grid_thw))["pixel_values"]
    assert (found - theirs["pixel_values"]).abs().max() < 1e-6


def test_prompt_and_pixels_of_an_image_equal_those_of_the_processor(family: SmolVlm) -> None:
    from transformers import AutoProcessor

    clip = clip_of(noise(1, SIDE, SIDE), "a")
    processor = AutoProcessor.from_pretrained(family.folder)
    words = [{"type": "text", "text": text} for text in ("The image 0. ", "Which shape is moving?")]
    shown = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, *words]}], add_generation_prompt=True
    )
    plain = {"do_resize": False, "do_image_splitting": False}
    theirs = processor(text=shown, images=[Image.fromarray(clip.frames[0])], return_tensors="pt", **plain)
    ours = family.encode(sample_with(("image",)), [clip])
    assert ours.token_ids.tolist() == theirs["input_ids"][0].tolist()
    pixels = normalise(torch.from_numpy(ours.patches), family, torch.float32)
    found = family.network_inputs(pixels, torch.from_numpy(ours.grid_thw))["pixel_values"]
    assert (found - theirs["pixel_values"]).abs().max() < 1e-6
