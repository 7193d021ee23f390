"""Replicas that join while a run continues, where the cluster has room, and leave with their node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ray

from actors.fleet_state import Fleet, ReplicaId
from actors.placement import Placement, Slot, generator_slot

if TYPE_CHECKING:
    from actors.fleet_replicas import Replicas


def draining_nodes() -> set[str]:
    """Nodes that will be taken away, as their provider has announced. Ray has no public function for it; Ray Train
    calls this one too."""
    return set(ray._private.state.state.get_draining_nodes())


class Growth:
    """Decides who joins and who leaves; runs in the thread of the fleet's pump.

    Attributes:
        slots: the places of the replicas, by the number of their slot.
        replicas: starts those that join; set after both are made.
    """

    replicas: Replicas

    def __init__(self, fleet: Fleet[int], placement: Placement):
        self._fleet, self._placement = fleet, placement
        self.slots = dict(enumerate(placement.slots("generator")))
        self._coming: Slot | None = None  # waits for room in the cluster
        self._told: set[ReplicaId] = set()  # those whose node will go away

    def grow(self) -> None:
        """Let a replica join where the cluster has room for one more.

        Encoders start with the first prompts: when these are answered they have their CPUs, and others may join.
        """
        if not self.replicas.has_answered:
            return
        if self._coming is None and len(self._fleet.members()) < self._fleet.max_replicas:
            self._coming = generator_slot(self._placement.cfg, self._fleet.next_slot)
        if self._coming is not None and self._placement.has_room(self._coming):
            replica = self._fleet.join()
            self.slots[replica.slot], self._coming = self._coming, None
            self._placement.on_event(
                f"generator {replica} joins: {len(self._fleet.members())} of {self._fleet.max_replicas}"
            )
            self.replicas.start(replica)

    def shrink(self) -> None:
        """Let replicas leave whose node will be taken away, as a cloud announces beforehand: they are given no more
        work, and leave when theirs is done, as far as enough others run."""
        nodes = draining_nodes()
        going = {r for r in self._fleet.members() if self.replicas.nodes.get(r) in nodes}
        for replica in going - self._told:
            self._placement.on_event(f"the node of generator {replica} will go away")
        self._told |= going
        idle = self._fleet.drain(going)
        for replica in () if self.replicas.awaits("sync") else idle:  # nobody leaves a transfer
            self.replicas.kill(replica)
            self._remove(replica)

    def leave(self, replica: ReplicaId) -> bool:
        """A dead replica leaves if its node is gone or will be taken away, and enough others are left; one may join
        elsewhere."""
        node = self.replicas.nodes.get(replica)
        staying = {n["NodeID"] for n in ray.nodes() if n["Alive"]} - draining_nodes()
        if node is None or node in staying or len(self._fleet.members()) <= self._fleet.min_replicas:
            return False
        self._remove(replica)
        return True

    def _remove(self, replica: ReplicaId) -> None:
        self._fleet.leave(replica)
        self._placement.free(self.slots.pop(replica.slot))
        self._placement.on_event(f"generator {replica} leaves with its node: {len(self._fleet.members())} are left")
