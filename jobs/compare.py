"""`rlvid eval compare`: evaluations on the same samples against each other, or against a paper's table."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from rlvid.errors import UserError
from rlvid.evaluation.compare import Published, Record, against_published, compare_runs, read_published
from rlvid.reporting.console import Console


def main(arguments: argparse.Namespace) -> None:
    """Print the differences; the last line is the result of the last run.

    Raises:
        UserError: what is given cannot be compared.
    """
    console, runs, table = Console(), arguments.runs, arguments.published
    if not table and len(runs) < 2:
        raise UserError("give at least two run folders of rlvid eval, or a run and --published")
    if table:
        rows = read_published(table)
        for own in _own_rows(rows, runs, arguments.row):
            console.message(f"{own.name}: weighted {own.weighted:.2f}, macro {own.macro:.2f}")
            others = [row for row in rows if row.source != own.source]
            if arguments.row:
                others = [row for row in others if (row.model, row.setting) == (own.model, own.setting)]
            for line in (line for row in others for line in against_published(own, row)):
                console.message(f"  {line}")
    if len(runs) > 1:
        found = compare_runs(runs)
        cells = [
            [r["run"], *(f"{r[k]:.4f}" for k in ("value", "first", "difference", "low95", "high95")), str(r["n"])]
            for r in found
        ]
        console.table(["run", "value", f"value of {runs[0]}", "difference", "low95", "high95", "n"], cells)
        console.result(found[-1])


def _own_rows(rows: list[Published], runs: list[Path], model: str | None) -> list[Published]:
    """The rows that are compared with the others: one for each run, or the table's rows of a model."""
    if model:
        found = [row for row in rows if row.model == model]
        if not found:
            raise UserError(f"the table has no model {model}; it has {', '.join(sorted({r.model for r in rows}))}")
        return found
    return [_of_run(run, rows[0].sizes) for run in runs]


def _of_run(run: Path, sizes: Mapping[str, int]) -> Published:
    """An evaluation by mmla as a row of the table.

    Raises:
        UserError: it is none, or its sets are not those of the table.
    """
    metrics = Record.read(run).metrics
    by_task = {k.partition("/")[2]: 100 * v for k, v in metrics.items() if k.startswith("accuracy/")}
    for task in by_task:
        n = metrics[f"n/{task}"]
        if task not in sizes:
            raise UserError(f"{run}: {task} is no column of the table")
        if n != sizes[task]:
            raise UserError(
                f"{run}: {task} has {n:.0f} samples, in the table {sizes[task]}: another split cannot be compared"
            )
    if not by_task:
        raise UserError(f"{run}: its evaluation has no accuracies of data sets; run rlvid eval mmla")
    return Published("this run", run.name, "eval", by_task, sizes, None)
