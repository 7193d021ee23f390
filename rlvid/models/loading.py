"""Loading a checkpoint's weights, with our attention in place of transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    """The policy network with packed attention, in training precision, on the CPU.

    Raises:
        UserError: missing weights or a setting that packed attention cannot follow.
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
    if missing := sorted(loaded["missing_keys"]):  # transformers would go on with random numbers in their place
        raise UserError(f"model.path: {folder} lacks {len(missing)} weights, for example {missing[0]}")
    text_config = model.config.get_text_config()
    if "sliding_attention" in (getattr(text_config, "layer_types", None) or ()):
        raise UserError(
            f"{folder / 'config.json'}: sliding-window layers are not supported; set use_sliding_window to false"
        )
    AttentionInterface.register(TEXT_ATTENTION, _text_attention)
    AttentionInterface.register(VISION_ATTENTION, block_attention)
    text_config._attn_implementation = TEXT_ATTENTION
    family.prepare(model)
    return model


def freeze_towers(network: nn.Module, family: ChatFamily) -> None:
    """Train nothing of the vision towers but their projection (Qwen-VL's `merger`, elsewhere a module of its own)."""
    for tower in family.towers:
        for name, parameter in network.get_submodule(f"model.{tower}").named_parameters():
            if "merger" not in name:
                parameter.requires_grad_(False)


class PatchProjection(nn.Module):
    """A convolution whose stride is its kernel is one matrix product, under the same parameter names.

    torch's Conv3d took a fifth of forward and backward of a 1,000-token prompt on CPU, for the same numbers.
    """

    def __init__(self, conv: nn.Conv3d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, patches: Tensor) -> Tensor:
        """patches [n, C, T, H, W] -> [n, D]."""
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def _text_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Takes the row's layout from the forward's own argument `shared_prefix`.

    As attention mask it would not arrive: Qwen3-VL and Llama make masks of their own from what they are given.
    """
    layout = kwargs.pop("shared_prefix")
    return shared_prefix_attention(module, query, key, value, layout, **kwargs)
