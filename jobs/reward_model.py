"""`rlvid reward-model`: train a model that scores videos, or answers to questions about them.

VideoScore (arXiv 2406.15252) as regression or as text, VideoScore2 (arXiv 2509.22799) as text, Bradley-Terry on pairs.
"""

from __future__ import annotations

from typing import Any

from actors.supervised_tasks import REWARD_MODELS, Example
from jobs.cli import job_main
from jobs.inputs import open_job
from jobs.supervised import results, train_job
from rlvid.config import RewardModelJobConfig
from rlvid.rewards.videoscore import Rubric

RESULT = {name: f"eval/{name}" for name in ("spearman", "accuracy", "unparsed", "n")}


def run(cfg: RewardModelJobConfig) -> dict[str, Any]:
    """Run or resume the job."""
    with open_job(cfg, "reward-model") as (run, inputs):
        inputs.require_training_data()
        rubric = Rubric.of(cfg)
        if rubric.kind == "bradley_terry":
            train, held_out = ([Example.of_pair(p) for p in ps] for ps in (inputs.pairs, inputs.held_out_pairs))
        else:
            train, held_out = ([Example.of_answer(s) for s in ss] for ss in (inputs.train, inputs.held_out))
        task = REWARD_MODELS[rubric.kind](rubric)
        metrics = train_job(run, inputs, task, train, held_out, f"reward model ({rubric.kind})")
        return {**results(metrics, RESULT), **run.ending()}


if __name__ == "__main__":
    job_main("reward-model")
