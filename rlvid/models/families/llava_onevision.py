"""LLaVA-OneVision, and LLaVA-Video in its format: square frames, each pooled to a quarter of its patches, and one
learned token at the end of each video.

Videos alone: an image would be cut into tiles. Token ids and pixels equal those of transformers' processor, the output
that of transformers and vLLM (tests/models/families/test_llava_onevision.py).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rlvid.config import TinyModelConfig
from rlvid.models.families.frames import IMAGE, VIDEO, SquareFrames, tiny_tower
from rlvid.models.families.vision import Grid
from rlvid.types import Clip, Prompt

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

    def expand(self, clip: Clip, grid: Grid, kind: str) -> str:
        return VIDEO * self.n_embeddings(grid)

    def n_embeddings(self, grid: Grid) -> int:
        t, h, w = grid
        return t * math.ceil(h / 2) * math.ceil(w / 2) + 1

    def patchify(self, frames: npt.NDArray[np.uint8]) -> tuple[Grid, npt.NDArray[np.uint8]]:
        """The edge beyond the last whole patch (6 of 384 pixels) is left out: the tower's convolution skips it."""
        self.check_frames(frames)
        whole = self.frame_multiple // self.patch_size * self.patch_size
        return super(SquareFrames, self).patchify(frames[:, :whole, :whole])

    def network_inputs(self, patches: Tensor, grid_thw: Tensor) -> dict[str, Any]:
        """A list of clips [t, 3, H, W], of the size that the tower asks for."""
        from torch.nn.functional import pad

        clips = patches.split(grid_thw.prod(dim=1).tolist())
        frames = [self.images(own, grid) for own, grid in zip(clips, grid_thw.tolist(), strict=True)]
        room = self.frame_multiple % self.patch_size
        return {"pixel_values_videos": [pad(own, (0, room, 0, room)) for own in frames]}

    def adapt_engine(self) -> bool:
        """vLLM 0.32 knows the tower's weights only under the names of transformers 4, and gives the embeddings of clips
        of different lengths a dimension too many, which it then refuses."""
        from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration as Theirs

        pattern = re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)")
        Theirs.hf_to_vllm_mapper.orig_to_new_regex[pattern] = "vision_tower.vision_model."
        process = Theirs._process_video_pixels

        @functools.wraps(process)
        def flat(model: Any, inputs: Any) -> Any:
            return [own.flatten(0, -2) for own in process(model, inputs)]

        if not hasattr(process, "__wrapped__"):
            Theirs._process_video_pixels = flat
        return True

    def engine_input(self, prompt: Prompt) -> Mapping[str, Any]:
        """Token ids, normalised frames, and clip ids as cache keys."""
        if not prompt.spans:
            return super().engine_input(prompt)
        import torch
        from vllm.inputs import mm_input
        from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

        from rlvid.models.tower import normalise

        pixels = normalise(torch.from_numpy(prompt.patches), self, torch.float32)
        return mm_input(
            prompt_token_ids=prompt.token_ids.tolist(),
            mm_kwargs=MultiModalKwargsItems.from_hf_inputs(
                self.network_inputs(pixels, torch.from_numpy(prompt.grid_thw)),
                {"pixel_values_videos": MultiModalFieldConfig.batched("video")},
            ),
            mm_hashes={"video": list(prompt.clip_ids)},
            mm_placeholders={"video": [PlaceholderRange(offset=s.offset, length=s.length) for s in prompt.spans]},
        )


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
