"""How a prompt is to be answered, the same for every engine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from rlvid.models.families.chat import ChatFamily
from rlvid.models.families.views import View, seen_as
from rlvid.models.families.vision import VisionFamily
from rlvid.types import Prompt


@dataclass(frozen=True)
class Refused:
    """In place of the answers to a prompt that an engine does not take."""

    reason: str


@dataclass(frozen=True)
class Sampling:
    """How to answer a prompt. `temperature` 0 is greedy.

    With a `seed` the answers are a function of seed and `Prompt.sample_id`, whatever else is in the batch, up to the
    rounding of the logits. Without one they depend on the engine's seed and everything it has sampled before.

    `view`: how the videos of the prompt are shown, if not as they are.
    """

    n: int
    temperature: float
    max_tokens: int
    top_p: float = 1.0
    seed: int | str | None = None
    view: View | None = None

    def request_seed(self, sample_id: str) -> int | None:
        """The seed of one prompt; its n responses have this seed and the next n - 1."""
        if self.seed is None:
            return None
        digest = hashlib.sha256(f"{self.seed} {sample_id}".encode()).digest()
        return int.from_bytes(digest[:7], "big")


def shown(prompt: Prompt, family: ChatFamily, sampling: Sampling) -> Prompt:
    """The prompt as the engine answers it."""
    if sampling.view and isinstance(family, VisionFamily):
        return seen_as(prompt, sampling.view, family.temporal_patch)
    return prompt
