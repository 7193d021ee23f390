"""Sections of what a job does: its run folder, training, generation, evaluation, places and limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from rlvid.config.section import MIN_TEMPERATURE, InputFile, LocalPath, Section, changeable


class RunConfig(Section):
    """Run folder, checkpoints and tracking."""

    dir: LocalPath = Path("runs/run")
    """Run folder: configuration, metrics, rollouts, checkpoints, report."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases mode."""
    project: str = "rlvid"
    """Weights & Biases project."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between checkpoints. A checkpoint is also written at the end and at Ctrl-C."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of checkpoints to keep, the newest ones."""
    checkpoint_in_background: bool = True
    """Write a checkpoint while training continues: its steps wait for a copy in the host's memory, not for the disk."""
    export_every: int | None = Field(1, ge=1)
    """Export `policy/` with every k-th checkpoint too, so that a run that was stopped leaves a model. Empty: only at
    the end."""
    dump_every: int | None = Field(None, ge=1)
    """grpo, ppo: steps between dumps of all that a step was trained on (dumps/step_N), for `rlvid replay`. Empty:
    none."""
    log_rollouts_every: int = Field(10, ge=1)
    """Steps between rollout tables (parquet) for the report."""


class ScheduleConfig(Section):
    """The learning rate over the steps of a phase."""

    lr: float = changeable(1e-6, "a run that diverged may resume with a lower one", gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up, over the phase's steps."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up from 0."""


class TrainConfig(ScheduleConfig):
    """Steps, batches, optimizer and memory of the trainer."""

    steps: int = changeable(100, "a run may be made longer or shorter", ge=0)
    """Rollout batches (grpo) or optimizer steps (other jobs)."""
    batch_size: int = Field(32, ge=1)
    """Prompts (grpo), pairs or samples (other jobs) in a step."""
    lr_factors: dict[Literal["tower", "projector", "text"], Annotated[float, Field(ge=0)]] = Field({})
    """Learning rates of the model's parts in multiples of `lr`, 1 where not named; 0 freezes a part, as in {tower: 0,
    projector: 10}. The tower reads patches, the projector maps its features for the language model, which is text."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas. The warm start uses the same optimizer."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this global norm."""
    micro_batch_tokens: int = changeable(16384, "memory; the gradient is the same up to rounding", ge=1)
    """Tokens in one forward, padding and vision patches included."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage."""
    shared_prefix: bool = changeable(True, "memory and speed; the gradient is the same up to rounding")
    """Forward a group's prompt once for all its responses."""
    activation_checkpointing: bool | None = changeable(
        None, "memory and speed; the gradient is the same up to rounding"
    )
    """Keep only the input of each layer of vision tower and language model, and compute its activations again in the
    backward: less memory, for the time of one more forward. Empty: on a GPU yes, on CPU no."""
    offload_activations: bool = changeable(False, "memory and speed; the gradient is the same")
    """Keep what the backward needs of the forward in the host's memory instead of the GPU's."""
    offload_optimizer: bool = changeable(False, "memory and speed; the step is the same up to rounding")
    """Keep AdamW's moments and its copy of the weights in the host's memory, and do its step there. Needs `zero_stage`
    1 or more."""
    max_skipped: int = changeable(3, "when to give up", ge=1)
    """A step whose loss or gradient is not finite is skipped. After this many in a row the run stops, without a
    checkpoint."""
    max_workers: int | None = changeable(None, "a run may continue with another number of workers", ge=1)
    """Elastic training of sft, dpo, reward-model and isrt: up to this number of workers while the cluster has room, at
    least `placement.trainer_workers`. Empty: exactly `placement.trainer_workers`."""
    resize_interval_s: float = changeable(60.0, "when workers may be added", ge=0)
    """Elastic: seconds between two checks for room for more workers. All workers restart from the last checkpoint."""
    max_failures: int = changeable(3, "when to give up", ge=0)
    """Failures of a worker, or a rank of the trainer, after which the run stops. Before, all of them restart from the
    last checkpoint. The same number holds for the ranks of the reference."""


class WarmStartConfig(ScheduleConfig):
    """Supervised steps on the training manifest's answers before reinforcement learning, with the same optimizer."""

    data: InputFile | None = None
    """Manifest of the warm start's samples. Empty: those of `data.train`; for `rlvid isrt` on a synthetic set its
    lessons, which teach to describe, to answer and to judge."""
    steps: int = Field(0, ge=0)
    """Optimizer steps; 0 for no warm start."""
    batch_size: int = Field(32, ge=1)
    """Samples in a step."""


class RolloutConfig(Section):
    """Generation: sampling, lengths and engines."""

    temperature: float = Field(1.0, ge=MIN_TEMPERATURE)
    """Sampling temperature. The trainer divides its logits by the same value. vLLM raises a temperature below 0.01 to
    0.01, so a smaller one would make the two disagree."""
    max_tokens: int = Field(64, ge=1)
    """Longest response, tokens."""
    max_model_len: int = changeable(4096, "memory of an engine", ge=16)
    """Context of the engine: prompt and response, tokens. A longer prompt is an error, prompts are never cut."""
    replicas: int = changeable(1, "which engine answers does not change the distribution of answers", ge=1)
    """Number of engines; with `max_replicas` the smallest number."""
    max_replicas: int | None = changeable(
        None, "which engine answers does not change the distribution of answers", ge=1
    )
    """Up to this number of engines while the cluster has room: they join a run when it gets room, and leave with their
    node. Empty: exactly `replicas`."""
    max_sequences: int = changeable(256, "memory of an engine", ge=1)
    """Sequences that an engine decodes at the same time."""
    max_batched_tokens: int = changeable(8192, "memory of an engine", ge=16)
    """Tokens of one engine step."""
    block_size: int | None = changeable(None, "memory of an engine", ge=1)
    """Tokens in a block of the key-value cache, the unit in which a group shares its prompt. Empty: 32 on CPU, vLLM's
    choice on GPU."""
    max_videos: int = changeable(8, "memory of an engine", ge=1)
    """Largest number of videos in a prompt, and of images."""
    tensor_parallel: int = changeable(1, "a run may continue on other machines", ge=1)
    """GPUs that an engine is split over."""
    kv_cache_gib: int = changeable(1, "memory of an engine", ge=1)
    """Key-value cache of an engine on CPU."""
    gpu_memory_utilization: float = changeable(0.45, "memory of an engine", gt=0, le=1)
    """Share of a GPU's memory for an engine."""
    sleep: bool | None = changeable(None, "memory of an engine")
    """An engine gives up its GPU memory while the trainer works, and has it again with the next weights (vLLM's sleep
    mode). Empty: where it shares a trainer's GPU, in jobs that do not generate meanwhile (`async_steps` 0)."""
    weight_transfer: Literal["auto", "buckets", "nccl", "ipc"] = changeable("auto", "transport of the same weights")
    """How weights reach the engines. buckets: through Ray's object store, on CPU and GPU. nccl: from GPU to GPU. ipc:
    between processes on the same GPU. auto: buckets on CPU and for adapters; ipc where trainer and engine share a GPU;
    otherwise nccl."""
    max_restarts: int = changeable(3, "when to give up", ge=0)
    """Restarts of a replica. One that fails again stays dead. The run stops when no replica is left."""


class EvaluateConfig(Section):
    """Evaluation on the held-out manifest: greedy answers; in sft, dpo and reward-model what is trained."""

    every: int = Field(50, ge=1)
    """Steps between evaluations. There is always one before the first and one after the last step."""
    max_samples: int | None = Field(None, ge=1)
    """Evaluate only the first samples of the held-out manifest, up to this number."""
    batch_size: int = Field(64, ge=1)
    """Prompts given to each worker, or to the engines, at a time; these have the next batch already. Answers are
    written to the disk after each batch."""
    views: tuple[Literal["blank", "shuffled", "reversed", "one_frame"], ...] = ()
    """Where answers are generated: evaluate with each of these in place of the videos, too. blank: black frames.
    shuffled: the frames in another order. reversed: the last first. one_frame: the middle one all the time. A model
    that needs the video has a lower accuracy in all of them."""
    best: Literal["loss", "accuracy", "margin", "spearman"] | None = None
    """sft, dpo, reward-model: `policy/` is the model of the best evaluation by this metric, not that of the last step.
    Empty: the last. In sft, accuracy is the share of samples whose greedy answer is the manifest's, word for word."""
    patience: int | None = Field(None, ge=1)
    """With `best`: stop after this number of evaluations in a row that are no better. Empty: train all steps."""

    def faults(self) -> Iterator[str]:
        if self.patience and not self.best:
            yield "patience needs a metric: set best too"


class PlacementConfig(Section):
    """Where the actors run. Every replica and the trainer group have placement groups of their own."""

    colocate: bool = True
    """Trainer rank i, generator i and rank i of the reference share a GPU. false: each has its own."""
    gpus: float = Field(0, ge=0)
    """GPUs of one trainer rank, and of one generator per `rollout.tensor_parallel`: 1, or a share of one. 0: everything
    runs on CPU."""
    trainer_workers: int = Field(1, ge=1)
    """Trainer ranks, and ranks of the reference."""
    trainer_cpus: float = Field(0.5, gt=0)
    """CPUs reserved per trainer rank."""
    generator_cpus: float = Field(0.5, gt=0)
    """CPUs reserved per generator."""
    reference_cpus: float = Field(0.25, gt=0)
    """CPUs reserved per rank of the reference, and by each reward model of `rewards`."""
    encode_cpus: float = Field(0.25, gt=0)
    """CPUs reserved per encoder."""
    encoders: int = Field(2, ge=1)
    """Processes that decode clips and make prompts."""
    reward_workers: int = Field(1, ge=1)
    """Actors that compute rewards."""
    reward_cpus: float = Field(0.1, gt=0)
    """CPUs reserved per reward worker."""
    threads: int | None = Field(None, ge=1)
    """Torch threads of each actor on CPU. Empty: the machine's number of cores."""

    def faults(self) -> Iterator[str]:
        if self.gpus > 1:
            yield (
                f"placement.gpus={self.gpus:g}: a trainer rank uses one GPU. Set placement.gpus to 1 and "
                f"placement.trainer_workers to the number of GPUs; an engine is split by rollout.tensor_parallel"
            )


class DeadlinesConfig(Section):
    """How long each call between the processes of a run may take. What takes longer has failed: a generator is
    replaced, any other process ends the run. When a clip counts as bad is `video.timeout_s`."""

    room_s: float = Field(900.0, gt=0)
    """For the cluster to have room for an actor. Nodes may have to start first."""
    start_s: float = Field(600.0, gt=0)
    """For a generator to load its model."""
    generate_s: float = Field(600.0, gt=0)
    """For a generator to answer the prompts of one message: up to `rollout.max_tokens` for its share of a step."""
    sync_s: float = Field(300.0, gt=0)
    """For a generator to take new weights, from its first bucket to its last."""
    heartbeat_s: float = Field(30.0, gt=0)
    """Without any sign of life of a generator, until it gets no new work. It answers while its engine computes."""
    suspect_s: float = Field(60.0, gt=0)
    """From then on until it is replaced."""
    train_s: float = Field(3600.0, gt=0)
    """For the trainer: a step, scoring a batch, a checkpoint, an export."""
    reward_s: float = Field(120.0, gt=0)
    """For a reward worker to score the responses to one prompt; it is replaced and asked once more."""
    model_s: float = Field(600.0, gt=0)
    """For a reward model to score its share of a step."""


class ParityConfig(Section):
    """How far the log-probs of engine and trainer may be apart, at the start of a run, for the same tokens.

    In bfloat16 two right implementations differ by rounding: a logit between 16 and 32 has steps of 0.125, so single
    tokens may be further apart than any useful limit. The mean and a high quantile are not moved by one of them; a side
    that sees another video is off by more in most tokens.
    """

    mean: float | None = Field(None, gt=0)
    """Largest mean difference. Empty: 1e-4 in float32, 0.05 in bfloat16 (measured: 0.013 for a random model of 2
    billion parameters)."""
    quantile: float = Field(0.95, gt=0, le=1)
    """The quantile that `at_quantile` limits; 1 is the maximum."""
    at_quantile: float | None = Field(None, gt=0)
    """Largest difference at the quantile. Empty: 1e-4 in float32, 0.2 in bfloat16."""
