from __future__ import annotations

import pytest

from rlvid.errors import UserError
from rlvid.evaluation.benchmarks.multimood import Multimood, read_lines
from rlvid.evaluation.predictions import Prediction
from rlvid.types import Message, Sample


def four(client: str, therapist: str, strategy: str, response: str) -> str:
    return (
        f"Client's emotion: {client}\nTherapist's emotion: {therapist}\n"
        f"Therapist's strategy: {strategy}\nTherapist's response: {response}"
    )


RIGHT = four("sadness", "neutral", "open question", "How are you today?")
SAMPLES = [Sample(str(i), (), (Message("user", ("Hm.",)),), RIGHT) for i in range(4)]


def test_lines_are_read_whatever_their_case_and_a_missing_one_is_none() -> None:
    said = read_lines(RIGHT.upper() + "\nMore of it.")
    assert said is not None and said["Client's emotion"] == "sadness"
    assert said["Therapist's response"] == "HOW ARE YOU TODAY?\nMore of it."
    assert read_lines("Client's emotion: joy") is None
    assert read_lines(RIGHT + "\nClient's emotion: joy") is None  # twice


def test_refusals_and_other_forms_stay_in_the_denominator() -> None:
    benchmark = Multimood(SAMPLES)
    texts = [RIGHT, four("joy", "neutral", "open question", "Fine."), "As an AI language model I will not.", ""]
    parsed = {s.id: benchmark.parse(s, Prediction(t, 1, "stop")) for s, t in zip(SAMPLES, texts, strict=True)}
    metrics = benchmark.score(parsed)
    assert metrics["accuracy_client_emotion"] == 0.25 and metrics["accuracy_strategy"] == 0.5
    assert metrics["unknown_strategy"] == 0.5 and metrics["refusals"] == 0.25 and metrics["n"] == 4
    assert metrics["rouge1"] == pytest.approx(0.25)
    assert benchmark.value(SAMPLES[1], parsed["1"]) == pytest.approx(2 / 3)


def test_an_answer_that_is_not_in_four_lines_is_named() -> None:
    with pytest.raises(UserError, match="answer of sample 'x' is not in MultiMood's four lines"):
        Multimood([Sample("x", (), SAMPLES[0].messages, four("bored", "neutral", "approval", "Ok."))])
