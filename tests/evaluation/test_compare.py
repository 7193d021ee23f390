from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlvid.errors import UserError
from rlvid.evaluation.compare import (
    Published,
    Record,
    against_published,
    compare_runs,
    paired_bootstrap,
    read_published,
)

TABLE = Path(__file__).parents[3] / "shared" / "data" / "mmla" / "published_acc_transcribed.tsv"


def test_pairs_are_resampled_together() -> None:
    """Two columns that vary by chance and differ always by 1: the interval has no width."""
    assert paired_bootstrap([0.0, 5.0, 2.0], [1.0, 6.0, 3.0]) == (1.0, 1.0, 1.0)
    mean, low, high = paired_bootstrap([0.0, 0.0] * 50, [0.0, 1.0] * 50)
    assert mean == 0.5 and 0.38 < low < 0.42 and 0.58 < high < 0.62  # +- 1.96 * 0.05


@pytest.mark.skipif(not TABLE.is_file(), reason="the published table is not here")
def test_published_averages_are_what_they_are() -> None:
    rows = read_published(TABLE)
    paper = [row for row in rows if "MMLA figures" in row.source]
    assert len(paper) == 18 and all(abs(round(row.weighted, 2) - (row.printed or 0)) < 0.021 for row in paper)
    assert {row.printed_kind for row in paper} == {"weighted"}
    assert {row.printed_kind for row in rows if row not in paper} == {"macro"}


@pytest.mark.skipif(not TABLE.is_file(), reason="the published table is not here")
@pytest.mark.parametrize(("setting", "true"), [("zero-shot", "+5.59"), ("SFT", "-0.76"), ("IT", "+3.57")])
def test_the_reproductions_comparison_is_flagged_and_put_right(setting: str, true: str) -> None:
    """It puts its macro means beside the paper's weighted ones."""
    own, paper = (
        next(r for r in read_published(TABLE) if (r.model, r.setting) == ("Llama3-8B", setting) and what in r.source)
        for what in ("reproduction", "figures")
    )
    differences, flag = against_published(own, paper)
    assert f"difference {true}; macro" in differences
    assert "not comparable as printed" in flag and "macro, 12 tasks" in flag and "weighted, 12 tasks" in flag


def test_tables_over_other_tasks_are_compared_over_those_of_both() -> None:
    sizes = {"a": 10, "b": 30}
    own = Published("run", "m", "eval", {"a": 50.0}, sizes, None)
    paper = Published("paper", "m", "SFT", {"a": 40.0, "b": 80.0}, sizes, 70.0)
    (line,) = against_published(own, paper)
    assert "1 tasks: weighted 50.00 against 40.00, difference +10.00" in line


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("source\tmodel\nx\ty\n")
    with pytest.raises(UserError, match="expected a tab-separated table"):
        read_published(tmp_path / "t.tsv")


RECORD = Record(
    {"kind": "held_out"}, "abc", {"max_tokens": 8}, {"w": "1"}, {"accuracy": 0.5}, {"1": 0.0, "2": 1.0, "3": None}
)


def test_runs_are_paired_by_sample_and_unlike_ones_are_refused(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abcd"]
    records = [
        RECORD,
        replace(RECORD, model={"w": "2"}, values={"1": 1.0, "2": 1.0, "3": 1.0}),
        replace(RECORD, samples="def"),
        replace(RECORD, settings={"max_tokens": 9}),
    ]
    for folder, record in zip(folders, records, strict=True):
        folder.mkdir()
        record.write(folder)
    (found,) = compare_runs(folders[:2])
    assert (found["difference"], found["n"], found["n_without"]) == (0.5, 2, 1)
    with pytest.raises(UserError, match="their samples differ: other rows, prompts or right answers"):
        compare_runs([folders[0], folders[2]])
    with pytest.raises(UserError, match="their settings differ: max_tokens: 8 and 9"):
        compare_runs([folders[0], folders[3]])
    with pytest.raises(UserError, match=r"expected the record of a finished `rlvid eval`"):
        compare_runs([folders[0], tmp_path])
