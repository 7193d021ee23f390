"""Accuracy by hand; Spearman by hand, and compared with the stored results of VideoScore itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rlvid.evaluation.metrics import accuracy_metrics, rank_metrics, spearman
from rlvid.rewards.videoscore import DIMS

RESULTS = Path(__file__).parents[3] / "shared" / "data" / "videoscore" / "eval_results" / "video_feedback"
STORED = "spearman_corr_video_feedback.json"

# VideoScore names a row by the text between "_" or before the first ".": two Geminis share a name.
FILES = {
    **{name: (name,) for name in ("BRISQUE", "CLIP-Score", "CLIP-sim", "DINO-sim", "PIQE", "SSIM-dyn", "X-CLIP-Score")},
    "gemini-1": ("gemini-1.5-flash-latest", "gemini-1.5-pro-latest"),
    "gpt4o": ("gpt4o",),
    "idefics1": ("idefics1",),
    "next": ("llava_next",),
    "videoscore": ("videoscore",),
}


def test_sample_weighted_and_macro_differ_when_types_have_different_n() -> None:
    verdicts = [True, True, True, False, False, True]
    types = ["colour", "colour", "colour", "colour", "order", None]
    metrics = accuracy_metrics(verdicts, types)
    assert metrics["accuracy"] == pytest.approx(4 / 6) and metrics["n"] == 6
    assert metrics["accuracy_macro_types"] == pytest.approx((3 / 4 + 1 + 0) / 3) and metrics["n_types"] == 3
    by_type = {name: (metrics[f"accuracy/{name}"], metrics[f"n/{name}"]) for name in ("colour", "no type", "order")}
    assert by_type == {"colour": (0.75, 4), "no type": (1.0, 1), "order": (0.0, 1)}


def test_samples_without_a_verdict_are_counted_separately() -> None:
    metrics = accuracy_metrics([True, None, None, False], ["a", "a", "b", "a"])
    assert (metrics["accuracy"], metrics["n"], metrics["n_invalid"]) == (0.5, 2, 2)
    assert metrics["n/a"] == 2 and "n/b" not in metrics  # nothing is known of b


def test_metric_names_say_the_kind_of_average_and_n() -> None:
    metrics = accuracy_metrics([True, False, True, True], ["a", "a", "b", "b"])
    assert metrics.pop("accuracy_low95") < 0.75 < metrics.pop("accuracy_high95")
    assert metrics == {
        "accuracy": 0.75,
        "accuracy_macro_types": 0.75,
        "n": 4,
        "n_invalid": 0,
        "n_types": 2,
        "accuracy/a": 0.5,
        "n/a": 2,
        "accuracy/b": 1.0,
        "n/b": 2,
    }


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3, 95 %
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        # p = 0: centre and half are both (z^2 / 2n) / (1 + z^2 / n), so 0 to (z^2/n) / (1 + z^2/n); p = 1 likewise
        (0, 4, 0.0, 1.959964**2 / (4 + 1.959964**2)),
        (4, 4, 4 / (4 + 1.959964**2), 1.0),
    ],
)
def test_interval_is_wilsons(correct: int, n: int, low: float, high: float) -> None:
    metrics = accuracy_metrics([True] * correct + [False] * (n - correct), [None] * n)
    assert (metrics["accuracy_low95"], metrics["accuracy_high95"]) == pytest.approx((low, high), abs=5e-5)


def test_no_samples_have_no_accuracy() -> None:
    metrics = accuracy_metrics([], [])
    assert math.isnan(metrics["accuracy"]) and math.isnan(metrics["accuracy_macro_types"])
    assert (metrics["accuracy_low95"], metrics["accuracy_high95"], metrics["n"]) == (0.0, 1.0, 0)


def test_verdicts_without_their_types_are_refused() -> None:
    with pytest.raises(ValueError):
        accuracy_metrics([True], [])


def test_spearman_by_hand() -> None:
    # Ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * 4 / (4 * 15) = 0.6.
    assert spearman([0.1, 0.2, 0.3, 0.4], [2, 1, 4, 3]) == 60.0
    # A tie takes the mean rank: (1, 2, 3) against (1.5, 1.5, 3) is sqrt(3) / 2.
    assert spearman([1, 2, 3], [5, 5, 9]) == pytest.approx(100 * math.sqrt(3) / 2, abs=5e-5)


@pytest.mark.parametrize("columns", [([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [4, 4, 4]), ([2], [3]), ([], [])])
def test_constant_column_has_no_correlation_and_is_left_out_of_the_average(
    columns: tuple[list[int], list[int]],
) -> None:
    assert math.isnan(spearman(*columns))
    metrics = rank_metrics([{"a": 1, "b": 3}, {"a": 2, "b": 3}], [{"b": 1, "a": 1}, {"b": 2, "a": 2}], ("a", "b"))
    assert (metrics["spearman"], metrics["spearman/a"], metrics["n"]) == (100.0, 100.0, 2)
    assert math.isnan(metrics["spearman/b"])


def test_scores_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError):
        spearman([1, 2], [1, 2, 3])


def measured(name: str, rows: int | None = None) -> list[float]:
    """Correlations from a file of VideoScore's benchmark: rows of two lists as text, scored and human."""
    content = json.loads((RESULTS / f"eval_video_feedback_{name}.json").read_text())[:rows]
    scored, human = ([dict(zip(DIMS, json.loads(row[key]), strict=True)) for row in content] for key in ("ans", "ref"))
    metrics = rank_metrics(scored, human, DIMS)
    return [metrics[f"spearman/{dim}"] for dim in DIMS]


@pytest.mark.skipif(not RESULTS.is_dir(), reason="../shared/data/videoscore is not on this machine")
def test_every_stored_correlation_of_videofeedback_is_reproduced() -> None:
    """60 values of 12 metrics and models, some of them from several runs of VideoScore's script."""
    stored = [next(iter(entry.items())) for entry in json.loads((RESULTS / STORED).read_text())]
    assert {name for name, _ in stored} == set(FILES)
    for name, entry in stored:
        # idefics1 was stored when its file had two rows, and three; it has four now.
        counts = (2, 3) if name == "idefics1" else (None,)
        ours = [measured(file, rows) for file in FILES[name] for rows in counts]
        assert any(same(entry["spearman_list"], values) for values in ours), (name, entry["spearman_list"], ours)


def same(stored: list[float | None], ours: list[float]) -> bool:
    return all(
        math.isnan(b) if a is None else abs(a - b) <= 1e-4  # fails for nan too
        for a, b in zip(stored, ours, strict=True)
    )
