import math

import pytest

from rlvid.algorithms.schedule import lr_multiplier


def test_warm_up_rises_in_equal_steps_and_never_is_zero() -> None:
    values = [lr_multiplier(step, 10, 4, "constant") for step in range(7)]
    assert values == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 1, 1])


def test_linear_falls_to_zero_at_the_end() -> None:
    # 2 of warm-up, then 4 steps down
    values = [lr_multiplier(step, 6, 2, "linear") for step in range(8)]
    assert values == pytest.approx([1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4, 0, 0])


def test_cosine_falls_to_zero_at_the_end() -> None:
    values = [lr_multiplier(step, 4, 0, "cosine") for step in range(5)]
    # (1 + cos) / 2 at 0, 45, 90, 135 degrees
    assert values == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0])


def test_warm_up_longer_than_the_run_never_reaches_one() -> None:
    assert [lr_multiplier(step, 2, 4, "cosine") for step in range(2)] == pytest.approx([1 / 5, 2 / 5])


def test_constant_stays_at_one_after_the_end() -> None:
    assert lr_multiplier(100, 10, 0, "constant") == 1.0
