"""The actors of one job: started side by side, stopped together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import ray

from actors.frozen_model import Reference
from actors.generator_fleet import GeneratorFleet
from actors.placement import Placement, plan
from actors.rewards import Rewards
from actors.scorer import ScorerHandle
from actors.trainer import GroupRef, TrainerGroup
from rlvid.config import JobConfig

T = TypeVar("T")


class Roles:
    """Trainer, generators, rewards and reference model, as far as the job asks for them. Use as a context manager.

    `wait_ready` raises what any of their processes raised while it started.

    Args:
        model: checkpoint folder of the policy.
        roles: of "trainer", "generator" (which brings the rewards), "reference", "scorer" (reward models).
    """

    def __init__(self, model: Path, cfg: JobConfig, roles: Sequence[str], logs: Path, seed: int):
        slots = plan(cfg, tuple(roles))
        model, logs = model.resolve(), logs.resolve()
        self._trainer: TrainerGroup | None = None
        self._fleet: GeneratorFleet | None = None
        self._rewards: Rewards | None = None
        self._reference: Any = None
        self._ready: list[Callable[[], object]] = []
        with ExitStack() as stack:
            placement = Placement(slots, cfg.placement)
            stack.callback(placement.remove)
            by_role = {role: [s for s in slots if s.role == role] for role in roles}
            if "trainer" in roles:
                self._trainer = TrainerGroup(model, cfg, by_role["trainer"], placement, logs)
                stack.callback(self._trainer.stop)
                self._ready.append(self._trainer.wait_ready)
            if "generator" in roles:
                self._fleet = GeneratorFleet(model, cfg, by_role["generator"], placement, logs, seed)
                stack.callback(self._fleet.stop)
                self._ready.append(self._fleet.wait_ready)
                models = [part.path for part in cfg.rewards if part.kind == "model" and part.path]
                scorers = [
                    ScorerHandle(path, cfg, slot, placement, logs)
                    for path, slot in zip(models, by_role.get("scorer", ()), strict=True)
                ]
                for scorer in scorers:
                    stack.callback(scorer.stop)
                    self._ready.append(scorer.wait_ready)
                place = cfg.placement
                self._rewards = Rewards(cfg.rewards, place.reward_workers, place.reward_cpus, scorers)
                stack.callback(self._rewards.stop)
            for slot in by_role.get("reference", ()):
                actor = ray.remote(Reference).options(**placement.options(slot))
                self._reference = actor.remote(logs / f"{slot.name}.log", cfg.placement.threads)
                stack.callback(ray.kill, self._reference)
                started = self._reference.start.remote(model, cfg, slot.gpus > 0)
                self._ready.append(partial(ray.get, started))
            self._stack = stack.pop_all()

    @property
    def trainer(self) -> TrainerGroup:
        return _started(self._trainer, "trainer")

    @property
    def fleet(self) -> GeneratorFleet:
        return _started(self._fleet, "generator")

    @property
    def rewards(self) -> Rewards:
        return _started(self._rewards, "generator")

    def wait_ready(self) -> None:
        for wait in self._ready:
            wait()

    def reference_logprobs(self, groups: Sequence[GroupRef]) -> list[npt.NDArray[np.float32]]:
        """Log-probs under the reference, one array [sum R] per group. With adapters the trainer is the reference."""
        if self._reference is None:
            return self.trainer.reference_logprobs(groups)
        return list(ray.get(self._reference.logprobs.remote(groups)))

    def freeze_reference(self, file: Path, is_resumed: bool) -> None:
        """The reference takes the policy's present weights and keeps them in `file`, where a resumed run reads them."""
        file = file.resolve()
        if self._reference is None:
            (self.trainer.load_reference if is_resumed else self.trainer.freeze_reference)(file)
        elif is_resumed:
            ray.get(self._reference.load.remote(file))
        else:
            ray.get(self._reference.load_weights.remote(list(self.trainer.put_weights(is_checked=False))))
            ray.get(self._reference.save.remote(file))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _started(role: T | None, name: str) -> T:
    if role is None:
        raise RuntimeError(f"this job has not started the role {name!r}")
    return role
