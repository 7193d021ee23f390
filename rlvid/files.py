"""Files of text and rows: written whole or not at all, read with errors that name the line.

JSON written here is valid and on one line: NaN and infinities become null, all text is ASCII with escapes, so that line
ends inside strings and broken Unicode from a model or a file name cannot break a line.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlvid.errors import UserError

WRITE_ERRORS = ("No space left", "Read-only file system", "Permission denied", "inline_container")  # torch's zip writer


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON text of plain data, paths and scalars of numpy or torch."""
    return json.dumps(_plain(value), allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # numpy and torch scalars
        return _plain(value.item())
    raise TypeError(f"no JSON for {type(value).__name__}: {value!r}")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write beside `path` and rename: a reader sees the old content or the new one, never half of it.

    Several processes may write the same file, as trials of a sweep do.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    unfinished.replace(path)


def sync_folder(folder: Path) -> None:
    """Return when all files of `folder` are on the disk: a rename after it is not seen before their content is."""
    for path in (*(p for p in folder.rglob("*") if p.is_file()), folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def remembered_sha256(memory: Path, *paths: Path) -> str:
    """Hash of one file, or of the hashes of several, which are read only if a path, size or time of modification is new
    to the folder `memory`.

    Raises:
        OSError: a file cannot be read.
        UserError: the folder cannot be written.
    """
    paths = tuple(path.resolve() for path in paths)
    found = [(path.stat(), path) for path in paths]
    names = [f"{status.st_size} {status.st_mtime_ns} {path}" for status, path in found]
    name = "\n".join(names).encode(errors="surrogateescape")
    record = memory / f"{hashlib.sha256(name).hexdigest()}.sha256"
    with suppress(FileNotFoundError):
        known = record.read_text()
        if len(known) == 64:  # hexadecimal digits; a process may have crashed while it wrote
            return known
    hashes = []
    for path in paths:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    known = hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
    with naming_write_errors(f"{memory}", "free some space, or set data.cache_dir"):
        memory.mkdir(parents=True, exist_ok=True)
        record.write_text(known)
    return known


def replace_folder(new: Path, old: Path) -> None:
    """Rename `new` to `old`, in place of a folder that may be there."""
    replaced = old.with_name(f"{old.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if old.exists():
        old.rename(replaced)
    new.rename(old)
    shutil.rmtree(replaced, ignore_errors=True)


def copy_other_files(checkpoint: Path, folder: Path) -> None:
    """Copy what `folder` lacks of a checkpoint but for its weights: tokenizer, processor."""
    for file in checkpoint.iterdir():
        if file.is_file() and not (folder / file.name).exists() and "safetensors" not in file.name:
            shutil.copyfile(file, folder / file.name)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, whole or not at all."""
    write_atomic(path, "".join(dumps(row) + "\n" for row in rows))


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:  # one write of one line, on disk when the block ends
        file.write(dumps(row) + "\n")


def read_rows(path: Path, max_rows: int | None = None, always: bytes = b"\n") -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; none if there is no file. A last line without its end was being written: left out.

    Args:
        max_rows: of a longer file every n-th row is read, so that about this many are, and those that hold `always`,
            and the last one.

    Raises:
        UserError: a line is no JSON object.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    every = max(1, -(-len(lines) // (max_rows or len(lines) or 1)))
    return [
        parse_row(path, number, line)
        for number, line in enumerate(lines, start=1)
        if number % every == 0 or number == len(lines) or always in line
    ]


def parse_row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """
    Raises:
        UserError: line `number` of `path` is no JSON object.
    """
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: not a JSON object: {line[:80].decode(errors='replace')!r}")
    return row


def cut_torn_line(path: Path) -> None:
    """Remove a last line without an end, which a killed process left: the next row must not be appended to it."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            write_atomic(path, content[:whole])


class RowFile:
    """Rows of a long stage as JSON lines, each under a key of its own, which a resumed run continues.

    They are appended in chunks, each in one write. One writer at a time: the run folder's lock guarantees it.

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
        for number, row in enumerate(read_rows(path), start=1):
            name = row.get(key)
            if not isinstance(name, str) or name in self.rows:
                raise UserError(f"{path}:{number}: expected a {key} of its own, got {name!r:.80}; remove the line")
            self.rows[name] = row

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows, on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(dumps(row) + "\n" for row in rows))
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


@contextmanager
def naming_write_errors(what: str, fix: str) -> Iterator[None]:
    """Turn a failure to write (no room, no permission, a read-only disk) into a `UserError` with the fix.

    torch and safetensors raise errors of their own where a disk is full, and Ray wraps those of its actors: they are
    known by their words.

    Args:
        what: is written, with its path, for example "the checkpoint runs/a/checkpoints/step_5".
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if isinstance(e, OSError) and e.strerror:
            raise UserError(f"cannot write {what}: {e.strerror}; {fix}") from e
        reason = next((line for line in str(e).splitlines()[::-1] if any(w in line for w in WRITE_ERRORS)), None)
        if reason is None:
            raise
        raise UserError(f"cannot write {what}: {reason.strip()} (is the disk full?); {fix}") from e
