"""The preference pairs of VLM-RLAIF (RM_13b_v1_dataset_39k.json).

`{"id", "conversations", "output_1", "output_2", "preference": 1 or 2, "images"}`; `images` are the frames of a video.
"""

from __future__ import annotations

from rlvid.data.dialects.dialect import (
    Dialect,
    Item,
    Refused,
    Roots,
    Row,
    only_question,
    pictures_of,
    question_of,
    sides,
)
from rlvid.types import Sample

FPS = 1  # 50 frames of a video of any length: their rate is not written down


def read(item: Item, roots: Roots) -> Row:
    images = pictures_of(item)
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
        "video": [roots.find(name) for name in images],
        "fps": FPS,
        "question": question_of(turns[0]),
        **sides(chosen, rejected),
    }


def write(row: Row, sample: Sample) -> Item:
    video, question = only_question(sample)
    if video.pictures_per_s != FPS:
        raise Refused(f"{video.path}: a video must be given as frames, {FPS} a second")
    return {
        "id": sample.id,
        "conversations": [{"from": "human", "value": f"<image>\n{question}"}],
        "output_1": {"from": "llm_1", "value": row["chosen"]},
        "output_2": {"from": "llm_2", "value": row["rejected"]},
        "preference": 1,
        "images": list(video.pictures),
    }


DIALECT = Dialect(
    read, "VLM-RLAIF: preference pairs", lambda item: {"output_1", "output_2"} <= item.keys(), write=write
)
