"""Video-R1's problems and MultiMood's dialogues as rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlvid.data.dialects import DIALECTS
from rlvid.data.dialects.conversion import convert
from rlvid.data.dialects.dialect import Roots
from rlvid.data.manifest import load_manifest
from rlvid.types import MediumRef, Sample

R1 = {
    "problem_id": 7,
    "problem": "Which comes first?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. a ball", "B. a box"],
    "process": "<think>The ball.</think>",
    "solution": "<answer>A</answer>",
    "path": "./a.mp4",
    "data_source": "Perception",
}
MESC = {
    "Dialogue_ID": "d1",
    "Utterance": ["I am here."],
    "Emotion": ["neutral"],
    "Strategy": "approval",
    "path_to_vid_user_most_recent": [f"{i}.mp4" for i in range(6)],
    "history_chat": [
        {"role": "system", "content": "old"},
        *({"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(9)),
        {"role": "user", "content": "I lost him."},
    ],
    "utt_user_most_recent": "I lost him.",
    "get_emotion_user_most_recent": "sadness",
    "situation": "grief",
}


def read(folder: Path, dialect: str, *items: dict[str, Any]) -> tuple[list[Sample], list[str]]:
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for name in ("a.mp4", *(f"{i}.mp4" for i in range(6))):
        (folder / name).touch()
    made = convert(folder / "items.jsonl", folder / "out", DIALECTS[dialect], Roots())
    refused = (folder / "out" / "refused.jsonl").read_text().splitlines()
    return load_manifest(made.manifest, folder, None, ""), [json.loads(line)["reason"] for line in refused]


def test_video_r1_keeps_its_options_and_problem_type(tmp_path: Path) -> None:
    free = {**R1, "problem_id": 8, "options": [], "problem_type": "free-form", "solution": "<answer>a cat</answer>"}
    first, second = read(tmp_path, "video_r1", R1, free)[0]
    assert first.question == "Which comes first?\nOptions:\nA. a ball\nB. a box"
    assert (first.id, first.answer, first.problem_type) == ("7", "A", "multiple choice")
    assert first.extra == {"source": "Perception", "reasoning": "<think>The ball.</think>"}
    assert (second.question, second.answer) == ("Which comes first?", "a cat")


def test_a_dialogue_has_its_last_clips_turns_and_four_lines(tmp_path: Path) -> None:
    [sample], _ = read(tmp_path, "mesc", MESC)
    assert [Path(m.path).name for m in sample.media] == ["1.mp4", "2.mp4", "3.mp4", "4.mp4", "5.mp4"]
    system, *history, last = sample.messages
    assert system.text.endswith("The situation: grief") and len(history) == 6  # seven, of which one is asked again
    assert last.content == (*map(MediumRef, range(5)), "I lost him.")
    assert sample.answer.splitlines() == [
        "Client's emotion: sadness",
        "Therapist's emotion: neutral",
        "Therapist's strategy: approval",
        "Therapist's response: I am here.",
    ]


@pytest.mark.parametrize(
    ("dialect", "item", "reason"),
    [
        ("video_r1", {**R1, "data_type": "audio"}, "data_type must be video or image"),
        ("video_r1", {**R1, "solution": "A"}, "solution must be <answer>"),
        ("video_r1", {**R1, "options": "A"}, "options must be a list"),
        ("video_r1", {**R1, "path": "gone.mp4"}, "there is no file gone.mp4"),
        ("mesc", {**MESC, "Strategy": []}, "Strategy is missing"),
        ("mesc", {**MESC, "history_chat": ["x"]}, "history_chat must be a list"),
        ("mesc", {**MESC, "path_to_vid_user_most_recent": "x"}, "must be a list of paths"),
    ],
)
def test_a_wrong_item_is_refused_alone(tmp_path: Path, dialect: str, item: dict[str, Any], reason: str) -> None:
    good = {**R1, "problem_id": 9} if dialect == "video_r1" else MESC
    samples, refused = read(tmp_path, dialect, item, good)
    assert len(samples) == 1 and reason in refused[0]
