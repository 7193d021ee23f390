"""A published item becomes a row of a manifest, the row an item again, and that the same row: nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.cli import main
from rlvid.data.dialects import DIALECTS
from rlvid.data.dialects.conversion import convert, write_as
from rlvid.data.dialects.dialect import Roots
from rlvid.data.dialects.mesc import CLIPS_KEY
from rlvid.data.dialects.mmla import TASKS
from rlvid.data.dialects.videofeedback import RUBRIC
from rlvid.errors import UserError
from rlvid.rewards.videoscore import DIMS

FRAMES = [f"frames/{i}.jpg" for i in range(3)]

texts = st.text("abz .,:?\n'\"<é你😀", min_size=1, max_size=20).map(str.strip).filter(bool)
lines = texts.map(lambda text: text.replace("\n", " "))
two_texts = st.tuples(texts, texts).filter(lambda pair: pair[0] != pair[1])
videos = st.sampled_from(["a.mp4", "b.webm", "frames"])
media = st.lists(st.sampled_from(["<video>", "<image>"]), max_size=3)
scores = st.fixed_dictionaries({name: st.integers(1, 4).map(float) for name in DIMS})
labels = st.sampled_from(TASKS["MELD"].labels.split(", "))


@st.composite
def conversations(draw: st.DrawFn, keys: dict[str, str], turns_key: str, names: tuple[str, str, str, str]) -> Any:
    """Some turns with placeholders, the media that they stand for, and a system turn."""
    role, text, user, assistant = names
    turns = [{role: "system", text: draw(texts)}] if draw(st.booleans()) else []
    found: dict[str, list[str]] = {"<video>": [], "<image>": []}
    for _ in range(draw(st.integers(1, 3))):
        words = draw(texts)
        for place in draw(media):
            found[place].append(draw(videos) if place == "<video>" else draw(st.sampled_from(["c.png", "d.jpg"])))
            words += f"{place}{draw(texts)}"
        turns += [{role: user, text: words}, {role: assistant, text: draw(texts)}]
    return {turns_key: turns, "task": "told"} | {keys[place]: paths for place, paths in found.items() if paths}


PLURAL, SINGULAR = {"<video>": "videos", "<image>": "images"}, {"<video>": "video", "<image>": "image"}
ITEMS = {
    "sharegpt": conversations(PLURAL, "conversations", ("from", "value", "human", "gpt")),
    "swift": conversations(PLURAL, "messages", ("role", "content", "user", "assistant")),
    "llava": conversations(SINGULAR, "conversations", ("from", "value", "human", "gpt")),
    "hound": st.builds(
        lambda video, question, pair, score: {
            **{"video": video, "prompt": f"<video>\n{question}", "chosen": pair[0], "rejected": pair[1]},
            **({"answer": question, "chosen_score": score} if score else {}),
        },
        *(videos, texts, two_texts, st.integers(0, 5)),
    ),
    "rlaif": st.builds(
        lambda question, pair, preference: {
            "conversations": [{"from": "human", "value": f"<image>\n{question}"}],
            **{f"output_{i}": {"from": f"llm_{i}", "value": pair[i - 1]} for i in (1, 2)},
            **{"preference": preference, "images": FRAMES},
        },
        *(texts, two_texts, st.sampled_from([1, 2])),
    ),
    "video_r1": st.builds(
        lambda kind, question, answer, options, process: {
            **{"data_type": kind, "path": "a.mp4" if kind == "video" else "c.png", "problem": question},
            **{"options": options, "solution": f"<answer>{answer}</answer>", "problem_type": "free-form"},
            **({"process": process, "data_source": "told"} if process else {}),
        },
        *(st.sampled_from(["video", "image"]), texts, lines, st.lists(lines, max_size=3), st.text("ab ", max_size=5)),
    ),
    "videofeedback": st.builds(
        lambda caption, given, is_video: {
            **{"prompt": RUBRIC.question(caption), "labels": given, "text_prompt": caption},
            **({"video": "a.mp4"} if is_video else {"images": FRAMES}),
        },
        *(texts, scores, st.booleans()),
    ),
    "mesc": st.builds(
        lambda clips, history, said, situation, client, emotion, strategy, answer: {
            **{"Dialogue_ID": 7, CLIPS_KEY: clips, "utt_user_most_recent": said, "situation": situation},
            **{"Utterance": answer, "Emotion": [emotion], "Strategy": strategy, "get_emotion_user_most_recent": client},
            "history_chat": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(history)],
        },
        *(st.lists(videos, max_size=6), st.lists(texts, max_size=9), texts, st.one_of(st.just(""), lines)),
        *(lines, lines, lines, lines),
    ),
    "mmla": st.builds(lambda text, label: {"text": text, "emotion": label}, lines, labels),
    "mmla_text": st.builds(lambda text, label: {"text": text, "emotion": label}, lines, labels),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    clips = [f"video/MELD_{i}.mp4" for i in range(4)]
    for name in ("a.mp4", "b.webm", "c.png", "d.jpg", *FRAMES, *clips):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


def rows_of(source: Path, out: Path, dialect: str, root: Path) -> list[dict[str, Any]]:
    made = convert(source, out, DIALECTS[dialect], Roots(root))
    assert made.n_refused == 0, (out / "refused.jsonl").read_text()
    return [json.loads(line) for line in made.manifest.read_text(encoding="utf-8").splitlines()]


def test_every_dialect_is_tried() -> None:
    assert ITEMS.keys() == DIALECTS.keys()


@pytest.mark.parametrize("dialect", ITEMS)
def test_nothing_is_lost(dialect: str, folder: Path, tmp_path: Path) -> None:
    @settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow], deadline=None)
    @given(st.lists(ITEMS[dialect], min_size=1, max_size=4))
    def check(items: list[dict[str, Any]]) -> None:
        published = tmp_path / "MELD"  # of which the rows of a table are
        published.mkdir(exist_ok=True)
        numbered = [{"id": str(i), "problem_id": str(i)} | item for i, item in enumerate(items)]
        source = published / "items.json"
        source.write_text(json.dumps(numbered), encoding="utf-8")
        first = rows_of(source, tmp_path / "first", dialect, folder)
        written = write_as(tmp_path / "first" / "manifest.jsonl", tmp_path / "back", DIALECTS[dialect], folder)
        assert (written.n_rows, written.n_refused) == (len(items), 0)
        assert rows_of(written.manifest, tmp_path / "second", dialect, folder) == first

    check()


def test_a_row_that_a_dialect_cannot_say_is_refused_and_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"id": "part", "video": "a.mp4", "video_start": 1, "question": "What?", "answer": "this"},
        {"id": "whole", "video": "a.mp4", "question": "What?", "answer": "this"},
    ]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["data", "convert", str(manifest), str(tmp_path / "out"), "--videos", str(folder), "--to"]
    assert main([*arguments, "sharegpt"]) == 0
    assert f"{tmp_path / 'out' / 'items.jsonl'}: 1 rows; 1 item refused" in capsys.readouterr().out
    (item,) = map(json.loads, (tmp_path / "out" / "items.jsonl").read_text().splitlines())
    assert item["conversations"][0] == {"from": "human", "value": "<video>What?"}
    assert item["videos"] == [str(folder / "a.mp4")]
    (refused,) = map(json.loads, (tmp_path / "out" / "refused.jsonl").read_text().splitlines())
    assert refused["id"] == "part" and "no parts of a video" in refused["reason"]
    assert main([*arguments, "rlaif"]) == 2
    assert "no item left" in capsys.readouterr().err
    assert main([*arguments, "sharegpt", "--map", "a=b"]) == 2
    assert "have no effect with --to" in capsys.readouterr().err


WHOLE = {"id": "a", "video": "a.mp4", "question": "What?", "answer": "this", "chosen": "b", "rejected": "c"}
TALK = {
    "id": "a",
    "messages": [
        {"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "That.", "train": True},
        {"role": "user", "content": "And then?"},
    ],
    "answer": "this",
    "chosen": "b",
    "rejected": "c",
    "problem_type": "free-form",
}


@pytest.mark.parametrize(
    ("dialect", "row", "reason"),
    [
        ("hound", TALK, "one question about one video"),
        ("video_r1", TALK, "one question about one video"),
        ("video_r1", WHOLE, "the row has no 'problem_type'"),
        ("video_r1", WHOLE | {"video": FRAMES, "fps": 2, "problem_type": "x"}, "no videos that are given as frames"),
        ("hound", WHOLE | {"video": FRAMES, "fps": 3}, "frames must be all pictures of a folder, 2 a second"),
        ("mmla", WHOLE | {"problem_type": "../../elsewhere"}, "is no data set of MMLA"),
        ("mesc", TALK, "the answer must have the lines"),
        ("swift", TALK, "cannot mark the turns"),
    ],
)
def test_what_a_dialect_would_lose_is_refused(
    dialect: str, row: dict[str, Any], reason: str, folder: Path, tmp_path: Path
) -> None:
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"(?s)no item left.*{reason}"):
        write_as(manifest, tmp_path / "out", DIALECTS[dialect], folder)
