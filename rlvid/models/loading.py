"""Loads a checkpoint with packed attention in place of transformers' attention."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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


LANGUAGE_MODELS = ("language_model", "text_model")
PROJECTORS = ("merger", "connector", "projector", "image_newline")  # in the names of their parameters


def load_model(folder: Path, dtype: str, shares: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Load the policy network with packed attention, in training precision, on the CPU.

    Args:
        shares: DeepSpeed's settings under ZeRO-3: every rank loads its share of the weights. All ranks load together.

    Raises:
        UserError: weights are missing, or packed attention does not support a setting of the model.
    """
    torchvision_ops.ensure()
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        family = load_family(folder)
        if shares and family.is_recurrent:  # its layers read weights of modules that they do not call
            raise UserError(f"train.zero_stage 3 does not support {family.architecture}: set it to 2")
        family.register()
        kind = AutoModelForImageTextToText if family.placeholders else AutoModelForCausalLM
        if shares:
            model, missing = _load_shares(kind, folder, getattr(torch, dtype), shares)
        else:
            model, loaded = kind.from_pretrained(
                folder, dtype=getattr(torch, dtype), attn_implementation="sdpa", output_loading_info=True
            )
            missing = sorted(loaded["missing_keys"])
    except OSError as e:
        raise UserError(f"model.path: cannot load {folder}: {e}") from e
    if missing:  # transformers would use random numbers instead
        raise UserError(f"model.path: {folder} lacks {len(missing)} weights, for example {missing[0]}")
    text_config = model.config.get_text_config()
    if "sliding_attention" in (getattr(text_config, "layer_types", None) or ()):
        raise UserError(
            f"{folder / 'config.json'}: sliding-window layers are not supported; set use_sliding_window to false"
        )
    use_packed_attention(model, family)
    return model


def use_packed_attention(model: PreTrainedModel, family: ChatFamily) -> None:
    """Replace transformers' attention, and what else the family replaces."""
    from transformers import AttentionInterface

    AttentionInterface.register(TEXT_ATTENTION, shared_prefix_attention)
    AttentionInterface.register(VISION_ATTENTION, block_attention)
    model.config.get_text_config()._attn_implementation = TEXT_ATTENTION
    family.prepare(model)


def _load_shares(
    kind: Any, folder: Path, dtype: torch.dtype, settings: Mapping[str, Any]
) -> tuple[PreTrainedModel, list[str]]:
    """A model of which this rank has its share, and the names of the weights that are missing.

    transformers' own way under ZeRO-3 has each weight whole on every rank, from rank 0, for a moment: 2.3 times the
    bytes of a model of 200 million parameters on two ranks. Here the files are mapped into memory, and only a rank's
    share of each weight is read from them.
    """
    import deepspeed
    from accelerate import init_empty_weights
    from safetensors import safe_open
    from transformers import AutoConfig
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.integrations.deepspeed import _apply_weight_conversions_to_state_dict

    class Shares(deepspeed.zero.Init):
        def _zero_init_param(self, param: Tensor) -> None:
            """Without DeepSpeed's broadcast: every rank reads the same files."""
            param.data = param.data.to(dtype)
            self._convert_to_deepspeed_param(param)
            param.partition()  # type: ignore[attr-defined]  # by the line above

    deepspeed.init_distributed(auto_mpi_discovery=False)  # takes the process group that is there
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(AutoConfig.from_pretrained(folder), dtype=dtype, attn_implementation="sdpa")
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            state |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    model._weight_conversions = get_model_conversion_mapping(model)  # exporting reverts them
    renamed = _apply_weight_conversions_to_state_dict(model, state, model._weight_conversions)
    model.load_state_dict(renamed, strict=False, assign=True)
    model.tie_weights()
    missing = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)
    if not missing:
        Shares(module=model, config_dict_or_path=dict(settings), dtype=dtype)
    return model.eval(), missing


def part_of(name: str, family: ChatFamily) -> Literal["tower", "projector", "text"]:
    """The part of the network that a parameter belongs to. A projector is inside the tower in Qwen-VL (`merger`), and
    outside elsewhere."""
    modules = set(name.split("."))
    if modules & set(LANGUAGE_MODELS) or not modules & set(family.no_lora):
        return "text"
    return "projector" if any(word in name for word in PROJECTORS) else "tower"


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
