"""The size of a decoded frame, a whole number of patches on both sides."""

from __future__ import annotations

import math
from typing import Any

from rlvid.config import VideoConfig
from rlvid.errors import UserError


def target_size(height: int, width: int, video: VideoConfig, multiple: int) -> tuple[int, int]:
    """Height and width that frames are resized to, pixels, both multiples of `multiple`.

    Without a fixed size this is Qwen2-VL's `smart_resize` without a lower limit: the nearest multiples, or if that area
    is above `video.max_pixels` the largest ones below it that keep the aspect ratio. A very long frame is made less
    long so that it stays below the limit too.

    Args:
        height: Of the file as it is displayed (rotation applied), pixels.
        width: Likewise.
        video: Fixed size or largest area.
        multiple: Patch size times merge size of the model family, pixels.

    Raises:
        UserError: The fixed size is no multiple of `multiple`, or `video.max_pixels` holds not one patch group.
    """
    if video.height is not None and video.width is not None:
        for key, value in (("video.height", video.height), ("video.width", video.width)):
            if value % multiple:
                below, above = value // multiple * multiple, -(-value // multiple) * multiple
                nearest = f"{below} or {above}" if below else f"{above}"
                raise UserError(f"{key}={value} must be a multiple of {multiple} for this model: use {nearest}")
        return video.height, video.width
    if video.max_pixels < multiple**2:
        raise UserError(
            f"video.max_pixels={video.max_pixels} is too small: the smallest frame of this model is "
            f"{multiple} x {multiple}, give at least {multiple**2}"
        )
    h, w = (max(multiple, round(side / multiple) * multiple) for side in (height, width))
    if h * w > video.max_pixels:
        shrink = math.sqrt(height * width / video.max_pixels)
        h, w = (max(multiple, math.floor(side / shrink / multiple) * multiple) for side in (height, width))
    if h * w > video.max_pixels:  # one side was raised to `multiple`
        longest = video.max_pixels // multiple // multiple * multiple
        h, w = min(h, longest), min(w, longest)
    return h, w


def size_spec(video: VideoConfig, multiple: int) -> dict[str, Any]:
    """What the size depends on besides the file, for a clip's identity."""
    if video.height is not None:
        return {"height": video.height, "width": video.width, "multiple": multiple}
    return {"max_pixels": video.max_pixels, "multiple": multiple}
