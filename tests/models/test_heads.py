"""The file of a head in a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlvid.errors import UserError
from rlvid.models.heads import HEAD_FILE, VALUE, Head


def test_head_is_loaded_by_name_not_by_position(tmp_path: Path) -> None:
    head = Head(("a", "b", "c"), 2.5)
    stored = head.build(4, torch.float32)
    assert stored.bias.tolist() == [2.5] * 3 and not stored.weight.any()
    torch.nn.init.normal_(stored.weight)
    head.save(stored.state_dict(), tmp_path)
    other = Head(("c", "a"))
    layer = other.build(4, torch.float32)
    other.load(layer, tmp_path)
    assert torch.equal(layer.weight, stored.weight[[2, 0]])


def test_a_head_that_is_absent_or_lacks_an_output_is_named(tmp_path: Path) -> None:
    head = Head(("a", "z"))
    layer = head.build(4, torch.float32)
    with pytest.raises(UserError, match=r"head\.safetensors cannot be read"):
        head.load(layer, tmp_path)
    Head(("a",)).save(Head(("a",)).build(4, torch.float32).state_dict(), tmp_path)
    with pytest.raises(UserError, match=f"{HEAD_FILE} scores a but not z"):
        head.load(layer, tmp_path)


def test_a_critics_head_is_small_random_numbers_or_that_of_a_reward_model(tmp_path: Path) -> None:
    layer = VALUE.build(999, torch.float32)
    assert layer.weight.std().item() == pytest.approx(1 / 1000, rel=0.2) and not layer.bias.any()
    assert torch.equal(layer.weight, VALUE.build(999, torch.float32).weight)  # the same on every rank
    reward = Head(("reward",)).build(999, torch.float32)
    torch.nn.init.normal_(reward.weight)
    Head(("reward",)).save(reward.state_dict(), tmp_path)
    VALUE.load(layer, tmp_path)
    assert torch.equal(layer.weight, reward.weight)
    Head(("a", "b")).save(Head(("a", "b")).build(999, torch.float32).state_dict(), tmp_path)
    with pytest.raises(UserError, match="scores a, b but not value"):
        VALUE.load(layer, tmp_path)
