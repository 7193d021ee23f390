"""A prompt whose videos are shown otherwise: to find out whether a model needs them.

Nothing is decoded, resized or encoded again. Text, placeholders and positions stay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from rlvid.types import Prompt

View = Literal["shuffled", "shuffled_patches", "reversed", "blank", "one_frame", "first_frame"]
Patches = npt.NDArray[np.uint8]
Frames = npt.NDArray[np.uint8]  # [t, frames of a temporal patch, patches of a frame, 3, pixels]


def seen_as(prompt: Prompt, view: View, temporal_patch: int) -> Prompt:
    """The prompt with its videos in a view, under clip ids of their own, since caches go by them.

    "shuffled": the frames in another order, one by one. "shuffled_patches": whole temporal patches in another order.
    "reversed": the last frame first. "blank": black. "one_frame", "first_frame": the middle frame, or the first, all
    the time.

    Args:
        temporal_patch: frames of a patch (`VisionFamily.temporal_patch`).
    """
    shown, in_patch = _VIEWS[view], 1 if view == "shuffled_patches" else temporal_patch
    parts, at = [], 0
    for clip_id, (t, h, w) in zip(prompt.clip_ids, prompt.grid_thw.tolist(), strict=True):
        n = t * h * w
        clip = prompt.patches[at : at + n].reshape(t, h * w, 3, in_patch, -1)  # a patch is [3, frames, pixels]
        frames = shown(clip.transpose(0, 3, 1, 2, 4), clip_id)
        parts.append(frames.transpose(0, 2, 3, 1, 4).reshape(n, -1))
        at += n
    return replace(
        prompt,
        patches=np.concatenate(parts) if parts else prompt.patches,
        clip_ids=tuple(f"{clip_id}-{view}-by-{in_patch}" for clip_id in prompt.clip_ids),
    )


def _shuffled(frames: Frames, clip_id: str) -> Frames:
    """In an order that is a function of the clip's id. Whole temporal patches may move alone: attention of the towers
    stays inside one, so the embeddings are those of the prompt in the other order (tests/models/families/
    test_views.py). What moves from one frame of a patch to the next is still seen then."""
    t, in_patch, *shape = frames.shape
    return frames.reshape(t * in_patch, *shape)[frame_order(t * in_patch, clip_id)].reshape(frames.shape)


def _reversed(frames: Frames, clip_id: str) -> Frames:
    return frames[::-1, ::-1]


def _blank(frames: Frames, clip_id: str) -> Frames:
    return np.zeros_like(frames)


def _one_frame(frames: Frames, clip_id: str) -> Frames:
    t, in_patch, *_ = frames.shape
    middle, within = divmod(t * in_patch // 2, in_patch)
    return np.broadcast_to(frames[middle, within], frames.shape)


def _first_frame(frames: Frames, clip_id: str) -> Frames:
    return np.broadcast_to(frames[0, 0], frames.shape)


_VIEWS: Mapping[View, Callable[[Frames, str], Frames]] = {
    "shuffled": _shuffled,
    "shuffled_patches": _shuffled,
    "reversed": _reversed,
    "blank": _blank,
    "one_frame": _one_frame,
    "first_frame": _first_frame,
}


def frame_order(n: int, clip_id: str) -> npt.NDArray[np.int64]:
    """A permutation of n > 1 frames that is not their order."""
    seed = int.from_bytes(hashlib.sha256(clip_id.encode()).digest()[:8], "big")
    order = np.random.default_rng(seed).permutation(n)
    return np.roll(order, 1) if n > 1 and np.array_equal(order, np.arange(n)) else order
