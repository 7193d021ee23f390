from __future__ import annotations

import dataclasses

import numpy as np
import torch

from rlvid.training.buckets import Bucket, to_buckets


def named() -> list[tuple[str, torch.Tensor]]:
    return [
        ("a", torch.arange(6.0).view(2, 3)),
        ("b", torch.tensor(3, dtype=torch.int64)),
        ("c", torch.ones(4, dtype=torch.bfloat16)),
    ]


def test_tensors_come_back_as_they_were_sent() -> None:
    for limit, count in ((10**6, 1), (32, 2), (1, 3)):  # a is 24 bytes, b 8, c 8
        buckets = list(to_buckets(named(), limit))
        assert len(buckets) == count
        back = [pair for bucket in buckets for pair in bucket.tensors()]
        assert [name for name, _ in back] == ["a", "b", "c"]
        assert all(torch.equal(x, y) and x.dtype == y.dtype for (_, x), (_, y) in zip(back, named(), strict=True))


def test_digest_notices_one_bit_and_a_changed_name() -> None:
    (bucket,) = to_buckets(named())
    flipped = bucket.data.copy()
    flipped[5] ^= 1
    renamed = (("x", *bucket.entries[0][1:]), *bucket.entries[1:])
    assert bucket.digest() == Bucket(bucket.data.copy(), bucket.entries).digest()
    assert bucket.digest() != Bucket(flipped, bucket.entries).digest()
    assert bucket.digest() != dataclasses.replace(bucket, entries=renamed).digest()


def test_read_only_memory_is_enough() -> None:
    (bucket,) = to_buckets(named())
    data = bucket.data.copy()
    data.setflags(write=False)
    assert np.array_equal(next(iter(Bucket(data, bucket.entries).tensors()))[1].numpy(), np.arange(6.0).reshape(2, 3))
