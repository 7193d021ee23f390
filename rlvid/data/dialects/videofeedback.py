"""VideoFeedback (TIGER-Lab/VideoFeedback) and files like it as a manifest for `rlvid reward-model`.

An item is `{"id", "images": [...] or "video", ...}` in one of two forms: regression (`prompt`, `labels`) or
conversation (`conversations`: the human text with the caption in it, then "visual quality: 1", a line per dimension). A
row of ours is

    {"id", "video", "question", "answer", "prompt", "labels", "source"}

with the caption as `prompt`, a field of its own: it is never again recovered from a text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlvid.data.dialects.conversion import MANIFEST, Refused, convert_items, copied, inside, joined, write_rows
from rlvid.errors import UserError
from rlvid.rewards.videoscore import ALIGNMENT, CAPTION_BEGINS, CAPTION_ENDS, DIMS, NoScore, Rubric

SourceName = Literal["annotated", "real", "both"]
FPS = 8  # of VideoFeedback's videos
RUBRIC = Rubric("regression", DIMS, 1, 4, "integer", {})


def convert(
    source: Path, out: Path, which: SourceName = "both", mismatched: float = 0.0, seed: int = 0
) -> tuple[Path, int, int]:
    """Write `manifest.jsonl`, `clips/` and `refused.jsonl` into `out`.

    Args:
        source: a file of items (JSON list or JSON lines), or a folder of such files. Frames and videos are named
            relative to the item's file and stay under its folder.
        which: annotated (generated videos with human scores), real (real ones, which score 4 throughout), or both.
        mismatched: share of items that come a second time with another item's caption and text-to-video alignment 1.
            Without them a model learns to ignore the caption (VideoScore issue 4; v1.1 added such pairs).

    Returns:
        The manifest, its number of rows, the number of refused items.

    Raises:
        UserError: nothing to read, or nothing left.
    """

    def row_of(name: str, item: Any, folder: Path) -> dict[str, Any] | None:
        try:
            return _row(name, item, folder, out, which)
        except NoScore as e:
            raise Refused(str(e)) from e

    rows, refused = convert_items(source, out, row_of, f" for source={which}")
    rows += mismatch(rows, mismatched, np.random.default_rng(seed))
    write_rows(out / MANIFEST, rows)
    return out / MANIFEST, len(rows), refused


def mismatch(rows: Sequence[Mapping[str, Any]], share: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Rows of a share of the videos with another video's caption: alignment is 1, the other scores are the video's."""
    if not 0 <= share <= 1:
        raise UserError(f"the share of mismatched items must be from 0 to 1, got {share:g}")
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


def _row(name: str, item: Any, folder: Path, out: Path, which: SourceName) -> dict[str, Any] | None:
    """The manifest row of one item; None if it is of the other source.

    Raises:
        NoScore, Refused: the item is refused.
    """
    # Items do not say where they are from; ids of real videos begin with p (p005353), those of Panda-70M.
    source = item.get("source") or ("real" if re.fullmatch(r"p\d+", name) else "annotated")
    if which not in ("both", source):
        return None
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
    scores = dict(zip(DIMS, RUBRIC.scores(labels), strict=True))
    video = _clip(item, name, folder, out)
    return {"id": name, "video": video, **_texts(caption, scores), "source": source}


def _texts(caption: str, labels: Mapping[str, float]) -> dict[str, Any]:
    lines = "\n".join(f"{name}: {labels[name]:g}" for name in DIMS)
    return {"question": RUBRIC.question(caption), "answer": lines, "prompt": caption, "labels": dict(labels)}


def _clip(item: Mapping[str, Any], name: str, folder: Path, out: Path) -> str:
    """Put the item's video under `out/clips`; returns its path relative to `out`."""
    if isinstance(video := item.get("video", item.get("file")), str):
        return copied(inside(folder, video), name, out)
    images = item.get("images")
    if not isinstance(images, list) or not images or not all(isinstance(i, str) for i in images):
        raise Refused("it has neither images, a list of files, nor a video")
    # Published files write <id>_00.jpg for images/<id>/<id>_00.jpg.
    places = [Path("images") / Path(image).name.split("_")[0] / Path(image).name for image in images]
    return joined([inside(folder, i, p) for i, p in zip(images, places, strict=True)], name, out, FPS)
