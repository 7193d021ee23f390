"""Loads a checkpoint with packed attention in place of transformers' attention."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlvid.errors import UserError
from rlvid.models import torchvision_ops
from rlvid.models.attention import TEXT_ATTENTION, VISION_ATTENTION, block_attention, shared_prefix_attention
from rlvid.models.families import load_family
from rlvid.models.families.chat import ChatFamily

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(folder: Path, dtype: str) -> PreTrainedModel:
    """Load the policy network with packed attention, in training precision, on the CPU.

    Raises:
        UserError: weights are missing, or packed attention does not support a setting of the model.
    """
    torchvision_ops.ensure()
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        family = load_family(folder)
        kind = AutoModelForImageTextToText if family.media_kinds else AutoModelForCausalLM
        model, loaded = kind.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa", output_loading_info=True
        )
    except OSError as e:
        raise UserError(f"model.path: cannot load {folder}: {e}") from e
    if missing := sorted(loaded["missing_keys"]):  # transformers would use random numbers instead
        raise UserError(f"model.path: {folder} lacks {len(missing)} weights, for example {missing[0]}")
    text_config = model.config.get_text_config()
    if "sliding_attention" in (getattr(text_config, "layer_types", None) or ()):
        raise UserError(
            f"{folder / 'config.json'}: sliding-window layers are not supported; set use_sliding_window to false"
        )
    AttentionInterface.register(TEXT_ATTENTION, shared_prefix_attention)
    AttentionInterface.register(VISION_ATTENTION, block_attention)
    text_config._attn_implementation = TEXT_ATTENTION
    family.prepare(model)
    return model


def freeze_towers(network: nn.Module, family: ChatFamily) -> None:
    """Freeze the vision towers, except for their projection (`merger` in Qwen-VL, outside the tower elsewhere)."""
    for tower in family.towers:
        for name, parameter in network.get_submodule(f"model.{tower}").named_parameters():
            if "merger" not in name:
                parameter.requires_grad_(False)


class PatchProjection(nn.Module):
    """A convolution whose stride equals its kernel, computed as one matrix product. Parameter names stay the same.

    On CPU, torch's Conv3d took a fifth of forward and backward of a 1,000-token prompt, with the same result.
    """

    def __init__(self, conv: nn.Conv3d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, patches: Tensor) -> Tensor:
        """patches [n, C, T, H, W] -> [n, D]."""
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
