"""Accuracy that a tiny model gains by judging itself, with and without visual context, and with other options.

`python -m benchmarks.isrt` warms a model up once per seed (jobs/configs/isrt_demo.yaml). Each variant starts from that
model: three iterations on the synthetic task, with the model as its own judge. After the warm start the right answers
are not used for training.

  context        the judge gets the model's own description; the reference is the model at the iteration's start
  no_context     the judge gets only the video
  told           as `context`, and responses are sampled with the description too
  reference_sft  as `context`, but the reference of DPO is always the warmed-up model

`gain_points` is the held-out accuracy (greedy answers) after the last iteration minus that of the warm start, in
points, for `context`; `length_ratio` the mean length of those answers, after over before; `context_gain_points` the
gain with context minus that without. All are means over the seeds. --variants and --seeds select parts; runs in
existing run folders are resumed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import finish, machine

CONFIG = Path(__file__).parents[1] / "jobs" / "configs" / "isrt_demo.yaml"
ITERATIONS = 3
VARIANTS: dict[str, tuple[str, ...]] = {
    "context": (),
    "no_context": ("isrt.context=none",),
    "told": ("isrt.context=judge_and_responses",),
    "reference_sft": ("isrt.reference=sft",),
}
COLUMNS = {
    "length": "response/length",
    "longer wins": "judge/longer_wins",
    "consistent": "judge/consistency",
    "kept": "pairs/kept",
    "judge right": "judge/accuracy",
}


def run_job(module: str, folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Run a job and return its result, the last line of stdout."""
    command = [sys.executable, "-m", module, "--config", str(CONFIG), f"run.dir={folder}", "run.wandb=disabled"]
    output = subprocess.run([*command, *overrides], check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def measure(variant: str, seed: int, folder: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], list[Any]]:
    """Result and metrics of one variant. All variants of a seed start from the same warm start."""
    warm = folder / f"seed{seed}" / "context"
    shared = [f"seed={seed}", f"isrt.iterations={ITERATIONS}", *overrides]
    if variant != "context" and not (warm / "sft").exists():
        run_job("jobs.isrt", warm, [*shared, "--only-data"])
    settings = [*shared]
    if variant != "context":
        data = warm / "data"
        settings += [f"model.path={warm / 'sft'}", "warm_start.steps=0", "data.synthetic=null"]
        settings += [f"data.train={data / 'train.jsonl'}", f"data.eval={data / 'eval.jsonl'}"]
        settings += VARIANTS[variant]
    run = folder / f"seed{seed}" / variant
    result = run_job("jobs.isrt", run, settings)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return result, [row for row in rows if "phase" not in row]


def show(variant: str, seed: int, result: dict[str, Any], rows: list[Any]) -> None:
    accuracies = {row["step"]: row["eval/accuracy"] for row in rows if "eval/n" in row}
    steps = " ".join(f"{100 * accuracies[step]:5.1f}" for step in sorted(accuracies))
    line = f"{variant:<14}{seed:>4}  {steps}  {result['length_ratio']:6.2f}"
    for row in (row for row in rows if "pairs/kept" in row):
        values = " ".join("    -" if row[key] is None else f"{row[key]:5.2f}" for key in COLUMNS.values())
        print(f"{line if row['step'] == 1 else ' ' * len(line)}   {row['step']}: {values}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated")
    parser.add_argument("--dir", type=Path, help="keep the run folders here, and resume those that exist")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs")
    args = parser.parse_args()
    seeds, variants = [int(s) for s in args.seeds.split(",")], args.variants.split(",")
    if unknown := set(variants) - set(VARIANTS):
        parser.error(f"unknown variants: {', '.join(sorted(unknown))}; known: {', '.join(VARIANTS)}")
    print(f"{machine()}; accuracy in percent, after the warm start and each iteration\n")
    print(f"variant       seed  accuracy{' ' * (6 * ITERATIONS - 2)}length   iteration: {', '.join(COLUMNS)}")
    gains: dict[str, list[float]] = {v: [] for v in variants}
    ratios: dict[str, list[float]] = {v: [] for v in variants}
    with tempfile.TemporaryDirectory() as tmp:
        for seed in seeds:
            for variant in variants:
                result, rows = measure(variant, seed, args.dir or Path(tmp), args.overrides)
                show(variant, seed, result, rows)
                gains[variant].append(100 * (result["accuracy_after"] - result["accuracy_before"]))
                ratios[variant].append(result["length_ratio"])
    mean = {v: statistics.mean(values) for v, values in gains.items()}
    figures: dict[str, float] = {f"{v}_gain_points": gain for v, gain in mean.items() if v != "context"}
    if "context" in mean:
        figures |= {"gain_points": mean["context"], "length_ratio": statistics.mean(ratios["context"])}
        figures |= {"worst_gain_points": min(gains["context"]), "worst_length_ratio": max(ratios["context"])}
    if {"context", "no_context"} <= mean.keys():
        figures["context_gain_points"] = mean["context"] - mean["no_context"]
    finish(figures | {"seeds": len(seeds)})


if __name__ == "__main__":
    main()
