from __future__ import annotations

import io
import json
import re

import pytest
from rich.text import Text

from rlvid.reporting.console import Console

METRICS = {
    "reward/mean": 0.5,
    "train/accuracy": 0.625,
    "policy/kl": 0.00002,
    "response/length": 2.03,
    "groups/zero_variance": 0.25,
    "samples_per_s": 41.2,
    "time/step": 6.2,
    "time/generate": 2.2,
    "time/train": 3.1,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_piped_lines_are_aligned_and_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    stream = io.StringIO()
    with Console(stream) as console:
        console.phase("GRPO", steps=100)
        console.working("generating")
        console.step(9, METRICS)
        console.step(10, METRICS | {"reward/mean": 12345.678, "policy/kl": -1.5e-9})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4 and lines[0].startswith("── GRPO ──")
    assert re.findall(r"\S+", lines[1]) == (
        ["step", "reward", "accuracy", "KL", "length", "zero-var", "samples/s", "s/step", "s/generate", "s/train"]
    )
    assert re.findall(r"\S+", lines[2]) == (
        ["9/100", "0.500", "62.5%", "2.0e-05", "2.0", "25.0%", "41.2", "6.2", "2.2", "3.1"]
    )
    assert len({len(line) for line in lines[1:]}) == 1
    assert all(letter.isprintable() or letter == "\n" for letter in stream.getvalue())


def test_missing_and_non_finite_numbers_are_a_dash() -> None:
    stream = io.StringIO()
    Console(stream).step(3, {"policy/kl": float("nan"), "reward/mean": None, "time/step": float("inf")})
    assert stream.getvalue().splitlines()[1].split() == ["3", "-", "-", "-", "-", "-", "-", "-"]


def test_heading_is_repeated_every_twenty_lines_and_for_a_new_stage() -> None:
    stream = io.StringIO()
    console = Console(stream)
    for step in range(41):
        console.step(step, METRICS)
    assert [number for number, line in enumerate(stream.getvalue().splitlines()) if "reward" in line] == [0, 21, 42]
    console.step(41, METRICS | {"time/checkpoint": 1.0})
    console.step(42, METRICS)
    lines = stream.getvalue().splitlines()
    assert "s/checkpoint" in lines[-3]
    assert lines[-1].split()[-1] == "-"


@pytest.mark.parametrize("loss", ["warm_start/loss", "loss"])
def test_supervised_steps_have_their_own_columns(loss: str) -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.phase("warm start", steps=5)
    console.step(1, {loss: 3.25, "train/lr": 1e-6})
    heading, line = stream.getvalue().splitlines()[1:]
    assert heading.split() == ["step", "loss", "accuracy", "lr", "samples/s", "s/step"]
    assert line.split() == ["1/5", "3.250", "-", "1.0e-06", "-", "-"]


def test_evaluation_names_n_and_kinds() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.evaluation(50, {"eval/accuracy": 0.875, "eval/n": 256, "eval/accuracy/count": 0.5})
    console.evaluation(60, {})
    assert stream.getvalue().splitlines() == [
        "evaluation after step 50: accuracy 87.5% of 256 samples (count 50.0%)",
        "evaluation after step 60: accuracy -",
    ]


def test_result_is_the_last_line_and_strict_json() -> None:
    for stream in (io.StringIO(), Terminal()):
        with Console(stream, width=30) as console:
            console.phase("GRPO", steps=3)
            console.step(1, METRICS)
            console.result({"accuracy_after": float("nan"), "report": "runs/" + "x" * 300})
        last = stream.getvalue().splitlines()[-1]
        assert json.loads(last[last.index("{") :])["accuracy_after"] is None


def test_narrow_terminal_leaves_out_the_stages_first() -> None:
    stream = Terminal()
    console = Console(stream, width=76)
    console.step(1, METRICS)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "samples/s" in text and "s/train" not in text
    assert all(len(line) <= 76 for line in text.splitlines())


def test_terminal_escapes_in_messages_are_shown_not_sent() -> None:
    stream = io.StringIO()
    Console(stream).message("bad clip \x1b[2J[red]a\x07.mp4")
    assert stream.getvalue() == "bad clip �[2J[red]a�.mp4\n"


def test_terminal_without_unicode_does_not_stop_a_run() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(stream).phase("GRPO")
    stream.seek(0)
    assert "GRPO" in stream.read()


def test_table_is_plain_and_aligned_in_a_pipe_and_takes_no_markup() -> None:
    stream = io.StringIO()
    with Console(stream) as console:
        console.table(("", "check"), [("ok", "[red]ray"), (Text("fail", style="bold red"), "two\nlines \x1b[2J")])
    assert stream.getvalue() == "      check\nok    [red]ray\nfail  two\n      lines \ufffd[2J\n"
