"""Attention over packed tokens: all groups of a micro-batch follow one another in one row, without padding.

A group is `[prompt | response 1 | ... | response G]`. A prompt token attends to the prompt up to itself; a response
token attends to the whole prompt and to its own response up to itself. No mask of N x N is built for a row of N tokens:
on CPU, prompts and responses are gathered into two padded tensors; on GPU, FlexAttention skips the blocks that are
masked and stores no scores. Both give the same result as separate sequences.

A row of responses may also continue an earlier row that was their prompt: then it attends to that row's keys and values
(`KeysValues`), and their gradients flow there.

The two functions follow transformers' attention interface (`ALL_ATTENTION_FUNCTIONS`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

TEXT_ATTENTION = "rlvid_shared_prefix"
SMALLEST_BLOCK = 128  # FlexAttention's block of tokens
BLOCKS = 64  # about; more tokens make larger blocks, so that a mask does not grow with the square of the row
VISION_ATTENTION = "rlvid_flash_blocks"  # Qwen-VL's tower passes block boundaries only if the name contains "flash"

KeysValues: TypeAlias = tuple[Tensor, Tensor]  # of one layer, each [1, kv_heads, tokens, D]


@dataclass(frozen=True)
class SharedPrefixLayout:
    """The positions of the B groups in a packed row of N tokens.

    Index tensors hold positions in the row, and -1 for padding. G is the number of responses of the largest group;
    P and R are the lengths of the longest prompt and response.
    """

    groups: list[tuple[int, list[int]]]  # length of the prompt, lengths of the responses
    prompt_index: Tensor  # [B, P] int64
    response_index: Tensor  # [B, G * R] int64
    group_size: int  # G
    kept: dict[nn.Module, KeysValues] | None = None  # where each layer puts the row's keys and values, if asked to
    # Those of an earlier row, by layer, which all tokens of this row attend to. It has one group, whose prompt is the
    # one token that the earlier row has not.
    before: Mapping[nn.Module, KeysValues] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: list[tuple[int, list[int]]]) -> SharedPrefixLayout:
        """Make a layout from (prompt length, response lengths) of each group, in the order of the row."""
        longest_prompt = max(p for p, _ in groups)
        size = max(len(r) for _, r in groups)
        longest = max((n for _, r in groups for n in r), default=0)  # 0: prompts only
        prompts = np.full((len(groups), longest_prompt), -1, dtype=np.int64)
        responses = np.full((len(groups), size, longest), -1, dtype=np.int64)
        at = 0
        for b, (prompt, lengths) in enumerate(groups):
            prompts[b, :prompt] = np.arange(at, at + prompt)
            at += prompt
            for g, n in enumerate(lengths):
                responses[b, g, :n] = np.arange(at, at + n)
                at += n
        flat = responses.reshape(len(groups), size * longest)
        return cls(groups, torch.from_numpy(prompts), torch.from_numpy(flat), size)

    @cached_property
    def sequences(self) -> list[int] | None:
        """Length of each group, where none has more than one response: then a group is a sequence, and attention is
        causal."""
        if self.group_size > 1 or self.before:
            return None
        return [prompt + sum(responses) for prompt, responses in self.groups]

    @cached_property
    def block_mask(self) -> BlockMask:
        """FlexAttention's mask of the row, made once for all layers. Which of its blocks attend follows from where the
        groups and responses begin: torch's own `create_block_mask` asks the rule for all N x N pairs (10 GiB at 32,000
        tokens)."""
        of_group, of_response = self.membership()
        device, n, n_before, block = self.prompt_index.device, len(of_group), self.n_before, self.block_size
        some, every = attending_blocks(of_group, of_response, block)
        group, response = (torch.from_numpy(x.astype(np.int32)).to(device) for x in (of_group, of_response))
        begin = -(-n_before // block) * block  # the row's own keys begin at a block
        if n_before:
            earlier = np.ones((len(some), begin // block), dtype=bool)
            some = np.hstack([earlier, some])
            earlier[:, -1] = n_before == begin
            earlier[-1] &= n % block == 0
            every = np.hstack([earlier, every])

        def attends(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            own = (k - begin).clamp(min=0)
            is_own = (group[q] == group[own]) & ((response[own] < 0) | (response[q] == response[own]))
            return (k < n_before) | ((k >= begin) & is_own & (own <= q))

        def listed(blocks: npt.NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
            """How many blocks of keys each block of queries has, and which: these first."""
            order = np.argsort(~blocks, axis=1, kind="stable")
            counts, indices = (torch.from_numpy(x.astype(np.int32)) for x in (blocks.sum(1), order))
            return counts[None, None].to(device), indices[None, None].to(device)

        return BlockMask.from_kv_blocks(
            *listed(some & ~every), *listed(every), BLOCK_SIZE=block, mask_mod=attends, seq_lengths=(n, begin + n)
        )

    @property
    def block_size(self) -> int:
        """Tokens in a block of the mask: `SMALLEST_BLOCK` times a power of 2."""
        n = self.n_before + sum(prompt + sum(lengths) for prompt, lengths in self.groups)
        return SMALLEST_BLOCK << max(0, math.ceil(math.log2(n / (SMALLEST_BLOCK * BLOCKS))))

    @property
    def n_before(self) -> int:
        """Tokens of the earlier row."""
        return next((int(key.shape[2]) for key, _ in self.before.values()), 0)

    def membership(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Index of each token's group [N] and of its response within the group [N]; -1 for the tokens of a prompt."""
        lengths = [[prompt, *responses] for prompt, responses in self.groups]
        group = np.repeat(np.arange(len(lengths)), [sum(own) for own in lengths])
        response = np.repeat([i - 1 for own in lengths for i in range(len(own))], [n for own in lengths for n in own])
        return group, response

    def to(self, device: torch.device) -> SharedPrefixLayout:
        return replace(self, prompt_index=self.prompt_index.to(device), response_index=self.response_index.to(device))


def attending_blocks(
    group: npt.NDArray[np.int64], response: npt.NDArray[np.int64], block: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Of each block of queries and block of keys of a row: whether some pairs of tokens attend, and whether all do.

    Args:
        group, response: of each token [N]; see `SharedPrefixLayout.membership`.
        block: tokens in a block.

    Returns:
        Two arrays [blocks, blocks].
    """
    n = len(group)
    group, response = (np.pad(x, (0, -n % block), mode="edge").reshape(-1, block) for x in (group, response))
    first, last = group[:, 0], group[:, -1]
    largest = response.max(1)
    is_prompt = response < 0
    before = np.tri(len(group), k=-1, dtype=bool)  # [queries, keys]
    # A group is contiguous, so of the groups in a block of keys only the last can continue in a later block.
    continues = before & (first[:, None] == last)
    has_its_prompt = (is_prompt & (group == last[:, None])).any(1)
    some = continues & (has_its_prompt | (response[:, :1] == response[:, -1]))
    np.fill_diagonal(some, True)
    is_one_group = first == last
    is_one_response = is_one_group & (response == largest[:, None]).all(1)
    has_one_response = (is_prompt | (response == largest[:, None])).all(1)  # beside the prompt, if any
    is_same = is_one_response[:, None] & has_one_response & (largest[:, None] == largest)
    every = continues & is_one_group[:, None] & is_one_group & (is_same | (largest < 0))
    if n % block:
        every[-1] = False  # its last queries do not exist
    return some, every


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    shared_prefix: SharedPrefixLayout,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return the attention output of a packed row.

    Args:
        query: [1, heads, N, D]; key and value: [1, kv_heads, N, D].
        shared_prefix: the row's layout, an argument of the network's forward. It cannot be passed as attention mask:
            Qwen3-VL and Llama replace the mask by one of their own.

    Returns:
        The output [1, N, heads, D], and None in place of attention weights.
    """
    layout = shared_prefix
    if options.get("dropout"):
        raise ValueError("shared-prefix attention has no dropout: set attention_dropout to 0")
    heads, n, dim = query.shape[1:]
    scale = options.get("scaling") or dim**-0.5
    if layout.kept is not None:
        layout.kept.setdefault(module, (key, value))  # once: activations may be computed again in the backward
    before = layout.before.get(module)
    if query.is_cuda:
        return flex_attend(query, key, value, layout, scale, before, is_compiled=True).transpose(1, 2), None
    key, value = (x.repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    if layout.sequences is not None:
        return _attend_apart(query, key, value, layout.sequences, scale, is_causal=True), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, D]
    qp, kp, vp = (_take(x, layout.prompt_index) for x in (q, k, v))  # [B, heads, P, D]
    if before is not None:  # P is 1
        earlier = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in before)
        kp, vp = (torch.cat(pair, dim=2) for pair in zip(earlier, (kp, vp), strict=True))
    # Padding follows the prompt, so the causal mask excludes it.
    prompts = F.scaled_dot_product_attention(qp, kp, vp, is_causal=before is None, scale=scale)
    out = _put(q.new_zeros(n, heads, dim), layout.prompt_index, prompts)
    if not layout.group_size:
        return out.unsqueeze(0), None
    responses = _attend_responses(q, k, v, kp, vp, layout, scale)
    return _put(out, layout.response_index, responses).unsqueeze(0), None


def flex_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SharedPrefixLayout,
    scale: float,
    before: KeysValues | None = None,
    *,
    is_compiled: bool,
) -> Tensor:
    """Attention of a packed row by FlexAttention: q [1, heads, N, D], k and v [1, kv_heads, N, D] -> shape of q.

    Compiled, it needs memory proportional to N; not compiled (for tests), it stores all scores.
    """
    n, n_grouped = q.shape[2], layout.block_mask.shape[-2]
    # The tokens of a clip that belongs to no group may follow those of the groups: their output is 0.
    q, k, v = (x[:, :, :n_grouped] for x in (q, k, v))
    if before is not None:  # filled up to whole blocks
        earlier = (F.pad(x, (0, 0, 0, -x.shape[2] % layout.block_size)) for x in before)
        k, v = (torch.cat(pair, dim=2) for pair in zip(earlier, (k, v), strict=True))
    flex = _flex_attention(is_compiled)
    out: Tensor = flex(q, k, v, block_mask=layout.block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return F.pad(out, (0, 0, 0, n - n_grouped))


@cache
def _flex_attention(is_compiled: bool) -> Any:
    return torch.compile(flex_attention, dynamic=True) if is_compiled else flex_attention


def _attend_responses(
    q: Tensor, k: Tensor, v: Tensor, kp: Tensor, vp: Tensor, layout: SharedPrefixLayout, scale: float
) -> Tensor:
    """Attention of the responses [B, heads, G * R, D]: one softmax over the keys of the prompt and of the response."""
    qr, kr, vr = (_take(x, layout.response_index) for x in (q, k, v))  # [B, heads, G * R, D]
    batch, heads, _, dim = qr.shape
    own = (batch, heads, layout.group_size, -1, dim)  # [B, heads, G, R, D]
    to_prompt = qr @ kp.transpose(-1, -2)  # [B, heads, G * R, P]
    is_padding = F.pad(layout.prompt_index < 0, (kp.shape[2] - layout.prompt_index.shape[1], 0))  # none before it
    to_prompt = to_prompt.masked_fill(is_padding[:, None, None, :], float("-inf"))
    to_own = qr.view(own) @ kr.view(own).transpose(-1, -2)  # [B, heads, G, R, R]
    length = to_own.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    to_own = to_own.masked_fill(future, float("-inf")).flatten(2, 3)
    weights = torch.cat([to_prompt, to_own], dim=-1).mul(scale).float().softmax(-1).to(q.dtype)
    on_prompt, on_own = weights.split([to_prompt.shape[-1], length], dim=-1)
    return on_prompt @ vp + (on_own.view(*own[:3], length, length) @ vr.view(own)).flatten(2, 3)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Gather x [N, heads, D] at index [B, L] -> [B, heads, L, D]. Padding gets the values of row 0."""
    return x[index.clamp(min=0)].transpose(1, 2)


def _put(out: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Write values [B, heads, L, D] into out [N, heads, D] at index [B, L], without the padding."""
    is_token = index >= 0
    return out.index_put((index[is_token],), values.transpose(1, 2)[is_token])


def block_attention(
    _: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, cu_seq_lens_q: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """Full attention within each block (a frame) of the vision tower; adjacent blocks of equal length share one call.

    transformers' sdpa path makes one call per block: 128 small calls per layer for 32 clips of 8 frames.

    Args:
        query, key, value: [1, heads, N, D].
        cu_seq_lens_q: [blocks + 1] boundaries.
    """
    return _attend_apart(query, key, value, cu_seq_lens_q.diff().tolist(), options.get("scaling")), None


def _attend_apart(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float | None, is_causal: bool = False
) -> Tensor:
    """Attention of sequences, one after another in a row, each by itself; adjacent ones of equal length share one call.

    Args:
        query, key, value: [1, heads, N, D]; tokens after the last sequence get 0.

    Returns:
        [1, N, heads, D]
    """
    outs, at = [], 0
    for size, same in groupby(lengths):
        n = len(list(same))
        q, k, v = (x[0, :, at : at + n * size].unflatten(1, (n, size)).transpose(0, 1) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=is_causal)  # [n, heads, size, D]
        outs.append(out.transpose(1, 2).flatten(0, 1))
        at += n * size
    rest = query.shape[2] - at
    return F.pad(torch.cat(outs), (0, 0, 0, 0, 0, rest))[None] if rest else torch.cat(outs)[None]
