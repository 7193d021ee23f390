from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from rlvid.config import LoraConfig
from rlvid.errors import UserError
from rlvid.models.families import load_family
from rlvid.models.families.cobra import Cobra
from rlvid.models.loading import load_model
from rlvid.models.lora import add_adapters
from rlvid.models.tower import normalise
from rlvid.training.packing import PackedPolicy, pack
from tests.prompts import clip_of, group_of, noise, prompt_of, sample_with

SIDE = 56  # of the tiny towers


@pytest.fixture(scope="module")
def family(tiny_models: dict[str, Path]) -> Cobra:
    return load_family(tiny_models["cobra"])  # type: ignore[return-value]


def test_prompt_and_pixels_equal_those_of_llavas_processor(family: Cobra) -> None:
    from transformers import AutoProcessor

    clips = [clip_of(noise(1, SIDE, SIDE), "a"), clip_of(noise(2, SIDE, SIDE, seed=1), "b")]
    processor = AutoProcessor.from_pretrained(family.folder)
    parts = [{"type": "image"}, {"type": "text", "text": "The image 0. "}, {"type": "image"}]
    parts += [{"type": "text", "text": text} for text in ("The video 1. ", "Which shape is moving?")]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    question = "<|user|>\nThe image 0. The video 1. Which shape is moving?<|endoftext|>\n<|assistant|>\n"
    assert text == "<image><image>" + question
    frames = [Image.fromarray(frame) for clip in clips for frame in clip.frames]
    theirs = processor(text="<image>" + text, images=frames, do_resize=False, return_tensors="pt")
    ours = family.encode(sample_with(("image", "video")), clips)
    assert ours.token_ids.tolist() == theirs["input_ids"][0].tolist()
    assert sum(s.length for s in ours.spans) == 3 * 16
    pixels = normalise(torch.from_numpy(ours.patches), family, torch.float32)
    inputs = family.network_inputs(pixels, torch.from_numpy(ours.grid_thw))
    assert (inputs["pixel_values"] - theirs["pixel_values"]).abs().max() < 1e-6


@torch.no_grad()
def test_a_packed_row_has_the_log_probs_of_sequences_of_their_own(family: Cobra) -> None:
    network = load_model(family.folder, "float32")
    policy = PackedPolicy(network, family)
    first, second = prompt_of(family, (2, SIDE, SIDE)), prompt_of(family, question="What?")
    answers = [family.encode_answer(text) for text in ("square", "a circle, it seems", "left")]
    ours = policy(pack([group_of(first, *answers[:2]), group_of(second, answers[2])]))[0]
    expected = []
    for prompt, answer in zip((first, first, second), answers, strict=True):
        inputs = {}
        if len(prompt.patches):
            pixels = normalise(torch.from_numpy(prompt.patches), family, torch.float32)
            inputs = family.network_inputs(pixels, torch.from_numpy(prompt.grid_thw))
        ids = torch.tensor([[*prompt.token_ids.tolist(), *answer.tolist()]])
        logprobs = network(ids, **inputs).logits[0].log_softmax(-1)
        at = range(prompt.length - 1, prompt.length + len(answer) - 1)
        expected += [float(logprobs[i, token]) for i, token in zip(at, answer.tolist(), strict=True)]
    torch.testing.assert_close(ours, torch.tensor(expected), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_checkpoint_is_composed_of_pretrained_parts(family: Cobra, tmp_path: Path) -> None:
    from transformers import MambaForCausalLM, PreTrainedTokenizerFast, SiglipImageProcessor

    from rlvid.models.cobra_network import compose

    network = load_model(family.folder, "float32")
    own = network.model
    own.dino.save_pretrained(tmp_path / "dino")
    own.siglip.save_pretrained(tmp_path / "siglip")
    SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path / "siglip")
    language = MambaForCausalLM(own.config.text_config)
    language.backbone.load_state_dict(own.language_model.state_dict())
    language.save_pretrained(tmp_path / "mamba")
    file = str(family.folder / "tokenizer.json")
    tokens = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_file=file, **tokens).save_pretrained(tmp_path / "mamba")
    projector = {f"projector.{name}": tensor for name, tensor in own.multi_modal_projector.state_dict().items()}
    torch.save({"model": {"projector": projector}}, tmp_path / "prismatic.pt")
    parts = (tmp_path / name for name in ("dino", "siglip", "mamba", "prismatic.pt"))
    compose(tmp_path / "cobra", *parts)
    composed = load_model(tmp_path / "cobra", "float32")
    assert composed.state_dict().keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(composed.state_dict()[name], tensor), name
    again = load_family(tmp_path / "cobra")
    assert prompt_of(again, (1, SIDE, SIDE)).token_ids.tolist() == prompt_of(family, (1, SIDE, SIDE)).token_ids.tolist()


def test_adapters_where_mamba_would_not_use_them_are_left_out(family: Cobra) -> None:
    network = load_model(family.folder, "float32")
    add_adapters(network, LoraConfig(rank=2, targets=("in_proj", "x_proj", "dt_proj", "out_proj")), family.no_lora)
    trained = {name.split(".")[-4] for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"in_proj", "x_proj", "out_proj"}


def test_zero_3_is_refused(family: Cobra) -> None:
    with pytest.raises(
        UserError, match="train.zero_stage 3 does not support CobraForConditionalGeneration: set it to 2"
    ):
        load_model(family.folder, "float32", {"zero_optimization": {"stage": 3}})
