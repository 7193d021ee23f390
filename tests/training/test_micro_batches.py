from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlvid.models.families import load_family
from rlvid.models.families.chat import ChatFamily
from rlvid.models.loading import load_model
from rlvid.rollout.hf_engine import PlainEngine
from rlvid.training.batch import Group
from rlvid.training.micro_batches import MicroBatches, pack_into_rows, score
from rlvid.training.packing import PackedPolicy
from rlvid.types import Prompt
from tests.prompts import group_of, prompt_of


def test_rows_are_filled_largest_first() -> None:
    assert pack_into_rows([3, 7, 5, 2, 3], budget=10) == [[0, 1], [2, 3, 4]]  # 7 + 3, 5 + 3 + 2
    assert pack_into_rows([30, 4, 4], budget=10) == [[0], [1, 2]]  # what is above the budget is alone
    assert pack_into_rows([], budget=10) == []


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(100, 300))
def test_each_item_is_in_one_row_and_rows_keep_the_budget(costs: list[int], budget: int) -> None:
    rows = pack_into_rows(costs, budget)
    assert sorted(i for row in rows for i in row) == list(range(len(costs)))
    assert all(sum(costs[i] for i in row) <= budget for row in rows)
    # any two rows together are over the budget: otherwise the later one's items had found room in the earlier
    assert all(sum(costs[i] for i in a + b) > budget for n, a in enumerate(rows) for b in rows[:n])


@pytest.fixture(scope="module")
def groups(tiny_model: Path) -> list[Group[Prompt]]:
    family = load_family(tiny_model)
    rng = np.random.default_rng(0)
    lengths = [[4, 9, 2], [5], [7, 7, 1, 3]]
    return [
        group_of(
            prompt_of(family, (4 * (i + 1), 56, 56), seed=i),
            *(rng.integers(20, 200, n).astype(np.int32) for n in own),
            weights=rng.random(sum(own)).astype(np.float32),
            advantages=rng.random(sum(own)).astype(np.float32),
            temperature=1.0,
        )
        for i, own in enumerate(lengths)
    ]


def test_group_above_the_budget_is_cut_between_responses(groups: list[Group[Prompt]]) -> None:
    group = groups[2]
    parts = group.cut(group.prompt.cost + 11)
    assert [[len(r) for r in part.responses] for part in parts] == [[7], [7, 1, 3]]
    assert all(part.prompt is group.prompt for part in parts)
    for name in ("weights", "advantages"):
        joined = np.concatenate([part.tokens[name] for part in parts])
        assert np.array_equal(joined, group.tokens[name])
    assert len(group.cut(1)) == 4 and len(group.cut(10**6)) == 1


def test_budget_and_cuts_change_no_logprob(groups: list[Group[Prompt]], tiny_model: Path) -> None:
    policy = PackedPolicy(load_model(tiny_model, "float32"), load_family(tiny_model))

    whole = score(policy, groups, 10**6)
    assert [len(values) for values in whole] == [15, 5, 18]
    for budget, is_shared in ((groups[2].prompt.cost + 11, True), (1, True), (10**6, False)):
        for a, b in zip(whole, score(policy, groups, budget, is_shared), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_tokens_of_a_greedy_answer_are_the_most_likely_ones(tiny_model: Path) -> None:
    family, network = load_family(tiny_model), load_model(tiny_model, "float32")
    prompts = [prompt_of(family, (4 * (i + 1), 56, 56), seed=i) for i in range(2)]
    greedy = PlainEngine(network, family).answers(prompts, 6)
    other = [np.where(np.arange(len(answer)) == 2, answer + 1, answer).astype(np.int32) for answer in greedy]
    groups = [group_of(prompt, *pair) for prompt, pair in zip(prompts, zip(greedy, other, strict=True), strict=True)]
    policy = PackedPolicy(network, family)
    for budget in (10**6, 1):
        for own, alone in zip(score(policy, groups, budget, both=True), score(policy, groups, budget), strict=True):
            np.testing.assert_array_equal(own[:, 0], alone)
            of_greedy, of_other = np.split(own[:, 1], 2)
            assert of_greedy.all() and of_other[:2].all() and not of_other[2]


def test_ranks_with_fewer_rows_repeat_their_smallest_part(groups: list[Group[Prompt]]) -> None:
    seen = []

    class Policy(torch.nn.Linear):
        per_token = True
        family = ChatFamily  # of any kind

        def forward(self, row) -> tuple[torch.Tensor]:  # type: ignore[no-untyped-def,override]
            seen.append(len(row.target))
            return (torch.arange(len(row.target)),)

    batches = MicroBatches.of(groups[:2], 10**6)
    assert list(batches.whole_rows(lambda n: n + 1)) == [([0, 1], True), ([0], False)]
    values = score(Policy(1, 1), groups[:2], 10**6)
    assert seen == [20]
    assert values[0].tolist() == list(range(15)) and values[1].tolist() == list(range(15, 20))


def test_every_response_is_in_one_pass(groups: list[Group[Prompt]]) -> None:
    alone = MicroBatches.of(groups, budget=10**6, is_shared=False)
    assert [len(row) for row in alone.rows] == [8] and not alone.deep
    budget = groups[2].cost - 1
    some = MicroBatches.of(groups, budget)
    assert [[len(r) for r in part.responses] for _, part in some.parts] == [[4, 9, 2], [5], [7, 7, 1], [3]]
    assert some.rows == [[1], [0]] and some.deep == [[2, 3]]
    one_by_one = MicroBatches.of(groups, budget=1)
    assert one_by_one.rows == [[3]] and one_by_one.deep == [
        [4, 5, 6, 7],
        [0, 1, 2],
    ]  # a single response needs no second
