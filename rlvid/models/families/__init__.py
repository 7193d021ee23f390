"""Model families, one file each. This module imports neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path

from rlvid.errors import UserError
from rlvid.models.families.chat import ChatFamily, read_json
from rlvid.models.families.cobra import Cobra
from rlvid.models.families.frames import Idefics2, VideoLlava
from rlvid.models.families.internvl import InternVl
from rlvid.models.families.llava_next_video import LlavaNextVideo
from rlvid.models.families.llava_onevision import LlavaOnevision
from rlvid.models.families.qwen_vl import Qwen3VL, Qwen25VL, QwenVL
from rlvid.models.families.smolvlm import SmolVlm
from rlvid.models.families.text import TextModel
from rlvid.models.families.video_llama3 import VideoLlama3

FAMILIES: dict[str, type[ChatFamily]] = {
    "qwen2_vl": QwenVL,
    "qwen2_5_vl": Qwen25VL,
    "qwen3_vl": Qwen3VL,
    "idefics2": Idefics2,
    "video_llava": VideoLlava,
    "llava_onevision": LlavaOnevision,
    "llava_next_video": LlavaNextVideo,
    "internvl": InternVl,
    "smolvlm": SmolVlm,
    "video_llama_3": VideoLlama3,
    "cobra": Cobra,
    "qwen2": TextModel,
    "qwen3": TextModel,
    "llama": TextModel,
}


def load_family(folder: Path) -> ChatFamily:
    """Return the family object of the checkpoint in `folder`.

    Raises:
        UserError: `folder` is no checkpoint, or its family is not supported.
    """
    config = folder / "config.json"
    model_type = read_json(config).get("model_type")
    if model_type not in FAMILIES:
        raise UserError(f"{config}: model_type {model_type!r} is not supported; known: {', '.join(FAMILIES)}")
    return FAMILIES[model_type](folder)
