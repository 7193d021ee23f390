"""Throughput of the driver of a GRPO step: all code outside the engines, with engines that answer immediately.

`python -m benchmarks.driver` runs whole steps of 256 and of 1,024 prompts, 8 rollouts of 16 to 128 tokens each: encode,
generate, reward, advantages, mini-batch, train, weight sync, metrics, tracker. All of it is the code of a real run
(`ClipStore`, `Roles`, `GeneratorFleet` with the fleet's state machine, `Rewards`, `jobs.grpo.optimize`, `Tracker`) over
real Ray with one actor process per replica, up to 64. Three classes are fakes, the only ones in the benchmarks,
because a test machine does not have the hardware of 64 replicas.

  encoder    returns ready prompts of 130 KB through the object store, as for real prompts of this size
  generator  fetches its prompts and answers with random rollouts
  trainer    takes the mini-batch, returns statistics, and sends one small bucket of weights

The driver, with all of its threads, is pinned to one core; Ray and the actors have the others. `samples_per_s` is
rollouts per wall second with one replica, including the time waiting for the fakes, so it is a lower bound for the
driver. `growth_64` compares the driver's own CPU seconds (all threads, also Ray's, also after the step) per sample at
64 replicas and at 1. On a machine with few cores the wall time at 64 replicas is that of 64 processes taking turns on
one core, and says nothing about the driver; the table shows it too. Both figures are for 256 prompts, which is few for
64 replicas: the cost of a replica's messages is divided by 4 prompts. Each fleet has a Ray session of its own, because
in a shared one unfinished work of 64 processes would be counted for the next fleet.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import psutil
import ray

import actors.clip_store
import actors.generator_fleet
import actors.trainer
from actors.clip_store import ClipStore, Outcome, Source
from actors.roles import Roles
from benchmarks.harness import finish, machine, medians
from benchmarks.tiny import tiny_model, video_sample
from jobs.update import GrpoUpdate
from rlvid.config import GrpoJobConfig
from rlvid.reporting.run_folder import RunFolder
from rlvid.reporting.tracker import Tracker
from rlvid.training.policy_batch import Experience, summarize
from rlvid.types import Prompt, Rollout, Sample, Span, WeightSpan

PROMPTS = (256, 1024)  # in a step: 4 and 16 per replica of the largest fleet
GROUP = 8
RESPONSE_TOKENS = (16, 128)
SESSIONS = (1, 64, 1, 64, 1, 64, 1)  # replicas; one session of 64 against its neighbours gave ratios from 1.1 to 1.7
WARMUP = 3
SETTLE_S = 2.0
PATCHES = 112  # 130 KB: above the 100 KB up to which Ray sends results along with its messages


class InstantEncoder:
    def __init__(self, source: Source):
        self._patches = np.random.default_rng(0).integers(0, 256, (PATCHES, 1176), dtype=np.uint8)
        self._tokens = np.arange(60, dtype=np.int32)

    @ray.method(num_returns=2)
    def encode(self, sample: Sample, variant: str) -> tuple[Prompt, Outcome]:
        prompt = Prompt(
            sample_id=sample.id,
            token_ids=self._tokens,
            patches=self._patches,
            grid_thw=np.array([[PATCHES // 16, 4, 4]]),
            spans=(Span(10, PATCHES // 4),),
            positions=np.broadcast_to(self._tokens, (3, len(self._tokens))).copy(),
            clip_ids=("0" * 64,),
        )
        return prompt, Outcome(prompt.length, prompt.cost, prompt.patches.nbytes, cache_hits=1)


class InstantGenerator:
    def __init__(self, log_file: Path, threads: int | None):
        self._version = -1
        self._rng = np.random.default_rng(os.getpid())

    def start(self, folder: Path, cfg: GrpoJobConfig, seed: int) -> None:
        longest = RESPONSE_TOKENS[1]
        self._ids = self._rng.integers(0, 150_000, longest, dtype=np.int32)
        self._logprobs = -self._rng.random(longest, dtype=np.float32)

    def generate(self, prompts: Sequence[ray.ObjectRef[Prompt]], sampling: Any) -> list[list[Rollout]]:
        lengths = self._rng.integers(*RESPONSE_TOKENS, (len(prompts), sampling.n), endpoint=True).tolist()
        return [
            [self._rollout(prompt, n) for n in group] for prompt, group in zip(ray.get(prompts), lengths, strict=True)
        ]

    def _rollout(self, prompt: Prompt, n: int) -> Rollout:
        # own arrays for each rollout; shared ones would be pickled only once
        return Rollout(
            sample_id=prompt.sample_id,
            token_ids=self._ids[:n].copy(),
            logprobs=self._logprobs[:n].copy(),
            text="red" if n % 3 else f"A shape that moves. {n}",
            finish_reason="stop",
            versions=(WeightSpan(self._version, 0, n),),
        )

    def update_weights(self, version: int, sent: Sequence[Any]) -> int:
        self._version = version
        return version

    def ping(self) -> int:
        return self._version


class InstantTrainer:
    """A rank that returns values of the shape of a real rank's at once."""

    def __init__(self, log_file: Path, threads: int | None):
        pass

    def address(self) -> str:
        return ""

    def start(self, address: str, rank: int, world_size: int, folder: Path, cfg: GrpoJobConfig) -> None:
        pass

    def step(self, model: str, groups: Sequence[Any], objective: object, lr: float, head_lr: None) -> dict[str, float]:
        names = "loss grad_norm entropy ratio kl_to_old clip_low clip_high logprob_gap skipped"
        return dict.fromkeys(names.split(), float(len(groups))) | {"lr": lr}

    def put_weights(self, is_checked: bool, nodes: object) -> Iterator[tuple[ray.ObjectRef[Any], str | None]]:
        yield ray.put(np.zeros(1000, np.uint8)), "digest" if is_checked else None


class Steps:
    """Runs whole steps with a fleet of `replicas` and records the wall seconds of each stage."""

    def __init__(self, replicas: int, model: Path, folder: Path, stack: ExitStack):
        self.cfg = GrpoJobConfig.model_validate(
            {
                "run": {"dir": folder / "run", "wandb": "disabled"},
                "model": {"path": model},
                "data": {"train": "unused.jsonl", "cache_dir": folder / "cache"},
                "rollout": {"replicas": replicas},
                "grpo": {"group_size": GROUP},
                "placement": {
                    "trainer_cpus": 0.01,
                    "generator_cpus": 0.01,
                    "encode_cpus": 0.01,
                    "encoders": 4,
                    "reward_cpus": 0.01,
                },
            }
        )
        self.clips = ClipStore(self.cfg, model, max(PROMPTS), on_bad=lambda path, reason: None)
        stack.callback(self.clips.close)
        self.roles = stack.enter_context(Roles(model, self.cfg, ("trainer", "generator"), folder / "logs"))
        run_folder = RunFolder(self.cfg.run.dir)
        stack.enter_context(run_folder.start(self.cfg, "grpo"))
        run_folder.rewind(None)
        self.tracker = stack.enter_context(Tracker(run_folder, self.cfg.run))
        self.stage_s: dict[str, list[float]] = defaultdict(list)
        self.step = 0
        self.samples: list[Sample] = []
        self.ahead: list[Any] = []
        self.roles.wait_ready()
        self.roles.fleet.sync(self.roles.trainer, 0)

    def measure(self, n_prompts: int, rounds: int) -> dict[str, Any]:
        """Wall seconds of each step and each stage, and the driver's CPU seconds per step."""
        self.samples = [video_sample(i) for i in range(n_prompts)]
        self.ahead = self.clips.submit(self.samples)
        for _ in range(WARMUP):
            self()
        time.sleep(SETTLE_S)
        self.stage_s.clear()
        begin = time.process_time()
        wall = [seconds_of(self) for _ in range(rounds)]
        time.sleep(SETTLE_S)  # the work of Ray's threads for the last step is counted too
        cpu_s = (time.process_time() - begin) / rounds
        return {"wall_s": wall, "cpu_s": cpu_s, "stage_s": medians(self.stage_s)}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.stage_s[name].append(time.perf_counter() - begin)

    def __call__(self) -> None:
        roles = self.roles
        with self.stage("encode"):
            # as in a run, the prompts of the next step are encoded during this one
            pending, self.ahead = self.ahead, self.clips.submit(self.samples)
            prompts = self.clips.collect(pending)
        with self.stage("rollout"):
            # the module of the real Sampling imports torch, which 64 processes should not load
            sampling = SimpleNamespace(n=GROUP, temperature=1.0, max_tokens=128)
            prompts, groups = self.clips.answered(prompts, roles.fleet.generate(prompts, sampling))
        with self.stage("reward"):
            rewards = roles.rewards([p.sample for p in prompts], groups)
        with self.stage("train"):
            _, stats = GrpoUpdate(self.cfg, roles.trainer)(self.step, Experience(prompts, groups, rewards))
        self.step += 1
        with self.stage("sync"):
            roles.fleet.sync(roles.trainer, self.step)
        with self.stage("metrics"):
            self.tracker.log(self.step, summarize(groups, rewards) | stats | roles.fleet.metrics())
        assert len(prompts) == len(self.samples) and all(len(g) == GROUP for g in groups)


def seconds_of(step: Steps) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def pin(pid: int, cores: set[int]) -> None:
    """Every thread of a process; those it starts later inherit it."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), cores)


def measure(replicas: int, rounds: int) -> dict[int, dict[str, Any]]:
    """Run one Ray session; return the result of `Steps.measure` by number of prompts in a step."""
    first, *others = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as tmp, ExitStack() as stack:
        model = tiny_model(Path(tmp) / "model")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=2**30,
            _system_config={
                "worker_maximum_startup_concurrency": 18
            },  # otherwise Ray warns repeatedly of many processes
        )
        stack.callback(ray.shutdown)
        stack.enter_context(mock.patch.object(actors.clip_store, "Encoder", InstantEncoder))
        stack.enter_context(mock.patch.object(actors.generator_fleet, "Generator", InstantGenerator))
        stack.enter_context(mock.patch.object(actors.trainer, "TrainerRank", InstantTrainer))
        step = Steps(replicas, model, Path(tmp), stack)
        pin(os.getpid(), {first})
        for process in psutil.Process().children(recursive=True):
            pin(process.pid, set(others) or {first})
        return {n: step.measure(n, max(3, rounds * PROMPTS[0] // n)) for n in PROMPTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="steps in each session")
    parser.add_argument(
        "--replicas", type=int, help="run only one session with N replicas and print its measurements", metavar="N"
    )
    args = parser.parse_args()
    if args.replicas:
        print(json.dumps(measure(args.replicas, args.rounds)))
        return
    print(f"{machine()}; driver on one core; microseconds per rollout\n")
    stages = "encode rollout  reward   train    sync metrics"
    print(f"replicas prompts rollouts/s driver CPU    wall   of it:  {stages}", flush=True)
    sessions: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for n in SESSIONS:
        command = [sys.executable, "-m", "benchmarks.driver", "--replicas", str(n), "--rounds", str(args.rounds)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        for prompts, measured in json.loads(output.splitlines()[-1]).items():
            sessions[n, int(prompts)].append(measured)
            show(n, int(prompts), measured)
    cpu_s = {key: statistics.median(s["cpu_s"] for s in values) for key, values in sessions.items()}
    growth = {n: cpu_s[64, n] / cpu_s[1, n] for n in PROMPTS}
    wall_s = [seconds for session in sessions[1, PROMPTS[0]] for seconds in session["wall_s"]]
    print("\ngrowth at 64 replicas: " + ", ".join(f"{g:.2f} with {n} prompts" for n, g in growth.items()))
    finish({"samples_per_s": PROMPTS[0] * GROUP / statistics.median(wall_s), "growth_64": growth[PROMPTS[0]]})


def show(replicas: int, prompts: int, measured: dict[str, Any]) -> None:
    n = prompts * GROUP
    seconds = statistics.median(measured["wall_s"])
    shares = " ".join(f"{1e6 * value / n:7.1f}" for value in measured["stage_s"].values())
    own, wall = 1e6 * measured["cpu_s"] / n, 1e6 * seconds / n
    print(f"{replicas:>8} {prompts:>7} {n / seconds:10.0f} {own:10.1f} {wall:7.1f}          {shares}", flush=True)


if __name__ == "__main__":
    main()
