"""What a step trains on: groups of responses to one prompt, with named arrays.

An objective names the arrays that it needs (`Objective.needs`); nothing here knows any of the names. A prompt may be a
reference to one (Ray's, for example): only `pack` looks inside.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlvid.types import Span

P = TypeVar("P")
Q = TypeVar("Q")
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Group(Generic[P]):
    """One prompt, the G responses to it, and the arrays of the objective.

    Tokens inside the prompt may be trained too: those of earlier answers, which the prompt's forward predicts anyway.

    Raises:
        ValueError: an array of `tokens` has not one value per trained token.
    """

    prompt: P
    prompt_cost: int  # Prompt.cost
    responses: tuple[npt.NDArray[np.int32], ...] = ()  # G arrays [R_g]; none where the prompt itself is scored
    tokens: Mapping[str, Array] = field(default_factory=dict)  # name -> [n_tokens]: `in_prompt`, then the responses
    targets: Mapping[str, Array] = field(default_factory=dict)  # name -> values of the prompt, any shape
    temperature: float | None = None  # responses were sampled at it, with the family's bans; None: they were given
    in_prompt: tuple[Span, ...] = ()  # runs of the prompt's tokens that are trained
    unit_size: int = 1  # this many neighbours are never separated: 2 for a chosen and a rejected response

    def __post_init__(self) -> None:
        for name, values in self.tokens.items():
            if values.shape != (self.n_tokens,):
                raise ValueError(f"{name} has shape {values.shape}; the group trains {self.n_tokens} tokens")

    @property
    def n_tokens(self) -> int:
        """Trained tokens: those of the responses, and of `in_prompt`."""
        return sum(span.length for span in self.in_prompt) + self._n_response_tokens

    @property
    def _n_response_tokens(self) -> int:
        return sum(len(ids) for ids in self.responses)

    @property
    def cost(self) -> int:
        """Tokens of the group's forward."""
        return self.prompt_cost + self._n_response_tokens

    def with_prompt(self, prompt: Q) -> Group[Q]:
        """The same group with its prompt in another form."""
        return replace(self, prompt=prompt)  # type: ignore[return-value, arg-type]

    def with_tokens(self, **arrays: Array) -> Group[P]:
        """The same group with more arrays per trained token."""
        return replace(self, tokens={**self.tokens, **arrays})

    def of_responses(self) -> Group[P]:
        """The group without the trained tokens of its prompt."""
        n = self._n_response_tokens
        tokens = {name: values[len(values) - n :] for name, values in self.tokens.items()}
        return replace(self, in_prompt=(), tokens=tokens)

    def cut(self, budget: int) -> list[Group[P]]:
        """The same work in parts of about `budget` tokens with the prompt, each with at least one response.

        Beside a prompt that needs nearly all of the budget, or more, a part's responses have 1/64 of it: a pass of a
        few tokens would hardly use a GPU. A budget of 0 shares nothing: one part per `unit_size` responses. With
        `in_prompt` the group stays whole.
        """
        if not self.responses or self.in_prompt:
            return [self]
        parts, first, room = [], 0, max(budget - self.prompt_cost, budget // 64)
        lengths = [len(ids) for ids in self.responses]
        for last in range(self.unit_size, len(lengths) + 1, self.unit_size):
            if last == len(lengths) or sum(lengths[first : last + self.unit_size]) > room:
                parts.append(self._part(first, last))
                first = last
        return parts

    def _part(self, first: int, last: int) -> Group[P]:
        """Responses [first, last)."""
        begin = sum(len(ids) for ids in self.responses[:first])
        end = begin + sum(len(ids) for ids in self.responses[first:last])
        tokens = {name: values[begin:end] for name, values in self.tokens.items()}
        return replace(self, responses=self.responses[first:last], tokens=tokens)


def check_arrays(groups: Sequence[Group[Any]], needs: Collection[str], objective: str) -> None:
    """
    Raises:
        ValueError: a group lacks an array that the objective needs.
    """
    for group in groups:
        if missing := sorted(set(needs) - group.tokens.keys() - group.targets.keys()):
            raise ValueError(f"{objective} needs {', '.join(missing)}, which the batch does not have")


def flat(groups: Sequence[Group[Any]], name: str, like: Tensor) -> Tensor:
    """The groups' arrays of one name, one after another, on the device of `like`."""
    arrays = [group.tokens[name] if name in group.tokens else group.targets[name] for group in groups]
    return torch.from_numpy(np.concatenate(arrays)).to(like.device)
