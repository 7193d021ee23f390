"""The driver's side of a supervised training: logs and shows what the workers report. Shared by sft, dpo, reward-model
and the preference steps of isrt."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from actors.placement import plan as plan_slots
from actors.placement import require_room
from actors.supervised_plan import Plan, SupervisedTraining
from actors.supervised_tasks import Example, Task
from jobs.inputs import Inputs, open_job
from jobs.run import Run, check_resumable, how_to_resume
from rlvid.config import JobConfig
from rlvid.data.order import Strata
from rlvid.errors import UserError
from rlvid.files import write_atomic
from rlvid.types import Preference, Sample

METRICS_FILE = "training.json"  # beside the exported model: what `Training.train` returned
SHOWN_STEPS = 20  # metrics.jsonl has all
SHOWN_EVERY_S = 30.0

Metrics = dict[str, float]


def train_job(
    cfg: JobConfig,
    job: str,
    make_task: Callable[[Inputs], Task],
    phase: str,
    result: Mapping[str, str],
    keeps_media_together: bool = False,
) -> dict[str, Any]:
    """Run or resume a whole job: from the newest checkpoint of its run folder to `policy`, with every step logged.

    Args:
        result: names of the job's result, and the metrics that they show.
        keeps_media_together: examples about the same media follow each other in an epoch.

    Returns:
        The job's result.
    """
    with open_job(cfg, job) as (run, inputs):
        inputs.require_training_data()
        train = examples_of(inputs.train, inputs.pairs)
        held_out = examples_of(inputs.held_out, inputs.held_out_pairs)
        task, out = make_task(inputs), run.folder.dir.resolve() / "policy"
        if (best := cfg.evaluate.best) and not held_out:
            raise UserError(f"evaluate.best={best} needs held-out samples: give data.eval, or leave it out")
        run.resume_point()
        shown = held_out[: cfg.evaluate.max_samples]
        together = None
        if keeps_media_together:
            together = Strata.of([example.sample.media or example.sample.id for example in train])
        plan = Plan(cfg, task, inputs.model.resolve(), train, shown, out.parent, out, together=together)
        metrics = Training(run, inputs, plan, is_logged=True).train(phase)
        return {**results(metrics, result), **run.ending()}


def examples_of(samples: Sequence[Sample], pairs: Sequence[Preference]) -> tuple[Example, ...]:
    """The pairs of a manifest of preferences, or the answers of any other."""
    return tuple(map(Example.of_pair, pairs) if pairs else map(Example.of_answer, samples))


class Training:
    """One training, as the driver sees it.

    Args:
        is_logged: write the metrics of every step and evaluation into the run's.
    """

    def __init__(self, run: Run, inputs: Inputs, plan: Plan, is_logged: bool = False):
        self._run, self._inputs, self._is_logged = run, inputs, is_logged
        self._last: Metrics = {}
        evaluated = -1
        for row in run.folder.read_metrics() if is_logged else ():
            self._keep(row["step"], row, is_new=False)
            evaluated = max(evaluated, row["step"]) if "eval/n" in row else evaluated
        self._plan = replace(plan, evaluated=evaluated)
        self._done = 0
        self._shown_s = -math.inf

    def train(self, phase: str) -> Metrics:
        """Train and write the model to `plan.out`, whole; returns at once if that is done already.

        Raises:
            Interrupted: Ctrl-C.
        """
        plan, run = self._plan, self._run
        file = plan.out.with_name(f"{plan.out.name}.{METRICS_FILE}")
        if plan.out.exists() and file.exists():
            kept = json.loads(file.read_text())
            if kept["steps"] == plan.cfg.train.steps:
                return dict(kept["metrics"])
        newest = plan.checkpoints.newest()
        if newest is not None:
            check_resumable(newest, plan.cfg)
            self._done = newest.step
        require_room(plan_slots(plan.cfg, ("trainer",)), plan.cfg.placement)
        training = SupervisedTraining(plan)
        run.console.phase(phase, plan.cfg.train.steps, self._done)
        with run.interruptible(training.stop):
            for kind, content in training.events(run.state_of_parts):
                self._handle(kind, content)
        run.end_if_interrupted(how_to_resume(plan.folder))
        self._last["steps"] = self._done  # fewer than train.steps if it stopped early
        write_atomic(file, json.dumps({"steps": plan.cfg.train.steps, "metrics": self._last}))
        return self._last

    def _handle(self, kind: str, content: Any) -> None:
        if kind == "step":
            self._step(**content)
        elif kind == "evaluation":
            self._evaluation(**content)
        elif kind == "started":
            self._started(**content)
        elif kind == "set aside":
            self._inputs.clips.set_aside(*content)
            self._inputs.clips.check_bad_fraction()
        elif kind == "clips":
            self._inputs.clips.count(*content)
        elif kind == "stage":
            self._run.console.working(content)
        elif kind == "checkpoint":
            self._run.report()
        else:  # a note, or why a worker failed
            self._run.console.message(content)

    def _started(self, world: int, step: int) -> None:
        note = f"{world} worker{'s' * (world > 1)}"
        if step < self._done:
            note += f", from step {step}: steps {step + 1} to {self._done} are done again"
        self._run.console.message(note)

    def _step(self, step: int, **metrics: float) -> None:
        console = self._run.console
        if step <= self._done:  # after a worker failed
            console.working(f"step {step} again")
            return
        self._done = step
        if metrics.pop("is_left_out", None):
            console.message(f"step {step} is left out: a worker has no sample with readable clips")
            return
        metrics |= self._inputs.clip_metrics()
        self._keep(step, metrics)
        if is_shown(step, self._plan.cfg.train.steps, time.monotonic() - self._shown_s):
            console.step(step, metrics)
            self._shown_s = time.monotonic()
        else:
            console.working("training", step)

    def _evaluation(self, step: int, **metrics: float) -> None:
        if step <= self._plan.evaluated:  # after a worker failed
            return
        self._plan = replace(self._plan, evaluated=step)
        self._keep(step, metrics)
        self._run.console.evaluation(step, metrics)

    def _keep(self, step: int, metrics: Metrics, is_new: bool = True) -> None:
        """Remember the last value of each metric, and the first accuracy; write what is new."""
        if is_new and self._is_logged:
            self._run.log(step, metrics)
        self._last |= metrics
        if step == 0 and "eval/accuracy" in metrics:
            self._last["eval/accuracy_before"] = metrics["eval/accuracy"]


def is_shown(step: int, steps: int, silent_s: float) -> bool:
    """Whether a step gets a line: about SHOWN_STEPS of a training do, and one after each pause of SHOWN_EVERY_S."""
    return step % max(1, steps // SHOWN_STEPS) == 0 or step == steps or silent_s > SHOWN_EVERY_S


def results(metrics: Metrics, names: Mapping[str, str]) -> Metrics:
    """The metrics of a job's result, under their names there; those that the job does not have are left out. Those of
    evaluations are the last one's; `best` is of the model in `policy/`, with `evaluate.best`."""
    names = {**names, "best_step": "eval/best_step", "best": "eval/best", "steps": "steps"}
    return {key: metrics[name] for key, name in names.items() if name in metrics}
