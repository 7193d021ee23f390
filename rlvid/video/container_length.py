"""Finds files that were cut short, by what their container says about its own length.

Some demuxers just stop at the end of what is there, and a third of a video would pass for the whole. Formats without a
stated length (MPEG-TS, GIF, live recordings) cannot be checked.
"""

from __future__ import annotations

import os
from typing import BinaryIO

_SIZED_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"uuid", b"sidx")
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def missing_bytes(path: str) -> int:
    """How many bytes the container announces beyond the end of the file; 0 where it does not say.

    Raises:
        OSError: The file cannot be read.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF":
            return max(0, 8 + int.from_bytes(head[4:8], "little") - size)
        if head[:4] == _EBML:
            return max(0, _end_of_segment(file) - size)
        if head[4:8] in _SIZED_BOXES:
            return max(0, _end_of_boxes(file, size) - size)
    return 0


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    """End of the last top-level box of an MP4 or QuickTime file (ISO 14496-12, 4.2)."""
    position = 0
    while position < size:
        file.seek(position)
        head = file.read(16)
        if head[4:8] not in _SIZED_BOXES:
            return position  # appended junk, or a box that no frame depends on
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8:  # 0: up to the end of the file
            return position
        position += length
    return position


def _end_of_segment(file: BinaryIO) -> int:
    """End of a Matroska file's one segment (RFC 8794)."""
    file.seek(len(_EBML))
    header = _read_size(file)
    if header is None:
        return 0
    file.seek(header, os.SEEK_CUR)
    if file.read(len(_SEGMENT)) != _SEGMENT:
        return 0
    segment = _read_size(file)
    return 0 if segment is None else file.tell() + segment


def _read_size(file: BinaryIO) -> int | None:
    """A variable-length size; None when it is the one that means unknown (live recordings), or malformed."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(length - 1), "big") & ((1 << 7 * length) - 1)
    return None if value == (1 << 7 * length) - 1 else value
