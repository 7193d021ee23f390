"""Cobra's network for transformers: DINOv2 and SigLIP features side by side, a projector, and Mamba.

`python -m rlvid.models.cobra_network OUT --dino A --siglip B --mamba C` composes a checkpoint from Hugging Face
checkpoints of the parts. Cobra's are facebook/dinov2-with-registers-large, google/siglip-so400m-patch14-384 and a
Mamba-2.8B in transformers' format. Its own checkpoints are those of prismatic-vlms: `--projector` takes the projector
of one. Source of the architecture: arXiv 2403.14520.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    GenerationMixin,
    LlavaProcessor,
    MambaConfig,
    MambaForCausalLM,
    MambaModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from rlvid.models.attention import SharedPrefixLayout

LAYER = -2  # the towers' features are the output of the layer before the last
DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class CobraConfig(PreTrainedConfig):
    model_type = "cobra"
    sub_configs = {  # noqa: RUF012  # as transformers has it
        "text_config": MambaConfig,
        "dino_config": Dinov2WithRegistersConfig,
        "vision_config": SiglipVisionConfig,
    }

    def __init__(
        self, text_config: Any = None, dino_config: Any = None, vision_config: Any = None, **others: Any
    ) -> None:
        parts = text_config, dino_config, vision_config
        for (name, kind), given in zip(self.sub_configs.items(), parts, strict=True):
            setattr(self, name, given if isinstance(given, PreTrainedConfig) else kind(**(given or {})))
        others.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**others)


class CobraPreTrainedModel(PreTrainedModel):
    config_class = CobraConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("MambaBlock",)


class CobraModel(CobraPreTrainedModel):
    """Towers, projector and language model.

    Only DINOv2's patch tokens are used, not its class and register tokens.
    """

    def __init__(self, config: CobraConfig):
        super().__init__(config)
        self.dino = Dinov2WithRegistersModel(config.dino_config)
        self.siglip = SiglipVisionModel(config.vision_config)
        config.text_config._attn_implementation = "eager"  # it has no attention, and refuses other values
        config.text_config.use_mambapy = True  # where its kernels are not installed: a parallel scan
        self.language_model = MambaModel(config.text_config)
        wide, width = config.dino_config.hidden_size + config.vision_config.hidden_size, config.text_config.hidden_size
        self.multi_modal_projector = nn.Sequential(  # "fused-gelu-mlp"
            nn.Linear(wide, 4 * wide), nn.GELU(), nn.Linear(4 * wide, width), nn.GELU(), nn.Linear(width, width)
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embeddings

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Frames [n, 3, H, W], normalised as SigLIP's -> embeddings [n * patches, D]."""
        mean, std = (pixel_values.new_tensor(x)[:, None, None] for x in (DINO_MEAN, DINO_STD))
        for_dino = (pixel_values * 0.5 + 0.5 - mean) / std
        seen = self.dino(pixel_values=for_dino, output_hidden_states=True).hidden_states[LAYER]
        seen = seen[:, 1 + self.config.dino_config.num_register_tokens :]
        named = self.siglip(pixel_values=pixel_values, output_hidden_states=True).hidden_states[LAYER]
        features: Tensor = self.multi_modal_projector(torch.cat([seen, named], dim=-1)).flatten(0, 1)
        return features

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        shared_prefix: SharedPrefixLayout | None = None,
        use_cache: bool = False,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: [batch, tokens].
            shared_prefix: of one packed row: its sequences are computed apart, each with its prompt.
        """
        is_image = input_ids == self.config.image_token_id
        embeds = self.language_model.embeddings(input_ids.masked_fill(is_image, 0))
        if pixel_values is not None:
            embeds = embeds.masked_scatter(is_image[..., None], self.image_features(pixel_values).to(embeds.dtype))
        if shared_prefix is not None:
            row = _apart(self.language_model, embeds[0], shared_prefix)
            return BaseModelOutputWithPast(last_hidden_state=row[None])
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            attention_mask = None  # one more token of each sequence: none is padding
        out = self.language_model(
            inputs_embeds=embeds, attention_mask=attention_mask, cache_params=past_key_values, use_cache=use_cache
        )
        return BaseModelOutputWithPast(last_hidden_state=out.last_hidden_state, past_key_values=past_key_values)


class CobraForConditionalGeneration(CobraPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: CobraConfig):
        super().__init__(config)
        self.model = CobraModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **inputs: Any) -> CausalLMOutputWithPast:
        """Logits [batch, tokens, vocabulary], of the last `logits_to_keep` tokens or of all."""
        out = self.model(input_ids, **inputs)
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)


def _apart(language_model: MambaModel, row: Tensor, layout: SharedPrefixLayout) -> Tensor:
    """Outputs [N, D] of a packed row's embeddings [N, D].

    Each response is a sequence with its prompt before it, and padded on the right, which no earlier token sees.
    """
    sequences: list[Tensor] = []
    at, source = 0, torch.empty(len(row), 2, dtype=torch.long)  # which sequence has a token's output, and where
    for prompt, lengths in layout.groups:
        before, begin = torch.arange(at, at + prompt), at + prompt
        source[before] = torch.stack([torch.full((prompt,), len(sequences)), torch.arange(prompt)], dim=1)
        for n in lengths or [0]:
            own = torch.arange(begin, begin + n)
            source[own] = torch.stack([torch.full((n,), len(sequences)), prompt + torch.arange(n)], dim=1)
            sequences.append(torch.cat([before, own]))
            begin += n
        at = begin
    index = nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(row.device)  # padding: the row's first token
    out = language_model(inputs_embeds=row[index], use_cache=False).last_hidden_state
    sequence, place = source[:at].to(row.device).unbind(1)
    return torch.cat([out[sequence, place], row[at:] * 0.0])  # a blank clip may follow the groups


def register() -> None:
    """Register the network with transformers' auto classes."""
    AutoConfig.register("cobra", CobraConfig, exist_ok=True)
    AutoModelForImageTextToText.register(CobraConfig, CobraForConditionalGeneration, exist_ok=True)


def compose(folder: Path, dino: Path, siglip: Path, mamba: Path, projector: Path | None = None) -> None:
    """Write a checkpoint of pretrained parts.

    Args:
        projector: a torch file with prismatic's projector, {"projector": {"projector.0.weight": ...}} or that of a
            whole checkpoint, {"model": {"projector": ...}}. Without it the projector is random: train it first.
    """
    from rlvid.models.families.cobra import Cobra

    language, tokenizer = MambaForCausalLM.from_pretrained(mamba), AutoTokenizer.from_pretrained(mamba)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    if len(tokenizer) > language.config.vocab_size:
        language.resize_token_embeddings(len(tokenizer))
    seeing = AutoModel.from_pretrained(dino)
    naming = SiglipVisionModel.from_pretrained(siglip)
    config = CobraConfig(language.config, seeing.config, naming.config)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    network = CobraForConditionalGeneration(config)
    for part, given in ((network.model.dino, seeing), (network.model.language_model, language.backbone)):
        part.load_state_dict(given.state_dict())
    own = naming.state_dict()  # without the pooling head, where Cobra has none
    network.model.siglip.load_state_dict({name: own[name] for name in network.model.siglip.state_dict()})
    network.lm_head.load_state_dict(language.lm_head.state_dict())
    if projector:
        state = torch.load(projector, map_location="cpu", weights_only=True)
        state = state.get("model", state)["projector"]
        plain = {name.removeprefix("projector."): tensor for name, tensor in state.items()}
        network.model.multi_modal_projector.load_state_dict(plain)
    network.save_pretrained(folder)
    LlavaProcessor(
        AutoImageProcessor.from_pretrained(siglip),
        tokenizer,
        patch_size=naming.config.patch_size,
        vision_feature_select_strategy="full",
        chat_template=Cobra.default_template,
    ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name in ("dino", "siglip", "mamba"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--projector", type=Path)
    compose(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
