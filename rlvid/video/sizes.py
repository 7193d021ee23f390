"""The size of a decoded frame, a whole number of patches on both sides."""

from __future__ import annotations

import math

from rlvid.config import VideoConfig
from rlvid.errors import UserError


def target_size(
    height: int, width: int, video: VideoConfig, multiple: int, key: str = "video.max_pixels"
) -> tuple[int, int]:
    """Height and width that frames are resized to, pixels, both multiples of `multiple`.

    Without a fixed size this is Qwen2-VL's `smart_resize` without a lower limit: the nearest multiples, or if that area
    is above `video.max_pixels` the largest ones below it that keep the aspect ratio. A very long frame is made less
    long so that it is below the limit too.

    Args:
        height: Of the file as it is displayed: turned by its display matrix, with square pixels.
        width: Likewise.
        video: Fixed size or largest area.
        multiple: Patch size times merge size of the model family, pixels.
        key: Where the largest area is from, for messages.

    Raises:
        UserError: The fixed size is no multiple of `multiple`, or the largest area holds not one patch group.
    """
    if video.height is not None and video.width is not None:
        for key, value in (("video.height", video.height), ("video.width", video.width)):
            if value % multiple:
                nearest = " or ".join(str(n) for n in (value - value % multiple, value + -value % multiple) if n)
                raise UserError(f"{key}={value} must be a multiple of {multiple} for this model: use {nearest}")
        return video.height, video.width
    if video.max_pixels < multiple**2:
        raise UserError(
            f"{key}={video.max_pixels} is too small: the smallest frame of this model is "
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
