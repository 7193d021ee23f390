"""A rank of `test_zero3.py`: every objective on work that differs from rank to rank as much as it can.

One rank has prompts without a clip and long responses; the other has one with two clips and short ones.
Rows and chunks of logits are small, so each rank has another number of them, and some groups
are deeper than a row. Every parameter is sharded: DeepSpeed
would keep those of a tiny model whole. Two ranks compute their activations again, one rank keeps them.

A gather of a small layer takes longer than its product, so each family trains with the objectives of a policy, and one
family with those of the heads too; zero3_heads_rank.py has the heads for all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

CLIPS = (0, 2, 0)  # of the prompts; a rank has every second one
LOGITS = 2000  # at a time: those of a few tokens
PATCHES = 32  # at a time: those of a frame or two
OUTPUTS = ("a", "b")
ARRAYS = ("advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs", "values", "returns")


def run(rank: int, world_size: int, stage: int, model: Path, folder: Path, heads: bool = False) -> dict[str, Any]:
    from rlvid.config import DpoConfig, GrpoConfig, ModelConfig, TrainConfig
    from rlvid.models import tower
    from rlvid.models.families import load_family
    from rlvid.models.families.vision import VisionFamily
    from rlvid.models.heads import VALUE, Head
    from rlvid.training import learner, objectives, packing
    from rlvid.training.batch import Group
    from rlvid.types import Span
    from tests.prompts import prompt_of

    family = load_family(model)
    memory = {"micro_batch_tokens": 90, "activation_checkpointing": world_size > 1}
    cfg = TrainConfig(zero_stage=stage, lr=1e-3, max_grad_norm=1.0, **memory)
    settings = learner.deepspeed_config(cfg, "float32", world_size)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    groups, side = [], -(-56 // family.frame_multiple) * family.frame_multiple
    for i, n in enumerate(CLIPS):
        shapes = [(4, side, side)] * n if isinstance(family, VisionFamily) else []
        prompt = prompt_of(family, *shapes, seed=i, question="Which shape is moving? " * (1 + 2 * i))
        ids = np.random.default_rng(i).integers(20, 60, size=(12 if i % 2 == 0 else 3) + 5).astype(np.int32)
        pairs = (ids[:-5], ids[-5:], ids[:3], ids[2:4])
        groups.append(Group(prompt, prompt.cost, pairs if i else pairs[:2], unit_size=2))
    # of an earlier answer, on the rank whose group is not deep
    talks = [replace(g, in_prompt=(Span(3, 2),)) if i == 1 else g for i, g in enumerate(groups)]
    n_pairs = sum(len(g.responses) // 2 for g in groups)
    total = sum(g.n_tokens for g in groups)

    def with_arrays(group: Group[Any], temperature: float | None = None) -> Group[Any]:
        values = np.random.default_rng(group.n_tokens).normal(-4, 0.1, (len(ARRAYS), group.n_tokens)).astype(np.float32)
        tokens = dict(zip(ARRAYS, values, strict=True))
        weights = np.full(group.n_tokens, 1 / total, np.float32)
        return replace(group, temperature=temperature).with_tokens(weights=weights, **tokens)

    labels = [np.array([1 + i, 4 - i], dtype=np.float32) for i in range(len(groups))]
    graded = [Group(g.prompt, g.prompt_cost, targets={"labels": x}) for g, x in zip(groups, labels, strict=True)]
    policy = objectives.PolicyGradient(GrpoConfig(kl_coef=0.1), "trainer")
    values = objectives.Values(0.2)
    policies: list[tuple[Head | None, list[tuple[str, Any, Sequence[Group[Any]]]]]] = [
        (
            None,
            [
                ("supervised", objectives.Supervised(), [with_arrays(g) for g in talks]),
                ("dpo", objectives.Preferred(DpoConfig(), n_pairs), [with_arrays(g) for g in groups]),
            ],
        ),
        (VALUE, [("ppo", objectives.ActorCritic(policy, values, 0.5), [with_arrays(g, 0.7) for g in groups])]),
    ]
    scorers: list[tuple[Head | None, list[tuple[str, Any, Sequence[Group[Any]]]]]] = [
        (Head(OUTPUTS, 2.5), [("regression", objectives.Regression(len(groups)), graded)]),
        (Head(OUTPUTS[:1]), [("bradley_terry", objectives.BradleyTerry(n_pairs), groups)]),
        (VALUE, [("critic", values, [with_arrays(g) for g in groups])]),
    ]
    works = scorers if heads else policies
    if family.architecture == "Qwen2VLForConditionalGeneration":
        works = policies + scorers
    found: dict[str, Any] = {}
    again: Counter[str] = Counter()  # calls in a backward

    def note(name: str, *_: Any) -> None:
        again[name] += torch._C._current_graph_task_id() >= 0

    for head, steps in works:
        with (
            mock.patch.object(learner, "deepspeed_config", return_value=settings),
            mock.patch.object(packing, "LOGITS_AT_A_TIME", LOGITS),
            mock.patch.object(tower, "PATCHES_AT_A_TIME", PATCHES),
        ):
            is_policy = steps[0][0] == "ppo"
            trained = learner.Learner(model, family, ModelConfig(path=model), cfg, head, is_policy)
            for name, module in trained.policy.named_modules():
                if name.endswith(".0.mlp"):  # of the first layers of text and tower
                    module.register_forward_pre_hook(partial(note, name))
            for name, objective, everything in steps:
                # A new head of scores is 0, and so is the network's gradient at first
                n_steps = 2 if head and head != VALUE else 1
                stats = [trained.step(everything[rank::world_size], objective, lr=1e-3) for _ in range(n_steps)]
                found[name] = [s[key] for s in stats for key in ("loss", "grad_norm")]
            found[f"outputs {len(found)}"] = np.concatenate(trained.outputs(everything)).flatten().tolist()
    return {"numbers": found, "again": +again}
