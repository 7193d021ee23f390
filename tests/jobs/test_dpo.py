"""Complete DPO runs as a user starts them: Ray Train, Ray Data, DeepSpeed, real clips."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from jobs.cli import main
from tests.jobs.runs import LIMIT_S, ROOT, finish, metrics_of, wait_for

pytestmark = pytest.mark.timeout(1800)

CONFIG = """
model: {{tiny: {{layers: 1, vision_layers: 1}}}}
data: {{synthetic: {{train: 12, eval: 6}}, cache_dir: {tmp}/cache}}
run: {{wandb: disabled, checkpoint_every: 2}}
rollout: {{max_tokens: 4, max_model_len: 512}}
video: {{frames: 4, height: 56, width: 56}}
train: {{steps: 6, batch_size: 4, lr: 1.0e-3}}
evaluate: {{every: 100}}
placement: {{threads: 1, encoders: 1}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("dpo")
    (tmp / "config.yaml").write_text(CONFIG.format(tmp=tmp))
    return tmp / "config.yaml"


def start(
    config: Path, run: str, *overrides: str, ray_address: str = "local", stdout: int | IO[str] = subprocess.PIPE
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.dpo", "--config", str(config), f"run.dir={config.parent / run}", *overrides]
    environment = os.environ | {"RAY_ADDRESS": ray_address}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True)


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [row for row in metrics_of(run) if "rewards/margins" in row]


@pytest.mark.slow
@pytest.mark.engine
def test_two_killed_workers_with_stored_reference_train_as_one_worker_does(config: Path) -> None:
    """One worker with a frozen reference; and two under ZeRO 2 with stored log-probs, killed and resumed."""
    one = finish(start(config, "one", "train.lr_factors={tower: 0}"))
    assert one["steps"] == 6 and one["accuracy_before"] == 0.5  # policy and reference are equal
    expected = steps_of(config.parent / "one")
    assert expected[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert expected[-1]["loss"] < expected[0]["loss"] and expected[-1]["rewards/margins"] > 0
    before, after = (load_file(config.parent / "one" / name / "model.safetensors") for name in ("model", "policy"))
    unchanged = {name for name in after if torch.equal(after[name], before[name])}
    assert unchanged == {name for name in after if "visual." in name and "merger" not in name}

    two = config.parent / "two"
    options = ("placement.trainer_workers=2", "train.zero_stage=2", "dpo.reference=precomputed")
    options += ("train.lr_factors={tower: 0}",)
    process = start(config, "two", *options, "train.steps=6")
    wait_for(lambda: (two / "checkpoints" / "step_2").exists(), process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    finish(start(config, "two", *options))
    rows = steps_of(two)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, same in zip(rows, expected, strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen", "train/grad_norm"):
            assert row[name] == pytest.approx(same[name], rel=1e-4, abs=1e-4), (row["step"], name)


@pytest.mark.engine
def test_ctrl_c_saves_the_step_and_a_bad_clip_is_left_out(config: Path, synthetic: Path) -> None:
    rows = [json.loads(line) for line in (synthetic / "train_pairs.jsonl").read_text().splitlines()[:12]]
    rows[0]["video"] = "clips/missing.mp4"
    pairs = config.parent / "bad_pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = (f"data.train={pairs}", f"data.root={synthetic}", "data.synthetic=null")
    options += ("train.steps=2000", "run.checkpoint_every=1000")
    process = start(config, "stopped", *options)
    run = config.parent / "stopped"
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(steps_of(run)) > 3, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, out + err
    assert "resumes after step" in err and "Traceback" not in out + err
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name == f"step_{steps_of(run)[-1]['step']}"
    (bad,) = map(json.loads, (run / "bad_clips.jsonl").read_text().splitlines())
    assert bad["path"].endswith("missing.mp4")


@pytest.mark.slow
@pytest.mark.engine
def test_workers_follow_the_cluster(config: Path) -> None:
    """On a head with room for one worker; then a second node joins."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 200_000_000})
    options = ("train.max_workers=2", "train.resize_interval_s=2", "placement.trainer_cpus=2", "train.steps=100000")
    run, out = config.parent / "elastic", config.parent / "elastic.out"  # more steps than a pipe holds lines
    with out.open("w") as stdout:
        process = start(
            config, "elastic", *options, "run.checkpoint_every=50", ray_address=cluster.address, stdout=stdout
        )
    try:
        wait_for(lambda: (run / "checkpoints" / "step_50").exists(), process)
        alone = steps_of(run)[-1]["step"]
        cluster.add_node(num_cpus=2, object_store_memory=100_000_000)
        wait_for(lambda: "2 workers" in out.read_text() and steps_of(run)[-1]["step"] > alone + 100, process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
        cluster.shutdown()
    assert process.returncode == 130, out.read_text() + err
    started = [line for line in out.read_text().splitlines() if re.match(r"\d workers?", line)]
    assert started[0] == "1 worker"  # nothing is done again where the second node came right after a checkpoint
    assert re.fullmatch(r"2 workers(, from step \d+: steps \d+ to \d+ are done again)?", started[1])
    steps = [row["step"] for row in steps_of(run)]
    assert steps == list(range(1, len(steps) + 1))  # repeated steps are counted once


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dpo.loss=simpo", "dpo.logprobs=sum"], "simpo is defined on mean log-probs"),
        (["dpo.loss=orpo"], "set sft_weight to 1"),
        (["dpo.loss=ipo", "dpo.label_smoothing=0.1"], "label_smoothing has no effect with loss=ipo"),
        (["train.max_workers=2", "train.zero_stage=2"], "train.zero_stage"),
        (["dpo.loss=kto", "train.batch_size=1"], "set train.batch_size above 1"),
        (["train.batch_size=1", "train.max_workers=2"], "less than a sample for each of 2 workers"),
        (["placement.trainer_workers=40", "train.batch_size=40"], "the actors need"),
        (["dpo.reference_path=/nowhere"], "/nowhere"),
    ],
)
def test_impossible_settings_are_refused_before_training(
    config: Path, tmp_path: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert main(["dpo", str(config), f"run.dir={tmp_path}/run", *overrides]) == 2
    finally:
        ray.shutdown()
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
