"""Writes a model's parameters as a Hugging Face checkpoint, a tensor at a time: no process holds the whole model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rlvid.config import LoraConfig
from rlvid.files import copy_other_files, sync_folder
from rlvid.models.families.chat import ChatFamily
from rlvid.models.heads import Head
from rlvid.models.lora import file_name, is_adapter, merged, plain_name, save_adapter
from rlvid.training.parameters import NamedTensor, on_rank_0, whole_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE_BYTES = 4 * 2**30
HEAD = "head."  # before the names of a head's parameters
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"  # transformers' names
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # those of safetensors


def write_checkpoint(
    folder: Path,
    checkpoint: Path,
    network: PreTrainedModel,
    family: ChatFamily,
    named: Sequence[NamedTensor],
    is_sharded: bool,
    lora: LoraConfig | None,
    head: Head | None,
) -> None:
    """Write a model on rank 0; all ranks call this together.

    Args:
        checkpoint: folder that the tokenizer and the processor are copied from, the adapter's base.
        named: all parameters; the names of a head begin with `HEAD`.
        lora: adapters are merged into the weights, and are in `folder/adapter` by themselves too.
    """
    is_writer = dist.get_rank() == 0
    apart = [(name, p) for name, p in named if name.startswith(HEAD) or is_adapter(name)]  # small
    plain = [(name, p) for name, p in named if not (name.startswith(HEAD) or is_adapter(name))]
    small = {name: on_rank_0(p, is_sharded) for name, p in apart}
    kept = {name: t.cpu() for name, t in small.items() if t is not None}
    if is_writer:
        files = WeightFiles(folder, network, [Described.of(name, parameter) for name, parameter in plain])
    for name, parameter in plain:  # all ranks give, one writes
        if (whole := on_rank_0(parameter, is_sharded)) is not None:
            files.add(plain_name(name), merged(name, whole, kept, lora) if lora else whole)
    if is_writer:
        if head:
            head.save({n.removeprefix(HEAD): t for n, t in kept.items() if n.startswith(HEAD)}, folder)
        if lora:
            adapters = {file_name(name): t for name, t in kept.items() if is_adapter(name)}
            save_adapter(folder / "adapter", adapters, lora, family.no_lora, base=str(checkpoint))
        files.close(checkpoint)
    dist.barrier()


class Described(NamedTuple):
    """A parameter of the network, as a whole."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, parameter: Tensor) -> Described:
        return cls(plain_name(name), getattr(parameter, "quant_state", parameter).dtype, whole_shape(parameter))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFiles:
    """The weights of `network` in `folder`, under the names of its checkpoint.

    A file of safetensors is a JSON header with the place of every tensor, then their bytes. `safetensors` itself writes
    a file from tensors that are all there.

    Args:
        described: what is written, in the order in which it comes.
    """

    def __init__(
        self, folder: Path, network: PreTrainedModel, described: Sequence[Described], file_bytes: int = FILE_BYTES
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._network = folder, network
        files: list[list[Described]] = []
        room = 0
        for one in described:
            if one.nbytes > room or not files:
                files.append([])
                room = file_bytes
            files[-1].append(one)
            room -= one.nbytes
        n = len(files)
        names = [SINGLE_FILE] if n == 1 else [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
        self._files = list(zip(names, files, strict=True))
        self._first = {tensors[0].name: (name, tensors) for name, tensors in self._files}
        self._open: BinaryIO | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        if name in self._first:
            self._begin(*self._first[name])
        assert self._open is not None
        self._open.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def close(self, checkpoint: Path) -> None:
        """Write the index and the configuration, and copy what else is in `checkpoint` (tokenizer, processor)."""
        if self._open is not None:
            self._open.close()
        if len(self._files) > 1:
            index = {self._saved_name(one): name for name, tensors in self._files for one in tensors}
            total = sum(one.nbytes for _, tensors in self._files for one in tensors)
            content = {"metadata": {"total_size": total}, "weight_map": index}
            (self._folder / INDEX_FILE).write_text(json.dumps(content, indent=1))
        config = self._network.config
        config.dtype = str(self._network.dtype).removeprefix("torch.")
        config.architectures = [type(self._network).__name__]
        config.save_pretrained(self._folder)
        copy_other_files(checkpoint, self._folder)
        sync_folder(self._folder)

    def _begin(self, file: str, tensors: Sequence[Described]) -> None:
        if self._open is not None:
            self._open.close()
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for one in tensors:
            place = {"dtype": DTYPES[one.dtype], "shape": one.shape, "data_offsets": (at, at + one.nbytes)}
            header[self._saved_name(one)] = place
            at += one.nbytes
        content = json.dumps(header).encode()
        content += b" " * (-len(content) % 8)  # the tensors begin at a multiple of 8
        self._open = (self._folder / file).open("wb")
        self._open.write(len(content).to_bytes(8, "little") + content)

    def _saved_name(self, one: Described) -> str:
        """The name in the checkpoint, which may differ from the network's."""
        from transformers.core_model_loading import revert_weight_conversion

        (name,) = revert_weight_conversion(self._network, {one.name: torch.empty(one.shape, device="meta")})
        return str(name)
