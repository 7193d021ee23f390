"""Where the actors go: a plan from the configuration, and Ray placement groups from the plan.

Every generator replica and every trainer rank has a small placement group of its own, so that replicas come and go one
by one (Ray's groups do not shrink). Colocated on GPUs, replica i and rank i of the reference are in the group of
trainer rank i, and they share its GPU; on CPU there is nothing to share.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlvid.config import JobConfig, PlacementConfig
from rlvid.errors import UserError


@dataclass(frozen=True)
class Slot:
    """One actor's place: the placement group it is in, and its share of it."""

    role: str  # "trainer" | "generator" | "reference" | "reward_model"
    index: int
    group: str
    cpus: float
    gpus: float

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index}"


def plan(cfg: JobConfig, roles: tuple[str, ...]) -> list[Slot]:
    """The slots of a job's actors."""
    place = cfg.placement
    sharing = [role for role in ("trainer", "generator", "reference") if role in roles and place.colocate]
    shares = place.gpus > 0 and "trainer" in sharing and len(sharing) > 1
    gpus = place.gpus / len(sharing) if shares else place.gpus
    slots = []
    if "trainer" in roles:
        slots += [Slot("trainer", i, f"trainer-{i}", place.trainer_cpus, gpus) for i in range(place.trainer_workers)]
    if "generator" in roles:
        slots += [generator_slot(cfg, i, gpus if shares else None) for i in range(cfg.rollout.replicas)]
    if "reference" in roles:
        group = "trainer" if shares else "reference"
        slots += [
            Slot("reference", i, f"{group}-{i}", place.reference_cpus, gpus) for i in range(place.trainer_workers)
        ]
    if "reward_model" in roles:
        slots += [
            Slot("reward_model", i, f"reward_model-{i}", place.reference_cpus, place.gpus)
            for i in range(len(cfg.reward_models))
        ]
    return slots


def generator_slot(cfg: JobConfig, index: int, share: float | None) -> Slot:
    """Replica `index`: in the group of trainer rank `index` with a `share` of its GPU, else in a group of its own."""
    place = cfg.placement
    beside_trainer = share is not None and index < place.trainer_workers
    gpus = share if share is not None and beside_trainer else place.gpus * cfg.rollout.tensor_parallel
    return Slot(
        "generator", index, f"trainer-{index}" if beside_trainer else f"generator-{index}", place.generator_cpus, gpus
    )


def describe(cfg: JobConfig, roles: tuple[str, ...]) -> str:
    """The plan as text, for `--dry-run`."""
    lines = [f"{s.name:<14} in group {s.group:<14} {s.cpus:g} CPU, {s.gpus:g} GPU" for s in plan(cfg, roles)]
    place = cfg.placement
    lines.append(f"{'encoders':<14} {place.encoders} wherever there is room, {place.encode_cpus:g} CPU each")
    if "generator" in roles:
        lines.append(f"{'rewards':<14} {place.reward_workers} wherever there is room, {place.reward_cpus:g} CPU each")
    return "\n".join(lines)


def _cpus_beside(place: PlacementConfig) -> float:
    return place.encoders * place.encode_cpus + place.reward_workers * place.reward_cpus


def require_room(slots: list[Slot], place: PlacementConfig) -> None:
    """
    Raises:
        UserError: the cluster cannot hold the plan. One that may still grow is not asked.
    """
    need = {"CPU": sum(s.cpus for s in slots) + _cpus_beside(place), "GPU": sum(s.gpus for s in slots)}
    have = ray.cluster_resources()
    for kind, amount in need.items() if "RAY_ADDRESS" not in os.environ else ():
        if amount > have.get(kind, 0.0) + 1e-6:
            parts = _cpu_keys(slots, place) if kind == "CPU" else f"placement.gpus={place.gpus:g} for each actor"
            raise UserError(
                f"the actors need {amount:g} {kind}, the cluster has {have.get(kind, 0.0):g}: lower some of {parts}; "
                f"or rollout.replicas, placement.trainer_workers; or start more nodes"
            )


def _cpu_keys(slots: list[Slot], place: PlacementConfig) -> str:
    """The keys that the CPUs of a plan come from, with their values."""
    key_of = {"reward_model": "reference"}
    counts = Counter((f"{key_of.get(slot.role, slot.role)}_cpus", slot.cpus) for slot in slots)
    counts["encode_cpus", place.encode_cpus] = place.encoders
    counts["reward_cpus", place.reward_cpus] = place.reward_workers
    return ", ".join(f"placement.{key}={cpus:g} (of {n})" for (key, cpus), n in counts.items())


class Placement:
    """The placement groups of one job.

    Raises:
        UserError: the cluster cannot hold the plan.
    """

    def __init__(self, slots: list[Slot], cfg: JobConfig):
        require_room(slots, cfg.placement)
        self._groups: dict[str, PlacementGroup] = {}
        self._timeout_s = cfg.deadlines.room_s
        for name in dict.fromkeys(s.group for s in slots):
            self._create(name, [s for s in slots if s.group == name])

    def options(self, slot: Slot) -> dict[str, object]:
        """Ray options that start an actor in its slot; a group that is not there yet (a late replica) is made."""
        if slot.group not in self._groups:
            self._create(slot.group, [slot])
        return {
            "num_cpus": slot.cpus,
            "num_gpus": slot.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._groups[slot.group], placement_group_bundle_index=0
            ),
        }

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

    def _create(self, name: str, slots: list[Slot]) -> None:
        bundle = _bundle(slots)
        group = placement_group([bundle], strategy="STRICT_PACK")
        if not group.wait(self._timeout_s):
            remove_placement_group(group)
            raise UserError(
                f"no node has room for {name} ({bundle}) within deadlines.room_s={self._timeout_s:g}: lower the "
                f"placement.* keys or start a larger node"
            )
        self._groups[name] = group


def _bundle(slots: list[Slot]) -> dict[str, float]:
    """What the slots of one group need together."""
    bundle = {"CPU": sum(s.cpus for s in slots)}
    gpus = sum(s.gpus for s in slots)
    return bundle | ({"GPU": gpus} if gpus else {})
