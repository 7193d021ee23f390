"""Supervised training through Ray Data, then an evaluation of what it made."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.numpy import load_file

from rlvid.config import SyntheticConfig
from rlvid.synthetic.moving_shapes import make_synthetic
from tests.jobs.runs import LIMIT_S, metrics_of, wait_for

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]


def run(job: str, config: Path, *overrides: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"jobs.{job}", "--config", str(config), *overrides]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
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
evaluate: {{best: loss, patience: 1}}
stages:
- data: {{balance: answer}}
- train: {{lr_factors: {{tower: 0, text: 0}}, lr: 1.0e-30}}  # nothing gets better
  evaluate: {{every: 2}}
placement: {{threads: 1, encoders: 1}}
rollout: {{max_tokens: 4, max_model_len: 512}}
"""
    )
    whole = tmp_path / "sft"
    result = run("sft", config, f"run.dir={whole}")
    sft, second = whole / "stage_1", whole / "stage_2"
    assert result["steps"] == 2 and result["best_step"] == 0  # of the second stage, which stopped early
    assert [row["step"] for row in metrics_of(second) if "loss" in row] == [1, 2]
    assert not list((second / "policy").parent.glob("checkpoints/step_12"))
    trained, same = (load_file(folder / "policy" / "model.safetensors") for folder in (sft, second))
    assert all((trained[name] == same[name]).all() for name in trained)
    steps = [row["step"] for row in metrics_of(sft) if "eval/best" in row]
    assert steps == [0, 12] and metrics_of(sft)[-1]["eval/best_step"] == 12
    rows = [json.loads(line) for line in (sft / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert 30 < steps[-1]["video/decodes"] <= 34  # each clip at most once; balanced, some may not have come yet
    held_out = {row["step"]: row for row in rows if "eval/loss" in row}
    assert list(held_out) == [0, 12] and held_out[12]["eval/loss"] < held_out[0]["eval/loss"]
    assert held_out[12]["eval/n"] == 10

    evaluation = run("evaluate", sft)  # a run folder: its policy on its own held-out samples
    assert evaluation["n"] == 10 and 0 <= evaluation["accuracy"] <= 1
    predictions = (sft / "eval" / "predictions" / "step_000000.jsonl").read_text().splitlines()
    assert len(predictions) == 10 and all(json.loads(line)["n_tokens"] for line in predictions)
    # sft's own accuracy needs no generation, and is that of the engine's greedy answers
    manifest = map(json.loads, (sft / "data" / "eval.jsonl").read_text().splitlines())
    given = {row["id"]: row["answer"] for row in manifest}
    same = [row["text"] == given[row["id"]] for row in map(json.loads, predictions)]
    assert held_out[12]["eval/accuracy"] == sum(same) / 10


def test_a_step_without_readable_clips_is_left_out_and_its_checkpoint_is_not(tmp_path: Path) -> None:
    make_synthetic(tmp_path / "data", SyntheticConfig(train=3, eval=1), seed=0)
    lines = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
    missing = json.dumps({**json.loads(lines[0]), "video": "clips/missing.mp4"})
    talks = []  # whose earlier answers are trained too
    for row in map(json.loads, lines[1:]):
        asked = [{"type": "video", "video": row["video"]}, {"type": "text", "text": row["question"]}]
        turns = [("user", asked), ("assistant", row["answer"]), ("user", row["question"])]
        messages = [{"role": role, "content": content} for role, content in turns]
        talks.append(json.dumps({"id": row["id"], "messages": messages, "answer": row["answer"]}))
    (tmp_path / "data" / "some.jsonl").write_text("\n".join([missing, *talks]) + "\n")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
model: {{tiny: {{layers: 1, vision_layers: 1}}}}
data: {{train: {tmp_path}/data/some.jsonl, cache_dir: {tmp_path}/cache, max_bad_fraction: 0.5}}
video: {{height: 56, width: 56}}
run: {{dir: {tmp_path}/run, wandb: disabled, checkpoint_every: 1, keep_checkpoints: 3}}
train: {{steps: 3, batch_size: 1}}
sft: {{loss: all}}
placement: {{threads: 1, encoders: 1}}
rollout: {{max_tokens: 4, max_model_len: 512}}
"""
    )
    run("sft", config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_1", "step_2", "step_3"]


@pytest.mark.slow
def test_a_killed_worker_restarts_all_from_the_last_checkpoint_and_the_run_says_so(tmp_path: Path) -> None:
    config, folder, out = tmp_path / "config.yaml", tmp_path / "run", tmp_path / "out"
    config.write_text(
        f"""
model: {{tiny: {{layers: 1, vision_layers: 1}}}}
data: {{synthetic: {{train: 8, eval: 1}}, cache_dir: {tmp_path}/cache}}
video: {{frames: 4, height: 56, width: 56}}
run: {{dir: {folder}, wandb: disabled, checkpoint_every: 20}}
train: {{steps: 100000, batch_size: 4}}
evaluate: {{every: 100000}}
rollout: {{max_tokens: 4, max_model_len: 512}}
placement: {{threads: 1, trainer_workers: 2}}
"""
    )
    with out.open("w") as stdout:
        command = [sys.executable, "-m", "jobs.sft", "--config", str(config)]
        environment = os.environ | {"RAY_ADDRESS": "local"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True)
    try:
        # between two checkpoints, so that there are steps to repeat
        wait_for(lambda: (folder / "metrics.jsonl").exists() and 22 < metrics_of(folder)[-1]["step"] % 40 < 35, process)
        children = psutil.Process(process.pid).children(recursive=True)
        next(p for p in children if "RayTrainWorker" in " ".join(p.cmdline())).kill()
        killed_at = metrics_of(folder)[-1]["step"]
        wait_for(lambda: metrics_of(folder)[-1]["step"] > killed_at + 40, process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == 130, out.read_text() + err
    assert re.search(r"^2 workers, from step \d+: steps \d+ to \d+ are done again$", out.read_text(), re.MULTILINE)
    steps = [row["step"] for row in metrics_of(folder) if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))
    shown = [line for line in out.read_text().splitlines() if re.match(r" *\d+/100000 ", line)]
    assert len(shown) < 10  # not every step
    assert "raylet" not in out.read_text() and "Dataset" not in out.read_text()
