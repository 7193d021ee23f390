"""A model's parameters as whole tensors, a part at a time, whatever ZeRO stage keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

from torch import Tensor

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


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of a parameter as a whole; under ZeRO-3 a rank has a flat share of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole_bytes(parameter: Tensor) -> int:
    """Size of a parameter as a whole."""
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()
