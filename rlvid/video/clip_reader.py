"""From a path to a `Clip`: the one way in which the rest of the system reads video."""

from __future__ import annotations

import faulthandler
import hashlib
import importlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rlvid.config import VideoConfig
from rlvid.errors import BadClip, UserError
from rlvid.types import Clip, Medium
from rlvid.video.cache import FrameCache, MakerCrashed
from rlvid.video.container_check import missing_bytes
from rlvid.video.sizes import target_size

SLOWEST_DISK = 2**20  # bytes a second
END_SLACK_S = 10.0  # per medium, before its process is ended
ANIMATED = ".webp"  # FFmpeg shows the first frame of such a file and no other
IDENTITY_VERSION = 2  # raise when the same configuration starts to give other pixels


def hashing_limit_s(media: Iterable[Medium]) -> float:
    """How long hashing these files may take before their clips are read: comes on top of `video.timeout_s`."""
    files = (file for medium in media for file in medium.files)
    return sum(os.path.getsize(file) for file in files if os.path.isfile(file)) / SLOWEST_DISK


@contextmanager
def ends_hung_process(media: Sequence[Medium], timeout_s: float) -> Iterator[None]:
    """End this process, with all threads' stacks on stderr, unless the block that reads `media` is left in time.

    Native code takes no exceptions and no signals handled in Python. For worker processes that something else starts
    again, one block at a time. A reader's own `video.timeout_s` comes first, another process may be reading the same
    clip before, and the frame cache remembers what a crashed process was reading.
    """
    limit_s = (1 + len(media)) * (2 * timeout_s + END_SLACK_S) + hashing_limit_s(media)
    faulthandler.dump_traceback_later(limit_s, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class ClipReader:
    """Reads clips and images through the frame cache. Can be pickled; not meant to be shared by threads.

    Args:
        video: How clips are sampled and resized.
        multiple: Height and width of frames are multiples of this, pixels (`frame_multiple` of the model family).
        cache: Where decoded clips are kept.

    Raises:
        UserError: The configured size does not fit `multiple`.
    """

    def __init__(self, video: VideoConfig, multiple: int, cache: FrameCache):
        target_size(multiple, multiple, video, multiple)  # a wrong size is found here, not at the first clip
        self.video = video
        self.multiple = multiple
        self.cache = cache

    def read(self, medium: Medium) -> tuple[Clip, bool]:
        """The clip of one medium with read-only frames, and whether it came from the cache. An image has one frame.

        Raises:
            BadClip: The file is missing, no file, empty, cut short, damaged, no video, shorter than its part, or
                crashes its reader.
            UserError: The cache cannot be written, the reader is not installed, or the medium's size does not fit.
        """
        path = medium.path
        content_sha256 = self._content_sha256(medium)
        reader = load_reader(reader_of(medium, self.video)).NAME
        clip_id = self.clip_id(medium, content_sha256, reader)

        def decode() -> Clip:
            decoded = read_file(medium, self._video_of(medium), self.multiple)
            return Clip(clip_id=clip_id, reader=reader, content_sha256=content_sha256, **vars(decoded))

        try:
            return self.cache.get_or_make(clip_id, decode)
        except MakerCrashed as error:
            reason = f"reading it crashed several processes (crash, hang or memory); to try again remove {error}"
            raise BadClip(path, reason) from None

    def clip_id(self, medium: Medium, content_sha256: str, reader_name: str) -> str:
        """sha256 of all that decides the frames: what the file holds, not what it is called.

        Raises:
            UserError: The largest area of the medium holds no frame of this model.
        """
        video = self._video_of(medium)
        key = f"video.{'image_' if medium.kind == 'image' else ''}max_pixels"
        try:
            target_size(self.multiple, self.multiple, video, self.multiple, key)
        except UserError as error:
            raise UserError(f"{medium.name}: {error}") from None
        identity = {
            "version": IDENTITY_VERSION,
            "content": content_sha256,
            "part_s": [medium.start_s, medium.end_s],
            **({"pictures_per_s": medium.pictures_per_s} if medium.pictures else {}),
            "video": video.model_dump(exclude={"reader", "timeout_s", "image_max_pixels"}),
            "multiple": self.multiple,
            "reader": reader_name,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def _video_of(self, medium: Medium) -> VideoConfig:
        """The configuration with what the medium says itself: `video.frames` remains the cap of its frame rate."""
        if medium.kind == "image":
            return VideoConfig(max_pixels=self.video.image_max_pixels)
        own: dict[str, object] = {}
        if medium.fps is not None:
            own |= {"sampling": "fps", "fps": medium.fps}
        if medium.max_pixels is not None:
            own |= {"max_pixels": medium.max_pixels, "height": None, "width": None}
        return self.video.model_copy(update=own)

    def _content_sha256(self, medium: Medium) -> str:
        path = medium.path
        try:
            for path in medium.files:
                status = os.stat(path)
                if not stat.S_ISREG(status.st_mode):
                    raise BadClip(path, "is a folder" if stat.S_ISDIR(status.st_mode) else "is not a regular file")
                if status.st_size == 0:
                    raise BadClip(path, "is empty (0 bytes)")
            return self.cache.content_sha256(*medium.files)
        except FileNotFoundError:
            raise BadClip(path, "there is no such file") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise BadClip(path, f"cannot be opened: {getattr(error, 'strerror', error)}") from error


def reader_of(medium: Medium, video: VideoConfig) -> str:
    """Name of the reader of a medium."""
    is_of_pictures = medium.kind == "image" or bool(medium.pictures) or medium.path.lower().endswith(ANIMATED)
    return "picture" if is_of_pictures else video.reader


def read_file(medium: Medium, video: VideoConfig, multiple: int) -> Any:
    """The `DecodedFrames` of a medium, without the cache.

    Raises:
        BadClip: The file is cut short, or its reader cannot read it.
    """
    name = reader_of(medium, video)
    if name != "picture" and (missing := missing_bytes(medium.path)):
        raise BadClip(medium.path, f"is cut short ({missing} bytes are missing at its end)")
    return load_reader(name).read_frames(medium, video, multiple)


def load_reader(name: str) -> Any:
    """The module of a reader, with `NAME` and `read_frames` as in rlvid/video/pyav_reader.py.

    Imported when used: a run with one reader does not load the other's native library.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module(f"rlvid.video.{name}_reader")
    except ImportError as error:
        raise UserError(f"video.reader={name} cannot be loaded ({error}): install {name}, or set the other") from error
