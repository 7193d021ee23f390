from __future__ import annotations

from pathlib import Path

import pytest

from rlvid.reporting.checkpoints import Checkpoints


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


def write(checkpoints: Checkpoints, step: int, text: str = "weights", keep: int = 2) -> None:
    with checkpoints.writing(step, keep) as path:
        (path / "model").write_text(text)


def test_missing_folder_has_no_checkpoint(checkpoints: Checkpoints) -> None:
    assert checkpoints.complete() == [] and checkpoints.newest() is None
    checkpoints.remove_unfinished()


def test_newest_is_by_number_and_older_than_k_are_removed(checkpoints: Checkpoints) -> None:
    for step in (2, 9, 10):
        write(checkpoints, step)
    assert [checkpoint.step for checkpoint in checkpoints.complete()] == [9, 10]
    newest = checkpoints.newest()
    assert newest is not None and newest.path == checkpoints.dir / "step_10"
    assert sorted(path.name for path in checkpoints.dir.iterdir()) == ["step_10", "step_9"]


def test_checkpoint_is_not_listed_before_it_is_complete(checkpoints: Checkpoints) -> None:
    with checkpoints.writing(1, keep=2) as path:
        (path / "model").write_text("half")
        assert checkpoints.newest() is None
    assert checkpoints.newest() is not None


def test_failed_writing_leaves_nothing_and_removes_nothing(checkpoints: Checkpoints) -> None:
    write(checkpoints, 1)
    with pytest.raises(OSError, match="disk"), checkpoints.writing(2, keep=1) as path:
        (path / "model").write_text("half")
        raise OSError("disk full")
    assert [path.name for path in checkpoints.dir.iterdir()] == ["step_1"]


def test_leftovers_of_a_killed_process_are_ignored_and_removed(checkpoints: Checkpoints) -> None:
    write(checkpoints, 1)
    for leftover in ("step_2.tmp", "step_1.replaced"):
        (checkpoints.dir / leftover).mkdir()
        (checkpoints.dir / leftover / "model").write_text("half")
    (checkpoints.dir / "step_3").write_text("a file")
    assert [checkpoint.step for checkpoint in checkpoints.complete()] == [1]
    checkpoints.remove_unfinished()
    assert sorted(path.name for path in checkpoints.dir.iterdir()) == ["step_1", "step_3"]


def test_writing_over_leftovers_starts_empty(checkpoints: Checkpoints) -> None:
    (checkpoints.dir / "step_2.tmp").mkdir(parents=True)
    (checkpoints.dir / "step_2.tmp" / "old").write_text("half")
    write(checkpoints, 2)
    assert [path.name for path in (checkpoints.dir / "step_2").iterdir()] == ["model"]


def test_same_step_is_replaced(checkpoints: Checkpoints) -> None:
    write(checkpoints, 1, "old")
    write(checkpoints, 1, "new")
    assert (checkpoints.dir / "step_1" / "model").read_text() == "new"
    assert [path.name for path in checkpoints.dir.iterdir()] == ["step_1"]
