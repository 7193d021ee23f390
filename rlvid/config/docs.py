"""Writes docs/configuration.md from the classes in `rlvid/config`: every key, its type, default and meaning.

`python -m rlvid.config.docs` writes the page, `--check` only says whether it is current (exit code 1 if not). A job is
a class of `rlvid.config` whose name ends in JobConfig, a section is a pydantic class that some key holds: new ones are
found, nothing is listed here. Meanings are the docstrings below the keys.
"""

from __future__ import annotations

import argparse
import collections.abc
import difflib
import enum
import itertools
import re
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlvid.config import jobs as config_jobs

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"

_LISTS = (tuple, list, set, frozenset, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)
_NOUNS: dict[Any, tuple[str, str]] = {  # one, many
    bool: ("true or false", "true or false"),
    int: ("whole number", "whole numbers"),
    float: ("number", "numbers"),
    str: ("text", "texts"),
    Path: ("path", "paths"),
    Any: ("anything", "anything"),
}

_HEAD = """\
<!-- Written by `make docs` from rlvid/config. What is changed here is overwritten. -->

# Configuration

A job reads one YAML file; `key.sub=value` on the command line overrides it:

```bash
rlvid grpo my.yaml train.steps=200 rollout.replicas=2 'rewards=[{kind: exact}]'
```

Whatever neither says has its default. The order, last one wins: defaults, the file, overrides from left to right.
`rlvid COMMAND my.yaml --dry-run` prints the outcome, every key included, and starts nothing; a run keeps it as
`config.yaml` in its run folder. The files in [jobs/configs](../jobs/configs) are there to start from.

## How values are written

```yaml
model:
  path: ~/models/Qwen2-VL-2B-Instruct  # ~ is the home folder; other paths start at the current directory, not here
train:
  lr: 1e-6                             # a number; 0.000001 is the same
  betas: [0.9, 0.99]                   # a list
data:
  train: clips/train.jsonl
  suffix: "Answer: A or B."            # text with a colon needs quotes
  eval:                                # nothing behind the colon is empty
rewards:                               # a list of sections
  - kind: format
    tags: [think, answer]
    weight: 0.1
  - kind: choice
    tags: [answer]
```

- An override's value is YAML too: `train.shared_prefix=false`, `model.path=null` for empty. The shell takes away one
  layer of quotes: `'train.betas=[0.9, 0.99]'`, `'data.suffix="Answer: A or B."'`.
- A list is set as a whole (`'rewards=[{kind: exact}]'`) or by index, from 0: `rewards.0.weight=2` changes the first
  item, the index behind the last one appends. In the tables an item's index is N. A list in the file takes the place
  of the default, the two are not merged.
- A section is set key by key; a whole one (`'model.tiny={layers: 2}'`) takes the place of what the file says.
- "empty" is YAML's `null`, or nothing behind the colon.
- A key that is unknown or stands twice, a value of the wrong type or out of bounds: all of them are named at once,
  with file, line and the nearest known key, before anything starts (exit code 2). `yes` and `on` are not numbers, and
  numbers are not text.
"""


class Key(NamedTuple):
    """One row of a table."""

    name: str  # dotted, with N for the index in a list
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Block:
    """The keys of one section of one job."""

    name: str  # dotted; "" for the job itself
    meaning: str
    keys: tuple[Key, ...]


# --- what there is ----------------------------------------------------------------------------------------------------


def job_classes() -> dict[str, type[BaseModel]]:
    """Name of the command (`grpo`; the first words of the docstring, "`rlvid grpo`") -> class, in the file's order."""
    jobs = {}
    for cls in vars(config_jobs).values():
        if isinstance(cls, type) and issubclass(cls, BaseModel) and cls.__name__.endswith("JobConfig"):
            named = re.match(r"`rlvid ([\w-]+)`", _docstring(cls))
            if cls is not config_jobs.JobConfig:
                jobs[named[1] if named else cls.__name__] = cls
    return jobs


def blocks_of(cls: type[BaseModel], name: str = "", around: tuple[type, ...] = ()) -> Iterator[Block]:
    """The block of a section or job, then those of the sections in it. A section inside itself is not entered again."""
    prefix = f"{name}." if name else ""
    keys = (_key(prefix + key, info) for key, info in cls.model_fields.items())
    yield Block(name, _docstring(cls), tuple(keys))
    for key, info in cls.model_fields.items():
        for place, section in _headings(info.annotation, prefix + key):
            if section not in (*around, cls):
                yield from blocks_of(section, place, (*around, cls))


def _key(name: str, info: FieldInfo) -> Key:
    """The name of a variant (see `_variant`) belongs to its block only."""
    name = re.sub(r" \([^)]*\)", "", name)
    return Key(name, _type_words(info.annotation, info.metadata), _default(info), _one_line(info.description or ""))


def _headings(annotation: Any, place: str) -> list[tuple[str, type[BaseModel]]]:
    """The sections that a key's type can hold, and the headings of their blocks."""
    inner = list(_sections(annotation, place))
    several = {name for name, _ in inner if sum(name == other for other, _ in inner) > 1}
    return [(f"{name} ({_variant(section)})" if name in several else name, section) for name, section in inner]


def _sections(annotation: Any, place: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """The sections that a key's type can hold, and their dotted names."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield place, annotation
    elif origin is Annotated:
        yield from _sections(arguments[0], place)
    elif origin in _MAPPINGS:
        yield from _sections(arguments[1], f"{place}.NAME")
    elif origin is not Literal:
        for argument in dict.fromkeys(arguments):
            yield from _sections(argument, f"{place}.N" if origin in _LISTS else place)


def _variant(section: type[BaseModel]) -> str:
    """What tells a section from the others that may stand in its place: its key with one allowed value."""
    for key, info in section.model_fields.items():
        if get_origin(info.annotation) is Literal and len(values := get_args(info.annotation)) == 1:
            return f"{key}: {as_yaml(values[0])}"
    return section.__name__.removesuffix("Config")


def _docstring(cls: type) -> str:
    return _one_line(cls.__dict__.get("__doc__") or "")  # not the base class's


def _one_line(text: str) -> str:
    return " ".join(text.split())


# --- types, bounds and defaults in words ------------------------------------------------------------------------------


def _type_words(annotation: Any, bounds: Sequence[Any] = (), many: bool = False) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_words(arguments[0], (*bounds, *arguments[1:]), many)
    if origin in (Union, types.UnionType):
        kept = [_type_words(a, bounds, many) for a in arguments if a is not type(None)]
        return " or ".join(dict.fromkeys(kept)) + (", or empty" if len(kept) < len(arguments) else "")
    if origin is Literal:
        return _either([as_yaml(value) for value in arguments])
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return _either([as_yaml(member.value) for member in annotation])
    if origin in _LISTS or annotation in _LISTS:
        words = _list_words(origin or annotation, arguments, many)
        return words + _bound_words(bounds, "item")
    if origin in _MAPPINGS or annotation in _MAPPINGS:
        name, value = arguments or (str, Any)
        return f"section of {_type_words(name)}: {_type_words(value)}" + _bound_words(bounds, "key")
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "sections" if many else "section"
    noun = _NOUNS.get(annotation, 2 * (f"`{getattr(annotation, '__name__', annotation)}`",))[many]
    limits = _bound_words(bounds, "character")
    return noun + (limits.replace(", ", ", each ", 1) if many else limits)


def _list_words(kind: Any, arguments: tuple[Any, ...], many: bool) -> str:
    start = "lists of " if many else "list of "
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:  # a fixed number of items
        if len(set(arguments)) == 1:
            return f"{start}{len(arguments)} {_type_words(arguments[0], many=len(arguments) > 1)}"
        return f"{start}{len(arguments)}: " + ", then ".join(_type_words(a) for a in arguments)
    return start + _type_words(arguments[0] if arguments else Any, many=True)


def _bound_words(bounds: Sequence[Any], unit: str) -> str:
    words = []
    for bound in itertools.chain.from_iterable(_flat(b) for b in bounds):
        match bound:
            case annotated_types.Ge(least):
                words.append(f"at least {as_yaml(least)}")
            case annotated_types.Gt(limit):
                words.append(f"more than {as_yaml(limit)}")
            case annotated_types.Le(most):
                words.append(f"at most {as_yaml(most)}")
            case annotated_types.Lt(limit):
                words.append(f"less than {as_yaml(limit)}")
            case annotated_types.MultipleOf(factor):
                words.append(f"a multiple of {as_yaml(factor)}")
            case annotated_types.MinLen(least):
                words.append(f"at least {least} {unit}{'s' if least != 1 else ''}")
            case annotated_types.MaxLen(most):
                words.append(f"at most {most} {unit}{'s' if most != 1 else ''}")
            case _ if getattr(bound, "pattern", None):
                words.append(f"matching `{bound.pattern}`")
    return "".join(f", {word}" for word in words)


def _flat(bound: Any) -> Iterator[Any]:
    """A bound, or those that are packed in a Field or in one of annotated_types' groups."""
    if isinstance(bound, FieldInfo):
        yield from bound.metadata
    elif isinstance(bound, annotated_types.GroupedMetadata):
        yield from bound
    else:
        yield bound


def _either(values: list[str]) -> str:
    coded = [f"`{value}`" if value else "empty" for value in values]
    return coded[0] if len(coded) == 1 else f"{', '.join(coded[:-1])} or {coded[-1]}"


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    if info.default_factory_takes_validated_data:
        return "by other keys"
    default = info.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        return "see there"
    return f"`{text}`" if (text := as_yaml(default)) else "empty"


def as_yaml(value: Any) -> str:
    """A value as it is written in a file, on one line; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, enum.Enum):
        return as_yaml(value.value)
    if isinstance(value, int | float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, BaseModel):
        return as_yaml(value.model_dump(exclude_defaults=True))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_yaml(key)}: {as_yaml(item) or 'null'}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list | set | frozenset):
        return "[" + ", ".join(as_yaml(item) or "null" for item in value) + "]"
    text = yaml.safe_dump(str(value), default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


# --- the page ---------------------------------------------------------------------------------------------------------


def page() -> str:
    """The whole of docs/configuration.md."""
    jobs = job_classes()
    blocks: dict[str, dict[str, Block]] = {}  # name of the section -> job -> its block there
    for job, cls in jobs.items():
        for block in blocks_of(cls):
            blocks.setdefault(block.name, {})[job] = block
    parts = [_HEAD, _jobs_table(jobs)]
    for name in sorted(blocks, key=_top_level_order(blocks)):
        if name:
            parts.append(_section_text(name, blocks[name], list(jobs)))
    return "\n".join(parts)


def _top_level_order(blocks: dict[str, dict[str, Block]]) -> Any:
    """Sections stay behind the one they lie in, also those that only a later job has."""
    order = {name: position for position, name in enumerate(blocks)}

    def place(name: str) -> list[int]:
        parts = name.split(".")
        prefixes = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        return [order[prefix] for prefix in prefixes if prefix in order]

    return place


def _jobs_table(jobs: dict[str, type[BaseModel]]) -> str:
    rows = ["| key or section | meaning | " + " | ".join(f"`{job}`" for job in jobs) + " |"]
    rows.append("|---" * (2 + len(jobs)) + "|")
    names = dict.fromkeys(name for cls in jobs.values() for name in cls.model_fields)
    for name in names:
        holders = {job: cls.model_fields[name] for job, cls in jobs.items() if name in cls.model_fields}
        info = next(iter(holders.values()))
        sections = _headings(info.annotation, name)
        meaning = info.description or (_docstring(sections[0][1]) if sections else "")
        if len(sections) and isinstance(info.get_default(call_default_factory=True), BaseModel | type(None)):
            shown = f"[`{name}`](#{_anchor(name)})"
        elif sections:
            shown = f"[`{name}`](#{_anchor(sections[0][0])})"
            meaning = f"{meaning} {_capital(_type_words(info.annotation, info.metadata))}; default {_default(info)}."
        else:
            shown = f"`{name}`"
            meaning = f"{meaning} {_capital(_type_words(info.annotation, info.metadata))}; default {_default(info)}."
        marks = ("✓" if job in holders else "" for job in jobs)
        rows.append(f"| {shown} | {_cell(meaning)} | " + " | ".join(marks) + " |")
    meanings = [f"- {_one_line(cls.__dict__.get('__doc__') or job)}" for job, cls in jobs.items()]
    return "\n".join(["## Jobs and their sections", "", *meanings, "", *rows, ""])


def _trainers(jobs: list[str]) -> set[str]:
    """The jobs that share their sections; a sweep has keys of its own and none of theirs."""
    return {job for job in jobs if issubclass(job_classes()[job], config_jobs.JobConfig)}


def _section_text(name: str, by_job: dict[str, Block], all_jobs: list[str]) -> str:
    lines = [f"{'#' * min(2 + _depth(name), 6)} `{name}`", ""]
    if set(by_job) != _trainers(all_jobs) and not _depth(name):
        lines += [f"Only in {_either(list(by_job))}.", ""]
    meanings = dict.fromkeys(block.meaning for block in by_job.values() if block.meaning)
    lines += [f"{' '.join(map(_text, meanings))}", ""] if meanings else []
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    rows: dict[Key, list[str]] = {}
    for job, block in by_job.items():
        for key in block.keys:
            rows.setdefault(key, []).append(job)
    for key, having in rows.items():
        remark = "" if len(having) == len(by_job) else f" (in {_either(having)})"
        cells = (f"`{key.name}`{remark}", key.type, key.default, key.meaning)
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join([*lines, ""])


def _depth(name: str) -> int:
    return sum(part not in ("N", "NAME") for part in name.split(" (")[0].split(".")) - 1


def _anchor(heading: str) -> str:
    """As GitHub makes them."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|").strip()


def _text(text: str) -> str:
    """Angle brackets outside code are not tags."""
    parts = re.split(r"(`[^`]*`)", _one_line(text))
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlvid.config.docs", description="Write docs/configuration.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is not current")
    arguments = parser.parse_args(argv)
    new = page()
    old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if not arguments.check:
        PAGE.write_text(new, encoding="utf-8")
        return 0
    if new == old:
        return 0
    changes = difflib.unified_diff(old.splitlines(), new.splitlines(), "docs/configuration.md", "rlvid/config", n=0)
    shown = [line if len(line) <= 160 else line[:157] + "..." for line in itertools.islice(changes, 12)]
    print("\n".join([*shown, "docs/configuration.md is not current: make docs"]), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
