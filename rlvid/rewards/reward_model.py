"""Runs a trained reward model in this process: loads a checkpoint of `rlvid reward-model`, returns scores by name."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rlvid.config import RolloutConfig
from rlvid.models.families import load_family
from rlvid.models.families.chat import ChatFamily
from rlvid.rewards.videoscore import RUBRIC_FOLDER, NoScore, Rubric, soft_score
from rlvid.types import Medium, Message, Prompt, Sample

BUDGET = 16384  # tokens of one forward
MAX_TOKENS = 1024  # of an answer


@dataclass(frozen=True)
class Scored:
    """Scores by dimension.

    A model that answers in text also has soft scores. Where its text has no scores, `reason` says why.
    """

    scores: dict[str, float] | None
    soft: dict[str, float] | None = None
    reason: str | None = None


def ask(rubric: Rubric, name: str, videos: Sequence[str], caption: str) -> Sample:
    """The prompt of a reward model with this rubric about `videos`."""
    media = tuple(map(Medium, videos))
    return Sample(name, media, (Message.about(media, rubric.question(caption)),), "")


class HeadModel:
    """A regression or Bradley-Terry model: scores from one forward.

    Raises:
        UserError: `folder` holds no reward model, or its head cannot be read.
    """

    def __init__(self, folder: Path, on_gpu: bool = False):
        from rlvid.models.loading import load_model
        from rlvid.training.packing import PackedScorer

        self.rubric = Rubric.load(folder / RUBRIC_FOLDER)
        self.family = load_family(folder)
        head = self.rubric.head
        assert head is not None
        scorer = PackedScorer(load_model(folder, "bfloat16" if on_gpu else "float32"), self.family, head)
        head.load(scorer.head, folder)
        self._scorer = scorer.eval().to("cuda" if on_gpu else "cpu")

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]] = ()) -> list[list[Scored]]:
        """One score per prompt, or with `responses` (Bradley-Terry) one per response."""
        from rlvid.training.batch import Group
        from rlvid.training.micro_batches import score

        encoded = [tuple(self.family.encode_answer(r) for r in own) for own in responses] or [()] * len(prompts)
        groups = [Group(p, p.cost, ids) for p, ids in zip(prompts, encoded, strict=True)]
        values = score(self._scorer, groups, BUDGET)
        return [[Scored(dict(zip(self.rubric.dims, row, strict=True))) for row in v.tolist()] for v in values]


class TextModel:
    """A model that generates its scores as text, greedily; also computes the soft scores of VideoScore2.

    Raises:
        UserError: `folder` holds no reward model, or vLLM cannot serve it.
    """

    def __init__(self, folder: Path, on_gpu: bool = False):
        self.rubric = Rubric.load(folder / RUBRIC_FOLDER)
        self.family = load_family(folder)
        dtype = "bfloat16" if on_gpu else "float32"
        self._answers: Callable[[Sequence[Prompt]], list[npt.NDArray[np.int32]]]
        if self.family.vllm_module is None:
            from rlvid.models.loading import load_model
            from rlvid.rollout.hf_engine import PlainEngine

            plain = PlainEngine(load_model(folder, dtype).eval().to("cuda" if on_gpu else "cpu"), self.family)
            self._first_logprobs = plain.first_logprobs
            self._answers = lambda prompts: [plain.answers([prompt], MAX_TOKENS)[0] for prompt in prompts]
            return
        from rlvid.rollout.vllm_engine import VllmEngine

        config = self.family.config
        longest = config.get("text_config", config).get("max_position_embeddings", 8192)
        cfg = RolloutConfig(max_model_len=min(16384, longest), max_tokens=MAX_TOKENS)
        engine = VllmEngine(folder, self.family, cfg, dtype, seed=0, on_gpu=on_gpu)
        self._first_logprobs = engine.first_logprobs
        self._answers = lambda prompts: engine.answers(prompts, MAX_TOKENS)

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]] = ()) -> list[list[Scored]]:
        answers = self._answers(prompts)
        return [[self._scored(p, ids.tolist())] for p, ids in zip(prompts, answers, strict=True)]

    def _scored(self, prompt: Prompt, ids: list[int]) -> Scored:
        text = self.family.decode(ids)
        try:
            scores = self.rubric.parse(text)
        except NoScore as e:
            return Scored(None, reason=str(e))
        return Scored(scores, self._soft(prompt, ids, text, scores))

    def _soft(self, prompt: Prompt, ids: list[int], text: str, scores: dict[str, float]) -> dict[str, float] | None:
        """Soft scores; None where a score is not a token of its own."""
        soft = {}
        for name, offset in self.rubric.digit_offsets(text).items():
            at, chosen = token_at(self.family, ids, offset), int(scores[name])
            before = self.family.decode([ids[at]])[:-1]  # some tokenizers keep the space: " 4"
            scale = range(self.rubric.low, self.rubric.high + 1)
            choices = {score: self.family.tokens(f"{before}{score}") for score in scale}
            if any(len(tokens) != 1 for tokens in choices.values()) or choices[chosen][0] != ids[at]:
                return None
            tokens = [first for (first,) in choices.values()]
            logprobs = self._first_logprobs(extended(prompt, ids[:at]), tokens, 1.0)
            soft[name] = soft_score(chosen, dict(zip(choices, logprobs.tolist(), strict=True)))
        return soft


def token_at(family: ChatFamily, token_ids: Sequence[int], offset: int) -> int:
    """Index of the token that writes character `offset` of the decoded text."""
    # the decoded length grows with the tokens
    return bisect_right(range(len(token_ids)), offset, key=lambda i: len(family.decode(token_ids[: i + 1])))


def extended(prompt: Prompt, token_ids: Sequence[int]) -> Prompt:
    """The prompt followed by the first tokens of a response."""
    after = prompt.next_position + np.arange(len(token_ids), dtype=np.int32)
    return replace(
        prompt,
        token_ids=np.concatenate([prompt.token_ids, np.array(token_ids, dtype=np.int32)]),
        positions=np.concatenate([prompt.positions, np.broadcast_to(after, (len(prompt.positions), len(after)))], 1),
    )


def load_reward_model(folder: Path, on_gpu: bool = False) -> HeadModel | TextModel:
    """
    Raises:
        UserError: `folder` holds no reward model.
    """
    has_head = Rubric.load(folder / RUBRIC_FOLDER).head is not None
    return (HeadModel if has_head else TextModel)(folder, on_gpu)
