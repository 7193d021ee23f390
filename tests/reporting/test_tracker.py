from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from rlvid.config import GrpoJobConfig, RunConfig
from rlvid.reporting.run_folder import RunFolder
from rlvid.reporting.tracker import Tracker

DISABLED = RunConfig(wandb="disabled")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("rlvid.reporting.tracker.monotonic", clock)
    return clock


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    cfg = GrpoJobConfig.model_validate({"model": {"tiny": {}}, "data": {"synthetic": {}}})
    with RunFolder(tmp_path / "run").start(cfg, "grpo") as folder:
        yield folder


class FakeWandb:
    """A fake of the wandb module; `broken` names the calls that fail."""

    def __init__(self, broken: tuple[str, ...] = (), api_key: str | None = "k") -> None:
        self.broken = broken
        self.api_key = api_key
        self.service_has_failed_run = False
        self.inits: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.is_finished = False

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def setup(self, settings: dict[str, Any]) -> None:
        pass

    def login(self, prompt: bool, **arguments: Any) -> bool:
        assert not prompt
        return self.api_key is not None

    def teardown(self) -> None:
        self.service_has_failed_run = False

    def init(self, **arguments: Any) -> FakeWandb:
        assert not self.service_has_failed_run, "run ID is in use"  # as wandb 0.31 does
        self.inits.append(arguments)
        if f"init {arguments['mode']}" in self.broken:
            self.service_has_failed_run = True
            raise ConnectionError("server is away\nand more lines")
        return self

    def define_metric(self, name: str, **arguments: Any) -> None:
        pass

    def log(self, row: dict[str, Any]) -> None:
        if "log" in self.broken:
            raise BrokenPipeError("service ended")
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.is_finished = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_row_has_step_time_and_plain_numbers(folder: RunFolder, clock: Clock) -> None:
    tracker = Tracker(folder, DISABLED)
    clock.now += 1.5
    tracker.log(1, {"reward/mean": np.float32(0.5), "policy/kl": torch.tensor(2.0), "eval/n": 3, "x": float("nan")})
    assert folder.read_metrics() == [
        {"step": 1, "time_s": 1.5, "reward/mean": 0.5, "policy/kl": 2.0, "eval/n": 3.0, "x": None}
    ]


def test_disabled_never_imports_wandb(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    with Tracker(folder, DISABLED) as tracker:
        tracker.log(1, {})
    assert "wandb_id" not in folder.manifest()


def test_time_continues_after_resume(folder: RunFolder, clock: Clock) -> None:
    first = Tracker(folder, DISABLED)
    for step in (1, 2, 3):
        clock.now += 10
        first.log(step, {})
    folder.rewind(2)
    clock.now = 5000.0
    second = Tracker(folder, DISABLED)
    clock.now += 7
    second.log(3, {})
    assert [(row["step"], row["time_s"]) for row in folder.read_metrics()] == [(1, 10.0), (2, 20.0), (3, 27.0)]


def test_warm_start_rows_have_their_phase_and_their_own_step(folder: RunFolder, fake: FakeWandb, clock: Clock) -> None:
    tracker = Tracker(folder, RunConfig())
    tracker.log(4, {"warm_start/loss": 2.0, "train/lr": 0.1}, phase="warm_start")
    tracker.log(1, {"reward/mean": 0.5})
    assert [row.get("phase") for row in folder.read_metrics()] == ["warm_start", None]
    assert fake.rows == [
        {"warm_start/time_s": 0.0, "warm_start/loss": 2.0, "warm_start/train/lr": 0.1, "warm_start/step": 4},
        {"time_s": 0.0, "reward/mean": 0.5, "step": 1},
    ]


def test_wandb_gets_config_name_and_the_same_id_after_resume(folder: RunFolder, fake: FakeWandb) -> None:
    for _ in range(2):
        with Tracker(folder, RunConfig(project="p")):
            pass
    assert fake.is_finished
    first, second = fake.inits
    assert first["id"] == second["id"] == folder.manifest()["wandb_id"]
    assert (first["mode"], first["project"], first["name"]) == ("offline", "p", "run")
    assert first["config"] == folder.config() and first["config"]["data"]["synthetic"]
    assert first["dir"] == str(folder.dir)


def test_failing_login_falls_back_to_offline_with_one_message(
    folder: RunFolder, fake: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    fake.broken = ("init online",)
    with caplog.at_level(logging.ERROR), Tracker(folder, RunConfig(wandb="online")) as tracker:
        tracker.log(1, {"a": 1.0})
    assert [arguments["mode"] for arguments in fake.inits] == ["online", "offline"]
    assert [record.getMessage() for record in caplog.records] == [
        "Weights & Biases login failed, the run continues without it: server is away",
        f"Weights & Biases logs offline instead; upload it later with `wandb sync {folder.dir}/wandb/offline-run-*`",
    ]
    assert folder.read_metrics()[0]["wandb/errors"] == 1


def test_missing_api_key_does_not_prompt(folder: RunFolder, fake: FakeWandb, caplog: pytest.LogCaptureFixture) -> None:
    fake.api_key = None
    with Tracker(folder, RunConfig(wandb="online")):
        pass
    assert [arguments["mode"] for arguments in fake.inits] == ["offline"]
    assert "run `wandb login` or set WANDB_API_KEY" in caplog.text


def test_failures_while_logging_are_counted_and_logged_once(
    folder: RunFolder, fake: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    fake.broken = ("log",)
    with Tracker(folder, RunConfig()) as tracker:
        for step in range(3):
            tracker.log(step, {"a": 1.0})
    assert tracker.wandb_errors == 3
    assert len(caplog.records) == 1
    assert [row.get("wandb/errors") for row in folder.read_metrics()] == [None, 1, 2]


def test_real_offline_run_is_silent_and_stays_in_the_run_folder(
    folder: RunFolder, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setitem(sys.modules, "openai", ModuleType("openai"))  # vLLM imports it, and wandb has a word about it
    with Tracker(folder, RunConfig()) as tracker:
        tracker.log(1, {"a": float("nan")})
    monkeypatch.setenv(
        "WANDB_CACHE_DIR", os.environ["WANDB_CACHE_DIR"]
    )  # set by the tracker, taken back after the test
    assert tracker.wandb_errors == 0
    assert list(folder.dir.glob("wandb/offline-run-*/*.wandb"))
    assert not list((tmp_path / "home").rglob("*.log"))
    assert capfd.readouterr() == ("", "")
