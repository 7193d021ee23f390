"""What a worker of a supervised training does without Ray Train."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.supervised_worker import Best, Worker
from rlvid.errors import UserError


def best_of(folder: Path, name: str | None, patience: int | None = None) -> Best:
    """What a worker finds at its start, of a run that has a checkpoint and an exported model."""
    plan: Any = SimpleNamespace(
        cfg=SimpleNamespace(evaluate=SimpleNamespace(best=name, patience=patience, every=2)),
        out=folder,
        checkpoints=SimpleNamespace(newest=lambda: "step_2"),
    )
    return Best(plan)


@pytest.mark.parametrize(("name", "values"), [("accuracy", (0.5, 0.5, 0.4, 0.6)), ("loss", (0.5, 0.5, 0.6, 0.4))])
def test_the_best_is_beaten_by_what_is_better_and_never_by_nan(
    name: str, values: tuple[float, ...], tmp_path: Path
) -> None:
    first, same, worse, better = ({name: value} for value in values)
    best = best_of(tmp_path, name)
    assert not best.is_beaten({name: float("nan")}) and best.is_beaten(first)
    best.replace(2, first, is_written=True)
    assert [best.is_beaten(m) for m in (same, worse, {name: float("nan")}, better)] == [False, False, False, True]
    assert best_of(tmp_path, name).found == best.found  # after a restart
    assert not best_of(tmp_path, "another").found and not best_of(tmp_path / "not exported", name).found


def test_without_a_metric_nothing_is_the_best_and_an_unknown_one_is_named(tmp_path: Path) -> None:
    assert not best_of(tmp_path, None).is_beaten({"loss": 1.0})
    with pytest.raises(UserError, match=r"evaluate.best=spearman: this job's evaluation measures loss, n"):
        best_of(tmp_path, "spearman").is_beaten({"n": 2.0, "loss": 1.0})


def test_training_stops_after_the_patience_without_a_better_evaluation(tmp_path: Path) -> None:
    best = best_of(tmp_path, "loss", patience=3)  # evaluations, of which there is one every two steps
    assert not best.is_stale(100)
    best.replace(2, {"loss": 1.0}, is_written=False)
    assert not best.is_stale(7) and best.is_stale(8)
    assert not best_of(tmp_path, "loss").is_stale(100)


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
