"""Reads an answer out of a response: where it is, and which text, choice or number it names.

Choices have letters: A is the first one, Z the last one possible.

The accepted forms are the tables of docs/rewards.md, which the tests read. Responses are untrusted text: nothing is
evaluated, and no response, however long or odd, takes long to read.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from string import ascii_uppercase

MAX_CHOICES = len(ascii_uppercase)
# A longer answer is wrong unread. unicodedata.normalize is quadratic in combining marks: 52 s for 200,000 of them.
MAX_ANSWER_CHARS = 4096

# Typographic variants of ASCII characters. Not NFKC, which would also turn a superscript two into "2" and so make
# "5\N{SUPERSCRIPT TWO}" equal to "52".
_PLAIN = str.maketrans(
    {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width letters, digits and punctuation
    | dict.fromkeys(map(ord, "\u3000\u00a0\u2009\u202f"), " ")
    | dict.fromkeys(map(ord, "‘’‚‛′"), "'")
    | dict.fromkeys(map(ord, "“”„‟«»「」『』《》〈〉"), '"')
    | dict(zip(map(ord, "【】〔〕。、"), ("[", "]", "[", "]", ".", ", "), strict=True))
)
_MINUS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63", "-"))
_QUOTES = "\"'`*"
_TRAILING = ".,;:!?" + _QUOTES + " "

_TEXT_MACRO = re.compile(r"\\(?:boxed|fbox|text|textbf|textit|textrm|mathbf|mathrm|mathit|mathsf) ?\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac ?\{ ?([0-9.,]+) ?\} ?\{ ?([0-9.,]+) ?\}")
_SPACE_MACRO = re.compile(r"\\[,;:! ]|~")
_MATH = re.compile(r"\$\$?([^$]*)\$\$?|\\\((.*?)\\\)|\\\[(.*?)\\\]")
_EMPHASIS = re.compile(r"\*{1,3}([^*]+)\*{1,3}|`+([^`]+)`+|(?<!\w)__?([^_]+)__?(?!\w)")

_LEAD = re.compile(
    r"(?:所以|因此|故|综上|綜上|よって|したがって|따라서|그러므로)?,? ?"
    r"(?:(?:我|应|應|请|請|本题|本題)?(?:选择|選擇|选项|選項|选|選)"
    r"|(?:正确|正確|最终|最終|最佳|标准|標準)?的?(?:答案|回答|解答|答え|正解|答)(?:应该是|應該是|是|为|為|は|选|選)?"
    r"|(?:정답|답변|답)(?:은|는)?) ?:? ?"
    r"|(?:(?:so|thus|hence|therefore|final answer),?:? )?"
    r"(?:(?:(?:the|my) )?(?:correct |right |best |final )?(?:answer|option|choice)(?: is)?(?:: ?| ))?",
    re.IGNORECASE,
)
_TAIL = re.compile(
    r"(?: is (?:the )?(?:correct|right)(?: answer| option| choice)?|です|だ|입니다|이다|是正[确確]答案|选项|選項)\.?\Z"
)
_CHOICE = re.compile(
    r"(?:[(\[](?P<in_brackets>[A-Za-z])[)\]][.:]?"  # "(B)", "[B]", "(B)."
    r"|(?P<bare>[A-Za-z])(?:(?P<mark>[).:])|,|(?![^ ])))"  # "B.", "B)", "B:"; "B, blue" and "B blue" have no mark
    r"(?:(?: |(?=[^\x00-\x7f]))(?P<rest>.*))?"
)
_LATIN = "0-9A-Za-z_\u00c0-\u024f"  # \w would join a letter to the CJK text around it
_LONE_LETTER = re.compile(rf"(?<![{_LATIN}'])(?:[A-Zb-z](?![{_LATIN}])|a(?=[).:\]]))")  # not the article, not "I'd"

_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)(?P<number>{_DECIMAL})(?: ?/ ?(?P<divisor>{_DECIMAL}))?"
    r"(?: ?(?P<percent>\\?%|percent)| ?(?P<unit>[^\W\d_][^\W\d_/]{0,15}(?:/[^\W\d_]{1,8})?[²³]?|°[CF]?))?"
)
_NOT_A_UNIT = re.compile(
    r"(?:hundred|thousand|[mbtr]+illion|dozen)s?|or|and|to|plus|minus|not|bn|mn|[kKMBexX]"
    r"|.*[一二三四五六七八九十百千万億亿萬兆십백천만억조多几幾余餘].*"
)


def answer_text(response: str, tags: Sequence[str], opening: str = "") -> str | None:
    """Where the answer is: inside the last of `tags`, or the whole response without tags.

    None unless that tag is there as exactly one pair: `<answer>A</answer> or <answer>B</answer>` answers nothing.

    Args:
        opening: with which the prompt has begun the response; only tags are looked for in it.
    """
    if not tags:
        return response
    whole, start, end = opening + response, f"<{tags[-1]}>", f"</{tags[-1]}>"
    if whole.count(start) != 1 or whole.count(end) != 1:
        return None
    body, found, _ = whole.partition(start)[2].partition(end)
    return body if found else None


def normalise(text: str) -> str:
    """Lower case, single spaces, ASCII quotes and punctuation, no quotes or emphasis around and no full stop after.

    No zeros at the end of a decimal. A text of nothing but such characters is kept.
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text.translate(_PLAIN)).casefold())
    folded = " ".join(folded.split())
    bare = folded.strip(_QUOTES).rstrip(_TRAILING).lstrip() or folded
    whole, point, decimals = bare.partition(".")
    if point and whole.lstrip("+-").isdecimal() and decimals.isdecimal():
        bare = f"{whole}.{decimals}".rstrip("0").removesuffix(".")
    return bare


def read_choice(text: str, choices: Sequence[str]) -> str | None:
    """Text of the choice that an answer names, None when it names none or more than one."""
    if len(text) > MAX_ANSWER_CHARS:
        return None
    line = _without_markup(text).strip(_QUOTES + " ")
    body = _TAIL.sub("", _LEAD.sub("", line, count=1).strip(_QUOTES + " "))
    texts = {normalise(form) for form in (text, line, body) if form}
    named = {normalise(choice): choice for choice in choices if normalise(choice) in texts}
    if (by_letter := _choice_by_letter(body, choices)) is not None:
        named[normalise(by_letter)] = by_letter
    return next(iter(named.values())) if len(named) == 1 else None


def read_first_letter(text: str, choices: Sequence[str]) -> str | None:
    """Text of the choice whose letter begins an answer, as a letter or as that of a word; else of the first letter that
    a colon follows. Published MMStar accuracies were read so (tests/rewards/test_choices.py)."""
    line, by_letter = text.strip().upper(), _by_letter(choices)
    letters = "".join(by_letter)
    found = re.match(f"([{letters}])", line) or re.search(rf"\b([{letters}]):", line)
    return by_letter[found[1]] if found else None


def _choice_by_letter(text: str, choices: Sequence[str]) -> str | None:
    """The choice whose letter begins `text`, which is one line.

    What follows may be its text, or after "B." and "(B)" an explanation that names no other choice. A letter without a
    mark before other words is no letter: "A dog runs".
    """
    match = _CHOICE.fullmatch(text)
    if match is None:
        return None
    by_letter, letter = _by_letter(choices), (match["in_brackets"] or match["bare"]).upper()
    if letter not in by_letter:
        return None
    named = by_letter[letter]
    rest = normalise(match["rest"] or "")
    if not rest or rest == normalise(named):
        return named
    if match["bare"] and not match["mark"]:
        return None
    letters_after = {other.upper() for other in _LONE_LETTER.findall(match["rest"])}
    others = {normalise(choice) for choice in choices} - {normalise(named)}
    explanation = rest.replace(normalise(named), " ")
    if letters_after & by_letter.keys() - {letter} or any(_is_in(other, explanation) for other in others):
        return None
    return named


def read_number(text: str) -> tuple[float, str] | None:
    """The number that a text states and its unit ("" without one), None when it says anything more or else.

    A percentage is divided by 100 and has no unit.
    """
    if len(text) > MAX_ANSWER_CHARS:
        return None
    line = _LEAD.sub("", _without_markup(text.translate(_MINUS)).strip(_QUOTES + " "), count=1)
    match = next(filter(None, map(_NUMBER.fullmatch, (line, line.removesuffix(".")))), None)
    if match is None:
        return None
    unit = match["unit"] or ""
    is_word = unit.strip("²³°").replace("/", "").isalpha() or unit == "°"
    if unit and (not is_word or _NOT_A_UNIT.fullmatch(unit)):
        return None
    value, divisor = (float((match[name] or "1").replace(",", "")) for name in ("number", "divisor"))
    value = value / divisor if divisor else math.inf
    value /= 100.0 if match["percent"] else 1.0
    return (-value if match["sign"] == "-" else value, unit.casefold()) if math.isfinite(value) else None


def _without_markup(text: str) -> str:
    """`text` on one line with single spaces, without LaTeX and emphasis, in ASCII where typography varies."""
    line = _SPACE_MACRO.sub(" ", " ".join(text.translate(_PLAIN).split()))
    line = _FRACTION.sub(r"\1/\2", line)
    for _ in range(3):  # macros in macros
        line = _TEXT_MACRO.sub(r"\1", line)
    for pattern in (_MATH, _EMPHASIS):
        line = pattern.sub(lambda match: next(filter(None, match.groups()), ""), line)
    return " ".join(line.split())


def _is_in(text: str, line: str) -> bool:
    """Whether `text` is in `line` as words of its own."""
    return bool(text) and re.search(rf"(?<![{_LATIN}]){re.escape(text)}(?![{_LATIN}])", line) is not None


def choice_lines(choices: Sequence[str]) -> str:
    """The choices as the policy reads them, one per line: "A. red" and so on."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in _by_letter(choices).items())


def bring_letters(choices: Sequence[str]) -> bool:
    """Whether every choice begins with its own letter already: "A. red", "(B) blue" (as Video-R1's options do)."""
    return all(re.match(rf"\s*\(?{letter}[.):]", choice) for letter, choice in _by_letter(choices).items())


def choices_meant(answer: str, choices: Sequence[str]) -> frozenset[str]:
    """Texts of the choices that the sample's answer can mean: the one with this text and the one with this letter.

    Empty when it means none. Two when it is a letter that is also the text of another choice: then it is ambiguous.
    """
    answer, by_letter = answer.strip(), _by_letter(choices)
    with_letter = [by_letter[answer.upper()]] if answer.upper() in by_letter else []
    return frozenset([*with_letter, *(choice for choice in choices if choice.strip() == answer)])


def _by_letter(choices: Sequence[str]) -> dict[str, str]:
    return dict(zip(ascii_uppercase, choices, strict=False))
