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
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, cast

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
from rlvid.video.sampling import sample_indices
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
    pts_s: npt.NDArray[np.float64]  # [T] seconds from the first frame of the file
    indices: npt.NDArray[np.int64]  # [T] in presentation order
    n_frames: int  # in the file
    fps: float  # average frame rate of the file


@dataclass(frozen=True)
class _Read:
    """What is wanted of a file, and until when."""

    medium: Medium
    video: VideoConfig
    multiple: int
    deadline: float  # of time.monotonic()

    def indices(self, pts_s: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        return sample_indices(self.video, pts_s, self.medium.start_s, self.medium.end_s)

    def check_deadline(self) -> None:
        """Called between two packets. A decoder that hangs inside one is up to the caller's process."""
        if time.monotonic() > self.deadline:
            raise _Unreadable(f"reading took longer than video.timeout_s={self.video.timeout_s:g} s")


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
    with _as_bad_clip(medium.path), _open(medium.path) as container:
        stream = _video_stream(container)
        n_frames = sum(not packet.is_discard for packet in _demux(container, stream, read))
        container.seek(0)
        frame = next(_decode(container, stream, read), None)
        if frame is None:
            raise _Unreadable("no frame could be decoded")
        return Display.of(frame, stream.sample_aspect_ratio), container.format.name, n_frames


def average_fps(pts_s: npt.NDArray[np.float64], declared: float) -> float:
    """Frames per second from the times [n] themselves, or for a single frame the header's rate (1.0 if it has none)."""
    span = float(pts_s[-1] - pts_s[0])
    return (len(pts_s) - 1) / span if span > 0 else declared or 1.0


@contextmanager
def _as_bad_clip(path: str) -> Iterator[None]:
    try:
        yield
    except av.FFmpegError as error:
        raise BadClip(path, f"cannot be decoded: {error.strerror}") from error
    except ValueError as error:  # also: a display matrix that is not supported, a part that is not inside the file
        raise BadClip(path, str(error)) from error
    except LookupError as error:  # unknown codec, no such stream
        raise BadClip(path, f"cannot be decoded: {error}") from error


def _read_by_seeking(read: _Read) -> DecodedFrames:
    """Decode from the keyframe before each wanted frame.

    Raises:
        _NotSeekable: That cannot be trusted.
    """
    with _open(read.medium.path) as container:
        stream = _video_stream(container)
        # AVI came out off by one this way, and MPEG-TS loses the leading frames of an open GOP. VP8 has packets that
        # show nothing but have a time.
        if not _SEEKABLE_FORMATS & set(container.format.name.split(",")) or stream.codec_context.name == "vp8":
            raise _NotSeekable
        pts, key_pts = _read_index(container, stream, read)
        pts_s = _seconds(pts, stream)
        indices = read.indices(pts_s)
        # The first frame is always decoded: when it does not appear, the file starts with an open GOP or a cut, and
        # every index is off.
        wanted = {pts[position]: position for position in sorted({0, *indices.tolist()})}
        frames = _pick(_seek_frames(container, stream, key_pts, wanted, read), stream, indices, read)
        return DecodedFrames(
            frames, pts_s[indices], indices, len(pts_s), average_fps(pts_s, float(stream.average_rate or 0))
        )


def _read_in_order(read: _Read) -> DecodedFrames:
    """Decode everything twice, to count and then to pick: little memory, and right for whatever decodes at all."""
    with _open(read.medium.path) as container:
        stream = _video_stream(container)
        pts = [frame.pts for frame in _decode(container, stream, read)]
        declared = float(stream.average_rate or 0)
        if not pts:
            raise _Unreadable("no frame could be decoded")
        known = [p for p in pts if p is not None]
        if len(known) == len(pts) and all(a < b for a, b in pairwise(known)):
            pts_s = _seconds(known, stream)
        else:  # the file has no usable times
            pts_s = np.arange(len(pts)) / (declared or 1.0)
    indices = read.indices(pts_s)
    with _open(read.medium.path) as container:
        stream = _video_stream(container)
        frames = _pick(enumerate(_decode(container, stream, read)), stream, indices, read)
    return DecodedFrames(frames, pts_s[indices], indices, len(pts_s), average_fps(pts_s, declared))


def _open(path: str) -> InputContainer:
    try:
        return av.open(f"file:{path}", options=_OPEN_OPTIONS, metadata_errors="replace")
    except av.ArgumentError:  # what FFmpeg says of a format that is not on the list
        raise _Unreadable(f"not a video file that is read here ({_FORMATS})") from None
    except av.FFmpegError as error:
        raise _Unreadable(f"cannot be opened: {error.strerror}") from None


def _video_stream(container: InputContainer) -> VideoStream:
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:  # cover of a sound file
        raise _Unreadable("has no video stream")
    if stream.codec_context is None:
        raise _Unreadable("has a video codec that FFmpeg does not know")
    stream.thread_type = "NONE"
    return stream


def _read_index(container: InputContainer, stream: VideoStream, read: _Read) -> tuple[list[int], list[int]]:
    """Times of all frames and of the keyframes as the packets announce them, rising, in the stream's time base.

    Raises:
        _NotSeekable: The times do not identify frames.
    """
    pts: list[int] = []
    key_pts: list[int] = []
    for packet in _demux(container, stream, read):
        if packet.pts is None:
            raise _NotSeekable
        if packet.is_keyframe:
            key_pts.append(packet.pts)
        if not packet.is_discard:  # an edit list hides it: decoded, never shown
            pts.append(packet.pts)
    if not pts:
        raise _Unreadable("has no frames")
    if not key_pts or len(set(pts)) < len(pts):
        raise _NotSeekable
    return sorted(pts), sorted(key_pts)


def _seek_frames(
    container: InputContainer, stream: VideoStream, key_pts: list[int], wanted: dict[int, int], read: _Read
) -> Iterator[tuple[int, VideoFrame]]:
    """The frames at the rising times `wanted`, with the positions that it gives them.

    Raises:
        _NotSeekable: Decoding from the keyframe before did not show it.
    """
    by_key: dict[int, dict[int, int]] = {}  # time of the keyframe before -> time of the frame -> position
    for time_of_frame, position in wanted.items():
        before = bisect_right(key_pts, time_of_frame)
        if before == 0:
            raise _NotSeekable
        by_key.setdefault(key_pts[before - 1], {})[time_of_frame] = position
    for key, group in by_key.items():
        container.seek(key, stream=stream, backward=True)
        found = (f for f in _decode_only(container, stream, group.keys(), read) if f.pts in group)
        for time_of_frame, position in group.items():
            frame = next(found, None)
            if frame is None or frame.pts != time_of_frame or (frame.interlaced_frame and _is_progressive(stream)):
                raise _NotSeekable
            yield position, frame


def _decode_only(
    container: InputContainer, stream: VideoStream, wanted: Collection[int], read: _Read
) -> Iterator[VideoFrame]:
    """Decode from the current position until all times `wanted` are there, and of the rest only what they need.

    Pictures that no other one refers to are a third to a half of a file with B-frames: they are left out. After the
    last packet of `wanted` the decoder is emptied, instead of feeding it as many packets as it holds back.
    """
    decoder, missing = stream.codec_context, set(wanted)
    skip: Literal["NONREF", "DEFAULT"] = "NONREF" if _tells_unreferenced(stream) else "DEFAULT"
    # The two fields of an interlaced picture may be two packets: half a picture must not be forced out.
    is_progressive = _is_progressive(stream)
    for packet in _demux(container, stream, read):
        decoder.skip_frame = "DEFAULT" if packet.pts in wanted or not is_progressive else skip
        yield from _intact(decoder.decode(packet))
        missing.discard(cast(int, packet.pts))
        if is_progressive and not missing:
            break
    yield from _intact(decoder.decode(None))


def _is_progressive(stream: VideoStream) -> bool:
    return stream.codec_context.field_order in (0, 1)  # AVFieldOrder: unknown (codecs without fields), progressive


def _tells_unreferenced(stream: VideoStream) -> bool:
    """Whether a packet of this stream says for certain that no other picture refers to it.

    In H.264 it does (nal_ref_idc is 0). In HEVC it says so within its temporal layer only, so the `hvcC` box must say
    that there is one layer (ISO 14496-15, 8.3.3: numTemporalLayers, where 0 means unknown).
    """
    if stream.codec_context.name == "h264":
        return True
    box = stream.codec_context.extradata or b""
    return stream.codec_context.name == "hevc" and len(box) > 22 and box[0] == 1 and box[21] >> 3 & 7 == 1


def _decode(container: InputContainer, stream: VideoStream, read: _Read) -> Iterator[VideoFrame]:
    for packet in _demux(container, stream, read):
        yield from _intact(stream.codec_context.decode(packet))
    yield from _intact(stream.codec_context.decode(None))


def _demux(container: InputContainer, stream: VideoStream, read: _Read) -> Iterator[Packet[VideoStream]]:
    is_trusted = False
    for packet in container.demux(stream):
        read.check_deadline()
        # FFmpeg flags the last packets before a joint of a transport stream, although they are whole.
        if packet.is_corrupt and not is_trusted:
            is_trusted = container.format.name == "mpegts" and is_joined(read.medium.path, stream.id)
            if not is_trusted:
                raise _Damaged("is damaged or cut short (a packet is incomplete)")
        if packet.size:  # the last one is empty
            yield packet


def _intact(frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
    for frame in frames:
        if frame.is_corrupt:
            raise _Damaged("is damaged (a frame could only be decoded in part)")
        yield frame


def _pick(
    frames: Iterator[tuple[int, VideoFrame]], stream: VideoStream, indices: npt.NDArray[np.int64], read: _Read
) -> npt.NDArray[np.uint8]:
    """Convert the frames at `indices` [T] to RGB [T, H, W, 3] at model resolution, as displayed.

    `frames` gives (index, frame) in rising order, the first frame of the file first: it decides size and orientation.
    """
    wanted, place = np.unique(indices, return_inverse=True)
    rgb: npt.NDArray[np.uint8] | None = None
    display: Display | None = None
    reformatter = VideoReformatter()
    found = 0
    for position, frame in frames:
        if rgb is None or display is None:
            display = Display.of(frame, stream.sample_aspect_ratio)
            size = target_size(display.height, display.width, read.video, read.multiple)
            rgb = np.empty((len(wanted), *size, 3), dtype=np.uint8)
            height, width = display.stored(*size)
        if position != wanted[found]:
            continue
        pixel_format = "rgb48le" if display.is_hdr else "rgb24"
        small = reformatter.reformat(frame, width, height, pixel_format, interpolation=Interpolation.BICUBIC, threads=1)
        if display.is_hdr:
            small = _to_sdr(small)
        rgb[found] = display.show(cast(npt.NDArray[np.uint8], small.to_ndarray()))
        found += 1
        if found == len(wanted):
            return rgb if found == len(indices) else rgb[place]
    raise _Unreadable("is damaged (it did not decode twice alike)")


def _to_sdr(frame: VideoFrame) -> VideoFrame:
    """Tone-map HLG or PQ: reference white (203 nits, ITU-R BT.2408) becomes white, brighter light is clipped."""
    mapper = _sdr_mapper(frame.width, frame.height, int(frame.color_trc), int(frame.color_primaries))
    to = {"dst_color_trc": ColorTrc.BT709, "dst_color_primaries": ColorPrimaries.BT709}
    return mapper.reformat(frame, format="rgb24", threads=1, **to)


@lru_cache(maxsize=16)
def _sdr_mapper(width: int, height: int, transfer: int, primaries: int) -> VideoReformatter:
    """One per kind of frame: FFmpeg computes its table of colours in 3.5 s at the first frame, then maps in 1 ms."""
    return VideoReformatter()


def _seconds(pts: list[int], stream: VideoStream) -> npt.NDArray[np.float64]:
    return (np.array(pts, dtype=np.int64) - pts[0]).astype(np.float64) * float(stream.time_base or 1)
