from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import RayActorError

from actors.supervised_plan import Plan, TrainingRun, describe_silence, root_error
from actors.supervised_tasks import Example, Supervised
from rlvid.config import SftJobConfig
from rlvid.types import Message, Sample


def plan(tmp_path: Path, n: int = 7, held_out: int = 1, **keys: object) -> Plan:
    cfg = SftJobConfig.model_validate(
        {
            "model": {"tiny": {}},
            "data": {"synthetic": {}},
            "train": {"steps": 5, "batch_size": 4},
            "evaluate": {"every": 2},
        }
    )
    rows = tuple(Example(Sample(str(i), (), (Message("user", ("?",)),), "a"), ("a",)) for i in range(n))
    return Plan(cfg, Supervised(), tmp_path, rows, rows[:held_out], tmp_path, tmp_path / "out", **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 3])
def test_the_workers_shares_are_the_mini_batches_whatever_their_number(tmp_path: Path, world: int, start: int) -> None:
    p = plan(tmp_path)
    shares = [p.shares(rank, world, start) for rank in range(world)]
    for step in range(start, 5):
        together = sorted(i for share in shares for s, i in share if s == step)
        assert together == sorted(p.batch(step))
    assert all(len([s for s, _ in share if s == 4]) >= 4 // world for share in shares)


def test_an_evaluation_is_due_before_every_n_steps_and_after_and_only_once(tmp_path: Path) -> None:
    due = [s for s in range(6) if plan(tmp_path).is_evaluated_after(s)]
    assert due == [0, 2, 4, 5]
    assert [s for s in range(6) if plan(tmp_path, evaluated=2).is_evaluated_after(s)] == [4, 5]
    assert not any(plan(tmp_path, held_out=0).is_evaluated_after(s) for s in range(6))


def test_a_checkpoint_waits_until_the_driver_has_handled_the_events_before_it() -> None:
    run = TrainingRun()
    assert run.take({"position": 0}) == [] and run.settled_state() == {"position": 0}
    assert run.put(("step", 1)) is False
    assert run.settled_state() is None  # put, not taken
    assert run.take({"position": 0}) == [("step", 1)] and run.settled_state() is None  # taken, not yet handled
    run.take({"position": 4})
    assert run.settled_state() == {"position": 4}
    run.stop()
    assert run.put(("step", 2)) is True


def test_the_error_that_is_raised_is_the_one_that_caused_the_others() -> None:
    first, closed, died = ValueError("out of memory"), RuntimeError("connection closed by peer"), RayActorError()
    assert root_error({0: closed, 1: first}, reported=[1, 0]) is first
    assert root_error({0: closed, 1: died}, reported=[0]) is died
    assert root_error({0: closed, 1: first}, reported=[0, 1, 1, 0]) is first  # the first pair is of an earlier start
    assert root_error({2: closed}, reported=[]) is closed
    assert root_error({}, reported=[0]) is None


def test_every_failure_of_a_worker_is_reported() -> None:
    run = TrainingRun()
    run.fail(1, "ValueError: out of memory")
    run.fail(0, "RuntimeError: connection closed by peer")
    assert [text for kind, text in run.take({}) if kind == "failed"] == [
        "worker 1 failed: ValueError: out of memory",
        "worker 0 failed: RuntimeError: connection closed by peer",
    ]


def test_silence_is_put_down_to_room_only_before_a_worker_has_started(tmp_path: Path) -> None:
    assert "placement.trainer_cpus" in describe_silence("", 60, tmp_path)
    told = describe_silence("loading the model", 60, tmp_path)
    assert "loading the model" in told and str(tmp_path) in told and "placement" not in told
