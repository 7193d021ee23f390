"""What a dialect is: a function from one published item to one row of a manifest, and what it may use.

The function is pure: it writes nothing and copies no video. It names files by `Roots.find`, which checks that they are
there. A video that comes as frames is the list of them, with `fps` beside it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlvid.data.items import Refused
from rlvid.data.row_media import PICTURES, PLACEHOLDER
from rlvid.types import Medium, Sample

Item = Mapping[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Roots:
    """Where the files are that items name."""

    folder: Path | None = None  # where relative paths start; None: the folder of the items' file
    mapped: tuple[tuple[str, str], ...] = ()  # (old, new) beginnings of paths
    file: Path | None = None  # of the items

    def find(self, *names: str, is_there: Callable[[Path], bool] = Path.is_file) -> Path:
        """The first of `names` that is there, as absolute path.

        Raises:
            Refused: none is, or it is outside the folder and the mapped roots.
        """
        folder = os.path.abspath(self.folder or ".")
        allowed = [folder, *(os.path.abspath(new) for _, new in self.mapped)]
        for name in names:
            old, new = next((pair for pair in self.mapped if name.startswith(pair[0])), ("", ""))
            path = Path(os.path.normpath(os.path.join(folder, new + name.removeprefix(old))))
            if not any(path.is_relative_to(root) for root in allowed):
                raise Refused(f"{name} is not under {' or '.join(allowed)}")
            if is_there(path):
                return path
        raise Refused(f"there is no file {names[0]} under {folder}")


@dataclass(frozen=True)
class Dialect:
    """One published form of items.

    Attributes:
        read: The row of an item as a manifest has it, but with `Path`s; the item's id is its id unless it has another
            one. Raises `Refused` with the reason why an item cannot be used.
        about: For the help.
        is_like: Whether an item is surely of this dialect.
        is_numbered: Items may have no id; they are numbered.
        sources: Values of the rows' field "source", which `--source` selects.
        mismatch: More rows for a share of the rows, whose text is that of another video.
        write: The reverse of `read`: an item of a manifest's row and its sample. Raises `Refused` where the dialect
            cannot express all of it.
    """

    read: Callable[[Item, Roots], Row]
    about: str
    is_like: Callable[[Item], bool]
    is_numbered: bool = False
    sources: tuple[str, ...] = ()
    mismatch: Callable[[Sequence[Row], float, np.random.Generator], list[Row]] | None = None
    write: Callable[[Row, Sample], Item] | None = None


def plain(value: Any, text: Callable[[Path], str] = str) -> Any:
    """A row with its paths as text."""
    if isinstance(value, Path):
        return text(value)
    if isinstance(value, list):
        return [plain(part, text) for part in value]
    return {key: plain(part, text) for key, part in value.items()} if isinstance(value, dict) else value


def text_of(item: Item, key: str) -> str:
    """
    Raises:
        Refused: it is no text, or empty.
    """
    value = item.get(key)
    if not isinstance(value, str) or not value.strip():
        raise Refused(f"{key} is missing or empty")
    return value


def pictures_of(item: Item) -> list[str]:
    """
    Raises:
        Refused: "images" is no list of names.
    """
    images = item.get("images")
    if not isinstance(images, list) or not images or not all(isinstance(name, str) for name in images):
        raise Refused("images must be a list of files that is not empty")
    return images


def only_question(sample: Sample) -> tuple[Medium, str]:
    """The medium and the text of a sample that is one question about one medium.

    Raises:
        Refused: it is anything else.
    """
    if len(sample.media) != 1 or len(sample.messages) != 1:
        raise Refused("this dialect has one question about one video or image, without history and system turn")
    return sample.media[0], sample.question


def name_of(medium: Medium, frames_per_s: float | None = None) -> str:
    """The path of a file, or of the folder whose pictures are the frames of a video.

    Args:
        frames_per_s: of such a folder; None: the dialect has none.

    Raises:
        Refused: it is a part of a video, or frames at another rate or from several folders.
    """
    if {medium.start_s, medium.end_s, medium.fps, medium.max_pixels} != {None}:
        raise Refused(f"{medium.path}: this dialect has no parts of a video, fps or max_pixels")
    if not medium.pictures:
        return medium.path
    folder = os.path.dirname(medium.path)
    if frames_per_s is None:
        raise Refused(f"{folder}: this dialect has no videos that are given as frames")
    if medium.pictures_per_s != frames_per_s or list(medium.pictures) != frames_in(Path(folder)):
        raise Refused(f"{folder}: frames must be all pictures of a folder, {frames_per_s:g} a second")
    return folder


def frames_in(folder: Path) -> list[str]:
    """The pictures of a folder in their order."""
    return [str(f) for f in sorted(folder.iterdir()) if f.suffix.lower() in PICTURES]


def question_of(text: str) -> str:
    """A question without its placeholders: in a manifest the media come before it."""
    return PLACEHOLDER.sub("", text).strip()


def sides(chosen: str, rejected: str) -> Row:
    """
    Raises:
        Refused: one is empty, or both are the same.
    """
    if not chosen.strip() or not rejected.strip():
        raise Refused("a side is empty")
    if chosen == rejected:
        raise Refused("both sides are the same")
    return {"chosen": chosen, "rejected": rejected}
