"""Greedy answers by transformers' own `generate`, for families that vLLM does not serve: scores as text, one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from rlvid.models.families.vision import VisionFamily
from rlvid.training.batch import Group
from rlvid.training.packing import PackedPolicy, normalise, pack
from rlvid.types import Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlvid.rollout.vllm_engine import Sampling


class PlainEngine:
    """As `VllmEngine`, of which it has what a reward model needs.

    Args:
        network: as `load_model` gives it.
        is_synced: the network is spread over ranks (ZeRO-3), which generate side by side: none may stop before all do.
    """

    def __init__(self, network: PreTrainedModel, family: VisionFamily, is_synced: bool = False):
        self.family = family
        self._network, self._is_synced = network, is_synced
        self._queue: list[tuple[str, Prompt, Sampling]] = []
        self._count = 0

    def submit(self, prompt: Prompt, sampling: Sampling) -> str:
        """Queue a prompt; greedy, one answer."""
        if sampling.n != 1 or sampling.temperature:
            raise ValueError("one greedy answer is all that this engine gives")
        self._count += 1
        self._queue.append((str(self._count), prompt, sampling))
        return str(self._count)

    @property
    def is_busy(self) -> bool:
        return bool(self._queue)

    def step(self) -> list[tuple[str, list[Rollout]]]:
        """Answer the next prompt."""
        request, prompt, sampling = self._queue.pop(0)
        ids = self.answer(prompt, sampling.max_tokens)
        reason = "stop" if len(ids) and ids[-1] == self.family.end_of_turn else "length"
        rollout = Rollout(
            sample_id=prompt.sample_id,
            token_ids=ids,
            logprobs=np.zeros(len(ids), dtype=np.float32),  # of a greedy choice
            text=self.family.decode(ids.tolist()),
            finish_reason=reason,
            versions=(),
        )
        return [(request, [rollout])]

    @torch.no_grad()
    def answer(self, prompt: Prompt, max_tokens: int) -> npt.NDArray[np.int32]:
        """Token ids [R]; the end-of-turn token last, unless `max_tokens` came first."""
        device = self._network.device
        inputs: dict[str, Any] = {}
        if len(prompt.patches):
            pixels = normalise(torch.from_numpy(prompt.patches.copy()).to(device), self.family, self._network.dtype)
            inputs = self.family.network_inputs(pixels, torch.from_numpy(prompt.grid_thw.copy()).to(device))
        ids = torch.from_numpy(prompt.token_ids.astype(np.int64)).to(device)[None]
        with _own_attention(self._network):
            out = self._network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=self.family.end_of_turn,
                pad_token_id=self.family.end_of_turn,
                suppress_tokens=list(self.family.banned_tokens),
                synced_gpus=self._is_synced,
                **inputs,
            )
        answered: npt.NDArray[np.int32] = out[0, ids.shape[1] :].cpu().numpy().astype(np.int32)
        return answered

    def first_logprobs(self, prompt: Prompt, tokens: Sequence[int], temperature: float) -> npt.NDArray[np.float32]:
        """Log-prob of each of `tokens` as the first response token."""
        answers = tuple(np.array([token], dtype=np.int32) for token in tokens)
        group = Group(prompt, prompt.cost, answers, temperature=temperature)
        with torch.no_grad():
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
