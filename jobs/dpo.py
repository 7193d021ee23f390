"""`rlvid dpo`: direct preference optimisation and its relatives (rlvid/algorithms/preference_loss.py).

Rafailov et al. 2023, arXiv 2305.18290; on videos LLaVA-Hound, arXiv 2404.01258. No engine: responses are given.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.placement import plan as plan_slots
from actors.placement import require_room
from actors.supervised_plan import PreferencePlan
from actors.supervised_worker import PreferenceTraining
from jobs.cli import job_main
from jobs.inputs import Inputs, open_job
from jobs.run import Run, how_to_resume
from jobs.specs import JOBS
from rlvid.config import DpoJobConfig
from rlvid.files import write_atomic
from rlvid.types import Preference

METRICS_FILE = "training.json"  # beside the exported policy: what `train_preferences` returned


def run(cfg: DpoJobConfig) -> dict[str, Any]:
    """Run or take up the job; returns what the last line of stdout says."""
    with open_job(cfg, "dpo") as (run, inputs):
        inputs.require_training_data()
        newest = run.folder.checkpoints.newest()
        run.folder.rewind(newest.step if newest else None)
        reference = cfg.dpo.reference_path or inputs.model
        out = run.folder.dir / "policy"
        last = train_preferences(
            cfg, run, inputs, inputs.model, reference, inputs.pairs, out, inputs.held_out_pairs, is_logged=True
        )
        return {
            **{key: last[name] for key, name in RESULT.items() if name in last},
            "steps": cfg.train.steps,
            **run.ending(),
        }


RESULT = {
    "accuracy_before": "eval/accuracy_before",
    "accuracy_after": "eval/accuracy",
    "loss": "loss",
    "margin": "rewards/margins",
}


def train_preferences(
    cfg: DpoJobConfig,
    run: Run,
    inputs: Inputs,
    model: Path,
    reference: Path,
    pairs: Sequence[Preference],
    out: Path,
    held_out: Sequence[Preference] = (),
    is_logged: bool = False,
) -> dict[str, float]:
    """Train the checkpoint `model` on `pairs` and write it to `out`, whole; at once if it is there already.

    Checkpoints lie beside `out`, and an interrupted training goes on from the newest.

    Args:
        is_logged: write every step's metrics into the run's.

    Returns:
        The metrics of the last step and the last evaluation.
    """
    metrics_file = out.with_name(f"{out.name}.{METRICS_FILE}")
    if out.exists() and metrics_file.exists():
        return dict(json.loads(metrics_file.read_text()))
    plan = PreferencePlan(
        cfg=cfg,
        model=model.resolve(),
        reference=reference.resolve(),
        pairs=tuple(pairs),
        held_out=tuple(held_out[: cfg.evaluate.max_samples]),
        folder=out.parent.resolve(),
        out=out.resolve(),
    )
    require_room(plan_slots(cfg, JOBS["dpo"].roles(cfg)), cfg.placement)
    training = PreferenceTraining(plan)
    run.console.phase(f"preferences ({cfg.dpo.loss})", cfg.train.steps, 0)
    last: dict[str, float] = {}
    logged = run.folder.read_metrics() if is_logged else []
    done, evaluated = 0, max((row["step"] for row in logged if "eval/accuracy" in row), default=-1)
    with run.interruptible(training.stop):
        for kind, content in training.events():
            if kind == "started":
                note = f"{content['world']} workers, after step {content['step']}"
                run.console.message(note if content["step"] or done else note.removesuffix(", after step 0"))
                done = max(done, content["step"])
            elif kind == "step":
                step = content.pop("step")
                if step <= done:  # done again, after a worker failed
                    continue
                done = step
                if content.pop("is_left_out", None):
                    run.console.message(f"step {step} is left out: a worker has no pair with readable clips")
                    continue
                last |= content
                metrics = content | inputs.clip_metrics()
                if is_logged:
                    run.log(step, metrics)
                run.console.step(step, metrics)
            elif kind == "evaluation":
                step = content.pop("step")
                last |= {"eval/accuracy_before": content["eval/accuracy"]} if step == 0 else {}
                last |= content
                if step <= evaluated:  # done again, as above
                    continue
                evaluated = step
                if is_logged:
                    run.log(step, content)
                run.console.evaluation(step, content)
            elif kind == "bad clip":
                inputs.clips.set_aside(*content)
                inputs.clips.refuse_many_bad()
            elif kind == "clips":
                inputs.clips.count(*content)
            elif kind == "note":
                run.console.message(content)
    run.end_if_interrupted(how_to_resume(plan.folder))
    write_atomic(metrics_file, json.dumps(last))
    return last


if __name__ == "__main__":
    job_main("dpo")
