"""The default reader: FFmpeg through PyAV, every frame identified by its presentation time.

Libraries disagree on which frame is "number 17": open GOPs, edit lists, variable frame rates and headers that lie. So
the frame index comes from the packets, a frame counts as found only when its own time says so, and when one does not
appear the whole file is decoded in order. One thread per clip, because parallelism is over clips; only wanted frames
are converted, straight to the size of the model, and pictures that neither they nor others need are not decoded.

A file that is damaged where it is read is refused, not salvaged.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, Self, cast

import av
import av.logging
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorTrc, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from rlvid.config import VideoConfig
from rlvid.errors import BadClip
from rlvid.types import Medium
from rlvid.video.container_check import is_joined
from rlvid.video.display import Display
from rlvid.video.sampling import Indices, Seconds, sample_indices
from rlvid.video.sizes import target_size

NAME = f"pyav {av.__version__}"

# A clip is untrusted: a playlist or concat script renamed to .mp4 must not open other files or addresses.
_FORMATS = "mov,matroska,avi,gif,mpegts,mpeg,flv,asf,ogg,mpegvideo,m4v,h264,hevc,ivf,mxf,mp3,wav"
_OPEN_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
_SEEKABLE_FORMATS = frozenset({"mov", "matroska"})

av.logging.set_level(None)  # FFmpeg writes pages about a bad file; the reason is in BadClip


class _Unreadable(ValueError):
    """A reason for BadClip, found where the path is not known."""


class _Damaged(_Unreadable):
    """Part of the file that was read is broken."""


class _NotSeekable(Exception):
    """Seeking would not surely give the right frames: packets have no usable times, or a frame has another time."""


@dataclass(frozen=True)
class DecodedFrames:
    """The sampled frames of one file, as a reader returns them."""

    frames: npt.NDArray[np.uint8]  # [T, H, W, 3] RGB as displayed
    pts_s: Seconds  # [T] from the first frame of the file
    indices: Indices  # [T] in presentation order
    n_frames: int  # in the file
    fps: float  # average frame rate of the file

    @classmethod
    def of(cls, frames: npt.NDArray[np.uint8], indices: Indices, pts_s: Seconds, declared_fps: float) -> Self:
        """From the times [n] of all frames. The header's rate (0: it has none) counts for a single frame only."""
        span = float(pts_s[-1])
        fps = (len(pts_s) - 1) / span if span > 0 else declared_fps or 1.0
        return cls(frames, pts_s[indices], indices, len(pts_s), fps)


def seconds(times: Any, tick_s: float, declared_fps: float) -> Seconds:
    """Times [n] of `tick_s` as seconds from the first one; if they are not usable, those of a constant frame rate."""
    ticks = np.array(times, dtype=np.float64)  # None is nan
    if np.isfinite(ticks).all() and (np.diff(ticks) > 0).all():
        return (ticks - ticks[0]) * tick_s
    return np.arange(len(ticks)) / (declared_fps or 1.0)


def read_frames(medium: Medium, video: VideoConfig, multiple: int) -> DecodedFrames:
    """Read the sampled frames of one file at model resolution, as a player shows them.

    Args:
        medium: A video file or GIF, or a part of one.
        video: Sampling rule, size and time limit, with the medium's own.
        multiple: Height and width of frames are multiples of this, pixels.

    Raises:
        BadClip: The file cannot be opened or decoded, is damaged or cut short, holds no video, takes too long, or ends
            before the part does.
        UserError: The size does not fit `multiple`.
    """
    read = _Read(medium, video, multiple, time.monotonic() + video.timeout_s)
    with _as_bad_clip(medium.path):
        with suppress(_NotSeekable, _Damaged, av.FFmpegError):
            return _read_by_seeking(read)
        return _read_in_order(read)


def inspect(medium: Medium, video: VideoConfig) -> tuple[Display, str, int]:
    """How the first frame is displayed, name of the container format, and number of frames that are shown.

    For another reader, which would follow a playlist to other files, or show other frames without an error.

    Raises:
        BadClip: As `read_frames`.
    """
    read = _Read(medium, video, 1, time.monotonic() + video.timeout_s)
    with _as_bad_clip(medium.path), _open(read) as file:
        n_frames = sum(not packet.is_discard for packet in file.packets())
        file.container.seek(0)
        frame = next(file.decode(), None)
        if frame is None:
            raise _Unreadable("no frame could be decoded")
        return Display.of(frame, file.stream.sample_aspect_ratio), file.container.format.name, n_frames


@contextmanager
def _as_bad_clip(path: str) -> Iterator[None]:
    try:
        yield
    except (av.FFmpegError, LookupError) as error:  # LookupError: unknown codec, no such stream
        raise BadClip(path, f"cannot be decoded: {getattr(error, 'strerror', error)}") from error
    except ValueError as error:  # also: a display matrix that is not supported, a part that is not inside the file
        raise BadClip(path, str(error)) from error


@dataclass(frozen=True)
class _Read:
    """What is wanted of a file, and until when."""

    medium: Medium
    video: VideoConfig
    multiple: int
    deadline: float  # of time.monotonic()

    def indices(self, pts_s: Seconds) -> Indices:
        return sample_indices(self.video, pts_s, self.medium.start_s, self.medium.end_s)


def _read_by_seeking(read: _Read) -> DecodedFrames:
    """Decode from the keyframe before each wanted frame.

    Raises:
        _NotSeekable: That cannot be trusted.
    """
    with _open(read) as file:
        # AVI came out off by one this way, and MPEG-TS loses the leading frames of an open GOP. VP8 has packets that
        # show nothing but have a time.
        if not _SEEKABLE_FORMATS & set(file.container.format.name.split(",")) or file.codec.name == "vp8":
            raise _NotSeekable
        pts, key_pts = file.index()
        pts_s = file.seconds(pts)
        indices = read.indices(pts_s)
        # The first frame is always decoded: when it does not appear, the file starts with an open GOP or a cut, and
        # every index is off.
        wanted = {pts[position]: position for position in sorted({0, *indices.tolist()})}
        return DecodedFrames.of(file.pick(file.seek(wanted, key_pts), indices), indices, pts_s, file.declared_fps)


def _read_in_order(read: _Read) -> DecodedFrames:
    """Decode everything twice, to count and then to pick: little memory, and right for whatever decodes at all."""
    with _open(read) as file:
        pts = [frame.pts for frame in file.decode()]
        if not pts:
            raise _Unreadable("no frame could be decoded")
        pts_s = file.seconds(pts)
    indices = read.indices(pts_s)
    with _open(read) as file:
        return DecodedFrames.of(file.pick(enumerate(file.decode()), indices), indices, pts_s, file.declared_fps)


@contextmanager
def _open(read: _Read) -> Iterator[_File]:
    try:
        container = av.open(f"file:{read.medium.path}", options=_OPEN_OPTIONS, metadata_errors="replace")
    except av.ArgumentError:  # what FFmpeg says of a format that is not on the list
        raise _Unreadable(f"not a video file that is read here ({_FORMATS})") from None
    except av.FFmpegError as error:
        raise _Unreadable(f"cannot be opened: {error.strerror}") from None
    with container:
        stream = container.streams.best("video")
        if (
            not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic
        ):  # cover of a sound file
            raise _Unreadable("has no video stream")
        if stream.codec_context is None:
            raise _Unreadable("has a video codec that FFmpeg does not know")
        stream.thread_type = "NONE"
        yield _File(container, stream, read)


class _File:
    """An open file and its video stream."""

    def __init__(self, container: InputContainer, stream: VideoStream, read: _Read):
        self.container, self.stream, self._read = container, stream, read
        self.codec = stream.codec_context
        self.declared_fps = float(stream.average_rate or 0)
        # AVFieldOrder: unknown (codecs without fields), progressive. Else two packets may be the fields of one picture.
        self._is_progressive = self.codec.field_order in (0, 1)

    def seconds(self, pts: Sequence[int | None]) -> Seconds:
        return seconds(pts, float(self.stream.time_base or 1), self.declared_fps)

    def packets(self) -> Iterator[Packet[VideoStream]]:
        """The packets from the current position on; `video.timeout_s` ends it between two of them.

        A decoder that hangs inside one is up to the caller's process.
        """
        is_trusted = False
        for packet in self.container.demux(self.stream):
            if time.monotonic() > self._read.deadline:
                raise _Unreadable(f"reading took longer than video.timeout_s={self._read.video.timeout_s:g} s")
            # FFmpeg flags the last packets before a joint of a transport stream, although they are whole.
            if packet.is_corrupt and not is_trusted:
                is_trusted = self.container.format.name == "mpegts" and is_joined(
                    self._read.medium.path, self.stream.id
                )
                if not is_trusted:
                    raise _Damaged("is damaged or cut short (a packet is incomplete)")
            if packet.size:  # the last one is empty
                yield packet

    def decode(self) -> Iterator[VideoFrame]:
        for packet in self.packets():
            yield from _intact(self.codec.decode(packet))
        yield from _intact(self.codec.decode(None))

    def index(self) -> tuple[list[int], list[int]]:
        """Times of all frames and of the keyframes as the packets announce them, rising, in the stream's time base.

        Raises:
            _NotSeekable: The times do not identify frames.
        """
        packets = [(packet.pts, packet.is_keyframe, packet.is_discard) for packet in self.packets()]
        if any(pts is None for pts, _, _ in packets):
            raise _NotSeekable
        # An edit list hides the discarded ones: decoded, never shown.
        pts = sorted(cast(int, pts) for pts, _, is_discard in packets if not is_discard)
        key_pts = sorted(cast(int, pts) for pts, is_key, _ in packets if is_key)
        if not pts:
            raise _Unreadable("has no frames")
        if not key_pts or len(set(pts)) < len(pts):
            raise _NotSeekable
        return pts, key_pts

    def seek(self, wanted: Mapping[int, int], key_pts: list[int]) -> Iterator[tuple[int, VideoFrame]]:
        """The frames at the rising times `wanted`, with the positions that it gives them.

        Raises:
            _NotSeekable: Decoding from the keyframe before did not show it.
        """
        for n_before, group in groupby(wanted, lambda time_of_frame: bisect_right(key_pts, time_of_frame)):
            if n_before == 0:
                raise _NotSeekable
            times = dict.fromkeys(group)
            self.container.seek(key_pts[n_before - 1], stream=self.stream, backward=True)
            found = (frame for frame in self._decode_only(times) if frame.pts in times)
            for time_of_frame in times:
                frame = next(found, None)
                if frame is None or frame.pts != time_of_frame or (frame.interlaced_frame and self._is_progressive):
                    raise _NotSeekable
                yield wanted[time_of_frame], frame

    def _decode_only(self, wanted: Collection[int]) -> Iterator[VideoFrame]:
        """Decode from the current position until all times `wanted` are there, and of the rest only what they need.

        Pictures that no other one refers to are a third to a half of a file with B-frames: they are left out. After the
        last packet of `wanted` the decoder is emptied, instead of feeding it as many packets as it holds back.
        """
        missing = set(wanted)
        is_skipping = self._is_progressive and _tells_unreferenced(self.codec)
        for packet in self.packets():
            self.codec.skip_frame = "NONREF" if is_skipping and packet.pts not in wanted else "DEFAULT"
            yield from _intact(self.codec.decode(packet))
            missing.discard(cast(int, packet.pts))
            if self._is_progressive and not missing:  # half a picture must not be forced out
                break
        yield from _intact(self.codec.decode(None))

    def pick(self, frames: Iterable[tuple[int, VideoFrame]], indices: Indices) -> npt.NDArray[np.uint8]:
        """Convert the frames at `indices` [T] to RGB [T, H, W, 3] at model resolution, as displayed.

        `frames` gives (index, frame) in rising order from 0: the first frame decides size and orientation.
        """
        wanted, place = np.unique(indices, return_inverse=True)
        reformatter = VideoReformatter()
        found = 0
        for position, frame in frames:
            if position == 0:
                display = Display.of(frame, self.stream.sample_aspect_ratio)
                size = target_size(display.height, display.width, self._read.video, self._read.multiple)
                rgb = np.empty((len(wanted), *size, 3), dtype=np.uint8)
                to = (*display.stored(*size)[::-1], "rgb48le" if display.is_hdr else "rgb24")
            if position == wanted[found]:
                small = reformatter.reformat(frame, *to, interpolation=Interpolation.BICUBIC, threads=1)
                small = _to_sdr(small) if display.is_hdr else small
                rgb[found] = display.show(cast(npt.NDArray[np.uint8], small.to_ndarray()))
                found += 1
                if found == len(wanted):
                    return rgb if found == len(indices) else rgb[place]
        raise _Unreadable("is damaged (it did not decode twice alike)")


def _tells_unreferenced(codec: Any) -> bool:
    """Whether a packet says for certain that no other picture refers to it.

    In H.264 it does (nal_ref_idc is 0). In HEVC it says so within its temporal layer only, so the `hvcC` box must say
    that there is one layer (ISO 14496-15, 8.3.3: numTemporalLayers, where 0 means unknown).
    """
    box = codec.extradata or b""
    return codec.name == "h264" or (codec.name == "hevc" and len(box) > 22 and box[0] == 1 and box[21] >> 3 & 7 == 1)


def _intact(frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
    for frame in frames:
        if frame.is_corrupt:
            raise _Damaged("is damaged (a frame could only be decoded in part)")
        yield frame


def _to_sdr(frame: VideoFrame) -> VideoFrame:
    """Tone-map HLG or PQ: reference white (203 nits, ITU-R BT.2408) becomes white, brighter light is clipped."""
    mapper = _sdr_mapper(frame.width, frame.height, int(frame.color_trc), int(frame.color_primaries))
    to = {"dst_color_trc": ColorTrc.BT709, "dst_color_primaries": ColorPrimaries.BT709}
    return mapper.reformat(frame, format="rgb24", threads=1, **to)


@lru_cache(maxsize=16)
def _sdr_mapper(width: int, height: int, transfer: int, primaries: int) -> VideoReformatter:
    """One per kind of frame: FFmpeg computes its table of colours in 3.5 s at the first frame, then maps in 1 ms."""
    return VideoReformatter()
