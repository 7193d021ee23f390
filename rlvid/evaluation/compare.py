"""Comparisons that are fair: two runs on the same samples, and a paper's table with what it really averages."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlvid.errors import UserError
from rlvid.evaluation.metrics import mean

RESAMPLES = 10_000
SIZES = "test_size"  # first column of the row of a table that has the numbers of samples
TOLERANCE = 0.06  # between an average of printed numbers, which are rounded, and the printed average


def paired_bootstrap(one: Sequence[float], other: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """The mean difference other - one of two score columns [n] of the same samples, and its 95 % interval, from
    resampled pairs (Efron and Tibshirani 1993)."""
    differences = np.asarray(other, dtype=float) - np.asarray(one, dtype=float)
    n, rng, means = len(differences), np.random.default_rng(seed), []
    for size in np.diff(np.r_[np.arange(0, RESAMPLES, max(1, 10**6 // n)), RESAMPLES]):  # in parts: memory
        means.append(differences[rng.integers(0, n, (size, n))].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


@dataclass(frozen=True)
class Published:
    """A row of a paper's table: accuracies of tasks, in percent, and the average that it prints."""

    source: str
    model: str
    setting: str
    by_task: Mapping[str, float]
    sizes: Mapping[str, int]  # of all tasks of the table
    printed: float | None

    @property
    def name(self) -> str:
        return f"{self.model} {self.setting} ({self.source})"

    @property
    def weighted(self) -> float:
        """By numbers of samples."""
        total = sum(self.sizes[task] for task in self.by_task)
        return sum(self.sizes[task] * value for task, value in self.by_task.items()) / total

    @property
    def macro(self) -> float:
        return mean(self.by_task.values())

    @property
    def printed_kind(self) -> str | None:
        """Which average the printed one is: "weighted", "macro", or None where it is neither."""
        kinds = {"weighted": self.weighted, "macro": self.macro}
        near = [kind for kind, value in kinds.items() if abs(value - (self.printed or np.inf)) <= TOLERANCE]
        return near[0] if near else None

    def over(self, tasks: Sequence[str]) -> Published:
        """The same row over fewer tasks, without a printed average if that changes it."""
        kept = {task: self.by_task[task] for task in self.by_task if task in tasks}
        printed = self.printed if len(kept) == len(self.by_task) else None
        return Published(self.source, self.model, self.setting, kept, self.sizes, printed)


def read_published(path: Path) -> list[Published]:
    """The rows of a tab-separated table: source, model, setting, a column for each task, reported_avg. One row, whose
    source is "test_size", has the numbers of samples.

    Raises:
        UserError: the file is not of this form.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        tasks = [key for key in rows[0] if key not in ("source", "model", "setting", "reported_avg")]
        (sizes_row,) = [row for row in rows if row["source"] == SIZES]
        sizes = {task: int(sizes_row[task]) for task in tasks}
        return [
            Published(
                row["source"],
                row["model"],
                row["setting"],
                {task: float(row[task]) for task in tasks if row[task].strip()},
                sizes,
                float(row["reported_avg"]) if (row["reported_avg"] or "").strip() else None,
            )
            for row in rows
            if row["source"] != SIZES
        ]
    except (OSError, UnicodeDecodeError, KeyError, IndexError, ValueError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path}: expected a tab-separated table with the columns source, model, setting, one for each task, "
            f"reported_avg, and one row test_size with numbers of samples ({e})"
        ) from e


def against_published(own: Published, row: Published) -> list[str]:
    """Lines on two rows of tables: the difference of their weighted averages over the tasks that both have, and why the
    printed averages must not be compared, where that is so."""
    tasks = [task for task in own.by_task if task in row.by_task]
    if not tasks:
        return [f"{row.name}: it has none of these tasks"]
    ours, theirs = own.over(tasks), row.over(tasks)
    lines = [
        f"{row.name}, {len(tasks)} tasks: weighted {ours.weighted:.2f} against {theirs.weighted:.2f}, "
        f"difference {ours.weighted - theirs.weighted:+.2f}; macro {ours.macro:.2f} against {theirs.macro:.2f}, "
        f"difference {ours.macro - theirs.macro:+.2f}"
    ]
    if own.printed is None or row.printed is None:
        return lines
    if own.printed_kind != row.printed_kind or len(own.by_task) != len(row.by_task):
        kinds = [
            f"{p.printed:.2f} ({p.printed_kind or 'neither weighted nor macro'}, {len(p.by_task)} tasks)"
            for p in (own, row)
        ]
        lines.append(
            f"not comparable as printed: {kinds[0]} and {kinds[1]}; their difference "
            f"{own.printed - row.printed:+.2f} says nothing"
        )
    return lines
