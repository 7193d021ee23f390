"""Steps whose loss or gradient is not finite, on two ranks of the real DeepSpeed engine."""

from __future__ import annotations

import pytest

from tests.training.conftest import Results


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_all_ranks(stage: int, two_ranks: Results) -> None:
    for rank in two_ranks["nonfinite_rank", stage]["ranks"]:
        assert rank["skipped"] == [1.0, 1.0] and rank["kept"]
        assert rank["fine"] == [0.0, 1.0, 1.0] and rank["moved"]  # it trains on, and counts from the start
        in_a_row, not_saved = rank["errors"]
        assert "3 steps in a row" in in_a_row and "train.max_skipped" in in_a_row
        assert "not finite and are not saved" in not_saved
    saved = two_ranks.folder / "nonfinite_rank"
    assert (saved / f"checkpoint-{stage}").exists() and not (saved / f"broken-{stage}").exists()
