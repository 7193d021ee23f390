"""Altered clips for the parity check, and thumbnails for the report."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from rlvid.types import Clip

Variant = Literal["as_is", "tall", "altered", "tall_altered"]
N_THUMBNAILS = 6
THUMBNAIL_HEIGHT, MAX_WIDTH = 112, 1000  # pixels


def probe(clip: Clip, variant: Variant, multiple: int) -> Clip:
    """A variant of `clip` under an id of its own, so that no cache takes one for the other.

    "tall": cut to so few patches that merged T > max(H, W), where position rules differ. "altered": the frames in
    another order, or inverted where all frames are the same; a model that sees the video answers differently.
    """
    if variant == "as_is":
        return clip
    clip = _tall(clip, multiple) if variant.startswith("tall") else clip
    frames = clip.frames
    if variant.endswith("altered"):
        shuffled = frames[np.random.default_rng(0).permutation(len(frames))]
        frames = 255 - frames if np.array_equal(shuffled, frames) else shuffled
    return replace(clip, frames=frames, clip_id=f"{clip.clip_id}-{variant}")


def _tall(clip: Clip, multiple: int) -> Clip:
    """The middle k x k patches, with k < T / 2; two frames make one step in time.

    Two or three frames are too few for that: the inverted ones follow, at the times that come next.
    """
    frames, indices, pts_s = clip.frames, clip.indices, clip.pts_s
    if len(frames) < 4:
        after = 1 + np.arange(len(frames))
        frames = np.concatenate([frames, 255 - frames])
        indices = np.concatenate([indices, indices[-1] + after])
        pts_s = np.concatenate([pts_s, pts_s[-1] + after / clip.fps])
    side = multiple * max(1, min(len(frames) // 2 - 1, frames.shape[1] // multiple, frames.shape[2] // multiple))
    top, left = (frames.shape[1] - side) // 2, (frames.shape[2] - side) // 2
    frames = frames[:, top : top + side, left : left + side]
    return replace(clip, frames=frames, indices=indices, pts_s=pts_s)


def thumbnails(frames: npt.NDArray[np.uint8]) -> list[bytes]:
    """Up to six frames [T, H, W, 3], evenly chosen, as small JPEG files."""
    from PIL import Image, ImageOps

    chosen = np.unique(np.linspace(0, len(frames) - 1, min(N_THUMBNAILS, len(frames))).round().astype(int))
    files = []
    for i in chosen:
        image = ImageOps.contain(Image.fromarray(frames[i]), (MAX_WIDTH, THUMBNAIL_HEIGHT))
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=85)
        files.append(buffer.getvalue())
    return files
