"""Rewards from the user's own code: a Python function in the reward workers, or a server."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from rlvid.config import CustomPart, EndpointPart
from rlvid.errors import UserError
from rlvid.rewards.part import Group, NoReward, Values
from rlvid.servers import may_recover, open_client

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0  # between the tries of a request; doubled each time


def fields_of(group: Group) -> dict[str, Any]:
    """What the user's code is told about a sample; further manifest fields under their own names."""
    sample = group.sample
    return {
        **{name: value for name, value in sample.extra.items() if name not in ("prompt", "responses")},
        "id": sample.id,
        "answer": sample.answer,
        "choices": list(sample.choices) if sample.choices else None,
        "problem_type": sample.problem_type,
        "media": [medium.path for medium in sample.media],
    }


@cache
def load_function(path: str) -> Callable[..., Any]:
    """The function that `path`, as my_rewards.py:score, names.

    Raises:
        UserError: the file is missing, fails, or has no such function.
    """
    file, _, name = path.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"{file} is missing")
    spec = importlib.util.spec_from_file_location(f"rlvid_custom_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise UserError(f"{file} fails: {type(e).__name__}: {e}") from e
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{file} has no function {name}")
    return function


def custom(part: CustomPart, group: Group) -> Values:
    """What the function returns. No value where it fails or returns something else than a list of numbers or None."""
    responses = [response.text for response in group.responses]
    try:
        returned = load_function(part.path)(prompt=group.sample.question, responses=responses, **fields_of(group))
    except Exception as e:
        raise NoReward(f"{part.path} raised {type(e).__name__}: {e}") from e
    return values_of(returned, len(responses), part.path)


def values_of(returned: Any, n: int, who: str) -> Values:
    """
    Raises:
        NoReward: not a list of n.
    """
    try:
        values = list(returned)
    except TypeError:
        raise NoReward(f"{who} returned {type(returned).__name__}, expected a list of {n} numbers") from None
    if len(values) != n or isinstance(returned, str | Mapping):
        raise NoReward(f"{who} returned {len(values)} values for {n} responses")
    return [_value(value, who) for value in values]


def _value(value: Any, who: str) -> float | NoReward:
    if value is None:
        return NoReward(f"{who} has no value")
    try:
        number = float(value)
    except (TypeError, ValueError):
        return NoReward(f"{who} returned {value!r:.80}, expected a number")
    return number if math.isfinite(number) else NoReward(f"{who} returned {number}")


def endpoint(part: EndpointPart, group: Group) -> Values:
    """Sends the group as JSON, and reads {"values": [...]}. Tries again, with longer and longer pauses, while the
    server may recover.

    Raises:
        NoReward: no answer within the deadline, or one that waiting does not change.
    """
    import httpx

    responses = [response.text for response in group.responses]
    body = {**fields_of(group), "prompt": group.sample.question, "responses": responses}
    end_s, pause_s = time.monotonic() + part.deadline_s, FIRST_PAUSE_S
    with open_client(part.url, part.api_key_env, f"rewards ({part.label}): url", httpx.Client) as client:
        while True:
            try:
                timeout_s = min(part.timeout_s, max(end_s - time.monotonic(), 0.1))
                response = client.post(part.url, json=body, timeout=timeout_s)
                failure = f"HTTP {response.status_code}"
                if response.status_code == 200:
                    return _values_in(response, len(responses), part.url)
                if not may_recover(response.status_code):
                    raise NoReward(f"{part.url}: {failure}")
            except httpx.HTTPError as e:
                failure = f"{type(e).__name__}: {e}"
            if time.monotonic() + pause_s >= end_s:
                raise NoReward(f"{part.url}: no values within deadline_s={part.deadline_s:g}: {failure}")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _values_in(response: Any, n: int, url: str) -> Values:
    try:
        returned = response.json()["values"]
    except (ValueError, LookupError, TypeError):
        raise NoReward(f'{url} did not answer {{"values": [...]}}') from None
    return values_of(returned, n, url)
