from __future__ import annotations

import json
import sys
from subprocess import run


def test_the_same_program_runs_small_on_cpu() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_trainer", "--device", "cpu", "--small", "--rounds", "2"]
    done = run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    *table, last = done.stdout.splitlines()
    found = json.loads(last)
    assert found["max_logprob_diff"] < 1e-5
    assert found["small_300_s"] > 0 and found["small_300_ckpt_lora_s"] > 0
    assert found["small_300_ratio"] > 1  # the prompt once instead of eight times
    assert any("matrix products" in line for line in table)
