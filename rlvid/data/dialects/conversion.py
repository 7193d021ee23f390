"""From published items to a manifest. Videos and pictures stay where they are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rlvid.data.dialects.dialect import Dialect, Item, Pictures, Refused, Roots, Row
from rlvid.data.items import read_items, refuse_all
from rlvid.errors import UserError
from rlvid.files import naming_write_errors, write_rows

MANIFEST, REFUSED = "manifest.jsonl", "refused.jsonl"


@dataclass(frozen=True)
class Converted:
    """What `convert` has written."""

    manifest: Path
    n_rows: int
    n_refused: int
    root: Path | None  # what `data.root` has to be; None where all media are below the manifest's folder


def convert(
    source: Path,
    out: Path,
    dialect: Dialect,
    roots: Roots,
    only: str | None = None,
    mismatched: float = 0.0,
    seed: int = 0,
) -> Converted:
    """Write `manifest.jsonl`, and `refused.jsonl` with the items that cannot be used. Nothing is written before all
    items are read.

    Args:
        source: A file of items, or a folder of such files.
        roots: Where the files are that the items name.
        only: Keep the rows of this source.
        mismatched: Share of the rows that come again with the text of another video.
        seed: Of the mismatched rows.

    Raises:
        UserError: an option that the dialect does not have, nothing to read, nothing left, `out` cannot be written.
    """
    if only is not None and only not in dialect.sources:
        raise UserError(f"--source {only}: expected one of {', '.join(dialect.sources) or 'none in this dialect'}")
    if not 0 <= mismatched <= 1:
        raise UserError(f"--mismatched is a share from 0 to 1, got {mismatched:g}")
    if mismatched and dialect.mismatch is None:
        raise UserError("--mismatched: this dialect has no rows that could be mismatched")
    rows, refused = _read(source, dialect, roots)
    rows = {where: row for where, row in rows.items() if only in (None, row.get("source"))}
    _check_some_left(f"{source}{f' of source {only}' if only else ''}", rows, refused)
    more = dialect.mismatch([*rows.values()], mismatched, np.random.default_rng(seed)) if dialect.mismatch else []
    with naming_write_errors(f"the converted set {out}", "make room or name another folder, and start it again"):
        written, root = _written([*rows.values(), *more], out.absolute())
        out.mkdir(parents=True, exist_ok=True)
        write_rows(out / REFUSED, refused.values())
        write_rows(out / MANIFEST, written)
    return Converted(out / MANIFEST, len(written), len(refused), root)


def _read(source: Path, dialect: Dialect, roots: Roots) -> tuple[dict[str, Row], dict[str, Row]]:
    """Rows, and a note on each refused item, both by file and line."""
    patterns = ("*.json", "*.jsonl", "*.parquet")
    files = sorted(f for p in patterns for f in source.rglob(p)) if source.is_dir() else [source]
    if not files:
        raise UserError(f"{source} holds no file of items ({', '.join(patterns)})")
    rows, refused, first = dict[str, Row](), dict[str, Row](), dict[str, str]()
    for file in files:
        at = replace(roots, folder=(roots.folder or file.parent).absolute())
        for number, item in read_items(file):
            where, name = f"{file}:{number}", ""
            try:
                if isinstance(item, Refused):
                    raise item
                name = _id(item)
                row = {"id": name, **dialect.read(item, at)}
                if not row["id"]:
                    raise Refused("expected an object with an id")
                if (earlier := first.setdefault(row["id"], where)) != where:
                    raise Refused(f"it has the same id as {earlier}")
                rows[where] = row
            except Refused as reason:
                refused[where] = {"id": name or None, "where": where, "reason": str(reason)}
    return rows, refused


def _id(item: Item) -> str:
    value = item.get("id")
    return str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _check_some_left(source: str, rows: Mapping[str, Row], refused: Mapping[str, Row]) -> None:
    if not rows:
        first = [f"{row['where']}: {row['reason']}" for row in refused.values()]
        refuse_all([f"no item left of {source}, {len(refused)} refused", *first])


def _videos(row: Row) -> list[Path | Pictures]:
    video = row.get("video")
    return video if isinstance(video, list) else [] if video is None else [video]


def _files(medium: Path | Pictures) -> Sequence[Path]:
    return medium.files if isinstance(medium, Pictures) else (medium,)


def _written(rows: Sequence[Row], out: Path) -> tuple[list[Row], Path | None]:
    """Rows with paths as text, and the folder above all of them where that is not `out`."""
    files = {file for row in rows for medium in _videos(row) for file in _files(medium)}
    is_inside = all(file.is_relative_to(out) for file in files)
    texts = {file: os.path.relpath(file, out) if is_inside else str(file) for file in files}
    written = []
    for row in rows:
        own = [
            [texts[file] for file in medium.files] if isinstance(medium, Pictures) else texts[medium]
            for medium in _videos(row)
        ]
        new: Row = {"video": own if isinstance(row.get("video"), list) else own[0]} if own else {}
        if rates := [medium.fps for medium in _videos(row) if isinstance(medium, Pictures)]:
            new["fps"] = rates[0]  # a dialect has one rate
        written.append({**row, **new})
    return written, None if is_inside else Path(os.path.commonpath([file.parent for file in files]))
