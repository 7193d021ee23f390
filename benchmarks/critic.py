"""What a critic costs: a step of PPO over a step of GRPO on the same batch, with a long video prompt.

`python -m benchmarks.critic` takes a tiny random Qwen2-VL and one group: a video prompt of about 1,000 tokens and 8
responses of 32 tokens. A step is what `rlvid grpo` and `rlvid ppo` do with it where old log-probs are the trainer's:
score the group, then one update. Contestants, in turns:

  grpo      log-probs, then the policy's loss
  shared    PPO, a value head on the policy's network: log-probs and values in one forward, then both losses
  own       PPO, a critic of its own: log-probs and values, then an update of each network
  unscored  GRPO with the engine's log-probs: the update alone

`ratio_shared_trunk` and `ratio_own_critic` are over grpo, `ratio_shared_over_unscored` says what PPO costs more than a
GRPO that scores nothing. Values and their gradients with the shared prompt are compared with separate sequences.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.harness import finish, in_turns, median_ratio, medians
from benchmarks.tiny import family_of, tiny_model, video_prompt
from rlvid.config import GrpoConfig, ModelConfig, PpoConfig, TrainConfig
from rlvid.models import torchvision_ops
from rlvid.models.heads import VALUE
from rlvid.models.loading import load_model
from rlvid.training.batch import Group
from rlvid.training.objectives import ActorCritic, PolicyGradient, Values
from rlvid.training.packing import PackedScorer, pack
from rlvid.types import Prompt

GROUP, RESPONSE, PROMPT = 8, 32, 1000


def group_of(folder: Path) -> Group[Prompt]:
    prompt = video_prompt(family_of(folder), PROMPT)
    rng = np.random.default_rng(1)
    n = GROUP * RESPONSE
    ids = tuple(rng.integers(20, 250, RESPONSE).astype(np.int32) for _ in range(GROUP))
    arrays = ("advantages", "rollout_logprobs", "values", "returns")
    tokens = {name: rng.normal(size=n).astype(np.float32) for name in arrays}
    tokens["weights"] = np.full(n, 1 / n, np.float32)
    return Group(prompt, prompt.cost, ids, tokens, temperature=1.0)


class Contestants:
    """One rank of each trainer."""

    def __init__(self, folder: Path):
        from rlvid.training.learner import Learner  # imports DeepSpeed

        family, model, cfg = family_of(folder), ModelConfig(path=folder), TrainConfig(lr=1e-5)
        self.group = group_of(folder)
        self._policy = Learner(folder, family, model, cfg)
        self._both = Learner(folder, family, model, cfg, VALUE, is_policy=True)
        self._critic = Learner(folder, family, model, cfg, VALUE)
        self._gradient = PolicyGradient(GrpoConfig(old_logprobs="trainer"), "trainer")
        self._values = Values(PpoConfig().value_clip)

    def _scored(self, learner: Any) -> Group[Prompt]:
        outputs = learner.outputs([self.group])[0].reshape(self.group.n_tokens, -1)
        return self.group.with_tokens(old_logprobs=np.ascontiguousarray(outputs[:, 0]))

    def grpo(self) -> None:
        self._policy.step([self._scored(self._policy)], self._gradient, 1e-5)

    def unscored(self) -> None:
        self._policy.step([self.group], PolicyGradient(GrpoConfig()), 1e-5)

    def shared(self) -> None:
        self._both.step([self._scored(self._both)], ActorCritic(self._gradient, self._values, 0.5), 1e-5)

    def own(self) -> None:
        scored = self._scored(self._policy)
        self._critic.outputs([scored])
        self._critic.step([scored], self._values, 1e-5)
        self._policy.step([scored], self._gradient, 1e-5)


def exactness(folder: Path) -> dict[str, float]:
    """Largest difference of values, and the relative one of gradients, between a shared prompt and separate ones."""
    group = group_of(folder)
    critic = PackedScorer(load_model(folder, "float32"), family_of(folder), VALUE)
    found = []
    for parts in ([group], [replace(part) for part in group.cut(0)]):
        critic.zero_grad(set_to_none=True)
        values = critic(pack(parts))[0]
        loss, _ = Values(None)(values, parts)
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in critic.parameters() if p.grad is not None])
        found.append((values.detach(), grads))
    (shared, own), (separate, other) = found
    difference = float((own - other).norm() / other.norm())
    return {"max_value_diff": float((shared - separate).abs().max()), "grad_rel_diff": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torchvision_ops.ensure()
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    with tempfile.TemporaryDirectory() as tmp:
        dist.init_process_group("gloo", init_method=f"file://{tmp}/meet", rank=0, world_size=1)
        folder = tiny_model(Path(tmp) / "model")
        result = exactness(folder)
        contestants = Contestants(folder)
        names = ("grpo", "shared", "own", "unscored")
        seconds = in_turns({name: getattr(contestants, name) for name in names}, rounds)
    for name, value in medians(seconds).items():
        print(f"{name:>9} {value:.3f} s, {median_ratio(seconds[name], seconds['grpo']):.2f} of grpo")
    result["ratio_shared_trunk"] = median_ratio(seconds["shared"], seconds["grpo"])
    result["ratio_own_critic"] = median_ratio(seconds["own"], seconds["grpo"])
    result["ratio_shared_over_unscored"] = median_ratio(seconds["shared"], seconds["unscored"])
    finish(result)


if __name__ == "__main__":
    main()
