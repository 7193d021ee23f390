"""Micro-batches: groups cut to a budget of tokens, and packed into rows of about that size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from rlvid.training.batch import Group
from rlvid.training.packing import pack
from rlvid.types import Prompt


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


def micro_batches(groups: Sequence[Group[Prompt]], budget: int, is_shared: bool = True) -> list[list[Group[Prompt]]]:
    """Rows of at most `budget` tokens; a group above it is cut, a single response above it is alone.

    Args:
        is_shared: off, every response has its own prompt.
    """
    parts = [part for group in groups for part in group.cut(budget if is_shared else 0)]
    return [[parts[i] for i in row] for row in pack_into_rows([p.cost for p in parts], budget)]


@torch.no_grad()
def score(
    model: nn.Module,
    groups: Sequence[Group[Prompt]],
    budget: int,
    is_shared: bool = True,
    rounds: Callable[[int], int] = lambda n: n,
) -> list[npt.NDArray[np.float32]]:
    """The model's outputs for each group: log-probs [sum R] of a policy, scores [S, D] of a model with a head.

    Args:
        model: `PackedPolicy`, `PackedScorer`, or an engine around one.
        rounds: number of rows -> number of calls of `model`. Ranks meet in collectives, so a rank with fewer rows
            than another repeats its last one.
    """
    parts = [(g, part) for g, group in enumerate(groups) for part in group.cut(budget if is_shared else 0)]
    rows = pack_into_rows([part.cost for _, part in parts], budget)
    values: list[npt.NDArray[np.float32]] = [np.zeros(0, dtype=np.float32)] * len(parts)
    device = next(model.parameters()).device
    for i in range(rounds(len(rows))):
        row = rows[min(i, len(rows) - 1)]
        chosen = [parts[j][1] for j in row]
        output = model(pack(chosen).to(device))[0]
        sizes = [part.n_tokens if output.ndim == 1 else max(1, len(part.responses)) for part in chosen]
        for j, own in zip(row, output.float().cpu().split(sizes), strict=True):
            values[j] = own.numpy()
    of_group: list[list[npt.NDArray[np.float32]]] = [[] for _ in groups]
    for (g, _), own in zip(parts, values, strict=True):
        of_group[g].append(own)
    return [np.concatenate(own) for own in of_group]
