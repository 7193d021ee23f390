"""Greedy answers by transformers' own `generate`, for families that vLLM does not serve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from rlvid.models.families.chat import ChatFamily
from rlvid.models.families.vision import VisionFamily
from rlvid.models.tower import normalise
from rlvid.training.batch import Group
from rlvid.training.packing import PackedPolicy, pack
from rlvid.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PlainEngine:
    """The part of `VllmEngine` that a reward model needs.

    Args:
        network: as `load_model` gives it.
        is_synced: the network is sharded over ranks (ZeRO-3), which generate together: none stops before all do.
    """

    def __init__(self, network: PreTrainedModel, family: ChatFamily, is_synced: bool = False):
        self.family = family
        self._network, self._is_synced = network, is_synced

    @torch.no_grad()
    def answers(self, prompts: Sequence[Prompt], max_tokens: int) -> list[npt.NDArray[np.int32]]:
        """Greedy token ids [R] for each prompt, generated side by side; the end-of-turn token is last, unless
        `max_tokens` came first.

        Positions are the prompt's own, as in training: those of transformers differ for some videos.
        """
        device, end, longest = self._network.device, self.family.end_of_turn, max(p.length for p in prompts)
        padding = [longest - p.length for p in prompts]  # on the left
        ids = [np.pad(p.token_ids, (n, 0), constant_values=end) for p, n in zip(prompts, padding, strict=True)]
        positions = [np.pad(p.positions, ((0, 0), (n, 0))) for p, n in zip(prompts, padding, strict=True)]
        inputs: dict[str, Any] = {}
        given = torch.from_numpy(np.stack(ids).astype(np.int64)).to(device)
        if isinstance(self.family, VisionFamily) and any(len(p.patches) for p in prompts):
            given = self.family.as_videos(given)
            patches = torch.from_numpy(np.concatenate([p.patches for p in prompts])).to(device)
            grids = torch.from_numpy(np.concatenate([p.grid_thw for p in prompts])).to(device)
            inputs = self.family.network_inputs(normalise(patches, self.family, self._network.dtype), grids)
        axes = np.stack(positions, axis=1)  # [3, batch, tokens], or [1, batch, tokens]
        with _own_attention(self._network):
            out = self._network.generate(
                input_ids=given,
                attention_mask=(torch.arange(longest)[None] >= torch.tensor(padding)[:, None]).long().to(device),
                position_ids=torch.from_numpy((axes if len(axes) > 1 else axes[0]).astype(np.int64)).to(device),
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end,
                suppress_tokens=list(self.family.banned_tokens) or None,
                synced_gpus=self._is_synced,
                **inputs,
            )
        answers: npt.NDArray[np.int32] = out[:, longest:].cpu().numpy().astype(np.int32)
        lengths = [int(np.argmax(a == end)) + 1 if end in a else len(a) for a in answers]
        return [a[:n] for a, n in zip(answers, lengths, strict=True)]

    @torch.no_grad()
    def first_logprobs(self, prompt: Prompt, tokens: Sequence[int], temperature: float) -> npt.NDArray[np.float32]:
        """Log-prob of each of `tokens` as the first response token."""
        answers = tuple(np.array([token], dtype=np.int32) for token in tokens)
        group = Group(prompt, prompt.cost, answers, temperature=temperature)
        policy = PackedPolicy(self._network, self.family)
        return policy(pack([group]).to(self._network.device))[0].float().cpu().numpy()


@contextmanager
def _own_attention(network: PreTrainedModel) -> Iterator[None]:
    """transformers' attention instead of ours, which knows packed rows only."""
    config = network.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = before
