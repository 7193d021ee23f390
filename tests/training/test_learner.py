"""The real DeepSpeed engine on one and two processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlvid.models.families import load_family
from rlvid.models.tower import normalise
from tests.prompts import group_of, prompt_of
from tests.training.conftest import Results

COMPILERS = ("c++", "g++", "gcc", "cc", "clang", "ninja")


@pytest.fixture
def alone(one_rank: Results) -> dict[str, Any]:
    return one_rank["learner_rank", 0]


def test_loss_of_the_first_step_is_the_mean_negative_logprob(alone: dict[str, Any], tiny_model: Path) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    family = load_family(tiny_model)
    model = Qwen2VLForConditionalGeneration.from_pretrained(tiny_model, attn_implementation="eager")
    nll = []
    for i, word in enumerate(("square", "two", "left", "red", "circle")):
        prompt, answer = prompt_of(family, (4 + 4 * (i % 2), 56, 56), seed=i), family.encode_answer(word)
        after = np.broadcast_to(prompt.next_position + np.arange(len(answer)), (3, len(answer)))
        with torch.no_grad():
            logits = model(
                input_ids=torch.from_numpy(np.concatenate([prompt.token_ids, answer])).long()[None],
                position_ids=torch.from_numpy(np.concatenate([prompt.positions, after], axis=1)).long()[:, None],
                pixel_values_videos=normalise(torch.from_numpy(prompt.patches), family, torch.float32),
                video_grid_thw=torch.from_numpy(prompt.grid_thw),
            ).logits[0, prompt.length - 1 : -1]
        nll.append(-logits.log_softmax(-1).gather(1, torch.from_numpy(answer).long()[:, None])[:, 0])
    assert alone["losses"][0] == pytest.approx(float(torch.cat(nll).mean()), abs=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_without_a_compiler_equal_one_process_under_every_zero_stage(
    stage: int, alone: dict[str, Any], two_ranks: Results
) -> None:
    both = two_ranks["learner_rank", stage]
    assert not any(shutil.which(name, path=two_ranks.folder / "bin") for name in COMPILERS)
    assert not (two_ranks.folder / "extensions").exists()  # nothing was compiled
    assert both["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert both["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-4)
    assert both["again"] == pytest.approx(both["losses"][3], abs=1e-6)
    assert both["buckets"][0] == both["buckets"][1]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_rank_without_video_keeps_step_with_one_that_has_nothing_else(
    stage: int, one_rank: Results, two_ranks: Results
) -> None:
    """Steps and log-probs. Without the blank clip the ranks meet in different collectives."""
    alone, both = one_rank["mixed_rank", 0], two_ranks["mixed_rank", stage]
    assert both["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert both["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-4)
    assert np.concatenate(both["logprobs"]) == pytest.approx(np.concatenate(alone["logprobs"][::2]), abs=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_kept_on_the_host_changes_no_step(stage: int, alone: dict[str, Any], two_ranks: Results) -> None:
    """Activations, and the optimizer with its step."""
    offloaded = two_ranks["learner_rank", stage]["offloaded"]
    assert offloaded == pytest.approx(alone["losses"][:2], rel=1e-4)


def test_step_after_a_restored_checkpoint_repeats_the_step(alone: dict[str, Any]) -> None:
    assert alone["again"] == alone["losses"][3]
    assert alone["buckets"][0] == alone["buckets"][1] and len(alone["buckets"][0]) > 3
    assert alone["losses"][3] < alone["losses"][0]


def test_exported_policy_loads_in_transformers_with_equal_weights(one_rank: Results) -> None:
    from rlvid.models.loading import load_model
    from rlvid.training.packing import PackedPolicy, pack

    export = one_rank.folder / "learner_rank" / "export-0-1"
    family = load_family(export)
    answers = [family.encode_answer(word) for word in ("square", "two", "left", "red", "circle")]
    groups = [group_of(prompt_of(family, (4 + 4 * (i % 2), 56, 56), seed=i), a) for i, a in enumerate(answers)]
    with torch.no_grad():
        logprobs = PackedPolicy(load_model(export, "float32"), family)(pack(groups))[0]
    assert np.allclose(logprobs.numpy(), one_rank["learner_rank", 0]["logprobs"], atol=1e-5)
