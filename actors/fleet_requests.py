"""The requests of a fleet that are not answered yet, and how they are handed to the replicas.

Everything here but `submit` runs in the thread of the fleet's pump.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ray import ObjectRef

from actors.fleet_state import Fleet, ReplicaId
from actors.pump import Pump
from rlvid.errors import UserError
from rlvid.types import Encoded, Prompt

if TYPE_CHECKING:
    from actors.fleet_replicas import Replicas

Question: TypeAlias = tuple[str, tuple[Any, ...]]  # method of a generator, and its arguments after the prompts


@dataclass(frozen=True)
class _Request:
    """One prompt for `Generator.generate` or `first_logprobs`. Those with equal questions share a message."""

    question: Question
    prompt: ObjectRef[Prompt]
    future: Future[Any]


class Requests:
    """A table of open requests.

    Args:
        on_answer: called when a replica has answered.

    Attributes:
        replicas: makes the calls.
    """

    replicas: Replicas

    def __init__(self, fleet: Fleet[int], pump: Pump, timeout_s: float, on_answer: Callable[[], None]):
        self._fleet, self._pump, self._timeout_s, self._on_answer = fleet, pump, timeout_s, on_answer
        self._open: dict[int, _Request] = {}
        self._numbers = itertools.count()

    def submit(self, question: Question, prompts: Sequence[Encoded]) -> list[Future[Any]]:
        """Queue one request for each prompt; from any thread."""
        requests = [_Request(question, p.prompt, self._pump.future()) for p in prompts]

        def queue() -> None:
            new = dict(zip(self._numbers, requests, strict=False))
            self._open |= new
            self.hand_out(list(new))

        self._pump.post(queue)
        return [request.future for request in requests]

    def hand_out(self, new: Sequence[int] = ()) -> None:
        """One message per replica and question, however many prompts it has."""
        for replica, items in self._fleet.assign(new).items():
            for question, group in itertools.groupby(items, key=lambda item: self._open[item].question):
                self._ask(replica, question, list(group))

    def give_up(self, items: Sequence[int], cause: str) -> None:
        """These failed too often."""
        for item in items:
            error = UserError(f"the same prompts failed on every generator that tried them: {cause}")
            self._open.pop(item).future.set_exception(error)

    def abandon(self) -> None:
        """Give up all; who waits for one gets an error."""
        self._fleet.cancel()
        for request in self._open.values():
            request.future.set_exception(RuntimeError("the request was given up"))
        self._open.clear()

    def _ask(self, replica: ReplicaId, question: Question, items: Sequence[int]) -> None:
        def answered(values: Sequence[Any]) -> None:
            for item, value in zip(items, values, strict=True):
                if self._fleet.done(replica, item):
                    self._open.pop(item).future.set_result(value)
            self._on_answer()

        method, arguments = question
        prompts = [self._open[item].prompt for item in items]
        ref = getattr(self.replicas.actors[replica], method).remote(prompts, *arguments)
        self.replicas.track(ref, method, replica, self._timeout_s, answered, items)
