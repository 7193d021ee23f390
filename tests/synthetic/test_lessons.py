from __future__ import annotations

import json
from pathlib import Path

from rlvid.data.manifest import load_manifest
from rlvid.rewards.judge_prompts import parse_choice
from rlvid.synthetic.lessons import ANSWERED, make_lessons
from rlvid.synthetic.moving_shapes import possible_answers


def test_lessons_teach_what_the_manifest_says_in_the_judges_words(synthetic: Path) -> None:
    manifest = synthetic / "train.jsonl"
    rows = {row["id"]: row for row in map(json.loads, manifest.read_text().splitlines())}
    path = make_lessons(manifest)
    lessons = load_manifest(path, None, None, "")
    kinds: dict[str, int] = {}
    careless = 0
    for lesson in lessons:
        row = rows[lesson.id.split("#")[0]]
        kinds[lesson.problem_type or ""] = kinds.get(lesson.problem_type or "", 0) + 1
        if lesson.problem_type in ("describe", "correct"):
            assert lesson.answer == row["description"]
        elif lesson.problem_type == "answer":
            assert lesson.question.endswith(row["question"])
            is_told = row["description"] in lesson.question
            assert is_told == lesson.id.endswith("-told")
            assert lesson.answer == row["answer"] or (
                not is_told and lesson.answer == possible_answers(row["problem_type"], row["answer"])[0]
            )
            careless += lesson.answer != row["answer"]
        else:
            chosen = parse_choice(lesson.answer)
            responses = [lesson.question.split(f"<response_{i}> ")[1].split(f" </response_{i}>")[0] for i in (1, 2)]
            assert chosen and responses[chosen - 1] == row["answer"] != responses[2 - chosen]
            assert f"{chosen}: {row['answer']}, right." in lesson.answer and lesson.answer.count(", wrong.") == 1
    assert kinds["describe"] == kinds["correct"] == len(rows) and kinds["answer"] == 2 * -(-len(rows) // ANSWERED)
    assert 0 < careless < kinds["answer"] / 2
    content = path.read_bytes()
    assert make_lessons(manifest).read_bytes() == content


def test_a_description_holds_the_answer(synthetic: Path) -> None:
    for row in map(json.loads, (synthetic / "train.jsonl").read_text().splitlines()):
        assert row["answer"] in row["description"].replace(".", "").replace(",", "").split()
