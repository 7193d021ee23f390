"""Complete runs of i-SRT: killed in every stage, and with the model as its own judge."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.judge import checkpoint_id
from jobs.isrt import Iteration, add_different, judge_accuracy, metrics_of, prompts_of
from rlvid.config import IsrtJobConfig
from rlvid.data.manifest import load_manifest
from rlvid.data.preferences import pairs_of
from rlvid.reporting.run_folder import RunFolder
from rlvid.rewards.judge_prompts import DESCRIBE, PAIR, PAIR_WITH_CONTEXT
from rlvid.types import Encoded, Sample
from tests.http_server import chat_answer, serving
from tests.jobs.runs import LIMIT_S, finish, start

STAGES = ("contexts", "responses", "judgements", "pairs")
CONFIG = """
model: {{tiny: {{layers: {layers}, vision_layers: 1}}}}
data: {{synthetic: {{train: {train}, eval: 6, kinds: [colour]}}, cache_dir: {folder}/cache}}
video: {{frames: 2, height: 56, width: 56}}
run: {{wandb: disabled, checkpoint_every: 1000}}
rollout: {{max_tokens: 6, max_model_len: 512, max_sequences: 32}}
train: {{batch_size: 4, lr: 1.0e-4}}
placement: {{threads: 1, encoders: 1}}
"""


def pairs_made(process: subprocess.Popen[str]) -> int:
    """The number of pairs of a run with `--only-data`, which ends with exit code 2 where there is none (fault 30)."""
    out, err = process.communicate(timeout=LIMIT_S)
    if process.returncode == 2:
        assert "there is no pair to train on: of 48 prompts" in err and "inconsistent" in err, out + err
        return 0
    assert process.returncode == 0, out + err
    return int(json.loads(out.splitlines()[-1])["pairs"])


def kill_when(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """kill -9 as soon as `condition` is true."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail("".join(filter(None, process.communicate())))
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def endpoint() -> Iterator[SimpleNamespace]:
    """A judge that prefers the response with the larger hash, whatever the order."""
    state = SimpleNamespace(asked=0, down_after=math.inf)

    def answer(_: str, request: dict[str, Any]) -> tuple[int, Any]:
        text = request["messages"][0]["content"]
        one, two = (
            hashlib.sha256(re.findall(rf"<response_{i}> (.*?) </response_{i}>", text, re.DOTALL)[0].encode())
            for i in (1, 2)
        )
        if state.asked >= state.down_after:
            return 503, {}
        state.asked += 1
        return 200, chat_answer(f"<choice>{1 if one.digest() > two.digest() else 2}</choice>")

    with serving(answer) as url:
        state.url = f"{url}/v1"
        yield state


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(1800)
def test_a_run_stopped_in_every_stage_makes_the_same_pairs(tmp_path: Path, endpoint: SimpleNamespace) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(layers=1, train=24, folder=tmp_path))
    judge = f"{{backend: endpoint, url: '{endpoint.url}', model: judge-1, concurrency: 1, deadline_s: 3}}"
    shared = (f"isrt.judge={judge}", "isrt.context_tokens=12", "isrt.iterations=1", "train.steps=12")

    whole = tmp_path / "whole"
    learned = "warm_start={steps: 30, batch_size: 16, lr: 2.0e-3, warmup_steps: 5}"  # until most responses end
    result = finish(start("isrt", config, *shared, f"run.dir={whole}", learned, "--only-data"))
    shared += (f"model.path={whole}/sft", "data.synthetic=null", f"data.train={whole}/data/train.jsonl")
    shared += (f"data.eval={whole}/data/eval.jsonl",)
    files = {stage: whole / "iterations" / "01" / f"{stage}.jsonl" for stage in STAGES}
    pairs = rows_of(files["pairs"])
    assert result["pairs"] == len(pairs) > 12
    judged = rows_of(files["judgements"])
    assert {row["judge"] for row in judged} == {f"judge-1 at {endpoint.url}"}
    described = {row["id"] for row in rows_of(files["contexts"]) if row["context"]}  # others may be empty
    for row in judged:
        assert row["prompt"] == (PAIR_WITH_CONTEXT if row["id"] in described else PAIR).hash
    samples = load_manifest(files["pairs"], whole, None, "", needs_answer=False)
    assert len(pairs_of(files["pairs"], samples)) == len(pairs)

    run = tmp_path / "killed"
    folder = run / "iterations" / "01"
    arguments = (*shared, f"run.dir={run}", "isrt.chunk_size=1", "run.checkpoint_every=1")

    def count(stage: str) -> int:
        path = folder / f"{stage}.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    for stage in STAGES[:2]:
        kill_when(start("isrt", config, *arguments), lambda stage=stage: count(stage) >= 3)  # type: ignore[misc]
        assert 3 <= count(stage) < len(rows_of(files[stage])), f"not killed within the {stage}"
        with (folder / f"{stage}.jsonl").open("a") as file:
            file.write('{"id": "train-0000')  # an incomplete line, as after a kill during a write
    endpoint.down_after = endpoint.asked + 13  # within the fourth chunk: two samples each, judged in both orders
    out, err = (down := start("isrt", config, *arguments, "isrt.chunk_size=2")).communicate(timeout=LIMIT_S)
    assert down.returncode == 2 and "HTTP 503" in err and "judge-1" in err, out + err
    assert count("judgements") % 2 == 0 and 2 <= count("judgements") < len(judged)  # whole chunks that were answered
    endpoint.down_after = math.inf
    kill_when(start("isrt", config, *arguments), lambda: any(folder.glob("checkpoints/step_[1-9]*")))
    assert not (folder / "model").exists()
    asked = endpoint.asked
    result = finish(start("isrt", config, *arguments))
    assert endpoint.asked == asked  # nothing is judged twice
    for stage, path in files.items():
        assert (folder / f"{stage}.jsonl").read_bytes() == path.read_bytes(), stage
    metrics = rows_of(run / "metrics.jsonl")
    assert [row["step"] for row in metrics if "eval/n" in row] == [0, 1]
    assert [row["step"] for row in metrics if "pairs/kept" in row] == [1]
    assert (run / "policy" / "model.safetensors").is_file() and {"accuracy_after", "length_ratio"} <= result.keys()


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(1800)
def test_a_model_judges_itself(tmp_path: Path) -> None:
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(CONFIG.format(layers=2, train=48, folder=tmp_path))
    judge = "max_tokens: 40, max_invalid_fraction: 1.0"  # verdicts of such a small model are often invalid
    arguments = (
        f"run.dir={run}",
        "warm_start={steps: 60, batch_size: 16, lr: 2.0e-3, warmup_steps: 10}",
        f"isrt={{context_tokens: 16, judge: {{{judge}}}}}",
        "--only-data",
    )
    n_pairs = pairs_made(start("isrt", config, *arguments))  # such a small model may always choose the first response
    folder = run / "iterations" / "01"
    judged = rows_of(folder / "judgements.jsonl")
    assert judged and all(row["judge"].startswith("policy ") for row in judged)
    assert {row["state"] for row in judged} <= {"consistent", "inconsistent", "unparsed"}
    assert n_pairs == sum(row["state"] == "consistent" for row in judged)
    assert {row["prompt"] for row in rows_of(folder / "contexts.jsonl")} == {DESCRIBE.hash}
    for row in rows_of(folder / "responses.jsonl"):
        assert len(row["responses"]) <= 2 and len(set(row["responses"])) == len(row["responses"])
    metrics = rows_of(run / "metrics.jsonl")
    assert [row["step"] for row in metrics if "eval/n" in row] == [0]

    assert pairs_made(start("isrt", config, *arguments)) == n_pairs  # the run is complete
    assert rows_of(run / "metrics.jsonl") == metrics

    other = tmp_path / "other"
    local = f"{{backend: local, path: {run}/sft, {judge}}}"
    data = (f"model.path={run}/sft", "data.synthetic=null", f"data.train={run}/data/train.jsonl")
    isrt = f"isrt={{context: none, judge: {local}}}"
    pairs_made(start("isrt", config, f"run.dir={other}", *data, isrt, "--only-data"))
    (name,) = {row["judge"] for row in rows_of(other / "iterations" / "01" / "judgements.jsonl")}
    assert name == f"local {checkpoint_id(run / 'sft', run)}"
    assert not (other / "iterations" / "01" / "contexts.jsonl").exists()


class Stopped(Exception):
    """Raised in place of a kill in the middle of a stage."""


class SeededFleet:
    """Answers by a hash of seed, prompt and number of the answer, and raises after a number of calls."""

    def __init__(self, calls: int):
        self.calls = calls

    def generate(self, prompts: Sequence[Encoded], sampling: Any) -> list[list[Any]]:
        if self.calls == 0:
            raise Stopped
        self.calls -= 1
        return [[self._answer(p.sample, sampling, i) for i in range(sampling.n)] for p in prompts]

    def _answer(self, sample: Sample, sampling: Any, i: int) -> Any:
        digest = hashlib.sha256(f"{sampling.request_seed(sample.id)} {sample.question} {i}".encode()).digest()
        text = ("red", "Red.", "blue", "a green one", "")[digest[0] % 5]
        if found := re.findall(r"<response_[12]> (.*?) </response_[12]>", sample.question):
            longer = 1 if len(found[0]) > len(found[1]) else 2
            text = f"<choice>{longer}</choice>" if digest[0] % 8 else "both"
        finish_reason = "length" if digest[1] % 4 == 0 else "stop"
        return SimpleNamespace(text=text, token_ids=[0] * (1 + len(text.split())), finish_reason=finish_reason)


class InstantClips:
    def encode(self, samples: Sequence[Sample]) -> list[Encoded]:
        return [Encoded(s, None, 1, 1, tuple(m.path for m in s.media)) for s in samples]  # type: ignore[arg-type]

    def answered(self, prompts: list[Encoded], groups: list[Any]) -> tuple[list[Encoded], list[Any]]:
        return prompts, groups  # none is refused


@pytest.mark.parametrize("context", ["none", "judge", "judge_and_responses"])
def test_stopped_after_any_call_it_makes_the_same_rows(
    context: str, tmp_path: Path, synthetic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = load_manifest(synthetic / "train.jsonl", None, None, "")
    isrt = {"context": context, "chunk_size": 7, "judge": {"max_invalid_fraction": 0.9}}
    cfg = IsrtJobConfig.model_validate({"model": {"tiny": {}}, "data": {"train": "x"}, "isrt": isrt})

    def rows(folder: Path, calls: int) -> dict[str, bytes]:
        """All files, made by processes that each stop after `calls` calls."""
        run: Any = SimpleNamespace(
            folder=RunFolder(folder),
            console=SimpleNamespace(message=lambda text: None),
            steps=range,
            stage=lambda name: nullcontext(),
            logged=lambda key: range(3),
            end_if_interrupted=lambda text: None,
        )
        family = SimpleNamespace(opening="")
        placement = SimpleNamespace(cfg=cfg, on_event=print)
        inputs: Any = SimpleNamespace(train=train, held_out=[], clips=InstantClips(), family=family)
        for number in (1, 2):
            for _ in range(100):
                roles = SimpleNamespace(fleet=SeededFleet(calls), placement=placement)
                monkeypatch.setattr("jobs.isrt.generators", lambda *_, roles=roles: nullcontext(roles))
                try:
                    pairs = Iteration(cfg, run, inputs, number).pairs(tmp_path)
                    break
                except Stopped:
                    continue
            metrics = metrics_of(Iteration(cfg, run, inputs, number))
            assert metrics["pairs/n"] == len(pairs) > 0 and metrics["judge/longer_wins"] == 1.0
            assert 0.1 < metrics["response/truncated"] < 0.4  # a quarter
            assert 0.5 < metrics["judge/consistency"] <= 1 and metrics["pairs/kept"] == len(pairs) / len(train)
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("iterations/*/*.jsonl"))}

    whole = rows(tmp_path / "whole", 1000)
    assert len(whole) == (6 if context == "none" else 8)
    for calls in (cfg.isrt.tries, cfg.isrt.tries + 1):  # one chunk of responses may need all its tries
        assert rows(tmp_path / f"stopped-{calls}", calls) == whole


def test_the_judges_accuracy_counts_pairs_of_which_one_is_right(synthetic: Path, tmp_path: Path) -> None:
    train = load_manifest(synthetic / "train.jsonl", None, None, "")[:3]
    cfg = IsrtJobConfig.model_validate({"model": {"tiny": {}}, "data": {"train": "x"}})
    right, wrong = [s.answer for s in train], ["no answer", "not one either", "nor this"]
    texts = [(right[0], wrong[0]), (wrong[1], right[1]), (wrong[2], "neither")]
    responses = {s.id: {"responses": list(both), "n_tokens": [1, 1]} for s, both in zip(train, texts, strict=True)}
    inputs = SimpleNamespace(family=SimpleNamespace(opening=""))
    iteration: Any = SimpleNamespace(cfg=cfg, samples=train, responses=responses, inputs=inputs)
    decided = [{"id": s.id, "winner": 0} for s in train]  # right, wrong, neither is right
    assert judge_accuracy(iteration, decided) == {"judge/accuracy": 0.5, "judge/accuracy_n": 2.0}


def test_split_prompts_do_not_repeat_until_all_are_used(synthetic: Path) -> None:
    train = load_manifest(synthetic / "train.jsonl", None, None, "")
    base = {"model": {"tiny": {}}, "data": {"train": "x"}}
    split = IsrtJobConfig.model_validate({**base, "isrt": {"prompts": "split", "max_prompts": 7}})
    parts = [{s.id for s in prompts_of(split, train, number)} for number in (1, 2, 3)]
    assert [len(p) for p in parts] == [7, 7, 7] and not parts[0] & parts[1] and len(set.union(*parts)) == 20
    reuse = IsrtJobConfig.model_validate({**base, "isrt": {"max_prompts": 7}})
    assert prompts_of(reuse, train, 1) == prompts_of(reuse, train, 3)
    assert {s.id for s in prompts_of(reuse, train, 1)} == parts[0]


def test_equal_and_truncated_responses_are_not_added() -> None:
    """Fault 17: a truncated response was trained with an end of turn behind it."""
    found: list[Any] = []
    drawn = [("Red.", "stop"), (" red", "stop"), ("", "stop"), ("it is", "length"), ("blue", "stop"), ("green", "stop")]
    add_different(found, [SimpleNamespace(text=t, finish_reason=r) for t, r in drawn])  # type: ignore[misc]
    assert [r.text for r in found] == ["Red.", "blue"]
