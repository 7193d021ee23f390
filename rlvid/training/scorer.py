"""Scores from a linear head on the last token, over the same packed rows as the policy's log-probs.

Which token is last follows from the layout of the row, not from a padding id: nothing is padded. (Upstream looks for
the first padding id, which is wrong where that id occurs in the text.)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rlvid.errors import UserError
from rlvid.models.families.chat import ChatFamily
from rlvid.rewards.videoscore import RUBRIC_FOLDER, Rubric
from rlvid.training.packing import PackedRow, hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD_FILE = "head.safetensors"


class PackedScorer(nn.Module):
    """The network and a head `Linear(hidden, D)` with bias: VideoScore's regression, Bradley-Terry with D = 1.

    The head begins at the middle of the scale for every video: the first loss is the labels' spread around it.
    """

    def __init__(self, network: PreTrainedModel, family: ChatFamily, rubric: Rubric):
        super().__init__()
        self.network = network
        self.family = family
        width = network.config.get_text_config().hidden_size
        self.head = nn.Linear(width, len(rubric.dims), dtype=network.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, 0.0 if rubric.kind == "bradley_terry" else (rubric.low + rubric.high) / 2)

    def forward(self, row: PackedRow) -> tuple[Tensor, Tensor]:
        """Scores [S, D] float32 at the row's ends; the second ([0]) stands where the policy has its entropy."""
        hidden = hidden_states(self.network, self.family, row)[row.ends]
        scores = self.head(hidden).float()
        return scores, scores.new_zeros(0)

    def load_head(self, folder: Path, rubric: Rubric) -> None:
        """Take the head that lies beside an exported checkpoint, each dimension's row by its name.

        Raises:
            UserError: the checkpoint has no head, or lacks a dimension.
        """
        stored = Rubric.load(folder / RUBRIC_FOLDER)
        file = folder / RUBRIC_FOLDER / HEAD_FILE
        if missing := [name for name in rubric.dims if name not in stored.dims]:
            raise UserError(f"{file} scores {', '.join(stored.dims)}; it lacks {', '.join(missing)}")
        order = torch.tensor([stored.dims.index(name) for name in rubric.dims])
        try:
            state = load_file(file)
        except OSError as e:
            raise UserError(f"{file} cannot be read ({e}): a {stored.kind} reward model has its head there") from e
        self.head.load_state_dict({name: tensor[order] for name, tensor in state.items()})
