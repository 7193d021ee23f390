"""Prints a job's progress on stdout: phases, one aligned line per step, and the result as the last line.

On a terminal a progress bar stays below the lines. In a pipe or a file there are only plain lines without control
characters, each flushed when it is written.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rlvid.files import dumps
from rlvid.reporting.metric_names import COLUMNS, Form, metric_of

_LINES_PER_HEADING = 20
_PIPE_WIDTH = 10_000  # a line in a file is never wrapped
_MIN_COLUMN = 6


def _compact(value: float) -> str:
    """At most eight characters, three significant digits."""
    if value == 0 or 0.001 <= abs(value) < 100_000:
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:.1e}"


def _tenths(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 1 or value == 0 else f"{value:.2f}"


_FORMS: dict[str, Callable[[float], str]] = {"number": _compact, "percent": "{:.1%}".format}  # others: tenths


class Console:
    """Prints a run's progress. `with Console() as console:` removes the progress bar at the end."""

    def __init__(self, stream: TextIO | None = None, width: int | None = None) -> None:
        self._stream = stream or sys.stdout
        self._is_terminal = self._stream.isatty()
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="replace")  # a terminal without UTF-8 must not stop a run
        # Without the first three, rich prints colours into a pipe if FORCE_COLOR or TTY_COMPATIBLE is set, as in CI.
        self._console = RichConsole(
            file=self._stream,
            force_terminal=self._is_terminal,
            color_system="auto" if self._is_terminal else None,
            width=width if self._is_terminal else _PIPE_WIDTH,
            highlight=False,
            markup=False,
            emoji=False,
        )
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            redirect_stdout=False,  # what others print there is not for the console (jobs/run.py)
            disable=not self._console.is_interactive,
        )
        self._task = self._progress.add_task("")  # the phase
        self._total: int | None = None
        self._stages: list[str] = []
        self._columns: tuple[str, ...] = ()  # names of metrics
        self._lines_since_heading = 0

    def phase(self, name: str, steps: int | None = None, done: int = 0) -> None:
        """Announce a phase; with `steps` a progress bar is shown, of which `done` steps are complete."""
        self._progress.stop()
        self._total, self._columns, self._stages = steps, (), []
        self._print(f"── {name} " + "─" * max(0, 60 - len(name)), style="bold")
        self._progress.reset(self._task, total=steps, completed=done, description=_printable(name))
        if steps:
            self._progress.start()

    def working(self, stage: str, done: int | None = None) -> None:
        """On a terminal, show the current stage beside the progress bar, and the number of steps done."""
        self._progress.update(self._task, description=_printable(stage), completed=done)

    def step(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Print one line: step, the metrics of the phase, seconds per stage. Missing and non-finite numbers are "-"."""
        metrics = {key.removeprefix("warm_start/"): value for key, value in metrics.items()}
        base = next(columns for marker, columns in COLUMNS.items() if not marker or marker in metrics)
        self._stages += [k for k in metrics if k.startswith("time/") and k not in ("time/step", *self._stages)]
        columns = (*base, *(["train/skipped"] if metrics.get("train/skipped") else []), "time/step", *self._stages)
        if columns != self._columns or self._lines_since_heading >= _LINES_PER_HEADING:
            self._columns = columns
            self._print(self._row("step", [metric_of(key).column for key in columns]), style="dim")
            self._lines_since_heading = 0
        numbers = [_shown(metrics.get(key), metric_of(key).form) for key in columns]
        self._print(self._row(f"{step}/{self._total}" if self._total else str(step), numbers))
        self._lines_since_heading += 1
        self._progress.update(self._task, completed=step)

    def evaluation(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Print one line on held-out samples: accuracy by kind of question, rank correlation by dimension, or loss."""
        measured = [name for name in ("spearman", "accuracy", "loss") if f"eval/{name}" in metrics]
        name = next(iter(measured), "accuracy")
        form, prefix, n = metric_of(f"eval/{name}").form, f"eval/{name}/", metrics.get("eval/n")
        kinds = [f"{k.removeprefix(prefix)} {_shown(v, form)}" for k, v in metrics.items() if k.startswith(prefix)]
        text = f"evaluation after step {step}: {name} {_shown(metrics.get(f'eval/{name}'), form)}"
        text += "" if n is None else f" of {n:.0f} samples"
        self._print(text + (f" ({', '.join(kinds)})" if kinds else ""), style="bold")

    def message(self, text: str) -> None:
        self._print(text)

    def table(self, headings: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> None:
        """Print rows under headings; on a terminal long cells are wrapped. A `Text` keeps its style."""
        self._progress.stop()
        table = Table(box=SIMPLE_HEAD if self._is_terminal else None, pad_edge=False)
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*(cell if isinstance(cell, Text) else Text(_printable(cell)) for cell in row))
        with self._console.capture() as capture:
            self._console.print(table)
        # rich pads the last cell
        self._stream.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))
        self._stream.flush()

    def result(self, result: Mapping[str, Any]) -> None:
        """Print the result of the job as one line of JSON, the last line of stdout."""
        self._progress.stop()
        self._stream.write(dumps(result) + "\n")  # not through rich: it would wrap it on a terminal
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def _row(self, step: str, cells: list[str]) -> str:
        step_width = max(len("step"), 2 * len(str(self._total or 0)) + 1)
        line = step.rjust(step_width)
        for key, cell in zip(self._columns, cells, strict=True):
            width = max(len(metric_of(key).column), _MIN_COLUMN) + 2
            if self._is_terminal and len(line) + width > self._console.width:
                break  # in a narrow window the last columns, the stages, are left out
            line += cell.rjust(width)
        return line

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(Text(_printable(text), style=style or ""), soft_wrap=True)
        self._stream.flush()


def _shown(value: float | None, form: Form) -> str:
    return "-" if value is None or not math.isfinite(value) else _FORMS.get(form, _tenths)(value)


def _printable(text: str) -> str:
    """Replace control characters: file names and model output may contain terminal escapes."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in text)
