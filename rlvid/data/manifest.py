"""Manifests: one sample a row, as JSON lines, a JSON array or parquet, checked whole before anything starts.

The question form is `{"id", "video", "question", "answer"}`, with `video` a path or a list of paths (left out for text
only) and, if wanted, `choices` and `problem_type`. The media come before the text, unless the question says where with
one `<video>` for each. The messages form is `{"id", "messages", "answer"}` for several turns; a message is `{"role",
"content"}`, its content a text or a list of `{"type": "text", "text"}` and `{"type": "video", "video"}`. `video_start`,
`video_end` (seconds), `fps` and `max_pixels`, on the row or beside the video of a message, say which part of a video is
read and how. Images are written as videos are, under `image`. Other fields are kept in `Sample.extra`.

Relative paths start at `data.root`, or at the manifest's folder where it is not set, and no path leads out of it.
Whether a file is there and can be read is seen later, when the clip is read: one bad clip is quarantined and does not
stop a run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlvid.data.answers import read_answer, read_choices
from rlvid.data.items import Refused, kind_of, read_items, refuse_all
from rlvid.data.row_media import MEDIA_FIELDS, PLACEHOLDER, READ_AS, MediaReader, check_unread, read_part
from rlvid.errors import UserError
from rlvid.rewards.choices import bring_letters, choice_lines
from rlvid.types import Medium, MediumRef, Message, Sample

ROLES = ("system", "user", "assistant")
QUESTION_FIELDS = MEDIA_FIELDS | {"question"}
FIELDS = QUESTION_FIELDS | {"id", "messages", "answer", "choices", "problem_type"}

_Content = tuple[str | MediumRef, ...]
_FIRST = (MediumRef(0),)
_NO_EXTRA: Mapping[str, Any] = {}  # these are shared: a manifest has many rows


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
    reader = _RowReader(MediaReader(base, root is not None), system_prompt, suffix, needs_answer)
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
    """How many samples have a video, for the start of a run."""
    n = sum(bool(sample.media) for sample in samples)
    return f"{n} of {len(samples)} samples have a video"


def _dialect_hint(path: Path, row: Mapping[str, Any]) -> str:
    from rlvid.data.dialects import looks_like  # only where a row is wrong: manifests need no dialects

    name = looks_like(row)
    return f"its rows look like {name}; to read them: rlvid data convert {path} OUT --from {name}" if name else ""


class _RowReader:
    """Makes samples of a manifest's rows. All of its methods raise `Refused` with the reason."""

    def __init__(self, media: MediaReader, system_prompt: str | None, suffix: str, needs_answer: bool):
        self._media, self._suffix, self._needs_answer = media, suffix, needs_answer
        self._system = Message("system", (system_prompt,)) if system_prompt else None

    def sample(self, row: dict[str, Any]) -> Sample:
        check_unread(row, FIELDS)
        sample_id = self._id(row.get("id"))
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
            id=sample_id,
            media=tuple(media),
            messages=tuple(messages),
            answer=answer,
            choices=choices,
            problem_type=sys.intern(problem_type) if problem_type else None,
            extra={name: row[name] for name in row if name not in FIELDS} or _NO_EXTRA,
        )

    def _id(self, value: Any) -> str:
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value.strip():
            raise Refused("id is missing or empty; give every row an id of its own (a text or a whole number)")
        return value

    def _question(self, row: dict[str, Any], choices: tuple[str, ...] | None) -> tuple[Message, list[Medium]]:
        question = row.get("question")
        if not isinstance(question, str) or not question.strip():
            raise Refused("question is missing or empty; expected a text, or messages for several turns")
        if choices and bring_letters(choices):
            raise Refused(f"choices have letters of their own ({choices[0]!r}); leave them out, letters are put before")
        media = self._media.of_row(row)
        before: _Content = _FIRST if len(media) == 1 else tuple(map(MediumRef, range(len(media))))
        if "<" in question and PLACEHOLDER.search(question):
            before, question, media = _placed(question, media)
        text = "\n".join(part for part in (question, choice_lines(choices or ()), self._suffix) if part)
        return Message("user", (*before, text) if text else before), media

    def _messages(self, row: dict[str, Any]) -> tuple[list[Message], list[Medium]]:
        if both := sorted(key for key in QUESTION_FIELDS if row.get(key) is not None):
            raise Refused(
                f"messages and {both[0]} do not go together; media and questions are in the messages' content"
            )
        turns = row["messages"]
        if not isinstance(turns, list) or not turns:
            raise Refused('messages must be a list, for example [{"role": "user", "content": "What moves?"}]')
        media: list[Medium] = []
        messages = [self._message(turn, index, media) for index, turn in enumerate(turns)]
        if messages[-1].role != "user":
            raise Refused(
                f"the last of messages is from the {messages[-1].role}; end with the user turn to be answered"
            )
        *before, last = messages[-1].content
        if self._suffix:
            end: _Content = (f"{last}\n{self._suffix}",) if isinstance(last, str) else (last, self._suffix)
            messages[-1] = Message("user", (*before, *end))
        return messages, media

    def _message(self, turn: object, index: int, media: list[Medium]) -> Message:
        where = f"messages[{index}]"
        if not isinstance(turn, dict) or turn.keys() != {"role", "content"}:
            raise Refused(f"{where} must be an object with role and content and nothing else")
        role, content = turn["role"], turn["content"]
        if role not in ROLES:
            raise Refused(f"{where}.role must be one of {', '.join(ROLES)}; got {role!r}")
        if role == "system" and index:
            raise Refused(f"{where}: a system turn can only be the first")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list) or not content:
            raise Refused(f"{where}.content must be a text or a list of text and media parts, and not empty")
        parts = (self._part(part, f"{where}.content[{i}]", role, media) for i, part in enumerate(content))
        return Message(role, tuple(parts))

    def _part(self, part: Any, where: str, role: str, media: list[Medium]) -> str | MediumRef:
        part = part if isinstance(part, dict) else {}
        kind = part.get("type")
        if (
            kind == "text"
            and part.keys() == {"type", "text"}
            and isinstance(part["text"], str)
            and part["text"].strip()
        ):
            if found := PLACEHOLDER.search(part["text"]):
                raise Refused(f"{where} has {found[0]} in its text; write it as a part of its own")
            return str(part["text"])
        how = READ_AS.keys() if kind == "video" else set()
        if kind in ("video", "image") and kind in part and not part.keys() - {"type", kind, *how}:
            if role != "user":
                raise Refused(f"{where}: a {kind} can only be in a user turn, not in one of the {role}")
            media.append(self._media.medium(part[kind], kind, read_part(part)))
            return MediumRef(len(media) - 1)
        raise Refused(
            f'{where} must be {{"type": "text", "text": not empty}} or {{"type": "video", "video": a path}}, perhaps '
            f"with {', '.join(READ_AS)}"
        )


def _placed(question: str, media: Sequence[Medium]) -> tuple[_Content, str, list[Medium]]:
    """Put media where a question has `<video>` or `<image>`: what comes before its last text, that text, the media in
    this order.

    Raises:
        Refused: there are more placeholders than media, or fewer.
    """
    waiting, placed = list(media), list[Medium]()
    first, *rest = PLACEHOLDER.split(question)  # text, kind, text, kind, text
    content: list[str | MediumRef] = [first.strip()] if first.strip() else []
    for kind, text in zip(rest[::2], rest[1::2], strict=True):
        medium = next((m for m in waiting if m.kind == kind), None)
        if medium is None:
            raise Refused(f"question has more <{kind}> than the row has media of this kind; name the files as {kind!r}")
        waiting.remove(medium)
        content.append(MediumRef(len(placed)))
        placed.append(medium)
        content.append(text)
    if waiting:
        raise Refused(f"question has {len(placed)} placeholders but the row has {len(media)} media; write one for each")
    before = tuple(part for part in content[:-1] if isinstance(part, MediumRef) or part.strip())
    return before, rest[-1].strip(), placed
