"""Whether a row of a manifest needs its video: how often it is answered right in each view, and which rows are near
copies of others."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from rlvid.types import Sample

Mark = Literal["blind", "still", "order_free", "needs_order", "not_answered"]
MARKS: tuple[Mark, ...] = ("blind", "still", "order_free", "needs_order", "not_answered")
SIDE, FRAMES = 8, 6  # of a signature: pixels of a frame's side, frames
NEAR = 0.02  # root mean square difference of two signatures, of a range of 1: a copy in another encoding is nearer
SAME_WORDS = 0.8  # share of words that two questions have in common, of all words of both
BEYOND_USUAL = 0.5  # by which a share of right answers without the video is above the usual one
BLOCK = 1024  # signatures compared at a time

Signature = npt.NDArray[np.float32]  # [FRAMES * SIDE * SIDE * 3], between 0 and 1


def mark_of(shares: Mapping[str, float], right_from: float, usual: float = 0.0) -> Mark:
    """What a row needs, from its share of right answers in each view (`rlvid/models/families/views.py`, and "video").

    blind: right without the video, and not because it is what the model says there to most questions. still: not
    blind, and right from the middle frame and from the first; one alone may be right by luck. order_free: neither, and
    right with the frames shuffled and reversed. needs_order: only right with the video as it is. A view without a
    verdict is not right.

    Args:
        usual: the share of the model's answers to other rows, without their video, that would be right here.
    """
    ladder: tuple[tuple[Mark, tuple[str, ...]], ...] = (
        ("blind", ("blank",)),
        ("still", ("one_frame", "first_frame")),
        ("order_free", ("shuffled", "reversed")),
        ("needs_order", ("video",)),
    )
    right = {view for view, share in shares.items() if share >= right_from}
    if shares.get("blank", 0.0) - usual < BEYOND_USUAL:
        right.discard("blank")
    return next((mark for mark, views in ladder if right.issuperset(views)), "not_answered")


def signature(frames: Sequence[bytes]) -> Signature:
    """Small pictures of some JPEG frames, in a row."""
    from PIL import Image

    chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)]
    small = []
    for frame in chosen:
        picture = Image.open(io.BytesIO(frame)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
        small.append(np.asarray(picture, dtype=np.float32).ravel() / np.float32(255))
    return np.concatenate(small)


def near_copies(signatures: Sequence[Signature]) -> list[int]:
    """For each clip the index of the first one that it is a near copy of; its own where there is none."""
    first = list(range(len(signatures)))
    if not signatures:
        return first
    vectors = np.stack(signatures)
    squares = (vectors**2).sum(axis=1)
    limit = NEAR**2 * vectors.shape[1]
    for begin in range(0, len(vectors), BLOCK):  # every pair, a block of rows at a time
        end = min(begin + BLOCK, len(vectors))
        own, earlier = vectors[begin:end], vectors[:end]
        distances = squares[begin:end, None] + squares[None, :end] - 2 * own @ earlier.T
        for i, j in enumerate((distances <= limit).argmax(axis=1), start=begin):  # the first near one, or itself
            first[i] = first[j]
    return first


def same_question(one: str, other: str) -> bool:
    """Whether two questions ask the same in nearly the same words."""
    words, others = (set(re.findall(r"\w+", text.lower())) for text in (one, other))
    return len(words & others) >= SAME_WORDS * len(words | others)


def duplicates(samples: Sequence[Sample], signatures: Mapping[str, Signature]) -> dict[str, str]:
    """Rows that ask the same of a near copy of the same clip, by id: the id of the first such row.

    Args:
        signatures: by sample id, of the samples whose media could be read.
    """
    seen = [sample for sample in samples if sample.id in signatures]
    first = near_copies([signatures[sample.id] for sample in seen])
    found: dict[str, str] = {}
    asked: dict[int, list[Sample]] = {}
    for sample, clip in zip(seen, first, strict=True):
        earlier = asked.setdefault(clip, [])
        copy = next((other for other in earlier if same_question(other.question, sample.question)), None)
        if copy is None:
            earlier.append(sample)
        else:
            found[sample.id] = copy.id
    return found
