from __future__ import annotations

from pathlib import Path

import pytest

from rlvid.models.families import load_family
from rlvid.models.loading import freeze_towers, load_model

TOWERS = {
    "qwen2_vl": "model.visual.",
    "qwen3_vl": "model.visual.",
    "idefics2": "model.vision_model.",
    "video_llava": "model.video_tower.",
    "qwen3": "none",
}


@pytest.mark.parametrize("family", TOWERS)
def test_frozen_tower_leaves_its_projection_and_the_language_model(family: str, tiny_models: dict[str, Path]) -> None:
    network = load_model(tiny_models[family], "float32")
    before = {name for name, p in network.named_parameters() if p.requires_grad}
    freeze_towers(network, load_family(tiny_models[family]))
    frozen = before - {name for name, p in network.named_parameters() if p.requires_grad}
    assert frozen == {n for n in before if n.startswith(TOWERS[family]) and "merger" not in n}
    assert bool(frozen) == (family != "qwen3")
