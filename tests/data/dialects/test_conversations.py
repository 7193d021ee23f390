"""Conversations of LLaMA-Factory, ms-swift and LLaVA's heirs as samples, and what is wrong with an item."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.specs import read_samples
from rlvid.config import DataConfig
from rlvid.data.dialects import DIALECTS, looks_like
from rlvid.data.dialects.conversion import convert
from rlvid.data.dialects.dialect import Roots
from rlvid.data.manifest import load_manifest
from rlvid.errors import UserError
from rlvid.types import MediumRef, Sample


def test_the_config_knows_all_dialects() -> None:
    (schema,) = (s for s in DataConfig.model_json_schema()["properties"]["dialect"]["anyOf"] if "enum" in s)
    assert schema["enum"] == sorted(DIALECTS)


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


@pytest.fixture
def media(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.mp4", "c.png", "frames/1.jpg", "frames/2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def read(folder: Path, dialect: str, *items: dict[str, Any]) -> tuple[list[Sample], list[str]]:
    """Samples and reasons of refusal, by `data.dialect`; a converted file gives the same."""
    file = folder / "items.json"
    file.write_text(json.dumps(items))
    data = DataConfig(train=file, dialect=dialect, root=folder)  # type: ignore[arg-type]
    rows = read_samples(file, data)
    made = convert(file, folder / "out", DIALECTS[dialect], Roots(folder))
    assert load_manifest(made.manifest, folder, None, "") == list(rows.samples)
    return list(rows.samples), [reason for _, reason in rows.refused]


def test_sharegpt_with_history_and_media_where_their_placeholders_are(media: Path) -> None:
    item = {
        "conversations": [
            human("<video>What moves?"),
            gpt("A ball."),
            human("And in <video>, after <image>?"),
            gpt("A box."),
        ],
        "system": "Be brief.",
        "videos": ["a.mp4", "b.mp4"],
        "images": ["c.png"],
        "video": "not-read.mp4",
    }
    [sample], _ = read(media, "sharegpt", item)
    assert [m.content for m in sample.messages] == [
        ("Be brief.",),
        (MediumRef(0), "What moves?"),
        ("A ball.",),
        ("And in ", MediumRef(1), ", after ", MediumRef(2), "?"),
    ]
    assert [m.role for m in sample.messages] == ["system", "user", "assistant", "user"]
    assert [(m.kind, Path(m.path).name) for m in sample.media] == [
        ("video", "a.mp4"),
        ("video", "b.mp4"),
        ("image", "c.png"),
    ]
    assert (sample.id, sample.answer) == (f"{media.name}-items-1", "A box.")


def test_swift_puts_media_without_a_placeholder_first(media: Path) -> None:
    item = {"query": "And now?", "response": "red", "history": [["What colour?", "blue"]], "videos": ["a.mp4"]}
    placed = {"query": "What is <video>?", "response": "red", "videos": ["a.mp4"]}
    first, second = read(media, "swift", item, placed)[0]
    assert [m.content for m in first.messages] == [(MediumRef(0), "What colour?"), ("blue",), ("And now?",)]
    assert second.messages[0].content == ("What is ", MediumRef(0), "?")


def test_llava_and_its_heirs(media: Path) -> None:
    items = [
        {"id": "llava", "image": "c.png", "conversations": [human("<image>\nWhat?"), gpt("A cup.")]},
        {"id": "next", "video": "a.mp4", "conversations": [human("<image>\nWhat?"), gpt("A cup.")]},
        {"id": "mmla next", "images": "a.mp4", "conversations": [human("<image>\nWhat?"), gpt("A cup.")]},
        {"id": "videollama2", "video": "a.mp4", "conversations": [human("<video>\nWhat?"), gpt("A cup.")]},
        {"id": "videollama3", "video": ["a.mp4"], "conversations": [human("<video>\nWhat?"), gpt("A cup.")]},
        {"id": "hound", "video": "frames", "conversations": [human("<video>\nWhat?"), gpt("A cup.")]},
        {"id": "text", "conversations": [human("What?"), gpt("A cup.")]},
    ]
    samples, refused = read(media, "llava", *items)
    assert not refused and [s.id for s in samples] == [item["id"] for item in items]
    kinds = [[(m.kind, len(m.pictures)) for m in s.media] for s in samples]
    assert kinds == [[("image", 0)], *[[("video", 0)]] * 4, [("video", 2)], []]
    assert all(s.messages[0].content[-1] == "What?" for s in samples)


@pytest.mark.parametrize(
    ("dialect", "item", "reason"),
    [
        ("sharegpt", {"conversations": [human("What?"), gpt("x")], "videos": ["a.mp4"]}, "0 placeholders for 1 media"),
        ("sharegpt", {"conversations": [human("<video>?"), gpt("x")]}, "1 placeholders for 0 media"),
        ("sharegpt", {"conversations": [human("<image>?"), gpt("x")], "videos": ["a.mp4"]}, "a <image> has no image"),
        ("swift", {"query": "<video> <video>", "response": "x", "videos": ["a.mp4"]}, "2 placeholders for 1 media"),
        ("swift", {"query": "<video>?", "response": "x", "images": ["c.png"]}, "a <video> has no video"),
        ("swift", {"query": "What?", "response": ""}, "response is missing or empty"),
        ("swift", {"query": "What?", "response": "x", "history": ["y"]}, "history must be a list"),
        ("swift", {"query": "What?", "response": "x", "videos": ["gone.mp4"]}, "there is no file gone.mp4"),
        ("swift", {"query": "What?", "response": "x", "videos": [3]}, "videos must be a path"),
        ("swift", {"query": "What?", "response": "x", "videos": ["../a.mp4"]}, "is not under"),
        ("llava", {"conversations": [human("What?")]}, "does not end with an answer"),
        ("llava", {"conversations": [human("What?"), gpt(" ")]}, "the answer is empty"),
        ("llava", {"conversations": [gpt("x")]}, "has no question"),
        ("llava", {"conversations": [{"from": "tool", "value": "x"}]}, "a turn is from 'tool'"),
        ("llava", {"conversations": "x"}, "conversations must be a list of turns"),
        ("llava", {"conversations": [{"from": ["x"], "value": "x"}]}, "a turn is from ['x']"),
        ("swift", {"query": "What?", "response": "x", "history": 3}, "history must be a list"),
        ("sharegpt", {"conversations": [human("a"), gpt(""), human("b"), gpt("x")]}, "must be a text or a list"),
        ("sharegpt", {"conversations": [human("a"), gpt("x")], "problem_type": 3}, "problem_type must be a text"),
    ],
)
def test_a_wrong_item_is_refused_alone(media: Path, dialect: str, item: dict[str, Any], reason: str) -> None:
    good: dict[str, Any] = {"query": "What?", "response": "x"}
    if dialect != "swift":
        good = {"conversations": [human("What?"), gpt("x")]}
    samples, refused = read(media, dialect, item, good)
    assert len(samples) == 1 and len(refused) == 1 and reason in refused[0]


def test_items_of_one_id_are_numbered(media: Path) -> None:
    item = {"id": "v1", "video": "a.mp4", "conversations": [human("<video>What?"), gpt("x")]}
    samples, _ = read(media, "llava", item, {**item, "conversations": [human("<video>And?"), gpt("y")]})
    assert [s.id for s in samples] == ["v1", "v1-2"]


def test_nothing_left_is_the_users_error(media: Path) -> None:
    with pytest.raises(UserError, match=r"no item left of .*items.json, 1 refused\n.*items.json:1: query is missing"):
        read(media, "swift", {"query": "", "response": "x"})


def test_a_dialect_is_detected_where_there_is_no_doubt() -> None:
    turns = [human("<video>?"), gpt("x")]
    text = [human("What?"), gpt("x")]
    for item, name in (
        ({"conversations": turns, "videos": ["a"]}, "sharegpt"),
        ({"messages": [], "videos": ["a"]}, "sharegpt"),
        ({"conversations": turns, "video": "a"}, "llava"),
        ({"conversations": turns, "images": "a.mp4"}, "llava"),
        ({"conversations": text, "video": "a"}, None),  # a video that is not asked about: of which dialect?
        ({"query": "a", "response": "b"}, "swift"),
        ({"prompt": "a", "video": "b", "chosen": "c", "rejected": "d"}, "hound"),
        ({"problem_id": 1, "solution": "x"}, "video_r1"),
        ({"path_to_vid_user_most_recent": []}, "mesc"),
        ({"id": "1", "text": "a", "label": "b"}, "mmla"),
        ({"id": "1", "question": "a", "answer": "b"}, None),
        ({"messages": [], "chosen": "a", "rejected": "b"}, None),  # pairs in our own form
        ({"messages": [], "labels": {}}, None),
    ):
        assert looks_like(item) == name, item


WORDS = st.text("ab <>\nü", min_size=1, max_size=8).filter(lambda text: text.strip())
TURNS = st.lists(st.tuples(WORDS, WORDS, st.sampled_from(["", "a.mp4", "b.mp4", "c.png"])), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TURNS)
def test_no_turn_and_no_medium_is_lost(media: Path, turns: list[tuple[str, str, str]]) -> None:
    placed = [f"<{'image' if name == 'c.png' else 'video'}>" if name else "" for *_, name in turns]
    talk = [t for (q, a, _), place in zip(turns, placed, strict=True) for t in (human(place + q), gpt(a))]
    names = [name for *_, name in turns if name]
    item = {
        "conversations": talk,
        "videos": [n for n in names if n != "c.png"],
        "images": names.count("c.png") * ["c.png"],
    }
    [sample], _ = read(media, "sharegpt", item)
    assert [Path(m.path).name for m in sample.media] == names
    assert [m.text for m in sample.messages] == [
        t["value"].split(">", 1)[-1].strip("\n") if p else t["value"].strip("\n")
        for t, p in zip(talk[:-1], [x for p in placed for x in (p, "")], strict=False)
    ]
    assert sample.answer == talk[-1]["value"]
