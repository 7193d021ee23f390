"""Runs of jobs in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LIMIT_S = 1500  # a run takes one minute alone, and ten on a busy machine that is half as fast


def start(job: str, config: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", f"jobs.{job}", "--config", str(config), *overrides]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The result of a run that ends well."""
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, out + err
    assert "Setting accelerator" not in err, "DeepSpeed guessed its device in the driver"
    return dict(json.loads(out.splitlines()[-1]))


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail("".join(filter(None, process.communicate())))
        time.sleep(0.05)
