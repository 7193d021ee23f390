"""Language models without a vision tower: prompts are only text, and positions have one axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlvid.errors import UserError
from rlvid.models.families.chat import HEAD_DIM, ChatFamily, read_json
from rlvid.types import Clip, Prompt, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlvid.config import TinyModelConfig


class TextModel(ChatFamily):
    """A causal language model. It does not accept samples with videos.

    Raises:
        UserError: the folder lacks a file that the family needs.
    """

    frame_multiple = 1
    banned_tokens = ()

    def __init__(self, folder: Path):
        tokenizer = read_json(folder / "tokenizer_config.json")
        self._named = {name: _content(tokenizer.get(name)) for name in ("bos_token", "eos_token")}
        super().__init__(folder)
        self.vllm_module = f"vllm.model_executor.models.{self.config['model_type']}"

    def end_of_turn_token(self) -> str:
        """The eos_token of the tokenizer: <|im_end|> in Qwen's chat models, <|eot_id|> in Llama 3's."""
        token = self._named["eos_token"]
        if token is None:
            raise UserError(
                f"{self.folder / 'tokenizer_config.json'} has no eos_token, which is needed to end a response"
            )
        return token

    def encode(self, sample: Sample, clips: Sequence[Clip], max_tokens: int | None = None) -> Prompt:
        self.check_media(sample)
        # Chat templates of text models expect a message's content as one string.
        turns = [{"role": m.role, "content": self.escape(m.text)} for m in sample.messages]
        named = {name: token for name, token in self._named.items() if token is not None}
        token_ids = self.tokens(self.render(turns, **named))
        self.check_length(sample, len(token_ids), 0, max_tokens)
        return Prompt(
            sample_id=sample.id,
            token_ids=np.array(token_ids, dtype=np.int32),
            patches=np.zeros((0, 0), dtype=np.uint8),
            grid_thw=np.zeros((0, 3), dtype=np.int64),
            spans=(),
            positions=np.arange(len(token_ids), dtype=np.int32)[None],
            clip_ids=(),
        )

    @classmethod
    def make_tiny(cls, cfg: TinyModelConfig, text: dict[str, Any], tokenizer: Any) -> tuple[PreTrainedModel, Any]:
        import transformers

        name = {"qwen2": "Qwen2", "qwen3": "Qwen3"}[cfg.family]
        if cfg.family == "qwen3":
            text = text | {"head_dim": HEAD_DIM}
        config = getattr(transformers, f"{name}Config")(**text)
        return getattr(transformers, f"{name}ForCausalLM")(config), tokenizer

    def engine_input(self, prompt: Prompt) -> dict[str, Any]:
        from vllm.inputs import tokens_input

        return dict(tokens_input(prompt.token_ids.tolist()))


def _content(token: Any) -> str | None:
    """Text of a special token in tokenizer_config.json, where it is a string or an object with `content`."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None
