"""Still images, videos that come as pictures, and animated WebP: read by Pillow, as a viewer shows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageOps

from rlvid.config import VideoConfig
from rlvid.errors import BadClip
from rlvid.types import Medium
from rlvid.video.pyav_reader import DecodedFrames
from rlvid.video.sampling import Seconds, sample_indices
from rlvid.video.sizes import target_size

NAME = f"pillow {PIL.__version__}"
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
SHORTEST_S, DEFAULT_S = 0.011, 0.1  # browsers show a frame that says less than the first for the second

Frame = npt.NDArray[np.uint8]  # [H, W, 3]


def read_frames(medium: Medium, video: VideoConfig, multiple: int) -> DecodedFrames:
    """Read an image, or the sampled frames of a video, at model resolution: turned as their EXIF data say, transparent
    parts white.

    Args:
        medium: An image file, a list of pictures, or an animated WebP.
        video: Sampling rule and size, with the medium's own.
        multiple: Height and width are multiples of this, pixels.

    Raises:
        BadClip: A file cannot be opened or decoded, an image has several frames or a video has one, the pictures differ
            in size, or the video ends before the part does.
        UserError: The size does not fit `multiple`.
    """
    if medium.kind == "image":
        with _opened(medium.path) as image:
            if (n := _n_frames(image)) > 1:
                raise BadClip(medium.path, f"has {n} frames: name it as a video")
            frame = _resized(_upright(image), video, multiple)
        return DecodedFrames.of(frame[None], np.zeros(1, np.int64), np.zeros(1), declared_fps=1.0)
    pts_s = np.arange(len(medium.pictures)) / medium.pictures_per_s if medium.pictures else _times(medium.path)
    try:
        indices = sample_indices(video, pts_s, medium.start_s, medium.end_s)
    except ValueError as error:
        raise BadClip(medium.path, str(error)) from error
    wanted = np.unique(indices).tolist()
    read = _pictures(medium, wanted) if medium.pictures else _animated(medium.path, wanted)
    frames: dict[int, Frame] = {}
    sizes = set()
    for i, image in zip(wanted, read, strict=True):
        sizes.add(image.size)
        frames[i] = _resized(image, video, multiple)
    if len(sizes) > 1:
        raise BadClip(medium.path, f"and the pictures after it differ in size: {sorted(sizes)[:3]}")
    return DecodedFrames.of(np.stack([frames[i] for i in indices]), indices, pts_s, medium.pictures_per_s)


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    # SyntaxError: a broken PNG; DecompressionBombError: more pixels than a picture has
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadClip(path, f"cannot be decoded: {error}") from error


def _n_frames(image: Image.Image) -> int:
    """Of WebP alone: other formats have pages, previews, or an animation that nobody would give as a video."""
    return int(getattr(image, "n_frames", 1)) if image.format == "WEBP" else 1


def _times(path: str) -> Seconds:
    """Times [n] of the frames of an animated file, by how long each is shown."""
    lengths = []
    with _opened(path) as image:
        if (n := _n_frames(image)) == 1:
            raise BadClip(path, "has one frame: name it as an image")
        for i in range(n):
            image.seek(i)
            image.load()
            shown_s = image.info.get("duration", 0) / 1000
            lengths.append(DEFAULT_S if shown_s < SHORTEST_S else shown_s)
    return np.cumsum([0.0, *lengths[:-1]])


def _animated(path: str, wanted: list[int]) -> Iterator[Image.Image]:
    with _opened(path) as image:
        for i in wanted:
            image.seek(i)
            yield _upright(image)


def _pictures(medium: Medium, wanted: list[int]) -> Iterator[Image.Image]:
    for i in wanted:
        with _opened(medium.pictures[i]) as image:
            yield _upright(image)


def _upright(image: Image.Image) -> Image.Image:
    """The image as RGB, as it is looked at."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would cut the values off instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _resized(image: Image.Image, video: VideoConfig, multiple: int) -> Frame:
    height, width = target_size(image.height, image.width, video, multiple)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
