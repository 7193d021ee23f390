"""Ranks: actors that share the work of one model and meet in collectives, and the driver's handle on all of them."""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import ray
from ray import ObjectRef

from actors.actor_process import enter_process
from actors.placement import Placement
from rlvid.config import JobConfig
from rlvid.training.batch import Group
from rlvid.types import Prompt

logger = logging.getLogger(__name__)

GroupRef: TypeAlias = Group[ObjectRef[Prompt]]  # the prompt stays in the object store until a rank needs it
DEATH_KNOWN_S = 10.0  # after the first error of a rank, until Ray knows that another one is gone
LogProbs = list[npt.NDArray[np.float32]]  # one array [sum R] per group


def fetch(groups: Sequence[GroupRef]) -> list[Group[Prompt]]:
    """Groups with their prompts, as views into the object store."""
    prompts = ray.get([g.prompt for g in groups])
    return [g.with_prompt(prompt) for prompt, g in zip(prompts, groups, strict=True)]


class Rank:
    """One rank's process. `start` meets the other ranks, so all are called at once."""

    def __init__(self, log_file: Path, threads: int | None):
        enter_process(log_file, threads)

    def address(self) -> str:
        """A free port on this node, for rank 0."""
        with socket.socket() as s:
            s.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{s.getsockname()[1]}"

    def start(self, address: str, rank: int, world_size: int, folder: Path, cfg: JobConfig) -> None:
        if not cfg.placement.gpus:
            os.environ["DS_ACCELERATOR"] = "cpu"
        import torch.distributed as dist

        os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size))
        backend = "nccl" if cfg.placement.gpus else "gloo"
        dist.init_process_group(backend, init_method=f"tcp://{address}", rank=rank, world_size=world_size)
        self._cfg = cfg


class RanksLost(Exception):
    """A rank's process is gone; the others wait for it in a collective. `RankGroup.restart` starts all again."""


class RankGroup:
    """All ranks of a role. Every call goes to all of them at once, since they meet in collectives.

    Args:
        kind: the class of the actors.
        folder: checkpoint folder of the model.

    Raises (from every method that waits):
        RanksLost: a rank's process is gone.
    """

    def __init__(self, role: str, kind: type[Rank], folder: Path, placement: Placement):
        self._role, self._kind, self._folder, self._placement = role, kind, folder, placement
        self._log = placement.logs / f"{role}-0.log"
        self._launch()

    def _launch(self) -> None:
        """Start the processes, in the background."""
        cfg = self._placement.cfg
        self._ranks = [self._placement.start(self._kind, slot) for slot in self._placement.slots(self._role)]
        (address,) = self._get([self._ranks[0].address.remote()], cfg.deadlines.room_s)
        world = len(self._ranks)
        self._started = [rank.start.remote(address, i, world, self._folder, cfg) for i, rank in enumerate(self._ranks)]

    def restart(self) -> None:
        """Start all ranks again, as they were at the start, after one was lost."""
        self.stop()
        self._launch()

    def wait_ready(self) -> None:
        """Ranks start in the background, as the engines do; this waits for them and raises what they raised."""
        for minutes in itertools.count(1):
            try:
                self._get(self._started, timeout_s=60)
                return
            except ray.exceptions.GetTimeoutError:
                logger.warning(
                    "the %s has been starting for %d min; %s has what it does", self._role, minutes, self._log
                )

    def stop(self) -> None:
        for rank in self._ranks:
            ray.kill(rank)

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        """What `method` of every rank returns for the same arguments."""
        return self._begin(method, [arguments] * len(self._ranks))()

    def _begin(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> Callable[[], list[Any]]:
        """Call `method` of every rank with arguments of its own; returns a function that waits for the results."""
        calls = [getattr(rank, method).remote(*own) for rank, own in zip(self._ranks, arguments, strict=True)]
        return partial(self._get, calls)

    def _get(self, calls: Sequence[ObjectRef[Any]], timeout_s: float | None = None) -> list[Any]:
        """What the calls return, one of each rank."""
        try:
            return list(ray.get(list(calls), timeout=timeout_s or self._placement.cfg.deadlines.train_s))
        except ray.exceptions.RayActorError as e:
            raise RanksLost(f"a rank of the {self._role} was lost") from e
        except ray.exceptions.RayTaskError as e:
            # A rank that loses its connection to a dead one says so before Ray knows of the death.
            ray.wait(list(calls), num_returns=len(calls), timeout=DEATH_KNOWN_S)
            for call in calls:
                try:
                    ray.get(call, timeout=0)
                except ray.exceptions.RayActorError as death:
                    raise RanksLost(f"a rank of the {self._role} was lost") from death
                except (ray.exceptions.RayTaskError, ray.exceptions.GetTimeoutError):
                    pass
            raise e.as_instanceof_cause() from e

    def _begin_scoring(self, method: str, groups: Sequence[GroupRef], *arguments: Any) -> Callable[[], list[Any]]:
        """Score groups, spread over the ranks; returns a function that waits for the results, in the order given."""
        given = list(groups) + [groups[0]] * (len(self._ranks) - len(groups))  # every rank takes part in the forward
        order = balance_indices([g.cost for g in given], len(self._ranks))
        wait = self._begin(method, [([given[i] for i in indices], *arguments) for indices in order])

        def collect() -> list[Any]:
            parts = zip(order, wait(), strict=True)
            values = {i: value for indices, part in parts for i, value in zip(indices, part, strict=True)}
            return [values[i] for i in range(len(groups))]

        return collect


def balance_indices(costs: Sequence[int], n: int) -> list[list[int]]:
    """Indices of n shares of about equal cost, each with at least one where there are enough: largest first, to the
    lightest."""
    shares: list[list[int]] = [[] for _ in range(n)]
    loads = [(0, i) for i in range(n)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, lightest = heapq.heappop(loads)
        shares[lightest].append(i)
        heapq.heappush(loads, (load + costs[i], lightest))
    return [sorted(share) for share in shares]
