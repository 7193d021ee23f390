from __future__ import annotations

from pathlib import Path

import pytest

from rlvid.models.families import load_family
from rlvid.models.loading import load_model, part_of

TOWERS = {
    "qwen2_vl": "model.visual.",
    "qwen3_vl": "model.visual.",
    "llava_onevision": "model.vision_tower.",
    "idefics2": "model.vision_model.",
    "video_llava": ("model.video_tower.", "model.image_tower."),
    "video_llama_3": "model.vision_model.",
    "internvl": "model.vision_tower.",
    "cobra": ("model.dino.", "model.siglip."),
    "qwen3": "none",
}


@pytest.mark.parametrize("family", TOWERS)
def test_every_parameter_is_of_tower_projector_or_text(family: str, tiny_models: dict[str, Path]) -> None:
    names = [name for name, _ in load_model(tiny_models[family], "float32").named_parameters()]
    of = {name: part_of(name, load_family(tiny_models[family])) for name in names}
    tower = {n for n in names if n.startswith(TOWERS[family]) and "merger" not in n}
    assert {n for n in names if of[n] == "tower"} == tower
    projector = {n for n in names if any(word in n for word in ("merger", "connector", "projector", "newline"))}
    assert {n for n in names if of[n] == "projector"} == projector
    assert set(of.values()) == ({"text"} if family == "qwen3" else {"tower", "projector", "text"})
