"""How a driver starts Ray, and what it says where Ray does not start."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from actors import actor_process
from actors.actor_process import start_ray
from actors.placement import plan, require_room
from rlvid.config import GrpoJobConfig
from rlvid.errors import UserError

START = "from actors.actor_process import start_ray\nstart_ray()\n"


def driver(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program as a driver of its own; an empty value unsets a variable."""
    own = {name: value for name, value in (os.environ | environment).items() if value}
    return subprocess.run([sys.executable, "-c", program], env=own, capture_output=True, text=True, timeout=120)


def failing(monkeypatch: pytest.MonkeyPatch, times: int) -> list[dict[str, Any]]:
    """Ray does not start the first `times` times, as under load."""
    calls: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        calls.append(options)
        if len(calls) <= times:
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(actor_process.ray, "init", init)
    return calls


def test_a_start_under_load_is_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = failing(monkeypatch, times=1)
    start_ray()
    assert [options["address"] for options in calls] == ["local", "local"]


def test_a_second_failure_names_rays_cause_and_is_no_error_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = failing(monkeypatch, times=2)
    with pytest.raises(
        RuntimeError, match="did not start in two tries: The current node timed out during startup.*logs"
    ):
        start_ray()
    assert len(calls) == 2


def test_a_home_that_cannot_be_written_names_the_fix() -> None:
    result = driver(START, HOME="/proc/nohome", RAY_ADDRESS="", RAY_AUTH_TOKEN="", RAY_AUTH_MODE="")
    assert "UserError: Ray does not start here: " in result.stderr
    assert "set HOME to a folder that can be written, or RAY_AUTH_TOKEN" in result.stderr


@pytest.mark.engine
@pytest.mark.timeout(180)
def test_a_cluster_with_a_token_and_a_client_without_name_the_setting() -> None:
    head = (
        "import ray, sys; ray.init(address='local', num_cpus=1, include_dashboard=False, log_to_driver=False); "
        "print(ray.get_runtime_context().gcs_address, flush=True); sys.stdin.read()"
    )
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 40}
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(
        [sys.executable, "-c", head], env=own | token, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as cluster:
        assert cluster.stdout is not None and cluster.stdin is not None
        address = cluster.stdout.readline().strip()
        result = driver(START, RAY_ADDRESS=address, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="")
        cluster.stdin.close()
    assert f"UserError: no Ray cluster answers at RAY_ADDRESS={address}" in result.stderr
    assert "RAY_AUTH_MODE=token here (now: disabled)" in result.stderr
    assert "InvalidAuthToken" in result.stderr  # Ray's own cause


@pytest.mark.engine
def test_sigterm_interrupts_without_a_stack_dump() -> None:
    program = START + "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)"
    result = driver(program, RAY_ADDRESS="")
    assert "KeyboardInterrupt" in result.stderr and "SIGTERM received" not in result.stderr


def test_missing_cpus_name_the_keys_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("actors.placement.ray.cluster_resources", lambda: {"CPU": 2.0})
    cfg = GrpoJobConfig.model_validate(
        {"model": {"tiny": {}}, "data": {"synthetic": {}}, "placement": {"reference_cpus": 1.5}}
    )
    with pytest.raises(
        UserError, match=r"CPU, the cluster has 2: lower some of .*placement.reference_cpus=1.5 \(of 1\)"
    ):
        require_room(plan(cfg, ("trainer", "generator", "reference")), cfg.placement)
