from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlvid.models.families import load_family
from rlvid.models.families.frames import SquareFrames
from rlvid.models.families.qwen_vl import QwenVL
from rlvid.models.families.vision import VisionFamily
from rlvid.models.heads import VALUE
from rlvid.models.loading import load_model
from rlvid.models.tower import normalise
from rlvid.training.batch import Group
from rlvid.training.packing import PackedPolicy, PackedScorer, pack
from rlvid.types import Medium, MediumRef, Message, Prompt, Sample
from tests.prompts import FAMILIES, clip_of, group_of, mixed_prompt, noise, prompt_of


def sampled(prompt: Prompt, lengths: list[int], seed: int = 0, temperature: float | None = 1.0) -> Group[Prompt]:
    rng = np.random.default_rng(seed)
    ids = tuple(rng.integers(260, 300, size=n).astype(np.int32) for n in lengths)
    return group_of(prompt, *ids, weights=rng.random(sum(lengths), dtype=np.float32), temperature=temperature)


def separate_sequences(
    folder: Path, groups: list[Group[Prompt]], temperature: float
) -> tuple[torch.nn.Module, torch.Tensor]:
    """Log-probs [M] by transformers' own attention, one sequence and one vision pass per response."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    family = load_family(folder)
    auto = AutoModelForImageTextToText if isinstance(family, VisionFamily) else AutoModelForCausalLM
    model = auto.from_pretrained(folder, attn_implementation="eager")
    flat = []
    for group in groups:
        p: Prompt = group.prompt
        video: dict[str, torch.Tensor] = {}
        if p.spans:
            assert isinstance(family, VisionFamily)
            pixels = normalise(torch.from_numpy(p.patches), family, torch.float32)
            grids = torch.from_numpy(p.grid_thw)
            video = family.network_inputs(pixels, grids)
            if isinstance(clips := video.get("pixel_values_videos"), list):  # transformers takes clips of one length
                video = {"pixel_values_videos": torch.stack(clips)}
            if p.sample_id == "mixed":  # images by themselves, as transformers' processor gives them
                image, clip, last = pixels.split(p.grid_thw.prod(axis=1).tolist())
                video = {"pixel_values": torch.cat([image, last]), "image_grid_thw": grids[[0, 2]]}
                video |= {"pixel_values_videos": clip, "video_grid_thw": grids[[1]]}
        for ids in group.responses:
            after = np.broadcast_to(p.next_position + np.arange(len(ids)), (len(p.positions), len(ids)))
            positions = torch.from_numpy(np.concatenate([p.positions, after], axis=1)).long()
            logits = model(
                input_ids=torch.from_numpy(np.concatenate([p.token_ids, ids])).long()[None],
                position_ids=positions[:, None] if len(positions) == 3 else positions,
                **video,
            ).logits[0, p.length - 1 : -1]
            logits[:, list(family.banned_tokens)] = float("-inf")
            flat.append((logits / temperature).log_softmax(-1).gather(1, torch.from_numpy(ids).long()[:, None])[:, 0])
    return model, torch.cat(flat)


@pytest.mark.parametrize("model", ["qwen2_vl", "qwen3_vl", "qwen2"])
def test_earlier_answers_are_predicted_by_the_forward_of_their_conversation(
    tiny_models: dict[str, Path], model: str
) -> None:
    """As the answer of a shorter conversation is; a later turn may bring another video."""
    folder = tiny_models[model]
    family = load_family(folder)
    media = (Medium("/a.mp4"), Medium("/b.mp4")) if isinstance(family, VisionFamily) else ()
    one, two = ((MediumRef(0), "Which shape?"), (MediumRef(1), "And now?")) if media else (("Which?",), ("And?",))
    turns = [Message("user", one), Message("assistant", ("A red box.",)), Message("user", two)]
    side = family.frame_multiple
    clips = [clip_of(noise(4, side, 2 * side, seed=i), f"c{i}") for i, _ in enumerate(media)]
    whole = family.encode(Sample("s", media, tuple(turns), ""), clips)
    short = family.encode(Sample("s", media[:1], tuple(turns[:1]), ""), clips[:1])
    (span,) = whole.answered
    first, last = family.encode_answer("A red box."), family.encode_answer("A blue ball.")
    assert span is not None and whole.token_ids[span.offset : span.offset + span.length].tolist() == first.tolist()
    policy = PackedPolicy(load_model(folder, "float32"), family)
    group = replace(group_of(whole, last), in_prompt=(span,))
    assert group.n_tokens == len(first) + len(last) and group.cut(1) == [group]
    together, _ = policy(pack([group_of(short, last), group]))
    apart = [policy(pack([g]))[0] for g in (group_of(short, last), group_of(short, first), group_of(whole, last))]
    assert torch.allclose(together, torch.cat(apart), atol=1e-5)


@pytest.mark.parametrize("model", FAMILIES)
def test_shared_prompt_gives_the_same_logprobs_and_gradients_as_separate_sequences(
    tiny_models: dict[str, Path], model: str
) -> None:
    folder = tiny_models[model]
    family = load_family(folder)
    side = family.frame_multiple
    shapes = [(16, 2 * side, 2 * side)], [(4, 3 * side, 5 * side), (3, side, side)]  # merged T = 8 > max(H, W) = 2
    if isinstance(family, SquareFrames):
        shapes = [(3, side, side)], [(4, side, side), (4, side, side)]
    if not isinstance(family, VisionFamily):
        shapes = [], []
    groups = [
        sampled(prompt_of(family, *shapes[0]), [5, 1, 9], temperature=0.7),
        sampled(prompt_of(family, question="How many shapes are there?"), [2], seed=2, temperature=0.7),
        sampled(prompt_of(family, *shapes[1], seed=7), [3, 3, 3, 3], seed=1, temperature=0.7),
    ]
    if isinstance(family, QwenVL):
        groups.insert(1, sampled(mixed_prompt(family), [4, 2], seed=3, temperature=0.7))
    policy = PackedPolicy(load_model(folder, "float32"), family)
    logprobs, entropy = policy(pack(groups))
    weights = torch.from_numpy(np.concatenate([g.tokens["weights"] for g in groups]))
    (weights * logprobs).sum().backward()

    plain, expected = separate_sequences(folder, groups, temperature=0.7)
    (weights * expected).sum().backward()

    assert (logprobs - expected).abs().max() < 1e-5
    assert torch.isfinite(entropy).all() and (entropy > 0).all()
    gradients = dict(plain.named_parameters())
    for name, parameter in policy.network.named_parameters():
        theirs = gradients[name].grad
        if isinstance(family, SquareFrames) and theirs is None:  # the tower's last layer and its second tower
            assert parameter.grad is None, name
            continue
        rounding = 1e-6 if name.endswith("k_proj.bias") else 1e-9  # a shift of all scores changes nothing: it is 0
        assert (parameter.grad - theirs).norm() <= 1e-5 * theirs.norm() + rounding, name


@pytest.mark.parametrize("model", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_row_without_video_runs_the_tower_to_no_effect(tiny_models: dict[str, Path], model: str) -> None:
    family = load_family(tiny_models[model])
    group = sampled(prompt_of(family), [4, 2])
    policy = PackedPolicy(load_model(tiny_models[model], "float32"), family)
    logprobs, _ = policy(pack([group]))
    logprobs.sum().backward()
    _, expected = separate_sequences(tiny_models[model], [group], temperature=1.0)
    assert (logprobs - expected).abs().max() < 1e-5
    for name, parameter in policy.network.named_parameters():  # a gradient everywhere, so that ranks can add theirs
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any() != (".visual." in name), name


def test_splitting_a_group_changes_nothing(tiny_model: Path) -> None:
    family = load_family(tiny_model)
    group = sampled(prompt_of(family, (8, 56, 56)), [4, 2, 7])
    policy = PackedPolicy(load_model(tiny_model, "float32"), family)
    with torch.no_grad():
        shared, _ = policy(pack([group]))
        apart, _ = policy(pack(group.cut(0)))
    assert (shared - apart).abs().max() < 1e-5
    assert np.array_equal(np.concatenate([g.tokens["weights"] for g in group.cut(0)]), group.tokens["weights"])


def test_responses_do_not_see_each_other(tiny_model: Path) -> None:
    family = load_family(tiny_model)
    prompt = prompt_of(family, (8, 56, 56))
    first, second = sampled(prompt, [4, 6]).responses
    policy = PackedPolicy(load_model(tiny_model, "float32"), family)
    with torch.no_grad():
        one, _ = policy(pack([group_of(prompt, first, second)]))
        other, _ = policy(pack([group_of(prompt, first, second[::-1].copy())]))
    assert torch.equal(one[:4], other[:4])
    assert not torch.allclose(one[4:], other[4:])


def test_placeholders_have_no_probability(tiny_model: Path) -> None:
    family = load_family(tiny_model)
    banned = np.array([family.banned_tokens[0], 270], dtype=np.int32)
    policy = PackedPolicy(load_model(tiny_model, "float32"), family)
    logprobs, _ = policy(pack([group_of(prompt_of(family), banned, temperature=1.0)]))
    assert logprobs[0] == float("-inf") and torch.isfinite(logprobs[1])


def test_given_responses_have_the_models_own_likelihood(tiny_model: Path) -> None:
    family = load_family(tiny_model)
    ids = np.array([family.banned_tokens[0], 270], dtype=np.int32)
    policy = PackedPolicy(load_model(tiny_model, "float32"), family)
    given, at_one, at_half = (
        policy(pack([group_of(prompt_of(family), ids, temperature=t)]))[0] for t in (None, 1.0, 0.5)
    )
    assert torch.isfinite(given).all()  # nothing is banned
    assert given[1] <= at_one[1] and not torch.allclose(at_one[1], at_half[1])


def test_sampled_and_given_responses_do_not_share_a_row(tiny_model: Path) -> None:
    prompt = prompt_of(load_family(tiny_model))
    ids = np.array([270], dtype=np.int32)
    with pytest.raises(ValueError, match="different temperatures"):
        pack([group_of(prompt, ids), group_of(prompt, ids, temperature=1.0)])


@pytest.mark.parametrize("model", ["qwen2_vl", "qwen3_vl"])  # their pixel means differ
def test_normalised_patches_equal_the_processors_float_output(tiny_models: dict[str, Path], model: str) -> None:
    from transformers import AutoVideoProcessor

    family = load_family(tiny_models[model])
    frames = noise(4, 2 * family.frame_multiple, 3 * family.frame_multiple)
    theirs = AutoVideoProcessor.from_pretrained(tiny_models[model])(
        torch.from_numpy(frames).permute(0, 3, 1, 2), do_sample_frames=False, do_resize=False, return_tensors="pt"
    )["pixel_values_videos"]
    ours = normalise(torch.from_numpy(family.patchify(frames)[1]), family, torch.float32)
    assert torch.equal(ours, theirs)


def test_text_model_that_makes_its_own_mask(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Llama's forward builds a mask from what it is given; the row's layout has to get past it."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config

    base = Qwen2Config.from_pretrained(tiny_models["qwen2"]).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "eos_token_id", "bos_token_id")
    config = LlamaConfig(**{n: base[n] for n in names}, num_attention_heads=2, num_key_value_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_models["qwen2"] / file, tmp_path)
    family = load_family(tmp_path)
    groups = [sampled(prompt_of(family), [5, 1]), sampled(prompt_of(family, question="Why?"), [3])]
    with torch.no_grad():
        logprobs, _ = PackedPolicy(load_model(tmp_path, "float32"), family)(pack(groups))
        _, expected = separate_sequences(tmp_path, groups, temperature=1.0)
    assert (logprobs - expected).abs().max() < 1e-5


def test_logits_in_parts_give_the_same_logprobs_and_gradients(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load_family(tiny_model)
    row = pack([sampled(prompt_of(family, (4, 56, 56)), [5, 3, 4], temperature=0.7)])

    def run() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        policy = PackedPolicy(load_model(tiny_model, "float32"), family)
        logprobs, entropy = policy(row)
        (logprobs * torch.arange(12) / 12).sum().backward()
        return logprobs.detach(), entropy, [p.grad for p in policy.parameters() if p.grad is not None]

    whole = run()
    vocabulary = load_model(tiny_model, "float32").config.text_config.vocab_size
    monkeypatch.setattr("rlvid.training.packing.LOGITS_AT_A_TIME", 5 * vocabulary)  # parts of 5, 5 and 2 tokens
    parts = run()
    torch.testing.assert_close(parts[:2], whole[:2], atol=1e-6, rtol=0)
    torch.testing.assert_close(parts[2], whole[2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_vl", "idefics2"])
def test_values_of_a_group_from_one_prompt_equal_those_of_separate_sequences(
    name: str, tiny_models: dict[str, Path]
) -> None:
    family = load_family(tiny_models[name])
    side = family.frame_multiple  # type: ignore[attr-defined]
    group = sampled(prompt_of(family, (8, 2 * side, 2 * side)), [4, 2, 7], temperature=0.7)
    weights = torch.from_numpy(group.tokens["weights"])
    both = PackedPolicy(load_model(tiny_models[name], "float32"), family, VALUE)
    alone = PackedScorer(load_model(tiny_models[name], "float32"), family, VALUE)
    found = []
    for model, parts in ((both, [group]), (both, group.cut(0)), (alone, [group]), (alone, group.cut(0))):
        model.zero_grad(set_to_none=True)
        values = model(pack(parts))[0][:, -1]
        (weights * values).sum().backward()
        grads = torch.cat([p.grad.flatten() for p in model.network.model.parameters() if p.grad is not None])
        found.append((values.detach(), grads))
    for values, grads in found[1:]:
        assert (values - found[0][0]).abs().max() < 1e-5
        assert (grads - found[0][1]).norm() <= 1e-5 * found[0][1].norm()
    with torch.no_grad():
        plain = PackedPolicy(load_model(tiny_models[name], "float32"), family)
        assert (both(pack([group]))[0][:, 0] - plain(pack([group]))[0]).abs().max() < 1e-6
