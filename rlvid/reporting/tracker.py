"""Writes a run's numbers to `metrics.jsonl` and to Weights & Biases.

`metrics.jsonl` is the record and Weights & Biases a copy of it, so its failures do not end the run: the first one is
logged, and all are counted (`Tracker.wandb_errors`, metric `wandb/errors`).
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
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

    def __init__(self, folder: RunFolder, cfg: RunConfig) -> None:
        self.wandb_errors = 0
        self._folder = folder
        rows = folder.read_metrics()
        self._start = monotonic() - (rows[-1].get("time_s", 0.0) if rows else 0.0)
        self._wandb_run: Any = None
        if cfg.wandb != "disabled":
            self._start_wandb(cfg)

    def log(self, step: int, metrics: Mapping[str, SupportsFloat], phase: str = "train") -> None:
        """Write one row: `step`, `time_s` (seconds of work since the run began), `phase` unless it is "train", metrics.

        Values are Python, numpy or torch scalars; those that are not finite are written as null.
        """
        row: dict[str, Any] = {"step": step, "time_s": round(monotonic() - self._start, 3)}
        if phase != "train":
            row["phase"] = phase
        row |= {key: float(value) for key, value in metrics.items()}
        if self.wandb_errors:
            row["wandb/errors"] = self.wandb_errors
        self._folder.append_metrics(row)
        if self._wandb_run is None:
            return
        prefix = "" if phase == "train" else f"{phase}/"  # steps of a phase are counted separately
        numbers = {prefix + key.removeprefix(prefix): value for key, value in row.items() if key != "phase"}
        with self._counting_errors("log"):
            self._wandb_run.log(numbers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Flush Weights & Biases."""
        if self._wandb_run is not None:
            with self._counting_errors("finish"):
                self._wandb_run.finish(exit_code=0 if error is None else 1)

    def _start_wandb(self, cfg: RunConfig) -> None:
        folder = self._folder.dir / "wandb"
        folder.mkdir(exist_ok=True)
        # wandb keeps a debug log in its cache folder, and there is no setting for that folder
        os.environ.setdefault("WANDB_CACHE_DIR", str((folder / "cache").resolve()))
        if "wandb_id" not in self._folder.manifest():
            self._folder.record(wandb_id=uuid.uuid4().hex[:8])
        if cfg.wandb == "online":
            with self._counting_errors("login"):
                self._wandb_run = self._init_wandb("online", cfg)
            if self.wandb_errors:
                later = folder / "offline-run-*"
                logger.error("Weights & Biases logs offline instead; upload it later with `wandb sync %s`", later)
        if self._wandb_run is None:
            with self._counting_errors("start"):
                self._wandb_run = self._init_wandb("offline", cfg)

    def _init_wandb(self, mode: str, cfg: RunConfig) -> Any:
        import wandb  # slow (most of a second), and not needed when disabled

        if self.wandb_errors:
            wandb.teardown()  # otherwise its service says that the run id "is in use" (wandb 0.31)
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
            project=cfg.project,
            name=self._folder.name,
            id=self._folder.manifest()["wandb_id"],
            resume="allow",
            mode=mode,
            config=self._folder.config(),
            settings=settings,
        )
        # Steps are logged as a metric: wandb's own counter must not decrease, and a resumed run repeats steps.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        run.define_metric("warm_start/step", hidden=True)
        run.define_metric("warm_start/*", step_metric="warm_start/step")
        return run

    @contextmanager
    def _counting_errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.wandb_errors += 1
            if self.wandb_errors == 1:
                first_line = (str(error) or type(error).__name__).splitlines()[0]
                logger.error("Weights & Biases %s failed, the run continues without it: %s", action, first_line)
