"""What all families share: tokenizer, chat template, and the escaping of special tokens in user text."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2.sandbox
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from rlvid.config import TinyModelConfig
from rlvid.errors import PromptTooLong, UserError
from rlvid.types import Clip, Message, Prompt, Sample, Span

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ChatFamily(ABC):
    """Makes prompts for the checkpoint in one folder. A subclass defines how videos are written in a prompt.

    Raises:
        UserError: the folder lacks a file that the family needs.
    """

    vllm_module: str | None = None  # that serves the family; None: vLLM does not
    vllm_class: str | None = None  # in it; None: the one called `architecture`
    default_template = CHAT_TEMPLATE  # if the checkpoint has none
    banned_tokens: tuple[int, ...]  # never sampled in a response
    towers: tuple[str, ...] = ()  # modules of `network.model` that are a vision tower
    no_lora: tuple[str, ...] = ()  # modules without adapters: vLLM supports them on the language model only
    tiny_tokens: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")  # special tokens of a tiny model's tokenizer
    end_token = "<|im_end|>"  # the special token that ends a response
    placeholders: Mapping[str, str] = {}  # by the kinds of media that it accepts: the token of a medium in a prompt
    is_recurrent = False  # its state belongs to one sequence: responses cannot share a prompt's forward
    frame_multiple: int  # height and width of a frame are multiples of this, pixels

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_json(folder / "config.json")
        try:
            self.architecture: str = self.config["architectures"][0]
        except (KeyError, IndexError, TypeError) as e:
            raise UserError(f"{folder / 'config.json'} has no architectures; give a Hugging Face checkpoint") from e
        tokenizer_file = folder / "tokenizer.json"
        if not tokenizer_file.exists():
            raise UserError(
                f"{tokenizer_file} is missing: rlvid needs the file of the fast tokenizer; save it with transformers"
            )
        self.tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self.end_of_turn = self.special(self.end_token)

    @abstractmethod
    def encode(self, sample: Sample, clips: Sequence[Clip], max_tokens: int | None = None) -> Prompt:
        """Return the prompt of `sample`, which is never truncated.

        Args:
            clips: decoded, one per `sample.media`; frames [T, H, W, 3] with H and W multiples of `frame_multiple`.
            max_tokens: longest prompt that leaves room for a response in the context.

        Raises:
            UserError: the prompt is longer than `max_tokens`, or its messages do not use each video exactly once.
        """

    def check_media(self, sample: Sample) -> None:
        """Check that the family accepts all media of `sample`.

        Raises:
            UserError: it does not.
        """
        for medium in sample.media:
            if medium.kind not in self.placeholders:
                accepted = " and ".join(["text", *(f"{kind}s" for kind in sorted(self.placeholders))])
                raise UserError(
                    f"sample {sample.id!r} has the {medium.kind} {medium.path}, but {self.architecture} in "
                    f"{self.folder} accepts only {accepted}; give another model, or a manifest without {medium.kind}s"
                )

    def engine_input(self, prompt: Prompt) -> Mapping[str, Any]:
        """The input for vLLM's `LLMEngine.add_request`, here of text alone."""
        from vllm.inputs import tokens_input

        return tokens_input(prompt.token_ids.tolist())

    def adapt_engine(self) -> bool:
        """Repair vLLM's class of this family, in the process of an engine. Idempotent. Returns whether there was
        something to repair: vLLM's workers in other processes do not have it."""
        return False

    def engine_limits(self, max_videos: int) -> dict[str, int]:
        """vLLM's limits on the number of media in a prompt, by kind."""
        return dict.fromkeys(self.placeholders, max_videos)

    def prepare(self, network: PreTrainedModel) -> None:  # noqa: B027  # most families have nothing to change
        """Change a loaded network as packed training needs it."""

    @classmethod  # noqa: B027  # as above
    def register(cls) -> None:
        """Register the network with transformers, if it is not one of transformers' own."""

    @classmethod
    @abstractmethod
    def tiny(cls, cfg: TinyModelConfig, text: dict[str, Any], tokenizer: Any) -> tuple[dict[str, Any], Any]:
        """Settings of a tiny model's transformers configuration, and its processor (for a text model, the tokenizer).

        Args:
            text: settings of the language model (`rlvid/models/tiny.py`).
        """

    @cached_property
    def chat_template(self) -> str:
        own = self.folder / "chat_template.jinja"
        if own.exists():
            return own.read_text(encoding="utf-8")
        for path in (self.folder / "chat_template.json", self.folder / "tokenizer_config.json"):
            if path.exists() and isinstance(template := read_json(path).get("chat_template"), str):
                return template
        return self.default_template

    @cached_property
    def opening(self) -> str:
        """Beginning of the response that the chat template writes: "<think>\\n" if it ends in that, else empty."""
        sample = Sample("", (), (Message("user", ("?",)),), "")
        prompt = self.tokenizer.decode(self.encode(sample, ()).token_ids.tolist(), skip_special_tokens=True)
        tag = re.search(r"<[A-Za-z][\w-]*>", after := prompt.rpartition("?")[2])
        return after[tag.start() :] if tag else ""

    def answered(
        self, sample: Sample, token_ids: npt.NDArray[np.int32], tokenize: Callable[[Sample], Sequence[int]]
    ) -> tuple[Span | None, ...]:
        """Where the assistant's turns of a conversation are in its prompt.

        Args:
            tokenize: a shorter conversation -> the tokens of its prompt.
        """
        spans: list[Span | None] = []
        for i, message in enumerate(sample.messages):
            if message.role != "assistant":
                continue
            if not i:  # templates need a first turn
                spans.append(None)
                continue
            before = np.array(tokenize(replace(sample, messages=sample.messages[:i])))
            answer = self.encode_answer(message.text)
            given = token_ids[: len(before) + len(answer)]
            is_there = np.array_equal(given, np.concatenate([before, answer]))
            spans.append(Span(len(before), len(answer)) if is_there else None)
        return tuple(spans)

    def encode_answer(self, text: str) -> npt.NDArray[np.int32]:
        """Token ids [R] of a response, with the end-of-turn token last."""
        return np.array([*self.tokens(self.escape(text)), self.end_of_turn], dtype=np.int32)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def tokens(self, text: str) -> list[int]:
        """Token ids of rendered text; special tokens in it are special."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def render(self, turns: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Render the chat template for `turns` (role, content), up to the start of the answer."""
        return _compiled(self.chat_template).render(messages=turns, add_generation_prompt=True, **variables)

    def escape(self, text: str) -> str:
        """Insert a zero-width space into special tokens in user text, so that they are tokenized as text.

        Added tokens that are not special (<think>, <tool_call>) stay as they are.
        """
        for token in self._special_tokens:
            text = text.replace(token, token[0] + ZERO_WIDTH_SPACE + token[1:])
        return text

    def check_length(self, sample: Sample, n_tokens: int, n_video: int, max_tokens: int | None) -> None:
        """Check that a prompt fits.

        Raises:
            PromptTooLong: it does not.
        """
        if max_tokens is None or n_tokens <= max_tokens:
            return
        smaller = "fewer video.frames, or a lower video.max_pixels or video.image_max_pixels"
        fix = f"start a new run with {smaller}" if n_video else "shorten the prompt"
        raise PromptTooLong(
            f"its prompt has {n_tokens} tokens ({n_video} of them video), but the context has "
            f"room for {max_tokens}. Prompts are never truncated: raise rollout.max_model_len (also "
            f"possible when resuming), or {fix}"
        )

    def special(self, token: str) -> int:
        """Id of a special token that this family needs."""
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(
                f"{self.folder / 'tokenizer.json'} has no token {token}; expected a chat model of type "
                f"{self.config.get('model_type')} (is this a base model?)"
            )
        return int(token_id)

    @cached_property
    def _special_tokens(self) -> list[str]:
        return [token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special]


@lru_cache
def _compiled(template: str) -> jinja2.Template:
    # A checkpoint's template is untrusted, so it runs in the sandbox that transformers uses.
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    env.globals["raise_exception"] = _raise_template_error
    # `{% generation %}` marks what is trained, an extension of transformers; here its content is simply printed.
    template = re.sub(r"({%[-+]?\s*)generation\b", r"\1if true", template)
    template = re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endif", template)
    return env.from_string(template)


def read_json(*paths: Path) -> dict[str, Any]:
    """Content of the first of `paths` that exists.

    Raises:
        UserError: none exists, or it is not valid JSON.
    """
    for path in paths:
        if path.exists():
            try:
                return dict(json.loads(path.read_text(encoding="utf-8")))
            except ValueError as e:
                raise UserError(f"{path}: not valid JSON: {e}") from e
    raise UserError(
        f"{paths[0]} is missing: give a Hugging Face checkpoint folder, or leave model.path empty and set model.tiny"
    )


def _raise_template_error(message: str) -> None:
    raise UserError(f"the checkpoint's chat template does not accept these messages: {message}")
