"""Rows of a long stage, kept as they are made: JSON lines keyed by id, which an interrupted run goes on with.

Appended in chunks, each in one write. A process killed in mid-write leaves at most one line without an end, which is
cut off when the file is opened again; its row is made again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlvid.errors import UserError
from rlvid.reporting import safe_json
from rlvid.reporting.run_folder import cut_torn_line, read_lines


class RowFile:
    """One writer at a time: the run folder's lock sees to that.

    Args:
        key: the field that names a row.

    Raises:
        UserError: a line is no JSON object, lacks its key, or repeats one.
    """

    def __init__(self, path: Path, key: str = "id"):
        self.path, self._key = path, key
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(path)
        self.rows: dict[str, dict[str, Any]] = {}
        for number, row in enumerate(read_lines(path), start=1):
            name = row.get(key)
            if not isinstance(name, str) or name in self.rows:
                raise UserError(f"{path}:{number}: expected a {key} of its own, got {name!r:.80}; remove the line")
            self.rows[name] = row

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows, on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(safe_json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self.rows |= {str(row[self._key]): dict(row) for row in rows}

    def missing(self, ids: Sequence[str]) -> list[str]:
        return [name for name in ids if name not in self.rows]

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.rows[name]

    def __contains__(self, name: object) -> bool:
        return name in self.rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows.values())

    def __len__(self) -> int:
        return len(self.rows)
