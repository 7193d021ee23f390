from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from rlvid.config import GrpoJobConfig
from rlvid.errors import UserError
from rlvid.evaluation.benchmarks.held_out import HeldOut
from rlvid.evaluation.predictions import Batches, Prediction, evaluate
from rlvid.files import RowFile
from rlvid.rewards.rules import make_parts
from rlvid.types import Message, Sample

CONFIG = {"model": {"tiny": {}}, "data": {"synthetic": {}}, "rewards": [{"kind": "exact"}]}
PARTS = make_parts(GrpoJobConfig.model_validate(CONFIG).rewards)


def samples(*answers: str) -> list[Sample]:
    return [
        Sample(str(i), (), (Message("user", ("What?",)),), answer, problem_type="colour" if i % 2 else "shape")
        for i, answer in enumerate(answers)
    ]


class Answers:
    """Answers by sample id; records which samples were asked, and fails when it runs out."""

    def __init__(self, texts: Mapping[str, str], fails_at: int | None = None):
        self.texts, self.fails_at, self.asked = texts, fails_at, []

    def __call__(self, batches: Batches) -> Iterator[Mapping[str, Prediction]]:
        for number, batch in enumerate(batches):
            if number == self.fails_at:
                raise KeyboardInterrupt
            self.asked += [s.id for s in batch]
            yield {s.id: Prediction(self.texts[s.id], 3, "stop") for s in batch if s.id in self.texts}


def test_accuracy_counts_each_sample_once_and_unreadable_ones_as_invalid(tmp_path: Path) -> None:
    benchmark = HeldOut(samples("red", "blue", "green", "red"), PARTS)
    answer = Answers({"0": "red", "1": "red", "2": "Green."})  # the clip of 3 cannot be read
    metrics = evaluate(benchmark, answer, RowFile(tmp_path / "p.jsonl"), batch_size=2).metrics
    assert metrics["accuracy"] == pytest.approx(2 / 3) and metrics["n"] == 3 and metrics["n_invalid"] == 1
    assert metrics["accuracy/shape"] == 1.0 and metrics["accuracy/colour"] == 0.0 and metrics["length"] == 3


def test_an_interrupted_evaluation_answers_only_the_missing_samples_and_writes_the_same_file(tmp_path: Path) -> None:
    benchmark = HeldOut(samples(*"abcdef"), PARTS)
    texts = {str(i): letter for i, letter in enumerate("abcdef")}
    with pytest.raises(KeyboardInterrupt):
        evaluate(benchmark, Answers(texts, fails_at=2), RowFile(tmp_path / "p.jsonl"), batch_size=2)
    rest = Answers(texts)
    resumed = evaluate(benchmark, rest, RowFile(tmp_path / "p.jsonl"), batch_size=2)
    assert rest.asked == ["4", "5"]
    assert resumed == evaluate(benchmark, Answers(texts), RowFile(tmp_path / "whole.jsonl"), batch_size=2)
    assert (tmp_path / "p.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_no_verdict_for_any_sample_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the 2 held-out samples could be scored"):
        evaluate(HeldOut(samples("a", "b"), PARTS), Answers({}), RowFile(tmp_path / "p.jsonl"), batch_size=2)
