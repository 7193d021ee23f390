"""What a video reward model scores, and how its prompts and score texts read: VideoScore and VideoScore2.

Both judge a *generated* video against the text it was generated from. They do not judge answers to questions.

Training and scoring use the same prompt. Upstream trains VideoScore's regression with the integer prompt and scores
with the float one (TIGER-AI-Lab/VideoScore, examples/run_videoscore.py); here `Rubric.template` is saved with the model
and used for both. Everything parsed here is untrusted text: a score that is not exactly in the form, or outside the
scale, is no score.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from rlvid.config import DIMS, RewardModelJobConfig, VideoConfig
from rlvid.errors import UserError
from rlvid.types import Message, Sample

if TYPE_CHECKING:
    from rlvid.models.heads import Head

ALIGNMENT = "text-to-video alignment"
RUBRIC_FOLDER = "reward_model"  # in an exported checkpoint: rubric.json and, where there is a head, head.safetensors
CAPTION_BEGINS, CAPTION_ENDS = 'the text prompt is "', '",\nall the frames of video are as follows:'

_INTEGER_SCALE = """\
For each dimension, output a number from [1,2,3,4],\x20
in which '1' means 'Bad', '2' means 'Average', '3' means 'Good',\x20
'4' means 'Real' or 'Perfect' (the video is like a real video)
"""
_FLOAT_SCALE = """\
for each dimension, output a float number from 1.0 to 4.0,
the higher the number is, the better the video performs in that sub-score,\x20
the lowest 1.0 means Bad, the highest 4.0 means Perfect/Real (the video is like a real video)
"""
_FIVE = """
Suppose you are an expert in judging and evaluating the quality of AI-generated videos,{gap}
please watch the following frames of a given video and see the text prompt for generating the video,{gap}
then give scores from 5 different dimensions:
(1) visual quality: the quality of the video in terms of clearness, resolution, brightness, and color
(2) temporal consistency, {temporal}
(3) dynamic degree, the degree of dynamic changes
(4) text-to-video alignment, the alignment between the text prompt and the video content
(5) factual consistency, the consistency of the video content with the common-sense and factual knowledge

{scale}Here is an output example:
{example}

For this video, {caption}
"""
_THREE = """
Judge this AI-generated video and the text it was generated from in 3 dimensions:
(1) visual quality: clearness, resolution, brightness, colour
(2) text-to-video alignment: does the video show what the text says
(3) physical/common-sense consistency: does what happens follow physics and common sense

Reason first, inside <think> and </think>. Then give each dimension a whole number from 1 (very poor) to 5 (very good):
(1) visual quality: n
(2) text-to-video alignment: n
(3) physical/common-sense consistency: n

The text is "{caption}".
"""
_THOUGHT = r"<think>(?:(?!</?think>).)*</think>\s*"


def _five(temporal: str, scale: str, values: tuple[float, ...], gap: str = "", after: str = "") -> str:
    example = "\n".join(f"{name}: {value}" for name, value in zip(DIMS, values, strict=True))
    caption = CAPTION_BEGINS + "{caption}" + CAPTION_ENDS + after
    return _FIVE.format(temporal=temporal, scale=scale, example=example, gap=gap, caption=caption)


# VideoScore's two are equal to the character to those of VideoFeedback's items (integer) and of upstream's inference
# (float), odd spaces included: the released weights were trained on them.
TEMPLATES = {
    "question": "{caption}",
    "integer": _five(
        "the consistency of objects or humans in video", _INTEGER_SCALE, (4, 4, 3, 1, 2), gap=" ", after=" \n"
    ),
    "float": _five(
        "both the consistency of objects or humans and the smoothness of motion or movements",
        _FLOAT_SCALE,
        (3.2, 2.7, 4.0, 2.3, 1.8),
    ),
    "thinking": _THREE,
}


class NoScore(ValueError):
    """Labels or a text that give no scores. The message says why."""


@dataclass(frozen=True)
class Rubric:
    """What a reward model scores. Saved with its weights, so that its prompts are those of its training."""

    kind: str  # RewardModelConfig.kind
    dims: tuple[str, ...]  # in the order of the head's outputs; everywhere else scores go by name
    low: int
    high: int
    template: str  # RewardModelConfig.template
    video: VideoConfig = field(default_factory=VideoConfig)  # of the training run

    @classmethod
    def of(cls, cfg: RewardModelJobConfig) -> Rubric:
        """The rubric of the model that a job trains."""
        part = cfg.reward_model
        return cls(part.kind, part.names, *part.bounds, part.template, cfg.video)

    @property
    def head(self) -> Head | None:
        """A head on the last token whose outputs are the scores; None where scores are text.

        It starts at the middle of the scale: the first loss is the labels' spread around it.
        """
        from rlvid.models.heads import Head  # imports torch

        middle = {"bradley_terry": 0.0, "regression": (self.low + self.high) / 2}
        return Head(self.dims, middle[self.kind]) if self.kind in middle else None

    def question(self, caption: str) -> str:
        """The text after the video, with the caption escaped. With the template `question` it is the caption alone."""
        return TEMPLATES[self.template].format(caption=caption if self.template == "question" else escape(caption))

    def graded(self, sample: Sample) -> Sample:
        """`sample` with this rubric's prompt around its caption (the manifest's field `prompt`).

        Where scores are text, that text becomes its answer.

        Raises:
            NoScore: no video, no caption, no scores, or an answer whose scores are not those of the labels.
        """
        labels = sample.extra.get("labels")
        scores = self.scores(labels)
        if self.kind == "generation":
            sample = replace(sample, answer=self.text(labels))
        if self.kind == "thinking" and list(self.parse(sample.answer).values()) != scores:
            raise NoScore(f"the answer scores {list(self.parse(sample.answer).values())}, labels {scores}")
        if self.template == "question":
            return sample
        caption = sample.extra.get("prompt")
        if not isinstance(caption, str) or not caption.strip():
            raise NoScore("prompt, the text that the video was generated from, is missing or empty")
        if not sample.media:
            raise NoScore("it has no video, and its prompt is about one")
        system = [m for m in sample.messages if m.role == "system"]
        asked = Message.about(sample.media, self.question(caption))
        return replace(sample, messages=(*system, asked), choices=None)

    def scores(self, labels: Any) -> list[float]:
        """Scores in the order of `dims`, looked up by name.

        Raises:
            NoScore: a dimension is missing, not a number or outside the scale.
        """
        if not isinstance(labels, Mapping):
            raise NoScore("labels is missing; expected an object with a score for each dimension")
        values = []
        for name in self.dims:
            value = labels.get(name)
            if value is None:
                raise NoScore(f"labels lacks {name!r}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
                raise NoScore(f"{name} is {value!r}; expected a number from {self.low} to {self.high}")
            values.append(float(value))
        return values

    def text(self, labels: Any) -> str:
        """Labels as the text that the model generates: one line per dimension, in the order of `dims`.

        Raises:
            NoScore: as `scores`, or a score is not a whole number.
        """
        scores = self.scores(labels)
        if any(s != int(s) for s in scores):
            raise NoScore(f"{scores} are not whole numbers, which scores as text must be")
        return "\n".join(f"{name}: {int(s)}" for name, s in zip(self.dims, scores, strict=True))

    def parse(self, text: str) -> dict[str, float]:
        """Scores of a generated text that is strictly in its form: no line missing, added or outside the scale.

        Raises:
            NoScore: anything else. Upstream takes the first five ": <digits>" of any text and 0 where there are fewer.
        """
        lines = [f"{re.escape(name)}: ([0-9])" for name in self.dims]
        if self.kind == "thinking":
            form = _THOUGHT + r"\s*".join(rf"\({i}\) {line}" for i, line in enumerate(lines, 1))
        else:
            form = r"[^\S\n]*\n[^\S\n]*".join(lines)
        match = re.fullmatch(rf"\s*{form}\s*", text, re.DOTALL)
        if match is None:
            raise NoScore(f"not the form of a score text: {text[:80]!r}")
        found = zip(self.dims, map(int, match.groups()), strict=True)
        return dict(zip(self.dims, self.scores(dict(found)), strict=True))

    def digit_offsets(self, text: str) -> dict[str, int]:
        """Index of each dimension's digit in a text that `parse` accepts."""
        return {name: text.rindex(f"{name}: ") + len(name) + 2 for name in self.dims}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rubric.json").write_bytes(TypeAdapter(Rubric).dump_json(self, indent=2) + b"\n")

    @classmethod
    def load(cls, folder: Path) -> Rubric:
        """
        Raises:
            UserError: no reward model is there.
        """
        file = folder / "rubric.json"
        try:
            return TypeAdapter(cls).validate_json(file.read_bytes())
        except (OSError, ValueError) as e:
            raise UserError(
                f"{file} cannot be read ({e}): give the folder `policy` of a run of rlvid reward-model"
            ) from e


def escape(caption: str) -> str:
    """A caption cannot end its quotation: quotes become single ones, line ends spaces."""
    return " ".join(caption.replace('"', "'").split())


def soft_score(chosen: int, logprobs: Mapping[int, float]) -> float:
    """VideoScore2's float score: the chosen integer times its share of the probability of all integers of the scale.

    It lowers uncertain scores (a 4 can become 3.1), it does not interpolate between them.

    Args:
        logprobs: of the scale's integers as next token, by integer.
    """
    top = max(logprobs.values())
    weights = {score: math.exp(value - top) for score, value in logprobs.items()}
    return chosen * weights[chosen] / sum(weights.values())
