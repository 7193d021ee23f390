"""Still images: clips of one frame, read by Pillow as a viewer shows them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageOps

from rlvid.config import VideoConfig
from rlvid.errors import BadClip
from rlvid.types import Medium
from rlvid.video.pyav_reader import DecodedFrames
from rlvid.video.sizes import target_size

NAME = f"pillow {PIL.__version__}"
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")


def read_frames(medium: Medium, video: VideoConfig, multiple: int) -> DecodedFrames:
    """Read an image at model resolution: turned as its EXIF data say, transparent parts white.

    Args:
        medium: An image file.
        video: Size, as `ClipReader` gives it for images.
        multiple: Height and width are multiples of this, pixels.

    Raises:
        BadClip: The file cannot be opened or decoded, or has several frames.
        UserError: The size does not fit `multiple`.
    """
    try:
        with Image.open(medium.path, formats=FORMATS) as image:
            if getattr(image, "n_frames", 1) > 1 and image.format != "TIFF":
                raise BadClip(medium.path, f"has {image.n_frames} frames: name it as a video")  # type: ignore[attr-defined]
            upright = ImageOps.exif_transpose(image)
            height, width = target_size(upright.height, upright.width, video, multiple)
            shown = _in_rgb(upright).resize((width, height), Image.Resampling.BICUBIC)
    # Image.DecompressionBombError: more pixels than a picture has; SyntaxError: a broken PNG
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadClip(medium.path, f"cannot be decoded: {error}") from error
    first: npt.NDArray[Any] = np.zeros(1)
    return DecodedFrames(np.asarray(shown)[None], first, first.astype(np.int64), n_frames=1, fps=1.0)


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would cut the values off instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
