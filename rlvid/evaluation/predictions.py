"""One way to evaluate: a benchmark over a prediction file.

Predictions are kept as they come, one row per sample, so an evaluation that was interrupted answers only what is
missing, and its figures can be computed again from the file alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rlvid.files import RowFile
from rlvid.types import Sample


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one sample."""

    text: str
    n_tokens: int
    finish_reason: str  # "stop" | "length"


class Benchmark(Protocol):
    """What is asked, how one answer is read, and what all of them amount to."""

    @property
    def samples(self) -> Sequence[Sample]: ...

    def prompt(self, sample: Sample) -> Sample:
        """What the model is asked for `sample`, under the same id."""

    def parse(self, sample: Sample, prediction: Prediction) -> Any:
        """What an answer says; None where it says nothing that counts."""

    def score(self, parsed: Mapping[str, Any]) -> dict[str, float]:
        """Metrics. `parsed` is by sample id; a sample whose clips cannot be read is missing."""


Batches = Iterable[Sequence[Sample]]
Answer = Callable[[Batches], Iterator[Mapping[str, Prediction]]]  # a batch's predictions by sample id


def evaluate(benchmark: Benchmark, answer: Answer, file: RowFile, batch_size: int) -> dict[str, float]:
    """Answer the samples that `file` lacks, then score all of them.

    Args:
        answer: asks the model, batch by batch; a sample that it leaves out has no prediction.
        file: rows of id, text, n_tokens and finish_reason.

    Returns:
        The benchmark's metrics, and `length`, the mean number of tokens of an answer.
    """
    missing = set(file.missing([sample.id for sample in benchmark.samples]))
    asked = [benchmark.prompt(sample) for sample in benchmark.samples if sample.id in missing]
    for answers in answer(asked[i : i + batch_size] for i in range(0, len(asked), batch_size)):
        file.append([{"id": name, **asdict(prediction)} for name, prediction in answers.items()])
    predictions = {row["id"]: Prediction(row["text"], row["n_tokens"], row["finish_reason"]) for row in file}
    parsed = {s.id: benchmark.parse(s, predictions[s.id]) for s in benchmark.samples if s.id in predictions}
    lengths = [predictions[name].n_tokens for name in parsed]
    return benchmark.score(parsed) | {"length": sum(lengths) / len(lengths) if lengths else float("nan")}
