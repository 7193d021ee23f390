"""Supervised training through Ray Data, then an evaluation of what it made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(900)


def run(job: str, config: Path, *overrides: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"jobs.{job}", "--config", str(config), *overrides]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_sft_lowers_the_loss_and_its_policy_can_be_evaluated(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
model: {{tiny: {{layers: 1, vision_layers: 1}}}}
data: {{synthetic: {{train: 24, eval: 10}}, cache_dir: {tmp_path}/cache}}
video: {{height: 56, width: 56}}
run: {{wandb: disabled}}
train: {{steps: 12, batch_size: 10, lr: 3.0e-3}}
rollout: {{max_tokens: 4, max_model_len: 512}}
"""
    )
    sft = tmp_path / "sft"
    result = run("sft", config, f"run.dir={sft}")
    rows = [json.loads(line) for line in (sft / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13)) and result["steps"] == 12
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["video/decodes"] == 24  # each clip once, in five epochs

    data = [f"data.eval={sft}/data/eval.jsonl", "data.synthetic=null"]
    evaluation = run(
        "evaluate", config, f"run.dir={tmp_path / 'eval'}", f"model.path={sft / 'policy'}", "model.tiny=null", *data
    )
    assert evaluation["n"] == 10 and 0 <= evaluation["accuracy"] <= 1
