"""InternVL 2.5, 3 and 3.5 in transformers' format: square frames, one token for each 2 x 2 patches.

A still image is one tile; transformers' processor can cut it into several. Token ids and pixels are equal to the
processor's otherwise (tests/models/families/test_internvl.py). vLLM serves it with the class of Intern-S1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvid.config import TinyModelConfig
from rlvid.models.families.frames import VIDEO, SquareFrames, tiny_tower
from rlvid.models.families.vision import Grid
from rlvid.types import Clip

if TYPE_CHECKING:
    from torch import Tensor

START, END, CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"


class InternVl(SquareFrames):
    """InternVL with videos and images.

    Raises:
        UserError: the folder lacks a file that the family needs.
    """

    vllm_module = "vllm.model_executor.models.interns1"
    vllm_class = "InternS1ForConditionalGeneration"
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

    def n_runs(self, t: int) -> int:
        return t

    def engine_limits(self, max_videos: int) -> dict[str, int]:
        """An image is given as a video of one frame."""
        return {"video": max_videos}

    def engine_clips(self, clips: list[Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        import torch
        from vllm.multimodal.inputs import MultiModalFieldConfig

        sizes = torch.tensor([len(clip) for clip in clips])
        tensors = {"pixel_values_videos": torch.cat(clips), "video_num_patches": sizes}
        fields = {
            "pixel_values_videos": MultiModalFieldConfig.flat_from_sizes("video", sizes),
            "video_num_patches": MultiModalFieldConfig.batched("video", keep_on_cpu=True),
            "video_token_id": MultiModalFieldConfig.shared("video", len(clips), keep_on_cpu=True),
        }
        return {**tensors, "video_token_id": torch.tensor(self.video_token)}, fields

    def n_embeddings(self, grid: Grid) -> int:
        t, h, w = grid
        return t * int(h * self._ratio) * int(w * self._ratio)
