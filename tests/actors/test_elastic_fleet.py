"""A node joins the cluster and goes away again: so do generators, and no prompt is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from actors.clip_store import ClipStore
from actors.fleet_state import State
from actors.roles import Roles
from rlvid.config import GrpoJobConfig
from rlvid.data.manifest import load_manifest
from rlvid.rollout.engine import Sampling

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def announce_end(node: str) -> None:
    """What a cloud's autoscaler tells Ray before it takes a machine back."""
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    is_accepted, refusal = client.drain_node(node, reason, "the machine is needed", int((time.time() + 300) * 1000))
    assert is_accepted, refusal


def test_generators_join_with_a_node_and_leave_with_it(
    cluster: Cluster, tiny_model: Path, synthetic: Path, tmp_path: Path
) -> None:
    cfg = GrpoJobConfig.model_validate(
        {
            "model": {"tiny": {}},
            "data": {"synthetic": {}, "cache_dir": str(tmp_path / "cache")},
            "video": {"height": 56, "width": 56},
            "rollout": {"max_model_len": 512, "max_tokens": 8, "max_replicas": 2, "max_sequences": 16},
            "placement": {"threads": 1, "generator_cpus": 1.2, "trainer_cpus": 0.2, "encoders": 1},
        }
    )
    events: list[str] = []
    with Roles(tiny_model, cfg, ("trainer", "generator"), tmp_path / "logs", events.append) as roles:
        roles.wait_ready()
        fleet = roles.fleet
        clips = ClipStore(cfg, tiny_model, 20, lambda *_: None, 20)
        prompts = clips.encode(load_manifest(synthetic / "train.jsonl", None, None, "")[:6])
        fleet.sync(roles.trainer, 1)
        assert len(fleet.fleet.members(State.READY)) == 1

        def answer_all() -> None:
            answers = fleet.generate(prompts, Sampling(2, 1.0, 8))
            assert [len(group) for group in answers if isinstance(group, list)] == [2] * len(prompts)

        answer_all()
        node = cluster.add_node(num_cpus=2)
        # it joins, takes the current weights from a trainer on another node, and is READY only then
        wait_until(lambda: len(fleet.fleet.members()) == 2, "no replica joined")
        answer_all()

        def is_ready() -> bool:
            answer_all()
            return len(fleet.fleet.members(State.READY)) == 2

        wait_until(is_ready, "the joiner is not ready")
        fleet.sync(roles.trainer, 2)
        # an announced end: the replica there finishes its work before it leaves, and nothing is done twice
        pending = fleet.submit(prompts * 4, Sampling(2, 1.0, 8))
        announce_end(node.node_id)
        answered = [group for group in fleet.collect(pending) if isinstance(group, list)]
        assert [len(group) for group in answered] == [2] * (4 * len(prompts))
        wait_until(lambda: len(fleet.fleet.members()) == 1, "the replica did not leave its node")
        assert fleet.fleet.counters.reassigned == 0
        cluster.remove_node(node)
        answer_all()

        # one without a word
        node = cluster.add_node(num_cpus=2)
        wait_until(is_ready, "no other replica joined")
        pending = fleet.submit(prompts * 4, Sampling(2, 1.0, 8))
        cluster.remove_node(node)
        answered = [group for group in fleet.collect(pending) if isinstance(group, list)]
        assert [len(group) for group in answered] == [2] * (4 * len(prompts))
        wait_until(lambda: len(fleet.fleet.members()) == 1, "the replica did not leave")
        answer_all()
        fleet.sync(roles.trainer, 3)
        answer_all()
        clips.close()
    for what, times in (("joins", 2), ("will go away", 1), ("leaves with its node", 2)):
        assert sum(what in event for event in events) == times, events
