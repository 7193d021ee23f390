"""What a job reads: one manifest or several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from jobs.inputs import describe_inputs, read_split
from jobs.specs import JOBS, PAIRS, SAMPLES
from rlvid.config import DataConfig, DpoJobConfig


def write(path: Path, answers: list[str]) -> Path:
    rows = [{"id": i, "question": f"{path.stem} {i}?", "answer": x} for i, x in enumerate(answers)]
    pairs = [row | {"chosen": row["answer"], "rejected": "nothing"} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return path


def test_a_mix_reads_every_source_in_its_own_form_and_balances_all_of_it(tmp_path: Path) -> None:
    first = {"train": write(tmp_path / "one.jsonl", ["yes", "no"]), "eval": write(tmp_path / "held.jsonl", ["yes"])}
    (tmp_path / "two.json").write_text(
        json.dumps(
            [{"id": "x", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "yes"}]}]
        )
    )
    second = {"train": tmp_path / "two.json", "dialect": "llava", "weight": 2.0}
    data = DataConfig.model_validate({"mix": {"a": first, "b": second}, "balance": "answer"})
    rows = read_split(SAMPLES, data, "train")
    assert {s.id: s.weight for s in rows.samples} == {"a/0": 2 / 3, "a/1": 2.0, "b/x": 4 / 3}
    assert [s.id for s in read_split(SAMPLES, data, "eval").samples] == ["a/0"]
    alone = DataConfig.model_validate({"mix": {"a": {"eval": first["eval"]}}, "balance": "answer"})  # as `rlvid eval`
    assert not read_split(SAMPLES, alone, "train").samples


def test_pairs_of_a_mix_have_the_samples_weights(tmp_path: Path) -> None:
    mix = {"p": {"train": write(tmp_path / "one.jsonl", ["yes", "no"]), "weight": 3.0}}
    cfg = DpoJobConfig.model_validate({"data": {"mix": mix}, "model": {"tiny": {"family": "qwen2"}}})
    rows = read_split(PAIRS, cfg.data, "train")
    assert [(p.sample.id, p.sample.weight, p.chosen) for p in rows.pairs] == [("p/0", 3.0, "yes"), ("p/1", 3.0, "no")]
    assert any("data.train: 0 of 2 samples have a video" in line for line in describe_inputs(cfg, JOBS["dpo"]))


def test_a_mix_does_not_go_with_other_manifests(tmp_path: Path) -> None:
    file = write(tmp_path / "one.jsonl", ["yes"])
    with pytest.raises(ValidationError, match="mix takes the place of train"):
        DataConfig.model_validate({"mix": {"a": {"train": file}}, "train": file})
