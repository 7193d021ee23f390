"""Real replicas and a real trainer: weights, and a generator that dies in mid-run."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray

from actors.clip_store import ClipStore
from actors.fleet_state import State
from actors.generator import CONCURRENCY_GROUPS, Generator
from actors.ranks import RanksLost
from actors.roles import Roles
from rlvid.config import GrpoJobConfig
from rlvid.data.manifest import load_manifest
from rlvid.errors import UserError
from rlvid.rollout.engine import Refused, Sampling
from rlvid.rollout.weights.buckets import Bucket
from rlvid.training.policy_batch import sampled_group
from rlvid.types import Encoded, Prompt

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(900)]


@dataclass
class Stage:
    team: Roles
    prompts: list[Encoded]
    events: list[str]
    version: int = 0

    def sync(self) -> None:
        self.version += 1
        self.team.fleet.sync(self.team.trainer, self.version)


@pytest.fixture(scope="module")
def stage(
    tiny_model: Path, synthetic: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None
) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("pool")
    cfg = GrpoJobConfig.model_validate(
        {
            "model": {"tiny": {}},
            "data": {"synthetic": {}, "cache_dir": str(folder / "cache")},
            "video": {"height": 56, "width": 56},
            "rollout": {"max_model_len": 512, "max_tokens": 8, "replicas": 2, "max_sequences": 32},
            "grpo": {"kl_coef": 0.1},
            "placement": {"threads": 1},
        }
    )
    events: list[str] = []
    roles = ("trainer", "generator", "reference")
    with Roles(tiny_model, cfg, roles, folder / "logs", on_event=events.append) as team:
        clips = ClipStore(cfg, tiny_model, 20, lambda path, reason: None)
        prompts = clips.encode(load_manifest(synthetic / "train.jsonl", None, None, "")[:6])
        team.wait_ready()
        yield Stage(team, prompts, events)
        clips.close()


def gap(stage: Stage, groups: list) -> float:  # type: ignore[type-arg]
    refs = [sampled_group(p, g, 1.0) for p, g in zip(stage.prompts, groups, strict=True)]
    by_trainer = stage.team.trainer.logprobs(refs)
    return max(
        float(np.abs(np.concatenate([r.logprobs for r in g]) - t).max())
        for g, t in zip(groups, by_trainer, strict=True)
    )


def test_first_weights_are_checked_and_both_replicas_answer(stage: Stage) -> None:
    assert stage.team.fleet.fleet.members(State.STALE) == stage.team.fleet.fleet.members()  # none may serve yet
    stage.sync()
    groups = stage.team.fleet.generate(stage.prompts, Sampling(2, 1.0, 8))
    assert [g[0].sample_id for g in groups] == [p.sample.id for p in stage.prompts]
    assert all(len(g) == 2 for g in groups)
    assert {s.version for g in groups for r in g for s in r.versions} == {1}
    assert gap(stage, groups) < 1e-4


def test_reference_has_the_policys_logprobs_until_the_policy_moves(stage: Stage, tmp_path: Path) -> None:
    from rlvid.training.objectives import Supervised

    team = stage.team
    groups = [
        sampled_group(p, g, 1.0)
        for p, g in zip(stage.prompts, team.fleet.generate(stage.prompts, Sampling(2, 1.0, 8)), strict=True)
    ]
    before = np.concatenate(team.trainer.logprobs(groups))
    team.freeze_reference(tmp_path / "first", is_resumed=False)
    assert np.allclose(np.concatenate(team.begin_reference_logprobs(groups)()), before, atol=1e-5)
    weighted = [g.with_tokens(weights=np.full(g.n_tokens, 0.01, np.float32)) for g in groups]
    team.trainer.step(weighted, Supervised(), lr=1e-3)
    after = np.concatenate(team.trainer.logprobs(groups))
    assert np.abs(after - before).max() > 1e-3
    assert np.allclose(np.concatenate(team.begin_reference_logprobs(groups)()), before, atol=1e-5)
    team.freeze_reference(tmp_path / "reference", is_resumed=False)
    assert np.allclose(np.concatenate(team.begin_reference_logprobs(groups)()), after, atol=1e-5)
    team.trainer.step(weighted, Supervised(), lr=1e-3)
    team.freeze_reference(tmp_path / "reference", is_resumed=True)  # the folder still holds the frozen ones
    assert np.allclose(np.concatenate(team.begin_reference_logprobs(groups)()), after, atol=1e-5)


def test_a_corrupted_bucket_is_refused(stage: Stage) -> None:
    fleet = stage.team.fleet
    (ref, digest), *_ = stage.team.trainer.put_weights(is_checked=True)
    bucket: Bucket = ray.get(ref)
    first = bucket.parts[0].copy()
    first[100] ^= 1
    corrupted = dataclasses.replace(bucket, parts=(first, *bucket.parts[1:]))
    actor = next(iter(fleet._replicas.actors.values()))
    with pytest.raises(RuntimeError, match="another checksum"):
        ray.get(actor.update_weights.remote(9, [(ray.put(corrupted), digest)]))


def test_requests_in_flight_continue_while_weights_change(stage: Stage) -> None:
    """Submitted before the sync, collected after it: each token names the version that made it."""
    fleet = stage.team.fleet
    long = fleet.submit(stage.prompts, Sampling(2, 1.0, 200))
    short = fleet.submit(stage.prompts[:2], Sampling(1, 0.0, 4))  # another sampling: a message of its own
    old = stage.version
    stage.sync()
    assert [len(group) for group in fleet.collect(short)] == [1, 1]
    groups = fleet.collect(long)
    assert [g[0].sample_id for g in groups] == [p.sample.id for p in stage.prompts]
    versions = {s.version for g in groups for r in g for s in r.versions}
    assert versions <= {old, stage.version} and all(len(r.token_ids) for g in groups for r in g)
    assert not stage.events  # no engine failed over it
    late = fleet.generate(stage.prompts[:1], Sampling(1, 1.0, 4))
    assert {s.version for s in late[0][0].versions} == {stage.version}


def test_a_refused_prompt_does_not_take_its_batch_along(stage: Stage) -> None:
    """vLLM says so with an error for the one prompt; its context is 512 tokens here."""
    prompt: Prompt = ray.get(stage.prompts[0].prompt)
    long = dataclasses.replace(prompt, token_ids=np.r_[prompt.token_ids, np.full(600, 40, np.int32)])
    prompts = [stage.prompts[0], dataclasses.replace(stage.prompts[0], prompt=ray.put(long)), stage.prompts[1]]
    first, refused, last = stage.team.fleet.generate(prompts, Sampling(2, 1.0, 8))
    assert isinstance(refused, Refused) and "512" in refused.reason
    assert [len(group) for group in (first, last) if not isinstance(group, Refused)] == [2, 2]
    assert not stage.events


class Busy(Generator):
    """Its engine computes one step for long."""

    def compute(self, seconds: float) -> None:
        self._pump.run_in_thread(lambda: time.sleep(seconds))


def test_ping_is_answered_while_the_engine_computes(tmp_path: Path, local_ray: None) -> None:
    busy = (
        ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(Busy).options(max_concurrency=2).remote(tmp_path / "log", 1)
    )
    step = busy.compute.remote(60.0)
    assert ray.get(busy.ping.remote(), timeout=30) == -1
    assert ray.wait([step], timeout=0)[1] == [step]
    ray.kill(busy)


def test_killed_replica_is_replaced_in_mid_run_and_no_sample_is_lost(stage: Stage) -> None:
    stage.sync()
    fleet = stage.team.fleet
    victim = fleet.fleet.members()[0]

    def kill() -> None:
        while victim not in fleet.fleet.in_flight:
            time.sleep(0.01)
        ray.kill(fleet._replicas.actors[victim])

    killer = threading.Thread(target=kill)
    killer.start()
    groups = fleet.generate(stage.prompts * 4, Sampling(2, 1.0, 200))
    killer.join()
    assert [g[0].sample_id for g in groups] == [p.sample.id for p in stage.prompts * 4]
    assert fleet.metrics()["fleet/restarts"] == 1, stage.events
    assert fleet.metrics()["fleet/reassigned"] > 0
    (event,) = stage.events
    assert event.startswith("generator 0.0 failed (restart 1 of 3): ") and event.endswith("generator-0.0.log")
    fleet.wait_ready()
    stage.sync()  # the restarted replica takes the current weights with the others, and serves
    assert len(fleet.fleet.members(State.READY)) == 2
    groups = fleet.generate(stage.prompts, Sampling(2, 1.0, 8))
    assert {s.version for g in groups for r in g for s in r.versions} == {stage.version}
    assert gap(stage, groups) < 1e-4
    digests = fleet.weight_digests()  # of what the engines hold
    assert len(digests) == 2 and len(set(digests.values())) == 1


def test_a_lost_rank_of_the_reference_starts_again_with_the_same_model(stage: Stage, tmp_path: Path) -> None:
    team = stage.team
    groups = [
        sampled_group(p, g, 1.0)
        for p, g in zip(stage.prompts, team.fleet.generate(stage.prompts, Sampling(2, 1.0, 8)), strict=True)
    ]
    team.freeze_reference(tmp_path / "reference", is_resumed=False)
    before = team.begin_reference_logprobs(groups)()
    assert team._reference is not None
    ray.kill(team._reference._ranks[0])
    after = team.begin_reference_logprobs(groups)()
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    assert "a rank of the reference was lost" in stage.events[-1]


def test_a_lost_rank_of_the_trainer_is_said_and_all_start_again(stage: Stage, tmp_path: Path) -> None:
    team = stage.team
    groups = [
        sampled_group(p, g, 1.0)
        for p, g in zip(stage.prompts, team.fleet.generate(stage.prompts, Sampling(2, 1.0, 8)), strict=True)
    ]
    before = team.trainer.logprobs(groups)
    team.trainer.begin_save(tmp_path / "checkpoint")
    team.trainer.end_save()
    ray.kill(team.trainer._ranks[0])
    with pytest.raises(RanksLost, match="a rank of the trainer was lost"):
        team.trainer.logprobs(groups)
    team.trainer.restart()
    team.trainer.wait_ready()
    team.trainer.load(tmp_path / "checkpoint")
    assert all(np.array_equal(one, other) for one, other in zip(before, team.trainer.logprobs(groups), strict=True))
    stage.sync()  # versions count on
    assert team.fleet.version == stage.version


def test_fleet_without_a_replica_left_is_an_error(stage: Stage) -> None:
    fleet = stage.team.fleet
    fleet.fleet.max_restarts = 0
    for actor in list(fleet._replicas.actors.values()):
        ray.kill(actor)
    futures = fleet.submit(stage.prompts, Sampling(1, 1.0, 8))
    with pytest.raises(UserError, match="no generator is left"):
        futures[0].result(timeout=60)  # whoever waits is told, without a call into the fleet too
    for wait in (lambda: fleet.collect(futures[1:]), stage.sync, fleet.wait_ready, fleet.metrics):
        with pytest.raises(UserError, match="no generator is left"):
            wait()
    assert "not restarted, rollout.max_restarts=0" in stage.events[-1]
    fleet.stop()
    assert not fleet._pump.is_alive()
