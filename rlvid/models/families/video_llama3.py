"""VideoLLaMA3: frames of any size, one token for each 2 x 2 patches, and the time before each frame.

Only videos: an image has one token for each patch, and would need a pass of its own. Tokens of parts that do not move
are kept (transformers' `use_token_compression=False`): otherwise their number would depend on the pixels. Token ids and
patches equal those of transformers' processor (tests/models/families/test_video_llama3.py). vLLM does not serve it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvid.config import TinyModelConfig
from rlvid.models.families.frames import tiny_tower
from rlvid.models.families.qwen_vl import PLACEHOLDERS, prepare_tower
from rlvid.models.families.vision import Grid, VisionFamily
from rlvid.types import Clip

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from rlvid.models.tower import Call

VIDEO = PLACEHOLDERS["video"]


class VideoLlama3(VisionFamily):
    """VideoLLaMA3 with videos.

    Raises:
        UserError: the folder lacks a file that the family needs.
    """

    placeholders: Mapping[str, str] = {"video": VIDEO}
    vision_tokens = tuple(PLACEHOLDERS.values())
    towers = ("vision_model",)
    no_lora = ("vision_model", "projector")
    tiny_tokens = ("<|im_start|>", "<|im_end|>", *PLACEHOLDERS.values())
    default_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
        "{% if part['type'] == 'video' %}<|video_pad|>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    merge_size = 2

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.frame_multiple = self.patch_size * self.merge_size

    def prepare(self, network: PreTrainedModel) -> None:
        tower = network.model.vision_model
        prepare_tower(tower, tower.embeddings, "patch_embedding", _cut)

    @classmethod
    def tiny(cls, cfg: TinyModelConfig, text: dict[str, Any], tokenizer: Any) -> tuple[dict[str, Any], Any]:
        import transformers

        tower = {key: value for key, value in tiny_tower(cfg, 0).items() if key != "image_size"}
        settings = {
            "text_config": {"model_type": "qwen2", **text},
            "vision_config": tower,
            **{f"{kind}_token_id": tokenizer.convert_tokens_to_ids(token) for kind, token in PLACEHOLDERS.items()},
            "tie_word_embeddings": True,
        }
        processor = transformers.VideoLlama3Processor(
            transformers.VideoLlama3ImageProcessor(),
            tokenizer,
            transformers.VideoLlama3VideoProcessor(use_token_compression=False),
            chat_template=cls.default_template,
        )
        return settings, processor

    def expand(self, clip: Clip, grid: Grid, kind: str) -> str:
        n, *_ = grid
        frame = VIDEO * (self.n_embeddings(grid) // n)
        return ",".join(f"Time {index / clip.fps:.1f}s:{frame}" for index in clip.indices)

    def n_embeddings(self, grid: Grid) -> int:
        return math.prod(grid) // self.merge_size**2

    def network_inputs(self, patches: Tensor, grid_thw: Tensor) -> dict[str, Tensor]:
        sizes = grid_thw.new_full((len(grid_thw),), self.merge_size)
        return {"pixel_values_videos": patches, "video_grid_thw": grid_thw, "video_merge_sizes": sizes}


def _cut(limit: int, pixel_values: Tensor, grid_thw: Tensor, merge_sizes: Tensor, **others: Any) -> Iterator[Call]:
    """The calls of the tower over pieces of a clip, whose patches all merge alike."""
    from rlvid.models.tower import cut_patches

    for (patches,), named in cut_patches(limit, pixel_values, grid_thw, **others):
        own = merge_sizes[:1].expand(len(named["grid_thw"]))
        yield (), {"pixel_values": patches, "merge_sizes": own, **named}
