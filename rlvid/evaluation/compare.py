"""Comparisons that are fair: two runs on the same samples, and a paper's table with what it really averages."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlvid.errors import UserError
from rlvid.evaluation.metrics import mean
from rlvid.evaluation.predictions import Evaluated
from rlvid.files import dumps, write_atomic
from rlvid.types import Sample

RECORD_FILE = "evaluation.json"
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
class Record:
    """What an evaluation was of, and what it found: what `rlvid eval compare` needs."""

    benchmark: Mapping[str, Any]  # its config
    samples: str  # hash of ids, prompts and right answers
    settings: Mapping[str, Any]  # what else must be equal: frames, and how answers are sampled
    model: Mapping[str, str]  # hashes of the weights, by file
    metrics: Mapping[str, float]
    values: Mapping[str, float | None]

    @classmethod
    def of(cls, cfg: Any, manifest: Mapping[str, Any], asked: Sequence[Sample], found: Evaluated) -> Record:
        """
        Args:
            cfg: of `rlvid eval`.
            manifest: of its run folder.
            asked: its samples, as the model was given them.
        """
        rows = [[s.id, [(m.role, m.text) for m in s.messages], [m.name for m in s.media], s.answer] for s in asked]
        settings = {"video": cfg.video.model_dump(mode="json"), "max_tokens": cfg.rollout.max_tokens}
        return cls(
            cfg.benchmark.model_dump(mode="json") | {"judge_id": manifest.get("judge")},
            hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
            settings | {"rewards": [part.model_dump(mode="json") for part in cfg.rewards]},
            manifest.get("model", {}),
            found.metrics,
            found.values,
        )

    def write(self, folder: Path) -> None:
        write_atomic(folder / RECORD_FILE, dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Record:
        """
        Raises:
            UserError: the folder has no finished evaluation.
        """
        file = folder / RECORD_FILE
        try:
            return cls(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as e:
            raise UserError(f"{file}: expected the record of a finished `rlvid eval` ({e})") from e

    def check_like(self, other: Record, names: tuple[Path, Path]) -> None:
        """
        Raises:
            UserError: the two were not asked the same.
        """
        for what in ("benchmark", "samples", "settings"):
            own, theirs = getattr(self, what), getattr(other, what)
            if own == theirs:
                continue
            if isinstance(own, Mapping):
                keys = [key for key in {**own, **theirs} if own.get(key) != theirs.get(key)]
                differs = "; ".join(f"{key}: {own.get(key)!r} and {theirs.get(key)!r}" for key in keys)
            else:
                differs = "other rows, prompts or right answers"
            raise UserError(f"{names[0]} and {names[1]} cannot be compared, their {what} differ: {differs}")


def compare_runs(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Each run after the first against it: the mean difference of the samples' values, its 95 % interval, and how many
    samples have a value in both.

    Raises:
        UserError: the runs are not alike, or have no sample in common.
    """
    first = Record.read(folders[0])
    found = []
    for folder in folders[1:]:
        other = Record.read(folder)
        first.check_like(other, (folders[0], folder))
        values = [(first.values[name], other.values.get(name)) for name in first.values]
        pairs = [(a, b) for a, b in values if a is not None and b is not None]
        if not pairs:
            raise UserError(f"{folders[0]} and {folder} have no sample with a verdict in both")
        difference, low, high = paired_bootstrap([a for a, _ in pairs], [b for _, b in pairs])
        means = {"value": mean(b for _, b in pairs), "first": mean(a for a, _ in pairs)}
        found.append({"run": str(folder), **means, "difference": difference, "low95": low, "high95": high})
        found[-1] |= {"n": len(pairs), "n_without": len(values) - len(pairs)}
    return found


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
    def weighted_as_printed(self) -> float:
        """The printed average where that is the weighted one: it was made from numbers that were not rounded."""
        return self.printed if self.printed is not None and self.printed_kind == "weighted" else self.weighted

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
    mine, other = ours.weighted_as_printed, theirs.weighted_as_printed
    lines = [
        f"{row.name}, {len(tasks)} tasks: weighted {mine:.2f} against {other:.2f}, difference {mine - other:+.2f}; "
        f"macro {ours.macro:.2f} against {theirs.macro:.2f}, difference {ours.macro - theirs.macro:+.2f}"
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
