"""Makes the page of `rlvid data check`: what was counted, what is wrong, and examples with their frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlvid.reporting.report.page import data_address, write_page


@dataclass(frozen=True)
class Example:
    """A row as a model would see it."""

    sample_id: str
    kind: str  # what it is an example of
    turns: Sequence[tuple[str, str]]  # role and text; the answer last
    frames: Sequence[bytes]  # JPEG files
    note: str = ""  # why there are no frames


def write_data_page(
    file: Path,
    names: Sequence[str],
    counts: Mapping[str, int],
    faults: Mapping[str, Sequence[str]],
    shown: Sequence[Example],
) -> None:
    """Write the page atomically.

    Args:
        names: of the files that were checked.
    """
    content = {
        "names": names,
        "counts": sorted(counts.items(), key=lambda item: -item[1]),
        "faults": sorted(faults.items(), key=lambda item: -len(item[1])),
        "examples": [(example, [data_address(frame) for frame in example.frames]) for example in shown],
    }
    write_page(file, "data.html.j2", content)
