"""transformers' generation against the packed forward that trains the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlvid.config import LoraConfig, RolloutConfig
from rlvid.models.families import load_family
from rlvid.models.families.vision import VisionFamily
from rlvid.models.loading import load_model
from rlvid.rewards.reward_model import extended
from rlvid.rollout.engine import Sampling
from rlvid.rollout.hf_engine import HfEngine, PlainEngine
from rlvid.rollout.weights.buckets import to_buckets
from rlvid.training.batch import Group
from rlvid.training.packing import PackedPolicy, pack
from rlvid.training.parameters import in_parts
from rlvid.types import Prompt, Rollout, WeightSpan
from tests.prompts import prompt_of

PLAIN = ("internvl", "smolvlm", "video_llama_3", "idefics2", "video_llava", "cobra")  # vLLM does not serve them


@pytest.fixture(scope="module", params=(*PLAIN, "qwen2_5_vl", "qwen2"))
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


# --- rollouts ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["idefics2", "cobra", "qwen2_5_vl"])
def hf(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> HfEngine:
    return engine_of(tiny_models[request.param])


def engine_of(folder: Path, lora: LoraConfig | None = None) -> HfEngine:
    cfg = RolloutConfig(max_model_len=400)
    return HfEngine(folder, load_family(folder), cfg, "float32", seed=0, on_gpu=False, lora=lora)


def ended(engine: HfEngine, *asked: tuple[Prompt, Sampling]) -> list[list[Rollout]]:
    order = [engine.submit(prompt, sampling) for prompt, sampling in asked]
    found: dict[str, list[Rollout]] = {}
    while engine.is_busy:
        found |= dict(engine.step())
    return [found[request] for request in order]


def test_log_probs_of_rollouts_are_the_packed_trainers(hf: HfEngine) -> None:
    prompts = prompt_of(hf.family, *clips_of(hf, 8)), prompt_of(hf.family, question="What?")
    policy = PackedPolicy(load_model(hf.family.folder, "float32"), hf.family)
    answers = ended(hf, *((p, Sampling(3, 0.7, 8, seed=1)) for p in prompts))
    groups = [
        Group(p, p.cost, tuple(r.token_ids for r in own), temperature=0.7)
        for p, own in zip(prompts, answers, strict=True)
    ]
    with torch.no_grad():
        expected = policy(pack(groups))[0].numpy()
    found = np.concatenate([r.logprobs for own in answers for r in own])
    assert np.abs(found - expected).max() < 1e-5
    for own in answers:
        assert len({r.token_ids.tobytes() for r in own}) > 1
        for r in own:
            assert not set(r.token_ids.tolist()) & set(hf.family.banned_tokens)
            assert (r.finish_reason == "stop") == (r.token_ids[-1] == hf.family.end_of_turn)
            assert r.versions == (WeightSpan(-1, 0, len(r.token_ids)),)


def test_a_seed_decides_the_rollouts_whatever_else_is_asked(hf: HfEngine) -> None:
    prompt, other = prompt_of(hf.family, *clips_of(hf, 4)), prompt_of(hf.family, question="What?")
    seeded = Sampling(2, 1.0, 6, seed="s")
    (alone,) = ended(hf, (prompt, seeded))
    _, again = ended(hf, (other, Sampling(2, 1.0, 6)), (prompt, seeded))
    assert [r.token_ids.tolist() for r in alone] == [r.token_ids.tolist() for r in again]
    first, second = ended(hf, *[(prompt, Sampling(2, 1.0, 6))] * 2)  # without a seed
    assert [r.token_ids.tolist() for r in first] != [r.token_ids.tolist() for r in second]
    ((greedy,),) = ended(hf, (prompt, Sampling(1, 0.0, 6)))
    assert greedy.token_ids.tolist() == hf.answers([prompt], 6)[0].tolist()
    ((nucleus,),) = ended(hf, (prompt, Sampling(1, 1.0, 6, top_p=1e-6)))
    assert nucleus.token_ids.tolist() == greedy.token_ids.tolist() and np.abs(nucleus.logprobs).max() < 1e-6


def test_prompts_share_a_batch_up_to_the_limits(hf: HfEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [prompt_of(hf.family, question=question) for question in ("What?", "Which shape moves?", "Where to?")]
    sampling = Sampling(2, 1.0, 6, seed="s")
    (together, *_), alone = ended(hf, *((p, sampling) for p in prompts)), ended(hf, (prompts[0], sampling))[0]
    assert [r.token_ids.tolist() for r in together] == [r.token_ids.tolist() for r in alone]
    for limit, batches in (("max_sequences", [4, 2]), ("max_batched_tokens", [2, 2, 2])):
        monkeypatch.setattr(hf, "_cfg", hf._cfg.model_copy(update={limit: 4}))
        for prompt in prompts:
            hf.submit(prompt, sampling)
        begun, n = [], 0
        while hf.is_busy:
            if not hf._unfinished:
                n = len(hf._queue)
            hf.step()
            if n:
                begun.append(2 * (n - len(hf._queue)))
                n = 0
        assert begun == batches
        monkeypatch.undo()


def test_weights_change_within_a_response(tiny_models: dict[str, Path]) -> None:
    """Between two tokens; its span says from where on."""
    engine, other = (engine_of(tiny_models["video_llava"]) for _ in range(2))
    with torch.no_grad():
        for p in other._network.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    prompt, sampling = prompt_of(engine.family, *clips_of(engine, 2)), Sampling(4, 1.5, 12, seed=3)
    engine.submit(prompt, sampling)
    engine.step()
    engine.step()
    engine.update_weights(7, list(to_buckets(in_parts(list(other._network.named_parameters()), 2**20))))
    found: list[Rollout] = []
    while engine.is_busy:
        for _, rollouts in engine.step():
            found += rollouts
    longest = max(found, key=lambda r: len(r.token_ids))
    n = len(longest.token_ids)
    # the third token's logits were computed before the weights came
    assert n > 3 and longest.versions == (WeightSpan(-1, 0, 3), WeightSpan(7, 3, n))
    ((before, *_),) = ended(engine_of(tiny_models["video_llava"]), (prompt, sampling))
    assert before.token_ids[:3].tolist() == found[0].token_ids[:3].tolist()


def test_new_weights_come_in_buckets_and_must_be_complete(tiny_models: dict[str, Path]) -> None:
    engine, other = (engine_of(tiny_models["idefics2"]) for _ in range(2))
    with torch.no_grad():
        for p in other._network.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    named = list(other._network.named_parameters())
    first, *_, last = buckets = list(to_buckets(in_parts(named, 2**18)))
    assert len(buckets) > 2 and engine.weight_digest() != other.weight_digest()
    engine.update_weights(3, [first])
    assert (engine.is_updating, engine.weight_version) == (True, -1)
    engine.update_weights(3, buckets[1:])
    assert (engine.is_updating, engine.weight_version) == (False, 3)
    assert engine.weight_digest() == other.weight_digest()
    engine.update_weights(3, [first])  # not newer: ignored
    assert not engine.is_updating
    with pytest.raises(RuntimeError, match="weights did not arrive"):
        engine.update_weights(4, [last])


def test_adapters_alone_arrive_with_lora(tiny_models: dict[str, Path]) -> None:
    engine = engine_of(tiny_models["video_llava"], LoraConfig(rank=2))
    prompt = prompt_of(engine.family, *clips_of(engine, 2))
    ((before,),) = ended(engine, (prompt, Sampling(1, 0.0, 4)))
    named = [(name, torch.randn_like(p)) for name, p in engine._sent.items()]
    assert named and all("lora_" in name for name, _ in named)
    engine.update_weights(0, list(to_buckets(in_parts(named, 2**20))))
    ((after,),) = ended(engine, (prompt, Sampling(1, 0.0, 4)))
    assert np.abs(before.logprobs[0] - after.logprobs[0]) > 1e-3


def test_a_prompt_without_room_for_a_response_is_refused(hf: HfEngine) -> None:
    with pytest.raises(ValueError, match="leave no room in rollout.max_model_len=400"):
        hf.submit(prompt_of(hf.family, question="which " * 500), Sampling(1, 1.0, 4))
