"""A reward model's head under the real DeepSpeed engine, on one and two processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlvid.models.families import load_family
from rlvid.rewards.reward_model import HeadModel
from tests.prompts import prompt_of
from tests.training.conftest import Results


@pytest.fixture
def alone(one_rank: Results) -> dict[str, Any]:
    return one_rank["scorer_rank", 0]


def test_first_loss_is_the_spread_around_the_middle_of_the_scale(alone: dict[str, Any]) -> None:
    targets = np.array([[1 + i % 4, 4 - i % 3] for i in range(5)])
    assert alone["losses"][0] == pytest.approx(float(((targets - 2.5) ** 2).mean()), abs=1e-5)
    assert alone["losses"][3] < alone["losses"][0]


def test_two_ranks_under_zero_3_equal_one_process(alone: dict[str, Any], two_ranks: Results) -> None:
    two = two_ranks["scorer_rank", 3]
    assert two["losses"] == pytest.approx(alone["losses"], abs=1e-5)


@pytest.mark.parametrize(("ranks", "name"), [("one_rank", "export-0-1"), ("two_ranks", "export-3-2")])
def test_exported_model_gives_the_trained_scores(
    ranks: str, name: str, alone: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    export = request.getfixturevalue(ranks).folder / "scorer_rank" / name
    family = load_family(export)
    prompts = [prompt_of(family, (4 + 4 * (i % 2), 56, 56), seed=i) for i in range(5)]
    scored = HeadModel(export)(prompts)
    assert [s[0].scores[name] for s in scored for name in "ab" if s[0].scores] == pytest.approx(
        alone["scores"], abs=1e-3
    )
