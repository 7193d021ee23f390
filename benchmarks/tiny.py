"""A tiny model and video prompts of a given length, for benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rlvid.config import TinyModelConfig
from rlvid.models.families import load_family
from rlvid.models.families.qwen_vl import QwenVL
from rlvid.models.tiny import make_tiny
from rlvid.types import Clip, Medium, Message, Prompt, Sample

TEXTS = [
    "What colour is the shape, and which way does it move? Answer with one word.",
    "red green blue yellow circle square triangle left right up down one two three",
]
QUESTION = "What colour is the shape?"


def frames_of(n_tokens: int, seed: int) -> np.ndarray:
    """Random frames [T, H, W, 3] uint8, about square, that become about `n_tokens` video tokens."""
    temporal = 2 if n_tokens < 200 else 4 if n_tokens < 600 else 8
    height = max(1, round((n_tokens / temporal) ** 0.5))
    width = max(1, round(n_tokens / temporal / height))
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (2 * temporal, 28 * height, 28 * width, 3), dtype=np.uint8)


def video_sample(index: int) -> Sample:
    media = (Medium(f"clip-{index}.mp4"),)
    return Sample(id=f"clip-{index}", media=media, messages=(Message.about(media, QUESTION),), answer="red")


def video_prompt(family: QwenVL, n_tokens: int, index: int = 0) -> Prompt:
    """Prompt of about `n_tokens` tokens, nearly all of them video, with a different clip for each index."""
    text = family.encode(Sample("text", (), (Message("user", (QUESTION,)),), ""), ()).length
    frames = frames_of(n_tokens - text - 2, seed=index)
    clip = Clip(
        clip_id=f"clip-{n_tokens}-{index}",
        frames=frames,
        pts_s=np.arange(len(frames)) / 8.0,
        indices=np.arange(len(frames)),
        n_frames=len(frames),
        fps=8.0,
        reader="random",
        content_sha256="",
    )
    return family.encode(video_sample(index), [clip])


def tiny_model(folder: Path, **settings: Any) -> Path:
    """A random Qwen2-VL of about a million parameters in `folder`; `settings` are keys of `model.tiny`."""
    make_tiny(folder, TinyModelConfig(**settings), TEXTS, seed=0)
    return folder


def family_of(folder: Path) -> QwenVL:
    """The family of a model that `tiny_model` made."""
    family = load_family(folder)
    assert isinstance(family, QwenVL)
    return family
