"""Micro-batches: groups cut to a budget of tokens, and laid into rows that fill it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rlvid.training.packing import Group, PackedRow, pack


def fill(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of items that share a row, by first-fit decreasing: at most 11/9 of the fewest rows possible, plus one.

    Of like costs in a row little is lost to padding, which attention needs. An item above the budget is alone.
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


def micro_batches(groups: Sequence[Group], budget: int, is_shared: bool = True) -> list[list[Group]]:
    """Rows of at most `budget` tokens; a group above it is cut, a single response above it is alone.

    Args:
        is_shared: off, every response has a prompt of its own.
    """
    parts = [part for group in groups for part in group.cut(budget if is_shared else 0)]
    return [[parts[i] for i in row] for row in fill([p.cost for p in parts], budget)]


def score(
    logprobs: Callable[[PackedRow], Tensor],
    groups: Sequence[Group],
    budget: int,
    is_shared: bool = True,
    rounds: Callable[[int], int] = lambda n: n,
    size: Callable[[Group], int] = lambda group: group.responses.n_tokens,
) -> list[npt.NDArray[np.float32]]:
    """Log-probs of all response tokens: one array [sum R] per group.

    Args:
        logprobs: a row -> log-probs [M] of its response tokens.
        size: how many values a group has.
        rounds: of the number of rows, how often `logprobs` has to be called: ranks meet in collectives, so one with
            fewer rows repeats its last.
    """
    parts = [(g, part) for g, group in enumerate(groups) for part in group.cut(budget if is_shared else 0)]
    rows = fill([part.cost for _, part in parts], budget)
    values: list[npt.NDArray[np.float32]] = [np.zeros(0, dtype=np.float32)] * len(parts)
    for i in range(rounds(len(rows))):
        row = rows[min(i, len(rows) - 1)]
        chosen = [parts[j][1] for j in row]
        flat = logprobs(pack(chosen)).float().cpu().numpy()
        ends = np.cumsum([size(part) for part in chosen])[:-1]
        for j, own in zip(row, np.split(flat, ends), strict=True):
            values[j] = own
    of_group: list[list[npt.NDArray[np.float32]]] = [[] for _ in groups]
    for (g, _), own in zip(parts, values, strict=True):
        of_group[g].append(own)
    return [np.concatenate(own) for own in of_group]
