"""Under ZeRO-3 every call of a module is a collective: whatever a rank's work is, all ranks make the same calls."""

from __future__ import annotations

import pytest

from tests.training.conftest import ZERO3_FAMILIES, Results


@pytest.mark.parametrize("family", ZERO3_FAMILIES)
def test_two_ranks_with_uneven_work_equal_one(family: str, one_rank: Results, two_ranks: Results) -> None:
    one, two = one_rank[f"zero3_rank.{family}", 0], two_ranks[f"zero3_rank.{family}", 3]
    assert one.keys() == two.keys()
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name
