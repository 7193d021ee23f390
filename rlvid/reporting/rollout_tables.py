"""Reads and writes rollout tables: `rollouts/step_000010.parquet`, one row per response, `frames/step_000010.parquet`.

Frames are in a folder of their own, so that `pandas.read_parquet("runs/demo/rollouts")` gives the tables of all steps
without megabytes of pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlvid.errors import UserError
from rlvid.files import write_atomic

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("group_index", pa.int64(), nullable=False),  # index of the response in its group
        pa.field("question", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),  # the right answer
        pa.field("response", pa.string(), nullable=False),
        pa.field("reward_total", pa.float64()),  # null: the reward is invalid
        pa.field("reward_parts", pa.string(), nullable=False),  # JSON object: name -> value
        pa.field("invalid_reason", pa.string()),
        pa.field("advantage", pa.float64(), nullable=False),
        pa.field("n_tokens", pa.int64(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("weight_versions", pa.string(), nullable=False),  # JSON list of [version, start, end]
        pa.field("logprob_mean", pa.float64(), nullable=False),
    ]
)
"""Columns of a rollout table; every row has all of them."""

FRAME_SCHEMA = pa.schema([("sample_id", pa.string()), ("frames", pa.list_(pa.binary()))])
"""Columns of a frame table; frames are encoded images (JPEG or PNG) in order of time."""


def write(run_dir: Path, step: int, rows: Sequence[Mapping[str, Any]], frames: Mapping[str, Sequence[bytes]]) -> Path:
    """Write both tables of a step and return the path of the rollout table.

    Frames are written first, so a rollout table is never without its frames.

    Args:
        rows: one per response, with the columns of `SCHEMA`.
        frames: encoded frames by sample id.

    Raises:
        ValueError: a row has other columns.
    """
    for row in rows:
        missing, unknown = sorted(set(SCHEMA.names) - row.keys()), sorted(row.keys() - set(SCHEMA.names))
        if missing or unknown:
            raise ValueError(f"a rollout row lacks {missing} and has unknown {unknown}")
    frame_rows = [{"sample_id": name, "frames": own} for name, own in frames.items()]
    _write_table(_path(run_dir, "frames", step), frame_rows, FRAME_SCHEMA)
    path = _path(run_dir, "rollouts", step)
    _write_table(path, rows, SCHEMA)
    return path


def read(run_dir: Path, step: int) -> tuple[list[dict[str, Any]], dict[str, list[bytes]]]:
    """Rows and frames of a step. Without a frame table there are no frames."""
    rows = _read_table(_path(run_dir, "rollouts", step))
    frame_path = _path(run_dir, "frames", step)
    frame_rows = _read_table(frame_path) if frame_path.exists() else []
    return rows, {row["sample_id"]: row["frames"] for row in frame_rows}


def steps(run_dir: Path) -> list[int]:
    """Steps with a rollout table, oldest first."""
    return sorted(files_by_step(run_dir / "rollouts"))


def files_by_step(folder: Path) -> dict[int, Path]:
    """Files named `step_000010` and an extension."""
    matches = {path: re.fullmatch(r"step_(\d+)\.\w+", path.name) for path in folder.glob("step_*")}
    return {int(match[1]): path for path, match in matches.items() if match}


def _path(run_dir: Path, folder: str, step: int) -> Path:
    return run_dir / folder / f"step_{step:06d}.parquet"


def _text(value: Any) -> Any:
    """Replace lone surrogates, which Arrow does not accept; file names and byte-level tokenizers can contain them."""
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def _write_table(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    table = pa.Table.from_pylist([{key: _text(value) for key, value in row.items()} for row in rows], schema=schema)
    content = pa.BufferOutputStream()
    pq.write_table(table, content, compression="zstd")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content.getvalue().to_pybytes())


def _read_table(path: Path) -> list[dict[str, Any]]:
    try:
        # `read_table` would read folder names like `step=3` as columns
        rows: list[dict[str, Any]] = pq.ParquetFile(path).read().to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file: {error}") from None
    return rows
