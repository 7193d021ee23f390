"""Sections of the algorithms: GRPO, DPO, reward models, self-judgement and reward parts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from rlvid.config.sections import Section

DIMS = ("visual quality", "temporal consistency", "dynamic degree", "text-to-video alignment", "factual consistency")
"""Dimensions of VideoScore."""
DIMS2 = ("visual quality", "text-to-video alignment", "physical/common-sense consistency")
"""Dimensions of VideoScore2."""


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
    """Loss on preference pairs and its reference."""

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
