"""Adapters in the real engine, in the trainer's network and merged into a checkpoint: the same log-probs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlvid.config import LoraConfig, RolloutConfig
from rlvid.errors import UserError
from rlvid.models.families import load_family
from rlvid.models.families.vision import VisionFamily
from rlvid.models.loading import load_model
from rlvid.models.lora import add_adapters, file_name, is_adapter, merged, plain_name, save_adapter
from rlvid.rollout.engine import Sampling
from rlvid.rollout.vllm_engine import VllmEngine
from rlvid.rollout.weights.buckets import to_buckets
from rlvid.training.batch import Group
from rlvid.training.packing import PackedPolicy, pack
from rlvid.training.parameters import in_parts
from rlvid.types import Rollout
from tests.prompts import prompt_of

LORA = LoraConfig(rank=5, alpha=20.0)
ROLLOUT = RolloutConfig(max_model_len=512, max_sequences=32)


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> PackedPolicy:
    """A policy whose adapters do change something."""
    policy = PackedPolicy(load_model(tiny_model, "float32"), load_family(tiny_model))
    add_adapters(policy.network, LORA, VisionFamily.no_lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in policy.network.named_parameters():
            if ".lora_B." in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def exported(policy: PackedPolicy, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merged checkpoint, the adapter beside it."""
    folder = tmp_path_factory.mktemp("merged")
    state = dict(policy.network.named_parameters())
    adapters = {file_name(n): p for n, p in state.items() if is_adapter(n)}
    save_adapter(folder / "adapter", adapters, LORA, VisionFamily.no_lora, base=str(tiny_model))
    policy.network.save_pretrained(
        folder, state_dict={plain_name(n): merged(n, t, state, LORA) for n, t in state.items() if not is_adapter(n)}
    )
    for file in tiny_model.iterdir():
        if not (folder / file.name).exists() and "safetensors" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@torch.no_grad()
def scored(policy: PackedPolicy, rollouts: list[Rollout]) -> np.ndarray:
    prompt = prompt_of(policy.family, (8, 56, 56))
    ids = tuple(r.token_ids for r in rollouts)
    return policy(pack([Group(prompt, prompt.cost, ids, temperature=1.0)]))[0].numpy()


def generate(engine: VllmEngine) -> list[Rollout]:
    engine.submit(prompt_of(engine.family, (8, 56, 56)), Sampling(3, 1.0, 8))
    while engine.is_busy:
        if ended := engine.step():
            return ended[0][1]
    raise AssertionError("no answer")


def gap(policy: PackedPolicy, rollouts: list[Rollout]) -> float:
    return float(np.abs(np.concatenate([r.logprobs for r in rollouts]) - scored(policy, rollouts)).max())


@pytest.mark.engine
def test_engine_takes_adapters_alone_and_agrees_with_the_trainer(policy: PackedPolicy, tiny_model: Path) -> None:
    engine = VllmEngine(tiny_model, policy.family, ROLLOUT, "float32", seed=0, on_gpu=False, lora=LORA)
    plain = generate(engine)
    assert gap(PackedPolicy(load_model(tiny_model, "float32"), policy.family), plain) < 1e-5
    assert gap(policy, plain) > 1e-2

    def sync(version: int) -> None:
        adapters = {file_name(n): p for n, p in policy.network.named_parameters() if is_adapter(n)}
        engine.update_weights(version, list(to_buckets(in_parts(adapters.items(), 2**26))))

    sync(1)
    assert gap(policy, generate(engine)) < 1e-5
    with torch.no_grad():  # a second update replaces the first
        for name, p in policy.network.named_parameters():
            if ".lora_B." in name:
                p.mul_(-1.0)
    sync(2)
    rollouts = generate(engine)
    assert gap(policy, rollouts) < 1e-5
    assert {v.version for r in rollouts for v in r.versions} == {2}
    with torch.no_grad():
        for name, p in policy.network.named_parameters():
            if ".lora_B." in name:
                p.mul_(-1.0)


@pytest.mark.engine
def test_merged_checkpoint_serves_the_adapted_policy(policy: PackedPolicy, exported: Path) -> None:
    engine = VllmEngine(exported, policy.family, ROLLOUT, "float32", seed=0, on_gpu=False)
    rollouts = generate(engine)
    assert gap(policy, rollouts) < 1e-5
    alone = PackedPolicy(load_model(exported, "float32"), policy.family)
    np.testing.assert_allclose(scored(alone, rollouts), scored(policy, rollouts), atol=1e-5)


def test_peft_loads_the_adapter_file(exported: Path, tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(tiny_model)
    ids = torch.randint(20, 200, (2, 9))
    plain = base(input_ids=ids).logits.detach()
    adapted = PeftModel.from_pretrained(base, exported / "adapter")(input_ids=ids).logits
    whole = AutoModelForImageTextToText.from_pretrained(exported)(input_ids=ids).logits
    torch.testing.assert_close(adapted, whole, atol=1e-5, rtol=0)
    assert (adapted - plain).abs().max() > 1e-2


def test_target_that_no_layer_has(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"model\.lora\.targets=\['query'\]"):
        add_adapters(load_model(tiny_model, "float32"), LoraConfig(targets=("query",)), ())


def test_vision_tower_has_no_adapters(policy: PackedPolicy) -> None:
    names = [n for n, p in policy.network.named_parameters() if p.requires_grad]
    assert names
    assert not any("visual" in n for n in names)
