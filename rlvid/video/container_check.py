"""What a container's own bytes say about the file being whole: cut short, or joined from several recordings.

Some demuxers just stop at the end of what is there, and a third of a video would pass for the whole. Formats without a
stated length (MPEG-TS, GIF, live recordings) cannot be checked for a cut; neither can a header that a recorder which
cannot seek left unfinished.
"""

from __future__ import annotations

import os
from typing import BinaryIO

import numpy as np

_SIZED_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"uuid", b"sidx")
_CHUNKS, _PACKETS = (b"LIST", b"JUNK", b"idx1"), (b"dc", b"db", b"wb", b"pc", b"tx")  # of AVI; "00dc" is a packet
_UNKNOWN = (0, 0xFFFFFFFF)  # lengths that a recorder fills in at the end, if it can seek
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_TS_PACKET, _TS_SYNC = 188, 0x47  # size in bytes, first byte


def missing_bytes(path: str) -> int:
    """How many bytes the container announces beyond the end of the file; 0 where it does not say.

    Raises:
        OSError: The file cannot be read.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(4)
        end_of = {b"RIFF": _end_of_chunks, _EBML: _end_of_segment}.get(start, _end_of_boxes)
        return max(0, end_of(file, size) - size)


def is_joined(path: str, pid: int) -> bool:
    """Whether the packets of a transport stream (188 bytes each) break off only where recordings were joined.

    The counter of packet identifier `pid` jumps where packets were lost, and where a second recording was appended. The
    latter begins with a program table whose counter jumps too, or starts at 0 with that of `pid`; then a new frame.
    """
    data = np.memmap(path, np.uint8, "r")
    packets = data[: len(data) // _TS_PACKET * _TS_PACKET].reshape(-1, _TS_PACKET)
    if (packets[:, 0] != _TS_SYNC).any():
        return False
    flags, count = packets[:, 1], packets[:, 3] & 15
    pids = (flags & 31).astype(int) << 8 | packets[:, 2]
    own = np.flatnonzero((pids == pid) & (packets[:, 3] & 16 > 0))  # packets with a payload count
    tables = np.flatnonzero(pids == 0)
    table_jumps = np.diff(count[tables], prepend=count[tables[:1]]) & 15 != 1
    breaks = np.flatnonzero(np.diff(count[own]) & 15 != 1)
    for last, first in zip(own[breaks], own[breaks + 1], strict=True):
        between = (tables > last) & (tables < first)
        is_restarted = between & (table_jumps | ((count[tables] == 0) & (count[first] == 0)))
        if not (is_restarted.any() and flags[first] & 64):
            return False
    return len(breaks) > 0


def _end_of_chunks(file: BinaryIO, size: int) -> int:
    """End of an AVI file, which may be several RIFF chunks that hold other chunks.

    Where the chunks inside are whole and only the length of the RIFF around them says more, that length is wrong.
    """
    position = end = announced = 0
    while position < size:
        file.seek(position)
        head = file.read(8)
        name, length = head[:4], int.from_bytes(head[4:], "little")
        if name == b"RIFF":
            announced = 0 if length in _UNKNOWN else position + 8 + length
        if name == b"RIFF" or (name == b"LIST" and length in _UNKNOWN):
            position += 12
        elif name not in _CHUNKS and name[2:] not in _PACKETS:
            break
        else:
            end = position + 8 + length
            position = end + length % 2
    return max(end, announced) if end > size else 0


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    """End of the last top-level box of an MP4 or QuickTime file (ISO 14496-12, 4.2); 0 for another file."""
    position = 0
    while position < size:
        file.seek(position)
        head = file.read(16)
        length = int.from_bytes(head[8:16] if head[:4] == b"\0\0\0\1" else head[:4], "big")
        # Appended junk, or a box that no frame depends on; a length of 0 means up to the end of the file.
        if head[4:8] not in _SIZED_BOXES or length < 8:
            break
        position += length
    return position


def _end_of_segment(file: BinaryIO, size: int) -> int:
    """End of a Matroska file's one segment (RFC 8794)."""
    header = _read_size(file)
    file.seek(header or 0, os.SEEK_CUR)
    segment = _read_size(file) if file.read(len(_SEGMENT)) == _SEGMENT else None
    return 0 if segment is None else file.tell() + segment


def _read_size(file: BinaryIO) -> int | None:
    """A variable-length size; None when it is the one that means unknown (live recordings), or malformed."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(length - 1), "big") & ((1 << 7 * length) - 1)
    return None if value == (1 << 7 * length) - 1 else value
