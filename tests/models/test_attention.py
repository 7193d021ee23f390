"""Both forms of packed attention compared with plain causal attention on separate sequences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from rlvid.models.attention import SharedPrefixLayout, flex_attend, shared_prefix_attention

GROUPS = [(5, [3, 1, 4]), (9, [2, 6]), (1, [1])]
SEQUENCES = [(5, [3]), (9, [2]), (1, [1])]  # groups of one response
HEADS, KV_HEADS, DIM = 4, 2, 8


def attend_separately(q: Tensor, k: Tensor, v: Tensor, groups: list[tuple[int, list[int]]] = GROUPS) -> Tensor:
    """Attention of each response as a sequence of its own: [heads, N, D]; prompt rows are from the first one."""
    out = torch.zeros_like(q[0])
    at = 0
    for prompt, lengths in groups:
        of_prompt = torch.arange(at, at + prompt)
        at += prompt
        for n in lengths:
            rows = torch.cat([of_prompt, torch.arange(at, at + n)])
            x = (t[:, :, rows] for t in (q, k, v))
            o = F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True)[0]
            out[:, rows[prompt:]] = o[:, prompt:]
            out[:, of_prompt] = o[:, :prompt]
            at += n
    return out


@pytest.fixture
def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    n = sum(p + sum(lengths) for p, lengths in GROUPS)
    return [torch.randn(1, h, n, DIM, generator=generator).requires_grad_() for h in (HEADS, KV_HEADS, KV_HEADS)]


def test_packed_attention_and_its_gradients_equal_separate_sequences(inputs: list[Tensor]) -> None:
    check(
        inputs,
        shared_prefix_attention(nn.Identity(), *inputs, None, SharedPrefixLayout.of(GROUPS))[0][0].transpose(0, 1),
    )


def test_groups_of_one_response_are_attended_to_as_sequences(inputs: list[Tensor]) -> None:
    n = sum(p + sum(lengths) for p, lengths in SEQUENCES)
    first = [x[:, :, :n].detach().requires_grad_() for x in inputs]
    layout = SharedPrefixLayout.of(SEQUENCES)
    assert layout.sequences == [p + sum(lengths) for p, lengths in SEQUENCES]
    assert SharedPrefixLayout.of(GROUPS).sequences is None
    check(first, shared_prefix_attention(nn.Identity(), *first, None, layout)[0][0].transpose(0, 1), groups=SEQUENCES)


def test_flex_attention_equals_separate_sequences(inputs: list[Tensor]) -> None:
    """Without gradients: FlexAttention has no backward on CPU."""
    inputs = [x.detach() for x in inputs]
    out = flex_attend(*inputs, SharedPrefixLayout.of(GROUPS), DIM**-0.5, is_compiled=False)[0]
    torch.testing.assert_close(out, attend_separately(*inputs), atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_flex_attention_and_its_gradients_on_gpu(inputs: list[Tensor]) -> None:
    inputs = [F.pad(x, (0, 16 - DIM)).detach().cuda().requires_grad_() for x in inputs]  # 16: its smallest head
    layout = SharedPrefixLayout.of(GROUPS).to(torch.device("cuda"))
    check(inputs, shared_prefix_attention(nn.Identity(), *inputs, None, layout)[0][0].transpose(0, 1), atol=1e-3)


def check(inputs: list[Tensor], got: Tensor, atol: float = 1e-5, groups: list[tuple[int, list[int]]] = GROUPS) -> None:
    """Compare `got` and the gradients of a random weighted sum of it with those of separate sequences."""
    expected = attend_separately(*inputs, groups=groups)
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected.device)
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)
    grads = torch.autograd.grad((got * weights).sum(), inputs)
    for g, w in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(g, w, atol=atol, rtol=0)


def test_tokens_after_the_last_group_have_output_zero(inputs: list[Tensor]) -> None:
    layout = SharedPrefixLayout.of(GROUPS)
    longer = [F.pad(x.detach(), (0, 0, 0, 1)) for x in inputs]
    for out in (
        flex_attend(*longer, layout, DIM**-0.5, is_compiled=False)[0],
        shared_prefix_attention(nn.Identity(), *longer, None, layout)[0][0].transpose(0, 1),
    ):
        assert (out[:, -1] == 0).all()
        torch.testing.assert_close(out[:, :-1], attend_separately(*inputs), atol=1e-5, rtol=0)


def test_membership_gives_group_and_response_of_each_token() -> None:
    group, response = SharedPrefixLayout.of([(2, [1, 2]), (1, [2])]).membership()
    assert group.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert response.tolist() == [-1, -1, 0, 1, 1, -1, 0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_blocks_are_those_of_the_rule_asked_for_every_pair(seed: int) -> None:
    """Against torch's `create_block_mask`: the same empty, partial and full blocks."""
    rng = np.random.default_rng(seed)
    longest = int(rng.choice([3, 100, 300, 900]))
    sizes = [(int(rng.integers(1, longest)), rng.integers(1, longest, rng.integers(0, 5)).tolist()) for _ in range(4)]
    if seed % 3 == 0:
        sizes = [(128 * (1 + i), [128, 256, 128][:i]) for i in range(4)]  # boundaries of blocks and groups coincide
    if seed == 19:
        sizes = [(9000, [500, 513])]  # blocks of 256
    mask = SharedPrefixLayout.of(sizes).block_mask
    n = mask.seq_lengths[0]
    expected = create_block_mask(mask.mask_mod, None, None, n, n, device="cpu", BLOCK_SIZE=mask.BLOCK_SIZE)
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, own = (getattr(m, f"{name}_num_blocks")[0, 0].tolist() for m in (expected, mask))
        assert own == counts, name
        listed, own_listed = (getattr(m, f"{name}_indices")[0, 0].tolist() for m in (expected, mask))
        assert [row[:k] for row, k in zip(own_listed, counts, strict=True)] == [
            row[:k] for row, k in zip(listed, counts, strict=True)
        ], name


@pytest.mark.parametrize(("n_before", "lengths"), [(5, [3, 1, 4]), (128, [130, 2]), (300, [100, 27, 128])])
def test_a_row_continues_an_earlier_one(n_before: int, lengths: list[int]) -> None:
    """Prompt and responses in one row, against the prompt but its last token before the rest; both forms."""
    layer, n = nn.Identity(), n_before + 1 + sum(lengths)
    q, k, v = (torch.randn(1, heads, n, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    whole = shared_prefix_attention(layer, q, k, v, None, SharedPrefixLayout.of([(n_before + 1, lengths)]))[0][0]
    first = replace(SharedPrefixLayout.of([(n_before, [])]), kept={})
    begin = shared_prefix_attention(layer, *(x[:, :, :n_before] for x in (q, k, v)), None, first)[0][0]
    torch.testing.assert_close(begin, whole[:n_before], atol=1e-5, rtol=0)
    assert first.kept is not None
    rest = replace(SharedPrefixLayout.of([(1, lengths)]), before=first.kept)
    q, k, v = (x[:, :, n_before:] for x in (q, k, v))
    for out in (
        shared_prefix_attention(layer, q, k, v, None, rest)[0][0],
        flex_attend(q, k, v, rest, DIM**-0.5, first.kept[layer], is_compiled=False)[0].transpose(0, 1),
    ):
        torch.testing.assert_close(out, whole[n_before:], atol=1e-5, rtol=0)
    mask = rest.block_mask
    expected = create_block_mask(mask.mask_mod, None, None, *mask.seq_lengths, device="cpu", BLOCK_SIZE=mask.BLOCK_SIZE)
    for name in ("kv", "full_kv"):
        assert getattr(mask, f"{name}_num_blocks").tolist() == getattr(expected, f"{name}_num_blocks").tolist(), name


def test_dropout_is_refused(inputs: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="dropout"):
        shared_prefix_attention(nn.Identity(), *inputs, None, SharedPrefixLayout.of(GROUPS), dropout=0.1)
