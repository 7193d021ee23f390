"""Qwen2-VL: how a sample becomes a prompt, its rotary positions, and what the engine is given.

This part needs neither torch nor transformers, so that decoding workers stay light. Prompts follow the checkpoint's own
chat template; patches are those of the checkpoint's video processor before normalisation (checked against it in
tests/models/families/test_qwen_vl.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2.sandbox
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from rlvid.errors import UserError
from rlvid.types import Clip, Message, Prompt, Sample, Span, VideoRef

if TYPE_CHECKING:
    from vllm.inputs import MultiModalInput

VIDEO_PLACEHOLDER = "<|video_pad|>"
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", VIDEO_PLACEHOLDER)
END_OF_TURN = "<|im_end|>"
ZERO_WIDTH_SPACE = "\u200b"

# Used where the checkpoint brings no template: ChatML as in Qwen/Qwen2-VL-2B-Instruct.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class QwenVL:
    """The family's prompt side for one checkpoint folder.

    Raises:
        UserError: the folder lacks a file that the family needs.
    """

    vllm_module = "vllm.model_executor.models.qwen2_vl"

    def __init__(self, folder: Path):
        self.folder = folder
        config = _read_json(folder / "config.json")
        processor = _read_json(
            folder / "video_preprocessor_config.json",
            folder / "preprocessor_config.json",
            folder / "processor_config.json",
        )
        processor = processor.get("video_processor", processor)
        try:
            self.architecture: str = config["architectures"][0]
            vision = config["vision_config"]
            self.patch_size: int = vision.get("patch_size", 14)
            self.merge_size: int = vision.get("spatial_merge_size", 2)
            self.temporal_patch: int = vision.get("temporal_patch_size", 2)
            self.pixel_mean: list[float] = processor["image_mean"]
            self.pixel_std: list[float] = processor["image_std"]
        except (KeyError, IndexError, TypeError) as e:
            raise UserError(
                f"{folder}: config.json or the processor's configuration lacks {e}: no Qwen2-VL checkpoint?"
            ) from e
        tokenizer_file = folder / "tokenizer.json"
        if not tokenizer_file.exists():
            raise UserError(
                f"{tokenizer_file} is missing: rlvid needs the fast tokenizer's file; save it with transformers"
            )
        self.tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self.video_token = self._special(VIDEO_PLACEHOLDER)
        self.end_of_turn = self._special(END_OF_TURN)

    @property
    def frame_multiple(self) -> int:
        """Height and width of a frame are multiples of this, pixels."""
        return self.patch_size * self.merge_size

    @cached_property
    def banned_tokens(self) -> tuple[int, ...]:
        """Tokens a response may not hold: a sampled placeholder would ask for features that are not there."""
        ids = (self.tokenizer.token_to_id(token) for token in VISION_TOKENS)
        return tuple(i for i in ids if i is not None)

    @cached_property
    def chat_template(self) -> str:
        for path in (
            self.folder / "chat_template.jinja",
            self.folder / "chat_template.json",
            self.folder / "tokenizer_config.json",
        ):
            if not path.exists():
                continue
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".jinja":
                return text
            template = json.loads(text).get("chat_template")
            if isinstance(template, str):
                return template
        return CHAT_TEMPLATE

    def encode(self, sample: Sample, clips: Sequence[Clip], max_tokens: int | None = None) -> Prompt:
        """Make the prompt of `sample` from its decoded clips; never cut.

        Args:
            clips: one per `sample.videos`, frames [T, H, W, 3] with H and W multiples of `frame_multiple`.
            max_tokens: longest prompt that fits the context beside a response.

        Raises:
            UserError: the prompt is longer than `max_tokens`, or its messages do not use each video exactly once.
        """
        grids, patches = zip(*(self.patchify(clip.frames) for clip in clips), strict=True) if clips else ((), ())
        counts = [int(t * h * w) // self.merge_size**2 for t, h, w in grids]
        token_ids, spans = self._tokenize(sample, counts)
        if max_tokens is not None and len(token_ids) > max_tokens:
            raise UserError(
                f"sample {sample.id!r}: its prompt has {len(token_ids)} tokens ({sum(counts)} of them video), the "
                f"context leaves "
                f"{max_tokens}. Prompts are never cut: lower video.frames or video.max_pixels, or raise "
                f"rollout.max_model_len"
            )
        grid_thw = np.array(grids, dtype=np.int64).reshape(-1, 3)
        return Prompt(
            sample_id=sample.id,
            token_ids=np.array(token_ids, dtype=np.int32),
            patches=np.concatenate(patches) if patches else np.zeros((0, self.patch_dim), dtype=np.uint8),
            grid_thw=grid_thw,
            spans=tuple(spans),
            positions=rotary_positions(len(token_ids), spans, grid_thw, self.merge_size),
            clip_ids=tuple(clip.clip_id for clip in clips),
        )

    @property
    def patch_dim(self) -> int:
        return 3 * self.temporal_patch * self.patch_size**2

    def patchify(self, frames: npt.NDArray[np.uint8]) -> tuple[tuple[int, int, int], npt.NDArray[np.uint8]]:
        """Cut frames [T, H, W, 3] into patches [t*h*w, 3 * temporal_patch * patch * patch], merge blocks together.

        An odd last frame is repeated, as transformers' Qwen2VLVideoProcessor does. Returns the grid (t, h, w) too.
        """
        p, m, s = self.patch_size, self.merge_size, self.temporal_patch
        if missing := -len(frames) % s:
            frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
        n, height, width, _ = frames.shape
        t, h, w = n // s, height // p, width // p
        blocks = frames.reshape(t, s, h // m, m, p, w // m, m, p, 3)
        return (t, h, w), blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, self.patch_dim)

    def encode_answer(self, text: str) -> npt.NDArray[np.int32]:
        """Token ids [R] of a response, the end-of-turn token last."""
        ids = self.tokenizer.encode(self._escape(text), add_special_tokens=False).ids
        return np.array([*ids, self.end_of_turn], dtype=np.int32)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def engine_input(self, prompt: Prompt) -> MultiModalInput | dict[str, Any]:
        """What vLLM's `LLMEngine.add_request` takes: our token ids, uint8 patches, and clip ids as cache keys.

        `LLM.generate` would drop the video without a word, and float patches would be normalised twice
        (measured with vLLM 0.32): only this form equals vLLM's own path.
        """
        import torch
        from vllm.inputs import mm_input, tokens_input
        from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

        ids = prompt.token_ids.tolist()
        if not prompt.spans:
            return dict(tokens_input(ids))
        grid = torch.from_numpy(prompt.grid_thw.copy())
        fields = {
            "pixel_values_videos": MultiModalFieldConfig.flat_from_sizes("video", grid.prod(-1)),
            "video_grid_thw": MultiModalFieldConfig.batched("video", keep_on_cpu=True),
        }
        # The array is a read-only view into the object store; torch wants a writable one, and copying is cheap here.
        tensors = {"pixel_values_videos": torch.from_numpy(prompt.patches.copy()), "video_grid_thw": grid}
        return mm_input(
            prompt_token_ids=ids,
            mm_kwargs=MultiModalKwargsItems.from_hf_inputs(tensors, fields),
            mm_hashes={"video": list(prompt.clip_ids)},
            mm_placeholders={"video": [PlaceholderRange(offset=s.offset, length=s.length) for s in prompt.spans]},
        )

    def _tokenize(self, sample: Sample, counts: Sequence[int]) -> tuple[list[int], list[Span]]:
        """Render the conversation, then put each video's placeholder run where its single placeholder stands."""
        seen = [part.index for m in sample.messages for part in m.content if isinstance(part, VideoRef)]
        if seen != list(range(len(counts))):
            raise UserError(
                f"sample {sample.id!r}: its messages use videos {seen}, but it has {len(counts)}; use each once, in "
                f"order"
            )
        pieces = self._render(sample.messages).split(VIDEO_PLACEHOLDER)
        if len(pieces) != len(counts) + 1:
            raise UserError(
                f"{self.folder}: the chat template made {len(pieces) - 1} video placeholders for {len(counts)} videos"
            )
        ids: list[int] = []
        spans: list[Span] = []
        for i, piece in enumerate(pieces):
            ids += self.tokenizer.encode(piece, add_special_tokens=False).ids
            if i < len(counts):
                spans.append(Span(len(ids), counts[i]))
                ids += [self.video_token] * counts[i]
        return ids, spans

    def _render(self, messages: Sequence[Message]) -> str:
        # A checkpoint's template is untrusted: the sandbox is the one that transformers uses.
        env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        env.globals["raise_exception"] = _raise_template_error
        turns = [{"role": m.role, "content": [self._part(part) for part in m.content]} for m in messages]
        return env.from_string(self.chat_template).render(messages=turns, add_generation_prompt=True)

    def _part(self, part: str | VideoRef) -> dict[str, str]:
        if isinstance(part, VideoRef):
            return {"type": "video"}
        return {"type": "text", "text": self._escape(part)}

    def _escape(self, text: str) -> str:
        """Special tokens written out in user text stay text: a zero-width space breaks them up."""
        for token in self._special_tokens:
            text = text.replace(token, token[0] + ZERO_WIDTH_SPACE + token[1:])
        return text

    @cached_property
    def _special_tokens(self) -> list[str]:
        return [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]

    def _special(self, token: str) -> int:
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(f"{self.folder / 'tokenizer.json'} has no token {token}: not a Qwen-VL checkpoint?")
        return int(token_id)


def rotary_positions(
    n_tokens: int, spans: Sequence[Span], grid_thw: npt.NDArray[np.int64], merge_size: int
) -> npt.NDArray[np.int32]:
    """Positions [3, n_tokens] (time, height, width) of a prompt, the way vLLM and transformers 4 count them.

    Text counts on from the largest position so far + 1. transformers 5.19 counts on from max(height, width) of the
    video instead, ignoring its time axis, which differs whenever merged T > max(H, W).
    """
    positions = np.empty((3, n_tokens), dtype=np.int32)
    done, following = 0, 0
    for span, (t, h, w) in zip(spans, grid_thw, strict=True):
        n_text = span.offset - done
        positions[:, done : span.offset] = following + np.arange(n_text)
        following += n_text
        axes = np.indices((t, h // merge_size, w // merge_size)).reshape(3, -1)
        if axes.shape[1] != span.length:
            raise ValueError(f"placeholder run of {span.length} tokens for a grid of {axes.shape[1]}")
        done = span.offset + span.length
        positions[:, span.offset : done] = following + axes
        following += int(axes.max()) + 1
    positions[:, done:] = following + np.arange(n_tokens - done)
    return positions


def _read_json(*paths: Path) -> dict[str, Any]:
    for path in paths:
        if path.exists():
            try:
                return dict(json.loads(path.read_text(encoding="utf-8")))
            except ValueError as e:
                raise UserError(f"{path}: not valid JSON: {e}") from e
    raise UserError(f"{paths[0]} is missing: model.path must name a Hugging Face checkpoint folder")


def _raise_template_error(message: str) -> None:
    raise UserError(f"the checkpoint's chat template refuses these messages: {message}")
