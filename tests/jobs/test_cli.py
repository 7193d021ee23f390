from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from jobs import cli
from rlvid.config import GrpoJobConfig, JobConfig
from rlvid.config.load import load_config
from rlvid.errors import UserError
from rlvid.reporting.run_folder import RunFolder

CONFIG = """\
model:
  tiny: {layers: 2}
data:
  synthetic: {train: 16}
"""


@pytest.fixture
def config_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "job.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[JobConfig]]:
    """Replaces `jobs.grpo`; returns the list of configs it is run with."""

    def install(result: dict[str, Any] | BaseException | None = None, name: str = "jobs.grpo") -> list[JobConfig]:
        seen: list[JobConfig] = []

        def run(cfg: JobConfig, **flags: bool) -> dict[str, Any]:
            seen.append(cfg)
            if isinstance(result, BaseException):
                raise result
            return result or {}

        module = ModuleType(name)
        module.__dict__["run"] = run
        monkeypatch.setitem(sys.modules, name, module)
        return seen

    return install


def started(config_path: Path) -> RunFolder:
    folder = RunFolder(config_path.parent / "runs" / "run")
    with folder.start(load_config(GrpoJobConfig, config_path, []), "grpo"):
        pass
    return folder


# --- jobs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "grpo job.yaml train.steps=7 seed=3",
        "grpo --config job.yaml train.steps=7 seed=3",
        "grpo train.steps=7 --config job.yaml seed=3",
        "grpo train.steps=7 seed=3 --config=job.yaml",
    ],
)
def test_job_runs_with_the_resolved_config_and_prints_its_result_last(
    config_path: Path, job: Callable[..., list[JobConfig]], capsys: pytest.CaptureFixture[str], line: str
) -> None:
    seen = job({"accuracy_after": 0.9, "report": Path("runs/run/report.html"), "x": float("nan")})
    assert cli.main(line.split()) == 0
    assert (seen[0].train.steps, seen[0].seed) == (7, 3)
    assert isinstance(seen[0], GrpoJobConfig)
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == {"accuracy_after": 0.9, "report": "runs/run/report.html", "x": None}


@pytest.mark.parametrize(("command", "module"), [("sft", "jobs.sft"), ("eval", "jobs.evaluate")])
def test_other_jobs_run_their_module(
    config_path: Path, job: Callable[..., list[JobConfig]], command: str, module: str
) -> None:
    seen = job({}, name=module)
    assert cli.main([command, "job.yaml"]) == 0
    assert len(seen) == 1


def test_module_form_is_the_same_command(
    config_path: Path, job: Callable[..., list[JobConfig]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = job({})
    monkeypatch.setattr(sys, "argv", ["jobs/grpo.py", "--config", "job.yaml", "seed=5"])
    with pytest.raises(SystemExit) as end:
        cli.job_main("grpo")
    assert end.value.code == 0 and seen[0].seed == 5


def test_dry_run_prints_a_config_that_can_be_used_and_the_placement(
    config_path: Path,
    job: Callable[..., list[JobConfig]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = job({})
    assert cli.main(["grpo", "job.yaml", "rollout.replicas=2", "--dry-run", "seed=4"]) == 0
    out = capsys.readouterr().out
    assert "# trainer-0 " in out and "# generator-1 " in out and "# generator-2 " not in out
    assert yaml.safe_load(out)["seed"] == 4
    (config_path.parent / "resolved.yaml").write_text(out)
    resolved = load_config(GrpoJobConfig, config_path.parent / "resolved.yaml", [])
    assert resolved.rollout.replicas == 2 and resolved.model.tiny is not None and resolved.model.tiny.layers == 2
    assert seen == [] and not (config_path.parent / "runs").exists()


@pytest.mark.parametrize("encoding", ["ascii", "gbk"])
def test_dry_run_prints_in_every_locale(tmp_path: Path, encoding: str) -> None:
    """Fault 25. What goes into a file or a pipe is UTF-8, as configs are."""
    file = tmp_path / "job.yaml"
    file.write_text("model: {tiny: {}}\ndata: {synthetic: {}, suffix: 'ünï – 😀'}\n", encoding="utf-8")
    command = [sys.executable, "-m", "jobs.cli", "sft", str(file), "--dry-run"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout.decode("utf-8"))["data"]["suffix"] == "ünï – 😀"


def test_missing_inputs_are_reported_before_anything_is_made(
    config_path: Path, job: Callable[..., list[JobConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault 21: also in a dry run, each with its own key."""
    seen = job({})
    for flags in ([], ["--dry-run"]):
        assert cli.main(["grpo", "job.yaml", "model.path=nowhere", "data.eval=none.jsonl", *flags]) == 2
        assert capsys.readouterr().err.splitlines() == [
            "rlvid: error: model.path: nowhere does not exist; expected a checkpoint folder with a config.json",
            "  data.eval: none.jsonl does not exist; expected a file",
        ]
    assert seen == [] and not (config_path.parent / "runs").exists()


# --- errors -----------------------------------------------------------------------------------------------------------


def test_mistake_in_the_config_gives_one_message_and_exit_code_2(
    config_path: Path, job: Callable[..., list[JobConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    seen = job({})
    assert cli.main(["grpo", "job.yaml", "train.stepps=3"]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        'rlvid: error: override "train.stepps=3": unknown key train.stepps; did you mean train.steps?\n'
    )
    assert captured.out == "" and seen == []
    assert not (config_path.parent / "runs").exists()


def test_user_error_of_a_job_has_no_traceback(
    config_path: Path, job: Callable[..., list[JobConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    job(UserError("data/train.jsonl:3: the answer is missing"))
    assert cli.main(["grpo", "job.yaml"]) == 2
    assert capsys.readouterr().err == "rlvid: error: data/train.jsonl:3: the answer is missing\n"


def test_user_error_from_a_ray_task_is_printed_without_the_workers_traceback(
    config_path: Path, job: Callable[..., list[JobConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    from ray.exceptions import RayTaskError

    error = RayTaskError("encode", "Traceback (most recent call last):\n  ...", UserError("prompt of a: too long"))
    job(error.as_instanceof_cause())
    assert cli.main(["grpo", "job.yaml"]) == 2
    assert capsys.readouterr().err == "rlvid: error: prompt of a: too long\n"


def test_crash_is_written_to_the_log_of_the_run_with_one_line_on_stderr(
    config_path: Path, job: Callable[..., list[JobConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = started(config_path)
    job(ValueError("shapes differ\nand so on"))
    assert cli.main(["grpo", "job.yaml"]) == 1
    log = Path("runs/run/logs/error.log")
    assert capsys.readouterr().err == f"rlvid: failed: ValueError: shapes differ (traceback in {log})\n"
    assert "Traceback (most recent call last)" in (folder.logs_dir / "error.log").read_text()


def test_crash_before_there_is_a_run_folder_is_printed_on_stderr(
    config_path: Path, job: Callable[..., list[JobConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    job(ValueError())
    assert cli.main(["grpo", "job.yaml"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith("rlvid: failed: ValueError: \n")
    assert not (config_path.parent / "runs").exists()


def test_interrupt_says_where_it_resumes(
    config_path: Path, job: Callable[..., list[JobConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    job(KeyboardInterrupt())
    assert cli.main(["grpo", "job.yaml"]) == 130
    assert capsys.readouterr().err == (
        "rlvid: interrupted; the same command starts again: runs/run has no checkpoint yet\n"
    )
    with started(config_path).checkpoints.writing(12, keep=1):
        pass
    assert cli.main(["grpo", "job.yaml"]) == 130
    assert capsys.readouterr().err == "rlvid: interrupted; the same command resumes after step 12 in runs/run\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("grppo job.yaml", "invalid choice: 'grppo'"),
        ("grpo", "grpo: CONFIG.yaml comes first, for example jobs/configs/demo.yaml"),
        ("grpo train.steps=3", "CONFIG.yaml comes first"),
        ("grpo job.yaml --fast", "unrecognized arguments: --fast"),
        ("report runs/run more", "unrecognized arguments: more"),
        ("synth", "the following arguments are required: OUT_DIR"),
        ("synth out --seed x", "argument --seed: invalid int value: 'x'"),
    ],
)
def test_wrong_command_lines_end_with_exit_code_2(
    config_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(line.split())
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_config_file_is_named(config_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["grpo", "jop.yaml"]) == 2
    assert capsys.readouterr().err == "rlvid: error: jop.yaml: no such config file; did you mean job.yaml?\n"


# --- synth, report, help ----------------------------------------------------------------------------------------------


def test_synth_writes_both_splits(config_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "synth out --train 2 --eval 1 --frames 4 --size 28 --kinds colour,shape --seed 3"
    assert cli.main(line.split()) == 0
    train, _, held_out, _ = (Path(line) for line in capsys.readouterr().out.splitlines())
    assert len(train.read_text().splitlines()) == 2 and len(held_out.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--train 0", "--train 0: train must be at least 1, got 0"),
        ("--train many", "--train many: train must be a whole number, got 'many'"),
        ("--kinds colour,sahpe", "got 'sahpe'; did you mean shape?"),
        ("--seed -1", "--seed must be at least 0, got -1"),
    ],
)
def test_wrong_synth_options_are_readable(
    config_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    assert cli.main(["synth", "out", *options.split()]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1
    assert not (config_path.parent / "out").exists()


def test_report_writes_the_page(config_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = started(config_path)
    assert cli.main(["report", "runs/run"]) == 0
    assert capsys.readouterr().out == "runs/run/report.html\n"
    assert folder.report_file.is_file()
    assert cli.main(["report", "runs"]) == 2
    assert capsys.readouterr().err == "rlvid: error: runs is not a run folder: it has no config.yaml\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from jobs import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'wandb', 'rich', 'pyarrow', 'yaml'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    for arguments in (["--help"], ["grpo", "--help"], ["--version"]):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
        assert done.returncode == 0, done.stderr
        assert "rlvid" in done.stdout


def test_data_convert_reports_the_numbers_of_rows_and_of_refused_items(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlvid.rewards.videoscore import DIMS

    (tmp_path / "v.mp4").write_bytes(b"not looked into here")
    good = {"id": "a1", "video": "v.mp4", "text_prompt": "a dog", "labels": dict.fromkeys(DIMS, 2)}
    other = {**good, "id": "a2", "text_prompt": "a cat"}
    items = [good, other, {**good, "id": "a3", "labels": {}}]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    arguments = ["data", "convert", str(tmp_path / "items.jsonl"), str(tmp_path / "out"), "--from", "videofeedback"]
    arguments += ["--mismatched", "0.5"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "manifest.jsonl: 3 rows; 1 item refused" in printed and "refused.jsonl" in printed
    assert cli.main([*arguments, "--source", "real"]) == 2
    assert "no item left" in capsys.readouterr().err


def test_score_of_a_folder_without_a_reward_model_says_what_to_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["score", str(tmp_path), "a.mp4", "--prompt", "a dog"]) == 2
    assert "rlvid reward-model" in capsys.readouterr().err
    assert not (tmp_path / "scores.jsonl").exists()
