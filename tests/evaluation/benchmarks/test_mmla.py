from __future__ import annotations

import pytest

from rlvid.errors import UserError
from rlvid.evaluation.benchmarks.mmla import Mmla
from rlvid.evaluation.predictions import Prediction
from rlvid.types import Medium, Message, Sample

LISTED = "What is the mood? The candidate labels for mood are: [up, down]. Say it."


def row(name: str, dataset: str | None, answer: str, question: str = "?", **extra: str) -> Sample:
    media = (Medium("v.mp4"),)
    return Sample(name, media, (Message.about(media, question),), answer, problem_type=dataset, extra=extra)


SAMPLES = [
    row("1", "MUStARD", "speaking style: sincere", text="Sure."),
    row("2", "MUStARD", "speaking style: sarcastic", text="Oh, great."),
    row("3", "MOSI", "sentiment: positive", text="Good."),
    row("4", None, "mood: up", LISTED, text="x"),
]
SAID = {"1": "speaking style: sincere", "2": "It is sincere, I think", "3": "positive or negative"}


def test_both_parsers_all_averages_and_confusions() -> None:
    benchmark = Mmla(SAMPLES)
    parsed = {s.id: benchmark.parse(s, Prediction(SAID[s.id], 3, "stop")) for s in SAMPLES if s.id in SAID}
    metrics = benchmark.score(parsed)
    assert metrics["accuracy"] == pytest.approx(1 / 3) and metrics["accuracy_macro_tasks"] == 0.25
    assert metrics["accuracy/MUStARD"] == 0.5 and metrics["multi/MOSI"] == 1.0 and metrics["n/MOSI"] == 1
    assert metrics["accuracy_strict"] == pytest.approx(1 / 3) and metrics["unknown_strict/MUStARD"] == 0.5
    assert (metrics["n"], metrics["n_invalid"]) == (3, 1)
    assert [benchmark.value(s, parsed.get(s.id)) for s in SAMPLES] == [1.0, 0.0, 0.0, None]
    confusion = {c.name: c.counts for c in benchmark.confusions(parsed)}
    assert confusion["MUStARD"] == [[1, 0, 0, 0], [1, 0, 0, 0]] and confusion["MOSI"][0] == [0, 0, 0, 1]


def test_the_official_prompt_is_that_of_the_scripts() -> None:
    asked = Mmla(SAMPLES, "official").prompt(SAMPLES[0])
    assert asked.messages[-1].text == (
        "You are presented with a video in which the speaker says: Sure.. Based on the text, video, and audio content, "
        "what is the speaking style of this speaker?\nThe candidate labels for speaking style are: [humorous, "
        "serious].Respond in the format: 'speaking style: [label]'.  Only one label should be provided."
    ).replace("humorous, serious", "sincere, sarcastic")
    assert len(asked.messages[-1].content) == 2  # the video, then the text


def test_rows_that_do_not_fit_are_named_together() -> None:
    rows = [row("a", "MOSI", "sentiment: great"), row("b", None, "up"), row("c", "MOSI", "positive")]
    with pytest.raises(
        UserError, match=r"2 samples do not fit benchmark mmla:\n  a: its answer .* is none of the labels"
    ) as e:
        Mmla(rows)
    assert "b: its problem_type is no data set" in str(e.value)
    with pytest.raises(UserError, match=r"c: it has no text, from which benchmark\.prompt=official makes its prompt"):
        Mmla(rows[2:], "official")
