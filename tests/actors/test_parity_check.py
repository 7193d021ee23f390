from __future__ import annotations

import numpy as np

from actors.parity_check import Observation, verdict


def seen(
    engine: list[float], trainer: list[float], engine_change: float = 1.0, trainer_change: float = 1.0
) -> Observation:
    return Observation("s", np.array(engine, np.float32), np.array(trainer, np.float32), engine_change, trainer_change)


def test_agreement_within_tolerance_is_well() -> None:
    assert verdict([seen([-1.0, -2.0], [-1.00005, -2.0])], "float32", 1.0) == []


def test_largest_difference_is_named() -> None:
    (problem,) = verdict([seen([-1.0, -2.0], [-1.0, -2.5])], "float32", 1.0)
    assert "differ by 0.5" in problem and "token 1: -2.00000 and -2.50000" in problem


def test_nan_is_a_difference_and_its_side_is_named() -> None:
    (problem,) = verdict([seen([-1.0], [float("nan")])], "float32", 1.0)
    assert "those of the trainer are not finite" in problem


def test_a_gap_that_a_low_temperature_makes_is_explained() -> None:
    """0.001 at temperature 0.05 are 0.00005 before the division."""
    (problem,) = verdict([seen([-1.0], [-1.001])], "float32", temperature=0.05)
    assert "agree without rollout.temperature=0.05" in problem
    (problem,) = verdict([seen([-1.0], [-1.1])], "float32", temperature=0.05)
    assert "rollout.temperature" not in problem


def test_each_blind_side_is_named() -> None:
    problems = verdict([seen([-1.0], [-1.0], engine_change=0.0, trainer_change=1e-6)], "float32", 1.0)
    assert [p.split(":")[1] for p in problems] == [
        " the engine does not see the video",
        " the trainer does not see the video",
    ]
