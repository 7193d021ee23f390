"""A long prompt's pass, from which the passes of its responses continue a part at a time.

Of a group in one row the activations of all tokens are in memory at once. Here they are those of the prompt and of one
part of the responses: the responses attend to the prompt's keys and values, and their gradients to these add up until
the prompt's own backward. Nothing is computed twice, except the prompt's last token, which begins each part: its output
predicts every first token. Exact (tests/training/test_depth_first.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlvid.models.attention import KeysValues
from rlvid.training.batch import Group
from rlvid.training.packing import PackedRow, pack
from rlvid.types import Prompt


class PromptPass:
    """The forward of a prompt up to its last token, and later its backward.

    Args:
        model: `PackedPolicy`, `PackedScorer`, or an engine around one.
        prompt: of at least two tokens, the last of which is text.
    """

    def __init__(self, model: Any, prompt: Prompt, device: torch.device):
        begin = replace(prompt, token_ids=prompt.token_ids[:-1], positions=prompt.positions[:, :-1])
        self._end = Prompt(prompt.sample_id, prompt.token_ids[-1:], prompt.positions[:, -1:])
        self._device = device
        kept: dict[nn.Module, KeysValues] = {}
        row = pack([Group(begin, begin.cost)])
        self._zero, _ = model(replace(row, layout=replace(row.layout, kept=kept)).to(device))
        n = begin.length  # after it there may be a blank clip
        self._outputs = [x[:, :, :n] for pair in kept.values() for x in pair]
        # Leaves, so that a part's backward ends here.
        self._leaves = [x.detach().requires_grad_(x.requires_grad) for x in self._outputs]
        self._before = dict(zip(kept, zip(self._leaves[::2], self._leaves[1::2], strict=True), strict=True))
        self._sums: list[Tensor] = []

    def row(self, part: Group[Prompt]) -> PackedRow:
        """The row of a part of the prompt's responses."""
        row = pack([part.with_prompt(self._end)])
        return replace(row, layout=replace(row.layout, before=self._before)).to(self._device)

    def collect(self) -> None:
        """Add the gradients of the last part's backward to those of the parts before, in float32."""
        if not self._sums:  # those of float32 add up where they are
            self._sums = [
                x.grad if x.dtype == torch.float32 and x.grad is not None else torch.zeros_like(x, dtype=torch.float32)
                for x in self._leaves
            ]
        for total, leaf in zip(self._sums, self._leaves, strict=True):
            if leaf.grad is not None and leaf.grad is not total:
                total += leaf.grad
                leaf.grad = None

    def loss(self) -> Tensor:
        """A number whose gradient is the parts' gradient to the prompt."""
        products = [(x * total).sum() for x, total in zip(self._outputs, self._sums, strict=True)]
        return torch.stack(products).sum() + self._zero.sum()
