"""Supervised training through Ray Data, then an evaluation of what it made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlvid.config import SyntheticConfig
from rlvid.synthetic.moving_shapes import make_synthetic

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
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13)) and result["steps"] == 12
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"] and result["loss"] == steps[-1]["loss"]
    assert steps[-1]["video/decodes"] == 34  # each of the 24 and 10 clips once, in five epochs
    held_out = {row["step"]: row for row in rows if "eval/loss" in row}
    assert list(held_out) == [0, 12] and held_out[12]["eval/loss"] < held_out[0]["eval/loss"]
    assert held_out[12]["eval/n"] == 10

    data = [f"data.eval={sft}/data/eval.jsonl", "data.synthetic=null"]
    evaluation = run(
        "evaluate", config, f"run.dir={tmp_path / 'eval'}", f"model.path={sft / 'policy'}", "model.tiny=null", *data
    )
    assert evaluation["n"] == 10 and 0 <= evaluation["accuracy"] <= 1


def test_a_step_without_readable_clips_is_left_out_and_its_checkpoint_is_not(tmp_path: Path) -> None:
    make_synthetic(tmp_path / "data", SyntheticConfig(train=3, eval=1), seed=0)
    lines = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
    missing = json.dumps({**json.loads(lines[0]), "video": "clips/missing.mp4"})
    (tmp_path / "data" / "some.jsonl").write_text("\n".join([missing, *lines[1:]]) + "\n")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
model: {{tiny: {{layers: 1, vision_layers: 1}}}}
data: {{train: {tmp_path}/data/some.jsonl, cache_dir: {tmp_path}/cache, max_bad_fraction: 0.5}}
video: {{height: 56, width: 56}}
run: {{dir: {tmp_path}/run, wandb: disabled, checkpoint_every: 1, keep_checkpoints: 3}}
train: {{steps: 3, batch_size: 1}}
rollout: {{max_tokens: 4, max_model_len: 512}}
"""
    )
    run("sft", config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_1", "step_2", "step_3"]
