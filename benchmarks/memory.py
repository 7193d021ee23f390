"""Memory of the demo, of a prompt in the object store, and of prompts that stream through Ray Data.

`python -m benchmarks.memory` measures three things, each in processes of its own:

  demo    `jobs/configs/demo.yaml` with its own models and engines, few steps: driver, Ray, vLLM, DeepSpeed, reference
  prompt  real prompts of the demo's size and of about 1,000 tokens, encoded, answered by vLLM and trained on, with
          G = 1 and G = 16: bytes per prompt in Ray's object store, over the bytes of its patches and token ids
  stream  500 real H.264 clips, 16 frames of 224 x 224 each, encoded and sent through Ray Data (1.2 GB in all) to a
          consumer that is slower than the encoders: memory above that of the idle Ray session, and spilled bytes

Memory of processes is the sum of their PSS (proportional set size: a page that n processes share counts 1/n in each),
plus the pages of Ray's object store that no running process has mapped; the page cache of files is not counted. It is
sampled up to ten times a second. Processes are found by an environment variable that they inherit, so that one whose
parent has ended is counted too.

The figure of `prompt` is the largest of all cases, and is for the bytes in the store after the step. The table also has
the largest amount within the step, with messages and responses.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray._private import internal_api  # used by `ray memory`; the public state API needs the dashboard

from benchmarks.harness import finish, machine

RUN_VARIABLE = "RLVID_BENCHMARK_RUN"  # in the environment of all processes of a measured run
GIB = 2**30
DEMO_STEPS = 6
STREAM_CLIPS = 500
STREAM_STORE_BYTES = GIB  # less than all frames, so that what is not streamed would be spilled


class Memory(threading.Thread):
    """Samples the memory of all processes of a run; `peak` is the largest sum, in bytes.

    Args:
        run_id: value of `RUN_VARIABLE` in the environment of the processes.
        also: a further process.
    """

    def __init__(self, run_id: str, also: int | None = None, every_s: float = 0.1):
        super().__init__(daemon=True)
        self.peak = 0
        self.parts: dict[str, int] = {}  # bytes by command at the peak
        self.samples = 0
        self._entry, self._also, self._every_s = f"{RUN_VARIABLE}={run_id}".encode(), also, every_s
        self._stop_asked = threading.Event()

    def now(self) -> dict[str, int]:
        """Bytes by command name, and of the pages of the object store that no process maps."""
        parts: dict[str, int] = {}
        stores: dict[tuple[int, int], int] = {}
        mapped = 0
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                if int(pid) != self._also and self._entry not in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    continue
                fields = dict(
                    line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
                )
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                if name == "raylet":
                    stores |= _store_files(pid)
            except (OSError, ValueError):  # the process has ended
                continue
            parts[name] = parts.get(name, 0) + _kib(fields["Pss"])
            mapped += _kib(fields["Pss_Shmem"])
        parts["unmapped object store"] = max(0, sum(stores.values()) - mapped)
        return parts

    def run(self) -> None:
        while not self._stop_asked.wait(self._every_s):
            parts = self.now()
            self.samples += 1
            if (total := sum(parts.values())) > self.peak:
                self.peak, self.parts = total, parts

    def __enter__(self) -> Memory:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop_asked.set()
        self.join()

    def table(self) -> str:
        named = sorted(self.parts.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in named if size > 2**20)


def _kib(field: str) -> int:
    return int(field.removesuffix("kB")) * 1024


def _store_files(pid: str) -> dict[tuple[int, int], int]:
    """Allocated bytes of the shared memory files that a process holds open, by device and inode."""
    sizes: dict[tuple[int, int], int] = {}
    for fd in os.scandir(f"/proc/{pid}/fd"):
        try:
            if os.readlink(fd.path).startswith("/dev/shm/"):
                status = os.stat(fd.path)
                sizes[status.st_dev, status.st_ino] = status.st_blocks * 512
        except OSError:  # it has been closed
            continue
    return sizes


def store_stats() -> Any:
    """Ray's own account of its object store (`ray memory --stats-only`)."""
    node = ray.nodes()[0]
    reply = internal_api.node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
    return reply.store_stats


class StorePeak(threading.Thread):
    """Largest number of bytes that Ray's object store reports while the context is open."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self._stop_asked = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(0.05):
            self.bytes = max(self.bytes, store_stats().object_store_bytes_used)

    def __enter__(self) -> StorePeak:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop_asked.set()
        self.join()


@contextmanager
def ray_session(store_bytes: int) -> Iterator[Memory]:
    """Start a Ray session; yield a `Memory` of its processes and this one."""
    os.environ[RUN_VARIABLE] = run_id = uuid.uuid4().hex
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=store_bytes)
    try:
        yield Memory(run_id, also=os.getpid())
    finally:
        ray.shutdown()


def demo(folder: Path) -> dict[str, float]:
    run_id = uuid.uuid4().hex
    overrides = [
        f"run.dir={folder / 'run'}",
        f"data.cache_dir={folder / 'cache'}",
        f"train.steps={DEMO_STEPS}",
        f"warm_start.steps={DEMO_STEPS}",
    ]
    command = [sys.executable, "-m", "jobs.cli", "grpo", "jobs/configs/demo.yaml", *overrides]
    with Memory(run_id) as memory, (folder / "output").open("wb") as output:
        done = subprocess.run(command, env=os.environ | {RUN_VARIABLE: run_id}, stdout=output, stderr=output)
    if done.returncode:
        raise RuntimeError(f"the demo failed:\n{(folder / 'output').read_text()[-2000:]}")
    print(f"demo    peak {memory.peak / GIB:.2f} GiB PSS in {memory.samples} samples: {memory.table()}", flush=True)
    return {"demo_peak_gib": memory.peak / GIB}


def prompt(folder: Path) -> dict[str, float]:
    from actors.clip_store import ClipStore
    from actors.roles import Roles
    from rlvid.config import GrpoJobConfig, SyntheticConfig, TinyModelConfig
    from rlvid.data.manifest import load_manifest
    from rlvid.models.tiny import make_tiny
    from rlvid.synthetic.moving_shapes import make_synthetic

    manifest, _ = make_synthetic(folder / "data", SyntheticConfig(train=32, eval=1), seed=0)
    samples = load_manifest(manifest, None, None, "")
    model = folder / "model"
    make_tiny(model, TinyModelConfig(), [f"{s.question} {s.answer}" for s in samples], seed=0)
    keys: dict[str, Any] = {
        "model": {"path": model},
        "data": {"train": manifest, "cache_dir": folder / "cache"},
        "rollout": {"max_tokens": 8, "max_model_len": 2048},
        "placement": {"threads": 1, "encode_cpus": 0.1},
    }
    sizes = {
        "demo": ({"frames": 4, "height": 56, "width": 56}, samples),
        "long": ({"frames": 16, "height": 308, "width": 308}, samples[:8]),
    }
    worst = 0.0
    with ray_session(GIB), ExitStack() as stack:
        team = stack.enter_context(
            Roles(model, GrpoJobConfig.model_validate(keys), ("trainer", "generator"), folder / "logs")
        )
        team.wait_ready()
        team.fleet.sync(team.trainer, 0)
        print("\n  prompt tokens   G  raw bytes  store bytes  ratio  most within the step")
        for name, (video, some) in sizes.items():
            cfg = GrpoJobConfig.model_validate(keys | {"video": video})
            clips = ClipStore(cfg, model, len(some), on_bad=lambda path, reason: None)
            stack.callback(clips.close)
            for group_size in (1, 16):
                raw, tokens, held, peak = prompt_bytes(team, clips, some, cfg, group_size)
                worst = max(worst, held / raw)
                columns = f"{raw:10.0f} {held:12.0f} {held / raw:6.3f} {peak / raw:6.3f}"
                print(f"{name:>8} {tokens:6d} {group_size:3d} {columns}", flush=True)
    return {"bytes_per_prompt_ratio": worst}


def prompt_bytes(team: Any, clips: Any, samples: Any, cfg: Any, group_size: int) -> tuple[float, int, float, float]:
    """One GRPO step. Per prompt: raw bytes, tokens, bytes in the store after the step, largest within the step."""
    from rlvid.rollout.engine import Sampling
    from rlvid.training.objectives import PolicyGradient
    from rlvid.training.policy_batch import make_minibatch, sampled_groups

    before = settled_bytes()
    with StorePeak() as peak:
        prompts = clips.encode(samples)
        groups = team.fleet.generate(prompts, Sampling(group_size, 1.0, cfg.rollout.max_tokens))
        batch = sampled_groups(prompts, groups, cfg.rollout.temperature)
        batch = [group.with_tokens(advantages=np.ones(group.n_tokens, np.float32)) for group in batch]
        team.trainer.step(make_minibatch(batch, cfg.grpo, cfg.rollout.max_tokens), PolicyGradient(cfg.grpo), 0.0)
    del groups, batch  # the driver's views of what the engines returned
    held = settled_bytes() - before
    n = len(prompts)
    fetched = ray.get([p.prompt for p in prompts])
    raw = sum(p.patches.nbytes + p.token_ids.nbytes for p in fetched) / n
    return raw, fetched[0].length, held / n, (peak.bytes - before) / n


def settled_bytes() -> int:
    """Bytes in the store after Ray has freed objects without references, which takes a moment."""
    gc.collect()
    seen = [store_stats().object_store_bytes_used]
    while len(seen) < 5 or len(set(seen[-5:])) > 1:
        time.sleep(0.3)
        seen.append(store_stats().object_store_bytes_used)
    return int(seen[-1])


def stream(folder: Path) -> dict[str, float]:
    from benchmarks.tiny import tiny_model
    from rlvid.config import SyntheticConfig, VideoConfig
    from rlvid.data.encoding import Source
    from rlvid.data.manifest import load_manifest
    from rlvid.data.ray_stream import open_prompt, prompt_stream
    from rlvid.synthetic.moving_shapes import make_synthetic

    sizes = SyntheticConfig(train=STREAM_CLIPS, eval=1, size=224, frames=16)
    manifest, _ = make_synthetic(folder / "data", sizes, seed=0)
    samples = load_manifest(manifest, None, None, "")
    video = VideoConfig(frames=16, height=224, width=224)
    source = Source(tiny_model(folder / "model"), video, folder / "cache", 10 * GIB, 4096)
    with ray_session(STREAM_STORE_BYTES) as memory:
        time.sleep(3)
        gc.collect()
        idle = sum(memory.now().values())
        frames_bytes = 0
        with memory, StorePeak() as store:
            begin = time.monotonic()
            for row in prompt_stream(ray.put(samples), range(len(samples)), source, 2, 0.5).iter_rows():
                _, prompt, outcome = open_prompt(row)
                assert prompt is not None and outcome.decodes == 1
                frames_bytes += prompt.patches.nbytes
                time.sleep(0.1)
            seconds = time.monotonic() - begin
        spilled = int(store_stats().spilled_bytes_total)
    added = memory.peak - idle
    print(
        f"\nstream  {frames_bytes / GIB:.2f} GiB of frames in {seconds:.0f} s: {added / GIB:.2f} GiB above the idle "
        f"session's {idle / GIB:.2f}; store {store.bytes / GIB:.2f} GiB, spilled {spilled} bytes\n"
        f"        at the peak: {memory.table()}",
        flush=True,
    )
    if spilled:
        raise RuntimeError(f"Ray spilled {spilled} bytes to disk")
    return {"stream_peak_gib": added / GIB}


PARTS = {"demo": demo, "prompt": prompt, "stream": stream}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="only this one, in this process")
    args = parser.parse_args()
    if args.part:
        with tempfile.TemporaryDirectory() as tmp:
            finish(PARTS[args.part](Path(tmp)))
        return
    print(machine(), flush=True)
    result: dict[str, float] = {}
    for part in PARTS:
        command = [sys.executable, "-m", "benchmarks.memory", "--part", part]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            *table, last = process.stdout.read().splitlines()
        if process.returncode:
            raise SystemExit(f"part {part} failed")
        print("\n".join(table), flush=True)
        result |= json.loads(last)
    finish(result)


if __name__ == "__main__":
    main()
