"""The preference pairs of LLaVA-Hound (sft_dpo_17k.jsonl) and VLM-RLAIF (RM_13b_v1_dataset_39k.json) as manifests.

LLaVA-Hound: `{"id", "video", "prompt", "answer", "chosen", "rejected"}`, perhaps with `chosen_score` and
`rejected_score`; `video` names a folder of frames, taken twice a second. VLM-RLAIF: `{"id", "conversations",
"output_1", "output_2", "preference": 1 or 2, "images"}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rlvid.data.dialects.conversion import MANIFEST, Refused, convert_items, copied, inside, joined, write_rows

Dialect = Literal["hound", "rlaif"]
PICTURES = (".jpg", ".jpeg", ".png")
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
HOUND_FPS = 2  # ffmpeg fps=2 in its setup
RLAIF_FPS = 1  # 50 frames of a video of any length: their rate is not written down
MARKS = ("<video>", "<image>")


def convert(source: Path, out: Path, videos: Path, dialect: Dialect) -> tuple[Path, int, int]:
    """Write `manifest.jsonl`, `clips/` and `refused.jsonl` into `out`.

    Args:
        source: a file of items (JSON list or JSON lines), or a folder of such files.
        videos: folder that the items' videos and frames are named in.

    Returns:
        The manifest, its number of rows, the number of refused items.

    Raises:
        UserError: nothing to read, or nothing left.
    """
    row = _hound if dialect == "hound" else _rlaif
    rows, refused = convert_items(source, out, lambda name, item, _: row(name, item, videos, out))
    write_rows(out / MANIFEST, rows)
    return out / MANIFEST, len(rows), refused


def _hound(name: str, item: Mapping[str, Any], videos: Path, out: Path) -> dict[str, Any]:
    video = _text(item, "video")
    names = [video, *(f"{video}{suffix}" for suffix in VIDEOS)]
    found = next((n for n in names[1:] if (videos / n).is_file()), names[0])
    path = inside(videos, found, is_there=Path.exists)
    kept = {k: item[k] for k in ("answer", "chosen_score", "rejected_score") if item.get(k) is not None}
    return {
        "id": name,
        # Several questions are asked about one video.
        "video": copied(path, video, out) if path.is_file() else joined(_pictures(path), video, out, HOUND_FPS),
        "question": _question(_text(item, "prompt")),
        **_sides(_text(item, "chosen"), _text(item, "rejected")),
        **kept,
    }


def _rlaif(name: str, item: Mapping[str, Any], videos: Path, out: Path) -> dict[str, Any]:
    images = item.get("images")
    if not isinstance(images, list) or not images or not all(isinstance(i, str) for i in images):
        raise Refused("images must be a list of files")
    if item.get("preference") not in (1, 2):
        raise Refused(f"preference must be 1 or 2, got {item.get('preference')!r}")
    try:
        turns = [turn["value"] for turn in item["conversations"]]
        answers = [item["output_1"]["value"], item["output_2"]["value"]]
    except (LookupError, TypeError):
        raise Refused("expected conversations, output_1 and output_2, each with a value") from None
    if len(turns) != 1 or not all(isinstance(text, str) for text in (*turns, *answers)):
        raise Refused("expected one turn of text before the two outputs")
    chosen, rejected = answers if item["preference"] == 1 else reversed(answers)
    return {
        "id": name,
        # Items with the same frames share a clip; a folder may hold the frames of several videos.
        "video": joined([inside(videos, i) for i in images], "\n".join(images), out, RLAIF_FPS),
        "question": _question(turns[0]),
        **_sides(chosen, rejected),
    }


def _pictures(folder: Path) -> list[Path]:
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in PICTURES)
    if not files:
        raise Refused(f"{folder.name} holds no frames")
    return files


def _text(item: Mapping[str, Any], key: str) -> str:
    value = item.get(key)
    if not isinstance(value, str) or not value.strip():
        raise Refused(f"{key} is missing or empty")
    return value


def _question(text: str) -> str:
    """Without the mark for the video, which has a place of its own in our rows."""
    for mark in MARKS:
        text = text.replace(mark, "")
    return text.strip()


def _sides(chosen: str, rejected: str) -> dict[str, str]:
    if not chosen.strip() or not rejected.strip():
        raise Refused("a side is empty")
    if chosen == rejected:
        raise Refused("both sides are the same")
    return {"chosen": chosen, "rejected": rejected}
