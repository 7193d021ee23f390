"""What ranks agree on, because they must make the same collectives."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist


def most_of(device: torch.device | str) -> Callable[[int], int]:
    """A function from this rank's count to the largest of all ranks, which call it together."""

    def most(count: int) -> int:
        largest = torch.tensor(count, device=device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    return most
