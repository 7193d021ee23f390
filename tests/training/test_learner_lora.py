"""Adapters under the real DeepSpeed engine: what is trained, sent, kept as reference and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlvid.config import LoraConfig
from rlvid.errors import UserError
from rlvid.models.families import load_family
from rlvid.models.loading import load_model
from rlvid.models.lora import add_adapters
from rlvid.training.packing import PackedPolicy, pack
from tests.prompts import group_of, prompt_of
from tests.training.conftest import Results


@pytest.fixture
def alone(one_rank: Results) -> dict[str, Any]:
    return one_rank["lora_rank", 0]


def check_reference(logprobs: dict[str, list[float]]) -> None:
    assert logprobs["off"] == pytest.approx(logprobs["base"], abs=1e-6)
    assert logprobs["moved"] != pytest.approx(logprobs["base"], abs=1e-2)
    assert logprobs["frozen"] == pytest.approx(logprobs["moved"], abs=1e-6)
    assert logprobs["after"] != pytest.approx(logprobs["moved"], abs=1e-3)


def test_adapters_are_trained_and_the_reference_is_not(alone: dict[str, Any]) -> None:
    assert alone["losses"][3] < alone["losses"][0]
    check_reference(alone["logprobs"])
    assert alone["again"] == pytest.approx(alone["losses"][3], abs=1e-6)


def test_only_adapters_are_sent_and_saved(alone: dict[str, Any], tiny_model: Path) -> None:
    assert len(alone["sent"]) == 2 * 7 * 4  # A and B of seven layers in each of four blocks
    assert all(name.startswith("base_model.model.") and ".lora_" in name for name in alone["sent"])
    assert alone["checkpoint_bytes"] < (tiny_model / "model.safetensors").stat().st_size / 2


def test_two_ranks_under_zero_3_equal_one_process(alone: dict[str, Any], two_ranks: Results) -> None:
    two = two_ranks["lora_rank", 3]
    assert two["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert two["again"] == pytest.approx(two["losses"][3], abs=1e-6)
    assert two["sent"] == alone["sent"]
    check_reference(two["logprobs"])


def test_weights_in_4_bits_train_as_others_do(one_rank: Results, alone: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes")
    small = one_rank["qlora_rank", 0]
    assert "torch.uint8" in small["dtypes"] and "torch.uint8" not in alone["dtypes"]
    assert small["losses"][3] < small["losses"][0]
    assert small["losses"] == pytest.approx(alone["losses"], abs=0.2) and small["losses"] != alone["losses"]
    assert small["again"] == pytest.approx(small["losses"][3], abs=1e-6)
    assert small["sent"] == alone["sent"]
    check_reference(small["logprobs"])


def test_without_bitsandbytes_an_error_says_what_to_install(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlvid.models.lora.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"model\.lora\.quantize=nf4 needs bitsandbytes: install it"):
        add_adapters(load_model(tiny_model, "float32"), LoraConfig(quantize="nf4"), load_family(tiny_model).no_lora)


@pytest.mark.parametrize("program", ["lora_rank", "qlora_rank"])
def test_exported_checkpoint_is_the_adapted_policy(one_rank: Results, program: str) -> None:
    if (program, 0) not in one_rank:
        pytest.skip("bitsandbytes is not installed")
    export = one_rank.folder / program / "export-0-1"
    family = load_family(export)
    answer = family.encode_answer("square")
    group = group_of(prompt_of(family, (4, 56, 56), seed=0), answer)
    with torch.no_grad():
        logprobs = PackedPolicy(load_model(export, "float32"), family)(pack([group]))[0]
    # exported after a step that was repeated from the checkpoint: the same weights
    assert logprobs.tolist() == pytest.approx(one_rank[program, 0]["logprobs"]["after"], abs=1e-5)
    assert (export / "adapter" / "adapter_model.safetensors").exists()
