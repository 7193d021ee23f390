"""A reward model's head under the real DeepSpeed engine, on one and two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlvid.models.families import load_family
from rlvid.rewards.reward_model import HeadModel
from tests.prompts import prompt_of
from tests.training.test_learner import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scorer")


@pytest.fixture(scope="module")
def alone(tiny_model: Path, folder: Path) -> dict[str, Any]:
    return run_ranks(1, 0, tiny_model, folder, "scorer_rank")


def test_first_loss_is_the_spread_around_the_middle_of_the_scale(alone: dict[str, Any]) -> None:
    targets = np.array([[1 + i % 4, 4 - i % 3] for i in range(5)])
    assert alone["losses"][0] == pytest.approx(float(((targets - 2.5) ** 2).mean()), abs=1e-5)
    assert alone["losses"][3] < alone["losses"][0]


def test_two_ranks_under_zero_3_equal_one_process(alone: dict[str, Any], tiny_model: Path, folder: Path) -> None:
    two = run_ranks(2, 3, tiny_model, folder, "scorer_rank")
    assert two["losses"] == pytest.approx(alone["losses"], abs=1e-5)


@pytest.mark.parametrize("export", ["export-0-1", "export-3-2"])
def test_exported_model_gives_the_trained_scores(export: str, alone: dict[str, Any], folder: Path) -> None:
    family = load_family(folder / export)
    prompts = [prompt_of(family, (4 + 4 * (i % 2), 56, 56), seed=i) for i in range(5)]
    scored = HeadModel(folder / export)(prompts)
    assert [s[0].scores[name] for s in scored for name in "ab" if s[0].scores] == pytest.approx(
        alone["scores"], abs=1e-3
    )
