"""`rlvid eval`: greedy answers to held-out samples, scored by a benchmark; also the evaluations inside other jobs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actors.clip_store import ClipStore
from actors.generator_fleet import GeneratorFleet
from actors.judge import open_judge
from actors.roles import Roles
from jobs.cli import job_main
from jobs.inputs import Inputs, open_job
from jobs.run import Run
from rlvid.config import EvalJobConfig
from rlvid.config.benchmarks import BenchmarkConfig
from rlvid.errors import UserError
from rlvid.evaluation.benchmarks.captions import Captions
from rlvid.evaluation.benchmarks.held_out import HeldOut
from rlvid.evaluation.benchmarks.judged import Judged
from rlvid.evaluation.benchmarks.mmla import Mmla
from rlvid.evaluation.benchmarks.multimood import Multimood
from rlvid.evaluation.compare import Record
from rlvid.evaluation.predictions import Batches, Benchmark, Evaluated, Prediction
from rlvid.evaluation.predictions import evaluate as evaluate_benchmark
from rlvid.files import RowFile
from rlvid.reporting.report.evaluation import Shown, write_evaluation_page
from rlvid.rewards.rules import make_parts
from rlvid.rollout.engine import Sampling
from rlvid.types import Encoded, Sample

SHOWN = 40  # samples on the page, the wrong ones first
VIDEO = "video"  # the videos as they are


@contextmanager
def generators(run: Run, model: Path) -> Iterator[Roles]:
    """Generators that serve a checkpoint. They end with the block, so that what follows has their CPUs and GPUs."""
    with Roles(model, run.cfg, ("generator",), run.folder.logs_dir, run.console.message) as roles:
        roles.wait_ready()
        roles.fleet.serve_checkpoint()
        yield roles


def evaluate(run: Run, inputs: Inputs, roles: Roles, step: int) -> dict[str, float]:
    """Greedy answers of the engines' weights to the held-out samples, scored by the rules of `rewards`; logged and
    shown. Nothing without any samples.

    Returns:
        Share of right answers (sample-weighted, with n), overall and by problem type, and the mean length in tokens.
    """
    if not inputs.held_out:
        return {}
    benchmark = held_out(inputs, inputs.held_out[: inputs.cfg.evaluate.max_samples])
    return answer_and_score(run, inputs, roles, step, benchmark)[0]


def held_out(inputs: Inputs, samples: Sequence[Sample]) -> HeldOut:
    parts = [part for part in make_parts(inputs.cfg.rewards) if part.kind.score and part.kind.is_rule]
    return HeldOut(samples, [part for part in parts if not part.kind.waits], inputs.family.opening)


def answer_and_score(
    run: Run, inputs: Inputs, roles: Roles, step: int, benchmark: Benchmark
) -> tuple[dict[str, float], dict[str, Evaluated]]:
    """Evaluate in every view that is asked for.

    Returns:
        The metrics, logged and shown, and what was found in each view.
    """
    cfg, found = inputs.cfg, {}
    with run.stage("evaluation"):
        for view in (None, *cfg.evaluate.views):
            sampling = Sampling(1, 0.0, cfg.rollout.max_tokens, view=view)
            file = RowFile(run.folder.predictions_file(step, view))

            def answer(batches: Batches, sampling: Sampling = sampling) -> Iterator[Mapping[str, Prediction]]:
                return fleet_answers(roles.fleet, inputs.clips, sampling, batches)

            found[view or VIDEO] = evaluate_benchmark(benchmark, answer, file, cfg.evaluate.batch_size)
    metrics = {f"eval/{name}": value for name, value in found[VIDEO].metrics.items()}
    for view in cfg.evaluate.views:
        metrics |= {f"eval/{name}_{view}": found[view].metrics[name] for name in benchmark.headline}
    run.log(step, metrics | run.take_times())
    run.console.evaluation(step, metrics)
    return metrics, found


def fleet_answers(
    fleet: GeneratorFleet, clips: ClipStore, sampling: Sampling, batches: Batches
) -> Iterator[Mapping[str, Prediction]]:
    """Answers of a fleet. While it answers one batch it has the next, and the clips of the one after are read."""
    asked: deque[tuple[list[Encoded], list[Any]]] = deque()

    def take() -> Mapping[str, Prediction]:
        prompts, futures = asked.popleft()
        prompts, answers = clips.answered(prompts, fleet.collect(futures))
        return {
            p.sample.id: Prediction(r.text, len(r.token_ids), r.finish_reason)
            for p, (r,) in zip(prompts, answers, strict=True)
        }

    for prompts in read_ahead(clips, batches):
        asked.append((prompts, fleet.submit(prompts, sampling)))
        if len(asked) > 1:
            yield take()
    while asked:
        yield take()


def read_ahead(clips: ClipStore, batches: Iterable[Sequence[Sample]]) -> Iterator[list[Encoded]]:
    """The prompts of each batch; those of the next are being made."""
    coming = (clips.submit(batch) for batch in batches)
    pending = next(coming, None)
    while pending is not None:
        following = next(coming, None)
        yield clips.collect(pending)
        pending = following


@contextmanager
def open_benchmark(cfg: EvalJobConfig, run: Run, inputs: Inputs, roles: Roles) -> Iterator[Benchmark]:
    """The benchmark that the config names, over the held-out samples."""
    samples, what = inputs.held_out[: cfg.evaluate.max_samples], cfg.benchmark
    if what.kind == "judged":
        cache = RowFile(run.folder.judge_cache_file, key="key")
        with open_judge(what.judge, roles, inputs.clips, cache, cfg.seed, inputs.model) as judge:
            run.folder.record(judge=judge.id)
            yield Judged(samples, judge.rate, what.protocol, what.caption)
    else:
        yield _benchmark(what, inputs, samples)


def _benchmark(what: BenchmarkConfig, inputs: Inputs, samples: Sequence[Sample]) -> Benchmark:
    if what.kind == "mmla":
        return Mmla(samples, what.prompt, what.parser)
    if what.kind == "captions":
        return Captions(samples, what.references, what.encoder, what.layer)
    if what.kind == "multimood":
        return Multimood(samples, what.encoder, what.layer)
    return held_out(inputs, samples)


def run(cfg: EvalJobConfig) -> dict[str, Any]:
    """Evaluate `model.path` on `data.eval`."""
    with open_job(cfg, "eval") as (run, inputs):
        if not inputs.held_out:
            raise UserError("data.eval is empty: give a manifest of held-out samples")
        with generators(run, inputs.model) as roles, open_benchmark(cfg, run, inputs, roles) as benchmark:
            metrics, found = answer_and_score(run, inputs, roles, 0, benchmark)
        whole = found[VIDEO]
        asked = [benchmark.prompt(sample) for sample in benchmark.samples]
        Record.of(cfg, run.folder.manifest(), asked, whole).write(run.folder.dir)
        _write_page(run, inputs, benchmark, metrics, whole)
        views = [f"{name}_{view}" for view in cfg.evaluate.views for name in benchmark.headline[:1]]
        shown = {name: metrics[f"eval/{name}"] for name in (*benchmark.headline, *views)}
        shown = {name: int(value) if name.startswith("n") else value for name, value in shown.items()}
        return {**shown, "page": str(run.folder.evaluation_page), **run.ending()}


def _write_page(run: Run, inputs: Inputs, benchmark: Benchmark, metrics: Mapping[str, float], found: Evaluated) -> None:
    """The wrong answers first, then those without a verdict, then the right ones."""
    by_value = sorted(benchmark.samples, key=lambda s: (found.values[s.id] is None, found.values[s.id] or 0.0))
    chosen = by_value[:SHOWN]
    strips = inputs.clips.strips([sample for sample in chosen if sample.media])
    shown = [
        Shown(
            sample.id,
            [(message.role, message.text) for message in benchmark.prompt(sample).messages],
            sample.answer,
            found.predictions[sample.id].text if sample.id in found.predictions else "(no prediction)",
            found.values[sample.id],
            strips.get(sample.id, []),
        )
        for sample in chosen
    ]
    named = {name.removeprefix("eval/"): value for name, value in metrics.items()}
    write_evaluation_page(run.folder.evaluation_page, run.folder.dir.name, named, found.confusions, shown)


if __name__ == "__main__":
    job_main("eval")
