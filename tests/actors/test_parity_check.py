from __future__ import annotations

import numpy as np
import pytest

from actors.parity_check import Observation, verdict
from rlvid.config import ParityConfig


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
