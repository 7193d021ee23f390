"""The real engine against the real trainer network, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlvid.errors import UserError
from rlvid.models.families.views import View, seen_as
from rlvid.models.tower import normalise
from rlvid.rollout.engine import Sampling
from rlvid.rollout.weights.buckets import to_buckets
from rlvid.training.parameters import in_parts
from rlvid.types import Prompt, Rollout, WeightSpan
from tests.prompts import mixed_prompt, prompt_of
from tests.rollout.both import Both, run_check


@pytest.fixture(scope="module")
def both(tiny_model: Path) -> Iterator[Both]:
    yield Both(tiny_model)


def test_engine_and_trainer_agree_on_every_kind_of_prompt(both: Both) -> None:
    prompts = [
        prompt_of(both.family, (16, 56, 56)),  # merged T = 8 > max(H, W) = 2, where transformers' positions differ
        prompt_of(both.family, (4, 84, 112)),
        prompt_of(both.family, (7, 28, 56), (4, 56, 28), seed=5),  # two clips, one with an odd number of frames
        prompt_of(both.family),  # text alone
    ]
    for prompt, rollouts in zip(prompts, both.generate(prompts), strict=True):
        assert both.gap(prompt, rollouts) < 1e-4


def test_logprobs_are_those_of_the_tempered_distribution(both: Both) -> None:
    prompt = prompt_of(both.family, (8, 56, 56), seed=1)
    (rollouts,) = both.generate([prompt], temperature=0.6)
    assert both.gap(prompt, rollouts, temperature=0.6) < 1e-4


def test_answers_with_a_seed_do_not_depend_on_what_else_is_in_the_batch(both: Both) -> None:
    prompts = [
        replace(prompt_of(both.family, (4 + 2 * (i % 3), 56, 56), seed=i), sample_id=f"sample {i}") for i in range(12)
    ]

    def answers(batch: list[Prompt], seed: int) -> dict[str, list[Rollout]]:
        ids = {both.engine.submit(p, Sampling(2, 1.0, 24, top_p=0.95, seed=seed)): p.sample_id for p in batch}
        ended: dict[str, list[Rollout]] = {}
        while both.engine.is_busy:
            ended |= {ids[request]: rollouts for request, rollouts in both.engine.step()}
        return ended

    together = answers(prompts, seed=1)
    alone = {name: rollouts for p in reversed(prompts) for name, rollouts in answers([p], seed=1).items()}
    for name, rollouts in together.items():
        for one, other in zip(rollouts, alone[name], strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            assert np.abs(one.logprobs - other.logprobs).max() < 1e-5  # rounding
        assert rollouts[0].token_ids.tolist() != rollouts[1].token_ids.tolist()
    elsewhere = answers([replace(prompts[0], sample_id="another"), prompts[1]], seed=1)
    assert elsewhere["another"][0].token_ids.tolist() != together["sample 0"][0].token_ids.tolist()
    assert answers(prompts[:1], seed=2)["sample 0"][0].token_ids.tolist() != together["sample 0"][0].token_ids.tolist()


def test_placeholders_are_never_sampled(both: Both) -> None:
    rollouts = [
        r for group in both.generate([prompt_of(both.family, (4, 56, 56))] * 4, n=16, max_tokens=48) for r in group
    ]
    seen = np.concatenate([r.token_ids for r in rollouts])
    assert len(seen) > 1000 and not np.isin(seen, both.family.banned_tokens).any()


def test_new_weights_reach_every_layer_and_no_cache_keeps_old_ones(both: Both) -> None:
    prompt = prompt_of(both.family, (8, 56, 56), seed=2)
    (before,) = both.generate([prompt])
    both.move_weights(seed=1)
    assert both.gap(prompt, before) > 1e-2  # the trainer has moved away
    both.sync()
    (after,) = both.generate([prompt])  # the same prompt: encoder and prefix cache knew it
    assert both.gap(prompt, after) < 1e-4
    assert after[0].versions == (WeightSpan(both.version, 0, len(after[0].token_ids)),)
    assert both.engine.weight_version == both.version


def test_weights_change_between_two_steps_of_a_request(both: Both) -> None:
    both.sync()
    old = both.version
    both.engine.submit(prompt_of(both.family, (8, 56, 56), seed=3), Sampling(1, 1.0, 200))
    ended: list[tuple[str, list[Rollout]]] = []
    for _ in range(6):
        ended += both.engine.step()
    both.move_weights(seed=2)
    both.sync()
    while both.engine.is_busy:
        ended += both.engine.step()
    ((_, (rollout,)),) = ended
    if rollout.finish_reason == "stop" and len(rollout.token_ids) < 6:
        pytest.skip("the random model ended its turn before the update")
    assert [s.version for s in rollout.versions] == [old, both.version]
    assert rollout.versions[0].end == rollout.versions[1].start
    assert rollout.versions[1].end == len(rollout.token_ids)


def test_requests_in_flight_keep_what_they_have_and_new_ones_see_no_old_prefix(both: Both) -> None:
    both.sync()
    prompt = prompt_of(both.family, (8, 56, 56), seed=4)
    old = both.engine.submit(prompt, Sampling(2, 1.0, 40))
    for _ in range(4):
        assert not both.engine.step()
    both.move_weights(seed=5)
    both.sync()
    new = both.engine.submit(prompt, Sampling(2, 1.0, 4))  # the same prompt, while the first is still answered
    ended: dict[str, list[Rollout]] = {}
    steps = 0
    while both.engine.is_busy:
        ended |= dict(both.engine.step())
        steps += 1
    assert steps <= 40 - 4 + 2  # what was generated was not generated again
    assert both.gap(prompt, ended[new]) < 1e-4
    assert {tuple(s.version for s in r.versions) for r in ended[old] if len(r.token_ids) > 6} <= {
        (both.version - 1, both.version)
    }


def test_images_and_videos_in_one_prompt(both: Both) -> None:
    both.sync()
    prompt = mixed_prompt(both.family)
    (rollouts,) = both.generate([prompt], n=3)
    assert both.gap(prompt, rollouts) < 1e-4
    blank = replace(prompt, patches=np.zeros_like(prompt.patches))
    assert both.gap(blank, rollouts) > 1e-3


def test_an_engine_that_sleeps_answers_after_the_next_weights_and_with_them(both: Both) -> None:
    """On CPU vLLM frees no memory; the rest is as on a GPU."""
    both.sync()
    prompt = prompt_of(both.family, (8, 56, 56), seed=8)
    both.engine.submit(prompt, Sampling(1, 1.0, 4))
    both.engine.sleep()
    assert not both.engine.is_asleep  # it has work
    while both.engine.is_busy:
        both.engine.step()
    both.engine.sleep()
    both.engine.sleep()
    assert both.engine.is_asleep
    request = both.engine.submit(prompt, Sampling(2, 1.0, 4))
    assert both.engine.step() == []
    both.move_weights(seed=9)
    both.sync()
    assert not both.engine.is_asleep
    ended: dict[str, list[Rollout]] = {}
    while both.engine.is_busy:
        ended |= dict(both.engine.step())
    assert both.gap(prompt, ended[request]) < 1e-4


def test_videos_shown_otherwise_are_those_of_the_trainer(both: Both) -> None:
    both.sync()
    prompt = prompt_of(both.family, (8, 56, 56), seed=6)
    views: tuple[View, ...] = ("shuffled", "shuffled_patches", "blank", "one_frame")
    requests = {both.engine.submit(prompt, Sampling(2, 1.0, 6, view=view)): view for view in views}
    ended: dict[str, list[Rollout]] = {}
    while both.engine.is_busy:
        ended |= dict(both.engine.step())
    for request, view in requests.items():
        assert both.gap(seen_as(prompt, view, 2), ended[request]) < 1e-4 < both.gap(prompt, ended[request])


def test_weights_change_while_requests_from_the_prefix_cache_are_in_flight(both: Both) -> None:
    """The worker has to have their pixels still: vision tower and prompt are computed again."""
    both.sync()
    prompt = prompt_of(both.family, (8, 56, 56), seed=7)
    both.generate([prompt])  # now the cache knows it
    both.engine.submit(prompt, Sampling(4, 1.0, 60))
    ended = [*both.engine.step(), *both.engine.step()]
    both.move_weights(seed=3)
    both.sync()
    while both.engine.is_busy:
        ended += both.engine.step()
    ((_, rollouts),) = ended
    assert [len(rollouts), {r.versions[-1].version for r in rollouts}] == [4, {both.version}]


def test_parity_check_passes_where_all_is_well(both: Both) -> None:
    assert run_check(both) < 1e-4


def test_parity_check_finds_transformers_positions(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    network = both.policy.network.model
    plain = network.forward

    def with_their_positions(**inputs: object) -> object:
        """Positions of each prompt by transformers' rule; responses count on from them."""
        layout = inputs["shared_prefix"]
        ids, positions = inputs["input_ids"], inputs["position_ids"].clone()  # type: ignore[attr-defined]
        prompt = layout.prompt_index[0][layout.prompt_index[0] >= 0]
        theirs, _ = network.get_rope_index(
            ids[:, prompt],
            (ids[:, prompt] == both.family.video_token).int() * 2,
            video_grid_thw=inputs["video_grid_thw"],
        )
        shift = positions[:, 0, prompt].max() - theirs.max()
        positions[:, :, prompt] = theirs
        positions[:, :, len(prompt) :] -= shift
        return plain(**{**inputs, "position_ids": positions})

    monkeypatch.setattr(network, "forward", with_their_positions)
    with pytest.raises(UserError, match=r"2 \(tall\): log-probs of engine and trainer differ") as e:
        run_check(both)
    assert "(as is)" not in str(e.value)  # T <= max(H, W) there: both rules agree


def test_parity_check_finds_pixels_normalised_twice(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = both.family.engine_input

    def normalised_before(prompt: Prompt) -> object:
        given = plain(prompt)
        for item in given["mm_kwargs"]["video"]:
            pixels = item["pixel_values_videos"]
            pixels.data = normalise(pixels.data, both.family, torch.float32)
        given["mm_hashes"]["video"] = [f"{h}-normalised" for h in given["mm_hashes"]["video"]]
        return given

    monkeypatch.setattr(both.family, "engine_input", normalised_before)
    with pytest.raises(UserError, match="log-probs of engine and trainer differ"):
        run_check(both)


def test_parity_check_finds_a_dropped_video(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.inputs import tokens_input

    monkeypatch.setattr(both.family, "engine_input", lambda prompt: tokens_input(prompt.token_ids.tolist()))
    with pytest.raises(UserError, match="the engine does not see the video"):
        run_check(both)


def test_parity_check_finds_a_trainer_without_video(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "rlvid.models.tower.normalise", lambda patches, family, dtype: torch.zeros(patches.shape, dtype=dtype)
    )
    with pytest.raises(UserError, match="the trainer does not see the video"):
        run_check(both)


def test_an_update_that_lacks_a_weight_is_an_error(both: Both) -> None:
    """The last test of the module: an engine that half took its weights is of no use, the fleet starts another."""
    named = [(n, p) for n, p in both.policy.network.named_parameters() if "layers.2.mlp.down_proj" not in n]
    both.version += 1
    with pytest.raises(RuntimeError, match=r"1 weights did not arrive.*layers\.2\.mlp\.down_proj"):
        both.engine.update_weights(both.version, list(to_buckets(in_parts(named, 2**26))))
