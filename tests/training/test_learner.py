"""The real DeepSpeed engine on one and two processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlvid.models.families import load_family
from rlvid.training.packing import normalise
from tests.prompts import group_of, prompt_of

ROOT = Path(__file__).parents[2]


COMPILERS = ("c++", "g++", "gcc", "cc", "clang", "ninja")


def run_ranks(world_size: int, stage: int, model: Path, folder: Path, program: str = "learner_rank") -> dict[str, Any]:
    """Run the ranks of a program, which find no compiler; what rank 0 prints."""
    bare = folder / "bin"
    bare.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    environment |= {"PATH": str(bare), "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                f"tests.training.{program}",
                str(rank),
                str(world_size),
                str(stage),
                str(model),
                str(folder),
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=(folder / f"rank-{stage}-{world_size}-{rank}.log").open("w"),
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), (folder / f"rank-{stage}-{world_size}-0.log").read_text()[
        -2000:
    ]
    return dict(json.loads(outputs[0].splitlines()[-1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learner")


@pytest.fixture(scope="module")
def alone(tiny_model: Path, folder: Path) -> dict[str, Any]:
    return run_ranks(1, 0, tiny_model, folder)


def test_loss_of_the_first_step_is_the_mean_negative_logprob(alone: dict[str, Any], tiny_model: Path) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    family = load_family(tiny_model)
    model = Qwen2VLForConditionalGeneration.from_pretrained(tiny_model, attn_implementation="eager")
    nll = []
    for i, word in enumerate(("square", "two", "left", "red", "circle")):
        prompt, answer = prompt_of(family, (4 + 4 * (i % 2), 56, 56), seed=i), family.encode_answer(word)
        after = np.broadcast_to(prompt.next_position + np.arange(len(answer)), (3, len(answer)))
        with torch.no_grad():
            logits = model(
                input_ids=torch.from_numpy(np.concatenate([prompt.token_ids, answer])).long()[None],
                position_ids=torch.from_numpy(np.concatenate([prompt.positions, after], axis=1)).long()[:, None],
                pixel_values_videos=normalise(torch.from_numpy(prompt.patches), family, torch.float32),
                video_grid_thw=torch.from_numpy(prompt.grid_thw),
            ).logits[0, prompt.length - 1 : -1]
        nll.append(-logits.log_softmax(-1).gather(1, torch.from_numpy(answer).long()[:, None])[:, 0])
    assert alone["losses"][0] == pytest.approx(float(torch.cat(nll).mean()), abs=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_without_a_compiler_equal_one_process_under_every_zero_stage(
    stage: int, alone: dict[str, Any], tiny_model: Path, folder: Path
) -> None:
    two = run_ranks(2, stage, tiny_model, folder)
    assert not any(shutil.which(name, path=folder / "bin") for name in COMPILERS)
    assert not (folder / "extensions").exists()  # nothing was compiled
    assert two["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert two["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-4)
    assert two["again"] == pytest.approx(two["losses"][3], abs=1e-6)
    assert two["buckets"][0] == two["buckets"][1]


@pytest.fixture(scope="module")
def mixed_alone(tiny_models: dict[str, Path], folder: Path) -> dict[str, Any]:
    return run_ranks(1, 0, tiny_models["qwen3_vl"], folder, "mixed_rank")


@pytest.mark.parametrize("stage", [0, 3])
def test_rank_without_video_keeps_step_with_one_that_has_nothing_else(
    stage: int, mixed_alone: dict[str, Any], tiny_models: dict[str, Path], folder: Path
) -> None:
    """Steps and log-probs. Without the blank clip the ranks meet in different collectives."""
    two = run_ranks(2, stage, tiny_models["qwen3_vl"], folder, "mixed_rank")
    assert two["losses"] == pytest.approx(mixed_alone["losses"], abs=1e-5)
    assert two["grad_norms"] == pytest.approx(mixed_alone["grad_norms"], rel=1e-4)
    assert np.concatenate(two["logprobs"]) == pytest.approx(np.concatenate(mixed_alone["logprobs"][::2]), abs=1e-5)


def test_step_after_a_restored_checkpoint_repeats_the_step(alone: dict[str, Any]) -> None:
    assert alone["again"] == alone["losses"][3]
    assert alone["buckets"][0] == alone["buckets"][1] and len(alone["buckets"][0]) > 3
    assert alone["losses"][3] < alone["losses"][0]


def test_exported_policy_loads_in_transformers_with_equal_weights(alone: dict[str, Any], folder: Path) -> None:
    from rlvid.models.loading import load_model
    from rlvid.training.packing import PackedPolicy, pack

    export = folder / "export-0-1"
    family = load_family(export)
    answers = [family.encode_answer(word) for word in ("square", "two", "left", "red", "circle")]
    groups = [group_of(prompt_of(family, (4 + 4 * (i % 2), 56, 56), seed=i), a) for i, a in enumerate(answers)]
    with torch.no_grad():
        logprobs = PackedPolicy(load_model(export, "float32"), family)(pack(groups))[0]
    assert np.allclose(logprobs.numpy(), alone["logprobs"], atol=1e-5)
