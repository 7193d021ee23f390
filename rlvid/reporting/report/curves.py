"""The charts of the report, made from the metrics that a run has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlvid.reporting.metric_names import CHARTS, METRICS, NO_CHART, WARM_START_CHARTS, Chart, Form, Metric
from rlvid.reporting.report import charts
from rlvid.reporting.report.charts import Series

MAX_OTHER = 40
FORMS: dict[Form, Callable[[float], str]] = {
    "number": charts.number,
    "tenths": charts.number,
    "percent": charts.percent,
    "seconds": charts.seconds,
}
Rows = Mapping[int, Mapping[str, float]]  # step -> metrics


def sections(train: Rows, warm: Rows) -> list[dict[str, Any]]:
    """Sections of the page with their charts; metrics that are in no chart are last, folded."""
    drawn: set[str] = set(NO_CHART)
    found = []
    for title, charts_of_section in CHARTS.items():
        cards = [card for chart in charts_of_section if (card := _card(chart, train, drawn))]
        if title == "Learning":
            cards += [card for chart in WARM_START_CHARTS if (card := _card(chart, warm, set(NO_CHART)))]
        found.append({"title": title, "cards": cards, "is_folded": False})
    others = sorted({key for row in train.values() for key in row} - drawn)[:MAX_OTHER]
    cards = [card for key in others if (card := _card(Chart((key,)), train, set()))]
    found.append({"title": "Other metrics", "cards": cards, "is_folded": True})
    return [section for section in found if section["cards"]]


def _card(chart: Chart, rows: Rows, drawn: set[str]) -> dict[str, Any] | None:
    """A chart with its legend; None if no row has its metrics. Adds the metrics that it shows to `drawn`."""
    keys = _expand(chart.keys, rows, drawn)
    if not keys:
        return None
    drawn |= set(keys)
    main = METRICS.get(keys[0]) or Metric(keys[0])
    title, form = chart.title or main.title, FORMS[chart.form or main.form]
    series = [
        Series(
            _series_name(chart, key),
            [(float(step), row[key]) for step, row in rows.items() if key in row],
            has_dots=key.startswith("eval/"),
            is_noisy=not (key.startswith("eval/") or (key in METRICS and METRICS[key].is_exact)),
        )
        for key in keys
    ]
    if chart.is_stacked:
        picture = charts.stacked_chart(title, series, form)
    else:
        bounds = (0.0, 1.0) if form is charts.percent and "accuracy" in keys[0] else None
        picture = charts.line_chart(title, series, form, bounds, chart.allow_log)
    is_smoothed = not chart.is_stacked and max(charts.smoothing_window(s) for s in series) > 1
    shown = charts.percent_precise if form is charts.percent else form
    return {
        "title": title,
        "unit": main.unit,
        "note": "bold: moving mean" if is_smoothed else "",
        "legend": [(index % 6, s.name, shown(s.points[-1][1])) for index, s in enumerate(series)],
        "has_names": len(series) > 1 or any(key.endswith("*") for key in chart.keys) or bool(main.series),
        "picture": picture,
    }


def _expand(keys: Sequence[str], rows: Rows, drawn: set[str]) -> list[str]:
    known = dict.fromkeys(key for row in rows.values() for key in row if key not in drawn)
    expanded: dict[str, None] = {}
    for key in keys:
        found = [k for k in known if k.startswith(key[:-1])] if key.endswith("*") else [key] if key in known else []
        expanded |= dict.fromkeys(found)
    return list(expanded)


def _series_name(chart: Chart, key: str) -> str:
    if key in METRICS and METRICS[key].series:
        return METRICS[key].series
    prefixes = [pattern[:-1] for pattern in chart.keys if pattern.endswith("*") and key.startswith(pattern[:-1])]
    return key.removeprefix(prefixes[0]) if prefixes else key.split("/")[-1]
