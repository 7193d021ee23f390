"""What the backward needs of the forward, kept in the host's memory."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

LEAST_BYTES = 2**20  # smaller tensors stay: a copy costs more time than their place is worth

Kept: TypeAlias = tuple[torch.device | None, Tensor]


def on_host() -> saved_tensors_hooks:
    """A context: what autograd saves inside goes to the host, and back when the backward asks for it.

    Weights stay where they are. (torch's own `save_on_cpu` would copy them too, and under ZeRO-3 keep them whole.)
    """

    def pack(tensor: Tensor) -> Kept:
        if isinstance(tensor, nn.Parameter) or tensor.untyped_storage().nbytes() < LEAST_BYTES or tensor.is_sparse:
            return None, tensor
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copy.copy_(tensor, non_blocking=tensor.is_cuda)
        return tensor.device, copy

    def unpack(kept: Kept) -> Tensor:
        device, tensor = kept
        return tensor if device is None else tensor.to(device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)
