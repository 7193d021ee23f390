"""Reads files of items: JSON lines, a JSON array or parquet. A file of another kind is named, with what to do."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from rlvid.errors import UserError

TABLES = (".tsv", ".csv")
SHOWN = 20  # errors of one file
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
COMPRESSED = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Refused(ValueError):
    """A row or an item that cannot be used. The message says why."""


def read_items(path: Path, tables: bool = False) -> Iterator[tuple[int, dict[str, Any] | Refused]]:
    """The items of a file in their order, each with its number from 1: of its line in JSON lines and tables, else of
    the item. The file may be compressed with gzip.

    An item that is no JSON object is a `Refused`, so that the caller can report several.

    Args:
        tables: read a table of text too (.tsv, .csv): an item a line, with its header's names.

    Raises:
        UserError: the file cannot be read, or holds neither JSON nor parquet.
    """
    try:
        with opened(path) as file:
            if tables and path.name.removesuffix(".gz").endswith(TABLES):
                yield from _table(file, "," if ".csv" in path.suffixes else "\t")
                return
            head = file.read(4096).removeprefix(BYTE_ORDER_MARK)
            file.seek(0)
            _check_kind(path, head)
            if head.startswith(b"PAR1"):
                yield from enumerate(_parquet(path), start=1)
            elif head.lstrip().startswith(b"["):
                items = _parsed(file.read())
                if isinstance(items, Refused):
                    raise UserError(f"{path}: {items}")
                yield from enumerate(map(_object, items), start=1)
            else:
                yield from ((n, _object(_parsed(line))) for n, line in enumerate(file, start=1) if line.strip())
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:  # gzip cut short or damaged; tables
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot read the file ({reason}); give JSON lines, a JSON array or parquet") from None


def opened(path: Path) -> BinaryIO:
    """The bytes of a file, uncompressed."""
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path)) if is_gzip else path.open("rb")


def _table(file: BinaryIO, separator: str) -> Iterator[tuple[int, dict[str, Any] | Refused]]:
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    # quotes are those of speech, in a table whose separator is a tab
    rows = csv.DictReader(lines, delimiter=separator, quoting=csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE)
    for row in rows:
        is_whole = None not in row and None not in row.values()
        yield rows.line_num, dict(row) if is_whole else Refused("it has another number of columns than the header")


def refuse_all(problems: Sequence[str], hint: str = "") -> NoReturn:
    """
    Raises:
        UserError: the first problems, how many more there are, and the hint.
    """
    more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    raise UserError("\n".join([*problems[:SHOWN], *more, *filter(None, [hint])]))


def _check_kind(path: Path, head: bytes) -> None:
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(f"{path} is compressed ({name}); unpack it, and give JSON lines, a JSON array or parquet")
    if path.suffix in TABLES or (b"\t" in head.split(b"\n")[0].strip() and head.lstrip()[:1] not in b"{["):
        raise UserError(
            f"{path} is a table of text; write it as JSON lines, for example with pandas: "
            f"read_csv(..., sep='\\t').to_json(..., orient='records', lines=True)"
        )


def _object(item: Any) -> dict[str, Any] | Refused:
    if isinstance(item, dict | Refused):
        return item
    return Refused(f"expected a JSON object with id, question and answer, got a {kind_of(item)}")


def _parsed(content: bytes) -> Any:
    """What a line or a file holds, or the `Refused`."""
    try:
        value = _DECODER.decode(content.removeprefix(BYTE_ORDER_MARK).decode())
        if b"\\u" in content:  # JSON can escape half of a surrogate pair, which no tokenizer or file takes
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return Refused(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8")
    except UnicodeEncodeError:
        return Refused("a text has half of a surrogate pair (\\ud800 to \\udfff); write the character itself")
    except (ValueError, RecursionError) as error:
        return Refused(f"not valid JSON ({error}); expected one JSON object a line, or an array of them")
    return value


def _parquet(path: Path) -> list[dict[str, Any]]:
    """Missing values are left out: a column has a value in every row."""
    import pyarrow
    import pyarrow.parquet

    try:
        return [_without_nulls(item) for item in pyarrow.parquet.read_table(path).to_pylist()]
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} cannot be read as parquet: {error}") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        # NaN too, which is how pandas writes a missing number
        return {name: _without_nulls(item) for name, item in value.items() if item is not None and item == item}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def kind_of(value: object) -> str:
    """What JSON calls it."""
    names = {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null", bytes: "binary"}
    return names.get(type(value), "number")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
