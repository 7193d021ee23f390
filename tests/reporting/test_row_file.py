from __future__ import annotations

from pathlib import Path

import pytest

from rlvid.errors import UserError
from rlvid.reporting.row_file import RowFile


def test_half_a_last_line_is_dropped_and_made_again(tmp_path: Path) -> None:
    path = tmp_path / "stage" / "rows.jsonl"
    RowFile(path).append([{"id": "a", "x": 1}, {"id": "b", "text": "two\nlines"}])
    with path.open("a") as file:
        file.write('{"id": "c", "x"')
    rows = RowFile(path)
    assert rows.missing(["a", "b", "c"]) == ["c"] and rows["b"]["text"] == "two\nlines"
    rows.append([{"id": "c", "x": 3}])
    assert [row["id"] for row in RowFile(path)] == ["a", "b", "c"] and "c" in rows and len(rows) == 3


@pytest.mark.parametrize("line", ["[]", '{"x": 1}', '{"id": "a"}\n{"id": "a"}', "{]"])
def test_rows_that_it_cannot_have_written_are_refused_by_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:\d"):
        RowFile(path)
