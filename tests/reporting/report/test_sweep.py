from __future__ import annotations

import re
from pathlib import Path

from rlvid.config import TuneJobConfig
from rlvid.reporting.report.charts import Point, scatter_chart
from rlvid.reporting.report.sweep import TrialRow, write_sweep


def places(picture: object) -> list[float]:
    return [float(x) for x in re.findall(r'<circle[^>]* cx="([\d.]+)"', str(picture))]


def test_a_value_drawn_over_its_logarithm_lies_on_a_logarithmic_axis() -> None:
    points = [Point(x, 0.5, str(x)) for x in (1e-6, 1e-4, 1e-2)]
    low, middle, high = places(scatter_chart("lr", points, is_log=True))
    assert abs((middle - low) - (high - middle)) < 0.2 and middle > low
    low, middle, high = places(scatter_chart("lr", points))
    assert middle - low < 0.02 * (high - low)


def test_words_are_on_the_axis_in_order_of_appearance() -> None:
    x = places(scatter_chart("loss", [Point(word, 0.5, word) for word in ("ipo", "kto", "ipo", "simpo")]))
    assert x[0] == x[2] < x[1] < x[3]


def test_the_best_dot_is_drawn_last_and_names_are_escaped() -> None:
    picture = str(scatter_chart("x", [Point(1, 0.1, "one", is_best=True), Point(2, 0.2, "two <")]))
    assert picture.index("one") > picture.index("two &lt;")


def test_one_value_is_drawn() -> None:
    assert len(places(scatter_chart("beta", [Point(0.1, 0.5, "a"), Point(0.1, 0.6, "b")]))) == 2


SPACE = {"dpo.beta": {"loguniform": [1e-4, 1]}, "dpo.loss": {"grid": ["kto", "ipo", "simpo"]}}
SWEEP = TuneJobConfig.model_validate({"job": "dpo", "config": "dpo.yaml", "space": SPACE})


def trial(name: str, value: float | None, **more: object) -> TrialRow:
    curve = () if value is None else ((0, 0.5), (10, value))
    fields = {"is_stopped": False, "error": None, "seconds": 3.0, "values": {"dpo.beta": 0.1, "dpo.loss": name}}
    return TrialRow(trial_id=name, value=value, step=10 if value else 0, curve=curve, **(fields | more))  # type: ignore[arg-type]


def test_the_page_has_every_trial_best_first_and_escapes_text(tmp_path: Path) -> None:
    best, worse = trial("kto", 0.9), trial("ipo", 0.6, is_stopped=True)
    (tmp_path / "trials" / "kto").mkdir(parents=True)
    (tmp_path / "trials" / "kto" / "report.html").touch()
    failed = trial("simpo", None, error="<script>alert(1)</script>")
    file = write_sweep(tmp_path / "sweep.html", SWEEP, [worse, failed, best], best)
    page = file.read_text()
    rows = page[page.index("<tbody>") : page.index("</tbody>")]
    assert rows.index("kto") < rows.index("ipo") < rows.index("simpo")
    assert "stopped at step 10" in rows and "&lt;script&gt;" in rows and "<script>" not in page
    assert page.count("<svg") == 3 and '<a href="trials/kto/report.html">kto</a>' in rows and rows.count("<a ") == 1
