"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: how a sample becomes a prompt, and a prompt the input of vLLM.

This module imports neither torch nor transformers, so that decoding workers stay small. Prompts follow the checkpoint's
own chat template. Token ids and patches (before normalisation) equal those of the checkpoint's processor, positions
those of vLLM (compared with both in tests/models/families/test_qwen_vl.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rlvid.config import TinyModelConfig
from rlvid.models.families.chat import HEAD_DIM
from rlvid.models.families.vision import Grid, VisionFamily, rotary_positions
from rlvid.types import Clip, Prompt, Span

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from vllm.multimodal.inputs import PlaceholderRange

    from rlvid.models.tower import Call

PLACEHOLDERS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
VISION_TOKENS = (VISION_START, VISION_END, "<|vision_pad|>", *PLACEHOLDERS.values())
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}  # names of the inputs


class QwenVL(VisionFamily):
    """Qwen2-VL, and what the later models have in common with it.

    Raises:
        UserError: the folder lacks a file that the family needs.
    """

    vllm_module = "vllm.model_executor.models.qwen2_vl"
    placeholders: Mapping[str, str] = PLACEHOLDERS
    vision_tokens = VISION_TOKENS
    towers = ("visual",)
    tiny_tokens = ("<|im_start|>", "<|im_end|>", *VISION_TOKENS)
    processors = ("Qwen2VLProcessor", "Qwen2VLVideoProcessor")  # in transformers
    tiny_rope: Mapping[str, Any] = {"mrope_section": [8, 12, 12]}  # rotary pairs of time, height and width

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.merge_size: int = self.vision.get("spatial_merge_size", 2)
        self.temporal_patch: int = self.vision.get("temporal_patch_size", 2)
        self.frame_multiple = self.patch_size * self.merge_size

    def expand(self, clip: Clip, grid: Grid, kind: str) -> str:
        return self.placeholders[kind] * self.n_embeddings(grid)

    def n_embeddings(self, grid: Grid) -> int:
        return math.prod(grid) // self.merge_size**2

    def prepare(self, network: PreTrainedModel) -> None:
        from rlvid.models.tower import cut_patches

        prepare_tower(network.model.visual, network.model.visual.patch_embed, "proj", cut_patches)

    @classmethod
    def tiny(cls, cfg: TinyModelConfig, text: dict[str, Any], tokenizer: Any) -> tuple[dict[str, Any], Any]:
        import transformers

        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in VISION_TOKENS}
        settings = {
            "text_config": text | {"rope_parameters": {**text["rope_parameters"], **cls.tiny_rope}},
            "vision_config": cls.tiny_tower(cfg)
            | {"depth": cfg.vision_layers, "num_heads": max(1, cfg.vision_size // HEAD_DIM)},
            **{f"{kind}_token_id": ids[token] for kind, token in PLACEHOLDERS.items()},
            "vision_start_token_id": ids[VISION_START],
            "vision_end_token_id": ids[VISION_END],
            "tie_word_embeddings": True,
        }
        patch = cls.default_patch_size
        limits = {"size": {"shortest_edge": (2 * patch) ** 2, "longest_edge": 512 * (2 * patch) ** 2}}
        processor, videos = (getattr(transformers, name) for name in cls.processors)
        video = videos(**limits)
        pixels = {"patch_size": patch, "image_mean": video.image_mean, "image_std": video.image_std}
        image = transformers.Qwen2VLImageProcessor(**limits, **pixels)
        template = cls.default_template
        return settings, processor(image, tokenizer, video_processor=video, chat_template=template)

    @classmethod
    def tiny_tower(cls, cfg: TinyModelConfig) -> dict[str, Any]:
        """Settings of a tiny model's vision tower."""
        return {"embed_dim": cfg.vision_size, "hidden_size": cfg.hidden_size, "mlp_ratio": 2}

    def network_inputs(self, patches: torch.Tensor, grid_thw: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pixel_values_videos": patches, "video_grid_thw": grid_thw}

    def positions(self, prompt: Prompt) -> npt.NDArray[np.int32]:
        return rotary_positions(prompt.length, prompt.spans, prompt.grid_thw, self.merge_size)

    def engine_input(self, prompt: Prompt, **extras: torch.Tensor) -> Mapping[str, Any]:
        """The input for vLLM's `LLMEngine.add_request`: token ids, uint8 patches, and clip ids as cache keys.

        `extras` are further inputs of videos: tensors [V], a number for each medium.

        Only this form gives the same result as vLLM's own preprocessing (measured with vLLM 0.32): `LLM.generate` would
        drop the video silently, and float patches would be normalised twice.
        """
        if not prompt.spans:
            return super().engine_input(prompt)
        import torch
        from vllm.inputs import mm_input
        from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems

        runs = iter(prompt.spans)
        media = [[next(runs) for _ in range(self.n_runs(t))] for t in prompt.grid_thw[:, 0].tolist()]
        patches = np.split(prompt.patches, np.cumsum(prompt.grid_thw.prod(axis=1))[:-1])
        tensors: dict[str, torch.Tensor] = {}
        fields: dict[str, Any] = {}
        hashes: dict[str, list[str]] = {}
        ranges: dict[str, list[PlaceholderRange]] = {}
        for kind, token in self.media_tokens.items():
            own = [i for i, spans in enumerate(media) if prompt.token_ids[spans[0].offset] == token]
            if not own:
                continue
            # The array is a read-only view into the object store; torch needs a writable one, and the copy is cheap.
            grid = torch.from_numpy(prompt.grid_thw[own])
            new = {f"{kind}_grid_thw": grid} | ({name: x[own] for name, x in extras.items()} if kind == "video" else {})
            fields |= dict.fromkeys(new, MultiModalFieldConfig.batched(kind, keep_on_cpu=True))
            fields[PIXELS[kind]] = MultiModalFieldConfig.flat_from_sizes(kind, grid.prod(-1))
            tensors |= new | {PIXELS[kind]: torch.from_numpy(np.concatenate([patches[i] for i in own]))}
            hashes[kind] = [prompt.clip_ids[i] for i in own]
            ranges[kind] = [self.engine_range(prompt, media[i]) for i in own]
        return mm_input(
            prompt_token_ids=prompt.token_ids.tolist(),
            mm_kwargs=MultiModalKwargsItems.from_hf_inputs(tensors, fields),
            mm_hashes=hashes,
            mm_placeholders=ranges,
        )

    def engine_range(self, prompt: Prompt, runs: Sequence[Span]) -> PlaceholderRange:
        """The range of a medium's tokens, with a mask if not all of them are placeholders."""
        from vllm.multimodal.inputs import PlaceholderRange

        (run,) = runs
        return PlaceholderRange(offset=run.offset, length=run.length)


def prepare_tower(tower: Any, embedding: Any, convolution: str, cut: Callable[..., Iterator[Call]]) -> None:
    """Give a tower of patches rlvid's attention, a matrix product as patch embedding, and long clips in pieces.

    Args:
        embedding: the module that has the patch embedding, under the name `convolution`.
        cut: see `InPieces`.
    """
    from rlvid.models.attention import VISION_ATTENTION
    from rlvid.models.loading import PatchProjection
    from rlvid.models.tower import InPieces

    tower.config._attn_implementation = VISION_ATTENTION
    setattr(embedding, convolution, PatchProjection(getattr(embedding, convolution)))
    tower.forward = InPieces(tower, cut)


class Qwen25VL(QwenVL):
    """Qwen2.5-VL: time positions follow seconds. The windows of its tower are handled by transformers and vLLM."""

    vllm_module = "vllm.model_executor.models.qwen2_5_vl"
    processors = ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor")

    @classmethod
    def tiny_tower(cls, cfg: TinyModelConfig) -> dict[str, Any]:
        return {
            # Windows of 2 x 2 merged patches in every layer but the last, so that small clips have more than one.
            "window_size": 56,
            "fullatt_block_indexes": [cfg.vision_layers - 1],
            "tokens_per_second": 2,
        } | _sizes(cfg)

    def positions(self, prompt: Prompt) -> npt.NDArray[np.int32]:
        rate = self.vision.get("tokens_per_second", 4)
        steps = [float(np.float32(s)) * rate for s in prompt.seconds_per_patch]  # vLLM reads them from a float32 tensor
        return rotary_positions(prompt.length, prompt.spans, prompt.grid_thw, self.merge_size, steps)

    def engine_input(self, prompt: Prompt, **extras: torch.Tensor) -> Mapping[str, Any]:
        import torch

        seconds = torch.tensor(prompt.seconds_per_patch, dtype=torch.float32)
        return super().engine_input(prompt, second_per_grid_ts=seconds, **extras)


class Qwen3VL(QwenVL):
    """Qwen3-VL: each temporal patch is a run of its own that follows its time as text, so a video has several runs.

    As in vLLM 0.32 and transformers since 5.10, the runs replace the template's placeholder, and the vision tokens that
    the template writes around the placeholder stay (transformers 4 dropped these).
    """

    vllm_module = "vllm.model_executor.models.qwen3_vl"
    processors = ("Qwen3VLProcessor", "Qwen3VLVideoProcessor")
    tiny_rope: Mapping[str, Any] = {"mrope_section": [12, 10, 10], "mrope_interleaved": True}
    default_patch_size = 16

    @classmethod
    def tiny_tower(cls, cfg: TinyModelConfig) -> dict[str, Any]:
        layers = list(range(min(cfg.vision_layers, cfg.layers)))
        return {"num_position_embeddings": 64, "deepstack_visual_indexes": layers} | _sizes(cfg)

    def expand(self, clip: Clip, grid: Grid, kind: str) -> str:
        """The time of each temporal patch in seconds, which is the mean of its first and last frame, and the patch.

        Times are index / average frame rate, as in transformers' processor, also for files of variable frame rate.
        """
        if kind == "image":
            return super().expand(clip, grid, kind)
        size = self.temporal_patch
        indices = np.pad(clip.indices, (0, -len(clip.indices) % size), mode="edge")  # the last frame is repeated
        seconds = (indices / clip.fps).reshape(-1, size)
        run = VISION_START + self.placeholders[kind] * self.n_embeddings((1, *grid[1:])) + VISION_END
        return "".join(f"<{time_s:.1f} seconds>{run}" for time_s in (seconds[:, 0] + seconds[:, -1]) / 2)

    def positions(self, prompt: Prompt) -> npt.NDArray[np.int32]:
        frames = np.repeat(prompt.grid_thw, prompt.grid_thw[:, 0], axis=0)
        frames[:, 0] = 1
        return rotary_positions(prompt.length, prompt.spans, frames, self.merge_size)

    def n_runs(self, t: int) -> int:
        return t

    def engine_range(self, prompt: Prompt, runs: Sequence[Span]) -> PlaceholderRange:
        import torch
        from vllm.multimodal.inputs import PlaceholderRange

        if prompt.token_ids[runs[0].offset] == self.media_tokens["image"]:
            return super().engine_range(prompt, runs)
        # vLLM expects the range of a video to begin with the vision-start token of its first patch.
        first, end = runs[0].offset - 1, runs[-1].offset + runs[-1].length
        is_embed = torch.from_numpy(prompt.token_ids[first:end] == self.video_token)
        return PlaceholderRange(offset=first, length=end - first, is_embed=is_embed)


def _sizes(cfg: TinyModelConfig) -> dict[str, int]:
    """Widths of a tiny tower in the names of Qwen2.5-VL and later."""
    width = cfg.vision_size
    return {"out_hidden_size": cfg.hidden_size, "hidden_size": width, "intermediate_size": 2 * width}
