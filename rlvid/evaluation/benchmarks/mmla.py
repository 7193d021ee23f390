"""MMLA (arXiv 2504.16427), and other sets whose answers name one of a set of labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rlvid.data.dialects.mmla import TASKS, task_of
from rlvid.errors import UserError
from rlvid.evaluation.labels import averages, confusion, label_metrics, read_anywhere, read_strictly
from rlvid.evaluation.predictions import Confusion, Prediction
from rlvid.types import MediumRef, Message, Sample

SHOWN = 5  # samples without a label of their task
# The prompt of MMLA's scripts, spaces included.
OFFICIAL = (
    "You are presented with a video in which the speaker says: {text}. Based on the text, video, and audio content, "
    "what is the {task} of this speaker?\n"
    "The candidate labels for {task} are: [{labels}].Respond in the format: '{task}: [label]'.  Only one label should "
    "be provided."
)


@dataclass(frozen=True)
class Asked:
    """What a sample asks for."""

    group: str  # data set, or task, that the metrics are of
    task: str
    labels: tuple[str, ...]
    true: str


def asked(sample: Sample) -> Asked:
    """
    Raises:
        ValueError: the sample's task or labels are not known, or its answer is none of these.
    """
    known = TASKS.get(sample.problem_type or "")
    listed = (known.name, known.labels) if known else task_of(sample.question)
    if listed is None:
        raise ValueError("its problem_type is no data set of MMLA, and its prompt lists no candidate labels")
    task, labels = listed[0], tuple(label.strip().strip("'\"") for label in listed[1].split(","))
    true = sample.answer.rpartition(":")[2].strip().lower()
    if true not in [label.lower() for label in labels]:
        raise ValueError(f"its answer {sample.answer!r:.80} is none of the labels {', '.join(labels)}")
    return Asked(sample.problem_type or task, task, labels, true)


@dataclass(frozen=True)
class Mmla:
    """Accuracy, weighted and macro F-scores of each data set, and both averages over them; by both parsers.

    Raises:
        UserError: samples without a label of their task.
    """

    samples: Sequence[Sample]
    form: Literal["manifest", "official"] = "manifest"
    parser: Literal["anywhere", "strict"] = "anywhere"
    headline = ("accuracy", "accuracy_macro_tasks", "n")

    def __post_init__(self) -> None:
        problems = []
        for sample in self.samples:
            try:
                asked(sample)
                if self.form == "official" and not isinstance(sample.extra.get("text"), str):
                    raise ValueError("it has no text, from which benchmark.prompt=official makes its prompt")
            except ValueError as e:
                problems.append(f"  {sample.id}: {e}")
        if problems:
            more = f"\n  ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise UserError(
                f"data.eval: {len(problems)} samples do not fit benchmark mmla:\n" + "\n".join(problems[:SHOWN]) + more
            )

    def prompt(self, sample: Sample) -> Sample:
        if self.form == "manifest":
            return sample
        what = asked(sample)
        text = OFFICIAL.format(text=sample.extra["text"], task=what.task, labels=", ".join(what.labels))
        *before, last = sample.messages
        media = tuple(part for part in last.content if isinstance(part, MediumRef))
        return replace(sample, messages=(*before, Message(last.role, (*media, text))))

    def parse(self, sample: Sample, prediction: Prediction) -> dict[str, str]:
        what = asked(sample)
        anywhere, strict = (
            read_anywhere(prediction.text, what.labels),
            read_strictly(prediction.text, what.labels, what.task),
        )
        return {"anywhere": anywhere.lower(), "strict": strict.lower()}

    def value(self, sample: Sample, parsed: dict[str, str] | None) -> float | None:
        return None if parsed is None else float(parsed[self.parser] == asked(sample).true)

    def score(self, parsed: Mapping[str, dict[str, str]]) -> dict[str, float]:
        found: dict[str, float] = {}
        for parser in ("anywhere", "strict"):
            by_group = {
                name: label_metrics(true, predicted, labels)
                for name, (true, predicted, labels) in self._columns(parsed, parser).items()
            }
            mark = "" if parser == self.parser else f"_{parser}"
            means = averages(by_group)
            found |= {f"accuracy{mark}": means["accuracy_weighted"]}
            found |= {f"accuracy{mark}_macro_tasks": means["accuracy_macro_tasks"]}
            found |= {
                f"{metric}{mark}/{name}": value for name, own in by_group.items() for metric, value in own.items()
            }
        return found | {"n": len(parsed), "n_invalid": len(self.samples) - len(parsed)}

    def confusions(self, parsed: Mapping[str, dict[str, str]]) -> list[Confusion]:
        return [
            Confusion(name, labels, confusion(true, predicted, labels))
            for name, (true, predicted, labels) in self._columns(parsed, self.parser).items()
        ]

    def _columns(
        self, parsed: Mapping[str, dict[str, str]], parser: str
    ) -> dict[str, tuple[list[str], list[str], list[str]]]:
        """True and predicted labels of each data set, and all its labels."""
        pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)
        labels: dict[str, list[str]] = {}
        for sample in self.samples:
            if sample.id in parsed:
                what = asked(sample)
                labels.setdefault(what.group, [label.lower() for label in what.labels])
                pairs[what.group].append((what.true, parsed[sample.id][parser]))
        return {name: ([t for t, _ in own], [p for _, p in own], labels[name]) for name, own in pairs.items()}
