"""Guard between training and held-out samples: what was trained on is not evaluated on."""

from __future__ import annotations

from collections.abc import Sequence

from rlvid.errors import UserError
from rlvid.types import Message, Sample

SHOWN = 5


def check_disjoint(train: Sequence[Sample], held_out: Sequence[Sample]) -> None:
    """Refuse a held-out sample that is also trained on: by its id, or by the same videos and conversation.

    The same video with another question is allowed. Videos are compared by path, questions without regard to case and
    spacing and without the system prompt.

    Raises:
        UserError: Naming up to five of each, and how many there are.
    """
    problems = []
    train_ids = {sample.id for sample in train}
    if shared := [sample.id for sample in held_out if sample.id in train_ids]:
        problems.append(f"{len(shared)} ids are in both ({_some(shared)})")
    train_id_of = {_asked(sample): sample.id for sample in train}
    pairs = [(train_id_of.get(_asked(sample)), sample.id) for sample in held_out if sample.id not in train_ids]
    if twins := [f"{train_id} = {held_out_id}" for train_id, held_out_id in pairs if train_id is not None]:
        problems.append(f"{len(twins)} samples have the same video and question under two ids ({_some(twins)})")
    if problems:
        raise UserError(
            f"data.train and data.eval are not apart: {'; '.join(problems)}. Take these rows out of one of the two"
        )


def _asked(sample: Sample) -> tuple[object, ...]:
    return (sample.media, *(_turn(message) for message in sample.messages if message.role != "system"))


def _turn(message: Message) -> tuple[object, ...]:
    parts = (" ".join(part.casefold().split()) if isinstance(part, str) else part for part in message.content)
    return (message.role, *parts)


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:SHOWN]) + (", ..." if len(items) > SHOWN else "")
