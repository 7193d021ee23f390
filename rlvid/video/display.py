"""How a player shows a stored picture: turned and mirrored by its display matrix, with square pixels, in SDR."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import numpy as np
import numpy.typing as npt
from av.buffer import Buffer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorTrc

_SLANT = 0.02  # FFmpeg too takes an angle within one degree of a multiple of 90 for that multiple


@dataclass(frozen=True)
class Display:
    """From stored to shown: transpose, then flip."""

    height: int  # shown at full resolution with square pixels
    width: int
    is_transposed: bool
    flips_x: bool
    flips_y: bool
    is_hdr: bool  # HLG or PQ: has to be tone-mapped

    @classmethod
    def of(cls, frame: VideoFrame, pixel_aspect: Fraction | None) -> Display:
        """
        Args:
            frame: First frame of the file, with the display matrix of its container or its bitstream.
            pixel_aspect: Width of a stored pixel over its height; None if the file does not say (square).

        Raises:
            ValueError: The matrix is none of the eight orientations.
        """
        matrix = frame.side_data.get("DISPLAYMATRIX")
        # ISO 14496-12, 6.2.2: the stored pixel (x, y) is shown at (a x + c y, b x + d y) and a shift.
        a, b, _, c, d = np.frombuffer(bytes(cast(Buffer, matrix)), np.int32)[:5].tolist() if matrix else (1, 0, 0, 0, 1)
        straight, across = abs(a) + abs(d), abs(b) + abs(c)
        if min(straight, across) > _SLANT * max(straight, across):
            raise ValueError("has a display matrix that turns it by an angle that is no multiple of 90 degrees")
        is_transposed = across > straight
        size = frame.height, max(1, round(frame.width * (pixel_aspect or 1)))
        height, width = size[::-1] if is_transposed else size
        is_hdr = frame.color_trc in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
        x, y = (c, b) if is_transposed else (a, d)
        return cls(height, width, is_transposed, x < 0, y < 0, is_hdr)

    @property
    def is_mirrored(self) -> bool:
        return self.is_transposed ^ self.flips_x ^ self.flips_y

    def stored(self, height: int, width: int) -> tuple[int, int]:
        """Height and width before `show` that become `height` and `width`."""
        return (width, height) if self.is_transposed else (height, width)

    def show(self, picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Turn and mirror a stored picture [H, W, 3]; a view."""
        picture = picture.transpose(1, 0, 2) if self.is_transposed else picture
        return picture[:: -1 if self.flips_y else 1, :: -1 if self.flips_x else 1]
