"""One readable error each, exit code 2, nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.cli import main
from rlvid.config import TinyModelConfig
from rlvid.models.tiny import make_tiny

Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run `rlvid grpo`, or another job, on a small config with overrides; returns the error it printed."""
    config = tmp_path / "config.yaml"
    config.write_text("model: {tiny: {}}\ndata: {synthetic: {train: 8, eval: 4}}\nrun: {wandb: disabled}\n")

    def run(*overrides: str, job: str = "grpo") -> str:
        folder = tmp_path / "run"
        code = main([job, str(config), f"run.dir={folder}", *overrides])
        error = capsys.readouterr().err
        assert code == 2, error
        assert "Traceback" not in error
        assert not folder.exists() or [p.name for p in folder.iterdir()] == ["logs"]
        return error

    return run


def manifest(path: Path, **row: object) -> str:
    row = {"id": "a", "video": "a.mp4", "question": "What?", "answer": "red", **row}
    path.write_text(json.dumps({key: value for key, value in row.items() if value is not None}) + "\n")
    return str(path)


def test_mistyped_key_names_the_nearest(refused: Refused) -> None:
    error = refused("train.stesp=3")
    assert "train.stesp" in error and "train.steps" in error


def test_missing_model_folder(refused: Refused, tmp_path: Path) -> None:
    assert "model.path" in refused(f"model.path={tmp_path / 'nowhere'}", "model.tiny=null")


def test_row_without_answer(refused: Refused, tmp_path: Path) -> None:
    error = refused(f"data.train={manifest(tmp_path / 'm.jsonl', answer=None)}")
    assert "m.jsonl:1" in error and "answer" in error


def test_answer_outside_the_choices(refused: Refused, tmp_path: Path) -> None:
    error = refused(f"data.train={manifest(tmp_path / 'm.jsonl', choices=['blue', 'green'])}")
    assert "m.jsonl:1" in error and "'red'" in error


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ("[]", "rewards is empty"),
        ("[{kind: model}]", "rewards.0.path is missing"),
        ("[{kind: model, path: nowhere/policy}]", "rewards.0.path: nowhere/policy does not exist"),
        (
            "[{kind: number}]",
            "data.train: sample 'a' (problem_type None): reward part number: the sample's answer 'red'",
        ),
        ("[{kind: exact, problem_types: [count]}]", "data.train: sample 'a': no reward part covers problem_type None"),
    ],
)
@pytest.mark.parametrize("is_dry", [False, True])
def test_rewards_that_cannot_score_are_an_error_before_anything_starts(
    refused: Refused, tmp_path: Path, rewards: str, message: str, is_dry: bool
) -> None:
    """Faults 15 and 21: said after 12 to 70 s, or at step 1."""
    train = f"data.train={manifest(tmp_path / 'm.jsonl')}"
    assert message in refused(train, f"rewards={rewards}", *["--dry-run"] * is_dry)


def test_evaluation_without_a_part_that_measures_accuracy(refused: Refused, tmp_path: Path) -> None:
    held_out = f"data.eval={manifest(tmp_path / 'm.jsonl')}"
    assert "evaluation needs a reward part that says whether" in refused(held_out, "rewards=[{kind: length}]")


def test_train_and_eval_share_ids(refused: Refused, tmp_path: Path) -> None:
    path = manifest(tmp_path / "m.jsonl")
    assert "ids are in both (a)" in refused(f"data.train={path}", f"data.eval={path}")


def test_missing_gpu(refused: Refused) -> None:
    error = refused("placement.gpus=1")
    assert "GPU" in error and "placement" in error


def test_a_rank_on_several_gpus(refused: Refused) -> None:
    error = refused("placement.gpus=8")
    assert (
        "placement.gpus=8: a trainer rank uses one GPU. Set placement.gpus to 1 and placement.trainer_workers" in error
    )


@pytest.mark.parametrize("is_dry", [False, True])
def test_more_videos_than_the_engines_expect(refused: Refused, tmp_path: Path, is_dry: bool) -> None:
    row = {"video": ["a.mp4", "b.mp4", "c.mp4"]}
    train = f"data.train={manifest(tmp_path / 'm.jsonl', **row)}"
    error = refused(train, "rollout.max_videos=2", *["--dry-run"] * is_dry)
    assert "data.train: sample 'a' has 3 videos, but rollout.max_videos=2: set it to 3" in error


def test_missing_cluster(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # the discard port, where no process listens
    assert "RAY_ADDRESS=127.0.0.1:9" in refused()


def test_frame_size_that_does_not_fit_the_family(refused: Refused) -> None:
    assert "28" in refused("video.height=50", "video.width=56")


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("{backend: endpoint, url: 'http://127.0.0.1:9/v1', model: m}", "isrt.judge.url: no judge answers at"),
        ("{backend: local, path: nowhere}", "isrt.judge.path: nowhere does not exist"),
    ],
)
def test_a_missing_judge_is_reported_before_anything_is_made(refused: Refused, judge: str, message: str) -> None:
    assert message in refused(f"isrt.judge={judge}", job="isrt")


def test_a_checkpoint_without_weights_is_refused_before_clips_are_made(refused: Refused, tmp_path: Path) -> None:
    model = tmp_path / "m"
    make_tiny(model, TinyModelConfig(layers=1), ["red", "blue"], 0)
    (model / "model.safetensors").unlink()
    assert f"model.path: {model} holds no *.safetensors weights" in refused(f"model.path={model}")
