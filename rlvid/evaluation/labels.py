"""Answers that name one of a set of labels: how they are read, and their accuracy and F-scores, as MMLA reports them.

MMLA's own parser finds a label anywhere in the answer; `strict` wants "task: label" or the label alone. Both are
reported. Its macro average runs over the true and the predicted classes, so that an answer without a label adds a class
whose F-score is 0: here the macro average over the declared labels has a name of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from rlvid.evaluation.metrics import mean

UNKNOWN, MULTI = "unknown", "multi"


def read_anywhere(text: str, labels: Sequence[str]) -> str:
    """The label that occurs in an answer, as words of its own; "unknown" without one, "multi" with several."""
    text = text.lower()
    found = [label for label in labels if re.search(rf"(?<!\w){re.escape(label.lower())}(?!\w)", text)]
    return found[0] if len(found) == 1 else MULTI if found else UNKNOWN


def read_strictly(text: str, labels: Sequence[str], task: str = "") -> str:
    """The label of an answer that is "task: label" or the label alone; "unknown" for any other."""
    text = " ".join(text.strip().lower().strip("'\"[].").split())
    text = text.removeprefix(f"{task.lower()}:").strip(" '\"[].") if task else text
    return next((label for label in labels if label.lower() == text), UNKNOWN)


def label_metrics(true: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy and F-scores, between 0 and 1, over the samples of one task.

    `accuracy` is sample-weighted; `f1_weighted` and `precision_weighted` weigh classes by their true samples;
    `f1_macro` is the mean over `labels`, `f1_macro_union` that over all classes that are true or predicted, as MMLA
    prints it. `majority` is the accuracy of the most frequent true label.
    """
    from sklearn.metrics import precision_recall_fscore_support  # type: ignore[import-untyped]

    def averages(over: Sequence[str], kind: str) -> tuple[float, float]:
        precision, _, f1, _ = precision_recall_fscore_support(
            list(true), list(predicted), labels=list(over), average=kind, zero_division=0
        )
        return float(precision), float(f1)

    if not true:
        return {"n": 0}
    counts, union = Counter(true), sorted({*true, *predicted})
    precision, f1 = averages(labels, "weighted")
    return {
        "accuracy": mean(t == p for t, p in zip(true, predicted, strict=True)),
        "f1_weighted": f1,
        "precision_weighted": precision,
        "f1_macro": averages(labels, "macro")[1],
        "f1_macro_union": averages(union, "macro")[1],
        "majority": max(counts.values()) / len(true),
        "unknown": mean(p == UNKNOWN for p in predicted),
        "multi": mean(p == MULTI for p in predicted),
        "n": len(true),
    }


def averages(by_task: Mapping[str, Mapping[str, float]], name: str = "accuracy") -> dict[str, float]:
    """A metric over several tasks: `{name}_weighted`, by their numbers of samples, and `{name}_macro_tasks`."""
    total = sum(task["n"] for task in by_task.values())
    weighted = sum(task["n"] * task[name] for task in by_task.values()) / total if total else float("nan")
    return {f"{name}_weighted": weighted, f"{name}_macro_tasks": mean(task[name] for task in by_task.values())}


def confusion(true: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """Numbers of samples [labels, labels + unknown + multi]: rows are the true labels."""
    counts = Counter(zip(true, predicted, strict=True))
    return [[counts[row, column] for column in (*labels, UNKNOWN, MULTI)] for row in labels]
