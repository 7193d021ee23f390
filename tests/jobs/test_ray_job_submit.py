"""A job by `ray job submit`, on a local cluster that asks for a token."""

from __future__ import annotations

import json
import os
import random
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

# What a person submits, made small. The run folder is absolute, because the job runs in a copy of the tree.
JOB = (
    "python -m jobs.grpo --config jobs/configs/demo.yaml run.dir={RUN} seed=3 data.cache_dir={RUN}-frames "
    "data.synthetic.train=8 data.synthetic.eval=4 warm_start.steps=1 warm_start.batch_size=2 "
    "train.steps=1 train.batch_size=2 grpo.group_size=2 rollout.max_tokens=4 evaluate.every=1"
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]


@dataclass(frozen=True)
class Cluster:
    dashboard: str
    token: str

    @property
    def environment(self) -> dict[str, str]:
        """This process's variables without what an outer Ray or another test may have set, and with this cluster's.

        Jobs run with the python that is first in the head's PATH.
        """
        outer = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        return outer | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_USAGE_STATS_ENABLED": "0",
            "NO_COLOR": "1",
        }

    def submit(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["ray", "job", "submit", "--working-dir", ".", "--", *shlex.split(command)],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=500,
        )

    def submit_when_ready(self, command: str) -> subprocess.CompletedProcess[str]:
        """The dashboard answers some seconds after the head has started, the job agent some seconds after that."""
        deadline_s = time.monotonic() + 90
        while True:
            result = self.submit(command)
            is_early = (
                "No available agent to submit job" in result.stdout or "Failed to connect to Ray" in result.stdout
            )
            if result.returncode == 0 or not is_early or time.monotonic() > deadline_s:
                return result
            time.sleep(1)


def free_ports(n: int) -> list[int]:
    """Ports below the ephemeral range: Ray's other services, started earlier, take any free port of that range."""
    ports: list[int] = []
    for port in random.sample(range(12_000, 32_000), 200):
        try:
            socket.create_server(("", port)).close()
        except OSError:
            continue
        ports.append(port)
        if len(ports) == n:
            return ports
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    gcs, dashboard, agent_http, agent_grpc, client = free_ports(5)
    # not pytest's folder: the path of a Unix socket must stay under 108 bytes
    folder = Path(tempfile.mkdtemp(prefix="rlvid-", dir="/tmp"))
    running = Cluster(dashboard=f"http://127.0.0.1:{dashboard}", token=secrets.token_hex(32))
    log = folder / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen(
            [
                *("ray", "start", "--head", "--block"),
                f"--port={gcs}",
                f"--dashboard-port={dashboard}",
                f"--dashboard-agent-listen-port={agent_http}",
                f"--dashboard-agent-grpc-port={agent_grpc}",
                f"--ray-client-server-port={client}",
                *("--min-worker-port=0", "--max-worker-port=0"),  # any free port
                "--num-cpus=2",
                "--object-store-memory=500000000",
                f"--temp-dir={folder / 'ray'}",
            ],
            env=running.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield running
    finally:
        descendants = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        head.terminate()
        try:
            head.wait(timeout=60)
        except subprocess.TimeoutExpired:
            head.kill()
        for process in psutil.wait_procs(descendants, timeout=30)[1]:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_submitted_code_is_the_working_tree_without_venv_and_runs(cluster: Cluster) -> None:
    result = cluster.submit_when_ready(
        """python -c 'import json, os, sys; print(json.dumps({"python": sys.executable, "files": os.listdir(".")}))'"""
    )
    assert result.returncode == 0, result.stdout
    job = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
    assert Path(job["python"]) == BIN / "python"
    assert {"jobs", "actors", "rlvid", "pyproject.toml"} <= set(job["files"])
    assert not {".venv", ".git", "runs", "wandb"} & set(job["files"])


def test_submission_without_the_right_token_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    stranger = replace(cluster, token=secrets.token_hex(32))
    result = stranger.submit_when_ready(f"touch {marker}")
    assert result.returncode != 0
    assert "Invalid authentication token" in result.stdout
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(f"{cluster.dashboard}/api/jobs/", timeout=30)
    assert refusal.value.code == 401
    assert not marker.exists()


def test_grpo_by_ray_job_submit(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = cluster.submit_when_ready(JOB.format(RUN=run))
    assert result.returncode == 0, result.stdout
    summary = json.loads(next(line for line in reversed(result.stdout.splitlines()) if line.startswith('{"accuracy')))
    assert summary["steps"] == 1
    assert Path(summary["report"]) == run / "report.html"
    assert (run / "report.html").exists()
    assert (run / "metrics.jsonl").read_text(encoding="utf-8").strip()
