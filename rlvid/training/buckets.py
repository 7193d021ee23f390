"""Parameters packed into flat buckets of bytes: the unit in which weights travel to the engines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BUCKET_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Bucket:
    """Some parameters, one after another in `data`."""

    data: npt.NDArray[np.uint8]  # [bytes]
    entries: tuple[tuple[str, str, tuple[int, ...]], ...]  # name, dtype, shape

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views of the bucket's memory; read-only where it lies in shared memory."""
        flat = torch.from_numpy(self.data)
        at = 0
        for name, dtype_name, shape in self.entries:
            dtype: torch.dtype = getattr(torch, dtype_name)
            size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            yield name, flat[at : at + size].view(dtype).view(shape)
            at += size

    def digest(self) -> str:
        """Checksum of names, dtypes, shapes and bytes."""
        h = hashlib.blake2b(repr(self.entries).encode(), digest_size=16)
        h.update(np.ascontiguousarray(self.data).data)
        return h.hexdigest()


def to_buckets(named: Iterable[tuple[str, Tensor]], bucket_bytes: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """Cut named tensors, in order, into buckets of about `bucket_bytes`; a larger tensor has its own."""
    chosen: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in named:
        if chosen and size + tensor.nbytes > bucket_bytes:
            yield _fill(chosen, size)
            chosen, size = [], 0
        chosen.append((name, tensor))
        size += tensor.nbytes
    if chosen:
        yield _fill(chosen, size)


def _fill(named: list[tuple[str, Tensor]], size: int) -> Bucket:
    data = torch.empty(size, dtype=torch.uint8)
    at = 0
    for _, tensor in named:
        data[at : at + tensor.nbytes].copy_(tensor.detach().contiguous().view(-1).view(torch.uint8))
        at += tensor.nbytes
    entries = tuple((name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in named)
    return Bucket(data.numpy(), entries)
