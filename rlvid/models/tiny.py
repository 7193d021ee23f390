"""Random models of about one million parameters, with a real architecture, processor and tokenizer: nothing is
downloaded."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlvid.config import TinyModelConfig
from rlvid.models import torchvision_ops
from rlvid.models.families.chat import CHAT_TEMPLATE, END_OF_TURN
from rlvid.models.families.frames import FAKE_AROUND_IMAGE, IMAGE, VIDEO, Idefics2, VideoLlava
from rlvid.models.families.qwen_vl import VIDEO_PLACEHOLDER, VISION_END, VISION_START, VISION_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD_DIM = 64  # vLLM on CPU refuses 16
END_OF_TEXT = "<|endoftext|>"
# Special tokens, the one that ends a turn, and the chat template.
CHATML = (["<|im_start|>", END_OF_TURN, *VISION_TOKENS], END_OF_TURN, CHAT_TEMPLATE)
CHATS = {
    "idefics2": (["<end_of_utterance>", IMAGE, FAKE_AROUND_IMAGE], "<end_of_utterance>", Idefics2.default_template),
    "video_llava": (["</s>", IMAGE, VIDEO], "</s>", VideoLlava.default_template),
}


def make_tiny(folder: Path, cfg: TinyModelConfig, texts: Iterable[str], seed: int) -> None:
    """Save a random model of `cfg.family` that transformers and vLLM load: weights, configuration, tokenizer, and the
    processor where it sees videos.

    The tokenizer is a byte-level BPE trained on `texts`. Written to a side folder first, so `folder` is whole or
    absent.
    """
    torchvision_ops.ensure()
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = _train_tokenizer(texts, cfg.vocab_size, *CHATS.get(cfg.family, CHATML))
    text = _text_settings(cfg, tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if cfg.family in ("qwen2", "qwen3"):
            model, processor = _text_model(cfg, text), tokenizer
        elif cfg.family == "idefics2":
            model, processor = _idefics2(cfg, text, tokenizer)
        elif cfg.family == "video_llava":
            model, processor = _video_llava(cfg, text, tokenizer)
        else:
            model, processor = _vision_model(cfg, text, tokenizer), _processor(cfg, tokenizer)
        _spread_weights(model)
    part = folder.with_name(folder.name + ".part")
    with _deepspeed_told_cpu():
        model.save_pretrained(part)
    processor.save_pretrained(part)
    part.rename(folder)


def _text_settings(cfg: TinyModelConfig, tokenizer: Any) -> dict[str, Any]:
    heads = cfg.hidden_size // HEAD_DIM
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": cfg.hidden_size,
        "intermediate_size": 2 * cfg.hidden_size,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids(tokenizer.eos_token),
    }
    if cfg.family.startswith("qwen3"):
        settings["head_dim"] = HEAD_DIM
    # The rotary pairs are split over time, height, width about as in the released models.
    if cfg.family == "qwen3_vl":
        settings["rope_parameters"] |= {"mrope_section": [12, 10, 10], "mrope_interleaved": True}
    elif cfg.family.endswith("_vl"):
        settings["rope_parameters"]["mrope_section"] = [8, 12, 12]
    return settings


def _text_model(cfg: TinyModelConfig, text: dict[str, Any]) -> PreTrainedModel:
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    if cfg.family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**text))
    return Qwen3ForCausalLM(Qwen3Config(**text))


def _vision_model(cfg: TinyModelConfig, text: dict[str, Any], tokenizer: Any) -> PreTrainedModel:
    import transformers

    heads = max(1, cfg.vision_size // HEAD_DIM)
    vision: dict[str, Any] = {"depth": cfg.vision_layers, "num_heads": heads}
    match cfg.family:
        case "qwen2_vl":
            name = "Qwen2VL"
            vision |= {"embed_dim": cfg.vision_size, "hidden_size": cfg.hidden_size, "mlp_ratio": 2}
        case "qwen2_5_vl":
            name = "Qwen2_5_VL"
            # Windows of 2 x 2 merged patches in every layer but the last, so that small clips have several.
            vision |= {"out_hidden_size": cfg.hidden_size, "window_size": 56, "tokens_per_second": 2}
            vision |= {"fullatt_block_indexes": [cfg.vision_layers - 1]}
        case _:
            name = "Qwen3VL"
            vision |= {"out_hidden_size": cfg.hidden_size, "num_position_embeddings": 64}
            vision |= {"deepstack_visual_indexes": list(range(min(cfg.vision_layers, cfg.layers)))}
    if cfg.family != "qwen2_vl":
        vision |= {"hidden_size": cfg.vision_size, "intermediate_size": 2 * cfg.vision_size}
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in VISION_TOKENS}
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids[VIDEO_PLACEHOLDER],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _processor(cfg: TinyModelConfig, tokenizer: Any) -> Any:
    import transformers
    from transformers.models.qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl import Qwen3VLVideoProcessor

    name, video = "Qwen2VLProcessor", Qwen2VLVideoProcessor
    side = 28  # pixels of a merged patch
    if cfg.family == "qwen2_5_vl":
        name = "Qwen2_5_VLProcessor"
    settings: dict[str, Any] = {"min_pixels": side**2, "max_pixels": 512 * side**2}
    image_settings = settings
    if cfg.family == "qwen3_vl":
        name, video, side = "Qwen3VLProcessor", Qwen3VLVideoProcessor, 32
        settings = {"size": {"shortest_edge": side**2, "longest_edge": 512 * side**2}}
        image_settings = settings | {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return getattr(transformers, name)(
        image_processor=transformers.Qwen2VLImageProcessor(**image_settings),
        tokenizer=tokenizer,
        video_processor=video(**settings),
        chat_template=CHAT_TEMPLATE,
    )


def _tower(cfg: TinyModelConfig, image_size: int) -> dict[str, Any]:
    return {
        "hidden_size": cfg.vision_size,
        "intermediate_size": 2 * cfg.vision_size,
        "num_hidden_layers": cfg.vision_layers,
        "num_attention_heads": max(1, cfg.vision_size // HEAD_DIM),
        "image_size": image_size,
        "patch_size": 14,
    }


def _idefics2(cfg: TinyModelConfig, text: dict[str, Any], tokenizer: Any) -> tuple[PreTrainedModel, Any]:
    import transformers

    heads = text["num_attention_heads"]
    resampler = {"resampler_n_latents": 8, "resampler_depth": 1, "resampler_n_heads": heads}
    config = transformers.Idefics2Config(
        text_config={"model_type": "mistral", **text, "sliding_window": None},
        vision_config=_tower(cfg, 140),
        perceiver_config=resampler
        | {"hidden_size": cfg.hidden_size, "rms_norm_eps": 1e-6}
        | {"resampler_head_dim": HEAD_DIM, "num_key_value_heads": heads},
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
    )
    images = transformers.Idefics2ImageProcessor(do_image_splitting=False)
    template = Idefics2.default_template
    processor = transformers.Idefics2Processor(images, tokenizer, image_seq_len=8, chat_template=template)
    return transformers.Idefics2ForConditionalGeneration(config), processor


def _video_llava(cfg: TinyModelConfig, text: dict[str, Any], tokenizer: Any) -> tuple[PreTrainedModel, Any]:
    import transformers
    from transformers.models.video_llava.video_processing_video_llava import VideoLlavaVideoProcessor

    side = 56
    config = transformers.VideoLlavaConfig(
        text_config={"model_type": "llama", **text},
        vision_config={"model_type": "clip_vision_model", **_tower(cfg, side)},
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        video_token_id=tokenizer.convert_tokens_to_ids(VIDEO),
        video_seq_length=8 * ((side // 14) ** 2 + 1),
    )
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor = transformers.VideoLlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(**size),
        video_processor=VideoLlavaVideoProcessor(**size),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=VideoLlava.default_template,
    )
    return transformers.VideoLlavaForConditionalGeneration(config), processor


@contextmanager
def _deepspeed_told_cpu() -> Iterator[None]:
    """`save_pretrained` imports DeepSpeed (through accelerate), which warns when it has to guess its device."""
    is_chosen = "DS_ACCELERATOR" in os.environ
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        yield
    finally:
        if not is_chosen:
            del os.environ["DS_ACCELERATOR"]  # processes that are started later choose for themselves


def _spread_weights(model: nn.Module) -> None:
    """Draw matrices with std 1/sqrt(fan_in): with the default 0.02 a model this small does not learn."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.weight[0].numel()))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.embedding_dim))


def _train_tokenizer(texts: Iterable[str], vocab_size: int, specials: list[str], end: str, template: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=end,
        pad_token=END_OF_TEXT,
        additional_special_tokens=specials,
        chat_template=template,
    )
