"""The experience of a step as files, to train on it again: arrays as safetensors, the rest as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from rlvid.errors import UserError
from rlvid.files import replace_folder
from rlvid.training.policy_batch import Experience
from rlvid.types import Encoded, Message, Prompt, Reward, Rollout, Sample, Span, WeightSpan

ARRAYS, REST = "arrays.safetensors", "experience.json"
OF_PROMPT = ("token_ids", "positions", "patches", "grid_thw")


def save_dump(folder: Path, experience: Experience, prompts: Sequence[Prompt], reference: Sequence[Any] | None) -> None:
    """Write `folder`, whole or not at all.

    Args:
        prompts: those that `experience.prompts` refer to.
        reference: log-probs under the reference, one array per group, where there is a KL term.
    """
    arrays: dict[str, Any] = {"baselines": np.asarray(experience.baselines, dtype=np.float64)}
    rows = []
    for i, (encoded, prompt) in enumerate(zip(experience.prompts, prompts, strict=True)):
        arrays |= {f"{i}.{name}": np.ascontiguousarray(getattr(prompt, name)) for name in OF_PROMPT}
        if reference is not None:
            arrays[f"{i}.reference"] = reference[i]
        for j, rollout in enumerate(experience.rollouts[i]):
            arrays |= {f"{i}.{j}.token_ids": rollout.token_ids, f"{i}.{j}.logprobs": rollout.logprobs}
        sample = encoded.sample
        rows.append(
            {
                "sample": [sample.id, sample.question, sample.answer, sample.problem_type],
                "cost": encoded.cost,
                "spans": [asdict(span) for span in prompt.spans],
                "clip_ids": prompt.clip_ids,
                "seconds_per_patch": prompt.seconds_per_patch,
                "rewards": [asdict(reward) for reward in experience.rewards[i]],
                "rollouts": [
                    [r.text, r.finish_reason, [asdict(span) for span in r.versions]] for r in experience.rollouts[i]
                ],
            }
        )
    part = folder.with_name(f"{folder.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    save_file(arrays, part / ARRAYS)
    (part / REST).write_text(json.dumps(rows))
    replace_folder(part, folder)


def load_dump(folder: Path) -> Experience:
    """The experience that `save_dump` wrote; its prompts are whole, not references.

    Raises:
        UserError: there is none.
    """
    try:
        arrays, rows = load_file(folder / ARRAYS), json.loads((folder / REST).read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{folder} has no dump of a step ({e}): set run.dump_every in the run's config") from e
    prompts, rollouts, rewards = [], [], []
    for i, row in enumerate(rows):
        name, question, answer, problem_type = row["sample"]
        token_ids, positions, patches, grid_thw = (arrays[f"{i}.{key}"] for key in OF_PROMPT)
        prompt = Prompt(
            name,
            token_ids,
            positions,
            patches,
            grid_thw,
            spans=tuple(Span(**span) for span in row["spans"]),
            clip_ids=tuple(row["clip_ids"]),
            seconds_per_patch=tuple(row["seconds_per_patch"]),
        )
        sample = Sample(name, (), (Message("user", (question,)),), answer, problem_type=problem_type)
        prompts.append(Encoded(sample, prompt, prompt.length, row["cost"], prompt.clip_ids))
        rewards.append([Reward(**reward) for reward in row["rewards"]])
        rollouts.append(
            [
                Rollout(
                    name,
                    arrays[f"{i}.{j}.token_ids"],
                    arrays[f"{i}.{j}.logprobs"],
                    text,
                    reason,
                    tuple(WeightSpan(**span) for span in versions),
                )
                for j, (text, reason, versions) in enumerate(row["rollouts"])
            ]
        )
    reference = [arrays[f"{i}.reference"] for i in range(len(rows))] if "0.reference" in arrays else None
    return Experience(
        prompts, rollouts, rewards, arrays["baselines"], reference=None if reference is None else lambda: reference
    )
