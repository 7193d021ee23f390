"""Every key of every job, its default and its meaning. The only place where a default stands.

Reading files and overrides, and turning mistakes into readable errors, is `rlvid/config_file.py`'s part.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlvid.rewards.videoscore import DIMS, DIMS2, Rubric


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
    """Folder that video paths must stay under. Empty: the manifest's folder."""
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


class WarmStartConfig(ScheduleConfig):
    """Supervised steps on the training manifest's answers before reinforcement learning, with the same optimizer."""

    data: Path | None = None
    """Manifest of the warm start's samples. Empty: those of `data.train`; for `rlvid isrt` on a synthetic set its
    lessons, which teach to describe, to answer and to judge."""
    steps: int = Field(0, ge=0)
    """Optimizer steps; 0 leaves it out."""
    batch_size: int = Field(32, ge=1)
    """Samples in a step."""


class GrpoConfig(Section):
    """Groups, clipping, KL term and averages."""

    group_size: int = Field(8, ge=2)
    """Responses per prompt."""
    minibatches: int = Field(1, ge=1)
    """Optimizer steps per pass over a rollout batch."""
    epochs: int = Field(1, ge=1)
    """Passes over a rollout batch."""
    normalise_std: bool = True
    """Divide the advantage by the group's standard deviation (off: Dr. GRPO)."""
    clip_low: float = Field(0.2, ge=0, lt=1)
    """The importance ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(0.2, ge=0)
    """The importance ratio is clipped above at 1 + clip_high."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL to the reference model in the loss. 0: no reference model is started."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL from samples (Schulman, joschu.net/blog/kl-approx.html)."""
    loss_average: Literal["token", "sequence"] = "token"
    """Mean over all response tokens of the batch, or over each response first."""
    old_logprobs: Literal["rollout", "trainer"] = "rollout"
    """Log-probs that the ratio is taken to: the engine's own, or the trainer's before its first update (one more
    forward, unless there is only one update)."""


class DpoConfig(Section):
    """Loss on preference pairs, its reference, and the workers of Ray Train."""

    loss: Literal["sigmoid", "ipo", "robust", "kto", "simpo", "orpo"] = "sigmoid"
    """sigmoid: DPO (arXiv 2305.18290), with `label_smoothing` cDPO. robust: arXiv 2403.00409. ipo: arXiv 2310.12036.
    kto: arXiv 2402.01306, each pair as a desirable and an undesirable response. simpo: arXiv 2405.14734. orpo: arXiv
    2403.07691 (set sft_weight=1). The last two need no reference."""
    beta: float = Field(0.1, gt=0)
    """Scale of the log-ratios; for orpo the weight of its odds-ratio term."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs that are taken to be the wrong way round (sigmoid, robust)."""
    simpo_margin: float = Field(0.5, ge=0)
    """simpo: target of the reward difference (gamma in the paper)."""
    chosen_weight: float = Field(1.0, ge=0)
    """kto: weight of the desirable responses."""
    rejected_weight: float = Field(1.0, ge=0)
    """kto: weight of the undesirable responses."""
    loss_weight: float = Field(1.0, ge=0)
    """Weight of the preference loss (alpha of LLaVA-Hound)."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of the chosen responses' negative log-likelihood, a mean over tokens (gamma of LLaVA-Hound)."""
    logprobs: Literal["auto", "sum", "mean"] = "auto"
    """Log-probs of a response: summed over its tokens or their mean. auto: mean for ipo, simpo and orpo, else sum."""
    reference: Literal["frozen", "precomputed"] = "frozen"
    """frozen: a second copy of the model in each worker; with `model.lora` none, the adapters are switched off.
    precomputed: all pairs are scored once before the first step and kept in the run folder."""
    reference_path: Path | None = None
    """Checkpoint folder of the reference; empty: the model that training starts from."""
    max_workers: int | None = Field(None, ge=1)
    """Elastic: Ray Train uses up to so many workers as the cluster has room, and goes on with fewer, but at least
    `placement.trainer_workers`. Empty: exactly those."""
    resize_interval_s: float = Field(60.0, ge=0)
    """Elastic: how often to look whether the cluster has room for more workers. They start anew from the last
    checkpoint."""
    max_failures: int = Field(3, ge=0)
    """A worker that dies starts the workers anew from the last checkpoint, so many times."""

    @property
    def is_mean(self) -> bool:
        """Log-probs per token rather than summed."""
        return self.loss in ("ipo", "simpo", "orpo") if self.logprobs == "auto" else self.logprobs == "mean"

    @property
    def needs_reference(self) -> bool:
        return self.loss not in ("simpo", "orpo")

    @model_validator(mode="after")
    def _loss_has_what_it_needs(self) -> DpoConfig:
        if self.loss in ("simpo", "orpo") and not self.is_mean:
            raise ValueError(f"loss={self.loss} is defined on mean log-probs: leave logprobs at auto")
        if self.loss == "orpo" and not self.sft_weight:
            raise ValueError("loss=orpo is an odds ratio beside the chosen response's likelihood: set sft_weight to 1")
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ValueError(f"label_smoothing belongs to sigmoid and robust, not to {self.loss}")
        if not self.loss_weight and not self.sft_weight:
            raise ValueError("loss_weight and sft_weight are both 0: nothing would be learned")
        return self


class RewardModelConfig(Section):
    """What a reward model scores, and how."""

    kind: Literal["regression", "generation", "thinking", "bradley_terry"] = "regression"
    """regression: a number per dimension from a head on the prompt's last token, mean squared error to the labels
    (VideoScore). generation: the scores as text, a line `name: integer` per dimension. thinking: reasoning, then the
    scores (VideoScore2); the manifest's answers are learned. bradley_terry: one number from a head on the last token of
    a response, -log sigmoid of chosen minus rejected."""
    template: Literal["integer", "float", "thinking", "question"] = "integer"
    """The prompt around a row's `prompt`, in training and later in scoring alike. integer, float: VideoScore's two.
    thinking: VideoScore2's. question: the manifest's own question, nothing around it."""
    dims: tuple[str, ...] = ()
    """Names of the dimensions, the keys of a row's `labels`. Empty: those of the template."""
    scale: tuple[int, int] | None = None
    """Lowest and highest score; empty: 1 to 4, for thinking 1 to 5. A label off the scale is refused."""

    @property
    def names(self) -> tuple[str, ...]:
        """The dimensions in their order."""
        if self.kind == "bradley_terry":
            return ("reward",)
        return self.dims or (DIMS2 if self.template == "thinking" else DIMS)

    @property
    def bounds(self) -> tuple[int, int]:
        return self.scale or ((1, 5) if self.kind == "thinking" else (1, 4))

    @model_validator(mode="after")
    def _template_names_dims(self) -> RewardModelConfig:
        if self.kind == "bradley_terry" and self.template != "question":
            raise ValueError("kind=bradley_terry scores answers to the manifest's questions: set template to question")
        if (self.kind == "thinking") != (self.template == "thinking"):
            raise ValueError(f"kind={self.kind} and template={self.template} do not go together: thinking needs both")
        fixed = {"integer": DIMS, "float": DIMS, "thinking": DIMS2}.get(self.template)
        if fixed and self.dims and self.dims != fixed:
            raise ValueError(f"template={self.template} asks for {', '.join(fixed)}: leave dims empty, or set template")
        if len(set(self.names)) != len(self.names) or any(": " in n or "\n" in n or not n.strip() for n in self.names):
            raise ValueError("dims must be different names on one line each, without a colon and a space")
        if not 0 <= self.bounds[0] < self.bounds[1] <= 9:
            raise ValueError(f"scale={list(self.bounds)} must be two digits, the lower first")
        return self


class JudgeConfig(Section):
    """Who compares responses, and what happens when it cannot."""

    backend: Literal["policy", "local", "endpoint"] = "policy"
    """policy: the model that is trained judges itself. local: another checkpoint (`path`) judges, the same for the
    whole run. endpoint: an OpenAI-compatible server (`url`)."""
    path: Path | None = None
    """local: folder of the judge's checkpoint."""
    url: str | None = None
    """endpoint: where the API begins, for example http://localhost:8000/v1."""
    model: str | None = None
    """endpoint: name of the model there. Pin a version: another one is another judge."""
    api_key_env: str = "OPENAI_API_KEY"
    """endpoint: environment variable that holds the key, if the server wants one."""
    send_frames: bool = False
    """endpoint: send up to six frames of each video as JPEG. Otherwise it judges by the texts alone."""
    concurrency: int = Field(8, ge=1)
    """endpoint: requests at a time."""
    timeout_s: float = Field(60.0, gt=0)
    """endpoint: deadline of one try."""
    deadline_s: float = Field(300.0, gt=0)
    """endpoint: deadline of one question with all its tries; after it the verdict is invalid."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature of the judge; 0 is greedy."""
    max_tokens: int = Field(64, ge=1)
    """Longest answer of the judge, tokens."""
    max_invalid_fraction: float = Field(0.25, ge=0, le=1)
    """The run stops when more than this share of the verdicts is unparsed or failed."""

    @model_validator(mode="after")
    def _backend_is_named(self) -> JudgeConfig:
        if self.backend == "local" and self.path is None:
            raise ValueError("backend=local needs path, the folder of the judge's checkpoint")
        if self.backend == "endpoint" and (self.url is None or self.model is None):
            raise ValueError("backend=endpoint needs url and model, for example url=http://localhost:8000/v1")
        return self


class IsrtConfig(Section):
    """Iterations of self-judgement and preference training."""

    iterations: int = Field(9, ge=1)
    """Rounds of contexts, responses, judgements and DPO; the released checkpoints are of the ninth."""
    reference: Literal["iteration_start", "sft"] = "iteration_start"
    """The reference of DPO: the model that the iteration starts with, or always the first one."""
    context: Literal["none", "judge", "judge_and_responses"] = "judge"
    """Who is shown the visual context, the model's own description of the video, refined in every iteration."""
    prompts: Literal["reuse", "split"] = "reuse"
    """The same training samples in every iteration, or the next `max_prompts` of the shuffled ones in each."""
    max_prompts: int | None = Field(None, ge=1)
    """Training samples of an iteration, drawn by `seed`; empty: all."""
    epochs: float | None = Field(None, gt=0)
    """Passes over an iteration's pairs in its DPO, whose number is not known before (LLaVA-Hound: 3). Empty:
    `train.steps` steps, which otherwise count for nothing."""
    context_tokens: int = Field(256, ge=1)
    """Longest visual context, tokens."""
    context_temperature: float = Field(0.0, ge=0)
    """Sampling temperature of the visual context; 0 is greedy. That of responses is `rollout.temperature`."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus of responses and contexts (LLaVA-Hound sampled its pairs with temperature 1 and 0.95)."""
    tries: int = Field(4, ge=1)
    """Two responses are drawn so many times until they differ; a prompt whose responses never do gives no pair."""
    chunk_size: int = Field(256, ge=1)
    """Rows that are made and written at a time: what an interrupted run has to do again."""
    judge: JudgeConfig = JudgeConfig()
    """Who compares the responses."""

    @model_validator(mode="after")
    def _parts_have_a_size(self) -> IsrtConfig:
        if self.prompts == "split" and self.max_prompts is None:
            raise ValueError("prompts=split needs max_prompts, the number of training samples of an iteration")
        return self


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


class RewardPartConfig(Section):
    """One rule, or a reward model. The reward of a response is the weighted sum of all parts."""

    kind: Literal["exact", "choice", "number", "format", "length", "model"]
    """exact: answer equal after normalisation. choice: letter or text of the right choice. number: equal value.
    format: the response has the tags. length: number of tokens inside the window. model: what the reward model in
    `path` gives."""
    weight: float = 1.0
    """Factor in the total."""
    name: str | None = None
    """Name in metrics and report; default is the kind."""
    tags: tuple[str, ...] = ()
    """format: tags in their order, for example [think, answer]. For exact, choice and number: the answer stands in
    the last tag."""
    min_tokens: int = Field(0, ge=0)
    """length: shortest response that is rewarded."""
    max_tokens: int | None = Field(None, ge=1)
    """length: longest response that is rewarded."""
    tolerance: float = Field(1e-6, ge=0)
    """number: absolute difference that still counts as equal."""
    path: Path | None = None
    """model: folder `policy` of a run of `rlvid reward-model` of kind bradley_terry. It runs in an actor of its own."""


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
    rewards: tuple[RewardPartConfig, ...] = (RewardPartConfig(kind="exact"),)
    evaluate: EvaluateConfig = EvaluateConfig()
    placement: PlacementConfig = PlacementConfig()

    @property
    def last_step(self) -> int:
        """The `step` of a whole run's last metrics."""
        return self.train.steps

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

    @property
    def is_elastic(self) -> bool:
        return (self.dpo.max_workers or 0) > self.placement.trainer_workers

    @model_validator(mode="after")
    def _workers_have_work(self) -> DpoJobConfig:
        _check_dpo_workers(self.dpo, self.train, self.placement)
        return self


def _check_dpo_workers(dpo: DpoConfig, train: TrainConfig, placement: PlacementConfig) -> None:
    most = dpo.max_workers or placement.trainer_workers
    if most < placement.trainer_workers:
        raise ValueError(f"dpo.max_workers={most} is less than placement.trainer_workers={placement.trainer_workers}")
    if train.batch_size < most:
        raise ValueError(f"train.batch_size={train.batch_size} gives {most} workers less than one pair each")
    if most > placement.trainer_workers and train.zero_stage:
        raise ValueError(
            f"train.zero_stage={train.zero_stage} keeps a part of the optimizer per worker, which another "
            f"number of workers cannot take up: set it to 0, or leave dpo.max_workers empty"
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
    def _iterations_can_run(self) -> IsrtJobConfig:
        _check_dpo_workers(self.dpo, self.train, self.placement)
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

    @property
    def rubric(self) -> Rubric:
        """What is kept beside the model's weights."""
        cfg = self.reward_model
        return Rubric(cfg.kind, cfg.names, *cfg.bounds, cfg.template, self.video.model_dump(mode="json"))


class EvalJobConfig(JobConfig):
    """`rlvid eval`: greedy answers to the held-out manifest."""


class GrpoJobConfig(JobConfig):
    """`rlvid grpo`: group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300)."""

    warm_start: WarmStartConfig = WarmStartConfig()
    grpo: GrpoConfig = GrpoConfig()

    @model_validator(mode="after")
    def _minibatches_divide(self) -> GrpoJobConfig:
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
