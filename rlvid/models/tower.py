"""The vision tower over a long clip, a piece of whole frames at a time.

Its attention never crosses a frame (Qwen-VL: two frames, a temporal patch), so this is exact. In the backward a piece
is computed again: of a long clip the activations of one piece are in memory, not those of the clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlvid.models.families.vision import Grid, VisionFamily

PATCHES_AT_A_TIME = 2**12
NORMALISED_AT_A_TIME = 2**12  # those of Qwen-VL are 20 MiB in float32
Count: TypeAlias = Callable[[int], int]
"""This rank's number of passes -> the largest of all ranks. They meet in collectives, so all make equally many."""
Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]  # positional and named arguments of a tower's forward


def cut_grids(grids: Sequence[Grid], limit: int) -> list[list[Grid]]:
    """Grids of consecutive pieces of at most `limit` patches, or of one temporal patch where that has more."""
    pieces: list[list[Grid]] = [[]]
    room = limit
    for t, h, w in grids:
        while t:
            n = min(t, max(room // (h * w), 0 if pieces[-1] else 1))
            if n:
                pieces[-1].append((n, h, w))
            t, room = t - n, room - n * h * w
            if t:
                pieces.append([])
                room = limit
    return pieces


def cut_patches(limit: int, patches: Tensor, grid_thw: Tensor, **others: Any) -> Iterator[Call]:
    """The calls of Qwen-VL's tower: patches [n, dim] and the grids [V, 3] of their clips."""
    at = 0
    for piece in cut_grids(grid_thw.tolist(), limit):
        n = sum(map(math.prod, piece))
        yield (patches[at : at + n],), {"grid_thw": grid_thw.new_tensor(piece), **others}
        at += n


def cut_frames(limit: int, pixel_values: Tensor, *, patch_size: int, **others: Any) -> Iterator[Call]:
    """The calls of a tower that takes frames [n, 3, H, W]; what has a row for each frame is cut as they are."""
    n, _, height, width = pixel_values.shape
    size = frames_in_piece(height // patch_size, width // patch_size, limit)
    for at in range(0, n, size):
        own = {
            key: value[at : at + size] if isinstance(value, Tensor) and len(value) == n else value
            for key, value in others.items()
        }
        yield (pixel_values[at : at + size],), own


def frames_in_piece(height: int, width: int, limit: int) -> int:
    """Frames of height x width patches in a piece."""
    return max(1, limit // (height * width))


def normalise(patches: Tensor, family: VisionFamily, dtype: torch.dtype) -> Tensor:
    """uint8 patches [n, 3 * rest] -> normalised [n, 3 * rest]; equal to the processor's float output, difference 0.

    Source: transformers folds rescaling into mean and std, (x - 255 mean) / (255 std).
    """
    mean = torch.tensor(family.pixel_mean, device=patches.device)[:, None] * 255.0
    std = torch.tensor(family.pixel_std, device=patches.device)[:, None] * 255.0
    normalised = torch.empty(patches.shape, dtype=dtype, device=patches.device)
    for part, out in zip(patches.split(NORMALISED_AT_A_TIME), normalised.split(NORMALISED_AT_A_TIME), strict=True):
        x = part.view(len(part), 3, -1).float()
        out.copy_(x.sub_(mean).div_(std).flatten(1))
    return normalised


def tower_inputs(
    network: PreTrainedModel, family: VisionFamily, patches: Tensor, grid_thw: Tensor, most: Count
) -> dict[str, Tensor]:
    """The network's inputs for clips: uint8 patches [n, patch_dim] of grids [V, 3].

    Under ZeRO-3 the ranks meet in collectives inside the tower: all of them call this together, and agree on the number
    of its passes.
    """
    passes = most(family.tower_passes(grid_thw.tolist()))
    for tower in family.towers:
        network.get_submodule(f"model.{tower}").forward.passes = passes
    return family.network_inputs(normalise(patches, family, network.dtype), grid_thw)


class InPieces:
    """A tower's forward over the pieces of its input; over the whole of it where activations are kept anyway.

    Args:
        cut: limit of patches, the tower's arguments -> the calls of its pieces.

    Attributes:
        passes: make at least as many, to no effect: ranks meet in collectives inside the tower.
    """

    def __init__(self, tower: nn.Module, cut: Callable[..., Iterator[Call]]):
        self._tower, self._forward, self._cut = tower, tower.forward, cut
        self.passes = 1

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if torch.is_grad_enabled() and not self._recomputes:
            return self._forward(*arguments, **named)
        calls = list(self._cut(PATCHES_AT_A_TIME, *arguments, **named))
        own = len(calls)
        calls += calls[-1:] * (self.passes - own)
        if len(calls) == 1:
            return self._forward(*arguments, **named)
        outputs = [checkpoint(self._forward, *args, use_reentrant=False, **keys) for args, keys in calls]
        return _joined(outputs, own)

    @property
    def _recomputes(self) -> bool:
        """Whether transformers' activation checkpointing is on."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self._tower.modules())


def _joined(values: Sequence[Any], own: int) -> Any:
    """The outputs of all calls as one; those after the first `own` only take part in the backward."""
    first = values[0]
    if isinstance(first, Tensor):
        nothing = sum((value.sum() * 0.0 for value in values[own:]), torch.zeros((), device=first.device))
        return torch.cat(list(values[:own])) + nothing.to(first.dtype)
    if isinstance(first, dict):  # transformers' outputs are dictionaries
        return type(first)(**{key: _joined([value[key] for value in values], own) for key in first})
    if isinstance(first, list | tuple):
        return type(first)(_joined(items, own) for items in zip(*values, strict=True))
    return first
