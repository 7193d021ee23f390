"""What T-GRPO costs, and whether the trained model needs the order of the frames.

`python -m benchmarks.temporal` measures, in turns and in one process, the driver's and the trainer's side of a step of
GRPO and of T-GRPO with equal numbers of responses: encoding the clip, shuffling its patches for the second group, and
one update. `max_diff` is the largest difference between the tower's embeddings of shuffled frames and the permuted
embeddings of the frames in order.

Then `rlvid grpo` trains the demo's model with T-GRPO on questions about direction and order, and vLLM answers the
held-out ones from frames in order and from shuffled ones (`accuracy_ordered`, `accuracy_shuffled`). --quick leaves the
training out.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.harness import finish, in_turns, median_ratio, medians
from benchmarks.runs import CONFIGS, run
from benchmarks.tiny import QUESTION, family_of, frames_of, tiny_model, video_sample
from rlvid.config import GrpoConfig, ModelConfig, TrainConfig
from rlvid.models import torchvision_ops
from rlvid.models.families.views import View, frame_order, seen_as
from rlvid.models.loading import load_model
from rlvid.models.tower import normalise
from rlvid.training.batch import Group
from rlvid.training.objectives import PolicyGradient
from rlvid.types import Clip, Prompt

GROUP, RESPONSE, PROMPT = 8, 32, 600
TASK = (
    "data.synthetic={train: 1024, eval: 128, kinds: [direction, order]}",
    "video={frames: 8, height: 56, width: 56}",
    "grpo.variant=t_grpo",
)


class Steps:
    """One step of each."""

    def __init__(self, folder: Path):
        from rlvid.training.learner import Learner  # imports DeepSpeed

        self._family = family_of(folder)
        frames = frames_of(PROMPT, seed=0)
        n = len(frames)
        self._clip = Clip("clip", frames, np.arange(n) / 8.0, np.arange(n), n, 8.0, "random", "")
        self._learner = Learner(folder, self._family, ModelConfig(path=folder), TrainConfig(lr=1e-5))
        rng = np.random.default_rng(1)
        self._ids = tuple(rng.integers(20, 250, RESPONSE).astype(np.int32) for _ in range(GROUP))
        tokens = GROUP * RESPONSE
        self._arrays: dict[str, Any] = {
            name: rng.normal(size=tokens).astype(np.float32) for name in ("advantages", "rollout_logprobs")
        }
        self._arrays["weights"] = np.full(tokens, 1 / tokens, np.float32)

    def prompt(self) -> Prompt:
        return self._family.encode(video_sample(0), [self._clip])

    def grpo(self) -> None:
        self._train(self.prompt())

    def temporal(self) -> None:
        prompt = self.prompt()
        # what the engine does for the second group, which is not trained on
        seen_as(prompt, "shuffled", self._family.temporal_patch)
        self._train(prompt)

    def _train(self, prompt: Prompt) -> None:
        group = Group(prompt, prompt.cost, self._ids, self._arrays, temperature=1.0)
        self._learner.step([group], PolicyGradient(GrpoConfig()), 1e-5)


@torch.no_grad()
def embedding_difference(folder: Path, prompt: Prompt) -> float:
    """Largest difference of the tower's output for shuffled frames to the permuted output for those in order."""
    family, tower = family_of(folder), load_model(folder, "float32").model.visual

    def embeddings(of: Prompt) -> torch.Tensor:
        pixels = normalise(torch.from_numpy(of.patches), family, torch.float32)
        output: torch.Tensor = tower(pixels, grid_thw=torch.from_numpy(of.grid_thw)).pooler_output
        return output

    t = int(prompt.grid_thw[0, 0])
    own = embeddings(prompt)
    permuted = own.view(t, -1, own.shape[-1])[frame_order(t, "clip")].flatten(0, 1)
    return float((embeddings(seen_as(prompt, "shuffled_patches", 2)) - permuted).abs().max())


def answer_shuffled(folder: Path, cache: Path) -> dict[str, float]:
    """Share of right greedy answers of a trained policy, from frames in order and from shuffled ones; and by kind of
    question."""
    from rlvid.config import RolloutConfig, VideoConfig
    from rlvid.data.encoding import SampleEncoder, Source
    from rlvid.data.manifest import load_manifest
    from rlvid.rollout.engine import Sampling
    from rlvid.rollout.vllm_engine import VllmEngine

    policy = folder / "policy"
    samples = load_manifest(folder / "data" / "eval.jsonl", None, None, "")
    encoder = SampleEncoder(Source(policy, VideoConfig(frames=8, height=56, width=56), cache, 2**30, 2**31))
    engine = VllmEngine(policy, family_of(policy), RolloutConfig(max_model_len=512), "float32", 0, on_gpu=False)
    shares = {}
    views: tuple[View | None, ...] = (None, "shuffled", "shuffled_patches")
    for view in views:
        name, sampling = view or "ordered", Sampling(1, 0.0, 8, view=view)
        answers = {}
        for sample in samples:
            prompt, _ = encoder.encode(sample)
            assert prompt is not None
            answers[engine.submit(prompt, sampling)] = sample
        right: Counter[str] = Counter()
        while engine.is_busy:
            for request, rollouts in engine.step():
                sample = answers[request]
                right[str(sample.problem_type)] += rollouts[0].text.strip() == sample.answer
        shares[f"accuracy_{name}"] = right.total() / len(samples)
        of_kind = Counter(str(sample.problem_type) for sample in samples)
        shares |= {f"{kind}_{name}": right[kind] / n for kind, n in of_kind.items()}
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--quick", action="store_true", help="no training")
    args = parser.parse_args()
    torchvision_ops.ensure()
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    with tempfile.TemporaryDirectory() as tmp:
        dist.init_process_group("gloo", init_method=f"file://{tmp}/meet", rank=0, world_size=1)
        model = tiny_model(Path(tmp) / "model")
        steps = Steps(model)
        prompt = steps.prompt()
        print(f"{QUESTION!r}: a prompt of {prompt.length} tokens, {GROUP} responses of {RESPONSE}")
        seconds = in_turns({"grpo": steps.grpo, "temporal": steps.temporal}, args.rounds)
        for name, value in medians(seconds).items():
            print(f"{name:>9} {value:.3f} s")
        result = {"ratio": median_ratio(seconds["temporal"], seconds["grpo"])}
        result["max_diff"] = embedding_difference(model, prompt)
        if not args.quick:
            run("grpo", CONFIGS / "demo.yaml", Path(tmp) / "run", [*TASK, f"train.steps={args.steps}"])
            result |= answer_shuffled(Path(tmp) / "run", Path(tmp) / "cache")
    finish(result)


if __name__ == "__main__":
    main()
