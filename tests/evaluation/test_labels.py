from __future__ import annotations

import pytest

from rlvid.evaluation.labels import averages, confusion, label_metrics, read_anywhere, read_strictly

LABELS = ("joy", "statement-opinion", "ask for help")


@pytest.mark.parametrize(
    ("text", "anywhere", "strict"),
    [
        ("emotion: joy", "joy", "joy"),
        ("Joy.", "joy", "joy"),
        ("I think it is joy", "joy", "unknown"),
        ("emotion: [ask for help]", "ask for help", "ask for help"),
        ("joyful", "unknown", "unknown"),  # no word of its own
        ("joy or ask for help", "multi", "unknown"),
        ("", "unknown", "unknown"),
        ("emotion: 'statement-opinion'", "statement-opinion", "statement-opinion"),
    ],
)
def test_both_parsers(text: str, anywhere: str, strict: str) -> None:
    assert (read_anywhere(text, LABELS), read_strictly(text, LABELS, "emotion")) == (anywhere, strict)


def test_the_macro_average_over_the_union_has_the_unread_answers_as_a_class() -> None:
    """Two classes, 3 and 1 samples. a: precision 2/2, recall 2/3; b: precision 1/1, recall 1."""
    metrics = label_metrics(["a", "a", "a", "b"], ["a", "a", "unknown", "b"], ["a", "b"])
    f1 = {"a": 0.8, "b": 1.0}
    assert metrics["accuracy"] == 0.75 and metrics["majority"] == 0.75 and metrics["unknown"] == 0.25
    assert metrics["f1_macro"] == pytest.approx((f1["a"] + f1["b"]) / 2)
    assert metrics["f1_macro_union"] == pytest.approx((f1["a"] + f1["b"] + 0) / 3)
    assert metrics["f1_weighted"] == pytest.approx((3 * f1["a"] + f1["b"]) / 4)
    assert metrics["precision_weighted"] == 1.0
    assert confusion(["a", "a", "a", "b"], ["a", "a", "unknown", "b"], ["a", "b"]) == [[2, 0, 1, 0], [0, 1, 0, 0]]


def test_averages_over_tasks_are_named() -> None:
    tasks = {"small": {"accuracy": 1.0, "n": 1}, "large": {"accuracy": 0.5, "n": 9}}
    assert averages(tasks) == {"accuracy_weighted": pytest.approx(0.55), "accuracy_macro_tasks": 0.75}
