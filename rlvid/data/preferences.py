"""Preference manifests: a manifest's rows with two responses each, `chosen` and `rejected`.

`{"id", "video", "question", "chosen", "rejected"}`, or the messages form; `answer` may be left out. Further fields are
kept in `Preference.meta` (`judge`, `iteration` and so on).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlvid.data.items import Refused, refuse_all
from rlvid.data.row_media import READ_AS
from rlvid.types import MediumRef, Preference, Sample

SIDES = ("chosen", "rejected")


def pairs_of(path: Path, samples: Iterable[Sample]) -> list[Preference]:
    """The pairs of the rows of `path`.

    Raises:
        UserError: the first wrong rows: a side is missing or empty, or both are the same.
    """
    pairs, problems = [], []
    for sample in samples:
        try:
            pairs.append(_pair(sample))
        except Refused as refused:
            problems.append(f"{path}: row {sample.id!r}: {refused}")
    if problems:
        refuse_all(problems)
    return pairs


def _pair(sample: Sample) -> Preference:
    for side in SIDES:
        text = sample.extra.get(side)
        if not isinstance(text, str) or not text.strip():
            raise Refused(f"{side} is missing or empty; a pair has two texts, chosen and rejected")
    chosen, rejected = sample.extra["chosen"], sample.extra["rejected"]
    if chosen == rejected:
        raise Refused(f"chosen and rejected are the same ({chosen!r:.60}); leave the row out")
    return Preference(sample, chosen, rejected, {k: v for k, v in sample.extra.items() if k not in SIDES})


def pair_row(pair: Preference) -> dict[str, Any]:
    """The manifest row of a pair, in the messages form. Suffix and system prompt are in it already, paths are absolute:
    `data.root` has to be above them."""
    sample = pair.sample
    messages = [
        {"role": m.role, "content": [_part(part, sample) for part in m.content]}
        | ({"train": True} if m.is_marked else {})
        for m in sample.messages
    ]
    known = {"answer": sample.answer, "problem_type": sample.problem_type}
    row = {"id": sample.id, "messages": messages} | {key: value for key, value in known.items() if value}
    return row | {"chosen": pair.chosen, "rejected": pair.rejected} | dict(pair.meta)


def _part(part: str | MediumRef, sample: Sample) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    medium = sample.media[part.index]
    how = {key: getattr(medium, name) for key, name in READ_AS.items()}
    if medium.pictures:
        how["fps"] = medium.pictures_per_s
    where = list(medium.pictures) or medium.path
    return {"type": medium.kind, medium.kind: where} | {k: v for k, v in how.items() if v is not None}
