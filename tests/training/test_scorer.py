"""The head on the last token: packed rows against transformers' own forward, losses by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlvid.models.families import load_family
from rlvid.models.heads import Head
from rlvid.models.loading import load_model
from rlvid.models.tower import normalise
from rlvid.training.batch import Group
from rlvid.training.micro_batches import MicroBatches, score
from rlvid.training.objectives import BradleyTerry, Regression
from rlvid.training.packing import PackedScorer, pack
from rlvid.types import Prompt
from tests.prompts import group_of, prompt_of

HEAD = Head(("a", "b", "c"), 2.5)


def prompts_alone(family, shapes=((4, 56, 56), (8, 56, 84), (4, 84, 56))) -> list[Group[Prompt]]:  # type: ignore[no-untyped-def]
    return [group_of(prompt_of(family, shape, seed=i)) for i, shape in enumerate(shapes)]


def random_scorer(folder: Path, head: Head = HEAD) -> PackedScorer:
    scorer = PackedScorer(load_model(folder, "float32"), load_family(folder), head).eval()
    # Scores of about 1, so that an absolute tolerance of 1e-5 is one of float32.
    std = scorer.head.weight.shape[1] ** -0.5
    torch.nn.init.normal_(scorer.head.weight, std=std, generator=torch.Generator().manual_seed(1))
    return scorer


@torch.no_grad()
def test_scores_are_those_of_the_last_token_in_transformers_own_forward(tiny_model: Path) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    scorer, family = random_scorer(tiny_model), load_family(tiny_model)
    groups = prompts_alone(family)
    packed = scorer(pack(groups))[0]
    plain = Qwen2VLForConditionalGeneration.from_pretrained(tiny_model, attn_implementation="eager")
    for group, ours in zip(groups, packed, strict=True):
        hidden = plain.model(
            input_ids=torch.from_numpy(group.prompt.token_ids).long()[None],
            position_ids=torch.from_numpy(group.prompt.positions).long()[:, None],
            pixel_values_videos=normalise(torch.from_numpy(group.prompt.patches), family, torch.float32),
            video_grid_thw=torch.from_numpy(group.prompt.grid_thw),
        ).last_hidden_state[0, -1]
        assert torch.allclose(ours, scorer.head(hidden), atol=1e-4)


@torch.no_grad()
def test_pair_shares_its_prompt_and_scores_as_two_sequences_do(tiny_model: Path) -> None:
    scorer, family = random_scorer(tiny_model, Head(("reward",))), load_family(tiny_model)
    prompt = prompt_of(family, (4, 56, 56))
    answers = tuple(family.encode_answer(word) for word in ("a red square", "two"))
    pair = scorer(pack([group_of(prompt, *answers)]))[0]
    each = [scorer(pack([group_of(prompt, a)]))[0] for a in answers]
    assert torch.allclose(pair, torch.cat(each), atol=1e-5)
    # The same last token after a longer prompt: the response is part of the prompt's sequence.
    mixed = scorer(pack([*prompts_alone(family), group_of(prompt, *answers)]))[0]
    assert torch.allclose(mixed[3:], pair, atol=1e-5)
    assert torch.allclose(mixed[:3], scorer(pack(prompts_alone(family)))[0], atol=1e-5)


def test_prompts_alone_fill_rows_and_come_back_in_order(tiny_model: Path) -> None:
    scorer, groups = random_scorer(tiny_model), prompts_alone(load_family(tiny_model))
    assert MicroBatches.of(groups, budget=groups[0].cost + groups[2].cost).rows == [[1], [0, 2]]
    values = score(scorer, groups, groups[0].cost + groups[2].cost)
    with torch.no_grad():
        assert np.allclose(np.concatenate(values), scorer(pack(groups))[0], atol=1e-5)


def test_head_starts_at_its_initial_bias(tiny_model: Path) -> None:
    network, family = load_model(tiny_model, "float32"), load_family(tiny_model)
    with torch.no_grad():
        assert (PackedScorer(network, family, HEAD)(pack(prompts_alone(family)))[0] == 2.5).all()


def test_regression_by_hand(tiny_model: Path) -> None:
    family = load_family(tiny_model)
    groups = [
        replace(g, targets={"labels": np.array(t, np.float32)})
        for g, t in zip(prompts_alone(family, ((4, 56, 56), (4, 56, 56))), ([1, 2, 3], [4, 4, 4]), strict=True)
    ]
    scores = torch.tensor([[2.0, 2.0, 3.0], [4.0, 1.0, 4.0]], requires_grad=True)
    loss, stats = Regression(2)(scores, groups)
    assert loss.item() == pytest.approx((1 / 3 + 9 / 3) / 2)
    assert stats["error"].item() == pytest.approx(1 / 3 + 3 / 3)
    loss.backward()
    assert scores.grad is not None and scores.grad[0].tolist() == pytest.approx([2 * 1 / 6, 0, 0])


def test_bradley_terry_by_hand(tiny_model: Path) -> None:
    prompt = prompt_of(load_family(tiny_model), (4, 56, 56))
    groups = [Group(prompt, prompt.cost, (np.ones(2, np.int32),) * 2, unit_size=2)] * 2
    loss, stats = BradleyTerry(2)(torch.tensor([[1.0], [0.0], [0.0], [2.0]]), groups)
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2)
    assert stats["pair/accuracy"].item() == 1 and stats["pair/margin"].item() == pytest.approx(-1.0)
