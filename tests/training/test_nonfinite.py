"""Steps whose loss or gradient is not finite, on two ranks of the real DeepSpeed engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.test_learner import run_ranks


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_all_ranks(
    stage: int, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    for rank in run_ranks(2, stage, tiny_models["qwen2"], tmp_path, "nonfinite_rank")["ranks"]:
        assert rank["skipped"] == [1.0, 1.0] and rank["kept"]
        assert rank["fine"] == [0.0, 1.0, 1.0] and rank["moved"]  # it trains on, and counts from the start
        in_a_row, not_saved = rank["errors"]
        assert "3 steps in a row" in in_a_row and "train.max_skipped" in in_a_row
        assert "not finite and are not saved" in not_saved
    assert (tmp_path / f"checkpoint-{stage}").exists() and not (tmp_path / f"broken-{stage}").exists()
