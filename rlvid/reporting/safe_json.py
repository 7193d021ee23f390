"""The one JSON writer of the run folder and the console: always valid JSON, on one line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON text of plain data, paths and scalars of numpy or torch.

    NaN and infinities become null: JSON has no word for them, and `NaN` breaks every strict reader. All text is ASCII
    with escapes, so that line ends inside strings and broken Unicode from a model or a file name cannot break a line.
    """
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
