"""LLaVA-OneVision, and LLaVA-Video in its format: square frames, each pooled to a quarter of its patches, and one
learned token at the end of each video.

Videos alone: an image would be cut into tiles. Token ids and pixels equal those of transformers' processor, the output
that of transformers and vLLM (tests/models/families/test_llava_onevision.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlvid.config import TinyModelConfig
from rlvid.models.families.frames import IMAGE, VIDEO, SquareFrames, name_tower_for_vllm, tiny_tower
from rlvid.models.families.vision import Grid

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class LlavaOnevision(SquareFrames):
    """LLaVA-OneVision with videos.

    Raises:
        UserError: the folder lacks a file that the family needs.
    """

    vllm_module = "vllm.model_executor.models.llava_onevision"
    vision_tokens = (IMAGE, VIDEO)
    placeholders: Mapping[str, str] = {"video": VIDEO}
    towers = ("vision_tower",)
    no_lora = ("vision_tower", "multi_modal_projector", "image_newline")
    tiny_tokens = ("<|im_start|>", "<|im_end|>", IMAGE, VIDEO)
    default_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
        "{% for part in message['content'] if part['type'] == 'video' %}<video>\n{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endfor %}"
        "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )

    def prepare(self, network: PreTrainedModel) -> None:
        super().prepare(network)
        network.model.get_video_features = functools.partial(_video_features, network.model)

    @classmethod
    def tiny(cls, cfg: TinyModelConfig, text: dict[str, Any], tokenizer: Any) -> tuple[dict[str, Any], Any]:
        import transformers

        side = 56
        settings = {
            "text_config": {"model_type": "qwen2", **text},
            "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **tiny_tower(cfg, side)},
            "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE),
            "video_token_id": tokenizer.convert_tokens_to_ids(VIDEO),
            "tie_word_embeddings": True,
        }
        size = {"size": {"height": side, "width": side}}
        processor = transformers.LlavaOnevisionProcessor(
            image_processor=transformers.LlavaOnevisionImageProcessor(**size, image_grid_pinpoints=[[side, side]]),
            video_processor=transformers.LlavaOnevisionVideoProcessor(**size),
            tokenizer=tokenizer,
            num_image_tokens=(side // 14) ** 2,
            vision_feature_select_strategy="full",
            chat_template=cls.default_template,
        )
        return settings, processor

    def n_embeddings(self, grid: Grid) -> int:
        t, h, w = grid
        return t * math.ceil(h / 2) * math.ceil(w / 2) + 1

    def network_inputs(self, patches: Tensor, grid_thw: Tensor) -> dict[str, Any]:
        return {"pixel_values_videos": self.clips(patches, grid_thw)}

    def adapt_engine(self) -> bool:
        """Fix two faults of vLLM 0.32: the names of the tower's weights, and the embeddings of clips of different
        lengths, which have one dimension too many and are then refused."""
        from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration as Theirs

        name_tower_for_vllm(Theirs)
        process = Theirs._process_video_pixels

        @functools.wraps(process)
        def flat(model: Any, inputs: Any) -> Any:
            return [own.flatten(0, -2) for own in process(model, inputs)]

        if not hasattr(process, "__wrapped__"):
            Theirs._process_video_pixels = flat
        return True


def _video_features(model: Any, pixel_values_videos: list[Tensor], **_: Any) -> Any:
    """In place of transformers' `get_video_features`, which takes clips of one length: here they may differ, and go
    through the tower in one pass."""
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    config = model.config
    seen = model.vision_tower(torch.cat(pixel_values_videos), output_hidden_states=True, return_dict=True)
    layers = config.vision_feature_layer
    chosen = [seen.hidden_states[i] for i in ([layers] if isinstance(layers, int) else layers)]
    features = torch.cat(chosen, dim=-1)
    if config.vision_feature_select_strategy == "default":
        features = features[:, 1:]
    pooled = model.apply_pooling(model.multi_modal_projector(features))  # [frames, tokens, D]
    clips = pooled.split([len(clip) for clip in pixel_values_videos])
    rows = [torch.cat([clip.flatten(0, 1), model.image_newline[None].to(clip.dtype)]) for clip in clips]
    return BaseModelOutputWithPooling(pooler_output=torch.cat(rows)[None])
