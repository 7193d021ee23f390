"""The tower in pieces, compared with the whole clip at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlvid.models import tower
from rlvid.models.families import load_family
from rlvid.models.families.vision import VisionFamily
from rlvid.models.loading import load_model
from rlvid.models.tower import InPieces, cut_grids
from rlvid.training.packing import PackedPolicy, pack
from tests.prompts import VISION_FAMILIES, group_of, prompt_of


def test_pieces_are_whole_temporal_patches() -> None:
    assert cut_grids([(4, 2, 2), (1, 2, 2)], 100) == [[(4, 2, 2), (1, 2, 2)]]
    assert cut_grids([(4, 2, 2), (1, 4, 2)], 8) == [[(2, 2, 2)], [(2, 2, 2)], [(1, 4, 2)]]
    assert cut_grids([(1, 2, 2), (3, 2, 2)], 8) == [[(1, 2, 2), (1, 2, 2)], [(2, 2, 2)]]
    assert cut_grids([(2, 4, 4)], 8) == [[(1, 4, 4)], [(1, 4, 4)]]  # one has more than a piece should


@pytest.mark.parametrize("model", VISION_FAMILIES)
@pytest.mark.parametrize("extra", [0, 2])
def test_log_probs_and_gradients_are_those_of_the_whole_clip(
    tiny_models: dict[str, Path], model: str, extra: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load_family(tiny_models[model])
    assert isinstance(family, VisionFamily)
    side = -(-56 // family.frame_multiple) * family.frame_multiple
    prompt = prompt_of(family, (6, side, side), (4, side, side))
    ids = np.arange(20, 25, dtype=np.int32)
    policies = [PackedPolicy(load_model(tiny_models[model], "float32"), family).train() for _ in range(2)]
    outputs = []
    for policy, limit in zip(policies, (10**6, side * side // family.patch_size**2 * 2), strict=True):
        monkeypatch.setattr(tower, "PATCHES_AT_A_TIME", limit)
        policy.network.gradient_checkpointing_enable({"use_reentrant": False})
        policy.most = lambda count: count + extra  # another rank has more
        logprobs, _ = policy(pack([group_of(prompt, ids)]))
        logprobs.sum().backward()
        outputs.append(logprobs.detach())
    assert family.tower_passes(prompt.grid_thw.tolist()) > 2
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=0)
    gradients = dict(policies[1].named_parameters())
    for name, parameter in policies[0].named_parameters():
        if parameter.grad is not None:
            rounding = 1e-6 if name.endswith("k_proj.bias") else 1e-9
            difference = (gradients[name].grad - parameter.grad).norm()
            assert difference <= 1e-5 * parameter.grad.norm() + rounding, name


def test_a_tower_whose_activations_are_kept_runs_once(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower, "PATCHES_AT_A_TIME", 1)
    family = load_family(tiny_model)
    policy = PackedPolicy(load_model(tiny_model, "float32"), family)
    visual = policy.network.model.visual
    assert isinstance(visual.forward, InPieces)
    calls = []
    visual.patch_embed.register_forward_pre_hook(lambda *_: calls.append(1))
    row = pack([group_of(prompt_of(family, (8, 56, 56)), np.arange(3, dtype=np.int32))])
    policy(row)
    assert len(calls) == 1
    with torch.no_grad():
        policy(row)
    assert len(calls) == 1 + 4
