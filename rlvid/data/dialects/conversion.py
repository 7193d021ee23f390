"""Files of items that others have published, item by item: what the converters to manifests share.

An item that is refused stands in `refused.jsonl` with the reason; the others are kept. Frames that come as pictures
become one lossless clip (FFV1), so that everything behind sees a video like any other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from rlvid.errors import UserError

MANIFEST = "manifest.jsonl"


class Refused(ValueError):
    """An item that cannot be used. The message says why."""


def convert_items(
    source: Path, out: Path, row_of: Callable[[str, Any, Path], dict[str, Any] | None], wanted: str = ""
) -> tuple[list[dict[str, Any]], int]:
    """The rows of all items, and how many were refused; those are written to `out/refused.jsonl`.

    Args:
        source: a file of items (JSON list or JSON lines), or a folder of such files.
        row_of: given an item's id, the item and its file's folder, its manifest row, or None if it is not wanted.
            Raises `Refused`.
        wanted: said where nothing is left: which items were asked for.

    Raises:
        UserError: nothing to read, or nothing left.
    """
    (out / "clips").mkdir(parents=True, exist_ok=True)
    items = list(_items(source))
    first = {name_of(item): where for where, _, item in reversed(items)}

    def made(where: str, file: Path, item: Any) -> dict[str, Any] | Refused | None:
        try:
            if not (name := name_of(item)):
                raise Refused("expected an object with an id")
            if (earlier := first[name]) != where:
                raise Refused(f"it has the same id as {earlier}")
            return row_of(name, item, file.parent)
        except Refused as e:
            return e

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding and encoding let go of the interpreter
        outcomes = list(pool.map(made, *zip(*items, strict=True))) if items else []
    rows = [row for row in outcomes if isinstance(row, dict)]
    refused = [
        {"id": name_of(item) or None, "where": where, "reason": str(outcome)}
        for (where, _, item), outcome in zip(items, outcomes, strict=True)
        if isinstance(outcome, Refused)
    ]
    write_rows(out / "refused.jsonl", refused)
    if not rows:
        why = f"; the first: {refused[0]['where']}: {refused[0]['reason']}" if refused else ""
        raise UserError(f"{source}: no item left{wanted}, {len(refused)} refused{why}")
    return rows, len(refused)


def _items(source: Path) -> Iterator[tuple[str, Path, Any]]:
    """(where, file, item) of all files."""
    files = sorted(f for p in ("*.json", "*.jsonl") for f in source.rglob(p)) if source.is_dir() else [source]
    if not files:
        raise UserError(f"{source} holds no *.json or *.jsonl file of items")
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
            items = (
                json.loads(text)
                if text.lstrip().startswith("[")
                else [json.loads(x) for x in text.split("\n") if x.strip()]
            )
        except (OSError, ValueError) as e:
            raise UserError(f"{file} cannot be read as a JSON list or JSON lines: {e}") from e
        yield from ((f"{file}: item {i}", file, item) for i, item in enumerate(items))


def name_of(item: Any) -> str:
    """An item's id as text; "" where it has none."""
    value = item.get("id") if isinstance(item, dict) else None
    return str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""


def copied(file: Path, name: str, out: Path) -> str:
    """Put a video file under `out/clips`; returns its path relative to `out`. One that is there is kept."""
    target = Path("clips") / f"{_stem(name)}{file.suffix}"
    if not (out / target).exists():
        _place(lambda part: shutil.copyfile(file, part), out / target)
    return str(target)


def joined(files: Sequence[Path], name: str, out: Path, fps: int) -> str:
    """Make one clip of pictures under `out/clips`; returns its path relative to `out`. One that is there is kept.

    Raises:
        Refused: a picture cannot be read, or their sizes differ.
    """
    target = Path("clips") / f"{_stem(name)}.mkv"
    if not (out / target).exists():
        frames = [_picture(file) for file in files]
        if len({f.shape for f in frames}) > 1:
            raise Refused("its frames differ in size")
        _place(lambda part: write_lossless(part, np.stack(frames), fps), out / target)
    return str(target)


def _stem(name: str) -> str:
    return name if re.fullmatch(r"[\w-]{1,100}", name) else hashlib.sha256(name.encode()).hexdigest()


def inside(
    folder: Path, name: str, otherwise: Path | None = None, is_there: Callable[[Path], bool] = Path.is_file
) -> Path:
    """A file under `folder`, at `name` or `otherwise`.

    Raises:
        Refused: there is none.
    """
    for path in (Path(name), otherwise):
        if path is None:
            continue
        absolute = Path(os.path.normpath(folder.absolute() / path))
        if folder.absolute() not in absolute.parents:
            raise Refused(f"{name} is not under {folder}")
        if is_there(absolute):
            return absolute
    raise Refused(f"there is no file {name}")


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


def _place(write: Callable[[Path], object], target: Path) -> None:
    """Whole or not at all."""
    part = target.with_name(f"{target.name}.{threading.get_ident()}.part")  # two items may share a video
    write(part)
    part.replace(target)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)
