from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlvid.models.families import load_family
from rlvid.models.loading import load_model
from rlvid.training.packing import Group, PackedPolicy, Responses, micro_batches, normalise, pack
from rlvid.types import Prompt
from tests.prompts import noise, prompt_of


def responses(lengths: list[int], seed: int = 0) -> Responses:
    rng = np.random.default_rng(seed)
    ids = tuple(rng.integers(260, 300, size=n).astype(np.int32) for n in lengths)
    return Responses(token_ids=ids, weights=rng.random(sum(lengths), dtype=np.float32))


def separate_sequences(folder: Path, groups: list[Group], temperature: float) -> tuple[torch.nn.Module, torch.Tensor]:
    """Log-probs [M] by transformers' own attention, one sequence and one vision pass per response."""
    from transformers import Qwen2VLForConditionalGeneration

    family = load_family(folder)
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    flat = []
    for group in groups:
        p: Prompt = group.prompt
        for ids in group.responses.token_ids:
            after = np.broadcast_to(p.next_position + np.arange(len(ids)), (3, len(ids)))
            logits = model(
                input_ids=torch.from_numpy(np.concatenate([p.token_ids, ids])).long()[None],
                position_ids=torch.from_numpy(np.concatenate([p.positions, after], axis=1)).long()[:, None],
                pixel_values_videos=normalise(torch.from_numpy(p.patches), family, torch.float32) if p.spans else None,
                video_grid_thw=torch.from_numpy(p.grid_thw) if p.spans else None,
            ).logits[0, p.length - 1 : -1]
            logits[:, list(family.banned_tokens)] = float("-inf")
            flat.append((logits / temperature).log_softmax(-1).gather(1, torch.from_numpy(ids).long()[:, None])[:, 0])
    return model, torch.cat(flat)


def test_shared_prompt_gives_the_same_logprobs_and_gradients_as_separate_sequences(tiny_model: Path) -> None:
    family = load_family(tiny_model)
    groups = [
        Group(prompt_of(family, (16, 56, 56)), responses([5, 1, 9])),  # merged T = 8 > max(H, W) = 2
        Group(prompt_of(family, (4, 84, 112), (2, 28, 28), seed=7), responses([3, 3, 3, 3], seed=1)),
        Group(prompt_of(family, question="How many shapes are there?"), responses([2], seed=2)),
    ]
    policy = PackedPolicy(load_model(tiny_model, "float32"), family, temperature=0.7)
    logprobs, entropy = policy(pack(groups))
    weights = torch.from_numpy(np.concatenate([g.responses.weights for g in groups]))
    (weights * logprobs).sum().backward()

    model, expected = separate_sequences(tiny_model, groups, temperature=0.7)
    (weights * expected).sum().backward()

    assert (logprobs - expected).abs().max() < 1e-5
    assert torch.isfinite(entropy).all() and (entropy > 0).all()
    gradients = dict(model.named_parameters())
    for name, parameter in policy.network.named_parameters():
        theirs = gradients[name].grad
        assert (parameter.grad - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9, name


def test_splitting_a_group_changes_nothing(tiny_model: Path) -> None:
    family = load_family(tiny_model)
    group = Group(prompt_of(family, (8, 56, 56)), responses([4, 2, 7]))
    policy = PackedPolicy(load_model(tiny_model, "float32"), family, temperature=1.0)
    with torch.no_grad():
        shared, _ = policy(pack([group]))
        apart, _ = policy(pack(group.split()))
    assert (shared - apart).abs().max() < 1e-5
    assert np.array_equal(np.concatenate([g.responses.weights for g in group.split()]), group.responses.weights)


def test_responses_do_not_see_each_other(tiny_model: Path) -> None:
    family = load_family(tiny_model)
    prompt = prompt_of(family, (8, 56, 56))
    first, second = responses([4, 6]).token_ids
    policy = PackedPolicy(load_model(tiny_model, "float32"), family, temperature=1.0)
    weights = np.ones(10, dtype=np.float32)
    with torch.no_grad():
        one, _ = policy(pack([Group(prompt, Responses(token_ids=(first, second), weights=weights))]))
        other, _ = policy(pack([Group(prompt, Responses(token_ids=(first, second[::-1].copy()), weights=weights))]))
    assert torch.equal(one[:4], other[:4])
    assert not torch.allclose(one[4:], other[4:])


def test_placeholders_have_no_probability(tiny_model: Path) -> None:
    family = load_family(tiny_model)
    banned = np.array([family.video_token, 270], dtype=np.int32)
    policy = PackedPolicy(load_model(tiny_model, "float32"), family, temperature=1.0)
    logprobs, _ = policy(
        pack([Group(prompt_of(family), Responses(token_ids=(banned,), weights=np.ones(2, np.float32)))])
    )
    assert logprobs[0] == float("-inf") and torch.isfinite(logprobs[1])


def test_normalised_patches_equal_the_processors_float_output(tiny_model: Path) -> None:
    from transformers.models.qwen2_vl import Qwen2VLVideoProcessor

    family = load_family(tiny_model)
    frames = noise(4, 56, 84)
    theirs = Qwen2VLVideoProcessor.from_pretrained(tiny_model)(
        torch.from_numpy(frames).permute(0, 3, 1, 2), do_resize=False, return_tensors="pt"
    )["pixel_values_videos"]
    ours = normalise(torch.from_numpy(family.patchify(frames)[1]), family, torch.float32)
    assert torch.equal(ours, theirs)


def test_micro_batches_keep_order_and_budget(tiny_model: Path) -> None:
    family = load_family(tiny_model)
    group = Group(prompt_of(family, (8, 56, 56)), responses([4]))  # costs as many tokens each time
    rows = micro_batches([group] * 5, 2 * group.cost + 1)
    assert [len(row) for row in rows] == [2, 2, 1]
    assert [len(row) for row in micro_batches([group] * 3, 1)] == [1, 1, 1]  # a larger one goes alone
    assert group.cost == group.prompt.length + 64 + 4  # text tokens, patches, response


@pytest.mark.parametrize("lengths", [[3], [1, 1], [2, 5]])
def test_sources_are_the_tokens_before(tiny_model: Path, lengths: list[int]) -> None:
    group = Group(prompt_of(load_family(tiny_model)), responses(lengths))
    row = pack([group])
    p, at = group.prompt.length, 0
    expected = []
    for n in lengths:
        expected += [p - 1, *range(p + at, p + at + n - 1)]
        at += n
    assert row.source.tolist() == expected
    assert row.target.tolist() == np.concatenate(group.responses.token_ids).tolist()
