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
