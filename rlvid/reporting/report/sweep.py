"""Makes the page of a sweep: a summary, the metric over each hyperparameter, a table of the trials, and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rlvid.config import TuneJobConfig
from rlvid.reporting.report import charts
from rlvid.reporting.report.page import duration, write_page

MAX_CURVES = 6  # of the best trials; there are 6 colours


@dataclass(frozen=True)
class TrialRow:
    """How a trial ended."""

    trial_id: str
    values: Mapping[str, Any]  # hyperparameters, by key
    value: float | None  # the last value of the metric; None if there is none
    step: int
    curve: tuple[tuple[int, float], ...]  # (step, value)
    is_stopped: bool  # by the scheduler, before the last step
    error: str | None
    seconds: float

    @property
    def state(self) -> str:
        if self.error:
            return f"failed: {self.error}"
        return f"stopped at step {self.step}" if self.is_stopped else "done"


def write_sweep(file: Path, cfg: TuneJobConfig, rows: Sequence[TrialRow], best: TrialRow) -> Path:
    """Write the page atomically and return `file`. Trials link to their own reports, if these exist."""
    measured = [row for row in rows if row.value is not None]
    ranked = sorted(measured, key=lambda row: row.value or 0.0, reverse=cfg.mode == "max")
    curves = [charts.Series(row.trial_id, row.curve, has_dots=True, is_noisy=False) for row in ranked[:MAX_CURVES]]
    reports = {row.trial_id: f"trials/{row.trial_id}/report.html" for row in rows}
    content = {
        "metric": cfg.metric,
        "mode": cfg.mode,
        "name": file.parent.name,
        "keys": list(cfg.space),
        "rows": [*ranked, *(row for row in rows if row.value is None)],
        "best": best,
        "reports": {name: path for name, path in reports.items() if (file.parent / path).exists()},
        "facts": [
            ("trials", len(rows)),
            ("stopped early", sum(row.is_stopped for row in rows)),
            ("failed", sum(row.error is not None for row in rows)),
            ("time of all trials", duration(sum(row.seconds for row in rows))),
        ],
        "scatters": [(key, _scatter(key, cfg, ranked, best)) for key in cfg.space],
        "curves": charts.line_chart(f"{cfg.metric} over steps", curves),
        "legend": [curve.name for curve in curves],
    }
    write_page(file, "sweep.html.j2", content)
    return file


def _scatter(key: str, cfg: TuneJobConfig, rows: Sequence[TrialRow], best: TrialRow) -> Markup:
    points = [
        charts.Point(x := row.values.get(key), row.value or 0.0, f"{row.trial_id}: {x}, {row.state}", row is best)
        for row in rows
    ]
    return charts.scatter_chart(f"{cfg.metric} over {key}", points, cfg.space[key].loguniform is not None)
