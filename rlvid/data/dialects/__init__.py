"""The dialects that `rlvid data convert` reads. To add one: a file beside these and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlvid.data.dialects import hound, rlaif, videofeedback
from rlvid.data.dialects.dialect import Dialect

DIALECTS: dict[str, Dialect] = {
    "hound": hound.DIALECT,
    "rlaif": rlaif.DIALECT,
    "videofeedback": videofeedback.DIALECT,
}


def looks_like(item: Mapping[str, Any]) -> str | None:
    """The name of the dialect that an item has all keys of."""
    return next((name for name, dialect in DIALECTS.items() if dialect.keys <= item.keys()), None)
