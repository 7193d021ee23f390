"""A judge's opinion as a part of the reward: a score of each response, or the share of its group that it beats."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from actors.clip_store import ClipStore
from actors.judge import Comparison, Judge, open_judge
from actors.roles import Roles
from rlvid.config import JudgePart
from rlvid.files import RowFile
from rlvid.rewards.judge_prompts import SCORE, TRUST, Template, parse_score, parse_trust, rating_prompt
from rlvid.rewards.part import Group, NoReward, Values

RATED = {"score": (SCORE, parse_score), "trust": (TRUST, parse_trust)}


@contextmanager
def judged_rewards(roles: Roles, clips: ClipStore, cache: Path) -> Iterator[None]:
    """The rewards of `roles` have the values of the judges that the config names."""
    cfg, answers = roles.placement.cfg, RowFile(cache, "key")
    with ExitStack() as stack:
        for part in cfg.judges:
            judge = stack.enter_context(open_judge(part.judge, roles, clips, answers, cfg.seed))
            roles.rewards.models[part.label] = partial(judge_values, part, judge)
        yield


def judge_values(part: JudgePart, judge: Judge, groups: Sequence[Group]) -> list[Values]:
    """The values of one part."""
    return win_rates(judge, groups) if part.mode == "win_rate" else rated(judge, groups, *RATED[part.mode])


def rated(
    judge: Judge, groups: Sequence[Group], template: Template, parse: Callable[[str], float | None]
) -> list[Values]:
    asked = [
        (template, rating_prompt(template, group.sample, response.text, f"{group.sample.id}#{g}.{i}"))
        for g, group in enumerate(groups)
        for i, response in enumerate(group.responses)
    ]
    ratings = iter(judge.rate(asked, parse))
    return [list(itertools.islice(ratings, len(group.responses))) for group in groups]


def win_rates(judge: Judge, groups: Sequence[Group]) -> list[Values]:
    """A pair whose orders disagree is a tie, and so are equal responses. A response without a valid verdict has no
    value."""
    wins, comparisons = {}, {}  # by group and the two responses: 1 if the first one wins, 0.5 for a tie
    for g, group in enumerate(groups):
        for (i, one), (j, other) in itertools.combinations(enumerate(group.responses), 2):
            if one.text == other.text:
                wins[g, i, j] = 0.5
            else:
                sample = replace(group.sample, id=f"{group.sample.id}#{g}.{i}.{j}")
                comparisons[g, i, j] = Comparison(sample, (one.text, other.text))
    reason = "no other response to compare with"
    for pair, judged in zip(comparisons, judge.compare(list(comparisons.values())), strict=True):
        winner = judged.verdict.winner
        if judged.verdict.is_valid:
            wins[pair] = 0.5 if winner is None else float(winner == 0)
        else:
            reason = judged.verdict.reason
    points: list[list[list[float]]] = [[[] for _ in group.responses] for group in groups]
    for (g, i, j), won in wins.items():
        points[g][i].append(won)
        points[g][j].append(1.0 - won)
    return [[sum(own) / len(own) if own else NoReward(reason) for own in group] for group in points]
