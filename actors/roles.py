"""The actors of one job: started side by side, stopped together."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self, TypeVar

from actors.frozen_model import ReferenceGroup, RewardModelProcess
from actors.generator_fleet import GeneratorFleet
from actors.placement import Placement
from actors.ranks import GroupRef, LogProbs
from actors.rewards import Rewards
from actors.trainer import TrainerGroup
from rlvid.config import JobConfig
from rlvid.errors import UserError
from rlvid.models.families import load_family
from rlvid.rewards.rules import make_parts

logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R", TrainerGroup, GeneratorFleet, ReferenceGroup, RewardModelProcess)


class Roles:
    """Trainer, generators, rewards and reference model: those that the job needs. Use as a context manager.

    `wait_ready` raises what any of their processes raised while it started.

    Args:
        model: checkpoint folder of the policy.
        roles: of "trainer", "generator" (which brings the rewards), "reference", "reward_model".
        on_event: called with one line when something happens to an actor, from a thread.
    """

    def __init__(
        self,
        model: Path,
        cfg: JobConfig,
        roles: Sequence[str],
        logs: Path,
        on_event: Callable[[str], None] = logger.warning,
    ):
        self._trainer: TrainerGroup | None = None
        self._fleet: GeneratorFleet | None = None
        self._rewards: Rewards | None = None
        self._reference: ReferenceGroup | None = None
        self._model = model = model.resolve()
        self._ready: list[Callable[[], object]] = []
        with ExitStack() as stack:
            self.placement = placement = Placement(cfg, roles, logs.resolve(), on_event)
            stack.callback(placement.remove)

            def starting(role: R) -> R:
                stack.callback(role.stop)
                self._ready.append(role.wait_ready)
                return role

            if "trainer" in roles:
                self._trainer = starting(TrainerGroup(model, placement))
            if "generator" in roles:
                self._fleet = starting(GeneratorFleet(model, placement))
                slots = placement.slots("reward_model")  # none in an evaluation and for a local judge
                models = {
                    part.label: starting(RewardModelProcess(part.path, slot, placement)).score
                    for part, slot in zip(cfg.reward_models, slots, strict=False)
                }
                place, parts, opening = cfg.placement, make_parts(cfg.rewards), load_family(model).opening
                timeout_s = cfg.deadlines.reward_s
                self._rewards = Rewards(parts, place.reward_workers, place.reward_cpus, opening, models, timeout_s)
                stack.callback(self._rewards.stop)
            if "reference" in roles:
                self._reference = starting(ReferenceGroup(model, placement))
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

    def begin_reference_logprobs(self, groups: Sequence[GroupRef]) -> Callable[[], LogProbs]:
        """Log-probs under the reference, one array [sum R] per group. With adapters the trainer is the reference.

        Returns:
            A function that waits for them.
        """
        return (self._reference or self.trainer).begin_reference_logprobs(groups)

    def freeze_reference(self, folder: Path, is_resumed: bool) -> None:
        """The reference takes the policy's present weights and keeps them in `folder`, where a resumed run reads them.

        A policy that has not moved is the checkpoint that the run starts from: a link to it is enough.

        Raises:
            UserError: the run is resumed, and its reference is gone.
        """
        folder = folder.absolute()  # not resolved: it may be a link
        if self._reference is None:
            folder.mkdir(exist_ok=True)
            self.trainer.freeze_reference(folder / "adapters.safetensors", is_resumed)
            return
        if not is_resumed:
            part = folder.with_name(f"{folder.name}.part")
            for leftover in (part, folder):  # of a run that was killed before its first checkpoint
                leftover.unlink() if leftover.is_symlink() else shutil.rmtree(leftover, ignore_errors=True)
            if self.trainer.updates:
                self.trainer.export(part)
                part.rename(folder)
            else:
                folder.symlink_to(self._model)
        if not folder.exists():
            raise UserError(f"{folder} is gone, the reference model of this run: start a new one, with another run.dir")
        self._reference.load(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _started(role: T | None, name: str) -> T:
    if role is None:
        raise RuntimeError(f"this job has not started the role {name!r}")
    return role
