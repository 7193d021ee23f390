"""MultiMood (arXiv 2511.10011): both speakers' emotions, the therapist's strategy, and the response, in four lines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlvid.data.dialects.mesc import LINES
from rlvid.errors import UserError
from rlvid.evaluation.labels import UNKNOWN, confusion, label_metrics
from rlvid.evaluation.metrics import mean
from rlvid.evaluation.predictions import Confusion, Prediction
from rlvid.evaluation.text_metrics import text_metrics
from rlvid.types import Sample

REFUSALS = ("an ai language model", "can't assist with that")  # upstream takes such answers out of its averages
EMOTIONS = ("anger", "sadness", "disgust", "depression", "neutral", "joy", "fear")
STRATEGIES = (
    "open question",
    "approval",
    "self-disclosure",
    "restatement",
    "interpretation",
    "advisement",
    "communication skills",
    "structuring the therapy",
    "guiding the pace and depth of the conversation",
    "others",
)
LABELS: dict[str, tuple[str, ...]] = {LINES[0]: EMOTIONS, LINES[1]: EMOTIONS, LINES[2]: STRATEGIES}
NAMES = dict(zip(LINES, ("client_emotion", "therapist_emotion", "strategy", "response"), strict=True))
_LINE = re.compile(rf"^\W*({'|'.join(map(re.escape, LINES))})\s*:[ \t]*(.*)", re.IGNORECASE | re.MULTILINE)


def read_lines(text: str) -> dict[str, str] | None:
    """What each of the four lines says, labels in lower case; None where one is missing or comes twice. The response is
    everything from its line on."""
    found = list(_LINE.finditer(text))
    lines = {line.lower(): line for line in LINES}
    said = {lines[match[1].lower()]: match[2].strip() for match in found}
    if len(found) != len(LINES) or len(said) != len(LINES):
        return None
    last = next(match for match in found if match[1].lower() == LINES[-1].lower())
    said[LINES[-1]] = text[last.start(2) :].strip()
    return {line: value if line == LINES[-1] else value.lower().strip(" .") for line, value in said.items()}


@dataclass(frozen=True)
class Multimood:
    """Accuracy and weighted scores of the labels, and text metrics of the response.

    The denominator is all samples with a prediction: what has another form has the label "unknown" and an empty
    response. The value of a sample is the share of its labels that are right.

    Raises:
        UserError: a sample's answer is not in four lines with known labels.
    """

    samples: Sequence[Sample]
    encoder: Path | None = None
    layer: int = -1
    headline = ("accuracy_client_emotion", "accuracy_strategy", "bleu2_corpus", "n")

    def __post_init__(self) -> None:
        for sample in self.samples:
            said = read_lines(sample.answer)
            if said is None or any(said[line] not in labels for line, labels in LABELS.items()):
                raise UserError(
                    f"data.eval: the answer of sample {sample.id!r} is not in MultiMood's four lines with its emotions "
                    f"and strategies: {sample.answer!r:.200}"
                )

    def prompt(self, sample: Sample) -> Sample:
        return sample

    def parse(self, sample: Sample, prediction: Prediction) -> dict[str, str]:
        said = read_lines(prediction.text) or {}
        read = {line: said.get(line, UNKNOWN) for line in LABELS}
        return {**read, LINES[-1]: said.get(LINES[-1], ""), "text": prediction.text}

    def value(self, sample: Sample, parsed: dict[str, str] | None) -> float | None:
        true = read_lines(sample.answer)
        return None if parsed is None or true is None else mean(parsed[line] == true[line] for line in LABELS)

    def score(self, parsed: Mapping[str, dict[str, str]]) -> dict[str, float]:
        true, said = self._columns(parsed)
        found = {
            f"{metric}_{NAMES[line]}": value
            for line, labels in LABELS.items()
            for metric, value in label_metrics(true[line], said[line], labels).items()
            if metric != "n"
        }
        found |= text_metrics(said[LINES[-1]], [[text] for text in true[LINES[-1]]], self.encoder, self.layer)
        texts = [own["text"].lower() for own in parsed.values()]
        found["refusals"] = mean(any(words in text for words in REFUSALS) for text in texts)
        return {**found, "n": len(parsed), "n_invalid": len(self.samples) - len(parsed)}

    def confusions(self, parsed: Mapping[str, dict[str, str]]) -> list[Confusion]:
        true, said = self._columns(parsed)
        return [Confusion(line, labels, confusion(true[line], said[line], labels)) for line, labels in LABELS.items()]

    def _columns(self, parsed: Mapping[str, dict[str, str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """What is right and what was said, by line."""
        answered = [sample for sample in self.samples if sample.id in parsed]
        right = [read_lines(sample.answer) or {} for sample in answered]
        return (
            {line: [own[line] for own in right] for line in LINES},
            {line: [parsed[sample.id][line] for sample in answered] for line in LINES},
        )
