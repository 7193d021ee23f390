"""Reads a job's YAML file and dotted overrides into its typed config, and turns every mistake into a readable message.

Later values win: defaults, the file, overrides from left to right.

Paths in the file (`model.path`, `data.train`, `run.dir`, ...) are relative to the current directory, not to the file.
So a path means the same in the file and in an override. A leading `~` is the home folder.

A file written for one job can be given to another: top-level sections that only other jobs have are ignored, with a
notice that names them. In an override such a section is an error, like every other unknown key.
"""

from __future__ import annotations

import copy
import difflib
import functools
import io
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, SequenceNode

from rlvid.config.jobs import JOB_CONFIGS, JobConfig
from rlvid.config.keys import keys_of, schemas_of, siblings_of
from rlvid.errors import UserError

ConfigT = TypeVar("ConfigT", bound=BaseModel)

_Loc = tuple[str | int, ...]
_Origin = tuple[int, str]  # where a value was written: line in the file or order after it, words for the message
_OVERRIDES_LAST = 1_000_000_000  # sorts mistakes in overrides after those in the file


@dataclass
class _Draft:
    """The plain data so far, where each part of it was written, and what is wrong with it."""

    file: str
    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[_Loc, _Origin] = field(default_factory=dict)
    mistakes: list[_Origin] = field(default_factory=list)  # with the whole message

    def blame(self, origin: _Origin, message: str) -> None:
        self.mistakes.append((origin[0], f"{origin[1]}: {message}"))

    def origin_of(self, loc: _Loc) -> _Origin:
        """Where `loc`, or the nearest section around it, was written."""
        prefixes = (loc[:length] for length in range(len(loc), 0, -1))
        return next((self.origins[p] for p in prefixes if p in self.origins), (0, self.file))

    def origin_of_rule(self, loc: _Loc, message: str) -> _Origin:
        """For a rule over several keys of the section `loc`: where the last key that the message names was written."""
        words = set(re.findall(r"[\w.]*\w", message))
        inside = [(known, origin) for known, origin in self.origins.items() if known[: len(loc)] == loc]
        named = [origin for known, origin in inside if {_dotted(known), _dotted(known[len(loc) :])} & words]
        return max(named, default=self.origin_of(loc))

    def set_origin(self, loc: _Loc, origin: _Origin) -> None:
        self.origins = {known: o for known, o in self.origins.items() if known[: len(loc)] != loc} | {loc: origin}


def load_config(cls: type[ConfigT], path: Path, overrides: list[str]) -> ConfigT:
    """Read `path` (YAML) and apply `overrides` (`key.sub=value`, the value in YAML).

    An override may name a section that the file does not have, may set a whole list or section
    (`model.tiny={layers: 2}` replaces it) and may index a list (`rewards.0.weight=2`; the index after the last one
    appends).

    Raises:
        UserError: all mistakes at once, each with key, nearest known key, and file:line or the override's text.
    """
    draft = _Draft(file=str(path))
    _read_file(path, draft)
    jobs = [job for job in JOB_CONFIGS.values() if issubclass(job, JobConfig) and issubclass(cls, JobConfig)]
    others = {key for job in jobs for key in job.model_fields} - cls.model_fields.keys()
    if ignored := sorted(others & draft.data.keys()):
        _notify(f"{path}: ignored, sections of other jobs: {', '.join(ignored)}")
    draft.data = {key: value for key, value in draft.data.items() if key not in ignored}
    return _finish(cls, draft, ((override, f'override "{override}"') for override in overrides))


def config_from_options(cls: type[ConfigT], options: Mapping[str, str]) -> ConfigT:
    """A config from command-line options (`{"train": "16"}` for `--train 16`), everything else at its default.

    Raises:
        UserError: as `load_config`, with the option instead of file and line.
    """
    overrides = ((f"{key}={text}", f"--{key} {text}") for key, text in options.items())
    return _finish(cls, _Draft(file="options"), overrides)


def dump_config(cfg: BaseModel) -> str:
    """The whole config as YAML, defaults included; `load_config` reads it back equal."""
    yaml, text = YAML(), io.StringIO()
    yaml.width = 120
    yaml.dump(cfg.model_dump(mode="json"), text)
    return text.getvalue()


def read_yaml(text: str) -> Any:
    """Plain data of a YAML text.

    Raises:
        ValueError: it is not valid YAML.
    """
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from None


def _finish(cls: type[ConfigT], draft: _Draft, overrides: Iterable[tuple[str, str]]) -> ConfigT:
    """Apply `overrides`, (text, words for messages) each, and validate."""
    for order, (override, words) in enumerate(overrides, start=_OVERRIDES_LAST):
        _apply_override(cls, draft, override, (order, words))
    try:
        config = cls.model_validate(draft.data)
        if not draft.mistakes:
            return config
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            _explain(cls, draft, detail)
    lines = list(dict.fromkeys(text for _, text in sorted(draft.mistakes, key=lambda mistake: mistake[0])))
    raise UserError("\n  ".join([f"{draft.file}: {len(lines)} mistakes"] * (len(lines) > 1) + lines))


# --- YAML -------------------------------------------------------------------------------------------------------------


@functools.cache  # a sweep reads a file for each of its keys
def _notify(text: str) -> None:
    print(f"rlvid: {text}", file=sys.stderr)


def _read_file(path: Path, draft: _Draft) -> None:
    try:
        data = _parse(path.read_text(encoding="utf-8"), draft, (0, str(path)))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise UserError(f"{path}: no such config file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot read the config file: {reason}") from None
    if not isinstance(data, dict | None):
        raise UserError(f"{path}: expected keys and values (`train:` and so on), got {_shown(data)}")
    draft.data = data or {}


def _parse(text: str, draft: _Draft, origin: _Origin) -> Any:
    """Plain data of a YAML text. In a file (whose `origin` is at 0), every key gets the origin of its line."""
    yaml = YAML(typ="safe", pure=True)

    def place(mark: Any) -> _Origin:
        return origin if origin[0] or mark is None else (mark.line + 1, f"{draft.file}:{mark.line + 1}")

    def build(node: Any, loc: _Loc) -> Any:
        if isinstance(node, SequenceNode):
            for index, item in enumerate(node.value):
                draft.set_origin((*loc, index), place(item.start_mark))
            return [build(item, (*loc, index)) for index, item in enumerate(node.value)]
        if not isinstance(node, MappingNode):
            return yaml.constructor.construct_object(node, deep=True)
        names = [str(key.value) for key, _ in node.value]  # as written: `8:` is text here
        for index, name in enumerate(names):
            if name in names[:index]:
                first, again = node.value[names.index(name)][0].start_mark, node.value[index][0].start_mark
                where = "" if origin[0] else f", first in line {first.line + 1}"
                draft.blame(place(again), f"key {_dotted((*loc, name))} appears twice{where}")
        yaml.constructor.flatten_mapping(node)  # puts the keys of `<<: *anchor` before the mapping's own
        for key, _ in node.value:
            draft.set_origin((*loc, str(key.value)), place(key.start_mark))
        return {str(key.value): build(value, (*loc, str(key.value))) for key, value in node.value}

    try:
        node = yaml.compose(io.StringIO(text))
        return None if node is None else build(node, ())
    except MarkedYAMLError as error:
        hint = " (indent with spaces, not tabs)" if "'\\t'" in str(error.problem) else ""
        hint += "; put text in quotes" if origin[0] else ""
        where = place(error.problem_mark or error.context_mark)[1]
        raise UserError(f"{where}: not valid YAML: {error.problem or error.context}{hint}") from None
    except RecursionError:
        raise UserError(f"{origin[1]}: an alias contains itself, or sections are nested too deep") from None
    except (YAMLError, ValueError) as error:  # control characters, a date that does not exist
        raise UserError(f"{origin[1]}: not valid YAML: {str(error).splitlines()[0]}") from None


def _apply_override(cls: type[BaseModel], draft: _Draft, override: str, origin: _Origin) -> None:
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        return draft.blame(origin, "expected key.sub=value")
    scratch = _Draft(file=draft.file)  # origins inside the value are the override's own
    try:
        value = _parse(text, scratch, origin)
    except UserError as error:
        scratch.mistakes.append((origin[0], str(error)))
    draft.mistakes += scratch.mistakes
    if scratch.mistakes:
        return None

    here: Any = draft.data
    loc: _Loc = ()
    for part in parts:
        if isinstance(here, dict):
            here.setdefault(part)
            loc = (*loc, part)
        elif isinstance(here, list) and part.isdecimal() and int(part) <= len(here):
            here += [None] * (int(part) == len(here))
            loc = (*loc, int(part))
        elif isinstance(here, list):
            n = len(here)
            message = f"{_dotted(loc)} is a list of {n}, its indices are 0 to {n} ({n} appends); got {part}"
            return draft.blame(origin, message)
        else:
            return draft.blame(origin, f"{_dotted(loc)} is {_shown(here)}, it has no key {part}")
        is_last = len(loc) == len(parts)
        if is_last or here[loc[-1]] is None:
            here[loc[-1]] = value if is_last else _default_of(cls, loc)
            draft.set_origin(loc, origin)
        here = here[loc[-1]]
    return None


def _default_of(cls: type[BaseModel], loc: _Loc) -> Any:
    """What an override finds where the file says nothing: the default list, to be indexed, or a new section."""
    default = next((schema.get("default") for schema in schemas_of(cls, _dotted(loc))), None)
    return copy.deepcopy(default) if isinstance(default, list) else {}


# --- what is wrong ----------------------------------------------------------------------------------------------------

_NOUNS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "path": "a path"}
_NOUNS |= {"tuple": "a list", "list": "a list"} | dict.fromkeys(("dict", "model"), "a section (keys and values)")
"""First word of pydantic's error type -> what was expected."""


def _explain(cls: type[BaseModel], draft: _Draft, detail: Any) -> None:
    kind, context, got = detail["type"], detail.get("ctx", {}), detail["input"]
    loc, hint = _as_written(draft.data, detail["loc"], keep_last=kind == "missing"), ""
    noun = _NOUNS.get(kind.split("_")[0])
    message = f"must be {noun}" if noun else re.sub(r"^\w+ should", "must", detail["msg"].split(" after")[0])
    message = message.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    if kind.startswith("union_tag"):  # the key that names the kind of a section
        loc = (*loc, context["discriminator"].strip("'"))
        kind = "missing" if kind == "union_tag_not_found" else "literal_error"
        got, message = got.get(loc[-1]) if isinstance(got, dict) else got, f"must be {context.get('expected_tags')}"
    key = _dotted(loc)
    if kind == "extra_forbidden":
        return draft.blame(draft.origin_of(loc), f"unknown key {key}{_nearest_key(cls, loc, detail['loc'])}")
    if kind == "missing":
        return draft.blame(draft.origin_of(loc), f"{key} is missing")
    if kind == "value_error":
        message = str(context["error"])
        is_named = not key or re.match(rf"{re.escape(key)}[ .=:]", message)
        return draft.blame(draft.origin_of_rule(loc, message), message if is_named else f"{key}: {message}")
    if kind == "literal_error" and isinstance(got, str):
        near = difflib.get_close_matches(got, re.findall(r"'([^']*)'", message), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
    hint = "; put text in quotes" if noun == "text" else hint
    return draft.blame(draft.origin_of(loc), f"{key} {message}, got {_shown(got)}{hint}".strip())


def _as_written(data: Any, loc: _Loc, keep_last: bool) -> _Loc:
    """`loc` without the parts that pydantic adds for the kinds of a section."""
    written: list[str | int] = []
    for part in loc[:-1] if keep_last else loc:
        with suppress(LookupError, TypeError):
            data = data[part]
            written.append(part)
    return (*written, loc[-1]) if keep_last else tuple(written)


def _nearest_key(cls: type[BaseModel], loc: _Loc, tags: _Loc) -> str:
    """First a key of the same section that is spelled alike, then one of another section."""
    siblings = siblings_of(cls, _dotted(loc), tags)
    near = difflib.get_close_matches(str(loc[-1]), siblings, n=1, cutoff=0.7)
    near = [_dotted((*loc[:-1], name)) for name in near]
    if not near:
        by_name = {key: key.split(".")[-1] for key, _ in keys_of(cls)}
        close = difflib.get_close_matches(str(loc[-1]), set(by_name.values()), n=1, cutoff=0.8)
        near = [key for key, name in by_name.items() if name in close][:3]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; known here: {', '.join(siblings)}" if siblings else ""


def _dotted(loc: _Loc) -> str:
    return ".".join(str(part) for part in loc)


def _shown(value: Any) -> str:
    if isinstance(value, bool | None):
        return {None: "nothing", True: "true", False: "false"}[value]
    text = "a section" if isinstance(value, dict) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
