"""Random models of about one million parameters, with a real architecture, processor and tokenizer: nothing is
downloaded."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from rlvid.config import TinyModelConfig
from rlvid.models import torchvision_ops
from rlvid.models.families.qwen_vl import CHAT_TEMPLATE, END_OF_TURN, VISION_TOKENS

HEAD_DIM = 64  # vLLM on CPU refuses 16


def make_tiny_qwen2_vl(folder: Path, cfg: TinyModelConfig, texts: Iterable[str], seed: int) -> None:
    """Save a random Qwen2-VL that transformers and vLLM load: weights, configuration, processor, tokenizer.

    The tokenizer is a byte-level BPE trained on `texts`. Written to a side folder first, so `folder` is whole or
    absent.
    """
    torchvision_ops.ensure()
    is_chosen = "DS_ACCELERATOR" in os.environ
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # transformers imports DeepSpeed, which would warn that it has to guess
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor, Qwen2VLProcessor
    from transformers.models.qwen2_vl import Qwen2VLVideoProcessor
    from transformers.utils import logging as transformers_logging

    if not is_chosen:
        del os.environ["DS_ACCELERATOR"]  # processes that are started later choose for themselves
    transformers_logging.disable_progress_bar()
    tokenizer = _train_tokenizer(texts, cfg.vocab_size)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in VISION_TOKENS}
    heads = cfg.hidden_size // HEAD_DIM
    eighth = HEAD_DIM // 8  # the rotary pairs are split 1/4, 3/8, 3/8 over time, height, width as in Qwen2-VL
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": cfg.hidden_size,
            "intermediate_size": 2 * cfg.hidden_size,
            "num_hidden_layers": cfg.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [eighth, 3 * eighth // 2, 3 * eighth // 2],
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.convert_tokens_to_ids(END_OF_TURN),
        },
        vision_config={
            "depth": cfg.vision_layers,
            "embed_dim": cfg.vision_size,
            "hidden_size": cfg.hidden_size,
            "num_heads": max(1, cfg.vision_size // 64),
            "mlp_ratio": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
        _spread_weights(model)
    pixels = {"min_pixels": 28 * 28, "max_pixels": 512 * 28 * 28}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=CHAT_TEMPLATE,
    )
    part = folder.with_name(folder.name + ".part")
    model.save_pretrained(part)
    processor.save_pretrained(part)
    part.rename(folder)


def _spread_weights(model: nn.Module) -> None:
    """Draw matrices with std 1/sqrt(fan_in): with the default 0.02 a model this small does not learn."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.weight[0].numel()))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.embedding_dim))


def _train_tokenizer(texts: Iterable[str], vocab_size: int):  # type: ignore[no-untyped-def]  # transformers is imported late
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", END_OF_TURN, *VISION_TOKENS]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TURN,
        pad_token="<|endoftext|>",
        additional_special_tokens=specials[1:],
        chat_template=CHAT_TEMPLATE,
    )
