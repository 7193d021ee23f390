"""The `checkpoints/` folder of a run: finds, writes and removes checkpoints.

Invariant: a folder named `step_N` is complete. It is written as `step_N.tmp` and then renamed, which is atomic, so a
process killed at any time leaves either a complete `step_N` or none. The trainer decides what a checkpoint contains.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlvid.config import RunConfig
from rlvid.files import naming_write_errors, replace_folder, sync_folder

STATE_FILE = "job.json"  # in a checkpoint: the state of the job
_COMPLETE = re.compile(r"step_(\d+)")


class Checkpoint(NamedTuple):
    step: int
    path: Path


@dataclass(frozen=True)
class Unfinished:
    """A checkpoint that is being written."""

    step: int
    folder: Path
    state: Mapping[str, Any]  # of the job
    files: ExitStack  # its end makes the folder a checkpoint


def exports_after(step: int, cfg: RunConfig) -> bool:
    """Whether the policy is exported with the checkpoint of this step."""
    number, rest = divmod(step, cfg.checkpoint_every)
    return cfg.export_every is not None and rest == 0 and number % cfg.export_every == 0


class Checkpoints:
    """Complete checkpoints under `directory`, oldest first."""

    def __init__(self, directory: Path) -> None:
        self.dir = directory

    def complete(self) -> list[Checkpoint]:
        matches = {path: _COMPLETE.fullmatch(path.name) for path in self.dir.glob("step_*") if path.is_dir()}
        return sorted(Checkpoint(int(match[1]), path) for path, match in matches.items() if match)

    def newest(self) -> Checkpoint | None:
        complete = self.complete()
        return complete[-1] if complete else None

    @contextmanager
    def writing(self, step: int, keep: int) -> Iterator[Path]:
        """Yield an empty folder to write into, which becomes `step_<step>` when the block ends without an error.

        A checkpoint of the same step is replaced. Then all but the newest `keep` complete checkpoints are removed.
        After an error the new checkpoint is removed.

        Raises:
            UserError: writing failed, for example because the disk is full.
        """
        unfinished = self.dir / f"step_{step}.tmp"
        fix = "free some space; earlier checkpoints are complete, and the same command resumes from the newest"
        with naming_write_errors(f"the checkpoint of step {step} in {self.dir}", fix):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            try:
                yield unfinished
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
            sync_folder(unfinished)
            replace_folder(unfinished, self.dir / f"step_{step}")
            for old in self.complete()[:-keep]:
                # Renamed first: if the process is killed here, no incomplete `step_N` is left.
                shutil.rmtree(old.path.rename(f"{old.path}.tmp"))

    def remove_unfinished(self) -> None:
        """Remove what a killed process left incomplete. Call it only while holding the run folder's lock."""
        for path in (*self.dir.glob("step_*.tmp"), *self.dir.glob("step_*.replaced")):
            shutil.rmtree(path, ignore_errors=True)
