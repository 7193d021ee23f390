"""`rlvid eval`: greedy answers to the held-out manifest; also the evaluations inside `rlvid grpo`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actors.batch import accuracy_part
from actors.clip_store import ClipStore
from actors.placement import roles_of
from actors.roles import Team
from jobs.cli import job_main
from jobs.session import Session
from rlvid.config import EvalJobConfig, JobConfig
from rlvid.errors import UserError
from rlvid.evaluation.metrics import accuracy_report
from rlvid.rollout.vllm_engine import Sampling
from rlvid.types import Sample

NO_ACCURACY_PART = "evaluation needs a reward part that says what is right: add one of kind exact, choice or number"


def evaluate(team: Team, clips: ClipStore, samples: Sequence[Sample], cfg: JobConfig) -> dict[str, float]:
    """Share of right greedy answers (sample-weighted, n given), over all and by problem type; mean length, tokens."""
    name = accuracy_part(cfg.rewards)
    if name is None:
        raise UserError(NO_ACCURACY_PART)
    samples = samples[: cfg.evaluate.max_samples]
    verdicts: list[bool | None] = []
    types: list[str | None] = []
    lengths: list[int] = []
    size = cfg.evaluate.batch_size
    pending = clips.submit(samples[:size])
    for at in range(0, len(samples), size):
        prompts = clips.collect(pending)
        pending = clips.submit(samples[at + size : at + 2 * size])
        answers = team.fleet.generate(prompts, Sampling(1, 0.0, cfg.rollout.max_tokens))
        marks = team.rewards([p.sample for p in prompts], answers)
        verdicts += [m[0].parts[name] == 1.0 if m[0].is_valid else None for m in marks]
        types += [p.sample.problem_type for p in prompts]
        lengths += [len(a[0].token_ids) for a in answers]
    missing = len(samples) - len(verdicts)  # bad clips: they count as not marked
    verdicts += [None] * missing
    types += [None] * missing
    if all(v is None for v in verdicts):
        raise UserError(f"none of the {len(samples)} held-out samples could be marked; see bad_clips.jsonl and rewards")
    metrics = accuracy_report(verdicts, types).as_metrics() | {"length": sum(lengths) / len(lengths)}
    return {f"eval/{key}": value for key, value in metrics.items()}


def run(cfg: EvalJobConfig) -> dict[str, Any]:
    """Evaluate `model.path` on `data.eval`; returns what the last line of stdout says."""
    with Session(cfg, "eval") as session:
        if not session.held_out:
            raise UserError("data.eval is empty: give a manifest of held-out samples")
        with Team(session.model, cfg, roles_of(cfg), session.folder.logs_dir, cfg.seed) as team:
            team.wait_ready()
            team.fleet.serve_checkpoint()
            tracker = session.open_tracker()
            metrics = evaluate(team, session.clips, session.held_out, cfg)
            tracker.log(0, metrics | session.clip_metrics())
            session.console.evaluation(0, metrics)
        return {
            "accuracy": metrics["eval/accuracy"],
            "n": int(metrics["eval/n"]),
            "report": str(session.folder.report_file),
        }


if __name__ == "__main__":
    job_main("eval")
