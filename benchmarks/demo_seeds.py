"""Checks that the demo learns on every seed.

`python -m benchmarks.demo_seeds --seeds 1,2,3,4,5,6` runs `jobs/configs/demo.yaml` with the real `rlvid grpo`, one seed
after another; a seed gives other clips, other weights and other samples. For each seed a table by kind of question:
held-out accuracy of greedy answers after the warm start and at the end, and from the rollout tables of the run (8
groups of every tenth step) the share of groups without a gradient, because their rewards are all equal, and the entropy
of the sampled tokens. In the row `all` the last two are over all groups of all steps.

`min_after` and `mean_after` are accuracies at the end, `min_gain` is the smallest gain over the warm start;
`max_seconds` is the longest run, from the start of its process to the end. With --dir the run folders are kept; a
complete one is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.harness import finish, machine
from benchmarks.runs import CONFIGS, run, seconds_of

ALL = "all"


@dataclass(frozen=True)
class KindRow:
    """One line of a seed's table."""

    before: float  # accuracy after the warm start
    after: float
    no_gradient: float  # share of groups whose rewards are all equal; nan without a group
    entropy: float  # nats per sampled token


@dataclass(frozen=True)
class SeedResult:
    """One run of the demo."""

    seed: int
    seconds: float
    kinds: Mapping[str, KindRow]  # by kind of question, and `ALL`


def read_result(seed: int, folder: Path) -> SeedResult:
    """Read the result of a complete run folder."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    manifest = (folder / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    kind_of = {sample["id"]: sample["problem_type"] for sample in map(json.loads, manifest)}
    responses: list[dict[str, Any]] = []
    for file in sorted((folder / "rollouts").glob("*.parquet")):
        responses += pq.read_table(file).to_pylist()
    return SeedResult(seed, seconds_of(folder), by_kind(rows, responses, kind_of))


def by_kind(
    metrics: Iterable[Mapping[str, Any]], responses: Iterable[Mapping[str, Any]], kind_of: Mapping[str, str]
) -> dict[str, KindRow]:
    """Return a row for each kind of question, and `ALL` last.

    Args:
        metrics: rows of metrics.jsonl, with those of the warm start.
        responses: rows of the rollout tables.
        kind_of: sample id -> kind of its question.
    """
    steps = [row for row in metrics if "phase" not in row]
    evaluations = sorted((row for row in steps if "eval/n" in row), key=lambda row: row["step"])
    first, last = evaluations[0], evaluations[-1]
    trained = [row for row in steps if "groups/zero_variance" in row]
    rewards: dict[str, dict[tuple[int, str], set[float]]] = defaultdict(lambda: defaultdict(set))
    surprise: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for row in responses:
        kind = kind_of[row["sample_id"]]
        rewards[kind][row["step"], row["sample_id"]].add(row["reward_total"])
        surprise[kind].append((-row["logprob_mean"] * row["n_tokens"], row["n_tokens"]))
    table = {}
    for key in sorted(first):
        if key.startswith("eval/accuracy/"):
            kind = key.removeprefix("eval/accuracy/")
            groups, tokens = rewards[kind].values(), sum(n for _, n in surprise[kind])
            table[kind] = KindRow(
                before=first[key],
                after=last[key],
                no_gradient=_mean([len(values) == 1 for values in groups]),
                entropy=sum(nats for nats, _ in surprise[kind]) / tokens if tokens else float("nan"),
            )
    table[ALL] = KindRow(
        before=first["eval/accuracy"],
        after=last["eval/accuracy"],
        no_gradient=_mean([row["groups/zero_variance"] for row in trained]),
        entropy=_mean([row["policy/entropy"] for row in trained]),
    )
    return table


def show(result: SeedResult) -> str:
    """A seed's table, accuracies in percent."""
    lines = [f"seed {result.seed}: {result.seconds:.0f} s"]
    lines.append(f"  {'kind':<12}{'before':>8}{'after':>8}{'no gradient':>14}{'entropy':>10}")
    for kind, row in result.kinds.items():
        accuracies = f"{100 * row.before:8.1f}{100 * row.after:8.1f}"
        lines.append(f"  {kind:<12}{accuracies}{row.no_gradient:14.2f}{row.entropy:10.3f}")
    return "\n".join(lines)


def figures(results: Sequence[SeedResult]) -> dict[str, float]:
    """Figures of the last line, over all seeds."""
    totals = [result.kinds[ALL] for result in results]
    return {
        "min_after": min(row.after for row in totals),
        "mean_after": statistics.mean(row.after for row in totals),
        "min_gain": min(row.after - row.before for row in totals),
        "max_seconds": max(result.seconds for result in results),
    }


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(map(float, values)) if values else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3,4,5,6", help="comma-separated")
    parser.add_argument("--dir", type=Path, help="keep the run folders here")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs")
    args = parser.parse_args()
    print(f"{machine()}; accuracy in percent after the warm start and after GRPO, entropy in nats per token\n")
    results = []
    with tempfile.TemporaryDirectory() as tmp:
        for seed in (int(seed) for seed in args.seeds.split(",")):
            folder = (args.dir or Path(tmp)) / f"seed{seed}"
            run("grpo", CONFIGS / "demo.yaml", folder, [f"seed={seed}", *args.overrides])
            results.append(read_result(seed, folder))
            print(show(results[-1]), flush=True)
    finish(figures(results))


if __name__ == "__main__":
    main()
