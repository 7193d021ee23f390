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

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel

from rlvid.config.load import read_yaml
from rlvid.errors import BadClip, UserError
from rlvid.files import append_row, dumps, read_rows, write_atomic, write_rows
from rlvid.reporting import rollout_tables
from rlvid.reporting.checkpoints import Checkpoints
from rlvid.reporting.run_start import StartedRun

_PHASES = ("warm_start", "train")  # in order of time; rows of metrics.jsonl without a phase belong to the last one


class RunFolder:
    """A run folder. It can be read as it is; to write to it, use `with RunFolder(dir).start(cfg, "grpo") as run:`."""

    def __init__(self, dir: Path) -> None:
        self.dir = Path(dir)
        self.config_file = self.dir / "config.yaml"
        self.manifest_file = self.dir / "run.json"
        self.metrics_file = self.dir / "metrics.jsonl"
        self.bad_clips_file = self.dir / "bad_clips.jsonl"
        self.refused_file = self.dir / "refused.jsonl"
        self.judge_cache_file = self.dir / "judge_cache.jsonl"
        self.report_file = self.dir / "report.html"
        self.logs_dir = self.dir / "logs"
        self.checkpoints = Checkpoints(self.dir / "checkpoints")
        self._started: StartedRun | None = None

    @property
    def name(self) -> str:
        return self.dir.resolve().name

    def predictions_file(self, step: int) -> Path:
        return self.dir / "predictions" / f"step_{step:06d}.jsonl"

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

    def start(self, cfg: BaseModel, job: str) -> Self:
        """Make the folder, or resume the run in it, and lock it until `close`.

        Raises:
            UserError: the folder has a run of another job or config, is not a run folder, is in use, or cannot be
                written. All changes are then undone.
        """
        self._started = StartedRun(self, cfg, job)
        return self

    def close(self) -> None:
        """Release the lock."""
        if self._started is not None:
            self._started.close()
            self._started = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close. After a `UserError` before any result, remove the new folder too."""
        if isinstance(error, UserError) and self._started and not self.has_results and not self.bad_clips_file.exists():
            self._started.abandon()
        self.close()

    def record(
        self,
        *,
        model: Mapping[str, str] | None = None,
        data: Mapping[str, str] | None = None,
        prompt_templates: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        """Add to `run.json`: hashes of the files of model and data, prompt-template ids, and other entries.

        Raises:
            UserError: the run is resumed, and a hash or template differs from that at its start.
        """
        manifest = self.manifest()
        for kind, new in (("model", model), ("data", data), ("prompt_templates", prompt_templates)):
            old = manifest.get(kind) or {}
            changed = [key for key in new or {} if key in old and old[key] != (new or {})[key]]
            if changed:
                raise UserError(
                    f"{self.dir} was started with other content: {', '.join(f'{kind} {key}' for key in changed)} "
                    f"changed since then. Restore the old content, give another run.dir, or delete {self.dir}."
                )
            if new is not None:
                manifest[kind] = {**old, **new}
        write_atomic(self.manifest_file, dumps({**manifest, **more}, indent=2) + "\n")

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
        if all(row["path"] != clip.path for row in self.read_bad_clips()):
            append_row(self.bad_clips_file, {"path": clip.path, "reason": clip.reason, "sample_id": sample_id})

    def append_refused(self, sample_id: str, reason: str) -> None:
        """Record a manifest row that cannot train a reward model, unless it was recorded before the run was resumed."""
        row = {"id": sample_id, "reason": reason}
        if row not in read_rows(self.refused_file):
            append_row(self.refused_file, row)

    def read_bad_clips(self) -> list[dict[str, Any]]:
        return read_rows(self.bad_clips_file)

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


def _read(file: Path, kind: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{file}: not valid {kind}: {error}") from None
    return content if isinstance(content, dict) else {}
