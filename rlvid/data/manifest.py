"""Manifests: one sample a row, as JSON lines, a JSON array or parquet, checked whole before anything starts.

The question form is `{"id", "video", "question", "answer"}`, with `video` a path or a list of paths (left out for text
only) and, if wanted, `choices` and `problem_type`. The media come before the text, unless the question says where with
one `<video>` for each. The messages form is `{"id", "messages", "answer"}` for several turns; a message is `{"role",
"content"}`, its content a text or a list of `{"type": "text", "text"}` and `{"type": "video", "video"}`. An assistant's
turn with `"train": true` is trained where `sft.loss` is marked. `video_start`, `video_end` (seconds), `fps` and
`max_pixels`, on the row or beside the video of a message, say which part of a video is read and how. A list of pictures
is one video; `fps` then says how many of them are a second. Images are written as videos are, under `image`. Other
fields are kept in `Sample.extra`.

Relative paths start at `data.root`, or at the manifest's folder where it is not set, and no path leads out of it.
Whether a file is there and can be read is seen later, when the clip is read: one bad clip is quarantined and does not
stop a run.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlvid.data.answers import read_answer, read_choices
from rlvid.data.items import Refused, kind_of, read_items, refuse_all
from rlvid.data.row_media import MEDIA_FIELDS, PLACEHOLDER, READ_AS, MediaReader, check_unread, read_part
from rlvid.errors import UserError
from rlvid.rewards.answers import bring_letters, choice_lines
from rlvid.types import Medium, MediumRef, Message, Sample

ROLES = ("system", "user", "assistant")
QUESTION_FIELDS = MEDIA_FIELDS | {"question"}
FIELDS = QUESTION_FIELDS | {"id", "messages", "answer", "choices", "problem_type"}

_Content = tuple[str | MediumRef, ...]
_ref = lru_cache(MediumRef)  # shared, as is the empty mapping: a manifest has many rows
_NO_EXTRA: Mapping[str, Any] = {}


def load_manifest(
    path: Path, root: Path | None, system_prompt: str | None, suffix: str, needs_answer: bool = True
) -> list[Sample]:
    """Read and check a manifest.

    The text of the question form is question, choices ("A. red") and suffix, one below the other. In the messages form
    the suffix goes below the text of the last turn, and choices are not written out.

    Args:
        path: The manifest.
        root: Folder where relative paths start and that all paths must be below; default the manifest's folder. Judged
            by the written path: symbolic links inside are followed.
        system_prompt: First turn of every conversation that has no system turn of its own.
        suffix: Put below every question.
        needs_answer: Refuse rows without an answer; otherwise their answer is "".

    Returns:
        The samples in the manifest's order, paths absolute.

    Raises:
        UserError: the file cannot be read, or its first twenty wrong rows: file and line, what was expected, the fix.
    """
    file = Path(os.path.abspath(path.expanduser()))
    base = Path(os.path.abspath(root.expanduser())) if root is not None else file.parent
    reader = RowReader(MediaReader(base, root is not None), system_prompt, suffix, needs_answer)
    samples: list[Sample] = []
    line_of_id: dict[str, int] = {}
    problems, hint = [], ""
    for line, row in read_items(path.expanduser()):
        try:
            if isinstance(row, Refused):
                raise row
            sample = reader.sample(row)
            if (earlier := line_of_id.setdefault(sample.id, line)) != line:
                raise Refused(f"id {sample.id!r} is that of line {earlier} already; give every row its own")
        except Refused as refused:
            problems.append(f"{path}:{line}: {refused}")
            if isinstance(row, dict):
                hint = hint or _dialect_hint(path, row)
        else:
            samples.append(sample)
    if problems:
        refuse_all(problems, hint)
    if not samples:
        raise UserError(f"{path}: the manifest has no rows; expected one JSON object a line")
    return samples


def count_media(samples: Sequence[Sample]) -> str:
    """How many samples have a video, and an image, for the start of a run."""
    n = Counter(kind for sample in samples for kind in {medium.kind for medium in sample.media})
    images = f", {n['image']} an image" if n["image"] else ""
    return f"{n['video']} of {len(samples)} samples have a video{images}"


def _dialect_hint(path: Path, row: Mapping[str, Any]) -> str:
    from rlvid.data.dialects import looks_like  # only where a row is wrong: manifests need no dialects

    name = looks_like(row)
    return f"its rows look like {name}; to read them: rlvid data convert {path} OUT --from {name}" if name else ""


class RowReader:
    """Makes samples of a manifest's rows. All of its methods raise `Refused` with the reason."""

    def __init__(self, media: MediaReader, system_prompt: str | None, suffix: str, needs_answer: bool):
        self._media, self._suffix, self._needs_answer = media, suffix, needs_answer
        self._system = Message("system", (system_prompt,)) if system_prompt else None

    def sample(self, row: dict[str, Any]) -> Sample:
        check_unread(row, FIELDS)
        sample_id = row.get("id")
        if isinstance(sample_id, bool) or not isinstance(sample_id, str | int) or not str(sample_id).strip():
            raise Refused("id is missing or empty; give every row an id of its own (a text or a whole number)")
        choices = read_choices(row.get("choices"))
        answer = read_answer(row.get("answer"), choices, self._needs_answer)
        if "messages" in row:
            messages, media = self._messages(row)
        else:
            message, media = self._question(row, choices)
            messages = [message]
        if self._system and messages[0].role != "system":
            messages.insert(0, self._system)
        problem_type = row.get("problem_type")
        if problem_type is not None and not isinstance(problem_type, str):
            raise Refused(f"problem_type must be a text, got a {kind_of(problem_type)}")
        return Sample(
            id=str(sample_id),
            media=tuple(media),
            messages=tuple(messages),
            answer=answer,
            choices=choices,
            problem_type=sys.intern(problem_type) if problem_type else None,
            extra={name: row[name] for name in row if name not in FIELDS} or _NO_EXTRA,
        )

    def _question(self, row: dict[str, Any], choices: tuple[str, ...] | None) -> tuple[Message, list[Medium]]:
        question = row.get("question")
        if not isinstance(question, str) or not question.strip():
            raise Refused("question is missing or empty; expected a text, or messages for several turns")
        if choices and bring_letters(choices):
            raise Refused(f"choices have letters of their own ({choices[0]!r}); leave them out, letters are put before")
        media = self._media.of_row(row)
        content: _Content = (*map(_ref, range(len(media))), question)
        if "<" in question and PLACEHOLDER.search(question):
            content, media = _placed(question, media)
        below = "\n".join(text for text in (choice_lines(choices or ()), self._suffix) if text)
        return Message("user", _extended(content, below)), media

    def _messages(self, row: dict[str, Any]) -> tuple[list[Message], list[Medium]]:
        if both := sorted(key for key in QUESTION_FIELDS if row.get(key) is not None):
            raise Refused(f"messages and {both[0]} do not go together; write {both[0]} into the messages' content")
        turns = row["messages"]
        if not isinstance(turns, list) or not turns:
            raise Refused('messages must be a list, for example [{"role": "user", "content": "What moves?"}]')
        media: list[Medium] = []
        messages = [self._message(turn, index, media) for index, turn in enumerate(turns)]
        last = messages[-1]
        if last.role != "user":
            raise Refused(f"the last of messages is from the {last.role}; end with the user turn to be answered")
        return [*messages[:-1], Message("user", _extended(last.content, self._suffix))], media

    def _message(self, turn: object, index: int, media: list[Medium]) -> Message:
        where = f"messages[{index}]"
        if not isinstance(turn, dict) or turn.keys() - {"train"} != {"role", "content"}:
            raise Refused(f"{where} must be an object with role and content, perhaps with train, and nothing else")
        role, content, is_marked = turn["role"], turn["content"], turn.get("train", False)
        if role not in ROLES:
            raise Refused(f"{where}.role must be one of {', '.join(ROLES)}; got {role!r}")
        if not isinstance(is_marked, bool) or (is_marked and role != "assistant"):
            raise Refused(f"{where}.train must be true or false, and true for turns of the assistant alone")
        if role == "system" and index:
            raise Refused(f"{where}: a system turn can only be the first")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list) or not content:
            raise Refused(f"{where}.content must be a text or a list of text and media parts, and not empty")
        parts = (self._part(part, f"{where}.content[{i}]", role, media) for i, part in enumerate(content))
        return Message(role, tuple(parts), is_marked)

    def _part(self, part: Any, where: str, role: str, media: list[Medium]) -> str | MediumRef:
        match part:
            case {"type": "text", "text": str(text)} if text.strip() and len(part) == 2:
                if found := PLACEHOLDER.search(text):
                    raise Refused(f"{where} has {found[0]} in its text; write it as a part of its own")
                return text
            case {"type": "video" | "image" as kind} if kind in part and not part.keys() - {"type", kind, *READ_AS}:
                if role != "user":
                    raise Refused(f"{where}: a {kind} can only be in a user turn, not in one of the {role}")
                media.append(self._media.medium(part[kind], kind, read_part(part)))
                return _ref(len(media) - 1)
        text, video = '{"type": "text", "text": not empty}', '{"type": "video", "video": a path}'
        raise Refused(f"{where} must be {text} or {video}, perhaps with {', '.join(READ_AS)}")


def _placed(question: str, media: Sequence[Medium]) -> tuple[_Content, list[Medium]]:
    """A question with the media where it says `<video>` or `<image>`, and the media in this order.

    Raises:
        Refused: there are more placeholders than media, or fewer.
    """
    waiting, placed = list(media), list[Medium]()
    content: list[str | MediumRef] = []
    for i, piece in enumerate(PLACEHOLDER.split(question.strip())):  # text, kind, text, kind, text
        if i % 2:
            medium = next((m for m in waiting if m.kind == piece), None)
            if medium is None:
                raise Refused(f"question has more <{piece}> than the row has media; name the files as {piece!r}")
            waiting.remove(medium)
            content.append(_ref(len(placed)))
            placed.append(medium)
        elif piece.strip():
            content.append(piece.strip("\n"))
    if waiting:
        raise Refused(f"question has {len(placed)} placeholders but the row has {len(media)} media; write one for each")
    return tuple(content), placed


def _extended(content: _Content, text: str) -> _Content:
    """The content of a turn with `text` below it."""
    if not text:
        return content
    *before, last = content
    return (*before, f"{last}\n{text}") if isinstance(last, str) else (*content, text)
