"""Starts the ranks of a test that runs as a program on several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_ranks(
    module: str, world_size: int, folder: Path, *words: str, environment: Mapping[str, str] = os.environ
) -> Any:
    """Run `python -m MODULE RANK WORLD_SIZE FOLDER WORD ...` for each rank; the JSON that rank 0 prints last."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(world_size), str(folder), *words],
            cwd=ROOT,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=(folder / f"rank-{world_size}-{rank}.log").open("w"),
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [rank.communicate(timeout=900)[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), (folder / f"rank-{world_size}-0.log").read_text()[-2000:]
    return json.loads(outputs[0].splitlines()[-1])
