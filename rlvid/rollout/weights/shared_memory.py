"""Buckets in memory that the processes of one machine share: the trainer writes there, its engines read there.

The same pages serve every update. In Ray's object store an update mostly gets pages that have not been touched, and the
kernel makes and zeroes them at the first write, which took up to ten times as long as the copy itself. Linux only
(memfd); the memory is freed with the last process that has it open.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

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
    entries: tuple[tuple[str, str, tuple[int, ...]], ...]  # as in Bucket
    is_last: bool

    def open(self) -> Bucket:
        """The bucket, read-only, without a copy. Only on its machine.

        Raises:
            FileNotFoundError: the owner is gone.
        """
        memory = _mapped(self.file, self.token, self.offset, self.size)
        parts, at = [], 0
        for _, dtype_name, shape in self.entries:
            dtype: torch.dtype = getattr(torch, dtype_name)
            size = dtype.itemsize * math.prod(shape)
            parts.append(memory[at : at + size])
            at += _aligned(size, ALIGNMENT)
        return Bucket(tuple(parts), self.entries, self.is_last)


class SharedBuckets:
    """The owner's side. `rewind` before each version, which then replaces the previous one."""

    def __init__(self, machine: str):
        self._machine, self._token = machine, f"rlvid-weights-{secrets.token_hex(8)}"
        self._fd = os.memfd_create(self._token)
        self._maps: dict[tuple[int, int], Memory] = {}
        self._length = self._at = 0

    def rewind(self) -> None:
        self._at = 0

    def write(self, bucket: Bucket) -> SharedBucket:
        """Copy a bucket in: each parameter once."""
        size = _aligned(sum(_aligned(part.nbytes, ALIGNMENT) for part in bucket.parts), mmap.ALLOCATIONGRANULARITY)
        offset, self._at = self._at, self._at + size
        if self._at > self._length:
            os.ftruncate(self._fd, self._at)
            self._length = self._at
        if (offset, size) not in self._maps:
            self._maps[offset, size] = np.frombuffer(mmap.mmap(self._fd, size, offset=offset), dtype=np.uint8)
        memory, at = self._maps[offset, size], 0
        for part in bucket.parts:
            np.copyto(memory[at : at + part.nbytes], part)
            at += _aligned(part.nbytes, ALIGNMENT)
        file = f"/proc/{os.getpid()}/fd/{self._fd}"
        return SharedBucket(self._machine, file, self._token, offset, size, bucket.entries, bucket.is_last)


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
