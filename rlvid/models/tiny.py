"""Makes random models of about one million parameters, with a real architecture, processor and tokenizer.

Nothing is downloaded. What differs between families is in their own files (`tiny`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlvid.config import TinyModelConfig
from rlvid.models import torchvision_ops
from rlvid.models.families import FAMILIES
from rlvid.models.families.chat import HEAD_DIM, ChatFamily

END_OF_TEXT = "<|endoftext|>"


def make_tiny(folder: Path, cfg: TinyModelConfig, texts: Iterable[str], seed: int) -> None:
    """Save a random model of `cfg.family` that transformers and vLLM can load, with its tokenizer and processor.

    The tokenizer is a byte-level BPE trained on `texts`. `folder` is written under another name and renamed, so it is
    either complete or absent.
    """
    torchvision_ops.ensure()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    family = FAMILIES[cfg.family]
    family.register()
    tokenizer = _train_tokenizer(texts, cfg.vocab_size, family)
    settings, processor = family.tiny(cfg, _text_settings(cfg, tokenizer), tokenizer)
    auto = AutoModelForImageTextToText if family.placeholders else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = auto.from_config(AutoConfig.for_model(cfg.family, **settings))
        _spread_weights(network)
    part = folder.with_name(folder.name + ".part")
    is_set = "DS_ACCELERATOR" in os.environ
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports DeepSpeed, which would warn that it has to guess
    network.save_pretrained(part)
    if not is_set:
        del os.environ["DS_ACCELERATOR"]  # processes started later must make their own choice
    processor.save_pretrained(part)
    part.rename(folder)


def _text_settings(cfg: TinyModelConfig, tokenizer: Any) -> dict[str, Any]:
    heads = cfg.hidden_size // HEAD_DIM
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": cfg.hidden_size,
        "intermediate_size": 2 * cfg.hidden_size,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids(tokenizer.eos_token),
    }


def _spread_weights(model: nn.Module) -> None:
    """Draw matrices with std 1/sqrt(fan_in): with the default 0.02 such a small model does not learn."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.weight[0].numel()))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.embedding_dim))


def _train_tokenizer(texts: Iterable[str], vocab_size: int, family: type[ChatFamily]) -> Any:
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    special, bpe = [END_OF_TEXT, *family.tiny_tokens], ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size, min_frequency=0, show_progress=False, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.to_str()),
        eos_token=family.end_token,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(family.tiny_tokens),
        chat_template=family.default_template,
    )
