"""`rlvid reward-model`: train a model that scores videos, or answers to questions about them.

VideoScore (arXiv 2406.15252) as regression or as text, VideoScore2 (arXiv 2509.22799) as text, Bradley-Terry on pairs.
"""

from __future__ import annotations

from typing import Any

from actors.supervised_tasks import REWARD_MODELS
from jobs.cli import job_main
from jobs.supervised import train_job
from rlvid.config import RewardModelJobConfig
from rlvid.rewards.videoscore import Rubric

RESULT = {name: f"eval/{name}" for name in ("spearman", "accuracy", "unparsed", "n")}


def run(cfg: RewardModelJobConfig) -> dict[str, Any]:
    """Run or resume the job."""
    rubric = Rubric.of(cfg)
    task = REWARD_MODELS[rubric.kind](rubric)
    return train_job(cfg, "reward-model", lambda inputs: task, f"reward model ({rubric.kind})", RESULT)


if __name__ == "__main__":
    job_main("reward-model")
