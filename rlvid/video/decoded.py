"""What a reader gives back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Decoded:
    """The sampled frames of one file."""

    frames: npt.NDArray[np.uint8]  # [T, H, W, 3] RGB, rotation applied
    pts_s: npt.NDArray[np.float64]  # [T] seconds from the first frame of the file
    indices: npt.NDArray[np.int64]  # [T] in presentation order
    n_frames: int  # in the file
    fps: float  # average frame rate of the file


def average_fps(pts_s: npt.NDArray[np.float64], declared: float | None) -> float:
    """Frames a second from the times [n] themselves, or for a single frame what the header says (1.0 if nothing)."""
    span = float(pts_s[-1] - pts_s[0])
    return (len(pts_s) - 1) / span if span > 0 else declared or 1.0
