"""Counts lines of code per room: lines that hold a token, without blank lines, comments and docstrings (`make size`).

Also names the largest file, function and class. Tests and benchmarks are counted apart.
"""

from __future__ import annotations

import ast
import io
import subprocess
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code."""
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in LAYOUT
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(source)):  # texts that stand alone: docstrings, of attributes too
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def main() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    rooms: Counter[str] = Counter()
    largest: dict[str, list[tuple[int, str]]] = {"file": [], "function": [], "class": []}
    for name in listed.stdout.split():
        path = ROOT / name
        if not path.is_file():
            continue
        source = path.read_text(encoding="utf-8")
        top, *rest = Path(name).parts
        is_counted = top not in ("tests", "benchmarks")
        room = f"{top}/{rest[0]}" if top == "rlvid" and len(rest) > 1 else top
        rooms[room] += len(code_lines(source))
        if not is_counted:
            continue
        largest["file"].append((source.count("\n"), name))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                length = (node.end_lineno or 0) - node.lineno + 1
                largest[kind].append((length, f"{name}:{node.lineno} {node.name}"))
    for room, count in sorted(rooms.items()):
        print(f"{count:7,} {room}")
    counted = sum(count for room, count in rooms.items() if room not in ("tests", "benchmarks"))
    print(f"{counted:7,} in all, without tests and benchmarks")
    for kind, places in largest.items():
        print(f"largest {kind}: " + ", ".join(f"{where} ({n} lines)" for n, where in sorted(places, reverse=True)[:3]))


if __name__ == "__main__":
    main()
