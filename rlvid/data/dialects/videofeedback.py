"""VideoFeedback (TIGER-Lab/VideoFeedback) and files like it, for `rlvid reward-model`.

An item is `{"id", "images": [...] or "video", ...}` in one of two forms: regression (`prompt`, `labels`) or
conversation (`conversations`: the human text with the caption in it, then "visual quality: 1", a line per dimension). A
row has the caption as `prompt`, a field of its own, so that it never has to be found in a text again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlvid.data.dialects.dialect import Dialect, Item, Refused, Roots, Row, name_of, only_question, pictures_of
from rlvid.errors import UserError
from rlvid.rewards.videoscore import ALIGNMENT, CAPTION_BEGINS, CAPTION_ENDS, DIMS, NoScore, Rubric
from rlvid.types import Sample

FPS = 8  # of VideoFeedback's videos
RUBRIC = Rubric("regression", DIMS, 1, 4, "integer")


def read(item: Item, roots: Roots) -> Row:
    try:
        caption, scores = _caption_and_scores(item)
    except NoScore as error:
        raise Refused(str(error)) from error
    # Items do not say where they are from; ids of real videos begin with p (p005353), those of Panda-70M.
    is_real = re.fullmatch(r"p\d+", str(item.get("id"))) is not None
    source = item.get("source") or ("real" if is_real else "annotated")
    return {**_video(item, roots), **_texts(caption, scores), "source": source}


def mismatch(rows: Sequence[Mapping[str, Any]], share: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Rows of a share of the videos with another video's caption: alignment is 1, the other scores are the video's."""
    chosen = sorted(rng.permutation(len(rows))[: round(share * len(rows))].tolist())
    made = []
    for i in chosen:
        row = rows[i]
        others = [r["prompt"] for r in rows if r["prompt"] != row["prompt"]]
        if not others:
            raise UserError("all items have the same caption: there is none to mismatch them with")
        caption = others[int(rng.integers(len(others)))]
        labels = {**row["labels"], ALIGNMENT: 1.0}
        made.append({**row, **_texts(caption, labels), "id": f"{row['id']}-mismatched", "source": "mismatched"})
    return made


def caption_of(text: str) -> str:
    """The caption inside VideoFeedback's prompt, between the template's own words before and after it.

    The template begins with its words and ends with them, so the first beginning and the last end are its own, whatever
    the caption holds.

    Raises:
        NoScore: the template's words are not there.
    """
    begin, end = text.find(CAPTION_BEGINS), text.rfind(CAPTION_ENDS)
    if begin < 0 or end < begin + len(CAPTION_BEGINS):
        raise NoScore("its text is not VideoFeedback's prompt: the words around the caption are missing")
    caption = text[begin + len(CAPTION_BEGINS) : end].strip()
    if not caption:
        raise NoScore("its caption is empty")
    return caption


def labels_of(text: str) -> dict[str, float]:
    """Scores of the conversation form, a line `name: score` each.

    Raises:
        NoScore: a line has another form, or a name comes twice.
    """
    labels: dict[str, float] = {}
    for line in filter(str.strip, text.split("\n")):
        match = re.fullmatch(r"\s*([^:]+?)\s*: *(\d+(?:\.\d+)?)\s*", line)
        if match is None or match[1] in labels:
            raise NoScore(f"not a line `name: score` of its own: {line[:60]!r}")
        labels[match[1]] = float(match[2])
    return labels


def _caption_and_scores(item: Item) -> tuple[str, dict[str, float]]:
    talk = item.get("conversations")
    try:
        text = talk[0]["value"] if talk else item.get("prompt")
        labels = item["labels"] if "labels" in item else labels_of(talk[1]["value"]) if talk else None
    except (LookupError, TypeError, AttributeError):
        raise NoScore("conversations must be a human turn and a gpt turn, each with a value") from None
    if isinstance(item.get("text_prompt"), str) and item["text_prompt"].strip():
        caption = item["text_prompt"].strip()
    elif isinstance(text, str):
        caption = caption_of(text)
    else:
        raise NoScore("it has no prompt")
    return caption, dict(zip(DIMS, RUBRIC.scores(labels), strict=True))


def _texts(caption: str, labels: Mapping[str, float]) -> dict[str, Any]:
    lines = "\n".join(f"{name}: {labels[name]:g}" for name in DIMS)
    return {"question": RUBRIC.question(caption), "answer": lines, "prompt": caption, "labels": dict(labels)}


def _video(item: Item, roots: Roots) -> Row:
    if isinstance(video := item.get("video", item.get("file")), str):
        return {"video": roots.find(video)}
    # Published files write <id>_00.jpg for images/<id>/<id>_00.jpg.
    names = [(name, f"images/{Path(name).name.split('_')[0]}/{Path(name).name}") for name in pictures_of(item)]
    return {"video": [roots.find(*places) for places in names], "fps": FPS}


def write(row: Row, sample: Sample) -> Item:
    video, _ = only_question(sample)  # made of the caption
    if video.pictures and video.pictures_per_s != FPS:
        raise Refused(f"{video.path}: frames must be {FPS} a second")
    media = {"images": list(video.pictures)} if video.pictures else {"video": name_of(video)}
    return {
        "id": sample.id,
        **media,
        "prompt": RUBRIC.question(row["prompt"]),
        "text_prompt": row["prompt"],
        "labels": row["labels"],
        "source": row["source"],
    }


DIALECT = Dialect(
    read,
    "VideoFeedback: generated videos with five human scores",
    lambda item: {"id", "images", "prompt", "labels"} <= item.keys(),
    sources=("annotated", "real"),
    mismatch=mismatch,
    write=write,
)
