"""Sections of GRPO, its relatives and PPO: groups, losses, advantages, corrections, overlap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlvid.config.section import Checkpoint, Section, changeable


class PolicyGradientConfig(Section):
    """What GRPO and PPO share: the policy's loss, the KL term, changes to the rewards, and overlap."""

    group_size: int = Field(8, ge=1)
    """Responses per prompt. They share one forward of their prompt."""
    minibatches: int = Field(1, ge=1)
    """Optimizer steps per pass over a rollout batch."""
    epochs: int = Field(1, ge=1)
    """Passes over a rollout batch."""
    loss: Literal["clip", "cispo"] = "clip"
    """clip: the smaller of ratio x advantage and clipped ratio x advantage (PPO). cispo: the log-prob times the
    advantage and the clipped ratio, which has no gradient, so clipped tokens are still trained (arXiv 2506.13585)."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or the geometric mean over a response (GSPO, arXiv 2507.18071)."""
    clip_low: float = Field(0.2, ge=0, le=1)
    """The importance ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(0.2, ge=0)
    """The importance ratio is clipped above at 1 + clip_high."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL divergence to the reference model. 0: no reference model is started."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence from samples (Schulman, joschu.net/blog/kl-approx.html)."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL divergence is: a term of the loss, or subtracted from the reward of each token."""
    loss_average: Literal["token", "sequence", "constant"] = "token"
    """token: mean over all response tokens of the batch. sequence: mean over each response first. constant: sum over
    the tokens, divided by the number of responses and `rollout.max_tokens` (Dr. GRPO)."""
    old_logprobs: Literal["rollout", "trainer"] = "rollout"
    """Denominator of the importance ratio. rollout: the engine's log-probs. trainer: the trainer's log-probs before its
    first update (one more forward, unless there is only one update)."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """Correction for tokens that were sampled by other weights, or rounded differently, than the trainer's.
    truncate: each token's loss is multiplied by its ratio of trainer's to engine's probability, at most
    `correction_cap` (truncated importance sampling). mask: responses whose ratio is above the cap have zero weight."""
    correction_cap: float = Field(2.0, gt=1)
    """Largest importance weight of `correction`."""
    async_steps: int = Field(0, ge=0)
    """Batches that are generated and scored ahead, while the trainer works. Their tokens are up to this number of steps
    old when they are trained on. 0: the newest weights generate every batch."""
    mask_truncated: bool = False
    """Responses that reach `rollout.max_tokens` have zero weight in the loss (DAPO: overlong filtering)."""
    overlong_buffer: float = Field(0.0, ge=0, le=1)
    """Share of `rollout.max_tokens`, at its end, over which a longer response loses up to `overlong_penalty` of its
    reward (DAPO, eq. 13). 0: off."""
    overlong_penalty: float = Field(1.0, ge=0)
    """Largest penalty of `overlong_buffer`."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Subtracted from the reward of a response that reaches `rollout.max_tokens`."""
    length_coef: float = 0.0
    """Added to the reward, times the response's share of `rollout.max_tokens`. Negative: short responses are
    better (VLM-RLAIF: -10)."""

    needs: ClassVar = {"correction_cap": ("correction", "truncate", "mask")}

    @property
    def draws(self) -> int:
        """Largest number of batches that are generated for a step."""
        return 1

    @property
    def compares_with_greedy(self) -> bool:
        """Whether a greedy response to each prompt is scored too."""
        return False

    @property
    def temporal_rule(self) -> tuple[Literal["code", "paper"], float] | None:
        """How responses to shuffled frames are compared with, and the bonus."""
        return None

    @property
    def compared_view(self) -> Literal["shuffled", "shuffled_patches"]:
        """How the videos are shown in the prompts that are compared with."""
        return "shuffled"

    def faults(self) -> Iterator[str]:
        if self.kl_estimator != "k3" and not self.kl_coef:
            yield f"kl_estimator={self.kl_estimator} has no effect with kl_coef=0: set kl_coef"
        if self.kl_in == "reward" and not self.kl_coef:
            yield "kl_in=reward has no effect with kl_coef=0: set kl_coef"
        if (penalty := self.overlong_penalty) != 1 and not self.overlong_buffer:
            yield f"overlong_penalty={penalty:g} has no effect with overlong_buffer=0: set overlong_buffer"
        if self.correction != "none" and self.old_logprobs == "rollout":
            yield (
                f"correction={self.correction} compares the trainer's log-probs with the engine's, and "
                f"old_logprobs=rollout takes the engine's for both: set old_logprobs to trainer"
            )


Variant = Literal[
    "grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "dapo", "gspo", "cispo", "remax", "t_grpo"
]
VARIANTS: dict[str, dict[str, Any]] = {
    "dr_grpo": {"normalise_std": False, "loss_average": "constant"},
    "rloo": {"advantage": "leave_one_out", "normalise_std": False},
    "reinforce_pp": {"advantage": "batch", "kl_in": "reward", "kl_estimator": "k1"},
    "reinforce_pp_baseline": {"advantage": "group_batch", "kl_estimator": "k2"},
    "dapo": {"clip_high": 0.28, "dynamic_sampling": 3, "overlong_buffer": 0.2},
    "gspo": {"ratio": "sequence", "loss_average": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"loss": "cispo", "clip_low": 1.0, "clip_high": 4.0},
    "remax": {"advantage": "greedy"},
    "t_grpo": {"temporal": "code"},
}
"""Keys that each variant implies, from its paper. A key that is given has precedence."""


class GrpoConfig(PolicyGradientConfig):
    """Group-relative advantages: GRPO and its relatives."""

    variant: Variant = "grpo"
    """Published algorithm; it sets the defaults of the keys below and above. grpo: arXiv 2402.03300. dr_grpo: arXiv
    2503.20783. rloo: arXiv 2402.14740. reinforce_pp, reinforce_pp_baseline: REINFORCE++ (arXiv 2501.03262). dapo: arXiv
    2503.14476. gspo: arXiv 2507.18071. cispo: arXiv 2506.13585. remax: arXiv 2310.10505. t_grpo: Video-R1 (arXiv
    2503.21776)."""
    advantage: Literal["group", "leave_one_out", "batch", "group_batch", "greedy"] = "group"
    """What a reward is compared with. group: the mean of its group. leave_one_out: the mean of the others of its group.
    batch: the mean of the batch, over tokens, divided by the batch's standard deviation. group_batch: the mean of its
    group, divided by the batch's standard deviation. greedy: the reward of the greedy response."""
    normalise_std: bool = True
    """Divide the advantage by the group's standard deviation (off: Dr. GRPO)."""
    dynamic_sampling: int = Field(0, ge=0)
    """Further batches that are generated, at most, until a step has `train.batch_size` groups whose rewards differ.
    Groups of equal rewards, which have no gradient, are replaced (DAPO). 0: off."""
    temporal: Literal["off", "code", "paper"] = "off"
    """T-GRPO: a second group, half as large, answers from frames in another order, and right answers of the first group
    get `temporal_bonus` if that does not do better. paper: the share of right answers with the frames in order is at
    least that of the second group. code: the mean accuracy is at least 0.8 times that of the second group, and answers
    with an accuracy above 0.1 are right (Video-R1's published code)."""
    temporal_shuffle: Literal["frames", "patches"] = "frames"
    """What is put in another order. frames: each frame, as in Video-R1. patches: whole temporal patches, of two frames
    in Qwen-VL models; the vision tower's output is then a permutation, but what moves from one frame to the next is
    still seen."""
    temporal_bonus: float = Field(0.3, ge=0)
    """Added to the reward of a right answer where the order of the frames helps. Where the reward has two values alone,
    right and wrong, and `normalise_std` divides by the group's deviation, it changes no advantage: give another part of
    the reward too (format, length), or set normalise_std to false."""

    needs: ClassVar = {
        **PolicyGradientConfig.needs,
        "temporal_bonus": ("temporal", "code", "paper"),
        "temporal_shuffle": ("temporal", "code", "paper"),
        "normalise_std": ("advantage", "group", "leave_one_out"),
    }

    @property
    def draws(self) -> int:
        return 1 + self.dynamic_sampling

    @property
    def compares_with_greedy(self) -> bool:
        return self.advantage == "greedy"

    @property
    def temporal_rule(self) -> tuple[Literal["code", "paper"], float] | None:
        return None if self.temporal == "off" else (self.temporal, self.temporal_bonus)

    @property
    def compared_view(self) -> Literal["shuffled", "shuffled_patches"]:
        return "shuffled" if self.temporal_shuffle == "frames" else "shuffled_patches"

    @model_validator(mode="before")
    @classmethod
    def _variant_implies_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("variant"), str):
            return data
        implied = VARIANTS.get(data["variant"], {})
        if not data.get("kl_coef"):
            implied = {key: value for key, value in implied.items() if not key.startswith("kl_")}
        return {**implied, **data}

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        size, compared = self.group_size, f"advantage={self.advantage}"
        if size < 2 and self.advantage not in ("batch", "greedy"):
            yield f"group_size={size}: {compared} compares the responses of a group: set it to 2 or more"
        sampling = f"dynamic_sampling={self.dynamic_sampling}"
        if self.dynamic_sampling and size < 2:
            yield f"{sampling} keeps groups whose rewards differ: set group_size to 2 or more"
        if self.dynamic_sampling and self.advantage not in ("group", "leave_one_out"):
            yield (
                f"{sampling} needs advantage=group or leave_one_out: with {compared} a group of equal rewards has a "
                f"gradient"
            )
        if self.temporal != "off" and size < 2:
            yield (
                f"temporal={self.temporal} lets half of group_size={size} answer from shuffled frames: set it to 2 or "
                f"more"
            )


class PpoConfig(PolicyGradientConfig):
    """PPO (arXiv 1707.06347): a critic predicts the return at each token."""

    old_logprobs: Literal["rollout", "trainer"] = "trainer"
    """Denominator of the importance ratio. rollout: the engine's log-probs. trainer: the trainer's log-probs before its
    first update; they come from the forward that computes the values if `critic` is shared."""
    critic: Literal["shared", "own"] = "shared"
    """shared: a value head on the policy's network, trained with it. own: a network of its own in each trainer rank."""
    critic_path: Checkpoint | None = None
    """own: checkpoint folder that the critic starts from: `critic/` of another run, or a reward model. Empty: the
    policy's."""
    critic_lr: float | None = changeable(None, "a run that diverged may resume with a lower one", gt=0)
    """Peak learning rate of the critic, with the policy's schedule. Empty: `train.lr`. With a shared network it is
    that of the head alone."""
    critic_steps: int = Field(0, ge=0)
    """own: first steps in which only the critic is trained."""
    value_coef: float = Field(0.5, gt=0)
    """shared: weight of the value loss beside the policy's."""
    value_clip: float | None = Field(0.2, gt=0)
    """Predicted values are clipped to this distance from those before the update. Empty: no clip."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount of rewards, per token."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation (GAE, arXiv 1506.02438)."""
    critic_lam: float | None = Field(None, ge=0, le=1)
    """Lambda of the returns that the critic learns. Empty: `lam`. 1 with a smaller `lam`: decoupled GAE (VC-PPO, arXiv
    2503.01491)."""
    whiten: bool = True
    """Advantages have mean 0 and standard deviation 1 over the tokens of a batch."""
    whiten_rewards: bool = False
    """Rewards of the tokens are divided by their standard deviation over a batch."""

    needs: ClassVar = {
        **PolicyGradientConfig.needs,
        "critic_path": ("critic", "own"),
        "critic_steps": ("critic", "own"),
        "value_coef": ("critic", "shared"),
    }
