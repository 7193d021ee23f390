import math

import pytest

from rlvid.evaluation.metrics import Accuracy, accuracy_report


def test_sample_weighted_and_macro_differ_when_types_have_different_n() -> None:
    verdicts = [True, True, True, False, False, True]
    types = ["colour", "colour", "colour", "colour", "order", None]
    report = accuracy_report(verdicts, types)
    assert report.sample_weighted == Accuracy(n=6, correct=4)
    assert report.by_type == {
        "colour": Accuracy(n=4, correct=3),
        "no type": Accuracy(n=1, correct=1),
        "order": Accuracy(n=1, correct=0),
    }
    assert report.sample_weighted.value == pytest.approx(4 / 6)
    assert report.macro == pytest.approx((3 / 4 + 1 + 0) / 3)


def test_samples_without_a_verdict_are_counted_separately() -> None:
    report = accuracy_report([True, None, None, False], ["a", "a", "b", "a"])
    assert report.sample_weighted == Accuracy(n=2, correct=1)
    assert report.n_invalid == 2
    assert report.by_type == {"a": Accuracy(n=2, correct=1)}  # nothing is known of b


def test_metric_names_say_the_kind_of_average_and_n() -> None:
    metrics = accuracy_report([True, False, True, True], ["a", "a", "b", "b"]).as_metrics()
    assert metrics.pop("accuracy_low95") < 0.75 < metrics.pop("accuracy_high95")
    assert metrics == {
        "accuracy": 0.75,
        "accuracy_macro_types": 0.75,
        "n": 4,
        "n_invalid": 0,
        "n_types": 2,
        "accuracy/a": 0.5,
        "n/a": 2,
        "accuracy/b": 1.0,
        "n/b": 2,
    }


def test_wilson_interval_by_hand() -> None:
    # p = 1/2, n = 4, z = 2: centre (1/2 + 4/8) / (1 + 4/4) = 1/2, half 2/2 * sqrt(1/16 + 4/64) = sqrt(1/8)
    assert Accuracy(n=4, correct=2).interval(z=2) == pytest.approx((0.5 - math.sqrt(1 / 8), 0.5 + math.sqrt(1 / 8)))
    # p = 0: centre and half are both (z^2 / 2n) / (1 + z^2 / n), so 0 to (z^2/n) / (1 + z^2/n)
    assert Accuracy(n=4, correct=0).interval(z=2) == pytest.approx((0.0, 1 / 2))
    assert Accuracy(n=4, correct=4).interval(z=2) == pytest.approx((1 / 2, 1.0))


def test_wilson_interval_of_a_published_example() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81 of 263 and 15 of 148, 95 %
    assert Accuracy(n=263, correct=81).interval() == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert Accuracy(n=148, correct=15).interval() == pytest.approx((0.0624, 0.1605), abs=5e-5)


def test_no_samples_have_no_accuracy() -> None:
    report = accuracy_report([], [])
    assert math.isnan(report.sample_weighted.value) and math.isnan(report.macro)
    assert report.sample_weighted.interval() == (0.0, 1.0)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and n=2"):
        Accuracy(n=2, correct=3)
    with pytest.raises(ValueError):
        accuracy_report([True], [])
