"""The dialects that rlvid reads beside its own manifests. To add one: a file beside these and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlvid.data.dialects import conversations, hound, mesc, mmla, rlaif, video_r1, videofeedback
from rlvid.data.dialects.dialect import Dialect

DIALECTS: dict[str, Dialect] = {
    "hound": hound.DIALECT,
    "llava": conversations.LLAVA,
    "mesc": mesc.DIALECT,
    "mmla": mmla.DIALECT,
    "mmla_text": mmla.TEXT,
    "rlaif": rlaif.DIALECT,
    "sharegpt": conversations.SHAREGPT,
    "swift": conversations.SWIFT,
    "video_r1": video_r1.DIALECT,
    "videofeedback": videofeedback.DIALECT,
}


def looks_like(item: Mapping[str, Any]) -> str | None:
    """The name of the dialect that an item is surely of; None where it may be of none or of several."""
    names = [name for name, dialect in DIALECTS.items() if dialect.is_like(item)]
    return names[0] if len(names) == 1 else None
