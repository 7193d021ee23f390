"""Items with a conversation and the media it is about: the forms of LLaMA-Factory, ms-swift, and LLaVA and its heirs.

- sharegpt (LLaMA-Factory): `conversations` of `{"from", "value"}`, or `messages` of `{"role", "content"}`, with
  `videos`, `images` and one `<video>` or `<image>` in the text for each of them. Other keys are no media.
- swift: `query`, `response` and perhaps `history` and `system`, or `messages`; media as above, before the first
  question where no placeholder says otherwise.
- llava (LLaVA, LLaVA-NeXT, LLaVA-CoT, VideoLLaMA2 and 3, the SFT files of LLaVA-Hound): `conversations` with `video` or
  `image`, a path, a folder of frames, or a list; `<image>` may stand for a video.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from rlvid.data.dialects.dialect import Dialect, Item, Refused, Roots, Row, name_of, text_of
from rlvid.data.dialects.hound import FPS, video_or_frames
from rlvid.data.row_media import PLACEHOLDER, VIDEOS, as_list
from rlvid.types import Sample

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
KEPT = ("problem_type", "task", "source")


def conversation(turns: Sequence[tuple[str, str]], media: Sequence[Row], is_placed: bool = False) -> Row:
    """A row in the messages form.

    Args:
        turns: (role, text); the last one is the answer.
        media: parts of a message's content.
        is_placed: every medium must have its placeholder; otherwise media without any come before the first question.

    Raises:
        Refused: the turns end otherwise, or placeholders and media do not match.
    """
    if not turns or turns[-1][0] != "assistant":
        raise Refused("the conversation does not end with an answer")
    *asked, (_, answer) = turns
    if not answer.strip():
        raise Refused("the answer is empty")
    waiting, n_places = list(media), sum(len(PLACEHOLDER.findall(text)) for _, text in asked)
    if n_places != len(media) and (n_places or is_placed):
        raise Refused(f"{n_places} placeholders for {len(media)} media")
    messages = []
    for role, text in asked:
        content: list[Row] = []
        if not n_places and role == "user":
            content, waiting = waiting, []
        for i, piece in enumerate(PLACEHOLDER.split(text)):  # text, kind, text
            if i % 2:
                kinds = [piece] if is_placed else [piece, "video"]  # LLaVA-NeXT writes <image> for a video
                meant = next((part for kind in kinds for part in waiting if kind in part), None)
                if meant is None:
                    raise Refused(f"a <{piece}> has no {piece}")
                waiting.remove(meant)
                content.append(meant)
            elif piece.strip():
                content.append({"type": "text", "text": piece.strip("\n")})
        messages.append({"role": role, "content": content})
    if not any(message["role"] == "user" for message in messages):
        raise Refused("the conversation has no question")
    return {"messages": messages, "answer": answer}


def turns_of(item: Item) -> list[tuple[str, str]]:
    """(role, text) of an item's turns.

    Raises:
        Refused: it has no such turns.
    """
    found: list[tuple[str, str]] = []
    if isinstance(system := item.get("system"), str) and system.strip():
        found.append(("system", system))
    if "query" in item or "response" in item:
        history = item.get("history") or []
        for pair in history if isinstance(history, list) else [None]:
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise Refused("history must be a list of [query, response]")
            found += zip(("user", "assistant"), pair, strict=True)
        return [*found, ("user", text_of(item, "query")), ("assistant", text_of(item, "response"))]
    turns = item.get("conversations", item.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise Refused("conversations must be a list of turns that is not empty")
    for turn in turns:
        if not isinstance(turn, dict):
            raise Refused("a turn must be an object")
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
            raise Refused(f"a turn is from {role!r}; expected a text from one of {', '.join(ROLES)}")
        found.append((ROLES[role], text))
    return found


def media_of(item: Item, roots: Roots, *keys: str) -> list[Row]:
    """Videos, then images, that an item names under these keys. A video file is one whatever its key."""
    media: list[Row] = []
    for key in keys:
        for name in as_list(item.get(key)):
            if not isinstance(name, str) or not name.strip():
                raise Refused(f"{key} must be a path or a list of paths, got {name!r:.60}")
            if key.startswith("video") or name.lower().endswith(VIDEOS):
                media.append({"type": "video", **video_or_frames(roots, name)})
            else:
                media.append({"type": "image", "image": roots.find(name)})
    return sorted(media, key=lambda part: "image" in part)


def read(item: Item, roots: Roots, keys: Sequence[str] = ("videos", "images"), is_placed: bool = False) -> Row:
    row = conversation(turns_of(item), media_of(item, roots, *keys), is_placed)
    return row | {key: item[key] for key in KEPT if key in item}


def write(row: Row, sample: Sample, keys: Mapping[str, str], form: Callable[[str, str], Row]) -> Item:
    """
    Args:
        keys: of the paths, by kind of medium.
        form: role and text of a turn -> the turn.
    """
    if any(message.is_marked for message in sample.messages):
        raise Refused("this dialect cannot mark the turns that are trained")
    kinds = [medium.kind for medium in sample.media]
    turns = []
    for message in sample.messages:
        parts = (part if isinstance(part, str) else f"<{kinds[part.index]}>" for part in message.content)
        turns.append((message.role, "".join(parts)))
    by_kind = {key: [name_of(m, FPS) for m in sample.media if m.kind == kind] for kind, key in keys.items()}
    item = {"id": sample.id} | {key: names for key, names in by_kind.items() if names}
    kept = {key: row[key] for key in KEPT if key in row}
    turns_key = "messages" if "role" in form("", "") else "conversations"
    return {**item, turns_key: [form(*turn) for turn in (*turns, ("assistant", sample.answer))], **kept}


def _from_value(role: str, text: str) -> Row:
    return {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text}


def _role_content(role: str, text: str) -> Row:
    return {"role": role, "content": text}


PLURAL, SINGULAR = {"video": "videos", "image": "images"}, {"video": "video", "image": "image"}


def _is_sharegpt(item: Item) -> bool:
    others = {"video", "image", "answer", "chosen", "rejected", "labels", "output_1", "text_prompt"}
    has_turns = "conversations" in item or "messages" in item
    return has_turns and not item.keys() & others and not isinstance(item.get("images"), str)


def _is_llava(item: Item) -> bool:
    turns = item.get("conversations")
    has_place = isinstance(turns, list) and any(PLACEHOLDER.search(str(turn)) for turn in turns)
    return has_place and (bool(item.keys() & {"video", "image"}) or isinstance(item.get("images"), str))


SHAREGPT = Dialect(
    partial(read, is_placed=True),
    "LLaMA-Factory: conversations with videos and images",
    _is_sharegpt,
    is_numbered=True,
    write=partial(write, keys=PLURAL, form=_from_value),
)
SWIFT = Dialect(
    read,
    "ms-swift: query and response",
    lambda item: "query" in item,
    is_numbered=True,
    write=partial(write, keys=PLURAL, form=_role_content),
)
LLAVA = Dialect(
    partial(read, keys=("video", "videos", "image", "images")),
    "LLaVA, LLaVA-NeXT, LLaVA-CoT, VideoLLaMA2 and 3, LLaVA-Hound's SFT: conversations with video or image",
    _is_llava,
    is_numbered=True,
    write=partial(write, keys=SINGULAR, form=_from_value),
)
