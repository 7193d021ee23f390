"""The compiled operator after a process that was killed while it loaded it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

LOAD = """
from rlvid.training.comm_op import load_comm_op, comm_op_folder
from deepspeed.comm.torch import build_shm_op
load_comm_op()
assert build_shm_op() is not None  # as DeepSpeed asks for it
print("folder:", comm_op_folder(), sep="")
"""


def load(root: Path | None) -> Path:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"} | ({"TORCH_EXTENSIONS_DIR": str(root)} if root else {})
    command = [sys.executable, "-c", LOAD]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    (folder,) = [line.removeprefix("folder:") for line in done.stdout.splitlines() if line.startswith("folder:")]
    return Path(folder)


def test_what_a_killed_process_left_stops_nobody(tmp_path: Path) -> None:
    compiled = load(None)  # compiled at most once for all tests
    folder = tmp_path / "rlvid" / compiled.name
    shutil.copytree(compiled, folder)
    (left,) = [f.with_name("lock") for f in folder.glob("*/*.so")]
    left.touch()
    assert load(tmp_path) == folder
    assert not left.exists()
    assert [f.name for f in tmp_path.iterdir()] == ["rlvid"]  # DeepSpeed found it loaded
