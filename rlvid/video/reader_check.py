"""Does reading video work here? Encodes a few frames, reads them back with a reader of ours, compares.

For `rlvid doctor`. Native code that is broken may crash or hang: call these in a process of their own.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args

import av
import av.codec
import numpy as np
from av.codec.codec import UnknownCodecError

from rlvid.config import VideoConfig
from rlvid.errors import BadClip, UserError
from rlvid.synthetic.moving_shapes import write_mp4
from rlvid.types import Medium
from rlvid.video.clip_reader import load_reader

READERS: tuple[str, ...] = get_args(VideoConfig.model_fields["reader"].annotation)
ENCODERS = {  # codec -> encoders that run on any CPU, the first one found is taken
    "h264": ("libx264", "libopenh264"),
    "hevc": ("libx265",),
    "vp9": ("libvpx-vp9",),
    "av1": ("libsvtav1", "libaom-av1", "librav1e"),
    "mpeg4": ("mpeg4",),
}

_N_FRAMES = 16
_TOLERANCE = 6.0  # grey levels; the steps between frames are twice that and more


def try_reader(name: str) -> str:
    """Read an H.264 clip with the reader `name`; says what was read.

    Raises:
        BadClip: it gives an error, or other frames than were written.
        UserError: no H.264 encoder to make the clip with.
    """
    encoder = _encoder("h264")
    if encoder is None:
        raise UserError("PyAV has no H.264 encoder to make a clip with")
    return f"{_round_trip(encoder, name)} H.264 frames read back right"


def try_codec(codec: str) -> tuple[bool, str]:
    """Encode and decode `codec` with the default reader: whether that was done and right, and what is there.

    Not done means that there is a decoder, but no encoder to make a clip with.

    Raises:
        BadClip: an error, or other frames than were written.
        UserError: there is no decoder.
    """
    if not _has(codec, "r"):
        raise UserError(f"PyAV {av.__version__} has no decoder")
    encoder = _encoder(codec)
    if encoder is None:
        return False, "decoder present, not tried (no encoder to make a clip with)"
    return True, f"{_round_trip(encoder, READERS[0])} frames encoded ({encoder}) and decoded right"


def _round_trip(encoder: str, reader_name: str) -> int:
    """Number of frames that were compared."""
    video = VideoConfig.model_validate({"reader": reader_name, "frames": 8, "height": 56, "width": 56})
    levels = np.linspace(20, 230, _N_FRAMES).astype(np.uint8)  # frame t is grey of level t
    with tempfile.TemporaryDirectory(prefix="rlvid-") as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, levels[:, None, None, None] * np.ones((64, 64, 3), dtype=np.uint8), 8, encoder, {})
        decoded = load_reader(video.reader).read_frames(Medium(str(path)), video, 28)
    seen = decoded.frames.reshape(len(decoded.frames), -1).mean(axis=1)
    if decoded.n_frames != _N_FRAMES or len(seen) != video.frames:
        raise BadClip(encoder, f"{decoded.n_frames} frames instead of {_N_FRAMES}")
    if (worst := float(np.abs(seen - levels[decoded.indices]).max())) > _TOLERANCE:
        raise BadClip(encoder, f"the frames are not those that were written (off by {worst:.0f} of 255)")
    return len(seen)


def _encoder(codec: str) -> str | None:
    return next((name for name in ENCODERS[codec] if _has(name, "w")), None)


def _has(name: str, mode: Literal["r", "w"]) -> bool:
    with suppress(UnknownCodecError):
        return bool(av.codec.Codec(name, mode))
    return False
