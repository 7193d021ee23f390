"""Buckets in memory that the processes of one machine share: the trainer writes there, its engines read there.

The same pages serve every update. In Ray's object store an update mostly gets pages that have not been touched, and the
kernel makes and zeroes them at the first write, which took up to ten times as long as the copy itself. Linux only
(memfd); the memory is freed with the last process that has it open.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import os
import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rlvid.rollout.weights.buckets import Bucket

Memory = npt.NDArray[np.uint8]
ALIGNMENT = 64  # bytes, as in Ray's object store


@dataclass(frozen=True)
class SharedBucket:
    """Where a bucket is. Valid until its owner writes the next version."""

    machine: str
    file: str  # of the owner's open files
    token: str  # in the file's name, which shows that it is still the owner's
    offset: int  # bytes
    size: int  # bytes
    bounds: tuple[tuple[int, int], ...]  # bytes of each parameter, from `offset` on
    entries: tuple[tuple[str, str, tuple[int, ...]], ...]  # as in Bucket
    is_last: bool

    def open(self) -> Bucket:
        """The bucket, read-only, without a copy. Only on its machine.

        Raises:
            FileNotFoundError: the owner is gone.
        """
        memory = _mapped(self.file, self.token, self.offset, self.size)
        return Bucket(tuple(memory[begin:end] for begin, end in self.bounds), self.entries, self.is_last)


class SharedBuckets:
    """The owner's side. `rewind` before each version, which then replaces the previous one."""

    def __init__(self, machine: str):
        self._machine, self._token = machine, f"rlvid-weights-{secrets.token_hex(8)}"
        self._fd = os.memfd_create(self._token)
        self._maps: dict[tuple[int, int], Memory] = {}
        self._at = 0

    def rewind(self) -> None:
        self._at = 0

    def write(self, bucket: Bucket) -> SharedBucket:
        """Copy a bucket in: each parameter once."""
        begins = [0, *itertools.accumulate(_aligned(part.nbytes, ALIGNMENT) for part in bucket.parts)]
        bounds = tuple((begin, begin + part.nbytes) for begin, part in zip(begins, bucket.parts, strict=False))
        offset, size = self._at, _aligned(begins[-1], mmap.ALLOCATIONGRANULARITY)
        self._at += size
        if self._at > os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, self._at)
        if (offset, size) not in self._maps:
            self._maps[offset, size] = np.frombuffer(mmap.mmap(self._fd, size, offset=offset), dtype=np.uint8)
        for part, (begin, end) in zip(bucket.parts, bounds, strict=True):
            np.copyto(self._maps[offset, size][begin:end], part)
        file = f"/proc/{os.getpid()}/fd/{self._fd}"
        return SharedBucket(self._machine, file, self._token, offset, size, bounds, bucket.entries, bucket.is_last)


@functools.cache  # each new mapping would cost a page fault per page
def _mapped(file: str, token: str, offset: int, size: int) -> Memory:
    if token not in os.readlink(file):
        raise FileNotFoundError(f"{file} is not {token}: the trainer that wrote the weights is gone")
    fd = os.open(file, os.O_RDONLY)
    try:
        return np.frombuffer(mmap.mmap(fd, size, offset=offset, access=mmap.ACCESS_READ), dtype=np.uint8)
    finally:
        os.close(fd)


def _aligned(size: int, step: int) -> int:
    return -(-size // step) * step
