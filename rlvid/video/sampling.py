"""Which frames of a file are looked at: pure index rules, no decoding.

Every rule gives T indices in rising order. A file with fewer frames than T repeats some: a one-frame file gives T equal
frames.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rlvid.config import VideoConfig

Indices = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]

_EPSILON = 1e-6  # times are sums of floats: 20 frames must not become 19.999


def sample_indices(video: VideoConfig, pts_s: Seconds) -> Indices:
    """Apply the rule named by `video.sampling`.

    Args:
        video: Rule and its numbers.
        pts_s: [n] presentation times of all frames of the file, seconds, rising; n >= 1.

    Returns:
        [T] indices into `pts_s`, rising; T is even and at least 2.

    Raises:
        ValueError: `pts_s` is empty.
    """
    if len(pts_s) == 0:
        raise ValueError("a file without frames cannot be sampled")
    match video.sampling:
        case "linspace":
            return linspace(len(pts_s), video.frames)
        case "mid_segment":
            return mid_segment(len(pts_s), video.frames)
        case "fps":
            return by_fps(pts_s, video.fps, video.frames)
        case "first_seconds":
            return first_seconds(pts_s, video.seconds, video.frames)


def sampling_spec(video: VideoConfig) -> dict[str, Any]:
    """The keys that the chosen rule depends on, for a clip's identity."""
    spec: dict[str, Any] = {"rule": video.sampling, "frames": video.frames}
    if video.sampling == "fps":
        spec["fps"] = video.fps
    if video.sampling == "first_seconds":
        spec["seconds"] = video.seconds
    return spec


def linspace(n: int, frames: int) -> Indices:
    """First to last frame evenly, rounded down, as MMLA and LLaVA-NeXT do."""
    return np.linspace(0, n - 1, frames, dtype=np.int64)


def mid_segment(n: int, frames: int) -> Indices:
    """Middles of `frames` equal segments, as VideoLLaMA2's uniform `frame_sample` (half rounds up by its 1e-6)."""
    middles = (np.arange(frames) + 0.5) * ((n - 1) / frames)
    return np.round(middles + _EPSILON).astype(np.int64)


def by_fps(pts_s: Seconds, fps: float, cap: int) -> Indices:
    """Evenly in time, about `fps` frames a second and at most `cap`, as Qwen2-VL's `smart_nframes`.

    The count is even and at least 2, otherwise not above the file's own number of frames. The frame nearest to each of
    the evenly spaced times is taken, so a variable frame rate is sampled by time and not by position.
    """
    n = len(pts_s)
    span = float(pts_s[-1] - pts_s[0])
    duration = span * n / (n - 1) if n > 1 else 0.0  # the last frame is shown too, as long as the others on average
    count = max(2, 2 * int((min(duration * fps, cap, n) + _EPSILON) // 2))
    times = pts_s[0] + np.linspace(0.0, span, count)
    after = np.searchsorted(pts_s, times).clip(0, n - 1)
    before = (after - 1).clip(0)
    is_after_nearer = np.abs(pts_s[after] - times) <= np.abs(times - pts_s[before])
    return np.where(is_after_nearer, after, before).astype(np.int64)


def first_seconds(pts_s: Seconds, seconds: float, frames: int) -> Indices:
    """`linspace` over the frames shown in the first `seconds`: the tail of a longer file is never seen."""
    shown = int(np.count_nonzero(pts_s - pts_s[0] < seconds - _EPSILON))
    return linspace(max(shown, 1), frames)
