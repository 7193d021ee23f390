"""Responses after their prompt's pass, compared with the whole group in one row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlvid.models.families import load_family
from rlvid.models.families.vision import VisionFamily
from rlvid.models.heads import Head
from rlvid.models.loading import load_model
from rlvid.training.batch import Group
from rlvid.training.depth_first import PromptPass
from rlvid.training.micro_batches import score
from rlvid.training.packing import PackedPolicy, PackedScorer, pack
from rlvid.types import Prompt
from tests.prompts import SHARING, group_of, prompt_of

LENGTHS = (5, 1, 9, 3)


def group(folder: Path, is_video: bool = True) -> Group[Prompt]:
    family = load_family(folder)
    rng = np.random.default_rng(0)
    side = -(-56 // family.frame_multiple) * family.frame_multiple
    shapes = [(4, side, side)] if is_video and isinstance(family, VisionFamily) else []
    ids = [rng.integers(260, 300, size=n).astype(np.int32) for n in LENGTHS]
    weights = rng.random(sum(LENGTHS), dtype=np.float32)
    return group_of(prompt_of(family, *shapes), *ids, weights=weights, temperature=0.7)


def parts_of(whole: Group[Prompt], n_tokens: int) -> list[Group[Prompt]]:
    return whole.cut(whole.prompt_cost + n_tokens)


def backward_depth_first(model: Any, parts: list[Group[Prompt]]) -> torch.Tensor:
    """Outputs of all parts; the gradients are in the model."""
    prompt = PromptPass(model, parts[0].prompt, torch.device("cpu"))
    outputs = []
    for part in parts:
        out = model(prompt.row(part))[0]
        (
            out
            * torch.from_numpy(part.tokens["weights"][: len(out)])[:, None].view(out.shape[0], *[1] * (out.ndim - 1))
        ).sum().backward()
        prompt.collect()
        outputs.append(out.detach())
    prompt.loss().backward()
    return torch.cat(outputs)


@pytest.mark.parametrize("is_video", [True, False])
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("model", SHARING)
def test_log_probs_and_gradients_are_those_of_the_group_in_one_row(
    tiny_models: dict[str, Path], model: str, is_checkpointed: bool, is_video: bool
) -> None:
    folder = tiny_models[model]
    whole = group(folder, is_video)
    policies = [PackedPolicy(load_model(folder, "float32"), load_family(folder)).train() for _ in range(2)]
    expected = policies[0](pack([whole]))[0]
    (expected * torch.from_numpy(whole.tokens["weights"])).sum().backward()
    if is_checkpointed:
        policies[1].network.gradient_checkpointing_enable({"use_reentrant": False})
    parts = parts_of(whole, n_tokens=9)
    assert len(parts) == 3

    found = backward_depth_first(policies[1], parts)

    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=0)
    gradients = dict(policies[1].named_parameters())
    for name, parameter in policies[0].named_parameters():
        if parameter.grad is None:  # parts of Video-LLaVA's towers
            assert gradients[name].grad is None, name
            continue
        rounding = 1e-6 if name.endswith("k_proj.bias") else 1e-9  # a shift of all scores changes nothing: it is 0
        assert (gradients[name].grad - parameter.grad).norm() <= 1e-5 * parameter.grad.norm() + rounding, name


def test_scores_of_responses(tiny_model: Path) -> None:
    family, whole = load_family(tiny_model), group(tiny_model)
    scorer = PackedScorer(load_model(tiny_model, "float32"), family, Head(("reward",)))
    torch.nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(1))
    (expected,) = score(scorer, [whole], 10**6)
    for budget in (whole.prompt_cost + 9, 1):
        (found,) = score(scorer, [whole], budget)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)  # scores of about 10


def test_without_gradients_nothing_is_kept_for_a_backward(tiny_model: Path) -> None:
    policy = PackedPolicy(load_model(tiny_model, "float32"), load_family(tiny_model))
    with torch.no_grad():
        prompt = PromptPass(policy, group(tiny_model).prompt, torch.device("cpu"))
    assert not any(x.requires_grad for x in (*prompt._leaves, *prompt._outputs))
