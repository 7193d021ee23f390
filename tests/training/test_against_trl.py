"""The losses of GRPO's relatives on the same tensors as TRL's trainer.

Skipped where TRL is not installed: rlvid does not depend on it (`make bench` installs it).
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlvid.algorithms.policy_loss import token_weights
from rlvid.config import GrpoConfig
from rlvid.models import torchvision_ops
from rlvid.training.batch import Group
from rlvid.training.objectives import PolicyGradient

pytest.importorskip("trl", reason="TRL is not installed")

LENGTHS = (3, 5, 1, 4)
LONGEST = 6
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # our keys, TRL's
    "grpo": ({"loss_average": "sequence", "kl_coef": 0.1}, {"loss_type": "grpo", "beta": 0.1}),
    "dapo": ({"variant": "dapo"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr_grpo": ({"variant": "dr_grpo"}, {"loss_type": "dr_grpo"}),
    "cispo": ({"variant": "cispo"}, {"loss_type": "cispo", "epsilon_high": 5.0}),
    "gspo": (
        {"variant": "gspo", "clip_low": 0.2, "clip_high": 0.2},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
}


def trl_loss(logprobs: torch.Tensor, arrays: dict[str, torch.Tensor], **settings: Any) -> torch.Tensor:
    """`GRPOTrainer._compute_loss` on padded tensors [B, T]; the rest of the trainer is not there."""
    torchvision_ops.ensure()  # before transformers' processors are imported
    from trl import GRPOTrainer

    trainer = SimpleNamespace(
        importance_sampling_level="token",
        epsilon_low=0.2,
        epsilon_high=0.2,
        beta=0.0,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        max_completion_length=LONGEST,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
    )
    vars(trainer).update(settings)
    mask = (torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]).int()
    ids = torch.zeros(len(LENGTHS), LONGEST, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": arrays["advantages"],
        "old_per_token_logps": arrays["old"],
        "ref_per_token_logps": arrays["ref"],
        "num_items_in_batch": torch.tensor(float(sum(LENGTHS))),
    }
    loss: torch.Tensor = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_those_of_trl(name: str) -> None:
    ours, theirs = CASES[name]
    cfg = GrpoConfig.model_validate({"old_logprobs": "trainer", **ours})
    generator = torch.Generator().manual_seed(0)
    shape = (len(LENGTHS), LONGEST)
    old = -torch.rand(shape, generator=generator) * 3 - 0.5
    padded = (old + 0.4 * torch.randn(shape, generator=generator)).requires_grad_()
    arrays = {"old": old, "ref": old + 0.2, "advantages": torch.tensor([1.0, -0.5, 2.0, -1.5])}
    expected = trl_loss(padded, arrays, **theirs)
    expected.backward()
    assert padded.grad is not None
    real = torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]
    flat = padded.detach()[real].requires_grad_()
    weights = token_weights(LENGTHS, cfg.loss_average, LONGEST)
    tokens = {
        "weights": np.repeat(weights, LENGTHS),
        "advantages": np.repeat(arrays["advantages"].numpy(), LENGTHS),
        "rollout_logprobs": old[real].numpy(),
        "old_logprobs": old[real].numpy(),
        "ref_logprobs": arrays["ref"][real].numpy(),
    }
    group = Group("prompt", 1, tuple(np.zeros(n, np.int32) for n in LENGTHS), tokens)
    loss, _ = PolicyGradient(cfg, "trainer")(flat, [group])
    loss.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(flat.grad, padded.grad[real], rtol=1e-5, atol=1e-7)
