"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: how a sample becomes a prompt, and a prompt the input of vLLM.

This module imports neither torch nor transformers, so that decoding workers stay small. Prompts follow the checkpoint's
own chat template. Token ids and patches (before normalisation) equal those of the checkpoint's processor, positions
those of vLLM (compared with both in tests/models/families/test_qwen_vl.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rlvid.models.families.chat import END_OF_TURN, HEAD_DIM
from rlvid.models.families.rotary import rotary_positions
from rlvid.models.families.vision import Grid, VisionFamily
from rlvid.types import Clip, Prompt, Sample, Span

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from vllm.inputs import MultiModalInput
    from vllm.multimodal.inputs import PlaceholderRange

    from rlvid.config import TinyModelConfig

VIDEO_PLACEHOLDER = "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
VISION_TOKENS = (VISION_START, VISION_END, "<|vision_pad|>", "<|image_pad|>", VIDEO_PLACEHOLDER)


class QwenVL(VisionFamily):
    """Qwen2-VL, and what the later models have in common with it.

    Raises:
        UserError: the folder lacks a file that the family needs.
    """

    vllm_module = "vllm.model_executor.models.qwen2_vl"
    placeholder = VIDEO_PLACEHOLDER
    vision_tokens = VISION_TOKENS
    towers = ("visual",)
    tiny_tokens = ("<|im_start|>", END_OF_TURN, *VISION_TOKENS)
    transformers_name = "Qwen2VL"  # prefix of its classes

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.merge_size: int = self.vision.get("spatial_merge_size", 2)
        self.temporal_patch: int = self.vision.get("temporal_patch_size", 2)
        self.frame_multiple = self.patch_size * self.merge_size

    def tokenize(self, sample: Sample, clips: Sequence[Clip], grids: Sequence[Grid]) -> tuple[list[int], list[Span]]:
        """See the base class. The text between videos is tokenized in pieces, because videos are added as token ids."""
        first, *others = self.render_around(sample, len(clips))
        ids, spans = self.tokens(first), []
        for clip, grid, piece in zip(clips, grids, others, strict=True):
            tokens, runs = self.expand(clip, grid)
            spans += [Span(len(ids) + run.offset, run.length) for run in runs]
            ids += tokens + self.tokens(piece)
        return ids, spans

    def expand(self, clip: Clip, grid: Grid) -> tuple[list[int], list[Span]]:
        """Token ids that replace a clip's placeholder in the template, and the runs of placeholders among them."""
        n = self.n_embeddings(grid)
        return [self.video_token] * n, [Span(0, n)]

    def n_embeddings(self, grid: Grid) -> int:
        t, h, w = grid
        return t * h * w // self.merge_size**2

    @property
    def smallest_grid(self) -> Grid:
        return (1, self.merge_size, self.merge_size)

    def engine_limits(self, max_videos: int) -> dict[str, int]:
        return {"video": max_videos}

    def prepare(self, network: PreTrainedModel) -> None:
        """Use rlvid's attention in the vision tower, and a matrix product for its patch embedding."""
        from rlvid.models.attention import VISION_ATTENTION
        from rlvid.models.loading import PatchProjection

        tower = network.model.visual
        tower.config._attn_implementation = VISION_ATTENTION
        tower.patch_embed.proj = PatchProjection(tower.patch_embed.proj)

    @classmethod
    def make_tiny(cls, cfg: TinyModelConfig, text: dict[str, Any], tokenizer: Any) -> tuple[PreTrainedModel, Any]:
        import transformers

        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in VISION_TOKENS}
        rope = text["rope_parameters"] | cls.tiny_rope()
        vision = {"depth": cfg.vision_layers, "num_heads": max(1, cfg.vision_size // HEAD_DIM)}
        config = getattr(transformers, f"{cls.transformers_name}Config")(
            text_config=text | {"rope_parameters": rope} | cls.tiny_text(),
            vision_config=vision | cls.tiny_vision(cfg),
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids[VIDEO_PLACEHOLDER],
            vision_start_token_id=ids[VISION_START],
            vision_end_token_id=ids[VISION_END],
            tie_word_embeddings=True,
        )
        network = getattr(transformers, f"{cls.transformers_name}ForConditionalGeneration")(config)
        return network, cls.tiny_processor(tokenizer)

    @classmethod
    def tiny_rope(cls) -> dict[str, Any]:
        """Split of the rotary pairs into time, height and width, about as in the released models."""
        return {"mrope_section": [8, 12, 12]}

    @classmethod
    def tiny_text(cls) -> dict[str, Any]:
        return {}

    @classmethod
    def tiny_vision(cls, cfg: TinyModelConfig) -> dict[str, Any]:
        return {"embed_dim": cfg.vision_size, "hidden_size": cfg.hidden_size, "mlp_ratio": 2}

    @classmethod
    def tiny_processor(cls, tokenizer: Any) -> Any:
        import transformers
        from transformers.models.qwen2_vl import Qwen2VLVideoProcessor

        sizes = {"min_pixels": 28**2, "max_pixels": 512 * 28**2}
        return getattr(transformers, f"{cls.transformers_name}Processor")(
            image_processor=transformers.Qwen2VLImageProcessor(**sizes),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(**sizes),
            chat_template=cls.default_template,
        )

    def network_inputs(self, patches: torch.Tensor, grid_thw: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pixel_values_videos": patches, "video_grid_thw": grid_thw}

    def positions(
        self, n_tokens: int, spans: Sequence[Span], grid_thw: npt.NDArray[np.int64], seconds: Sequence[float]
    ) -> npt.NDArray[np.int32]:
        """Rotary positions [3, n_tokens] of a prompt."""
        return rotary_positions(n_tokens, spans, grid_thw, self.merge_size)

    def engine_input(self, prompt: Prompt) -> MultiModalInput | dict[str, Any]:
        """The input for vLLM's `LLMEngine.add_request`: token ids, uint8 patches, and clip ids as cache keys.

        Only this form gives the same result as vLLM's own preprocessing (measured with vLLM 0.32): `LLM.generate` would
        drop the video silently, and float patches would be normalised twice.
        """
        import torch
        from vllm.inputs import mm_input, tokens_input
        from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems

        ids = prompt.token_ids.tolist()
        if not prompt.spans:
            return dict(tokens_input(ids))
        grid = torch.from_numpy(prompt.grid_thw.copy())
        fields = {
            "pixel_values_videos": MultiModalFieldConfig.flat_from_sizes("video", grid.prod(-1)),
            "video_grid_thw": MultiModalFieldConfig.batched("video", keep_on_cpu=True),
        }
        # The array is a read-only view into the object store; torch needs a writable one, and the copy is cheap.
        tensors = {"pixel_values_videos": torch.from_numpy(prompt.patches.copy()), "video_grid_thw": grid}
        for name, tensor in self.engine_extras(prompt).items():
            fields[name] = MultiModalFieldConfig.batched("video", keep_on_cpu=True)
            tensors[name] = tensor
        return mm_input(
            prompt_token_ids=ids,
            mm_kwargs=MultiModalKwargsItems.from_hf_inputs(tensors, fields),
            mm_hashes={"video": list(prompt.clip_ids)},
            mm_placeholders={"video": self.engine_placeholders(prompt)},
        )

    def engine_extras(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        """Further inputs that vLLM needs for each video: tensors [V]."""
        return {}

    def engine_placeholders(self, prompt: Prompt) -> list[PlaceholderRange]:
        """One range per video, with a mask if not all of its tokens are placeholders."""
        from vllm.multimodal.inputs import PlaceholderRange

        return [PlaceholderRange(offset=s.offset, length=s.length) for s in prompt.spans]


class Qwen25VL(QwenVL):
    """Qwen2.5-VL: time positions follow seconds. The windows of its tower are handled by transformers and vLLM."""

    vllm_module = "vllm.model_executor.models.qwen2_5_vl"
    transformers_name = "Qwen2_5_VL"

    @classmethod
    def tiny_vision(cls, cfg: TinyModelConfig) -> dict[str, Any]:
        return {
            # Windows of 2 x 2 merged patches in every layer but the last, so that small clips have more than one.
            "window_size": 56,
            "fullatt_block_indexes": [cfg.vision_layers - 1],
            "tokens_per_second": 2,
            "out_hidden_size": cfg.hidden_size,
            "hidden_size": cfg.vision_size,
            "intermediate_size": 2 * cfg.vision_size,
        }

    def positions(
        self, n_tokens: int, spans: Sequence[Span], grid_thw: npt.NDArray[np.int64], seconds: Sequence[float]
    ) -> npt.NDArray[np.int32]:
        tokens_per_second = self.vision.get("tokens_per_second", 4)
        steps = [float(np.float32(s)) * tokens_per_second for s in seconds]  # vLLM reads them from a float32 tensor
        return rotary_positions(n_tokens, spans, grid_thw, self.merge_size, steps)

    def engine_extras(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        import torch

        return {"second_per_grid_ts": torch.tensor(prompt.seconds_per_patch, dtype=torch.float32)}


class Qwen3VL(QwenVL):
    """Qwen3-VL: each temporal patch is a run of its own that follows its time as text, so a video has several runs.

    As in vLLM 0.32 and transformers since 5.10, the runs replace the template's placeholder, and the vision tokens that
    the template writes around the placeholder stay (transformers 4 dropped these).
    """

    vllm_module = "vllm.model_executor.models.qwen3_vl"
    transformers_name = "Qwen3VL"
    default_patch_size = 16

    @classmethod
    def tiny_rope(cls) -> dict[str, Any]:
        return {"mrope_section": [12, 10, 10], "mrope_interleaved": True}

    @classmethod
    def tiny_text(cls) -> dict[str, Any]:
        return {"head_dim": HEAD_DIM}

    @classmethod
    def tiny_vision(cls, cfg: TinyModelConfig) -> dict[str, Any]:
        return {
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": list(range(min(cfg.vision_layers, cfg.layers))),
            "out_hidden_size": cfg.hidden_size,
            "hidden_size": cfg.vision_size,
            "intermediate_size": 2 * cfg.vision_size,
        }

    @classmethod
    def tiny_processor(cls, tokenizer: Any) -> Any:
        import transformers
        from transformers.models.qwen3_vl import Qwen3VLVideoProcessor

        sizes = {"size": {"shortest_edge": 32**2, "longest_edge": 512 * 32**2}}
        images = transformers.Qwen2VLImageProcessor(**sizes, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        return transformers.Qwen3VLProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            video_processor=Qwen3VLVideoProcessor(**sizes),
            chat_template=cls.default_template,
        )

    def expand(self, clip: Clip, grid: Grid) -> tuple[list[int], list[Span]]:
        t, h, w = grid
        n = h * w // self.merge_size**2
        start, end = self.special(VISION_START), self.special(VISION_END)
        ids: list[int] = []
        runs: list[Span] = []
        for time_s in self.patch_times(clip, t):
            ids += [*self.tokens(f"<{time_s:.1f} seconds>"), start]
            runs.append(Span(len(ids), n))
            ids += [*[self.video_token] * n, end]
        return ids, runs

    def patch_times(self, clip: Clip, n: int) -> list[float]:
        """Time of each of the n temporal patches in seconds: the mean of the times of its first and last frame.

        Times are index / average frame rate, as in transformers' processor, also for files of variable frame rate.
        """
        seconds = [int(i) / clip.fps for i in clip.indices]
        seconds += seconds[-1:] * (n * self.temporal_patch - len(seconds))  # the last frame is repeated
        return [
            (seconds[i] + seconds[i + self.temporal_patch - 1]) / 2 for i in range(0, len(seconds), self.temporal_patch)
        ]

    def positions(
        self, n_tokens: int, spans: Sequence[Span], grid_thw: npt.NDArray[np.int64], seconds: Sequence[float]
    ) -> npt.NDArray[np.int32]:
        frames = np.repeat(grid_thw, grid_thw[:, 0], axis=0)
        frames[:, 0] = 1
        return rotary_positions(n_tokens, spans, frames, self.merge_size)

    def engine_placeholders(self, prompt: Prompt) -> list[PlaceholderRange]:
        import torch
        from vllm.multimodal.inputs import PlaceholderRange

        ranges, runs = [], iter(prompt.spans)
        for t in prompt.grid_thw[:, 0]:
            of_video = [next(runs) for _ in range(t)]
            # vLLM expects the range to begin with the vision-start token of the first patch.
            first, end = of_video[0].offset - 1, of_video[-1].offset + of_video[-1].length
            is_embed = torch.zeros(end - first, dtype=torch.bool)
            for run in of_video:
                is_embed[run.offset - first : run.offset - first + run.length] = True
            ranges.append(PlaceholderRange(offset=first, length=end - first, is_embed=is_embed))
        return ranges
