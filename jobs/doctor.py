"""`rlvid doctor`: what is installed, what works, and how to mend what does not.

A check gives findings. One that raises, crashes, hangs or ends its process is a finding too (`fail`, with the reason)
and disturbs no other: whatever imports native code or decodes runs in a process of its own, with a deadline.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from rich.text import Text

from rlvid import installation
from rlvid.errors import BadClip, UserError
from rlvid.installation import GIB, INSTALL, Finding
from rlvid.reporting import safe_json
from rlvid.reporting.console import Console
from rlvid.video import reader_check

IMPORT_S = 120.0  # the first import of vLLM after an installation reads gigabytes
DECODE_S = 30.0
RAY_S = 90.0
_MOST_AT_A_TIME = 4
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Check:
    """Something to try. `run` is a function of a module, so that a child process finds it by its name.

    Args:
        mend: what to do when it raises or its process ends.
        timeout_s: it runs in a process of its own, for so long at most; without one it runs here.
        needed: rlvid does not work where it fails.
    """

    name: str
    run: Callable[..., list[Finding]]
    args: tuple[Any, ...] = ()
    mend: str = INSTALL
    timeout_s: float | None = None
    needed: bool = True

    def failed(self, reason: str) -> list[Finding]:
        return [Finding(self.name, "fail", reason, self.mend, self.needed)]


def doctor(as_json: bool) -> None:
    """Run all checks; print a table, or with `as_json` one JSON list of findings.

    Raises:
        UserError: something that rlvid needs does not work.
    """
    with Console() as console:
        all_checks = checks()
        if not as_json:
            console.phase("rlvid doctor", steps=len(all_checks))
        findings = examine(all_checks, console.working)
        if as_json:
            print(safe_json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
        else:
            console.table(("", "check", "what was found, and how to mend it"), map(_row, findings))
    broken = [finding.check for finding in findings if finding.status == "fail" and finding.needed]
    if broken:
        raise UserError(f"rlvid does not work here: {', '.join(broken)}")


def checks() -> list[Check]:
    """All checks, in the order of the table."""
    codecs = [
        Check(f"codec {codec}", _codec, (codec,), "clips of this codec will be bad clips", DECODE_S, codec == "h264")
        for codec in reader_check.ENCODERS
    ]
    default = reader_check.READERS[0]
    ray_mend = (
        "start that cluster (cluster/README.md), or unset RAY_ADDRESS"
        if "RAY_ADDRESS" in os.environ
        else "Ray's own words are in /tmp/ray/session_latest/logs; `ray stop` ends an old cluster of this machine"
    )
    readers = [
        Check(f"reader {name}", _reader, (name,), f"do not use video.reader={name}", DECODE_S, needed=False)
        if name != default
        else Check(f"reader {name}", _reader, (name,), timeout_s=DECODE_S)
        for name in reader_check.READERS
    ]
    return [
        Check("Python", installation.python_and_platform),
        Check("packages", installation.packages),
        Check("GPU", installation.gpus, timeout_s=IMPORT_S),
        Check("shared memory", installation.shared_memory, mend="", needed=False),
        Check("disk", installation.disk, mend="set data.cache_dir and run.dir to other places"),
        Check("compiler", _compiler, mend="install g++, or set CXX", timeout_s=DECODE_S),
        Check("DeepSpeed", _deepspeed, timeout_s=IMPORT_S),
        Check("Ray", _ray, mend=ray_mend, timeout_s=RAY_S),
        *readers,
        *codecs,
        Check("model families", installation.model_families, timeout_s=IMPORT_S),
        Check("video processor", installation.torchvision, timeout_s=IMPORT_S),
        Check("rollout: vllm", installation.rollout_engines, timeout_s=IMPORT_S),
        Check("LoRA", installation.lora, timeout_s=IMPORT_S, needed=False),
    ]


def _row(finding: Finding) -> tuple[Text, str, str]:
    mend = f"\n→ {finding.mend}" if finding.mend else ""
    is_optional = finding.status == "fail" and not finding.needed
    value = finding.value + (" (not needed)" if is_optional else "")
    return Text(finding.status, style=_STYLES[finding.status]), finding.check, value + mend


# --- checks that are not those of one process -------------------------------------------------------------------------


def _compiler() -> list[Finding]:
    """DeepSpeed compiles an operator against Python's headers, with ninja."""
    from actors.actor_process import require_compiler

    require_compiler()
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory(prefix="rlvid-") as folder:
        source = Path(folder) / "reader_check.cpp"
        source.write_text(
            "#include <Python.h>\n#include <vector>\nint trial() { return std::vector<int>(3).size(); }\n"
        )
        include = f"-I{sysconfig.get_paths()['include']}"
        command = [compiler, "-std=c++17", "-shared", "-fPIC", include, str(source), "-o", f"{folder}/reader_check.so"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        mend = "install Python's headers (python3-dev)" if "Python.h" in done.stderr else "install g++, or set CXX"
        return [Finding("compiler", "fail", f"{compiler}: {_first_line(done.stderr)}", mend)]
    ninja = shutil.which("ninja")
    if ninja is None:
        return [Finding("compiler", "fail", "no ninja, DeepSpeed compiles with it", INSTALL)]
    versions = [
        subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
        for program in (compiler, ninja)
    ]
    return [Finding("compiler", "ok", f"{_first_line(versions[0])}; ninja {_first_line(versions[1])}")]


def _deepspeed() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    backend = accelerator.communication_backend_name()
    return [Finding("DeepSpeed", "ok", f"{deepspeed.__version__} for {accelerator.device_name()}, {backend}")]


def _ray() -> list[Finding]:
    """Join or start Ray as a job does, and run one task."""
    import ray

    from actors.actor_process import start_ray

    address = os.environ.get("RAY_ADDRESS")
    start_ray()
    try:
        begin = time.monotonic()
        ray.get(ray.remote(num_cpus=0.1)(lambda: os.getpid()).remote(), timeout=RAY_S / 2)  # travels by value
        seconds = time.monotonic() - begin
        have = ray.cluster_resources()
        nodes = sum(node["Alive"] for node in ray.nodes())
    finally:
        ray.shutdown()
    where = f"joined RAY_ADDRESS={address}, {nodes} nodes" if address else "starts here"
    size = (
        f"{have.get('CPU', 0):g} CPU, {have.get('GPU', 0):g} GPU, "
        f"object store {have.get('object_store_memory', 0) / GIB:.1f} GiB"
    )
    return [Finding("Ray", "ok", f"{where}: {size}; a task took {seconds:.1f} s")]


def _reader(name: str) -> list[Finding]:
    return [Finding(f"reader {name}", "ok", reader_check.try_reader(name), needed=name == reader_check.READERS[0])]


def _codec(codec: str) -> list[Finding]:
    was_tried, value = reader_check.try_codec(codec)
    return [Finding(f"codec {codec}", "ok" if was_tried else "warn", value, needed=codec == "h264")]


# --- running them -----------------------------------------------------------------------------------------------------


def examine(to_do: Sequence[Check], progress: Callable[[str, int], None] | None = None) -> list[Finding]:
    """Run checks, those with a deadline in processes of their own, some at a time; findings in the order of `to_do`.

    Args:
        progress: is told which checks are under way, and how many are done.
    """
    found: dict[int, list[Finding]] = {}
    waiting: deque[tuple[int, Check]] = deque()
    for number, check in enumerate(to_do):
        if check.timeout_s is None:
            found[number] = _attempt(check)
        else:
            waiting.append((number, check))
    under_way: dict[int, _Child] = {}
    places = max(1, min(_MOST_AT_A_TIME, os.cpu_count() or 1))
    with tempfile.TemporaryDirectory(prefix="rlvid-doctor-") as logs:
        try:
            while waiting or under_way:
                while waiting and len(under_way) < places:
                    number, check = waiting.popleft()
                    under_way[number] = _Child(check, Path(logs) / f"{number}.log")
                if progress is not None:
                    progress(", ".join(child.check.name for child in under_way.values()), len(found))
                next_deadline = min(child.deadline for child in under_way.values())
                wait([child.results for child in under_way.values()], max(0.0, next_deadline - time.monotonic()))
                for number in [number for number, child in under_way.items() if child.is_over]:
                    found[number] = under_way[number].findings()
                    under_way.pop(number).end()
        finally:  # Ctrl-C too
            for child in under_way.values():
                child.end()
    return [finding for number in sorted(found) for finding in found[number]]


def _attempt(check: Check) -> list[Finding]:
    try:
        return check.run(*check.args)
    except UserError as error:
        return check.failed(str(error))
    except BadClip as error:
        return check.failed(error.reason)
    except Exception as error:
        return check.failed(f"{type(error).__name__}: {_first_line(str(error))}")


class _Child:
    """A check in a process, and in a process group, of its own."""

    def __init__(self, check: Check, log: Path):
        assert check.timeout_s is not None
        context = multiprocessing.get_context("spawn")
        self.check = check
        self.results: Connection[None, list[Finding]]
        self.results, sender = context.Pipe(duplex=False)
        self.deadline = time.monotonic() + check.timeout_s
        self._log = log
        self._process: SpawnProcess = context.Process(target=_in_child, args=(check, sender, log), daemon=True)
        self._process.start()
        sender.close()  # so that the child's end closes the pipe

    @property
    def is_over(self) -> bool:
        return self.results.poll() or time.monotonic() >= self.deadline

    def findings(self) -> list[Finding]:
        if not self.results.poll():
            return self.check.failed(f"took longer than {self.check.timeout_s:g} s and was stopped")
        try:
            return self.results.recv()
        except EOFError:
            self._process.join()
        code = self._process.exitcode or 0
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        last = self._log.read_text(errors="replace").strip().splitlines()[-1:] if self._log.exists() else []
        return self.check.failed(": ".join([f"its process ended with {how}", *last]))

    def end(self) -> None:
        """Stop it and what it started; one that has given its findings may hang in a library's clean-up."""
        with suppress(ProcessLookupError, PermissionError):  # no group yet, or none any more
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self.results.close()


def _in_child(check: Check, sender: Connection[list[Finding], None], log: Path) -> None:
    os.setsid()  # Ctrl-C is the parent's business; it stops the whole group
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # the last line says why it died
    sender.send(_attempt(check))
    sender.close()


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")
