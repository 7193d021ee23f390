"""MMLA (arXiv 2504.16427): its tasks and labels, its tables as published, and the labels of its prompts.

A table is `<DATASET>/<split>.tsv` with id, text and label by the names of its header. Its video is
`video/<DATASET>_<id>.mp4`; three sets have none that may be passed on. The prompt is that of the training files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlvid.data.dialects.dialect import Dialect, Item, Refused, Roots, Row
from rlvid.types import Sample


@dataclass(frozen=True)
class Task:
    """What is asked about a data set."""

    name: str
    labels: str  # as the prompt lists them, in the order of MMLA's `labels_map`
    has_video: bool = True


_ACTS = (
    "greeting, question, answer, statement-opinion, statement-non-opinion, apology, command, agreement, disagreement, "
    "acknowledge, backchannel, others"
)
TASKS = {
    "MIntRec": Task(
        "intent",
        "complain, praise, apologise, thank, criticize, agree, taunt, flaunt, joke, oppose, comfort, care, inform, "
        "advise, arrange, introduce, leave, prevent, greet, ask for help",
    ),
    "MIntRec2.0": Task(
        "intent",
        "acknowledge, advise, agree, apologise, arrange, ask for help, asking for opinions, care, comfort, complain, "
        "confirm, criticize, doubt, emphasize, explain, flaunt, greet, inform, introduce, invite, joke, leave, oppose, "
        "plan, praise, prevent, refuse, taunt, thank, warn",
    ),
    "MELD": Task("emotion", "neutral, surprise, fear, sadness, joy, anger, disgust"),
    "IEMOCAP": Task("emotion", "angry, happy, sad, neutral, frustrated, excited", has_video=False),
    "MELD-DA": Task("dialogue act", _ACTS),
    "IEMOCAP-DA": Task("dialogue act", _ACTS, has_video=False),
    "MOSI": Task("sentiment", "positive, negative", has_video=False),
    "Ch-sims": Task("sentiment", "neutral, positive, negative"),
    "UR-FUNNY": Task("speaking style", "humorous, serious"),
    "MUStARD": Task("speaking style", "sincere, sarcastic"),
    "AnnoMi-therapist": Task("communication behavior", "question, therapist_input, reflection, other"),
    "AnnoMi-client": Task("communication behavior", "neutral, change, sustain"),
}
FOLDERS = {"CH-SIMSv2.0": "Ch-sims", "UR-FUNNY-v2": "UR-FUNNY"}  # other names in the published archives
COLUMNS = {
    "id": ("id",),
    "text": ("text", "utterance", "sentence", "context", "transcript", "content"),
    "label": ("label", "gold", "target", *(task.name.replace(" ", "_") for task in TASKS.values())),
}
_PROMPT = re.compile(r"candidate labels for (.+?) are: \[(.*?)\]", re.DOTALL)


def dataset_of(name: str) -> str | None:
    """The data set that a folder or file is named after."""
    name = FOLDERS.get(name, name)
    known = {key.casefold(): key for key in TASKS}
    return known.get(name.casefold())


def prompt(task: Task, text: str, sees_video: bool) -> str:
    """The prompt of MMLA's training files."""
    begin, based_on = "The", "text"
    if sees_video:
        begin, based_on = "You are presented with a video in which the", "text, video, and audio content"
    return (
        f"{begin} speaker says: {text} Based on the {based_on}, what is the {task.name} of this speaker?\n"
        f"The candidate labels for {task.name} are: [{task.labels}]. "
        f"Respond in the format: '{task.name}: [label]'. Only one label should be provided."
    )


def read(item: Item, roots: Roots, sees_video: bool) -> Row:
    folder = roots.file.parent if roots.file else Path()
    dataset = dataset_of(folder.name)
    if dataset is None:
        raise Refused(f"its folder is not named after a data set of MMLA: {', '.join(TASKS)}")
    task = TASKS[dataset]
    name, text, label = (_column(item, what) for what in ("id", "text", "label"))
    if label.lower() not in task.labels.split(", "):
        raise Refused(f"label {label!r} is none of {task.labels}")
    row: Row = {
        "id": f"{dataset}_{name}",
        "question": prompt(task, text, sees_video and task.has_video),
        "answer": f"{task.name}: {label.lower()}",
        "problem_type": dataset,
        "text": text,
    }
    if sees_video and task.has_video:
        file = f"video/{dataset}_{name}.mp4"
        row["video"] = roots.find(file, f"{folder.name}/{file}", f"{dataset}/{file}")
    return row


def write(row: Row, sample: Sample) -> Item:
    dataset = row.get("problem_type")
    if dataset not in TASKS:
        raise Refused(f"problem_type {dataset!r} is no data set of MMLA: {', '.join(TASKS)}")
    _, _, label = sample.answer.partition(": ")
    return {"folder": dataset, "id": sample.id.removeprefix(f"{dataset}_"), "text": row["text"], "label": label}


def _column(item: Item, what: str) -> str:
    for name in COLUMNS[what]:
        if isinstance(value := item.get(name), str) and value.strip():
            return value.strip()
    raise Refused(f"it has no column {what} (one of {', '.join(dict.fromkeys(COLUMNS[what]))})")


def task_of(question: str) -> tuple[str, str] | None:
    """Name of the task, and the text between the brackets, of a prompt that lists candidate labels."""
    found = _PROMPT.search(question)
    return (found[1], found[2]) if found else None


def label_faults(question: str, answer: str) -> list[str]:
    """What is wrong with an answer to a prompt that lists its candidate labels; nothing for other prompts."""
    if (found := task_of(question)) is None:
        return []
    task, listed = found
    faults = []
    labels = [label.strip() for label in listed.split(",")]
    if any(re.fullmatch(r"(['\"]).*\1", label) for label in labels):
        faults.append("candidate labels in quotes, as a Python list")
        labels = [label.strip("'\"") for label in labels]
    head, _, label = map(str.strip, answer.partition(":"))
    if head != task:
        faults.append("answers that name another task than their prompt")
    if label in labels:
        return faults
    if len(labels) == 1 and label and label in labels[0]:
        return [*faults, "candidate labels without separators"]
    if label.lower() in labels:
        return [*faults, "labels that differ from the candidates by case"]
    return [*faults, "labels that are none of the candidates"]


def _is_table(item: Item) -> bool:
    return "conversations" not in item and all(any(name in item for name in names) for names in COLUMNS.values())


DIALECT = Dialect(
    partial(read, sees_video=True), "MMLA's tables, with video where it may be passed on", _is_table, write=write
)
TEXT = Dialect(partial(read, sees_video=False), "MMLA's tables, text alone", lambda item: False, write=write)
