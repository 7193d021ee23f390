"""Weights of samples."""

from __future__ import annotations

import pytest

from rlvid.data.mixing import balanced, mixed, shares_of
from rlvid.types import Message, Sample


def sample(name: str, answer: str) -> Sample:
    return Sample(name, (), (Message("user", ("?",)),), answer)


def test_ids_of_a_mix_begin_with_its_parts_name_and_weights_are_kept_when_balanced() -> None:
    jokes = mixed([sample("1", "yes"), sample("2", "no"), sample("3", "no"), sample("4", "no")], "jokes", 3.0)
    moods = mixed([sample("1", "joy")], "moods", 1.0)
    assert [s.id for s in (*jokes, *moods)] == ["jokes/1", "jokes/2", "jokes/3", "jokes/4", "moods/1"]
    even = balanced([*jokes, *moods], "answer")  # the weights of no, yes and joy are 9, 3 and 1, 13 in all
    assert [s.weight for s in even] == pytest.approx([13 / 3, 13 / 9, 13 / 9, 13 / 9, 13 / 3])


def test_only_other_weights_than_one_are_shares() -> None:
    plain = [sample("1", "yes"), sample("2", "no")]
    assert shares_of(plain) is None and shares_of(balanced(plain, "answer")) is None
    shares = shares_of(mixed(plain, "a", 2.0))
    assert shares is not None and shares.ends.tolist() == [2.0, 4.0]
