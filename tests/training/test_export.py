"""A checkpoint written a tensor at a time, read by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlvid.models.loading import load_model
from rlvid.training.export import INDEX_FILE, SINGLE_FILE, Described, WeightFiles


@pytest.mark.parametrize("model", ["qwen2_vl", "idefics2", "qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("file_bytes", [2**30, 200_000])
def test_transformers_reads_what_was_written(
    tiny_models: dict[str, Path], tmp_path: Path, model: str, dtype: str, file_bytes: int
) -> None:
    network = load_model(tiny_models[model], dtype)
    named = list(network.named_parameters())
    with torch.no_grad():
        for i, (_, parameter) in enumerate(named):
            parameter.fill_(i)
    described = [Described(name, p.dtype, tuple(p.shape)) for name, p in named]
    files = WeightFiles(tmp_path, network, described, file_bytes)
    for name, parameter in named:
        files.add(name, parameter)
    files.close(tiny_models[model])

    found = load_model(tmp_path, dtype)
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, dict(named)[name]), name
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    assert (tmp_path / "tokenizer.json").exists()
    written = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    if file_bytes == 2**30:
        assert written == [SINGLE_FILE]
    else:
        index = json.loads((tmp_path / INDEX_FILE).read_text())
        assert sorted(set(index["weight_map"].values())) == written and len(written) > 2
        assert index["metadata"]["total_size"] == sum(p.nbytes for _, p in named)
    original = set(json.loads(header(tiny_models[model] / SINGLE_FILE)))
    assert {name for path in written for name in json.loads(header(tmp_path / path))} == original


def header(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]
