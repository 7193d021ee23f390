"""What a worker of a supervised training does without Ray Train."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.supervised_worker import Worker


@pytest.mark.parametrize(("kept_bytes", "is_kept"), [(500, True), (250, False)])
def test_held_out_groups_are_kept_whole_or_not_at_all(
    kept_bytes: int, is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every evaluation has all of them."""
    monkeypatch.setattr("actors.supervised_worker.KEPT_BYTES", kept_bytes)
    parts = [[SimpleNamespace(prompt=SimpleNamespace(patches=np.zeros(100, np.uint8)))] for _ in range(5)]
    worker: Any = Worker.__new__(Worker)
    worker.cfg, worker._kept = SimpleNamespace(evaluate=SimpleNamespace(batch_size=1)), []
    worker.chunks, worker.any = lambda name, size: iter(parts), bool
    assert list(worker._held_out()) == parts
    assert bool(worker._kept) is is_kept
    assert list(worker._held_out()) == parts
