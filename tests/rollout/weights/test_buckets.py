from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import torch

from rlvid.rollout.weights.buckets import Bucket, to_buckets
from rlvid.training.parameters import in_parts


def named() -> list[tuple[str, torch.Tensor]]:
    return [
        ("a", torch.arange(6.0).view(2, 3)),
        ("b", torch.tensor(3, dtype=torch.int64)),
        ("c", torch.ones(4, dtype=torch.bfloat16)),
    ]


def test_tensors_come_back_as_they_were_sent() -> None:
    for limit, count in ((10**6, 1), (32, 2), (1, 3)):  # a is 24 bytes, b 8, c 8
        buckets = list(to_buckets(in_parts(named(), limit)))
        assert len(buckets) == count
        back = [pair for bucket in buckets for pair in bucket.tensors()]
        assert [name for name, _ in back] == ["a", "b", "c"]
        assert all(torch.equal(x, y) and x.dtype == y.dtype for (_, x), (_, y) in zip(back, named(), strict=True))


def test_the_last_bucket_says_so() -> None:
    for limit in (10**6, 32, 1):
        lasts = [bucket.is_last for bucket in to_buckets(in_parts(named(), limit))]
        assert lasts == [False] * (len(lasts) - 1) + [True]


def test_parameters_are_not_copied_before_they_are_pickled() -> None:
    parameter = torch.zeros(1000)
    (bucket,) = to_buckets(in_parts([("w", parameter)], 10**6))
    parameter += 1
    out_of_band: list[pickle.PickleBuffer] = []
    row = pickle.dumps(bucket, protocol=5, buffer_callback=out_of_band.append)
    assert len(row) < 1000 and [b.raw().nbytes for b in out_of_band] == [4000]
    parameter += 1
    back: Bucket = pickle.loads(row, buffers=out_of_band)
    ((_, tensor),) = back.tensors()
    assert torch.equal(tensor, torch.full((1000,), 2.0))


def test_a_transposed_parameter_arrives_in_its_own_order() -> None:
    ((_, back),) = next(iter(to_buckets(in_parts([("t", torch.arange(6.0).view(2, 3).t())], 10**6)))).tensors()
    assert torch.equal(back, torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))


def test_digest_notices_one_bit_and_a_changed_name() -> None:
    (bucket,) = to_buckets(in_parts(named(), 10**6))
    flipped = bucket.parts[0].copy()
    flipped[5] ^= 1
    renamed = (("x", *bucket.entries[0][1:]), *bucket.entries[1:])
    copied = tuple(part.copy() for part in bucket.parts)
    assert bucket.digest() == dataclasses.replace(bucket, parts=copied).digest()
    assert bucket.digest() != dataclasses.replace(bucket, parts=(flipped, *copied[1:])).digest()
    assert bucket.digest() != dataclasses.replace(bucket, entries=renamed).digest()


def test_read_only_memory_is_enough() -> None:
    (bucket,) = to_buckets(in_parts(named(), 10**6))
    parts = tuple(part.copy() for part in bucket.parts)
    for part in parts:
        part.setflags(write=False)
    _, first = next(iter(dataclasses.replace(bucket, parts=parts).tensors()))
    assert np.array_equal(first.numpy(), np.arange(6.0).reshape(2, 3))
