"""What all families with videos have in common: patches, and a prompt of text with runs of placeholders.

An image is a video of one frame. This module imports neither torch nor transformers: decoding workers stay small.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rlvid.errors import UserError
from rlvid.models.families.chat import ChatFamily, read_json
from rlvid.types import Clip, MediumRef, Prompt, Sample, Span

if TYPE_CHECKING:
    from torch import Tensor

Grid = tuple[int, int, int]  # patches along time, height and width


class VisionFamily(ChatFamily):
    """A family with a vision tower.

    Raises:
        UserError: the folder lacks a file that the family needs.
    """

    vision_tokens: tuple[str, ...]  # must not be sampled: no clip belongs to them
    no_lora: tuple[str, ...] = (
        "visual",
        "vision_model",
        "connector",
        "video_tower",
        "image_tower",
        "multi_modal_projector",
    )
    media_token: str | None = None  # one token in prompts for all kinds of media; None: those of `placeholders`
    part_types: Mapping[str, str] = {"video": "video", "image": "image"}  # by kind: its type in the chat template
    default_patch_size = 14  # transformers' default, for config.json files without it
    merge_size = 1  # squares of merge_size x merge_size patches become one token
    temporal_patch = 1  # number of frames in a patch

    def __init__(self, folder: Path):
        super().__init__(folder)
        names = ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json")
        processor = read_json(*(folder / name for name in names))
        processor = processor.get("video_processor") or processor.get("image_processor") or processor
        try:
            self.vision: dict[str, Any] = self.config["vision_config"]
            self.patch_size = side_of(self.vision.get("patch_size", self.default_patch_size))
            self.pixel_mean: list[float] = processor["image_mean"]
            self.pixel_std: list[float] = processor["image_std"]
        except (KeyError, TypeError, AttributeError) as e:
            raise UserError(
                f"{folder}: config.json or the processor's configuration lacks {e}; expected a checkpoint of "
                f"{self.config.get('model_type')}"
            ) from e
        self.media_tokens = {k: self.special(self.media_token or token) for k, token in self.placeholders.items()}
        self.video_token = self.media_tokens["video"]
        ids = (self.tokenizer.token_to_id(token) for token in self.vision_tokens)
        self.banned_tokens = tuple(i for i in ids if i is not None)

    def encode(self, sample: Sample, clips: Sequence[Clip], max_tokens: int | None = None) -> Prompt:
        self.check_media(sample)
        seen = [part.index for m in sample.messages for part in m.content if isinstance(part, MediumRef)]
        if seen != list(range(len(clips))):
            raise UserError(
                f"sample {sample.id!r}: its messages use the media {seen}, but it has {len(clips)}; use each "
                f"of them once and in order"
            )
        grids, patches = zip(*(self.patchify(clip.frames) for clip in clips), strict=True) if clips else ((), ())
        token_ids = np.array(self.tokenize(sample, clips, grids), dtype=np.int32)
        is_medium = np.isin(token_ids, list(self.media_tokens.values()))
        self.check_length(sample, len(token_ids), int(is_medium.sum()), max_tokens)
        prompt = Prompt(
            sample_id=sample.id,
            token_ids=token_ids,
            patches=np.concatenate(patches) if patches else np.zeros((0, self.patch_dim), dtype=np.uint8),
            grid_thw=np.array(grids, dtype=np.int64).reshape(-1, 3),
            spans=_runs(is_medium),
            positions=np.arange(len(token_ids), dtype=np.int32)[None],
            clip_ids=tuple(clip.clip_id for clip in clips),
            answered=self.answered(sample, token_ids, lambda shorter: self.tokenize(shorter, clips, grids)),
            seconds_per_patch=tuple(map(self.seconds_per_patch, clips)),
        )
        return replace(prompt, positions=self.positions(prompt))

    def tokenize(self, sample: Sample, clips: Sequence[Clip], grids: Sequence[Grid]) -> list[int]:
        """Token ids of the rendered conversation, in which the placeholders of each clip replace the template's one.

        The conversation may end before the last clips.
        """
        n_used = sum(isinstance(part, MediumRef) for message in sample.messages for part in message.content)
        kinds = [medium.kind for medium in sample.media[:n_used]]
        turns = []
        for message in sample.messages:
            parts = [
                {"type": "text", "text": self.escape(x)}
                if isinstance(x, str)
                else {"type": self.part_types[kinds[x.index]]}
                for x in message.content
            ]
            turns.append({"role": message.role, "content": parts})
        tokens = "|".join(map(re.escape, self.placeholders.values()))
        first, *others = re.split(f"({tokens})", self.render(turns))  # token, text, token, text
        if others[::2] != [self.placeholders[kind] for kind in kinds]:
            raise UserError(
                f"{self.folder}: the chat template made the placeholders {others[::2]} for sample {sample.id!r}, whose "
                f"media are {kinds}"
            )
        text = "".join(
            self.expand(clip, grid, kind) + rest
            for clip, grid, kind, rest in zip(clips, grids, kinds, others[1::2], strict=False)
        )
        # With the special tokens that the tokenizer adds: Mistral's and Llama's texts begin with <s>.
        return list(self.tokenizer.encode(self.finish(first + text)).ids)

    @abstractmethod
    def expand(self, clip: Clip, grid: Grid, kind: str) -> str:
        """The text that replaces a medium's placeholder in the rendered conversation."""

    def finish(self, text: str) -> str:
        """The expanded text as the family's processor changes it."""
        return text

    @abstractmethod
    def n_embeddings(self, grid: Grid) -> int:
        """Number of placeholders of a clip, which is the number of embeddings of the tower."""

    def n_runs(self, t: int) -> int:
        """Runs of placeholders of a medium with t temporal patches."""
        return 1

    def tower_passes(self, grids: Sequence[Grid]) -> int:
        """Number of pieces in which the tower runs over clips of these grids (rlvid/models/tower.py)."""
        from rlvid.models.tower import PATCHES_AT_A_TIME, cut_grids

        return len(cut_grids(grids, PATCHES_AT_A_TIME))

    @property
    def smallest_grid(self) -> Grid:
        """Grid of the smallest clip that the tower accepts."""
        side = self.frame_multiple // self.patch_size
        return (1, side, side)

    def as_videos(self, token_ids: Tensor) -> Tensor:
        """Token ids for the network, in which the placeholders of images are those of videos.

        So one pass of the tower computes all media in their order, and all embeddings go to the places of one token.
        An image's embeddings, and its positions, which are given, are those of a video of one temporal patch.
        """
        for token in self.media_tokens.values():
            token_ids = token_ids.masked_fill(token_ids == token, self.video_token)
        return token_ids

    @abstractmethod
    def network_inputs(self, patches: Tensor, grid_thw: Tensor) -> dict[str, Tensor]:
        """Arguments of the network's forward, from normalised patches [n, patch_dim] and grids [V, 3]."""

    def positions(self, prompt: Prompt) -> npt.NDArray[np.int32]:
        """Rotary positions [3, P] of a prompt; [1, P], which it has already, for families with one axis."""
        return prompt.positions

    def seconds_per_patch(self, clip: Clip) -> float:
        """Seconds between one temporal patch and the next.

        transformers' processors divide the duration of the whole file by the number of frames
        (`VideoMetadata.sampled_fps`), even if sampling stops early. Here it is the duration of the sampled part.
        """
        step = (clip.indices[-1] - clip.indices[0]) / max(1, len(clip.indices) - 1)  # frames of the file
        reaches_end = clip.indices[-1] + step >= clip.n_frames - 1
        covered = clip.n_frames if reaches_end else int(clip.indices[-1]) + 1
        return float(self.temporal_patch / (len(clip.indices) / covered * clip.fps))

    @property
    def patch_dim(self) -> int:
        return 3 * self.temporal_patch * self.patch_size**2

    def patchify(self, frames: npt.NDArray[np.uint8]) -> tuple[Grid, npt.NDArray[np.uint8]]:
        """Cut frames [T, H, W, 3] into a grid (t, h, w) of patches [t*h*w, 3 * temporal_patch * patch * patch].

        The patches of a merge block are adjacent. If T is no multiple of `temporal_patch`, the last frame is repeated,
        as in transformers' Qwen2VLVideoProcessor.
        """
        p, m, s = self.patch_size, self.merge_size, self.temporal_patch
        if missing := -len(frames) % s:
            frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
        n, height, width, _ = frames.shape
        t, h, w = n // s, height // p, width // p
        blocks = frames.reshape(t, s, h // m, m, p, w // m, m, p, 3)
        return (t, h, w), blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, self.patch_dim)


def side_of(size: int | Sequence[int]) -> int:
    """The side of a square. Some configurations give it as [height, width]."""
    return size if isinstance(size, int) else size[0]


def _runs(is_medium: npt.NDArray[np.bool_]) -> tuple[Span, ...]:
    """Spans of consecutive True values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_medium.astype(np.int8), [0]])))
    return tuple(Span(int(begin), int(end - begin)) for begin, end in edges.reshape(-1, 2))


def rotary_positions(
    n_tokens: int, spans: Sequence[Span], grid_thw: npt.NDArray[np.int64], merge_size: int, steps: Sequence[float] = ()
) -> npt.NDArray[np.int32]:
    """Return the positions [3, n_tokens] of a prompt as vLLM and transformers 4 count them.

    Text after a video continues at the largest position so far + 1. transformers 5.19 continues at max(height, width)
    of the video instead and ignores its time axis; the two differ if merged T > max(H, W).

    Args:
        spans: runs of placeholders, in the order of the prompt.
        grid_thw: [len(spans), 3] patches of each run.
        steps: [len(spans)] positions between one temporal patch and the next; their product with the patch's
            index is rounded down. Default 1.
    """
    positions = np.empty((3, n_tokens), dtype=np.int32)
    done, following = 0, 0
    for span, (t, h, w), step in zip(spans, grid_thw, steps or [1.0] * len(spans), strict=True):
        positions[:, done : span.offset] = following + np.arange(span.offset - done)
        following += span.offset - done
        axes = np.indices((t, h // merge_size, w // merge_size)).reshape(3, -1)
        if axes.shape[1] != span.length:
            raise ValueError(f"placeholder run of {span.length} tokens for a grid of {axes.shape[1]}")
        axes[0] = (axes[0] * step).astype(np.int64)
        done = span.offset + span.length
        positions[:, span.offset : done] = following + axes
        following += int(axes.max()) + 1
    positions[:, done:] = following + np.arange(n_tokens - done)
    return positions
