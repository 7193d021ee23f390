"""What a judge is asked and how its answer is read: templates, strict parsers, verdicts. No model is called here.

The fields of a template (questions, responses, descriptions) are data: tags in them are broken up, so that a response
cannot close its field or contain a verdict. An answer is read when it contains exactly one valid verdict. Anything else
is unparsed, which is a state of its own and never a score. (LLaVA-Hound's `eval_qa.py` takes a majority over all
numbers of the answer, and 1 where there is none.)
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from typing import Literal

from rlvid.types import Message, Sample

ZERO_WIDTH_SPACE = "\u200b"
_TAG_START = re.compile(r"<(?=\s*/?\s*[A-Za-z_])")


@dataclass(frozen=True)
class Template:
    """A prompt with named fields, all of them data."""

    text: str  # with fields as in str.format

    def fill(self, **fields: str) -> str:
        return self.text.format(**{name: as_data(value) for name, value in fields.items()})

    @property
    def hash(self) -> str:
        """Recorded with every verdict: judges are compared under the same prompt only."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def as_data(text: str) -> str:
    """`text` with its tags disabled: a zero-width space follows each `<` that could begin one."""
    return _TAG_START.sub("<" + ZERO_WIDTH_SPACE, text.strip())


_PAIR = (
    "<question> {question} </question>\n"
    "%s"
    "<response_1> {response_1} </response_1>\n"
    "<response_2> {response_2} </response_2>\n"
    "Which response answers the question about the video better? What the video shows counts, length does not. "
    "Say first what the right answer is, then end with <choice>1</choice> or <choice>2</choice>."
)
_CONTEXT = "<video_description> {context} </video_description>\n"
PAIR = Template(_PAIR % "")
PAIR_WITH_CONTEXT = Template(_PAIR % _CONTEXT)
DESCRIBE = Template("Describe the video in detail.")
REFINE = Template(
    _CONTEXT + "Describe the video in detail: correct what is wrong in this description, add what it lacks."
)

_RATED = "<question> {question} </question>\n<response> {response} </response>\n"
SCORE = Template(
    _RATED + "How well does the response answer the question about the video? What the video shows counts, length does "
    "not. Say first what the right answer is, then end with a number from 1 to 10, as <score>7</score>."
)
TRUST_DIMS = ("Truthfulness", "Safety", "Fairness", "Privacy", "Empathy", "Reliability", "Ethical Guidance")
"""Dimensions of MultiMood's reward."""
TRUST = Template(
    _RATED
    + "Rate the response from 1 to 10 in each of these dimensions, one line each:\n"
    + "\n".join(f"{name}: N/10" for name in TRUST_DIMS)
)

TIMED_OUT = "no answer within"  # the failure of a time-out begins with this


@dataclass(frozen=True)
class Answer:
    """What a judge said, or why it said nothing."""

    text: str | None
    failure: str = ""


@dataclass(frozen=True)
class PairVerdict:
    """Which of two responses is better. They are judged in both orders; there is a winner only where both agree."""

    state: Literal["consistent", "inconsistent", "unparsed", "failed"]
    winner: Literal[0, 1] | None = None  # index of the better response, where consistent
    reason: str = ""

    @property
    def is_valid(self) -> bool:
        """Whether both answers were read; they may still disagree."""
        return self.state in ("consistent", "inconsistent")


def _in_only_tag(tag: str, form: str, text: str) -> str | None:
    """What is in the tag of an answer that has exactly one, if it has this form."""
    tags = re.findall(rf"<\s*/?\s*{tag}\s*>", text, re.IGNORECASE)
    found = re.findall(rf"<{tag}>\s*({form})\s*</{tag}>", text, re.IGNORECASE)
    return found[0] if len(found) == 1 and len(tags) == 2 else None


def parse_choice(text: str) -> Literal[1, 2] | None:
    """The choice in an answer that has exactly one `<choice>` tag, with 1 or 2 in it."""
    choices: dict[str | None, Literal[1, 2]] = {"1": 1, "2": 2}
    return choices.get(_in_only_tag("choice", "[12]", text))


_TRUST = re.compile(rf"^\W*({'|'.join(TRUST_DIMS)})\W*:\W*(10|[1-9])\s*/\s*10\b", re.IGNORECASE | re.MULTILINE)


def parse_score(text: str) -> float | None:
    """The score of an answer that has exactly one `<score>` tag, from 1 to 10; scaled to 0 to 1."""
    found = _in_only_tag("score", "10|[1-9]", text)
    return None if found is None else (int(found) - 1) / 9


def parse_trust(text: str) -> float | None:
    """The mean of the seven dimensions of `TRUST`, each given exactly once; scaled to 0 to 1."""
    found = {name.lower(): int(score) for name, score in _TRUST.findall(text)}
    is_once = len(_TRUST.findall(text)) == len(found) == len(TRUST_DIMS)
    return sum(score - 1 for score in found.values()) / (9 * len(found)) if is_once else None


def rating_prompt(template: Template, sample: Sample, response: str, name: str) -> Sample:
    """The prompt, with id `name`, that asks to rate a response."""
    return about_video(sample, name, template.fill(question=question_of(sample), response=response))


def pair_verdict(as_given: Answer, swapped: Answer) -> PairVerdict:
    """The verdict from the answers for the orders (a, b) and (b, a)."""
    if as_given.text is None or swapped.text is None:
        return PairVerdict("failed", reason=as_given.failure or swapped.failure)
    first, second = parse_choice(as_given.text), parse_choice(swapped.text)
    if first is None or second is None:
        unread = as_given.text if first is None else swapped.text
        return PairVerdict("unparsed", reason=f"no single choice in {unread!r:.200}")
    if first == second:
        return PairVerdict("inconsistent", reason=f"response {first} in either order")
    return PairVerdict("consistent", 0 if first == 1 else 1)


def question_of(sample: Sample) -> str:
    """What the responses answer: the question, or the whole conversation where there are several turns."""
    turns = [m for m in sample.messages if m.role != "system"]
    return turns[0].text if len(turns) == 1 else "\n".join(f"{m.role}: {m.text}" for m in turns)


def about_video(sample: Sample, sample_id: str, text: str) -> Sample:
    """A new prompt about the media of `sample`, media first."""
    return Sample(sample_id, sample.media, (Message.about(sample.media, text),), answer="")


def pair_prompts(sample: Sample, responses: tuple[str, str], context: str | None) -> tuple[Template, list[Sample]]:
    """The template and its prompts for the two orders of `responses`; ids end in #12 and #21."""
    template = PAIR if context is None else PAIR_WITH_CONTEXT
    prompts = []
    for order, (one, two) in (("12", responses), ("21", responses[::-1])):
        text = template.fill(question=question_of(sample), response_1=one, response_2=two, context=context or "")
        prompts.append(about_video(sample, f"{sample.id}#{order}", text))
    return template, prompts


def describe_prompt(sample: Sample, previous: str) -> Sample:
    """Ask for the visual context c_t from the video and c_(t-1) (empty in the first iteration)."""
    text = REFINE.fill(context=previous) if previous else DESCRIBE.fill()
    return about_video(sample, f"{sample.id}#context", text)


def with_context(sample: Sample, context: str) -> Sample:
    """`sample` with its video's description before the text of the last turn."""
    if not context:
        return sample
    *before, last = sample.messages
    parts = list(last.content)
    at = next((i for i in reversed(range(len(parts))) if isinstance(parts[i], str)), len(parts))
    parts.insert(at, _CONTEXT.format(context=as_data(context)))
    return replace(sample, messages=(*before, Message(last.role, tuple(parts))))
