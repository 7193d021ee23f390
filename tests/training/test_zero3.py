"""Under ZeRO-3 every call of a module is a collective: whatever a rank's work is, all ranks make the same calls."""

from __future__ import annotations

import pytest

from tests.training.conftest import ZERO3_FAMILIES, Results


@pytest.mark.parametrize("family", ZERO3_FAMILIES)
def test_two_ranks_with_uneven_work_equal_one(family: str, one_rank: Results, two_ranks: Results) -> None:
    one, two = one_rank[f"zero3_rank.{family}", 0], two_ranks[f"zero3_rank.{family}", 3]
    assert one["numbers"].keys() == two["numbers"].keys()
    for name, values in one["numbers"].items():
        found = two["numbers"][name]
        assert found == pytest.approx(values, rel=1e-4, abs=1e-5), name  # after an update of AdamW
        if name in ("supervised", "ppo", "critic"):  # loss and gradient norm before one
            assert found[:2] == pytest.approx(values[:2], rel=1e-5), name


@pytest.mark.parametrize("family", ZERO3_FAMILIES)
def test_activations_are_computed_again_in_text_and_tower(family: str, one_rank: Results, two_ranks: Results) -> None:
    assert not one_rank[f"zero3_rank.{family}", 0]["again"]
    again = two_ranks[f"zero3_rank.{family}", 3]["again"]
    assert len(again) == (1 if family in ("qwen2", "qwen3") else 2) and min(again.values()) > 5
