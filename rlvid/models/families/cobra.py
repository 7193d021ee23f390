"""Cobra (arXiv 2403.14520): a Mamba language model behind the features of two towers, DINOv2 and SigLIP.

The network is composed of transformers' parts (`rlvid/models/cobra_network.py`). Frames are square and of one size, a
token for each patch; images come before all text, as in upstream's prompts. Mamba's state is that of one sequence:
responses to a prompt do not share its forward. vLLM does not serve it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlvid.config import TinyModelConfig
from rlvid.models.families.frames import IMAGE, SquareFrames, tiny_tower
from rlvid.models.families.vision import Grid


class Cobra(SquareFrames):
    """Cobra with images, and videos as their frames.

    Raises:
        UserError: the folder lacks a file that the family needs.
    """

    is_recurrent = True
    vision_tokens = (IMAGE,)
    placeholders: Mapping[str, str] = {"video": IMAGE, "image": IMAGE}
    part_types: Mapping[str, str] = {"video": "image", "image": "image"}
    towers = ("dino", "siglip")
    # Mamba reads the weight of dt_proj and never calls it: an adapter there would have no effect.
    no_lora = ("dino", "siglip", "multi_modal_projector", "dt_proj")
    tiny_tokens = (IMAGE,)
    end_token = "<|endoftext|>"
    default_template = (
        "{% for message in messages %}{% for part in message['content'] if part['type'] == 'image' %}"
        "<image>{% endfor %}{% endfor %}"
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
        "{{ '<|endoftext|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )

    @classmethod
    def register(cls) -> None:
        from rlvid.models.cobra_network import register

        register()

    @classmethod
    def tiny(cls, cfg: TinyModelConfig, text: dict[str, Any], tokenizer: Any) -> tuple[dict[str, Any], Any]:
        import transformers

        side, tower = 56, tiny_tower(cfg, 56)
        dino = {key: value for key, value in tower.items() if key != "intermediate_size"}
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "eos_token_id")
        settings = {
            "text_config": {
                **{name: text[name] for name in names},
                "state_size": 4,
                "pad_token_id": text["eos_token_id"],
            },
            "dino_config": {**dino, "mlp_ratio": 2, "num_hidden_layers": max(2, cfg.vision_layers)},
            "vision_config": {**tower, "vision_use_head": False, "num_hidden_layers": max(2, cfg.vision_layers)},
            "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE),
        }
        processor = transformers.LlavaProcessor(
            transformers.SiglipImageProcessor(size={"height": side, "width": side}),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="full",
            chat_template=cls.default_template,
        )
        return settings, processor

    def n_embeddings(self, grid: Grid) -> int:
        t, h, w = grid
        return t * h * w
