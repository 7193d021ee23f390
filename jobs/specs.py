"""What each job declares: its config, the roles it starts, how its manifests are read, and where its code is.

Nothing here imports torch, Ray or an engine: `rlvid --help` and a mistake in a config must not wait for them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvid.config import (
    AuditJobConfig,
    DataConfig,
    DpoJobConfig,
    EvalJobConfig,
    GrpoJobConfig,
    IsrtJobConfig,
    JobConfig,
    PolicyGradientJobConfig,
    PpoJobConfig,
    RewardModelJobConfig,
    SftJobConfig,
    TuneJobConfig,
    WarmStartConfig,
)

if TYPE_CHECKING:
    from rlvid.types import Preference, Sample


@dataclass(frozen=True)
class Rows:
    """The rows of one manifest."""

    samples: Sequence[Sample] = ()
    pairs: Sequence[Preference] = ()  # of a preference manifest, one for each of `samples`
    refused: Sequence[tuple[str, str]] = ()  # (id, reason) of rows that this job cannot use


@dataclass(frozen=True)
class ManifestKind:
    """What a job's manifests hold, and which of the manifests of a synthetic set that is."""

    read: Callable[[Path, DataConfig], Rows]
    of_synthetic: Callable[[Path], Path] = lambda manifest: manifest


def _trainer_alone(cfg: JobConfig) -> tuple[str, ...]:
    return ("trainer",)


def _samples(cfg: JobConfig) -> ManifestKind:
    return SAMPLES


def _describe_inputs(cfg: Any, spec: JobSpec) -> list[str]:
    from jobs.inputs import describe_inputs

    return describe_inputs(cfg, spec)


@dataclass(frozen=True)
class JobSpec:
    """One job. The callables take the job's own config."""

    config: type[Any]  # of rlvid.config
    module: str  # has run(cfg, **flags) -> dict, the result that is printed
    help: str
    roles: Callable[[Any], tuple[str, ...]] = _trainer_alone  # the actors it starts (actors/roles.py)
    load: Callable[[Any], ManifestKind] = _samples
    warm_start: Callable[[Any], WarmStartConfig | None] = lambda cfg: None
    scored: Callable[[Any], tuple[str, ...]] = lambda cfg: ()  # keys of the manifests whose samples the rewards score
    lessons: Callable[[Path], Path] | None = None  # rows of the warm start, made from a synthetic training manifest
    folder: Callable[[Any], Path] = lambda cfg: cfg.run.dir
    of_run: Callable[[Path], tuple[Path, list[str]]] | None = None  # config and overrides where a run folder is given
    flags: tuple[str, ...] = ()  # further arguments of run, false unless given as options
    describe: Callable[[Any, JobSpec], list[str]] = _describe_inputs  # checks all that a dry run can; lines about it

    def run(self, cfg: Any, **flags: bool) -> dict[str, Any]:
        """Import the job and run it.

        Returns:
            What the last line of stdout says.
        """
        result: dict[str, Any] = importlib.import_module(self.module).run(cfg, **flags)
        return result


# --- manifests --------------------------------------------------------------------------------------------------------


def load(path: Path, data: DataConfig, needs_answer: bool = True) -> tuple[list[Sample], list[tuple[str, str]]]:
    """The samples of a manifest or a published file, and (id, reason) of the items of a file that cannot be used."""
    from rlvid.data.manifest import load_manifest

    if data.dialect is None:
        return load_manifest(path, data.root, data.system_prompt, data.suffix, needs_answer), []
    from rlvid.data.dialects import DIALECTS
    from rlvid.data.dialects.conversion import load_published
    from rlvid.data.dialects.dialect import Roots

    roots = Roots(data.root, mapped=tuple(data.path_map.items()))
    return load_published(path, DIALECTS[data.dialect], roots, data.system_prompt, data.suffix, needs_answer)


def read_samples(path: Path, data: DataConfig) -> Rows:
    samples, refused = load(path, data)
    return Rows(samples, (), refused)


def read_pairs(path: Path, data: DataConfig) -> Rows:
    from rlvid.data.preferences import pairs_of

    samples, refused = load(path, data, needs_answer=False)
    pairs = pairs_of(path, samples)
    return Rows([pair.sample for pair in pairs], pairs, refused)


def _synthetic_pairs(manifest: Path) -> Path:
    from rlvid.synthetic.moving_shapes import pairs_of

    return pairs_of(manifest)


def _lessons(manifest: Path) -> Path:
    from rlvid.synthetic.lessons import make_lessons

    return make_lessons(manifest)


SAMPLES = ManifestKind(read_samples)
PAIRS = ManifestKind(read_pairs, _synthetic_pairs)


def graded(cfg: RewardModelJobConfig) -> ManifestKind:
    """Samples with scores, under the prompt of the job's rubric; Bradley-Terry models learn from pairs."""
    from rlvid.rewards.videoscore import NoScore, Rubric

    rubric = Rubric.of(cfg)
    if rubric.kind == "bradley_terry":
        return PAIRS

    def read(path: Path, data: DataConfig) -> Rows:
        samples = []
        needs_answer = rubric.kind == "thinking"  # it learns the reasoning; the others learn from labels alone
        loaded, refused = load(path, data, needs_answer)
        for sample in loaded:
            try:
                samples.append(rubric.graded(sample))
            except NoScore as e:
                refused.append((sample.id, str(e)))
        return Rows(samples, (), refused)

    return ManifestKind(read)


# --- jobs -------------------------------------------------------------------------------------------------------------


def _policy_gradient_roles(cfg: PolicyGradientJobConfig) -> tuple[str, ...]:
    reference = ("reference",) if cfg.has_reference else ()
    return ("trainer", "generator", *reference, *(("reward_model",) if cfg.reward_models else ()))


def _policy_gradient(config: type[PolicyGradientJobConfig], module: str, help: str) -> JobSpec:
    return JobSpec(
        config,
        module,
        help,
        roles=_policy_gradient_roles,
        scored=lambda cfg: ("data.train", "data.eval"),
        warm_start=lambda cfg: cfg.warm_start,
        flags=("only_rollouts",),
    )


def _policy_of(run_dir: Path) -> tuple[Path, list[str]]:
    """Evaluates the policy that a run has exported, on the run's own held-out samples."""
    overrides = [f"run.dir={run_dir / 'eval'}", f"model.path={run_dir / 'policy'}"]
    overrides += ["model.tiny=null", "model.lora=null"]
    if (made := run_dir / "data" / "eval.jsonl").exists():  # a synthetic set
        overrides += [f"data.eval={made}", "data.train=null", "data.synthetic=null"]
    return run_dir / "config.yaml", overrides


def _describe_sweep(cfg: Any, spec: JobSpec) -> list[str]:
    from jobs.tune import describe

    return describe(cfg)


JOBS: dict[str, JobSpec] = {
    "grpo": _policy_gradient(
        GrpoJobConfig, "jobs.grpo", "group relative policy optimisation and its relatives on videos"
    ),
    "ppo": _policy_gradient(PpoJobConfig, "jobs.ppo", "proximal policy optimisation with a critic on videos"),
    "sft": JobSpec(SftJobConfig, "jobs.sft", "supervised fine-tuning on the manifest's answers"),
    "dpo": JobSpec(
        DpoJobConfig,
        "jobs.dpo",
        "direct preference optimisation and its relatives on pairs of responses",
        load=lambda cfg: PAIRS,
    ),
    "reward-model": JobSpec(
        RewardModelJobConfig,
        "jobs.reward_model",
        "a model that scores videos, or answers to questions about them",
        load=graded,
    ),
    "isrt": JobSpec(
        IsrtJobConfig,
        "jobs.isrt",
        "self-judgement with a visual context, then DPO, iterated",
        roles=lambda cfg: ("trainer", "generator"),
        scored=lambda cfg: ("data.eval",),
        warm_start=lambda cfg: cfg.warm_start,
        lessons=_lessons,
        flags=("only_data",),
    ),
    "tune": JobSpec(
        TuneJobConfig,
        "jobs.tune",
        "search hyperparameters of any job with Ray Tune",
        roles=lambda cfg: (),
        folder=lambda cfg: cfg.dir,
        describe=_describe_sweep,
    ),
    "eval": JobSpec(
        EvalJobConfig,
        "jobs.evaluate",
        "greedy answers to the held-out manifest, scored by a benchmark",
        roles=lambda cfg: ("generator",),
        scored=lambda cfg: ("data.eval",) if cfg.benchmark.kind == "held_out" else (),
        of_run=_policy_of,
    ),
    "audit": JobSpec(
        AuditJobConfig,
        "jobs.audit",
        "the same as rlvid data audit: which rows of a manifest need their video",
        roles=lambda cfg: ("generator",),
        scored=lambda cfg: ("data.eval",),
    ),
}
