"""Sections of DPO, reward models and self-judgement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from rlvid.config.section import Checkpoint, GreedyOrTemperature, Section, changeable

DIMS = ("visual quality", "temporal consistency", "dynamic degree", "text-to-video alignment", "factual consistency")
"""Dimensions of VideoScore."""
DIMS2 = ("visual quality", "text-to-video alignment", "physical/common-sense consistency")
"""Dimensions of VideoScore2."""


class SftConfig(Section):
    """Which answers are trained."""

    loss: Literal["last", "all", "marked"] = "last"
    """last: the answer of each row. all: earlier turns of the assistant too. marked: those of them that the manifest
    marks with `"train": true`, and the answer. The conversation has one forward in any case."""
    share_media: bool = False
    """Rows about the same video or image follow each other in an epoch, and their common beginning, media included, has
    one forward. For manifests with several questions about a video; a batch then has fewer different videos."""


class DpoConfig(Section):
    """Loss on preference pairs, and its reference model."""

    loss: Literal["sigmoid", "ipo", "robust", "kto", "simpo", "orpo"] = "sigmoid"
    """sigmoid: DPO (arXiv 2305.18290), with `label_smoothing` cDPO. robust: arXiv 2403.00409. ipo: arXiv 2310.12036.
    kto: arXiv 2402.01306, each pair as a desirable and an undesirable response. simpo: arXiv 2405.14734. orpo: arXiv
    2403.07691 (set sft_weight=1). simpo and orpo need no reference."""
    beta: float = Field(0.1, gt=0)
    """Scale of the log-ratios. orpo: weight of the odds-ratio term."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """sigmoid, robust: assumed share of pairs whose chosen and rejected responses are swapped."""
    simpo_margin: float = Field(0.5, ge=0)
    """simpo: target of the reward difference (gamma in the paper)."""
    chosen_weight: float = Field(1.0, ge=0)
    """kto: weight of the desirable responses."""
    rejected_weight: float = Field(1.0, ge=0)
    """kto: weight of the undesirable responses."""
    loss_weight: float = Field(1.0, ge=0)
    """Weight of the preference loss (alpha of LLaVA-Hound)."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of the chosen responses' negative log-likelihood, averaged over tokens (gamma of LLaVA-Hound)."""
    logprobs: Literal["auto", "sum", "mean"] = "auto"
    """Log-prob of a response: the sum over its tokens or their mean. auto: mean for ipo, simpo and orpo, otherwise
    sum."""
    reference: Literal["frozen", "precomputed"] = "frozen"
    """frozen: a second copy of the model in each worker; with `model.lora` the same model with its first adapters.
    precomputed: the log-probs of all pairs are computed once before the first step and kept in the run folder."""
    reference_path: Checkpoint | None = None
    """Checkpoint folder of the reference. Empty: the model that training starts from."""

    needs: ClassVar = {
        "label_smoothing": ("loss", "sigmoid", "robust"),
        "simpo_margin": ("loss", "simpo"),
        **dict.fromkeys(("chosen_weight", "rejected_weight"), ("loss", "kto")),
        **dict.fromkeys(("reference", "reference_path"), ("loss", "sigmoid", "ipo", "robust", "kto")),
    }

    @property
    def is_mean(self) -> bool:
        """Whether the log-prob of a response is a mean over its tokens, not their sum."""
        return self.loss in ("ipo", "simpo", "orpo") if self.logprobs == "auto" else self.logprobs == "mean"

    @property
    def needs_reference(self) -> bool:
        return self.loss not in ("simpo", "orpo")

    def faults(self) -> Iterator[str]:
        if self.loss in ("simpo", "orpo") and not self.is_mean:
            yield f"loss={self.loss} is defined on mean log-probs: leave logprobs at auto"
        if self.loss == "orpo" and not self.sft_weight:
            yield "loss=orpo adds an odds ratio to the chosen response's likelihood: set sft_weight to 1"
        if not self.loss_weight and not self.sft_weight:
            yield "loss_weight and sft_weight are both 0: there is nothing to train on"


class RewardModelConfig(Section):
    """What a reward model scores, and how."""

    kind: Literal["regression", "generation", "thinking", "bradley_terry"] = "regression"
    """regression: a number per dimension from a head on the prompt's last token, trained with mean squared error to the
    labels (VideoScore). generation: the scores as text, a line `name: integer` per dimension. thinking: reasoning, then
    the scores (VideoScore2), trained on the manifest's answers. bradley_terry: one number from a head on the last token
    of a response, trained with -log sigmoid of chosen minus rejected."""
    template: Literal["integer", "float", "thinking", "question"] = "integer"
    """The prompt around a row's `prompt`, the same in training and in scoring. integer, float: the two of VideoScore.
    thinking: that of VideoScore2. question: only the manifest's own question. If it is not given, kind=thinking implies
    thinking and kind=bradley_terry implies question."""
    dims: tuple[str, ...] = ()
    """Names of the dimensions, the keys of a row's `labels`. Empty: those of the template."""
    scale: tuple[int, int] | None = None
    """Lowest and highest score. Empty: 1 to 4, for thinking 1 to 5. A label outside is refused."""

    needs: ClassVar = dict.fromkeys(("dims", "scale"), ("kind", "regression", "generation", "thinking"))

    @model_validator(mode="before")
    @classmethod
    def _kind_implies_template(cls, data: Any) -> Any:
        implied = {"thinking": "thinking", "bradley_terry": "question"}
        kind = data.get("kind") if isinstance(data, dict) else None
        return {"template": implied[kind], **data} if kind in implied else data

    @property
    def names(self) -> tuple[str, ...]:
        """The dimensions in their order."""
        if self.kind == "bradley_terry":
            return ("reward",)
        return self.dims or (DIMS2 if self.template == "thinking" else DIMS)

    @property
    def bounds(self) -> tuple[int, int]:
        return self.scale or ((1, 5) if self.kind == "thinking" else (1, 4))

    def faults(self) -> Iterator[str]:
        if self.kind == "bradley_terry" and self.template != "question":
            yield "kind=bradley_terry scores answers to the manifest's questions: set template to question"
        if (self.kind == "thinking") != (self.template == "thinking"):
            yield f"kind={self.kind} does not go with template={self.template}: thinking needs both"
        fixed = {"integer": DIMS, "float": DIMS, "thinking": DIMS2}.get(self.template)
        if fixed and self.dims and self.dims != fixed:
            yield f"template={self.template} asks for {', '.join(fixed)}: leave dims empty, or set template"
        if len(set(self.names)) != len(self.names) or any(": " in n or "\n" in n or not n.strip() for n in self.names):
            yield "dims must be different names on one line each, without a colon and a space"
        if not 0 <= self.bounds[0] < self.bounds[1] <= 9:
            yield f"scale={list(self.bounds)} must be two digits, the lower first"


def is_web_address(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _check_api(url: str) -> str:
    if not is_web_address(url) or urlsplit(url).path.endswith("/chat/completions"):
        raise ValueError(f"{url!r} is not the base URL of an API, expected for example http://localhost:8000/v1")
    return url


_OF_ENDPOINTS = ("url", "model", "api_key_env", "send_frames", "concurrency", "timeout_s", "deadline_s")


class JudgeConfig(Section):
    """The judge that compares responses, and the limit of failed verdicts."""

    key: ClassVar[str] = "isrt.judge"
    """Where it is in a config, for messages."""

    backend: Literal["policy", "local", "endpoint"] = "policy"
    """policy: the trained model judges its own responses. local: another checkpoint (`path`), the same for the whole
    run. endpoint: an OpenAI-compatible server (`url`)."""
    path: Checkpoint | None = None
    """local: folder of the judge's checkpoint."""
    url: Annotated[str, AfterValidator(_check_api)] | None = None
    """endpoint: base URL of the API, for example http://localhost:8000/v1."""
    model: str | None = None
    """endpoint: name of the model. Name a fixed version: another version is another judge."""
    api_key_env: str = changeable("OPENAI_API_KEY", "transport")
    """endpoint: environment variable that holds the key, if the server requires one."""
    send_frames: bool = False
    """endpoint: send up to six frames of each video as JPEG. Otherwise the server judges by the texts alone."""
    concurrency: int = changeable(8, "transport", ge=1)
    """endpoint: requests at a time."""
    timeout_s: float = changeable(60.0, "a deadline", gt=0)
    """endpoint: deadline of one request."""
    deadline_s: float = changeable(300.0, "a deadline", gt=0)
    """endpoint: deadline of one question with all its retries. After it the verdict is invalid."""
    temperature: GreedyOrTemperature = 0.0
    """Sampling temperature of the judge; 0 is greedy decoding."""
    max_tokens: int = Field(64, ge=1)
    """Longest answer of the judge, tokens."""
    max_invalid_fraction: float = changeable(0.25, "when to give up", ge=0, le=1)
    """The run stops when more than this share of the verdicts is unparsed or failed."""

    needs: ClassVar = {"path": ("backend", "local"), **dict.fromkeys(_OF_ENDPOINTS, ("backend", "endpoint"))}

    def faults(self) -> Iterator[str]:
        if self.backend == "local" and self.path is None:
            yield "backend=local needs path, the folder of the judge's checkpoint"
        if self.backend == "endpoint" and (self.url is None or self.model is None):
            yield "backend=endpoint needs url and model, for example url=http://localhost:8000/v1"


class RewardJudgeConfig(JudgeConfig):
    """The judge of a reward part."""

    key: ClassVar[str] = "rewards.N.judge"


class IsrtConfig(Section):
    """Iterations of self-judgement and preference training."""

    iterations: int = changeable(9, "a run may be made longer or shorter", ge=1)
    """Rounds of contexts, responses, judgements and DPO. The published checkpoints are of the ninth."""
    reference: Literal["iteration_start", "sft"] = "iteration_start"
    """Reference model of DPO. iteration_start: the model that the iteration starts with. sft: always the first one."""
    context: Literal["none", "judge", "judge_and_responses"] = "judge"
    """Whose prompts contain the visual context, the model's own description of the video, which every iteration
    refines."""
    prompts: Literal["reuse", "split"] = "reuse"
    """reuse: the same training samples in every iteration. split: the next `max_prompts` of the shuffled samples."""
    max_prompts: int | None = Field(None, ge=1)
    """Training samples of an iteration, drawn by `seed`. Empty: all."""
    epochs: float | None = Field(None, gt=0)
    """Passes over an iteration's pairs in its DPO (LLaVA-Hound: 3); the number of pairs varies. If it is given,
    `train.steps` has no effect. Empty: `train.steps` steps."""
    context_tokens: int = Field(256, ge=1)
    """Longest visual context, tokens."""
    context_temperature: GreedyOrTemperature = 0.0
    """Sampling temperature of the visual context; 0 is greedy decoding. Responses use `rollout.temperature`."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus sampling of responses and contexts (LLaVA-Hound sampled its pairs with temperature 1 and top_p 0.95)."""
    tries: int = Field(4, ge=1)
    """Largest number of draws to get two different responses. A prompt whose responses never differ gives no pair."""
    chunk_size: int = changeable(256, "what is sampled depends on seed and id only", ge=1)
    """Rows that are generated and written at a time. An interrupted run repeats at most this number."""
    judge: JudgeConfig = JudgeConfig()
    """The judge that compares the responses."""

    needs: ClassVar = {
        "context_tokens": ("context", "judge", "judge_and_responses"),
        "context_temperature": ("context", "judge", "judge_and_responses"),
    }

    def faults(self) -> Iterator[str]:
        if self.prompts == "split" and self.max_prompts is None:
            yield "prompts=split needs max_prompts, the number of training samples of an iteration"
