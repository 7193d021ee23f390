"""A linear head on a network's hidden states, and the file that stores it in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rlvid.errors import UserError

HEAD_FILE = Path("reward_model") / "head.safetensors"  # in a checkpoint folder


@dataclass(frozen=True)
class Head:
    """A head `Linear(hidden, outputs)` with bias.

    A new one returns `initial_bias` for every input: its weights are 0. Those of a critic are small random numbers
    instead, with standard deviation 1 / (hidden + 1), as in OpenRLHF (openrlhf/models/model.py).
    """

    outputs: tuple[str, ...]  # names, in the order of the rows of the weight
    initial_bias: float = 0.0
    is_critic: bool = False  # a value before each response token; otherwise scores at the end of each response

    def build(self, width: int, dtype: torch.dtype) -> nn.Linear:
        """Make a new head for hidden states of size `width`."""
        layer = nn.Linear(width, len(self.outputs), dtype=dtype)
        if self.is_critic:
            nn.init.normal_(layer.weight, std=1 / (width + 1), generator=torch.Generator().manual_seed(0))
        else:
            nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, self.initial_bias)
        return layer

    def save(self, state: Mapping[str, Tensor], folder: Path) -> None:
        """Write the head's tensors and the names of its outputs into checkpoint `folder`."""
        file = folder / HEAD_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(state), file, metadata={"outputs": json.dumps(self.outputs)})

    def load(self, layer: nn.Linear, folder: Path) -> None:
        """Read the head of checkpoint `folder` into `layer`; rows are matched by the names of the outputs. A critic's
        head may be that of a reward model with one output.

        Raises:
            UserError: the checkpoint has no head, or the head lacks one of the outputs.
        """
        file = folder / HEAD_FILE
        try:
            with safe_open(file, "pt") as stored:
                names = json.loads((stored.metadata() or {}).get("outputs", "[]"))
                state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # it has no __iter__
        except (OSError, SafetensorError) as e:
            raise UserError(f"{file} cannot be read ({e}): expected the head of a reward model") from e
        outputs = names if self.is_critic and len(names) == 1 else self.outputs
        if missing := [name for name in outputs if name not in names]:
            raise UserError(f"{file} scores {', '.join(names) or 'nothing'} but not {', '.join(missing)}")
        rows = torch.tensor([names.index(name) for name in outputs])
        layer.load_state_dict({name: tensor[rows] for name, tensor in state.items()})


VALUE = Head(("value",), is_critic=True)
"""The head of a critic."""
