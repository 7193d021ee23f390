"""LLaVA-NeXT-Video: square frames, each pooled to a quarter of its patches.

Only videos: an image would be cut into tiles. Token ids and pixels equal those of transformers' processor, the output
that of transformers and vLLM (tests/models/families/test_llava_next_video.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlvid.config import TinyModelConfig
from rlvid.models.families.frames import FrameFamily, VideoLlava, name_tower_for_vllm
from rlvid.models.families.vision import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LlavaNextVideo(VideoLlava):
    """LLaVA-NeXT-Video with videos.

    Raises:
        UserError: the folder lacks a file that the family needs.
    """

    vllm_module = "vllm.model_executor.models.llava_next_video"
    towers = ("vision_tower",)
    no_lora = ("vision_tower", "multi_modal_projector", "vision_resampler", "image_newline")

    def prepare(self, network: PreTrainedModel) -> None:
        FrameFamily.prepare(self, network)
        network.model.image_newline.requires_grad_(False)  # videos do not use it

    @classmethod
    def tiny(cls, cfg: TinyModelConfig, text: dict[str, Any], tokenizer: Any) -> tuple[dict[str, Any], Any]:
        import transformers

        settings, _ = super().tiny(cfg, text, tokenizer)
        tower = settings["vision_config"]
        side, patch = tower["image_size"], 7  # vLLM fails where the square of a patch's side is larger than the frame's
        size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        processor = transformers.LlavaNextVideoProcessor(
            transformers.LlavaNextVideoVideoProcessor(**size),
            transformers.LlavaNextImageProcessor(**size, image_grid_pinpoints=[[side, side]]),
            tokenizer,
            patch_size=patch,
            vision_feature_select_strategy="default",
            chat_template=cls.default_template,
        )
        tower["patch_size"] = patch
        return {**settings, "image_grid_pinpoints": [[side, side]]}, processor

    def n_embeddings(self, grid: Grid) -> int:
        t, h, w = grid
        return t * (h // 2) * (w // 2)

    def engine_limits(self, max_videos: int) -> dict[str, int]:
        """vLLM takes one video in a prompt."""
        return {"video": 1}

    def adapt_engine(self) -> bool:
        from vllm.model_executor.models.llava_next_video import LlavaNextVideoForConditionalGeneration as Theirs

        name_tower_for_vllm(Theirs)
        return True
