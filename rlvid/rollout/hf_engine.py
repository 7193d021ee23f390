"""Generation by transformers, for families that vLLM does not serve: greedy answers side by side, and rollouts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
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
from rlvid.models.tower import Count, tower_inputs
from rlvid.rollout.engine import Sampling, shown
from rlvid.rollout.weights.buckets import Bucket
from rlvid.types import Prompt, Rollout, WeightSpan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Decoding:
    """Responses to some prompts side by side, one in each row: the keys and values of a prompt are computed once.

    Prompts are padded on the left. Positions are the prompt's own, as in training: those of transformers differ for
    some videos.

    Args:
        network: as `load_model` gives it.
        n: responses to each prompt.
        most: as of `tower_inputs`; all ranks have clips, or none has.

    Attributes:
        logits: [rows, vocabulary] of the next token.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        family: ChatFamily,
        prompts: Sequence[Prompt],
        n: int = 1,
        most: Count = lambda count: count,
    ):
        from transformers import DynamicCache

        self._network, device = network, network.device
        longest = max(p.length for p in prompts)
        padding = [longest - p.length for p in prompts]
        padded, positions = [], []
        for prompt, k in zip(prompts, padding, strict=True):
            padded.append(np.pad(prompt.token_ids, (k, 0), constant_values=family.end_of_turn))
            positions.append(np.pad(prompt.positions, ((0, 0), (k, 0))))
        ids = torch.from_numpy(np.stack(padded).astype(np.int64)).to(device)
        mask = (torch.arange(longest)[None] >= torch.tensor(padding)[:, None]).long().to(device)
        inputs: dict[str, Any] = {}
        if isinstance(family, VisionFamily) and any(len(p.patches) for p in prompts):
            patches = torch.from_numpy(np.concatenate([p.patches for p in prompts])).to(device)
            grids = torch.from_numpy(np.concatenate([p.grid_thw for p in prompts])).to(device)
            inputs = tower_inputs(network, family, patches, grids, most)
            ids = family.as_videos(ids)
        self._cache = DynamicCache(config=network.config.get_text_config())
        following = np.tile([p.next_position for p in prompts], (len(prompts[0].positions), 1))
        self.logits = self._forward(ids, np.stack(positions, axis=1), mask, logits_to_keep=1, **inputs)
        if n > 1:
            self._choose(torch.arange(len(prompts), device=device).repeat_interleave(n))
            mask, following = mask.repeat_interleave(n, 0), following.repeat(n, axis=1)
        self._mask, self._following = mask, following  # [rows, tokens], and the next positions [axes, rows]

    def advance(self, tokens: Tensor) -> None:
        """Append a token [rows] to each response, and compute the logits of the next one."""
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        self.logits = self._forward(tokens[:, None], self._following[:, :, None], self._mask)
        self._following = self._following + 1

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows."""
        chosen = torch.tensor(rows, device=self.logits.device)
        self._choose(chosen)
        self._mask, self._following = self._mask[chosen], self._following[:, list(rows)]

    def _choose(self, rows: Tensor) -> None:
        self._cache.reorder_cache(rows)
        self.logits = self.logits[rows]

    def _forward(self, ids: Tensor, positions: npt.NDArray[Any], mask: Tensor, **inputs: Any) -> Tensor:
        """
        Args:
            positions: [3, rows, tokens], or [1, rows, tokens].
        """
        out = self._network(
            input_ids=ids,
            position_ids=torch.from_numpy((positions if len(positions) > 1 else positions[0]).astype(np.int64)).to(ids),
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            **inputs,
        )
        logits: Tensor = out.logits[:, -1]
        return logits


class PlainEngine:
    """The part of `VllmEngine` that a reward model needs.

    Args:
        network: as `load_model` gives it.
        most: this rank's count -> the largest of all ranks. They generate together where the network is sharded
            (ZeRO-3): a rank that has finished computes until all have.
    """

    def __init__(self, network: PreTrainedModel, family: ChatFamily, most: Count = lambda count: count):
        self.family = family
        self._network, self._most = network, most

    @torch.no_grad()
    def answers(self, prompts: Sequence[Prompt], max_tokens: int) -> list[npt.NDArray[np.int32]]:
        """Greedy token ids [R] for each prompt, generated side by side; the end-of-turn token is last, unless
        `max_tokens` came first."""
        end = self.family.end_of_turn
        with _own_attention(self._network):
            decoding = Decoding(self._network, self.family, prompts, most=self._most)
            ids = torch.empty(len(prompts), 0, dtype=torch.long, device=decoding.logits.device)
            while True:
                chosen = self._log_softmax(decoding.logits, 1.0, top_p=1.0).argmax(-1)
                ids = torch.cat([ids, chosen[:, None]], 1)
                is_unfinished = ids.shape[1] < max_tokens and not (ids == end).any(1).all()
                if not self._most(int(is_unfinished)):
                    break
                decoding.advance(chosen)
        answers = ids[:, :max_tokens].cpu().numpy().astype(np.int32)
        lengths = [int(np.argmax(own == end)) + 1 if end in own else len(own) for own in answers]
        return [own[:length] for own, length in zip(answers, lengths, strict=True)]

    @torch.no_grad()
    def first_logprobs(self, prompt: Prompt, tokens: Sequence[int], temperature: float) -> npt.NDArray[np.float32]:
        """Log-prob of each of `tokens` as the first response token."""
        with _own_attention(self._network):
            logits = Decoding(self._network, self.family, [prompt], most=self._most).logits
        values = self._log_softmax(logits, temperature, top_p=1.0)[0, list(tokens)]
        return np.asarray(values.cpu(), dtype=np.float32)

    def _log_softmax(self, logits: Tensor, temperature: float, top_p: float) -> Tensor:
        """The distribution that is sampled from, [rows, vocabulary]; at temperature 0 that of temperature 1."""
        values = logits.float() / (temperature or 1.0)
        values[:, list(self.family.banned_tokens)] = -torch.inf
        values = values.log_softmax(-1)
        if top_p < 1:
            ordered, order = values.sort(dim=-1, descending=True)
            is_beyond = ordered.exp().cumsum(-1) - ordered.exp() >= top_p
            values = values.masked_fill(is_beyond.scatter(1, order, is_beyond), -torch.inf).log_softmax(-1)
        return values


@dataclass
class Response:
    """One that is being generated."""

    prompt: Prompt
    generator: torch.Generator
    room: int  # tokens
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # of the weights, for each token


class HfEngine(PlainEngine):
    """Rollouts as `VllmEngine` makes them, in batches of prompts: a batch begins when all responses of the previous one
    have ended.

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
        self._cfg, self._seed, self._count = cfg, seed, 0
        self._queue: list[tuple[str, Prompt, Sampling]] = []
        self._decoding: Decoding | None = None
        self._sampling = Sampling(1, 0.0, 1)  # of the batch
        self._rows: list[Response] = []  # of `_decoding`
        self._unfinished: dict[str, list[Response]] = {}  # all responses to each prompt of the batch
        self._logits_version = -1
        self._awaited: set[str] = set()  # weights of the version that is arriving
        self.weight_version = -1

    @property
    def is_busy(self) -> bool:
        return bool(self._queue or self._unfinished)

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
        longest = self._cfg.max_model_len
        if prompt.length >= longest:
            raise ValueError(f"its {prompt.length} tokens leave no room in rollout.max_model_len={longest}")
        request, self._count = str(self._count), self._count + 1
        self._queue.append((request, shown(prompt, self.family, sampling), sampling))
        return request

    @torch.no_grad()
    def step(self) -> list[tuple[str, list[Rollout]]]:
        """Sample a token of each response; the requests that ended with it."""
        with _own_attention(self._network):
            if self._decoding is None:
                self._begin()
            assert self._decoding is not None
            tokens = self._sample(self._decoding.logits)
            rows = [i for i, row in enumerate(self._rows) if not self._has_ended(row)]
            done = [r for r, own in self._unfinished.items() if all(map(self._has_ended, own))]
            ended = [(request, list(map(self._rollout, self._unfinished.pop(request)))) for request in done]
            if not rows:
                self._decoding = None
                return ended
            self._decoding.advance(tokens)
            self._logits_version = self.weight_version
            if 2 * len(rows) <= len(self._rows):
                self._decoding.keep(rows)
                self._rows = [self._rows[i] for i in rows]
        return ended

    def _begin(self) -> None:
        """Take prompts with the same sampling from the queue, up to `rollout.max_sequences` responses and, with their
        padding, `rollout.max_batched_tokens`; one at least."""
        _, _, self._sampling = self._queue[0]
        n, longest, taken = self._sampling.n, 0, 0
        for _, prompt, sampling in self._queue:
            longest = max(longest, prompt.length)
            is_full = (taken + 1) * n > self._cfg.max_sequences or (taken + 1) * longest > self._cfg.max_batched_tokens
            if taken and (is_full or sampling != self._sampling):
                break
            taken += 1
        batch, self._queue = self._queue[:taken], self._queue[taken:]
        for request, prompt, sampling in batch:
            given = sampling.request_seed(prompt.sample_id)
            first = (self._seed << 32) + int(request) * 1024 if given is None else given
            room = min(sampling.max_tokens, self._cfg.max_model_len - prompt.length)
            generators = [torch.Generator(self._network.device).manual_seed((first + i) % 2**63) for i in range(n)]
            self._unfinished[request] = [Response(prompt, generator, room) for generator in generators]
        self._rows = [row for own in self._unfinished.values() for row in own]
        self._decoding = Decoding(self._network, self.family, [prompt for _, prompt, _ in batch], n)
        self._logits_version = self.weight_version

    def _sample(self, logits: Tensor) -> Tensor:
        """The next token [rows], which is appended to the responses that have not ended."""
        values = self._log_softmax(logits, self._sampling.temperature, self._sampling.top_p)
        if self._sampling.temperature:
            drawn = [p.exp().multinomial(1, generator=r.generator) for p, r in zip(values, self._rows, strict=True)]
            chosen = torch.cat(drawn)
        else:
            chosen = values.argmax(-1)
        logprobs = values.gather(1, chosen[:, None])[:, 0]
        for row, token, logprob in zip(self._rows, chosen.tolist(), logprobs.tolist(), strict=True):
            if not self._has_ended(row):
                row.ids.append(token)
                row.logprobs.append(logprob)
                row.versions.append(self._logits_version)
        return chosen

    def _has_ended(self, row: Response) -> bool:
        return len(row.ids) == row.room or row.ids[-1:] == [self.family.end_of_turn]

    def _rollout(self, row: Response) -> Rollout:
        spans, at = [], 0
        for version, own in groupby(row.versions):
            n = len(list(own))
            spans.append(WeightSpan(version, at, at + n))
            at += n
        return Rollout(
            sample_id=row.prompt.sample_id,
            token_ids=np.array(row.ids, dtype=np.int32),
            logprobs=np.array(row.logprobs, dtype=np.float32),
            text=self.family.decode(row.ids),
            finish_reason="stop" if row.ids[-1] == self.family.end_of_turn else "length",
            versions=tuple(spans),
        )


@contextmanager
def _own_attention(network: PreTrainedModel) -> Iterator[None]:
    """transformers' attention instead of ours, which knows packed rows only."""
    config = network.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = before
