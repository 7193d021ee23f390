"""`rlvid reward-model` and `rlvid score` from end to end, with the real trainer: regression, and pairs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlvid.config import SyntheticConfig
from rlvid.synthetic.moving_shapes import make_synthetic, write_mp4
from tests.jobs.runs import LIMIT_S

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

CONFIG = """
model: {{tiny: {{layers: 1, vision_layers: 1}}}}
data: {{train: {train}, eval: {eval}, root: {root}, cache_dir: {root}/cache}}
video: {{frames: 4, height: 56, width: 56}}
run: {{wandb: disabled, dir: {root}/run}}
reward_model: {reward_model}
train: {{steps: {steps}, batch_size: 12, lr: 3.0e-3, schedule: cosine}}
rollout: {{max_tokens: 4, max_model_len: 1024}}
placement: {{threads: 1, encoders: 1}}
"""


def rlvid(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return dict(json.loads(done.stdout.splitlines()[-1]))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def bright_and_dark(folder: Path, split: str, n: int) -> Path:
    """Clips that are the brighter the higher their scores; one dimension goes the other way."""
    rows = []
    for i in range(n):
        score = i % 4 + 1
        write_mp4(folder / f"{split}{i}.mp4", np.full((4, 56, 56, 3), 20 + 55 * (score - 1), dtype=np.uint8), 8)
        labels = {"dark": 5.0 - score, "light": float(score)}
        rows.append({"id": f"{split}{i}", "video": f"{split}{i}.mp4", "question": "a grey wall", "labels": labels})
    rows[1]["labels"] = {"light": 2.0}  # this one is refused, the others keep their labels
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / f"{split}.jsonl"


def test_regression_learns_scores_by_name_and_its_model_ranks_videos(tmp_path: Path) -> None:
    train, held_out = (bright_and_dark(tmp_path, split, n) for split, n in (("t", 24), ("e", 12)))
    kind = "{kind: regression, template: question, dims: [light, dark]}"
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(train=train, eval=held_out, root=tmp_path, reward_model=kind, steps=80))
    outcome = result(rlvid("reward-model", config))
    metrics = rows_of(tmp_path / "run" / "metrics.jsonl")
    losses = [row["loss"] for row in metrics if "loss" in row]
    assert losses[0] == pytest.approx(1.25, abs=0.35)  # the head begins at 2.5: the spread of 1, 2, 3, 4
    assert losses[-1] < 0.3 * losses[0]
    assert outcome["n"] == 11 and outcome["spearman"] > 80
    assert metrics[0]["eval/spearman/dark"] is None  # a constant column before the first step
    assert [row["id"] for row in rows_of(tmp_path / "run" / "refused.jsonl")] == ["t1", "e1"]
    policy = tmp_path / "run" / "policy" / "reward_model"
    assert json.loads((policy / "rubric.json").read_text())["dims"] == ["light", "dark"]

    videos = [tmp_path / f"e{i}.mp4" for i in (0, 3, 2)] + [tmp_path / "none.mp4"]
    out = tmp_path / "scores.jsonl"
    done = rlvid("score", tmp_path / "run", *videos, "--prompt", "a grey wall", "--out", out, code=2)
    assert "1 of 4 rows have no score" in done.stderr and "none.mp4: there is no such file" in done.stderr
    best = result(done)
    scored = {Path(row["video"]).name: row for row in rows_of(out)}
    assert best["n"] == 3 and [row["rank"] for row in rows_of(out)] == [1, 2, 3, None]
    light, dark = ([scored[f"e{i}.mp4"]["scores"][dim] for i in (0, 2, 3)] for dim in ("light", "dark"))
    assert light[0] < min(light[1:]) - 1 and dark[0] > max(dark[1:]) + 1  # a model this small may see 3 and 4 alike
    assert scored["none.mp4"]["reason"] == "there is no such file"
    assert "leave out --response" in rlvid(
        "score", tmp_path / "run", videos[0], "--prompt", "x", "--response", "y", code=2
    ).stderr  # fmt: skip


@pytest.fixture(scope="module")
def on_pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder and result of a run on pairs."""
    tmp_path = tmp_path_factory.mktemp("pairs")
    make_synthetic(tmp_path, SyntheticConfig(train=24, eval=8, kinds=("colour",)), seed=0)
    # A wrong answer is recognised by its words here, so that a tiny model learns it in seconds.
    for split in ("train", "eval"):
        rows = rows_of(tmp_path / f"{split}_pairs.jsonl")
        worse = "".join(json.dumps({**row, "rejected": "no idea"}) + "\n" for row in rows)
        (tmp_path / f"{split}_pairs.jsonl").write_text(worse)
    config = tmp_path / "config.yaml"
    paths = {f: tmp_path / f"{split}_pairs.jsonl" for f, split in (("train", "train"), ("eval", "eval"))}
    kind = "{kind: bradley_terry, template: question}"
    config.write_text(CONFIG.format(**paths, root=tmp_path, reward_model=kind, steps=12))
    return tmp_path, result(rlvid("reward-model", config))


def test_a_model_trained_on_pairs_scores_answers(on_pairs: tuple[Path, dict[str, Any]]) -> None:
    tmp_path, outcome = on_pairs
    losses = [row["loss"] for row in rows_of(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)  # the head begins at 0
    assert losses[-1] < 0.3 and outcome["accuracy"] == 1.0 and outcome["n"] == 8
    out = tmp_path / "scores.jsonl"
    video = next((tmp_path / "clips").glob("eval*"))
    question = rows_of(tmp_path / "eval.jsonl")[0]["question"]
    answers = ("--response", "no idea", "--response", "red")
    best = result(rlvid("score", tmp_path / "run", video, "--prompt", question, *answers, "--out", out))
    assert best["response"] == "red" and best["n"] == 2
    no_folder = tmp_path / "run" / "config.yaml" / "scores.jsonl"
    assert "--out" in rlvid("score", tmp_path / "run", video, "--prompt", "x", "--out", no_folder, code=2).stderr
    assert [row["response"] for row in rows_of(out)] == ["red", "no idea"]


@pytest.mark.slow
def test_an_evaluation_that_a_kill_prevented_is_made_by_the_same_command(
    on_pairs: tuple[Path, dict[str, Any]],
) -> None:
    run = on_pairs[0] / "run"
    before = rows_of(run / "metrics.jsonl")
    assert "eval/accuracy" in before[-1]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in before[:-1]))
    (run / "policy.training.json").unlink()
    again = result(rlvid("reward-model", on_pairs[0] / "config.yaml"))
    after = rows_of(run / "metrics.jsonl")
    assert again["accuracy"] == 1.0 and [(r["step"], "loss" in r) for r in after] == [
        (r["step"], "loss" in r) for r in before
    ]
