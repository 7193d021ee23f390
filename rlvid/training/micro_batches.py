"""Micro-batches: which groups share a forward, and which are too large for one, within a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from rlvid.training.batch import Group
from rlvid.training.depth_first import PromptPass
from rlvid.training.packing import Count, pack
from rlvid.types import Prompt

T = TypeVar("T")


def pack_into_rows(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of items that share a row, by first-fit decreasing: at most 11/9 of the fewest rows possible, plus one.

    Items of similar cost share a row, so attention, which pads, wastes little. An item above the budget is alone.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        row = next((r for r, room in enumerate(left) if costs[i] <= room), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(budget)
        rows[row].append(i)
        left[row] -= costs[i]
    return [sorted(row) for row in rows]


@dataclass(frozen=True)
class MicroBatches:
    """The passes of one rank over some groups.

    `rows` are packed, one pass each. A group in `deep` is above the budget: its prompt has a pass of its own, from
    which those of its parts continue (`PromptPass`).
    """

    parts: list[tuple[int, Group[Prompt]]]  # with the index of the group that each is of, in order
    rows: list[list[int]]  # indices of parts
    deep: list[list[int]]

    @classmethod
    def of(cls, groups: Sequence[Group[Prompt]], budget: int, is_shared: bool = True) -> MicroBatches:
        """
        Args:
            groups: at least one.
            budget: tokens of a pass; a single response above it has one to itself.
            is_shared: off, every response (or pair) has its own prompt, and nothing is deep.
        """
        parts: list[tuple[int, Group[Prompt]]] = []
        shallow: list[int] = []
        deep: list[list[int]] = []
        for g, group in enumerate(groups):
            own = range(len(parts), len(parts) + len(cut := group.cut(budget if is_shared else 0)))
            parts += [(g, part) for part in cut]
            if is_shared and len(own) > 1 and group.prompt.length > 1:
                deep.append(list(own))
            else:
                shallow += own
        rows = pack_into_rows([parts[i][1].cost for i in shallow], budget)
        deep.sort(key=len, reverse=True)  # so that ranks have about as many parts at a time
        return cls(parts, [[shallow[i] for i in row] for row in rows], deep)

    def whole_rows(self, most: Count) -> Iterator[tuple[list[int], bool]]:
        """The rows, and whether each is the rank's own: one with fewer rows than others repeats a part, which must not
        count."""
        yield from repeated(self.rows, self.spare, most)

    def deep_groups(self, most: Count) -> Iterator[tuple[list[int], bool]]:
        """The same for the parts of each deep group. Of a part that does not count, only `Group.of_responses` continues
        from a prompt's pass."""
        yield from repeated(self.deep, self.spare, most)

    @property
    def spare(self) -> list[int]:
        """The smallest part."""
        return [min(range(len(self.parts)), key=lambda i: self.parts[i][1].cost)]


def repeated(items: Sequence[T], spare: T, most: Count) -> Iterator[tuple[T, bool]]:
    """As many as the rank with most has: its own items, then `spare`; and whether each is an own one."""
    for i in range(most(len(items))):
        yield (items[i], True) if i < len(items) else (spare, False)


@torch.no_grad()
def score(
    model: Any,
    groups: Sequence[Group[Prompt]],
    budget: int,
    is_shared: bool = True,
    most: Count = lambda n: n,
    both: bool = False,
) -> list[npt.NDArray[np.float32]]:
    """The model's outputs for each group: log-probs [sum R] of a policy, scores [S, D] of a model with a head, values
    [sum R, 1] of a critic, both [sum R, 2] of a policy with a critic's head.

    Args:
        model: `PackedPolicy`, `PackedScorer`, or an engine around one.
        both: log-probs of a policy, and whether each token is the most likely one (1 or 0) [sum R, 2].
    """
    batches = MicroBatches.of(groups, budget, is_shared and not model.family.is_recurrent)
    values: list[npt.NDArray[np.float32]] = [np.zeros(0, dtype=np.float32)] * len(batches.parts)
    device = next(model.parameters()).device

    def keep(outputs: tuple[torch.Tensor, torch.Tensor], row: Sequence[int]) -> None:
        chosen = [batches.parts[i][1] for i in row]
        sizes = [part.n_tokens if model.per_token else max(1, len(part.responses)) for part in chosen]
        values_of_row = torch.stack(outputs, dim=1) if both else outputs[0]
        for i, own in zip(row, values_of_row.float().cpu().split(sizes), strict=True):
            values[i] = own.numpy()

    for row, _ in batches.whole_rows(most):
        keep(model(pack([batches.parts[i][1] for i in row]).to(device)), row)
    for indices, _ in batches.deep_groups(most):
        prompt = PromptPass(model, batches.parts[indices[0]][1].prompt, device)
        for i, _ in repeated(indices, indices[0], most):
            keep(model(prompt.row(batches.parts[i][1].of_responses())), [i])
    of_group: list[list[npt.NDArray[np.float32]]] = [[] for _ in groups]
    for (g, _), own in zip(batches.parts, values, strict=True):
        of_group[g].append(own)
    return [np.concatenate(own) for own in of_group]
