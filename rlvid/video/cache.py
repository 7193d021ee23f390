"""Decoded frames on disk: a clip is decoded once per machine, then mapped into memory (40 to 700 times cheaper).

An entry is one file, `<clip_id>.npy`: the frames, as any numpy reads them, followed by the rest of the clip as JSON.
It appears by rename only, and its modification time is that of the last use. Processes share a folder: locks make one
of them decode a clip while the others wait, and the total size is kept in one locked file, so that adding a clip does
not search the folder. `<key>.sha256` holds the hash of a video file that has been read before.

Native decoders crash, and what runs a worker may start it again without end (Ray Data 2.60 retries a task whose worker
crashed forever). So `<clip_id>.crashes` remains when a process ends while it makes the clip, and a clip that has
crashed two processes is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import numpy as np

from rlvid.files import naming_write_errors, remembered_sha256, write_atomic
from rlvid.types import Clip

KEEP_FRACTION = 0.9  # eviction continues to here, or a full cache would be searched at every put
STALE_PART_S = 3600.0  # a half-written file this old belongs to a process that crashed
MAX_CRASHES = 2  # one may have another cause: a stopped run, a lost machine
CRASHES_COUNT_S = 3600.0  # after the last one


class MakerCrashed(Exception):
    """Making this clip has ended `MAX_CRASHES` processes. The argument is the path of the record that says so."""


class FrameCache:
    """Least-recently-used cache of clips in one folder, safe for any number of processes and threads.

    Args:
        dir: Folder, made if absent; `~` is expanded.
        limit_bytes: Size limit. A clip that is larger alone is not kept.

    Raises:
        UserError: The folder cannot be made.
    """

    def __init__(self, dir: Path, limit_bytes: int):
        self.dir = dir.expanduser()
        self.limit_bytes = limit_bytes
        with self._writing():
            self.dir.mkdir(parents=True, exist_ok=True)

    def get_or_make(self, clip_id: str, make: Callable[[], Clip]) -> tuple[Clip, bool]:
        """The clip with read-only frames, and whether it was there. Of all processes that ask at once one calls `make`.

        Raises:
            UserError: The folder cannot be written.
            MakerCrashed: Several processes ended in `make` of this clip within the last hour.
            Exception: Whatever `make` raises; nothing is kept then.
        """
        if clip := self._load(clip_id):
            return clip, True
        with self._locked(clip_id[:3]):  # at most 4096 lock files, and rarely two clips under one
            if clip := self._load(clip_id):
                return clip, True
            with self._recorded(clip_id):
                clip = make()
            if clip.clip_id != clip_id:
                raise ValueError(f"asked for clip {clip_id}, made {clip.clip_id}")
            clip.frames.flags.writeable = False  # as when it is read from disk
            with self._writing():
                self._put(clip)
            return clip, False

    def content_sha256(self, *paths: str) -> str:
        """See `remembered_sha256`.

        Raises:
            OSError: A file cannot be read.
            UserError: The folder cannot be written.
        """
        return remembered_sha256(self.dir, *map(Path, paths))

    @contextmanager
    def _recorded(self, clip_id: str) -> Iterator[None]:
        """Leave a record behind if this process ends inside."""
        record = self.dir / f"{clip_id}.crashes"
        crashes = 0
        with suppress(FileNotFoundError):
            found = record.stat()
            crashes = found.st_size if time.time() - found.st_mtime < CRASHES_COUNT_S else 0
        if crashes >= MAX_CRASHES:
            raise MakerCrashed(record)
        with self._writing():
            record.write_bytes(b"x" * (crashes + 1))
        try:
            yield
        finally:
            record.unlink(missing_ok=True)

    def _put(self, clip: Clip) -> None:
        others = vars(clip) | {"frames": None, "pts_s": clip.pts_s.tolist(), "indices": clip.indices.tolist()}
        text = json.dumps(others).encode()
        size = clip.frames.nbytes + len(text)
        if size > self.limit_bytes:
            return
        # Room is made before writing: a folder on a disk of just the limit's size must not overflow.
        self._account(size)
        part = self.dir / f"{clip.clip_id}.part"
        try:
            with open(part, "wb") as file:
                np.lib.format.write_array(file, np.ascontiguousarray(clip.frames), allow_pickle=False)
                file.write(text)
            part.replace(self.dir / f"{clip.clip_id}.npy")
        except OSError:
            part.unlink(missing_ok=True)
            raise

    def _load(self, clip_id: str) -> Clip | None:
        """The clip with its frames mapped from disk; None if it is absent, evicted meanwhile, cut short or garbled."""
        path = self.dir / f"{clip_id}.npy"
        try:
            mapped: np.memmap[tuple[int, ...], np.dtype[np.uint8]] = np.load(path, mmap_mode="r", allow_pickle=False)
            with open(path, "rb") as file:
                file.seek(mapped.offset + mapped.nbytes)
                others = json.load(file)
            others["pts_s"] = np.array(others["pts_s"], dtype=np.float64)
            others["indices"] = np.array(others["indices"], dtype=np.int64)
            # A plain view: np.memmap would follow the array through every slice and pickle.
            clip = Clip(**others | {"frames": np.asarray(mapped)})
        except (OSError, ValueError, EOFError, KeyError, TypeError):
            return None
        with suppress(OSError):  # evicted meanwhile: the mapping stays good; or somebody else's file
            os.utime(path)
        return clip

    def _account(self, added: int) -> None:
        """Add to the total size; when it exceeds the limit, remove entries, least recently used first."""
        total_path = self.dir / "total_bytes"
        with self._locked("total_bytes"):
            try:
                total = int(total_path.read_text()) + added
            except (OSError, ValueError):  # lost or garbled
                total = self.limit_bytes + 1
            if total > self.limit_bytes:
                entries = sorted(self._scan(), reverse=True)
                total = added + sum(size for _, size, _ in entries)
                goal = self.limit_bytes * (KEEP_FRACTION if total > self.limit_bytes else 1)
                while entries and total > goal:
                    _, size, path = entries.pop()
                    Path(path).unlink(missing_ok=True)  # its data remain while somebody has it mapped
                    total -= size
            write_atomic(total_path, str(total))

    def _scan(self) -> list[tuple[int, int, str]]:
        """(time of last use in ns, bytes, path) of every entry and of incomplete files that a crashed process left."""
        found = []
        for file in os.scandir(self.dir):
            with suppress(FileNotFoundError):
                stat = file.stat()
                is_stale = time.time() - stat.st_mtime > STALE_PART_S
                # Earlier versions wrote a .json beside each entry.
                if file.name.endswith((".npy", ".json")) or (file.name.endswith(".part") and is_stale):
                    found.append((stat.st_mtime_ns, stat.st_size, file.path))
        return found

    def _writing(self) -> AbstractContextManager[None]:
        fix = "free some space, or set data.cache_dir or a lower data.cache_gib"
        return naming_write_errors(f"the frame cache {self.dir}", fix)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold an exclusive lock between processes and threads; the system frees it when its holder ends."""
        with self._writing():
            file = open(self.dir / f"{name}.lock", "ab")  # noqa: SIM115
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
