"""A model's parameters as whole tensors, a part at a time, whatever ZeRO stage keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch.distributed as dist
from torch import Tensor

from rlvid.models.lora import dequantized

NamedTensor: TypeAlias = tuple[str, Tensor]
Part: TypeAlias = tuple[list[NamedTensor], bool]  # tensors, and whether it is the last part


def in_parts(named: Iterable[NamedTensor], part_bytes: int, is_sharded: bool = False) -> Iterator[Part]:
    """Parts of about `part_bytes`, in order; a larger tensor is a part by itself.

    Args:
        is_sharded: ZeRO-3. All ranks iterate together, and a part is whole only until the next one is taken.
    """
    parts: list[list[NamedTensor]] = []
    size = 0
    for name, tensor in named:
        if not parts or size + whole_bytes(tensor) > part_bytes:
            parts.append([])
            size = 0
        parts[-1].append((name, tensor))
        size += whole_bytes(tensor)
    for i, part in enumerate(parts):
        is_last = i == len(parts) - 1
        if not is_sharded:
            yield part, is_last
            continue
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor for _, tensor in part]):
            yield part, is_last


def on_rank_0(parameter: Tensor, is_sharded: bool) -> Tensor | None:
    """The whole parameter on rank 0, as a matrix if it is kept in 4 bits, and None elsewhere. Under ZeRO-3 all ranks
    call this together."""
    if not is_sharded:
        return dequantized(parameter).detach() if dist.get_rank() == 0 else None
    share: Tensor = parameter.ds_tensor.detach()  # type: ignore[attr-defined]  # flat, filled up to equal shares
    if dist.get_rank():
        dist.gather(share, dst=0)
        return None
    flat = share.new_empty(dist.get_world_size() * share.numel())
    dist.gather(share, list(flat.chunk(dist.get_world_size())), dst=0)
    whole: Tensor = flat[: parameter.ds_numel].view(whole_shape(parameter))  # type: ignore[attr-defined]
    return whole


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of a parameter as a whole; under ZeRO-3 a rank has a flat share of it, and 4-bit weights are bytes."""
    quantized = getattr(parameter, "quant_state", None)
    return tuple(quantized.shape if quantized else getattr(parameter, "ds_shape", parameter.shape))


def whole_bytes(parameter: Tensor) -> int:
    """Size of a parameter as a whole."""
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()
