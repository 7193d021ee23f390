from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from actors.parity_check import N_RESPONSES, N_TOKENS, Observation, verdict
from rlvid.config import ParityConfig
from rlvid.models.families import load_family
from rlvid.models.loading import load_model
from rlvid.training.packing import PackedPolicy, pack
from rlvid.types import Prompt
from tests.prompts import group_of, prompt_of
from tests.training.test_packing import separate_sequences

Patches = npt.NDArray[np.uint8]


def seen(
    engine: list[float], trainer: list[float], engine_change: float = 1.0, trainer_change: float = 1.0
) -> Observation:
    return Observation("s", np.array(engine, np.float32), np.array(trainer, np.float32), engine_change, trainer_change)


def problems_of(o: Observation, dtype: str = "float32", temperature: float = 1.0, **limits: float) -> list[str]:
    return verdict([o], dtype, temperature, ParityConfig(**limits))


def test_agreement_within_the_limits_is_well() -> None:
    assert problems_of(seen([-1.0, -2.0], [-1.00005, -2.0])) == []


def test_mean_quantile_and_the_largest_difference_are_named() -> None:
    (problem,) = problems_of(seen([-1.0, -2.0], [-1.0, -2.5]), quantile=0.5)
    assert "differ by 0.25 on average (parity.mean: at most 0.0001)" in problem
    assert "by 0.25 at the 0.5 quantile (parity.at_quantile: at most 0.0001)" in problem  # between 0 and 0.5
    assert "token 1: -2.00000 and -2.50000" in problem


@pytest.mark.parametrize(
    ("gaps", "is_well"),
    [
        ([0.013] * 63 + [0.4], True),  # one token with a step of a bfloat16 logit: healthy
        ([0.06] * 64, False),  # all tokens a little
        ([0.0] * 58 + [0.3] * 6, False),  # nearly a tenth of the tokens by much
    ],
)
def test_in_bfloat16_one_token_decides_nothing(gaps: list[float], is_well: bool) -> None:
    assert (problems_of(seen([0.0] * 64, gaps), "bfloat16") == []) == is_well


def test_limits_are_those_of_the_config() -> None:
    o = seen([0.0] * 10, [0.01] * 10)
    assert problems_of(o) and not problems_of(o, mean=0.02, at_quantile=0.02)
    assert problems_of(o, mean=0.001, at_quantile=0.02) and problems_of(o, mean=0.02, at_quantile=0.001)


def test_nan_is_a_difference_and_its_side_is_named() -> None:
    (problem,) = problems_of(seen([-1.0, -1.0], [float("nan"), -1.0]))
    assert "those of the trainer are not finite" in problem


def test_a_gap_that_a_low_temperature_makes_is_explained() -> None:
    """0.001 at temperature 0.05 are 0.00005 before the division."""
    (problem,) = problems_of(seen([-1.0], [-1.001]), temperature=0.05)
    assert "agree without rollout.temperature=0.05" in problem
    (problem,) = problems_of(seen([-1.0], [-1.1]), temperature=0.05)
    assert "rollout.temperature" not in problem


def test_each_blind_side_is_named() -> None:
    problems = problems_of(seen([-1.0], [-1.0], engine_change=0.0, trainer_change=1e-6))
    assert [p.split(":")[1] for p in problems] == [
        " the engine does not see the video",
        " the trainer does not see the video",
    ]


def as_it_is(patches: Patches, frames: int) -> Patches:
    return patches


def dropped(patches: Patches, frames: int) -> Patches:
    return np.zeros_like(patches)


def shuffled(patches: Patches, frames: int) -> Patches:
    order = np.random.default_rng(1).permutation(frames)
    return patches.reshape(frames, -1, patches.shape[1])[order].reshape(patches.shape)


def normalised_twice(patches: Patches, frames: int) -> Patches:
    """What is left of pixels that were normalised before, as bytes: nearly black."""
    return ((patches / 255.0 - 0.45) / 0.27).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("seen_by_trainer", "least_mean"), [(as_it_is, 0), (dropped, 0.5), (shuffled, 0.1), (normalised_twice, 0.5)]
)
def test_in_bfloat16_a_wrong_video_is_far_outside_of_the_limits(
    tiny_model: Path, seen_by_trainer: Callable[[Patches, int], Patches], least_mean: float
) -> None:
    """transformers' model in float32 as the engine, the trainer's in bfloat16, random weights: rounding has a mean of
    about 0.014 and 0.033 at the quantile."""
    family = load_family(tiny_model)
    prompt: Prompt = prompt_of(family, (16, 56, 56))
    rng = np.random.default_rng(0)
    ids = [rng.integers(20, 200, N_TOKENS).astype(np.int32) for _ in range(N_RESPONSES)]
    _, engine = separate_sequences(tiny_model, [group_of(prompt, *ids, temperature=1.0)], temperature=1.0)
    given = replace(prompt, patches=seen_by_trainer(prompt.patches, int(prompt.grid_thw[0, 0])))
    with torch.no_grad():
        policy = PackedPolicy(load_model(tiny_model, "bfloat16"), family)
        trainer = policy(pack([group_of(given, *ids, temperature=1.0)]))[0]
    o = Observation("s", engine.detach().numpy(), trainer.float().numpy(), 1.0, 1.0)
    mean, at_quantile = o.gaps(0.95)
    if least_mean:
        assert problems_of(o, "bfloat16") and mean > least_mean and at_quantile > 0.3
    else:
        assert not problems_of(o, "bfloat16") and mean < 0.03 and at_quantile < 0.1
