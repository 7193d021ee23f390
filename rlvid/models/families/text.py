"""Language models without a vision tower: prompts are only text, and positions have one axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlvid.config import TinyModelConfig
from rlvid.errors import UserError
from rlvid.models.families.chat import ChatFamily, read_json
from rlvid.types import Clip, Prompt, Sample


class TextModel(ChatFamily):
    """A causal language model. It does not accept samples with videos.

    Raises:
        UserError: the folder lacks a file that the family needs.
    """

    vllm_module = "vllm.model_executor.models"  # in it, the module of the model's type
    frame_multiple = 1
    banned_tokens = ()

    def __init__(self, folder: Path):
        file = folder / "tokenizer_config.json"
        self._named: dict[str, str] = {}
        for name in ("bos_token", "eos_token"):
            token = read_json(file).get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                self._named[name] = token
        if "eos_token" not in self._named:
            raise UserError(f"{file} has no eos_token, which is needed to end a response")
        self.end_token = self._named["eos_token"]  # <|im_end|> in Qwen's chat models, <|eot_id|> in Llama 3's
        super().__init__(folder)
        self.vllm_module = f"vllm.model_executor.models.{self.config['model_type']}"

    def encode(self, sample: Sample, clips: Sequence[Clip], max_tokens: int | None = None) -> Prompt:
        self.check_media(sample)
        ids = np.array(self._tokenize(sample), dtype=np.int32)
        self.check_length(sample, len(ids), 0, max_tokens)
        positions = np.arange(len(ids), dtype=np.int32)[None]
        return Prompt(sample.id, ids, positions, answered=self.answered(sample, ids, self._tokenize))

    def _tokenize(self, sample: Sample) -> list[int]:
        # Chat templates of text models expect a message's content as one string.
        turns = [{"role": m.role, "content": self.escape(m.text)} for m in sample.messages]
        return self.tokens(self.render(turns, **self._named))

    @classmethod
    def tiny(cls, cfg: TinyModelConfig, text: dict[str, Any], tokenizer: Any) -> tuple[dict[str, Any], Any]:
        return text, tokenizer
