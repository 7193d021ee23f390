import gzip
import json
import lzma
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlvid.data.manifest import count_media, load_manifest
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


@pytest.mark.parametrize(
    ("fields", "paths", "content"),
    [
        ({"question": "<video>What?"}, ["a.mp4"], (MediumRef(0), "What?")),
        ({"question": "<video>\nWhat?"}, ["a.mp4"], (MediumRef(0), "What?")),
        ({"question": "Look: <video>"}, ["a.mp4"], ("Look: ", MediumRef(0))),
        (
            {"question": "Is <video> like <video>?", "video": ["a.mp4", "b.mp4"]},
            ["a.mp4", "b.mp4"],
            ("Is ", MediumRef(0), " like ", MediumRef(1), "?"),
        ),
        (
            {"question": "<image>, <video>?", "image": "c.png"},
            ["c.png", "a.mp4"],
            (MediumRef(0), ", ", MediumRef(1), "?"),
        ),
    ],
)
def test_a_placeholder_says_where_its_medium_is(
    tmp_path: Path, fields: dict[str, Any], paths: list[str], content: tuple[Any, ...]
) -> None:
    [sample] = load(write(tmp_path, changed(**fields)))
    assert sample.messages[0].content == content
    assert [medium.path for medium in sample.media] == [str(tmp_path / path) for path in paths]


def test_the_suffix_follows_a_question_that_ends_with_a_placeholder(tmp_path: Path) -> None:
    [sample] = load(write(tmp_path, changed(question="Look: <video>")), suffix="One word.")
    assert sample.messages[0].content == ("Look: ", MediumRef(0), "One word.")


def test_images_are_understood(tmp_path: Path) -> None:
    [sample] = load(write(tmp_path, changed(video=None, image=["a.png", "b.jpg"])))
    assert sample.media == (Medium(str(tmp_path / "a.png"), "image"), Medium(str(tmp_path / "b.jpg"), "image"))
    row = turns(("user", [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]))
    [sample] = load(write(tmp_path, row))
    assert sample.media == (Medium(str(tmp_path / "a.png"), "image"),)


def test_a_list_of_pictures_is_one_video(tmp_path: Path) -> None:
    names = ["f/1.jpg", "f/2.JPG", "f/3.png"]
    paths = tuple(str(tmp_path / name) for name in names)
    medium = Medium(paths[0], "video", end_s=1.0, pictures=paths, pictures_per_s=2.0)
    how = {"fps": 2, "video_end": 1}
    assert load(write(tmp_path, changed(video=names, **how)))[0].media == (medium,)
    row = turns(("user", [{"type": "video", "video": names, **how}, {"type": "text", "text": "What?"}]))
    assert load(write(tmp_path, row))[0].media == (medium,)
    [sample] = load(write(tmp_path, changed(video=[names[:2], "a.mp4", "b.webp"], fps=2)))
    assert [(m.path, len(m.pictures), m.fps) for m in sample.media] == [
        (paths[0], 2, None),
        (str(tmp_path / "a.mp4"), 0, 2.0),
        (str(tmp_path / "b.webp"), 0, 2.0),
    ]
    rows = load(write(tmp_path, changed(video=names, fps=2), changed(id="2", video=names, fps=2)))
    assert rows[0].media[0] is rows[1].media[0]  # once in memory


PART = {"video_start": 0.5, "video_end": 1, "fps": 2.0, "max_pixels": 50000}


def test_part_and_rate_of_a_row_are_those_of_its_video(tmp_path: Path) -> None:
    medium = Medium(str(tmp_path / "a.mp4"), "video", start_s=0.5, end_s=1.0, fps=2.0, max_pixels=50000)
    assert load(write(tmp_path, changed(**PART)))[0].media == (medium,)
    row = turns(("user", [{"type": "video", "video": "a.mp4", **PART}, {"type": "text", "text": "What?"}]))
    assert load(write(tmp_path, row))[0].media == (medium,)
    assert [m.fps for m in load(write(tmp_path, changed(video=["a.mp4", "b.mp4"], fps=2)))[0].media] == [2.0, 2.0]


SHARED = Path(__file__).parents[3] / "shared" / "trials" / "manifests"


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/trials is not on this machine")
def test_manifests_of_the_trial() -> None:
    [sample] = load(SHARED / "clip_bounds.jsonl")
    assert sample.media[0] == Medium(str(SHARED / "clips/train-000000.mp4"), "video", 0.5, 1.0, 2.0, 50000)
    with pytest.raises(UserError, match="'videos' is not read; write it as 'video'"):
        load(SHARED / "videos_key.jsonl")


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


def test_an_assistants_turn_may_be_marked_for_training(tmp_path: Path) -> None:
    row = turns(("user", "One?"), ("assistant", "a"), ("user", "Two?"), ("assistant", "b"), ("user", "Three?"))
    row["messages"][1]["train"] = True
    row["messages"][3]["train"] = False
    [sample] = load(write(tmp_path, row))
    assert [message.is_marked for message in sample.messages] == [False, True, False, False, False]
    for index, value in ((0, True), (1, "yes")):
        wrong = json.loads(json.dumps(row))
        wrong["messages"][index]["train"] = value
        with pytest.raises(UserError, match=rf"messages\[{index}\].train must be true or false"):
            load(write(tmp_path, wrong))


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


def test_relative_paths_start_at_the_root_and_absolute_ones_may_be_below_it(tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    path = write(folder, changed(video="clips/a.mp4"), changed(id="2", video=str(tmp_path / "clips/b.mp4")))
    with pytest.raises(UserError, match=r"b\.mp4' is not under .*lists; set data\.root to one above all videos"):
        load(path)
    samples = load(path, root=tmp_path)
    assert [s.media[0].path for s in samples] == [str(tmp_path / "clips/a.mp4"), str(tmp_path / "clips/b.mp4")]
    with pytest.raises(UserError, match=r"b\.mp4' is not under .*lists/x; data\.root is this folder"):
        load(path, root=folder / "x")


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
    (changed(answer=["a", "b"]), "names several; a row has one right answer"),
    (changed(question=None), "question is missing"),
    (changed(question=""), "question is missing or empty"),
    (changed(video=""), "video must be a path"),
    (changed(video=3), "video must be a path"),
    (changed(video=[["a.mp4"]]), "video must be a path"),
    (changed(video="a\0.mp4"), "video must be a path"),
    (changed(video="/etc/passwd"), "'/etc/passwd' is not under"),
    (changed(video="file:///a.mp4"), "is a URL"),
    (changed(video="a.jpg"), "video 'a.jpg' is a picture; name it as image, or the list of a video's pictures"),
    (changed(video=["a.jpg", "b.jpg"]), "a video of pictures needs fps"),
    (changed(video=[["a.jpg", "b.mp4"]], fps=1), r"one of pictures, got \['a.jpg', 'b.mp4'\]"),
    (changed(video=["a.jpg", "../b.jpg"], fps=1), "video '../b.jpg' is not under"),
    (changed(fps=0), "fps must be a number of at least"),
    (changed(max_pixels=0.5), "max_pixels must be a number of at least 1"),
    (changed(max_pixels=1.5), "max_pixels must be a whole number"),
    (changed(video_start=-1), "video_start must be a number of at least 0, got -1"),
    (changed(video_start="3"), "video_start must be a number"),
    (changed(video_start=2, video_end=2), r"video_end \(2\) must be after video_start \(2\)"),
    (changed(video=None, video_start=2), "video_start is given, but there is no video"),
    (changed(video=["a.mp4", "b.mp4"], video_end=2), "video_start and video_end are of one video"),
    (changed(nframes=4), "nframes of a single video is not supported; video_start, video_end, fps, max_pixels are"),
    (changed(video=None, videos=["a.mp4"]), "'videos' is not read; write it as 'video'"),
    (changed(video=None, Video="a.mp4"), "'Video' is not read; write it as 'video'"),
    (changed(video=None, images=["a.png"]), "'images' is not read; write it as 'image'"),
    (changed(video=None, images=[{"bytes": "x"}]), "'images' is not read"),
    (changed(video=None, video_path="a"), "'video_path' looks like a medium but is not read"),
    (changed(video_path="a.mp4"), "'video_path' looks like a medium but is not read"),
    (changed(audio="a.wav"), "'audio' looks like a medium"),
    (changed(video=None, path="a.MP4"), "'path' looks like a medium but is not read"),
    (changed(reference_clip="b.mp4"), "'reference_clip' looks like a medium but is not read"),
    (changed(answer=None, Answer="x"), "'Answer' is not read; write it as 'answer'"),
    (changed(video=None, question="<video>What?"), "question has more <video> than the row has media"),
    (changed(question="<video>What is <video>?"), "question has more <video> than"),
    (changed(question="<image>What?"), "question has more <image> than"),
    (changed(video=["a.mp4", "b.mp4"], question="<video>What?"), "question has 1 placeholders but the row has 2 media"),
    (turns(("user", "<video>What?")), r"messages\[0\].content\[0\] has <video> in its text"),
    (changed(problem_type=3), "problem_type must be a text, got a number"),
    (changed(choices="red"), "choices must be a list"),
    (changed(choices=["red", 3]), "choices must be a list"),
    (changed(choices=["red", " "]), "choices must be a list"),
    (changed(choices=["a ball"]), "choices must be 2 to 26"),
    (changed(choices=[str(i) for i in range(27)]), "choices must be 2 to 26"),
    (changed(choices=["red", "blue"]), r"answer 'a ball' names none or several of the choices \['red', 'blue'\]; give"),
    (changed(choices=["red", "blue"], answer="C"), "answer 'C' names none or several of the choices"),
    (changed(choices=["B", "A"], answer="B"), "one choice's text and another one's letter"),
    (changed(choices=["A. red", "B. blue"], answer="A"), "choices have letters of their own"),
    (changed(choices=["red", "blue", "red"], answer="B"), "choice 'red' equals another one"),
    (changed(choices=["red", "Red "], answer="B"), "choice 'Red ' equals another one, or differs from it by case"),
    (changed(choices={"A": "red", "C": "blue"}, answer="A"), "the letters from A on"),
    (changed(choices=["red", "blue", "green"], answer=1), "answer 1 may count the choices from 0 or from 1"),
    (changed(choices=["red", "blue", "green"], answer=4), "answer '4' names none or several of"),
    (changed(choices=["red", "blue", "green"], answer="A, C"), "answer 'A, C' names none or several"),
    (changed(choices=["red", "blue", "green"], answer="AB"), "answer 'AB' names none or several"),
    (changed(choices=["red", "blue", "green"], answer="A. blue"), "answer 'A. blue' names none or several"),
    (changed(answer="<answer> </answer>"), "answer is missing or empty"),
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
    (turns(("user", [{"type": "image", "image": "a.png", "fps": 2}])), "an image has none of video_start"),
    (turns(("user", [{"type": "video", "video": "a.mp4", "nframes": 2}])), "perhaps with video_start, video_end, fps"),
    (turns(("user", [{"type": "video", "video": "a.mp4", "fps": "2"}])), "fps must be a number"),
    (turns(("user", [{"type": "text", "text": "a", "video": "b"}])), r"messages\[0\].content\[0\] must be"),
    (turns(("user", [{"type": "video", "video": "../a.mp4"}])), "is not under"),
    (turns(("assistant", [{"type": "video", "video": "a.mp4"}]), USER), "a video can only be in a user turn"),
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
    with pytest.raises(UserError, match=r"nowhere.jsonl: cannot read the file \(No such file"):
        load(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=r"cannot read the file \(Is a directory"):
        load(tmp_path)


def test_the_first_twenty_wrong_rows_are_shown(tmp_path: Path) -> None:
    rows: list[object] = [changed(id=str(i), answer=None) for i in range(25)]
    with pytest.raises(UserError) as error:
        load(write(tmp_path, changed(id="good"), *rows))
    lines = str(error.value).split("\n")
    assert lines[0].startswith(f"{tmp_path}/train.jsonl:2: answer is missing") and ":21: " in lines[19]
    assert lines[20:] == ["... and 5 more"]


@pytest.mark.parametrize(
    ("choices", "answer", "read"),
    [
        (["yes", "no"], "Yes", "yes"),
        (["yes", "no"], " no ", " no "),
        (["red", "blue"], "(B)", "blue"),
        (["red", "blue"], "b.", "blue"),
        (["red", "blue"], "[A]", "red"),
        (["red", "blue"], "B. Blue", "blue"),
        (["red", "blue"], "(A) red", "red"),
        (["red", "blue", "green"], 0, "red"),
        (["red", "blue", "green"], "3", "green"),
        (["3", "4"], 4, "4"),
        (["1", "2", "3"], "1", "1"),
        ({"B": "blue", "A": "red"}, "blue", "blue"),
        (["red", "blue"], "<answer>B</answer>", "B"),
        (None, " <answer>42</answer>\n", "42"),
        (None, "<think>6 * 7</think><answer>42</answer>", "<think>6 * 7</think><answer>42</answer>"),
    ],
)
def test_an_answer_that_can_mean_one_thing_only_is_accepted(
    tmp_path: Path, choices: Any, answer: Any, read: str
) -> None:
    [sample] = load(write(tmp_path, changed(choices=choices, answer=answer)))
    assert sample.answer == read
    if isinstance(choices, dict):
        assert sample.choices == ("red", "blue")


@pytest.mark.parametrize("value", [7, [3, 8], "v_abc", {"x": 1}, None])
@pytest.mark.parametrize("field", ["video_id", "n_frames", "answers", "frame_rate"])
def test_fields_that_name_no_medium_stay_with_the_sample(tmp_path: Path, field: str, value: Any) -> None:
    row = ROW | {field: value}
    assert load(write(tmp_path, row))[0].extra == {field: value}
    row = turns(("user", [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "?"}]), origin="b.mp4")
    assert load(write(tmp_path, row | {field: value}))[0].extra == {"origin": "b.mp4", field: value}


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read_and_its_wrong_item_named(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROW, changed(id="2")], indent=indent))
    assert [sample.id for sample in load(path)] == ["1", "2"]
    path.write_text(json.dumps([ROW, 3], indent=indent))
    with pytest.raises(UserError, match=r"rows\.json:2: expected a JSON object .* got a number"):
        load(path)
    path.write_text("[" + json.dumps(ROW))
    with pytest.raises(UserError, match=r"rows\.json: not valid JSON"):
        load(path)


def test_parquet_is_read_and_empty_cells_are_absent(tmp_path: Path) -> None:
    rows = [
        changed(difficulty=3) | {"messages": None},
        changed(id="2", video=None),
        turns(("user", "Hello?")) | {"id": "3"},
    ]
    rows[2]["messages"][0]["content"] = [{"type": "text", "text": "Hello?"}, {"type": "video", "video": "a.mp4"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    first, second, third = load(tmp_path / "rows.parquet")
    assert first.extra == {"difficulty": 3} and second.media == () and second.extra == {}
    assert third.messages[0].content == ("Hello?", MediumRef(0))
    (tmp_path / "rows.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:100])
    with pytest.raises(UserError, match=r"rows\.parquet cannot be read as parquet"):
        load(tmp_path / "rows.parquet")


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    text = json.dumps(ROW).encode() + b"\n"
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(text))
    (tmp_path / "a.tsv").write_text("id\tquestion\n1\tWhat?\n")
    (tmp_path / "a.jsonl").write_text("id\tquestion\n1\tWhat?\n")
    for name, message in (("a.jsonl.xz", r"compressed \(xz\)"), ("a.tsv", "pandas"), ("a.jsonl", "pandas")):
        with pytest.raises(UserError, match=f"{name} is .*{message}"):
            load(tmp_path / name)


def test_a_gzipped_manifest_is_read_and_one_that_is_cut_short_is_named(tmp_path: Path) -> None:
    content = gzip.compress(json.dumps(ROW).encode() + b"\n")
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    assert load(tmp_path / "a.jsonl.gz") == load(write(tmp_path, ROW))
    (tmp_path / "a.jsonl.gz").write_bytes(content[:-12])
    with pytest.raises(UserError, match="a.jsonl.gz: cannot read the file"):
        load(tmp_path / "a.jsonl.gz")


def test_rows_of_a_dialect_are_named_with_the_command_that_reads_them(tmp_path: Path) -> None:
    hound = {"id": "a", "video": "v", "prompt": "What?", "chosen": "A dog.", "rejected": "A cat."}
    with pytest.raises(UserError, match=r"look like hound; to read them: rlvid data convert .*jsonl OUT --from hound"):
        load(write(tmp_path, hound))


def test_samples_with_a_video_are_counted(tmp_path: Path) -> None:
    samples = load(write(tmp_path, ROW, changed(id="2", video=None), changed(id="3")))
    assert count_media(samples) == "2 of 3 samples have a video"


def test_200_000_rows_load_fast_and_small(tmp_path: Path) -> None:
    """On this machine the previous loader took 10 s and 0.3 GiB."""
    path = tmp_path / "train.jsonl"
    with path.open("w") as file:
        for i in range(20_000):
            file.write(json.dumps(changed(id=str(i), video=f"clips/{i // 4}.mp4", problem_type="motion")) + "\n")
    tracemalloc.start()
    samples = load(path)
    size = tracemalloc.get_traced_memory()[0] / len(samples)
    tracemalloc.stop()
    begin = time.process_time()
    load(path)
    assert size < 800 and time.process_time() - begin < 2
