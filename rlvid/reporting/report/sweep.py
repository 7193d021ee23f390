"""The page of a sweep: a table of its trials, parallel coordinates, and the curves of the metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlvid.files import write_atomic
from rlvid.reporting.report import charts
from rlvid.reporting.report.page import template
from rlvid.reporting.report.parallel_coordinates import Dimension, parallel_coordinates

MAX_CURVES = 6  # as many as there are colours; of the best trials


@dataclass(frozen=True)
class TrialRow:
    """How a trial ended."""

    trial_id: str
    values: Mapping[str, Any]  # hyperparameters, by key
    value: float | None  # the metric's last value; None: never reached
    step: int
    curve: tuple[tuple[int, float], ...]  # (step, value)
    is_stopped: bool  # before its last step, by the scheduler
    error: str | None
    seconds: float

    @property
    def state(self) -> str:
        if self.error:
            return f"failed: {self.error}"
        return f"stopped at step {self.step}" if self.is_stopped else "done"


def write_sweep(
    file: Path, metric: str, mode: str, rows: Sequence[TrialRow], best: TrialRow, keys: Sequence[str]
) -> Path:
    """Write the page, whole or not at all.

    Args:
        mode: "max" or "min".
        keys: hyperparameters, in the order of the axes.
    """
    judged = [row for row in rows if row.value is not None]
    ranked = sorted(judged, key=lambda row: row.value or 0.0, reverse=mode == "max")
    dimensions = [Dimension(key, [row.values.get(key) for row in judged]) for key in keys]
    dimensions.append(Dimension(metric, [row.value for row in judged]))
    curves = [charts.Series(row.trial_id, row.curve, has_dots=True, is_noisy=False) for row in ranked[:MAX_CURVES]]
    html = template("sweep.html.j2").render(
        metric=metric,
        mode=mode,
        name=file.parent.name,
        keys=keys,
        rows=[*ranked, *(row for row in rows if row.value is None)],
        best=best,
        lines=parallel_coordinates(
            f"hyperparameters and {metric}",
            dimensions,
            [("best" if row is best else "") + (" stopped" if row.is_stopped else "") for row in judged],
            [f"{row.trial_id}: {metric} {charts.number(row.value or 0.0)}, {row.state}" for row in judged],
        ),
        curves=charts.line_chart(f"{metric} over steps", curves),
        legend=list(enumerate(curve.name for curve in curves)),
    )
    write_atomic(file, html.encode("utf-8", "replace"))
    return file
