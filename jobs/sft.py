"""`rlvid sft`: supervised fine-tuning on the manifest's answers."""

from __future__ import annotations

from typing import Any

from actors.supervised_tasks import Answers
from jobs.cli import job_main
from jobs.supervised import train_job
from rlvid.config import SftJobConfig
from rlvid.config.keys import check_paths

RESULT = {
    "loss": "loss",
    "eval_loss": "eval/loss",
    "accuracy_before": "eval/accuracy_before",
    "accuracy_after": "eval/accuracy",
}


def run(cfg: SftJobConfig) -> dict[str, Any]:
    """Run or resume the job, or each of its stages."""
    result: dict[str, Any] = {}
    model = cfg.model
    stages = [cfg.stage(n + 1) for n in range(len(cfg.stages))]
    for stage in stages:
        check_paths(stage)
    for number, stage in enumerate(stages, start=1):
        print(f"stage {number} of {len(cfg.stages)}", flush=True)
        stage = stage.model_copy(update={"model": model})
        result = train(stage)
        model = model.model_copy(update={"path": stage.run.dir / "policy", "tiny": None})
    return result or train(cfg)


def train(cfg: SftJobConfig) -> dict[str, Any]:
    return train_job(cfg, "sft", lambda inputs: Answers(cfg.sft), "supervised fine-tuning", RESULT, cfg.sft.share_media)


if __name__ == "__main__":
    job_main("sft")
