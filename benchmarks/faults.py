"""A run whose processes are killed at random ends as one without faults.

`python -m benchmarks.faults` runs a small demo twice on the CPU, synchronously: once quietly, and once while processes
of it are killed (SIGKILL) at random moments: generator, trainer rank, reference, reward worker, and twice the driver,
after which the same command is started again. Processes are found by the titles that Ray gives them.

`samples_lost` and `samples_doubled` count, over all steps, samples that a step trained on too few or too many times:
each step has its own row of metrics with the number of samples. `weights_equal`: the exported policies are the same
bytes. `median_seconds_per_fault` is the median time that a fault cost, from the kill to the next step that is done,
minus a step; `engine_start_s` the time that an engine takes to start, measured in the quiet run.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.harness import finish, machine
from benchmarks.runs import CONFIGS, accuracies, command, environment, run, steps_of

TITLES = {"generator": "Generator", "trainer": "TrainerRank", "reference": "ReferenceRank", "reward": "RewardWorker"}
SMALL = (
    "data.synthetic={train: 256, eval: 64}",
    "train.batch_size=8",
    "run.checkpoint_every=5",
    "run.export_every=null",
    "rollout.max_restarts=100",
    "train.max_failures=100",
    "evaluate.every=1000",
)


class Victim:
    """A run whose processes are killed."""

    def __init__(self, folder: Path, overrides: Sequence[str]):
        self.folder = folder
        self._command = command("grpo", CONFIGS / "demo.yaml", folder, overrides)
        self.driver = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, stdout=sys.stderr, env=environment())

    @property
    def step(self) -> int:
        rows = steps_of(self.folder) if (self.folder / "metrics.jsonl").exists() else []
        return max((row["step"] for row in rows if "train/loss" in row), default=0)

    def kill(self, kind: str) -> bool:
        """Kill a process of this kind; False if there is none now."""
        if kind == "driver":
            self.driver.kill()
            self.driver.wait()
            time.sleep(3)  # Ray's processes see that their driver is gone
            self.driver = self._start()
            return True
        for process in psutil.Process(self.driver.pid).children(recursive=True):
            try:
                if f"ray::{TITLES[kind]}" in " ".join(process.cmdline()):
                    process.kill()
                    return True
            except psutil.Error:
                continue
        return False


def plan(n_faults: int, n_steps: int, seed: int) -> list[tuple[int, str]]:
    """(step, kind) of each fault, in order; two of them are of the driver."""
    rng = random.Random(seed)
    kinds = ["driver"] * min(2, n_faults)
    kinds += [list(TITLES)[i % len(TITLES)] for i in range(n_faults - len(kinds))]
    rng.shuffle(kinds)
    return list(zip(sorted(rng.randint(1, n_steps - 2) for _ in kinds), kinds, strict=True))


def harass(victim: Victim, faults: Sequence[tuple[int, str]], seed: int) -> list[float]:
    """Kill as planned; returns the seconds from each kill to the next step that was done."""
    rng = random.Random(seed)
    costs = []
    for step, kind in faults:
        wait_for_step(victim, step)
        time.sleep(rng.uniform(0.0, 1.0))
        before, begin = victim.step, time.monotonic()
        if not victim.kill(kind):
            print(f"no {kind} to kill at step {before}", file=sys.stderr)
            continue
        wait_for_step(victim, before + 1)
        costs.append(time.monotonic() - begin)
        print(f"{kind} killed after step {before}: {costs[-1]:.1f} s to the next step", flush=True)
    return costs


def wait_for_step(victim: Victim, step: int) -> None:
    while victim.step < step:
        if victim.driver.poll() not in (None, 0):
            raise SystemExit(f"the run failed with {victim.driver.returncode}")
        if victim.driver.poll() == 0:
            return
        time.sleep(0.05)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "policy" / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(machine())
    overrides = [*SMALL, f"train.steps={args.steps}"]
    with tempfile.TemporaryDirectory() as tmp:
        quiet, loud = Path(tmp) / "quiet", Path(tmp) / "loud"
        run("grpo", CONFIGS / "demo.yaml", quiet, overrides)
        victim = Victim(loud, overrides)
        costs = harass(victim, plan(args.faults, args.steps, args.seed), args.seed)
        if victim.driver.wait():
            raise SystemExit(f"the run failed with {victim.driver.returncode}")
        one, other = ([row for row in steps_of(f) if "train/loss" in row] for f in (quiet, loud))
        counts = Counter(row["step"] for row in other)
        samples = {row["step"]: row["groups/samples"] for row in one}
        lost = sum(n - next((r["groups/samples"] for r in other if r["step"] == s), 0) for s, n in samples.items())
        step_s = statistics.median(row["time/step"] for row in one)
        finish(
            {
                "samples_lost": int(lost),
                "samples_doubled": int(sum(samples[s] * (n - 1) for s, n in counts.items())),
                "accuracy_diff": accuracies(loud)[-1] - accuracies(quiet)[-1],
                "weights_equal": int(digest(quiet) == digest(loud)),
                "median_seconds_per_fault": statistics.median(costs) - step_s,
                "engine_start_s": next(row["fleet/start_s"] for row in one),
                "faults": len(costs),
            }
        )


if __name__ == "__main__":
    main()
