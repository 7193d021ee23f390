"""Real video files with the frame's number painted into each frame, and how to read it back."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import numpy.typing as npt
import pytest
from av.packet import Packet
from av.video.stream import VideoStream

from rlvid.config import VideoConfig

Frames = npt.NDArray[np.uint8]

BITS = 8
WIDTH, HEIGHT = 160, 96
DATA = Path(__file__).parents[2] / "../shared/data"
TRIAL = DATA.parent / "trials/media"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real clips (shared/data) is not there")


def video_config(**keys: Any) -> VideoConfig:
    """The configuration of most tests: exact size, eight frames first to last."""
    return VideoConfig(**{"frames": 8, "height": 84, "width": 168} | keys)


def painted(number: int, width: int = WIDTH, height: int = HEIGHT) -> Frames:
    """A frame [height, width, 3] with `number` as black and white cells in its upper quarter, above a colour ramp."""
    frame = np.zeros((height, width, 3), dtype=np.uint8)
    frame[..., 0] = np.linspace(30, 220, width, dtype=np.uint8)
    frame[..., 2] = np.linspace(220, 30, height, dtype=np.uint8)[:, None]
    for bit in range(BITS):
        frame[: height // 4, bit * width // BITS : (bit + 1) * width // BITS] = 255 * (number >> bit & 1)
    return frame


def read_numbers(frames: Frames) -> list[int]:
    """The painted numbers of frames [T, H, W, 3] of any size."""
    _, height, width, _ = frames.shape
    cells = [frames[:, height // 8, (2 * bit + 1) * width // (2 * BITS)].mean(axis=-1) for bit in range(BITS)]
    return [sum(int(cell[t] > 127) << bit for bit, cell in enumerate(cells)) for t in range(len(frames))]


def write_video(
    path: Path,
    numbers: Sequence[int] = range(30),
    *,
    codec: str = "libx264",
    rate: int = 10,
    pix_fmt: str = "yuv420p",
    times_ms: Sequence[int] | None = None,
    skip_packets: int = 0,
    start: int = 0,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    pixel_aspect: Fraction = Fraction(1),
    options: dict[str, str] | None = None,
    mux: dict[str, str] | None = None,
) -> Path:
    """Encode painted frames; the suffix of `path` says the container.

    Args:
        times_ms: Presentation times, for a variable frame rate.
        skip_packets: Number of packets to leave out at the start, as a cut without re-encoding does.
        start: Time of the first frame in frames; a negative one is hidden by an edit list in MP4.
    """
    with av.open(str(path), "w", options=mux or {}) as container:
        stream = cast(VideoStream, container.add_stream(codec, rate=rate, options={"threads": "1"} | (options or {})))
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.sample_aspect_ratio = pixel_aspect
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        packets: list[Packet[Any]] = []
        for position, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(painted(number, *size), format="rgb24").reformat(format=pix_fmt)
            frame.time_base = Fraction(1, rate) if times_ms is None else Fraction(1, 1000)
            frame.pts = start + position if times_ms is None else times_ms[position]
            packets += stream.encode(frame)
        packets += stream.encode()
        for packet in packets[skip_packets:]:
            container.mux(packet)
    return path


Matrix = tuple[int, int, int, int]
TURNS: dict[int, Matrix] = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}  # degrees clockwise


def set_matrix(path: Path, matrix: Matrix) -> Path:
    """Set a, b, c, d of an MP4 track's display matrix: players show the pixel (x, y) at (a x + c y, b x + d y)."""
    a, b, c, d = ((value << 16).to_bytes(4, "big", signed=True) for value in matrix)
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # version 0 (ISO 14496-12, 8.3.2)
    data[start : start + 36] = a + b + bytes(4) + c + d + bytes(12) + (1 << 30).to_bytes(4, "big")
    path.write_bytes(data)
    return path


def write_sound(path: Path) -> Path:
    """A second of silence, no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac" if path.suffix == ".mp4" else "libmp3lame", rate=16000, layout="mono")
        for _ in range(16):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
