"""Seconds of a weight update from the trainer's parameters to the engine's model, and of a memcpy of the same bytes.

`python -m benchmarks.weight_sync`. Text models with the proportions of Qwen2-0.5B (with its layers at 200M), float32,
about a quarter of the parameters in the embedding, so that the number of tensors is that of a real model.

What is timed is `GeneratorFleet.sync` as a job calls it, with real actors (a DeepSpeed trainer rank, a vLLM engine):
parameters into Ray's object store bucket by bucket, each bucket sent on to the engine while the next is written, loaded
into the engine's model, caches dropped, the replica confirmed as ready. What makes it fair:

- The memcpy (`numpy.copyto`, one core, the fastest plain copy of one flat buffer) uses buffers that have been touched.
  Sync and memcpy alternate; ratios are medians over rounds.
- The first syncs are not counted: they compare checksums, and their pages of the object store are new.
- All parameters are sent in every round, also those that did not change.

`calls_per_bucket` is the number of update messages of the fleet to the replica, per bucket.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actors.actor_process import start_ray
from actors.roles import Roles
from benchmarks.harness import finish, in_turns, machine, median_ratio
from benchmarks.tiny import tiny_model
from rlvid.config import GrpoJobConfig


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2 with heads of 64."""

    hidden: int
    layers: int
    mlp: int
    kv_heads: int
    vocab: int


SHAPES = {
    "1m": Shape(hidden=128, layers=4, mlp=384, kv_heads=1, vocab=2048),
    "50m": Shape(hidden=512, layers=12, mlp=1536, kv_heads=2, vocab=27_000),
    "200m": Shape(hidden=896, layers=10, mlp=4864, kv_heads=2, vocab=58_000),
}
WARMUP = 4


def make_model(folder: Path, shape: Shape) -> tuple[int, int]:
    """Save a random model of this shape with a small tokenizer. Returns its bytes and its number of tensors."""
    tiny_model(folder, family="qwen2")
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM  # after `tiny_model`, which prepares torchvision

    config = Qwen2Config.from_pretrained(folder)
    config.hidden_size, config.intermediate_size = shape.hidden, shape.mlp
    config.num_hidden_layers, config.layer_types = shape.layers, ["full_attention"] * shape.layers
    config.num_attention_heads, config.num_key_value_heads = shape.hidden // 64, shape.kv_heads
    config.vocab_size = shape.vocab
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    parameters = list(model.parameters())  # without the tied head
    return sum(p.nbytes for p in parameters), len(parameters)


def measure(shape: Shape, folder: Path, rounds: int) -> tuple[dict[str, list[float]], int, int, float]:
    """Seconds of sync and memcpy in each round, bytes, tensors, and update messages per bucket."""
    size, n_tensors = make_model(folder / "model", shape)
    source, target = np.ones(size, dtype=np.uint8), np.ones(size, dtype=np.uint8)
    cfg = GrpoJobConfig.model_validate(
        {
            "model": {"path": str(folder / "model")},
            "data": {"train": "unused.jsonl"},
            "rollout": {"max_model_len": 256, "max_batched_tokens": 256, "max_sequences": 8, "max_tokens": 8},
        }
    )
    with Roles(folder / "model", cfg, ("trainer", "generator"), folder / "logs") as roles:
        roles.wait_ready()
        version = 0

        def sync() -> None:
            nonlocal version
            version += 1
            roles.fleet.sync(roles.trainer, version)

        seconds = in_turns({"sync": sync, "memcpy": lambda: np.copyto(target, source)}, rounds, WARMUP)
        messages = []
        track = roles.fleet._replicas.track

        def count(ref, call):  # type: ignore[no-untyped-def]
            messages.append(call.kind)
            track(ref, call)

        roles.fleet._replicas.track = count  # type: ignore[method-assign]
        sync()
        return seconds, size, n_tensors, messages.count("sync") / len(roles.fleet._weights)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default=",".join(SHAPES), help="some of " + ", ".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    start_ray()
    print(f"{machine()}\n{'':>5} {'bytes':>11} {'tensors':>7} {'sync ms':>9} {'memcpy ms':>9} {'GB/s':>6} {'ratio':>6}")
    result: dict[str, float | None] = {f"memcpy_ratio_{name}": None for name in SHAPES}
    calls = 0.0
    for name in options.sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            seconds, size, n_tensors, per_bucket = measure(SHAPES[name], Path(folder), options.rounds)
        ratio = median_ratio(seconds["memcpy"], seconds["sync"])
        sync_s, memcpy_s = statistics.median(seconds["sync"]), statistics.median(seconds["memcpy"])
        print(
            f"{name:>5} {size:>11} {n_tensors:>7} {1e3 * sync_s:>9.1f} {1e3 * memcpy_s:>9.1f} "
            f"{size / sync_s / 1e9:>6.2f} {ratio:>6.3f}",
            flush=True,
        )
        result[f"memcpy_ratio_{name}"] = ratio
        calls = max(calls, per_bucket)
    finish({**result, "calls_per_bucket": calls})


if __name__ == "__main__":
    main()
