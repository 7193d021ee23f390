"""Preference manifests: a manifest's rows with two responses each, `chosen` and `rejected`.

`{"id", "video", "question", "chosen", "rejected"}`, or the messages form; `answer` may be left out. Further fields are
kept in `Preference.meta` (`judge`, `iteration` and so on).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlvid.data.manifest import load_manifest
from rlvid.errors import UserError
from rlvid.types import MediumRef, Preference, Sample

SIDES = ("chosen", "rejected")


def load_preferences(path: Path, root: Path | None, system_prompt: str | None, suffix: str) -> list[Preference]:
    """Read and check a manifest of pairs; arguments as `load_manifest`.

    Raises:
        UserError: naming file and row: a side is missing or empty, both are the same, or what `load_manifest` refuses.
    """
    return [_pair(path, s) for s in load_manifest(path, root, system_prompt, suffix, needs_answer=False)]


def _pair(path: Path, sample: Sample) -> Preference:
    where = f"{path}: row {sample.id!r}"
    for side in SIDES:
        text = sample.extra.get(side)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: {side} is missing or empty; a pair has two texts, chosen and rejected")
    chosen, rejected = sample.extra["chosen"], sample.extra["rejected"]
    if chosen == rejected:
        raise UserError(f"{where}: chosen and rejected are the same ({chosen!r:.60}); leave the row out")
    return Preference(sample, chosen, rejected, {k: v for k, v in sample.extra.items() if k not in SIDES})


def pair_row(pair: Preference, folder: Path) -> dict[str, Any]:
    """The manifest row of a pair, for a manifest in `folder`: the question form, or messages where one turn of videos
    and a question would not say it all. Suffix and system prompt are in it already."""
    sample = pair.sample
    videos = [os.path.relpath(medium.path, folder) for medium in sample.media]
    *before, text = sample.messages[-1].content
    row: dict[str, Any] = {"id": sample.id}
    if len(sample.messages) == 1 and isinstance(text, str) and before == [MediumRef(i) for i in range(len(videos))]:
        row |= ({"video": videos[0] if len(videos) == 1 else videos} if videos else {}) | {"question": text}
    else:
        row["messages"] = [
            {
                "role": message.role,
                "content": [
                    {"type": "video", "video": videos[part.index]}
                    if isinstance(part, MediumRef)
                    else {"type": "text", "text": part}
                    for part in message.content
                ],
            }
            for message in sample.messages
        ]
    known = {"answer": sample.answer, "problem_type": sample.problem_type}
    row |= {key: value for key, value in known.items() if value}
    return row | {"chosen": pair.chosen, "rejected": pair.rejected} | dict(pair.meta)


def write_preferences(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write manifest rows, each with chosen and rejected; whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    with part.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
