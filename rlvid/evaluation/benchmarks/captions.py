"""Texts against references: captions, and other free answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlvid.evaluation.predictions import Confusion, Prediction
from rlvid.evaluation.text_metrics import rouge, text_metrics
from rlvid.types import Sample


@dataclass(frozen=True)
class Captions:
    """BLEU of the corpus and as a mean of samples, ROUGE, METEOR, and BERTScore where an encoder is given. The value of
    a sample is its ROUGE-L."""

    samples: Sequence[Sample]
    references: str = "references"
    encoder: Path | None = None
    layer: int = -1
    headline = ("bleu4_corpus", "bleu4_mean", "rougeL", "n")

    def prompt(self, sample: Sample) -> Sample:
        return sample

    def parse(self, sample: Sample, prediction: Prediction) -> str:
        return prediction.text.strip()

    def value(self, sample: Sample, parsed: str | None) -> float | None:
        return None if parsed is None else rouge([parsed], [self.references_of(sample)])["rougeL"][0]

    def references_of(self, sample: Sample) -> list[str]:
        given = sample.extra.get(self.references)
        return [str(text) for text in given] if isinstance(given, list) and given else [sample.answer]

    def score(self, parsed: Mapping[str, str]) -> dict[str, float]:
        answered = [sample for sample in self.samples if sample.id in parsed]
        texts, references = [parsed[s.id] for s in answered], [self.references_of(s) for s in answered]
        found = text_metrics(texts, references, self.encoder, self.layer)
        return {**found, "n": len(answered), "n_invalid": len(self.samples) - len(answered)}

    def confusions(self, parsed: Mapping[str, str]) -> list[Confusion]:
        return []
