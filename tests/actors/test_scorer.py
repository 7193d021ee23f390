"""A reward model as a part of the rewards: what is refused, and how its scores join those of the rules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from actors.placement import plan
from actors.rewards import Rewards, check_parts
from actors.scorer import Answers, Scorer
from jobs.specs import JOBS
from rlvid.config import EvalJobConfig, GrpoJobConfig, RewardModelJobConfig, RewardPartConfig, VideoConfig
from rlvid.errors import UserError
from rlvid.rewards.rules import RuleRewards
from rlvid.rewards.videoscore import RUBRIC_FOLDER, Rubric
from rlvid.types import Rollout
from tests.prompts import sample_of

BASE = {"model": {"tiny": {}}, "data": {"synthetic": {}}}


def reward_model(folder: Path, kind: str = "bradley_terry") -> Path:
    Rubric(kind, ("reward",), 1, 4, "question", VideoConfig(frames=4).model_dump()).save(folder / RUBRIC_FOLDER)
    return folder


def rollouts(*texts: str) -> list[Rollout]:
    return [Rollout("s", np.zeros(1, np.int32), np.zeros(1, np.float32), text, "stop", ()) for text in texts]


class Fixed:
    """Scores an answer by its length; has none for the sample named "bad"."""

    def __call__(self, batch: Answers) -> list[list[float] | str]:
        return ["no such file" if s.id == "bad" else [float(len(a)) for a in answers] for s, answers in batch]


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("rules", [[RewardPartConfig(kind="exact")], []])
def test_scores_join_the_rules_and_are_invalid_where_there_is_none(
    tmp_path: Path, rules: Sequence[RewardPartConfig]
) -> None:
    model = RewardPartConfig(kind="model", path=reward_model(tmp_path), weight=0.5, name="liked")
    rewards = Rewards([*rules, model], 1, cpus=0.1, scorers=[Fixed()])  # type: ignore[list-item]
    (square, no), (bad,) = rewards([sample_of(), sample_of(sample_id="bad")], [rollouts("square", "no"), rollouts("x")])
    rewards.stop()
    assert square.parts == {**({"exact": 1.0} if rules else {}), "liked": 6.0}
    assert square.total == 3.0 + bool(rules) and no.total == 1.0
    assert not bad.is_valid and bad.invalid_reason == "liked: no such file"


def test_only_a_model_of_answers_is_taken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs path"):
        check_parts([RewardPartConfig(kind="model")])
    with pytest.raises(UserError, match="rubric.json"):
        check_parts([RewardPartConfig(kind="model", path=tmp_path)])
    part = RewardPartConfig(kind="model", path=reward_model(tmp_path / "five", "regression"))
    with pytest.raises(UserError, match="scores videos and not answers"):
        check_parts([part])
    good = RewardPartConfig(kind="model", path=reward_model(tmp_path / "answers"))
    check_parts([good])
    with pytest.raises(UserError, match="named 'model' too"):
        check_parts([good, good])
    with pytest.raises(UserError, match="no rule"):
        RuleRewards([good])


def test_each_model_has_an_actor(tmp_path: Path) -> None:
    parts = [{"kind": "exact"}, *({"kind": "model", "path": str(tmp_path), "name": name} for name in "ab")]
    for job in (GrpoJobConfig, EvalJobConfig):
        cfg = job.model_validate({**BASE, "rewards": parts})
        assert [s.name for s in plan(cfg, JOBS["grpo"].roles(cfg)) if s.role == "scorer"] == ["scorer-0", "scorer-1"]
    assert "scorer" not in JOBS["grpo"].roles(GrpoJobConfig.model_validate(BASE))


@pytest.mark.parametrize(("kind", "template"), [("regression", "integer"), ("generation", "integer")])
def test_engines_are_started_for_scores_as_text_alone(kind: str, template: str) -> None:
    cfg = RewardModelJobConfig.model_validate({**BASE, "reward_model": {"kind": kind, "template": template}})
    assert JOBS["reward-model"].roles(cfg) == (("trainer",) if kind == "regression" else ("trainer", "generator"))


def test_scorer_gives_the_models_own_scores(tiny_model: Path, synthetic: Path, tmp_path: Path) -> None:
    import shutil

    import torch

    from rlvid.data.manifest import load_manifest
    from rlvid.models.heads import Head

    folder = tmp_path / "policy"
    shutil.copytree(tiny_model, folder)
    reward_model(folder)
    head = {"weight": torch.randn(1, 128, generator=torch.Generator().manual_seed(0)), "bias": torch.zeros(1)}
    Head(("reward",)).save(head, folder)
    scorer = Scorer.__new__(Scorer)  # without an actor's log file
    data = {"synthetic": {}, "cache_dir": str(tmp_path / "cache")}
    scorer.start(folder, GrpoJobConfig.model_validate({**BASE, "data": data}), on_gpu=False)
    samples = load_manifest(synthetic / "eval.jsonl", None, None, "")[:2]
    gone = sample_of(sample_id="gone")
    first, second, reason = scorer.score([(samples[0], ["red", "blue"]), (samples[1], ["red"]), (gone, ["red"])])
    assert len(first) == 2 and first[0] != first[1] and len(second) == 1
    assert scorer.score([(samples[0], ["blue"])])[0] == pytest.approx([first[1]], abs=1e-5)
    assert reason == "/clips/0.mp4: there is no such file"
