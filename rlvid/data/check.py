"""What is wrong with files of samples: manifests and published files, one split each. Nothing is changed or trained.

Faults of a row stop its use: it cannot be read, its answer is none of its candidate labels, a medium is missing. Faults
between rows and between files are those that nobody sees in a single row: two rows of one id, a held-out row that is
trained on, one label set under two names of its task, media in another folder.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlvid.config import VideoConfig
from rlvid.data.dialects import DIALECTS, looks_like
from rlvid.data.dialects.conversion import id_of, number_of
from rlvid.data.dialects.dialect import Dialect, Roots, plain
from rlvid.data.dialects.mmla import label_faults, task_of
from rlvid.data.items import Refused, opened, read_items
from rlvid.data.manifest import RowReader
from rlvid.data.row_media import MediaReader
from rlvid.errors import BadClip, UserError
from rlvid.types import Medium, Sample
from rlvid.video.clip_reader import read_file
from rlvid.video.frame_variants import thumbnails

EXAMPLES = 2  # of each kind of row
READ_MULTIPLE = 28  # height and width of the frames that are decoded, pixels


@dataclass
class Report:
    """What was found: how many rows and media there are of each kind, and by what is wrong, where and in which way.

    Attributes:
        examples: The first rows of each kind: by file, problem type and kinds of media.
    """

    counts: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    examples: dict[str, list[Sample]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class _NotingRoots(Roots):
    """Names every file, and notes those that are not there."""

    missing: list[str] = field(default_factory=list)

    def find(self, *names: str, is_there: Callable[[Path], bool] = Path.is_file) -> Path:
        try:
            return super().find(*names, is_there=is_there)
        except Refused as reason:
            self.missing.append(str(reason))
            return Path(os.path.normpath(os.path.join(os.path.abspath(self.folder or "."), names[-1])))


@dataclass(frozen=True)
class _Row:
    where: str
    file: Path
    sample: Sample


def check(files: Sequence[Path], dialect: str | None, roots: Roots, decodes: bool = False) -> Report:
    """Read all rows of all files.

    Args:
        dialect: of all files; None: of each file the one that its first row is surely of, or a manifest.
        decodes: read every medium too.

    Raises:
        UserError: a file cannot be read, or it is not clear which dialect it has.
    """
    report, rows = Report(), list[_Row]()
    for file in files:
        rows += _rows(file, _dialect_of(file, dialect), roots, report)
    for row in rows:
        media = "+".join(sorted({medium.kind for medium in row.sample.media})) or "text"
        kind = ", ".join(filter(None, [row.file.name, row.sample.problem_type, media]))
        if len(report.examples[kind]) < EXAMPLES:
            report.examples[kind].append(row.sample)
    _compare(rows, report)
    if decodes:
        _decode({medium for row in rows for medium in row.sample.media}, report)
    return report


def _dialect_of(file: Path, name: str | None) -> Dialect | None:
    """The dialect of a file; None for a manifest."""
    if name is not None:
        return DIALECTS[name]
    first = next((item for _, item in read_items(file, tables=True) if not isinstance(item, Refused)), None)
    if first is None:
        raise UserError(f"{file} holds no item")
    if found := looks_like(first):
        return DIALECTS[found]
    if "question" in first or ("messages" in first and "answer" in first):
        return None
    raise UserError(f"{file}: it is not clear which dialect this is; name it: --from {', '.join(DIALECTS)}")


def _rows(file: Path, dialect: Dialect | None, roots: Roots, report: Report) -> Iterator[_Row]:
    folder = Path(os.path.abspath(roots.folder or file.parent))
    noting = _NotingRoots(folder, roots.mapped, Path(os.path.abspath(file)))
    reader = RowReader(MediaReader(folder if dialect is None else Path("/"), True), None, "", needs_answer=False)
    first: dict[str, str] = {}
    last = 0
    for number, item in read_items(file, tables=True):
        where = f"{file}:{number}"
        if file.name.removesuffix(".gz").endswith(".jsonl") and number > last + 1:
            report.faults["blank lines"].append(f"before {where}")
        last = number
        report.counts["rows"] += 1
        noting.missing.clear()
        try:
            if isinstance(item, Refused):
                raise item
            if dialect is not None:
                item = plain({"id": id_of(item) or number_of(file, number), **dialect.read(item, noting)})
            sample = reader.sample(item)
        except Refused as reason:
            report.faults["rows that cannot be used"].append(f"{where}: {reason}")
            continue
        if not sample.answer.strip() and "chosen" not in sample.extra and "labels" not in sample.extra:
            report.faults["empty answers"].append(where)
        for fault in label_faults(sample.question, sample.answer):
            report.faults[fault].append(f"{where}: {sample.answer!r:.80}")
        if (earlier := first.setdefault(sample.id, where)) != where:
            report.faults["duplicate ids"].append(f"{where}: {sample.id!r} is that of {earlier}")
        if dialect is None:
            files = [name for medium in sample.media for name in medium.files]
            noting.missing.extend(f"there is no file {name}" for name in files if not os.path.isfile(name))
        report.faults["missing media"] += [f"{where}: {reason}" for reason in noting.missing]
        kinds = {medium.kind for medium in sample.media}
        report.counts.update([f"rows with {kind}s" for kind in kinds] or ["rows of text"])
        report.counts["rows with history"] += any(message.role == "assistant" for message in sample.messages)
        yield _Row(where, file, sample)
    if _ends_with_blank_line(file):
        report.faults["blank lines"].append(f"after {file}:{last}")


def _ends_with_blank_line(file: Path) -> bool:
    if not file.name.removesuffix(".gz").endswith(".jsonl"):
        return False
    with opened(file) as content:
        lines = deque(content, maxlen=1)
    return bool(lines) and not lines[0].strip()


def _compare(rows: Sequence[_Row], report: Report) -> None:
    """Find the faults between rows and between files."""
    asked: dict[tuple[Any, ...], _Row] = {}
    names: dict[str, dict[str, str]] = defaultdict(dict)  # candidate labels -> name of the task -> where
    folders: dict[str, dict[Path, str]] = defaultdict(dict)  # candidate labels -> file -> folder of its media
    for row in rows:
        sample = row.sample
        key = (tuple(medium.files for medium in sample.media), sample.question.casefold())
        earlier = asked.setdefault(key, row)
        if earlier is not row:
            kind = "duplicate rows" if sample.media else "duplicate texts"
            kind = kind if earlier.file == row.file else "rows in two files"
            report.faults[kind].append(f"{row.where}: the same media and question as {earlier.where}")
        if found := task_of(sample.question):
            task, labels = found
            names[labels].setdefault(task, row.where)
            for medium in sample.media:
                folders[labels].setdefault(row.file, os.path.dirname(medium.path))
    for by_name in names.values():
        if len(by_name) > 1:
            said = ", ".join(f"{name!r} ({where})" for name, where in by_name.items())
            report.faults["one set of labels under several names of its task"].append(said)
    for by_file in folders.values():
        if len(set(by_file.values())) > 1:
            said = ", ".join(f"{file}: {folder}" for file, folder in by_file.items())
            report.faults["files of one task with media in different folders"].append(said)


def frames_of(sample: Sample) -> list[bytes]:
    """A few frames of a sample's media as small JPEG files.

    Raises:
        BadClip: one of them cannot be read.
    """
    if gone := [name for medium in sample.media for name in medium.files if not os.path.isfile(name)]:
        raise BadClip(gone[0], "there is no file")
    seen = [read_file(medium, VideoConfig(), READ_MULTIPLE).frames for medium in sample.media]
    return [picture for frames in seen for picture in thumbnails(frames)]


def _decode(media: set[Medium], report: Report) -> None:
    video = VideoConfig()

    def fault(medium: Medium) -> str | None:
        if not all(map(os.path.isfile, medium.files)):
            return None  # reported already
        try:
            read_file(medium, video, READ_MULTIPLE)
        except BadClip as error:
            return str(error)
        return None

    ordered = sorted(media, key=lambda medium: medium.name)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders release the interpreter
        found = [reason for reason in pool.map(fault, ordered) if reason is not None]
    report.counts["media decoded"] = len(ordered)
    report.faults["media that cannot be decoded"] += found
