"""A synchronous run that is interrupted and resumed computes the same numbers as one that is not.

`python -m benchmarks.resume` runs `rlvid grpo` on the CPU, a small one of the demo, once without interruption, and once
in six processes that stop after 2, 4, 6, 8, 10 and 12 steps and resume. Losses, rewards and gradient norms of each step
are compared. `max_loss_diff` is 0: sampling noise is a function of seed, step, sample and response, and the order of
the data of seed and position.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.harness import finish
from benchmarks.runs import CONFIGS, SECONDS, run, steps_of

STOPS = (2, 4, 6, 8, 10, 12)
KEYS = ("train/loss", "train/grad_norm", "reward/mean", "policy/entropy", "policy/kl")
SMALL = (
    "data.synthetic={train: 64, eval: 8}",
    "warm_start.steps=10",
    "train.batch_size=8",
    "train.schedule=constant",
    "grpo.minibatches=2",
    "evaluate.every=100",
)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        quiet, resumed, config = Path(tmp) / "quiet", Path(tmp) / "resumed", CONFIGS / "demo.yaml"
        run("grpo", config, quiet, [*SMALL, f"train.steps={STOPS[-1]}"])
        for stop in STOPS:
            run("grpo", config, resumed, [*SMALL, f"train.steps={stop}"])
            (resumed / SECONDS).unlink()
        one, other = (
            {row["step"]: row for row in steps_of(folder) if "train/loss" in row} for folder in (quiet, resumed)
        )
    assert one.keys() == other.keys() == set(range(1, STOPS[-1] + 1))
    differences = {key: max(abs(one[step][key] - other[step][key]) for step in one) for key in KEYS}
    for key, difference in differences.items():
        print(f"{key:<16} largest difference {difference:g}")
    finish(
        {"max_loss_diff": differences["train/loss"], "max_diff": max(differences.values()), "resumes": len(STOPS) - 1}
    )


if __name__ == "__main__":
    main()
