"""The right answer of a manifest row, and its choices: accepted where it can mean one thing only."""

from __future__ import annotations

import re
from string import ascii_uppercase
from typing import Any

from rlvid.data.items import Refused
from rlvid.rewards.answers import MAX_CHOICES, choices_meant, read_choice

TAGGED = re.compile(r"\s*<answer>(.*)</answer>\s*", re.DOTALL)


def read_choices(value: Any) -> tuple[str, ...] | None:
    """The choices of a row: a list of texts, or an object of them by letter, {"A": "red", "B": "blue"}.

    Raises:
        Refused: they are no such list, too few or many, or two are equal but for case.
    """
    if value is None:
        return None
    if isinstance(value, dict):
        letters = sorted(value)
        if "".join(map(str, letters)).upper() != ascii_uppercase[: len(letters)]:
            raise Refused(f"choices must be a list of texts, or an object with the letters from A on; got {letters}")
        value = [value[letter] for letter in letters]
    if not isinstance(value, list) or not all(isinstance(choice, str) and choice.strip() for choice in value):
        raise Refused('choices must be a list of texts that are not empty, for example ["red", "blue"]')
    if not 2 <= len(value) <= MAX_CHOICES:
        raise Refused(f"choices must be 2 to {MAX_CHOICES}, one a letter; got {len(value)}")
    folded = list(map(_folded, value))
    if len(set(folded)) < len(value):
        twice = next(choice for i, choice in enumerate(value) if folded[i] in folded[:i])
        raise Refused(f"choice {twice!r} equals another one, or differs from it by case alone; leave one out")
    return tuple(value)


def read_answer(value: Any, choices: tuple[str, ...] | None, is_needed: bool) -> str:
    """The answer of a row; with choices the text or letter of one of them. "" where there is none and none is needed.

    Raises:
        Refused: it is missing, or does not name exactly one choice.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if value in (None, "") and not is_needed:
        return ""
    if isinstance(value, str) and (tagged := TAGGED.fullmatch(value)):
        value = tagged[1].strip()
    if isinstance(value, list) and len(value) > 1:
        raise Refused(f"answer {value!r:.60} names several; a row has one right answer")
    if not isinstance(value, str) or not value.strip():
        raise Refused("answer is missing or empty; expected a text or a number")
    return value if choices is None else _choice(value, choices)


def _choice(answer: str, choices: tuple[str, ...]) -> str:
    meant = choices_meant(answer, choices)
    if len(meant) > 1:
        raise Refused(f"answer {answer!r} is one choice's text and another one's letter; give a letter that is no text")
    if meant:
        return answer
    answer = answer.strip()
    if (named := read_choice(answer, choices)) is not None:  # yes for Yes, (A), B. blue
        return named
    if answer.isdecimal() and int(answer) in (0, len(choices)):
        return choices[0 if int(answer) == 0 else -1]  # 0 can only count from 0, the last number only from 1
    if answer.isdecimal() and int(answer) < len(choices):
        raise Refused(f"answer {answer} may count the choices from 0 or from 1; give a choice's text or letter")
    raise Refused(f"answer {answer!r} names none or several of the choices {list(choices)}; give one's text or letter")


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
