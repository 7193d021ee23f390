"""What the trainer needs beside weights and optimizer: activations, the attention's mask, loading and exporting.

`python -m benchmarks.trainer_memory`, on CPU, float32, each measurement in a process of its own. Memory is the peak of
resident memory that no file is behind (`RssAnon`, `RssShmem`): the kernel drops pages of files when it needs room.

  passes  forward and backward of one group, above the memory with weights and gradients: a prompt of about 4,000 video
          tokens and G responses of 32, a tiny Qwen2-VL and one whose text layers have 50 million parameters; in one row
          or depth first (the responses after their prompt, a part at a time), with and without recomputation. The
          gradients of one row and depth first are compared, and their seconds.
  mask    bytes that FlexAttention's mask of a row holds, 4,000 and 32,000 tokens
  load    a text model of 200 million parameters with the proportions of one of 7 billion (7 % in the embedding) under
          ZeRO-3 on two ranks, from the files to both ranks' shares, and their export: peak of both ranks together over
          the model's bytes. The export's counts the weights that are there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import finish, in_turns, machine, median_ratio
from benchmarks.tiny import family_of, tiny_model, video_prompt
from rlvid.models.attention import SharedPrefixLayout
from rlvid.models.loading import load_model
from rlvid.training.batch import Group
from rlvid.training.depth_first import PromptPass
from rlvid.training.packing import PackedPolicy, pack
from rlvid.types import Prompt

PROMPT, RESPONSE = 4000, 32
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "50m": {"hidden_size": 512, "layers": 12, "vocab_size": 4096, "vision_size": 256, "vision_layers": 4},
}
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
"""Environment in which glibc returns what is freed at once: resident memory is then what tensors take."""
RANKS = 2


class Peak(threading.Thread):
    """Largest memory of this process while the context is open, in bytes, above that at its beginning."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._stop_asked = threading.Event()
        self._begin = self._largest = held_bytes()

    def run(self) -> None:
        while not self._stop_asked.wait(0.002):
            self._largest = max(self._largest, held_bytes())

    @property
    def bytes(self) -> int:
        return self._largest - self._begin

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop_asked.set()
        self.join()
        self._largest = max(self._largest, held_bytes())


def held_bytes() -> int:
    """Resident bytes of this process without a file behind them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


# --- passes -----------------------------------------------------------------------------------------------------------


class Passes:
    """Forward and backward of a group, in one row or depth first."""

    def __init__(self, folder: Path, group_size: int, is_checkpointed: bool, n_tokens: int = PROMPT):
        self.family = family_of(folder)
        self.policy = PackedPolicy(load_model(folder, "float32"), self.family).train()
        if is_checkpointed:
            self.policy.network.gradient_checkpointing_enable({"use_reentrant": False})
        prompt = video_prompt(self.family, n_tokens)
        rng = np.random.default_rng(1)
        ids = tuple(rng.integers(20, 250, RESPONSE).astype(np.int32) for _ in range(group_size))
        weights = rng.normal(size=group_size * RESPONSE).astype(np.float32) / (group_size * RESPONSE)
        self.group = Group(prompt, prompt.cost, ids, {"weights": weights}, temperature=1.0)
        for parameter in self.policy.parameters():  # memory of the gradients is the optimizer's, not the passes'
            parameter.grad = torch.zeros_like(parameter)

    def run(self, is_deep: bool) -> None:
        if is_deep:
            parts = self.group.cut(self.group.prompt_cost)
            prompt = PromptPass(self.policy, self.group.prompt, torch.device("cpu"))
            for part in parts:
                self._loss(self.policy(prompt.row(part))[0], part).backward()
                prompt.collect()
            prompt.loss().backward()
        else:
            self._loss(self.policy(pack([self.group]))[0], self.group).backward()

    def gradients(self, is_deep: bool) -> dict[str, Tensor]:
        self.policy.zero_grad(set_to_none=True)
        self.run(is_deep)
        return {name: p.grad.clone() for name, p in self.policy.named_parameters() if p.grad is not None}

    @staticmethod
    def _loss(logprobs: Tensor, group: Group[Prompt]) -> Tensor:
        return (logprobs * torch.from_numpy(group.tokens["weights"])).sum()


def passes(folder: Path, group_size: int, is_checkpointed: bool, is_deep: bool, n_tokens: int) -> int:
    """Peak bytes; the first run is of a short prompt, and fills the pools of libraries."""
    Passes(folder, 2, is_checkpointed, n_tokens=64).run(is_deep)
    measured = Passes(folder, group_size, is_checkpointed, n_tokens)
    with Peak() as peak:
        measured.run(is_deep)
    return peak.bytes


def table(folder: Path, size: str) -> dict[str, float]:
    model = tiny_model(folder / size, **SIZES[size])
    result: dict[str, float] = {}
    print(f"\n{size}: {'G':>4} {'tokens':>7} {'recomputed':>10} {'depth first':>11} {'peak MiB':>9}")
    cases = [(g, n, c, d) for g in (1, 8, 64) for n in (1000, PROMPT) for c in (False, True) for d in (False, True)]
    for g, n, is_checkpointed, is_deep in cases:
        is_needed = n == PROMPT and is_deep == (g != 8)
        if is_needed or (size == "tiny" and (n == PROMPT or g == 8)):
            peak = in_child("passes", model, g, int(is_checkpointed), int(is_deep), n)
            result[f"{g}{'c' * is_checkpointed}{'d' * is_deep}{n}"] = peak
            print(f"{'':>6} {g:4d} {n:7d} {is_checkpointed!s:>10} {is_deep!s:>11} {peak / 2**20:9.0f}", flush=True)
    return result


def compare(folder: Path, rounds: int) -> dict[str, float]:
    """Gradients and seconds of one row and depth first, tiny model, G = 8."""
    both = Passes(tiny_model(folder / "compared"), 8, is_checkpointed=False)
    row, deep = both.gradients(False), both.gradients(True)
    difference = sum(float((row[n] - deep[n]).double().square().sum()) for n in row)
    total = sum(float(g.double().square().sum()) for g in row.values())
    seconds = in_turns({"row": partial(both.run, False), "deep": partial(both.run, True)}, rounds)
    price = median_ratio(seconds["deep"], seconds["row"])
    return {"grad_rel_diff": math.sqrt(difference / total), "time_price_depth_first": price}


# --- mask -------------------------------------------------------------------------------------------------------------


def mask_bytes(n_tokens: int) -> int:
    """Bytes of FlexAttention's mask of a row: its lists of blocks, and what its rule reads."""
    layout = SharedPrefixLayout.of([(n_tokens - 8 * 128, [128] * 8)])
    mask = layout.block_mask
    rule = [c.cell_contents for c in mask.mask_mod.__closure__ or () if isinstance(c.cell_contents, Tensor)]
    lists = [value for value in vars(mask).values() if isinstance(value, Tensor)]
    return sum(t.nbytes for t in (*rule, *lists))


# --- load and export --------------------------------------------------------------------------------------------------


def load_and_export(rank: int, folder: Path, model: Path) -> None:
    """One rank; prints its peak bytes of loading, its bytes then, and its peak bytes of exporting above them."""
    import torch.distributed as dist

    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    import deepspeed  # noqa: F401  # imported before the measurement, as is all that loading imports

    from rlvid.config import ModelConfig, TrainConfig
    from rlvid.models.families import load_family
    from rlvid.training.learner import Learner, deepspeed_config

    cfg = TrainConfig(zero_stage=3)
    settings = deepspeed_config(cfg, "float32", RANKS)
    load_model(folder / "small", "float32", settings)
    with Peak() as loading:
        network = load_model(model, "float32", settings)
    del network
    learner = Learner(model, load_family(model), ModelConfig(path=model), cfg)
    dist.barrier()
    with Peak() as exporting:
        learner.export(folder / "out", model)
    print(json.dumps([loading.bytes, exporting.bytes]))


def load(folder: Path) -> dict[str, float]:
    from benchmarks.weight_sync import SHAPES, Shape, make_model

    shape = Shape(hidden=1024, layers=14, mlp=3584, kv_heads=2, vocab=14_336)
    size, _ = make_model(folder / "200m", shape)
    make_model(folder / "small", SHAPES["1m"])
    command = [sys.executable, "-m", "benchmarks.trainer_memory", "--child", "load"]
    ranks = [
        subprocess.Popen([*command, str(r), str(folder), str(folder / "200m")], stdout=subprocess.PIPE, text=True)
        for r in range(RANKS)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank failed")
    loading, exporting = (
        sum(values) for values in zip(*(json.loads(o.splitlines()[-1]) for o in outputs), strict=True)
    )
    return {"load_bytes_ratio": loading / size, "export_bytes_ratio": 1 + exporting / size}


def in_child(*words: object) -> int:
    command = [sys.executable, "-m", "benchmarks.trainer_memory", "--child", *map(str, words)]
    output = subprocess.run(command, env=os.environ | EXACT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("load", "passes"), help="one of the parts")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, *words = args.child
        if name == "passes":
            print(passes(Path(words[0]), int(words[1]), words[2] == "1", words[3] == "1", int(words[4])))
        else:
            load_and_export(int(words[0]), Path(words[1]), Path(words[2]))
        return
    print(machine(), flush=True)
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as tmp:
        if args.only != "passes":
            result |= load(Path(tmp))
        if args.only != "load":
            result |= compare(Path(tmp), args.rounds)
            bytes_4k, bytes_32k = mask_bytes(4000), mask_bytes(32000)
            result |= {"mask_bytes_per_token": bytes_32k / 32000, "mask_growth_4k_32k": bytes_32k / bytes_4k}
            for size in SIZES:
                peaks = table(Path(tmp), size)
                end = "" if size == "tiny" else f"_{size}"
                for kind, c in (("", "c"), ("_kept", "")):  # with recomputation, and without
                    result[f"peak_ratio_g64_g1{kind}{end}"] = peaks[f"64{c}d{PROMPT}"] / peaks[f"1{c}d{PROMPT}"]
                result[f"peak_ratio_ckpt{end}"] = peaks[f"8c{PROMPT}"] / peaks[f"8{PROMPT}"]
                if f"64{PROMPT}" in peaks:  # what depth first avoids
                    result[f"peak_ratio_g64_row{end}"] = peaks[f"64{PROMPT}"] / peaks[f"1{PROMPT}"]
    finish(result)


if __name__ == "__main__":
    main()
