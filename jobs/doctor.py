"""`rlvid doctor`: reports what is installed, what works, and how to fix what does not.

A check that raises, crashes or hangs becomes a finding and does not affect other checks: checks that import native code
or decode video run in processes of their own (`python -m jobs.doctor NAME`), each with a time limit.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from rich.text import Text

from jobs.doctor_checks import CHECKS, Check, Finding
from rlvid.errors import BadClip, UserError
from rlvid.reporting.console import Console

MAX_PROCESSES = 4
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(as_json: bool) -> None:
    """Run all checks; print a table, or with `as_json` one JSON list of findings.

    Raises:
        UserError: something that rlvid needs does not work.
    """
    with Console() as console:
        if not as_json:
            console.phase("rlvid doctor", steps=len(CHECKS))
        findings = run_checks(CHECKS, console)
        if as_json:
            print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
        else:
            console.table(("", "check", "what was found, and how to fix it"), map(_row, findings))
    if broken := [f.check for f in findings if f.status == "fail" and f.needed]:
        raise UserError(f"rlvid does not work here: {', '.join(broken)}")


def run_checks(checks: dict[str, Check], console: Console | None = None) -> list[Finding]:
    """Run the checks in parallel; return their findings in the order of `checks`."""
    running: list[subprocess.Popen[str]] = []

    def run(name: str) -> list[Finding]:
        check = checks[name]
        findings = run_check(name, check) if check.timeout_s is None else _in_process(name, check, running)
        if console is not None:
            console.working(name)
        return findings

    with ThreadPoolExecutor(min(MAX_PROCESSES, os.cpu_count() or 1)) as pool:
        try:
            return [finding for findings in pool.map(run, checks) for finding in findings]
        finally:  # after Ctrl-C too, no process is left running
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                _kill(process)


def run_check(name: str, check: Check) -> list[Finding]:
    """Run a check in this process. An error becomes a finding."""
    try:
        return check.run()
    except UserError as error:
        return check.failed(name, str(error))
    except BadClip as error:
        return check.failed(name, error.reason)
    except Exception as error:
        return check.failed(name, f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}")


def _in_process(name: str, check: Check, running: list[subprocess.Popen[str]]) -> list[Finding]:
    process = subprocess.Popen(
        [sys.executable, "-m", check.module, name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that processes that it starts can be stopped with it
    )
    running.append(process)
    try:
        lines = process.communicate(timeout=check.timeout_s)[0].strip().splitlines()
    except subprocess.TimeoutExpired:
        return check.failed(name, f"did not end within {check.timeout_s:g} s and was stopped")
    finally:
        _kill(process)
    if code := process.returncode:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return check.failed(name, ": ".join([f"its process ended with {how}", *lines[-1:]]))
    return [Finding(**row) for row in json.loads(lines[-1])]


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError, PermissionError):  # all processes of the group have ended
        os.killpg(process.pid, signal.SIGKILL)


def _row(finding: Finding) -> tuple[Text, str, str]:
    fix = f"\n→ {finding.fix}" if finding.fix else ""
    is_optional = finding.status == "fail" and not finding.needed
    value = finding.value + (" (not needed)" if is_optional else "")
    return Text(finding.status, style=STYLES[finding.status]), finding.check, value + fix


def print_findings(name: str, check: Check) -> None:
    """Main function of a check's own process: print its findings as the last line of stdout."""
    findings = run_check(name, check)
    print(json.dumps([dataclasses.asdict(finding) for finding in findings]), flush=True)
    os._exit(0)  # do not wait for libraries that hang at exit


if __name__ == "__main__":
    print_findings(sys.argv[1], CHECKS[sys.argv[1]])
