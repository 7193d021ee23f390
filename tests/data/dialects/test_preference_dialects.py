"""LLaVA-Hound's and VLM-RLAIF's pairs as manifests, and what is wrong with an item."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from rlvid.data.dialects import DIALECTS
from rlvid.data.dialects.conversion import convert
from rlvid.data.dialects.dialect import Roots
from rlvid.data.manifest import load_manifest
from rlvid.data.preferences import pairs_of
from rlvid.errors import UserError
from rlvid.synthetic.moving_shapes import write_mp4
from rlvid.types import Medium, Preference

HOUND = {"id": "v_abc_1", "video": "v_abc", "prompt": "<video>\nWhat is it?", "chosen": "A dog.", "rejected": "A cat."}
RLAIF = {
    "id": 7,
    "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}],
    "output_1": {"value": "A cat."},
    "output_2": {"value": "A dog."},
    "preference": 2,
    "images": ["v_abc/c01_0001.png", "v_abc/c01_0002.png", "v_abc/c01_0003.png"],
}


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """v_abc, a folder of three frames, and v_mp4.mp4."""
    folder = tmp_path / "videos"
    (folder / "v_abc").mkdir(parents=True)
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        with av.open(str(folder / "v_abc" / f"c01_{i + 1:04d}.png"), "w", format="image2") as container:
            stream = container.add_stream("png", rate=1)
            stream.height = stream.width = 32
            stream.pix_fmt = "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    write_mp4(folder / "v_mp4.mp4", np.zeros((4, 32, 32, 3), dtype=np.uint8), 8)
    return folder


def converted(videos: Path, items: list[Any], dialect: str) -> tuple[list[Preference], list[dict[str, Any]]]:
    source, out = videos.parent / "items.jsonl", videos.parent / "out"
    source.write_text("".join(json.dumps(item) + "\n" for item in items))
    made = convert(source, out, DIALECTS[dialect], Roots(videos))
    pairs = pairs_of(made.manifest, load_manifest(made.manifest, made.root, None, "", needs_answer=False))
    said = [json.loads(line) for line in (out / "refused.jsonl").read_text().splitlines()]
    assert (made.n_rows, made.n_refused) == (len(pairs), len(said))
    return pairs, said


def names_of(medium: Medium) -> list[str]:
    return [Path(path).name for path in medium.pictures]


def test_hounds_frame_folder_is_one_video_for_all_its_questions(videos: Path) -> None:
    items = [HOUND, {**HOUND, "id": "v_abc_2", "chosen_score": 5}, {**HOUND, "id": "v_mp4_1", "video": "v_mp4"}]
    pairs, refused = converted(videos, items, "hound")
    assert not refused
    first, second, third = pairs
    assert (first.chosen, first.rejected, first.sample.messages[0].text) == ("A dog.", "A cat.", "What is it?")
    assert first.sample.media == second.sample.media and second.meta["chosen_score"] == 5
    (medium,) = first.sample.media
    assert names_of(medium) == [f"c01_{i:04d}.png" for i in (1, 2, 3)] and medium.pictures_per_s == 2
    assert third.sample.media[0].path == str(videos / "v_mp4.mp4")


def test_rlaifs_preference_names_the_better_output(videos: Path) -> None:
    pairs, _ = converted(videos, [RLAIF, {**RLAIF, "id": 8, "preference": 1}], "rlaif")
    assert [(p.sample.id, p.chosen, p.rejected) for p in pairs] == [
        ("7", "A dog.", "A cat."),
        ("8", "A cat.", "A dog."),
    ]
    assert len(names_of(pairs[0].sample.media[0])) == 3
    assert pairs[0].sample.media == pairs[1].sample.media


def test_frames_of_one_folder_may_be_those_of_several_videos(videos: Path) -> None:
    pairs, _ = converted(videos, [RLAIF, {**RLAIF, "id": 8, "images": RLAIF["images"][1:]}], "rlaif")  # type: ignore[index]
    assert [len(names_of(pair.sample.media[0])) for pair in pairs] == [3, 2]


@pytest.mark.parametrize(
    ("dialect", "item", "reason"),
    [
        ("hound", {**HOUND, "video": "nowhere"}, "there is no file nowhere"),
        ("hound", {**HOUND, "video": "../videos"}, "is not under"),
        ("hound", {**HOUND, "rejected": "A dog."}, "both sides are the same"),
        ("hound", {**HOUND, "rejected": " "}, "rejected is missing or empty"),
        ("hound", {**HOUND, "id": None}, "an object with an id"),
        ("rlaif", {**RLAIF, "preference": 3}, "preference must be 1 or 2, got 3"),
        ("rlaif", {**RLAIF, "output_2": "A dog."}, "each with a value"),
        ("rlaif", {**RLAIF, "conversations": RLAIF["conversations"] * 2}, "one turn of text"),  # type: ignore[operator]
        ("rlaif", {**RLAIF, "images": []}, "images must be a list"),
    ],
)
def test_a_wrong_item_is_refused_alone(videos: Path, dialect: str, item: dict[str, Any], reason: str) -> None:
    good = {**(HOUND if dialect == "hound" else RLAIF), "id": "good"}
    pairs, refused = converted(videos, [item, good], dialect)
    assert [p.sample.id for p in pairs] == ["good"]
    assert reason in refused[0]["reason"]


def test_nothing_left_is_the_users_error(videos: Path) -> None:
    with pytest.raises(UserError, match=r"no item left of .*, 1 refused\n.*items.jsonl:1: preference must be 1 or 2"):
        converted(videos, [{**RLAIF, "preference": None}], "rlaif")
    assert not (videos.parent / "out").exists()


def test_paths_are_relative_to_the_manifest_where_all_are_below_it(videos: Path) -> None:
    source = videos.parent / "items.jsonl"
    source.write_text(json.dumps({**HOUND, "video": "v_mp4"}) + "\n")
    made = convert(source, videos.parent, DIALECTS["hound"], Roots(videos))
    assert made.root is None and json.loads(made.manifest.read_text())["video"] == "videos/v_mp4.mp4"
    made = convert(source, videos.parent / "out", DIALECTS["hound"], Roots(videos))
    assert made.root == videos and json.loads(made.manifest.read_text())["video"] == str(videos / "v_mp4.mp4")


def test_beginnings_of_paths_are_mapped(videos: Path) -> None:
    source = videos.parent / "lists" / "items.jsonl"
    source.parent.mkdir()
    source.write_text(json.dumps({**HOUND, "video": "/data/them/v_mp4"}) + "\n")
    with pytest.raises(UserError, match="/data/them/v_mp4.mp4 is not under"):
        convert(source, videos.parent / "out", DIALECTS["hound"], Roots())
    made = convert(source, videos.parent / "out", DIALECTS["hound"], Roots(None, (("/data/them", str(videos)),)))
    assert json.loads(made.manifest.read_text())["video"] == str(videos / "v_mp4.mp4")
