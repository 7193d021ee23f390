"""Manifests: JSON lines, one sample a row, checked whole before anything starts.

The question form is `{"id", "video", "question", "answer"}`, with `video` a path or a list of paths (left out for text
only) and, if wanted, `choices` and `problem_type`. The messages form is `{"id", "messages", "answer"}` for several
turns; a message is `{"role", "content"}`, its content a text or a list of `{"type": "text", "text"}` and
`{"type": "video", "video"}`. Other fields are kept in `Sample.extra`.

Video paths are relative to the manifest's folder and stay under the data root. Whether a file is there and can be read
is seen later, when the clip is read: one bad clip is quarantined and does not stop a run. A literal `<video>` in a text
means nothing here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from rlvid.errors import UserError
from rlvid.rewards.choices import MAX_CHOICES, bring_letters, choice_lines, choices_meant
from rlvid.types import Medium, MediumRef, Message, Sample

ROLES = ("system", "user", "assistant")
QUESTION_FIELDS = frozenset({"video", "question"})
FIELDS = QUESTION_FIELDS | {"id", "messages", "answer", "choices", "problem_type"}

_Content = tuple[str | MediumRef, ...]


def load_manifest(
    path: Path, root: Path | None, system_prompt: str | None, suffix: str, needs_answer: bool = True
) -> list[Sample]:
    """Read and check a manifest.

    In the question form the videos stand before the text, which is question, choices ("A. red") and suffix, one below
    the other. In the messages form the suffix goes below the text of the last turn, and choices are not written out.

    Args:
        path: The manifest.
        root: Folder that video paths must stay under; default the manifest's folder. Judged by the written path:
            symbolic links inside are followed.
        system_prompt: First turn of every conversation that has no system turn of its own.
        suffix: Put below every question.
        needs_answer: Refuse rows without an answer; otherwise their answer is "".

    Returns:
        The samples in the manifest's order, video paths absolute.

    Raises:
        UserError: Naming file and line, what was expected, and the mend.
    """
    manifest = Path(os.path.abspath(path.expanduser()))
    data_root = Path(os.path.abspath(root.expanduser())) if root is not None else manifest.parent
    samples: list[Sample] = []
    line_of_id: dict[str, int] = {}
    try:
        lines = manifest.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot read the manifest ({error.strerror}); give a JSON lines file") from None
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _Row(f"{path}:{line_number}", line, manifest.parent, data_root)
        sample = row.sample(system_prompt, suffix, needs_answer)
        if sample.id in line_of_id:
            row.fail(f"id {sample.id!r} is that of line {line_of_id[sample.id]} already; give every row its own")
        line_of_id[sample.id] = line_number
        samples.append(sample)
    if not samples:
        raise UserError(f"{path}: the manifest has no rows; expected one JSON object a line")
    return samples


class _Row:
    """One line of a manifest; knows where it stands, for the errors."""

    def __init__(self, where: str, line: bytes, folder: Path, data_root: Path):
        self.where = where
        self.folder = folder
        self.data_root = data_root
        self.media: list[Medium] = []
        self.fields = self._parse(line)

    def fail(self, message: str) -> NoReturn:
        raise UserError(f"{self.where}: {message}")

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"byte {error.start + 1} is not UTF-8; save the manifest as UTF-8")
        try:
            fields = json.loads(text, parse_constant=_refuse_constant)
            # JSON can escape half of a surrogate pair, which no tokenizer or file takes.
            json.dumps(fields, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            self.fail("a text holds half of a surrogate pair (\\ud800 to \\udfff); write the character itself")
        except (ValueError, RecursionError) as error:
            self.fail(f"not valid JSON ({error}); expected one JSON object a line")
        if not isinstance(fields, dict):
            self.fail(f"expected a JSON object with id, question and answer, got a {_kind(fields)}")
        return fields

    def sample(self, system_prompt: str | None, suffix: str, needs_answer: bool) -> Sample:
        sample_id = self._id()
        choices = self._choices()
        answer = self._answer(choices, needs_answer)
        if "messages" in self.fields:
            messages = self._messages(suffix)
        else:
            messages = [self._question(choices, suffix)]
        if system_prompt and messages[0].role != "system":
            messages.insert(0, Message("system", (system_prompt,)))
        problem_type = self.fields.get("problem_type")
        if problem_type is not None and not isinstance(problem_type, str):
            self.fail(f"problem_type must be a text, got a {_kind(problem_type)}")
        return Sample(
            id=sample_id,
            media=tuple(self.media),
            messages=tuple(messages),
            answer=answer,
            choices=choices,
            problem_type=problem_type or None,
            extra={name: value for name, value in self.fields.items() if name not in FIELDS},
        )

    def _id(self) -> str:
        value = self.fields.get("id")
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value.strip():
            self.fail("id is missing or empty; give every row an id of its own (a text or a whole number)")
        return value

    def _choices(self) -> tuple[str, ...] | None:
        choices = self.fields.get("choices")
        if choices is None:
            return None
        if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
            self.fail('choices must be a list of texts that are not empty, for example ["red", "blue"]')
        if not 2 <= len(choices) <= MAX_CHOICES:
            self.fail(f"choices must be 2 to {MAX_CHOICES}, one a letter; got {len(choices)}")
        return tuple(choices)

    def _answer(self, choices: tuple[str, ...] | None, needs_answer: bool) -> str:
        answer = self.fields.get("answer")
        if isinstance(answer, int | float) and not isinstance(answer, bool):
            answer = str(answer)
        if answer in (None, "") and not needs_answer:
            return ""
        if not isinstance(answer, str) or not answer.strip():
            self.fail("answer is missing or empty; expected a text or a number")
        if choices is not None:
            meant = choices_meant(answer, choices)
            if not meant:
                self.fail(f"answer {answer!r} is not among the choices {list(choices)}; give one's text or letter")
            if len(meant) > 1:
                self.fail(
                    f"answer {answer!r} is one choice's text and another one's letter; give a letter that is no text"
                )
        return answer

    def _question(self, choices: tuple[str, ...] | None, suffix: str) -> Message:
        question = self.fields.get("question")
        if not isinstance(question, str) or not question.strip():
            self.fail("question is missing or empty; expected a text, or messages for several turns")
        if choices and bring_letters(choices):
            self.fail(f"choices have letters of their own ({choices[0]!r}); leave them out, letters are put before")
        videos = self.fields.get("video")
        paths = videos if isinstance(videos, list) else [] if videos is None else [videos]
        text = "\n".join(part for part in (question, choice_lines(choices or ()), suffix) if part)
        return Message("user", (*(self._video(path) for path in paths), text))

    def _messages(self, suffix: str) -> list[Message]:
        if both := sorted(QUESTION_FIELDS & self.fields.keys()):
            self.fail(f"messages and {both[0]} do not go together; videos and questions stand in the messages' content")
        turns = self.fields["messages"]
        if not isinstance(turns, list) or not turns:
            self.fail('messages must be a list, for example [{"role": "user", "content": "What moves?"}]')
        messages = [self._message(turn, index) for index, turn in enumerate(turns)]
        if messages[-1].role != "user":
            self.fail(f"the last of messages is from the {messages[-1].role}; end with the user turn to be answered")
        *before, last = messages[-1].content
        if suffix:
            end: _Content = (f"{last}\n{suffix}",) if isinstance(last, str) else (last, suffix)
            messages[-1] = Message("user", (*before, *end))
        return messages

    def _message(self, turn: object, index: int) -> Message:
        where = f"messages[{index}]"
        if not isinstance(turn, dict) or turn.keys() != {"role", "content"}:
            self.fail(f"{where} must be an object with role and content and nothing else")
        role, content = turn["role"], turn["content"]
        if role not in ROLES:
            self.fail(f"{where}.role must be one of {', '.join(ROLES)}; got {role!r}")
        if role == "system" and index:
            self.fail(f"{where}: a system turn can only be the first")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list) or not content:
            self.fail(f"{where}.content must be a text or a list of text and video parts, and not empty")
        return Message(role, tuple(self._part(part, f"{where}.content[{i}]", role) for i, part in enumerate(content)))

    def _part(self, part: object, where: str, role: str) -> str | MediumRef:
        match part:
            case {"type": "text", "text": str(text), **rest} if text.strip() and not rest:
                return text
            case {"type": "video", "video": video, **rest} if not rest:
                if role != "user":
                    self.fail(f"{where}: a video can only stand in a user turn, not in one of the {role}")
                return self._video(video)
        self.fail(f'{where} must be {{"type": "text", "text": not empty}} or {{"type": "video", "video": a path}}')

    def _video(self, video: object) -> MediumRef:
        """Append the absolute path to `media`. A path is untrusted: it must not lead out of the data root."""
        if not isinstance(video, str) or not video.strip() or "\0" in video:
            self.fail(f"video must be a path or a list of paths, got {video!r:.80}")
        if os.path.isabs(video):
            self.fail(f"video {video!r} is absolute; write it relative to the manifest's folder {self.folder}")
        absolute = Path(os.path.normpath(self.folder / video))
        if self.data_root not in absolute.parents:
            self.fail(f"video {video!r} is not under {self.data_root}; set data.root to a folder that holds all videos")
        self.media.append(Medium(str(absolute)))
        return MediumRef(len(self.media) - 1)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _kind(value: object) -> str:
    names: Mapping[type, str] = {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
