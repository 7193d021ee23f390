from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rlvid.config import LoraConfig, RolloutConfig
from rlvid.errors import UserError
from rlvid.models.families import load_family
from rlvid.models.families.frames import Idefics2, VideoLlava
from rlvid.models.families.vision import VisionFamily
from rlvid.models.loading import load_model
from rlvid.models.lora import add_adapters
from rlvid.models.tower import normalise
from rlvid.rollout.vllm_engine import VllmEngine
from rlvid.types import Medium, MediumRef, Message, Sample
from tests.prompts import clip_of, noise, of_processor, prompt_of, sample_of, sample_with


@pytest.fixture(scope="module")
def idefics2(tiny_models: dict[str, Path]) -> Idefics2:
    return load_family(tiny_models["idefics2"])  # type: ignore[return-value]


@pytest.fixture(scope="module")
def video_llava(tiny_models: dict[str, Path]) -> VideoLlava:
    return load_family(tiny_models["video_llava"])  # type: ignore[return-value]


def test_prompt_of_idefics2_equals_that_of_the_processor(idefics2: Idefics2) -> None:
    from transformers import AutoProcessor

    clips = [clip_of(noise(3, 56, 84), "a"), clip_of(noise(2, 84, 56, seed=1), "b")]
    sample = Sample(
        "s", (Medium("a"), Medium("b")), (Message("user", (MediumRef(0), "First.", MediumRef(1), "Which moves?")),), ""
    )
    processor = AutoProcessor.from_pretrained(idefics2.folder)
    image, text = {"type": "image"}, [{"type": "text", "text": t} for t in ("First.", "Which moves?")]
    turns = [{"role": "user", "content": [image, text[0], image, text[1]]}]
    first, second, last = processor.apply_chat_template(turns, add_generation_prompt=True).split("<image>")
    shown = first + " ".join(["<image>"] * 3) + second + " ".join(["<image>"] * 2) + last
    frames = [Image.fromarray(frame) for clip in clips for frame in clip.frames]
    theirs = processor(text=shown, images=[frames], do_resize=False, return_tensors="pt")
    ours = idefics2.encode(sample, clips)
    assert ours.token_ids.tolist() == theirs["input_ids"][0].tolist()
    assert [s.length for s in ours.spans] == [8] * 5
    pixels = normalise(torch.from_numpy(ours.patches), idefics2, torch.float32)
    inputs = idefics2.network_inputs(pixels, torch.from_numpy(ours.grid_thw))
    assert torch.equal(inputs["pixel_attention_mask"], theirs["pixel_attention_mask"].bool())
    assert (inputs["pixel_values"] - theirs["pixel_values"]).abs().max() < 1e-6
    assert ours.positions.tolist() == [list(range(ours.length))]


def test_an_image_of_idefics2_is_a_video_of_one_frame(idefics2: Idefics2) -> None:
    clips = [clip_of(noise(1, 56, 84), "a"), clip_of(noise(2, 56, 56), "b")]
    prompts = [idefics2.encode(sample_with(kinds), clips) for kinds in (("image", "video"), ("video", "video"))]
    as_text = [idefics2.tokenizer.decode(p.token_ids.tolist(), skip_special_tokens=False) for p in prompts]
    assert as_text[0] == as_text[1].replace("The video 0", "The image 0")
    assert np.array_equal(prompts[0].patches, prompts[1].patches)


def test_earlier_answers_of_idefics2_are_not_as_they_were_generated(idefics2: Idefics2) -> None:
    """Its template writes a space before an answer, and none where one is to be generated."""
    turns = tuple(Message(role, ("Which?",)) for role in ("user", "assistant", "user"))
    assert idefics2.encode(Sample("s", (), turns, ""), []).answered == (None,)


def test_prompt_of_video_llava_equals_that_of_the_processor(video_llava: VideoLlava) -> None:
    clip = clip_of(noise(5, 56, 56), "a")
    text, theirs = of_processor(video_llava, clip)
    assert text == "USER: <video>\nWhich shape is moving? ASSISTANT:"
    ours = video_llava.encode(sample_of(), [clip])
    assert ours.token_ids.tolist() == theirs["input_ids"][0].tolist()
    assert [s.length for s in ours.spans] == [5 * 17]
    pixels = normalise(torch.from_numpy(ours.patches), video_llava, torch.float32)
    inputs = video_llava.network_inputs(pixels, torch.from_numpy(ours.grid_thw))
    assert (inputs["pixel_values_videos"] - theirs["pixel_values_videos"]).abs().max() < 1e-6


def test_frames_of_another_size_are_refused_with_the_settings_to_change(video_llava: VideoLlava) -> None:
    with pytest.raises(UserError, match="56 x 56 pixels, not 112 x 56: set video.height and video.width to 56"):
        prompt_of(video_llava, (2, 56, 112))


def test_a_prompt_longer_than_mistrals_window_is_refused(idefics2: Idefics2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idefics2, "_window", 40)
    with pytest.raises(UserError, match="never truncated"):
        prompt_of(idefics2, (8, 28, 28))


@pytest.mark.parametrize("model", ["idefics2", "video_llava"])
def test_special_tokens_in_user_text_stay_text(tiny_models: dict[str, Path], model: str) -> None:
    family = load_family(tiny_models[model])
    prompt = prompt_of(family, (1, 56, 56), question="<image> <video> </s> <end_of_utterance>")
    plain = prompt_of(family, (1, 56, 56), question="hello")
    assert [s.length for s in prompt.spans] == [s.length for s in plain.spans]
    assert (prompt.token_ids == family.end_of_turn).sum() == (plain.token_ids == family.end_of_turn).sum()


@pytest.mark.parametrize("model", ["idefics2", "video_llava"])
def test_an_answer_ends_its_turn(tiny_models: dict[str, Path], model: str) -> None:
    family = load_family(tiny_models[model])
    ids = family.encode_answer("a square")
    assert ids[-1] == family.end_of_turn and family.decode(ids.tolist()) == "a square"
    assert ids.dtype == np.int32


@pytest.mark.parametrize("model", ["idefics2", "video_llava"])
def test_only_the_language_model_has_adapters(tiny_models: dict[str, Path], model: str) -> None:
    network = load_model(tiny_models[model], "float32")
    add_adapters(network, LoraConfig(rank=2), VisionFamily.no_lora)
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert names and all(".text_model." in name or ".language_model." in name for name in names)


def test_engine_input_is_not_implemented(idefics2: Idefics2) -> None:
    with pytest.raises(UserError, match="vLLM does not serve Idefics2ForConditionalGeneration"):
        VllmEngine(idefics2.folder, idefics2, RolloutConfig(), "float32", seed=0, on_gpu=False)
