import dataclasses
import json
from pathlib import Path

import pytest

from rlvid.data.manifest import load_manifest
from rlvid.data.preferences import pair_row, pairs_of
from rlvid.errors import UserError
from rlvid.files import write_rows
from rlvid.types import Medium, MediumRef, Message, Preference, Sample

ROW = {"id": "a", "video": "a.mp4", "question": "What moves?", "chosen": "A circle.", "rejected": "A square."}


def load(tmp_path: Path, *rows: dict[str, object]):  # type: ignore[no-untyped-def]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read(file)


def read(file: Path, root: Path | None = None) -> list[Preference]:
    return pairs_of(file, load_manifest(file, root, None, "", needs_answer=False))


def test_a_row_is_a_prompt_and_two_responses(tmp_path: Path) -> None:
    (pair,) = load(tmp_path, {**ROW, "judge": "self", "iteration": 2})
    assert (pair.chosen, pair.rejected) == ("A circle.", "A square.")
    assert pair.sample.media == (Medium(str(tmp_path / "a.mp4")),)
    assert pair.sample.answer == ""
    assert pair.meta == {"judge": "self", "iteration": 2}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    write_rows(tmp_path / "out.jsonl", [ROW, {**ROW, "id": "b", "rejected": "Ein Kreis, größer"}])
    pairs = read(tmp_path / "out.jsonl")
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


def test_a_pair_written_as_a_row_is_read_as_the_same_pair(tmp_path: Path) -> None:
    video = Medium(str(tmp_path / "clips" / "a.mp4"))
    part = Medium(video.path, start_s=1.0, end_s=2.5, fps=2.0, max_pixels=5000)
    outside = Medium(str(tmp_path / "iterations" / "01" / "b.mp4"))
    turns = (
        Message("system", ("Be brief.",)),
        Message("user", (MediumRef(0), "What?")),
        Message("assistant", ("A dog.",)),
        Message("user", ("Where?",)),
    )
    samples = [
        Sample("a", (video,), (Message("user", (MediumRef(0), "What?\nA. x")),), "x", problem_type="kind"),
        Sample("b", (), (Message("user", ("What?",)),), ""),
        Sample("c", (video, video), (Message("user", (MediumRef(0), MediumRef(1), "Which?")),), ""),
        Sample("d", (video,), turns, "lawn"),
        Sample("e", (video,), (Message("user", ("Look: ", MediumRef(0), "What?")),), ""),
        Sample("f", (part,), (Message("user", (MediumRef(0), "What?")),), ""),
        Sample("g", (outside,), (Message("user", (MediumRef(0), "What?")),), ""),
    ]
    pairs = [Preference(s, "this one", "that one", {"judge": "me", "iteration": 1}) for s in samples]
    folder = tmp_path / "iterations" / "01"
    folder.mkdir(parents=True)
    write_rows(folder / "pairs.jsonl", [pair_row(p) for p in pairs])
    again = read(folder / "pairs.jsonl", tmp_path)
    assert [dataclasses.replace(p, sample=dataclasses.replace(p.sample, extra={})) for p in again] == pairs


def test_all_bad_pairs_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, {**ROW, "rejected": ""}, {**ROW, "id": "b"}, {**ROW, "id": "c", "rejected": "A circle."})
    assert [line.split(": ")[1] for line in str(error.value).split("\n")] == ["row 'a'", "row 'c'"]
