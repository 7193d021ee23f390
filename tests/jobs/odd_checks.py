"""Checks that fail in every way a check can. Run by `rlvid doctor` as `python -m tests.jobs.odd_checks NAME`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from jobs.doctor import Check, Finding, print_findings
from rlvid.errors import UserError


def fine(value: str = "g") -> list[Finding]:
    return [Finding("fine", "ok", value)]


def raises() -> list[Finding]:
    raise ValueError("shapes differ\nand so on")


def refuses() -> list[Finding]:
    raise UserError("no room: make some")


def crashes() -> list[Finding]:
    print("about to crash", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return []


def leaves() -> list[Finding]:
    sys.exit(3)


def hangs() -> list[Finding]:
    """Hangs, and so does a process that it started."""
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(os.environ["PID_FILE"]).write_text(str(grandchild.pid))
    time.sleep(60)
    return []


own_process = partial(Check, timeout_s=30.0, module="tests.jobs.odd_checks")
CHECKS = {
    "d": own_process(raises),
    "e": own_process(crashes),
    "f": own_process(leaves, needed=False),
    "g": own_process(fine),
    "a": Check(raises),
    "b": Check(partial(fine, "b")),
    "c": Check(refuses, fix="tidy up"),
}
HANGS = {"slow": own_process(hangs, timeout_s=6.0)}

if __name__ == "__main__":
    print_findings(sys.argv[1], {**CHECKS, **HANGS}[sys.argv[1]])
