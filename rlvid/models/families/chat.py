"""The part of a prompt that all families share: tokenizer, chat template, and text that must stay text."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2.sandbox
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from rlvid.errors import UserError
from rlvid.types import Clip, Message, Prompt, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from vllm.inputs import MultiModalInput

    from rlvid.config import TinyModelConfig

END_OF_TURN = "<|im_end|>"
HEAD_DIM = 64  # of tiny models: vLLM on CPU refuses 16
ZERO_WIDTH_SPACE = "\u200b"

# ChatML as in Qwen/Qwen2-VL-2B-Instruct.
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


class ChatFamily(ABC):
    """Prompt side of one checkpoint folder. A family adds how videos stand in a prompt, if it takes any.

    Raises:
        UserError: the folder lacks a file that the family needs.
    """

    vllm_module: str | None = None  # where vLLM keeps the class called `architecture`; None: it does not serve it
    default_template = CHAT_TEMPLATE  # where the checkpoint brings none
    banned_tokens: tuple[int, ...]  # a response may not hold these
    towers: tuple[str, ...] = ()  # modules of `network.model` that are a vision tower
    no_lora: tuple[str, ...] = ()  # modules without adapters: vLLM takes them on the language model only
    tiny_tokens: tuple[str, ...] = ("<|im_start|>", END_OF_TURN)  # special tokens of a tiny model's tokenizer
    tiny_end = END_OF_TURN  # the one of them that ends a turn
    media_kinds: frozenset[str] = frozenset()  # of `Medium.kind`: what it takes
    frame_multiple: int  # height and width of a frame are multiples of this, pixels

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_json(folder / "config.json")
        try:
            self.architecture: str = self.config["architectures"][0]
        except (KeyError, IndexError, TypeError) as e:
            raise UserError(f"{folder / 'config.json'} does not name the model's architecture") from e
        tokenizer_file = folder / "tokenizer.json"
        if not tokenizer_file.exists():
            raise UserError(
                f"{tokenizer_file} is missing: rlvid needs the fast tokenizer's file; save it with transformers"
            )
        self.tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self.end_of_turn = self.special(self.end_of_turn_token())

    @abstractmethod
    def encode(self, sample: Sample, clips: Sequence[Clip], max_tokens: int | None = None) -> Prompt:
        """Make the prompt of `sample` from its decoded clips; never cut.

        Args:
            clips: one per `sample.media`, frames [T, H, W, 3] with H and W multiples of `frame_multiple`.
            max_tokens: longest prompt that fits the context beside a response.

        Raises:
            UserError: the prompt is longer than `max_tokens`, or its messages do not use each video exactly once.
        """

    def check_media(self, sample: Sample) -> None:
        """
        Raises:
            UserError: the family does not take a medium of `sample`.
        """
        for medium in sample.media:
            if medium.kind in self.media_kinds:
                continue
            if medium.kind == "image":
                raise UserError(f"sample {sample.id!r}: {medium.path}: images are not read yet; leave the row out")
            raise UserError(
                f"sample {sample.id!r} has a {medium.kind}, but {self.architecture} in {self.folder} takes text alone; "
                f"give a video-language model, or a manifest without videos"
            )

    @abstractmethod
    def engine_input(self, prompt: Prompt) -> MultiModalInput | dict[str, Any]:
        """What vLLM's `LLMEngine.add_request` takes for `prompt`."""

    def engine_limits(self, max_videos: int) -> dict[str, int]:
        """vLLM's limit of media in a prompt, by kind."""
        return {}

    def prepare(self, network: PreTrainedModel) -> None:  # noqa: B027  # most families have nothing to change
        """Change a loaded network where packed training asks for it."""

    @classmethod
    @abstractmethod
    def make_tiny(cls, cfg: TinyModelConfig, text: dict[str, Any], tokenizer: Any) -> tuple[PreTrainedModel, Any]:
        """A random network of this architecture, and its processor (of a text model the tokenizer).

        Args:
            text: settings of the language model (`rlvid/models/tiny.py`).
        """

    def end_of_turn_token(self) -> str:
        """The special token that ends a response."""
        return END_OF_TURN

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
        return self.default_template

    @cached_property
    def opening(self) -> str:
        """The text with which a prompt begins the response, from its first tag on: "<think>\\n" where the chat template
        opens it, else nothing."""
        sample = Sample("", (), (Message("user", ("?",)),), "")
        prompt = self.tokenizer.decode(self.encode(sample, ()).token_ids.tolist(), skip_special_tokens=True)
        tag = re.search(r"<[A-Za-z][\w-]*>", after := prompt.rpartition("?")[2])
        return after[tag.start() :] if tag else ""

    def encode_answer(self, text: str) -> npt.NDArray[np.int32]:
        """Token ids [R] of a response, the end-of-turn token last."""
        return np.array([*self.tokens(self.escape(text)), self.end_of_turn], dtype=np.int32)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def tokens(self, text: str) -> list[int]:
        """Token ids of rendered text; special tokens in it count as such."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def render(self, turns: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The chat template on `turns` (role, content), up to where the answer begins."""
        # A checkpoint's template is untrusted: the sandbox is the one that transformers uses.
        env = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        env.globals["raise_exception"] = _raise_template_error
        return env.from_string(self.chat_template).render(messages=turns, add_generation_prompt=True, **variables)

    def escape(self, text: str) -> str:
        """Special tokens written out in user text stay text: a zero-width space breaks them up.

        Added tokens that are not special (<think>, <tool_call>) are ordinary words to a model that has them.
        """
        for token in self._special_tokens:
            text = text.replace(token, token[0] + ZERO_WIDTH_SPACE + token[1:])
        return text

    def check_length(self, sample: Sample, n_tokens: int, n_video: int, max_tokens: int | None) -> None:
        """Raises UserError where a prompt does not fit."""
        if max_tokens is None or n_tokens <= max_tokens:
            return
        fix = "start a new run with fewer video.frames or a lower video.max_pixels" if n_video else "shorten the prompt"
        raise UserError(
            f"sample {sample.id!r}: its prompt has {n_tokens} tokens ({n_video} of them video), the context leaves "
            f"{max_tokens}. Prompts are never cut: raise rollout.max_model_len (a resumed run may), or {fix}"
        )

    def special(self, token: str) -> int:
        """Id of a special token that this family cannot do without."""
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(
                f"{self.folder / 'tokenizer.json'} has no token {token}: no checkpoint of "
                f"{self.config.get('model_type')}, or a base model without chat tokens?"
            )
        return int(token_id)

    @cached_property
    def _special_tokens(self) -> list[str]:
        return [token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special]


def read_json(*paths: Path) -> dict[str, Any]:
    """The first of `paths` that exists.

    Raises:
        UserError: none exists, or it is no JSON.
    """
    for path in paths:
        if path.exists():
            try:
                return dict(json.loads(path.read_text(encoding="utf-8")))
            except ValueError as e:
                raise UserError(f"{path}: not valid JSON: {e}") from e
    raise UserError(f"{paths[0]} is missing: model.path must name a Hugging Face checkpoint folder")


def _raise_template_error(message: str) -> None:
    raise UserError(f"the checkpoint's chat template refuses these messages: {message}")
