from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.demo_seeds import ALL, KindRow, SeedResult, by_kind, figures, read_result, show
from rlvid.reporting import rollout_tables

KIND_OF = {"a": "colour", "b": "count", "c": "count"}
METRICS = [
    {"step": 1, "phase": "warm_start", "warm_start/loss": 2.0},
    {"step": 0, "eval/n": 4, "eval/accuracy": 0.5, "eval/accuracy/colour": 0.75, "eval/accuracy/count": 0.25},
    {"step": 1, "groups/zero_variance": 0.25, "policy/entropy": 0.8},
    {"step": 2, "groups/zero_variance": 0.75, "policy/entropy": 0.4},
    {"step": 1, "eval/n": 4, "eval/accuracy": 0.6, "eval/accuracy/colour": 0.7, "eval/accuracy/count": 0.5},
    {"step": 2, "eval/n": 4, "eval/accuracy": 0.9, "eval/accuracy/colour": 1.0, "eval/accuracy/count": 0.8},
]


def response(sample_id: str, index: int, reward: float, logprob_mean: float, n_tokens: int) -> dict[str, object]:
    texts = {"question": "?", "answer": "", "response": "", "reward_parts": "{}", "weight_versions": "[]"}

    numbers = {
        "step": 10,
        "group_index": index,
        "advantage": 0.0,
        "invalid_reason": None,
        "n_tokens": n_tokens,
        "logprob_mean": logprob_mean,
    }
    return {"sample_id": sample_id, "reward_total": reward, "finish_reason": "stop", **texts, **numbers}


RESPONSES = [
    response("a", 0, 1.0, -0.5, 2),
    response("a", 1, 1.0, -0.2, 3),
    response("b", 0, 0.0, -1.0, 1),
    response("b", 1, 1.0, -3.0, 1),
    response("c", 0, 0.0, -1.0, 1),
    response("c", 1, 0.0, -1.0, 1),
]


def test_table_has_first_and_last_evaluation_and_the_groups_of_each_kind() -> None:
    table = by_kind(METRICS, RESPONSES, KIND_OF)
    assert list(table) == ["colour", "count", ALL]
    assert table["colour"] == KindRow(0.75, 1.0, no_gradient=1.0, entropy=pytest.approx(1.6 / 5))
    assert table["count"] == KindRow(0.25, 0.8, no_gradient=0.5, entropy=pytest.approx(6 / 4))
    assert table[ALL] == KindRow(0.5, 0.9, no_gradient=0.5, entropy=pytest.approx(0.6))


def test_kind_without_a_rollout_has_only_accuracies() -> None:
    row = by_kind(METRICS, RESPONSES[:2], KIND_OF)["count"]
    assert (row.before, row.after) == (0.25, 0.8)
    assert math.isnan(row.no_gradient) and math.isnan(row.entropy)


def test_figures_are_the_worst_over_seeds_and_the_mean() -> None:
    def result(seed: int, before: float, after: float, seconds: float) -> SeedResult:
        return SeedResult(seed, seconds, {ALL: KindRow(before, after, 0.5, 0.5)})

    assert figures([result(1, 0.25, 1.0, 100.0), result(2, 0.625, 0.875, 200.0)]) == {
        "min_after": 0.875,
        "mean_after": 0.9375,
        "min_gain": 0.25,
        "max_seconds": 200.0,
    }


def test_result_of_a_run_folder_is_read_and_printed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    manifest = [{"id": name, "problem_type": kind} for name, kind in KIND_OF.items()]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in manifest))
    (tmp_path / "wall_seconds.json").write_text("123.4")
    rollout_tables.write(tmp_path, 10, RESPONSES, {})
    result = read_result(5, tmp_path)
    assert result == SeedResult(5, 123.4, by_kind(METRICS, RESPONSES, KIND_OF))
    lines = show(result).splitlines()
    assert lines[0] == "seed 5: 123 s"
    assert [line.split() for line in lines[2:]] == [
        ["colour", "75.0", "100.0", "1.00", "0.320"],
        ["count", "25.0", "80.0", "0.50", "1.500"],
        ["all", "50.0", "90.0", "0.50", "0.600"],
    ]
