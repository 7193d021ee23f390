"""decord as second reader, for comparison with work that used it. Chosen by name, never a fallback.

decord 0.6 gives wrong frames without an error for MPEG-TS, files with edit lists and short HEVC files, knows no AV1,
and hangs or aborts when a reader crosses a fork (measured; the default reader has none of this).
"""

from __future__ import annotations

import re

import decord
import numpy as np

from rlvid.config import VideoConfig
from rlvid.errors import BadClip
from rlvid.types import Medium
from rlvid.video.pyav_reader import DecodedFrames, inspect, seconds
from rlvid.video.sampling import sample_indices
from rlvid.video.sizes import target_size

NAME = f"decord {decord.__version__}"

_SOURCE_LINE = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ")  # "[06:02:43] /src/video/video_reader.cc:270: "

decord.logging.set_level(decord.logging.QUIET)


def read_frames(medium: Medium, video: VideoConfig, multiple: int) -> DecodedFrames:
    """Read the sampled frames of one file at model resolution; see `pyav_reader.read_frames`.

    `video.timeout_s` does not end it: decord cannot be interrupted.

    Raises:
        BadClip: The file cannot be opened or decoded.
        UserError: The configured size does not fit `multiple`.
    """
    display, container, n_shown = inspect(medium, video)
    path = medium.path
    # Measured: decord 0.6 gives other frames of a transport stream, and none of these as a player shows them.
    if display.is_mirrored or display.is_hdr or container == "mpegts":
        kind = "mirrored" if display.is_mirrored else "HDR" if display.is_hdr else "an MPEG transport stream"
        raise BadClip(path, f"is {kind}, which decord does not show right: set video.reader=pyav")
    height, width = target_size(display.height, display.width, video, multiple)
    try:
        # One thread: several abort more often and cost up to half more CPU per clip.
        probe = decord.VideoReader(path, num_threads=1)
        n_frames = len(probe)
        if n_frames != n_shown:  # an edit list hides some
            raise BadClip(path, f"shows {n_shown} frames and decord finds {n_frames}: set video.reader=pyav")
        declared = float(probe.get_avg_fps())
        # Those of AVI and MPEG-PS are like 1e17, or all zero.
        pts_s = seconds(probe.get_frame_timestamp(np.arange(n_frames))[:, 0], 1.0, declared)
        del probe
        indices = sample_indices(video, pts_s, medium.start_s, medium.end_s)
        # Resized at decode time: full-size frames of a 1080p clip took 442 MB instead of 68.
        frames = decord.VideoReader(path, num_threads=1, width=width, height=height).get_batch(indices).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        reason = _SOURCE_LINE.sub("", str(error)).strip().partition("\n")[0]
        raise BadClip(path, f"cannot be decoded: {reason}") from error
    except ValueError as error:  # a part that is not inside the file
        raise BadClip(path, str(error)) from error
    return DecodedFrames.of(frames, indices, pts_s, declared)
