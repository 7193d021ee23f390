"""`rlvid dpo`: direct preference optimisation and its relatives (rlvid/algorithms/preference_loss.py).

Rafailov et al. 2023, arXiv 2305.18290; on videos LLaVA-Hound, arXiv 2404.01258. No engine: responses are given.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.placement import plan as plan_slots
from actors.placement import require_room, roles_of
from actors.supervised_plan import PreferencePlan
from actors.supervised_worker import PreferenceTraining
from jobs.cli import job_main
from jobs.session import Session
from rlvid.config import DpoJobConfig
from rlvid.reporting.tracker import Tracker
from rlvid.types import Preference

METRICS_FILE = "training.json"  # beside the exported policy: what `train_preferences` returned


def run(cfg: DpoJobConfig) -> dict[str, Any]:
    """Run or take up the job; returns what the last line of stdout says."""
    with Session(cfg, "dpo") as session:
        session.require_training_data()
        newest = session.folder.checkpoints.newest()
        session.folder.rewind(newest.step if newest else None)
        tracker = session.open_tracker()
        reference = cfg.dpo.reference_path or session.model
        out = session.folder.dir / "policy"
        last = train_preferences(
            cfg, session, session.model, reference, session.pairs, out, session.held_out_pairs, tracker
        )
        return {
            **{key: last[name] for key, name in RESULT.items() if name in last},
            "steps": cfg.train.steps,
            **session.ending(),
        }


RESULT = {
    "accuracy_before": "eval/accuracy_before",
    "accuracy_after": "eval/accuracy",
    "loss": "loss",
    "margin": "rewards/margins",
}


def train_preferences(
    cfg: DpoJobConfig,
    session: Session,
    model: Path,
    reference: Path,
    pairs: Sequence[Preference],
    out: Path,
    held_out: Sequence[Preference] = (),
    tracker: Tracker | None = None,
) -> dict[str, float]:
    """Train the checkpoint `model` on `pairs` and write it to `out`, whole; at once if it is there already.

    Checkpoints lie beside `out`, and an interrupted training goes on from the newest.

    Args:
        tracker: gets every step's metrics.

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
    require_room(plan_slots(cfg, roles_of(cfg)), cfg.placement)
    training = PreferenceTraining(plan)
    session.console.phase(f"preferences ({cfg.dpo.loss})", cfg.train.steps, 0)
    last: dict[str, float] = {}
    logged = session.folder.read_metrics() if tracker else []
    done, evaluated = 0, max((row["step"] for row in logged if "eval/accuracy" in row), default=-1)
    with session.interruptible(training.stop):
        for kind, content in training.events():
            if kind == "started":
                note = f"{content['world']} workers, after step {content['step']}"
                session.console.message(note if content["step"] or done else note.removesuffix(", after step 0"))
                done = max(done, content["step"])
            elif kind == "step":
                step = content.pop("step")
                if step <= done:  # done again, after a worker failed
                    continue
                done = step
                if content.pop("is_left_out", None):
                    session.console.message(f"step {step} is left out: a worker has no pair with readable clips")
                    continue
                last |= content
                metrics = content | session.clip_metrics()
                if tracker:
                    tracker.log(step, metrics)
                session.console.step(step, metrics)
            elif kind == "evaluation":
                step = content.pop("step")
                last |= {"eval/accuracy_before": content["eval/accuracy"]} if step == 0 else {}
                last |= content
                if step <= evaluated:  # done again, as above
                    continue
                evaluated = step
                if tracker:
                    tracker.log(step, content)
                session.console.evaluation(step, content)
            elif kind == "bad clip":
                session.clips.set_aside(*content)
                session.clips.refuse_many_bad()
            elif kind == "clips":
                session.clips.count(*content)
            elif kind == "note":
                session.console.message(content)
    session.end_if_interrupted(plan.checkpoints)
    part = metrics_file.with_suffix(".part")
    part.write_text(json.dumps(last))
    part.replace(metrics_file)
    return last


if __name__ == "__main__":
    job_main("dpo")
