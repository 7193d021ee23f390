"""Writes the tables of docs/configuration.md from the JSON schemas of `rlvid/config`.

`python -m rlvid.config.docs` writes the page, `--check` only says whether it is current (exit code 1 if not). The text
above the marker line of the page is written by hand. Meanings are the docstrings of the keys.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlvid.config.jobs import JOB_CONFIGS, JobConfig
from rlvid.config.keys import Schema, sections_of

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
MARKER = "<!-- Everything below is written by `make docs` from rlvid/config; changes below this line are lost. -->\n"

_NOUNS = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "path": "path"}
_NOUNS |= {
    "file-path": "path of a file",
    "directory-path": "path of a folder",
    "checkpoint-path": "path of a checkpoint",
}
_BOUNDS = {"minimum": "at least {}", "exclusiveMinimum": "more than {}", "multipleOf": "a multiple of {}"}
_BOUNDS |= {"maximum": "at most {}", "exclusiveMaximum": "less than {}"}
_BOUNDS |= {"minItems": "at least {} item(s)", "maxItems": "at most {} item(s)"}


def type_words(schema: Schema) -> str:
    """Type and bounds of a value, in words."""
    if options := schema.get("anyOf") or schema.get("oneOf"):
        kept = dict.fromkeys(type_words(option) for option in options if option.get("type") != "null")
        return " or ".join(kept) + ", or empty" * ({"type": "null"} in options)
    if "enum" in schema or "const" in schema:
        return _either(as_yaml(value) for value in schema.get("enum", [schema.get("const")]))
    if "prefixItems" in schema:
        items = [type_words(item) for item in schema["prefixItems"]]
        return f"list of {len(items)}: " + ", then ".join(items)
    bounds = "".join(f", {words.format(as_yaml(schema[key]))}" for key, words in _BOUNDS.items() if key in schema)
    if schema.get("type") == "array":
        return f"list ({type_words(schema['items'])})" + bounds
    if isinstance(schema.get("additionalProperties"), dict):
        return f"section (name: {type_words(schema['additionalProperties'])})"
    return (
        "section" if "$ref" in schema else _NOUNS.get(str(schema.get("format", schema.get("type"))), "anything")
    ) + bounds


def as_yaml(value: Any) -> str:
    """A value as it is written in a file, on one line: JSON without the quotes that YAML does not need."""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return re.sub(r'"(?!(?:true|false|null)")([A-Za-z_~][\w ./~-]*)"', r"\1", json.dumps(value, ensure_ascii=False))


def _either(values: Iterable[str]) -> str:
    *first, last = (f"`{value}`" for value in values)
    return f"{', '.join(first)} or {last}" if first else last


def page(head: str) -> str:
    """The whole of docs/configuration.md, with the text `head` above the marker."""
    sections: dict[str, dict[str, Schema]] = {}  # name -> job -> its section
    for job, cls in JOB_CONFIGS.items():
        for name, section in sections_of(cls):
            kinds = [f" (kind: {schema['const']})" for schema in section["properties"].values() if "const" in schema]
            sections.setdefault(name + "".join(kinds), {})[job] = section
    top = sections.pop("")
    jobs = {job: section for job, section in top.items() if issubclass(JOB_CONFIGS[job], JobConfig)}
    texts = [_section_text("Keys without a section", "", jobs, jobs)]
    texts += [_section_text(f"`rlvid {job}`", "", {job: top[job]}, top) for job in top.keys() - jobs.keys()]
    order = [key for section in top.values() for key in section["properties"]]
    # in the order of the first table
    for name in sorted(sections, key=lambda name: order.index(re.split("[. ]", name)[0])):
        texts.append(_section_text(f"`{name}`", name.split(" ")[0], sections[name], jobs))
    return "\n".join([head + MARKER, *_jobs_text(top, jobs), *texts])


def _jobs_text(top: dict[str, Schema], jobs: dict[str, Schema]) -> Iterator[str]:
    yield from (f"- {_cell(section['description'])}" for section in top.values())
    yield f"\n| key or section | {' | '.join(f'`{job}`' for job in jobs)} |\n|---{'|---' * len(jobs)}|"
    for key in dict.fromkeys(key for section in jobs.values() for key in section["properties"]):
        yield f"| `{key}` | {' | '.join('✓' * (key in section['properties']) for section in jobs.values())} |"
    yield ""


def _section_text(heading: str, name: str, by_job: dict[str, Schema], all_jobs: dict[str, Schema]) -> str:
    rows: dict[tuple[str, ...], list[str]] = {}  # cells -> jobs that have this key
    for job, section in by_job.items():
        around = all_jobs.get(job, {}).get("properties", {}).get(name.split(".")[0], {})
        for key, schema in section["properties"].items():
            if not name and "$ref" in schema:  # it has a table of its own
                continue
            why = schema.get("on_resume") or around.get("on_resume")
            default = f"`{as_yaml(schema['default'])}`" if schema.get("default") is not None else "empty"
            default = "required" if key in section.get("required", ()) else default
            cells = (default, f"may change: {why}" if why else "fixed", schema.get("description", ""))
            rows.setdefault((f"`{name}.{key}`".replace("`.", "`"), type_words(schema), *cells), []).append(job)
    text = f"{'##' if '.' not in name else '###'} {heading}\n\n"
    if name and by_job.keys() != all_jobs.keys():
        text += f"Only in {_either(by_job)}.\n\n"
    for meaning in dict.fromkeys(section.get("description", "") for section in by_job.values() if name):
        text += f"{_cell(meaning)}\n\n"
    text += "| key | type | default | when a run is resumed | meaning |\n|---|---|---|---|---|\n"
    for (key, *others), having in rows.items():
        remark = "" if len(having) == len(by_job) else f" (in {_either(having)})"
        text += f"| {' | '.join(map(_cell, (key + remark, *others)))} |\n"
    return text


def _cell(text: str) -> str:
    """On one line; angle brackets outside code are no tags."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts).replace("|", "\\|")


def main(argv: Sequence[str]) -> int:
    old = PAGE.read_text(encoding="utf-8")
    new = page(old.partition(MARKER)[0])
    if "--check" not in argv:
        PAGE.write_text(new, encoding="utf-8")
        return 0
    changes = difflib.unified_diff(old.splitlines(), new.splitlines(), "docs/configuration.md", "rlvid/config", n=0)
    for line in itertools.islice(changes, 12):
        print(line[:160], file=sys.stderr)
    if new != old:
        print("docs/configuration.md is not current: make docs", file=sys.stderr)
    return int(new != old)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
