"""What a group of keys is: the class `Section`, and the types of values that several sections have.

A default is stated in a section's class and nowhere else. Each key's docstring is its meaning in docs/configuration.md.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator


def changeable(default: Any, why: str, **bounds: Any) -> Any:
    """A field whose value may change when a run is resumed. `why` is printed in docs/configuration.md."""
    return Field(default, json_schema_extra={"on_resume": why}, **bounds)


class Section(BaseModel):
    """A group of keys. Unknown keys, infinite numbers and keys without an effect are refused; assignments are checked
    too."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    needs: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Key -> (another key, its values that the first has an effect with). Otherwise the key must be at its default."""

    def faults(self) -> Iterator[str]:
        """What is wrong with values each of which is right; the first is the error. A class whose base has rules too
        yields those before its own.

        A message names keys in full, so that the loader finds the line they were written in.
        """
        yield from ()

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_not_booleans(cls, data: Any) -> Any:
        """pydantic takes `true` for 1."""
        for key, value in data.items() if isinstance(data, dict) else ():
            types = repr(cls.model_fields[key].annotation) if key in cls.model_fields else "bool"
            items = value if isinstance(value, list | tuple) else (value,)
            if any(isinstance(item, bool) for item in items) and re.search(r"\b(int|float)\b", types):
                raise ValueError(f"{key} must be a number, got {'a list with ' * (items is value)}true or false")
        return data

    @model_validator(mode="after")
    def _has_no_fault(self) -> Self:
        for fault in itertools.chain(self._without_effect(), self.faults()):
            raise ValueError(fault)
        return self

    def _without_effect(self) -> Iterator[str]:
        for key, (switch, *values) in self.needs.items():
            setting, default = getattr(self, switch), type(self).model_fields[key].get_default()
            if getattr(self, key) != default and setting not in values:
                fitting = " or ".join("empty" if value is None else str(value) for value in values)
                yield f"{key} has no effect with {switch}={setting}: it needs {switch}={fitting}. Leave it out"


# --- types of values --------------------------------------------------------------------------------------------------


def _check_local(value: Any) -> Any:
    if isinstance(value, str | Path):
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(value)):
            raise ValueError(f"{value} is a URL; expected a path on a local or mounted disk")
        if not str(value).strip():
            raise ValueError("the path is empty text; write null for no path")
    return value


def _expand_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"no home folder for {path}; write the path in full") from None


LocalPath = Annotated[Path, AfterValidator(_expand_home), BeforeValidator(_check_local)]
"""A path that a job may create. A leading `~` is the home folder."""
# The `format` in the JSON schema tells `keys.check_paths` what must be there.
InputFile = Annotated[LocalPath, WithJsonSchema({"type": "string", "format": "file-path"})]
"""A file that must exist before a job starts."""
InputFolder = Annotated[LocalPath, WithJsonSchema({"type": "string", "format": "directory-path"})]
"""A folder that must exist before a job starts."""
Checkpoint = Annotated[LocalPath, WithJsonSchema({"type": "string", "format": "checkpoint-path"})]
"""A Hugging Face checkpoint folder that must exist before a job starts."""

MIN_TEMPERATURE = 0.01  # vLLM raises a smaller one to this, and its log-probs would differ from the trainer's


def _check_temperature(value: float) -> float:
    if 0 < value < MIN_TEMPERATURE:
        raise ValueError(
            f"temperature {value:g} is below {MIN_TEMPERATURE}, the lowest that vLLM samples with; 0 is greedy"
        )
    return value


GreedyOrTemperature = Annotated[float, Field(ge=0), AfterValidator(_check_temperature)]
"""A sampling temperature; 0 is greedy decoding."""
