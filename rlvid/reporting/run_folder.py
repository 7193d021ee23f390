"""The run folder: everything that a run leaves behind, and the only code that knows its layout.

    config.yaml        resolved configuration; its presence makes a folder a run folder
    run.json           versions, commit, seed, start, hashes of model and data, prompt templates
    metrics.jsonl      one row per step
    rollouts/, frames/ step_000010.parquet: responses with their rewards, and the frames that were shown
    predictions/       step_000010.jsonl: greedy answers to the held-out samples
    bad_clips.jsonl    clips that could not be read, with the reason
    refused.jsonl      rows of the manifests that a reward model cannot learn from, with the reason
    checkpoints/       step_N, complete by construction (see checkpoints.py)
    logs/              noise of engines, and tracebacks
    iterations/NN/     i-SRT: contexts, responses, judgements and pairs, one file of rows each, and the model after them
    judge_cache.jsonl  answers of judges, by a hash of what they were asked
    report.html        the page made of all this

Two invariants: one writing process at a time (a lock that ends with its process), and one config per folder (a key says
itself in `rlvid/config` whether it may change when a run is resumed).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from pydantic import BaseModel, ValidationError

from rlvid.config.keys import flatten, may_change_on_resume
from rlvid.config.load import dump_config, read_yaml
from rlvid.errors import BadClip, UserError
from rlvid.files import append_row, cut_torn_line, dumps, read_rows, write_atomic
from rlvid.reporting import rollout_tables
from rlvid.reporting.checkpoints import Checkpoints
from rlvid.reporting.provenance import git_commit, versions

_PHASES = ("warm_start", "train")  # in their order of time; rows of metrics.jsonl without a phase are of the last one
# What a folder may hold and still count as unused: leftovers of a start that came to nothing.
_NO_RESULTS = {"data", "model", "reference.safetensors", "policy", "logs", "wandb", "checkpoints"}
_NO_RESULTS |= {"run.json", "bad_clips.jsonl", "refused.jsonl", "report.html"}


class RunFolder:
    """A run folder. To read it needs nothing more; to write, `with RunFolder(dir).start(cfg, "grpo") as run:`."""

    def __init__(self, dir: Path) -> None:
        self.dir = Path(dir)
        self.checkpoints = Checkpoints(self.dir / "checkpoints")
        self._lock: IO[str] | None = None
        self._is_created = False  # the folder, by this process
        self._is_new_run = False
        self._bad_paths: set[str] | None = None

    @property
    def name(self) -> str:
        return self.dir.resolve().name

    @property
    def config_file(self) -> Path:
        return self.dir / "config.yaml"

    @property
    def manifest_file(self) -> Path:
        return self.dir / "run.json"

    @property
    def metrics_file(self) -> Path:
        return self.dir / "metrics.jsonl"

    @property
    def bad_clips_file(self) -> Path:
        return self.dir / "bad_clips.jsonl"

    @property
    def refused_file(self) -> Path:
        return self.dir / "refused.jsonl"

    @property
    def logs_dir(self) -> Path:
        return self.dir / "logs"

    @property
    def report_file(self) -> Path:
        return self.dir / "report.html"

    @property
    def judge_cache_file(self) -> Path:
        return self.dir / "judge_cache.jsonl"

    def predictions_file(self, step: int) -> Path:
        return self.dir / "predictions" / f"step_{step:06d}.jsonl"

    def iteration_dir(self, number: int) -> Path:
        return self.dir / "iterations" / f"{number:02d}"

    @property
    def is_run(self) -> bool:
        return self.config_file.is_file()

    @property
    def has_results(self) -> bool:
        has_steps = bool(self.checkpoints.complete() or self.rollout_steps()) or self.metrics_file.exists()
        return has_steps or any((self.dir / name).exists() for name in ("iterations", "predictions"))

    # --- start and end ------------------------------------------------------------------------------------------------

    def start(self, cfg: BaseModel, job: str) -> Self:
        """Make the folder, or take it up again, and lock it until `close`.

        Raises:
            UserError: the folder holds a run of another job or config, is no run folder, is in use, or cannot be
                written. Nothing is left behind then.
        """
        self._is_created = self._is_new_run = False
        self._bad_paths = None
        try:
            self._is_created = self._make_dir()
            if not self.is_run:
                self._refuse_foreign_files()  # before the lock file is put between them
            self._take_lock()
            if self.is_run and self.has_results:
                self._refuse_another_run(cfg, job)
                self._take_up(cfg)
            else:  # new, or a start that came to nothing: no result is bound to its config
                self._is_new_run = True
                self._write_new(cfg, job)
        except BaseException as error:
            self._abandon()
            if isinstance(error, OSError):
                place = error.filename or self.dir
                raise UserError(f"cannot write to {place}: {error.strerror}; give another run.dir") from None
            raise
        return self

    def close(self) -> None:
        """Give the lock back. The lock file stays: removing it would let two processes lock two different files."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; after a `UserError` that came before any result, leave no half-written new folder."""
        if isinstance(error, UserError) and not self.has_results and not self.bad_clips_file.exists():
            self._abandon()
        self.close()

    def record(
        self,
        *,
        model: Mapping[str, str] | None = None,
        data: Mapping[str, str] | None = None,
        prompt_templates: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        """Add to `run.json`: hashes of the model's and the data's files, prompt-template ids, anything else.

        Raises:
            UserError: the run is taken up again and one of the hashes or templates is another than at its start.
        """
        manifest = self.manifest()
        for kind, new in (("model", model), ("data", data), ("prompt_templates", prompt_templates)):
            old = manifest.get(kind) or {}
            changed = [key for key in new or {} if key in old and old[key] != (new or {})[key]]
            if changed:
                raise UserError(
                    f"{self.dir} was started with other content: {', '.join(f'{kind} {key}' for key in changed)} "
                    f"changed since then. Put the old content back, give another run.dir, or delete {self.dir}."
                )
            if new is not None:
                manifest[kind] = {**old, **new}
        write_atomic(self.manifest_file, dumps({**manifest, **more}, indent=2) + "\n")

    def manifest(self) -> dict[str, Any]:
        """Content of `run.json`; empty if there is none."""
        try:
            content = json.loads(self.manifest_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise UserError(f"{self.manifest_file}: not valid JSON: {error}") from None
        return content if isinstance(content, dict) else {}

    def config(self) -> dict[str, Any]:
        """Content of `config.yaml` as plain data; empty if there is none."""
        try:
            content = read_yaml(self.config_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise UserError(f"{self.config_file}: not valid YAML: {error}") from None
        return content if isinstance(content, dict) else {}

    # --- rows ---------------------------------------------------------------------------------------------------------

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        append_row(self.metrics_file, row)

    def read_metrics(self, max_rows: int | None = None) -> list[dict[str, Any]]:
        """Rows in their order; of more than `max_rows` only every n-th, and all evaluations."""
        return read_rows(self.metrics_file, max_rows, always=b'"eval/')

    def append_bad_clip(self, clip: BadClip, sample_id: str | None = None) -> bool:
        """Note a clip that cannot be read. False if its path is noted already, by this or an interrupted process."""
        if self._bad_paths is None:
            self._bad_paths = {row["path"] for row in self.read_bad_clips()}
        if clip.path in self._bad_paths:
            return False
        append_row(self.bad_clips_file, {"path": clip.path, "reason": clip.reason, "sample_id": sample_id})
        self._bad_paths.add(clip.path)
        return True

    def append_refused(self, sample_id: str, reason: str) -> None:
        """Note a manifest row that a reward model cannot learn from; once, also when the run is taken up again."""
        row = {"id": sample_id, "reason": reason}
        if row not in read_rows(self.refused_file):
            append_row(self.refused_file, row)

    def read_bad_clips(self) -> list[dict[str, Any]]:
        return read_rows(self.bad_clips_file)

    def write_rollouts(
        self,
        step: int,
        rows: Iterable[Mapping[str, Any]],
        frames: Mapping[str, Sequence[bytes]],
    ) -> Path:
        """Responses of one step (columns: `rollout_tables.SCHEMA`) and, per sample id, the encoded frames it showed."""
        return rollout_tables.write(self.dir, step, rows, frames)

    def rollout_steps(self) -> list[int]:
        """Steps with a rollout table, oldest first."""
        return rollout_tables.steps(self.dir)

    def read_rollouts(self, step: int) -> tuple[list[dict[str, Any]], dict[str, list[bytes]]]:
        """Rows and frames as they were given to `write_rollouts`."""
        return rollout_tables.read(self.dir, step)

    def rewind(self, step: int | None, phase: str = "train") -> None:
        """Remove what came after step `step` of `phase`, where the run resumes; None: after the very beginning.

        A killed run has logged steps that its newest checkpoint does not know. They will be done again, and would
        appear twice in every curve.
        """

        def is_kept(row: Mapping[str, Any]) -> bool:
            row_phase = row.get("phase", _PHASES[-1])
            if step is None:
                return False
            if row_phase == phase:
                return int(row.get("step", 0)) <= step
            return _PHASES.index(row_phase) < _PHASES.index(phase) if row_phase in _PHASES else False

        rows = self.read_metrics()
        kept = [row for row in rows if is_kept(row)]
        if len(kept) < len(rows):
            write_atomic(self.metrics_file, "".join(dumps(row) + "\n" for row in kept))
        last = step if step is not None and phase == _PHASES[-1] else None
        rollout_tables.remove_after(self.dir, -1 if last is None else last)
        for file in (self.dir / "predictions").glob("step_*.jsonl"):
            if last is None or int(file.stem.removeprefix("step_")) > last:
                file.unlink()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _make_dir(self) -> bool:
        """False if it is there already."""
        try:
            self.dir.mkdir(parents=True)
        except FileExistsError:
            if not self.dir.is_dir():
                raise UserError(f"{self.dir} is a file; give another run.dir") from None
            return False
        return True

    def _take_lock(self) -> None:
        lock = (self.dir / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another job"
            lock.close()
            raise UserError(f"{self.dir} is in use by {holder}; wait for its end or give another run.dir") from None
        self._lock = lock
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {_now()}\n")
        lock.flush()

    def _refuse_foreign_files(self) -> None:
        entries = (path.name for path in self.dir.iterdir() if not path.name.startswith("."))
        foreign = sorted(name for name in entries if name not in _NO_RESULTS and not name.endswith(".tmp"))
        if foreign:
            shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
            raise UserError(
                f"{self.dir} is not a run folder: it holds {shown}, but no config.yaml. Give another run.dir."
            )

    def _refuse_another_run(self, cfg: BaseModel, job: str) -> None:
        old_job = self.manifest().get("job", job)
        if old_job != job:
            raise UserError(
                f"{self.dir} holds a run of rlvid {old_job}, not of rlvid {job}. Give another run.dir, or delete it."
            )
        saved = self.config()
        with contextlib.suppress(ValidationError):  # a key that is newer than the saved file has its default there
            saved = type(cfg).model_validate(saved).model_dump(mode="json")
        differences = _differences(type(cfg), saved, cfg.model_dump(mode="json"))
        if not differences:
            return
        shown = [f"  {key}: {old} there, {new} now" for key, old, new in differences[:12]]
        if len(differences) > len(shown):
            shown.append(f"  and {len(differences) - len(shown)} more")
        raise UserError(
            f"{self.dir} holds a run of another config:\n"
            + "\n".join(shown)
            + f"\nGive another run.dir, set the keys back to resume that run, or delete {self.dir}."
        )

    def _write_new(self, cfg: BaseModel, job: str) -> None:
        manifest = {
            "job": job,
            "started": _now(),
            "seed": getattr(cfg, "seed", None),
            "git_commit": git_commit(Path.cwd()),
            "versions": versions(),
        }
        self.logs_dir.mkdir(exist_ok=True)
        self.bad_clips_file.unlink(missing_ok=True)
        write_atomic(self.manifest_file, dumps(manifest, indent=2) + "\n")
        write_atomic(self.config_file, dump_config(cfg))  # last: from now on this is a run folder

    def _take_up(self, cfg: BaseModel) -> None:
        self.checkpoints.remove_unfinished()
        self.logs_dir.mkdir(exist_ok=True)
        for path in (self.metrics_file, self.bad_clips_file):
            cut_torn_line(path)
        manifest = self.manifest()
        again = {"time": _now(), "git_commit": git_commit(Path.cwd()), "versions": versions()}
        manifest["resumed"] = [*manifest.get("resumed", []), again]
        write_atomic(self.manifest_file, dumps(manifest, indent=2) + "\n")
        write_atomic(self.config_file, dump_config(cfg))

    def _abandon(self) -> None:
        """Undo `_write_new`. Logs stay: they may hold the reason."""
        self.close()
        has_logs = self.logs_dir.is_dir() and any(self.logs_dir.iterdir())
        if self._is_created and not has_logs:
            shutil.rmtree(self.dir, ignore_errors=True)
        elif self._is_created:
            for path in self.dir.iterdir():
                if path.is_dir() and path != self.logs_dir:
                    shutil.rmtree(path, ignore_errors=True)
                elif path.is_file():
                    path.unlink()
        elif self._is_new_run:
            for path in (self.config_file, self.manifest_file, self.report_file):
                path.unlink(missing_ok=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _differences(cls: type[BaseModel], old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(key, old value, new value) of the keys that must not change when a run is resumed."""
    flat_old, flat_new = flatten(old), flatten(new)
    found = []
    for key in dict.fromkeys((*flat_new, *flat_old)):
        if flat_old.get(key) != flat_new.get(key) and not may_change_on_resume(cls, key):
            old_text, new_text = (dumps(flat[key]) if key in flat else "nothing" for flat in (flat_old, flat_new))
            found.append((key, old_text, new_text))
    return found
