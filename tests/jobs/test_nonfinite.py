"""A run whose loss is not finite says so, stops with an error, and exports nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.engine
def test_a_run_that_diverges_stops_with_an_error_and_exports_nothing(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
model: {{tiny: {{layers: 1, vision_layers: 1}}}}
data: {{synthetic: {{train: 8, eval: 1}}, cache_dir: {tmp_path}/cache}}
video: {{height: 56, width: 56}}
run: {{dir: {tmp_path}/run, wandb: disabled, checkpoint_every: 100}}
train: {{steps: 20, batch_size: 4, lr: 1.0e+30, max_skipped: 2}}
placement: {{threads: 1}}
rollout: {{max_tokens: 4, max_model_len: 512}}
"""
    )
    command = [sys.executable, "-m", "jobs.sft", "--config", str(config)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "2 steps in a row were skipped" in done.stderr and "Resume the run with a smaller train.lr" in done.stderr
    assert "was skipped, loss or gradient was not finite" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/skipped"] for row in rows if "train/skipped" in row] == [0.0, 1.0]
    assert not (tmp_path / "run" / "policy").exists()
    assert not any((tmp_path / "run").glob("checkpoints/step_*"))
