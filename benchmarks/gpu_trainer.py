"""Forward and backward of one group on one GPU: seconds, share of the GPU's peak (MFU), memory, and where time goes.

`python -m benchmarks.gpu_trainer` needs torch, transformers, peft, DeepSpeed and rlvid: no Ray, no vLLM, no download.
It makes random models of published shapes in bfloat16 and random clips of 448 x 448 pixels. Not yet run on a GPU. One
prompt of P tokens, nearly all video, and G = 8 responses of R tokens:

  shared  rlvid's forward: the prompt and its tower once; with activation checkpointing or without
  stock   transformers' own model (sdpa) on G full sequences, logits where a response is predicted

MFU counts the operations of a forward and a backward without recomputation. Then the kernels of one step by class, and
log-probs of both in float32. `--device cpu --small` is the same program with tiny shapes; the tests run it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import finish
from benchmarks.tiny import TEXTS, video_sample
from rlvid.config import LoraConfig, TinyModelConfig
from rlvid.models.families import load_family
from rlvid.models.families.qwen_vl import QwenVL
from rlvid.models.loading import use_packed_attention
from rlvid.models.lora import add_adapters
from rlvid.models.tiny import make_tiny
from rlvid.models.tower import normalise
from rlvid.training.batch import Group
from rlvid.training.packing import PackedPolicy, pack
from rlvid.types import Clip, Prompt

GROUP = 8
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "4090": 165}  # bfloat16, dense; makers' data sheets
CLASSES = {
    "attention": ("flex", "flash", "fmha", "scaled_dot_product", "attention"),
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "::mm", "::addmm", "::bmm", "::linear"),
    "copies and casts": ("copy", "cat", "memcpy", "memset", "::to"),
    "norms and reductions": ("reduce", "norm", "softmax", "::sum", "::mean"),
    "element-wise": ("elementwise", "::mul", "::add", "::silu", "::gelu", "::sub", "::div", "triton_poi", "triton_per"),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a published model. `tower` are keys of its vision config."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    tied: bool
    tower: dict[str, Any]


TOWER2 = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
TOWER25: dict[str, Any] = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
TOWER25 |= {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
SHAPES = {
    "Qwen2-VL-2B": Shape("qwen2_vl", 1536, 28, 12, 2, 8960, 151_936, True, TOWER2 | {"hidden_size": 1536}),
    "Qwen2-VL-7B": Shape("qwen2_vl", 3584, 28, 28, 4, 18_944, 152_064, False, TOWER2 | {"hidden_size": 3584}),
    "Qwen2.5-VL-3B": Shape("qwen2_5_vl", 2048, 36, 16, 2, 11_008, 151_936, True, TOWER25 | {"out_hidden_size": 2048}),
    "Qwen2.5-VL-7B": Shape("qwen2_5_vl", 3584, 28, 28, 4, 18_944, 152_064, False, TOWER25 | {"out_hidden_size": 3584}),
    "small": Shape("qwen2_vl", 128, 2, 2, 1, 256, 512, True, {"depth": 2, "embed_dim": 64, "num_heads": 1}),
}
SHAPES["small"].tower["hidden_size"] = 128


@dataclass(frozen=True)
class Case:
    shape: str
    prompt: int
    response: int
    is_checkpointed: bool = False
    has_stock: bool = False
    lora: bool = False


CASES = [
    Case("Qwen2-VL-2B", 2000, 256, has_stock=True),
    Case("Qwen2-VL-2B", 4000, 256, has_stock=True),
    Case("Qwen2-VL-2B", 4000, 256, is_checkpointed=True, has_stock=True),
    Case("Qwen2-VL-2B", 8000, 512, is_checkpointed=True),
    Case("Qwen2-VL-2B", 16_000, 512, is_checkpointed=True),
    Case("Qwen2-VL-2B", 32_000, 1024, is_checkpointed=True),
    Case("Qwen2.5-VL-3B", 4000, 256, is_checkpointed=True),
    Case("Qwen2-VL-7B", 16_000, 512, is_checkpointed=True, lora=True),
    Case("Qwen2.5-VL-7B", 16_000, 512, is_checkpointed=True, lora=True),
]
COLUMNS = dict(zip(("shape", "P", "R", "recomputed", "LoRA", "seconds", "MFU"), (14, 6, 5, 10, 5, 8, 6), strict=True))
COLUMNS |= {"GiB": 6, "stock": 8, "ratio": 6, "of tokens": 9}
SMALL = [Case("small", 300, 8, has_stock=True), Case("small", 300, 8, is_checkpointed=True, lora=True)]


class Stock(nn.Module):
    """transformers' model on G sequences of equal length."""

    def __init__(self, network: Any, family: QwenVL):
        super().__init__()
        self.network, self.family = network, family

    def forward(self, group: Group[Prompt]) -> Tensor:
        prompt, device = group.prompt, self.network.device
        responses = torch.from_numpy(np.stack(group.responses)).long().to(device)
        n, length = responses.shape
        ids = torch.cat([torch.from_numpy(prompt.token_ids).long().to(device).expand(n, -1), responses], dim=1)
        after = torch.from_numpy(prompt.next_position + np.broadcast_to(np.arange(length), (3, length)))
        positions = torch.cat([torch.from_numpy(prompt.positions), after], dim=1)[:, None].to(device)
        pixels = normalise(torch.from_numpy(prompt.patches).to(device), self.family, self.network.dtype)
        hidden = self.network.model(
            input_ids=ids,
            position_ids=positions.expand(-1, n, -1),
            pixel_values_videos=pixels.repeat(n, 1),
            video_grid_thw=torch.from_numpy(prompt.grid_thw).to(device).repeat(n, 1),
            use_cache=False,
        ).last_hidden_state[:, -length - 1 : -1]
        logits = self.network.lm_head(hidden).float()
        logits[..., list(self.family.banned_tokens)] = float("-inf")
        return logits.log_softmax(-1).gather(-1, responses[..., None])[..., 0].flatten()


class Bench:
    """Models and groups on one device."""

    def __init__(self, device: str, folder: Path):
        self.device, self._folder = torch.device(device), folder
        self.is_gpu = self.device.type == "cuda"

    def family(self, shape: Shape) -> QwenVL:
        folder = self._folder / shape.family
        if not folder.exists():
            make_tiny(folder, TinyModelConfig.model_validate({"family": shape.family}), TEXTS, seed=0)
        family = load_family(folder)
        assert isinstance(family, QwenVL)
        return family

    def network(self, shape: Shape, family: QwenVL, dtype: torch.dtype, attention: str = "sdpa") -> Any:
        """A random model of this shape, made on the device."""
        from transformers import AutoConfig, AutoModelForImageTextToText

        config = copy.deepcopy(AutoConfig.from_pretrained(family.folder))
        text = config.get_text_config()
        text.hidden_size, text.num_hidden_layers, text.intermediate_size = shape.hidden, shape.layers, shape.mlp
        text.num_attention_heads, text.num_key_value_heads = shape.heads, shape.kv_heads
        text.vocab_size, text.layer_types = shape.vocab, ["full_attention"] * shape.layers
        text.rope_parameters = {**text.rope_parameters, "mrope_section": sections(shape.hidden // shape.heads)}
        config.tie_word_embeddings = text.tie_word_embeddings = shape.tied
        for key, value in shape.tower.items():
            setattr(config.vision_config, key, value)
        torch.manual_seed(0)
        with self.device:
            return AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)

    def group(self, family: QwenVL, case: Case, seed: int = 0) -> Group[Prompt]:
        prompt = long_prompt(family, case.prompt)
        rng = np.random.default_rng(seed)
        ids = tuple(rng.integers(20, 250, case.response).astype(np.int32) for _ in range(GROUP))
        return Group(prompt, prompt.cost, ids, temperature=1.0)

    def measure(self, run: Callable[[], object], rounds: int) -> tuple[float, float]:
        """Median seconds of a step, and peak GiB (of the GPU)."""
        run()  # compiles
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(rounds):
            self.wait()
            begin = time.perf_counter()
            run()
            self.wait()
            seconds.append(time.perf_counter() - begin)
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.is_gpu else 0.0
        return statistics.median(seconds), peak

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    @property
    def peak_flops(self) -> float | None:
        """The device's peak in bfloat16, where it is known."""
        name = torch.cuda.get_device_name() if self.is_gpu else ""
        return next((tflops * 1e12 for key, tflops in PEAK_TFLOPS.items() if key in name), None)


def sections(head_dim: int) -> list[int]:
    """Rotary pairs of time, height and width: 16, 24, 24 for a head of 128."""
    return [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16]


def long_prompt(family: QwenVL, n_tokens: int) -> Prompt:
    """A clip of 448 x 448 pixels (256 tokens for two frames) or, below 256 tokens, of fewer pixels."""
    side = family.frame_multiple * (16 if n_tokens > 1000 else 4)
    per_patch = (side // family.frame_multiple) ** 2
    n = 2 * max(1, (n_tokens - 40) // per_patch)
    frames = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    times = np.arange(n)
    clip = Clip(f"clip-{n_tokens}", frames, times / 2.0, times, n, 2.0, "random", "")
    return family.encode(video_sample(0), [clip])


def operations(shape: Shape, network: Any, prompt: Prompt, response: int, lora: bool) -> float:
    """Floating-point operations of forward and backward with the prompt shared; a product of n numbers counts 2 n.

    A backward is twice the forward; of frozen weights once, as their gradients are not computed.
    """
    p, g, r = prompt.length, GROUP, response
    tower = sum(x.numel() for x in network.model.visual.parameters())
    text = sum(x.numel() for n, x in network.model.language_model.named_parameters() if "embed" not in n)
    patches = len(prompt.patches)
    linear = 2.0 * (text * (p + g * r) + tower * patches + shape.vocab * shape.hidden * g * r)
    attention = 4.0 * shape.layers * shape.hidden * (p * p / 2 + g * r * (p + r / 2))
    width, depth = shape.tower.get("embed_dim") or shape.tower["hidden_size"], shape.tower["depth"]
    attention += 4.0 * depth * width * sum(t * (h * w) ** 2 for t, h, w in prompt.grid_thw.tolist())
    return (2 if lora else 3) * linear + 3 * attention


def step_of(model: nn.Module, group: Group[Prompt], device: torch.device) -> Callable[[], Tensor]:
    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        out: Tensor = model(group) if isinstance(model, Stock) else model(pack([group]).to(device))[0]
        out.sum().backward()
        return out.detach()

    return step


def profile(bench: Bench, step: Callable[[], object]) -> dict[str, float]:
    """Share of a step's time in each class of kernels (operators on CPU)."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    activity = ProfilerActivity.CUDA if bench.is_gpu else ProfilerActivity.CPU
    with record(activities=[activity]) as recorded:
        step()
        bench.wait()
    spent: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        time_us = event.self_device_time_total if bench.is_gpu else event.self_cpu_time_total
        name = event.key.lower()
        kind = next((kind for kind, words in CLASSES.items() if any(word in name for word in words)), "other")
        spent[kind] += time_us
    total = sum(spent.values()) or 1.0
    return {kind: value / total for kind, value in sorted(spent.items(), key=lambda item: -item[1])}


def run_case(bench: Bench, case: Case, rounds: int) -> dict[str, float | str | None]:
    """One row of the table; where memory ends, a row that says so."""
    shape = SHAPES[case.shape]
    family = bench.family(shape)
    dtype = torch.bfloat16 if bench.is_gpu else torch.float32
    row: dict[str, float | str | None] = dict.fromkeys(("seconds", "mfu", "gib", "stock_seconds"))
    row["tokens"] = 0.0
    try:
        group = bench.group(family, case)
        row["tokens"] = float(group.prompt.length)
        network = bench.network(shape, family, dtype)
        use_packed_attention(network, family)
        policy = PackedPolicy(network, family).train()
        flops = operations(shape, network, group.prompt, case.response, case.lora)
        if case.lora:
            add_adapters(network, LoraConfig(), family.no_lora)
            network.to(bench.device)
        if case.is_checkpointed:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        step = step_of(policy, group, bench.device)
        row["seconds"], row["gib"] = bench.measure(step, rounds)
        row["mfu"] = flops / float(row["seconds"] or 0) / bench.peak_flops if bench.peak_flops else None
        if case is CASES[1] or case is SMALL[0]:
            row["profile"] = ", ".join(f"{kind} {share:.0%}" for kind, share in profile(bench, step).items())
        del network, policy, step
        if case.has_stock:
            free(bench)
            stock = bench.network(shape, family, dtype)
            if case.is_checkpointed:
                stock.gradient_checkpointing_enable({"use_reentrant": False})
            row["stock_seconds"], row["stock_gib"] = bench.measure(
                step_of(Stock(stock, family).train(), group, bench.device), rounds
            )
    except torch.cuda.OutOfMemoryError:
        row["note"] = "out of memory"
    free(bench)
    return row


def free(bench: Bench) -> None:
    gc.collect()
    if bench.is_gpu:
        torch.cuda.empty_cache()


def exactness(bench: Bench) -> float:
    """Largest difference of log-probs of shared and stock, float32, small shape, same weights."""
    shape = SHAPES["small"]
    family = bench.family(shape)
    network, stock = (bench.network(shape, family, torch.float32) for _ in range(2))
    stock.load_state_dict(network.state_dict())
    use_packed_attention(network, family)
    group = bench.group(family, SMALL[0])
    with torch.no_grad():
        shared = PackedPolicy(network, family)(pack([group]).to(bench.device))[0]
        return float((shared - Stock(stock, family)(group)).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    result: dict[str, float | int | str | None] = {}
    with tempfile.TemporaryDirectory() as tmp:
        bench = Bench(args.device, Path(tmp))
        name = torch.cuda.get_device_name() if bench.is_gpu else "CPU"
        print(f"{name}, torch {torch.__version__}")
        print(" ".join(f"{text:>{n}}" for text, n in COLUMNS.items()), flush=True)
        for case in SMALL if args.small else CASES:
            row = run_case(bench, case, args.rounds)
            p, r, s, stock = row["tokens"], case.response, row["seconds"], row["stock_seconds"]
            assert isinstance(p, float)
            ratio = float(stock) / float(s) if stock and s else None
            token_ratio = GROUP * (p + r) / (p + GROUP * r)
            texts = [f"{case.shape:>14} {p:6.0f} {r:5d} {case.is_checkpointed!s:>10} {case.lora!s:>5}"]
            columns = ((s, 8, ".3f"), (row["mfu"], 6, ".1%"), (row["gib"], 6, ".1f"), (stock, 8, ".3f"))
            texts += [f"{'-' if x is None else format(x, form):>{n}}" for x, n, form in columns]
            texts += [f"{'-' if ratio is None else format(ratio, '.2f'):>6}", f"{token_ratio:9.2f}"]
            print(" ".join(texts), row.get("note", ""), flush=True)
            if "profile" in row:
                print(f"  {row['profile']}", flush=True)
            key = f"{case.shape}_{case.prompt}{'_ckpt' * case.is_checkpointed}{'_lora' * case.lora}"
            result |= {f"{key}_s": s, f"{key}_mfu": row["mfu"], f"{key}_gib": row["gib"]}
            if ratio is not None:
                result |= {f"{key}_ratio": ratio, f"{key}_ratio_of_tokens": ratio / token_ratio}
        result["max_logprob_diff"] = exactness(bench)
    finish(result)


if __name__ == "__main__":
    main()
