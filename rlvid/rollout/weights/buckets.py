"""Parameters in buckets of bytes: the unit in which weights travel to the engines on CPU."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlvid.training.parameters import Part

BUCKET_BYTES = 64 * 2**20  # an engine loads one while the next is written: some to overlap, few messages


@dataclass(frozen=True)
class Bucket:
    """Some parameters. On CPU a new bucket is a view of them, valid until they change. Pickling it (Ray's object store)
    writes each parameter once, with no flat copy in between."""

    parts: tuple[npt.NDArray[np.uint8], ...]  # [bytes] of each parameter
    entries: tuple[tuple[str, str, tuple[int, ...]], ...]  # name, dtype, shape
    is_last: bool  # nothing of this version follows

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views of the bucket's memory; read-only where that is shared memory."""
        for part, (name, dtype_name, shape) in zip(self.parts, self.entries, strict=True):
            dtype: torch.dtype = getattr(torch, dtype_name)
            yield name, torch.from_numpy(part).view(dtype).view(shape)

    def digest(self) -> str:
        """Checksum of names, dtypes, shapes and bytes."""
        h = hashlib.blake2b(repr(self.entries).encode(), digest_size=16)
        for part in self.parts:
            h.update(part.data)
        return h.hexdigest()


def to_buckets(parts: Iterable[Part]) -> Iterator[Bucket]:
    """A bucket of each part (`Learner.weight_parts`)."""
    for named, is_last in parts:
        arrays = tuple(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for _, t in named)
        entries = tuple((name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in named)
        yield Bucket(arrays, entries, is_last)
