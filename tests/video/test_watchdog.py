from __future__ import annotations

import subprocess
import sys

CODE = """
import time
from rlvid.video.watchdog import ends_process_after
with ends_process_after({limit}):
    time.sleep({block})
time.sleep(0.3)
print("alive")
"""


def run(limit: float, block: float) -> subprocess.CompletedProcess[str]:
    code = CODE.format(limit=limit, block=block)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)


def test_process_that_hangs_is_ended_with_its_stack() -> None:
    ended = run(limit=0.2, block=20.0)
    assert ended.returncode != 0 and ended.stdout == ""
    assert "Timeout" in ended.stderr and "line 5" in ended.stderr


def test_block_left_in_time_costs_nothing() -> None:
    assert run(limit=0.2, block=0.0).stdout == "alive\n"
