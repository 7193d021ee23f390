"""A judge's opinion as a part of the reward: a score of each response, or the share of its group that it beats."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from actors.clip_store import ClipStore
from actors.judge import Comparison, Judge, open_judge
from actors.roles import Roles
from rlvid.config import JobConfig, JudgePart
from rlvid.files import RowFile
from rlvid.rewards.judge_prompts import SCORE, TRUST, parse_score, parse_trust, rating_prompt
from rlvid.rewards.part import Group, NoReward, Values

RATED = {"score": (SCORE, parse_score), "trust": (TRUST, parse_trust)}


@contextmanager
def judged_rewards(
    cfg: JobConfig, roles: Roles, clips: ClipStore, cache: Path, logs: Path, on_event: Callable[[str], None]
) -> Iterator[None]:
    """The rewards of `roles` have the values of the judges that the config names."""
    with ExitStack() as stack:
        answers = RowFile(cache, "key")
        for part in cfg.judges:
            opened = open_judge(part.judge, cfg, roles.fleet, clips, answers, logs, cfg.seed, on_event)
            roles.rewards.models[part.label] = JudgeReward(part, stack.enter_context(opened))
        yield


class JudgeReward:
    """The values of one part."""

    def __init__(self, part: JudgePart, judge: Judge):
        self._part, self._judge = part, judge

    def __call__(self, groups: Sequence[Group]) -> list[Values]:
        return self._win_rates(groups) if self._part.mode == "win_rate" else self._ratings(groups)

    def _ratings(self, groups: Sequence[Group]) -> list[Values]:
        template, parse = RATED[self._part.mode]
        asked = [
            (template, rating_prompt(template, group.sample, response.text, f"{group.sample.id}#{g}.{i}"))
            for g, group in enumerate(groups)
            for i, response in enumerate(group.responses)
        ]
        ratings = iter(self._judge.rate(asked, parse))
        return [
            [NoReward(r.reason) if r.value is None else r.value for r in itertools.islice(ratings, len(g.responses))]
            for g in groups
        ]

    def _win_rates(self, groups: Sequence[Group]) -> list[Values]:
        """A pair whose orders disagree is a tie, and so are equal responses. A response without a valid verdict has no
        value."""
        pairs = [
            (g, i, j)
            for g, group in enumerate(groups)
            for i, j in itertools.combinations(range(len(group.responses)), 2)
        ]
        comparisons, verdicts = {}, {}
        for g, i, j in pairs:
            one, other = groups[g].responses[i].text, groups[g].responses[j].text
            if one == other:
                verdicts[g, i, j] = 0.5
            else:
                sample = groups[g].sample
                comparisons[g, i, j] = Comparison(replace(sample, id=f"{sample.id}#{g}.{i}.{j}"), (one, other))
        reason = "no other response to compare with"
        for pair, judged in zip(comparisons, self._judge.compare(list(comparisons.values())), strict=True):
            if judged.verdict.is_valid:
                winner = judged.verdict.winner
                verdicts[pair] = 0.5 if winner is None else float(winner == 0)
            else:
                reason = judged.verdict.reason
        points: list[list[list[float]]] = [[[] for _ in group.responses] for group in groups]
        for (g, i, j), won in verdicts.items():
            points[g][i].append(won)
            points[g][j].append(1.0 - won)
        return [[sum(own) / len(own) if own else NoReward(reason) for own in group] for group in points]
