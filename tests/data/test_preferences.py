import json
from pathlib import Path

import pytest

from rlvid.data.preferences import load_preferences, write_preferences
from rlvid.errors import UserError

ROW = {"id": "a", "video": "a.mp4", "question": "What moves?", "chosen": "A circle.", "rejected": "A square."}


def load(tmp_path: Path, *rows: dict[str, object]):  # type: ignore[no-untyped-def]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_preferences(file, None, None, "")


def test_a_row_is_a_prompt_and_two_responses(tmp_path: Path) -> None:
    (pair,) = load(tmp_path, {**ROW, "judge": "self", "iteration": 2})
    assert (pair.chosen, pair.rejected) == ("A circle.", "A square.")
    assert pair.sample.videos == (str(tmp_path / "a.mp4"),)
    assert pair.sample.answer == ""
    assert pair.meta == {"judge": "self", "iteration": 2}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    write_preferences(tmp_path / "out.jsonl", [ROW, {**ROW, "id": "b", "rejected": "Ein Kreis, größer"}])
    pairs = load_preferences(tmp_path / "out.jsonl", None, None, "")
    assert [(p.sample.id, p.rejected) for p in pairs] == [("a", "A square."), ("b", "Ein Kreis, größer")]
    assert list(tmp_path.iterdir()) == [tmp_path / "out.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": "A circle."}, "row 'a': chosen and rejected are the same"),
        ({"rejected": " "}, "row 'a': rejected is missing or empty"),
        ({"chosen": None}, "row 'a': chosen is missing or empty"),
        ({"chosen": ["A circle."]}, "row 'a': chosen is missing or empty"),
        ({"question": ""}, "question is missing or empty"),
    ],
)
def test_a_bad_pair_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path, {**ROW, **change})
    assert str(tmp_path / "pairs.jsonl") in str(error.value)
