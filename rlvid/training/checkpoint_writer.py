"""DeepSpeed's checkpoint files, written by a thread while training continues."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import Tensor


class BackgroundWriter(TorchCheckpointEngine):
    """`save` returns once it has a copy of the tensors on the host; a thread writes it to the disk.

    The same files as DeepSpeed's own writer. (Its decoupled one needs a compiled operator.)
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._files: list[Future[None]] = []

    def save(self, state_dict: Any, path: str) -> None:
        self._files.append(self._thread.submit(_write, copied(state_dict), path))

    def preserves_storage_sharing(self) -> bool:
        return False  # `copied` copies what a view shows, not the storage behind it

    @property
    def is_done(self) -> bool:
        return all(file.done() for file in self._files)

    def wait(self) -> None:
        """Return when all files are on the disk; raises what writing them raised."""
        files, self._files = self._files, []
        for file in files:
            file.result()


def copied(value: Any) -> Any:
    """A copy on the host that later steps do not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, copied(item)) for key, item in value.items())
    if isinstance(value, list):
        return [copied(item) for item in value]
    if type(value) is tuple:
        return tuple(copied(item) for item in value)
    return value


def _write(state: Any, path: str) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
