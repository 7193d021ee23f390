"""Time of forward and backward of one group, with one prompt for all responses and with one sequence per response.

`python -m benchmarks.shared_prefix` takes a tiny random Qwen2-VL, G = 8 responses of 32 tokens and video prompts of
about 300, 1,000 and 4,000 tokens. Contestants, in turns, same threads, same weights, float32:

  naive     the stock transformers model (sdpa) on a batch of G full sequences, logits where a response is predicted:
            as in trainers that repeat the prompt. The prompt goes through vision tower and text model G times.
  packed 1  rlvid's own forward without sharing (`train.shared_prefix: false`).
  shared    rlvid's forward.

`ratio_*` is naive over shared, the median over rounds. Log-probs and gradients of naive and shared are compared, the
naive side with the prompt's own rotary positions (transformers 5.19 counts them differently after a video). Peak
memory is measured in a child process for each contestant, above its memory before the first forward.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import finish, in_turns, median_ratio, medians
from benchmarks.tiny import family_of, tiny_model, video_prompt
from rlvid.models import torchvision_ops
from rlvid.models.families.qwen_vl import QwenVL
from rlvid.models.loading import load_model
from rlvid.models.tower import normalise
from rlvid.training.batch import Group
from rlvid.training.packing import PackedPolicy, pack
from rlvid.types import Prompt

GROUP = 8
RESPONSE = 32
LENGTHS = (300, 1000, 4000)


class Naive(nn.Module):
    """The stock model on G sequences of equal length."""

    def __init__(self, folder: Path, family: QwenVL):
        super().__init__()
        from transformers import AutoModelForImageTextToText

        self.network = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa")
        self.family = family

    def forward(self, group: Group[Prompt]) -> Tensor:
        prompt, responses = group.prompt, torch.from_numpy(np.stack(group.responses)).long()
        n = len(responses)
        ids = torch.cat([torch.from_numpy(prompt.token_ids).long().expand(n, -1), responses], dim=1)
        after = prompt.next_position + torch.arange(RESPONSE).expand(3, -1)
        positions = torch.cat([torch.from_numpy(prompt.positions), after], dim=1)[:, None].expand(-1, n, -1)
        pixels = normalise(torch.from_numpy(prompt.patches), self.family, torch.float32)
        hidden = self.network.model(
            input_ids=ids,
            position_ids=positions,
            pixel_values_videos=pixels.repeat(n, 1),
            video_grid_thw=torch.from_numpy(prompt.grid_thw).repeat(n, 1),
            use_cache=False,
        ).last_hidden_state[:, -RESPONSE - 1 : -1]
        logits = self.network.lm_head(hidden).float()
        logits[..., list(self.family.banned_tokens)] = float("-inf")
        return logits.log_softmax(-1).gather(-1, responses[..., None])[..., 0].flatten()


def group_of(family: QwenVL, n_tokens: int) -> Group[Prompt]:
    prompt = video_prompt(family, n_tokens)
    rng = np.random.default_rng(1)
    n = GROUP * RESPONSE
    ids = tuple(rng.integers(20, 250, RESPONSE).astype(np.int32) for _ in range(GROUP))
    return Group(prompt, prompt.cost, ids, {"weights": rng.normal(size=n).astype(np.float32) / n}, temperature=1.0)


class Contestants:
    def __init__(self, folder: Path, names: tuple[str, ...] = ("naive", "packed 1", "shared")):
        torchvision_ops.ensure()
        self.family = family_of(folder)
        self.naive = Naive(folder, self.family) if "naive" in names else None
        self.packed = PackedPolicy(load_model(folder, "float32"), self.family)

    def run(self, name: str, group: Group[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probs [G * R] and the gradients of their weighted sum, by parameter."""
        model: nn.Module = self.naive if name == "naive" else self.packed  # type: ignore[assignment]
        model.zero_grad(set_to_none=True)
        if name == "naive":
            logprobs = model(group)
        else:
            logprobs = model(pack(group.cut(0) if name == "packed 1" else [group]))[0]
        (logprobs * torch.from_numpy(group.tokens["weights"])).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return logprobs.detach(), grads


def relative_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference of all gradients over the norm of the first."""
    assert a.keys() == b.keys()
    difference = sum(float((a[n] - b[n]).double().square().sum()) for n in a)
    return (difference / sum(float(g.double().square().sum()) for g in a.values())) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None, help="torch threads; default: torch's own choice")
    parser.add_argument("--peak", nargs=3, metavar=("FOLDER", "NAME", "LENGTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak:
        print(peak_mib(Path(args.peak[0]), args.peak[1], int(args.peak[2])))
        return
    with tempfile.TemporaryDirectory() as tmp:
        finish(compare(tiny_model(Path(tmp) / "model"), args.rounds))


def compare(folder: Path, rounds: int) -> dict[str, float]:
    contestants = Contestants(folder)
    result: dict[str, float] = {"max_logprob_diff": 0.0, "grad_rel_diff": 0.0}
    print(f"{'prompt':>8} {'contestant':>10} {'seconds':>9} {'ratio':>7} {'peak MiB':>9}")
    for length in LENGTHS:
        group = group_of(contestants.family, length)
        (naive, naive_grads), (shared, shared_grads) = (contestants.run(n, group) for n in ("naive", "shared"))
        result["max_logprob_diff"] = max(result["max_logprob_diff"], float((naive - shared).abs().max()))
        difference = relative_difference(named(naive_grads), named(shared_grads))
        result["grad_rel_diff"] = max(result["grad_rel_diff"], difference)
        names = ("naive", "packed 1", "shared")
        seconds = in_turns({n: partial(contestants.run, n, group) for n in names}, rounds if length < 4000 else 1)
        result[f"ratio_{length}"] = median_ratio(seconds["naive"], seconds["shared"])
        for name, value in medians(seconds).items():
            ratio = median_ratio(seconds[name], seconds["shared"])
            command = [sys.executable, "-m", "benchmarks.shared_prefix", "--peak", str(folder), name, str(length)]
            peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
            if name != "packed 1":
                result[f"peak_mib_{name}_{length}"] = peak
            print(f"{group.prompt.length:8d} {name:>10} {value:9.3f} {ratio:7.2f} {peak:9.0f}", flush=True)
    return dict(sorted(result.items()))


def named(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("network."): g for name, g in grads.items()}


def peak_mib(folder: Path, name: str, length: int) -> float:
    """Peak resident memory of one forward and backward, above the memory before it, MiB."""
    contestants = Contestants(folder, (name,))
    group = group_of(contestants.family, length)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status_mib("VmRSS")
    contestants.run(name, group)
    return _status_mib("VmHWM") - before


def _status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key))) / 1024


if __name__ == "__main__":
    main()
