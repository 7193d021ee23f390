"""Where the actors go: a plan from the configuration, and Ray placement groups from the plan.

Every generator replica and every trainer rank has a small placement group of its own, so that replicas come and go one
by one (Ray's groups do not shrink). Colocated on GPUs, replica i and rank i of the reference are in the group of
trainer rank i, and they share its GPU; on CPU there is nothing to share.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlvid.config import JobConfig, PlacementConfig
from rlvid.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slot:
    """One actor's place: the placement group it is in, and its share of it."""

    role: str  # "trainer" | "generator" | "reference" | "reward_model"
    index: int
    cpus: float
    gpus: float
    is_beside_trainer: bool = False  # in the group of the trainer rank of the same index

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index}"

    @property
    def group(self) -> str:
        return f"trainer-{self.index}" if self.is_beside_trainer else self.name


def plan(cfg: JobConfig, roles: Sequence[str]) -> list[Slot]:
    """The slots of a job's actors."""
    place = cfg.placement
    sharing = [role for role in ("trainer", "generator", "reference") if role in roles and place.colocate]
    shares = place.gpus > 0 and "trainer" in sharing and len(sharing) > 1
    gpus = place.gpus / len(sharing) if shares else place.gpus
    ranks = range(place.trainer_workers)
    slots = [Slot("trainer", i, place.trainer_cpus, gpus) for i in ranks]
    slots += [generator_slot(cfg, i, gpus if shares else None) for i in range(cfg.rollout.replicas)]
    slots += [Slot("reference", i, place.reference_cpus, gpus, is_beside_trainer=shares) for i in ranks]
    slots += [Slot("reward_model", i, place.reference_cpus, place.gpus) for i in range(len(cfg.reward_models))]
    return [slot for slot in slots if slot.role in roles]


def generator_slot(cfg: JobConfig, index: int, share: float | None = None) -> Slot:
    """Replica `index`: in the group of trainer rank `index` with a `share` of its GPU, else in a group of its own."""
    place = cfg.placement
    if share is not None and index < place.trainer_workers:
        return Slot("generator", index, place.generator_cpus, share, is_beside_trainer=True)
    return Slot("generator", index, place.generator_cpus, place.gpus * cfg.rollout.tensor_parallel)


def describe(cfg: JobConfig, roles: Sequence[str]) -> str:
    """The plan as text, for `--dry-run`."""
    lines = [f"{s.name:<14} in group {s.group:<14} {s.cpus:g} CPU, {s.gpus:g} GPU" for s in plan(cfg, roles)]
    place = cfg.placement
    lines.append(f"{'encoders':<14} {place.encoders} wherever there is room, {place.encode_cpus:g} CPU each")
    if "generator" in roles:
        lines.append(f"{'rewards':<14} {place.reward_workers} wherever there is room, {place.reward_cpus:g} CPU each")
    return "\n".join(lines)


def require_room(slots: Sequence[Slot], place: PlacementConfig) -> None:
    """
    Raises:
        UserError: the cluster cannot hold the plan. One that may still grow is not asked.
    """
    if "RAY_ADDRESS" in os.environ:
        return
    key_of = {"reward_model": "reference"}
    counts = Counter((f"{key_of.get(slot.role, slot.role)}_cpus", slot.cpus) for slot in slots)
    counts["encode_cpus", place.encode_cpus] = place.encoders
    counts["reward_cpus", place.reward_cpus] = place.reward_workers
    cpu_keys = ", ".join(f"placement.{key}={cpus:g} (of {n})" for (key, cpus), n in counts.items())
    need = {
        "CPU": (sum(cpus * n for (_, cpus), n in counts.items()), cpu_keys),
        "GPU": (sum(slot.gpus for slot in slots), f"placement.gpus={place.gpus:g} for each actor"),
    }
    have = ray.cluster_resources()
    for kind, (amount, keys) in need.items():
        if amount > have.get(kind, 0.0) + 1e-6:
            raise UserError(
                f"the actors need {amount:g} {kind}, the cluster has {have.get(kind, 0.0):g}: lower some of {keys}; "
                f"or rollout.replicas, placement.trainer_workers; or start more nodes"
            )


class Placement:
    """The placement groups of one job, and the actors that start in them.

    Attributes:
        cfg, logs, on_event: of the job, for the roles: its config, the folder of its log files, and what is called with
            one line when something happens to an actor, from a thread.

    Raises:
        UserError: the cluster cannot hold the plan.
    """

    def __init__(
        self, cfg: JobConfig, roles: Sequence[str], logs: Path, on_event: Callable[[str], None] = logger.warning
    ):
        self.cfg, self.logs, self.on_event = cfg, logs, on_event
        self._slots = plan(cfg, roles)
        require_room(self._slots, cfg.placement)
        self._groups: dict[str, PlacementGroup] = {}
        for group in dict.fromkeys(s.group for s in self._slots):
            self._create([s for s in self._slots if s.group == group])

    def slots(self, role: str) -> list[Slot]:
        return [slot for slot in self._slots if slot.role == role]

    def start(self, kind: type, slot: Slot, log_name: str = "", **settings: Any) -> ActorHandle[Any]:
        """Start an actor in its slot. `kind` is made with a log file and a number of threads; `settings` are Ray's.

        A group that is not there yet (a late replica) is made.
        """
        if slot.group not in self._groups:
            self._create([slot])
        strategy = PlacementGroupSchedulingStrategy(self._groups[slot.group], placement_group_bundle_index=0)
        place = {"num_cpus": slot.cpus, "num_gpus": slot.gpus, "scheduling_strategy": strategy}
        log_file = self.logs / (log_name or f"{slot.name}.log")
        actor: ActorHandle[Any] = ray.remote(**place, **settings)(kind).remote(log_file, self.cfg.placement.threads)
        return actor

    def has_room(self, slot: Slot) -> bool:
        """Ask for a slot's group, if that is not done yet, without waiting: an autoscaler sees what is pending."""
        if slot.group not in self._groups:
            self._groups[slot.group] = placement_group([_bundle([slot])], strategy="STRICT_PACK")
        return bool(self._groups[slot.group].wait(0.01))

    def free(self, slot: Slot) -> None:
        """Give back a slot's group."""
        if group := self._groups.pop(slot.group, None):
            remove_placement_group(group)

    def remove(self) -> None:
        for group in self._groups.values():
            remove_placement_group(group)
        self._groups.clear()

    def _create(self, slots: Sequence[Slot]) -> None:
        """Make the group that these slots share."""
        name, bundle, timeout_s = slots[0].group, _bundle(slots), self.cfg.deadlines.room_s
        group = placement_group([bundle], strategy="STRICT_PACK")
        if not group.wait(timeout_s):
            remove_placement_group(group)
            raise UserError(
                f"no node has room for {name} ({bundle}) within deadlines.room_s={timeout_s:g}: lower the "
                f"placement.* keys or start a larger node"
            )
        self._groups[name] = group


def _bundle(slots: Sequence[Slot]) -> dict[str, float]:
    """What the slots of one group need together."""
    gpus = sum(s.gpus for s in slots)
    return {"CPU": sum(s.cpus for s in slots)} | ({"GPU": gpus} if gpus else {})
