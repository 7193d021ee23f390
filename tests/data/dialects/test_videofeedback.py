"""VideoFeedback's items as a manifest: both forms, both sources, and every way in which an item can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from rlvid.data.dialects.conversion import convert
from rlvid.data.dialects.dialect import Roots
from rlvid.data.dialects.videofeedback import DIALECT, caption_of, labels_of, mismatch
from rlvid.data.manifest import load_manifest
from rlvid.errors import UserError
from rlvid.rewards.videoscore import ALIGNMENT, DIMS, TEMPLATES, NoScore
from rlvid.synthetic.moving_shapes import write_mp4

REAL = Path(__file__).parents[4] / "shared" / "data" / "videoscore" / "mantis_classification"
SCORES = dict(zip(DIMS, (1.0, 2.0, 3.0, 4.0, 2.0), strict=True))


def pictures(folder: Path, name: str, n: int = 3, size: int = 32) -> list[str]:
    """PNG frames under `folder/images/name`; their paths as VideoFeedback's regression files have them."""
    (folder / "images" / name).mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(n):
        paths.append(f"images/{name}/{name}_{i:02d}.png")
        pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
        with av.open(str(folder / paths[-1]), "w", format="image2") as container:
            stream = container.add_stream("png", rate=1)
            stream.height = stream.width = size
            stream.pix_fmt = "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    return paths


def item(folder: Path, name: str = "a1", caption: str = "a dog", **change: Any) -> dict[str, Any]:
    images = pictures(folder, name)
    return {
        "id": name,
        "images": images,
        "prompt": TEMPLATES["integer"].format(caption=caption),
        "labels": SCORES,
        **change,
    }


def converted(folder: Path, items: list[Any], **options: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and refused items."""
    (folder / "items.json").write_text(json.dumps(items))
    convert(folder / "items.json", folder / "out", DIALECT, Roots(), **options)
    return tuple(  # type: ignore[return-value]
        [json.loads(line) for line in (folder / "out" / name).read_text().splitlines()]
        for name in ("manifest.jsonl", "refused.jsonl")
    )


def test_frames_are_a_video_where_they_are_and_the_manifest_loads(tmp_path: Path) -> None:
    rows, refused = converted(tmp_path, [item(tmp_path)])
    assert not refused and rows[0]["prompt"] == "a dog" and rows[0]["labels"] == SCORES
    sample = load_manifest(tmp_path / "out" / "manifest.jsonl", tmp_path, None, "")[0]
    (medium,) = sample.media
    assert medium.pictures == tuple(str(tmp_path / f"images/a1/a1_{i:02d}.png") for i in range(3))
    assert medium.pictures_per_s == 8
    assert sample.extra["labels"] == SCORES and sample.answer.startswith("visual quality: 1\n")


def test_conversation_form_and_frames_without_their_folder(tmp_path: Path) -> None:
    text = "\n".join(f"{name}: {int(score)}" for name, score in SCORES.items())
    talk = [{"from": "human", "value": TEMPLATES["integer"].format(caption="a cat")}, {"from": "gpt", "value": text}]
    images = [Path(p).name for p in pictures(tmp_path, "a2")]  # as the published files have them
    rows, refused = converted(tmp_path, [{"id": "a2", "images": images, "conversations": talk}])
    assert not refused and rows[0]["labels"] == SCORES and rows[0]["prompt"] == "a cat"


def test_video_stays_where_it_is_and_its_caption_may_be_a_field(tmp_path: Path) -> None:
    write_mp4(tmp_path / "v.mp4", np.zeros((4, 32, 32, 3), dtype=np.uint8), 8)
    rows, _ = converted(tmp_path, [{"id": 7, "video": "v.mp4", "text_prompt": " a cat ", "labels": SCORES}])
    assert rows[0]["id"] == "7" and rows[0]["prompt"] == "a cat"
    assert rows[0]["video"] == str(tmp_path / "v.mp4") and "fps" not in rows[0]


def test_caption_with_the_prompts_own_words_stays_whole(tmp_path: Path) -> None:
    caption = 'the text prompt is "x",\nall the frames of video are as follows: "y'
    rows, _ = converted(tmp_path, [item(tmp_path, caption=caption)])
    assert rows[0]["prompt"] == caption
    assert rows[0]["question"].count('"') == 2  # escaped where it is quoted


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": {k: v for k, v in SCORES.items() if k != "dynamic degree"}}, "lacks 'dynamic degree'"),
        ({"labels": {**SCORES, "dynamic degree": 5.0}}, "dynamic degree is 5.0; expected a number from 1 to 4"),
        ({"labels": {**SCORES, "dynamic degree": 0}}, "dynamic degree is 0"),
        ({"labels": [1, 2, 3, 4, 2]}, "labels is missing"),
        ({"images": ["images/a1/none.png"]}, "there is no file"),
        ({"images": ["../../etc/passwd"]}, "not under"),
        ({"images": []}, "images must be a list of files"),
        ({"images": None}, "images must be a list of files"),
        ({"prompt": "how good is it?"}, "not VideoFeedback's prompt"),
        ({"prompt": TEMPLATES["integer"].format(caption="  ")}, "caption is empty"),
        ({"prompt": None}, "no prompt"),
        ({"conversations": [{"value": 1}], "labels": SCORES, "prompt": None}, "no prompt"),
        ({"id": ""}, "an id"),
        ({"id": "good"}, "the same id"),
    ],
)
def test_wrong_item_is_refused_alone_with_its_reason(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    before, after = item(tmp_path, "good"), item(tmp_path, "also", labels={**SCORES, "dynamic degree": 1.0})
    rows, refused = converted(tmp_path, [before, item(tmp_path, **change), after])
    assert [row["id"] for row in rows] == ["good", "also"]
    assert rows[1]["labels"]["dynamic degree"] == 1.0  # nothing has shifted
    assert len(refused) == 1 and reason in refused[0]["reason"] and refused[0]["where"] == f"{tmp_path}/items.json:2"


def test_annotated_and_real(tmp_path: Path) -> None:
    items = [item(tmp_path, "a1"), item(tmp_path, "p005353"), item(tmp_path, "x", source="real")]
    names = {
        which: [r["id"] for r in converted(tmp_path, items, only=which)[0]] for which in ("annotated", "real", None)
    }
    assert names == {"annotated": ["a1"], "real": ["p005353", "x"], None: ["a1", "p005353", "x"]}


def test_nothing_left_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 refused\n.*items.json:1: labels is missing"):
        converted(tmp_path, [item(tmp_path, labels=None)])
    with pytest.raises(UserError, match="JSON"):
        (tmp_path / "broken.json").write_text("[{")
        convert(tmp_path / "broken.json", tmp_path / "out", DIALECT, Roots())
    assert not (tmp_path / "out").exists()


def test_wrong_options_are_found_before_anything_is_written(tmp_path: Path) -> None:
    items = [item(tmp_path)]
    for options, message in (
        ({"mismatched": -1.0}, "--mismatched is a share from 0 to 1, got -1"),
        ({"only": "fake"}, "--source fake: expected one of annotated, real"),
        ({"only": "real"}, "no item left of .* of source real"),
        ({"mismatched": 1.0}, "same caption"),
    ):
        with pytest.raises(UserError, match=message):
            converted(tmp_path, items, **options)
        assert not (tmp_path / "out").exists()


def test_mismatched_rows_have_anothers_caption_and_alignment_1() -> None:
    rows = [{"id": str(i), "video": f"{i}.mp4", "prompt": f"caption {i % 4}", "labels": SCORES} for i in range(20)]
    made = mismatch(rows, 0.5, np.random.default_rng(3))
    assert len(made) == 10 and made == mismatch(rows, 0.5, np.random.default_rng(3))
    for row in made:
        own = rows[int(row["id"].removesuffix("-mismatched"))]
        assert row["prompt"] != own["prompt"] and row["video"] == own["video"] and row["prompt"] in row["question"]
        assert row["labels"] == {**SCORES, ALIGNMENT: 1.0} and f"{ALIGNMENT}: 1\n" in row["answer"]
    with pytest.raises(UserError, match="same caption"):
        mismatch([{**rows[0], "prompt": "x"}] * 3, 0.5, np.random.default_rng(0))


def test_caption_lies_between_the_first_beginning_and_the_last_end() -> None:
    assert caption_of(TEMPLATES["integer"].format(caption="a b  ")) == "a b"


@pytest.mark.parametrize(
    "text", ["visual quality 4", "visual quality: 4\nvisual quality: 3", "visual quality: -1", "a: 1/4"]
)
def test_score_lines_in_another_form_are_refused(text: str) -> None:
    with pytest.raises(NoScore):
        labels_of(text)


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data/videoscore is not on this machine")
def test_real_items_keep_their_labels_by_name(tmp_path: Path) -> None:
    made = convert(REAL, tmp_path, DIALECT, Roots())
    items = {i["id"]: i for i in json.loads((REAL / "train.json").read_text())}
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert (made.n_rows, made.n_refused) == (4, 0)
    for row in rows:
        assert row["labels"] == items[row["id"]]["labels"] and list(row["labels"]) == list(DIMS)
        assert row["prompt"] in items[row["id"]]["prompt"]
