"""Whole runs of GRPO's relatives and of PPO, with rewards from elsewhere, with overlap, and with lost processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.http_server import chat_answer, serving
from tests.jobs.runs import LIMIT_S, finish, metrics_of, start, wait_for
from tests.prompts import noise

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

SMALL = """
model: {{tiny: {{layers: 1, vision_layers: 1}}}}
data: {{train: {folder}/train.jsonl, eval: {folder}/eval.jsonl, root: {clips}, cache_dir: {folder}/cache}}
run: {{wandb: disabled, checkpoint_every: 1, export_every: null, log_rollouts_every: 1}}
video: {{frames: 4, height: 56, width: 56}}
rollout: {{max_tokens: 4, max_model_len: 512, max_sequences: 32}}
train: {{batch_size: 4, lr: 1.0e-4}}
evaluate: {{every: 100}}
placement: {{threads: 1, encoders: 1}}
"""

CODE = """
def score(prompt, responses, id, **fields):
    if id[-1] in "01":
        raise ValueError("no such shape")
    return [len(text) / 100 for text in responses]
"""


@pytest.fixture
def config(tmp_path: Path, synthetic: Path) -> Path:
    """Of a job on manifests with a question about an image and one about nothing after each question about a video."""
    Image.fromarray(noise(1, 40, 60)[0]).save(synthetic / "picture.png")
    for name, n in (("train", 6), ("eval", 2)):
        rows = [json.loads(line) for line in (synthetic / f"{name}.jsonl").read_text().splitlines()[:n]]
        texts = [{"id": f"{name}-text-{i}", "question": f"{name} {i} + 1?", "answer": "circle"} for i in range(n)]
        images = [{**row, "id": f"{name}-image-{i}", "image": "picture.png"} for i, row in enumerate(texts)]
        mixed = [row for three in zip(rows, images, texts, strict=True) for row in three]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    file = tmp_path / "config.yaml"
    file.write_text(SMALL.format(folder=tmp_path, clips=synthetic))
    return file


@pytest.fixture
def servers() -> Iterator[tuple[str, str, list[str]]]:
    """URLs of a reward server, which is out of order at first, and of a judge; and the prompts that the judge read."""
    read: list[str] = []
    failures = iter(range(2))

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/score":
            failing = next(failures, None) is not None
            return 500 if failing else 200, {"values": [0.5] * len(body["responses"])}
        read.append(body["messages"][0]["content"])
        return 200, chat_answer("It is a square. <score>7</score>" if "response>" in read[-1] else "?")

    with serving(answer) as url:
        yield f"{url}/score", f"{url}/v1", read


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [row for row in metrics_of(run) if "reward/mean" in row]


def test_rewards_of_the_users_own_and_of_a_judge(
    config: Path, tmp_path: Path, servers: tuple[str, str, list[str]]
) -> None:
    score, judge, read = servers
    code, run = tmp_path / "my_rewards.py", tmp_path / "run"
    code.write_text(CODE)
    rewards = (
        f"rewards=[{{kind: exact}}, {{kind: custom, path: '{code}:score'}}, {{kind: endpoint, url: '{score}'}}, "
        f"{{kind: judge, judge: {{backend: endpoint, url: '{judge}', model: m}}}}]"
    )
    # T-GRPO as well: shuffled frames are answered and scored too; and the engine waits while the trainer works
    steps = ("grpo.variant=t_grpo", "grpo.group_size=2", "train.steps=3", "run.dump_every=1", "rollout.sleep=true")
    finish(start("grpo", config, f"run.dir={run}", rewards, *steps))
    rows = steps_of(run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["reward/endpoint"] == 0.5 and row["reward/judge"] == pytest.approx(6 / 9) for row in rows)
    helps = [row["groups/order_helps"] for row in rows if "groups/order_helps" in row]  # of questions about a video
    assert helps and all(0 <= share <= 1 for share in helps)
    table = pq.read_table(run / "rollouts").to_pylist()
    failed = [row for row in table if row["sample_id"][-1] in "01"]
    assert all(("no such shape" in str(row["invalid_reason"])) == (row in failed) for row in table)
    assert sum(row["groups/invalid_rewards"] for row in rows) == len(failed) > 0
    assert len(read) == len(set(read))  # an answer is asked for once
    assert (run / "judge_cache.jsonl").is_file()
    # the last step again, from its dump and the checkpoint before it: the same numbers
    command = [sys.executable, "-m", "jobs.cli", "replay", str(run)]
    again = subprocess.run([*command, "3"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    lines = {words[0]: words[1:] for words in map(str.split, again.stdout.splitlines()) if len(words) == 4}
    assert float(lines["train/loss"][2]) == float(lines["train/grad_norm"][2]) == 0.0
    missing = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "replay", str(run), "9"], capture_output=True, text=True
    )
    assert missing.returncode == 2 and "step_8 is missing, the state before step 9" in missing.stderr


def test_ppo_with_a_critic_of_its_own_and_overlap_resumes_both_networks(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = (
        f"run.dir={run}",
        "ppo.critic=own",
        "ppo.critic_steps=1",
        "ppo.group_size=2",
        "ppo.async_steps=1",
        "ppo.minibatches=2",
        "ppo.kl_coef=0.05",
        "ppo.kl_in=reward",
        "warm_start.steps=2",
        "warm_start.batch_size=4",
    )
    finish(start("ppo", config, *arguments, "train.steps=2"))
    first = (run / "critic" / "model.safetensors").read_bytes()
    finish(start("ppo", config, *arguments, "train.steps=4"))
    rows = steps_of(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert "train/loss" not in rows[0] and all("train/loss" in row for row in rows[1:])  # the critic alone at first
    assert all("critic/loss" in row for row in rows)
    assert max(row["policy/max_staleness"] for row in rows) == 1
    assert (run / "critic" / "model.safetensors").read_bytes() != first
    assert (run / "critic" / "reward_model" / "head.safetensors").is_file()
    assert (run / "policy" / "model.safetensors").is_file()
    # the trained critic starts another run; one with other words is refused
    other = tmp_path / "other"
    shutil.copytree(run / "critic", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 9999, "content": "<another>"})
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    process = start("ppo", config, *arguments[1:], "train.steps=2", f"run.dir={tmp_path}/x", f"ppo.critic_path={other}")
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2 and "has another tokenizer than the policy" in err


@pytest.mark.slow
def test_a_lost_rank_of_trainer_or_reference_costs_the_steps_since_the_last_checkpoint(
    config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = (
        f"run.dir={run}",
        "grpo.kl_coef=0.05",
        "grpo.group_size=2",
        "placement={trainer_workers: 2, trainer_cpus: 0.2, reference_cpus: 0.1, threads: 1}",
        "train.zero_stage=3",
        "train.steps=40",
        "run.checkpoint_every=5",
    )
    process = start("grpo", config, *arguments)

    def kill(title: str) -> None:
        for child in psutil.Process(process.pid).children(recursive=True):
            if f"ray::{title}" in " ".join(child.cmdline()):
                child.kill()
                return
        pytest.fail(f"no {title}")

    def step() -> int:
        rows = steps_of(run) if (run / "metrics.jsonl").exists() else []
        return max((row["step"] for row in rows), default=0)

    wait_for(lambda: step() >= 7, process)
    kill("TrainerRank")
    wait_for(lambda: step() < 7, process)  # rewound to step 5
    wait_for(lambda: step() >= 12, process)
    kill("ReferenceRank")
    result = finish(process)
    assert result["steps"] == 40
    assert [row["step"] for row in steps_of(run)] == list(range(1, 41))
    assert all("policy/kl" in row for row in steps_of(run))
