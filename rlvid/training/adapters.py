"""The adapters of the reference: with LoRA the reference is the model in training with other adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlvid.training.parameters import NamedTensor


class ReferenceAdapters:
    """Copies of the adapters at one moment. All ranks make the same calls.

    New adapters change nothing: the reference is the base model at first.
    """

    def __init__(self, trained: Sequence[NamedTensor], is_sharded: bool):
        self._trained, self._is_sharded = trained, is_sharded
        self._kept = self._present()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the reference's adapters inside."""
        present = self._present()
        self._put(self._kept)
        try:
            yield
        finally:
            self._put(present)

    def freeze(self, file: Path) -> None:
        """From now on they are the current ones. Rank 0 writes them for a resumed run."""
        self._kept = self._present()
        if dist.get_rank() == 0:
            save_file(self._kept, file)

    def load(self, file: Path) -> None:
        device = next(iter(self._kept.values())).device
        self._kept |= {name: tensor.to(device) for name, tensor in load_file(file).items()}

    def _present(self) -> dict[str, Tensor]:
        """Copies, whole on every rank."""
        with GatheredParameters([p for _, p in self._trained], enabled=self._is_sharded):
            return {name: p.detach().clone() for name, p in self._trained}

    @torch.no_grad()
    def _put(self, state: Mapping[str, Tensor]) -> None:
        with GatheredParameters([p for _, p in self._trained], modifier_rank=0, enabled=self._is_sharded):
            for name, parameter in self._trained:
                parameter.copy_(state[name])
