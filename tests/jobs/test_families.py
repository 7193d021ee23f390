"""Two steps of sft, dpo and grpo with every family: `make test-families`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from jobs.cli import main
from rlvid.models.families import FAMILIES as CLASSES
from tests.jobs.runs import metrics_of
from tests.prompts import FAMILIES

pytestmark = [pytest.mark.engine, pytest.mark.families, pytest.mark.timeout(900)]

CONFIG = """
model: {{tiny: {{family: {family}, layers: 1, vision_layers: 1}}}}
data: {{train: {folder}/{train}.jsonl, eval: null, root: {folder}, cache_dir: {tmp}/cache}}
video: {{frames: 4, height: {side}, width: {side}}}
run: {{wandb: disabled, dir: {tmp}/run}}
rollout: {{max_tokens: 4, max_model_len: 512, max_sequences: 32}}
train: {{steps: 2, batch_size: 4, lr: 1.0e-3}}
grpo: {{group_size: 2}}
placement: {{threads: 1, encoders: 1}}
"""


@pytest.fixture
def folder(synthetic: Path, tmp_path: Path, family: str) -> Path:
    """Of manifests, without videos where the family has none."""
    if CLASSES[family].placeholders:
        return synthetic
    for name in ("train", "train_pairs"):
        rows = [json.loads(line) for line in (synthetic / f"{name}.jsonl").read_text().splitlines()]
        text = [{key: value for key, value in row.items() if key != "video"} for row in rows]
        numbered = [{**row, "question": f"{i}: {row['question']}"} for i, row in enumerate(text)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbered))
    return tmp_path


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("job", ["sft", "dpo", "grpo"])
def test_two_steps(job: str, family: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, train = tmp_path / "config.yaml", "train_pairs" if job == "dpo" else "train"
    side = 64 if family == "qwen3_vl" else 56
    config.write_text(CONFIG.format(family=family, folder=folder, tmp=tmp_path, train=train, side=side))
    assert main([job, str(config)]) == 0, capsys.readouterr().err
    rows = [row for row in metrics_of(tmp_path / "run") if "train/lr" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["train/loss" if job == "grpo" else "loss"]) for row in rows)
    assert list((tmp_path / "run" / "policy").glob("*.safetensors"))
