"""Reads a job's YAML file and dotted overrides into its typed config, and turns every mistake into a readable message.

Keys, defaults and meanings stand in `rlvid/config`; here is only the way from text to there and back. What counts,
last one wins: defaults, the YAML file, overrides from left to right.

Paths in the file (`model.path`, `data.train`, `run.dir`, ...) are relative to the current directory, not to the file,
so that a path means the same in the file and in an override. A leading `~` is the home folder.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from rlvid.errors import UserError

JobConfigT = TypeVar("JobConfigT", bound=BaseModel)

_Loc = tuple[str | int, ...]
_OVERRIDES_LAST = 1_000_000_000  # sorts mistakes in overrides behind those in lines of the file
_MAX_DEPTH = 40  # an alias that contains itself would never end

# YAML 1.1 reads 1e-6 as text (it asks for a dot), which nobody expects of a learning rate.
_FLOAT_WITHOUT_DOT = re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    pass


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT_WITHOUT_DOT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT_WITHOUT_DOT, list("-+0123456789"))


class _Origin(NamedTuple):
    """Where a value was written: sort order and words for the message."""

    order: int
    text: str


@dataclass
class _Draft:
    """The plain data so far, where each part of it was written, and what is wrong with it."""

    file: str
    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[_Loc, _Origin] = field(default_factory=dict)
    mistakes: list[tuple[int, str]] = field(default_factory=list)

    def blame(self, origin: _Origin, message: str) -> None:
        self.mistakes.append((origin.order, f"{origin.text}: {message}"))

    def origin_of(self, loc: _Loc) -> _Origin:
        """Where `loc`, or the nearest section around it, was written."""
        for length in range(len(loc), 0, -1):
            if loc[:length] in self.origins:
                return self.origins[loc[:length]]
        return _Origin(0, self.file)

    def culprit_of(self, loc: _Loc, message: str) -> _Origin:
        """For a rule over several keys: where the last written key that the message names stands."""
        words = set(re.findall(r"[\w.]*\w", message))
        named = [
            origin
            for known, origin in self.origins.items()
            if known[: len(loc)] == loc and {_dotted(known), _dotted(known[len(loc) :])} & words
        ]
        return max(named) if named else self.origin_of(loc)

    def set_origin(self, loc: _Loc, origin: _Origin) -> None:
        for known in [known for known in self.origins if known[: len(loc)] == loc]:
            del self.origins[known]
        self.origins[loc] = origin

    def raise_mistakes(self) -> None:
        if not self.mistakes:
            return
        lines = list(dict.fromkeys(text for _, text in sorted(self.mistakes, key=lambda mistake: mistake[0])))
        if len(lines) == 1:
            raise UserError(lines[0])
        raise UserError(f"{self.file}: {len(lines)} mistakes\n" + "\n".join(f"  {line}" for line in lines))


def load_config(cls: type[JobConfigT], path: Path, overrides: list[str]) -> JobConfigT:
    """Read `path` (YAML) and apply `overrides` (`key.sub=value`, the value in YAML).

    An override may name a section that the file does not have, may set a whole list or section
    (`model.tiny={layers: 2}` replaces it) and may index a list (`rewards.0.weight=2`; the index behind the last one
    appends).

    Raises:
        UserError: all mistakes at once, each with key, nearest known key, and file:line or the override's text.
    """
    draft = _Draft(file=str(path))
    _read_file(path, draft)
    for number, override in enumerate(overrides):
        _apply_override(cls, draft, override, _Origin(_OVERRIDES_LAST + number, f'override "{override}"'))
    return _validate(cls, draft)


def config_from_options(cls: type[JobConfigT], options: Mapping[str, str]) -> JobConfigT:
    """A config from command-line options (`{"train": "16"}` for `--train 16`), everything else at its default.

    Raises:
        UserError: as `load_config`, with the option in place of file and line.
    """
    draft = _Draft(file="options")
    for number, (key, text) in enumerate(options.items()):
        _apply_override(cls, draft, f"{key}={text}", _Origin(_OVERRIDES_LAST + number, f"--{key} {text}"))
    return _validate(cls, draft)


def dump_config(cfg: BaseModel) -> str:
    """The whole config as YAML, defaults included; `load_config` reads it back equal."""
    return yaml.dump(cfg.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _validate(cls: type[JobConfigT], draft: _Draft) -> JobConfigT:
    _find_truth_values_for_numbers(cls, draft)
    config: JobConfigT | None = None
    try:
        config = cls.model_validate(draft.data)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            _explain(cls, draft, detail)
    draft.raise_mistakes()
    assert config is not None
    return _expand_home(config)


# --- the file ---------------------------------------------------------------------------------------------------------


def _read_file(path: Path, draft: _Draft) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file{_nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot read the config file: {reason}") from None
    loaded = _parse_yaml(text, draft, _Origin(0, str(path)), ())
    if loaded is None:
        return
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected keys and values (`train:` and so on), got {_shown(loaded)}")
    draft.data = loaded


def _nearest_file(path: Path) -> str:
    siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _parse_yaml(text: str, draft: _Draft, origin: _Origin, loc: _Loc) -> Any:
    """Plain data of a YAML text. In a file (`origin.order` is 0), every key gets the origin of its line."""
    in_file = origin.order == 0
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _build(loader, node, draft, origin, loc, in_file)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{origin.text}:{mark.line + 1}" if in_file and mark is not None else origin.text
        hint = " (indent with spaces, not tabs)" if "'\\t'" in str(error.problem) else ""
        mend = "" if in_file else "; put text in quotes"
        raise UserError(f"{place}: not valid YAML: {error.problem or error.context}{hint}{mend}") from None
    except yaml.YAMLError as error:  # control characters, for example
        raise UserError(f"{origin.text}: not valid YAML: {str(error).splitlines()[0]}") from None
    except ValueError as error:  # a date that does not exist, for example
        raise UserError(f"{origin.text}: not valid YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _build(loader: _Loader, node: yaml.Node, draft: _Draft, origin: _Origin, loc: _Loc, in_file: bool) -> Any:
    if len(loc) > _MAX_DEPTH:
        raise UserError(f"{origin.text}: nested more than {_MAX_DEPTH} deep at line {node.start_mark.line + 1}")

    def place(at: yaml.Node) -> _Origin:
        line = at.start_mark.line + 1
        return _Origin(line, f"{draft.file}:{line}") if in_file else origin

    if isinstance(node, yaml.MappingNode):
        first_lines: dict[str, int] = {}
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in first_lines:
                first = f", first in line {first_lines[key]}" if in_file else ""
                draft.blame(place(key_node), f"key {_dotted((*loc, key))} stands twice{first}")
            first_lines.setdefault(key, key_node.start_mark.line + 1)
        loader.flatten_mapping(node)  # `<<: *anchor`
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)  # as written: `on:` and `8:` are text here, not a truth value and a number
            draft.set_origin((*loc, key), place(key_node))
            mapping[key] = _build(loader, value_node, draft, origin, (*loc, key), in_file)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        items: list[Any] = []
        for index, item in enumerate(node.value):
            draft.set_origin((*loc, index), place(item))
            items.append(_build(loader, item, draft, origin, (*loc, index), in_file))
        return items
    return loader.construct_object(node, deep=True)


# --- overrides --------------------------------------------------------------------------------------------------------


def _apply_override(cls: type[BaseModel], draft: _Draft, override: str, origin: _Origin) -> None:
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        draft.blame(origin, "expected key.sub=value")
        return
    scratch = _Draft(file=draft.file)  # origins inside the value are the override's own
    try:
        value = _parse_yaml(text, scratch, origin, ())
    except UserError as error:
        draft.mistakes.append((origin.order, str(error)))
        return
    draft.mistakes += scratch.mistakes

    here: Any = draft.data
    loc: _Loc = ()
    for part in parts[:-1]:
        key = _step_into(here, part)
        if key is None:
            draft.blame(origin, _no_way_into(loc, here, part))
            return
        if isinstance(here, list) and key == len(here):
            here.append({})
            draft.set_origin((*loc, key), origin)
        elif isinstance(here, dict) and here.get(key) is None:
            here[key] = _default_at(cls, (*loc, key))
            draft.set_origin((*loc, key), origin)
        here = here[key]
        loc = (*loc, key)
    last = _step_into(here, parts[-1])
    if last is None:
        draft.blame(origin, _no_way_into(loc, here, parts[-1]))
        return
    if isinstance(here, list) and last == len(here):
        here.append(value)
    else:
        here[last] = value
    draft.set_origin((*loc, last), origin)


def _step_into(container: Any, part: str) -> str | int | None:
    """The key or index that `part` names in `container`; None if there is no such place."""
    if isinstance(container, dict):
        return part
    if isinstance(container, list) and part.isdecimal() and int(part) <= len(container):
        return int(part)
    return None


def _no_way_into(loc: _Loc, container: Any, part: str) -> str:
    if isinstance(container, list):
        last = len(container)
        return f"{_dotted(loc)} is a list of {last}, its indices go from 0 to {last} (appends); got {part}"
    return f"{_dotted(loc)} is {_shown(container)}, it has no key {part}"


def _default_at(cls: type[BaseModel], loc: _Loc) -> Any:
    """What an override finds where the file says nothing: the default list, to be indexed, or a new section."""
    section = _section_at(cls, loc[:-1])
    info = section.model_fields.get(str(loc[-1])) if section is not None else None
    default = info.get_default(call_default_factory=True) if info is not None else None
    if isinstance(default, tuple | list):
        return [item.model_dump(exclude_unset=True) if isinstance(item, BaseModel) else item for item in default]
    return {}


# --- what is wrong ----------------------------------------------------------------------------------------------------

_EXPECTED = {  # pydantic's error type -> plain words
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "path_type": "must be a path",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a section (keys and values)",
    "model_type": "must be a section (keys and values)",
    "model_attributes_type": "must be a section (keys and values)",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "too_long": "must have at most {max_length} items",
    "too_short": "must have at least {min_length} items",
}


def _explain(cls: type[BaseModel], draft: _Draft, detail: Any) -> None:
    kind: str = detail["type"]
    loc = _as_written(draft.data, detail["loc"], keep_last=kind == "missing")
    origin = draft.origin_of(loc)
    key = _dotted(loc)
    if kind == "extra_forbidden":
        section = _section_at(cls, detail["loc"][:-1]) or _section_at(cls, loc[:-1])
        draft.blame(origin, f"unknown key {key}{_nearest_key(cls, section, loc)}")
    elif kind == "missing":
        draft.blame(origin, f"{key} is missing")
    elif kind == "union_tag_not_found":
        draft.blame(origin, f"{key}.{detail['ctx']['discriminator'].strip(chr(39))} is missing")
    elif kind == "value_error":
        message = str(detail["ctx"]["error"]) if "error" in detail.get("ctx", {}) else detail["msg"]
        is_named = not key or any(message.startswith(f"{key}{end}") for end in (" ", ".", "="))
        draft.blame(draft.culprit_of(loc, message), message if is_named else f"{key}: {message}")
    else:
        if kind == "union_tag_invalid":  # as a key with a wrong value
            name = detail["ctx"]["discriminator"].strip("'")
            origin, key = draft.origin_of((*loc, name)), f"{key}.{name}"
            ctx = {"expected": detail["ctx"]["expected_tags"]}
            detail, kind = {"type": "literal_error", "input": detail["input"][name], "ctx": ctx}, "literal_error"
        expected = _EXPECTED.get(kind)
        words = expected.format(**detail.get("ctx", {})) if expected else detail["msg"]
        got = _shown(detail["input"])
        hint = ""
        if kind == "literal_error" and isinstance(detail["input"], str):
            known = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
            near = difflib.get_close_matches(detail["input"], known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
        if kind == "string_type":
            hint = "; put text in quotes"
        draft.blame(origin, f"{key} {words}, got {got}{hint}" if key else f"{words}, got {got}{hint}")


def _as_written(data: Any, loc: _Loc, keep_last: bool) -> _Loc:
    """`loc` without the parts that pydantic adds for the branches of a union."""
    written: list[str | int] = []
    for index, part in enumerate(loc):
        has_it = part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data))
        if has_it:
            data = data[part]
            written.append(part)
        elif keep_last and index == len(loc) - 1:
            written.append(part)
    return tuple(written)


def _find_truth_values_for_numbers(cls: type[BaseModel], draft: _Draft) -> None:
    """`train.steps: yes` would be 1 for pydantic."""
    for loc, value in _leaves(draft.data, ()):
        sections = _sections_at(cls, loc[:-1] if isinstance(loc[-1], str) else loc[:-2])
        name = next(part for part in reversed(loc) if isinstance(part, str))
        field_ = next((s.model_fields[name] for s in sections if name in s.model_fields), None)
        if not isinstance(value, bool) or field_ is None:
            continue
        types = set(_flat_types(field_.annotation))
        if types & {int, float} and bool not in types:
            draft.blame(draft.origin_of(loc), f"{_dotted(loc)} must be a number, got {_shown(value)}")


def _leaves(data: Any, loc: _Loc) -> Iterator[tuple[_Loc, Any]]:
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in children:
        if isinstance(value, dict | list):
            yield from _leaves(value, (*loc, key))
        else:
            yield (*loc, key), value


def _flat_types(annotation: Any) -> Iterator[Any]:
    arguments = get_args(annotation)
    if not arguments:
        yield annotation
    for argument in arguments:
        yield from _flat_types(argument)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    for leaf in _flat_types(annotation):
        if isinstance(leaf, type) and issubclass(leaf, BaseModel):
            return leaf
    return None


def _section_at(cls: type[BaseModel], loc: _Loc) -> type[BaseModel] | None:
    return next(iter(_sections_at(cls, loc)), None)


def _sections_at(cls: type[BaseModel], loc: _Loc) -> list[type[BaseModel]]:
    """The section at `loc`. Of a union the branch whose tag is in `loc`, where pydantic puts it, or all branches."""
    sections: list[type[BaseModel]] = [cls]
    for part in loc:
        if not isinstance(part, str):
            continue
        if branches := [s for s in sections if (part,) in [get_args(f.annotation) for f in s.model_fields.values()]]:
            sections = branches
            continue
        known = next((s.model_fields[part] for s in sections if part in s.model_fields), None)
        leaves = _flat_types(known.annotation) if known is not None else ()
        sections = [leaf for leaf in leaves if isinstance(leaf, type) and issubclass(leaf, BaseModel)]
    return sections


def _known_keys(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in cls.model_fields.items():
        yield prefix + name
        section = _section_in(info.annotation)
        if section is not None:
            yield from _known_keys(
                section, f"{prefix}{name}." + ("0." if get_origin(info.annotation) in (tuple, list) else "")
            )


def _nearest_key(cls: type[BaseModel], section: type[BaseModel] | None, loc: _Loc) -> str:
    """First a key of the same section that is spelled alike, then the same name in another section."""
    name = str(loc[-1])
    siblings = list(section.model_fields) if section is not None else []
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.7)
    if close:
        return f"; did you mean {_dotted((*loc[:-1], close[0]))}?"
    everywhere = [key for key in _known_keys(cls) if key != _dotted(loc)]  # of another branch of the union
    same_name = [key for key in everywhere if key.split(".")[-1] == name]
    near = same_name or difflib.get_close_matches(_dotted(loc), everywhere, n=1, cutoff=0.7)
    if not near:
        last_names = {key.split(".")[-1]: key for key in reversed(everywhere)}
        near = [last_names[close] for close in difflib.get_close_matches(name, last_names, n=1, cutoff=0.8)]
    if near:
        return f"; did you mean {' or '.join(near[:3])}?"
    return f"; known here: {', '.join(siblings)}" if siblings else ""


def _dotted(loc: _Loc) -> str:
    return ".".join(str(part) for part in loc)


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a section"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- home -------------------------------------------------------------------------------------------------------------


def _expand_home(config: JobConfigT) -> JobConfigT:
    def expand(value: Any, loc: _Loc) -> Any:
        if isinstance(value, Path):
            try:
                return value.expanduser()
            except RuntimeError:
                raise UserError(f"{_dotted(loc)}: no home folder for {value}; write the path in full") from None
        if isinstance(value, dict):
            return {key: expand(item, (*loc, key)) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return [expand(item, (*loc, index)) for index, item in enumerate(value)]
        return value

    return type(config).model_validate(expand(config.model_dump(), ()))
