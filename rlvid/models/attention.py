"""Attention over packed tokens: all groups of a micro-batch lie one after another in one row, without padding.

A group is `[prompt | response 1 | ... | response G]`. Each prompt token sees the prompt up to itself; each response
token sees the whole prompt and its own response up to itself. No mask of the square of the row is built: on CPU,
prompts and responses are gathered into two rectangles; on GPU, FlexAttention skips the blocks that nobody may see and
keeps no scores. Both are exactly the scores of separate sequences.

The two functions follow transformers' attention interface (`ALL_ATTENTION_FUNCTIONS`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TEXT_ATTENTION = "rlvid_shared_prefix"
VISION_ATTENTION = "rlvid_flash_blocks"  # Qwen-VL's tower hands over block boundaries only where the name says flash


@dataclass(frozen=True)
class SharedPrefixLayout:
    """Where the B groups of a packed row of N tokens lie.

    Index tensors point into the row; -1 pads. G is the largest group, P and R the longest prompt and response.
    """

    prompt_index: Tensor  # [B, P] int64
    response_index: Tensor  # [B, G * R] int64
    group_size: int  # G

    @classmethod
    def of(cls, groups: list[tuple[int, list[int]]]) -> SharedPrefixLayout:
        """From (prompt length, response lengths) of each group, in the row's order."""
        longest_prompt = max(p for p, _ in groups)
        size = max(len(r) for _, r in groups)
        longest = max((n for _, r in groups for n in r), default=0)  # 0: prompts alone
        prompts = np.full((len(groups), longest_prompt), -1, dtype=np.int64)
        responses = np.full((len(groups), size, longest), -1, dtype=np.int64)
        at = 0
        for b, (prompt, lengths) in enumerate(groups):
            prompts[b, :prompt] = np.arange(at, at + prompt)
            at += prompt
            for g, n in enumerate(lengths):
                responses[b, g, :n] = np.arange(at, at + n)
                at += n
        return cls(torch.from_numpy(prompts), torch.from_numpy(responses.reshape(len(groups), size * longest)), size)

    @cached_property
    def block_mask(self) -> BlockMask:
        """FlexAttention's mask of the row, made once for all layers: which blocks of it anybody sees."""
        from torch.nn.attention.flex_attention import create_block_mask

        group, response = self.owners()

        def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            is_own = (group[q] == group[k]) & ((response[k] < 0) | (response[q] == response[k]))
            return is_own & (k <= q)

        n = len(group)
        return create_block_mask(sees, None, None, n, n, device=str(group.device))

    def owners(self) -> tuple[Tensor, Tensor]:
        """Group [N] of each token, and its response in that group [N], -1 for the tokens of a prompt."""
        n = int(torch.cat([self.prompt_index.flatten(), self.response_index.flatten()]).max()) + 1
        group = torch.full((n,), -1, dtype=torch.int64, device=self.prompt_index.device)
        response = group.clone()
        for index in (self.prompt_index, self.response_index):
            kept = index >= 0
            b, column = kept.nonzero(as_tuple=True)
            group[index[kept]] = b
            if index is self.response_index and self.group_size:
                response[index[kept]] = column // (index.shape[1] // self.group_size)
        return group, response

    def to(self, device: torch.device) -> SharedPrefixLayout:
        return SharedPrefixLayout(self.prompt_index.to(device), self.response_index.to(device), self.group_size)


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: SharedPrefixLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row.

    Args:
        query: [1, heads, N, D]; key and value: [1, kv_heads, N, D].
        attention_mask: the row's layout (transformers hands on whatever the caller gave as mask).

    Returns:
        [1, N, heads, D] and no weights.
    """
    layout = attention_mask
    if dropout:
        raise ValueError("shared-prefix attention has no dropout: set attention_dropout to 0")
    heads, n, dim = query.shape[1:]
    scale = dim**-0.5 if scaling is None else scaling
    if query.is_cuda:
        return flex_attend(query, key, value, layout, scale, is_compiled=True).transpose(1, 2), None
    repeats = heads // key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, D]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    qp, kp, vp = (_take(x, layout.prompt_index) for x in (q, k, v))  # [B, heads, P, D]
    # Padding stands behind the prompt, so causality alone keeps it out.
    prompts = F.scaled_dot_product_attention(qp, kp, vp, is_causal=True, scale=scale)
    out = _put(q.new_zeros(n, heads, dim), layout.prompt_index, prompts)
    if not layout.group_size:
        return out.unsqueeze(0), None
    responses = _attend_responses(q, k, v, kp, vp, layout, scale)
    return _put(out, layout.response_index, responses).unsqueeze(0), None


def flex_attend(q: Tensor, k: Tensor, v: Tensor, layout: SharedPrefixLayout, scale: float, is_compiled: bool) -> Tensor:
    """Attention of a packed row by FlexAttention: q [1, heads, N, D], k and v [1, kv_heads, N, D] -> like q.

    Compiled it needs memory of the order of N; not compiled (for tests) it builds the scores.
    """
    n, named = q.shape[2], layout.block_mask.shape[-1]
    q, k, v = (x[:, :, :named] for x in (q, k, v))  # behind them may lie a clip that no group owns: it sees nothing
    flex = _flex_attention(is_compiled)
    out: Tensor = flex(q, k, v, block_mask=layout.block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return F.pad(out, (0, 0, 0, n - named))


@cache
def _flex_attention(is_compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if is_compiled else flex_attention


def _attend_responses(
    q: Tensor, k: Tensor, v: Tensor, kp: Tensor, vp: Tensor, layout: SharedPrefixLayout, scale: float
) -> Tensor:
    """One softmax over a prompt's keys and a response's own: [B, heads, G * R, D]."""
    qr, kr, vr = (_take(x, layout.response_index) for x in (q, k, v))  # [B, heads, G * R, D]
    batch, heads, _, dim = qr.shape
    own = (batch, heads, layout.group_size, -1, dim)  # [B, heads, G, R, D]
    to_prompt = qr @ kp.transpose(-1, -2)  # [B, heads, G * R, P]
    to_prompt = to_prompt.masked_fill((layout.prompt_index < 0)[:, None, None, :], float("-inf"))
    to_own = qr.view(own) @ kr.view(own).transpose(-1, -2)  # [B, heads, G, R, R]
    length = to_own.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    to_own = to_own.masked_fill(future, float("-inf")).flatten(2, 3)
    weights = torch.cat([to_prompt, to_own], dim=-1).mul(scale).float().softmax(-1).to(q.dtype)
    on_prompt, on_own = weights.split([to_prompt.shape[-1], length], dim=-1)
    return on_prompt @ vp + (on_own.view(*own[:3], length, length) @ vr.view(own)).flatten(2, 3)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x [N, heads, D] at index [B, L] (padding takes row 0) -> [B, heads, L, D]."""
    return x[index.clamp(min=0)].transpose(1, 2)


def _put(out: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Write values [B, heads, L, D] to the rows of out [N, heads, D] that index [B, L] names."""
    kept = index >= 0
    return out.index_put((index[kept],), values.transpose(1, 2)[kept])


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Full attention inside each block (a frame) of the vision tower; neighbours of equal length go in one call.

    transformers' own sdpa path makes one call per block: 128 small calls a layer for 32 clips of 8 frames.

    Args:
        query, key, value: [1, heads, N, D].
        cu_seq_lens_q: [blocks + 1] boundaries.
    """
    assert cu_seq_lens_q is not None
    lengths = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
    outs, at, i = [], 0, 0
    while i < len(lengths):
        j = i
        while j < len(lengths) and lengths[j] == lengths[i]:
            j += 1
        n, size = j - i, lengths[i]
        q, k, v = (x[0, :, at : at + n * size].unflatten(1, (n, size)).transpose(0, 1) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling)  # [n, heads, size, D]
        outs.append(out.transpose(1, 2).flatten(0, 1))
        at, i = at + n * size, j
    return torch.cat(outs).unsqueeze(0), None
