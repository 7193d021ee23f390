"""The preference pairs of LLaVA-Hound (sft_dpo_17k.jsonl).

`{"id", "video", "prompt", "answer", "chosen", "rejected"}`, perhaps with `chosen_score` and `rejected_score`; `video`
names a folder of frames, taken twice a second, or a video file without its suffix.
"""

from __future__ import annotations

from pathlib import Path

from rlvid.data.dialects.dialect import (
    Dialect,
    Item,
    Refused,
    Roots,
    Row,
    frames_in,
    name_of,
    only_question,
    question_of,
    sides,
    text_of,
)
from rlvid.data.row_media import VIDEOS
from rlvid.types import Sample

KEPT = ("answer", "chosen_score", "rejected_score")
FPS = 2  # ffmpeg fps=2 in its setup


def read(item: Item, roots: Roots) -> Row:
    return {
        **video_or_frames(roots, text_of(item, "video")),
        "question": question_of(text_of(item, "prompt")),
        **sides(text_of(item, "chosen"), text_of(item, "rejected")),
        **{k: item[k] for k in KEPT if item.get(k) is not None},
    }


def video_or_frames(roots: Roots, name: str) -> Row:
    """The fields of a video file, perhaps named without its suffix, or of the frames in a folder.

    Raises:
        Refused: it is not there, or the folder holds no frames.
    """
    names = (name,) if name.lower().endswith(VIDEOS) else (*(name + suffix for suffix in VIDEOS), name)
    path = roots.find(*names, is_there=lambda p: p.is_file() or p.is_dir())
    if not path.is_dir():
        return {"video": path}
    files = frames_in(path)
    if not files:
        raise Refused(f"{path.name} holds no frames")
    return {"video": [Path(file) for file in files], "fps": FPS}


def write(row: Row, sample: Sample) -> Item:
    video, question = only_question(sample)
    pair = {key: row[key] for key in ("chosen", "rejected", *KEPT) if key in row}
    return {"id": sample.id, "video": name_of(video, FPS), "prompt": question, **pair}


DIALECT = Dialect(
    read,
    "LLaVA-Hound: preference pairs",
    lambda item: {"prompt", "video", "chosen", "rejected"} <= item.keys(),
    write=write,
)
