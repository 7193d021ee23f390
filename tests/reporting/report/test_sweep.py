from pathlib import Path

from rlvid.reporting.report.parallel_coordinates import Dimension, parallel_coordinates
from rlvid.reporting.report.sweep import TrialRow, write_sweep


def test_numbers_over_a_wide_range_are_placed_by_their_logarithm() -> None:
    assert Dimension("lr", [1e-6, 1e-4, 1e-2]).places() == ([0.0, 0.5, 1.0], "1e−6", "0.01")
    assert Dimension("beta", [1.0, 2.0, 3.0]).places()[0] == [0.0, 0.5, 1.0]


def test_words_are_placed_in_order_of_appearance() -> None:
    assert Dimension("loss", ["ipo", "kto", "ipo", "simpo"]).places() == ([0.0, 0.5, 0.0, 1.0], "ipo", "simpo")


def test_one_value_lies_in_the_middle() -> None:
    assert Dimension("beta", [0.1, 0.1]).places()[0] == [0.5, 0.5]


def test_the_best_line_is_drawn_last() -> None:
    dimensions = [Dimension("a", [1, 2]), Dimension("b", [1, 2])]
    picture = str(parallel_coordinates("x", dimensions, ["best", " stopped"], ["one", "two <"]))
    assert picture.index("one") > picture.index("two &lt;")


def trial(name: str, value: float | None, **more: object) -> TrialRow:
    curve = () if value is None else ((0, 0.5), (10, value))
    fields = {"is_stopped": False, "error": None, "seconds": 3.0, "values": {"dpo.beta": 0.1, "dpo.loss": name}}
    return TrialRow(trial_id=name, value=value, step=10 if value else 0, curve=curve, **(fields | more))  # type: ignore[arg-type]


def test_the_page_has_every_trial_best_first_and_escapes_what_it_is_told(tmp_path: Path) -> None:
    best, worse = trial("kto", 0.9), trial("ipo", 0.6, is_stopped=True)
    failed = trial("simpo", None, error="<script>alert(1)</script>")
    file = write_sweep(
        tmp_path / "sweep.html", "eval/accuracy", "max", [worse, failed, best], best, ["dpo.beta", "dpo.loss"]
    )
    page = file.read_text()
    rows = page[page.index("<tbody>") : page.index("</tbody>")]
    assert rows.index("kto") < rows.index("ipo") < rows.index("simpo")
    assert "stopped at step 10" in rows and "&lt;script&gt;" in rows and "<script>" not in page
    assert page.count("<svg") == 2 and [p.name for p in tmp_path.iterdir()] == ["sweep.html"]
