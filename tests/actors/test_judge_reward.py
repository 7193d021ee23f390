"""A judge's opinion as a reward: ratings, and win rates within a group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.judge import Judge
from actors.judge_reward import judge_values
from rlvid.config import JudgePart
from rlvid.errors import UserError
from rlvid.files import RowFile
from rlvid.rewards.judge_prompts import TRUST_DIMS, Answer, parse_score, parse_trust
from rlvid.rewards.part import Group, NoReward, Response
from rlvid.types import Encoded, Sample
from tests.prompts import sample_of


class Clips:
    def encode(self, samples: Sequence[Sample]) -> list[Encoded]:
        return [Encoded(s, None, 0, 0) for s in samples]


class Backend:
    """Answers each question by a function of its text."""

    id = "test"

    def __init__(self, answer: Callable[[str], str | None]):
        self._answer = answer
        self.asked: list[str] = []

    def ask(self, prompts: Sequence[Encoded], keep: Any) -> None:
        self.asked += [p.sample.question for p in prompts]
        keep([(p, Answer(self._answer(p.sample.question), "it is down")) for p in prompts])


def values(
    folder: Path, mode: str, answer: Callable[[str], str | None], *texts: str, invalid: float = 1.0
) -> list[Any]:
    backend = Backend(answer)
    judge = Judge(backend, Clips(), RowFile(folder / "cache.jsonl", "key"), invalid, "rewards.0.judge")  # type: ignore[arg-type]
    part = JudgePart.model_validate({"kind": "judge", "mode": mode})
    group = Group(sample_of(), tuple(Response(text, 1) for text in texts))
    return [list(own) for own in judge_values(part, judge, [group, group])]


def test_a_score_is_read_or_there_is_none(tmp_path: Path) -> None:
    def answer(question: str) -> str | None:
        return {"good": "<score>10</score>", "poor": "<score>1</score>", "odd": "ten"}.get(
            question.split("<response> ")[1].split(" ")[0]
        )

    for good, poor, odd, down in values(tmp_path, "score", answer, "good", "poor", "odd", "down"):
        assert (good, poor) == (1.0, 0.0)
        assert isinstance(odd, NoReward) and "no single rating" in str(odd)
        assert isinstance(down, NoReward) and str(down) == "it is down"


def test_too_many_answers_that_cannot_be_read_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rewards.0.judge.max_invalid_fraction=0.25"):
        values(tmp_path, "score", lambda question: "ten", "a", "b", invalid=0.25)


def test_win_rate_is_the_share_of_the_group_that_a_response_beats(tmp_path: Path) -> None:
    order = ["best", "middle", "last"]

    def answer(question: str) -> str:
        one, two = (question.split(f"<response_{i}> ")[1].split(" ")[0] for i in (1, 2))
        return f"<choice>{1 if order.index(one) < order.index(two) else 2}</choice>"

    first, second = values(tmp_path, "win_rate", answer, "last", "best", "middle", "best")
    # the two best ones are equal: half a win each
    assert first == second == pytest.approx([0.0, 2.5 / 3, 1 / 3, 2.5 / 3])


def test_a_judge_that_always_takes_the_first_gives_ties(tmp_path: Path) -> None:
    assert values(tmp_path, "win_rate", lambda question: "<choice>1</choice>", "a", "b")[0] == [0.5, 0.5]


def test_trust_is_the_mean_of_seven_scores_each_given_once() -> None:
    lines = [f"{name}: {score}/10" for name, score in zip(TRUST_DIMS, (10, 10, 1, 1, 1, 10, 1), strict=True)]
    assert parse_trust("\n".join(lines)) == pytest.approx(3 / 7)
    assert parse_trust("\n".join(lines[1:])) is None
    assert parse_trust("\n".join([*lines, lines[0]])) is None
    assert parse_score("<score>7</score> or <score>8</score>") is None and parse_score("<score>11</score>") is None
