"""From published items to a manifest. Videos stay where they are; pictures become lossless clips (FFV1) beside it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from rlvid.data.dialects.dialect import Dialect, Item, Pictures, Refused, Roots, Row
from rlvid.data.items import read_items, refuse_all
from rlvid.errors import UserError
from rlvid.files import naming_write_errors, write_rows

MANIFEST, REFUSED, CLIPS = "manifest.jsonl", "refused.jsonl", "clips"


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
    """Write `manifest.jsonl`, `refused.jsonl` with the items that cannot be used, and `clips/` where there are
    pictures. Nothing is written before all items are read.

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
        places = _places({medium for row in rows.values() for medium in _media(row)}, out.absolute())
        for where, row in list(rows.items()):
            if reasons := [str(places[m]) for m in _media(row) if isinstance(places[m], Refused)]:
                refused[where] = {"id": row["id"], "where": where, "reason": reasons[0]}
                del rows[where]
        _check_some_left(str(source), rows, refused)
        more = [row for row in more if not any(isinstance(places[m], Refused) for m in _media(row))]
        written, root = _written([*rows.values(), *more], places, out.absolute())
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


def _media(row: Row) -> list[Path | Pictures]:
    video = row.get("video")
    return video if isinstance(video, list) else [] if video is None else [video]


def _written(rows: Sequence[Row], places: Mapping[Any, Any], out: Path) -> tuple[list[Row], Path | None]:
    """Rows with paths as text, and the folder above all of them where that is not `out`."""
    paths = {places[medium] for row in rows for medium in _media(row)}
    is_inside = all(path.is_relative_to(out) for path in paths)
    texts = {path: os.path.relpath(path, out) if is_inside else str(path) for path in paths}
    written = []
    for row in rows:
        own = [texts[places[medium]] for medium in _media(row)]
        written.append({**row, "video": own if isinstance(row["video"], list) else own[0]} if own else row)
    return written, None if is_inside else Path(os.path.commonpath([path.parent for path in paths]))


def _places(media: Collection[Path | Pictures], out: Path) -> dict[Path | Pictures, Path | Refused]:
    """Where each medium is: a video where it was, pictures as a clip under `out/clips`, or why they are none."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding and encoding release the interpreter
        return dict(zip(media, pool.map(lambda m: _clip(m, out) if isinstance(m, Pictures) else m, media), strict=True))


def _clip(pictures: Pictures, out: Path) -> Path | Refused:
    """Make one clip of pictures; one that is there is kept."""
    name = hashlib.sha256("\n".join(map(str, (pictures.fps, *pictures.files))).encode()).hexdigest()[:32]
    clip = out / CLIPS / f"{name}.mkv"
    if not clip.exists():
        try:
            frames = [_picture(file) for file in pictures.files]
        except Refused as refused:
            return refused
        if len({f.shape for f in frames}) > 1:
            return Refused("its frames differ in size")
        clip.parent.mkdir(parents=True, exist_ok=True)
        unfinished = clip.with_suffix(".part")
        write_lossless(unfinished, np.stack(frames), pictures.fps)
        unfinished.replace(clip)
    return clip


def _picture(file: Path) -> npt.NDArray[np.uint8]:
    """[H, W, 3] uint8 RGB."""
    try:
        with av.open(str(file)) as container:
            return next(container.decode(video=0)).to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    except (av.error.FFmpegError, StopIteration, IndexError) as e:
        raise Refused(f"frame {file.name} cannot be read: {e}") from None


def write_lossless(path: Path, frames: npt.NDArray[np.uint8], fps: int) -> None:
    """Write [T, H, W, 3] uint8 RGB frames as FFV1 in Matroska, without loss in RGB."""
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
