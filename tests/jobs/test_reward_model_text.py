"""Scores as generated text from end to end: trained, read strictly, and scored again with the real engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rlvid.synthetic.moving_shapes import write_mp4
from tests.jobs.test_reward_model import CONFIG, result, rlvid, rows_of

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]


def test_scores_as_text_are_generated_and_parsed_and_can_be_soft(tmp_path: Path) -> None:
    labels = {"dark": 3, "light": 2}  # always the same: only the format is learned
    for split, n in (("t", 8), ("e", 4)):
        rows = []
        for i in range(n):
            write_mp4(tmp_path / f"{split}{i}.mp4", np.full((4, 56, 56, 3), 20 * i, dtype=np.uint8), 8)
            row = {
                "id": f"{split}{i}",
                "video": f"{split}{i}.mp4",
                "question": f"a wall {i}",
                "answer": "",
                "labels": labels,
            }
            rows.append(row)
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "config.yaml"
    paths = {"train": tmp_path / "t.jsonl", "eval": tmp_path / "e.jsonl"}
    kind = "{kind: generation, template: question, dims: [light, dark]}"
    text = CONFIG.format(**paths, root=tmp_path, reward_model=kind, steps=60)
    config.write_text(text.replace("max_tokens: 4", "max_tokens: 48"))
    outcome = result(rlvid("reward-model", config))
    assert outcome["unparsed"] == 0 and outcome["n"] == 4 and outcome["spearman"] is None  # constant columns
    first = rows_of(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["eval/unparsed"] == 4  # the text of a random model is not a score

    out = tmp_path / "scores.jsonl"
    rlvid("score", tmp_path / "run", tmp_path / "e1.mp4", tmp_path / "e2.mp4", "--prompt", "a wall 1", "--out", out)
    for row in rows_of(out):
        assert row["scores"] == {"light": 2.0, "dark": 3.0}
        if soft := row.get("soft"):  # the tokenizer may have drawn a score and its neighbours into one token
            assert 1.5 < soft["light"] <= 2.0 and 2.2 < soft["dark"] <= 3.0
