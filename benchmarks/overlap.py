"""What asynchronous rollouts save where rewards are slow.

`python -m benchmarks.overlap` runs the demo with a reward of the user's own code that takes as long as the generation
of its batch, with `async_steps` 0 and 1, on three seeds. `time_ratio` is the median time of a step with 1 over that
with 0; `accuracy_diff` is the difference of the mean final accuracies; `max_staleness` is in updates.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks.harness import finish, machine
from benchmarks.runs import CONFIGS, accuracies, run, steps_of

REWARD = """
import time

def score(prompt, responses, answer, **fields):
    time.sleep({seconds})
    return [0.0] * len(responses)
"""


def settings(file: Path) -> tuple[str, ...]:
    return (f"rewards=[{{kind: exact}}, {{kind: custom, path: '{file}:score', range: [0, 1]}}]", "placement.threads=1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3", help="comma-separated")
    parser.add_argument("--steps", type=int, default=120)
    args = parser.parse_args()
    seconds: dict[int, list[float]] = {0: [], 1: []}
    final: dict[int, list[float]] = {0: [], 1: []}
    staleness = 0.0
    with tempfile.TemporaryDirectory() as tmp:
        file = Path(tmp) / "slow.py"
        file.write_text(REWARD.format(seconds=0.0))
        calibration = Path(tmp) / "calibration"
        quick = ("train.steps=8", "evaluate.max_samples=8")
        run("grpo", CONFIGS / "demo.yaml", calibration, [*quick, *settings(file)])
        rollout_s = statistics.median(
            row["time/rollout"] for row in steps_of(calibration)[-6:] if "time/rollout" in row
        )
        file.write_text(REWARD.format(seconds=rollout_s / 32))  # a batch has 32 prompts, and one reward worker
        print(f"{machine()}; generation takes {rollout_s:.2f} s, so do the rewards")
        for seed in args.seeds.split(","):
            for ahead in (0, 1):
                folder = Path(tmp) / f"{seed}-{ahead}"
                own = (f"grpo.async_steps={ahead}", f"seed={seed}", f"train.steps={args.steps}")
                run("grpo", CONFIGS / "demo.yaml", folder, [*settings(file), *own])
                rows = [row for row in steps_of(folder) if "time/step" in row]
                seconds[ahead].append(statistics.median(row["time/step"] for row in rows))
                final[ahead].append(accuracies(folder)[-1])
                staleness = max(staleness, *(row.get("policy/max_staleness", 0.0) for row in rows))
                print(f"seed {seed}, async_steps {ahead}: {seconds[ahead][-1]:.2f} s, {100 * final[ahead][-1]:.1f} %")
    finish(
        {
            "time_ratio": statistics.median(one / zero for one, zero in zip(seconds[1], seconds[0], strict=True)),
            "accuracy_diff": statistics.mean(final[1]) - statistics.mean(final[0]),
            "max_staleness": staleness,
        }
    )


if __name__ == "__main__":
    main()
