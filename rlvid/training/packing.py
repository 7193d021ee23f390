"""Groups of responses as packed rows: one forward of a group's prompt for all its responses.

Exact: log-probs and gradients equal those of separate sequences (tests/training/test_packing.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlvid.models.attention import SharedPrefixLayout
from rlvid.models.families.chat import ChatFamily
from rlvid.models.families.vision import VisionFamily
from rlvid.models.heads import Head
from rlvid.models.tower import Count, tower_inputs
from rlvid.training.batch import Group
from rlvid.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_AT_A_TIME = 2**27  # 512 MiB in float32


@dataclass(frozen=True)
class PackedRow:
    """One forward's input. N tokens in the row, M response tokens that are predicted."""

    token_ids: Tensor  # [N] int64
    positions: Tensor  # [3, N] int64; [1, N] without vision
    patches: Tensor  # [patches, patch_dim] uint8
    grid_thw: Tensor  # [V, 3] int64
    layout: SharedPrefixLayout
    source: Tensor  # [M] int64, the token whose output predicts each response token
    target: Tensor  # [M] int64, the response tokens
    ends: Tensor  # [S] int64, the last token of each response, or of the prompt where there is none
    temperature: float | None  # of the responses; see Group

    def to(self, device: torch.device) -> PackedRow:
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "temperature"}
        return replace(self, **moved)


def pack(groups: Sequence[Group[Prompt]]) -> PackedRow:
    """Lay `groups` one after another.

    Raises:
        ValueError: some responses were sampled and some were not, or at another temperature.
    """
    temperature = groups[0].temperature
    if any(group.temperature != temperature for group in groups):
        raise ValueError("one batch has responses of different temperatures, or both sampled and given ones")
    ids, positions, ends, shapes = [], [], [], []
    source: list[npt.NDArray[Any]] = [np.zeros(0)]
    target: list[npt.NDArray[Any]] = [np.zeros(0)]
    at = 0
    for group in groups:
        prompt, lengths = group.prompt, [len(response) for response in group.responses]
        last = at + prompt.length - 1  # of the prompt
        bounds = last + 1 + np.cumsum([0, *lengths])  # where each response begins, and where the group ends
        ids += [prompt.token_ids, *group.responses]
        following = [np.tile(prompt.next_position + np.arange(n), (len(prompt.positions), 1)) for n in lengths]
        positions += [prompt.positions, *following]
        for span in group.in_prompt:
            source.append(at + span.offset - 1 + np.arange(span.length))
            target.append(prompt.token_ids[span.offset : span.offset + span.length])
        source += [np.r_[last, begin : begin + n - 1] for begin, n in zip(bounds, lengths, strict=False)]
        target += group.responses
        ends += list(bounds[1:] - 1) or [last]
        shapes.append((prompt.length, lengths))
        at = bounds[-1]
    return PackedRow(
        token_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64)),
        positions=torch.from_numpy(np.concatenate(positions, axis=1).astype(np.int64)),
        patches=torch.from_numpy(np.concatenate([g.prompt.patches for g in groups])),
        grid_thw=torch.from_numpy(np.concatenate([g.prompt.grid_thw for g in groups])),
        layout=SharedPrefixLayout.of(shapes),
        source=torch.from_numpy(np.concatenate(source).astype(np.int64)),
        target=torch.from_numpy(np.concatenate(target).astype(np.int64)),
        ends=torch.tensor(np.array(ends)),
        temperature=temperature,
    )


def with_blank_clip(row: PackedRow, family: VisionFamily) -> PackedRow:
    """A row of text alone, followed by the smallest black clip.

    Ranks meet in collectives inside the vision tower: under ZeRO-3 a rank without video would hang those with video. So
    the tower runs here too, at the same point of the forward. The clip's tokens belong to no group, no token attends to
    them and nothing is predicted from them: the tower's gradient is 0.
    """
    grid = family.smallest_grid
    n = family.n_embeddings(grid)
    return replace(
        row,
        token_ids=F.pad(row.token_ids, (0, n), value=family.video_token),
        positions=F.pad(row.positions, (0, n)),
        patches=row.patches.new_zeros(math.prod(grid), family.patch_dim),
        grid_thw=row.grid_thw.new_tensor([grid]),
    )


def hidden_states(network: PreTrainedModel, family: ChatFamily, row: PackedRow, most: Count) -> Tensor:
    """The language model's last hidden states [N, D] of a packed row.

    Args:
        most: on how many passes of the tower the ranks agree.
    """
    inputs: dict[str, Tensor] = {}
    if isinstance(family, VisionFamily) and not row.layout.before:  # the earlier row has run the tower
        row = row if len(row.patches) else with_blank_clip(row, family)
        inputs = tower_inputs(network, family, row.patches, row.grid_thw, most)
    ids = family.as_videos(row.token_ids) if isinstance(family, VisionFamily) else row.token_ids
    inputs["position_ids"] = row.positions[:, None] if len(row.positions) > 1 else row.positions
    output = network.model(input_ids=ids[None], shared_prefix=row.layout, use_cache=False, **inputs)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def kept_for_later(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The output [1] of a row whose keys and values are all that matters: 0, and nothing.

    A loss adds it, so that the backward enters every module at its output: DeepSpeed (ZeRO-3) gathers a module's
    weights there, and fails at a module that is entered in the middle.
    """
    return hidden[-1, :1] * 0.0, hidden.new_zeros(0)


class PackedPolicy(nn.Module):
    """The policy network over packed rows; the one forward of trainer and reference.

    The distribution of a sampled response is the one the engine samples from: logits over temperature, vision
    placeholders banned. That of a given response is the model's own.

    Args:
        head: of a critic on the same network.
    """

    per_token = True  # the outputs; those of a scorer are one per response
    most: Count = staticmethod(lambda count: count)  # this rank's count -> the largest of all ranks; under ZeRO-3

    def __init__(self, network: PreTrainedModel, family: ChatFamily, head: Head | None = None):
        super().__init__()
        self.network = network
        self.family = family
        self.prediction = Prediction(network.lm_head, family.banned_tokens)
        self.head = build_head(head, network) if head else None

    def forward(self, row: PackedRow) -> tuple[Tensor, Tensor]:
        """Log-probs [M] of the row's response tokens, and the entropy [M] of their distribution, which carries no
        gradient. Where gradients are off, in its place whether each token is the most likely one (1 or 0). With a
        critic's head the first is [M, 2]: log-probs, and the values before the tokens. Of a row whose keys and values
        are kept for another (`depth_first.PromptPass`): see `kept_for_later`."""
        hidden = hidden_states(self.network, self.family, row, self.most)
        if row.layout.kept is not None:
            return kept_for_later(hidden)
        # Logits only where a token is predicted: those of a long prompt would be the largest.
        logprobs, entropy = self.prediction(before := hidden[row.source], row.target, row.temperature)
        if self.head is None:
            return logprobs, entropy
        return torch.stack([logprobs, self.head(before)[:, 0].float()], dim=1), entropy


class Prediction(nn.Module):
    """Log-probs of tokens from hidden states, through the network's `lm_head`, a chunk of logits at a time.

    Ranks need different numbers of chunks, and under ZeRO-3 every call of a module is a collective. So `lm_head` itself
    is never called: this module reads its weight, which is gathered once per forward and once per backward. The weight
    has only its own name in the model's state.
    """

    def __init__(self, head: nn.Linear, banned: Sequence[int]):
        super().__init__()
        self._head, self._banned = (head,), list(banned)  # in a tuple: not a child module

    def shard(self) -> None:
        """Gather the head's parameters for this module too; after DeepSpeed has sharded them (ZeRO-3)."""
        from deepspeed.runtime.zero import register_external_parameter

        for parameter in self._head[0].parameters():
            register_external_parameter(self, parameter)

    def forward(self, hidden: Tensor, target: Tensor, temperature: float | None) -> tuple[Tensor, Tensor]:
        """Both outputs [M] of `PackedPolicy` for `target` [M], from hidden states [M, D]."""
        size = max(1, LOGITS_AT_A_TIME // self._head[0].out_features)
        if len(hidden) <= size:
            return self._predict(hidden, target, temperature)
        # Each chunk's logits are computed again in the backward, so never more than one chunk's are kept.
        parts = [
            checkpoint(self._predict, h, t, temperature, use_reentrant=False)
            for h, t in zip(hidden.split(size), target.split(size), strict=True)
        ]
        return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([second for _, second in parts])

    def _predict(self, hidden: Tensor, target: Tensor, temperature: float | None) -> tuple[Tensor, Tensor]:
        (head,) = self._head
        logits = F.linear(hidden, head.weight, head.bias).float()
        if temperature is not None:
            logits[:, self._banned] = float("-inf")
            logits = logits / temperature
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(1, target[:, None])[:, 0]
        if not torch.is_grad_enabled():
            return chosen, (chosen >= logprobs.amax(-1)).float()
        all_logprobs = logprobs.detach()
        return chosen, -(all_logprobs.exp() * all_logprobs.clamp(min=-1e9)).sum(-1)  # 0 * -inf would be nan


class PackedScorer(nn.Module):
    """The network and a head on the last token: VideoScore's regression, or Bradley-Terry with one output. The head of
    a critic is on the token before each response token.

    Which token is last follows from the layout of the row, not from a padding id: nothing is padded. (Upstream searches
    for the first padding id, which is wrong where that id occurs in the text.)
    """

    most: Count = staticmethod(lambda count: count)  # as in PackedPolicy

    def __init__(self, network: PreTrainedModel, family: ChatFamily, head: Head):
        super().__init__()
        self.network = network
        self.family = family
        self.head = build_head(head, network)
        self.per_token = head.is_critic

    def forward(self, row: PackedRow) -> tuple[Tensor, Tensor]:
        """Scores [S, D] float32 at the row's ends, or a critic's values [M, 1]. The second is empty, where the policy
        has its entropy. Of a row whose keys and values are kept for another: see `kept_for_later`."""
        hidden = hidden_states(self.network, self.family, row, self.most)
        if row.layout.kept is not None:
            return kept_for_later(hidden)
        scores = self.head(hidden[row.source if self.per_token else row.ends]).float()
        return scores, scores.new_zeros(0)


def build_head(head: Head, network: PreTrainedModel) -> nn.Linear:
    return head.build(network.config.get_text_config().hidden_size, network.dtype)
