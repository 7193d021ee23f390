"""The actors of one job: started side by side, stopped together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import ray

from actors.frozen_model import Reference, RewardModel, ask_reward_model, start_frozen
from actors.generator_fleet import GeneratorFleet
from actors.placement import Placement, plan
from actors.rewards import Rewards
from actors.trainer import GroupRef, TrainerGroup
from rlvid.config import JobConfig
from rlvid.models.families import load_family
from rlvid.rewards.rules import make_parts

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Roles:
    """Trainer, generators, rewards and reference model: those that the job needs. Use as a context manager.

    `wait_ready` raises what any of their processes raised while it started.

    Args:
        model: checkpoint folder of the policy.
        roles: of "trainer", "generator" (which brings the rewards), "reference", "reward_model".
        on_event: called with one line when a generator fails and is restarted, from a thread.
    """

    def __init__(
        self,
        model: Path,
        cfg: JobConfig,
        roles: Sequence[str],
        logs: Path,
        seed: int,
        on_event: Callable[[str], None] = logger.warning,
    ):
        slots = plan(cfg, tuple(roles))
        model, logs = model.resolve(), logs.resolve()
        self._trainer: TrainerGroup | None = None
        self._fleet: GeneratorFleet | None = None
        self._rewards: Rewards | None = None
        self._reference: Any = None
        self._ready: list[Callable[[], object]] = []
        with ExitStack() as stack:
            placement = Placement(slots, cfg)
            stack.callback(placement.remove)
            by_role = {role: [s for s in slots if s.role == role] for role in roles}
            if "trainer" in roles:
                self._trainer = TrainerGroup(model, cfg, by_role["trainer"], placement, logs)
                stack.callback(self._trainer.stop)
                self._ready.append(self._trainer.wait_ready)
            if "generator" in roles:
                self._fleet = GeneratorFleet(model, cfg, by_role["generator"], placement, logs, seed, on_event)
                stack.callback(self._fleet.stop)
                self._ready.append(self._fleet.wait_ready)
                models = {}
                for part, slot in zip(cfg.reward_models, by_role.get("reward_model", ()), strict=True):
                    scorer, wait = start_frozen(RewardModel, part.path, cfg, slot, placement, logs)
                    stack.callback(ray.kill, scorer)
                    self._ready.append(wait)
                    models[part.label] = partial(ask_reward_model, scorer, cfg.deadlines.model_s)
                place, parts = cfg.placement, make_parts(cfg.rewards)
                opening = load_family(model).opening
                self._rewards = Rewards(
                    parts, place.reward_workers, place.reward_cpus, opening, models, cfg.deadlines.reward_s
                )
                stack.callback(self._rewards.stop)
            for slot in by_role.get("reference", ()):
                self._reference, wait = start_frozen(Reference, model, cfg, slot, placement, logs)
                stack.callback(ray.kill, self._reference)
                self._ready.append(wait)
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
