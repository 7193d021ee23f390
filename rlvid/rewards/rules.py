"""Rewards computed by rules from the response and the manifest's answer.

Responses are untrusted text: nothing is evaluated, and no response, however long or odd, takes long to mark.
A wrong or missing answer is a legitimate 0. A sample that a rule cannot mark gives an invalid reward, never 0.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from string import ascii_uppercase

from rlvid.config import RewardPartConfig
from rlvid.errors import UserError
from rlvid.rewards.choices import choices_meant
from rlvid.types import Reward, Sample

# A longer answer is wrong unread. unicodedata.normalize is quadratic in combining marks: 52 s for 200,000 of them.
MAX_ANSWER_CHARS = 4096
TAG_NAME = re.compile(r"[A-Za-z][\w-]*")

_CHOICE = re.compile(
    r"(?i:(?:the )?(?:correct |best )?(?:answer|option|choice)(?: is)?:? ?)?"  # "The answer is"
    r"(?:\((?P<in_brackets>[A-Za-z])\)[.:]?|(?P<bare>[A-Za-z])(?P<mark>[).:])?)"  # "(B)", "B", "B.", "B)", "B:"
    r"(?: (?P<rest>.*))?"
)
_LONE_LETTER = re.compile(r"(?<![\w'])(?:[A-Zb-z](?!\w)|a(?=[).:]))")  # "C", "c.", "(c)"; not the article, not "I'd"
_NUMBER = re.compile(
    r"(?P<number>[+-]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)"
    r" ?(?P<percent>%?)"
)


class NoReward(Exception):
    """This sample cannot be marked by this rule. The message is the reason of the invalid reward."""


def exact(response: str, sample: Sample, tags: Sequence[str] = ()) -> float:
    """1.0 when the answer equals the sample's after `normalise`, else 0.0."""
    if not sample.answer.strip():
        raise NoReward("the sample has no answer")
    answer = answer_text(response, tags)
    if answer is None or len(answer) > max(MAX_ANSWER_CHARS, 2 * len(sample.answer)):
        return 0.0
    return float(normalise(answer) == normalise(sample.answer))


def choice(response: str, sample: Sample, tags: Sequence[str] = ()) -> float:
    """1.0 when the answer names the right choice by its letter, its text or both, else 0.0. See `read_choice`.

    Raises:
        NoReward: The sample has no choices, or its answer is not one of them.
    """
    if not sample.choices:
        raise NoReward("the sample has no choices")
    right = choices_meant(sample.answer, sample.choices)
    if len(right) != 1:
        raise NoReward(f"the sample's answer {sample.answer!r} does not name one of its choices")
    answer = answer_text(response, tags)
    named = None if answer is None else read_choice(answer, sample.choices)
    return float(named is not None and normalise(named) == normalise(*right))


def number(response: str, sample: Sample, tags: Sequence[str] = (), tolerance: float = 1e-6) -> float:
    """1.0 when the answer is a number and within `tolerance` of the sample's, else 0.0. See `read_number`.

    Raises:
        NoReward: The sample's answer is not a number.
    """
    right = read_number(sample.answer)
    if right is None:
        raise NoReward(f"the sample's answer {sample.answer[:80]!r} is not a number")
    answer = answer_text(response, tags)
    value = None if answer is None else read_number(answer)
    return float(value is not None and abs(value - right) <= tolerance)


def tag_format(response: str, tags: Sequence[str]) -> float:
    """1.0 when the response is the tags in their order, each exactly once and not empty, with only space between.

    Stricter than Video-R1's `<think>.*?</think>\\s*<answer>.*?</answer>`, which a repeated or an empty tag passes.
    """
    if any(answer_text(response, (tag,)) is None for tag in tags):
        return 0.0  # one pair of each in the whole response: none hides inside the body of another
    rest = response.strip()
    for tag in tags:
        body = answer_text(rest, (tag,))
        if body is None or not body.strip() or not rest.startswith(f"<{tag}>"):
            return 0.0
        rest = rest[len(body) + len(f"<{tag}></{tag}>") :].lstrip()
    return float(not rest)


def length(n_tokens: int, min_tokens: int = 0, max_tokens: int | None = None) -> float:
    """1.0 when min_tokens <= n_tokens <= max_tokens, else 0.0."""
    return float(min_tokens <= n_tokens and (max_tokens is None or n_tokens <= max_tokens))


def answer_text(response: str, tags: Sequence[str]) -> str | None:
    """Where the answer stands: inside the last of `tags`, or the whole response without tags.

    None unless that tag is there as exactly one pair: `<answer>A</answer> or <answer>B</answer>` answers nothing.
    """
    if not tags:
        return response
    start, end = f"<{tags[-1]}>", f"</{tags[-1]}>"
    if response.count(start) != 1 or response.count(end) != 1:
        return None
    body, found, _ = response.partition(start)[2].partition(end)
    return body if found else None


def normalise(text: str) -> str:
    """Lower case, single spaces, no quotes or emphasis around, no full stop after.

    NFC and not NFKC, which would make "5\N{SUPERSCRIPT TWO}" equal to "52". A text of nothing but such marks is kept.
    """
    folded = " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).split())
    return folded.strip("\"'`*").rstrip(".,;:!?\"'`* ").lstrip() or folded


def read_choice(text: str, choices: Sequence[str]) -> str | None:
    """Text of the choice that an answer names, None when it names none or more than one.

    It may be the text of a choice ("red"), a letter ("B", "(B)", "B.", "b)"), a letter and its text ("B. red"), or a
    marked letter and an explanation without another choice's letter ("B. It turns left."). "The answer is" may stand
    before the letter. An unmarked letter before other words is no letter: "A dog runs".
    """
    if len(text) > MAX_ANSWER_CHARS:
        return None
    text = " ".join(text.split()).strip("*\"'`").strip()
    named = {normalise(choice): choice for choice in choices if text and normalise(choice) == normalise(text)}
    if (by_letter := _choice_by_letter(text, choices)) is not None:
        named[normalise(by_letter)] = by_letter
    return next(iter(named.values())) if len(named) == 1 else None


def _choice_by_letter(text: str, choices: Sequence[str]) -> str | None:
    """`text` is one line with single spaces."""
    match = _CHOICE.fullmatch(text)
    if match is None:
        return None
    letters = ascii_uppercase[: len(choices)]
    letter = (match["in_brackets"] or match["bare"]).upper()
    if letter not in letters:
        return None
    named = choices[letters.index(letter)]
    rest = match["rest"] or ""
    if not rest or normalise(rest) == normalise(named):
        return named
    if match["bare"] and not match["mark"]:
        return None
    others = {other.upper() for other in _LONE_LETTER.findall(rest)} & set(letters) - {letter}
    return None if others or normalise(rest) in map(normalise, choices) else named


def read_number(text: str) -> float | None:
    """The number that a text is, None when it is anything more or else.

    Integers, decimals, exponents, thousands separators ("1,234.5") and percent ("12%" is 0.12), with ASCII digits. One
    full stop may follow. Not accepted: units, words, fractions, a decimal comma, infinity.
    """
    text = text.strip().replace("\N{MINUS SIGN}", "-") if len(text) <= MAX_ANSWER_CHARS else ""
    match = _NUMBER.fullmatch(text) or _NUMBER.fullmatch(text.removesuffix("."))
    if match is None:
        return None
    value = float(match["number"].replace(",", "")) / (100.0 if match["percent"] else 1.0)
    return value if math.isfinite(value) else None


Rule = Callable[[str, int, Sample], float]


class RuleRewards:
    """The configured parts of a rule reward and their weighted sum.

    Raises:
        UserError: At construction: no parts, two parts of one name, or a part that could never be given.
    """

    def __init__(self, parts: Sequence[RewardPartConfig]):
        if not parts:
            raise UserError("rewards is empty: give at least one part, for example [{kind: exact}]")
        self._rules: dict[str, tuple[float, Rule]] = {}
        for index, part in enumerate(parts):
            name = part.name or part.kind
            _check_part(part, where=f"rewards[{index}] ({name})")
            if name in self._rules:
                raise UserError(f"rewards[{index}]: a part before is named {name!r} too; give each its own `name`")
            self._rules[name] = (part.weight, _rule(part))

    def __call__(self, response: str, n_tokens: int, sample: Sample) -> Reward:
        """Mark one response of `n_tokens` tokens. Invalid, with the part and the reason, when one part is invalid."""
        values: dict[str, float] = {}
        for name, (_, rule) in self._rules.items():
            try:
                values[name] = rule(response, n_tokens, sample)
            except NoReward as reason:
                return Reward.invalid(f"{name}: {reason}")
        return Reward(parts=values, total=math.fsum(self._rules[name][0] * value for name, value in values.items()))


def _rule(part: RewardPartConfig) -> Rule:
    rules: Mapping[str, Rule] = {
        "exact": lambda response, n_tokens, sample: exact(response, sample, part.tags),
        "choice": lambda response, n_tokens, sample: choice(response, sample, part.tags),
        "number": lambda response, n_tokens, sample: number(response, sample, part.tags, part.tolerance),
        "format": lambda response, n_tokens, sample: tag_format(response, part.tags),
        "length": lambda response, n_tokens, sample: length(n_tokens, part.min_tokens, part.max_tokens),
    }
    return rules[part.kind]


def _check_part(part: RewardPartConfig, where: str) -> None:
    if part.kind == "model":
        raise UserError(f"{where}: a reward model is no rule; only the rewards of rlvid grpo and rlvid eval serve it")
    if not math.isfinite(part.weight):
        raise UserError(f"{where}: weight must be a finite number, got {part.weight}")
    if part.kind == "format" and not part.tags:
        raise UserError(f"{where}: format needs tags, for example tags: [think, answer]")
    if bad := [tag for tag in part.tags if not TAG_NAME.fullmatch(tag)]:
        raise UserError(f"{where}: tags are names without brackets, for example answer; got {bad[0]!r}")
    if len(set(part.tags)) < len(part.tags):
        raise UserError(f"{where}: every tag stands once in a response, but tags names one twice: {list(part.tags)}")
    if part.max_tokens is not None and part.min_tokens > part.max_tokens:
        raise UserError(f"{where}: min_tokens={part.min_tokens} is more than max_tokens={part.max_tokens}")
