"""Which frames of a file are read: pure index rules, no decoding.

Every rule gives T indices in rising order. A file with fewer frames than T repeats some: a one-frame file gives T equal
frames.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rlvid.config import VideoConfig

Indices = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]

END_SLACK_S = 0.5  # an annotated end may be that of the sound, or rounded
_EPSILON = 1e-6  # times are sums of floats: 20 frames must not become 19.999


def sample_indices(
    video: VideoConfig, pts_s: Seconds, start_s: float | None = None, end_s: float | None = None
) -> Indices:
    """Apply the rule named by `video.sampling` to the frames shown from `start_s` until before `end_s`.

    Args:
        video: Rule and its numbers.
        pts_s: [n] presentation times of all frames of the file, seconds, rising from 0; n >= 1.
        start_s: Seconds; None: from the start.
        end_s: Likewise; None: to the end.

    Returns:
        [T] indices into `pts_s`, rising; T is even and at least 2.

    Raises:
        ValueError: The part is not inside the file.
    """
    part = _part(pts_s, start_s, end_s)
    pts_s = pts_s[part]
    match video.sampling:
        case "linspace":
            indices = linspace(len(pts_s), video.frames)
        case "mid_segment":
            indices = mid_segment(len(pts_s), video.frames)
        case "fps":
            indices = by_fps(pts_s, video.fps, video.frames)
        case "first_seconds":
            indices = first_seconds(pts_s, video.seconds, video.frames)
    return part.start + indices


def _part(pts_s: Seconds, start_s: float | None, end_s: float | None) -> slice[int, int, None]:
    """The frames of one part; where none begins inside it, the one that is on screen."""
    if start_s is None and end_s is None:
        return slice(0, len(pts_s))
    duration_s = _duration_s(pts_s)
    start, end = start_s or 0.0, duration_s if end_s is None else end_s
    if not 0 <= start < min(end, duration_s) - _EPSILON or end > duration_s + END_SLACK_S:
        raise ValueError(f"lasts {duration_s:.2f} s: the part from {start:g} s to {end:g} s is not inside")
    first, after = np.searchsorted(pts_s, [start - _EPSILON, end - _EPSILON]).tolist()
    return slice(first, after) if first < after else slice(first - 1, first)


def _duration_s(pts_s: Seconds) -> float:
    """The last frame is shown too, as long as the others on average."""
    n = len(pts_s)
    return float(pts_s[-1] - pts_s[0]) * n / (n - 1) if n > 1 else 0.0


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
    count = max(2, 2 * int((min(_duration_s(pts_s) * fps, cap, n) + _EPSILON) // 2))
    times = np.linspace(pts_s[0], pts_s[-1], count)
    after = np.searchsorted(pts_s, times).clip(0, n - 1)
    before = (after - 1).clip(0)
    is_after_nearer = np.abs(pts_s[after] - times) <= np.abs(times - pts_s[before])
    return np.where(is_after_nearer, after, before).astype(np.int64)


def first_seconds(pts_s: Seconds, seconds: float, frames: int) -> Indices:
    """`linspace` over the frames shown in the first `seconds`: the tail of a longer file is never seen."""
    shown = int(np.count_nonzero(pts_s - pts_s[0] < seconds - _EPSILON))
    return linspace(max(shown, 1), frames)
