"""A run: its folder, its numbers, its steps, and a clean end. What a run reads is in jobs/inputs.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, Self, SupportsFloat

import ray

from actors.actor_process import start_ray
from rlvid.config import JobConfig
from rlvid.errors import UserError
from rlvid.files import replace_folder
from rlvid.reporting.checkpoints import STATE_FILE, Checkpoint, Checkpoints, Unfinished, exports_after
from rlvid.reporting.console import Console
from rlvid.reporting.report.page import write_report
from rlvid.reporting.run_folder import RunFolder
from rlvid.reporting.tracker import Tracker

if TYPE_CHECKING:
    from actors.trainer import TrainerGroup

TRAIN = "train"  # the phase of a job's own steps


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what the same command does next."""


class Resumable(Protocol):
    """A part of a job whose state is kept in checkpoints."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


class Run:
    """One job in one run folder. Use as a context manager; leaving it writes the report.

    Attributes:
        state: what the next checkpoint keeps of the job itself; of the newest checkpoint after `resume`.
        interrupted: Ctrl-C was pressed; the step in progress is the last one.
    """

    def __init__(self, cfg: JobConfig, job: str):
        self.cfg, self.job = cfg, job
        self.console = Console()
        self.folder = RunFolder(cfg.run.dir)
        self.state: dict[str, Any] = {}
        self.interrupted = False
        self._parts: list[Resumable] = []
        self._initial: dict[str, Any] = {}  # state of the parts at the start
        self._times: dict[str, float] = defaultdict(float)
        self._started_s = time.monotonic()
        self._saved_step = -1
        self._unfinished: Unfinished | None = None
        self._tracker: Tracker | None = None
        self._stage = ""
        self._logged: tuple[int, dict[str, Any]] | None = None  # the last step done, and the parts' state after it
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # what was opened is closed again if a later part fails
            stack.enter_context(self.console)
            stack.enter_context(self.folder.start(self.cfg, self.job))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]  # the three of the context protocol

    @contextmanager
    def cluster(self) -> Iterator[None]:
        """Ray while the job works, and a report of whatever it came to."""
        try:
            if "RAY_ADDRESS" in os.environ and not self.cfg.run.dir.is_absolute():
                self.console.message(
                    "run.dir is relative: a submitted job writes it into Ray's copy of the working folder"
                )
            # Ray prints what fails in the cluster on the driver's stdout, which is the console's. The console keeps it.
            self.folder.logs_dir.mkdir(exist_ok=True)
            with (self.folder.logs_dir / "ray.log").open("a", buffering=1) as log, redirect_stdout(log):
                start_ray()
                try:
                    yield
                finally:
                    ray.shutdown()
        finally:
            write_report(self.folder)

    # --- numbers ------------------------------------------------------------------------------------------------------

    def log(self, step: int, metrics: Mapping[str, SupportsFloat], phase: str = TRAIN) -> None:
        """Write a row of metrics. The first call opens the tracker, so the folder must have been rewound before."""
        if self._tracker is None:
            self._tracker = self._stack.enter_context(Tracker(self.folder, self.cfg.run))
        self._tracker.log(step, metrics, phase)
        if skipped := float(metrics.get("train/skipped", 0)):
            updates = "its update" if skipped == 1 else f"{skipped:g} of its updates"
            self.console.message(f"step {step}: {updates} was skipped, loss or gradient was not finite")
        self._logged = (step, self.state_of_parts()) if phase == TRAIN else None

    def logged(self, key: str) -> dict[int, dict[str, Any]]:
        """The rows of the job's own phase that have `key`, by step. A resumed run must not log them again."""
        return {row["step"]: row for row in self.folder.read_metrics() if "phase" not in row and key in row}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage of a step."""
        self.console.working(name)
        self._stage, begin = name, time.monotonic()
        yield
        self._stage = ""
        self._times[name] += time.monotonic() - begin

    def take_times(self) -> dict[str, float]:
        """Seconds per stage since the last call, as metrics."""
        times = {f"time/{name}": seconds for name, seconds in self._times.items()}
        self._times.clear()
        return times

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def keep(self, part: Resumable) -> None:
        """Keep the state of `part` in checkpoints."""
        self._parts.append(part)

    def resume_point(self) -> Checkpoint | None:
        """The newest complete checkpoint, if there is one. Restores the job's state from it, and removes the metrics of
        later steps.

        Raises:
            UserError: the checkpoint cannot be continued with this config.
        """
        self._initial = self._initial or self.state_of_parts()
        self._stage, self._logged, self._saved_step = "", None, -1  # what was done since, if the trainer was lost
        checkpoint = self.folder.checkpoints.newest()
        if checkpoint is not None:
            check_resumable(checkpoint, self.cfg)
        self.state = {} if checkpoint is None else state_of(checkpoint)
        for part in self._parts:
            part.restore(self.state or self._initial)
        if checkpoint is None:
            self.folder.rewind(None)
            return None
        self._saved_step = checkpoint.step
        self.folder.rewind(*place_of(checkpoint)[::-1])
        self.console.message(f"resuming after {describe_step(checkpoint)} ({checkpoint.path})")
        return checkpoint

    def resume(self, trainer: TrainerGroup) -> int:
        """Load the checkpoint of `resume_point`; returns the number of the job's own steps that are done."""
        checkpoint = self.resume_point()
        if checkpoint is None:
            return 0
        trainer.load(checkpoint.path.resolve())
        return checkpoint.step

    def checkpoint(self, step: int, trainer: TrainerGroup) -> None:
        """Write weights, optimizer and the job's state, whole or not at all."""
        self._begin_checkpoint(step, trainer, self.state_of_parts())
        self._end_checkpoint(trainer)

    def _begin_checkpoint(self, step: int, trainer: TrainerGroup, parts: Mapping[str, Any]) -> None:
        self._end_checkpoint(trainer)
        state = {**self.state, **parts, "trainer_workers": self.cfg.placement.trainer_workers}
        with self.stage("checkpoint"), ExitStack() as stack:
            folder = stack.enter_context(self.folder.checkpoints.writing(step, self.cfg.run.keep_checkpoints))
            trainer.begin_save(folder.resolve())
            self._unfinished = Unfinished(step, folder, state, stack.pop_all())

    def _end_checkpoint(self, trainer: TrainerGroup, is_waiting: bool = True) -> None:
        """Complete the checkpoint that is being written, if there is one.

        Args:
            is_waiting: off, only if all of it is on the disk.
        """
        unfinished = self._unfinished
        if unfinished is None or not (is_waiting or trainer.is_saved()):
            return
        self._unfinished = None
        with self.stage("checkpoint"), unfinished.files:  # an error inside removes them
            trainer.end_save()
            (unfinished.folder / STATE_FILE).write_text(json.dumps(unfinished.state))
        self._saved_step = unfinished.step
        self.report()

    def report(self) -> None:
        """Write the page of what the run folder holds so far."""
        write_report(self.folder)

    def state_of_parts(self) -> dict[str, Any]:
        """What the next checkpoint keeps of the parts."""
        return {key: value for part in self._parts for key, value in part.state().items()}

    def checkpoint_if_due(self, step: int, trainer: TrainerGroup) -> None:
        """Write a checkpoint after this step if it is due, in the background; complete an earlier one."""
        self._end_checkpoint(trainer, is_waiting=False)
        if step % self.cfg.run.checkpoint_every and not self.interrupted:
            return
        self._begin_checkpoint(step, trainer, self.state_of_parts())
        if self.interrupted or not self.cfg.run.checkpoint_in_background:
            self._end_checkpoint(trainer)
        if not self.interrupted and step < self.cfg.train.steps and exports_after(step, self.cfg.run):
            with self.stage("export"):
                export_policy(self.folder.dir, trainer)

    def checkpoint_last(self, trainer: TrainerGroup) -> None:
        """The checkpoint of the last step, unless it exists. Comes before what may still fail, the evaluation."""
        self._end_checkpoint(trainer)
        if self._saved_step != self.cfg.train.steps:
            self.checkpoint(self.cfg.train.steps, trainer)

    @contextmanager
    def saving_on_error(self, trainer: TrainerGroup) -> Iterator[None]:
        """A `UserError` inside does not lose the steps since the last checkpoint: they are saved, unless the error came
        out of the trainer itself. The step that failed is done again, with the same samples, when the run resumes."""
        try:
            yield
        except UserError:
            if self._stage not in ("train", "checkpoint") and self._logged and self._logged[0] > self._saved_step >= 0:
                self._begin_checkpoint(self._logged[0], trainer, self._logged[1])
                self._end_checkpoint(trainer)
                self.console.message(f"saved a checkpoint after step {self._logged[0]}")
            raise
        finally:
            try:
                self._end_checkpoint(trainer)
            except Exception as e:
                self.console.message(f"the last checkpoint was not completed: {e}")

    def finish(self, trainer: TrainerGroup, result: Mapping[str, Any]) -> dict[str, Any]:
        """Export the policy; after Ctrl-C, end here.

        Returns:
            The job's result.
        """
        self.end_if_interrupted()
        export_policy(self.folder.dir, trainer)
        return {**result, "steps": self.cfg.train.steps, **self.ending()}

    def ending(self) -> dict[str, Any]:
        """What every job's result ends with."""
        return {
            "seconds": round(time.monotonic() - self._started_s, 1),
            "report": str(self.folder.report_file),
        }

    # --- Ctrl-C -------------------------------------------------------------------------------------------------------

    def steps(self, start: int, stop: int) -> Iterator[int]:
        """Step numbers [start, stop). Ctrl-C ends the loop after the step in progress; a second one stops at once."""
        with self.interruptible():
            for step in range(start, stop):
                yield step
                if self.interrupted:
                    return

    @contextmanager
    def interruptible(self, on_interrupt: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Ctrl-C and SIGTERM set `interrupted` and call `on_interrupt`; the second one stops at once."""

        def interrupt(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            now = f", waiting for its {self._stage}" if self._stage else ""
            self.console.message(f"stopping after this step{now}; press Ctrl-C again to stop at once")
            on_interrupt()

        handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def end_if_interrupted(self, where: str | None = None) -> None:
        """End here after Ctrl-C.

        Raises:
            Interrupted: with what the same command does next: `where`, or what `how_to_resume` says.
        """
        if self.interrupted:
            raise Interrupted(where or how_to_resume(self.folder.dir))


def export_policy(run_dir: Path, trainer: TrainerGroup) -> None:
    """Write `policy/`, and `critic/` if it is a model of its own; replace earlier ones once they are whole."""
    exports = {"policy": trainer.export} | ({"critic": trainer.export_critic} if trainer.has_own_critic else {})
    for name, export in exports.items():
        folder = (run_dir / name).resolve()
        part = folder.with_name(f"{name}.part")
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        export(part)
        replace_folder(part, folder)


def check_resumable(checkpoint: Checkpoint, cfg: JobConfig) -> None:
    """
    Raises:
        UserError: the checkpoint cannot be continued with this config.
    """
    ranks = state_of(checkpoint).get("trainer_workers", 1)
    if cfg.train.zero_stage and cfg.placement.trainer_workers != ranks:
        raise UserError(
            f"{checkpoint.path} was written by {ranks} trainer ranks: ZeRO {cfg.train.zero_stage} cannot resume "
            f"with {cfg.placement.trainer_workers}; set placement.trainer_workers={ranks}"
        )
    if checkpoint.step > cfg.train.steps:
        raise UserError(
            f"{checkpoint.path} is at step {checkpoint.step} already, which is after train.steps={cfg.train.steps}; "
            f"give another run.dir, or more steps"
        )


def state_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The job's state in a checkpoint."""
    return dict(json.loads((checkpoint.path / STATE_FILE).read_text()))


def place_of(checkpoint: Checkpoint) -> tuple[str, int]:
    """Phase and step after which a checkpoint was written."""
    state = state_of(checkpoint) if (checkpoint.path / STATE_FILE).exists() else {}
    phase = state.get("phase", TRAIN)
    return phase, state.get(f"{phase}_steps", checkpoint.step)


def describe_step(checkpoint: Checkpoint) -> str:
    """For example "step 100", or "step 13 of the warm start"."""
    phase, step = place_of(checkpoint)
    return f"step {step}" if phase == TRAIN else f"step {step} of the {phase.replace('_', ' ')}"


def how_to_resume(run_dir: Path) -> str:
    """What the same command does with this run folder."""
    newest = Checkpoints(run_dir / "checkpoints").newest()
    if newest is None:
        return f"starts again: {run_dir} has no checkpoint yet"
    return f"resumes after {describe_step(newest)} in {run_dir}"
