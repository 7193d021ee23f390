from __future__ import annotations

from typing import Any

import pytest

from rlvid.evaluation.benchmarks.judged import Judged, Rating, read_hound, read_official
from rlvid.types import Message, Sample

SAMPLES = [
    Sample(str(i), (), (Message("user", ("What happens?",)),), "A dog runs.", extra={"caption": "A dog in a park."})
    for i in range(3)
]


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("{'pred': 'yes', 'score': 4}", Rating(True, 4)),
        ('Sure: {"pred": "no", "score": 0}', Rating(False, 0)),
        ("{'pred': 'yes', 'score': 4.8}", None),  # the protocol says whole numbers
        ("yes, 4", None),
        ("{'pred': 'yes', 'score': 4} {'pred': 'no', 'score': 1}", None),
    ],
)
def test_official_ratings(text: str, rating: Rating | None) -> None:
    assert read_official(text) == rating


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Explanation: fine.\nScore: 3", Rating(True, 3)),
        ("Explanation: no.\nScore: 2", Rating(False, 2)),
        ("Score: 6", None),
        ("It deserves 4", None),  # upstream would vote over all numbers, or give 1
    ],
)
def test_hound_ratings(text: str, rating: Rating | None) -> None:
    assert read_hound(text) == rating


def test_what_has_no_rating_is_counted_and_no_number() -> None:
    seen: list[str] = []

    def rate(prompts: Any, parse: Any) -> list[Any]:
        seen.extend(sample.question for _, sample in prompts)
        return [Rating(True, 5), "no rating"]

    benchmark = Judged(SAMPLES, rate, "hound")
    metrics = benchmark.score({"0": "A dog runs.", "1": "<b>No</b>"})
    assert metrics == {"accuracy": 1.0, "score": 5.0, "n": 1, "n_invalid": 2}
    assert [benchmark.value(sample, "") for sample in SAMPLES] == [1.0, None, None]
    assert "A dog in a park." in seen[0] and "<b>" not in seen[1]  # its tags are disabled
