"""Conversations about one video as one group: the same numbers as apart, from one forward of what they share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlvid.models.families import load_family
from rlvid.models.families.chat import ChatFamily
from rlvid.models.loading import load_model
from rlvid.training.batch import Group
from rlvid.training.packing import PackedPolicy, pack
from rlvid.training.shared_media import TRAINED, merged, with_trained
from rlvid.types import Medium, Message, Prompt, Sample
from tests.prompts import clip_of, group_of, noise, sample_of

QUESTIONS = ("Which shape is moving?", "Which colour is it?", "How many shapes are there?")


def conversations(family: ChatFamily, clip: str = "c", seed: int = 0) -> list[Group[Prompt]]:
    """Three about one clip; the last one has an earlier answer, which is trained too."""
    side = family.frame_multiple
    clips = [clip_of(noise(6, side, 2 * side, seed=seed), clip)]
    prompts = [family.encode(sample_of(question=question), clips) for question in QUESTIONS[:2]]
    media = (Medium("/a.mp4"),)
    turns = (Message.about(media, QUESTIONS[2]), Message("assistant", ("Two.",)), Message("user", ("Which ones?",)))
    prompts.append(family.encode(Sample("s", media, turns, ""), clips))
    answers = [family.encode_answer(text) for text in ("A box.", "Red.", "A box and a ball.")]
    groups = [group_of(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    span = prompts[2].answered[0]
    assert span is not None
    groups[2] = replace(groups[2], in_prompt=(span,))
    return [with_trained(group) for group in groups]


def loss_of(policy: PackedPolicy, groups: list[Group[Prompt]]) -> tuple[float, list[torch.Tensor]]:
    """Mean negative log-likelihood of the trained tokens, and its gradient."""
    policy.zero_grad()
    logprobs, _ = policy(pack(groups))
    trained = torch.from_numpy(np.concatenate([group.tokens[TRAINED] for group in groups]))
    loss = -(logprobs * trained).sum() / trained.sum()
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in policy.parameters() if p.grad is not None]


@pytest.mark.parametrize("model", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_merged_conversations_have_the_loss_and_gradient_of_separate_ones(
    tiny_models: dict[str, Path], model: str
) -> None:
    family = load_family(tiny_models[model])
    policy = PackedPolicy(load_model(tiny_models[model], "float32"), family)
    apart = [*conversations(family), *conversations(family, "other", seed=9)]
    together = merged(apart)
    assert [len(group.responses) for group in together] == [3, 3]
    n_trained = sum(float(group.tokens[TRAINED].sum()) for group in together)
    assert n_trained == sum(group.n_tokens for group in apart)
    assert sum(len(group.prompt.patches) for group in together) == sum(len(g.prompt.patches) for g in apart) // 3
    (one, gradient), (other, expected) = (loss_of(policy, groups) for groups in (together, apart))
    assert one == pytest.approx(other, abs=1e-5)
    for own, theirs in zip(gradient, expected, strict=True):
        assert torch.allclose(own, theirs, atol=1e-5, rtol=1e-3)


def test_only_conversations_that_begin_alike_are_merged(tiny_models: dict[str, Path]) -> None:
    family = load_family(tiny_models["qwen2_vl"])
    groups = conversations(family)
    assert [len(g.responses) for g in merged(groups[:1])] == [1]
    text = [with_trained(group_of(family.encode(sample_of(0), []), family.encode_answer(a))) for a in ("x", "y")]
    assert merged(text) == text  # no media to share
    clips = [clip_of(noise(2, 28, 28), "c")]
    media = (Medium("/a.mp4"),)
    late = Sample("s", media, (Message("user", ("First: ", *Message.about(media, "?").content)),), "")
    other = with_trained(group_of(family.encode(late, clips), family.encode_answer("x")))
    own = with_trained(group_of(family.encode(sample_of(), clips), family.encode_answer("x")))
    assert merged([own, other]) == [own, other]  # their prompts differ before the video
    assert [len(g.responses) for g in merged([own, own])] == [2]  # two answers to one question
