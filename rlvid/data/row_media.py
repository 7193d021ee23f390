"""The media of a manifest row: which files, which part of them, and what looks like a medium but is not read."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from rlvid.data.items import Refused
from rlvid.types import Medium

PLACEHOLDER = re.compile(r"<(video|image)>")
READ_AS = {"video_start": "start_s", "video_end": "end_s", "fps": "fps", "max_pixels": "max_pixels"}
MEDIA_FIELDS = frozenset({"video", "image", *READ_AS})
NOT_SUPPORTED = {"nframes", "min_frames", "max_frames", "min_pixels", "total_pixels", "resized_height", "resized_width"}
STILL = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
PICTURES = (*STILL, ".webp")  # which may move
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".gif")
SOUNDS = (".wav", ".mp3", ".flac", ".m4a", ".ogg")
_WORDS = r"(?:videos?|images?|clips?|frames?|pictures?|photos?|media|medium|audios?|movies?|films?)"
_HAS_MEDIA_WORD = re.compile(rf"(?:.*[_-])?{_WORDS}(?:[_-].*)?", re.IGNORECASE)
_IS_MEDIA_NAME = re.compile(rf"{_WORDS}(?:[_-]?(?:paths?|files?|urls?|bytes|list))?", re.IGNORECASE)


class MediaReader:
    """Reads the media of rows whose relative paths are below `base`; no path may lead out of it."""

    def __init__(self, base: Path, is_chosen: bool):
        """`is_chosen`: the user has set `data.root`, to `base`."""
        self._base, self._is_chosen = str(base), is_chosen
        self._prefix = self._base.rstrip("/") + "/"
        self._known: dict[tuple[Any, ...], Medium] = {}  # many rows ask about one video

    def of_row(self, row: Mapping[str, Any]) -> list[Medium]:
        """Videos, then images.

        Raises:
            Refused: one of them cannot be meant, or leads out of the root.
        """
        videos, images = as_list(row.get("video")), as_list(row.get("image"))
        if isinstance(row.get("video"), list) and videos and all(map(_is_picture, videos)):
            videos = [videos]  # the frames of one
        part = read_part(row)
        if part and not videos:
            raise Refused(f"{next(key for key in READ_AS if key in row)} is given, but there is no video")
        if len(videos) > 1 and ("start_s" in part or "end_s" in part):
            raise Refused(
                "video_start and video_end are of one video; with several, write them beside each in messages"
            )
        return [
            *(self.medium(video, "video", part) for video in videos),
            *(self.medium(image, "image", {}) for image in images),
        ]

    def medium(self, path: object, kind: Literal["video", "image"], part: Mapping[str, Any]) -> Medium:
        """The medium at `path`, which for a video may be the list of its frames.

        Raises:
            Refused: it cannot be meant. A path is untrusted: it must not lead out of the base.
        """
        if kind == "image" and part:
            raise Refused(f"an image has none of {', '.join(READ_AS)}")
        files = path if isinstance(path, list) and kind == "video" else [path]
        key = (kind, isinstance(path, list), *part.items(), *map(str, files))
        if key not in self._known:
            if isinstance(path, list) and not (path and all(map(_is_picture, path))):
                raise Refused(f"{kind} must be a path, a list of paths, or one of pictures, got {path!r:.80}")
            if kind == "video" and isinstance(path, str) and path.lower().endswith(STILL):
                raise Refused(f"video {path!r} is a picture; name it as image, or the list of a video's pictures")
            paths = tuple(self._absolute(file, kind) for file in files)
            how = dict(part)
            if isinstance(path, list):
                if "fps" not in part:
                    raise Refused("a video of pictures needs fps, how many of them are a second")
                how |= {"pictures": paths, "pictures_per_s": how.pop("fps")}
            self._known[key] = Medium(paths[0], kind, **how)
        return self._known[key]

    def _absolute(self, path: object, kind: str) -> str:
        if not isinstance(path, str) or not path.strip() or "\0" in path:
            raise Refused(f"{kind} must be a path or a list of paths, got {path!r:.80}")
        if "://" in path:
            raise Refused(f"{kind} {path!r} is a URL; download it and give its path")
        absolute = os.path.normpath(os.path.join(self._base, path))
        if not absolute.startswith(self._prefix) or absolute == self._prefix:
            is_set = "data.root is this folder; set it" if self._is_chosen else "set data.root"
            fix = f"{is_set} to one above all videos, where relative paths start"
            raise Refused(f"{kind} {path!r} is not under {self._base}; {fix}")
        return absolute


def read_part(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Which part of a video is read and how: arguments of `Medium`.

    Raises:
        Refused: a value cannot be meant, or is not supported.
    """
    if other := NOT_SUPPORTED & fields.keys():
        raise Refused(f"{min(other)} of a single video is not supported; {', '.join(READ_AS)} are")
    part: dict[str, Any] = {}
    if not fields.keys() & READ_AS.keys():
        return part
    for key, name in READ_AS.items():
        if (value := fields.get(key)) is None:
            continue
        least = 0 if name in ("start_s", "end_s") else 1e-9 if name == "fps" else 1
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
            raise Refused(f"{key} must be a number of at least {least:g}, got {value!r:.40}")
        if name == "max_pixels" and value != int(value):
            raise Refused(f"max_pixels must be a whole number, got {value!r}")
        part[name] = int(value) if name == "max_pixels" else float(value)
    if "end_s" in part and part["end_s"] <= part.get("start_s", 0.0):
        raise Refused(f"video_end ({part['end_s']:g}) must be after video_start ({part.get('start_s', 0.0):g})")
    return part


def check_unread(row: Mapping[str, Any], known: frozenset[str]) -> None:
    """Refuse fields that would be ignored although they look like a medium, or like a field that the row lacks.

    Raises:
        Refused: there is one.
    """
    has_media = any(row.get(key) is not None for key in ("video", "image", "messages"))
    for key in row.keys() - known:
        value = row[key][0] if isinstance(row[key], list) and row[key] else row[key]
        if not value or key in NOT_SUPPORTED:
            continue
        near = _nearest(key, known)
        if near is not None and row.get(near) is None:
            raise Refused(f"{key!r} is not read; write it as {near!r}")
        is_file = isinstance(value, bytes) or (isinstance(value, dict) and bool(value.keys() & {"bytes", "path"}))
        is_file = is_file or (isinstance(value, str) and value.lower().endswith(VIDEOS + PICTURES + SOUNDS))
        if (is_file and (not has_media or _HAS_MEDIA_WORD.fullmatch(key))) or (
            isinstance(value, str | dict) and _IS_MEDIA_NAME.fullmatch(key)
        ):
            raise Refused(f"{key!r} looks like a medium but is not read; write 'video' or 'image', or take it out")


@lru_cache
def _nearest(key: str, known: frozenset[str]) -> str | None:
    near = difflib.get_close_matches(key.casefold(), sorted(known), n=1, cutoff=0.9)
    return near[0] if near else None


def _is_picture(path: object) -> bool:
    return isinstance(path, str) and path.lower().endswith(PICTURES)


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
