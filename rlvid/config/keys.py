"""What a config class says about its own keys, read from its JSON schema.

Keys are dotted: `rollout.max_tokens`, `rewards.N.weight` (N is the index in a list), `space.NAME` (a free name).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from rlvid.errors import UserError

Schema = dict[str, Any]

_EXPECTED = {
    "file-path": (Path.is_file, "a file"),
    "directory-path": (Path.is_dir, "a folder"),
    "checkpoint-path": (lambda path: (path / "config.json").is_file(), "a checkpoint folder with a config.json"),
}
"""`format` of a path that must exist -> its check, and what it is."""


class _ShortDefaults(GenerateJsonSchema):
    """A default names only the keys that it sets."""

    def encode_default(self, default: Any) -> Any:
        return TypeAdapter(Any).dump_python(default, mode="json", exclude_unset=True)


@functools.cache
def sections_of(cls: type[BaseModel]) -> tuple[tuple[str, Schema], ...]:
    """Dotted name and JSON schema of a config ("" is its name) and of every section in it.

    A name appears once for each kind of section that it may hold. A section inside itself is not entered again.
    """
    root = cls.model_json_schema(schema_generator=_ShortDefaults)
    definitions = root.pop("$defs", {})

    def enter(name: str, section: Schema, around: tuple[str, ...]) -> Iterator[tuple[str, Schema]]:
        yield name, section
        for key, schema in section.get("properties", {}).items():
            for place, inner in _references(schema, f"{name}.{key}".lstrip(".")):
                if inner not in around:
                    yield from enter(place, definitions[inner], (*around, inner))

    return tuple(enter("", root, (cls.__name__,)))


def _references(schema: Schema, place: str) -> Iterator[tuple[str, str]]:
    """(dotted name, name of the definition) of the sections that a value may hold."""
    if "$ref" in schema:
        yield place, schema["$ref"].rsplit("/", 1)[1]
    for alternative in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from _references(alternative, place)
    for item in (*schema.get("prefixItems", ()), schema.get("items")):
        if isinstance(item, dict):
            yield from _references(item, f"{place}.N")
    if isinstance(values := schema.get("additionalProperties"), dict):
        yield from _references(values, f"{place}.NAME")


@functools.cache
def keys_of(cls: type[BaseModel]) -> list[tuple[str, Schema]]:
    """Every key with its schema. A key appears once for each kind of section that has it."""
    return [
        (f"{name}.{key}".lstrip("."), schema)
        for name, section in sections_of(cls)
        for key, schema in section.get("properties", {}).items()
    ]


def _is_at(name: str, key: str) -> bool:
    """Whether a written key (`rewards.0.kind`) is the one of this name (`rewards.N.kind`)."""
    parts = ({"N": r"\d+", "NAME": ".+"}.get(part, re.escape(part)) for part in name.split("."))
    return re.fullmatch(r"\.".join(parts), key) is not None


def schemas_of(cls: type[BaseModel], key: str) -> list[Schema]:
    """The schemas of a key as it is written in a file or an override; empty for an unknown key."""
    return [schema for name, schema in keys_of(cls) if _is_at(name, key)]


def siblings_of(cls: type[BaseModel], key: str, tags: Collection[object]) -> list[str]:
    """Names of the keys beside a written key. `tags` tell the kind of section where there are several."""
    found: dict[str, None] = {}
    for name, section in sections_of(cls):
        kinds = {schema["const"] for schema in section["properties"].values() if "const" in schema}
        if _is_at(name, key.rpartition(".")[0]) and kinds <= set(tags):
            found |= dict.fromkeys(section["properties"])
    return list(found)


def may_change_on_resume(cls: type[BaseModel], key: str) -> bool:
    """Whether a run may be resumed with another value of `key`, because the key or a section around it says so."""
    parts = key.split(".")
    prefixes = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return any("on_resume" in schema for prefix in prefixes for schema in schemas_of(cls, prefix))


def check_paths(cfg: BaseModel) -> None:
    """Check that every input that the config names is on the disk. Jobs call it before they make anything.

    Raises:
        UserError: all paths that are missing, each with its key.
    """
    wrong = []
    for key, path in flatten(cfg.model_dump()).items():
        kinds = [kind for schema in schemas_of(type(cfg), key) for kind in (schema, *schema.get("anyOf", ()))]
        for form in {kind.get("format") for kind in kinds} & _EXPECTED.keys() if isinstance(path, Path) else ():
            is_right, what = _EXPECTED[form]
            if not is_right(path):
                wrong.append(f"{key}: {path} {'is not' if path.exists() else 'does not exist; expected'} {what}")
    if wrong:
        raise UserError("\n  ".join(wrong))


def flatten(data: Any, key: str = "") -> dict[str, Any]:
    """Dotted key -> value. Lists of sections are entered, other lists are values."""
    if isinstance(data, list | tuple) and data and all(isinstance(item, dict) for item in data):
        data = dict(enumerate(data))
    if not isinstance(data, dict) or not data:
        return {key: data}
    return {k: v for name, item in data.items() for k, v in flatten(item, f"{key}.{name}".lstrip(".")).items()}
