from collections import Counter

import pytest

from rlvid.data import order
from rlvid.data.order import Shares, Strata, batch_indices


def test_every_epoch_holds_every_sample_once() -> None:
    stream = batch_indices(n=7, seed=3, start=0, count=21)
    assert [sorted(stream[i : i + 7]) for i in (0, 7, 14)] == [[0, 1, 2, 3, 4, 5, 6]] * 3


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    stream = batch_indices(n=50, seed=0, start=0, count=100)
    assert stream[:50] != stream[50:]
    assert stream[:50] != batch_indices(n=50, seed=1, start=0, count=50)
    # seed and epoch are two words of the entropy, not their sum
    assert stream[50:] != batch_indices(n=50, seed=1, start=0, count=50)


def test_a_run_resumed_from_its_cursor_draws_the_same_samples() -> None:
    whole = batch_indices(n=5, seed=9, start=0, count=40)
    for cursor in (0, 1, 5, 13):
        assert batch_indices(n=5, seed=9, start=cursor, count=40 - cursor) == whole[cursor:]


def test_a_batch_may_span_several_epochs_and_be_empty() -> None:
    drawn = batch_indices(n=1, seed=0, start=4, count=3)
    assert drawn == [0, 0, 0] and all(type(index) is int for index in drawn)
    assert batch_indices(n=4, seed=0, start=2, count=0) == []


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    # The draws of PCG64 seeded with (0, 0), whose stream numpy keeps, in units of 1e18:
    # 11.7, 4.98, 0.756, 0.305, 15.0, 16.8. In rising order these are the positions
    assert batch_indices(n=6, seed=0, start=0, count=6) == [3, 2, 1, 0, 4, 5]


def test_the_permutation_of_an_epoch_is_made_once() -> None:
    order._permutation.cache_clear()
    for start in range(0, 100, 10):
        batch_indices(n=50, seed=0, start=start, count=10)
    assert order._permutation.cache_info().misses == 2


def test_nonsense_is_refused() -> None:
    for arguments in [(0, 0, 0, 1), (4, -1, 0, 1), (4, 0, -1, 1), (4, 0, 0, -1)]:
        with pytest.raises(ValueError, match="expected n >= 1"):
            batch_indices(*arguments)


LABELS = ["left"] * 30 + ["right"] * 30 + ["red"] * 15 + ["blue"] * 45  # of 120 samples, in batches of 8


def test_every_batch_has_its_share_of_each_stratum() -> None:
    strata = Strata.of(LABELS)
    for start in range(0, 360, 8):
        drawn = [LABELS[i] for i in batch_indices(120, 5, start, 8, strata)]
        for label, share in {"left": 2, "right": 2, "red": 1, "blue": 3}.items():
            assert abs(drawn.count(label) - share) <= 1
    by_chance = [LABELS[i] for i in batch_indices(120, 5, 0, 120)]
    assert max(by_chance[at : at + 8].count("left") for at in range(0, 120, 8)) > 3


def test_spread_epochs_are_permutations_with_orders_of_their_own() -> None:
    strata = Strata.of(LABELS)
    stream = batch_indices(120, 5, 0, 240, strata)
    assert sorted(stream[:120]) == sorted(stream[120:]) == list(range(120))
    assert stream[:120] != stream[120:]
    assert batch_indices(120, 5, 77, 100, Strata.of(LABELS)) == stream[77:177]


def test_samples_that_have_nothing_in_common_are_shuffled() -> None:
    order_of_places = batch_indices(1000, 0, 0, 1000, Strata.of(range(1000)))
    assert sorted(order_of_places) == list(range(1000))
    assert 400 < sum(order_of_places[:500]) / 500 < 600


def test_samples_of_one_stratum_follow_each_other_and_the_strata_are_shuffled() -> None:
    together = Strata.of(["a", "b", "a", "c", "b", "a"])
    orders = [tuple(batch_indices(6, seed, 0, 6, together=together)) for seed in range(20)]
    blocks = {0: (0, 2, 5), 1: (1, 4), 3: (3,)}
    for drawn in orders:
        at, found = 0, set()
        while at < 6:
            block = blocks[drawn[at]]
            assert drawn[at : at + len(block)] == block
            at += len(block)
            found.add(block)
        assert found == set(blocks.values())
    assert len(set(orders)) > 3
    assert batch_indices(6, 3, 4, 4, together=together) == [
        *orders[3][4:],
        *batch_indices(6, 3, 6, 2, together=together),
    ]


def test_an_epoch_has_each_sample_as_often_as_its_share_says() -> None:
    shares = Shares.of([1.0, 2.5, 0.5, 4.0])
    counts = [Counter(batch_indices(4, 7, 8 * epoch, 8, shares=shares)) for epoch in range(50)]
    assert all(count[0] == 1 and count[3] == 4 and count[1] in (2, 3) and count[2] in (0, 1) for count in counts)
    assert {count[2] for count in counts} == {0, 1}
    assert sum(count[1] for count in counts) == pytest.approx(125, abs=12)
    stream = batch_indices(4, 7, 0, 40, shares=shares)
    assert stream[13:29] == batch_indices(4, 7, 13, 16, shares=shares)
    assert stream[:8] != sorted(stream[:8])


def test_shares_may_make_an_epoch_shorter_or_longer_and_go_with_strata_and_media() -> None:
    rare = Shares.of([0.25] * 40)
    assert len(set(batch_indices(40, 1, 0, 10, shares=rare))) == 10  # an epoch of ten
    labels = ["a"] * 20 + ["b"] * 20
    for start in range(0, 60, 4):
        drawn = [labels[i] for i in batch_indices(40, 1, start, 4, Strata.of(labels), shares=Shares.of([1.5] * 40))]
        assert 1 <= drawn.count("a") <= 3
    order = batch_indices(4, 1, 0, 12, together=Strata.of("xyxy"), shares=Shares.of([3.0] * 4))
    assert [i % 2 for i in order] in ([0] * 6 + [1] * 6, [1] * 6 + [0] * 6)
