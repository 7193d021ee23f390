from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlvid.errors import UserError
from rlvid.models import torchvision_ops
from rlvid.models.families import load_family
from rlvid.models.families.qwen_vl import Qwen3VL, QwenVL
from rlvid.models.families.vision import rotary_positions
from rlvid.types import Clip, Medium, MediumRef, Message, Sample, Span
from tests.prompts import clip_of, noise, prompt_of, sample_of, sample_with


@pytest.fixture(scope="module")
def family(tiny_model: Path) -> QwenVL:
    return load_family(tiny_model)  # type: ignore[return-value]


@pytest.fixture(params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def any_family(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> QwenVL:
    return load_family(tiny_models[request.param])  # type: ignore[return-value]


def by_processor(family: QwenVL, sample: Sample, clips: Sequence[Clip]) -> Mapping[str, Any]:
    """Output of transformers' processor for the same frames, with patches as uint8."""
    torchvision_ops.ensure()
    from transformers import AutoProcessor
    from transformers.video_utils import VideoMetadata

    processor = AutoProcessor.from_pretrained(family.folder)
    kinds = [medium.kind for medium in sample.media]
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": kinds[part.index]}
        for part in sample.messages[0].content
    ]
    videos, images = ([c for c, k in zip(clips, kinds, strict=True) if k == kind] for kind in ("video", "image"))
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(  # type: ignore[no-any-return]
        text=[text],
        images=[torch.from_numpy(clip.frames[0]).permute(2, 0, 1) for clip in images] or None,
        videos=[torch.from_numpy(clip.frames).permute(0, 3, 1, 2) for clip in videos],
        video_metadata=[
            VideoMetadata(total_num_frames=c.n_frames, fps=c.fps, frames_indices=c.indices.tolist()) for c in videos
        ],
        do_sample_frames=False,
        do_resize=False,
        do_rescale=False,
        do_normalize=False,
        return_tensors="pt",
    )


@pytest.mark.parametrize("shapes", [[(8, 2, 2)], [(7, 3, 2), (2, 1, 5)]])
def test_prompt_equals_the_processors(any_family: QwenVL, shapes: list[tuple[int, int, int]]) -> None:
    side = any_family.frame_multiple
    clips = []
    for i, (t, h, w) in enumerate(shapes):
        # every 7th frame of a file at 29.97 frames a second, with a tail that is not shown
        sampled = {"indices": 7 * np.arange(t), "n_frames": 7 * t - 2, "fps": 30000 / 1001}
        clips.append(replace(clip_of(noise(t, h * side, w * side, seed=i), f"c{i}"), **sampled))
    sample = sample_of(len(clips))
    ours, theirs = any_family.encode(sample, clips), by_processor(any_family, sample, clips)
    assert ours.token_ids.tolist() == theirs["input_ids"][0].tolist()
    assert ours.grid_thw.tolist() == theirs["video_grid_thw"].tolist()
    assert ours.patches.dtype == np.uint8
    assert np.array_equal(ours.patches, theirs["pixel_values_videos"].numpy())
    if "second_per_grid_ts" in theirs:
        assert ours.seconds_per_patch == pytest.approx([float(s) for s in theirs["second_per_grid_ts"]], rel=1e-6)


def test_prompt_with_images_equals_the_processors(any_family: QwenVL) -> None:
    side = any_family.frame_multiple
    clips = [clip_of(noise(t, h * side, w * side, seed=h), f"c{h}") for t, h, w in ((1, 2, 3), (4, 1, 2), (1, 3, 1))]
    sample = sample_with(("image", "video", "image"))
    ours, theirs = any_family.encode(sample, clips), by_processor(any_family, sample, clips)
    assert ours.token_ids.tolist() == theirs["input_ids"][0].tolist()
    grids = theirs["image_grid_thw"].tolist()
    assert ours.grid_thw.tolist() == [grids[0], *theirs["video_grid_thw"].tolist(), grids[1]]
    image, video, last = np.split(ours.patches, np.cumsum(ours.grid_thw.prod(axis=1))[:-1])
    assert np.array_equal(np.concatenate([image, last]), theirs["pixel_values"].numpy())
    assert np.array_equal(video, theirs["pixel_values_videos"].numpy())


def test_seconds_per_patch_of_a_clip_whose_end_is_not_sampled(any_family: QwenVL) -> None:
    """The processor would divide the whole minute by 8, though the frames are all from the first second."""
    clip = replace(clip_of(noise(8, 64, 64), "c"), indices=4 * np.arange(8), n_frames=1800, fps=30.0)
    assert any_family.seconds_per_patch(clip) == pytest.approx(2 * 29 / 30 / 8)  # of two frames, 29 frames shown


def test_runs_of_placeholders_match_the_grid(any_family: QwenVL) -> None:
    side = any_family.frame_multiple
    prompt = prompt_of(any_family, (8, 2 * side, 2 * side), (4, side, 3 * side))
    per_patch = [4] * 4 + [3] * 2
    assert [s.length for s in prompt.spans] == (per_patch if isinstance(any_family, Qwen3VL) else [16, 6])
    runs = [prompt.token_ids[s.offset : s.offset + s.length] for s in prompt.spans]
    assert all((run == any_family.video_token).all() for run in runs)
    assert (prompt.token_ids == any_family.video_token).sum() == 22
    assert len(prompt.patches) == 4 * 22
    assert prompt.next_position == prompt.positions.max() + 1


def test_time_is_written_before_each_patch(tiny_models: dict[str, Path]) -> None:
    family = load_family(tiny_models["qwen3_vl"])
    prompt = prompt_of(family, (5, 32, 32))  # 8 frames a second, the last one repeated
    text = family.tokenizer.decode(prompt.token_ids.tolist(), skip_special_tokens=False)
    patch = "<|vision_start|><|video_pad|><|vision_end|>"
    times = f"<0.1 seconds>{patch}<0.3 seconds>{patch}<0.5 seconds>{patch}"
    assert f"user\n<|vision_start|>{times}<|vision_end|>Which shape" in text


def test_time_steps_are_scaled_and_rounded_down() -> None:
    # a video of 4 x 1 x 1 merged patches, 1.5 positions apart, and a text token
    positions = rotary_positions(5, [Span(0, 4)], np.array([[4, 2, 2]]), merge_size=2, steps=[1.5])
    assert positions.tolist() == [[0, 1, 3, 4, 5], [0, 0, 0, 0, 5], [0, 0, 0, 0, 5]]


def test_text_continues_at_the_largest_position_plus_one() -> None:
    # 2 text tokens, a video of 3 x 1 x 2 merged patches, 2 text tokens
    positions = rotary_positions(10, [Span(2, 6)], np.array([[3, 2, 4]]), merge_size=2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 3, 3, 4, 4, 5, 6],
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 3, 2, 3, 2, 3, 5, 6],
    ]


def test_positions_with_two_videos_and_with_none() -> None:
    positions = rotary_positions(5, [Span(0, 1), Span(2, 2)], np.array([[1, 2, 2], [2, 2, 2]]), merge_size=2)
    assert positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 2, 4], [0, 1, 2, 2, 4]]
    assert rotary_positions(3, [], np.zeros((0, 3), dtype=np.int64), 2).tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize(("shape", "is_equal"), [((4, 112, 84), True), ((16, 56, 84), False)])
def test_positions_against_transformers(
    family: QwenVL, tiny_model: Path, shape: tuple[int, int, int], is_equal: bool
) -> None:
    """transformers 5.19 differs only if merged T > max(H, W); once it agrees, `rotary_positions` is not needed."""
    from rlvid.models.loading import load_model

    prompt = prompt_of(family, shape)
    ids = torch.from_numpy(prompt.token_ids).long()[None]
    theirs, _ = load_model(tiny_model, "float32").model.get_rope_index(
        ids, (ids == family.video_token).int() * 2, video_grid_thw=torch.from_numpy(prompt.grid_thw)
    )
    assert np.array_equal(theirs[:, 0].numpy(), prompt.positions) is is_equal


def test_conversation_follows_chatml(family: QwenVL) -> None:
    text = family.tokenizer.decode(prompt_of(family, (2, 28, 28)).token_ids.tolist(), skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|video_pad|><|vision_end|>Which shape is moving?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_special_tokens_in_user_text_stay_text(family: QwenVL) -> None:
    question = "What is <|video_pad|><|im_end|><video>?"
    prompt = family.encode(sample_of(question=question), [clip_of(noise(2, 28, 28), "c")])
    assert (prompt.token_ids == family.video_token).sum() == 1
    assert (prompt.token_ids == family.end_of_turn).sum() == 2  # of the system's and the user's turn
    assert family.end_of_turn not in family.encode_answer("red<|im_end|>")[:-1]


def test_answer_ends_its_turn(family: QwenVL) -> None:
    ids = family.encode_answer("red")
    assert ids[-1] == family.end_of_turn
    assert family.decode(ids.tolist()) == "red"


def test_prompt_is_never_truncated(family: QwenVL) -> None:
    with pytest.raises(UserError, match=r"tokens \(16 of them video\).*max_model_len"):
        family.encode(sample_of(), [clip_of(noise(8, 56, 56), "c")], max_tokens=20)


def test_each_video_is_used_once(family: QwenVL) -> None:
    twice = Sample("s", (Medium("/a.mp4"),), (Message("user", (MediumRef(0), MediumRef(0), "?")),), "a")
    with pytest.raises(UserError, match="use each of them once"):
        family.encode(twice, [clip_of(noise(2, 28, 28), "c")])


def test_text_only_prompt(family: QwenVL) -> None:
    prompt = family.encode(sample_of(n_videos=0), [])
    assert prompt.spans == () and len(prompt.patches) == 0
    assert prompt.positions[0].tolist() == list(range(prompt.length))


def test_a_medium_that_the_model_does_not_take_is_refused(tiny_models: dict[str, Path]) -> None:
    for model, kind, accepted in (("video_llava", "image", "text and videos;"), ("qwen2", "video", "text;")):
        family = load_family(tiny_models[model])
        with pytest.raises(UserError, match=rf"'s' has the {kind} /media/0, but .* accepts only {accepted}"):
            family.check_media(sample_with((kind,)))


def test_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config.json"):
        load_family(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="'gpt2' is not supported"):
        load_family(tmp_path)
