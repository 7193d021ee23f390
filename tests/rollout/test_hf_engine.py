"""transformers' generation against the packed forward that trains the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlvid.models.families import load_family
from rlvid.models.families.vision import VisionFamily
from rlvid.models.loading import load_model
from rlvid.rewards.reward_model import extended
from rlvid.rollout.hf_engine import PlainEngine
from rlvid.rollout.vllm_engine import Sampling
from tests.prompts import prompt_of


@pytest.fixture(scope="module", params=["idefics2", "video_llava"])
def engine(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> PlainEngine:
    folder = tiny_models[request.param]
    family = load_family(folder)
    assert isinstance(family, VisionFamily)
    return PlainEngine(load_model(folder, "float32").eval(), family)


def test_each_token_is_the_likeliest_after_those_before(engine: PlainEngine) -> None:
    prompt = prompt_of(engine.family, (3, 56, 56))
    request = engine.submit(prompt, Sampling(1, 0.0, 5))
    ((ended, (rollout,)),) = engine.step()
    assert ended == request and not engine.is_busy
    ids = rollout.token_ids.tolist()
    assert 1 <= len(ids) <= 5 and rollout.text == engine.family.decode(ids)
    everything = [i for i in range(engine.family.tokenizer.get_vocab_size()) if i not in engine.family.banned_tokens]
    for i, token in enumerate(ids):
        logprobs = engine.first_logprobs(extended(prompt, ids[:i]), everything, 1.0)
        assert np.exp(logprobs.astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-4)
        assert logprobs[everything.index(token)] == pytest.approx(logprobs.max(), abs=1e-4)


def test_an_answer_ends_with_its_turn(engine: PlainEngine) -> None:
    prompt = prompt_of(engine.family, (2, 56, 56))
    head = engine._network.lm_head
    weight = head.weight.detach().clone()
    try:
        with torch.no_grad():  # every logit 0 but that of the end
            head.weight.zero_()
            head.weight[engine.family.end_of_turn] = 1.0
            hidden_sum_is_positive = engine.answer(prompt, 1)[0] == engine.family.end_of_turn
            if not hidden_sum_is_positive:
                head.weight.neg_()
        engine.submit(prompt, Sampling(1, 0.0, 4))
        ((_, (rollout,)),) = engine.step()
        assert rollout.token_ids.tolist() == [engine.family.end_of_turn]
        assert rollout.finish_reason == "stop" and rollout.text == ""
    finally:
        with torch.no_grad():
            head.weight.copy_(weight)
