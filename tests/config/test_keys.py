from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlvid.config import DpoJobConfig, GrpoJobConfig, IsrtJobConfig
from rlvid.config.jobs import JOB_CONFIGS
from rlvid.config.keys import check_paths, flatten, keys_of, may_change_on_resume, schemas_of
from rlvid.errors import UserError

ROOT = Path(__file__).parents[2]


def test_written_keys_find_their_schema() -> None:
    assert schemas_of(GrpoJobConfig, "rewards.3.weight")[0]["type"] == "number"
    assert schemas_of(JOB_CONFIGS["tune"], "space.train.lr.uniform")
    assert schemas_of(GrpoJobConfig, "train.stepz") == []


def test_flatten_enters_lists_of_sections_only() -> None:
    assert flatten({"a": {"b": [1, 2]}, "c": [{"d": 1}, {"d": 2}], "e": {}, "f": []}) == {
        "a.b": [1, 2],
        "c.0.d": 1,
        "c.1.d": 2,
        "e": {},
        "f": [],
    }


# --- resume -----------------------------------------------------------------------------------------------------------

# fmt: off
MEMORY_AND_TRANSPORT = [
    "rollout.max_model_len", "rollout.max_batched_tokens", "rollout.max_sequences", "rollout.max_videos",
    "rollout.block_size", "rollout.kv_cache_gib", "rollout.gpu_memory_utilization", "rollout.tensor_parallel",
    "rollout.replicas", "rollout.weight_transfer", "rollout.max_restarts", "train.micro_batch_tokens",
    "train.shared_prefix", "train.max_workers", "train.resize_interval_s", "train.max_failures", "data.cache_dir",
    "data.cache_gib", "data.max_bad_fraction", "placement.gpus", "placement.trainer_workers",
    "isrt.judge.concurrency", "isrt.judge.max_invalid_fraction", "isrt.chunk_size",
]
LENGTH_AND_OUTPUT = ["train.steps", "isrt.iterations", "evaluate.every", "run.wandb", "run.checkpoint_every"]
LEARNED = [
    "seed", "model.path", "model.lora.rank", "data.train", "data.suffix", "video.frames", "video.reader", "train.betas",
    "train.batch_size", "train.zero_stage", "rollout.temperature", "rollout.max_tokens", "rewards.0.weight",
    "rewards", "warm_start.steps", "isrt.judge.model", "isrt.judge.backend", "dpo.beta",
]
# fmt: on


@pytest.mark.parametrize("key", [*MEMORY_AND_TRANSPORT, *LENGTH_AND_OUTPUT])
def test_memory_transport_and_length_may_change_on_resume(key: str) -> None:
    assert schemas_of(IsrtJobConfig, key) and may_change_on_resume(IsrtJobConfig, key)


@pytest.mark.parametrize("key", LEARNED)
def test_what_decides_what_is_learned_is_fixed(key: str) -> None:
    assert schemas_of(IsrtJobConfig, key) and not may_change_on_resume(IsrtJobConfig, key)


def test_every_deadline_may_change_on_resume() -> None:
    for job, cls in JOB_CONFIGS.items():
        deadlines = [key for key, _ in keys_of(cls) if re.search(r"((timeout|deadline)_s$|^deadlines\.)", key)]
        assert len(deadlines) >= 4 or job == "tune"
        written = [key.replace(".N.", ".0.") for key in deadlines]
        assert [key for key in written if not may_change_on_resume(cls, key)] == []


def test_what_an_error_during_a_run_advises_may_change_on_resume() -> None:
    """Fault 20b: messages of actors, engines and models that say which key to raise, lower or set."""
    advice = re.compile(r"\b(?:raise|lower|set|or) ((?:rollout|placement|train|data|evaluate)\.[a-z_]+)")
    advised = {
        key
        for folder in ("actors", "rlvid/rollout", "rlvid/training", "rlvid/models", "rlvid/video")
        for path in (ROOT / folder).rglob("*.py")
        for key in advice.findall(path.read_text(encoding="utf-8"))
    }
    assert len(advised) >= 3
    assert {key for key in advised if not may_change_on_resume(GrpoJobConfig, key)} == set()


# --- paths that must exist (fault 21) ---------------------------------------------------------------------------------


def test_missing_inputs_are_named_by_their_own_keys(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cfg = DpoJobConfig.model_validate(
        {
            "model": {"path": tmp_path / "empty"},
            "data": {"train": tmp_path / "train.jsonl", "eval": tmp_path / "empty", "root": tmp_path / "clips"},
            "dpo": {"reference_path": tmp_path / "reference"},
        }
    )
    with pytest.raises(UserError) as caught:
        check_paths(cfg)
    assert str(caught.value).splitlines() == [
        f"model.path: {tmp_path}/empty is not a checkpoint folder with a config.json",
        f"  data.train: {tmp_path}/train.jsonl does not exist; expected a file",
        f"  data.eval: {tmp_path}/empty is not a file",
        f"  data.root: {tmp_path}/clips does not exist; expected a folder",
        f"  dpo.reference_path: {tmp_path}/reference does not exist; expected a checkpoint folder with a config.json",
    ]


def test_inputs_that_exist_and_outputs_that_do_not_are_fine(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "m.jsonl").write_text("")
    judge = {"judge": {"backend": "local", "path": tmp_path}}
    cfg = IsrtJobConfig.model_validate(
        {
            "run": {"dir": tmp_path / "not" / "yet"},
            "model": {"path": tmp_path},
            "data": {"train": tmp_path / "m.jsonl", "root": tmp_path, "cache_dir": tmp_path / "cache"},
            "isrt": judge,
        }
    )
    check_paths(cfg)
    with pytest.raises(UserError, match=r"isrt\.judge\.path: nowhere does not exist"):
        check_paths(
            cfg.model_copy(update={"isrt": cfg.isrt.model_validate({"judge": judge["judge"] | {"path": "nowhere"}})})
        )
