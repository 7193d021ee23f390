from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch

from rlvid.rollout.weights.buckets import to_buckets
from rlvid.rollout.weights.shared_memory import SharedBucket, SharedBuckets
from rlvid.training.parameters import in_parts

READ = """
import pickle, sys
sent = pickle.load(sys.stdin.buffer)
for place in sent:
    bucket = place.open()
    print(bucket.digest(), any(part.flags.writeable for part in bucket.parts))
"""


def named(value: float) -> list[tuple[str, torch.Tensor]]:
    return [
        ("a", torch.full((3, 5), value)),
        ("b", torch.tensor(3, dtype=torch.int64)),
        ("c", torch.full((7,), value, dtype=torch.bfloat16)),
        ("d", torch.full((5000,), value)),
    ]


def write(memory: SharedBuckets, value: float, limit: int = 100) -> tuple[list[SharedBucket], list[str]]:
    memory.rewind()
    buckets = list(to_buckets(in_parts(named(value), limit)))
    return [memory.write(b) for b in buckets], [b.digest() for b in buckets]


def test_another_process_reads_what_was_written_and_cannot_change_it() -> None:
    sent, digests = write(SharedBuckets("here"), 1.5)
    assert len(sent) > 1 and [place.is_last for place in sent] == [False] * (len(sent) - 1) + [True]
    row = pickle.dumps(sent)
    assert len(row) < 2000  # no weights in the message
    run = subprocess.run([sys.executable, "-c", READ], input=row, capture_output=True, check=True)
    assert run.stdout.decode().split() == [word for digest in digests for word in (digest, "False")]


def test_a_version_takes_the_place_of_the_one_before() -> None:
    memory = SharedBuckets("here")
    first, _ = write(memory, 1.0)
    opened = [place.open() for place in first]
    second, digests = write(memory, 2.0)
    assert second == first  # the same pages
    assert [bucket.digest() for bucket in opened] == digests


def test_other_sizes_fit_too() -> None:
    memory = SharedBuckets("here")
    for limit in (100, 10**6, 1, 100):
        sent, digests = write(memory, float(limit), limit)
        assert [place.open().digest() for place in sent] == digests


def test_memory_of_another_owner_is_not_taken_for_it() -> None:
    (place, *_), _ = write(SharedBuckets("here"), 1.0)
    stale = SharedBucket(**{**vars(place), "token": "rlvid-weights-of-before"})
    with pytest.raises(FileNotFoundError, match="is gone"):
        stale.open()
