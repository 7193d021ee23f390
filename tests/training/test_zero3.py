"""Under ZeRO-3 every call of a module is a collective: whatever a rank's work is, all ranks make the same calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.prompts import CORE, SHARING
from tests.training.conftest import Results


def check_equal(one: dict[str, list[float]], two: dict[str, list[float]]) -> None:
    assert one.keys() == two.keys()
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name  # after an update of AdamW
        if name in ("supervised", "ppo", "critic"):  # loss and gradient norm before one
            assert two[name] == pytest.approx(values, rel=1e-5), name


@pytest.mark.parametrize("family", CORE)
def test_two_ranks_with_uneven_work_equal_one(family: str, one_rank: Results, two_ranks: Results) -> None:
    one, two = one_rank[f"zero3_rank.{family}", 0], two_ranks[f"zero3_rank.{family}", 3]
    check_equal(one["numbers"], two["numbers"])


@pytest.mark.slow
def test_every_family_and_its_heads_too(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    programs = {f"zero3_heads_rank.{family}" for family in SHARING[1:]}
    programs |= {f"zero3_rank.{family}" for family in SHARING if family not in CORE}
    results = []
    for world_size, stage in ((1, 0), (2, 3)):
        (folder := tmp_path / str(world_size)).mkdir()
        results.append(Results(world_size, folder, tiny_models, dict.fromkeys(sorted(programs), (stage,))))
    assert len(results[0]) == len(programs)
    for (name, _), one in results[0].items():
        check_equal(one["numbers"], results[1][name, 3]["numbers"])


@pytest.mark.parametrize("family", CORE)
def test_activations_are_computed_again_in_text_and_tower(family: str, one_rank: Results, two_ranks: Results) -> None:
    assert not one_rank[f"zero3_rank.{family}", 0]["again"]
    again = two_ranks[f"zero3_rank.{family}", 3]["again"]
    assert len(again) == (1 if family in ("qwen2", "qwen3") else 2) and min(again.values()) > 3, again
