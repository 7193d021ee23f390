"""What the tasks measure, and which responses kto compares; each task on one and two processes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.supervised_tasks import Answers, Example, Preferred, Supervised, other_response, trained_turns
from rlvid.config import DpoConfig, SftConfig
from rlvid.errors import UserError
from rlvid.types import Medium, Message, Preference, Prompt, Sample, Span
from tests.ranks import run_ranks


def sample(name: str, question: str, video: str = "") -> Sample:
    media = (Medium(video),) if video else ()
    return Sample(name, media, (Message.about(media, question),), "")


def pairs(*questions: str) -> list[Example]:
    return [Example(sample(f"s{i}", q), (f"chosen {i}", f"rejected {i}")) for i, q in enumerate(questions)]


def test_kto_compares_with_the_next_pair_of_the_whole_mini_batch() -> None:
    examples = pairs("a", "b", "c", "d", "e")
    batch = [4, 0, 2]  # over all workers: which worker has a pair does not matter
    assert [other_response(examples, batch, place) for place in range(3)] == ["chosen 0", "chosen 2", "chosen 4"]


def test_kto_leaves_out_pairs_of_the_same_prompt() -> None:
    examples = pairs("a", "a", "b", "a")
    assert [other_response(examples, [0, 1, 2], place) for place in range(3)] == ["chosen 2", "chosen 2", "chosen 0"]
    assert (
        other_response(examples, [0, 1, 3], 1) == "chosen 2"
    )  # one prompt in the mini-batch: the next of the manifest
    same_text = [Example(sample("x", "a", "1.mp4"), ("one", "")), Example(sample("y", "a", "2.mp4"), ("two", ""))]
    assert other_response(same_text, [0, 1], 0) == "two"  # another video is another prompt


def test_kto_on_a_single_prompt_is_refused(tmp_path: Path) -> None:
    one = [Preference(sample(name, "a"), "yes", "no") for name in ("x", "y")]
    with pytest.raises(UserError, match="at least two prompts"):
        Preferred(DpoConfig(loss="kto"), tmp_path, True, one)
    Preferred(DpoConfig(), tmp_path, True, one)
    Preferred(DpoConfig(loss="kto"), tmp_path, True, [*one, Preference(sample("z", "b"), "yes", "no")])


def test_the_held_out_loss_of_answers_is_a_mean_over_tokens() -> None:
    examples = pairs("a", "b")
    assert Supervised().summarize(examples, [(6.0, 3), (1.0, 1)]) == {"loss": 7 / 4, "n": 2.0}


def test_accuracy_of_answers_is_the_share_that_greedy_decoding_would_give() -> None:
    scored = [(6.0, 3, True), (1.0, 1, False), (1.0, 1, True)]
    metrics = Answers(SftConfig()).summarize(pairs("a", "b", "c"), scored)
    assert (metrics["loss"], metrics["accuracy"], metrics["n"]) == (8 / 5, pytest.approx(2 / 3), 3)


def test_which_earlier_answers_are_trained() -> None:
    turns = [Message(role, ("?",), is_marked=i == 3) for i, role in enumerate(("user", "assistant") * 2 + ("user",))]
    conversation = Sample("s", (), tuple(turns), "x")
    spans = (Span(3, 2), Span(8, 4))
    prompt = Prompt("s", np.zeros(20, np.int32), np.zeros((1, 20), np.int32), answered=spans)
    chosen = {loss: trained_turns(conversation, prompt, loss) for loss in ("last", "marked", "all")}
    assert chosen == {"last": (), "marked": spans[1:], "all": spans}
    rewritten = replace(prompt, answered=(None, spans[1]))
    assert trained_turns(conversation, rewritten, "marked") == spans[1:]
    with pytest.raises(UserError, match="the model's chat template writes an earlier answer in another form"):
        trained_turns(conversation, rewritten, "all")


def test_preferences_are_summarised_by_means_over_pairs(tmp_path: Path) -> None:
    task = Preferred(DpoConfig(), tmp_path, True, [])
    metrics = task.summarize(pairs("a", "b"), [[1.0, 0.5, 0.25], [0.5, 0.0, math.log(2)]])
    assert metrics == pytest.approx({"accuracy": 0.75, "margin": 0.25, "loss": (0.25 + math.log(2)) / 2, "n": 2.0})


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_every_task_measures_the_same_on_one_worker_and_two(tiny_model: Path, tmp_path: Path) -> None:
    one, two = (run_ranks("tests.actors.task_rank", world, tmp_path, str(tiny_model)) for world in (1, 2))
    for task, expected in one.items():
        for step, (a, b) in enumerate(zip(expected, two[task], strict=True)):
            if task == "answers" and step < 3:  # a row on each worker, half as full
                assert (a.pop("train/rows"), b.pop("train/rows")) == (1, 2)
                halves = a.pop("train/fill") / 2  # less, where a sample comes twice and one forward does for both
                assert (halves <= (fill := b.pop("train/fill"))) and (step or fill == pytest.approx(halves))
            assert b == pytest.approx(a, rel=1e-4, abs=1e-4, nan_ok=True), (task, step)
    for kind in ("kto", "kto_adapters"):  # the reference is a frozen copy, or the policy with its first adapters
        first, _, last, held_out = one[kind]
        assert first["preference/kl"] == pytest.approx(0.0, abs=1e-5) and first["loss"] == pytest.approx(0.5, abs=1e-6)
        assert last["preference/kl"] > 1e-4 and held_out["n"] == 5
    assert one["bradley_terry"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert one["generation"][-1]["unparsed"] == 5  # what a random model says is no score
