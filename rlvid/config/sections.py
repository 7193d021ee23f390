"""Sections that most jobs share: model, data, video, training, rollout, placement.

A default is stated here, in `algorithms.py` or in `jobs.py`, and nowhere else. Each key's docstring is its meaning in
docs/configuration.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A group of keys. Unknown keys are refused, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)


class TinyModelConfig(Section):
    """A random model of the family's real architecture with a tokenizer trained on the manifest's text.

    Built into `model.path` (or the run folder) when there is none: nothing is downloaded.
    """

    family: Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics2", "video_llava", "qwen2", "qwen3"] = "qwen2_vl"
    """Architecture. Idefics2 and Video-LLaVA, which vLLM does not serve, cannot answer in a run. The last two see no
    video."""
    hidden_size: int = Field(128, ge=64, multiple_of=64)
    """Width of the language model. One head per 64 (vLLM on CPU refuses a head size of 16)."""
    layers: int = Field(4, ge=1)
    """Layers of the language model."""
    vision_size: int = Field(128, ge=16)
    """Width of the vision tower."""
    vision_layers: int = Field(2, ge=1)
    """Layers of the vision tower."""
    vocab_size: int = Field(512, ge=300)
    """Tokens of the byte-level BPE tokenizer, special tokens included."""


class LoraConfig(Section):
    """Low-rank adapters on the language model (LoRA, arXiv 2106.09685): only they are trained and sent to the engines,
    and the reference is the model with the adapters off."""

    rank: int = Field(16, ge=1, le=512)
    """Rank of the adapters."""
    alpha: float = Field(32.0, gt=0)
    """An adapter's output is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get an adapter, by the last part of their names."""


class ModelConfig(Section):
    """The policy's checkpoint, or a tiny random model in its place."""

    path: Path | None = None
    """Folder of a Hugging Face checkpoint (config, safetensors, tokenizer). Empty: `tiny` must be given."""
    tiny: TinyModelConfig | None = None
    """Make a tiny random model where `path` is empty."""
    lora: LoraConfig | None = None
    """Train adapters instead of the whole model."""
    freeze_vision: bool = False
    """Leave the vision tower as it is; what projects its features into the language model is trained all the same."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of weights and activations. float32 on CPU (bfloat16 dies with SIGILL on many), bfloat16 on GPU."""


class SyntheticConfig(Section):
    """Clips of moving shapes with exact questions and answers, made as real H.264 files."""

    train: int = Field(1024, ge=1)
    """Training clips."""
    eval: int = Field(256, ge=1)
    """Held-out clips."""
    size: int = Field(56, ge=28, multiple_of=2)
    """Width and height, pixels."""
    frames: int = Field(16, ge=4)
    """Frames in a file, 8 a second."""
    kinds: tuple[Literal["colour", "shape", "direction", "order", "count"], ...] = (
        "colour",
        "shape",
        "direction",
        "order",
        "count",
    )
    """Kinds of question, in equal shares."""

    @model_validator(mode="after")
    def _has_kinds(self) -> SyntheticConfig:
        if not self.kinds:
            raise ValueError("kinds is empty: name at least one kind of question")
        return self


class DataConfig(Section):
    """Manifests, the clips they name, and how many bad ones are borne."""

    train: Path | None = None
    """Manifest of training samples (JSON lines). Empty: the `synthetic` set is made."""
    eval: Path | None = None
    """Manifest of held-out samples. Ids shared with `train` are refused."""
    root: Path | None = None
    """Folder where relative paths of manifests start and all paths end up. Empty: the manifest's folder."""
    synthetic: SyntheticConfig | None = None
    """Make a synthetic set where `train` is empty."""
    max_bad_fraction: float = Field(0.25, ge=0.0, le=1.0)
    """The run stops when more than this share of the manifests' clips cannot be read."""
    cache_dir: Path = Path("~/.cache/rlvid/frames")
    """Decoded frames, shared by all runs."""
    cache_gib: float = Field(50.0, gt=0)
    """Size limit of the frame cache; the least recently used clips go first."""
    system_prompt: str | None = None
    """Put before every conversation that has no system turn of its own."""
    suffix: str = ""
    """Put after every question, for example how to format the answer."""


class VideoConfig(Section):
    """How clips are read: decoder, which frames, what size."""

    reader: Literal["pyav", "decord"] = "pyav"
    """Decoder. decord returns wrong frames for some files without an error: for comparison only."""
    sampling: Literal["linspace", "mid_segment", "fps", "first_seconds"] = "linspace"
    """Which frames: first to last evenly, middle of equal segments, by frame rate with a cap, or evenly in the first
    seconds."""
    frames: int = Field(8, ge=2)
    """Frames for linspace, mid_segment and first_seconds; cap for fps. Even: two frames make one patch."""
    fps: float = Field(2.0, gt=0)
    """Frames a second for fps sampling."""
    seconds: float = Field(10.0, gt=0)
    """Length for first_seconds sampling."""
    height: int | None = Field(None, ge=28)
    """Fixed height, pixels. Height and width go together."""
    width: int | None = Field(None, ge=28)
    """Fixed width, pixels."""
    max_pixels: int = Field(128 * 28 * 28, ge=28 * 28)
    """Largest area of a frame when no fixed size is given; the aspect ratio is kept."""
    timeout_s: float = Field(60.0, gt=0)
    """A clip that takes longer to read is bad (native decoders cannot be interrupted: the worker is stopped)."""

    @model_validator(mode="after")
    def _sizes_go_together(self) -> VideoConfig:
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width go together: give both or none")
        if self.frames % 2:
            raise ValueError(f"frames must be even, two frames make one patch; got {self.frames}")
        return self


class RunConfig(Section):
    """Run folder, checkpoints and tracking."""

    dir: Path = Path("runs/run")
    """Run folder: configuration, metrics, rollouts, checkpoints, report."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases mode."""
    project: str = "rlvid"
    """Weights & Biases project."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between checkpoints. One more is made at the end and at Ctrl-C."""
    keep_checkpoints: int = Field(2, ge=1)
    """The newest so many checkpoints are kept."""
    log_rollouts_every: int = Field(10, ge=1)
    """Steps between rollout tables (parquet) for the report."""


class ScheduleConfig(Section):
    """The learning rate over the steps of a phase."""

    lr: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up, over the phase's steps."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up from 0."""


class TrainConfig(ScheduleConfig):
    """Steps, batches, optimizer and memory of the trainer."""

    steps: int = Field(100, ge=0)
    """Rollout batches (GRPO) or optimizer steps (SFT)."""
    batch_size: int = Field(32, ge=1)
    """Prompts (GRPO) or samples (SFT) in a step."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW; of the warm start too, which uses the same optimizer."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this global norm."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Tokens in one forward, padding and vision patches counted."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage."""
    shared_prefix: bool = True
    """Forward a group's prompt once for all its responses."""
    max_workers: int | None = Field(None, ge=1)
    """Elastic training of sft, dpo, reward-model and isrt: up to this number of workers while the cluster has room, at
    least `placement.trainer_workers`. Empty: exactly `placement.trainer_workers`."""
    resize_interval_s: float = Field(60.0, ge=0)
    """Elastic: seconds between two checks for room for more workers. All workers restart from the last checkpoint."""
    max_failures: int = Field(3, ge=0)
    """sft, dpo, reward-model and isrt: worker failures after which the run stops. Before, all workers restart from the
    last checkpoint."""


class WarmStartConfig(ScheduleConfig):
    """Supervised steps on the training manifest's answers before reinforcement learning, with the same optimizer."""

    data: Path | None = None
    """Manifest of the warm start's samples. Empty: those of `data.train`; for `rlvid isrt` on a synthetic set its
    lessons, which teach to describe, to answer and to judge."""
    steps: int = Field(0, ge=0)
    """Optimizer steps; 0 leaves it out."""
    batch_size: int = Field(32, ge=1)
    """Samples in a step."""


class RolloutConfig(Section):
    """Generation: sampling, lengths, engines and their deadlines."""

    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; the trainer's log-probs are tempered alike."""
    max_tokens: int = Field(64, ge=1)
    """Longest response, tokens."""
    max_model_len: int = Field(4096, ge=16)
    """Context of the engine: prompt and response. A longer prompt is an error, never cut."""
    replicas: int = Field(1, ge=1)
    """Engines."""
    max_sequences: int = Field(256, ge=1)
    """Sequences that an engine decodes at a time."""
    max_batched_tokens: int = Field(8192, ge=16)
    """Tokens of one engine step."""
    block_size: int | None = Field(None, ge=1)
    """Tokens in a block of the key-value cache, the unit in which a group shares its prompt; empty: 32 on CPU, vLLM's
    choice on GPU."""
    max_videos: int = Field(8, ge=1)
    """Most videos in a prompt."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs an engine is spread over."""
    kv_cache_gib: int = Field(1, ge=1)
    """Key-value cache of a CPU engine."""
    gpu_memory_utilization: float = Field(0.45, gt=0, le=1)
    """Share of a GPU's memory for an engine."""
    timeout_s: float = Field(600.0, gt=0)
    """Deadline of one generate call."""
    weight_transfer: Literal["auto", "buckets", "nccl", "ipc"] = "auto"
    """How weights reach the engines. buckets: through Ray's object store, on CPU and GPU. nccl: from GPU to GPU. ipc:
    between processes on the same GPU. auto: buckets on CPU and for adapters; ipc where trainer and engine share a GPU;
    else nccl."""
    sync_timeout_s: float = Field(300.0, gt=0)
    """Deadline of one weight update."""
    max_restarts: int = Field(3, ge=0)
    """A replica that died more often stays dead; the run stops when none is left."""


class EvaluateConfig(Section):
    """Greedy answers to the held-out manifest while a run goes on."""

    every: int = Field(50, ge=1)
    """Steps between greedy evaluations; one is always made before the first and after the last step."""
    max_samples: int | None = Field(None, ge=1)
    """Use only so many held-out samples, the first of the manifest."""
    batch_size: int = Field(256, ge=1)
    """Prompts given to the engines at a time."""


class PlacementConfig(Section):
    """Where the actors go. Every replica and the trainer group get placement groups of their own."""

    colocate: bool = True
    """Trainer rank i and generator i share a GPU, half each, or have their own."""
    gpus: float = Field(0, ge=0)
    """GPUs of one trainer rank, and of one generator per `rollout.tensor_parallel`; 0 runs on CPU."""
    trainer_workers: int = Field(1, ge=1)
    """Trainer ranks."""
    trainer_cpus: float = Field(0.5, gt=0)
    """CPUs reserved per trainer rank."""
    generator_cpus: float = Field(0.5, gt=0)
    """CPUs reserved per generator."""
    reference_cpus: float = Field(0.25, gt=0)
    """CPUs reserved by the reference model, and by each reward model of `rewards`."""
    encode_cpus: float = Field(0.25, gt=0)
    """CPUs reserved per encoder."""
    encoders: int = Field(2, ge=1)
    """Processes that decode clips and make prompts."""
    reward_workers: int = Field(1, ge=1)
    """Actors that compute rewards."""
    reward_cpus: float = Field(0.1, gt=0)
    """CPUs reserved per reward worker."""
    timeout_s: float = Field(900.0, gt=0)
    """How long to wait for room in the cluster; nodes may have to be started."""
    threads: int | None = Field(None, ge=1)
    """Torch threads of each actor on CPU; default: the machine's cores."""
