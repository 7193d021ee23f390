"""The data types that are passed between packages.

All are frozen and picklable. Arrays are numpy, so that Ray's object store returns read-only views without a copy. The
types of a manifest have slots, because there are hundreds of thousands of them. The order of types is Sample -> Clip
-> Prompt -> Rollout -> Reward (docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Medium:
    """A video, a part of one, or an image, and how it is read where that differs from the run's `video` keys.

    A video may be given as pictures, its frames: then `path` is the first of them.
    """

    path: str  # absolute
    kind: Literal["video", "image"] = "video"
    start_s: float | None = None  # seconds from the first frame of the file; None: from the start
    end_s: float | None = None  # None: to the end
    fps: float | None = None  # frames sampled a second
    max_pixels: int | None = None  # of a frame, height * width
    pictures: tuple[str, ...] = ()  # absolute
    pictures_per_s: float = 0.0

    @property
    def files(self) -> tuple[str, ...]:
        return self.pictures or (self.path,)

    @property
    def name(self) -> str:
        """The path and, if it is a part of a video, which part: for messages to the user."""
        name = f"{self.path} and {len(self.pictures) - 1} more pictures" if len(self.pictures) > 1 else self.path
        if self.start_s is None and self.end_s is None:
            return name
        end = "the end" if self.end_s is None else f"{self.end_s:g} s"
        return f"{name} ({self.start_s or 0:g} s to {end})"


@dataclass(frozen=True, slots=True)
class MediumRef:
    """The place of `Sample.media[index]` in a message."""

    index: int


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn. `content` keeps the order of text and media."""

    role: str  # "system" | "user" | "assistant"
    content: tuple[str | MediumRef, ...]
    is_marked: bool = False  # an assistant's turn that is trained with sft.loss=marked

    @property
    def text(self) -> str:
        return "".join(part for part in self.content if isinstance(part, str))

    @classmethod
    def about(cls, media: Sequence[Medium], text: str) -> Message:
        """A user turn with all media of a sample, then `text`."""
        return cls("user", (*(MediumRef(i) for i in range(len(media))), text))


@dataclass(frozen=True, slots=True)
class Sample:
    """One manifest row: media, a conversation about them, and the right answer."""

    id: str
    media: tuple[Medium, ...]
    messages: tuple[Message, ...]  # ends with the turn that the policy has to answer
    answer: str
    choices: tuple[str, ...] | None = None
    problem_type: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # further manifest fields, for custom rewards
    weight: float = 1.0  # how often it is drawn in an epoch of training, on average

    @property
    def has_video(self) -> bool:
        return any(medium.kind == "video" for medium in self.media)

    @property
    def question(self) -> str:
        """Text of the last user turn."""
        return next((m.text for m in reversed(self.messages) if m.role == "user"), "")


@dataclass(frozen=True)
class Clip:
    """The sampled frames of one video at model resolution: decoded once, used by every consumer of a run.

    `clip_id` is the sha256 of content hash, sampling rule, size rule, reader and reader version: two clips with the
    same id hold the same bytes.
    """

    clip_id: str
    frames: npt.NDArray[np.uint8]  # [T, H, W, 3] RGB; H and W are multiples of the family's patch * merge
    pts_s: npt.NDArray[np.float64]  # [T] presentation time of each frame, seconds from the first frame of the file
    indices: npt.NDArray[np.int64]  # [T] index of each frame in presentation order
    n_frames: int  # frames in the file
    fps: float  # average frame rate of the file
    reader: str  # name and version, for example "pyav 18.1.0"
    content_sha256: str


@dataclass(frozen=True)
class Span:
    """Half-open run of placeholder tokens `token_ids[offset : offset + length]`."""

    offset: int
    length: int


@dataclass(frozen=True)
class Prompt:
    """A sample ready for every model of a run. Made by a family's `encode()` only; never truncated.

    Patches are not normalised: the engine and the trainer normalise on their own device, which costs a quarter of the
    bytes of float32 patches and gives equal numbers.
    """

    sample_id: str
    token_ids: npt.NDArray[np.int32]  # [P]
    positions: npt.NDArray[np.int32]  # [3, P] rotary positions (time, height, width); [1, P] without vision
    # [N, C * temporal_patch * patch * patch], all videos one after another
    patches: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.uint8))
    # [V, 3] patches along time, height and width (before merging)
    grid_thw: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 3), dtype=np.int64))
    spans: tuple[Span, ...] = ()  # placeholder runs in order: one a video, or one a temporal patch (Qwen3-VL)
    clip_ids: tuple[str, ...] = ()  # V
    # The assistant's turns, each with its end-of-turn token; None: the chat template does not repeat them as they were
    answered: tuple[Span | None, ...] = ()
    seconds_per_patch: tuple[float, ...] = ()  # V seconds from one temporal patch to the next

    @property
    def length(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def cost(self) -> int:
        """Tokens of its forward: those of the text model and the patches of the vision tower."""
        return self.length + int(self.patches.shape[0])

    @property
    def next_position(self) -> int:
        """Rotary position of the first response token, equal on all axes."""
        return int(self.positions.max()) + 1


@dataclass(frozen=True)
class Encoded:
    """A sample and its prompt, which on the driver is a reference into Ray's object store."""

    sample: Sample
    prompt: Any  # Prompt, or the reference
    n_tokens: int
    cost: int  # Prompt.cost
    clip_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class WeightSpan:
    """Tokens `[start, end)` of a rollout were sampled by weights `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class Rollout:
    """One sampled response. `logprobs` are those of the sampling distribution (temperature and bans applied)."""

    sample_id: str
    token_ids: npt.NDArray[np.int32]  # [R], ends with the end-of-turn token when finish_reason is "stop"
    logprobs: npt.NDArray[np.float32]  # [R]
    text: str  # decoded without special tokens
    finish_reason: str  # "stop" | "length"
    versions: tuple[WeightSpan, ...]


@dataclass(frozen=True)
class Reward:
    """Named reward parts and their weighted sum, or why there is no reward.

    An invalid reward (a judge that failed, a time-out) is left out of the group's mean and std; it is never 0.
    """

    parts: Mapping[str, float]
    total: float
    invalid_reason: str | None = None
    accuracy: float | None = None  # of the answer, from 0 to 1; None where no part measures it

    @property
    def is_valid(self) -> bool:
        return self.invalid_reason is None

    @property
    def is_right(self) -> bool | None:
        """Whether the answer is right; None where no part measures accuracy."""
        return None if self.accuracy is None else self.accuracy == 1.0

    @classmethod
    def invalid(cls, reason: str) -> Reward:
        return cls(parts={}, total=float("nan"), invalid_reason=reason)


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt, the first preferred. `meta` says by whom and how: judge, iteration and so on."""

    sample: Sample
    chosen: str
    rejected: str
    meta: Mapping[str, Any] = field(default_factory=dict)
