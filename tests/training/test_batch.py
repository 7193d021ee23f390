"""Groups: what they check, and how they are cut (test_micro_batches.py has whole batches)."""

from __future__ import annotations

import numpy as np
import pytest

from rlvid.config import DpoConfig, GrpoConfig
from rlvid.training.batch import Group, check_arrays
from rlvid.training.objectives import BradleyTerry, PolicyGradient, Preferred, Regression, Supervised
from rlvid.types import Span

IDS = (np.zeros(2, np.int32), np.zeros(3, np.int32))


def zeros(*names: str) -> dict[str, np.ndarray]:
    return dict.fromkeys(names, np.zeros(5, np.float32))


def test_the_responses_of_a_group_without_what_is_trained_in_its_prompt() -> None:
    group = Group("prompt", 9, (np.zeros(2, np.int32), np.zeros(1, np.int32)), in_prompt=(Span(1, 2), Span(5, 1)))
    group = group.with_tokens(weights=np.arange(6, dtype=np.float32))
    assert (group.n_tokens, group.cost) == (6, 12) and group.cut(1) == [group]
    alone = group.of_responses()
    assert alone.n_tokens == 3 and alone.tokens["weights"].tolist() == [3, 4, 5]


def test_an_array_has_a_value_per_response_token() -> None:
    with pytest.raises(ValueError, match="values has shape .4,.; the group trains 5 tokens"):
        Group("prompt", 1, IDS, {"values": np.zeros(4, np.float32)})


def test_any_array_is_cut_with_its_responses() -> None:
    group = Group("prompt", 1, IDS, {"values": np.arange(5.0), "returns": np.arange(5)}, temperature=0.7)
    first, second = group.cut(0)
    assert first.tokens["values"].tolist() == [0, 1] and second.tokens["returns"].tolist() == [2, 3, 4]
    assert (first.temperature, second.cost) == (0.7, 4)


@pytest.mark.parametrize(
    ("objective", "names", "missing"),
    [
        (Supervised(), (), "weights"),
        (PolicyGradient(GrpoConfig()), ("weights", "advantages"), "rollout_logprobs"),
        (PolicyGradient(GrpoConfig(kl_coef=0.1)), ("weights", "advantages", "rollout_logprobs"), "ref_logprobs"),
        (Preferred(DpoConfig(), 1), ("weights",), "ref_logprobs"),
        (Regression(1), (), "labels"),
    ],
)
def test_an_objective_says_which_array_a_batch_lacks(objective, names: tuple[str, ...], missing: str) -> None:  # type: ignore[no-untyped-def]
    group = Group("prompt", 1, IDS, zeros(*names))
    with pytest.raises(ValueError, match=f"{type(objective).__name__} needs {missing}, which"):
        check_arrays([group], objective.needs, type(objective).__name__)


def test_what_an_objective_does_not_need_may_be_absent() -> None:
    check_arrays([Group("prompt", 1, IDS, zeros("weights"))], Preferred(DpoConfig(loss="simpo"), 1).needs, "Preferred")
    check_arrays([Group("prompt", 1, IDS)], BradleyTerry(1).needs, "BradleyTerry")
