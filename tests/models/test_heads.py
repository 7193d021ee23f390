"""The file of a head in a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlvid.errors import UserError
from rlvid.models.heads import HEAD_FILE, Head


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
