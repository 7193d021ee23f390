"""InternVL 2.5, 3 and 3.5 in transformers' format: square frames, one token for each 2 x 2 patches.

A still image is one tile; transformers' processor can cut it into several. Token ids and pixels are equal to the
processor's otherwise (tests/models/families/test_internvl.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlvid.config import TinyModelConfig
from rlvid.models.families.frames import VIDEO, SquareFrames, tiny_tower
from rlvid.models.families.vision import Grid
from rlvid.types import Clip

START, END, CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"


class InternVl(SquareFrames):
    """InternVL with videos and images.

    Raises:
        UserError: the folder lacks a file that the family needs.
    """

    placeholders: Mapping[str, str] = {"video": VIDEO, "image": CONTEXT}
    media_token = CONTEXT
    vision_tokens = (START, END, CONTEXT, VIDEO)
    towers = ("vision_tower",)
    no_lora = ("vision_tower", "multi_modal_projector")
    tiny_tokens = ("<|im_start|>", "<|im_end|>", START, END, CONTEXT, VIDEO)
    default_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% elif part['type'] == 'video' %}<video>\n"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._ratio: float = self.config.get("downsample_ratio", 0.5)  # of tokens to patches, along each side

    @classmethod
    def tiny(cls, cfg: TinyModelConfig, text: dict[str, Any], tokenizer: Any) -> tuple[dict[str, Any], Any]:
        import transformers

        side = 56
        tower = tiny_tower(cfg, side)
        settings = {
            "text_config": {"model_type": "qwen2", **text},
            "vision_config": {**tower, "image_size": [side, side], "patch_size": [14, 14]},
            "image_token_id": tokenizer.convert_tokens_to_ids(CONTEXT),
            "image_seq_length": 4,
        }
        names = {"start_image_token": START, "end_image_token": END, "context_image_token": CONTEXT}
        tokenizer = type(tokenizer)(
            tokenizer_object=tokenizer.backend_tokenizer,
            eos_token=tokenizer.eos_token,
            pad_token=tokenizer.pad_token,
            extra_special_tokens={**names, "video_token": VIDEO},
        )
        size = {"size": {"height": side, "width": side}}
        processor = transformers.InternVLProcessor(
            transformers.GotOcr2ImageProcessor(**size, crop_to_patches=False),
            tokenizer,
            transformers.InternVLVideoProcessor(**size),
            image_seq_length=4,
            chat_template=cls.default_template,
        )
        return settings, processor

    def expand(self, clip: Clip, grid: Grid, kind: str) -> str:
        frame = START + CONTEXT * self.n_embeddings((1, *grid[1:])) + END
        return frame if kind == "image" else "\n".join(f"Frame{i + 1}: {frame}" for i in range(grid[0]))

    def n_embeddings(self, grid: Grid) -> int:
        t, h, w = grid
        return t * int(h * self._ratio) * int(w * self._ratio)
