"""The actors of one job: started together, stopped together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import ray

from actors.actor_process import require_compiler
from actors.frozen_model import Reference
from actors.generator_fleet import GeneratorFleet
from actors.placement import Placement, plan
from actors.rewards import Rewards
from actors.scorer import ScorerHandle
from actors.trainer import GroupRef, TrainerGroup
from rlvid.config import JobConfig


class Team:
    """Trainer, generators and, where the job asks for it, the reference model. Leaving it stops them.

    Their processes start side by side; `wait_ready` raises what any of them raised.
    """

    def __init__(self, folder: Path, cfg: JobConfig, roles: Sequence[str], logs: Path, seed: int):
        if "trainer" in roles and not cfg.placement.gpus:
            require_compiler()
        slots = plan(cfg, tuple(roles))
        logs = logs.resolve()
        self._placement = Placement(slots, cfg.placement)
        by_role = {
            role: [s for s in slots if s.role == role] for role in ("trainer", "generator", "reference", "scorer")
        }
        folder = folder.resolve()
        if by_role["trainer"]:
            self.trainer = TrainerGroup(folder, cfg, by_role["trainer"], self._placement, logs)
        if by_role["generator"]:
            self.fleet = GeneratorFleet(folder, cfg, by_role["generator"], self._placement, logs, seed)
            models = [part.path for part in cfg.rewards if part.kind == "model" and part.path]
            self._scorers = [
                ScorerHandle(path, cfg, slot, self._placement, logs)
                for path, slot in zip(models, by_role["scorer"], strict=True)
            ]
            place = cfg.placement
            self.rewards = Rewards(cfg.rewards, place.reward_workers, place.reward_cpus, self._scorers)
        self.reference: Any = None
        if by_role["reference"]:
            slot = by_role["reference"][0]
            self.reference = (
                ray.remote(Reference)
                .options(**self._placement.options(slot))
                .remote(logs / f"{slot.name}.log", cfg.placement.threads)
            )
            self._reference_ready = self.reference.start.remote(folder, cfg, slot.gpus > 0)

    def wait_ready(self) -> None:
        if hasattr(self, "trainer"):
            self.trainer.wait_ready()
        if hasattr(self, "fleet"):
            self.fleet.wait_ready()
            for scorer in self._scorers:
                scorer.wait_ready()
        if self.reference is not None:
            ray.get(self._reference_ready)

    def reference_logprobs(self, groups: Sequence[GroupRef]) -> list[npt.NDArray[np.float32]]:
        if self.reference is None:  # adapters: the trainer is its own reference
            return self.trainer.reference_logprobs(groups)
        return list(ray.get(self.reference.logprobs.remote(groups)))

    def freeze_reference(self, file: Path, is_resumed: bool) -> None:
        """The reference takes the policy's present weights and keeps them in `file`; a resumed run reads them there."""
        file = file.resolve()
        if self.reference is None and is_resumed:
            self.trainer.load_reference(file)
        elif self.reference is None:
            self.trainer.freeze_reference(file)
        elif is_resumed:
            ray.get(self.reference.load.remote(file))
        else:
            ray.get(self.reference.load_weights.remote(list(self.trainer.put_weights(is_checked=False))))
            ray.get(self.reference.save.remote(file))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if hasattr(self, "fleet"):
            self.fleet.stop()
            self.rewards.stop()
            for scorer in self._scorers:
                scorer.stop()
        if hasattr(self, "trainer"):
            self.trainer.stop()
        if self.reference is not None:
            ray.kill(self.reference)
        self._placement.remove()
