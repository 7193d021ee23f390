"""Makes the page of `rlvid eval`: its metrics, confusion matrices, and examples with their frames, failures first."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlvid.evaluation.predictions import Confusion
from rlvid.reporting.report.page import data_address, write_page


@dataclass(frozen=True)
class Shown:
    """A sample, what was said about it, and its value: 1 is right, None is no verdict."""

    sample_id: str
    turns: Sequence[tuple[str, str]]  # role and text
    right: str
    said: str
    value: float | None
    frames: Sequence[bytes] = ()  # JPEG files
    note: str = ""


def write_evaluation_page(
    file: Path,
    name: str,
    metrics: Mapping[str, float],
    confusions: Sequence[Confusion],
    shown: Sequence[Shown],
) -> None:
    """Write the page atomically.

    Args:
        metrics: flat; "accuracy/MELD" stands in the column accuracy and the row MELD.
    """
    rows: dict[str, dict[str, float]] = defaultdict(dict)
    for key, value in metrics.items():
        metric, _, group = key.partition("/")
        rows[group][metric] = value
    whole, by_group = rows.pop("", {}), dict(rows)
    columns = list(dict.fromkeys(metric for row in by_group.values() for metric in row))
    content = {
        "name": name,
        "facts": [(metric, _shown(value)) for metric, value in whole.items()],
        "columns": columns,
        "rows": [(group, [_shown(row.get(metric)) for metric in columns]) for group, row in by_group.items()],
        "confusions": [
            (c.name, [*c.labels, "unknown", "multi"], list(zip(c.labels, c.counts, strict=True))) for c in confusions
        ],
        "examples": [(one, [data_address(frame) for frame in one.frames]) for one in shown],
    }
    write_page(file, "evaluation.html.j2", content)


def _shown(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.4f}"
