"""Sections that most jobs share: model, data, video, training, rollout, placement.

A default is stated here, in `algorithms.py`, `rewards.py` or `jobs.py`, and nowhere else. Each key's docstring is its
meaning in docs/configuration.md.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)


def changeable(default: Any, why: str, **bounds: Any) -> Any:
    """A field whose value may change when a run is resumed. `why` is printed in docs/configuration.md."""
    return Field(default, json_schema_extra={"on_resume": why}, **bounds)


def refuse_if(is_wrong: object, message: str) -> None:
    """A rule of a validator. Messages name keys in full, so that the loader finds the line they were written in."""
    if is_wrong:
        raise ValueError(message)


class Section(BaseModel):
    """A group of keys. Unknown keys, infinite numbers and keys without an effect are refused; assignments are checked
    too."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    needs: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Key -> (another key, its values that the first has an effect with). Otherwise the key must be at its default."""

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_not_booleans(cls, data: Any) -> Any:
        """pydantic takes `true` for 1."""
        for key, value in data.items() if isinstance(data, dict) else ():
            types = repr(cls.model_fields[key].annotation) if key in cls.model_fields else "bool"
            items = value if isinstance(value, list | tuple) else (value,)
            if any(isinstance(item, bool) for item in items) and re.search(r"\b(int|float)\b", types):
                raise ValueError(f"{key} must be a number, got {'a list with ' * (items is value)}true or false")
        return data

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> Section:
        for key, (switch, *values) in self.needs.items():
            is_default, setting = (
                getattr(self, key) == type(self).model_fields[key].get_default(),
                getattr(self, switch),
            )
            fitting = " or ".join("empty" if value is None else str(value) for value in values)
            message = f"{key} has no effect with {switch}={setting}: it needs {switch}={fitting}. Leave it out"
            refuse_if(not is_default and setting not in values, message)
        return self


# --- types of values --------------------------------------------------------------------------------------------------


def _check_local(value: Any) -> Any:
    if isinstance(value, str | Path):
        is_url = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(value))
        refuse_if(is_url, f"{value} is a URL; expected a path on a local or mounted disk")
        refuse_if(not str(value).strip(), "the path is empty text; write null for no path")
    return value


def _expand_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"no home folder for {path}; write the path in full") from None


def _local_path(kind: str) -> Any:
    """Marks a path. `kind` is its `format` in the JSON schema, which `keys.check_paths` reads."""
    return WithJsonSchema({"type": "string", "format": kind})


_LocalPath = Annotated[Path, AfterValidator(_expand_home), BeforeValidator(_check_local)]
LocalPath = Annotated[_LocalPath, _local_path("path")]
"""A path that a job may create. A leading `~` is the home folder."""
InputFile = Annotated[_LocalPath, _local_path("file-path")]
"""A file that must exist before a job starts."""
InputFolder = Annotated[_LocalPath, _local_path("directory-path")]
"""A folder that must exist before a job starts."""
Checkpoint = Annotated[_LocalPath, _local_path("checkpoint-path")]
"""A Hugging Face checkpoint folder that must exist before a job starts."""

MIN_TEMPERATURE = 0.01  # vLLM raises a smaller one to this, and its log-probs would differ from the trainer's


def _check_temperature(value: float) -> float:
    message = f"temperature {value:g} is below {MIN_TEMPERATURE}, the lowest that vLLM samples with; 0 is greedy"
    refuse_if(0 < value < MIN_TEMPERATURE, message)
    return value


GreedyOrTemperature = Annotated[float, Field(ge=0), AfterValidator(_check_temperature)]
"""A sampling temperature; 0 is greedy decoding."""


# --- sections ---------------------------------------------------------------------------------------------------------


class TinyModelConfig(Section):
    """A random model with the family's real architecture and a tokenizer trained on the manifest's texts.

    Built in the run folder when `model.path` is empty. Nothing is downloaded.
    """

    family: Literal[
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "llava_onevision",
        "llava_next_video",
        "internvl",
        "smolvlm",
        "video_llama_3",
        "idefics2",
        "video_llava",
        "cobra",
        "qwen2",
        "qwen3",
    ] = "qwen2_vl"
    """Architecture. docs/families.md says which media each takes, and which of them vLLM serves."""
    hidden_size: int = Field(128, ge=64, multiple_of=64)
    """Width of the language model. One attention head per 64 (vLLM on CPU refuses a head size of 16)."""
    layers: int = Field(4, ge=1)
    """Layers of the language model."""
    vision_size: int = Field(128, ge=16)
    """Width of the vision tower."""
    vision_layers: int = Field(2, ge=1)
    """Layers of the vision tower."""
    vocab_size: int = Field(512, ge=300)
    """Tokens of the byte-level BPE tokenizer, special tokens included."""


class LoraConfig(Section):
    """Low-rank adapters on the language model (LoRA, arXiv 2106.09685). Only the adapters are trained and sent to the
    engines; the reference is the model with the adapters it began with."""

    rank: int = Field(16, ge=1, le=512)
    """Rank of the adapters."""
    alpha: float = Field(32.0, gt=0)
    """An adapter's output is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get an adapter, by the last part of their names."""


class ModelConfig(Section):
    """The policy's checkpoint, or a tiny random model instead."""

    path: Checkpoint | None = None
    """Folder of a Hugging Face checkpoint (config, safetensors, tokenizer). Empty: `tiny` is required."""
    tiny: TinyModelConfig | None = None
    """Make a tiny random model if `path` is empty."""
    lora: LoraConfig | None = None
    """Train adapters instead of the whole model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of weights and activations. Use float32 on CPU (bfloat16 stops with SIGILL on many), bfloat16 on
    GPU."""


class SyntheticConfig(Section):
    """Clips of moving shapes with exact questions and answers, written as real H.264 files."""

    train: int = Field(1024, ge=1)
    """Number of training clips."""
    eval: int = Field(256, ge=1)
    """Number of held-out clips."""
    size: int = Field(56, ge=28, multiple_of=2)
    """Width and height, pixels."""
    frames: int = Field(16, ge=4)
    """Frames in a file, at 8 per second."""
    kinds: tuple[Literal["colour", "shape", "direction", "order", "count"], ...] = Field(
        ("colour", "shape", "direction", "order", "count"), min_length=1
    )
    """Kinds of question, in equal shares."""


Dialect = Literal[
    "hound", "llava", "mesc", "mmla", "mmla_text", "rlaif", "sharegpt", "swift", "video_r1", "videofeedback"
]


class MixedConfig(Section):
    """Manifests of one source of a mix."""

    train: InputFile | None = None
    """Manifest of training samples."""
    eval: InputFile | None = None
    """Manifest of held-out samples."""
    weight: float = Field(1.0, gt=0)
    """How often each of its samples is drawn in an epoch, on average."""
    dialect: Dialect | None = None
    """Form of its files. Empty: that of `data.dialect`."""
    root: InputFolder | None = None
    """Where its relative paths start. Empty: `data.root`."""


class DataConfig(Section):
    """Manifests, the clips they name, and the share of bad clips that is tolerated."""

    train: InputFile | None = None
    """Manifest of training samples (JSON lines, a JSON list or parquet). Empty: the `synthetic` set is made."""
    eval: InputFile | None = None
    """Manifest of held-out samples. An id that `train` has too is an error."""
    mix: dict[str, MixedConfig] = {}
    """Several sources in place of `train` and `eval`, each with a name, which is put before the ids of its samples."""
    balance: Literal["answer", "problem_type"] | None = None
    """Draw the samples of frequent answers, or problem types, less often and those of rare ones more often, so that all
    are trained equally often. An epoch keeps its length. Empty: each sample once an epoch."""
    dialect: Dialect | None = None
    """Form of `train` and `eval`, which are read as they were published; items that cannot be used are left out and
    listed in refused.jsonl. Empty: manifests (`rlvid data convert --help` says what each dialect is)."""
    path_map: dict[str, str] = {}
    """Beginnings of paths in published files, and what to put in their place: {/their/videos: /my/videos}."""
    root: InputFolder | None = None
    """Where relative paths of manifests start; all paths must stay in it. Empty: the manifest's folder."""
    synthetic: SyntheticConfig | None = None
    """Make a synthetic set if `train` is empty."""
    max_bad_fraction: float = changeable(0.25, "when to give up", ge=0.0, le=1.0)
    """The run stops when more than this share of the manifests' clips cannot be read."""
    cache_dir: LocalPath = changeable(
        Path("~/.cache/rlvid/frames"), "a cached clip equals a decoded one", validate_default=True
    )
    """Folder of decoded frames, shared by all runs."""
    cache_gib: float = changeable(50.0, "a cached clip equals a decoded one", gt=0)
    """Size limit of the frame cache. The least recently used clips are removed first."""
    system_prompt: str | None = None
    """System turn of every conversation that has none."""
    suffix: str = ""
    """Text after every question, for example how to format the answer."""

    @model_validator(mode="after")
    def _dialects_are_of_files(self) -> DataConfig:
        is_made = self.train is None and self.synthetic is not None
        refuse_if(
            self.dialect is not None and is_made and not self.mix,
            f"dialect={self.dialect} is of published files, and synthetic makes a manifest: give train",
        )
        dialects = [self.dialect, *(part.dialect for part in self.mix.values())]
        refuse_if(self.path_map and not any(dialects), "path_map has no effect without dialect: set it too")
        refuse_if(
            self.mix and (self.train or self.eval or self.synthetic),
            "mix takes the place of train, eval and synthetic: leave those out, or give them as a part of mix",
        )
        return self

    @property
    def sources(self) -> dict[str, DataConfig]:
        """The parts of `mix` by their names, each as the data of a run of its own; without a mix "" and this."""
        own = ("train", "eval", "dialect", "root")
        return {
            name: self.model_copy(update={key: getattr(part, key) or getattr(self, key) for key in own} | {"mix": {}})
            for name, part in self.mix.items()
        } or {"": self}


class VideoConfig(Section):
    """How clips are read: decoder, which frames, what size."""

    reader: Literal["pyav", "decord"] = "pyav"
    """Decoder. decord returns wrong frames for some files without an error: use it for comparison only."""
    sampling: Literal["linspace", "mid_segment", "fps", "first_seconds"] = "linspace"
    """Which frames. linspace: evenly from first to last. mid_segment: the middle of equal segments. fps: by frame rate
    up to `frames`. first_seconds: evenly in the first seconds."""
    frames: int = Field(8, ge=2, multiple_of=2)
    """Number of frames for linspace, mid_segment and first_seconds; upper limit for fps. Even: two frames make one
    patch."""
    fps: float = Field(2.0, gt=0)
    """sampling=fps: frames per second."""
    seconds: float = Field(10.0, gt=0)
    """sampling=first_seconds: length in seconds."""
    height: int | None = Field(None, ge=28)
    """Fixed height, pixels. Give height and width together."""
    width: int | None = Field(None, ge=28)
    """Fixed width, pixels."""
    max_pixels: int = Field(128 * 28 * 28, ge=28 * 28)
    """Largest area of a frame if no fixed size is given. The aspect ratio is kept."""
    image_max_pixels: int = Field(1024 * 28 * 28, ge=28 * 28)
    """Largest area of an image. The aspect ratio is kept, also where clips have a fixed size."""
    timeout_s: float = changeable(60.0, "a deadline", gt=0)
    """A clip that takes longer to read is bad. Its process is stopped, because native decoders cannot be
    interrupted."""

    needs: ClassVar = {
        "fps": ("sampling", "fps"),
        "seconds": ("sampling", "first_seconds"),
        "max_pixels": ("height", None),
    }

    @model_validator(mode="after")
    def _sizes_go_together(self) -> VideoConfig:
        refuse_if((self.height is None) != (self.width is None), "height and width go together: give both or none")
        return self


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
    lr_factors: dict[Literal["tower", "projector", "text"], Annotated[float, Field(ge=0)]] = {}
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
    batch_size: int = Field(256, ge=1)
    """Prompts given to the engines, or to each worker, at a time."""
    best: Literal["loss", "accuracy", "margin", "spearman"] | None = None
    """sft, dpo, reward-model: `policy/` is the model of the best evaluation by this metric, not that of the last step.
    Empty: the last."""
    patience: int | None = Field(None, ge=1)
    """With `best`: stop after this number of evaluations in a row that are no better. Empty: train all steps."""

    @model_validator(mode="after")
    def _patience_is_for_a_metric(self) -> EvaluateConfig:
        refuse_if(self.patience and not self.best, "patience needs a metric: set best too")
        return self


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

    @field_validator("gpus")
    @classmethod
    def _a_rank_uses_one_gpu(cls, gpus: float) -> float:
        message = (
            f"placement.gpus={gpus:g}: a trainer rank uses one GPU. Set placement.gpus to 1 and "
            f"placement.trainer_workers to the number of GPUs; an engine is split by rollout.tensor_parallel"
        )
        refuse_if(gpus > 1, message)
        return gpus
