"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on the language model's linear layers, by peft.

The adapters are injected into the network, which keeps its class and its forward. An adapter file has peft's format, so
`PeftModel.from_pretrained` and vLLM's `LoRARequest` can load it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from rlvid.config import LoraConfig
from rlvid.errors import UserError

ADAPTER = "default"  # peft's default name
PEFT_PREFIX = "base_model.model."  # before every name in peft's adapter files


def peft_config(cfg: LoraConfig, excluded: Sequence[str]):  # type: ignore[no-untyped-def]  # peft is imported late
    """Return peft's configuration. Modules within those named in `excluded` get no adapters (`ChatFamily.no_lora`)."""
    from peft import LoraConfig as PeftConfig

    targets = _targets(cfg, excluded)
    return PeftConfig(r=cfg.rank, lora_alpha=cfg.alpha, target_modules=targets, lora_dropout=0.0, bias="none")


def _targets(cfg: LoraConfig, excluded: Sequence[str]) -> str:
    """Pattern of the names of the layers that get adapters."""
    not_excluded = rf"(?!.*\b(?:{'|'.join(excluded)})\b)" if excluded else ""
    return rf"{not_excluded}.*\.(?:{'|'.join(cfg.targets)})"


def add_adapters(network: nn.Module, cfg: LoraConfig, excluded: Sequence[str]) -> None:
    """Freeze the network and add an adapter to each target layer. New adapters do not change its output (B is 0).

    The random A is the same on all ranks of a trainer.

    Raises:
        UserError: no layer has any of the target names, or bitsandbytes, which quantizes them, is not installed.
    """
    from peft import inject_adapter_in_model

    if cfg.quantize:
        _quantize(network, cfg.quantize, _targets(cfg, excluded))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            inject_adapter_in_model(peft_config(cfg, excluded), network, adapter_name=ADAPTER)
        except ValueError as e:
            raise UserError(f"model.lora.targets={list(cfg.targets)}: {e}") from e
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def _quantize(network: nn.Module, kind: str, targets: str) -> None:
    """Keep the weights of the layers that get adapters in 4 bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), in
    the layers of bitsandbytes, which compute in the network's own number format."""
    if find_spec("bitsandbytes") is None:
        raise UserError(f"model.lora.quantize={kind} needs bitsandbytes: install it (uv pip install bitsandbytes)")
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in list(network.named_modules()):
        if not (isinstance(layer, nn.Linear) and re.fullmatch(targets, name)):
            continue
        small = Linear4bit(layer.in_features, layer.out_features, compute_dtype=layer.weight.dtype, device="meta")
        small.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type=kind)
        small.bias = layer.bias
        network.set_submodule(name, small.to("cpu"))  # quantized by it
    network.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft asks for it


def dequantized(weight: Tensor) -> Tensor:
    """The weight as a matrix, where it is kept in 4 bits."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    whole: Tensor = dequantize_4bit(weight.data, state)
    return whole


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def file_name(name: str) -> str:
    """The name in an adapter file of a parameter of the network."""
    return PEFT_PREFIX + name.replace(f".{ADAPTER}.", ".")


def plain_name(name: str) -> str:
    """The name that a parameter has in the network without adapters."""
    return name.replace(".base_layer.", ".")


def merged(name: str, weight: Tensor, adapters: Mapping[str, Tensor], cfg: LoraConfig) -> Tensor:
    """A weight of the network, with its adapter merged in if it has one: W + alpha / rank * B A."""
    stem, base, leaf = name.rpartition(".base_layer.")
    if not base or leaf != "weight":
        return weight
    a, b = (adapters[f"{stem}.lora_{x}.{ADAPTER}.weight"].to(weight.device).float() for x in "AB")
    return (weight.float() + cfg.alpha / cfg.rank * (b @ a)).to(weight.dtype)


def save_adapter(
    folder: Path, state: Mapping[str, Tensor], cfg: LoraConfig, excluded: Sequence[str], base: str = ""
) -> None:
    """Write an adapter file and its configuration.

    Args:
        state: adapter tensors by their names in the file (`file_name`).
        base: path of the base checkpoint.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = peft_config(cfg, excluded)
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file({name: t.detach().cpu().contiguous() for name, t in state.items()}, folder / "adapter_model.safetensors")
