"""Benchmarks of `rlvid eval`, one class per kind, and the audit. How each scores is in rlvid/evaluation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlvid.config.algorithms import JudgeConfig
from rlvid.config.section import Checkpoint, GreedyOrTemperature, LocalPath, Section


class HeldOutBenchmark(Section):
    """Right answers, and the mean of every rule, by `rewards`."""

    kind: Literal["held_out"] = "held_out"
    """held_out: accuracy by those `rewards` that measure it, and the mean of every rule."""


class MmlaBenchmark(Section):
    """Answers that name one of a set of labels: MMLA (arXiv 2504.16427), or any manifest whose prompts list theirs."""

    kind: Literal["mmla"]
    """mmla: answers name a label of MMLA's task `problem_type`, or one that the prompt lists as "candidate labels"."""
    prompt: Literal["manifest", "official"] = "manifest"
    """manifest: as the rows have it. official: the zero-shot prompt of MMLA's scripts, from the row's `text`."""
    parser: Literal["anywhere", "strict"] = "anywhere"
    """Which reading of an answer `accuracy` counts; both are reported. anywhere: MMLA's, the only label that occurs in
    the answer. strict: "task: label" or the label alone."""


class _TextBenchmark(Section):
    """What kinds share whose texts are compared with references."""

    encoder: Checkpoint | None = None
    """Folder of a transformers encoder for BERTScore. Empty: no BERTScore."""
    layer: int = -1
    """Layer of the encoder whose states are compared; 9 of bert-base-uncased in the literature."""


class CaptionsBenchmark(_TextBenchmark):
    """BLEU, ROUGE, METEOR and BERTScore against references."""

    kind: Literal["captions"]
    """captions: BLEU-1 to -4 of the corpus and as a mean of samples, ROUGE, METEOR without synonyms, BERTScore."""
    references: str = "references"
    """Manifest field with the list of reference texts. A row without it has its answer as the only reference."""


class MultimoodBenchmark(_TextBenchmark):
    """MultiMood's four lines: two emotions, a strategy and a response (arXiv 2511.10011)."""

    kind: Literal["multimood"]
    """multimood: accuracy and weighted scores of both emotions and the strategy, and the response against the row's, in
    MultiMood's four lines. What has another form, or refuses, counts as wrong."""


class EvalJudgeConfig(JudgeConfig):
    """The judge of a benchmark."""

    key: ClassVar[str] = "benchmark.judge"


class JudgedBenchmark(Section):
    """Answers to open questions, rated by a judge."""

    kind: Literal["judged"]
    """judged: answers to open questions, rated by a judge."""
    protocol: Literal["hound", "official"] = "official"
    """official: yes or no, and 0 to 5, from question, right answer and prediction (Video-ChatGPT). hound: 1 to 5, from
    a caption too (LLaVA-Hound, arXiv 2404.01258); 3 and more is right."""
    caption: str = "caption"
    """hound: manifest field with the caption of the video."""
    judge: EvalJudgeConfig = EvalJudgeConfig(max_tokens=256)
    """Who rates. Name a fixed version: another judge gives other numbers."""


BenchmarkConfig = Annotated[
    HeldOutBenchmark | MmlaBenchmark | CaptionsBenchmark | MultimoodBenchmark | JudgedBenchmark,
    Field(discriminator="kind"),
]
KINDS = ("held_out", "mmla", "captions", "multimood", "judged")


class AuditConfig(Section):
    """How often each row is answered, and what is left out of the filtered manifest."""

    samples: int = Field(4, ge=1)
    """Answers to each row in each view."""
    temperature: GreedyOrTemperature = 1.0
    """Sampling temperature of these answers."""
    right_from: float = Field(0.75, gt=0, le=1)
    """A row counts as answered in a view from this share of right answers on. Above the share that a guess has."""
    write: LocalPath | None = None
    """Manifest of the rows that stay. Empty: none."""
    drop: tuple[Literal["blind", "still", "order_free", "needs_order", "not_answered", "duplicate"], ...] = (
        "blind",
        "duplicate",
    )
    """Marks of the rows that are left out of it."""
