"""`rlvid merge`: an adapter and its base become one checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs.cli import main
from rlvid.config import LoraConfig
from rlvid.models.families import load_family
from rlvid.models.loading import load_model
from rlvid.models.lora import add_adapters, file_name, is_adapter, save_adapter


@pytest.fixture(scope="module")
def adapter(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, of Qwen2-VL."""
    base, folder, cfg = tiny_models["qwen2_vl"], tmp_path_factory.mktemp("run"), LoraConfig(rank=4, alpha=6)
    family, network = load_family(base), load_model(base, "float32")
    add_adapters(network, cfg, family.no_lora)
    torch.manual_seed(0)
    state = {file_name(n): torch.randn_like(p) / 16 for n, p in network.named_parameters() if is_adapter(n)}
    save_adapter(folder / "policy" / "adapter", state, cfg, family.no_lora, base=str(base))
    return folder


def test_the_merged_model_computes_what_base_and_adapter_compute(
    adapter: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    assert main(["merge", str(adapter), "--out", str(tmp_path / "merged")]) == 0
    tokens = torch.arange(40)[None]
    base = AutoModelForImageTextToText.from_pretrained(tiny_models["qwen2_vl"])
    with torch.no_grad():
        plain = base(tokens).logits
        expected = PeftModel.from_pretrained(base, str(adapter / "policy" / "adapter"))(tokens).logits
        found = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")(tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - plain).abs().max() > 0.05
    AutoProcessor.from_pretrained(tmp_path / "merged")
    load_model(tmp_path / "merged", "float32")


def test_what_does_not_fit_is_named(
    adapter: Path, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*words: str | Path) -> str:
        assert main(["merge", *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "has no adapter_config.json" in error(tiny_models["qwen2"], "--out", tmp_path / "x")
    assert "exists already" in error(adapter, "--out", tmp_path)
    assert "no checkpoint folder" in error(adapter, "--out", tmp_path / "x", "--base", tmp_path)
    assert "does not fit" in error(adapter, "--out", tmp_path / "x", "--base", tiny_models["qwen2"])
    assert not (tmp_path / "x").exists()
