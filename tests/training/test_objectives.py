"""The preference objective on flat tokens, against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from rlvid.config import DpoConfig
from rlvid.training.batch import Group
from rlvid.training.objectives import Preferred
from rlvid.types import Prompt

PROMPT = Prompt("a", np.zeros(3, np.int32), np.zeros((1, 3), np.int32))
# Two pairs; chosen of 2 and 1 tokens, rejected of 1 and 3.
LENGTHS = [(2, 1), (1, 3)]
POLICY = torch.tensor([-1.0, -2.0, -3.0, -0.5, -1.0, -1.0, -1.0])
REFERENCE = np.array([-1.5, -2.5, -2.0, -0.5, -1.0, -2.0, -3.0], dtype=np.float32)


def groups() -> list[Group[Prompt]]:
    made, at = [], 0
    for chosen, rejected in LENGTHS:
        n = chosen + rejected
        ids = (np.zeros(chosen, np.int32), np.zeros(rejected, np.int32))
        weights = np.array([1 / 3] * chosen + [0] * rejected, dtype=np.float32)
        made.append(Group(PROMPT, 3, ids, {"weights": weights, "ref_logprobs": REFERENCE[at : at + n]}, unit_size=2))
        at += n
    return made


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_dpo_sums_log_ratios_over_each_response() -> None:
    loss, sums = Preferred(DpoConfig(beta=0.5), n_pairs=2)(POLICY, groups())
    # ratios: chosen 1.0 and 0.0, rejected -1.0 and 3.0
    assert float(loss) == pytest.approx(-(log_sigmoid(0.5 * 2.0) + log_sigmoid(0.5 * -3.0)) / 2)
    assert float(sums["pair/chosen"]) == pytest.approx(0.5 * 1.0)
    assert float(sums["pair/rejected"]) == pytest.approx(0.5 * 2.0)
    assert float(sums["pair/margin"]) == pytest.approx(-0.5)
    assert float(sums["pair/accuracy"]) == 1.0
    assert (float(sums["pair/length_chosen"]), float(sums["pair/length_rejected"])) == (3.0, 4.0)
    assert float(sums["pairs"]) == 2.0


def test_mean_log_ratios_are_per_token() -> None:
    loss, _ = Preferred(DpoConfig(beta=0.5, logprobs="mean"), n_pairs=2)(POLICY, groups())
    assert float(loss) == pytest.approx(-(log_sigmoid(0.5 * (0.5 + 1.0)) + log_sigmoid(0.5 * (0.0 - 1.0))) / 2)


def test_the_likelihood_of_the_chosen_is_added() -> None:
    plain, _ = Preferred(DpoConfig(), n_pairs=2)(POLICY, groups())
    mixed, _ = Preferred(DpoConfig(loss_weight=2.0, sft_weight=0.5), n_pairs=2)(POLICY, groups())
    assert float(mixed) == pytest.approx(2 * float(plain) + 0.5 * (1.0 + 2.0 + 0.5) / 3)


def test_simpo_needs_no_reference() -> None:
    bare = [Group(PROMPT, 3, g.responses, {"weights": g.tokens["weights"]}) for g in groups()]
    cfg = DpoConfig(loss="simpo", beta=2.0, simpo_margin=0.5)
    loss, _ = Preferred(cfg, n_pairs=2)(POLICY, bare)
    assert float(loss) == pytest.approx(
        -(log_sigmoid(2 * (-1.5 + 3.0) - 0.5) + log_sigmoid(2 * (-0.5 + 1.0) - 0.5)) / 2
    )


def test_parts_of_a_mini_batch_add_up_to_the_whole() -> None:
    objective = Preferred(DpoConfig(sft_weight=1.0), n_pairs=2)
    whole, _ = objective(POLICY, groups())
    first, second = groups()
    parts = objective(POLICY[:3], [first])[0] + objective(POLICY[3:], [second])[0]
    torch.testing.assert_close(parts, whole)


def test_equal_rewards_count_half() -> None:
    _, sums = Preferred(DpoConfig(), n_pairs=2)(torch.from_numpy(REFERENCE), groups())
    assert float(sums["pair/accuracy"]) == 1.0


def test_a_pair_is_never_separated() -> None:
    ids = tuple(np.zeros(5, np.int32) for _ in range(6))
    group = Group(PROMPT, 3, ids, unit_size=2)
    assert [len(part.responses) for part in group.cut(budget=24)] == [4, 2]
    assert [len(part.responses) for part in group.cut(budget=0)] == [2, 2, 2]
