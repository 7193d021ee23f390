"""Scores from a linear head on the last token, over the same packed rows as the policy's log-probs.

Which token is last follows from the layout of the row, not from a padding id: nothing is padded. (Upstream searches for
the first padding id, which is wrong where that id occurs in the text.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from rlvid.models.families.chat import ChatFamily
from rlvid.models.heads import Head
from rlvid.training.packing import PackedRow, hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PackedScorer(nn.Module):
    """The network and a head: VideoScore's regression, or Bradley-Terry with one output."""

    def __init__(self, network: PreTrainedModel, family: ChatFamily, head: Head):
        super().__init__()
        self.network = network
        self.family = family
        self.head = head.build(network.config.get_text_config().hidden_size, network.dtype)

    def forward(self, row: PackedRow) -> tuple[Tensor, Tensor]:
        """Scores [S, D] float32 at the row's ends. The second is empty, where the policy has its entropy."""
        hidden = hidden_states(self.network, self.family, row)[row.ends]
        scores = self.head(hidden).float()
        return scores, scores.new_zeros(0)
