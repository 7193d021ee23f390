"""`rlvid grpo`: group relative policy optimisation and its relatives, after an optional supervised warm start.

DeepSeekMath, arXiv 2402.03300; the others are named at `grpo.variant`.
"""

from __future__ import annotations

from typing import Any

from jobs.cli import job_main
from jobs.policy_gradient import run_policy_gradient
from rlvid.config import GrpoJobConfig


def run(cfg: GrpoJobConfig, only_rollouts: bool = False) -> dict[str, Any]:
    """Run or resume the job."""
    return run_policy_gradient(cfg, "grpo", only_rollouts)


if __name__ == "__main__":
    job_main("grpo")
