"""The real engine and the real trainer network in one process, and the parity check between them without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from actors.parity_check import check_parity
from actors.ranks import GroupRef
from rlvid.config import GrpoJobConfig, RolloutConfig
from rlvid.models.families import load_family
from rlvid.models.families.chat import ChatFamily
from rlvid.models.families.frames import SquareFrames
from rlvid.models.loading import load_model
from rlvid.rollout.engine import Sampling
from rlvid.rollout.vllm_engine import VllmEngine
from rlvid.rollout.weights.buckets import to_buckets
from rlvid.training.batch import Group
from rlvid.training.packing import PackedPolicy, pack
from rlvid.training.parameters import in_parts
from rlvid.types import Encoded, Prompt, Rollout, Sample
from rlvid.video.frame_variants import Variant, probe
from tests.prompts import clip_of, noise, sample_of


class Both:
    """Engine and trainer network with the same weights."""

    def __init__(self, folder: Path):
        self.family = load_family(folder)
        self.policy = PackedPolicy(load_model(folder, "float32"), self.family)
        cfg = RolloutConfig(max_model_len=1024, max_sequences=32)
        self.engine = VllmEngine(folder, self.family, cfg, "float32", seed=0, on_gpu=False)
        self.version = 0

    def generate(
        self, prompts: Sequence[Prompt], n: int = 2, max_tokens: int = 8, temperature: float = 1.0
    ) -> list[list[Rollout]]:
        ids = [self.engine.submit(p, Sampling(n, temperature, max_tokens)) for p in prompts]
        ended: dict[str, list[Rollout]] = {}
        while self.engine.is_busy:
            ended |= dict(self.engine.step())
        return [ended[i] for i in ids]

    @torch.no_grad()
    def by_trainer(
        self, prompt: Prompt, rollouts: Sequence[Rollout], temperature: float = 1.0
    ) -> npt.NDArray[np.float32]:
        ids = tuple(r.token_ids for r in rollouts)
        return self.policy(pack([Group(prompt, prompt.cost, ids, temperature=temperature)]))[0].numpy()

    def gap(self, prompt: Prompt, rollouts: Sequence[Rollout], temperature: float = 1.0) -> float:
        by_engine = np.concatenate([r.logprobs for r in rollouts])
        return float(np.abs(by_engine - self.by_trainer(prompt, rollouts, temperature)).max())

    def sync(self) -> None:
        self.version += 1
        parts = in_parts(self.policy.network.named_parameters(), 2**20)
        self.engine.update_weights(self.version, list(to_buckets(parts)))

    @torch.no_grad()
    def move_weights(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in self.policy.network.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=generator))


class LocalFleet:
    def __init__(self, both: Both):
        self.both = both

    def generate(self, prompts: Sequence[Encoded], sampling: Sampling) -> list[list[Rollout]]:
        return self.both.generate([p.prompt for p in prompts], sampling.n, sampling.max_tokens, sampling.temperature)  # type: ignore[misc]

    def first_logprobs(
        self, prompts: Sequence[Encoded], tokens: Sequence[int], temperature: float
    ) -> list[npt.NDArray[np.float32]]:
        return [self.both.engine.first_logprobs(p.prompt, tokens, temperature) for p in prompts]  # type: ignore[arg-type]


class LocalTrainer:
    def __init__(self, both: Both):
        self.both = both

    @torch.no_grad()
    def logprobs(self, groups: Sequence[GroupRef]) -> list[npt.NDArray[np.float32]]:
        return [self.both.policy(pack([g]))[0].numpy() for g in groups]  # type: ignore[arg-type]


class LocalClips:
    """Clips of noise; what the encoders do, without Ray."""

    def __init__(self, family: ChatFamily):
        self.family = family

    def encode(self, samples: Sequence[Sample], variant: Variant = "as_is") -> list[Encoded]:
        encoded = []
        for sample in samples:
            side = self.family.frame_multiple
            size = side if isinstance(self.family, SquareFrames) else 4 * side
            clips = [
                probe(clip_of(noise(8, size, size, seed=int(sample.id)), f"noise-{sample.id}"), variant, side)
                for _ in sample.media
            ]
            prompt = self.family.encode(sample, clips)
            encoded.append(Encoded(sample, prompt, prompt.length, prompt.cost))  # type: ignore[arg-type]
        return encoded


def run_check(both: Both, n_videos: int = 1) -> float:
    """The check that opens a run; the gap that it finds."""
    both.sync()
    cfg = GrpoJobConfig.model_validate({"model": {"tiny": {}}, "data": {"synthetic": {}}})
    samples = [sample_of(n_videos, sample_id="1"), sample_of(n_videos, sample_id="2")]
    found = check_parity(LocalFleet(both), LocalTrainer(both), LocalClips(both.family), samples, cfg)  # type: ignore[arg-type]
    return found.gap
