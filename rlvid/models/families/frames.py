"""Families whose vision tower takes frames as images: Idefics2 (Mantis, VideoScore) and Video-LLaVA.

vLLM serves neither of them: `rlvid/rollout/hf_engine.py` generates. Token ids and pixels equal those of transformers'
processors (compared in tests/models/families/test_frames.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rlvid.config import TinyModelConfig
from rlvid.errors import PromptTooLong, UserError
from rlvid.models.families.chat import HEAD_DIM
from rlvid.models.families.vision import Grid, VisionFamily, side_of
from rlvid.types import Clip, Prompt, Sample

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

IMAGE, FAKE_AROUND_IMAGE = "<image>", "<fake_token_around_image>"
VIDEO = "<video>"


class FrameFamily(VisionFamily):
    """A family whose tower takes whole frames: they travel as patches, and are put together again here."""

    vision_tokens: tuple[str, ...] = (IMAGE, VIDEO, FAKE_AROUND_IMAGE)

    def prepare(self, network: PreTrainedModel) -> None:
        """Long clips go through the tower in pieces."""
        from rlvid.models.tower import InPieces, cut_frames

        for name in self.towers:
            tower = network.get_submodule(f"model.{name}")
            tower.forward = InPieces(tower, partial(cut_frames, patch_size=self.patch_size))

    def tower_passes(self, grids: Sequence[Grid]) -> int:
        from rlvid.models.tower import PATCHES_AT_A_TIME, frames_in_piece

        size = frames_in_piece(max(h for _, h, _ in grids), max(w for _, _, w in grids), PATCHES_AT_A_TIME)
        return -(-sum(t for t, _, _ in grids) // size)

    def images(self, patches: Tensor, grid: Sequence[int]) -> Tensor:
        """Patches [t*h*w, 3*p*p] of a clip -> its frames [t, 3, h*p, w*p]."""
        (t, h, w), p = grid, self.patch_size
        return patches.view(t, h, w, 3, p, p).permute(0, 3, 1, 4, 2, 5).reshape(t, 3, h * p, w * p)


def tiny_tower(cfg: TinyModelConfig, image_size: int) -> dict[str, Any]:
    return {
        "hidden_size": cfg.vision_size,
        "intermediate_size": 2 * cfg.vision_size,
        "num_hidden_layers": cfg.vision_layers,
        "num_attention_heads": max(1, cfg.vision_size // HEAD_DIM),
        "image_size": image_size,
        "patch_size": 14,
    }


class Idefics2(FrameFamily):
    """Idefics2 and Mantis-Idefics2: each frame is an image of any size and becomes a fixed number of latents.

    Frames of a clip are separated by a space, as in VideoScore's prompts.

    Raises:
        UserError: the folder lacks a file that the family needs.
    """

    placeholders: Mapping[str, str] = {"video": IMAGE, "image": IMAGE}
    part_types: Mapping[str, str] = {"video": "image", "image": "image"}
    towers = ("vision_model",)
    tiny_tokens = ("<end_of_utterance>", IMAGE, FAKE_AROUND_IMAGE)
    end_token = "<end_of_utterance>"
    default_template = (
        "{% for message in messages %}{{ message['role'].capitalize() }}"
        "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    )

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.frame_multiple = self.patch_size
        self.n_latents: int = self.config.get("perceiver_config", {}).get("resampler_n_latents", 64)
        self._window: int | None = self.config.get("text_config", {}).get("sliding_window")

    @classmethod
    def tiny(cls, cfg: TinyModelConfig, text: dict[str, Any], tokenizer: Any) -> tuple[dict[str, Any], Any]:
        import transformers

        heads = text["num_attention_heads"]
        resampler = {"hidden_size": cfg.hidden_size, "resampler_depth": 1, "resampler_n_latents": 8}
        resampler |= {"resampler_n_heads": heads, "num_key_value_heads": heads, "resampler_head_dim": HEAD_DIM}
        settings = {
            "text_config": {"model_type": "mistral", **text, "sliding_window": None},
            "vision_config": tiny_tower(cfg, 140),
            "perceiver_config": {**resampler, "rms_norm_eps": 1e-6},
            "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE),
        }
        images = transformers.Idefics2ImageProcessor(do_image_splitting=False)
        template = cls.default_template
        return settings, transformers.Idefics2Processor(images, tokenizer, image_seq_len=8, chat_template=template)

    def check_length(self, sample: Sample, n_tokens: int, n_video: int, max_tokens: int | None) -> None:
        """Also check the sliding window of Mistral, which packed attention does not support."""
        super().check_length(sample, n_tokens, n_video, max_tokens)
        if self._window is not None and n_tokens > self._window:
            raise PromptTooLong(
                f"its prompt has {n_tokens} tokens, but the model's window has {self._window}. "
                f"Prompts are never truncated: give another run.dir and fewer video.frames"
            )

    def expand(self, clip: Clip, grid: Grid, kind: str) -> str:
        return " ".join([FAKE_AROUND_IMAGE + IMAGE * self.n_latents + FAKE_AROUND_IMAGE] * grid[0])

    def finish(self, text: str) -> str:
        """As the processor does: one token between adjacent images, and a space between an image and a word."""
        text = text.replace(FAKE_AROUND_IMAGE * 2, FAKE_AROUND_IMAGE)
        return re.sub(rf"{FAKE_AROUND_IMAGE}(?=[^\s<])", f"{FAKE_AROUND_IMAGE} ", text)

    def n_embeddings(self, grid: Grid) -> int:
        return grid[0] * self.n_latents

    def network_inputs(self, patches: Tensor, grid_thw: Tensor) -> dict[str, Tensor]:
        """Images are padded to the largest; the mask is True for pixels that are not padding."""
        import torch
        from torch.nn.functional import pad

        grids = grid_thw.tolist()
        sizes = [t * h * w for t, h, w in grids]
        clips = [self.images(x, grid) for x, grid in zip(patches.split(sizes), grids, strict=True)]
        height, width = (max(clip.shape[axis] for clip in clips) for axis in (2, 3))
        rooms = [(0, width - clip.shape[3], 0, height - clip.shape[2]) for clip in clips]
        pixels = [pad(clip, room) for clip, room in zip(clips, rooms, strict=True)]
        mask = [pad(torch.ones_like(x[:, 0], dtype=torch.bool), room) for x, room in zip(clips, rooms, strict=True)]
        return {"pixel_values": torch.cat(pixels)[None], "pixel_attention_mask": torch.cat(mask)[None]}


class SquareFrames(FrameFamily):
    """A family whose tower takes frames of one size: the fixed position embeddings of its patches say which.

    vLLM takes the clips of those that it serves one by one, as `pixel_values_videos`.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.frame_multiple = side_of(self.vision.get("image_size", 224))

    def check_frames(self, frames: npt.NDArray[np.uint8]) -> None:
        """
        Raises:
            UserError: frames [T, H, W, 3] have another size.
        """
        side = self.frame_multiple
        if frames.shape[1:3] != (side, side):
            raise UserError(
                f"{self.architecture} accepts only frames of {side} x {side} pixels, not {frames.shape[2]} x "
                f"{frames.shape[1]}: set video.height and video.width to {side}"
            )

    def patchify(self, frames: npt.NDArray[np.uint8]) -> tuple[Grid, npt.NDArray[np.uint8]]:
        """The edge beyond the last whole patch (6 of 384 pixels) is left out: the tower's convolution skips it."""
        self.check_frames(frames)
        whole = self.frame_multiple // self.patch_size * self.patch_size
        return super().patchify(frames[:, :whole, :whole])

    def clips(self, patches: Tensor, grid_thw: Tensor) -> list[Tensor]:
        """The frames [t, 3, H, W] of each medium, of the size that the tower asks for."""
        from torch.nn.functional import pad

        grids = grid_thw.tolist()
        frames = map(self.images, patches.split(grid_thw.prod(dim=1).tolist()), grids)
        room = self.frame_multiple % self.patch_size
        return [pad(own, (0, room, 0, room)) for own in frames]

    def network_inputs(self, patches: Tensor, grid_thw: Tensor) -> dict[str, Tensor]:
        """Frames [n, 3, H, W] of all media."""
        import torch

        return {"pixel_values": torch.cat(self.clips(patches, grid_thw))}

    def expand(self, clip: Clip, grid: Grid, kind: str) -> str:
        return self.placeholders[kind] * self.n_embeddings(grid)

    def engine_input(self, prompt: Prompt) -> Mapping[str, Any]:
        """Token ids, normalised frames, and clip ids as cache keys."""
        if not prompt.spans:
            return super().engine_input(prompt)
        import torch
        from vllm.inputs import mm_input
        from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

        from rlvid.models.tower import normalise

        runs, ranges = iter(prompt.spans), []
        for t in prompt.grid_thw[:, 0].tolist():
            own = [next(runs) for _ in range(self.n_runs(t))]
            first, end = own[0].offset, own[-1].offset + own[-1].length
            is_embed = torch.from_numpy(prompt.token_ids[first:end] == self.video_token)
            ranges.append(PlaceholderRange(offset=first, length=end - first, is_embed=is_embed))
        pixels = normalise(torch.from_numpy(prompt.patches), self, torch.float32)
        tensors, fields = self.engine_clips(self.clips(pixels, torch.from_numpy(prompt.grid_thw)))
        return mm_input(
            prompt_token_ids=prompt.token_ids.tolist(),
            mm_kwargs=MultiModalKwargsItems.from_hf_inputs(tensors, fields),
            mm_hashes={"video": list(prompt.clip_ids)},
            mm_placeholders={"video": ranges},
        )

    def engine_clips(self, clips: list[Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """vLLM's tensors of some clips [t, 3, H, W], and which part of each tensor belongs to which clip."""
        from vllm.multimodal.inputs import MultiModalFieldConfig

        return {"pixel_values_videos": clips}, {"pixel_values_videos": MultiModalFieldConfig.batched("video")}


def name_tower_for_vllm(theirs: Any) -> None:
    """vLLM 0.32 knows the tower's weights only under the names of transformers 4."""
    pattern = re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)")
    theirs.hf_to_vllm_mapper.orig_to_new_regex[pattern] = "vision_tower.vision_model."


class VideoLlava(SquareFrames):
    """Video-LLaVA: square frames of one size, with one token for each patch and one for the frame.

    Raises:
        UserError: the folder lacks a file that the family needs.
    """

    placeholders: Mapping[str, str] = {"video": VIDEO}
    towers = ("video_tower",)
    tiny_tokens = ("</s>", IMAGE, VIDEO)
    end_token = "</s>"
    default_template = (
        "{% for message in messages %}"
        "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
        "{% for part in message['content'] if part['type'] == 'video' %}<video>\n{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )

    def prepare(self, network: PreTrainedModel) -> None:
        super().prepare(network)
        network.model.image_tower.requires_grad_(False)  # videos do not use it

    @classmethod
    def tiny(cls, cfg: TinyModelConfig, text: dict[str, Any], tokenizer: Any) -> tuple[dict[str, Any], Any]:
        import transformers

        side = 56
        settings = {
            "text_config": {"model_type": "llama", **text},
            "vision_config": {"model_type": "clip_vision_model", **tiny_tower(cfg, side)},
            "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE),
            "video_token_id": tokenizer.convert_tokens_to_ids(VIDEO),
            "video_seq_length": 8 * ((side // 14) ** 2 + 1),
        }
        size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        processor = transformers.VideoLlavaProcessor(
            image_processor=transformers.CLIPImageProcessor(**size),
            video_processor=transformers.VideoLlavaVideoProcessor(**size),
            tokenizer=tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            chat_template=cls.default_template,
        )
        return settings, processor

    def n_embeddings(self, grid: Grid) -> int:
        t, h, w = grid
        return t * (h * w + 1)

    def network_inputs(self, patches: Tensor, grid_thw: Tensor) -> dict[str, Tensor]:
        """All clips are given as one: the tower treats each frame separately."""
        return {"pixel_values_videos": super().network_inputs(patches, grid_thw)["pixel_values"][None]}
