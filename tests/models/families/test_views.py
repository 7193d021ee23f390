"""Views of a prompt. Shuffled frames: the tower's embeddings are those of the frames in order, in the other order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlvid.models.families import load_family
from rlvid.models.families.views import frame_order, seen_as
from rlvid.models.families.vision import VisionFamily
from rlvid.models.loading import load_model
from rlvid.training.batch import Group
from rlvid.training.packing import hidden_states, pack
from rlvid.types import Prompt
from tests.prompts import VISION_FAMILIES, clip_of, noise, prompt_of, sample_of


def embeddings(network: Any, family: VisionFamily, prompt: Prompt) -> torch.Tensor:
    """What the towers give to the language model for the prompt's video tokens [n, D]."""
    seen: list[torch.Tensor] = []
    text = network.model.get_submodule("language_model" if hasattr(network.model, "language_model") else "text_model")
    text.register_forward_pre_hook(lambda _, __, given: seen.append(given["inputs_embeds"]), with_kwargs=True)
    with torch.no_grad():
        hidden_states(network, family, pack([Group(prompt, prompt.cost)]), lambda n: n)
    return seen[-1][0][torch.from_numpy(prompt.token_ids.astype(np.int64)) == family.video_token]


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_embeddings_of_shuffled_frames_are_a_permutation(name: str, tiny_models: dict[str, Path]) -> None:
    family, network = load_family(tiny_models[name]), load_model(tiny_models[name], "float32").eval()
    assert isinstance(family, VisionFamily)
    side = -(-56 // family.frame_multiple) * family.frame_multiple
    n_frames = 8
    prompt = prompt_of(family, (n_frames, side, side), seed=3)
    other = seen_as(prompt, "shuffled_patches", family.temporal_patch)
    t = int(prompt.grid_thw[0, 0]) if len(prompt.grid_thw) == 1 else n_frames
    order = frame_order(t, prompt.clip_ids[0])
    assert sorted(order) == list(range(t)) and order.tolist() != list(range(t))
    assert np.array_equal(other.token_ids, prompt.token_ids) and np.array_equal(other.positions, prompt.positions)
    assert other.clip_ids != prompt.clip_ids  # no cache takes one for the other
    own, shuffled = (embeddings(network, family, p) for p in (prompt, other))
    rest = len(own) % t  # of LLaVA-OneVision, a token at the end of the clip
    assert torch.equal(own[len(own) - rest :], shuffled[len(own) - rest :])
    own, shuffled = own[: len(own) - rest], shuffled[: len(own) - rest]
    by_frame = own.view(t, -1, own.shape[-1])
    assert (shuffled - by_frame[order].flatten(0, 1)).abs().max() <= 1e-5
    assert (shuffled - own).abs().max() > 1e-3


def test_single_frames_change_places_across_temporal_patches(tiny_models: dict[str, Path]) -> None:
    family = load_family(tiny_models["qwen2_vl"])
    assert isinstance(family, VisionFamily)
    frames = noise(8, 56, 84)
    clip = clip_of(frames, "c")
    shuffled = seen_as(family.encode(sample_of(), [clip]), "shuffled", family.temporal_patch)
    moved = family.encode(sample_of(), [clip_of(frames[frame_order(8, "c")], "c")])
    assert np.array_equal(shuffled.patches, moved.patches)


def test_two_clips_are_shuffled_each_by_itself(tiny_models: dict[str, Path]) -> None:
    family = load_family(tiny_models["qwen2_vl"])
    prompt = prompt_of(family, (8, 56, 56), (2, 56, 84))
    other = seen_as(prompt, "shuffled_patches", family.temporal_patch)
    first = int(np.prod(prompt.grid_thw[0]))
    assert not np.array_equal(other.patches[:first], prompt.patches[:first])
    assert np.array_equal(other.patches[first:], prompt.patches[first:])  # one temporal patch: there is no other order
    assert prompt_of(family).patches.shape == seen_as(prompt_of(family), "shuffled", 2).patches.shape  # text alone


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl"])  # two frames in a temporal patch, and one
def test_reversed_blank_and_one_frame_are_those_of_such_a_clip(name: str, tiny_models: dict[str, Path]) -> None:
    family = load_family(tiny_models[name])
    assert isinstance(family, VisionFamily)
    frames = noise(8, 56, 56)
    prompt = family.encode(sample_of(), [clip_of(frames, "c")])
    views = {"reversed": frames[::-1], "blank": np.zeros_like(frames), "one_frame": np.repeat(frames[4:5], 8, axis=0)}
    views["first_frame"] = np.repeat(frames[:1], 8, axis=0)
    for view, same in views.items():
        other = seen_as(prompt, view, family.temporal_patch)  # type: ignore[arg-type]
        expected = family.encode(sample_of(), [clip_of(same, "c")])
        assert np.array_equal(other.patches, expected.patches) and other.clip_ids != prompt.clip_ids
        assert np.array_equal(other.token_ids, expected.token_ids)
