"""Prompts for tests: clips of random noise, or frames given by the caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rlvid.models.families.chat import ChatFamily
from rlvid.training.batch import Group
from rlvid.types import Clip, Medium, MediumRef, Message, Prompt, Sample

VISION_FAMILIES = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video", "internvl", "smolvlm"),
    *("video_llama_3", "idefics2", "video_llava", "cobra"),
)
FAMILIES = (*VISION_FAMILIES, "qwen2", "qwen3")
SHARING = tuple(family for family in FAMILIES if family != "cobra")  # whose responses share a prompt's forward
# Of those, one for each way through the network: the others run under ZeRO-3 in the slow tests.
CORE = ("qwen2_vl", "qwen3_vl", "llava_onevision", "idefics2", "qwen2")


def noise(t: int, h: int, w: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """[t, h, w, 3] uint8."""
    return np.random.default_rng(seed).integers(0, 256, size=(t, h, w, 3), dtype=np.uint8)


def clip_of(frames: npt.NDArray[np.uint8], clip_id: str) -> Clip:
    n = len(frames)
    return Clip(clip_id, frames, np.arange(n) / 8.0, np.arange(n), n, 8.0, "test", "0" * 64)


def of_processor(family: ChatFamily, clip: Clip) -> tuple[str, Any]:
    """The question of `sample_of` about a clip as transformers' template writes it, and what its processor makes."""
    import torch
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(family.folder)
    turns = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which shape is moving?"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    video = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)
    return text, processor(text=text, videos=[video], do_resize=False, do_sample_frames=False, return_tensors="pt")


def sample_with(kinds: Sequence[Literal["video", "image"]], sample_id: str = "s") -> Sample:
    """A sample with media of these kinds, each followed by some text."""
    media = tuple(Medium(f"/media/{i}", kind) for i, kind in enumerate(kinds))
    content = [part for i, kind in enumerate(kinds) for part in (MediumRef(i), f"The {kind} {i}. ")]
    return Sample(sample_id, media, (Message("user", (*content, "Which shape is moving?")),), "square")


def sample_of(n_videos: int = 1, question: str = "Which shape is moving?", sample_id: str = "s") -> Sample:
    media = tuple(Medium(f"/clips/{i}.mp4") for i in range(n_videos))
    return Sample(sample_id, media, (Message.about(media, question),), "square")


def prompt_of(
    family: ChatFamily, *shapes: tuple[int, int, int], seed: int = 0, question: str = "Which shape is moving?"
) -> Prompt:
    """A prompt with one noise clip (t, h, w) per shape."""
    clips = [clip_of(noise(*shape, seed=seed + i), f"{shape}-{seed + i}") for i, shape in enumerate(shapes)]
    return family.encode(sample_of(len(shapes), question), clips)


def mixed_prompt(family: ChatFamily, seed: int = 0) -> Prompt:
    """A prompt with an image, a video, and another image."""
    side = family.frame_multiple
    shapes = (1, 2 * side, side), (6, side, 2 * side), (1, side, side)
    clips = [clip_of(noise(*shape, seed=seed + i), f"mixed-{shape}-{seed + i}") for i, shape in enumerate(shapes)]
    return family.encode(sample_with(("image", "video", "image"), "mixed"), clips)


def group_of(
    prompt: Prompt,
    *responses: npt.NDArray[np.int32],
    temperature: float | None = None,
    **tokens: npt.NDArray[np.float32],
) -> Group[Prompt]:
    """Responses to a prompt with arrays per token."""
    return Group(prompt, prompt.cost, responses, tokens, temperature=temperature)
