"""`rlvid dpo`: direct preference optimisation and its relatives (rlvid/algorithms/preference_loss.py).

Rafailov et al. 2023, arXiv 2305.18290; on videos LLaVA-Hound, arXiv 2404.01258. No engine: responses are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.supervised_plan import Plan
from actors.supervised_tasks import Preferred
from jobs.cli import job_main
from jobs.inputs import Inputs
from jobs.run import Run
from jobs.supervised import Metrics, Training, examples_of, train_job
from rlvid.config import DpoJobConfig
from rlvid.types import Preference

RESULT = {
    "accuracy_before": "eval/accuracy_before",
    "accuracy_after": "eval/accuracy",
    "loss": "loss",
    "margin": "rewards/margins",
}


def run(cfg: DpoJobConfig) -> dict[str, Any]:
    """Run or resume the job."""

    def task(inputs: Inputs) -> Preferred:
        reference = cfg.dpo.reference_path or inputs.model
        return Preferred(cfg.dpo, reference, reference == inputs.model, inputs.pairs)

    return train_job(cfg, "dpo", task, f"preferences ({cfg.dpo.loss})", RESULT)


def train_preferences(
    cfg: DpoJobConfig, run: Run, inputs: Inputs, model: Path, reference: Path, pairs: Sequence[Preference], out: Path
) -> Metrics:
    """Train the checkpoint `model` on `pairs` as a part of another job, and write it to `out`, whole; returns at once
    if that is done already. Checkpoints are beside `out`; an interrupted training resumes from the newest.

    Returns:
        The metrics of the last step.
    """
    task = Preferred(cfg.dpo, reference, reference == model, pairs)
    out = out.resolve()
    plan = Plan(cfg, task, model.resolve(), examples_of((), pairs), (), out.parent, out)
    return Training(run, inputs, plan).train(f"preferences ({cfg.dpo.loss})")


if __name__ == "__main__":
    job_main("dpo")
