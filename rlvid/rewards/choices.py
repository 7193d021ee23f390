"""Letters of multiple-choice answers: A is the first choice, Z the last one possible."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

MAX_CHOICES = len(ascii_uppercase)


def choice_lines(choices: Sequence[str]) -> str:
    """The choices as the policy reads them, one per line: "A. red" and so on."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))


def bring_letters(choices: Sequence[str]) -> bool:
    """Whether every choice begins with its own letter already: "A. red", "(B) blue" (as Video-R1's options do)."""
    pairs = zip(ascii_uppercase, choices, strict=False)
    return all(re.match(rf"\s*\(?{letter}[.):]", choice) for letter, choice in pairs)


def choices_meant(answer: str, choices: Sequence[str]) -> frozenset[str]:
    """Texts of the choices that the sample's answer can mean: the one with this text and the one with this letter.

    Empty when it means none. Two when it is a letter that is also the text of another choice: then it is ambiguous.
    """
    answer = answer.strip()
    meant = {choice for choice in choices if choice.strip() == answer}
    if len(answer) == 1 and answer.upper() in ascii_uppercase[: len(choices)]:
        meant.add(choices[ascii_uppercase.index(answer.upper())])
    return frozenset(meant)
