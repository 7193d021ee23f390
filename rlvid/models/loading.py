"""Loading a checkpoint's weights, with our attention in place of transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rlvid.errors import UserError
from rlvid.models import torchvision_ops

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(folder: Path, dtype: str) -> PreTrainedModel:
    """The policy network with packed attention, in training precision, on the CPU.

    Raises:
        UserError: missing weights or a setting that packed attention cannot follow.
    """
    torchvision_ops.ensure()
    from transformers import AttentionInterface, AutoModelForImageTextToText

    from rlvid.models.attention import TEXT_ATTENTION, VISION_ATTENTION, block_attention, shared_prefix_attention

    try:
        model, loaded = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa", output_loading_info=True
        )
    except OSError as e:
        raise UserError(f"model.path: cannot load {folder}: {e}") from e
    if missing := sorted(loaded["missing_keys"]):  # transformers would go on with random numbers in their place
        raise UserError(f"model.path: {folder} lacks {len(missing)} weights, for example {missing[0]}")
    if "sliding_attention" in (model.config.text_config.layer_types or ()):
        raise UserError(
            f"{folder / 'config.json'}: sliding-window layers are not supported; set use_sliding_window to false"
        )
    AttentionInterface.register(TEXT_ATTENTION, shared_prefix_attention)
    AttentionInterface.register(VISION_ATTENTION, block_attention)
    model.model.language_model.config._attn_implementation = TEXT_ATTENTION
    model.model.visual.config._attn_implementation = VISION_ATTENTION
    return model
