import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlvid.data.manifest import load_manifest
from rlvid.errors import UserError
from rlvid.types import Medium, MediumRef, Message, Sample

ROW = {"id": "1", "video": "a.mp4", "question": "What moves?", "answer": "a ball"}


def write(folder: Path, *rows: object) -> Path:
    path = folder / "train.jsonl"
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n")
    return path


def load(path: Path, **options: Any) -> list[Sample]:
    return load_manifest(path, **({"root": None, "system_prompt": None, "suffix": ""} | options))


def changed(**fields: Any) -> dict[str, Any]:
    """ROW with fields changed, or taken out by None."""
    return {name: value for name, value in (ROW | fields).items() if value is not None}


def turns(*turns: tuple[Any, Any], **fields: Any) -> dict[str, Any]:
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"id": "1", "answer": "x", "messages": messages} | fields


def test_question_form(tmp_path: Path) -> None:
    row = changed(video=["clips/a.mp4", "b.mp4"], problem_type="motion", source="made", difficulty=3)
    assert load(write(tmp_path, row)) == [
        Sample(
            id="1",
            media=(Medium(str(tmp_path / "clips/a.mp4")), Medium(str(tmp_path / "b.mp4"))),
            messages=(Message("user", (MediumRef(0), MediumRef(1), "What moves?")),),
            answer="a ball",
            problem_type="motion",
            extra={"source": "made", "difficulty": 3},
        )
    ]


def test_choices_and_suffix_stand_below_the_question(tmp_path: Path) -> None:
    path = write(tmp_path, changed(choices=["a ball", "a box"], answer="B"))
    [sample] = load(path, suffix="Answer with a letter.", system_prompt="Look closely.")
    assert sample.messages == (
        Message("system", ("Look closely.",)),
        Message("user", (MediumRef(0), "What moves?\nA. a ball\nB. a box\nAnswer with a letter.")),
    )
    assert (sample.choices, sample.answer) == (("a ball", "a box"), "B")


def test_text_only_rows_have_no_video(tmp_path: Path) -> None:
    for row in (changed(video=None), changed(video=[])):
        [sample] = load(write(tmp_path, row))
        assert sample.media == () and sample.messages[0].content == ("What moves?",)


def test_literal_video_tag_stays_text(tmp_path: Path) -> None:
    [sample] = load(write(tmp_path, changed(question="<video>What is <video>?")))
    assert sample.messages[0].content == (MediumRef(0), "<video>What is <video>?")


def test_messages_form_keeps_the_order_of_text_and_videos(tmp_path: Path) -> None:
    row = turns(
        ("system", "Be brief."),
        ("user", [{"type": "text", "text": "First"}, {"type": "video", "video": "a.mp4"}]),
        ("assistant", "I see."),
        ("user", [{"type": "video", "video": "b.mp4"}, {"type": "text", "text": "and now?"}]),
        choices=["left", "right"],
        answer="right",
    )
    [sample] = load(write(tmp_path, row), system_prompt="not used", suffix="One word.")
    assert sample.media == (Medium(str(tmp_path / "a.mp4")), Medium(str(tmp_path / "b.mp4")))
    assert sample.messages == (
        Message("system", ("Be brief.",)),
        Message("user", ("First", MediumRef(0))),
        Message("assistant", ("I see.",)),
        Message("user", (MediumRef(1), "and now?\nOne word.")),
    )
    assert sample.choices == ("left", "right") and sample.question == "and now?\nOne word."


def test_suffix_follows_a_video_that_ends_the_last_turn(tmp_path: Path) -> None:
    row = turns(("user", [{"type": "text", "text": "Describe"}, {"type": "video", "video": "a.mp4"}]))
    [sample] = load(write(tmp_path, row), suffix="Briefly.", system_prompt="Hello.")
    assert sample.messages == (Message("system", ("Hello.",)), Message("user", ("Describe", MediumRef(0), "Briefly.")))


def test_numbers_are_taken_as_id_and_answer(tmp_path: Path) -> None:
    [sample] = load(write(tmp_path, changed(id=7, answer=0.5)))
    assert (sample.id, sample.answer) == ("7", "0.5")


def test_blank_lines_byte_order_mark_line_separators_and_crlf(tmp_path: Path) -> None:
    first = json.dumps(changed(question="two\u2028lines"), ensure_ascii=False).encode()
    path = write(tmp_path, b"\xef\xbb\xbf" + first + b"\r", b"", b"  ", changed(id="2"))
    assert [(sample.id, sample.question) for sample in load(path)] == [("1", "two\u2028lines"), ("2", "What moves?")]


def test_answers_can_be_left_out_when_they_are_not_needed(tmp_path: Path) -> None:
    rows = [changed(answer=None), changed(id="2", answer=""), changed(id="3")]
    assert [sample.answer for sample in load(write(tmp_path, *rows), needs_answer=False)] == ["", "", "a ball"]


def test_a_missing_video_file_is_no_error_of_the_manifest(tmp_path: Path) -> None:
    assert load(write(tmp_path, changed(video="nowhere/to/be/found.mp4")))


def test_videos_may_leave_the_manifests_folder_when_the_root_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    path = write(folder, changed(video="../clips/a.mp4"))
    with pytest.raises(UserError, match=r"'\.\./clips/a\.mp4' is not under .*lists; set data\.root"):
        load(path)
    [sample] = load(path, root=tmp_path)
    assert sample.media == (Medium(str(tmp_path / "clips/a.mp4")),)


def test_relative_manifest_and_root_give_absolute_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ROW)
    monkeypatch.chdir(tmp_path)
    [sample] = load(Path("train.jsonl"), root=Path("."))
    assert sample.media == (Medium(os.path.join(os.getcwd(), "a.mp4")),)


@pytest.mark.parametrize("video", ["..", ".", "x/../..", "../lists_too/a.mp4", "a/../../a.mp4"])
def test_paths_out_of_the_root_are_refused(tmp_path: Path, video: str) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    with pytest.raises(UserError, match="train.jsonl:1: video .* is not under"):
        load(write(folder, changed(video=video)))


USER = ("user", "Hello?")
BAD_ROWS = [
    (b"{", "not valid JSON"),
    (b'{"id": NaN}', "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"id": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    (b"[1]", "expected a JSON object .* got a list"),
    (b'{"id": "\xff"}', "byte 9 is not UTF-8"),
    (rb'{"id": "\ud800"}', "half of a surrogate pair"),
    (changed(id=None), "id is missing"),
    (changed(id=" "), "id is missing or empty"),
    (changed(id=True), "id is missing"),
    (changed(answer=None), "answer is missing"),
    (changed(answer="\t"), "answer is missing or empty"),
    (changed(answer=["a"]), "answer is missing"),
    (changed(question=None), "question is missing"),
    (changed(question=""), "question is missing or empty"),
    (changed(video=""), "video must be a path"),
    (changed(video=3), "video must be a path"),
    (changed(video=[["a.mp4"]]), "video must be a path"),
    (changed(video="a\0.mp4"), "video must be a path"),
    (changed(video="/etc/passwd"), "absolute; write it relative to the manifest's folder"),
    (changed(problem_type=3), "problem_type must be a text, got a number"),
    (changed(choices="red"), "choices must be a list"),
    (changed(choices=["red", 3]), "choices must be a list"),
    (changed(choices=["red", " "]), "choices must be a list"),
    (changed(choices=["a ball"]), "choices must be 2 to 26"),
    (changed(choices=[str(i) for i in range(27)]), "choices must be 2 to 26"),
    (changed(choices=["red", "blue"]), r"answer 'a ball' is not among the choices \['red', 'blue'\]; give"),
    (changed(choices=["red", "blue"], answer="C"), "answer 'C' is not among the choices"),
    (changed(choices=["B", "A"], answer="B"), "one choice's text and another one's letter"),
    (changed(choices=["A. red", "B. blue"], answer="A"), "choices have letters of their own"),
    (turns(USER, question="What?"), "messages and question do not go together"),
    (turns(USER, video="a.mp4"), "messages and video do not go together"),
    ({"id": "1", "answer": "x", "messages": []}, "messages must be a list"),
    ({"id": "1", "answer": "x", "messages": ["Hello?"]}, r"messages\[0\] must be an object with role and content"),
    (turns(("human", "Hello?")), r"messages\[0\].role must be one of system, user, assistant; got 'human'"),
    (turns(([], "Hello?")), r"messages\[0\].role must be one of"),
    (turns(USER, ("assistant", "Hi.")), "the last of messages is from the assistant; end with the user turn"),
    (turns(USER, ("system", "Late."), USER), r"messages\[1\]: a system turn can only be the first"),
    (turns(("user", "")), r'messages\[0\].content\[0\] must be {"type": "text"'),
    (turns(("user", [])), r"messages\[0\].content must be a text or a list"),
    (turns(("user", 3)), r"messages\[0\].content must be a text or a list"),
    (turns(("user", ["Hello?"])), r"messages\[0\].content\[0\] must be"),
    (turns(("user", [{"type": "image", "image": "a.png"}])), r"messages\[0\].content\[0\] must be"),
    (turns(("user", [{"type": "text", "text": "a", "video": "b"}])), r"messages\[0\].content\[0\] must be"),
    (turns(("user", [{"type": "video", "video": "../a.mp4"}])), "is not under"),
    (turns(("assistant", [{"type": "video", "video": "a.mp4"}]), USER), "a video can only stand in a user turn"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[message for _, message in BAD_ROWS])
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path, changed(id="good"), b"", row)
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert str(error.value).startswith(f"{path}:3: ")


def test_a_second_row_of_the_same_id_names_the_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.jsonl:3: id '1' is that of line 1 already"):
        load(write(tmp_path, changed(id=1), changed(id="2"), changed(id="1")))


def test_empty_and_missing_manifests(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train.jsonl: the manifest has no rows"):
        load(write(tmp_path, b"", b" "))
    with pytest.raises(UserError, match=r"nowhere.jsonl: cannot read the manifest \(No such file"):
        load(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=r"cannot read the manifest \(Is a directory"):
        load(tmp_path)
