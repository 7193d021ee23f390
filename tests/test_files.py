from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rlvid.errors import UserError
from rlvid.files import RowFile, dumps, naming_write_errors, read_rows


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


def test_every_text_is_strict_json_on_one_line() -> None:
    value = {
        "nan": float("nan"),
        "inf": [float("-inf"), np.float32("nan")],
        "scalars": (np.int64(3), torch.tensor(0.5), True, None),
        "path": Path("a/b"),
        3: "line\nend \u2028 \ud800 </script>",
    }
    text = dumps(value)
    assert "\n" not in text and text.isascii()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse) == {
        "nan": None,
        "inf": [None, None],
        "scalars": [3, 0.5, True, None],
        "path": "a/b",
        "3": "line\nend \u2028 \ud800 </script>",
    }


def test_what_has_no_json_is_an_error() -> None:
    with pytest.raises(TypeError, match="no JSON for bytes"):
        dumps({"a": b"x"})


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_in_whatever_words_it_comes(error: Exception) -> None:
    fails = pytest.raises(UserError, match="cannot write the checkpoint step_5: .*; free some space")
    with fails, naming_write_errors("the checkpoint step_5", "free some space"):
        raise error


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(ValueError, match="shapes"), naming_write_errors("x", "y"):
        raise ValueError("shapes differ")


def test_of_a_long_file_some_rows_are_read_and_all_evaluations(tmp_path: Path) -> None:
    rows = [{"step": i} | ({"eval/accuracy": 0.5} if i in (7, 5001) else {}) for i in range(10_000)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_rows(path, max_rows=100, always=b'"eval/')
    assert len(read) == 102 and read[-1] == {"step": 9999} and sum("eval/accuracy" in row for row in read) == 2
    assert read_rows(path) == rows


def test_processes_that_write_the_same_file_do_not_disturb_one_another(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, rlvid.files\nfor _ in range(50): rlvid.files.write_rows(pathlib.Path(sys.argv[1]), rows)"
    )
    rows = [{"id": str(i)} for i in range(2_000)]
    command = [sys.executable, "-c", f"rows = {rows}\n{code}", str(tmp_path / "rows.jsonl")]
    writers = [subprocess.Popen(command) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert read_rows(tmp_path / "rows.jsonl") == rows and len(list(tmp_path.iterdir())) == 1
