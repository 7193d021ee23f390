from __future__ import annotations

from jobs.supervised import is_shown, results


def test_about_twenty_steps_of_a_training_are_shown_and_the_last_one() -> None:
    assert [s for s in range(1, 13) if is_shown(s, 12, 1.0)] == list(range(1, 13))
    shown = [s for s in range(1, 121) if is_shown(s, 120, 1.0)]
    assert shown == list(range(6, 121, 6))
    assert is_shown(397, 397, 1.0) and len([s for s in range(1, 100_001) if is_shown(s, 100_000, 1.0)]) == 20


def test_slow_steps_are_all_shown() -> None:
    assert all(is_shown(s, 100_000, 31.0) for s in range(1, 50))


def test_a_result_has_the_metrics_that_were_measured() -> None:
    assert results({"eval/n": 3.0}, {"n": "eval/n", "accuracy": "eval/accuracy"}) == {"n": 3.0}
