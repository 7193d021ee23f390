from __future__ import annotations

import json
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlvid.config import GrpoJobConfig, JobConfig, SftJobConfig
from rlvid.config.load import load_config
from rlvid.errors import BadClip, UserError
from rlvid.reporting import rollout_tables
from rlvid.reporting.run_folder import RunFolder


def config(**sections: Any) -> GrpoJobConfig:
    base: dict[str, Any] = {"model": {"tiny": {}}, "data": {"synthetic": {}}, "seed": 7}
    return GrpoJobConfig.model_validate(base | sections)


def rollout_row(**changes: Any) -> dict[str, Any]:
    row = {
        "step": 10,
        "sample_id": "a",
        "group_index": 0,
        "question": "What colour?",
        "answer": "red",
        "response": "red",
        "reward_total": 1.0,
        "reward_parts": '{"exact": 1.0}',
        "invalid_reason": None,
        "advantage": 0.5,
        "n_tokens": 2,
        "finish_reason": "stop",
        "weight_versions": "[[3, 0, 2]]",
        "logprob_mean": -0.1,
    }
    return row | changes


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "demo")


def start(folder: RunFolder, cfg: JobConfig | None = None, job: str = "grpo") -> None:
    """Start a run, and end it at once."""
    with folder.start(cfg or config(), job):
        pass


def with_results(folder: RunFolder, cfg: GrpoJobConfig | None = None) -> RunFolder:
    with folder.start(cfg or config(), "grpo"):
        folder.append_metrics({"step": 1})
    return folder


# --- making and taking up ---------------------------------------------------------------------------------------------


def test_new_folder_has_resolved_config_and_manifest(folder: RunFolder) -> None:
    with folder.start(config(), "grpo"):
        folder.record(model={"weights": "aa"}, data={"train": "bb"}, prompt_templates={"qwen": "cc"}, extra=1)
    assert load_config(GrpoJobConfig, folder.config_file, []).seed == 7
    manifest = json.loads(folder.manifest_file.read_text())
    assert manifest["job"] == "grpo" and manifest["seed"] == 7 and manifest["extra"] == 1
    assert manifest["versions"]["python"].startswith("3.") and manifest["versions"]["torch"]
    assert manifest["model"] == {"weights": "aa"} and manifest["prompt_templates"] == {"qwen": "cc"}
    assert not list(folder.dir.glob("*.tmp"))


def test_git_commit_is_recorded_only_inside_a_repository(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with folder.start(config(), "grpo"):
        assert folder.manifest()["git_commit"] is None


def test_another_config_is_refused_and_names_the_keys(folder: RunFolder) -> None:
    with_results(folder)
    before = folder.config_file.read_bytes()
    with pytest.raises(UserError) as caught:
        start(folder, config(seed=8, train={"batch_size": 16}))
    message = str(caught.value)
    assert "seed: was 7, now 8" in message
    assert "train.batch_size: was 32, now 16" in message
    assert "Give another run.dir" in message
    assert folder.config_file.read_bytes() == before


def test_long_list_of_differing_keys_is_shortened(folder: RunFolder) -> None:
    with_results(folder)
    other = config(
        model={"path": "m"}, video={"frames": 4, "reader": "decord"}, train={"betas": [0, 0], "batch_size": 1}
    )
    with pytest.raises(UserError, match=r"model\.tiny\.layers: was 4, now nothing"):
        start(folder, other)
    many = config(model={"path": "m"}, seed=1, grpo={"clip_low": 0.1, "clip_high": 0.1, "kl_coef": 1, "group_size": 2})
    many = GrpoJobConfig.model_validate(many.model_dump() | {"video": other.video, "train": other.train})
    with pytest.raises(UserError, match=r"and \d+ more"):
        start(folder, many)


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"steps": 500}},
        {"run": {"wandb": "disabled", "checkpoint_every": 3}},
        {"evaluate": {"every": 2}},
        {"placement": {"trainer_workers": 2}},
        {
            "deadlines": {"generate_s": 5, "sync_s": 1},
            "rollout": {"replicas": 2, "max_model_len": 99, "max_batched_tokens": 64, "max_sequences": 2},
        },
        {"rollout": {"weight_transfer": "buckets", "block_size": 16, "max_videos": 1}},
        {"train": {"micro_batch_tokens": 100, "shared_prefix": False}, "video": {"timeout_s": 1}},
    ],
)
def test_keys_that_do_not_affect_training_may_change(folder: RunFolder, changes: dict[str, Any]) -> None:
    with_results(folder)
    with folder.start(config(**changes), "grpo"):
        pass
    assert load_config(GrpoJobConfig, folder.config_file, []) == load_config_of(config(**changes), folder.dir.parent)
    assert len(folder.manifest()["resumed"]) == 1


def load_config_of(cfg: GrpoJobConfig, tmp: Path) -> GrpoJobConfig:
    from rlvid.config.load import dump_config

    (tmp / "expected.yaml").write_text(dump_config(cfg))
    return load_config(GrpoJobConfig, tmp / "expected.yaml", [])


def test_config_saved_before_a_key_existed_is_the_same_config(folder: RunFolder) -> None:
    with_results(folder)
    text = folder.config_file.read_text()
    folder.config_file.write_text(text.replace("  loss_average: token\n", ""))
    assert folder.config_file.read_text() != text
    start(folder)
    folder.config_file.write_text(text.replace("  loss_average: token\n", ""))
    with pytest.raises(UserError, match=r'grpo\.loss_average: was "token", now "sequence"'):
        start(folder, config(grpo={"loss_average": "sequence"}))


def test_another_job_is_refused(folder: RunFolder) -> None:
    with_results(folder)
    with pytest.raises(UserError, match="has a run of rlvid grpo, not of sft"):
        start(folder, SftJobConfig.model_validate(config().model_dump(exclude={"grpo", "warm_start"})), "sft")


def test_config_may_change_after_a_start_that_failed(folder: RunFolder) -> None:
    with folder.start(config(), "grpo"):
        folder.append_bad_clip(BadClip("a.mp4", "empty"))
    with folder.start(config(seed=8), "grpo"):
        assert folder.manifest()["seed"] == 8
        assert folder.read_bad_clips() == []


def test_changed_content_is_refused_on_resume(folder: RunFolder) -> None:
    with folder.start(config(), "grpo"):
        folder.record(model={"weights": "aa"}, data={"train": "bb"})
        folder.append_metrics({"step": 1})
    with folder.start(config(), "grpo"):
        folder.record(data={"train": "bb", "eval": "new"})
        with pytest.raises(UserError, match="data train, data eval changed since"):
            folder.record(data={"train": "xx", "eval": "xx"})
    assert folder.manifest()["data"] == {"train": "bb", "eval": "new"}


# --- nothing half-written ---------------------------------------------------------------------------------------------


def test_user_error_before_any_result_leaves_no_folder(folder: RunFolder) -> None:
    with pytest.raises(UserError), folder.start(config(), "grpo"):
        raise UserError("prompt longer than the context")
    assert not folder.dir.exists()


def test_user_error_keeps_logs_bad_clips_and_foreign_files(folder: RunFolder) -> None:
    with pytest.raises(UserError), folder.start(config(), "grpo"):
        (folder.logs_dir / "engine.log").write_text("the reason")
        raise UserError("engine")
    assert (folder.logs_dir / "engine.log").exists() and not folder.config_file.exists()
    with pytest.raises(UserError), folder.start(config(seed=9), "grpo"):  # and can be started again
        folder.append_bad_clip(BadClip("a.mp4", "empty"))
        raise UserError("too many bad clips")
    assert folder.bad_clips_file.exists()


def test_crash_keeps_the_folder(folder: RunFolder) -> None:
    with pytest.raises(ZeroDivisionError), folder.start(config(), "grpo"):
        raise ZeroDivisionError
    assert folder.is_run


def test_folder_with_foreign_files_is_refused_and_untouched(folder: RunFolder) -> None:
    folder.dir.mkdir(parents=True)
    (folder.dir / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"not a run folder: it has thesis\.tex"):
        start(folder)
    assert [path.name for path in folder.dir.iterdir()] == ["thesis.tex"]


def test_file_in_place_of_the_folder_is_refused(folder: RunFolder) -> None:
    folder.dir.parent.mkdir(parents=True)
    folder.dir.write_text("x")
    with pytest.raises(UserError, match="is a file; give another run"):
        start(folder)
    with pytest.raises(UserError, match="Not a directory; give another run"):
        start(RunFolder(folder.dir / "below"))


# --- lock -------------------------------------------------------------------------------------------------------------


def hold_lock(directory: Path, ready: Connection) -> None:
    with RunFolder(directory).start(config(), "grpo"):
        ready.send(os.getpid())
        signal.pause()


def test_folder_is_locked_while_a_job_runs_and_free_after_it_was_killed(folder: RunFolder) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=hold_lock, args=(folder.dir, there))
    process.start()
    try:
        assert here.poll(60)
        pid = here.recv()
        with pytest.raises(
            UserError, match=f"is in use by process {pid} on .*; wait until it ends, or give another run"
        ):
            start(RunFolder(folder.dir))
        assert folder.is_run
    finally:
        process.kill()
        process.join()
    start(RunFolder(folder.dir))


def test_lock_is_released_at_the_end(folder: RunFolder) -> None:
    with RunFolder(folder.dir).start(config(), "grpo"), pytest.raises(UserError, match="in use"):
        start(folder)
    start(folder)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_incomplete_last_line_is_skipped_and_removed(folder: RunFolder) -> None:
    with_results(folder)
    with folder.metrics_file.open("a") as file:
        file.write('{"step": 2, "rew')
    assert folder.read_metrics() == [{"step": 1}]
    with folder.start(config(), "grpo"):
        folder.append_metrics({"step": 2})
    assert folder.read_metrics() == [{"step": 1}, {"step": 2}]


def test_broken_line_in_the_middle_is_an_error(folder: RunFolder) -> None:
    with_results(folder)
    folder.metrics_file.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a JSON object: 'rubbish'"):
        folder.read_metrics()


def test_nan_is_written_as_null_and_a_row_stays_one_line(folder: RunFolder) -> None:
    with folder.start(config(), "grpo"):
        folder.append_metrics({"step": np.int64(1), "a": float("nan"), "b": np.float32("inf"), "c": "x\n\u2028\ud800"})
    assert folder.metrics_file.read_text().count("\n") == 1
    assert folder.read_metrics() == [{"step": 1, "a": None, "b": None, "c": "x\n\u2028\ud800"}]


def test_bad_clip_is_recorded_once_also_after_resume(folder: RunFolder) -> None:
    with folder.start(config(), "grpo"):
        folder.append_metrics({"step": 1})
        folder.append_bad_clip(BadClip("a.mp4", "no video stream"), sample_id="s1")
        folder.append_bad_clip(BadClip("a.mp4", "again"))
    again = RunFolder(folder.dir)
    with again.start(config(), "grpo"):
        again.append_bad_clip(BadClip("a.mp4", "again"))
        again.append_bad_clip(BadClip("b\udcff.mp4", "missing"))
    assert again.read_bad_clips() == [
        {"path": "a.mp4", "reason": "no video stream", "sample_id": "s1"},
        {"path": "b\udcff.mp4", "reason": "missing", "sample_id": None},
    ]


def test_rollouts_are_read_with_their_frames(folder: RunFolder) -> None:
    rows = [
        rollout_row(),
        rollout_row(group_index=1, reward_total=None, invalid_reason="judge: timeout", response="\ud800"),
    ]
    path = rollout_tables.write(folder.dir, 10, rows, {"a": [b"jpeg1", b"jpeg2"]})
    assert path == folder.dir / "rollouts" / "step_000010.parquet"
    read, frames = rollout_tables.read(folder.dir, 10)
    assert read[0] == rows[0]
    assert (read[1]["reward_total"], read[1]["invalid_reason"], read[1]["response"]) == (None, "judge: timeout", "?")
    assert frames == {"a": [b"jpeg1", b"jpeg2"]}
    assert rollout_tables.steps(folder.dir) == [10]


def test_rollout_row_with_other_columns_is_refused(folder: RunFolder) -> None:
    row = rollout_row(surprise=1)
    del row["answer"]
    with pytest.raises(ValueError, match=r"lacks \['answer'\] and has unknown \['surprise'\]"):
        rollout_tables.write(folder.dir, 1, [row], {})
    assert rollout_tables.steps(folder.dir) == []


def test_broken_rollout_file_is_a_readable_error(folder: RunFolder) -> None:
    path = rollout_tables.write(folder.dir, 1, [rollout_row()], {})
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"step_000001\.parquet: not a readable parquet file"):
        rollout_tables.read(folder.dir, 1)


def test_rewind_removes_later_steps(folder: RunFolder) -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "phase": "warm_start"},
        {"step": 2, "phase": "warm_start"},
        *({"step": n} for n in range(5)),
    ]
    with folder.start(config(), "grpo"):
        for row in rows:
            folder.append_metrics(row)
        for step in (2, 4):
            rollout_tables.write(folder.dir, step, [rollout_row(step=step)], {"a": [b"x"]})
        folder.rewind(3)
        assert folder.read_metrics() == rows[:-1]
        assert rollout_tables.steps(folder.dir) == [2]
        assert not (folder.dir / "frames" / "step_000004.parquet").exists()
        folder.rewind(1, phase="warm_start")
        assert folder.read_metrics() == rows[:1]
        assert rollout_tables.steps(folder.dir) == []
        folder.rewind(None)
        assert folder.read_metrics() == []


def test_run_starts_in_the_folder_of_a_start_that_failed(folder: RunFolder) -> None:
    folder.dir.mkdir(parents=True)  # by the user, so it is not ours to remove
    with pytest.raises(UserError), folder.start(config(), "grpo"):
        for name in ("model", "data", "wandb"):
            (folder.dir / name).mkdir()
        folder.report_file.write_text("page")
        raise UserError("no room")
    assert not folder.config_file.exists() and not folder.report_file.exists()
    start(folder, config(seed=8))
