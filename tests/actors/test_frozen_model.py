"""A reward model as a part of the rewards: what is refused, and how its scores join those of the rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.frozen_model import RewardModel
from actors.placement import plan
from actors.rewards import Rewards
from jobs.specs import JOBS
from rlvid.config import (
    EvalJobConfig,
    ExactPart,
    GrpoJobConfig,
    ModelPart,
    NumberPart,
    RewardPart,
    VideoConfig,
)
from rlvid.errors import UserError
from rlvid.rewards.part import Group, NoReward, Response, Values
from rlvid.rewards.rules import check_rewards, make_parts
from rlvid.rewards.videoscore import RUBRIC_FOLDER, Rubric
from rlvid.types import Rollout
from tests.prompts import sample_of

NAMES = ["reward_model-0", "reward_model-1"]
BASE = {"model": {"tiny": {}}, "data": {"synthetic": {}}}


def reward_model(folder: Path, kind: str = "bradley_terry") -> Path:
    Rubric(kind, ("reward",), 1, 4, "question", VideoConfig(frames=4)).save(folder / RUBRIC_FOLDER)
    return folder


def rollouts(*texts: str) -> list[Rollout]:
    return [Rollout("s", np.zeros(1, np.int32), np.zeros(1, np.float32), text, "stop", ()) for text in texts]


def by_length(groups: Sequence[Group]) -> list[Values]:
    """Scores a response by its length; has no score for the sample named "bad"."""
    return [
        [NoReward("no such file") if g.sample.id == "bad" else float(len(r.text)) for r in g.responses] for g in groups
    ]


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("rules", [[ExactPart(kind="exact")], []])
def test_scores_join_the_rules_and_are_invalid_where_there_is_none(tmp_path: Path, rules: list[RewardPart]) -> None:
    model = ModelPart(kind="model", path=tmp_path, weight=0.5, name="liked")
    rewards = Rewards(make_parts([*rules, model]), 1, cpus=0.1, models={"liked": by_length})
    (square, no), (bad,) = rewards([sample_of(), sample_of(sample_id="bad")], [rollouts("square", "no"), rollouts("x")])
    rewards.stop()
    assert square.parts == {**({"exact": 1.0} if rules else {}), "liked": 6.0}
    assert square.total == 3.0 + bool(rules) and no.total == 1.0
    assert square.is_right is (True if rules else None)  # a reward model does not say what is right
    assert not bad.is_valid and bad.invalid_reason == "liked: no such file"


@pytest.mark.usefixtures("local_ray")
def test_a_model_scores_the_problem_types_of_its_part_alone(tmp_path: Path) -> None:
    model = ModelPart(kind="model", path=tmp_path, problem_types=("free",))
    rewards = Rewards(
        make_parts([NumberPart(kind="number", problem_types=("count",)), model]), 1, 0.1, "", {"model": by_length}
    )
    free, count = replace(sample_of(), problem_type="free"), replace(sample_of(), problem_type="count", answer="3")
    (long,), (three,) = rewards([free, count], [rollouts("a ball"), rollouts("3")])
    rewards.stop()
    assert long.parts == {"model": 6.0} and three.parts == {"number": 1.0} and three.is_right is True


def test_only_a_model_of_answers_is_taken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rewards.1 \(model\): .*rubric.json"):
        check_rewards([ExactPart(kind="exact"), ModelPart(kind="model", path=tmp_path / "nowhere")])
    with pytest.raises(UserError, match="scores videos and not answers"):
        check_rewards([ModelPart(kind="model", path=reward_model(tmp_path / "five", "regression"))])
    check_rewards([ModelPart(kind="model", path=reward_model(tmp_path / "answers"))])


def test_each_model_has_an_actor_where_rewards_train(tmp_path: Path) -> None:
    parts = [{"kind": "exact"}, *({"kind": "model", "path": str(tmp_path), "name": name} for name in "ab")]
    cfg = GrpoJobConfig.model_validate({**BASE, "rewards": parts})
    assert [s.name for s in plan(cfg, JOBS["grpo"].roles(cfg)) if s.role == "reward_model"] == NAMES
    assert "reward_model" not in JOBS["grpo"].roles(GrpoJobConfig.model_validate(BASE))
    evaluation = EvalJobConfig.model_validate({**BASE, "rewards": parts})
    assert JOBS["eval"].roles(evaluation) == ("generator",)  # accuracy is measured by rules


def test_reward_model_gives_its_own_scores(tiny_model: Path, synthetic: Path, tmp_path: Path) -> None:
    import shutil

    import torch

    from rlvid.data.manifest import load_manifest
    from rlvid.models.heads import Head

    folder = tmp_path / "policy"
    shutil.copytree(tiny_model, folder)
    reward_model(folder)
    head = {"weight": torch.randn(1, 128, generator=torch.Generator().manual_seed(0)), "bias": torch.zeros(1)}
    Head(("reward",)).save(head, folder)
    scorer = RewardModel.__new__(RewardModel)  # without an actor's log file
    data = {"synthetic": {}, "cache_dir": str(tmp_path / "cache")}
    scorer.start(folder, GrpoJobConfig.model_validate({**BASE, "data": data}))
    samples = load_manifest(synthetic / "eval.jsonl", None, None, "")[:2]
    gone = sample_of(sample_id="gone")
    asked = [(samples[0], ["red", "blue"]), (samples[1], ["red"]), (gone, ["red"])]
    groups = [Group(sample, tuple(Response(text, 1) for text in texts)) for sample, texts in asked]
    first, second, (reason,) = scorer.score(groups)
    assert len(first) == 2 and first[0] != first[1] and len(second) == 1
    blue = Group(samples[0], groups[0].responses[1:])
    assert list(scorer.score([blue])[0]) == pytest.approx([first[1]], rel=1e-5)
    assert isinstance(reason, NoReward) and str(reason) == "/clips/0.mp4: there is no such file"
