from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlvid.errors import UserError
from rlvid.models import torchvision_ops
from rlvid.models.families import load_family
from rlvid.models.families.qwen_vl import QwenVL, rotary_positions
from rlvid.types import Message, Sample, Span, VideoRef
from tests.prompts import clip_of, noise, prompt_of, sample_of


@pytest.fixture(scope="module")
def family(tiny_model: Path) -> QwenVL:
    return load_family(tiny_model)


@pytest.mark.parametrize("shape", [(8, 56, 56), (7, 84, 56), (2, 28, 140)])
def test_patches_equal_the_processors_own(family: QwenVL, tiny_model: Path, shape: tuple[int, int, int]) -> None:
    torchvision_ops.ensure()
    from transformers.models.qwen2_vl import Qwen2VLVideoProcessor

    frames = noise(*shape)
    processor = Qwen2VLVideoProcessor.from_pretrained(tiny_model)
    theirs = processor(
        torch.from_numpy(frames).permute(0, 3, 1, 2),
        do_resize=False,
        do_rescale=False,
        do_normalize=False,
        return_tensors="pt",
    )
    grid, ours = family.patchify(frames)
    assert ours.dtype == np.uint8
    assert grid == tuple(theirs["video_grid_thw"][0].tolist())
    assert np.array_equal(ours, theirs["pixel_values_videos"].numpy())


def test_text_counts_on_from_the_largest_position() -> None:
    # 2 text tokens, a video of 3 x 1 x 2 merged patches, 2 text tokens
    positions = rotary_positions(10, [Span(2, 6)], np.array([[3, 2, 4]]), merge_size=2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 3, 3, 4, 4, 5, 6],
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 3, 2, 3, 2, 3, 5, 6],
    ]


def test_two_videos_and_no_video() -> None:
    positions = rotary_positions(5, [Span(0, 1), Span(2, 2)], np.array([[1, 2, 2], [2, 2, 2]]), merge_size=2)
    assert positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 2, 4], [0, 1, 2, 2, 4]]
    assert rotary_positions(3, [], np.zeros((0, 3), dtype=np.int64), 2).tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize(("shape", "is_equal"), [((4, 112, 84), True), ((16, 56, 84), False)])
def test_positions_against_transformers(
    family: QwenVL, tiny_model: Path, shape: tuple[int, int, int], is_equal: bool
) -> None:
    """transformers 5.19 differs exactly where merged T > max(H, W); the day it does not, this rule can go."""
    from rlvid.models.loading import load_model

    prompt = prompt_of(family, shape)
    ids = torch.from_numpy(prompt.token_ids).long()[None]
    theirs, _ = load_model(tiny_model, "float32").model.get_rope_index(
        ids, (ids == family.video_token).int() * 2, video_grid_thw=torch.from_numpy(prompt.grid_thw)
    )
    assert np.array_equal(theirs[:, 0].numpy(), prompt.positions) is is_equal


def test_placeholders_match_the_grid(family: QwenVL) -> None:
    prompt = prompt_of(family, (8, 56, 56), (4, 28, 84))
    assert [s.length for s in prompt.spans] == [4 * 2 * 2, 2 * 1 * 3]
    runs = [prompt.token_ids[s.offset : s.offset + s.length] for s in prompt.spans]
    assert all((run == family.video_token).all() for run in runs)
    assert (prompt.token_ids == family.video_token).sum() == 22
    assert len(prompt.patches) == 4 * 22
    assert prompt.next_position == prompt.positions.max() + 1


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


def test_prompt_is_never_cut(family: QwenVL) -> None:
    with pytest.raises(UserError, match=r"'s'.*tokens \(16 of them video\).*max_model_len"):
        family.encode(sample_of(), [clip_of(noise(8, 56, 56), "c")], max_tokens=20)


def test_each_video_is_used_once(family: QwenVL) -> None:
    twice = Sample("s", ("/a.mp4",), (Message("user", (VideoRef(0), VideoRef(0), "?")),), "a")
    with pytest.raises(UserError, match="use each once"):
        family.encode(twice, [clip_of(noise(2, 28, 28), "c")])


def test_text_only_prompt(family: QwenVL) -> None:
    prompt = family.encode(sample_of(n_videos=0), [])
    assert prompt.spans == () and len(prompt.patches) == 0
    assert prompt.positions[0].tolist() == list(range(prompt.length))


def test_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config.json"):
        load_family(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="'gpt2' is not supported"):
        load_family(tmp_path)
