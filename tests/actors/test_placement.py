from __future__ import annotations

from typing import Any

import pytest

from actors.placement import describe, plan
from jobs.specs import JOBS
from rlvid.config import GrpoJobConfig


def config(**sections: Any) -> GrpoJobConfig:
    return GrpoJobConfig.model_validate({"model": {"tiny": {}}, "data": {"synthetic": {}}, **sections})


def test_no_reference_without_a_kl_term() -> None:
    assert JOBS["grpo"].roles(config()) == ("trainer", "generator")
    assert JOBS["grpo"].roles(config(grpo={"kl_coef": 0.1})) == ("trainer", "generator", "reference")


def test_every_replica_has_a_small_group_of_its_own_on_cpu() -> None:
    slots = plan(config(rollout={"replicas": 3}, placement={"trainer_workers": 2}), ("trainer", "generator"))
    assert [s.name for s in slots] == ["trainer-0", "trainer-1", "generator-0", "generator-1", "generator-2"]
    assert len({s.group for s in slots}) == 5
    assert all(s.gpus == 0 for s in slots)


def test_colocated_pairs_share_a_gpu_and_the_rest_has_its_own() -> None:
    slots = plan(config(rollout={"replicas": 2}, placement={"gpus": 1}), ("trainer", "generator"))
    assert [(s.name, s.group, s.gpus) for s in slots] == [
        ("trainer-0", "trainer-0", 0.5),
        ("generator-0", "trainer-0", 0.5),
        ("generator-1", "generator-1", 1.0),
    ]


def test_split_actors_have_whole_gpus_and_parallel_engines_several() -> None:
    cfg = config(rollout={"tensor_parallel": 4}, placement={"gpus": 1, "colocate": False})
    assert [(s.group, s.gpus) for s in plan(cfg, ("trainer", "generator"))] == [
        ("trainer-0", 1.0),
        ("generator-0", 4.0),
    ]


@pytest.mark.parametrize("word", ["trainer-0", "generator-0", "reference-0", "encoders", "rewards"])
def test_description_names_every_actor(word: str) -> None:
    assert word in describe(config(grpo={"kl_coef": 0.1}), ("trainer", "generator", "reference"))
