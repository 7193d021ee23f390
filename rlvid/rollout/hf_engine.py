"""Generation by transformers, for families that vLLM does not serve: greedy answers side by side, and rollouts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlvid.config import LoraConfig, RolloutConfig
from rlvid.models.families.chat import ChatFamily
from rlvid.models.families.vision import VisionFamily
from rlvid.models.loading import load_model
from rlvid.models.lora import add_adapters, file_name, is_adapter
from rlvid.models.tower import normalise
from rlvid.rollout.engine import Sampling, shown
from rlvid.rollout.weights.buckets import Bucket
from rlvid.training.batch import Group
from rlvid.training.packing import PackedPolicy, pack
from rlvid.types import Prompt, Rollout, WeightSpan

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
        given, inputs = self._inputs(prompts, torch.from_numpy(np.stack(ids).astype(np.int64)).to(device))
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

    def _inputs(self, prompts: Sequence[Prompt], ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Token ids as the network takes them, and its inputs of all clips."""
        if not isinstance(self.family, VisionFamily) or not any(len(p.patches) for p in prompts):
            return ids, {}
        patches = torch.from_numpy(np.concatenate([p.patches for p in prompts])).to(ids.device)
        grids = torch.from_numpy(np.concatenate([p.grid_thw for p in prompts])).to(ids.device)
        pixels = normalise(patches, self.family, self._network.dtype)
        return self.family.as_videos(ids), self.family.network_inputs(pixels, grids)

    @torch.no_grad()
    def first_logprobs(self, prompt: Prompt, tokens: Sequence[int], temperature: float) -> npt.NDArray[np.float32]:
        """Log-prob of each of `tokens` as the first response token."""
        answers = tuple(np.array([token], dtype=np.int32) for token in tokens)
        group = Group(prompt, prompt.cost, answers, temperature=temperature)
        policy = PackedPolicy(self._network, self.family)
        return policy(pack([group]).to(self._network.device))[0].float().cpu().numpy()


class HfEngine(PlainEngine):
    """Rollouts as `VllmEngine` makes them, group by group: a prompt's keys and values are computed once, its responses
    are decoded side by side. Slow: there is no scheduler.

    Args:
        folder: checkpoint; its weights are those of version -1.
    """

    is_asleep = False  # the weights stay

    def __init__(
        self,
        folder: Path,
        family: ChatFamily,
        cfg: RolloutConfig,
        dtype: str,
        seed: int,
        on_gpu: bool,
        lora: LoraConfig | None = None,
    ):
        network = load_model(folder, dtype).eval()
        if lora:
            add_adapters(network, lora, family.no_lora)
        super().__init__(network.to("cuda" if on_gpu else "cpu"), family)
        named = {n: p for n, p in network.named_parameters() if is_adapter(n) or not lora}
        self._sent = {file_name(n) if is_adapter(n) else n: p for n, p in named.items()}
        self._longest, self._seed, self._count = cfg.max_model_len, seed, 0
        self._queue: dict[str, tuple[Prompt, Sampling]] = {}
        self._awaited: set[str] = set()  # weights of the version that is arriving
        self.weight_version = -1

    @property
    def is_busy(self) -> bool:
        return bool(self._queue)

    @property
    def is_updating(self) -> bool:
        return bool(self._awaited)

    def sleep(self) -> None:
        """Give up the memory of earlier requests."""
        torch.cuda.empty_cache()

    def weight_digest(self) -> str:
        h = hashlib.sha256()
        for name, p in sorted(self._sent.items()):
            h.update(name.encode() + p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return h.hexdigest()

    @torch.no_grad()
    def update_weights(self, version: int, buckets: Sequence[Bucket]) -> None:
        """Take all of the new weights, or the next part of them (the contract is in rlvid/rollout/weights)."""
        if version <= self.weight_version:
            return
        self._awaited = self._awaited or set(self._sent)
        for name, tensor in (item for bucket in buckets for item in bucket.tensors()):
            self._sent[name].copy_(tensor)
            self._awaited.discard(name)
        if buckets[-1].is_last:
            if self._awaited:
                raise RuntimeError(f"{len(self._awaited)} weights did not arrive, for example {min(self._awaited)}")
            self.weight_version = version

    def submit(self, prompt: Prompt, sampling: Sampling) -> str:
        """Queue a prompt; the returned id comes back from `step` with its rollouts.

        Raises:
            ValueError: it leaves no room for a response.
        """
        if prompt.length >= self._longest:
            raise ValueError(f"its {prompt.length} tokens leave no room in rollout.max_model_len={self._longest}")
        request, self._count = str(self._count), self._count + 1
        self._queue[request] = (shown(prompt, self.family, sampling), sampling)
        return request

    def step(self) -> list[tuple[str, list[Rollout]]]:
        """Answer the next prompt."""
        request = next(iter(self._queue))
        prompt, sampling = self._queue.pop(request)
        return [(request, self._answer(prompt, sampling, int(request)))]

    @torch.no_grad()
    def first_logprobs(self, prompt: Prompt, tokens: Sequence[int], temperature: float) -> npt.NDArray[np.float32]:
        with _own_attention(self._network):
            logits, _ = self._prefill(prompt)
        values = self._log_softmax(logits, temperature, top_p=1.0)[0, list(tokens)]
        return np.asarray(values.cpu(), dtype=np.float32)

    @torch.no_grad()
    def _answer(self, prompt: Prompt, sampling: Sampling, number: int) -> list[Rollout]:
        n, end, device = sampling.n, self.family.end_of_turn, self._network.device
        given = sampling.request_seed(prompt.sample_id)
        first = (self._seed << 32) + number * 1024 if given is None else given
        generators = [torch.Generator(device).manual_seed((first + i) % 2**63) for i in range(n)]
        tokens: list[Tensor] = []
        logprobs: list[Tensor] = []
        ended = torch.zeros(n, dtype=torch.bool, device=device)
        with _own_attention(self._network):
            logits, cache = self._prefill(prompt)
            cache.batch_repeat_interleave(n)
            logits = logits.expand(n, -1)
            for t in range(min(sampling.max_tokens, self._longest - prompt.length)):
                values = self._log_softmax(logits, sampling.temperature, sampling.top_p)
                if sampling.temperature:
                    drawn = [p.exp().multinomial(1, generator=g) for p, g in zip(values, generators, strict=True)]
                    chosen = torch.cat(drawn)
                else:
                    chosen = values.argmax(-1)
                tokens.append(chosen)
                logprobs.append(values.gather(1, chosen[:, None])[:, 0])
                ended |= chosen == end
                if ended.all():
                    break
                position = torch.full((len(prompt.positions), n, 1), prompt.next_position + t, device=device)
                out = self._network(
                    input_ids=chosen[:, None],
                    position_ids=position if len(position) > 1 else position[0],
                    past_key_values=cache,
                    use_cache=True,
                )
                logits = out.logits[:, -1]
        found = zip(torch.stack(tokens, 1).cpu().numpy(), torch.stack(logprobs, 1).cpu().numpy(), strict=True)
        return [self._rollout(prompt, ids, own) for ids, own in found]

    def _rollout(self, prompt: Prompt, ids: npt.NDArray[np.int64], logprobs: npt.NDArray[np.float32]) -> Rollout:
        end = self.family.end_of_turn
        n = int(np.argmax(ids == end)) + 1 if end in ids else len(ids)
        return Rollout(
            sample_id=prompt.sample_id,
            token_ids=ids[:n].astype(np.int32),
            logprobs=logprobs[:n].astype(np.float32),
            text=self.family.decode(ids[:n].tolist()),
            finish_reason="stop" if end in ids else "length",
            versions=(WeightSpan(self.weight_version, 0, n),),
        )

    def _prefill(self, prompt: Prompt) -> tuple[Tensor, Any]:
        """Logits [1, vocabulary] of the first response token, and the cache of the prompt."""
        from transformers import DynamicCache

        device, positions = self._network.device, torch.from_numpy(prompt.positions.astype(np.int64))
        ids, inputs = self._inputs([prompt], torch.from_numpy(prompt.token_ids.astype(np.int64))[None].to(device))
        cache = DynamicCache(config=self._network.config.get_text_config())
        out = self._network(
            input_ids=ids,
            position_ids=(positions[:, None] if len(positions) > 1 else positions).to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        )
        return out.logits[:, -1], cache

    def _log_softmax(self, logits: Tensor, temperature: float, top_p: float) -> Tensor:
        """The distribution that is sampled from, [n, vocabulary]; at temperature 0 that of temperature 1."""
        values = logits.float() / (temperature or 1.0)
        values[:, list(self.family.banned_tokens)] = -torch.inf
        values = values.log_softmax(-1)
        if top_p < 1:
            ordered, order = values.sort(dim=-1, descending=True)
            is_beyond = ordered.exp().cumsum(-1) - ordered.exp() >= top_p
            values = values.masked_fill(is_beyond.scatter(1, order, is_beyond), -torch.inf).log_softmax(-1)
        return values


@contextmanager
def _own_attention(network: PreTrainedModel) -> Iterator[None]:
    """transformers' attention instead of ours, which knows packed rows only."""
    config = network.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = before
