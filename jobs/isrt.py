"""`rlvid isrt`: iterative self-retrospective judgement (i-SRT, arXiv 2406.11280, also ISR-DPO, AAAI 2025).

In each iteration the model describes each video, gives two answers, judges them with its description, and is trained on
its verdicts by DPO. What the paper does not specify is an option (`isrt` in the config). Every stage writes a file of
rows under `iterations/NN`, and its samples depend only on seed, iteration, stage and sample id. A run that was killed
therefore resumes at the first missing row and makes the same pairs.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from actors.judge import Comparison, Judge, Judged, open_judge
from actors.judge_endpoint import probe_endpoint
from actors.roles import Roles
from jobs.cli import job_main
from jobs.dpo import train_preferences
from jobs.evaluate import evaluate, generators
from jobs.inputs import Inputs, open_job
from jobs.run import Run
from jobs.warm_start import warm_start
from rlvid.config import IsrtJobConfig
from rlvid.data.order import batch_indices
from rlvid.data.preferences import pair_row
from rlvid.errors import UserError
from rlvid.evaluation.metrics import mean
from rlvid.files import RowFile, write_rows
from rlvid.rewards.answers import normalise
from rlvid.rewards.judge_prompts import DESCRIBE, REFINE, TIMED_OUT, describe_prompt, with_context
from rlvid.rewards.part import Group, Response, combine, score_rules
from rlvid.rewards.rules import make_parts
from rlvid.rollout.engine import Sampling
from rlvid.types import Medium, Preference, Rollout, Sample

Row = Mapping[str, Any]
MakeRows = Callable[[Sequence[Sample]], Sequence[Row]]


def run(cfg: IsrtJobConfig, only_data: bool = False) -> dict[str, Any]:
    """Run or resume the job.

    Args:
        only_data: make the preference pairs of the first iteration and stop before its DPO.
    """
    if cfg.isrt.judge.backend == "endpoint":
        probe_endpoint(cfg.isrt.judge, print)  # before anything is made
    with open_job(cfg, "isrt") as (run, inputs):
        inputs.require_training_data()
        model = reference = first_model(cfg, run, inputs)
        for number in range(1, cfg.isrt.iterations + 1):
            iteration = Iteration(cfg, run, inputs, number)
            pairs = iteration.pairs(model)
            if not pairs:
                raise UserError(why_no_pair(iteration))
            if only_data:
                return {"pairs": len(pairs), **metrics_of(iteration), "file": str(iteration.file("pairs"))}
            run.console.message(f"iteration {number}: DPO on {len(pairs)} pairs")
            start = model if cfg.isrt.reference == "iteration_start" else reference
            out = iteration.folder / "model"
            stats = train_preferences(cfg.dpo_job(number, len(pairs)), run, inputs, model, start, pairs, out)
            shutil.rmtree(iteration.folder / "checkpoints", ignore_errors=True)  # `out` is complete
            if number not in run.logged("pairs/kept"):
                run.log(number, metrics_of(iteration) | renamed(stats) | inputs.clip_metrics() | run.take_times())
            model = out
        with generators(run, model) as roles:
            evaluate_once(run, inputs, roles, cfg.isrt.iterations)
        policy = run.folder.dir / "policy"
        policy.unlink(missing_ok=True)
        policy.symlink_to(model.relative_to(run.folder.dir))
        return result_of(run, cfg.isrt.iterations) | run.ending()


def first_model(cfg: IsrtJobConfig, run: Run, inputs: Inputs) -> Path:
    """Return the checkpoint for the first iteration: `model`, after the warm start if there is one."""
    sft = run.folder.dir / "sft"
    if not cfg.warm_start.steps:
        return inputs.model
    if sft.exists():
        return sft
    with Roles(inputs.model, cfg, ("trainer",), run.folder.logs_dir) as roles:
        roles.wait_ready()
        run.resume(roles.trainer)
        warm_start(run, inputs, roles.trainer, cfg.warm_start)
        part = sft.with_name("sft.part")
        shutil.rmtree(part, ignore_errors=True)
        roles.trainer.export(part.resolve())
        part.rename(sft)
    return sft


class Iteration:
    """Makes the data of one iteration: contexts, responses, judgements, pairs, each a file of rows by sample id."""

    def __init__(self, cfg: IsrtJobConfig, run: Run, inputs: Inputs, number: int):
        self.cfg, self.run, self.inputs, self.number = cfg, run, inputs, number
        self.folder = run.folder.iteration_dir(number)
        self.samples = prompts_of(cfg, inputs.train, number)
        self.contexts, self.responses, self.judgements = (
            RowFile(self.file(name)) for name in ("contexts", "responses", "judgements")
        )

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def pairs(self, model: Path) -> list[Preference]:
        """Return the preference pairs, after evaluating `model` and making the missing rows with it."""
        has_pairs = self.file("pairs").exists()
        if not has_pairs or self.number - 1 not in self.run.logged("eval/n"):
            with generators(self.run, model) as roles:
                evaluate_once(self.run, self.inputs, roles, self.number - 1)
                if not has_pairs:
                    self._make(model, roles)
        pairs = self._pairs()
        if not has_pairs:
            write_rows(self.file("pairs"), (pair_row(pair) for pair in pairs))
        return pairs

    def _make(self, model: Path, roles: Roles) -> None:
        cfg, run = self.cfg, self.run
        run.console.message(f"iteration {self.number}: {len(self.samples)} prompts")
        if cfg.isrt.context != "none":
            earlier = self._earlier_contexts()
            videos = list({s.media: s for s in reversed(self.samples) if s.media}.values())[::-1]
            self._in_chunks(self.contexts, videos, lambda chunk: self._describe(roles, chunk, earlier), "contexts")
        contexts = self._contexts()
        self._in_chunks(self.responses, self.samples, lambda chunk: self._respond(roles, chunk, contexts), "responses")
        both = [s for s in self.samples if s.id in self.responses and len(self.responses[s.id]["responses"]) == 2]
        if len(both) == len([s for s in both if s.id in self.judgements]):
            return
        cache = RowFile(run.folder.judge_cache_file, key="key")
        clips, seed = self.inputs.clips, self.seed("judgements")
        with open_judge(cfg.isrt.judge, roles, clips, cache, seed, model) as judge:
            judge.counters.update(row["state"] for row in self.judgements)
            self._in_chunks(self.judgements, both, lambda chunk: self._judge(judge, chunk, contexts), "judgements")

    def _in_chunks(self, rows: RowFile, samples: Sequence[Sample], make: MakeRows, stage: str) -> None:
        """Make the missing rows and write them chunk by chunk. A sample with a bad clip gets no row."""
        todo = [s for s in samples if s.id not in rows]
        size = self.cfg.isrt.chunk_size
        for i in self.run.steps(0, -(-len(todo) // size)):
            with self.run.stage(stage):
                rows.append(make(todo[i * size : (i + 1) * size]))
        self.run.end_if_interrupted(f"resumes in iteration {self.number}, within the {stage}")

    def _describe(self, roles: Roles, chunk: Sequence[Sample], earlier: Mapping[tuple[Medium, ...], str]) -> list[Row]:
        """Describe videos: context c_t from the video and c_(t-1)."""
        isrt = self.cfg.isrt
        ids = {f"{s.id}#context": s for s in chunk}
        prompts = self.inputs.clips.encode([describe_prompt(s, earlier.get(s.media, "")) for s in chunk])
        top_p = isrt.top_p if isrt.context_temperature else 1.0
        sampling = Sampling(1, isrt.context_temperature, isrt.context_tokens, top_p, self.seed("contexts"))
        prompts, groups = self.inputs.clips.answered(prompts, roles.fleet.generate(prompts, sampling))
        return [
            {
                "id": ids[p.sample.id].id,
                "context": rollout.text.strip(),
                "n_tokens": len(rollout.token_ids),
                "prompt": (REFINE if ids[p.sample.id].media in earlier else DESCRIBE).hash,
            }
            for p, (rollout,) in zip(prompts, groups, strict=True)
        ]

    def _respond(self, roles: Roles, chunk: Sequence[Sample], contexts: Mapping[tuple[Medium, ...], str]) -> list[Row]:
        """Sample two different, complete responses to each prompt, with up to `isrt.tries` draws of two."""
        used_contexts = contexts if self.cfg.isrt.context == "judge_and_responses" else {}
        prompts = self.inputs.clips.encode([with_context(s, used_contexts.get(s.media, "")) for s in chunk])
        found: dict[str, list[Rollout]] = {p.sample.id: [] for p in prompts}
        tries, truncated = dict.fromkeys(found, 0), dict.fromkeys(found, 0)
        rollout = self.cfg.rollout
        for attempt in range(self.cfg.isrt.tries):
            waiting = [p for p in prompts if len(found[p.sample.id]) < 2]
            if not waiting:
                break
            seed = self.seed("responses", attempt)
            sampling = Sampling(2, rollout.temperature, rollout.max_tokens, self.cfg.isrt.top_p, seed)
            answered = self.inputs.clips.answered(waiting, roles.fleet.generate(waiting, sampling))
            for prompt, group in zip(*answered, strict=True):
                tries[prompt.sample.id] += 1
                truncated[prompt.sample.id] += sum(r.finish_reason == "length" for r in group)
                add_different(found[prompt.sample.id], group)
        return [
            {
                "id": name,
                "responses": [r.text.strip() for r in rollouts],
                "n_tokens": [len(r.token_ids) for r in rollouts],
                "tries": tries[name],
                "truncated": truncated[name],
            }
            for name, rollouts in found.items()
        ]

    def _judge(self, judge: Judge, chunk: Sequence[Sample], contexts: Mapping[tuple[Medium, ...], str]) -> list[Row]:
        """Judge which of the two responses is better, with c_t."""
        comparisons = []
        for sample in chunk:
            one, two = self.responses[sample.id]["responses"]
            comparisons.append(Comparison(sample, (one, two), contexts.get(sample.media) or None))
        return [judgement_row(s.id, judged) for s, judged in zip(chunk, judge.compare(comparisons), strict=True)]

    def _pairs(self) -> list[Preference]:
        """Pairs whose winner is the same in both orders."""
        pairs = []
        for sample in self.samples:
            row = self.judgements.rows.get(sample.id)
            if row is None or row["state"] != "consistent":
                continue
            responses, winner = self.responses[sample.id]["responses"], row["winner"]
            meta = {"judge": row["judge"], "prompt": row["prompt"], "iteration": self.number}
            pairs.append(Preference(sample, responses[winner], responses[1 - winner], meta))
        return pairs

    def _contexts(self) -> dict[tuple[Medium, ...], str]:
        """Contexts c_t by video; questions about the same video share one."""
        videos = {s.id: s.media for s in self.inputs.train}
        return {videos[row["id"]]: row["context"] for row in self.contexts}

    def _earlier_contexts(self) -> dict[tuple[Medium, ...], str]:
        """Contexts c_(t-1) by video; for a video that the last iteration did not use, its latest context."""
        found: dict[tuple[Medium, ...], str] = {}
        for number in range(1, self.number):
            found |= Iteration(self.cfg, self.run, self.inputs, number)._contexts()
        return {videos: context for videos, context in found.items() if context}

    def seed(self, stage: str, attempt: int = 0) -> int:
        digest = hashlib.sha256(f"{self.cfg.seed} {self.number} {stage} {attempt}".encode()).digest()
        return int.from_bytes(digest[:7], "big")


def prompts_of(cfg: IsrtJobConfig, train: Sequence[Sample], number: int) -> list[Sample]:
    """Return the samples of an iteration, in an order that depends only on the seed."""
    count = min(cfg.isrt.max_prompts or len(train), len(train))
    start = (number - 1) * count if cfg.isrt.prompts == "split" else 0
    return [train[i] for i in dict.fromkeys(batch_indices(len(train), cfg.seed, start, count))]


def add_different(found: list[Rollout], rollouts: Sequence[Rollout]) -> None:
    """Add to `found`, up to two, rollouts that are complete, not empty and differ in more than case, spaces and full
    stop. DPO puts an end of turn behind a response: it would teach a truncated one's ending in mid-sentence."""
    for rollout in rollouts:
        known = {normalise(r.text) for r in found} | {""}
        if len(found) < 2 and rollout.finish_reason == "stop" and normalise(rollout.text) not in known:
            found.append(rollout)


def judgement_row(name: str, judged: Judged) -> Row:
    verdict = asdict(judged.verdict)
    return {"id": name, **verdict, "judge": judged.judge, "prompt": judged.prompt_hash, "answers": judged.answers}


def why_no_pair(iteration: Iteration) -> str:
    """The error of an iteration without a pair: at which stage its prompts were lost."""
    metrics = metrics_of(iteration)
    counts = ", ".join(f"{metrics[f'judge/{state}']:.0f} {state}" for state in ("inconsistent", "unparsed", "failed"))
    return (
        f"{iteration.folder}: there is no pair to train on: of {len(iteration.samples)} prompts "
        f"{metrics['response/same']:.0f} have no two different complete responses (rollout.max_tokens truncated "
        f"{metrics['response/truncated']:.0%} of all responses); verdicts: {counts}; see judgements.jsonl"
    )


def metrics_of(iteration: Iteration) -> dict[str, float]:
    """Metrics of an iteration's data, computed from its rows; means are over rows (sample-weighted)."""
    responses = {row["id"]: row for row in iteration.responses}
    both = [row for row in responses.values() if len(row["responses"]) == 2]
    states = [row["state"] for row in iteration.judgements]
    valid = [state for state in states if state in ("consistent", "inconsistent")]
    decided = [row for row in iteration.judgements if row["state"] == "consistent"]
    uneven = [(responses[row["id"]]["n_tokens"], row["winner"]) for row in decided]
    uneven = [(n, winner) for n, winner in uneven if n[0] != n[1]]
    metrics = {
        "context/length": mean([row["n_tokens"] for row in iteration.contexts]),
        "response/length": mean([n for row in both for n in row["n_tokens"]]),
        "response/same": float(len(responses) - len(both)),
        "response/truncated": mean([row["truncated"] / (2 * row["tries"]) for row in responses.values()]),
        "judge/consistency": mean([state == "consistent" for state in valid]),
        "judge/unparsed": float(states.count("unparsed")),
        "judge/inconsistent": float(states.count("inconsistent")),
        "judge/failed": float(states.count("failed")),
        "judge/timed_out": float(sum(row["reason"].startswith(TIMED_OUT) for row in iteration.judgements)),
        "judge/longer_wins": mean([n[winner] > n[1 - winner] for n, winner in uneven]),
        "pairs/longer": mean([n[winner] - n[1 - winner] for n, winner in uneven]) if uneven else 0.0,
        "pairs/kept": len(decided) / len(iteration.samples),
        "pairs/n": float(len(decided)),
    }
    return metrics | judge_accuracy(iteration, decided)


def judge_accuracy(iteration: Iteration, decided: Sequence[Row]) -> dict[str, float]:
    """Share of pairs in which the judge chose the right response, over pairs of which rules find exactly one right.

    It is only reported: training does not use it.
    """
    parts = [part for part in make_parts(iteration.cfg.rewards) if part.measures_accuracy]
    if not parts:
        return {}
    samples = {s.id: s for s in iteration.samples}
    hits = []
    for row in decided:
        pair = iteration.responses[row["id"]]
        responses = map(Response, pair["responses"], pair["n_tokens"])
        group = Group(samples[row["id"]], tuple(responses), iteration.inputs.family.opening)
        is_right = [reward.is_right for reward in combine(parts, group, score_rules(parts, group))]
        if set(is_right) == {True, False}:
            hits.append(is_right[row["winner"]] is True)
    return {"judge/accuracy": mean(hits), "judge/accuracy_n": float(len(hits))}


def renamed(stats: Mapping[str, float]) -> dict[str, float]:
    """Metrics of DPO with the prefix `dpo/`: here `eval/accuracy` is the accuracy of answers, not of pairs."""
    return {f"dpo/{name.replace('/', '_')}": value for name, value in stats.items()}


def evaluate_once(run: Run, inputs: Inputs, roles: Roles, step: int) -> None:
    """Evaluate the model of `roles` on the held-out samples as result of iteration `step`, unless this was done."""
    if step not in run.logged("eval/n"):
        evaluate(run, inputs, roles, step)


def result_of(run: Run, iterations: int) -> dict[str, Any]:
    evaluated = run.logged("eval/n")
    result: dict[str, Any] = {"iterations": iterations}
    if 0 in evaluated and iterations in evaluated:
        first, last = evaluated[0], evaluated[iterations]
        result |= {"accuracy_before": first["eval/accuracy"], "accuracy_after": last["eval/accuracy"]}
        result |= {"length_ratio": last["eval/length"] / first["eval/length"]}
    return result


if __name__ == "__main__":
    job_main("isrt")
