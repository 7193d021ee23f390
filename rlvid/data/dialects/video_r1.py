"""Video-R1 (Video-R1-CoT-165k and Video-R1-260k).

`{"problem_id", "problem", "data_type": "video" or "image", "problem_type", "options": [...], "process", "solution":
"<answer>A</answer>", "path", "data_source"}`. The rewards of rlvid/rewards/video_r1.py choose by `problem_type`.
"""

from __future__ import annotations

from rlvid.data.answers import TAGGED
from rlvid.data.dialects.dialect import Dialect, Item, Refused, Roots, Row, name_of, only_question, text_of
from rlvid.types import Sample


def read(item: Item, roots: Roots) -> Row:
    kind = item.get("data_type")
    if kind not in ("video", "image"):
        raise Refused(f"data_type must be video or image, got {kind!r}")
    options = item.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise Refused("options must be a list of texts")
    answer = TAGGED.fullmatch(text_of(item, "solution"))
    if answer is None or not answer[1].strip():
        raise Refused("solution must be <answer>...</answer> with something inside")
    row: Row = {
        "id": str(item.get("problem_id", "")),
        kind: roots.find(text_of(item, "path")),
        "question": "\n".join([text_of(item, "problem"), *(["Options:", *options] if options else [])]),
        "answer": answer[1].strip(),
        "problem_type": text_of(item, "problem_type"),
    }
    if source := item.get("data_source"):
        row["source"] = source
    if isinstance(process := item.get("process"), str) and process.strip():
        row["reasoning"] = process
    return row


def write(row: Row, sample: Sample) -> Item:
    medium, question = only_question(sample)
    kept = {theirs: row[ours] for ours, theirs in (("source", "data_source"), ("reasoning", "process")) if ours in row}
    return {
        "problem_id": sample.id,
        "problem": question,
        "data_type": medium.kind,
        "problem_type": row["problem_type"],
        "options": [],  # those of the question stay in it
        "solution": f"<answer>{sample.answer}</answer>",
        "path": name_of(medium),
        **kept,
    }


DIALECT = Dialect(
    read,
    "Video-R1: problems with rule rewards",
    lambda item: {"problem_id", "solution"} <= item.keys(),
    write=write,
)
