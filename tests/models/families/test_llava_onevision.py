from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlvid.errors import UserError
from rlvid.models.families import load_family
from rlvid.models.families.llava_onevision import LlavaOnevision
from rlvid.models.loading import load_model
from rlvid.models.tower import normalise
from rlvid.training.batch import Group
from rlvid.training.packing import PackedPolicy, pack
from tests.prompts import clip_of, noise, of_processor, prompt_of, sample_of, sample_with

SIDE = 56  # of the tiny tower


@pytest.fixture(scope="module")
def family(tiny_models: dict[str, Path]) -> LlavaOnevision:
    return load_family(tiny_models["llava_onevision"])  # type: ignore[return-value]


def test_prompt_and_pixels_equal_those_of_the_processor(family: LlavaOnevision) -> None:
    clip = clip_of(noise(5, SIDE, SIDE), "a")
    text, theirs = of_processor(family, clip)
    assert text == "<|im_start|>user <video>\n\nWhich shape is moving?<|im_end|><|im_start|>assistant\n"
    ours = family.encode(sample_of(), [clip])
    assert ours.token_ids.tolist() == theirs["input_ids"][0].tolist()
    assert [s.length for s in ours.spans] == [5 * 4 + 1]
    pixels = normalise(torch.from_numpy(ours.patches), family, torch.float32)
    (frames,) = family.network_inputs(pixels, torch.from_numpy(ours.grid_thw))["pixel_values_videos"]
    theirs_whole = theirs["pixel_values_videos"][0]
    assert frames.shape == theirs_whole.shape == (5, 3, SIDE, SIDE)
    assert (frames - theirs_whole).abs().max() < 1e-6


def test_an_edge_that_no_patch_covers_is_not_carried(family: LlavaOnevision) -> None:
    """As of 384 pixels with patches of 14."""
    wide = LlavaOnevision(family.folder)
    wide.frame_multiple = SIDE + 4
    frames = noise(2, SIDE + 4, SIDE + 4)
    grid, patches = wide.patchify(frames)
    assert grid == (2, 4, 4)
    (seen,) = wide.network_inputs(torch.from_numpy(patches).float(), torch.tensor([grid]))["pixel_values_videos"]
    assert seen.shape == (2, 3, SIDE + 4, SIDE + 4)
    assert torch.equal(seen[..., :SIDE, :SIDE], torch.from_numpy(frames).permute(0, 3, 1, 2)[..., :SIDE, :SIDE].float())


@torch.no_grad()
def test_two_clips_of_different_lengths_give_transformers_log_probs(family: LlavaOnevision) -> None:
    """transformers takes clips of one length, so each is given alone there."""
    from transformers import AutoModelForImageTextToText

    network = AutoModelForImageTextToText.from_pretrained(family.folder)
    policy = PackedPolicy(load_model(family.folder, "float32"), family)
    prompts = [prompt_of(family, (t, SIDE, SIDE), seed=t) for t in (3, 6)]
    answer = family.encode_answer("square")
    ours = policy(pack([Group(p, p.cost, (answer,)) for p in prompts]))[0]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([[*prompt.token_ids.tolist(), *answer.tolist()]])
        pixels = normalise(torch.from_numpy(prompt.patches), family, torch.float32)
        (frames,) = family.network_inputs(pixels, torch.from_numpy(prompt.grid_thw))["pixel_values_videos"]
        logprobs = network(input_ids=ids, pixel_values_videos=frames[None]).logits[0].log_softmax(-1)
        at = range(prompt.length - 1, prompt.length + len(answer) - 1)
        expected += [float(logprobs[i, token]) for i, token in zip(at, answer.tolist(), strict=True)]
    torch.testing.assert_close(ours, torch.tensor(expected), atol=1e-5, rtol=0)


def test_images_are_refused(family: LlavaOnevision) -> None:
    with pytest.raises(UserError, match="accepts only text and videos"):
        family.check_media(sample_with(("image",)))
