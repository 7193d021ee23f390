"""`rlvid tune`: Ray Tune over any job's config.

A trial is a process that runs the job as `rlvid <job>` does, with a run folder of its own, on the cluster of the sweep.
The trial's actor reads its metrics.jsonl. A trial can therefore do all that a job can, such as resume.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from actors.actor_process import start_ray
from jobs.cli import job_main
from jobs.inputs import make_data, make_model
from jobs.run import Interrupted
from jobs.specs import JOBS
from rlvid.config import JobConfig, SpaceConfig, TuneJobConfig
from rlvid.config.keys import check_paths
from rlvid.config.load import dump_config, load_config
from rlvid.errors import UserError
from rlvid.files import read_rows, write_atomic
from rlvid.reporting.checkpoints import Checkpoints
from rlvid.reporting.console import Console
from rlvid.reporting.report.sweep import TrialRow, write_sweep

STOP_TIMEOUT_S = 30.0  # for a job to write its checkpoint
POLL_S = 0.3
TUNE_DIR = "ray_tune"


@dataclass(frozen=True)
class Plan:
    """What every trial needs: the job, its config, the metric and the folder."""

    job: str
    config: Path
    overrides: tuple[str, ...]
    metric: str
    folder: Path  # folder of the sweep
    root: Path  # paths in the config are relative to it
    steps: int

    def run_dir(self, trial_id: str) -> Path:
        return self.folder / "trials" / trial_id

    def arguments(self, values: Mapping[str, Any], run_dir: Path) -> list[str]:
        """The overrides of a trial with these hyperparameters."""
        own = {**values, "run.dir": str(run_dir)}
        return [*self.overrides, *(f"{key}={json.dumps(value)}" for key, value in own.items())]

    def resolved(self, values: Mapping[str, Any], run_dir: Path) -> str:
        """The complete config of the job with these hyperparameters."""
        return dump_config(load_config(JOBS[self.job].config, self.config, self.arguments(values, run_dir)))

    def metric_rows(self, run_dir: Path) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl that have the metric."""
        return [row for row in read_rows(run_dir / "metrics.jsonl") if self.metric in row]


class Trial(tune.Trainable):
    """One job in a process of its own. A step of Tune ends with the next value of the metric."""

    def setup(self, config: Mapping[str, Any], plan: Plan) -> None:
        self._plan, self._values = plan, dict(config)
        self.run_dir = plan.run_dir(self.trial_id)
        self._process: subprocess.Popen[bytes] | None = None
        self._n_seen = 0
        self._last: dict[str, Any] = {}

    def step(self) -> dict[str, Any]:
        if self._process is None:
            self._process = self._start()
        while True:
            has_ended = self._process.poll() is not None
            rows = self._plan.metric_rows(self.run_dir)
            if len(rows) > self._n_seen:
                row = rows[self._n_seen]
                self._n_seen += 1
                has_diverged = not _is_finite(row[self._plan.metric])
                self._last = _numbers(row) | {tune.result.DONE: has_diverged}
                return self._last
            if has_ended:
                return self._end(self._process.returncode)
            time.sleep(POLL_S)

    def _end(self, code: int) -> dict[str, Any]:
        if code:
            lines = self._log.read_text(errors="replace").strip().splitlines()
            raise RuntimeError(f"{self.run_dir}: the job ended with {code}: {lines[-1] if lines else 'no message'}")
        if not self._last:
            raise RuntimeError(f"{self.run_dir}: metrics.jsonl has no {self._plan.metric}; see metric in the config")
        return self._last | {tune.result.DONE: True}

    @property
    def _log(self) -> Path:
        return self._plan.run_dir(f"{self.trial_id}.log")

    def _start(self) -> subprocess.Popen[bytes]:
        plan, module = self._plan, JOBS[self._plan.job].module
        arguments = plan.arguments(self._values, self.run_dir)
        environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", module, "--config", str(plan.config), *arguments],
                cwd=plan.root,
                env=environment,
                stdout=log,
                stderr=log,
                preexec_fn=_end_with_parent,
            )

    def cleanup(self) -> None:
        """Stop the job's process, if it is running. Tune calls this when a trial was stopped or has ended."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Copy the run folder with its newest checkpoint, for population based training."""
        checkpoints = Checkpoints(self.run_dir / "checkpoints")
        while not (newest := checkpoints.newest()) or newest.step < self._last["step"]:
            if self._process is None or self._process.poll() is not None:
                break
            time.sleep(POLL_S)
        copy = Path(checkpoint_dir) / "run"
        shutil.copytree(self.run_dir, copy, ignore=shutil.ignore_patterns("*.tmp", "wandb", ".lock", "ray_train"))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Replace the run folder by that of another trial, with the hyperparameters of this one."""
        shutil.rmtree(self.run_dir, ignore_errors=True)
        shutil.copytree(Path(checkpoint_dir) / "run", self.run_dir)
        config = self._plan.resolved(self._values, self.run_dir)
        (self.run_dir / "config.yaml").write_text(config, encoding="utf-8")
        rows = self._plan.metric_rows(self.run_dir)
        self._n_seen = len(rows)
        if rows:  # a run that is resumed at its last step writes no further value
            self._last = _numbers(rows[-1])


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a row of metrics, which are reported to Tune."""
    return {k: v for k, v in row.items() if isinstance(v, int | float)} | {"step": int(row["step"])}


def _is_finite(value: float | None) -> bool:
    """A number that is not finite is null in metrics.jsonl."""
    return value is not None and math.isfinite(value)


def _end_with_parent() -> None:
    """Called in the new process: the kernel ends it when the trial's actor ends, also by kill -9 (Linux only)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def run(cfg: TuneJobConfig) -> dict[str, Any]:
    """Run or resume the sweep.

    Raises:
        Interrupted: Ctrl-C.
        UserError: no trial has finished.
    """
    folder = cfg.dir.resolve()
    base = _load_base(cfg)
    began_s = time.monotonic()
    _write_config(folder, cfg)
    console = Console()
    overrides = (*cfg.overrides, *_make_shared(folder, cfg, base, console))
    plan = Plan(cfg.job, cfg.config.resolve(), overrides, cfg.metric, folder, Path.cwd(), base.last_step)
    start_ray()
    try:
        with console, _stopping_tune(console, folder):
            results = _tuner(cfg, plan, console).fit()
        rows = [_row(plan, result) for result in results]
    finally:
        ray.shutdown()
    finished = [row for row in rows if row.value is not None and row.error is None]
    if not finished:
        first = next((row.error for row in rows if row.error), f"metrics.jsonl has no {cfg.metric}")
        raise UserError(f"none of the {len(rows)} trials has finished: {first}; see {folder / 'trials'}")
    best = (max if cfg.mode == "max" else min)(finished, key=lambda row: row.value or 0.0)
    best_file = folder / "best.yaml"
    write_atomic(best_file, plan.resolved(best.values, base.run.dir))  # with the run folder of the job's own config
    page = write_sweep(folder / "sweep.html", cfg, rows, best)
    return {
        "best": best.values,
        "value": best.value,
        "trials": len(rows),
        "stopped_early": sum(row.is_stopped for row in rows),
        "failed": sum(row.error is not None for row in rows),
        "config": str(best_file),
        "seconds": round(time.monotonic() - began_s, 1),
        "report": str(page),
    }


@contextmanager
def _stopping_tune(console: Console, folder: Path) -> Iterator[None]:
    """On the first Ctrl-C, let Tune stop and save its state; on the second, stop at once.

    Raises:
        Interrupted: Tune has stopped after a Ctrl-C.
    """
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # with it, Tune returns as if all trials had ended
    is_stopping = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        if is_stopping:
            raise KeyboardInterrupt
        is_stopping = True
        console.message("stopping the trials after they write checkpoints; press Ctrl-C again to stop at once")
        os.kill(os.getpid(), signal.SIGUSR1)  # Tune saves its state and stops at this signal

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if is_stopping:
        raise Interrupted(f"resumes the sweep in {folder}")


def _load_base(cfg: TuneJobConfig) -> JobConfig:
    """Load the job's config without the searched values, and check the keys of the search space.

    Raises:
        UserError: the config is not valid, or a searched key or its first value is not.
    """
    config_class = JOBS[cfg.job].config
    for key, space in cfg.space.items():  # an unknown key is an error that names the nearest one
        ((first, *_),) = space.given.values()
        load_config(config_class, cfg.config, [*cfg.overrides, f"{key}={json.dumps(first)}"])
    base: JobConfig = load_config(config_class, cfg.config, list(cfg.overrides))
    check_paths(base)
    return base


def describe(cfg: TuneJobConfig) -> list[str]:
    """Check the job's config and the search space; return lines for `--dry-run`."""
    base = _load_base(cfg)
    lines = [f"{key}: {space.model_dump_json(exclude_none=True)}" for key, space in cfg.space.items()]
    return [f"{cfg.trials} trials of rlvid {cfg.job}", *lines, *JOBS[cfg.job].describe(base, JOBS[cfg.job])]


def _write_config(folder: Path, cfg: TuneJobConfig) -> None:
    """Write config.yaml of the sweep.

    Raises:
        UserError: the folder has another sweep.
    """
    file, text = folder / "config.yaml", dump_config(cfg)
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise UserError(f"{folder} has a sweep with another config ({file}): give another dir, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def _make_shared(folder: Path, cfg: TuneJobConfig, base: JobConfig, console: Console) -> tuple[str, ...]:
    """Make the synthetic data and the tiny model once for all trials; return the overrides that name them."""
    data, spec = base.data, JOBS[cfg.job]
    if data.train is not None or data.synthetic is None or any(key.startswith("data.") for key in cfg.space):
        return ()
    train, held_out = make_data(base, spec, folder / "data", console)
    overrides = [f"data.train={train}", *([] if data.eval else [f"data.eval={held_out}"])]
    is_searched = any(key == "seed" or key.startswith("model.") for key in cfg.space)
    if base.model.path is None and not is_searched:
        rows = spec.load(base).read(train, data)
        make_model(base, folder / "model", rows.samples, rows.pairs, console)
        overrides.append(f"model.path={folder / 'model'}")
    return tuple(overrides)


def _tuner(cfg: TuneJobConfig, plan: Plan, console: Console) -> tune.Tuner:
    """Return a tuner for a new sweep, or for the interrupted sweep in the folder."""
    trainable = tune.with_resources(tune.with_parameters(Trial, plan=plan), {"CPU": 0.01})
    path = plan.folder / TUNE_DIR / "sweep"
    if tune.Tuner.can_restore(str(path)):
        console.message(f"resuming the sweep in {plan.folder}")
        return tune.Tuner.restore(str(path), trainable=trainable, resume_unfinished=True, restart_errored=True)
    space = {key: _domain(s) for key, s in cfg.space.items()}
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=cfg.metric,
            mode=cfg.mode,
            num_samples=cfg.trials,
            max_concurrent_trials=cfg.parallel if cfg.search == "random" else None,
            search_alg=_searcher(cfg),
            scheduler=_scheduler(cfg, plan, space),
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name="sweep", storage_path=str(plan.folder / TUNE_DIR), verbose=0, callbacks=[_Progress(cfg.metric)]
        ),
    )


def _domain(space: SpaceConfig) -> Any:
    """Tune's object for a distribution: keys of the config have the names of Tune's functions, but for `grid`."""
    ((name, value),) = space.given.items()
    if name == "grid":
        return tune.grid_search(list(value))
    return tune.choice(list(value)) if name == "choice" else getattr(tune, name)(*value)


def _searcher(cfg: TuneJobConfig) -> Searcher | None:
    if cfg.search == "optuna":
        return ConcurrencyLimiter(OptunaSearch(metric=cfg.metric, mode=cfg.mode, seed=cfg.seed), cfg.parallel)
    return BasicVariantGenerator(random_state=cfg.seed, max_concurrent=cfg.parallel)


def _scheduler(cfg: TuneJobConfig, plan: Plan, space: Mapping[str, Any]) -> TrialScheduler | None:
    if cfg.scheduler == "asha":
        # One more than the last step: after the last one, the job still has to write its policy.
        return ASHAScheduler(
            time_attr="step",
            max_t=max(plan.steps, cfg.grace_steps) + 1,
            grace_period=cfg.grace_steps,
            reduction_factor=cfg.reduction_factor,
        )
    if cfg.scheduler == "pbt":
        return PopulationBasedTraining(
            time_attr="step",
            perturbation_interval=cfg.grace_steps,
            hyperparam_mutations=dict(space),
            synch=False,
        )
    return None


class _Progress(tune.Callback):
    """Prints a line when a trial begins, reports a value or fails. Tune pickles it, so it holds no console."""

    def __init__(self, metric: str):
        self._metric = metric
        self._shown: dict[str, int] = {}  # trial -> step that was printed last

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        values = ", ".join(f"{key}={_short(value)}" for key, value in trial.config.items())
        Console().message(f"trial {trial.trial_id}: {values}")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        name, step = trial.trial_id, result["step"]
        if self._shown.get(name) != step:  # Tune reports the last result again at the end of a trial
            self._shown[name] = step
            Console().message(f"trial {name}: {self._metric} {_short(result[self._metric])} at step {step}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        Console().message(f"trial {trial.trial_id} failed; see {trial.trial_id}.log")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _row(plan: Plan, result: Any) -> TrialRow:
    """Read a trial's result and curve from its run folder, up to the step at which Tune stopped it.

    The job may have done further steps until it stopped.
    """
    metrics = result.metrics or {}
    end = int(metrics.get("step", plan.steps))
    trial_id = Path(result.path).name
    values = [(row["step"], row[plan.metric]) for row in plan.metric_rows(plan.run_dir(trial_id))]
    curve = tuple((int(step), float(value)) for step, value in values if step <= end and _is_finite(value))
    return TrialRow(
        trial_id=trial_id,
        values=dict(result.config or {}),
        value=curve[-1][1] if curve else None,
        step=curve[-1][0] if curve else 0,
        curve=curve,
        is_stopped=result.error is None and (not curve or curve[-1][0] < plan.steps),
        error=str(result.error).strip().splitlines()[-1] if result.error else None,
        seconds=float(metrics.get("time_total_s", 0.0)),
    )


if __name__ == "__main__":
    job_main("tune")
