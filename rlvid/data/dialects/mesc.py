"""MESC, the therapy dialogues of MultiMood: the client's last clips, the history, and what the therapist does.

`{"Dialogue_ID", "Utterance", "Emotion", "Strategy", "path_to_vid_user_most_recent": [...], "history_chat": [{"role",
"content"}, ...], "utt_user_most_recent", "get_emotion_user_most_recent", "situation", "problem_type"}`. `Utterance`,
`Emotion` and `Strategy` are the therapist's (lists: the last one). As published, the last `HISTORY` turns and the last
`CLIPS` clips are used; an answer has four lines. A clip is a video of its own: nothing is joined.
"""

from __future__ import annotations

from typing import Any

from rlvid.data.dialects.conversations import ROLES, conversation, media_of
from rlvid.data.dialects.dialect import Dialect, Item, Refused, Roots, Row, name_of, text_of
from rlvid.data.dialects.hound import FPS
from rlvid.types import MediumRef, Sample

HISTORY, CLIPS = 7, 5
LINES = ("Client's emotion", "Therapist's emotion", "Therapist's strategy", "Therapist's response")
CLIPS_KEY = "path_to_vid_user_most_recent"
SYSTEM = (
    "You are a therapist. See and read what the client says, and answer in four lines: "
    + ", ".join(f"{name}: ..." for name in LINES)
    + "."
)


def read(item: Item, roots: Roots) -> Row:
    parts = [_last(item, key) for key in ("get_emotion_user_most_recent", "Emotion", "Strategy", "Utterance")]
    answer = "\n".join(f"{name}: {part}" for name, part in zip(LINES, parts, strict=True))
    history = item.get("history_chat") or []
    try:
        turns = [(ROLES[turn["role"]], turn["content"].strip()) for turn in history]
    except (LookupError, TypeError, AttributeError):
        raise Refused("history_chat must be a list of turns with role and content") from None
    turns = [turn for turn in turns if turn[0] != "system"][-HISTORY:]
    question = text_of(item, "utt_user_most_recent").strip()
    if turns and turns[-1] == ("user", question):  # the history may end with it
        turns = turns[:-1]
    situation = f" The situation: {item['situation']}" if item.get("situation") else ""
    videos = media_of({"video": _clips(item)}, roots, "video")
    asked = [("system", SYSTEM + situation), *turns, ("user", "<video>" * len(videos) + question)]
    return conversation([*asked, ("assistant", answer)], videos) | {"dialogue": item.get("Dialogue_ID")}


def write(row: Row, sample: Sample) -> Item:
    parts = [line.partition(": ") for line in sample.answer.split("\n")]
    if tuple(name for name, _, _ in parts) != LINES:
        raise Refused(f"the answer must have the lines {', '.join(LINES)}")
    client, emotion, strategy, response = (text for _, _, text in parts)
    first, *turns, last = sample.messages
    is_placed = sum(isinstance(part, MediumRef) for part in last.content) == len(sample.media)
    if first.role != "system" or not first.text.startswith(SYSTEM) or not is_placed:
        raise Refused("it must begin with MESC's system turn, and have its videos in the last turn")
    if len(turns) > HISTORY or len(sample.media) > CLIPS:
        raise Refused(f"a dialogue has at most {HISTORY} earlier turns and {CLIPS} videos")
    return {
        "id": sample.id,
        "Dialogue_ID": row.get("dialogue"),
        "Utterance": response,
        "Emotion": emotion,
        "Strategy": strategy,
        "get_emotion_user_most_recent": client,
        "situation": first.text.removeprefix(SYSTEM).removeprefix(" The situation: "),
        "history_chat": [{"role": turn.role, "content": turn.text} for turn in turns],
        "utt_user_most_recent": last.text,
        CLIPS_KEY: [name_of(video, FPS) for video in sample.media],
    }


def _clips(item: Item) -> list[str]:
    clips = item.get(CLIPS_KEY) or []
    if not isinstance(clips, list):
        raise Refused(f"{CLIPS_KEY} must be a list of paths")
    return clips[-CLIPS:]


def _last(item: Item, key: str) -> str:
    value: Any = item.get(key)
    value = value[-1] if isinstance(value, list) and value else value
    if not isinstance(value, str) or not value.strip():
        raise Refused(f"{key} is missing or empty")
    return value.strip()


DIALECT = Dialect(
    read,
    "MESC, dialogues of MultiMood: several clips, history, four lines",
    lambda item: CLIPS_KEY in item,
    is_numbered=True,
    write=write,
)
