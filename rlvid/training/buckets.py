"""Parameters in buckets of bytes: the unit in which weights travel to the engines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BUCKET_BYTES = 64 * 2**20  # an engine loads one while the next is written: some to overlap, few messages


@dataclass(frozen=True)
class Bucket:
    """Some parameters. On CPU a new bucket is a view of them, true until they change: who keeps it copies it, and
    pickling (Ray's object store) writes each parameter once, with no flat copy in between."""

    parts: tuple[npt.NDArray[np.uint8], ...]  # [bytes] of each parameter
    entries: tuple[tuple[str, str, tuple[int, ...]], ...]  # name, dtype, shape
    is_last: bool  # the whole model has been sent with this one

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views of the bucket's memory; read-only where it lies in shared memory."""
        for part, (name, dtype_name, shape) in zip(self.parts, self.entries, strict=True):
            dtype: torch.dtype = getattr(torch, dtype_name)
            yield name, torch.from_numpy(part).view(dtype).view(shape)

    def digest(self) -> str:
        """Checksum of names, dtypes, shapes and bytes."""
        h = hashlib.blake2b(repr(self.entries).encode(), digest_size=16)
        for part in self.parts:
            h.update(part.data)
        return h.hexdigest()


def to_buckets(
    named: Iterable[tuple[str, Tensor]], bucket_bytes: int = BUCKET_BYTES, is_last: bool = True
) -> Iterator[Bucket]:
    """Cut named tensors, in order, into buckets of about `bucket_bytes`; a larger tensor has its own.

    Args:
        is_last: nothing comes after these tensors.
    """
    chosen: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in named:
        if chosen and size + tensor.nbytes > bucket_bytes:
            yield _bucket(chosen, is_last=False)
            chosen, size = [], 0
        chosen.append((name, tensor))
        size += tensor.nbytes
    if chosen:
        yield _bucket(chosen, is_last)


def _bucket(named: list[tuple[str, Tensor]], is_last: bool) -> Bucket:
    parts = tuple(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for _, t in named)
    entries = tuple((name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in named)
    return Bucket(parts, entries, is_last)
