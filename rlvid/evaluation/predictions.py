"""One way to evaluate: a benchmark over a prediction file.

Each prediction is written as soon as it is there, one row per sample. An interrupted evaluation therefore answers only
the samples that are missing, and its metrics can be computed again from the file alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rlvid.errors import UserError
from rlvid.files import RowFile
from rlvid.types import Sample


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one sample."""

    text: str
    n_tokens: int
    finish_reason: str  # "stop" | "length"


@dataclass(frozen=True)
class Confusion:
    """How often each true label was read as which other."""

    name: str
    labels: Sequence[str]
    counts: Sequence[Sequence[int]]  # [labels, labels + "unknown" + "multi"]


class Benchmark(Protocol):
    """A set of samples: the prompt of each, how an answer is parsed, and how all answers are scored."""

    @property
    def samples(self) -> Sequence[Sample]: ...

    @property
    def headline(self) -> tuple[str, ...]:
        """Names of the metrics that the job's result shows."""

    def prompt(self, sample: Sample) -> Sample:
        """The sample, under the same id, whose messages the model is given."""

    def parse(self, sample: Sample, prediction: Prediction) -> Any:
        """The parsed answer; None if it has no verdict."""

    def score(self, parsed: Mapping[str, Any]) -> dict[str, float]:
        """Metrics over all answers. `parsed` is keyed by sample id; a sample whose clips cannot be read is absent."""

    def value(self, sample: Sample, parsed: Any) -> float | None:
        """One number of a sample, 1 where it is right: what comparisons pair. None without a verdict. After `score`."""

    def confusions(self, parsed: Mapping[str, Any]) -> list[Confusion]:
        """For benchmarks with labels."""


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found."""

    metrics: dict[str, float]
    predictions: Mapping[str, Prediction]  # by sample id
    values: Mapping[str, float | None]
    confusions: Sequence[Confusion]


Batches = Iterable[Sequence[Sample]]
Answer = Callable[[Batches], Iterator[Mapping[str, Prediction]]]  # a batch's predictions by sample id


def evaluate(benchmark: Benchmark, answer: Answer, file: RowFile, batch_size: int) -> Evaluated:
    """Answer the samples that are missing from `file`, then score all of them.

    Args:
        answer: generates batch by batch; a sample that it leaves out has no prediction.
        file: rows of id, text, n_tokens and finish_reason.

    Returns:
        The benchmark's metrics and `length`, the mean number of tokens of an answer; what was said, and its values.

    Raises:
        UserError: the file has an answer to no sample of the benchmark.
    """
    ids = {sample.id for sample in benchmark.samples}
    if foreign := [row["id"] for row in file if row["id"] not in ids]:
        raise UserError(
            f"{file.path}: {len(foreign)} of its predictions are of other samples than the benchmark's, for example "
            f"{foreign[0]!r}; give another run.dir, or remove the file"
        )
    missing = set(file.missing([sample.id for sample in benchmark.samples]))
    asked = [benchmark.prompt(sample) for sample in benchmark.samples if sample.id in missing]
    for answers in answer(asked[i : i + batch_size] for i in range(0, len(asked), batch_size)):
        file.append([{"id": name, **asdict(prediction)} for name, prediction in answers.items()])
    predictions = {row["id"]: Prediction(row["text"], row["n_tokens"], row["finish_reason"]) for row in file}
    parsed = {s.id: benchmark.parse(s, predictions[s.id]) for s in benchmark.samples if s.id in predictions}
    lengths = [predictions[name].n_tokens for name in parsed]
    metrics = benchmark.score(parsed) | {"length": sum(lengths) / len(lengths) if lengths else float("nan")}
    values = {sample.id: benchmark.value(sample, parsed.get(sample.id)) for sample in benchmark.samples}
    return Evaluated(metrics, predictions, values, benchmark.confusions(parsed))
