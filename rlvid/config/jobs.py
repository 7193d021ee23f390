"""One class per job: the sections it has, and what must hold between them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from rlvid.config.algorithms import DpoConfig, GrpoConfig, IsrtConfig, RewardModelConfig
from rlvid.config.rewards import ExactPart, ModelPart, RewardPartsConfig
from rlvid.config.sections import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    PlacementConfig,
    RolloutConfig,
    RunConfig,
    Section,
    TrainConfig,
    VideoConfig,
    WarmStartConfig,
)


class JobConfig(Section):
    """Keys that every job shares."""

    seed: int = Field(0, ge=0)
    """Seeds the data order, the synthetic clips, the weights of a tiny model and sampling."""
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    video: VideoConfig = VideoConfig()
    train: TrainConfig = TrainConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardPartsConfig = (ExactPart(kind="exact"),)
    """Parts of the reward. The reward of a response is the weighted sum of the parts that cover its sample."""
    evaluate: EvaluateConfig = EvaluateConfig()
    placement: PlacementConfig = PlacementConfig()

    @property
    def reward_models(self) -> tuple[ModelPart, ...]:
        """The parts of the reward whose model has an actor of its own."""
        return tuple(part for part in self.rewards if isinstance(part, ModelPart))

    @property
    def last_step(self) -> int:
        """The `step` of a whole run's last metrics."""
        return self.train.steps

    @property
    def is_elastic(self) -> bool:
        return (self.train.max_workers or 0) > self.placement.trainer_workers

    @model_validator(mode="after")
    def _workers_have_work(self) -> JobConfig:
        least, stage = self.placement.trainer_workers, self.train.zero_stage
        most = self.train.max_workers or least
        if most < least:
            raise ValueError(f"train.max_workers={most} is less than placement.trainer_workers={least}")
        if self.train.batch_size < most:
            raise ValueError(f"train.batch_size={self.train.batch_size} gives {most} workers less than one sample each")
        if most > least and stage:
            raise ValueError(
                f"train.zero_stage={stage} keeps a part of the optimizer in each worker, which another number of "
                f"workers cannot load: set it to 0, or leave train.max_workers empty"
            )
        return self

    @model_validator(mode="after")
    def _responses_fit(self) -> JobConfig:
        if self.rollout.max_tokens >= self.rollout.max_model_len:
            raise ValueError(
                f"rollout.max_tokens={self.rollout.max_tokens} leaves no room for a prompt in "
                f"rollout.max_model_len={self.rollout.max_model_len}"
            )
        if self.placement.gpus > 1 and self.placement.gpus % 1:
            raise ValueError(f"placement.gpus={self.placement.gpus:g}: fractions of GPUs go up to 1")
        if self.placement.colocate and self.placement.gpus and self.rollout.tensor_parallel > 1:
            raise ValueError("an engine over several GPUs shares none: set placement.colocate to false")
        return self

    @model_validator(mode="after")
    def _weights_can_travel(self) -> JobConfig:
        place, way = self.placement, self.rollout.weight_transfer
        key = f"rollout.weight_transfer={way}"
        if way not in ("nccl", "ipc"):
            return self
        if not place.gpus:
            raise ValueError(f"{key} needs GPUs: set placement.gpus, or leave it at auto")
        if self.model.lora:
            raise ValueError(f"{key} sends the whole model, model.lora trains adapters: leave it at auto")
        shares = place.colocate and place.gpus <= 1
        if way == "nccl" and (shares or place.gpus < 1):
            raise ValueError(f"{key} needs a GPU per process: set placement.colocate to false, or leave it at auto")
        if way == "ipc" and (not shares or self.rollout.replicas > place.trainer_workers):
            raise ValueError(
                f"{key} needs every engine on the GPU of a trainer rank: set placement.colocate to true, "
                f"placement.gpus to 1 and rollout.replicas to at most placement.trainer_workers, or leave it at auto"
            )
        return self

    @model_validator(mode="after")
    def _has_model_and_data(self) -> JobConfig:
        if self.model.path is None and self.model.tiny is None:
            raise ValueError("model.path is empty: give a checkpoint folder, or model.tiny to make a tiny random model")
        if self.data.train is None and self.data.synthetic is None and self.data.eval is None:
            raise ValueError("data.train is empty: give a manifest, or data.synthetic to make a synthetic set")
        return self


class SftJobConfig(JobConfig):
    """`rlvid sft`: supervised fine-tuning on the manifest's answers."""


class DpoJobConfig(JobConfig):
    """`rlvid dpo`: direct preference optimisation and its relatives on pairs of responses.

    The manifests' rows have `chosen` and `rejected`; see rlvid/data/preferences.py.
    """

    dpo: DpoConfig = DpoConfig()

    @model_validator(mode="after")
    def _kto_has_other_prompts(self) -> DpoJobConfig:
        _check_kto_batch(self.dpo, self.train)
        return self


def _check_kto_batch(dpo: DpoConfig, train: TrainConfig) -> None:
    if dpo.loss == "kto" and train.batch_size < 2:
        raise ValueError(
            "dpo.loss=kto compares each pair with a response to another prompt of its batch: set train.batch_size to "
            "at least 2"
        )


class IsrtJobConfig(JobConfig):
    """`rlvid isrt`: iterative self-retrospective judgement (Ahn et al. 2024, arXiv 2406.11280): the model describes,
    answers, judges its own answers and is trained on its verdicts.

    `train` and `dpo` are those of each iteration's DPO.
    """

    warm_start: WarmStartConfig = WarmStartConfig()
    dpo: DpoConfig = DpoConfig()
    isrt: IsrtConfig = IsrtConfig()

    @property
    def last_step(self) -> int:
        return self.isrt.iterations

    def dpo_job(self, iteration: int, n_pairs: int) -> DpoJobConfig:
        """Step 4 of an iteration as a job of its own, with another order of its pairs in each."""
        train = self.train
        if self.isrt.epochs is not None:
            steps = math.ceil(self.isrt.epochs * n_pairs / train.batch_size)
            warmup = min(train.warmup_steps, max(steps - 1, 0))
            train = train.model_copy(update={"steps": steps, "warmup_steps": warmup})
        shared = {name: getattr(self, name) for name in DpoJobConfig.model_fields}
        return DpoJobConfig(**shared | {"seed": self.seed + iteration, "train": train})

    @model_validator(mode="after")
    def _rewards_are_rules(self) -> IsrtJobConfig:
        if self.reward_models:
            raise ValueError("rewards: isrt uses them to evaluate only, leave out those of kind model")
        return self

    @model_validator(mode="after")
    def _iterations_can_run(self) -> IsrtJobConfig:
        _check_kto_batch(self.dpo, self.train)
        if self.dpo.reference_path is not None:
            raise ValueError("dpo.reference_path: here isrt.reference says what the reference is; leave it empty")
        longest = max(self.isrt.context_tokens, self.isrt.judge.max_tokens, self.rollout.max_tokens)
        if longest >= self.rollout.max_model_len:
            raise ValueError(
                f"rollout.max_model_len={self.rollout.max_model_len} leaves no room for a prompt beside {longest} "
                f"tokens (isrt.context_tokens, isrt.judge.max_tokens, rollout.max_tokens)"
            )
        return self


class RewardModelJobConfig(JobConfig):
    """`rlvid reward-model`: a model that scores videos against their prompts, or answers to questions."""

    reward_model: RewardModelConfig = RewardModelConfig()

    @model_validator(mode="after")
    def _prompt_is_the_template(self) -> RewardModelJobConfig:
        if self.data.suffix or self.data.system_prompt:
            raise ValueError(
                "data.suffix and data.system_prompt do not go with reward_model: the model would be asked without them "
                "later; write them into the manifest's questions and set reward_model.template to question"
            )
        return self


class EvalJobConfig(JobConfig):
    """`rlvid eval`: greedy answers to the held-out manifest."""


class GrpoJobConfig(JobConfig):
    """`rlvid grpo`: group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300)."""

    warm_start: WarmStartConfig = WarmStartConfig()
    grpo: GrpoConfig = GrpoConfig()

    @model_validator(mode="after")
    def _minibatches_divide(self) -> GrpoJobConfig:
        if self.train.max_workers is not None:
            raise ValueError("train.max_workers: grpo has placement.trainer_workers ranks, always; leave it empty")
        if self.train.batch_size % self.grpo.minibatches:
            raise ValueError(
                f"grpo.minibatches={self.grpo.minibatches} must divide train.batch_size={self.train.batch_size}"
            )
        if self.train.batch_size < self.placement.trainer_workers * self.grpo.minibatches:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} gives {self.placement.trainer_workers} trainer ranks and "
                f"{self.grpo.minibatches} mini-batches less than one prompt each"
            )
        return self


class SpaceConfig(Section):
    """Where a hyperparameter is drawn from: exactly one of these."""

    uniform: tuple[float, float] | None = None
    """Evenly between two numbers."""
    loguniform: tuple[float, float] | None = None
    """Evenly between the logarithms of two numbers above 0."""
    randint: tuple[int, int] | None = None
    """A whole number from the first up to, not including, the second."""
    choice: tuple[Any, ...] | None = None
    """One of these values."""
    grid: tuple[Any, ...] | None = None
    """Each of these values; several grids are crossed, and `trials` says how often the whole is repeated."""

    @model_validator(mode="after")
    def _is_one(self) -> SpaceConfig:
        given = {name: value for name, value in self if value is not None}
        if len(given) != 1:
            raise ValueError(f"give exactly one of uniform, loguniform, randint, choice, grid; got {sorted(given)}")
        ((name, value),) = given.items()
        if name in ("choice", "grid") and not value:
            raise ValueError(f"{name} is empty")
        if name in ("uniform", "loguniform", "randint") and value[0] >= value[1]:
            raise ValueError(f"{name}: {value[0]} is not below {value[1]}")
        if name == "loguniform" and value[0] <= 0:
            raise ValueError("loguniform needs numbers above 0")
        return self


class TuneJobConfig(Section):
    """`rlvid tune`: Ray Tune over any job's config."""

    seed: int = Field(0, ge=0)
    """Seeds the search. The jobs' own seed is a key of theirs."""
    dir: Path = Path("runs/tune")
    """Folder of the sweep: trials, their run folders, sweep.html, best.yaml. Started again it goes on."""
    job: Literal["grpo", "sft", "dpo", "isrt", "reward-model"]
    """What a trial runs."""
    config: Path
    """The job's config file; relative to the current directory."""
    overrides: tuple[str, ...] = ()
    """Overrides for all trials, key.sub=value."""
    space: dict[str, SpaceConfig]
    """Keys of the job's config and where their values are drawn from: train.lr: {loguniform: [1e-7, 1e-5]}."""
    metric: str = "eval/accuracy"
    """Name in metrics.jsonl that trials are compared by; a trial is judged each time it appears."""
    mode: Literal["max", "min"] = "max"
    """Whether more of it is better."""
    trials: int = Field(8, ge=1)
    """How many values are drawn."""
    parallel: int = Field(1, ge=1)
    """Trials at a time. Their actors find room by placement groups; those that find none wait."""
    search: Literal["random", "optuna"] = "random"
    """random (and grids), or Optuna's tree-structured Parzen estimator."""
    scheduler: Literal["none", "asha", "pbt"] = "asha"
    """asha: stops trials that lag behind at each rung (arXiv 1810.05934). pbt: weak trials take over weights and, with
    changes, values of strong ones (arXiv 1711.09846). none: all run to their end."""
    grace_steps: int = Field(10, ge=1)
    """asha: first step at which a trial may be stopped. pbt: steps between two changes. The step of a job's metrics; of
    isrt an iteration."""
    reduction_factor: float = Field(2.0, gt=1)
    """asha: of the trials at a rung one in so many goes on; each rung lies so many times as far as the last."""

    @model_validator(mode="after")
    def _can_be_searched(self) -> TuneJobConfig:
        if self.job == "isrt" and self.scheduler == "pbt":
            raise ValueError("population based training takes over checkpoints between steps, isrt has iterations")
        if not self.space:
            raise ValueError("space is empty: name at least one key of the job and where its values are drawn from")
        if fixed := sorted({o.split("=")[0] for o in self.overrides} & set(self.space)):
            raise ValueError(f"{fixed[0]} stands in overrides and in space: leave one out")
        if "run.dir" in {*self.space, *(o.split("=")[0] for o in self.overrides)}:
            raise ValueError("run.dir of a trial is the sweep's matter: set dir, the sweep's own")
        grids = [key for key, space in self.space.items() if space.grid is not None]
        if grids and self.search == "optuna":
            raise ValueError(f"space.{grids[0]}: Optuna takes no grid, give choice")
        if grids and self.scheduler == "pbt":
            raise ValueError(f"space.{grids[0]}: population based training takes no grid, give choice")
        return self
