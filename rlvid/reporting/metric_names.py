"""The known metrics: title, unit and format of each, for console, report and tracker.

A new metric needs one line in METRICS. To draw it in a chart with others, add its name to CHARTS. A metric without a
line is drawn under "Other metrics" with its name as title.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Form = Literal["number", "tenths", "percent", "seconds"]


@dataclass(frozen=True)
class Metric:
    title: str  # of its chart
    form: Form = "number"
    unit: str = ""
    column: str = ""  # its heading in the console
    series: str = ""  # its name in the legend of a chart with several curves
    is_exact: bool = False  # without noise: its curve is not smoothed


METRICS: dict[str, Metric] = {
    # learning
    "reward/mean": Metric("Reward", column="reward", series="total"),
    "loss": Metric("Loss", column="loss", series="total"),
    "train/error": Metric("Mean absolute error of scores", column="error"),
    "preference/loss": Metric("Preference loss", series="preference"),
    "train/accuracy": Metric("Accuracy", "percent", column="accuracy", series="training"),
    "eval/accuracy": Metric("Accuracy", "percent", series="held out"),
    "eval/loss": Metric("Loss, held out", series="held out"),
    "eval/spearman": Metric("Spearman correlation x 100, held out", "tenths", series="all"),
    "response/length": Metric("Response length", "tenths", "tokens", "length", "all"),
    "groups/zero_variance": Metric("Groups without variance", "percent", column="zero-var"),
    "train/tokens": Metric("Trained tokens per step", is_exact=True),
    "train/rows": Metric("Packed rows per step", "tenths", is_exact=True),
    "train/fill": Metric("Share of train.micro_batch_tokens in a packed row", "percent"),
    "train/skipped": Metric("Skipped steps", column="skipped", is_exact=True),
    # preferences and judgements
    "rewards/accuracies": Metric("Pairs ranked right", "percent", column="accuracy", series="training"),
    "rewards/margins": Metric("Margin of implicit rewards", column="margin", series="training"),
    "eval/margin": Metric("Margin of implicit rewards", series="held out"),
    "rewards/chosen": Metric("Implicit rewards", column="chosen", series="chosen"),
    "rewards/rejected": Metric("Implicit rewards", column="rejected", series="rejected"),
    "response/length_chosen": Metric("Response length", unit="tokens", series="chosen"),
    "response/length_rejected": Metric("Response length", unit="tokens", series="rejected"),
    "judge/consistency": Metric("Judge", "percent", series="same choice in both orders"),
    "judge/accuracy": Metric("Judge", "percent", series="right, where rules know"),
    "judge/longer_wins": Metric("Judge", "percent", series="chose the longer response"),
    "pairs/kept": Metric("Pairs", "percent", series="prompts with a pair"),
    "response/truncated": Metric("Pairs", "percent", series="responses truncated"),
    # policy
    "policy/kl": Metric("KL to the reference", column="KL"),
    "policy/entropy": Metric("Entropy", unit="nats per token"),
    "policy/logprob_gap": Metric("Rollout–trainer gap", unit="log-prob"),
    "policy/clip_fraction": Metric("Clipped tokens", "percent"),
    "policy/kl_to_old": Metric("KL to the rollout policy"),
    "policy/ratio": Metric("Importance ratio"),
    "policy/staleness": Metric("Age of the sampling weights", unit="updates", series="mean over tokens"),
    "policy/max_staleness": Metric("Age of the sampling weights", unit="updates", series="oldest token"),
    "policy/correction": Metric("Importance weight of the correction"),
    "critic/loss": Metric("Value loss"),
    "critic/explained_variance": Metric("Returns explained by the critic", "percent"),
    "critic/return": Metric("Return"),
    "groups/order_helps": Metric("Groups that the order of the frames helps", "percent"),
    "groups/draws": Metric("Batches generated for a step", "tenths", is_exact=True),
    "train/loss": Metric("Policy loss"),
    "train/grad_norm": Metric("Gradient norm before clipping"),
    "train/lr": Metric("Learning rate", column="lr", is_exact=True),
    # speed
    "samples_per_s": Metric("Samples per second", "tenths", column="samples/s"),
    "time/step": Metric("Seconds per step", "tenths", column="s/step"),
    "time/evaluation": Metric("Outside of steps", "seconds", column="s/evaluation", series="evaluation"),
    "time/checkpoint": Metric("Outside of steps", "seconds", column="s/checkpoint", series="checkpoint"),
    "video/decodes": Metric("Clips read", series="decoded", is_exact=True),
    "video/cache_hits": Metric("Clips read", series="from cache", is_exact=True),
    # warm start
    "warm_start/loss": Metric("Warm start: loss", unit="nats per token"),
}


def metric_of(key: str) -> Metric:
    """The metric of that name. One that is not known has its name as title; the stages of a step are in seconds."""
    stage = key.removeprefix("time/").removeprefix("behind/")
    unknown = Metric(key) if stage == key else Metric(key, "seconds", column=f"s/{stage}")
    return METRICS.get(key, unknown)


@dataclass(frozen=True)
class Chart:
    """Curves in one chart. Title and format are those of the first metric, unless they are given."""

    keys: tuple[str, ...]  # in the order of the legend; "reward/*" means all others with that prefix
    title: str = ""
    form: Form | None = None
    is_stacked: bool = False
    allow_log: bool = False


def _each(*keys: str) -> list[Chart]:
    """A chart for each metric."""
    return [Chart((key,)) for key in keys]


CHARTS: dict[str, tuple[Chart, ...]] = {
    "Learning": (
        Chart(("reward/mean", "reward/*")),
        Chart(("loss", "preference/loss", "eval/loss")),
        Chart(("train/error",)),
        Chart(("train/accuracy", "rewards/accuracies", "eval/accuracy")),
        Chart(("eval/accuracy/*",), "Accuracy by kind, held out", "percent"),
        Chart(("eval/spearman", "eval/spearman/*")),
        Chart(("rewards/margins", "eval/margin")),
        Chart(("rewards/chosen", "rewards/rejected")),
        Chart(("judge/consistency", "judge/accuracy", "judge/longer_wins")),
        Chart(("pairs/kept", "response/truncated")),
        Chart(("response/length", "response/length_chosen", "response/length_rejected")),
        *_each("groups/zero_variance", "groups/draws", "groups/order_helps", "train/skipped"),
    ),
    "Policy": (
        *_each("policy/kl", "policy/entropy"),
        Chart(("policy/logprob_gap",), allow_log=True),
        Chart(("policy/staleness", "policy/max_staleness")),
        *_each("policy/correction", "critic/loss", "critic/explained_variance", "critic/return"),
        *_each("policy/clip_fraction", "policy/kl_to_old", "policy/ratio", "train/loss", "train/grad_norm", "train/lr"),
    ),
    "Speed": (
        *_each("samples_per_s", "train/tokens", "train/rows", "train/fill"),
        Chart(("time/evaluation", "time/checkpoint")),
        Chart(("time/*",), "Seconds per stage", "seconds", is_stacked=True),
        Chart(("behind/*",), "Seconds per stage, while the trainer works", "seconds"),
        Chart(("video/decodes", "video/cache_hits")),
    ),
}
WARM_START_CHARTS = (Chart(("warm_start/loss", "warm_start/*")), Chart(("train/accuracy", "eval/accuracy")))
NO_CHART = (
    *("step", "phase", "time_s", "time/step", "fleet/start_s", "groups/samples"),
    *("eval/n", "eval/accuracy_low95", "eval/accuracy_high95"),
)

# Console columns after the metric that selects them: the first one that a step has. "" is in every step.
COLUMNS: dict[str, tuple[str, ...]] = {
    "rewards/chosen": (
        "loss",
        "rewards/accuracies",
        "rewards/margins",
        "rewards/chosen",
        "rewards/rejected",
        "train/lr",
    ),
    "rewards/margins": ("loss", "rewards/accuracies", "rewards/margins", "train/lr"),
    "train/error": ("loss", "train/error", "train/lr"),
    "loss": ("loss", "train/accuracy", "train/lr", "samples_per_s"),
    "": ("reward/mean", "train/accuracy", "policy/kl", "response/length", "groups/zero_variance", "samples_per_s"),
}

HEADLINES = ("eval/accuracy", "eval/spearman")  # the headline of the report is the first of these that a run has
HEADLINE_TITLES = {  # (job, metric): title of the headline; otherwise greedy accuracy
    ("dpo", "eval/accuracy"): "Pairs ranked right",
    ("reward-model", "eval/accuracy"): "Pairs ranked right",
    ("reward-model", "eval/spearman"): "Spearman correlation x 100",
}
