"""From published items to a manifest. Videos and pictures stay where they are."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlvid.data.dialects.dialect import Dialect, Item, Refused, Roots, Row, plain
from rlvid.data.items import read_items, refuse_all
from rlvid.data.manifest import RowReader, load_manifest
from rlvid.data.row_media import MediaReader
from rlvid.errors import UserError
from rlvid.files import naming_write_errors, write_rows
from rlvid.types import Sample

MANIFEST, REFUSED, ITEMS = "manifest.jsonl", "refused.jsonl", "items.jsonl"
PATTERNS = ("*.json", "*.jsonl", "*.parquet", "*.tsv")
ANYWHERE = MediaReader(Path("/"), True)  # `Roots.find` has checked all paths


def load_published(
    source: Path, dialect: Dialect, roots: Roots, system_prompt: str | None, suffix: str, needs_answer: bool = True
) -> tuple[list[Sample], list[tuple[str, str]]]:
    """The samples of a published file as it is, and (id, reason) of the items that cannot be used.

    Raises:
        UserError: the file cannot be read, or no item is left.
    """
    found, refused = _read(source, dialect, roots, RowReader(ANYWHERE, system_prompt, suffix, needs_answer))
    _check_some_left(str(source), found, refused)
    samples = [sample for _, sample in found.values()]
    return samples, [(str(row["id"] or row["where"]), str(row["reason"])) for row in refused.values()]


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
    found, refused = _read(source, dialect, roots, RowReader(ANYWHERE, None, "", needs_answer=False))
    kept = [(row, sample) for row, sample in found.values() if only in (None, row.get("source"))]
    _check_some_left(f"{source}{f' of source {only}' if only else ''}", kept, refused)
    rows, files = [row for row, _ in kept], {Path(f) for _, s in kept for medium in s.media for f in medium.files}
    if dialect.mismatch:
        rows += dialect.mismatch(rows, mismatched, np.random.default_rng(seed))
    with naming_write_errors(f"the converted set {out}", "make room or name another folder, and start it again"):
        written, root = _written(rows, files, out.absolute())
        out.mkdir(parents=True, exist_ok=True)
        write_rows(out / REFUSED, refused.values())
        write_rows(out / MANIFEST, written)
    return Converted(out / MANIFEST, len(written), len(refused), root)


def write_as(source: Path, out: Path, dialect: Dialect, root: Path | None) -> Converted:
    """Write `items.jsonl` with the rows of a manifest as items of a dialect, their paths absolute, and `refused.jsonl`
    with those that it cannot express. MMLA has a folder for each of its data sets.

    Args:
        root: As `data.root`.

    Raises:
        UserError: the dialect is only read, the manifest cannot be read, nothing left, `out` cannot be written.
    """
    if dialect.write is None:
        raise UserError("--to: this dialect can only be read")
    samples = load_manifest(source, root, None, "", needs_answer=False)
    rows = (row for _, row in read_items(source) if not isinstance(row, Refused))
    refused: dict[str, Row] = {}
    files: dict[Path, list[Item]] = {}
    for sample, row in zip(samples, rows, strict=True):
        try:
            item = dict(dialect.write(row, sample))
        except (Refused, KeyError) as error:
            reason = str(error) if isinstance(error, Refused) else f"the row has no {error}, which this dialect needs"
            refused[sample.id] = {"id": sample.id, "where": str(source), "reason": reason}
        else:
            files.setdefault(out / str(item.pop("folder", "")) / ITEMS, []).append(item)
    _check_some_left(str(source), files, refused)
    with naming_write_errors(f"the converted set {out}", "make room or name another folder, and start it again"):
        for file, items in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_rows(file, items)
        write_rows(out / REFUSED, refused.values())
    written = next(iter(files)) if len(files) == 1 else out
    return Converted(written, sum(map(len, files.values())), len(refused), None)


def _files_of_items(source: Path) -> list[Path]:
    """The files of a folder; or a file alone.

    Raises:
        UserError: the folder holds none.
    """
    files = sorted(f for p in PATTERNS for f in source.rglob(p)) if source.is_dir() else [source]
    if not files:
        raise UserError(f"{source} holds no file of items ({', '.join(PATTERNS)})")
    return files


def _read(
    source: Path, dialect: Dialect, roots: Roots, reader: RowReader
) -> tuple[dict[str, tuple[Row, Sample]], dict[str, Row]]:
    """Rows with their samples, and a note on each refused item, both by file and line.

    Raises:
        UserError: a file cannot be read.
    """
    found: dict[str, tuple[Row, Sample]] = {}
    refused, first = dict[str, Row](), dict[str, str]()
    for file in _files_of_items(source):
        at = replace(roots, folder=(roots.folder or file.parent).absolute(), file=file.absolute())
        for number, item in read_items(file, tables=True):
            where, name = f"{file}:{number}", ""
            try:
                if isinstance(item, Refused):
                    raise item
                name = id_of(item) or (number_of(file, number) if dialect.is_numbered else "")
                row = {"id": name, **dialect.read(item, at)}
                if not row["id"]:
                    raise Refused("expected an object with an id")
                if row["id"] in first and dialect.is_numbered:  # the id of its video, for example
                    row["id"] = f"{row['id']}-{number}"
                if (earlier := first.setdefault(row["id"], where)) != where:
                    raise Refused(f"it has the same id as {earlier}")
                found[where] = row, reader.sample(plain(row))
            except Refused as reason:
                refused[where] = {"id": name or None, "where": where, "reason": str(reason)}
    return found, refused


def number_of(file: Path, number: int) -> str:
    """The id of an item that has none."""
    return f"{file.absolute().parent.name}-{file.name.partition('.')[0]}-{number}"


def id_of(item: Item) -> str:
    """The item's own id; empty if it has none."""
    value = item.get("id")
    return str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _check_some_left(source: str, rows: Collection[Any], refused: Mapping[str, Row]) -> None:
    if not rows:
        first = [f"{row['where']}: {row['reason']}" for row in refused.values()]
        refuse_all([f"no item left of {source}, {len(refused)} refused", *first])


def _written(rows: Sequence[Row], files: Collection[Path], out: Path) -> tuple[list[Row], Path | None]:
    """Rows with their paths, all of `files`, as text, and the folder above them where that is not `out`."""
    is_inside = all(file.is_relative_to(out) for file in files)
    texts = {file: os.path.relpath(file, out) if is_inside else str(file) for file in files}
    written = [plain(row, texts.__getitem__) for row in rows]
    return written, None if is_inside else Path(os.path.commonpath([file.parent for file in files]))
