from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from rlvid.reporting.report import charts
from rlvid.reporting.report.charts import Series


def svg(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(markup)


def texts(root: ElementTree.Element, kind: str) -> list[str | None]:
    return [element.text for element in root.iter("text") if element.get("class") == kind]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 40, [0, 10, 20, 30, 40]),
        (0.31, 0.98, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3, 5, [-4, -2, 0, 2, 4, 6]),
        (0, 1000, [0, 250, 500, 750, 1000]),
        (7, 7, [7]),
    ],
)
def test_ticks_are_round_and_cover_the_range(low: float, high: float, expected: list[float]) -> None:
    assert charts.nice_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e-3, 0.37, 1.0, 99.0, 123456.0, 1e15])
def test_ticks_are_few_at_every_scale(scale: float) -> None:
    for low, high in ((0.0, scale), (-scale, scale * 1.7), (scale, scale * 1.01)):
        ticks = charts.nice_ticks(low, high)
        assert 2 <= len(ticks) <= 8
        tolerance = 1e-6 * (high - low)
        assert ticks[0] <= low + tolerance and ticks[-1] >= high - tolerance


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.98765, "0.988"),
        (-1.5, "−1.5"),
        (1234.6, "1\u2009235"),
        (2.5e-4, "2.5e−4"),
        (1e-5, "1e−5"),
        (3e7, "3e7"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert charts.number(value) == text


def test_curve_goes_through_its_points() -> None:
    root = svg(charts.line_chart("Reward", [Series("total", [(0, 0.0), (10, 1.0)])], bounds=(0, 1)))
    path = next(root.iter("path")).get("d")
    assert path == f"M48.0 {charts.HEIGHT - 30:.1f}L{charts.WIDTH - 10:.1f} 12.0"
    assert texts(root, "y") == ["0", "0.25", "0.5", "0.75", "1"]
    assert texts(root, "x") == ["0", "2", "4", "6", "8", "10"]


def test_long_noisy_curve_is_smoothed_and_thinned_and_keeps_its_range() -> None:
    points = [(float(step), float(step % 2)) for step in range(1, 1001)]
    root = svg(charts.line_chart("Reward", [Series("total", points)]))
    faint, bold = list(root.iter("path"))
    assert faint.get("class") == "line c0 faint"
    assert len(re.findall("L", bold.get("d") or "")) < 300
    assert texts(root, "x")[-1] == "1\u2009000"
    assert len([rect for rect in root.iter("rect") if rect.get("class") == "hit"]) <= 100


def test_moving_mean_by_hand() -> None:
    points = [(float(i), float(v)) for i, v in enumerate([0, 0, 3, 0, 0])]
    assert charts._moving_mean(points, 3) == [(0, 0), (1, 1), (2, 1), (3, 1), (4, 0)]


def test_evaluations_are_dots_and_never_smoothed() -> None:
    series = Series("held out", [(float(i), 0.5) for i in range(50)], has_dots=True, is_noisy=False)
    root = svg(charts.line_chart("Accuracy", [series]))
    assert len(list(root.iter("circle"))) == 50
    assert len(list(root.iter("path"))) == 1


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0, 1e-9, 3e12])
def test_one_point_and_constant_curves_are_drawn(value: float) -> None:
    for points in ([(3.0, value)], [(1.0, value), (2.0, value)]):
        root = svg(charts.line_chart("x", [Series("a", points)]))
        assert not re.search("nan|inf", ElementTree.tostring(root, encoding="unicode"))
        assert len(texts(root, "y")) >= 2


def test_wide_range_has_a_logarithmic_axis() -> None:
    series = [Series("gap", [(1, 1e-6), (2, 1e-2)])]
    assert texts(svg(charts.line_chart("gap", series, allow_log=True)), "y") == [
        "1e−6",
        "1e−5",
        "1e−4",
        "0.001",
        "0.01",
    ]
    zero = [Series("gap", [(1, 0.0), (2, 1e-2)])]
    assert texts(svg(charts.line_chart("gap", zero, allow_log=True)), "y")[0] == "0"


def test_stacked_bars_reach_the_sum() -> None:
    series = [Series("generate", [(1, 2.0), (2, 2.0)]), Series("train", [(1, 2.0)])]
    root = svg(charts.stacked_chart("Seconds", series))
    bars = [
        (rect.get("class"), float(rect.get("height") or 0))
        for rect in root.iter("rect")
        if "bar" in str(rect.get("class"))
    ]
    plot = charts.HEIGHT - 12 - 30
    assert bars == [("bar c0", plot / 2), ("bar c1", plot / 2), ("bar c0", plot / 2)]
    centres = {
        float(r.get("x") or 0) + float(r.get("width") or 0) / 2
        for r in root.iter("rect")
        if "bar" in str(r.get("class"))
    }
    labels = [float(t.get("x") or 0) for t in root.iter("text") if t.get("class") == "x"]
    assert sorted(centres) == pytest.approx(labels, abs=0.1)
    titles = [title.text for title in root.iter("title")]
    assert titles == ["step 1\ngenerate: 2 s\ntrain: 2 s", "step 2\ngenerate: 2 s\ntrain: 0 s"]


def test_many_stacked_steps_are_averaged() -> None:
    root = svg(charts.stacked_chart("Seconds", [Series("a", [(float(i), 1.0) for i in range(1000)])]))
    assert len([rect for rect in root.iter("rect") if rect.get("class") == "bar c0"]) <= 60


def test_names_are_escaped() -> None:
    hostile = '</title><script>alert("x")</script>'
    for markup in (
        charts.line_chart(hostile, [Series(hostile, [(1, 1.0)])]),
        charts.stacked_chart(hostile, [Series(hostile, [(1, 1.0)])]),
    ):
        assert "<script" not in markup
        assert svg(markup).get("aria-label") == hostile
