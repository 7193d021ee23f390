"""What an error in the middle of a step leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.run import Run, state_of
from rlvid.config import GrpoJobConfig
from rlvid.errors import UserError


class Cursor:
    """A part of a job whose state moves on before a step can fail."""

    def __init__(self) -> None:
        self.at = 0

    def state(self) -> dict[str, Any]:
        return {"cursor": self.at}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.at = state["cursor"]


@pytest.mark.parametrize(
    ("stage", "saved"),
    [("rollout", [0, 2]), ("train", [0])],  # an error of the trainer may have left it halfway through an update
)
def test_an_error_outside_of_the_trainer_loses_no_step(tmp_path: Path, stage: str, saved: list[int]) -> None:
    """Fault 20b: a prompt that was too long for the engine cost the steps since the last checkpoint."""
    config = {"model": {"tiny": {}}, "data": {"synthetic": {}}, "run": {"dir": tmp_path / "run", "wandb": "disabled"}}
    trainer: Any = SimpleNamespace(
        begin_save=lambda folder: (folder / "weights").write_text("whole"), is_saved=lambda: True, end_save=lambda: None
    )
    cursor = Cursor()
    with Run(GrpoJobConfig.model_validate(config), "grpo") as run:
        run.keep(cursor)
        run.checkpoint(0, trainer)
        with pytest.raises(UserError, match="too long"), run.saving_on_error(trainer):
            for step in (1, 2, 3):
                cursor.at += 4  # the step takes its samples
                with run.stage(stage):
                    if step == 3:
                        raise UserError("a prompt is too long")
                run.log(step, {"loss": 1.0})
        checkpoints = run.folder.checkpoints.complete()
        assert [c.step for c in checkpoints] == saved
        assert state_of(checkpoints[-1])["cursor"] == 4 * saved[-1]  # step 3 is done again with the same samples


class SlowDisk:
    """A trainer whose files are on the disk when `is_done` says so."""

    has_own_critic = False

    def __init__(self) -> None:
        self.is_done = False
        self.exported: list[str] = []

    def begin_save(self, folder: Path) -> None:
        (folder / "weights").write_text("whole")

    def is_saved(self) -> bool:
        return self.is_done

    def end_save(self) -> None:
        self.is_done = True

    def export(self, folder: Path) -> None:
        self.exported.append(folder.name)
        folder.mkdir()
        (folder / "config.json").write_text(str(len(self.exported)))


def test_a_checkpoint_is_complete_once_it_is_on_the_disk_and_the_policy_is_exported_with_it(tmp_path: Path) -> None:
    config = {"model": {"tiny": {}}, "data": {"synthetic": {}}, "train": {"steps": 9}}
    keys = {"dir": tmp_path / "run", "wandb": "disabled", "checkpoint_every": 2, "export_every": 2}
    disk, cursor = SlowDisk(), Cursor()
    trainer: Any = disk
    with Run(GrpoJobConfig.model_validate(config | {"run": keys}), "grpo") as run, run.saving_on_error(trainer):
        run.keep(cursor)

        def saved(step: int) -> list[int]:
            cursor.at = step
            run.checkpoint_if_due(step, trainer)
            return [c.step for c in run.folder.checkpoints.complete()]

        assert saved(1) == [] and saved(2) == [] and saved(3) == []  # begun after step 2
        disk.is_done = True
        assert saved(3) == [2] and state_of(run.folder.checkpoints.complete()[0])["cursor"] == 2
        assert not disk.exported
        disk.is_done = False
        assert saved(4) == [2] and disk.exported == ["policy.part"]
        assert saved(6) == [2, 4]  # one at a time: that of step 4 is completed first
        assert saved(8) == [4, 6]
        assert (run.folder.dir / "policy" / "config.json").read_text() == "2"  # replaced with step 8
    assert [c.step for c in run.folder.checkpoints.complete()] == [6, 8]  # completed at the end
