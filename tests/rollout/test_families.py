"""Engine and trainer compute the same numbers for every model family."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlvid.models.families.chat import ChatFamily
from rlvid.models.families.frames import SquareFrames
from rlvid.models.families.qwen_vl import QwenVL
from rlvid.models.families.vision import VisionFamily
from rlvid.training.batch import Group
from rlvid.training.packing import pack
from rlvid.types import Prompt
from tests.prompts import clip_of, mixed_prompt, noise, prompt_of, sample_of, sample_with
from tests.rollout.both import Both, run_check


@pytest.fixture(
    scope="module",
    params=["qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video", "internvl", "qwen2", "qwen3"],
)
def both(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Iterator[Both]:
    both = Both(tiny_models[request.param])
    yield both
    del both
    gc.collect()  # the next engine wants the memory of this one's cache


def prompts_for(family: ChatFamily) -> list[Prompt]:
    if isinstance(family, SquareFrames):
        side = family.frame_multiple
        clips = (6, side, side), (3, side, side)
        several = clips[: family.engine_limits(2)["video"]]
        media = [prompt_of(family, clips[1]), prompt_of(family, *several, seed=5)]
        if "image" in family.placeholders:
            images = clip_of(noise(1, side, side), "a"), clip_of(noise(2, side, side, seed=3), "b")
            media.append(family.encode(sample_with(("image", "video")), images))
        return [*media, prompt_of(family)]
    if not isinstance(family, QwenVL):
        return [prompt_of(family), prompt_of(family, question="How many shapes are there, and which is left?")]
    side = family.frame_multiple
    slow = replace(clip_of(noise(6, 3 * side, 2 * side, seed=9), "slow"), fps=2.5)
    return [
        prompt_of(family, (16, 2 * side, 2 * side)),  # merged T = 8 > max(H, W) = 2
        prompt_of(family, (4, 3 * side, 5 * side)),  # several windows, not all of one size
        prompt_of(family, (7, side, 2 * side), (4, 2 * side, side), seed=5),  # two clips, one with an odd length
        family.encode(sample_of(), [slow]),  # its patches are 0.8 s apart
        prompt_of(family),  # text alone, in one row with video
        mixed_prompt(family),  # images too
    ]


@torch.no_grad()
def gap_of_one_row(both: Both) -> float:
    """Largest difference of log-probs, all prompts answered at once and packed into one row."""
    prompts = prompts_for(both.family)
    rollouts = both.generate(prompts, n=3, max_tokens=12)
    by_engine = np.concatenate([r.logprobs for group in rollouts for r in group])
    assert len(by_engine) > 10 * len(prompts)
    groups = [
        Group(p, p.cost, tuple(r.token_ids for r in group), temperature=1.0)
        for p, group in zip(prompts, rollouts, strict=True)
    ]
    return float(np.abs(by_engine - both.policy(pack(groups))[0].numpy()).max())


def test_engine_and_packed_trainer_agree(both: Both) -> None:
    assert gap_of_one_row(both) < 1e-5


def test_positions_are_the_engines_own(both: Both) -> None:
    from vllm.multimodal.inputs import MultiModalFeatureSpec

    if not isinstance(both.family, QwenVL):
        pytest.skip("positions of text are its indices")
    for prompt in prompts_for(both.family):
        given = both.family.engine_input(prompt)
        features = [
            MultiModalFeatureSpec(data=item, modality=kind, identifier="", mm_position=place)
            for kind, places in given.get("mm_placeholders", {}).items()
            for item, place in zip(given["mm_kwargs"][kind], places, strict=True)
        ]
        features.sort(key=lambda feature: feature.mm_position.offset)
        (theirs,) = both.engine.engine.apply_model(
            lambda model, p=prompt, f=features: model.get_mrope_input_positions(p.token_ids.tolist(), f)
        )
        assert np.array_equal(prompt.positions, theirs[0].numpy())
        assert prompt.next_position == prompt.length + theirs[1]


def test_new_weights_reach_every_layer(both: Both) -> None:
    both.move_weights(seed=0)
    assert gap_of_one_row(both) > 1e-2
    both.sync()
    assert gap_of_one_row(both) < 1e-5


def test_run_starts_where_both_see_the_frames(both: Both) -> None:
    """Without videos there is nothing to see, and log-probs alone are compared."""
    assert run_check(both, n_videos=int(isinstance(both.family, VisionFamily))) < 1e-5
