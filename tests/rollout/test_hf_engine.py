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
from tests.prompts import FAMILIES, prompt_of


@pytest.fixture(scope="module", params=FAMILIES[:-1])
def engine(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> PlainEngine:
    folder = tiny_models[request.param]
    family = load_family(folder)
    return PlainEngine(load_model(folder, "float32").eval(), family)


def clips_of(engine: PlainEngine, n_frames: int) -> list[tuple[int, int, int]]:
    """One clip where the family sees videos."""
    side = 2 * engine.family.frame_multiple if engine.family.frame_multiple < 56 else 56
    return [(n_frames, side, side)] if isinstance(engine.family, VisionFamily) else []


def test_prompts_side_by_side_are_answered_as_alone(engine: PlainEngine) -> None:
    short, long = (
        prompt_of(engine.family, *clips_of(engine, n), question=question)
        for n, question in ((2, "What?"), (8, "Which shape is moving, and where does it go?"))
    )
    assert short.length < long.length
    together = engine.answers([short, long], 6)
    for prompt, ids in zip((short, long), together, strict=True):
        (alone,) = engine.answers([prompt], 6)
        assert ids.tolist() == alone.tolist()


def test_each_token_is_the_likeliest_after_those_before(engine: PlainEngine) -> None:
    prompt = prompt_of(engine.family, *clips_of(engine, 8))  # merged, longer in time than in space
    ids = engine.answers([prompt], 5)[0].tolist()
    assert 1 <= len(ids) <= 5
    everything = [i for i in range(engine.family.tokenizer.get_vocab_size()) if i not in engine.family.banned_tokens]
    for i, token in enumerate(ids):
        logprobs = engine.first_logprobs(extended(prompt, ids[:i]), everything, 1.0)
        assert np.exp(logprobs.astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-4)
        assert logprobs[everything.index(token)] == pytest.approx(logprobs.max(), abs=1e-4)


def test_an_answer_ends_with_its_turn(engine: PlainEngine) -> None:
    prompt = prompt_of(engine.family, *clips_of(engine, 2))
    head = engine._network.lm_head
    if head.weight is engine._network.get_input_embeddings().weight:
        pytest.skip("its head is its embedding, which must not be 0")
    weight = head.weight.detach().clone()
    try:
        with torch.no_grad():  # every logit 0 but that of the end
            head.weight.zero_()
            head.weight[engine.family.end_of_turn] = 1.0
            hidden_sum_is_positive = engine.answers([prompt], 1)[0][0] == engine.family.end_of_turn
            if not hidden_sum_is_positive:
                head.weight.neg_()
        assert engine.answers([prompt], 4)[0].tolist() == [engine.family.end_of_turn]
    finally:
        with torch.no_grad():
            head.weight.copy_(weight)
