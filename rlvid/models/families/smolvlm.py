"""SmolVLM2: square frames, with the time as text before each.

A still image stays whole; transformers' processor can split it. Token ids and pixels are equal to the processor's
otherwise (tests/models/families/test_smolvlm.py). vLLM's class takes only images.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvid.config import TinyModelConfig
from rlvid.models.families.frames import FAKE_AROUND_IMAGE, IMAGE, VIDEO, SquareFrames, tiny_tower
from rlvid.models.families.vision import Grid
from rlvid.types import Clip

if TYPE_CHECKING:
    from torch import Tensor

GLOBAL = "<global-img>"


class SmolVlm(SquareFrames):
    """SmolVLM2 with videos and images.

    Raises:
        UserError: the folder lacks a file that the family needs.
    """

    placeholders: Mapping[str, str] = {"video": VIDEO, "image": IMAGE}
    media_token = IMAGE
    vision_tokens = (IMAGE, FAKE_AROUND_IMAGE, GLOBAL)
    towers = ("vision_model",)
    tiny_tokens = ("<|im_start|>", "<end_of_utterance>", IMAGE, FAKE_AROUND_IMAGE, GLOBAL)
    end_token = "<end_of_utterance>"
    default_template = (
        "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
        "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
        "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{part['text']}}"
        "{% elif part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'video' %}{{ '<video>' }}"
        "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )
    chat_template = default_template  # older checkpoints have one without videos; transformers replaces it too

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._scale: int = self.config.get("scale_factor", 2)  # of patches to tokens, along each side

    @classmethod
    def tiny(cls, cfg: TinyModelConfig, text: dict[str, Any], tokenizer: Any) -> tuple[dict[str, Any], Any]:
        import transformers

        side = 56
        settings = {
            "text_config": {"model_type": "llama", **text},
            "vision_config": tiny_tower(cfg, side),
            "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE),
            "pad_token_id": tokenizer.pad_token_id,
            "scale_factor": 2,
            "tie_word_embeddings": True,
        }
        size = {"size": {"longest_edge": side}, "max_image_size": {"longest_edge": side}}
        processor = transformers.SmolVLMProcessor(
            transformers.SmolVLMImageProcessor(**size, do_image_splitting=False),
            tokenizer,
            transformers.SmolVLMVideoProcessor(**size, fps=1, num_frames=64),
            image_seq_len=4,
            chat_template=cls.default_template,
        )
        return settings, processor

    def expand(self, clip: Clip, grid: Grid, kind: str) -> str:
        n, *_ = grid
        frame = FAKE_AROUND_IMAGE + GLOBAL + IMAGE * self.n_embeddings((1, *grid[1:])) + FAKE_AROUND_IMAGE
        if kind == "image":
            return frame
        from num2words import num2words  # type: ignore[import-untyped]

        length = timedelta(seconds=int(clip.n_frames / clip.fps))
        intro = f"You are provided the following series of {num2words(n)} frames from a {length} [H:MM:SS] video.\n"
        seconds = [int(index / clip.fps) for index in clip.indices]
        return intro + "".join(f"\nFrame from {s // 60:02d}:{s % 60:02d}:{frame}" for s in seconds) + "\n\n"

    def n_embeddings(self, grid: Grid) -> int:
        t, h, w = grid
        return t * (h // self._scale) * (w // self._scale)

    def network_inputs(self, patches: Tensor, grid_thw: Tensor) -> dict[str, Tensor]:
        """Frames [1, n, 3, H, W] of all media."""
        return {"pixel_values": super().network_inputs(patches, grid_thw)["pixel_values"][None]}
