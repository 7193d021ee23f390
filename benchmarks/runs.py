"""Whole runs of a job in processes of their own, for the benchmarks that compare them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[1] / "jobs" / "configs"
SECONDS = "wall_seconds.json"  # in the folder of a complete run


def command(job: str, config: Path, folder: Path, overrides: Sequence[str] = ()) -> list[str]:
    return [sys.executable, "-m", "jobs.cli", job, str(config), f"run.dir={folder}", "run.wandb=disabled", *overrides]


def run(job: str, config: Path, folder: Path, overrides: Sequence[str] = ()) -> None:
    """Run a job to its end, unless `folder` has a complete run.

    Raises:
        subprocess.CalledProcessError: the run failed.
    """
    if (folder / SECONDS).exists():
        return
    begin = time.monotonic()
    subprocess.run(command(job, config, folder, overrides), check=True, stdout=sys.stderr, env=environment())
    (folder / SECONDS).write_text(json.dumps(time.monotonic() - begin))


def environment() -> dict[str, str]:
    """That of a run which starts a Ray of its own."""
    return {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}


def seconds_of(folder: Path) -> float:
    return float(json.loads((folder / SECONDS).read_text()))


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics of a run's own steps."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "phase" not in row]


def accuracies(folder: Path) -> list[float]:
    """Held-out accuracy of each evaluation, in order."""
    return [row["eval/accuracy"] for row in steps_of(folder) if "eval/accuracy" in row]
