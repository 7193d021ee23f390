"""A sweep over real DPO runs: interrupted, killed, resumed, with its page and its best config."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from jobs import tune as tune_job
from jobs.cli import main
from jobs.tune import Plan, Trial, _row
from rlvid.config import TuneJobConfig
from rlvid.config.load import load_config
from rlvid.errors import UserError
from rlvid.reporting.report.sweep import TrialRow
from tests.jobs.runs import LIMIT_S, ROOT, finish, wait_for
from tests.jobs.test_dpo import CONFIG

pytestmark = pytest.mark.timeout(1800)

SWEEP = """
dir: {tmp}/sweep
job: dpo
config: {tmp}/config.yaml
overrides: [evaluate.every=2]
space:
  train.lr: {{choice: [1.0e-9, 3.0e-3]}}
  dpo.beta: {{uniform: [0.1, 0.2]}}
trials: 2
scheduler: none
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG.format(tmp=tmp_path))
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(tmp=tmp_path))
    return tmp_path / "sweep.yaml"


def start(sweep: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.tune", "--config", str(sweep), *overrides]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.engine
def test_an_interrupted_and_a_killed_sweep_resume_and_report_the_best_trial(sweep: Path) -> None:
    folder = sweep.parent / "sweep"
    for how, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        before = len(list(folder.glob("trials/*/checkpoints/step_*")))
        process = start(sweep)
        wait_for(lambda n=before: len(list(folder.glob("trials/*/checkpoints/step_*"))) > n, process)  # type: ignore[misc]
        process.send_signal(how)
        _, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode == code and not (folder / "best.yaml").exists()
        assert how != signal.SIGINT or "resumes the sweep" in err

    result = finish(start(sweep))
    assert (result["trials"], result["failed"]) == (2, 0)
    trials = [p for p in (folder / "trials").iterdir() if p.is_dir()]
    assert len(trials) == 2  # no trial was started twice
    values = {p: json.loads((p / "policy.training.json").read_text())["metrics"]["eval/accuracy"] for p in trials}
    assert result["value"] == pytest.approx(max(values.values()))
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best["dpo"]["beta"] == result["best"]["dpo.beta"] and best["train"]["lr"] == result["best"]["train.lr"]
    page = (folder / "sweep.html").read_text()
    assert all(p.name in page for p in trials) and "dpo.beta" in page and page.count("<svg") == 3


def test_rows_after_the_step_at_which_tune_stopped_a_trial_are_ignored(tmp_path: Path) -> None:
    run = tmp_path / "trials" / "t1"
    run.mkdir(parents=True)
    rows = [{"step": step, "eval/accuracy": step / 100} for step in (0, 10, 20, 40)] + [{"step": 40, "loss": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = Plan("dpo", tmp_path / "c.yaml", (), "eval/accuracy", tmp_path, tmp_path, steps=40)

    def row_of(step: int) -> TrialRow:
        metrics = {"trial_id": "t1", "step": step, "time_total_s": 1.0}
        return _row(plan, SimpleNamespace(metrics=metrics, config={}, error=None, path=str(run)))

    stopped, whole = row_of(10), row_of(40)  # the job itself ran until step 40
    assert (stopped.is_stopped, stopped.step, stopped.value) == (True, 10, 0.1)
    assert (whole.is_stopped, whole.step, whole.value) == (False, 40, 0.4)


def test_a_trial_resumes_the_run_of_another_with_its_own_values(tmp_path: Path) -> None:
    """As in population based training; one of the keys is that of a list item."""
    run = tmp_path / "checkpoint" / "run"
    run.mkdir(parents=True)
    config = {"rewards": [{"kind": "exact", "weight": 1.0}], "grpo": {"kl_coef": 0.0}}
    config |= {"model": {"tiny": {}}, "data": {"synthetic": {}}, "run": {"dir": "other"}}
    for file in (tmp_path / "job.yaml", run / "config.yaml"):
        file.write_text(yaml.safe_dump(config))
    (run / "metrics.jsonl").write_text('{"step": 5, "eval/accuracy": 0.5}\n{"step": 6, "loss": 1.0}\n')
    trial = object.__new__(Trial)
    trial._plan = Plan("grpo", tmp_path / "job.yaml", ("seed=7",), "eval/accuracy", tmp_path, tmp_path, steps=40)
    trial._values, trial.run_dir = {"rewards.0.weight": 0.3, "grpo.kl_coef": 0.1}, tmp_path / "mine"
    trial.load_checkpoint(str(tmp_path / "checkpoint"))
    changed = yaml.safe_load((tmp_path / "mine" / "config.yaml").read_text())
    assert [(part["kind"], part["weight"]) for part in changed["rewards"]] == [("exact", 0.3)]
    assert changed["grpo"]["kl_coef"] == 0.1 and changed["seed"] == 7
    assert changed["run"]["dir"] == str(tmp_path / "mine") and trial._n_seen == 1
    ended = trial._end(0)  # the run was copied at its last step, so it is complete
    assert (ended["eval/accuracy"], ended["step"], ended["done"]) == (0.5, 5, True)


def test_failed_trials_are_not_best_and_a_sweep_of_failures_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG.format(tmp=tmp_path))
    cfg = load_config_of(tmp_path)
    error = RuntimeError("the job ended with 1: no room")
    (tmp_path / "sweep" / "trials" / "t1").mkdir(parents=True)
    (tmp_path / "sweep" / "trials" / "t1" / "metrics.jsonl").write_text('{"step": 2, "eval/accuracy": 0.9}\n')
    failed = SimpleNamespace(metrics={"step": 2}, config={}, error=error, path=str(tmp_path / "ray" / "t1"))
    tuner = SimpleNamespace(fit=lambda: [failed])
    monkeypatch.setattr(tune_job, "_tuner", lambda *_: tuner)
    monkeypatch.setattr(tune_job, "_make_shared", lambda *_: ())
    monkeypatch.setattr(tune_job, "start_ray", lambda: None)
    with pytest.raises(UserError, match="none of the 1 trials has finished: the job ended with 1: no room"):
        tune_job.run(cfg)
    assert not (tmp_path / "sweep" / "best.yaml").exists()


def load_config_of(folder: Path) -> TuneJobConfig:
    (folder / "sweep.yaml").write_text(SWEEP.format(tmp=folder))
    return load_config(TuneJobConfig, folder / "sweep.yaml", [])


def test_dry_run_of_a_sweep_finds_an_unknown_key_and_a_missing_config(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", str(sweep), "--dry-run"]) == 0
    assert "2 trials of rlvid dpo" in capsys.readouterr().out
    assert main(["tune", str(sweep), "--dry-run", "space={train.stesp: {choice: [1]}}"]) == 2
    assert "train.stesp" in capsys.readouterr().err
    assert main(["tune", str(sweep), "--dry-run", "config=missing.yaml"]) == 2
    assert "missing.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["space.train.stesp={choice: [1, 2]}"], "train.stesp"),
        (["space.dpo.beta={uniform: [2, 1]}"], "2.0 is not below 1.0"),
        (["space.train.lr={choice: [1], grid: [1]}"], "exactly one of"),
        (["overrides=[dpo.beta=0.3]"], "dpo.beta is in overrides and in space"),
        (["search=optuna", "space.train.lr={grid: [1.0]}"], "search=optuna has no grid"),
        (["overrides=[dpo.loss=nonsense]"], "dpo.loss"),
        (["job=isrt", "scheduler=pbt"], "scheduler=pbt copies checkpoints between steps, job=isrt has none"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused(
    sweep: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if any(o.startswith("space.") for o in overrides):  # a key with dots cannot be set by a dotted override
        config = yaml.safe_load(sweep.read_text())
        for override in (o for o in overrides if o.startswith("space.")):
            key, value = override.removeprefix("space.").split("=", 1)
            config["space"][key] = yaml.safe_load(value)
        sweep.write_text(yaml.safe_dump(config))
        overrides = [o for o in overrides if not o.startswith("space.")]
    assert main(["tune", str(sweep), *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (sweep.parent / "sweep").exists()
