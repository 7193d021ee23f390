"""Every algorithm of the RL family on the demo.

`python -m benchmarks.algorithms` runs the demo's task with PPO and GRPO's variants on three seeds each, and prints one
table: held-out accuracy after the warm start and at the end, seconds, and the entropy of the last ten steps. `min_gain`
is the smallest gain of all runs. With --dir the run folders are kept, and a complete one is not run again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks.harness import finish, machine
from benchmarks.runs import CONFIGS, accuracies, run, seconds_of, steps_of

VARIANTS = ("grpo", "rloo", "reinforce_pp", "dapo", "gspo", "cispo", "t_grpo")
ALGORITHMS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "ppo": ("ppo", "ppo_demo.yaml", ()),
    **{name: ("grpo", "demo.yaml", (f"grpo.variant={name}",)) for name in VARIANTS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", default=",".join(ALGORITHMS), help="comma-separated")
    parser.add_argument("--seeds", default="1,2,3", help="comma-separated")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--dir", type=Path, help="keep the run folders here")
    args = parser.parse_args()
    print(f"{machine()}; {args.steps} steps\n")
    print(f"{'algorithm':<14}{'seed':>5}{'before':>9}{'after':>8}{'s':>7}{'entropy':>9}")
    gains, after, by_name = [], [], {}
    with tempfile.TemporaryDirectory() as tmp:
        for name in args.algorithms.split(","):
            job, config, overrides = ALGORITHMS[name]
            own = []
            for seed in args.seeds.split(","):
                folder = (args.dir or Path(tmp)) / f"{name}-{seed}"
                run(job, CONFIGS / config, folder, [*overrides, f"seed={seed}", f"train.steps={args.steps}"])
                first, *_, last = accuracies(folder)
                entropy = statistics.mean(row["policy/entropy"] for row in steps_of(folder)[-12:] if "train/lr" in row)
                line = f"{100 * first:9.1f}{100 * last:8.1f}{seconds_of(folder):7.0f}{entropy:9.3f}"
                print(f"{name:<14}{seed:>5}{line}", flush=True)
                gains.append(last - first)
                own.append(last)
            after += own
            by_name[f"after_{name}"] = statistics.mean(own)
    finish({"min_gain": min(gains), "min_after": min(after), **by_name})


if __name__ == "__main__":
    main()
