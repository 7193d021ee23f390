"""Rewards from a user's file and from a server, as they should be and as they should not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rlvid.config import CustomPart, EndpointPart
from rlvid.errors import UserError
from rlvid.rewards.part import Group, NoReward, Response, combine, score_rules
from rlvid.rewards.rules import check_rewards, make_parts
from rlvid.types import Reward
from tests.http_server import serving
from tests.prompts import sample_of

CODE = """
def good(prompt, responses, answer, **fields):
    return [float(answer in r) if r else None for r in responses]

def bad(prompt, responses, **fields):
    raise KeyError("speed")

def short(prompt, responses, **fields):
    return [1.0]

def odd(prompt, responses, **fields):
    return [float("nan"), "one", 7.0]

def scalar(prompt, responses, **fields):
    return 1.0
"""


def rewards_of(part: Any, *texts: str) -> list[Reward]:
    parts = make_parts([part])
    group = Group(sample_of(), tuple(Response(text, 1) for text in texts))
    return combine(parts, group, score_rules(parts, group))


@pytest.fixture
def code(tmp_path: Path) -> Path:
    file = tmp_path / "my_rewards.py"
    file.write_text(CODE)
    return file


def custom(code: Path, name: str) -> CustomPart:
    return CustomPart(kind="custom", path=f"{code}:{name}", range=(0.0, 1.0), accuracy=True)


def test_a_function_gives_one_value_for_each_response_or_none(code: Path) -> None:
    right, wrong, none = rewards_of(custom(code, "good"), "a square", "a ball", "")
    assert (right.total, right.is_right, wrong.total, wrong.is_right) == (1.0, True, 0.0, False)
    assert not none.is_valid and "has no value" in str(none.invalid_reason)


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("bad", ["raised KeyError: 'speed'"] * 3),
        ("short", ["returned 1 values for 3 responses"] * 3),
        ("odd", ["returned nan", "returned 'one', expected a number", "7.0 is outside the range from 0 to 1"]),
        ("scalar", ["returned float, expected a list of 3 numbers"] * 3),
    ],
)
def test_what_a_function_gets_wrong_is_an_invalid_reward_with_its_reason(
    code: Path, name: str, reasons: list[str]
) -> None:
    rewards = rewards_of(custom(code, name), "a", "b", "c")
    assert not any(r.is_valid for r in rewards)
    assert all(reason in str(r.invalid_reason) for r, reason in zip(rewards, reasons, strict=True))


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("def f(:", "f", "fails: SyntaxError"),
        ("import nowhere_at_all", "f", "fails: ModuleNotFoundError"),
        ("f = 1", "f", "has no function f"),
        (None, "f", "is missing"),
    ],
)
def test_a_file_that_cannot_be_used_is_found_before_the_start(
    tmp_path: Path, text: str | None, name: str, message: str
) -> None:
    file = tmp_path / "broken.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=rf"rewards.0 \(custom\): .*{message}"):
        check_rewards([CustomPart(kind="custom", path=f"{file}:{name}")])


Answer = Callable[[dict[str, Any], int], tuple[int, Any]]


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    with ExitStack() as stack:

        def start(answer: Answer) -> str:
            count = itertools.count()
            return f"{stack.enter_context(serving(lambda path, body: answer(body, next(count))))}/score"

        yield start


def endpoint(url: str, **settings: Any) -> EndpointPart:
    return EndpointPart(kind="endpoint", url=url, **{"timeout_s": 5.0, "deadline_s": 5.0} | settings)


def test_a_server_is_told_the_group_and_asked_again_while_it_may_recover(
    serve: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def answer(body: dict[str, Any], n: int) -> tuple[int, Any]:
        asked.append(body)
        return (503, {}) if n < 2 else (200, {"values": [1.5, None]})

    one, none = rewards_of(endpoint(serve(answer)), "a", "b")
    assert len(asked) == 3 and asked[0]["responses"] == ["a", "b"] and asked[0]["answer"] == "square"
    assert one.total == 1.5 and not none.is_valid


@pytest.mark.parametrize(
    ("status", "said", "reason"),
    [
        (500, {}, "no values within deadline_s=1: HTTP 500"),
        (404, {}, "HTTP 404"),
        (200, {"values": [1.0]}, "returned 1 values for 2 responses"),
        (200, {"scores": [1.0, 2.0]}, 'did not answer {"values"'),
        (200, b"<html>", 'did not answer {"values"'),
    ],
)
def test_what_a_server_gets_wrong_is_an_invalid_reward(
    serve: Callable[[Answer], str], status: int, said: Any, reason: str
) -> None:
    rewards = rewards_of(endpoint(serve(lambda body, n: (status, said)), deadline_s=1.0), "a", "b")
    assert all(reason in str(r.invalid_reason) for r in rewards)


def test_a_server_that_is_not_there_is_an_invalid_reward() -> None:
    (reward,) = rewards_of(endpoint("http://127.0.0.1:9/score", deadline_s=0.5), "a")
    assert "ConnectError" in str(reward.invalid_reason)


def test_a_function_without_a_value_raises_no_reward_itself(code: Path) -> None:
    (part,) = make_parts([custom(code, "bad")])
    assert isinstance(part(Group(sample_of(), (Response("a", 1),)))[0], NoReward)
