"""`rlvid ppo`: proximal policy optimisation with a critic, after an optional supervised warm start.

Schulman et al. 2017, arXiv 1707.06347.
"""

from __future__ import annotations

from typing import Any

from jobs.cli import job_main
from jobs.policy_gradient import run_policy_gradient
from rlvid.config import PpoJobConfig


def run(cfg: PpoJobConfig, only_rollouts: bool = False) -> dict[str, Any]:
    """Run or resume the job."""
    return run_policy_gradient(cfg, "ppo", only_rollouts)


if __name__ == "__main__":
    job_main("ppo")
