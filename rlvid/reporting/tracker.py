"""Writes a run's numbers to `metrics.jsonl` and to Weights & Biases.

`metrics.jsonl` is the record and Weights & Biases a copy of it, so its failures do not end the run: the first one is
logged, and all are counted (`Tracker.wandb_errors`, metric `wandb/errors`).
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Self, SupportsFloat

from rlvid.config import RunConfig
from rlvid.reporting.run_folder import RunFolder

logger = logging.getLogger(__name__)

# With wandb 0.31, an unreachable server blocks `init` for all of init_timeout (measured; default 90 s), and `finish`
# waits for uploads without a limit unless finish_timeout is set.
_CONNECT_TIMEOUT_S = 30.0
_FINISH_TIMEOUT_S = 60.0


class Tracker:
    """Writes one row per step. Make it after `RunFolder.rewind`: its clock continues from the last row of the file."""

    def __init__(
        self,
        folder: RunFolder,
        run_cfg: RunConfig,
        config_dict: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.wandb_errors = 0
        self._folder = folder
        self._clock = clock
        rows = folder.read_metrics()
        self._start = clock() - (float(rows[-1].get("time_s") or 0.0) if rows else 0.0)
        self._wandb_run: Any = None
        if run_cfg.wandb != "disabled":
            self._start_wandb(run_cfg, config_dict)

    def log(self, step: int, metrics: Mapping[str, SupportsFloat], phase: str = "train") -> None:
        """Write one row: `step`, `time_s` (seconds of work since the run began), `phase` unless it is "train", metrics.

        Values are Python, numpy or torch scalars; those that are not finite are written as null.
        """
        row: dict[str, Any] = {"step": step, "time_s": round(self._clock() - self._start, 3)}
        if phase != "train":
            row["phase"] = phase
        row |= {key: float(value) for key, value in metrics.items()}
        if self.wandb_errors:
            row["wandb/errors"] = self.wandb_errors
        self._folder.append_metrics(row)
        if self._wandb_run is None:
            return
        numbers = {key: value for key, value in row.items() if key not in ("step", "phase")}
        if phase == "train":
            numbers["step"] = step
        else:  # steps of a phase are counted separately
            numbers = {key if key.startswith(f"{phase}/") else f"{phase}/{key}": v for key, v in numbers.items()}
            numbers[f"{phase}/step"] = step
        try:
            self._wandb_run.log(numbers)
        except Exception as error:
            self._count_wandb_error("log", error)

    def close(self, exit_code: int = 0) -> None:
        """Flush Weights & Biases. A second call does nothing."""
        run, self._wandb_run = self._wandb_run, None
        if run is None:
            return
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            self._count_wandb_error("finish", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(exit_code=0 if error is None else 1)

    def _start_wandb(self, run_cfg: RunConfig, config_dict: Mapping[str, Any]) -> None:
        run_id = self._folder.manifest().get("wandb_id")
        if run_id is None:
            run_id = uuid.uuid4().hex[:8]
            self._folder.record(wandb_id=run_id)
        (self._folder.dir / "wandb").mkdir(exist_ok=True)
        # wandb keeps a debug log in its cache folder, and there is no setting for that folder
        os.environ.setdefault("WANDB_CACHE_DIR", str((self._folder.dir / "wandb" / "cache").resolve()))
        if run_cfg.wandb == "online":
            try:
                self._wandb_run = self._init_wandb("online", run_cfg, run_id, config_dict)
                return
            except Exception as error:
                self._count_wandb_error("login", error)
                logger.error(
                    "Weights & Biases logs offline instead; upload it later with `wandb sync %s`",
                    self._folder.dir / "wandb" / "offline-run-*",
                )
                self._reset_wandb()
        try:
            self._wandb_run = self._init_wandb("offline", run_cfg, run_id, config_dict)
        except Exception as error:
            self._count_wandb_error("start", error)

    def _reset_wandb(self) -> None:
        import wandb

        try:
            wandb.teardown()  # otherwise its service says that the run id "is in use" (wandb 0.31)
        except Exception as error:
            self._count_wandb_error("teardown", error)

    def _init_wandb(self, mode: str, run_cfg: RunConfig, run_id: str, config_dict: Mapping[str, Any]) -> Any:
        import wandb  # slow (most of a second), and not needed when disabled

        settings = wandb.Settings(
            silent=True,
            console="off",  # it would wrap stdout, where the run prints its progress
            disable_git=True,  # run.json has the commit
            disable_job_creation=True,
            save_code=False,
            symlink=False,
            x_disable_stats=mode == "offline",
            x_disable_machine_info=mode == "offline",
            init_timeout=_CONNECT_TIMEOUT_S,
            login_timeout=_CONNECT_TIMEOUT_S,
            finish_timeout=_FINISH_TIMEOUT_S,
        )
        # Otherwise `login` prints where it found the key, and `init` advertises a product if openai has been imported.
        wandb.setup(settings=wandb.Settings(silent=True))
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key: run `wandb login` or set WANDB_API_KEY")
        run = wandb.init(
            dir=str(self._folder.dir),
            project=run_cfg.project,
            name=self._folder.name,
            id=run_id,
            resume="allow",
            mode=mode,
            config=dict(config_dict),
            settings=settings,
        )
        # Steps are logged as a metric: wandb's own counter must not decrease, and a resumed run repeats steps.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        run.define_metric("warm_start/step", hidden=True)
        run.define_metric("warm_start/*", step_metric="warm_start/step")
        return run

    def _count_wandb_error(self, action: str, error: Exception) -> None:
        self.wandb_errors += 1
        if self.wandb_errors == 1:
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            logger.error("Weights & Biases %s failed, the run continues without it: %s", action, first_line)
