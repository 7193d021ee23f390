"""Decoded frames on disk: a clip is decoded once per machine, then mapped into memory (40 to 700 times cheaper).

An entry is two files, `<clip_id>.npy` (frames, as any numpy reads them) and `<clip_id>.json` (the rest of the clip).
The JSON is written last and says that the entry is whole; its modification time is that of the last use. Files appear
by rename only. Processes share a folder: a lock per clip makes one of them decode while the others wait, and the total
size is kept in one locked file, so that putting a clip does not look through the folder.

Native decoders crash, and what runs a worker may start it again without end (Ray Data 2.60 retries a task whose worker
died for ever). So `<clip_id>.tries` outlives a process that dies while it makes the clip, and a clip that has cost two
processes is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from rlvid.errors import UserError
from rlvid.types import Clip

KEEP_FRACTION = 0.9  # eviction goes on to here, or a full cache would be searched at every put
SHA256_LENGTH = 64  # hexadecimal digits
STALE_PART_S = 3600.0  # a half-written file this old belongs to a process that died
MAX_DEATHS = 2  # one death can be somebody else's: a stopped run, a lost machine
DEATHS_COUNT_S = 3600.0  # so long after the last


class MakerDied(Exception):
    """Making this clip has killed `MAX_DEATHS` processes. `record` is the file that says so."""

    def __init__(self, record: Path):
        super().__init__(record)
        self.record = record


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
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def get(self, clip_id: str) -> Clip | None:
        """The clip with read-only frames mapped from disk, or None. An entry that is not whole is removed."""
        clip = self._load(clip_id)
        if clip is None and any(path.exists() for path in self._paths(clip_id)):
            with self._locked(self._lock_path(clip_id)):
                clip = self._load(clip_id)  # another process may just have been writing it
                if clip is None:
                    self._remove(clip_id)
        return clip

    def get_or_make(self, clip_id: str, make: Callable[[], Clip]) -> tuple[Clip, bool]:
        """The clip, and whether it was there. Of all processes that ask at the same time one calls `make`.

        Raises:
            UserError: The folder cannot be written.
            MakerDied: Several processes died in `make` of this clip within the last hour.
            Exception: Whatever `make` raises; nothing is kept then.
        """
        clip = self._load(clip_id)
        if clip is not None:
            return clip, True
        with self._locked(self._lock_path(clip_id)):
            clip = self._load(clip_id)
            if clip is not None:
                return clip, True
            self._remove(clip_id)
            with self._recorded(clip_id):
                clip = make()
            if clip.clip_id != clip_id:
                raise ValueError(f"asked for clip {clip_id}, made {clip.clip_id}")
            clip.frames.flags.writeable = False  # as when it is read from disk
            try:
                self._put(clip)
            except OSError as error:
                raise self._unwritable(error) from error
            return clip, False

    def content_sha256(self, path: str, size: int, mtime_ns: int, compute: Callable[[], str]) -> str:
        """What `compute` returned for this path, size and time of modification: a cached clip's file is not read again.

        Raises:
            UserError: The folder cannot be written.
            Exception: Whatever `compute` raises; nothing is remembered then.
        """
        key = hashlib.sha256(f"{size} {mtime_ns} {path}".encode(errors="surrogateescape")).hexdigest()
        record = self.dir / f"{key}.sha256"
        with suppress(FileNotFoundError):
            known = record.read_text()
            if len(known) == SHA256_LENGTH:  # a process may have died while it wrote
                return known
        known = compute()
        try:
            record.write_text(known)
        except OSError as error:
            raise self._unwritable(error) from error
        return known

    def size_bytes(self) -> int:
        """Size of all entries, looked up on disk."""
        return sum(size for _, size, _ in self._scan())

    @contextmanager
    def _recorded(self, clip_id: str) -> Iterator[None]:
        """Leave a record behind if this process dies inside."""
        record = self.dir / f"{clip_id}.tries"
        try:
            found = record.stat()
            deaths = found.st_size if time.time() - found.st_mtime < DEATHS_COUNT_S else 0
        except FileNotFoundError:
            deaths = 0
        if deaths >= MAX_DEATHS:
            raise MakerDied(record)
        try:
            record.write_bytes(b"x" * (deaths + 1))
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            yield
        finally:
            record.unlink(missing_ok=True)

    def _put(self, clip: Clip) -> None:
        frames_path, meta_path = self._paths(clip.clip_id)
        meta = {
            "shape": clip.frames.shape,
            "pts_s": clip.pts_s.tolist(),
            "indices": clip.indices.tolist(),
            "n_frames": clip.n_frames,
            "fps": clip.fps,
            "reader": clip.reader,
            "content_sha256": clip.content_sha256,
        }
        text = json.dumps(meta).encode()
        size = clip.frames.nbytes + len(text)
        if size > self.limit_bytes:
            return
        # Room is made before writing: a folder on a disk of just the limit's size must not overflow.
        self._account(size)
        frames_part, meta_part = frames_path.with_suffix(".npy.part"), meta_path.with_suffix(".json.part")
        try:
            with open(frames_part, "wb") as file:
                np.lib.format.write_array(file, np.ascontiguousarray(clip.frames), allow_pickle=False)
            meta_part.write_bytes(text)
            frames_part.replace(frames_path)
            meta_part.replace(meta_path)
        except OSError:
            frames_part.unlink(missing_ok=True)
            meta_part.unlink(missing_ok=True)
            raise

    def _load(self, clip_id: str) -> Clip | None:
        frames_path, meta_path = self._paths(clip_id)
        try:
            meta: dict[str, Any] = json.loads(meta_path.read_bytes())
            # A plain view: np.memmap would follow the array through every slice and pickle.
            frames = np.asarray(np.load(frames_path, mmap_mode="r", allow_pickle=False))
            if list(frames.shape) != meta["shape"] or frames.dtype != np.uint8:
                return None
            clip = Clip(
                clip_id=clip_id,
                frames=frames,
                pts_s=np.array(meta["pts_s"], dtype=np.float64),
                indices=np.array(meta["indices"], dtype=np.int64),
                n_frames=meta["n_frames"],
                fps=meta["fps"],
                reader=meta["reader"],
                content_sha256=meta["content_sha256"],
            )
        except (OSError, ValueError, EOFError, KeyError, TypeError):  # absent, evicted meanwhile, cut short, garbled
            return None
        with suppress(OSError):  # evicted meanwhile: the mapping stays good; or somebody else's file
            os.utime(meta_path)
        return clip

    def _account(self, added: int) -> None:
        """Add to the total size, and evict when it comes above the limit."""
        total_path = self.dir / "total_bytes"
        with self._locked(self.dir / "total_bytes.lock"):
            try:
                total = int(total_path.read_text())
            except (OSError, ValueError):
                total = sum(size for _, size, _ in self._scan())
            total += added
            if total > self.limit_bytes:
                total = self._evict(int(self.limit_bytes * KEEP_FRACTION) - added) + added
            part = total_path.with_suffix(".part")
            part.write_text(str(total))
            part.replace(total_path)

    def _evict(self, goal: int) -> int:
        """Remove entries, least recently used first, until `goal` bytes are left; return what is left."""
        entries = sorted(self._scan())
        total = sum(size for _, size, _ in entries)
        for _, size, clip_id in entries:
            if total <= goal:
                break
            self._remove(clip_id)  # whoever has it mapped keeps it: the data lives as long as the mapping
            total -= size
        return total

    def _scan(self) -> list[tuple[int, int, str]]:
        """(time of last use in ns, bytes, clip id) of every entry, whole or not."""
        found: dict[str, list[int]] = {}
        with os.scandir(self.dir) as files:
            for file in files:
                clip_id, _, kind = file.name.partition(".")
                if kind not in ("npy", "json", "npy.part", "json.part"):
                    continue
                try:
                    stat = file.stat()
                except FileNotFoundError:
                    continue
                if kind.endswith(".part") and time.time() - stat.st_mtime < STALE_PART_S:
                    continue
                entry = found.setdefault(clip_id, [0, 0])
                entry[0] = max(entry[0], stat.st_mtime_ns)
                entry[1] += stat.st_size
        return [(used, size, clip_id) for clip_id, (used, size) in found.items()]

    def _remove(self, clip_id: str) -> None:
        frames_path, meta_path = self._paths(clip_id)
        for path in (meta_path, frames_path):
            path.unlink(missing_ok=True)
            path.with_suffix(f"{path.suffix}.part").unlink(missing_ok=True)

    def _paths(self, clip_id: str) -> tuple[Path, Path]:
        return self.dir / f"{clip_id}.npy", self.dir / f"{clip_id}.json"

    def _lock_path(self, clip_id: str) -> Path:
        return self.dir / f"{clip_id}.lock"

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write the frame cache {self.dir}: {error.strerror}. "
            "Free some space, or set data.cache_dir or a lower data.cache_gib"
        )

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Hold an exclusive lock between processes and threads; the system frees it when its holder dies."""
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise self._unwritable(error) from error
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                if os.fstat(fd).st_ino == os.stat(path).st_ino:
                    break
            except FileNotFoundError:
                pass
            os.close(fd)  # its holder has removed the file meanwhile: this lock excludes nobody
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(fd)
