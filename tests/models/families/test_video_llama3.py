from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlvid.models.families import load_family
from rlvid.models.families.video_llama3 import VideoLlama3
from rlvid.models.tower import normalise
from tests.prompts import clip_of, noise, sample_of


@pytest.fixture(scope="module")
def family(tiny_models: dict[str, Path]) -> VideoLlama3:
    return load_family(tiny_models["video_llama_3"])  # type: ignore[return-value]


def test_prompt_and_patches_equal_those_of_the_processor(family: VideoLlama3) -> None:
    from transformers import AutoProcessor
    from transformers.video_utils import VideoMetadata

    indices = np.array([0, 9, 17])
    clip = replace(clip_of(noise(3, 56, 84), "a"), indices=indices, n_frames=20)
    processor = AutoProcessor.from_pretrained(family.folder)
    turns = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which shape is moving?"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    video = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)
    metadata = VideoMetadata(total_num_frames=20, fps=clip.fps, frames_indices=indices.tolist())
    plain = {"do_resize": False, "do_sample_frames": False}
    theirs = processor(text=text, videos=[video], video_metadata=[metadata], return_tensors="pt", **plain)
    assert theirs["video_compression_mask"].all()
    ours = family.encode(sample_of(), [clip])
    assert ours.token_ids.tolist() == theirs["input_ids"][0].tolist()
    assert [s.length for s in ours.spans] == [6] * 3
    pixels = normalise(torch.from_numpy(ours.patches), family, torch.float32)
    inputs = family.network_inputs(pixels, torch.from_numpy(ours.grid_thw))
    for name in ("video_grid_thw", "video_merge_sizes"):
        assert torch.equal(inputs[name], theirs[name]), name
    assert (inputs["pixel_values_videos"] - theirs["pixel_values_videos"]).abs().max() < 1e-6
