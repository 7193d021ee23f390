"""One class per job: the sections it has, and what must hold between them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError

from rlvid.config.algorithms import DpoConfig, IsrtConfig, RewardModelConfig, SftConfig
from rlvid.config.benchmarks import AuditConfig, BenchmarkConfig, HeldOutBenchmark
from rlvid.config.inputs import DataConfig, ModelConfig, VideoConfig
from rlvid.config.policy_gradient import GrpoConfig, PolicyGradientConfig, PpoConfig
from rlvid.config.rewards import EndpointPart, ExactPart, JudgePart, ModelPart, RewardPartsConfig
from rlvid.config.section import Section, changeable
from rlvid.config.sections import (
    DeadlinesConfig,
    EvaluateConfig,
    ParityConfig,
    PlacementConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
    WarmStartConfig,
)
from rlvid.config.tune import TuneJobConfig

SHORTEST_TEXT = 16
"""Tokens: no chat template with a question is shorter."""


class JobConfig(Section):
    """Keys that every job shares."""

    manifest: ClassVar[Literal["train", "eval"]] = "train"
    """The manifest of `data` that the job cannot do without."""

    seed: int = Field(0, ge=0)
    """Seed of the data order, the synthetic clips, the weights of a tiny model and sampling."""
    run: RunConfig = changeable(RunConfig(), "where and how often results are written")
    model: ModelConfig = ModelConfig()
    data: DataConfig = Field(default_factory=DataConfig)  # its paths need a home folder, importing must not
    video: VideoConfig = VideoConfig()
    train: TrainConfig = TrainConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardPartsConfig = (ExactPart(kind="exact"),)
    """Parts of the reward. The reward of a response is the weighted sum of the parts that cover its sample."""
    evaluate: EvaluateConfig = changeable(EvaluateConfig(), "evaluation does not affect training")
    placement: PlacementConfig = changeable(
        PlacementConfig(), "a run may continue on other machines; trainer_workers only with train.zero_stage=0"
    )

    parity: ParityConfig = changeable(ParityConfig(), "a check of the start")
    deadlines: DeadlinesConfig = changeable(DeadlinesConfig(), "when to give up")

    @property
    def reward_models(self) -> tuple[ModelPart, ...]:
        """The parts of the reward whose model has an actor of its own."""
        return tuple(part for part in self.rewards if isinstance(part, ModelPart))

    @property
    def judges(self) -> tuple[JudgePart, ...]:
        """The parts of the reward that are a judge's opinion."""
        return tuple(part for part in self.rewards if isinstance(part, JudgePart))

    @property
    def critic(self) -> Literal["shared", "own"] | None:
        """Whether the trainer has a critic: on the policy's network, or a network of its own."""
        return None

    @property
    def critic_path(self) -> Path | None:
        """The checkpoint that a critic of its own starts from, if it is not the policy's."""
        return None

    @property
    def engines_sleep(self) -> bool:
        """Whether the engines give up their memory while the trainer works."""
        return False

    @property
    def last_step(self) -> int:
        """The `step` of the last metrics of a complete run."""
        return self.train.steps

    @property
    def is_elastic(self) -> bool:
        return (self.train.max_workers or 0) > self.placement.trainer_workers

    def faults(self) -> Iterator[str]:
        model, data, train, rollout, place = self.model, self.data, self.train, self.rollout, self.placement
        if not model.path and not model.tiny:
            yield "model.path is empty: give a checkpoint, or model.tiny for a random model"
        if data.synthetic is None and not any(getattr(source, self.manifest) for source in data.sources.values()):
            yield f"data.{self.manifest} is empty: give a manifest, or data.synthetic for a synthetic set"
        if model.lora and train.lr_factors:
            yield "train.lr_factors is of the whole model, and model.lora trains adapters alone: leave one of them out"
        if model.lora and model.lora.quantize and train.zero_stage == 3:
            yield f"train.zero_stage=3 does not go with model.lora.quantize={model.lora.quantize}: set it to 2"
        least, most = place.trainer_workers, train.max_workers or place.trainer_workers
        if most < least:
            yield f"train.max_workers={most} is less than placement.trainer_workers={least}"
        if train.batch_size < most:
            yield f"train.batch_size={train.batch_size} is less than a sample for each of {most} workers"
        if most > least and train.zero_stage:
            yield (
                f"train.zero_stage={train.zero_stage} keeps a part of the optimizer in each worker, and another number "
                f"of workers cannot load it: set it to 0, or leave train.max_workers empty"
            )
        if train.offload_optimizer and not train.zero_stage:
            yield "train.offload_optimizer needs DeepSpeed ZeRO: set train.zero_stage to 1, 2 or 3"
        response, room = rollout.max_tokens, rollout.max_model_len
        if response >= room:
            yield f"rollout.max_tokens={response} leaves no room for a prompt in rollout.max_model_len={room}"
        if (most := rollout.max_replicas or rollout.replicas) < rollout.replicas:
            yield f"rollout.max_replicas={most} is less than rollout.replicas={rollout.replicas}"
        if place.colocate and place.gpus and rollout.tensor_parallel > 1:
            yield (
                f"rollout.tensor_parallel={rollout.tensor_parallel}: an engine on several GPUs cannot share them with "
                f"the trainer: set placement.colocate to false"
            )
        yield from self._transfer_faults()

    def _transfer_faults(self) -> Iterator[str]:
        place, rollout, way = self.placement, self.rollout, self.rollout.weight_transfer
        key = f"rollout.weight_transfer={way}"
        if way in ("nccl", "ipc") and not place.gpus:
            yield f"{key} needs GPUs: set placement.gpus, or leave it at auto"
        if way in ("nccl", "ipc") and self.model.lora:
            yield f"{key} sends the whole model, model.lora trains adapters: leave it at auto"
        if way == "nccl" and (place.colocate or place.gpus < 1):
            yield f"{key} needs a GPU per process: set placement.colocate to false, or leave it at auto"
        most = rollout.max_replicas or rollout.replicas
        if way == "ipc" and (not place.colocate or most > place.trainer_workers or most > rollout.replicas):
            yield (
                f"{key} needs every engine on the GPU of a trainer rank: set placement.colocate to true, "
                f"placement.gpus to 1, rollout.replicas to at most placement.trainer_workers, "
                f"and leave rollout.max_replicas empty; or leave it at auto"
            )


def video_tokens(cfg: JobConfig) -> int:
    """The least tokens of a clip in the prompts of a synthetic set; 0 where clips are not known yet."""
    video = cfg.video
    if cfg.data.train is not None or cfg.data.eval is not None or cfg.data.mix or video.sampling == "fps":
        return 0
    # A token of a Qwen-VL model covers two frames of at least 32 x 32 pixels.
    return video.frames // 2 * max((video.height or 0) // 32, 1) * max((video.width or 0) // 32, 1)


def _room_faults(cfg: JobConfig, text_tokens: int, why: str) -> Iterator[str]:
    """Whether an engine's context has room for a clip, a question and `text_tokens` more."""
    room, least = cfg.rollout.max_model_len, video_tokens(cfg) + SHORTEST_TEXT + text_tokens
    if room < least:
        yield f"rollout.max_model_len={room} is less than {least}: {why}"


def _engine_faults(cfg: JobConfig) -> Iterator[str]:
    """For jobs that generate: what is known before any clip or model is made. Real prompts are measured later."""
    if tokens := video_tokens(cfg):
        response = cfg.rollout.max_tokens
        seen = f"{cfg.video.frames} frames are at least {tokens} tokens, a question {SHORTEST_TEXT}"
        yield from _room_faults(cfg, response, f"{seen}, a response rollout.max_tokens={response}")


class SftJobConfig(JobConfig):
    """`rlvid sft`: supervised fine-tuning on the manifest's answers."""

    sft: SftConfig = SftConfig()
    stages: tuple[dict[str, Any], ...] = ()
    """Trainings one after another, each with the sections in which it differs from the rest of the config. The first
    starts from `model`, the others from what the one before made. Each has a run folder, `run.dir`/stage_N."""

    def stage(self, number: int) -> SftJobConfig:
        """The config of a stage, from 1 on, with the model of the first."""
        whole = self.model_dump(exclude_unset=True, exclude={"stages"})
        whole.setdefault("run", {})["dir"] = self.run.dir / f"stage_{number}"
        return SftJobConfig(**_updated(whole, self.stages[number - 1]))

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        for i, changed in enumerate(self.stages):
            if taken := changed.keys() & {"stages", "model", "run"}:
                yield f"stages.{i}: {min(taken)} is set for all stages, leave it out here"
            try:
                self.stage(i + 1)
            except ValidationError as e:
                wrong = e.errors()[0]
                yield f"stages.{i}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"


def _updated(config: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """The config with the keys that `changed` has, in sections of any depth. Names that are free are replaced as a
    whole."""
    inner = {k: v for k, v in changed.items() if isinstance(v, dict) and isinstance(config.get(k), dict)}
    free = ("mix", "path_map", "lr_factors")
    return config | changed | {k: _updated(config[k], v) for k, v in inner.items() if k not in free}


class DpoJobConfig(JobConfig):
    """`rlvid dpo`: direct preference optimisation and its relatives on pairs of responses.

    The rows of its manifests have `chosen` and `rejected`; see rlvid/data/preferences.py.
    """

    dpo: DpoConfig = DpoConfig()

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from _kto_faults(self.dpo, self.train)


def _kto_faults(dpo: DpoConfig, train: TrainConfig) -> Iterator[str]:
    if dpo.loss == "kto" and train.batch_size < 2:
        yield (
            "dpo.loss=kto compares a pair with a response to another prompt of its batch: set train.batch_size above 1"
        )


class IsrtJobConfig(JobConfig):
    """`rlvid isrt`: iterative self-retrospective judgement (Ahn et al. 2024, arXiv 2406.11280): the model describes,
    answers, judges its own answers and is trained on its verdicts.

    `train` and `dpo` configure the DPO of each iteration.
    """

    warm_start: WarmStartConfig = WarmStartConfig()
    dpo: DpoConfig = DpoConfig()
    isrt: IsrtConfig = IsrtConfig()

    @property
    def last_step(self) -> int:
        return self.isrt.iterations

    def dpo_job(self, iteration: int, n_pairs: int) -> DpoJobConfig:
        """The DPO of an iteration as a job of its own. The order of the pairs differs between iterations."""
        train = self.train
        if self.isrt.epochs is not None:
            steps = math.ceil(self.isrt.epochs * n_pairs / train.batch_size)
            warmup = min(train.warmup_steps, max(steps - 1, 0))
            train = train.model_copy(update={"steps": steps, "warmup_steps": warmup})
        shared = {name: getattr(self, name) for name in DpoJobConfig.model_fields}
        run = self.run.model_copy(update={"export_every": None})  # its model is an iteration's, not the run's
        return DpoJobConfig(**shared | {"seed": self.seed + iteration, "train": train, "run": run})

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.evaluate.best:
            yield "evaluate.best is for sft, dpo and reward-model, not for isrt: leave it out"
        if self.reward_models:
            yield "rewards: isrt uses them for evaluation only; leave out those of kind model"
        yield from _engine_faults(self)
        yield from _kto_faults(self.dpo, self.train)
        if self.dpo.reference_path is not None:
            yield "dpo.reference_path: isrt.reference sets the reference of this job; leave it empty"
        isrt, judge, response = self.isrt, self.isrt.judge, self.rollout.max_tokens
        context = isrt.context_tokens if isrt.context != "none" else 0
        read = response if judge.backend == "endpoint" else context + 2 * response + judge.max_tokens
        why = (
            f"the judge reads the video, a context of isrt.context_tokens={isrt.context_tokens} and two responses of "
            f"rollout.max_tokens={response}, and answers isrt.judge.max_tokens={judge.max_tokens}"
        )
        yield from _room_faults(self, read, why)


class RewardModelJobConfig(JobConfig):
    """`rlvid reward-model`: a model that scores videos against their prompts, or answers to questions."""

    reward_model: RewardModelConfig = RewardModelConfig()

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.data.suffix or self.data.system_prompt:
            yield (
                "data.suffix and data.system_prompt do not go with reward_model: the model will be asked without them. "
                "Write them into the manifest's questions and set reward_model.template to question"
            )


class EvalJobConfig(JobConfig):
    """`rlvid eval`: greedy answers to the held-out manifest."""

    manifest = "eval"
    benchmark: BenchmarkConfig = HeldOutBenchmark()
    """How answers are read and scored. `rlvid eval KIND CONFIG.yaml` sets its kind."""

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from _engine_faults(self)


class AuditJobConfig(EvalJobConfig):
    """`rlvid audit`: which rows of `data.eval` need their video; the same as `rlvid data audit`."""

    audit: AuditConfig = AuditConfig()


class PolicyGradientJobConfig(JobConfig):
    """What `rlvid grpo` and `rlvid ppo` share."""

    warm_start: WarmStartConfig = WarmStartConfig()

    @property
    def policy_gradient(self) -> PolicyGradientConfig:
        """The section of the job's algorithm."""
        raise NotImplementedError

    @property
    def has_reference(self) -> bool:
        """Whether a reference model has ranks of its own. With adapters, the trainer without them is the reference."""
        return self.policy_gradient.kl_coef > 0 and self.model.lora is None

    @property
    def engines_sleep(self) -> bool:
        place = self.placement
        shares = place.colocate and place.gpus > 0
        return (shares and not self.policy_gradient.async_steps) if self.rollout.sleep is None else self.rollout.sleep

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from _engine_faults(self)
        name, cfg = type(self).__name__.removesuffix("JobConfig").lower(), self.policy_gradient
        batch, n_parts, n_ranks = self.train.batch_size, cfg.minibatches, self.placement.trainer_workers
        if self.train.max_workers is not None:
            yield f"train.max_workers: {name} is not elastic, leave it empty"
        yield from self._reward_faults(name)
        if self.evaluate.best:
            yield f"evaluate.best is for sft, dpo and reward-model, not for {name}: leave it out"
        if self.model.lora and self.model.lora.quantize:
            yield (
                f"model.lora.quantize={self.model.lora.quantize}: the engines have the weights in full, so their "
                f"log-probs would not be the trainer's; leave it out"
            )
        if self.engines_sleep and cfg.async_steps > 0:
            yield (
                f"{name}.async_steps={cfg.async_steps} generates while the trainer works, when rollout.sleep=true "
                f"takes the memory of the engines: set one of them to 0 or false"
            )
        if batch % n_parts:
            yield f"{name}.minibatches={n_parts} must divide train.batch_size={batch}"
        if batch < n_ranks * n_parts:
            yield (
                f"train.batch_size={batch} is less than a prompt for each of placement.trainer_workers={n_ranks} and "
                f"{name}.minibatches={n_parts}"
            )

    def _reward_faults(self, name: str) -> Iterator[str]:
        """Rules between the parts of the reward and the rest."""
        cfg, limit_s = self.policy_gradient, self.deadlines.reward_s
        response = self.rollout.max_tokens
        for i, part in enumerate(self.rewards):
            if isinstance(part, EndpointPart) and part.deadline_s >= limit_s:
                yield (
                    f"rewards.{i}.deadline_s={part.deadline_s:g} is not below deadlines.reward_s={limit_s:g}, after "
                    f"which the reward worker is replaced: lower it"
                )
            if not isinstance(part, JudgePart):
                continue
            if part.mode == "win_rate" and (cfg.compares_with_greedy or cfg.group_size < 2):
                yield (
                    f"rewards.{i}.mode=win_rate compares the responses of a group: set {name}.group_size to 2 or "
                    f"more, and {name}.advantage to another than greedy"
                )
            if part.judge.backend != "endpoint":
                why = f"the judge of rewards.{i} reads the video and responses of rollout.max_tokens={response}"
                read, answer = response * (2 if part.mode == "win_rate" else 1), part.judge.max_tokens
                yield from _room_faults(self, read + answer, f"{why}, and answers judge.max_tokens={answer}")


class GrpoJobConfig(PolicyGradientJobConfig):
    """`rlvid grpo`: group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300) and its relatives."""

    grpo: GrpoConfig = GrpoConfig()

    @property
    def policy_gradient(self) -> GrpoConfig:
        return self.grpo

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.grpo.temporal != "off" and self.video.frames < 4:
            yield (
                f"grpo.temporal={self.grpo.temporal} shows frames in another order, two at a time: set video.frames to "
                f"4 or more"
            )


class PpoJobConfig(PolicyGradientJobConfig):
    """`rlvid ppo`: proximal policy optimisation with a critic (Schulman et al. 2017, arXiv 1707.06347)."""

    ppo: PpoConfig = PpoConfig()

    @property
    def policy_gradient(self) -> PpoConfig:
        return self.ppo

    @property
    def critic(self) -> Literal["shared", "own"]:
        return self.ppo.critic

    @property
    def critic_path(self) -> Path | None:
        return self.ppo.critic_path


JOB_CONFIGS: dict[str, type[Section]] = {
    "sft": SftJobConfig,
    "dpo": DpoJobConfig,
    "reward-model": RewardModelJobConfig,
    "grpo": GrpoJobConfig,
    "ppo": PpoJobConfig,
    "isrt": IsrtJobConfig,
    "eval": EvalJobConfig,
    "audit": AuditJobConfig,
    "tune": TuneJobConfig,
}
"""Command -> its config, in the order of docs/configuration.md."""
